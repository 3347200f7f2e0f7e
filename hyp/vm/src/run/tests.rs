use std::{array, mem::offset_of, rc::Rc};

use proptest::prelude::*;
use ravelin_abi::{ExitReason, RUN_FLAG_EXECUTE, RUN_FLAG_WRITE, RUN_NO_DEADLINE, RunExit, VmAttributes, VmKind};
use ravelin_memory::{Ipa, IpaRange};
use ravelin_ownership::GuestPage;
use ravelin_vgic::{ListRegisters, RedistributorFrame, ich};

use super::{
    fake_cpu::{Call, Entered, FakeCpu},
    *,
};
use crate::{
    Start, Syndrome, VcpuPages,
    fake::{Fake, FakeGuest, GuestState, Heap, Owner},
};

#[cfg(loom)]
mod models;
mod registers;
mod ring;

/// Bytes of the registers of a call to the host.
const CALL_SIZE: usize = 8 * RUN_CALL_REGISTERS;

const METADATA: u64 = 0x4000_0000;
const VCPUS: u64 = 0x4100_0000;
const RUN_PAGES: u64 = 0x4200_0000;
const PAYLOAD: u64 = 0x5000_0000;

/// Where the guest's pages are, the next frame that has none, and a device.
const GUEST: u64 = 0x1000_0000;
const PAGES: u64 = 4;
const ABSENT: u64 = GUEST + PAGES * PAGE_SIZE;
const DEVICE: u64 = 0x900_0000;
const DISTRIBUTOR: u64 = 0x800_0000;
const REDISTRIBUTORS: u64 = 0x80a_0000;
const DEVICE_TREE: u64 = GUEST + 0x1000;

/// In realms.
const SHARED_BIT: u64 = 1 << 39;

/// How many vCPUs exist, of [`CONFIGURED`].
const EXISTING: u64 = 3;
const CONFIGURED: u64 = 4;

const MEM_SHARE: u64 = 0xc600_0003;
const MEM_UNSHARE: u64 = 0xc600_0004;
const MEM_RELINQUISH: u64 = 0xc600_0009;
const KVM_FEATURES: u64 = 0x8600_0000;
const RSI_VERSION: u64 = 0xc400_0190;
const REALM_CONFIG: u64 = 0xc400_0196;
const IPA_STATE_SET: u64 = 0xc400_0197;
const HOST_CALL: u64 = 0xc400_0199;
const PSCI_VERSION: u64 = 0x8400_0000;
const CPU_SUSPEND: u64 = 0xc400_0001;
const CPU_OFF: u64 = 0x8400_0002;
const CPU_ON: u64 = 0xc400_0003;
const SYSTEM_OFF: u64 = 0x8400_0008;
const SYSTEM_RESET: u64 = 0x8400_0009;
const TRNG_VERSION: u64 = 0x8400_0050;
const TRNG_RND: u64 = 0xc400_0053;

const INVALID_PARAMETER: u64 = u64::MAX - 2;

/// PSTATE of EL1h with interrupts masked.
const EL1H: u64 = 0x3c5;

/// ICH_VMCR_EL2 with both groups enabled and no priority masked.
const VMCR_OPEN: u64 = 0xff00_0003;

/// What a vCPU's CPU interface holds when it enters.
fn prepare(gic: &mut Gic<'_, VcpuGics<Heap>>, vcpu: usize) -> Option<ListRegisters> {
    let mut entry = ListRegisters::default();
    gic.prepare_entry(vcpu, 4, &mut entry).map(|()| entry)
}

type TestVms = Vms<Heap, FakeGuest, VcpuState>;

struct World {
    memory: Fake,
    vms: Box<TestVms>,
    cpu: FakeCpu,
    handle: Handle,
}

impl World {
    fn new(kind: VmKind) -> Self {
        Self::on(FakeCpu::new(), kind)
    }

    /// Returns a world with a sealed VM.
    fn on(cpu: FakeCpu, kind: VmKind) -> Self {
        let world = Self::unsealed(cpu, kind);
        world.seal();
        world
    }

    fn unsealed(cpu: FakeCpu, kind: VmKind) -> Self {
        let (memory, vms, area) = (Fake::default(), Box::new(TestVms::new(Heap)), cpu.area_pages());
        let attributes = VmAttributes { kind, ipa_bits: 40, vcpus: CONFIGURED };
        let (pages, vcpu_pages, _) = TestVms::sizes::<Fake>(attributes, area);
        let handle = vms.create(&memory, attributes, PhysRange::new(METADATA, pages).unwrap()).unwrap();
        for index in 0..EXISTING {
            let metadata = PhysRange::new(VCPUS + index * 0x10_0000, vcpu_pages).unwrap();
            let pages = VcpuPages { metadata, area, run_page: PhysAddr::new(run_page(index)).unwrap() };
            let state = |attributes: VmAttributes, index, area| VcpuState::new(&cpu, index, attributes.ipa_bits, area);
            vms.create_vcpu(&memory, handle, index, &pages, state).unwrap();
            assert!(matches!(cpu.calls()[..], [Call::ClearVectors(cleared)] if metadata.covers(&cleared)));
        }
        vms.map(&memory, handle, GUEST, PhysRange::new(PAYLOAD, PAGES).unwrap()).unwrap();
        Self { memory, vms, cpu, handle }
    }

    fn seal(&self) {
        let start =
            Start { entry: GUEST, device_tree: DEVICE_TREE, distributor: DISTRIBUTOR, redistributors: REDISTRIBUTORS };
        self.vms.seal(&self.memory, self.handle, &start).unwrap();
    }

    /// Runs a vCPU. Demands that of the run page only what belongs to the exit has changed, and that the CPU and the interrupt
    /// controller are as they were.
    fn run(&self, index: u64) -> Result<RunExit, Status> {
        let before = self.cpu.page(run_page(index));
        let ran = self.vms.run_vcpu(&self.memory, &self.cpu, self.handle, index);
        self.cpu.assert_is_the_hosts();
        let after = self.cpu.page(run_page(index));
        let same = |from: usize, to: usize| assert_eq!(before[from..to], after[from..to]);
        let exit = ran.map(|()| RunExit::from_bytes(after[..RunExit::SIZE].try_into().unwrap()));
        let called = exit.is_ok_and(|exit| exit.reason == ExitReason::HostCall.code());
        if exit.is_err() {
            same(RunPage::EXIT, RunExit::SIZE);
        }
        same(RunExit::SIZE, RunPage::CALL);
        if !called {
            same(RunPage::CALL, RunPage::CALL + CALL_SIZE);
        }
        let told = exit.map_or(0, |exit| exit.conversions as usize);
        same(RunPage::CALL + CALL_SIZE, RunPage::CONVERSIONS);
        same(RunPage::CONVERSIONS + 8 * told, 4096);
        if usize::try_from(index).is_ok_and(|index| index < EXISTING as usize) {
            self.gic(|gic| {
                // Unless it has been left with nothing to take back.
                if let Some(entry) = prepare(gic, index as usize) {
                    let _ = gic.after_exit(index as usize, &entry);
                }
            });
        }
        exit.map_err(|refusal| {
            assert_eq!(refusal.detail, 0);
            refusal.status
        })
    }

    /// Runs vCPU 0 until the host gets an interrupt. Returns the registers with which the guest was entered last.
    fn goes_on(&self) -> Context {
        self.cpu.entered();
        assert_eq!(self.run(0), Ok(exit(ExitReason::Interrupted)));
        self.last().context
    }

    /// Returns what the guest was entered with last.
    fn last(&self) -> Entered {
        *self.cpu.entered().last().expect("it has been entered")
    }

    /// Has the guest do this, run on vCPU 0.
    fn does(&self, step: impl FnOnce(&mut Context) -> Left + 'static) -> RunExit {
        self.then(step);
        self.run(0).unwrap()
    }

    fn then(&self, step: impl FnOnce(&mut Context) -> Left + 'static) {
        self.cpu.then(|_, guest| step(guest.context));
    }

    fn answer(&self, answer: u64, value: u64) {
        let entry = RunEntry { answer, value, ..RunEntry::default() };
        self.cpu.set_page(run_page(0) + RunPage::ENTRY as u64, &entry.to_bytes());
    }

    /// Answers, and returns the registers with which the guest was entered last.
    fn after(&self, answer: Answer, value: u64) -> Context {
        self.answer(answer.code(), value);
        self.goes_on()
    }

    fn state(&self, index: u64) -> (Context, Open) {
        self.vms.run(self.handle, index, |_, vcpu| Ok((vcpu.state.context, vcpu.state.open))).unwrap()
    }

    fn guest<R>(&self, f: impl FnOnce(&FakeGuest) -> R) -> R {
        self.vms.run(self.handle, 0, |vm, _| Ok(f(vm.guest().memory()))).unwrap()
    }

