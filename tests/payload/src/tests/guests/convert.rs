//! Conversions in place: shared, claimed, released, taken back, given up, taken by force, left behind. Through both doors.

use ravelin_abi::{Answer, ExitReason, PageStateCode, Status, VmKind};

use crate::{
    rt::{
        memory::{self, BLOCK, PAGE},
        probe::Access,
        vm::{Conversion, Guest, MEMORY, PROTECTED, Pages, Vm, call, code, refused, succeed},
    },
    tests::{
        Failure, NO_PAGE, OWNED, Outcome, State, abort::is_denied, check, check_eq, check_state, page_counts, state,
        statistics,
    },
};

const MIB: u64 = 1 << 20;

/// What PAGE_STATE says of a page that the host has claimed.
pub(crate) const CLAIMED: State = (PageStateCode::SharedBorrowed, 0);

/// Checks that the host finds the pattern in pages.
pub(crate) fn host_finds(address: u64, count: u64, seed: u64) -> Outcome {
    for page in (0..count).map(|index| address + index * PAGE) {
        if let Some((at, value)) = memory::find_difference(page, seed) {
            return Err(Failure::new(format_args!("the host finds {value:#x} at {at:#x}, which is not the pattern")));
        }
    }
    Ok(())
}

/// Checks that the host finds zeroes in pages.
pub(crate) fn host_finds_zeroes(address: u64, count: u64) -> Outcome {
    for page in (0..count).map(|index| address + index * PAGE) {
        if let Some((at, value)) = memory::find_nonzero(page) {
            return Err(Failure::new(format_args!("the host finds {value:#x} at {at:#x}, which is not zero")));
        }
    }
    Ok(())
}

/// Fills pages as the guest's [`Guest::fill`] does.
pub(crate) fn host_fills(address: u64, count: u64, seed: u64) {
    (0..count).for_each(|index| memory::fill(address + index * PAGE, seed));
}

/// Checks that the host cannot read some pages: the first one, one in the middle, the last one.
pub(crate) fn host_is_denied(address: u64, count: u64) -> Outcome {
    for index in [0, count / 2, count - 1] {
        is_denied(Access::Read, address + index * PAGE)?;
        is_denied(Access::Write(1), address + index * PAGE)?;
    }
    check_state(address, count, NO_PAGE)
}

/// The whole way there and back, with contents looked at by both at each step.
fn there_and_back(guest: &mut Guest<'_>, at: u64, address: u64, count: u64) -> Outcome {
    let vm = guest.vm;
    let shared = vm.shared(at);
    guest.fill(at, count, address, 1)?;
    host_is_denied(address, count)?;

    guest.share(at, count)?;
    guest.compare(shared, count, address, 1)?;
    // An offer is not access.
    host_is_denied(address, count)?;

    vm.claim(at, count)?;
    check_state(address, count, CLAIMED)?;
    host_finds(address, count, 1)?;
    host_fills(address, count, 2);
    guest.compare(shared, count, address, 2)?;
    guest.fill(shared, count, address, 3)?;
    host_finds(address, count, 3)?;

    vm.release(at, count)?;
    host_is_denied(address, count)?;
    guest.compare(shared, count, address, 3)?;

    guest.unshare(at, count)?;
    host_is_denied(address, count)?;
    guest.compare(at, count, address, 3)?;
    if shared != at {
        // A realm's page is at one of its two addresses only.
        check!(
            guest.attempt(code::load_pair(), &[shared])?.exception.is_some(),
            "the alias of a private page is there"
        );
    }
    Ok(())
}

/// Single pages, some, many.
pub(crate) fn conversion_in_place() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let count = 64;
        let address = vm.add(MEMORY, count)?;
        let mut guest = vm.guest(0);
        for (first, some) in [(0, 1), (1, 1), (5, 3), (0, 64), (63, 1), (0, 64)] {
            there_and_back(&mut guest, MEMORY + first * PAGE, address + first * PAGE, some)?;
        }
        vm.finish()?;
    }
    Ok(())
}

