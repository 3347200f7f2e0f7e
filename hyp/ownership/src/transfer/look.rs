//! What a guest has in its frames.

use core::ops::ControlFlow;

use arrayvec::ArrayVec;
use ravelin_memory::{Ipa, IpaRange, Level, PhysAddr, PhysRange};
use ravelin_pgtable::{Found, Machine, TablePool};

use super::{Change, MAX_RUNS, MAX_STEPS, address};
use crate::{
    entry::{Entry, State},
    guest::{Guest, GuestMemory, View, first_pages},
    memory::{Inner, Memory},
    reason::{GuestFailure, GuestReason},
};

/// What a frame is to its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestPage {
    /// There is no page.
    Absent,
    /// There was a page, which was taken by force.
    Poisoned,
    /// The page is the guest's alone.
    Private,
    /// The page is offered to the host, which has not claimed it.
    Offered,
    /// The host may access the page.
    Claimed,
    /// The page is the host's, which lends it.
    Lent,
}

impl GuestPage {
    /// Returns what a page in this state is that a guest has mapped.
    const fn of(state: State) -> Self {
        match state {
            State::GUEST_OWNED | State::GUEST_PINNED => Self::Private,
            State::GUEST_OFFERED => Self::Offered,
            State::GUEST_CLAIMED => Self::Claimed,
            _ => Self::Lent,
        }
    }
}

/// What there is in frames of a guest.
#[derive(Clone, Copy)]
pub(super) enum Content {
    Absent,
    Poisoned,
    /// Contiguous pages, and the entry of the first of them.
    Pages(PhysRange, Entry),
}

/// What a guest's stage 2 has at some addresses.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// Nothing, in one descriptor or in one for each page.
    Absent {
        by_page: bool,
    },
    Poisoned,
    /// Contiguous pages, mapped by a block or by a page descriptor for each.
    Pages {
        pages: PhysRange,
        by_page: bool,
    },
}

/// Contiguous pages that leave a guest.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) pages: PhysRange,
    pub(super) scrub: bool,
    /// Whether EL2 maps them, too.
    pub(super) pinned: bool,
}

/// What one call scrubs. On the stack of a CPU, which is short.
pub(super) type Runs = ArrayVec<Run, MAX_RUNS>;

/// How many descriptors without pages, in a row, one step passes over.
const EMPTY_PER_STEP: u64 = 8;

/// Looks at private memory and changes nothing.
const LOOK: Change = Change {
    view: View::Private,
    from: &[State::GUEST_OWNED, State::HOST_LENT],
    to: State::GUEST_OWNED,
    by_page: true,
    poison: false,
};

