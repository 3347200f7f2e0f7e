//! A guest that ends its VM while it turns on vCPUs.

use std::sync::Arc;

use ravelin_sync::{
    atomic::Ordering::SeqCst,
    model::{explore, explore_without, spawn},
};

use super::*;

struct Shared {
    memory: Fake,
    vms: Box<TestVms>,
    handle: Handle,
}

impl Shared {
    /// Runs a vCPU on a CPU of its own.
    fn run(&self, cpu: &FakeCpu, index: u64) -> Result<RunExit, Status> {
        let ran = self.vms.run_vcpu(&self.memory, cpu, self.handle, index);
        cpu.assert_is_the_hosts();
        let exit = || RunExit::from_bytes(cpu.page(run_page(index))[..RunExit::SIZE].try_into().unwrap());
        ran.map(|()| exit()).map_err(|refusal| refusal.status)
    }

    /// Runs a vCPU whose guest makes a call.
    fn calls<const N: usize>(&self, cpu: &FakeCpu, index: u64, registers: [u64; N]) -> Result<RunExit, Status> {
        cpu.then(move |_, guest| call(guest.context, Conduit::Hvc, registers));
        self.run(cpu, index)
    }
}

/// vCPU 0 ends the VM. vCPU 1 turns on vCPU 2, which the host then runs.
fn a_vcpu_is_woken_or_not_entered() {
    let world = World::new(VmKind::Pkvm);
    world.turn_on(1);
    let World { memory, vms, handle, .. } = world;
    let shared = Arc::new(Shared { memory, vms, handle });
    let turns_on = spawn(&shared, |shared| {
        let cpu = FakeCpu::new();
        let told = shared.calls(&cpu, 1, [CPU_ON, 2, GUEST, 0]).unwrap();
        if told.reason != ExitReason::CpuOn.code() {
            assert_eq!(told.reason, ExitReason::SystemOff.code());
            return false;
        }
        cpu.entered();
        let told = shared.run(&cpu, 2).unwrap().reason;
        let entered = !cpu.entered().is_empty();
        assert!(entered || told == ExitReason::SystemOff.code());
        entered
    });
    let cpu = FakeCpu::new();
    let told = shared.calls(&cpu, 0, [SYSTEM_OFF]).unwrap();
    assert_eq!(told.reason, ExitReason::SystemOff.code());
    let entered = turns_on.join().unwrap();
    assert!(!entered || told.wake_low & 1 << 2 != 0, "it is entered, and nobody is told to look after it");
    // Whoever comes later knows.
    assert_eq!(shared.run(&cpu, 0), Err(Status::WrongState));
    cpu.entered();
    for index in [1, 2] {
        let told = shared.run(&cpu, index);
        assert!(told == Err(Status::WrongState) || told == Ok(exit(ExitReason::SystemOff)), "{told:?}");
    }
    assert!(cpu.entered().is_empty(), "it is entered though it has ended");
}

#[test]
fn the_end() {
    explore(a_vcpu_is_woken_or_not_entered);
}

#[test]
#[should_panic(expected = "nobody is told")]
fn the_end_needs_fences() {
    explore_without(SeqCst, a_vcpu_is_woken_or_not_entered);
}
