//! Exits: what the host learns, what it may answer, and that it gets its CPU back.

use arrayvec::ArrayVec;
use ravelin_abi::{Answer, ExitReason, RUN_FLAG_WRITE, RUN_NO_DEADLINE, RunExit, RunPage, Status, VmKind};
use ravelin_guest::DEVICE;

use crate::{
    rt::{
        cpu::{self, read_register},
        gic,
        memory::{self, PAGE},
        vm::{Guest, MEMORY, PROTECTED, Pages, Stop, Vm, code, refused},
    },
    tests::{Failure, Outcome, check, check_eq},
};

const MIB: u64 = 1 << 20;

/// A device that tests play themselves.
const OTHER_DEVICE: u64 = DEVICE + PAGE;

// A64 instructions by their fields (Arm ARM DDI 0487, C4.1).

const RET: u32 = 0xd65f_03c0;

/// MOV Xd, Xm
const fn mov(d: u32, m: u32) -> u32 {
    0xaa00_03e0 | m << 16 | d
}

/// LDR and STR of any size with an immediate offset of 0.
const fn load_store(log2_bytes: u32, opc: u32, base: u32, register: u32) -> u32 {
    log2_bytes << 30 | 0x3900_0000 | opc << 22 | base << 5 | register
}

/// Code as words of two instructions.
fn assemble(instructions: &[u32]) -> ArrayVec<u64, 8> {
    let low = |pair: &[u32]| u64::from(pair[0]);
    let high = |pair: &[u32]| pair.get(1).map_or(0, |&high| u64::from(high) << 32);
    instructions.chunks(2).map(|pair| low(pair) | high(pair)).collect()
}

/// Runs to an access to the device, which must be this one.
fn access(guest: &mut Guest<'_>, offset: u64, log2_bytes: u32, stored: Option<u64>) -> Outcome {
    let exit = guest.exit(ExitReason::Mmio)?;
    let expected = RunExit {
        reason: ExitReason::Mmio.code(),
        address: guest.vm.shared(OTHER_DEVICE) + offset,
        size: 1 << log2_bytes,
        flags: if stored.is_some() { RUN_FLAG_WRITE } else { 0 },
        value: stored.unwrap_or(0),
        ..RunExit::default()
    };
    check_eq!(exit, expected, "the access");
    Ok(())
}

/// What a load of `value` leaves in an X register.
fn loaded(value: u64, log2_bytes: u32, signed: bool, wide: bool) -> u64 {
    let shift = 64 - (8 << log2_bytes);
    let value = value << shift;
    let value = if signed { (value.cast_signed() >> shift).cast_unsigned() } else { value >> shift };
    if wide { value } else { value & 0xffff_ffff }
}

/// Loads and stores of every width, with and without sign, of every register.
pub(crate) fn device_accesses() -> Outcome {
    const VALUE: u64 = 0x8182_8384_f5f6_f7f8;
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let device = vm.shared(OTHER_DEVICE);
        let mut guest = vm.guest(0);
        // x18 is the guest's own, and x30 is where the code returns to: it is kept in x16 or x17 meanwhile.
        for register in (0..32_u32).filter(|&register| register != 18) {
            let base = if register == 1 { 2 } else { 1 };
            let link = if register == 17 { 16 } else { 17 };
            // log2 of the size, opc, signed, to an X register.
            for (log2_bytes, opc, signed, wide) in [
                (0, 1, false, false),
                (0, 3, true, false),
                (0, 2, true, true),
                (1, 1, false, false),
                (1, 3, true, false),
                (1, 2, true, true),
                (2, 1, false, false),
                (2, 2, true, true),
                (3, 1, false, true),
            ] {
                let offset = 8 * u64::from(register);
                let load = load_store(log2_bytes, opc, base, register);
                let code = assemble(&[mov(link, 30), load, mov(0, register), mov(30, link), RET]);
                guest.begin_code(&code, &[device + offset, device + offset, device + offset])?;
                access(&mut guest, offset, log2_bytes, None)?;
                guest.answer(Answer::Complete, VALUE);
                let [x0, ..] = guest.finish()?.x;
                let expected = if register == 31 { 0 } else { loaded(VALUE, log2_bytes, signed, wide) };
                check_eq!(x0, expected, "register {register} after a load of {} bytes", 1 << log2_bytes);
            }
            for log2_bytes in 0..4 {
                let store = load_store(log2_bytes, 0, base, register);
                let code = assemble(&[mov(link, 30), mov(register, 3), store, mov(30, link), RET]);
                guest.begin_code(&code, &[device, device, device, VALUE])?;
                let value =
                    if register == 31 { 0 } else { VALUE << (64 - (8 << log2_bytes)) >> (64 - (8 << log2_bytes)) };
                access(&mut guest, 0, log2_bytes, Some(value))?;
                guest.answer(Answer::Complete, !0);
                let [.., x3, _, _, _, _] = guest.finish()?.x;
                check_eq!(x3, VALUE, "x3 after a store");
            }
        }
        vm.finish()?;
    }
    Ok(())
}

