//! All of memory behind one lock.

use core::{mem, ops::DerefMut};

use ravelin_memory::{HypAddr, Level, PhysAddr, PhysRange};
use ravelin_pgtable::{El2, El2Usage, Flush, Hint, Machine, PageTable, Stage2, TablePool};
use ravelin_sync::TicketMutex;

use crate::{
    HOST_RESERVE,
    counts::Counts,
    entry::{Entry, State},
    held::Held,
    step::{El2Change, Step},
    table::{OwnershipTable, RamRange},
};

/// Who owns memory and what is mapped: the ownership table, the host's stage 2, the EL2 stage 1 and the tables for both.
///
/// One lock guards all of it; no method calls out while it is held, but for the machine, the pool, and closures of which it says
/// that they must not call methods of this.
pub struct Memory<'a, P> {
    inner: TicketMutex<Inner<'a, P>>,
}

pub(crate) struct Inner<'a, P> {
    pub(crate) table: OwnershipTable<'a>,
    pub(crate) host: PageTable<Stage2>,
    pub(crate) el2: PageTable<El2>,
    pub(crate) pool: P,
    pub(crate) counts: Counts,
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
    /// Joins the ownership table, an empty host stage 2, the EL2 stage 1 that is in use and the pool for both.
    ///
    /// None of the pages that the host owns by `table` is mapped in `el2`.
    #[must_use]
    pub fn new(table: OwnershipTable<'a>, host: PageTable<Stage2>, el2: PageTable<El2>, pool: P) -> Self {
        let counts = table.first_counts();
        Self { inner: TicketMutex::new(Inner { table, host, el2, pool, counts }) }
    }

    /// Returns the EL2 stage 1 and the pool, for mappings of what the hypervisor owns, before this is shared with other
    /// CPUs.
    pub fn el2(&mut self) -> (&mut PageTable<El2>, &mut P) {
        let inner = self.inner.get_mut();
        (&mut inner.el2, &mut inner.pool)
    }

    /// Lends pages of the host to the hypervisor; the host keeps its access. They may be pinned then. Costs no TLB
    /// maintenance.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] unless the host owns every page and shares it with nobody.
    pub fn share<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.lock(machine).take(machine, range, &Step::SHARE)
    }

    /// Ends what [`Memory::share`] began.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] for a page that is not shared; [`Reason::Busy`] for one that is pinned.
    pub fn unshare<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.lock(machine).take(machine, range, &Step::UNSHARE)
    }

    /// Makes pages of the host the hypervisor's, with their contents. They are mapped in EL2 for reading and writing, and
    /// the host can no longer access them.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] unless the host owns every page and shares it with nobody;
    /// [`Reason::NoMemory`].
    pub fn donate<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.lock(machine).take(machine, range, &Step::DONATE)
    }

    /// Returns donated pages to the host, scrubbed.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] for a page that the host has not donated; [`Reason::Busy`] for one in use;
    /// [`Reason::NoMemory`] if a large mapping of EL2 would have to be split.
    pub fn take_back<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.lock(machine).take(machine, range, &Step::TAKE_BACK)
    }

    /// Pins shared pages once more. While a page is pinned the host can neither unshare it nor give it away, and it is
    /// mapped in EL2 for reading and writing, but not for execution.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] for a page that is not shared; [`Reason::PinLimit`]; [`Reason::NoMemory`].
    pub fn pin<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.lock(machine).take(machine, range, &Step::PIN)
    }

    /// Undoes one [`Memory::pin`] of each page.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] for a page that is not pinned; [`Reason::NoMemory`] if a large mapping of
    /// EL2 would have to be split.
    pub fn unpin<M: Machine>(&self, machine: &M, range: PhysRange) -> Result<(), Failure> {
        self.lock(machine).take(machine, range, &Step::UNPIN)
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
        self.lock(machine).take(machine, PhysRange::single(page), &Step::BORROW)
    }

    /// Ends what [`Memory::borrow_from_host`] began, which is always possible. The contents stay.
    ///
    /// # Errors
    ///
    /// [`Reason::NotRam`]; [`Reason::Denied`] for a page that is not borrowed.
    pub fn return_to_host<M: Machine>(&self, machine: &M, page: PhysAddr) -> Result<(), Failure> {
        self.lock(machine).take(machine, PhysRange::single(page), &Step::RETURN)
    }

    /// Runs `f` while nothing is mapped or unmapped.
    ///
    /// Whoever accesses a page through the EL2 stage 1 does it in here, because another CPU may be taking a neighbour out
    /// of the same block mapping, which breaks the block for a moment. `f` must not call methods of this.
    pub fn with_stable_map<T>(&self, f: impl FnOnce() -> T) -> T {
        let _guard = self.inner.lock();
        f()
    }

    /// Returns what the page that `addr` lies in is to the host.
    #[must_use]
    pub fn page_state(&self, addr: PhysAddr) -> PageReport {
        let Some(entry) = self.inner.lock().table.entry(addr.page()) else {
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
    pub fn counts(&self) -> Counts {
        let inner = self.inner.lock();
        Counts {
            host_tables: inner.host.tables(),
            el2_tables: inner.el2.tables(),
            free_tables: inner.pool.available(),
            ..inner.counts
        }
    }

    /// Tells a trace which roots the lock guards.
    pub fn announce<M: Machine>(&self, machine: &M) {
        let inner = self.lock(machine);
        let lock = inner.host.root();
        inner.host.announce(machine, lock);
        machine.hint(Hint::RootLock { root: inner.el2.root(), lock });
    }

    pub(crate) fn lock<M: Machine>(&self, machine: &M) -> impl DerefMut<Target = Inner<'a, P>> {
        let guard = self.inner.lock();
        let lock = guard.host.root();
        Held::new(guard, machine, lock)
    }

    /// The same for what has nothing to do with tables, and no machine.
    pub(crate) fn lock_entries(&self) -> impl DerefMut<Target = Inner<'a, P>> {
        self.inner.lock()
    }
}

