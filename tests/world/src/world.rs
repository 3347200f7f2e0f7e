//! A host, and a machine that it runs on.

use std::ops::Range;

use ravelin_abi::{RunEntry, RunExit, RunPage, Status, VmAttributes};
use ravelin_hypercall::{Cpu, Entries, FaultAction, Firmware, Host, HostedVms, Registers, Start};
use ravelin_memory::{Ipa, PAGE_SIZE, PhysRange};
use ravelin_ownership::{
    Counts, GuestMemory, Inconsistency, Memory, OwnershipTable, PAGES_PER_BLOCK, PageReport, sizes,
};
use ravelin_pgtable::{
    Geometry, PageTable, Vmid,
    recording::{RecordingPool, Stage},
};
use ravelin_vm::{Guest, GuestCpu, Handle, MachineMemory, ObjectMemory};

use crate::{
    machine::{TestMachine, address},
    vms::number,
};

/// What memory and CPUs there are. Addresses are physical ones of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM: one region.
    pub ram: Range<u64>,
    /// What of it is the hypervisor's.
    pub carve_out: Range<u64>,
    /// How many pages of the carve-out, from its fourth page on, are for translation tables.
    pub pool_pages: usize,
    /// How many CPUs the host may have; it starts on the first one.
    pub cpus: u64,
}

impl Layout {
    /// Three blocks of 2 MiB for the host and one for the hypervisor; 64 tables; two CPUs.
    pub const FOUR_BLOCKS: Self =
        Self { ram: 0x4000_0000..0x4080_0000, carve_out: 0x4060_0000..0x4080_0000, pool_pages: 64, cpus: 2 };
}

/// The heap, where VMs and vCPUs are kept in place of the pages that the host donates for them.
#[derive(Clone, Copy, Debug)]
pub struct Heap;

impl ObjectMemory for Heap {
    type Box<T: Send + Sync> = Box<T>;
    type Slice<T: Send + Sync> = Box<[T]>;

    fn place<T: Send + Sync>(&self, pages: PhysRange, value: T) -> Box<T> {
        assert!(size_of::<T>() as u64 <= pages.size() && align_of::<T>() as u64 <= PAGE_SIZE);
        Box::new(value)
    }

    fn place_slice<T: Send + Sync>(&self, pages: PhysRange, count: usize, make: impl FnMut(usize) -> T) -> Box<[T]> {
        assert!((count * size_of::<T>()) as u64 <= pages.size() && align_of::<T>() as u64 <= PAGE_SIZE);
        (0..count).map(make).collect()
    }
}

/// Firmware with PSCI 1.1 that says yes to everything.
#[derive(Clone, Copy, Debug)]
pub struct Agreeable;

impl Firmware for Agreeable {
    fn smc(&self, [function, ..]: [u64; 4]) -> [u64; 4] {
        [if function == 0x8400_0000 { 0x1_0001 } else { 0 }, 0, 0, 0]
    }
}

/// A host that has booted.
pub struct World<'a> {
    /// What memory there is.
    pub layout: &'a Layout,
    /// The machine.
    pub machine: &'a TestMachine,
    /// Who owns what.
    pub memory: &'a Memory<'a, RecordingPool>,
    /// All VMs.
    pub vms: &'a HostedVms<Heap>,
    /// The hypervisor's handlers of what the host does.
    pub host: Host<'a, RecordingPool, Agreeable, Heap>,
}

/// Runs `f` in a world where the host owns all but the carve-out.
///
/// # Panics
///
/// If the layout makes no sense, such as a carve-out outside RAM or without room for the tables.
pub fn in_world<R>(layout: &Layout, f: impl FnOnce(&World<'_>) -> R) -> R {
    let machine = TestMachine::default();
    let (mut blocks, mut pages) = entries(layout);
    let memory = memory(layout, &machine, &mut blocks, &mut pages);
    let (cpus, vms) = (cpus(layout), Box::new(HostedVms::new(Heap)));
    let host = host(layout, &memory, &vms, &cpus);
    f(&World { layout, machine: &machine, memory: &memory, vms: &vms, host })
}

/// Returns a world as [`in_world`] has it that is never given up, for threads whose end nobody sees.
///
/// # Panics
///
/// As [`in_world`].
#[must_use]
pub fn lasting_world(layout: Layout) -> &'static World<'static> {
    fn keep<T>(value: T) -> &'static mut T {
        Box::leak(Box::new(value))
    }
    let layout = &*keep(layout);
    let machine = &*keep(TestMachine::default());
    let (blocks, pages) = keep(entries(layout));
    let memory = &*keep(memory(layout, machine, blocks, pages));
    let vms = &*keep(HostedVms::new(Heap));
    keep(World { layout, machine, memory, vms, host: host(layout, memory, vms, keep(cpus(layout))) })
}

