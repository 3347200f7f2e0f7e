//! Exceptions that the host or a guest takes at EL1 in place of what came to EL2.

/// Registers of an exception that was taken from EL1 or EL0 to EL2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trapped {
    /// ESR_EL2.
    pub esr: u64,
    /// FAR_EL2.
    pub far: u64,
    /// SPSR_EL2.
    pub spsr: u64,
    /// SCTLR_EL1 of whoever caused it.
    pub sctlr_el1: u64,
}

/// Features that have a part in what PSTATE is after an exception. As large as a register, in which it is passed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(align(8))]
pub struct PstateFeatures {
    /// FEAT_PAN: ID_AA64MMFR1_EL1.PAN is not 0.
    pub pan: bool,
    /// FEAT_DIT: ID_AA64PFR0_EL1.DIT is not 0.
    pub dit: bool,
    /// FEAT_SSBS: ID_AA64PFR1_EL1.SSBS is not 0.
    pub ssbs: bool,
    /// FEAT_MTE: ID_AA64PFR1_EL1.MTE is not 0.
    pub mte: bool,
    /// FEAT_NMI: ID_AA64PFR1_EL1.NMI is not 0.
    pub nmi: bool,
}

/// An exception to be taken at EL1. ELR_EL1 and SPSR_EL1 get the values of their EL2 counterparts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// ESR_EL1.
    pub esr: u64,
    /// FAR_EL1; `None` leaves it alone.
    pub far: Option<u64>,
    /// PSTATE in the handler, in the format of SPSR_EL2.
    pub pstate: u64,
    /// Offset of the handler from VBAR_EL1.
    pub vector_offset: u64,
}

/// Fields of ESR_ELx and of the ISS of an abort (Arm ARM DDI 0487, D24.2.39 "ESR_EL1").
mod esr {
    pub(super) const EC_SHIFT: u32 = 26;
    pub(super) const EC_MASK: u64 = 0x3f;
    pub(super) const EC_UNKNOWN: u64 = 0;
    pub(super) const EC_INSTRUCTION_ABORT_LOWER: u64 = 0x20;
    pub(super) const EC_INSTRUCTION_ABORT_SAME: u64 = 0x21;
    pub(super) const EC_DATA_ABORT_LOWER: u64 = 0x24;
    pub(super) const EC_DATA_ABORT_SAME: u64 = 0x25;
    /// Length of the instruction; also 1 for every class of exception here.
    pub(super) const IL: u64 = 1 << 25;
    /// FAR does not hold the address.
    pub(super) const FNV: u64 = 1 << 10;
    /// Cache maintenance or address translation instruction.
    pub(super) const CM: u64 = 1 << 8;
    /// Write, not read.
    pub(super) const WNR: u64 = 1 << 6;
    pub(super) const FSC: u64 = 0x3f;
    /// The last code of the faults that translation tables give: address size, translation, access flag, permission.
    pub(super) const FSC_PERMISSION_L3: u64 = 0x0f;
    pub(super) const FSC_ALIGNMENT: u64 = 0x21;
    /// Synchronous external abort, not on a walk.
    pub(super) const FSC_EXTERNAL: u64 = 0x10;
}

/// Bits of SCTLR_EL1.
mod sctlr {
    pub(super) const SPAN: u64 = 1 << 23;
    pub(super) const DSSBS: u64 = 1 << 44;
    pub(super) const SPINTMASK: u64 = 1 << 62;
}

/// Bits of SPSR_ELx. Those that are kept across an exception are where AArch32 has them, too.
mod spsr {
    pub(super) const EL1H: u64 = 0b0101;
    pub(super) const SP_SELECT: u64 = 1;
    pub(super) const EL: u64 = 0b1100;
    pub(super) const AARCH32: u64 = 1 << 4;
    pub(super) const DAIF: u64 = 0xf << 6;
    pub(super) const SSBS: u64 = 1 << 12;
    pub(super) const ALLINT: u64 = 1 << 13;
    pub(super) const PAN: u64 = 1 << 22;
    pub(super) const DIT: u64 = 1 << 24;
    pub(super) const TCO: u64 = 1 << 25;
    pub(super) const NZCV: u64 = 0xf << 28;
}

