//! Exits of a guest: classes of exceptions, aborts, and loads and stores that a host performs.

use arbitrary::{Arbitrary, Unstructured};
use ravelin_abi::{RunEntry, VmKind};
use ravelin_memory::{Ipa, PAGE_SIZE};
use ravelin_vm::{
    Abort, Backing, Context, GuestExit, IdRegisters, Pending, PstateFeatures, Report, Syndrome, SysregAccess,
    SysregAction,
};

/// What a CPU reports, and what the host makes of it.
#[derive(Arbitrary, Debug)]
struct Input {
    esr: Esr,
    far: u64,
    hpfar: Hpfar,
    pstate: u64,
    sctlr_el1: u64,
    /// What the registers hold is made of this.
    seed: u64,
    backing: u8,
    kind: u8,
    features: [bool; 5],
    value: u64,
    now: u64,
}

/// HPFAR_EL2.
#[derive(Arbitrary, Debug)]
enum Hpfar {
    /// Of this page.
    Page(u32),
    Any(u64),
}

/// ESR_EL2.
#[derive(Arbitrary, Debug)]
enum Esr {
    Any(u64),
    /// A data abort by a load or store of this register, mostly in a translation: of every width and kind.
    Described {
        register: u8,
        status: Option<u8>,
        others: u16,
    },
    /// MSR or MRS.
    Sysreg(u32),
}

/// Bits of the ISS that say of a described access what is special: FnV, CM, S1PTW.
const SPECIAL: u16 = 1 << 10 | 1 << 8 | 1 << 7;

impl Esr {
    fn values(&self) -> Vec<u64> {
        match *self {
            Self::Any(esr) => vec![esr],
            Self::Described { register, status, others } => {
                let fixed = 0x24 << 26
                    | 1 << 24
                    | u64::from(register & 31) << 16
                    | u64::from(others & SPECIAL)
                    | u64::from(status.unwrap_or(7) & 0x3f);
                // SAS and SSE; SF; WnR.
                let kinds = (0..32).map(|n: u64| (n & 7) << 21 | (n >> 3 & 1) << 15 | (n >> 4 & 1) << 6);
                kinds.map(|kind| fixed | kind).collect()
            }
            Self::Sysreg(iss) => vec![0x18 << 26 | u64::from(iss & 0x01ff_ffff)],
        }
    }
}

/// Decodes what a CPU reports of an exit, handles it as the run loop does, and compares with what the architecture says.
pub fn mmio(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let mut context = Context {
        pc: input.seed & !3,
        pstate: input.pstate,
        sctlr_el1: input.sctlr_el1,
        vbar_el1: input.seed.rotate_left(7) & !0x7ff,
        cntp_cval_el0: input.seed.rotate_left(11),
        cntp_ctl_el0: input.seed & 3,
        ..Context::default()
    };
    for (number, register) in (1_u32..).zip(&mut context.x) {
        *register = input.seed.rotate_left(number) ^ u64::from(number) << 56 ^ u64::from(number);
    }
    let hpfar = match input.hpfar {
        Hpfar::Page(page) => u64::from(page) << 4,
        Hpfar::Any(hpfar) => hpfar,
    };
    for esr in input.esr.values() {
        // The end of the page, too, beyond which some accesses reach.
        for far in [input.far, input.far | 0xff8] {
            check(&input, &Syndrome { esr, far, hpfar }, context);
        }
    }
}

fn check(input: &Input, syndrome: &Syndrome, context: Context) {
    let exit = GuestExit::decode(syndrome, &context);
    assert_eq!(class(&exit), expected_class(syndrome.esr, context.is_aarch32()), "{exit:?}");
    match exit {
        GuestExit::Abort(abort) => check_abort(input, syndrome, abort, context),
        GuestExit::Sysreg(access) => check_sysreg(input, syndrome.esr, access, context),
        GuestExit::Hvc(immediate) | GuestExit::Smc(immediate) => {
            assert_eq!(u64::from(immediate), syndrome.esr & 0xffff);
        }
        _ => {}
    }
}

fn class(exit: &GuestExit) -> u64 {
    match exit {
        GuestExit::Wait => 1,
        GuestExit::Yield => 2,
        GuestExit::Hvc(_) => 3,
        GuestExit::Smc(_) => 4,
        GuestExit::Sysreg(_) => 5,
        GuestExit::Abort(_) => 6,
        GuestExit::FloatingPoint => 7,
        GuestExit::Sve => 8,
        GuestExit::Undefined => 9,
    }
}

/// What the exception class stands for (Arm ARM DDI 0487, D24.2.40).
fn expected_class(esr: u64, aarch32: bool) -> u64 {
    match (esr >> 26 & 0x3f, aarch32) {
        (0x20 | 0x24, _) => 6,
        (0x07, _) => 7,
        (0x01, false) => {
            if esr & 3 == 0 {
                1
            } else {
                2
            }
        }
        (0x16, false) => 3,
        (0x17, false) => 4,
        (0x18, false) => 5,
        (0x19, false) => 8,
        _ => 9,
    }
}

