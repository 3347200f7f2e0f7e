//! Long runs of random steps, in one world after the other.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use ravelin_world::{Layout, in_world};

use crate::{
    coverage::Coverage,
    draft::{Draft, LAYOUT, draft, resolve},
    op::Op,
    sequence::Sequence,
};

/// Steps in one world. A VM lives for some hundred of them.
pub const STEPS: u64 = 4096;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Where chance begins. With the same seed the same happens.
    pub seed: u64,
    /// The world to begin with, which has the steps from `STEPS * first` on.
    pub first: u64,
    /// How many calls of hosts and guests are to be made at least.
    pub calls: u64,
    /// How many threads run worlds.
    pub threads: usize,
}

/// A sequence that the model does not allow.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The world in which it happened.
    pub world: u64,
    /// The steps.
    pub steps: Vec<Op>,
    /// What is wrong.
    pub why: String,
}

/// Runs worlds until so many calls have been made. Returns what they have reached.
///
/// # Errors
///
/// The first sequence found that fails, as it is.
pub fn run(settings: &Settings, progress: impl Fn(u64) + Sync) -> Result<Coverage, Box<Failure>> {
    let (next, calls, failed) = (AtomicU64::new(settings.first), AtomicU64::new(0), AtomicBool::new(false));
    let result = Mutex::new(Ok(Coverage::default()));
    let worker = || {
        while calls.load(Relaxed) < settings.calls && !failed.load(Relaxed) {
            let world = next.fetch_add(1, Relaxed);
            let ran = run_world(settings.seed, world);
            let mut result = result.lock().unwrap_or_else(PoisonError::into_inner);
            match (ran, &mut *result) {
                (Ok(coverage), Ok(all)) => {
                    progress(calls.fetch_add(coverage.calls(), Relaxed) + coverage.calls());
                    all.add(coverage);
                }
                (Err(failure), Ok(_)) => {
                    failed.store(true, Relaxed);
                    *result = Err(failure);
                }
                (_, Err(_)) => {}
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..settings.threads {
            scope.spawn(worker);
        }
    });
    result.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the steps of a world.
fn run_world(seed: u64, world: u64) -> Result<Coverage, Box<Failure>> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&world.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let (mut runner, strategy) = (TestRunner::new_with_rng(Config::default(), rng), draft());
    let drafts = (0..STEPS).map(|_| strategy.new_tree(&mut runner).expect("drafts have no filter").current());
    run_drafts(drafts).map_err(|(steps, why)| Box::new(Failure { world, steps, why }))
}

/// Makes steps of drafts in a new world, and takes them.
///
/// # Errors
///
/// The steps up to the one that fails, and what is wrong with it.
pub fn run_drafts(drafts: impl Iterator<Item = Draft>) -> Result<Coverage, (Vec<Op>, String)> {
    let mut steps = Vec::new();
    let result = caught(&LAYOUT, |sequence| {
        for draft in drafts {
            let step = resolve(&draft, sequence);
            steps.push(step);
            sequence.step(&step).map_err(|difference| difference.0)?;
        }
        Ok(())
    });
    result.map_err(|why| (steps, why))
}

/// Takes steps in a new world.
///
/// # Errors
///
/// What is wrong.
pub fn replay(layout: &Layout, steps: &[Op]) -> Result<Coverage, String> {
    caught(layout, |sequence| steps.iter().try_for_each(|step| sequence.step(step)).map_err(|difference| difference.0))
}

/// Runs `f` in a new world, where a panic is a failure like others.
fn caught(layout: &Layout, f: impl FnOnce(&mut Sequence<'_, '_>) -> Result<(), String>) -> Result<Coverage, String> {
    let run = || {
        in_world(layout, |world| {
            let mut sequence = Sequence::new(world);
            f(&mut sequence)?;
            sequence.finish().map_err(|difference| difference.0)
        })
    };
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(message(&*panic)))
}

/// Returns what a panic says.
pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without a word"))
}

/// Takes away what a sequence that fails does not need to fail: first long parts, then single steps.
#[must_use]
pub fn shortened(mut steps: Vec<Op>, fails: impl Fn(&[Op]) -> bool) -> Vec<Op> {
    let mut part = steps.len();
    while part != 0 {
        let mut at = 0;
        while at < steps.len() {
            let mut shorter = steps.clone();
            shorter.drain(at..(at + part).min(steps.len()));
            if fails(&shorter) {
                steps = shorter;
            } else {
                at += part;
            }
        }
        part /= 2;
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failure_needs_stays() {
        let steps: Vec<_> = (0..1000).map(Op::Load).collect();
        let needed = [Op::Load(17), Op::Load(400), Op::Load(999)];
        let fails = |steps: &[Op]| needed.iter().all(|step| steps.contains(step));
        assert_eq!(shortened(steps.clone(), fails), needed);
        assert_eq!(shortened(steps.clone(), |_| false), steps);
    }

    #[test]
    fn a_seed_is_a_sequence() {
        let settings = Settings { seed: 3, first: 5, calls: 1000, threads: 1 };
        let first = run(&settings, |_| ()).unwrap();
        assert_eq!(first, run(&settings, |_| ()).unwrap());
        assert_ne!(first, run(&Settings { seed: 4, ..settings }, |_| ()).unwrap());
        assert!(first.calls() >= 1000 && first.len() > 100, "{first}");
    }
}
