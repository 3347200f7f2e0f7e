//! `cargo xtask trace`: what the hypervisor does to translation tables and TLBs, as text, checked as it comes.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
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
pub(crate) const REPRESENTATIVE: &str = "test=ownership.every_call_from_every_state,pins.*,stale.*,psci.race,\
    guests.life_cycle,guests.conversion_*,guests.unshare_of_claimed_pages,guests.relinquish,guests.relinquish_of_poison,\
    guests.force_reclaim_poisons,guests.reclaim_at_the_end,guests.ordinary_vm_borrows,guests.stale_*";

/// All tests of the payload but the one for which somebody has to look into memory from outside. `checked` lets the carve-out have
/// room for the model.
pub(crate) const ALL: &str = "test=all skip=contents.kept_when_donated checked=yes";

/// Violations that are shown.
const SHOWN: usize = 20;

/// Options of `trace`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Options {
    /// Check the trace, and write it to FILE, one record a line
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
    /// Use a build that checks nothing itself: it lets CPUs into EL2 at the same time
    #[arg(long)]
    unchecked: bool,
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
            checked: !options.unchecked,
            ..run::Options::default()
        };
        let out = match &options.out {
            Some(file) => Some(File::create(file).with_context(|| format!("cannot write {}", file.display()))?),
            None => None,
        };
        record(machine, Follower::new(out), &mut std::io::stdout().lock())?
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
    let mut follower = Follower::new(None);
    for (line, text) in (1..).zip(BufReader::new(input).lines()) {
        let entry = text?.parse().with_context(|| format!("{}: line {line}", file.display()))?;
        follower.entry(&entry)?;
    }
    Ok(follower.tally)
}

/// What a trace has in it.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Records by kind, those of TLB maintenance by operation.
    pub(crate) records: BTreeMap<&'static str, u64>,
    /// Operations on ranges, each of which is as many records as pages.
    pub(crate) ranges: u64,
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
        writeln!(f, "{} operations on ranges", self.ranges)?;
        write!(f, "{} records, {} violations", self.total(), self.violations)
    }
}

/// Counts the records of a trace, checks them and, given a file, writes them.
pub(crate) struct Follower {
    checker: Checker,
    out: Option<BufWriter<File>>,
    tally: Tally,
}

impl Follower {
    /// Returns one that has seen nothing.
    pub(crate) fn new(out: Option<File>) -> Self {
        Self { checker: Checker::new(), out: out.map(BufWriter::new), tally: Tally::default() }
    }

    /// Follows a stream of packed records to its end.
    pub(crate) fn follow_stream(mut self, mut stream: impl BufRead) -> Result<Tally> {
        let mut id = 0;
        let mut bytes = [0; Packed::SIZE];
        while !stream.fill_buf().context("cannot read the trace")?.is_empty() {
            stream.read_exact(&mut bytes).with_context(|| format!("the trace breaks off behind record {id}"))?;
            let packed = Packed::from_bytes(bytes);
            let first = id;
            for record in packed.records().with_context(|| format!("behind record {id}"))? {
                self.entry(&Entry { id, tid: packed.tid(), record })?;
                id += 1;
            }
            self.tally.ranges += u64::from(id - first > 1);
        }
        if let Some(out) = &mut self.out {
            out.flush().context("cannot write the trace")?;
        }
        Ok(self.tally)
    }

