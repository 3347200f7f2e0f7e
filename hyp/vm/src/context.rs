//! Registers of a vCPU.

use crate::{Exception, PstateFeatures, Trapped};

/// What of a vCPU is in the CPU while it runs, and here while it does not. In the order in which the world switch, whose
/// assembly knows the offsets, goes through it; 64 bits each.
///
/// Elsewhere are: FP, SIMD and SVE, which are switched lazily, and the interrupt controller's CPU interface. Nowhere are,
/// because guests have no access to them: debug, performance monitors, MTE, SME, `ACTLR_EL1`, and all that comes with
/// features that [`IdRegisters::for_guest`](crate::IdRegisters::for_guest) takes away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs, reason = "fields have the names of the registers: Arm ARM DDI 0487, D24")]
pub struct Context {
    /// x0 to x30.
    pub x: [u64; 31],
    /// ELR_EL2 while the vCPU is entered or left.
    pub pc: u64,
    /// SPSR_EL2 while the vCPU is entered or left.
    pub pstate: u64,

    pub sp_el0: u64,
    pub sp_el1: u64,
    pub elr_el1: u64,
    pub spsr_el1: u64,
    pub esr_el1: u64,
    pub far_el1: u64,
    pub afsr0_el1: u64,
    pub afsr1_el1: u64,
    pub vbar_el1: u64,
    pub cpacr_el1: u64,
    pub ttbr0_el1: u64,
    pub ttbr1_el1: u64,
    pub mair_el1: u64,
    pub amair_el1: u64,
    pub contextidr_el1: u64,
    pub par_el1: u64,
    pub csselr_el1: u64,
    pub cntkctl_el1: u64,
    pub tpidr_el0: u64,
    pub tpidrro_el0: u64,
    pub tpidr_el1: u64,
    pub cntv_cval_el0: u64,

    /// The same for all vCPUs of a VM, and zero in a protected one.
    pub cntvoff_el2: u64,
    /// What the guest knows as MPIDR_EL1.
    pub vmpidr_el2: u64,
    pub sctlr_el1: u64,
    pub tcr_el1: u64,
    pub cntv_ctl_el0: u64,

    /// The physical timer, which is never in the CPU.
    pub cntp_ctl_el0: u64,
    pub cntp_cval_el0: u64,

    /// What the guest knows as DISR_EL1. With FEAT_RAS.
    pub vdisr_el2: u64,

    /// The keys of pointer authentication. With FEAT_PAuth.
    pub apiakeylo_el1: u64,
    pub apiakeyhi_el1: u64,
    pub apibkeylo_el1: u64,
    pub apibkeyhi_el1: u64,
    pub apdakeylo_el1: u64,
    pub apdakeyhi_el1: u64,
    pub apdbkeylo_el1: u64,
    pub apdbkeyhi_el1: u64,
    pub apgakeylo_el1: u64,
    pub apgakeyhi_el1: u64,

    /// With FEAT_TCR2.
    pub tcr2_el1: u64,
    /// With FEAT_SCTLR2.
    pub sctlr2_el1: u64,
    /// With FEAT_S1PIE.
    pub pir_el1: u64,
    /// With FEAT_S1PIE.
    pub pire0_el1: u64,
    /// With FEAT_S1POE.
    pub por_el1: u64,
    /// With FEAT_S1POE.
    pub por_el0: u64,
}

/// PSTATE out of reset, as the format of SPSR_EL2 has it: EL1h, all interrupts masked.
const PSTATE_RESET: u64 = 0x3c5;

/// SCTLR_EL1 out of reset: MMU and caches off, little-endian, and those bits set that are RES1 without the features that
/// they belong to (EOS, TSCXT, EIS, SPAN, nTLSMD, LSMAOE).
const SCTLR_RESET: u64 = 0x30d0_0800;

/// SCTLR_EL1.E0E: data accesses at EL0 are big-endian.
const SCTLR_E0E: u64 = 1 << 24;
/// SCTLR_EL1.EE: those at EL1 are.
const SCTLR_EE: u64 = 1 << 25;

/// Fields of PSTATE as SPSR_EL2 has them.
mod pstate {
    pub(super) const EL: u64 = 0b1100;
    pub(super) const AARCH32: u64 = 1 << 4;
    pub(super) const BTYPE: u64 = 0b11 << 10;
    pub(super) const SS: u64 = 1 << 21;
}

/// Bits of CNTV_CTL_EL0 and CNTP_CTL_EL0.
mod timer {
    pub(super) const ENABLE: u64 = 1;
    pub(super) const IMASK: u64 = 1 << 1;
}

impl Context {
    /// Returns the registers of a vCPU that starts at `pc` with `x0`, as PSCI's CPU_ON and Linux's boot protocol for arm64
    /// have it. What the architecture leaves unknown is zero. `mpidr` is the value of MPIDR_EL1.
    #[must_use]
    pub fn reset(pc: u64, x0: u64, mpidr: u64) -> Self {
        let mut context =
            Self { pc, pstate: PSTATE_RESET, sctlr_el1: SCTLR_RESET, vmpidr_el2: mpidr, ..Self::default() };
        context.set_register(0, x0);
        context
    }

