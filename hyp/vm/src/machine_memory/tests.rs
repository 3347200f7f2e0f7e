//! VMs on the recording machine.

use std::sync::Mutex;

use ravelin_memory::HypRange;
use ravelin_ownership::{Counts, OwnershipTable, PAGES_PER_BLOCK, sizes};
use ravelin_pgtable::{
    El2, PageTable, Stage2, Vmid, Vttbr,
    recording::{Op, RecordingMachine, RecordingPool, Stage, invalidations},
};
use sha2::{Digest as _, Sha256};

use super::*;
use crate::{Context, Handle, Outcome, Start, VcpuPages, Vms, fake::Heap, guest::tests::registers, guest_call, rsi};

const RAM: u64 = 0x4000_0000;
const BLOCKS: u64 = 16;
const METADATA: u64 = RAM;
const VCPUS: u64 = RAM + 0x10_0000;
const RUN_PAGE: u64 = RAM + 0x18_0000;
const TABLES: u64 = RAM + 0x20_0000;
const PAYLOAD: u64 = RAM + 0x40_0000;
const GUEST: u64 = 0x1000_0000;
const BLOCK: u64 = 512 * PAGE_SIZE;

type TestVms = Vms<Heap, GuestMemory, Context>;
type TestMemory<'a, 'm> = MachineMemory<'a, 'm, RecordingPool, TestMachine>;

/// The recording machine, with bytes in its pages: all of them the number that it keeps of a page.
#[derive(Default)]
struct TestMachine {
    inner: RecordingMachine,
    accesses: Mutex<Vec<Access>>,
}

/// What was done with the bytes of pages.
#[derive(Debug, PartialEq, Eq)]
enum Access {
    Read(PhysAddr),
    Write(PhysAddr, Vec<u8>),
    Clean(PhysRange),
}

impl TestMachine {
    fn access(&self, access: Access) {
        self.accesses.lock().unwrap().push(access);
    }

    fn assert_mapped(&self, at: PhysAddr) {
        let answers = self.inner.translate(Stage::El2, at.page().raw());
        assert!(answers.iter().all(|answer| answer.is_some_and(|leaf| leaf.to == at.page())), "{at} is not mapped");
    }
}

impl PageAccess for TestMachine {
    fn read_bytes(&self, at: PhysAddr, bytes: &mut [u8]) {
        self.assert_mapped(at);
        self.access(Access::Read(at));
        bytes.fill(self.inner.peek(at.page()) as u8);
    }

    fn write_bytes(&self, at: PhysAddr, bytes: &[u8]) {
        self.assert_mapped(at);
        self.access(Access::Write(at, bytes.to_vec()));
    }

    fn read_words<const N: usize>(&self, at: PhysAddr) -> [u64; N] {
        assert!(at.is_aligned(8));
        let mut bytes = vec![0; 8 * N];
        self.read_bytes(at, &mut bytes);
        core::array::from_fn(|word| u64::from_le_bytes(bytes.as_chunks().0[word]))
    }

    fn write_words<const N: usize>(&self, at: PhysAddr, words: &[u64; N]) {
        assert!(at.is_aligned(8));
        self.write_bytes(at, &words.map(u64::to_le_bytes).concat());
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
        self.access(Access::Clean(range));
    }
}

struct World<'a, 'm> {
    memory: TestMemory<'a, 'm>,
    vms: Box<TestVms>,
}

