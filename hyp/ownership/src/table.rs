//! The ownership table: an entry per 2 MiB block and, where the block is split, one per page.

use core::ops::ControlFlow;

use arrayvec::ArrayVec;
use ravelin_memory::{BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_pgtable::Stage2Usage;

use crate::{
    counts::RegionCounts,
    entry::{Block, Entry, State},
    memory::{Failure, Reason},
    step::Step,
};

/// Pages in a block, and page entries that go with a block entry.
pub const PAGES_PER_BLOCK: usize = 512;

/// Regions of RAM that there may be.
pub(crate) const RAM_REGIONS: usize = 32;
const MAX_RESERVED: usize = 8;
const BLOCK_PAGE_SHIFT: u32 = 9;
const PAGES_PER_BLOCK_U64: u64 = 1 << BLOCK_PAGE_SHIFT;

/// What the caller has to provide for an [`OwnershipTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Number of 8-byte block entries.
    pub block_entries: usize,
    /// Number of 8-byte page entries: [`PAGES_PER_BLOCK`] for each block entry.
    pub page_entries: usize,
}

/// Why a description of memory is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// There are more than 32 regions of RAM, or more than 8 reserved device ranges.
    #[error("too many memory regions")]
    TooMany,
    /// Two regions of RAM overlap in this page.
    #[error("memory regions overlap at {0}")]
    Overlap(PhysAddr),
    /// What the hypervisor owns is not in one region of RAM.
    #[error("carve-out {0} not in one region of RAM")]
    CarveOut(PhysRange),
    /// The entries provided are fewer than [`sizes`] asks for.
    #[error("ownership table too small")]
    TooSmall,
}

/// One contiguous region of RAM.
#[derive(Clone, Copy, Debug)]
struct Region {
    range: PhysRange,
    /// Number of the first block that it touches, counted from address 0.
    first: u64,
    /// Number behind the last block that it touches.
    end: u64,
    /// Index of the first block's entry.
    index: usize,
}

type Regions = ArrayVec<Region, RAM_REGIONS>;

/// Who owns each page of RAM.
///
/// It is as large as RAM asks, 2 MiB and 4 KiB per GiB, but only the block entries are written when it is made. A block's
/// page entries may hold anything until the block is split.
pub struct OwnershipTable<'a> {
    regions: Regions,
    /// What of RAM the hypervisor owns from the start.
    carve_out: Option<PhysRange>,
    /// Device ranges that the hypervisor keeps to itself.
    reserved: ArrayVec<PhysRange, MAX_RESERVED>,
    blocks: &'a mut [u64],
    pages: &'a mut [[u64; PAGES_PER_BLOCK]],
}

/// A range that lies in one region of RAM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RamRange {
    range: PhysRange,
    /// Index of the entry of the block in which it begins; the others follow.
    index: usize,
}

/// The part of a range that lies in one block.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Index of the block's entry.
    index: usize,
    /// First page in the block.
    first: usize,
    /// Page behind the last one in the block.
    end: usize,
    /// Page number of the first page.
    page: u64,
}

impl Piece {
    fn is_whole(self) -> bool {
        self.len() == PAGES_PER_BLOCK
    }

    fn len(self) -> usize {
        self.end.wrapping_sub(self.first)
    }

    fn range(self) -> Option<PhysRange> {
        run_range((self.page, self.page.wrapping_add(to_u64(self.len()))))
    }
}

/// Writes `entry` and what follows it, and calls `replaced` with the old states, in runs.
fn replace_run(entries: &mut [u64], entry: Entry, replaced: &mut dyn FnMut(State, u64)) {
    let mut rest = &*entries;
    while let Some(first) = rest.first().copied().map(Entry::from_bits) {
        let same = first.states_length(rest);
        replaced(first.state(), to_u64(same));
        rest = rest.get(same..).unwrap_or_default();
    }
    entry.write_run(entries);
}

