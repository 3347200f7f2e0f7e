//! Timers and the interrupt controller of guests.

use core::sync::atomic::{AtomicBool, Ordering};

use ravelin_abi::{ExitReason, RunExit, VmKind};
use ravelin_guest::Command;
use spin::Mutex;

use crate::{
    rt::{
        cpu::{self, read_register},
        gic,
        platform::platform,
        vm::{DISTRIBUTOR, Guest, Pages, REDISTRIBUTORS, Stop, Vm, block_of, call, code, code::snippets},
    },
    tests::{Failure, Outcome, check, check_eq, guests::world::on_cpu},
};

const MIB: u64 = 1 << 20;

/// INTIDs of the timers.
const VIRTUAL_TIMER: u64 = 27;
const PHYSICAL_TIMER: u64 = 30;

/// What ICC_IAR1_EL1 says when there is nothing.
const NOTHING: u64 = 1023;

/// Priority of whatever is not about priorities.
const PRIORITY: u64 = 0x80;

snippets! {
    /// Stores 4 bytes: x0 = address, x1 = value.
    store32: "str w1, [x0]";

    /// Stores a byte: x0 = address, x1 = value.
    store8: "strb w1, [x0]";

    /// Loads 4 bytes: x0 = address. Returns them.
    load32: "ldr w0, [x0]";

    /// Lets interrupts of group 1 through the CPU interface: x0 = priority mask, x1 = ICC_CTLR_EL1.
    open_interface: "msr s3_0_c4_c6_0, x0", "msr s3_0_c12_c12_4, x1", "mov x0, #1", "msr s3_0_c12_c12_7, x0", "isb";

    /// Takes an interrupt: returns ICC_IAR1_EL1, and what ICC_HPPIR1_EL1 was before.
    take: "isb", "mrs x1, s3_0_c12_c12_2", "mrs x0, s3_0_c12_c12_0", "dsb sy";

    /// Ends an interrupt: x0 = INTID, for ICC_EOIR1_EL1.
    end: "msr s3_0_c12_c12_1, x0", "isb";

    /// Deactivates an interrupt: x0 = INTID, for ICC_DIR_EL1.
    deactivate: "msr s3_0_c12_c11_1, x0", "isb";

    /// Sends an SGI: x0 = value of ICC_SGI1R_EL1.
    send: "msr s3_0_c12_c11_5, x0", "isb";

    /// Lets pending interrupts be handled.
    unmask: "msr daifclr, #2", "isb", "msr daifset, #2";

    /// Lets the virtual timer fire in x1 ticks, waits until its interrupt has been handled, which masks it, and does so x0 times.
    virtual_timer_again:
        "4: msr cntv_tval_el0, x1", "mov x3, #1", "msr cntv_ctl_el0, x3", "isb",
        "5: wfi", "msr daifclr, #2", "isb", "msr daifset, #2", "mrs x4, cntv_ctl_el0", "tbz x4, #1, 5b",
        "sub x0, x0, #1", "cbnz x0, 4b";

    /// The same without WFI.
    virtual_timer_while_busy:
        "msr daifclr, #2",
        "4: msr cntv_tval_el0, x1", "mov x3, #1", "msr cntv_ctl_el0, x3", "isb",
        "5: mrs x4, cntv_ctl_el0", "tbz x4, #1, 5b",
        "sub x0, x0, #1", "cbnz x0, 4b", "msr daifset, #2";

    /// The same with the physical timer.
    physical_timer_again:
        "4: msr cntp_tval_el0, x1", "mov x3, #1", "msr cntp_ctl_el0, x3", "isb",
        "5: wfi", "msr daifclr, #2", "isb", "msr daifset, #2", "mrs x4, cntp_ctl_el0", "tbz x4, #1, 5b",
        "sub x0, x0, #1", "cbnz x0, 4b";

    /// The physical timer without WFI.
    physical_timer_while_busy:
        "msr daifclr, #2",
        "4: msr cntp_tval_el0, x1", "mov x3, #1", "msr cntp_ctl_el0, x3", "isb",
        "5: mov x5, #1000", "6: sub x5, x5, #1", "cbnz x5, 6b", "mrs x4, cntp_ctl_el0", "tbz x4, #1, 5b",
        "sub x0, x0, #1", "cbnz x0, 4b", "msr daifset, #2";

    /// Both timers, in x1 and x2 ticks, until both interrupts have been handled; x0 times.
    both_timers:
        "4: msr cntv_tval_el0, x1", "msr cntp_tval_el0, x2", "mov x3, #1", "msr cntv_ctl_el0, x3", "msr cntp_ctl_el0, x3",
        "isb",
        "5: wfi", "msr daifclr, #2", "isb", "msr daifset, #2", "mrs x4, cntv_ctl_el0", "mrs x5, cntp_ctl_el0",
        "and x4, x4, x5", "tbz x4, #1, 5b",
        "sub x0, x0, #1", "cbnz x0, 4b";

    /// Sets the virtual timer: x0 = control, x1 = time.
    set_virtual_timer: "msr cntv_cval_el0, x1", "msr cntv_ctl_el0, x0", "isb";

    /// Sets the physical timer: x0 = control, x1 = time.
    set_physical_timer: "msr cntp_cval_el0, x1", "msr cntp_ctl_el0, x0", "isb";

    /// Handles interrupts until the word at x0 is x1 at least.
    handle_until: "msr daifclr, #2", "4: ldr x2, [x0]", "cmp x2, x1", "b.lo 4b", "msr daifset, #2";
}

