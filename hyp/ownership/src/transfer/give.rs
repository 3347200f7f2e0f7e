//! From the host to a guest: donation and lending.

use core::ops::ControlFlow;

use ravelin_memory::{BLOCK_SIZE, Ipa, IpaRange, PhysRange};
use ravelin_pgtable::{Machine, Stage2Usage, TablePool};

use super::{
    MAX_STEPS,
    look::{Place, Run},
};
use crate::{
    entry::{Entry, State},
    guest::{Guest, GuestKind, GuestMemory, View, frame_number},
    locked::Locked,
    memory::Memory,
    reason::{GuestReason, HostFailure},
};

/// Pages that are cleaned within one step. They are cleaned under the lock and with interrupts masked, so that blocks cannot
/// count as little here as elsewhere.
const CLEANED_IN_A_STEP: u64 = 16;

/// How pages of the host come to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gift {
    /// To an ordinary guest, which borrows them. The host keeps its access.
    Lent,
    /// To a protected guest, whose own they are from then on.
    Donated,
    /// As [`Gift::Donated`], to a guest that does not run before all of the pages have been read by means of
    /// [`Memory::with_guest_pages`], which cleans them: so EL2 maps them once and not twice.
    ToMeasure,
}

impl Gift {
    const fn state(self) -> State {
        match self {
            Self::Lent => State::HOST_LENT,
            Self::Donated | Self::ToMeasure => State::GUEST_OWNED,
        }
    }
}

impl<P: TablePool> Memory<'_, P> {
    /// Gives pages of the host to a guest, at `at` and with their contents. One invalidation of the host's stage 2 if it loses them.
    ///
    /// # Errors
    ///
    /// See [`GuestReason`]: the host owns the pages alone, and the guest, which is of the kind that the gift is for, has nothing in
    /// the frames. [`GuestReason::TooLarge`] beyond [`MAX_STEPS`], of which a block takes 32, because it is cleaned to the point of
    /// coherency.
    pub fn give<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: PhysRange,
        at: Ipa,
        gift: Gift,
    ) -> Result<(), HostFailure> {
        let mut tables = guest.lock(machine);
        self.with(machine, self.mask(range), |locked| locked.give(machine, guest, &mut tables, range, at, gift))
    }
}

impl<P: TablePool, M: Machine> Locked<'_, '_, P, M> {
    fn give(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &mut Guest,
        range: PhysRange,
        at: Ipa,
        gift: Gift,
    ) -> Result<(), HostFailure> {
        let failure = |reason, page| HostFailure { reason, page };
        let refuse = |reason| Err(failure(reason, range.base()));
        if tables.dying || (guest.kind() == GuestKind::Ordinary) != (gift == Gift::Lent) {
            return refuse(GuestReason::Denied);
        }
        let frames = match IpaRange::new(at.raw(), range.pages()) {
            Ok(frames) if frames.end() <= guest.end() => frames,
            _ => return refuse(GuestReason::OutOfRange),
        };
        // The host's side.
        let aligned = range.base().raw().wrapping_sub(at.raw()) & BLOCK_SIZE.wrapping_sub(1) == 0;
        let mut left = MAX_STEPS;
        let checked = self.visit(range, &mut |run, entry, steps| {
            let steps = if aligned { steps.max(run.pages() / CLEANED_IN_A_STEP) } else { run.pages() };
            let reason = match entry {
                None => GuestReason::NotRam,
                Some(entry) if entry != Entry::new(State::HOST_OWNED, 0) => GuestReason::Denied,
                Some(_) => match left.checked_sub(steps) {
                    Some(rest) => {
                        left = rest;
                        return ControlFlow::Continue(());
                    }
                    None => GuestReason::TooLarge,
                },
            };
            ControlFlow::Break(failure(reason, run.base()))
        });
        if let ControlFlow::Break(failure) = checked {
            let page = if failure.reason == GuestReason::TooLarge { range.base() } else { failure.page };
            return Err(HostFailure { page, ..failure });
        }
        // The guest's side.
        let mut first = None;
        for view in [Some(View::Private), guest.other(View::Private)].into_iter().flatten() {
            let mapped = guest.in_view(view, frames);
            let taken = tables.visit(machine, mapped, &mut |part, place| {
                let reason = match place {
                    Place::Absent { .. } => return ControlFlow::Continue(()),
                    Place::Poisoned => GuestReason::Poisoned,
                    Place::Pages { .. } => GuestReason::Exists,
                };
                ControlFlow::Break((part.base().raw().wrapping_sub(mapped.base().raw()), reason))
            });
            first = first.into_iter().chain(taken.break_value()).min_by_key(|&(behind, _)| behind);
        }
        if let Some((behind, reason)) = first {
            return Err(failure(reason, range.base().checked_add(behind).unwrap_or(range.base())));
        }
        let needed = tables.tables.tables_to_map(machine, frames, range.base(), Stage2Usage::Memory);
        tables.have(needed).or_else(refuse)?;
        if !self.reserve_transient(machine) {
            return refuse(GuestReason::NoMemory);
        }
        // Nothing fails from here on.
        let to = gift.state();
        if !to.host_access() {
            self.unmap_host(machine, range);
        }
        self.assign(machine, range, Entry::of_guest(to, guest.slot(), frame_number(at)));
        self.flush_host(machine);
        if gift != Gift::ToMeasure {
            // Guests start with their caches off, and a dirty line of the host's could overwrite what they write.
            self.clean_or_scrub(machine, &[Run { pages: range, scrub: false, pinned: false }]);
        }
        let Guest { tables, spare, pages, .. } = tables;
        let done = tables.map(machine, &mut spare.pool(machine), frames, range.base(), Stage2Usage::Memory);
        debug_assert_eq!(done, Ok(()));
        *pages = pages.saturating_add(range.pages());
        Ok(())
    }
}
