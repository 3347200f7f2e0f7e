//! The same program for the same guest on both hypervisors: with the kernel module on this one, and on pKVM, which is the
//! host kernel's own.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::event::Event;
use super::report::{Report, digits};
use super::{Bench, USUAL_MEMORY, measurements};
use crate::module::Kernel;
use crate::qemu::Outcome;
use crate::{programs, run, setup};

/// The kernel of both hosts: pKVM runs protected guests since Linux 7.3.
const KERNEL: Kernel = Kernel::LinuxNew;

/// A hypervisor, what the kernel is told, and what has to be done before there is `/dev/kvm`.
#[derive(Clone, Copy)]
pub(super) struct Side {
    ravelin: bool,
    pub(super) append: &'static str,
    pub(super) script: &'static str,
}

const RAVELIN: Side = Side { ravelin: true, append: "quiet", script: "insmod /lib/ravelin/ravelin.ko" };
pub(super) const PKVM: Side = Side {
    ravelin: false,
    append: "quiet kvm-arm.mode=protected",
    script: "dmesg | grep -q 'kvm.*Protected .* mode initialized' || { dmesg | grep kvm; exit 3; }",
};

/// Operations with a number of pages, and the most EL2 instructions that one should take, in those of pKVM.
const TARGETS: [(&str, f64); 8] = [
    ("call 0", 0.5),
    ("mmio-load 0", 0.3),
    ("mmio-store 0", 0.3),
    ("touch 512", 0.4),
    ("share 1", 0.15),
    ("unshare 1", 0.15),
    ("share 512", 0.01),
    ("unshare 512", 0.01),
];

/// Counts by operation and number of pages; the least of all rounds, because interrupts of the host come between.
type Counts = BTreeMap<String, Event>;

impl Bench {
    /// Runs both and prints them beside each other.
    pub(super) fn side_by_side(&self, report: &mut Report) -> Result<()> {
        setup::ensure(&setup::Needs { musl: true, packages: &[KERNEL.name()], ..Default::default() })?;
        let (ours, theirs) = (self.side(RAVELIN)?, self.side(PKVM)?);
        report.end();
        report.line(format_args!(
            "\n{:<32}{:>12}{:>12}{:>8}{:>8}{:>9}{:>9}{:>7}{:>7}{:>15}{:>15}",
            "A protected guest of Linux 7.3",
            "EL2",
            "pKVM",
            "ratio",
            "target",
            "entries",
            "pKVM",
            "tlbi",
            "pKVM",
            "EL1",
            "pKVM"
        ));
        for (name, our) in &ours {
            let their = theirs.get(name).with_context(|| format!("{name} was not measured on pKVM"))?;
            let both = |get: &dyn Fn(&Event) -> u64| [our, their].map(|counts| get(counts) as f64);
            let [el2, their_el2] = both(&|counts| counts.get("el2.instructions"));
            let [entries, their_entries] = both(&|counts| counts.sum("entry."));
            let [tlbi, their_tlbi] = both(&|counts| counts.sum("el2.tlbi."));
            let [el1, their_el1] = both(&|counts| counts.get("el1.instructions"));
            let target = TARGETS.iter().find(|(of, _)| of == name).map(|(_, target)| *target);
            let ratio = el2 / their_el2;
            let verdict = if target.is_some_and(|target| ratio > target) { "  MISSED" } else { "" };
            report.line(format_args!(
                "  {name:<30}{:>12}{:>12}{ratio:>8.3}{:>8}{:>9}{:>9}{:>7}{:>7}{:>15}{:>15}{verdict}",
                digits(el2),
                digits(their_el2),
                target.map_or(String::new(), |target| target.to_string()),
                digits(entries),
                digits(their_entries),
                digits(tlbi),
                digits(their_tlbi),
                digits(el1),
                digits(their_el1),
            ));
            let row = name.replace(' ', ".");
            for (column, value) in [
                ("el2", el2),
                ("pkvm-el2", their_el2),
                ("entries", entries),
                ("pkvm-entries", their_entries),
                ("tlbi", tlbi),
                ("pkvm-tlbi", their_tlbi),
                ("el1", el1),
                ("pkvm-el1", their_el1),
            ] {
                report.add(format!("side-by-side.{row}.{column}"), value);
            }
            for (side, counts) in [("ravelin", our), ("pkvm", their)] {
                for (column, count) in counts.columns(2..=2).into_iter().filter(|(_, count)| *count > 0.0) {
                    report.add(format!("side-by-side.{row}.{side}.{column}"), count);
                }
            }
        }
        report.printed_already();
        Ok(())
    }

    /// Runs the program on one of them.
    fn side(&self, side: Side) -> Result<Counts> {
        let options = run::Options {
            cpu: Some("cortex-a72".into()),
            smp: Some(1),
            memory: Some(format!("{USUAL_MEMORY}M")),
            kernel: KERNEL,
            no_hypervisor: !side.ravelin,
            el2: true,
            append: Some(side.append.into()),
            exec: Some(format!("{}\nkvm-tests bench.pkvm.costs", side.script)),
            extra_files: programs::kvm_test_files(KERNEL)?,
            ..run::Options::default()
        };
        let (console, events) = self.run(&options, "", Outcome::Status(0))?;
        let start = events.iter().find(|event| event.kind == "mark").context("there are no marks")?;
        let mut counts = Counts::from([("boot 0".to_owned(), start.clone())]);
        for (name, mark) in measurements(&console, &events)? {
            let least = counts.entry(name.to_owned()).or_insert_with(|| mark.clone());
            if mark.get("el2.instructions") < least.get("el2.instructions") {
                *least = mark.clone();
            }
        }
        Ok(counts)
    }
}