    fn gic<R>(&self, f: impl FnOnce(&mut Gic<'_, VcpuGics<Heap>>) -> R) -> R {
        self.vms.run(self.handle, 0, |vm, _| Ok(vm.with_gic(f))).unwrap()
    }

    fn share(&self, page: u64) {
        self.guest(|guest| self.memory.share(guest, single(page))).unwrap();
    }

    fn claim(&self, page: u64) {
        self.vms.claim(&self.memory, self.handle, single(page)).unwrap();
    }

    fn look(&self, page: u64) -> GuestPage {
        self.guest(|guest| self.memory.look(guest, single(page)).0)
    }

    /// Puts a page where there is none.
    fn provide(&self) {
        let page = PhysRange::new(PAYLOAD + PAGES * PAGE_SIZE, 1).unwrap();
        self.vms.map(&self.memory, self.handle, ABSENT, page).unwrap();
    }

    /// Lets private interrupts through to a vCPU: all of the way there but its CPU interface.
    fn enable(&self, vcpu: usize, intids: &[u32]) {
        let bits = intids.iter().fold(0, |bits, intid| bits | 1 << intid);
        let private = Frame::Redistributor { vcpu, frame: RedistributorFrame::Private };
        self.gic(|gic| {
            for (frame, offset, value) in [(Frame::Distributor, 0, 3), (private, 0x100, bits)] {
                let done = gic.mmio(vcpu, frame, offset, Access::Write { size: 4, value });
                assert!(matches!(done, Ok(ravelin_vgic::Outcome::Done { .. })));
            }
        });
    }

    /// Has vCPU 0 open its CPU interface.
    fn open_interface(&self) {
        self.cpu.then(|cpu, guest| {
            guest.gic.vmcr = VMCR_OPEN;
            cpu.state().host_waits = true;
            Left::Interrupt
        });
        self.goes_on();
    }

    /// Turns on a vCPU.
    fn turn_on(&self, index: u64) {
        let told = self.does(move |guest| call(guest, Conduit::Hvc, [CPU_ON, index, GUEST, 0]));
        assert_eq!(told, RunExit { vcpu: index, ..exit(ExitReason::CpuOn) });
    }
}

fn run_page(index: u64) -> u64 {
    RUN_PAGES + index * PAGE_SIZE
}

fn single(page: u64) -> IpaRange {
    IpaRange::new(page, 1).unwrap()
}

fn exit(reason: ExitReason) -> RunExit {
    RunExit { reason: reason.code(), ..RunExit::default() }
}

fn syndrome(esr: u64) -> Left {
    Left::Synchronous(Syndrome { esr, far: 0, hpfar: 0 })
}

fn wfi() -> Left {
    syndrome(0x01 << 26 | 1 << 25)
}

fn wfe() -> Left {
    syndrome(0x01 << 26 | 1 << 25 | 1)
}

/// A load or store of 1 << `log2` bytes.
fn access(address: u64, write: bool, log2: u64, register: u64) -> Left {
    let described = 1 << 24 | log2 << 22 | register << 16 | u64::from(log2 == 3) << 15;
    fault(0x24 << 26 | described | u64::from(write) << 6, address)
}

fn load(address: u64, register: u64) -> Left {
    access(address, false, 2, register)
}

fn fetch(address: u64) -> Left {
    fault(0x20 << 26, address)
}

/// A translation fault of stage 2, level 3.
fn fault(esr: u64, address: u64) -> Left {
    let far = 0xffff_8000_0000_0000 | address & 0xfff;
    Left::Synchronous(Syndrome { esr: esr | 1 << 25 | 0x07, far, hpfar: address >> 12 << 4 })
}

/// MSR or MRS.
fn sysreg([op0, op1, crn, crm, op2]: [u64; 5], register: u64, write: bool) -> Left {
    let encoding = op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | register << 5 | crm << 1;
    syndrome(0x18 << 26 | 1 << 25 | encoding | u64::from(!write))
}

const CNTP_CTL: [u64; 5] = [3, 3, 14, 2, 1];
const SGI1R: [u64; 5] = [3, 0, 12, 11, 5];

/// HVC or SMC, with the program counter where the CPU leaves it.
fn call<const N: usize>(guest: &mut Context, conduit: Conduit, registers: [u64; N]) -> Left {
    guest.x[..N].copy_from_slice(&registers);
    call_with(guest, conduit, 0)
}

fn call_with(guest: &mut Context, conduit: Conduit, immediate: u64) -> Left {
    match conduit {
        Conduit::Hvc => {
            guest.pc += 4;
            syndrome(0x16 << 26 | 1 << 25 | immediate)
        }
        Conduit::Smc => syndrome(0x17 << 26 | 1 << 25 | immediate),
    }
}

/// What a guest does, and how that ends.
type Act = fn(&mut Context) -> Left;

/// An exit, in a VM of this kind.
struct Case {
    name: &'static str,
    kind: VmKind,
    prepare: fn(&World),
    step: Act,
    told: RunExit,
    /// What the host may answer; `None` if it does not matter.
    answers: Option<&'static [Answer]>,
}

fn nothing(_: &World) {}

fn claimed(world: &World) {
    world.share(GUEST + 0x1000);
    world.claim(GUEST + 0x1000);
}

fn tables(world: &World) {
    world.memory.lock().tables_needed = 2;
}

/// Puts what HOST_CALL points to at the start of the guest's memory: the immediate 0x1234, and registers.
fn message(world: &World) {
    let mut bytes = vec![0; 256];
    bytes[..2].copy_from_slice(&[0x34, 0x12]);
    for (register, chunk) in (0_u64..).zip(bytes[8..].chunks_exact_mut(8)) {
        chunk.copy_from_slice(&(0x0101_0000 + register).to_le_bytes());
    }
    world.guest(|guest| world.memory.write_guest(guest, Ipa::new(GUEST).unwrap(), &bytes)).unwrap();
}

/// Exits that wait for an answer.
fn open_cases() -> Vec<Case> {
    use Answer::{Abort, Complete, Refuse, Retry};
    use ExitReason::{HostCall, Mmio, NeedsTables, PageFault, Unshare};
    let range = |reason, address| RunExit { address, pages: 1, ..exit(reason) };
    vec![
        Case {
            name: "load",
            kind: VmKind::Pkvm,
            prepare: nothing,
            step: |_| access(DEVICE + 0x104, false, 2, 5),
            told: RunExit { address: DEVICE + 0x104, size: 4, ..exit(Mmio) },
            answers: Some(&[Retry, Complete, Abort]),
        },
        Case {
            name: "store",
            kind: VmKind::Ordinary,
            prepare: nothing,
            step: |guest| {
                guest.x[6] = 0x1122_3344_5566_7788;
                access(DEVICE + 2, true, 1, 6)
            },
            told: RunExit { address: DEVICE + 2, size: 2, flags: RUN_FLAG_WRITE, value: 0x7788, ..exit(Mmio) },
            answers: Some(&[Retry, Complete, Abort]),
        },
        Case {
            name: "store of a realm",
            kind: VmKind::Realm,
            prepare: nothing,
            step: |guest| {
                guest.x[30] = 0x1122_3344_5566_7788;
                access(DEVICE | SHARED_BIT, true, 3, 30)
            },
            told: RunExit {
                address: DEVICE | SHARED_BIT,
                size: 8,
                flags: RUN_FLAG_WRITE,
                value: 0x1122_3344_5566_7788,
                ..exit(Mmio)
            },
            answers: Some(&[Retry, Complete, Abort]),
        },
        Case {
            name: "fetch",
            kind: VmKind::Pkvm,
            prepare: nothing,
            step: |_| fetch(ABSENT + 0x234),
            told: RunExit { address: ABSENT, ..exit(PageFault) },
            answers: Some(&[Retry, Abort]),
        },
        Case {
            name: "fetch of an ordinary guest",
            kind: VmKind::Ordinary,
            prepare: nothing,
            step: |_| fetch(ABSENT + 0x234),
            told: RunExit { address: ABSENT, flags: RUN_FLAG_EXECUTE, ..exit(PageFault) },
            answers: Some(&[Retry, Abort]),
        },
        Case {
            name: "store to memory of a realm",
            kind: VmKind::Realm,
            prepare: nothing,
            step: |_| access(ABSENT + 0x230, true, 3, 7),
            told: RunExit { address: ABSENT, ..exit(PageFault) },
            answers: Some(&[Retry, Abort]),
        },
        Case {
            name: "MEM_SHARE without a page",
            kind: VmKind::Pkvm,
            prepare: nothing,
            step: |guest| call(guest, Conduit::Hvc, [MEM_SHARE, ABSENT, 0, 0]),
            told: RunExit { address: ABSENT, ..exit(PageFault) },
            answers: Some(&[Retry, Abort]),
        },
        Case {
            name: "MEM_SHARE without tables",
            kind: VmKind::Pkvm,
            prepare: tables,
            step: |guest| call(guest, Conduit::Hvc, [MEM_SHARE, GUEST, 0, 0]),
            told: RunExit { pages: 2, ..exit(NeedsTables) },
            answers: Some(&[Retry]),
        },
        Case {
            name: "MEM_UNSHARE",
            kind: VmKind::Pkvm,
            prepare: claimed,
            step: |guest| call(guest, Conduit::Hvc, [MEM_UNSHARE, GUEST + 0x1000, 0, 0]),
            told: range(Unshare, GUEST + 0x1000),
            answers: Some(&[Retry, Refuse]),
        },
        Case {
            name: "IPA_STATE_SET without a page",
            kind: VmKind::Realm,
            prepare: nothing,
            step: |guest| call(guest, Conduit::Smc, [IPA_STATE_SET, ABSENT, ABSENT + 0x1000, 0, 0]),
            told: RunExit { address: ABSENT, ..exit(PageFault) },
            answers: Some(&[Retry, Abort]),
        },
        Case {
            name: "IPA_STATE_SET without tables",
            kind: VmKind::Realm,
            prepare: tables,
            step: |guest| call(guest, Conduit::Smc, [IPA_STATE_SET, GUEST, GUEST + 0x1000, 0, 0]),
            told: RunExit { pages: 2, ..exit(NeedsTables) },
            answers: Some(&[Retry]),
        },
        Case {
            name: "IPA_STATE_SET",
            kind: VmKind::Realm,
            prepare: claimed,
            step: |guest| call(guest, Conduit::Smc, [IPA_STATE_SET, GUEST + 0x1000, GUEST + 0x2000, 1, 0]),
            told: range(Unshare, GUEST + 0x1000),
            answers: Some(&[Retry, Refuse]),
        },
        Case {
            name: "HOST_CALL",
            kind: VmKind::Realm,
            prepare: message,
            step: |guest| call(guest, Conduit::Smc, [HOST_CALL, GUEST]),
            told: RunExit { value: 0x1234, ..exit(HostCall) },
            answers: Some(&[Retry, Complete]),
        },
    ]
}

/// Exits after which the guest goes on, whatever the host says.
fn closed_cases() -> Vec<Case> {
    use ExitReason::{CpuOn, Interrupted, Relinquished, Shared, Wait, Yield};
    let case = |name, step, told| Case { name, kind: VmKind::Pkvm, prepare: nothing, step, told, answers: None };
    let range = |reason, address| RunExit { address, pages: 1, ..exit(reason) };
    vec![
        case("WFI", |_| wfi(), RunExit { deadline: RUN_NO_DEADLINE, ..exit(Wait) }),
        case("WFE", |_| wfe(), exit(Yield)),
        case(
            "CPU_SUSPEND",
            |guest| call(guest, Conduit::Smc, [CPU_SUSPEND, 0, 0, 0]),
            RunExit { deadline: RUN_NO_DEADLINE, ..exit(Wait) },
        ),
        case("CPU_ON", |guest| call(guest, Conduit::Hvc, [CPU_ON, 1, GUEST, 0x77]), RunExit { vcpu: 1, ..exit(CpuOn) }),
        case("MEM_SHARE", |guest| call(guest, Conduit::Hvc, [MEM_SHARE, GUEST, 0, 0]), range(Shared, GUEST)),
        case(
            "MEM_RELINQUISH",
            |guest| call(guest, Conduit::Hvc, [MEM_RELINQUISH, GUEST, 1, 0]),
            range(Relinquished, GUEST),
        ),
        Case {
            kind: VmKind::Realm,
            ..case(
                "IPA_STATE_SET",
                |guest| call(guest, Conduit::Smc, [IPA_STATE_SET, GUEST, GUEST + 0x1000, 0, 0]),
                range(Shared, GUEST),
            )
        },
        // Exits of which the host hears nothing, until its interrupt comes.
        case("MSR", |_| sysreg(CNTP_CTL, 7, true), exit(Interrupted)),
        case("MRS", |_| sysreg(CNTP_CTL, 7, false), exit(Interrupted)),
        case("undefined", |_| syndrome(0), exit(Interrupted)),
        case("FP", |_| syndrome(0x07 << 26), exit(Interrupted)),
        case("SVE", |_| syndrome(0x19 << 26), exit(Interrupted)),
        case("interrupt controller", |_| load(DISTRIBUTOR + 8, 7), exit(Interrupted)),
        case("unsupported", |guest| call(guest, Conduit::Smc, [0x1234_5678]), exit(Interrupted)),
        case("undescribed", |_| fault(0x24 << 26, GUEST | 1 << 45), exit(Interrupted)),
    ]
}

/// Exits after which the vCPU does not go on.
fn last_cases() -> Vec<Case> {
    use ExitReason::{CpuOff, Failed, SystemOff, SystemReset};
    let case = |name, step, reason| Case {
        name,
        kind: VmKind::Pkvm,
        prepare: nothing,
        step,
        told: exit(reason),
        answers: None,
    };
    vec![
        case("CPU_OFF", |guest| call(guest, Conduit::Hvc, [CPU_OFF]), CpuOff),
        case("SYSTEM_OFF", |guest| call(guest, Conduit::Hvc, [SYSTEM_OFF]), SystemOff),
        case("SYSTEM_RESET", |guest| call(guest, Conduit::Smc, [SYSTEM_RESET]), SystemReset),
        case("SError", |_| Left::Error, Failed),
    ]
}

impl Case {
    /// Returns a world where it has just happened.
    fn happen(&self) -> World {
        let world = World::new(self.kind);
        (self.prepare)(&world);
        assert_eq!(world.does(self.step), self.told, "{}", self.name);
        world
    }
}

#[test]
fn the_first_entry_is_out_of_reset() {
    for kind in [VmKind::Ordinary, VmKind::Pkvm, VmKind::Realm] {
        let world = World::new(kind);
        assert_eq!(world.goes_on(), Context::reset(GUEST, DEVICE_TREE, 1 << 31));
        // Once only, and it goes on where it was.
        world.does(|guest| {
            (guest.pc, guest.x[3]) = (0x1234_5678, 9);
            wfe()
        });
        let Entered { context, tree, vectors, deadline, .. } = {
            world.goes_on();
            world.run(0).unwrap();
            world.last()
        };
        assert_eq!((context.pc, context.x[3]), (0x1234_567c, 9));
        assert_eq!(world.cpu.calls(), []);
        assert_eq!((vectors, deadline), (Vectors::None, None));
        world.guest(|guest| assert_eq!(tree, *world.memory.tree(guest)));
    }
}

#[test]
fn what_is_off_or_not_there_does_not_run() {
    let world = World::new(VmKind::Pkvm);
    for (index, status) in [
        (1, Status::WrongState),
        (2, Status::WrongState),
        (EXISTING, Status::Absent),
        (CONFIGURED, Status::Absent),
        (u64::MAX >> 13, Status::Absent),
    ] {
        assert_eq!(world.run(index), Err(status), "{index}");
    }
    assert!(world.cpu.entered().is_empty() && world.cpu.calls().is_empty());
}

#[test]
fn a_cpu_that_cannot_run_guests_changes_nothing() {
    let world = World::new(VmKind::Pkvm);
    for status in [Status::Busy, Status::NotSupported] {
        world.cpu.state().refuses = Some(status);
        assert_eq!(world.run(0), Err(status));
        assert_eq!(world.cpu.state().reads, []);
    }
    world.cpu.state().refuses = None;
    assert_eq!(world.goes_on().pc, GUEST, "it has not been started");
    // Nor is an answer taken.
    world.does(|_| load(DEVICE, 5));
    let before = world.state(0);
    world.answer(Answer::Complete.code(), 7);
    world.cpu.state().refuses = Some(Status::Busy);
    assert_eq!(world.run(0), Err(Status::Busy));
    assert_eq!(world.state(0), before);
    world.cpu.state().refuses = None;
    assert_eq!(world.goes_on().x[5], 7);
}

#[test]
fn a_wrong_answer_changes_nothing() {
    for case in open_cases() {
        let answers = case.answers.unwrap();
        let world = case.happen();
        let before = world.state(0);
        assert_ne!(before.1, Open::Nothing);
        world.cpu.entered();
        for code in (0..8).chain([1 << 32, 1 << 63 | 1, u64::MAX]) {
            if Answer::from_code(code).is_some_and(|answer| answers.contains(&answer)) {
                continue;
            }
            world.answer(code, 0x5555);
            for _ in 0..2 {
                assert_eq!(world.run(0), Err(Status::Invalid), "{} {code}", case.name);
                assert_eq!(world.state(0), before);
            }
        }
        assert!(world.cpu.entered().is_empty());
        for &answer in answers {
            let world = case.happen();
            world.after(answer, 0x5555);
            assert_eq!(world.state(0).1, Open::Nothing, "{} {answer:?}", case.name);
        }
    }
}

#[test]
fn what_needs_no_answer_takes_any() {
    for case in closed_cases() {
        for code in (0..5).chain([u64::MAX]) {
            let world = case.happen();
            let before = world.state(0);
            assert_eq!(before.1, Open::Nothing);
            world.answer(code, 0x5555);
            assert_eq!(world.goes_on(), before.0, "{} {code}", case.name);
            // Whether the host wants to be told of shares is no answer.
            let flags = run_page(0) + (RunPage::ENTRY + offset_of!(RunEntry, flags)) as u64;
            assert!(world.cpu.state().reads.iter().all(|&read| read == (flags, 8)), "{}", case.name);
        }
    }
}

#[test]
fn what_has_ended_never_runs_again() {
    for case in last_cases() {
        let world = case.happen();
        world.cpu.entered();
        for code in (0..5).chain([u64::MAX]) {
            world.answer(code, 0);
            let before = world.state(0);
            assert_eq!(world.run(0), Err(Status::WrongState), "{} {code}", case.name);
            assert_eq!(world.state(0), before);
        }
        assert!(world.cpu.entered().is_empty());
    }
}

#[test]
fn an_ended_vcpu_cannot_be_turned_on() {
    let world = World::new(VmKind::Pkvm);
    world.turn_on(1);
    world.then(|_| Left::Error);
    assert_eq!(world.run(1), Ok(exit(ExitReason::Failed)));
    world.then(|guest| call(guest, Conduit::Hvc, [CPU_ON, 1, GUEST, 0]));
    let already_on = u64::MAX - 3;
    assert_eq!(world.goes_on().x[0], already_on);
    assert_eq!(world.run(1), Err(Status::WrongState));
}

#[test]
fn the_guest_ends_the_vm_for_all_vcpus() {
    for (function, reason) in [(SYSTEM_OFF, ExitReason::SystemOff), (SYSTEM_RESET, ExitReason::SystemReset)] {
        let world = World::new(VmKind::Pkvm);
        world.turn_on(1);
        assert_eq!(world.run(1), Ok(exit(ExitReason::Interrupted)));
        world.cpu.entered();
        world.then(move |guest| call(guest, Conduit::Hvc, [function]));
        // The one that is on is to be woken, the one that is off is not.
        assert_eq!(world.run(1), Ok(RunExit { wake_low: 1, ..exit(reason) }));
        assert_eq!(world.cpu.entered().len(), 1);
        for index in [0, 2] {
            assert_eq!(world.run(index), Ok(exit(reason)), "vCPU {index}");
        }
        for index in 0..EXISTING {
            assert_eq!(world.run(index), Err(Status::WrongState), "vCPU {index}");
        }
        assert!(world.cpu.entered().is_empty(), "no guest's code runs any more");
    }
}

#[test]
fn a_vcpu_that_runs_finds_out_with_its_next_exit() {
    let acts: [Act; 4] = [
        |guest| call(guest, Conduit::Hvc, [MEM_SHARE, GUEST, 1, 0]),
        |guest| call(guest, Conduit::Hvc, [PSCI_VERSION]),
        |guest| call(guest, Conduit::Hvc, [SYSTEM_OFF]),
        |_| sysreg([3, 0, 0, 4, 0], 3, false),
    ];
    for act in acts {
        let world = Rc::new(World::new(VmKind::Pkvm));
        let other = Rc::clone(&world);
        world.then(move |guest| {
            other.vms.run(other.handle, 1, |vm, _| Ok(vm.end_as(VmEnd::Reset))).unwrap();
            act(guest)
        });
        let told = world.run(0).unwrap();
        // What happened just before may be told first.
        if told.reason == ExitReason::Shared.code() {
            assert_eq!(world.run(0), Ok(exit(ExitReason::SystemReset)));
        } else {
            assert_eq!(told, exit(ExitReason::SystemReset), "the first end counts");
        }
        assert_eq!((world.cpu.entered().len(), world.run(0)), (1, Err(Status::WrongState)));
    }
}

#[test]
fn where_the_guest_goes_on() {
    const PC: u64 = 0xffff_0000_0000_1000;
    const VBAR: u64 = 0xffff_0000_0002_0800;
    let next = |kind, step: Act| {
        let world = World::new(kind);
        world.then(move |guest| {
            (guest.pc, guest.vbar_el1, guest.pstate) = (PC, VBAR, EL1H | 1 << 21 | 1 << 10);
            step(guest)
        });
        world.run(0).unwrap();
        let context = world.state(0).0;
        (context.pc.wrapping_sub(PC), context.pstate)
    };
    const BEHIND: (u64, u64) = (4, EL1H);
    const AT: (u64, u64) = (0, EL1H | 1 << 21 | 1 << 10);
    const HANDLER: (u64, u64) = (VBAR + 0x200 - PC, EL1H);
    let rows: [(&str, Act, (u64, u64)); 15] = [
        ("WFI", |_| wfi(), BEHIND),
        ("WFE", |_| wfe(), BEHIND),
        ("MRS", |_| sysreg(CNTP_CTL, 0, false), BEHIND),
        ("SGI", |_| sysreg(SGI1R, 31, true), BEHIND),
        ("MSR of what is not there", |_| sysreg([3, 3, 9, 12, 0], 0, true), HANDLER),
        ("undefined", |_| syndrome(0), HANDLER),
        ("FP", |_| syndrome(0x07 << 26), AT),
        ("SVE", |_| syndrome(0x19 << 26), AT),
        ("device", |_| load(DEVICE, 0), AT),
        ("page", |_| fetch(ABSENT), AT),
        ("a page that is there by now", |_| load(GUEST, 0), AT),
        ("nothing", |_| load(1 << 45, 0), HANDLER),
        ("interrupt controller", |_| load(DISTRIBUTOR, 0), BEHIND),
        ("no register of it", |_| fetch(DISTRIBUTOR), HANDLER),
        ("interrupt", |_| Left::Interrupt, AT),
    ];
    for (name, step, expected) in rows {
        assert_eq!(next(VmKind::Pkvm, step), expected, "{name}");
    }
    let calls: [Act; 8] = [
        |guest| call(guest, Conduit::Hvc, [PSCI_VERSION]),
        |guest| call(guest, Conduit::Smc, [PSCI_VERSION]),
        |guest| call(guest, Conduit::Hvc, [0xdead]),
        |guest| call(guest, Conduit::Smc, [0xdead]),
        |guest| call_with(guest, Conduit::Hvc, 1),
        |guest| call_with(guest, Conduit::Smc, 1),
        |guest| call(guest, Conduit::Hvc, [CPU_SUSPEND, 0, 0, 0]),
        |guest| call(guest, Conduit::Smc, [CPU_SUSPEND, 0, 0, 0]),
    ];
    for step in calls {
        assert_eq!(next(VmKind::Pkvm, step), BEHIND);
    }
    assert_eq!(next(VmKind::Pkvm, |guest| call(guest, Conduit::Hvc, [MEM_SHARE, GUEST, 0, 0])), BEHIND);
    assert_eq!(next(VmKind::Pkvm, |guest| call(guest, Conduit::Hvc, [MEM_SHARE, ABSENT, 0, 0])), AT);
}

#[test]
fn a_device_answers() {
    let world = World::new(VmKind::Pkvm);
    world.does(|guest| {
        guest.x[5] = u64::MAX;
        load(DEVICE, 5)
    });
    let before = world.state(0).0;
    let mut expected = before;
    (expected.x[5], expected.pc) = (0xdddd_cccc, before.pc + 4);
    assert_eq!(world.after(Answer::Complete, 0xffff_eeee_dddd_cccc), expected);

    // A store changes nothing, whatever the host says that it has loaded.
    world.does(|_| access(DEVICE, true, 3, 5));
    expected.pc += 4;
    assert_eq!(world.after(Answer::Complete, 0x1111), expected);

    world.does(|_| load(DEVICE, 5));
    assert_eq!(world.after(Answer::Retry, 0x1111), expected, "again");

    world.does(|_| load(DEVICE + 0x10, 5));
    let aborted = world.after(Answer::Abort, 0x1111);
    assert_eq!((aborted.elr_el1, aborted.pc), (expected.pc, expected.vbar_el1 + 0x200));
    assert_eq!((aborted.esr_el1 >> 26, aborted.esr_el1 & 0x3f), (0x25, 0x10), "external abort");
    assert_eq!(aborted.far_el1, 0xffff_8000_0000_0010);
    assert_eq!(aborted.x, expected.x);
}

#[test]
fn a_page_comes_or_does_not() {
    let world = World::new(VmKind::Pkvm);
    world.does(|_| fetch(ABSENT));
    let before = world.state(0).0;
    world.provide();
    assert_eq!(world.after(Answer::Retry, 0), before);
    world.does(|_| fetch(ABSENT + 0x1000));
    let aborted = world.after(Answer::Abort, 0);
    assert_eq!((aborted.elr_el1, aborted.esr_el1 >> 26, aborted.esr_el1 & 0x3f), (before.pc, 0x21, 0x10));
}

#[test]
fn a_poisoned_page_is_an_abort_at_once() {
    let world = World::new(VmKind::Pkvm);
    world.vms.force_reclaim(&world.memory, PhysRange::new(PAYLOAD, 1).unwrap()).unwrap();
    world.then(|_| load(GUEST + 8, 5));
    let aborted = world.goes_on();
    assert_eq!((aborted.esr_el1 >> 26, aborted.esr_el1 & 0x3f), (0x25, 0x10));
    assert_eq!(aborted.far_el1, 0xffff_8000_0000_0008);
}

#[test]
fn a_call_is_made_again_when_what_it_lacked_is_there() {
    // A page.
    let world = World::new(VmKind::Pkvm);
    let share = |guest: &mut Context| call(guest, Conduit::Hvc, [MEM_SHARE, ABSENT, 0, 0]);
    assert_eq!(world.does(share), RunExit { address: ABSENT, ..exit(ExitReason::PageFault) });
    assert_eq!(world.state(0).0.x[..4], [MEM_SHARE, ABSENT, 0, 0]);
    let at = world.state(0).0.pc;
    world.provide();
    world.answer(Answer::Retry.code(), 0);
    assert_eq!(world.does(share), RunExit { address: ABSENT, pages: 1, ..exit(ExitReason::Shared) });
    assert_eq!(world.look(ABSENT), GuestPage::Offered);
    let context = world.goes_on();
    assert_eq!((context.x[..4].to_vec(), context.pc), (vec![0; 4], at + 4));

    // Tables.
    world.memory.lock().tables_needed = 2;
    let share = |guest: &mut Context| call(guest, Conduit::Hvc, [MEM_SHARE, GUEST, 2, 0]);
    assert_eq!(world.does(share), RunExit { pages: 2, ..exit(ExitReason::NeedsTables) });
    assert_eq!(world.look(GUEST), GuestPage::Private);
    world.vms.donate_tables(&world.memory, world.handle, PhysRange::new(0x4300_0000, 2).unwrap()).unwrap();
    assert_eq!(world.does(share), RunExit { address: GUEST, pages: 2, ..exit(ExitReason::Shared) });
    assert_eq!(world.goes_on().x[..2], [0, 2]);

    // A release. Retrying without one is the same exit again.
    world.claim(GUEST);
    let unshare = |guest: &mut Context| call(guest, Conduit::Hvc, [MEM_UNSHARE, GUEST, 0, 0]);
    for _ in 0..2 {
        assert_eq!(world.does(unshare), RunExit { address: GUEST, pages: 1, ..exit(ExitReason::Unshare) });
        assert_eq!(world.look(GUEST), GuestPage::Claimed);
    }
    world.vms.release(&world.memory, world.handle, single(GUEST)).unwrap();
    world.then(unshare);
    assert_eq!(world.goes_on().x[..2], [0, 0]);
    assert_eq!(world.look(GUEST), GuestPage::Private);
}

#[test]
fn a_refused_call_fails_and_changes_nothing() {
    for case in open_cases() {
        let answers = case.answers.unwrap();
        let Some(&answer) = answers.iter().find(|&answer| matches!(answer, Answer::Refuse | Answer::Abort)) else {
            continue;
        };
        let world = case.happen();
        let (before, Open::Call(conduit, _)) = world.state(0) else { continue };
        let shared = world.look(GUEST + 0x1000);
        let mut expected = before;
        expected.pc += 4;
        match conduit {
            Conduit::Hvc => expected.set_results([INVALID_PARAMETER, 0, 0, 0]),
            Conduit::Smc => expected.set_results([0, before.x[1], 1]),
        }
        assert_eq!(world.after(answer, 0), expected, "{}", case.name);
        assert_eq!((world.look(GUEST + 0x1000), world.look(ABSENT)), (shared, GuestPage::Absent));
    }
}

#[test]
fn what_a_host_does_not_provide_is_no_success() {
    for function in [REALM_CONFIG, HOST_CALL] {
        let world = World::new(VmKind::Realm);
        let told = world.does(move |guest| call(guest, Conduit::Smc, [function, ABSENT, 7]));
        assert_eq!(told, RunExit { address: ABSENT, ..exit(ExitReason::PageFault) });
        let (before, _) = world.state(0);
        let mut expected = Context { pc: before.pc + 4, ..before };
        expected.x[0] = 1;
        assert_eq!(world.after(Answer::Abort, 0), expected);
    }
}

#[test]
fn the_host_is_called_and_answers() {
    let world = World::new(VmKind::Realm);
    message(&world);
    let step = |guest: &mut Context| call(guest, Conduit::Smc, [HOST_CALL, GUEST]);
    let told = RunExit { value: 0x1234, ..exit(ExitReason::HostCall) };
    assert_eq!(world.does(step), told);
    let sent: Vec<u8> = (0_u64..31).flat_map(|register| (0x0101_0000 + register).to_le_bytes()).collect();
    assert_eq!(world.cpu.page(run_page(0))[RunPage::CALL..][..CALL_SIZE], sent);
    // Again, as often as the host likes.
    assert_eq!(world.does(step), told);
    let before = world.state(0).0;

    let results: Vec<u8> = (0..CALL_SIZE).map(|at| at as u8).collect();
    world.cpu.set_page(run_page(0) + RunPage::RESULTS as u64, &results);
    let mut expected = before;
    (expected.x[0], expected.pc) = (0, before.pc + 4);
    assert_eq!(world.after(Answer::Complete, 0), expected);
    let mut received = vec![0; 256];
    world.guest(|guest| world.memory.read_guest(guest, Ipa::new(GUEST).unwrap(), &mut received)).unwrap();
    assert_eq!(received[..2], [0x34, 0x12], "the immediate stays");
    assert_eq!(received[8..], results);
}

#[test]
fn the_host_is_called_from_a_page_that_another_vcpu_gives_away() {
    let world = World::new(VmKind::Realm);
    message(&world);
    world.does(|guest| call(guest, Conduit::Smc, [HOST_CALL, GUEST]));
    world.share(GUEST);
    let context = world.after(Answer::Complete, 0);
    assert_eq!(context.x[0], 1, "results do not go where the host can read them");
}

#[test]
fn the_host_answers_when_the_page_is_gone() {
    let world = World::new(VmKind::Realm);
    message(&world);
    world.does(|guest| call(guest, Conduit::Smc, [HOST_CALL, GUEST]));
    let before = world.state(0).0;
    world.guest(|guest| world.memory.relinquish(guest, single(GUEST))).unwrap();
    world.answer(Answer::Complete.code(), 0);
    let told = world.run(0).unwrap();
    assert_eq!((told.reason, told.address), (ExitReason::PageFault.code(), GUEST));
    assert_eq!(world.state(0).0, before, "the call is not over");
}

#[test]
fn an_interrupt_is_deactivated_by_its_register() {
    const DIR: [u64; 5] = [3, 0, 12, 11, 1];
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[3]);
    let private = Frame::Redistributor { vcpu: 0, frame: RedistributorFrame::Private };
    // GICR_ISACTIVER0.
    let set = Access::Write { size: 4, value: 1 << 3 };
    assert!(world.gic(|gic| gic.mmio(0, private, 0x300, set)).is_ok());
    let active = || match world.gic(|gic| gic.mmio(0, private, 0x300, Access::Read { size: 4 })) {
        Ok(ravelin_vgic::Outcome::Done { value, .. }) => value,
        other => panic!("{other:?}"),
    };
    assert_eq!(active(), 1 << 3);
    world.cpu.then(|_, guest| {
        // ICC_CTLR_EL1.EOImode.
        guest.gic.vmcr = VMCR_OPEN | 1 << 9;
        guest.context.x[1] = 3;
        sysreg(DIR, 1, true)
    });
    assert_eq!(world.goes_on().pc, GUEST + 4);
    assert_eq!(active(), 0);
}