/// Offset of the second frame of a redistributor.
const PRIVATE_FRAME: u64 = 0x1_0000;

// Offsets of registers that have bits or bytes for interrupts.
const GROUP: u64 = 0x080;
const SET_ENABLE: u64 = 0x100;
const CLEAR_ENABLE: u64 = 0x180;
const SET_PENDING: u64 = 0x200;
const CLEAR_PENDING: u64 = 0x280;
const SET_ACTIVE: u64 = 0x300;
const CLEAR_ACTIVE: u64 = 0x380;
const PRIORITIES: u64 = 0x400;
const CONFIGURATION: u64 = 0xc00;
const ROUTES: u64 = 0x6000;
const SETSPI: u64 = 0x40;
const CLRSPI: u64 = 0x48;

/// Address of the frame with an interrupt's registers.
fn frame(guest: &Guest<'_>, intid: u64) -> u64 {
    match intid {
        0..32 => guest.vm.shared(REDISTRIBUTORS) + guest.index * 2 * PRIVATE_FRAME + PRIVATE_FRAME,
        _ => guest.vm.shared(DISTRIBUTOR),
    }
}

/// Stores to a register of the interrupt controller.
fn store(guest: &mut Guest<'_>, address: u64, value: u64) -> Outcome {
    guest.run(store32(), &[address, value]).map(drop)
}

/// Sets an interrupt's bit in a register.
fn set_bit(guest: &mut Guest<'_>, register: u64, intid: u64) -> Outcome {
    let address = frame(guest, intid) + register + intid / 32 * 4;
    store(guest, address, 1 << (intid % 32))
}

/// Whether an interrupt's bit in a register is set.
fn bit(guest: &mut Guest<'_>, register: u64, intid: u64) -> Result<bool, Failure> {
    let address = frame(guest, intid) + register + intid / 32 * 4;
    Ok(guest.run(load32(), &[address])?[0] >> (intid % 32) & 1 != 0)
}

fn set_priority(guest: &mut Guest<'_>, intid: u64, priority: u64) -> Outcome {
    let address = frame(guest, intid) + PRIORITIES + intid;
    guest.run(store8(), &[address, priority]).map(drop)
}

/// Enables all SGIs and PPIs of a vCPU, in group 1, and the interfaces. The vCPU keeps interrupts masked.
pub(super) fn prepare(guest: &mut Guest<'_>) -> Outcome {
    let private = frame(guest, 0);
    store(guest, guest.vm.shared(DISTRIBUTOR), 0x12)?; // GICD_CTLR: group 1, affinity routing
    store(guest, private - PRIVATE_FRAME + 0x14, 0)?; // GICR_WAKER
    store(guest, private + GROUP, 0xffff_ffff)?;
    for offset in (0..32).step_by(4) {
        store(guest, private + PRIORITIES + offset, PRIORITY * 0x0101_0101)?;
    }
    store(guest, private + SET_ENABLE, 0xffff_ffff)?;
    guest.run(open_interface(), &[0xff, 0]).map(drop)
}

