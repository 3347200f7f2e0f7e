//! The host's side of a console: threads that move bytes, so that nobody else waits for a terminal.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::args::ConsoleKind;
use crate::report::Report;
use crate::terminal;

/// Bytes that are kept in either direction.
const CAPACITY: usize = 64 << 10;

/// A console: what comes in, and what goes out. It outlives a guest that reboots.
#[derive(Clone, Debug)]
pub struct Console {
    /// From the user.
    pub input: Arc<Input>,
    /// To the user.
    pub output: Output,
}

impl Console {
    /// Opens what `kind` says. `name` is for the user, who has to be told where a new pseudoterminal is.
    pub fn open(kind: &ConsoleKind, name: &str, report: &Report) -> Result<Self> {
        let input = Arc::new(Input::new()?);
        let output = match kind {
            ConsoleKind::Stdio => {
                terminal::pass_keys()?;
                input.pump(duplicate(io::stdin())?)?;
                Output::pump(duplicate(io::stdout())?, Full::Wait)?
            }
            ConsoleKind::Pty => {
                let pty = nix::pty::openpty(None, None).context("no pseudoterminal")?;
                raw(&pty.slave)?;
                let path = nix::unistd::ttyname(&pty.slave)?;
                let text = format!("{name} is {}", path.display());
                report.event("pty", &text, json!({ "console": name, "path": path }));
                // Reading fails while nobody has the other end open; so it is kept open.
                input.pump(PtyEnd { file: File::from(pty.master.try_clone()?), _other: pty.slave })?;
                Output::pump(File::from(pty.master), Full::Drop)?
            }
            ConsoleKind::Log(path) => {
                let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
                Output::pump(file, Full::Wait)?
            }
        };
        Ok(Self { input, output })
    }
}

fn duplicate(stream: impl std::os::fd::AsFd) -> Result<File> {
    Ok(File::from(stream.as_fd().try_clone_to_owned()?))
}

fn raw(terminal: &OwnedFd) -> Result<()> {
    use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
    let mut settings = tcgetattr(terminal.as_fd())?;
    cfmakeraw(&mut settings);
    Ok(tcsetattr(terminal.as_fd(), SetArg::TCSANOW, &settings)?)
}

struct PtyEnd {
    file: File,
    _other: OwnedFd,
}

impl Read for PtyEnd {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

/// Locks, also after another thread's panic: the bytes are in order at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What the user types.
#[derive(Debug)]
pub struct Input {
    buffer: Mutex<VecDeque<u8>>,
    space: Condvar,
    /// Signalled when there is something.
    pub ready: EventFd,
}

impl Input {
    /// Without a source.
    pub fn new() -> Result<Self> {
        Ok(Self { buffer: Mutex::default(), space: Condvar::new(), ready: EventFd::new(EFD_NONBLOCK)? })
    }

