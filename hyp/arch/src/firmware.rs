//! Calls to EL3.

use smccc::{Call, Smc};

/// Makes the SMC64 or SMC32 call in `registers` (x0 to x17) and returns x0 to x3 of the answer. SMCCC lets firmware change
/// no others that the caller has to know of.
#[must_use]
pub fn smc(registers: &[u64; 18]) -> [u64; 4] {
    let [function, arguments @ ..] = *registers;
    // Bits above 31 of the function identifier are zero: the relay has checked.
    let [x0, x1, x2, x3, ..] = Smc::call64(function as u32, arguments);
    [x0, x1, x2, x3]
}
