//! What guests may call: PSCI, discovery, pKVM's hypercalls, the Realm Services Interface, entropy.

use ravelin_abi::{Answer, ExitReason, RunPage, Status, VmKind};
use ravelin_guest::{IMAGE, snippets};

use crate::{
    rt::{
        memory::{self, PAGE},
        vm::{IPA_BITS, MEMORY, Pages, Vm, block_of, code, refused, succeed},
    },
    tests::{Outcome, check, check_eq},
};

const MIB: u64 = 1 << 20;

/// -1 and -2: PSCI's and SMCCC's NOT_SUPPORTED, PSCI's INVALID_PARAMETERS.
const NOT_SUPPORTED: u64 = u64::MAX;
const INVALID_PARAMETERS: u64 = u64::MAX - 1;
const ALREADY_ON: u64 = u64::MAX - 3;
const ON_PENDING: u64 = u64::MAX - 4;
const INVALID_ADDRESS: u64 = u64::MAX - 8;

const PSCI_VERSION: u64 = 0x8400_0000;
const CPU_SUSPEND: u64 = 0xc400_0001;
const CPU_OFF: u64 = 0x8400_0002;
const CPU_ON: u64 = 0xc400_0003;
const AFFINITY_INFO: u64 = 0xc400_0004;
const PSCI_FEATURES: u64 = 0x8400_000a;

