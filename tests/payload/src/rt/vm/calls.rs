//! The hypercalls about VMs.

use ravelin_abi::{Status, VmAttributes};

use crate::{
    rt::call,
    tests::{Failure, number, status},
};

/// A status, and what is in x1, x2 and x3.
pub(crate) type Answer = (Status, [u64; 3]);

/// Makes a call by its name.
pub(crate) fn call<const N: usize>(name: &str, arguments: [u64; N]) -> Answer {
    let mut registers = [0; 8];
    registers[0] = number(name);
    registers[1..=N].copy_from_slice(&arguments);
    let [x0, results @ ..] = call::hypervisor(registers);
    (status(x0), results)
}

/// Makes a call by its name, which must succeed; returns what is in x1.
pub(crate) fn succeed<const N: usize>(name: &str, arguments: [u64; N]) -> Result<u64, Failure> {
    success(name, arguments, call(name, arguments))
}

/// Returns what is in x1 after a call that must have succeeded.
pub(crate) fn success<const N: usize>(name: &str, arguments: [u64; N], answer: Answer) -> Result<u64, Failure> {
    match answer {
        (Status::Success, [x1, ..]) => Ok(x1),
        (status, [x1, ..]) => {
            Err(Failure::new(format_args!("{name} {arguments:x?}: {} with {x1:#x} in x1", status.name())))
        }
    }
}

/// Makes a call by its name, which must fail with `expected`.
pub(crate) fn refused<const N: usize>(name: &str, arguments: [u64; N], expected: Status) -> Result<u64, Failure> {
    match call(name, arguments) {
        (status, [x1, ..]) if status == expected => Ok(x1),
        (status, [x1, ..]) => Err(Failure::new(format_args!(
            "{name} {arguments:x?}: {} with {x1:#x} in x1, not {}",
            status.name(),
            expected.name()
        ))),
    }
}

/// How many pages a VM takes, and how many each of its vCPUs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) vm: u64,
    pub(crate) vcpu: u64,
    /// Pages of which the address of those of the VM is a multiple.
    pub(crate) align: u64,
}

impl Sizes {
    pub(crate) fn of(attributes: VmAttributes) -> Result<Self, Failure> {
        match call("VM_SIZES", [attributes.bits()]) {
            (Status::Success, [vm, vcpu, align]) => Ok(Self { vm, vcpu, align }),
            (status, _) => Err(Failure::new(format_args!("VM_SIZES of {attributes:?}: {}", status.name()))),
        }
    }
}
