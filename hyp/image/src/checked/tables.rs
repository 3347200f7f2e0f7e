//! The trace's checker at EL2: what the CPUs do to translation tables keeps to the rules of the architecture.

use core::{
    fmt::Display,
    sync::atomic::{AtomicBool, Ordering},
};

use ravelin_arch::{CpuStart, Hardware};
use ravelin_memory::PhysAddr;
use ravelin_trace::{Checker, Entry, Packed};
use spin::mutex::TicketMutex;

struct Follower {
    checker: Checker,
    next: u64,
}

static FOLLOWER: TicketMutex<Option<Follower>> = TicketMutex::new(None);

/// Whether there is one: for those that come here all the time.
static ON: AtomicBool = AtomicBool::new(false);

/// Begins to follow, with the EL2 stage 1 at `root` in use on the only CPU that runs.
pub(super) fn begin(machine: &Hardware, root: PhysAddr) {
    *FOLLOWER.lock() = Some(Follower { checker: Checker::new(), next: 0 });
    ON.store(true, Ordering::Relaxed);
    ravelin_arch::trace::begin(machine, root, CpuStart::current().map_or(0, CpuStart::index));
}

/// Follows the next record, and stops the machine if it breaks a rule.
pub(crate) fn follow(record: Packed) {
    if !ON.load(Ordering::Relaxed) {
        return;
    }
    let mut guard = FOLLOWER.lock();
    let Some(Follower { checker, next }) = guard.as_mut() else { return };
    match record.records() {
        Ok(records) => {
            for one in records {
                let followed = checker.record(&Entry { id: *next, tid: record.tid(), record: one });
                *next += 1;
                if let Err(violation) = followed {
                    stop(&violation);
                }
            }
        }
        Err(unknown) => stop(&unknown),
    }
}

fn stop(why: &dyn Display) -> ! {
    // What the report of it does is not followed.
    ON.store(false, Ordering::Relaxed);
    panic!("translation tables: {why}");
}
