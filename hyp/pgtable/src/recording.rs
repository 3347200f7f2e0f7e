//! A machine for tests: tables in a map, and a TLB that remembers everything that it could have cached.
//!
//! A table walker may cache any valid descriptor that it can reach, at any time, until that is invalidated. So the moment
//! a reachable valid descriptor is overwritten it becomes *stale*, and stays so until the write has been published and
//! after that the right invalidation has been done. The machine panics as soon as the order is broken:
//!
//! * a valid descriptor replaced by another valid one;
//! * a valid descriptor written where a stale one may still be cached;
//! * an invalidation of what has not been published, or a table linked whose contents have not been;
//! * a table freed, cleared or linked again while it can be reached or is cached;
//! * access to a table that was never handed out, or has been given back.
//!
//! A page that the EL2 stage 1 maps for data becomes a table when it is first used as one, and stops being one when it is
//! scrubbed.
//!
//! What only shows at the end of an operation is found by [`RecordingMachine::assert_quiescent`].

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ravelin_memory::{Addr, HypRange, IpaRange, Level, PAGE_SIZE, PageRange, PhysAddr, PhysRange};

use crate::{
    El2, El2Usage, Geometry, Machine, Regime, TablePool, Vmid, Vttbr,
    descriptor::{Descriptor, Kind},
};

/// Which tables an address is translated by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The host's stage 2.
    Stage2,
    /// The stage 2 of the guest with this VMID.
    Guest(Vmid),
    /// The EL2 stage 1.
    El2,
}

/// Something done to the machine or the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A descriptor was written.
    Write {
        /// The table.
        table: PhysAddr,
        /// The entry.
        index: usize,
        /// The descriptor.
        value: u64,
    },
    /// A table was zeroed.
    Clear(PhysAddr),
    /// Writes were published.
    Publish,
    /// A range of the stage 2 of a VMID was invalidated; the flag says that table descriptors were not.
    InvalidateStage2(Vmid, IpaRange, bool),
    /// All of the stage 2 of a VMID was invalidated.
    InvalidateStage2All(Vmid),
    /// A range of the EL2 stage 1 was invalidated.
    InvalidateEl2(HypRange),
    /// Pages were scrubbed.
    Scrub(PhysRange),
    /// Pages were cleaned.
    Clean(PhysRange),
    /// A table was taken from the pool.
    Allocate(PhysAddr),
    /// A table was given back to the pool.
    Free(PhysAddr),
}

/// A physical address and the attribute bits of the leaf that led to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Translation {
    /// Where the address leads.
    pub to: PhysAddr,
    /// Attribute bits of the leaf.
    pub attributes: u64,
}

/// What the tables have at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing that translates it.
    Nothing,
    /// Poison.
    Poisoned,
    /// This translation, and for the addresses behind it what follows.
    Leaf(Translation),
}

/// Consecutive addresses of which the tables say the same.
struct Run {
    range: Range<u64>,
    seen: Seen,
}

impl Run {
    /// Adds the run behind this one, if the two are one.
    fn join(&mut self, next: &Self) -> bool {
        let joins = match (self.seen, next.seen) {
            (Seen::Leaf(first), Seen::Leaf(second)) => {
                first.attributes == second.attributes
                    && first.to.raw() + (self.range.end - self.range.start) == second.to.raw()
            }
            (first, second) => first == second,
        };
        if joins {
            self.range.end = next.range.end;
        }
        joins
    }
}

/// A table's entries, by address.
pub type Snapshot = BTreeMap<u64, Vec<u64>>;

/// What a table translates, if a walker can get there.
#[derive(Clone, Copy)]
struct Place {
    stage: Stage,
    level: Level,
    base: u64,
    /// Whether valid descriptors in memory lead there; otherwise only cached ones do.
    linked: bool,
}

struct Table {
    entries: Vec<u64>,
    place: Option<Place>,
    unpublished: bool,
    /// Entries that walkers may not see yet, although they have been written.
    unseen: BTreeSet<usize>,
    root: bool,
    /// Whether it is a page of EL2's that may wait to be used.
    spare: bool,
}

impl Table {
    /// A table that holds what looks like valid descriptors, to find one that is used without having been written.
    fn unwritten(spare: bool) -> Self {
        let unseen = BTreeSet::new();
        Self { entries: vec![0xdead_b000 | 3; 512], place: None, unpublished: false, unseen, root: false, spare }
    }
}

impl From<Vttbr> for Stage {
    fn from(tree: Vttbr) -> Self {
        if tree.vmid == Vmid::HOST { Self::Stage2 } else { Self::Guest(tree.vmid) }
    }
}

