//! `cargo xtask bench`: counts what the hypervisor costs and prints it beside the targets. docs/benchmarks.md describes
//! the method.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use object::{Object, ObjectSegment, ObjectSymbol};

use crate::image::{self, BUDGET, Variant};
use crate::initramfs::ExtraFile;
use crate::qemu::{self, Outcome};
use crate::run::{self, Ready};
use crate::symbols::Symbols;
use crate::{process, workspace};

/// Sizes of RAM in MiB, and what pKVM reserves in them, in MiB.
const MEMORY: [(u64, Option<f64>); 6] =
    [(512, Some(8.0)), (1024, Some(12.0)), (2048, Some(18.0)), (4096, Some(30.0)), (8192, Some(54.0)), (16384, None)];

/// Size of RAM in MiB for everything that is measured once.
const USUAL_MEMORY: u64 = 2048;

/// The payload's tests that measure.
const CALLS: &str = "bench.calls";
const GUESTS: &str = "bench.guests";

/// The most memory that a CPU should take: 12 KiB.
const CPU_BUDGET: f64 = 12288.0;

/// How long a machine may run; counting makes it several times slower.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Seconds that the host is watched.
const WINDOW: u32 = 5;

/// The host's command: warms the memory up by using nearly all of it once, then marks the beginning and the end of an idle
/// and of a busy time.
const HOST_SCRIPT: &str = r#"
mount -o remount,size=100% /tmp
count=$(awk '/^MemFree/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
mark
dd if=/dev/zero of=/tmp/fill bs=1M count=$count 2>/dev/null
rm /tmp/fill
sleep 1
mark
sleep WINDOW
mark
for cpu in $(seq $(nproc)); do
    while :; do :; done &
    loops="$loops $!"
done
sleep 1
mark
sleep WINDOW
mark
kill $loops
"#;

/// Options of `bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Also write the numbers to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Print instead in which functions of the hypervisor the instructions are executed
    #[arg(long, conflicts_with = "json")]
    profile: bool,
}

