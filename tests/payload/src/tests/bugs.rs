//! Bugs that other hypervisors of this kind had, each as a test that fails if we had it.

use ravelin_abi::{ADDRESS_END, Status};

use crate::{
    rt::{
        call::{self, Instruction, Registers, call, psci},
        memory::{self, BLOCK, PAGE},
        platform::platform,
        probe::{self, Access},
    },
    tests::{
        Op, Outcome, SHARED, Snapshot, abort::is_denied, arena, carve_out, check, check_eq, number, on_each_cpu, state,
        statistics,
    },
};

/// CVE-2026-0028, -0030, -0031: the number of pages or the frame number overflows and the check sees another range than the
/// transition.
pub(crate) fn frame_number_overflow() -> Outcome {
    let target = carve_out()?.start;
    let page = arena(BLOCK);
    let snapshot = Snapshot::take(target, 1)?;
    for op in Op::ALL {
        for (address, pages) in [
            (page, (1 << 52) + 1),
            (page, (1 << 52) - (page - target.min(page)) / PAGE),
            (page, 1 << 63),
            (page, (1 << 63) + 1),
            (page, u64::MAX / PAGE + 1),
            (target | 1 << 52, 1),
            (target | 1 << 48, 1),
            (target | 0xFFFF << 48, 1),
            (page | 0xFFFF << 48, 1),
        ] {
            let (status, failed) = op.call(address, pages);
            check_eq!((status, failed), (Status::Overflow, 0), "{op:?} of {pages:#x} pages at {address:#x}");
        }
    }
    snapshot.compare(format_args!("overflowing ranges"))
}

/// CVE-2026-0032: memory outside RAM is shared. And a donation of what is no memory.
pub(crate) fn share_outside_ram() -> Outcome {
    let end = platform().ram.iter().chain(&platform().carve_out).map(|region| region.end).max().unwrap_or(0);
    for address in [0, 0x900_0000, 0x800_0000, end, end + BLOCK, 0x40_1000_0000, 0x80_0000_0000, ADDRESS_END - PAGE] {
        for op in [Op::Share, Op::Donate] {
            op.answers(address, 1, Status::NotRam, address)?;
        }
    }
    Ok(())
}

/// A range starts in one region and ends in another.
pub(crate) fn region_straddle() -> Outcome {
    for ram in &platform().ram {
        let (before, last) = (ram.start - PAGE, ram.end - PAGE);
        let snapshot = Snapshot::take(last, 2)?;
        for op in [Op::Share, Op::Donate] {
            // From no RAM, or from somebody else's, into the host's.
            let (status, failed) = op.call(before, 2);
            check!(matches!(status, Status::NotRam | Status::Denied), "{op:?} at {before:#x}: {status:?}");
            check_eq!(failed, before, "{op:?} at {before:#x}");
            // Out of the host's.
            let (status, failed) = op.call(last, 2);
            check!(matches!(status, Status::NotRam | Status::Denied), "{op:?} at {last:#x}: {status:?}");
            check_eq!(failed, ram.end, "{op:?} at {last:#x}");
            let (status, failed) = op.call(ram.end - 512 * PAGE, 1024);
            check!(matches!(status, Status::NotRam | Status::Denied), "{op:?} of 1024 pages: {status:?}");
            check_eq!(failed, ram.end, "{op:?} of 1024 pages");
        }
        snapshot.compare(format_args!("straddling ranges"))?;
    }
    Ok(())
}

/// CVE-2023-21264: the check is made in the wrong place and the host reaches the hypervisor's memory.
pub(crate) fn hypervisor_memory() -> Outcome {
    let region = carve_out()?;
    for page in [region.start, region.end - PAGE] {
        for op in Op::ALL {
            op.answers(page, 1, Status::Denied, page)?;
        }
        let [x0, x1, ..] = call::hypervisor([number("STATISTICS"), page, 0, 0]);
        check_eq!((x0, x1), (Status::Denied.register(), page), "STATISTICS into the carve-out");
        is_denied(Access::Write(0), page)?;
        is_denied(Access::Read, page)?;
    }
    Ok(())
}

/// An SMC with an immediate is taken for one without.
pub(crate) fn smc_immediate() -> Outcome {
    for instruction in [Instruction::Smc1, Instruction::SmcFfff] {
        let before = Registers::with([psci::VERSION, 0, 0, 0]);
        let mut expected = before;
        expected.0[0] = u64::MAX;
        check!(call(instruction, before) == expected, "{instruction:?} was taken for a call");
    }
    Ok(())
}