fn range(range: &Range<u64>) -> PhysRange {
    PhysRange::from_bounds(range.start, range.end).expect("a range of pages")
}

/// Returns room for the entries of the ownership table.
fn entries(layout: &Layout) -> (Vec<u64>, Vec<[u64; PAGES_PER_BLOCK]>) {
    let sizes = sizes(&[range(&layout.ram)]).expect("RAM is one region");
    (vec![0; sizes.block_entries], vec![[0; PAGES_PER_BLOCK]; sizes.page_entries / PAGES_PER_BLOCK])
}

fn memory<'a>(
    layout: &Layout,
    machine: &TestMachine,
    blocks: &'a mut [u64],
    pages: &'a mut [[u64; PAGES_PER_BLOCK]],
) -> Memory<'a, RecordingPool> {
    let (ram, carve_out) = (range(&layout.ram), range(&layout.carve_out));
    let geometry = Geometry::stage2(40).expect("addresses may have 40 bits");
    let [stage2_root, el2_root, pool] = [0, 0x2000, 0x3000].map(|offset| address(layout.carve_out.start + offset));
    machine.inner.add_root(Stage::Stage2, stage2_root, geometry);
    machine.inner.add_root(Stage::El2, el2_root, Geometry::EL2);
    let pool = PhysRange::new(pool.raw(), layout.pool_pages as u64).expect("a range of pages");
    assert!(carve_out.covers(&pool));
    let mut memory = Memory::new(
        OwnershipTable::new(&[ram], carve_out, &[], blocks, pages).expect("memory as it may be"),
        PageTable::new(stage2_root, geometry),
        PageTable::new(el2_root, Geometry::EL2),
        machine.inner.pool(pool),
    );
    memory.divide(machine).expect("there are tables enough");
    memory
}

fn cpus(layout: &Layout) -> Vec<Cpu> {
    let booting = Cpu::booting(0, 0, Start { entry: layout.ram.start, context: 0 });
    [booting].into_iter().chain((1..layout.cpus).map(|cpu| Cpu::off(cpu, cpu))).collect()
}

fn host<'a>(
    layout: &Layout,
    memory: &'a Memory<'a, RecordingPool>,
    vms: &'a HostedVms<Heap>,
    cpus: &'a [Cpu],
) -> Host<'a, RecordingPool, Agreeable, Heap> {
    let entries = Entries { start: address(layout.carve_out.start), resume: address(layout.carve_out.start) };
    let host = Host::new(memory, vms, Agreeable, cpus, entries);
    assert!(host.take_start(0).is_some());
    host
}

/// Returns what VM_SIZES says of these attributes: pages for a VM, and for each of its vCPUs, and of how many pages the VM's
/// address is a multiple.
#[must_use]
pub fn vm_sizes(attributes: VmAttributes) -> (u64, u64, u64) {
    type Transitions<'a, 'm> = MachineMemory<'a, 'm, RecordingPool, TestMachine>;
    HostedVms::<Heap>::sizes::<Transitions<'_, '_>>(attributes, TestMachine::default().area_pages())
}

