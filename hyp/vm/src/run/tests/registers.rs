//! Registers that the host of an ordinary VM gets and sets.

use ravelin_abi::{
    REGISTER_ELR_EL1, REGISTER_FPCR, REGISTER_FPSR, REGISTER_LAST, REGISTER_PC, REGISTER_POWER, REGISTER_PSTATE,
    REGISTER_SP_EL0, REGISTER_SP_EL1, REGISTER_SPSR_EL1, REGISTER_V, REGISTER_X, system_register,
};

use super::*;

const MPIDR: u64 = system_register(3, 0, 0, 0, 5);
const PFR0: u64 = system_register(3, 0, 0, 4, 0);
const MDSCR: u64 = system_register(2, 0, 0, 2, 2);
const CNTVCT: u64 = system_register(3, 3, 14, 0, 2);
const CNTV_CTL: u64 = system_register(3, 3, 14, 3, 1);
const CNTV_CVAL: u64 = system_register(3, 3, 14, 3, 2);
const CNTP_CVAL: u64 = system_register(3, 3, 14, 2, 2);

/// What a register's place in the context is.
type Place = fn(&mut Context) -> &mut u64;

/// Registers that keep whatever they are set to, with the features that they need.
const PLAIN: &[(u64, Place)] = &[
    (REGISTER_SP_EL0, |context| &mut context.sp_el0),
    (REGISTER_PC, |context| &mut context.pc),
    (REGISTER_SP_EL1, |context| &mut context.sp_el1),
    (REGISTER_ELR_EL1, |context| &mut context.elr_el1),
    (REGISTER_SPSR_EL1, |context| &mut context.spsr_el1),
    (system_register(3, 0, 1, 0, 0), |context| &mut context.sctlr_el1),
    (system_register(3, 0, 1, 0, 2), |context| &mut context.cpacr_el1),
    (system_register(3, 0, 2, 0, 0), |context| &mut context.ttbr0_el1),
    (system_register(3, 0, 2, 0, 1), |context| &mut context.ttbr1_el1),
    (system_register(3, 0, 2, 0, 2), |context| &mut context.tcr_el1),
    (system_register(3, 0, 5, 1, 0), |context| &mut context.afsr0_el1),
    (system_register(3, 0, 5, 1, 1), |context| &mut context.afsr1_el1),
    (system_register(3, 0, 5, 2, 0), |context| &mut context.esr_el1),
    (system_register(3, 0, 6, 0, 0), |context| &mut context.far_el1),
    (system_register(3, 0, 7, 4, 0), |context| &mut context.par_el1),
    (system_register(3, 0, 10, 2, 0), |context| &mut context.mair_el1),
    (system_register(3, 0, 10, 3, 0), |context| &mut context.amair_el1),
    (system_register(3, 0, 12, 0, 0), |context| &mut context.vbar_el1),
    (system_register(3, 0, 13, 0, 1), |context| &mut context.contextidr_el1),
    (system_register(3, 0, 13, 0, 4), |context| &mut context.tpidr_el1),
    (system_register(3, 0, 14, 1, 0), |context| &mut context.cntkctl_el1),
    (system_register(3, 2, 0, 0, 0), |context| &mut context.csselr_el1),
    (system_register(3, 3, 13, 0, 2), |context| &mut context.tpidr_el0),
    (system_register(3, 3, 13, 0, 3), |context| &mut context.tpidrro_el0),
    (CNTV_CVAL, |context| &mut context.cntv_cval_el0),
    (CNTP_CVAL, |context| &mut context.cntp_cval_el0),
];

/// Those that only some features have.
const OF_FEATURES: &[(u64, Place)] = &[
    (system_register(3, 0, 1, 0, 3), |context| &mut context.sctlr2_el1),
    (system_register(3, 0, 2, 0, 3), |context| &mut context.tcr2_el1),
    (system_register(3, 0, 2, 1, 0), |context| &mut context.apiakeylo_el1),
    (system_register(3, 0, 2, 1, 1), |context| &mut context.apiakeyhi_el1),
    (system_register(3, 0, 2, 1, 2), |context| &mut context.apibkeylo_el1),
    (system_register(3, 0, 2, 1, 3), |context| &mut context.apibkeyhi_el1),
    (system_register(3, 0, 2, 2, 0), |context| &mut context.apdakeylo_el1),
    (system_register(3, 0, 2, 2, 1), |context| &mut context.apdakeyhi_el1),
    (system_register(3, 0, 2, 2, 2), |context| &mut context.apdbkeylo_el1),
    (system_register(3, 0, 2, 2, 3), |context| &mut context.apdbkeyhi_el1),
    (system_register(3, 0, 2, 3, 0), |context| &mut context.apgakeylo_el1),
    (system_register(3, 0, 2, 3, 1), |context| &mut context.apgakeyhi_el1),
    (system_register(3, 0, 10, 2, 2), |context| &mut context.pire0_el1),
    (system_register(3, 0, 10, 2, 3), |context| &mut context.pir_el1),
    (system_register(3, 0, 10, 2, 4), |context| &mut context.por_el1),
    (system_register(3, 3, 10, 2, 4), |context| &mut context.por_el0),
    (system_register(3, 0, 12, 1, 1), |context| &mut context.vdisr_el2),
];

