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
    /// Moves `pages` from one state to another.
    pub(crate) fn moved(&mut self, before: State, after: State, pages: u64) {
        if before == after {
            return;
        }
        if let Some(count) = self.of(before) {
            *count = count.wrapping_sub(pages);
        }
        if let Some(count) = self.of(after) {
            *count = count.wrapping_add(pages);
        }
    }

    /// Adds what is counted of a region.
    pub(crate) fn add(&mut self, region: &Region<'_>) {
        let its = &region.counts;
        for (sum, more) in [
            (&mut self.host_owned, its.host_owned),
            (&mut self.host_shared, its.host_shared),
            (&mut self.hyp_owned, its.hyp_owned),
            (&mut self.hyp_donated, its.hyp_donated),
            (&mut self.hyp_kept, its.hyp_kept),
            (&mut self.host_lent, its.host_lent),
            (&mut self.guest_owned, its.guest_owned),
            (&mut self.guest_offered, its.guest_offered),
            (&mut self.guest_claimed, its.guest_claimed),
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

    /// Returns how many pages are in each state.
    pub(crate) const fn pages(&self) -> [u64; 9] {
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

    fn of(&mut self, state: State) -> Option<&mut u64> {
        match state {
            State::HOST_OWNED => Some(&mut self.host_owned),
            State::HOST_SHARED | State::HOST_BORROWED => Some(&mut self.host_shared),
            State::HYP_OWNED => Some(&mut self.hyp_owned),
            State::HYP_DONATED => Some(&mut self.hyp_donated),
            State::HYP_KEPT => Some(&mut self.hyp_kept),
            State::HOST_LENT => Some(&mut self.host_lent),
            State::GUEST_OWNED | State::GUEST_PINNED => Some(&mut self.guest_owned),
            State::GUEST_OFFERED => Some(&mut self.guest_offered),
            State::GUEST_CLAIMED => Some(&mut self.guest_claimed),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_is_counted_on_its_own() {
        let states = [
            State::HOST_OWNED,
            State::HOST_SHARED,
            State::HYP_OWNED,
            State::HYP_DONATED,
            State::HYP_KEPT,
            State::HOST_LENT,
            State::GUEST_OWNED,
            State::GUEST_OFFERED,
            State::GUEST_CLAIMED,
        ];
        let mut counts = Counts::default();
        for (state, pages) in states.into_iter().zip(1..) {
            counts.moved(State::NOBODY, state, pages);
        }
        assert_eq!(counts.pages(), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        counts.moved(State::GUEST_OFFERED, State::GUEST_CLAIMED, 8);
        counts.moved(State::HOST_SHARED, State::HOST_BORROWED, 2);
        counts.moved(State::HYP_KEPT, State::NOBODY, 5);
        assert_eq!(counts.pages(), [1, 2, 3, 4, 0, 6, 7, 0, 17]);
    }
}