    fn pump(self: &Arc<Self>, mut from: impl Read + Send + 'static) -> Result<()> {
        let input = Arc::clone(self);
        let run = move || {
            let mut bytes = [0; 4096];
            loop {
                match from.read(&mut bytes) {
                    Ok(0) => return,
                    Ok(length) => input.push(&bytes[..length]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                    Err(_) => return,
                }
            }
        };
        thread::Builder::new().name("console-in".into()).spawn(run)?;
        Ok(())
    }

    /// Adds what was typed, as soon as there is space.
    pub fn push(&self, bytes: &[u8]) {
        let full = |buffer: &mut VecDeque<u8>| buffer.len() + bytes.len() > CAPACITY;
        let buffer = self.space.wait_while(lock(&self.buffer), full);
        buffer.unwrap_or_else(std::sync::PoisonError::into_inner).extend(bytes);
        self.wake();
    }

    /// Takes up to `most` bytes.
    pub fn take(&self, most: usize) -> Vec<u8> {
        // An empty eventfd has nothing to forget.
        let _ = self.ready.read();
        let mut buffer = lock(&self.buffer);
        let length = most.min(buffer.len());
        let taken = buffer.drain(..length).collect();
        if !buffer.is_empty() {
            self.wake();
        }
        drop(buffer);
        self.space.notify_one();
        taken
    }

    fn wake(&self) {
        // It cannot fail but by overflow, and then it is signalled.
        let _ = self.ready.write(1);
    }
}

/// What to do when the user does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Full {
    /// The guest waits.
    Wait,
    /// Bytes are lost.
    Drop,
}

/// What the guest prints.
#[derive(Clone, Debug)]
pub struct Output(Arc<OutputState>);

#[derive(Debug)]
struct OutputState {
    pending: Mutex<Pending>,
    changed: Condvar,
}

#[derive(Debug)]
struct Pending {
    bytes: Vec<u8>,
    busy: bool,
    full: Full,
    hurry: bool,
}

impl Output {
    fn pump(mut to: impl Write + Send + 'static, full: Full) -> Result<Self> {
        let pending = Pending { bytes: Vec::new(), busy: false, full, hurry: false };
        let state = Arc::new(OutputState { pending: Mutex::new(pending), changed: Condvar::new() });
        let output = Self(Arc::clone(&state));
        let run = move || {
            loop {
                let idle = |pending: &mut Pending| {
                    pending.busy = false;
                    pending.bytes.is_empty()
                };
                state.changed.notify_all();
                let pending = state.changed.wait_while(lock(&state.pending), idle);
                let mut pending = pending.unwrap_or_else(std::sync::PoisonError::into_inner);
                pending.busy = true;
                let bytes = std::mem::take(&mut pending.bytes);
                drop(pending);
                state.changed.notify_all();
                // A console that is gone does not end the guest.
                let _ = to.write_all(&bytes).and_then(|()| to.flush());
            }
        };
        thread::Builder::new().name("console-out".into()).spawn(run)?;
        Ok(output)
    }

    /// Whether nobody waits for the user, because the guest ends.
    pub fn hurry(&self, hurry: bool) {
        lock(&self.0.pending).hurry = hurry;
        self.0.changed.notify_all();
    }

    /// Waits until all is out, but not for ever.
    pub fn drain(&self) {
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut pending = lock(&self.0.pending);
        while !pending.bytes.is_empty() || pending.busy {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
            let Ok((next, _)) = self.0.changed.wait_timeout(pending, left) else { return };
            pending = next;
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let full =
            |pending: &mut Pending| pending.full == Full::Wait && !pending.hurry && pending.bytes.len() >= CAPACITY;
        let pending = self.0.changed.wait_while(lock(&self.0.pending), full);
        let mut pending = pending.unwrap_or_else(std::sync::PoisonError::into_inner);
        if pending.bytes.len() < CAPACITY {
            pending.bytes.extend_from_slice(bytes);
        }
        drop(pending);
        self.0.changed.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_is_handed_on_in_order() {
        let input = Input::new().unwrap();
        input.push(b"hello");
        assert_eq!(input.ready.read().unwrap(), 1);
        assert_eq!(input.take(2), b"he");
        assert_eq!(input.ready.read().unwrap(), 1, "there is more");
        assert_eq!(input.take(10), b"llo");
        assert!(input.ready.read().is_err());
    }

    #[test]
    fn output_is_complete_after_a_drain() {
        let (mut from, to) = io::pipe().unwrap();
        let mut output = Output::pump(to, Full::Wait).unwrap();
        output.write_all(b"hello ").unwrap();
        output.write_all(b"world").unwrap();
        output.drain();
        let mut bytes = [0; 11];
        from.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello world");
    }

    #[test]
    fn nobody_waits_for_ever() {
        let (_from, to) = io::pipe().unwrap();
        let mut output = Output::pump(to, Full::Drop).unwrap();
        // More than the pipe and the buffer have room for.
        for _ in 0..300 {
            output.write_all(&[b'x'; 1024]).unwrap();
        }
    }
}
