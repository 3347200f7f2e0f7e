//! Five ways of output of a protected guest, on Linux with the kernel module: how many instructions, exits and invalidations
//! each transfer takes, and how many when two vCPUs make them at once.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::baseline::Rows;
use super::costs::Model;
use super::event::Event;
use super::plot::{Plot, Series};
use super::report::{Report, digits};
use super::{Bench, USUAL_MEMORY, named};
use crate::module::Kernel;
use crate::qemu::Outcome;
use crate::{programs, run, setup};

/// The host's kernel.
const KERNEL: Kernel = Kernel::LinuxNew;

/// Instructions that a CPU executes before it is another one's turn, where there are two.
const TURN: u32 = 100;

/// What a measurement is of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Load {
    scheme: String,
    /// Bytes of a transfer.
    size: u64,
    /// Transfers at once.
    transfers: u64,
    aligned: bool,
    /// Who does this, if there are two vCPUs.
    who: Option<Who>,
}

/// One of two vCPUs while the other one is idle, or both at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    First,
    Second,
    Both,
}

/// How often it was done, and the instructions by which a vCPU has waited for the other one to be done.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Amount {
    rounds: u64,
    waited: u64,
}

impl Load {
    /// Reads `io.SCHEME.SIZE.TRANSFERS.ALIGNMENT ROUNDS` or `io.SCHEME.SIZE.TRANSFERS.ALIGNMENT.VCPUS ROUNDS WAITED`.
    fn parse(label: &str) -> Result<(Self, Amount)> {
        let parsed = || {
            let words: Vec<_> = label.strip_prefix("io.")?.split(['.', ' ']).collect();
            let (words, who, waited) = match words[..] {
                [scheme, size, transfers, alignment, rounds] => {
                    ([scheme, size, transfers, alignment, rounds], None, "0")
                }
                [scheme, size, transfers, alignment, who, rounds, waited] => {
                    let who = match who {
                        "0" => Who::First,
                        "1" => Who::Second,
                        "both" => Who::Both,
                        _ => return None,
                    };
                    ([scheme, size, transfers, alignment, rounds], Some(who), waited)
                }
                _ => return None,
            };
            let [scheme, size, transfers, alignment, rounds] = words;
            let aligned = match alignment {
                "aligned" => true,
                "unaligned" => false,
                _ => return None,
            };
            let number = |word: &str| word.parse().ok();
            let some = |word: &str| number(word).filter(|&number: &u64| number != 0);
            let load = Self { scheme: scheme.into(), size: number(size)?, transfers: some(transfers)?, aligned, who };
            Some((load, Amount { rounds: some(rounds)?, waited: number(waited)? }))
        };
        parsed().with_context(|| format!("the program says {label:?}"))
    }

    /// Bytes that the guest copies for a transfer: all of them, or those of pages that hold something else besides.
    fn copied(&self) -> u64 {
        match (self.scheme.as_str(), self.aligned) {
            ("bounce", _) => self.size,
            (_, true) => 0,
            (_, false) => {
                let (start, end) = (UNALIGNED, UNALIGNED + self.size);
                let (first, last) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
                if first < last { self.size - (last - first) } else { self.size }
            }
        }
    }
}

const PAGE: u64 = 4096;

/// How far an unaligned buffer is from its page: as the program has it.
const UNALIGNED: u64 = 512;

/// Counts of one transfer, by columns that the cost model knows, and by others:
///
/// * `el0` to `el2`: instructions there;
/// * `tlbi-el1`, `tlbi-el2`: invalidations there, and `flushes`: how many sequences of them at EL2;
/// * `exits` of vCPUs to their host, each of which is more than one of the `entries` into EL2;
/// * `bytes` that are copied, and `copied`: those of them that the guest copies;
/// * `waited`: instructions by which one vCPU has waited for the other one to be done, which are in none of the others.
type Costs = BTreeMap<&'static str, f64>;

/// By load.
type Schemes = BTreeMap<Load, Costs>;

