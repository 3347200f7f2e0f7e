//! A stock Linux as the host: the matrix of machines, and what the host must not notice.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Report;
use crate::initramfs::ExtraFile;
use crate::machine::parse_size;
use crate::qemu::Outcome;
use crate::run::{Options, Ready};
use crate::setup::packages::Manifest;
use crate::setup::{BUSYBOX, DEFAULT_KERNEL, Needs, rust};
use crate::{process, setup, workspace};

const CPUS: [&str; 6] = ["cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1", "max"];
const NUMBERS: [u32; 4] = [1, 2, 4, 8];
const SIZES: [&str; 5] = ["512M", "1G", "2G", "4G", "8G"];

/// Kernels of the manifest besides the default one.
const OTHER_KERNELS: [&str; 2] = ["linux-old", "linux-new"];

/// The part of the matrix that runs without `--full`: each model, number and size at least once.
const SMALL_MATRIX: [(&str, u32, &str); 8] = [
    ("cortex-a53", 1, "512M"),
    ("cortex-a53", 8, "1G"),
    ("cortex-a72", 2, "1G"),
    ("cortex-a76", 4, "2G"),
    ("neoverse-n1", 8, "4G"),
    ("neoverse-v1", 2, "8G"),
    ("max", 1, "512M"),
    ("max", 4, "2G"),
];

/// Long enough for 8 emulated CPUs on a busy machine; a boot takes some seconds.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Off and on again, for each CPU but the first.
const HOTPLUG_ROUNDS: u32 = 100;

/// Prints what [`Observed::parse`] reads.
const OBSERVE: &str = "
echo \"cpus $(nproc)\"
echo \"tainted $(cat /proc/sys/kernel/tainted)\"
sed 's/^/iomem /' /proc/iomem
dmesg -r | sed 's/^/dmesg /'
";

/// Takes each CPU but the first off and on again.
const HOTPLUG: &str = "
all=$(nproc)
for cpu in /sys/devices/system/cpu/cpu[1-9]*; do
    round=0
    while [ $round -lt ROUNDS ]; do
        echo 0 >$cpu/online || exit 1
        echo 1 >$cpu/online || exit 1
        round=$((round + 1))
    done
done
[ $(nproc) = $all ]
";

/// Fills nearly all of RAM with copies of random data and compares them.
const FILL: &str = "
mount -o remount,size=100% /tmp
head -c 16m /dev/urandom >/tmp/0
copies=$(awk '/^MemAvailable/ { print int($2 / 16384 * 0.92) }' /proc/meminfo)
echo \"copies of 16 MiB: $copies\"
for copy in $(seq $copies); do cp /tmp/0 /tmp/$copy || exit 1; done
for copy in $(seq $copies); do cmp /tmp/0 /tmp/$copy || exit 1; done
";

/// Every access to the carve-out ends with a signal or an error for the process that makes it, and nothing else.
const TOUCH: &str = "
fails() {
    expected=$1
    shift
    carve_out \"$@\" >/tmp/passed
    status=$?
    [ $status = $expected ] || { echo \"$*: status $status, not $expected\"; exit 1; }
}
for address in ADDRESSES; do
    fails BUS read $address
    fails BUS write $address
    fails EFAULT pass $address
done
# In parallel, from all CPUs.
for process in $(seq 20); do carve_out read FIRST & done
wait
dd if=/proc/kcore of=/dev/null bs=1M count=64 2>/dev/null
uname -a
";

/// A machine and what boots on it.
#[derive(Clone, Copy, Debug)]
struct Config {
    cpu: &'static str,
    smp: u32,
    memory: &'static str,
    kernel: &'static str,
}

impl std::fmt::Display for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpu, smp, memory, kernel } = self;
        write!(f, "{kernel} on {cpu} x{smp}, {memory}")
    }
}

/// The machine of the tests that need only one.
const USUAL: Config = Config { cpu: "cortex-a76", smp: 4, memory: "1G", kernel: DEFAULT_KERNEL };