/// Enables 32 SPIs from 32 on, or from 64, in group 1 and as levels, for vCPU 0.
fn prepare_spis(guest: &mut Guest<'_>, first: u64, edge: bool) -> Outcome {
    let distributor = guest.vm.shared(DISTRIBUTOR);
    store(guest, distributor + GROUP + first / 8, 0xffff_ffff)?;
    for offset in (0..32).step_by(4) {
        store(guest, distributor + PRIORITIES + first + offset, PRIORITY * 0x0101_0101)?;
    }
    for offset in [0, 4] {
        store(guest, distributor + CONFIGURATION + first / 4 + offset, if edge { 0xaaaa_aaaa } else { 0 })?;
    }
    store(guest, distributor + SET_ENABLE + first / 8, 0xffff_ffff)
}

/// Moves an SPI's wire; returns which vCPUs have something to do.
fn raise(vm: &Vm<'_>, intid: u64, level: bool) -> Result<u64, Failure> {
    let (status, [low, high, _]) = call("SPI", [vm.handle, intid, u64::from(level)]);
    check_eq!((status, high), (ravelin_abi::Status::Success, 0), "SPI {intid}");
    Ok(low)
}

/// Takes an interrupt.
fn take_one(guest: &mut Guest<'_>) -> Result<u64, Failure> {
    let [taken, highest, ..] = guest.run(take(), &[])?;
    check!(highest == taken || taken == NOTHING, "ICC_HPPIR1_EL1 says {highest}, ICC_IAR1_EL1 {taken}");
    Ok(taken)
}

/// Checks which interrupt the vCPU takes.
fn takes(guest: &mut Guest<'_>, expected: u64) -> Outcome {
    check_eq!(take_one(guest)?, expected, "the interrupt that is taken");
    Ok(())
}

/// Ends an interrupt, in EOImode 0.
fn ends(guest: &mut Guest<'_>, intid: u64) -> Outcome {
    guest.run(end(), &[intid]).map(drop)
}

/// Takes and ends an interrupt.
fn handles(guest: &mut Guest<'_>, expected: u64) -> Outcome {
    takes(guest, expected)?;
    ends(guest, expected)
}

/// How many interrupts the guest's handler has had, and the last ones, the last one first.
fn handled(guest: &mut Guest<'_>) -> Result<(u64, [u64; 7]), Failure> {
    guest.begin(Command::Interrupts, &[])?;
    let [count, last @ ..] = guest.finish()?.x;
    Ok((count, last))
}

/// Lets the guest execute code, and sleeps when it does.
fn sleep_and_run(guest: &mut Guest<'_>, code: &[u64], arguments: &[u64]) -> Outcome {
    guest.begin_code(code, arguments)?;
    loop {
        match guest.go()? {
            Stop::Done(reply) => {
                check_eq!(reply.exception, None, "exception");
                return Ok(());
            }
            Stop::Exit(exit) if exit.reason == ExitReason::Wait.code() => {
                let now = read_register!("cntpct_el0");
                check!(
                    exit.deadline < now + read_register!("cntfrq_el0"),
                    "it waits until {:#x} at {now:#x}",
                    exit.deadline
                );
                while read_register!("cntpct_el0") < exit.deadline {
                    core::hint::spin_loop();
                }
            }
            Stop::Exit(exit) => return Err(Failure::new(format_args!("unexpected exit: {exit:x?}"))),
        }
    }
}

