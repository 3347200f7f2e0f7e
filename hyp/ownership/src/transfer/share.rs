//! In place between a guest and the host: share and unshare, claim and release.

use core::ops::ControlFlow;

use arrayvec::ArrayVec;
use ravelin_memory::{BLOCK_SIZE, IpaRange, Level, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_pgtable::{Flush, Machine, Stage2Usage, TablePool};

use super::{Change, Plan, look::Place};
use crate::{
    entry::{Entry, State},
    guest::{Blocks, Guest, GuestKind, GuestMemory, View},
    locked::Locked,
    memory::Memory,
    reason::{GuestFailure, GuestReason},
};

/// What became of an unshare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unshare {
    /// So many pages, the first of the range, are the guest's alone again.
    Done(u64),
    /// Nothing has changed: the host has claimed pages of this range, the first part of the one asked for, and must release
    /// them first.
    NeedsRelease(IpaRange),
}

pub(super) const SHARE: Change = Change {
    view: View::Private,
    from: &[State::GUEST_OWNED],
    to: State::GUEST_OFFERED,
    by_page: false,
    poison: false,
};
pub(super) const UNSHARE: Change = Change {
    view: View::Shared,
    from: &[State::GUEST_OFFERED, State::GUEST_CLAIMED],
    to: State::GUEST_OWNED,
    by_page: false,
    poison: false,
};
const CLAIM: Change = Change {
    view: View::Shared,
    from: &[State::GUEST_OFFERED],
    to: State::GUEST_CLAIMED,
    by_page: false,
    poison: false,
};
const RELEASE: Change = Change {
    view: View::Shared,
    from: &[State::GUEST_CLAIMED],
    to: State::GUEST_OFFERED,
    by_page: false,
    poison: false,
};

impl<P: TablePool> Memory<'_, P> {
    /// Offers pages of a guest to the host: the first pages of `range`. Returns how many. The host has no access yet; contents
    /// stay. No TLB maintenance, but for a realm, whose pages move to the alias.
    ///
    /// # Errors
    ///
    /// [`crate::GuestReason::Absent`], [`crate::GuestReason::Poisoned`], [`crate::GuestReason::Denied`] for pages that are not private,
    /// [`crate::GuestReason::OutOfRange`]; [`crate::GuestReason::NeedsTables`] for a realm.
    pub fn guest_share<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
    ) -> Result<u64, GuestFailure> {
        Ok(self.convert(machine, guest, range, &SHARE)?.frames.pages())
    }

    /// Makes pages that a guest has offered its own alone again: the first pages of `range`, at once, unless the host has
    /// claimed any of them. Contents stay. No TLB maintenance, but for a realm.
    ///
    /// # Errors
    ///
    /// As [`Memory::guest_share`], with [`crate::GuestReason::Denied`] for pages that are not shared.
    pub fn guest_unshare<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
    ) -> Result<Unshare, GuestFailure> {
        let plan = self.convert(machine, guest, range, &UNSHARE)?;
        Ok(if plan.claimed { Unshare::NeedsRelease(plan.frames) } else { Unshare::Done(plan.frames.pages()) })
    }

    /// Does with few instructions what most calls of pKVM guests are about, a page or a block: offers it to the host (`share`), as
    /// [`Memory::guest_share`], or makes it the guest's alone again, as [`Memory::guest_unshare`]. Returns whether it has. If not,
    /// nothing has changed, and they do more or say why.
    pub fn guest_exchange<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange, share: bool) -> bool {
        let (before, change) = if share { (State::GUEST_OWNED, &SHARE) } else { (State::GUEST_OFFERED, &UNSHARE) };
        guest.kind() == GuestKind::Pkvm && self.exchange(machine, guest, &guest.lock_shared(), range, before, change)
    }

    /// Gives the host access to pages that a guest has offered. No TLB maintenance.
    ///
    /// # Errors
    ///
    /// [`crate::GuestReason::NotOffered`] for private pages, [`crate::GuestReason::Denied`] for others that are not offered,
    /// [`crate::GuestReason::Absent`], [`crate::GuestReason::Poisoned`], [`crate::GuestReason::OutOfRange`], [`crate::GuestReason::TooLarge`].
    pub fn claim<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> Result<(), GuestFailure> {
        let tables = guest.lock_shared();
        // A page that is on its way to the shared half of a realm is offered already, but may be in TLBs where it was.
        let mut blocks = Blocks::new_const();
        guest.lock_blocks(machine, range, &mut blocks);
        if self.try_exchange(machine, guest, &tables, range, State::GUEST_OFFERED, &CLAIM) {
            return Ok(());
        }
        self.change(machine, guest, &tables, range, &CLAIM, true)?;
        Ok(())
    }

    /// Ends the host's access to pages that it has claimed; they stay offered. One invalidation of the host's stage 2 if it
    /// maps any of them.
    ///
    /// # Errors
    ///
    /// As [`Memory::claim`], with [`crate::GuestReason::Denied`] for pages that are not claimed.
    pub fn release<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> Result<(), GuestFailure> {
        // What is claimed stays where it is.
        self.change(machine, guest, &guest.lock_shared(), range, &RELEASE, true)?;
        Ok(())
    }
}

