//! A vCPU that several turn on and off at the same time.

use std::sync::Arc;

use ravelin_sync::{
    Mutex,
    model::{explore, explore_without, spawn},
};

use super::*;

/// A vCPU: its power, and the lock that is held by the CPU that has it, with the starts that have been taken.
type Vcpu = (Power, Mutex<Vec<u64>>);

/// Has the CPU run the vCPU, which starts if it has been turned on, and turns itself off.
fn run((power, lock): &Vcpu) {
    let mut taken = lock.lock();
    if let Some(start) = power.take_start() {
        assert_eq!(start.pc, start.x0, "not a start that was asked for: halves of two");
        assert_eq!(power.run(), Readiness::Starts);
        assert_eq!(power.run(), Readiness::On);
        taken.push(start.pc);
        power.turn_off();
    }
}

/// Two guests' CPUs turn on a vCPU that runs now and then.
fn each_start_is_taken_once() {
    let vcpu = Arc::new((Power::off(), Mutex::new(Vec::new())));
    let turn_on = |id: u64| spawn(&vcpu, move |(power, _)| power.turn_on(id, id).is_ok().then_some(id));
    let callers = [turn_on(1), turn_on(2)];
    let runs = spawn(&vcpu, run);
    let turned_on: Vec<_> = callers.into_iter().filter_map(|caller| caller.join().unwrap()).collect();
    runs.join().unwrap();
    run(&vcpu);
    let mut taken = vcpu.1.lock().clone();
    taken.sort_unstable();
    assert_eq!(taken, turned_on, "not a start that was asked for");
}

/// The host turns a vCPU off that two guests' CPUs turn on.
fn a_start_is_whole_or_the_vcpu_is_off() {
    let vcpu = Arc::new((Power::off(), Mutex::new(Vec::new())));
    let turn_on = |id: u64| spawn(&vcpu, move |(power, _)| power.turn_on(id, id).is_ok().then_some(id));
    let callers = [turn_on(1), turn_on(2)];
    let host = spawn(&vcpu, |(power, lock)| {
        let _has_it = lock.lock();
        power.set(false)
    });
    let mut turned_on: Vec<_> = callers.into_iter().filter_map(|caller| caller.join().unwrap()).collect();
    let is_off = host.join().unwrap();
    let (power, lock) = &*vcpu;
    // What has been turned off may have been turned on since.
    assert!(is_off || power.is_on());
    if !power.is_on() {
        power.turn_on(3, 3).unwrap();
        turned_on = vec![3];
    }
    run(&vcpu);
    let taken = lock.lock();
    assert!(taken.len() == 1 && turned_on.contains(&taken[0]), "{taken:?} of {turned_on:?}");
}

#[test]
fn starts() {
    explore(each_start_is_taken_once);
}

#[test]
#[should_panic(expected = "not a start that was asked for")]
fn starts_need_release() {
    explore_without(Release, each_start_is_taken_once);
}

#[test]
#[should_panic(expected = "not a start that was asked for")]
fn starts_need_acquire() {
    explore_without(Acquire, each_start_is_taken_once);
}

#[test]
fn off_and_on() {
    explore(a_start_is_whole_or_the_vcpu_is_off);
}
