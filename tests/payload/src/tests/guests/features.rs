//! What guests see of the CPU's features, and what is closed to them.

use ravelin_abi::{ExitReason, VmKind};

use crate::{
    rt::{
        cpu::{instruction, read_register, write_register},
        gic, memory,
        probe::{Access, probe},
        vm::{Guest, IPA_BITS, Pages, Vm, block_of},
    },
    tests::{Failure, Outcome, check, check_eq, guests::exits::begin_to_spin},
};

const MIB: u64 = 1 << 20;
const RET: u32 = 0xd65f_03c0;

/// op0 to op2 of a system register.
pub(super) type Encoding = [u32; 5];

fn operands([op0, op1, n, m, op2]: Encoding) -> u32 {
    (op0 - 2) << 19 | op1 << 16 | n << 12 | m << 8 | op2 << 5
}

/// Code of one instruction.
pub(super) fn single(instruction: u32) -> [u64; 1] {
    [u64::from(RET) << 32 | u64::from(instruction)]
}

/// Reads a register into x0.
pub(super) fn mrs(register: Encoding) -> [u64; 1] {
    single(0xd530_0000 | operands(register))
}

/// Writes x0 to a register.
pub(super) fn msr(register: Encoding) -> [u64; 1] {
    single(0xd510_0000 | operands(register))
}

/// The field of 4 bits at `shift`.
fn field(register: u64, shift: u32) -> u64 {
    register >> shift & 0xf
}

/// op2, shift and name of a field of an ID register.
type Field = (u32, u32, &'static str);

/// Fields of ID registers that are 0 in a guest: in S3_0_C0_C4 (processor features), C5 (debug), C6
/// (instructions) and C7 (memory model).
const HIDDEN: [(u32, &[Field]); 4] = [
    (
        4,
        &[
            (0, 8, "EL2"),
            (0, 12, "EL3"),
            (0, 36, "SEL2"),
            (0, 40, "MPAM"),
            (0, 44, "AMU"),
            (0, 52, "RME"),
            (1, 8, "MTE"),
            (1, 16, "MPAM_frac"),
            (1, 24, "SME"),
            (1, 36, "NMI"),
            (1, 40, "MTE_frac"),
            (1, 44, "GCS"),
            (5, 0, "SMFR0"),
            (5, 32, "SMFR0"),
        ],
    ),
    (
        5,
        &[
            (0, 4, "TraceVer"),
            (0, 8, "PMUVer"),
            (0, 32, "PMSVer"),
            (0, 40, "TraceFilt"),
            (0, 44, "TRBE"),
            (0, 52, "BRBE"),
        ],
    ),
    (6, &[(0, 24, "TME"), (1, 60, "LS64"), (2, 0, "WFxT"), (2, 16, "MOPS")]),
    (
        7,
        &[
            (0, 56, "FGT"),
            (1, 8, "VH"),
            (1, 16, "LO"),
            (1, 28, "XNX"),
            (1, 32, "TWED"),
            (1, 40, "HCX"),
            (2, 24, "NV"),
            (2, 40, "FWB"),
        ],
    ),
];

/// Guests of all kinds see the same features, none of those whose state is not theirs, and no more than the CPU has.
pub(crate) fn id_registers() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        let mut read = |register: Encoding| Ok::<_, Failure>(guest.run(&mrs(register), &[])?[0]);
        for m in 1..=3 {
            for op2 in 0..8 {
                check_eq!(read([3, 0, 0, m, op2])?, 0, "AArch32 register S3_0_C0_C{m}_{op2}");
            }
        }
        for (m, fields) in HIDDEN {
            for &(op2, shift, name) in fields {
                check_eq!(field(read([3, 0, 0, m, op2])?, shift), 0, "{name} of S3_0_C0_C{m}_{op2}");
            }
        }
        let pfr0 = read([3, 0, 0, 4, 0])?;
        let of_host = read_register!("id_aa64pfr0_el1");
        check_eq!(pfr0 & 0xff, 0x11, "EL0 and EL1 of ID_AA64PFR0_EL1, AArch64 only");
        for (shift, name) in [(16, "FP"), (20, "AdvSIMD"), (24, "GIC"), (32, "SVE"), (48, "DIT"), (60, "CSV3")] {
            check_eq!(field(pfr0, shift), field(of_host, shift), "{name}");
        }
        check_eq!(field(read([3, 0, 0, 5, 0])?, 0), 6, "DebugVer");
        check_eq!(read([3, 0, 0, 7, 0])? & 0xf, if IPA_BITS == 36 { 1 } else { 0 }, "PARange");
        // Pointer authentication and other instructions as they are.
        let mask = 0x0fff_ffff_ffff_ffff;
        check_eq!(
            read([3, 0, 0, 6, 0])? & mask & !(0xf << 24),
            read_register!("id_aa64isar0_el1") & mask & !(0xf << 24),
            "ISAR0"
        );
        check_eq!(
            read([3, 0, 0, 6, 1])? & 0xff00_0ff0,
            read_register!("id_aa64isar1_el1") & 0xff00_0ff0,
            "pointer authentication"
        );
        check_eq!(read([3, 0, 0, 0, 0])?, read_register!("midr_el1"), "MIDR_EL1");
        check_eq!(read([3, 0, 0, 0, 5])?, 1 << 31, "MPIDR_EL1");
        check_eq!(read([3, 3, 0, 0, 1])?, read_register!("ctr_el0"), "CTR_EL0");
        check_eq!(read([3, 3, 0, 0, 7])?, read_register!("dczid_el0"), "DCZID_EL0");
        check_eq!(read([3, 3, 14, 0, 0])?, read_register!("cntfrq_el0"), "CNTFRQ_EL0");
        vm.finish()?;
    }
    Ok(())
}