    /// Returns the register that an instruction names as a source: number 31 is XZR.
    #[must_use]
    pub fn register(&self, number: u8) -> u64 {
        self.x.get(usize::from(number)).copied().unwrap_or(0)
    }

    /// Writes the register that an instruction names as its destination: number 31 is XZR.
    pub fn set_register(&mut self, number: u8, value: u64) {
        if let Some(register) = self.x.get_mut(usize::from(number)) {
            *register = value;
        }
    }

    /// Writes the first registers, which hold the results of a call.
    pub fn set_results<const N: usize>(&mut self, results: [u64; N]) {
        if let Some(first) = self.x.first_chunk_mut() {
            *first = results;
        }
    }

    /// Continues behind the instruction that trapped, as if it had been executed: what a branch expects of its target
    /// (BTYPE) and a pending single step (SS) are done with. The instruction is one of AArch64.
    pub const fn skip_instruction(&mut self) {
        self.pc = self.pc.wrapping_add(4);
        self.end_instruction();
    }

    /// As [`Context::skip_instruction`], when the program counter is behind it already.
    pub(crate) const fn end_instruction(&mut self) {
        self.pstate &= !(pstate::BTYPE | pstate::SS);
    }

    /// Takes an exception at EL1.
    pub const fn take(&mut self, exception: &Exception) {
        self.esr_el1 = exception.esr;
        if let Some(far) = exception.far {
            self.far_el1 = far;
        }
        self.elr_el1 = self.pc;
        self.spsr_el1 = self.pstate;
        self.pc = self.vbar_el1.wrapping_add(exception.vector_offset);
        self.pstate = exception.pstate;
    }

    /// Takes the exception for an instruction that does not exist, which is the one that trapped.
    pub const fn take_undefined(&mut self, features: PstateFeatures) {
        self.take(&self.trapped(0, 0).undefined(features));
    }

    /// Returns what decides about an exception at EL1 in place of one with this syndrome and address.
    #[must_use]
    pub const fn trapped(&self, esr: u64, far: u64) -> Trapped {
        Trapped { esr, far, spsr: self.pstate, sctlr_el1: self.sctlr_el1 }
    }

    /// Returns whether the vCPU is at EL0 in AArch32 state.
    #[must_use]
    pub const fn is_aarch32(&self) -> bool {
        self.pstate & pstate::AARCH32 != 0
    }

    /// Returns whether data accesses are big-endian at the current exception level, in AArch64 state.
    #[must_use]
    pub const fn is_big_endian(&self) -> bool {
        let bit = if self.pstate & pstate::EL == 0 { SCTLR_E0E } else { SCTLR_EE };
        self.sctlr_el1 & bit != 0
    }

    /// Returns when the next of the two timers fires that are enabled, not masked, and have not fired by `now`. Times are
    /// values of the physical counter.
    #[must_use]
    pub fn next_timer(&self, now: u64) -> Option<u64> {
        self.physical_timer().into_iter().chain(self.virtual_timer()).filter(|&deadline| deadline > now).min()
    }

    /// Returns when the physical timer fires if it is enabled and not masked, or when it has fired.
    #[must_use]
    pub fn physical_timer(&self) -> Option<u64> {
        armed(self.cntp_ctl_el0).then_some(self.cntp_cval_el0)
    }

    /// Returns when the virtual timer fires, as [`Context::physical_timer`].
    #[must_use]
    pub fn virtual_timer(&self) -> Option<u64> {
        // The virtual counter is behind the physical one by the offset, or ahead of it; a sum beyond 64 bits is never reached.
        self.virtual_deadline().map(|deadline| deadline.saturating_add_signed(self.cntvoff_el2.cast_signed()))
    }

    /// As [`Context::virtual_timer`], as a value of the virtual counter.
    #[must_use]
    pub fn virtual_deadline(&self) -> Option<u64> {
        armed(self.cntv_ctl_el0).then_some(self.cntv_cval_el0)
    }
}

/// Whether a timer with this control may fire.
const fn armed(control: u64) -> bool {
    control & (timer::ENABLE | timer::IMASK) == timer::ENABLE
}

#[cfg(test)]
mod tests {
    use core::mem::{align_of, offset_of, size_of};

    use super::*;
    use crate::PstateFeatures;

    #[test]
    fn pairs_of_registers_are_where_the_assembly_loads_them() {
        assert_eq!((size_of::<Context>() % 8, align_of::<Context>()), (0, 8));
        assert_eq!(offset_of!(Context, x), 0);
        assert_eq!(offset_of!(Context, pstate), offset_of!(Context, pc) + 8);
        assert_eq!(offset_of!(Context, por_el0), size_of::<Context>() - 8);
    }

