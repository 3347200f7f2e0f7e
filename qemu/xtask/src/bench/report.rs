//! The numbers, beside their targets and pKVM's.

use std::fmt::Write;

use anyhow::{Context, Result};

use super::Call;
use super::baseline::Rows;

/// A number of the report.
#[derive(Clone, Debug)]
pub(super) struct Number {
    name: String,
    value: f64,
    /// The most it should be.
    target: Option<f64>,
    /// pKVM's number.
    pub(super) pkvm: Option<f64>,
}

impl Number {
    pub(super) fn target(&mut self, target: f64) -> &mut Self {
        self.target = Some(target);
        self
    }

    pub(super) fn pkvm(&mut self, pkvm: f64) -> &mut Self {
        self.pkvm = Some(pkvm);
        self
    }

    fn missed(&self) -> bool {
        self.target.is_some_and(|target| self.value > target)
    }
}

/// The numbers, and what is printed of them.
#[derive(Debug, Default)]
pub(super) struct Report {
    numbers: Vec<Number>,
    pub(super) text: String,
    /// Numbers that have been printed.
    printed: usize,
}

impl Report {
    pub(super) fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{line}");
    }

    /// Begins a part of the report.
    pub(super) fn section(&mut self, title: &str) {
        self.end();
        self.line(format_args!("\n{title:<64}{:>12}{:>12}", "target", "pKVM"));
    }

    /// Adds a number to the present part.
    pub(super) fn add(&mut self, name: impl Into<String>, value: f64) -> &mut Number {
        self.numbers.push(Number { name: name.into(), value, target: None, pkvm: None });
        let last = self.numbers.len() - 1;
        &mut self.numbers[last]
    }

    /// Prints the numbers added since the last part.
    pub(super) fn end(&mut self) {
        for index in self.printed..self.numbers.len() {
            let number = self.numbers[index].clone();
            let optional = |value: Option<f64>| value.map_or(String::new(), digits);
            let (value, target, pkvm) = (digits(number.value), optional(number.target), optional(number.pkvm));
            let verdict = if number.missed() { "  MISSED" } else { "" };
            self.line(format_args!("  {:<46}{value:>16}{target:>12}{pkvm:>12}{verdict}", number.name));
        }
        self.printed_already();
    }

    /// Adds a table of calls.
    pub(super) fn calls(&mut self, title: &str, calls: &[Call]) -> Result<()> {
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
            let flushed = again.counts.flushes();
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
                self.add(format!("{name}.flushes"), call.counts.flushes() as f64);
                self.add(format!("{name}.entries"), call.counts.sum("entry.") as f64);
            }
        }
        self.printed_already();
        Ok(())
    }

    /// The numbers that have been added are in a table that has been printed.
    pub(super) fn printed_already(&mut self) {
        self.printed = self.numbers.len();
    }

    /// Compares 512 pages as a block with 8 single pages.
    pub(super) fn blocks(&mut self, calls: &[Call]) -> Result<()> {
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

    /// All numbers, in rows.
    pub(super) fn rows(&self) -> Rows {
        let mut rows = Rows::new();
        for number in &self.numbers {
            let (row, column) = number.name.rsplit_once('.').unwrap_or(("", &number.name));
            let value = (number.value * 1000.0).round() / 1000.0;
            rows.entry(row.to_owned()).or_default().insert(column.to_owned(), value);
        }
        rows
    }
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
pub(super) fn digits(value: f64) -> String {
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
    use crate::bench::event::Event;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(digits(0.0), "0");
        assert_eq!(digits(999.0), "999");
        assert_eq!(digits(1_234_567.0), "1,234,567");
        assert_eq!(digits(-1234.5), "-1,234.50");
        assert_eq!(digits(-123.0), "-123");
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
        assert_eq!(report.rows()[""], [("bad".to_owned(), 1.5), ("good".to_owned(), 1.0)].into());
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
        assert_eq!(report.rows()["call.SHARE.8.again"]["tlbi"], 3.0);
        assert!(Report::default().calls("Calls", &[call(false, 900)]).is_err());
    }
}