code::snippets! {
    /// Loads a word with SP as the base register: x1 = address. Returns it.
    load_by_sp: "mov x9, sp", "mov sp, x1", "ldr x0, [sp]", "mov sp, x9";

    /// Stores x2 with SP as the base register: x1 = address.
    store_by_sp: "mov x9, sp", "mov sp, x1", "str x2, [sp]", "mov sp, x9";

    /// Loads a word and writes the address back: x0 = address.
    load_post_index: "ldr x1, [x0], #8";

    /// Loads a SIMD register: x0 = address.
    load_vector: ".arch_extension fp", "ldr d0, [x0]";

    /// Exclusive and atomic accesses: x0 = address.
    load_exclusive: "ldxr x1, [x0]";

    /// Zeroes a cache line: x0 = address.
    zero_line: "dc zva, x0";

    /// Cleans a cache line: x0 = address.
    clean_line: "dc cvac, x0";
}

/// The stack pointer as the base register.
pub(crate) fn device_accesses_by_sp() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        let device = vm.shared(OTHER_DEVICE) + 0x40;
        guest.begin_code(load_by_sp(), &[0, device])?;
        access(&mut guest, 0x40, 3, None)?;
        guest.answer(Answer::Complete, 0x1234);
        check_eq!(guest.finish()?.x[0], 0x1234, "what is loaded");
        guest.begin_code(store_by_sp(), &[0, device, 0x5678])?;
        access(&mut guest, 0x40, 3, Some(0x5678))?;
        guest.answer(Answer::Complete, 0);
        guest.finish()?;
        vm.finish()?;
    }
    Ok(())
}

const MMIO_GUARD: u64 = 0xc600_0007;

/// Accesses to a device that the CPU does not describe end in an abort in the guest.
pub(crate) fn device_accesses_without_syndrome() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        if kind == VmKind::Pkvm {
            // A realm marks devices by their address, others must say so. From then on nothing else is one.
            for page in [DEVICE, OTHER_DEVICE] {
                check_eq!(guest.call(&[MMIO_GUARD, page])?[0], 0, "MMIO_GUARD");
            }
        }
        let device = vm.shared(OTHER_DEVICE);
        for code in [
            code::load_pair(),
            code::store_pair(),
            load_post_index(),
            load_vector(),
            load_exclusive(),
            zero_line(),
            code::execute(),
        ] {
            let exception = guest.fails(code, &[device])?;
            // Stage 1 of the guest does not let it execute from a device, nor zero lines of it.
            let own = exception.esr & 0x3f != 0x10;
            check!(own || exception.is_abort_at(device), "{exception:x?}");
        }
        // Cache maintenance of a device does nothing.
        guest.run(clean_line(), &[device])?;
        vm.finish()?;
    }
    Ok(())
}

/// The host lets an access fail, or lets the guest try again.
pub(crate) fn answers_to_accesses() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        let device = vm.shared(OTHER_DEVICE);
        for (code, stored) in [(code::load(), None), (code::store(), Some(7))] {
            guest.begin_code(code, &[device, 7])?;
            access(&mut guest, 0, 3, stored)?;
            // RETRY is what zeroed memory says.
            access(&mut guest, 0, 3, stored)?;
            guest.answer(Answer::Abort, 0);
            let exception = guest.finish()?.exception;
            check!(exception.is_some_and(|it| it.is_abort_at(device)), "{exception:x?}");
        }
        vm.finish()?;
    }
    Ok(())
}

