//! What guests are made of: pages for their objects and tables.

use core::ops::ControlFlow;

use arrayvec::ArrayVec;
use ravelin_memory::{BLOCK_SIZE, IpaRange, Level, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_pgtable::{Flush, Found, Geometry, Machine, TablePool};

use super::{MAX_RUNS, MAX_STEPS};
use crate::{
    HOST_RESERVE,
    entry::{Entry, State},
    guest::{Guest, GuestKind, GuestMemory, Spare},
    locked::{Locked, Mask},
    memory::{Failure, Memory, Reason},
    reason::{GuestReason, HostFailure},
    step::Step,
};

/// Pages for tables that go back to the host together.
type SparePages = ArrayVec<PhysAddr, MAX_RUNS>;

impl<P: TablePool> Memory<'_, P> {
    /// Makes pages of the host the hypervisor's for as long as a VM needs them, with their contents: for its objects and the
    /// root of its stage 2. They are mapped in EL2 for reading and writing. Unlike what [`Memory::donate`] takes, the host
    /// cannot have them back by itself.
    ///
    /// # Errors
    ///
    /// As [`Memory::donate`].
    pub fn keep<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.take(machine, range, &Step::KEEP)
    }

    /// Returns pages that were kept for a VM to the host, scrubbed. Nothing uses them any more.
    ///
    /// To return what was kept with one call is always possible.
    ///
    /// # Errors
    ///
    /// As [`Memory::take_back`]; [`Reason::Denied`] for a page that is not kept.
    pub fn give_back<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.take(machine, range, &Step::GIVE_BACK)
    }

    /// Returns a guest without pages, in `slot`, 0 to 254. `root` is the first of [`Geometry::root_pages`] pages that are
    /// kept, for the root of its stage 2. Whatever the TLBs hold of the slot's VMID is removed.
    ///
    /// # Errors
    ///
    /// [`Reason::Denied`] unless the pages are kept and `root` is aligned to their total size.
    pub fn new_guest<M: Machine>(
        &self,
        machine: &M,
        slot: u8,
        kind: GuestKind,
        geometry: Geometry,
        root: PhysAddr,
    ) -> Result<GuestMemory, Failure> {
        let denied = Failure { reason: Reason::Denied, page: root };
        let pages = PhysRange::new(root.raw(), geometry.root_pages()).map_err(|_| denied)?;
        let locked = self.lock(machine, self.mask(pages));
        let kept = pages.iter().all(|page| locked.entry(page).is_some_and(|entry| entry.state() == State::HYP_KEPT));
        if !kept || !root.is_aligned(pages.size().next_power_of_two()) || slot == u8::MAX {
            return Err(denied);
        }
        pages.iter().for_each(|page| machine.clear_table(page));
        machine.publish();
        let guest = GuestMemory::new(slot, kind, geometry, root);
        guest.empty_tables().announce(machine, root);
        machine.invalidate_stage2_all(guest.vttbr());
        Ok(guest)
    }

    /// Gives a guest, a dying one too, pages of the host for its tables.
    ///
    /// # Errors
    ///
    /// [`GuestReason::TooLarge`] beyond [`MAX_STEPS`] pages; otherwise as [`Memory::keep`]. The page at address 0 is
    /// [`GuestReason::Denied`].
    pub fn add_guest_tables<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: PhysRange,
    ) -> Result<(), HostFailure> {
        let failure = |reason| HostFailure { reason, page: range.base() };
        if range.pages() > MAX_STEPS {
            return Err(failure(GuestReason::TooLarge));
        }
        let mut guest = guest.lock(machine);
        if range.base().raw() == 0 {
            // It ends the list of spare pages. What is wrong with it anyway comes first.
            self.lock(machine, self.mask(range)).check(range, &Step::KEEP)?;
            return Err(failure(GuestReason::Denied));
        }
        self.take(machine, range, &Step::KEEP)?;
        range.iter().for_each(|page| guest.spare.push(machine, page));
        Ok(())
    }

    /// Returns pages for tables of a dying guest that has no pages any more to the host, scrubbed, as many as `most` and
    /// [`MAX_STEPS`] allow. Returns how many are left. Those of the root are not among them.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Busy`] if the guest is not dying or has pages left; [`GuestReason::NoMemory`] if not even one large
    /// mapping of EL2 can be split.
    pub fn release_guest_tables<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        most: u64,
    ) -> Result<u64, GuestReason> {
        let mut tables = guest.lock(machine);
        if !tables.dying || tables.pages != 0 {
            return Err(GuestReason::Busy);
        }
        self.lock(machine, Mask::NONE.with(0)).drop_poison(machine, &mut tables);
        let most = most.min(MAX_STEPS);
        let mut left = most;
        while left != 0 && tables.spare.available != 0 {
            let mut pages = SparePages::new();
            while let Some(page) = tables.spare.peek()
                && u64::try_from(pages.len()).is_ok_and(|taken| taken < left)
                && !pages.is_full()
            {
                tables.spare.pop(machine);
                pages.push(page);
            }
            let mask = pages.iter().fold(Mask::NONE, |mask, &page| mask.union(self.mask(PhysRange::single(page))));
            let returned = self.with(machine, mask, |locked| locked.return_spare(machine, &pages));
            for &page in pages.iter().skip(returned).rev() {
                tables.spare.push(machine, page);
            }
            match u64::try_from(returned).unwrap_or_default() {
                0 if left == most => return Err(GuestReason::NoMemory),
                // The next call fails.
                0 => break,
                returned => left = left.saturating_sub(returned),
            }
        }
        let Spare { available, in_use, .. } = tables.spare;
        Ok(u64::try_from(available.saturating_add(in_use)).unwrap_or(u64::MAX))
    }
}

