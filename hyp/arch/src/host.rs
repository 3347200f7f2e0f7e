//! The state of EL2 in which a CPU runs the host.
//!
//! What a kernel at EL1 may expect where there is an EL2 is listed in Documentation/arch/arm64/booting.rst. Each register
//! here answers one of its demands, or keeps the host from EL2's own state.

use ravelin_memory::PhysAddr;
use ravelin_pgtable::PhysicalSize;

use crate::{
    features::Features,
    guest,
    sysreg::{id_field, maintain, read_sysreg, write_lower_sysreg},
};

/// What this CPU lacks for running Ravelin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacking {
    /// The 4 KiB granule at stage 1 or stage 2.
    Granule,
    /// A GICv3 or v4 CPU interface with system registers.
    GicCpuInterface,
    /// AArch64 at EL1.
    AArch64El1,
}

impl core::fmt::Display for Lacking {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Granule => "it has no 4 KiB translation granule",
            Self::GicCpuInterface => "it has no GICv3 CPU interface (a GICv2 machine?)",
            Self::AArch64El1 => "its EL1 has no AArch64 state",
        })
    }
}

/// Checks that this CPU has what Ravelin needs.
///
/// # Errors
///
/// The first thing that is missing.
pub fn check_cpu() -> Result<(), Lacking> {
    let mmfr0 = read_sysreg!("id_aa64mmfr0_el1");
    // TGran4_2: 0 means as TGran4, 1 means not supported at stage 2. TGran4: 0b1111 means not supported.
    if id_field(mmfr0, 28) == 0xf || id_field(mmfr0, 40) == 1 {
        return Err(Lacking::Granule);
    }
    let pfr0 = read_sysreg!("id_aa64pfr0_el1");
    if id_field(pfr0, 4) == 0 {
        return Err(Lacking::AArch64El1);
    }
    if id_field(pfr0, 24) == 0 {
        return Err(Lacking::GicCpuInterface);
    }
    Ok(())
}

/// Returns the size of the CPU's physical address space, 48 bits at most (ID_AA64MMFR0_EL1.PARange).
#[must_use]
pub fn physical_address_size() -> PhysicalSize {
    PhysicalSize::from_parange(read_sysreg!("id_aa64mmfr0_el1"))
}

/// Sets this CPU's EL2 for the host, except for stage 2.
pub fn prepare_cpu() {
    let features = Features::read();
    floating_point_and_vectors(features);
    debug_and_counters();
    timers();
    interrupts();
    fine_grained_traps();
    if features.mpam() {
        partitioning();
    }

    write_lower_sysreg!("vpidr_el2", read_sysreg!("midr_el1"));
    write_lower_sysreg!("vmpidr_el2", read_sysreg!("mpidr_el1"));
    write_lower_sysreg!("hstr_el2", 0);
    // No control of the implementation for EL1: turning coherency off there would reach EL2's memory.
    write_lower_sysreg!("actlr_el2", 0);
    // MMU and caches off, little-endian, RES1 bits set.
    write_lower_sysreg!("sctlr_el1", 0x30d0_0800);
    isb();
}

/// Turns on stage 2 for the host on this CPU, with VMID 0, and routes to EL2 what must not pass it by.
pub fn enable_stage2(root: PhysAddr, vtcr_el2: u64) {
    write_lower_sysreg!("vtcr_el2", vtcr_el2);
    write_lower_sysreg!("vttbr_el2", root.raw());
    isb();
    write_lower_sysreg!("hcr_el2", hcr());
    // Whatever this CPU cached for EL1 without stage 2 or for an earlier one.
    maintain!("isb", "tlbi vmalls12e1", "dsb nsh", "isb");
}

/// HCR_EL2 for the host: AArch64, stage 2, SMC trapped; no other traps, and physical interrupts stay at EL1.
fn hcr() -> u64 {
    const VM: u64 = 1 << 0;
    const SWIO: u64 = 1 << 1; // no set/way invalidation without a clean, which could undo EL2's writes
    const TSC: u64 = 1 << 19;
    const RW: u64 = 1 << 31;
    const APK: u64 = 1 << 40;
    const API: u64 = 1 << 41;
    const FIEN: u64 = 1 << 47;
    const ENSCXT: u64 = 1 << 53;
    const ATA: u64 = 1 << 56;
    let mut hcr = VM | SWIO | TSC | RW;
    if Features::read().pointer_authentication() {
        hcr |= APK | API;
    }
    let pfr0 = read_sysreg!("id_aa64pfr0_el1");
    if id_field(pfr0, 28) >= 2 {
        hcr |= FIEN;
    }
    if id_field(pfr0, 56) >= 2 || id_field(read_sysreg!("id_aa64pfr1_el1"), 32) >= 2 {
        hcr |= ENSCXT;
    }
    // Only with allocation tags in memory: FEAT_MTE2 and up.
    if id_field(read_sysreg!("id_aa64pfr1_el1"), 8) >= 2 {
        hcr |= ATA;
    }
    hcr
}