impl Trapped {
    /// Returns the abort that tells the host of the one that came to EL2.
    ///
    /// What the hypervisor's tables refuse is reported as an alignment fault. For a translation or permission fault an
    /// operating system would look into its own tables, find nothing wrong and try again for ever, and an external abort
    /// makes it distrust the machine. An alignment fault ends the access and nothing else: in Linux a signal for a process
    /// and the fix-up for a guarded access of the kernel. Instruction aborts get the same code, though the architecture has
    /// it for data aborts only, because Linux treats it alike. Aborts with another reason keep it.
    #[must_use]
    pub const fn abort(&self, features: PstateFeatures) -> Exception {
        let status = match self.esr & esr::FSC {
            ..=esr::FSC_PERMISSION_L3 => esr::FSC_ALIGNMENT,
            other => other | self.esr & esr::FNV,
        };
        self.abort_with(status, features)
    }

    /// Returns the abort that tells a guest that nothing answers at the address, as a bus does.
    #[must_use]
    pub const fn external_abort(&self, features: PstateFeatures) -> Exception {
        self.abort_with(esr::FSC_EXTERNAL | self.esr & esr::FNV, features)
    }

    const fn abort_with(&self, status: u64, features: PstateFeatures) -> Exception {
        let data = (self.esr >> esr::EC_SHIFT) & esr::EC_MASK == esr::EC_DATA_ABORT_LOWER;
        let class = match (data, self.came_from_el0()) {
            (true, true) => esr::EC_DATA_ABORT_LOWER,
            (true, false) => esr::EC_DATA_ABORT_SAME,
            (false, true) => esr::EC_INSTRUCTION_ABORT_LOWER,
            (false, false) => esr::EC_INSTRUCTION_ABORT_SAME,
        };
        let kept = if data { self.esr & (esr::WNR | esr::CM) } else { 0 };
        self.exception(class << esr::EC_SHIFT | esr::IL | kept | status, Some(self.far), features)
    }

    /// Returns the exception for an instruction that does not exist. For every trap that the hypervisor has no answer to.
    #[must_use]
    pub const fn undefined(&self, features: PstateFeatures) -> Exception {
        self.exception(esr::EC_UNKNOWN << esr::EC_SHIFT | esr::IL, None, features)
    }

    const fn exception(&self, esr: u64, far: Option<u64>, features: PstateFeatures) -> Exception {
        Exception { esr, far, pstate: self.pstate(features), vector_offset: self.vector_offset() }
    }

    /// EL1 is always AArch64, EL0 may be AArch32.
    const fn came_from_el0(&self) -> bool {
        self.spsr & spsr::AARCH32 != 0 || self.spsr & spsr::EL == 0
    }

    /// Offset of the synchronous exception's vector (Arm ARM DDI 0487, D1.3.1 "Exception entry", table of vector offsets).
    const fn vector_offset(&self) -> u64 {
        if self.spsr & spsr::AARCH32 != 0 {
            0x600
        } else if self.came_from_el0() {
            0x400
        } else if self.spsr & spsr::SP_SELECT != 0 {
            0x200
        } else {
            0x000
        }
    }

