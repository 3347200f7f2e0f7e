//! What a fatal exception left behind.

use crate::{boot::CpuStart, sysreg::read_sysreg};

/// The registers at a fatal exception, as the vectors store them.
#[repr(C)]
#[derive(Debug)]
pub struct FatalFrame {
    /// x0 to x30.
    pub registers: [u64; 31],
    /// Stack pointer before the exception.
    pub sp: u64,
    /// Where it happened.
    pub elr: u64,
    /// PSTATE before it.
    pub spsr: u64,
    /// Its syndrome.
    pub esr: u64,
    /// Its fault address.
    pub far: u64,
}

/// Return addresses of the calls that led to a frame pointer, innermost first. Ends at the end of the stack or at the first
/// record that does not lie above the one before it.
#[derive(Debug)]
pub struct Backtrace {
    frame: u64,
    cpu: Option<&'static CpuStart>,
}

impl Backtrace {
    /// Starts from the frame pointer (x29) `frame`.
    #[must_use]
    pub fn from_frame(frame: u64) -> Self {
        Self { frame, cpu: CpuStart::current() }
    }

    /// Starts from the caller.
    #[must_use]
    #[inline(always)]
    pub fn here() -> Self {
        let frame: u64;
        // SAFETY: Copies a register.
        unsafe { core::arch::asm!("mov {}, x29", out(reg) frame, options(nomem, nostack, preserves_flags)) };
        Self::from_frame(frame)
    }
}

impl Iterator for Backtrace {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let cpu = self.cpu?;
        if !self.frame.is_multiple_of(16) || !cpu.on_stack(self.frame) {
            return None;
        }
        let record = core::ptr::with_exposed_provenance::<[u64; 2]>(self.frame as usize);
        // SAFETY: The record lies on this CPU's stack, which is mapped and not written meanwhile, and is aligned.
        let [caller, return_address] = unsafe { record.read_volatile() };
        self.frame = if caller > self.frame { caller } else { 0 };
        (return_address != 0).then_some(return_address)
    }
}

/// System registers that tell what a CPU was doing for whom, by name.
///
/// At EL1, before it is known that there is no EL2 to be had, there are none.
pub fn system_registers() -> impl Iterator<Item = (&'static str, u64)> {
    let at_el2 = read_sysreg!("currentel") == 2 << 2;
    let read = move || {
        [
            ("elr_el2", read_sysreg!("elr_el2")),
            ("spsr_el2", read_sysreg!("spsr_el2")),
            ("esr_el2", read_sysreg!("esr_el2")),
            ("far_el2", read_sysreg!("far_el2")),
            ("hpfar_el2", read_sysreg!("hpfar_el2")),
            ("hcr_el2", read_sysreg!("hcr_el2")),
            ("vttbr_el2", read_sysreg!("vttbr_el2")),
            ("sctlr_el2", read_sysreg!("sctlr_el2")),
        ]
    };
    at_el2.then(read).into_iter().flatten()
}

/// Returns the affinity of this CPU (MPIDR_EL1 without its flag bits).
#[must_use]
pub fn mpidr() -> u64 {
    read_sysreg!("mpidr_el1") & 0xff_00ff_ffff
}
