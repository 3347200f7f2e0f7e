//! A stock Linux as the host: what boots, what the host must not notice, and what it must survive.
//!
//! Each boot runs the program of `tests/linux` with many checks. Its results, and what differs from a host on the same
//! machine without the hypervisor, are counted one by one.

mod refusal;
pub(super) mod transcript;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context, Result, bail, ensure};

use super::Report;
use crate::initramfs::{self, ExtraFile, Task};
use crate::machine::parse_size;
use crate::qemu::{Outcome, Scratch};
use crate::run::{Options, Ready};
use crate::setup::packages::Manifest;
use crate::setup::{BUSYBOX, DEFAULT_KERNEL, Needs};
use crate::{programs, setup, workspace};
use transcript::{Check, Transcript};

const CPUS: [&str; 6] = ["cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1", "max"];
const NUMBERS: [u32; 4] = [1, 2, 4, 8];
const SIZES: [&str; 5] = ["512M", "1G", "2G", "4G", "8G"];

/// Kernels of the manifest besides the default one.
const OTHER_KERNELS: [&str; 2] = ["linux-old", "linux-new"];

/// The part of the matrix that runs without `--full`: each model, number and size at least once, and what else the host
/// does there.
const SMALL_MATRIX: [(&str, u32, &str, &[Extra]); 6] = [
    ("cortex-a53", 1, "512M", &[]),
    ("cortex-a72", 4, "1G", &[Extra::Hotplug, Extra::Memory]),
    ("cortex-a76", 2, "2G", &[Extra::Suspend]),
    ("neoverse-n1", 8, "4G", &[]),
    ("neoverse-v1", 2, "8G", &[]),
    ("max", 4, "2G", &[]),
];

/// What is added to some rows of the whole matrix.
const FULL_EXTRAS: [(&str, u32, &str, &[Extra]); 6] = [
    ("cortex-a53", 2, "512M", &[Extra::Memory]),
    ("cortex-a72", 4, "1G", &[Extra::Hotplug, Extra::Memory]),
    ("cortex-a76", 2, "2G", &[Extra::Suspend]),
    ("cortex-a76", 4, "8G", &[Extra::Memory]),
    ("neoverse-n1", 8, "4G", &[Extra::Hotplug]),
    ("max", 4, "2G", &[Extra::Hotplug, Extra::Memory]),
];

/// QEMU has it for machines with EL2 only.
const GICV4: &str = "GICv4";

/// Machines that differ in more than their size: what it is called, the CPU model, and arguments for QEMU. The first of
/// them runs without `--full`, too.
const VARIANTS: [(&str, &str, &[&str]); 10] = [
    (
        "two memory nodes",
        "cortex-a76",
        &[
            "-object",
            "memory-backend-ram,id=m0,size=512M",
            "-object",
            "memory-backend-ram,id=m1,size=512M",
            "-numa",
            "node,memdev=m0,cpus=0",
            "-numa",
            "node,memdev=m1,cpus=1",
            "-smp",
            "sockets=2",
        ],
    ),
    ("SMMU, PCI ports", "cortex-a76", &["-machine", "iommu=smmuv3", "-device", "pcie-root-port"]),
    (GICV4, "neoverse-v1", &["-machine", "gic-version=4"]),
    ("no ITS", "cortex-a72", &["-machine", "its=off"]),
    ("low devices", "cortex-a53", &["-machine", "highmem=off"]),
    ("no SVE", "max,sve=off", &[]),
    ("no SME", "max,sme=off", &[]),
    ("no LPA2", "max,lpa2=off", &[]),
    ("no pointer authentication", "max,pauth=off", &[]),
    ("no MTE", "max", &["-machine", "mte=off"]),
];

/// Enough for 8 emulated CPUs, or for 8 GiB of memory to be filled, on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(900);

/// Off and on again, for each CPU.
const HOTPLUG_ROUNDS: u32 = 100;

/// Memory in MiB that the workload leaves to everything else.
const LEFT_FREE: u32 = 40;

