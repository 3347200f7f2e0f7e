//! The host's stage 2 as it fills.

use ravelin_memory::Level;

use super::*;

fn level(rig: &Rig<'_>, page: u64) -> Level {
    rig.with_region(page, |region, _| region.host.lookup(&rig.machine, Ipa::new(page).unwrap())).level
}

#[test]
fn ram_and_devices_get_the_largest_blocks() {
    let layout = large();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    for (page, expected) in [
        (0x900_0000, Level::L1),
        (GIB + 12_345 * PAGE, Level::L1),
        // The carve-out lies in the second GiB of RAM.
        (2 * GIB, Level::L2),
        (3 * GIB, Level::L1),
        (1 << 39, Level::L1),
    ] {
        assert_eq!(rig.touch(page), HostFault::Resolved);
        assert_eq!(level(&rig, page), expected, "{page:#x}");
    }
    rig.check();
}

#[test]
fn devices_are_not_cacheable_and_ram_is() {
    let layout = large();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.touch(0);
    rig.touch(GIB);
    let answer = |page| rig.machine.translate(Stage::Stage2, page);
    let mapped =
        |page, usage| BTreeSet::from([Some(Translation { to: addr(page), attributes: Stage2::attributes(usage) })]);
    assert_eq!(answer(0x900_0000), mapped(0x900_0000, Stage2Usage::Device));
    assert_eq!(answer(GIB), mapped(GIB, Stage2Usage::Memory));
}

#[test]
fn edges_of_ram_are_mapped_by_the_page() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    // The first five pages of the block are not RAM, the sixth is.
    assert_eq!(rig.touch(3 * GIB + 5 * PAGE), HostFault::Resolved);
    assert_eq!(level(&rig, 3 * GIB + 5 * PAGE), Level::L3);
    let usage = |page: u64| {
        let walk = rig.with_region(page, |region, _| region.host.lookup(&rig.machine, Ipa::new(page).unwrap()));
        walk.mapping().map(|mapping| mapping.usage)
    };
    assert_eq!(usage(3 * GIB + 4 * PAGE), Some(Stage2Usage::Device));
    assert_eq!(usage(3 * GIB + 511 * PAGE), Some(Stage2Usage::Memory));
    assert_eq!(usage(3 * GIB + 2 * MIB), None);
    rig.touch(3 * GIB + 1505 * PAGE);
    assert_eq!(usage(3 * GIB + 1504 * PAGE), Some(Stage2Usage::Memory));
    rig.check();
}

#[test]
fn what_is_not_the_hosts_is_denied() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.call(Donate, range(GIB, 1)).unwrap();
    for page in [GIB, GIB + 30 * MIB, GIB + 32 * MIB - PAGE, 0x900_0000, 1 << IPA_BITS, (1 << 48) - PAGE] {
        assert_eq!(rig.touch(page), HostFault::Denied, "{page:#x}");
    }
    // Around a reserved device, with the blocks that leave it out.
    assert_eq!(rig.touch(0x900_0000 + PAGE), HostFault::Resolved);
    assert_eq!(rig.touch(0x900_0000), HostFault::Denied);
    assert_eq!(rig.touch(0xa00_0000), HostFault::Resolved);
    assert_eq!((level(&rig, 0x900_1000), level(&rig, 0xa00_0000)), (Level::L3, Level::L2));
    let counts = rig.counts();
    assert_eq!((counts.faults_resolved, counts.faults_denied), (2, 7));
    rig.check();
}

#[test]
fn a_fault_that_has_been_dealt_with_changes_nothing() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.touch(GIB);
    let before = rig.machine.snapshot();
    assert_eq!(rig.touch(GIB), HostFault::Resolved);
    assert_eq!(rig.machine.snapshot(), before);
}

#[test]
fn a_fault_fills_one_entry_where_the_walk_ended() {
    let layout = large();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.call(Donate, range(GIB, 1)).unwrap();
    rig.touch(GIB + 2 * MIB);
    rig.call(TakeBack, range(GIB, 1)).unwrap();
    // All of the GiB could be one block again, but there is a table already.
    rig.touch(GIB + 4 * MIB);
    assert!(rig.host_reaches(GIB + 2 * MIB) && rig.host_reaches(GIB + 4 * MIB));
    assert!(!rig.host_reaches(GIB + 6 * MIB));
    rig.check();
}

#[test]
fn a_table_of_pages_is_filled_at_once() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.call(Donate, range(GIB + 5 * PAGE, 1)).unwrap();
    rig.call(Share, range(GIB + 9 * PAGE, 1)).unwrap();
    rig.touch(GIB + PAGE);
    let reached = (0..512).filter(|page| rig.host_reaches(GIB + page * PAGE)).count();
    assert_eq!(reached, 511);
    // Taken back, it is mapped by the next fault, next to what is there already.
    rig.call(Donate, range(GIB + 7 * PAGE, 1)).unwrap();
    rig.call(TakeBack, range(GIB + 5 * PAGE, 1)).unwrap();
    assert!(!rig.host_reaches(GIB + 5 * PAGE));
    rig.touch(GIB + 5 * PAGE);
    assert!(rig.host_reaches(GIB + 5 * PAGE) && !rig.host_reaches(GIB + 7 * PAGE));
    rig.check();
}

#[test]
fn in_a_table_that_is_there_a_neighbourhood_is_filled() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    // The first page stays away, so that the block is never one.
    rig.call(Donate, range(GIB, 1)).unwrap();
    let back = [70, 127, 128, 400];
    back.iter().for_each(|page| rig.call(Donate, range(GIB + page * PAGE, 1)).unwrap());
    rig.touch(GIB + PAGE);
    back.iter().for_each(|page| rig.call(TakeBack, range(GIB + page * PAGE, 1)).unwrap());
    rig.touch(GIB + 70 * PAGE);
    assert_eq!(back.map(|page| rig.host_reaches(GIB + page * PAGE)), [true, true, false, false]);
    rig.touch(GIB + 400 * PAGE);
    assert_eq!(back.map(|page| rig.host_reaches(GIB + page * PAGE)), [true, true, false, true]);
    rig.check();
}
