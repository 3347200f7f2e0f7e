//! Conversions on all CPUs at once, each of a page in a block of its own: the host's, and those of guests, of one VM with a vCPU
//! on each CPU and of a VM on each. The blocks are next to each other and, if there is so much RAM, also in a GiB of RAM for each.

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use arrayvec::ArrayVec;
use ravelin_abi::{ExitReason, RunPage, VmKind};
use spin::Mutex;

use super::{hvc, measured};
use crate::{
    rt::{
        console::println,
        cpu::{MAX_CPUS, instruction},
        memory::{self, BLOCK},
        platform::{Region, platform},
        vm::{Guest, MEMORY, PROTECTED, Pages, Vm, code::snippets},
    },
    tests::{Failure, OWNED, Op, Outcome, check, check_eq, number, on_all_cpus, state},
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A block for each CPU.
type Blocks = ArrayVec<u64, MAX_CPUS>;

/// How often the boot CPU converts its page there and back before this is measured.
const WARM_UP: u64 = 2;

/// How often it does so while this is measured.
const ROUNDS: u64 = 16;

/// How often the others do so, which shall not come to an end before.
const OTHERS_ROUNDS: u64 = 2 * (WARM_UP + ROUNDS);

snippets! {
    /// Converts pages there and back by HVC, x6 times: x0 to x3 are the arguments of the call there, x4 is x0 and x5 is x3 of
    /// the call back. Returns what the last call does.
    there_and_back_by_hvc:
        "mov x8, x0", "mov x9, x1", "mov x10, x2", "mov x11, x3", "mov x12, x4", "mov x13, x5", "mov x14, x6",
        "5: mov x0, x8", "mov x1, x9", "mov x2, x10", "mov x3, x11", "mov x4, xzr",
        "hvc #0",
        "cbnz x0, 6f",
        "mov x0, x12", "mov x1, x9", "mov x2, x10", "mov x3, x13", "mov x4, xzr",
        "hvc #0",
        "cbnz x0, 6f",
        "subs x14, x14, #1",
        "b.ne 5b",
        "6:";

    /// The same by SMC.
    there_and_back_by_smc:
        "mov x8, x0", "mov x9, x1", "mov x10, x2", "mov x11, x3", "mov x12, x4", "mov x13, x5", "mov x14, x6",
        "5: mov x0, x8", "mov x1, x9", "mov x2, x10", "mov x3, x11", "mov x4, xzr",
        "smc #0",
        "cbnz x0, 6f",
        "mov x0, x12", "mov x1, x9", "mov x2, x10", "mov x3, x13", "mov x4, xzr",
        "smc #0",
        "cbnz x0, 6f",
        "subs x14, x14, #1",
        "b.ne 5b",
        "6:";
}

/// Measures conversions on all CPUs.
pub(crate) fn contention() -> Outcome {
    println!();
    let pages = Pages::new(32 * MIB);
    let cpus = platform().cpus.len() as u64;
    let mark = pages.mark();
    let together: Blocks = (0..cpus).map(|cpu| mark + cpu * BLOCK).collect();
    for (suffix, blocks) in [(".together", Some(together)), (".apart", apart(mark))] {
        let Some(blocks) = blocks else { continue };
        for (name, there, back) in [("host.share", Op::Share, Op::Unshare), ("host.donate", Op::Donate, Op::TakeBack)] {
            let numbers = [there.number(), back.number()];
            contend((name, suffix), |cpu| {
                for number in numbers {
                    let [x0, x1, ..] = hvc([number, blocks[cpu], 1, 0]);
                    check!(x0 == 0, "call {number:#x}: {} at {x1:#x}", x0 as i64);
                }
                Ok(())
            })?;
        }
        for kind in PROTECTED {
            for several in [false, true] {
                // Behind the blocks that are next to each other.
                pages.reset(mark + cpus * BLOCK);
                guests(&pages, &blocks, kind, several, suffix)?;
            }
        }
        for &block in &blocks {
            check_eq!(state(block)?, OWNED, "state of {block:#x} at the end");
        }
    }
    pages.are_owned()
}

/// Finds a free block for each CPU, each in a GiB of its own, if there are so many. `arena` is the start of that of the test.
fn apart(arena: u64) -> Option<Blocks> {
    let platform = platform();
    let arena = Region { start: arena, end: arena + 32 * MIB };
    let is_free = |block: &u64| {
        let block = Region { start: *block, end: block + BLOCK };
        !platform.taken.iter().chain([&arena]).any(|taken| taken.overlaps(block))
    };
    let gibs = platform.ram.iter().flat_map(|ram| (ram.start.div_ceil(GIB)..ram.end / GIB).map(|gib| gib * GIB));
    let blocks: Blocks = gibs.map(|gib| gib + GIB / 2).filter(is_free).take(platform.cpus.len()).collect();
    (blocks.len() == platform.cpus.len()).then_some(blocks)
}

/// Measures guests: a vCPU on each CPU, of one VM or of several.
fn guests(pages: &Pages, blocks: &Blocks, kind: VmKind, several: bool, suffix: &str) -> Outcome {
    let cpus = platform().cpus.len() as u64;
    let run = number("VCPU_RUN");
    let mut vms = ArrayVec::<Vm<'_>, MAX_CPUS>::new();
    for _ in 0..if several { cpus } else { 1 } {
        let vm = Vm::boot(pages, kind, if several { 1 } else { cpus })?;
        vms.push(vm);
    }
    if !several {
        let mut first = vms[0].guest(0);
        (1..cpus).try_for_each(|index| first.turn_on(index))?;
    }
    let mut converters = ArrayVec::<Mutex<Guest<'_>>, MAX_CPUS>::new();
    for cpu in 0..cpus {
        let (vm, index) = if several { (&vms[cpu as usize], 0) } else { (&vms[0], cpu) };
        let at = MEMORY + cpu * BLOCK;
        vm.map(at, blocks[cpu as usize], 1)?;
        let mut guest = vm.guest(index);
        let code = if kind == VmKind::Realm { there_and_back_by_smc() } else { there_and_back_by_hvc() };
        let ([there, at, end, how, _], [back, .., how_back, _]) =
            (guest.conversion(at, 1, true), guest.conversion(at, 1, false));
        let rounds = if cpu == 0 { WARM_UP + ROUNDS } else { OTHERS_ROUNDS };
        // One more, with which it begins.
        guest.begin_code(code, &[there, at, end, how, back, how_back, rounds + 1])?;
        while guest.told.is_empty() {
            let stop = guest.step()?;
            check!(stop.is_none(), "the guest stops: {stop:x?}");
        }
        converters.push(Mutex::new(guest));
    }
    let name = match (kind, several) {
        (VmKind::Realm, false) => "realm.one-vm",
        (VmKind::Realm, true) => "realm.vms",
        (_, false) => "pkvm.one-vm",
        (_, true) => "pkvm.vms",
    };
    contend((name, suffix), |cpu| shares(&converters[cpu].lock(), run))?;
    for guest in converters {
        let [status, ..] = guest.into_inner().finish()?.x;
        check!(status == 0, "a conversion: {status:#x}");
    }
    vms.iter().try_for_each(Vm::end)
}

/// Lets a guest go on until it has shared its page, of which its host is told. `run` is the number of VCPU_RUN.
fn shares(guest: &Guest<'_>, run: u64) -> Outcome {
    let [x0, ..] = hvc([run, guest.vm.handle, guest.index, 0]);
    let reason = memory::load(guest.vm.run_page(guest.index) + RunPage::EXIT as u64);
    check!((x0, reason) == (0, ExitReason::Shared.code()), "VCPU_RUN: {x0:#x}, exit for reason {reason}");
    Ok(())
}

/// Lets each CPU do rounds of two conversions, and measures while the boot CPU does its: `bench NAME.WHERE CPUS CONVERSIONS`, where
/// the CPUs are those that have not come to an end before. A second mark 0 comes when all of them are at work.
fn contend((name, suffix): (&str, &str), round: impl Fn(usize) -> Outcome + Sync) -> Outcome {
    let (ready, begun) = (AtomicUsize::new(0), AtomicBool::new(false));
    let rounds = [const { AtomicU64::new(0) }; MAX_CPUS];
    let cpus = platform().cpus.len();
    let done = || rounds.each_ref().map(|rounds| rounds.load(Ordering::Relaxed));
    on_all_cpus(|cpu| {
        let work = |count: u64| {
            for _ in 0..count {
                round(cpu)?;
                rounds[cpu].fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, Failure>(())
        };
        ready.fetch_add(1, Ordering::AcqRel);
        if cpu != 0 {
            while !begun.load(Ordering::Acquire) {
                core::hint::spin_loop();
            }
            return work(OTHERS_ROUNDS);
        }
        while ready.load(Ordering::Acquire) < cpus {
            core::hint::spin_loop();
        }
        instruction!("hint #0x40");
        begun.store(true, Ordering::Release);
        work(WARM_UP)?;
        let before: u64 = done().iter().sum();
        let after = measured(|| work(ROUNDS).map(|()| done()))?;
        let busy = after[..cpus].iter().filter(|&&rounds| rounds < OTHERS_ROUNDS).count();
        println!("bench {name}{suffix} {busy} {}", 2 * (after.iter().sum::<u64>() - before));
        Ok(())
    })
}
