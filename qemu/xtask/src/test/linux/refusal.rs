//! Machines that the hypervisor cannot run on: it says why.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{USUAL, boot};
use crate::process;
use crate::qemu::{Outcome, Scratch};
use crate::run::Options;
use crate::test::Report;

pub(super) fn run(report: &mut Report) {
    report.check("a GICv2 is refused", refused("GICv2", "gic", |options| options.machine = Some("virt-gicv2".into())));
    report.check("a machine without a GIC is refused", without_gic());
    let at_el1 = |options: &mut Options| options.qemu_arg = ["-machine", "virtualization=off"].map(Into::into).into();
    report.check("entry at EL1 is refused", refused("EL1", "EL2", at_el1));
}

/// The hypervisor refuses to boot, names the reason and ends the machine.
fn refused(name: &str, reason: &str, change: impl FnOnce(&mut Options)) -> Result<()> {
    let transcript = boot(&format!("refused {name}"), &USUAL, change)?;
    ensure!(transcript.outcome == Outcome::Failed, "{:?} instead of a refusal", transcript.outcome);
    let message = transcript.console.lines().find(|line| line.starts_with("ravelin: cannot boot"));
    let message = message.context("no message")?;
    println!("  {name}: {message}");
    let named = message.to_lowercase().contains(&reason.to_lowercase());
    ensure!(named, "{message:?} does not name the reason");
    Ok(())
}

/// The usual machine, whose device tree has something unknown in the place of the GIC.
fn without_gic() -> Result<()> {
    let scratch = Scratch::new()?;
    let tree = scratch.path("virt.dtb");
    let mut qemu = Command::new("qemu-system-aarch64");
    let machine = format!("virt,gic-version=3,virtualization=on,dumpdtb={}", tree.display());
    qemu.args(["-machine", &machine, "-cpu", USUAL.cpu, "-smp", &USUAL.smp.to_string(), "-m", USUAL.memory]);
    process::output(qemu.args(["-display", "none", "-nodefaults"]))?;
    let mut bytes = fs::read(&tree).context("QEMU wrote no device tree")?;
    shrink(&mut bytes).context("QEMU's device tree is cut")?;
    let gic = b"arm,gic-v3\0";
    let at = bytes.windows(gic.len()).position(|window| window == gic).context("no GIC in QEMU's device tree")?;
    bytes[at..][..gic.len()].copy_from_slice(b"arm,pic-v0\0");
    fs::write(&tree, bytes)?;
    refused("no GIC", "gic", |options| options.qemu_arg = vec!["-dtb".into(), tree.display().to_string()])
}

/// Cuts a device tree to what it uses, with some room: QEMU dumps the whole MiB that it has reserved. The strings are its
/// last part (Devicetree Specification v0.4, section 5.2).
fn shrink(tree: &mut Vec<u8>) -> Option<()> {
    const ROOM: usize = 16 << 10;
    let word = |at: usize| Some(u32::from_be_bytes(*tree.get(at..)?.first_chunk()?));
    let (strings, strings_size) = (word(12)?, word(32)?);
    let size = usize::try_from(strings.checked_add(strings_size)?).ok()? + ROOM;
    let total = u32::try_from(size).ok()?.to_be_bytes();
    (size <= tree.len()).then(|| tree.truncate(size))?;
    tree.get_mut(4..8)?.copy_from_slice(&total);
    Some(())
}