#[test]
fn each_interface_has_its_instruction() {
    const NO: u64 = NOT_SUPPORTED;
    let x0 = |kind, conduit, function: u64, immediate| {
        let world = World::new(kind);
        world.cpu.state().entropy = Some([1, 2, 3]);
        world.then(move |guest| {
            guest.x[..4].copy_from_slice(&[function, 0x1_0000, 0, 0]);
            call_with(guest, conduit, immediate)
        });
        world.goes_on().x[0]
    };
    for kind in [VmKind::Ordinary, VmKind::Pkvm, VmKind::Realm] {
        let realm = kind == VmKind::Realm;
        for (function, hvc, smc) in [
            (KVM_FEATURES, !realm, false),
            (RSI_VERSION, false, realm),
            (PSCI_VERSION, true, true),
            (TRNG_VERSION, true, true),
            (0x8000_0000, true, true),
            (0x1_8400_0000, false, false),
            (0xdead_beef, false, false),
            (u64::MAX, false, false),
        ] {
            assert_eq!(x0(kind, Conduit::Hvc, function, 0) != NO, hvc, "{kind:?} {function:#x}");
            assert_eq!(x0(kind, Conduit::Smc, function, 0) != NO, smc, "{kind:?} {function:#x}");
            for immediate in [1, 0x8000, 0xffff] {
                for conduit in [Conduit::Hvc, Conduit::Smc] {
                    assert_eq!(x0(kind, conduit, function, immediate), NO, "{kind:?} {function:#x} #{immediate}");
                }
            }
        }
    }
}

