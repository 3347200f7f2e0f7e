//! The host's and the hypervisor's part of the table of transitions: every call from every state.

use ravelin_abi::{PageStateCode, Status};

use crate::{
    rt::{
        memory::{BLOCK, PAGE},
        platform::platform,
    },
    tests::{NO_PAGE, OWNED, Op, Outcome, SHARED, Snapshot, State, arena, carve_out, check_eq, check_state, state},
};

/// Where a page stands, as far as the host and the hypervisor are concerned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Standing {
    Owned,
    Shared,
    /// Shared, with this many pins.
    Pinned(u64),
    Donated,
}

use Standing::{Donated, Owned, Pinned, Shared};

impl Standing {
    const ALL: [Self; 5] = [Owned, Shared, Pinned(1), Pinned(2), Donated];

    /// Brings pages of the host here.
    fn enter(self, address: u64, pages: u64) -> Outcome {
        match self {
            Owned => Ok(()),
            Shared => Op::Share.succeeds(address, pages),
            Pinned(count) => {
                Op::Share.succeeds(address, pages)?;
                (0..count).try_for_each(|_| Op::Pin.succeeds(address, pages))
            }
            Donated => Op::Donate.succeeds(address, pages),
        }
    }

    /// Brings pages back to the host.
    fn leave(self, address: u64, pages: u64) -> Outcome {
        match self {
            Owned => Ok(()),
            Shared => Op::Unshare.succeeds(address, pages),
            Pinned(count) => {
                (0..count).try_for_each(|_| Op::Unpin.succeeds(address, pages))?;
                Op::Unshare.succeeds(address, pages)
            }
            Donated => Op::TakeBack.succeeds(address, pages),
        }
    }

    fn reported(self) -> State {
        match self {
            Owned => OWNED,
            Shared => SHARED,
            Pinned(count) => (PageStateCode::SharedOwned, count),
            Donated => NO_PAGE,
        }
    }

    /// Where a call leads from here.
    fn after(self, op: Op) -> Result<Self, Status> {
        match (self, op) {
            (Owned, Op::Share) => Ok(Shared),
            (Owned, Op::Donate) => Ok(Donated),
            (Shared, Op::Unshare) => Ok(Owned),
            (Shared, Op::Pin) => Ok(Pinned(1)),
            (Pinned(count), Op::Pin) => Ok(Pinned(count + 1)),
            (Pinned(1), Op::Unpin) => Ok(Shared),
            (Pinned(count), Op::Unpin) => Ok(Pinned(count - 1)),
            (Pinned(_), Op::Unshare) => Err(Status::Busy),
            (Donated, Op::TakeBack) => Ok(Owned),
            _ => Err(Status::Denied),
        }
    }
}

/// Makes the call from the standing that the pages have and checks where it leads.
fn step(from: Standing, op: Op, address: u64, pages: u64) -> Outcome {
    check_state(address, pages, from.reported())?;
    match from.after(op) {
        Ok(to) => {
            op.succeeds(address, pages)?;
            check_state(address, pages, to.reported())?;
            to.leave(address, pages)?;
            from.enter(address, pages)
        }
        Err(status) => {
            let snapshot = Snapshot::take(address, pages)?;
            op.answers(address, pages, status, address)?;
            snapshot.compare(format_args!("{op:?} of {from:?}"))
        }
    }
}

pub(crate) fn every_call_from_every_state() -> Outcome {
    // A page inside a block, one at its start, a range over two blocks, a whole block and a bit more.
    let base = arena(4 * BLOCK);
    for (address, pages) in [(base + 7 * PAGE, 1), (base, 1), (base + BLOCK - 3 * PAGE, 6), (base + BLOCK, 512)] {
        for from in Standing::ALL {
            from.enter(address, pages)?;
            for op in Op::ALL {
                step(from, op, address, pages)?;
            }
            from.leave(address, pages)?;
        }
        check_state(address, pages, OWNED)?;
    }
    Ok(())
}

/// The pages of a range but one.
fn others(address: u64, pages: u64, index: u64, mut body: impl FnMut(u64, u64) -> Outcome) -> Outcome {
    if index > 0 {
        body(address, index)?;
    }
    if index + 1 < pages {
        body(address + (index + 1) * PAGE, pages - index - 1)?;
    }
    Ok(())
}

