//! Operations across regions, and how memory is divided into them.

use ravelin_pgtable::TablePool;

use super::{
    guests::{
        Change::{Claim, Release, Share as GuestShare, Unshare as GuestUnshare},
        RAM, frames,
    },
    *,
};
use crate::{Batch, Conversion, GuestKind, MAX_STEPS, memory::MAX_REGIONS, table::RAM_REGIONS};

const REGION: u64 = GIB / PAGE;

/// 5 GiB of RAM in a row.
fn five() -> Layout {
    Layout { ram: vec![range(GIB, 5 * REGION)], carve_out: range(6 * GIB - 2 * MIB, 512), tables: 512, ..large() }
}

fn with_five(f: impl FnOnce(&Rig<'_>)) {
    let layout = five();
    let mut store = Store::for_ram(&layout.ram);
    f(&Rig::new(&layout, &mut store));
}

fn stage2_invalidations(rig: &Rig<'_>) -> usize {
    let log = invalidations(&rig.machine.take_log());
    log.iter().filter(|op| matches!(op, Op::InvalidateStage2(..))).count()
}

#[test]
fn a_range_across_regions_is_all_or_nothing() {
    with_five(|rig| {
        // The last page of the second region, all of the third and the first of the fourth.
        let across = range(3 * GIB - PAGE, REGION + 2);
        (1..5).for_each(|gib| assert_eq!(rig.touch(gib * GIB), HostFault::Resolved));
        rig.call(Share, range(4 * GIB, 1)).unwrap();
        let before = rig.everything();
        assert_eq!(rig.call(Donate, across), fails(Reason::Denied, 4 * GIB));
        assert!(rig.everything() == before);
        rig.call(Unshare, range(4 * GIB, 1)).unwrap();

        let _ = rig.machine.take_log();
        rig.call(Donate, across).unwrap();
        assert_eq!(stage2_invalidations(rig), 1);
        for page in [3 * GIB - PAGE, 3 * GIB, 4 * GIB - PAGE, 4 * GIB] {
            assert!(rig.el2_reaches(page) && !rig.host_reaches(page), "{page:#x}");
        }
        assert!(rig.host_reaches(3 * GIB - 2 * PAGE) && rig.host_reaches(4 * GIB + PAGE), "neighbours");
        rig.check();
        let before = rig.everything();
        assert_eq!(rig.call(TakeBack, range(across.base().raw(), REGION + 3)), fails(Reason::Denied, 4 * GIB + PAGE));
        assert!(rig.everything() == before);
        let _ = rig.machine.take_log();
        rig.call(TakeBack, across).unwrap();
        let log = invalidations(&rig.machine.take_log());
        assert_eq!(log.iter().filter(|op| matches!(op, Op::InvalidateEl2(_))).count(), 1);
        rig.check();
    });
}

#[test]
fn ranges_end_with_ram_wherever_that_is() {
    let layout = Layout { ram: vec![range(GIB, REGION), range(2 * GIB + MIB, 5), range(3 * GIB, 5)], ..large() };
    let layout = Layout { carve_out: range(GIB, 1), ..layout };
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    assert_eq!(rig.call(Share, range(2 * GIB - PAGE, 2)), fails(Reason::NotRam, 2 * GIB));
    let behind = 2 * GIB + MIB + 5 * PAGE;
    assert_eq!(rig.call(Share, range(behind - PAGE, REGION)), fails(Reason::NotRam, behind));
    assert_eq!(rig.call(Share, range(3 * GIB - PAGE, 2)), fails(Reason::NotRam, 3 * GIB - PAGE));
    assert_eq!(rig.call(Share, range(8 * GIB, 1)), fails(Reason::NotRam, 8 * GIB));
    let mut seen = 0;
    rig.memory.visit_entries(&rig.machine, range(2 * GIB - 3 * PAGE, 2 * REGION), &mut |run, _| seen += run.pages());
    assert_eq!(seen, 3, "to the first page that is not RAM");
    rig.check();
}

#[test]
fn a_guest_has_pages_of_many_regions() {
    for kind in [GuestKind::Pkvm, GuestKind::Realm] {
        with_five(|rig| {
            let guest = rig.guest(0, kind, 16);
            // Frames in a row, with pages in descending order.
            let pages = [5, 4, 3, 2].map(|gib| gib * GIB + 7 * PAGE);
            for (frame, page) in (0..).zip(pages) {
                rig.give(&guest, page, 1, RAM + frame * PAGE).unwrap();
            }
            let all = |change| rig.change(change, &guest, RAM, 4);
            assert_eq!(all(GuestShare), Ok(4), "{kind:?}");
            assert_eq!(all(Claim), Ok(4));
            pages.iter().for_each(|&page| assert_eq!(rig.touch(page), HostFault::Resolved));
            assert_eq!(rig.counts().guest_claimed, 4);
            let _ = rig.machine.take_log();
            assert_eq!(all(Release), Ok(4));
            assert_eq!(stage2_invalidations(rig), 1, "{kind:?}");
            assert!(pages.iter().all(|&page| !rig.host_reaches(page)));
            assert_eq!(all(GuestUnshare), Ok(4));
            rig.check_guest(&guest);
            // Pages in a row, of two regions.
            rig.give(&guest, 3 * GIB - PAGE, 2, RAM + 8 * PAGE).unwrap();
            assert_eq!(rig.change(GuestShare, &guest, RAM + 8 * PAGE, 2), Ok(2));
            rig.force(&guest, 3 * GIB - PAGE, 2).unwrap();
            rig.destroy(guest, frames(RAM, 16));
        });
    }
}

#[test]
fn a_batch_takes_locks_in_one_order() {
    with_five(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        let pages = [4, 2, 3, 2, 5].map(|gib| gib * GIB + 7 * PAGE);
        for (frame, page) in (0..).zip(pages) {
            rig.give(&guest, page + frame * PAGE, 1, RAM + frame * PAGE).unwrap();
        }
        assert_eq!(rig.change(GuestShare, &guest, RAM, 5), Ok(5));
        assert_eq!(rig.change(Claim, &guest, RAM, 5), Ok(5));
        for (frame, page) in (0..).zip(pages) {
            assert_eq!(rig.touch(page + frame * PAGE), HostFault::Resolved);
        }
        let unshare = |frame| Some(Conversion { range: frames(RAM + frame * PAGE, 1), share: false, released: true });
        let _ = rig.machine.take_log();
        let batch = rig.memory.guest_convert(&rig.machine, &guest, &mut (0..5).map(unshare));
        assert_eq!(batch, Batch { seen: 5, done: 0x1f, claimed: 0 });
        // What has been unmapped is flushed before the locks are released to take a lower one, which is twice.
        assert_eq!(stage2_invalidations(rig), 3);
        rig.check_guest(&guest);
    });
}