/// Registers that read as this value and ignore writes.
const INERT: [(Encoding, u64, &str); 9] = [
    ([2, 0, 0, 2, 2], 0, "MDSCR_EL1"),
    ([2, 0, 0, 0, 4], 0, "DBGBVR0_EL1"),
    ([2, 0, 0, 1, 5], 0, "DBGBCR1_EL1"),
    ([2, 0, 0, 0, 6], 0, "DBGWVR0_EL1"),
    ([2, 0, 0, 1, 7], 0, "DBGWCR1_EL1"),
    ([2, 0, 1, 3, 4], 0, "OSDLR_EL1"),
    ([2, 0, 0, 2, 0], 0, "MDCCINT_EL1"),
    ([3, 0, 1, 0, 1], 0, "ACTLR_EL1"),
    ([3, 0, 12, 12, 5], 7, "ICC_SRE_EL1"),
];

/// Registers that are not there.
const CLOSED: [(Encoding, &str); 42] = [
    ([3, 3, 9, 12, 0], "PMCR_EL0"),
    ([3, 3, 9, 12, 1], "PMCNTENSET_EL0"),
    ([3, 3, 9, 12, 5], "PMSELR_EL0"),
    ([3, 3, 9, 13, 0], "PMCCNTR_EL0"),
    ([3, 3, 9, 13, 2], "PMXEVCNTR_EL0"),
    ([3, 3, 9, 14, 0], "PMUSERENR_EL0"),
    ([3, 0, 9, 14, 1], "PMINTENSET_EL1"),
    ([3, 3, 14, 8, 0], "PMEVCNTR0_EL0"),
    ([3, 3, 14, 15, 7], "PMCCFILTR_EL0"),
    ([3, 0, 9, 9, 0], "PMSCR_EL1"),
    ([3, 0, 9, 10, 0], "PMBLIMITR_EL1"),
    ([3, 0, 9, 11, 0], "TRBLIMITR_EL1"),
    ([3, 0, 1, 2, 1], "TRFCR_EL1"),
    ([2, 1, 0, 1, 0], "TRCPRGCTLR"),
    ([2, 1, 9, 0, 0], "BRBCR_EL1"),
    ([3, 3, 13, 2, 0], "AMCR_EL0"),
    ([3, 3, 13, 4, 0], "AMEVCNTR00_EL0"),
    ([3, 0, 1, 2, 6], "SMCR_EL1"),
    ([3, 0, 1, 2, 4], "SMPRI_EL1"),
    ([3, 3, 4, 2, 2], "SVCR"),
    ([3, 3, 13, 0, 5], "TPIDR2_EL0"),
    ([3, 0, 1, 0, 6], "GCR_EL1"),
    ([3, 0, 1, 0, 5], "RGSR_EL1"),
    ([3, 0, 5, 6, 0], "TFSR_EL1"),
    ([3, 0, 5, 6, 1], "TFSRE0_EL1"),
    ([3, 0, 10, 5, 0], "MPAM1_EL1"),
    ([3, 0, 10, 5, 1], "MPAM0_EL1"),
    ([3, 0, 10, 4, 4], "MPAMIDR_EL1"),
    ([3, 0, 13, 0, 7], "SCXTNUM_EL1"),
    ([3, 3, 13, 0, 7], "SCXTNUM_EL0"),
    ([3, 0, 10, 4, 3], "LORC_EL1"),
    ([3, 0, 10, 2, 1], "MAIR2_EL1"),
    ([3, 0, 2, 5, 0], "GCSCR_EL1"),
    ([3, 0, 13, 0, 5], "ACCDATA_EL1"),
    ([3, 3, 4, 4, 2], "FPMR"),
    ([3, 0, 15, 0, 0], "S3_0_C15_C0_0"),
    ([3, 1, 15, 2, 0], "S3_1_C15_C2_0"),
    ([3, 4, 1, 1, 0], "HCR_EL2"),
    ([3, 4, 12, 11, 0], "ICH_HCR_EL2"),
    ([3, 4, 12, 9, 5], "ICC_SRE_EL2"),
    ([3, 4, 14, 0, 3], "CNTVOFF_EL2"),
    ([3, 5, 1, 0, 0], "SCTLR_EL12"),
];

