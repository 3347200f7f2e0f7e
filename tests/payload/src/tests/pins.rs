//! Pins: counted for each page, bounded, and in the way of unsharing.

use ravelin_abi::{PageStateCode, Status};

use crate::{
    rt::{
        memory::{BLOCK, PAGE},
        platform::platform,
    },
    tests::{OWNED, Op, Outcome, SHARED, Snapshot, arena, check, check_eq, check_state, on_all_cpus, state},
};

fn pinned(count: u64) -> (PageStateCode, u64) {
    (PageStateCode::SharedOwned, count)
}

pub(crate) fn add_up() -> Outcome {
    let page = arena(BLOCK) + PAGE;
    Op::Share.succeeds(page, 1)?;
    for count in 1..=3 {
        Op::Pin.succeeds(page, 1)?;
        check_eq!(state(page)?, pinned(count), "after {count} pins");
    }
    for count in (0..3).rev() {
        Op::Unshare.answers(page, 1, Status::Busy, page)?;
        Op::Unpin.succeeds(page, 1)?;
        check_eq!(state(page)?, pinned(count), "with {count} pins left");
    }
    Op::Unpin.answers(page, 1, Status::Denied, page)?;
    Op::Unshare.succeeds(page, 1)?;
    check_eq!(state(page)?, OWNED, "unshared");
    Ok(())
}

/// Ranges that overlap: each page counts for itself.
pub(crate) fn overlap() -> Outcome {
    let address = arena(4 * BLOCK) + BLOCK - 4 * PAGE;
    Op::Share.succeeds(address, 10)?;
    Op::Pin.succeeds(address, 6)?;
    Op::Pin.succeeds(address + 3 * PAGE, 7)?;
    check_state(address, 3, pinned(1))?;
    check_state(address + 3 * PAGE, 3, pinned(2))?;
    check_state(address + 6 * PAGE, 4, pinned(1))?;
    Op::Unpin.succeeds(address, 10)?;
    check_state(address, 3, SHARED)?;
    check_state(address + 3 * PAGE, 3, pinned(1))?;
    let snapshot = Snapshot::take(address, 10)?;
    Op::Unpin.answers(address, 10, Status::Denied, address)?;
    Op::Unpin.answers(address + 3 * PAGE, 7, Status::Denied, address + 6 * PAGE)?;
    Op::Unshare.answers(address, 10, Status::Busy, address + 3 * PAGE)?;
    snapshot.compare(format_args!("refused calls"))?;
    Op::Unpin.succeeds(address + 3 * PAGE, 3)?;
    Op::Unshare.succeeds(address, 10)
}

/// The count of one page ends somewhere, with LIMIT, and then nothing of the range is pinned.
pub(crate) fn limit() -> Outcome {
    let address = arena(BLOCK);
    let full = address + 2 * PAGE;
    Op::Share.succeeds(address, 4)?;
    let mut count = 0;
    while Op::Pin.call(full, 1) == (Status::Success, 0) {
        count += 1;
        check!(count < 1 << 20, "no limit");
    }
    check!(count >= 255, "only {count} pins");
    check_eq!(state(full)?, pinned(count), "at the limit");
    let snapshot = Snapshot::take(address, 4)?;
    Op::Pin.answers(full, 1, Status::Limit, full)?;
    Op::Pin.answers(address, 4, Status::Limit, full)?;
    snapshot.compare(format_args!("PIN at the limit"))?;
    for _ in 0..count {
        Op::Unpin.succeeds(full, 1)?;
    }
    check_eq!(state(full)?, SHARED, "after all pins are gone");
    Op::Unpin.answers(full, 1, Status::Denied, full)?;
    Op::Unshare.succeeds(address, 4)
}

/// All CPUs pin and unpin the same pages: no count is lost.
pub(crate) fn from_all_cpus() -> Outcome {
    let address = arena(4 * BLOCK) + BLOCK - 2 * PAGE;
    Op::Share.succeeds(address, 4)?;
    Op::Pin.succeeds(address, 4)?;
    on_all_cpus(|_| {
        for _ in 0..100 * platform().effort() {
            Op::Pin.succeeds(address, 4)?;
            Op::Unshare.answers(address, 4, Status::Busy, address)?;
            Op::Unpin.succeeds(address, 4)?;
        }
        Ok(())
    })?;
    check_state(address, 4, pinned(1))?;
    Op::Unpin.succeeds(address, 4)?;
    Op::Unshare.succeeds(address, 4)
}
