//! What must hold of the built image and of the sources, whatever the tests say.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol, SectionKind};

use super::{Report, stack};
use crate::image::{self, BUDGET, Variant};
use crate::setup::{self, Needs};
use crate::workspace;

/// Crates that forbid unsafe code.
const SAFE_CRATES: [&str; 17] = [
    "hyp/sync/src/lib.rs",
    "hyp/memory/src/lib.rs",
    "hyp/pgtable/src/lib.rs",
    "hyp/ownership/src/lib.rs",
    "hyp/platform/src/lib.rs",
    "hyp/vgic/src/lib.rs",
    "hyp/vm/src/lib.rs",
    "hyp/hypercall/src/lib.rs",
    "host-interface/abi/src/lib.rs",
    "qemu/xtask/src/main.rs",
    "tests/conformance/src/main.rs",
    "tests/drivers/src/lib.rs",
    "tests/model/src/lib.rs",
    "tests/oracle/src/lib.rs",
    "tests/trace/src/lib.rs",
    "tests/world/src/lib.rs",
    "tests/fuzz/src/lib.rs",
];

/// Mangled part of the name of the function that replaces a live descriptor, `ravelin_pgtable::table::replace`.
const REPLACE: &str = "15ravelin_pgtable5table7replace";

/// Checks the image of both builds, and the sources.
pub(super) fn run(_full: bool, report: &mut Report) -> Result<()> {
    for path in SAFE_CRATES {
        report.check(&format!("{path} forbids unsafe code"), forbids_unsafe(path));
    }
    setup::ensure(&Needs { bare_metal: true, ..Needs::default() })?;
    for (name, checked) in [("image", false), ("checking image", true)] {
        let image = image::build(Variant { checked, ..Variant::default() })?;
        println!("{name}: {}", image.sizes);
        let elf = fs::read(&image.elf).with_context(|| format!("cannot read {}", image.elf.display()))?;
        report.check(&format!("{name}: no FP or SIMD register"), no_vector_registers(&elf));
        report.check(&format!("{name}: break before make is compiled as written"), break_before_make(&elf));
        // The model calls itself as deep as its maps are; the checking image has deep stacks with guard pages instead.
        if checked {
            continue;
        }
        for (what, fits) in [("stack", stack::of_cpu(&elf)), ("stack of start-up", stack::of_start(&elf))] {
            match fits {
                Ok(bytes) => report.check(&format!("{name}: {what}, {bytes} bytes at most"), Ok(())),
                Err(error) => report.check(&format!("{name}: {what}"), Err(error)),
            }
        }
        report.check("image: size", within_budget(image.sizes.total()));
    }
    Ok(())
}

fn forbids_unsafe(path: &str) -> Result<()> {
    let text = fs::read_to_string(workspace::root().join(path)).with_context(|| format!("cannot read {path}"))?;
    ensure!(text.lines().any(|line| line == "#![forbid(unsafe_code)]"), "no #![forbid(unsafe_code)]");
    Ok(())
}

fn within_budget(size: u64) -> Result<()> {
    ensure!(size <= BUDGET, "{size} bytes of text, rodata and data; the budget is {BUDGET}");
    Ok(())
}

/// An instruction and its address.
pub(super) type Instruction = (u64, u32);

/// The instructions of the image, without the data between them.
pub(super) fn instructions(elf: &[u8]) -> Result<Vec<Instruction>> {
    let file = ElfFile64::<object::Endianness>::parse(elf).context("not a 64-bit ELF file")?;
    // Mapping symbols say where code ($x) and data ($d) begin (AAELF64, "Mapping symbols").
    let mut marks: Vec<(u64, bool)> = file
        .symbols()
        .filter_map(|symbol| {
            let name = symbol.name().ok()?;
            let kind = name.split('.').next()?;
            matches!(kind, "$x" | "$d").then_some((symbol.address(), kind == "$x"))
        })
        .collect();
    marks.sort_unstable();
    ensure!(marks.iter().any(|mark| mark.1), "the image has no mapping symbols");
    let mut all = Vec::new();
    for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
        for (address, word) in (section.address()..).step_by(4).zip(section.data()?.chunks_exact(4)) {
            let before = marks.partition_point(|mark| mark.0 <= address);
            if before > 0 && marks[before - 1].1 {
                all.push((address, u32::from_le_bytes([word[0], word[1], word[2], word[3]])));
            }
        }
    }
    ensure!(!all.is_empty(), "the image has no code");
    Ok(all)
}

/// The registers belong to whoever EL2 interrupted. Only the code that switches them, between two symbols, touches them.
fn no_vector_registers(elf: &[u8]) -> Result<()> {
    let file = ElfFile64::<object::Endianness>::parse(elf).context("not a 64-bit ELF file")?;
    let symbol = |name: &str| {
        let found = file.symbols().find(|symbol| symbol.name() == Ok(name));
        found.map(|symbol| symbol.address()).with_context(|| format!("the image has no symbol {name}"))
    };
    let switch = symbol("vector_code_start")?..symbol("vector_code_end")?;
    ensure!(switch.end.wrapping_sub(switch.start) < 4096, "the code that switches the registers is no longer small");
    let uses =
        |&&(address, instruction): &&Instruction| !switch.contains(&address) && uses_vector_registers(instruction);
    match instructions(elf)?.iter().find(uses) {
        Some((address, instruction)) => bail!("{address:#x}: {instruction:#010x} uses one"),
        None => Ok(()),
    }
}