impl RamRange {
    /// Cuts the range at block boundaries.
    #[inline]
    fn pieces(self) -> impl Iterator<Item = Piece> {
        let mut page = self.range.base().page_number();
        let end = page.wrapping_add(self.range.pages());
        let mut index = self.index;
        core::iter::from_fn(move || {
            if page >= end {
                return None;
            }
            let first = page & PAGES_PER_BLOCK_U64.wrapping_sub(1);
            let pages = PAGES_PER_BLOCK_U64.wrapping_sub(first).min(end.wrapping_sub(page));
            let first_index = to_usize(first);
            let piece = Piece { index, first: first_index, end: first_index.wrapping_add(to_usize(pages)), page };
            page = page.wrapping_add(pages);
            index = index.wrapping_add(1);
            Some(piece)
        })
    }
}

fn address(page_number: u64) -> PhysAddr {
    PhysAddr::from_bits_truncating(page_number << PAGE_SHIFT)
}

/// Yields index and length of each run of entries that `f` accepts.
#[inline]
fn runs(entries: &[u64], f: impl Fn(Entry) -> bool) -> impl Iterator<Item = (usize, usize)> {
    let mut done = 0_usize;
    core::iter::from_fn(move || {
        let rest = entries.get(done..)?;
        let skipped = rest.iter().position(|&bits| f(Entry::from_bits(bits)))?;
        let rest = rest.get(skipped..)?;
        let length = rest.iter().position(|&bits| !f(Entry::from_bits(bits))).unwrap_or(rest.len());
        let first = done.wrapping_add(skipped);
        done = first.wrapping_add(length);
        Some((first, length))
    })
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn to_u64(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// Sorts `ranges`, joins those that touch, and gives each its place in the table. Returns the number of block entries too.
fn plan(ranges: &[PhysRange]) -> Result<(Regions, usize), SetupError> {
    let mut sorted = ArrayVec::<PhysRange, RAM_REGIONS>::new();
    sorted.try_extend_from_slice(ranges).map_err(|_| SetupError::TooMany)?;
    sorted.sort_unstable_by_key(|range| range.base());

    let mut joined = ArrayVec::<PhysRange, RAM_REGIONS>::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.base().raw() < last.end() => return Err(SetupError::Overlap(range.base())),
            Some(last) if range.base().raw() == last.end() => {
                *last = PhysRange::from_bounds(last.base().raw(), range.end()).unwrap_or(*last);
            }
            _ => joined.push(range),
        }
    }

    let mut regions = Regions::new();
    // Block number and index behind the last entry.
    let (mut behind, mut index) = (0, 0_usize);
    for range in joined {
        let first = range.base().raw() / BLOCK_SIZE;
        let end = range.end().div_ceil(BLOCK_SIZE);
        if first < behind {
            // The end of the last region lies in the same block, which has one entry.
            index = index.wrapping_sub(1);
        }
        regions.push(Region { range, first, end, index });
        index = index.saturating_add(to_usize(end.wrapping_sub(first)));
        behind = end;
    }
    Ok((regions, index))
}

/// Returns how many entries the ownership table of these regions of RAM needs.
///
/// # Errors
///
/// More than 32 regions, or regions that overlap.
pub fn sizes(regions: &[PhysRange]) -> Result<Sizes, SetupError> {
    let (_, blocks) = plan(regions)?;
    Ok(Sizes { block_entries: blocks, page_entries: blocks.saturating_mul(PAGES_PER_BLOCK) })
}

impl<'a> OwnershipTable<'a> {
    /// Makes the table in which the hypervisor owns `carve_out` and the host all the rest of `regions`, the RAM.
    ///
    /// Outside of RAM the host has access to everything but the device ranges `reserved`. `blocks` and `pages` have at
    /// least the sizes of [`sizes`]; what they hold does not matter.
    ///
    /// # Errors
    ///
    /// A description that contradicts itself or is too large; see [`SetupError`].
    pub fn new(
        regions: &[PhysRange],
        carve_out: PhysRange,
        reserved: &[PhysRange],
        blocks: &'a mut [u64],
        pages: &'a mut [[u64; PAGES_PER_BLOCK]],
    ) -> Result<Self, SetupError> {
        let (regions, count) = plan(regions)?;
        let (Some(blocks), Some(pages)) = (blocks.get_mut(..count), pages.get_mut(..count)) else {
            return Err(SetupError::TooSmall);
        };
        let mut reserved_ranges = ArrayVec::new();
        reserved_ranges.try_extend_from_slice(reserved).map_err(|_| SetupError::TooMany)?;

        blocks.fill(Block::uniform(Entry::NOBODY).bits());
        let mut table = Self { regions, carve_out: Some(carve_out), reserved: reserved_ranges, blocks, pages };
        for region in table.regions.clone() {
            table.set(RamRange { range: region.range, index: region.index }, Entry::new(State::HOST_OWNED, 0));
        }
        let Some(ram) = table.ram_range(carve_out).filter(|ram| ram.range == carve_out) else {
            return Err(SetupError::CarveOut(carve_out));
        };
        table.set(ram, Entry::new(State::HYP_OWNED, 0));
        Ok(table)
    }

