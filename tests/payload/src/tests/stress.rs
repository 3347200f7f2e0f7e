//! All CPUs at once.

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use ravelin_abi::{Statistics, Status};
use ravelin_guest::playground::Random;
use spin::Mutex;

use crate::{
    rt::{
        call, cpu,
        memory::{self, BLOCK, PAGE},
        platform::platform,
        probe::{Access, probe},
    },
    tests::{
        Failure, OWNED, Op, Outcome,
        abort::{self, ALIGNMENT},
        arena, carve_out, check, check_eq, number, on_all_cpus, other_cpus, state,
    },
};

/// Runs `work` on other CPUs again and again, as long as `meanwhile` runs here, which begins when all of them have.
pub(crate) fn during(
    cpus: &[usize],
    work: impl Fn(usize) -> Outcome + Sync,
    meanwhile: impl FnOnce() -> Outcome,
) -> Outcome {
    let begun = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let outcome = Mutex::new(Ok(()));
    let job = |cpu: usize| {
        begun.fetch_add(1, Ordering::AcqRel);
        let mut result = work(cpu);
        while result.is_ok() && !stop.load(Ordering::Acquire) {
            result = work(cpu);
        }
        if let Err(failure) = result {
            *outcome.lock() = Err(Failure::new(format_args!("on CPU {cpu}: {failure}")));
        }
    };
    let result = cpu::run_on(cpus, &job, || {
        while begun.load(Ordering::Acquire) < cpus.len() {
            cpu::wait();
        }
        let result = meanwhile();
        stop.store(true, Ordering::Release);
        result
    });
    result.and(outcome.into_inner())
}

/// Of all CPUs that want the same page, one gets it.
pub(crate) fn one_winner() -> Outcome {
    let count = platform().cpus.len() as u64;
    let page = arena(BLOCK) + 9 * PAGE;
    for (there, back) in [(Op::Share, Op::Unshare), (Op::Donate, Op::TakeBack)] {
        for round in 0..30 * platform().effort() {
            for op in [there, back] {
                let (ready, winners) = (AtomicU64::new(0), AtomicU64::new(0));
                on_all_cpus(|_| {
                    ready.fetch_add(1, Ordering::AcqRel);
                    while ready.load(Ordering::Acquire) < count {
                        core::hint::spin_loop();
                    }
                    match op.call(page, 1) {
                        (Status::Success, 0) => {
                            winners.fetch_add(1, Ordering::AcqRel);
                        }
                        (Status::Denied, failed) if failed == page => {}
                        other => return Err(Failure::new(format_args!("{op:?} in round {round}: {other:x?}"))),
                    }
                    Ok(())
                })?;
                check_eq!(winners.load(Ordering::Acquire), 1, "CPUs that succeeded with {op:?} in round {round}");
            }
        }
    }
    Ok(())
}

/// CPUs fault on pages of a block while another one donates and takes back pages of the same block.
pub(crate) fn fault_race() -> Outcome {
    let base = arena(2 * BLOCK);
    let carve_out = carve_out()?;
    let seed = AtomicU64::new(0xABCD_EF01);
    let touch = |_: usize| {
        let mut random = Random::new(seed.fetch_add(1, Ordering::Relaxed));
        for _ in 0..20 {
            let page = base + random.below(1024) * PAGE;
            let access = [Access::Read, Access::Write(1), Access::El0Read][random.below(3) as usize];
            if let Err(fault) = probe(access, page) {
                check_eq!((fault.status(), fault.far), (ALIGNMENT, page), "{access:?} of {page:#x}");
            }
            abort::is_denied(Access::Read, carve_out.start + random.below(carve_out.size() / PAGE) * PAGE)?;
        }
        Ok(())
    };
    during(&other_cpus(), touch, || {
        let mut random = Random::new(0x77);
        for _ in 0..100 * platform().effort() {
            let pages = 1 + random.below(64);
            let address = base + random.below(1024 - pages) * PAGE;
            Op::Donate.succeeds(address, pages)?;
            Op::TakeBack.succeeds(address, pages)?;
        }
        Ok(())
    })
}

/// A CPU goes off and on while others make calls.
pub(crate) fn hotplug() -> Outcome {
    let base = arena(BLOCK);
    let work = |_: usize| {
        Op::Donate.succeeds(base, 16)?;
        Op::TakeBack.succeeds(base, 16)
    };
    during(&[1], work, || {
        for _ in 0..20 * platform().effort() {
            cpu::turn_off(2);
            cpu::turn_on(2).map_err(|status| Failure::new(format_args!("CPU_ON: {status}")))?;
        }
        Ok(())
    })?;
    // The CPU that came back is under the same rules.
    Op::Donate.succeeds(base, 1)?;
    let outcome = Mutex::new(Ok(()));
    cpu::run_on(&[2], &|_| *outcome.lock() = abort::is_denied(Access::Read, base).map(|_| ()), || ());
    outcome.into_inner()?;
    Op::TakeBack.succeeds(base, 1)
}

/// The hypervisor writes statistics to a page that another CPU takes away from it: it writes while the page is lent, or not at
/// all.
pub(crate) fn statistics_race() -> Outcome {
    let page = arena(BLOCK) + 3 * PAGE;
    let write = |_: usize| {
        let [x0, x1, ..] = call::hypervisor([number("STATISTICS"), page, 0, 0]);
        let written = (x0, x1) == (0, Statistics::SIZE as u64);
        check!(written || (x0, x1) == (Status::Denied.register(), page), "STATISTICS: {x0:#x}, {x1:#x}");
        Ok(())
    };
    during(&[1], write, || {
        for _ in 0..100 * platform().effort() {
            Op::Share.succeeds(page, 1)?;
            for _ in 0..20 {
                core::hint::spin_loop();
            }
            while Op::Unshare.call(page, 1) == (Status::Busy, page) {}
            check_eq!(state(page)?, OWNED, "the page after UNSHARE");
            memory::fill(page, 80);
            check_eq!(memory::find_difference(page, 80), None, "the page after UNSHARE");
            Op::Donate.succeeds(page, 1)?;
            Op::TakeBack.succeeds(page, 1)?;
            check_eq!(memory::find_nonzero(page), None, "the page after TAKE_BACK");
        }
        Ok(())
    })
}
