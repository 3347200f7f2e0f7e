//! Random sequences of calls from all CPUs at once, and of guests.
//!
//! On the command line `rounds=N` says how many rounds there are, `steps=N` how long one is, and `seed=N` which the first one is.
//! Each has a seed of its own, the next number, and starts from the same state. So a round that fails is repeated alone: with one
//! CPU it makes the same calls in the same order, and with several it does on a machine that counts instructions in the place of
//! time.

mod calls;
mod guests;
mod own;
mod playground;

use ravelin_abi::VmKind;
use ravelin_guest::playground::Random;

use crate::{
    rt::{console::println, memory::BLOCK, platform::platform, tally, vm::Pages},
    tests::{Failure, Outcome, arena, check_eq, on_all_cpus, page_counts},
};
use guests::Guests;
use own::OwnPages;
use playground::{Playground, SIZE};

/// Steps of a round if `steps=N` does not say otherwise. Each CPU takes a part: the more of them there are, the longer each waits
/// for locks.
const STEPS: u64 = 1000;

/// Random calls and accesses of all CPUs about the same pages of the host; then the states of pages add up to the counts.
pub(crate) fn host_calls() -> Outcome {
    in_rounds("random.host_calls", |seed| {
        let before = page_counts()?;
        let playground = Playground::of_pages(arena(4 * BLOCK));
        let hypercalls = play(seed, &playground, None)?;
        playground.check_totals(before)?;
        playground.restore_pages()?;
        check_eq!(page_counts()?, before, "pages by state");
        Ok(hypercalls)
    })
}

/// The same with VMs that come and go, and with guests of each kind that run on any CPU and do things at random, too.
pub(crate) fn everything() -> Outcome {
    in_rounds("random.everything", |seed| {
        let before = page_counts()?;
        let pages = Pages::new(16 * BLOCK);
        let vms = guests::boot(&pages)?;
        let guests = Guests::new(&vms)?;
        let playground = Playground::with_vms(pages.take_aligned(SIZE, 512)?, &pages, &vms)?;
        let hypercalls = play(seed, &playground, Some(&guests))?;
        guests.finish()?;
        playground.end_vms(&pages)?;
        playground.restore_pages()?;
        vms.iter().try_for_each(|vm| vm.end())?;
        check_eq!(page_counts()?, before, "pages by state");
        Ok(hypercalls)
    })
}

/// Kinds of the VMs whose guests run.
const KINDS: [VmKind; 3] = [VmKind::Pkvm, VmKind::Realm, VmKind::Ordinary];

/// A number of the command line.
fn number(name: &str, default: u64) -> u64 {
    platform().argument(name).and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Runs rounds, which return how many hypercalls host and guests have made at random.
fn in_rounds(test: &str, round: impl Fn(u64) -> Result<u64, Failure>) -> Outcome {
    let first = number("seed", 1);
    let rounds = number("rounds", platform().effort());
    let steps = number("steps", STEPS);
    println!("\nrandom: {rounds} rounds of {steps} steps from seed {first}");
    let mut hypercalls = 0;
    for seed in (0..rounds).map(|round| first.wrapping_add(round)) {
        println!("random: seed {seed}");
        match round(seed) {
            Ok(count) => hypercalls += count,
            Err(failure) => {
                println!("random: again with 'test={test} seed={seed} steps={steps} rounds=1'");
                return Err(Failure::new(format_args!("seed {seed}: {failure}")));
            }
        }
    }
    tally::for_each(|call, result, count| println!("random: {call} {result} {count}"));
    println!("random: {hypercalls} hypercalls");
    Ok(())
}

/// Lets all CPUs take their steps. Returns how many hypercalls that were.
fn play(seed: u64, playground: &Playground<'_>, guests: Option<&Guests<'_>>) -> Result<u64, Failure> {
    let before = tally::total();
    let steps = number("steps", STEPS) / platform().cpus.len() as u64;
    on_all_cpus(|cpu| {
        let mut random = Random::new(seed ^ (cpu as u64) << 56);
        let mut own = OwnPages::new(playground.own_pages(cpu), &mut random);
        if cpu == 0 {
            playground.reach_limits(seed)?;
        }
        for _ in 0..steps {
            match (random.below(16), guests) {
                (0..2, _) => playground.access(&mut random)?,
                (2..4, _) => own.step(&mut random)?,
                (4, _) => calls::firmware(&mut random)?,
                (5..8, Some(guests)) => guests.turn(playground, &mut random)?,
                _ => playground.call(&mut random)?,
            }
        }
        own.finish()
    })?;
    Ok(tally::total() - before)
}