/// Blocks of 2 MiB, as such and in parts.
pub(crate) fn conversion_of_blocks() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(16 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let address = pages.take_aligned(1024, 512)?;
        vm.map(MEMORY, address, 1024)?;
        let mut guest = vm.guest(0);
        there_and_back(&mut guest, MEMORY, address, 512)?;
        there_and_back(&mut guest, MEMORY, address, 1024)?;
        there_and_back(&mut guest, MEMORY + 100 * PAGE, address + 100 * PAGE, 7)?;
        there_and_back(&mut guest, MEMORY + BLOCK, address + BLOCK, 512)?;
        there_and_back(&mut guest, MEMORY + BLOCK - 2 * PAGE, address + BLOCK - 2 * PAGE, 4)?;
        vm.finish()?;
    }
    Ok(())
}

/// Converts a range, however many calls that takes; returns how many.
pub(crate) fn convert_all(guest: &mut Guest<'_>, at: u64, count: u64, share: bool) -> Result<u64, Failure> {
    let (mut done, mut calls) = (0, 0);
    while done < count {
        match guest.convert(at + done * PAGE, count - done, share)? {
            Conversion::Done(some) if some != 0 && some <= count - done => done += some,
            other => return Err(Failure::new(format_args!("{} pages at {done}: {other:?}", count - done))),
        }
        calls += 1;
    }
    Ok(calls)
}

/// A call does 512 pages that are mapped one by one, and any number that are blocks.
pub(crate) fn bounded_work() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(32 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        // Pages that are not where blocks could be.
        let address = pages.take_aligned(2 * 512 + 1, 512)? + PAGE;
        vm.map(MEMORY, address, 2 * 512)?;
        // Blocks.
        let blocks = pages.take_aligned(4 * 512, 512)?;
        succeed("VM_MAP", [vm.handle, MEMORY + (64 << 20), blocks, 4 * 512])?;
        vm.note(MEMORY + (64 << 20), 4 * 512);
        let mut guest = vm.guest(0);
        for share in [true, false] {
            check_eq!(convert_all(&mut guest, MEMORY, 1024, share)?, 2, "calls for 1024 pages");
            check_eq!(convert_all(&mut guest, MEMORY + (64 << 20), 2048, share)?, 1, "calls for 4 blocks");
        }
        convert_all(&mut guest, MEMORY, 1024, true)?;
        // The host's calls are all or nothing.
        refused("CLAIM", [vm.handle, MEMORY, 513], Status::TooLarge)?;
        vm.claim(MEMORY, 512)?;
        vm.claim(MEMORY + BLOCK, 512)?;
        refused("RELEASE", [vm.handle, MEMORY, 1024], Status::TooLarge)?;
        vm.release(MEMORY, 512)?;
        vm.release(MEMORY + BLOCK, 512)?;
        convert_all(&mut guest, MEMORY + (64 << 20), 2048, true)?;
        vm.claim(MEMORY + (64 << 20), 2048)?;
        check_state(blocks, 2048, CLAIMED)?;
        vm.release(MEMORY + (64 << 20), 2048)?;
        vm.finish()?;
    }
    Ok(())
}

/// How many invalidations each conversion costs: none to share, to claim, and to take back what nobody claimed; one to release
/// what the host has touched. A realm's pages move, which takes one.
pub(crate) fn invalidations() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(16 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let block = pages.take_aligned(512, 512)?;
        let single = pages.take(16)?;
        vm.map(MEMORY, block, 512)?;
        vm.map(MEMORY + BLOCK, single, 16)?;
        // A realm's tables for the other half of its addresses.
        vm.donate_tables(8)?;
        let mut guest = vm.guest(0);
        let moves = u64::from(kind == VmKind::Realm);
        let count = || Ok::<_, Failure>(statistics()?.stage2_invalidations);
        for (at, address, pages) in [(MEMORY, block, 512), (MEMORY + BLOCK, single, 1), (MEMORY + BLOCK, single, 16)] {
            for touched in [false, true] {
                let before = count()?;
                guest.share(at, pages)?;
                check_eq!(count()? - before, moves, "invalidations of a share of {pages} pages");

                let before = count()?;
                vm.claim(at, pages)?;
                check_eq!(count()? - before, 0, "invalidations of a claim of {pages} pages");
                if touched {
                    for index in 0..pages {
                        let _ = memory::load(address + index * PAGE);
                    }
                }

                let before = count()?;
                vm.release(at, pages)?;
                let used = count()? - before;
                let most = if touched { 2 } else { 1 };
                check!(used <= most && (!touched || used >= 1), "{used} invalidations of a release of {pages} pages");

                let before = count()?;
                guest.unshare(at, pages)?;
                check_eq!(count()? - before, moves, "invalidations of an unshare of {pages} pages");
            }
        }
        vm.finish()?;
    }
    Ok(())
}

