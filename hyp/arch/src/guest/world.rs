//! The registers that say what EL1 may do, for a guest in place of the host.

use ravelin_pgtable::PhysicalSize;
use ravelin_vm::{Context, Entry, Vectors};

use super::el1;
use crate::{
    features::Features,
    sysreg::{maintain, read_sysreg, write_lower_sysreg},
};

/// HCR_EL2 for guests.
mod hcr {
    pub(super) const VM: u64 = 1 << 0;
    pub(super) const SWIO: u64 = 1 << 1; // invalidation by set/way cleans, too
    pub(super) const FMO: u64 = 1 << 3; // physical interrupts come to EL2, virtual ones go to EL1
    pub(super) const IMO: u64 = 1 << 4;
    pub(super) const AMO: u64 = 1 << 5;
    pub(super) const FB: u64 = 1 << 9; // maintenance of TLBs and instruction caches reaches all CPUs
    pub(super) const BSU_INNER: u64 = 1 << 10; // so do barriers
    pub(super) const TWI: u64 = 1 << 13;
    pub(super) const TWE: u64 = 1 << 14;
    pub(super) const TID1: u64 = 1 << 16;
    pub(super) const TID3: u64 = 1 << 18;
    pub(super) const TSC: u64 = 1 << 19;
    pub(super) const TIDCP: u64 = 1 << 20;
    pub(super) const TACR: u64 = 1 << 21;
    pub(super) const RW: u64 = 1 << 31;
    pub(super) const TLOR: u64 = 1 << 35;
    pub(super) const TERR: u64 = 1 << 36;
    pub(super) const APK: u64 = 1 << 40;
    pub(super) const API: u64 = 1 << 41;
    pub(super) const TID5: u64 = 1 << 58;
}

/// MDCR_EL2 for guests. The rest is as for the host.
mod mdcr {
    pub(super) const TPMCR: u64 = 1 << 5;
    pub(super) const TPM: u64 = 1 << 6;
    pub(super) const HPME: u64 = 1 << 7;
    pub(super) const TDE: u64 = 1 << 8;
    pub(super) const TDA: u64 = 1 << 9;
    pub(super) const TDOSA: u64 = 1 << 10;
    pub(super) const TDRA: u64 = 1 << 11;
    pub(super) const E2PB: u64 = 0b11 << 12;
    pub(super) const E2PB_TRAP: u64 = 0b10 << 12;
    pub(super) const TPMS: u64 = 1 << 14;
    pub(super) const TTRF: u64 = 1 << 19;
    pub(super) const E2TB: u64 = 0b11 << 24;
    pub(super) const E2TB_TRAP: u64 = 0b10 << 24;
}

/// CPTR_EL2 with everything trapped: RES1 bits with TZ (8) and TSM (12), TFP, TTA, TAM.
const CPTR_ALL: u64 = 0x33ff | CPTR_TFP | 1 << 20 | 1 << 30;
const CPTR_TZ: u64 = 1 << 8;
const CPTR_TFP: u64 = 1 << 10;

/// CNTHCTL_EL2.EL1PCTEN: the physical counter does not trap; the physical timer does.
const CNTHCTL_COUNTER: u64 = 1;

/// MPAM2_EL2: TRAPMPAM1EL1, TRAPMPAM0EL1, TIDR.
const MPAM_TRAPS: u64 = 1 << 48 | 1 << 49 | 1 << 58;

/// What the host has in the registers that a guest's run changes.
#[derive(Debug, Default)]
pub(crate) struct HostState {
    /// EL1 and EL0; of the general-purpose registers nothing.
    registers: Context,
    elr: u64,
    spsr: u64,
    icc_sre: u64,
    mdscr: u64,
    pmcr: u64,
    pmscr: u64,
    trfcr: u64,
    brbcr: u64,
    /// What EL2 has set for the host. Nobody changes it while the CPU is on.
    controls: Controls,
    vtcr: u64,
    vttbr: u64,
    cptr: u64,
    /// What it sets for guests instead.
    for_guests: Controls,
}

/// Registers that say what EL1 may do, which are the same for all guests.
#[derive(Debug, Default)]
struct Controls {
    hcr: u64,
    mdcr: u64,
    cnthctl: u64,
    icc_sre_el2: u64,
    hcrx: u64,
    mpam2: u64,
    fine_grained: FineGrained,
}

/// FEAT_FGT and FEAT_FGT2, in the order of the macro below.
#[derive(Debug, Default)]
struct FineGrained([u64; 5], [u64; 5]);

impl HostState {
    /// Returns when the host's virtual timer fires: of the host, both counters are the same. Its physical one goes on.
    pub(super) fn virtual_timer(&self) -> Option<u64> {
        self.registers.virtual_deadline()
    }

    /// Returns whether [`HostState::learn`] has been called.
    pub(super) const fn is_known(&self) -> bool {
        // Never of a host.
        self.controls.hcr != 0
    }

