//! Random device trees: nothing panics, nothing overlaps, and what comes out can be read again.

use dtoolkit::{Node, fdt::Fdt};
use proptest::prelude::*;
use ravelin_memory::{BLOCK_SIZE, PAGE_SIZE, PhysRange};
use ravelin_platform::{Demand, HostImage, Layout, Platform, find_console};

use crate::{
    layout::{budget, check},
    tree::{GIC_V3, KERNEL, RAM_BASE, RAMDISK, Tree, demand, image_header, reg},
};

/// Does everything that can be done with a device tree.
fn everything(dtb: &[u8], header: &[u8]) {
    let _ = find_console(dtb);
    let platform = match Platform::parse(dtb) {
        Ok(platform) => platform,
        Err(error) => {
            assert!(error.to_string().starts_with("/"));
            return;
        }
    };
    assert_eq!(platform.cpus().count(), platform.cpu_count());
    let Ok(host) = HostImage::inspect(&platform, header) else { return };
    let Ok(layout) = Layout::plan(&platform, &host, &demand()) else { return };
    check(&platform, &layout, &demand(), host.footprint);
    let mut out = vec![0; 2 << 20];
    let size = platform.write_host_dtb(layout.carve_out, &mut out).unwrap();
    assert!(Fdt::new(&out[..size]).unwrap().find_node("/reserved-memory/ravelin").is_some());
}

/// Where the structure block of the fixture begins and where the strings block ends.
const STRUCTURE: usize = 56;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if cfg!(miri) { 5 } else { 2000 }) })]

    #[test]
    fn corrupt_bytes_never_panic(
        changes in prop::collection::vec((0..GIC_V3.len(), any::<u8>()), 1..6),
        header in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let mut dtb = GIC_V3.to_vec();
        for (at, byte) in changes {
            dtb[at] = byte;
        }
        everything(&dtb, &header);
    }

    #[test]
    fn corrupt_cells_never_panic(
        changes in prop::collection::vec((STRUCTURE / 4..GIC_V3.len() / 4, prop::sample::select(vec![
            0, 1, 2, 3, 4, 9, 0x1000, 0x4000_0000, 0x7fff_ffff, 0x8000_0000, 0xffff_f000, 0xffff_ffff_u32,
        ])), 1..4),
        image_size in any::<u64>(),
    ) {
        let mut dtb = GIC_V3.to_vec();
        for (at, cell) in changes {
            dtb[at * 4..at * 4 + 4].copy_from_slice(&cell.to_be_bytes());
        }
        everything(&dtb, &image_header(0, image_size >> (image_size % 64), 0));
    }

    #[test]
    fn garbage_never_panics(mut dtb in prop::collection::vec(any::<u8>(), 0..300), seal in any::<bool>()) {
        if seal && dtb.len() >= 40 {
            dtb[..40].copy_from_slice(&GIC_V3[..40]);
            let size = dtb.len() as u32;
            for (at, value) in [(4, size), (8, 56), (12, size), (16, 40), (32, 0), (36, size - 56.min(size))] {
                dtb[at..at + 4].copy_from_slice(&value.to_be_bytes());
            }
        }
        everything(&dtb, &dtb);
    }

}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 300 }) })]

    #[test]
    fn layouts_are_apart_and_within_the_budget(
        mib in 512_u64..16384,
        second in prop::option::of((0_u64..64, 1_u64..4096)),
        cpus in 1_u32..9,
        image_size in 1_u64..192 << 10,
        (kernel, size) in (1_u64..120, 1_u64..128 << 20),
        ramdisk in (256_u64..500, 1_u64..12 << 20),
        running in 0_u64..64,
        reserved in prop::collection::vec((0_u64..1 << 22, 1_u64..1 << 16), 0..8),
    ) {
        let mut regions = vec![(RAM_BASE, mib << 20)];
        if let Some((gap, pages)) = second {
            regions.push((RAM_BASE + (mib << 20) + gap * PAGE_SIZE, pages * PAGE_SIZE));
        }
        let mut tree = Tree::virt()
            .cpus(cpus)
            .ram(&regions)
            .set(KERNEL, "reg", reg(RAM_BASE + kernel * BLOCK_SIZE, 0x1000))
            .set(RAMDISK, "reg", reg(RAM_BASE + (ramdisk.0 << 20), ramdisk.1));
        for (page, size) in reserved {
            let entry = dtoolkit::memreserve::MemoryReservation::new(RAM_BASE + page * PAGE_SIZE, size);
            tree.0.memory_reservations.push(entry);
        }
        let demand = Demand { image_size, running: PhysRange::new(RAM_BASE + running * 4 * PAGE_SIZE, 32).unwrap(), ..demand() };
        let dtb = tree.dtb();
        let platform = Platform::parse(&dtb).unwrap();
        // Not every choice is possible; those that are not have their own tests.
        if let Ok(host) = HostImage::inspect(&platform, &image_header(0, size, 0))
            && let Ok(layout) = Layout::plan(&platform, &host, &demand)
        {
            check(&platform, &layout, &demand, host.footprint);
            // Between the usual sizes of RAM it may be rounded up to a whole block.
            prop_assert!(layout.carve_out.size() <= budget(platform.ram_size()).next_multiple_of(BLOCK_SIZE));
            prop_assert!(layout.pool.pages() >= 32);
            let mut out = vec![0; 1 << 20];
            let size = platform.write_host_dtb(layout.carve_out, &mut out).unwrap();
            let fdt = Fdt::new(&out[..size]).unwrap();
            let left: u64 = fdt
                .root()
                .children()
                .filter(|node| node.name().starts_with("memory@"))
                .flat_map(|node| node.reg().unwrap().unwrap())
                .map(|region| {
                    let (base, size) = (region.address::<u64>().unwrap(), region.size::<u64>().unwrap());
                    let range = PhysRange::from_bounds(base, base + size).unwrap();
                    assert!(!range.overlaps(&layout.carve_out));
                    size
                })
                .sum();
            prop_assert_eq!(left + layout.carve_out.size(), platform.ram_size());
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "slow there")]
fn truncation_never_panics() {
    for len in 0..GIC_V3.len() {
        assert!(Platform::parse(&GIC_V3[..len]).is_err());
    }
}

