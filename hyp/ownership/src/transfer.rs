//! The transitions that guests take part in.
//!
//! Each checks first what it asks of frames and pages and makes sure of tables, and then cannot fail. The lock of memory is
//! taken before that of the guest.

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
    memory::Inner,
    reason::{GuestFailure, GuestReason},
};
use look::{Content, Place};

pub use look::GuestPage;
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

impl<P: TablePool> Inner<'_, P> {
    /// Returns how far `change` may go from the start of `range`: at least one frame.
    fn plan<M: Machine>(
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
                GuestReason::Absent => self.reason_for_absence(machine, guest, tables, failure.ipa, change),
                reason => reason,
            };
            return Err(GuestFailure { reason, ..failure });
        }
        let frames = first_pages(range, pages).ok_or(failure(GuestReason::Absent, range))?;
        let row = first.filter(|_| is_row).and_then(|first| PhysRange::new(first.raw(), pages).ok());
        Ok(Plan { frames, row, claimed, steps: MAX_STEPS.saturating_sub(left) })
    }

    /// As [`Inner::plan`], for all of `range` or nothing.
    fn plan_all<M: Machine>(
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

    /// Returns why `change` does not start from a frame that has nothing in the change's view.
    fn reason_for_absence<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        frame: Ipa,
        change: &Change,
    ) -> GuestReason {
        let Some(other) = guest.other(change.view) else {
            return GuestReason::Absent;
        };
        let found = self.look(machine, guest, tables, IpaRange::single(frame), other, &mut |_, content, _| {
            ControlFlow::Break(match content {
                Content::Absent => GuestReason::Absent,
                Content::Poisoned => GuestReason::Poisoned,
                Content::Pages(_, entry) => refusal(change, entry.state()),
            })
        });
        match found {
            ControlFlow::Break(reason) => reason,
            ControlFlow::Continue(()) => GuestReason::Absent,
        }
    }

    /// Makes the change, which has been planned, in the ownership table and in the host's stage 2. The guest's tables are as
    /// they were.
    fn set_state<M: Machine>(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        plan: &Plan,
        change: &Change,
    ) {
        let flush = self.change_state(machine, guest, tables, plan, change, Flush::new());
        self.flush_host(machine, flush);
    }

    /// As [`Inner::set_state`], but for the invalidation. Adds what that owes to `flush`, of the host.
    fn change_state<M: Machine>(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        plan: &Plan,
        change: &Change,
        mut flush: Flush<Stage2>,
    ) -> Flush<Stage2> {
        // Of guests' pages the host has none but claimed ones in its tables.
        let takes_from_host = plan.claimed && !change.to.host_access();
        let mut set = |at: Ipa, pages: PhysRange| {
            let mut owed = core::mem::take(&mut flush);
            if takes_from_host {
                owed = self.host.unmap(machine, &mut self.pool, pages.identity_ipa(), owed);
            }
            let entry = if change.to.has_frame() {
                Entry::of_guest(change.to, guest.slot(), frame_number(at))
            } else {
                Entry::new(change.to, 0)
            };
            flush = self.assign(machine, pages, entry, owed);
        };
        if let Some(pages) = plan.row {
            set(plan.frames.base(), pages);
        } else {
            let mapped = guest.in_view(change.view, plan.frames);
            let offset = mapped.base().raw().wrapping_sub(plan.frames.base().raw());
            let _: ControlFlow<()> = tables.visit(machine, mapped, &mut |part, found| {
                if let Place::Pages { pages, .. } = found {
                    set(Ipa::from_bits_truncating(part.base().raw().wrapping_sub(offset)), pages);
                }
                ControlFlow::Continue(())
            });
        }
        flush
    }

    /// Takes `range`, guest addresses, out of the guest's stage 2.
    fn unmap_guest<M: Machine>(&mut self, machine: &M, tables: &mut Guest, range: IpaRange) {
        let Guest { tables, spare, .. } = tables;
        let flush = tables.unmap(machine, &mut spare.pool(machine), range, Flush::new());
        self.flush_guest(machine, tables, &mut spare.pool(machine), flush);
    }

    fn flush_guest<M: Machine>(
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
