//! Entries of the ownership table.
//!
//! | bits | page entry | block entry |
//! |---|---|---|
//! | 11:0 | pins | pins, if uniform |
//! | 15:12 | state | state, if uniform |
//! | 23:16 | slot of the VM, of a guest's page | the same, if uniform |
//! | 59:24 | guest frame, of a guest's page | that of the first page, if uniform |
//! | 33:24 | | pages in state `HostOwned`, if split |
//! | 60 | 0 | split: the page entries count, not this one |
//! | 61 | 0 | primed: the page entries all equal this uniform one |
//!
//! The pages of a uniform block of a guest have ascending frames, which need not be aligned to anything.

use core::fmt;

const PINS: u64 = 0xfff;
const STATE_SHIFT: u32 = 12;
const STATE: u64 = 0xf << STATE_SHIFT;
const SLOT_SHIFT: u32 = 16;
const SLOT: u64 = 0xff << SLOT_SHIFT;
const FRAME_SHIFT: u32 = 24;
const FRAME: u64 = ((1 << 36) - 1) << FRAME_SHIFT;
const OWNED_SHIFT: u32 = 24;
const OWNED: u64 = 0x3ff << OWNED_SHIFT;
const SPLIT: u64 = 1 << 60;
const PRIMED: u64 = 1 << 61;

/// Owner in bits 1:0: 0 nobody, 1 host, 2 hypervisor, 3 guest. Bits 3:2 say how.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State(u64);

impl State {
    /// Nobody owns the page and nobody has access; also what lies outside RAM.
    pub const NOBODY: Self = Self(0);
    /// The host owns the page, and nobody else has access.
    pub const HOST_OWNED: Self = Self(0b0001);
    /// The host owns the page and shares it with the hypervisor, which may pin it.
    pub const HOST_SHARED: Self = Self(0b0101);
    /// The host owns the page and has lent it to the hypervisor, which alone says when that ends.
    pub const HOST_BORROWED: Self = Self(0b1101);
    /// The hypervisor has owned the page from the start. It never leaves this state.
    pub const HYP_OWNED: Self = Self(0b0010);
    /// The hypervisor owns the page, which the host has donated.
    pub const HYP_DONATED: Self = Self(0b1010);

    /// The hypervisor owns the page, which the host has donated for a VM: it comes back when the VM is done with it.
    pub const HYP_KEPT: Self = Self(0b0110);
    /// The host owns the page and lends it to an ordinary VM.
    pub const HOST_LENT: Self = Self(0b1001);
    /// A guest owns the page, and nobody else has access.
    pub const GUEST_OWNED: Self = Self(0b0011);
    /// A guest owns the page and has given the hypervisor access to it, which alone the guest ends.
    pub const GUEST_PINNED: Self = Self(0b1011);
    /// A guest owns the page and offers it to the host, which has no access yet.
    pub const GUEST_OFFERED: Self = Self(0b0111);
    /// A guest owns the page and the host, which has claimed it, may access it.
    pub const GUEST_CLAIMED: Self = Self(0b1111);

    /// Returns whether the host may access pages in this state.
    #[must_use]
    pub const fn host_access(self) -> bool {
        const ALLOWED: u64 = 1 << State::HOST_OWNED.0
            | 1 << State::HOST_SHARED.0
            | 1 << State::HOST_BORROWED.0
            | 1 << State::HOST_LENT.0
            | 1 << State::GUEST_CLAIMED.0;
        ALLOWED & (1 << self.0) != 0
    }

    /// Returns whether a guest has a mapping of the page.
    pub(crate) const fn has_frame(self) -> bool {
        self.0 & 0b11 == Self::GUEST_OWNED.0 || self.0 == Self::HOST_LENT.0
    }

    /// How many numbers there are for states.
    pub(crate) const NUMBERS: usize = 16;

    /// Returns its number, below [`State::NUMBERS`].
    #[inline]
    pub(crate) fn number(self) -> usize {
        usize::try_from(self.0 & 0xf).unwrap_or_default()
    }

    const fn bits(self) -> u64 {
        self.0 << STATE_SHIFT
    }

    /// All that there are, with what is nobody's first.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 12] = [
        Self::NOBODY,
        Self::HOST_OWNED,
        Self::HOST_SHARED,
        Self::HOST_BORROWED,
        Self::HYP_OWNED,
        Self::HYP_DONATED,
        Self::HYP_KEPT,
        Self::HOST_LENT,
        Self::GUEST_OWNED,
        Self::GUEST_PINNED,
        Self::GUEST_OFFERED,
        Self::GUEST_CLAIMED,
    ];
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::NOBODY => "Nobody",
            Self::HOST_OWNED => "HostOwned",
            Self::HOST_SHARED => "HostShared",
            Self::HOST_BORROWED => "HostBorrowed",
            Self::HYP_OWNED => "HypOwned",
            Self::HYP_DONATED => "HypDonated",
            Self::HYP_KEPT => "HypKept",
            Self::HOST_LENT => "HostLent",
            Self::GUEST_OWNED => "GuestOwned",
            Self::GUEST_PINNED => "GuestPinned",
            Self::GUEST_OFFERED => "GuestOffered",
            Self::GUEST_CLAIMED => "GuestClaimed",
            _ => "?",
        })
    }
}