impl<P: TablePool> Memory<'_, P> {
    /// Gives one page in a block that is split, or a block that the guest maps as one, the state after `change`, if it is in `before`.
    /// Returns whether it was; if not, nothing has changed. The guest's tables are as they were.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "as short as can be, for what most calls of guests are about")]
    fn exchange<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        range: IpaRange,
        before: State,
        change: &Change,
    ) -> bool {
        let is_page = range.pages() == 1;
        if !is_page && range.size() != BLOCK_SIZE || range.end() > guest.end() {
            return false;
        }
        let walk = tables.tables.lookup(machine, guest.address_in(change.view, range.base()));
        if tables.dying || !is_page && walk.level != Level::L2 {
            return false;
        }
        let pages = match walk.output() {
            Some(page) if is_page => Some(PhysRange::single(page)),
            Some(block) => PhysRange::new(block.raw(), range.pages()).ok(),
            None => None,
        };
        let Some((pages, region)) = pages.and_then(|pages| Some((pages, self.region(self.index_of(pages.base()))?)))
        else {
            return false;
        };
        let entry = |state| Entry::of_guest(state, guest.slot(), range.base().page_number());
        let mut region = region.lock();
        let done = region.table.exchange(pages, entry(before), entry(change.to));
        if done {
            region.counts.moved(before, change.to, pages.pages());
            region.counts.stage2_invalidations =
                region.counts.stage2_invalidations.wrapping_add(u64::from(change.moves_to(guest).is_some()));
        }
        done
    }

    /// As [`Memory::exchange`], in one place for those whose way is longer anyway: not each is worth a copy of it.
    #[inline(never)]
    fn try_exchange<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        range: IpaRange,
        before: State,
        change: &Change,
    ) -> bool {
        self.exchange(machine, guest, tables, range, before, change)
    }

    /// Converts the first pages of `range`, unless the host has claimed any of them. Returns which.
    fn convert<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
        change: &Change,
    ) -> Result<Plan, GuestFailure> {
        match change.moves_to(guest) {
            None => self.change(machine, guest, &guest.lock_shared(), range, change, false),
            Some(view) => match self.convert_in_block(machine, guest, range, change, view) {
                Some(done) => done,
                None => self.convert_and_move(machine, guest, range, change, view),
            },
        }
    }

    /// As [`Memory::convert`], for pages that move to the view `to`, if they are in one block and there are tables for both of its
    /// views. CPUs that work in other blocks need not wait for this. A table that is left with nothing in it stays: pages that were
    /// converted will be again.
    #[inline(never)]
    fn convert_in_block<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
        change: &Change,
        to: View,
    ) -> Option<Result<Plan, GuestFailure>> {
        let tables = guest.lock_shared();
        let leaves = |view| tables.tables.leaves(machine, guest.in_view(view, range));
        // The first time it is the second table that is missing.
        let (to, from) = (leaves(to)?, leaves(change.view)?);
        let _block = guest.lock_block(machine, range.base());
        let before = change.from.first().filter(|_| range.pages() == 1);
        let done = if before.is_some_and(|&before| self.try_exchange(machine, guest, &tables, range, before, change)) {
            Plan { frames: range, row: None, claimed: false, steps: 1 }
        } else {
            match self.change(machine, guest, &tables, range, change, true) {
                Ok(plan) if !plan.claimed => plan,
                other => return Some(other),
            }
        };
        guest.announce_block(machine, range);
        tables.tables.move_leaves(machine, from, to);
        Some(Ok(done))
    }

    /// As [`Memory::convert`], for pages that move to the view `to`.
    #[inline(never)]
    fn convert_and_move<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
        change: &Change,
        to: View,
    ) -> Result<Plan, GuestFailure> {
        let mut tables = guest.lock(machine);
        let mut locked = Locked::new(self, machine);
        locked.reach(machine, guest, &tables, range, change.view);
        let plan = locked.plan(machine, guest, &tables, range, change)?;
        if !plan.claimed {
            let (from, to) = (guest.in_view(change.view, plan.frames), guest.in_view(to, plan.frames));
            tables
                .have_to_move(machine, from, to)
                .map_err(|reason| GuestFailure { reason, ipa: plan.frames.base() })?;
            locked.count_stage2_invalidation();
            locked.set_state(machine, guest, &tables, &plan, change);
            locked.release();
            tables.follow(machine, from, to);
        }
        Ok(plan)
    }

    /// Makes a change of the first pages of `range` or, if `all` is set, of all or none, unless the host has claimed some that the guest
    /// wants back. The guest's tables are as they were. Returns which pages.
    #[inline(never)]
    fn change<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        range: IpaRange,
        change: &Change,
        all: bool,
    ) -> Result<Plan, GuestFailure> {
        let mut locked = Locked::new(self, machine);
        locked.reach(machine, guest, tables, range, change.view);
        let plan = if all {
            locked.plan_all(machine, guest, tables, range, change)?
        } else {
            locked.plan(machine, guest, tables, range, change)?
        };
        if !plan.claimed || change.to != State::GUEST_OWNED {
            if change.moves_to(guest).is_some() {
                locked.count_stage2_invalidation();
            }
            locked.set_state(machine, guest, tables, &plan, change);
        }
        Ok(plan)
    }
}