#[test]
fn a_call_with_an_immediate_does_nothing() {
    for case in open_cases().into_iter().chain(closed_cases()).chain(last_cases()) {
        let step = case.step;
        let world = World::new(case.kind);
        (case.prepare)(&world);
        world.then(move |guest| match step(guest) {
            Left::Synchronous(Syndrome { esr, .. }) if [0x16, 0x17].contains(&(esr >> 26)) => syndrome(esr | 1),
            _ => Left::Interrupt,
        });
        let context = world.goes_on();
        assert!([GUEST, GUEST + 4].contains(&context.pc), "{}", case.name);
        assert_eq!(context.x[0] == NOT_SUPPORTED, context.pc == GUEST + 4);
    }
}

#[test]
fn entropy_is_the_cpus() {
    let world = World::new(VmKind::Pkvm);
    world.then(|guest| call(guest, Conduit::Hvc, [TRNG_RND, 192]));
    assert_eq!(world.goes_on().x[0], NOT_SUPPORTED);
    world.cpu.state().entropy = Some([11, 12, 13]);
    world.then(|guest| call(guest, Conduit::Smc, [TRNG_RND, 192]));
    assert_eq!(world.goes_on().x[..4], [0, 13, 12, 11]);
}

#[test]
fn vcpus_are_turned_on_and_off() {
    let world = World::new(VmKind::Pkvm);
    let on = |guest: &mut Context| call(guest, Conduit::Hvc, [CPU_ON, 1, GUEST + 0x2000, 0x77]);
    assert_eq!(world.does(on), RunExit { vcpu: 1, ..exit(ExitReason::CpuOn) });
    let context = world.goes_on();
    assert_eq!((context.x[0], context.pc), (0, GUEST + 4));
    world.cpu.calls();

    // The other one starts, opens its CPU interface and uses vector registers.
    world.cpu.then(|_, guest| {
        guest.gic.vmcr = VMCR_OPEN;
        guest.context.x = [9; 31];
        syndrome(0x07 << 26)
    });
    assert_eq!(world.run(1), Ok(exit(ExitReason::Interrupted)));
    let entered = world.cpu.entered();
    let area = world.vms.run(world.handle, 1, |_, vcpu| Ok(vcpu.state.area)).unwrap();
    assert_eq!(entered[0].context, Context::reset(GUEST + 0x2000, 0x77, 1 << 31 | 1));
    assert_eq!([entered[0].gic.vmcr, entered[1].gic.vmcr], [0, VMCR_OPEN]);
    assert_eq!(world.cpu.calls(), [Call::ClearVectors(area), Call::LoadVectors(area), Call::UnloadVectors(area)]);

    world.then(|guest| call(guest, Conduit::Smc, [CPU_OFF]));
    assert_eq!(world.run(1), Ok(exit(ExitReason::CpuOff)));
    assert_eq!(world.run(1), Err(Status::WrongState));
    world.cpu.calls();
    world.cpu.entered();

    // Nothing is left from before.
    assert_eq!(world.does(on), RunExit { vcpu: 1, ..exit(ExitReason::CpuOn) });
    world.cpu.entered();
    assert_eq!(world.run(1), Ok(exit(ExitReason::Interrupted)));
    let Entered { context, gic, vectors, .. } = world.last();
    assert_eq!(context, Context::reset(GUEST + 0x2000, 0x77, 1 << 31 | 1));
    assert_eq!((gic.vmcr, vectors), (0, Vectors::None));
    assert_eq!(world.cpu.calls(), [Call::ClearVectors(area)]);
}

