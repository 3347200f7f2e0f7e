//! From a guest back to the host.

use core::ops::ControlFlow;

use ravelin_memory::{IpaRange, PhysRange};
use ravelin_pgtable::{Flush, Machine, TablePool};

use super::{
    Change, MAX_STEPS, address,
    look::{Run, Runs},
};
use crate::{
    entry::{Entry, State},
    guest::{Guest, GuestMemory, View, first_pages},
    locked::Locked,
    memory::Memory,
    reason::{GuestFailure, GuestReason, HostFailure},
};

const UNLEND: Change =
    Change { view: View::Private, from: &[State::HOST_LENT], to: State::HOST_OWNED, by_page: false, poison: false };
const RELINQUISH: Change =
    Change { view: View::Private, from: &[State::GUEST_OWNED], to: State::HOST_OWNED, by_page: true, poison: true };

impl<P: TablePool> Memory<'_, P> {
    /// Ends what [`Gift::Lent`](crate::Gift::Lent) began. One invalidation of the guest's stage 2.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Denied`] for a page that is not lent, [`GuestReason::Absent`], [`GuestReason::TooLarge`],
    /// [`GuestReason::NeedsTables`] to cut a block.
    pub fn unlend<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> Result<(), GuestFailure> {
        let mut tables = guest.lock(machine);
        let mut locked = Locked::new(self, machine);
        locked.reach(machine, guest, &tables, range, UNLEND.view);
        let plan = locked.plan_all(machine, guest, &tables, range, &UNLEND)?;
        tables.have_for_cut(machine, plan.frames)?;
        locked.set_state(machine, guest, &tables, &plan, &UNLEND);
        locked.unmap_guest(machine, &mut tables, plan.frames);
        tables.pages = tables.pages.saturating_sub(plan.frames.pages());
        Ok(())
    }

    /// Empties frames of a guest, the first ones of `range`, and returns how many. Private pages go to the host, scrubbed, with one
    /// invalidation of the guest's stage 2. Poisoned frames lose their poison, which takes no invalidation: the guest knows that
    /// it has lost what was there, and the host may put another page in their place.
    ///
    /// # Errors
    ///
    /// As [`Memory::guest_share`], but for [`GuestReason::Poisoned`]; [`GuestReason::NeedsTables`] to cut a block, mapped or poisoned;
    /// [`GuestReason::NoMemory`].
    pub fn guest_relinquish<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
    ) -> Result<u64, GuestFailure> {
        let mut tables = guest.lock(machine);
        self.with(machine, tables.regions(machine, self, guest, range, Some(RELINQUISH.view)), |locked| {
            let plan = locked.plan(machine, guest, &tables, range, &RELINQUISH)?;
            locked.empty(machine, guest, &mut tables, plan.frames, View::Private)
        })
    }

    /// Takes pages that the host has no access to, private or offered, from a living guest and returns them to the host, scrubbed.
    /// Their frames are poisoned. One invalidation of the guest's stage 2.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Denied`] for a page that is not this guest's, or claimed; [`GuestReason::TooLarge`];
    /// [`GuestReason::NeedsTables`] to cut a block; [`GuestReason::NoMemory`].
    pub fn force_reclaim<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: PhysRange,
    ) -> Result<(), HostFailure> {
        let refuse = |reason| Err(HostFailure { reason, page: range.base() });
        let mut tables = guest.lock(machine);
        if range.pages() > MAX_STEPS {
            return refuse(GuestReason::TooLarge);
        }
        if tables.dying {
            return refuse(GuestReason::Denied);
        }
        self.with(machine, self.mask(range), |locked| locked.force_reclaim(machine, guest, &mut tables, range))
    }

    /// Returns pages of a dying guest to the host, scrubbed if they were private: those in the first frames of `range`. Returns
    /// how many frames that is, without page or with. One invalidation of the guest's stage 2; for a realm two.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Denied`] if the guest is not dying; [`GuestReason::OutOfRange`]; [`GuestReason::NeedsTables`] to cut a
    /// block; [`GuestReason::NoMemory`].
    pub fn reclaim<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> Result<u64, GuestFailure> {
        let failure = |reason| GuestFailure { reason, ipa: range.base() };
        let mut tables = guest.lock(machine);
        if !tables.dying {
            return Err(failure(GuestReason::Denied));
        }
        if range.end() > guest.end() {
            return Err(failure(GuestReason::OutOfRange));
        }
        self.with(machine, tables.regions(machine, self, guest, range, None), |locked| {
            locked.reclaim(machine, guest, &mut tables, range)
        })
    }
}

