//! Rings: conversions that a guest posts, and that are done with the next exit.

use core::{
    mem::offset_of,
    sync::atomic::{AtomicBool, Ordering},
};

use ravelin_abi::{
    ConversionRequest, ExitReason, RING_DONE, RING_RESULTS, RUN_QUIET_SHARES, RunEntry, RunPage, Status, VmKind,
};
use spin::Mutex;

use super::convert::{CLAIMED, host_fills, host_finds, host_is_denied};
use crate::{
    rt::{
        cpu,
        memory::{self, BLOCK, PAGE},
        probe,
        vm::{Guest, MEMORY, PROTECTED, Pages, Vm, call, code, refused},
    },
    tests::{Failure, Outcome, check, check_eq, check_state, for_a_while, statistics},
};

const MIB: u64 = 1 << 20;

const MEM_SHARE: u64 = 0xc600_0003;
const MEM_RELINQUISH: u64 = 0xc600_0009;
const MEM_RING: u64 = 0xc600_0038;
const MEM_RING_SYNC: u64 = 0xc600_0039;
const CPU_OFF: u64 = 0x8400_0002;

const INVALID: u64 = u64::MAX - 2;

/// Guest address of the ring, and of what it converts.
const RING: u64 = MEMORY;
const BUFFERS: u64 = MEMORY + PAGE;

code::snippets! {
    /// Posts words in the ring at x0: x3 of them, from x1 on, each x2 more than the one before.
    post:
        "ldr x9, [x0]", "add x11, x0, #1024",
        "4: and x10, x9, #63", "str x1, [x11, x10, lsl #3]",
        "add x9, x9, #1", "add x1, x1, x2",
        "subs x3, x3, #1", "b.ne 4b",
        "stlr x9, [x0]";
}

fn word(at: u64, pages: u64, unshare: bool) -> u64 {
    ConversionRequest { address: at, pages, unshare }.word()
}

/// Makes a page the ring of a vCPU, in which nothing is posted.
fn attach(guest: &mut Guest<'_>, at: u64) -> Outcome {
    guest.store(at, 0)?;
    check_eq!(guest.call(&[MEM_RING, at, 1, 0])?[0], 0, "MEM_RING");
    Ok(())
}

/// Lets the guest post conversions: the first one, how far the others are from it, how many. They are done when it comes to EL2,
/// with its results at the latest.
fn posts(guest: &mut Guest<'_>, word: u64, stride: u64, count: u64) -> Outcome {
    guest.conversions.clear();
    guest.run(post(), &[RING, word, stride, count]).map(drop)
}

/// Checks the results of the last `count` conversions, which are `done` by now.
fn results(guest: &mut Guest<'_>, done: u64, count: u64, expected: u64) -> Outcome {
    check_eq!(guest.load(RING + RING_DONE as u64)?, done, "conversions that are complete");
    for number in done - count..done {
        let result = guest.load(RING + RING_RESULTS as u64 + number % 64 * 8)?;
        check_eq!(result, expected, "result of conversion {number}");
    }
    Ok(())
}

