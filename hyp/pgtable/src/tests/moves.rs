//! Pages that move from one table to another.

use ravelin_memory::IpaRange;

use super::{
    guest::{VMID, guest},
    *,
};
use crate::recording::invalidations;

/// Where pages from `GIB` on move to.
const ALIAS: u64 = (1 << 39) + GIB;

/// A guest's tree, in which tables of the last level may have nothing in them.
struct Moves {
    rig: Rig<Stage2>,
    table: PageTable<Stage2>,
}

impl Moves {
    fn new() -> Self {
        let (rig, table) = guest();
        Self { rig, table }
    }

    /// With four pages from `GIB` on, and the page behind them at its alias.
    fn with_tables() -> Self {
        let mut moves = Self::new();
        moves.identity(pages(GIB, 4));
        moves.rig.give(&mut moves.table, pages(ALIAS + 4 * PAGE, 1), GIB + 4 * PAGE);
        moves
    }

    fn identity(&mut self, range: IpaRange) {
        self.rig.give(&mut self.table, range, range.base().raw());
    }

    fn unmap(&mut self, range: IpaRange) -> bool {
        self.rig.take(&mut self.table, range)
    }

    /// Where a page is.
    fn answer(&self, addr: u64) -> Option<u64> {
        let answers = self.rig.machine.translate(Stage::Guest(VMID), addr);
        assert_eq!(answers.len(), 1, "{addr:#x}: {answers:?}");
        answers.into_iter().next().unwrap().map(|found| found.to.raw())
    }

    fn move_pages(&self, from: IpaRange, to: IpaRange) {
        let leaves = |range| self.table.leaves(&self.rig.machine, range).expect("there is a table");
        self.table.move_leaves(&self.rig.machine, leaves(from), leaves(to));
        self.rig.machine.assert_quiescent();
    }

    fn vacate(&mut self, range: IpaRange) {
        let flush = self.table.vacate(&self.rig.machine, &mut self.rig.pool, range, Flush::new());
        assert!(self.table.flush(&self.rig.machine, &mut self.rig.pool, flush));
        self.rig.machine.assert_quiescent();
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn pages_move_and_tables_stay() {
    let moves = Moves::with_tables();
    let (here, there) = (pages(GIB + PAGE, 3), pages(ALIAS + PAGE, 3));
    let tables = moves.table.tables();
    let _ = moves.rig.machine.take_log();
    moves.move_pages(here, there);
    let log = moves.rig.machine.take_log();
    assert_eq!(invalidations(&log), [Op::InvalidateStage2(VMID, here, true)]);
    assert_eq!(count(&log, |op| matches!(op, Op::Write { .. })), 3 + 3 + 2, "and the two that note how many there are");
    for page in 1..4 {
        let at = GIB + page * PAGE;
        assert_eq!((moves.answer(at), moves.answer(ALIAS + page * PAGE)), (None, Some(at)));
    }
    assert!(moves.answer(GIB) == Some(GIB), "a neighbour");
    // The table that has nothing left can still take it back.
    moves.move_pages(pages(GIB, 1), pages(ALIAS, 1));
    assert_eq!((moves.answer(GIB), moves.table.tables()), (None, tables));
    moves.move_pages(pages(ALIAS, 4), pages(GIB, 4));
    assert!((0..4).all(|page| moves.answer(GIB + page * PAGE) == Some(GIB + page * PAGE)));
    assert_eq!(moves.table.tables(), tables);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn only_what_is_mapped_moves() {
    let mut moves = Moves::with_tables();
    assert!(moves.unmap(pages(GIB + PAGE, 1)));
    moves.move_pages(pages(GIB, 3), pages(ALIAS, 3));
    assert_eq!([0, 1, 2, 3].map(|page| moves.answer(ALIAS + page * PAGE).is_some()), [true, false, true, false]);
    assert!(moves.answer(GIB + 3 * PAGE) == Some(GIB + 3 * PAGE));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn one_table_has_the_leaves_or_none() {
    let mut moves = Moves::with_tables();
    moves.identity(pages(GIB + 2 * MIB, 513));
    let has = |range: IpaRange| moves.table.leaves(&moves.rig.machine, range).is_some();
    assert!(has(pages(GIB, 512)) && has(pages(GIB + 5 * PAGE, 1)), "mapped or not");
    assert!(!has(pages(GIB + 2 * MIB, 1)), "a block");
    assert!(has(pages(GIB + 4 * MIB, 512)));
    assert!(!has(pages(GIB + 4 * MIB + PAGE, 512)) && !has(pages(GIB + 4 * MIB, 513)), "two tables");
    assert!(!has(pages(GIB + 6 * MIB, 1)) && !has(pages(3 * GIB, 1)), "no table");
    assert!(!has(pages((1 << 40) - PAGE, 2)) && !has(pages(1 << 40, 1)), "no address");
    let part = moves.table.part(&moves.rig.machine, &mut moves.rig.pool, pages(2 * GIB, GIB / PAGE)).unwrap();
    assert!(part.leaves(&moves.rig.machine, pages(GIB, 1)).is_none(), "another part");
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn what_is_vacated_leaves_its_table_unless_that_is_covered() {
    let mut moves = Moves::new();
    moves.identity(pages(GIB, 2));
    let tables = moves.table.tables();
    moves.vacate(pages(GIB, 2));
    assert_eq!((moves.answer(GIB), moves.table.tables()), (None, tables));
    // Nothing is left to be taken out but the tables.
    assert!(moves.unmap(pages(GIB + PAGE, 1)));
    assert_eq!(moves.table.tables(), tables - 2);
    moves.identity(pages(GIB, 2));
    moves.vacate(pages(GIB, 512));
    assert_eq!(moves.table.tables(), tables - 2);
    // The tables above go as ever.
    moves.identity(pages(GIB, 512));
    moves.vacate(pages(GIB, 512));
    assert_eq!(moves.table.tables(), tables - 2);
}