/// Defines a function that returns code for a guest that may change all registers but x18.
macro_rules! among_registers {
    ($(#[$meta:meta])* $name:ident: $($line:literal),+) => {
        snippets! {
            $(#[$meta])*
            $name: "stp x29, x30, [sp, #-96]!", "stp x19, x20, [sp, #16]", "stp x21, x22, [sp, #32]", "stp x23, x24, [sp, #48]",
                "stp x25, x26, [sp, #64]", "stp x27, x28, [sp, #80]",
                $($line,)+
                "ldp x27, x28, [sp, #80]", "ldp x25, x26, [sp, #64]", "ldp x23, x24, [sp, #48]", "ldp x21, x22, [sp, #32]",
                "ldp x19, x20, [sp, #16]", "ldp x29, x30, [sp], #96";
        }
    };
}

/// Defines a function that returns code that calls with x0 to x3, when the others are known, and returns a bit for each that has changed.
macro_rules! call_among_registers {
    ($(#[$meta:meta])* $name:ident: $call:literal) => {
        among_registers! {
            $(#[$meta])*
            $name:
                ".irp n,4,5,6,7,8,9,10,11,12,13,14,15,16,17,19,20,21,22,23,24,25,26,27,28,29,30", "mov x\\n, #0x100 + \\n", ".endr",
                $call, "mov x0, xzr",
                ".irp n,4,5,6,7,8,9,10,11,12,13,14,15,16,17,19,20,21,22,23,24,25,26,27,28,29,30",
                "cmp x\\n, #0x100 + \\n", "cset x1, ne", "orr x0, x0, x1, lsl #\\n", ".endr"
        }
    };
}

call_among_registers! {
    /// Calls by HVC.
    hvc_among_registers: "hvc #0"
}

call_among_registers! {
    /// Calls by SMC.
    smc_among_registers: "smc #0"
}

among_registers! {
    /// Loads an ID register to x0, and then to all others one by one. Returns 0 if each has it in the end.
    id_register_everywhere:
        ".irp n,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,19,20,21,22,23,24,25,26,27,28,29,30", "mov x\\n, #0x100 + \\n", ".endr",
        "mrs x0, id_aa64pfr0_el1",
        ".irp n,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,19,20,21,22,23,24,25,26,27,28,29,30",
        "mrs x\\n, id_aa64pfr0_el1", "eor x\\n, x\\n, x0", ".endr",
        "mov x0, x1", ".irp n,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,19,20,21,22,23,24,25,26,27,28,29,30", "orr x0, x0, x\\n", ".endr"
}

/// The first registers of all that a call returns.
fn first<const N: usize>(x: [u64; 8]) -> [u64; N] {
    core::array::from_fn(|index| x[index])
}

/// What a call does not return in it keeps, whether EL2 answers it at once, the host is asked meanwhile, or there is no such call.
/// A load of an ID register changes that register alone.
pub(crate) fn calls_keep_registers() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    vm.add(MEMORY, 1)?;
    let mut guest = vm.guest(0);
    let quick = [[0xc600_0002, 0, 0, 0], [0xc600_0002, 1, 0, 0], [0xc600_0040, 0, 0, 0], [PSCI_VERSION, 0, 0, 0]];
    for call in quick {
        check_eq!(guest.run(hvc_among_registers(), &call)?[0], 0, "by HVC {call:x?}");
        check_eq!(guest.run(smc_among_registers(), &call)?[0], 0, "by SMC {call:x?}");
    }
    // The host is told of the first one.
    for (function, name) in [(0xc600_0003, "MEM_SHARE"), (0xc600_0004, "MEM_UNSHARE")] {
        check_eq!(guest.run(hvc_among_registers(), &[function, MEMORY, 0, 0])?[0], 0, "{name}");
    }
    check_eq!(guest.run(id_register_everywhere(), &[])?[0], 0, "MRS");
    vm.finish()?;

    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Realm, 1)?;
    let mut guest = vm.guest(0);
    for call in [[0xc400_0190, 0x1_0000, 0, 0], [0xc400_0191, 0, 0, 0], [0xc400_019a, 0, 0, 0]] {
        check_eq!(guest.run(smc_among_registers(), &call)?[0], 0, "by SMC {call:x?}");
    }
    vm.finish()
}

/// Version, features and discovery, by HVC and by SMC.
pub(crate) fn psci_discovery() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        for conduit in [code::hvc(), code::smc()] {
            let mut returns = |arguments: &[u64]| guest.run(conduit, arguments);
            check!(returns(&[PSCI_VERSION])?[0] >= 1 << 16, "PSCI_VERSION");
            check!(returns(&[0x8000_0000])?[0] >= 0x1_0001, "SMCCC_VERSION");
            for function in [0x8000_0000, CPU_ON, CPU_OFF, CPU_SUSPEND, AFFINITY_INFO, 0x8400_0008, 0x8400_0009] {
                check_eq!(returns(&[PSCI_FEATURES, function])?[0], 0, "PSCI_FEATURES of {function:#x}");
            }
            for function in [0x8400_0005, 0xc400_000e, 0x8400_001f, 0x1234, 0x8400_0050] {
                check_eq!(returns(&[PSCI_FEATURES, function])?[0], NOT_SUPPORTED, "PSCI_FEATURES of {function:#x}");
            }
            check_eq!(returns(&[0x8000_0001, 0x8000_8000])?[0], NOT_SUPPORTED, "SMCCC_ARCH_FEATURES");
            for function in [0x8400_001f, 0xc600_1010, 0xc600_1016, 0x1_8400_0000, 0, u64::MAX, 0xc500_0020] {
                let x = returns(&[function, 1, 2, 3, 4, 5, 6, 7])?;
                check_eq!(x, [NOT_SUPPORTED, 1, 2, 3, 4, 5, 6, 7], "{function:#x}");
            }
        }
        vm.finish()?;
    }
    Ok(())
}

code::snippets! {
    hvc_with_immediate: "hvc #1";
    smc_with_immediate: "smc #0xffff";
}

/// Calls with an immediate are NOT_SUPPORTED.
pub(crate) fn calls_with_immediates() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        for code in [hvc_with_immediate(), smc_with_immediate()] {
            check_eq!(first(guest.run(code, &[PSCI_VERSION, 1, 2])?), [NOT_SUPPORTED, 1, 2], "a call");
        }
        vm.finish()?;
    }
    Ok(())
}