impl Load {
    /// What a transfer costs. Both the guest and the VMM copy.
    fn costs(&self, counts: &Event, amount: Amount) -> Costs {
        let mut columns = counts.columns(0..=2);
        for (level, key) in [("el0", "el0.instructions"), ("el1", "el1.instructions"), ("el2", "el2.instructions")] {
            columns.insert(level, counts.get(key) as f64);
        }
        for (column, prefix) in [("tlbi-el1", "el1.tlbi."), ("tlbi-el2", "el2.tlbi.")] {
            columns.insert(column, counts.sum(prefix) as f64);
        }
        columns.extend([("flushes", counts.flushes() as f64), ("exits", counts.get(VCPU_RUN) as f64)]);
        for column in ["el1", "instructions"] {
            columns.entry(column).and_modify(|count| *count -= amount.waited as f64);
        }
        columns.insert("waited", amount.waited as f64);
        let transfers = amount.rounds * self.transfers * if self.who == Some(Who::Both) { 2 } else { 1 };
        columns.values_mut().for_each(|count| *count /= transfers as f64);
        columns.extend([("copied", self.copied() as f64), ("bytes", (self.copied() + self.size) as f64)]);
        columns
    }

    /// The name of its row, with a word about who does it.
    fn row(&self, who: &str) -> String {
        let Self { scheme, size, transfers, aligned, .. } = self;
        format!("scheme.{scheme}-{transfers}-{}{who}.{size}", if *aligned { "aligned" } else { "unaligned" })
    }

    /// What is printed in front of its costs.
    fn name(&self) -> String {
        let Self { scheme, size, transfers, aligned, .. } = self;
        format!("{scheme} {} x {transfers}{}", digits(*size as f64), if *aligned { "" } else { ", unaligned" })
    }
}

/// The counter's name of the call by which a host enters a vCPU.
const VCPU_RUN: &str = "call.0xc6001016";

impl Bench {
    /// Counts all of them and prints them.
    pub(super) fn schemes(&self, report: &mut Report) -> Result<()> {
        let (one, two) = (self.output(1)?, self.output(2)?);
        print(report, &one);
        print_two(report, &two)
    }

    /// Counts what a guest does that has so many vCPUs, on as many CPUs.
    fn output(&self, cpus: u32) -> Result<Schemes> {
        setup::ensure(&setup::Needs { musl: true, packages: &[KERNEL.name()], ..Default::default() })?;
        let (case, plugin_option, kind) = match cpus {
            1 => ("schemes", String::new(), "mark"),
            _ => ("schemes_on_two_vcpus", format!(",turns={TURN}"), "mark-all"),
        };
        let options = run::Options {
            cpu: Some("cortex-a72".into()),
            smp: Some(cpus),
            memory: Some(format!("{USUAL_MEMORY}M")),
            kernel: KERNEL,
            append: Some("quiet".into()),
            // What a boot leaves to be done is done, and takes no time of ours.
            exec: Some(format!("insmod /lib/ravelin/ravelin.ko\nsleep 20\nkvm-tests io.pkvm.{case}")),
            extra_files: programs::kvm_test_files(KERNEL)?,
            icount: true,
            // An instruction takes a nanosecond: the host's timer ticks as rarely as on a real machine.
            qemu_arg: ["-icount", "shift=0", "-seed", "1"].map(str::to_owned).to_vec(),
            ..run::Options::default()
        };
        let (console, events) = self.run(&options, &plugin_option, Outcome::Status(0))?;
        let schemes = least(&named(&console, &events, kind)?)?;
        if schemes.is_empty() {
            bail!("nothing was measured; the console:\n{console}");
        }
        Ok(schemes)
    }
}

