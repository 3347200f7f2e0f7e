//! What cases do and find out as processes of the host.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::check::{Outcome, works};

/// A child of the case.
#[derive(Debug)]
pub(crate) struct Child(pub(crate) Pid);

impl Child {
    /// Runs `body` in a copy of this process, whose other threads do not exist there. Its error is printed.
    pub(crate) fn new(body: impl FnOnce() -> Outcome) -> Outcome<Self> {
        // SAFETY: The child uses no lock that another thread could have held: it calls the system, and allocates memory only
        // where the case has one thread, or musl's allocator is idle.
        match works("fork", unsafe { fork() })? {
            ForkResult::Parent { child } => Ok(Self(child)),
            ForkResult::Child => {
                let code = match body() {
                    Ok(()) => 0,
                    Err(error) => {
                        crate::runner::line(&format!("in a child: {error:#}"));
                        1
                    }
                };
                std::process::exit(code)
            }
        }
    }

    /// Sends a signal.
    pub(crate) fn kill(&self, signal: Signal) -> Outcome {
        works("kill", kill(self.0, signal))
    }

    /// Waits for its end.
    pub(crate) fn wait(self) -> Outcome<WaitStatus> {
        works("waitpid", waitpid(self.0, None))
    }

    /// Waits for its end, which must be a good one.
    pub(crate) fn succeed(self) -> Outcome {
        match self.wait()? {
            WaitStatus::Exited(_, 0) => Ok(()),
            status => bail!("a child: {status:?}"),
        }
    }

    /// Kills it.
    pub(crate) fn end(self) -> Outcome<WaitStatus> {
        self.kill(Signal::SIGKILL)?;
        self.wait()
    }
}

/// Handles SIGUSR1 without doing anything, so that it interrupts system calls.
pub(crate) fn take_sigusr1() -> Outcome {
    extern "C" fn nothing(_signal: i32) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: The handler does nothing.
    works("sigaction", unsafe { sigaction(Signal::SIGUSR1, &action) }).map(drop)
}

/// Waits until `done`, not longer than `limit`.
pub(crate) fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> Outcome<bool>) -> Outcome {
    let deadline = Instant::now() + limit;
    while !done()? {
        anyhow::ensure!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Milliseconds, for [`std::thread::sleep`].
pub(crate) fn sleep_ms(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// A value of `/proc/meminfo`, in KiB.
pub(crate) fn meminfo(name: &str) -> Outcome<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.with_context(|| format!("no {name} in /proc/meminfo"))?.parse()?)
}

/// Processor time in ticks of 10 ms that a thread of this process has used.
pub(crate) fn ticks(thread: Pid) -> Outcome<u64> {
    let text = fs::read_to_string(format!("/proc/self/task/{thread}/stat"))?;
    // The second field is the name, which may have spaces, in parentheses.
    let fields = text.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect::<Vec<_>>());
    let fields = fields.filter(|fields| fields.len() > 12).with_context(|| format!("stat: {text}"))?;
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// Number of CPUs that are online.
pub(crate) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get())
}

/// What the kernel has said so far, without the times.
pub(crate) fn kernel_log() -> Outcome<String> {
    let output = std::process::Command::new("dmesg").output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The hypervisor's statistics, which the module shows.
const STATISTICS: &str = "/sys/kernel/debug/ravelin/statistics";

/// Values of the statistics.
pub(crate) fn statistics(names: &[&str]) -> Outcome<Vec<u64>> {
    let text = fs::read_to_string(STATISTICS).map_err(|error| anyhow::anyhow!("{STATISTICS}: {error}"))?;
    names
        .iter()
        .map(|name| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            Ok(line.ok_or_else(|| anyhow::anyhow!("no {name} in the statistics"))?.trim().parse()?)
        })
        .collect()
}
