//! CPUs that the host turns on and off, all at once.

use std::sync::Arc;

use ravelin_sync::{
    atomic::AtomicBool as Flag,
    model::{explore, explore_without, spawn},
};

use super::*;

const CPU_SUSPEND: u64 = 0xc400_0001;

/// The CPUs, and whether the firmware has turned on the last one.
type Machine = ([Cpu; 3], Flag);

/// Has CPU number `cpu` turn on the last one, at an entry of its own. Returns that if the host is told that it has.
fn turns_on((cpus, powered): &Machine, cpu: u64) -> Option<u64> {
    // It orders nothing: that the start is there is for the relay to see to.
    let firmware = FakeFirmware::new(|_| [if powered.swap(true, Relaxed) { code(ErrorCode::AlreadyOn) } else { 0 }; 4]);
    let entry = ENTRY + 4 * cpu;
    match call_on(&psci(cpus), cpu as usize, &firmware, [CPU_ON, 2, entry, entry]) {
        0 => Some(entry),
        error => {
            assert!([ErrorCode::AlreadyOn, ErrorCode::OnPending].map(code).contains(&error));
            None
        }
    }
}

/// Returns where the last CPU starts once the firmware has turned it on.
fn starts((cpus, powered): &Machine) -> Option<u64> {
    powered.load(Relaxed).then(|| {
        let Start { entry, context } = psci(cpus).take_start(2).expect("the start is there before the CPU");
        assert_eq!(entry, context, "not a start that was asked for: halves of two");
        entry
    })
}

/// Two CPUs turn on a third.
fn each_start_is_taken_once() {
    let machine = Arc::new(([Cpu::on(0, 0), Cpu::on(1, 1), Cpu::off(2, 2)], Flag::new(false)));
    let other = spawn(&machine, |machine| turns_on(machine, 1));
    let third = spawn(&machine, starts);
    let told = [turns_on(&machine, 0), other.join().unwrap()];
    let started = third.join().unwrap().or_else(|| starts(&machine));
    let [told, None] = (if told[0].is_none() { [told[1], told[0]] } else { told }) else { panic!("both: {told:?}") };
    assert_eq!(started, told, "not a start that was asked for");
    assert_eq!(psci(&machine.0).take_start(2), None);
}

/// A CPU is refused its way off and suspends instead, while another turns it on.
fn a_cpu_that_stays_on_resumes_where_it_wants() {
    let machine = Arc::new(([Cpu::on(0, 0), Cpu::on(1, 1), Cpu::on(2, 2)], Flag::new(true)));
    let last = spawn(&machine, |(cpus, _)| {
        let psci = psci(cpus);
        let refuses = FakeFirmware::new(|_| [code(ErrorCode::Denied); 4]);
        assert_eq!(call_on(&psci, 2, &refuses, [CPU_OFF, 0, 0, 0]), code(ErrorCode::Denied));
        // Off and on again, with the state lost.
        let resumes = FakeFirmware::new(|_| {
            assert_eq!(psci.take_start(2), Some(Start { entry: ENTRY, context: 7 }), "not where it wants");
            [0; 4]
        });
        assert_eq!(call_on(&psci, 2, &resumes, [CPU_SUSPEND, 0x1_0000, ENTRY, 7]), 0);
    });
    assert_eq!(turns_on(&machine, 0), None);
    last.join().unwrap();
    let (cpus, _) = &*machine;
    assert_eq!(call_on(&psci(cpus), 0, &FakeFirmware::new(modern), [CPU_ON, 2, ENTRY, 0]), code(ErrorCode::AlreadyOn));
}

#[test]
fn starts_of_cpus() {
    explore(each_start_is_taken_once);
}

#[test]
#[should_panic(expected = "not a start that was asked for")]
fn starts_of_cpus_need_release() {
    explore_without(Release, each_start_is_taken_once);
}

#[test]
fn a_refused_way_off() {
    explore(a_cpu_that_stays_on_resumes_where_it_wants);
}