/// Prints what one vCPU does.
fn print(report: &mut Report, schemes: &Schemes) {
    report.end();
    report.line(format_args!(
        "\n{:<40}{:>11}{:>11}{:>11}{:>12}{:>9}{:>9}{:>10}{:>10}{:>9}{:>11}",
        "Output of a guest, a transfer",
        "EL0",
        "EL1",
        "EL2",
        "all",
        "entries",
        "exits",
        "TLBI, EL1",
        "TLBI, EL2",
        "flushes",
        "copied"
    ));
    for (load, costs) in schemes {
        let [el0, el1, el2, all] = ["el0", "el1", "el2", "instructions"].map(|column| digits(costs[column].round()));
        report.line(format_args!(
            "  {:<38}{el0:>11}{el1:>11}{el2:>11}{all:>12}{:>9.2}{:>9.2}{:>10.2}{:>10.2}{:>9.2}{:>11}",
            load.name(),
            costs["entries"],
            costs["exits"],
            costs["tlbi-el1"],
            costs["tlbi-el2"],
            costs["flushes"],
            digits(costs["copied"]),
        ));
        add(report, &load.row(""), costs);
    }
    report.printed_already();
}

/// Prints what two vCPUs do at once, beside what they do one at a time.
fn print_two(report: &mut Report, schemes: &Schemes) -> Result<()> {
    report.end();
    report.line(format_args!(
        "\n{:<30}{:>6}{:>11}{:>11}{:>11}{:>12}{:>9}{:>9}{:>9}{:>10}{:>10}{:>9}{:>9}",
        "Output of two vCPUs, a transfer",
        "vCPUs",
        "EL0",
        "EL1",
        "EL2",
        "all",
        "more, %",
        "entries",
        "exits",
        "TLBI, EL1",
        "TLBI, EL2",
        "flushes",
        "waited"
    ));
    let mut loads: Vec<_> = schemes.iter().filter(|(load, _)| load.who == Some(Who::Both)).collect();
    loads.sort_by_key(|(load, _)| (&load.scheme, load.transfers, load.size, !load.aligned));
    for (load, together) in loads {
        let of = |who| {
            let load = Load { who: Some(who), ..load.clone() };
            schemes.get(&load).with_context(|| format!("{load:?} was not measured"))
        };
        let (first, second) = (of(Who::First)?, of(Who::Second)?);
        let alone = first.iter().map(|(column, count)| (*column, (count + second[column]) / 2.0)).collect();
        for (vcpus, who, costs) in [(1, "-alone", &alone), (2, "-together", together)] {
            let [el0, el1, el2, all] =
                ["el0", "el1", "el2", "instructions"].map(|column| digits(costs[column].round()));
            report.line(format_args!(
                "  {:<28}{vcpus:>6}{el0:>11}{el1:>11}{el2:>11}{all:>12}{:>9.1}{:>9.2}{:>9.2}{:>10.2}{:>10.2}{:>9.2}{:>9}",
                load.name(),
                (costs["instructions"] / alone["instructions"] - 1.0) * 100.0,
                costs["entries"],
                costs["exits"],
                costs["tlbi-el1"],
                costs["tlbi-el2"],
                costs["flushes"],
                digits(costs["waited"].round()),
            ));
            add(report, &load.row(who), costs);
        }
    }
    report.printed_already();
    Ok(())
}

/// Adds a row.
fn add(report: &mut Report, row: &str, costs: &Costs) {
    for (column, count) in costs {
        report.add(format!("{row}.{column}"), *count);
    }
}