/// Buffers of a guest go there and back, with one exit and one invalidation for all of them.
pub(crate) fn ring_in_place() -> Outcome {
    const COUNT: u64 = 30;
    let pages = Pages::new(8 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let ring = vm.add(RING, 1)?;
    let address = vm.add(BUFFERS, 3 * COUNT)?;
    let mut guest = vm.guest(0);
    guest.fill(BUFFERS, 3 * COUNT, address, 1)?;
    attach(&mut guest, RING)?;
    host_is_denied(ring, 1)?;
    let mut done = 0;
    for round in 1..5 {
        // Two of three pages each.
        posts(&mut guest, word(BUFFERS, 2, false), 3 * PAGE, COUNT)?;
        check_eq!(guest.conversions.len() as u64, COUNT, "shares that the host is told of");
        done += COUNT;
        results(&mut guest, done, COUNT, 0)?;
        for buffer in 0..COUNT {
            let at = BUFFERS + 3 * buffer * PAGE;
            let page = address + 3 * buffer * PAGE;
            check_eq!(guest.conversions[buffer as usize], word(at, 2, false), "share {buffer}");
            vm.claim(at, 2)?;
            check_state(page, 2, CLAIMED)?;
            host_finds(page, 2, round)?;
            host_fills(page, 2, round + 1);
            host_is_denied(page + 2 * PAGE, 1)?;
        }
        let before = statistics()?.stage2_invalidations;
        guest.consent = u64::MAX;
        posts(&mut guest, word(BUFFERS, 2, true), 3 * PAGE, COUNT)?;
        check_eq!(guest.conversions.len() as u64, COUNT, "unshares that the host is asked for");
        check_eq!(statistics()?.stage2_invalidations - before, 1, "invalidations of all unshares");
        done += COUNT;
        results(&mut guest, done, COUNT, 0)?;
        for buffer in 0..COUNT {
            let offset = 3 * buffer * PAGE;
            host_is_denied(address + offset, 3)?;
            guest.compare(BUFFERS + offset, 2, address + offset, round + 1)?;
            guest.compare(BUFFERS + offset + 2 * PAGE, 1, address + offset + 2 * PAGE, 1)?;
        }
    }
    // Blocks, and so many pages that they take more than one exit.
    let block = pages.take_aligned(512, 512)?;
    vm.map(MEMORY + BLOCK, block, 512)?;
    for unshare in [false, true] {
        posts(&mut guest, word(MEMORY + BLOCK, 512, unshare), 0, 1)?;
        done += 1;
        results(&mut guest, done, 1, 0)?;
    }
    host_is_denied(block, 512)?;
    // The guest need not wait until there is another exit, and the host is told with it.
    check_eq!(guest.call(&[MEM_RING_SYNC])?[0], 0, "MEM_RING_SYNC");
    check_eq!(guest.call(&[MEM_RING, RING, 0, 0])?[0], 0, "MEM_RING");
    guest.share(RING, 1)?;
    guest.unshare(RING, 1)?;
    vm.finish()
}

/// The host keeps what it has claimed, gives up something else, and releases by itself.
pub(crate) fn ring_refused() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    vm.add(RING, 1)?;
    let address = vm.add(BUFFERS, 8)?;
    let mut guest = vm.guest(0);
    guest.fill(BUFFERS, 8, address, 5)?;
    attach(&mut guest, RING)?;
    posts(&mut guest, word(BUFFERS, 1, false), PAGE, 8)?;
    vm.claim(BUFFERS, 6)?;
    host_finds(address, 6, 5)?;
    // It consents to the first two of those that it has claimed.
    guest.consent = 0b11;
    posts(&mut guest, word(BUFFERS, 1, true), PAGE, 8)?;
    check_eq!(guest.conversions.len(), 6, "unshares that the host is asked for");
    check_state(address + 2 * PAGE, 4, CLAIMED)?;
    host_is_denied(address, 2)?;
    host_is_denied(address + 6 * PAGE, 2)?;
    host_finds(address + 2 * PAGE, 4, 5)?;
    check_eq!(guest.load(RING + RING_DONE as u64)?, 16, "conversions that are complete");
    for number in 8..16 {
        let expected = if (10..14).contains(&number) { INVALID } else { 0 };
        let result = guest.load(RING + RING_RESULTS as u64 + number * 8)?;
        check_eq!(result, expected, "result of conversion {number}");
    }
    // Consent to what nobody asks for is nothing.
    guest.consent = u64::MAX;
    posts(&mut guest, word(BUFFERS, 1, true), PAGE, 2)?;
    results(&mut guest, 18, 2, INVALID)?;
    check_state(address + 2 * PAGE, 4, CLAIMED)?;
    // What it has released by then need not be consented to.
    guest.consent = 0;
    vm.release(BUFFERS + 2 * PAGE, 2)?;
    posts(&mut guest, word(BUFFERS + 2 * PAGE, 1, true), PAGE, 4)?;
    check_eq!(guest.conversions.len(), 2, "unshares that the host is asked for");
    host_is_denied(address, 4)?;
    check_state(address + 4 * PAGE, 2, CLAIMED)?;
    guest.consent = u64::MAX;
    posts(&mut guest, word(BUFFERS + 4 * PAGE, 2, true), 0, 1)?;
    host_is_denied(address, 8)?;
    guest.compare(BUFFERS, 8, address, 5)?;
    vm.finish()
}