/// The file with the place of the carve-out, seen from the host.
const NODE: &str = "/proc/device-tree/reserved-memory/ravelin@*/reg";

/// Shell functions of the scripts.
const PRELUDE: &str = "
dmesg -n 1
probe() {
    /bin/probe \"$@\" || echo \"@fail probe $1: it ended with status $?\"
    echo \"@note uptime after $1 = $(cut -d ' ' -f 1 /proc/uptime)\"
}
";

/// What is looked at on every boot, with the hypervisor and without.
const OBSERVE: &str = "
echo \"@note cpus = $(nproc)\"
echo \"@note MemTotal = $(awk '/^MemTotal/ { print $2 }' /proc/meminfo)\"
echo \"@value taint = $(cat /proc/sys/kernel/tainted)\"
echo \"@value mem_sleep = $(cat /sys/power/mem_sleep)\"
sort -u /proc/cpuinfo | awk -F '[\\t ]*: ' '/^(Features|CPU)/ { print \"@value \" $1 \" = \" $2 }'
sed 's/^/@iomem /' /proc/iomem
dmesg -r | sed 's/^/@dmesg /'
dmesg -c >/dev/null
probe identity
probe instructions
probe pmu
";

/// What ends every script: what the kernel has said meanwhile.
const AFTER: &str = "
dmesg -r | sed 's/^/@later /'
echo \"@note taint afterwards = $(cat /proc/sys/kernel/tainted)\"
echo \"@note cpus afterwards = $(nproc)\"
";

/// Suspends to idle until the clock rings.
const SUSPEND: &str = "
clock=/sys/class/rtc/rtc0
before=$(cat $clock/since_epoch)
echo $((before + 3)) >$clock/wakealarm
if echo freeze >/sys/power/state && [ $(cat $clock/since_epoch) -ge $((before + 2)) ]; then
    echo \"@ok suspend to idle, with an alarm\"
else
    echo \"@fail suspend to idle, with an alarm: woken $(($(cat $clock/since_epoch) - before)) s later\"
fi
";

/// What only some boots do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extra {
    /// All CPUs off and on again, many times.
    Hotplug,
    /// Nearly all of RAM in use.
    Memory,
    /// Suspend to idle.
    Suspend,
}

/// A machine and what boots on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Config {
    cpu: &'static str,
    smp: u32,
    memory: &'static str,
    kernel: &'static str,
    /// Whether the model watches.
    checked: bool,
    /// What is special, and the arguments for QEMU that make it so.
    variant: Option<(&'static str, &'static [&'static str])>,
}

impl Config {
    /// A plain machine with the default kernel.
    pub(super) const fn new(cpu: &'static str, smp: u32, memory: &'static str) -> Self {
        Self { cpu, smp, memory, kernel: DEFAULT_KERNEL, checked: false, variant: None }
    }

    /// The same machine with the checking build.
    pub(super) const fn checked(self) -> Self {
        Self { checked: true, ..self }
    }

    /// The same machine with a kernel of the manifest.
    pub(super) fn with_kernel(self, kernel: &'static str) -> Self {
        Self { kernel, ..self }
    }
}

impl std::fmt::Display for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpu, smp, memory, kernel, checked, variant } = self;
        if *kernel != DEFAULT_KERNEL {
            write!(f, "{kernel} on ")?;
        }
        write!(f, "{cpu} x{smp} {memory}{}", if *checked { " checked" } else { "" })?;
        variant.map_or(Ok(()), |(name, _)| write!(f, " {name}"))
    }
}

/// The machine of the tests that need only one.
const USUAL: Config = Config::new("cortex-a76", 2, "1G");

