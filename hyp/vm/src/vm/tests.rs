use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    thread,
};

use ravelin_abi::VmKind;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::{
    FirstInstruction, Readiness,
    fake::{Fake, FakeGuest, GuestState, Heap, Owner},
};

#[cfg(loom)]
mod models;

type TestVms = Vms<Heap, FakeGuest, u64>;

const PKVM: VmAttributes = VmAttributes { kind: VmKind::Pkvm, ipa_bits: 40, vcpus: 4 };
const ORDINARY: VmAttributes = VmAttributes { kind: VmKind::Ordinary, ..PKVM };

/// Where the tests' pages come from.
const METADATA: u64 = 0x4000_0000;
const VCPUS: u64 = 0x4100_0000;
const RUN_PAGES: u64 = 0x4200_0000;
const TABLES: u64 = 0x4300_0000;
const PAYLOAD: u64 = 0x5000_0000;

/// Where in the guest.
const GUEST: u64 = 0x1000_0000;

fn range(base: u64, pages: u64) -> PhysRange {
    PhysRange::new(base, pages).unwrap()
}

fn frames(pages: u64) -> IpaRange {
    IpaRange::new(GUEST, pages).unwrap()
}

fn page(base: u64) -> PhysAddr {
    PhysAddr::new(base).unwrap()
}

/// Pages that the state of a vCPU has besides.
const AREA: u64 = 1;

fn sizes(attributes: VmAttributes) -> (u64, u64, u64) {
    TestVms::sizes::<Fake>(attributes, AREA)
}

fn start(entry: u64, device_tree: u64) -> Start {
    Start { entry, device_tree, distributor: 0x800_0000, redistributors: 0x80a_0000 }
}

fn status<R: std::fmt::Debug>(outcome: Result<R, Refusal>) -> Status {
    outcome.map_or_else(|refusal| refusal.status, |_| Status::Success)
}

struct World {
    memory: Fake,
    vms: Box<TestVms>,
}

impl World {
    fn new() -> Self {
        Self { memory: Fake::default(), vms: Box::new(Vms::new(Heap)) }
    }

    fn create(&self, attributes: VmAttributes) -> Handle {
        self.create_at(attributes, METADATA).unwrap()
    }

    fn create_at(&self, attributes: VmAttributes, base: u64) -> Result<Handle, Refusal> {
        let (pages, ..) = sizes(attributes);
        self.vms.create(&self.memory, attributes, range(base, pages))
    }

    fn add_vcpu(&self, handle: Handle, index: u64) -> Status {
        let (_, pages, _) = sizes(PKVM);
        let metadata = range(VCPUS + index * pages * PAGE_SIZE, pages);
        let pages = VcpuPages { metadata, area: AREA, run_page: page(RUN_PAGES + index * PAGE_SIZE) };
        status(self.vms.create_vcpu(&self.memory, handle, index, &pages, |_, index, _| index as u64 + 100))
    }

    fn map(&self, handle: Handle, pages: u64) -> Status {
        status(self.vms.map(&self.memory, handle, GUEST, range(PAYLOAD, pages)))
    }

    fn run(&self, handle: Handle, index: u64) -> Status {
        status(self.vms.run(handle, index, |_, _| Ok(())))
    }

    /// Takes a VM from wherever it is to its end.
    fn end(&self, handle: Handle) {
        let torn_down = status(self.vms.teardown(&self.memory, handle));
        assert!([Status::Success, Status::WrongState].contains(&torn_down));
        assert_eq!(self.vms.reclaim(&self.memory, handle, frames(512)), Ok(512));
        while self.vms.destroy(&self.memory, handle).unwrap() != 0 {}
    }
}

#[test]
fn large_vcpus_come_back_in_several_calls() {
    const LARGE: u64 = 200;
    let world = World::new();
    let World { memory, vms } = &world;
    let handle = world.create(PKVM);
    let (_, pages, _) = TestVms::sizes::<Fake>(PKVM, LARGE);
    for index in 0..4 {
        let metadata = range(VCPUS + index * pages * PAGE_SIZE, pages);
        let pages = VcpuPages { metadata, area: LARGE, run_page: page(RUN_PAGES + index * PAGE_SIZE) };
        vms.create_vcpu(memory, handle, index, &pages, |_, _, _| 0).unwrap();
    }
    vms.teardown(memory, handle).unwrap();
    let (own, ..) = sizes(PKVM);
    assert_eq!(vms.destroy(memory, handle), Ok(2 * pages + own), "two fit into a call");
    assert_eq!(vms.destroy(memory, handle), Ok(0));
    assert_eq!(status(vms.destroy(memory, handle)), Status::BadHandle);
}

