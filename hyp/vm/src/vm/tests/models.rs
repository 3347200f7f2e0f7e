//! The life of a VM, from several CPUs.

use std::sync::Arc;

use ravelin_sync::{
    atomic::{AtomicBool, Ordering::Release},
    model::{explore, explore_without, spawn},
};

use super::*;

struct Shared {
    world: World,
    handle: Handle,
    /// Whether a vCPU is running.
    runs: AtomicBool,
}

impl Shared {
    /// Returns a VM with so many vCPUs.
    fn new(vcpus: u64) -> Arc<Self> {
        let world = World::new();
        let handle = world.create(PKVM);
        for index in 0..vcpus {
            assert_eq!(world.add_vcpu(handle, index), Status::Success);
        }
        assert_eq!(world.map(handle, 1), Status::Success);
        Arc::new(Self { world, handle, runs: AtomicBool::new(false) })
    }

    fn seal(&self) -> Status {
        status(self.world.vms.seal(&self.world.memory, self.handle, &start(GUEST, GUEST)))
    }

    /// Runs vCPU 0, alone, and counts that in its state.
    fn run(&self) -> Status {
        status(self.world.vms.run(self.handle, 0, |_, vcpu| {
            assert!(!self.runs.swap(true, Relaxed), "it runs twice");
            vcpu.state += 1;
            self.runs.store(false, Relaxed);
            Ok(())
        }))
    }
}

/// Two CPUs run one vCPU.
fn one_at_a_time() {
    let shared = Shared::new(1);
    assert_eq!(shared.seal(), Status::Success);
    let other = spawn(&shared, Shared::run);
    let outcomes = [shared.run(), other.join().unwrap()];
    let ran = outcomes.iter().filter(|&&outcome| outcome == Status::Success).count();
    assert!(ran > 0 && outcomes.iter().all(|outcome| [Status::Success, Status::Busy].contains(outcome)));
    let state = shared.world.vms.run(shared.handle, 0, |_, vcpu| Ok(vcpu.state));
    assert_eq!(state, Ok(100 + ran as u64));
}

/// One CPU makes a vCPU while another seals the VM and runs it.
fn a_vcpu_is_whole_when_it_runs() {
    let shared = Shared::new(1);
    let makes = spawn(&shared, |shared| shared.world.add_vcpu(shared.handle, 1));
    let sealed = shared.seal();
    let ran = shared.world.vms.run(shared.handle, 1, |vm, vcpu| {
        assert!(vm.power(1).is_some(), "it runs and does not exist");
        Ok(vcpu.state)
    });
    let made = makes.join().unwrap();
    match sealed {
        Status::Success => assert!([Status::Success, Status::Busy, Status::WrongState].contains(&made)),
        Status::Busy => assert_eq!(made, Status::Success),
        other => panic!("{other:?}"),
    }
    let expected = match (sealed, made) {
        (Status::Success, Status::Success) => Ok(101),
        (Status::Success, _) => Err(Status::Absent),
        _ => Err(Status::WrongState),
    };
    let ran = ran.map_err(|refusal| refusal.status);
    assert!(ran == expected || ran == Err(Status::Busy), "{ran:?}, not {expected:?}");
}

/// One CPU ends a VM that another runs.
fn nothing_runs_once_it_has_ended() {
    let shared = Shared::new(1);
    assert_eq!(shared.seal(), Status::Success);
    let runs = spawn(&shared, |shared| [shared.run(), shared.run()]);
    let Shared { world, handle, .. } = &*shared;
    let ended = status(world.vms.teardown(&world.memory, *handle));
    if ended == Status::Success {
        assert!(!shared.runs.load(Relaxed), "it ended while it ran");
        // Once more, as a host may that hears of BUSY.
        let reclaimed = world.vms.reclaim(&world.memory, *handle, frames(512));
        let destroyed = reclaimed.and_then(|_| world.vms.destroy(&world.memory, *handle));
        assert!(destroyed == Ok(0) || status(destroyed) == Status::Busy);
        if destroyed == Ok(0) {
            assert_eq!(world.memory.gone(), 0, "pages that are not the host's again");
        }
    }
    for outcome in runs.join().unwrap() {
        let known = [Status::Success, Status::Busy, Status::WrongState, Status::BadHandle];
        assert!(known.contains(&outcome), "{outcome:?}");
    }
    if ended == Status::Success {
        assert!([Status::WrongState, Status::BadHandle].contains(&shared.run()));
    } else {
        assert_eq!((ended, shared.run()), (Status::Busy, Status::Success));
    }
}

#[test]
fn running() {
    explore(one_at_a_time);
}

#[test]
fn making() {
    explore(a_vcpu_is_whole_when_it_runs);
}

#[test]
fn ending() {
    explore(nothing_runs_once_it_has_ended);
}

#[test]
#[should_panic(expected = "it ended while it ran")]
fn ending_needs_release() {
    explore_without(Release, nothing_runs_once_it_has_ended);
}
