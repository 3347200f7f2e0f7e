//! Four ways of output of a protected guest, on Linux with the kernel module: how many instructions, exits and invalidations
//! each transfer takes.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::event::Event;
use super::report::{Report, digits};
use super::{Bench, USUAL_MEMORY, measurements};
use crate::module::Kernel;
use crate::qemu::Outcome;
use crate::{programs, run, setup};

/// The host's kernel.
const KERNEL: Kernel = Kernel::LinuxNew;

/// What a measurement is of: scheme, bytes of a transfer, transfers at once, whether they are aligned.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Load {
    pub(super) scheme: String,
    pub(super) size: u64,
    pub(super) transfers: u64,
    pub(super) aligned: bool,
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

/// Counts of one transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Costs {
    /// Instructions at EL0, EL1 and EL2.
    pub(super) instructions: [f64; 3],
    pub(super) entries: f64,
    pub(super) tlbi: f64,
}

impl Costs {
    fn of(counts: &Event, transfers: u64) -> Self {
        let each = |count: u64| count as f64 / transfers as f64;
        Self {
            instructions: [0, 1, 2].map(|level| each(counts.get(&format!("el{level}.instructions")))),
            entries: each(counts.sum("entry.")),
            tlbi: each(counts.sum("el2.tlbi.")),
        }
    }

    pub(super) fn total(&self) -> f64 {
        self.instructions.iter().sum()
    }
}

/// By load.
pub(super) type Schemes = BTreeMap<Load, Costs>;

impl Bench {
    /// Counts all of them and prints them.
    pub(super) fn schemes(&self, report: &mut Report) -> Result<Schemes> {
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
            "\n{:<42}{:>11}{:>11}{:>11}{:>12}{:>9}{:>9}{:>11}",
            "Output of a guest, a transfer", "EL0", "EL1", "EL2", "all", "entries", "TLBI", "copied"
        ));
        for (load, costs) in &schemes {
            let Load { scheme, size, transfers, aligned } = load;
            let alignment = if *aligned { "" } else { ", unaligned" };
            let name = format!("{scheme} {} x {transfers}{alignment}", digits(*size as f64));
            let [el0, el1, el2] = costs.instructions.map(|count| digits(count.round()));
            report.line(format_args!(
                "  {name:<40}{el0:>11}{el1:>11}{el2:>11}{:>12}{:>9.2}{:>9.2}{:>11}",
                digits(costs.total().round()),
                costs.entries,
                costs.tlbi,
                digits(load.copied() as f64),
            ));
            let row = format!("io.{scheme}.{size}.{transfers}.{}", if *aligned { "aligned" } else { "unaligned" });
            for (level, count) in costs.instructions.iter().enumerate() {
                report.add(format!("{row}.el{level}"), *count);
            }
            report.add(format!("{row}.entries"), costs.entries);
            report.add(format!("{row}.tlbi"), costs.tlbi);
            report.add(format!("{row}.copied"), load.copied() as f64);
        }
        report.printed_already();
        Ok(schemes)
    }
}

/// Returns the least of each load's measurements: interrupts of the host come between.
fn least(measurements: &[(&str, &Event)]) -> Result<Schemes> {
    let mut schemes = Schemes::new();
    for (label, counts) in measurements {
        let (load, rounds) = Load::parse(label)?;
        let costs = Costs::of(counts, rounds * load.transfers);
        let least = schemes.entry(load).or_insert(costs);
        if costs.total() < least.total() {
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
    fn the_least_counts() {
        let event = |el1| Event::parse(&format!("mark el1.instructions={el1} el2.instructions=8 entry.a=4")).unwrap();
        let (first, second) = (event(400), event(200));
        let schemes = least(&[("io.map.512.2.aligned 2", &first), ("io.map.512.2.aligned 2", &second)]).unwrap();
        let costs = schemes.values().next().unwrap();
        assert_eq!((schemes.len(), costs.instructions, costs.entries), (1, [0.0, 50.0, 2.0], 1.0));
    }
}
