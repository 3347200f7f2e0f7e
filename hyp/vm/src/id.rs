//! ID registers that guests see.

/// Those ID registers of AArch64 that say of any feature a guest may have. All others read as zero in a guest, but for
/// ID_AA64DFR0_EL1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields have the names of the registers: Arm ARM DDI 0487, D24.2")]
pub struct IdRegisters {
    pub id_aa64pfr0_el1: u64,
    pub id_aa64pfr1_el1: u64,
    pub id_aa64zfr0_el1: u64,
    pub id_aa64isar0_el1: u64,
    pub id_aa64isar1_el1: u64,
    pub id_aa64isar2_el1: u64,
    pub id_aa64mmfr0_el1: u64,
    pub id_aa64mmfr1_el1: u64,
    pub id_aa64mmfr2_el1: u64,
    pub id_aa64mmfr3_el1: u64,
}

/// What of a guest's features its VM decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestFeatures {
    /// Bits of a guest address.
    pub ipa_bits: u64,
    /// SVE.
    pub sve: bool,
    /// Pointer authentication, of addresses and generic.
    pub pointer_authentication: bool,
}

/// The most that a guest sees: features whose state is switched or that have none.
///
/// Some need bits in HCRX_EL2 and the fine-grained traps before EL1 may use them: TCR2En and SCTLR2En; nPIR_EL1, nPIRE0_EL1,
/// nPOR_EL1 and nPOR_EL0. The rest is left out because its state is not switched (MTE, SME, GCS, MPAM, AMU, debug, PMU, trace,
/// profiling), because it belongs to EL2 or EL3, because it has controls that no guest needs (LS64, MOPS, WFxT, TME), or
/// because it would give guests AArch32 state, which the exits do not know.
const MOST: IdRegisters = IdRegisters {
    id_aa64pfr0_el1: Fields::NONE
        .with(0, 1) // EL0: AArch64 only
        .with(4, 1) // EL1: AArch64 only
        .with(16, 1) // FP, FP16
        .with(20, 1) // AdvSIMD
        .with(24, 1) // GIC CPU interface
        .with(28, 1) // RAS
        .with(32, 1) // SVE
        .with(48, 1) // DIT
        .with(56, 1) // CSV2, without SCXTNUM
        .with(60, 1) // CSV3
        .0,
    id_aa64pfr1_el1: Fields::NONE
        .with(0, 1) // BT
        .with(4, 2) // SSBS
        .0,
    id_aa64zfr0_el1: Fields::NONE
        .with(0, 2) // SVEver
        .with(4, 2) // AES
        .with(16, 1) // BitPerm
        .with(20, 2) // BF16
        .with(24, 1) // B16B16
        .with(32, 1) // SHA3
        .with(40, 1) // SM4
        .with(44, 1) // I8MM
        .with(52, 1) // F32MM
        .with(56, 1) // F64MM
        .0,
    id_aa64isar0_el1: Fields::NONE
        .with(4, 2) // AES
        .with(8, 1) // SHA1
        .with(12, 2) // SHA2
        .with(16, 1) // CRC32
        .with(20, 3) // Atomic
        .with(28, 1) // RDM
        .with(32, 1) // SHA3
        .with(36, 1) // SM3
        .with(40, 1) // SM4
        .with(44, 1) // DP
        .with(48, 1) // FHM
        .with(52, 2) // TS
        .with(56, 2) // TLB
        .with(60, 1) // RNDR
        .0,
    id_aa64isar1_el1: Fields::NONE
        .with(0, 2) // DPB
        .with(4, 5) // APA
        .with(8, 5) // API
        .with(12, 1) // JSCVT
        .with(16, 1) // FCMA
        .with(20, 3) // LRCPC
        .with(24, 1) // GPA
        .with(28, 1) // GPI
        .with(32, 1) // FRINTTS
        .with(36, 1) // SB
        .with(40, 1) // SPECRES
        .with(44, 2) // BF16
        .with(48, 1) // DGH
        .with(52, 1) // I8MM
        .0,
    id_aa64isar2_el1: Fields::NONE
        .with(4, 1) // RPRES
        .with(8, 1) // GPA3
        .with(12, 5) // APA3
        .with(20, 1) // BC
        .with(24, 1) // PAC_frac
        .with(28, 1) // CLRBHB
        .with(48, 1) // RPRFM
        .with(52, 1) // CSSC
        .with(56, 1) // LUT
        .0,
    id_aa64mmfr0_el1: Fields::NONE
        .with(0, 5) // PARange: 48 bits
        .with(4, 2) // ASIDBits
        .with(8, 1) // BigEnd
        .with(16, 1) // BigEndEL0
        .with(20, 1) // TGran16, 48 bits
        .with(24, 0) // TGran64: 0 says that there is
        .with(28, 0) // TGran4, 48 bits: 0 says that there is
        .with(60, 1) // ECV, without CNTPOFF
        .0,
    id_aa64mmfr1_el1: Fields::NONE
        .with(0, 2) // HAFDBS
        .with(12, 2) // HPDS
        .with(20, 3) // PAN
        .with(36, 3) // ETS
        .with(44, 1) // AFP
        .with(48, 1) // nTLBPA
        .with(60, 1) // ECBHB
        .0,
    id_aa64mmfr2_el1: Fields::NONE
        .with(0, 1) // CnP
        .with(4, 1) // UAO
        .with(16, 1) // VARange
        .with(20, 1) // CCIDX
        .with(28, 1) // ST
        .with(32, 1) // AT
        .with(48, 1) // TTL
        .with(52, 2) // BBM
        .with(60, 1) // E0PD
        .0,
    id_aa64mmfr3_el1: Fields::NONE
        .with(0, 1) // TCRX
        .with(4, 1) // SCTLRX
        .with(8, 1) // S1PIE
        .with(16, 1) // S1POE
        .with(60, 1) // Spec_FPACC
        .0,
};