/// The plots of what there are numbers for, with the names of their files.
pub(super) fn plots(rows: &Rows) -> Vec<(&'static str, Plot)> {
    let line = |name: &str, row: &str, value: &dyn Fn(&BTreeMap<String, f64>) -> Option<f64>| {
        let prefix = format!("{row}.");
        let points = rows.iter().filter_map(|(row, columns)| {
            let size: f64 = row.strip_prefix(&prefix)?.parse().ok()?;
            Some((size, value(columns)?))
        });
        let mut points: Vec<_> = points.collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        Series::new(name, points)
    };
    let plot = |title: &str, y_label: &str, series| Plot {
        title: title.into(),
        x_label: "bytes of a transfer".into(),
        y_label: y_label.into(),
        series,
        crossovers: true,
    };
    let instructions = |load: &str| {
        let names = [
            ("bounce", "bounce buffer"),
            ("map", "mmap, munmap"),
            ("stand", "standing mapping"),
            ("ring", "ring"),
            ("read", "ring, and read"),
        ];
        names
            .map(|(scheme, name)| {
                let row = format!("scheme.{scheme}-{load}");
                line(name, &row, &|columns| columns.get("instructions").copied())
            })
            .to_vec()
    };
    let mut plots = vec![
        ("schemes-1", plot("Output, one transfer at a time", INSTRUCTIONS, instructions("1-aligned"))),
        ("schemes-1-unaligned", plot("The same, 512 bytes into a page", INSTRUCTIONS, instructions("1-unaligned"))),
        ("schemes-8", plot("Eight transfers at once", INSTRUCTIONS, instructions("8-aligned"))),
        ("schemes-64", plot("64 transfers at once", INSTRUCTIONS, instructions("64-aligned"))),
    ];
    // The built-in figures are those that the documentation has.
    if let Some(core) = Model::load(None).ok().and_then(|model| model.cores.into_iter().find(|core| core.name == CORE))
    {
        for (file, load, title) in [
            ("schemes-1-cycles", "1-aligned", "One transfer at a time, by the cost model for Cortex-A72"),
            ("schemes-64-cycles", "64-aligned", "64 at once, by the cost model for Cortex-A72"),
        ] {
            let ends = |scheme: &str, name: &str| {
                let row = format!("scheme.{scheme}-{load}");
                let low = line(&format!("{name}, low"), &row, &|columns| Some(core.cycles(columns).0)).dashed();
                [line(&format!("{name}, high"), &row, &|columns| Some(core.cycles(columns).1)), low]
            };
            let series = [ends("bounce", "bounce buffer"), ends("read", "ring, and read")].concat();
            plots.push((file, Plot { crossovers: false, ..plot(title, "cycles of a transfer", series) }));
        }
    }
    plots
}

const INSTRUCTIONS: &str = "instructions of a transfer, at all levels";

/// The core whose cycles are drawn.
const CORE: &str = "Cortex-A72";

