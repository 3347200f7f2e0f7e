//! `cargo xtask run`: boots a host on the hypervisor, or without it.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::console::{Filter, Symbolize};
use crate::guests;
use crate::image::{self, Variant};
use crate::initramfs::{self, ExtraFile, Task, Terminal};
use crate::machine::Machine;
use crate::module::Kernel;
use crate::qemu::{self, Boot, Outcome, Scratch};
use crate::setup::packages::Manifest;
use crate::setup::{self, BUSYBOX, Needs};
use crate::symbols::Symbols;

/// Exit status after a timeout, as timeout(1) has it.
const TIMED_OUT: u8 = 124;

/// Exit status when the machine did not do what it should.
const MACHINE_FAILED: u8 = 125;

/// Exit status when the hypervisor panicked or could not boot; it gives the same to QEMU by semihosting.
const HYPERVISOR_FAILED: u8 = 101;

/// Options of `run` and `gdb`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Options {
    /// Machine, a file in qemu/machines without its suffix
    #[arg(long, value_name = "NAME")]
    pub(crate) machine: Option<String>,
    /// CPU model, in place of the machine's
    #[arg(long, value_name = "MODEL")]
    pub(crate) cpu: Option<String>,
    /// Number of CPUs
    #[arg(long, value_name = "N")]
    pub(crate) smp: Option<u32>,
    /// Size of RAM, such as 512M or 8G
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<String>,
    /// Kernel of Debian to boot as the host
    #[arg(long, value_name = "NAME", default_value = "linux", conflicts_with_all = ["host_kernel", "host_image"])]
    pub(crate) kernel: Kernel,
    /// Linux Image to boot as the host, in place of Debian's; it gets no kernel module
    #[arg(long, value_name = "FILE")]
    pub(crate) host_kernel: Option<PathBuf>,
    /// initrd of the host, in place of a busybox with a shell
    #[arg(long, value_name = "FILE")]
    pub(crate) host_initrd: Option<PathBuf>,
    /// Appended to the host's command line
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    pub(crate) append: Option<String>,
    /// Run CMD in the host and exit with its status
    #[arg(long, value_name = "CMD", conflicts_with_all = ["host_initrd", "host_image"], allow_hyphen_values = true)]
    pub(crate) exec: Option<String>,
    /// Boot an arm64 Image, or a flat binary entered at its first byte, as the host; it is placed at ADDR
    #[arg(long, value_name = "FILE[@ADDR]", conflicts_with = "host_kernel")]
    pub(crate) host_image: Option<String>,
    /// Further argument for QEMU; may be repeated
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) qemu_arg: Vec<String>,
    /// Start the same host directly at EL1
    #[arg(long)]
    pub(crate) no_hypervisor: bool,
    /// End after this many seconds, with status 124
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
    /// Use the build that checks its tables after each hypercall
    #[arg(long)]
    pub(crate) checked: bool,
    /// Build the hypervisor to debug it: debug assertions, and less optimised
    #[arg(long)]
    pub(crate) dev: bool,
    /// Log level of the hypervisor
    #[arg(long, value_name = "LEVEL")]
    pub(crate) log: Option<LogLevel>,
    /// Let what runs use semihosting, which reaches this machine's files
    #[arg(long)]
    pub(crate) semihosting: bool,
    /// Let time go by with instructions, one CPU after the other: the same run repeats
    #[arg(long)]
    pub(crate) icount: bool,
    /// Leave the kernel module, the VMM and the guests out of the host's initramfs
    #[arg(long)]
    pub(crate) bare: bool,
    /// With `icount`, whether QEMU translates each instruction on its own.
    #[arg(skip)]
    pub(crate) one_insn_per_tb: bool,
    /// Whether a host without the hypervisor starts at EL2.
    #[arg(skip)]
    pub(crate) el2: bool,
    /// Whether the host gets the kernel module, the VMM and guests.
    #[arg(skip)]
    pub(crate) guests: bool,
    /// File for the architecture trace.
    #[arg(skip)]
    pub(crate) trace: Option<PathBuf>,
    /// Files that tests add to the initramfs.
    #[arg(skip)]
    pub(crate) extra_files: Vec<ExtraFile>,
}

/// Levels of the `log` crate.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// A boot with everything that it needs built and downloaded.
pub(crate) struct Ready {
    /// What QEMU is to start.
    pub(crate) boot: Boot,
    /// Files of this run.
    pub(crate) scratch: Scratch,
    /// Text that precedes the status of `--exec` on the console.
    marker: Option<String>,
}

