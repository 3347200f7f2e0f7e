//! The architecture trace of the EL1 payload: nothing in it breaks the rules for translation tables.

use anyhow::{Context, Result, ensure};

use super::Report;
use crate::run;
use crate::trace::{self, ALL, Follower, REPRESENTATIVE, Tally};

/// What the run may take, with tests of minutes in the full one.
const LIMIT: u64 = 900;
const FULL_LIMIT: u64 = 4 * 3600;

/// Kinds of records that every run has.
const KINDS: [&str; 9] =
    ["barrier", "hint", "lock", "mem-free", "mem-init", "mem-write", "sysreg-write", "tlbi", "unlock"];

/// Runs the payload on two CPUs and follows its trace.
pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    // The checks of the checking build take their time by the size of RAM.
    let (append, memory, limit) = if full { (ALL, "512M", FULL_LIMIT) } else { (REPRESENTATIVE, "256M", LIMIT) };
    let machine = run::Options {
        cpu: Some("cortex-a76".into()),
        smp: Some(2),
        memory: Some(memory.into()),
        append: Some(append.into()),
        timeout: Some(limit),
        ..run::Options::default()
    };
    let mut console = Vec::new();
    let tally = trace::record(machine, Follower::new(None), &mut console)?;
    println!("{tally}");
    report.check("the payload ran", passed(&String::from_utf8_lossy(&console)));
    report.check("no violation", judge(&tally));
    Ok(())
}

/// Whether the payload says that tests have passed and none has failed.
fn passed(console: &str) -> Result<()> {
    let summary =
        console.lines().find_map(|line| line.strip_prefix("payload: ").filter(|line| line.contains("passed")));
    let summary = summary.with_context(|| format!("no summary; the console ends in {:?}", console.lines().last()))?;
    ensure!(summary.contains(" 0 failed") && !summary.starts_with("0 passed"), "{summary}");
    Ok(())
}

fn judge(tally: &Tally) -> Result<()> {
    for kind in KINDS {
        ensure!(tally.records.contains_key(kind), "the trace has no {kind}");
    }
    ensure!(tally.violations == 0, "{} violations, the first: {:?}", tally.violations, tally.first.first());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_tests_is_none() {
        assert!(passed("payload: 2 CPUs\npayload: 5 passed; 0 failed; 1 ignored\n").is_ok());
        assert!(passed("payload: 5 passed; 1 failed; 0 ignored").is_err());
        assert!(passed("payload: 0 passed; 0 failed; 9 ignored").is_err());
        assert!(passed("payload: 2 CPUs").is_err());
    }

    #[test]
    fn a_trace_that_lacks_a_kind_is_none() {
        let mut tally = Tally { records: KINDS.into_iter().map(|kind| (kind, 1)).collect(), ..Tally::default() };
        assert!(judge(&tally).is_ok());
        tally.violations = 1;
        assert!(judge(&tally).is_err());
        tally.violations = 0;
        tally.records.remove("tlbi");
        assert!(judge(&tally).is_err());
    }
}
