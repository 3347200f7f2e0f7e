//! What the hypervisor says when it fails. Nothing that a host does makes it fail, so an instruction of its own is broken
//! from outside.

use std::{fs, ops::Range};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSymbol, read::elf::ElfFile64};

use crate::{gdb::Gdb, output::Verdict, payload, run::Session};

/// The function to break: every transition goes through it. The name as it is mangled, without what differs from build to
/// build.
const FUNCTION: [&str; 2] = ["ravelin_ownership6memory", "4take17h"];

/// The word of the arm64 Image header that tells it from anything else, and where it is.
const MAGIC: u32 = 0x644d_5241;
const MAGIC_OFFSET: u64 = 56;

/// Status of `cargo xtask run` after the hypervisor has failed.
const FAILED: i32 = 101;

/// Breaks an instruction under a session in which a test runs, and judges the end.
pub(crate) fn judge(mut session: Session, mut console: String) -> Result<Verdict> {
    let carve_out = carve_out(&console).context("the hypervisor does not say what it keeps")?;
    let offset = function_offset()?;
    let mut gdb = Gdb::connect(&session.debug()?)?;
    let mut image = None;
    for page in carve_out.step_by(4096) {
        if gdb.read(page + MAGIC_OFFSET)? == MAGIC {
            image = Some(page);
            break;
        }
    }
    let image = image.context("no image in the carve-out")?;
    // UDF, behind the instructions that make the frame. The other CPU may be quicker than the stub's answer.
    gdb.write(image + offset + 40, 0)?;
    let _ = gdb.detach();

    let status = session.wait(&mut console)?;
    let report = &console[console.find("ravelin panic").unwrap_or(console.len())..];
    let wanted =
        ["ravelin panic on cpu", "synchronous exception", "  x30 ", "esr_el2", "#0", "take", "memory.rs", "host_exit"];
    let missing: Vec<_> = wanted.iter().filter(|text| !report.contains(**text)).collect();
    Ok(match status {
        FAILED if missing.is_empty() => Verdict::Passed,
        FAILED => Verdict::Failed(format!("the report lacks {missing:?}: {report}")),
        other => Verdict::Failed(format!("the machine ended with status {other}")),
    })
}

/// The range in `ravelin: keeps 0xBASE-0xLAST (N KiB)`.
fn carve_out(console: &str) -> Option<Range<u64>> {
    let (_, line) = console.split_once("ravelin: keeps ")?;
    let (base, last) = line.split_whitespace().next()?.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    Some(number(base)?..number(last)?)
}

/// Distance of [`FUNCTION`] from the start of the image that xtask has built.
fn function_offset() -> Result<u64> {
    let elf = payload::target_dir()?.join(payload::TARGET).join("release/ravelin");
    let elf = fs::read(&elf).with_context(|| format!("cannot read {}", elf.display()))?;
    let file = ElfFile64::<object::Endianness>::parse(&*elf).context("the image is no ELF file")?;
    let symbol =
        file.symbols().find(|symbol| symbol.name().is_ok_and(|name| FUNCTION.iter().all(|part| name.contains(part))));
    match symbol {
        Some(symbol) => Ok(symbol.address()),
        None => bail!("the image has no function {FUNCTION:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_carve_out_is_read_from_the_console() {
        let console = "ravelin: version 0.1.0\r\nravelin: keeps 0xbfa00000-0xbfffffff (6144 KiB)\r\n";
        assert_eq!(carve_out(console), Some(0xbfa0_0000..0xbfff_ffff));
        assert_eq!(carve_out("nothing"), None);
    }
}