#[test]
fn a_life() {
    let world = World::new();
    let World { memory, vms } = &world;
    let handle = world.create(PKVM);
    vms.donate_tables(memory, handle, range(TABLES, 3)).unwrap();
    for index in 0..4 {
        assert_eq!(world.add_vcpu(handle, index), Status::Success);
    }
    assert_eq!(world.map(handle, 16), Status::Success);
    vms.seal(memory, handle, &start(GUEST, GUEST + 0x1000)).unwrap();
    for index in 0..4 {
        vms.run(handle, index, |vm, vcpu| {
            assert_eq!((vcpu.state, vcpu.index()), (100 + index, index as usize));
            assert_eq!(vcpu.run_page().raw(), RUN_PAGES + index * PAGE_SIZE);
            assert_eq!(vm.handle(), handle);
            let first = FirstInstruction { pc: GUEST, x0: GUEST + 0x1000, reset: false };
            let power = vm.power(vcpu.index()).unwrap();
            assert_eq!(power.take_start(), (index == 0).then_some(first));
            assert_eq!(power.run(), if index == 0 { Readiness::Starts } else { Readiness::Off });
            assert!(vm.power(4).is_none());
            Ok(())
        })
        .unwrap();
    }
    vms.run(handle, 0, |vm, _| {
        assert_eq!(memory.share(vm.guest().memory(), frames(1)), Ok(1));
        Ok(())
    })
    .unwrap();
    vms.claim(memory, handle, frames(1)).unwrap();

    vms.teardown(memory, handle).unwrap();
    assert_eq!(status(vms.destroy(memory, handle)), Status::Busy);
    vms.reclaim(memory, handle, frames(8)).unwrap();
    assert_eq!(status(vms.destroy(memory, handle)), Status::Busy);
    vms.reclaim(memory, handle, frames(512)).unwrap();
    assert_eq!(vms.destroy(memory, handle), Ok(0));
    assert_eq!(memory.gone(), 0, "all pages are the host's again");
    assert_eq!([memory.content(PAYLOAD), memory.content(PAYLOAD + PAGE_SIZE)], [0xaa, 0], "shared, private");
    assert_eq!([METADATA, VCPUS, TABLES].map(|page| memory.content(page)), [0; 3]);
    assert_eq!(status(vms.destroy(memory, handle)), Status::BadHandle);
}

/// What a host may try with a VM. `Run` to the end of the list are not possible in all stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    DonateTables,
    CreateVcpu,
    Map,
    Unmap,
    Seal,
    Run,
    Spi,
    Claim,
    Release,
    ForceReclaim,
    Reclaim,
    Destroy,
    Teardown,
}

const STEPS: [Step; 13] = [
    Step::DonateTables,
    Step::CreateVcpu,
    Step::Map,
    Step::Unmap,
    Step::Seal,
    Step::Run,
    Step::Spi,
    Step::Claim,
    Step::Release,
    Step::ForceReclaim,
    Step::Reclaim,
    Step::Destroy,
    Step::Teardown,
];

