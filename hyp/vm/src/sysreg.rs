//! System registers that trap to EL2.
//!
//! It is expected that HCR_EL2.{TID1, TID3, TID5, TACR, TERR, TLOR, TIDCP, IMO, FMO}, MDCR_EL2.{TDA, TDOSA, TDRA, TPM, TTRF} and
//! CPTR_EL2.TTA are set for guests, and may be that the physical timer, ICC_DIR_EL1 and ICC_SRE_EL1 trap. What traps and is not
//! listed here is undefined to the guest.

use ravelin_vgic::SgiRegister;

use crate::{Context, IdRegisters};

/// An MSR or MRS that trapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SysregAccess {
    op0: u8,
    op1: u8,
    crn: u8,
    crm: u8,
    op2: u8,
    /// Number of the general-purpose register; 31 is XZR.
    register: u8,
    /// MSR, not MRS.
    write: bool,
}

/// What becomes of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SysregAction {
    /// MRS of this value.
    Read(u64),
    /// MSR that has no effect, or has had it.
    Written,
    /// MSR of this value to a register that generates SGIs.
    Sgi(SgiRegister, u64),
    /// MSR of this value to ICC_DIR_EL1.
    Deactivate(u64),
    /// There is no such register, or not in this direction.
    Undefined,
}

/// OSLSR_EL1.OSLM: there is an OS lock. It is open.
const OS_LOCK_IMPLEMENTED: u64 = 1 << 3;

/// ICC_SRE_EL1: system registers only, no bypass of FIQ and IRQ.
const SYSTEM_REGISTER_ENABLE: u64 = 0b111;

/// Bits of CNTV_CTL_EL0 and CNTP_CTL_EL0.
mod timer {
    pub(super) const ENABLE: u64 = 1 << 0;
    pub(super) const IMASK: u64 = 1 << 1;
    pub(super) const ISTATUS: u64 = 1 << 2;
}

/// Returns what is kept of a value for CNTV_CTL_EL0 or CNTP_CTL_EL0.
pub(crate) const fn timer_control(value: u64) -> u64 {
    value & (timer::ENABLE | timer::IMASK)
}

/// Returns CNTV_CTL_EL0 or CNTP_CTL_EL0 of a timer that fires when `counter` reaches `deadline`.
pub(crate) const fn timer_status(control: u64, counter: u64, deadline: u64) -> u64 {
    let control = timer_control(control);
    if control & timer::ENABLE != 0 && counter >= deadline { control | timer::ISTATUS } else { control }
}

impl SysregAccess {
    /// Decodes the ISS of an exception from MSR, MRS or a system instruction (EC 0x18).
    #[must_use]
    pub fn decode(esr: u64) -> Self {
        let low_byte = |value: u64| {
            let [byte, ..] = value.to_le_bytes();
            byte
        };
        Self {
            op0: low_byte(esr >> 20 & 0x3),
            op1: low_byte(esr >> 14 & 0x7),
            crn: low_byte(esr >> 10 & 0xf),
            crm: low_byte(esr >> 1 & 0xf),
            op2: low_byte(esr >> 17 & 0x7),
            register: low_byte(esr >> 5 & 0x1f),
            write: esr & 1 == 0,
        }
    }

    /// Returns the register's number if it is the load of an ID register, whose value depends on nothing but the vCPU's
    /// [`IdRegisters`], with the value.
    #[must_use]
    pub fn id_value(&self, ids: &IdRegisters) -> Option<(u8, u64)> {
        match (self.write, self.op0, self.op1, self.crn, self.crm) {
            (false, 3, 0, 0, 1..=7) => Some((self.register, ids.value(self.crm, self.op2))),
            _ => None,
        }
    }

    /// Performs the access, for a vCPU with `ids`, when the physical counter is at `now`. The program counter stays.
    #[must_use]
    pub fn emulate(&self, context: &mut Context, ids: &IdRegisters, now: u64) -> SysregAction {
        let action = if self.write {
            self.write(context, context.register(self.register), now)
        } else {
            self.read(context, ids, now)
        };
        if let SysregAction::Read(value) = action {
            context.set_register(self.register, value);
        }
        action
    }

