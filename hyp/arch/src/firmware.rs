//! Calls to EL3.

use core::arch::asm;

use ravelin_hypercall::Firmware;

use crate::sysreg::traced;

/// The firmware at EL3.
#[derive(Clone, Copy, Debug)]
pub struct El3;

impl Firmware for El3 {
    fn smc(&self, registers: [u64; 4]) -> [u64; 4] {
        let [mut x0, mut x1, mut x2, mut x3] = registers;
        traced!("dsb sy");
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

/// Whether a result says that the call worked: as a signed number of 32 bits it is not negative.
fn works(status: u64) -> bool {
    status & (1 << 31) == 0
}

/// Returns whether firmware has true random numbers (Arm DEN0098), asking for what each step takes first.
pub(crate) fn has_entropy() -> bool {
    const PSCI_VERSION: u64 = 0x8400_0000;
    const PSCI_FEATURES: u64 = 0x8400_000a;
    const SMCCC_VERSION: u64 = 0x8000_0000;
    const TRNG_VERSION: u64 = 0x8400_0050;
    let call = |function, argument| El3.smc([function, argument, 0, 0])[0] & 0xffff_ffff;
    let at_least = |version, wanted| works(version) && version >= wanted;
    at_least(call(PSCI_VERSION, 0), 0x1_0000)
        && works(call(PSCI_FEATURES, SMCCC_VERSION))
        && at_least(call(SMCCC_VERSION, 0), 0x1_0001)
        && at_least(call(TRNG_VERSION, 0), 0x1_0000)
}

/// Asks firmware for 192 random bits. `None` if it has none.
pub(crate) fn entropy() -> Option<[u64; 3]> {
    const TRNG_RND64: u64 = 0xc400_0053;
    const BITS: u64 = 192;
    let [status, high, middle, low] = El3.smc([TRNG_RND64, BITS, 0, 0]);
    (status == 0).then_some([low, middle, high])
}