/// Lets the guest take back `count` pages at [`MEMORY`] until the host is asked for those that it has claimed: `some` of them,
/// behind `before` others. Returns where the call begins that is not done, and the range that the host is asked for.
///
/// A call of a realm does pages of one state only, so it takes another one for those that come before.
fn until_claimed(guest: &mut Guest<'_>, count: u64, before: u64, some: u64) -> Result<(u64, (u64, u64)), Failure> {
    let (begin, asked) = match guest.vm.kind {
        VmKind::Realm => (MEMORY + before * PAGE, (MEMORY + before * PAGE, some)),
        _ => (MEMORY, (MEMORY, count)),
    };
    if begin != MEMORY {
        let done = guest.convert(MEMORY, count, false)?;
        check_eq!(done, Conversion::Done(before), "unshare of what comes before the claimed pages");
    }
    let arguments = guest.conversion(begin, count - (begin - MEMORY) / PAGE, false);
    guest.begin_call(&arguments)?;
    let exit = guest.exit(ExitReason::Unshare)?;
    check_eq!((exit.address, exit.pages), asked, "the range of the exit");
    Ok((begin, asked))
}

/// The guest wants back what the host has claimed: the host is asked, and releases.
pub(crate) fn unshare_of_claimed_pages() -> Outcome {
    for kind in PROTECTED {
        for (count, claimed) in [(1, 0..1), (8, 3..5), (8, 7..8), (512, 100..101), (512, 0..512)] {
            let pages = Pages::new(8 * MIB);
            let vm = Vm::boot(&pages, kind, 1)?;
            let address = vm.add(MEMORY, count)?;
            let mut guest = vm.guest(0);
            guest.fill(MEMORY, count, address, 4)?;
            guest.share(MEMORY, count)?;
            let (first, some) = (MEMORY + claimed.start * PAGE, claimed.end - claimed.start);
            vm.claim(first, some)?;

            let (begin, asked) = until_claimed(&mut guest, count, claimed.start, some)?;
            // It asks as often as it is told to try again.
            let exit = guest.exit(ExitReason::Unshare)?;
            check_eq!((exit.address, exit.pages), asked, "the range of the exit");
            check_eq!(state(address + claimed.start * PAGE)?, CLAIMED, "the page that is claimed");
            vm.release(first, some)?;
            let reply = guest.finish()?;
            let rest = count - (begin - MEMORY) / PAGE;
            check_eq!(guest.converted(begin, reply.x), Conversion::Done(rest), "what the guest is told");
            guest.compare(MEMORY, count, address, 4)?;
            host_is_denied(address, count)?;
            vm.finish()?;
        }
    }
    Ok(())
}

/// The host refuses: the guest is told, nothing has changed, and it may ask again.
pub(crate) fn refused_unshare() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let count = 8;
        let address = vm.add(MEMORY, count)?;
        let mut guest = vm.guest(0);
        guest.fill(MEMORY, count, address, 5)?;
        guest.share(MEMORY, count)?;
        vm.claim(MEMORY + 2 * PAGE, 1)?;
        for _ in 0..3 {
            let (begin, _) = until_claimed(&mut guest, count, 2, 1)?;
            guest.answer(Answer::Refuse, 0);
            let reply = guest.finish()?;
            check_eq!(guest.converted(begin, reply.x), Conversion::Refused, "what the guest is told");
            // All that the call was about is shared as it was.
            let first = (begin - MEMORY) / PAGE;
            guest.compare(vm.shared(begin), count - first, address + first * PAGE, 5)?;
            host_finds(address + 2 * PAGE, 1, 5)?;
            vm.claim(MEMORY + 4 * PAGE, 2)?;
            host_finds(address + 4 * PAGE, 2, 5)?;
            vm.release(MEMORY + 4 * PAGE, 2)?;
            if first != 0 {
                guest.share(MEMORY, first)?;
            }
        }
        vm.release(MEMORY + 2 * PAGE, 1)?;
        guest.unshare(MEMORY, count)?;
        guest.compare(MEMORY, count, address, 5)?;
        vm.finish()?;
    }
    Ok(())
}