/// Runs the suite.
pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    setup::ensure(&Needs { qemu: true, bare_metal: true, packages: &[DEFAULT_KERNEL, BUSYBOX], ..Needs::default() })?;
    let probe = fs::read(programs::probe()?)?;
    let mut suite = Suite { probe, without: Vec::new() };
    let mut rows = Vec::new();
    for (config, extras) in matrix(full, report)? {
        let start = Instant::now();
        let failures = report.failures();
        suite.row(&config, extras, report);
        let verdict = if report.failures() == failures { "ok" } else { "FAILED" };
        rows.push((config, verdict, start.elapsed().as_secs()));
    }
    print_matrix(&rows);

    report.check("--exec passes on the output and the status 0", exit_status("uname -a; nproc; dmesg | tail", 0));
    report.check("--exec passes on the status 1", exit_status("false", 1));
    report.check("poweroff ends the machine", ends("poweroff -f", "reboot: Power down"));
    report.check("reboot ends the machine", ends("reboot -f", "reboot: Restarting system"));
    report.check("a machine that is reset boots again", boots_again());
    report.check("kexec to another kernel", suite.kexec());
    report.check("an initrd given by linux,initrd-start", initrd_of_the_bootloader());
    suite.unguarded(report);
    refusal::run(report);
    Ok(())
}

/// The machines, and what else is done there.
fn matrix(full: bool, report: &mut Report) -> Result<Vec<(Config, &'static [Extra])>> {
    let variants = VARIANTS.map(|(name, cpu, args)| Config { cpu, variant: Some((name, args)), ..USUAL });
    let mut matrix: Vec<(Config, &[Extra])> = Vec::new();
    if !full {
        matrix.extend(SMALL_MATRIX.map(|(cpu, smp, memory, extras)| (Config::new(cpu, smp, memory), extras)));
        matrix.push((variants[0], &[]));
        return Ok(matrix);
    }
    for (cpu, smp) in CPUS.iter().flat_map(|cpu| NUMBERS.map(|smp| (*cpu, smp))) {
        for memory in SIZES {
            let with_extras = FULL_EXTRAS.iter().find(|row| (row.0, row.1, row.2) == (cpu, smp, memory));
            matrix.push((Config::new(cpu, smp, memory), with_extras.map_or(&[], |row| row.3)));
        }
    }
    matrix.extend(variants.map(|config| (config, &[][..])));
    matrix.push((USUAL.checked(), &[]));
    for kernel in OTHER_KERNELS {
        match Manifest::load()?.ensure(kernel) {
            Ok(_) => matrix.extend(CPUS.map(|cpu| (Config { kernel, ..Config::new(cpu, 2, "2G") }, &[][..]))),
            Err(error) => report.skip(kernel, &format!("{error:#}")),
        }
    }
    Ok(matrix)
}

/// What the boots share.
struct Suite {
    /// The program of `tests/linux`.
    probe: Vec<u8>,
    /// Boots without the hypervisor.
    without: Vec<(Config, Transcript)>,
}

impl Suite {
    /// Boots a script, with the program.
    fn boot(&self, name: &str, config: &Config, script: &str, hypervisor: bool) -> Result<Transcript> {
        let probe = ExtraFile { path: "bin/probe".into(), contents: self.probe.clone() };
        boot(name, config, |options| {
            options.exec = Some(format!("{PRELUDE}{script}{AFTER}"));
            options.no_hypervisor = !hypervisor;
            options.extra_files.push(probe);
        })
    }

    /// The same machine without the hypervisor; one with other CPUs or memory will do unless it has to be `exact`.
    fn without(&mut self, config: &Config, exact: bool) -> Result<&Transcript> {
        let variant = config.variant.filter(|(name, _)| *name != GICV4);
        let config = &Config { variant, ..*config };
        let cpus = |config: &Config| (config.cpu, config.kernel, config.variant);
        let fits = |known: &Config| known == config || !exact && cpus(known) == cpus(config);
        let index = match self.without.iter().position(|(known, _)| fits(known)) {
            Some(index) => index,
            None => {
                let transcript = self.boot(&format!("{config}, without"), config, OBSERVE, false)?;
                ensure!(transcript.outcome == Outcome::Status(0), "{:?}: {}", transcript.outcome, transcript.tail());
                self.without.push((*config, transcript));
                self.without.len() - 1
            }
        };
        Ok(&self.without[index].1)
    }

