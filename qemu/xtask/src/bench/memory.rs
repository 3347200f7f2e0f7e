//! What memory EL2 takes: for RAM, for VMs and vCPUs, and for pages that are converted.

use anyhow::{Context, Result, ensure};
use ravelin_platform::ENTRY_SIZE;

use super::report::Report;
use super::{Bench, USUAL_MEMORY};
use crate::qemu::Outcome;

/// The payload's test that counts tables.
const TEST: &str = "bench.memory";

const PAGE: f64 = 4096.0;

/// Bytes that pKVM has for each page of RAM, `sizeof(struct hyp_page)`.
const PKVM_PAGE: f64 = 8.0;

/// What pKVM takes for a VM of that many vCPUs and for each of these, by `struct pkvm_hyp_vm`, an array of pointers behind it,
/// and `struct pkvm_hyp_vcpu`, each in whole pages, and the root of the stage 2 of 36 bits that our VMs have.
pub(super) fn pkvm_vm(vcpus: u64) -> (f64, f64) {
    const VM: f64 = 4496.0;
    const POINTER: f64 = 8.0;
    const ROOT: f64 = PAGE;
    const VCPU: f64 = 9040.0;
    let pages = |bytes: f64| (bytes / PAGE).ceil() * PAGE;
    (pages(VM + POINTER * vcpus as f64) + ROOT, pages(VCPU))
}

/// A step of the test: how many translation tables it took.
#[derive(Debug, PartialEq)]
struct Step {
    name: String,
    pages: f64,
    /// For the host's stage 2, out of the carve-out. Less than none if some have become free.
    host: f64,
    /// For the VM's stage 2, out of pages that the host gave it.
    vm: f64,
}

impl Step {
    /// Reads what is behind `bench-tables`.
    fn parse(line: &str) -> Result<Self> {
        let (name, numbers) = line.split_once(' ').context("no numbers")?;
        let numbers = numbers.split(' ').map(str::parse).collect::<Result<Vec<i32>, _>>()?;
        let &[pages, host, vm] = &numbers[..] else { anyhow::bail!("{} numbers", numbers.len()) };
        ensure!(pages > 0, "no pages");
        Ok(Self { name: name.to_owned(), pages: pages.into(), host: host.into(), vm: vm.into() })
    }

    /// Bytes of tables for each page.
    fn per_page(&self) -> f64 {
        (self.host + self.vm) * PAGE / self.pages
    }
}

impl Bench {
    /// Counts what pages take.
    pub(super) fn memory(&self, report: &mut Report) -> Result<()> {
        let (console, _) = self.run(&self.payload_options(USUAL_MEMORY, TEST), "", Outcome::Ended(0))?;
        let lines = console.lines().filter_map(|line| line.trim().strip_prefix("bench-tables "));
        let steps = lines.map(|line| Step::parse(line).with_context(|| format!("the payload says {line:?}")));
        let steps = steps.collect::<Result<Vec<_>>>()?;
        ensure!(!steps.is_empty(), "{TEST} has measured nothing");
        report.section("Memory of EL2 for a page, bytes");
        // An entry for the page, and its part of that for its block.
        report.add("page.ownership", ENTRY_SIZE as f64 * (1.0 + 1.0 / 512.0)).pkvm(PKVM_PAGE);
        for step in &steps {
            report.add(format!("page.{}.host-tables", step.name), step.host);
            report.add(format!("page.{}.vm-tables", step.name), step.vm);
            report.add(format!("page.{}.bytes", step.name), step.per_page());
        }
        report.end();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps() {
        let step = Step::parse("pkvm.convert 8 -1 9").unwrap();
        assert_eq!(step, Step { name: "pkvm.convert".into(), pages: 8.0, host: -1.0, vm: 9.0 });
        assert_eq!(step.per_page(), 4096.0);
        for bad in ["", "name", "name 8 1", "name 0 1 1", "name 8 1 x", "name 8 1 1 1"] {
            assert!(Step::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn vms_of_pkvm_are_whole_pages() {
        assert_eq!(pkvm_vm(1), (12288.0, 12288.0));
        assert_eq!(pkvm_vm(1000), (20480.0, 12288.0));
    }
}