/// Answers that do not belong to the exit are INVALID, and change nothing.
pub(crate) fn answers_that_do_not_belong() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let address = vm.add(MEMORY, 1)?;
    let mut guest = vm.guest(0);
    guest.fill(MEMORY, 1, address, 6)?;
    guest.share(MEMORY, 1)?;
    vm.claim(MEMORY, 1)?;
    let arguments = guest.conversion(MEMORY, 1, false);
    guest.begin_call(&arguments)?;
    guest.exit(ExitReason::Unshare)?;
    for answer in [Answer::Complete, Answer::Abort] {
        guest.answer(answer, 0);
        refused("VCPU_RUN", [vm.handle, 0], Status::Invalid)?;
    }
    // The run page is the host's: any number may be there.
    for code in [4, u64::MAX] {
        memory::store(vm.run_page(0) + ravelin_abi::RunPage::ENTRY as u64, code);
        refused("VCPU_RUN", [vm.handle, 0], Status::Invalid)?;
    }
    guest.answer(Answer::Refuse, 0);
    let reply = guest.finish()?;
    check_eq!(guest.converted(MEMORY, reply.x), Conversion::Refused, "what the guest is told");

    // A load from a device cannot be refused.
    guest.begin_code(code::load(), &[ravelin_guest::DEVICE + PAGE])?;
    guest.exit(ExitReason::Mmio)?;
    guest.answer(Answer::Refuse, 0);
    refused("VCPU_RUN", [vm.handle, 0], Status::Invalid)?;
    guest.answer(Answer::Complete, 77);
    check_eq!(guest.finish()?.x[0], 77, "what the guest loads");
    vm.release(MEMORY, 1)?;
    vm.finish()
}

const MEM_RELINQUISH: u64 = 0xc600_0009;

/// What a guest gives up comes to the host as zeroes, and the guest may get another page there.
pub(crate) fn relinquish() -> Outcome {
    for count in [1, 3, 512] {
        let pages = Pages::new(8 * MIB);
        let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
        let address = vm.add(MEMORY, count)?;
        let mut guest = vm.guest(0);
        guest.fill(MEMORY, count, address, 7)?;
        let [status, done, ..] = guest.call(&[MEM_RELINQUISH, MEMORY, count])?;
        check_eq!((status, done), (0, count), "MEM_RELINQUISH");
        let told = guest.told.pop();
        let told = told.map(|exit| (exit.reason, exit.address, exit.pages));
        check_eq!(told, Some((ExitReason::Relinquished.code(), MEMORY, count)), "what the host is told");
        check_state(address, count, OWNED)?;
        host_finds_zeroes(address, count)?;
        refused("CLAIM", [vm.handle, MEMORY, 1], Status::Absent)?;

        // It is not poisoned: the host provides a page, with whatever it holds.
        guest.begin_code(code::load_pair(), &[MEMORY])?;
        let exit = guest.exit(ExitReason::PageFault)?;
        check_eq!((exit.address, exit.flags, exit.value), (MEMORY, 0, 0), "what the host is told of the fault");
        memory::store(address, 8);
        vm.map(MEMORY, address, 1)?;
        check_eq!(guest.finish()?.x[0], 8, "what the guest finds");
        vm.finish()?;
    }
    Ok(())
}

/// Gives frames up; returns how many were.
fn relinquish_some(guest: &mut Guest<'_>, at: u64, count: u64) -> Result<u64, Failure> {
    let [status, done, ..] = guest.call(&[MEM_RELINQUISH, at, count])?;
    check_eq!(status, 0, "MEM_RELINQUISH of {count} pages at {at:#x}");
    let told = guest.told.pop().map(|exit| (exit.reason, exit.address, exit.pages));
    check_eq!(told, Some((ExitReason::Relinquished.code(), at, done)), "what the host is told");
    Ok(done)
}

