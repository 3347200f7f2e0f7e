//! The transitions that guests take part in.
//!
//! Each checks first what it asks of frames and pages and makes sure of tables, and then cannot fail. The lock of memory is
//! taken before that of the guest.

use core::ops::ControlFlow;

use arrayvec::ArrayVec;
use ravelin_memory::{BLOCK_SIZE, Ipa, IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_pgtable::{Flush, Found, Geometry, Machine, PageTable, Stage2, Stage2Usage, TablePool};

use crate::{
    HOST_RESERVE,
    entry::{Entry, State},
    guest::{Guest, GuestKind, GuestMemory, View, first_pages, frame_number},
    memory::{Failure, Inner, Memory, Reason},
    reason::{GuestFailure, GuestReason, HostFailure},
    step::Step,
};

/// What one call does at most. A step is a page, or a block of 2 MiB where the call covers one as a whole. Where pages are
/// scrubbed, each is a step.
pub const MAX_STEPS: u64 = 512;

/// Runs of contiguous pages that one call scrubs at most.
const MAX_RUNS: usize = 64;

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

/// What became of an unshare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unshare {
    /// So many pages, the first of the range, are the guest's alone again.
    Done(u64),
    /// Nothing has changed: the host has claimed pages of this range, the first part of the one asked for, and must release
    /// them first.
    NeedsRelease(IpaRange),
}

/// What there is in frames of a guest.
#[derive(Clone, Copy)]
enum Content {
    Absent,
    Poisoned,
    /// Contiguous pages, and the entry of the first of them.
    Pages(PhysRange, Entry),
}

/// What a guest's stage 2 has at some addresses.
#[derive(Clone, Copy)]
enum Place {
    Absent,
    Poisoned,
    /// Contiguous pages, mapped by a block or by a page descriptor for each.
    Pages {
        pages: PhysRange,
        by_page: bool,
    },
}

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
}

/// How far a change goes.
struct Plan {
    frames: IpaRange,
    /// Whether the host has claimed one of the pages.
    claimed: bool,
}

/// Contiguous pages that leave a guest.
#[derive(Clone, Copy)]
struct Run {
    pages: PhysRange,
    scrub: bool,
}

const SHARE: Change =
    Change { view: View::Private, from: &[State::GUEST_OWNED], to: State::GUEST_OFFERED, by_page: false };
const UNSHARE: Change = Change {
    view: View::Shared,
    from: &[State::GUEST_OFFERED, State::GUEST_CLAIMED],
    to: State::GUEST_OWNED,
    by_page: false,
};
const CLAIM: Change =
    Change { view: View::Shared, from: &[State::GUEST_OFFERED], to: State::GUEST_CLAIMED, by_page: false };
const RELEASE: Change =
    Change { view: View::Shared, from: &[State::GUEST_CLAIMED], to: State::GUEST_OFFERED, by_page: false };
const UNLEND: Change = Change { view: View::Private, from: &[State::HOST_LENT], to: State::HOST_OWNED, by_page: false };
const RELINQUISH: Change =
    Change { view: View::Private, from: &[State::GUEST_OWNED], to: State::HOST_OWNED, by_page: true };
/// Looks at private memory and changes nothing.
const LOOK: Change = Change {
    view: View::Private,
    from: &[State::GUEST_OWNED, State::HOST_LENT],
    to: State::GUEST_OWNED,
    by_page: true,
};

