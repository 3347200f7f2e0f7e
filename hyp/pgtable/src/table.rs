//! The tree of translation tables: walk, map, unmap.

use core::{
    fmt,
    marker::PhantomData,
    ops::{ControlFlow, Range},
};

use ravelin_memory::{Addr, Level, PAGE_SIZE, PageRange, PhysAddr, TABLE_ENTRIES};

use crate::{
    Hint, Machine, Regime, Stage2, TablePool, Vmid, Vttbr,
    descriptor::{Descriptor, Kind},
    flush::Flush,
    geometry::Geometry,
};

/// A tree of translation tables of the regime `R`.
///
/// It owns the tables below the root; the root's pages belong to whoever made it. One made by [`PageTable::part`] is a part of a
/// tree, and owns only what translates its part of the addresses.
pub struct PageTable<R: Regime> {
    root: PhysAddr,
    geometry: Geometry,
    vmid: Vmid,
    /// The addresses that this may change.
    window: Span,
    /// The table of level 1 that translates the window, if the root is of level 0 and this is a part.
    top: Option<PhysAddr>,
    /// Level of the largest blocks that are made.
    largest: Level,
    tables: usize,
    regime: PhantomData<R>,
}

/// Where the walk for an address ended.
pub struct Walk<R: Regime> {
    /// Level of the last descriptor that was read.
    pub level: Level,
    /// That descriptor; [`Descriptor::INVALID`] if none was.
    descriptor: Descriptor,
    addr: Addr<R::Space>,
}

impl<R: Regime> Walk<R> {
    /// Returns what the address is translated to, whatever for; `None` if the walk ended with an invalid descriptor.
    #[inline]
    #[must_use]
    pub fn output(&self) -> Option<PhysAddr> {
        let base = self.descriptor.output(self.level)?;
        let offset = self.addr.raw() & self.level.size().wrapping_sub(1);
        Some(Addr::from_bits_truncating(base.raw() | offset))
    }

    /// Returns what the address is translated to, and what for; `None` also for attributes that the regime does not use.
    #[must_use]
    pub fn mapping(&self) -> Option<Mapping<R::Usage>> {
        mapping_of::<R>(self.descriptor, self.output()?)
    }

    /// Returns whether the walk ended with poison.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.descriptor == Descriptor::POISONED
    }
}

/// What an address is translated to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping<U> {
    /// The physical address.
    pub to: PhysAddr,
    /// What the mapping is for.
    pub usage: U,
}

/// What there is at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found<U> {
    /// Nothing.
    Absent {
        /// The level of the one descriptor, or of the last-level ones that follow each other.
        level: Level,
    },
    /// Nothing, and nothing can be mapped there.
    Poisoned,
    /// A mapping, of one block or of pages that follow each other in both spaces with the same attributes.
    Leaf {
        /// Where the first of them leads, and what for; `None` if its attributes are none that the regime knows.
        mapping: Option<Mapping<U>>,
        /// The level of the block or of the pages.
        level: Level,
    },
}

/// Why nothing was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The range, or what it would be mapped to, does not lie below the last address.
    #[error("range outside the address space of the tables")]
    OutOfRange,
    /// The pool has fewer tables than the operation needs.
    #[error("out of translation tables")]
    OutOfTables,
}

/// Input addresses from `start` up to `end`, within one table: not typed, because `end` may be one past the last address.
#[derive(Clone, Copy)]
struct Span {
    start: u64,
    end: u64,
}

/// Pages that one table of the last level translates, mapped or not.
#[derive(Clone, Copy)]
pub struct Leaves {
    table: PhysAddr,
    span: Span,
    /// The descriptor that links the table.
    link: Slot,
}

/// That the TLBs hold nothing stale of some addresses.
#[must_use = "what was invalidated has to be settled"]
pub struct Invalidated(Span);

/// What a table's entry has to do with a span.
#[derive(Clone, Copy)]
struct Slot {
    table: PhysAddr,
    index: usize,
    level: Level,
    /// The part of the span that the entry translates.
    part: Span,
    /// Whether that is all that the entry translates.
    whole: bool,
}

/// What stays behind where something is taken out.
#[derive(Clone, Copy)]
struct Left {
    /// What descriptors become: one that the hardware takes as invalid.
    descriptor: Descriptor,
    /// Whether tables of the last level of which a part is taken out stay, even with nothing in them.
    tables: bool,
}

impl Left {
    const NOTHING: Self = Self { descriptor: Descriptor::INVALID, tables: false };
    const TABLES: Self = Self { tables: true, ..Self::NOTHING };
    const POISON: Self = Self { descriptor: Descriptor::POISONED, tables: false };
}

/// A mapping to be made: input address plus `offset`, modulo 2^64, is the physical address.
#[derive(Clone, Copy)]
struct Wanted {
    offset: u64,
    attributes: u64,
    largest: Level,
}

impl Span {
    fn of<S>(range: PageRange<S>) -> Self {
        Self { start: range.base().raw(), end: range.end() }
    }

    fn contains(self, addr: u64) -> bool {
        self.start <= addr && addr < self.end
    }

    fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    fn intersection(self, other: Self) -> Self {
        Self { start: self.start.max(other.start), end: self.end.min(other.end) }
    }

    fn size(self) -> u64 {
        self.end.wrapping_sub(self.start)
    }