/// FP, SVE and SME at full length, untrapped.
fn floating_point_and_vectors(features: Features) {
    // RES1 bits of the E2H = 0 layout; TZ (8) and TSM (12) are among them where there is no SVE or SME.
    let mut cptr = 0x33ff;
    let sme = id_field(read_sysreg!("id_aa64pfr1_el1"), 24);
    if features.sve() {
        cptr &= !(1 << 8);
    }
    if sme != 0 {
        cptr &= !(1 << 12);
    }
    write_lower_sysreg!("cptr_el2", cptr);
    isb();
    if features.sve() {
        write_lower_sysreg!("s3_4_c1_c2_0", 0xf); // ZCR_EL2.LEN: all that is implemented
    }
    if sme != 0 {
        const FA64: u64 = 1 << 31;
        const EZT0: u64 = 1 << 30;
        let mut smcr = 0xf; // LEN
        if read_sysreg!("s3_0_c0_c4_5") & (1 << 63) != 0 {
            smcr |= FA64;
        }
        if sme >= 2 {
            smcr |= EZT0;
        }
        write_lower_sysreg!("s3_4_c1_c2_6", smcr); // SMCR_EL2
        if read_sysreg!("s3_1_c0_c0_6") & (1 << 15) != 0 {
            write_lower_sysreg!("s3_4_c1_c2_5", 0); // SMPRIMAP_EL2, as SMIDR_EL1.SMPS says there is one
        }
    }
}

/// Self-hosted debug, PMU, SPE and trace belong to the host, and none of them observes EL2.
fn debug_and_counters() {
    const HPMD: u64 = 1 << 17; // no counting at EL2
    const HCCD: u64 = 1 << 23; // nor of its cycles
    const E2PB_EL1: u64 = 0b11 << 12;
    const E2TB_EL1: u64 = 0b11 << 24;
    const MTPME: u64 = 1 << 28;
    let dfr0 = read_sysreg!("id_aa64dfr0_el1");
    let mut mdcr = 0;
    let pmu = id_field(dfr0, 8);
    if pmu != 0 && pmu != 0xf {
        mdcr |= (read_sysreg!("pmcr_el0") >> 11) & 0x1f; // HPMN = all counters
        if pmu >= 4 {
            mdcr |= HPMD; // FEAT_PMUv3p1
        }
        if pmu >= 6 {
            mdcr |= HCCD; // FEAT_PMUv3p5
        }
    }
    if id_field(dfr0, 48) == 1 {
        mdcr |= MTPME;
    }
    if id_field(dfr0, 32) != 0 {
        // SPE: owned by firmware if PMBIDR_EL1.P says so; virtual time is physical time, addresses are not EL2's.
        if read_sysreg!("s3_0_c9_c10_7") & (1 << 4) == 0 {
            write_lower_sysreg!("s3_4_c9_c9_0", (1 << 6) | (1 << 4)); // PMSCR_EL2: PCT = physical, PA
        }
        mdcr |= E2PB_EL1;
    }
    if id_field(dfr0, 44) != 0 {
        mdcr |= E2TB_EL1;
    }
    if id_field(dfr0, 40) != 0 {
        write_lower_sysreg!("s3_4_c1_c2_1", 0); // TRFCR_EL2: EL2 is not traced
    }
    if id_field(dfr0, 52) != 0 {
        write_lower_sysreg!("s2_4_c9_c0_0", (1 << 3) | (1 << 4)); // BRBCR_EL2: CC, MPRED, nothing of EL2
    }
    write_lower_sysreg!("mdcr_el2", mdcr);
}

/// Both timers and the counter for EL1, without an offset. EL2's own timer is off.
fn timers() {
    write_lower_sysreg!("cnthctl_el2", 0b11); // EL1PCTEN, EL1PCEN
    write_lower_sysreg!("cntvoff_el2", 0);
    write_lower_sysreg!("cnthp_ctl_el2", 0);
}

/// The GIC CPU interface by system registers, physical.
fn interrupts() {
    const SRE_DFB_DIB_ENABLE: u64 = 0xf;
    write_lower_sysreg!("s3_4_c12_c9_5", SRE_DFB_DIB_ENABLE); // ICC_SRE_EL2
    isb();
    guest::gic::reset();
}

