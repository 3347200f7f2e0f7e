//! Starts QEMU and watches over it.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::arm64_image;
use crate::console::Filter;
use crate::image::{self, Image};
use crate::machine::Machine;
use crate::placement::{self, Host, Request};
use crate::workspace;

/// How long a machine may take to end once the status of the command is known, or after a panic.
const GRACE: Duration = Duration::from_secs(30);

/// Pause that lets the rest of a panic report arrive before a halted machine is ended.
const PANIC_GRACE: Duration = Duration::from_secs(5);

/// Load offset of headerless binaries, as QEMU and old bootloaders use it.
const FLAT_OFFSET: u64 = 0x8_0000;

/// What runs on the machine.
pub(crate) struct Boot {
    /// The machine, with the user's changes applied.
    pub(crate) machine: Machine,
    /// The hypervisor and its command line; none starts the host at EL1.
    pub(crate) hypervisor: Option<(Image, String)>,
    /// Whether the host starts at EL2 in that case.
    pub(crate) el2: bool,
    /// The host's image.
    pub(crate) kernel: PathBuf,
    /// Where the user wants it.
    pub(crate) address: Option<u64>,
    /// The host's initrd.
    pub(crate) initrd: Option<PathBuf>,
    /// The host's command line.
    pub(crate) bootargs: String,
    /// Whether what runs may use semihosting, which includes the files of this machine.
    pub(crate) semihosting: bool,
    /// File for the architecture trace, which comes by semihosting.
    pub(crate) trace: Option<PathBuf>,
    /// Whether time goes by with instructions.
    pub(crate) icount: bool,
    /// With that, whether QEMU translates each instruction on its own.
    pub(crate) one_insn_per_tb: bool,
    /// Further QEMU arguments.
    pub(crate) arguments: Vec<String>,
}

/// A directory for the files of one run, removed with it.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// Makes the directory.
    pub(crate) fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = workspace::output_dir()?.join(format!("run-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self(dir))
    }

    /// Path of a file in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file into it.
    pub(crate) fn file(&self, name: &str, contents: &[u8]) -> Result<PathBuf> {
        let path = self.path(name);
        fs::write(&path, contents).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed lies in the target directory and harms nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The QEMU command without its serial port, and where the hypervisor is loaded.
pub(crate) struct Prepared {
    /// The command.
    pub(crate) command: Command,
    /// Address that the hypervisor is loaded at.
    pub(crate) load_address: u64,
}

/// Makes the QEMU command for a boot.
pub(crate) fn prepare(boot: &Boot, scratch: &Scratch) -> Result<Prepared> {
    let machine = &boot.machine;
    let mut qemu = program();
    let virtualization = if boot.hypervisor.is_some() || boot.el2 { ",virtualization=on" } else { "" };
    qemu.arg("-machine").arg(format!("{}{virtualization}", machine.machine));
    qemu.args(["-cpu", &machine.cpu, "-smp", &machine.smp.to_string()]);
    qemu.args(["-m", &format!("{}M", machine.memory_bytes()? >> 20)]);
    if boot.icount {
        let steps = if boot.one_insn_per_tb { ",one-insn-per-tb=on" } else { "" };
        qemu.args(["-accel", &format!("tcg,thread=single{steps}")]);
        qemu.args(["-icount", "shift=4,sleep=off", "-rtc", "clock=vm"]);
    } else {
        qemu.args(["-accel", "tcg,thread=multi"]);
    }
    qemu.args(["-display", "none", "-nodefaults", "-no-reboot"]);
    if let Some(file) = &boot.trace {
        qemu.args(["-semihosting-config", &format!("enable=on,target=native,arg={}", doubled(file)?)]);
    } else if boot.semihosting {
        qemu.args(["-semihosting-config", "enable=on,target=native"]);
    }

    let (header, size) = image::footprint(&boot.kernel)?;
    let address = match (boot.address, header) {
        (None, None) => Some(machine.ram_base + FLAT_OFFSET),
        (address, _) => address,
    };
    let mut request = Request {
        ram_base: machine.ram_base,
        ram_size: machine.memory_bytes()?,
        loaded: 4096,
        host: Host { size, text_offset: header.map_or(0, |header| header.text_offset), fixed: address },
        initrd: boot.initrd.as_deref().map(file_size).transpose()?,
    };
    let mut load_address = machine.ram_base;
    match &boot.hypervisor {
        Some((image, arguments)) => {
            request.loaded = image::footprint(&image.binary)?.1;
            let layout = placement::place(&request)?;
            load_address += layout.text_offset;
            let mut binary = fs::read(&image.binary)?;
            arm64_image::set_text_offset(&mut binary, layout.text_offset);
            qemu.arg("-kernel").arg(scratch.file("ravelin.bin", &binary)?);
            qemu.args(["-append", arguments]);
            let mut kernel = OsString::from(format!("guest-loader,addr={:#x},kernel=", layout.host));
            kernel.push(doubled(&boot.kernel)?);
            if !boot.bootargs.is_empty() {
                kernel.push(format!(",bootargs={}", double_commas(&boot.bootargs)));
            }
            qemu.arg("-device").arg(kernel);
            if let (Some(initrd), Some(address)) = (&boot.initrd, layout.initrd) {
                qemu.args(["-device", &format!("guest-loader,addr={address:#x},initrd={}", doubled(initrd)?)]);
            }
        }
        None => {
            match address {
                None => qemu.arg("-kernel").arg(&boot.kernel),
                Some(address) => {
                    let layout = placement::place(&request)?;
                    let trampoline = arm64_image::trampoline(address, layout.text_offset);
                    qemu.arg("-kernel").arg(scratch.file("trampoline.bin", &trampoline)?);
                    let file = doubled(&boot.kernel)?;
                    qemu.args(["-device", &format!("loader,file={file},addr={address:#x},force-raw=on")])
                }
            };
            if !boot.bootargs.is_empty() {
                qemu.args(["-append", &boot.bootargs]);
            }
            if let Some(initrd) = &boot.initrd {
                qemu.arg("-initrd").arg(initrd);
            }
        }
    }
    qemu.args(&machine.args).args(&boot.arguments);
    Ok(Prepared { command: qemu, load_address })
}

/// How a machine came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The command in the host ended with this status, and the machine was powered off.
    Status(i32),
    /// QEMU ended with this status, without a word from the host.
    Ended(i32),
    /// The hypervisor panicked, or could not boot.
    Failed,
    /// The time was up.
    TimedOut,
    /// The command ended with this status, but the machine did not power off.
    StillOn(i32),
}

/// Runs QEMU until it ends or `timeout` is over; what its console says goes through the filter into `sink`.
pub(crate) fn supervise(
    qemu: &mut Command,
    filter: &mut Filter<'_>,
    sink: &mut dyn Write,
    timeout: Option<Duration>,
) -> Result<Outcome> {
    let mut child = Guard(qemu.stdout(Stdio::piped()).spawn().context("cannot start qemu-system-aarch64")?);
    let mut output = child.0.stdout.take().context("QEMU has no output")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = output.read(&mut buffer) {
            if sender.send(buffer[..read].to_vec()).is_err() {
                break;
            }
        }
    });

    let end = timeout.map(|timeout| Instant::now() + timeout);
    let mut grace: Option<Instant> = None;
    let outcome = loop {
        let deadline = [end, grace].into_iter().flatten().min();
        let wait = deadline.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        match receiver.recv_timeout(wait) {
            Ok(bytes) => {
                sink.write_all(&filter.push(&bytes)).and_then(|()| sink.flush()).context("cannot show the console")?;
                if grace.is_none() && filter.failed() {
                    grace = Some(Instant::now() + PANIC_GRACE);
                } else if grace.is_none() && filter.status().is_some() {
                    grace = Some(Instant::now() + GRACE);
                }
            }
            Err(RecvTimeoutError::Timeout) if deadline.is_none_or(|at| Instant::now() < at) => {}
            Err(RecvTimeoutError::Timeout) => {
                break match filter.status() {
                    _ if filter.failed() => Outcome::Failed,
                    Some(status) => Outcome::StillOn(status),
                    None => Outcome::TimedOut,
                };
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = child.0.wait()?;
                break match filter.status() {
                    _ if filter.failed() => Outcome::Failed,
                    Some(status) => Outcome::Status(status),
                    None => Outcome::Ended(status.code().unwrap_or(1)),
                };
            }
        }
    };
    sink.write_all(&filter.finish()).and_then(|()| sink.flush()).context("cannot show the console")?;
    Ok(outcome)
}

