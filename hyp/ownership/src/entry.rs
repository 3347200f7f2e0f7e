//! Entries of the ownership table.
//!
//! | bits | page entry | block entry |
//! |---|---|---|
//! | 11:0 | pins | pins, if uniform |
//! | 15:12 | state | state, if uniform |
//! | 23:16 | VM handle, later | 0 |
//! | 33:24 | guest frame (59:24), later | pages in state `HostOwned`, if split |
//! | 60 | 0 | split: the page entries count, not this one |
//! | 61 | 0 | primed: the page entries all equal this uniform one |

use core::fmt;

const PINS: u64 = 0xfff;
const STATE_SHIFT: u32 = 12;
const STATE: u64 = 0xf << STATE_SHIFT;
const OWNED_SHIFT: u32 = 24;
const OWNED: u64 = 0x3ff << OWNED_SHIFT;
const SPLIT: u64 = 1 << 60;
const PRIMED: u64 = 1 << 61;

/// Owner in bits 1:0, bit 2 set if shared with the hypervisor, bit 3 if donated to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State(u64);

impl State {
    /// Nobody owns the page and nobody has access; also what lies outside RAM.
    pub const NOBODY: Self = Self(0);
    /// The host owns the page, and nobody else has access.
    pub const HOST_OWNED: Self = Self(0b0001);
    /// The host owns the page and shares it with the hypervisor, which may pin it.
    pub const HOST_SHARED: Self = Self(0b0101);
    /// The hypervisor has owned the page from the start. It never leaves this state.
    pub const HYP_OWNED: Self = Self(0b0010);
    /// The hypervisor owns the page, which the host has donated.
    pub const HYP_DONATED: Self = Self(0b1010);

    /// Returns whether the host may access pages in this state.
    #[must_use]
    pub const fn host_access(self) -> bool {
        self.0 & 0b11 == Self::HOST_OWNED.0
    }

    const fn bits(self) -> u64 {
        self.0 << STATE_SHIFT
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::NOBODY => "Nobody",
            Self::HOST_OWNED => "HostOwned",
            Self::HOST_SHARED => "HostShared",
            Self::HYP_OWNED => "HypOwned",
            Self::HYP_DONATED => "HypDonated",
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

    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits & (STATE | PINS))
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
        self.0 & (State::HYP_DONATED.bits() & !State::HYP_OWNED.bits() | PINS) != 0
    }
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
    }

    #[test]
    fn only_the_host_has_host_access() {
        let all = [State::NOBODY, State::HOST_OWNED, State::HOST_SHARED, State::HYP_OWNED, State::HYP_DONATED];
        let access: Vec<_> = all.into_iter().filter(|state| state.host_access()).collect();
        assert_eq!(access, [State::HOST_OWNED, State::HOST_SHARED]);
    }
}
