//! Runs the on-target tests of the payload in QEMU, on machines of several kinds, and prints a line for each test on each.
//!
//! ```text
//! ravelin-conformance [--full] [--guests] [--seed N] [--payload FILE] [--guest FILE] [--list] [TEST..]
//! ```
//!
//! TEST is the name of a test, or the beginning of one and a `*`. Without any, `--guests` runs those that have guests, and its
//! absence the others. `--payload` and `--guest` name the payload and its guest as flat binaries; without them, they are built. `--seed` is that of
//! the first round of random tests. `cargo xtask run` starts the machines.

#![forbid(unsafe_code)]

mod gdb;
#[cfg(test)]
mod known_bugs;
mod machine;
mod monitor;
mod output;
mod panics;
mod payload;
mod reached;
mod run;

use std::{collections::BTreeSet, path::PathBuf, process::ExitCode};

use anyhow::{Result, bail};
use ravelin_abi::CALLS;
use ravelin_payload::{TESTS, Test};

use crate::{
    machine::{HYPERCALLS, Machine},
    output::Verdict,
    reached::Reached,
    run::Images,
};

/// How the names of tests begin that have guests.
const GUESTS: &str = "guests.";

/// The check of what the hypervisor says when it fails.
const BROKEN: &str = "a broken instruction is reported";

/// What the command line asks for.
#[derive(Debug, Default)]
struct Options {
    full: bool,
    guests: bool,
    list: bool,
    payload: Option<PathBuf>,
    guest: Option<PathBuf>,
    seed: Option<u64>,
    tests: Vec<String>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self::default();
        let file = |option: &str, argument: Option<String>| match argument {
            Some(file) => Ok(Some(file.into())),
            None => bail!("{option} wants a file"),
        };
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--full" => options.full = true,
                "--list" => options.list = true,
                "--guests" => options.guests = true,
                "--payload" => options.payload = file("--payload", arguments.next())?,
                "--guest" => options.guest = file("--guest", arguments.next())?,
                "--seed" => match arguments.next().and_then(|seed| seed.parse().ok()) {
                    Some(seed) => options.seed = Some(seed),
                    None => bail!("--seed wants a number"),
                },
                option if option.starts_with('-') => bail!("unknown option {option}"),
                _ => options.tests.push(argument),
            }
        }
        Ok(options)
    }

    /// Returns the arguments with which the payload runs what is wanted on a machine, if anything is.
    fn arguments(&self, machine: &Machine) -> Option<String> {
        let tests = match (&*self.tests, machine.only, self.guests) {
            ([_, ..], ..) => self.tests.join(","),
            ([], [], true) => GUESTS.to_owned() + "*",
            ([], [], false) => "all skip=".to_owned() + GUESTS + "*",
            ([], only, guests) => {
                let in_suite = |name: &&&str| name.starts_with(GUESTS) == guests;
                let names: Vec<_> = only.iter().filter(in_suite).copied().collect();
                if names.is_empty() {
                    return None;
                }
                names.join(",")
            }
        };
        let mut arguments = format!("test={tests} effort={}", if self.full { 3 } else { 1 });
        if let Some(rounds) = machine.rounds {
            arguments += &format!(" rounds={rounds} steps=4000");
        }
        if let Some(seed) = self.seed {
            arguments += &format!(" seed={seed}");
        }
        Some(arguments)
    }
}

