//! Runs the drivers: random steps, or a sequence from a file.

#![forbid(unsafe_code)]

use std::{
    fs,
    io::{IsTerminal, stderr},
    panic,
    path::PathBuf,
    process::ExitCode,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use lexopt::prelude::{Long, Value, ValueExt};
use ravelin_drivers::{
    op,
    random::{self, Settings},
};

const USAGE: &str = "\
usage: ravelin-drivers random [--calls N] [--seed N] [--world N] [--threads N]
       ravelin-drivers replay FILE";

fn main() -> Result<ExitCode> {
    let mut arguments = lexopt::Parser::from_env();
    let mut words = Vec::new();
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let mut settings = Settings { seed: 1, first: 0, calls: 50_000_000, threads: cpus };
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("calls") => settings.calls = arguments.value()?.parse()?,
            Long("seed") => settings.seed = arguments.value()?.parse()?,
            Long("world") => settings.first = arguments.value()?.parse()?,
            Long("threads") => settings.threads = arguments.value()?.parse()?,
            Value(word) => words.push(word),
            _ => bail!("{USAGE}"),
        }
    }
    // They are failures of a sequence, and shown as such.
    panic::set_hook(Box::new(|_| ()));
    match words.as_slice() {
        [word] if word == "random" => run(&settings),
        [word, file] if word == "replay" => replay(&PathBuf::from(file)),
        _ => bail!("{USAGE}"),
    }
}

fn run(settings: &Settings) -> Result<ExitCode> {
    let start = Instant::now();
    let rate = |calls: u64| calls as f64 / start.elapsed().as_secs_f64();
    let progress = |calls: u64| {
        if stderr().is_terminal() {
            eprint!("\r{calls} calls, {:.0} a second ", rate(calls));
        }
    };
    match random::run(settings, progress) {
        Ok(coverage) => {
            let calls = coverage.calls();
            print!("{coverage}");
            println!(
                "random: {calls} calls, {} states with call and result, seed {}, {:.0} calls a second, no difference",
                coverage.len(),
                settings.seed,
                rate(calls),
            );
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) => {
            println!("# Seed {}, world {}: {}", settings.seed, failure.world, failure.why);
            let steps = random::shortened(failure.steps, |steps| random::replay(steps).is_err());
            println!("# The shortest sequence found fails so: {}", random::replay(&steps).unwrap_err());
            println!("# Put these lines into a file, and replay it.");
            steps.iter().for_each(|step| println!("{step}"));
            Ok(ExitCode::FAILURE)
        }
    }
}

fn replay(file: &PathBuf) -> Result<ExitCode> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(match random::replay(&op::parse(&text)?) {
        Ok(coverage) => {
            print!("{coverage}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("{why}");
            ExitCode::FAILURE
        }
    })
}
