use proptest::prelude::*;
use ravelin_abi::RunPage;

use super::*;
use crate::{IdRegisters, SysregAction};

const NONE: PstateFeatures = PstateFeatures { pan: false, dit: false, ssbs: false, mte: false, nmi: false };
const DATA: u64 = 0x24 << 26;
const INSTRUCTION: u64 = 0x20 << 26;
const TRANSLATION_L3: u64 = 0x07;
const PAGE: u64 = 0x0900_0000;
const EL1H: u64 = 0x3c5;

fn context() -> Context {
    Context { pc: 0x8000, pstate: EL1H, vbar_el1: 0x1_0000, ..Context::default() }
}

fn abort(esr: u64, offset: u64) -> Abort {
    let syndrome = Syndrome { esr, far: 0xffff_8000_1234_5000 | offset, hpfar: PAGE >> 12 << 4 };
    match GuestExit::decode(&syndrome, &context()) {
        GuestExit::Abort(abort) => abort,
        other => panic!("{other:?}"),
    }
}

/// The syndrome of a load or store of 2^`log2_bytes` bytes, register x`register`.
fn transfer(log2_bytes: u64, register: u64, write: bool) -> u64 {
    DATA | 1 << 24 | log2_bytes << 22 | register << 16 | 1 << 15 | u64::from(write) << 6 | TRANSLATION_L3
}

fn decode(esr: u64, pstate: u64) -> GuestExit {
    GuestExit::decode(&Syndrome { esr, far: 0, hpfar: 0 }, &Context { pstate, ..context() })
}

/// Handles an abort with what is known of the access.
fn handled(
    abort: Abort,
    context: &mut Context,
    backing: Backing,
    kind: VmKind,
    features: PstateFeatures,
) -> Option<(Report, Pending)> {
    abort.handle(context, abort.access(context), backing, kind, features)
}

#[test]
fn classes_of_exceptions() {
    assert_eq!(decode(0x01 << 26, EL1H), GuestExit::Wait);
    for instruction in 1..4 {
        assert_eq!(decode(0x01 << 26 | instruction, EL1H), GuestExit::Yield);
    }
    assert_eq!(decode(0x16 << 26 | 1 << 25 | 0xabcd, EL1H), GuestExit::Hvc(0xabcd));
    assert_eq!(decode(0x17 << 26 | 1 << 25 | 0x1234, EL1H), GuestExit::Smc(0x1234));
    assert_eq!(decode(0x07 << 26, EL1H), GuestExit::FloatingPoint);
    assert_eq!(decode(0x19 << 26, EL1H), GuestExit::Sve);
    assert!(matches!(decode(0x18 << 26, EL1H), GuestExit::Sysreg(_)));
    assert!(matches!(decode(DATA, EL1H), GuestExit::Abort(_)));
    assert!(matches!(decode(INSTRUCTION, EL1H), GuestExit::Abort(_)));
    let known = [0x01, 0x07, 0x16, 0x17, 0x18, 0x19, 0x20, 0x24];
    for class in (0..0x40).filter(|class| !known.contains(class)) {
        assert_eq!(decode(class << 26, EL1H), GuestExit::Undefined, "{class:#x}");
    }
}

#[test]
fn what_aarch32_does_is_undefined_but_for_memory_and_floating_point() {
    for class in 0..0x40 {
        let exit = decode(class << 26, 0x10);
        match class {
            0x07 => assert_eq!(exit, GuestExit::FloatingPoint),
            0x20 | 0x24 => assert!(matches!(exit, GuestExit::Abort(_))),
            _ => assert_eq!(exit, GuestExit::Undefined, "{class:#x}"),
        }
    }
}

#[test]
fn the_address_is_known_for_faults_of_stage_2() {
    let page = Ipa::new(PAGE);
    for status in 0..=0x3f {
        let known = abort(DATA | status, 0x123);
        let on_walk = abort(DATA | 1 << 7 | status, 0x123);
        let expected = |valid| if valid { page } else { None };
        assert_eq!(known.page(), expected(status <= 0x0b), "{status:#x}");
        assert_eq!(on_walk.page(), expected(status <= 0x0f), "{status:#x}");
        assert_eq!(known.address(), Ipa::new(PAGE | 0x123).filter(|_| status <= 0x0b));
        assert_eq!(on_walk.address(), None);
    }
    assert_eq!(abort(DATA | 1 << 10 | TRANSLATION_L3, 0x123).address(), None);
    // IPA bits 51:48, with FEAT_LPA.
    let syndrome = Syndrome { esr: DATA | TRANSLATION_L3, far: 0, hpfar: 1 << 63 | 1 << 40 };
    let GuestExit::Abort(high) = GuestExit::decode(&syndrome, &context()) else { panic!() };
    assert_eq!(high.page(), None);
    // NS and other bits that are no part of the address.
    let syndrome = Syndrome { hpfar: 1 << 63 | 0xf | 0x10, ..syndrome };
    let GuestExit::Abort(low) = GuestExit::decode(&syndrome, &context()) else { panic!() };
    assert_eq!(low.page(), Ipa::new(0x1000));
}