#[test]
fn vcpus_that_cannot_be_turned_on() {
    let world = World::new(VmKind::Pkvm);
    for (target, entry, expected) in [
        (0, GUEST, u64::MAX - 3),             // already on
        (EXISTING, GUEST, u64::MAX - 1),      // not there
        (1, 1 << 41, u64::MAX - 8),           // no such address
        (0x1_0000_0001, GUEST, u64::MAX - 1), // Aff3
    ] {
        world.then(move |guest| call(guest, Conduit::Hvc, [CPU_ON, target, entry, 0]));
        assert_eq!(world.goes_on().x[0], expected, "{target:#x}");
    }
    assert_eq!(world.run(1), Err(Status::WrongState));
}

#[test]
fn a_call_whose_results_are_always_the_same_is_answered_at_once() {
    let world = World::new(VmKind::Pkvm);
    world.then(|guest| call(guest, Conduit::Hvc, [0xc600_0002, 0, 0, 0]));
    let context = world.goes_on();
    assert_eq!((context.pc, context.x[..4].to_vec()), (GUEST + 4, vec![4096, 1, 0, 0]));
    let world = World::new(VmKind::Realm);
    world.then(|guest| call(guest, Conduit::Smc, [0xc400_0190, 0x1_0000, 0, 0]));
    let context = world.goes_on();
    assert_eq!((context.pc, context.x[..3].to_vec()), (GUEST + 4, vec![0, 0x1_0000, 0x1_0000]));
}

#[test]
fn waiting_ends_with_an_interrupt() {
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[3]);
    world.open_interface();
    // An SGI to itself: neither WFI nor CPU_SUSPEND leave the guest, nor does the SGI.
    world.then(|guest| {
        guest.x[1] = 3 << 24 | 1;
        sysreg(SGI1R, 1, true)
    });
    world.then(|_| wfi());
    world.then(|guest| call(guest, Conduit::Hvc, [CPU_SUSPEND, 0, 0, 0]));
    let context = world.goes_on();
    assert_eq!((context.pc, context.x[0]), (GUEST + 12, 0));
    assert_eq!(world.cpu.left_to_do(), 0);
}

#[test]
fn waiting_ends_with_an_interrupt_of_the_host() {
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[]);
    world.open_interface();
    let spi = |offset, value| {
        let done = world.gic(|gic| gic.mmio(0, Frame::Distributor, offset, Access::Write { size: 4, value }));
        assert!(done.is_ok());
    };
    spi(0x104, 1);
    let wait = RunExit { deadline: RUN_NO_DEADLINE, ..exit(ExitReason::Wait) };
    assert_eq!(world.does(|_| wfi()), wait);
    let woken = world.vms.raise_spi(world.handle, 32, true).unwrap();
    assert_eq!(woken, VcpuSet::of(0));
    world.then(|_| wfi());
    world.goes_on();
    world.run(0).unwrap();
    let listed = world.last().gic;
    assert_eq!((listed.used, listed.lrs[0] & 0xffff_ffff), (1, 32));
}

