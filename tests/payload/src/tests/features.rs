//! What the ID registers offer works at EL1: nothing of it is trapped.

use crate::{
    rt::{
        cpu::{instruction, read_register, write_register},
        memory::{self, PAGE},
        probe::{Access, probe},
    },
    tests::{Failure, Outcome, arena, check, on_each_cpu},
};

const RET: u32 = 0xD65F_03C0;

/// `mrs x0, S<op0>_<op1>_C<n>_C<m>_<op2>`
const fn mrs(op0: u32, op1: u32, n: u32, m: u32, op2: u32) -> u32 {
    0xD530_0000 | (op0 - 2) << 19 | op1 << 16 | n << 12 | m << 8 | op2 << 5
}

/// Runs the instructions in a page of the arena that belongs to the CPU.
fn run(cpu: usize, what: &str, instructions: &[u32]) -> Outcome {
    let page = arena(16 * PAGE) + cpu as u64 * PAGE;
    let mut words = [RET; 16];
    words[..instructions.len()].copy_from_slice(instructions);
    for (index, pair) in words.as_chunks::<2>().0.iter().enumerate() {
        memory::store(page + index as u64 * 8, u64::from(pair[1]) << 32 | u64::from(pair[0]));
    }
    memory::publish_code();
    match probe(Access::Execute, page) {
        Ok(_) => Ok(()),
        Err(fault) => Err(Failure::new(format_args!("{what}: {fault:x?}"))),
    }
}

/// The field of 4 bits at `shift`.
fn field(register: u64, shift: u32) -> u64 {
    register >> shift & 0xF
}

pub(crate) fn basics() -> Outcome {
    on_each_cpu(|cpu| {
        run(cpu, "FP", &[0x9E67_0000])?; // fmov d0, x0
        run(cpu, "SIMD", &[0x4E08_0C00])?; // dup v0.2d, x0
        run(cpu, "ACTLR_EL1", &[mrs(3, 0, 1, 0, 1)])?;
        run(cpu, "CNTPCT_EL0", &[mrs(3, 3, 14, 0, 1)])?;
        run(cpu, "CNTVCT_EL0", &[mrs(3, 3, 14, 0, 2)])?;
        run(cpu, "CNTP_CTL_EL0", &[mrs(3, 3, 14, 2, 1)])?;
        run(cpu, "CNTP_CVAL_EL0", &[mrs(3, 3, 14, 2, 2)])?;
        run(cpu, "CNTV_CTL_EL0", &[mrs(3, 3, 14, 3, 1)])?;
        run(cpu, "CNTKCTL_EL1", &[mrs(3, 0, 14, 1, 0)])?;
        run(cpu, "ICC_SRE_EL1", &[mrs(3, 0, 12, 12, 5)])?;
        run(cpu, "ICC_CTLR_EL1", &[mrs(3, 0, 12, 12, 4)])?;
        run(cpu, "AT S1E1R", &[0xD508_7800])?;
        run(cpu, "TLBI VMALLE1IS", &[0xD508_831F])?;
        run(cpu, "DC CIVAC", &[0xD50B_7E20])?;
        run(cpu, "IC IALLUIS", &[0xD508_711F])?;
        check!(read_register!("ICC_SRE_EL1") & 1 != 0, "no system register interface to the GIC");
        Ok(())
    })
}

/// The virtual counter is the physical one: a host that was at EL2 before would see the same time.
pub(crate) fn time() -> Outcome {
    on_each_cpu(|_| {
        let before = read_register!("cntpct_el0");
        let virtual_count = read_register!("cntvct_el0");
        let after = read_register!("cntpct_el0");
        check!((before..=after).contains(&virtual_count), "CNTVOFF_EL2 is {:#x}", before.wrapping_sub(virtual_count));
        check!(read_register!("cntfrq_el0") != 0, "CNTFRQ_EL0 is 0");
        Ok(())
    })
}