/// The upper half of the function identifier is not looked at.
pub(crate) fn function_id_upper_half() -> Outcome {
    for function in [psci::VERSION, psci::SYSTEM_OFF] {
        let x0 = call(Instruction::Smc, Registers::with([function | 1 << 32, 0, 0, 0])).0[0];
        check_eq!(x0, u64::MAX, "SMC {function:#x} with bit 32 set");
    }
    let page = arena(BLOCK);
    let x0 = call(Instruction::Hvc, Registers::with([Op::Share.number() | 1 << 32, page, 1, 0])).0[0];
    check_eq!(x0, Status::NotSupported.register(), "SHARE with bit 32 set");
    Ok(())
}

/// Memory whose regions are not multiples of blocks: the first and last pages of each are there and may change hands.
pub(crate) fn unaligned_regions() -> Outcome {
    for ram in &platform().ram {
        for page in [ram.start, ram.start + PAGE, ram.end - 2 * PAGE, ram.end - PAGE] {
            check!(probe::read(page).is_ok(), "{page:#x} cannot be read");
        }
        let last = ram.end - PAGE;
        if platform().taken.iter().all(|taken| last < taken.start || last >= taken.end) {
            memory::store(last, 5);
            Op::Donate.succeeds(last, 1)?;
            is_denied(Access::Read, last)?;
            check!(probe::read(last - PAGE).is_ok(), "the page before {last:#x} cannot be read");
            Op::TakeBack.succeeds(last, 1)?;
            check_eq!(memory::load(last), 0, "the last page of the region");
        }
    }
    Ok(())
}

/// The pins of a page underflow when it is released more often than it was taken.
pub(crate) fn pin_underflow() -> Outcome {
    let page = arena(BLOCK);
    Op::Share.succeeds(page, 512)?;
    Op::Pin.succeeds(page, 512)?;
    Op::Unpin.succeeds(page, 1)?;
    for _ in 0..512 {
        Op::Unpin.answers(page, 1, Status::Denied, page)?;
    }
    check_eq!(state(page)?, SHARED, "the page released once too often");
    Op::Unshare.answers(page, 512, Status::Busy, page + PAGE)?;
    Op::Unpin.succeeds(page + PAGE, 511)?;
    Op::Unshare.succeeds(page, 512)
}

/// A call that fails half-way leaves a pin behind (as CVE-2026-46147), or a table.
pub(crate) fn leak_on_failure() -> Outcome {
    let page = arena(4 * BLOCK) + BLOCK;
    let spoiler = page + 600 * PAGE;
    Op::Share.succeeds(page, 600)?;
    let tables = statistics()?.free_tables;
    for _ in 0..50 {
        Op::Pin.answers(page, 601, Status::Denied, spoiler)?;
        Op::Unpin.answers(page, 600, Status::Denied, page)?;
        Op::Donate.answers(spoiler - PAGE, 2, Status::Denied, spoiler - PAGE)?;
    }
    for probe in [page, page + 511 * PAGE, page + 599 * PAGE] {
        check_eq!(state(probe)?, SHARED, "state of {probe:#x}");
    }
    check_eq!(statistics()?.free_tables, tables, "free tables");
    Op::Unshare.succeeds(page, 600)
}

/// Memory and tables come back: a thousand rounds leave the totals as they were.
pub(crate) fn leak_in_the_long_run() -> Outcome {
    let base = arena(4 * BLOCK);
    let round = |index: u64| {
        let address = base + index * 37 % 512 * PAGE;
        Op::Donate.succeeds(address, 40)?;
        Op::TakeBack.succeeds(address, 40)?;
        Op::Share.succeeds(address, 40)?;
        Op::Pin.succeeds(address, 40)?;
        Op::Unpin.succeeds(address, 40)?;
        Op::Unshare.succeeds(address, 40)
    };
    (0..520).try_for_each(round)?;
    let before = statistics()?;
    (0..520).try_for_each(round)?;
    let after = statistics()?;
    check_eq!(after.free_tables, before.free_tables, "free tables");
    check_eq!(after.host_owned_pages, before.host_owned_pages, "pages of the host");
    Ok(())
}

/// An argument that is a pointer into the hypervisor or nonsense, in every register of every call.
pub(crate) fn arbitrary_pointers() -> Outcome {
    let target = carve_out()?.start;
    on_each_cpu(|_| {
        for call_entry in ravelin_abi::CALLS {
            for value in [target, target | 1, u64::MAX, 1 << 63, 0, 0xFFFF_0000_0000_0000, 0x7FFF_FFFF_FFFF_F000] {
                let number = u64::from(call_entry.number);
                for arguments in
                    [[number, value, value, value], [number, value, 1, 0], [number, 0, value, 0], [number, value, 0, 0]]
                {
                    let [x0, ..] = call::hypervisor(arguments);
                    let harmless = matches!(call_entry.name, "UID" | "REVISION" | "FEATURES" | "PAGE_STATE");
                    check!(harmless || x0 != 0, "{} took {arguments:x?}", call_entry.name);
                }
            }
        }
        Ok(())
    })
}