code::snippets! {
    /// Puts secrets into all registers but x18, x30 and SP, stores x0 to the device at x1, and clears them.
    store_among_secrets:
        "mov x16, x30",
        "mov x30, x2",
        "mov x3, x2", "mov x4, x2", "mov x5, x2", "mov x6, x2", "mov x7, x2", "mov x8, x2", "mov x9, x2", "mov x10, x2",
        "mov x11, x2", "mov x12, x2", "mov x13, x2", "mov x14, x2", "mov x15, x2", "mov x17, x2", "mov x19, x2",
        "mov x20, x2", "mov x21, x2", "mov x22, x2", "mov x23, x2", "mov x24, x2", "mov x25, x2", "mov x26, x2",
        "mov x27, x2", "mov x28, x2", "mov x29, x2",
        "msr tpidr_el0, x2", "msr tpidr_el1, x2", "msr tpidrro_el0, x2", "msr par_el1, x2", "msr afsr0_el1, x2",
        "msr contextidr_el1, x2",
        ".arch_extension fp",
        ".arch_extension simd",
        "dup v0.2d, x2", "dup v1.2d, x2", "dup v15.2d, x2", "dup v31.2d, x2",
        "str x0, [x1]",
        "dup v0.2d, x2", "dup v8.2d, x2", "dup v31.2d, x2",
        "wfi",
        "mov x30, x16";
}

/// An exit shows nothing of the guest but what belongs to it: not in the run page, and not in the host's registers.
pub(crate) fn nothing_leaks() -> Outcome {
    const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec3;
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        let run_page = vm.run_page(0);
        let shows_only = |expected: &RunExit| {
            let bytes = expected.to_bytes();
            for (index, offset) in (0..PAGE).step_by(8).enumerate() {
                let word = memory::load(run_page + offset);
                check!(word != SECRET, "the secret is in the run page, at {offset:#x}");
                let announced = bytes.as_chunks().0.get(index).map_or(0, |&word| u64::from_le_bytes(word));
                check_eq!(word, announced, "the run page at {offset:#x}");
            }
            Ok(())
        };
        guest.begin_code(store_among_secrets(), &[0x77, vm.shared(OTHER_DEVICE), SECRET])?;
        // The guest loads its operands; then it is among the secrets.
        match guest.go()? {
            Stop::Exit(exit) => {
                check_eq!(exit.value, 0x77, "what is stored");
                shows_only(&exit)?;
            }
            other => return Err(Failure::new(format_args!("{other:?}"))),
        }
        guest.answer(Answer::Complete, 0);
        // Registers x4 to x30 of the host are compared by each call; here the SIMD registers are, too.
        run_with_vectors(&guest)?;
        let exit = RunExit { reason: ExitReason::Wait.code(), deadline: RUN_NO_DEADLINE, ..RunExit::default() };
        shows_only(&exit)?;
        guest.finish()?;
        vm.finish()?;
    }
    Ok(())
}

/// Runs the vCPU once with patterns in the host's SIMD registers, which stay.
fn run_with_vectors(guest: &Guest<'_>) -> Outcome {
    use crate::rt::call::{Instruction, call_with_vectors};
    let vectors = core::array::from_fn(|index| [index as u64 + 1, !(index as u64)]);
    let call = [crate::tests::number("VCPU_RUN"), guest.vm.handle, guest.index, 0];
    let (results, after) = call_with_vectors(Instruction::Hvc, call, vectors);
    check_eq!(results[0], 0, "VCPU_RUN");
    check!(after == vectors, "a SIMD register of the host has changed");
    guest.answer(Answer::Retry, 0);
    Ok(())
}