/// A descriptor that is no longer in memory, or no longer linked, but may be cached.
struct Stale {
    stage: Stage,
    start: u64,
    end: u64,
    level: Level,
    descriptor: Descriptor,
    published: bool,
}

#[derive(Default)]
struct State {
    tables: BTreeMap<u64, Table>,
    roots: Vec<(Stage, PhysAddr, Geometry)>,
    stale: Vec<Stale>,
    free: Vec<u64>,
    in_use: usize,
    contents: BTreeMap<u64, u64>,
    log: Vec<Op>,
}

/// The machine of the [module](self). Clones are the same machine.
#[derive(Clone, Default)]
pub struct RecordingMachine(Arc<Mutex<State>>);

/// A pool of tables of a [`RecordingMachine`], which watches what happens to them.
pub struct RecordingPool(RecordingMachine);

impl RecordingMachine {
    /// Returns a machine without tables.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Has the hardware walk the root tables at `root` for `stage`, and makes zeroed ones where there are none yet.
    pub fn add_root(&self, stage: Stage, root: PhysAddr, geometry: Geometry) {
        let mut state = self.state();
        for page in 0..geometry.root_pages() {
            let base = page << geometry.table_shift();
            let place = Place { stage, level: geometry.start(), base, linked: true };
            let new = Table { entries: vec![0; 512], ..Table::unwritten(false) };
            let table = state.tables.entry(root.raw() + page * PAGE_SIZE).or_insert(new);
            assert!(table.place.is_none() && !table.unpublished, "root at a table's place, or not published");
            assert!(table.entries.iter().all(|&bits| bits == 0), "the root is not empty");
            (table.place, table.root) = (Some(place), true);
        }
        state.roots.push((stage, root, geometry));
    }

    /// Returns a pool of the pages of `range`.
    #[must_use]
    pub fn pool(&self, range: PhysRange) -> RecordingPool {
        // So that the lowest is handed out first.
        self.state().free.extend(range.iter().map(Addr::raw).collect::<Vec<_>>().into_iter().rev());
        RecordingPool(self.clone())
    }

    /// Sets what the page at `page` holds: one number stands for its contents. Zero is a scrubbed page.
    pub fn poke(&self, page: PhysAddr, contents: u64) {
        self.state().contents.insert(page.raw(), contents);
    }

    /// Returns what the page at `page` holds.
    #[must_use]
    pub fn peek(&self, page: PhysAddr) -> u64 {
        self.state().contents.get(&page.raw()).copied().unwrap_or_default()
    }

    /// Returns what was done since the last call.
    #[must_use]
    pub fn take_log(&self) -> Vec<Op> {
        std::mem::take(&mut self.state().log)
    }