    /// Returns the indices of the entries that translate the span, which lies within one table of level 3.
    #[inline]
    fn pages(self) -> Range<usize> {
        let first = index_of(self.start, Level::L3.shift());
        first..first.wrapping_add(index_of(self.size().wrapping_sub(1), Level::L3.shift())).wrapping_add(1)
    }

    /// Cuts the span at multiples of `1 << shift`.
    #[inline]
    fn pieces(self, shift: u32) -> impl Iterator<Item = Self> {
        let mut start = self.start;
        core::iter::from_fn(move || {
            if start >= self.end {
                return None;
            }
            let size = 1_u64.wrapping_shl(shift);
            // No overflow: addresses have 48 bits.
            let end = (start | size.wrapping_sub(1)).wrapping_add(1).min(self.end);
            let piece = Self { start, end };
            start = end;
            Some(piece)
        })
    }

    /// Yields the entries of `table` that translate the span.
    #[inline]
    fn slots(self, table: PhysAddr, level: Level) -> impl Iterator<Item = Slot> {
        let shift = level.shift();
        self.pieces(shift).map(move |part| Slot {
            table,
            index: index_of(part.start, shift),
            level,
            part,
            whole: part.size() == level.size(),
        })
    }
}

#[inline]
fn index_of(addr: u64, shift: u32) -> usize {
    // Below 512, which fits.
    usize::try_from(addr.wrapping_shr(shift) & TABLE_ENTRIES.wrapping_sub(1)).unwrap_or_default()
}

impl Slot {
    #[inline]
    fn read<M: Machine>(self, machine: &M) -> Descriptor {
        Descriptor::from_bits(machine.read(self.table, self.index))
    }

    #[inline]
    fn write<M: Machine>(self, machine: &M, new: Descriptor) {
        machine.write(self.table, self.index, new.bits());
    }

    /// All that the entry translates.
    fn all(self) -> Span {
        let start = self.part.start & !self.level.size().wrapping_sub(1);
        Span { start, end: start.wrapping_add(self.level.size()) }
    }
}

impl Wanted {
    /// Returns the leaf for a slot, if the slot is to be mapped as one.
    #[inline]
    fn leaf(self, slot: Slot) -> Option<Descriptor> {
        let to = slot.part.start.wrapping_add(self.offset);
        let aligned = to & slot.level.size().wrapping_sub(1) == 0;
        (slot.whole && aligned && slot.level >= self.largest)
            .then(|| Descriptor::leaf(slot.level, Addr::from_bits_truncating(to), self.attributes))
    }

    /// Returns whether the leaf `old`, which maps to `to`, already translates all of the slot's part as wanted.
    fn is_met_by(self, old: Descriptor, to: PhysAddr, slot: Slot) -> bool {
        slot.all().start.wrapping_add(self.offset) == to.raw() && old.attributes() == self.attributes
    }
}

/// Machine and pool, which every step of an operation needs.
struct Means<'a, M, P> {
    machine: &'a M,
    pool: &'a mut P,
}

impl<R: Regime> PageTable<R> {
    /// Returns the tree whose first root table lies at `root`. All [`Geometry::root_pages`] of them are zero, and no
    /// other tree uses them.
    #[must_use]
    pub const fn new(root: PhysAddr, geometry: Geometry) -> Self {
        let window = Span { start: 0, end: geometry.end() };
        Self { root, geometry, vmid: Vmid::HOST, window, top: None, largest: Level::L1, tables: 0, regime: PhantomData }
    }

    /// Returns the part of this tree that translates `range`, which can be changed independently of other parts that do not
    /// overlap it, on other CPUs too: it never writes a descriptor above level 1. This here must not be used for `range` from now
    /// on. `range` begins and ends at multiples of 1 GiB, and lies in one table of level 1 if the root is of level 0; that table
    /// is made now and stays.
    ///
    /// # Errors
    ///
    /// [`MapError::OutOfRange`] for another range; [`MapError::OutOfTables`].
    pub fn part<M: Machine, P: TablePool>(
        &mut self,
        machine: &M,
        pool: &mut P,
        range: PageRange<R::Space>,
    ) -> Result<Self, MapError> {
        let window = Span::of(range);
        let apart = Level::L1.size().wrapping_sub(1);
        if (window.start | window.end) & apart != 0 || window.end > self.geometry.end() {
            return Err(MapError::OutOfRange);
        }
        let mut top = None;
        if self.geometry.start() == Level::L0 {
            let mut slots = window.slots(self.root, Level::L0);
            let (Some(slot), None) = (slots.next(), slots.next()) else { return Err(MapError::OutOfRange) };
            let old = slot.read(machine);
            let table = if let Kind::Table(table) = old.kind(slot.level) {
                slot.write(machine, old.kept());
                table
            } else {
                let table = self.allocate(&mut Means { machine, pool }).ok_or(MapError::OutOfTables)?;
                machine.clear_table(table);
                machine.hint(Hint::Owner { table, root: self.root });
                machine.publish();
                slot.write(machine, Descriptor::table(table, 0).kept());
                table
            };
            machine.publish();
            top = Some(table);
        }
        Ok(Self { window, top, tables: 0, ..*self })
    }

    /// Returns the address of the first root table, for the TTBR.
    #[must_use]
    pub const fn root(&self) -> PhysAddr {
        self.root
    }

    /// Returns what VTTBR_EL2 holds for this tree, if it is of a stage 2.
    #[must_use]
    pub const fn vttbr(&self) -> Vttbr {
        Vttbr { root: self.root, vmid: self.vmid }
    }