impl<P: TablePool> Memory<'_, P> {
    /// Makes pages of the host the hypervisor's for as long as a VM needs them, with their contents: for its objects and the
    /// root of its stage 2. They are mapped in EL2 for reading and writing. Unlike what [`Memory::donate`] takes, the host
    /// cannot have them back by itself.
    ///
    /// # Errors
    ///
    /// As [`Memory::donate`].
    pub fn keep<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.lock().take(machine, range, &Step::KEEP)
    }

    /// Returns pages that were kept for a VM to the host, scrubbed. Nothing uses them any more.
    ///
    /// To return what was kept with one call is always possible.
    ///
    /// # Errors
    ///
    /// As [`Memory::take_back`]; [`Reason::Denied`] for a page that is not kept.
    pub fn give_back<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.lock().take(machine, range, &Step::GIVE_BACK)
    }

    /// Returns a guest without pages, in `slot`, 0 to 254. `root` is the first of [`Geometry::root_pages`] pages that are
    /// kept, for the root of its stage 2. Whatever the TLBs hold of the slot's VMID is removed.
    ///
    /// # Errors
    ///
    /// [`Reason::Denied`] unless the pages are kept and `root` is aligned to their total size.
    pub fn new_guest<M: Machine>(
        &self,
        machine: &M,
        slot: u8,
        kind: GuestKind,
        geometry: Geometry,
        root: PhysAddr,
    ) -> Result<GuestMemory, Failure> {
        let denied = Failure { reason: Reason::Denied, page: root };
        let pages = PhysRange::new(root.raw(), geometry.root_pages()).map_err(|_| denied)?;
        let inner = self.lock();
        let kept =
            pages.iter().all(|page| inner.table.entry(page).is_some_and(|entry| entry.state() == State::HYP_KEPT));
        if !kept || !root.is_aligned(pages.size().next_power_of_two()) || slot == u8::MAX {
            return Err(denied);
        }
        pages.iter().for_each(|page| machine.clear_table(page));
        machine.publish();
        let guest = GuestMemory::new(slot, kind, geometry, root);
        machine.invalidate_stage2_all(guest.vttbr());
        Ok(guest)
    }

    /// Gives a guest, a dying one too, pages of the host for its tables.
    ///
    /// # Errors
    ///
    /// [`GuestReason::TooLarge`] beyond [`MAX_STEPS`] pages; otherwise as [`Memory::keep`]. The page at address 0 is
    /// [`GuestReason::Denied`].
    pub fn add_guest_tables<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: PhysRange,
    ) -> Result<(), HostFailure> {
        let failure = |reason| HostFailure { reason, page: range.base() };
        if range.pages() > MAX_STEPS {
            return Err(failure(GuestReason::TooLarge));
        }
        if range.base().raw() == 0 {
            return Err(failure(GuestReason::Denied));
        }
        let mut inner = self.lock();
        let mut guest = guest.lock();
        inner.take(machine, range, &Step::KEEP)?;
        range.iter().for_each(|page| guest.spare.push(machine, page));
        Ok(())
    }

    /// Makes pages of the host a protected guest's own, at `at` and with their contents. One invalidation of the host's stage 2.
    ///
    /// # Errors
    ///
    /// See [`GuestReason`]: the host owns the pages alone, and the guest has nothing in the frames.
    pub fn donate_to_guest<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: PhysRange,
        at: Ipa,
    ) -> Result<(), HostFailure> {
        self.lock().give(machine, guest, range, at, State::GUEST_OWNED)
    }

    /// Lends pages of the host to an ordinary guest, at `at`. The host keeps its access.
    ///
    /// # Errors
    ///
    /// As [`Memory::donate_to_guest`].
    pub fn lend<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: PhysRange,
        at: Ipa,
    ) -> Result<(), HostFailure> {
        self.lock().give(machine, guest, range, at, State::HOST_LENT)
    }

    /// Ends what [`Memory::lend`] began. One invalidation of the guest's stage 2.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Denied`] for a page that is not lent, [`GuestReason::Absent`], [`GuestReason::TooLarge`],
    /// [`GuestReason::NeedsTables`] to cut a block.
    pub fn unlend<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> Result<(), GuestFailure> {
        let mut inner = self.lock();
        let mut tables = guest.lock();
        let plan = inner.plan_all(machine, guest, &tables, range, &UNLEND)?;
        tables.have_for_cut(machine, plan.frames)?;
        inner.set_state(machine, guest, &tables, plan.frames, &UNLEND);
        inner.unmap_guest(machine, &mut tables, plan.frames);
        tables.pages = tables.pages.saturating_sub(plan.frames.pages());
        Ok(())
    }

    /// Offers pages of a guest to the host: the first pages of `range`. Returns how many. The host has no access yet; contents
    /// stay. No TLB maintenance, but for a realm, whose pages move to the alias.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Absent`], [`GuestReason::Poisoned`], [`GuestReason::Denied`] for pages that are not private,
    /// [`GuestReason::OutOfRange`]; [`GuestReason::NeedsTables`] for a realm.
    pub fn guest_share<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
    ) -> Result<u64, GuestFailure> {
        let mut inner = self.lock();
        let mut tables = guest.lock();
        let plan = inner.plan(machine, guest, &tables, range, &SHARE)?;
        inner.convert(machine, guest, &mut tables, plan.frames, &SHARE)?;
        Ok(plan.frames.pages())
    }

    /// Makes pages that a guest has offered its own alone again: the first pages of `range`, at once, unless the host has
    /// claimed any of them. Contents stay. No TLB maintenance, but for a realm.
    ///
    /// # Errors
    ///
    /// As [`Memory::guest_share`], with [`GuestReason::Denied`] for pages that are not shared.
    pub fn guest_unshare<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
    ) -> Result<Unshare, GuestFailure> {
        let mut inner = self.lock();
        let mut tables = guest.lock();
        let plan = inner.plan(machine, guest, &tables, range, &UNSHARE)?;
        if plan.claimed {
            return Ok(Unshare::NeedsRelease(plan.frames));
        }
        inner.convert(machine, guest, &mut tables, plan.frames, &UNSHARE)?;
        Ok(Unshare::Done(plan.frames.pages()))
    }

    /// Gives private pages of a guest to the host, scrubbed: the first pages of `range`. Returns how many. One invalidation of
    /// the guest's stage 2.
    ///
    /// # Errors
    ///
    /// As [`Memory::guest_share`]; [`GuestReason::NeedsTables`] to cut a block; [`GuestReason::NoMemory`].
    pub fn guest_relinquish<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
    ) -> Result<u64, GuestFailure> {
        let mut inner = self.lock();
        let mut tables = guest.lock();
        let plan = inner.plan(machine, guest, &tables, range, &RELINQUISH)?;
        inner.empty(machine, guest, &mut tables, plan.frames, View::Private)
    }

    /// Gives the host access to pages that a guest has offered. No TLB maintenance.
    ///
    /// # Errors
    ///
    /// [`GuestReason::NotOffered`] for private pages, [`GuestReason::Denied`] for others that are not offered,
    /// [`GuestReason::Absent`], [`GuestReason::Poisoned`], [`GuestReason::OutOfRange`], [`GuestReason::TooLarge`].
    pub fn claim<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> Result<(), GuestFailure> {
        let mut inner = self.lock();
        let tables = guest.lock();
        let plan = inner.plan_all(machine, guest, &tables, range, &CLAIM)?;
        inner.set_state(machine, guest, &tables, plan.frames, &CLAIM);
        Ok(())
    }

    /// Ends the host's access to pages that it has claimed; they stay offered. One invalidation of the host's stage 2 if it
    /// maps any of them.
    ///
    /// # Errors
    ///
    /// As [`Memory::claim`], with [`GuestReason::Denied`] for pages that are not claimed.
    pub fn release<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> Result<(), GuestFailure> {
        let mut inner = self.lock();
        let tables = guest.lock();
        let plan = inner.plan_all(machine, guest, &tables, range, &RELEASE)?;
        inner.set_state(machine, guest, &tables, plan.frames, &RELEASE);
        Ok(())
    }

    /// Takes private pages from a living guest and returns them to the host, scrubbed. Their frames are poisoned. One
    /// invalidation of the guest's stage 2.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Denied`] for a page that is not this guest's alone; [`GuestReason::TooLarge`];
    /// [`GuestReason::NeedsTables`] to cut a block; [`GuestReason::NoMemory`].
    pub fn force_reclaim<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: PhysRange,
    ) -> Result<(), HostFailure> {
        self.lock().force_reclaim(machine, guest, range)
    }

    /// Returns pages of a dying guest to the host, scrubbed if they were private: those in the first frames of `range`. Returns
    /// how many frames that is, without page or with. One invalidation of the guest's stage 2; for a realm two.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Denied`] if the guest is not dying; [`GuestReason::OutOfRange`]; [`GuestReason::NeedsTables`] to cut a
    /// block; [`GuestReason::NoMemory`].
    pub fn reclaim<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> Result<u64, GuestFailure> {
        let mut inner = self.lock();
        let mut tables = guest.lock();
        let failure = |reason| GuestFailure { reason, ipa: range.base() };
        if !tables.dying {
            return Err(failure(GuestReason::Denied));
        }
        if range.end() > guest.end() {
            return Err(failure(GuestReason::OutOfRange));
        }
        let done = inner.empty(machine, guest, &mut tables, range, View::Private)?;
        match (guest.other(View::Private), first_pages(range, done)) {
            (Some(view), Some(frames)) => inner.empty(machine, guest, &mut tables, frames, view),
            _ => Ok(done),
        }
    }

    /// Returns pages for tables of a dying guest that has no pages any more to the host, scrubbed, as many as `most` and
    /// [`MAX_STEPS`] allow. Returns how many are left. Those of the root are not among them.
    ///
    /// # Errors
    ///
    /// [`GuestReason::Busy`] if the guest is not dying or has pages left; [`GuestReason::NoMemory`] if not even one large
    /// mapping of EL2 can be split.
    pub fn release_guest_tables<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        most: u64,
    ) -> Result<u64, GuestReason> {
        let mut inner = self.lock();
        let mut tables = guest.lock();
        if !tables.dying || tables.pages != 0 {
            return Err(GuestReason::Busy);
        }
        inner.drop_tables(machine, &mut tables);
        let mut left = most.min(MAX_STEPS);
        while left != 0 && tables.spare.available != 0 {
            let returned = inner.return_spare(machine, &mut tables, left);
            if returned == 0 {
                return Err(GuestReason::NoMemory);
            }
            left = left.saturating_sub(returned);
        }
        Ok(u64::try_from(tables.spare.available).unwrap_or(u64::MAX))
    }

    /// Returns what `ipa`, in either half of a realm's address space, is to the guest.
    #[must_use]
    pub fn guest_page<M: Machine>(&self, machine: &M, guest: &GuestMemory, ipa: Ipa) -> GuestPage {
        guest.frame(ipa).map_or(GuestPage::Absent, |frame| self.guest_run(machine, guest, IpaRange::single(frame)).0)
    }

    /// Returns what the first frame of `range` is to the guest, and how many frames from there on are known to be the same:
    /// at least one. Frames without tables cost nothing, however many they are. Behind the last frame there is nothing.
    #[must_use]
    pub fn guest_run<M: Machine>(&self, machine: &M, guest: &GuestMemory, range: IpaRange) -> (GuestPage, u64) {
        let Ok(range) = IpaRange::from_bounds(range.base().raw(), range.end().min(guest.end())) else {
            return (GuestPage::Absent, range.pages());
        };
        let inner = self.lock();
        let tables = guest.lock();
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
        let mut inner = self.lock();
        let tables = guest.lock();
        let plan = inner.plan(machine, guest, &tables, range, &LOOK)?;
        let (runs, pages) = inner.runs(machine, guest, &tables, plan.frames, View::Private);
        if !inner.reserve_transient(machine) {
            return Err(GuestFailure { reason: GuestReason::NoMemory, ipa: range.base() });
        }
        inner.with_mapped(machine, runs.iter().map(|run| run.pages), f);
        Ok(pages)
    }

    /// Returns slot and frame of the guest that owns the page of `addr` or has borrowed it.
    #[must_use]
    pub fn page_owner(&self, addr: PhysAddr) -> Option<(u8, Ipa)> {
        let (slot, frame) = self.lock().table.entry(addr.page())?.guest()?;
        Some((slot, address(frame)?))
    }
}