    /// Runs one row of the matrix.
    fn row(&mut self, config: &Config, extras: &[Extra], report: &mut Report) {
        let mut script = OBSERVE.to_owned();
        script += &format!("probe carve-out {NODE}\n");
        // All pages of the smaller machines.
        let gibibytes = parse_size(config.memory).map_or(0, |size| size >> 30);
        script += &format!("probe kcore {}\n", if gibibytes > 1 { 256 } else { 4 });
        for extra in extras {
            match extra {
                Extra::Hotplug => writeln!(script, "probe hotplug {HOTPLUG_ROUNDS}"),
                Extra::Memory => writeln!(script, "probe memory {LEFT_FREE}"),
                Extra::Suspend => writeln!(script, "{SUSPEND}"),
            }
            .expect("a String takes everything");
        }
        let with = match self.boot(&config.to_string(), config, &script, true) {
            Ok(with) => with,
            Err(error) => return report.fail(&format!("{config}: boots"), &format!("{error:#}")),
        };
        let mut check = |name: &str, result: Result<()>| report.check(&format!("{config}: {name}"), result);
        check("boots, runs a script and powers off", outcome(&with));
        if with.outcome != Outcome::Status(0) {
            return;
        }
        check("all CPUs", cpus(&with, config));
        check("memory", memory(&with, config));
        check("/proc/iomem lacks the carve-out", iomem(&with));
        check("no complaint in the kernel's log", complaint(&with));
        check("no taint", taint(&with));
        for (name, result) in &with.checks {
            let name = format!("{config}: {name}");
            match result {
                Check::Passed => report.pass(&name),
                Check::Failed(why) => report.fail(&name, why),
                Check::Skipped(why) => report.skip(&name, why),
            }
        }
        let same = self.without(config, false).and_then(|without| compare_values(&with, without));
        report.check(&format!("{config}: CPUs and counters as without the hypervisor"), same);
        report.check(&format!("{config}: no new warning"), self.compare_logs(config, &with));
    }

    /// Compares the kernel's messages with and without the hypervisor.
    fn compare_logs(&mut self, config: &Config, with: &Transcript) -> Result<()> {
        let mut new = new_warnings(with, self.without(config, false)?);
        if !new.is_empty() {
            new = new_warnings(with, self.without(config, true)?);
        }
        if let Some((_, without)) = self.without.iter().find(|(known, _)| known == config) {
            let (ours, theirs) = (with.log(), without.log());
            println!("  {config}: messages without (-) and with (+) the hypervisor, numbers as #:");
            theirs.difference(&ours).for_each(|text| println!("    - {text}"));
            ours.difference(&theirs).for_each(|text| println!("    + {text}"));
        }
        ensure!(new.is_empty(), "{}", new.into_iter().collect::<Vec<_>>().join("; "));
        Ok(())
    }

    /// The host's kernel is replaced by another one, which starts its CPUs anew.
    fn kexec(&self) -> Result<()> {
        const MARKER: &str = "status after kexec: ";
        let task = Task::Command { script: "[ $(nproc) = 2 ]", marker: MARKER };
        let busybox = fs::read(Manifest::load()?.ensure(BUSYBOX)?)?;
        let file = |path: &str, contents| ExtraFile { path: path.into(), contents };
        let kernel = file("root/kernel", fs::read(Manifest::load()?.ensure(DEFAULT_KERNEL)?)?);
        let initrd = file("root/initrd", initramfs::build(&busybox, &task, None, &[])?);
        let transcript = boot("kexec", &USUAL, |options| {
            options.exec = Some("probe kexec".into());
            options.extra_files = vec![file("bin/probe", self.probe.clone()), kernel, initrd];
        })?;
        ensure!(transcript.outcome == Outcome::Ended(0), "{:?}; {}", transcript.outcome, transcript.tail());
        ensure!(transcript.console.contains(&format!("{MARKER}0")), "{}", transcript.tail());
        Ok(())
    }