/// A second vCPU is turned on, runs, turns itself off, and is turned on again.
pub(crate) fn vcpus_on_and_off() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 3)?;
        let page = vm.add(MEMORY, 1)?;
        let mut first = vm.guest(0);
        first.fill(MEMORY, 1, page, 1)?;
        let info = |target: u64| [AFFINITY_INFO, target, 0];
        for _ in 0..3 {
            check_eq!(first.call(&info(1))?[0], 1, "AFFINITY_INFO of a vCPU that is off");
            refused("VCPU_RUN", [vm.handle, 1], Status::WrongState)?;
            first.turn_on(1)?;
            check_eq!(first.call(&info(1))?[0], 2, "AFFINITY_INFO of a vCPU that is about to be on");
            check_eq!(first.call(&[CPU_ON, 1, IMAGE, 0])?[0], ON_PENDING, "CPU_ON of such a vCPU");
            let mut second = vm.guest(1);
            second.compare(MEMORY, 1, page, 1)?;
            check_eq!(second.call(&info(0))?[0], 0, "AFFINITY_INFO of a vCPU that is on");
            check_eq!(first.call(&info(1))?[0], 0, "AFFINITY_INFO of a vCPU that is on");
            check_eq!(first.call(&[CPU_ON, 1, IMAGE, 0])?[0], ALREADY_ON, "CPU_ON of such a vCPU");
            check_eq!(second.run(mpidr(), &[])?[0] & 0xff_00ff_ffff, 1, "MPIDR_EL1");
            second.begin_call(&[CPU_OFF])?;
            second.exit(ExitReason::CpuOff)?;
        }
        check_eq!(first.call(&[CPU_ON, 0, IMAGE, 0])?[0], ALREADY_ON, "CPU_ON of oneself");
        for target in [3, 0x10, 0x100, 1 << 24, 1 << 32, u64::MAX] {
            check_eq!(first.call(&[CPU_ON, target, IMAGE, 0])?[0], INVALID_PARAMETERS, "CPU_ON of {target:#x}");
            check_eq!(first.call(&info(target))?[0], INVALID_PARAMETERS, "AFFINITY_INFO of {target:#x}");
        }
        for entry in [IMAGE + 2, 1 << IPA_BITS, u64::MAX] {
            check_eq!(first.call(&[CPU_ON, 2, entry, 0])?[0], INVALID_ADDRESS, "CPU_ON at {entry:#x}");
        }
        refused("VCPU_RUN", [vm.handle, 2], Status::WrongState)?;
        // The 32-bit call.
        first.begin_call(&[0x8400_0003, 2, IMAGE, block_of(2)])?;
        check_eq!(first.exit(ExitReason::CpuOn)?.vcpu, 2, "the vCPU that was turned on");
        check_eq!(first.finish()?.x[0], 0, "CPU_ON");
        vm.guest(2).compare(MEMORY, 1, page, 1)?;
        vm.finish()?;
    }
    Ok(())
}

code::snippets! {
    /// Reads MPIDR_EL1.
    mpidr: "mrs x0, mpidr_el1";

    /// Reads registers that reset sets: SCTLR_EL1 and VBAR_EL1 are the image's by now.
    reset_state:
        "mrs x0, tpidr_el0", "mrs x1, tpidr_el1", "mrs x2, cntkctl_el1", "mrs x3, cntv_ctl_el0", "mrs x4, cntp_ctl_el0",
        "mrs x5, daif", "mrs x6, currentel", "mrs x7, spsel";
}

/// A vCPU starts out of reset, whatever another one has left in the CPU.
pub(crate) fn vcpus_start_out_of_reset() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 2)?;
        let mut first = vm.guest(0);
        let expected = [0, 0, 0, 0, 0, 0x3c0, 4, 1];
        check_eq!(first.run(reset_state(), &[])?, expected, "what vCPU 0 starts with");
        for _ in 0..2 {
            first.run(set_state(), &[!0])?;
            first.turn_on(1)?;
            let mut second = vm.guest(1);
            check_eq!(second.run(reset_state(), &[])?, expected, "what vCPU 1 starts with");
            second.run(set_state(), &[!0])?;
            second.begin_call(&[CPU_OFF])?;
            second.exit(ExitReason::CpuOff)?;
        }
        vm.finish()?;
    }
    Ok(())
}