    /// Reads what stays the same from one run of a guest to the next.
    #[cold]
    #[inline(never)]
    pub(super) fn learn(&mut self, features: Features) {
        self.controls = Controls::read(features);
        self.for_guests = Controls::for_guests(&self.controls, features);
        self.vtcr = read_sysreg!("vtcr_el2");
        self.vttbr = read_sysreg!("vttbr_el2");
        self.cptr = read_sysreg!("cptr_el2");
        self.registers.cntvoff_el2 = read_sysreg!("cntvoff_el2");
        self.registers.vmpidr_el2 = read_sysreg!("vmpidr_el2");
    }
}

macro_rules! fine_grained {
    ($features:expr, $each:ident, $state:expr) => {
        if $features.fgt() {
            $each!($state.0[0], "s3_4_c1_c1_4"); // HFGRTR_EL2
            $each!($state.0[1], "s3_4_c1_c1_5"); // HFGWTR_EL2
            $each!($state.0[2], "s3_4_c1_c1_6"); // HFGITR_EL2
            $each!($state.0[3], "s3_4_c3_c1_4"); // HDFGRTR_EL2
            $each!($state.0[4], "s3_4_c3_c1_5"); // HDFGWTR_EL2
        }
        if $features.fgt2() {
            $each!($state.1[0], "s3_4_c3_c1_0"); // HDFGRTR2_EL2
            $each!($state.1[1], "s3_4_c3_c1_1"); // HDFGWTR2_EL2
            $each!($state.1[2], "s3_4_c3_c1_2"); // HFGRTR2_EL2
            $each!($state.1[3], "s3_4_c3_c1_3"); // HFGWTR2_EL2
            $each!($state.1[4], "s3_4_c3_c1_7"); // HFGITR2_EL2
        }
    };
}

macro_rules! save {
    ($place:expr, $name:literal) => {
        $place = read_sysreg!($name);
    };
}

macro_rules! load {
    ($place:expr, $name:literal) => {
        write_lower_sysreg!($name, $place);
    };
}

/// Reads a register that is there with a feature only.
macro_rules! read_if {
    ($present:expr, $name:literal) => {
        if $present { read_sysreg!($name) } else { 0 }
    };
}

impl Controls {
    fn read(features: Features) -> Self {
        let mut fine_grained = FineGrained::default();
        fine_grained!(features, save, fine_grained);
        Self {
            hcr: read_sysreg!("hcr_el2"),
            mdcr: read_sysreg!("mdcr_el2"),
            cnthctl: read_sysreg!("cnthctl_el2"),
            icc_sre_el2: read_sysreg!("s3_4_c12_c9_5"),
            hcrx: read_if!(features.hcx(), "s3_4_c1_c2_2"),
            mpam2: read_if!(features.mpam(), "s3_4_c10_c5_0"),
            fine_grained,
        }
    }

    fn for_guests(host: &Self, features: Features) -> Self {
        let mut hcr =
            hcr::VM | hcr::SWIO | hcr::FMO | hcr::IMO | hcr::AMO | hcr::FB | hcr::BSU_INNER | hcr::TWI | hcr::TWE;
        hcr |= hcr::TID1 | hcr::TID3 | hcr::TSC | hcr::TIDCP | hcr::TACR | hcr::RW | hcr::TLOR | hcr::TERR | hcr::TID5;
        if features.pointer_authentication() {
            hcr |= hcr::APK | hcr::API;
        }
        // TCR2En, SCTLR2En: what has them in the guest's ID registers.
        let hcrx = u64::from(features.tcr2()) << 14 | u64::from(features.sctlr2()) << 15;
        // Bits that enable are off, bits that trap too: of what the former cover, guests see nPIRE0 (57), nPIR (58), nPOR_EL0 (59)
        // and nPOR_EL1 (60).
        let seen = (u64::from(features.s1pie()) * (0b11 << 57)) | (u64::from(features.s1poe()) * (0b11 << 59));

        let mut mdcr = host.mdcr & !(mdcr::HPME | mdcr::E2PB | mdcr::E2TB);
        mdcr |= mdcr::TDE | mdcr::TDA | mdcr::TDOSA | mdcr::TDRA | mdcr::TPM | mdcr::TPMCR;
        if features.spe() {
            mdcr |= mdcr::TPMS | mdcr::E2PB_TRAP;
        }
        if features.trace_filter() {
            mdcr |= mdcr::TTRF;
        }
        if features.trace_buffer() {
            mdcr |= mdcr::E2TB_TRAP;
        }
        Self {
            hcr,
            mdcr,
            cnthctl: CNTHCTL_COUNTER,
            // No access for EL1 to the register that says that there are system registers (ICC_SRE_EL2.Enable).
            icc_sre_el2: host.icc_sre_el2 & !(1 << 3),
            hcrx,
            mpam2: host.mpam2 | MPAM_TRAPS,
            fine_grained: FineGrained([seen, seen, 0, 0, 0], [0; 5]),
        }
    }

