//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use lexopt::{Arg, Parser, ValueExt as _};

use crate::layout::{MAX_CPUS, PAGE};

/// What `--help` prints.
pub const HELP: &str = "\
Runs a Linux guest through /dev/kvm.

usage: ravelin-vmm --kernel FILE [OPTION...]

  --kernel FILE           arm64 Image, not compressed
  --initrd FILE           initial ramdisk
  --append STR            the guest's command line; a protected guest's gets a swiotlb= if it has none
  --memory SIZE           size of its RAM, such as 512M or 1G (default 256M)
  --cpus N                number of its CPUs (default 1)
  --protected KIND        none (default), pkvm, or realm (Arm CCA)
  --disk FILE[,ro]        a raw file as a virtio disk; repeatable
  --net tap[=NAME]        a virtio network card on a tap interface; repeatable
  --console TO            the serial port: stdio (default), pty, or log=FILE
  --virtio-console TO     a virtio console too: stdio, pty, or log=FILE
  --balloon SIZE          memory that the guest shall give back
  --no-reboot             a guest that reboots ends the VMM
  --share-trace           prints each conversion between private and shared
  --json                  prints events as JSON, a line for each
  --help                  prints this

Events go to stderr. Exit status: 0 if the guest turned itself off, 1 after a failure, 2 if the
command line is wrong, 3 if the guest crashed, 128 + N after signal N.
";

/// Which kind of VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// The host can look into the guest.
    None,
    /// The guest speaks pKVM's hypercalls.
    Pkvm,
    /// The guest speaks Arm CCA's Realm Services Interface.
    Realm,
}

impl Protection {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Pkvm => "pkvm",
            Self::Realm => "realm",
        }
    }
}

/// Where a console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleKind {
    /// Standard input and output.
    Stdio,
    /// A new pseudoterminal.
    Pty,
    /// A file, for output alone.
    Log(PathBuf),
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The file with its contents.
    pub path: PathBuf,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// All that the command line says about a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initrd's file.
    pub initrd: Option<PathBuf>,
    /// The guest's command line.
    pub append: String,
    /// Bytes of RAM.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Kind of the VM.
    pub protection: Protection,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// Network cards: the name of the tap interface, if it was given.
    pub nets: Vec<Option<String>>,
    /// The serial port.
    pub console: ConsoleKind,
    /// The virtio console.
    pub virtio_console: Option<ConsoleKind>,
    /// Bytes that the balloon shall have.
    pub balloon: Option<u64>,
    /// Whether a reboot ends the VMM.
    pub no_reboot: bool,
    /// Whether conversions are printed.
    pub share_trace: bool,
    /// Whether events are JSON.
    pub json: bool,
}

impl Config {
    /// The guest's command line, as it gets it.
    ///
    /// A protected guest's I/O goes through a bounce buffer. Linux makes it 1/1024 of a small memory, which is less than one
    /// request of a disk; so it is told how much it needs, unless the user does.
    pub fn command_line(&self) -> String {
        let told = self.append.split_ascii_whitespace().any(|word| word.starts_with("swiotlb="));
        if told || self.protection == Protection::None {
            return self.append.clone();
        }
        let slots = (self.memory / 32).clamp(4 << 20, 64 << 20) / SWIOTLB_SLOT;
        format!("{} swiotlb={slots}", self.append).trim_start().to_owned()
    }
}

/// Bytes of what Linux counts its bounce buffer in.
const SWIOTLB_SLOT: u64 = 2048;

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// To print the help.
    Help,
    /// To run a VM.
    Run(Box<Config>),
}

/// Parses arguments, without the program's name.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Request> {
    let mut parser = Parser::from_args(arguments);
    let mut kernel = None;
    let mut config = Config {
        kernel: PathBuf::new(),
        initrd: None,
        append: String::new(),
        memory: 256 << 20,
        cpus: 1,
        protection: Protection::None,
        disks: Vec::new(),
        nets: Vec::new(),
        console: ConsoleKind::Stdio,
        virtio_console: None,
        balloon: None,
        no_reboot: false,
        share_trace: false,
        json: false,
    };
    while let Some(argument) = parser.next()? {
        let Arg::Long(name) = argument else { bail!(argument.unexpected()) };
        match name {
            "kernel" => kernel = Some(parser.value()?.into()),
            "initrd" => config.initrd = Some(parser.value()?.into()),
            "append" => config.append = parser.value()?.string()?,
            "memory" => config.memory = size(&parser.value()?.string()?)?,
            "cpus" => config.cpus = parser.value()?.parse()?,
            "protected" => config.protection = protection(&parser.value()?.string()?)?,
            "disk" => config.disks.push(disk(parser.value()?)),
            "net" => config.nets.push(net(&parser.value()?.string()?)?),
            "console" => config.console = console(&parser.value()?.string()?)?,
            "virtio-console" => config.virtio_console = Some(console(&parser.value()?.string()?)?),
            "balloon" => config.balloon = Some(size(&parser.value()?.string()?)?),
            "no-reboot" => config.no_reboot = true,
            "share-trace" => config.share_trace = true,
            "json" => config.json = true,
            "help" => return Ok(Request::Help),
            _ => bail!(argument.unexpected()),
        }
    }
    config.kernel = kernel.context("--kernel is missing")?;
    ensure!((1..=MAX_CPUS).contains(&config.cpus), "--cpus is not in 1 to {MAX_CPUS}");
    ensure!(config.memory.is_multiple_of(PAGE) && config.memory != 0, "--memory is not a multiple of 4 KiB");
    ensure!(config.balloon.unwrap_or(0) < config.memory, "--balloon is not smaller than --memory");
    let stdio = [Some(&config.console), config.virtio_console.as_ref()];
    let stdio = stdio.into_iter().flatten().filter(|kind| **kind == ConsoleKind::Stdio);
    ensure!(stdio.count() < 2, "two consoles cannot both have stdio");
    Ok(Request::Run(Box::new(config)))
}

