//! Where the hypervisor and the host's device tree go.

use ravelin_memory::{BLOCK_SIZE, PAGE_SIZE, PhysRange, TABLE_ENTRIES};

use crate::{DtbError, Fault, HostImage, Platform};

/// Pages of the stack on which start-up goes on in the carve-out, which go back to the pool: a power of two.
pub const START_STACK_PAGES: u64 = if cfg!(feature = "deep-stacks") { 64 } else { 32 };

/// Memory of each CPU in the carve-out, in bytes: its stack and what else is its own.
pub const CPU_BLOCK_SIZE: u64 = if cfg!(feature = "deep-stacks") { 64 << 10 } else { 12 << 10 };

/// Bytes that the pool has on top in the checking build, for the model.
pub const MODEL_MEMORY: u64 = if cfg!(feature = "checked") { 32 << 20 } else { 0 };

/// Bytes that the carve-out may have on top in other builds than the ordinary one: for the model, and for a larger image and larger
/// stacks, which would leave few tables on little memory.
const EXTRA_MEMORY: u64 = MODEL_MEMORY + if cfg!(feature = "deep-stacks") { BLOCK_SIZE } else { 0 };

/// Bytes of the entry that the ownership table has for a page, and of that for a block.
pub const ENTRY_SIZE: u64 = 8;

/// Translation tables that the pool should have, whatever the size of RAM.
const TABLES: u64 = 96;

/// Translation tables that it should have on top for each GiB of RAM.
const TABLES_PER_GIB: u64 = 24;

/// Translation tables without which there is no point in starting.
const MIN_TABLES: u64 = 32;

/// What the carve-out has to hold or stay away from, beyond what the device tree says.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Size of the hypervisor's image, with its zeroed data, in bytes.
    pub image_size: u64,
    /// Where the image runs now.
    pub running: PhysRange,
    /// Where the device tree is that [`Platform`] was read from.
    pub dtb: PhysRange,
}

/// Who gets which part of RAM. The parts of the carve-out follow each other in the order of the fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// All that the hypervisor keeps: whole 2 MiB blocks, in one region of RAM.
    pub carve_out: PhysRange,
    /// Page entries of the ownership table: one page for each 2 MiB block of RAM, those of a region side by side, in
    /// the order of [`Platform::ram`]; a block that a region covers only in part counts as a whole one. They come first
    /// so that 2 MiB blocks can map them.
    pub page_entries: PhysRange,
    /// Block entries of the ownership table: 8 bytes for each of those blocks.
    pub block_entries: PhysRange,
    /// The hypervisor's image.
    pub image: PhysRange,
    /// [`CPU_BLOCK_SIZE`] bytes for each CPU.
    pub cpus: PhysRange,
    /// The pages that translation tables are made of: all that is left.
    pub pool: PhysRange,
    /// Where the host's device tree goes: from a multiple of 2 MiB, outside the carve-out, and as much as it may need.
    pub host_dtb: PhysRange,
}

impl Layout {
    /// Chooses a place for everything.
    ///
    /// The device tree goes as low as it can, because hosts that are firmware look for it at the base of RAM;
    /// the carve-out goes as high as it can, out of the way of what has fixed ideas about addresses.
    ///
    /// # Errors
    ///
    /// Blames the node of a module that lies where the image runs or where the device tree is, and the root if there is
    /// not enough free RAM in one piece.
    pub fn plan(platform: &Platform<'_>, host: &HostImage, demand: &Demand) -> Result<Self, DtbError> {
        for module in core::iter::once(&platform.kernel).chain(&platform.ramdisk) {
            module.check_apart("the hypervisor's image", demand.running)?;
            module.check_apart("the device tree", demand.dtb)?;
        }
        let ramdisk = platform.ramdisk.as_ref().map(|ramdisk| ramdisk.bytes.pages());
        let used = || {
            let fixed = [Some(host.footprint), ramdisk, Some(demand.running), Some(demand.dtb)];
            fixed.into_iter().flatten().chain(platform.reserved.iter().copied())
        };

        let room = platform.host_dtb_room();
        let host_dtb = lowest(&platform.ram, room, used)
            .ok_or_else(|| Fault::NoRoom { what: "the host's device tree", size: room }.at(["/"]))?;

        let no_room = |size| Fault::NoRoom { what: "the hypervisor", size }.at(["/"]);
        let sizes = Sizes::of(platform, demand.image_size).ok_or_else(|| no_room(u64::MAX))?;
        let carve_out = highest(&platform.ram, sizes.carve_out, || used().chain([host_dtb]))
            .ok_or_else(|| no_room(sizes.carve_out))?;
        sizes.cut(carve_out, host_dtb).ok_or_else(|| no_room(sizes.carve_out))
    }
}