    /// Yields the parts of memory of `1 << shift` bytes that have RAM in them, in ascending order.
    pub(crate) fn parts(&self, shift: u32) -> impl Iterator<Item = PhysRange> {
        let pages = 1_u64.wrapping_shl(shift.wrapping_sub(PAGE_SHIFT));
        let mut behind = 0;
        self.regions.iter().flat_map(move |region| {
            let first = (region.range.base().raw() >> shift).max(behind);
            behind = region.range.end().wrapping_sub(1).wrapping_shr(shift).wrapping_add(1).max(behind);
            (first..behind).filter_map(move |number| PhysRange::new(number << shift, pages).ok())
        })
    }

    /// Returns a table of the RAM below `end`, a multiple of the size of a block, and keeps the rest.
    pub(crate) fn split_off_below(&mut self, end: u64) -> Self {
        let (mut below, mut rest) = (Regions::new(), Regions::new());
        let mut entries = self.blocks.len();
        for region in self.regions.drain(..) {
            let cut = end / BLOCK_SIZE;
            let part =
                |from, to| PhysRange::from_bounds(region.range.base().raw().max(from), region.range.end().min(to));
            if let Ok(range) = part(0, end) {
                below.push(Region { range, end: region.end.min(cut), ..region });
            }
            if let Ok(range) = part(end, u64::MAX) {
                let index = region.index.saturating_add(to_usize(cut.saturating_sub(region.first)));
                entries = entries.min(index);
                rest.push(Region { range, first: region.first.max(cut), index, ..region });
            }
        }
        rest.iter_mut().for_each(|region| region.index = region.index.saturating_sub(entries));
        let (blocks, rest_blocks) = core::mem::take(&mut self.blocks).split_at_mut(entries);
        let (pages, rest_pages) = core::mem::take(&mut self.pages).split_at_mut(entries);
        let carve_out = |from, to| {
            let all = self.carve_out?;
            PhysRange::from_bounds(all.base().raw().max(from), all.end().min(to)).ok()
        };
        let below =
            Self { regions: below, carve_out: carve_out(0, end), reserved: self.reserved.clone(), blocks, pages };
        self.carve_out = carve_out(end, u64::MAX);
        (self.regions, self.blocks, self.pages) = (rest, rest_blocks, rest_pages);
        below
    }

    /// Returns the region of RAM that `page` lies in, and the index of its block's entry.
    #[inline]
    fn region_of(&self, page: PhysAddr) -> Option<(&Region, usize)> {
        let region = self.regions.iter().find(|region| region.range.contains(page))?;
        let offset = (page.raw() / BLOCK_SIZE).wrapping_sub(region.first);
        Some((region, region.index.wrapping_add(to_usize(offset))))
    }

    /// Returns the part of `range` that is RAM from its first page on, if that page is.
    ///
    /// Regions that touch are one, so what follows that part is not RAM.
    #[inline]
    pub(crate) fn ram_range(&self, range: PhysRange) -> Option<RamRange> {
        let (region, index) = self.region_of(range.base())?;
        if range.end() <= region.range.end() {
            return Some(RamRange { range, index });
        }
        region.range.intersection(&range).map(|range| RamRange { range, index })
    }

    /// Returns the entry of a page, or `None` if it is not RAM.
    pub(crate) fn entry(&self, page: PhysAddr) -> Option<Entry> {
        let piece = self.ram_range(PhysRange::single(page))?.pieces().next()?;
        match self.block(piece.index).as_uniform() {
            Some(entry) => Some(entry.following(to_u64(piece.first))),
            None => self.pages.get(piece.index)?.get(piece.first).copied().map(Entry::from_bits),
        }
    }