fn in_world(test: impl FnOnce(&World<'_, '_>)) {
    let ram = [PhysRange::new(RAM, BLOCKS * 512).unwrap()];
    let carve_out = PhysRange::new(RAM + (BLOCKS - 1) * BLOCK, 512).unwrap();
    let sizes = sizes(&ram).unwrap();
    let (mut blocks, mut pages) = (vec![0; sizes.block_entries], vec![[0; PAGES_PER_BLOCK]; sizes.block_entries]);
    let table = OwnershipTable::new(&ram, carve_out, &[], &mut blocks, &mut pages).unwrap();
    let machine = TestMachine::default();
    let host = Geometry::stage2(40).unwrap();
    let [host_root, el2_root] = [0xf0_0000_0000, 0xf0_0010_0000].map(|root| PhysAddr::new(root).unwrap());
    machine.inner.add_root(Stage::Stage2, host_root, host);
    machine.inner.add_root(Stage::El2, el2_root, Geometry::EL2);
    let pool = machine.inner.pool(PhysRange::new(0xf1_0000_0000, 128).unwrap());
    let mut memory = Memory::new(
        table,
        PageTable::<Stage2>::new(host_root, host),
        PageTable::<El2>::new(el2_root, Geometry::EL2),
        pool,
    );
    memory.divide(&machine).unwrap();
    let world = World { memory: MachineMemory::new(&memory, &machine), vms: Box::new(Vms::new(Heap)) };
    let before = world.counts();
    test(&world);
    machine.inner.assert_quiescent();
    let after = world.counts();
    let owned = |counts: Counts| [counts.host_owned, counts.host_shared, counts.hyp_owned, counts.hyp_donated];
    assert_eq!(owned(after), owned(before), "everything is the host's again");
}

fn pages(base: u64, pages: u64) -> PhysRange {
    PhysRange::new(base, pages).unwrap()
}

fn frames(base: u64, pages: u64) -> IpaRange {
    IpaRange::new(base, pages).unwrap()
}

const fn attributes(kind: VmKind) -> VmAttributes {
    VmAttributes { kind, ipa_bits: 40, vcpus: 2 }
}

impl World<'_, '_> {
    fn counts(&self) -> Counts {
        self.memory.memory.counts(self.memory.machine)
    }

    fn log(&self) -> Vec<Op> {
        self.memory.machine.inner.assert_quiescent();
        self.memory.machine.inner.take_log()
    }

    /// Makes a VM with a vCPU and tables.
    fn create(&self, kind: VmKind, tables: u64) -> Handle {
        let Self { memory, vms } = self;
        let attributes = attributes(kind);
        let (vm_pages, vcpu_pages, _) = TestVms::sizes::<TestMemory<'_, '_>>(attributes, 1);
        let handle = vms.create(memory, attributes, pages(METADATA, vm_pages)).unwrap();
        let vmid = Stage::Guest(Vmid::new(handle.slot() as u8 + 1));
        let root = PhysAddr::new(METADATA).unwrap();
        memory.machine.inner.add_root(vmid, root, Geometry::stage2(40).unwrap());
        if tables != 0 {
            vms.donate_tables(memory, handle, pages(TABLES, tables)).unwrap();
        }
        let run_page = PhysAddr::new(RUN_PAGE).unwrap();
        let vcpu = VcpuPages { metadata: pages(VCPUS, vcpu_pages), area: 1, run_page };
        vms.create_vcpu(memory, handle, 0, &vcpu, |_, _, _| Context::default()).unwrap();
        handle
    }

    fn map(&self, handle: Handle, at: u64, range: PhysRange) -> Result<(), Refusal> {
        self.vms.map(&self.memory, handle, at, range)
    }

    fn seal(&self, handle: Handle) {
        let start = Start { entry: GUEST, device_tree: GUEST, distributor: 0x800_0000, redistributors: 0x80a_0000 };
        self.vms.seal(&self.memory, handle, &start).unwrap();
    }

    /// Makes a guest's call; returns the outcome and x0 to x2.
    fn call<const N: usize>(&self, handle: Handle, first: [u64; N]) -> (Option<Outcome>, [u64; 3]) {
        self.vms
            .run(handle, 0, |vm, vcpu| {
                vcpu.state = registers(first);
                let outcome = match vm.guest().kind() {
                    VmKind::Realm => rsi::call(&self.memory, vm.guest(), &mut vcpu.state, |_| {}),
                    _ => guest_call::call(&self.memory, vm.guest(), &mut vcpu.state),
                };
                let [x0, x1, x2, ..] = vcpu.state.x;
                Ok((outcome, [x0, x1, x2]))
            })
            .unwrap()
    }

