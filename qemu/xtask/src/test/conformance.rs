//! The EL1 payload in the place of the host, alone and with guests.

use std::time::Duration;

use anyhow::Result;

use super::{Report, cargo};
use crate::setup::{self, Needs};
use crate::{image, process};

/// What the whole matrix and a million checked hypercalls may take.
const FULL_LIMIT: Duration = Duration::from_secs(6 * 3600);

/// Runs the conformance runner for what concerns the host alone.
pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    runner(&[], full, report)
}

/// Runs the conformance runner for what concerns guests.
pub(super) fn guests(full: bool, report: &mut Report) -> Result<()> {
    runner(&["--guests"], full, report)
}

/// Runs the conformance runner, which prints a line for each test as libtest does.
fn runner(arguments: &[&str], full: bool, report: &mut Report) -> Result<()> {
    setup::ensure(&Needs { qemu: true, bare_metal: true, ..Needs::default() })?;
    let mut runner = process::cargo();
    runner.args(["run", "--quiet", "--package", "ravelin-conformance", "--", "--payload"]);
    runner.arg(image::payload()?).arg("--guest").arg(image::guest()?).args(arguments);
    if full {
        runner.arg("--full");
    }
    cargo::libtest(&mut runner, if full { FULL_LIMIT } else { process::LIMIT }, report)
}
