//! Conversions on several CPUs at once: what they cost, and how long CPUs wait for each other's locks.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

use super::Bench;
use super::event::Event;
use super::profile::{Executed, Functions};
use super::report::{Report, digits};

/// The payload's test.
const TEST: &str = "bench.contention";

/// MiB of RAM: enough for a GiB for each CPU.
const MEMORY: u64 = 10 << 10;

/// Numbers of CPUs.
const CPUS: [u32; 4] = [1, 2, 4, 8];

/// Instructions that a CPU executes before it is another one's turn. Fewer change nothing but the time that it takes.
const TURN: u32 = 32;

/// What the CPUs have done together, between two marks.
#[derive(Debug)]
struct Run {
    /// Who converts.
    name: String,
    cpus: u32,
    conversions: u64,
    el1: u64,
    el2: u64,
    /// By the type that the lock is a part of.
    locks: BTreeMap<String, Lock>,
}

/// What became of a lock.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Lock {
    /// How often a CPU has looked whether it has the lock.
    looks: u64,
    /// How often it had not.
    spins: u64,
}

impl Lock {
    /// How often it was taken.
    fn acquisitions(self) -> u64 {
        self.looks.saturating_sub(self.spins)
    }
}

impl Bench {
    /// Counts conversions on several CPUs.
    pub(super) fn contention(&self, report: &mut Report) -> Result<()> {
        let runs = CPUS.into_iter().map(|cpus| self.contend(cpus)).collect::<Result<Vec<_>>>()?;
        let mut runs: Vec<_> = runs.into_iter().flatten().collect();
        runs.sort_by(|one, other| one.name.cmp(&other.name));
        print(report, &runs)
    }

    fn contend(&self, cpus: u32) -> Result<Vec<Run>> {
        let mut options = self.payload_options(MEMORY, TEST);
        (options.smp, options.icount, options.one_insn_per_tb) = (Some(cpus), true, true);
        let functions = Functions::of(&options)?;
        let (console, events) = self.run_payload(&options, &format!(",profile=on,turns={TURN}"))?;
        let names: Vec<_> = console.lines().filter_map(|line| line.trim().strip_prefix("bench ")).collect();
        let marks: Vec<_> = events.windows(2).filter(|pair| pair[1].get("number") == 1).collect();
        ensure!(names.len() == marks.len(), "{} measurements; the console:\n{console}", marks.len());
        ensure!(names.iter().any(|name| name.contains(".apart ")), "{cpus} CPUs have no GiB each in {MEMORY} MiB");
        names
            .into_iter()
            .zip(marks)
            .map(|(name, pair)| Run::new(name, cpus, &pair[1], locks(&functions, &pair[0])))
            .collect()
    }
}

impl Run {
    /// `label` is what the payload says: who converts, how many CPUs have done so all the time, and how many conversions these are.
    fn new(label: &str, cpus: u32, counts: &Event, locks: BTreeMap<String, Lock>) -> Result<Self> {
        let [name, busy, conversions] = label.split(' ').collect::<Vec<_>>()[..] else {
            bail!("the payload says {label:?}")
        };
        ensure!(busy == cpus.to_string(), "{name}: only {busy} of {cpus} CPUs have worked all the time");
        let [el1, el2] = [1, 2].map(|level| counts.get(&format!("el{level}.instructions")));
        Ok(Self { name: name.into(), cpus, conversions: conversions.parse()?, el1, el2, locks })
    }

    fn per_conversion(&self, count: u64) -> f64 {
        count as f64 / self.conversions as f64
    }

    /// Instructions that each CPU executes while all of them together do one conversion.
    fn time(&self) -> f64 {
        self.per_conversion(self.el1 + self.el2) / f64::from(self.cpus)
    }
}

