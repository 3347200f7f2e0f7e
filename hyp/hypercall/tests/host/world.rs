//! A host, and a machine that it runs on.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::{Barrier, Mutex},
};

use ravelin_abi::{PageStateCode, Statistics, Status, VmAttributes};
use ravelin_hypercall::{Cpu, Entries, Firmware, Host, HostedVms, Registers, Start};
use ravelin_memory::{HypRange, IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_ownership::{Counts, Memory, OwnershipTable, PAGES_PER_BLOCK, PageReport, sizes};
use ravelin_pgtable::{
    Geometry, Machine, PageTable, Vmid, Vttbr,
    recording::{RecordingMachine, RecordingPool, Stage, Translation},
};
use ravelin_vm::{
    Context, EntropySource, Entry, GuestCpu, IdRegisters, Left, ObjectMemory, PageAccess, PstateFeatures, Syndrome,
    VectorPlaces,
};

use crate::{PAGE_STATE, SHARE, STATISTICS};

pub(crate) const RAM: Range<u64> = 0x4000_0000..0x4080_0000;
pub(crate) const CARVE_OUT: Range<u64> = 0x4060_0000..0x4080_0000;

const VM_CREATE: u64 = 0xc600_1010;

/// The recording machine, with bytes in its pages, and a guest that makes calls.
#[derive(Default)]
pub(crate) struct TestMachine {
    pub(crate) inner: RecordingMachine,
    /// The page that the hypervisor wrote last as the host's.
    written: Mutex<Option<(PhysAddr, Vec<u8>)>>,
    /// Pages that the hypervisor has written to.
    bytes: Mutex<BTreeMap<u64, [u8; PAGE_SIZE as usize]>>,
    /// What the guest does, one after the other, before an interrupt comes.
    pub(crate) guest: Mutex<VecDeque<Action>>,
    /// If there is one, a guest waits at it twice: when it has been entered, and before it is left.
    pub(crate) meeting: Mutex<Option<&'static Barrier>>,
}

/// What a guest does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    /// `HVC #0`, with x0 to x3.
    Call([u64; 4]),
    /// Stores 32 bits.
    Store(u64, u32),
}

impl TestMachine {
    fn assert_mapped(&self, at: PhysAddr) {
        let page = at.page();
        let answers = self.inner.translate(Stage::El2, page.raw());
        let leads_here = |answer: &Option<Translation>| answer.is_some_and(|it| it.to == page);
        assert!(answers.iter().all(leads_here), "{at} is accessed but not mapped: {answers:?}");
    }

    /// Returns bytes of a page, as the host sees them.
    pub(crate) fn peek<const N: usize>(&self, page: u64, offset: usize) -> [u8; N] {
        let bytes = self.bytes.lock().unwrap();
        bytes.get(&page).map_or([0; N], |page| page[offset..offset + N].try_into().unwrap())
    }
}

impl PageAccess for TestMachine {
    fn read_bytes(&self, at: PhysAddr, bytes: &mut [u8]) {
        self.assert_mapped(at);
        let offset = (at.raw() % PAGE_SIZE) as usize;
        let pages = self.bytes.lock().unwrap();
        match pages.get(&at.page().raw()) {
            Some(page) => bytes.copy_from_slice(&page[offset..offset + bytes.len()]),
            None => bytes.fill(0),
        }
    }