/// Fields that are signed numbers: those where 0b1111 says that there is no such feature.
const SIGNED: IdRegisters = IdRegisters {
    id_aa64pfr0_el1: Fields::NONE.with(16, 0xf).with(20, 0xf).0, // FP, AdvSIMD
    id_aa64mmfr0_el1: Fields::NONE.with(24, 0xf).with(28, 0xf).0, // TGran64, TGran4
    ..NONE
};

const NONE: IdRegisters = IdRegisters {
    id_aa64pfr0_el1: 0,
    id_aa64pfr1_el1: 0,
    id_aa64zfr0_el1: 0,
    id_aa64isar0_el1: 0,
    id_aa64isar1_el1: 0,
    id_aa64isar2_el1: 0,
    id_aa64mmfr0_el1: 0,
    id_aa64mmfr1_el1: 0,
    id_aa64mmfr2_el1: 0,
    id_aa64mmfr3_el1: 0,
};

/// ID_AA64PFR0_EL1.SVE.
const SVE: u64 = Fields::NONE.with(32, 0xf).0;
/// APA, API, GPA and GPI of ID_AA64ISAR1_EL1.
const ISAR1_POINTER_AUTHENTICATION: u64 = Fields::NONE.with(4, 0xf).with(8, 0xf).with(24, 0xf).with(28, 0xf).0;
/// GPA3, APA3 and PAC_frac of ID_AA64ISAR2_EL1.
const ISAR2_POINTER_AUTHENTICATION: u64 = Fields::NONE.with(8, 0xf).with(12, 0xf).with(24, 0xf).0;

/// ID_AA64DFR0_EL1 for guests: Armv8 debug with the fewest breakpoints and watchpoints that the architecture knows, two of
/// each; no performance monitors, trace or profiling. The debug registers ignore writes and read as zero.
const DFR0: u64 = Fields::NONE.with(0, 6).with(12, 1).with(20, 1).0;

