//! One machine: starts it, follows the tests, and goes on behind one that hangs or kills the machine.

use std::{
    io::{Read, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{
    machine::Machine,
    monitor::Monitor,
    output::{Event, Parser, Verdict},
    panics, payload,
    reached::Reached,
};

/// How long a test may take. The longest takes some seconds where the machine is not busy otherwise.
const TEST_TIMEOUT: Duration = Duration::from_secs(600);

/// How long it may take until the first test begins, builds included.
const START_TIMEOUT: Duration = Duration::from_secs(900);

/// What runs on the machine.
#[derive(Clone, Copy)]
pub(crate) struct Images<'a> {
    /// The payload, a flat binary.
    pub(crate) payload: &'a Path,
    /// Its guest, another one.
    pub(crate) guest: &'a Path,
}

/// Ends the machine when it goes out of scope.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A machine that runs.
pub(crate) struct Session {
    child: Guard,
    output: mpsc::Receiver<Vec<u8>>,
    socket: std::path::PathBuf,
}

/// What happened next.
enum Next {
    Events(Vec<Event>),
    /// Nothing, for too long.
    Silence,
    /// The machine ended with this status.
    End(i32),
}

impl Session {
    fn start(machine: &Machine, images: Images<'_>, arguments: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let socket = payload::output_dir()?.join(format!("monitor-{}-{number}", std::process::id()));
        let mut monitor = std::ffi::OsString::from("unix:");
        monitor.push(&socket);
        monitor.push(",server=on,wait=off");
        let mut child = command(machine, images, arguments)
            .args(["--qemu-arg", "-monitor", "--qemu-arg"])
            .arg(monitor)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start cargo xtask run")?;
        let mut output = child.stdout.take().context("the machine has no output")?;
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child: Guard(child), output: receiver, socket })
    }

    fn next(&mut self, parser: &mut Parser, timeout: Duration, console: &mut String) -> Result<Next> {
        match self.output.recv_timeout(timeout) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                console.push_str(&text);
                Ok(Next::Events(parser.push(&text)))
            }
            Err(RecvTimeoutError::Timeout) => Ok(Next::Silence),
            Err(RecvTimeoutError::Disconnected) => Ok(Next::End(self.child.0.wait()?.code().unwrap_or(-1))),
        }
    }

    /// Starts the debugging stub of the machine and returns its socket.
    pub(crate) fn debug(&self) -> Result<std::path::PathBuf> {
        let socket = self.socket.with_extension("gdb");
        Monitor::connect(&self.socket)?.debug(&socket)?;
        Ok(socket)
    }

    /// Waits for the end of the machine and returns its status; adds what it says to `console`.
    pub(crate) fn wait(&mut self, console: &mut String) -> Result<i32> {
        loop {
            match self.next(&mut Parser::default(), TEST_TIMEOUT, console)? {
                Next::Events(_) => {}
                Next::Silence => return Ok(-1),
                Next::End(status) => return Ok(status),
            }
        }
    }

    fn answer(&mut self, page: u64, seed: u64) -> Result<()> {
        let answer = if Monitor::connect(&self.socket)?.page_has_pattern(page, seed)? { b"y" } else { b"n" };
        let stdin = self.child.0.stdin.as_mut().context("the machine has no input")?;
        stdin.write_all(answer)?;
        Ok(stdin.flush()?)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // QEMU removes it at an orderly end.
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(self.socket.with_extension("gdb"));
    }
}

/// `cargo xtask run` is the one place that knows QEMU's command line.
fn command(machine: &Machine, images: Images<'_>, arguments: &str) -> Command {
    let mut image = images.payload.as_os_str().to_owned();
    if let Some(address) = machine.address {
        image.push(format!("@{address:#x}"));
    }
    let mut command = payload::cargo();
    command.args(["xtask", "run", "--cpu", machine.cpu, "--smp", &machine.smp.to_string()]);
    command.args(["--memory", &format!("{}M", machine.memory), "--append", arguments, "--host-image"]).arg(image);
    command.arg("--host-initrd").arg(images.guest);
    if machine.checked {
        command.arg("--checked");
    }
    if machine.dev {
        command.arg("--dev");
    }
    command
}

/// What repeats the round of a random test that has failed, as the payload has it.
fn again(console: &str) -> Option<&str> {
    let (_, arguments) = console.rsplit_once("random: again with '")?;
    Some(arguments.split_once('\'')?.0)
}

