//! Mapping and unmapping, case by case.

use ravelin_memory::Level;

use super::*;
use crate::{Mapping, recording::invalidations};

#[test]
fn the_largest_blocks_are_used() {
    let mut rig = stage2(40);
    // 1 GiB and 2 MiB blocks and a page, in one range.
    rig.identity(pages(3 * GIB, (GIB + 2 * MIB + PAGE) / PAGE));
    let level = |addr| rig.table.lookup(&rig.machine, Addr::new(addr).unwrap()).level;
    assert_eq!(level(3 * GIB), Level::L1);
    assert_eq!(level(4 * GIB), Level::L2);
    assert_eq!(level(4 * GIB + 2 * MIB), Level::L3);
    assert_eq!(rig.table.tables(), 2);
    assert!(rig.is_identity(4 * GIB + 2 * MIB));
    assert_eq!(rig.answer(4 * GIB + 2 * MIB + PAGE), None);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn the_alignment_of_both_sides_limits_the_block() {
    let mut rig = el2();
    rig.map(pages(2 * GIB, GIB / PAGE), 2 * MIB, El2Usage::Data).unwrap();
    rig.map(pages(4 * GIB, 512), 3 * PAGE, El2Usage::Data).unwrap();
    rig.machine.assert_quiescent();
    let lookup = |addr| rig.table.lookup(&rig.machine, Addr::new(addr).unwrap());
    assert_eq!(lookup(2 * GIB).level, Level::L2);
    let last = lookup(4 * GIB + 511 * PAGE + 12);
    assert_eq!(last.level, Level::L3);
    let to = PhysAddr::new(514 * PAGE + 12).unwrap();
    assert_eq!(last.mapping(), Some(Mapping { to, usage: El2Usage::Data }));
}

#[test]
fn level_zero_has_no_blocks() {
    let mut rig = el2();
    rig.identity(pages(0, 512 * GIB / PAGE));
    assert_eq!(rig.table.lookup(&rig.machine, Addr::new(GIB).unwrap()).level, Level::L1);
    assert_eq!(rig.table.tables(), 1);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn mapping_again_writes_nothing() {
    let mut rig = stage2(40);
    assert_eq!((rig.table.root(), rig.table.vttbr().root), (ROOT, ROOT));
    let range = pages(GIB - 2 * MIB, 514);
    rig.identity(range);
    let _ = rig.machine.take_log();
    rig.identity(range);
    // Inside a block as well.
    let inside = pages(GIB - 2 * MIB + PAGE, 3);
    let tables = |to| rig.table.tables_to_map(&rig.machine, inside, Addr::new(to).unwrap(), Stage2::USAGE);
    assert_eq!((tables(inside.base().raw()), tables(GIB)), (0, 1));
    rig.identity(inside);
    assert_eq!(rig.machine.take_log(), [Op::Publish, Op::Publish]);
}

#[test]
fn concatenated_roots_meet() {
    let mut rig = stage2(40);
    let border = 1 << 39;
    rig.identity(pages(border - PAGE, 2));
    assert!(rig.is_identity(border - PAGE) && rig.is_identity(border));
    assert!(rig.unmap(&[pages(border - PAGE, 2)]));
    assert_eq!(rig.pool.in_use(), 0);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn two_level_tables_work() {
    let mut rig = stage2(32);
    rig.identity(pages(GIB, GIB / PAGE + 1));
    assert_eq!(rig.table.lookup(&rig.machine, Addr::new(GIB).unwrap()).level, Level::L2);
    assert!(rig.is_identity(2 * GIB));
}

#[test]
fn the_end_of_the_space_is_respected() {
    let mut rig = stage2(40);
    assert_eq!(rig.map(pages((1 << 40) - PAGE, 2), 0, Stage2Usage::Memory), Err(MapError::OutOfRange));
    assert_eq!(rig.map(pages(0, 2), (1 << 48) - PAGE, Stage2Usage::Memory), Err(MapError::OutOfRange));
    assert_eq!(rig.table.lookup(&rig.machine, Addr::new(1 << 40).unwrap()).mapping(), None);
    assert!(!rig.unmap(&[pages(1 << 40, 512)]));
    rig.identity(pages((1 << 40) - PAGE, 1));
    assert!(rig.unmap(&[pages((1 << 40) - PAGE, 512)]));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn a_cut_block_keeps_the_rest() {
    let mut rig = stage2(40);
    rig.identity(pages(GIB, GIB / PAGE));
    let _ = rig.machine.take_log();
    let hole = pages(GIB + 4 * MIB + 7 * PAGE, 1);
    assert_eq!(rig.table.tables_to_unmap(&rig.machine, hole, None), 2);
    assert!(rig.unmap(&[hole]));
    let log = rig.machine.take_log();
    assert_eq!(invalidations(&log), [Op::InvalidateStage2(Vmid::HOST, hole, true)]);
    assert_eq!(allocations(&log), 2);
    for page in [0, 4 * MIB, 4 * MIB + 6 * PAGE, 4 * MIB + 8 * PAGE, 6 * MIB, GIB - PAGE] {
        assert!(rig.is_identity(GIB + page), "{page:#x}");
    }
    assert_eq!(rig.answer(hole.base().raw()), None);
    let level = |addr| rig.table.lookup(&rig.machine, Addr::new(addr).unwrap()).level;
    assert_eq!((level(GIB), level(GIB + 4 * MIB)), (Level::L2, Level::L3));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn a_range_across_blocks_needs_four_tables_at_most() {
    let mut rig = stage2(40);
    rig.identity(pages(GIB, 2 * GIB / PAGE));
    let hole = pages(2 * GIB - 3 * MIB - PAGE, (6 * MIB) / PAGE);
    assert_eq!(rig.table.tables_to_unmap(&rig.machine, hole, None), 4);
    let _ = rig.machine.take_log();
    rig.unmap(&[hole]);
    let log = rig.machine.take_log();
    assert_eq!((allocations(&log), invalidations(&log).len()), (4, 1));
    assert!(rig.is_identity(hole.base().raw() - PAGE) && rig.is_identity(hole.end()));
    assert!(!rig.machine.reaches(Stage::Stage2, hole));
}

#[test]
fn what_is_not_mapped_needs_no_invalidation() {
    let mut rig = stage2(40);
    rig.identity(pages(GIB, 1));
    assert!(!rig.unmap(&[pages(GIB + PAGE, 5), pages(8 * GIB, 1 << 18)]));
}

#[test]
fn emptied_tables_go_back() {
    let mut rig = el2();
    rig.identity(pages(GIB, 3));
    assert_eq!(rig.table.tables(), 3);
    rig.unmap(&[pages(GIB + PAGE, 1)]);
    assert_eq!(rig.table.tables(), 3);
    let _ = rig.machine.take_log();
    rig.unmap(&[pages(GIB, 1), pages(GIB + 2 * PAGE, 1)]);
    assert_eq!((rig.table.tables(), rig.pool.in_use()), (0, 0));
    let log = rig.machine.take_log();
    assert_eq!(invalidations(&log), [Op::InvalidateEl2(pages(GIB, 3))]);
    let invalidation = log.iter().position(|op| matches!(op, Op::InvalidateEl2(_))).unwrap();
    assert!(log.iter().position(|op| matches!(op, Op::Free(_))).unwrap() > invalidation);
    // And the block can be mapped as one again.
    rig.identity(pages(GIB, GIB / PAGE));
    assert_eq!(rig.table.lookup(&rig.machine, Addr::new(GIB).unwrap()).level, Level::L1);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn several_holes_in_one_block_share_table_and_invalidation() {
    let mut rig = el2();
    rig.identity(pages(GIB, GIB / PAGE));
    let holes = [pages(GIB, 1), pages(GIB + 2 * PAGE, 2), pages(GIB + 2 * MIB - PAGE, 2), pages(GIB + 9 * MIB, 1)];
    let mut after = None;
    let mut planned = 0;
    for hole in holes {
        planned += rig.table.tables_to_unmap(&rig.machine, hole, after);
        after = Some(Addr::new(hole.end() - 1).unwrap());
    }
    let _ = rig.machine.take_log();
    rig.unmap(&holes);
    let log = rig.machine.take_log();
    assert_eq!((planned, allocations(&log)), (4, 4), "one of level 2 and three of level 3");
    assert_eq!(invalidations(&log).len(), 1);
    assert!(holes.iter().all(|&hole| !rig.machine.reaches(Stage::El2, hole)));
    for kept in [PAGE, 4 * PAGE, 2 * MIB + PAGE, 9 * MIB - PAGE, 9 * MIB + PAGE] {
        assert!(rig.is_identity(GIB + kept), "{kept:#x}");
    }
}

#[test]
fn without_tables_nothing_is_mapped() {
    let mut rig = Rig::<El2>::new(Geometry::EL2, 2);
    let before = rig.machine.snapshot();
    assert_eq!(rig.map(pages(GIB, 1), GIB, El2Usage::Data), Err(MapError::OutOfTables));
    assert_eq!(rig.machine.snapshot(), before);
    rig.identity(pages(GIB, 512));
}

#[test]
fn without_tables_a_cut_block_is_dropped_whole() {
    let mut rig = Rig::<Stage2>::new(Geometry::stage2(39).unwrap(), 1);
    rig.identity(pages(GIB, GIB / PAGE));
    rig.unmap(&[pages(GIB + PAGE, 1)]);
    assert_eq!(rig.answer(GIB), None, "its own last-level table is lacking");
    assert!(rig.is_identity(GIB + 2 * MIB), "what the one table could hold is kept");
    rig.unmap(&[pages(GIB + 2 * MIB, 1)]);
    assert_eq!(rig.answer(GIB + 2 * MIB + PAGE), None);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn everything_goes_with_one_invalidation() {
    let mut rig = stage2(48);
    rig.identity(pages(GIB, 1000));
    rig.identity(pages(700 * GIB, GIB / PAGE + 1));
    rig.unmap(&[pages(GIB + PAGE, 1)]);
    let _ = rig.machine.take_log();
    let flush = rig.table.unmap_all(&rig.machine, &mut rig.pool, Flush::new());
    assert!(rig.table.flush(&rig.machine, &mut rig.pool, flush));
    rig.machine.assert_quiescent();
    assert_eq!(invalidations(&rig.machine.take_log()), [Op::InvalidateStage2All(Vmid::HOST)]);
    assert_eq!((rig.table.tables(), rig.pool.in_use()), (0, 0));
}

#[test]
fn so_much_goes_by_all_of_the_vmid() {
    let rig = stage2(48);
    let vttbr = rig.table.vttbr();
    let gone = |count| {
        let range = pages(0, count);
        rig.machine.publish();
        Stage2::invalidate(&rig.machine, vttbr, range, true);
        (invalidations(&rig.machine.take_log()), Op::InvalidateStage2(Vmid::HOST, range, true))
    };
    let (all, _) = gone(1 << 21);
    assert_eq!(all, [Op::InvalidateStage2All(Vmid::HOST)]);
    let (range, expected) = gone((1 << 21) - 1);
    assert_eq!(range, [expected]);
}

#[test]
fn the_quick_bound_of_tables_is_one() {
    let rig = el2();
    let to = PhysAddr::new(PAGE).unwrap();
    for count in [1, 2, 511, 512, 513, 1025, 5 * 512, 99 * 512 + 1, 1 << 18, 3 << 18] {
        let needed = rig.table.tables_to_map(&rig.machine, pages(512 * GIB - PAGE, count), to, El2Usage::Data);
        let bound = PageTable::<El2>::most_tables(count);
        assert!((needed..=2 * needed + 4).contains(&bound), "{count} pages: {needed}, and not {bound}");
    }
}

#[test]
fn another_mapping_replaces_the_old_one() {
    let mut rig = el2();
    rig.identity(pages(GIB, GIB / PAGE));
    let _ = rig.machine.take_log();
    // Attributes of a page, of a block, and another target of a page.
    rig.map(pages(GIB + PAGE, 1), GIB + PAGE, El2Usage::Text).unwrap();
    rig.map(pages(GIB + 2 * MIB, 512), GIB + 2 * MIB, El2Usage::Rodata).unwrap();
    rig.map(pages(GIB + 5 * PAGE, 1), 5 * GIB, El2Usage::Data).unwrap();
    rig.machine.assert_quiescent();
    assert_eq!(rig.answer(GIB + PAGE), Some(translation::<El2>(GIB + PAGE, El2Usage::Text)));
    assert_eq!(rig.answer(GIB + 3 * MIB), Some(translation::<El2>(GIB + 3 * MIB, El2Usage::Rodata)));
    assert_eq!(rig.answer(GIB + 5 * PAGE), Some(translation::<El2>(5 * GIB, El2Usage::Data)));
    assert!(rig.is_identity(GIB) && rig.is_identity(GIB + 2 * PAGE) && rig.is_identity(GIB + 4 * MIB));
    assert_eq!(invalidations(&rig.machine.take_log()).len(), 3);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn leaves_are_visited_in_order() {
    let mut rig = stage2(40);
    rig.identity(pages(GIB, 513));
    rig.map(pages(1 << 39, 1), PAGE, Stage2Usage::Device).unwrap();
    let mut seen = Vec::new();
    rig.table.for_each_leaf(&rig.machine, |range, mapping| {
        let mapping = mapping.unwrap();
        seen.push((range.base().raw(), range.pages(), mapping.to.raw(), mapping.usage));
    });
    let expected = [
        (GIB, 512, GIB, Stage2Usage::Memory),
        (GIB + 2 * MIB, 1, GIB + 2 * MIB, Stage2Usage::Memory),
        (1 << 39, 1, PAGE, Stage2Usage::Device),
    ];
    assert_eq!(seen, expected);
}