/// A load or store as the syndrome describes it.
struct Described {
    bytes: usize,
    register: usize,
    sign_extend: bool,
    wide: bool,
    write: bool,
}

/// Reads the description from the bits, if there is one.
fn described(esr: u64, aarch32: bool) -> Option<Described> {
    let bit = |number: u32| esr >> number & 1 != 0;
    (esr >> 26 & 0x3f == 0x24 && bit(24) && !bit(7) && !aarch32).then(|| Described {
        bytes: 1 << (esr >> 22 & 3),
        register: (esr >> 16 & 31) as usize,
        sign_extend: bit(21),
        wide: bit(15),
        write: bit(6),
    })
}

/// The page that stage 2 refused, where HPFAR_EL2 is valid.
fn refused_page(esr: u64, hpfar: u64) -> Option<u64> {
    let valid = match esr & 0x3f {
        ..=0x0b => true,
        0x0c..=0x0f => esr & 1 << 7 != 0,
        _ => false,
    };
    let page = (hpfar >> 4 & 0xfff_ffff_ffff) << 12;
    (valid && page < 1 << 48).then_some(page)
}

fn check_abort(input: &Input, syndrome: &Syndrome, abort: Abort, before: Context) {
    let esr = syndrome.esr;
    let data = esr >> 26 & 0x3f == 0x24;
    let maintenance = data && esr & 1 << 8 != 0;
    let page = refused_page(esr, syndrome.hpfar);
    assert_eq!(abort.page().map(Ipa::raw), page);
    let address = page.filter(|_| esr & (1 << 7 | 1 << 10) == 0).map(|page| page | syndrome.far & 0xfff);
    assert_eq!(abort.address().map(Ipa::raw), address);
    assert_eq!(abort.is_fetch(), !data);
    assert_eq!(abort.is_write(), data && esr & 1 << 6 != 0 && !maintenance);
    let expected = described(esr, before.is_aarch32())
        .filter(|expected| address.is_some_and(|address| address % PAGE_SIZE + expected.bytes as u64 <= PAGE_SIZE));
    let access = abort.access(&before);
    assert_eq!(
        access.map(|access| (usize::from(access.bytes()), access.is_write())),
        expected.as_ref().map(|expected| (expected.bytes, expected.write))
    );

    let backing = [Backing::Memory, Backing::Device, Backing::Nothing][usize::from(input.backing % 3)];
    let kind = [VmKind::Ordinary, VmKind::Pkvm, VmKind::Realm][usize::from(input.kind % 3)];
    let [pan, dit, ssbs, mte, nmi] = input.features;
    let features = PstateFeatures { pan, dit, ssbs, mte, nmi };
    let mut context = before;
    let handled = abort.handle(&mut context, access, backing, kind, features);
    let values = [input.value, !input.value].into_iter();
    let entries = values.flat_map(|value| (0..6).map(move |answer| RunEntry { answer, value, ..RunEntry::default() }));
    match (page, backing, expected) {
        (Some(page), Backing::Memory, _) => {
            let (report, pending) = handled.expect("the host is to provide the page");
            let seen = (kind == VmKind::Ordinary).then_some((abort.is_write(), !data));
            assert_eq!(report, Report::PageFault { page: Ipa::new(page).unwrap(), access: seen });
            assert_eq!(context, before, "it is not over");
            for entry in entries {
                answer(
                    pending,
                    &entry,
                    before,
                    features,
                    |_| None,
                    |after| is_external_abort(syndrome, &before, after),
                );
            }
        }
        (Some(_), Backing::Device, _) if maintenance && !before.is_aarch32() => {
            assert_eq!(handled, None);
            is_behind(&before, before, context);
        }
        (Some(_), Backing::Device, Some(expected)) => {
            let (report, pending) = handled.expect("the host is to perform it");
            let stored =
                expected.write.then(|| number(&in_memory(&before, &expected, register(&before, expected.register))));
            let bytes = expected.bytes as u8;
            assert_eq!(report, Report::Mmio { address: Ipa::new(address.unwrap()).unwrap(), bytes, stored });
            assert_eq!(context, before, "it is not over");
            let complete = |entry: &RunEntry| {
                let mut after = before;
                if !expected.write && expected.register < 31 {
                    after.x[expected.register] = loaded(&before, &expected, entry.value);
                }
                Some(after)
            };
            for entry in entries {
                answer(pending, &entry, before, features, complete, |after| {
                    is_external_abort(syndrome, &before, after)
                });
            }
        }
        _ => {
            assert_eq!(handled, None, "nobody can help");
            is_external_abort(syndrome, &before, &context);
        }
    }
}

