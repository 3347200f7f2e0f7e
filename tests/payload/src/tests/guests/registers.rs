//! Registers of vCPUs, which the host of an ordinary VM gets and sets.

use arrayvec::ArrayVec;
use ravelin_abi::{
    Answer, ExitReason, REGISTER_LAST, REGISTER_PC, REGISTER_POWER, REGISTER_PSTATE, REGISTER_V, REGISTER_X, Status,
    VmKind, system_register,
};
use ravelin_guest::IMAGE;

use crate::{
    rt::{
        cpu::read_register,
        vm::{PROTECTED, Pages, Vm, block_of, call, code::snippets, refused, succeed},
    },
    tests::{Failure, Outcome, check, check_eq, guests::features::mrs},
};

const MIB: u64 = 1 << 20;

/// A device of which the puppet's runtime knows nothing.
const OTHER_DEVICE: u64 = 0x0b00_0000;

const CPACR_EL1: u64 = system_register(3, 0, 1, 0, 2);
const TPIDR_EL0: u64 = system_register(3, 3, 13, 0, 2);
const TPIDR_EL1: u64 = system_register(3, 0, 13, 0, 4);
const FAR_EL1: u64 = system_register(3, 0, 6, 0, 0);
const CNTVCT_EL0: u64 = system_register(3, 3, 14, 0, 2);
const CNTV_CTL_EL0: u64 = system_register(3, 3, 14, 3, 1);
const CNTV_CVAL_EL0: u64 = system_register(3, 3, 14, 3, 2);

/// FP and SIMD do not trap.
const FPEN: u64 = 0b11 << 20;

snippets! {
    /// Puts x1 to x5 where the host looks for them, loads from the device at x0, and returns what is there then.
    exchange:
        "msr tpidr_el0, x1",
        "msr tpidr_el1, x2",
        "msr far_el1, x3",
        ".inst 0x9e670083", // fmov d3, x4
        ".inst 0x9eaf00a3", // fmov v3.d[1], x5
        "mov x20, x6",
        "ldr x0, [x0]",
        "mrs x1, tpidr_el0",
        "mrs x2, tpidr_el1",
        "mrs x3, far_el1",
        ".inst 0x9e660064", // fmov x4, d3
        ".inst 0x9eae0065", // fmov x5, v3.d[1]
        "mov x6, x20",
        "mrs x7, nzcv";

    /// Waits for an interrupt, and returns the virtual counter.
    wait_and_look: "wfi", "isb", "mrs x0, cntvct_el0";

    /// Returns TPIDR_EL1, which the puppet does not use.
    look: "mrs x0, tpidr_el1";
}

fn get(vm: &Vm<'_>, index: u64, register: u64) -> Result<u64, Failure> {
    succeed("VCPU_GET_REGISTER", [vm.handle, index, register])
}

fn set(vm: &Vm<'_>, index: u64, register: u64, value: u64) -> Outcome {
    succeed("VCPU_SET_REGISTER", [vm.handle, index, register, value]).map(drop)
}

/// What the guest has in its registers the host gets, and the other way round.
pub(crate) fn registers_by_number() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Ordinary, 1)?;
    let mut guest = vm.guest(0);
    guest.run(look(), &[])?;
    set(&vm, 0, CPACR_EL1, get(&vm, 0, CPACR_EL1)? | FPEN)?;

    guest.begin_code(exchange(), &[OTHER_DEVICE, 11, 12, 13, 14, 15, 16])?;
    guest.exit(ExitReason::Mmio)?;
    let places = [TPIDR_EL0, TPIDR_EL1, FAR_EL1, REGISTER_V + 12, REGISTER_V + 14, REGISTER_X + 40];
    for (register, value) in places.into_iter().zip(11..) {
        check_eq!(get(&vm, 0, register)?, value, "register {register:#x} of the guest");
        set(&vm, 0, register, value + 100)?;
    }
    let pstate = get(&vm, 0, REGISTER_PSTATE)?;
    check_eq!(pstate & 0xf, 5, "the guest's mode");
    set(&vm, 0, REGISTER_PSTATE, pstate | 0xf << 28)?;
    // The load is done as if nothing was.
    guest.answer(Answer::Complete, 99);
    check_eq!(guest.finish()?.x, [99, 111, 112, 113, 114, 115, 116, 0xf << 28], "what the guest finds");

    // It goes on elsewhere, too: behind the load.
    guest.begin_code(exchange(), &[OTHER_DEVICE])?;
    guest.exit(ExitReason::Mmio)?;
    set(&vm, 0, REGISTER_PC, get(&vm, 0, REGISTER_PC)? + 4)?;
    let [address, ..] = guest.finish()?.x;
    check_eq!(address, OTHER_DEVICE, "a register that was to be loaded");
    vm.finish()
}