/// What the host has taken by force it may replace once the guest has given the frame up, and no other one.
pub(crate) fn relinquish_of_poison() -> Outcome {
    // Pages that were taken one by one, and as a block.
    for (count, taken, given_up) in
        [(8, 2..6, 3..5), (512, 0..512, 9..11), (512, 0..512, 511..512), (512, 0..512, 0..512)]
    {
        let pages = Pages::new(16 * MIB);
        let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
        let address = vm.add(MEMORY, count)?;
        let spare = pages.take_aligned(count, 512)?;
        vm.donate_tables(2)?;
        let mut guest = vm.guest(0);
        guest.fill(MEMORY, count, address, 16)?;
        succeed("FORCE_RECLAIM", [address + taken.start * PAGE, taken.end - taken.start])?;
        host_fills(address + taken.start * PAGE, taken.end - taken.start, 17);

        let (at, some) = (MEMORY + given_up.start * PAGE, given_up.end - given_up.start);
        let before = statistics()?.stage2_invalidations;
        check_eq!(relinquish_some(&mut guest, at, some)?, some, "frames given up");
        let used = statistics()?.stage2_invalidations - before;
        check_eq!(used, 0, "invalidations where nothing was mapped");
        // The host has had the pages for long: they are not scrubbed again.
        host_finds(address + taken.start * PAGE, taken.end - taken.start, 17)?;

        // All the others are poisoned as they were, by themselves and in a range.
        for index in taken.clone().filter(|index| !given_up.contains(index)) {
            let page = MEMORY + index * PAGE;
            refused("VM_MAP", [vm.handle, page, spare, 1], Status::Poisoned)?;
            if index % 101 < 3 {
                guest.has_nothing_at(page)?;
            }
        }
        if given_up != taken {
            let first = if taken.start == 0 { Status::Poisoned } else { Status::Exists };
            refused("VM_MAP", [vm.handle, MEMORY, spare, count], first)?;
        }
        // The guest asks for a page where it gave one up, and gets it.
        host_fills(spare, some, 18);
        guest.begin_code(code::load_pair(), &[at])?;
        check_eq!(guest.exit(ExitReason::PageFault)?.address, at, "what the host is told of the fault");
        vm.map(at, spare, some)?;
        guest.finish()?;
        guest.compare(at, some, spare, 18)?;
        guest.compare(MEMORY, taken.start, address, 16)?;
        guest.compare(MEMORY + taken.end * PAGE, count - taken.end, address + taken.end * PAGE, 16)?;

        // Private and poisoned frames in one call, as far as it goes.
        let mut done = 0;
        while done < count {
            done += relinquish_some(&mut guest, MEMORY + done * PAGE, count - done)?;
        }
        check_eq!(done, count, "frames given up");
        check_state(address, count, OWNED)?;
        check_state(spare, some, OWNED)?;
        host_finds_zeroes(spare, some)?;
        vm.map(MEMORY, address, count)?;
        vm.finish()?;
    }
    Ok(())
}