/// State of a page, or of all pages of a uniform block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Entry(u64);

impl Entry {
    pub(crate) const MAX_PINS: u64 = PINS;
    pub(crate) const NOBODY: Self = Self::new(State::NOBODY, 0);

    /// `pins` is at most [`Entry::MAX_PINS`].
    pub(crate) const fn new(state: State, pins: u64) -> Self {
        Self(state.bits() | pins)
    }

    /// State of a page that the guest in `slot` has in this frame, which has at most 36 bits.
    pub(crate) fn of_guest(state: State, slot: u8, frame: u64) -> Self {
        Self(state.bits() | u64::from(slot) << SLOT_SHIFT | frame << FRAME_SHIFT)
    }

    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits & (STATE | PINS | SLOT | FRAME))
    }

    /// Returns the entry of the page that lies `index` pages behind this entry's one, if they are of one kind.
    pub(crate) const fn following(self, index: u64) -> Self {
        Self(self.0.wrapping_add(self.step().wrapping_mul(index)))
    }

    /// Returns the bits of this entry and of those that follow it.
    pub(crate) fn run(self) -> impl Iterator<Item = u64> {
        let step = self.step();
        core::iter::successors(Some(self.0), move |bits| Some(bits.wrapping_add(step)))
    }

    /// Returns how many of the first of `entries` are this entry and those that follow it.
    // Four at a time, without a branch in between, because this and the next two are what a range costs for each page.
    pub(crate) fn run_length(self, entries: &[u64]) -> usize {
        let (step, mut bits, mut length) = (self.step(), self.0, 0_usize);
        for [a, b, c, d] in entries.as_chunks().0 {
            let [first, second, third, fourth] = four(bits, step);
            if !((*a == first) & (*b == second) & (*c == third) & (*d == fourth)) {
                break;
            }
            bits = fourth.wrapping_add(step);
            length = length.wrapping_add(4);
        }
        let rest = entries.get(length..).unwrap_or_default();
        let more = rest.iter().zip(Self(bits).run()).take_while(|(bits, expected)| **bits == *expected).count();
        length.wrapping_add(more)
    }

    /// Writes this entry and those that follow it.
    pub(crate) fn write_run(self, entries: &mut [u64]) {
        let (step, mut bits) = (self.step(), self.0);
        let (fours, rest) = entries.as_chunks_mut();
        for entries in fours {
            *entries = four(bits, step);
            bits = entries[3].wrapping_add(step);
        }
        for (entry, bits) in rest.iter_mut().zip(Self(bits).run()) {
            *entry = bits;
        }
    }

    /// Returns how many of the first of `entries` are in the same state as this one.
    pub(crate) fn states_length(self, entries: &[u64]) -> usize {
        let differs = |bits: u64| bits ^ self.0;
        let fours = entries.as_chunks().0.iter();
        let same = |[a, b, c, d]: &&[u64; 4]| (differs(*a) | differs(*b) | differs(*c) | differs(*d)) & STATE == 0;
        let length = fours.take_while(same).count().wrapping_mul(4);
        let rest = entries.get(length..).unwrap_or_default();
        length.wrapping_add(rest.iter().take_while(|bits| differs(**bits) & STATE == 0).count())
    }

    /// Returns by how much the next entry of a run is more.
    const fn step(self) -> u64 {
        if self.state().has_frame() { 1 << FRAME_SHIFT } else { 0 }
    }

    /// Returns slot and frame of the guest that has a mapping of the page.
    pub(crate) fn guest(self) -> Option<(u8, u64)> {
        let [_, _, slot, ..] = self.0.to_le_bytes();
        self.state().has_frame().then_some((slot, (self.0 & FRAME) >> FRAME_SHIFT))
    }

    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    pub(crate) const fn state(self) -> State {
        State((self.0 & STATE) >> STATE_SHIFT)
    }

    pub(crate) const fn pins(self) -> u64 {
        self.0 & PINS
    }

    /// Returns whether the EL2 stage 1 maps the page by this entry.
    pub(crate) const fn in_el2(self) -> bool {
        matches!(self.state(), State::HYP_DONATED | State::HYP_KEPT | State::HOST_BORROWED | State::GUEST_PINNED)
            || self.pins() != 0
    }
}

/// Returns four numbers, each by `step` more than the one before, modulo 2^64.
#[inline]
fn four(first: u64, step: u64) -> [u64; 4] {
    let second = first.wrapping_add(step);
    let third = second.wrapping_add(step);
    [first, second, third, third.wrapping_add(step)]
}

/// Entry of a 2 MiB block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Block(u64);

impl Block {
    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// A block whose pages are all as `entry` says, whatever its page entries hold.
    pub(crate) const fn uniform(entry: Entry) -> Self {
        Self(entry.0)
    }

