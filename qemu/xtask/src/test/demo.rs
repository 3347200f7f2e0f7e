//! Guests one after the other, and the demo as a user runs it.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Report, boots};
use crate::{guest_kernel, workspace};

pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    boots::run(full, report)?;
    const NAME: &str = "two protected guests at work, on a host that cannot read their memory";
    if !full && guest_kernel::cached()?.is_none() {
        report.skip(NAME, "the guest kernel is not built; cargo xtask guest-kernel or --full does it");
        return Ok(());
    }
    report.check(NAME, demo());
    Ok(())
}

fn demo() -> Result<()> {
    let mut xtask = Command::new(std::env::current_exe()?);
    let status = xtask.current_dir(workspace::root()).arg("demo").status().context("cannot start xtask")?;
    ensure!(status.success(), "{status}");
    Ok(())
}
