//! The suite `mutants`: do tests fail when a line of the code that changes state is wrong?
//!
//! `cargo mutants` makes the errors, one at a time; `.cargo/mutants.toml` says which and which tests run. It takes hours, so that
//! it can be done in parts: `RAVELIN_MUTANTS_CRATES=ownership,vm` chooses crates, `RAVELIN_MUTANTS_SHARD=0/8` runs every eighth
//! mutant from the first on. Outcomes stay below the target directory and add up, until the whole of a crate is run or its sources
//! change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::Report;
use crate::setup::rust;
use crate::{process, workspace};

/// Crates whose code is changed.
const CRATES: [&str; 4] = ["ownership", "pgtable", "hypercall", "vm"];

/// How many of a hundred mutants that compile have to be caught.
const CAUGHT_PERCENT: usize = 90;

/// The version of `cargo mutants`: another one makes other mutants.
const VERSION: &str = "27.1.0";

/// Mutants that no test catches, each with the reason.
const SURVIVORS: &str = "tests/mutants/survivors.toml";

/// Mutants that are tested at a time. Each takes some hundred megabytes.
const MOST_JOBS: usize = 8;

/// What a crate may take.
const LIMIT: Duration = Duration::from_secs(24 * 3600);

/// The file of `SURVIVORS`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Survivors {
    #[serde(default)]
    survivor: Vec<Survivor>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Survivor {
    /// The mutant without line and column, `FILE: replace ... in ...`; once for each of that name.
    mutant: String,
    reason: String,
}

/// What became of a mutant. Where one was run in two shards, the first of these counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Missed,
    Unviable,
    Timeout,
    Caught,
}

/// The lists that `cargo mutants` writes.
const LISTS: [(&str, Outcome); 4] = [
    ("missed.txt", Outcome::Missed),
    ("unviable.txt", Outcome::Unviable),
    ("timeout.txt", Outcome::Timeout),
    ("caught.txt", Outcome::Caught),
];

type Outcomes = BTreeMap<String, Outcome>;

pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    if !full {
        report.skip("all of it", "takes hours, --full runs it");
        return Ok(());
    }
    let tool = match rust::tool("cargo-mutants", VERSION) {
        Ok(tool) => tool,
        Err(error) => {
            report.skip("all of it", &format!("no cargo-mutants: {error:#}"));
            return Ok(());
        }
    };
    let text = fs::read_to_string(workspace::root().join(SURVIVORS)).context(SURVIVORS)?;
    let known: Survivors = toml::from_str(&text).context(SURVIVORS)?;
    ensure!(known.survivor.iter().all(|one| !one.reason.trim().is_empty()), "{SURVIVORS}: an entry without a reason");
    let chosen = env::var("RAVELIN_MUTANTS_CRATES").unwrap_or_else(|_| CRATES.join(","));
    let shard = env::var("RAVELIN_MUTANTS_SHARD").ok();
    for name in chosen.split(',') {
        ensure!(CRATES.contains(&name), "no mutants are made of {name}, but of {}", CRATES.join(", "));
        let result = mutate(&tool, name, shard.as_deref()).and_then(|all| {
            ensure!(shard.is_some() || all.values().all(Option::is_some), "there are mutants that were not run");
            judge(name, &all, &known)
        });
        report.check(name, result);
    }
    Ok(())
}

/// Runs the mutants of a crate, or a shard of them. Returns what is known of all of them.
fn mutate(tool: &Path, name: &str, shard: Option<&str>) -> Result<BTreeMap<String, Option<Outcome>>> {
    let dir = workspace::target_dir()?.join("mutants");
    let results = results_dir(&dir.join(name), name)?;
    let output = match shard {
        Some(shard) => results.join(shard.replace('/', "-of-")),
        None => {
            let _ = fs::remove_dir_all(&results);
            results.join("all")
        }
    };
    let _ = fs::remove_dir_all(&output);
    fs::create_dir_all(&output).with_context(|| format!("cannot create {}", output.display()))?;

    let mut cargo = command(tool, name)?;
    cargo.arg("--output").arg(&output).arg("--no-times");
    if let Some(shard) = shard {
        cargo.args(["--sharding", "round-robin", "--shard", shard]);
    }
    // A mutant keeps one CPU busy. Each job has a copy of the sources, and builds what the crate depends on once.
    cargo.args(["--jobs", &process::cpus().min(MOST_JOBS).to_string()]);
    // Built more often than run; what it depends on stays optimized.
    cargo.arg(format!("--cargo-arg=--config=profile.quick.package.ravelin-{name}.opt-level=0"));
    let mut child = cargo.spawn().with_context(|| format!("cannot start {}", process::line(&cargo)))?;
    let watchdog = process::Watchdog::new(&child, LIMIT);
    let status = child.wait()?;
    watchdog.finish()?;
    // 2: some were missed; 3: some took too long.
    ensure!(matches!(status.code(), Some(0 | 2 | 3)), "{} failed: {status}", process::line(&cargo));

    let listed = process::output(command(tool, name)?.arg("--list"))?;
    let known = outcomes(&results)?;
    Ok(listed.lines().map(|mutant| (mutant.to_owned(), known.get(mutant).copied())).collect())
}