    /// A block whose page entries count; `owned`, at most 512, of them are [`State::HOST_OWNED`].
    pub(crate) const fn split(owned: u64) -> Self {
        Self(SPLIT | (owned << OWNED_SHIFT))
    }

    /// This uniform block, whose page entries are all equal to its own.
    pub(crate) const fn primed(self) -> Self {
        Self(self.0 | PRIMED)
    }

    /// Returns the state of all pages, unless the block is split.
    pub(crate) const fn as_uniform(self) -> Option<Entry> {
        if self.0 & SPLIT == 0 { Some(Entry::from_bits(self.0)) } else { None }
    }

    /// Returns whether the page entries of a uniform block are all equal to its own.
    pub(crate) const fn is_primed(self) -> bool {
        self.0 & PRIMED != 0
    }

    /// Returns how many pages of a split block are [`State::HOST_OWNED`].
    pub(crate) const fn owned(self) -> u64 {
        (self.0 & OWNED) >> OWNED_SHIFT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_nobody() {
        assert_eq!(Entry::from_bits(0).state(), State::NOBODY);
        assert!(!State::NOBODY.host_access());
        assert_eq!(Block::from_bits(0).as_uniform(), Some(Entry::new(State::NOBODY, 0)));
    }

    #[test]
    fn states_have_their_names() {
        let names: Vec<_> = (0..16).map(|bits| format!("{:?}", State(bits))).filter(|name| name != "?").collect();
        assert_eq!(
            names.join(" "),
            "Nobody HostOwned HypOwned GuestOwned HostShared HypKept GuestOffered HostLent HypDonated GuestPinned HostBorrowed GuestClaimed"
        );
    }

    #[test]
    fn fields_do_not_touch() {
        let entry = Entry::new(State::HOST_SHARED, Entry::MAX_PINS);
        assert_eq!((entry.state(), entry.pins()), (State::HOST_SHARED, 4095));
        let block = Block::split(512);
        assert_eq!((block.owned(), block.as_uniform()), (512, None));
        let primed = Block::uniform(entry).primed();
        assert_eq!((primed.as_uniform(), primed.is_primed()), (Some(entry), true));
    }

    #[test]
    fn el2_maps_what_is_donated_or_pinned() {
        assert!(Entry::new(State::HYP_DONATED, 0).in_el2());
        assert!(Entry::new(State::HOST_SHARED, 1).in_el2());
        assert!(!Entry::new(State::HOST_SHARED, 0).in_el2());
        assert!(!Entry::new(State::HYP_OWNED, 0).in_el2());
        assert!(Entry::new(State::HYP_KEPT, 0).in_el2());
        assert!(Entry::new(State::HOST_BORROWED, 0).in_el2());
        assert!(Entry::of_guest(State::GUEST_PINNED, 255, 0).in_el2());
        assert!(!Entry::of_guest(State::GUEST_CLAIMED, 255, 0).in_el2());
    }

    #[test]
    fn the_host_may_access_what_it_owns_or_has_claimed() {
        let access: Vec<_> = (0..16).map(State).filter(|state| state.host_access()).collect();
        let expected =
            [State::HOST_OWNED, State::HOST_SHARED, State::HOST_LENT, State::HOST_BORROWED, State::GUEST_CLAIMED];
        assert_eq!(access, expected);
    }

    #[test]
    fn runs_end_where_an_entry_does_not_follow() {
        for first in [Entry::new(State::HOST_OWNED, 0), Entry::of_guest(State::GUEST_OFFERED, 3, 77)] {
            let run: Vec<u64> = first.run().take(14).collect();
            let mut written = vec![0; 14];
            first.write_run(&mut written);
            assert_eq!(written, run);
            for length in 0..=14 {
                assert_eq!(first.run_length(&run[..length]), length);
                let mut broken = run.clone();
                broken[length.min(13)] ^= 1;
                assert_eq!(first.run_length(&broken), length.min(13), "{first:?}");
                // The pins are no part of the state.
                assert_eq!(first.states_length(&broken), 14, "{first:?}");
                broken[length.min(13)] = Entry::NOBODY.bits();
                assert_eq!(first.states_length(&broken), length.min(13), "{first:?}");
            }
        }
    }

    #[test]
    fn guest_entries_name_slot_and_frame() {
        let entry = Entry::of_guest(State::GUEST_CLAIMED, 254, (1 << 36) - 2);
        assert_eq!((entry.state(), entry.pins()), (State::GUEST_CLAIMED, 0));
        assert_eq!(entry.guest(), Some((254, (1 << 36) - 2)));
        assert_eq!(entry.following(1).guest(), Some((254, (1 << 36) - 1)));
        assert_eq!(Block::uniform(entry).primed().as_uniform(), Some(entry));
        let host = Entry::new(State::HOST_SHARED, 7);
        assert_eq!((host.guest(), host.following(3)), (None, host));
        for state in
            [State::GUEST_OWNED, State::GUEST_PINNED, State::GUEST_OFFERED, State::GUEST_CLAIMED, State::HOST_LENT]
        {
            assert_eq!(Entry::of_guest(state, 3, 4).guest(), Some((3, 4)), "{state:?}");
        }
    }
}
