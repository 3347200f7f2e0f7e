//! What a trace can do wrong.

use core::fmt;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The number of the record is not the next one.
    #[error("the numbers of records do not rise by one")]
    Order,
    /// A valid descriptor took the place of another valid one that the hardware can tell from it.
    #[error("missing break: a valid descriptor is replaced by another one")]
    NoBreak,
    /// A descriptor became valid while the TLBs may hold what was there before.
    #[error("a descriptor becomes valid while the TLBs may hold an earlier translation")]
    StillCached,
    /// The lock was released without an invalidation of what was taken out of the tables.
    #[error("missing invalidation")]
    NotInvalidated,
    /// The same, though something else of that regime was invalidated.
    #[error("the invalidation is too narrow")]
    TooNarrow,
    /// The same, though something of another VMID was invalidated.
    #[error("the invalidation is for another VMID")]
    OtherVmid,
    /// The lock was released, combined translations invalidated, or VTTBR_EL2 written, before a DSB said that an invalidation
    /// is done.
    #[error("missing DSB after an invalidation")]
    NotFinished,
    /// An invalidation before a DSB has made the store of the invalid descriptor visible to table walkers.
    #[error("missing DSB between a descriptor and its invalidation")]
    NotPublished,
    /// The lock was released before a DSB has made the store of a valid descriptor visible to table walkers.
    #[error("missing DSB after a descriptor has become valid")]
    NotVisible,
    /// The lock was released without an ISB after the DSB for a change of EL2's own translations.
    #[error("missing ISB after a change of EL2's own translations")]
    NoIsb,
    /// A table was linked before a DSB has made its contents visible.
    #[error("a table is linked before its contents are visible")]
    ContentsNotPublished,
    /// TLB maintenance for a VMID that no ISB has made the current one, or for none.
    #[error("TLB maintenance without an ISB after VTTBR_EL2")]
    NotSynchronised,
    /// A table was written without the lock of its root.
    #[error("a table is written without the lock of its root")]
    Unlocked,
    /// A root was put into use that no lock guards.
    #[error("a root without a lock is put into use")]
    NoLock,
    /// A lock was taken that another CPU has, or released by one that has it not.
    #[error("a lock is taken twice, or released by a CPU that has not taken it")]
    Lock,
    /// A table was zeroed, freed or linked, or its root given up, while walkers can reach it.
    #[error("a table is reused that can be reached")]
    Reachable,
    /// The same while the TLBs may hold a descriptor that leads to it.
    #[error("a table is reused that may still be cached")]
    TableCached,
    /// A table was linked under a root that it does not belong to.
    #[error("a table is linked under the root of another tree")]
    ForeignRoot,
    /// A store to, or a link of, a page that is no table.
    #[error("the page is no table")]
    NoTable,
    /// A root was put into use in place of another one with the MMU on, or with the VMID of another one.
    #[error("a root takes the place of another one in use")]
    RootInUse,
    /// A register asks for tables of a size that the checker does not know.
    #[error("tables of another size than 4 KiB")]
    Unsupported,
}

/// A translation that the TLBs may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaleEntry {
    /// The VMID, or none for the EL2 stage 1.
    pub vmid: Option<u16>,
    /// The first input address.
    pub start: u64,
    /// The level of the descriptor.
    pub level: u8,
    /// The descriptor that was there.
    pub descriptor: u64,
    /// The record that made it invalid or unreachable.
    pub since: u64,
}

impl fmt::Display for StaleEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, level, descriptor, since, .. } = self;
        match self.vmid {
            Some(vmid) => write!(f, "stage 2 of VMID {vmid}")?,
            None => f.write_str("EL2 stage 1")?,
        }
        write!(f, " at {start:#x}, level {level}, {descriptor:#x} until record {since}")
    }
}

/// Where a trace breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The number of the record.
    pub id: u64,
    /// What is wrong.
    pub fault: Fault,
    /// The descriptor, table, root or lock.
    pub address: u64,
    /// What is stale, if anything is.
    pub stale: Option<StaleEntry>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, fault, address, .. } = self;
        write!(f, "record {id}: {fault}: {address:#x}")?;
        match &self.stale {
            Some(stale) => write!(f, " (stale: {stale})"),
            None => Ok(()),
        }
    }
}

impl core::error::Error for Violation {}