    /// Returns the access to the system register of this [number](ravelin_abi::system_register), for [`SysregAccess::read`] and
    /// [`SysregAccess::write`] only.
    pub(crate) fn of(number: u64) -> Self {
        let field = |shift: u32, mask: u8| {
            let [byte, ..] = (number >> shift).to_le_bytes();
            byte & mask
        };
        let (op0, op1, crn, crm, op2) = (field(14, 3), field(11, 7), field(7, 15), field(3, 15), field(0, 7));
        Self { op0, op1, crn, crm, op2, register: 31, write: false }
    }

    /// Returns what the register reads as.
    pub(crate) fn read(&self, context: &Context, ids: &IdRegisters, now: u64) -> SysregAction {
        let &Self { op0, op1, crn, crm, op2, .. } = self;
        let value = match (op0, op1, crn, crm, op2) {
            // The space of ID registers.
            (3, 0, 0, 1..=7, _) => ids.value(crm, op2),
            // REVIDR_EL1, AIDR_EL1.
            (3, 0, 0, 0, 6) | (3, 1, 0, 0, 7) => 0,
            // OSLSR_EL1.
            (2, 0, 1, 1, 4) => OS_LOCK_IMPLEMENTED,
            // MDRAR_EL1, DBGAUTHSTATUS_EL1, MDCCSR_EL0.
            (2, 0, 1, 0, 0) | (2, 0, 7, 14, 6) | (2, 3, 0, 1, 0) => 0,
            // ERRIDR_EL1, ERXFR_EL1, ERXPFGF_EL1: no error records.
            (3, 0, 5, 3, 0) | (3, 0, 5, 4, 0 | 4) => 0,
            // ICC_SRE_EL1.
            (3, 0, 12, 12, 5) => SYSTEM_REGISTER_ENABLE,
            // CNTP_TVAL_EL0: the low 32 bits of what is left.
            (3, 3, 14, 2, 0) => context.cntp_cval_el0.wrapping_sub(now) & 0xffff_ffff,
            // CNTP_CTL_EL0.
            (3, 3, 14, 2, 1) => timer_status(context.cntp_ctl_el0, now, context.cntp_cval_el0),
            // CNTP_CVAL_EL0.
            (3, 3, 14, 2, 2) => context.cntp_cval_el0,
            _ if self.is_inert() => 0,
            _ => return SysregAction::Undefined,
        };
        SysregAction::Read(value)
    }

    /// Writes the register.
    pub(crate) fn write(&self, context: &mut Context, value: u64, now: u64) -> SysregAction {
        let &Self { op0, op1, crn, crm, op2, .. } = self;
        match (op0, op1, crn, crm, op2) {
            (3, 0, 12, 11, 1) => return SysregAction::Deactivate(value),
            (3, 0, 12, 11, 5) => return SysregAction::Sgi(SgiRegister::Sgi1, value),
            (3, 0, 12, 11, 6) => return SysregAction::Sgi(SgiRegister::AliasSgi1, value),
            (3, 0, 12, 11, 7) => return SysregAction::Sgi(SgiRegister::Sgi0, value),
            // OSLAR_EL1, ICC_SRE_EL1.
            (2, 0, 1, 0, 4) | (3, 0, 12, 12, 5) => {}
            // CNTP_TVAL_EL0: a signed number of 32 bits from now on.
            (3, 3, 14, 2, 0) => {
                const SIGN: u64 = 1 << 31;
                let left = (value & 0xffff_ffff ^ SIGN).wrapping_sub(SIGN);
                context.cntp_cval_el0 = now.wrapping_add(left);
            }
            (3, 3, 14, 2, 1) => context.cntp_ctl_el0 = timer_control(value),
            (3, 3, 14, 2, 2) => context.cntp_cval_el0 = value,
            _ if self.is_inert() => {}
            _ => return SysregAction::Undefined,
        }
        SysregAction::Written
    }

