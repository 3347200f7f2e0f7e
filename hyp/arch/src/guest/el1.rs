//! Registers of EL1 and EL0, between the CPU and memory.

use ravelin_vm::Context;

use crate::{
    features::Features,
    sysreg::{maintain, read_sysreg, write_lower_sysreg},
};

/// TCR_EL1.EPD0 and EPD1: no walks.
const TCR_NO_WALKS: u64 = 1 << 7 | 1 << 23;
/// SCTLR_EL1.M.
const SCTLR_M: u64 = 1;

/// Calls a macro with those registers that are always there and that EL1 writes, but for SCTLR_EL1, TCR_EL1 and CNTV_CTL_EL0, and
/// then with those of features. Two at a time, which are neighbours in memory.
macro_rules! registers {
    ($each:ident, $context:ident, $features:ident) => {
        $each!($context, sp_el0: "sp_el0", sp_el1: "sp_el1");
        $each!($context, elr_el1: "elr_el1", spsr_el1: "spsr_el1");
        $each!($context, esr_el1: "esr_el1", far_el1: "far_el1");
        $each!($context, afsr0_el1: "afsr0_el1", afsr1_el1: "afsr1_el1");
        $each!($context, vbar_el1: "vbar_el1", cpacr_el1: "cpacr_el1");
        $each!($context, ttbr0_el1: "ttbr0_el1", ttbr1_el1: "ttbr1_el1");
        $each!($context, mair_el1: "mair_el1", amair_el1: "amair_el1");
        $each!($context, contextidr_el1: "contextidr_el1", par_el1: "par_el1");
        $each!($context, csselr_el1: "csselr_el1", cntkctl_el1: "cntkctl_el1");
        $each!($context, tpidr_el0: "tpidr_el0", tpidrro_el0: "tpidrro_el0");
        $each!($context, tpidr_el1: "tpidr_el1", cntv_cval_el0: "cntv_cval_el0");
        if $features.add_registers() {
            if $features.ras() {
                $each!($context, vdisr_el2: "s3_4_c12_c1_1");
            }
            if $features.pointer_authentication() {
                $each!($context, apiakeylo_el1: "s3_0_c2_c1_0", apiakeyhi_el1: "s3_0_c2_c1_1");
                $each!($context, apibkeylo_el1: "s3_0_c2_c1_2", apibkeyhi_el1: "s3_0_c2_c1_3");
                $each!($context, apdakeylo_el1: "s3_0_c2_c2_0", apdakeyhi_el1: "s3_0_c2_c2_1");
                $each!($context, apdbkeylo_el1: "s3_0_c2_c2_2", apdbkeyhi_el1: "s3_0_c2_c2_3");
                $each!($context, apgakeylo_el1: "s3_0_c2_c3_0", apgakeyhi_el1: "s3_0_c2_c3_1");
            }
            if $features.tcr2() {
                $each!($context, tcr2_el1: "s3_0_c2_c0_3");
            }
            if $features.sctlr2() {
                $each!($context, sctlr2_el1: "s3_0_c1_c0_3");
            }
            if $features.s1pie() {
                $each!($context, pir_el1: "s3_0_c10_c2_3", pire0_el1: "s3_0_c10_c2_2");
            }
            if $features.s1poe() {
                $each!($context, por_el1: "s3_0_c10_c2_4", por_el0: "s3_3_c10_c2_4");
            }
        }
    };
}

/// Reads all before it writes any, so that there is one store of a pair.
macro_rules! save {
    ($context:ident, $($field:ident: $name:literal),+) => {
        let ($($field,)+) = ($(read_sysreg!($name),)+);
        $($context.$field = $field;)+
    };
}

/// As `save`.
macro_rules! load {
    ($context:ident, $($field:ident: $name:literal),+) => {
        let ($($field,)+) = ($($context.$field,)+);
        $(write_lower_sysreg!($name, $field);)+
    };
}

/// Takes the registers out of the CPU, stops the virtual timer, and leaves no translation on behind that could be walked for
/// speculatively while registers of two owners are in the CPU (as errata of Cortex-A57, A72 and A76 and their kin ask: 1319367,
/// 1319537, 1165522).
#[inline(always)]
pub(super) fn save(context: &mut Context, features: Features) {
    // Walks that began at EL1 may go on at EL2 until then, and must not see registers change (Arm ARM DDI 0487, R_LFHQG).
    maintain!("dsb nsh");
    registers!(save, context, features);
    save!(context, sctlr_el1: "sctlr_el1", tcr_el1: "tcr_el1");
    save!(context, cntv_ctl_el0: "cntv_ctl_el0");
    write_lower_sysreg!("cntv_ctl_el0", 0);
    write_lower_sysreg!("tcr_el1", context.tcr_el1 | TCR_NO_WALKS);
    maintain!("isb");
    write_lower_sysreg!("sctlr_el1", context.sctlr_el1 | SCTLR_M);
    maintain!("isb");
}

/// Puts the registers into the CPU, after [`save()`] of their previous owner. Stage 2 is that of the new one already.
#[inline(always)]
pub(super) fn load(context: &Context, features: Features) {
    registers!(load, context, features);
    // EL1 does not write these.
    load!(context, cntvoff_el2: "cntvoff_el2", vmpidr_el2: "vmpidr_el2");
    load!(context, cntv_ctl_el0: "cntv_ctl_el0");
    // All else is in place before there are walks again. The return to EL1 orders what follows.
    maintain!("isb");
    load!(context, sctlr_el1: "sctlr_el1", tcr_el1: "tcr_el1");
}