/// Ends QEMU when its supervisor leaves early.
pub(crate) struct Guard(pub(crate) Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU, made to end with this program where util-linux can do that, so that none is left running.
fn program() -> Command {
    const QEMU: &str = "qemu-system-aarch64";
    if workspace::program("setpriv").is_none() {
        return Command::new(QEMU);
    }
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", QEMU]);
    command
}

fn file_size(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len())
}

fn doubled(path: &Path) -> Result<String> {
    Ok(double_commas(path.to_str().with_context(|| format!("{}: not UTF-8", path.display()))?))
}

/// QEMU's option parser takes a single comma as the end of a value.
fn double_commas(text: &str) -> String {
    text.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, timeout: Option<u64>) -> (Outcome, String) {
        let mut shown = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let mut filter = Filter::new(None, Some("MARK:"), true);
        let timeout = timeout.map(Duration::from_millis);
        let outcome = supervise(&mut command, &mut filter, &mut shown, timeout).unwrap();
        (outcome, String::from_utf8(shown).unwrap())
    }

    #[test]
    fn every_end_has_its_outcome() {
        assert_eq!(shell("echo hi; echo MARK:5", None), (Outcome::Status(5), "hi\n".into()));
        assert_eq!(shell("echo hi; exit 3", None), (Outcome::Ended(3), "hi\n".into()));
        assert_eq!(shell("echo ravelin panic; exit 101", None).0, Outcome::Failed);
        assert_eq!(shell("echo MARK:0; exec sleep 60", Some(300)).0, Outcome::StillOn(0));
        assert_eq!(shell("printf partial; exec sleep 60", Some(300)), (Outcome::TimedOut, "partial".into()));
    }

    #[test]
    fn commas_are_doubled() {
        assert_eq!(double_commas("console=ttyAMA0,115200"), "console=ttyAMA0,,115200");
    }
}
