//! All of memory.

use arrayvec::ArrayVec;
use ravelin_memory::{ADDRESS_BITS, PhysAddr, PhysRange};
use ravelin_pgtable::{El2, Hint, Machine, MapError, PageTable, Stage2, TablePool};
use ravelin_sync::TicketMutex;

use crate::{
    counts::Counts,
    entry::{Entry, State},
    locked::{Locked, Mask},
    pool::Pool,
    region::Region,
    step::Step,
    table::OwnershipTable,
};

/// The most parts of memory with locks of their own.
pub(crate) const MAX_REGIONS: usize = 16;

/// With what is in none of them.
pub(crate) const MAX_LOCKS: usize = MAX_REGIONS.saturating_add(1);

/// The least and the largest size of a region, as binary logarithms: what a descriptor of level 1 translates, and what a table of
/// level 1 does.
const REGION_SHIFTS: core::ops::RangeInclusive<u32> = 30..=39;

/// Who owns memory and what is mapped: the ownership table, the host's stage 2, the EL2 stage 1 and the tables for both.
///
/// It consists of regions, each with a lock, so that CPUs that work in different ones do not wait for each other. An operation
/// takes the locks of all regions that it has to do with, in ascending order and behind that of the guest, before it checks
/// anything there, and keeps them to its end. No method calls out while it holds any, but for the machine, the pool, and closures of
/// which it says that they must not call methods of this.
pub struct Memory<'a, P> {
    /// Where each region but the first is, in ascending order. All else is the first one's: what is not RAM, and RAM for which there
    /// are not enough regions.
    spans: ArrayVec<PhysRange, MAX_REGIONS>,
    regions: [Option<TicketMutex<Region<'a>>>; MAX_LOCKS],
    /// The lock that comes last.
    pool: TicketMutex<Pool<P>>,
}

/// Why a transition was refused, and where. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason} at {page}")]
pub struct Failure {
    /// Why.
    pub reason: Reason,
    /// The first page that stands in the way; the first of the range for [`Reason::NoMemory`].
    pub page: PhysAddr,
}

/// Why a transition was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The page is not RAM.
    #[error("not RAM")]
    NotRam,
    /// The page has another owner or is in another state.
    #[error("wrong owner or state")]
    Denied,
    /// The page is pinned.
    #[error("pinned")]
    Busy,
    /// The page is pinned 4095 times already.
    #[error("too many pins")]
    PinLimit,
    /// Too few translation tables are left, apart from those kept for the host.
    #[error("out of translation tables")]
    NoMemory,
}

/// What a page is to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// Not the host's, or not RAM.
    NoPage,
    /// The host's alone.
    Owned,
    /// The host's, shared with the hypervisor, borrowed by it or lent to an ordinary guest.
    SharedOwned,
    /// A guest's, which the host has claimed.
    SharedBorrowed,
}

/// What the host may know of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageReport {
    /// The host's side of the page.
    pub state: HostState,
    /// How often the hypervisor has pinned it; at most 4095.
    pub pins: u64,
}

impl<'a, P: TablePool> Memory<'a, P> {
    /// Joins the ownership table, an empty host stage 2, the EL2 stage 1 that is in use and the pool for both, with one lock.
    ///
    /// None of the pages that the host owns by `table` is mapped in `el2`.
    pub fn new(table: OwnershipTable<'a>, host: PageTable<Stage2>, el2: PageTable<El2>, pool: P) -> Self {
        let mut regions = [const { None }; MAX_LOCKS];
        let [first, ..] = &mut regions;
        *first = Some(TicketMutex::new(Region::new(0, None, table, host, el2)));
        Self { spans: ArrayVec::new_const(), regions, pool: TicketMutex::new(Pool::new(pool)) }
    }

    /// Gives each GiB of RAM a lock of its own, or more of it where that would be too many. This is done once, before the host runs.
    /// It is not part of [`Memory::new`] because that has the place for only one of these on a stack: it is large.
    ///
    /// # Errors
    ///
    /// [`MapError::OutOfTables`], of which a region takes up to two.
    pub fn divide<M: Machine>(&mut self, machine: &M) -> Result<(), MapError> {
        let Self { spans, regions: [first, rest @ ..], pool } = self;
        let pool = pool.get_mut().pages_mut();
        if let Some(Region { table, host, el2, counts, .. }) = first.as_mut().map(TicketMutex::get_mut) {
            let few = |shift: &u32| table.parts(*shift).take(MAX_REGIONS.saturating_add(1)).count() <= MAX_REGIONS;
            let shift = REGION_SHIFTS.clone().find(few).unwrap_or(*REGION_SHIFTS.end());
            *spans = table.parts(shift).take(MAX_REGIONS).collect();
            for (index, (span, region)) in (1..).zip(spans.iter().zip(rest)) {
                // A stage 2 of few address bits need not have all that a region could.
                let end = span.end().min(host.geometry().end());
                let part = PhysRange::from_bounds(span.base().raw(), end).map_err(|_| MapError::OutOfRange)?;
                let host = host.part(machine, pool, part.identity_ipa())?;
                let el2 = el2.part(machine, pool, span.identity_va())?;
                let table = table.split_off_below(span.end());
                *region = Some(TicketMutex::new(Region::new(index, Some(*span), table, host, el2)));
            }
            *counts = table.first_counts();
        }
        Ok(())
    }