#[test]
fn there_is_a_bound_on_regions() {
    // As many as there can be regions of RAM, one a GiB, and one each 512 GiB: the latter are more than have locks of their own.
    for (distance, pages) in [(GIB, 2), (1 << 39, 1)] {
        let ram: Vec<_> = (1..=RAM_REGIONS as u64).map(|number| range(number * distance + MIB, pages)).collect();
        let layout = Layout { carve_out: range(ram[0].base().raw(), 1), ram, tables: 200, ..small() };
        let mut store = Store::for_ram(&layout.ram);
        let rig = Rig::with_bits(&layout, &mut store, 48);
        assert!(rig.memory.region_count() <= MAX_REGIONS + 1);
        for ram in &layout.ram[1..] {
            let page = ram.base().raw();
            assert_eq!(rig.touch(page), HostFault::Resolved);
            rig.call(Share, *ram).unwrap();
            rig.call(Pin, *ram).unwrap();
            assert!(rig.el2_reaches(page) && rig.host_reaches(page));
            assert_eq!(rig.call(Donate, *ram), fails(Reason::Denied, page));
        }
        assert_eq!(rig.touch(distance / 2), HostFault::Resolved, "a device");
        rig.check();
        rig.memory.with(&rig.machine, Mask::ALL, |locked| locked.evict_host(&rig.machine));
        assert!(layout.ram.iter().all(|ram| !rig.host_reaches(ram.base().raw())));
        assert_eq!(rig.counts().evictions, 1);
        rig.check();
    }
}

#[test]
fn what_is_reserved_is_there() {
    with_five(|rig| {
        let free = rig.counts().free_tables;
        let pool = rig.memory.pool();
        let (mut one, mut other) = (Tables::new(pool), Tables::new(pool));
        assert!(!one.reserve(free, 1) && one.reserve(free - 3, 3) && one.reserve(5, free));
        assert!(!other.reserve(4, 0) && other.reserve(2, 0) && other.reserve(2, 0));
        assert_eq!((one.available(), other.available()), (free - 2, 3));
        // One that nobody has reserved, and then those that have been.
        let taken: Vec<_> = std::iter::from_fn(|| other.allocate()).collect();
        assert_eq!((taken.len(), other.available(), one.available()), (3, 0, free - 3));
        // What comes back is reserved again as far as it was.
        taken.into_iter().for_each(|table| other.free(table));
        assert_eq!((one.available(), other.available()), (free - 2, 3));
        drop((one, other));
        assert_eq!(rig.counts().free_tables, free);
        assert_eq!(rig.memory.with_pool(|pool| pool.available()), free);
    });
}

#[test]
fn nothing_is_reserved_when_the_locks_are_free() {
    with_five(|rig| {
        let free = rig.counts().free_tables;
        let mut locked = rig.memory.lock(&rig.machine, Mask::ALL);
        assert!(locked.tables.reserve(5, 0));
        assert_eq!(Tables::new(rig.memory.pool()).available(), free - 5);
        locked.release();
        assert_eq!(Tables::new(rig.memory.pool()).available(), free, "before it is dropped");
    });
}

#[test]
fn limits_hold_across_regions() {
    with_five(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        let pages = MAX_STEPS / 2;
        rig.give(&guest, 3 * GIB - pages * PAGE, MAX_STEPS, RAM + PAGE).unwrap();
        rig.give(&guest, 4 * GIB, 8, RAM + PAGE + MAX_STEPS * PAGE).unwrap();
        assert_eq!(rig.change(GuestShare, &guest, RAM + PAGE, MAX_STEPS + 8), Ok(MAX_STEPS));
        rig.check_guest(&guest);
    });
}