/// A host that need not be told of shares is not, neither with an exit nor in the list.
pub(crate) fn quiet_shares() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        vm.add(RING, 1)?;
        let address = vm.add(BUFFERS, 4)?;
        vm.donate_tables(4)?;
        let mut guest = vm.guest(0);
        guest.fill(BUFFERS, 4, address, 2)?;
        for (index, flags) in [(0, 0), (1, RUN_QUIET_SHARES), (2, !RUN_QUIET_SHARES)] {
            memory::store(vm.run_page(0) + (RunPage::ENTRY + offset_of!(RunEntry, flags)) as u64, flags);
            guest.told.clear();
            guest.share(BUFFERS + index * PAGE, 1)?;
            let quiet = flags & RUN_QUIET_SHARES != 0;
            check_eq!(guest.told.is_empty(), quiet, "flags {flags:#x}: nothing is told");
            vm.claim(BUFFERS + index * PAGE, 1)?;
            host_finds(address + index * PAGE, 1, 2)?;
        }
        if kind == VmKind::Pkvm {
            attach(&mut guest, RING)?;
            memory::store(vm.run_page(0) + (RunPage::ENTRY + offset_of!(RunEntry, flags)) as u64, RUN_QUIET_SHARES);
            posts(&mut guest, word(BUFFERS + 3 * PAGE, 1, false), 0, 1)?;
            results(&mut guest, 1, 1, 0)?;
            check!(guest.conversions.is_empty(), "the host is told of {:x?}", guest.conversions);
            vm.claim(BUFFERS + 3 * PAGE, 1)?;
            host_finds(address + 3 * PAGE, 1, 2)?;
        }
        vm.finish()?;
    }
    Ok(())
}

/// Words without sense, numbers that cannot be, pages that cannot be rings; and what a host may not do with one.
pub(crate) fn ring_of_nonsense() -> Outcome {
    let pages = Pages::new(4 * MIB);
    for kind in [VmKind::Ordinary, VmKind::Realm] {
        let vm = Vm::boot(&pages, kind, 1)?;
        vm.add(RING, 1)?;
        check_eq!(vm.guest(0).run(code::hvc(), &[MEM_RING, RING, 1, 0])?[0], u64::MAX, "MEM_RING");
        vm.end()?;
    }
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let ring = vm.add(RING, 1)?;
    let address = vm.add(BUFFERS, 4)?;
    let mut guest = vm.guest(0);
    guest.share(BUFFERS, 1)?;
    for (at, attach, reserved) in
        [(BUFFERS, 1, 0), (RING + 8, 1, 0), (RING, 2, 0), (RING, 1, 1), (1 << 47, 1, 0), (RING, 0, 0), (u64::MAX, 1, 0)]
    {
        check_eq!(guest.call(&[MEM_RING, at, attach, reserved])?[0], INVALID, "MEM_RING of {at:#x}, {attach}");
    }
    attach(&mut guest, RING)?;
    check_eq!(guest.call(&[MEM_RING, BUFFERS + PAGE, 1, 0])?[0], INVALID, "MEM_RING of a second page");
    check_eq!(guest.call(&[MEM_SHARE, RING, 1, 0])?[0], INVALID, "MEM_SHARE of the ring");
    check_eq!(guest.call(&[MEM_RELINQUISH, RING, 1, 0])?[0], INVALID, "MEM_RELINQUISH of the ring");
    refused("FORCE_RECLAIM", [ring, 1], Status::Denied)?;
    refused("DONATE", [ring, 1], Status::Denied)?;
    refused("CLAIM", [vm.handle, RING, 1], Status::Denied)?;
    let mut done = 0;
    for bad in [
        word(BUFFERS + PAGE, 1, false) | 1 << 10,
        word(BUFFERS + PAGE, 1, false) | 1 << 11,
        u64::MAX,
        word(BUFFERS, 2, false),
        word(BUFFERS + 3 * PAGE, 2, false),
        word(BUFFERS + PAGE, 1, true),
        word(RING, 1, false),
        word(1 << 47, 1, false),
    ] {
        posts(&mut guest, bad, 0, 1)?;
        done += 1;
        check!(guest.conversions.is_empty(), "the host is told of {:x?}", guest.conversions);
        results(&mut guest, done, 1, INVALID)?;
    }
    host_is_denied(address + PAGE, 3)?;
    for posted in [done + 65, 0, u64::MAX, 1 << 63] {
        guest.store(RING, posted)?;
        check_eq!(guest.call(&[MEM_RING_SYNC])?[0], 0, "MEM_RING_SYNC");
        check_eq!(guest.load(RING + RING_DONE as u64)?, done, "conversions that are complete");
    }
    host_is_denied(ring, 1)?;
    // It is right again.
    guest.store(RING, done)?;
    posts(&mut guest, word(BUFFERS + PAGE, 1, false), 0, 1)?;
    results(&mut guest, done + 1, 1, 0)?;
    // The ring comes back with the rest, scrubbed.
    vm.finish()
}

