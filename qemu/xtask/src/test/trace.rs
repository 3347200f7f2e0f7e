//! The architecture trace of the EL1 payload: nothing in it breaks the rules for translation tables.

use anyhow::{Context, Result, ensure};

use super::Report;
use crate::run;
use crate::trace::{self, ALL, Follower, REPRESENTATIVE, Tally};

/// What the run may take, with tests of minutes in the full one.
const LIMIT: u64 = 900;
const FULL_LIMIT: u64 = 4 * 3600;

/// Kinds of records that every run has.
const KINDS: [&str; 13] = [
    "barrier",
    "hint",
    "ipas2e1is",
    "ipas2le1is",
    "lock",
    "mem-free",
    "mem-init",
    "mem-write",
    "sysreg-write",
    "unlock",
    "vae2is",
    "vmalle1is",
    "vmalls12e1is",
];

/// Lines of the console that are shown when a run fails.
const SHOWN: usize = 40;

/// What CPUs do at the same time.
const CONTENTION: &str = "test=pins.from_all_cpus,psci.race,guests.vcpus_on_all_cpus,random.*";

/// A run of the payload.
struct Run {
    about: &'static str,
    cpu: &'static str,
    smp: u32,
    /// Whether CPUs take turns at EL2, where a model judges what they do.
    checked: bool,
    /// Whether the CPU has TLB maintenance for ranges.
    ranges: bool,
    tests: &'static str,
}

const RUNS: [Run; 3] = [
    Run { about: "page by page", cpu: "cortex-a76", smp: 2, checked: true, ranges: false, tests: REPRESENTATIVE },
    Run { about: "by ranges", cpu: "max", smp: 2, checked: true, ranges: true, tests: REPRESENTATIVE },
    Run { about: "all at once", cpu: "cortex-a76", smp: 4, checked: false, ranges: false, tests: CONTENTION },
];

/// Runs the payload on several machines and follows its trace. In the full suite, the first of them takes all tests.
pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    for (number, Run { about, cpu, smp, checked, ranges, tests }) in RUNS.into_iter().enumerate() {
        // The checks of the checking build take their time by the size of RAM.
        let (tests, memory, limit) =
            if full && number == 0 { (ALL, "512M", FULL_LIMIT) } else { (tests, "256M", LIMIT) };
        let machine = run::Options {
            cpu: Some(cpu.into()),
            smp: Some(smp),
            memory: Some(memory.into()),
            append: Some(tests.into()),
            timeout: Some(limit),
            checked,
            ..run::Options::default()
        };
        let mut console = Vec::new();
        let recorded = trace::record(machine, Follower::new(None), &mut console);
        let console = String::from_utf8_lossy(&console);
        let outcome = recorded.and_then(|tally| {
            println!("{tally}");
            passed(&console)?;
            judge(&tally, ranges)
        });
        if outcome.is_err() {
            let lines: Vec<_> = console.lines().collect();
            println!("{}", lines[lines.len().saturating_sub(SHOWN)..].join("\n"));
        }
        report.check(about, outcome);
    }
    Ok(())
}

/// Whether the payload says that tests have passed and none has failed.
fn passed(console: &str) -> Result<()> {
    let summary =
        console.lines().find_map(|line| line.strip_prefix("payload: ").filter(|line| line.contains("passed")));
    let summary = summary.with_context(|| format!("no summary; the console ends in {:?}", console.lines().last()))?;
    let failed: Vec<_> = console.lines().filter(|line| line.contains("FAILED")).collect();
    ensure!(summary.contains(" 0 failed") && !summary.starts_with("0 passed"), "{summary}: {}", failed.join("; "));
    Ok(())
}

fn judge(tally: &Tally, ranges: bool) -> Result<()> {
    for kind in KINDS {
        ensure!(tally.records.contains_key(kind), "the trace has no {kind}");
    }
    ensure!(ranges == (tally.ranges != 0), "{} operations on ranges", tally.ranges);
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
        assert!(judge(&tally, false).is_ok());
        assert!(judge(&tally, true).is_err());
        tally.ranges = 1;
        assert!(judge(&tally, true).is_ok());
        assert!(judge(&tally, false).is_err());
        tally.violations = 1;
        assert!(judge(&tally, true).is_err());
        tally.violations = 0;
        tally.records.remove("vae2is");
        assert!(judge(&tally, true).is_err());
    }
}