impl<P: TablePool> Memory<'_, P> {
    /// Returns what `ipa`, in either half of a realm's address space, is to the guest.
    #[must_use]
    pub fn guest_page<M: Machine>(&self, machine: &M, guest: &GuestMemory, ipa: Ipa) -> GuestPage {
        let Some(frame) = guest.frame(ipa) else { return GuestPage::Absent };
        let inner = self.lock(machine);
        let tables = guest.lock(machine);
        let in_view = |view| inner.page(machine, &tables, guest.in_view(view, IpaRange::single(frame)).base());
        match (in_view(View::Private), guest.other(View::Private)) {
            (GuestPage::Absent, Some(view)) => in_view(view),
            (page, _) => page,
        }
    }

    /// Returns what the first frame of `range` is to the guest, and how many frames from there on are known to be the same:
    /// at least one. Frames without tables cost nothing, however many they are. Behind the last frame there is nothing.
    #[must_use]
    pub fn guest_run<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> (GuestPage, u64) {
        let Ok(range) = IpaRange::from_bounds(range.base().raw(), range.end().min(guest.end())) else {
            return (GuestPage::Absent, range.pages());
        };
        let inner = self.lock(machine);
        let tables = guest.lock(machine);
        let (first, pages) = inner.run(machine, guest, &tables, range, View::Private);
        match (first, guest.other(View::Private), first_pages(range, pages)) {
            (GuestPage::Absent, Some(view), Some(frames)) => inner.run(machine, guest, &tables, frames, view),
            _ => (first, pages),
        }
    }

    /// Calls `f` with the pages in the first frames of `range`, which are private or lent, contiguous pages at a time, while
    /// EL2 has them mapped for reading and writing at their physical addresses. Returns how many frames that was. The guest
    /// may access them at the same time. `f` must not call methods of this.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Absent`], [`GuestReason::Poisoned`], [`GuestReason::Denied`] for pages that are shared,
    /// [`GuestReason::OutOfRange`], [`GuestReason::NoMemory`].
    pub fn with_guest_pages<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
        f: &mut dyn FnMut(PhysRange),
    ) -> Result<u64, GuestFailure> {
        let mut inner = self.lock(machine);
        let tables = guest.lock(machine);
        let plan = inner.plan(machine, guest, &tables, range, &LOOK)?;
        let mut runs = Runs::new();
        let pages = inner.runs(machine, guest, &tables, plan.frames, View::Private, &mut runs);
        if !inner.reserve_transient(machine) {
            return Err(GuestFailure { reason: GuestReason::NoMemory, ipa: range.base() });
        }
        // The guest's caches may be off. Then what is cached of the pages may be out of date before, and hides what the guest
        // or EL2 has written after.
        inner.with_mapped(machine, runs.iter().map(|run| run.pages), &mut |run| {
            machine.clean(run);
            f(run);
            machine.clean(run);
        });
        Ok(pages)
    }

    /// Returns slot and frame of the guest that owns the page of `addr` or has borrowed it.
    #[must_use]
    pub fn page_owner(&self, addr: PhysAddr) -> Option<(u8, Ipa)> {
        let (slot, frame) = self.lock_entries().table.entry(addr.page())?.guest()?;
        Some((slot, address(frame)?))
    }
}