/// What system registers hold at first can be asked before there is a VM, and is what the guest reads then.
pub(crate) fn registers_without_a_vm() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let attributes = [VmKind::Ordinary, VmKind::Pkvm, VmKind::Realm].map(|kind| Vm::attributes(kind, 1).bits());
    let [ordinary, ..] = attributes;
    let reset = |attributes, number| {
        let (status, [value, ..]) = call("REGISTER_RESET_VALUE", [attributes, number]);
        (status, value)
    };
    let numbers = system_register(3, 0, 0, 0, 0)..=system_register(3, 0, 0, 7, 7);
    let before = numbers.clone().map(|number| reset(ordinary, number));
    let mut before: ArrayVec<_, 64> = before.collect();
    check!(before.iter().filter(|(status, _)| *status == Status::Success).count() >= 56, "ID registers: {before:x?}");
    let vm = Vm::boot(&pages, VmKind::Ordinary, 1)?;
    for (number, expected) in numbers.zip(before.drain(..)) {
        let (status, [value, ..]) = call("VCPU_GET_REGISTER", [vm.handle, 0, number]);
        check_eq!((status, value), expected, "register {number:#x} of a VM");
        for attributes in attributes {
            check_eq!(
                reset(attributes, number),
                expected,
                "register {number:#x} of a VM with attributes {attributes:#x}"
            );
        }
    }
    let mut guest = vm.guest(0);
    for [crm, op2] in [[0, 5], [4, 0], [4, 1], [5, 0], [6, 0], [6, 1], [7, 0], [7, 2]] {
        let [read, ..] = guest.run(&mrs([3, 0, 0, crm, op2]), &[])?;
        let value = reset(ordinary, system_register(3, 0, 0, crm.into(), op2.into()));
        check_eq!(value, (Status::Success, read), "S3_0_C0_C{crm}_{op2}");
    }
    for register in [REGISTER_X, REGISTER_PC, REGISTER_V, REGISTER_POWER, REGISTER_LAST + 1] {
        refused("REGISTER_RESET_VALUE", [ordinary, register], Status::Invalid)?;
    }
    vm.finish()
}

/// ID registers are what the guest reads, and stay so.
pub(crate) fn registers_that_are_fixed() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Ordinary, 1)?;
    let mut guest = vm.guest(0);
    for [crm, op2] in [[0, 5], [4, 0], [4, 1], [5, 0], [6, 0], [6, 1], [7, 0], [7, 2]] {
        let register = system_register(3, 0, 0, crm.into(), op2.into());
        let [read, ..] = guest.run(&mrs([3, 0, 0, crm, op2]), &[])?;
        check_eq!(get(&vm, 0, register)?, read, "S3_0_C0_C{crm}_{op2}");
        set(&vm, 0, register, read)?;
        refused("VCPU_SET_REGISTER", [vm.handle, 0, register, !read], Status::Invalid)?;
    }
    for register in [1, 74, REGISTER_POWER + 1, system_register(3, 4, 1, 1, 0), system_register(3, 0, 12, 11, 5)] {
        refused("VCPU_GET_REGISTER", [vm.handle, 0, register], Status::Invalid)?;
        refused("VCPU_SET_REGISTER", [vm.handle, 0, register, 0], Status::Invalid)?;
    }
    refused("VCPU_GET_REGISTER", [vm.handle, 0, REGISTER_LAST + 1], Status::Invalid)?;
    refused("VCPU_GET_REGISTER", [vm.handle, 1, REGISTER_PC], Status::Absent)?;
    // No mode of EL2 or of AArch32, and nothing that is not a mode.
    for mode in (0..32).filter(|mode| ![0, 4, 5].contains(mode)) {
        refused("VCPU_SET_REGISTER", [vm.handle, 0, REGISTER_PSTATE, 0x3c0 | mode], Status::Invalid)?;
    }
    // All other bits at once do no harm.
    let pstate = get(&vm, 0, REGISTER_PSTATE)?;
    set(&vm, 0, REGISTER_PSTATE, u64::MAX << 5 & !(1 << 10 | 1 << 11) | 5)?;
    check_eq!(get(&vm, 0, REGISTER_PSTATE)? & (1 << 20 | 1 << 21 | u64::MAX << 32), 0, "IL, SS and what is above");
    set(&vm, 0, REGISTER_PSTATE, pstate)?;
    guest.run(look(), &[])?;
    vm.finish()
}

