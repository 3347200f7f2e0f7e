//! Calls by their names, and what a host does with VMs.

use ravelin_abi::{CALLS, MAX_RANGE_PAGES, RunExit, Status};
use ravelin_memory::PAGE_SIZE;

use crate::{guest::Action, world::World};

/// Returns the number of the host call of this name in the table of calls.
///
/// # Panics
///
/// If there is none.
#[must_use]
pub fn number(name: &str) -> u64 {
    CALLS.iter().find(|call| call.name == name).expect("a call of the table").number.into()
}

/// Returns the registers of the host call of this name.
#[must_use]
pub fn call(name: &str, arguments: &[u64]) -> Vec<u64> {
    [&[number(name)], arguments].concat()
}

impl World<'_> {
    /// Makes a call, and demands that tables agree then.
    pub fn named(&self, name: &str, arguments: &[u64]) -> [u64; 4] {
        let answer = self.hvc(call(name, arguments));
        self.is_consistent();
        answer
    }

    /// Makes a call that succeeds, and returns x1.
    #[track_caller]
    pub fn does(&self, name: &str, arguments: &[u64]) -> u64 {
        let [status, x1, ..] = self.named(name, arguments);
        assert_eq!(Status::from_code(status.cast_signed()), Some(Status::Success), "{name} {arguments:x?}: {x1:#x}");
        x1
    }

    /// Makes a call that fails, and changes nothing.
    #[track_caller]
    pub fn refuses(&self, name: &str, arguments: &[u64], status: Status, x1: u64) {
        self.fails(call(name, arguments), status, x1);
    }

    /// Returns how many pages a VM of these attributes takes, and how many each of its vCPUs.
    #[must_use]
    pub fn sizes(&self, attributes: u64) -> (u64, u64) {
        let [status, vm, vcpu, alignment] = self.named("VM_SIZES", &[attributes]);
        assert_eq!(status, 0);
        assert!(alignment.is_power_of_two() && alignment < vm);
        (vm, vcpu)
    }

    /// Runs vCPU 0 with these actions of the guest until the host has something to do.
    pub fn run(&self, handle: u64, run_page: u64, actions: impl IntoIterator<Item = Action>) -> RunExit {
        self.machine.then(actions);
        assert_eq!(self.does("VCPU_RUN", &[handle, 0]), 0);
        self.exit(run_page)
    }

    /// Reclaims the memory of a dying VM at guest addresses of so many bits.
    pub fn reclaim_all(&self, handle: u64, ipa_bits: u64) {
        let (mut page, end) = (0, 1 << (ipa_bits - 12));
        while page < end {
            let pages = (end - page).min(MAX_RANGE_PAGES);
            let done = self.does("VM_RECLAIM", &[handle, page * PAGE_SIZE, pages]);
            assert!((1..=pages).contains(&done));
            page += done;
        }
    }

    /// Destroys a dying VM without memory.
    pub fn destroy(&self, handle: u64) {
        let mut left = u64::MAX;
        while left != 0 {
            let now = self.does("VM_DESTROY", &[handle]);
            assert!(now < left);
            left = now;
        }
    }

    /// Ends a VM that has memory below 4 GiB at most.
    pub fn end(&self, handle: u64) {
        self.does("VM_TEARDOWN", &[handle]);
        self.reclaim_all(handle, 32);
        self.destroy(handle);
    }
}
