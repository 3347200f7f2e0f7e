//! The page of statistics.

use ravelin_abi::{Statistics, Status, counter_index};

use crate::{
    rt::{
        call::{self, Instruction, Registers, call, psci},
        memory::{self, BLOCK, PAGE},
        platform::platform,
        probe::Access,
    },
    tests::{
        Op, Outcome, SHARED, abort::is_denied, arena, carve_out, check, check_eq, number, on_each_cpu, state,
        statistics,
    },
};

pub(crate) fn layout() -> Outcome {
    on_each_cpu(|_| {
        let it = statistics()?;
        check_eq!((it.version, it.size), (Statistics::VERSION, Statistics::SIZE as u64), "version and size");
        check_eq!(it.hypervisor_pages, carve_out()?.size() / PAGE, "pages of the hypervisor");
        let host: u64 = platform().ram.iter().map(|region| region.size() / PAGE).sum();
        check_eq!(it.host_owned_pages + it.host_shared_pages, host, "pages of the host");
        check_eq!(it.host_shared_pages, 1, "pages lent");
        check_eq!(it.donated_pages, 0, "pages donated");
        check!(
            it.host_tables > 0 && it.free_tables > 0,
            "tables: {} for the host, {} free",
            it.host_tables,
            it.free_tables
        );
        Ok(())
    })
}

/// Only the bytes announced are written, the page is not left pinned, and it may be any page that is lent.
pub(crate) fn page() -> Outcome {
    let page = arena(BLOCK) + PAGE;
    for neighbour in [page - PAGE, page, page + PAGE] {
        memory::fill(neighbour, 70);
    }
    Op::Share.succeeds(page, 1)?;
    for _ in 0..3 {
        let [x0, x1, ..] = call::hypervisor([number("STATISTICS"), page, 0, 0]);
        check_eq!((x0, x1), (0, Statistics::SIZE as u64), "STATISTICS");
        check_eq!(state(page)?, SHARED, "state of the page");
    }
    for index in Statistics::SIZE as u64 / 8..PAGE / 8 {
        check_eq!(memory::load(page + index * 8), memory::pattern(page, index, 70), "word {index} of the page");
    }
    check_eq!(memory::find_difference(page - PAGE, 70), None, "the page before");
    check_eq!(memory::find_difference(page + PAGE, 70), None, "the page behind");
    // One that was pinned before stays so.
    Op::Pin.succeeds(page, 1)?;
    call::hypervisor([number("STATISTICS"), page, 0, 0]);
    check_eq!(state(page)?.1, 1, "pins");
    Op::Unpin.succeeds(page, 1)?;
    Op::Unshare.succeeds(page, 1)
}

pub(crate) fn calls() -> Outcome {
    let page = arena(BLOCK);
    on_each_cpu(|_| {
        let before = statistics()?;
        for _ in 0..5 {
            call::hypervisor([number("FEATURES"), 0, 0, 0]);
            state(page)?;
            Op::Share.succeeds(page, 1)?;
            Op::Share.answers(page, 1, Status::Denied, page)?; // counts as well
            Op::Pin.succeeds(page, 1)?;
            Op::Unpin.succeeds(page, 1)?;
            Op::Unshare.succeeds(page, 1)?;
            Op::Donate.succeeds(page, 1)?;
            Op::TakeBack.succeeds(page, 1)?;
        }
        let after = statistics()?;
        for (name, uses) in [
            ("FEATURES", 5),
            ("SHARE", 10),
            ("UNSHARE", 5),
            ("DONATE", 5),
            ("TAKE_BACK", 5),
            ("PIN", 5),
            ("UNPIN", 5),
            ("PAGE_STATE", 5),
            ("STATISTICS", 1),
        ] {
            let index = counter_index(number(name) as u32).expect("a counter");
            check_eq!(after.calls[index] - before.calls[index], uses, "uses of {name}");
        }
        Ok(())
    })
}

pub(crate) fn events() -> Outcome {
    let page = arena(BLOCK);
    let carve_out = carve_out()?.start;
    on_each_cpu(|_| {
        let before = statistics()?;
        memory::store(page, 1); // what was never mapped needs no invalidation
        for _ in 0..3 {
            is_denied(Access::Read, carve_out)?;
            is_denied(Access::Write(1), carve_out)?;
        }
        Op::Donate.succeeds(page, 1)?;
        Op::TakeBack.succeeds(page, 1)?;
        psci(psci::VERSION, 0, 0, 0);
        call::firmware([psci::AFFINITY_INFO, platform().cpus[0], 0, 0]);
        call(Instruction::Smc, Registers::with([0x8400_0060, 0, 0, 0]));
        call(Instruction::Smc1, Registers::with([psci::VERSION, 0, 0, 0]));
        let after = statistics()?;
        check_eq!(after.faults_denied - before.faults_denied, 6, "faults denied");
        check_eq!(after.smcs_refused - before.smcs_refused, 2, "SMCs refused");
        check!(after.smcs_forwarded > before.smcs_forwarded, "no SMC was forwarded");
        check!(after.stage2_invalidations > before.stage2_invalidations, "no stage 2 invalidation for a donation");
        check!(after.el2_invalidations > before.el2_invalidations, "no EL2 invalidation for a page taken back");
        let tables = |it: Statistics| it.host_tables + it.el2_tables + it.free_tables;
        check_eq!(tables(after), tables(before), "tables in total");
        Ok(())
    })
}