impl<P: TablePool> Inner<'_, P> {
    /// Calls `f` in ascending order with what there is in `frames`, until `f` breaks. The number is the steps that it takes to
    /// change that.
    // Closures of several walks in one frame would count as calls of each other where the depth of the stack is computed.
    #[inline(never)]
    pub(super) fn look<M: Machine, B>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        frames: IpaRange,
        view: View,
        f: &mut dyn FnMut(IpaRange, Content, u64) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let mapped = guest.in_view(view, frames);
        let offset = mapped.base().raw().wrapping_sub(frames.base().raw());
        tables.visit(machine, mapped, &mut |part, found| {
            let Ok(part) = IpaRange::new(part.base().raw().wrapping_sub(offset), part.pages()) else {
                return ControlFlow::Continue(());
            };
            let (pages, by_page) = match found {
                Place::Absent { by_page } => {
                    let steps = if by_page { part.pages().div_ceil(EMPTY_PER_STEP) } else { 1 };
                    return f(part, Content::Absent, steps);
                }
                Place::Poisoned => return f(part, Content::Poisoned, 1),
                Place::Pages { pages, by_page } => (pages, by_page),
            };
            self.table.visit(pages, &mut |run, entry, steps| {
                let behind = run.base().raw().wrapping_sub(pages.base().raw());
                let steps = if by_page { run.pages() } else { steps };
                match IpaRange::new(part.base().raw().wrapping_add(behind), run.pages()) {
                    Ok(part) => f(part, Content::Pages(run, entry.unwrap_or(Entry::NOBODY)), steps),
                    Err(_) => ControlFlow::Continue(()),
                }
            })
        })
    }

    /// Returns what is mapped at a guest address: one walk.
    fn page<M: Machine>(&self, machine: &M, tables: &Guest, at: Ipa) -> GuestPage {
        let walk = tables.tables.lookup(machine, at);
        match walk.mapping {
            Some(mapping) => GuestPage::of(self.table.entry(mapping.to.page()).unwrap_or(Entry::NOBODY).state()),
            None if walk.poisoned => GuestPage::Poisoned,
            None => GuestPage::Absent,
        }
    }

    /// Returns what the first frame of `range` is in `view`, and how many frames are known to be the same.
    fn run<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        range: IpaRange,
        view: View,
    ) -> (GuestPage, u64) {
        let (mut first, mut pages, mut left) = (None, 0_u64, MAX_STEPS);
        let _: ControlFlow<()> = self.look(machine, guest, tables, range, view, &mut |frames, content, steps| {
            let page = match content {
                Content::Absent => GuestPage::Absent,
                Content::Poisoned => GuestPage::Poisoned,
                Content::Pages(_, entry) => GuestPage::of(entry.state()),
            };
            if *first.get_or_insert(page) != page || left == 0 {
                return ControlFlow::Break(());
            }
            pages = pages.saturating_add(frames.pages());
            left = left.saturating_sub(steps);
            ControlFlow::Continue(())
        });
        (first.unwrap_or(GuestPage::Absent), pages.max(1))
    }

    /// Collects in `runs` the pages in the first of `frames`, as far as they fit into one call. Returns how many frames that is.
    /// Frames without pages are passed over. The limit does not cut blocks.
    pub(super) fn runs<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        frames: IpaRange,
        view: View,
        runs: &mut Runs,
    ) -> u64 {
        let (mut left, mut done) = (MAX_STEPS, 0_u64);
        let _: ControlFlow<()> = self.look(machine, guest, tables, frames, view, &mut |part, content, steps| {
            let (passed, steps) = match content {
                Content::Absent | Content::Poisoned => (part.pages(), steps),
                Content::Pages(pages, entry) => {
                    if pages.pages() > left {
                        return ControlFlow::Break(());
                    }
                    let pinned = entry.state() == State::GUEST_PINNED;
                    let scrub = pinned || entry.state() == State::GUEST_OWNED;
                    let last = runs.last_mut().filter(|last| {
                        last.pages.end() == pages.base().raw() && (last.scrub, last.pinned) == (scrub, pinned)
                    });
                    match last {
                        Some(last) => {
                            last.pages = PhysRange::from_bounds(last.pages.base().raw(), pages.end()).unwrap_or(pages);
                        }
                        None => {
                            if runs.try_push(Run { pages, scrub, pinned }).is_err() {
                                return ControlFlow::Break(());
                            }
                        }
                    }
                    (pages.pages(), pages.pages())
                }
            };
            done = done.saturating_add(passed);
            left = left.saturating_sub(steps);
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        done
    }
}

impl Guest {
    /// Calls `f` in ascending order with parts of `range`, guest addresses, and what is there, until `f` breaks.
    pub(super) fn visit<M: Machine, B>(
        &self,
        machine: &M,
        range: IpaRange,
        f: &mut dyn FnMut(IpaRange, Place) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        if range.pages() == 1 {
            // The same, but shorter, because others wait for the lock.
            let walk = self.tables.lookup(machine, range.base());
            let place = match walk.mapping {
                Some(mapping) => {
                    Place::Pages { pages: PhysRange::single(mapping.to), by_page: walk.level == Level::L3 }
                }
                None if walk.poisoned => Place::Poisoned,
                None => Place::Absent { by_page: walk.level == Level::L3 },
            };
            return f(range, place);
        }
        self.tables.visit(machine, range, &mut |part, found| {
            let place = match found {
                Found::Poisoned => Place::Poisoned,
                Found::Absent { level } | Found::Leaf { mapping: None, level } => {
                    Place::Absent { by_page: level == Level::L3 }
                }
                Found::Leaf { mapping: Some(mapping), level } => match PhysRange::new(mapping.to.raw(), part.pages()) {
                    Ok(pages) => Place::Pages { pages, by_page: level == Level::L3 },
                    Err(_) => return ControlFlow::Continue(()),
                },
            };
            f(part, place)
        })
    }
}
