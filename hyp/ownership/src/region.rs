//! A part of memory with a lock of its own.

use core::mem;

use ravelin_memory::{HypAddr, Level, PhysAddr, PhysRange};
use ravelin_pgtable::{El2, El2Usage, Flush, Machine, PageTable, Stage2, TablePool};

use crate::{
    counts::RegionCounts,
    entry::{Entry, State},
    step::{El2Change, Step},
    table::OwnershipTable,
};

/// Who owns the memory of a region and what of it is mapped: its part of the ownership table, of the host's stage 2 and of the EL2
/// stage 1.
pub(crate) struct Region<'a> {
    /// Which one it is; 0 is what no other has.
    pub(crate) index: usize,
    /// Where it is; nowhere for the first.
    span: Option<PhysRange>,
    pub(crate) table: OwnershipTable<'a>,
    pub(crate) host: PageTable<Stage2>,
    pub(crate) el2: PageTable<El2>,
    /// What has been taken out of the host's stage 2. Nothing is owed when the lock is released.
    pub(crate) owed: Flush<Stage2>,
    /// The same of the EL2 stage 1.
    pub(crate) el2_owed: Flush<El2>,
    pub(crate) counts: RegionCounts,
}

impl<'a> Region<'a> {
    pub(crate) fn new(
        index: usize,
        span: Option<PhysRange>,
        table: OwnershipTable<'a>,
        host: PageTable<Stage2>,
        el2: PageTable<El2>,
    ) -> Self {
        let counts = table.first_counts();
        Self { index, span, table, host, el2, owed: Flush::new(), el2_owed: Flush::new(), counts }
    }

    /// Returns whether all of `range` is known to lie here, without much ado.
    #[inline]
    pub(crate) fn covers(&self, range: PhysRange) -> bool {
        self.span.is_some_and(|span| span.covers(&range))
    }

    /// Returns what a trace calls the lock: of the first, it is the root of the host's stage 2. No other root is in those pages.
    pub(crate) fn lock_name(&self) -> PhysAddr {
        let number = u64::try_from(self.index).unwrap_or_default();
        PhysAddr::from_bits_truncating(self.host.root().raw() | number)
    }

    /// Takes the host's access to `pages`.
    pub(crate) fn unmap_host<M: Machine>(&mut self, machine: &M, tables: &mut impl TablePool, pages: PhysRange) {
        let owed = mem::take(&mut self.owed);
        self.owed = self.host.unmap(machine, tables, pages.identity_ipa(), owed);
    }

    /// Takes `pages` out of the EL2 stage 1.
    pub(crate) fn unmap_el2<M: Machine>(&mut self, machine: &M, tables: &mut impl TablePool, pages: PhysRange) {
        let owed = mem::take(&mut self.el2_owed);
        self.el2_owed = self.el2.unmap(machine, tables, pages.identity_va(), owed);
    }

    /// Maps `pages` in the EL2 stage 1 for reading and writing. There are tables for it.
    pub(crate) fn map_el2<M: Machine>(&mut self, machine: &M, tables: &mut impl TablePool, pages: PhysRange) {
        let mapped = self.el2.map(machine, tables, pages.identity_va(), pages.base(), El2Usage::Data);
        debug_assert_eq!(mapped, Ok(()));
    }

    /// Does to the EL2 stage 1 what `step`, which has been checked for `pages`, asks for. There are tables for it.
    pub(crate) fn change_el2<M: Machine>(
        &mut self,
        machine: &M,
        tables: &mut impl TablePool,
        pages: PhysRange,
        step: &Step,
    ) {
        let Self { table, el2, el2_owed, .. } = self;
        let mut change = |run: PhysRange| match step.el2 {
            El2Change::None => {}
            El2Change::Map | El2Change::MapFirst => {
                let mapped = el2.map(machine, tables, run.identity_va(), run.base(), El2Usage::Data);
                debug_assert_eq!(mapped, Ok(()));
            }
            El2Change::Scrub => {
                machine.scrub(run);
                *el2_owed = el2.unmap(machine, tables, run.identity_va(), mem::take(el2_owed));
            }
            El2Change::Unmap | El2Change::UnmapLast => {
                *el2_owed = el2.unmap(machine, tables, run.identity_va(), mem::take(el2_owed));
            }
        };
        match step.el2 {
            El2Change::None => {}
            El2Change::Map | El2Change::Unmap | El2Change::Scrub => change(pages),
            El2Change::MapFirst | El2Change::UnmapLast => table.el2_runs(pages, step, &mut change),
        }
    }

    /// Returns how many tables it takes to do that.
    pub(crate) fn tables_for_el2<M: Machine>(&self, machine: &M, pages: PhysRange, step: &Step) -> usize {
        let (mut needed, mut after) = (0_usize, None);
        let mut plan = |run: PhysRange| {
            let va = run.identity_va();
            let tables = match step.el2 {
                El2Change::None => 0,
                El2Change::Map | El2Change::MapFirst => {
                    // Between two runs lie pages that are mapped already, so the runs have no new table in common.
                    self.el2.tables_to_map(machine, va, run.base(), El2Usage::Data)
                }
                El2Change::Unmap | El2Change::Scrub | El2Change::UnmapLast => {
                    self.el2.tables_to_unmap(machine, va, after)
                }
            };
            needed = needed.saturating_add(tables);
            after = Some(HypAddr::from_bits_truncating(va.end().wrapping_sub(1)));
        };
        match step.el2 {
            El2Change::None => {}
            El2Change::Map | El2Change::Unmap | El2Change::Scrub => plan(pages),
            El2Change::MapFirst | El2Change::UnmapLast => self.table.el2_runs(pages, step, &mut plan),
        }
        needed
    }

    /// Takes `step`, which has been checked for `pages`, in the ownership table and the host's stage 2.
    pub(crate) fn commit<M: Machine>(
        &mut self,
        machine: &M,
        tables: &mut impl TablePool,
        pages: PhysRange,
        step: &Step,
    ) {
        if step.takes_from_host() {
            self.unmap_host(machine, tables, pages);
        }
        let Self { table, host, owed, .. } = self;
        table.commit(pages, step, &mut |block| rejoin(machine, host, tables, block, owed));
        self.counts.moved(step.before, step.after, pages.pages());
    }

    /// Sets the entries of `run`, which is RAM, to `entry` and what follows it.
    pub(crate) fn assign<M: Machine>(
        &mut self,
        machine: &M,
        tables: &mut impl TablePool,
        run: PhysRange,
        entry: Entry,
    ) {
        let Self { table, host, counts, owed, .. } = self;
        let mut moved = |old: State, pages| counts.moved(old, entry.state(), pages);
        table.assign(run, entry, &mut moved, &mut |block| rejoin(machine, host, tables, block, owed));
    }
}

/// Takes the host's last-level table of `block` out of the way, so that the next fault maps the block as one.
fn rejoin<M: Machine>(
    machine: &M,
    host: &mut PageTable<Stage2>,
    tables: &mut impl TablePool,
    block: PhysRange,
    owed: &mut Flush<Stage2>,
) {
    let block = block.identity_ipa();
    if host.lookup(machine, block.base()).level == Level::L3 {
        *owed = host.unmap(machine, tables, block, mem::take(owed));
    }
}