/// Checks what the host's answer does. `complete` returns the registers but for the program counter if the host may say so.
fn answer(
    pending: Pending,
    entry: &RunEntry,
    before: Context,
    features: PstateFeatures,
    complete: impl Fn(&RunEntry) -> Option<Context>,
    is_aborted: impl Fn(&Context),
) {
    let (mut after, mut left) = (before, pending);
    let accepted = left.resume(&mut after, entry, features).is_ok();
    match (entry.answer, complete(entry)) {
        (0, _) => assert!(accepted && after == before, "retry"),
        (1, Some(expected)) => {
            assert!(accepted);
            is_behind(&before, expected, after);
        }
        (2, _) => {
            assert!(accepted);
            is_aborted(&after);
        }
        _ => {
            assert!(!accepted, "{entry:?}");
            assert_eq!((after, left), (before, pending), "a wrong answer changes nothing");
            return;
        }
    }
    assert_eq!(left, Pending::Nothing);
}

/// Demands `expected` with the instruction behind it: what belongs to it alone in PSTATE, BTYPE and SS, is gone.
fn is_behind(before: &Context, expected: Context, after: Context) {
    let pstate = before.pstate & !(0b11 << 10 | 1 << 21);
    assert_eq!(after, Context { pc: before.pc.wrapping_add(4), pstate, ..expected });
}

/// Demands that the guest takes an external abort and that nothing else has changed.
fn is_external_abort(syndrome: &Syndrome, before: &Context, after: &Context) {
    let from_el0 = before.pstate & 1 << 4 != 0 || before.pstate & 0xc == 0;
    let data = syndrome.esr >> 26 & 0x3f == 0x24;
    let class = if data { 0x24 } else { 0x20 } + u64::from(!from_el0);
    let kept = if data { 1 << 10 | 1 << 8 | 1 << 6 } else { 1 << 10 };
    let offset = match before.pstate {
        pstate if pstate & 1 << 4 != 0 => 0x600,
        _ if from_el0 => 0x400,
        pstate => (pstate & 1) * 0x200,
    };
    let expected = Context {
        esr_el1: class << 26 | 1 << 25 | syndrome.esr & kept | 0x10,
        far_el1: syndrome.far,
        elr_el1: before.pc,
        spsr_el1: before.pstate,
        pc: before.vbar_el1.wrapping_add(offset),
        pstate: after.pstate,
        ..*before
    };
    assert_eq!(*after, expected);
    // EL1h, and masked.
    assert_eq!(after.pstate & 0x3df, 0x3c5);
}

fn register(context: &Context, number: usize) -> u64 {
    context.x.get(number).copied().unwrap_or(0)
}

/// The bytes that an access of this width has in memory, lowest address first, if the register holds `value`; the same bytes
/// the other way round.
fn in_memory(context: &Context, access: &Described, value: u64) -> Vec<u8> {
    let mut bytes = value.to_le_bytes()[..access.bytes].to_vec();
    let big_endian = if context.pstate & 0xc == 0 { 1 << 24 } else { 1 << 25 };
    if context.sctlr_el1 & big_endian != 0 {
        bytes.reverse();
    }
    bytes
}

/// The number of these bytes, the first of which is the lowest.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// What a load leaves in its register where memory holds `value`.
fn loaded(context: &Context, access: &Described, value: u64) -> u64 {
    let value = number(&in_memory(context, access, value));
    let unused = 64 - 8 * access.bytes as u32;
    let value = if access.sign_extend { ((value << unused) as i64 >> unused) as u64 } else { value };
    if access.wide { value } else { value & 0xffff_ffff }
}

fn check_sysreg(input: &Input, esr: u64, access: SysregAccess, before: Context) {
    let number = (esr >> 5 & 31) as usize;
    let ids = IdRegisters { id_aa64pfr0_el1: input.seed, id_aa64mmfr2_el1: !input.seed, ..IdRegisters::default() };
    let mut after = before;
    let action = access.emulate(&mut after, &ids, input.now);
    let write = esr & 1 == 0;
    let source = register(&before, number);
    match action {
        SysregAction::Read(value) => {
            assert!(!write);
            let mut expected = before;
            if let Some(register) = expected.x.get_mut(number) {
                *register = value;
            }
            assert_eq!(after, expected);
        }
        SysregAction::Written => {
            assert!(write);
            let timer = Context { cntp_cval_el0: after.cntp_cval_el0, cntp_ctl_el0: after.cntp_ctl_el0, ..before };
            assert_eq!(after, timer, "only the timer keeps anything");
            assert!(after.cntp_ctl_el0 <= 3);
        }
        SysregAction::Sgi(_, value) | SysregAction::Deactivate(value) => {
            assert!(write);
            assert_eq!((value, after), (source, before));
        }
        SysregAction::Undefined => assert_eq!(after, before),
    }
    if let Some((register, value)) = access.id_value(&ids) {
        assert_eq!((usize::from(register), action), (number, SysregAction::Read(value)));
    }
}