    /// The kernel touches the carve-out where it expects no fault; that may cost it one process.
    fn unguarded(&self, report: &mut Report) {
        const NAME: &str = "an access of the kernel that nothing guards costs one process at most";
        let script = format!("probe unguarded {NODE}\nprobe instructions\n");
        let result = self.boot("unguarded", &USUAL, &script, true).and_then(|transcript| {
            outcome(&transcript)?;
            cpus(&transcript, &USUAL)?;
            match transcript.checks.iter().find(|(_, check)| matches!(check, Check::Failed(_))) {
                Some((name, check)) => bail!("{name}: {check:?}"),
                None => ensure!(transcript.checks.len() > 2, "the program did not run"),
            }
            Ok(())
        });
        report.check(NAME, result);
    }
}

/// Boots a host; the console goes to a file, too.
pub(super) fn boot(name: &str, config: &Config, change: impl FnOnce(&mut Options)) -> Result<Transcript> {
    let kernel = (config.kernel != DEFAULT_KERNEL).then(|| Manifest::load()?.ensure(config.kernel)).transpose()?;
    let mut options = Options {
        cpu: Some(config.cpu.into()),
        smp: Some(config.smp),
        memory: Some(config.memory.into()),
        host_kernel: kernel,
        checked: config.checked,
        // Kernel messages are read by dmesg; on the console they would fall between the lines that are parsed.
        append: Some("quiet".into()),
        // A panic of the hypervisor becomes a status of QEMU.
        semihosting: true,
        ..Options::default()
    };
    if config.cpu.starts_with("max") {
        // Without memory of its own for tags the CPU has no tags.
        options.qemu_arg = ["-machine", "mte=on"].map(Into::into).into();
    }
    if let Some((_, arguments)) = config.variant {
        options.qemu_arg.extend(arguments.iter().copied().map(Into::into));
    }
    change(&mut options);
    let mut console = Vec::new();
    let outcome = Ready::new(&options)?.run(&mut console, Some(TIMEOUT));
    let logs = workspace::output_dir()?.join("logs");
    fs::create_dir_all(&logs)?;
    let file: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let log = logs.join(file).with_added_extension("log");
    fs::write(&log, &console).with_context(|| format!("cannot write {}", log.display()))?;
    let outcome = outcome.with_context(|| log.display().to_string())?;
    Ok(Transcript::new(outcome, String::from_utf8_lossy(&console).into_owned()))
}

pub(super) fn outcome(transcript: &Transcript) -> Result<()> {
    let outcome = transcript.outcome;
    ensure!(outcome == Outcome::Status(0), "{outcome:?}; the console ends with\n    {}", transcript.tail());
    Ok(())
}

pub(super) fn cpus(transcript: &Transcript, config: &Config) -> Result<()> {
    let late = transcript.number("cpus afterwards")?;
    ensure!(late == u64::from(config.smp), "{late} CPUs of {}", config.smp);
    Ok(())
}

/// The host has all memory but the carve-out, which is no larger than it may be.
fn memory(transcript: &Transcript, config: &Config) -> Result<()> {
    let kept = transcript.kept()?;
    let kept = kept.end - kept.start;
    let size = parse_size(config.memory)?;
    let budget = size / 4096 * 9 + (2 << 20);
    ensure!(kept <= budget, "the carve-out has {kept:#x} bytes, more than {budget:#x}");
    let ram = transcript.ranges("System RAM").map(|range| range.end - range.start).sum::<u64>();
    ensure!(ram + kept == size, "{ram:#x} bytes of RAM are left of {size:#x}");
    // The kernel takes its image and 1/64 for its page structures, and what its hash tables need.
    let (total, least) = (transcript.number("MemTotal")? * 1024, ram - ram / 25 - (128 << 20));
    ensure!((least..ram).contains(&total), "MemTotal is {total:#x}, not between {least:#x} and {ram:#x}");
    Ok(())
}

