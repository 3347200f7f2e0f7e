//! Ends of the machine.

use core::arch::asm;

use smccc::{Hvc, Smc, psci};

/// How firmware is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduit {
    /// SMC, to EL3.
    Smc,
    /// HVC, to EL2: what a kernel that does not own EL2 uses.
    Hvc,
}

/// Turns the machine off through PSCI; where firmware refuses, stops this CPU.
pub fn power_off(conduit: Conduit) -> ! {
    let _refused = match conduit {
        Conduit::Smc => psci::system_off::<Smc>(),
        Conduit::Hvc => psci::system_off::<Hvc>(),
    };
    halt()
}

/// Stops this CPU.
pub fn halt() -> ! {
    loop {
        // SAFETY: Waits; interrupts are masked and nothing depends on them.
        unsafe { asm!("wfi", options(nomem, nostack, preserves_flags)) };
    }
}

/// Ends the emulator or debugger that runs this with an exit status (Arm semihosting specification, SYS_EXIT).
pub fn semihosting_exit(status: u64) -> ! {
    const SYS_EXIT: u64 = 0x18;
    const ADP_STOPPED_APPLICATION_EXIT: u64 = 0x2_0026;
    let block = [ADP_STOPPED_APPLICATION_EXIT, status];
    // SAFETY: The block outlives the call, which does not return where semihosting exists.
    unsafe { asm!("hlt #0xf000", in("x0") SYS_EXIT, in("x1") block.as_ptr(), options(nostack)) };
    halt()
}
