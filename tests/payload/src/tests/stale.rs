//! Stale translations: after a page has changed hands no CPU may reach it through what it remembers.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use spin::Mutex;

use crate::{
    rt::{
        cpu::{self, MAX_CPUS},
        memory::{self, BLOCK, GIB, PAGE},
        probe::{self, Access, probe},
    },
    tests::{
        Failure, Op, Outcome,
        abort::{ALIGNMENT, is_denied},
        arena, check, check_eq, other_cpus, statistics, take_back,
    },
};

/// Accesses that each CPU makes before and after the donation.
const ROUNDS: u64 = 20;

/// What the CPU that donates and those that use the page tell each other.
struct Watch {
    /// The donation has returned.
    gone: AtomicBool,
    stop: AtomicBool,
    /// Accesses of each CPU that worked: enough of them, and its translations are warm.
    warm: [AtomicU64; MAX_CPUS],
    /// Accesses of each CPU that began after the donation had returned.
    after: [AtomicU64; MAX_CPUS],
    failure: Mutex<Outcome>,
}

impl Watch {
    const fn new() -> Self {
        Self {
            gone: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            warm: [const { AtomicU64::new(0) }; MAX_CPUS],
            after: [const { AtomicU64::new(0) }; MAX_CPUS],
            failure: Mutex::new(Ok(())),
        }
    }

    /// Touches the page until told to stop: until the donation has returned it may work, afterwards it may not.
    fn spin(&self, cpu: usize, access: Access, page: u64) {
        while !self.stop.load(Ordering::Acquire) {
            let gone = self.gone.load(Ordering::Acquire);
            let outcome = match probe(access, page) {
                Ok(_) if gone => Err(Failure::new(format_args!(
                    "CPU {cpu}: {access:?} of {page:#x} works after it has changed hands"
                ))),
                Err(fault) if fault.status() != ALIGNMENT || fault.far != page => {
                    Err(Failure::new(format_args!("CPU {cpu}: {access:?} of {page:#x}: {fault:x?}")))
                }
                Ok(_) => {
                    self.warm[cpu].fetch_add(1, Ordering::Release);
                    Ok(())
                }
                Err(_) => Ok(()),
            };
            if outcome.is_err() {
                *self.failure.lock() = outcome;
                return;
            }
            self.after[cpu].fetch_add(u64::from(gone), Ordering::Release);
        }
    }

    /// Waits until each of the CPUs has made its accesses, or one of them failed.
    fn wait_for(&self, cpus: &[usize], accesses: &[AtomicU64; MAX_CPUS]) {
        let waiting = |&cpu: &usize| accesses[cpu].load(Ordering::Acquire) < ROUNDS;
        while cpus.iter().any(waiting) && self.failure.lock().is_ok() {
            cpu::wait();
        }
    }
}

/// Donates `pages` from `address` on while the other CPUs touch `page`, which is one of them.
fn donate_under_watch(access: Access, page: u64, address: u64, pages: u64) -> Outcome {
    lose_under_watch(access, page, || Op::Donate.succeeds(address, pages))?;
    take_back(address, pages)
}

/// Lets the other CPUs touch `page` while `transition` takes it from the host.
pub(crate) fn lose_under_watch(access: Access, page: u64, transition: impl FnOnce() -> Outcome) -> Outcome {
    let others = other_cpus();
    let watch = Watch::new();
    let result = cpu::run_on(&others, &|cpu| watch.spin(cpu, access, page), || {
        watch.wait_for(&others, &watch.warm);
        let result = transition();
        watch.gone.store(true, Ordering::Release);
        if result.is_ok() {
            watch.wait_for(&others, &watch.after);
        }
        watch.stop.store(true, Ordering::Release);
        result
    });
    result?;
    watch.failure.into_inner()?;
    is_denied(Access::Read, page).map(drop)
}

pub(crate) fn other_cpu() -> Outcome {
    let base = arena(2 * BLOCK);
    for access in [Access::Read, Access::Write(7), Access::El0Read, Access::El0Write(7)] {
        for page in [base, base + PAGE, base + 300 * PAGE, base + 511 * PAGE, base + BLOCK] {
            donate_under_watch(access, page, page, 1)?;
        }
    }
    Ok(())
}

