//! The EL1 payload in the place of the host.

use anyhow::Result;

use super::{Report, cargo};
use crate::setup::{self, Needs};
use crate::{image, process};

/// Runs the conformance runner, which prints a line for each test as libtest does.
pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    setup::ensure(&Needs { qemu: true, bare_metal: true, ..Needs::default() })?;
    let mut runner = process::cargo();
    runner.args(["run", "--quiet", "--package", "ravelin-conformance", "--", "--payload"]);
    runner.arg(image::payload()?);
    if full {
        runner.arg("--full");
    }
    cargo::libtest(&mut runner, report)
}