fn size(text: &str) -> Result<u64> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().ok().with_context(|| format!("{text:?} is not a size"))?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes < 1 << 48).with_context(|| format!("{text} is too large"))
}

fn protection(text: &str) -> Result<Protection> {
    let all = [Protection::None, Protection::Pkvm, Protection::Realm];
    all.into_iter().find(|kind| kind.name() == text).with_context(|| format!("--protected {text:?} is not known"))
}

fn disk(value: OsString) -> DiskConfig {
    match value.to_str().and_then(|text| text.strip_suffix(",ro")) {
        Some(path) => DiskConfig { path: path.into(), read_only: true },
        None => DiskConfig { path: value.into(), read_only: false },
    }
}

fn net(text: &str) -> Result<Option<String>> {
    match text.split_once('=') {
        None if text == "tap" => Ok(None),
        Some(("tap", name)) if (1..16).contains(&name.len()) => Ok(Some(name.into())),
        _ => bail!("--net {text:?} is not tap or tap=NAME"),
    }
}

fn console(text: &str) -> Result<ConsoleKind> {
    match text.split_once('=') {
        None if text == "stdio" => Ok(ConsoleKind::Stdio),
        None if text == "pty" => Ok(ConsoleKind::Pty),
        Some(("log", path)) if !path.is_empty() => Ok(ConsoleKind::Log(path.into())),
        _ => bail!("{text:?} is not stdio, pty or log=FILE"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Config> {
        match parse(line.split(' ').map(OsString::from))? {
            Request::Run(config) => Ok(*config),
            Request::Help => bail!("help"),
        }
    }

    #[test]
    fn all_options() {
        let config = run(
            "--kernel k --initrd i --append=a=b --memory 1G --cpus 4 --protected realm --disk d,ro --disk e --net tap \
             --net tap=t0 --console log=f --virtio-console pty --balloon 4M --no-reboot --share-trace --json",
        )
        .unwrap();
        assert_eq!((config.memory, config.cpus, config.protection), (1 << 30, 4, Protection::Realm));
        assert_eq!(config.append, "a=b");
        assert_eq!(config.disks[0], DiskConfig { path: "d".into(), read_only: true });
        assert_eq!(config.disks[1], DiskConfig { path: "e".into(), read_only: false });
        assert_eq!(config.nets, [None, Some("t0".into())]);
        assert_eq!(config.console, ConsoleKind::Log("f".into()));
        assert_eq!(config.virtio_console, Some(ConsoleKind::Pty));
        assert_eq!(config.balloon, Some(4 << 20));
        assert!(config.no_reboot && config.share_trace && config.json);
    }

    #[test]
    fn defaults() {
        let config = run("--kernel k").unwrap();
        assert_eq!((config.memory, config.cpus, config.protection), (256 << 20, 1, Protection::None));
        assert_eq!(config.console, ConsoleKind::Stdio);
    }

    #[test]
    fn protected_guests_get_a_bounce_buffer() {
        let line = |options: &str| run(&format!("--kernel k {options}")).unwrap().command_line();
        assert_eq!(line("--append=quiet"), "quiet");
        assert_eq!(line("--append=quiet --protected pkvm"), "quiet swiotlb=4096");
        assert_eq!(line("--protected realm --memory 8G"), "swiotlb=32768");
        assert_eq!(line("--append=swiotlb=64 --protected pkvm"), "swiotlb=64");
    }

    #[test]
    fn mistakes_are_named() {
        for (line, word) in [
            ("--initrd i", "--kernel"),
            ("--kernel k --cpus 0", "--cpus"),
            ("--kernel k --memory 12Q", "12Q"),
            ("--kernel k --memory 99999999999G", "too large"),
            ("--kernel k --memory 1000", "--memory"),
            ("--kernel k --balloon 1G", "--balloon"),
            ("--kernel k --net user", "user"),
            ("--kernel k --net tap=", "tap="),
            ("--kernel k --protected tdx", "tdx"),
            ("--kernel k --virtio-console stdio", "stdio"),
            ("--kernel k --frobnicate", "frobnicate"),
            ("--kernel k --append", "append"),
        ] {
            let error = run(line).unwrap_err().to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