/// A range in which one page stands elsewhere is refused as a whole, and the page is named.
pub(crate) fn one_page_spoils_a_range() -> Outcome {
    const PAGES: u64 = 12;
    let address = arena(4 * BLOCK) + BLOCK - 5 * PAGE;
    for good in Standing::ALL {
        for bad in Standing::ALL {
            for op in Op::ALL {
                let (Ok(_), Err(status)) = (good.after(op), bad.after(op)) else { continue };
                for index in [0, 1, 4, 5, PAGES - 1] {
                    let spoiler = address + index * PAGE;
                    others(address, PAGES, index, |address, pages| good.enter(address, pages))?;
                    bad.enter(spoiler, 1)?;
                    let snapshot = Snapshot::take(address, PAGES)?;
                    op.answers(address, PAGES, status, spoiler)?;
                    snapshot.compare(format_args!("{op:?} of {good:?} with one {bad:?}"))?;
                    others(address, PAGES, index, |address, pages| check_state(address, pages, good.reported()))?;
                    bad.leave(spoiler, 1)?;
                    others(address, PAGES, index, |address, pages| good.leave(address, pages))?;
                }
            }
        }
    }
    Ok(())
}

/// Of several pages that cannot take part, the first is named.
pub(crate) fn first_failure_is_named() -> Outcome {
    let address = arena(4 * BLOCK) + BLOCK - 4 * PAGE;
    let (first, second) = (address + 2 * PAGE, address + 6 * PAGE);
    for (bad, other) in [(Shared, Donated), (Donated, Shared), (Pinned(1), Donated)] {
        bad.enter(first, 1)?;
        other.enter(second, 1)?;
        for op in [Op::Share, Op::Donate] {
            op.answers(address, 8, Status::Denied, first)?;
            op.answers(first + PAGE, 6, Status::Denied, second)?;
        }
        bad.leave(first, 1)?;
        other.leave(second, 1)?;
    }
    check_state(address, 8, OWNED)
}

/// What the hypervisor keeps since boot is not the host's to do anything with.
pub(crate) fn carve_out_is_out_of_reach() -> Outcome {
    let region = carve_out()?;
    let pages = region.size() / PAGE;
    for (address, pages) in [
        (region.start, 1),
        (region.start, 512),
        (region.start, pages.min(512)),
        (region.start + pages / 2 * PAGE, 1),
        (region.start + pages / 2 * PAGE, 8),
        (region.end - PAGE, 1),
    ] {
        check_eq!(state(address)?, NO_PAGE, "state of {address:#x}");
        for op in Op::ALL {
            let snapshot = Snapshot::take(address, pages)?;
            op.answers(address, pages, Status::Denied, address)?;
            snapshot.compare(format_args!("{op:?} of the carve-out"))?;
        }
    }
    // Every page of it is refused, not only some.
    for page in (region.start..region.end).step_by(PAGE as usize) {
        check_eq!(state(page)?, NO_PAGE, "state of {page:#x}");
        Op::TakeBack.answers(page, 1, Status::Denied, page)?;
        Op::Share.answers(page, 1, Status::Denied, page)?;
    }
    Ok(())
}

/// What is not RAM has no owner and cannot change hands.
pub(crate) fn devices_do_not_change_hands() -> Outcome {
    let ram = platform().ram.iter().chain(&platform().carve_out);
    let end = ram.clone().map(|region| region.end).max().unwrap_or(0);
    let start = ram.map(|region| region.start).min().unwrap_or(0);
    let mut addresses = arrayvec::ArrayVec::<u64, 16>::new();
    addresses.extend([0, 0x800_0000, 0x900_0000, 0x1000_0000, start - PAGE, end, end + (1 << 30), 1 << 47]);
    addresses.extend(
        [platform().pci.map(|region| region.start), platform().flash.map(|region| region.start)].into_iter().flatten(),
    );
    addresses.push(ravelin_abi::ADDRESS_END - PAGE);
    for address in addresses {
        for op in Op::ALL {
            let snapshot = Snapshot::take(address, 1)?;
            op.answers(address, 1, Status::NotRam, address)?;
            snapshot.compare(format_args!("{op:?} of a device"))?;
        }
        check_eq!(state(address)?, NO_PAGE, "state of {address:#x}");
    }
    Ok(())
}
