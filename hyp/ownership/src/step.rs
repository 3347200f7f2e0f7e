//! The transitions that a page can make, as a table.

use crate::{
    entry::{Entry, State},
    memory::Reason,
};

/// One transition: what it asks of an entry and what it makes of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) before: State,
    pub(crate) after: State,
    /// Fewest and most pins that the page may have.
    pins: (u64, u64),
    /// What to answer if it has others.
    otherwise: Reason,
    /// What is added to the entry, modulo 2^64.
    delta: u64,
    /// Which pages the EL2 stage 1 has to map or to unmap.
    pub(crate) el2: El2Change,
}

/// What a step changes in the EL2 stage 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum El2Change {
    /// Nothing.
    None,
    /// All of the range is mapped.
    Map,
    /// All of the range is unmapped.
    Unmap,
    /// The pages whose first pin it is are mapped.
    MapFirst,
    /// The pages whose last pin it is are unmapped.
    UnmapLast,
}

const ONE_PIN: u64 = 1;

impl Step {
    pub(crate) const SHARE: Self = Self::unpinned(State::HOST_OWNED, State::HOST_SHARED, El2Change::None);
    pub(crate) const UNSHARE: Self = Self::unpinned(State::HOST_SHARED, State::HOST_OWNED, El2Change::None);
    pub(crate) const DONATE: Self = Self::unpinned(State::HOST_OWNED, State::HYP_DONATED, El2Change::Map);
    pub(crate) const TAKE_BACK: Self = Self::unpinned(State::HYP_DONATED, State::HOST_OWNED, El2Change::Unmap);
    pub(crate) const PIN: Self = Self {
        before: State::HOST_SHARED,
        after: State::HOST_SHARED,
        pins: (0, Entry::MAX_PINS.wrapping_sub(1)),
        otherwise: Reason::PinLimit,
        delta: ONE_PIN,
        el2: El2Change::MapFirst,
    };
    pub(crate) const UNPIN: Self = Self {
        before: State::HOST_SHARED,
        after: State::HOST_SHARED,
        pins: (1, Entry::MAX_PINS),
        otherwise: Reason::Denied,
        delta: ONE_PIN.wrapping_neg(),
        el2: El2Change::UnmapLast,
    };

    const fn unpinned(before: State, after: State, el2: El2Change) -> Self {
        let delta = Entry::new(after, 0).bits().wrapping_sub(Entry::new(before, 0).bits());
        Self { before, after, pins: (0, 0), otherwise: Reason::Busy, delta, el2 }
    }

    /// Returns whether the step may be taken from `entry`.
    ///
    /// State and pins are adjacent fields, so this is one comparison.
    #[inline]
    pub(crate) const fn allows(&self, entry: Entry) -> bool {
        let least = Entry::new(self.before, self.pins.0).bits();
        let most = Entry::new(self.before, self.pins.1).bits();
        entry.bits().wrapping_sub(least) <= most.wrapping_sub(least)
    }

    /// Returns why the step may not be taken from `entry`.
    pub(crate) fn reason(&self, entry: Entry) -> Reason {
        if entry.state() == self.before { self.otherwise } else { Reason::Denied }
    }

    /// Returns what the step makes of `entry`, which it allows.
    #[inline]
    pub(crate) const fn apply(&self, entry: Entry) -> Entry {
        Entry::from_bits(entry.bits().wrapping_add(self.delta))
    }

    /// Returns whether the step puts a page into the EL2 stage 1 or takes it out, from `entry`.
    #[inline]
    pub(crate) const fn changes_el2(&self, entry: Entry) -> bool {
        entry.in_el2() != self.apply(entry).in_el2()
    }

    /// Returns whether the host loses its access.
    pub(crate) const fn takes_from_host(&self) -> bool {
        self.before.host_access() && !self.after.host_access()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [Step; 6] = [Step::SHARE, Step::UNSHARE, Step::DONATE, Step::TAKE_BACK, Step::PIN, Step::UNPIN];
    const STATES: [State; 5] =
        [State::NOBODY, State::HOST_OWNED, State::HOST_SHARED, State::HYP_OWNED, State::HYP_DONATED];

    #[test]
    fn a_step_is_allowed_from_its_state_alone() {
        for step in STEPS {
            for state in STATES {
                for pins in [0, 1, 2, Entry::MAX_PINS - 1, Entry::MAX_PINS] {
                    let entry = Entry::new(state, pins);
                    let expected = state == step.before && (step.pins.0..=step.pins.1).contains(&pins);
                    assert_eq!(step.allows(entry), expected, "{step:?} from {entry:?}");
                    if expected {
                        assert_eq!(step.apply(entry).state(), step.after, "{step:?} from {entry:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_el2_column_agrees_with_the_entries() {
        for step in STEPS {
            for pins in step.pins.0..=step.pins.1 {
                let entry = Entry::new(step.before, pins);
                let expected = match step.el2 {
                    El2Change::None => false,
                    El2Change::Map | El2Change::Unmap => true,
                    El2Change::MapFirst => pins == 0,
                    El2Change::UnmapLast => pins == 1,
                };
                assert_eq!(step.changes_el2(entry), expected, "{step:?} from {entry:?}");
            }
        }
    }

    #[test]
    fn reasons() {
        assert_eq!(Step::UNSHARE.reason(Entry::new(State::HOST_SHARED, 1)), Reason::Busy);
        assert_eq!(Step::UNSHARE.reason(Entry::new(State::HOST_OWNED, 0)), Reason::Denied);
        assert_eq!(Step::PIN.reason(Entry::new(State::HOST_SHARED, Entry::MAX_PINS)), Reason::PinLimit);
        assert_eq!(Step::UNPIN.reason(Entry::new(State::HOST_SHARED, 0)), Reason::Denied);
    }

    #[test]
    fn pins_stop_at_the_limit() {
        let full = Step::PIN.apply(Entry::new(State::HOST_SHARED, Entry::MAX_PINS - 1));
        assert_eq!(full.pins(), Entry::MAX_PINS);
        assert!(!Step::PIN.allows(full));
        assert_eq!(Step::UNPIN.apply(full).pins(), Entry::MAX_PINS - 1);
    }
}