#[test]
fn an_entry_like_the_one_before_lists_what_has_come_meanwhile() {
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[]);
    world.open_interface();
    let enabled = world.gic(|gic| gic.mmio(0, Frame::Distributor, 0x104, Access::Write { size: 4, value: 1 }));
    assert!(enabled.is_ok());
    for round in 0..3 {
        for _ in 0..3 {
            assert_eq!(world.does(|_| wfe()), exit(ExitReason::Yield));
            assert_eq!(world.last().gic.used, 0, "round {round}");
        }
        assert_eq!(world.vms.raise_spi(world.handle, 32, true), Ok(VcpuSet::of(0)));
        world.cpu.then(|_, guest| {
            // It is taken, and ends.
            guest.gic.lrs[0] = 0;
            wfe()
        });
        assert_eq!(world.run(0), Ok(exit(ExitReason::Yield)));
        let listed = world.last().gic;
        assert_eq!((listed.used, listed.lrs[0] & 0xffff_ffff), (1, 32), "round {round}");
        let _ = world.vms.raise_spi(world.handle, 32, false).unwrap();
    }
}

#[test]
fn the_interrupt_controller_is_where_the_host_has_said() {
    // GICD_IIDR and GICR_TYPER of vCPUs 0 to 3, also of the one that does not exist.
    const IIDR: u64 = 0x5200_0000;
    let typer = |vcpu: u64| vcpu << 32 | vcpu << 8 | u64::from(vcpu == CONFIGURED - 1) << 4;
    for (kind, bit) in [(VmKind::Ordinary, 0), (VmKind::Pkvm, 0), (VmKind::Realm, 0), (VmKind::Realm, SHARED_BIT)] {
        let world = World::new(kind);
        let loaded = |address: u64, log2| {
            world.then(move |guest| {
                guest.x[7] = 0x5a5a;
                access(address | bit, false, log2, 7)
            });
            world.goes_on().x[7]
        };
        assert_eq!(loaded(DISTRIBUTOR + 8, 2), IIDR);
        for vcpu in 0..CONFIGURED {
            assert_eq!(loaded(REDISTRIBUTORS + vcpu * 0x2_0000 + 8, 3), typer(vcpu), "{kind:?}");
        }
        // Stores: enable SGIs of vCPU 1.
        let enable = REDISTRIBUTORS + 0x3_0100;
        assert_eq!(loaded(enable, 2), 0);
        world.then(move |guest| {
            guest.x[8] = 0xffff_ffff_0000_00f0;
            access(enable | bit, true, 2, 8)
        });
        assert_eq!(world.goes_on().x[8], 0xffff_ffff_0000_00f0, "stays");
        assert_eq!((loaded(enable, 2), loaded(REDISTRIBUTORS + 0x1_0100, 2)), (0xf0, 0));
        // Behind it there are devices of the host.
        let behind = (REDISTRIBUTORS + CONFIGURED * 0x2_0000) | bit;
        let told = world.does(move |_| load(behind, 7));
        let expected = if kind == VmKind::Realm && bit == 0 { ExitReason::PageFault } else { ExitReason::Mmio };
        assert_eq!((told.reason, told.address), (expected.code(), behind));
    }
}

#[test]
fn the_private_half_of_other_guests_is_no_alias() {
    let world = World::new(VmKind::Pkvm);
    let told = world.does(|_| load((DISTRIBUTOR + 8) | SHARED_BIT, 7));
    assert_eq!(told, RunExit { address: (DISTRIBUTOR + 8) | SHARED_BIT, size: 4, ..exit(ExitReason::Mmio) });
}

#[test]
fn an_access_to_the_interrupt_controller_that_cannot_be_is_an_abort() {
    let steps: [Act; 5] = [
        |_| fault(0x24 << 26, DISTRIBUTOR + 8),
        |_| fetch(DISTRIBUTOR + 8),
        |_| load(DISTRIBUTOR + 6, 7),
        |_| load(REDISTRIBUTORS + 0xfffe, 7),
        // A walk of the guest's tables.
        |_| fault(0x24 << 26 | 1 << 24 | 2 << 22 | 1 << 7, DISTRIBUTOR),
    ];
    for step in steps {
        let world = World::new(VmKind::Pkvm);
        world.then(step);
        let aborted = world.goes_on();
        assert_eq!((aborted.pc, aborted.esr_el1 & 0x3f), (aborted.vbar_el1 + 0x200, 0x10));
    }
}

#[test]
fn state_in_the_list_registers_of_another_vcpu_makes_it_exit() {
    let world = World::new(VmKind::Pkvm);
    world.turn_on(1);
    world.enable(1, &[4]);
    world.then(|guest| {
        guest.x[1] = 4 << 24 | 1 << 1;
        sysreg(SGI1R, 1, true)
    });
    assert_eq!(world.run(0), Ok(RunExit { wake_low: 1 << 1, ..exit(ExitReason::Wake) }));
    // vCPU 1 runs elsewhere.
    world.cpu.then(|_, guest| {
        guest.gic.vmcr = VMCR_OPEN;
        wfe()
    });
    assert_eq!(world.run(1), Ok(exit(ExitReason::Yield)));
    let elsewhere = world.gic(|gic| prepare(gic, 1)).unwrap();
    assert_eq!(elsewhere.used, 1);

    // Its pending state, GICR_ISPENDR0.
    let read = |_: &mut Context| load(REDISTRIBUTORS + 0x3_0200, 7);
    let before = world.state(0).0;
    for _ in 0..2 {
        assert_eq!(world.does(read), RunExit { wake_low: 1 << 1, ..exit(ExitReason::Wake) });
        assert_eq!(world.state(0).0, before, "again");
    }
    let _ = world.gic(|gic| gic.after_exit(1, &elsewhere));
    world.then(read);
    let context = world.goes_on();
    assert_eq!((context.x[7], context.pc), (1 << 4, before.pc + 4));
}

#[test]
fn those_who_are_sent_an_sgi_are_woken() {
    let wake = |wake_low| RunExit { wake_low, ..exit(ExitReason::Wake) };
    for (value, expected) in [
        (1 << 24 | 0b110, wake(0b110)),
        (1 << 24 | 1 << 40, wake(0b110)),
        (1 << 24 | 0b001, exit(ExitReason::Interrupted)),
        (2 << 24 | 0b111, exit(ExitReason::Interrupted)),
        (1 << 24 | 0b1000, exit(ExitReason::Interrupted)),
    ] {
        let world = World::new(VmKind::Pkvm);
        for vcpu in 0..EXISTING {
            world.enable(vcpu as usize, &[1]);
        }
        world.then(move |guest| {
            guest.x[3] = value;
            sysreg(SGI1R, 3, true)
        });
        assert_eq!(world.run(0), Ok(expected), "{value:#x}");
        assert_eq!(world.goes_on().pc, GUEST + 4);
    }
}

#[test]
fn those_whose_interrupts_are_set_pending_are_woken() {
    let world = World::new(VmKind::Pkvm);
    world.enable(1, &[4]);
    // GICR_ISPENDR0 of vCPU 1: SGIs 4 and 5, of which 5 is disabled.
    for (value, expected) in [(1 << 5, exit(ExitReason::Interrupted)), (1 << 4, exit(ExitReason::Wake))] {
        world.then(move |guest| {
            guest.x[8] = value;
            access(REDISTRIBUTORS + 0x3_0200, true, 2, 8)
        });
        let wake_low = u64::from(expected.reason == ExitReason::Wake.code()) << 1;
        assert_eq!(world.run(0), Ok(RunExit { wake_low, ..expected }));
    }
    assert_eq!(world.goes_on().pc, GUEST + 8);
}

#[test]
fn any_exit_says_whom_to_wake() {
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[]);
    // An SPI that is pending and can go to any vCPU goes to the one that has its groups enabled when this one ends that.
    world.turn_on(1);
    world.cpu.then(|_, guest| {
        guest.gic.vmcr = VMCR_OPEN;
        wfe()
    });
    assert_eq!(world.run(1), Ok(exit(ExitReason::Yield)));
    world.open_interface();
    world.gic(|gic| {
        for (offset, size, value) in [(0x104, 4, 1), (0x6100, 8, 1 << 31)] {
            assert!(gic.mmio(0, Frame::Distributor, offset, Access::Write { size, value }).is_ok());
        }
    });
    let _ = world.vms.raise_spi(world.handle, 32, true).unwrap();
    world.cpu.then(|_, guest| {
        guest.gic.vmcr = 0;
        wfi()
    });
    let wait = RunExit { deadline: RUN_NO_DEADLINE, wake_low: 1 << 1, ..exit(ExitReason::Wait) };
    assert_eq!(world.run(0), Ok(wait));
}

/// Has the guest set its virtual timer, and be left when it has fired.
fn virtual_timer_fires(world: &World, after: u64) {
    world.cpu.then(move |cpu, guest| {
        let mut state = cpu.state();
        (guest.context.cntv_ctl_el0, guest.context.cntv_cval_el0) = (1, state.now + after);
        state.now += after;
        state.timer_waits = true;
        Left::Interrupt
    });
}

/// INTIDs in list registers that are pending.
fn pending(gic: &ListRegisters) -> Vec<u64> {
    let listed = gic.lrs[..gic.used].iter();
    listed.filter(|&lr| lr & ich::PENDING != 0).map(|lr| lr & 0xffff_ffff).collect()
}

#[test]
fn the_virtual_timer_comes_once() {
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[27]);
    world.open_interface();
    world.cpu.calls();
    virtual_timer_fires(&world, 100);
    // The guest takes the interrupt, and is left while it handles it.
    world.cpu.then(|cpu, guest| {
        assert_eq!(pending(guest.gic), [27]);
        assert!(cpu.state().timer_held);
        guest.gic.lrs[0] = guest.gic.lrs[0] & !ich::PENDING | ich::ACTIVE;
        load(DISTRIBUTOR, 7)
    });
    // It sets the timer anew, and ends the interrupt.
    world.cpu.then(|cpu, guest| {
        assert!(cpu.state().timer_held && pending(guest.gic).is_empty());
        guest.context.cntv_cval_el0 = cpu.state().now + 50;
        guest.gic.lrs[0] &= !ich::ACTIVE;
        Left::Interrupt
    });
    world.cpu.then(|cpu, guest| {
        assert!(!cpu.state().timer_held && guest.gic.used == 0);
        assert_eq!(guest.deadline, None, "of the virtual timer hardware takes care");
        load(DISTRIBUTOR, 7)
    });
    world.goes_on();
    assert_eq!(world.cpu.calls(), [Call::HoldTimer, Call::ReleaseTimer]);
    assert_eq!(world.cpu.left_to_do(), 0);
}

