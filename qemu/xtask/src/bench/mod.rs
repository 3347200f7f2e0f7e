//! `cargo xtask bench`: counts what the hypervisor costs and prints it beside the targets. docs/benchmarks.md describes
//! the method.

mod baseline;
mod contention;
mod costs;
mod event;
mod growth;
mod linux;
mod memory;
mod plot;
mod plots;
mod profile;
mod report;
mod schemes;
mod side_by_side;
mod tables;
mod workloads;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, ValueEnum};

use crate::image::{self, BUDGET, Variant};
use crate::qemu::{Outcome, Scratch};
use crate::run::{self, Ready};
use crate::{process, workspace};
use baseline::Rows;
use costs::Model;
use event::Event;
use report::Report;

/// Sizes of RAM in MiB, and what pKVM reserves in them, in MiB.
const MEMORY: [(u64, Option<f64>); 7] = [
    (512, Some(8.0)),
    (1024, Some(12.0)),
    (2048, Some(18.0)),
    (4096, Some(30.0)),
    (8192, Some(54.0)),
    (16384, None),
    (65536, None),
];

/// Size of RAM in MiB for everything that is measured once.
const USUAL_MEMORY: u64 = 2048;

/// The payload's tests that measure.
const CALLS: &str = "bench.calls";
const GUESTS: &str = "bench.guests";

/// The most memory that a CPU should take: 12 KiB.
const CPU_BUDGET: f64 = 12288.0;

/// How long a machine may run; counting makes it several times slower, and several at once share this machine.
const TIMEOUT: Duration = Duration::from_secs(900);

/// Options of `bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Also write the numbers to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare what is counted quickly with tests/bench/baseline.json, and fail if a count has grown by more than 5 %
    #[arg(long)]
    check: bool,
    /// Count only this part
    #[arg(long, value_name = "PART", conflicts_with_all = ["check", "plots", "from", "profile"])]
    only: Option<Part>,
    /// Also draw the numbers into DIR, as SVG files, beside the numbers that are drawn
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Take the numbers of FILE, which --json or --plots has written, and count nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "check", "profile"])]
    from: Option<PathBuf>,
    /// Turn counts into cycles by the figures in FILE, in place of those in qemu/xtask/src/bench/costs.toml
    #[arg(long, value_name = "FILE", conflicts_with_all = ["check", "profile"])]
    costs: Option<PathBuf>,
    /// Print instead in which functions of the hypervisor the instructions are executed
    #[arg(long, conflicts_with_all = ["json", "check", "plots"])]
    profile: bool,
}

/// What is counted, beside what `check` compares, in the order of the report.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Part {
    /// Conversions on several CPUs.
    Contention,
    /// Linux as the host, idle and busy.
    Host,
    /// Boots of Linux.
    Boots,
    /// The host's work.
    Workloads,
    /// The same guest beside pKVM's.
    SideBySide,
    /// Output of guests, by copies and in place.
    Schemes,
    /// Growth with pages, VMs and RAM.
    Growth,
}

impl Options {
    /// Draws the numbers, if that is wanted.
    fn draw(&self, rows: &Rows) -> Result<()> {
        self.plots.as_deref().map_or(Ok(()), |dir| plots::write(dir, rows))
    }
}