code::snippets! {
    /// Waits for an interrupt with the virtual timer set to x0 ticks from now; returns when that is.
    wait_for_virtual_timer:
        "mrs x1, cntvct_el0", "add x0, x0, x1", "msr cntv_cval_el0, x0", "mov x1, #1", "msr cntv_ctl_el0, x1", "isb",
        "wfi", "mrs x1, cntv_ctl_el0", "mrs x2, cntvct_el0", "msr cntv_ctl_el0, xzr", "isb";

    /// The same with the physical timer.
    wait_for_physical_timer:
        "mrs x1, cntpct_el0", "add x0, x0, x1", "msr cntp_cval_el0, x0", "mov x1, #1", "msr cntp_ctl_el0, x1", "isb",
        "wfi", "mrs x1, cntp_ctl_el0", "mrs x2, cntpct_el0", "msr cntp_ctl_el0, xzr", "isb";

    /// Waits for an event.
    wait_for_event: "sevl", "wfe", "wfe";
}

/// A guest that waits tells when it wants to be woken, and nothing else.
pub(crate) fn waiting() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        guest.begin_code(code::wfi(), &[])?;
        let exit = guest.exit(ExitReason::Wait)?;
        check_eq!(exit.deadline, RUN_NO_DEADLINE, "when a guest without timers wants to be woken");
        // A wait may end without a reason.
        guest.finish()?;

        let ticks = read_register!("cntfrq_el0") / 50;
        for code in [wait_for_virtual_timer(), wait_for_physical_timer()] {
            let before = read_register!("cntpct_el0");
            guest.begin_code(code, &[ticks])?;
            let exit = guest.exit(ExitReason::Wait)?;
            let range = before + ticks..read_register!("cntpct_el0") + ticks;
            check!(range.contains(&exit.deadline), "deadline {:#x}, not in {range:#x?}", exit.deadline);
            while read_register!("cntpct_el0") < exit.deadline {
                cpu::wait();
            }
            let [deadline, control, now, ..] = guest.finish()?.x;
            check_eq!(control, 5, "the timer's control register after the deadline");
            check!(now >= deadline, "the guest goes on at {now:#x}, before {deadline:#x}");
        }
        guest.begin_code(wait_for_event(), &[])?;
        // Whether WFE leaves the guest is the CPU's affair.
        guest.finish()?;
        vm.finish()?;
    }
    Ok(())
}

code::snippets! {
    /// Stores to x0, and then does nothing for ever.
    store_and_spin: "str x1, [x0]", "4: b 4b";
}

/// Lets the vCPU begin to do nothing for ever; it is left when it is run.
pub(crate) fn begin_to_spin(guest: &mut Guest<'_>) -> Outcome {
    guest.begin_code(store_and_spin(), &[guest.vm.shared(OTHER_DEVICE)])?;
    guest.exit(ExitReason::Mmio)?;
    guest.answer(Answer::Complete, 0);
    Ok(())
}

/// Runs a vCPU that does nothing for ever until `end` has become true; counts the runs.
fn spins_until(guest: &Guest<'_>, end: impl Fn() -> bool) -> Result<u64, Failure> {
    let mut runs = 0;
    while !end() {
        let exit = guest.run_once()?;
        check_eq!(ExitReason::from_code(exit.reason), Some(ExitReason::Interrupted), "reason of the exit");
        check_eq!(RunExit { reason: 0, ..exit }, RunExit::default(), "what else the host is told");
        runs += 1;
        check!(runs < 1000, "the vCPU is left again and again");
    }
    Ok(runs)
}

/// A guest that never stops: the host's timer interrupt ends its run.
pub(crate) fn endless_loop_and_host_timer() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        begin_to_spin(&mut guest)?;
        for _ in 0..5 {
            gic::arm_timer(read_register!("cntfrq_el0") / 100);
            let outcome = spins_until(&guest, gic::timer_fired);
            let taken = gic::take();
            gic::stop_timer();
            outcome?;
            check_eq!(taken, 27, "the interrupt that waits for the host");
        }
        vm.finish()?;
    }
    Ok(())
}