impl Guest {
    /// Moves the pages at `from` to `to`, the other view of them, for which there are tables. One invalidation.
    ///
    /// This takes the lock of the guest alone: it is about nothing but its tables, and whatever else is done to the pages takes
    /// this lock, too. Others need not wait until all CPUs have answered to the invalidation.
    fn follow<M: Machine>(&mut self, machine: &M, from: IpaRange, to: IpaRange) {
        self.for_each_part_moved(machine, from, to, &mut |guest, part, pages| {
            let Self { tables, spare, .. } = guest;
            let done = tables.map(machine, &mut spare.pool(machine), part, pages.base(), Stage2Usage::Memory);
            debug_assert_eq!(done, Ok(()));
        });
        let Self { tables, spare, .. } = self;
        let flush = tables.vacate(machine, &mut spare.pool(machine), from, Flush::new());
        let flushed = tables.flush(machine, &mut spare.pool(machine), flush);
        debug_assert!(flushed, "a page has moved");
    }

    /// Calls `f` with parts of `to` and the pages that are mapped at the same place of `from`.
    fn for_each_part_moved<M: Machine>(
        &mut self,
        machine: &M,
        from: IpaRange,
        to: IpaRange,
        f: &mut dyn FnMut(&mut Self, IpaRange, PhysRange),
    ) {
        let offset = to.base().raw().wrapping_sub(from.base().raw());
        let mut rest = Some(from);
        while let Some(range) = rest.take() {
            // What `f` does must not change what is being looked at.
            let mut parts = ArrayVec::<(IpaRange, PhysRange), 8>::new();
            let full = self.visit(machine, range, &mut |part, place| {
                let Place::Pages { pages, .. } = place else { return ControlFlow::Continue(()) };
                match IpaRange::new(part.base().raw().wrapping_add(offset), part.pages()) {
                    Ok(there) if parts.try_push((there, pages)).is_err() => ControlFlow::Break(part.base()),
                    _ => ControlFlow::Continue(()),
                }
            });
            parts.iter().for_each(|&(part, pages)| f(self, part, pages));
            rest = full.break_value().and_then(|next| IpaRange::from_bounds(next.raw(), from.end()).ok());
        }
    }

    /// Returns how many tables it takes to map blocks at `range`, and none larger than that.
    fn tables_for_blocks<M: Machine>(&self, machine: &M, range: Option<IpaRange>) -> usize {
        let Some(range) = range else { return 0 };
        let next_block = PhysAddr::from_bits_truncating(range.base().raw().wrapping_add(BLOCK_SIZE));
        self.tables.tables_to_map(machine, range, next_block, Stage2Usage::Memory)
    }

    /// Makes sure that there are tables to map at `to` what is mapped at `from`, and to unmap it there.
    fn have_to_move<M: Machine>(&mut self, machine: &M, from: IpaRange, to: IpaRange) -> Result<(), GuestReason> {
        let (mut by_leaf, mut blocks) = (0_usize, None::<IpaRange>);
        self.for_each_part_moved(machine, from, to, &mut |guest, part, pages| {
            // Pages that fill a table make a block if they lie as one.
            if part.size() == BLOCK_SIZE && pages.base().is_aligned(BLOCK_SIZE) {
                // Blocks in a row have tables in common.
                let row = blocks.filter(|row| row.end() == part.base().raw());
                let longer = row.and_then(|row| IpaRange::from_bounds(row.base().raw(), part.end()).ok());
                if longer.is_none() {
                    by_leaf = by_leaf.saturating_add(guest.tables_for_blocks(machine, blocks));
                }
                blocks = Some(longer.unwrap_or(part));
            } else {
                let needed = guest.tables.tables_to_map(machine, part, pages.base(), Stage2Usage::Memory);
                by_leaf = by_leaf.saturating_add(needed);
            }
        });
        by_leaf = by_leaf.saturating_add(self.tables_for_blocks(machine, blocks));
        let to_unmap = self.tables.tables_to_unmap(machine, from, None);
        if self.have(by_leaf.saturating_add(to_unmap)).is_ok() {
            return Ok(());
        }
        // Tables that neighbours have in common may have been counted more than once; as pages, there are no more than this.
        let unaligned =
            PhysAddr::from_bits_truncating(PAGE_SIZE.wrapping_add(to.base().raw() & BLOCK_SIZE.wrapping_sub(1)));
        let by_page = self.tables.tables_to_map(machine, to, unaligned, Stage2Usage::Memory);
        self.have(by_leaf.min(by_page).saturating_add(to_unmap))
    }
}