    fn end(&self, handle: Handle, kind: VmKind) {
        let Self { memory, vms } = self;
        vms.teardown(memory, handle).unwrap();
        let counts = self.counts();
        if counts.host_lent + counts.guest_owned + counts.guest_offered + counts.guest_claimed != 0 {
            assert_eq!(vms.destroy(memory, handle), Err(Status::Busy.into()));
        }
        let mut base = 0;
        let end = if kind == VmKind::Realm { 1 << 39 } else { 1 << 40 };
        while base < end {
            let done = vms.reclaim(memory, handle, IpaRange::from_bounds(base, end).unwrap()).unwrap();
            assert_ne!(done, 0);
            base += done * PAGE_SIZE;
        }
        while vms.destroy(memory, handle).unwrap() != 0 {}
        self.memory.machine.inner.assert_quiescent();
    }
}

#[test]
fn a_pkvm_guest_from_the_cradle_to_the_grave() {
    in_world(|world| {
        let World { memory, vms } = world;
        let handle = world.create(VmKind::Pkvm, 8);
        world.map(handle, GUEST, pages(PAYLOAD, 512)).unwrap();
        world.map(handle, GUEST + BLOCK, pages(PAYLOAD + BLOCK, 3)).unwrap();
        let owner = |at| memory.owner(PhysAddr::new(at).unwrap());
        assert_eq!([PAYLOAD, PAYLOAD + 2 * BLOCK].map(owner), [Some(handle.slot()), None]);
        world.seal(handle);
        world.log();

        let (outcome, results) = world.call(handle, [0xc600_0003, GUEST, 512, 0]);
        assert_eq!((outcome, results), (Some(Outcome::Shared(frames(GUEST, 512))), [0, 512, 0]));
        assert_eq!(invalidations(&world.log()), [], "none to share");
        let unshare = [0xc600_0004, GUEST, 512, 0];
        assert_eq!(world.call(handle, unshare), (Some(Outcome::Done), [0, 512, 0]));
        assert_eq!(invalidations(&world.log()), [], "none to unshare what was not claimed");

        world.call(handle, [0xc600_0003, GUEST, 512, 0]);
        vms.claim(memory, handle, frames(GUEST + PAGE_SIZE, 2)).unwrap();
        assert_eq!(world.call(handle, unshare).0, Some(Outcome::Unshare(frames(GUEST, 512))));
        vms.release(memory, handle, frames(GUEST + PAGE_SIZE, 2)).unwrap();
        assert_eq!(world.call(handle, unshare), (Some(Outcome::Done), [0, 512, 0]));

        let absent = GUEST + BLOCK + 3 * PAGE_SIZE;
        assert_eq!(
            world.call(handle, [0xc600_0003, absent, 0, 0]).0,
            Some(Outcome::PageFault(Ipa::new(absent).unwrap()))
        );
        world.map(handle, absent, pages(PAYLOAD + 2 * BLOCK, 1)).unwrap();
        assert_eq!(world.call(handle, [0xc600_0003, absent, 0, 0]).1[0], 0);
        let gone = world.call(handle, [0xc600_0009, GUEST + BLOCK, 1, 0]);
        assert_eq!(gone, (Some(Outcome::Relinquished(frames(GUEST + BLOCK, 1))), [0, 1, 0]));
        let invalid = -3_i64 as u64;
        assert_eq!(world.call(handle, [0xc600_0009, GUEST + BLOCK, 1, 0]).1[0], invalid, "twice");

        vms.force_reclaim(memory, pages(PAYLOAD + PAGE_SIZE, 1)).unwrap();
        assert_eq!(world.call(handle, [0xc600_0003, GUEST + PAGE_SIZE, 0, 0]).1[0], invalid, "poisoned");
        let at = GUEST + PAGE_SIZE;
        let again = world.map(handle, at, pages(PAYLOAD + PAGE_SIZE, 1));
        assert_eq!(again, Err(Refusal { status: Status::Poisoned, detail: PAYLOAD + PAGE_SIZE }));
        let gone = world.call(handle, [0xc600_0009, GUEST, 2, 0]);
        assert_eq!(gone, (Some(Outcome::Relinquished(frames(GUEST, 2))), [0, 2, 0]));
        world.map(handle, at, pages(PAYLOAD + PAGE_SIZE, 1)).unwrap();
        world.end(handle, VmKind::Pkvm);
    });
}