    /// Lends pages of the host to the hypervisor; the host keeps its access. They may be pinned then. Costs no TLB
    /// maintenance.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] unless the host owns every page and shares it with nobody.
    pub fn share<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.take(machine, range, &Step::SHARE)
    }

    /// Ends what [`Memory::share`] began.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] for a page that is not shared; [`Reason::Busy`] for one that is pinned.
    pub fn unshare<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.take(machine, range, &Step::UNSHARE)
    }

    /// Makes pages of the host the hypervisor's, with their contents. They are mapped in EL2 for reading and writing, and
    /// the host can no longer access them.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] unless the host owns every page and shares it with nobody;
    /// [`Reason::NoMemory`].
    pub fn donate<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.take(machine, range, &Step::DONATE)
    }

    /// Returns donated pages to the host, scrubbed.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] for a page that the host has not donated; [`Reason::Busy`] for one in use;
    /// [`Reason::NoMemory`] if a large mapping of EL2 would have to be split.
    pub fn take_back<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.take(machine, range, &Step::TAKE_BACK)
    }

    /// Pins shared pages once more. While a page is pinned the host can neither unshare it nor give it away, and it is
    /// mapped in EL2 for reading and writing, but not for execution.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] for a page that is not shared; [`Reason::PinLimit`]; [`Reason::NoMemory`].
    pub fn pin<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.take(machine, range, &Step::PIN)
    }

    /// Undoes one [`Memory::pin`] of each page.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] for a page that is not pinned; [`Reason::NoMemory`] if a large mapping of
    /// EL2 would have to be split.
    pub fn unpin<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.take(machine, range, &Step::UNPIN)
    }

    /// Borrows a page of the host's for the hypervisor's own use. It is mapped in EL2 for reading and writing, and the host
    /// keeps its access. Unlike a pin, which has no owner, the host cannot end this: every transition of its own is
    /// [`Reason::Denied`], unshare and unpin too, until [`Memory::return_to_host`].
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] unless the host owns the page and shares it with nobody;
    /// [`Reason::NoMemory`].
    pub fn borrow_from_host<M: Machine>(&self, machine: &M, page: PhysAddr) -> Result<(), Failure> {
        self.take(machine, PhysRange::single(page), &Step::BORROW)
    }

    /// Ends what [`Memory::borrow_from_host`] began, which is always possible. The contents stay.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] for a page that is not borrowed.
    pub fn return_to_host<M: Machine>(&self, machine: &M, page: PhysAddr) -> Result<(), Failure> {
        self.take(machine, PhysRange::single(page), &Step::RETURN)
    }

    /// Runs `f` while nothing is mapped or unmapped around `page`.
    ///
    /// Whoever accesses a page through the EL2 stage 1 does it in here, because another CPU may be taking a neighbour out
    /// of the same block mapping, which breaks the block for a moment. `f` must not call methods of this.
    pub fn with_stable_map<T>(&self, page: PhysAddr, f: impl FnOnce() -> T) -> T {
        self.with_region(page, |_| f())
    }

    /// Returns what the page that `addr` lies in is to the host.
    #[must_use]
    pub fn page_state(&self, addr: PhysAddr) -> PageReport {
        let Some(entry) = self.entry(addr) else {
            return PageReport { state: HostState::NoPage, pins: 0 };
        };
        let state = match entry.state() {
            State::HOST_OWNED => HostState::Owned,
            State::HOST_SHARED | State::HOST_BORROWED | State::HOST_LENT => HostState::SharedOwned,
            State::GUEST_CLAIMED => HostState::SharedBorrowed,
            _ => return PageReport { state: HostState::NoPage, pins: 0 },
        };
        PageReport { state, pins: entry.pins() }
    }

    /// Returns the counts as they are now.
    #[must_use]
    pub fn counts<M: Machine>(&self, machine: &M) -> Counts {
        let locked = self.lock(machine, Mask::ALL);
        let mut counts = Counts { free_tables: locked.tables.available(), ..Counts::default() };
        locked.regions().for_each(|region| counts.add(region));
        counts
    }

    /// Tells a trace which tables the locks guard.
    pub fn announce<M: Machine>(&self, machine: &M) {
        let locked = self.lock(machine, Mask::ALL);
        for region in locked.regions() {
            let lock = region.lock_name();
            match self.spans.get(region.index.wrapping_sub(1)) {
                Some(span) => machine.hint(Hint::RegionLock { lock, base: span.base(), size: span.size() }),
                None => {
                    region.host.announce(machine, lock);
                    machine.hint(Hint::RootLock { root: region.el2.root(), lock });
                }
            }
        }
    }

    /// Takes `step` for all pages of `range` or, if that is not possible, for none.
    pub(crate) fn take<M: Machine>(&self, machine: &M, range: PhysRange, step: &Step) -> Result<(), Failure> {
        self.with(machine, self.mask(range), |locked| locked.take(machine, range, step))
    }

    /// Cuts a range at the borders of regions.
    pub(crate) fn cut(&self, range: PhysRange) -> Cut<'_> {
        Cut { spans: &self.spans, rest: Some(range) }
    }

    /// Returns the region with this number.
    pub(crate) fn region(&self, index: usize) -> Option<&TicketMutex<Region<'a>>> {
        self.regions.get(index)?.as_ref()
    }

    /// Returns how many regions there are.
    pub(crate) fn region_count(&self) -> usize {
        self.spans.len().saturating_add(1)
    }

    /// Calls `f` with where pages for tables come from. It must not call methods of this.
    pub fn with_pool<R>(&self, f: impl FnOnce(&mut P) -> R) -> R {
        f(self.pool.lock().pages_mut())
    }

    pub(crate) const fn pool(&self) -> &TicketMutex<Pool<P>> {
        &self.pool
    }

    /// Calls `f` with all addresses that only the first region has.
    pub(crate) fn between(&self, f: &mut dyn FnMut(PhysRange)) {
        let ends = self.spans.iter().map(|span| span.end());
        let bases = self.spans.iter().map(|span| span.base().raw()).chain([1 << ADDRESS_BITS]);
        [0].into_iter().chain(ends).zip(bases).flat_map(|(end, base)| PhysRange::from_bounds(end, base)).for_each(f);
    }

    /// Returns the number of the region in which an address lies.
    pub(crate) fn index_of(&self, addr: PhysAddr) -> usize {
        self.spans.iter().zip(1..).find(|(span, _)| span.contains(addr)).map_or(0, |(_, index)| index)
    }

    /// Returns the regions that `range` lies in.
    pub(crate) fn mask(&self, range: PhysRange) -> Mask {
        // Most lie in one.
        match self.spans.iter().zip(1..).find(|(span, _)| span.covers(&range)) {
            Some((_, index)) => Mask::NONE.with(index),
            None => self.cut(range).fold(Mask::NONE, |mask, (index, _)| mask.with(index)),
        }
    }

    /// Takes the locks of these regions.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "not to copy what it returns, which is large")]
    pub(crate) fn lock<'m, M: Machine>(&'m self, machine: &'m M, mask: Mask) -> Locked<'m, 'a, P, M> {
        let mut locked = Locked::new(self, machine);
        locked.take_locks(mask);
        locked
    }

    /// Does `f` with the locks of these regions. If it finds that it must drop the host's mappings, does it again with all locks:
    /// it has changed nothing then.
    pub(crate) fn with<M: Machine, T>(
        &self,
        machine: &M,
        mut mask: Mask,
        mut f: impl FnMut(&mut Locked<'_, 'a, P, M>) -> T,
    ) -> T {
        loop {
            let mut locked = Locked::new(self, machine);
            locked.take_locks(mask);
            let result = f(&mut locked);
            if !locked.is_short() {
                return result;
            }
            mask = Mask::ALL;
        }
    }

    /// Does `f` with the region in which `page` lies: for what has nothing to do with tables, and no machine.
    pub(crate) fn with_region<T>(&self, page: PhysAddr, f: impl FnOnce(Option<&Region<'a>>) -> T) -> T {
        let index = self.index_of(page);
        let guard = self.region(index).map(TicketMutex::lock);
        f(guard.as_deref())
    }

    /// Returns the entry of the page that `addr` lies in, if it is RAM.
    pub(crate) fn entry(&self, addr: PhysAddr) -> Option<Entry> {
        self.with_region(addr, |region| region?.table.entry(addr.page()))
    }
}

/// The parts of a range and the numbers of the regions that they lie in, in ascending order of addresses.
#[derive(Clone)]
pub(crate) struct Cut<'m> {
    spans: &'m [PhysRange],
    rest: Option<PhysRange>,
}

impl Iterator for Cut<'_> {
    type Item = (usize, PhysRange);

    fn next(&mut self) -> Option<Self::Item> {
        let range = self.rest.take()?;
        let base = range.base().raw();
        let next = self.spans.iter().zip(1..).find(|(span, _)| base < span.end());
        let (index, end) = match next {
            Some((span, index)) if span.base().raw() <= base => (index, span.end()),
            Some((span, _)) => (0, span.base().raw()),
            None => (0, range.end()),
        };
        if end >= range.end() {
            return Some((index, range));
        }
        self.rest = PhysRange::from_bounds(end, range.end()).ok();
        Some((index, PhysRange::from_bounds(base, end).unwrap_or(range)))
    }
}
