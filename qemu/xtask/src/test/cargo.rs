//! The suites that cargo and its tools run.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Report;
use crate::process::{LIMIT, Watchdog};
use crate::setup::{self, Needs, rust};
use crate::{process, workspace};

/// Crates whose code is for the bare-metal target.
const BARE_METAL: [&str; 5] = ["ravelin-arch", "ravelin", "ravelin-payload", "ravelin-guest", "ravelin-linux-probe"];

/// Crates of static programs for the host.
const HOST_PROGRAMS: [&str; 2] = ["ravelin-kvm-tests", "ravelin-vmm"];

/// Crates whose tests run under Miri: those of the hypervisor that forbid unsafe code. Tests that take it long are marked as
/// ignored there, with the reason.
const MIRI: [&str; 7] = [
    "ravelin-memory",
    "ravelin-abi",
    "ravelin-hypercall",
    "ravelin-pgtable",
    "ravelin-ownership",
    "ravelin-vgic",
    "ravelin-vm",
];

/// What only the whole matrix runs under Miri: without threads, and almost without dependencies.
const MIRI_FULL: [&str; 1] = ["ravelin-platform"];

/// What Miri is never asked for, and why.
const MIRI_NEVER: [(&str, &str); 2] = [
    ("ravelin-ownership: models, transitions and guests", "their checks walk all of memory: hours"),
    ("ravelin-vm: vm, run and machine_memory", "whole lives of VMs, with measurements and tables: hours"),
];

/// What Miri may take for a crate: several times what it does take, and hours for all there is.
const MIRI_LIMIT: Duration = Duration::from_secs(600);
const MIRI_FULL_LIMIT: Duration = Duration::from_secs(4 * 3600);

/// Crates with models of what CPUs do at once, and what the names of these tests have in common.
const LOOM: [&str; 3] = ["ravelin-sync", "ravelin-vm", "ravelin-hypercall"];
const LOOM_FILTER: &str = "models::";

/// Formatting.
pub(super) fn fmt(_full: bool, report: &mut Report) -> Result<()> {
    report.check("cargo fmt", process::run(process::cargo().args(["fmt", "--all", "--check"])));
    Ok(())
}

/// Lints.
pub(super) fn clippy(_full: bool, report: &mut Report) -> Result<()> {
    let deny = ["--", "--deny", "warnings"];
    let mut here = process::cargo();
    here.args(["clippy", "--quiet", "--workspace", "--all-targets"]).args(deny);
    report.check("this machine", process::run(&mut here));

    setup::ensure(&Needs { bare_metal: true, ..Needs::default() })?;
    let variants = [
        ("bare metal", &[][..]),
        ("bare metal, checking build", &["--features", "ravelin/checked"]),
        ("bare metal, build with a trace", &["--features", "ravelin/trace"]),
    ];
    for (name, features) in variants {
        let mut bare = rust::cargo("clippy")?;
        bare.arg("--quiet").args(BARE_METAL.iter().flat_map(|package| ["--package", package]));
        bare.args(features).args(deny);
        report.check(name, process::run(&mut bare));
    }

    setup::ensure(&Needs { musl: true, ..Needs::default() })?;
    let mut programs = process::cargo();
    programs.args(["clippy", "--quiet", "--target", rust::MUSL]);
    programs.args(HOST_PROGRAMS.iter().flat_map(|package| ["--package", package])).args(deny);
    report.check("programs of the host", process::run(&mut programs));
    Ok(())
}

/// Documentation.
pub(super) fn doc(_full: bool, report: &mut Report) -> Result<()> {
    let common = ["--quiet", "--no-deps", "--document-private-items"];
    let deny = |command: &mut Command| process::run(command.args(common).env("RUSTDOCFLAGS", "--deny warnings"));
    let mut here = process::cargo();
    here.args(["doc", "--workspace"]).args(BARE_METAL.iter().flat_map(|package| ["--exclude", package]));
    report.check("this machine", deny(&mut here));

    setup::ensure(&Needs { bare_metal: true, ..Needs::default() })?;
    let mut bare = rust::cargo("doc")?;
    bare.args(BARE_METAL.iter().flat_map(|package| ["--package", package]));
    report.check("bare metal", deny(&mut bare));
    Ok(())
}

/// Tests on this machine.
pub(super) fn host(_full: bool, report: &mut Report) -> Result<()> {
    let mut test = process::cargo();
    test.args(["test", "--workspace", "--no-fail-fast"]);
    libtest(&mut test, LIMIT, report)
}

/// Tests whose threads loom runs in every order with few preemptions.
pub(super) fn loom(full: bool, report: &mut Report) -> Result<()> {
    let mut test = process::cargo();
    // Kept apart: with loom all of it is built anew.
    test.args(["test", "--profile", "loom", "--no-fail-fast", "--tests", "--target-dir"]);
    test.arg(workspace::target_dir()?.join("loom")).args(LOOM.iter().flat_map(|package| ["--package", package]));
    test.arg(LOOM_FILTER).env("RUSTFLAGS", "--cfg loom");
    // How often threads may be interrupted, other than where they wait.
    test.env("LOOM_MAX_PREEMPTIONS", if full { "3" } else { "2" });
    let before = report.passed + report.failed.len();
    libtest(&mut test, LIMIT, report)?;
    ensure!(report.passed + report.failed.len() > before, "there are no models");
    Ok(())
}

