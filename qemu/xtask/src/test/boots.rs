//! Guests on the host, from their start to their end: what each can do, and that nothing of them is left.
//!
//! The script `qemu/initramfs/boots` does it in the host.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use super::linux::transcript::{Check, Transcript};
use super::linux::{self, Config};
use super::{Report, kvm};
use crate::initramfs::ExtraFile;
use crate::{guest_kernel, workspace};

/// Guests of a kind: the kind, the kernel, the number of vCPUs.
type Row = (&'static str, &'static str, u32);

/// What every test run has, one of each on one host.
const ONCE: [Row; 2] = [("realm", "debian", 4), ("ordinary", "debian", 1)];

/// What else there is, of each many on one host.
const OFTEN: [Row; 6] = [
    ("realm", "debian", 1),
    ("realm", "debian", 4),
    ("pkvm", "mainline", 1),
    ("pkvm", "mainline", 4),
    ("ordinary", "debian", 1),
    ("ordinary", "debian", 4),
];
const TIMES: u32 = 20;

const HOST: Config = Config::new("cortex-a76", 2, "2G");

/// The kernel's log, before and after.
const BEFORE: &str = "
dmesg -r | sed 's/^/@dmesg /'
dmesg -c >/dev/null
";
const AFTER: &str = "
dmesg -r | sed 's/^/@later /'
echo \"@note taint afterwards = $(cat /proc/sys/kernel/tainted)\"
echo \"@note cpus afterwards = $(nproc)\"
";

pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    host("guests", &ONCE, 1, report)?;
    if full {
        guest_kernel::ensure()?;
        for row in OFTEN {
            let (kind, _, cpus) = row;
            host(&format!("{TIMES} guests {kind} x{cpus}"), &[row], TIMES, report)?;
        }
    }
    Ok(())
}

/// Boots a host, and there each kind of guests so many times.
fn host(name: &str, rows: &[Row], times: u32, report: &mut Report) -> Result<()> {
    let start = Instant::now();
    let path = workspace::root().join("qemu/initramfs/boots");
    let contents = fs::read(&path).with_context(|| path.display().to_string())?;
    let mut script = BEFORE.to_owned();
    for (kind, image, cpus) in rows {
        writeln!(script, "boots {kind} {image} {cpus} {times}")?;
    }
    let transcript = linux::boot(name, &HOST, |options| {
        options.guests = true;
        options.exec = Some(format!("{script}{AFTER}"));
        options.extra_files = vec![ExtraFile { path: "bin/boots".into(), contents }];
    })?;
    for (what, result) in merge(&transcript) {
        report.check(&format!("{name}: {what}"), result);
    }
    let mut check = |what: &str, result| report.check(&format!("{name}: {what}"), result);
    check("the host runs and powers off", linux::outcome(&transcript));
    check("no complaint in the host's log", linux::complaint(&transcript));
    check("no taint but that of a module from elsewhere", kvm::taint(&transcript));
    check("the host has all its CPUs", linux::cpus(&transcript, &HOST));
    for (what, figure) in transcript.notes.iter().filter(|(what, _)| what.ends_with(')')) {
        println!("  {what}: {figure}");
    }
    println!("  {name}: {} s", start.elapsed().as_secs());
    Ok(())
}

/// One result for the same check of many boots: the first failure, or success.
fn merge(transcript: &Transcript) -> BTreeMap<&str, Result<()>> {
    let mut merged = BTreeMap::new();
    for (name, check) in &transcript.checks {
        let result = match check {
            Check::Passed => Ok(()),
            Check::Failed(why) | Check::Skipped(why) => Err(anyhow!("{why}")),
        };
        let first = merged.entry(name.as_str()).or_insert(Ok(()));
        if first.is_ok() {
            *first = result;
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::Outcome;

    #[test]
    fn one_failure_of_many_boots_counts() {
        let console = "@ok reads\n@ok writes\n@fail reads: boot 2\n@ok writes\n@fail reads: boot 3\n@ok reads\n";
        let transcript = Transcript::new(Outcome::Status(0), console.into());
        let merged = merge(&transcript);
        assert_eq!(merged.len(), 2);
        assert!(merged["writes"].is_ok());
        assert_eq!(merged["reads"].as_ref().unwrap_err().to_string(), "boot 2");
    }
}
