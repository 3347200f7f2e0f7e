//! The two translation regimes: stage 2 of the host and of guests, and EL2's own stage 1.

use core::fmt;

use ravelin_memory::{Hyp, HypRange, Intermediate, IpaRange, PageRange, PhysAddr, Space};

use crate::{Geometry, Machine};

/// What differs between kinds of translation tables: attributes of leaves and TLB maintenance.
pub trait Regime {
    /// Space of the addresses that are translated.
    type Space: Space;
    /// What a leaf may be for.
    type Usage: Copy + Eq + fmt::Debug + 'static;

    /// All there are of [`Regime::Usage`].
    const USAGES: &[Self::Usage];

    /// Returns the attribute bits of a leaf for `usage`.
    fn attributes(usage: Self::Usage) -> u64;

    /// Removes `range` of the tree `tree` from the TLBs. `leaf_only` says that no table descriptor of the range has changed.
    fn invalidate<M: Machine>(machine: &M, tree: Vttbr, range: PageRange<Self::Space>, leaf_only: bool);
}

/// Tag that tells the TLB entries of one stage 2 from those of others: 8 bits, so that every CPU has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vmid(u8);

impl Vmid {
    /// That of the host.
    pub const HOST: Self = Self(0);

    /// Returns the VMID of this number.
    #[must_use]
    pub const fn new(number: u8) -> Self {
        Self(number)
    }

    /// Returns the number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }
}

/// Root and VMID of a stage 2, as VTTBR_EL2 holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vttbr {
    /// The first root table.
    pub root: PhysAddr,
    /// The VMID.
    pub vmid: Vmid,
}

impl Vttbr {
    /// Returns the value of VTTBR_EL2 (Arm ARM DDI 0487, D24.2.212): VMID in bits 63:48, CnP clear.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.root.raw() | u64::from(self.vmid.0) << 48
    }
}

/// A stage 2 as the hardware has to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Root and VMID.
    pub vttbr: Vttbr,
    /// Shape, which [`Geometry::vtcr`] makes VTCR_EL2 of.
    pub geometry: Geometry,
}

/// Access flag: set from the start, so that no access ever faults for want of it.
const AF: u64 = 1 << 10;
const INNER_SHAREABLE: u64 = 0b11 << 8;
/// XN of EL2 stage 1; XN\[1\] of stage 2, where it forbids execution at EL1 and EL0 with and without FEAT_XNX.
const EXECUTE_NEVER: u64 = 1 << 54;

/// From this many pages on, all of stage 2 is invalidated: more than one range instruction of FEAT_TLBIRANGE covers.
const INVALIDATE_ALL_PAGES: u64 = 1 << 21;

/// Stage 2 of EL1 and EL0.
#[derive(Debug)]
pub enum Stage2 {}

/// What stage 2 maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage2Usage {
    /// RAM: Normal write-back inner shareable, all accesses.
    Memory,
    /// All else: Normal non-cacheable, no execution. The host's own stage 1 decides between that and Device, but it
    /// cannot get a cacheable mapping.
    Device,
}

impl Regime for Stage2 {
    type Space = Intermediate;
    type Usage = Stage2Usage;

    const USAGES: &[Stage2Usage] = &[Stage2Usage::Memory, Stage2Usage::Device];

    // Arm ARM DDI 0487, D8.6.6 "Stage 2 memory type and Cacheability attributes when FWB is disabled".
    #[inline]
    fn attributes(usage: Stage2Usage) -> u64 {
        const READ_WRITE: u64 = 0b11 << 6;
        const WRITE_BACK: u64 = 0b1111 << 2;
        const NON_CACHEABLE: u64 = 0b0101 << 2;
        AF | INNER_SHAREABLE
            | READ_WRITE
            | match usage {
                Stage2Usage::Memory => WRITE_BACK,
                Stage2Usage::Device => NON_CACHEABLE | EXECUTE_NEVER,
            }
    }

    #[inline]
    fn invalidate<M: Machine>(machine: &M, tree: Vttbr, range: IpaRange, leaf_only: bool) {
        if range.pages() < INVALIDATE_ALL_PAGES {
            machine.invalidate_stage2(tree, range, leaf_only);
        } else {
            machine.invalidate_stage2_all(tree);
        }
    }
}

/// EL2 stage 1 with HCR_EL2.E2H = 0: one range of addresses, one privilege level.
#[derive(Debug)]
pub enum El2 {}

/// What the EL2 stage 1 maps; never writable and executable at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum El2Usage {
    /// Code: read, execute.
    Text,
    /// Constants: read.
    Rodata,
    /// Data: read, write.
    Data,
    /// Device registers: read, write, Device-nGnRE.
    Device,
}

impl Regime for El2 {
    type Space = Hyp;
    type Usage = El2Usage;

    const USAGES: &[El2Usage] = &[El2Usage::Text, El2Usage::Rodata, El2Usage::Data, El2Usage::Device];

    // Arm ARM DDI 0487, D8.3.2 and D8.4.1; indices as in `Geometry::MAIR_EL2`. nG and PXN are RES0 here.
    #[inline]
    fn attributes(usage: El2Usage) -> u64 {
        const AP1_RES1: u64 = 1 << 6;
        const READ_ONLY: u64 = 1 << 7;
        const DEVICE: u64 = 0 << 2;
        const NORMAL: u64 = 1 << 2;
        AF | AP1_RES1
            | INNER_SHAREABLE
            | match usage {
                El2Usage::Text => NORMAL | READ_ONLY,
                El2Usage::Rodata => NORMAL | READ_ONLY | EXECUTE_NEVER,
                El2Usage::Data => NORMAL | EXECUTE_NEVER,
                El2Usage::Device => DEVICE | EXECUTE_NEVER,
            }
    }

    #[inline]
    fn invalidate<M: Machine>(machine: &M, _tree: Vttbr, range: HypRange, _leaf_only: bool) {
        machine.invalidate_el2(range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stage2_bits() {
        // AF, SH, S2AP, MemAttr
        assert_eq!(Stage2::attributes(Stage2Usage::Memory), 0x7fc);
        assert_eq!(Stage2::attributes(Stage2Usage::Device), (1 << 54) | 0x7d4);
    }

    #[test]
    fn vmid_and_root_share_a_register() {
        let vttbr = Vttbr { root: PhysAddr::new(0x4000_2000).unwrap(), vmid: Vmid::new(255) };
        assert_eq!(vttbr.bits(), 0x00ff_0000_4000_2000);
        assert_eq!((vttbr.vmid.number(), Vmid::HOST.number()), (255, 0));
    }

    #[test]
    fn nothing_in_el2_is_writable_and_executable() {
        for &usage in El2::USAGES {
            let bits = El2::attributes(usage);
            let writable = bits & (1 << 7) == 0;
            let executable = bits & (1 << 54) == 0;
            assert!(!(writable && executable), "{usage:?}");
            assert_ne!(bits & (1 << 6), 0, "AP[1] is RES1");
        }
        assert_eq!(El2::attributes(El2Usage::Text), 0x7c4);
        assert_eq!(El2::attributes(El2Usage::Device), (1 << 54) | 0x740);
    }
}