fn iomem(transcript: &Transcript) -> Result<()> {
    let kept = transcript.kept()?;
    let noted = format!("{:#x} {:#x}", kept.start, kept.end - kept.start);
    ensure!(transcript.notes.get("carve-out") == Some(&noted), "the device tree has it elsewhere than {noted}");
    for line in &transcript.iomem {
        let range = line.trim().split_once(" : ").and_then(|(range, _)| transcript::parse_range(range));
        let range = range.with_context(|| format!("{line:?}"))?;
        ensure!(range.end <= kept.start || kept.end <= range.start, "{line:?} overlaps {kept:#x?}");
    }
    ensure!(transcript.ranges("System RAM").count() > 0, "/proc/iomem lists no RAM");
    Ok(())
}

/// No oops, warning or lockup, nor anything that the OOM killer did.
pub(super) fn complaint(transcript: &Transcript) -> Result<()> {
    const COMPLAINTS: [&str; 10] = [
        "WARNING:",
        "BUG:",
        "Oops",
        "Internal error",
        "Call trace",
        "lockup",
        "stall",
        "Unhandled",
        "Out of memory",
        "oom-kill",
    ];
    ensure!(transcript.messages.len() > 50, "dmesg has {} lines only", transcript.messages.len());
    let complains = |text: &str| COMPLAINTS.iter().any(|complaint| text.contains(complaint));
    let messages: Vec<_> = transcript.messages.iter().chain(&transcript.later).map(|message| &*message.text).collect();
    match messages.iter().position(|message| complains(message)) {
        // A trace says little without what comes before and after it.
        Some(found) => {
            bail!("{}", messages[found.saturating_sub(6)..messages.len().min(found + 16)].join("\n"))
        }
        None => Ok(()),
    }
}

fn taint(transcript: &Transcript) -> Result<()> {
    let late = transcript.number("taint afterwards")?;
    ensure!(late == 0, "the kernel is tainted: {late}");
    Ok(())
}

/// All that the scripts mark as the same with and without the hypervisor.
fn compare_values(with: &Transcript, without: &Transcript) -> Result<()> {
    ensure!(without.values.len() > 10, "the program did not run without the hypervisor");
    let names: BTreeSet<_> = with.values.keys().chain(without.values.keys()).collect();
    let differ = names.into_iter().filter(|name| with.values.get(*name) != without.values.get(*name));
    let none = "nothing".to_owned();
    let show = |values: &Transcript, name| values.values.get(name).unwrap_or(&none).clone();
    let differences: Vec<_> =
        differ.map(|name| format!("{name}: {}, without {}", show(with, name), show(without, name))).collect();
    ensure!(differences.is_empty(), "{}", differences.join("; "));
    Ok(())
}

/// Warnings and worse of a host on the hypervisor that the other host lacks.
fn new_warnings(with: &Transcript, without: &Transcript) -> BTreeSet<String> {
    /// These come and go with the load of the machine that emulates.
    const FROM_LOAD: [&str; 2] = ["hrtimer: interrupt took", "perf: interrupt took too long"];
    let (known, known_warnings) = (without.log(), without.warnings());
    let mut new = with.warnings();
    new.retain(|text| !known.contains(text) && !known_warnings.contains(text));
    new.retain(|text| !FROM_LOAD.iter().any(|start| text.starts_with(start)));
    new
}