fn main() -> ExitCode {
    match Options::parse(std::env::args().skip(1)).and_then(|options| conformance(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints a line for each test on each machine; returns whether none failed.
fn conformance(options: &Options) -> Result<bool> {
    if options.list {
        TESTS.iter().for_each(|test| println!("{}: {}", test.name, test.about));
        return Ok(true);
    }
    let mut failed = 0_usize;
    let mut report = |name: &str, verdict: &Verdict| {
        println!("test {name} ... {verdict}");
        failed += usize::from(matches!(verdict, Verdict::Failed(_)));
    };

    let untested = calls_without_test();
    let verdict = if untested.is_empty() { Verdict::Passed } else { Verdict::Failed(untested.join(", ")) };
    report("every call of the table has a test", &verdict);

    let build = |given: &Option<PathBuf>, package| given.clone().map_or_else(|| payload::build(package), Ok);
    let payload = build(&options.payload, "ravelin-payload")?;
    let images = Images { payload: &payload, guest: &build(&options.guest, "ravelin-guest")? };
    let (mut seen, mut reached) = (BTreeSet::new(), Reached::default());
    for machine in machine::matrix(options.full) {
        let Some(arguments) = options.arguments(&machine) else { continue };
        let mut on_machine = |test: &str, verdict: &Verdict| {
            // What this machine lacks, another one has; if none has it, that is a failure, below.
            if !matches!(verdict, Verdict::Ignored(_)) {
                seen.insert(test.to_owned());
                report(&format!("{machine}: {test}"), verdict);
            }
        };
        run::run(&machine, images, &arguments, &mut reached, &mut on_machine)?;
    }
    reached.print(options.full);
    if options.tests.is_empty() {
        let in_suite = |test: &&Test| test.name.starts_with(GUESTS) == options.guests;
        for test in TESTS.iter().filter(in_suite).filter(|test| !seen.contains(test.name)) {
            report(test.name, &Verdict::Failed("no machine of the matrix has what it needs".into()));
        }
    }
    if options.tests.is_empty() && !options.guests {
        let usual = Machine::USUAL;
        report(&format!("{usual}: the payload resets the machine"), &run::resets(&usual, images)?);
        report(&format!("{usual}: {BROKEN}"), &run::fails(&usual, images)?);
    }
    if options.tests.is_empty() && !options.guests && options.full {
        let demand = |holds, why: String| if holds { Verdict::Passed } else { Verdict::Failed(why) };
        let missing = reached.missing();
        report("every result that can be reached is", &demand(missing.is_empty(), missing.join(", ")));
        let random = reached.random();
        report("a million random hypercalls", &demand(random >= HYPERCALLS, format!("{random} of {HYPERCALLS}")));
        let compared = reached.compared();
        report("all of them were compared", &demand(compared >= random, format!("{compared} of {random}")));
    }
    Ok(failed == 0)
}

/// Hypercalls that no test of the payload names.
fn calls_without_test() -> Vec<&'static str> {
    let has_test = |name| TESTS.iter().any(|test| test.calls.contains(&name));
    CALLS.iter().map(|call| call.name).filter(|&name| !has_test(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_has_a_test() {
        assert_eq!(calls_without_test(), [""; 0]);
    }

    #[test]
    fn tests_name_calls_of_the_table() {
        for test in TESTS {
            for name in test.calls {
                assert!(CALLS.iter().any(|call| call.name == *name), "{}: {name}", test.name);
            }
        }
    }

    #[test]
    fn tests_have_different_names_that_fit_on_the_command_line() {
        let names: BTreeSet<_> = TESTS.iter().map(|test| test.name).collect();
        assert_eq!(names.len(), TESTS.len());
        assert!(names.iter().all(|name| name.chars().all(|c| c.is_ascii_lowercase() || "._0123456789".contains(c))));
    }

    #[test]
    fn every_test_fits_a_machine_of_the_default_matrix() {
        let matrix = machine::matrix(false);
        for test in TESTS {
            assert!(matrix.iter().any(|machine| machine.has_what_it_takes(test)), "{}", test.name);
        }
    }

    #[test]
    fn options() {
        let parse = |text: &str| Options::parse(text.split_whitespace().map(str::to_owned));
        let options = parse("--full --payload x.bin --guest y.bin --seed 7 pins.* psci.race").unwrap();
        assert!(options.full && !options.guests);
        assert_eq!(options.payload, Some("x.bin".into()));
        assert_eq!(options.guest, Some("y.bin".into()));
        assert_eq!(options.tests, ["pins.*", "psci.race"]);
        assert_eq!(options.arguments(&Machine::USUAL).as_deref(), Some("test=pins.*,psci.race effort=3 seed=7"));
        assert!(parse("--payload").is_err());
        assert!(parse("--fast").is_err());
        assert!(parse("--seed").is_err() && parse("--seed x").is_err());
    }

    #[test]
    fn a_machine_for_some_tests_runs_those_of_the_suite() {
        let machine = Machine { only: &["pins.*", "guests.life_cycle"], rounds: Some(5), ..Machine::USUAL };
        let arguments = |guests, machine: &Machine| Options { guests, ..Options::default() }.arguments(machine);
        assert_eq!(arguments(false, &machine).as_deref(), Some("test=pins.* effort=1 rounds=5 steps=4000"));
        assert_eq!(arguments(true, &machine).as_deref(), Some("test=guests.life_cycle effort=1 rounds=5 steps=4000"));
        assert_eq!(arguments(true, &Machine { only: &["pins.*"], ..machine }), None);
        assert_eq!(arguments(false, &Machine::USUAL).as_deref(), Some("test=all skip=guests.* effort=1"));
    }
}