impl World<'_> {
    /// Makes a call by `HVC #immediate` with these first registers and recognisable values in the others, which must stay.
    /// Returns x0 to x3.
    pub fn hvc_with(&self, immediate: u16, values: impl AsRef<[u64]>) -> [u64; 4] {
        let mut registers: Registers = core::array::from_fn(|index| 0x1000 + index as u64);
        registers[..values.as_ref().len()].copy_from_slice(values.as_ref());
        let before = registers;
        self.host.hvc(self.machine, immediate, &mut registers);
        assert_eq!(registers[4..], before[4..]);
        let [x0, x1, x2, x3, ..] = registers;
        if let ([function, attributes, metadata, ..], 0) = (before, x0)
            && (function, immediate) == (number("VM_CREATE"), 0)
        {
            self.watch(x1, attributes, metadata);
        }
        [x0, x1, x2, x3]
    }

    /// Makes a call as [`World::hvc_with`] does, by `HVC #0`.
    pub fn hvc(&self, values: impl AsRef<[u64]>) -> [u64; 4] {
        self.hvc_with(0, values)
    }

    /// Tells the machine where the tables of a new VM are.
    fn watch(&self, handle: u64, attributes: u64, metadata: u64) {
        let bits = VmAttributes::from_bits(attributes).and_then(|attributes| u32::try_from(attributes.ipa_bits).ok());
        let geometry = bits.and_then(Geometry::stage2).expect("the VM exists");
        let vmid = Self::vmid(handle);
        self.machine.forget(vmid);
        self.machine.inner.add_root(Stage::Guest(vmid), address(metadata), geometry);
    }

    /// Returns the VMID of the VM that has a handle.
    #[must_use]
    pub fn vmid(handle: u64) -> Vmid {
        let [slot, ..] = handle.to_le_bytes();
        Vmid::new(slot + 1)
    }

    /// Makes a call that fails with the given status and x1, and changes nothing.
    #[track_caller]
    pub fn fails(&self, values: impl AsRef<[u64]>, status: Status, x1: u64) {
        let (before, values) = (self.look(), values.as_ref());
        let [first, second] = [2, 3].map(|index: usize| values.get(index).copied().unwrap_or(0x1000 + index as u64));
        assert_eq!(self.hvc(values), [status.register(), x1, first, second], "{values:#x?}");
        assert_eq!(self.look(), before, "{values:#x?}");
        self.is_consistent();
    }

    /// Loads from a page as the host, and returns what it holds. `None` if the host takes an abort.
    #[must_use]
    pub fn load(&self, page: u64) -> Option<u64> {
        self.reaches(page).then(|| self.machine.inner.peek(address(page)))
    }

    /// Stores to a page as the host: it holds `contents` then. Returns false if the host takes an abort.
    pub fn store(&self, page: u64, contents: u64) -> bool {
        let reached = self.reaches(page);
        if reached {
            self.machine.fill(address(page), contents);
        }
        reached
    }

    /// Has the host access a page, and returns whether it can. What it reaches then is that page.
    fn reaches(&self, page: u64) -> bool {
        let there = || self.machine.translate(Stage::Stage2, page);
        let Some(ipa) = Ipa::new(page) else { return false };
        let found = there().or_else(|| match self.host.fault(self.machine, ipa) {
            FaultAction::Resume => Some(there().expect("the host has been told to try again")),
            FaultAction::Inject => {
                assert_eq!(there(), None, "the host takes an abort where it has access");
                None
            }
        });
        assert!(found.is_none_or(|found| found.raw() == page), "{page:#x} leads to {found:?}");
        found.is_some()
    }

    /// Returns why a vCPU was left, from its run page.
    #[must_use]
    pub fn exit(&self, run_page: u64) -> RunExit {
        RunExit::from_bytes(&self.machine.peek(run_page, RunPage::EXIT))
    }

    /// Answers the last exit of a vCPU, in its run page.
    pub fn answer(&self, run_page: u64, answer: &RunEntry) {
        assert!(self.reaches(run_page), "the host keeps its run pages");
        self.machine.patch(run_page, RunPage::ENTRY, &answer.to_bytes());
    }

    /// Returns what is in the run page as the host's last answer.
    #[must_use]
    pub fn answered(&self, run_page: u64) -> RunEntry {
        RunEntry::from_bytes(&self.machine.peek(run_page, RunPage::ENTRY))
    }

    /// Returns all that the host can see of memory.
    #[must_use]
    pub fn look(&self) -> (Vec<PageReport>, Counts) {
        let report = |page| self.memory.page_state(address(page));
        let pages: Vec<_> = self.layout.ram.clone().step_by(PAGE_SIZE as usize).map(report).collect();
        (pages, self.memory.counts(self.machine))
    }

    /// Checks the tables of a VM against the ownership table. In time that grows with RAM.
    ///
    /// # Errors
    ///
    /// The first inconsistency.
    ///
    /// # Panics
    ///
    /// If there is no such VM.
    pub fn check_guest(&self, handle: u64) -> Result<(), Inconsistency> {
        let check = |guest: &Guest<GuestMemory>| self.memory.check_guest(self.machine, guest.memory());
        self.vms.with_guest(Handle::from_raw(handle), check).expect("nobody else uses it")
    }

    /// Demands that nothing is cached that should not be, and that all tables agree with the ownership table. In time that grows
    /// with RAM.
    pub fn is_consistent(&self) {
        self.machine.inner.assert_quiescent();
        self.memory.check(self.machine).expect("tables agree with the ownership table");
    }
}