    fn entry(&mut self, entry: &Entry) -> Result<()> {
        let kind = match entry.record {
            Record::Tlbi { op, .. } => op.name(),
            record => record.name(),
        };
        *self.tally.records.entry(kind).or_default() += 1;
        if let Err(violation) = self.checker.record(entry) {
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

#[cfg(test)]
mod tests {
    use ravelin_trace::{Barrier, Dsb, MemOrder, Sysreg};

    use super::*;

    /// A stage 2 with two pages, which are unmapped by one operation for the range.
    fn stream() -> Vec<Packed> {
        let (root, middle, last) = (0x1000, 0x2000, 0x3000);
        let init = |address| Record::MemInit { address, size: 0x1000 };
        let write = |address, value| Record::MemWrite { order: MemOrder::Plain, address, value };
        let dsb = |kind| Record::Barrier(Barrier::Dsb(kind));
        let set = |register, value| Record::SysregWrite { register, value };
        let guard = Record::Hint { kind: ravelin_trace::Hint::SetRootLock, location: root, value: root };
        let tables = [guard, Record::Lock(root), init(root), init(middle), init(last), write(middle, last | 3)];
        let link = [dsb(Dsb::Ishst), write(root, middle | 3), dsb(Dsb::Ish)];
        let enter = [set(Sysreg::VtcrEl2, 0x8002_3559), set(Sysreg::VttbrEl2, root), Record::Barrier(Barrier::Isb)];
        let map = [write(last, 0x8000_0403), write(last + 8, 0x8000_1403), dsb(Dsb::Ishst)];
        let unmap = [write(last, 0), write(last + 8, 0), dsb(Dsb::Ishst)];
        let rest = Record::Tlbi { op: TlbiOp::Vmalle1is, operand: 0 };
        let end = [dsb(Dsb::Ish), rest, dsb(Dsb::Ish), Record::Unlock(root)];

        let pack = |record| Packed::of(1, record);
        let mut stream: Vec<_> =
            tables.into_iter().chain(link).chain(enter).chain(map).chain(unmap).map(pack).collect();
        // SCALE = 0, NUM = 0: two pages.
        stream.push(Packed::of_range(1, TlbiOp::Ipas2le1is, 1 << 46));
        stream.extend(end.map(pack));
        stream
    }

    fn follow(stream: &[Packed], out: Option<File>) -> Tally {
        let bytes: Vec<u8> = stream.iter().flat_map(|packed| packed.to_bytes()).collect();
        Follower::new(out).follow_stream(&bytes[..]).unwrap()
    }

    #[test]
    fn invalidations_that_get_lost_are_reported() {
        let stream = stream();
        let whole = follow(&stream, None);
        assert_eq!((whole.violations, whole.ranges), (0, 1), "{whole}");
        assert_eq!((whole.records["ipas2le1is"], whole.records["vmalle1is"]), (2, 1), "{whole}");
        let is_tlbi = |packed: &Packed| packed.records().unwrap().any(|record| record.name() == "tlbi");
        let lost: Vec<_> = (0..stream.len()).filter(|&index| is_tlbi(&stream[index])).collect();
        assert_eq!(lost.len(), 2);
        for index in lost {
            let mut less = stream.clone();
            less.remove(index);
            let tally = follow(&less, None);
            assert_eq!(tally.violations, 1, "{tally}");
            assert!(tally.first[0].contains("missing invalidation"), "{tally}");
        }
    }

    #[test]
    fn text_says_the_same_as_the_stream() {
        let scratch = Scratch::new().unwrap();
        let file = scratch.path("trace.txt");
        let written = follow(&stream(), Some(File::create(&file).unwrap()));
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(" (tid 1) ipas2e1is (value 1))\n"), "{text}");
        let read = check_file(&file).unwrap();
        assert_eq!((read.total(), read.violations), (written.total(), 0));
        // The first record comes last.
        let (first, rest) = text.split_once('\n').unwrap();
        std::fs::write(&file, format!("{rest}{first}\n")).unwrap();
        assert_ne!(check_file(&file).unwrap().violations, 0);
        std::fs::write(&file, "(lock)\n").unwrap();
        assert!(check_file(&file).unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn a_stream_of_something_else_is_refused() {
        assert!(Follower::new(None).follow_stream(&[0xff; 16][..]).is_err());
    }

    #[test]
    fn a_stream_that_breaks_off_is_refused() {
        let bytes: Vec<u8> = stream()[..2].iter().flat_map(|packed| packed.to_bytes()).collect();
        for end in 0..=bytes.len() {
            let followed = Follower::new(None).follow_stream(&bytes[..end]);
            assert_eq!(followed.is_ok(), end.is_multiple_of(Packed::SIZE), "{end} bytes");
        }
    }
}
