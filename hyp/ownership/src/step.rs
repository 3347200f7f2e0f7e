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
    /// What to answer if a page has too few or too many pins.
    otherwise: Reason,
    /// The entry with the fewest pins that the step may be taken from.
    least: Entry,
    /// How many pins more there may be.
    spare_pins: u64,
    /// What is added to the entry, modulo 2^64.
    delta: u64,
    /// What is added to the number of pages that the host owns and does not share, for each page, modulo 2^64.
    pub(crate) owned: u64,
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
    /// All of the range is scrubbed and unmapped.
    Scrub,
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
    pub(crate) const TAKE_BACK: Self = Self::unpinned(State::HYP_DONATED, State::HOST_OWNED, El2Change::Scrub);
    pub(crate) const KEEP: Self = Self::unpinned(State::HOST_OWNED, State::HYP_KEPT, El2Change::Map);
    pub(crate) const GIVE_BACK: Self = Self::unpinned(State::HYP_KEPT, State::HOST_OWNED, El2Change::Scrub);
    pub(crate) const BORROW: Self = Self::unpinned(State::HOST_OWNED, State::HOST_BORROWED, El2Change::Map);
    pub(crate) const RETURN: Self = Self::unpinned(State::HOST_BORROWED, State::HOST_OWNED, El2Change::Unmap);
    pub(crate) const PIN: Self = Self {
        before: State::HOST_SHARED,
        after: State::HOST_SHARED,
        otherwise: Reason::PinLimit,
        least: Entry::new(State::HOST_SHARED, 0),
        spare_pins: Entry::MAX_PINS.wrapping_sub(1),
        delta: ONE_PIN,
        owned: 0,
        el2: El2Change::MapFirst,
    };
    pub(crate) const UNPIN: Self = Self {
        before: State::HOST_SHARED,
        after: State::HOST_SHARED,
        otherwise: Reason::Denied,
        least: Entry::new(State::HOST_SHARED, 1),
        spare_pins: Entry::MAX_PINS.wrapping_sub(1),
        delta: ONE_PIN.wrapping_neg(),
        owned: 0,
        el2: El2Change::UnmapLast,
    };

    /// The step between two different states; pinned pages cannot take it.
    const fn unpinned(before: State, after: State, el2: El2Change) -> Self {
        let least = Entry::new(before, 0);
        let delta = Entry::new(after, 0).bits().wrapping_sub(least.bits());
        let owned = match (before, after) {
            (State::HOST_OWNED, _) => 1_u64.wrapping_neg(),
            (_, State::HOST_OWNED) => 1,
            _ => 0,
        };
        Self { before, after, otherwise: Reason::Busy, least, spare_pins: 0, delta, owned, el2 }
    }

    /// Returns whether the step may be taken from `entry`.
    ///
    /// State and pins are adjacent fields, so this is one comparison.
    #[inline]
    pub(crate) const fn allows(&self, entry: Entry) -> bool {
        entry.bits().wrapping_sub(self.least.bits()) <= self.spare_pins
    }

    /// Returns why the step may not be taken from `entry`.
    pub(crate) fn reason(&self, entry: Entry) -> Reason {
        if entry.state() == self.before { self.otherwise } else { Reason::Denied }
    }

    /// Returns the index of the first entry that the step may not be taken from.
    ///
    /// Four at a time, because this and [`Step::apply_all`] are what a range costs per page.
    pub(crate) fn first_refused(&self, entries: &[u64]) -> Option<usize> {
        let allows = |bits: u64| self.allows(Entry::from_bits(bits));
        let fours = entries.as_chunks().0;
        let good = fours.iter().take_while(|[a, b, c, d]| allows(*a) & allows(*b) & allows(*c) & allows(*d)).count();
        let checked = good.saturating_mul(4);
        let bad = entries.get(checked..)?.iter().position(|&bits| !allows(bits))?;
        Some(checked.wrapping_add(bad))
    }

    /// Returns what the step makes of `entry`, which it allows.
    #[inline]
    pub(crate) const fn apply(&self, entry: Entry) -> Entry {
        Entry::from_bits(entry.bits().wrapping_add(self.delta))
    }

    /// Takes the step from all entries, which it allows.
    pub(crate) fn apply_all(&self, entries: &mut [u64]) {
        let apply = |bits: &mut u64| *bits = self.apply(Entry::from_bits(*bits)).bits();
        let (fours, rest) = entries.as_chunks_mut();
        for [a, b, c, d] in fours {
            apply(a);
            apply(b);
            apply(c);
            apply(d);
        }
        rest.iter_mut().for_each(apply);
    }

    /// Returns whether the step, which is allowed, puts a page into the EL2 stage 1 or takes it out, from `entry`: the one
    /// with the fewest pins.
    #[inline]
    pub(crate) const fn changes_el2(&self, entry: Entry) -> bool {
        entry.bits() == self.least.bits() && !matches!(self.el2, El2Change::None)
    }

    /// Returns whether the host loses its access.
    pub(crate) const fn takes_from_host(&self) -> bool {
        self.before.host_access() && !self.after.host_access()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [Step; 10] = [
        Step::SHARE,
        Step::UNSHARE,
        Step::DONATE,
        Step::TAKE_BACK,
        Step::KEEP,
        Step::GIVE_BACK,
        Step::BORROW,
        Step::RETURN,
        Step::PIN,
        Step::UNPIN,
    ];
    impl Step {
        fn pins(&self) -> std::ops::RangeInclusive<u64> {
            let least = self.least.pins();
            least..=least + self.spare_pins
        }
    }

    #[test]
    fn the_owned_column_agrees_with_the_states() {
        let owned = |state| u64::from(state == State::HOST_OWNED);
        for step in STEPS {
            assert_eq!(owned(step.before).wrapping_add(step.owned), owned(step.after), "{step:?}");
        }
    }

    #[test]
    fn a_step_is_allowed_from_its_state_alone() {
        for step in STEPS {
            for state in State::ALL {
                for pins in [0, 1, 2, Entry::MAX_PINS - 1, Entry::MAX_PINS] {
                    let entry = Entry::new(state, pins);
                    let expected = state == step.before && step.pins().contains(&pins);
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
            for pins in step.pins() {
                let entry = Entry::new(step.before, pins);
                let expected = match step.el2 {
                    El2Change::None => false,
                    El2Change::Map | El2Change::Unmap | El2Change::Scrub => true,
                    El2Change::MapFirst => pins == 0,
                    El2Change::UnmapLast => pins == 1,
                };
                assert_eq!(entry.in_el2() != step.apply(entry).in_el2(), expected, "{step:?} from {entry:?}");
                assert_eq!(step.changes_el2(entry), expected, "{step:?} from {entry:?}");
            }
        }
    }

    #[test]
    fn many_entries_are_as_one_at_a_time() {
        let good = Entry::new(State::HOST_OWNED, 0).bits();
        for length in 0..14 {
            let mut entries = vec![good; length];
            assert_eq!(Step::SHARE.first_refused(&entries), None);
            for bad in 0..length {
                entries[bad] = 0;
                assert_eq!(Step::SHARE.first_refused(&entries), Some(bad));
                entries[length - 1] = 0;
                assert_eq!(Step::SHARE.first_refused(&entries), Some(bad));
                entries.fill(good);
            }
            Step::SHARE.apply_all(&mut entries);
            assert_eq!(entries, vec![Entry::new(State::HOST_SHARED, 0).bits(); length]);
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
