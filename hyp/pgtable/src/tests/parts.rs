//! Parts of a tree, which are changed independently of each other.

use super::*;
use crate::recording::invalidations;

const REGION: u64 = GIB / PAGE;

fn physical<S>(range: PageRange<S>) -> PhysAddr {
    PhysAddr::new(range.base().raw()).unwrap()
}

/// The part of `rig` that translates `range`.
fn part<R: Staged>(rig: &mut Rig<R>, range: PageRange<R::Space>) -> Result<PageTable<R>, MapError> {
    rig.table.part(&rig.machine, &mut rig.pool, range)
}

/// Maps a page and a block in each of two parts and beside them, and takes them out again.
fn parts_are_apart<R: Staged>(mut rig: Rig<R>, tables: usize) {
    let mut parts = [1, 3].map(|gib| part(&mut rig, pages(gib * GIB, REGION)).unwrap());
    assert_eq!((rig.table.tables(), parts[0].tables()), (tables, 0));
    let Rig { machine, pool, table } = &mut rig;
    for (tree, gib) in parts.iter_mut().zip([1, 3]).chain([(table, 2)]) {
        for range in [pages(gib * GIB + PAGE, 1), pages(gib * GIB + 2 * MIB, 512)] {
            tree.map(machine, pool, range, physical(range), R::USAGE).unwrap();
            assert!(tree.lookup(machine, range.base()).mapping().is_some());
        }
    }
    machine.assert_quiescent();
    let mut left = vec![1, 2, 3];
    for gib in [3, 2, 1] {
        assert!(left.iter().all(|gib| rig.is_identity(gib * GIB + PAGE)));
        let flush = Flush::new();
        let Rig { machine, pool, table } = &mut rig;
        let tree = match gib {
            1 => &mut parts[0],
            3 => &mut parts[1],
            _ => &mut *table,
        };
        let flush = if gib == 2 {
            tree.unmap(machine, pool, pages(gib * GIB, REGION), flush)
        } else {
            tree.unmap_all(machine, pool, flush)
        };
        assert!(tree.flush(machine, pool, flush));
        machine.assert_quiescent();
        left.retain(|&other| other != gib);
        assert_eq!(rig.answer(gib * GIB + PAGE), None);
    }
    assert_eq!(
        (rig.table.tables(), parts[0].tables(), parts[1].tables()),
        (tables, 0, 0),
        "the table of level 1 stays"
    );
}

#[test]
fn parts_of_stage_2() {
    parts_are_apart(stage2(40), 0);
    parts_are_apart(stage2(44), 1);
    parts_are_apart(stage2(34), 0);
}

#[test]
fn parts_of_el2() {
    parts_are_apart(el2(), 1);
}

#[test]
fn a_part_keeps_to_its_addresses() {
    let mut rig = stage2(44);
    rig.identity(pages(2 * GIB, 1));
    let mut part = part(&mut rig, pages(GIB, REGION)).unwrap();
    let Rig { machine, pool, .. } = &mut rig;
    let to = PhysAddr::new(2 * GIB).unwrap();
    let across = pages(2 * GIB - PAGE, 2);
    assert_eq!(part.map(machine, pool, across, to, Stage2Usage::Memory), Err(MapError::OutOfRange));
    assert_eq!(part.lookup(machine, Addr::new(2 * GIB).unwrap()).mapping(), None);
    let mut seen = 0;
    part.for_each_leaf(machine, |_, _| seen += 1);
    let flush = part.unmap(machine, pool, across, Flush::new());
    assert!(flush.is_empty() && seen == 0);
    assert!(rig.is_identity(2 * GIB));
}

#[test]
fn what_is_no_part() {
    let mut rig = stage2(44);
    for range in [pages(GIB + PAGE, REGION), pages(GIB, REGION + 1), pages(1 << 44, REGION)] {
        assert_eq!(part(&mut rig, range).err(), Some(MapError::OutOfRange), "{range}");
    }
    let across = pages((1 << 39) - GIB, 2 * REGION);
    assert_eq!(part(&mut rig, across).err(), Some(MapError::OutOfRange), "two tables of level 1");
    assert!(part(&mut stage2(40), across).is_ok(), "which are the root");
    let mut empty = Rig::<El2>::new(Geometry::EL2, 1);
    let _ = empty.pool.allocate();
    assert_eq!(part(&mut empty, pages(GIB, REGION)).err(), Some(MapError::OutOfTables));
}

#[test]
fn parts_are_invalidated_together() {
    let mut rig = el2();
    let mut parts = [1, 2].map(|gib| part(&mut rig, pages(gib * GIB, REGION)).unwrap());
    let Rig { machine, pool, .. } = &mut rig;
    let blocks = [1, 2].map(|gib| pages(gib * GIB, 512));
    let flushes: Vec<_> = parts
        .iter_mut()
        .zip(blocks)
        .map(|(tree, block)| {
            tree.map(machine, pool, block, physical(block), El2Usage::Data).unwrap();
            // The rest of the block comes back.
            tree.unmap(machine, pool, pages(block.base().raw() + PAGE, 1), Flush::new())
        })
        .collect();
    let _ = machine.take_log();
    let invalidated = parts[0].invalidate(machine, flushes.iter()).unwrap();
    for (tree, flush) in parts.iter_mut().zip(flushes) {
        tree.settle(machine, pool, flush, &invalidated);
    }
    assert_eq!(invalidations(&machine.take_log()).len(), 1);
    machine.assert_quiescent();
    for block in blocks {
        assert!(rig.is_identity(block.base().raw()) && rig.answer(block.base().raw() + PAGE).is_none());
    }
    assert!(parts[0].invalidate(&rig.machine, [Flush::new()].iter()).is_none());
}