impl<P: TablePool, M: Machine> Locked<'_, '_, P, M> {
    /// Takes poison, which is all that there is in the tables of a guest without pages, out of up to [`MAX_STEPS`] blocks of
    /// its address space.
    fn drop_poison(&mut self, machine: &M, tables: &mut Guest) {
        let Guest { tables, spare, .. } = tables;
        let (mut from, end) = (0, tables.geometry().end());
        let mut flush = Flush::new();
        for _ in 0..MAX_STEPS {
            let Ok(rest) = IpaRange::from_bounds(from, end) else { break };
            let found = tables.visit(machine, rest, &mut |part, found| match found {
                // What there is in a last-level table, if anything, is poison, which need not be looked for.
                Found::Absent { level } if level != Level::L3 => ControlFlow::Continue(()),
                _ => ControlFlow::Break(part.base().align_down(BLOCK_SIZE)),
            });
            let ControlFlow::Break(base) = found else { break };
            let Ok(block) = IpaRange::new(base.raw(), BLOCK_SIZE / PAGE_SIZE) else { break };
            flush = tables.unmap(machine, &mut spare.pool(machine), block, flush);
            from = block.end();
        }
        self.flush_guest(machine, tables, &mut spare.pool(machine), flush);
    }

    /// Returns the first of these pages, which were kept for tables, to the host, as many as go together, and how many that is. They
    /// are scrubbed before any of them is unmapped, because that breaks blocks of which others are part.
    fn return_spare(&mut self, machine: &M, pages: &SparePages) -> usize {
        let (mut needed, mut count) = (0_usize, 0_usize);
        for &page in pages {
            let mut more = 0;
            self.for_each_part(PhysRange::single(page), &mut |region, _, page| {
                more = region.el2.tables_to_unmap(machine, page.identity_va(), None);
            });
            let total = needed.saturating_add(more);
            if more != 0 && !self.reserve_or_evict(machine, total, HOST_RESERVE) {
                break;
            }
            needed = total;
            count = count.saturating_add(1);
        }
        if self.is_short() {
            return 0;
        }
        let first = || pages.iter().take(count).map(|&page| PhysRange::single(page));
        first().for_each(|page| machine.scrub(page));
        for page in first() {
            self.for_each_part(page, &mut |region, tables, page| region.unmap_el2(machine, tables, page));
        }
        self.flush_el2(machine);
        for page in first() {
            self.assign(machine, page, Entry::new(State::HOST_OWNED, 0));
        }
        self.flush_host(machine);
        count
    }
}