    /// Returns all tables that are in use.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.state().tables.iter().map(|(&addr, table)| (addr, table.entries.clone())).collect()
    }

    /// Returns everything that any TLB or walker could answer for `addr`, `None` being a fault.
    #[must_use]
    pub fn translate(&self, stage: Stage, addr: u64) -> BTreeSet<Option<Translation>> {
        self.state().translate(stage, addr)
    }

    /// Calls `f` with what the tables of `stage` say of `range`, in ascending order and in runs of one kind. `f` must not call
    /// methods of this.
    ///
    /// # Panics
    ///
    /// If a TLB might answer otherwise for an address in `range`.
    pub fn for_each_run(&self, stage: Stage, range: Range<u64>, f: &mut dyn FnMut(Range<u64>, Seen)) {
        let state = self.state();
        let cached = |stale: &&Stale| stale.stage == stage && stale.start < range.end && range.start < stale.end;
        if let Some(stale) = state.stale.iter().find(cached) {
            panic!("missing flush: {:?} of {:#x} may still be cached", stale.descriptor, stale.start);
        }
        let mut last = None::<Run>;
        for &(_, root, geometry) in state.roots.iter().filter(|root| root.0 == stage) {
            for page in 0..geometry.root_pages() {
                let base = page << geometry.table_shift();
                let table = PhysAddr::from_bits_truncating(root.raw() + page * PAGE_SIZE);
                state.runs(table, geometry.start(), base, &range, &mut |run| {
                    if !last.as_mut().is_some_and(|last| last.join(&run))
                        && let Some(done) = last.replace(run)
                    {
                        f(done.range, done.seen);
                    }
                });
            }
        }
        if let Some(Run { range, seen }) = last {
            f(range, seen);
        }
    }

    /// Panics unless all writes are published, nothing stale is cached, every table in use is linked, and table
    /// descriptors note the right number of entries: none only of a guest's last-level table, from which pages were moved.
    pub fn assert_quiescent(&self) {
        let state = self.state();
        if let Some(stale) = state.stale.first() {
            panic!("missing flush: {:?} of {:#x} may still be cached", stale.descriptor, stale.start);
        }
        for (&addr, table) in &state.tables {
            let Some(place) = table.place else {
                if table.spare {
                    continue;
                }
                panic!("leak: table {addr:#x} is in use but not linked");
            };
            assert!(place.linked, "leak: table {addr:#x} is in use but not linked");
            let published = !table.unpublished && table.unseen.is_empty();
            assert!(published, "missing publish: table {addr:#x} has unpublished writes");
            for descriptor in table.entries.iter().map(|&bits| Descriptor::from_bits(bits)) {
                if let Kind::Table(next) = descriptor.kind(place.level)
                    && !descriptor.is_kept()
                {
                    let used = state.table(next).entries.iter().filter(|&&bits| bits != 0).count();
                    assert_eq!(descriptor.entries(), used as u64, "entries noted for table {next}");
                    let may_be_empty = place.level == Level::L2 && matches!(place.stage, Stage::Guest(_));
                    assert!(used != 0 || may_be_empty, "table {next} is empty");
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn translate(&self, stage: Stage, addr: u64) -> BTreeSet<Option<Translation>> {
        let mut answers = BTreeSet::new();
        for &(_, root, geometry) in self.roots.iter().filter(|root| root.0 == stage) {
            if addr < geometry.end() {
                self.walk(geometry.root_table(root, addr), geometry.start(), addr, &mut answers);
            } else {
                answers.insert(None);
            }
        }
        for stale in self.stale.iter().filter(|stale| stale.stage == stage) {
            if (stale.start..stale.end).contains(&addr) {
                self.follow(stale.descriptor, stale.level, addr, &mut answers);
            }
        }
        answers
    }

    /// Calls `f` with what the entries of a table at `base` say of those of their addresses that are in `range`.
    fn runs(&self, table: PhysAddr, level: Level, base: u64, range: &Range<u64>, f: &mut dyn FnMut(Run)) {
        let (size, entries) = (level.size(), &self.table(table).entries);
        let first = range.start.saturating_sub(base) / size;
        let behind = range.end.saturating_sub(base).div_ceil(size).min(512);
        for index in first..behind {
            let start = base + index * size;
            let part = start.max(range.start)..(start + size).min(range.end);
            let descriptor = Descriptor::from_bits(entries[index as usize]);
            let seen = match descriptor.kind(level) {
                Kind::Table(next) => {
                    self.runs(next, level.next().unwrap(), start, range, f);
                    continue;
                }
                Kind::Leaf(to) => Seen::Leaf(Translation {
                    to: PhysAddr::from_bits_truncating(to.raw() + (part.start - start)),
                    attributes: descriptor.attributes(),
                }),
                Kind::Poisoned => Seen::Poisoned,
                Kind::Invalid | Kind::Pending(_) => Seen::Nothing,
            };
            f(Run { range: part, seen });
        }
    }

    /// Whether EL2 maps the page for data, and nothing else may be cached.
    fn is_el2_data(&self, page: PhysAddr) -> bool {
        let data = Translation { to: page, attributes: El2::attributes(El2Usage::Data) };
        self.translate(Stage::El2, page.raw()) == BTreeSet::from([Some(data)])
    }

    /// Makes the page a table, if it is one of EL2's own.
    fn adopt(&mut self, page: PhysAddr) {
        if !self.tables.contains_key(&page.raw()) && self.is_el2_data(page) {
            self.tables.insert(page.raw(), Table::unwritten(true));
        }
    }

    /// Makes a table of EL2's a page like others. Root tables are walked until then.
    fn abandon(&mut self, page: PhysAddr) {
        let Some(table) = self.tables.get(&page.raw()) else { return };
        assert!(table.spare, "{page} is scrubbed, but is the pool's table");
        if table.root {
            assert!(table.entries.iter().all(|&bits| bits == 0), "root {page} is scrubbed, but is not empty");
            self.roots.retain(|&(_, root, _)| root != page);
        } else {
            assert!(table.place.is_none(), "table {page} is scrubbed, but can be reached or is cached");
        }
        self.tables.remove(&page.raw());
    }

    fn table(&self, table: PhysAddr) -> &Table {
        self.tables.get(&table.raw()).unwrap_or_else(|| panic!("access to {table}, which is no table in use"))
    }

    fn table_mut(&mut self, table: PhysAddr) -> &mut Table {
        self.tables.get_mut(&table.raw()).unwrap_or_else(|| panic!("access to {table}, which is no table in use"))
    }

    fn walk(&self, table: PhysAddr, level: Level, addr: u64, answers: &mut BTreeSet<Option<Translation>>) {
        let table = self.table(table);
        let index = (addr >> level.shift()) as usize % 512;
        if table.unpublished || table.unseen.contains(&index) {
            answers.insert(None);
        }
        self.follow(Descriptor::from_bits(table.entries[index]), level, addr, answers);
    }

    fn follow(&self, found: Descriptor, level: Level, addr: u64, answers: &mut BTreeSet<Option<Translation>>) {
        match found.kind(level) {
            Kind::Leaf(to) => {
                let to = Addr::from_bits_truncating(to.raw() | (addr & (level.size() - 1)));
                answers.insert(Some(Translation { to, attributes: found.attributes() }));
            }
            Kind::Table(next) => self.walk(next, level.next().unwrap(), addr, answers),
            Kind::Invalid | Kind::Pending(_) | Kind::Poisoned => {
                answers.insert(None);
            }
        }
    }

    /// Makes `descriptor` stale, and all that it leads to.
    fn make_stale(&mut self, descriptor: Descriptor, level: Level, place: Place, start: u64) {
        let kind = descriptor.kind(level);
        if !matches!(kind, Kind::Leaf(_) | Kind::Table(_)) {
            return;
        }
        let end = start + level.size();
        self.stale.push(Stale { stage: place.stage, start, end, level, descriptor, published: false });
        if let Kind::Table(next) = kind {
            let below = level.next().unwrap();
            let table = self.table_mut(next);
            table.place.as_mut().unwrap().linked = false;
            for (index, bits) in (0..).zip(table.entries.clone()) {
                self.make_stale(Descriptor::from_bits(bits), below, place, start + index * below.size());
            }
        }
    }

    /// Gives the table at `next`, and all that it leads to, its place.
    fn link(&mut self, next: PhysAddr, place: Place) {
        let table = self.table_mut(next);
        assert!(!table.unpublished, "missing publish: {next} is linked before its contents are published");
        assert!(table.place.is_none(), "{next} is linked while it can be reached or is cached");
        table.place = Some(place);
        for (index, bits) in (0..).zip(table.entries.clone()) {
            let base = place.base + index * place.level.size();
            if let Kind::Table(next) = Descriptor::from_bits(bits).kind(place.level) {
                self.link(next, Place { level: place.level.next().unwrap(), base, ..place });
            }
        }
    }

    fn write(&mut self, addr: PhysAddr, index: usize, value: u64) {
        self.adopt(addr);
        self.log.push(Op::Write { table: addr, index, value });
        let table = self.table_mut(addr);
        let old = Descriptor::from_bits(std::mem::replace(&mut table.entries[index], value));
        let new = Descriptor::from_bits(value);
        let Some(place) = table.place else {
            table.unpublished = true;
            return;
        };
        let valid = |descriptor: Descriptor| matches!(descriptor.kind(place.level), Kind::Leaf(_) | Kind::Table(_));
        if !valid(old) && !valid(new) {
            // No walker can tell the one from the other.
            return;
        }
        if valid(old) && valid(new) {
            assert!(
                old.same_for_hardware(new, place.level),
                "missing break: {old:?} replaced by {new:?} in {addr}, entry {index}"
            );
            return;
        }
        table.unseen.insert(index);
        let start = place.base + index as u64 * place.level.size();
        let end = start + place.level.size();
        if valid(old) {
            self.make_stale(old, place.level, place, start);
        }
        if valid(new) {
            assert!(place.linked, "valid descriptor written to {addr}, which is no longer linked");
            let cached = |stale: &Stale| stale.stage == place.stage && stale.start < end && start < stale.end;
            if let Some(stale) = self.stale.iter().find(|&stale| cached(stale)) {
                panic!("missing flush: {new:?} written while {:?} may still be cached", stale.descriptor);
            }
            if let Kind::Table(next) = new.kind(place.level) {
                self.link(next, Place { level: place.level.next().unwrap(), base: start, ..place });
            }
        }
    }

    fn publish(&mut self) {
        self.log.push(Op::Publish);
        for table in self.tables.values_mut() {
            table.unpublished = false;
            table.unseen.clear();
        }
        self.stale.iter_mut().for_each(|stale| stale.published = true);
    }

    fn invalidate(&mut self, stage: Stage, start: u64, end: u64, leaf_only: bool) {
        let mut kept = Vec::new();
        let mut gone = Vec::new();
        for stale in std::mem::take(&mut self.stale) {
            let table = match stale.descriptor.kind(stale.level) {
                Kind::Table(next) => Some(next),
                _ => None,
            };
            if stale.stage != stage || stale.start >= end || start >= stale.end || (leaf_only && table.is_some()) {
                kept.push(stale);
                continue;
            }
            assert!(stale.published, "missing publish: {:?} is invalidated before its removal", stale.descriptor);
            gone.extend(table);
        }
        self.stale = kept;
        for next in gone {
            let refers = |stale: &Stale| stale.descriptor.kind(stale.level) == Kind::Table(next);
            let cached = self.stale.iter().any(refers);
            if let Some(table) = self.tables.get_mut(&next.raw())
                && table.place.is_some_and(|place| !place.linked)
                && !cached
            {
                table.place = None;
            }
        }
    }
}

impl Machine for RecordingMachine {
    fn read(&self, table: PhysAddr, index: usize) -> u64 {
        self.state().table(table).entries[index]
    }

    fn write(&self, table: PhysAddr, index: usize, value: u64) {
        self.state().write(table, index, value);
    }

    fn clear_table(&self, table: PhysAddr) {
        let mut state = self.state();
        state.log.push(Op::Clear(table));
        state.adopt(table);
        let page = state.table_mut(table);
        assert!(page.place.is_none(), "{table} is cleared while it can be reached or is cached");
        page.entries.fill(0);
        page.unpublished = true;
    }

    fn publish(&self) {
        self.state().publish();
    }

    fn invalidate_stage2(&self, tree: Vttbr, range: IpaRange, leaf_only: bool) {
        let mut state = self.state();
        state.log.push(Op::InvalidateStage2(tree.vmid, range, leaf_only));
        state.invalidate(tree.into(), range.base().raw(), range.end(), leaf_only);
    }

    fn invalidate_stage2_all(&self, tree: Vttbr) {
        let mut state = self.state();
        state.log.push(Op::InvalidateStage2All(tree.vmid));
        state.invalidate(tree.into(), 0, u64::MAX, false);
    }

    fn invalidate_el2(&self, range: HypRange) {
        let mut state = self.state();
        state.log.push(Op::InvalidateEl2(range));
        state.invalidate(Stage::El2, range.base().raw(), range.end(), false);
    }

    fn scrub(&self, range: PhysRange) {
        let mut state = self.state();
        for page in range.iter() {
            assert!(state.is_el2_data(page), "{page} is scrubbed but not mapped writable in EL2");
            state.abandon(page);
        }
        state.log.push(Op::Scrub(range));
        state.contents.retain(|&page, _| !range.contains(Addr::from_bits_truncating(page)));
    }

    fn clean(&self, range: PhysRange) {
        let mut state = self.state();
        for page in range.iter() {
            assert!(state.is_el2_data(page), "{page} is cleaned but not mapped in EL2");
        }
        state.log.push(Op::Clean(range));
    }
}

impl TablePool for RecordingPool {
    fn allocate(&mut self) -> Option<PhysAddr> {
        let mut state = self.0.state();
        let addr = Addr::from_bits_truncating(state.free.pop()?);
        state.in_use += 1;
        assert!(state.tables.insert(addr.raw(), Table::unwritten(false)).is_none(), "{addr} is in use twice");
        state.log.push(Op::Allocate(addr));
        Some(addr)
    }

    fn free(&mut self, table: PhysAddr) {
        let mut state = self.0.state();
        let page = state.table(table);
        assert!(!page.root, "{table} is not the pool's");
        match page.place {
            None => {}
            Some(Place { linked: true, .. }) => panic!("early free: {table} is linked"),
            Some(_) => panic!("early free: {table} may still be cached"),
        }
        state.tables.remove(&table.raw());
        state.free.push(table.raw());
        state.in_use -= 1;
        state.log.push(Op::Free(table));
    }

    fn available(&self) -> usize {
        self.0.state().free.len()
    }

    fn in_use(&self) -> usize {
        self.0.state().in_use
    }
}

/// Returns the invalidations of `log`, of both stages.
#[must_use]
pub fn invalidations(log: &[Op]) -> Vec<Op> {
    let is_one = |op: &&Op| matches!(op, Op::InvalidateStage2(..) | Op::InvalidateStage2All(_) | Op::InvalidateEl2(_));
    log.iter().filter(is_one).copied().collect()
}

impl RecordingMachine {
    /// Returns whether some TLB or walker could still let an access to a page of `range` through.
    #[must_use]
    pub fn reaches<S>(&self, stage: Stage, range: PageRange<S>) -> bool {
        range.iter().any(|page| self.translate(stage, page.raw()).iter().any(Option::is_some))
    }
}
