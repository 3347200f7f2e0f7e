//! Conversions in batches, and the pages of guests through which they ask for them.

use ravelin_memory::{Ipa, IpaRange, PhysAddr, PhysRange};
use ravelin_pgtable::{El2Usage, Flush, Machine, TablePool};

use super::{
    Change, MAX_STEPS,
    share::{SHARE, UNSHARE},
};
use crate::{
    HOST_RESERVE,
    entry::State,
    guest::{GuestKind, GuestMemory, View},
    memory::{Inner, Memory},
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
        let mut inner = self.lock(machine);
        let tables = guest.lock(machine);
        let (mut flush, mut left) = (Flush::new(), MAX_STEPS);
        let bits = (0..MAX_BATCH).filter_map(|bit| 1_u64.checked_shl(u32::try_from(bit).ok()?));
        for (bit, conversion) in bits.zip(conversions) {
            let wanted = conversion.filter(|wanted| wanted.range.pages() <= MAX_STEPS);
            if let Some(Conversion { range, share, released }) = wanted {
                let change = if share { &SHARE } else { &UNSHARE };
                let plan = inner.plan(machine, guest, &tables, range, change);
                // What fails may have been looked at page by page before.
                let steps = plan.as_ref().map_or(range.pages(), |plan| plan.steps);
                if steps > left && batch.seen != 0 {
                    break;
                }
                left = left.saturating_sub(steps);
                match plan {
                    Ok(plan) if plan.claimed && !released => batch.claimed |= bit,
                    Ok(plan) => {
                        flush = inner.change_state(machine, guest, &tables, &plan, change, flush);
                        batch.done |= bit;
                    }
                    Err(_) => {}
                }
            }
            batch.seen = batch.seen.saturating_add(1);
        }
        // Whoever learns of the batch learns of it behind this.
        inner.flush_host(machine, flush);
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
        let mut inner = self.lock(machine);
        let tables = guest.lock(machine);
        let plan = inner.plan(machine, guest, &tables, IpaRange::single(page), &PIN)?;
        let failure = |reason| GuestFailure { reason, ipa: page };
        let Some(pages) = plan.row else { return Err(failure(GuestReason::Denied)) };
        let needed = inner.el2.tables_to_map(machine, pages.identity_va(), pages.base(), El2Usage::Data);
        let (free, evictable) = (inner.pool.available(), inner.host.tables());
        // No guest drops the host's mappings, nor takes what the host's own calls may need.
        if needed > free || needed.saturating_add(KEPT_FROM_GUESTS) > free.saturating_add(evictable) {
            return Err(failure(GuestReason::NoMemory));
        }
        let Inner { el2, pool, .. } = &mut *inner;
        let mapped = el2.map(machine, pool, pages.identity_va(), pages.base(), El2Usage::Data);
        debug_assert_eq!(mapped, Ok(()));
        inner.set_state(machine, guest, &tables, &plan, &PIN);
        Ok(pages.base())
    }

    /// Ends what [`Memory::guest_pin`] began. A guest that is dying keeps its pages pinned until [`Memory::reclaim`].
    ///
    /// # Errors
    ///
    /// [`GuestReason::Denied`] if the guest is dying or the page is not pinned.
    pub fn guest_unpin<M: Machine>(&self, machine: &M, guest: &GuestMemory, page: Ipa) -> Result<(), GuestFailure> {
        let mut inner = self.lock(machine);
        let tables = guest.lock(machine);
        let plan = inner.plan(machine, guest, &tables, IpaRange::single(page), &UNPIN)?;
        inner.unmap_pinned(machine, plan.row.into_iter());
        inner.set_state(machine, guest, &tables, &plan, &UNPIN);
        Ok(())
    }
}

impl<P: TablePool> Inner<'_, P> {
    /// Takes pinned pages of guests out of the EL2 stage 1. Each is mapped by itself, so no block is cut.
    pub(super) fn unmap_pinned<M: Machine>(&mut self, machine: &M, runs: impl Iterator<Item = PhysRange>) {
        let mut flush = Flush::new();
        for run in runs {
            flush = self.el2.unmap(machine, &mut self.pool, run.identity_va(), flush);
        }
        self.flush_el2(machine, flush);
    }
}
