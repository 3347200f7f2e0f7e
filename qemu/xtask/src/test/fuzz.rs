//! Fuzzing of the targets of `tests/fuzz`, with cargo-fuzz.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Report;
use crate::{process, workspace};

/// The version of cargo-fuzz that is used, and installed if it is missing.
const VERSION: &str = "0.13.2";

/// How long each target is fuzzed.
const TIME: Duration = Duration::from_secs(60);

/// What a target may take besides: to start, with all of its corpus, and to write down what it has found.
const GRACE: Duration = Duration::from_secs(300);

/// Fuzzes each target for a minute.
pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    if !full {
        report.skip("all targets", "a minute each, --full runs them; the suite host replays their corpus");
        return Ok(());
    }
    let programs = match ensure_cargo_fuzz() {
        Ok(programs) => programs,
        Err(error) => {
            report.skip("all targets", &format!("no cargo-fuzz: {error:#}"));
            return Ok(());
        }
    };
    process::run(&mut cargo_fuzz(&programs, "build")?).context("building the targets")?;
    for target in targets()? {
        match fuzz(&programs, &target) {
            Ok(figures) => report.pass(&format!("{target}: {figures}")),
            Err(error) => report.fail(&target, &format!("{error:#}")),
        }
    }
    Ok(())
}

/// Makes sure that there is cargo-fuzz, and returns the directory that it is in.
fn ensure_cargo_fuzz() -> Result<PathBuf> {
    ensure!(workspace::program("c++").is_some(), "libFuzzer is built with c++, which this machine does not have");
    let root = workspace::cache_dir()?.join(format!("cargo-fuzz-{VERSION}"));
    let programs = root.join("bin");
    if !programs.join("cargo-fuzz").is_file() {
        let mut install = process::cargo();
        install.args(["install", "--locked", "cargo-fuzz", "--version", VERSION, "--root"]).arg(&root);
        process::run(&mut install)?;
    }
    Ok(programs)
}

/// `cargo fuzz SUBCOMMAND`, to be followed by arguments of the subcommand.
///
/// Without a sanitizer, because code that forbids `unsafe` has no use for one: so the pinned compiler will do, and the targets
/// are faster.
fn cargo_fuzz(programs: &Path, subcommand: &str) -> Result<Command> {
    let others = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([programs.to_path_buf()].into_iter().chain(env::split_paths(&others)))?;
    let mut command = process::cargo();
    command.env("PATH", path);
    // The profile is that of the image, which is optimised as a whole, and for size.
    command.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    command.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3");
    command.args(["fuzz", subcommand, "--fuzz-dir", "tests/fuzz", "--features", "libfuzzer", "--sanitizer", "none"]);
    // Kept apart: the flags are others.
    command.arg("--target-dir").arg(workspace::target_dir()?.join("fuzz"));
    Ok(command)
}

/// The names of the targets.
fn targets() -> Result<Vec<String>> {
    let files = workspace::files_below(&workspace::root().join("tests/fuzz/fuzz_targets"))?;
    Ok(files.iter().filter_map(|file| file.file_stem()).map(|name| name.to_string_lossy().into_owned()).collect())
}

/// Fuzzes a target, beginning with what is committed and what earlier runs have found.
fn fuzz(programs: &Path, target: &str) -> Result<String> {
    let dir = workspace::output_dir()?.join("fuzz").join(target);
    let (corpus, artefacts) = (dir.join("corpus"), dir.join("artefacts"));
    for dir in [&corpus, &artefacts] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let log = dir.join("log");
    let output = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    let mut command = cargo_fuzz(programs, "run")?;
    command.arg(target).arg(&corpus).arg(workspace::root().join("tests/fuzz/corpus").join(target)).arg("--");
    command.args([format!("-max_total_time={}", TIME.as_secs()), "-timeout=20".into(), "-print_final_stats=1".into()]);
    command.arg(format!("-artifact_prefix={}/", artefacts.display()));
    command.stdout(output.try_clone()?).stderr(output);
    let ran = process::run_for(&mut command, TIME.saturating_add(GRACE));
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    match artefact(&text) {
        // cargo-fuzz says, at the end of the log, how to run it again.
        Some(artefact) => ran.context(format!("fails on {artefact}; see {}", log.display()))?,
        None => ran.with_context(|| format!("see {}", log.display()))?,
    }
    figures(&text).with_context(|| format!("{} has no figures of libFuzzer", log.display()))
}

/// Where libFuzzer has written the input that a target fails on.
fn artefact(log: &str) -> Option<&str> {
    log.lines().find_map(|line| line.split_once("Test unit written to ")).map(|(_, path)| path.trim())
}

/// Reads from libFuzzer's output how often a target was run and what it reached.
fn figures(log: &str) -> Option<String> {
    let executions = log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?.trim();
    let reached = log.lines().rev().find(|line| line.contains(" cov: "))?;
    let mut words = reached.split_whitespace();
    let mut value = |name| words.find(|word| *word == name).and_then(|_| words.next());
    let (edges, features, corpus) = (value("cov:")?, value("ft:")?, value("corp:")?);
    let (inputs, size) = corpus.split_once('/')?;
    Some(format!("{executions} executions reach {edges} edges, {features} features; corpus of {inputs} inputs, {size}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_at_the_end() {
        let log = "#2\tINITED cov: 7 ft: 8 corp: 1/1b exec/s: 0 rss: 29Mb\n\
            #512\tNEW    cov: 1700 ft: 2799 corp: 96/915b lim: 11 exec/s: 75 rss: 29Mb L: 10/11 MS: 1 CMP- DE: \"a\"-\n\
            #9398\tDONE   cov: 1892 ft: 4976 corp: 336/7608b lim: 53 exec/s: 303 rss: 30Mb\n\
            Done 9398 runs in 31 second(s)\n\
            stat::number_of_executed_units: 9398\n\
            stat::average_exec_per_sec:     303\n";
        let expected = "9398 executions reach 1892 edges, 4976 features; corpus of 336 inputs, 7608b";
        assert_eq!(figures(log).as_deref(), Some(expected));
        assert_eq!(figures("error: no such target"), None);
        assert_eq!(artefact(log), None);
    }

    #[test]
    fn an_artefact_is_found() {
        let log = "==7== ERROR: libFuzzer: deadly signal\n\
            artifact_prefix='/t/'; Test unit written to /t/crash-0a\nBase64: AAA=\n";
        assert_eq!(artefact(log), Some("/t/crash-0a"));
    }

    #[test]
    fn each_target_has_a_program_and_a_corpus_that_is_replayed() {
        let root = workspace::root().join("tests/fuzz");
        let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
        let replays = fs::read_to_string(root.join("tests/corpus.rs")).unwrap();
        let targets = targets().unwrap();
        assert!(!targets.is_empty());
        for target in targets {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")), "{target}");
            assert!(root.join("corpus").join(&target).is_dir(), "{target}");
            assert!(replays.contains(&format!("(\"{target}\", ravelin_fuzz::{target})")), "{target}");
        }
    }
}