/// Returns the least of each load's measurements: interrupts of the host come between.
fn least(measurements: &[(&str, &Event)]) -> Result<Schemes> {
    let mut schemes = Schemes::new();
    for (label, counts) in measurements {
        let (load, amount) = Load::parse(label)?;
        let costs = load.costs(counts, amount);
        let least = schemes.entry(load).or_insert_with(|| costs.clone());
        if costs["instructions"] < least["instructions"] {
            *least = costs;
        }
    }
    Ok(schemes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(scheme: &str, size: u64, aligned: bool) -> Load {
        Load { scheme: scheme.into(), size, transfers: 1, aligned, who: None }
    }

    #[test]
    fn labels() {
        let parsed = |label| Load::parse(label).unwrap();
        let one = Load { scheme: "ring".into(), size: 4096, transfers: 8, aligned: false, who: None };
        assert_eq!(one.row("-alone"), "scheme.ring-8-unaligned-alone.4096");
        assert_eq!(parsed("io.ring.4096.8.unaligned 4"), (one.clone(), Amount { rounds: 4, waited: 0 }));
        let two = Load { who: Some(Who::Both), ..one };
        assert_eq!(parsed("io.ring.4096.8.unaligned.both 4 15"), (two, Amount { rounds: 4, waited: 15 }));
        for bad in [
            "io.ring.4096.8.unaligned",
            "io.ring.4096.8.odd 4",
            "io.ring.x.8.aligned 4",
            "ring.1.1.aligned 1",
            "io.ring.1.1.aligned 0",
            "io.ring.1.1.aligned.both 1",
            "io.ring.1.1.aligned.2 1 1",
        ] {
            assert!(Load::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_copied() {
        assert_eq!(load("bounce", 5000, true).copied(), 5000);
        assert_eq!(load("map", 5000, true).copied(), 0);
        // 3584 bytes before the first whole page.
        assert_eq!(load("map", 512, false).copied(), 512);
        assert_eq!(load("ring", 4096, false).copied(), 4096);
        assert_eq!(load("ring", 16384, false).copied(), 4096);
    }

    #[test]
    fn plots_have_a_line_for_each_scheme() {
        let row = |row: &str, count: f64| (row.to_owned(), BTreeMap::from([("instructions".to_owned(), count)]));
        let rows = Rows::from([
            row("scheme.bounce-1-aligned.512", 100.0),
            row("scheme.bounce-1-aligned.4096", 1000.0),
            row("scheme.ring-1-aligned.512", 500.0),
            row("scheme.ring-1-aligned.4096", 600.0),
        ]);
        let (name, plot) = &plots(&rows)[0];
        assert_eq!((*name, plot.series.len()), ("schemes-1", 5));
        assert_eq!(plot.series[0].points, [(512.0, 100.0), (4096.0, 1000.0)]);
        assert_eq!(plot.series[3].points, [(512.0, 500.0), (4096.0, 600.0)]);
    }

    #[test]
    fn the_least_counts() {
        let event = |el1| Event::parse(&format!("mark el1.instructions={el1} el2.instructions=8 entry.a=4")).unwrap();
        let (first, second) = (event(400), event(200));
        let schemes = least(&[("io.map.512.2.aligned 2", &first), ("io.map.512.2.aligned 2", &second)]).unwrap();
        let costs = schemes.values().next().unwrap();
        let expected =
            [("el0", 0.0), ("el1", 50.0), ("el2", 2.0), ("instructions", 52.0), ("entries", 1.0), ("bytes", 512.0)];
        assert_eq!(schemes.len(), 1);
        for (column, count) in expected {
            assert_eq!(costs[column], count, "{column}");
        }
    }

    #[test]
    fn invalidations_and_exits_are_told_apart() {
        let counts = "mark el1.tlbi.vale1is=8 el2.tlbi.ipas2e1is=4 el2.tlbi.vmalle1is=2 call.0xc6001016=6 entry.a=20";
        let costs = load("map", 4096, true).costs(&Event::parse(counts).unwrap(), Amount { rounds: 2, waited: 0 });
        let expected = [("tlbi", 7.0), ("tlbi-el1", 4.0), ("tlbi-el2", 3.0), ("flushes", 1.0), ("exits", 3.0)];
        for (column, count) in expected {
            assert_eq!(costs[column], count, "{column}");
        }
    }

    #[test]
    fn two_vcpus_stand_beside_each_of_them_alone() {
        let counts = |el1| Event::parse(&format!("mark-all el1.instructions={el1} el2.instructions=80")).unwrap();
        let (first, second, both) = (counts(280), counts(360), counts(760));
        let measurements = [
            ("io.map.512.2.aligned.0 2 0", &first),
            ("io.map.512.2.aligned.1 2 0", &second),
            ("io.map.512.2.aligned.both 2 40", &both),
        ];
        let mut report = Report::default();
        print_two(&mut report, &least(&measurements).unwrap()).unwrap();
        let lines: Vec<Vec<_>> = report.text.lines().skip(2).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0][..10], ["map", "512", "x", "2", "1", "0", "80", "20", "100", "0.0"]);
        // Twice as many transfers, without the wait.
        assert_eq!(lines[1][..10], ["map", "512", "x", "2", "2", "0", "90", "10", "100", "0.0"]);
        let rows = report.rows();
        assert_eq!(rows["scheme.map-2-aligned-alone.512"]["waited"], 0.0);
        assert_eq!(rows["scheme.map-2-aligned-together.512"]["waited"], 5.0);
        assert!(print_two(&mut Report::default(), &least(&measurements[1..]).unwrap()).is_err());
    }
}