/// `cargo xtask run --exec` as a user calls it.
fn exit_status(command: &str, expected: i32) -> Result<()> {
    let mut xtask = Command::new(std::env::current_exe()?);
    xtask.current_dir(workspace::root()).args([
        "run",
        "--bare",
        "--append",
        "quiet",
        "--timeout",
        "300",
        "--exec",
        command,
    ]);
    let output = xtask.output().context("cannot start xtask")?;
    let status = output.status.code();
    let (console, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(status == Some(expected), "status {status:?}, not {expected}; {}", errors.trim_end());
    ensure!(!console.contains("RAVELIN-EXIT"), "the marker is shown");
    ensure!(expected != 0 || console.contains("aarch64 GNU/Linux"), "no output");
    Ok(())
}

/// A command that ends the machine.
fn ends(command: &str, last: &str) -> Result<()> {
    let transcript = boot(command, &USUAL, |options| {
        options.exec = Some(command.to_owned());
        options.append = None;
    })?;
    ensure!(transcript.outcome == Outcome::Ended(0), "{:?}", transcript.outcome);
    ensure!(transcript.console.contains(last), "the kernel did not say {last:?}");
    Ok(())
}

/// A reset that does not end QEMU, twice.
fn boots_again() -> Result<()> {
    const BOOTS: usize = 3;
    let mut console = Vec::new();
    let options = Options {
        exec: Some("nproc; reboot -f".into()),
        append: Some("quiet".into()),
        qemu_arg: ["-action", "reboot=reset"].map(Into::into).into(),
        semihosting: true,
        ..Options::default()
    };
    let mut sink = Until { seen: &mut console, last: "\n2\n", times: BOOTS };
    // The end that the sink makes is none of the machine's.
    let end = Ready::new(&options)?.run(&mut sink, Some(TIMEOUT));
    let reached = sink.reached();
    let console = String::from_utf8_lossy(&console);
    ensure!(reached, "{:?}; the console is\n{console}", end.map_err(|error| error.to_string()));
    // What came with the last answer may be of the next start already.
    let starts = console.matches("ravelin: version").count();
    ensure!(starts >= BOOTS, "the hypervisor started {starts} times; the console is\n{console}");
    Ok(())
}

/// Takes a console until it has said something so many times.
struct Until<'a> {
    seen: &'a mut Vec<u8>,
    last: &'static str,
    times: usize,
}

impl Until<'_> {
    fn reached(&self) -> bool {
        String::from_utf8_lossy(self.seen).matches(self.last).count() >= self.times
    }
}

