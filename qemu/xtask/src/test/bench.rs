//! What the hypervisor costs, beside what it cost.

use anyhow::Result;

use super::Report;
use crate::{bench, setup};

/// The version of QEMU whose plugin interface the counter uses.
const QEMU_MAJOR: u32 = 10;

/// Compares the counts that take seconds with the baseline.
pub(super) fn run(_full: bool, report: &mut Report) -> Result<()> {
    setup::ensure(&setup::Needs { qemu: true, bare_metal: true, ..Default::default() })?;
    if setup::qemu_version().is_none_or(|(major, _)| major < QEMU_MAJOR) {
        report.skip("all counts", &format!("QEMU is older than {QEMU_MAJOR}"));
        return Ok(());
    }
    match bench::check() {
        Ok(figures) => report.pass(&figures),
        Err(error) => report.fail("a count has grown", &format!("{error:#}")),
    }
    Ok(())
}