/// What became of each lock.
fn locks(functions: &Functions, profile: &Event) -> BTreeMap<String, Lock> {
    let mut locks = BTreeMap::<String, Lock>::new();
    for Executed { word, count, frames } in functions.executed(profile, |word| is_look(word) || word == ISB) {
        let Some(name) = lock_name(&frames) else { continue };
        let lock = locks.entry(name.to_owned()).or_default();
        if word == ISB {
            lock.spins += count;
        }
        // Who waits for those who hold the lock together looks by another instruction, once for each of these.
        if is_look(word) || frames.iter().any(|frame| is_method(frame, "RwLockUpgradableGuard", "upgrade")) {
            lock.looks += count;
        }
    }
    locks
}

/// Whether a function is this method of that type of `spin`'s.
fn is_method(function: &str, of: &str, method: &str) -> bool {
    let function = function.split(" at ").next().unwrap_or(function);
    function.starts_with("spin::")
        && function.contains(&format!("::{of}<"))
        && function.ends_with(&format!("::{method}"))
}

/// ISB, which is what Rust makes of a hint that a loop waits.
const ISB: u32 = 0xd503_3fdf;

/// Whether an instruction is a load-acquire, by which a lock that gives out tickets looks whose turn it is.
fn is_look(word: u32) -> bool {
    word & 0xbfff_fc00 == 0x88df_fc00
}

/// The type that the lock is a part of, if these functions are about taking one: that of the function which does it.
fn lock_name(frames: &[String]) -> Option<&str> {
    let functions = || frames.iter().map(|frame| frame.split(" at ").next().unwrap_or(frame));
    let lock = functions().position(|function| {
        is_method(function, "TicketMutex", "lock") || is_method(function, "RwLockUpgradableGuard", "upgrade")
    })?;
    let function = functions().skip(lock + 1).find(|function| !function.contains("::FairRwLock<"))?;
    // Of a method of a trait, that is the type which has it.
    let of = function.strip_prefix('<').and_then(|function| function.split(" as ").next()).unwrap_or(function);
    let mut path = of.rsplit("::");
    let name = path.find(|part| part.starts_with(|first: char| first.is_ascii_uppercase()))?;
    name.split('<').next()
}