impl World {
    fn get(&self, index: u64, number: u64) -> Result<u64, Status> {
        self.vms.register(&self.cpu, self.handle, index, number).map_err(|refusal| refusal.status)
    }

    fn set(&self, index: u64, number: u64, value: u64) -> Result<(), Status> {
        self.vms.set_register(&self.cpu, self.handle, index, number, value).map_err(|refusal| refusal.status)
    }

    /// Sets a register that then reads as that.
    fn sets(&self, index: u64, number: u64, value: u64) {
        assert_eq!(self.set(index, number, value), Ok(()), "{number:#x}");
        assert_eq!(self.get(index, number), Ok(value), "{number:#x}");
    }
}

/// Returns a world on a CPU that has all that guests may have.
fn with_all_features() -> World {
    let cpu = FakeCpu::new();
    cpu.state().ids = IdRegisters {
        id_aa64pfr0_el1: 0xffff_ffff_ff11_ffff,
        id_aa64isar1_el1: u64::MAX,
        id_aa64mmfr3_el1: u64::MAX,
        ..IdRegisters::default()
    };
    World::on(cpu, VmKind::Ordinary)
}

#[test]
fn each_register_has_its_place_and_the_guest_gets_it() {
    let world = with_all_features();
    let general: Vec<_> = (0..31).map(|n| (REGISTER_X + 2 * n, n)).collect();
    let mut expected = Context::reset(GUEST, DEVICE_TREE, mpidr(0));
    for (value, &(number, place)) in (0x1111_0000_0000_0000..).zip(PLAIN.iter().chain(OF_FEATURES)) {
        world.sets(0, number, value);
        *place(&mut expected) = value;
        assert_eq!(world.state(0).0, expected, "{number:#x} and no other");
    }
    for (number, n) in general {
        world.sets(0, number, !n);
        expected.x[n as usize] = !n;
    }
    assert_eq!(world.goes_on(), expected);
    // And the host what the guest has made of it.
    world.does(|guest| {
        (guest.x[7], guest.ttbr1_el1) = (77, 78);
        wfe()
    });
    assert_eq!(world.get(0, REGISTER_X + 14), Ok(77));
    assert_eq!(world.get(0, system_register(3, 0, 2, 0, 1)), Ok(78));
    assert_eq!(world.get(0, REGISTER_PC), Ok(expected.pc + 4));
}

#[test]
fn what_the_guests_features_do_not_have_is_not_there() {
    let world = World::new(VmKind::Ordinary);
    for &(number, _) in OF_FEATURES {
        assert_eq!(world.get(0, number), Err(Status::Invalid), "{number:#x}");
        assert_eq!(world.set(0, number, 0), Err(Status::Invalid), "{number:#x}");
    }
}

#[test]
fn numbers_without_a_register() {
    let world = with_all_features();
    world.sets(0, REGISTER_X, 5);
    let (before, _) = world.state(0);
    let known = |number: u64| {
        PLAIN.iter().chain(OF_FEATURES).any(|&(known, _)| known == number)
            || number < REGISTER_SP_EL0 && number.is_multiple_of(2)
            || (REGISTER_V..REGISTER_FPSR).contains(&number) && number.is_multiple_of(2)
            || [REGISTER_PSTATE, REGISTER_FPSR, REGISTER_FPCR, REGISTER_POWER].contains(&number)
            || number >= 0x8000
    };
    for number in (0..=REGISTER_LAST).filter(|&number| !known(number)).chain([REGISTER_LAST + 1, u64::MAX]) {
        assert_eq!(world.get(0, number), Err(Status::Invalid), "{number:#x}");
        assert_eq!(world.set(0, number, 0), Err(Status::Invalid), "{number:#x}");
    }
    // What generates SGIs or deactivates interrupts, system instructions, and what belongs to EL2.
    for number in [
        system_register(3, 0, 12, 11, 5),
        system_register(3, 0, 12, 11, 1),
        system_register(3, 4, 1, 1, 0),
        system_register(3, 4, 14, 0, 3),
        system_register(3, 0, 9, 14, 1),
    ] {
        assert_eq!((world.get(0, number), world.set(0, number, 1)), (Err(Status::Invalid), Err(Status::Invalid)));
    }
    assert_eq!(world.state(0).0, before);
}

