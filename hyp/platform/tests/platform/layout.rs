//! Where everything goes.

use ravelin_memory::{BLOCK_SIZE, PAGE_SIZE, PhysRange};
use ravelin_platform::{CPU_BLOCK_SIZE, Demand, Layout, Platform};

use crate::tree::{GIC_V3, KERNEL, RAM_BASE, RAMDISK, Tree, demand, host, reg};

const GIB: u64 = 1 << 30;

/// What the carve-out may take at most.
pub(crate) fn budget(ram: u64) -> u64 {
    (2 << 20) + ram / GIB * (9 << 18) + ram % GIB * (9 << 18) / GIB
}

/// Makes sure that nothing of a layout overlaps what it must not.
pub(crate) fn check(platform: &Platform<'_>, layout: &Layout, demand: &Demand, footprint: PhysRange) {
    let blocks: u64 =
        platform.ram.iter().map(|region| region.end().div_ceil(BLOCK_SIZE) - region.base().raw() / BLOCK_SIZE).sum();
    let carve_out = layout.carve_out;
    assert_eq!((carve_out.base().raw() % BLOCK_SIZE, carve_out.size() % BLOCK_SIZE), (0, 0));
    let parts = [layout.page_entries, layout.block_entries, layout.image, layout.cpus, layout.pool];
    assert_eq!(parts[0].base(), carve_out.base());
    assert_eq!(parts[4].end(), carve_out.end());
    assert!(parts.windows(2).all(|pair| pair[0].end() == pair[1].base().raw()));
    assert_eq!(layout.page_entries.pages(), blocks);
    assert!(layout.block_entries.size() >= blocks * 8);
    assert!(layout.image.size() >= demand.image_size);
    assert_eq!(layout.cpus.size(), CPU_BLOCK_SIZE * platform.cpu_count() as u64);

    assert!(layout.host_dtb.base().is_aligned(BLOCK_SIZE) && layout.host_dtb.size() <= BLOCK_SIZE);
    assert!(!layout.host_dtb.overlaps(&carve_out));
    for ours in [carve_out, layout.host_dtb] {
        assert!(platform.ram.iter().any(|region| region.covers(&ours)), "{ours} is not RAM");
        let ramdisk = platform.ramdisk.as_ref().map(|ramdisk| ramdisk.bytes.pages());
        let taken = [footprint, demand.running, demand.dtb].into_iter().chain(ramdisk);
        for other in taken.chain(platform.reserved.iter().copied()) {
            assert!(!ours.overlaps(&other), "{ours} overlaps {other}");
        }
    }
}

fn plan(tree: &Tree, demand: &Demand) -> Layout {
    let dtb = tree.dtb();
    let platform = Platform::parse(&dtb).unwrap();
    let host = host(&platform);
    let layout = Layout::plan(&platform, &host, demand).unwrap();
    check(&platform, &layout, demand, host.footprint);
    layout
}

#[test]
fn the_budget_holds_for_every_size() {
    for (size, carve_out) in [(GIB / 2, 2), (GIB, 4), (2 * GIB, 6), (4 * GIB, 10), (8 * GIB, 18), (64 * GIB, 136)] {
        for cpus in [1, 2, 4, 8] {
            let layout = plan(&Tree::virt().cpus(cpus).ram(&[(RAM_BASE, size)]), &demand());
            assert_eq!(layout.carve_out.size(), carve_out << 20);
            assert!(layout.carve_out.size() <= budget(size));
            assert!(layout.pool.pages() >= 96 + 24 * size.div_ceil(GIB), "{} tables", layout.pool.pages());
            assert_eq!(layout.carve_out.end(), RAM_BASE + size);
            assert_eq!(layout.host_dtb.base().raw(), RAM_BASE);
        }
    }
}

#[test]
fn a_large_image_takes_from_the_pool_before_it_takes_from_the_host() {
    let tree = Tree::virt().cpus(1).ram(&[(RAM_BASE, GIB / 2)]);
    let layout = plan(&tree, &Demand { image_size: 800 << 10, ..demand() });
    assert_eq!(layout.carve_out.size(), 2 << 20);
    assert!(layout.pool.pages() < 96 + 12);
    // With an image that leaves no room for tables there is no other way.
    let layout = plan(&tree, &Demand { image_size: 1 << 20, ..demand() });
    assert_eq!(layout.carve_out.size(), 4 << 20);
}