/// One page of a block, given up as often as the block has pages: the host gets one page, and the guest keeps the rest.
pub(crate) fn relinquish_again_and_again() -> Outcome {
    let pages = Pages::new(8 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let address = vm.add(MEMORY, 512)?;
    let mut guest = vm.guest(0);
    guest.fill(MEMORY, 512, address, 19)?;
    let index = 77;
    let at = MEMORY + index * PAGE;
    let counts = || Ok::<_, Failure>(page_counts()?[0]);
    check_eq!(relinquish_some(&mut guest, at, 1)?, 1, "frames given up");
    let before = counts()?;
    for _ in 1..512 {
        check_eq!(guest.call(&[MEM_RELINQUISH, at, 1])?[0], u64::MAX - 2, "MEM_RELINQUISH of what is gone");
    }
    check_eq!(counts()?, before, "pages of the host");
    check_state(address, index, NO_PAGE)?;
    check_eq!(state(address + index * PAGE)?, OWNED, "the page that was given up");
    check_state(address + (index + 1) * PAGE, 511 - index, NO_PAGE)?;
    is_denied(Access::Read, address + (index - 1) * PAGE)?;
    is_denied(Access::Write(1), address + (index + 1) * PAGE)?;
    guest.compare(MEMORY, index, address, 19)?;
    guest.compare(at + PAGE, 511 - index, address + (index + 1) * PAGE, 19)?;
    vm.finish()
}

/// What is taken by force comes to the host as zeroes; the guest gets an abort there for ever, and never another page.
pub(crate) fn force_reclaim_poisons() -> Outcome {
    for kind in PROTECTED {
        for (count, first, some) in [(4, 1, 1), (4, 0, 4), (512, 7, 2), (512, 0, 512)] {
            let pages = Pages::new(8 * MIB);
            let vm = Vm::boot(&pages, kind, 1)?;
            let address = vm.add(MEMORY, count)?;
            let spare = pages.take(1)?;
            // To cut a block.
            vm.donate_tables(2)?;
            let mut guest = vm.guest(0);
            guest.fill(MEMORY, count, address, 9)?;
            let (at, taken) = (MEMORY + first * PAGE, address + first * PAGE);
            succeed("FORCE_RECLAIM", [taken, some])?;
            check_state(taken, some, OWNED)?;
            host_finds_zeroes(taken, some)?;
            for page in [at, at + (some - 1) * PAGE] {
                guest.has_nothing_at(page)?;
                refused("VM_MAP", [vm.handle, page, spare, 1], Status::Poisoned)?;
                check_eq!(guest.convert(page, 1, true)?, Conversion::Refused, "share of a poisoned page");
                check_eq!(guest.convert(page, 1, false)?, Conversion::Refused, "unshare of a poisoned page");
                refused("CLAIM", [vm.handle, page, 1], Status::Poisoned)?;
            }
            // The rest is as it was.
            guest.compare(MEMORY, first, address, 9)?;
            let behind = first + some;
            guest.compare(MEMORY + behind * PAGE, count - behind, address + behind * PAGE, 9)?;
            refused("FORCE_RECLAIM", [taken, some], Status::Denied)?;
            vm.finish()?;
        }
    }
    Ok(())
}

/// Offered pages can be taken by force as private ones can, together with them; the guest finds an abort wherever they were.
pub(crate) fn force_reclaim_of_offered_pages() -> Outcome {
    for kind in PROTECTED {
        for (count, first, some) in [(4, 0, 3), (512, 7, 20)] {
            let pages = Pages::new(8 * MIB);
            let vm = Vm::boot(&pages, kind, 1)?;
            let address = vm.add(MEMORY, count)?;
            let spare = pages.take(1)?;
            vm.donate_tables(4)?;
            let mut guest = vm.guest(0);
            guest.fill(MEMORY, count, address, 9)?;
            // One in the middle, and the last one; the host has had the former.
            let offered = [first + 1, first + some - 1].map(|page| MEMORY + page * PAGE);
            for page in offered {
                guest.share(page, 1)?;
            }
            vm.claim(offered[0], 1)?;
            host_finds(address + (first + 1) * PAGE, 1, 9)?;
            let taken = address + first * PAGE;
            check_eq!(refused("FORCE_RECLAIM", [taken, some], Status::Denied)?, taken + PAGE, "the claimed page");
            vm.release(offered[0], 1)?;
            succeed("FORCE_RECLAIM", [taken, some])?;
            check_state(taken, some, OWNED)?;
            host_finds_zeroes(taken, some)?;
            for page in [offered[0], offered[1], MEMORY + first * PAGE] {
                guest.has_nothing_at(page)?;
                guest.has_nothing_at(vm.shared(page))?;
                refused("VM_MAP", [vm.handle, page, spare, 1], Status::Poisoned)?;
                refused("CLAIM", [vm.handle, page, 1], Status::Poisoned)?;
                check_eq!(guest.convert(page, 1, true)?, Conversion::Refused, "share of a poisoned page");
                check_eq!(guest.convert(page, 1, false)?, Conversion::Refused, "unshare of a poisoned page");
            }
            let behind = first + some;
            guest.compare(MEMORY + behind * PAGE, count - behind, address + behind * PAGE, 9)?;
            vm.finish()?;
        }
    }
    Ok(())
}

/// A page that the guest wants back while the host takes it: the guest is told that it has lost it.
pub(crate) fn force_reclaim_while_the_guest_unshares() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let address = vm.add(MEMORY, 1)?;
        let mut guest = vm.guest(0);
        guest.share(MEMORY, 1)?;
        vm.claim(MEMORY, 1)?;
        guest.begin_call(&guest.conversion(MEMORY, 1, false))?;
        guest.exit(ExitReason::Unshare)?;
        vm.release(MEMORY, 1)?;
        succeed("FORCE_RECLAIM", [address, 1])?;
        let x = guest.finish()?.x;
        check_eq!(guest.converted(MEMORY, x), Conversion::Refused, "the unshare");
        guest.has_nothing_at(MEMORY)?;
        vm.finish()?;
    }
    Ok(())
}

