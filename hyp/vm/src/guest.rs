//! The side of a VM that its guest's calls see.

use ravelin_abi::{VmAttributes, VmKind};
use ravelin_memory::{Ipa, IpaRange};
use ravelin_ownership::GuestPage;
use ravelin_sync::Mutex;

use crate::{Backing, Context, RingCall, measurement::Measurements, ranges::Named, transitions::Transitions};

/// What a guest's calls work on.
pub struct Guest<G> {
    pub(crate) attributes: VmAttributes,
    /// The first address behind those of the guest's memory.
    memory_end: u64,
    pub(crate) memory: G,
    /// Where the guest has said that devices are, or, a realm, that memory is.
    pub(crate) named: Named,
    pub(crate) measurements: Mutex<Measurements>,
}

/// What becomes of a guest's call.
///
/// After the first three, results are in the registers, and the guest goes on behind the instruction. After others, the
/// registers are as they were, and the guest has not passed the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// It is done: the guest has offered these pages.
    Shared(IpaRange),
    /// It is done: the guest has given up these pages.
    Relinquished(IpaRange),
    /// It is done: conversions were made that the host has to know of.
    Converted,
    /// It is about the ring of the vCPU, and yet to be done.
    Ring(RingCall),
    /// The host must release what it has claimed in this range and let the guest try again, or have the guest told that it
    /// refuses.
    Unshare(IpaRange),
    /// The host must put a page here before the guest tries again.
    PageFault(Ipa),
    /// The host must donate so many pages for tables before the guest tries again.
    NeedsTables(u64),
    /// The guest calls its host.
    HostCall {
        /// A number that says what for.
        immediate: u16,
    },
}

fn memory_bits(attributes: VmAttributes) -> u64 {
    attributes.ipa_bits.saturating_sub((attributes.kind == VmKind::Realm).into())
}