#[test]
fn stores_to_devices() {
    let mut registers = context();
    registers.x[3] = 0x1122_3344_5566_7788;
    let before = registers;
    let (report, mut pending) =
        handled(abort(transfer(1, 3, true), 0xffe), &mut registers, Backing::Device, VmKind::Pkvm, NONE).unwrap();
    assert_eq!(
        report.run_exit(),
        RunExit { reason: 4, flags: 1, address: PAGE | 0xffe, size: 2, value: 0x7788, ..RunExit::default() }
    );
    assert_eq!(registers, before);
    assert_eq!(pending.resume(&mut registers, &RunEntry { answer: 1, value: 99, ..RunEntry::default() }, NONE), Ok(()));
    assert_eq!(registers, Context { pc: before.pc + 4, ..before });
    assert_eq!(pending, Pending::Nothing);
}

#[test]
fn loads_from_devices() {
    let mut registers = context();
    let before = registers;
    let (report, mut pending) =
        handled(abort(transfer(2, 30, false), 8), &mut registers, Backing::Device, VmKind::Pkvm, NONE).unwrap();
    assert_eq!(report.run_exit(), RunExit { reason: 4, address: PAGE | 8, size: 4, ..RunExit::default() });
    assert_eq!(
        pending.resume(&mut registers, &RunEntry { answer: 1, value: u64::MAX, ..RunEntry::default() }, NONE),
        Ok(())
    );
    let mut model = Context { pc: before.pc + 4, ..before };
    model.x[30] = 0xffff_ffff;
    assert_eq!(registers, model);
}

#[test]
fn an_abort_for_what_cannot_be_told_to_a_device() {
    for (esr, offset) in [
        (DATA | TRANSLATION_L3, 0),                  // no description: a pair, a vector, write-back
        (transfer(0, 0, false) | 1 << 7, 0),         // walk of the guest's tables
        (INSTRUCTION | 1 << 24 | TRANSLATION_L3, 0), // fetch
        (transfer(3, 0, true), 0xff9),               // over the end of the page
        (DATA | 0x10, 0),                            // something behind stage 2
        (transfer(0, 0, false) & !0x3f | 0x0f, 0),   // permission: no address
    ] {
        let mut registers = context();
        assert_eq!(handled(abort(esr, offset), &mut registers, Backing::Device, VmKind::Pkvm, NONE), None);
        assert_eq!(registers.pc, 0x1_0200);
        assert_eq!(registers.esr_el1 & 0x3f, 0x10);
        assert_eq!(registers.esr_el1 >> 26, if esr & 0x3f << 26 == DATA { 0x25 } else { 0x21 });
        assert_eq!(registers.far_el1, 0xffff_8000_1234_5000 | offset);
        assert_eq!((registers.elr_el1, registers.spsr_el1), (0x8000, EL1H));
    }
}

#[test]
fn nothing_is_an_abort() {
    let mut registers = context();
    assert_eq!(handled(abort(transfer(3, 0, true), 0), &mut registers, Backing::Nothing, VmKind::Pkvm, NONE), None);
    assert_eq!((registers.pc, registers.esr_el1), (0x1_0200, 0x25 << 26 | 1 << 25 | 1 << 6 | 0x10));
}

#[test]
fn cache_maintenance_on_a_device_does_nothing() {
    let mut registers = context();
    let esr = DATA | 1 << 8 | 1 << 6 | TRANSLATION_L3;
    assert_eq!(handled(abort(esr, 0), &mut registers, Backing::Device, VmKind::Pkvm, NONE), None);
    assert_eq!(registers, Context { pc: 0x8004, ..context() });
}

