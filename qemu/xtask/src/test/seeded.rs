//! Bugs that are put into the hypervisor on purpose: the checking build has to stop at each of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::Report;
use crate::setup::{self, Needs};
use crate::{image, process, workspace};

/// What to put where, and what to expect. `tests/seeded/bugs.toml` says more.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bug {
    name: String,
    file: PathBuf,
    find: String,
    replace: String,
    tests: String,
    says: String,
    #[serde(default)]
    quick: bool,
}

#[derive(Debug, Deserialize)]
struct Bugs {
    bug: Vec<Bug>,
}

/// What the report of a machine that was stopped begins with.
const STOPPED: &str = "ravelin panic";

/// Exit status of `run` after that.
const FAILED: i32 = 101;

/// A copy of the checkout that bugs are put into.
struct Copy {
    root: PathBuf,
    xtask: PathBuf,
    payload: PathBuf,
    guest: PathBuf,
}

/// Puts each bug into a copy of the sources, builds it and runs what should stop.
pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    setup::ensure(&Needs { qemu: true, bare_metal: true, ..Needs::default() })?;
    let bugs = read()?;
    let copy = Copy::new()?;
    // Also of those that are not run now: the code goes on.
    report.check("each bug has its place", bugs.iter().try_for_each(|bug| copy.bad(bug).map(drop)));
    let selected = || bugs.iter().filter(|bug| full || bug.quick);
    // What is reported has to come from the bug.
    let all: Vec<_> = selected().map(|bug| bug.tests.as_str()).collect();
    let (status, output) = copy.payload(&all.join(","))?;
    let works = if status == 0 { Ok(()) } else { Err(anyhow::anyhow!("status {status}: {}", tail(&output))) };
    report.check("without a bug nothing stops", works);
    for bug in selected() {
        report.check(&bug.name, copy.stops(bug));
    }
    Ok(())
}

fn read() -> Result<Vec<Bug>> {
    let file = workspace::root().join("tests/seeded/bugs.toml");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    Ok(toml::from_str::<Bugs>(&text).with_context(|| file.display().to_string())?.bug)
}

impl Copy {
    /// Copies what is in the checkout, and this program, which then works on the copy.
    fn new() -> Result<Self> {
        let root = workspace::target_dir()?.join("seeded");
        let mut list = Command::new("git");
        list.current_dir(workspace::root()).args(["ls-files", "--cached", "--others", "--exclude-standard"]);
        let mut files = BTreeSet::new();
        for file in process::output(&mut list)?.lines().map(Path::new) {
            let from = workspace::root().join(file);
            let content = match fs::read(&from) {
                Ok(content) => content,
                // Deleted, and not yet committed.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(|| from.display().to_string()),
            };
            write_changed(&root.join(file), &content)?;
            files.insert(root.join(file));
        }
        remove_others(&root, &files, &root.join("target"))?;
        let xtask = root.join("target/debug/xtask");
        write_changed(&xtask, &fs::read(std::env::current_exe()?)?)?;
        fs::set_permissions(&xtask, fs::metadata(std::env::current_exe()?)?.permissions())?;
        Ok(Self { root, xtask, payload: image::payload()?, guest: image::guest()? })
    }

    /// Returns the file that a bug is in, its contents, and what they become.
    fn bad(&self, bug: &Bug) -> Result<(PathBuf, String, String)> {
        let file = self.root.join(&bug.file);
        let good = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let bad = seed(&good, bug).with_context(|| bug.name.clone())?;
        Ok((file, good, bad))
    }

    /// Demands that a bug is reported.
    fn stops(&self, bug: &Bug) -> Result<()> {
        let (file, good, bad) = self.bad(bug)?;
        fs::write(&file, bad)?;
        let result = self.payload(&bug.tests);
        fs::write(&file, good)?;
        let (status, output) = result?;
        let Some((_, said)) = output.split_once(STOPPED) else {
            bail!("the machine ended with {status}, and no report: {}", tail(&output));
        };
        ensure!(status == FAILED, "the machine ended with status {status}: {}", tail(&output));
        ensure!(said.contains(&bug.says), "the report does not say {:?}: {}", bug.says, tail(said));
        Ok(())
    }