#[test]
fn a_timer_is_not_held_any_longer_than_to_the_next_exit() {
    const ID_AA64PFR0_EL1: [u64; 5] = [3, 0, 0, 4, 0];
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[27]);
    world.open_interface();
    virtual_timer_fires(&world, 100);
    // An exit that is handled at once otherwise.
    world.cpu.then(|cpu, guest| {
        assert!(cpu.state().timer_held);
        guest.context.cntv_cval_el0 = cpu.state().now + 50;
        sysreg(ID_AA64PFR0_EL1, 7, false)
    });
    world.cpu.then(|cpu, _| {
        assert!(!cpu.state().timer_held);
        load(DISTRIBUTOR, 7)
    });
    world.goes_on();
    assert_eq!(world.cpu.left_to_do(), 0);
}

#[test]
fn a_timer_that_is_edge_triggered_comes_once_for_each_edge() {
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[27]);
    let private = Frame::Redistributor { vcpu: 0, frame: RedistributorFrame::Private };
    assert!(world.gic(|gic| gic.mmio(0, private, 0xc04, Access::Write { size: 4, value: 1 << 23 })).is_ok());
    world.open_interface();
    for _ in 0..2 {
        virtual_timer_fires(&world, 100);
        world.cpu.then(|_, guest| {
            assert_eq!(pending(guest.gic), [27]);
            guest.gic.lrs[0] = 0;
            Left::Interrupt
        });
        // It still asserts its interrupt, here and after it has been the host's.
        let handled = |_: &FakeCpu, guest: &mut Entry<'_>| {
            assert_eq!(guest.gic.used, 0);
            Left::Interrupt
        };
        world.cpu.then(handled);
        world.goes_on();
        world.cpu.then(handled);
        world.cpu.then(|_, guest| {
            guest.context.cntv_ctl_el0 = 0;
            Left::Interrupt
        });
        world.goes_on();
    }
}

#[test]
fn the_host_gets_its_timer_back() {
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[27]);
    world.open_interface();
    world.cpu.calls();
    virtual_timer_fires(&world, 100);
    world.goes_on();
    assert_eq!(world.cpu.calls(), [Call::HoldTimer, Call::ReleaseTimer]);
    // It still asserts when the guest comes back: pending from the start.
    virtual_timer_fires(&world, 0);
    assert_eq!(world.run(0), Ok(exit(ExitReason::Interrupted)));
    let entered = world.cpu.entered();
    assert_eq!(entered.iter().map(|entered| pending(&entered.gic)).collect::<Vec<_>>(), [[27], [27]]);
    assert_eq!(world.cpu.calls(), [Call::HoldTimer, Call::ReleaseTimer]);
}

#[test]
fn an_interrupt_of_the_host_is_not_taken_for_the_timer() {
    let world = World::new(VmKind::Pkvm);
    world.open_interface();
    world.cpu.calls();
    virtual_timer_fires(&world, 100);
    world.cpu.state().timer_waits = true;
    world.cpu.then(|_, _| unreachable!("the host comes first"));
    world.cpu.state().host_waits = true;
    assert_eq!(world.run(0), Ok(exit(ExitReason::Interrupted)));
    assert_eq!(world.cpu.calls(), []);
}

#[test]
fn a_timer_that_is_masked_asserts_nothing() {
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[27, 30]);
    world.open_interface();
    for (virtual_control, physical_control) in [(0, 0), (3, 3), (2, 2)] {
        world.does(move |guest| {
            (guest.cntv_ctl_el0, guest.cntp_ctl_el0) = (virtual_control, physical_control);
            (guest.cntv_cval_el0, guest.cntp_cval_el0) = (1, 1);
            Left::Interrupt
        });
        world.goes_on();
        assert_eq!(world.run(0), Ok(exit(ExitReason::Interrupted)));
        let Entered { gic, deadline, .. } = world.last();
        assert_eq!((gic.used, deadline), (0, None));
        assert_eq!(world.does(|_| wfi()), RunExit { deadline: RUN_NO_DEADLINE, ..exit(ExitReason::Wait) });
    }
}

#[test]
fn the_physical_timer_is_emulated() {
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[30]);
    world.open_interface();
    let write = |register: [u64; 5], value: u64| {
        world.then(move |guest| {
            guest.x[1] = value;
            sysreg(register, 1, true)
        });
    };
    let now = world.cpu.state().now;
    write([3, 3, 14, 2, 2], now + 100);
    write(CNTP_CTL, 1);
    world.cpu.then(move |cpu, guest| {
        assert_eq!((guest.deadline, guest.gic.used), (Some(now + 100), 0));
        cpu.state().now += 99;
        Left::Interrupt
    });
    world.cpu.then(move |cpu, guest| {
        assert_eq!((guest.deadline, guest.gic.used), (Some(now + 100), 0));
        cpu.state().now += 1;
        Left::Interrupt
    });
    world.cpu.then(|_, guest| {
        assert_eq!((guest.deadline, pending(guest.gic)), (None, vec![30]));
        Left::Interrupt
    });
    // Off again.
    write(CNTP_CTL, 0);
    world.cpu.then(|_, guest| {
        assert_eq!((guest.deadline, pending(guest.gic)), (None, vec![]));
        Left::Interrupt
    });
    world.goes_on();
    assert_eq!((world.cpu.left_to_do(), world.cpu.calls().len()), (0, 0), "the CPU's timer is not touched");
}

#[test]
fn time_goes_by_while_a_guest_is_entered() {
    let world = World::new(VmKind::Pkvm);
    world.enable(0, &[30]);
    world.open_interface();
    for ahead in 0..6 {
        world.cpu.state().pace = 0;
        let now = world.cpu.state().now;
        world.does(move |guest| {
            (guest.cntp_ctl_el0, guest.cntp_cval_el0) = (1, now + ahead);
            wfe()
        });
        world.cpu.state().pace = 1;
        world.goes_on();
        assert_eq!(world.run(0), Ok(exit(ExitReason::Interrupted)));
        world.cpu.state().now = now;
        world.run(0).unwrap();
        let Entered { gic, deadline, .. } = world.last();
        assert_ne!(deadline.is_some(), pending(&gic) == [30], "either now or later");
        world.cpu.state().now = now + 100;
    }
}

#[test]
fn the_host_knows_until_when_a_guest_waits() {
    let deadline = |intids: &[u32], virtual_at: u64, physical_at: u64| {
        let world = World::new(VmKind::Pkvm);
        world.enable(0, intids);
        world.open_interface();
        world.does(move |guest| {
            (guest.cntv_ctl_el0, guest.cntv_cval_el0) = (1, virtual_at);
            (guest.cntp_ctl_el0, guest.cntp_cval_el0) = (1, physical_at);
            wfi()
        })
    };
    let wait = |deadline| RunExit { deadline, ..exit(ExitReason::Wait) };
    let interrupted = exit(ExitReason::Interrupted);
    assert_eq!(deadline(&[27, 30], 1500, 1200), wait(1200));
    assert_eq!(deadline(&[27, 30], 1300, 1400), wait(1300));
    assert_eq!(deadline(&[], 1300, 1400), wait(1300));
    assert_eq!(deadline(&[27, 30], 1000, 1400), interrupted, "has fired");
    assert_eq!(deadline(&[27, 30], 1400, 999), interrupted);
    // One that has fired and whose interrupt the guest has disabled is nothing to wait for.
    assert_eq!(deadline(&[30], 1000, 1400), wait(1400));
    assert_eq!(deadline(&[], 1000, 999), wait(RUN_NO_DEADLINE));
}

#[test]
fn vector_registers_are_loaded_once_they_are_used() {
    const FP: u64 = 0x07 << 26;
    const SVE: u64 = 0x19 << 26;
    for (sve, first, second, vectors, undefined) in [
        (true, FP, None, Vectors::Sve, false),
        (true, SVE, None, Vectors::Sve, false),
        (false, FP, None, Vectors::Simd, false),
        (false, SVE, Some(SVE), Vectors::Simd, true),
        (false, FP, Some(SVE), Vectors::Simd, true),
    ] {
        let cpu = FakeCpu::new();
        if !sve {
            cpu.state().ids = IdRegisters { id_aa64pfr0_el1: 0x11, ..IdRegisters::default() };
        }
        let world = World::on(cpu, VmKind::Pkvm);
        world.goes_on();
        world.cpu.calls();
        let area = world.vms.run(world.handle, 0, |_, vcpu| Ok(vcpu.state.area)).unwrap();
        for _ in 0..2 {
            world.then(|guest| {
                guest.pc = GUEST;
                wfi()
            });
            world.run(0).unwrap();
            world.then(move |_| syndrome(first));
            if let Some(second) = second {
                world.then(move |_| syndrome(second));
            }
            world.cpu.entered();
            assert_eq!(world.run(0), Ok(exit(ExitReason::Interrupted)));
            let entered = world.cpu.entered();
            assert_eq!(entered[0].vectors, Vectors::None, "lazily");
            assert_eq!((entered[1].vectors, entered[1].context), (vectors, entered[0].context), "again");
            assert!(entered[2..].iter().all(|entered| entered.vectors == vectors));
            let last = entered.last().unwrap().context;
            assert_eq!(last.elr_el1 == GUEST + 4 && last.esr_el1 == 1 << 25, undefined);
            assert_eq!(world.cpu.calls(), [Call::LoadVectors(area), Call::UnloadVectors(area)]);
        }
    }
}