/// Runs the suite.
pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    setup::ensure(&Needs { qemu: true, bare_metal: true, gdb: false, packages: &[DEFAULT_KERNEL, BUSYBOX] })?;
    let config = |(cpu, smp, memory)| Config { cpu, smp, memory, kernel: DEFAULT_KERNEL };
    let mut matrix: Vec<Config> = if full {
        let sizes = |cpu, smp| SIZES.map(|memory| config((cpu, smp, memory)));
        CPUS.iter().flat_map(|&cpu| NUMBERS.iter().flat_map(move |&smp| sizes(cpu, smp))).collect()
    } else {
        SMALL_MATRIX.map(config).into()
    };
    if full {
        for kernel in OTHER_KERNELS {
            match Manifest::load()?.ensure(kernel) {
                Ok(_) => matrix.extend(CPUS.map(|cpu| Config { cpu, smp: 2, memory: "2G", kernel })),
                Err(error) => report.skip(kernel, &format!("{error:#}")),
            }
        }
    }
    let mut rows = Vec::new();
    for config in matrix {
        let start = Instant::now();
        let result = boot_test(&config);
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        rows.push((config, verdict, start.elapsed().as_secs()));
        report.check(&config.to_string(), result);
    }
    if full {
        print_matrix(&rows);
    }

    // One comparison for each model suffices: what a kernel warns of depends on the CPU's features.
    for cpu in CPUS {
        let config = Config { cpu, ..USUAL };
        report.check(&format!("the log of {config} has no new warning"), compare_logs(&config));
    }
    report.check("CPU hotplug", hotplug());
    report.check("nearly all of RAM in use", fill(full));
    touch(report);
    report.check("the status of a command is that of xtask", exit_status());
    report.check("a reset ends the machine", reset());
    report.check("a GICv2 is refused", refused(&["gic"], |options| options.machine = Some("virt-gicv2".into())));
    let at_el1 = |options: &mut Options| options.qemu_arg = ["-machine", "virtualization=off"].map(Into::into).into();
    report.check("entry at EL1 is refused", refused(&["EL2"], at_el1));
    Ok(())
}

/// What a boot has shown.
struct Booted {
    outcome: Outcome,
    console: String,
}

/// Boots a host and runs a script in it; the console goes to a file, too.
fn boot(name: &str, config: &Config, change: impl FnOnce(&mut Options)) -> Result<Booted> {
    let kernel = (config.kernel != DEFAULT_KERNEL).then(|| Manifest::load()?.ensure(config.kernel)).transpose()?;
    let mut options = Options {
        cpu: Some(config.cpu.into()),
        smp: Some(config.smp),
        memory: Some(config.memory.into()),
        host_kernel: kernel,
        // Kernel messages are read by dmesg; on the console they would fall between the lines that are parsed.
        append: Some("quiet".into()),
        // A panic of the hypervisor becomes a status of QEMU.
        semihosting: true,
        ..Options::default()
    };
    change(&mut options);
    let mut console = Vec::new();
    let outcome = Ready::new(&options)?.run(&mut console, Some(TIMEOUT));
    let logs = workspace::output_dir()?.join("logs");
    fs::create_dir_all(&logs)?;
    let file: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let log = logs.join(file).with_added_extension("log");
    fs::write(&log, &console).with_context(|| format!("cannot write {}", log.display()))?;
    let outcome = outcome.with_context(|| log.display().to_string())?;
    Ok(Booted { outcome, console: String::from_utf8_lossy(&console).into_owned() })
}

/// As [`boot`], of a script that must succeed.
fn succeed(name: &str, config: &Config, script: &str, change: impl FnOnce(&mut Options)) -> Result<String> {
    let booted = boot(name, config, |options| {
        options.exec = Some(script.to_owned());
        change(options);
    })?;
    let tail = || {
        let mut lines: Vec<_> = booted.console.lines().rev().take(15).collect();
        lines.reverse();
        lines.join("\n    ")
    };
    ensure!(booted.outcome == Outcome::Status(0), "{:?}; the console ends with\n    {}", booted.outcome, tail());
    Ok(booted.console)
}

/// What [`OBSERVE`] prints.
struct Observed {
    cpus: u32,
    tainted: String,
    /// System RAM, from /proc/iomem.
    ram: Vec<Range<u64>>,
    /// Level and text of each kernel message, without its time.
    messages: Vec<(u8, String)>,
}

