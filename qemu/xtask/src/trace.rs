//! `cargo xtask trace`: what the hypervisor does to translation tables and TLBs, as text, checked as it comes.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use ravelin_trace::{Checker, Entry, Packed, Record, TlbiOp};

use crate::qemu::{Outcome, Scratch};
use crate::run::{self, Ready};
use crate::{image, process};

/// Tests of the payload that take every transition, of the host and of guests of each kind.
pub(crate) const REPRESENTATIVE: &str = "test=ownership.*,pins.*,range.*,contents.*,stale.*,psci.*,\
    guests.life_cycle,guests.populate,guests.conversion_*,guests.unshare_*,guests.refused_unshare,guests.relinquish,\
    guests.relinquish_of_poison,guests.force_reclaim_*,guests.reclaim_at_the_end,guests.nothing_is_left_behind,\
    guests.ordinary_vm_borrows,guests.realm_services,guests.stale_*,guests.vcpus_on_all_cpus,guests.lives_race";

/// All tests of the payload.
pub(crate) const ALL: &str = "test=all";

/// Violations that are shown.
const SHOWN: usize = 20;

/// Options of `trace`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Options {
    /// Write the trace to FILE, one record a line
    #[arg(long, value_name = "FILE", required_unless_present = "check")]
    out: Option<PathBuf>,
    /// Check the trace; given FILE, that one, and no machine is started
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    check: Option<Option<PathBuf>>,
    /// CPU model, in place of the machine's
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// Number of CPUs
    #[arg(long, value_name = "N")]
    smp: Option<u32>,
    /// Size of RAM, such as 512M or 8G
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Command line of the payload, such as test=guests.*, in place of a choice of tests that takes every transition
    #[arg(long, value_name = "STR")]
    append: Option<String>,
    /// All tests of the payload
    #[arg(long, conflicts_with = "append")]
    all: bool,
    /// End after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

/// `cargo xtask trace`.
pub(crate) fn trace(options: &Options) -> Result<ExitCode> {
    let tally = if let Some(Some(file)) = &options.check {
        ensure!(options.out.is_none(), "--check FILE reads a trace and --out writes one");
        check_file(file)?
    } else {
        let append = options.append.as_deref().unwrap_or(if options.all { ALL } else { REPRESENTATIVE });
        let machine = run::Options {
            cpu: options.cpu.clone(),
            smp: options.smp,
            memory: options.memory.clone(),
            append: Some(append.into()),
            timeout: options.timeout,
            ..run::Options::default()
        };
        let out = match &options.out {
            Some(file) => Some(File::create(file).with_context(|| format!("cannot write {}", file.display()))?),
            None => None,
        };
        record(machine, Follower::new(options.check.is_some(), out), &mut std::io::stdout().lock())?
    };
    println!("{tally}");
    Ok(if tally.violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the payload on a machine and follows its trace. What the payload says goes to `console`.
pub(crate) fn record(machine: run::Options, follower: Follower, console: &mut dyn Write) -> Result<Tally> {
    let scratch = Scratch::new()?;
    // A pipe: the machine waits for the checker, and no trace is too long for the disk.
    let pipe = scratch.path("trace");
    process::run(Command::new("mkfifo").arg(&pipe))?;
    let timeout = machine.timeout.map(Duration::from_secs);
    let ready = Ready::new(&run::Options {
        host_image: Some(image::payload()?.display().to_string()),
        host_initrd: Some(image::guest()?),
        checked: true,
        trace: Some(pipe.clone()),
        ..machine
    })?;
    let input = pipe.clone();
    let follower = thread::spawn(move || follower.follow_stream(BufReader::new(File::open(input)?)));
    let outcome = ready.run(console, timeout);
    // Ends the wait for a machine that has not begun to write. Opened for both, a pipe waits for nobody.
    drop(File::options().read(true).write(true).open(&pipe)?);
    let Ok(tally) = follower.join() else { bail!("the checker of the trace panicked") };
    match outcome? {
        Outcome::Ended(0) => tally,
        other => {
            println!("{}", tally?);
            bail!("the machine ended as it should not: {other:?}")
        }
    }
}

/// Checks a trace in text.
fn check_file(file: &Path) -> Result<Tally> {
    let input = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut follower = Follower::new(true, None);
    for (line, text) in (1..).zip(BufReader::new(input).lines()) {
        let entry = text?.parse().with_context(|| format!("{}: line {line}", file.display()))?;
        follower.entry(&entry)?;
    }
    Ok(follower.tally)
}

/// What a trace has in it.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Records by kind.
    pub(crate) records: BTreeMap<&'static str, u64>,
    /// Number of violations.
    pub(crate) violations: u64,
    /// The first of them.
    pub(crate) first: Vec<String>,
}

impl Tally {
    /// Number of records.
    pub(crate) fn total(&self) -> u64 {
        self.records.values().sum()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for violation in &self.first {
            writeln!(f, "violation: {violation}")?;
        }
        for (kind, number) in &self.records {
            writeln!(f, "{kind:<14}{number:>12}")?;
        }
        write!(f, "{} records, {} violations", self.total(), self.violations)
    }
}

/// Counts the records of a trace, checks them and writes them, as far as it is asked to.
pub(crate) struct Follower {
    checker: Option<Checker>,
    out: Option<BufWriter<File>>,
    tally: Tally,
}

impl Follower {
    /// Returns one that has seen nothing.
    pub(crate) fn new(check: bool, out: Option<File>) -> Self {
        Self { checker: check.then(Checker::new), out: out.map(BufWriter::new), tally: Tally::default() }
    }

    /// Follows a stream of packed records to its end.
    pub(crate) fn follow_stream(mut self, mut stream: impl Read) -> Result<Tally> {
        let mut id = 0;
        let mut bytes = [0; Packed::SIZE];
        loop {
            match stream.read_exact(&mut bytes) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(error).context("cannot read the trace"),
            }
            let packed = Packed::from_bytes(bytes);
            for record in packed.records().with_context(|| format!("behind record {id}"))? {
                self.entry(&Entry { id, tid: packed.tid(), record })?;
                id += 1;
            }
        }
        if let Some(out) = &mut self.out {
            out.flush().context("cannot write the trace")?;
        }
        Ok(self.tally)
    }

    fn entry(&mut self, entry: &Entry) -> Result<()> {
        *self.tally.records.entry(entry.record.name()).or_default() += 1;
        if let Some(Err(violation)) = self.checker.as_mut().map(|checker| checker.record(entry)) {
            self.tally.violations += 1;
            if self.tally.first.len() < SHOWN {
                self.tally.first.push(violation.to_string());
            }
        }
        if let Some(out) = &mut self.out {
            writeln!(out, "{}", for_all_checkers(*entry)).context("cannot write the trace")?;
        }
        Ok(())
    }
}

/// The entry as every checker knows it. Where only last levels have changed, which the checker here has seen to, the operation
/// for the last level does what that for all levels does, and not every checker knows it.
fn for_all_checkers(mut entry: Entry) -> Entry {
    if let Record::Tlbi { op, .. } = &mut entry.record
        && *op == TlbiOp::Ipas2le1is
    {
        *op = TlbiOp::Ipas2e1is;
    }
    entry
}