#[test]
fn a_missing_page_shows_no_value_and_no_offset() {
    let walk = DATA | 1 << 7 | TRANSLATION_L3;
    for (esr, flags) in [
        (transfer(3, 3, true), 1),
        (transfer(3, 3, false), 0),
        (INSTRUCTION | 1 << 6 | TRANSLATION_L3, 2),
        (DATA | 1 << 8 | 1 << 6 | TRANSLATION_L3, 0),
        (walk, 0),
    ] {
        for kind in [VmKind::Ordinary, VmKind::Pkvm, VmKind::Realm] {
            let mut registers = Context { x: [0x5ec2_e700; 31], ..context() };
            let before = registers;
            let fault = abort(esr, 0x678);
            let (report, mut pending) = handled(fault, &mut registers, Backing::Memory, kind, NONE).unwrap();
            let flags = if kind == VmKind::Ordinary { flags } else { 0 };
            assert_eq!(report.run_exit(), RunExit { reason: 5, flags, address: PAGE, ..RunExit::default() });
            assert_eq!(pending.resume(&mut registers, &RunEntry::default(), NONE), Ok(()));
            assert_eq!((registers, pending), (before, Pending::Nothing));
        }
    }
}

#[test]
fn answers_that_belong_to_an_exit() {
    let mmio =
        Pending::Mmio(abort(transfer(0, 1, false), 0), MmioAccess::decode(transfer(0, 1, false), &context()).unwrap());
    let fault = Pending::PageFault(abort(transfer(0, 1, false), 0));
    let outcome = |pending: Pending, answer| {
        let (mut pending, mut registers) = (pending, context());
        let result = pending.resume(&mut registers, &RunEntry { answer, ..RunEntry::default() }, NONE);
        result.map(|()| {
            assert_eq!(pending, Pending::Nothing);
            registers.pc
        })
    };
    let (same, next, vector) = (Ok(0x8000), Ok(0x8004), Ok(0x1_0200));
    let wrong = Err(WrongAnswer);
    for (pending, expected) in [
        (Pending::Nothing, [same, wrong, wrong, wrong]),
        (mmio, [same, next, vector, wrong]),
        (fault, [same, wrong, vector, wrong]),
    ] {
        for (answer, expected) in (0..).zip(expected) {
            assert_eq!(outcome(pending, answer), expected, "{pending:?} {answer}");
        }
        assert_eq!(outcome(pending, 4), wrong);
        assert_eq!(outcome(pending, u64::MAX), wrong);
        assert_eq!(outcome(pending, 1 << 32), wrong);
    }
}

#[test]
fn a_wrong_answer_changes_nothing() {
    let mut pending = Pending::PageFault(abort(transfer(0, 1, false), 0));
    let (before, mut registers) = (pending, context());
    assert_eq!(
        pending.resume(&mut registers, &RunEntry { answer: 1, value: 7, ..RunEntry::default() }, NONE),
        Err(WrongAnswer)
    );
    assert_eq!((pending, registers), (before, context()));
}

#[test]
fn reports_without_registers() {
    let range = IpaRange::new(0x4000_0000, 3).unwrap();
    let zero = RunExit::default();
    let pages = RunExit { address: 0x4000_0000, pages: 3, ..zero };
    for (report, expected) in [
        (Report::Interrupted, RunExit { reason: 1, ..zero }),
        (Report::Wait { deadline: Some(77) }, RunExit { reason: 2, deadline: 77, ..zero }),
        (Report::Wait { deadline: None }, RunExit { reason: 2, deadline: u64::MAX, ..zero }),
        (Report::Yield, RunExit { reason: 3, ..zero }),
        (Report::CpuOn { vcpu: 5 }, RunExit { reason: 6, vcpu: 5, ..zero }),
        (Report::CpuOff, RunExit { reason: 7, ..zero }),
        (Report::SystemOff, RunExit { reason: 8, ..zero }),
        (Report::SystemReset, RunExit { reason: 9, ..zero }),
        (Report::Unshare(range), RunExit { reason: 10, ..pages }),
        (Report::Shared(range), RunExit { reason: 11, ..pages }),
        (Report::Relinquished(range), RunExit { reason: 12, ..pages }),
        (Report::NeedsTables { pages: 2 }, RunExit { reason: 13, pages: 2, ..zero }),
        (Report::HostCall { immediate: 0xffff }, RunExit { reason: 14, value: 0xffff, ..zero }),
        (Report::Failed, RunExit { reason: 15, ..zero }),
    ] {
        assert_eq!(report.run_exit(), expected);
    }
}