/// A vCPU that is turned on anew has no ring.
pub(crate) fn ring_of_a_vcpu_that_is_off() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 2)?;
    vm.add(RING, 2)?;
    let mut first = vm.guest(0);
    attach(&mut first, RING + PAGE)?;
    for _ in 0..3 {
        first.turn_on(1)?;
        let mut second = vm.guest(1);
        // Each has its own.
        check_eq!(second.call(&[MEM_RING, RING + PAGE, 1, 0])?[0], INVALID, "MEM_RING of another one's");
        check_eq!(second.call(&[MEM_RING, RING + PAGE, 0, 0])?[0], INVALID, "MEM_RING of another one's");
        attach(&mut second, RING)?;
        second.begin_call(&[CPU_OFF])?;
        second.exit(ExitReason::CpuOff)?;
        check_eq!(first.call(&[MEM_SHARE, RING, 1, 0])?[0], INVALID, "MEM_SHARE of a ring");
    }
    first.turn_on(1)?;
    let mut second = vm.guest(1);
    check_eq!(second.call(&[MEM_RING_SYNC])?[0], 0, "MEM_RING_SYNC without a ring");
    first.share(RING, 1)?;
    vm.finish()
}

/// The host claims and releases on another CPU while a guest's ring shares and takes back.
pub(crate) fn rings_race() -> Outcome {
    const COUNT: u64 = 4;
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    vm.add(RING, 1)?;
    let address = vm.add(BUFFERS, COUNT)?;
    let mut guest = vm.guest(0);
    guest.fill(BUFFERS, COUNT, address, 8)?;
    attach(&mut guest, RING)?;
    let stop = AtomicBool::new(false);
    let failure = Mutex::new(Ok(()));
    let claim = |_: usize| {
        let mut round = 0_u64;
        while !stop.load(Ordering::Acquire) {
            let at = BUFFERS + round % COUNT * PAGE;
            round += 1;
            // The ring may take it away again, and does only if the host consents.
            if call("CLAIM", [vm.handle, at, 1]).0 == Status::Success {
                let page = address + (at - BUFFERS);
                if let Ok(found) = probe::read(page)
                    && found != memory::pattern(page, 0, 8)
                {
                    *failure.lock() = Err(Failure::new(format_args!("{page:#x} holds {found:#x}")));
                }
                call("RELEASE", [vm.handle, at, 1]);
            }
        }
    };
    let mut done = 0;
    let mut rounds = for_a_while(100);
    let outcome = cpu::run_on(&[1], &claim, || {
        let outcome = rounds.try_for_each(|round| {
            guest.consent = round;
            posts(&mut guest, word(BUFFERS, 1, false), PAGE, COUNT)?;
            posts(&mut guest, word(BUFFERS, 1, true), PAGE, COUNT)?;
            done += 2 * COUNT;
            check_eq!(guest.load(RING + RING_DONE as u64)?, done, "conversions that are complete");
            Ok(())
        });
        stop.store(true, Ordering::Release);
        outcome
    });
    outcome?;
    failure.into_inner()?;
    guest.consent = u64::MAX;
    posts(&mut guest, word(BUFFERS, 1, true), PAGE, COUNT)?;
    guest.compare(BUFFERS, COUNT, address, 8)?;
    host_is_denied(address, COUNT)?;
    vm.finish()
}