    /// Whether the register can be read and written, reads as zero and ignores what is written.
    const fn is_inert(&self) -> bool {
        matches!(
            (self.op0, self.op1, self.crn, self.crm, self.op2),
            // DBGBVR<n>_EL1, DBGBCR<n>_EL1, DBGWVR<n>_EL1, DBGWCR<n>_EL1.
            (2, 0, 0, _, 4..=7)
            // MDCCINT_EL1, MDSCR_EL1, OSDTRRX_EL1, OSDTRTX_EL1, OSECCR_EL1.
            | (2, 0, 0, 2, 0 | 2) | (2, 0, 0, 0 | 3 | 6, 2)
            // OSDLR_EL1, DBGPRCR_EL1.
            | (2, 0, 1, 3 | 4, 4)
            // DBGCLAIMSET_EL1, DBGCLAIMCLR_EL1.
            | (2, 0, 7, 8 | 9, 6)
            // DBGDTR_EL0, DBGDTRRX_EL0 and DBGDTRTX_EL0.
            | (2, 3, 0, 4 | 5, 0)
            // ACTLR_EL1.
            | (3, 0, 1, 0, 1)
            // ERRSELR_EL1; ERXCTLR_EL1, ERXSTATUS_EL1, ERXADDR_EL1; ERXPFGCTL_EL1, ERXPFGCDN_EL1; ERXMISC<n>_EL1.
            | (3, 0, 5, 3, 1) | (3, 0, 5, 4, 1..=3 | 5..=6) | (3, 0, 5, 5, 0..=3)
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Encoding = [u64; 5];

    const IDS: IdRegisters = IdRegisters {
        id_aa64pfr0_el1: 0x10,
        id_aa64pfr1_el1: 0x11,
        id_aa64zfr0_el1: 0x12,
        id_aa64isar0_el1: 0x13,
        id_aa64isar1_el1: 0x14,
        id_aa64isar2_el1: 0x15,
        id_aa64mmfr0_el1: 0x16,
        id_aa64mmfr1_el1: 0x17,
        id_aa64mmfr2_el1: 0x18,
        id_aa64mmfr3_el1: 0x19,
    };
    const MDSCR: Encoding = [2, 0, 0, 2, 2];
    const CNTP_TVAL: Encoding = [3, 3, 14, 2, 0];
    const CNTP_CTL: Encoding = [3, 3, 14, 2, 1];
    const CNTP_CVAL: Encoding = [3, 3, 14, 2, 2];

    fn access([op0, op1, crn, crm, op2]: Encoding, register: u64, write: bool) -> SysregAccess {
        let esr = 0x18 << 26
            | 1 << 25
            | op0 << 20
            | op2 << 17
            | op1 << 14
            | crn << 10
            | register << 5
            | crm << 1
            | u64::from(!write);
        SysregAccess::decode(esr)
    }

    fn read_at(context: &Context, encoding: Encoding, now: u64) -> SysregAction {
        let mut context = *context;
        let action = access(encoding, 7, false).emulate(&mut context, &IDS, now);
        if let SysregAction::Read(value) = action {
            assert_eq!(context.x[7], value);
        }
        action
    }

    fn read(encoding: Encoding) -> SysregAction {
        read_at(&Context { x: [0x5a5a; 31], ..Context::default() }, encoding, 0)
    }

    fn write(context: &mut Context, encoding: Encoding, value: u64, now: u64) -> SysregAction {
        context.x[9] = value;
        let before = context.x;
        let action = access(encoding, 9, true).emulate(context, &IDS, now);
        assert_eq!(context.x, before);
        action
    }

    #[test]
    fn the_syndrome_is_taken_apart() {
        // MSR MDSCR_EL1, x9 and MRS x10, ICC_SRE_EL1, from their encodings.
        let of_instruction = |instruction: u64| {
            let field = |shift: u32, bits: u32| instruction >> shift & ((1 << bits) - 1);
            let encoding = [field(19, 2), field(16, 3), field(12, 4), field(8, 4), field(5, 3)];
            access(encoding, field(0, 5), field(21, 1) == 0)
        };
        assert_eq!(
            of_instruction(0xd510_0249),
            SysregAccess { op0: 2, op1: 0, crn: 0, crm: 2, op2: 2, register: 9, write: true }
        );
        assert_eq!(
            of_instruction(0xd538_ccaa),
            SysregAccess { op0: 3, op1: 0, crn: 12, crm: 12, op2: 5, register: 10, write: false }
        );
    }

    #[test]
    fn id_registers_are_those_of_the_guest() {
        let values = |crm| [0, 1, 2, 3, 4, 5, 6, 7].map(|op2| read([3, 0, 0, crm, op2]));
        let zero = SysregAction::Read(0);
        for crm in 1..=3 {
            assert_eq!(values(crm), [zero; 8], "AArch32");
        }
        let is = SysregAction::Read;
        assert_eq!(values(4), [is(0x10), is(0x11), zero, zero, is(0x12), zero, zero, zero]);
        assert_eq!(values(5), [is(0x0010_1006), zero, zero, zero, zero, zero, zero, zero]);
        assert_eq!(values(6), [is(0x13), is(0x14), is(0x15), zero, zero, zero, zero, zero]);
        assert_eq!(values(7), [is(0x16), is(0x17), is(0x18), is(0x19), zero, zero, zero, zero]);
    }

    #[test]
    fn debug_registers_read_as_zero_and_ignore_writes() {
        let breakpoints = (0..16).flat_map(|crm| (4..8).map(move |op2| [2, 0, 0, crm, op2]));
        for encoding in breakpoints.chain([MDSCR, [2, 0, 1, 3, 4], [2, 3, 0, 4, 0], [3, 0, 1, 0, 1], [3, 0, 5, 4, 2]]) {
            assert_eq!(read(encoding), SysregAction::Read(0), "{encoding:?}");
            let mut context = Context::default();
            assert_eq!(write(&mut context, encoding, u64::MAX, 0), SysregAction::Written);
            assert_eq!(Context { x: [0; 31], ..context }, Context::default());
        }
    }

    #[test]
    fn there_is_an_os_lock() {
        assert_eq!(read([2, 0, 1, 1, 4]), SysregAction::Read(1 << 3));
    }

    #[test]
    fn one_direction_only() {
        // ID_AA64PFR0_EL1, OSLSR_EL1, ERRIDR_EL1, MDRAR_EL1.
        for encoding in [[3, 0, 0, 4, 0], [2, 0, 1, 1, 4], [3, 0, 5, 3, 0], [2, 0, 1, 0, 0]] {
            assert!(matches!(read(encoding), SysregAction::Read(_)), "{encoding:?}");
            assert_eq!(write(&mut Context::default(), encoding, 0, 0), SysregAction::Undefined, "{encoding:?}");
        }
        // OSLAR_EL1, ICC_DIR_EL1, ICC_SGI1R_EL1.
        for encoding in [[2, 0, 1, 0, 4], [3, 0, 12, 11, 1], [3, 0, 12, 11, 5]] {
            assert_eq!(read(encoding), SysregAction::Undefined, "{encoding:?}");
            assert_ne!(write(&mut Context::default(), encoding, 0, 0), SysregAction::Undefined, "{encoding:?}");
        }
    }

    #[test]
    fn what_guests_do_not_have_is_undefined() {
        for encoding in [
            [3, 3, 9, 12, 0],  // PMCR_EL0
            [3, 3, 9, 13, 0],  // PMCCNTR_EL0
            [3, 3, 14, 15, 7], // PMCCFILTR_EL0
            [3, 0, 9, 9, 0],   // PMSCR_EL1
            [2, 1, 0, 1, 0],   // TRCPRGCTLR
            [3, 0, 1, 0, 6],   // GCR_EL1
            [3, 1, 0, 0, 4],   // GMID_EL1
            [3, 0, 10, 5, 0],  // MPAM1_EL1
            [3, 0, 10, 4, 3],  // LORC_EL1
            [3, 3, 13, 2, 0],  // AMCR_EL0
            [3, 0, 13, 0, 7],  // SCXTNUM_EL1
            [3, 0, 1, 2, 6],   // SMCR_EL1
            [3, 0, 15, 0, 0],  // implementation defined
            [3, 3, 11, 0, 0],
            [1, 0, 7, 6, 2], // DC ISW
        ] {
            assert_eq!(read(encoding), SysregAction::Undefined, "{encoding:?}");
            assert_eq!(write(&mut Context::default(), encoding, 1, 0), SysregAction::Undefined, "{encoding:?}");
        }
    }

    #[test]
    fn revisions_are_not_told() {
        for register in [[3, 0, 0, 0, 6], [3, 1, 0, 0, 7]] {
            assert_eq!(read(register), SysregAction::Read(0));
        }
    }

    #[test]
    fn the_interrupt_controller_hears_of_its_registers() {
        let written = |op2| write(&mut Context::default(), [3, 0, 12, 11, op2], 0x12, 0);
        assert_eq!(written(1), SysregAction::Deactivate(0x12));
        assert_eq!(written(5), SysregAction::Sgi(SgiRegister::Sgi1, 0x12));
        assert_eq!(written(6), SysregAction::Sgi(SgiRegister::AliasSgi1, 0x12));
        assert_eq!(written(7), SysregAction::Sgi(SgiRegister::Sgi0, 0x12));
        assert_eq!(read([3, 0, 12, 12, 5]), SysregAction::Read(7));
        assert_eq!(write(&mut Context::default(), [3, 0, 12, 12, 5], 0, 0), SysregAction::Written);
    }

    #[test]
    fn register_31_is_zero() {
        let mut context = Context { x: [3; 31], cntp_cval_el0: 5, ..Context::default() };
        let before = context;
        assert_eq!(access(CNTP_CVAL, 31, false).emulate(&mut context, &IDS, 0), SysregAction::Read(5));
        assert_eq!(context, before);
        assert_eq!(access(CNTP_CVAL, 31, true).emulate(&mut context, &IDS, 0), SysregAction::Written);
        assert_eq!(context, Context { cntp_cval_el0: 0, ..before });
    }

    #[test]
    fn the_physical_timer_counts() {
        let mut context = Context::default();
        assert_eq!(write(&mut context, CNTP_TVAL, 100, 1000), SysregAction::Written);
        assert_eq!(context.cntp_cval_el0, 1100);
        assert_eq!(read_at(&context, CNTP_TVAL, 1001), SysregAction::Read(99));
        assert_eq!(read_at(&context, CNTP_TVAL, 1101), SysregAction::Read(0xffff_ffff));
        assert_eq!(write(&mut context, CNTP_TVAL, 0xdead_beef_ffff_fff0, 1000), SysregAction::Written);
        assert_eq!(context.cntp_cval_el0, 984);
        assert_eq!(write(&mut context, CNTP_TVAL, 0x8000_0000, 0), SysregAction::Written);
        assert_eq!(context.cntp_cval_el0, 0xffff_ffff_8000_0000);

        assert_eq!(write(&mut context, CNTP_CVAL, 50, 0), SysregAction::Written);
        assert_eq!(read_at(&context, CNTP_CVAL, 0), SysregAction::Read(50));
        for (control, now, expected) in
            [(1, 49, 1), (1, 50, 5), (3, 50, 7), (2, 50, 2), (0, 50, 0), (!0, 49, 3), (4, 49, 0)]
        {
            assert_eq!(write(&mut context, CNTP_CTL, control, 0), SysregAction::Written);
            assert_eq!(read_at(&context, CNTP_CTL, now), SysregAction::Read(expected), "{control:#x} at {now}");
        }
    }

    proptest! {
        /// Whatever traps changes no more than its own register and the timer's two.
        #[test]
        #[cfg_attr(miri, ignore = "takes Miri too long")]
        fn an_access_changes_one_register(iss in 0_u64..1 << 25, x: [u64; 31], now: u64) {
            let before = Context { x, cntp_cval_el0: 1, cntp_ctl_el0: 1, ..Context::reset(8, 0, 9) };
            let access = SysregAccess::decode(0x18 << 26 | iss);
            let mut after = before;
            let action = access.emulate(&mut after, &IDS, now);
            if let SysregAction::Read(value) = action {
                prop_assert!(!access.write);
                let mut model = before;
                model.set_register(access.register, value);
                prop_assert_eq!(after, model);
            } else {
                let Context { cntp_cval_el0, cntp_ctl_el0, .. } = after;
                prop_assert_eq!(after, Context { cntp_cval_el0, cntp_ctl_el0, ..before });
                prop_assert!(action != SysregAction::Undefined || after == before);
            }
        }
    }
}