/// Both timers fire again and again, for a guest that sleeps and one that does not.
pub(crate) fn timers() -> Outcome {
    const ROUNDS: u64 = 50;
    for kind in [VmKind::Pkvm, VmKind::Realm, VmKind::Ordinary] {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        prepare(&mut guest)?;
        let tick = read_register!("cntfrq_el0") / 5000;
        let mut before = 0;
        for (code, intid) in [
            (virtual_timer_again(), VIRTUAL_TIMER),
            (virtual_timer_while_busy(), VIRTUAL_TIMER),
            (physical_timer_again(), PHYSICAL_TIMER),
            (physical_timer_while_busy(), PHYSICAL_TIMER),
        ] {
            sleep_and_run(&mut guest, code, &[ROUNDS, tick])?;
            // What is pending no more when it is taken, 1023, counts as well.
            let (count, last) = handled(&mut guest)?;
            check!(count - before >= ROUNDS && count - before < 2 * ROUNDS, "{} interrupts", count - before);
            check!(last[..5].contains(&intid), "the last interrupts are {last:?}, not {intid}");
            before = count;
        }
        sleep_and_run(&mut guest, both_timers(), &[ROUNDS, tick, tick * 2])?;
        sleep_and_run(&mut guest, both_timers(), &[ROUNDS, tick, tick])?;
        let (count, last) = handled(&mut guest)?;
        check!(count - before >= 4 * ROUNDS, "{} interrupts of both timers", count - before);
        check!(last.contains(&VIRTUAL_TIMER) && last.contains(&PHYSICAL_TIMER), "the last interrupts are {last:?}");
        vm.finish()?;
    }
    Ok(())
}

/// A timer's interrupt lasts as long as the timer says: it comes again after its end, and goes with its cause.
pub(crate) fn timers_are_levels() -> Outcome {
    const ON: u64 = 1;
    const MASKED: u64 = 3;
    const OFF: u64 = 0;
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let mut guest = vm.guest(0);
    prepare(&mut guest)?;
    for (set, intid) in [(set_virtual_timer(), VIRTUAL_TIMER), (set_physical_timer(), PHYSICAL_TIMER)] {
        let set = |guest: &mut Guest<'_>, control, time| guest.run(set, &[control, time]).map(drop);
        takes(&mut guest, NOTHING)?;
        set(&mut guest, ON, 1)?;
        check!(bit(&mut guest, SET_PENDING, intid)?, "{intid} is not pending");
        handles(&mut guest, intid)?;
        takes(&mut guest, intid)?;
        check!(bit(&mut guest, SET_ACTIVE, intid)?, "{intid} is not active");
        takes(&mut guest, NOTHING)?;
        ends(&mut guest, intid)?;
        set(&mut guest, MASKED, 1)?;
        takes(&mut guest, NOTHING)?;
        check!(!bit(&mut guest, SET_PENDING, intid)?, "{intid} is pending");
        set(&mut guest, ON, 1)?;
        takes(&mut guest, intid)?;
        // It goes while it is active.
        set(&mut guest, OFF, 1)?;
        ends(&mut guest, intid)?;
        takes(&mut guest, NOTHING)?;
        // In the future.
        set(&mut guest, ON, u64::MAX >> 8)?;
        takes(&mut guest, NOTHING)?;
        // Disabled, and masked by priority.
        set(&mut guest, ON, 1)?;
        set_bit(&mut guest, CLEAR_ENABLE, intid)?;
        takes(&mut guest, NOTHING)?;
        set_bit(&mut guest, SET_ENABLE, intid)?;
        guest.run(open_interface(), &[PRIORITY, 0])?;
        takes(&mut guest, NOTHING)?;
        guest.run(open_interface(), &[0xff, 0])?;
        handles(&mut guest, intid)?;
        set(&mut guest, OFF, 0)?;
    }
    vm.finish()
}