impl<P: TablePool, M: Machine> Locked<'_, '_, P, M> {
    fn reclaim(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &mut Guest,
        range: IpaRange,
    ) -> Result<u64, GuestFailure> {
        let views = || [Some(View::Private), guest.other(View::Private)].into_iter().flatten();
        // As many frames as one call does in both halves of a realm.
        let mut frames = range;
        for view in views() {
            let done = self.runs(machine, guest, tables, frames, view, &mut Runs::new());
            let Some(first) = first_pages(frames, done) else { return Ok(0) };
            frames = first;
        }
        let mut needed = 0_usize;
        for view in views() {
            let mapped = guest.in_view(view, frames);
            needed = needed.saturating_add(tables.tables.tables_to_unmap(machine, mapped, None));
        }
        tables.have(needed).map_err(|reason| GuestFailure { reason, ipa: range.base() })?;
        // So only the first of the two can fail.
        for view in views() {
            let done = self.empty(machine, guest, tables, frames, view)?;
            debug_assert_eq!(done, frames.pages());
        }
        Ok(frames.pages())
    }

    /// Returns the pages in the first of `frames` to the host, and how many frames that is. Once the guest can no longer write
    /// to them, private ones are scrubbed, and others cleaned, so that the host sees what a guest without caches has written.
    pub(super) fn empty(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &mut Guest,
        frames: IpaRange,
        view: View,
    ) -> Result<u64, GuestFailure> {
        let mut runs = Runs::new();
        let done = self.runs(machine, guest, tables, frames, view, &mut runs);
        let Some(frames) = first_pages(frames, done) else {
            return Ok(0);
        };
        let mapped = guest.in_view(view, frames);
        tables.have_for_cut(machine, mapped).map_err(|failure| GuestFailure { ipa: frames.base(), ..failure })?;
        if !self.reserve_transient(machine) {
            return Err(GuestFailure { reason: GuestReason::NoMemory, ipa: frames.base() });
        }
        self.unmap_guest(machine, tables, mapped);
        self.unmap_pinned(machine, runs.iter().filter(|run| run.pinned).map(|run| run.pages));
        self.clean_or_scrub(machine, &runs);
        for run in &runs {
            self.assign(machine, run.pages, Entry::new(State::HOST_OWNED, 0));
            tables.pages = tables.pages.saturating_sub(run.pages.pages());
        }
        self.flush_host(machine);
        Ok(done)
    }

    fn force_reclaim(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &mut Guest,
        range: PhysRange,
    ) -> Result<(), HostFailure> {
        let failure = |reason, page| HostFailure { reason, page };
        let refuse = |reason| Err(failure(reason, range.base()));
        let (mut needed, mut last) = (0_usize, None::<IpaRange>);
        // Where a run is mapped, which then is poisoned.
        let mapped = |entry: Option<Entry>, run: PhysRange| {
            let entry = entry?;
            let view = match entry.state() {
                State::GUEST_OWNED => View::Private,
                State::GUEST_OFFERED => View::Shared,
                _ => return None,
            };
            let (_, frame) = entry.guest().filter(|&(slot, _)| slot == guest.slot())?;
            Some(guest.in_view(view, IpaRange::new(address(frame)?.raw(), run.pages()).ok()?))
        };
        let checked = self.visit(range, &mut |run, entry, _| match mapped(entry, run) {
            Some(mapped) => {
                // A block of the guest's is contiguous memory, so it is cut by runs in a row only: private and offered ones.
                let before = last.filter(|last| last.end() == mapped.base().raw()).map(|last| last.base());
                needed = needed.saturating_add(tables.tables.tables_to_unmap(machine, mapped, before));
                last = Some(mapped);
                ControlFlow::Continue(())
            }
            None => {
                let reason = if entry.is_some() { GuestReason::Denied } else { GuestReason::NotRam };
                ControlFlow::Break(failure(reason, run.base()))
            }
        });
        if let ControlFlow::Break(failure) = checked {
            return Err(failure);
        }
        tables.have(needed).or_else(refuse)?;
        if !self.reserve_transient(machine) {
            return refuse(GuestReason::NoMemory);
        }
        let mut flush = Flush::new();
        let Guest { tables, spare, pages, .. } = tables;
        let _: ControlFlow<()> = self.visit(range, &mut |run, entry, _| {
            if let Some(mapped) = mapped(entry, run) {
                flush = tables.poison(machine, &mut spare.pool(machine), mapped, core::mem::take(&mut flush));
            }
            ControlFlow::Continue(())
        });
        self.flush_guest(machine, tables, &mut spare.pool(machine), flush);
        self.clean_or_scrub(machine, &[Run { pages: range, scrub: true, pinned: false }]);
        self.assign(machine, range, Entry::new(State::HOST_OWNED, 0));
        self.flush_host(machine);
        *pages = pages.saturating_sub(range.pages());
        Ok(())
    }
}