#[test]
fn what_a_guest_can_only_read_keeps_its_value() {
    let world = World::new(VmKind::Ordinary);
    let pfr0 = world.vms.run(world.handle, 0, |_, vcpu| Ok(vcpu.state.ids.id_aa64pfr0_el1)).unwrap();
    for (index, number, value) in [(0, MPIDR, mpidr(0)), (2, MPIDR, mpidr(2)), (0, PFR0, pfr0)] {
        assert_eq!(world.get(index, number), Ok(value));
        assert_eq!(world.set(index, number, value), Ok(()));
        assert_eq!(world.set(index, number, value ^ 1), Err(Status::Invalid));
    }
    // Written without effect, as by a guest.
    assert_eq!((world.set(0, MDSCR, 1), world.get(0, MDSCR)), (Ok(()), Ok(0)));
}

#[test]
fn pstate_is_one_of_a_guests() {
    let world = World::new(VmKind::Ordinary);
    let mut last = EL1H;
    for mode in 0..32 {
        let value = 0xf1c0_1fc0 | mode;
        let set = world.set(0, REGISTER_PSTATE, value);
        if [0, 4, 5].contains(&mode) {
            assert_eq!(set, Ok(()));
            last = value;
        } else {
            assert_eq!(set, Err(Status::Invalid), "{mode:#x}");
        }
        assert_eq!(world.get(0, REGISTER_PSTATE), Ok(last));
    }
    // Neither an illegal state, nor a step, nor an exception.
    assert_eq!(world.set(0, REGISTER_PSTATE, !0x1f | 5), Ok(()));
    assert_eq!(world.get(0, REGISTER_PSTATE), Ok(0xf1c0_1fc5));
    assert_eq!(world.goes_on().pstate, 0xf1c0_1fc5);
}

#[test]
fn vector_registers_are_where_the_switch_looks_for_them() {
    let world = World::new(VmKind::Ordinary);
    world.sets(0, REGISTER_FPSR, 1);
    world.sets(0, REGISTER_FPCR, 2);
    for half in 0..64 {
        world.sets(0, REGISTER_V + 2 * half, 100 + half);
    }
    let area = world.vms.run(world.handle, 0, |_, vcpu| Ok(vcpu.state.area)).unwrap();
    let page = world.cpu.page(area.base().raw());
    let word = |offset: usize| u64::from_le_bytes(page[offset..offset + 8].try_into().unwrap());
    assert_eq!([word(0x800), word(0x808)], [1, 2]);
    for half in 0..64 {
        assert_eq!(word(0x820 + half / 2 * 32 + half % 2 * 8), 100 + half as u64);
    }
    // They last over the first run.
    world.goes_on();
    assert_eq!(world.get(0, REGISTER_V + 126), Ok(163));
}

#[test]
fn timers_can_be_carried_over() {
    let world = World::new(VmKind::Ordinary);
    world.cpu.state().now = 1000;
    assert_eq!(world.get(0, CNTVCT), Ok(1000));
    world.sets(0, CNTVCT, 5000);
    // Of all vCPUs, and for the guest.
    assert_eq!(world.get(1, CNTVCT), Ok(5000));
    world.sets(0, CNTV_CVAL, 5010);
    assert_eq!(world.set(0, CNTV_CTL, u64::MAX), Ok(()));
    assert_eq!(world.get(0, CNTV_CTL), Ok(3));
    assert_eq!(world.set(0, CNTV_CTL, 1), Ok(()));
    assert_eq!(world.get(0, CNTV_CTL), Ok(1));
    world.cpu.state().now = 1010;
    assert_eq!((world.get(0, CNTV_CTL), world.get(0, CNTVCT)), (Ok(5), Ok(5010)));
    let context = world.goes_on();
    assert_eq!((context.cntvoff_el2, context.cntv_ctl_el0 & 3), (4000_u64.wrapping_neg(), 1));
    world.turn_on(1);
    world.run(1).unwrap();
    assert_eq!(world.last().context.cntvoff_el2, 4000_u64.wrapping_neg());
    world.sets(0, CNTVCT, 10);
    assert_eq!(world.goes_on().cntvoff_el2, 1000);
}

