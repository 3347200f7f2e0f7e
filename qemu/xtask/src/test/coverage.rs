//! The suite `coverage`: which lines of the logic crates the tests on this machine reach.
//!
//! Of the crates that change state, a line that no test reaches has to be on a list, with the reason.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;

use super::Report;
use crate::setup::rust;
use crate::{process, workspace};

/// Crates of logic, by folder, and whether they change state, so that no line may be left out without a reason.
const CRATES: [(&str, bool); 8] = [
    ("hyp/memory", false),
    ("hyp/pgtable", true),
    ("hyp/ownership", true),
    ("hyp/vgic", false),
    ("hyp/vm", true),
    ("hyp/hypercall", true),
    ("hyp/platform", false),
    ("host-interface/abi", false),
];

/// Files and folders with code of tests.
const TESTS: [&str; 5] = ["tests", "tests.rs", "fake.rs", "fake_cpu.rs", "recording.rs"];

/// Lines that no test reaches, each range with the reason.
const UNCOVERED: &str = "tests/coverage/uncovered.toml";

/// The file of `UNCOVERED`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    #[serde(default)]
    uncovered: Vec<Entry>,
}

/// Lines in a row, but for such as are not code: by their text, because their numbers change.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Entry {
    file: String,
    text: String,
    reason: String,
    /// Whether tests with threads reach them by chance.
    #[serde(default)]
    by_chance: bool,
}

/// How often each line with code has run, by the number of the line from 1.
type Lines = BTreeMap<usize, u64>;

/// A line of what cargo says of a build.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
}

pub(super) fn run(_full: bool, report: &mut Report) -> Result<()> {
    let tools = match rust::llvm_tools() {
        Ok(tools) => tools,
        Err(error) => {
            report.skip("all of it", &format!("no llvm-tools: {error:#}"));
            return Ok(());
        }
    };
    let text = fs::read_to_string(workspace::root().join(UNCOVERED)).context(UNCOVERED)?;
    let list: List = toml::from_str(&text).context(UNCOVERED)?;
    ensure!(list.uncovered.iter().all(|one| !one.reason.trim().is_empty()), "{UNCOVERED}: an entry without a reason");
    let mut allowed = list.uncovered;
    let files = measure(&tools)?;
    for (folder, strict) in CRATES {
        let result = judge(folder, &files, strict.then_some(&mut allowed));
        report.check(folder, result);
    }
    let stale: Vec<_> =
        allowed.iter().filter(|one| !one.by_chance).map(|one| format!("{}: {}", one.file, one.text.trim())).collect();
    let fresh = if stale.is_empty() { Ok(()) } else { Err(anyhow!("covered by now:\n{}", stale.join("\n"))) };
    report.check("the list names nothing else", fresh);
    Ok(())
}

/// Runs the tests and returns what they reach in each file, by its path in the checkout.
fn measure(tools: &Path) -> Result<BTreeMap<String, Lines>> {
    let dir = workspace::target_dir()?.join("coverage");
    let profiles = dir.join("profiles");
    let _ = fs::remove_dir_all(&profiles);
    fs::create_dir_all(&profiles).with_context(|| format!("cannot create {}", profiles.display()))?;

    let host = rust::host()?;
    let cargo = |last: &[&str]| {
        let mut cargo = process::cargo();
        // With a target named, build scripts and macros are built without.
        cargo
            .args(["test", "--tests", "--profile", "quick", "--target", &host])
            .env("RUSTFLAGS", "-C instrument-coverage");
        cargo.arg("--target-dir").arg(&dir).env("LLVM_PROFILE_FILE", profiles.join("%m.profraw"));
        for (folder, _) in CRATES {
            let name = folder.rsplit('/').next().unwrap_or(folder);
            cargo.args(["--package", &format!("ravelin-{name}")]);
        }
        cargo.args(last);
        cargo
    };
    let built = process::output(&mut cargo(&["--no-run", "--message-format", "json"]))?;
    let executables: Vec<_> =
        built.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok()?.executable).collect();
    ensure!(!executables.is_empty(), "cargo has built no tests");
    // A line that only random inputs reach is not covered for certain: models are left out, and the rest has a fixed seed.
    let mut test = cargo(&["--quiet", "--", "--skip", "model"]);
    process::output(test.env("PROPTEST_RNG_SEED", "1"))?;

    let merged = dir.join("merged.profdata");
    let mut merge = Command::new(tools.join("llvm-profdata"));
    merge.args(["merge", "--sparse", "--output"]).arg(&merged).args(workspace::files_below(&profiles)?);
    process::output(&mut merge)?;
    let mut export = Command::new(tools.join("llvm-cov"));
    export.args(["export", "--format", "lcov", "--instr-profile"]).arg(&merged);
    export.args(executables.iter().flat_map(|path| [Path::new("--object"), path]));
    let root = workspace::root();
    let root = root.canonicalize().unwrap_or(root);
    Ok(parse(&process::output(&mut export)?, &root))
}