    #[inline(always)]
    fn load(&self, features: Features) {
        write_lower_sysreg!("hcr_el2", self.hcr);
        write_lower_sysreg!("mdcr_el2", self.mdcr);
        write_lower_sysreg!("cnthctl_el2", self.cnthctl);
        write_lower_sysreg!("s3_4_c12_c9_5", self.icc_sre_el2);
        if features.hcx() {
            write_lower_sysreg!("s3_4_c1_c2_2", self.hcrx);
        }
        if features.mpam() {
            write_lower_sysreg!("s3_4_c10_c5_0", self.mpam2);
        }
        fine_grained!(features, load, self.fine_grained);
    }
}

/// Takes the host, which is known, out of the CPU.
pub(super) fn leave_host(host: &mut HostState, features: Features) {
    (host.elr, host.spsr) = (read_sysreg!("elr_el2"), read_sysreg!("spsr_el2"));
    host.icc_sre = read_sysreg!("s3_0_c12_c12_5");
    stop_observation(host, features);
    el1::save(&mut host.registers, features);
    host.for_guests.load(features);
    // The interface by system registers at EL1.
    const SYSTEM_REGISTERS: u64 = 0b111;
    write_lower_sysreg!("s3_0_c12_c12_5", SYSTEM_REGISTERS);
}

/// Keeps the host's debugger, counters and profilers from watching a guest.
fn stop_observation(host: &mut HostState, features: Features) {
    host.mdscr = read_sysreg!("mdscr_el1");
    write_lower_sysreg!("mdscr_el1", 0);
    if features.pmu() {
        host.pmcr = read_sysreg!("pmcr_el0");
        // All counters of EL1, and no reset.
        write_lower_sysreg!("pmcr_el0", host.pmcr & !0b111);
    }
    if features.brbe() {
        host.brbcr = read_sysreg!("s2_1_c9_c0_0");
        write_lower_sysreg!("s2_1_c9_c0_0", 0); // BRBCR_EL1
    }
    if features.spe() {
        host.pmscr = read_sysreg!("s3_0_c9_c9_0");
        write_lower_sysreg!("s3_0_c9_c9_0", 0); // PMSCR_EL1
        maintain!("isb", "hint #17", "dsb nsh"); // PSB CSYNC: what has been sampled is in the host's buffer
    }
    if features.trace_filter() {
        host.trfcr = read_sysreg!("s3_0_c1_c2_1");
        write_lower_sysreg!("s3_0_c1_c2_1", 0); // TRFCR_EL1
        maintain!("isb", "hint #18", "dsb nsh"); // TSB CSYNC
    }
    // Nothing of what follows is observed.
    maintain!("isb");
}

/// Sets what differs from entry to entry.
pub(super) fn enter_guest(guest: &Entry<'_>, physical: PhysicalSize, features: Features) {
    write_lower_sysreg!("vtcr_el2", guest.tree.geometry.vtcr(physical));
    write_lower_sysreg!("vttbr_el2", guest.tree.vttbr.bits());
    let cptr = match guest.vectors {
        Vectors::None => CPTR_ALL,
        Vectors::Sve if features.sve() => CPTR_ALL & !(CPTR_TFP | CPTR_TZ),
        Vectors::Simd | Vectors::Sve => CPTR_ALL & !CPTR_TFP,
    };
    write_lower_sysreg!("cptr_el2", cptr);
    // TLB maintenance goes by the new VMID, and what EL1 gets next is translated by nothing else.
    maintain!("isb");
}

/// Puts the host back into the CPU.
#[inline(never)]
pub(super) fn return_to_host(host: &HostState, features: Features) {
    write_lower_sysreg!("vtcr_el2", host.vtcr);
    write_lower_sysreg!("vttbr_el2", host.vttbr);
    write_lower_sysreg!("cptr_el2", host.cptr);
    host.controls.load(features);
    // Stage 2 is the host's before its EL1 registers are.
    maintain!("isb");
    write_lower_sysreg!("s3_0_c12_c12_5", host.icc_sre);
    el1::load(&host.registers, features);

    write_lower_sysreg!("mdscr_el1", host.mdscr);
    if features.pmu() {
        // Without P and C, which reset.
        write_lower_sysreg!("pmcr_el0", host.pmcr & !0b110);
    }
    if features.spe() {
        write_lower_sysreg!("s3_0_c9_c9_0", host.pmscr);
    }
    if features.trace_filter() {
        write_lower_sysreg!("s3_0_c1_c2_1", host.trfcr);
    }
    if features.brbe() {
        write_lower_sysreg!("s2_1_c9_c0_0", host.brbcr);
    }
    let HostState { elr, spsr, .. } = *host;
    write_lower_sysreg!("elr_el2", elr);
    write_lower_sysreg!("spsr_el2", spsr);
}
