//! The end of the run.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::rt::{
    call::{self, psci},
    console::println,
};

static SEMIHOSTING: AtomicBool = AtomicBool::new(false);
static RESET: AtomicBool = AtomicBool::new(false);

/// Ends QEMU through semihosting with a status, instead of turning the machine off.
pub(crate) fn use_semihosting() {
    SEMIHOSTING.store(true, Ordering::Relaxed);
}

/// Ends the run with a reset of the machine, instead of turning it off.
pub(crate) fn use_reset() {
    RESET.store(true, Ordering::Relaxed);
}

/// Ends the run with a status (which PSCI cannot carry).
pub(crate) fn exit(status: u64) -> ! {
    if SEMIHOSTING.load(Ordering::Relaxed) {
        semihosting_exit(status);
    }
    let end = if RESET.load(Ordering::Relaxed) { psci::SYSTEM_RESET } else { psci::SYSTEM_OFF };
    call::firmware([end, 0, 0, 0]);
    loop {
        core::hint::spin_loop();
    }
}

/// SYS_EXIT_EXTENDED of "Semihosting for AArch32 and AArch64": ADP_Stopped_ApplicationExit and the status.
#[expect(unsafe_code, reason = "semihosting is an instruction")]
fn semihosting_exit(status: u64) {
    let block: [u64; 2] = [0x2_0026, status];
    // SAFETY: The semihosting host reads the parameter block and ends the machine.
    unsafe {
        core::arch::asm!("hlt #0xf000", in("x0") 0x20, in("x1") block.as_ptr(), options(nostack));
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    println!("\npayload: {info}");
    exit(101)
}