impl Observed {
    fn parse(console: &str) -> Result<Self> {
        let field = |name: &str| console.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let ram = console.lines().filter_map(|line| line.strip_prefix("iomem ")).filter_map(|line| {
            let (range, what) = line.split_once(" : ")?;
            // Children of a range are indented.
            (what == "System RAM" && !range.starts_with(' ')).then(|| parse_range(range)).flatten()
        });
        let messages = console.lines().filter_map(|line| parse_message(line.strip_prefix("dmesg ")?));
        let observed = Self {
            cpus: field("cpus").context("no number of CPUs")?.parse()?,
            tainted: field("tainted").context("no taint")?.to_owned(),
            ram: ram.collect(),
            messages: messages.collect(),
        };
        ensure!(!observed.ram.is_empty(), "/proc/iomem lists no RAM");
        ensure!(observed.messages.len() > 50, "dmesg has {} lines only", observed.messages.len());
        Ok(observed)
    }

    /// Messages without the numbers that differ from boot to boot.
    fn normalized(&self, levels: impl Fn(u8) -> bool) -> BTreeSet<String> {
        self.messages.iter().filter(|(level, _)| levels(*level)).map(|(_, text)| normalize(text)).collect()
    }
}

/// `START-END` in hexadecimal, END included.
fn parse_range(text: &str) -> Option<Range<u64>> {
    let (start, end) = text.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    Some(number(start)?..number(end)?.checked_add(1)?)
}

/// `<PRIORITY>[  TIME] TEXT`
fn parse_message(line: &str) -> Option<(u8, String)> {
    let (priority, rest) = line.strip_prefix('<')?.split_once('>')?;
    let (_, text) = rest.split_once("] ")?;
    // The low three bits are the level, the rest the facility (syslog(2)).
    Some((priority.parse::<u32>().ok()? as u8 & 7, text.to_owned()))
}

/// Replaces every number, decimal with its unit or hexadecimal.
fn normalize(text: &str) -> String {
    let mut out = String::new();
    for word in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let core = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        let with_unit = core.starts_with(|c: char| c.is_ascii_digit());
        let is_hex = core.chars().all(|c| c.is_ascii_hexdigit()) && core.contains(|c: char| c.is_ascii_digit());
        out += if with_unit || is_hex { "#" } else { core };
        out += &word[core.len()..];
    }
    out
}

/// What the hypervisor says that it keeps: `ravelin: keeps START-END ...`.
fn carve_out(console: &str) -> Result<Range<u64>> {
    let line = console.lines().find_map(|line| line.trim().strip_prefix("ravelin: keeps "));
    let range = line.and_then(|line| parse_range(line.split(' ').next()?));
    range.context("the hypervisor does not say what it keeps")
}

/// Boots one row of the matrix.
fn boot_test(config: &Config) -> Result<()> {
    let console = succeed(&config.to_string(), config, OBSERVE, |_| {})?;
    let observed = Observed::parse(&console)?;
    ensure!(observed.cpus == config.smp, "{} CPUs in the host", observed.cpus);
    ensure!(observed.tainted == "0", "the kernel is tainted: {}", observed.tainted);
    let kept = carve_out(&console)?;
    let size = parse_size(config.memory)?;
    let budget = size / 4096 * 9 + (2 << 20);
    ensure!(
        kept.end - kept.start <= budget,
        "the carve-out has {:#x} bytes, more than {budget:#x}",
        kept.end - kept.start
    );
    if let Some(range) = observed.ram.iter().find(|range| range.start < kept.end && kept.start < range.end) {
        bail!("/proc/iomem lists {range:#x?} as RAM, where the carve-out is {kept:#x?}");
    }
    let total: u64 = observed.ram.iter().map(|range| range.end - range.start).sum();
    ensure!(total + (kept.end - kept.start) == size, "{total:#x} bytes of RAM are left of {size:#x}");
    Ok(())
}

/// Warnings that come and go with the load of the machine that emulates.
const FROM_LOAD: [&str; 2] = ["hrtimer: interrupt took", "perf: interrupt took too long"];

/// Compares the kernel's messages with and without the hypervisor.
fn compare_logs(config: &Config) -> Result<()> {
    let with = Observed::parse(&succeed(&format!("{config}, log"), config, OBSERVE, |_| {})?)?;
    let without = succeed(&format!("{config}, log without"), config, OBSERVE, |options| options.no_hypervisor = true)?;
    let without = Observed::parse(&without)?;
    let all = |_: u8| true;
    let (ours, theirs) = (with.normalized(all), without.normalized(all));
    let only = |one: &BTreeSet<String>, other: &BTreeSet<String>, sign: &str| {
        for line in one.difference(other) {
            println!("    {sign} {line}");
        }
    };
    println!("  {config}: messages without (-) and with (+) the hypervisor, numbers as #:");
    only(&theirs, &ours, "-");
    only(&ours, &theirs, "+");
    const WARNING: u8 = 4;
    let mut new: Vec<_> = with.normalized(|level| level <= WARNING).difference(&theirs).cloned().collect();
    new.retain(|text| !FROM_LOAD.iter().any(|start| text.starts_with(start)));
    ensure!(new.is_empty(), "new warnings: {}", new.join("; "));
    Ok(())
}

