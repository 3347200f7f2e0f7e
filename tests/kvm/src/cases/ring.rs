//! Rings: what the module makes of conversions that come with any exit.

use nix::unistd::{pipe, read};
use ravelin_abi::{ConversionRequest, RING_DONE, RING_RESULTS};
use ravelin_guest::DEVICE;

use super::cases;
use super::memfd::punch;
use super::pins::splice_into_pipe;
use crate::check::{Outcome, check_eq, works};
use crate::guest::{Guest, snippets};
use crate::kvm::{Exit, Kind};
use crate::machine::{MEMORY, Machine, Plan};
use crate::memory::PAGE;

cases! {
    references[&[Kind::Pkvm]];
    asked[&[Kind::Pkvm]];
    before_the_guest_goes_on[&[Kind::Pkvm]];
}

const P: u64 = PAGE as u64;

/// Pages that are converted, at [`MEMORY`]. The ring is behind them.
const PAGES: u64 = 4;
const RING: u64 = MEMORY + PAGES * P;

/// A device that the case plays.
const BELL: u64 = DEVICE + P;

const REFUSED: u64 = u64::MAX - 2;

snippets! {
    /// Posts words in the ring at x0: x2 of them, from x1 on, each for the page behind that of the one before. Then rings at x3.
    post_and_ring:
        "ldr x9, [x0]", "add x11, x0, #1024",
        "4: and x10, x9, #63", "str x1, [x11, x10, lsl #3]",
        "add x9, x9, #1", "add x1, x1, #4096",
        "subs x2, x2, #1", "b.ne 4b",
        "stlr x9, [x0]", "str x9, [x3]";
}

/// Lets the guest post a conversion for each page. It is at the bell then.
fn post(guest: &mut Guest<'_>, unshare: bool) -> Outcome {
    let first = ConversionRequest { address: MEMORY, pages: 1, unshare }.word();
    guest.begin_code(post_and_ring(), &[RING, first, PAGES, BELL])?;
    let rings = matches!(guest.exit()?, Exit::Mmio { address: BELL, write: true, .. });
    anyhow::ensure!(rings, "the guest does not ring");
    Ok(())
}

/// Lets the guest go on, and checks the results of its last conversions.
fn results(guest: &mut Guest<'_>, done: u64, expected: [u64; PAGES as usize]) -> Outcome {
    guest.finish()?;
    check_eq!(guest.load(RING + RING_DONE as u64)?, done, "conversions that are complete");
    for (number, expected) in (done - PAGES..).zip(expected) {
        let result = guest.load(RING + RING_RESULTS as u64 + number % 64 * 8)?;
        check_eq!(result, expected, "result of conversion {number}");
    }
    Ok(())
}

/// A guest whose ring has shared pages that the host has used.
fn shared(machine: &Machine) -> Outcome<Guest<'_>> {
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, PAGES, 0, 9)?;
    guest.attach_ring(RING)?;
    machine.memory.mapping.check_bus_error(0)?;
    post(&mut guest, false)?;
    // The exit that is the bell has shared them already.
    machine.memory.mapping.check_pattern(0, PAGES as usize, 0, 9)?;
    results(&mut guest, PAGES, [0; PAGES as usize])?;
    Ok(guest)
}

/// A page that somebody refers to is refused, and no other.
fn references(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize + 1).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = shared(&machine)?;
    let (output, input) = works("pipe", pipe())?;
    splice_into_pipe(mapping, PAGE, &input)?;
    post(&mut guest, true)?;
    results(&mut guest, 2 * PAGES, [0, REFUSED, 0, 0])?;
    for page in [0, 2, 3] {
        mapping.check_bus_error(page * PAGE)?;
    }
    mapping.check_pattern(PAGE, 1, P, 9)?;
    check_eq!(read(&output, &mut vec![0; PAGE]), Ok(PAGE), "read from the pipe");
    post(&mut guest, true)?;
    results(&mut guest, 3 * PAGES, [REFUSED, 0, REFUSED, REFUSED])?;
    mapping.check_bus_error(PAGE)?;
    guest.check(MEMORY, PAGES, 0, 9)
}

/// A VMM that wants to be asked is not passed over: the guest has to call.
fn asked(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize + 1).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = shared(&machine)?;
    machine.vm.tell_of_conversions()?;
    post(&mut guest, true)?;
    results(&mut guest, 2 * PAGES, [REFUSED; PAGES as usize])?;
    mapping.check_pattern(0, PAGES as usize, 0, 9)?;
    guest.check(MEMORY, PAGES, 0, 9)
}

/// What the guest takes back is not there for the host from the exit on; the host may still take it by force.
fn before_the_guest_goes_on(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize + 1).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = shared(&machine)?;
    post(&mut guest, true)?;
    mapping.check_bus_error(0)?;
    works("PUNCH_HOLE", punch(machine.memory.file()?, P, P))?;
    results(&mut guest, 2 * PAGES, [0, REFUSED, 0, 0])?;
    for page in [0, 2, 3] {
        mapping.check_bus_error(page * PAGE)?;
        guest.check(MEMORY + page as u64 * P, 1, page as u64 * P, 9)?;
    }
    Ok(())
}