#[test]
fn the_host_turns_vcpus_on_and_off() {
    let world = World::new(VmKind::Ordinary);
    assert_eq!([0, 1].map(|index| world.get(index, REGISTER_POWER)), [Ok(1), Ok(0)]);
    assert_eq!(world.set(1, REGISTER_POWER, 2), Err(Status::Invalid));
    world.sets(1, REGISTER_PC, GUEST + 8);
    world.sets(1, REGISTER_POWER, 1);
    assert_eq!(world.run(1), Ok(exit(ExitReason::Interrupted)));
    assert_eq!(world.last().context, Context::reset(GUEST + 8, 0, mpidr(1)));
    world.sets(1, REGISTER_POWER, 0);
    assert_eq!(world.run(1), Err(Status::WrongState));
    // A guest that turns one on decides how it starts, but the host may see and change that.
    world.turn_on(1);
    assert_eq!((world.get(1, REGISTER_POWER), world.get(1, REGISTER_PC)), (Ok(1), Ok(GUEST)));
    let area = world.vms.run(world.handle, 1, |_, vcpu| Ok(vcpu.state.area)).unwrap();
    assert_eq!(world.cpu.calls(), [Call::ClearVectors(area)]);
    world.sets(1, REGISTER_X + 2, 9);
    assert_eq!(world.run(1), Ok(exit(ExitReason::Interrupted)));
    assert_eq!(
        world.last().context,
        Context { x: array::from_fn(|n| if n == 1 { 9 } else { 0 }), ..Context::reset(GUEST, 0, mpidr(1)) }
    );
}

#[test]
fn only_an_ordinary_vms_vcpus_that_do_not_run() {
    for kind in [VmKind::Pkvm, VmKind::Realm] {
        let world = World::new(kind);
        for number in [REGISTER_X, REGISTER_PC, REGISTER_POWER, PFR0, REGISTER_V, 1] {
            assert_eq!(world.get(0, number), Err(Status::WrongState));
            assert_eq!(world.set(0, number, 0), Err(Status::WrongState));
        }
        assert_eq!(world.goes_on(), Context::reset(GUEST, DEVICE_TREE, mpidr(0)));
    }
    let world = World::new(VmKind::Ordinary);
    for index in [EXISTING, CONFIGURED, u64::MAX] {
        assert_eq!(world.get(index, REGISTER_X), Err(Status::Absent));
        assert_eq!(world.set(index, REGISTER_X, 1), Err(Status::Absent));
    }
    let busy = world.vms.run(world.handle, 0, |_, _| Ok((world.get(0, REGISTER_X), world.set(0, REGISTER_X, 1))));
    assert_eq!(busy.unwrap(), (Err(Status::Busy), Err(Status::Busy)));
    world.vms.teardown(&world.memory, world.handle).unwrap();
    assert_eq!(world.get(0, REGISTER_X), Err(Status::WrongState));
}

#[test]
fn the_seal_keeps_what_was_set_before() {
    let world = World::unsealed(FakeCpu::new(), VmKind::Ordinary);
    world.sets(0, REGISTER_PC, 0x44);
    world.sets(0, REGISTER_X, 1);
    world.sets(0, REGISTER_X + 2, 2);
    world.sets(0, REGISTER_PSTATE, 0x3c4);
    world.sets(0, REGISTER_V, 3);
    world.sets(0, REGISTER_POWER, 1);
    world.sets(1, REGISTER_X, 4);
    world.sets(1, REGISTER_POWER, 1);
    let unsealed = world.vms.run_vcpu(&world.memory, &world.cpu, world.handle, 0);
    assert_eq!(unsealed.unwrap_err().status, Status::WrongState);
    world.seal();
    let mut expected = Context { pstate: 0x3c4, ..Context::reset(GUEST, DEVICE_TREE, mpidr(0)) };
    expected.x[1] = 2;
    assert_eq!(world.goes_on(), expected);
    assert_eq!(world.get(0, REGISTER_V), Ok(3));
    world.run(1).unwrap();
    assert_eq!(world.last().context, Context::reset(0, 4, mpidr(1)));
}

#[test]
fn registers_set_between_exits_do_not_disturb_what_is_open() {
    let world = World::new(VmKind::Ordinary);
    assert_eq!(world.does(|_| load(DEVICE, 3)).reason, ExitReason::Mmio.code());
    world.sets(0, REGISTER_PC, GUEST + 0x100);
    let context = world.after(Answer::Complete, 0x55);
    assert_eq!((context.pc, context.x[3]), (GUEST + 0x104, 0x55));
}