/// `cargo xtask bench`.
pub(crate) fn bench(options: &Options) -> Result<ExitCode> {
    let bench = Bench { plugin: build_plugin()?, payload: image::payload()?, guest: image::guest()? };
    if options.profile {
        bench.profile()?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut report = Report::default();

    let sizes = image::build(Variant::default())?.sizes;
    report.section("Image, bytes");
    report.add("image.text", sizes.text as f64);
    report.add("image.rodata", sizes.rodata as f64);
    report.add("image.data", sizes.data as f64);
    report.add("image.total", sizes.total() as f64).target(BUDGET as f64).pkvm(151_552.0);
    report.add("image.bss", sizes.bss as f64);
    let per_cpu = ravelin_platform::CPU_BLOCK_SIZE as f64;
    report.add("image.per-cpu", per_cpu).target(CPU_BUDGET).pkvm(14512.0 + 4096.0);

    let mut starts = Vec::new();
    let mut calls = Vec::new();
    for (memory, pkvm) in MEMORY {
        let measured = bench.payload(memory, CALLS)?;
        let carve_out = measured.carve_out.context("the payload has found no carve-out")?;
        starts.push((memory, measured.start, carve_out as f64 / f64::from(1 << 20), pkvm));
        if memory == USUAL_MEMORY {
            let repeated = bench.payload(memory, CALLS)?;
            ensure!(measured.calls == repeated.calls, "two runs of the payload have different counts");
            calls = measured.calls;
        }
    }
    let guests = bench.payload(USUAL_MEMORY, GUESTS)?;
    let repeated = bench.payload(USUAL_MEMORY, GUESTS)?;
    ensure!(guests.calls == repeated.calls, "two runs of the guests have different counts");
    report.section("Carve-out, MiB");
    for (memory, _, carve_out, pkvm) in &starts {
        let number = report.add(format!("carve-out.{memory}M"), *carve_out).target(carve_out_budget(*memory));
        number.pkvm = *pkvm;
    }
    report.section("Start-up of the first CPU, EL2 instructions until the host's first");
    for (memory, start, ..) in &starts {
        report.add(format!("start.{memory}M"), start.get("el2.instructions") as f64);
    }
    let of = |index: usize| starts[index].1.get("el2.instructions") as f64;
    let growth = (of(MEMORY.len() - 1) - of(1)) / ((MEMORY[MEMORY.len() - 1].0 - MEMORY[1].0) as f64 / 1024.0);
    report.add("start.growth-per-GiB", growth);

    report.calls("EL2 instructions", &calls)?;

    report.section("Memory of EL2 for guests, bytes");
    for [vcpus, vm, vcpu] in &guests.sizes {
        report.add(format!("guests.vm-of-{vcpus}"), (vm * 4096) as f64);
        report.add(format!("guests.vcpu-of-{vcpus}"), (vcpu * 4096) as f64);
    }
    report.calls("Guests, EL2 instructions", &guests.calls)?;
    report.blocks(&guests.calls)?;

    report.section("Linux as the host, 2 CPUs: entries into EL2 without PSCI idle calls");
    bench.host(&mut report)?;

    report.end();
    print!("{}", report.text);
    if let Some(path) = &options.json {
        fs::write(path, report.json()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// 2.25 MiB per GiB and 2 MiB.
fn carve_out_budget(memory: u64) -> f64 {
    memory as f64 / 1024.0 * 2.25 + 2.0
}

/// What is built once.
struct Bench {
    plugin: PathBuf,
    payload: PathBuf,
    guest: PathBuf,
}

/// What a run of the payload shows.
struct PayloadRun {
    /// Counts until the first instruction at EL1.
    start: Event,
    /// Size of the carve-out in bytes, if the payload says it.
    carve_out: Option<u64>,
    /// For VMs of so many vCPUs, how many pages a VM takes and how many each vCPU.
    sizes: Vec<[u64; 3]>,
    calls: Vec<Call>,
}

/// A measurement of the payload.
#[derive(Clone, Debug, PartialEq)]
struct Call {
    name: String,
    /// Pages of the range; 0 for calls without one.
    pages: u64,
    /// Whether the call met memory that was used before.
    again: bool,
    counts: Event,
}

impl Bench {
    fn payload_options(&self, memory: u64, test: &str) -> run::Options {
        run::Options {
            cpu: Some("cortex-a72".into()),
            smp: Some(1),
            memory: Some(format!("{memory}M")),
            host_image: Some(self.payload.display().to_string()),
            host_initrd: Some(self.guest.clone()),
            append: Some(format!("test={test}")),
            ..run::Options::default()
        }
    }

    /// Runs a test of the payload in that many MiB of RAM.
    fn payload(&self, memory: u64, test: &str) -> Result<PayloadRun> {
        let (console, events) = self.run(&self.payload_options(memory, test), "", Outcome::Ended(0))?;
        let words = |line: &str, first: &str| -> Option<Vec<String>> {
            Some(line.trim().strip_prefix(first)?.strip_prefix(' ')?.split(' ').map(str::to_owned).collect())
        };
        let carve_out = console.lines().find_map(|line| words(line, "bench-carve-out")?.first()?.parse().ok());
        let sizes = console.lines().filter_map(|line| words(line, "bench-vm")).map(|words| {
            let numbers = words.iter().map(|word| word.parse()).collect::<Result<Vec<u64>, _>>()?;
            numbers.try_into().map_err(|words| anyhow!("the payload says {words:?} of the size of VMs"))
        });
        let labels: Vec<_> = console.lines().filter_map(|line| words(line, "bench")).collect();
        // Each measurement lies between a mark 0 and a mark 1.
        let counts: Vec<_> = events.iter().filter(|event| event.kind == "mark" && event.get("number") == 1).collect();
        ensure!(labels.len() == counts.len(), "{} labels for {} measurements", labels.len(), counts.len());
        let calls = labels.iter().zip(counts).map(|(label, counts)| {
            let [name, pages, round] = &label[..] else { bail!("the payload says {label:?}") };
            let mut counts = counts.clone();
            counts.fields.remove("nanoseconds"); // the only field that differs from run to run
            Ok(Call { name: name.clone(), pages: pages.parse()?, again: round != "0", counts })
        });
        Ok(PayloadRun {
            start: events.iter().find(|event| event.kind == "first-el1").context("EL1 was never reached")?.clone(),
            carve_out,
            sizes: sizes.collect::<Result<_>>()?,
            calls: calls.collect::<Result<_>>()?,
        })
    }

    /// Watches Linux.
    fn host(&self, report: &mut Report) -> Result<()> {
        let options = run::Options {
            smp: Some(2),
            memory: Some(format!("{USUAL_MEMORY}M")),
            exec: Some(HOST_SCRIPT.replace("WINDOW", &WINDOW.to_string())),
            extra_files: vec![ExtraFile { path: "bin/mark".into(), contents: mark_program() }],
            ..run::Options::default()
        };
        let (_, events) = self.run(&options, "", Outcome::Status(0))?;
        let second = events.iter().find(|event| event.kind == "first-el1" && event.get("cpu") == 1);
        let second = second.context("the second CPU has not started")?.get("el2.instructions");
        report.add("host.start-of-second-cpu.instructions", second as f64);
        let marks: Vec<_> = events.iter().filter(|event| event.kind == "mark-all").collect();
        let [boot, warm, idle, busy_start, busy] = marks[..] else { bail!("{} marks, not 5", marks.len()) };

        report.add("host.boot.entries", host_entries(boot) as f64);
        report.add("host.warm-up.entries", host_entries(warm) as f64);
        for (name, before, window) in [("idle", warm, idle), ("busy", busy_start, busy)] {
            let seconds = (window.get("nanoseconds") - before.get("nanoseconds")) as f64 / 1e9;
            report.add(format!("host.{name}.entries-per-second"), host_entries(window) as f64 / seconds).target(0.0);
            let idle_calls = PSCI_CPU_SUSPEND.iter().map(|call| window.get(call)).sum::<u64>();
            report.add(format!("host.{name}.psci-idle-calls-per-second"), idle_calls as f64 / seconds);
        }
        for (name, window) in [("boot", boot), ("warm-up", warm), ("idle", idle), ("busy", busy)] {
            for (key, count) in window.fields.iter().filter(|(key, _)| key.starts_with("class.")) {
                report.add(format!("host.{name}.{key}"), *count as f64);
            }
        }
        Ok(())
    }

    /// Prints where the instructions are executed.
    fn profile(&self) -> Result<()> {
        for test in [CALLS, GUESTS] {
            self.profile_test(test)?;
        }
        Ok(())
    }

    fn profile_test(&self, test: &str) -> Result<()> {
        let options = self.payload_options(USUAL_MEMORY, test);
        let ready = Ready::new(&options)?;
        let load_address = qemu::prepare(&ready.boot, &ready.scratch)?.load_address;
        let elf = &ready.boot.hypervisor.as_ref().context("there is no hypervisor")?.0.elf;
        let functions = Functions::load(elf, load_address)?;

        let (console, events) = self.run(&options, ",profile=on", Outcome::Ended(0))?;
        // The first one is the start's. Later the vectors may be those that are in place for guests.
        let vectors =
            events.iter().find(|event| event.kind == "profile").context("there is no profile")?.get("vectors");
        let mut labels = console.lines().filter_map(|line| line.trim().strip_prefix("bench "));
        for pair in events.windows(2).filter(|pair| pair[0].kind == "profile") {
            let title = match pair[1].get("number") {
                _ if pair[1].kind == "first-el1" => "start",
                1 => labels.next().context("more measurements than labels")?,
                _ => continue,
            };
            functions.print(title, &pair[0], vectors);
        }
        Ok(())
    }

    /// Runs a machine with the counter and returns its console and the counter's report.
    fn run(&self, options: &run::Options, plugin_option: &str, expected: Outcome) -> Result<(String, Vec<Event>)> {
        let mut options = options.clone();
        let counts = workspace::output_dir()?.join("counts.txt");
        let comma = |path: &Path| path.display().to_string().replace(',', ",,");
        options.qemu_arg.push("-plugin".into());
        options.qemu_arg.push(format!("file={},out={}{plugin_option}", comma(&self.plugin), comma(&counts)));
        let mut console = Vec::new();
        let outcome = Ready::new(&options)?.run(&mut console, Some(TIMEOUT))?;
        let console = String::from_utf8_lossy(&console).into_owned();
        ensure!(outcome == expected, "{outcome:?} instead of {expected:?}; the console:\n{console}");
        let report = fs::read_to_string(&counts).with_context(|| format!("no counts in {}", counts.display()))?;
        Ok((console, report.lines().map(Event::parse).collect::<Result<_>>()?))
    }
}

/// Names the hypervisor's functions by the addresses that they are executed at.
struct Functions {
    symbols: Symbols,
    /// Where QEMU loads the image; later it runs from a copy elsewhere, which has VBAR_EL2.
    load_address: u64,
    /// Offset of the vectors in the image.
    vectors: u64,
    size: u64,
}

impl Functions {
    fn load(elf: &Path, load_address: u64) -> Result<Self> {
        let bytes = fs::read(elf).with_context(|| elf.display().to_string())?;
        let file = object::File::parse(&*bytes).with_context(|| elf.display().to_string())?;
        let vectors = file.symbol_by_name("vectors").context("the image has no vectors")?.address();
        let size = file.segments().map(|segment| segment.address() + segment.size()).max().unwrap_or(0);
        Ok(Self { symbols: Symbols::load(elf)?, load_address, vectors, size })
    }

    /// Prints the functions that most instructions were executed in.
    fn print(&self, title: &str, profile: &Event, vectors: u64) {
        let copy = vectors.wrapping_sub(self.vectors);
        let mut functions = BTreeMap::<String, u64>::new();
        for (address, count) in &profile.fields {
            let Some(digits) = address.strip_prefix("0x") else { continue };
            let address = u64::from_str_radix(digits, 16).unwrap_or(0);
            let offset = [copy, self.load_address]
                .map(|base| address.wrapping_sub(base))
                .into_iter()
                .find(|offset| *offset < self.size);
            let name = offset.map_or_else(|| "outside of the image".into(), |offset| self.name(offset));
            *functions.entry(name).or_default() += count;
        }
        let total: u64 = functions.values().sum();
        println!("{title}: {}", digits(total as f64));
        let mut functions: Vec<_> = functions.into_iter().collect();
        functions.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        for (name, count) in functions.iter().take(12).filter(|(_, count)| count * 50 >= total) {
            println!("  {:>12} {:>3} %  {name}", digits(*count as f64), count * 100 / total);
        }
    }

    /// The function at an offset that is not inlined into another one, or the file of what is assembly.
    fn name(&self, offset: u64) -> String {
        let frame = self.symbols.describe(offset).pop().unwrap_or_default();
        match frame.rsplit_once(" at ") {
            Some(("(unknown function)", place)) => place.split(':').next().unwrap_or(place).to_owned(),
            Some((function, _)) => function.to_owned(),
            None => frame,
        }
    }
}

/// The counter's names of CPU_SUSPEND, 32-bit and 64-bit.
const PSCI_CPU_SUSPEND: [&str; 2] = ["call.0x84000001", "call.0xc4000001"];

/// Entries into EL2 that are not the host's way to say that it has nothing to do.
fn host_entries(counts: &Event) -> u64 {
    counts.sum("entry.") - PSCI_CPU_SUSPEND.iter().map(|call| counts.get(call)).sum::<u64>()
}

/// The plugin, built for this machine.
fn build_plugin() -> Result<PathBuf> {
    process::run(process::cargo().args(["build", "--release", "--package", "ravelin-counter"]))?;
    Ok(workspace::target_dir()?.join("release/libravelin_counter.so"))
}

/// A static Linux program for arm64 that executes mark 0 and ends with status 0.
fn mark_program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const CODE: [u32; 4] = [
        0xd503_281f, // hint #0x40
        0xd280_0000, // mov x0, #0
        0xd280_0ba8, // mov x8, #93, exit
        0xd400_0001, // svc #0
    ];
    let (header, program_header) = (64u64, 56u64);
    let size = header + program_header + CODE.len() as u64 * 4;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"); // 64 bits, little endian, version 1
    elf.extend([2u16, 183].into_iter().flat_map(u16::to_le_bytes)); // ET_EXEC, EM_AARCH64
    elf.extend(1u32.to_le_bytes());
    elf.extend([BASE + header + program_header, header, 0].into_iter().flat_map(u64::to_le_bytes)); // entry, headers
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 1, 64, 0, 0].into_iter().flat_map(u16::to_le_bytes)); // sizes and counts of headers
    elf.extend([1u32, 5].into_iter().flat_map(u32::to_le_bytes)); // PT_LOAD, readable and executable
    elf.extend([0, BASE, BASE, size, size, 0x1_0000].into_iter().flat_map(u64::to_le_bytes));
    elf.extend(CODE.into_iter().flat_map(u32::to_le_bytes));
    elf
}

/// One line of the counter's report; `qemu/counter/src/lib.rs` describes them.
#[derive(Clone, Debug, Default, PartialEq)]
struct Event {
    kind: String,
    fields: BTreeMap<String, u64>,
}

impl Event {
    fn parse(line: &str) -> Result<Self> {
        let mut words = line.split(' ');
        let kind = words.next().unwrap_or_default().to_owned();
        let field = |word: &str| {
            let (key, value) = word.split_once('=')?;
            Some((key.to_owned(), value.parse().ok()?))
        };
        let fields = words.map(|word| field(word).with_context(|| format!("{word:?} in the counts")));
        Ok(Self { kind, fields: fields.collect::<Result<_>>()? })
    }

    /// A field; counters that are zero are left out of the report.
    fn get(&self, key: &str) -> u64 {
        self.fields.get(key).copied().unwrap_or(0)
    }

    /// The sum of all fields whose key begins so.
    fn sum(&self, prefix: &str) -> u64 {
        self.fields.iter().filter(|(key, _)| key.starts_with(prefix)).map(|(_, value)| value).sum()
    }
}

/// A number of the report.
#[derive(Clone, Debug)]
struct Number {
    name: String,
    value: f64,
    /// The most it should be.
    target: Option<f64>,
    /// pKVM's number.
    pkvm: Option<f64>,
}

impl Number {
    fn target(&mut self, target: f64) -> &mut Self {
        self.target = Some(target);
        self
    }

    fn pkvm(&mut self, pkvm: f64) -> &mut Self {
        self.pkvm = Some(pkvm);
        self
    }

    fn missed(&self) -> bool {
        self.target.is_some_and(|target| self.value > target)
    }
}

/// The numbers, and what is printed of them.
#[derive(Debug, Default)]
struct Report {
    numbers: Vec<Number>,
    text: String,
    /// Numbers that have been printed.
    printed: usize,
}

impl Report {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{line}");
    }

    /// Begins a part of the report.
    fn section(&mut self, title: &str) {
        self.end();
        self.line(format_args!("\n{title:<64}{:>12}{:>12}", "target", "pKVM"));
    }

    /// Adds a number to the present part.
    fn add(&mut self, name: impl Into<String>, value: f64) -> &mut Number {
        self.numbers.push(Number { name: name.into(), value, target: None, pkvm: None });
        let last = self.numbers.len() - 1;
        &mut self.numbers[last]
    }

    /// Prints the numbers added since the last part.
    fn end(&mut self) {
        for index in self.printed..self.numbers.len() {
            let number = self.numbers[index].clone();
            let optional = |value: Option<f64>| value.map_or(String::new(), digits);
            let (value, target, pkvm) = (digits(number.value), optional(number.target), optional(number.pkvm));
            let verdict = if number.missed() { "  MISSED" } else { "" };
            self.line(format_args!("  {:<46}{value:>16}{target:>12}{pkvm:>12}{verdict}", number.name));
        }
        self.printed = self.numbers.len();
    }

    /// Adds a table of calls.
    fn calls(&mut self, title: &str, calls: &[Call]) -> Result<()> {
        self.end();
        self.line(format_args!(
            "\n{:<32}{:>6}{:>10}{:>10}{:>10}{:>8}{:>8}{:>8}{:>6}{:>6}{:>6}{:>6}{:>12}",
            title,
            "pages",
            "first",
            "again",
            "per page",
            "loads",
            "stores",
            "entries",
            "flush",
            "tlbi",
            "dsb",
            "zva",
            "pKVM, page"
        ));
        for first in calls.iter().filter(|call| !call.again) {
            let same = |call: &&Call| call.again && call.name == first.name && call.pages == first.pages;
            let again = calls.iter().find(same).with_context(|| format!("{} was measured once", first.name))?;
            let pages = first.pages.to_string();
            let [instructions, loads, stores, dsb, zva] = ["instructions", "loads", "stores", "dsb", "dc_zva"]
                .map(|counter| again.counts.get(&format!("el2.{counter}")));
            let [tlbi, entries] = ["el2.tlbi.", "entry."].map(|counters| again.counts.sum(counters));
            let flushed = flushes(&again.counts);
            let per_page =
                if first.pages == 0 { String::new() } else { digits(instructions as f64 / first.pages as f64) };
            self.line(format_args!(
                "  {:<30}{:>6}{:>10}{:>10}{:>10}{:>8}{:>8}{:>8}{:>6}{:>6}{:>6}{:>6}{:>12}",
                first.name,
                if first.pages == 0 { "" } else { &pages },
                digits(first.counts.get("el2.instructions") as f64),
                digits(instructions as f64),
                per_page,
                digits(loads as f64),
                digits(stores as f64),
                entries,
                flushed,
                tlbi,
                dsb,
                zva,
                pkvm_call(&first.name).map_or(String::new(), digits),
            ));
            for (round, call) in [("first", first), ("again", again)] {
                let name = format!("call.{}.{}.{round}", first.name, first.pages);
                for counter in ["instructions", "loads", "stores", "dsb", "isb", "dc_zva"] {
                    let value = call.counts.get(&format!("el2.{counter}"));
                    self.add(format!("{name}.{counter}"), value as f64);
                }
                self.add(format!("{name}.tlbi"), call.counts.sum("el2.tlbi.") as f64);
                self.add(format!("{name}.flushes"), flushes(&call.counts) as f64);
                self.add(format!("{name}.entries"), call.counts.sum("entry.") as f64);
            }
        }
        self.printed = self.numbers.len();
        Ok(())
    }

    /// Compares 512 pages as a block with 8 single pages.
    fn blocks(&mut self, calls: &[Call]) -> Result<()> {
        self.section("512 pages as a block, EL2 instructions; the target is less than 8 single pages");
        for block in calls.iter().filter(|call| call.again && call.pages == 512) {
            let Some(name) = block.name.strip_suffix("-blocks") else { continue };
            let single = calls.iter().find(|call| call.again && call.pages == 1 && call.name == name);
            let single = single.with_context(|| format!("{name} of one page was not measured"))?;
            let [block, single] = [block, single].map(|call| call.counts.get("el2.instructions") as f64);
            self.add(format!("{name}.block"), block).target(8.0 * single - 1.0);
        }
        self.end();
        Ok(())
    }

    /// All numbers as one JSON object, in the order of the report.
    fn json(&self) -> String {
        let mut lines = Vec::new();
        for number in &self.numbers {
            let value = (number.value * 1000.0).round() / 1000.0;
            // Names are ASCII without quotes, so that Rust's quotes are JSON's.
            lines.push(format!("  {:?}: {value}", number.name));
        }
        format!("{{\n{}\n}}\n", lines.join(",\n"))
    }
}

