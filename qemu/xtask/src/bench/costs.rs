//! Turns counts into cycles of named cores, from low to high.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::baseline::Rows;
use super::report::digits;

/// The published figures, as far as there are any, with their sources.
const PUBLISHED: &str = include_str!("costs.toml");

/// The columns that cost something. [`super::event::Event::columns`] fills all but `bytes`.
const COLUMNS: [&str; 9] = ["bytes", "cache", "dc_zva", "dsb", "entries", "instructions", "isb", "sysreg", "tlbi"];

/// What one of a column's counts costs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Figure {
    low: Bound,
    high: Bound,
}

/// The least or the most.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bound {
    cycles: f64,
    basis: Basis,
    why: String,
}

/// What a bound rests on.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Basis {
    Measured,
    Derived,
    Estimate,
}

/// A core and its figures by column.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Core {
    pub(super) name: String,
    #[serde(flatten)]
    figures: BTreeMap<String, Figure>,
}

impl Core {
    /// The least and the most cycles that a row of counts takes. Columns that the model does not know cost nothing.
    pub(super) fn cycles(&self, counts: &BTreeMap<String, f64>) -> (f64, f64) {
        let costs = self.figures.iter().filter_map(|(column, Figure { low, high })| {
            let count = counts.get(column)?;
            Some((count * low.cycles, count * high.cycles))
        });
        costs.fold((0.0, 0.0), |sum, (low, high)| (sum.0 + low, sum.1 + high))
    }
}

/// The cores.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Model {
    #[serde(rename = "core")]
    pub(super) cores: Vec<Core>,
}

impl Model {
    /// The model of a file, or that of the published figures.
    ///
    /// # Errors
    ///
    /// A core lacks a figure, or has one that makes no sense.
    pub(super) fn load(path: Option<&Path>) -> Result<Self> {
        match path {
            None => Self::parse(PUBLISHED),
            Some(path) => {
                let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
                Self::parse(&text).with_context(|| path.display().to_string())
            }
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let model: Self = toml::from_str(text)?;
        for core in &model.cores {
            let columns: Vec<_> = core.figures.keys().collect();
            ensure!(columns == COLUMNS, "{} has figures for {columns:?}, not {COLUMNS:?}", core.name);
            for (column, Figure { low, high }) in &core.figures {
                let (name, least, most) = (&core.name, low.cycles, high.cycles);
                ensure!(0.0 <= least && least <= most && most.is_finite(), "{name}: {column} from {least} to {most}");
                ensure!(!low.why.is_empty() && !high.why.is_empty(), "{name}: nothing says why {column} costs that");
            }
        }
        Ok(model)
    }

    /// Says how many cycles operations take: those of [`OPERATIONS`], and what [`OTHERS`] are.
    pub(super) fn table(&self, rows: &Rows) -> String {
        let mut text = format!("\n{:<40}", "Cycles, by the cost model");
        self.cores.iter().for_each(|core| line(&mut text, format_args!("{:>24}", core.name)));
        text.push('\n');
        let is_other = |row: &&String| OTHERS.iter().any(|prefix| row.starts_with(prefix));
        let others = rows.keys().filter(is_other).map(|row| (row.as_str(), row.as_str()));
        for (name, row) in OPERATIONS.into_iter().chain(others) {
            let Some(counts) = rows.get(row).filter(|counts| counts.contains_key("instructions")) else { continue };
            line(&mut text, format_args!("  {name:<38}"));
            for core in &self.cores {
                let (low, high) = core.cycles(counts);
                line(&mut text, format_args!("{:>24}", format!("{}..{}", rounded(low), rounded(high))));
            }
            text.push('\n');
        }
        let bounds = || self.cores.iter().flat_map(|core| core.figures.values()).flat_map(|it| [&it.low, &it.high]);
        let (guesses, all) = (bounds().filter(|bound| bound.basis == Basis::Estimate).count(), bounds().count());
        line(
            &mut text,
            format_args!(
                "  {guesses} of {all} bounds are estimates; costs.toml and docs/benchmarks.md have the sources\n"
            ),
        );
        text
    }
}

/// How the names of further rows begin.
const OTHERS: [&str; 1] = ["side-by-side."];

/// Operations and their rows.
const OPERATIONS: [(&str, &str); 11] = [
    ("empty call", "growth.vms.pkvm.call.1"),
    ("MMIO load, exit and entry", "growth.vms.pkvm.mmio-load.1"),
    ("share of 1 page, and the host is told", "growth.ranges.pkvm.share.1"),
    ("share of 512 pages", "growth.ranges.pkvm.share.512"),
    ("share of 512 pages as a block", "growth.ranges.pkvm.share-blocks.512"),
    ("unshare of 1 page", "growth.ranges.pkvm.unshare.1"),
    ("unshare of 512 pages", "growth.ranges.pkvm.unshare.512"),
    ("unshare of 512 pages as a block", "growth.ranges.pkvm.unshare-blocks.512"),
    ("release of 1 page", "growth.ranges.pkvm.release.1"),
    ("first touch of 1 page", "growth.ranges.pkvm.touch.1"),
    ("first touch of 512 pages as a block", "growth.ranges.pkvm.touch-blocks.512"),
];

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = text.write_fmt(arguments);
}

