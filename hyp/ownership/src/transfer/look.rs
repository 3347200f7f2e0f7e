//! What a guest has in its frames.

use core::ops::ControlFlow;

use arrayvec::ArrayVec;
use ravelin_memory::{Ipa, IpaRange, Level, PhysAddr, PhysRange};
use ravelin_pgtable::{Found, Machine, TablePool};

use super::{Change, MAX_RUNS, MAX_STEPS, address};
use crate::{
    entry::{Entry, State},
    guest::{Blocks, Guest, GuestMemory, View, first_pages},
    locked::{Locked, Mask},
    memory::Memory,
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
pub(crate) enum Place {
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

/// Contiguous pages that come to a guest or leave it.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    pub(crate) pages: PhysRange,
    /// Whether they have to be scrubbed, and not only cleaned.
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
        let tables = guest.lock_shared();
        match guest.other(View::Private) {
            None => self.page_in(machine, guest, &tables, frame, View::Private),
            Some(other) => self.page_in_either(machine, guest, &tables, frame, other),
        }
    }

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "as short as can be, as for each access to a device")]
    fn page_in<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        frame: Ipa,
        view: View,
    ) -> GuestPage {
        let walk = tables.tables.lookup(machine, guest.address_in(view, frame));
        match walk.output() {
            Some(page) => GuestPage::of(self.entry(page).unwrap_or(Entry::NOBODY).state()),
            None if walk.is_poisoned() => GuestPage::Poisoned,
            None => GuestPage::Absent,
        }
    }

    // Out of line: an access to a device asks what is there, and most guests have one view.
    #[inline(never)]
    fn page_in_either<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        frame: Ipa,
        other: View,
    ) -> GuestPage {
        let _block = guest.lock_block(machine, frame);
        match self.page_in(machine, guest, tables, frame, View::Private) {
            GuestPage::Absent => self.page_in(machine, guest, tables, frame, other),
            page => page,
        }
    }

    /// Returns what the first frame of `range` is to the guest, and how many frames from there on are known to be the same:
    /// at least one. Frames without tables cost nothing, however many they are. Behind the last frame there is nothing.
    #[must_use]
    pub fn guest_run<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> (GuestPage, u64) {
        let Ok(range) = IpaRange::from_bounds(range.base().raw(), range.end().min(guest.end())) else {
            return (GuestPage::Absent, range.pages());
        };
        let tables = guest.lock_shared();
        let mut blocks = Blocks::new_const();
        guest.lock_blocks(machine, range, &mut blocks);
        let mut locked = Locked::new(self, machine);
        locked.reach(machine, guest, &tables, range, View::Private);
        let (first, pages) = locked.run(machine, guest, &tables, range, View::Private);
        match (first, guest.other(View::Private), first_pages(range, pages)) {
            (GuestPage::Absent, Some(view), Some(frames)) => {
                locked.reach_further(machine, guest, &tables, frames, view);
                locked.run(machine, guest, &tables, frames, view)
            }
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
        let tables = guest.lock_shared();
        let mut blocks = Blocks::new_const();
        guest.lock_blocks(machine, range, &mut blocks);
        self.with(machine, tables.regions(machine, self, guest, range, Some(View::Private)), |locked| {
            let plan = locked.plan(machine, guest, &tables, range, &LOOK)?;
            let mut runs = Runs::new();
            let pages = locked.runs(machine, guest, &tables, plan.frames, View::Private, &mut runs);
            if !locked.reserve_transient(machine) {
                return Err(GuestFailure { reason: GuestReason::NoMemory, ipa: range.base() });
            }
            // The guest's caches may be off. Then what is cached of the pages may be out of date before, and hides what the
            // guest or EL2 has written after.
            locked.with_mapped(machine, &runs, &mut |_, pages| {
                machine.clean(pages);
                f(pages);
                machine.clean(pages);
            });
            Ok(pages)
        })
    }

    /// Returns slot and frame of the guest that owns the page of `addr` or has borrowed it.
    #[must_use]
    pub fn page_owner(&self, addr: PhysAddr) -> Option<(u8, Ipa)> {
        let (slot, frame) = self.entry(addr)?.guest()?;
        Some((slot, address(frame)?))
    }
}