    #[test]
    fn reset_is_what_the_boot_protocol_says() {
        let context = Context::reset(0x8000_0000, 0x4000_0000, 0x8000_0102);
        assert_eq!(context.pc, 0x8000_0000);
        assert_eq!(context.x[0], 0x4000_0000);
        assert_eq!(context.x[1..], [0; 30]);
        assert_eq!(context.vmpidr_el2, 0x8000_0102);
        // EL1h, D, A, I and F masked.
        assert_eq!(context.pstate, 0b0101 | 0xf << 6);
        // M, A, C, SA, I, EE and E0E.
        assert_eq!(context.sctlr_el1 & (1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 12 | 1 << 25 | 1 << 24), 0);
        // EOS, EIS, TSCXT, SPAN, nTLSMD and LSMAOE.
        let res1 = 1 << 11 | 1 << 22 | 1 << 20 | 1 << 23 | 1 << 28 | 1 << 29;
        assert_eq!(context.sctlr_el1, res1);
        let rest = Context { pc: 0, x: [0; 31], vmpidr_el2: 0, pstate: 0, sctlr_el1: 0, ..context };
        assert_eq!(rest, Context::default());
        assert_eq!(context.next_timer(0), None);
    }

    #[test]
    fn register_31_is_zero() {
        let mut context = Context { x: [7; 31], sp_el0: 9, sp_el1: 9, ..Context::default() };
        assert_eq!(context.register(30), 7);
        assert_eq!(context.register(31), 0);
        let before = context;
        context.set_register(31, 5);
        assert_eq!(context, before);
        context.set_register(30, 5);
        assert_eq!(context.x[30], 5);
    }

    #[test]
    fn results_go_to_the_first_registers() {
        let mut context = Context { x: [7; 31], ..Context::default() };
        context.set_results([1, 2, 3]);
        assert_eq!(context.x[..5], [1, 2, 3, 7, 7]);
    }

    #[test]
    fn skipping_ends_a_step_and_a_branch() {
        let mut context =
            Context { pc: u64::MAX - 3, pstate: 0x3c5 | 3 << 10 | 1 << 21 | 1 << 28, ..Context::default() };
        context.skip_instruction();
        assert_eq!((context.pc, context.pstate), (0, 0x3c5 | 1 << 28));
    }

    #[test]
    fn an_exception_is_taken_as_the_cpu_does() {
        let mut context = Context {
            pc: 0x1234,
            pstate: 0,
            vbar_el1: 0xffff_0000_0000_0800,
            far_el1: 1,
            sctlr_el1: 1 << 23,
            ..Context::default()
        };
        context.take_undefined(PstateFeatures::default());
        assert_eq!((context.elr_el1, context.spsr_el1, context.esr_el1), (0x1234, 0, 1 << 25));
        assert_eq!((context.pc, context.pstate), (0xffff_0000_0000_0c00, 0x3c5));
        assert_eq!(context.far_el1, 1, "an instruction has no fault address");

        let abort = context.trapped(0x24 << 26, 0xbad).external_abort(PstateFeatures::default());
        context.take(&abort);
        assert_eq!((context.far_el1, context.esr_el1), (0xbad, 0x25 << 26 | 1 << 25 | 0x10));
        assert_eq!(context.pc, 0xffff_0000_0000_0a00);
    }

    #[test]
    fn each_level_has_its_byte_order() {
        let big = |pstate, sctlr_el1| Context { pstate, sctlr_el1, ..Context::default() }.is_big_endian();
        for (el0, el1) in [(false, false), (false, true), (true, false), (true, true)] {
            let sctlr = u64::from(el0) << 24 | u64::from(el1) << 25;
            assert_eq!([0, 4, 5].map(|pstate| big(pstate, sctlr)), [el0, el1, el1]);
        }
    }

    #[test]
    fn the_next_timer_is_the_earlier_one_that_may_fire() {
        let with = |physical, cntp_cval_el0, virtual_, cntv_cval_el0, cntvoff_el2| Context {
            cntp_ctl_el0: physical,
            cntp_cval_el0,
            cntv_ctl_el0: virtual_,
            cntv_cval_el0,
            cntvoff_el2,
            ..Context::default()
        };
        let next = |physical, cntp_cval_el0, virtual_, cntv_cval_el0, cntvoff_el2| {
            with(physical, cntp_cval_el0, virtual_, cntv_cval_el0, cntvoff_el2).next_timer(0)
        };
        assert_eq!(next(0, 1, 2, 1, 0), None);
        assert_eq!(next(3, 1, 3, 1, 0), None, "masked");
        assert_eq!(next(1, 10, 0, 5, 0), Some(10));
        assert_eq!(next(1, 10, 1, 5, 0), Some(5));
        assert_eq!(next(1, 10, 1, 5, 7), Some(10));
        assert_eq!(next(0, 10, 5, 5, 7), Some(12), "ISTATUS does not matter");
        assert_eq!(next(0, 0, 1, u64::MAX, 7), Some(u64::MAX));
        assert_eq!(next(0, 0, 1, 12, 2_u64.wrapping_neg()), Some(10), "the virtual counter is ahead");
        assert_eq!(with(0, 0, 1, 12, 13_u64.wrapping_neg()).virtual_timer(), Some(0), "and has passed");
        let both = with(1, 10, 1, 5, 7);
        assert_eq!([9, 10, 11, 12].map(|now| both.next_timer(now)), [Some(10), Some(12), Some(12), None], "fired");
    }
}
