//! Calls of several CPUs at the same time, and the locks that they take.

use ravelin_abi::{PageStateCode, Status};
use ravelin_memory::{PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_sync::model::{explore, spawn_on};
use ravelin_world::{Action, Door, Layout, World, call, lasting_world};

use crate::{
    PAGE, SHARE, STATISTICS, UNPIN, state, succeeds,
    vms::{ENTRY, PAYLOAD, PKVM, sealed},
};

const MEM_SHARE: u64 = 0xc600_0003;

/// The hypervisor writes statistics to a page from which the host takes pins that it never put there, by `unpin`.
fn a_pin_of_the_hypervisors_stays(unpin: fn(&World<'_>) -> Status) {
    let world = lasting_world(Layout::FOUR_BLOCKS);
    succeeds(world, SHARE, PAGE, 1);
    let host = spawn_on(world, move |world| unpin(world));
    // The machine notices if the page is not mapped any more when it is written.
    assert_eq!(world.hvc([STATISTICS, PAGE, 0, 0])[0], 0, "a pin of the hypervisor's is gone");
    assert_eq!(host.join().unwrap(), Status::Denied, "a pin of the hypervisor's is gone");
    assert_eq!(state(world, PAGE), (PageStateCode::SharedOwned, 0));
}

fn status([x0, ..]: [u64; 4]) -> Status {
    Status::from_code(x0.cast_signed()).expect("a status")
}

#[test]
fn pins() {
    explore(|| a_pin_of_the_hypervisors_stays(|world| status(world.hvc([UNPIN, PAGE, 1, 0]))));
}

#[test]
#[should_panic(expected = "a pin of the hypervisor's is gone")]
fn pins_need_their_lock() {
    explore(|| {
        a_pin_of_the_hypervisors_stays(|world| {
            let page = PhysRange::new(PAGE, 1).unwrap();
            world.memory.unpin(world.machine, page).map_or(Status::Denied, |()| Status::Success)
        });
    });
}

/// Calls of the host and of a guest that take the locks of regions, that of a guest's memory, and both.
#[test]
fn locks() {
    explore(|| {
        let world = lasting_world(Layout::FOUR_BLOCKS);
        let handle = sealed(world, PKVM);
        world.machine.then([Action::call(Door::Hvc, [MEM_SHARE, ENTRY + PAGE_SIZE, 0, 0])]);
        let gives = spawn_on(world, move |world| status(world.hvc(call("FORCE_RECLAIM", &[PAYLOAD, 1]))));
        let ends = spawn_on(world, move |world| status(world.hvc(call("VM_TEARDOWN", &[handle]))));
        let runs = status(world.hvc(call("VCPU_RUN", &[handle, 0])));
        let (took, ended) = (gives.join().unwrap(), ends.join().unwrap());
        assert!([Status::Success, Status::WrongState, Status::Busy].contains(&took), "{took:?}");
        assert!([Status::Success, Status::Busy].contains(&ended), "{ended:?}");
        assert!([Status::Success, Status::WrongState, Status::Busy].contains(&runs), "{runs:?}");
        world.is_consistent();
    });
}

/// What may not be done: a call under the lock.
#[test]
#[should_panic(expected = "deadlock")]
fn a_deadlock_is_seen() {
    explore(|| {
        let world = lasting_world(Layout::FOUR_BLOCKS);
        let page = PhysAddr::new(PAGE).unwrap();
        world.memory.with_stable_map(page, || world.memory.counts(world.machine));
    });
}
