//! What trees of guests have that others do not: VMIDs, smaller blocks, poison.

use std::ops::ControlFlow;

use ravelin_memory::{Ipa, IpaRange, Level};

use super::*;
use crate::{Found, Vttbr, recording::invalidations};

pub(super) const VMID: Vmid = Vmid::new(7);

/// A guest's tree beside the host's, in the same pool. The host has a page mapped that tests give the guest, too.
pub(super) fn guest() -> (Rig<Stage2>, PageTable<Stage2>) {
    let mut rig = stage2(40);
    rig.identity(pages(GIB, 1));
    let root = PhysAddr::new(ROOT.raw() + 16 * PAGE).unwrap();
    let geometry = Geometry::stage2(40).unwrap();
    rig.machine.add_root(Stage::Guest(VMID), root, geometry);
    (rig, PageTable::of_guest(root, geometry, VMID))
}

impl Rig<Stage2> {
    pub(super) fn give(&mut self, guest: &mut PageTable<Stage2>, range: IpaRange, to: u64) {
        let to = PhysAddr::new(to).unwrap();
        guest.map(&self.machine, &mut self.pool, range, to, Stage2Usage::Memory).unwrap();
        self.machine.assert_quiescent();
    }

    fn poison(&mut self, guest: &mut PageTable<Stage2>, range: IpaRange) -> Vec<Op> {
        let needed = guest.tables_to_unmap(&self.machine, range, None);
        let _ = self.machine.take_log();
        let flush = guest.poison(&self.machine, &mut self.pool, range, Flush::new());
        guest.flush(&self.machine, &mut self.pool, flush);
        self.machine.assert_quiescent();
        let log = self.machine.take_log();
        assert_eq!(allocations(&log), needed);
        invalidations(&log)
    }

    pub(super) fn take(&mut self, guest: &mut PageTable<Stage2>, range: IpaRange) -> bool {
        let flush = guest.unmap(&self.machine, &mut self.pool, range, Flush::new());
        let flushed = guest.flush(&self.machine, &mut self.pool, flush);
        self.machine.assert_quiescent();
        flushed
    }
}