impl<G> Guest<G> {
    pub(crate) fn new(attributes: VmAttributes, memory: G) -> Self {
        let bits = u32::try_from(memory_bits(attributes)).ok();
        Self {
            attributes,
            memory_end: bits.and_then(|bits| 1_u64.checked_shl(bits)).unwrap_or(0),
            memory,
            named: Named::default(),
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
        (self.attributes.kind == VmKind::Realm).then_some(self.memory_end)
    }

    /// Returns how many bits the addresses of the guest's memory have: in a realm, one less than all addresses.
    #[must_use]
    pub fn memory_bits(&self) -> u64 {
        memory_bits(self.attributes)
    }

    /// Returns the range of the guest's memory that starts at `base`, if it is one.
    #[inline]
    pub(crate) fn range(&self, base: u64, pages: u64) -> Option<IpaRange> {
        IpaRange::new(base, pages).ok().filter(|range| range.end() <= self.memory_end)
    }

    /// Returns what is at `page`, where stage 2 has refused an access, or `None` if there is a page by now.
    ///
    /// A realm marks accesses to devices. Others may have said by MMIO_GUARD where devices are; before they do, anything
    /// without a page may be one, but only accesses can be that the CPU describes (`described`).
    pub fn backing<T: Transitions<Guest = G>>(&self, transitions: &T, page: Ipa, described: bool) -> Option<Backing> {
        let marked = self.shared_bit().map(|bit| page.raw() & bit != 0);
        let address = page.raw() & !self.shared_bit().unwrap_or(0);
        let Some(frame) = Ipa::new(address).filter(|_| address < self.memory_end) else {
            return Some(if marked == Some(true) { Backing::Device } else { Backing::Nothing });
        };
        let (frame, _) = transitions.look(&self.memory, IpaRange::single(frame));
        match (frame, marked) {
            (GuestPage::Offered | GuestPage::Claimed, Some(true) | None)
            | (GuestPage::Private | GuestPage::Lent, Some(false) | None) => None,
            // What was shared there may be what was taken: no device comes in its place.
            (GuestPage::Poisoned, _) => Some(Backing::Nothing),
            (_, Some(true)) => Some(Backing::Device),
            (GuestPage::Offered | GuestPage::Claimed, _) => Some(Backing::Nothing),
            (GuestPage::Absent, Some(false)) => Some(Backing::Memory),
            (GuestPage::Absent, None) => {
                Some(if self.named.is_device(page, described) { Backing::Device } else { Backing::Memory })
            }
        }
    }
}

/// SMCCC's NOT_SUPPORTED, in a result register (Arm DEN0028, 7.1).
pub(crate) const NOT_SUPPORTED: u64 = u64::MAX;

/// Returns the function identifier of a guest's call, which is in W0.
pub(crate) const fn function(context: &Context) -> u32 {
    let [x0, ..] = context.x;
    let [a, b, c, d, ..] = x0.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
pub(crate) mod tests {
    use ravelin_memory::PhysRange;

    use super::*;
    use crate::{
        fake::{Fake, FakeGuest},
        transitions::GuestFailure,
    };

    /// Guest address of the first frame of [`TestGuest`].
    pub(crate) const GUEST: u64 = 0x1000_0000;

    /// Where its pages are.
    pub(crate) const PAYLOAD: u64 = 0x5000_0000;

    /// A guest with some frames, and what it calls.
    pub(crate) struct TestGuest {
        pub(crate) memory: Fake,
        pub(crate) guest: Guest<FakeGuest>,
    }

    impl TestGuest {
        pub(crate) fn new(kind: VmKind, pages: u64) -> Self {
            let memory = Fake::default();
            let attributes = VmAttributes { kind, ipa_bits: 40, vcpus: 1 };
            let root = PhysRange::new(0x4000_0000, 2).unwrap();
            memory.keep(root).unwrap();
            let its = memory.new_guest(3, attributes, root).unwrap();
            if pages != 0 {
                memory.map(&its, PhysRange::new(PAYLOAD, pages).unwrap(), ipa(GUEST)).unwrap();
            }
            Self { memory, guest: Guest::new(attributes, its) }
        }

        pub(crate) fn claim(&self, base: u64) {
            self.memory.claim(self.guest.memory(), IpaRange::single(ipa(base))).unwrap();
        }

        pub(crate) fn poison(&self, page: u64) {
            self.memory.force_reclaim(self.guest.memory(), PhysRange::new(page, 1).unwrap()).unwrap();
        }

        pub(crate) fn look(&self, base: u64) -> GuestPage {
            self.memory.look(self.guest.memory(), IpaRange::single(ipa(base))).0
        }
    }

    pub(crate) fn ipa(address: u64) -> Ipa {
        Ipa::new(address).unwrap()
    }

    /// Returns registers with the first ones as given.
    pub(crate) fn registers<const N: usize>(first: [u64; N]) -> Context {
        let mut context = Context { x: [0x5a5a; 31], ..Context::default() };
        context.x[..N].copy_from_slice(&first);
        context
    }

    #[test]
    fn what_is_where_in_a_pkvm_guest() {
        let test = TestGuest::new(VmKind::Pkvm, 3);
        let backing = |address, described| test.guest.backing(&test.memory, ipa(address), described);
        assert_eq!(test.memory.share(test.guest.memory(), IpaRange::single(ipa(GUEST))), Ok(1));
        test.poison(PAYLOAD + 0x1000);
        for described in [true, false] {
            assert_eq!(backing(GUEST, described), None, "shared");
            assert_eq!(backing(GUEST + 0x1000, described), Some(Backing::Nothing), "poisoned");
            assert_eq!(backing(GUEST + 0x2000, described), None, "private");
            assert_eq!(backing(1 << 40, described), Some(Backing::Nothing), "beyond its addresses");
        }
        assert_eq!(backing(0x900_0000, true), Some(Backing::Device));
        assert_eq!(backing(0x900_0000, false), Some(Backing::Memory));
        // It says where devices are.
        assert!(test.guest.named.add(IpaRange::single(ipa(0x900_0000))));
        for described in [true, false] {
            assert_eq!(backing(0x900_0000, described), Some(Backing::Device));
            assert_eq!(backing(0x900_1000, described), Some(Backing::Memory));
        }
    }

    #[test]
    fn what_is_where_in_a_realm() {
        let test = TestGuest::new(VmKind::Realm, 3);
        let backing = |address| test.guest.backing(&test.memory, ipa(address), true);
        let bit = test.guest.shared_bit().unwrap();
        assert_eq!((bit, test.guest.memory_bits()), (1 << 39, 39));
        assert_eq!(test.memory.share(test.guest.memory(), IpaRange::single(ipa(GUEST))), Ok(1));
        test.poison(PAYLOAD + 0x1000);
        assert_eq!([backing(GUEST), backing(GUEST | bit)], [Some(Backing::Nothing), None], "shared");
        assert_eq!(backing(GUEST + 0x1000), Some(Backing::Nothing), "poisoned");
        assert_eq!(backing((GUEST + 0x1000) | bit), Some(Backing::Nothing), "of a poisoned frame");
        assert_eq!(
            [backing(GUEST + 0x2000), backing((GUEST + 0x2000) | bit)],
            [None, Some(Backing::Device)],
            "private"
        );
        assert_eq!([backing(0x900_0000), backing(0x900_0000 | bit)], [Some(Backing::Memory), Some(Backing::Device)]);
        assert_eq!(backing(bit << 1), Some(Backing::Nothing));
    }

    #[test]
    fn only_the_guests_memory_is_a_range() {
        let test = TestGuest::new(VmKind::Pkvm, 0);
        let end = 1 << 40;
        assert!(test.guest.range(end - 0x1000, 1).is_some());
        for (base, pages) in [(end - 0x1000, 2), (end, 1), (1, 1), (0, 0), (u64::MAX, 1), (0, u64::MAX), (!0xfff, 1)] {
            assert_eq!(test.guest.range(base, pages), None, "{base:#x} {pages}");
        }
        assert_eq!(test.guest.shared_bit(), None);
        let beyond = IpaRange::single(ipa(GUEST));
        assert_eq!(test.memory.share(test.guest.memory(), beyond), Err(GuestFailure::Absent(ipa(GUEST))));
    }
}
