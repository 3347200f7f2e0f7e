//! Ways to touch memory. Each is one instruction at or behind an address that is aligned to a page.

use core::arch::asm;

use crate::cpu::{Hwcap, Hwcaps};

/// One instruction that touches memory.
pub(crate) struct Access {
    /// Its name.
    pub(crate) name: &'static str,
    /// Executes it on an address.
    pub(crate) run: fn(usize),
    /// What it may do to memory that the host does not own.
    pub(crate) expected: Expected,
    /// The hwcaps that it needs.
    pub(crate) needs: &'static [Hwcap],
}

/// What an access to memory that the host does not own may do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// It raises SIGBUS, with the address in `si_addr`.
    Fault,
    /// The architecture leaves open whether it faults, or where.
    FaultOrNot,
    /// It never faults.
    Nothing,
}

impl Access {
    /// Whether these CPUs can do it.
    pub(crate) fn possible(&self, hwcaps: &Hwcaps) -> bool {
        self.needs.iter().all(|needs| hwcaps.has(*needs))
    }
}

/// Defines an access of `$instruction`, in which the address is in x0; x1 to x3, v0, v1 and z0 are free.
macro_rules! access {
    ($name:literal, $($instruction:literal),+; $expected:ident $(, $needs:ident)?) => {{
        fn run(address: usize) {
            // SAFETY: The address is that of a mapping that no reference points into.
            unsafe {
                asm!(
                    $($instruction),+,
                    inout("x0") address => _, inout("x1") 0_usize => _, inout("x2") 64_usize => _,
                    inout("x3") 0_usize => _, options(nostack)
                );
            }
        }
        Access { name: $name, run, expected: Expected::$expected, needs: &[$(Hwcap::$needs)?] }
    }};
}

/// All of them.
pub(crate) fn all() -> [Access; 27] {
    [
        access!("ldrb", "ldrb w1, [x0, #3]"; Fault),
        access!("ldr w", "ldr w1, [x0, #4]"; Fault),
        access!("ldr x", "ldr x1, [x0, #8]"; Fault),
        access!("ldr xzr", "ldr xzr, [x0, #8]"; Fault),
        access!("ldr x, post-indexed", "ldr x1, [x0], #8"; Fault),
        access!("ldr x, not aligned", "ldur x1, [x0, #1]"; Fault),
        access!("ldp", "ldp x1, x2, [x0]"; Fault),
        access!("ldxr", "ldxr x1, [x0]"; Fault),
        access!("ldar", "ldar x1, [x0]"; Fault),
        access!("ldr q", ".arch_extension fp", "ldr q0, [x0, #16]"; Fault, FP),
        access!("ld1 of two", ".arch_extension simd", "ld1 {{v0.16b, v1.16b}}, [x0]"; Fault, FP),
        access!("strb", "strb w1, [x0, #3]"; Fault),
        access!("str x", "str x1, [x0, #4088]"; Fault),
        access!("stp", "stp x1, x2, [x0]"; Fault),
        access!("stlr", "stlr x1, [x0]"; Fault),
        access!("str q", ".arch_extension fp", "str q0, [x0, #16]"; Fault, FP),
        access!("ldadd", ".arch_extension lse", "ldadd x1, x2, [x0]"; Fault, ATOMICS),
        access!("swp", ".arch_extension lse", "swp x1, x2, [x0]"; Fault, ATOMICS),
        access!("cas", ".arch_extension lse", "cas x1, x2, [x0]"; Fault, ATOMICS),
        access!("ld1b", ".arch_extension sve", "ptrue p0.b", "ld1b {{z0.b}}, p0/z, [x0]"; Fault, SVE),
        access!("st1b", ".arch_extension sve", "ptrue p0.b", "st1b {{z0.b}}, p0, [x0]"; Fault, SVE),
        access!("setp", ".arch_extension mops", "setp [x0]!, x2!, x1"; FaultOrNot, MOPS),
        access!("dc zva", "dc zva, x0"; Fault),
        access!("dc civac", "dc civac, x0"; FaultOrNot),
        access!("dc cvau", "dc cvau, x0"; FaultOrNot),
        access!("ic ivau", "ic ivau, x0"; FaultOrNot),
        access!("prfm", "prfm pldl1keep, [x0]"; Nothing),
    ]
}