/// A context each of whose registers has a value of its own: each 16 bits of it tell which register it is of, and which
/// part, and are above [`SECRET`], as nothing else that these tests put into a page.
fn secrets() -> Context {
    let mut context = Context::default();
    let mut number = 0;
    let mut secret = || {
        number += 1;
        (0..4).fold(0, |value, part| value | (SECRET | number << 2 | part) << (16 * part))
    };
    context.x.fill_with(&mut secret);
    macro_rules! fill {
        ($($register:ident),+) => { $(context.$register = secret();)+ };
    }
    fill!(
        sp_el0,
        pc,
        sp_el1,
        elr_el1,
        spsr_el1,
        esr_el1,
        far_el1,
        afsr0_el1,
        afsr1_el1,
        vbar_el1,
        vdisr_el2,
        cpacr_el1,
        ttbr0_el1,
        ttbr1_el1,
        tcr_el1,
        mair_el1,
        amair_el1,
        contextidr_el1,
        par_el1,
        csselr_el1,
        tpidr_el0,
        tpidrro_el0,
        tpidr_el1,
        cntkctl_el1,
        cntv_ctl_el0,
        cntv_cval_el0,
        cntp_ctl_el0,
        cntp_cval_el0,
        cntvoff_el2,
        vmpidr_el2,
        apiakeylo_el1,
        apiakeyhi_el1,
        apibkeylo_el1,
        apibkeyhi_el1,
        apdakeylo_el1,
        apdakeyhi_el1,
        apdbkeylo_el1,
        apdbkeyhi_el1,
        apgakeylo_el1,
        apgakeyhi_el1,
        tcr2_el1,
        sctlr2_el1,
        pir_el1,
        pire0_el1,
        por_el1,
        por_el0,
        pstate,
        sctlr_el1
    );
    context
}

const SECRET: u64 = 0xe000;

/// What a run page holds after an exit.
fn page(report: &Report) -> Vec<u8> {
    let mut page = vec![0; size_of::<RunPage>()];
    page[RunPage::EXIT..][..RunExit::SIZE].copy_from_slice(&report.run_exit().to_bytes());
    page
}

/// Where in a page there are 16 bits of a secret, in either byte order and at any address.
fn leaks(page: &[u8]) -> Vec<usize> {
    let secret = |pair: &[u8]| pair.iter().any(|&byte| byte >= 0xe0);
    (0..page.len() - 1).filter(|&at| secret(&page[at..at + 2])).collect()
}

/// What the run loop does with an exit, as far as it is decided here.
fn run_loop(context: &mut Context, syndrome: &Syndrome, backing: Backing, kind: VmKind) -> Option<(Report, Pending)> {
    match GuestExit::decode(syndrome, context) {
        GuestExit::Wait => {
            context.skip_instruction();
            Some((Report::Wait { deadline: context.next_timer(0) }, Pending::Nothing))
        }
        GuestExit::Yield => {
            context.skip_instruction();
            Some((Report::Yield, Pending::Nothing))
        }
        GuestExit::Abort(abort) => handled(abort, context, backing, kind, NONE),
        GuestExit::Sysreg(access) => {
            match access.emulate(context, &IdRegisters::default(), 0) {
                SysregAction::Undefined => context.take_undefined(NONE),
                _ => context.skip_instruction(),
            }
            None
        }
        GuestExit::Undefined => {
            context.take_undefined(NONE);
            None
        }
        GuestExit::Hvc(_) | GuestExit::Smc(_) | GuestExit::FloatingPoint | GuestExit::Sve => {
            Some((Report::Interrupted, Pending::Nothing))
        }
    }
}

fn backing() -> impl Strategy<Value = Backing> {
    prop_oneof![Just(Backing::Memory), Just(Backing::Device), Just(Backing::Nothing)]
}

fn kind() -> impl Strategy<Value = VmKind> {
    prop_oneof![Just(VmKind::Ordinary), Just(VmKind::Pkvm), Just(VmKind::Realm)]
}