/// Only pages that the host has no access to can be taken by force.
pub(crate) fn force_reclaim_of_other_pages() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let address = vm.add(MEMORY, 3)?;
        let mut guest = vm.guest(0);
        guest.fill(MEMORY, 3, address, 10)?;
        guest.share(MEMORY + PAGE, 1)?;
        let force = |address, count| refused("FORCE_RECLAIM", [address, count], Status::Denied);
        vm.claim(MEMORY + PAGE, 1)?;
        check_eq!(force(address + PAGE, 1)?, address + PAGE, "the page that is named");
        check_eq!(force(address, 3)?, address + PAGE, "the page that is named");
        force(address, 2)?;
        vm.release(MEMORY + PAGE, 1)?;
        guest.unshare(MEMORY + PAGE, 1)?;
        guest.compare(MEMORY, 3, address, 10)?;
        // Nor what belongs to the VM but not to the guest, or to nobody.
        force(pages.take(1)?, 1)?;
        vm.finish()?;
    }
    Ok(())
}

/// At the end private pages come back as zeroes, shared ones with their contents.
pub(crate) fn reclaim_at_the_end() -> Outcome {
    for kind in PROTECTED {
        for count in [4, 512] {
            let pages = Pages::new(8 * MIB);
            let vm = Vm::boot(&pages, kind, 1)?;
            let address = vm.add(MEMORY, count)?;
            let mut guest = vm.guest(0);
            guest.fill(MEMORY, count, address, 11)?;
            vm.donate_tables(4)?;
            guest.share(MEMORY + PAGE, 2)?;
            vm.claim(MEMORY + 2 * PAGE, 1)?;
            vm.end()?;
            check_state(address, count, OWNED)?;
            host_finds_zeroes(address, 1)?;
            host_finds(address + PAGE, 2, 11)?;
            host_finds_zeroes(address + 3 * PAGE, count - 3)?;
            pages.are_owned()?;
        }
    }
    Ok(())
}

/// Everything that the host gave for a VM comes back as zeroes: what it is made of, its vCPUs, its tables.
pub(crate) fn nothing_is_left_behind() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let start = pages.mark();
    let vm = Vm::create(&pages, VmKind::Pkvm, 1)?;
    let made_of = pages.mark();
    vm.load()?;
    vm.add_vcpu()?;
    vm.seal()?;
    let end = pages.mark();
    vm.guest(0).load(vm.seal_arguments()[2])?;
    let run_page = vm.run_page(0);
    vm.finish()?;
    host_finds_zeroes(start, (made_of - start) / PAGE)?;
    let rest = (made_of..end).step_by(PAGE as usize).filter(|&page| page != run_page);
    rest.into_iter().try_for_each(|page| host_finds_zeroes(page, 1))
}

/// A page that is not there may be provided when the guest shares it, and the share goes on.
pub(crate) fn share_of_an_absent_page() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let address = pages.take(1)?;
        host_fills(address, 1, 12);
        let mut guest = vm.guest(0);
        let arguments = guest.conversion(MEMORY, 1, true);
        guest.begin_call(&arguments)?;
        let exit = guest.exit(ExitReason::PageFault)?;
        check_eq!((exit.address, exit.flags), (MEMORY, 0), "what the host is told");
        // As often as it is told to try again.
        guest.exit(ExitReason::PageFault)?;
        vm.map(MEMORY, address, 1)?;
        let reply = guest.finish()?;
        check_eq!(guest.converted(MEMORY, reply.x), Conversion::Done(1), "what the guest is told");
        vm.claim(MEMORY, 1)?;
        host_finds(address, 1, 12)?;
        guest.compare(vm.shared(MEMORY), 1, address, 12)?;

        // The host may also say that there is none.
        let arguments = guest.conversion(MEMORY + BLOCK, 1, true);
        guest.begin_call(&arguments)?;
        guest.exit(ExitReason::PageFault)?;
        guest.answer(Answer::Abort, 0);
        let reply = guest.finish()?;
        check_eq!(guest.converted(MEMORY + BLOCK, reply.x), Conversion::Refused, "what the guest is told");
        vm.release(MEMORY, 1)?;
        vm.finish()?;
    }
    Ok(())
}

