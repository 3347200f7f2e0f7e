//! What this CPU has that switching between the host and guests has to know.

use crate::sysreg::{id_field, read_sysreg};

macro_rules! features {
    ($($(#[$meta:meta])* $name:ident: $present:expr;)+) => {
        #[expect(non_camel_case_types, reason = "the names of the methods below")]
        enum Bit {
            $($name),+
        }

        /// Features of the CPU, read once: that the other CPUs have the same is checked before they run guests. One bit each,
        /// because the switch between the host and guests asks for most of them.
        #[derive(Clone, Copy, Debug, Default)]
        pub(crate) struct Features(u32);

        impl Features {
            /// Reads the ID registers.
            pub(crate) fn read() -> Self {
                Self($(u32::from($present) << Bit::$name as u32)|+)
            }

            $($(#[$meta])* pub(crate) const fn $name(self) -> bool {
                self.0 & 1 << Bit::$name as u32 != 0
            })+
        }
    };
}

features! {
    /// FEAT_RAS: VDISR_EL2.
    ras: id_field(read_sysreg!("id_aa64pfr0_el1"), 28) != 0;
    /// FEAT_PAuth, whichever algorithm: APA, API, GPA, GPI in ISAR1, GPA3, APA3 in ISAR2.
    pointer_authentication: read_sysreg!("id_aa64isar1_el1") & 0xff00_0ff0 != 0 || read_sysreg!("s3_0_c0_c6_2") & 0xff00 != 0;
    /// FEAT_SVE.
    sve: id_field(read_sysreg!("id_aa64pfr0_el1"), 32) != 0;
    /// FEAT_SME.
    sme: id_field(read_sysreg!("id_aa64pfr1_el1"), 24) != 0;
    /// FEAT_MPAM.
    mpam: id_field(read_sysreg!("id_aa64pfr0_el1"), 40) != 0 || id_field(read_sysreg!("id_aa64pfr1_el1"), 16) != 0;
    /// FEAT_HCX.
    hcx: id_field(read_sysreg!("id_aa64mmfr1_el1"), 40) != 0;
    /// FEAT_FGT.
    fgt: id_field(read_sysreg!("id_aa64mmfr0_el1"), 56) >= 1;
    /// FEAT_FGT2.
    fgt2: id_field(read_sysreg!("id_aa64mmfr0_el1"), 56) >= 2;
    /// FEAT_TCR2.
    tcr2: id_field(read_sysreg!("s3_0_c0_c7_3"), 0) != 0;
    /// FEAT_SCTLR2.
    sctlr2: id_field(read_sysreg!("s3_0_c0_c7_3"), 4) != 0;
    /// FEAT_S1PIE.
    s1pie: id_field(read_sysreg!("s3_0_c0_c7_3"), 8) != 0;
    /// FEAT_S1POE.
    s1poe: id_field(read_sysreg!("s3_0_c0_c7_3"), 16) != 0;
    /// FEAT_PMUv3.
    pmu: !matches!(id_field(read_sysreg!("id_aa64dfr0_el1"), 8), 0 | 0xf);
    /// FEAT_SPE, which firmware leaves to EL2 and EL1 (PMBIDR_EL1.P).
    spe: id_field(read_sysreg!("id_aa64dfr0_el1"), 32) != 0 && read_sysreg!("s3_0_c9_c10_7") & (1 << 4) == 0;
    /// FEAT_TRF.
    trace_filter: id_field(read_sysreg!("id_aa64dfr0_el1"), 40) != 0;
    /// FEAT_TRBE.
    trace_buffer: id_field(read_sysreg!("id_aa64dfr0_el1"), 44) != 0;
    /// FEAT_BRBE.
    brbe: id_field(read_sysreg!("id_aa64dfr0_el1"), 52) != 0;
    /// FEAT_RNG.
    rndr: id_field(read_sysreg!("id_aa64isar0_el1"), 60) != 0;
}

impl Features {
    /// Returns whether there is any that adds registers of EL1 or EL0 which are switched.
    pub(crate) const fn add_registers(self) -> bool {
        self.ras() || self.pointer_authentication() || self.tcr2() || self.sctlr2() || self.s1pie() || self.s1poe()
    }
}
