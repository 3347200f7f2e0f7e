//! Conversions in batches, and the pages of guests through which they ask for them.

use ravelin_memory::{Ipa, IpaRange, PhysAddr, PhysRange};
use ravelin_pgtable::{El2Usage, Machine, TablePool};

use super::{
    Change, MAX_STEPS,
    share::{SHARE, UNSHARE},
};
use crate::{
    HOST_RESERVE,
    entry::State,
    guest::{GuestKind, GuestMemory, View},
    locked::Locked,
    memory::Memory,
    reason::{GuestFailure, GuestReason},
};

/// Translation tables that pages which guests pin leave to all else: those of the host, and as many for its calls.
const KEPT_FROM_GUESTS: usize = 2 * HOST_RESERVE;

/// The most conversions in a batch.
pub const MAX_BATCH: usize = 64;

const PIN: Change =
    Change { view: View::Private, from: &[State::GUEST_OWNED], to: State::GUEST_PINNED, by_page: true, poison: false };
const UNPIN: Change = Change { from: &[State::GUEST_PINNED], to: State::GUEST_OWNED, ..PIN };

/// What a guest wants of some of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conversion {
    /// The pages: at most [`MAX_STEPS`], so that none is done in part.
    pub range: IpaRange,
    /// Whether they are to be offered to the host. If not, they are to be the guest's alone again.
    pub share: bool,
    /// Whether the host consents to lose pages that it has claimed.
    pub released: bool,
}

/// What has become of a batch. Bit n stands for its nth conversion; those that have neither bit are refused, and have changed
/// nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// How many were looked at, the first ones; of those that there are, at least one.
    pub seen: usize,
    /// Those that are done.
    pub done: u64,
    /// Those that the host must consent to first, because it has claimed pages of theirs. They have changed nothing.
    pub claimed: u64,
}

impl<P: TablePool> Memory<'_, P> {
    /// Makes the first of these conversions of a pKVM guest's pages, one after the other, as far as one call goes. `None` stands
    /// for one that is refused. Contents stay. One invalidation of the host's stage 2 for all of them, if it maps any of the
    /// pages. `conversions` must not call methods of this.
    pub fn guest_convert<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        conversions: &mut dyn Iterator<Item = Option<Conversion>>,
    ) -> Batch {
        let mut batch = Batch::default();
        if guest.kind() != GuestKind::Pkvm {
            return batch;
        }
        let tables = guest.lock_shared();
        let mut locked = Locked::new(self, machine);
        let mut left = MAX_STEPS;
        let bits = (0..MAX_BATCH).filter_map(|bit| 1_u64.checked_shl(u32::try_from(bit).ok()?));
        for (bit, conversion) in bits.zip(conversions) {
            let wanted = conversion.filter(|wanted| wanted.range.pages() <= MAX_STEPS);
            if let Some(Conversion { range, share, released }) = wanted {
                let change = if share { &SHARE } else { &UNSHARE };
                locked.reach_further(machine, guest, &tables, range, change.view);
                let plan = locked.plan(machine, guest, &tables, range, change);
                // What fails may have been looked at page by page before.
                let steps = plan.as_ref().map_or(range.pages(), |plan| plan.steps);
                if steps > left && batch.seen != 0 {
                    break;
                }
                left = left.saturating_sub(steps);
                match plan {
                    Ok(plan) if plan.claimed && !released => batch.claimed |= bit,
                    Ok(plan) => {
                        locked.change_state(machine, guest, &tables, &plan, change);
                        batch.done |= bit;
                    }
                    Err(_) => {}
                }
            }
            batch.seen = batch.seen.saturating_add(1);
        }
        // Whoever learns of the batch learns of it behind this.
        locked.flush_host(machine);
        batch
    }

    /// Gives the hypervisor access to a private page of a guest, which stays the guest's. Returns where it is mapped in the EL2
    /// stage 1, writable. Until [`Memory::guest_unpin`], the guest can do nothing else with it, nor can the host.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Absent`], [`GuestReason::Poisoned`], [`GuestReason::Denied`] unless the page is private,
    /// [`GuestReason::OutOfRange`], [`GuestReason::NoMemory`].
    pub fn guest_pin<M: Machine>(&self, machine: &M, guest: &GuestMemory, page: Ipa) -> Result<PhysAddr, GuestFailure> {
        let frame = IpaRange::single(page);
        let failure = |reason| GuestFailure { reason, ipa: page };
        let tables = guest.lock_shared();
        self.with(machine, tables.regions(machine, self, guest, frame, Some(PIN.view)), |locked| {
            let plan = locked.plan(machine, guest, &tables, frame, &PIN)?;
            let Some(pages) = plan.row else { return Err(failure(GuestReason::Denied)) };
            if !locked.map_pinned(machine, pages) {
                return Err(failure(GuestReason::NoMemory));
            }
            locked.set_state(machine, guest, &tables, &plan, &PIN);
            Ok(pages.base())
        })
    }

    /// Ends what [`Memory::guest_pin`] began. A guest that is dying keeps its pages pinned until [`Memory::reclaim`].
    ///
    /// # Errors
    ///
    /// [`GuestReason::Denied`] if the guest is dying or the page is not pinned.
    pub fn guest_unpin<M: Machine>(&self, machine: &M, guest: &GuestMemory, page: Ipa) -> Result<(), GuestFailure> {
        let frame = IpaRange::single(page);
        let tables = guest.lock_shared();
        let mut locked = Locked::new(self, machine);
        locked.reach(machine, guest, &tables, frame, UNPIN.view);
        let plan = locked.plan(machine, guest, &tables, frame, &UNPIN)?;
        locked.unmap_pinned(machine, plan.row.into_iter());
        locked.set_state(machine, guest, &tables, &plan, &UNPIN);
        Ok(())
    }
}

impl<P: TablePool, M: Machine> Locked<'_, '_, P, M> {
    /// Maps a page of a guest's in the EL2 stage 1, if that leaves enough tables to all else. Returns whether it is mapped.
    fn map_pinned(&mut self, machine: &M, page: PhysRange) -> bool {
        let mut needed = 0_usize;
        self.for_each_part(page, &mut |region, _, page| {
            needed = region.el2.tables_to_map(machine, page.identity_va(), page.base(), El2Usage::Data);
        });
        // No guest drops the host's mappings, nor takes what the host's own calls may need.
        let reserved = self.tables.reserve(needed, KEPT_FROM_GUESTS)
            || self.leaves_to_host(needed, KEPT_FROM_GUESTS) && self.tables.reserve(needed, 0);
        if reserved {
            self.for_each_part(page, &mut |region, tables, page| region.map_el2(machine, tables, page));
        }
        reserved
    }

    /// Takes pinned pages of guests out of the EL2 stage 1. Each is mapped by itself, so no block is cut.
    pub(super) fn unmap_pinned(&mut self, machine: &M, runs: impl Iterator<Item = PhysRange>) {
        for run in runs {
            self.for_each_part(run, &mut |region, tables, part| region.unmap_el2(machine, tables, part));
        }
        self.flush_el2(machine);
    }
}
