//! Regions whose locks are held.

use core::{cell::Cell, mem, ops::ControlFlow};

use arrayvec::ArrayVec;
use ravelin_memory::{IpaRange, PhysAddr, PhysRange};
use ravelin_pgtable::{El2, Hint, Machine, PageTable, TablePool};
use ravelin_sync::TicketMutexGuard;

use crate::{
    HOST_RESERVE,
    entry::Entry,
    memory::{Failure, MAX_LOCKS, Memory, Reason},
    pool::Tables,
    region::Region,
    step::{El2Change, Step},
    transfer::Place,
};

/// A set of regions, or of other things that have a small number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mask(u32);

impl Mask {
    pub(crate) const NONE: Self = Self(0);
    /// All that there are.
    pub(crate) const ALL: Self = Self(u32::MAX);

    pub(crate) const fn with(self, index: usize) -> Self {
        // Below [`MAX_LOCKS`].
        #[expect(
            clippy::as_conversions,
            clippy::cast_possible_truncation,
            reason = "no other way in a constant function"
        )]
        Self(self.0 | 1_u32.wrapping_shl(index as u32))
    }

    pub(crate) const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Returns whether there is one below `index`.
    fn starts_before(self, index: usize) -> bool {
        (0..index).any(|below| self.has(below))
    }

    /// Yields those below `end`, in ascending order.
    pub(crate) fn indices(self, end: usize) -> impl Iterator<Item = usize> {
        let mut left = self.0;
        core::iter::from_fn(move || {
            let index = usize::try_from(left.trailing_zeros()).ok().filter(|&index| index < end)?;
            left &= left.wrapping_sub(1);
            Some(index)
        })
    }

    const fn has(self, index: usize) -> bool {
        self.with(index).0 == self.0
    }
}

/// Regions whose locks are held, and the pool.
pub(crate) struct Locked<'m, 'a, P: TablePool, M: Machine> {
    memory: &'m Memory<'a, P>,
    machine: &'m M,
    /// In ascending order.
    held: ArrayVec<TicketMutexGuard<'m, Region<'a>>, MAX_LOCKS>,
    pub(crate) tables: Tables<'m, P>,
    /// What a guest has at some addresses of its own, for the one who looks first.
    pub(crate) seen: Option<(IpaRange, Place)>,
    /// Whether nobody has looked since then.
    pub(crate) is_fresh: Cell<bool>,
    /// Whether this does not do, and all regions are needed.
    short: bool,
}

impl<'m, 'a, P: TablePool, M: Machine> Locked<'m, 'a, P, M> {
    /// Returns none, to take some.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "not to copy what it returns, which is large")]
    pub(crate) fn new(memory: &'m Memory<'a, P>, machine: &'m M) -> Self {
        let tables = Tables::new(memory.pool());
        let is_fresh = Cell::new(false);
        Self { memory, machine, held: ArrayVec::new_const(), tables, seen: None, is_fresh, short: false }
    }

    /// Returns which regions are held.
    pub(crate) fn mask(&self) -> Mask {
        self.regions().fold(Mask::NONE, |mask, region| mask.with(region.index))
    }

    /// Takes the locks of more regions, unless some of them come before those that are held. Returns whether all are held.
    pub(crate) fn extend(&mut self, mask: Mask) -> bool {
        let missing = mask.without(self.mask());
        let last = self.held.last().map(|region| region.index);
        if last.is_some_and(|last| missing.starts_before(last)) {
            return false;
        }
        self.take_locks(missing);
        true
    }

    /// Takes the locks of these regions, which come after those that are held.
    pub(crate) fn take_locks(&mut self, mask: Mask) {
        for region in mask.indices(self.memory.region_count()).filter_map(|index| self.memory.region(index)) {
            let region = region.lock();
            self.machine.hint(Hint::Lock(region.lock_name()));
            let held = self.held.try_push(region);
            debug_assert!(held.is_ok(), "there is room for all");
        }
    }

    /// Releases the locks, and gives up what is reserved first: who has all locks relies on it that nobody else has reserved tables.
    pub(crate) fn release(&mut self) {
        self.tables.give_up();
        for region in self.held.drain(..) {
            debug_assert!(region.owed.is_empty() && region.el2_owed.is_empty(), "the lock is released with a debt");
            self.machine.hint(Hint::Unlock(region.lock_name()));
        }
    }

    pub(crate) const fn memory(&self) -> &'m Memory<'a, P> {
        self.memory
    }

    /// Returns whether to try again with all regions.
    pub(crate) const fn is_short(&self) -> bool {
        self.short
    }

