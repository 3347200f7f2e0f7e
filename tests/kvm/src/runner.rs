//! Runs cases, each in a process of its own, and reports them.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setpgid};

use crate::cases;
use crate::check::{Outcome, Skipped};
use crate::kvm::Kind;

/// A test.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) body: Body,
    /// How long it may take on a slow emulated machine.
    pub(crate) limit: Duration,
    /// It takes minutes, and runs with `--full` only.
    pub(crate) long: bool,
}

/// What a case executes.
#[derive(Clone, Copy)]
pub(crate) enum Body {
    /// Once.
    Once(fn() -> Outcome),
    /// For each kind of VM.
    Kinds(&'static [Kind], fn(Kind) -> Outcome),
}

impl Case {
    /// A case that runs once.
    pub(crate) const fn once(name: &'static str, body: fn() -> Outcome) -> Self {
        Self { name, body: Body::Once(body), limit: Duration::from_secs(60), long: false }
    }

    /// A case that runs for each kind of VM.
    pub(crate) const fn kinds(name: &'static str, kinds: &'static [Kind], body: fn(Kind) -> Outcome) -> Self {
        Self { name, body: Body::Kinds(kinds, body), limit: Duration::from_secs(60), long: false }
    }

    /// The same with another limit.
    pub(crate) const fn seconds(self, seconds: u64) -> Self {
        Self { limit: Duration::from_secs(seconds), ..self }
    }

    /// The same as a case that takes minutes.
    pub(crate) const fn long(self) -> Self {
        Self { long: true, ..self }
    }
}

/// Names of cases: `group.function`, or `group.kind.function`.
fn all() -> Vec<(String, Case, Option<Kind>)> {
    let mut all = Vec::new();
    for (group, cases) in cases::GROUPS {
        for case in *cases {
            match case.body {
                Body::Once(_) => all.push((format!("{group}.{}", case.name), *case, None)),
                Body::Kinds(kinds, _) => {
                    let each = |kind: &Kind| (format!("{group}.{}.{}", kind.name(), case.name), *case, Some(*kind));
                    all.extend(kinds.iter().map(each));
                }
            }
        }
    }
    all
}

/// The program.
pub(crate) fn main() -> ExitCode {
    let (options, filters): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|text| text.starts_with("--"));
    if let Some(unknown) = options.iter().find(|option| !["--full", "--list"].contains(&option.as_str())) {
        eprintln!("kvm-tests: no option {unknown}");
        return ExitCode::FAILURE;
    }
    let has = |option: &str| options.iter().any(|text| text == option);
    let wanted = |name: &str| {
        let fits = |filter: &String| {
            name == filter || name.strip_prefix(filter.as_str()).is_some_and(|rest| rest.starts_with('.'))
        };
        filters.is_empty() || filters.iter().any(fits)
    };
    let mut cases = all();
    cases.retain(|(name, case, _)| wanted(name) && (!case.long || has("--full") || filters.contains(name)));
    if has("--list") {
        cases.iter().for_each(|(name, ..)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    if cases.is_empty() {
        eprintln!("kvm-tests: no such case");
        return ExitCode::FAILURE;
    }
    let mut good = true;
    let mut stuck = 0;
    for (name, case, kind) in &cases {
        let start = Instant::now();
        match run(name, case, *kind) {
            Verdict::Good => {}
            Verdict::Bad => good = false,
            Verdict::Stuck => {
                good = false;
                stuck += 1;
            }
        }
        if stuck == MOST_STUCK {
            line("@fail all other cases: processes that cannot be killed have taken the machine");
            break;
        }
        let elapsed = start.elapsed();
        if elapsed >= Duration::from_secs(3) {
            line(&format!("@note seconds of {name} = {}", elapsed.as_secs()));
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs a case in a new process, in a process group of its own, and reports how it ends.
fn run(name: &str, case: &Case, kind: Option<Kind>) -> Verdict {
    // SAFETY: This process has one thread.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => child,
        Ok(ForkResult::Child) => {
            // The parent does the same, so that whoever comes first has done it.
            let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
            let result = match (case.body, kind) {
                (Body::Once(body), _) => body(),
                (Body::Kinds(_, body), Some(kind)) => body(kind),
                (Body::Kinds(..), None) => Err(anyhow::anyhow!("no kind")),
            };
            std::process::exit(report(name, result))
        }
        Err(errno) => {
            line(&format!("@fail {name}: no process: {errno:?}"));
            return Verdict::Bad;
        }
    };
    let _ = setpgid(child, child);
    let verdict = match wait(child, case.limit) {
        Some(WaitStatus::Exited(_, code @ (GOOD | BAD))) => {
            if code == GOOD {
                Verdict::Good
            } else {
                Verdict::Bad
            }
        }
        Some(WaitStatus::Exited(_, code)) => {
            line(&format!("@fail {name}: exit status {code}"));
            Verdict::Bad
        }
        Some(status) => {
            line(&format!("@fail {name}: {status:?}"));
            Verdict::Bad
        }
        None => {
            let _ = killpg(child, Signal::SIGKILL);
            let end = wait(child, Duration::from_secs(20));
            let how = if end.is_some() { "and was killed" } else { "and cannot be killed" };
            line(&format!("@fail {name}: took more than {} s, {how}", case.limit.as_secs()));
            if end.is_some() { Verdict::Bad } else { Verdict::Stuck }
        }
    };
    // What the case has left behind.
    let _ = killpg(child, Signal::SIGKILL);
    verdict
}

/// How a case has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    Bad,
    /// Its process cannot be killed.
    Stuck,
}

/// So many cases may leave such a process behind.
const MOST_STUCK: usize = 3;

const GOOD: i32 = 0;
const BAD: i32 = 99;

/// Prints the result of a case; returns the status of its process.
fn report(name: &str, result: Outcome) -> i32 {
    match result {
        Ok(()) => line(&format!("@ok {name}")),
        Err(error) if error.is::<Skipped>() => line(&format!("@skip {name}: {error:#}")),
        Err(error) => {
            line(&format!("@fail {name}: {}", format!("{error:#}").replace('\n', " ")));
            return BAD;
        }
    }
    GOOD
}

/// Waits for the end of a process, not longer than `limit`.
fn wait(child: Pid, limit: Duration) -> Option<WaitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {}
            Ok(status) => return Some(status),
            Err(_) => return None,
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Prints a line in one call, so that lines of several processes stay whole.
pub(crate) fn line(text: &str) {
    // Nobody is left to be told.
    let _ = io::stdout().write_all(format!("{text}\n").as_bytes());
    let _ = io::stdout().flush();
}