/// The same with an interrupt that another CPU sends.
pub(crate) fn endless_loop_and_interrupt_of_another_cpu() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let mut guest = vm.guest(0);
    begin_to_spin(&mut guest)?;
    for _ in 0..5 {
        let send = |_: usize| {
            cpu::wait();
            gic::send(0);
        };
        let pending = || read_register!("isr_el1") & 1 << 7 != 0;
        cpu::run_on(&[1], &send, || spins_until(&guest, pending))?;
        check_eq!(gic::take(), u64::from(gic::SGI), "the interrupt that waits for the host");
    }
    vm.finish()
}

/// The host's virtual timer, set before the run, fires when it should and is as it was set.
pub(crate) fn host_timer_is_kept() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let mut guest = vm.guest(0);
    // The guest's own timer is in the same registers meanwhile.
    guest.begin_code(wait_for_virtual_timer(), &[1 << 40])?;
    guest.exit(ExitReason::Wait)?;
    let far = read_register!("cntvct_el0") + (1 << 50);
    cpu::write_register!("cntv_cval_el0", far);
    cpu::write_register!("cntv_ctl_el0", 3);
    let exit = guest.run_once()?;
    let (value, control) = (read_register!("cntv_cval_el0"), read_register!("cntv_ctl_el0"));
    gic::stop_timer();
    check_eq!((value, control), (far, 3), "the host's virtual timer after a run");
    check_eq!(ExitReason::from_code(exit.reason), Some(ExitReason::Mmio), "reason of the exit");
    vm.finish()
}

/// What else there is of the host in system registers is as it was after any exit.
pub(crate) fn host_registers_are_kept() -> Outcome {
    macro_rules! registers {
        ($($name:literal),+) => {{
            let read = || [$(read_register!($name)),+];
            let names = [$($name),+];
            (read, names)
        }};
    }
    let (read, names) = registers![
        "sctlr_el1",
        "tcr_el1",
        "ttbr0_el1",
        "ttbr1_el1",
        "mair_el1",
        "amair_el1",
        "vbar_el1",
        "cpacr_el1",
        "tpidr_el0",
        "tpidrro_el0",
        "tpidr_el1",
        "sp_el0",
        "contextidr_el1",
        "csselr_el1",
        "par_el1",
        "cntkctl_el1",
        "afsr0_el1",
        "afsr1_el1",
        "mpidr_el1",
        "midr_el1",
        "mdscr_el1",
        "cntp_ctl_el0",
        "cntp_cval_el0",
        "esr_el1",
        "far_el1",
        "elr_el1",
        "spsr_el1",
        "id_aa64pfr0_el1",
        "id_aa64dfr0_el1",
        "ctr_el0",
        "s3_3_c4_c4_0",
        "s3_3_c4_c4_1",
        "daif"
    ];
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        for name in 0..3 {
            match name {
                0 => guest.begin_code(store_among_secrets(), &[0, vm.shared(OTHER_DEVICE), !0])?,
                1 => guest.begin_code(wait_for_physical_timer(), &[1 << 40])?,
                _ => guest.begin_code(store_and_spin(), &[vm.shared(OTHER_DEVICE)])?,
            }
            cpu::write_register!("tpidr_el0", 0x1111);
            cpu::write_register!("tpidrro_el0", 0x2222);
            cpu::write_register!("tpidr_el1", 0x3333);
            cpu::write_register!("contextidr_el1", 0x44);
            cpu::write_register!("par_el1", 0);
            if name == 2 {
                gic::arm_timer(read_register!("cntfrq_el0") / 100);
            }
            loop {
                let before = read();
                let exit = guest.run_once()?;
                let after = read();
                for ((before, after), name) in before.into_iter().zip(after).zip(names) {
                    check_eq!(after, before, "{name} after a run");
                }
                match ExitReason::from_code(exit.reason) {
                    Some(ExitReason::Mmio) if exit.address & !0xfff == vm.shared(DEVICE) => {
                        guest.play(&exit)?;
                    }
                    _ => break,
                }
            }
            gic::stop_timer();
            if name == 0 {
                guest.answer(Answer::Complete, 0);
                guest.exit(ExitReason::Wait)?;
            }
            if name < 2 {
                guest.finish()?;
            }
        }
        vm.finish()?;
    }
    Ok(())
}