pub(crate) fn debug_and_pmu() -> Outcome {
    on_each_cpu(|cpu| {
        let dfr0 = read_register!("id_aa64dfr0_el1");
        run(cpu, "MDSCR_EL1", &[mrs(2, 0, 0, 2, 2)])?;
        run(cpu, "OSLSR_EL1", &[mrs(2, 0, 1, 1, 4)])?;
        run(cpu, "DBGBVR0_EL1", &[mrs(2, 0, 0, 0, 4)])?;
        run(cpu, "DBGWCR0_EL1", &[mrs(2, 0, 0, 0, 7)])?;
        if !matches!(field(dfr0, 8), 0 | 0xF) {
            run(cpu, "PMCR_EL0", &[mrs(3, 3, 9, 12, 0)])?;
            run(cpu, "PMCCNTR_EL0", &[mrs(3, 3, 9, 13, 0)])?;
            run(cpu, "PMCCFILTR_EL0", &[mrs(3, 3, 14, 15, 7)])?;
            let counters = read_register!("pmcr_el0") >> 11 & 0x1F;
            if counters > 0 {
                run(cpu, "PMEVCNTR0_EL0", &[mrs(3, 3, 14, 8, 0)])?;
            }
        }
        Ok(())
    })
}

pub(crate) fn pointer_authentication() -> Outcome {
    on_each_cpu(|cpu| {
        let isar1 = read_register!("id_aa64isar1_el1");
        let isar2 = read_register!("s3_0_c0_c6_2");
        if field(isar1, 4) | field(isar1, 8) | field(isar2, 12) == 0 {
            return Ok(());
        }
        run(cpu, "APIAKeyLo_EL1", &[mrs(3, 0, 2, 1, 0), 0xD518_2100])?; // and back with MSR
        run(cpu, "APGAKeyHi_EL1", &[mrs(3, 0, 2, 3, 1)])?;
        let sctlr = read_register!("sctlr_el1");
        write_register!("sctlr_el1", sctlr | 1 << 31 | 1 << 30 | 1 << 27 | 1 << 13);
        // mov x9, x0; pacia x0, x30; autia x0, x30; sub x0, x0, x9; cbz x0, . + 8; brk #0
        let code = [0xAA00_03E9, 0xDAC1_03C0, 0xDAC1_13C0, 0xCB09_0000, 0xB400_0040, 0xD420_0000];
        let outcome = run(cpu, "PACIA and AUTIA", &code);
        write_register!("sctlr_el1", sctlr);
        outcome
    })
}

pub(crate) fn scalable_vectors() -> Outcome {
    on_each_cpu(|cpu| {
        let cpacr = read_register!("cpacr_el1");
        let outcome = (|| {
            if field(read_register!("id_aa64pfr0_el1"), 32) != 0 {
                write_register!("cpacr_el1", cpacr | 3 << 16);
                run(cpu, "ZCR_EL1", &[mrs(3, 0, 1, 2, 0), 0xD518_1200])?;
                run(cpu, "RDVL", &[0x04BF_5020])?;
                run(cpu, "PTRUE and DUP", &[0x2558_E3E0, 0x05E0_3800])?; // ptrue p0.h; dup z0.d, x0
            }
            if field(read_register!("id_aa64pfr1_el1"), 24) != 0 {
                write_register!("cpacr_el1", cpacr | 3 << 24 | 3 << 16);
                run(cpu, "SMCR_EL1", &[mrs(3, 0, 1, 2, 6), 0xD518_12C0])?;
                run(cpu, "SMPRI_EL1", &[mrs(3, 0, 1, 2, 4)])?;
                run(cpu, "TPIDR2_EL0", &[mrs(3, 3, 13, 0, 5)])?;
                run(cpu, "RDSVL", &[0x04BF_5820])?;
                run(cpu, "SMSTART, ZERO {ZA}, SMSTOP", &[0xD503_477F, 0xC008_00FF, 0xD503_467F])?;
            }
            Ok(())
        })();
        write_register!("cpacr_el1", cpacr);
        outcome
    })
}

