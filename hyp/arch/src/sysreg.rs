//! Reads and writes of system registers that `aarch64-cpu` lacks, or that change what other code may rely on.
//!
//! Writes keep the compiler from moving memory accesses across them (no `nomem`), which the crate's own writers do not.

/// Reads a system register, named as the assembler names it.
macro_rules! read_sysreg {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: Reading this register has no side effect.
        unsafe {
            core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags));
        }
        value
    }};
}

/// Writes a system register that acts on execution below EL2 only, named as the assembler names it.
macro_rules! write_lower_sysreg {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        #[cfg(feature = "trace")]
        $crate::trace::write_register(const { $crate::trace::register($name) }, value);
        // SAFETY: The register acts on EL1 and EL0: none of EL2's own accesses or instructions depend on it.
        unsafe {
            core::arch::asm!(concat!("msr ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags));
        }
    }};
}

/// Executes barriers, TLB and instruction cache maintenance, each given as its assembly, with an operand or without.
macro_rules! maintain {
    ($($instruction:literal),+) => {{
        #[cfg(feature = "trace")]
        {
            $($crate::trace::execute(const { $crate::trace::Instruction::of($instruction) }, 0);)+
        }
        // SAFETY: Barriers only order, and removing entries from TLBs and instruction caches is always allowed: they are
        // read again from tables and memory.
        unsafe { core::arch::asm!($($instruction),+, options(nostack, preserves_flags)) }
    }};
    ($instruction:literal, operand = $operand:expr) => {{
        let operand: u64 = $operand;
        #[cfg(feature = "trace")]
        $crate::trace::execute(const { $crate::trace::Instruction::of($instruction) }, operand);
        // SAFETY: As above.
        unsafe { core::arch::asm!($instruction, in(reg) operand, options(nostack, preserves_flags)) }
    }};
}

/// Records an instruction that is part of a longer piece of assembly.
macro_rules! traced {
    ($instruction:literal) => {
        #[cfg(feature = "trace")]
        $crate::trace::execute(const { $crate::trace::Instruction::of($instruction) }, 0);
    };
}

pub(crate) use maintain;
pub(crate) use read_sysreg;
pub(crate) use traced;
pub(crate) use write_lower_sysreg;

/// Returns the four-bit field of an ID register that starts at bit `shift`.
pub(crate) fn id_field(register: u64, shift: u32) -> u64 {
    (register >> shift) & 0xf
}
