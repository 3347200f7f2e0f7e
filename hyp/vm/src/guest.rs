//! The side of a VM that its guest's calls see.

use ravelin_abi::{VmAttributes, VmKind};
use ravelin_memory::{Ipa, IpaRange};
use spin::Mutex;

use crate::{
    Backing, Context,
    measurement::Measurements,
    mmio_guard::MmioGuard,
    transitions::{Frame, Transitions},
};

/// What a guest's calls work on.
pub struct Guest<G> {
    pub(crate) attributes: VmAttributes,
    pub(crate) memory: G,
    pub(crate) mmio: Mutex<MmioGuard>,
    pub(crate) measurements: Mutex<Measurements>,
}

/// What becomes of a guest's call.
///
/// After the first three, results are in the registers, and the guest goes on behind the instruction. After the others, the
/// registers are as they were, and the guest has not passed the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "lives on the stack, for a moment")]
pub enum Outcome {
    /// It is done.
    Done,
    /// It is done: the guest has offered these pages.
    Shared(IpaRange),
    /// It is done: the guest has given up these pages.
    Relinquished(IpaRange),
    /// The host must release what it has claimed in this range and let the guest try again, or have the guest told that it
    /// refuses.
    Unshare(IpaRange),
    /// The host must put a page here before the guest tries again.
    PageFault(Ipa),
    /// The host must donate so many pages for tables before the guest tries again.
    NeedsTables(u64),
    /// The guest calls its host, with x0 to x30 as it wants the host to see them.
    HostCall {
        /// A number that says what for.
        immediate: u16,
        /// The registers.
        registers: [u64; 31],
    },
}

impl<G> Guest<G> {
    pub(crate) fn new(attributes: VmAttributes, memory: G) -> Self {
        Self {
            attributes,
            memory,
            mmio: Mutex::new(MmioGuard::default()),
            measurements: Mutex::new(Measurements::default()),
        }
    }

    /// Returns what kind of VM it is.
    #[must_use]
    pub const fn kind(&self) -> VmKind {
        self.attributes.kind
    }

    /// Returns the guest's memory.
    #[must_use]
    pub const fn memory(&self) -> &G {
        &self.memory
    }

    /// Returns the bit of a guest address that marks an access to shared memory or a device, if the guest has such a bit.
    #[must_use]
    pub fn shared_bit(&self) -> Option<u64> {
        (self.attributes.kind == VmKind::Realm).then(|| self.memory_end())
    }

    /// Returns how many bits the addresses of the guest's memory have: in a realm, one less than all addresses.
    #[must_use]
    pub fn memory_bits(&self) -> u64 {
        self.attributes.ipa_bits.saturating_sub((self.attributes.kind == VmKind::Realm).into())
    }

    /// Returns the first address behind those of the guest's memory.
    fn memory_end(&self) -> u64 {
        u32::try_from(self.memory_bits()).ok().and_then(|bits| 1_u64.checked_shl(bits)).unwrap_or(0)
    }

    /// Returns the range of the guest's memory that starts at `base`, if it is one.
    pub(crate) fn range(&self, base: u64, pages: u64) -> Option<IpaRange> {
        IpaRange::new(base, pages).ok().filter(|range| range.end() <= self.memory_end())
    }

    /// Returns what is at `page`, where stage 2 has refused an access, or `None` if there is a page by now.
    ///
    /// A realm marks accesses to devices. Others may have said by MMIO_GUARD where devices are; before they do, anything
    /// without a page may be one, but only accesses can be that the CPU describes (`described`).
    pub fn backing<T: Transitions<Guest = G>>(&self, transitions: &T, page: Ipa, described: bool) -> Option<Backing> {
        let marked = self.shared_bit().map(|bit| page.raw() & bit != 0);
        let address = page.raw() & !self.shared_bit().unwrap_or(0);
        let Some(range) = self.range(address, 1) else {
            return Some(if marked == Some(true) { Backing::Device } else { Backing::Nothing });
        };
        match (transitions.look(&self.memory, range), marked) {
            ((Frame::Shared, _), Some(false)) | ((Frame::Poisoned, _), None | Some(false)) => Some(Backing::Nothing),
            ((Frame::Absent | Frame::Private | Frame::Poisoned, _), Some(true)) => Some(Backing::Device),
            ((Frame::Private | Frame::Shared, _), _) => None,
            ((Frame::Absent, _), Some(false)) => Some(Backing::Memory),
            ((Frame::Absent, _), None) => {
                let guard = self.mmio.lock();
                let device = guard.contains(page) || described && guard.allows(page);
                Some(if device { Backing::Device } else { Backing::Memory })
            }
        }
    }
}

/// Returns the function identifier of a guest's call, which is in W0.
pub(crate) const fn function(context: &Context) -> u32 {
    let [x0, ..] = context.x;
    let [a, b, c, d, ..] = x0.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}
