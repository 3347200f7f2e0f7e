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
    memory::{Failure, Inner, Memory, Reason},
    reason::{GuestReason, HostFailure},
    step::Step,
};

impl<P: TablePool> Memory<'_, P> {
    /// Makes pages of the host the hypervisor's for as long as a VM needs them, with their contents: for its objects and the
    /// root of its stage 2. They are mapped in EL2 for reading and writing. Unlike what [`Memory::donate`] takes, the host
    /// cannot have them back by itself.
    ///
    /// # Errors
    ///
    /// As [`Memory::donate`].
    pub fn keep<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.lock(machine).take(machine, range, &Step::KEEP)
    }

    /// Returns pages that were kept for a VM to the host, scrubbed. Nothing uses them any more.
    ///
    /// To return what was kept with one call is always possible.
    ///
    /// # Errors
    ///
    /// As [`Memory::take_back`]; [`Reason::Denied`] for a page that is not kept.
    pub fn give_back<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.lock(machine).take(machine, range, &Step::GIVE_BACK)
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
        let inner = self.lock(machine);
        let kept =
            pages.iter().all(|page| inner.table.entry(page).is_some_and(|entry| entry.state() == State::HYP_KEPT));
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
        let mut inner = self.lock(machine);
        let mut guest = guest.lock(machine);
        if range.base().raw() == 0 {
            // It ends the list of spare pages. What is wrong with it anyway comes first.
            inner.table.check(range, &Step::KEEP)?;
            return Err(failure(GuestReason::Denied));
        }
        inner.take(machine, range, &Step::KEEP)?;
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
        let mut inner = self.lock(machine);
        let mut tables = guest.lock(machine);
        if !tables.dying || tables.pages != 0 {
            return Err(GuestReason::Busy);
        }
        inner.drop_poison(machine, &mut tables);
        let most = most.min(MAX_STEPS);
        let mut left = most;
        while left != 0 && tables.spare.available != 0 {
            match inner.return_spare(machine, &mut tables, left) {
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

impl<P: TablePool> Inner<'_, P> {
    /// Takes poison, which is all that there is in the tables of a guest without pages, out of up to [`MAX_STEPS`] blocks of
    /// its address space.
    fn drop_poison<M: Machine>(&mut self, machine: &M, tables: &mut Guest) {
        let Guest { tables, spare, .. } = tables;
        let (mut from, end) = (0, tables.geometry().end());
        let mut flush = Flush::new();
        for _ in 0..MAX_STEPS {
            let Ok(rest) = IpaRange::from_bounds(from, end) else { break };
            let found = tables.visit(machine, rest, &mut |part, found| match found {
                // A last-level table is not empty, so its poison need not be looked for.
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

    /// Returns up to `most` spare pages to the host, as many as go together, and how many that is. They are scrubbed before
    /// any of them is unmapped, because that breaks blocks of which others are part.
    fn return_spare<M: Machine>(&mut self, machine: &M, tables: &mut Guest, most: u64) -> u64 {
        let mut pages = ArrayVec::<PhysAddr, MAX_RUNS>::new();
        let mut needed = 0_usize;
        while let Some(page) = tables.spare.peek()
            && u64::try_from(pages.len()).is_ok_and(|taken| taken < most)
            && !pages.is_full()
        {
            let more = self.el2.tables_to_unmap(machine, PhysRange::single(page).identity_va(), None);
            let total = needed.saturating_add(more);
            let available = self.pool.available().saturating_add(self.host.tables());
            if more != 0 && total.saturating_add(HOST_RESERVE) > available {
                break;
            }
            needed = total;
            if let Some(page) = tables.spare.pop(machine) {
                pages.push(page);
            }
        }
        if needed > self.pool.available() {
            self.evict_host(machine);
        }
        pages.iter().for_each(|&page| machine.scrub(PhysRange::single(page)));
        let mut flush = Flush::new();
        for &page in &pages {
            flush = self.el2.unmap(machine, &mut self.pool, PhysRange::single(page).identity_va(), flush);
        }
        self.flush_el2(machine, flush);
        let mut flush = Flush::new();
        for &page in &pages {
            flush = self.assign(machine, PhysRange::single(page), Entry::new(State::HOST_OWNED, 0), flush);
        }
        self.flush_host(machine, flush);
        u64::try_from(pages.len()).unwrap_or(most)
    }
}