    /// Returns the shape of the tree.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Returns how many tables from the pool are in use.
    #[must_use]
    pub const fn tables(&self) -> usize {
        self.tables
    }

    /// Tells a trace that `lock` guards the tables from now on.
    pub fn announce<M: Machine>(&self, machine: &M, lock: PhysAddr) {
        for page in self.root_tables() {
            machine.hint(Hint::Owner { table: page, root: self.root });
        }
        machine.hint(Hint::RootLock { root: self.root, lock });
    }

    /// Tells a trace that the root is given up, and its pages are tables no more.
    pub fn give_up<M: Machine>(&self, machine: &M) {
        machine.hint(Hint::Release(self.root));
        self.root_tables().for_each(|page| machine.hint(Hint::Free(page)));
    }

    fn root_tables(&self) -> impl Iterator<Item = PhysAddr> + use<R> {
        PageRange::new(self.root.raw(), self.geometry.root_pages()).into_iter().flat_map(PageRange::iter)
    }

    /// Walks the tables for `addr`.
    pub fn lookup<M: Machine>(&self, machine: &M, addr: Addr<R::Space>) -> Walk<R> {
        let mut level = self.start();
        if !self.window.contains(addr.raw()) {
            return Walk { level, descriptor: Descriptor::INVALID, addr };
        }
        let mut table = self.top_table(addr.raw());
        loop {
            let descriptor = Descriptor::from_bits(machine.read(table, index_of(addr.raw(), level.shift())));
            match (level.next(), descriptor.next_table()) {
                (Some(below), Some(next)) => (level, table) = (below, next),
                _ => return Walk { level, descriptor, addr },
            }
        }
    }

    /// Calls `f` in ascending order with each block or run of pages that is mapped, as [`PageTable::visit`], and with its mapping
    /// unless its attributes are none that the regime knows.
    pub fn for_each_leaf<M: Machine>(
        &self,
        machine: &M,
        mut f: impl FnMut(PageRange<R::Space>, Option<Mapping<R::Usage>>),
    ) {
        if let Ok(all) = PageRange::from_bounds(self.window.start, self.window.end) {
            let _: ControlFlow<()> = self.visit(machine, all, &mut |range, found| {
                if let Found::Leaf { mapping, .. } = found {
                    f(range, mapping);
                }
                ControlFlow::Continue(())
            });
        }
    }