/// The work is bounded by the size of the device tree, whatever its shape: deep, wide, or full of properties.
#[test]
#[cfg_attr(miri, ignore = "slow there")]
fn the_largest_trees_end() {
    let cell = |dtb: &mut Vec<u8>, cell: u32| dtb.extend(cell.to_be_bytes());
    for shape in 0..3 {
        let mut dtb = vec![0; 56];
        cell(&mut dtb, 1);
        cell(&mut dtb, 0);
        let mut depth = 1;
        while dtb.len() < (2 << 20) - 64 - 4 * depth {
            match shape {
                0 => {
                    cell(&mut dtb, 1);
                    dtb.extend(b"a\0\0\0");
                    depth += 1;
                }
                1 => {
                    cell(&mut dtb, 1);
                    dtb.extend(b"a\0\0\0");
                    cell(&mut dtb, 2);
                }
                _ => [3, 0, 0].into_iter().for_each(|token| cell(&mut dtb, token)),
            }
        }
        (0..depth).for_each(|_| cell(&mut dtb, 2));
        cell(&mut dtb, 9);
        let strings = dtb.len();
        dtb.extend([b'b'; 31]);
        dtb.push(0);
        let size = dtb.len();
        for (at, value) in [
            (0, 0xd00d_feed),
            (4, size),
            (8, 56),
            (12, strings),
            (16, 40),
            (20, 17),
            (24, 16),
            (32, 32),
            (36, strings - 56),
        ] {
            dtb[at..at + 4].copy_from_slice(&(value as u32).to_be_bytes());
        }
        let message = Platform::parse(&dtb).unwrap_err().to_string();
        assert!(message.contains("no node of device_type memory"), "{message}");
        assert_eq!(find_console(&dtb), None);
    }
}