/// SGIs to oneself, to others that wait, to all others, and to those that run on another CPU.
pub(crate) fn sgis() -> Outcome {
    const BROADCAST: u64 = 1 << 40;
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Realm, 3)?;
    let [mut first, mut second, mut third] = [0, 1, 2].map(|vcpu| vm.guest(vcpu));
    for vcpu in [1, 2] {
        first.turn_on(vcpu)?;
    }
    for guest in [&mut first, &mut second, &mut third] {
        prepare(guest)?;
        takes(guest, NOTHING)?;
    }
    let woken = |guest: &mut Guest<'_>, value: u64| {
        guest.told.clear();
        guest.run(send(), &[value])?;
        Ok::<_, Failure>(guest.told.iter().fold(0, |all, exit: &RunExit| all | exit.wake_low))
    };
    // To oneself, twice the same one, and two at once.
    check_eq!(woken(&mut first, 5 << 24 | 1)?, 0, "vCPUs that the sender's own SGI wakes");
    woken(&mut first, 5 << 24 | 1)?;
    woken(&mut first, 3 << 24 | 1)?;
    handles(&mut first, 3)?;
    handles(&mut first, 5)?;
    takes(&mut first, NOTHING)?;
    // To each of the others, and to both of them and nobody.
    check_eq!(woken(&mut first, 7 << 24 | 2)?, 2, "vCPUs that an SGI to vCPU 1 wakes");
    handles(&mut second, 7)?;
    check_eq!(woken(&mut second, 8 << 24 | 0xfff5)?, 5, "vCPUs that an SGI to vCPUs 0 and 2 wakes");
    for guest in [&mut first, &mut third] {
        handles(guest, 8)?;
    }
    check_eq!(woken(&mut first, 8 << 24 | 1 << 16 | 1)?, 0, "vCPUs that an SGI to nobody wakes");
    check_eq!(woken(&mut third, BROADCAST | 15 << 24)?, 3, "vCPUs that an SGI to all others wakes");
    for guest in [&mut first, &mut second] {
        handles(guest, 15)?;
    }
    for guest in [&mut first, &mut second, &mut third] {
        takes(guest, NOTHING)?;
    }
    // To one that sleeps.
    second.begin_code(code::wfi(), &[])?;
    second.exit(ExitReason::Wait)?;
    check_eq!(woken(&mut first, 9 << 24 | 2)?, 2, "vCPUs that are woken");
    second.finish()?;
    handles(&mut second, 9)?;
    second.begin_code(code::wfi(), &[])?;
    second.exit(ExitReason::Wait)?;
    second.finish()?;
    // To one that runs on another CPU, again and again: its host interrupts that CPU.
    if platform().cpus.len() > 1 {
        const ROUNDS: u64 = 20;
        let second = Mutex::new(&mut second);
        let outcome = Mutex::new(Ok(()));
        let running = AtomicBool::new(true);
        let job = |_| {
            *outcome.lock() = second.lock().run(handle_until(), &[block_of(1) + 0x80, ROUNDS]).map(drop);
            running.store(false, Ordering::Release);
        };
        cpu::run_on(&[1], &job, || {
            while running.load(Ordering::Acquire) {
                if woken(&mut first, 1 << 24 | 2)? & 2 != 0 {
                    gic::send(1);
                }
                cpu::wait();
            }
            Ok::<_, Failure>(())
        })?;
        outcome.into_inner()?;
        let (count, last) = handled(&mut second.lock())?;
        check!(count >= ROUNDS && last[0] == 1, "{count} interrupts, the last ones {last:?}");
    }
    vm.finish()
}

