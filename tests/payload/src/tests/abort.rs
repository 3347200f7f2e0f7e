//! The host touches what it does not own: an abort that it survives, with the address and a code that makes no operating
//! system try again.

use crate::{
    rt::{
        call, cpu,
        memory::{self, BLOCK, PAGE},
        platform::platform,
        probe::{self, Access, Fault, probe},
    },
    tests::{Failure, Op, Outcome, arena, carve_out, check, check_eq, on_each_cpu, statistics},
};

/// Fault status code of an alignment fault.
pub(crate) const ALIGNMENT: u64 = 0x21;

const EVERY_ACCESS: [Access; 9] = [
    Access::Read,
    Access::Write(!0),
    Access::Atomic,
    Access::Pair,
    Access::Zero,
    Access::Execute,
    Access::El0Read,
    Access::El0Write(!0),
    Access::El0Execute,
];

/// Checks that the access is answered with the abort that the interface promises.
pub(crate) fn is_denied(access: Access, address: u64) -> Result<Fault, Failure> {
    let fault = match probe(access, address) {
        Ok(value) => return Err(Failure::new(format_args!("{access:?} of {address:#x} worked: {value:#x}"))),
        Err(fault) => fault,
    };
    let (class, vector) = match access {
        Access::Execute => (0x21, 0x200),
        Access::El0Execute => (0x20, 0x400),
        Access::El0Read | Access::El0Write(_) => (0x24, 0x400),
        _ => (0x25, 0x200),
    };
    check_eq!(fault.class(), class, "{access:?} of {address:#x}: exception class");
    check_eq!(fault.status(), ALIGNMENT, "{access:?} of {address:#x}: fault status");
    check_eq!(fault.vector, vector, "{access:?} of {address:#x}: vector");
    check_eq!(fault.far, address, "{access:?} of {address:#x}: FAR");
    let writes = matches!(access, Access::Write(_) | Access::El0Write(_) | Access::Zero);
    check_eq!(fault.esr >> 6 & 1 != 0, writes, "{access:?} of {address:#x}: WnR in ESR {:#x}", fault.esr);
    check_eq!(fault.esr >> 25 & 1, 1, "{access:?} of {address:#x}: IL in ESR {:#x}", fault.esr);
    if matches!(access, Access::Execute | Access::El0Execute) {
        check_eq!(fault.elr, address, "{access:?} of {address:#x}: ELR");
    }
    Ok(fault)
}

/// Makes every kind of access at the start, in the middle and at the end of a page that is not the host's.
fn all_denied(page: u64) -> Outcome {
    for access in EVERY_ACCESS {
        for offset in [0, 0x7C0, 0xFC0] {
            is_denied(access, page + offset)?;
        }
    }
    Ok(())
}

pub(crate) fn donated_page() -> Outcome {
    let base = arena(2 * BLOCK);
    on_each_cpu(|_| {
        for page in [base, base + 100 * PAGE, base + BLOCK - PAGE] {
            memory::store(page, 1); // mapped before
            Op::Donate.succeeds(page, 1)?;
            all_denied(page)?;
            Op::TakeBack.succeeds(page, 1)?;
            works(page)?;
        }
        Ok(())
    })
}

/// Every kind of access works on a page of the host.
fn works(page: u64) -> Outcome {
    const RET: u32 = 0xD65F_03C0;
    const SVC: u32 = 0xD400_0001;
    for access in EVERY_ACCESS {
        match access {
            Access::Execute => memory::store_instruction(page, RET),
            Access::El0Execute => memory::store_instruction(page, SVC),
            _ => {}
        }
        if let Err(fault) = probe(access, page) {
            return Err(Failure::new(format_args!("{access:?} of {page:#x}, which is the host's: {fault:x?}")));
        }
    }
    Ok(())
}

pub(crate) fn owned_and_shared_pages() -> Outcome {
    let page = arena(BLOCK) + 11 * PAGE;
    on_each_cpu(|_| {
        works(page)?;
        Op::Share.succeeds(page, 1)?;
        works(page)?;
        Op::Pin.succeeds(page, 1)?;
        works(page)?;
        Op::Unpin.succeeds(page, 1)?;
        Op::Unshare.succeeds(page, 1)?;
        works(page)
    })
}