/// Returns the directory below `dir` for the outcomes of a crate as it is now, and removes those of what it was.
fn results_dir(dir: &Path, name: &str) -> Result<PathBuf> {
    let root = workspace::root();
    let mut files = workspace::files_below(&root.join("hyp").join(name))?;
    files.push(root.join(".cargo/mutants.toml"));
    let mut all = String::new();
    for file in files {
        let contents = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        all += &format!("{} {}\n", file.strip_prefix(&root)?.display(), workspace::digest(contents, 32));
    }
    let current = workspace::digest(all, 8);
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let entry = entry?;
        if entry.file_name() != *current {
            fs::remove_dir_all(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(dir.join(current))
}

fn command(tool: &Path, name: &str) -> Result<Command> {
    let mut paths = vec![tool.parent().context("the tool has no folder")?.to_path_buf()];
    paths.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    let mut cargo = process::cargo();
    cargo.env("PATH", env::join_paths(paths)?);
    cargo.args(["mutants", "--package", &format!("ravelin-{name}")]);
    Ok(cargo)
}

/// Reads all outcomes below a directory.
fn outcomes(dir: &Path) -> Result<Outcomes> {
    let mut all = Outcomes::new();
    for path in workspace::files_below(dir)? {
        let named = |list: &&(&str, Outcome)| path.file_name().is_some_and(|name| name == list.0);
        let Some(&(_, outcome)) = LISTS.iter().find(named) else { continue };
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for mutant in text.lines() {
            let old = all.entry(mutant.to_owned()).or_insert(outcome);
            *old = outcome.min(*old);
        }
    }
    Ok(all)
}

/// Prints the figures of a crate and compares them with what must be.
fn judge(name: &str, all: &BTreeMap<String, Option<Outcome>>, known: &Survivors) -> Result<()> {
    let count = |outcome| all.values().filter(|&&one| one == Some(outcome)).count();
    let (caught, late, missed) = (count(Outcome::Caught), count(Outcome::Timeout), count(Outcome::Missed));
    let (unviable, viable) = (count(Outcome::Unviable), caught + late + missed);
    ensure!(viable != 0, "no mutant was run");
    println!(
        "{name}: {} mutants, of which {} were run: {caught} caught, {missed} missed, {late} timeouts, {unviable} unviable; \
         {:.1} % of the viable caught",
        all.len(),
        viable + unviable,
        // Nobody has that many mutants.
        f64::from(u32::try_from(caught + late)?) * 100.0 / f64::from(u32::try_from(viable)?),
    );
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for one in &known.survivor {
        reasons.entry(&one.mutant).or_default().push(&one.reason);
    }
    let mut unexplained = Vec::new();
    for mutant in all.iter().filter(|(_, outcome)| **outcome == Some(Outcome::Missed)).map(|(mutant, _)| mutant) {
        match reasons.get_mut(without_position(mutant).as_str()).and_then(Vec::pop) {
            Some(reason) => println!("survives {mutant}: {reason}"),
            None => {
                println!("SURVIVES {mutant}");
                unexplained.push(mutant);
            }
        }
    }
    if !unexplained.is_empty() {
        bail!("{} survive without a reason in {SURVIVORS}, the first is {}", unexplained.len(), unexplained[0]);
    }
    // What was not run may survive yet.
    if all.values().all(Option::is_some) {
        let its = format!("hyp/{name}/");
        let idle = reasons.iter().find(|(mutant, left)| mutant.starts_with(&its) && !left.is_empty());
        ensure!(idle.is_none(), "{SURVIVORS}: a mutant that does not survive has a reason: {idle:?}");
    }
    ensure!((caught + late) * 100 >= CAUGHT_PERCENT * viable, "less than {CAUGHT_PERCENT} % of the viable are caught");
    Ok(())
}

/// Removes line and column from the name of a mutant, `FILE:LINE:COLUMN: what`.
fn without_position(mutant: &str) -> String {
    match mutant.split_once(": ") {
        Some((place, what)) => format!("{}: {what}", place.split(':').next().unwrap_or(place)),
        None => mutant.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MUTANT: &str = "hyp/x/src/a.rs:7:12: replace == with != in f";

    fn survivors(count: usize) -> Survivors {
        let one = || Survivor { mutant: without_position(MUTANT), reason: "equivalent".into() };
        Survivors { survivor: (0..count).map(|_| one()).collect() }
    }

    #[test]
    fn names_without_position() {
        assert_eq!(without_position(MUTANT), "hyp/x/src/a.rs: replace == with != in f");
    }

    #[test]
    fn outcomes_add_up() {
        let dir = env::temp_dir().join(format!("ravelin-mutants-{}", std::process::id()));
        for (shard, file, text) in
            [("0", "missed.txt", "a\nb\n"), ("1", "caught.txt", "b\nc\n"), ("1", "debug.log", "d\n")]
        {
            fs::create_dir_all(dir.join(shard)).unwrap();
            fs::write(dir.join(shard).join(file), text).unwrap();
        }
        let all = outcomes(&dir);
        fs::remove_dir_all(&dir).unwrap();
        let expected = [("a", Outcome::Missed), ("b", Outcome::Missed), ("c", Outcome::Caught)];
        assert_eq!(all.unwrap(), expected.map(|(mutant, outcome)| (mutant.to_owned(), outcome)).into());
    }

    #[test]
    fn each_survivor_needs_a_reason_of_its_own() {
        let mut all: BTreeMap<_, _> = (0..40).map(|number| (number.to_string(), Some(Outcome::Caught))).collect();
        all.insert("not run".into(), None);
        assert!(judge("x", &all, &survivors(0)).is_ok());
        all.insert(MUTANT.into(), Some(Outcome::Missed));
        assert!(judge("x", &all, &survivors(0)).is_err());
        assert!(judge("x", &all, &survivors(1)).is_ok());
        all.insert(MUTANT.replace(":7:", ":8:"), Some(Outcome::Missed));
        assert!(judge("x", &all, &survivors(1)).is_err());
        assert!(judge("x", &all, &survivors(2)).is_ok());
    }

    #[test]
    fn a_reason_is_for_what_survives() {
        let mut all: BTreeMap<_, _> = (0..40).map(|number| (number.to_string(), Some(Outcome::Caught))).collect();
        all.insert(MUTANT.into(), Some(Outcome::Caught));
        assert!(judge("x", &all, &survivors(1)).is_err());
        assert!(judge("y", &all, &survivors(1)).is_ok(), "it is another crate's");
        all.insert("not run".into(), None);
        assert!(judge("x", &all, &survivors(1)).is_ok());
    }

    #[test]
    fn outcomes_are_those_of_the_sources() {
        let dir = env::temp_dir().join(format!("ravelin-mutants-of-sources-{}", std::process::id()));
        fs::create_dir_all(dir.join("old")).unwrap();
        let results = results_dir(&dir, "vm").unwrap();
        assert!(!dir.join("old").exists());
        fs::create_dir_all(&results).unwrap();
        assert_eq!(results_dir(&dir, "vm").unwrap(), results);
        assert!(results.exists());
        assert_ne!(results_dir(&dir, "pgtable").unwrap(), results);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn too_few_caught_is_a_failure_even_with_reasons() {
        let mut all: BTreeMap<_, _> = (0..8).map(|number| (number.to_string(), Some(Outcome::Caught))).collect();
        all.insert(MUTANT.into(), Some(Outcome::Missed));
        assert!(judge("x", &all, &survivors(1)).is_err());
        assert!(judge("x", &BTreeMap::new(), &survivors(1)).is_err());
    }
}