code::snippets! {
    /// Writes x0 to what [`reset_state`] reads.
    set_state: "msr tpidr_el0, x0", "msr tpidr_el1, x0", "mov x1, #3", "msr cntkctl_el1, x1";
}

/// CPU_SUSPEND waits as WFI does.
pub(crate) fn suspend() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        guest.begin_call(&[CPU_SUSPEND, 0, 0, 0])?;
        guest.exit(ExitReason::Wait)?;
        check_eq!(guest.finish()?.x[0], 0, "CPU_SUSPEND");
        vm.finish()?;
    }
    Ok(())
}

/// pKVM's hypercalls that do not convert memory, with the numbers and results of Linux.
pub(crate) fn pkvm_discovery() -> Outcome {
    const INVALID: u64 = u64::MAX - 2;
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    vm.add(MEMORY, 1)?;
    let mut guest = vm.guest(0);
    let uid = [0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d];
    check_eq!(first(guest.call(&[0x8600_ff01])?), uid, "UID");
    let features = 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 9;
    check_eq!(first(guest.call(&[0x8600_0000])?), [features, 1 << 24 | 1 << 25, 0, 0], "FEATURES");
    check_eq!(first(guest.call(&[0xc600_0002, 0, 0, 0])?), [PAGE, 1], "HYP_MEMINFO");
    for arguments in [[1, 0, 0], [0, 1, 0], [0, 0, 1]] {
        let [x1, x2, x3] = arguments;
        check_eq!(guest.call(&[0xc600_0002, x1, x2, x3])?[0], INVALID, "HYP_MEMINFO of {arguments:?}");
    }
    // A call without a count is for one page, as mainline Linux makes it.
    for (function, name) in [(0xc600_0003, "MEM_SHARE"), (0xc600_0004, "MEM_UNSHARE")] {
        check_eq!(first(guest.call(&[function, MEMORY, 0, 0])?), [0, 0, 0, 0], "{name}");
        check_eq!(guest.call(&[function, MEMORY, 0, 0])?[0], INVALID, "{name} again");
    }
    // Devices where there is nothing; not memory.
    let guard = |page| [0xc600_0007, page, 0, 0];
    check_eq!(guest.call(&guard(ravelin_guest::DEVICE))?[0], 0, "MMIO_GUARD");
    check_eq!(guest.call(&guard(ravelin_guest::DEVICE))?[0], 0, "MMIO_GUARD again");
    for page in [MEMORY, 1 << IPA_BITS, ravelin_guest::DEVICE + 8] {
        check_eq!(guest.call(&guard(page))?[0], INVALID, "MMIO_GUARD of {page:#x}");
    }
    // What is neither memory nor a device by now is memory that the host may provide.
    guest.begin_code(code::load(), &[ravelin_guest::DEVICE + PAGE])?;
    guest.exit(ExitReason::PageFault)?;
    guest.answer(Answer::Abort, 0);
    check!(guest.finish()?.exception.is_some(), "there is a device that the guest has not named");
    for function in [0x8600_0001, 0xc600_0005, 0xc600_0006, 0xc600_0008, 0xc600_000a, 0xc600_0040, 0xc400_0190] {
        check_eq!(guest.call(&[function])?[0], NOT_SUPPORTED, "{function:#x}");
    }
    vm.finish()?;

    // An ordinary guest has none of those that are about protection, a realm none at all.
    for (kind, features) in [(VmKind::Ordinary, 1), (VmKind::Realm, NOT_SUPPORTED)] {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        check_eq!(guest.run(code::hvc(), &[0x8600_0000])?[0], features, "FEATURES");
        for function in [0xc600_0002, 0xc600_0003, 0xc600_0004, 0xc600_0007, 0xc600_0009, 0xc400_0190, 0xc400_0197] {
            check_eq!(guest.run(code::hvc(), &[function, MEMORY])?[0], NOT_SUPPORTED, "{function:#x}");
        }
        vm.finish()?;
    }
    Ok(())
}

