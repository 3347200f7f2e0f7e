//! EL2 mappings that last for an operation on pages that are not EL2's.

use ravelin_memory::PhysRange;
use ravelin_pgtable::{El2Usage, Machine, TablePool};

use crate::{locked::Locked, transfer::Run};

/// Tables that mapping any one range takes at most: on each of the three levels below the root, one at each end.
const MOST_TABLES: usize = 6;

impl<P: TablePool, M: Machine> Locked<'_, '_, P, M> {
    /// Makes sure that [`Locked::with_mapped`] has the tables that it needs. Returns whether it has.
    pub(crate) fn reserve_transient(&mut self, machine: &M) -> bool {
        self.reserve_or_evict(machine, MOST_TABLES, 0)
    }

    /// Calls `f` with the pages of each of `runs`, cut at the borders of regions, while EL2 has them mapped writable at their physical
    /// addresses: as many at a time as there are tables for, and one invalidation for them together. None of the runs is mapped in
    /// EL2, and [`Locked::reserve_transient`] has returned true.
    pub(crate) fn with_mapped(&mut self, machine: &M, runs: &[Run], f: &mut dyn FnMut(&Run, PhysRange)) {
        let memory = self.memory();
        let mut left = runs.iter().flat_map(|run| memory.cut(run.pages).map(move |part| (run, part))).peekable();
        while left.peek().is_some() {
            let batch = left.clone();
            let mut mapped = 0_usize;
            while let Some(&(_, (index, run))) = left.peek() {
                if let Some((region, tables)) = self.at(index) {
                    let needed = region.el2.tables_to_map(machine, run.identity_va(), run.base(), El2Usage::Data);
                    // The first always fits.
                    if !tables.reserve(needed, 0) && mapped != 0 {
                        break;
                    }
                    region.map_el2(machine, tables, run);
                }
                mapped = mapped.saturating_add(1);
                left.next();
            }
            batch.clone().take(mapped).for_each(|(run, (_, pages))| f(run, pages));
            for (_, (index, run)) in batch.take(mapped) {
                if let Some((region, tables)) = self.at(index) {
                    region.unmap_el2(machine, tables, run);
                }
            }
            self.flush_el2(machine);
        }
    }
}