#[test]
fn a_ring_and_what_it_converts() {
    in_world(|world| {
        let World { memory, vms } = world;
        let handle = world.create(VmKind::Pkvm, 8);
        world.map(handle, GUEST, pages(PAYLOAD, 8)).unwrap();
        world.seal(handle);
        vms.with_guest(handle, |guest| {
            let guest = guest.memory();
            let ring = Ipa::new(GUEST).unwrap();
            assert_eq!(memory.pin_page(guest, ring), Ok(PhysAddr::new(PAYLOAD).unwrap()));
            assert_eq!(memory.pin_page(guest, ring), Err(GuestFailure::Refused));
            let absent = Ipa::new(GUEST + 8 * PAGE_SIZE).unwrap();
            assert_eq!(memory.pin_page(guest, absent), Err(GuestFailure::Absent(absent)));
            let wanted = |share, released| {
                let conversion = |first| {
                    let range = frames(GUEST + first * PAGE_SIZE, 2);
                    Some(Conversion { range, share, released })
                };
                [conversion(0), conversion(1), conversion(5)]
            };
            // The first has the ring in it.
            let done = Batch { seen: 3, done: 0b110, claimed: 0 };
            assert_eq!(memory.convert(guest, &mut wanted(true, false).into_iter()), done);
            memory.claim(guest, frames(GUEST + 5 * PAGE_SIZE, 1)).unwrap();
            let waits = Batch { seen: 3, done: 0b010, claimed: 0b100 };
            assert_eq!(memory.convert(guest, &mut wanted(false, false).into_iter()), waits);
            let released = Batch { seen: 3, done: 0b100, claimed: 0 };
            assert_eq!(memory.convert(guest, &mut wanted(false, true).into_iter()), released);
            memory.unpin_page(guest, ring);
            assert_eq!(memory.share(guest, IpaRange::single(ring)), Ok(1));
        })
        .unwrap();
        world.end(handle, VmKind::Pkvm);
    });
}