/// Memory tagging works if it is offered, and is undefined if it is not (CVE-2026-0038).
pub(crate) fn memory_tagging() -> Outcome {
    on_each_cpu(|cpu| {
        let registers =
            [("GCR_EL1", mrs(3, 0, 1, 0, 6)), ("RGSR_EL1", mrs(3, 0, 1, 0, 5)), ("TFSR_EL1", mrs(3, 0, 5, 6, 0))];
        let level = field(read_register!("id_aa64pfr1_el1"), 8);
        for (name, instruction) in registers {
            let works = run(cpu, name, &[instruction]);
            if level >= 2 {
                works?;
            } else {
                check!(works.is_err(), "{name} can be read though ID_AA64PFR1_EL1.MTE is {level}");
            }
        }
        if level >= 1 {
            run(cpu, "IRG", &[0x9ADF_1000])?;
            run(cpu, "ADDG", &[0x9180_0400])?;
        }
        Ok(())
    })
}

/// Later extensions that need a bit of HCR_EL2 or HCRX_EL2.
pub(crate) fn extensions() -> Outcome {
    on_each_cpu(|cpu| {
        let isar0 = read_register!("id_aa64isar0_el1");
        let isar2 = read_register!("s3_0_c0_c6_2");
        let mmfr1 = read_register!("id_aa64mmfr1_el1");
        let mmfr3 = read_register!("s3_0_c0_c7_3");
        let pfr0 = read_register!("id_aa64pfr0_el1");
        let pfr1 = read_register!("id_aa64pfr1_el1");
        let pfr2 = read_register!("s3_0_c0_c4_2");
        let if_offered = |level: u64, what: &str, instructions: &[u32]| {
            if level == 0 { Ok(()) } else { run(cpu, what, instructions) }
        };
        // mov x9, #0; setp, setm, sete [x0]!, x9!, x2
        if_offered(field(isar2, 16), "FEAT_MOPS", &[0xD280_0009, 0x19C2_0520, 0x19C2_4520, 0x19C2_8520])?;
        if_offered(field(mmfr3, 0), "TCR2_EL1", &[mrs(3, 0, 2, 0, 3)])?;
        if_offered(field(mmfr3, 4), "SCTLR2_EL1", &[mrs(3, 0, 1, 0, 3)])?;
        if_offered(field(mmfr3, 8), "PIR_EL1", &[mrs(3, 0, 10, 2, 3)])?;
        if_offered(field(mmfr3, 8), "PIRE0_EL1", &[mrs(3, 0, 10, 2, 2)])?;
        if_offered(field(mmfr3, 16), "POR_EL1", &[mrs(3, 0, 10, 2, 4)])?;
        if_offered(field(mmfr3, 24), "MAIR2_EL1", &[mrs(3, 0, 10, 2, 1)])?;
        if_offered(field(mmfr1, 16), "LORC_EL1", &[mrs(3, 0, 10, 4, 3)])?;
        if_offered(field(isar0, 60), "RNDR", &[mrs(3, 3, 2, 4, 0)])?;
        if_offered(field(pfr0, 28), "ERRIDR_EL1", &[mrs(3, 0, 5, 3, 0)])?;
        if_offered(field(pfr0, 44), "AMCR_EL0", &[mrs(3, 3, 13, 2, 0)])?;
        if_offered(field(pfr1, 44), "GCSCR_EL1", &[mrs(3, 0, 2, 5, 0)])?;
        if_offered(field(pfr2, 32), "FPMR", &[mrs(3, 3, 4, 4, 2)])?;
        let has_scxtnum = field(pfr0, 56) >= 2 || field(pfr0, 56) == 1 && field(pfr1, 32) >= 2;
        if_offered(u64::from(has_scxtnum), "SCXTNUM_EL1", &[mrs(3, 0, 13, 0, 7)])
    })
}

/// Waiting for an event or an interrupt is not trapped for ever.
pub(crate) fn waiting() -> Outcome {
    on_each_cpu(|_| {
        instruction!("sev");
        instruction!("wfe");
        Ok(())
    })
}
