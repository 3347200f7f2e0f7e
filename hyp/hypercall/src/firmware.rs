//! The firmware at EL3 and what it says of itself.

use arm_psci::FunctionId;

use crate::registers::low_half;

/// Calls to the firmware.
pub trait Firmware {
    /// Executes `SMC #0` with x0 to x3 as given and x4 to x17 zero, and returns x0 to x3.
    ///
    /// Writes before the call are visible to a CPU that the call turns on.
    fn smc(&self, registers: [u64; 4]) -> [u64; 4];
}

/// A version in the format of PSCI and SMCCC: major in bits 30 to 16, minor in bits 15 to 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32);

impl Version {
    /// 1.0, the first PSCI with PSCI_FEATURES.
    pub(crate) const V1_0: Self = Self(0x1_0000);
    /// 1.1.
    pub(crate) const V1_1: Self = Self(0x1_0001);
    /// 1.2.
    pub(crate) const V1_2: Self = Self(0x1_0002);
}

pub(crate) const SMCCC_VERSION: u32 = 0x8000_0000;

/// What the firmware offers; asked once, because it does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Version of PSCI.
    pub(crate) psci: Version,
    /// Version of the SMC Calling Convention, if it is at least 1.1. Firmware of 1.0 need not have the call that tells it,
    /// nor anything else beyond PSCI.
    pub(crate) smccc: Option<Version>,
    /// The bit of CPU_SUSPEND's power state that says power-down: there are two formats (Arm DEN0022, 5.4.2).
    pub(crate) power_down: u32,
}

impl Offer {
    /// Asks the firmware.
    pub(crate) fn probe(firmware: &impl Firmware) -> Self {
        const EXTENDED_STATE_ID: u32 = 1 << 1;
        let call = |function: u32, argument: u32| -> Option<u32> {
            let [answer, ..] = firmware.smc([function.into(), argument.into(), 0, 0]);
            let answer = low_half(answer);
            (answer.cast_signed() >= 0).then_some(answer)
        };

        let psci = Version(call(FunctionId::PsciVersion.into(), 0).unwrap_or(0));
        let feature = |function| {
            if psci < Version::V1_0 { None } else { call(FunctionId::PsciFeatures.into(), function) }
        };
        let smccc = feature(SMCCC_VERSION).and_then(|_| call(SMCCC_VERSION, 0)).map(Version);
        let extended = feature(FunctionId::CpuSuspend64.into()).is_some_and(|flags| flags & EXTENDED_STATE_ID != 0);
        Self {
            psci,
            smccc: smccc.filter(|&version| version >= Version::V1_1),
            power_down: if extended { 1 << 30 } else { 1 << 16 },
        }
    }
}
