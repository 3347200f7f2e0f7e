//! Requests about VMs.

use crate::{Pages, VmKind};

/// The most vCPUs that a VM may have.
pub const MAX_VCPUS: u64 = 128;

/// The fewest bits that the guest addresses of a VM may have.
pub const MIN_IPA_BITS: u64 = 32;

/// The most bits that the guest addresses of a VM may have.
pub const MAX_IPA_BITS: u64 = 48;

/// Size and alignment of the frames of a guest's interrupt controller.
pub const GIC_FRAME_SIZE: u64 = 0x1_0000;

/// What kind of VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmAttributes {
    /// Who may access its memory, and how its guest speaks to the hypervisor.
    pub kind: VmKind,
    /// Bits of a guest address, [`MIN_IPA_BITS`] to [`MAX_IPA_BITS`]; those of a realm include the one that marks an address
    /// as shared.
    pub ipa_bits: u64,
    /// The most vCPUs that it may have, 1 to [`MAX_VCPUS`].
    pub vcpus: u64,
}

impl VmAttributes {
    /// The smallest VM there is.
    pub(crate) const LEAST: Self = Self { kind: VmKind::Ordinary, ipa_bits: MIN_IPA_BITS, vcpus: 1 };

    /// Where in a register `ipa_bits` starts; it has 8 bits. The kind is in the 8 bits below.
    pub const IPA_BITS_SHIFT: u32 = 8;

    /// Where in a register `vcpus` starts; it has 16 bits.
    pub const VCPUS_SHIFT: u32 = 16;

    /// The bits of a register that have a meaning.
    pub(crate) const BITS: u64 = 0xffff_ffff;

    /// Returns the value of the register that holds the attributes.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.kind.code() | self.ipa_bits << Self::IPA_BITS_SHIFT | self.vcpus << Self::VCPUS_SHIFT
    }

    /// Returns the attributes that a register holds, or `None` if a field has a value without a meaning.
    #[must_use]
    pub fn from_bits(bits: u64) -> Option<Self> {
        let kind = VmKind::from_code(bits & 0xff)?;
        let ipa_bits = bits >> Self::IPA_BITS_SHIFT & 0xff;
        let vcpus = bits >> Self::VCPUS_SHIFT;
        let valid = (MIN_IPA_BITS..=MAX_IPA_BITS).contains(&ipa_bits) && (1..=MAX_VCPUS).contains(&vcpus);
        valid.then_some(Self { kind, ipa_bits, vcpus })
    }
}

/// A host hypercall about VMs with checked arguments. Handles may be any number; addresses are those of pages unless said
/// otherwise, and have at most 48 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "handle: of the VM; index: of the vCPU, below MAX_VCPUS")]
pub enum VmCall {
    /// Makes a VM.
    Create {
        attributes: VmAttributes,
        /// What the host donates for it.
        metadata: Pages,
    },
    /// Gives it pages for translation tables.
    DonateTables {
        handle: u64,
        /// What the host donates.
        tables: Pages,
    },
    /// Makes a vCPU.
    CreateVcpu {
        handle: u64,
        index: u64,
        /// What the host donates for it.
        metadata: Pages,
        /// Address of the page that carries what the host sees of the vCPU.
        run_page: u64,
    },
    /// Puts pages into the VM.
    Map {
        handle: u64,
        /// Guest address of the first page; the range there ends below [`ADDRESS_END`](crate::ADDRESS_END), too.
        at: u64,
        /// Where the pages are.
        range: Pages,
    },
    /// Takes lent pages from an ordinary VM.
    Unmap {
        handle: u64,
        /// Their guest addresses.
        range: Pages,
    },
    /// Fixes measurement and start.
    Seal {
        handle: u64,
        /// Guest address of the first instruction; a multiple of 4.
        entry: u64,
        /// Guest address of the device tree; a multiple of 8.
        device_tree: u64,
        /// Guest address of the interrupt controller's distributor; a multiple of [`GIC_FRAME_SIZE`].
        distributor: u64,
        /// Guest address of its redistributors, two frames for each vCPU that the VM may have; a multiple of [`GIC_FRAME_SIZE`].
        redistributors: u64,
    },
    /// Asks for a register of a vCPU.
    GetRegister {
        handle: u64,
        index: u64,
        /// Its number, at most [`REGISTER_LAST`](crate::REGISTER_LAST).
        register: u64,
    },
    /// Sets a register of a vCPU.
    SetRegister {
        handle: u64,
        index: u64,
        /// Its number, at most [`REGISTER_LAST`](crate::REGISTER_LAST).
        register: u64,
        value: u64,
    },
    /// Ends a VM's life.
    Teardown { handle: u64 },
    /// Takes back guest pages of a dying VM.
    Reclaim {
        handle: u64,
        /// Their guest addresses.
        range: Pages,
    },
    /// Takes back what was donated for a dying VM.
    Destroy { handle: u64 },
    /// Takes up an offer.
    Claim {
        handle: u64,
        /// Guest addresses of the pages.
        range: Pages,
    },
    /// Ends the use of claimed pages.
    Release {
        handle: u64,
        /// Guest addresses of the pages.
        range: Pages,
    },
    /// Takes private and offered pages from a living guest.
    ForceReclaim {
        /// Where they are.
        range: Pages,
    },
    /// Sets the level of a shared peripheral interrupt.
    Spi {
        handle: u64,
        /// Its number, 32 to 1019.
        intid: u64,
        /// Whether it is asserted.
        level: bool,
    },
    /// Asks how many pages must be donated.
    Sizes { attributes: VmAttributes },
    /// Asks what a system register holds at first.
    ResetValue {
        attributes: VmAttributes,
        /// Its number, at most [`REGISTER_LAST`](crate::REGISTER_LAST).
        register: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_go_both_ways() {
        for &kind in VmKind::ALL {
            for (ipa_bits, vcpus) in [(MIN_IPA_BITS, 1), (MAX_IPA_BITS, MAX_VCPUS), (40, 3)] {
                let attributes = VmAttributes { kind, ipa_bits, vcpus };
                assert_eq!(VmAttributes::from_bits(attributes.bits()), Some(attributes));
            }
        }
    }

    #[test]
    fn attributes_without_a_meaning() {
        let least = VmAttributes::LEAST.bits();
        assert!(VmAttributes::from_bits(least).is_some());
        for bits in [least | 3, 31 << 8 | 1 << 16, 49 << 8 | 1 << 16, 40 << 8, 40 << 8 | 129 << 16, 0, u64::MAX] {
            assert_eq!(VmAttributes::from_bits(bits), None, "{bits:#x}");
        }
    }
}