pub(crate) fn donated_block() -> Outcome {
    let base = arena(4 * BLOCK) + BLOCK;
    Op::Donate.succeeds(base, 512)?;
    for page in [base, base + PAGE, base + 255 * PAGE, base + 511 * PAGE] {
        all_denied(page)?;
    }
    works(base - PAGE)?;
    works(base + BLOCK)?;
    Op::TakeBack.succeeds(base, 512)?;
    works(base)?;
    works(base + 511 * PAGE)
}

pub(crate) fn carve_out_page() -> Outcome {
    let region = carve_out()?;
    on_each_cpu(|_| {
        for page in [region.start, region.start + region.size() / 2 / PAGE * PAGE, region.end - PAGE] {
            all_denied(page)?;
        }
        Ok(())
    })
}

/// Not one page of the carve-out can be read.
pub(crate) fn whole_carve_out() -> Outcome {
    let region = carve_out()?;
    let before = statistics()?.faults_denied;
    for page in (region.start..region.end).step_by(PAGE as usize) {
        is_denied(Access::Read, page)?;
    }
    let denied = statistics()?.faults_denied - before;
    check_eq!(denied, region.size() / PAGE, "faults counted as denied");
    Ok(())
}

/// An access that starts in a page of the host and ends in one that is not.
pub(crate) fn access_across_pages() -> Outcome {
    let page = arena(BLOCK) + 5 * PAGE;
    Op::Donate.succeeds(page, 1)?;
    for offset in 1..8 {
        for (access, address) in [(Access::Read, page - offset), (Access::Write(0), page + PAGE - offset)] {
            match probe(access, address) {
                Ok(_) => return Err(Failure::new(format_args!("{access:?} at {address:#x} worked"))),
                Err(fault) => {
                    check_eq!(fault.status(), ALIGNMENT, "{access:?} at {address:#x}: fault status");
                    check!(
                        (address..address + 8).contains(&fault.far) && fault.far / PAGE == page / PAGE
                            || fault.far == address,
                        "{access:?} at {address:#x}: FAR {:#x}",
                        fault.far
                    );
                }
            }
        }
    }
    Op::TakeBack.succeeds(page, 1)
}

/// Translation tables of the host in memory that is not the host's: the walk is refused, the host survives.
pub(crate) fn translation_table() -> Outcome {
    let donated = arena(BLOCK) + 3 * PAGE;
    memory::store(donated, 0);
    Op::Donate.succeeds(donated, 1)?;
    for table in [donated, carve_out()?.start] {
        for access in [Access::Read, Access::Write(1), Access::Execute] {
            let address = probe::with_table(table, |address| probe(access, address).map_err(|fault| (address, fault)));
            match address {
                Ok(value) => {
                    return Err(Failure::new(format_args!(
                        "{access:?} through a table at {table:#x} worked: {value:#x}"
                    )));
                }
                Err((address, fault)) => {
                    check_eq!(fault.far, address, "{access:?} through a table at {table:#x}: FAR");
                    check_eq!(fault.status(), ALIGNMENT, "{access:?} through a table at {table:#x}: fault status");
                }
            }
        }
    }
    Op::TakeBack.succeeds(donated, 1)
}

/// Aborts have no side effect on calls and on other CPUs: everybody takes hundreds of them.
pub(crate) fn many() -> Outcome {
    let region = carve_out()?;
    super::on_all_cpus(|cpu| {
        for round in 0..300 * platform().effort() {
            let address = region.start + (cpu as u64 * 4096 * 31 + round * 4096 * 7) % region.size();
            is_denied(Access::Read, address)?;
        }
        Ok(())
    })?;
    check!(call::psci(call::psci::VERSION, 0, 0, 0) > 0, "PSCI is gone");
    cpu::run_on_all(&|_| ());
    Ok(())
}

/// The whole of the host's RAM can be read, whatever the shape of its regions.
pub(crate) fn all_of_ram_is_there() -> Outcome {
    for ram in &platform().ram {
        for page in (ram.start..ram.end).step_by(PAGE as usize) {
            if let Err(fault) = probe::read(page) {
                return Err(Failure::new(format_args!("{page:#x} cannot be read: {fault:x?}")));
            }
        }
    }
    Ok(())
}