/// Reads the lines of each file below `root` from LCOV's format.
fn parse(lcov: &str, root: &Path) -> BTreeMap<String, Lines> {
    let mut files = BTreeMap::<String, Lines>::new();
    let mut file = None;
    for line in lcov.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            file = Path::new(path).strip_prefix(root).ok().and_then(Path::to_str).map(str::to_owned);
        } else if let (Some(file), Some(data)) = (&file, line.strip_prefix("DA:"))
            && let Some((number, count)) = data.split_once(',')
            && let (Ok(number), Ok(count)) = (number.parse(), count.parse::<u64>())
        {
            *files.entry(file.clone()).or_default().entry(number).or_default() += count;
        }
    }
    files
}

/// Prints what is covered of a crate, and what is not. Takes the ranges that are not off `allowed`, where that is given.
fn judge(folder: &str, files: &BTreeMap<String, Lines>, mut allowed: Option<&mut Vec<Entry>>) -> Result<()> {
    let source = format!("{folder}/src/");
    let mut total = (0, 0);
    let mut unexplained = Vec::new();
    for (file, lines) in files.iter().filter(|(file, _)| file.starts_with(&source)) {
        if file.split('/').any(|part| TESTS.contains(&part)) {
            continue;
        }
        let text = fs::read_to_string(workspace::root().join(file)).with_context(|| format!("cannot read {file}"))?;
        let text: Vec<_> = text.lines().map(str::trim).collect();
        let end = tests_begin(&text);
        let lines = of_code(lines, &text[..end]);
        let covered = lines.values().filter(|&&count| count != 0).count();
        total = (total.0 + covered, total.1 + lines.len());
        println!("  {:>4} of {:>4} lines  {file}", covered, lines.len());
        for range in ranges(&lines) {
            let code: Vec<_> = range.iter().filter_map(|&number| text.get(number - 1).copied()).collect();
            let code = code.join("\n");
            println!("      {}: {}", range[0], code.replace('\n', "\n          "));
            let Some(allowed) = &mut allowed else { continue };
            match allowed.iter().position(|one| one.file == *file && same(&one.text, &code)) {
                Some(index) => println!("          not covered: {}", allowed.remove(index).reason),
                None => unexplained.push(format!("{file}:{}: {}", range[0], code.lines().next().unwrap_or(""))),
            }
        }
    }
    ensure!(total.1 != 0, "nothing was measured");
    println!("{folder}: {} of {} lines covered", total.0, total.1);
    if unexplained.is_empty() {
        return Ok(());
    }
    bail!("{} ranges are not covered and not in {UNCOVERED}:\n{}", unexplained.len(), unexplained.join("\n"));
}

/// The number of the last line before the tests at the end of a file.
fn tests_begin(lines: &[&str]) -> usize {
    let tests = |pair: &[&str]| pair[0] == "#[cfg(test)]" && pair[1].contains("mod ") && pair[1].ends_with('{');
    lines.windows(2).position(tests).unwrap_or(lines.len())
}

/// The lines of `lines` that are in `text` and more than brackets.
fn of_code(lines: &Lines, text: &[&str]) -> Lines {
    let is_code = |number: usize| {
        let line = number.checked_sub(1).and_then(|index| text.get(index));
        line.is_some_and(|line| line.contains(|c| !"{}();,".contains(c)))
    };
    lines.iter().map(|(&number, &count)| (number, count)).filter(|&(number, _)| is_code(number)).collect()
}

/// The lines that have not run, those in a row together.
fn ranges(lines: &Lines) -> Vec<Vec<usize>> {
    let mut ranges: Vec<Vec<usize>> = Vec::new();
    let mut open = false;
    for (&number, &count) in lines {
        match ranges.last_mut() {
            Some(range) if count == 0 && open => range.push(number),
            _ if count == 0 => ranges.push(vec![number]),
            _ => {}
        }
        open = count == 0;
    }
    ranges
}

/// Whether a list's text is that of some lines, however they are indented.
fn same(listed: &str, code: &str) -> bool {
    listed.trim().lines().map(str::trim).eq(code.lines())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LCOV: &str = "SF:/r/hyp/x/src/lib.rs\nFN:1,f\nDA:1,1\nDA:2,0\nDA:4,0\nDA:5,2\nend_of_record\n\
                        SF:/elsewhere/lib.rs\nDA:1,0\nend_of_record\nSF:/r/hyp/x/src/lib.rs\nDA:5,0\nDA:7,0\n";

    #[test]
    fn lines_that_have_not_run() {
        let files = parse(LCOV, Path::new("/r"));
        assert_eq!(files.len(), 1);
        assert_eq!(ranges(&files["hyp/x/src/lib.rs"]), [vec![2, 4], vec![7]]);
    }

    #[test]
    fn tests_at_the_end_do_not_count() {
        assert_eq!(tests_begin(&["mod a;", "#[cfg(test)]", "mod tests;", "#[cfg(test)]", "mod tests {", "}"]), 3);
        assert_eq!(tests_begin(&["fn f() {", "}"]), 2);
    }

    #[test]
    fn brackets_are_not_code() {
        let lines = Lines::from([(1, 0), (2, 0), (3, 1), (4, 0), (5, 0)]);
        assert_eq!(of_code(&lines, &["f();", "});", "}", "} else {"]), Lines::from([(1, 0), (4, 0)]));
    }

    #[test]
    fn entries_are_compared_without_indentation() {
        assert!(same("\n    a\n  b\n", "a\nb"));
        assert!(!same("a", "a\nb"));
    }
}