impl<P: TablePool> Inner<'_, P> {
    /// Takes `step` for all pages of `range` or, if that is not possible, for none.
    pub(crate) fn take<M: Machine>(&mut self, machine: &M, range: PhysRange, step: &Step) -> Result<(), Failure> {
        let ram = self.table.check(range, step)?;
        if step.el2 != El2Change::None {
            self.reserve(machine, ram, range, step)?;
            // Nothing fails from here on.
            self.change_el2(machine, ram, range, step);
        }
        let mut flush = Flush::new();
        if step.takes_from_host() {
            flush = self.host.unmap(machine, &mut self.pool, range.identity_ipa(), flush);
        }
        let Self { table, host, pool, .. } = self;
        table.commit(ram, step, &mut |block| rejoin(machine, host, pool, block, &mut flush));
        self.flush_host(machine, flush);
        self.counts.moved(step.before, step.after, range.pages());
        Ok(())
    }

    /// Sets the entries of `run`, which is RAM, to `entry` and what follows it. Adds what that owes to `flush`, of the host.
    pub(crate) fn assign<M: Machine>(
        &mut self,
        machine: &M,
        run: PhysRange,
        entry: Entry,
        mut flush: Flush<Stage2>,
    ) -> Flush<Stage2> {
        let Self { table, host, pool, counts, .. } = self;
        table.assign(run, entry, &mut |old, pages| counts.moved(old, entry.state(), pages), &mut |block| {
            rejoin(machine, host, pool, block, &mut flush)
        });
        flush
    }

    /// Makes sure that the pool has the tables that `step` takes for the EL2 stage 1, and leaves enough to the host.
    fn reserve<M: Machine>(
        &mut self,
        machine: &M,
        ram: RamRange,
        range: PhysRange,
        step: &Step,
    ) -> Result<(), Failure> {
        let available = self.pool.available();
        if PageTable::<El2>::most_tables(range.pages()).saturating_add(HOST_RESERVE) <= available {
            return Ok(());
        }
        let mut needed = 0_usize;
        let mut after = None;
        let Self { table, el2, .. } = self;
        let mut plan = |run: PhysRange| {
            let va = run.identity_va();
            let tables = match step.el2 {
                El2Change::None => 0,
                El2Change::Map | El2Change::MapFirst => {
                    // Between two runs lie pages that are mapped already, so the runs have no new table in common.
                    el2.tables_to_map(machine, va, run.base(), El2Usage::Data)
                }
                El2Change::Unmap | El2Change::Scrub | El2Change::UnmapLast => el2.tables_to_unmap(machine, va, after),
            };
            needed = needed.saturating_add(tables);
            after = Some(HypAddr::from_bits_truncating(va.end().wrapping_sub(1)));
        };
        match step.el2 {
            El2Change::None => {}
            El2Change::Map | El2Change::Unmap | El2Change::Scrub => plan(range),
            El2Change::MapFirst | El2Change::UnmapLast => table.el2_runs(ram, step, &mut plan),
        }
        if needed == 0 {
            return Ok(());
        }
        // The host's own tables count as left to it: it can be made to build them anew.
        if needed.saturating_add(HOST_RESERVE) > available.saturating_add(self.host.tables()) {
            return Err(Failure { reason: Reason::NoMemory, page: range.base() });
        }
        if needed > available {
            self.evict_host(machine);
        }
        Ok(())
    }

    /// Does to the EL2 stage 1 what `step` asks for.
    fn change_el2<M: Machine>(&mut self, machine: &M, ram: RamRange, range: PhysRange, step: &Step) {
        let Self { table, el2, pool, .. } = self;
        let mut flush = Flush::new();
        let mut change = |run: PhysRange| match step.el2 {
            El2Change::None => {}
            El2Change::Map | El2Change::MapFirst => {
                // The tables have been reserved, and RAM lies in the address space.
                let mapped = el2.map(machine, pool, run.identity_va(), run.base(), El2Usage::Data);
                debug_assert_eq!(mapped, Ok(()));
            }
            El2Change::Scrub => {
                machine.scrub(run);
                flush = el2.unmap(machine, pool, run.identity_va(), mem::take(&mut flush));
            }
            El2Change::Unmap | El2Change::UnmapLast => {
                flush = el2.unmap(machine, pool, run.identity_va(), mem::take(&mut flush));
            }
        };
        match step.el2 {
            El2Change::None => {}
            El2Change::Map | El2Change::Unmap | El2Change::Scrub => change(range),
            El2Change::MapFirst | El2Change::UnmapLast => table.el2_runs(ram, step, &mut change),
        }
        self.flush_el2(machine, flush);
    }

    pub(crate) fn flush_el2<M: Machine>(&mut self, machine: &M, flush: Flush<El2>) {
        if self.el2.flush(machine, &mut self.pool, flush) {
            self.counts.el2_invalidations = self.counts.el2_invalidations.wrapping_add(1);
        }
    }

    /// Drops the whole host stage 2; faults fill it again.
    pub(crate) fn evict_host<M: Machine>(&mut self, machine: &M) {
        let flush = self.host.unmap_all(machine, &mut self.pool, Flush::new());
        self.flush_host(machine, flush);
        self.counts.evictions = self.counts.evictions.wrapping_add(1);
    }

    pub(crate) fn flush_host<M: Machine>(&mut self, machine: &M, flush: Flush<Stage2>) {
        if self.host.flush(machine, &mut self.pool, flush) {
            self.count_stage2_invalidation();
        }
    }

    pub(crate) const fn count_stage2_invalidation(&mut self) {
        self.counts.stage2_invalidations = self.counts.stage2_invalidations.wrapping_add(1);
    }
}

/// Takes the host's last-level table of `block` out of the way, so that the next fault maps the block as one.
fn rejoin<M: Machine, P: TablePool>(
    machine: &M,
    host: &mut PageTable<Stage2>,
    pool: &mut P,
    block: PhysRange,
    flush: &mut Flush<Stage2>,
) {
    let block = block.identity_ipa();
    if host.lookup(machine, block.base()).level == Level::L3 {
        *flush = host.unmap(machine, pool, block, mem::take(flush));
    }
}