    /// Returns the entry of the first page of the block in which `page` lies, if the block is uniform RAM.
    pub(crate) fn uniform_entry(&self, page: PhysAddr) -> Option<Entry> {
        self.block(self.ram_range(PhysRange::single(page))?.index).as_uniform()
    }

    /// Returns how the host may access a page, if at all.
    pub(crate) fn host_access(&self, page: PhysAddr) -> Option<Stage2Usage> {
        match self.entry(page) {
            Some(entry) => entry.state().host_access().then_some(Stage2Usage::Memory),
            None => (!self.reserved.iter().any(|range| range.contains(page))).then_some(Stage2Usage::Device),
        }
    }

    /// Calls `f` in ascending order with each run of pages of `block`, one block or a part of one, that the host may access in one
    /// way.
    pub(crate) fn host_runs(&self, block: PhysRange, f: &mut dyn FnMut(PhysRange, Stage2Usage)) {
        let first = block.base().page_number();
        if let Some(ram) = self.ram_range(block).filter(|ram| ram.range == block) {
            let Some(piece) = ram.pieces().next() else { return };
            match self.block(piece.index).as_uniform() {
                Some(entry) if entry.state().host_access() => f(block, Stage2Usage::Memory),
                Some(_) => {}
                None => {
                    for (index, pages) in runs(self.entries(piece), |entry| entry.state().host_access()) {
                        let start = first.wrapping_add(to_u64(index));
                        if let Some(run) = run_range((start, start.wrapping_add(to_u64(pages)))) {
                            f(run, Stage2Usage::Memory);
                        }
                    }
                }
            }
            return;
        }
        // At the edges of RAM, page by page.
        let mut run: Option<(PhysRange, Stage2Usage)> = None;
        for page in block.iter() {
            let usage = self.host_access(page);
            run = match (run, usage) {
                (Some((range, old)), Some(new)) if old == new => {
                    let start = range.base().page_number();
                    run_range((start, page.page_number().wrapping_add(1))).map(|range| (range, old))
                }
                (done, new) => {
                    if let Some((range, usage)) = done {
                        f(range, usage);
                    }
                    new.map(|usage| (PhysRange::single(page), usage))
                }
            };
        }
        if let Some((range, usage)) = run {
            f(range, usage);
        }
    }

    /// Returns whether the host may access all of `range`, whole blocks, as `usage`, by block entries and regions alone.
    pub(crate) fn is_uniform_for_host(&self, range: PhysRange, usage: Stage2Usage) -> bool {
        match usage {
            Stage2Usage::Memory => {
                let Some(ram) = self.ram_range(range).filter(|ram| ram.range == range) else {
                    return false;
                };
                let end = ram.index.wrapping_add(to_usize(range.size() / BLOCK_SIZE));
                let accessible =
                    |bits: &u64| Block::from_bits(*bits).as_uniform().is_some_and(|entry| entry.state().host_access());
                self.blocks.get(ram.index..end).is_some_and(|blocks| blocks.iter().all(accessible))
            }
            Stage2Usage::Device => {
                !self.regions.iter().any(|region| region.range.overlaps(&range))
                    && !self.reserved.iter().any(|reserved| reserved.overlaps(&range))
            }
        }
    }

    /// Checks that `step` may be taken from every page of `range`, which is RAM then.
    pub(crate) fn check(&self, range: PhysRange, step: &Step) -> Result<(), Failure> {
        let not_ram = |page| Failure { reason: Reason::NotRam, page };
        let ram = self.ram_range(range).ok_or(not_ram(range.base()))?;
        for piece in ram.pieces() {
            match self.block(piece.index).as_uniform() {
                Some(entry) if step.allows(entry) => {}
                Some(entry) => return Err(Failure { reason: step.reason(entry), page: address(piece.page) }),
                None => {
                    let entries = self.entries(piece);
                    if let Some(bad) = step.first_refused(entries) {
                        let entry = entries.get(bad).copied().map_or(Entry::NOBODY, Entry::from_bits);
                        let page = address(piece.page.wrapping_add(to_u64(bad)));
                        return Err(Failure { reason: step.reason(entry), page });
                    }
                }
            }
        }
        match PhysAddr::new(ram.range.end()) {
            Some(end) if ram.range.end() < range.end() => Err(not_ram(end)),
            _ => Ok(()),
        }
    }

