//! Numbers of a vCPU's registers.
//!
//! They are those by which KVM's interface names the registers of an arm64 vCPU, less what says of which kind and size they
//! are: of the core registers the offset in KVM's structure in units of 32 bits, of system registers the encoding.

use core::fmt::{self, Formatter};

/// x0. The number of xn is 2n more.
pub const REGISTER_X: u64 = 0;
/// SP_EL0.
pub const REGISTER_SP_EL0: u64 = 62;
/// The program counter.
pub const REGISTER_PC: u64 = 64;
/// PSTATE in the format of SPSR_EL1.
pub const REGISTER_PSTATE: u64 = 66;
/// SP_EL1.
pub const REGISTER_SP_EL1: u64 = 68;
/// ELR_EL1.
pub const REGISTER_ELR_EL1: u64 = 70;
/// SPSR_EL1.
pub const REGISTER_SPSR_EL1: u64 = 72;
/// The lower half of v0. The number of vn is 4n more, that of an upper half 2 more.
pub const REGISTER_V: u64 = 84;
/// FPSR.
pub const REGISTER_FPSR: u64 = 212;
/// FPCR.
pub const REGISTER_FPCR: u64 = 213;
/// Whether the vCPU is on: 1, or off: 0. No register of the architecture.
pub const REGISTER_POWER: u64 = 0x4000;
/// The largest number.
pub const REGISTER_LAST: u64 = 0xffff;

/// Returns the number of a system register. A field that is too large reaches into the others.
#[must_use]
pub const fn system_register(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

/// Name in the C header, value there, name in the reference, and what there is to say.
const REGISTERS: &[(&str, &str, &str, &str)] = &[
    ("X(n)", "(2 * (n))", "x0 to x30", ""),
    ("SP_EL0", "62", "SP_EL0", ""),
    ("PC", "64", "program counter", ""),
    (
        "PSTATE",
        "66",
        "PSTATE",
        "As SPSR_EL1 has it: EL0t, EL1t or EL1h in AArch64 state, else `INVALID`. NZCV, DAIF, PAN, UAO, DIT, SSBS and BTYPE can be \
         set; other bits do not matter.",
    ),
    ("SP_EL1", "68", "SP_EL1", ""),
    ("ELR_EL1", "70", "ELR_EL1", ""),
    ("SPSR_EL1", "72", "SPSR_EL1", ""),
    (
        "V(n)",
        "(84 + 4 * (n))",
        "v0 to v31, lower halves",
        "With SVE, the low bits of z0 to z31. The others keep their values.",
    ),
    ("V_HIGH(n)", "(86 + 4 * (n))", "v0 to v31, upper halves", ""),
    ("FPSR", "212", "FPSR", ""),
    ("FPCR", "213", "FPCR", ""),
    (
        "POWER",
        "0x4000",
        "whether the vCPU is on",
        "1: it is on, or has been turned on. 0: it is off, and cannot be run. If the host turns it on, it goes on with the registers that \
         it has.",
    ),
    (
        "SYSTEM(op0, op1, crn, crm, op2)",
        "((op0) << 14 | (op1) << 11 | (crn) << 7 | (crm) << 3 | (op2))",
        "system registers",
        "Those of EL1 and EL0 that a guest may write, if its features have them; CNTV_CTL_EL0, CNTV_CVAL_EL0, CNTP_CTL_EL0, CNTP_CVAL_EL0; \
         CNTVCT_EL0, which sets the virtual counter of all vCPUs, from their next run on. What a guest may only read, such as its ID \
         registers and MPIDR_EL1, can be set to what it is.",
    ),
];

/// Writes the numbers as constants of the C header.
pub(crate) fn header(f: &mut Formatter<'_>) -> fmt::Result {
    writeln!(f, "\n/* Registers of a vCPU. */")?;
    REGISTERS.iter().try_for_each(|(name, value, ..)| writeln!(f, "#define RAVELIN_REGISTER_{name} {value}"))
}

/// Writes the section of the reference.
pub(crate) fn reference(f: &mut Formatter<'_>) -> fmt::Result {
    f.write_str(
        "\n## Registers of a vCPU\n\nNumbers for VCPU_GET_REGISTER and VCPU_SET_REGISTER: those of KVM's interface, less the bits for kind \
         and size. Where KVM\nhas CNTVCT_EL0 and CNTV_CVAL_EL0 the wrong way round, these are the architecture's.\n\n\
         | number | register | |\n|---|---|---|\n",
    )?;
    REGISTERS.iter().try_for_each(|(_, value, name, doc)| writeln!(f, "| {} | {name} | {doc} |", Plain(value)))
}

/// A C expression as the reference has it.
struct Plain<'a>(&'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        // Between cells of a table a bar would be one more.
        let inner = self.0.strip_prefix('(').and_then(|text| text.strip_suffix(')')).unwrap_or(self.0);
        inner.chars().filter(|c| !matches!(c, '(' | ')')).try_for_each(|c| match c {
            '|' => f.write_str("\\|"),
            c => write!(f, "{c}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_the_numbers() {
        let value = |name| REGISTERS.iter().find(|register| register.0 == name).unwrap().1;
        for (name, number) in [
            ("SP_EL0", REGISTER_SP_EL0),
            ("PC", REGISTER_PC),
            ("PSTATE", REGISTER_PSTATE),
            ("SP_EL1", REGISTER_SP_EL1),
            ("ELR_EL1", REGISTER_ELR_EL1),
            ("SPSR_EL1", REGISTER_SPSR_EL1),
            ("FPSR", REGISTER_FPSR),
            ("FPCR", REGISTER_FPCR),
        ] {
            assert_eq!(value(name), number.to_string());
        }
        assert_eq!(value("POWER"), format!("{REGISTER_POWER:#x}"));
        assert_eq!((value("X(n)"), REGISTER_X), ("(2 * (n))", 0));
        assert_eq!(value("V(n)"), format!("({REGISTER_V} + 4 * (n))"));
        // MIDR_EL1, CNTV_CVAL_EL0.
        assert_eq!(system_register(3, 0, 0, 0, 0), 0xc000);
        assert_eq!(system_register(3, 3, 14, 3, 2), 0xdf1a);
        assert_eq!(system_register(3, 7, 15, 15, 7), REGISTER_LAST);
    }
}
