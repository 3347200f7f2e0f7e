//! `cargo xtask test`: every test, in suites, with a summary.

mod bench;
mod boots;
mod cargo;
mod conformance;
mod coverage;
mod demo;
mod drivers;
mod fuzz;
mod gates;
mod kvm;
mod linux;
mod module;
mod mutants;
mod seeded;
mod stack;
mod trace;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;

/// Options of `test`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Options {
    /// Suites to run; all of them if none is named
    #[arg(value_name = "SUITE", long_help = suites_help())]
    suites: Vec<String>,
    /// The whole matrix of CPU models, numbers of CPUs and sizes of RAM, and further kernels
    #[arg(long)]
    full: bool,
}

/// A suite adds its results to the report; an error of its own counts as a failure.
struct Suite {
    name: &'static str,
    about: &'static str,
    run: fn(full: bool, &mut Report) -> Result<()>,
}

/// Quick ones first.
const SUITES: &[Suite] = &[
    Suite { name: "fmt", about: "formatting", run: cargo::fmt },
    Suite { name: "clippy", about: "lints, for this machine and for bare metal", run: cargo::clippy },
    Suite { name: "doc", about: "documentation without broken links", run: cargo::doc },
    Suite { name: "host", about: "unit and property tests on this machine", run: cargo::host },
    Suite { name: "loom", about: "what CPUs do at once, in every order with few preemptions", run: cargo::loom },
    Suite { name: "drivers", about: "calls at random and in small worlds, judged by the model", run: drivers::run },
    Suite { name: "coverage", about: "lines of the logic crates that those reach", run: coverage::run },
    Suite { name: "module", about: "the kernel module builds and is clean", run: module::run },
    Suite { name: "gates", about: "what must hold of the built image", run: gates::run },
    Suite { name: "conformance", about: "an EL1 payload drives every hypercall in QEMU", run: conformance::run },
    Suite { name: "guests", about: "the payload as the host of guests in QEMU", run: conformance::guests },
    Suite { name: "seeded", about: "the checking build stops at bugs that are put into it", run: seeded::run },
    Suite { name: "trace", about: "what the payload makes of translation tables breaks no rule", run: trace::run },
    Suite {
        name: "bench",
        about: "counts of instructions and invalidations, beside the committed ones",
        run: bench::run,
    },
    Suite { name: "linux", about: "a stock Linux as the host in QEMU", run: linux::run },
    Suite { name: "kvm", about: "the kernel module's /dev/kvm and guest_memfd, from the host", run: kvm::run },
    Suite { name: "demo", about: "guests on that host from start to end, and an attack on them", run: demo::run },
    Suite { name: "miri", about: "unit tests under Miri, if a nightly toolchain can be had", run: cargo::miri },
    Suite { name: "fuzz", about: "fuzz targets with cargo-fuzz, a minute each", run: fuzz::run },
    Suite { name: "mutants", about: "errors in the logic crates that tests must find, with --full", run: mutants::run },
];

fn suites_help() -> String {
    let list: Vec<_> = SUITES.iter().map(|suite| format!("  {:<12} {}", suite.name, suite.about)).collect();
    format!("Suites to run; all of them if none is named:\n{}", list.join("\n"))
}

/// Counted results.
#[derive(Debug, Default)]
pub(crate) struct Report {
    suite: &'static str,
    passed: usize,
    failed: Vec<String>,
    skipped: Vec<String>,
}

impl Report {
    /// Counts a test by its result.
    pub(crate) fn check(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => self.pass(name),
            Err(error) => self.fail(name, &format!("{error:#}")),
        }
    }

    /// Counts a test that passed.
    pub(crate) fn pass(&mut self, name: &str) {
        println!("ok      {}: {name}", self.suite);
        self.passed += 1;
    }

    /// Counts a test that failed.
    pub(crate) fn fail(&mut self, name: &str, why: &str) {
        println!("FAILED  {}: {name}: {why}", self.suite);
        // The summary has one line for each.
        self.failed.push(format!("{}: {name}: {}", self.suite, why.lines().next().unwrap_or("")));
    }

    /// Counts a test that could not be run.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        println!("SKIPPED {}: {name}: {why}", self.suite);
        self.skipped.push(format!("{}: {name}: {why}", self.suite));
    }

    /// How many tests have failed so far.
    pub(crate) fn failures(&self) -> usize {
        self.failed.len()
    }

    /// Counts tests that another program ran and has shown.
    pub(crate) fn add(&mut self, passed: usize) {
        self.passed += passed;
    }

    /// The last line of the output.
    fn summary(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped.len())
    }
}

/// Runs the suites and prints the summary.
pub(crate) fn test(options: &Options) -> Result<ExitCode> {
    if let Some(unknown) = options.suites.iter().find(|name| SUITES.iter().all(|suite| suite.name != **name)) {
        let known: Vec<_> = SUITES.iter().map(|suite| suite.name).collect();
        bail!("no suite {unknown}; there are: {}", known.join(", "));
    }
    let mut report = Report::default();
    for suite in SUITES {
        if !options.suites.is_empty() && !options.suites.iter().any(|name| name == suite.name) {
            continue;
        }
        println!("== {}: {}", suite.name, suite.about);
        report.suite = suite.name;
        let start = Instant::now();
        if let Err(error) = (suite.run)(options.full, &mut report) {
            report.fail("the suite itself", &format!("{error:#}"));
        }
        println!("== {} took {} s", suite.name, start.elapsed().as_secs());
    }
    println!();
    for skipped in &report.skipped {
        println!("SKIPPED {skipped}");
    }
    for failed in &report.failed {
        println!("FAILED  {failed}");
    }
    println!("{}", report.summary());
    Ok(if report.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let mut report = Report { suite: "own", ..Report::default() };
        report.check("good", Ok(()));
        report.check("bad", Err(anyhow::anyhow!("first line\nsecond line")));
        report.skip("absent", "no such thing");
        report.add(3);
        assert_eq!(report.summary(), "4 passed, 1 failed, 1 skipped");
        assert_eq!(report.failed, ["own: bad: first line"]);
    }

    #[test]
    fn unknown_suites_are_refused() {
        let options = Options { suites: vec!["nonsuch".into()], full: false };
        assert!(test(&options).unwrap_err().to_string().contains("linux"));
    }
}
