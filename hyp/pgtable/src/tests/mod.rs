//! Tests of the tree on the recording machine.

mod guest;
mod model;
mod moves;
#[cfg(not(miri))]
mod oracle;
mod parts;
mod seeded;
mod tree;

use ravelin_memory::{Addr, PageRange, PhysAddr, PhysRange};

use crate::{
    El2, El2Usage, Flush, Geometry, Machine, MapError, PageTable, Regime, Stage2, Stage2Usage, TablePool, Vmid,
    recording::{Op, RecordingMachine, RecordingPool, Stage, Translation},
};

const ROOT: PhysAddr = PhysAddr::from_bits_truncating(0xff_0000_0000);
const POOL: u64 = 0xfe_0000_0000;

/// Which simulated tables a regime has, and one of its usages for tests that need just one.
trait Staged: Regime {
    const STAGE: Stage;
    const USAGE: Self::Usage;
    const OTHER_USAGE: Self::Usage;
}

impl Staged for Stage2 {
    const STAGE: Stage = Stage::Stage2;
    const USAGE: Stage2Usage = Stage2Usage::Memory;
    const OTHER_USAGE: Stage2Usage = Stage2Usage::Device;
}

impl Staged for El2 {
    const STAGE: Stage = Stage::El2;
    const USAGE: El2Usage = El2Usage::Data;
    const OTHER_USAGE: El2Usage = El2Usage::Rodata;
}

/// A tree on a recording machine of its own.
struct Rig<R: Regime> {
    machine: RecordingMachine,
    pool: RecordingPool,
    table: PageTable<R>,
}

impl<R: Staged> Rig<R> {
    fn new(geometry: Geometry, tables: u64) -> Self {
        let machine = RecordingMachine::new();
        machine.add_root(R::STAGE, ROOT, geometry);
        let pool = machine.pool(PhysRange::new(POOL, tables.max(1)).unwrap());
        Self { machine, pool, table: PageTable::new(ROOT, geometry) }
    }

    fn map(&mut self, range: PageRange<R::Space>, to: u64, usage: R::Usage) -> Result<(), MapError> {
        self.table.map(&self.machine, &mut self.pool, range, PhysAddr::new(to).unwrap(), usage)
    }

    fn identity(&mut self, range: PageRange<R::Space>) {
        self.map(range, range.base().raw(), R::USAGE).unwrap();
        self.machine.assert_quiescent();
    }

    fn unmap(&mut self, ranges: &[PageRange<R::Space>]) -> bool {
        let mut flush = Flush::new();
        for &range in ranges {
            flush = self.table.unmap(&self.machine, &mut self.pool, range, flush);
        }
        let flushed = self.table.flush(&self.machine, &mut self.pool, flush);
        self.machine.assert_quiescent();
        flushed
    }

    /// What the one answer of all TLBs is.
    fn answer(&self, addr: u64) -> Option<Translation> {
        let answers = self.machine.translate(R::STAGE, addr);
        assert_eq!(answers.len(), 1, "{addr:#x}: {answers:?}");
        answers.into_iter().next().unwrap()
    }

    fn is_identity(&self, addr: u64) -> bool {
        self.answer(addr) == Some(translation::<R>(addr, R::USAGE))
    }
}

fn translation<R: Regime>(to: u64, usage: R::Usage) -> Translation {
    Translation { to: Addr::new(to).unwrap(), attributes: R::attributes(usage) }
}

fn pages<S>(base: u64, pages: u64) -> PageRange<S> {
    PageRange::new(base, pages).unwrap()
}

fn count(log: &[Op], what: impl Fn(&Op) -> bool) -> usize {
    log.iter().filter(|op| what(op)).count()
}

fn allocations(log: &[Op]) -> usize {
    count(log, |op| matches!(op, Op::Allocate(_)))
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;

fn stage2(bits: u32) -> Rig<Stage2> {
    Rig::new(Geometry::stage2(bits).unwrap(), 64)
}

fn el2() -> Rig<El2> {
    Rig::new(Geometry::EL2, 64)
}