    /// Builds the copy and runs tests of the payload on it. Returns the status of the machine and its console.
    fn payload(&self, tests: &str) -> Result<(i32, String)> {
        let mut run = Command::new(&self.xtask);
        run.env("CARGO_MANIFEST_DIR", self.root.join("qemu/xtask")).current_dir(&self.root);
        // Quicker to build, and the same code otherwise.
        run.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        run.args(["run", "--checked", "--cpu", "cortex-a76", "--smp", "2", "--memory", "1024M", "--timeout", "300"]);
        run.args(["--append", &format!("test={tests} checked=yes"), "--host-image"]).arg(&self.payload);
        run.arg("--host-initrd").arg(&self.guest);
        let output = run.output().context("cannot start a copy of this program")?;
        let status = output.status.code().unwrap_or(-1);
        let text = [output.stdout, output.stderr].concat();
        Ok((status, String::from_utf8_lossy(&text).into_owned()))
    }
}

/// Writes a file unless it is as it should be, so that cargo does not build it again.
fn write_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let dir = path.parent().context("a file lies in a directory")?;
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    fs::write(path, content).with_context(|| path.display().to_string())
}

/// Removes the files below a directory that are not among those to keep, other than in `skipped`, one of its folders: what has
/// been moved would be there twice.
fn remove_others(dir: &Path, keep: &BTreeSet<PathBuf>, skipped: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path == skipped {
            continue;
        }
        let files = if path.is_dir() { workspace::files_below(&path)? } else { vec![path] };
        for file in files.iter().filter(|file| !keep.contains(*file)) {
            fs::remove_file(file).with_context(|| file.display().to_string())?;
        }
    }
    Ok(())
}

/// Puts a bug into the text of its file.
fn seed(good: &str, bug: &Bug) -> Result<String> {
    let found = good.matches(&bug.find).count();
    ensure!(found == 1, "what the bug replaces stands {found} times in {}", bug.file.display());
    Ok(good.replace(&bug.find, &bug.replace))
}

/// The last lines of a console.
fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().filter(|line| !line.contains("model: reached")).collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bug_still_has_its_place() {
        let bugs = read().unwrap();
        assert!(bugs.iter().any(|bug| bug.quick));
        for bug in &bugs {
            let text = fs::read_to_string(workspace::root().join(&bug.file)).unwrap();
            let bad = seed(&text, bug).unwrap_or_else(|error| panic!("{}: {error}", bug.name));
            assert_ne!(text, bad, "{}", bug.name);
        }
    }

    #[test]
    fn the_tests_of_each_bug_exist() {
        let table = fs::read_to_string(workspace::root().join("tests/payload/src/table.rs")).unwrap();
        let exists = |test: &str| match test.strip_suffix('*') {
            Some(beginning) => table.contains(&format!("\n    {beginning}")),
            None => table.contains(&format!("\n    {test}(\"")),
        };
        for bug in read().unwrap() {
            assert!(bug.tests.split(',').all(exists), "{}: {}", bug.name, bug.tests);
        }
    }

    #[test]
    fn what_has_moved_is_removed() {
        let root = workspace::output_dir().unwrap().join(format!("seeded-test-{}", std::process::id()));
        let [moved, file, built] = ["src/x.rs", "src/x/mod.rs", "target/x"].map(|file| root.join(file));
        for file in [&moved, &file, &built] {
            write_changed(file, b"").unwrap();
        }
        remove_others(&root, &BTreeSet::from([file.clone()]), &root.join("target")).unwrap();
        let left = [&moved, &file, &built].map(|file| file.exists());
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(left, [false, true, true]);
    }
}