/// Debug registers do nothing; those of performance monitors, trace, and of features that guests do not see, are undefined.
pub(crate) fn closed_registers() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let mut guest = vm.guest(0);
    for (register, value, name) in INERT {
        guest.run(&msr(register), &[u64::MAX])?;
        check_eq!(guest.run(&mrs(register), &[0x5a5a])?[0], value, "{name}");
    }
    check_eq!(guest.run(&mrs([2, 0, 1, 1, 4]), &[])?[0], 8, "OSLSR_EL1");
    // What the guest itself says of SVE and SME comes first.
    const CPACR: Encoding = [3, 0, 1, 0, 2];
    let cpacr = guest.run(&mrs(CPACR), &[])?[0];
    guest.run(&msr(CPACR), &[cpacr | 3 << 24 | 3 << 16])?;
    for (register, name) in CLOSED {
        for code in [mrs(register), msr(register)] {
            let reply = guest.attempt(&code, &[0])?;
            let undefined = reply.exception.is_some_and(|exception| exception.is_undefined() && exception.offset == 0);
            check!(undefined, "{name} is not undefined: {:x?}", reply.exception);
        }
    }
    for (instruction, name) in
        [(0x19c2_0520, "SETP"), (0xf83f_d000, "LD64B"), (0xd503_477f, "SMSTART"), (0xd50c_8700, "TLBI ALLE2")]
    {
        // Addresses that do no harm if it works.
        let reply = guest.attempt(&single(instruction), &[block_of(0) + 0x2000, 0, 0])?;
        let undefined = reply.exception.is_some_and(|exception| exception.is_undefined());
        check!(undefined, "{name} is not undefined: {:x?}", reply.exception);
    }
    vm.finish()
}

/// The host's cycle counter stands still while a guest runs, if the CPU has one that counts.
pub(crate) fn cycles_of_guests_are_not_counted() -> Outcome {
    if matches!(field(read_register!("id_aa64dfr0_el1"), 8), 0 | 0xf) {
        return Ok(());
    }
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let mut guest = vm.guest(0);
    begin_to_spin(&mut guest)?;
    let control = read_register!("pmcr_el0");
    write_register!("pmccfiltr_el0", 0);
    write_register!("pmcntenset_el0", 1 << 31);
    write_register!("pmcr_el0", 1 << 6 | 1);
    let ticks = read_register!("cntfrq_el0") / 50;
    let counted = |body: &mut dyn FnMut() -> Outcome| {
        let (cycles, time) = (read_register!("pmccntr_el0"), read_register!("cntpct_el0"));
        body()?;
        let (cycles, time) = (read_register!("pmccntr_el0") - cycles, read_register!("cntpct_el0") - time);
        Ok::<_, Failure>((cycles, time))
    };
    let own = counted(&mut || {
        gic::arm_timer(ticks);
        while !gic::timer_fired() {
            core::hint::spin_loop();
        }
        Ok(())
    });
    let of_guest = counted(&mut || {
        gic::arm_timer(ticks);
        let exit = guest.run_once()?;
        check_eq!(exit.reason, ExitReason::Interrupted.code(), "exit");
        Ok(())
    });
    gic::stop_timer();
    write_register!("pmcntenclr_el0", 1 << 31);
    write_register!("pmcr_el0", control);
    let ((own_cycles, own_time), (cycles, time)) = (own?, of_guest?);
    check!(time >= ticks, "the guest ran for {time} ticks only");
    // Per tick a quarter at most of what the host has.
    let (here, there) = (own_cycles / own_time.max(1), cycles / time.max(1));
    check!(own_cycles == 0 || there * 4 <= here, "{here} cycles a tick at the host, {there} in the guest");
    vm.finish()
}