/// Sizes of the parts of the carve-out in bytes, each a multiple of the page size.
struct Sizes {
    page_entries: u64,
    block_entries: u64,
    image: u64,
    cpus: u64,
    carve_out: u64,
}

impl Sizes {
    fn of(platform: &Platform<'_>, image_size: u64) -> Option<Self> {
        let blocks = platform.ram.iter().try_fold(0_u64, |blocks, region| {
            let first = region.base().align_down(BLOCK_SIZE).raw();
            let end = region.end().checked_next_multiple_of(BLOCK_SIZE)?;
            blocks.checked_add(end.checked_sub(first)?.checked_div(BLOCK_SIZE)?)
        })?;
        let page_entries = blocks.checked_mul(TABLE_ENTRIES)?.checked_mul(ENTRY_SIZE)?;
        let block_entries = blocks.checked_mul(ENTRY_SIZE)?.checked_next_multiple_of(PAGE_SIZE)?;
        let image = image_size.max(1).checked_next_multiple_of(PAGE_SIZE)?;
        let cpus = CPU_BLOCK_SIZE.checked_mul(u64::try_from(platform.cpu_count()).ok()?)?;
        let fixed =
            [page_entries, block_entries, image, cpus, MODEL_MEMORY].into_iter().try_fold(0, u64::checked_add)?;

        let with_tables =
            |tables: u64| fixed.checked_add(tables.checked_mul(PAGE_SIZE)?)?.checked_next_multiple_of(BLOCK_SIZE);
        let ram = platform.ram_size();
        let wanted = with_tables(TABLES.checked_add((ram.div_ceil(1 << 30)).checked_mul(TABLES_PER_GIB)?)?)?;
        // With many CPUs or a large image on little memory there are fewer tables rather than more memory gone.
        let carve_out =
            if wanted <= budget(ram)?.checked_add(EXTRA_MEMORY)? { wanted } else { with_tables(MIN_TABLES)? };
        Some(Self { page_entries, block_entries, image, cpus, carve_out })
    }

    /// Lays the parts into the carve-out.
    fn cut(&self, carve_out: PhysRange, host_dtb: PhysRange) -> Option<Layout> {
        let mut next = carve_out.base().raw();
        let mut part = |size: u64| {
            let base = next;
            next = next.checked_add(size)?;
            PhysRange::from_bounds(base, next).ok()
        };
        let page_entries = part(self.page_entries)?;
        let block_entries = part(self.block_entries)?;
        let image = part(self.image)?;
        let cpus = part(self.cpus)?;
        let pool = PhysRange::from_bounds(next, carve_out.end()).ok()?;
        Some(Layout { carve_out, page_entries, block_entries, image, cpus, pool, host_dtb })
    }
}

/// Returns what the carve-out may take at most, in bytes: 2.25 MiB for each GiB of RAM, and 2 MiB.
fn budget(ram: u64) -> Option<u64> {
    ram.checked_mul(9)?.checked_div(4096)?.checked_add(2 << 20)
}

/// Returns the highest range of `size` bytes that begins at a multiple of 2 MiB, lies in one of the regions and has
/// nothing in common with what is used.
fn highest<I: Iterator<Item = PhysRange>>(regions: &[PhysRange], size: u64, used: impl Fn() -> I) -> Option<PhysRange> {
    regions.iter().rev().find_map(|region| {
        let mut end = region.end();
        loop {
            let base = end.checked_sub(size)?;
            let base = base.checked_sub(base.checked_rem(BLOCK_SIZE)?)?;
            let candidate = PhysRange::from_bounds(base, base.checked_add(size)?).ok()?;
            if !region.covers(&candidate) {
                return None;
            }
            // Each obstacle is passed once, so this ends.
            match used().find(|other| other.overlaps(&candidate)) {
                Some(obstacle) => end = obstacle.base().raw(),
                None => return Some(candidate),
            }
        }
    })
}

/// Returns the lowest range of `size` bytes that begins at a multiple of 2 MiB, lies in one of the regions and has nothing in
/// common with what is used.
fn lowest<I: Iterator<Item = PhysRange>>(regions: &[PhysRange], size: u64, used: impl Fn() -> I) -> Option<PhysRange> {
    regions.iter().find_map(|region| {
        let mut base = region.base().raw();
        loop {
            base = base.checked_next_multiple_of(BLOCK_SIZE)?;
            let candidate = PhysRange::from_bounds(base, base.checked_add(size)?).ok()?;
            if !region.covers(&candidate) {
                return None;
            }
            match used().find(|other| other.overlaps(&candidate)) {
                Some(obstacle) => base = obstacle.end(),
                None => return Some(candidate),
            }
        }
    })
}