/// Syndromes of all classes, and often of those that matter most.
fn esr() -> impl Strategy<Value = u64> {
    let class = prop_oneof![0_u64..0x40, Just(0x24_u64), Just(0x20_u64), Just(0x18_u64), Just(0x01_u64)];
    let described = prop_oneof![Just(0), Just(1_u64 << 24)];
    let status = prop_oneof![0_u64..0x40, Just(TRANSLATION_L3)];
    (class, described, 0_u64..1 << 25, status)
        .prop_map(|(class, described, iss, status)| class << 26 | 1 << 25 | described | iss & !0x3f | status)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 4096 }))]

    /// The one thing in the page that comes from a register is what a store stores, or the next timer of a guest that
    /// waits. Not the faulting virtual address, not the syndrome.
    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn no_secret_gets_into_the_page(
        esr in esr(),
        offset in 0_u64..0x1000,
        frame in 0_u64..1 << 36,
        (aarch64, big_endian, ipa_only) in any::<(bool, bool, bool)>(),
        backing in backing(),
        kind in kind(),
    ) {
        // No byte of the guest address looks like a secret.
        let (offset, frame) = (offset & 0x1f1f, frame & 0x1_f1f1_f1f1);
        let mut registers = secrets();
        registers.pstate = if aarch64 { EL1H } else { 0x10 };
        registers.sctlr_el1 = if big_endian { 3 << 24 } else { 0 };
        if ipa_only {
            registers.cntv_ctl_el0 = 0;
            registers.cntp_ctl_el0 = 0;
        }
        let before = registers;
        let syndrome = Syndrome { esr, far: secrets().far_el1 & !0xfff | offset, hpfar: frame << 4 };
        if let Some((report, _)) = run_loop(&mut registers, &syndrome, backing, kind) {
            let allowed = match report {
                Report::Mmio { bytes, stored: Some(stored), .. } => {
                    prop_assert_eq!(backing, Backing::Device);
                    let register = before.register((esr >> 16 & 0x1f) as u8).to_le_bytes();
                    let mut expected = [0; 8];
                    expected[..bytes.into()].copy_from_slice(&register[..bytes.into()]);
                    if big_endian {
                        expected[..bytes.into()].reverse();
                    }
                    prop_assert_eq!(stored.to_le_bytes(), expected);
                    report.run_exit().value
                }
                Report::Wait { deadline } => {
                    prop_assert_eq!(deadline, before.next_timer(0));
                    report.run_exit().deadline
                }
                _ => 0,
            };
            let mut page = page(&report);
            // All of what is allowed is in one place; take it away.
            if allowed != 0 {
                let at = page.chunks(8).position(|word| word == allowed.to_le_bytes()).unwrap();
                page[8 * at..][..8].fill(0);
            }
            prop_assert_eq!(leaks(&page), Vec::<usize>::new(), "{:?}", report);
        }
    }

    /// What the host answers changes the register that was to be loaded, or has the guest take an external abort, or
    /// changes nothing at all.
    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn an_answer_changes_one_register(
        esr in esr(),
        hpfar: u64,
        backing in backing(),
        kind in kind(),
        answer in prop_oneof![0_u64..5, any::<u64>()],
        value: u64,
    ) {
        let mut registers = Context { pstate: EL1H, sctlr_el1: 0, ..secrets() };
        let syndrome = Syndrome { esr, far: 0x123, hpfar };
        if let Some((report, mut pending)) = run_loop(&mut registers, &syndrome, backing, kind) {
            let before = registers;
            let open = pending;
            let result = pending.resume(&mut registers, &RunEntry { answer, value, ..RunEntry::default() }, NONE);
            let mut model = before;
            match (result, answer, report) {
                (Ok(()), 0, _) | (Err(WrongAnswer), _, _) => {}
                (Ok(()), 1, Report::Mmio { stored, .. }) => {
                    let number = (esr >> 16 & 0x1f) as u8;
                    if stored.is_none() {
                        model.set_register(number, registers.register(number));
                    }
                    model.skip_instruction();
                }
                (Ok(()), 2, Report::Mmio { .. } | Report::PageFault { .. }) => {
                    model.take(&before.trapped(esr, 0x123).external_abort(NONE));
                }
                other => prop_assert!(false, "{:?}", other),
            }
            prop_assert_eq!(registers, model);
            prop_assert_eq!(pending, if result.is_ok() { Pending::Nothing } else { open });
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn the_test_for_leaks_finds_one() {
    let registers = secrets();
    for register in registers.x.into_iter().chain([registers.far_el1, registers.por_el0, registers.apgakeyhi_el1]) {
        for value in [register, register >> 32, register & 0xffff, register.swap_bytes()] {
            assert!(!leaks(&page(&Report::Wait { deadline: Some(value) })).is_empty());
        }
    }
    assert!(leaks(&page(&Report::Wait { deadline: Some(0x1234_5678) })).is_empty());
}

#[test]
fn only_loads_of_id_registers_are_done_at_once() {
    let ids = IdRegisters { id_aa64pfr0_el1: 0x123, ..IdRegisters::default() };
    // MRS x5, ID_AA64PFR0_EL1.
    let esr = 0x18 << 26 | 3 << 20 | 4 << 1 | 5 << 5 | 1;
    let before = context();
    let mut after = before;
    assert!(shows_id_register(esr, &mut after, &ids));
    assert_eq!((after.x[5], after.pc), (0x123, before.pc.wrapping_add(4)));
    // MSR, SCTLR_EL1, another class.
    for other in [esr & !1, esr | 1 << 10, esr ^ 1 << 26] {
        let mut after = before;
        assert!(!shows_id_register(other, &mut after, &ids));
        assert_eq!(after, before);
    }
}
