//! The recording machine finds the errors it is there for: each test breaks one rule and must panic.

use ravelin_memory::{HypRange, IpaRange};

use super::*;
use crate::{Descriptor, Vttbr};

/// A step that a faulty implementation would leave out.
#[derive(Clone, Copy, PartialEq)]
enum Omit {
    Break,
    Publish,
    Invalidate,
    /// The invalidation of table descriptors.
    Tables,
}

/// A machine that leaves out one kind of step, as a tree with that bug would.
struct Faulty(RecordingMachine, Omit);

impl Machine for Faulty {
    fn read(&self, table: PhysAddr, index: usize) -> u64 {
        self.0.read(table, index)
    }

    fn write(&self, table: PhysAddr, index: usize, value: u64) {
        if self.1 != Omit::Break || value & 1 != 0 {
            self.0.write(table, index, value);
        }
    }

    fn clear_table(&self, table: PhysAddr) {
        self.0.clear_table(table);
    }

    fn publish(&self) {
        if self.1 != Omit::Publish {
            self.0.publish();
        }
    }

    fn invalidate_stage2(&self, tree: Vttbr, range: IpaRange, leaf_only: bool) {
        if self.1 != Omit::Invalidate {
            self.0.invalidate_stage2(tree, range, leaf_only || self.1 == Omit::Tables);
        }
    }

    fn invalidate_stage2_all(&self, tree: Vttbr) {
        self.0.invalidate_stage2_all(tree);
    }

    fn invalidate_el2(&self, range: HypRange) {
        if self.1 != Omit::Invalidate {
            self.0.invalidate_el2(range);
        }
    }

    fn scrub(&self, range: PhysRange) {
        self.0.scrub(range);
    }

    fn clean(&self, range: PhysRange) {
        self.0.clean(range);
    }
}

/// Maps a range without faults, unmaps a part of it on the faulty machine, and looks at what is left behind.
fn unmap_with(omit: Omit, mapped: IpaRange, unmapped: IpaRange) {
    let mut rig = stage2(40);
    rig.identity(mapped);
    let faulty = Faulty(rig.machine.clone(), omit);
    let flush = rig.table.unmap(&faulty, &mut rig.pool, unmapped, Flush::new());
    rig.table.flush(&faulty, &mut rig.pool, flush);
    rig.machine.assert_quiescent();
}