/// Whether an instruction is of a class that works on FP, SIMD, SVE or SME registers, by the top-level encoding
/// (Arm ARM DDI 0487, C4.1).
fn uses_vector_registers(instruction: u32) -> bool {
    let class = instruction >> 25 & 0xf;
    match class {
        0b0000 => instruction >> 31 == 1,                                // SME
        0b0010 => true,                                                  // SVE
        0b0111 | 0b1111 => true,                                         // FP and SIMD
        0b0100 | 0b0110 | 0b1100 | 0b1110 => instruction >> 26 & 1 == 1, // loads and stores
        _ => false,
    }
}

const DSB_ISHST: u32 = 0xd503_3a9f;

/// The function that replaces a live descriptor stores zero, makes that visible, and stores the new one after it.
fn break_before_make(elf: &[u8]) -> Result<()> {
    let file = ElfFile64::<object::Endianness>::parse(elf).context("not a 64-bit ELF file")?;
    let all = instructions(elf)?;
    let mut found = 0;
    for symbol in file.symbols().filter(|symbol| symbol.name().is_ok_and(|name| name.contains(REPLACE))) {
        let body = symbol.address()..symbol.address() + symbol.size();
        let code: Vec<u32> = all.iter().filter(|one| body.contains(&one.0)).map(|one| one.1).collect();
        breaks_first(&code).with_context(|| format!("at {:#x}", symbol.address()))?;
        found += 1;
    }
    ensure!(found > 0, "the image has no function that replaces a live descriptor");
    Ok(())
}

fn breaks_first(code: &[u32]) -> Result<()> {
    let is_break = |instruction: &u32| stores_64_bits(*instruction) && instruction & 0x1f == 31;
    let is_make = |instruction: &u32| stores_64_bits(*instruction) && instruction & 0x1f != 31;
    let Some(broken) = code.iter().position(is_break) else { bail!("no store of an invalid descriptor") };
    let Some(published) = code[broken..].iter().position(|&instruction| instruction == DSB_ISHST) else {
        bail!("no barrier after the store of the invalid descriptor");
    };
    ensure!(code[broken + published..].iter().any(is_make), "no store of the new descriptor after the barrier");
    Ok(())
}

/// STR, STUR and STLR of a 64-bit general-purpose register to memory that is not the stack's.
fn stores_64_bits(instruction: u32) -> bool {
    let forms = [
        (0xffc0_0000, 0xf900_0000), // unsigned offset
        (0xffe0_0c00, 0xf820_0800), // register offset
        (0xffe0_0c00, 0xf800_0000), // unscaled
        (0xffff_fc00, 0xc89f_fc00), // release
    ];
    let on_stack = instruction >> 5 & 0x1f == 31;
    !on_stack && forms.iter().any(|(mask, value)| instruction & mask == *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE_ZERO: u32 = 0xf834_7abf; // str xzr, [x21, x20, lsl #3]
    const STORE: u32 = 0xf834_7ab3; // str x19, [x21, x20, lsl #3]
    const TO_STACK: u32 = 0xf900_0bf5; // str x21, [sp, #16]

    #[test]
    fn classes_of_instructions() {
        let vector = [
            0x1e60_2820, // fadd d0, d1, d0
            0x4e20_8400, // add v0.16b, v0.16b, v0.16b
            0x3dc0_0000, // ldr q0, [x0]
            0xad00_0400, // stp q0, q1, [x0]
            0x9e66_0000, // fmov x0, d0
            0x04a0_0000, // add z0.s, z0.s, z0.s
            0xc080_0000, // SME
        ];
        for instruction in vector {
            assert!(uses_vector_registers(instruction), "{instruction:#x}");
        }
        let general =
            [STORE_ZERO, STORE, DSB_ISHST, 0xd503_201f, 0xa9bd_7bfd, 0xd65f_03c0, 0xb500_0328, 0, 0xc8df_fc00];
        for instruction in general {
            assert!(!uses_vector_registers(instruction), "{instruction:#x}");
        }
    }

    #[test]
    fn a_missing_break_is_seen() {
        assert!(breaks_first(&[TO_STACK, STORE_ZERO, DSB_ISHST, STORE]).is_ok());
        for bad in
            [&[STORE][..], &[STORE_ZERO, STORE], &[STORE, STORE_ZERO, DSB_ISHST], &[STORE_ZERO, DSB_ISHST, TO_STACK]]
        {
            assert!(breaks_first(bad).is_err(), "{bad:x?}");
        }
    }

    #[test]
    fn the_budget_is_a_limit() {
        assert!(within_budget(BUDGET).is_ok());
        assert!(within_budget(BUDGET + 1).is_err());
    }

    #[test]
    fn sources_without_the_attribute_are_seen() {
        assert!(forbids_unsafe("qemu/xtask/src/main.rs").is_ok());
        assert!(forbids_unsafe("qemu/xtask/src/run.rs").is_err());
    }
}