/// FEAT_HCX and FEAT_FGT: nothing is trapped. Many bits of these registers are enables, for which that means 1.
fn fine_grained_traps() {
    let mmfr0 = read_sysreg!("id_aa64mmfr0_el1");
    let mmfr1 = read_sysreg!("id_aa64mmfr1_el1");
    if id_field(mmfr1, 40) != 0 {
        write_lower_sysreg!("s3_4_c1_c2_2", hcrx());
    }
    let fgt = id_field(mmfr0, 56);
    if fgt >= 1 {
        // HFGRTR_EL2, HFGWTR_EL2: nAMAIR2 (63) down to nGCS_EL0 (52), nACCDATA (50).
        let enables = (0xfff << 52) | (1 << 50);
        write_lower_sysreg!("s3_4_c1_c1_4", enables);
        write_lower_sysreg!("s3_4_c1_c1_5", enables);
        // HFGITR_EL2: nGCSEPP (59), nGCSSTR, nGCSPUSHM, nBRBIALL, nBRBINJ (55).
        write_lower_sysreg!("s3_4_c1_c1_6", 0x1f << 55);
        // HDFGRTR_EL2: nPMSNEVFR (62), nBRBDATA, nBRBCTL, nBRBIDR (59); HDFGWTR_EL2 without the last.
        write_lower_sysreg!("s3_4_c3_c1_4", 0xf << 59);
        write_lower_sysreg!("s3_4_c3_c1_5", 0x7 << 60);
        if id_field(read_sysreg!("id_aa64pfr0_el1"), 44) != 0 {
            write_lower_sysreg!("s3_4_c3_c1_6", 0); // HAFGRTR_EL2, with FEAT_AMUv1
        }
    }
    if fgt >= 2 {
        write_lower_sysreg!("s3_4_c3_c1_0", 0x01df_ffff); // HDFGRTR2_EL2: all n bits
        write_lower_sysreg!("s3_4_c3_c1_1", 0x00f9_ffbf); // HDFGWTR2_EL2
        write_lower_sysreg!("s3_4_c3_c1_2", 0x7fff); // HFGRTR2_EL2
        write_lower_sysreg!("s3_4_c3_c1_3", 0x7fff); // HFGWTR2_EL2
        write_lower_sysreg!("s3_4_c3_c1_7", 0b10); // HFGITR2_EL2: nDCCIVAPS
    }

    // Registers of EL1 that the enables above have just made effective, and whose reset values are unknown.
    let mmfr3 = read_sysreg!("s3_0_c0_c7_3");
    if id_field(mmfr3, 4) != 0 {
        write_lower_sysreg!("s3_0_c1_c0_3", 0); // SCTLR2_EL1
    }
    if id_field(mmfr3, 0) != 0 {
        write_lower_sysreg!("s3_0_c2_c0_3", 0); // TCR2_EL1
    }
    if id_field(read_sysreg!("id_aa64pfr1_el1"), 44) != 0 {
        write_lower_sysreg!("s3_0_c2_c5_0", 0); // GCSCR_EL1
        write_lower_sysreg!("s3_0_c2_c5_2", 0); // GCSCRE0_EL1
    }
    if id_field(mmfr1, 16) != 0 {
        write_lower_sysreg!("s3_0_c10_c4_3", 0); // LORC_EL1
    }
}

/// HCRX_EL2: each enable of a feature that the CPU has; bits of others are RES0, and stay 0.
fn hcrx() -> u64 {
    let isar1 = read_sysreg!("id_aa64isar1_el1");
    let isar2 = read_sysreg!("s3_0_c0_c6_2");
    let pfr1 = read_sysreg!("id_aa64pfr1_el1");
    let pfr2 = read_sysreg!("s3_0_c0_c4_2");
    let mmfr3 = read_sysreg!("s3_0_c0_c7_3");
    let mmfr4 = read_sysreg!("s3_0_c0_c7_4");
    let mut hcrx = 0;
    let mut enable = |bit: u32, present: bool| hcrx |= u64::from(present) << bit;
    let ls64 = id_field(isar1, 60);
    enable(0, ls64 >= 3); // EnAS0
    enable(1, ls64 >= 1); // EnALS
    enable(2, ls64 >= 2); // EnASR
    enable(11, id_field(isar2, 16) != 0); // MSCEn, FEAT_MOPS
    enable(14, id_field(mmfr3, 0) != 0); // TCR2En
    enable(15, id_field(mmfr3, 4) != 0); // SCTLR2En
    enable(17, id_field(mmfr3, 32) != 0); // D128En
    enable(18, id_field(mmfr3, 40) != 0); // EnSNERR, FEAT_ANERR
    enable(20, id_field(mmfr3, 36) != 0); // EnSDERR, FEAT_ADERR
    enable(21, id_field(mmfr4, 12) != 0); // EnIDCP128
    enable(22, id_field(pfr1, 44) != 0); // GCSEn
    enable(23, id_field(pfr2, 32) != 0); // EnFPM
    hcrx
}

/// FEAT_MPAM: EL1 may use the partitions, untrapped.
fn partitioning() {
    write_lower_sysreg!("s3_4_c10_c5_0", 0); // MPAM2_EL2
    if read_sysreg!("s3_0_c10_c4_4") & (1 << 17) != 0 {
        write_lower_sysreg!("s3_4_c10_c4_0", 0); // MPAMHCR_EL2, as MPAMIDR_EL1.HAS_HCR says there is one
    }
}

fn isb() {
    maintain!("isb");
}