    /// Calls `f` in ascending order with parts of `range` and what is there, until `f` breaks. A part is what one descriptor
    /// translates, or pages that follow each other, or frames without pages that do, as far as one table goes. A part without
    /// any table costs one call, however large it is.
    pub fn visit<M: Machine, B>(
        &self,
        machine: &M,
        range: PageRange<R::Space>,
        f: &mut dyn FnMut(PageRange<R::Space>, Found<R::Usage>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let mut ended = ControlFlow::Continue(());
        // The walk is compiled once, whatever it ends with.
        let mut visitor = |part, found| {
            ended = f(part, found);
            if ended.is_break() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        for (table, span) in self.roots(range) {
            if visit_in::<R, M>(machine, table, self.start(), span, &mut visitor).is_break() {
                break;
            }
        }
        ended
    }

    /// Returns a number of tables that is enough for whatever is done to `pages` pages in a row, without looking at them.
    #[must_use]
    pub fn most_tables(pages: u64) -> usize {
        // A table of level 3 for every 512 pages and two at the ends, and not more than that above.
        let most = (pages / TABLE_ENTRIES).saturating_mul(2).saturating_add(6);
        usize::try_from(most).unwrap_or(usize::MAX)
    }

    /// Returns how many tables [`PageTable::map`] takes from the pool for the same arguments.
    pub fn tables_to_map<M: Machine>(
        &self,
        machine: &M,
        range: PageRange<R::Space>,
        to: PhysAddr,
        usage: R::Usage,
    ) -> usize {
        let wanted = self.wanted(range, to, usage);
        self.roots(range)
            .map(|(table, span)| count_to_map(machine, Some(table), self.start(), span, wanted))
            .fold(0, usize::saturating_add)
    }

    /// Maps `range` to the physical addresses from `to` on, with the largest blocks that fit, and publishes it.
    ///
    /// What is mapped so already stays as it is. What is mapped differently is replaced, break-before-make, entry by
    /// entry. Existing tables stay, so that this never takes a neighbour's mapping away for longer than a replacement.
    ///
    /// # Errors
    ///
    /// In both cases nothing has changed.
    pub fn map<M: Machine, P: TablePool>(
        &mut self,
        machine: &M,
        pool: &mut P,
        range: PageRange<R::Space>,
        to: PhysAddr,
        usage: R::Usage,
    ) -> Result<(), MapError> {
        if !self.window.covers(Span::of(range)) || to.checked_add(range.size().wrapping_sub(1)).is_none() {
            return Err(MapError::OutOfRange);
        }
        let available = pool.available();
        if Self::most_tables(range.pages()) > available && self.tables_to_map(machine, range, to, usage) > available {
            return Err(MapError::OutOfTables);
        }
        let wanted = self.wanted(range, to, usage);
        let mut means = Means { machine, pool };
        for (table, span) in self.roots(range) {
            self.map_in(&mut means, table, self.start(), span, wanted)?;
        }
        machine.publish();
        Ok(())
    }

    /// Returns how many tables [`PageTable::unmap`] takes from the pool for the same range, at most four: a block that the
    /// range cuts, mapped or poisoned, needs one, a block of 1 GiB one or two more.
    ///
    /// To plan several ranges in ascending order, sum up the answers and give as `after` an address of the range before:
    /// a block that both cut is then counted once.
    pub fn tables_to_unmap<M: Machine>(
        &self,
        machine: &M,
        range: PageRange<R::Space>,
        after: Option<Addr<R::Space>>,
    ) -> usize {
        self.roots(range)
            .map(|(table, span)| count_to_unmap(machine, table, self.start(), span, after))
            .fold(0, usize::saturating_add)
    }

    /// Takes `range`, mapped and poisoned parts of it, out of the tables and adds what that owes to `flush`. Poison, which must
    /// have been flushed since it was put there, owes nothing.
    ///
    /// A block that the range cuts is broken here; the rest of it comes back with the flush. If the pool has no table for
    /// that, the rest stays unmapped, and a poisoned block stays as it is: a caller to whom it matters asks
    /// [`PageTable::tables_to_unmap`] first.
    pub fn unmap<M: Machine, P: TablePool>(
        &mut self,
        machine: &M,
        pool: &mut P,
        range: PageRange<R::Space>,
        flush: Flush<R>,
    ) -> Flush<R> {
        self.take_out(machine, pool, range, Left::NOTHING, flush)
    }

    /// As [`PageTable::unmap`], but leaves tables of the last level that `range` does not cover, even if nothing is left in them: for
    /// what will come back by [`PageTable::move_leaves`].
    pub fn vacate<M: Machine, P: TablePool>(
        &mut self,
        machine: &M,
        pool: &mut P,
        range: PageRange<R::Space>,
        flush: Flush<R>,
    ) -> Flush<R> {
        self.take_out(machine, pool, range, Left::TABLES, flush)
    }

    /// As [`PageTable::unmap`], and sees to it that nothing can be mapped in `range`, all of which is mapped, until that is
    /// unmapped once more, as a whole or in parts.
    ///
    /// A caller asks [`PageTable::tables_to_unmap`] first: without a table, a block that the range cuts is not poisoned.
    pub fn poison<M: Machine, P: TablePool>(
        &mut self,
        machine: &M,
        pool: &mut P,
        range: PageRange<R::Space>,
        flush: Flush<R>,
    ) -> Flush<R> {
        self.take_out(machine, pool, range, Left::POISON, flush)
    }

    /// Takes `range` out of the tables, all but what is `left`.
    fn take_out<M: Machine, P: TablePool>(
        &mut self,
        machine: &M,
        pool: &mut P,
        range: PageRange<R::Space>,
        left: Left,
        mut flush: Flush<R>,
    ) -> Flush<R> {
        let mut means = Means { machine, pool };
        for (table, span) in self.roots(range) {
            self.take_out_in(&mut means, table, self.start(), span, left, &mut flush);
        }
        flush
    }

    /// Returns the pages of `range`, if one table of the last level translates them all.
    pub fn leaves<M: Machine>(&self, machine: &M, range: PageRange<R::Space>) -> Option<Leaves> {
        let span = Span::of(range);
        if !self.window.covers(span) {
            return None;
        }
        let (mut table, mut level) = (self.top_table(span.start), self.start());
        loop {
            let link = span.slots(table, level).next().filter(|slot| slot.part.end == span.end)?;
            (table, level) = (link.read(machine).next_table()?, level.next()?);
            if level == Level::L3 {
                return Some(Leaves { table, span, link });
            }
        }
    }

    /// Moves what is mapped at `from` to `to`, where nothing is and which is as long, and publishes it. One invalidation.
    ///
    /// No table is made or given back: one may be left with nothing in it. Only what translates the two blocks of 2 MiB that
    /// the pages lie in is written, so others may read the tables meanwhile, and do the same in other blocks.
    pub fn move_leaves<M: Machine>(&self, machine: &M, from: Leaves, to: Leaves) {
        let mut moved = 0_u64;
        for (here, there) in from.span.pages().zip(to.span.pages()) {
            let leaf = Descriptor::from_bits(machine.read(from.table, here));
            if leaf.is_valid() {
                debug_assert_eq!(machine.read(to.table, there), Descriptor::INVALID.bits());
                machine.write(to.table, there, leaf.bits());
                machine.write(from.table, here, Descriptor::INVALID.bits());
                moved = moved.wrapping_add(1);
            }
        }
        for (link, more) in [(to.link, moved), (from.link, moved.wrapping_neg())] {
            let old = link.read(machine);
            link.write(machine, old.with_entries(old.entries().wrapping_add(more)));
        }
        machine.publish();
        if let Ok(range) = PageRange::from_bounds(from.span.start, from.span.end) {
            R::invalidate(machine, self.vttbr(), range, true);
        }
    }

    /// Takes everything out of the tables and adds what that owes to `flush`.
    pub fn unmap_all<M: Machine, P: TablePool>(&mut self, machine: &M, pool: &mut P, flush: Flush<R>) -> Flush<R> {
        match PageRange::from_bounds(self.window.start, self.window.end) {
            Ok(all) => self.unmap(machine, pool, all, flush),
            Err(_) => flush,
        }
    }

    /// Pays `flush`, which stems from this tree: invalidates the TLBs once, maps again what is left of broken blocks,
    /// and gives tables that are out of use back to the pool. Returns whether an invalidation was necessary.
    pub fn flush<M: Machine, P: TablePool>(&mut self, machine: &M, pool: &mut P, flush: Flush<R>) -> bool {
        let Some(invalidated) = self.invalidate(machine, core::iter::once(&flush)) else { return false };
        self.settle(machine, pool, flush, &invalidated);
        true
    }

    /// The first half of [`PageTable::flush`], for parts of one tree together: invalidates the TLBs once for all of `flushes`, unless
    /// they owe nothing. Each of them has to be settled with what this returns by the part that it stems from.
    pub fn invalidate<'f, M: Machine>(
        &self,
        machine: &M,
        flushes: impl Iterator<Item = &'f Flush<R>>,
    ) -> Option<Invalidated>
    where
        R: 'f,
    {
        let mut all = Flush::<R>::new();
        for flush in flushes {
            if let Some(span) = flush.span {
                all.add(span);
                all.tables |= flush.tables;
            }
        }
        let range = all.span?;
        // Also for the contents of the tables that are linked when this is settled.
        machine.publish();
        R::invalidate(machine, self.vttbr(), range, !all.tables);
        Some(Invalidated(Span::of(range)))
    }

    /// The second half of [`PageTable::flush`], for a flush that stems from this part of a tree.
    pub fn settle<M: Machine, P: TablePool>(
        &mut self,
        machine: &M,
        pool: &mut P,
        flush: Flush<R>,
        invalidated: &Invalidated,
    ) {
        let Some(range) = flush.span else { return };
        debug_assert!(invalidated.0.covers(Span::of(range)), "the TLBs may hold some of it");
        if flush.pending {
            for (table, span) in self.roots(range) {
                link_pending(machine, table, self.start(), span);
            }
            machine.publish();
        }
        let mut detached = flush.detached;
        while detached.raw() != 0 {
            let next = Addr::from_bits_truncating(machine.read(detached, 0));
            // First, because others may get it from the pool at once.
            machine.hint(Hint::Free(detached));
            pool.free(detached);
            self.tables = self.tables.saturating_sub(1);
            detached = next;
        }
    }

    fn wanted(&self, range: PageRange<R::Space>, to: PhysAddr, usage: R::Usage) -> Wanted {
        Wanted {
            offset: to.raw().wrapping_sub(range.base().raw()),
            attributes: R::attributes(usage),
            largest: self.largest,
        }
    }

    /// Returns the level of the tables at which walks of this start.
    const fn start(&self) -> Level {
        if self.top.is_some() { Level::L1 } else { self.geometry.start() }
    }

    /// Returns the table at which the walk for `addr` starts.
    fn top_table(&self, addr: u64) -> PhysAddr {
        self.top.unwrap_or_else(|| self.geometry.root_table(self.root, addr))
    }

    /// Yields the tables at which walks for `range` start, and which part of it each translates.
    fn roots(&self, range: PageRange<R::Space>) -> impl Iterator<Item = (PhysAddr, Span)> + use<R> {
        let (root, top, geometry) = (self.root, self.top, self.geometry);
        Span::of(range)
            .intersection(self.window)
            // What a part has of a table of level 1 lies in that table, so nothing cuts it.
            .pieces(geometry.table_shift())
            .map(move |span| (top.unwrap_or_else(|| geometry.root_table(root, span.start)), span))
    }

    fn allocate<M, P: TablePool>(&mut self, means: &mut Means<'_, M, P>) -> Option<PhysAddr> {
        let table = means.pool.allocate()?;
        self.tables = self.tables.saturating_add(1);
        Some(table)
    }

    /// Maps `span` in `table` and returns how many entries have come into use.
    fn map_in<M: Machine, P: TablePool>(
        &mut self,
        means: &mut Means<'_, M, P>,
        table: PhysAddr,
        level: Level,
        span: Span,
        wanted: Wanted,
    ) -> Result<u64, MapError> {
        let Some(below) = level.next() else {
            return Ok(map_pages::<R, M>(means.machine, self.vttbr(), table, span, wanted));
        };
        let mut added = 0_u64;
        for slot in span.slots(table, level) {
            let old = slot.read(means.machine);
            match (old.kind(level), wanted.leaf(slot)) {
                (Kind::Invalid, Some(leaf)) => {
                    slot.write(means.machine, leaf);
                    added = added.wrapping_add(1);
                }
                (Kind::Leaf(to), _) if wanted.is_met_by(old, to, slot) => {}
                (Kind::Leaf(_), Some(leaf)) => replace::<R, M>(means.machine, self.vttbr(), slot, leaf),
                (Kind::Poisoned, _) => {}
                (Kind::Table(next) | Kind::Pending(next), _) => {
                    let more = self.map_in(means, next, below, slot.part, wanted)?;
                    if more != 0 {
                        slot.write(means.machine, old.with_entries(old.entries().wrapping_add(more)));
                    }
                }
                (Kind::Leaf(_), None) => {
                    let rest = self.split(means, old, slot, Descriptor::INVALID).ok_or(MapError::OutOfTables)?;
                    if let Kind::Table(next) = rest.kind(level) {
                        let more = self.map_in(means, next, below, slot.part, wanted)?;
                        means.machine.publish();
                        let rest = rest.with_entries(rest.entries().wrapping_add(more));
                        replace::<R, M>(means.machine, self.vttbr(), slot, rest);
                    }
                }
                (Kind::Invalid, None) => {
                    let next = self.allocate(means).ok_or(MapError::OutOfTables)?;
                    means.machine.clear_table(next);
                    means.machine.hint(Hint::Owner { table: next, root: self.root });
                    let entries = self.map_in(means, next, below, slot.part, wanted)?;
                    // A walker that finds the table must find its contents.
                    means.machine.publish();
                    slot.write(means.machine, Descriptor::table(next, entries));
                    added = added.wrapping_add(1);
                }
            }
        }
        Ok(added)
    }

    /// Takes `span` out of `table`, and returns how many entries have gone out of use.
    fn take_out_in<M: Machine, P: TablePool>(
        &mut self,
        means: &mut Means<'_, M, P>,
        table: PhysAddr,
        level: Level,
        span: Span,
        behind: Left,
        flush: &mut Flush<R>,
    ) -> u64 {
        let left = behind.descriptor;
        let Some(below) = level.next() else {
            return take_out_pages(means.machine, table, span, left, flush);
        };
        let mut removed = 0_u64;
        for slot in span.slots(table, level) {
            let old = slot.read(means.machine);
            match old.kind(level) {
                Kind::Leaf(_) => {
                    let rest = if slot.whole { None } else { self.split(means, old, slot, left) };
                    let new = match rest {
                        Some(rest) => rest.pending(),
                        None if slot.whole => left,
                        None => Descriptor::INVALID,
                    };
                    slot.write(means.machine, new);
                    flush.pending |= rest.is_some();
                    removed = removed.wrapping_add(u64::from(new == Descriptor::INVALID));
                    flush.add_span(if rest.is_none() { slot.all() } else { slot.part });
                }
                Kind::Table(next) | Kind::Pending(next) => {
                    let gone = if slot.whole {
                        old.entries()
                    } else {
                        self.take_out_in(means, next, below, slot.part, behind, flush)
                    };
                    let remaining = old.entries().wrapping_sub(gone);
                    let stays = old.is_kept() || behind.tables && !slot.whole && below == Level::L3;
                    if remaining == 0 && !stays {
                        let left = if slot.whole { left } else { Descriptor::INVALID };
                        slot.write(means.machine, left);
                        detach(means.machine, next, below, if slot.whole { gone } else { 0 }, flush);
                        flush.tables = true;
                        flush.add_span(slot.part);
                        removed = removed.wrapping_add(u64::from(left == Descriptor::INVALID));
                    } else if gone != 0 {
                        slot.write(means.machine, old.with_entries(remaining));
                    }
                }
                Kind::Poisoned if left != Descriptor::INVALID => {}
                Kind::Poisoned if slot.whole => {
                    slot.write(means.machine, left);
                    removed = removed.wrapping_add(1);
                }
                Kind::Poisoned => {
                    if let Some(rest) = self.split(means, old, slot, left) {
                        // The TLBs hold nothing of it, so the table can be linked at once.
                        means.machine.publish();
                        slot.write(means.machine, rest);
                        // The flush may owe nothing, and then publishes nothing.
                        means.machine.publish();
                    }
                }
                Kind::Invalid => {}
            }
        }
        removed
    }

    /// Builds, out of everybody's reach, the table that maps what the leaf `old` in `slot` maps, or is poisoned as `old` is, less
    /// the slot's part, which gets descriptors `left`. Returns the descriptor that links it.
    fn split<M: Machine, P: TablePool>(
        &mut self,
        means: &mut Means<'_, M, P>,
        old: Descriptor,
        slot: Slot,
        left: Descriptor,
    ) -> Option<Descriptor> {
        let below = slot.level.next()?;
        let table = self.allocate(means)?;
        means.machine.hint(Hint::Overwrite(table));
        means.machine.hint(Hint::Owner { table, root: self.root });
        let (mut entry, step) = match old.kind(slot.level) {
            Kind::Leaf(to) => (Descriptor::leaf(below, to, old.attributes()).bits(), below.size()),
            _ => (old.bits(), 0),
        };
        for index in 0..TABLE_ENTRIES {
            means.machine.write(table, index_of(index, 0), entry);
            entry = entry.wrapping_add(step);
        }
        if below == Level::L3 {
            for index in slot.part.pages() {
                means.machine.write(table, index, left.bits());
            }
            let gone = if left == Descriptor::INVALID { slot.part.size() / PAGE_SIZE } else { 0 };
            return Some(Descriptor::table(table, TABLE_ENTRIES.wrapping_sub(gone)));
        }
        let mut entries = TABLE_ENTRIES;
        for child in slot.part.slots(table, below) {
            let rest = if child.whole { None } else { self.split(means, child.read(means.machine), child, left) };
            let new = rest.unwrap_or(if child.whole { left } else { Descriptor::INVALID });
            child.write(means.machine, new);
            entries = entries.wrapping_sub(u64::from(new == Descriptor::INVALID));
        }
        Some(Descriptor::table(table, entries))
    }
}

impl PageTable<Stage2> {
    /// Returns the tree of a guest, whose TLB entries carry `vmid`. Its blocks are of 2 MiB at most, so that one table is
    /// enough to take a part of one away. For the root as [`PageTable::new`].
    #[must_use]
    pub const fn of_guest(root: PhysAddr, geometry: Geometry, vmid: Vmid) -> Self {
        Self { vmid, largest: Level::L2, ..Self::new(root, geometry) }
    }
}

impl<R: Regime> Flush<R> {
    fn add_span(&mut self, span: Span) {
        if let Ok(range) = PageRange::from_bounds(span.start, span.end) {
            self.add(range);
        }
    }
}

/// Maps `span` in `table`, which is of level 3, and returns how many entries have come into use. The inner loop of
/// [`PageTable::map`].
fn map_pages<R: Regime, M: Machine>(machine: &M, tree: Vttbr, table: PhysAddr, span: Span, wanted: Wanted) -> u64 {
    let mut added = 0_u64;
    let to = Addr::from_bits_truncating(span.start.wrapping_add(wanted.offset));
    let mut leaf = Descriptor::leaf(Level::L3, to, wanted.attributes);
    for index in span.pages() {
        let old = Descriptor::from_bits(machine.read(table, index));
        if old == Descriptor::INVALID {
            machine.write(table, index, leaf.bits());
            added = added.wrapping_add(1);
        } else if old != leaf {
            replace_page::<R, M>(machine, tree, table, index, span, leaf);
        }
        leaf = leaf.following(Level::L3);
    }
    added
}

/// Replaces the page descriptor `index` of `table`, one of those that translate `span`, unless it is poisoned.
#[cold]
fn replace_page<R: Regime, M: Machine>(
    machine: &M,
    tree: Vttbr,
    table: PhysAddr,
    index: usize,
    span: Span,
    leaf: Descriptor,
) {
    if let Some(slot) = span.slots(table, Level::L3).find(|slot| slot.index == index)
        && slot.read(machine) != Descriptor::POISONED
    {
        replace::<R, M>(machine, tree, slot, leaf);
    }
}

/// Takes `span` out of `table`, which is of level 3, leaves descriptors `left` there, and returns how many entries have gone
/// out of use. The inner loop of [`PageTable::unmap`].
fn take_out_pages<R: Regime, M: Machine>(
    machine: &M,
    table: PhysAddr,
    span: Span,
    left: Descriptor,
    flush: &mut Flush<R>,
) -> u64 {
    let mut changed = 0_u64;
    let mut all = Descriptor::INVALID.bits();
    for index in span.pages() {
        let old = machine.read(table, index);
        if old != Descriptor::INVALID.bits() {
            machine.write(table, index, left.bits());
            changed = changed.wrapping_add(1);
            all |= old;
        }
    }
    if Descriptor::from_bits(all).is_valid() {
        flush.add_span(span);
    }
    if left == Descriptor::INVALID { changed } else { 0 }
}

/// A visitor of what is in the tables.
type Visitor<'a, R> =
    &'a mut dyn FnMut(PageRange<<R as Regime>::Space>, Found<<R as Regime>::Usage>) -> ControlFlow<()>;

/// Returns what a leaf maps to, if its attributes are ones that the regime uses.
fn mapping_of<R: Regime>(leaf: Descriptor, to: PhysAddr) -> Option<Mapping<R::Usage>> {
    let usage = R::USAGES.iter().find(|&&usage| R::attributes(usage) == leaf.attributes());
    usage.map(|&usage| Mapping { to, usage })
}

fn visit_in<R: Regime, M: Machine>(
    machine: &M,
    table: PhysAddr,
    level: Level,
    span: Span,
    f: Visitor<'_, R>,
) -> ControlFlow<()> {
    let Some(below) = level.next() else {
        return visit_pages::<R, M>(machine, table, span, f);
    };
    for slot in span.slots(table, level) {
        let descriptor = slot.read(machine);
        let found = match descriptor.kind(level) {
            Kind::Table(next) => {
                visit_in::<R, M>(machine, next, below, slot.part, f)?;
                continue;
            }
            Kind::Leaf(base) => {
                let offset = slot.part.start.wrapping_sub(slot.all().start);
                let to = Addr::from_bits_truncating(base.raw().wrapping_add(offset));
                Found::Leaf { mapping: mapping_of::<R>(descriptor, to), level }
            }
            Kind::Poisoned => Found::Poisoned,
            Kind::Invalid | Kind::Pending(_) => Found::Absent { level },
        };
        if let Ok(range) = PageRange::from_bounds(slot.part.start, slot.part.end) {
            f(range, found)?;
        }
    }
    ControlFlow::Continue(())
}

/// Visits `span` of `table`, which is of level 3. The inner loop of [`PageTable::visit`].
fn visit_pages<R: Regime, M: Machine>(machine: &M, table: PhysAddr, span: Span, f: Visitor<'_, R>) -> ControlFlow<()> {
    let mut indices = span.pages();
    let mut start = span.start;
    while !indices.is_empty() {
        let first = Descriptor::from_bits(machine.read(table, indices.start));
        let (found, step) = match first.kind(Level::L3) {
            Kind::Leaf(to) => (Found::Leaf { mapping: mapping_of::<R>(first, to), level: Level::L3 }, Some(PAGE_SIZE)),
            Kind::Poisoned => (Found::Poisoned, None),
            // Whatever it is, the hardware sees nothing.
            Kind::Invalid | Kind::Table(_) | Kind::Pending(_) => (Found::Absent { level: Level::L3 }, Some(0)),
        };
        let same = step.map_or(1, |step| run_length(machine, table, &indices, first.bits(), step));
        indices.start = indices.start.wrapping_add(same);
        let end = start.wrapping_add(PAGE_SIZE.wrapping_mul(u64::try_from(same).unwrap_or_default()));
        if let Ok(range) = PageRange::from_bounds(start, end) {
            f(range, found)?;
        }
        start = end;
    }
    ControlFlow::Continue(())
}

/// Returns how many descriptors of `table`, the first of `indices`, are `bits` and what follows in steps of `step`: at least one.
///
/// Four at a time, because this is what a range costs for each page.
fn run_length<M: Machine>(machine: &M, table: PhysAddr, indices: &Range<usize>, mut bits: u64, step: u64) -> usize {
    let mut index = indices.start;
    while indices.end.wrapping_sub(index) >= 4 {
        let read = |more: usize| machine.read(table, index.wrapping_add(more));
        let second = bits.wrapping_add(step);
        let third = second.wrapping_add(step);
        let fourth = third.wrapping_add(step);
        if !((read(0) == bits) & (read(1) == second) & (read(2) == third) & (read(3) == fourth)) {
            break;
        }
        bits = fourth.wrapping_add(step);
        index = index.wrapping_add(4);
    }
    while index < indices.end && machine.read(table, index) == bits {
        bits = bits.wrapping_add(step);
        index = index.wrapping_add(1);
    }
    index.wrapping_sub(indices.start).max(1)
}

/// Replaces a live descriptor: the only place where one takes another's place without an invalid one in between having
/// been flushed by [`PageTable::flush`].
fn replace<R: Regime, M: Machine>(machine: &M, tree: Vttbr, slot: Slot, new: Descriptor) {
    slot.write(machine, Descriptor::INVALID);
    machine.publish();
    if let Ok(range) = PageRange::from_bounds(slot.part.start, slot.part.end) {
        R::invalidate(machine, tree, range, true);
    }
    slot.write(machine, new);
}

/// Puts `table`, which nothing refers to any more, and all below it on the list of tables to be freed. Of its entries
/// `used` are still in use.
fn detach<R: Regime, M: Machine>(machine: &M, table: PhysAddr, level: Level, used: u64, flush: &mut Flush<R>) {
    if let Some(below) = level.next() {
        let (mut index, mut left) = (0, used);
        while left != 0 && index < TABLE_ENTRIES {
            let descriptor = Descriptor::from_bits(machine.read(table, index_of(index, 0)));
            if let Kind::Table(next) | Kind::Pending(next) = descriptor.kind(level) {
                detach(machine, next, below, descriptor.entries(), flush);
            }
            left = left.wrapping_sub(u64::from(descriptor != Descriptor::INVALID));
            index = index.wrapping_add(1);
        }
    }
    machine.write(table, 0, flush.detached.raw());
    flush.detached = table;
}

/// Links the tables that wait in `span`.
fn link_pending<M: Machine>(machine: &M, table: PhysAddr, level: Level, span: Span) -> bool {
    // Pending tables take the places of blocks, and the lowest of these are of level 2.
    let Some(below) = level.next() else {
        return false;
    };
    let mut linked = false;
    for slot in span.slots(table, level) {
        let old = slot.read(machine);
        match old.kind(level) {
            Kind::Table(next) => linked |= link_pending(machine, next, below, slot.part),
            Kind::Pending(next) => {
                if link_pending(machine, next, below, slot.part) {
                    machine.publish();
                }
                slot.write(machine, old.linked());
                linked = true;
            }
            Kind::Invalid | Kind::Poisoned | Kind::Leaf(_) => {}
        }
    }
    linked
}

/// Counts the tables that mapping `span` takes, with `table` as `None` for one that would have to be made.
fn count_to_map<M: Machine>(machine: &M, table: Option<PhysAddr>, level: Level, span: Span, wanted: Wanted) -> usize {
    let Some(below) = level.next() else {
        return 0;
    };
    let mut count = 0_usize;
    for slot in span.slots(table.unwrap_or(Addr::from_bits_truncating(0)), level) {
        let old = table.map_or(Descriptor::INVALID, |_| slot.read(machine));
        let next = match (old.kind(level), wanted.leaf(slot)) {
            (Kind::Table(next) | Kind::Pending(next), _) => Some(next),
            (Kind::Leaf(to), _) if wanted.is_met_by(old, to, slot) => continue,
            (Kind::Poisoned, _) | (_, Some(_)) => continue,
            (_, None) => None,
        };
        count = count.saturating_add(usize::from(next.is_none()));
        count = count.saturating_add(count_to_map(machine, next, below, slot.part, wanted));
    }
    count
}

/// Counts the tables that unmapping `span` takes.
fn count_to_unmap<M: Machine, S>(
    machine: &M,
    table: PhysAddr,
    level: Level,
    span: Span,
    after: Option<Addr<S>>,
) -> usize {
    let mut count = 0_usize;
    for slot in span.slots(table, level).filter(|slot| !slot.whole) {
        let old = slot.read(machine);
        match (old.kind(level), level.next()) {
            (Kind::Table(next) | Kind::Pending(next), Some(below)) => {
                count = count.saturating_add(count_to_unmap(machine, next, below, slot.part, after));
            }
            (Kind::Leaf(_) | Kind::Poisoned, Some(_)) => count = count.saturating_add(count_to_split(slot, after)),
            _ => {}
        }
    }
    count
}

/// Counts the tables that cutting the slot's part out of its leaf takes.
fn count_to_split<S>(slot: Slot, after: Option<Addr<S>>) -> usize {
    let Some(below) = slot.level.next() else {
        return 0;
    };
    let known = after.is_some_and(|after| slot.all().contains(after.raw()));
    slot.part
        .slots(slot.table, below)
        .filter(|child| !child.whole)
        .map(|child| count_to_split(child, after))
        .fold(usize::from(!known), usize::saturating_add)
}

impl<R: Regime> fmt::Debug for PageTable<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable").field("root", &self.root).field("tables", &self.tables).finish_non_exhaustive()
    }
}

const _: () = assert!(PAGE_SIZE == Level::L3.size());