/// What is set before the seal is there when the guest starts, and vCPUs start where the host says.
pub(crate) fn registers_before_the_seal() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::create(&pages, VmKind::Ordinary, 2)?;
    vm.load()?;
    for index in 0..2 {
        vm.add_vcpu()?;
        check_eq!(get(&vm, index, REGISTER_POWER)?, 0, "power before the seal");
        set(&vm, index, TPIDR_EL1, 0x5151 + index)?;
    }
    set(&vm, 1, REGISTER_PC, IMAGE)?;
    set(&vm, 1, REGISTER_X, block_of(1))?;
    set(&vm, 1, REGISTER_POWER, 1)?;
    vm.seal()?;
    for index in 0..2 {
        check_eq!(get(&vm, index, REGISTER_POWER)?, 1, "power after the seal");
        check_eq!(get(&vm, index, REGISTER_PC)?, IMAGE, "where vCPU {index} starts");
        check_eq!(vm.guest(index).run(look(), &[])?[0], 0x5151 + index, "TPIDR_EL1 of vCPU {index}");
    }
    set(&vm, 1, REGISTER_POWER, 0)?;
    refused("VCPU_RUN", [vm.handle, 1], Status::WrongState)?;
    // Its guest may turn it on again: then it starts anew.
    vm.guest(0).turn_on(1)?;
    check_eq!(get(&vm, 1, TPIDR_EL1)?, 0, "TPIDR_EL1 out of reset");
    vm.guest(1).run(look(), &[])?;
    vm.finish()
}

/// The virtual counter of a guest is what its host says, and its timer goes by it.
pub(crate) fn counter_of_a_guest() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Ordinary, 1)?;
    let mut guest = vm.guest(0);
    // Behind the physical counter, and ahead of it.
    for start in [1000, 1 << 50] {
        let second = read_register!("cntfrq_el0");
        guest.begin_code(wait_and_look(), &[])?;
        set(&vm, 0, CNTVCT_EL0, start)?;
        set(&vm, 0, CNTV_CVAL_EL0, start + second)?;
        set(&vm, 0, CNTV_CTL_EL0, 1)?;
        let before = read_register!("cntpct_el0");
        let exit = guest.exit(ExitReason::Wait)?;
        let offset = exit.deadline.wrapping_sub(before);
        check!((1..=second).contains(&offset), "the timer fires in {offset} ticks, of {second} to the second");
        set(&vm, 0, CNTV_CTL_EL0, 0)?;
        // Out of the wait.
        let [counter, ..] = guest.finish()?.x;
        check!((start..start + 60 * second).contains(&counter), "the guest's counter is at {counter:#x}");
        let now = get(&vm, 0, CNTVCT_EL0)?;
        check!((counter..start + 60 * second).contains(&now), "the host says that it is at {now:#x}");
    }
    vm.finish()
}

/// Of a protected VM nothing is shown, and nothing changes.
pub(crate) fn registers_of_protected_vms() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::create(&pages, kind, 1)?;
        vm.load()?;
        vm.add_vcpu()?;
        let closed = || {
            for register in
                [REGISTER_X, REGISTER_PC, REGISTER_PSTATE, REGISTER_POWER, REGISTER_V, TPIDR_EL1, CNTVCT_EL0, 1]
            {
                refused("VCPU_GET_REGISTER", [vm.handle, 0, register], Status::WrongState)?;
                refused("VCPU_SET_REGISTER", [vm.handle, 0, register, 0], Status::WrongState)?;
            }
            Ok::<(), Failure>(())
        };
        closed()?;
        vm.seal()?;
        closed()?;
        let mut guest = vm.guest(0);
        guest.run(look(), &[])?;
        closed()?;
        guest.run(look(), &[])?;
        vm.finish()?;
    }
    Ok(())
}