    /// PSTATE after an exception that is taken to EL1 (Arm ARM DDI 0487, D1.3.1, and J1, AArch64.TakeException). What is
    /// not named becomes 0: SS, IL, BTYPE, UAO.
    const fn pstate(&self, features: PstateFeatures) -> u64 {
        let mut pstate = spsr::EL1H | spsr::DAIF | self.spsr & spsr::NZCV;
        if features.dit {
            pstate |= self.spsr & spsr::DIT;
        }
        if features.pan {
            pstate |= if self.sctlr_el1 & sctlr::SPAN == 0 { spsr::PAN } else { self.spsr & spsr::PAN };
        }
        if features.ssbs && self.sctlr_el1 & sctlr::DSSBS != 0 {
            pstate |= spsr::SSBS;
        }
        if features.mte {
            pstate |= spsr::TCO;
        }
        if features.nmi && self.sctlr_el1 & sctlr::SPINTMASK == 0 {
            pstate |= spsr::ALLINT;
        }
        pstate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: PstateFeatures = PstateFeatures { pan: false, dit: false, ssbs: false, mte: false, nmi: false };
    const ALL: PstateFeatures = PstateFeatures { pan: true, dit: true, ssbs: true, mte: true, nmi: true };
    const DATA: u64 = 0x24 << 26;
    const INSTRUCTION: u64 = 0x20 << 26;
    const EL0: u64 = 0;
    const EL1T: u64 = 4;
    const EL1H: u64 = 5;
    const EL0_AARCH32: u64 = 0x10;
    const HANDLER: u64 = 0x3c5;

    fn trapped(esr: u64, spsr: u64) -> Trapped {
        Trapped { esr, far: 0xffff_0000_dead_beef, spsr, sctlr_el1: 1 << 23 }
    }

    #[test]
    fn the_class_tells_the_level() {
        let class = |esr, spsr| trapped(esr, spsr).abort(NONE).esr >> 26;
        assert_eq!(class(DATA, EL0), 0x24);
        assert_eq!(class(DATA, EL0_AARCH32), 0x24);
        assert_eq!(class(DATA, EL1H), 0x25);
        assert_eq!(class(DATA, EL1T), 0x25);
        assert_eq!(class(INSTRUCTION, EL0), 0x20);
        assert_eq!(class(INSTRUCTION, EL1H), 0x21);
    }

    #[test]
    fn the_vector_tells_the_source() {
        let offset = |spsr| trapped(DATA, spsr).abort(NONE).vector_offset;
        assert_eq!([EL1T, EL1H, EL0, EL0_AARCH32].map(offset), [0, 0x200, 0x400, 0x600]);
        // Thumb user mode, and the flags of AArch32 that could be taken for an exception level.
        assert_eq!(offset(0x10 | 0x20 | 0x0c), 0x600);
    }

    #[test]
    fn stage_2_faults_become_alignment_faults() {
        // ISV with a register and a size, S1PTW and the level are for EL2 only.
        let isv_and_friends = 0x1f << 16 | 1 << 24 | 1 << 7;
        for status in 0..=0x0f {
            assert_eq!(trapped(DATA | isv_and_friends | status, EL0).abort(NONE).esr, DATA | 1 << 25 | 0x21);
            assert_eq!(trapped(INSTRUCTION | status, EL0).abort(NONE).esr, INSTRUCTION | 1 << 25 | 0x21);
        }
    }

    #[test]
    fn other_aborts_keep_their_status() {
        for status in [0x10, 0x21, 0x30, 0x35] {
            let abort = |esr| trapped(esr | status, EL0).abort(NONE).esr;
            assert_eq!(abort(DATA), DATA | 1 << 25 | status);
            assert_eq!(
                abort(DATA | 0x1f << 16 | 1 << 24 | 1 << 7),
                DATA | 1 << 25 | status,
                "the rest is for EL2 only"
            );
            assert_eq!(abort(DATA | 1 << 10), DATA | 1 << 25 | 1 << 10 | status, "that the address is not there");
        }
    }

    #[test]
    fn an_external_abort_says_no_more_than_that() {
        let isv_and_friends = 0x1f << 16 | 1 << 24 | 1 << 7;
        for status in [0x05, 0x07, 0x0b, 0x0f, 0x10, 0x21, 0x35] {
            let abort = |esr, spsr| trapped(esr | isv_and_friends | status, spsr).external_abort(NONE);
            assert_eq!(abort(DATA, EL1H).esr, 0x25 << 26 | 1 << 25 | 0x10);
            assert_eq!(abort(DATA | 1 << 6, EL0).esr, 0x24 << 26 | 1 << 25 | 1 << 6 | 0x10);
            assert_eq!(abort(INSTRUCTION, EL1H).esr, 0x21 << 26 | 1 << 25 | 0x10);
            assert_eq!(abort(INSTRUCTION | 1 << 10, EL0).esr, INSTRUCTION | 1 << 25 | 1 << 10 | 0x10);
            assert_eq!(abort(DATA, EL1H).far, Some(0xffff_0000_dead_beef));
        }
    }

    #[test]
    fn direction_and_cache_maintenance_are_kept_of_data_aborts() {
        assert_eq!(trapped(DATA | 1 << 6 | 1 << 8 | 7, EL0).abort(NONE).esr, DATA | 1 << 25 | 1 << 6 | 1 << 8 | 0x21);
        assert_eq!(trapped(INSTRUCTION | 1 << 6 | 7, EL0).abort(NONE).esr, INSTRUCTION | 1 << 25 | 0x21);
    }

    #[test]
    fn undefined_has_no_syndrome_and_no_address() {
        let exception = trapped(0x18 << 26 | 0x1234, EL1H).undefined(NONE);
        assert_eq!(exception, Exception { esr: 1 << 25, far: None, pstate: HANDLER, vector_offset: 0x200 });
    }

    #[test]
    fn an_abort_has_the_address() {
        assert_eq!(trapped(DATA, EL0).abort(NONE).far, Some(0xffff_0000_dead_beef));
    }

    #[test]
    fn pstate_keeps_flags_and_clears_the_rest() {
        // SS, IL, UAO, BTYPE, SSBS, TCO, ALLINT and an interrupt mask that was off.
        let busy = 1 << 21 | 1 << 20 | 1 << 23 | 3 << 10 | 1 << 12 | 1 << 25 | 1 << 13 | EL0;
        assert_eq!(trapped(DATA, busy).abort(NONE).pstate, HANDLER);
        assert_eq!(trapped(DATA, 0xf << 28 | busy).abort(NONE).pstate, 0xf << 28 | HANDLER);
    }

    #[test]
    fn pstate_depends_on_features() {
        let pstate =
            |features, sctlr_el1, spsr| Trapped { sctlr_el1, ..trapped(DATA, spsr) }.abort(features).pstate & !HANDLER;
        let span = 1 << 23;
        let spintmask = 1 << 62;
        let quiet = span | spintmask;

        let pan = PstateFeatures { pan: true, ..NONE };
        assert_eq!(pstate(pan, 0, EL0), 1 << 22);
        assert_eq!(pstate(pan, span, EL0), 0);
        assert_eq!(pstate(pan, span, 1 << 22), 1 << 22);
        assert_eq!(pstate(NONE, 0, 1 << 22), 0);

        let dit = PstateFeatures { dit: true, ..NONE };
        assert_eq!(pstate(dit, quiet, 1 << 24), 1 << 24);
        assert_eq!(pstate(dit, quiet, 1 << 22), 0);
        assert_eq!(pstate(NONE, quiet, 1 << 24), 0);

        let ssbs = PstateFeatures { ssbs: true, ..NONE };
        assert_eq!(pstate(ssbs, quiet | 1 << 44, EL0), 1 << 12);
        assert_eq!(pstate(ssbs, quiet, 1 << 12), 0);
        assert_eq!(pstate(NONE, quiet | 1 << 44, EL0), 0);

        let mte = PstateFeatures { mte: true, ..NONE };
        assert_eq!(pstate(mte, quiet, EL0), 1 << 25);

        let nmi = PstateFeatures { nmi: true, ..NONE };
        assert_eq!(pstate(nmi, span, EL0), 1 << 13);
        assert_eq!(pstate(nmi, quiet, 1 << 13), 0);

        assert_eq!(pstate(ALL, 1 << 44, 1 << 24), 1 << 12 | 1 << 13 | 1 << 22 | 1 << 24 | 1 << 25);
    }
}