/// SPIs that the host raises: edges and levels, priorities, masks, and where they go.
pub(crate) fn spis() -> Outcome {
    const EDGES: u64 = 32;
    const LEVELS: u64 = 64;
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 2)?;
    let mut guest = vm.guest(0);
    guest.turn_on(1)?;
    let mut other = vm.guest(1);
    for guest in [&mut guest, &mut other] {
        prepare(guest)?;
    }
    let guest = &mut guest;
    prepare_spis(guest, EDGES, true)?;
    prepare_spis(guest, LEVELS, false)?;

    // Each edge once.
    let edge = EDGES + 8;
    check_eq!(raise(&vm, edge, true)?, 1, "vCPUs that have something to do");
    handles(guest, edge)?;
    takes(guest, NOTHING)?;
    raise(&vm, edge, false)?;
    takes(guest, NOTHING)?;
    for _ in 0..3 {
        raise(&vm, edge, true)?;
    }
    takes(guest, edge)?;
    raise(&vm, edge, true)?; // while it is active
    ends(guest, edge)?;
    handles(guest, edge)?;
    takes(guest, NOTHING)?;
    // A level until it is gone.
    let level = LEVELS + 3;
    raise(&vm, level, true)?;
    handles(guest, level)?;
    takes(guest, level)?;
    raise(&vm, level, false)?;
    ends(guest, level)?;
    takes(guest, NOTHING)?;
    raise(&vm, level, true)?;
    raise(&vm, level, false)?;
    takes(guest, NOTHING)?;

    // By priority, one within the other.
    for (intid, priority) in [(40, 0xa0), (41, 0x40), (42, 0x80)] {
        set_priority(guest, intid, priority)?;
    }
    raise(&vm, 40, true)?;
    takes(guest, 40)?;
    raise(&vm, 42, true)?;
    takes(guest, 42)?;
    raise(&vm, 41, true)?;
    takes(guest, 41)?;
    takes(guest, NOTHING)?;
    for intid in [41, 42, 40] {
        ends(guest, intid)?;
    }
    for intid in [40, 42, 41] {
        raise(&vm, intid, true)?;
    }
    for intid in [41, 42, 40] {
        takes(guest, intid)?;
        takes(guest, NOTHING)?;
        ends(guest, intid)?;
    }
    // Masked by priority, disabled, and with its group off.
    guest.run(open_interface(), &[0x90, 0])?;
    raise(&vm, 40, true)?;
    takes(guest, NOTHING)?;
    guest.run(open_interface(), &[0xff, 0])?;
    set_bit(guest, CLEAR_ENABLE, 40)?;
    takes(guest, NOTHING)?;
    set_bit(guest, SET_ENABLE, 40)?;
    store(guest, guest.vm.shared(DISTRIBUTOR), 0x10)?;
    takes(guest, NOTHING)?;
    store(guest, guest.vm.shared(DISTRIBUTOR), 0x12)?;
    handles(guest, 40)?;

    // Pending and active by the guest's hand; messages.
    set_bit(guest, SET_PENDING, 50)?;
    check!(bit(guest, CLEAR_PENDING, 50)?, "50 is not pending");
    handles(guest, 50)?;
    set_bit(guest, SET_PENDING, 50)?;
    set_bit(guest, CLEAR_PENDING, 50)?;
    takes(guest, NOTHING)?;
    set_bit(guest, SET_ACTIVE, 50)?;
    raise(&vm, 50, true)?;
    takes(guest, NOTHING)?;
    check!(bit(guest, SET_ACTIVE, 50)? && bit(guest, SET_PENDING, 50)?, "50 is not active and pending");
    set_bit(guest, CLEAR_ACTIVE, 50)?;
    handles(guest, 50)?;
    let distributor = guest.vm.shared(DISTRIBUTOR);
    store(guest, distributor + SETSPI, 51)?;
    handles(guest, 51)?;
    store(guest, distributor + SETSPI, level)?;
    handles(guest, level)?;
    takes(guest, level)?;
    store(guest, distributor + CLRSPI, level)?;
    ends(guest, level)?;
    takes(guest, NOTHING)?;

    // To the other vCPU, also what is pending already.
    guest.run(code::store(), &[distributor + ROUTES + 8 * 52, 1])?;
    check_eq!(raise(&vm, 52, true)?, 2, "vCPUs that have something to do");
    takes(guest, NOTHING)?;
    handles(&mut other, 52)?;
    set_bit(guest, CLEAR_ENABLE, 53)?;
    raise(&vm, 53, true)?;
    guest.run(code::store(), &[distributor + ROUTES + 8 * 53, 1])?;
    set_bit(guest, SET_ENABLE, 53)?;
    takes(guest, NOTHING)?;
    handles(&mut other, 53)?;
    vm.finish()
}