#[test]
#[should_panic(expected = "missing flush")]
fn a_missing_invalidation_of_a_page() {
    unmap_with(Omit::Invalidate, pages(GIB, 2), pages(GIB, 1));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
#[should_panic(expected = "missing flush")]
fn a_missing_invalidation_of_a_cut_block() {
    unmap_with(Omit::Invalidate, pages(GIB, 512), pages(GIB, 1));
}

#[test]
#[should_panic(expected = "early free")]
fn a_missing_invalidation_of_a_table_descriptor() {
    unmap_with(Omit::Tables, pages(GIB, 1), pages(GIB, 1));
}

#[test]
#[should_panic(expected = "missing break")]
fn a_missing_break() {
    // The block's descriptor is still there when the table's is written over it.
    let mut rig = el2();
    rig.identity(pages(GIB, 512));
    let faulty = Faulty(rig.machine.clone(), Omit::Break);
    let to = PhysAddr::new(GIB).unwrap();
    let _ = rig.table.map(&faulty, &mut rig.pool, pages(GIB, 1), to, El2Usage::Text);
}

#[test]
#[should_panic(expected = "missing flush")]
fn a_missing_invalidation_between_break_and_make() {
    let mut rig = el2();
    rig.identity(pages(GIB, 1));
    let faulty = Faulty(rig.machine.clone(), Omit::Invalidate);
    let to = PhysAddr::new(GIB).unwrap();
    let _ = rig.table.map(&faulty, &mut rig.pool, pages(GIB, 1), to, El2Usage::Text);
}

#[test]
#[should_panic(expected = "missing publish")]
fn a_missing_publish_before_the_invalidation() {
    unmap_with(Omit::Publish, pages(GIB, 2), pages(GIB, 1));
}

/// Moves a page between tables on the faulty machine.
fn move_with(omit: Omit) {
    let mut rig = stage2(40);
    [GIB, GIB + 2 * MIB].into_iter().for_each(|base| rig.identity(pages(base, 2)));
    let [from, to] =
        [GIB, GIB + 2 * MIB + 2 * PAGE].map(|base| rig.table.leaves(&rig.machine, pages(base, 1)).unwrap());
    rig.table.move_leaves(&Faulty(rig.machine.clone(), omit), from, to);
    rig.machine.assert_quiescent();
}

#[test]
#[should_panic(expected = "missing flush")]
fn a_missing_invalidation_of_where_a_page_was() {
    move_with(Omit::Invalidate);
}

#[test]
#[should_panic(expected = "missing publish")]
fn a_missing_publish_of_where_a_page_is() {
    move_with(Omit::Publish);
}

#[test]
#[should_panic(expected = "linked before its contents are published")]
fn a_missing_publish_before_a_link() {
    let mut rig = stage2(40);
    let faulty = Faulty(rig.machine.clone(), Omit::Publish);
    let to = PhysAddr::new(GIB).unwrap();
    let _ = rig.table.map(&faulty, &mut rig.pool, pages(GIB, 1), to, Stage2Usage::Memory);
}

#[test]
#[should_panic(expected = "missing publish")]
fn a_missing_publish_at_the_end() {
    let mut rig = stage2(40);
    let faulty = Faulty(rig.machine.clone(), Omit::Publish);
    let to = PhysAddr::new(GIB).unwrap();
    let _ = rig.table.map(&faulty, &mut rig.pool, pages(GIB, GIB / PAGE), to, Stage2Usage::Memory);
    rig.machine.assert_quiescent();
}

#[test]
#[should_panic(expected = "is linked")]
fn an_early_free_of_a_linked_table() {
    let mut rig = stage2(40);
    rig.identity(pages(GIB, 1));
    rig.pool.free(PhysAddr::new(POOL).unwrap());
}

#[test]
#[should_panic(expected = "may still be cached")]
fn an_early_free_of_a_cached_table() {
    let mut rig = stage2(40);
    rig.identity(pages(GIB, 1));
    // Entry of level 1 of the first GiB above the first.
    rig.machine.write(ROOT, 1, 0);
    rig.machine.publish();
    rig.pool.free(PhysAddr::new(POOL).unwrap());
}

#[test]
#[should_panic(expected = "no table in use")]
fn an_access_after_the_free() {
    let mut rig = stage2(40);
    rig.identity(pages(GIB, 1));
    rig.unmap(&[pages(GIB, 1)]);
    rig.machine.write(PhysAddr::new(POOL).unwrap(), 0, 0);
}

#[test]
#[should_panic(expected = "missing break")]
fn a_block_overwritten_by_another() {
    let mut rig = stage2(40);
    rig.identity(pages(GIB, GIB / PAGE));
    let to = PhysAddr::new(2 * GIB).unwrap();
    let other = Descriptor::leaf(ravelin_memory::Level::L1, to, Stage2::attributes(Stage2Usage::Memory));
    rig.machine.write(ROOT, 1, other.bits());
}

#[test]
#[should_panic(expected = "leak")]
fn a_table_that_is_never_linked() {
    let mut rig = stage2(40);
    rig.pool.allocate().unwrap();
    rig.machine.assert_quiescent();
}

#[test]
#[should_panic(expected = "not mapped writable")]
fn scrubbing_what_is_not_mapped() {
    el2().machine.scrub(pages(GIB, 1));
}

#[test]
fn a_stale_entry_is_an_answer_until_it_is_invalidated() {
    let mut rig = stage2(40);
    rig.identity(pages(GIB, 2));
    let flush = rig.table.unmap(&rig.machine, &mut rig.pool, pages(GIB, 1), Flush::new());
    let old = Some(translation::<Stage2>(GIB, Stage2Usage::Memory));
    assert_eq!(rig.machine.translate(Stage::Stage2, GIB), [None, old].into());
    rig.table.flush(&rig.machine, &mut rig.pool, flush);
    assert_eq!(rig.machine.translate(Stage::Stage2, GIB), [None].into());
}
