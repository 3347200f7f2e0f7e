//! Runs the drivers: random steps, all steps of small worlds, or a sequence from a file.

#![forbid(unsafe_code)]

use std::{
    fs,
    io::{IsTerminal, stderr},
    panic,
    path::Path,
    process::ExitCode,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use lexopt::prelude::{Long, Value, ValueExt};
use ravelin_drivers::{
    coverage::Coverage,
    draft,
    op::{self, Op},
    random::{self, Settings},
    small::{self, Explored},
};
use ravelin_world::Layout;

const USAGE: &str = "\
usage: ravelin-drivers random [--calls N] [--seed N] [--world N] [--threads N]
       ravelin-drivers small [--threads N]
       ravelin-drivers all [--calls N] [--seed N] [--threads N]
       ravelin-drivers replay [--small] FILE

random   makes calls at random
small    makes all calls in all states of small worlds
all      does both, and demands that random calls have reached what small worlds have
replay   takes the steps of a file, in the world of random calls or in a small one";

fn main() -> Result<ExitCode> {
    let mut arguments = lexopt::Parser::from_env();
    let mut words = Vec::new();
    let mut layout = &draft::LAYOUT;
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let mut settings = Settings { seed: 1, first: 0, calls: 50_000_000, threads: cpus };
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("calls") => settings.calls = arguments.value()?.parse()?,
            Long("seed") => settings.seed = arguments.value()?.parse()?,
            Long("world") => settings.first = arguments.value()?.parse()?,
            Long("threads") => settings.threads = arguments.value()?.parse()?,
            Long("small") => layout = &small::LAYOUT,
            Value(word) => words.push(word),
            _ => bail!("{USAGE}"),
        }
    }
    // They are failures of a sequence, and shown as such.
    panic::set_hook(Box::new(|_| ()));
    let passed = match words.as_slice() {
        [word] if word == "random" => random(&settings).is_some(),
        [word] if word == "small" => small(settings.threads).is_some(),
        [word] if word == "all" => all(&settings),
        [word, file] if word == "replay" => {
            let file = Path::new(file);
            let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
            let replayed = random::replay(layout, &op::parse(&text)?);
            match &replayed {
                Ok(coverage) => print!("{coverage}"),
                Err(why) => println!("{why}"),
            }
            replayed.is_ok()
        }
        _ => bail!("{USAGE}"),
    };
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Shows a line that is gone soon, to who looks on.
fn show(line: &str) {
    if stderr().is_terminal() {
        eprint!("\r{line} ");
    }
}

/// Prints those steps of a sequence that it needs to fail, and how to replay them.
fn print_shortened(layout: &Layout, steps: Vec<Op>, how: &str) {
    let run = |steps: &[Op]| random::replay(layout, steps).err();
    let steps = random::shortened(steps, |steps| run(steps).is_some());
    println!("shortened, {}; to be replayed{how}:", run(&steps).as_deref().unwrap_or("no difference"));
    steps.iter().for_each(|step| println!("{step}"));
}

/// Makes random calls. Returns what they have reached, unless they fail.
fn random(settings: &Settings) -> Option<Coverage> {
    let start = Instant::now();
    let rate = |calls: u64| calls as f64 / start.elapsed().as_secs_f64();
    match random::run(settings, |calls| show(&format!("{calls} calls, {:.0} a second", rate(calls)))) {
        Ok(coverage) => {
            print!("{coverage}");
            let calls = coverage.calls();
            println!(
                "random: {calls} calls with seed {}, {:.0} a second; {} times state, call and result; no difference",
                settings.seed,
                rate(calls),
                coverage.len(),
            );
            Some(coverage)
        }
        Err(failure) => {
            println!("random: seed {}, world {}: {}", settings.seed, failure.world, failure.why);
            print_shortened(&draft::LAYOUT, failure.steps, "");
            None
        }
    }
}

/// Explores small worlds. Returns what they have reached, unless one fails.
fn small(threads: usize) -> Option<Coverage> {
    let mut all = Coverage::default();
    for bounds in small::worlds(threads) {
        let start = Instant::now();
        let progress =
            |explored: &Explored| show(&format!("{} states, {} steps away", explored.states, explored.depth));
        match small::explore(&bounds, progress) {
            Ok(Explored { states, transitions, depth, is_complete, coverage }) => {
                println!(
                    "small: {bounds}: {states} states, {transitions} transitions, {} {depth} steps away, {:.0} s; no difference",
                    if is_complete { "all; the furthest is" } else { "all up to those" },
                    start.elapsed().as_secs_f64(),
                );
                all.add(coverage);
            }
            Err(failure) => {
                println!("small: {bounds}: {}", failure.why);
                print_shortened(&small::LAYOUT, failure.steps, " with --small");
                return None;
            }
        }
    }
    println!("small: {} times state, call and result", all.len());
    Some(all)
}

/// Does both. Returns whether all is well.
fn all(settings: &Settings) -> bool {
    let (Some(reachable), Some(reached)) = (small(settings.threads), random(settings)) else { return false };
    let lacking: Vec<_> = reached.lacks(&reachable).collect();
    lacking.iter().for_each(|lacking| println!("not reached by random calls: {lacking}"));
    println!("coverage: {} of {} that can be reached", reachable.len() - lacking.len(), reachable.len());
    lacking.is_empty()
}
