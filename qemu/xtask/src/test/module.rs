//! The kernel module: it builds for every host kernel without a warning, and its source is clean.

use anyhow::{Result, ensure};

use super::Report;
use crate::module::{self, Kernel};

pub(super) fn run(_full: bool, report: &mut Report) -> Result<()> {
    for kernel in Kernel::ALL {
        let built = module::remove_objects(kernel).and_then(|()| module::build(kernel));
        let warnings = built.map(|built| built.warnings);
        report.check(&format!("builds for {} without warnings", kernel.name()), clean(warnings));
    }
    report.check("sparse", clean(module::sparse(Kernel::Linux)));
    report.check("checkpatch", clean(module::checkpatch()));
    Ok(())
}

fn clean(said: Result<Vec<String>>) -> Result<()> {
    let said = said?;
    ensure!(said.is_empty(), "{} complaints:\n{}", said.len(), said.join("\n"));
    Ok(())
}