pub(crate) fn range() -> Outcome {
    let base = arena(4 * BLOCK);
    for (address, pages, page) in [
        (base + BLOCK - 4 * PAGE, 8, base + BLOCK - 4 * PAGE),
        (base + BLOCK - 4 * PAGE, 8, base + BLOCK + 3 * PAGE),
        (base + BLOCK, 512, base + BLOCK + 100 * PAGE),
        (base + BLOCK - PAGE, 514, base + BLOCK + 511 * PAGE),
        (base, 1024, base + BLOCK + 5 * PAGE),
    ] {
        donate_under_watch(Access::Read, page, address, pages)?;
    }
    Ok(())
}

pub(crate) fn in_large_block() -> Outcome {
    let base = arena(GIB);
    for page in [base + 5 * PAGE, base + GIB / 2, base + GIB - PAGE] {
        memory::store(base + GIB / 4, 1); // as large a block as there may be
        donate_under_watch(Access::Read, page, page, 1)?;
    }
    donate_under_watch(Access::Read, base + GIB / 2 + 3 * PAGE, base + GIB / 2, 512)
}

/// The CPU that makes the call remembers, too.
pub(crate) fn same_cpu() -> Outcome {
    let base = arena(2 * BLOCK);
    for page in [base, base + 77 * PAGE, base + BLOCK - PAGE] {
        for access in probe::data_accesses(1) {
            for _ in 0..10 {
                check!(probe(access, page).is_ok(), "{access:?} of {page:#x} before the donation");
            }
            Op::Donate.succeeds(page, 1)?;
            is_denied(access, page)?;
            Op::TakeBack.succeeds(page, 1)?;
            check_eq!(probe::read(page), Ok(0), "{page:#x} after it was taken back");
        }
    }
    Ok(())
}

/// A page of a block changes hands while other CPUs read all the rest of the block: it stays there, with its contents, and
/// without a fault.
pub(crate) fn neighbours_stay() -> Outcome {
    let base = arena(2 * BLOCK);
    let word = |page: u64| memory::pattern(page, 0, 50);
    for page in (0..512).map(|index| base + index * PAGE) {
        memory::store(page, word(page));
    }
    let others = other_cpus();
    let gone = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let sweeps = AtomicU64::new(0);
    let failure = Mutex::new(Ok(()));
    let sweep = |_: usize| {
        while !stop.load(Ordering::Acquire) {
            let mut state = gone.load(Ordering::Acquire);
            for page in (0..512).map(|index| base + index * PAGE) {
                let value = probe::read(page);
                // The page that is on its way is not a neighbour.
                if state == page || gone.load(Ordering::Acquire) == page {
                    state = page;
                    continue;
                }
                if value != Ok(word(page)) {
                    *failure.lock() = Err(Failure::new(format_args!("the neighbour {page:#x} reads as {value:x?}")));
                    return;
                }
            }
            sweeps.fetch_add(1, Ordering::Release);
        }
    };
    let change_hands = || {
        for index in [0, 1, 37, 255, 256, 510, 511] {
            let page = base + index * PAGE;
            gone.store(page, Ordering::Release);
            let now = sweeps.load(Ordering::Acquire);
            while sweeps.load(Ordering::Acquire) < now + 2 && failure.lock().is_ok() {
                core::hint::spin_loop();
            }
            Op::Donate.succeeds(page, 1)?;
            for _ in 0..200 {
                core::hint::spin_loop();
            }
            Op::TakeBack.succeeds(page, 1)?;
            memory::store(page, word(page));
        }
        Ok(())
    };
    let result = cpu::run_on(&others, &sweep, || {
        let result = change_hands();
        stop.store(true, Ordering::Release);
        result
    });
    result?;
    failure.into_inner()
}

/// Splitting a block keeps the other 511 pages mapped: reading them takes no fault.
pub(crate) fn split_keeps_mappings() -> Outcome {
    let base = arena(4 * BLOCK) + BLOCK;
    for page in (0..512).map(|index| base + index * PAGE) {
        memory::store(page, memory::pattern(page, 0, 60));
    }
    for index in [0, 100, 511] {
        let gone = base + index * PAGE;
        let before = statistics()?.faults_resolved;
        Op::Donate.succeeds(gone, 1)?;
        for page in (0..512).map(|index| base + index * PAGE).filter(|&page| page != gone) {
            check_eq!(memory::load(page), memory::pattern(page, 0, 60), "the neighbour {page:#x}");
        }
        check_eq!(statistics()?.faults_resolved, before, "faults resolved after {gone:#x} was split off");
        Op::TakeBack.succeeds(gone, 1)?;
        memory::store(gone, memory::pattern(gone, 0, 60));
    }
    Ok(())
}
