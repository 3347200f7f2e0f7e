//! Issues each hypercall between two marks, `HINT #0x40` and `HINT #0x41`, at which the counting plugin of QEMU notes what
//! was executed. Elsewhere the marks are NOPs, and this is a test that every call succeeds.
//!
//! One line on the console names each measurement, in the order of the marks: `bench NAME PAGES ROUND`. Round 0 meets
//! memory that has only ever been mapped in the largest blocks, round 1 what round 0 left.

use core::arch::asm;

use ravelin_abi::{CALLS, VERSION_MAJOR};

use crate::{
    rt::{call::psci, console::println, memory::BLOCK, platform},
    tests::{Failure, Outcome, check, check_eq},
};

mod contention;
mod growth;
mod guests;
mod memory;

pub(crate) use contention::contention;
pub(crate) use growth::{ranges, vms};
pub(crate) use guests::guests;
pub(crate) use memory::memory;

/// Numbers of pages that are measured; each has a block of its own.
const SIZES: [u64; 3] = [1, 8, 512];

/// What happens to a range, in an order in which every step succeeds.
const RANGE_CALLS: [&str; 6] = ["SHARE", "PIN", "UNPIN", "UNSHARE", "DONATE", "TAKE_BACK"];

/// Measures every call.
pub(crate) fn calls() -> Outcome {
    let platform = platform::platform();
    println!();
    if let Some(carve_out) = platform.carve_out {
        println!("bench-carve-out {}", carve_out.size());
    }
    let blocks = SIZES.len() as u64;
    let Some(arena) = platform.free(blocks * BLOCK, BLOCK) else {
        return Err(Failure::new(format_args!("no {blocks} free blocks")));
    };
    for round in 0..2 {
        let revision = report("REVISION", 0, round, measure_hvc([number("REVISION"), 0, 0, 0]));
        check_eq!(revision[0], u64::from(VERSION_MAJOR), "major version");
        let features = report("FEATURES", 0, round, measure_hvc([number("FEATURES"), 0, 0, 0]));
        check!(features[0] == 0 && features[1] != 0, "FEATURES says {features:#x?}");
        let state = report("PAGE_STATE", 0, round, measure_hvc([number("PAGE_STATE"), arena.start, 0, 0]));
        check_eq!(state[0], 0, "PAGE_STATE");
        report("unknown-HVC", 0, round, measure_hvc([0xC600_1FFF, 0, 0, 0]));
        report("PSCI_VERSION", 0, round, measure_smc([psci::VERSION, 0, 0, 0]));
        report("unknown-SMC", 0, round, measure_smc([0xC300_FF00, 0, 0, 0]));

        for (pages, start) in SIZES.into_iter().zip((arena.start..).step_by(BLOCK as usize)) {
            measure_loads(start, pages);
            println!("bench touch {pages} {round}");
            for name in RANGE_CALLS {
                let [x0, x1, ..] = report(name, pages, round, measure_hvc([number(name), start, pages, 0]));
                check!(x0 == 0, "{name} of {pages} pages: {} at {x1:#x}", x0 as i64);
            }
        }
    }
    Ok(())
}

fn number(name: &str) -> u64 {
    CALLS.iter().find(|call| call.name == name).map_or(0, |call| call.number.into())
}

fn report(name: &str, pages: u64, round: u32, results: [u64; 4]) -> [u64; 4] {
    println!("bench {name} {pages} {round}");
    results
}

macro_rules! call_by {
    ($name:ident, $($instruction:literal),+) => {
        #[expect(unsafe_code, reason = "nothing but the call may run between the marks")]
        fn $name([x0, x1, x2, x3]: [u64; 4]) -> [u64; 4] {
            let (r0, r1, r2, r3);
            // SAFETY: A call changes x0 to x3 only, and gives away memory of the arena only.
            unsafe {
                asm!(
                    $($instruction,)+
                    inlateout("x0") x0 => r0, inlateout("x1") x1 => r1,
                    inlateout("x2") x2 => r2, inlateout("x3") x3 => r3,
                    options(nostack),
                );
            }
            [r0, r1, r2, r3]
        }
    };
}

call_by!(measure_hvc, "hint #0x40", "hvc #0", "hint #0x41");
call_by!(measure_smc, "hint #0x40", "smc #0", "hint #0x41");
call_by!(hvc, "hvc #0");

/// Runs `f` between marks. What it costs at EL2 is what it calls for.
#[expect(unsafe_code, reason = "marks")]
fn measured<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: A hint.
    unsafe { asm!("hint #0x40", options(nostack, preserves_flags)) };
    let done = f();
    // SAFETY: As above.
    unsafe { asm!("hint #0x41", options(nostack, preserves_flags)) };
    done
}

/// Reads from each page of a range.
#[expect(unsafe_code, reason = "nothing but the loads may run between the marks")]
fn measure_loads(start: u64, pages: u64) {
    // SAFETY: Aligned loads from the arena, which the host may access.
    unsafe {
        asm!(
            "hint #0x40",
            "2: ldr {value}, [{page}]",
            "add {page}, {page}, #4096",
            "subs {pages}, {pages}, #1",
            "b.ne 2b",
            "hint #0x41",
            page = inlateout(reg) start => _,
            pages = inlateout(reg) pages => _,
            value = out(reg) _,
            options(nostack),
        );
    }
}