/// A vCPU that runs on another CPU is BUSY, and so is what would take its VM from it.
pub(crate) fn one_vcpu_on_two_cpus() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Ordinary, 1)?;
    let mut guest = vm.guest(0);
    begin_to_spin(&mut guest)?;
    let started = memory_flag(&pages)?;
    let run = |_: usize| {
        memory::store(started, 1);
        let _ = guest.run_once();
    };
    let outcome = cpu::run_on(&[1], &run, || {
        while memory::load(started) == 0 {
            cpu::wait();
        }
        cpu::wait();
        let outcome = (|| {
            for _ in 0..10 {
                refused("VCPU_RUN", [vm.handle, 0], Status::Busy)?;
                refused("VCPU_GET_REGISTER", [vm.handle, 0, 0], Status::Busy)?;
                refused("VCPU_SET_REGISTER", [vm.handle, 0, 0, 0], Status::Busy)?;
                refused("VM_TEARDOWN", [vm.handle], Status::Busy)?;
                refused("VM_DESTROY", [vm.handle], Status::Busy)?;
                refused("VM_SEAL", vm.seal_arguments(), Status::Busy)?;
                refused("VM_RECLAIM", [vm.handle, MEMORY, 1], Status::WrongState)?;
                refused("VCPU_CREATE", [vm.handle, 0, started, 1, started], Status::WrongState)?;
            }
            Ok(())
        })();
        gic::send(1);
        outcome
    });
    cpu::run_on(
        &[1],
        &|_| {
            let _ = gic::take();
        },
        || (),
    );
    outcome?;
    vm.finish()
}

/// A page of the arena that holds zero.
fn memory_flag(pages: &Pages) -> Result<u64, Failure> {
    let page = pages.take(1)?;
    memory::store(page, 0);
    Ok(page)
}

/// The host scribbles over the run page while the vCPU runs: the guest gets one answer or another, and nothing breaks.
pub(crate) fn run_page_changes_all_the_time() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let mut guest = vm.guest(0);
    let run_page = vm.run_page(0);
    let stop = memory_flag(&pages)?;
    guest.begin_code(code::load(), &[vm.shared(OTHER_DEVICE)])?;
    guest.exit(ExitReason::Mmio)?;
    let scribble = |_: usize| {
        let mut value = 1_u64;
        while memory::load(stop) == 0 {
            for offset in (0..PAGE).step_by(8) {
                value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
                let answer = RunPage::ENTRY as u64 == offset;
                memory::store(run_page + offset, if answer { value >> 62 } else { value });
            }
        }
    };
    let outcome = cpu::run_on(&[1], &scribble, || {
        for _ in 0..2000 {
            let (status, _) = crate::rt::vm::call("VCPU_RUN", [vm.handle, 0]);
            if !matches!(status, Status::Success | Status::Invalid) {
                memory::store(stop, 1);
                return Err(Failure::new(format_args!("VCPU_RUN: {}", status.name())));
            }
        }
        memory::store(stop, 1);
        Ok(())
    });
    outcome?;
    vm.finish()
}

/// The run page stays the host's, which cannot take it away from under the hypervisor.
pub(crate) fn run_page_stays() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let run_page = vm.run_page(0);
    let page = vm.add(MEMORY, 1)?;
    for name in ["SHARE", "UNSHARE", "DONATE", "TAKE_BACK", "PIN", "UNPIN"] {
        refused(name, [run_page, 1, 0], Status::Denied)?;
    }
    refused("VM_MAP", [vm.handle, MEMORY + PAGE, run_page, 1], Status::Denied)?;
    refused("VM_DONATE_TABLES", [vm.handle, run_page, 1], Status::Denied)?;
    refused("STATISTICS", [run_page, 0], Status::Denied)?;
    refused("FORCE_RECLAIM", [run_page, 1], Status::Denied)?;
    let mut guest = vm.guest(0);
    guest.fill(MEMORY, 1, page, 1)?;
    guest.compare(MEMORY, 1, page, 1)?;
    vm.finish()
}
