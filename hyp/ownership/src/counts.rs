//! What the hypervisor counts about memory.

use crate::{entry::State, region::Region};

/// Numbers about memory, kept as it changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages of RAM that the host owns and shares with nobody.
    pub host_owned: u64,
    /// Pages that the host shares with the hypervisor, and those that the hypervisor has borrowed.
    pub host_shared: u64,
    /// Pages that the hypervisor has owned from the start.
    pub hyp_owned: u64,
    /// Pages that the host has donated to the hypervisor.
    pub hyp_donated: u64,
    /// Pages that the host has donated for VMs and what they are made of, their tables included.
    pub hyp_kept: u64,
    /// Pages that the host lends to ordinary VMs.
    pub host_lent: u64,
    /// Pages that guests own alone.
    pub guest_owned: u64,
    /// Pages that guests offer to the host, and that it has not claimed.
    pub guest_offered: u64,
    /// Pages of guests that the host has claimed.
    pub guest_claimed: u64,
    /// Translation tables that the host's stage 2 uses, less its root.
    pub host_tables: usize,
    /// Translation tables from the pool that the EL2 stage 1 uses.
    pub el2_tables: usize,
    /// Translation tables left in the pool.
    pub free_tables: usize,
    /// TLB invalidations of stage 2, of the host and of guests, since boot.
    pub stage2_invalidations: u64,
    /// TLB invalidations of the EL2 stage 1 since boot.
    pub el2_invalidations: u64,
    /// How often the whole host stage 2 has been dropped for want of tables.
    pub evictions: u64,
    /// Host faults after which the host could go on.
    pub faults_resolved: u64,
    /// Host faults on what the host may not access.
    pub faults_denied: u64,
}

impl Counts {
    /// Adds what is counted of a region.
    pub(crate) fn add(&mut self, region: &Region<'_>) {
        let its = &region.counts;
        for (sum, more) in [
            (&mut self.host_owned, its.pages(State::HOST_OWNED)),
            (&mut self.host_shared, its.pages(State::HOST_SHARED).wrapping_add(its.pages(State::HOST_BORROWED))),
            (&mut self.hyp_owned, its.pages(State::HYP_OWNED)),
            (&mut self.hyp_donated, its.pages(State::HYP_DONATED)),
            (&mut self.hyp_kept, its.pages(State::HYP_KEPT)),
            (&mut self.host_lent, its.pages(State::HOST_LENT)),
            (&mut self.guest_owned, its.pages(State::GUEST_OWNED).wrapping_add(its.pages(State::GUEST_PINNED))),
            (&mut self.guest_offered, its.pages(State::GUEST_OFFERED)),
            (&mut self.guest_claimed, its.pages(State::GUEST_CLAIMED)),
            (&mut self.stage2_invalidations, its.stage2_invalidations),
            (&mut self.el2_invalidations, its.el2_invalidations),
            (&mut self.evictions, its.evictions),
            (&mut self.faults_resolved, its.faults_resolved),
            (&mut self.faults_denied, its.faults_denied),
        ] {
            *sum = sum.wrapping_add(more);
        }
        self.host_tables = self.host_tables.wrapping_add(region.host.tables());
        self.el2_tables = self.el2_tables.wrapping_add(region.el2.tables());
    }
}

/// What is counted of one region.
#[derive(Debug, Default)]
pub(crate) struct RegionCounts {
    /// Pages in each state, by its number.
    pages: [u64; State::NUMBERS],
    pub(crate) stage2_invalidations: u64,
    pub(crate) el2_invalidations: u64,
    pub(crate) evictions: u64,
    pub(crate) faults_resolved: u64,
    pub(crate) faults_denied: u64,
}

impl RegionCounts {
    /// Returns how many pages are in a state.
    pub(crate) fn pages(&self, state: State) -> u64 {
        self.pages.get(state.number()).copied().unwrap_or_default()
    }

    /// Moves `pages` from one state to another.
    #[inline]
    pub(crate) fn moved(&mut self, before: State, after: State, pages: u64) {
        self.add_pages(before, pages.wrapping_neg());
        self.add_pages(after, pages);
    }

    #[inline]
    fn add_pages(&mut self, state: State, more: u64) {
        if let Some(count) = self.pages.get_mut(state.number()) {
            *count = count.wrapping_add(more);
        }
    }

    /// Returns whether the same number of pages is in each state that a page can be in here and by `other`.
    pub(crate) fn same_pages(&self, other: &Self) -> bool {
        // Nothing counts what is in no state at first.
        self.pages.iter().skip(1).eq(other.pages.iter().skip(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Counts {
        /// Returns how many pages there are of each kind.
        pub(crate) fn pages(&self) -> [u64; 9] {
            [
                self.host_owned,
                self.host_shared,
                self.hyp_owned,
                self.hyp_donated,
                self.hyp_kept,
                self.host_lent,
                self.guest_owned,
                self.guest_offered,
                self.guest_claimed,
            ]
        }
    }

    #[test]
    fn each_state_is_counted_on_its_own() {
        let mut counts = RegionCounts::default();
        for (state, pages) in State::ALL.into_iter().skip(1).zip(1..) {
            counts.moved(State::NOBODY, state, pages);
        }
        counts.moved(State::GUEST_OFFERED, State::GUEST_CLAIMED, 8);
        counts.moved(State::HOST_SHARED, State::HOST_BORROWED, 2);
        counts.moved(State::HYP_KEPT, State::HYP_KEPT, 6);
        let pages = State::ALL.map(|state| counts.pages(state));
        assert_eq!(pages[1..], [1, 0, 5, 4, 5, 6, 7, 8, 9, 2, 19]);
    }

    #[test]
    fn a_page_more_in_a_state_is_a_difference() {
        for &state in &State::ALL[1..] {
            let mut counts = RegionCounts::default();
            assert!(counts.same_pages(&RegionCounts::default()));
            counts.moved(State::NOBODY, state, 1);
            assert!(!counts.same_pages(&RegionCounts::default()), "{state:?}");
        }
    }
}
