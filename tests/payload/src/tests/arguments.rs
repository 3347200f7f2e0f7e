//! Bad arguments: each has its status, the first error in the order of the interface counts, and nothing changes.

use ravelin_abi::{ADDRESS_END, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES, Status};

use crate::{
    rt::{call, memory::PAGE, platform::platform},
    tests::{Op, Outcome, Snapshot, arena, check_eq, number, on_each_cpu},
};

/// Address, pages, flags, and the status that they lead to whatever the pages' states are.
type Case = (u64, u64, u64, Status);

/// Makes each call on `page` in every state that the host can bring it into.
fn in_every_state(op: Op, page: u64, cases: &[Case]) -> Outcome {
    let try_all = || {
        for &(address, pages, flags, expected) in cases {
            let snapshot = Snapshot::take(page, 2)?;
            let [x0, x1, ..] = call::hypervisor([op.number(), address, pages, flags]);
            check_eq!(
                (x0, x1),
                (expected.register(), 0),
                "{op:?} of {pages:#x} pages at {address:#x}, flags {flags:#x}"
            );
            snapshot.compare(format_args!("{op:?} of {pages:#x} pages at {address:#x}, flags {flags:#x}"))?;
        }
        Ok(())
    };
    try_all()?;
    Op::Share.succeeds(page, 1)?;
    try_all()?;
    Op::Pin.succeeds(page, 1)?;
    try_all()?;
    Op::Unpin.succeeds(page, 1)?;
    Op::Unshare.succeeds(page, 1)?;
    Op::Donate.succeeds(page, 1)?;
    try_all()?;
    Op::TakeBack.succeeds(page, 1)
}

fn each_op(cases: impl Fn(Op, u64) -> [Case; 8] + Sync) -> Outcome {
    let page = arena(4 * PAGE) + PAGE;
    on_each_cpu(|_| {
        for op in Op::ALL {
            in_every_state(op, page, &cases(op, page))?;
        }
        Ok(())
    })
}

pub(crate) fn reserved() -> Outcome {
    use Status::Reserved;
    each_op(|_, page| {
        [
            (page, 1, 1, Reserved),
            (page, 1, 2, Reserved),
            (page, 1, 1 << 31, Reserved),
            (page, 1, 1 << 32, Reserved),
            (page, 1, 1 << 63, Reserved),
            (page, 1, u64::MAX, Reserved),
            (page + 1, 0, 1, Reserved), // before UNALIGNED and INVALID
            (u64::MAX, u64::MAX, u64::MAX, Reserved),
        ]
    })
}

pub(crate) fn unaligned() -> Outcome {
    use Status::Unaligned;
    each_op(|_, page| {
        [
            (page + 1, 1, 0, Unaligned),
            (page + 8, 1, 0, Unaligned),
            (page + 0x800, 1, 0, Unaligned),
            (page + 0xFFF, 1, 0, Unaligned),
            (page - 1, 1, 0, Unaligned),
            (page + 1, 0, 0, Unaligned),        // before INVALID
            (page + 1, u64::MAX, 0, Unaligned), // before OVERFLOW
            (u64::MAX, 1, 0, Unaligned),
        ]
    })
}

pub(crate) fn invalid() -> Outcome {
    use Status::Invalid;
    each_op(|_, page| {
        [
            (page, 0, 0, Invalid),
            (0, 0, 0, Invalid),
            (page - PAGE, 0, 0, Invalid),
            (ADDRESS_END, 0, 0, Invalid), // before OVERFLOW
            (ADDRESS_END - PAGE, 0, 0, Invalid),
            (1 << 63, 0, 0, Invalid),
            (!0xFFF, 0, 0, Invalid),
            (0x900_0000, 0, 0, Invalid), // before NOT_RAM
        ]
    })
}

pub(crate) fn overflow() -> Outcome {
    use Status::Overflow;
    each_op(|_, page| {
        [
            (page, u64::MAX, 0, Overflow),
            (page, 1 << 52, 0, Overflow),       // the size in bytes becomes 0
            (page, (1 << 52) + 1, 0, Overflow), // the size in bytes becomes one page
            (page, (page / PAGE).wrapping_neg() & ((1 << 52) - 1), 0, Overflow), // the end becomes 0
            (page | 1 << 48, 1, 0, Overflow),   // a valid address if the upper bits are cut off
            (page | 1 << 63, 1, 0, Overflow),
            (!0xFFF, 2, 0, Overflow),
            (ADDRESS_END - PAGE, 2, 0, Overflow),
        ]
    })
}

pub(crate) fn too_large() -> Outcome {
    use Status::TooLarge;
    each_op(|op, page| {
        let max = if op == Op::TakeBack { MAX_TAKE_BACK_PAGES } else { MAX_RANGE_PAGES };
        [
            (page, max + 1, 0, TooLarge),
            (page, 2 * max, 0, TooLarge),
            (page, 1 << 32, 0, TooLarge),       // 0 if cut off at 32 bits
            (page, (1 << 32) + 1, 0, TooLarge), // 1 if cut off at 32 bits
            (page, (ADDRESS_END - page) / PAGE, 0, TooLarge),
            (0, max + 1, 0, TooLarge), // before NOT_RAM
            (0, ADDRESS_END / PAGE, 0, TooLarge),
            (ADDRESS_END - (max + 1) * PAGE, max + 1, 0, TooLarge),
        ]
    })
}

pub(crate) fn page_state() -> Outcome {
    one_page("PAGE_STATE")
}

pub(crate) fn statistics() -> Outcome {
    one_page("STATISTICS")?;
    let page = arena(PAGE);
    let call = |page| call::hypervisor([number("STATISTICS"), page, 0, 0]);
    let refused = |page: u64, status: Status| {
        let snapshot = Snapshot::take(page, 1)?;
        let [x0, x1, ..] = call(page);
        check_eq!((x0, x1), (status.register(), page), "STATISTICS to {page:#x}");
        snapshot.compare(format_args!("STATISTICS to {page:#x}"))
    };
    refused(page, Status::Denied)?;
    Op::Donate.succeeds(page, 1)?;
    refused(page, Status::Denied)?;
    Op::TakeBack.succeeds(page, 1)?;
    refused(super::carve_out()?.start, Status::Denied)?;
    refused(0x900_0000, Status::NotRam)?;
    refused(platform().ram[0].start - PAGE, Status::NotRam)
}

fn one_page(name: &str) -> Outcome {
    let page = platform().statistics;
    on_each_cpu(|_| {
        for (address, reserved, expected) in [
            (page, 1, Status::Reserved),
            (page, u64::MAX, Status::Reserved),
            (page + 1, 1, Status::Reserved),
            (page + 1, 0, Status::Unaligned),
            (page + 0xFFF, 0, Status::Unaligned),
            (u64::MAX, 0, Status::Unaligned),
            (ADDRESS_END, 0, Status::Overflow),
            (page | 1 << 48, 0, Status::Overflow),
            (!0xFFF, 0, Status::Overflow),
        ] {
            let snapshot = Snapshot::take(page, 1)?;
            let [x0, x1, ..] = call::hypervisor([number(name), address, reserved, 0]);
            check_eq!(x0, expected.register(), "{name} of {address:#x}, {reserved:#x}");
            if name == "STATISTICS" {
                check_eq!(x1, 0, "x1 after {name} of {address:#x}, {reserved:#x}");
            }
            snapshot.compare(format_args!("{name} of {address:#x}, {reserved:#x}"))?;
        }
        Ok(())
    })
}