    pub(crate) fn regions(&self) -> impl Iterator<Item = &Region<'a>> {
        self.held.iter().map(|region| &**region)
    }

    /// Returns the region whose trees are those of all, if all are held.
    pub(crate) fn whole(&self) -> Option<&Region<'a>> {
        self.regions().next().filter(|_| self.held.len() == self.memory.region_count())
    }

    /// Returns the region with this number, which is held, and where tables come from.
    pub(crate) fn at(&mut self, index: usize) -> Option<(&mut Region<'a>, &mut Tables<'m, P>)> {
        let region = self.held.iter_mut().find(|region| region.index == index)?;
        Some((region, &mut self.tables))
    }

    /// Calls `f` with each region that `range` lies in, all of which are held, and the part of the range that lies there.
    pub(crate) fn for_each_part(
        &mut self,
        range: PhysRange,
        f: &mut dyn FnMut(&mut Region<'a>, &mut Tables<'m, P>, PhysRange),
    ) {
        if let [region] = self.held.as_mut_slice()
            && region.covers(range)
        {
            return f(region, &mut self.tables, range);
        }
        for (index, part) in self.memory.cut(range) {
            if let Some((region, tables)) = self.at(index) {
                f(region, tables, part);
            }
        }
    }

    /// Returns the entry of a page, if it is RAM and in a region that is held.
    pub(crate) fn entry(&self, page: PhysAddr) -> Option<Entry> {
        self.of(page)?.table.entry(page)
    }

    /// Returns the region that an address lies in, if it is held.
    pub(crate) fn of(&self, page: PhysAddr) -> Option<&Region<'a>> {
        let index = self.memory.index_of(page);
        self.regions().find(|region| region.index == index)
    }

    /// Returns the region that is held if it is one, and `range` lies there: what most ranges do, which then need not be cut.
    #[inline]
    fn only(&self, range: PhysRange) -> Option<&Region<'a>> {
        match self.held.as_slice() {
            [region] if region.covers(range) => Some(region),
            _ => None,
        }
    }

    /// As [`crate::OwnershipTable::visit`], in all regions that are held.
    pub(crate) fn visit<B>(
        &self,
        range: PhysRange,
        f: &mut dyn FnMut(PhysRange, Option<Entry>, u64) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        if let Some(region) = self.only(range) {
            return region.table.visit(range, f);
        }
        let mut is_ram = true;
        for (index, part) in self.memory.cut(range) {
            let Some(region) = self.regions().find(|region| region.index == index) else {
                return f(PhysRange::single(part.base()), None, 1);
            };
            region.table.visit(part, &mut |run, entry, steps| {
                is_ram &= entry.is_some();
                f(run, entry, steps)
            })?;
            if !is_ram {
                break;
            }
        }
        ControlFlow::Continue(())
    }

    /// Checks that `step` may be taken from every page of `range`.
    pub(crate) fn check(&mut self, range: PhysRange, step: &Step) -> Result<(), Failure> {
        if let Some(region) = self.only(range) {
            return region.table.check(range, step);
        }
        for (index, part) in self.memory.cut(range) {
            let Some((region, _)) = self.at(index) else {
                return Err(Failure { reason: Reason::NotRam, page: part.base() });
            };
            region.table.check(part, step)?;
        }
        Ok(())
    }

    /// Takes `step` for all pages of `range` or, if that is not possible, for none.
    pub(crate) fn take(&mut self, machine: &M, range: PhysRange, step: &Step) -> Result<(), Failure> {
        self.check(range, step)?;
        if step.el2 != El2Change::None {
            self.reserve(machine, range, step)?;
            // Nothing fails from here on.
            self.change_el2(machine, range, step);
        }
        self.commit(machine, range, step);
        Ok(())
    }

    // These three are out of line because closures of several walks in one frame would count as calls of each other where the depth
    // of the stack is computed.

    #[inline(never)]
    fn change_el2(&mut self, machine: &M, range: PhysRange, step: &Step) {
        self.for_each_part(range, &mut |region, tables, part| region.change_el2(machine, tables, part, step));
        self.flush_el2(machine);
    }

    #[inline(never)]
    fn commit(&mut self, machine: &M, range: PhysRange, step: &Step) {
        self.for_each_part(range, &mut |region, tables, part| region.commit(machine, tables, part, step));
        self.flush_host(machine);
    }

    /// Makes sure that there are the tables that `step` takes for the EL2 stage 1, and leaves enough to the host.
    #[inline(never)]
    fn reserve(&mut self, machine: &M, range: PhysRange, step: &Step) -> Result<(), Failure> {
        if self.tables.reserve(PageTable::<El2>::most_tables(range.pages()), HOST_RESERVE) {
            return Ok(());
        }
        let mut needed = 0_usize;
        self.for_each_part(range, &mut |region, _, part| {
            needed = needed.saturating_add(region.tables_for_el2(machine, part, step));
        });
        if needed == 0 || self.reserve_or_evict(machine, needed, HOST_RESERVE) {
            Ok(())
        } else {
            Err(Failure { reason: Reason::NoMemory, page: range.base() })
        }
    }

    /// Reserves `needed` tables if that leaves `left` to the host, and drops the host's mappings if there is no other way. Returns
    /// whether they are reserved.
    pub(crate) fn reserve_or_evict(&mut self, machine: &M, needed: usize, left: usize) -> bool {
        if self.tables.reserve(needed, left) {
            return true;
        }
        if !self.leaves_to_host(needed, left) {
            return false;
        }
        if !self.tables.reserve(needed, 0) {
            self.evict_host(machine);
        }
        self.tables.reserve(needed, 0)
    }

    /// Returns whether `needed` tables leave `left` to the host, where its own tables count as left to it: it can be made to build
    /// them anew. All regions are needed to tell.
    pub(crate) fn leaves_to_host(&mut self, needed: usize, left: usize) -> bool {
        let evictable = self.regions().fold(0, |sum, region| region.host.tables().wrapping_add(sum));
        self.has_all() && needed.saturating_add(left) <= self.tables.available().saturating_add(evictable)
    }

    /// Returns whether all regions are held. If not, remembers that they should be.
    fn has_all(&mut self) -> bool {
        self.short = self.held.len() != self.memory.region_count();
        !self.short
    }

    /// Drops the whole host stage 2; faults fill it again. All regions are held.
    pub(crate) fn evict_host(&mut self, machine: &M) {
        for region in &mut self.held {
            if region.index == 0 {
                self.memory.between(&mut |pages| region.unmap_host(machine, &mut self.tables, pages));
                region.counts.evictions = region.counts.evictions.wrapping_add(1);
            } else {
                let owed = mem::take(&mut region.owed);
                region.owed = region.host.unmap_all(machine, &mut self.tables, owed);
            }
        }
        self.flush_host(machine);
    }

    /// Takes the host's access to `pages`.
    #[inline(never)]
    pub(crate) fn unmap_host(&mut self, machine: &M, pages: PhysRange) {
        self.for_each_part(pages, &mut |region, tables, part| region.unmap_host(machine, tables, part));
    }

    /// Sets the entries of `run`, which is RAM, to `entry` and what follows it.
    #[inline(never)]
    pub(crate) fn assign(&mut self, machine: &M, run: PhysRange, entry: Entry) {
        self.for_each_part(run, &mut |region, tables, part| {
            let behind = part.base().page_number().wrapping_sub(run.base().page_number());
            region.assign(machine, tables, part, entry.following(behind));
        });
    }

    /// Pays what is owed for the host's stage 2, with one invalidation.
    pub(crate) fn flush_host(&mut self, machine: &M) {
        let Some(first) = self.held.first() else { return };
        let owed = self.held.iter().map(|region| &region.owed);
        let Some(invalidated) = first.host.invalidate(machine, owed) else { return };
        for region in &mut self.held {
            let owed = mem::take(&mut region.owed);
            region.host.settle(machine, &mut self.tables, owed, &invalidated);
        }
        self.count_stage2_invalidation();
    }

    /// Pays what is owed for the EL2 stage 1, with one invalidation.
    pub(crate) fn flush_el2(&mut self, machine: &M) {
        let Some(first) = self.held.first() else { return };
        let owed = self.held.iter().map(|region| &region.el2_owed);
        let Some(invalidated) = first.el2.invalidate(machine, owed) else { return };
        for region in &mut self.held {
            let owed = mem::take(&mut region.el2_owed);
            region.el2.settle(machine, &mut self.tables, owed, &invalidated);
        }
        if let Some(region) = self.held.first_mut() {
            region.counts.el2_invalidations = region.counts.el2_invalidations.wrapping_add(1);
        }
    }

    /// Counts an invalidation of a guest's stage 2.
    pub(crate) fn count_stage2_invalidation(&mut self) {
        if let Some(region) = self.held.first_mut() {
            region.counts.stage2_invalidations = region.counts.stage2_invalidations.wrapping_add(1);
        }
    }
}

impl<P: TablePool, M: Machine> Drop for Locked<'_, '_, P, M> {
    fn drop(&mut self) {
        self.release();
    }
}