impl<P: TablePool, M: Machine> Locked<'_, '_, P, M> {
    /// Calls `f` in ascending order with what there is in `frames`, until `f` breaks. The number is the steps that it takes to
    /// change that.
    // Closures of several walks in one frame would count as calls of each other where the depth of the stack is computed.
    #[inline(never)]
    pub(super) fn look<B>(
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
        let mut visitor = |part: IpaRange, found| {
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
            self.visit(pages, &mut |run, entry, steps| {
                let behind = run.base().raw().wrapping_sub(pages.base().raw());
                let steps = if by_page { run.pages() } else { steps };
                match IpaRange::new(part.base().raw().wrapping_add(behind), run.pages()) {
                    Ok(part) => f(part, Content::Pages(run, entry.unwrap_or(Entry::NOBODY)), steps),
                    Err(_) => ControlFlow::Continue(()),
                }
            })
        };
        let rest = match self.seen.as_ref().filter(|_| self.is_fresh.replace(false)) {
            Some((first, place)) if first.base() == mapped.base() && mapped.covers(first) => {
                visitor(*first, *place)?;
                IpaRange::from_bounds(first.end(), mapped.end()).ok()
            }
            _ => Some(mapped),
        };
        rest.map_or(ControlFlow::Continue(()), |rest| tables.visit(machine, rest, &mut visitor))
    }

    /// Takes the locks of the regions in which the pages of the first of `frames` lie, as far as a change goes.
    pub(super) fn reach(&mut self, machine: &M, guest: &GuestMemory, tables: &Guest, frames: IpaRange, view: View) {
        let needed = self.see(machine, guest, tables, frames, view);
        self.take_locks(needed);
    }

    /// Returns the regions in which the pages of the first of `frames` lie, and remembers what is there.
    fn see(&mut self, machine: &M, guest: &GuestMemory, tables: &Guest, frames: IpaRange, view: View) -> Mask {
        self.seen = None;
        let needed = tables.reach(machine, self.memory(), guest, frames, Some(view), &mut self.seen);
        self.is_fresh.set(true);
        needed
    }

    /// As [`Locked::reach`], beside what is held. Pays what is owed for the host's stage 2 if that means to release the locks, which
    /// are taken in one order.
    pub(super) fn reach_further(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        frames: IpaRange,
        view: View,
    ) {
        let needed = self.see(machine, guest, tables, frames, view);
        if !self.extend(needed) {
            let all = self.mask().union(needed);
            self.flush_host(machine);
            self.release();
            self.take_locks(all);
        }
    }

    /// Returns what the first frame of `range` is in `view`, and how many frames are known to be the same.
    fn run(&self, machine: &M, guest: &GuestMemory, tables: &Guest, range: IpaRange, view: View) -> (GuestPage, u64) {
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
    pub(super) fn runs(
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
    /// Returns the regions of the pages in the first of `frames`, in one view or in both. That is all that a call comes to: no look
    /// counts fewer steps for what it passes than this does. Says in `seen`, where there is nothing, what there is first.
    fn reach<P: TablePool, M: Machine>(
        &self,
        machine: &M,
        memory: &Memory<'_, P>,
        guest: &GuestMemory,
        frames: IpaRange,
        view: Option<View>,
        seen: &mut Option<(IpaRange, Place)>,
    ) -> Mask {
        let views = if view.is_some() { [view, None] } else { [Some(View::Private), guest.other(View::Private)] };
        let mut mask = Mask::NONE;
        for view in views.into_iter().flatten() {
            let mut left = MAX_STEPS;
            let _: ControlFlow<()> = self.visit(machine, guest.in_view(view, frames), &mut |part, place| {
                let steps = match place {
                    Place::Absent { by_page: true } => part.pages().div_ceil(EMPTY_PER_STEP),
                    Place::Absent { by_page: false } | Place::Poisoned => 1,
                    Place::Pages { pages, by_page } => {
                        mask = mask.union(memory.mask(pages));
                        if by_page { pages.pages() } else { 1 }
                    }
                };
                seen.get_or_insert((part, place));
                left = left.saturating_sub(steps);
                if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
        }
        mask
    }

    /// As [`Guest::reach`]: the regions alone.
    pub(super) fn regions<P: TablePool, M: Machine>(
        &self,
        machine: &M,
        memory: &Memory<'_, P>,
        guest: &GuestMemory,
        frames: IpaRange,
        view: Option<View>,
    ) -> Mask {
        self.reach(machine, memory, guest, frames, view, &mut None)
    }

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
            let place = match walk.output() {
                Some(page) => Place::Pages { pages: PhysRange::single(page), by_page: walk.level == Level::L3 },
                None if walk.is_poisoned() => Place::Poisoned,
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