impl Ready {
    /// Builds, downloads and writes what the options ask for.
    pub(crate) fn new(options: &Options) -> Result<Self> {
        let mut machine = Machine::load(options.machine.as_deref().unwrap_or("virt"))?;
        machine.cpu = options.cpu.clone().unwrap_or(machine.cpu);
        machine.memory = options.memory.clone().unwrap_or(machine.memory);
        machine.smp = options.smp.unwrap_or(machine.smp);
        ensure!(machine.smp > 0, "--smp must be at least 1");
        machine.memory_bytes()?;

        let linux = options.host_image.is_none();
        let mut packages = Vec::new();
        if linux && options.host_kernel.is_none() {
            packages.push(options.kernel.name());
        }
        if linux && options.host_initrd.is_none() {
            packages.push(BUSYBOX);
        }
        setup::ensure(&Needs {
            qemu: true,
            bare_metal: !options.no_hypervisor,
            packages: &packages,
            ..Needs::default()
        })?;

        let scratch = Scratch::new()?;
        let mut marker = None;
        let (kernel, address) = match (&options.host_image, &options.host_kernel) {
            (Some(image), _) => parse_host_image(image)?,
            (None, Some(kernel)) => (kernel.clone(), None),
            (None, None) => (Manifest::load()?.ensure(options.kernel.name())?, None),
        };
        let initrd = match &options.host_initrd {
            Some(initrd) => Some(initrd.clone()),
            None if linux => {
                let busybox = fs::read(Manifest::load()?.ensure(BUSYBOX)?)?;
                // Unpredictable to programs of the host, which write to the same console.
                let task = match &options.exec {
                    Some(script) => {
                        let marker = marker.insert(format!("RAVELIN-EXIT-{:016x}:", random()));
                        Task::Command { script, marker }
                    }
                    None => Task::Shell,
                };
                let mut files = if options.guests { guests::host_files(options.kernel)? } else { Vec::new() };
                files.extend_from_slice(&options.extra_files);
                let archive = initramfs::build(&busybox, &task, terminal().as_ref(), &files)?;
                Some(scratch.file("initramfs.cpio", &archive)?)
            }
            None => None,
        };
        let mut bootargs = if linux { format!("console={} panic=-1", machine.console) } else { String::new() };
        if let Some(append) = &options.append {
            bootargs = format!("{bootargs} {append}").trim().to_owned();
        }
        let hypervisor = if options.no_hypervisor {
            None
        } else {
            let trace = options.trace.is_some();
            let image = image::build(Variant { checked: options.checked, trace, dev: options.dev })?;
            Some((image, hypervisor_arguments(options)))
        };
        let Options { semihosting, icount, one_insn_per_tb, el2, .. } = *options;
        let (trace, arguments) = (options.trace.clone(), options.qemu_arg.clone());
        let boot = Boot {
            machine,
            hypervisor,
            el2,
            kernel,
            address,
            initrd,
            bootargs,
            semihosting,
            trace,
            icount,
            one_insn_per_tb,
            arguments,
        };
        Ok(Self { boot, scratch, marker })
    }

    /// Boots without a terminal: the console goes to `sink`, with LF line ends.
    pub(crate) fn run(&self, sink: &mut dyn Write, timeout: Option<Duration>) -> Result<Outcome> {
        let mut qemu = qemu::prepare(&self.boot, &self.scratch)?.command;
        qemu.args(["-serial", "stdio"]).stdin(Stdio::null());
        self.supervise(&mut qemu, sink, timeout, true)
    }

    fn supervise(
        &self,
        qemu: &mut Command,
        sink: &mut dyn Write,
        timeout: Option<Duration>,
        strip_returns: bool,
    ) -> Result<Outcome> {
        // Read only when there is a backtrace, and once.
        let symbols = std::cell::OnceCell::new();
        let elf = self.boot.hypervisor.as_ref().map(|(image, _)| image.elf.clone());
        let symbolize = |offset: u64| {
            let symbols: &Option<Symbols> = symbols.get_or_init(|| Symbols::load(elf.as_deref()?).ok());
            symbols.as_ref().map_or_else(Vec::new, |symbols| symbols.describe(offset))
        };
        let symbolize: Option<&Symbolize<'_>> = if elf.is_some() { Some(&symbolize) } else { None };
        let mut filter = Filter::new(symbolize, self.marker.as_deref(), strip_returns);
        qemu::supervise(qemu, &mut filter, sink, timeout)
    }
}

/// `cargo xtask run`.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let own_host = options.host_kernel.is_some() || options.host_initrd.is_some() || options.host_image.is_some();
    let options = &Options { guests: !options.bare && !own_host, ..options.clone() };
    let ready = Ready::new(options)?;
    let timeout = options.timeout.map(Duration::from_secs);
    let mut stdout = std::io::stdout().lock();
    let outcome = if options.exec.is_some() {
        ready.run(&mut stdout, timeout)?
    } else {
        let mut qemu = qemu::prepare(&ready.boot, &ready.scratch)?.command;
        qemu.args(["-serial", "mon:stdio"]);
        let is_terminal = std::io::stdin().is_terminal();
        if is_terminal {
            eprintln!("Ctrl-A X ends QEMU; Ctrl-A H shows its other keys.");
        }
        let _restored = is_terminal.then(TerminalState::save);
        ready.supervise(&mut qemu, &mut stdout, timeout, false)?
    };
    drop(stdout);
    let (code, message) = verdict(outcome, options.exec.is_some());
    if let Some(message) = message {
        eprintln!("{message}");
    }
    Ok(ExitCode::from(code))
}