impl IdRegisters {
    /// Returns what a guest sees on a CPU that has these registers. The kinds of guests do not differ: what can be offered is
    /// what the world switch takes care of.
    #[must_use]
    pub fn for_guest(&self, features: GuestFeatures) -> Self {
        let mut most = MOST;
        most.id_aa64mmfr0_el1 = most.id_aa64mmfr0_el1 & !0xf | physical_range(features.ipa_bits);
        if !features.sve {
            most.id_aa64pfr0_el1 &= !SVE;
            most.id_aa64zfr0_el1 = 0;
        }
        if !features.pointer_authentication {
            most.id_aa64isar1_el1 &= !ISAR1_POINTER_AUTHENTICATION;
            most.id_aa64isar2_el1 &= !ISAR2_POINTER_AUTHENTICATION;
        }
        self.common(&most)
    }

    /// Returns whether they say that there is pointer authentication.
    pub(crate) const fn has_pointer_authentication(&self) -> bool {
        self.id_aa64isar1_el1 & ISAR1_POINTER_AUTHENTICATION != 0
            || self.id_aa64isar2_el1 & ISAR2_POINTER_AUTHENTICATION != 0
    }

    /// Returns whether they say that there is RAS.
    pub(crate) const fn has_ras(&self) -> bool {
        self.id_aa64pfr0_el1 & Fields::NONE.with(28, 0xf).0 != 0
    }

    /// Returns whether they say that there is TCR2_EL1.
    pub(crate) const fn has_tcr2(&self) -> bool {
        self.id_aa64mmfr3_el1 & Fields::NONE.with(0, 0xf).0 != 0
    }

    /// Returns whether they say that there is SCTLR2_EL1.
    pub(crate) const fn has_sctlr2(&self) -> bool {
        self.id_aa64mmfr3_el1 & Fields::NONE.with(4, 0xf).0 != 0
    }

    /// Returns whether they say that there is permission indirection at stage 1.
    pub(crate) const fn has_s1pie(&self) -> bool {
        self.id_aa64mmfr3_el1 & Fields::NONE.with(8, 0xf).0 != 0
    }

    /// Returns whether they say that there are permission overlays at stage 1.
    pub(crate) const fn has_s1poe(&self) -> bool {
        self.id_aa64mmfr3_el1 & Fields::NONE.with(16, 0xf).0 != 0
    }

    /// Returns whether they say that there is SVE.
    #[must_use]
    pub const fn has_sve(&self) -> bool {
        self.id_aa64pfr0_el1 & SVE != 0
    }

    /// Returns what a guest may rely on where it runs on CPUs with either registers: of each field the lesser value.
    #[must_use]
    pub fn common(&self, other: &Self) -> Self {
        macro_rules! lesser {
            ($($register:ident),+) => {
                Self { $($register: least(self.$register, other.$register, SIGNED.$register)),+ }
            };
        }
        lesser!(
            id_aa64pfr0_el1,
            id_aa64pfr1_el1,
            id_aa64zfr0_el1,
            id_aa64isar0_el1,
            id_aa64isar1_el1,
            id_aa64isar2_el1,
            id_aa64mmfr0_el1,
            id_aa64mmfr1_el1,
            id_aa64mmfr2_el1,
            id_aa64mmfr3_el1
        )
    }

    /// Returns the register S3_0_C0_C`crm`_`op2`, where `crm` is 1 to 7: that space is all ID registers, and the unallocated
    /// ones are zero.
    pub(crate) const fn value(&self, crm: u8, op2: u8) -> u64 {
        match (crm, op2) {
            (4, 0) => self.id_aa64pfr0_el1,
            (4, 1) => self.id_aa64pfr1_el1,
            (4, 4) => self.id_aa64zfr0_el1,
            (5, 0) => DFR0,
            (6, 0) => self.id_aa64isar0_el1,
            (6, 1) => self.id_aa64isar1_el1,
            (6, 2) => self.id_aa64isar2_el1,
            (7, 0) => self.id_aa64mmfr0_el1,
            (7, 1) => self.id_aa64mmfr1_el1,
            (7, 2) => self.id_aa64mmfr2_el1,
            (7, 3) => self.id_aa64mmfr3_el1,
            _ => 0,
        }
    }
}