    fn write_bytes(&self, at: PhysAddr, bytes: &[u8]) {
        self.assert_mapped(at);
        *self.written.lock().unwrap() = Some((at, bytes.to_vec()));
        let offset = (at.raw() % PAGE_SIZE) as usize;
        let mut pages = self.bytes.lock().unwrap();
        pages.entry(at.page().raw()).or_insert([0; _])[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn read_words(&self, at: PhysAddr, words: &mut [u64]) {
        assert!(at.is_aligned(8));
        let mut bytes = vec![0; size_of_val(words)];
        self.read_bytes(at, &mut bytes);
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
    }

    fn write_words(&self, at: PhysAddr, words: &[u64]) {
        assert!(at.is_aligned(8));
        self.write_bytes(at, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
    }
}

impl EntropySource for TestMachine {
    fn bits(&self) -> Option<[u64; 3]> {
        None
    }

    fn exists(&self) -> bool {
        false
    }
}

impl TestMachine {
    fn enter_once(&self, guest: &mut Entry<'_>) -> Left {
        const HVC: u64 = 0x16 << 26;
        /// Data abort by a store of w5 that stage 2 does not translate.
        const STORE: u64 = 0x24 << 26 | 1 << 25 | 1 << 24 | 2 << 22 | 5 << 16 | 1 << 6 | 7;
        let meeting = *self.meeting.lock().unwrap();
        if let Some(meeting) = meeting {
            meeting.wait();
            meeting.wait();
        }
        let context = &mut guest.context;
        Left::Synchronous(match self.guest.lock().unwrap().pop_front() {
            None => return Left::Interrupt,
            Some(Action::Call(call)) => {
                context.x[..4].copy_from_slice(&call);
                context.pc += 4;
                Syndrome { esr: HVC, far: 0, hpfar: 0 }
            }
            Some(Action::Store(at, value)) => {
                context.x[5] = value.into();
                Syndrome { esr: STORE, far: at, hpfar: at >> 12 << 4 }
            }
        })
    }
}

impl GuestCpu for TestMachine {
    type Host = ();

    fn leave_host(&self, (): &mut ()) -> Result<(), Status> {
        Ok(())
    }

    fn return_to_host(&self, (): &()) {}

    fn enter(&self, (): &(), guest: &mut Entry<'_>, mut handles: impl FnMut(&Syndrome, &mut Context) -> bool) -> Left {
        loop {
            match self.enter_once(guest) {
                Left::Synchronous(syndrome) if handles(&syndrome, guest.context) => {}
                left => return left,
            }
        }
    }

    fn area_pages(&self) -> u64 {
        2
    }

    fn load_vectors(&self, _: PhysRange) {}

    fn unload_vectors(&self, _: PhysRange) {}

    fn guest_vectors(&self, area: PhysRange) -> VectorPlaces {
        VectorPlaces { status: area.base(), first: area.base().checked_add(32).unwrap(), stride: 16 }
    }

    fn clear_vectors(&self, area: PhysRange) {
        area.iter().for_each(|page| self.assert_mapped(page));
    }

    fn counter(&self) -> u64 {
        1
    }

    fn interrupt_pending(&self, _host: &Self::Host) -> bool {
        true
    }

    fn hold_virtual_timer(&self) -> bool {
        false
    }

    fn release_virtual_timer(&self) {}

    fn list_registers(&self) -> usize {
        4
    }

    fn pstate_features(&self) -> PstateFeatures {
        PstateFeatures::default()
    }

    fn id_registers(&self) -> IdRegisters {
        IdRegisters::default()
    }
}

impl Machine for TestMachine {
    fn read(&self, table: PhysAddr, index: usize) -> u64 {
        self.inner.read(table, index)
    }

    fn write(&self, table: PhysAddr, index: usize, value: u64) {
        self.inner.write(table, index, value);
    }

    fn clear_table(&self, table: PhysAddr) {
        self.inner.clear_table(table);
    }

    fn publish(&self) {
        self.inner.publish();
    }

    fn invalidate_stage2(&self, tree: Vttbr, range: IpaRange, leaf_only: bool) {
        self.inner.invalidate_stage2(tree, range, leaf_only);
    }

    fn invalidate_stage2_all(&self, tree: Vttbr) {
        self.inner.invalidate_stage2_all(tree);
    }

    fn invalidate_el2(&self, range: HypRange) {
        self.inner.invalidate_el2(range);
    }

    fn scrub(&self, range: PhysRange) {
        self.inner.scrub(range);
    }

    fn clean(&self, range: PhysRange) {
        self.inner.clean(range);
    }
}

/// The heap.
pub(crate) struct Heap;

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
pub(crate) struct Agreeable;

impl Firmware for Agreeable {
    fn smc(&self, [function, ..]: [u64; 4]) -> [u64; 4] {
        [if function == 0x8400_0000 { 0x1_0001 } else { 0 }, 0, 0, 0]
    }
}

pub(crate) struct World<'a> {
    pub(crate) machine: &'a TestMachine,
    pub(crate) memory: &'a Memory<'a, RecordingPool>,
    pub(crate) host: Host<'a, RecordingPool, Agreeable, Heap>,
}

/// Runs a test in a world where the host owns all but the carve-out.
pub(crate) fn in_world(pool_pages: usize, test: impl FnOnce(&World<'_>)) {
    let address = |raw| PhysAddr::new(raw).unwrap();
    let range = |range: Range<u64>| PhysRange::from_bounds(range.start, range.end).unwrap();
    let machine = TestMachine::default();
    let geometry = Geometry::stage2(40).unwrap();
    let [stage2_root, el2_root, pool] = [0, 0x2000, 0x3000].map(|offset| address(CARVE_OUT.start + offset));
    machine.inner.add_root(Stage::Stage2, stage2_root, geometry);
    machine.inner.add_root(Stage::El2, el2_root, Geometry::EL2);
    let sizes = sizes(&[range(RAM)]).unwrap();
    let mut blocks = vec![0; sizes.block_entries];
    let mut pages = vec![[0; PAGES_PER_BLOCK]; sizes.page_entries / PAGES_PER_BLOCK];
    let memory = Memory::new(
        OwnershipTable::new(&[range(RAM)], range(CARVE_OUT), &[], &mut blocks, &mut pages).unwrap(),
        PageTable::new(stage2_root, geometry),
        PageTable::new(el2_root, Geometry::EL2),
        machine.inner.pool(PhysRange::new(pool.raw(), pool_pages as u64).unwrap()),
    );
    let cpus = [Cpu::booting(0, 0, Start { entry: RAM.start, context: 0 }), Cpu::off(1, 1)];
    let entries = Entries { start: address(CARVE_OUT.start), resume: address(CARVE_OUT.start) };
    let vms = Box::new(HostedVms::new(Heap));
    let host = Host::new(&memory, &vms, Agreeable, &cpus, entries);
    assert!(host.take_start(0).is_some());
    test(&World { machine: &machine, memory: &memory, host });
}

impl World<'_> {
    /// Makes a call with recognisable values in the other registers and returns x0 to x3.
    pub(crate) fn hvc_with(&self, immediate: u16, values: impl AsRef<[u64]>) -> [u64; 4] {
        let mut registers: Registers = core::array::from_fn(|index| 0x1000 + index as u64);
        registers[..values.as_ref().len()].copy_from_slice(values.as_ref());
        let before = registers;
        self.host.hvc(self.machine, immediate, &mut registers);
        assert_eq!(registers[4..], before[4..]);
        if let ([VM_CREATE, attributes, metadata, ..], [0, handle, ..]) = (before, registers) {
            self.watch(handle, attributes, metadata);
        }
        registers[..4].try_into().unwrap()
    }

    /// Tells the machine where the tables of a new VM are.
    fn watch(&self, handle: u64, attributes: u64, metadata: u64) {
        let bits = VmAttributes::from_bits(attributes).unwrap().ipa_bits;
        let vmid = Vmid::new(handle.to_le_bytes()[0] + 1);
        let geometry = Geometry::stage2(u32::try_from(bits).unwrap()).unwrap();
        self.machine.inner.add_root(Stage::Guest(vmid), PhysAddr::new(metadata).unwrap(), geometry);
    }

    pub(crate) fn hvc(&self, values: impl AsRef<[u64]>) -> [u64; 4] {
        self.hvc_with(0, values)
    }

    pub(crate) fn succeeds(&self, function: u64, address: u64, pages: u64) {
        let answer = self.hvc([function, address, pages, 0]);
        assert_eq!(answer, [0, 0, pages, 0], "{function:#x} of {pages} pages at {address:#x}");
        self.is_consistent();
    }

    /// Makes a call that fails with the given status and x1, and changes nothing.
    #[track_caller]
    pub(crate) fn fails(&self, values: impl AsRef<[u64]>, status: Status, x1: u64) {
        let (before, values) = (self.look(), values.as_ref());
        let [first, second] = [2, 3].map(|index: usize| values.get(index).copied().unwrap_or(0x1000 + index as u64));
        assert_eq!(self.hvc(values), [status.register(), x1, first, second], "{values:#x?}");
        assert_eq!(self.look(), before, "{values:#x?}");
        self.is_consistent();
    }

    pub(crate) fn state(&self, page: u64) -> (PageStateCode, u64) {
        let [status, state, pins, _] = self.hvc([PAGE_STATE, page, 0, 0]);
        assert_eq!(status, 0);
        (PageStateCode::from_code(state).unwrap(), pins)
    }

    /// Returns all that the host can see of memory.
    pub(crate) fn look(&self) -> (Vec<PageReport>, Counts) {
        let report = |page| self.memory.page_state(PhysAddr::new(page).unwrap());
        let pages: Vec<_> = RAM.step_by(PAGE_SIZE as usize).map(report).collect();
        (pages, self.memory.counts())
    }

    /// Shares a page and has the statistics written to it.
    pub(crate) fn statistics_of(&self, page: u64) -> Statistics {
        self.succeeds(SHARE, page, 1);
        assert_eq!(self.hvc([STATISTICS, page, 0, 7]), [0, Statistics::SIZE as u64, 0, 7]);
        self.is_consistent();
        let (written, bytes) = self.machine.written.lock().unwrap().take().unwrap();
        assert_eq!((written.raw(), bytes.len()), (page, Statistics::SIZE));
        Statistics::from_bytes(&bytes)
    }

    pub(crate) fn is_consistent(&self) {
        self.machine.inner.assert_quiescent();
        self.memory.check(self.machine).unwrap();
    }
}
