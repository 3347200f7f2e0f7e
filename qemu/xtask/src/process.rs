//! Running other programs, with errors that name the command, and none of them for ever.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::workspace;

/// What any program may take that has no limit of its own. A cold build on a small machine takes a third of it.
pub(crate) const LIMIT: Duration = Duration::from_secs(1800);

/// Runs a command to its end, its output going where ours goes.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    run_for(command, LIMIT)
}

/// The same with a limit of its own.
pub(crate) fn run_for(command: &mut Command, limit: Duration) -> Result<()> {
    let mut child = command.spawn().with_context(|| format!("cannot start {}", line(command)))?;
    let watchdog = Watchdog::new(&child, limit);
    let status = child.wait();
    watchdog.finish().with_context(|| line(command))?;
    let status = status?;
    if !status.success() {
        bail!("{} failed: {status}", line(command));
    }
    Ok(())
}

/// Runs a command and returns its standard output; what it wrote to standard error is part of the error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().with_context(|| format!("cannot start {}", line(command)))?;
    let watchdog = Watchdog::new(&child, LIMIT);
    let output = child.wait_with_output();
    watchdog.finish().with_context(|| line(command))?;
    let output = output?;
    if !output.status.success() {
        bail!("{} failed: {}\n{}", line(command), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Kills a program, and whatever that has started, if it is not finished in time.
///
/// It stays in our process group, so that an interrupt from the terminal reaches it.
pub(crate) struct Watchdog {
    finished: Sender<()>,
    thread: JoinHandle<bool>,
    limit: Duration,
}

impl Watchdog {
    /// Begins to watch.
    pub(crate) fn new(child: &Child, limit: Duration) -> Self {
        let (finished, receiver) = mpsc::channel();
        let child = child.id();
        let thread = thread::spawn(move || {
            let late = receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if late {
                kill(&with_descendants(child));
            }
            late
        });
        Self { finished, thread, limit }
    }

    /// Ends the watch, of a child that has ended. An error says that it was killed.
    pub(crate) fn finish(self) -> Result<()> {
        // Nobody listens any more if it was killed.
        let _ = self.finished.send(());
        if self.thread.join().unwrap_or(false) {
            bail!("not finished after {} s, and killed", self.limit.as_secs());
        }
        Ok(())
    }
}

/// Returns a process and all that descend from it.
fn with_descendants(process: u32) -> Vec<u32> {
    let mut children = BTreeMap::<u32, Vec<u32>>::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // The second field, the name, is in parentheses and may contain anything; the fourth is the parent.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(id);
        }
    }
    let mut all = vec![process];
    let mut next = 0;
    while let Some(parent) = all.get(next) {
        all.extend(children.remove(parent).unwrap_or_default());
        next += 1;
    }
    all
}

fn kill(processes: &[u32]) {
    // The shell has it built in; signals need a system call that the standard library does not offer.
    let ids = processes.iter().map(u32::to_string);
    let mut shell = Command::new("sh");
    shell.args(["-c", "kill -KILL \"$@\"", "sh"]).args(ids).stderr(Stdio::null());
    if let Err(error) = shell.status() {
        eprintln!("cannot kill {processes:?}: {error}");
    }
}

/// How many CPUs of this machine can be kept busy.
pub(crate) fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// The cargo that runs this program, in the root of the checkout.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(workspace::root());
    // Cargo sets these for this program; a build script of the inner cargo would take them for its own.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
    command
}

/// The command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let quote = |text: &std::ffi::OsStr| {
        let text = text.to_string_lossy();
        if !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_=+,./:@%".contains(c)) {
            text.into_owned()
        } else {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
    };
    std::iter::once(command.get_program()).chain(command.get_args()).map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_takes_too_long_is_killed_with_all_that_it_started() {
        let start = Instant::now();
        // The grandchild holds the pipe, too.
        let mut command = Command::new("sh");
        command.args(["-c", "sh -c 'sleep 100; true'; true"]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let watchdog = Watchdog::new(&child, Duration::from_millis(300));
        let mut output = String::new();
        child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        assert!(!child.wait().unwrap().success());
        assert_eq!(watchdog.finish().unwrap_err().to_string(), "not finished after 0 s, and killed");
        assert!(start.elapsed() < Duration::from_secs(50));
    }

    #[test]
    fn what_ends_in_time_is_left_alone() {
        assert_eq!(output(Command::new("echo").arg("done")).unwrap(), "done\n");
        run(&mut Command::new("true")).unwrap();
        let failed = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err().to_string();
        assert!(failed.contains("status: 3") && failed.ends_with("why"), "{failed}");
    }
}
