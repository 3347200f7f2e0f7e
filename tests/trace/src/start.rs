//! What the assembly of start-up does to translation registers and the TLB. It records nothing itself: Rust does so for it,
//! from these lists, which a test compares with the assembly.

use crate::{Barrier, Dsb, Sysreg, TlbiOp};

/// An instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Writes a register.
    Write(Sysreg),
    /// A barrier.
    Barrier(Barrier),
    /// TLB maintenance without an operand.
    Tlbi(TlbiOp),
}

const ISB: Step = Step::Barrier(Barrier::Isb);

/// How the CPU that boots puts the first tables into use.
pub const FIRST_TABLES: &[Step] = &[
    Step::Write(Sysreg::MairEl2),
    Step::Write(Sysreg::TcrEl2),
    Step::Write(Sysreg::Ttbr0El2),
    Step::Barrier(Barrier::Dsb(Dsb::Ish)),
    Step::Tlbi(TlbiOp::Alle2),
    Step::Barrier(Barrier::Dsb(Dsb::Nsh)),
    ISB,
    Step::Write(Sysreg::SctlrEl2),
];

/// How a CPU leaves its tables, up to [`CPU_START`].
pub const SWITCH: &[Step] = &[Step::Barrier(Barrier::Dsb(Dsb::Sy)), Step::Write(Sysreg::SctlrEl2), ISB];

/// How a CPU comes from firmware, up to [`CPU_START`].
pub const ENTRY: &[Step] = &[Step::Write(Sysreg::HcrEl2), ISB, Step::Write(Sysreg::SctlrEl2), ISB];

/// How a CPU puts its tables into use.
pub const CPU_START: &[Step] = &[
    Step::Write(Sysreg::Ttbr0El2),
    Step::Write(Sysreg::TcrEl2),
    Step::Write(Sysreg::MairEl2),
    ISB,
    Step::Tlbi(TlbiOp::Alle2),
    Step::Barrier(Barrier::Dsb(Dsb::Nsh)),
    ISB,
    Step::Write(Sysreg::SctlrEl2),
    ISB,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The steps between two texts of the assembly.
    fn steps(from: &str, to: &str) -> Vec<Step> {
        let assembly = include_str!("../../../hyp/arch/asm/boot.S");
        let (part, _) = assembly.split_once(from).unwrap().1.split_once(to).unwrap();
        let step = |line: &str| {
            let mut words = line.split("//").next()?.split([' ', ',']).filter(|word| !word.is_empty());
            match (words.next()?, words.next()) {
                ("isb", None) => Some(ISB),
                ("dsb", Some(kind)) => Some(Step::Barrier(Barrier::Dsb(Dsb::from_name(kind).unwrap()))),
                ("tlbi", Some(op)) => Some(Step::Tlbi(TlbiOp::from_name(op).unwrap())),
                ("msr", Some(register)) => Sysreg::from_name(register).map(Step::Write),
                _ => None,
            }
        };
        part.lines().filter_map(step).collect()
    }

    #[test]
    fn the_assembly_does_what_is_recorded_for_it() {
        assert_eq!(steps("b.ne    5f\n", "b       6f\n"), FIRST_TABLES);
        assert_eq!(steps("\nswitch_to_carveout:\n", "br      x3\n"), SWITCH);
        assert_eq!(steps("\nsecondary_entry:\n", "\ncpu_start:\n"), ENTRY);
        assert_eq!(steps("\ncpu_start:\n", "blr     x7\n"), CPU_START);
    }
}