/// Returns ID_AA64MMFR0_EL1.PARange of the least size that covers guest addresses of this many bits.
const fn physical_range(ipa_bits: u64) -> u64 {
    match ipa_bits {
        ..=32 => 0,
        33..=36 => 1,
        37..=40 => 2,
        41..=42 => 3,
        43..=44 => 4,
        _ => 5,
    }
}

/// A register made of four-bit fields.
struct Fields(u64);

impl Fields {
    const NONE: Self = Self(0);

    const fn with(self, shift: u32, value: u64) -> Self {
        Self(self.0 | value.wrapping_shl(shift))
    }
}

/// Returns the lesser value of each four-bit field. Those that `signed` marks are signed.
fn least(a: u64, b: u64, signed: u64) -> u64 {
    let mut result = a.to_le_bytes();
    for ((a, b), signed) in result.iter_mut().zip(b.to_le_bytes()).zip(signed.to_le_bytes()) {
        // The order of signed numbers is that of unsigned ones with the sign inverted.
        let low_sign = signed & 0x08;
        let high_sign = signed & 0x80;
        let low = ((*a & 0x0f) ^ low_sign).min((b & 0x0f) ^ low_sign) ^ low_sign;
        let high = ((*a & 0xf0) ^ high_sign).min((b & 0xf0) ^ high_sign) ^ high_sign;
        *a = high | low;
    }
    u64::from_le_bytes(result)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVERYTHING: IdRegisters = IdRegisters {
        // FP and AdvSIMD: 1 is the most there is, 0xf is none.
        id_aa64pfr0_el1: 0xffff_ffff_ff11_ffff,
        id_aa64pfr1_el1: u64::MAX,
        id_aa64zfr0_el1: u64::MAX,
        id_aa64isar0_el1: u64::MAX,
        id_aa64isar1_el1: u64::MAX,
        id_aa64isar2_el1: u64::MAX,
        id_aa64mmfr0_el1: 0xffff_ffff_11ff_ffff,
        id_aa64mmfr1_el1: u64::MAX,
        id_aa64mmfr2_el1: u64::MAX,
        id_aa64mmfr3_el1: u64::MAX,
    };
    const ALL: GuestFeatures = GuestFeatures { ipa_bits: 48, sve: true, pointer_authentication: true };

    fn field(register: u64, shift: u32) -> u64 {
        register >> shift & 0xf
    }

    #[test]
    fn a_guest_sees_what_is_allowed_of_a_cpu_that_has_everything() {
        let guest = EVERYTHING.for_guest(ALL);
        assert_eq!(guest, MOST);
        // AArch64 only at EL0 and EL1, nothing above.
        assert_eq!(guest.id_aa64pfr0_el1 & 0xffff, 0x0011);
        // MPAM, AMU, SEL2, RME.
        assert_eq!([40, 44, 36, 52].map(|shift| field(guest.id_aa64pfr0_el1, shift)), [0; 4]);
        // MTE, SME, NMI, GCS.
        assert_eq!([8, 24, 36, 44].map(|shift| field(guest.id_aa64pfr1_el1, shift)), [0; 4]);
        // No PMU, SPE, trace or BRBE; two breakpoints and watchpoints.
        assert_eq!(guest.value(5, 0), 0x0010_1006);
    }

    #[test]
    fn a_cpu_without_features_gives_none() {
        // As a minimal Armv8.0: no FP, no AdvSIMD, no 64 KiB granule.
        let cpu = IdRegisters {
            id_aa64pfr0_el1: 0x01ff_0011 & !0x0100_0000,
            id_aa64mmfr0_el1: 0x0f00_0000,
            ..IdRegisters::default()
        };
        assert_eq!(cpu.for_guest(ALL), cpu);
    }

    #[test]
    fn a_guest_of_an_armv8_2_cpu() {
        // Much like a Cortex-A76.
        let cpu = IdRegisters {
            id_aa64pfr0_el1: 0x1100_0000_1111_1112,
            id_aa64pfr1_el1: 0x10,
            id_aa64isar0_el1: 0x0000_1000_1021_1120,
            id_aa64isar1_el1: 0x0010_0001,
            id_aa64mmfr0_el1: 0x0010_1122,
            id_aa64mmfr1_el1: 0x1021_2122,
            id_aa64mmfr2_el1: 0x1011,
            ..IdRegisters::default()
        };
        let guest = cpu.for_guest(GuestFeatures { ipa_bits: 36, ..ALL });
        assert_eq!(guest.id_aa64pfr0_el1, 0x1100_0000_1111_0011);
        assert_eq!(guest.id_aa64pfr1_el1, cpu.id_aa64pfr1_el1);
        assert_eq!(guest.id_aa64isar0_el1, cpu.id_aa64isar0_el1);
        assert_eq!(guest.id_aa64isar1_el1, cpu.id_aa64isar1_el1);
        assert_eq!(guest.id_aa64mmfr0_el1, 0x0010_0121);
        assert_eq!(guest.id_aa64mmfr1_el1, 0x0020_2002);
        assert_eq!(guest.id_aa64mmfr2_el1, 0x0000_0011);
    }

    #[test]
    fn the_vm_takes_features_away() {
        let bare = EVERYTHING.for_guest(GuestFeatures { ipa_bits: 40, sve: false, pointer_authentication: false });
        assert_eq!(field(bare.id_aa64pfr0_el1, 32), 0);
        assert_eq!(bare.id_aa64zfr0_el1, 0);
        assert_eq!([4, 8, 24, 28].map(|shift| field(bare.id_aa64isar1_el1, shift)), [0; 4]);
        assert_eq!([8, 12, 24].map(|shift| field(bare.id_aa64isar2_el1, shift)), [0; 3]);
        assert_eq!(field(bare.id_aa64mmfr0_el1, 0), 2);
        assert_eq!(field(bare.id_aa64isar1_el1, 0), 2, "others stay");
    }

    #[test]
    fn the_physical_range_covers_the_guest_addresses() {
        let bits = [32, 36, 40, 42, 44, 48];
        for ipa_bits in 32..=48 {
            let range = usize::try_from(physical_range(ipa_bits)).unwrap();
            assert!(bits[range] >= ipa_bits && (range == 0 || bits[range - 1] < ipa_bits), "{ipa_bits}");
        }
    }

    proptest! {
        #[test]
        #[cfg_attr(miri, ignore = "takes Miri too long")]
        fn each_field_is_the_lesser_one(a: u64, b: u64) {
            let signed = SIGNED.id_aa64pfr0_el1;
            let result = least(a, b, signed);
            for shift in (0..64).step_by(4) {
                let number = |register| match field(signed, shift) {
                    0 => field(register, shift) as i64,
                    _ => (field(register, shift) as i64) << 60 >> 60,
                };
                prop_assert_eq!(number(result), number(a).min(number(b)));
            }
        }

        /// No guest has more than its CPU, nor than is allowed.
        #[test]
        fn guests_have_no_more_than_either(registers: [u64; 10], other: [u64; 10]) {
            let cpu = |[a, b, c, d, e, f, g, h, i, j]: [u64; 10]| IdRegisters {
                id_aa64pfr0_el1: a,
                id_aa64pfr1_el1: b,
                id_aa64zfr0_el1: c,
                id_aa64isar0_el1: d,
                id_aa64isar1_el1: e,
                id_aa64isar2_el1: f,
                id_aa64mmfr0_el1: g,
                id_aa64mmfr1_el1: h,
                id_aa64mmfr2_el1: i,
                id_aa64mmfr3_el1: j,
            };
            let (cpu, other) = (cpu(registers), cpu(other));
            let guest = cpu.common(&other).for_guest(ALL);
            prop_assert_eq!(guest.common(&cpu), guest);
            prop_assert_eq!(guest.common(&other), guest);
            prop_assert_eq!(guest.common(&MOST), guest);
        }
    }
}
