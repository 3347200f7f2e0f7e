//! Calls to EL3.

use core::arch::asm;

use ravelin_hypercall::Firmware;

/// The firmware at EL3.
#[derive(Clone, Copy, Debug)]
pub struct El3;

impl Firmware for El3 {
    fn smc(&self, registers: [u64; 4]) -> [u64; 4] {
        let [mut x0, mut x1, mut x2, mut x3] = registers;
        // A CPU that the call turns on must find what was written for it, and an SMC orders nothing by itself.
        // SAFETY: The relay passes on only calls that leave the hypervisor's memory alone. Registers are those of SMCCC
        // (Arm DEN0028, 2.6): x4 to x17 may change with version 1.0.
        unsafe {
            asm!(
                "dsb sy",
                "smc #0",
                inout("x0") x0, inout("x1") x1, inout("x2") x2, inout("x3") x3,
                inout("x4") 0_u64 => _, inout("x5") 0_u64 => _, inout("x6") 0_u64 => _, inout("x7") 0_u64 => _,
                inout("x8") 0_u64 => _, inout("x9") 0_u64 => _, inout("x10") 0_u64 => _, inout("x11") 0_u64 => _,
                inout("x12") 0_u64 => _, inout("x13") 0_u64 => _, inout("x14") 0_u64 => _, inout("x15") 0_u64 => _,
                inout("x16") 0_u64 => _, inout("x17") 0_u64 => _,
                options(nostack)
            );
        }
        [x0, x1, x2, x3]
    }
}