/// Number of pages, where they lead, and whether they are poisoned, for each descriptor.
fn found(rig: &Rig<Stage2>, guest: &PageTable<Stage2>, range: IpaRange) -> Vec<(u64, Option<u64>, bool)> {
    let mut all = Vec::new();
    let _: ControlFlow<()> = guest.visit(&rig.machine, range, &mut |part, found| {
        let to = match found {
            Found::Leaf { mapping, .. } => Some(mapping.unwrap().to.raw()),
            _ => None,
        };
        all.push((part.pages(), to, found == Found::Poisoned));
        ControlFlow::Continue(())
    });
    assert_eq!(all.iter().map(|part| part.0).sum::<u64>(), range.pages());
    all
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn maintenance_is_for_the_trees_own_vmid() {
    let (mut rig, mut guest) = guest();
    rig.give(&mut guest, pages(GIB, 1), GIB);
    let _ = rig.machine.take_log();
    assert!(rig.take(&mut guest, pages(GIB, 1)));
    assert_eq!(invalidations(&rig.machine.take_log()), [Op::InvalidateStage2(VMID, pages(GIB, 1), false)]);
    assert!(rig.is_identity(GIB), "the host's entry stays");
}

#[test]
#[should_panic(expected = "missing flush")]
fn maintenance_for_another_vmid_is_none() {
    let (mut rig, mut guest) = guest();
    rig.give(&mut guest, pages(GIB, 2), GIB);
    let flush = guest.unmap(&rig.machine, &mut rig.pool, pages(GIB, 1), Flush::new());
    assert!(!flush.is_empty());
    rig.machine.publish();
    rig.machine.invalidate_stage2(Vttbr { vmid: Vmid::HOST, ..guest.vttbr() }, pages(GIB, 1), false);
    rig.machine.assert_quiescent();
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn blocks_are_of_level_2_at_most() {
    let (mut rig, mut guest) = guest();
    let gigabyte = pages(4 * GIB, GIB / PAGE);
    let to = PhysAddr::new(8 * GIB).unwrap();
    assert_eq!(guest.tables_to_map(&rig.machine, gigabyte, to, Stage2Usage::Memory), 1);
    rig.give(&mut guest, gigabyte, to.raw());
    assert_eq!(guest.tables(), 1);
    assert_eq!(guest.lookup(&rig.machine, Ipa::new(4 * GIB).unwrap()).level, Level::L2);
    assert_eq!(guest.tables_to_unmap(&rig.machine, pages(4 * GIB + PAGE, 1), None), 1);
}

#[test]
fn a_visit_passes_over_what_has_no_tables() {
    let (mut rig, mut guest) = guest();
    rig.give(&mut guest, pages(GIB + PAGE, 1), 8 * GIB);
    rig.give(&mut guest, pages(GIB + 2 * MIB, 512), 9 * GIB);
    // A part of a block leads to where that part is.
    let part = found(&rig, &guest, pages(GIB + 2 * MIB + 3 * PAGE, 5));
    assert_eq!(part, [(5, Some(9 * GIB + 3 * PAGE), false)]);
    let around = found(&rig, &guest, pages(GIB, 3));
    assert_eq!(around, [(1, None, false), (1, Some(8 * GIB), false), (1, None, false)]);
    // 2 GiB of nothing: two descriptors of level 1.
    assert_eq!(found(&rig, &guest, pages(2 * GIB, 2 * GIB / PAGE)).len(), 2);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn nothing_is_mapped_where_poison_is() {
    let (mut rig, mut guest) = guest();
    rig.give(&mut guest, pages(GIB, 4), 8 * GIB);
    let poisoned = pages(GIB + PAGE, 2);
    assert_eq!(rig.poison(&mut guest, poisoned), [Op::InvalidateStage2(VMID, poisoned, true)]);
    let expected = [(1, Some(8 * GIB), false), (1, None, true), (1, None, true), (1, Some(8 * GIB + 3 * PAGE), false)];
    assert_eq!(found(&rig, &guest, pages(GIB, 4)), expected);
    rig.give(&mut guest, pages(GIB, 4), 8 * GIB);
    assert_eq!(found(&rig, &guest, pages(GIB, 4)), expected);
    assert!(!rig.machine.reaches(Stage::Guest(VMID), poisoned));
    // Until it is taken out; then no table is left.
    rig.take(&mut guest, pages(GIB, 4));
    assert_eq!((guest.tables(), found(&rig, &guest, pages(GIB, 4))), (0, vec![(4, None, false)]));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn a_part_of_a_block_is_poisoned_without_its_neighbours() {
    let (mut rig, mut guest) = guest();
    rig.give(&mut guest, pages(GIB, 1024), 8 * GIB);
    let poisoned = pages(GIB + 510 * PAGE, 4);
    assert_eq!(rig.poison(&mut guest, poisoned), [Op::InvalidateStage2(VMID, poisoned, true)]);
    for page in [0, 509, 514, 1023] {
        let to = guest.lookup(&rig.machine, Ipa::new(GIB + page * PAGE).unwrap()).mapping().unwrap().to;
        assert_eq!(to.raw(), 8 * GIB + page * PAGE);
    }
    assert_eq!(found(&rig, &guest, poisoned), [(1, None, true); 4]);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn a_whole_block_is_poisoned_by_one_descriptor() {
    let (mut rig, mut guest) = guest();
    rig.give(&mut guest, pages(GIB, 512), 8 * GIB);
    // And one that is mapped by pages, whose table goes.
    rig.give(&mut guest, pages(GIB + 2 * MIB, 512), 9 * GIB + PAGE);
    assert_eq!(guest.tables(), 2);
    let both = pages(GIB, 1024);
    assert_eq!(rig.poison(&mut guest, both), [Op::InvalidateStage2(VMID, both, false)]);
    assert_eq!((guest.tables(), found(&rig, &guest, both)), (1, vec![(512, None, true); 2]));
    let to = PhysAddr::new(8 * GIB).unwrap();
    assert_eq!(guest.tables_to_map(&rig.machine, pages(GIB, 3), to, Stage2Usage::Memory), 0);
    rig.give(&mut guest, pages(GIB, 3), to.raw());
    assert_eq!(found(&rig, &guest, pages(GIB, 1)), [(1, None, true)]);
    let flush = guest.unmap_all(&rig.machine, &mut rig.pool, Flush::new());
    guest.flush(&rig.machine, &mut rig.pool, flush);
    rig.machine.assert_quiescent();
    assert_eq!(guest.tables(), 0);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn a_part_of_a_poisoned_block_is_taken_out_without_its_neighbours() {
    let (mut rig, mut guest) = guest();
    rig.give(&mut guest, pages(GIB, 1024), 8 * GIB);
    rig.poison(&mut guest, pages(GIB, 1024));
    // The end of one block and the start of another: a table for each.
    let healed = pages(GIB + 510 * PAGE, 4);
    assert_eq!(guest.tables_to_unmap(&rig.machine, healed, None), 2);
    let _ = rig.machine.take_log();
    assert!(!rig.take(&mut guest, healed), "no TLB holds anything of it");
    let log = rig.machine.take_log();
    assert_eq!((allocations(&log), invalidations(&log)), (2, vec![]));
    let expected = [vec![(1, None, true); 510], vec![(2, None, false); 2], vec![(1, None, true); 510]].concat();
    assert_eq!(found(&rig, &guest, pages(GIB, 1024)), expected);
    // What is mapped there now is all that is reached.
    rig.give(&mut guest, pages(GIB, 1024), 9 * GIB);
    for page in [0, 509, 510, 513, 514, 1023] {
        let to =
            guest.lookup(&rig.machine, Ipa::new(GIB + page * PAGE).unwrap()).mapping().map(|mapping| mapping.to.raw());
        assert_eq!(to, (510..514).contains(&page).then_some(9 * GIB + page * PAGE), "{page}");
    }
    // Single pages of poison cost nothing either, until the table goes.
    rig.take(&mut guest, healed);
    assert!(!rig.take(&mut guest, pages(GIB, 509)));
    assert_eq!(guest.tables(), 3);
    assert!(rig.take(&mut guest, pages(GIB + 509 * PAGE, 1)), "of the table descriptor");
    assert!(rig.take(&mut guest, pages(GIB + 2 * MIB, 512)));
    assert_eq!(guest.tables(), 0);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn a_poisoned_block_stays_whole_without_a_table() {
    let (mut rig, mut guest) = guest();
    rig.give(&mut guest, pages(GIB, 512), 8 * GIB);
    rig.poison(&mut guest, pages(GIB, 512));
    let mut taken = Vec::new();
    while let Some(table) = rig.pool.allocate() {
        taken.push(table);
    }
    let flush = guest.unmap(&rig.machine, &mut rig.pool, pages(GIB + PAGE, 1), Flush::new());
    assert!(flush.is_empty());
    guest.flush(&rig.machine, &mut rig.pool, flush);
    assert_eq!(found(&rig, &guest, pages(GIB, 512)), [(512, None, true)]);
    taken.into_iter().for_each(|table| rig.pool.free(table));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn a_poisoned_gigabyte_is_cut_on_both_levels() {
    let (mut rig, mut guest) = guest();
    let gigabyte = pages(4 * GIB, GIB / PAGE);
    rig.give(&mut guest, gigabyte, 8 * GIB);
    rig.poison(&mut guest, gigabyte);
    assert_eq!((guest.tables(), found(&rig, &guest, gigabyte)), (0, vec![(GIB / PAGE, None, true)]));
    let healed = pages(4 * GIB + 2 * MIB - PAGE, 2);
    assert_eq!(guest.tables_to_unmap(&rig.machine, healed, None), 3);
    let _ = rig.machine.take_log();
    assert!(!rig.take(&mut guest, healed));
    assert_eq!(allocations(&rig.machine.take_log()), 3);
    let poisoned: u64 = found(&rig, &guest, gigabyte).iter().filter(|part| part.2).map(|part| part.0).sum();
    assert_eq!(poisoned, GIB / PAGE - 2);
    assert_eq!(found(&rig, &guest, healed), [(1, None, false); 2]);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn a_poisoned_block_is_poisoned_once() {
    let (mut rig, mut guest) = guest();
    let [first, second] = [pages(GIB, 512), pages(GIB + 2 * MIB, 512)];
    rig.give(&mut guest, pages(GIB, 1024), 8 * GIB);
    rig.poison(&mut guest, first);
    assert_eq!(rig.poison(&mut guest, first), []);
    rig.take(&mut guest, second);
    assert_eq!((guest.tables(), found(&rig, &guest, first)), (1, vec![(512, None, true)]), "it keeps its table in use");
    let _ = rig.machine.take_log();
    rig.take(&mut guest, first);
    assert_eq!((allocations(&rig.machine.take_log()), guest.tables()), (0, 0));
    assert_eq!(found(&rig, &guest, pages(GIB, 1)), [(1, None, false)]);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn without_tables_neighbours_are_not_poisoned() {
    let (mut rig, mut guest) = guest();
    rig.give(&mut guest, pages(GIB, 512), 8 * GIB);
    while rig.pool.allocate().is_some() {}
    let flush = guest.poison(&rig.machine, &mut rig.pool, pages(GIB + PAGE, 1), Flush::new());
    guest.flush(&rig.machine, &mut rig.pool, flush);
    // They can be mapped again.
    assert_eq!(found(&rig, &guest, pages(GIB, 512)), [(512, None, false)]);
}

#[test]
fn a_page_of_el2s_is_a_table_until_it_is_scrubbed() {
    let mut rig = el2();
    rig.identity(pages(GIB, 2));
    let table = PhysAddr::new(GIB).unwrap();
    rig.machine.write(table, 0, 0);
    rig.machine.clear_table(table);
    assert_eq!(rig.machine.read(table, 511), 0);
    rig.machine.publish();
    rig.machine.assert_quiescent();
    rig.machine.scrub(pages(GIB, 1));
    assert!(!rig.machine.snapshot().contains_key(&GIB));
}

#[test]
#[should_panic(expected = "can be reached")]
fn a_table_in_use_is_not_scrubbed() {
    let mut rig = el2();
    rig.identity(pages(GIB, 1));
    let root = PhysAddr::new(ROOT.raw() + 16 * PAGE).unwrap();
    rig.machine.add_root(Stage::Guest(VMID), root, Geometry::stage2(40).unwrap());
    let table = PhysAddr::new(GIB).unwrap();
    rig.machine.clear_table(table);
    rig.machine.publish();
    rig.machine.write(root, 0, crate::Descriptor::table(table, 0).bits());
    rig.machine.scrub(pages(GIB, 1));
}
