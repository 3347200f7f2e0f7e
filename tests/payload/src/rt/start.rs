//! The assembly, and where it enters Rust.

use crate::rt::{
    cpu::{self, EntryState, STACK_SIZE},
    exception::unexpected_exception,
    platform, runner,
};

#[expect(unsafe_code, reason = "entry, vectors and calls need exact control of registers")]
mod assembly {
    core::arch::global_asm!(
        include_str!("start.S"),
        stacks = sym super::cpu::STACKS,
        stack_size = const super::STACK_SIZE,
        boot_main = sym super::boot_main,
        secondary_main = sym super::secondary_main,
        unexpected_exception = sym super::unexpected_exception,
    );
}

/// The boot CPU, on its own stack with the MMU on. The other arguments are what it was entered with, the last one the bits that x1 to
/// x3 had together.
extern "C" fn boot_main(dtb: usize, sctlr: u64, daif: u64, current_el: u64, spsel: u64, x1_to_x3: u64) -> ! {
    let platform = platform::init(dtb);
    cpu::init_boot(EntryState { context: x1_to_x3, sctlr, daif, current_el, spsel });
    runner::run(platform)
}

/// A CPU that PSCI turned on.
extern "C" fn secondary_main(context: u64, sctlr: u64, daif: u64, current_el: u64, spsel: u64) -> ! {
    cpu::serve(EntryState { context, sctlr, daif, current_el, spsel })
}