#[test]
fn a_realm_there_and_back() {
    const SET: u64 = 0xc400_0197;
    in_world(|world| {
        let World { memory, vms } = world;
        let handle = world.create(VmKind::Realm, 16);
        world.map(handle, GUEST, pages(PAYLOAD, 16)).unwrap();
        world.seal(handle);
        // All of its memory, of which little is there, as Linux does first.
        let (mut base, mut calls) = (0, 0);
        while base != 1 << 39 {
            let (outcome, [status, next, response]) = world.call(handle, [SET, base, 1 << 39, 1, 0]);
            assert_eq!((outcome, status, response), (Some(Outcome::Done), 0, 0));
            assert!(next > base);
            (base, calls) = (next, calls + 1);
        }
        assert!(calls < 8, "{calls}");

        let (at, top) = (GUEST + 4 * PAGE_SIZE, GUEST + 8 * PAGE_SIZE);
        assert_eq!(world.call(handle, [SET, at, top, 0, 0]), (Some(Outcome::Shared(frames(at, 4))), [0, top, 0]));
        assert_eq!(world.call(handle, [0xc400_0198, at, GUEST + BLOCK]).1, [0, top, 0]);
        vms.claim(memory, handle, frames(at, 1)).unwrap();
        assert_eq!(world.call(handle, [SET, at, top, 1, 0]).0, Some(Outcome::Unshare(frames(at, 1))));
        vms.release(memory, handle, frames(at, 1)).unwrap();
        // Over private, shared and absent frames.
        let (mut base, end) = (GUEST, GUEST + BLOCK);
        while base != end {
            let (outcome, [status, next, response]) = world.call(handle, [SET, base, end, 1, 0]);
            assert_eq!((outcome, status, response), (Some(Outcome::Done), 0, 0));
            assert!(next > base);
            base = next;
        }
        assert_eq!(world.call(handle, [0xc400_0198, GUEST, GUEST + 16 * PAGE_SIZE]).1, [0, GUEST + 16 * PAGE_SIZE, 1]);

        assert_eq!(world.call(handle, [0xc400_0196, GUEST + PAGE_SIZE]).1[0], 0);
        // Its caches may be off.
        let config = PhysAddr::new(PAYLOAD + PAGE_SIZE).unwrap();
        let clean = || Access::Clean(PhysRange::single(config));
        let written = Access::Write(config, vec![40, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert!(memory.machine.accesses.lock().unwrap().ends_with(&[clean(), written, clean()]));
        assert!(matches!(world.call(handle, [0xc400_0199, GUEST + PAGE_SIZE]).0, Some(Outcome::HostCall { .. })));
        assert!(memory.machine.accesses.lock().unwrap().ends_with(&[clean(), Access::Read(config), clean()]));
        world.call(handle, [SET, at, top, 0, 0]);
        world.end(handle, VmKind::Realm);
    });
}

#[test]
fn an_ordinary_vm_borrows() {
    in_world(|world| {
        let World { memory, vms } = world;
        let handle = world.create(VmKind::Ordinary, 8);
        world.map(handle, GUEST, pages(PAYLOAD, 512)).unwrap();
        world.map(handle, GUEST + BLOCK, pages(PAYLOAD + BLOCK, 4)).unwrap();
        world.seal(handle);
        let returned = frames(GUEST + BLOCK, 2);
        vms.unmap(memory, handle, returned).unwrap();
        assert_eq!(vms.unmap(memory, handle, returned).unwrap_err().status, Status::Absent, "twice");
        assert_eq!(world.counts().host_lent, 514);
        assert_eq!(world.call(handle, [0xc600_0003, GUEST, 0, 0]).0, None);
        world.end(handle, VmKind::Ordinary);
    });
}

#[test]
fn what_is_measured_is_what_the_guest_has() {
    in_world(|world| {
        let handle = world.create(VmKind::Pkvm, 8);
        let payload = pages(PAYLOAD, 20);
        let mut expected = Sha256::new();
        for (index, page) in (0..).zip(payload.iter()) {
            world.memory.machine.inner.poke(page, index + 1);
            expected.update((GUEST / PAGE_SIZE + index).to_le_bytes());
            expected.update([index as u8 + 1; 4096]);
        }
        for number in [u64::MAX, 1, 40, 1, GUEST, GUEST, 0x800_0000, 0x80a_0000] {
            expected.update(number.to_le_bytes());
        }
        let _ = world.memory.machine.inner.take_log();
        world.map(handle, GUEST, payload).unwrap();
        let log = world.memory.machine.inner.take_log();
        let cleaned = |page| log.iter().filter(|op| matches!(op, Op::Clean(range) if range.contains(page))).count();
        assert!(payload.iter().all(|page| cleaned(page) == 2), "before it is read, and after");
        assert_eq!(log.iter().filter(|op| matches!(op, Op::InvalidateEl2(_))).count(), 3, "8 pages at a time");
        world.seal(handle);
        let measured = world.vms.run(handle, 0, |vm, _| Ok(vm.guest().measurements.lock().get(0))).unwrap();
        assert_eq!(measured, Some(expected.finalize().into()));
        world.end(handle, VmKind::Pkvm);
    });
}

#[test]
fn refusals_say_what_and_where() {
    in_world(|world| {
        let World { memory, vms } = world;
        let handle = world.create(VmKind::Pkvm, 0);
        let refused = |status, detail| Err(Refusal { status, detail });
        let first = |at| world.map(handle, at, pages(PAYLOAD, 4));
        assert_eq!(first(GUEST), refused(Status::NeedsTables, 2));
        vms.donate_tables(memory, handle, pages(TABLES, 2)).unwrap();
        assert_eq!(first(GUEST), Ok(()));
        assert_eq!(world.map(handle, GUEST + BLOCK, pages(PAYLOAD + BLOCK, 1)), refused(Status::NeedsTables, 1));
        let next = pages(PAYLOAD + BLOCK, 2);
        assert_eq!(world.map(handle, GUEST + 3 * PAGE_SIZE, next), refused(Status::Exists, PAYLOAD + BLOCK));
        assert_eq!(first(GUEST + 8 * PAGE_SIZE), refused(Status::Denied, PAYLOAD), "is the guest's");
        assert_eq!(
            world.map(handle, GUEST + 4 * PAGE_SIZE, pages(0x9000_0000, 1)),
            refused(Status::NotRam, 0x9000_0000)
        );
        assert_eq!(world.map(handle, GUEST + 4 * PAGE_SIZE, pages(METADATA, 1)), refused(Status::Denied, METADATA));
        world.seal(handle);
        let claim = |at, count| vms.claim(memory, handle, frames(at, count));
        assert_eq!(claim(GUEST, 1), refused(Status::NotOffered, GUEST));
        world.call(handle, [0xc600_0003, GUEST, 2, 0]);
        assert_eq!(claim(GUEST, 3), refused(Status::NotOffered, GUEST + 2 * PAGE_SIZE));
        assert_eq!(claim(GUEST + 4 * PAGE_SIZE, 1), refused(Status::Absent, GUEST + 4 * PAGE_SIZE));
        assert_eq!(vms.release(memory, handle, frames(GUEST, 1)), refused(Status::Denied, GUEST));
        claim(GUEST, 1).unwrap();
        assert_eq!(claim(GUEST, 1), refused(Status::Denied, GUEST), "twice");
        assert_eq!(vms.force_reclaim(memory, pages(PAYLOAD, 1)), refused(Status::Denied, PAYLOAD), "shared");
        assert_eq!(vms.force_reclaim(memory, pages(TABLES, 1)), refused(Status::Denied, TABLES));
        vms.force_reclaim(memory, pages(PAYLOAD + 3 * PAGE_SIZE, 1)).unwrap();
        let replaced = world.map(handle, GUEST + 3 * PAGE_SIZE, next);
        assert_eq!(replaced, refused(Status::Poisoned, PAYLOAD + BLOCK));
        assert_eq!(claim(GUEST + 3 * PAGE_SIZE, 1), refused(Status::Poisoned, GUEST + 3 * PAGE_SIZE));
        let (vm_pages, ..) = TestVms::sizes::<TestMemory<'_, '_>>(attributes(VmKind::Pkvm), 1);
        let second = vms.create(memory, attributes(VmKind::Pkvm), pages(METADATA, vm_pages));
        assert_eq!(second, Err(Refusal { status: Status::Denied, detail: METADATA }));
        world.end(handle, VmKind::Pkvm);
    });
}

#[test]
fn the_run_page_stays_where_it_is() {
    in_world(|world| {
        let handle = world.create(VmKind::Pkvm, 4);
        let run_page = pages(RUN_PAGE, 1);
        let MachineMemory { memory, machine } = world.memory;
        assert!(memory.unpin(machine, run_page).is_err());
        assert!(memory.unshare(machine, run_page).is_err());
        assert!(memory.donate(machine, run_page).is_err());
        assert!(world.map(handle, GUEST, run_page).is_err());
        world.end(handle, VmKind::Pkvm);
        assert!(memory.donate(machine, run_page).is_ok());
        assert!(memory.take_back(machine, run_page).is_ok());
    });
}

#[test]
fn cycles_leave_nothing() {
    in_world(|world| {
        let mut tables = None;
        for round in 0..60 {
            let kind = [VmKind::Pkvm, VmKind::Realm, VmKind::Ordinary][round % 3];
            let handle = world.create(kind, 9);
            world.map(handle, GUEST, pages(PAYLOAD, 5)).unwrap();
            if round % 2 == 0 {
                world.seal(handle);
            }
            world.end(handle, kind);
            let Counts { el2_tables, free_tables, .. } = world.counts();
            assert_eq!(*tables.get_or_insert((el2_tables, free_tables)), (el2_tables, free_tables), "{round}");
        }
    });
}

#[test]
fn vms_are_small_enough_for_the_stack() {
    let size = size_of::<crate::Vm<Heap, GuestMemory, Context>>();
    assert!(size < 1536, "{size}");
}

#[test]
fn roots_are_as_large_as_the_addresses_ask() {
    let pages = |ipa_bits| TestMemory::root_pages(VmAttributes { ipa_bits, ..attributes(VmKind::Pkvm) });
    assert_eq!([36, 39, 40].map(pages), [1, 1, 2]);
}

#[test]
fn each_reason_has_its_status() {
    let told = |status, detail| Refusal { status, detail };
    for (reason, expected) in [
        (GuestReason::NotRam, told(Status::NotRam, 7)),
        (GuestReason::Denied, told(Status::Denied, 7)),
        (GuestReason::Busy, told(Status::Busy, 7)),
        (GuestReason::OutOfRange, told(Status::Overflow, 0)),
        (GuestReason::TooLarge, told(Status::TooLarge, 0)),
        (GuestReason::Exists, told(Status::Exists, 7)),
        (GuestReason::Absent, told(Status::Absent, 7)),
        (GuestReason::Poisoned, told(Status::Poisoned, 7)),
        (GuestReason::NotOffered, told(Status::NotOffered, 7)),
        (GuestReason::NeedsTables(3), told(Status::NeedsTables, 3)),
        (GuestReason::NoMemory, told(Status::NoMemory, 0)),
    ] {
        assert_eq!(refusal(reason, 7), expected);
    }
    let page = PhysAddr::new(PAYLOAD).unwrap();
    let hosts = |reason| Refusal::from(Failure { reason, page });
    assert_eq!(hosts(Reason::PinLimit), told(Status::Limit, PAYLOAD));
    assert_eq!(hosts(Reason::NotRam), told(Status::NotRam, PAYLOAD));
    let ipa = Ipa::new(GUEST + 5).unwrap();
    let guest = |reason| GuestFailure::from(MemoryFailure { reason, ipa });
    assert_eq!(guest(GuestReason::Absent), GuestFailure::Absent(ipa.page()));
    assert_eq!(guest(GuestReason::NeedsTables(3)), GuestFailure::NeedsTables(3));
    assert_eq!(guest(GuestReason::Denied), GuestFailure::Refused);
}

#[test]
fn what_is_shared_cannot_be_given_up() {
    in_world(|world| {
        let World { memory, vms } = world;
        let handle = world.create(VmKind::Pkvm, 12);
        world.map(handle, GUEST, pages(PAYLOAD, 2)).unwrap();
        world.seal(handle);
        let guest = |f: &dyn Fn(&GuestMemory)| vms.with_guest(handle, |guest| f(guest.memory())).unwrap();
        guest(&|guest| {
            assert_eq!(memory.share(guest, frames(GUEST, 1)), Ok(1));
            assert_eq!(memory.relinquish(guest, frames(GUEST, 2)), Err(GuestFailure::Refused), "shared");
            assert_eq!(
                memory.relinquish(guest, frames(GUEST + 2 * PAGE_SIZE, 1)),
                Err(GuestFailure::Refused),
                "absent"
            );
            assert_eq!(memory.look(guest, frames(GUEST, 1)), (GuestPage::Offered, 1));
        });
        assert!(vms.with_guest(Handle::from_raw(handle.raw() + 1), |_| ()).is_err());
        world.end(handle, VmKind::Pkvm);
    });
}

#[test]
fn a_realm_cannot_unshare_poison() {
    in_world(|world| {
        let World { memory, vms } = world;
        let handle = world.create(VmKind::Realm, 12);
        world.map(handle, GUEST, pages(PAYLOAD, 4)).unwrap();
        world.seal(handle);
        vms.force_reclaim(memory, pages(PAYLOAD + PAGE_SIZE, 1)).unwrap();
        let at = |page| frames(GUEST + page * PAGE_SIZE, 1);
        vms.run(handle, 0, |vm, _| {
            let guest = vm.guest().memory();
            assert_eq!(memory.look(guest, at(0)), (GuestPage::Private, 1));
            assert_eq!(memory.look(guest, at(1)), (GuestPage::Poisoned, 1));
            assert_eq!(memory.look(guest, at(4)), (GuestPage::Absent, 1));
            assert_eq!(memory.unshare(guest, at(0)), Ok(1), "is private already");
            assert_eq!(memory.unshare(guest, at(1)), Err(GuestFailure::Refused));
            Ok(())
        })
        .unwrap();
        world.end(handle, VmKind::Realm);
    });
}
