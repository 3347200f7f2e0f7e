//! Tests of memory as a whole, on the recording machine.

// Miri interprets a few of the tests; through the others, whose checks walk all of memory, it would take an hour.
#[cfg(not(miri))]
mod checks;
#[cfg(not(miri))]
mod faults;
#[cfg(not(miri))]
mod guests;
#[cfg(not(miri))]
mod guests_model;
#[cfg(not(miri))]
mod limits;
#[cfg(not(miri))]
mod model;
#[cfg(not(miri))]
mod regions;
#[cfg(not(miri))]
mod ring;
mod setup;
mod threads;
#[cfg(not(miri))]
mod transitions;

use std::collections::BTreeSet;

use ravelin_memory::{Ipa, PhysAddr, PhysRange};
use ravelin_pgtable::{
    El2, El2Usage, Geometry, PageTable, Regime, Stage2, Stage2Usage, Vmid,
    recording::{Op, RecordingMachine, RecordingPool, Snapshot, Stage, Translation, invalidations},
};

use crate::{
    Counts, Failure, HOST_RESERVE, HostFault, HostState, Memory, OwnershipTable, PAGES_PER_BLOCK, Reason, locked::Mask,
    pool::Tables, region::Region, sizes,
};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Memory for tables, outside of all RAM that the tests describe.
const ROOTS: u64 = 0xf0_0000_0000;
const POOL: u64 = 0xf1_0000_0000;
const IPA_BITS: u32 = 40;

/// What the machine has.
struct Layout {
    ram: Vec<PhysRange>,
    carve_out: PhysRange,
    reserved: Vec<PhysRange>,
    tables: u64,
}

/// Memory for the ownership table, with contents that would be noticed.
struct Store {
    blocks: Vec<u64>,
    pages: Vec<[u64; PAGES_PER_BLOCK]>,
}

impl Store {
    fn for_ram(ram: &[PhysRange]) -> Self {
        let sizes = sizes(ram).unwrap();
        assert_eq!(sizes.page_entries, sizes.block_entries * PAGES_PER_BLOCK);
        Self {
            blocks: vec![0x5a5a_5a5a_5a5a_5a5a; sizes.block_entries],
            pages: vec![[0xa5a5_a5a5_a5a5_a5a5; PAGES_PER_BLOCK]; sizes.block_entries],
        }
    }
}

struct Rig<'a> {
    machine: RecordingMachine,
    memory: Memory<'a, RecordingPool>,
}

/// Two regions, of which the second begins and ends inside blocks; the carve-out at the end of the first.
fn small() -> Layout {
    Layout {
        ram: vec![range(GIB, 32 * MIB / PAGE), range(3 * GIB + 5 * PAGE, 1500)],
        carve_out: range(GIB + 30 * MIB, 512),
        reserved: vec![range(0x900_0000, 1)],
        tables: 256,
    }
}

/// 2 GiB of aligned RAM.
fn large() -> Layout {
    Layout {
        ram: vec![range(GIB, 2 * GIB / PAGE)],
        carve_out: range(3 * GIB - 2 * MIB, 512),
        reserved: vec![],
        tables: 256,
    }
}

/// Everything there is to change.
#[derive(PartialEq, Debug)]
struct Everything {
    blocks: Vec<u64>,
    pages: Vec<[u64; PAGES_PER_BLOCK]>,
    tables: Snapshot,
}

impl<'a> Rig<'a> {
    fn new(layout: &Layout, store: &'a mut Store) -> Self {
        Self::with_bits(layout, store, IPA_BITS)
    }

    /// As [`Rig::new`], with another number of address bits of the host.
    fn with_bits(layout: &Layout, store: &'a mut Store, bits: u32) -> Self {
        let table =
            OwnershipTable::new(&layout.ram, layout.carve_out, &layout.reserved, &mut store.blocks, &mut store.pages);
        let machine = RecordingMachine::new();
        let geometry = Geometry::stage2(bits).unwrap();
        let (host_root, el2_root) = (addr(ROOTS), addr(ROOTS + 16 * PAGE));
        machine.add_root(Stage::Stage2, host_root, geometry);
        machine.add_root(Stage::El2, el2_root, Geometry::EL2);
        let pool = machine.pool(range(POOL, layout.tables));
        let host = PageTable::<Stage2>::new(host_root, geometry);
        let el2 = PageTable::<El2>::new(el2_root, Geometry::EL2);
        let mut memory = Memory::new(table.unwrap(), host, el2, pool);
        memory.divide(&machine).unwrap();
        Self { machine, memory }
    }

