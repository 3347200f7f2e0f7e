//! In place between a guest and the host: share and unshare, claim and release.

use ravelin_memory::{BLOCK_SIZE, IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_pgtable::{Machine, Stage2Usage, TablePool};

use super::Change;
use crate::{
    entry::State,
    guest::{Guest, GuestMemory, View},
    memory::{Inner, Memory},
    reason::GuestFailure,
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

const SHARE: Change = Change {
    view: View::Private,
    from: &[State::GUEST_OWNED],
    to: State::GUEST_OFFERED,
    by_page: false,
    poison: false,
};
const UNSHARE: Change = Change {
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
        let mut inner = self.lock(machine);
        let mut tables = guest.lock(machine);
        let plan = inner.plan(machine, guest, &tables, range, &SHARE)?;
        inner.convert(machine, guest, &mut tables, plan.frames, &SHARE)?;
        Ok(plan.frames.pages())
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
        let mut inner = self.lock(machine);
        let mut tables = guest.lock(machine);
        let plan = inner.plan(machine, guest, &tables, range, &UNSHARE)?;
        if plan.claimed {
            return Ok(Unshare::NeedsRelease(plan.frames));
        }
        inner.convert(machine, guest, &mut tables, plan.frames, &UNSHARE)?;
        Ok(Unshare::Done(plan.frames.pages()))
    }

    /// Gives the host access to pages that a guest has offered. No TLB maintenance.
    ///
    /// # Errors
    ///
    /// [`crate::GuestReason::NotOffered`] for private pages, [`crate::GuestReason::Denied`] for others that are not offered,
    /// [`crate::GuestReason::Absent`], [`crate::GuestReason::Poisoned`], [`crate::GuestReason::OutOfRange`], [`crate::GuestReason::TooLarge`].
    pub fn claim<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> Result<(), GuestFailure> {
        let mut inner = self.lock(machine);
        let tables = guest.lock(machine);
        let plan = inner.plan_all(machine, guest, &tables, range, &CLAIM)?;
        inner.set_state(machine, guest, &tables, plan.frames, &CLAIM);
        Ok(())
    }

    /// Ends the host's access to pages that it has claimed; they stay offered. One invalidation of the host's stage 2 if it
    /// maps any of them.
    ///
    /// # Errors
    ///
    /// As [`Memory::claim`], with [`crate::GuestReason::Denied`] for pages that are not claimed.
    pub fn release<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> Result<(), GuestFailure> {
        let mut inner = self.lock(machine);
        let tables = guest.lock(machine);
        let plan = inner.plan_all(machine, guest, &tables, range, &RELEASE)?;
        inner.set_state(machine, guest, &tables, plan.frames, &RELEASE);
        Ok(())
    }
}

impl<P: TablePool> Inner<'_, P> {
    /// Makes a change between private and offered, which has been planned. A realm's pages move to the other view.
    fn convert<M: Machine>(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &mut Guest,
        frames: IpaRange,
        change: &Change,
    ) -> Result<(), GuestFailure> {
        let Some(other) = guest.other(change.view) else {
            self.set_state(machine, guest, tables, frames, change);
            return Ok(());
        };
        let (from, to) = (guest.in_view(change.view, frames), guest.in_view(other, frames));
        let needed = tables.tables_to_move(machine, from, to);
        tables.have(needed).map_err(|reason| GuestFailure { reason, ipa: frames.base() })?;
        self.set_state(machine, guest, tables, frames, change);
        tables.for_each_leaf_moved(machine, from, to, &mut |tables, part, pages| {
            let Guest { tables, spare, .. } = tables;
            let done = tables.map(machine, &mut spare.pool(machine), part, pages.base(), Stage2Usage::Memory);
            debug_assert_eq!(done, Ok(()));
        });
        self.unmap_guest(machine, tables, from);
        Ok(())
    }
}

impl Guest {
    /// Calls `f` with each part of `to` and the pages that are mapped at the same place of `from`.
    fn for_each_leaf_moved<M: Machine>(
        &mut self,
        machine: &M,
        from: IpaRange,
        to: IpaRange,
        f: &mut dyn FnMut(&mut Self, IpaRange, PhysRange),
    ) {
        let mut done = 0_u64;
        while done < from.size() {
            let Some(at) = from.base().checked_add(done) else { return };
            let walk = self.tables.lookup(machine, at);
            let size = walk.level.size();
            let rest = size.wrapping_sub(at.raw() & size.wrapping_sub(1)).min(from.size().wrapping_sub(done));
            if let (Some(mapping), Ok(part), Some(end)) = (
                walk.mapping,
                IpaRange::new(to.base().raw().wrapping_add(done), rest / PAGE_SIZE),
                walk.mapping.and_then(|mapping| mapping.to.raw().checked_add(rest)),
            ) && let Ok(pages) = PhysRange::from_bounds(mapping.to.raw(), end)
            {
                f(self, part, pages);
            }
            done = done.saturating_add(rest);
        }
    }

    /// Returns how many tables it takes to map blocks at `range`, and none larger than that.
    fn tables_for_blocks<M: Machine>(&self, machine: &M, range: Option<IpaRange>) -> usize {
        let Some(range) = range else { return 0 };
        let next_block = PhysAddr::from_bits_truncating(range.base().raw().wrapping_add(BLOCK_SIZE));
        self.tables.tables_to_map(machine, range, next_block, Stage2Usage::Memory)
    }

    /// Returns a number of tables that is enough to map at `to` what is mapped at `from`, and to unmap it there.
    fn tables_to_move<M: Machine>(&mut self, machine: &M, from: IpaRange, to: IpaRange) -> usize {
        let (mut by_leaf, mut blocks) = (0_usize, None::<IpaRange>);
        self.for_each_leaf_moved(machine, from, to, &mut |guest, part, pages| {
            if part.size() == BLOCK_SIZE {
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
        // Tables that neighbours have in common may have been counted more than once; as pages, there are no more than this.
        let unaligned =
            PhysAddr::from_bits_truncating(PAGE_SIZE.wrapping_add(to.base().raw() & BLOCK_SIZE.wrapping_sub(1)));
        let by_page = self.tables.tables_to_map(machine, to, unaligned, Stage2Usage::Memory);
        by_leaf.min(by_page).saturating_add(self.tables.tables_to_unmap(machine, from, None))
    }
}