/// The Realm Services Interface: version, configuration, states, measurements.
pub(crate) fn realm_services() -> Outcome {
    const ERROR_INPUT: u64 = 1;
    const RAM: u64 = 1;
    const EMPTY: u64 = 0;
    const DESTROYED: u64 = 2;
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Realm, 1)?;
    let address = vm.add(MEMORY, 8)?;
    let mut guest = vm.guest(0);
    check_eq!(first(guest.call(&[0xc400_0190, 0x1_0000])?), [0, 0x1_0000, 0x1_0000], "RSI_ABI_VERSION");
    check_eq!(first(guest.call(&[0xc400_0190, 0x2_0000])?), [ERROR_INPUT, 0x1_0000, 0x1_0000], "RSI_ABI_VERSION");

    guest.fill(MEMORY, 1, address, 1)?;
    check_eq!(guest.call(&[0xc400_0196, MEMORY])?[0], 0, "RSI_REALM_CONFIG");
    check_eq!(guest.load(MEMORY)?, IPA_BITS, "the number of bits in the configuration");
    for offset in [8, 16, 0xff8] {
        check_eq!(guest.load(MEMORY + offset)?, 0, "the configuration at {offset:#x}");
    }
    for bad in [MEMORY + 8, vm.shared(MEMORY), 1 << IPA_BITS, u64::MAX << 12] {
        check_eq!(guest.call(&[0xc400_0196, bad])?[0], ERROR_INPUT, "RSI_REALM_CONFIG at {bad:#x}");
    }

    // States, by runs of frames that are the same. Frames without a page are RAM to come.
    guest.share(MEMORY + 2 * PAGE, 2)?;
    succeed("FORCE_RECLAIM", [address + 5 * PAGE, 1])?;
    let end = MEMORY + (1 << 30);
    let mut at = MEMORY;
    for (until, expected) in [(2, RAM), (4, EMPTY), (5, RAM), (6, DESTROYED), (8, RAM)] {
        while at < MEMORY + until * PAGE {
            let [status, next, state, ..] = guest.call(&[0xc400_0198, at, end])?;
            check_eq!((status, state), (0, expected), "RSI_IPA_STATE_GET at {at:#x}");
            // Two runs of the same state may be told as one or as two.
            let run = next > at && (next <= MEMORY + until * PAGE || until == 8 && next <= end);
            check!(run, "RSI_IPA_STATE_GET at {at:#x} goes to {next:#x}");
            at = next;
        }
    }
    // What is shared is EMPTY already, whether the host has claimed it or not; what is before and behind it becomes so.
    let (shared, top) = (MEMORY + 2 * PAGE, MEMORY + 5 * PAGE);
    vm.claim(shared, 1)?;
    let mut at = MEMORY + PAGE;
    while at < top {
        let [status, next, accept, ..] = guest.call(&[0xc400_0197, at, top, EMPTY, 0])?;
        check!(
            (status, accept) == (0, 0) && next > at && next <= top,
            "RSI_IPA_STATE_SET at {at:#x} goes to {next:#x}"
        );
        at = next;
    }
    vm.release(shared, 1)?;
    guest.unshare(MEMORY + PAGE, 4)?;
    // Frames without a page, as many as there are: private without a step for each.
    let [status, next, accept, ..] = guest.call(&[0xc400_0197, end, end + (1 << 33), RAM, 0])?;
    check_eq!((status, next, accept), (0, end + (1 << 33), 0), "RSI_IPA_STATE_SET of 8 GiB that are not there");

    // Measurements 1 to 4 are the realm's.
    let read = |index| [0xc400_0192, index];
    let initial = guest.call(&read(0))?;
    let mut last = guest.call(&read(1))?;
    check_eq!(last, [0; 8], "measurement 1");
    for value in [0x11, 0x11, 0x22] {
        check_eq!(guest.call(&[0xc400_0193, 1, 8, value])?[0], 0, "RSI_MEASUREMENT_EXTEND");
        let now = guest.call(&read(1))?;
        check!(now != last && now[0] == 0, "measurement 1 is as it was");
        last = now;
    }
    check_eq!(guest.call(&read(4))?, [0; 8], "measurement 4");
    check_eq!(guest.call(&read(5))?[0], ERROR_INPUT, "measurement 5");
    for (index, size) in [(0, 8), (5, 8), (1, 65), (u64::MAX, 8), (1, u64::MAX)] {
        check_eq!(guest.call(&[0xc400_0193, index, size, 1])?[0], ERROR_INPUT, "extension of {index} by {size}");
    }
    check_eq!(guest.call(&read(0))?, initial, "the initial measurement");
    check_eq!(guest.call(&read(1))?, last, "measurement 1");
    vm.finish()
}

