//! The transitions that guests take part in.
//!
//! Each checks first what it asks of frames and pages and makes sure of tables, and then cannot fail. The lock of the guest is taken
//! before those of the regions in which its pages lie, which its tables tell.

mod give;
mod look;
mod reclaim;
mod ring;
mod share;
mod tables;

use core::ops::ControlFlow;

use ravelin_memory::{Ipa, IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_pgtable::{Flush, Machine, PageTable, Stage2, TablePool};

use crate::{
    entry::{Entry, State},
    guest::{Guest, GuestMemory, View, first_pages, frame_number},
    locked::Locked,
    reason::{GuestFailure, GuestReason},
};
use look::Content;

pub use give::Gift;
pub use look::GuestPage;
pub(crate) use look::{Place, Run};
pub use ring::{Batch, Conversion, MAX_BATCH};
pub use share::Unshare;

/// What one call does at most. A step is a page, or a block of 2 MiB where the call covers one as a whole. Where pages are
/// scrubbed, each is a step; where they are cleaned, a block is 32.
pub const MAX_STEPS: u64 = 512;

/// Runs of contiguous pages that one call scrubs at most.
const MAX_RUNS: usize = 32;

/// A change of state of frames that a guest has.
struct Change {
    /// Where the frames are mapped before.
    view: View,
    /// States before.
    from: &'static [State],
    /// State after.
    to: State,
    /// Whether each page counts as a step.
    by_page: bool,
    /// Whether poisoned frames take part, which lose their poison.
    poison: bool,
}

impl Change {
    /// Returns the view to which pages move with the change, if they do.
    const fn moves_to(&self, guest: &GuestMemory) -> Option<View> {
        match (self.view, self.to) {
            (View::Private, State::GUEST_OFFERED) | (View::Shared, State::GUEST_OWNED) => guest.other(self.view),
            _ => None,
        }
    }
}

/// How far a change goes.
struct Plan {
    frames: IpaRange,
    /// The pages in the frames, if they follow each other.
    row: Option<PhysRange>,
    /// Whether the host has claimed one of the pages.
    claimed: bool,
    /// Steps that it takes.
    steps: u64,
}

impl<P: TablePool, M: Machine> Locked<'_, '_, P, M> {
    /// Returns how far `change` may go from the start of `range`: at least one frame.
    fn plan(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        range: IpaRange,
        change: &Change,
    ) -> Result<Plan, GuestFailure> {
        let failure = |reason, frames: IpaRange| GuestFailure { reason, ipa: frames.base() };
        if tables.dying {
            return Err(failure(GuestReason::Denied, range));
        }
        if range.end() > guest.end() {
            return Err(failure(GuestReason::OutOfRange, range));
        }
        let (mut left, mut pages, mut claimed) = (MAX_STEPS, 0_u64, false);
        let (mut first, mut is_row) = (None::<PhysAddr>, true);
        let checked = self.look(machine, guest, tables, range, change.view, &mut |frames, content, steps| {
            let steps = match content {
                Content::Pages(run, entry) => {
                    if entry.guest() != Some((guest.slot(), frame_number(frames.base())))
                        || !change.from.contains(&entry.state())
                    {
                        return ControlFlow::Break(Err(failure(refusal(change, entry.state()), frames)));
                    }
                    claimed |= entry.state() == State::GUEST_CLAIMED;
                    let start = first.get_or_insert(run.base()).raw();
                    is_row &= start.wrapping_add(pages.wrapping_mul(PAGE_SIZE)) == run.base().raw();
                    if change.by_page { frames.pages() } else { steps }
                }
                Content::Poisoned if change.poison => {
                    is_row = false;
                    steps
                }
                Content::Poisoned => return ControlFlow::Break(Err(failure(GuestReason::Poisoned, frames))),
                Content::Absent => return ControlFlow::Break(Err(failure(GuestReason::Absent, frames))),
            };
            if change.by_page && steps > left {
                // The limit must not cut a block, which would take a table. What comes first always fits.
                return ControlFlow::Break(Ok(()));
            }
            // A block that is one step fits, because at least one is left.
            let part = if steps <= left { frames.pages() } else { left };
            pages = pages.saturating_add(part);
            left = left.saturating_sub(steps);
            if left == 0 { ControlFlow::Break(Ok(())) } else { ControlFlow::Continue(()) }
        });
        if let ControlFlow::Break(Err(failure)) = checked {
            // A second walk, for which the first has to be over: walks within walks take too much of the stack.
            let reason = match failure.reason {
                GuestReason::Absent => tables.reason_for_absence(machine, guest, failure.ipa, change),
                reason => reason,
            };
            return Err(GuestFailure { reason, ..failure });
        }
        let frames = first_pages(range, pages).ok_or(failure(GuestReason::Absent, range))?;
        let row = first.filter(|_| is_row).and_then(|first| PhysRange::new(first.raw(), pages).ok());
        Ok(Plan { frames, row, claimed, steps: MAX_STEPS.saturating_sub(left) })
    }

    /// As [`Locked::plan`], for all of `range` or nothing.
    fn plan_all(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        range: IpaRange,
        change: &Change,
    ) -> Result<Plan, GuestFailure> {
        let plan = self.plan(machine, guest, tables, range, change)?;
        if plan.frames == range {
            Ok(plan)
        } else {
            Err(GuestFailure { reason: GuestReason::TooLarge, ipa: range.base() })
        }
    }

    /// Makes the change, which has been planned, in the ownership table and in the host's stage 2. The guest's tables are as
    /// they were.
    fn set_state(&mut self, machine: &M, guest: &GuestMemory, tables: &Guest, plan: &Plan, change: &Change) {
        self.change_state(machine, guest, tables, plan, change);
        self.flush_host(machine);
    }

    /// As [`Locked::set_state`], but for the invalidation, which is owed.
    fn change_state(&mut self, machine: &M, guest: &GuestMemory, tables: &Guest, plan: &Plan, change: &Change) {
        // Of guests' pages the host has none but claimed ones in its tables.
        let takes_from_host = plan.claimed && !change.to.host_access();
        match plan.row {
            Some(pages) => self.change_row(machine, guest, plan.frames.base(), pages, change.to, takes_from_host),
            None => self.change_rows(machine, guest, tables, plan, change, takes_from_host),
        }
    }

    /// Changes pages that do not follow each other.
    // Out of line: its closure is not there where a row is changed, which is how the depth of the stack is computed.
    #[inline(never)]
    fn change_rows(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        plan: &Plan,
        change: &Change,
        takes_from_host: bool,
    ) {
        let mapped = guest.in_view(change.view, plan.frames);
        let offset = mapped.base().raw().wrapping_sub(plan.frames.base().raw());
        let _: ControlFlow<()> = tables.visit(machine, mapped, &mut |part, found| {
            if let Place::Pages { pages, .. } = found {
                let at = Ipa::from_bits_truncating(part.base().raw().wrapping_sub(offset));
                self.change_row(machine, guest, at, pages, change.to, takes_from_host);
            }
            ControlFlow::Continue(())
        });
    }

    /// Changes pages that follow each other, in the frames from `at` on.
    fn change_row(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        at: Ipa,
        pages: PhysRange,
        to: State,
        takes_from_host: bool,
    ) {
        if takes_from_host {
            self.unmap_host(machine, pages);
        }
        let entry =
            if to.has_frame() { Entry::of_guest(to, guest.slot(), frame_number(at)) } else { Entry::new(to, 0) };
        self.assign(machine, pages, entry);
    }

    /// Takes `range`, guest addresses, out of the guest's stage 2.
    fn unmap_guest(&mut self, machine: &M, tables: &mut Guest, range: IpaRange) {
        let Guest { tables, spare, .. } = tables;
        let flush = tables.unmap(machine, &mut spare.pool(machine), range, Flush::new());
        self.flush_guest(machine, tables, &mut spare.pool(machine), flush);
    }

    /// Scrubs runs of pages, or cleans them, as they need. [`Locked::reserve_transient`] has returned true.
    fn clean_or_scrub(&mut self, machine: &M, runs: &[Run]) {
        self.with_mapped(machine, runs, &mut |run, pages| {
            if run.scrub { machine.scrub(pages) } else { machine.clean(pages) }
        });
    }

    fn flush_guest(
        &mut self,
        machine: &M,
        tables: &mut PageTable<Stage2>,
        pool: &mut impl TablePool,
        flush: Flush<Stage2>,
    ) {
        if tables.flush(machine, pool, flush) {
            self.count_stage2_invalidation();
        }
    }
}

impl Guest {
    /// Returns why `change` does not start from a frame that has nothing in the change's view.
    fn reason_for_absence<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        frame: Ipa,
        change: &Change,
    ) -> GuestReason {
        let Some(other) = guest.other(change.view) else {
            return GuestReason::Absent;
        };
        let walk = self.tables.lookup(machine, guest.address_in(other, frame));
        match (walk.output(), other) {
            (Some(_), View::Private) => refusal(change, State::GUEST_OWNED),
            (Some(_), View::Shared) => GuestReason::Denied,
            (None, _) if walk.is_poisoned() => GuestReason::Poisoned,
            (None, _) => GuestReason::Absent,
        }
    }

    /// Makes sure that there are tables to take `range`, guest addresses, out of blocks that it cuts, poisoned ones too.
    fn have_for_cut<M: Machine>(&self, machine: &M, range: IpaRange) -> Result<(), GuestFailure> {
        let failure = |reason| GuestFailure { reason, ipa: range.base() };
        self.have(self.tables.tables_to_unmap(machine, range, None)).map_err(failure)
    }

    /// Makes sure that there are `needed` pages for tables.
    fn have(&self, needed: usize) -> Result<(), GuestReason> {
        match needed.saturating_sub(self.spare.available) {
            0 => Ok(()),
            missing => Err(GuestReason::NeedsTables(missing)),
        }
    }
}

/// Returns the guest address of a frame.
pub(crate) fn address(frame: u64) -> Option<Ipa> {
    Ipa::new(frame.checked_mul(PAGE_SIZE)?)
}

/// Returns why a change that does not start from `state` is refused.
fn refusal(change: &Change, state: State) -> GuestReason {
    if change.to == State::GUEST_CLAIMED && state == State::GUEST_OWNED {
        GuestReason::NotOffered
    } else {
        GuestReason::Denied
    }
}