fn hotplug() -> Result<()> {
    let script = HOTPLUG.replace("ROUNDS", &HOTPLUG_ROUNDS.to_string());
    let console = succeed("hotplug", &USUAL, &(script + "status=$?\n" + OBSERVE + "exit $status"), |_| {})?;
    let observed = Observed::parse(&console)?;
    no_complaint(&observed)
}

fn fill(full: bool) -> Result<()> {
    let config = Config { memory: if full { "8G" } else { "1G" }, ..USUAL };
    let console = succeed("fill", &config, &format!("{FILL}{OBSERVE}"), |_| {})?;
    no_complaint(&Observed::parse(&console)?)
}

/// No oops, warning or lockup in the kernel's log, no taint.
fn no_complaint(observed: &Observed) -> Result<()> {
    const COMPLAINTS: [&str; 8] =
        ["WARNING:", "BUG:", "Oops", "Internal error", "Call trace", "lockup", "stall", "Unhandled"];
    ensure!(observed.tainted == "0", "the kernel is tainted: {}", observed.tainted);
    let complains = |text: &String| COMPLAINTS.iter().any(|complaint| text.contains(complaint));
    match observed.messages.iter().find(|(_, text)| complains(text)) {
        Some((_, text)) => bail!("the kernel says: {text}"),
        None => Ok(()),
    }
}

/// Accesses to the carve-out.
fn touch(report: &mut Report) {
    const NAME: &str = "accesses to the carve-out are survived";
    let program = match build_program("carve_out") {
        Ok(program) => program,
        Err(error) => return report.skip(NAME, &format!("the test program needs rustup's target: {error:#}")),
    };
    report.check(NAME, touch_with(program));
}

fn touch_with(program: PathBuf) -> Result<()> {
    // The place of the carve-out depends on the machine only.
    let kept = carve_out(&succeed("touch, place", &USUAL, "true", |_| {})?)?;
    let addresses = [kept.start, kept.start + (1 << 20), kept.end - 4096].map(|address| format!("{address:#x}"));
    const SIGBUS: u32 = 7;
    const EFAULT: u32 = 14;
    let script = TOUCH
        .replace("ADDRESSES", &addresses.join(" "))
        .replace("FIRST", &addresses[0])
        .replace("BUS", &(128 + SIGBUS).to_string())
        .replace("EFAULT", &EFAULT.to_string());
    let file = ExtraFile { path: "bin/carve_out".into(), contents: fs::read(program)? };
    let console = succeed("touch", &USUAL, &(script + OBSERVE), |options| options.extra_files.push(file))?;
    let observed = Observed::parse(&console)?;
    ensure!(observed.cpus == USUAL.smp, "{} CPUs are left", observed.cpus);
    no_complaint(&observed)
}

/// Builds a Linux program of `qemu/xtask/programs`, which needs no library.
fn build_program(name: &str) -> Result<PathBuf> {
    let source = workspace::root().join("qemu/xtask/programs").join(name).with_extension("rs");
    let program = workspace::output_dir()?.join(name);
    let mut rustc = rust::rustc();
    rustc.args(["--edition", "2024", "--target", rust::BARE_METAL]);
    rustc.args(["-C", "panic=abort", "-C", "opt-level=s", "-C", "relocation-model=static", "-C", "strip=symbols"]);
    process::output(rustc.arg("-o").arg(&program).arg(source))?;
    Ok(program)
}

/// `cargo xtask run --exec` as a user calls it.
fn exit_status() -> Result<()> {
    for (command, expected) in [("exit 3", 3), ("false", 1), ("uname -a", 0)] {
        let mut xtask = Command::new(std::env::current_exe()?);
        xtask.current_dir(workspace::root()).args(["run", "--append", "quiet", "--timeout", "300", "--exec", command]);
        let output = xtask.output().context("cannot start xtask")?;
        let status = output.status.code();
        ensure!(status == Some(expected), "{command}: status {status:?}, not {expected}");
        let console = String::from_utf8_lossy(&output.stdout);
        ensure!(!console.contains("RAVELIN-EXIT"), "{command}: the marker is shown");
        ensure!(expected != 0 || console.contains("aarch64"), "{command}: no output");
    }
    Ok(())
}