/// Tests under Miri.
pub(super) fn miri(full: bool, report: &mut Report) -> Result<()> {
    if let Err(error) = ensure_miri() {
        report.skip("all of it", &format!("no nightly toolchain with Miri: {error:#}"));
        return Ok(());
    }
    for (tests, why) in MIRI_NEVER {
        report.skip(tests, why);
    }
    let mut crates = MIRI.to_vec();
    if full {
        crates.extend(MIRI_FULL);
    } else {
        MIRI_FULL.iter().for_each(|package| report.skip(package, "takes minutes, --full runs it"));
    }
    for package in crates {
        let mut test = Command::new("cargo");
        test.current_dir(workspace::root()).args(["+nightly", "miri", "test", "--no-fail-fast", "--lib", "--tests"]);
        // Kept apart: Miri's builds and ours would throw each other's away.
        test.arg("--target-dir").arg(workspace::target_dir()?.join("miri")).args(["--package", package]);
        if full {
            test.args(["--", "--include-ignored"]);
        }
        // Miri is some hundred times slower; the suite `host` has run the properties on many cases.
        test.env("PROPTEST_CASES", if full { "16" } else { "2" });
        // Property tests look for the file of their earlier failures.
        test.env("MIRIFLAGS", "-Zmiri-disable-isolation");
        libtest(&mut test, if full { MIRI_FULL_LIMIT } else { MIRI_LIMIT }, report)?;
    }
    Ok(())
}

fn ensure_miri() -> Result<()> {
    let installed = || process::output(Command::new("cargo").args(["+nightly", "miri", "--version"])).is_ok();
    if !installed() {
        let mut install = Command::new("rustup");
        install.args(["toolchain", "install", "nightly", "--profile", "minimal"]);
        process::run(install.args(["--component", "miri", "--component", "rust-src"]))?;
    }
    // Builds the standard library for Miri, which says what is missing.
    process::output(Command::new("cargo").args(["+nightly", "miri", "setup"])).map(drop)
}

/// Runs a command that prints libtest's lines, for not longer than `limit`, shows what it prints, and counts.
pub(super) fn libtest(command: &mut Command, limit: Duration, report: &mut Report) -> Result<()> {
    let line = process::line(command);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {line}"))?;
    let watchdog = Watchdog::new(&child, limit);
    let output = BufReader::new(child.stdout.take().context("the command has no output")?);
    let mut failures = 0;
    for text in output.lines() {
        let text = text?;
        match parse_libtest(&text) {
            Some((_, Verdict::Passed)) => report.add(1),
            Some((name, Verdict::Failed(why))) => {
                report.fail(name, why);
                failures += 1;
            }
            Some((name, Verdict::Ignored(why))) => report.skip(name, why),
            None => {}
        }
        println!("{text}");
    }
    let status = child.wait()?;
    if let Err(late) = watchdog.finish() {
        report.fail(&line, &format!("{late:#}"));
    } else if !status.success() && failures == 0 {
        report.fail(&line, &format!("{status}"));
    }
    Ok(())
}

/// What a line of libtest says of a test.
#[derive(Debug, PartialEq, Eq)]
enum Verdict<'a> {
    Passed,
    Failed(&'a str),
    Ignored(&'a str),
}

/// Parses `test NAME ... ok`, `... FAILED` and `... ignored`, the latter two with a reason or without.
fn parse_libtest(line: &str) -> Option<(&str, Verdict<'_>)> {
    let (name, verdict) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let verdict = if verdict == "ok" {
        Verdict::Passed
    } else if let Some(why) = verdict.strip_prefix("FAILED") {
        Verdict::Failed(why.trim_start_matches([':', ',', ' ']))
    } else {
        Verdict::Ignored(verdict.strip_prefix("ignored")?.trim_start_matches([':', ',', ' ']))
    };
    Some((name, verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_libtest() {
        assert_eq!(parse_libtest("test a::b ... ok"), Some(("a::b", Verdict::Passed)));
        assert_eq!(parse_libtest("test a::b ... FAILED"), Some(("a::b", Verdict::Failed(""))));
        assert_eq!(parse_libtest("test a ... ignored, slow"), Some(("a", Verdict::Ignored("slow"))));
        assert_eq!(parse_libtest("test a ... FAILED: CPU 1: stale"), Some(("a", Verdict::Failed("CPU 1: stale"))));
        for other in ["running 3 tests", "test result: ok. 3 passed; 0 failed", "test a ... bench: 3", "tests a ... ok"]
        {
            assert_eq!(parse_libtest(other), None, "{other}");
        }
    }

    #[test]
    fn a_command_that_fails_without_a_word_counts() {
        let mut report = Report::default();
        let mut shell = |script| libtest(Command::new("sh").args(["-c", script]), LIMIT, &mut report).unwrap();
        shell("echo 'test a ... ok'; exit 101");
        shell("echo 'test a ... FAILED'; exit 101");
        assert_eq!(report.summary(), "1 passed, 2 failed, 0 skipped");
    }

    #[test]
    fn a_command_that_hangs_fails() {
        let mut report = Report::default();
        let mut hangs = Command::new("sh");
        hangs.args(["-c", "echo 'test a ... ok'; sleep 100; echo 'test b ... ok'"]);
        libtest(&mut hangs, Duration::from_millis(300), &mut report).unwrap();
        assert_eq!(report.summary(), "1 passed, 1 failed, 0 skipped");
        assert!(report.failed[0].ends_with("not finished after 0 s, and killed"), "{:?}", report.failed);
    }
}
