//! Calls at random and all calls in small worlds, on this machine, with the model as judge.

use std::time::Duration;

use anyhow::Result;

use super::Report;
use crate::process;

/// Calls that the random driver makes.
const CALLS: &str = "50000000";

/// Several times what they take on two CPUs.
const LIMIT: Duration = Duration::from_secs(6 * 3600);

/// The long runs of the drivers. The suite `host` has run a short slice.
pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    if !full {
        report.skip("50,000,000 calls and small worlds", "takes an hour, --full runs it");
        return Ok(());
    }
    let mut drivers = process::cargo();
    drivers.args(["run", "--quiet", "--profile", "drivers", "--package", "ravelin-drivers", "--"]);
    drivers.args(["all", "--calls", CALLS]);
    report.check("50,000,000 calls and small worlds", process::run_for(&mut drivers, LIMIT));
    Ok(())
}