    /// Calls `f` in ascending order with each run of pages of `range` that `step`, which has been checked, puts into the EL2
    /// stage 1 or takes out of it.
    pub(crate) fn el2_runs(&self, range: PhysRange, step: &Step, f: &mut dyn FnMut(PhysRange)) {
        let Some(ram) = self.ram_range(range) else { return };
        let mut run: Option<(u64, u64)> = None;
        let mut extend = |start: u64, pages: usize| {
            let end = start.wrapping_add(to_u64(pages));
            match &mut run {
                Some((_, last)) if *last == start => *last = end,
                _ => {
                    if let Some(range) = run.replace((start, end)).and_then(run_range) {
                        f(range);
                    }
                }
            }
        };
        for piece in ram.pieces() {
            match self.block(piece.index).as_uniform() {
                Some(entry) if step.changes_el2(entry) => extend(piece.page, piece.len()),
                Some(_) => {}
                None => {
                    for (first, pages) in runs(self.entries(piece), |entry| step.changes_el2(entry)) {
                        extend(piece.page.wrapping_add(to_u64(first)), pages);
                    }
                }
            }
        }
        if let Some(range) = run.and_then(run_range) {
            f(range);
        }
    }

    /// Takes `step`, which has been checked, from every page of `range`. Calls `collapsed` with each block of which the host
    /// has become the sole owner of all pages.
    pub(crate) fn commit(&mut self, range: PhysRange, step: &Step, collapsed: &mut dyn FnMut(PhysRange)) {
        let Some(ram) = self.ram_range(range) else { return };
        for piece in ram.pieces() {
            if let (Some(entry), true) = (self.block(piece.index).as_uniform(), piece.is_whole()) {
                self.set_block(piece.index, Block::uniform(step.apply(entry)));
                continue;
            }
            let owned = self.split(piece.index).wrapping_add(step.owned.wrapping_mul(to_u64(piece.len())));
            step.apply_all(self.entries_mut(piece));
            if owned == PAGES_PER_BLOCK_U64 {
                self.set_block(piece.index, Block::uniform(Entry::new(State::HOST_OWNED, 0)).primed());
                let base = address(piece.page).align_down(BLOCK_SIZE);
                if let Ok(block) = PhysRange::new(base.raw(), PAGES_PER_BLOCK_U64) {
                    collapsed(block);
                }
            } else {
                self.set_block(piece.index, Block::split(owned));
            }
        }
    }

