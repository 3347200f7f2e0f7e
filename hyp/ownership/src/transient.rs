//! EL2 mappings that last for an operation on pages that are not EL2's.

use ravelin_memory::PhysRange;
use ravelin_pgtable::{El2Usage, Flush, Machine, TablePool};

use crate::memory::Inner;

/// Tables that mapping any one range takes at most: on each of the three levels below the root, one at each end.
const MOST_TABLES: usize = 6;

impl<P: TablePool> Inner<'_, P> {
    /// Makes sure that [`Inner::with_mapped`] has the tables that it needs. Returns whether it has.
    pub(crate) fn reserve_transient<M: Machine>(&mut self, machine: &M) -> bool {
        if self.pool.available() < MOST_TABLES {
            self.evict_host(machine);
        }
        self.pool.available() >= MOST_TABLES
    }

    /// Calls `f` with each of `runs` while EL2 has it mapped writable at its physical address: as many at a time as there are
    /// tables for, and one invalidation for them together. None of the runs is mapped in EL2, and
    /// [`Inner::reserve_transient`] has returned true.
    pub(crate) fn with_mapped<M: Machine>(
        &mut self,
        machine: &M,
        runs: impl Iterator<Item = PhysRange> + Clone,
        f: &mut dyn FnMut(PhysRange),
    ) {
        let mut left = runs.peekable();
        while left.peek().is_some() {
            let batch = left.clone();
            let mut mapped = 0_usize;
            while let Some(&run) = left.peek() {
                let needed = self.el2.tables_to_map(machine, run.identity_va(), run.base(), El2Usage::Data);
                // The first always fits.
                if mapped != 0 && needed > self.pool.available() {
                    break;
                }
                let done = self.el2.map(machine, &mut self.pool, run.identity_va(), run.base(), El2Usage::Data);
                debug_assert_eq!(done, Ok(()));
                mapped = mapped.saturating_add(1);
                left.next();
            }
            batch.clone().take(mapped).for_each(&mut *f);
            let mut flush = Flush::new();
            for run in batch.take(mapped) {
                flush = self.el2.unmap(machine, &mut self.pool, run.identity_va(), flush);
            }
            self.flush_el2(machine, flush);
        }
    }
}