    /// Calls `f` with the region of a page.
    fn with_region<T>(&self, page: u64, f: impl FnOnce(&mut Region<'a>, &mut Tables<'_, RecordingPool>) -> T) -> T {
        let mut locked = self.memory.lock(&self.machine, Mask::ALL);
        let (index, _) = self.memory.cut(range(page, 1)).next().unwrap();
        let (region, tables) = locked.at(index).unwrap();
        f(region, tables)
    }

    fn counts(&self) -> Counts {
        self.memory.counts(&self.machine)
    }

    /// Runs one operation and checks that it leaves everything in order.
    fn call(&self, call: Call, range: PhysRange) -> Result<(), Failure> {
        let result = call.on(&self.memory, &self.machine, range);
        self.machine.assert_quiescent();
        result
    }

    /// Lets the host touch a page.
    fn touch(&self, page: u64) -> HostFault {
        let fault = self.memory.host_fault(&self.machine, Ipa::new(page).unwrap());
        self.machine.assert_quiescent();
        let answers = self.machine.translate(Stage::Stage2, page);
        assert_eq!(answers.len(), 1);
        assert_eq!(fault == HostFault::Resolved, answers.iter().all(Option::is_some), "{page:#x}: {answers:?}");
        fault
    }

    fn check(&self) {
        assert_eq!(self.memory.check(&self.machine), Ok(()));
        self.machine.assert_quiescent();
    }

    /// Whether stage 2 lets the host through now, without a fault.
    fn host_reaches(&self, page: u64) -> bool {
        let memory = Translation { to: addr(page), attributes: Stage2::attributes(Stage2Usage::Memory) };
        let answers = self.machine.translate(Stage::Stage2, page);
        assert!(answers == BTreeSet::from([None]) || answers == BTreeSet::from([Some(memory)]), "{answers:?}");
        answers.contains(&Some(memory))
    }

    /// Whether EL2 maps the page for data.
    fn el2_reaches(&self, page: u64) -> bool {
        let data = Translation { to: addr(page), attributes: El2::attributes(El2Usage::Data) };
        let answers = self.machine.translate(Stage::El2, page);
        assert!(answers == BTreeSet::from([None]) || answers == BTreeSet::from([Some(data)]), "{answers:?}");
        answers.contains(&Some(data))
    }

    fn state(&self, page: u64) -> (HostState, u64) {
        let report = self.memory.page_state(addr(page));
        (report.state, report.pins)
    }

    fn everything(&self) -> Everything {
        let (mut blocks, mut pages) = (vec![], vec![]);
        for region in self.memory.lock(&self.machine, Mask::ALL).regions() {
            let (its_blocks, its_pages) = region.table.raw();
            blocks.extend(its_blocks);
            pages.extend(its_pages);
        }
        Everything { blocks, pages, tables: self.machine.snapshot() }
    }
}

/// The operations on ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Share,
    Unshare,
    Donate,
    TakeBack,
    Pin,
    Unpin,
    /// Of the hypervisor, and of the first page only, as the next one.
    Borrow,
    Return,
}

use Call::{Borrow, Donate, Pin, Return, Share, TakeBack, Unpin, Unshare};

/// Those that the host can make.
const CALLS: [Call; 6] = [Share, Unshare, Donate, TakeBack, Pin, Unpin];

impl Call {
    fn on(
        self,
        memory: &Memory<'_, RecordingPool>,
        machine: &RecordingMachine,
        range: PhysRange,
    ) -> Result<(), Failure> {
        match self {
            Share => memory.share(machine, range),
            Unshare => memory.unshare(machine, range),
            Donate => memory.donate(machine, range),
            TakeBack => memory.take_back(machine, range),
            Pin => memory.pin(machine, range),
            Unpin => memory.unpin(machine, range),
            Borrow => memory.borrow_from_host(machine, range.base()),
            Return => memory.return_to_host(machine, range.base()),
        }
    }
}

fn addr(raw: u64) -> PhysAddr {
    PhysAddr::new(raw).unwrap()
}

fn range(base: u64, pages: u64) -> PhysRange {
    PhysRange::new(base, pages).unwrap()
}

fn fails(reason: Reason, page: u64) -> Result<(), Failure> {
    Err(Failure { reason, page: addr(page) })
}
