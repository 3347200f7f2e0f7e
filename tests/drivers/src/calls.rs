//! Functions that guests call, of which the drivers know more than the number.

// pKVM's.
pub(crate) const MEM_SHARE: u64 = 0xc600_0003;
pub(crate) const MEM_UNSHARE: u64 = 0xc600_0004;
pub(crate) const MEM_RELINQUISH: u64 = 0xc600_0009;

// RSI's.
pub(crate) const REALM_CONFIG: u64 = 0xc400_0196;
pub(crate) const IPA_STATE_SET: u64 = 0xc400_0197;
pub(crate) const IPA_STATE_GET: u64 = 0xc400_0198;
pub(crate) const HOST_CALL: u64 = 0xc400_0199;

// PSCI's. Nobody comes back from the last two.
pub(crate) const CPU_ON: u64 = 0xc400_0003;
pub(crate) const CPU_OFF: u64 = 0x8400_0002;
pub(crate) const SYSTEM_OFF: u64 = 0x8400_0008;