/// `cargo xtask bench`.
pub(crate) fn bench(options: &Options) -> Result<ExitCode> {
    let model = Model::load(options.costs.as_deref())?;
    if let Some(numbers) = &options.from {
        let rows = baseline::load(numbers)?;
        print!("{}", model.table(&rows));
        options.draw(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    let bench = Bench::new()?;
    if options.profile {
        bench.profile()?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = match options.only {
        _ if options.check => bench.measure(&[USUAL_MEMORY])?,
        None => bench.measure_all()?,
        Some(part) => {
            let mut report = Report::default();
            bench.part(part, &mut report)?;
            report
        }
    };
    let rows = report.rows();
    print!("{}", report.text);
    if let Some(path) = &options.json {
        baseline::save(path, &rows)?;
    }
    options.draw(&rows)?;
    if options.check {
        println!("\n{}", compare(&report)?);
    } else if options.only.is_none() {
        print!("{}", model.table(&rows));
    }
    Ok(ExitCode::SUCCESS)
}

/// Compares what is counted quickly with the baseline, and says how many counts there are.
pub(crate) fn check() -> Result<String> {
    compare(&Bench::new()?.measure(&[USUAL_MEMORY])?)
}

fn compare(report: &Report) -> Result<String> {
    baseline::compare(&baseline::load(&workspace::root().join(baseline::FILE))?, &report.rows())
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
    fn new() -> Result<Self> {
        Ok(Self { plugin: build_plugin()?, payload: image::payload()?, guest: image::guest()? })
    }

    /// Counts everything.
    fn measure_all(&self) -> Result<Report> {
        let mut report = self.measure(&MEMORY.map(|(size, _)| size))?;
        Part::value_variants().iter().try_for_each(|part| self.part(*part, &mut report))?;
        Ok(report)
    }

    fn part(&self, part: Part, report: &mut Report) -> Result<()> {
        match part {
            Part::Contention => self.contention(report)?,
            Part::Host => {
                report.section("Linux as the host, 2 CPUs: entries into EL2 without PSCI idle calls");
                self.host(report)?;
            }
            Part::Boots => self.boots(report)?,
            Part::Workloads => self.workloads(report)?,
            Part::SideBySide => self.side_by_side(report)?,
            Part::Schemes => self.schemes(report)?,
            Part::Growth => self.growth(report)?,
        }
        report.end();
        Ok(())
    }

    /// Counts what the payload shows, in RAM of these sizes in MiB, in ascending order.
    fn measure(&self, sizes_of_memory: &[u64]) -> Result<Report> {
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

        let calls = self.twice(CALLS)?;
        let guests = self.twice(GUESTS)?;
        let mut starts = Vec::new();
        for &memory in sizes_of_memory {
            let other = if memory == USUAL_MEMORY { None } else { Some(self.payload(memory, CALLS)?) };
            let run = other.as_ref().unwrap_or(&calls);
            let carve_out = run.carve_out.context("the payload has found no carve-out")?;
            starts.push((memory, run.start.clone(), carve_out as f64 / f64::from(1 << 20)));
        }
        report.section("Carve-out, MiB");
        for (memory, _, carve_out) in &starts {
            let pkvm = MEMORY.iter().find(|(size, _)| size == memory).and_then(|(_, pkvm)| *pkvm);
            report.add(format!("carve-out.{memory}M"), *carve_out).target(carve_out_budget(*memory)).pkvm = pkvm;
        }
        report.section("Start-up of the first CPU, EL2 instructions and entries until the host's first");
        for (memory, start, _) in &starts {
            report.add(format!("start.{memory}M"), start.get("el2.instructions") as f64);
            report.add(format!("start-entries.{memory}M"), start.sum("entry.") as f64);
        }
        // From 1 GiB on.
        if let [_, (one, of_one, _), .., (most, of_most, _)] = &starts[..] {
            let more = of_most.get("el2.instructions") as f64 - of_one.get("el2.instructions") as f64;
            report.add("start.growth-per-GiB", more / ((most - one) as f64 / 1024.0));
        }
        report.calls("EL2 instructions", &calls.calls)?;

        report.section("Memory of EL2 for guests, bytes");
        for [vcpus, vm, vcpu] in &guests.sizes {
            let (pkvm_vm, pkvm_vcpu) = memory::pkvm_vm(*vcpus);
            report.add(format!("guests.vm-of-{vcpus}"), (vm * 4096) as f64).pkvm(pkvm_vm);
            report.add(format!("guests.vcpu-of-{vcpus}"), (vcpu * 4096) as f64).pkvm(pkvm_vcpu);
        }
        report.calls("Guests, EL2 instructions", &guests.calls)?;
        report.blocks(&guests.calls)?;
        self.memory(&mut report)?;
        Ok(report)
    }

    /// Runs a test of the payload twice, in the usual RAM.
    fn twice(&self, test: &str) -> Result<PayloadRun> {
        let (first, second) = (self.payload(USUAL_MEMORY, test)?, self.payload(USUAL_MEMORY, test)?);
        ensure!(first.calls == second.calls, "two runs of {test} have different counts");
        Ok(first)
    }

    fn payload_options(&self, memory: u64, test: &str) -> run::Options {
        run::Options {
            cpu: Some("cortex-a72".into()),
            smp: Some(1),
            memory: Some(format!("{memory}M")),
            host_image: Some(self.payload.display().to_string()),
            host_initrd: Some(self.guest.clone()),
            append: Some(format!("test={test}")),
            qemu_arg: memory_backend(memory).to_vec(),
            ..run::Options::default()
        }
    }

    /// Runs a test of the payload, which must pass: a machine ends in the same way if it does not.
    fn run_payload(&self, options: &run::Options, plugin_option: &str) -> Result<(String, Vec<Event>)> {
        let (console, events) = self.run(options, plugin_option, Outcome::Ended(0))?;
        ensure!(console.contains(" 0 failed"), "the test has failed; the console:\n{console}");
        Ok((console, events))
    }

    /// Runs a test of the payload in that many MiB of RAM.
    fn payload(&self, memory: u64, test: &str) -> Result<PayloadRun> {
        let (console, events) = self.run_payload(&self.payload_options(memory, test), "")?;
        let words = |line: &str, first: &str| -> Option<Vec<String>> {
            Some(line.trim().strip_prefix(first)?.strip_prefix(' ')?.split(' ').map(str::to_owned).collect())
        };
        let carve_out = console.lines().find_map(|line| words(line, "bench-carve-out")?.first()?.parse().ok());
        let sizes = console.lines().filter_map(|line| words(line, "bench-vm")).map(|words| {
            let numbers = words.iter().map(|word| word.parse()).collect::<Result<Vec<u64>, _>>()?;
            numbers.try_into().map_err(|words| anyhow!("the payload says {words:?} of the size of VMs"))
        });
        let calls = measurements(&console, &events)?.into_iter().map(|(label, counts)| {
            let [name, pages, round] = label.split(' ').collect::<Vec<_>>()[..] else {
                bail!("the payload says {label:?}")
            };
            let mut counts = counts.clone();
            counts.fields.remove("nanoseconds"); // the only field that differs from run to run
            Ok(Call { name: name.into(), pages: pages.parse()?, again: round != "0", counts })
        });
        Ok(PayloadRun {
            start: events.iter().find(|event| event.kind == "first-el1").context("EL1 was never reached")?.clone(),
            carve_out,
            sizes: sizes.collect::<Result<_>>()?,
            calls: calls.collect::<Result<_>>()?,
        })
    }

    /// Runs a machine with the counter and returns its console and the counter's report.
    fn run(&self, options: &run::Options, plugin_option: &str, expected: Outcome) -> Result<(String, Vec<Event>)> {
        let mut options = options.clone();
        let scratch = Scratch::new()?;
        let counts = scratch.path("counts.txt");
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

/// What a CPU has executed between a mark 0 and a mark 1 each, with the names that the console has in lines `bench NAME`.
fn measurements<'a>(console: &'a str, events: &'a [Event]) -> Result<Vec<(&'a str, &'a Event)>> {
    named(console, events, "mark")
}

/// The same from events of that kind: `mark-all` has what all CPUs have executed.
fn named<'a>(console: &'a str, events: &'a [Event], kind: &str) -> Result<Vec<(&'a str, &'a Event)>> {
    let names: Vec<_> = console.lines().filter_map(|line| line.trim().strip_prefix("bench ")).collect();
    let counts: Vec<_> = events.iter().filter(|event| event.kind == kind && event.get("number") == 1).collect();
    ensure!(
        names.len() == counts.len(),
        "{} names, {} measurements; the console:\n{console}",
        names.len(),
        counts.len()
    );
    Ok(names.into_iter().zip(counts).collect())
}

/// QEMU's arguments for RAM of that many MiB, which may be more than this machine has: what is not used takes none.
fn memory_backend(memory: u64) -> [String; 4] {
    let backend = format!("memory-backend-ram,id=ram,size={memory}M,reserve=off");
    ["-object", &backend, "-machine", "memory-backend=ram"].map(str::to_owned)
}

/// The plugin, built for this machine.
fn build_plugin() -> Result<PathBuf> {
    process::run(process::cargo().args(["build", "--release", "--package", "ravelin-counter"]))?;
    Ok(workspace::target_dir()?.join("release/libravelin_counter.so"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_of_the_carve_out_grows_with_ram() {
        assert_eq!(carve_out_budget(512), 3.125);
        assert_eq!(carve_out_budget(8192), 20.0);
    }
}