fn reset() -> Result<()> {
    let booted = boot("reset", &USUAL, |options| options.exec = Some("reboot -f".into()))?;
    ensure!(booted.outcome == Outcome::Ended(0), "{:?}", booted.outcome);
    Ok(())
}

/// The hypervisor refuses to boot and names the reason.
fn refused(reasons: &[&str], change: impl FnOnce(&mut Options)) -> Result<()> {
    let booted = boot(&format!("refused {}", reasons.join(" ")), &USUAL, change)?;
    ensure!(booted.outcome == Outcome::Failed, "{:?} instead of a refusal", booted.outcome);
    let message = booted.console.lines().find(|line| line.starts_with("ravelin: cannot boot"));
    let message = message.context("no message")?;
    ensure!(reasons.iter().all(|reason| message.contains(reason)), "{message:?} does not name the reason");
    Ok(())
}

/// A line for each CPU model and number, a column for each size of RAM.
fn print_matrix(rows: &[(Config, &str, u64)]) {
    println!("\n{:<28}{}", "", SIZES.map(|size| format!("{size:>12}")).concat());
    let mut lines: Vec<(String, Vec<String>)> = Vec::new();
    for (config, verdict, seconds) in rows {
        let head = format!("{} {} x{}", config.kernel, config.cpu, config.smp);
        if lines.last().is_none_or(|line| line.0 != head) {
            lines.push((head, vec![String::new(); SIZES.len()]));
        }
        if let (Some(line), Some(column)) = (lines.last_mut(), SIZES.iter().position(|size| *size == config.memory)) {
            line.1[column] = format!("{verdict} {seconds} s");
        }
    }
    for (head, cells) in lines {
        println!("{head:<28}{}", cells.iter().map(|cell| format!("{cell:>12}")).collect::<String>());
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
    }

    #[test]
    fn what_the_host_prints() {
        let mut console = String::from("cpus 4\ntainted 0\niomem 40000000-bf9fffff : System RAM\n");
        console += "iomem   40200000-41ffffff : System RAM\niomem 09000000-09000fff : pl011@9000000\n";
        for line in 0..60 {
            console += &format!("dmesg <{}>[    0.{line:06}] message {line}\n", if line == 7 { 4 } else { 30 });
        }
        let observed = Observed::parse(&console).unwrap();
        assert_eq!((observed.cpus, observed.tainted.as_str()), (4, "0"));
        assert_eq!(observed.ram.first(), Some(&(0x4000_0000..0xbfa0_0000)));
        assert_eq!(observed.ram.len(), 1);
        assert_eq!(observed.normalized(|level| level <= 4), BTreeSet::from(["message #".into()]));
        assert_eq!(observed.messages[7], (4, "message 7".into()));
        assert_eq!(observed.messages[8].0, 6);
        assert!(Observed::parse("cpus 4").is_err());
    }

    #[test]
    fn complaints_are_seen() {
        let observed = |tainted: &str, text: &str| Observed {
            cpus: 1,
            tainted: tainted.into(),
            ram: Vec::new(),
            messages: vec![(4, text.into())],
        };
        assert!(no_complaint(&observed("0", "fine")).is_ok());
        assert!(no_complaint(&observed("128", "fine")).is_err());
        assert!(no_complaint(&observed("0", "Internal error: synchronous external abort")).is_err());
    }

    #[test]
    fn numbers_do_not_count() {
        assert_eq!(normalize("CPU1: Booted [0x0000000001 0x410fd0b1] in 20ms"), "CPU1: Booted [# #] in #");
        assert_eq!(normalize("added face deadbeef0"), "added face #");
    }

    #[test]
    fn the_carve_out_is_read_from_the_console() {
        let console = "ravelin: version 0.1.0\r\nravelin: keeps 0xbfa00000-0xbfffffff (6144 KiB)\r\n";
        assert_eq!(carve_out(console).unwrap(), 0xbfa0_0000..0xc000_0000);
        assert!(carve_out("nothing").is_err());
    }
}