/// Prints the runs, each beside what one CPU does alone.
fn print(report: &mut Report, runs: &[Run]) -> Result<()> {
    report.end();
    report.line(format_args!(
        "\n{:<32}{:>5}{:>12}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}  of which for",
        "Conversions on several CPUs", "CPUs", "conversions", "EL1", "EL2", "time", "speed-up", "locks", "spins"
    ));
    for run in runs {
        let alone = runs.iter().find(|one| one.name == run.name && one.cpus == 1);
        let speed_up = alone.with_context(|| format!("{} is not there for one CPU", run.name))?.time() / run.time();
        let sum = |of: fn(Lock) -> u64| run.per_conversion(run.locks.values().copied().map(of).sum());
        let (acquisitions, spins) = (sum(Lock::acquisitions), sum(|lock| lock.spins));
        let waits = run.locks.iter().filter(|(_, lock)| lock.spins != 0);
        let waits = waits.map(|(name, lock)| format!("{name} {:.1}", run.per_conversion(lock.spins)));
        report.line(format_args!(
            "  {:<30}{:>5}{:>12}{:>10.1}{:>10.1}{:>10.1}{speed_up:>10.2}{acquisitions:>10.2}{spins:>10.1}  {}",
            run.name,
            run.cpus,
            digits(run.conversions as f64),
            run.per_conversion(run.el1),
            run.per_conversion(run.el2),
            run.time(),
            waits.collect::<Vec<_>>().join(", "),
        ));
        let row = format!("contention.{}.{}", run.name, run.cpus);
        for (column, value) in [
            ("conversions", run.conversions as f64),
            ("el1", run.per_conversion(run.el1)),
            ("el2", run.per_conversion(run.el2)),
            ("time", run.time()),
            ("speed-up", speed_up),
            ("acquisitions", acquisitions),
            ("spins", spins),
        ] {
            report.add(format!("{row}.{column}"), value);
        }
        for (name, lock) in &run.locks {
            report.add(format!("{row}.{name}-acquisitions"), run.per_conversion(lock.acquisitions()));
            report.add(format!("{row}.{name}-spins"), run.per_conversion(lock.spins));
        }
    }
    report.printed_already();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_named_by_what_they_are_a_part_of() {
        let name = |frames: &[&str]| {
            let frames: Vec<_> = frames.iter().map(|frame| (*frame).to_owned()).collect();
            lock_name(&frames).map(str::to_owned)
        };
        let spin = "core::hint::spin_loop at core/src/hint.rs:1";
        let lock = "spin::mutex::ticket::TicketMutex<T,R>::lock at ticket.rs:9";
        let memory = "ravelin_ownership::memory::Memory<P>::lock at hyp/ownership/src/memory.rs:229";
        let gic = "<ravelin_vm::vm::Vm<O,G,V>>::with_gic::{{closure}} at hyp/vm/src/vm.rs:210";
        assert_eq!(name(&[spin, lock, memory, gic]).as_deref(), Some("Memory"));
        assert_eq!(name(&[lock, gic]).as_deref(), Some("Vm"));
        let fair = "ravelin_sync::fair::FairRwLock<T>::write at hyp/sync/src/fair.rs:40";
        let guest = "ravelin_ownership::guest::GuestMemory::lock at hyp/ownership/src/guest.rs:131";
        let drain = "spin::rwlock::RwLockUpgradableGuard<T,R>::upgrade at rwlock.rs:9";
        assert_eq!(name(&[spin, lock, fair, guest]).as_deref(), Some("GuestMemory"));
        assert_eq!(name(&[spin, drain, fair, guest]).as_deref(), Some("GuestMemory"));
        let tables = "<ravelin_ownership::pool::Tables<P> as ravelin_pgtable::machine::TablePool>::free at pool.rs:7";
        assert_eq!(name(&[spin, lock, tables]).as_deref(), Some("Tables"));
        assert_eq!(name(&[spin, "ravelin::psci::Psci::turn_off at psci.rs:299"]), None);
        assert_eq!(name(&[lock]), None);
        assert!(is_look(0xc8df_fd29) && !is_look(ISB)); // ldar x9, [x9]
    }

    #[test]
    fn runs_stand_beside_the_one_of_one_cpu() {
        let run = |cpus: u32, conversions: u64, spins: u64| {
            let counts = Event::parse("mark-all number=1 el1.instructions=200 el2.instructions=1800").unwrap();
            let locks = [("Memory".to_owned(), Lock { looks: conversions + spins, spins })].into();
            Run::new(&format!("host.share {cpus} {conversions}"), cpus, &counts, locks).unwrap()
        };
        let mut report = Report::default();
        print(&mut report, &[run(1, 10, 0), run(2, 10, 30)]).unwrap();
        let lines: Vec<Vec<_>> = report.text.lines().skip(2).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["host.share", "1", "10", "20.0", "180.0", "200.0", "1.00", "1.00", "0.0"]);
        assert_eq!(lines[1][5..], ["100.0", "2.00", "1.00", "3.0", "Memory", "3.0"]);
        let rows = report.rows();
        assert_eq!(rows["contention.host.share.2"]["Memory-spins"], 3.0);
        assert_eq!(rows["contention.host.share.2"]["Memory-acquisitions"], 1.0);
        assert!(print(&mut Report::default(), &[run(2, 10, 0)]).is_err());
    }

    #[test]
    fn all_cpus_must_have_worked() {
        let counts = Event::default();
        assert!(Run::new("host.share 3 10", 4, &counts, BTreeMap::new()).is_err());
        assert!(Run::new("host.share 4", 4, &counts, BTreeMap::new()).is_err());
    }
}