    /// Calls `f` in ascending order with each run of pages of `range` whose entries say the same, until `f` breaks: the pages,
    /// the entry of the first and what it costs to look at and change them: one step for a block that is uniform and covered
    /// as a whole, otherwise one for each page. What is not RAM has no entry.
    pub(crate) fn visit<B>(
        &self,
        range: PhysRange,
        f: &mut dyn FnMut(PhysRange, Option<Entry>, u64) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        if range.pages() == 1 {
            return f(range, self.entry(range.base()), 1);
        }
        let mut ended = ControlFlow::Continue(());
        // Compiled once, whatever it ends with.
        let _: ControlFlow<()> = self.visit_runs(range, &mut |run, entry, steps| {
            ended = f(run, entry, steps);
            if ended.is_break() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        ended
    }

    #[inline(never)]
    fn visit_runs(
        &self,
        range: PhysRange,
        f: &mut dyn FnMut(PhysRange, Option<Entry>, u64) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let Some(ram) = self.ram_range(range) else {
            return f(PhysRange::single(range.base()), None, 1);
        };
        for piece in ram.pieces() {
            if let Some(entry) = self.block(piece.index).as_uniform() {
                let Some(run) = piece.range() else { continue };
                let steps = if piece.is_whole() { 1 } else { run.pages() };
                f(run, Some(entry.following(to_u64(piece.first))), steps)?;
                continue;
            }
            let mut entries = self.entries(piece);
            let mut page = piece.page;
            while let Some(first) = entries.first().copied().map(Entry::from_bits) {
                let same = first.run_length(entries);
                let end = page.wrapping_add(to_u64(same));
                if let Some(run) = run_range((page, end)) {
                    f(run, Some(first), to_u64(same))?;
                }
                page = end;
                entries = entries.get(same..).unwrap_or_default();
            }
        }
        match PhysAddr::new(ram.range.end()) {
            Some(end) if ram.range.end() < range.end() => f(PhysRange::single(end), None, 1),
            _ => ControlFlow::Continue(()),
        }
    }

    /// Sets the entries of `range`, which is RAM, to `entry` and what follows it. Calls `moved` with numbers of pages and the
    /// states that they were in, and `collapsed` as [`OwnershipTable::commit`] does.
    pub(crate) fn assign(
        &mut self,
        range: PhysRange,
        entry: Entry,
        moved: &mut dyn FnMut(State, u64),
        collapsed: &mut dyn FnMut(PhysRange),
    ) {
        let Some(ram) = self.ram_range(range) else { return };
        let host_owned = Entry::new(State::HOST_OWNED, 0);
        for piece in ram.pieces() {
            let entry = entry.following(piece.page.wrapping_sub(range.base().page_number()));
            let uniform = self.block(piece.index).as_uniform();
            let was_split = uniform.is_none();
            let whole = if piece.is_whole() {
                match uniform {
                    Some(old) => moved(old.state(), PAGES_PER_BLOCK_U64),
                    None => replace_run(self.entries_mut(piece), entry, moved),
                }
                self.set_block(piece.index, Block::uniform(entry));
                true
            } else {
                let mut total = self.split(piece.index);
                replace_run(self.entries_mut(piece), entry, &mut |old, pages| {
                    if old == State::HOST_OWNED {
                        total = total.wrapping_sub(pages);
                    }
                    moved(old, pages);
                });
                if entry == host_owned {
                    total = total.wrapping_add(to_u64(piece.len()));
                }
                let whole = total == PAGES_PER_BLOCK_U64;
                let uniform = Block::uniform(host_owned).primed();
                self.set_block(piece.index, if whole { uniform } else { Block::split(total) });
                whole
            };
            let block = address(piece.page).align_down(BLOCK_SIZE);
            if let (true, true, Ok(block)) =
                (whole && entry == host_owned, was_split, PhysRange::new(block.raw(), PAGES_PER_BLOCK_U64))
            {
                collapsed(block);
            }
        }
    }

    /// Gives one page of a split block, or all of a uniform one, the entry `new` and what follows it, if it has `old` and what follows
    /// that. Returns whether it had. Both are entries of a guest, so that no block has them of which part is not RAM.
    #[inline]
    pub(crate) fn exchange(&mut self, pages: PhysRange, old: Entry, new: Entry) -> bool {
        let Some((_, index)) = self.region_of(pages.base()) else { return false };
        let Some(block) = self.blocks.get_mut(index) else { return false };
        let in_block = to_usize(pages.base().page_number() & PAGES_PER_BLOCK_U64.wrapping_sub(1));
        let bits = match Block::from_bits(*block).as_uniform() {
            Some(_) if in_block == 0 && pages.pages() == PAGES_PER_BLOCK_U64 => Some(block),
            None if pages.pages() == 1 => self.pages.get_mut(index).and_then(|pages| pages.get_mut(in_block)),
            _ => None,
        };
        // A uniform block's entry is that of its first page.
        let Some(bits) = bits.filter(|bits| Entry::from_bits(**bits) == old) else { return false };
        *bits = new.bits();
        true
    }

    /// Yields every block of RAM with its number of pages in state `HostOwned`, if it is split.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (PhysRange, Option<u64>)> {
        // A block in which one region ends and the next begins counts once.
        let starts = self.regions.iter().scan(0, |behind, region| {
            let start = region.first.max(*behind);
            *behind = region.end;
            Some(start..region.end)
        });
        starts.flatten().zip(0..).filter_map(|(number, index)| {
            let range = PhysRange::new(number.wrapping_mul(BLOCK_SIZE), PAGES_PER_BLOCK_U64).ok()?;
            let block = self.block(index);
            Some((range, block.as_uniform().is_none().then(|| block.owned())))
        })
    }

    /// Returns copies of all entries.
    #[cfg(test)]
    pub(crate) fn raw(&self) -> (Vec<u64>, Vec<[u64; PAGES_PER_BLOCK]>) {
        (self.blocks.to_vec(), self.pages.to_vec())
    }

    /// Returns the page entries of a piece.
    #[inline]
    fn entries(&self, piece: Piece) -> &[u64] {
        self.pages.get(piece.index).and_then(|pages| pages.get(piece.first..piece.end)).unwrap_or_default()
    }

    #[inline]
    fn entries_mut(&mut self, piece: Piece) -> &mut [u64] {
        self.pages.get_mut(piece.index).and_then(|pages| pages.get_mut(piece.first..piece.end)).unwrap_or_default()
    }

    fn block(&self, index: usize) -> Block {
        Block::from_bits(self.blocks.get(index).copied().unwrap_or_default())
    }

    pub(crate) fn set_block(&mut self, index: usize, block: Block) {
        if let Some(bits) = self.blocks.get_mut(index) {
            *bits = block.bits();
        }
    }

    /// Makes the page entries of a block count and returns how many of them are `HostOwned`.
    #[inline]
    fn split(&mut self, index: usize) -> u64 {
        let block = self.block(index);
        let Some(entry) = block.as_uniform() else {
            return block.owned();
        };
        if !block.is_primed() {
            self.prime(index, entry);
        }
        let owned = if entry.state() == State::HOST_OWNED { PAGES_PER_BLOCK_U64 } else { 0 };
        self.set_block(index, Block::split(owned));
        owned
    }

    /// Sets all page entries of a block.
    fn prime(&mut self, index: usize, entry: Entry) {
        if let Some(pages) = self.pages.get_mut(index) {
            if entry.state().has_frame() {
                entry.write_run(pages);
                return;
            }
            let entry = entry.bits();
            for run in pages.as_chunks_mut().0 {
                *run = [entry, entry, entry, entry, entry, entry, entry, entry];
            }
        }
    }

    /// Returns how many pages are in which state when nothing has changed hands yet.
    pub(crate) fn first_counts(&self) -> RegionCounts {
        let ram = self.regions.iter().map(|region| region.range.pages()).fold(0, u64::wrapping_add);
        let hyp_owned = self.carve_out.map_or(0, |range| range.pages());
        let mut counts = RegionCounts::default();
        counts.moved(State::NOBODY, State::HOST_OWNED, ram.wrapping_sub(hyp_owned));
        counts.moved(State::NOBODY, State::HYP_OWNED, hyp_owned);
        counts
    }

    /// Sets every page of `ram` to `entry`, whatever it was: for the start.
    fn set(&mut self, ram: RamRange, entry: Entry) {
        let (start, end) = (ram.range.base().raw(), ram.range.end());
        // The blocks that lie in it as a whole.
        let (first, behind) = (start.div_ceil(BLOCK_SIZE), end / BLOCK_SIZE);
        let edges = if first < behind {
            let index = ram.index.wrapping_add(to_usize(first.wrapping_sub(start / BLOCK_SIZE)));
            let whole = index..index.wrapping_add(to_usize(behind.wrapping_sub(first)));
            self.blocks.get_mut(whole).unwrap_or_default().fill(Block::uniform(entry).bits());
            [(start, first.wrapping_mul(BLOCK_SIZE)), (behind.wrapping_mul(BLOCK_SIZE), end)]
        } else {
            [(start, end), (end, end)]
        };
        let edges = edges.map(|(start, end)| self.ram_range(PhysRange::from_bounds(start, end).ok()?));
        for piece in edges.into_iter().flatten().flat_map(RamRange::pieces) {
            self.split(piece.index);
            self.entries_mut(piece).fill(entry.bits());
            let host_owned = Entry::new(State::HOST_OWNED, 0).bits();
            let pages = self.pages.get(piece.index).map(|pages| pages.iter());
            let owned = pages.into_iter().flatten().filter(|&&bits| bits == host_owned).count();
            self.set_block(piece.index, Block::split(to_u64(owned)));
        }
    }
}

fn run_range((start, end): (u64, u64)) -> Option<PhysRange> {
    PhysRange::new(start << PAGE_SHIFT, end.wrapping_sub(start)).ok()
}

const _: () = assert!(BLOCK_SIZE == PAGE_SIZE << BLOCK_PAGE_SHIFT);