/// Runs the tests that `arguments` select on the machine and reports each; adds what they reach to `reached`.
pub(crate) fn run(
    machine: &Machine,
    images: Images<'_>,
    arguments: &str,
    reached: &mut Reached,
    report: &mut impl FnMut(&str, &Verdict),
) -> Result<()> {
    let payload = match machine.address {
        Some(_) => payload::without_header(images.payload)?,
        None => images.payload.to_owned(),
    };
    let images = Images { payload: &payload, ..images };
    let mut last: Option<String> = None;
    loop {
        let after = last.as_ref().map_or_else(String::new, |test| format!(" after={test}"));
        let checked = if machine.checked { " checked=yes" } else { "" };
        let mut session = Session::start(machine, images, &format!("{arguments} inspector=yes{checked}{after}"))?;
        let mut parser = Parser::default();
        let mut console = String::new();
        let mut current: Option<String> = None;
        let mut done = false;
        let why_early = loop {
            let timeout = if current.is_some() { TEST_TIMEOUT } else { START_TIMEOUT };
            match session.next(&mut parser, timeout, &mut console)? {
                Next::Events(events) => {
                    for event in events {
                        match event {
                            Event::Begun(test) => current = Some(test),
                            Event::Ended(verdict) => {
                                if let Some(test) = current.take() {
                                    report(&test, &verdict);
                                    if let (Verdict::Failed(_), Some(round)) = (&verdict, again(&console)) {
                                        eprintln!("{machine}: again: {:?}", command(machine, images, round));
                                    }
                                }
                            }
                            Event::Inspect { page, seed } => session.answer(page, seed)?,
                            Event::Done => done = true,
                        }
                    }
                }
                Next::Silence => break format!("nothing for {} s", timeout.as_secs()),
                Next::End(0 | 1) if done => {
                    reached.take(&console, machine.checked);
                    return Ok(());
                }
                Next::End(status) => break format!("the machine ended with status {status}"),
            }
        };
        reached.take(&console, machine.checked);
        let lines: Vec<_> = console.lines().rev().take(20).collect();
        eprintln!("{machine}: {why_early}; the last lines of its console:");
        lines.iter().rev().for_each(|line| eprintln!("    {line}"));
        match current {
            Some(test) => {
                report(&test, &Verdict::Failed(why_early));
                last = Some(test);
            }
            None => {
                report("the run", &Verdict::Failed(why_early));
                return Ok(());
            }
        }
    }
}

/// The payload ends with SYSTEM_RESET in place of SYSTEM_OFF: QEMU ends (it is told not to reboot), and the tests before it
/// were in order.
pub(crate) fn resets(machine: &Machine, images: Images<'_>) -> Result<Verdict> {
    let mut session = Session::start(machine, images, "test=psci.version end=reset")?;
    let (mut parser, mut console, mut done) = (Parser::default(), String::new(), false);
    loop {
        match session.next(&mut parser, START_TIMEOUT, &mut console)? {
            Next::Events(events) => done |= events.contains(&Event::Done),
            Next::Silence => return Ok(Verdict::Failed("it did not".into())),
            Next::End(0) if done => return Ok(Verdict::Passed),
            Next::End(status) => return Ok(Verdict::Failed(format!("the machine ended with status {status}"))),
        }
    }
}

/// An instruction of the hypervisor is broken while the payload makes calls: the report says where, and the machine ends.
pub(crate) fn fails(machine: &Machine, images: Images<'_>) -> Result<Verdict> {
    let mut session = Session::start(machine, images, "test=random.host_calls rounds=1000")?;
    let (mut parser, mut console) = (Parser::default(), String::new());
    loop {
        match session.next(&mut parser, START_TIMEOUT, &mut console)? {
            Next::Events(events) if events.iter().any(|event| matches!(event, Event::Begun(_))) => {
                return panics::judge(session, console);
            }
            Next::Events(_) => {}
            Next::Silence | Next::End(_) => return Ok(Verdict::Failed("no test began".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_round_is_repeated_alone() {
        let console = "random: seed 7\r\nrandom: again with 'test=random.everything seed=7 rounds=1'\r\nFAILED: x\r\n";
        assert_eq!(again(console), Some("test=random.everything seed=7 rounds=1"));
        assert_eq!(again("random: seed 7\r\n"), None);
    }
}