/// A realm calls its host: an immediate and 31 registers each way.
pub(crate) fn realm_calls_its_host() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Realm, 1)?;
    vm.add(MEMORY, 1)?;
    let run_page = vm.run_page(0);
    let mut guest = vm.guest(0);
    guest.store(MEMORY + 256, 0x1234)?;
    for register in 0..31 {
        guest.store(MEMORY + 264 + 8 * register, 0x1000 + register)?;
    }
    guest.begin_call(&[0xc400_0199, MEMORY + 256])?;
    let exit = guest.exit(ExitReason::HostCall)?;
    check_eq!(exit.value, 0x1234, "the immediate");
    for register in 0..31 {
        let sent = memory::load(run_page + RunPage::CALL as u64 + 8 * register);
        check_eq!(sent, 0x1000 + register, "x{register} as the host sees it");
        memory::store(run_page + RunPage::RESULTS as u64 + 8 * register, 0x2000 + register);
    }
    guest.answer(Answer::Complete, 0);
    check_eq!(guest.finish()?.x[0], 0, "RSI_HOST_CALL");
    check_eq!(guest.load(MEMORY + 256)?, 0x1234, "the immediate afterwards");
    for register in 0..31 {
        check_eq!(guest.load(MEMORY + 264 + 8 * register)?, 0x2000 + register, "x{register} as the guest sees it");
    }
    for bad in [MEMORY + 8, vm.shared(MEMORY), 1 << IPA_BITS] {
        check_eq!(guest.call(&[0xc400_0199, bad])?[0], 1, "RSI_HOST_CALL at {bad:#x}");
    }
    vm.finish()
}

/// Entropy, if the machine has a source: different numbers each time, as many bits as asked for.
pub(crate) fn entropy() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        let version = guest.call(&[0x8400_0050])?[0];
        if version == NOT_SUPPORTED {
            check_eq!(guest.call(&[0xc400_0053, 64])?[0], NOT_SUPPORTED, "TRNG_RND without a source");
        } else {
            check_eq!(version, 1 << 16, "TRNG_VERSION");
            check_eq!(guest.call(&[0x8400_0051, 0xc400_0053])?[0], 0, "TRNG_FEATURES");
            let mut last = 0;
            for _ in 0..8 {
                let [status, high, middle, low, ..] = guest.call(&[0xc400_0053, 64])?;
                check_eq!((status, high, middle), (0, 0, 0), "TRNG_RND");
                check!(low != last && low != 0, "the same number twice: {low:#x}");
                last = low;
                let [status, _, _, low, ..] = guest.call(&[0xc400_0053, 3])?;
                check!(status == 0 && low < 8, "3 bits of entropy: {low:#x}");
            }
            for bits in [0, 193, u64::MAX] {
                check_eq!(guest.call(&[0xc400_0053, bits])?[0], INVALID_PARAMETERS, "{bits} bits of entropy");
            }
        }
        vm.finish()?;
    }
    Ok(())
}