/// An ordinary VM borrows: the host keeps its access, and takes pages back at any time.
pub(crate) fn ordinary_vm_borrows() -> Outcome {
    let pages = Pages::new(16 * MIB);
    let vm = Vm::boot(&pages, VmKind::Ordinary, 1)?;
    let address = pages.take_aligned(512, 512)?;
    vm.map(MEMORY, address, 512)?;
    let mut guest = vm.guest(0);
    let lent: State = (PageStateCode::SharedOwned, 0);
    check_state(address, 512, lent)?;
    host_fills(address, 512, 13);
    guest.compare(MEMORY, 512, address, 13)?;
    guest.fill(MEMORY, 512, address, 14)?;
    host_finds(address, 512, 14)?;
    // Nothing else can be done with what is lent.
    for name in ["SHARE", "UNSHARE", "DONATE", "TAKE_BACK", "PIN", "UNPIN"] {
        refused(name, [address, 1, 0], Status::Denied)?;
    }
    refused("FORCE_RECLAIM", [address, 1], Status::Denied)?;
    refused("CLAIM", [vm.handle, MEMORY, 1], Status::Denied)?;
    vm.donate_tables(2)?;
    succeed("VM_UNMAP", [vm.handle, MEMORY + PAGE, 1])?;
    check_eq!(state(address + PAGE)?, OWNED, "state of the page that was taken");
    host_finds(address + PAGE, 1, 14)?;
    for (code, flags) in [(code::load_pair(), 0), (code::store_pair(), 1), (code::execute(), 2)] {
        guest.begin_code(code, &[MEMORY + PAGE])?;
        let exit = guest.exit(ExitReason::PageFault)?;
        check_eq!((exit.address, exit.flags), (MEMORY + PAGE, flags), "what the host is told");
        guest.answer(Answer::Abort, 0);
        let exception = guest.finish()?.exception;
        check!(exception.is_some_and(|exception| exception.is_abort_at(MEMORY + PAGE)), "{exception:x?}");
    }
    refused("VM_UNMAP", [vm.handle, MEMORY + PAGE, 1], Status::Absent)?;
    vm.map(MEMORY + PAGE, address + PAGE, 1)?;
    guest.compare(MEMORY, 512, address, 14)?;
    succeed("VM_UNMAP", [vm.handle, MEMORY, 512])?;
    check_state(address, 512, OWNED)?;
    host_finds(address, 512, 14)?;
    // What is lent at the end keeps its contents.
    vm.map(MEMORY, address, 512)?;
    vm.end()?;
    host_finds(address, 512, 14)?;
    pages.are_owned()
}

/// Pages are put into a VM with blocks in both places, one or none; into a sealed one, too.
pub(crate) fn populate() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(16 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        vm.donate_tables(8)?;
        let mut guest = vm.guest(0);
        for (at, offset, count) in [
            (MEMORY, 0, 512),
            (MEMORY + 4 * BLOCK, 0, 1024),
            (MEMORY + 8 * BLOCK + 5 * PAGE, 0, 512),
            (MEMORY + 12 * BLOCK, 3, 512),
            (MEMORY + 16 * BLOCK + 9 * PAGE, 9, 100),
        ] {
            let address = pages.take_aligned(count + offset, 512)? + offset * PAGE;
            host_fills(address, count, 15);
            succeed("VM_MAP", [vm.handle, at, address, count])?;
            guest.compare(at, count, address, 15)?;
            if kind.is_protected() {
                host_is_denied(address, count)?;
            }
            // Nothing comes on top of it, and no page twice.
            let (status, _) = call("VM_MAP", [vm.handle, at, address, count]);
            check!(matches!(status, Status::Exists | Status::Denied), "the same again: {}", status.name());
            vm.note(at, count);
        }
        vm.finish()?;
    }
    Ok(())
}
