//! Calls to EL3.

use ravelin_hypercall::Firmware;
use smccc::{Call, Smc};

/// The firmware at EL3.
#[derive(Clone, Copy, Debug)]
pub struct El3;

impl Firmware for El3 {
    fn smc(&self, registers: [u64; 4]) -> [u64; 4] {
        let [function, x1, x2, x3] = registers;
        let mut arguments = [0; 17];
        arguments[..3].copy_from_slice(&[x1, x2, x3]);
        // A CPU that the call turns on must find what was written for it (Arm ARM DDI 0487, B2.3.12: a barrier orders the
        // writes before the SMC; the instruction itself does not).
        crate::sysreg::maintain!("dsb sy");
        // Bits above 31 of the function identifier are zero: the relay has checked.
        let [x0, x1, x2, x3, ..] = Smc::call64(function as u32, arguments);
        [x0, x1, x2, x3]
    }
}