/// Two digits: the model knows no more.
fn rounded(value: f64) -> String {
    let unit = 10f64.powf((value.max(1.0).log10().floor() - 1.0).max(0.0));
    digits((value / unit).round() * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(columns: &[(&str, f64)]) -> BTreeMap<String, f64> {
        columns.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    /// A core on which each column costs one cycle, and ten at most.
    fn plain() -> String {
        let bound = |cycles| format!("{{ cycles = {cycles}, basis = \"estimate\", why = \"none\" }}");
        let figure = |column| format!("[core.{column}]\nlow = {}\nhigh = {}\n", bound(1), bound(10));
        format!("[[core]]\nname = \"Plain\"\n{}", COLUMNS.map(figure).concat())
    }

    #[test]
    fn the_published_figures_are_complete() {
        let model = Model::load(None).unwrap();
        assert_eq!(model.cores.len(), 3);
        assert!(model.cores.iter().all(|core| core.cycles(&row(&[("instructions", 100.0)])).1 >= 100.0));
    }

    #[test]
    fn costs_add_up() {
        let [core] = &Model::parse(&plain()).unwrap().cores[..] else { panic!() };
        assert_eq!(core.cycles(&row(&[])), (0.0, 0.0));
        assert_eq!(core.cycles(&row(&[("instructions", 100.0), ("tlbi", 2.0), ("dsb", 1.0)])), (103.0, 1030.0));
        assert_eq!(core.cycles(&row(&[("bytes", 7.0), ("pkvm-el2", 5.0)])), (7.0, 70.0));
    }

    #[test]
    fn the_model_knows_what_is_counted() {
        let event = super::super::event::Event::default();
        let counted = event.columns(2..=2).into_keys().chain(["bytes"]);
        assert_eq!(counted.collect::<std::collections::BTreeSet<_>>(), COLUMNS.into());
    }

    #[test]
    fn figures_that_make_no_sense_are_refused() {
        for (from, to, complaint) in [
            ("cycles = 1,", "cycles = 11,", "from 11 to 10"),
            ("cycles = 1,", "cycles = -1,", "from -1 to 10"),
            ("cycles = 10,", "cycles = inf,", "to inf"),
            ("\"none\"", "\"\"", "nothing says why"),
            ("core.dsb", "core.dbs", "figures for"),
            ("basis = \"estimate\"", "basis = \"guess\"", "unknown variant"),
        ] {
            let error = format!("{:#}", Model::parse(&plain().replace(from, to)).unwrap_err());
            assert!(error.contains(complaint), "{error}");
        }
    }

    #[test]
    fn the_table_has_operations_and_others() {
        let rows = Rows::from([
            ("growth.vms.pkvm.call.1".to_owned(), row(&[("instructions", 226.0), ("entries", 1.0)])),
            ("side-by-side.call.0".to_owned(), row(&[("instructions", 1000.0)])),
            ("side-by-side.share.1".to_owned(), row(&[("pkvm-el2", 2806.0)])),
            ("start".to_owned(), row(&[("2048M", 1.0)])),
        ]);
        let table = Model::parse(&plain()).unwrap().table(&rows);
        let lines: Vec<_> = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines[2..4], ["empty call 230..2,300", "side-by-side.call.0 1,000..10,000"], "{table}");
        assert_eq!(lines.len(), 5, "{table}");
    }

    #[test]
    fn two_digits() {
        assert_eq!([0.0, 0.4, 9.6, 99.0, 123.0, 98_765.0].map(rounded), ["0", "0", "10", "99", "120", "99,000"]);
    }
}
