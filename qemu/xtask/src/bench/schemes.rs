//! Four ways of output of a protected guest, on Linux with the kernel module: how many instructions, exits and invalidations
//! each transfer takes.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::baseline::Rows;
use super::costs::Model;
use super::event::Event;
use super::plot::{Plot, Series};
use super::report::{Report, digits};
use super::{Bench, USUAL_MEMORY, measurements};
use crate::module::Kernel;
use crate::qemu::Outcome;
use crate::{programs, run, setup};

/// The host's kernel.
const KERNEL: Kernel = Kernel::LinuxNew;

/// What a measurement is of: scheme, bytes of a transfer, transfers at once, whether they are aligned.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Load {
    scheme: String,
    size: u64,
    transfers: u64,
    aligned: bool,
}

impl Load {
    /// Reads `io.SCHEME.SIZE.TRANSFERS.ALIGNMENT ROUNDS`; returns the rounds, too.
    fn parse(label: &str) -> Result<(Self, u64)> {
        let parsed = || {
            let (name, rounds) = label.strip_prefix("io.")?.split_once(' ')?;
            let [scheme, size, transfers, alignment] = name.split('.').collect::<Vec<_>>()[..] else { return None };
            let aligned = match alignment {
                "aligned" => true,
                "unaligned" => false,
                _ => return None,
            };
            let load =
                Self { scheme: scheme.into(), size: size.parse().ok()?, transfers: transfers.parse().ok()?, aligned };
            Some((load, rounds.parse().ok().filter(|&rounds| rounds != 0)?))
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

/// Counts of one transfer, by columns that the cost model knows, and `el0` to `el2`: instructions there.
type Costs = BTreeMap<&'static str, f64>;

/// By load.
type Schemes = BTreeMap<Load, Costs>;

impl Load {
    /// What a transfer costs if so many do this. Both the guest and the VMM copy.
    fn costs(&self, counts: &Event, transfers: u64) -> Costs {
        let mut columns = counts.columns(0..=2);
        for (level, key) in [("el0", "el0.instructions"), ("el1", "el1.instructions"), ("el2", "el2.instructions")] {
            columns.insert(level, counts.get(key) as f64);
        }
        columns.values_mut().for_each(|count| *count /= transfers as f64);
        columns.insert("bytes", (self.copied() + self.size) as f64);
        columns
    }

    /// The name of its row.
    fn row(&self) -> String {
        let Self { scheme, size, transfers, aligned } = self;
        format!("scheme.{scheme}-{transfers}-{}.{size}", if *aligned { "aligned" } else { "unaligned" })
    }
}

impl Bench {
    /// Counts all of them and prints them.
    pub(super) fn schemes(&self, report: &mut Report) -> Result<()> {
        setup::ensure(&setup::Needs { musl: true, packages: &[KERNEL.name()], ..Default::default() })?;
        let options = run::Options {
            cpu: Some("cortex-a72".into()),
            smp: Some(1),
            memory: Some(format!("{USUAL_MEMORY}M")),
            kernel: KERNEL,
            append: Some("quiet".into()),
            exec: Some("insmod /lib/ravelin/ravelin.ko\nkvm-tests io.pkvm.schemes".into()),
            extra_files: programs::kvm_test_files(KERNEL)?,
            ..run::Options::default()
        };
        let (console, events) = self.run(&options, "", Outcome::Status(0))?;
        let schemes = least(&measurements(&console, &events)?)?;
        if schemes.is_empty() {
            bail!("nothing was measured; the console:\n{console}");
        }
        report.end();
        report.line(format_args!(
            "\n{:<40}{:>11}{:>11}{:>11}{:>12}{:>9}{:>9}{:>11}",
            "Output of a guest, a transfer", "EL0", "EL1", "EL2", "all", "entries", "TLBI", "copied"
        ));
        for (load, costs) in &schemes {
            let Load { scheme, size, transfers, aligned } = load;
            let alignment = if *aligned { "" } else { ", unaligned" };
            let name = format!("{scheme} {} x {transfers}{alignment}", digits(*size as f64));
            let [el0, el1, el2, all] =
                ["el0", "el1", "el2", "instructions"].map(|column| digits(costs[column].round()));
            report.line(format_args!(
                "  {name:<38}{el0:>11}{el1:>11}{el2:>11}{all:>12}{:>9.2}{:>9.2}{:>11}",
                costs["entries"],
                costs["tlbi"],
                digits(load.copied() as f64),
            ));
            for (column, count) in costs {
                report.add(format!("{}.{column}", load.row()), *count);
            }
        }
        report.printed_already();
        Ok(())
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
        let (load, rounds) = Load::parse(label)?;
        let costs = load.costs(counts, rounds * load.transfers);
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
        Load { scheme: scheme.into(), size, transfers: 1, aligned }
    }

    #[test]
    fn labels() {
        let (found, rounds) = Load::parse("io.ring.4096.8.unaligned 4").unwrap();
        assert_eq!(found, Load { scheme: "ring".into(), size: 4096, transfers: 8, aligned: false });
        assert_eq!(rounds, 4);
        for bad in ["io.ring.4096.8.unaligned", "io.ring.4096.8.odd 4", "io.ring.x.8.aligned 4", "ring.1.1.aligned 0"] {
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
}