/// The host's breakpoints are for the host.
pub(crate) fn breakpoints_of_the_host() -> Outcome {
    const ENABLED: u64 = 0x1e7; // at EL0 and EL1, all four bytes
    const BREAKPOINT: u64 = 0x31;
    // msr daifclr, #8; nop; msr daifset, #8; ret
    const CODE: [u64; 2] = [0xd503_201f_d503_48ff, 0xd65f_03c0_d503_48df];
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let mut guest = vm.guest(0);
    let page = pages.take(1)?;
    for (index, word) in (0..).zip(CODE) {
        memory::store(page + 8 * index, word);
    }
    memory::publish_code();
    guest.run(&CODE, &[])?;

    let mdscr = read_register!("mdscr_el1");
    write_register!("oslar_el1", 0);
    write_register!("dbgbcr0_el1", ENABLED);
    write_register!("mdscr_el1", mdscr | 1 << 15 | 1 << 13);
    write_register!("dbgbvr0_el1", page + 4);
    let here = probe(Access::Execute, page);
    instruction!("msr daifset, #8");
    // Where the guest has the second instruction.
    write_register!("dbgbvr0_el1", block_of(0) + 0x1000 + 4);
    let there = guest.attempt(&CODE, &[]);
    write_register!("dbgbcr0_el1", 0);
    write_register!("mdscr_el1", mdscr);
    check!(here.is_err_and(|fault| fault.class() == BREAKPOINT), "no breakpoint at the host: {here:x?}");
    check_eq!(there?.exception, None, "exception in the guest");
    vm.finish()
}

/// What the ID registers offer works in a guest: nothing of it is trapped.
pub(crate) fn offered_features_work() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Realm, 1)?;
    let mut guest = vm.guest(0);
    let read = |guest: &mut Guest<'_>, m, op2| Ok::<_, Failure>(guest.run(&mrs([3, 0, 0, m, op2]), &[])?[0]);
    let isar0 = read(&mut guest, 6, 0)?;
    let isar1 = read(&mut guest, 6, 1)?;
    let isar2 = read(&mut guest, 6, 2)?;
    let mmfr3 = read(&mut guest, 7, 3)?;
    if field(isar0, 60) != 0 {
        guest.run(&mrs([3, 3, 2, 4, 0]), &[])?; // RNDR
    }
    if field(isar1, 4) | field(isar1, 8) | field(isar2, 12) != 0 {
        let sctlr = guest.run(&mrs([3, 0, 1, 0, 0]), &[])?[0];
        guest.run(&msr([3, 0, 1, 0, 0]), &[sctlr | 1 << 31])?;
        // pacia x0, x1; mov x2, x0; autia x0, x1; ret
        let code = [0xaa00_03e2_dac1_0020, 0xd65f_03c0_dac1_1020];
        let [back, _, signed, ..] = guest.run(&code, &[0x1234_5678, 77])?;
        check_eq!(back, 0x1234_5678, "pointer after AUTIA");
        check!(signed != 0x1234_5678, "PACIA has not signed");
    }
    if field(mmfr3, 0) != 0 {
        guest.run(&mrs([3, 0, 2, 0, 3]), &[])?; // TCR2_EL1
    }
    if field(isar0, 20) != 0 {
        // ldadd x1, x0, [x2], in the block
        let code = [u64::from(RET) << 32 | 0xf821_0040];
        check_eq!(guest.run(&code, &[1, 5, block_of(0) + 0x2000])?[0], 0, "LDADD");
    }
    vm.finish()
}