#[test]
fn many_cpus_still_fit() {
    let layout = plan(&Tree::virt().cpus(256), &demand());
    assert_eq!(layout.cpus.size(), 3 << 20);
}

#[test]
fn the_carve_out_goes_below_what_is_in_its_way() {
    let top = RAM_BASE + 2 * GIB;
    let mut tree = Tree::virt().set(RAMDISK, "reg", reg(top - 0x1000, 0x1000));
    assert_eq!(plan(&tree, &demand()).carve_out.end(), top - BLOCK_SIZE);
    let entry = dtoolkit::memreserve::MemoryReservation::new(top - 5 * BLOCK_SIZE, PAGE_SIZE);
    tree.0.memory_reservations.push(entry);
    // Between the two there is room for its three blocks.
    assert_eq!(plan(&tree, &demand()).carve_out.end(), top - BLOCK_SIZE);
    let entry = dtoolkit::memreserve::MemoryReservation::new(top - 4 * BLOCK_SIZE, PAGE_SIZE);
    tree.0.memory_reservations.push(entry);
    assert_eq!(plan(&tree, &demand()).carve_out.end(), top - 5 * BLOCK_SIZE);
    let dtb = PhysRange::new(top - 6 * BLOCK_SIZE, 512).unwrap();
    let running = PhysRange::new(top - 11 * BLOCK_SIZE, 1).unwrap();
    assert_eq!(plan(&tree, &Demand { dtb, running, ..demand() }).carve_out.end(), top - 6 * BLOCK_SIZE);
}

#[test]
fn a_region_too_small_for_the_carve_out_is_passed_over() {
    let tree = Tree::virt().ram(&[(RAM_BASE, GIB), (8 * GIB, BLOCK_SIZE), (9 * GIB + PAGE_SIZE, 2 * BLOCK_SIZE)]);
    assert_eq!(plan(&tree, &demand()).carve_out.end(), RAM_BASE + GIB);
    let tree = Tree::virt().ram(&[(RAM_BASE, GIB), (8 * GIB, GIB)]);
    assert_eq!(plan(&tree, &demand()).carve_out.end(), 9 * GIB);
}

#[test]
fn the_host_dtb_gives_way() {
    let at = |tree: &Tree, demand: &Demand| plan(tree, demand).host_dtb.base().raw();
    // By default the image is right behind it.
    let kernel_below = Tree::virt().set(KERNEL, "reg", reg(RAM_BASE, 0x1000));
    assert_eq!(at(&kernel_below, &demand()), RAM_BASE + (16 << 20));
    let right_behind = PhysRange::new(RAM_BASE + 0x8_0000, 32).unwrap();
    assert_eq!(at(&Tree::virt(), &Demand { running: right_behind, ..demand() }), RAM_BASE);
    let inside = PhysRange::new(RAM_BASE + 0x4000, 32).unwrap();
    assert_eq!(at(&Tree::virt(), &Demand { running: inside, ..demand() }), RAM_BASE + BLOCK_SIZE);
    let dtb = PhysRange::new(RAM_BASE, 2).unwrap();
    assert_eq!(at(&Tree::virt(), &Demand { dtb, ..demand() }), RAM_BASE + 2 * BLOCK_SIZE);
    let unaligned = Tree::virt().ram(&[(RAM_BASE + PAGE_SIZE, GIB)]);
    assert_eq!(at(&unaligned, &demand()), RAM_BASE + 2 * BLOCK_SIZE);
}

#[test]
fn the_tables_come_at_block_granularity() {
    let platform = Platform::parse(GIC_V3).unwrap();
    let layout = Layout::plan(&platform, &host(&platform), &demand()).unwrap();
    assert_eq!(layout.page_entries.base().raw() % BLOCK_SIZE, 0);
    assert_eq!(layout.page_entries.size(), 4 << 20);
    assert_eq!(layout.block_entries.size(), 8 << 10);
}