#[test]
fn vector_registers_are_the_hosts_again_after_every_exit() {
    for case in open_cases().into_iter().chain(closed_cases()).chain(last_cases()) {
        let world = World::new(case.kind);
        (case.prepare)(&world);
        world.then(|_| syndrome(0x07 << 26));
        virtual_timer_fires(&world, 1);
        world.then(|guest| {
            guest.cntv_ctl_el0 = 0;
            Left::Interrupt
        });
        virtual_timer_fires(&world, 1);
        let step = case.step;
        world.then(step);
        world.run(0).unwrap();
        world.cpu.assert_is_the_hosts();
        let calls = world.cpu.calls();
        let count = |of: fn(&Call) -> bool| calls.iter().filter(|call| of(call)).count();
        assert_eq!(count(|call| matches!(call, Call::LoadVectors(_))), 1, "{}", case.name);
        assert_eq!(count(|call| *call == Call::HoldTimer), 2, "{}", case.name);
    }
}

/// Fills every register that a guest can write, but for bits that decide what an exit is: EL1h, little-endian, timers off.
fn fill(guest: &mut Context, seed: u64) {
    let mut next = seed;
    let mut secret = || {
        next = next.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        next | SECRET
    };
    *guest = Context {
        x: array::from_fn(|_| secret()),
        sp_el0: secret(),
        pc: secret() & !3,
        pstate: EL1H | secret() & 0xf << 28,
        sp_el1: secret(),
        elr_el1: secret(),
        spsr_el1: secret(),
        esr_el1: secret(),
        far_el1: secret(),
        afsr0_el1: secret(),
        afsr1_el1: secret(),
        vbar_el1: secret(),
        vdisr_el2: secret(),
        sctlr_el1: secret() & !(0b11 << 24),
        cpacr_el1: secret(),
        ttbr0_el1: secret(),
        ttbr1_el1: secret(),
        tcr_el1: secret(),
        mair_el1: secret(),
        amair_el1: secret(),
        contextidr_el1: secret(),
        par_el1: secret(),
        csselr_el1: secret(),
        tpidr_el0: secret(),
        tpidrro_el0: secret(),
        tpidr_el1: secret(),
        cntkctl_el1: secret(),
        cntv_ctl_el0: secret() & !1,
        cntv_cval_el0: secret(),
        cntp_ctl_el0: secret() & !1,
        cntp_cval_el0: secret(),
        cntvoff_el2: guest.cntvoff_el2,
        vmpidr_el2: guest.vmpidr_el2,
        apiakeylo_el1: secret(),
        apiakeyhi_el1: secret(),
        apibkeylo_el1: secret(),
        apibkeyhi_el1: secret(),
        apdakeylo_el1: secret(),
        apdakeyhi_el1: secret(),
        apdbkeylo_el1: secret(),
        apdbkeyhi_el1: secret(),
        apgakeylo_el1: secret(),
        apgakeyhi_el1: secret(),
        tcr2_el1: secret(),
        sctlr2_el1: secret(),
        pir_el1: secret(),
        pire0_el1: secret(),
        por_el1: secret(),
        por_el0: secret(),
    };
}

/// Each byte of a secret has its three highest bits set.
const SECRET: u64 = 0xe0e0_e0e0_e0e0_e0e0;

#[test]
fn the_host_learns_of_an_exit_only_what_it_needs() {
    for case in open_cases().into_iter().chain(closed_cases()).chain(last_cases()) {
        let page = |seed| {
            let world = World::new(case.kind);
            (case.prepare)(&world);
            let step = case.step;
            assert_eq!(
                world.does(move |guest| {
                    fill(guest, seed);
                    step(guest)
                }),
                case.told,
                "{}",
                case.name
            );
            world.cpu.page(run_page(0))
        };
        let first = page(1);
        assert_eq!(first, page(2), "{}", case.name);
        // Of what the host is told in these cases, only a deadline that is none looks like a secret.
        let mut expected = [false; 4096];
        if case.told.deadline == RUN_NO_DEADLINE {
            expected[std::mem::offset_of!(RunExit, deadline)..][..8].fill(true);
        }
        let secret: Vec<_> = first.iter().map(|byte| byte & 0xe0 == 0xe0).collect();
        assert_eq!(secret, expected, "{}", case.name);
    }
}

#[test]
fn every_exit_overwrites_the_last_one() {
    for case in open_cases().into_iter().chain(closed_cases()).chain(last_cases()) {
        let world = World::new(case.kind);
        (case.prepare)(&world);
        world.cpu.set_page(run_page(0), &[0x5a; 4096]);
        assert_eq!(world.does(case.step), case.told, "{}", case.name);
    }
}

#[test]
fn the_run_page_is_read_once() {
    for case in open_cases() {
        for &answer in case.answers.unwrap() {
            let world = case.happen();
            world.answer(answer.code(), 0x77);
            // The host writes to the page all the time.
            world.cpu.state().overwrite = Some(0xff);
            world.vms.run_vcpu(&world.memory, &world.cpu, world.handle, 0).unwrap();
            let at = |offset: usize| run_page(0) + offset as u64;
            let mut expected = vec![(at(RunPage::ENTRY), RunEntry::SIZE)];
            if case.told.reason == ExitReason::HostCall.code() && answer == Answer::Complete {
                expected.push((at(RunPage::RESULTS), CALL_SIZE));
            }
            assert_eq!(world.cpu.state().reads, expected, "{} {answer:?}", case.name);
            if case.name == "load" && answer == Answer::Complete {
                assert_eq!(world.state(0).0.x[5], 0x77);
            }
        }
    }
}

#[test]
fn an_interrupt_leaves_the_guest_however_busy_it_keeps_the_hypervisor() {
    let world = World::new(VmKind::Pkvm);
    for _ in 0..100 {
        world.then(|guest| call(guest, Conduit::Hvc, [PSCI_VERSION]));
        world.then(|_| load(DISTRIBUTOR, 7));
    }
    world.cpu.then(|cpu, _| {
        cpu.state().host_waits = true;
        load(DISTRIBUTOR, 7)
    });
    world.cpu.then(|_, _| unreachable!("the host comes first"));
    assert_eq!(world.run(0), Ok(exit(ExitReason::Interrupted)));
}

#[test]
fn the_timer_of_the_host_takes_the_cpu_from_a_guest() {
    let world = World::new(VmKind::Pkvm);
    world.cpu.state().host_deadline = Some(1100);
    for passed in [99, 1] {
        world.cpu.then(move |cpu, _| {
            cpu.state().now += passed;
            Left::Interrupt
        });
    }
    world.cpu.then(|_, _| unreachable!("the host comes first"));
    assert_eq!(world.run(0), Ok(exit(ExitReason::Interrupted)));
    assert_eq!(world.cpu.left_to_do(), 1);
}

#[test]
fn spurious_interrupts_are_nobodys() {
    let world = World::new(VmKind::Pkvm);
    (0..3).for_each(|_| world.then(|_| Left::Interrupt));
    world.goes_on();
    assert_eq!(world.cpu.left_to_do(), 0);
}

#[test]
fn what_a_guest_gives_up_is_the_hosts() {
    let world = World::new(VmKind::Pkvm);
    world.does(|guest| call(guest, Conduit::Hvc, [MEM_RELINQUISH, GUEST, 0, 0]));
    assert_eq!(world.memory.owner_of(PAYLOAD), Owner::Host);
    assert_eq!(
        world.memory.owner_of(PAYLOAD + PAGE_SIZE),
        Owner::Guest { slot: 0, frame: (GUEST >> 12) + 1, state: GuestState::Private }
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    /// Whatever guests do and hosts answer, the CPU is the host's afterwards, and what is open is what the last exit said.
    #[test]
    fn nothing_upsets_the_loop(
        kind in prop::sample::select(vec![VmKind::Ordinary, VmKind::Pkvm, VmKind::Realm]),
        turns in prop::collection::vec((any::<[u64; 6]>(), 0_u64..64, 0_u64..5, 0_u64..16), 1..24),
    ) {
        let world = World::new(kind);
        world.enable(0, &[0, 27, 30]);
        for ([esr, far, hpfar, x0, x1, x2], class, answer, what) in turns {
            world.cpu.then(move |cpu, guest| {
                guest.context.x[..3].copy_from_slice(&[x0, x1, x2]);
                let calls = [MEM_SHARE, MEM_UNSHARE, MEM_RELINQUISH, IPA_STATE_SET, HOST_CALL, CPU_ON];
                if let Some(&function) = calls.get(what as usize) {
                    let base = GUEST + x1 % 8 * PAGE_SIZE;
                    guest.context.x[..4].copy_from_slice(&[function, base, base + PAGE_SIZE, x2 & 1]);
                    if kind != VmKind::Realm && function != CPU_ON {
                        guest.context.x[2..4].fill(0);
                    }
                    return call_with(guest.context, if kind == VmKind::Realm { Conduit::Smc } else { Conduit::Hvc }, 0);
                }
                guest.gic.vmcr = x1 & 0xff00_021f;
                (guest.context.cntv_ctl_el0, guest.context.cntv_cval_el0) = (x0 & 3, x1 % 4000);
                match what {
                    6 => Left::Interrupt,
                    7 => {
                        cpu.state().timer_waits = true;
                        Left::Interrupt
                    }
                    8 => load([DEVICE, DISTRIBUTOR, REDISTRIBUTORS, ABSENT][x0 as usize & 3] + (x1 & 0xfffc), x2 & 31),
                    _ => Left::Synchronous(Syndrome { esr: esr & !(0x3f << 26) | class << 26, far, hpfar }),
                }
            });
            let before = world.state(0);
            world.answer(answer, x2);
            match world.run(0) {
                Ok(told) => {
                    let open = world.state(0).1;
                    let reason = ExitReason::ALL.iter().find(|reason| reason.code() == told.reason).unwrap();
                    let waits = matches!(
                        reason,
                        ExitReason::Mmio
                            | ExitReason::PageFault
                            | ExitReason::Unshare
                            | ExitReason::NeedsTables
                            | ExitReason::HostCall
                    );
                    let ended = matches!(reason, ExitReason::SystemOff | ExitReason::SystemReset | ExitReason::Failed);
                    prop_assert_eq!(open == Open::Ended, ended);
                    prop_assert_eq!(waits, !matches!(open, Open::Nothing | Open::Ended));
                }
                Err(status) => {
                    prop_assert!([Status::Invalid, Status::WrongState].contains(&status));
                    prop_assert_eq!(world.state(0), before);
                }
            }
            world.cpu.state().timer_waits = false;
        }
    }
}