/// More pending interrupts than there are list registers: each comes once, by priority; in EOImode 1 all may be active at once.
pub(crate) fn more_interrupts_than_list_registers() -> Outcome {
    const COUNT: u64 = 24;
    const FIRST: u64 = 32;
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let mut guest = vm.guest(0);
    prepare(&mut guest)?;
    prepare_spis(&mut guest, FIRST, true)?;
    // Another order than that of their numbers.
    let nth = |n: u64| FIRST + n * 7 % COUNT;
    for n in 0..COUNT {
        set_priority(&mut guest, nth(n), n * 8)?;
    }
    let raise_all = || (FIRST..FIRST + COUNT).try_for_each(|intid| raise(&vm, intid, true).map(drop));
    raise_all()?;
    for n in 0..COUNT {
        handles(&mut guest, nth(n))?;
    }
    takes(&mut guest, NOTHING)?;
    // One within the other, as deep as it gets.
    for n in (0..COUNT).rev() {
        raise(&vm, nth(n), true)?;
        takes(&mut guest, nth(n))?;
    }
    raise_all()?;
    takes(&mut guest, NOTHING)?;
    for n in 0..COUNT {
        ends(&mut guest, nth(n))?;
        // Those that have ended are pending again.
        takes(&mut guest, nth(n))?;
        ends(&mut guest, nth(n))?;
    }
    takes(&mut guest, NOTHING)?;

    // EOImode 1.
    guest.run(open_interface(), &[0xff, 2])?;
    raise_all()?;
    for n in 0..COUNT {
        takes(&mut guest, nth(n))?;
        ends(&mut guest, nth(n))?;
    }
    takes(&mut guest, NOTHING)?;
    raise_all()?;
    takes(&mut guest, NOTHING)?;
    for intid in FIRST..FIRST + COUNT {
        check!(bit(&mut guest, SET_ACTIVE, intid)?, "{intid} is not active");
    }
    for n in (0..COUNT).rev() {
        guest.run(deactivate(), &[nth(n)])?;
        check!(!bit(&mut guest, SET_ACTIVE, nth(n))?, "{} is active", nth(n));
        takes(&mut guest, nth(n))?;
        ends(&mut guest, nth(n))?;
        guest.run(deactivate(), &[nth(n)])?;
        takes(&mut guest, NOTHING)?;
    }
    guest.run(open_interface(), &[0xff, 0])?;

    // Taken as exceptions, all at one go.
    raise_all()?;
    let (before, _) = handled(&mut guest)?;
    guest.spis.clear();
    guest.run(unmask(), &[])?;
    let (after, _) = handled(&mut guest)?;
    check!(after - before >= COUNT, "{} interrupts", after - before);
    for (n, &intid) in (0..).zip(guest.spis.iter()) {
        check_eq!(intid, nth(n), "interrupt {n}");
    }
    vm.finish()
}

/// An SPI that another CPU raises gets to a guest that runs and does nothing else.
pub(crate) fn spi_while_the_guest_runs() -> Outcome {
    const ROUNDS: u64 = 20;
    const SPI: u64 = 40;
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Realm, 1)?;
    let mut guest = vm.guest(0);
    prepare(&mut guest)?;
    prepare_spis(&mut guest, 32, false)?;
    let this = cpu::this();
    let running = AtomicBool::new(true);
    let job = |_| {
        while running.load(Ordering::Acquire) {
            if raise(&vm, SPI, true).is_ok_and(|woken| woken == 1) {
                gic::send(this);
            }
            cpu::wait();
        }
    };
    let counter = block_of(0) + 0x80;
    let outcome = cpu::run_on(&[1], &job, || {
        let outcome = guest.run(handle_until(), &[counter, ROUNDS]);
        running.store(false, Ordering::Release);
        outcome
    });
    outcome?;
    check!(guest.spis.iter().all(|&intid| intid == SPI), "SPIs {:?}", guest.spis);
    check!(!guest.spis.is_empty(), "no SPI has been handled");
    vm.finish()
}

/// Timers and pending interrupts go with a vCPU from CPU to CPU.
pub(crate) fn interrupts_move_with_their_vcpu() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let mut guest = vm.guest(0);
    prepare(&mut guest)?;
    prepare_spis(&mut guest, 32, true)?;
    let cpus = platform().cpus.len().min(4);
    let tick = read_register!("cntfrq_el0") / 5000;
    let guest = Mutex::new(guest);
    for round in 0..4 * cpus as u64 {
        let cpu = |offset: usize| (round as usize + offset) % cpus;
        // Armed here, taken there, ended elsewhere.
        on_cpu(cpu(0), || guest.lock().run(set_virtual_timer(), &[1, 1]))?;
        on_cpu(cpu(1), || takes(&mut guest.lock(), VIRTUAL_TIMER))?;
        raise(&vm, 32 + round, true)?;
        on_cpu(cpu(2), || guest.lock().run(set_virtual_timer(), &[0, 0]))?;
        on_cpu(cpu(3), || ends(&mut guest.lock(), VIRTUAL_TIMER))?;
        on_cpu(cpu(1), || handles(&mut guest.lock(), 32 + round))?;
        on_cpu(cpu(0), || takes(&mut guest.lock(), NOTHING))?;
        on_cpu(cpu(1), || sleep_and_run(&mut guest.lock(), both_timers(), &[2, tick, tick]))?;
    }
    drop(guest);
    vm.finish()
}