/// Exit status of this program for an outcome, and what there is to say about it.
fn verdict(outcome: Outcome, expects_status: bool) -> (u8, Option<&'static str>) {
    let byte = |status: i32| u8::try_from(status).unwrap_or(u8::MAX);
    match outcome {
        Outcome::Status(status) => (byte(status), None),
        Outcome::Ended(0) if expects_status => {
            (MACHINE_FAILED, Some("error: the machine ended before the command did"))
        }
        Outcome::Ended(status) => (byte(status), None),
        Outcome::Failed => (HYPERVISOR_FAILED, Some("error: the hypervisor failed")),
        Outcome::TimedOut => (TIMED_OUT, Some("error: the time is up")),
        Outcome::StillOn(_) => (MACHINE_FAILED, Some("error: the command ended, but the machine did not power off")),
    }
}

/// The hypervisor's command line.
fn hypervisor_arguments(options: &Options) -> String {
    let mut arguments = Vec::new();
    if let Some(level) = options.log.and_then(|level| level.to_possible_value()) {
        arguments.push(format!("loglevel={}", level.get_name()));
    }
    if options.semihosting {
        arguments.push("exit=semihosting".into());
    }
    if options.trace.is_some() {
        arguments.push("trace=semihosting".into());
    }
    arguments.join(" ")
}

/// `FILE` or `FILE@ADDR`.
fn parse_host_image(text: &str) -> Result<(PathBuf, Option<u64>)> {
    // A file may have the sign in its name.
    if let Some((file, address)) = text.rsplit_once('@')
        && !PathBuf::from(text).exists()
    {
        let digits = address.strip_prefix("0x").or_else(|| address.strip_prefix("0X"));
        let parsed = digits.map_or_else(|| address.parse(), |digits| u64::from_str_radix(digits, 16));
        let address = parsed.with_context(|| format!("{address}: not an address"))?;
        if !address.is_multiple_of(4) {
            bail!("{address:#x}: instructions are at multiples of 4");
        }
        return Ok((file.into(), Some(address)));
    }
    Ok((text.into(), None))
}

/// Enough randomness to tell one run's marker from another's.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

/// The user's terminal, if standard input is one that has a size.
fn terminal() -> Option<Terminal> {
    if !std::io::stdin().is_terminal() {
        return None;
    }
    let size = Command::new("stty").arg("size").stdin(Stdio::inherit()).output().ok()?;
    let size = String::from_utf8(size.stdout).ok()?;
    let (rows, columns) = size.trim().split_once(' ')?;
    let mut kind = std::env::var("TERM").unwrap_or_default();
    kind.retain(|c| c.is_ascii_alphanumeric() || c == '-');
    Some(Terminal { rows: rows.parse().ok()?, columns: columns.parse().ok()?, kind })
}

/// Settings of the terminal, put back when QEMU could not do so itself.
struct TerminalState(Option<String>);

impl TerminalState {
    fn save() -> Self {
        let saved = Command::new("stty").arg("-g").stdin(Stdio::inherit()).output().ok();
        Self(saved.and_then(|saved| String::from_utf8(saved.stdout).ok()).map(|saved| saved.trim().to_owned()))
    }
}

impl Drop for TerminalState {
    fn drop(&mut self) {
        if let Some(saved) = &self.0 {
            // Without stty the settings were not saved either.
            let _ = Command::new("stty").arg(saved).status();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_images_with_and_without_address() {
        assert_eq!(parse_host_image("a.bin").unwrap(), ("a.bin".into(), None));
        assert_eq!(parse_host_image("a@b/c.bin@0x40080000").unwrap(), ("a@b/c.bin".into(), Some(0x4008_0000)));
        assert_eq!(parse_host_image("a.bin@1024").unwrap(), ("a.bin".into(), Some(1024)));
        for bad in ["a.bin@", "a.bin@0x", "a.bin@top", "a.bin@0x40080002", "a.bin@0x1ffffffffffffffff"] {
            assert!(parse_host_image(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn statuses_reach_the_shell() {
        assert_eq!(verdict(Outcome::Status(0), true).0, 0);
        assert_eq!(verdict(Outcome::Status(1), true).0, 1);
        assert_eq!(verdict(Outcome::Ended(0), false).0, 0);
        for bad in [Outcome::Ended(0), Outcome::Failed, Outcome::TimedOut, Outcome::StillOn(0), Outcome::Ended(-1)] {
            assert_ne!(verdict(bad, true).0, 0, "{bad:?}");
        }
    }

    #[test]
    fn arguments_of_the_hypervisor() {
        assert_eq!(hypervisor_arguments(&Options::default()), "");
        let options = Options { log: Some(LogLevel::Debug), semihosting: true, ..Options::default() };
        assert_eq!(hypervisor_arguments(&options), "loglevel=debug exit=semihosting");
        let options = Options { trace: Some("file".into()), ..Options::default() };
        assert_eq!(hypervisor_arguments(&options), "trace=semihosting");
    }
}