impl Step {
    fn take(self, world: &World, handle: Handle) -> Status {
        let World { memory, vms } = world;
        let offered = IpaRange::new(GUEST + 0x100_0000, 1).unwrap();
        match self {
            Self::DonateTables => status(vms.donate_tables(memory, handle, range(TABLES + 0x10_0000, 1))),
            Self::CreateVcpu => world.add_vcpu(handle, 3),
            Self::Map => status(vms.map(memory, handle, GUEST + 0x200_0000, range(PAYLOAD + 0x200_0000, 1))),
            Self::Unmap => status(vms.unmap(memory, handle, frames(1))),
            Self::Seal => status(vms.seal(memory, handle, &start(GUEST, GUEST))),
            Self::Run => world.run(handle, 0),
            Self::Spi => status(vms.raise_spi(handle, 40, true)),
            Self::Claim => status(vms.claim(memory, handle, offered)),
            Self::Release => status(vms.release(memory, handle, offered)),
            Self::ForceReclaim => status(vms.force_reclaim(memory, range(PAYLOAD, 1))),
            Self::Reclaim => status(vms.reclaim(memory, handle, frames(512))),
            Self::Destroy => status(vms.destroy(memory, handle)),
            Self::Teardown => status(vms.teardown(memory, handle)),
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "many pages")]
fn each_step_in_each_stage() {
    use Status::{BadHandle, Busy, NotOffered, Success, WrongState};
    let outcomes = |stage: usize| {
        let world = World::new();
        STEPS.map(|step| {
            let handle = world.create(PKVM);
            assert_eq!([world.add_vcpu(handle, 0), world.map(handle, 4)], [Success; 2]);
            if stage >= 1 {
                world.vms.seal(&world.memory, handle, &start(GUEST, GUEST)).unwrap();
            }
            if stage >= 2 {
                world.vms.teardown(&world.memory, handle).unwrap();
            }
            let before = world.memory.gone();
            let outcome = step.take(&world, handle);
            if outcome != Success {
                assert_eq!(world.memory.gone(), before, "{step:?}");
            }
            if outcome == Success && step == Step::Map {
                world.vms.teardown(&world.memory, handle).unwrap();
                let mapped = IpaRange::new(GUEST + 0x200_0000, 1).unwrap();
                world.vms.reclaim(&world.memory, handle, mapped).unwrap();
            }
            world.end(handle);
            assert_eq!(step.take(&world, handle), if step == Step::ForceReclaim { Status::Denied } else { BadHandle });
            assert_eq!(world.memory.gone(), 0, "{step:?}");
            outcome
        })
    };
    assert_eq!(
        outcomes(0),
        [
            Success,
            Success,
            Success,
            WrongState,
            Success,
            WrongState,
            WrongState,
            NotOffered,
            Status::Denied,
            Success,
            WrongState,
            WrongState,
            Success
        ]
    );
    assert_eq!(
        outcomes(1),
        [
            Success,
            WrongState,
            Success,
            WrongState,
            WrongState,
            Success,
            Success,
            NotOffered,
            Status::Denied,
            Success,
            WrongState,
            WrongState,
            Success
        ]
    );
    assert_eq!(
        outcomes(2),
        [
            Success, WrongState, WrongState, WrongState, WrongState, WrongState, WrongState, WrongState, WrongState,
            WrongState, Success, Busy, WrongState
        ]
    );
}

#[test]
fn creation_needs_the_right_pages() {
    let world = World::new();
    let (pages, ..) = sizes(PKVM);
    let create = |base, pages| status(world.vms.create(&world.memory, PKVM, range(base, pages)));
    assert_eq!(create(METADATA, pages - 1), Status::Invalid);
    assert_eq!(create(METADATA, pages + 1), Status::Invalid);
    assert_eq!(create(METADATA + PAGE_SIZE, pages), Status::Unaligned);
    assert_eq!(create(0x1000_0000, pages), Status::NotRam);
    assert_eq!(world.memory.gone(), 0);
    let first = world.create(PKVM);
    assert_eq!(create(METADATA, pages), Status::Denied);
    assert_eq!(create(METADATA + ((pages - 1) & !1) * PAGE_SIZE, pages), Status::Denied);
    world.end(first);
    assert_eq!(world.memory.gone(), 0);
}

#[test]
fn sizes_fit_what_is_kept() {
    assert!(size_of::<Vm<Heap, FakeGuest, u64>>() < 1536, "it passes over the stack");
    for kind in [VmKind::Ordinary, VmKind::Pkvm, VmKind::Realm] {
        for (ipa_bits, vcpus) in [(32, 1), (40, 128), (48, 7)] {
            let attributes = VmAttributes { kind, ipa_bits, vcpus };
            let (vm, vcpu, _) = sizes(attributes);
            assert!((4..64).contains(&vm) && vcpu == 2, "{attributes:?}: {vm}, {vcpu}");
            let world = World::new();
            let handle = world.create(attributes);
            assert_eq!(world.memory.gone() as u64, vm);
            world.end(handle);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "many pages")]
fn there_are_255_vms_and_128_vcpus() {
    let world = World::new();
    let attributes = VmAttributes { vcpus: 128, ..PKVM };
    let (pages, ..) = sizes(attributes);
    let stride = pages.next_multiple_of(2) * PAGE_SIZE;
    let handles: Vec<_> = (0..255).map(|vm| world.create_at(attributes, 0x6000_0000 + vm * stride).unwrap()).collect();
    assert_eq!(status(world.create_at(attributes, 0x6000_0000 + 255 * stride)), Status::Limit);
    for index in 0..128 {
        assert_eq!(world.add_vcpu(handles[254], index), Status::Success);
    }
    assert_eq!(world.add_vcpu(handles[254], 128), Status::Invalid);
    world.vms.seal(&world.memory, handles[254], &start(GUEST, GUEST)).unwrap();
    assert_eq!(world.run(handles[254], 127), Status::Success);
    assert_eq!(world.run(handles[254], 128), Status::Absent);
    assert_eq!(world.run(handles[254], u64::MAX), Status::Absent);
    handles.into_iter().for_each(|handle| world.end(handle));
    assert_eq!(world.memory.gone(), 0);
}

#[test]
fn creation_of_vcpus() {
    let world = World::new();
    let World { memory, vms } = &world;
    let handle = world.create(PKVM);
    assert_eq!(world.add_vcpu(handle, 4), Status::Invalid);
    assert_eq!(world.add_vcpu(handle, 1), Status::Success);
    assert_eq!(world.add_vcpu(handle, 1), Status::Exists);
    let create = |index, metadata: u64, pages, run_page: u64| {
        let gone = memory.gone();
        let pages = VcpuPages { metadata: range(metadata, pages), area: AREA, run_page: page(run_page) };
        let made = vms.create_vcpu(memory, handle, index, &pages, |_, _, _| 0);
        assert_eq!(memory.gone(), gone);
        status(made)
    };
    let (_, pages, _) = sizes(PKVM);
    let vcpu = VCPUS + 0x10_0000;
    assert_eq!(create(2, vcpu, pages + 1, RUN_PAGES), Status::Invalid);
    assert_eq!(create(2, METADATA, pages, RUN_PAGES), Status::Denied);
    assert_eq!(create(2, vcpu, pages, METADATA), Status::Denied);
    assert_eq!(create(2, vcpu, pages, vcpu), Status::Denied, "the run page in what is donated");
    assert_eq!(create(2, 0x1000_0000, pages, RUN_PAGES), Status::NotRam);
    assert_eq!(status(vms.seal(memory, handle, &start(GUEST, GUEST))), Status::Absent, "no vCPU 0");
    assert_eq!(world.add_vcpu(handle, 0), Status::Success);
    vms.seal(memory, handle, &start(GUEST, GUEST)).unwrap();
    assert_eq!(world.run(handle, 2), Status::Absent);
    vms.run(handle, 0, |vm, _| {
        assert_eq!([0, 1, 2, 3].map(|vcpu| vm.power(vcpu).is_some()), [true, true, false, false]);
        Ok(())
    })
    .unwrap();
    world.end(handle);
    assert_eq!(memory.gone(), 0);
}

#[test]
fn one_vcpu_runs_once() {
    let world = World::new();
    let handle = world.create(PKVM);
    assert_eq!([world.add_vcpu(handle, 0), world.add_vcpu(handle, 1)], [Status::Success; 2]);
    world.vms.seal(&world.memory, handle, &start(GUEST, GUEST)).unwrap();
    let nested = world.vms.run(handle, 0, |_, vcpu| {
        vcpu.state = 7;
        assert_eq!([world.run(handle, 0), world.run(handle, 1)], [Status::Busy, Status::Success]);
        // What ends a stage of life waits until nothing runs.
        assert_eq!(status(world.vms.teardown(&world.memory, handle)), Status::Busy);
        assert_eq!(status(world.vms.seal(&world.memory, handle, &start(0, 0))), Status::Busy);
        assert_eq!(status(world.vms.destroy(&world.memory, handle)), Status::Busy);
        Err::<(), _>(Status::Denied.into())
    });
    assert_eq!(nested, Err(Status::Denied.into()));
    assert_eq!(world.vms.run(handle, 0, |_, vcpu| Ok(vcpu.state)), Ok(7));
}

#[test]
#[cfg_attr(miri, ignore = "many pages")]
fn what_a_guest_is_when_it_starts() {
    let measure = |fill: &[(u64, u8)], vcpus: u64, entry| {
        let world = World::new();
        let handle = world.create(PKVM);
        (0..vcpus).for_each(|index| assert_eq!(world.add_vcpu(handle, index), Status::Success));
        for (index, &(frame, byte)) in fill.iter().enumerate() {
            let payload = PAYLOAD + index as u64 * PAGE_SIZE;
            world.memory.fill(payload, byte);
            world.vms.map(&world.memory, handle, frame << 12, range(payload, 1)).unwrap();
        }
        world.vms.seal(&world.memory, handle, &start(entry, GUEST)).unwrap();
        // What comes later does not count.
        world.vms.map(&world.memory, handle, GUEST + 0x1000_0000, range(PAYLOAD + 0x10_0000, 513)).unwrap();
        world.vms.run(handle, 0, |vm, _| Ok(vm.guest().measurements.lock().get(0).unwrap())).unwrap()
    };
    let original = measure(&[(0x80000, 1), (0x80001, 2)], 1, GUEST);
    let mut hash = Sha256::new();
    for (frame, byte) in [(0x80000_u64, 1), (0x80001, 2)] {
        hash.update(frame.to_le_bytes());
        hash.update([byte; 4096]);
    }
    for number in [u64::MAX, 1, 40, 1, GUEST, GUEST, 0x800_0000, 0x80a_0000] {
        hash.update(number.to_le_bytes());
    }
    assert_eq!(original, <[u8; 32]>::from(hash.finalize()));
    assert_ne!(measure(&[(0x80001, 2), (0x80000, 1)], 1, GUEST), original);
    assert_ne!(measure(&[(0x80000, 1), (0x80001, 2)], 2, GUEST), original);
    assert_ne!(measure(&[(0x80000, 1), (0x80001, 2)], 1, GUEST + 4), original);
}

#[test]
fn a_refused_map_is_not_measured() {
    let seal = |attempt: bool| {
        let world = World::new();
        let handle = world.create(PKVM);
        assert_eq!([world.add_vcpu(handle, 0), world.map(handle, 2)], [Status::Success; 2]);
        if attempt {
            assert_eq!(world.map(handle, 1), Status::Exists);
            assert_eq!(status(world.vms.map(&world.memory, handle, 0, range(PAYLOAD, 1))), Status::Denied);
            assert_eq!(world.map(handle, 513), Status::TooLarge);
            world.memory.lock().tables_needed = 3;
            let needed = world.vms.map(&world.memory, handle, 0, range(PAYLOAD + 0x10_0000, 1));
            assert_eq!(needed, Err(Refusal { status: Status::NeedsTables, detail: 3 }));
        }
        world.vms.seal(&world.memory, handle, &start(GUEST, GUEST)).unwrap();
        world.vms.run(handle, 0, |vm, _| Ok(vm.guest().measurements.lock().get(0).unwrap())).unwrap()
    };
    assert_eq!(seal(true), seal(false));
}

#[test]
fn what_could_not_be_measured_never_runs() {
    let world = World::new();
    let World { memory, vms } = &world;
    let handle = world.create(PKVM);
    assert_eq!(world.add_vcpu(handle, 0), Status::Success);
    memory.lock().read_fails = true;
    assert_eq!(world.map(handle, 4), Status::NoMemory);
    assert_eq!(status(vms.map(memory, handle, GUEST + 0x10_0000, range(PAYLOAD + 0x10_0000, 1))), Status::WrongState);
    assert_eq!(status(vms.seal(memory, handle, &start(GUEST, GUEST))), Status::WrongState);
    world.end(handle);
    assert_eq!(memory.gone(), 0);
}

#[test]
fn nobody_takes_pages_that_are_being_measured() {
    let world = World::new();
    let World { memory, vms } = &world;
    let handle = world.create(PKVM);
    assert_eq!(world.map(handle, 2), Status::Success);
    let reclaim = || status(vms.force_reclaim(memory, range(PAYLOAD, 1)));
    // As VM_MAP does on another CPU.
    let meanwhile = vms.table.shared(handle, |vm| {
        let _measured = vm.measurement.lock();
        Ok(reclaim())
    });
    assert_eq!([meanwhile.unwrap(), reclaim()], [Status::Busy, Status::Success]);
    world.end(handle);
    assert_eq!(memory.gone(), 0);
}

#[test]
fn guests_end_where_their_addresses_do() {
    let world = World::new();
    let World { memory, vms } = &world;
    for (kind, end) in [(VmKind::Pkvm, 1 << 40), (VmKind::Realm, 1 << 39)] {
        let handle = world.create(VmAttributes { kind, ..PKVM });
        assert_eq!(world.add_vcpu(handle, 0), Status::Success);
        let map = |at, pages| status(vms.map(memory, handle, at, range(PAYLOAD, pages)));
        assert_eq!([map(end, 1), map(end - PAGE_SIZE, 2)], [Status::Overflow; 2]);
        let beyond = IpaRange::new(end - PAGE_SIZE, 2).unwrap();
        assert_eq!(status(vms.claim(memory, handle, beyond)), Status::Overflow);
        assert_eq!(status(vms.release(memory, handle, beyond)), Status::Overflow);
        assert_eq!(status(vms.seal(memory, handle, &start(end, 0))), Status::Overflow);
        assert_eq!(status(vms.seal(memory, handle, &start(0, end + 8))), Status::Overflow);
        assert_eq!(map(end - PAGE_SIZE, 1), Status::Success);
        vms.seal(memory, handle, &start(end - 4, end - 8)).unwrap();
        vms.teardown(memory, handle).unwrap();
        assert_eq!(status(vms.reclaim(memory, handle, beyond)), Status::Overflow);
        vms.reclaim(memory, handle, IpaRange::new(end - PAGE_SIZE, 1).unwrap()).unwrap();
        world.end(handle);
    }
}

#[test]
#[cfg_attr(miri, ignore = "many pages")]
fn ordinary_vms_borrow() {
    let world = World::new();
    let World { memory, vms } = &world;
    let handle = world.create(ORDINARY);
    assert_eq!(world.add_vcpu(handle, 0), Status::Success);
    // Nothing to measure.
    assert_eq!(world.map(handle, 1024), Status::Success);
    let lent = Owner::Guest { slot: handle.slot(), frame: GUEST >> 12, state: GuestState::Lent };
    assert_eq!(memory.owner_of(PAYLOAD), lent);
    vms.seal(memory, handle, &start(GUEST, GUEST)).unwrap();
    vms.unmap(memory, handle, frames(1000)).unwrap();
    assert_eq!(memory.owner_of(PAYLOAD), Owner::Host);
    assert_eq!(status(vms.force_reclaim(memory, range(PAYLOAD + 1000 * PAGE_SIZE, 1))), Status::Denied);
    vms.teardown(memory, handle).unwrap();
    assert_eq!(vms.reclaim(memory, handle, frames(1024)), Ok(512), "the first ones");
    vms.reclaim(memory, handle, IpaRange::new(GUEST + 0x20_0000, 512).unwrap()).unwrap();
    world.end(handle);
    assert_eq!(
        [memory.gone(), memory.content(PAYLOAD).into(), memory.content(PAYLOAD + 0x40_0000 - 1).into()],
        [0, 0xaa, 0xaa]
    );
}

#[test]
fn reclaim_by_force() {
    let world = World::new();
    let World { memory, vms } = &world;
    let first = world.create(PKVM);
    let (pages, ..) = sizes(PKVM);
    let second = world.create_at(PKVM, METADATA + pages.next_multiple_of(2) * PAGE_SIZE).unwrap();
    assert_eq!(world.map(first, 2), Status::Success);
    vms.map(memory, second, GUEST, range(PAYLOAD + 2 * PAGE_SIZE, 2)).unwrap();
    let refused = vms.force_reclaim(memory, range(PAYLOAD, 3));
    assert_eq!(refused, Err(Refusal { status: Status::Denied, detail: PAYLOAD + 2 * PAGE_SIZE }), "another guest's");
    assert_eq!(status(vms.force_reclaim(memory, range(METADATA, 1))), Status::Denied);
    vms.force_reclaim(memory, range(PAYLOAD, 1)).unwrap();
    assert_eq!((memory.owner_of(PAYLOAD), memory.content(PAYLOAD)), (Owner::Host, 0));
    assert_eq!(status(vms.map(memory, first, GUEST, range(PAYLOAD, 1))), Status::Poisoned);
    world.end(second);
    world.end(first);
    assert_eq!(memory.gone(), 0);
}

#[test]
fn interrupts_are_the_hosts_to_raise_once_sealed() {
    let world = World::new();
    let handle = world.create(PKVM);
    assert_eq!(world.add_vcpu(handle, 0), Status::Success);
    world.vms.seal(&world.memory, handle, &start(GUEST, GUEST)).unwrap();
    let spi = |intid| status(world.vms.raise_spi(handle, intid, true));
    assert_eq!([spi(32), spi(287)], [Status::Success; 2]);
    for intid in [0, 16, 31, 288, 1019, 1020, 1 << 32 | 40, u64::MAX] {
        assert_eq!(spi(intid), Status::Invalid, "{intid}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "many pages")]
fn much_is_returned_in_parts() {
    let world = World::new();
    let World { memory, vms } = &world;
    let handle = world.create(VmAttributes { vcpus: 128, ..PKVM });
    (0..128).for_each(|index| assert_eq!(world.add_vcpu(handle, index), Status::Success));
    for chunk in 0..4 {
        vms.donate_tables(memory, handle, range(TABLES + chunk * 0x20_0000, 512)).unwrap();
    }
    vms.teardown(memory, handle).unwrap();
    let total = memory.gone() as u64 - 128;
    let mut left = total;
    let mut calls = 0;
    while left != 0 {
        let before = left;
        left = vms.destroy(memory, handle).unwrap();
        assert!(before - left <= MAX_TAKE_BACK_PAGES, "{before} {left}");
        assert_eq!(memory.gone() as u64, left);
        calls += 1;
    }
    assert_eq!(calls, total.div_ceil(MAX_TAKE_BACK_PAGES));
}

/// Four CPUs: two make and end VMs, one runs vCPUs, one tears down and destroys whatever there is.
#[test]
#[cfg_attr(miri, ignore = "too many rounds to mean something")]
fn races() {
    let world = World::new();
    let newest = [const { AtomicUsize::new(0) }; 2];
    let done = AtomicBool::new(false);
    let running = AtomicUsize::new(0);
    let attributes = VmAttributes { vcpus: 1, ..PKVM };
    let (pages, vcpu_pages, _) = sizes(attributes);
    let defined = [Status::Success, Status::Busy, Status::WrongState, Status::BadHandle, Status::Absent];
    thread::scope(|scope| {
        let (world, newest, done, running) = (&world, &newest, &done, &running);
        let makers: Vec<_> = (0..2_u64)
            .map(|maker| {
                scope.spawn(move || {
                    let (metadata, base) = (METADATA + maker * 0x10_0000, VCPUS + maker * 0x10_0000);
                    let run_page = page(RUN_PAGES + maker * PAGE_SIZE);
                    let payload = PAYLOAD + maker * 0x10_0000;
                    for _ in 0..100 {
                        let handle = loop {
                            match world.vms.create(&world.memory, attributes, range(metadata, pages)) {
                                Ok(handle) => break handle,
                                Err(refusal) => assert_eq!(refusal.status, Status::Busy),
                            }
                        };
                        newest[maker as usize].store(handle.raw() as usize, SeqCst);
                        let vcpu = VcpuPages { metadata: range(base, vcpu_pages), area: AREA, run_page };
                        let steps: [&dyn Fn() -> Status; 4] = [
                            &|| status(world.vms.create_vcpu(&world.memory, handle, 0, &vcpu, |_, _, _| 0)),
                            &|| status(world.vms.map(&world.memory, handle, GUEST, range(payload, 4))),
                            &|| status(world.vms.seal(&world.memory, handle, &start(GUEST, GUEST))),
                            &|| status(world.vms.claim(&world.memory, handle, frames(1))),
                        ];
                        for step in steps {
                            let outcome = step();
                            assert!(defined.contains(&outcome) || outcome == Status::NotOffered, "{outcome:?}");
                        }
                        loop {
                            status(world.vms.teardown(&world.memory, handle));
                            status(world.vms.reclaim(&world.memory, handle, frames(4)));
                            match world.vms.destroy(&world.memory, handle) {
                                Ok(0) => break,
                                Err(refusal) if refusal.status == Status::BadHandle => break,
                                other => assert!(defined.contains(&status(other))),
                            }
                        }
                        for page in [metadata, base, payload, run_page.raw()] {
                            assert_eq!(world.memory.owner_of(page), Owner::Host);
                        }
                    }
                })
            })
            .collect();
        for racer in 0..2 {
            scope.spawn(move || {
                while !done.load(SeqCst) {
                    for handle in newest {
                        let handle = Handle::from_raw(handle.load(SeqCst) as u64);
                        let outcome = if racer == 0 {
                            status(world.vms.run(handle, 0, |vm, vcpu| {
                                assert_eq!(vm.handle(), handle);
                                vcpu.state += 1;
                                running.fetch_add(1, SeqCst);
                                Ok(())
                            }))
                        } else {
                            status(world.vms.teardown(&world.memory, handle));
                            status(world.vms.reclaim(&world.memory, handle, frames(4)));
                            status(world.vms.destroy(&world.memory, handle))
                        };
                        assert!(defined.contains(&outcome), "{outcome:?}");
                    }
                }
            });
        }
        for maker in makers {
            maker.join().unwrap();
        }
        done.store(true, SeqCst);
    });
    assert_eq!(world.memory.gone(), 0);
}

#[test]
fn the_interrupt_controller_is_where_no_page_is() {
    const GIC: u64 = 0x800_0000;
    const REDISTRIBUTORS: u64 = 0x80a_0000;
    for (page, free) in [
        (GIC - PAGE_SIZE, true),
        (GIC, false),
        (GIC + 0xf000, false),
        (GIC + 0x1_0000, true),
        (REDISTRIBUTORS, false),
        // Two frames for each of four vCPUs.
        (REDISTRIBUTORS + 0x7_f000, false),
        (REDISTRIBUTORS + 0x8_0000, true),
    ] {
        let world = World::new();
        let World { memory, vms } = &world;
        let handle = world.create(PKVM);
        assert_eq!(world.add_vcpu(handle, 0), Status::Success);
        let map = || vms.map(memory, handle, page, range(PAYLOAD, 1));
        map().unwrap();
        let taken = Err(Refusal { status: Status::Exists, detail: page });
        assert_eq!(vms.seal(memory, handle, &start(GUEST, GUEST)), if free { Ok(()) } else { taken });

        let world = World::new();
        let World { memory, vms } = &world;
        let handle = world.create(PKVM);
        assert_eq!(world.add_vcpu(handle, 0), Status::Success);
        vms.seal(memory, handle, &start(GUEST, GUEST)).unwrap();
        let mapped = vms.map(memory, handle, page, range(PAYLOAD, 1));
        assert_eq!(mapped, if free { Ok(()) } else { taken });
    }
    let world = World::new();
    let handle = world.create(PKVM);
    assert_eq!(world.add_vcpu(handle, 0), Status::Success);
    for (distributor, redistributors) in [(GIC + 0x1000, REDISTRIBUTORS), (GIC, GIC), (GIC, GIC - 0x1_0000)] {
        let start = Start { distributor, redistributors, ..start(GUEST, GUEST) };
        assert_eq!(status(world.vms.seal(&world.memory, handle, &start)), Status::Invalid);
    }
    let beyond = Start { distributor: 1 << 40, ..start(GUEST, GUEST) };
    assert_eq!(status(world.vms.seal(&world.memory, handle, &beyond)), Status::Overflow);
}
