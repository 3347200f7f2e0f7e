//! Ranges of all sizes: one call, all or nothing, and a cost that does not grow with what it need not.

use ravelin_abi::{MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES, PageStateCode, Status};

use crate::{
    rt::{
        memory::{self, BLOCK, GIB, PAGE},
        probe::Access,
    },
    tests::{
        NO_PAGE, OWNED, Op, Outcome, SHARED, abort::is_denied, arena, check, check_eq, check_state, on_each_cpu,
        page_counts, state, statistics, take_back,
    },
};

/// Checks the pages just outside a range.
fn around_is_owned(address: u64, pages: u64) -> Outcome {
    check_eq!(state(address - PAGE)?, OWNED, "the page before");
    check_eq!(state(address + pages * PAGE)?, OWNED, "the page behind");
    Ok(())
}

/// The life of a range: shared, pinned and back; donated and back.
fn life(address: u64, pages: u64) -> Outcome {
    let before = page_counts()?;
    let moved = |change: [i64; 4]| {
        let mut expected = before;
        for (count, change) in expected.iter_mut().zip(change) {
            *count = count.wrapping_add_signed(change * pages as i64);
        }
        check_eq!(page_counts()?, expected, "pages by state, {pages} pages at {address:#x}");
        around_is_owned(address, pages)
    };
    Op::Share.succeeds(address, pages)?;
    check_state(address, pages, SHARED)?;
    moved([-1, 1, 0, 0])?;
    Op::Pin.succeeds(address, pages)?;
    check_state(address, pages, (PageStateCode::SharedOwned, 1))?;
    moved([-1, 1, 0, 0])?;
    Op::Unshare.answers(address, pages, Status::Busy, address)?;
    Op::Unpin.succeeds(address, pages)?;
    Op::Unshare.succeeds(address, pages)?;
    check_state(address, pages, OWNED)?;
    moved([0; 4])?;

    for offset in [0, pages / 2, pages - 1] {
        memory::store(address + offset * PAGE, !0);
    }
    Op::Donate.succeeds(address, pages)?;
    check_state(address, pages, NO_PAGE)?;
    moved([-1, 0, 0, 1])?;
    for offset in [0, pages / 2, pages - 1] {
        is_denied(Access::Read, address + offset * PAGE)?;
    }
    take_back(address, pages)?;
    check_state(address, pages, OWNED)?;
    moved([0; 4])?;
    for offset in [0, pages / 2, pages - 1] {
        check_eq!(memory::load(address + offset * PAGE), 0, "page {offset} after take-back");
    }
    Ok(())
}

pub(crate) fn sizes() -> Outcome {
    let base = arena(8 * BLOCK);
    on_each_cpu(|_| {
        for pages in [1, 2, 8, 511, 512, 513] {
            for address in [base + BLOCK, base + BLOCK + PAGE, base + 2 * BLOCK - PAGE, base + 2 * BLOCK - 8 * PAGE] {
                life(address, pages)?;
            }
        }
        Ok(())
    })
}

pub(crate) fn many_blocks() -> Outcome {
    let base = arena(64 << 20);
    for (address, pages) in [(base + BLOCK, 2048), (base + BLOCK - PAGE, 2050), (base + BLOCK + 5 * PAGE, 5000)] {
        life(address, pages)?;
    }
    Ok(())
}

/// A gigabyte in one call each, aligned.
pub(crate) fn gigabyte() -> Outcome {
    let base = arena(GIB);
    let pages = GIB / PAGE;
    const { assert!(GIB / PAGE == MAX_RANGE_PAGES) };
    let spots = [0, 1, 511, 512, pages / 2, pages - 1];
    let all = |expected| spots.into_iter().try_for_each(|index| check_state(base + index * PAGE, 1, expected));
    spots.into_iter().for_each(|index| memory::store(base + index * PAGE, index + 1));
    Op::Share.succeeds(base, pages)?;
    all(SHARED)?;
    spots.into_iter().try_for_each(|index| {
        check_eq!(memory::load(base + index * PAGE), index + 1, "page {index}");
        Ok(())
    })?;
    Op::Unshare.succeeds(base, pages)?;
    all(OWNED)?;

    // One page in the last block spoils it.
    let spoiler = base + GIB - 3 * PAGE;
    Op::Share.succeeds(spoiler, 1)?;
    Op::Donate.answers(base, pages, Status::Denied, spoiler)?;
    Op::Share.answers(base, pages, Status::Denied, spoiler)?;
    Op::Unshare.succeeds(spoiler, 1)?;
    all(OWNED)?;

    Op::Donate.succeeds(base, pages)?;
    all(NO_PAGE)?;
    spots.into_iter().try_for_each(|index| is_denied(Access::Read, base + index * PAGE).map(|_| ()))?;
    take_back(base, pages)?;
    all(OWNED)?;
    spots.into_iter().try_for_each(|index| {
        check_eq!(memory::load(base + index * PAGE), 0, "page {index}");
        Ok(())
    })
}

/// Sharing costs no invalidation, a donation one for the range and one for each block that must be split for it, taking
/// back at most one, which lets blocks become whole again.
pub(crate) fn invalidations() -> Outcome {
    let base = arena(16 * BLOCK);
    // Whether a block is mapped as such is for the hypervisor to know; touching all of it gives it the chance.
    for block in 0..16 {
        memory::store(base + block * BLOCK, 1);
    }
    let count = |op: Op, address, pages| {
        let before = statistics()?.stage2_invalidations;
        op.succeeds(address, pages)?;
        Ok(statistics()?.stage2_invalidations - before)
    };
    for (address, pages, splits) in [
        (base + 5 * PAGE, 1, 2),
        (base + 2 * BLOCK, 512, 1),
        (base + 4 * BLOCK, 2048, 1),
        (base + 8 * BLOCK - 3 * PAGE, 8, 2),
        (base + 9 * BLOCK - PAGE, 1026, 2),
    ] {
        check_eq!(count(Op::Share, address, pages)?, 0, "invalidations for SHARE of {pages} pages");
        check_eq!(count(Op::Pin, address, pages)?, 0, "invalidations for PIN of {pages} pages");
        check_eq!(count(Op::Unpin, address, pages)?, 0, "invalidations for UNPIN of {pages} pages");
        check_eq!(count(Op::Unshare, address, pages)?, 0, "invalidations for UNSHARE of {pages} pages");
        let used = count(Op::Donate, address, pages)?;
        check!((1..=1 + splits).contains(&used), "{used} invalidations for DONATE of {pages} pages at {address:#x}");
        let before = statistics()?.stage2_invalidations;
        take_back(address, pages)?;
        let used = statistics()?.stage2_invalidations - before;
        let calls = pages.div_ceil(MAX_TAKE_BACK_PAGES);
        check!(used <= calls, "{used} invalidations for TAKE_BACK of {pages} pages");
    }
    Ok(())
}