/// Sequences of TLB invalidations in stage 2: each ends with one that covers stage 1, too.
fn flushes(counts: &Event) -> u64 {
    ["vmalle1is", "vmalls12e1is"].map(|kind| counts.get(&format!("el2.tlbi.{kind}"))).into_iter().sum()
}

/// pKVM's EL2 instructions for the nearest operation on one page; docs/benchmarks.md says which.
fn pkvm_call(name: &str) -> Option<f64> {
    match name {
        "REVISION" | "FEATURES" => Some(194.0),
        "SHARE" => Some(2806.0),
        "UNSHARE" => Some(2812.0),
        "pkvm.call" => Some(194.0),
        "pkvm.share" => Some(2806.0),
        "pkvm.unshare" => Some(2812.0),
        "pkvm.touch" => Some(6386.0),
        "pkvm.mmio-load" | "pkvm.mmio-store" => Some(4479.0),
        _ => None,
    }
}

/// The number with commas between thousands, and a fraction if it has one.
fn digits(value: f64) -> String {
    let text = if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") };
    let (whole, fraction) = text.split_once('.').map_or((text.as_str(), None), |(whole, part)| (whole, Some(part)));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        let left = whole.len() - index;
        if index > 0 && left.is_multiple_of(3) && !grouped.ends_with('-') {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    match fraction {
        Some(fraction) => format!("{grouped}.{fraction}"),
        None => grouped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events() {
        let line = "mark number=1 cpu=0 level=1 nanoseconds=12 el2.instructions=194 el2.tlbi.vae2is=1 entry.lower64.sync=3 \
                    entry.lower64.irq=1 call.0xc4000001=2";
        let event = Event::parse(line).unwrap();
        assert_eq!(event.kind, "mark");
        assert_eq!(event.get("el2.instructions"), 194);
        assert_eq!(event.get("el2.loads"), 0);
        assert_eq!(event.sum("entry."), 4);
        assert_eq!(host_entries(&event), 2);
        assert!(Event::parse("mark number").is_err());
        assert!(Event::parse("mark number=x").is_err());
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(digits(0.0), "0");
        assert_eq!(digits(999.0), "999");
        assert_eq!(digits(1_234_567.0), "1,234,567");
        assert_eq!(digits(-1234.5), "-1,234.50");
        assert_eq!(digits(-123.0), "-123");
        assert_eq!(carve_out_budget(512), 3.125);
        assert_eq!(carve_out_budget(8192), 20.0);
    }

    #[test]
    fn a_missed_target_shows() {
        let mut report = Report::default();
        report.section("Things");
        report.add("good", 1.0).target(1.0).pkvm(2.0);
        report.add("bad", 1.5).target(1.0);
        report.end();
        let missed: Vec<_> = report.text.lines().filter(|line| line.ends_with("MISSED")).collect();
        assert_eq!(missed.len(), 1, "{}", report.text);
        assert!(missed[0].trim_start().starts_with("bad "));
        assert_eq!(report.json(), "{\n  \"good\": 1,\n  \"bad\": 1.5\n}\n");
    }

    #[test]
    fn calls_need_both_rounds() {
        let counts = |instructions| {
            Event::parse(&format!("mark el2.instructions={instructions} el2.tlbi.a=1 el2.tlbi.b=2")).unwrap()
        };
        let call = |again, instructions| Call { name: "SHARE".into(), pages: 8, again, counts: counts(instructions) };
        let mut report = Report::default();
        report.calls("Calls", &[call(false, 900), call(true, 800)]).unwrap();
        let line = report.text.lines().last().unwrap().split_whitespace().collect::<Vec<_>>();
        assert_eq!(line, ["SHARE", "8", "900", "800", "100", "0", "0", "0", "0", "3", "0", "0", "2,806"]);
        assert!(report.json().contains("\"call.SHARE.8.again.tlbi\": 3"));
        assert!(Report::default().calls("Calls", &[call(false, 900)]).is_err());
    }

    #[test]
    fn the_mark_program_is_an_executable() {
        let program = mark_program();
        let elf = object::read::elf::ElfFile64::<object::LittleEndian>::parse(&program[..]).unwrap();
        let segment = elf.segments().next().unwrap();
        assert_eq!(segment.size(), program.len() as u64);
        let code = (elf.entry() - segment.address()) as usize;
        assert_eq!(program[code..][..4], 0xd503_281f_u32.to_le_bytes());
    }
}