fn address(frame: u64) -> Option<Ipa> {
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

impl<P: TablePool> Inner<'_, P> {
    /// Calls `f` in ascending order with what there is in `frames`, until `f` breaks. The number is the steps that it takes to
    /// change that.
    fn look<M: Machine, B>(
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
                Place::Absent => return f(part, Content::Absent, 1),
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
        let checked = self.look(machine, guest, tables, range, change.view, &mut |frames, content, steps| {
            let entry = match content {
                Content::Pages(_, entry) => entry,
                Content::Poisoned => return ControlFlow::Break(Err(failure(GuestReason::Poisoned, frames))),
                Content::Absent => {
                    let reason = self.reason_for_absence(machine, guest, tables, frames.base(), change);
                    return ControlFlow::Break(Err(failure(reason, frames)));
                }
            };
            if entry.guest() != Some((guest.slot(), frame_number(frames.base())))
                || !change.from.contains(&entry.state())
            {
                return ControlFlow::Break(Err(failure(refusal(change, entry.state()), frames)));
            }
            claimed |= entry.state() == State::GUEST_CLAIMED;
            // A block that is one step fits, because at least one is left.
            let steps = if change.by_page { frames.pages() } else { steps };
            let part = if steps <= left { frames.pages() } else { left };
            pages = pages.saturating_add(part);
            left = left.saturating_sub(steps);
            if left == 0 { ControlFlow::Break(Ok(())) } else { ControlFlow::Continue(()) }
        });
        if let ControlFlow::Break(Err(failure)) = checked {
            return Err(failure);
        }
        let frames = first_pages(range, pages).ok_or(failure(GuestReason::Absent, range))?;
        Ok(Plan { frames, claimed })
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
                Content::Pages(_, entry) => match entry.state() {
                    State::GUEST_OWNED => GuestPage::Private,
                    State::GUEST_OFFERED => GuestPage::Offered,
                    State::GUEST_CLAIMED => GuestPage::Claimed,
                    _ => GuestPage::Lent,
                },
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

    /// Makes the change, which has been planned, in the ownership table and in the host's stage 2. The guest's tables are as
    /// they were.
    fn set_state<M: Machine>(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        frames: IpaRange,
        change: &Change,
    ) {
        let mapped = guest.in_view(change.view, frames);
        let offset = mapped.base().raw().wrapping_sub(frames.base().raw());
        let takes_from_host = change.from.contains(&State::GUEST_CLAIMED) && !change.to.host_access();
        let mut flush = Flush::new();
        let _: ControlFlow<()> = tables.visit(machine, mapped, &mut |part, found| {
            let Place::Pages { pages, .. } = found else { return ControlFlow::Continue(()) };
            let mut owed = core::mem::take(&mut flush);
            if takes_from_host {
                owed = self.host.unmap(machine, &mut self.pool, pages.identity_ipa(), owed);
            }
            let entry = if change.to.has_frame() {
                Entry::of_guest(change.to, guest.slot(), part.base().raw().wrapping_sub(offset) / PAGE_SIZE)
            } else {
                Entry::new(change.to, 0)
            };
            flush = self.assign(machine, pages, entry, owed);
            ControlFlow::Continue(())
        });
        self.flush_host(machine, flush);
    }

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
        if needed > tables.spare.available {
            let reason = GuestReason::NeedsTables(needed.saturating_sub(tables.spare.available));
            return Err(GuestFailure { reason, ipa: frames.base() });
        }
        self.set_state(machine, guest, tables, frames, change);
        tables.for_each_leaf_moved(machine, from, to, &mut |tables, part, pages| {
            let Guest { tables, spare, .. } = tables;
            let done = tables.map(machine, &mut spare.pool(machine), part, pages.base(), Stage2Usage::Memory);
            debug_assert_eq!(done, Ok(()));
        });
        self.unmap_guest(machine, tables, from);
        Ok(())
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

    /// Puts pages of the host into a guest's memory.
    fn give<M: Machine>(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        range: PhysRange,
        at: Ipa,
        to: State,
    ) -> Result<(), HostFailure> {
        let failure = |reason, page| HostFailure { reason, page };
        let refuse = |reason| Err(failure(reason, range.base()));
        let mut tables = guest.lock();
        if tables.dying || (guest.kind() == GuestKind::Ordinary) != (to == State::HOST_LENT) {
            return refuse(GuestReason::Denied);
        }
        let frames = match IpaRange::new(at.raw(), range.pages()) {
            Ok(frames) if frames.end() <= guest.end() => frames,
            _ => return refuse(GuestReason::OutOfRange),
        };
        // The host's side.
        let aligned = range.base().raw().wrapping_sub(at.raw()) & BLOCK_SIZE.wrapping_sub(1) == 0;
        let mut left = MAX_STEPS;
        let checked = self.table.visit(range, &mut |run, entry, steps| {
            let reason = match entry {
                None => GuestReason::NotRam,
                Some(entry) if entry != Entry::new(State::HOST_OWNED, 0) => GuestReason::Denied,
                Some(_) => match left.checked_sub(if aligned { steps } else { run.pages() }) {
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
        for view in [Some(View::Private), guest.other(View::Private)].into_iter().flatten() {
            let taken = self.look(machine, guest, &tables, frames, view, &mut |part, content, _| {
                let reason = match content {
                    Content::Absent => return ControlFlow::Continue(()),
                    Content::Poisoned => GuestReason::Poisoned,
                    Content::Pages(..) => GuestReason::Exists,
                };
                ControlFlow::Break((reason, part.base().raw().wrapping_sub(at.raw())))
            });
            if let ControlFlow::Break((reason, behind)) = taken {
                return Err(failure(reason, range.base().checked_add(behind).unwrap_or(range.base())));
            }
        }
        let needed = tables.tables.tables_to_map(machine, frames, range.base(), Stage2Usage::Memory);
        if needed > tables.spare.available {
            return refuse(GuestReason::NeedsTables(needed.saturating_sub(tables.spare.available)));
        }
        if !self.reserve_transient(machine) {
            return refuse(GuestReason::NoMemory);
        }
        // Nothing fails from here on.
        let mut flush = Flush::new();
        if !to.host_access() {
            flush = self.host.unmap(machine, &mut self.pool, range.identity_ipa(), flush);
        }
        let entry = Entry::of_guest(to, guest.slot(), frame_number(at));
        flush = self.assign(machine, range, entry, flush);
        self.flush_host(machine, flush);
        // Guests start with their caches off, and a dirty line of the host's could overwrite what they write.
        self.with_mapped(machine, core::iter::once(range), &mut |run| machine.clean(run));
        let Guest { tables, spare, pages, .. } = &mut *tables;
        let done = tables.map(machine, &mut spare.pool(machine), frames, range.base(), Stage2Usage::Memory);
        debug_assert_eq!(done, Ok(()));
        *pages = pages.saturating_add(range.pages());
        Ok(())
    }

    /// Collects the pages in the first of `frames`, as far as they fit into one call. Returns them, and how many frames that is.
    /// Frames without pages are passed over, a step for each descriptor.
    fn runs<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        tables: &Guest,
        frames: IpaRange,
        view: View,
    ) -> (ArrayVec<Run, MAX_RUNS>, u64) {
        let mut runs = ArrayVec::<Run, MAX_RUNS>::new();
        let (mut left, mut done) = (MAX_STEPS, 0_u64);
        let _: ControlFlow<()> = self.look(machine, guest, tables, frames, view, &mut |part, content, _| {
            let (passed, steps) = match content {
                Content::Absent | Content::Poisoned => (part.pages(), 1),
                Content::Pages(pages, entry) => {
                    let scrub = entry.state() == State::GUEST_OWNED;
                    let Ok(pages) = PhysRange::new(pages.base().raw(), pages.pages().min(left)) else {
                        return ControlFlow::Break(());
                    };
                    let last =
                        runs.last_mut().filter(|last| last.pages.end() == pages.base().raw() && last.scrub == scrub);
                    match last {
                        Some(last) => {
                            last.pages = PhysRange::from_bounds(last.pages.base().raw(), pages.end()).unwrap_or(pages);
                        }
                        None => {
                            if runs.try_push(Run { pages, scrub }).is_err() {
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
        (runs, done)
    }

    /// Returns the pages in the first of `frames` to the host, and how many frames that is. Private ones are scrubbed, once
    /// the guest can no longer write to them.
    fn empty<M: Machine>(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        tables: &mut Guest,
        frames: IpaRange,
        view: View,
    ) -> Result<u64, GuestFailure> {
        let (runs, done) = self.runs(machine, guest, tables, frames, view);
        let Some(frames) = first_pages(frames, done) else {
            return Ok(0);
        };
        let mapped = guest.in_view(view, frames);
        tables.have_for_cut(machine, mapped).map_err(|failure| GuestFailure { ipa: frames.base(), ..failure })?;
        if !self.reserve_transient(machine) {
            return Err(GuestFailure { reason: GuestReason::NoMemory, ipa: frames.base() });
        }
        self.unmap_guest(machine, tables, mapped);
        let scrubbed = runs.iter().filter(|run| run.scrub).map(|run| run.pages);
        self.with_mapped(machine, scrubbed, &mut |pages| machine.scrub(pages));
        let mut flush = Flush::new();
        for run in runs {
            flush = self.assign(machine, run.pages, Entry::new(State::HOST_OWNED, 0), flush);
            tables.pages = tables.pages.saturating_sub(run.pages.pages());
        }
        self.flush_host(machine, flush);
        Ok(done)
    }

    fn force_reclaim<M: Machine>(
        &mut self,
        machine: &M,
        guest: &GuestMemory,
        range: PhysRange,
    ) -> Result<(), HostFailure> {
        let failure = |reason, page| HostFailure { reason, page };
        let refuse = |reason| Err(failure(reason, range.base()));
        let mut tables = guest.lock();
        if range.pages() > MAX_STEPS {
            return refuse(GuestReason::TooLarge);
        }
        if tables.dying {
            return refuse(GuestReason::Denied);
        }
        let mut needed = 0_usize;
        let frames_of = |entry: Option<Entry>, run: PhysRange| {
            let entry = entry.filter(|entry| entry.state() == State::GUEST_OWNED)?;
            let (_, frame) = entry.guest().filter(|&(slot, _)| slot == guest.slot())?;
            IpaRange::new(address(frame)?.raw(), run.pages()).ok()
        };
        let checked = self.table.visit(range, &mut |run, entry, _| match frames_of(entry, run) {
            Some(frames) => {
                // A block of the guest's is contiguous memory, so it is cut by one run only.
                needed = needed.saturating_add(tables.tables.tables_to_unmap(machine, frames, None));
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
        if needed > tables.spare.available {
            return refuse(GuestReason::NeedsTables(needed.saturating_sub(tables.spare.available)));
        }
        if !self.reserve_transient(machine) {
            return refuse(GuestReason::NoMemory);
        }
        let mut flush = Flush::new();
        let Guest { tables, spare, pages, .. } = &mut *tables;
        let _: ControlFlow<()> = self.table.visit(range, &mut |run, entry, _| {
            if let Some(frames) = frames_of(entry, run) {
                flush = tables.poison(machine, &mut spare.pool(machine), frames, core::mem::take(&mut flush));
            }
            ControlFlow::Continue(())
        });
        self.flush_guest(machine, tables, &mut spare.pool(machine), flush);
        self.with_mapped(machine, core::iter::once(range), &mut |run| machine.scrub(run));
        let flush = self.assign(machine, range, Entry::new(State::HOST_OWNED, 0), Flush::new());
        self.flush_host(machine, flush);
        *pages = pages.saturating_sub(range.pages());
        Ok(())
    }

    /// Takes what is left in the tables of a guest without pages, which is poison, out of them.
    fn drop_tables<M: Machine>(&mut self, machine: &M, tables: &mut Guest) {
        let Guest { tables, spare, .. } = tables;
        let flush = tables.unmap_all(machine, &mut spare.pool(machine), Flush::new());
        self.flush_guest(machine, tables, &mut spare.pool(machine), flush);
    }

    /// Returns up to `most` spare pages to the host, as many as go together, and how many that is. They are scrubbed before
    /// any of them is unmapped, because that breaks blocks of which others are part.
    fn return_spare<M: Machine>(&mut self, machine: &M, tables: &mut Guest, most: u64) -> u64 {
        let mut pages = ArrayVec::<PhysAddr, MAX_RUNS>::new();
        let mut needed = 0_usize;
        while let Some(page) = tables.spare.peek()
            && u64::try_from(pages.len()).is_ok_and(|taken| taken < most)
            && !pages.is_full()
        {
            let more = self.el2.tables_to_unmap(machine, PhysRange::single(page).identity_va(), None);
            let total = needed.saturating_add(more);
            let available = self.pool.available().saturating_add(self.host.tables());
            if more != 0 && total.saturating_add(HOST_RESERVE) > available {
                break;
            }
            needed = total;
            if let Some(page) = tables.spare.pop(machine) {
                pages.push(page);
            }
        }
        if needed > self.pool.available() {
            self.evict_host(machine);
        }
        pages.iter().for_each(|&page| machine.scrub(PhysRange::single(page)));
        let mut flush = Flush::new();
        for &page in &pages {
            flush = self.el2.unmap(machine, &mut self.pool, PhysRange::single(page).identity_va(), flush);
        }
        self.flush_el2(machine, flush);
        let mut flush = Flush::new();
        for &page in &pages {
            flush = self.assign(machine, PhysRange::single(page), Entry::new(State::HOST_OWNED, 0), flush);
        }
        self.flush_host(machine, flush);
        u64::try_from(pages.len()).unwrap_or(most)
    }
}

impl Guest {
    /// Calls `f` in ascending order with parts of `range`, guest addresses, and what is there, until `f` breaks. Pages that
    /// follow each other in both spaces go together, up to [`MAX_STEPS`] of them.
    fn visit<M: Machine, B>(
        &self,
        machine: &M,
        range: IpaRange,
        f: &mut dyn FnMut(IpaRange, Place) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let mut run: Option<(IpaRange, PhysRange)> = None;
        self.tables.visit(machine, range, &mut |part, found| {
            let (place, page) = match found {
                Found::Poisoned => (Place::Poisoned, None),
                Found::Absent | Found::Leaf(None) => (Place::Absent, None),
                Found::Leaf(Some(mapping)) => {
                    let Ok(pages) = PhysRange::new(mapping.to.raw(), part.pages()) else {
                        return ControlFlow::Continue(());
                    };
                    (Place::Pages { pages, by_page: false }, (part.pages() == 1).then_some(pages))
                }
            };
            if let (Some((at, pages)), Some(page)) = (run, page)
                && at.pages() < MAX_STEPS
                && pages.end() == page.base().raw()
                && let Ok(at) = IpaRange::from_bounds(at.base().raw(), part.end())
                && let Ok(pages) = PhysRange::from_bounds(pages.base().raw(), page.end())
            {
                run = Some((at, pages));
                return ControlFlow::Continue(());
            }
            if let Some((at, pages)) = run.take() {
                f(at, Place::Pages { pages, by_page: true })?;
            }
            match page {
                Some(page) => run = Some((part, page)),
                None => f(part, place)?,
            }
            ControlFlow::Continue(())
        })?;
        match run {
            Some((at, pages)) => f(at, Place::Pages { pages, by_page: true }),
            None => ControlFlow::Continue(()),
        }
    }

    /// Makes sure that there are tables to take `range`, guest addresses, out of blocks that it cuts.
    fn have_for_cut<M: Machine>(&self, machine: &M, range: IpaRange) -> Result<(), GuestFailure> {
        let needed = self.tables.tables_to_unmap(machine, range, None);
        if needed <= self.spare.available {
            return Ok(());
        }
        let reason = GuestReason::NeedsTables(needed.saturating_sub(self.spare.available));
        Err(GuestFailure { reason, ipa: range.base() })
    }

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

    /// Returns a number of tables that is enough to map at `to` what is mapped at `from`, and to unmap it there.
    fn tables_to_move<M: Machine>(&mut self, machine: &M, from: IpaRange, to: IpaRange) -> usize {
        let mut by_leaf = 0_usize;
        self.for_each_leaf_moved(machine, from, to, &mut |guest, part, pages| {
            let needed = guest.tables.tables_to_map(machine, part, pages.base(), Stage2Usage::Memory);
            by_leaf = by_leaf.saturating_add(needed);
        });
        // Tables that neighbours have in common were counted more than once; as pages, there are no more than this.
        let unaligned =
            PhysAddr::from_bits_truncating(PAGE_SIZE.wrapping_add(to.base().raw() & BLOCK_SIZE.wrapping_sub(1)));
        let by_page = self.tables.tables_to_map(machine, to, unaligned, Stage2Usage::Memory);
        by_leaf.min(by_page).saturating_add(self.tables.tables_to_unmap(machine, from, None))
    }
}