impl io::Write for Until<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.seen.extend_from_slice(bytes);
        if self.reached() { Err(io::ErrorKind::QuotaExceeded.into()) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The bootloader's own way to hand over an initrd, where the kernel comes as a module.
fn initrd_of_the_bootloader() -> Result<()> {
    const MARKER: &str = "the init of the other initrd: ";
    let busybox = fs::read(Manifest::load()?.ensure(BUSYBOX)?)?;
    let task = Task::Command { script: "test -e /proc/device-tree/chosen/linux,initrd-start", marker: MARKER };
    let scratch = Scratch::new()?;
    let file = scratch.file("initramfs.cpio", &initramfs::build(&busybox, &task, None, &[])?)?;
    let kernel = Manifest::load()?.ensure(DEFAULT_KERNEL)?;
    let transcript = boot("initrd", &USUAL, |options| {
        options.host_image = Some(kernel.display().to_string());
        options.append = Some("console=ttyAMA0 panic=-1 quiet".into());
        options.qemu_arg = vec!["-initrd".into(), file.display().to_string()];
    })?;
    ensure!(transcript.outcome == Outcome::Ended(0), "{:?}; {}", transcript.outcome, transcript.tail());
    ensure!(transcript.console.contains(&format!("{MARKER}0")), "it did not run: {}", transcript.tail());
    Ok(())
}

/// A line for each CPU model and number, a column for each size of RAM.
fn print_matrix(rows: &[(Config, &str, u64)]) {
    println!("\n{:<52}{}", "", SIZES.map(|size| format!("{size:>14}")).concat());
    let mut lines: Vec<(String, Vec<String>)> = Vec::new();
    for (config, verdict, seconds) in rows {
        let variant = config.variant.map_or(String::new(), |(name, _)| format!(" {name}"));
        let head = format!("{} {} x{}{variant}", config.kernel, config.cpu, config.smp);
        if lines.last().is_none_or(|line| line.0 != head) {
            lines.push((head, vec![String::new(); SIZES.len()]));
        }
        if let (Some(line), Some(column)) = (lines.last_mut(), SIZES.iter().position(|size| *size == config.memory)) {
            line.1[column] = format!("{verdict} {seconds} s");
        }
    }
    for (head, cells) in lines {
        println!("{head:<52}{}", cells.iter().map(|cell| format!("{cell:>14}")).collect::<String>());
    }
    println!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_matrix_has_everything_once() {
        assert!(CPUS.iter().all(|cpu| SMALL_MATRIX.iter().any(|row| row.0 == *cpu)));
        assert!(NUMBERS.iter().all(|number| SMALL_MATRIX.iter().any(|row| row.1 == *number)));
        assert!(SIZES.iter().all(|size| SMALL_MATRIX.iter().any(|row| row.2 == *size)));
        assert!([Extra::Hotplug, Extra::Memory, Extra::Suspend].iter().all(|extra| {
            SMALL_MATRIX.iter().any(|row| row.3.contains(extra)) && FULL_EXTRAS.iter().any(|row| row.3.contains(extra))
        }));
    }

    #[test]
    fn the_whole_matrix_has_all_rows_with_extras() {
        for (cpu, smp, memory, _) in FULL_EXTRAS {
            assert!(CPUS.contains(&cpu) && NUMBERS.contains(&smp) && SIZES.contains(&memory), "{cpu} {smp} {memory}");
        }
    }

    fn transcript(lines: &str) -> Transcript {
        Transcript::new(Outcome::Status(0), lines.into())
    }

    #[test]
    fn complaints_are_seen() {
        let log: String = (0..60).map(|line| format!("@dmesg <6>[ 0.0] line {line}\n")).collect();
        assert!(complaint(&transcript(&log)).is_ok());
        assert!(complaint(&transcript("@dmesg <6>[ 0.0] short\n")).is_err());
        let oops = log + "@dmesg <0>[ 1.0] Internal error: synchronous external abort\n";
        assert!(complaint(&transcript(&oops)).is_err());
        assert!(taint(&transcript("@note taint afterwards = 128\n")).is_err());
        assert!(taint(&transcript("@note taint afterwards = 0\n")).is_ok());
    }

    #[test]
    fn only_new_warnings_count() {
        let without = transcript("@dmesg <4>[ 0.1] old 5\n@dmesg <6>[ 0.2] was information\n");
        let with = "@dmesg <4>[ 0.1] old 6\n@dmesg <4>[ 0.2] was information\n@dmesg <6>[ 0.3] new information\n";
        assert!(new_warnings(&transcript(with), &without).is_empty());
        let with = transcript("@dmesg <3>[ 0.1] new\n@dmesg <4>[ 0.1] hrtimer: interrupt took 77 ns\n");
        assert_eq!(new_warnings(&with, &without), BTreeSet::from(["new".into()]));
    }

    #[test]
    fn values_must_be_the_same() {
        let lines = |last: &str| (0..12).map(|n| format!("@value v{n} = {n}\n")).collect::<String>() + last;
        let values = |last| transcript(&lines(last));
        assert!(compare_values(&values("@value hwcaps = 1\n"), &values("@value hwcaps = 1\n")).is_ok());
        let error = compare_values(&values("@value hwcaps = 1\n"), &values("@value hwcaps = 3\n")).unwrap_err();
        assert_eq!(error.to_string(), "hwcaps: 1, without 3");
        assert!(compare_values(&values(""), &values("@value hwcaps = 3\n")).is_err());
        assert!(compare_values(&transcript(""), &transcript("")).is_err());
    }

    #[test]
    fn the_carve_out_is_nowhere_in_iomem() {
        let console = "ravelin: keeps 0x7fc00000-0x7fffffff (4096 KiB)\n@note carve-out = 0x7fc00000 0x400000\n\
            @iomem 40000000-7fbfffff : System RAM\n";
        assert!(iomem(&transcript(console)).is_ok());
        assert!(iomem(&transcript(&format!("{console}@iomem   7fd00000-7fdfffff : reserved\n"))).is_err());
        assert!(iomem(&transcript(&console.replace("0x400000", "0x200000"))).is_err());
        let config = USUAL;
        let sized = |total: u64| transcript(&format!("{console}@note MemTotal = {total}\n"));
        assert!(memory(&sized(970_000), &config).is_ok());
        assert!(memory(&sized(600_000), &config).is_err());
        assert!(memory(&sized(1_048_576), &config).is_err());
    }
}
