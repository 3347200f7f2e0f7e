//! What a protected guest costs, between marks that QEMU's counter sees: `HINT #0x40` and `HINT #0x41`. Elsewhere they are NOPs.
//!
//! A line `bench NAME PAGES` names each measurement, in the order of the marks. The same program runs on pKVM, whose guests
//! convert page by page, and whose memory is not a guest_memfd's.

use core::arch::asm;

use ravelin_guest::{DEVICE, OPERANDS, RESULTS};

use super::cases;
use super::irq::{DOORBELL, event, set_doorbell};
use crate::check::{Outcome, check_eq, works};
use crate::guest::{Guest, snippets};
use crate::kvm::{self, Kind};
use crate::machine::{Backing, MEMORY, Plan};
use crate::memory::PAGE;
use crate::runner::line;

cases! {
    costs[&[Kind::Pkvm]].seconds(280).long();
}

/// How often each operation is measured: interrupts of the host come between.
const ROUNDS: u64 = 4;

/// Numbers of pages that are converted.
const SIZES: [u64; 3] = [1, 16, 512];

/// Pages of a VM that is destroyed, which go back to the host one way or the other.
const WITH_MEMORY: usize = 512;

/// Bytes that each number of pages has for itself, so that it meets no pages that another one has left behind.
const REGION: u64 = 2 << 20;

const MEMINFO: u64 = 0xc600_0002;
const SHARE: u64 = 0xc600_0003;
const UNSHARE: u64 = 0xc600_0004;

snippets! {
    /// Loads a word: x0 = address.
    load: "hint #0x40", "ldr x0, [x0]", "hint #0x41";

    /// Stores a word: x0 = address.
    store: "hint #0x40", "str x1, [x0]", "hint #0x41";

    /// Loads a word of each of x1 pages from x0 on.
    touch: "hint #0x40", "4: ldr x2, [x0]", "add x0, x0, #4096", "subs x1, x1, #1", "b.ne 4b", "hint #0x41";

    /// Calls with x0 to x3.
    call: "hint #0x40", "hvc #0", "hint #0x41";

    /// Makes the call x0 for each of x2 pages from x1 on. Returns the last result.
    each_page:
        "mov x8, x0", "mov x9, x1", "mov x10, x2",
        "hint #0x40",
        "4: mov x0, x8", "mov x1, x9", "mov x2, xzr", "mov x3, xzr",
        "hvc #0",
        "cbnz x0, 5f",
        "add x9, x9, #4096",
        "subs x10, x10, #1",
        "b.ne 4b",
        "5: hint #0x41";
}

/// A mark of this process.
macro_rules! mark {
    ($hint:literal) => {
        // SAFETY: A hint.
        unsafe { asm!(concat!("hint #", $hint), options(nostack, preserves_flags)) }
    };
}

fn costs(kind: Kind) -> Outcome {
    let backing = if kvm::is_ravelin() { Backing::Memfd } else { Backing::Anonymous };
    let small = Plan::new(kind, 1).backing(backing);
    for _ in 0..ROUNDS {
        mark!("0x40");
        let machine = small.build()?;
        machine.boot()?;
        mark!("0x41");
        line("bench create 0");
        mark!("0x40");
        drop(machine);
        mark!("0x41");
        line("bench destroy 0");
    }
    for _ in 0..ROUNDS {
        let machine = Plan::new(kind, WITH_MEMORY).backing(backing).build()?;
        machine.boot()?.fill(MEMORY, WITH_MEMORY as u64, 0, 0)?;
        mark!("0x40");
        drop(machine);
        mark!("0x41");
        line(&format!("bench destroy {WITH_MEMORY}"));
    }
    let mut regions = (MEMORY..).step_by(usize::try_from(REGION)?);
    let pages = ROUNDS * SIZES.len() as u64 * REGION / PAGE as u64;
    let machine = Plan::new(kind, usize::try_from(pages)?).backing(backing).build()?;
    let doorbell = event()?;
    works("KVM_IOEVENTFD", set_doorbell(&machine.vm, &doorbell, DOORBELL, 0, 0, 0))?;
    let mut guest = machine.boot()?;
    let ranges = guest.call(&[MEMINFO])?[1] & 1 != 0;
    let convert = if ranges { call() } else { each_page() };
    for _ in 0..ROUNDS {
        exits(&mut guest)?;
        for (count, at) in SIZES.into_iter().zip(&mut regions) {
            guest.run(touch(), &[at, count])?;
            line(&format!("bench touch {count}"));
            guest.fill(at, REGION / PAGE as u64, 0, 0)?;
            for name in ["share", "unshare", "share", "unshare"] {
                let number = if name == "share" { SHARE } else { UNSHARE };
                let [status, ..] = guest.run(convert, &[number, at, count])?;
                check_eq!(status, 0, "{name} of {count} pages at {at:#x}");
                line(&format!("bench {name} {count}"));
            }
        }
    }
    Ok(())
}

/// Exits without pages.
fn exits(guest: &mut Guest<'_>) -> Outcome {
    guest.run(call(), &[MEMINFO])?;
    line("bench call 0");
    let device = guest.kind.shared(DEVICE);
    guest.run(load(), &[device + OPERANDS])?;
    line("bench mmio-load 0");
    guest.run(store(), &[device + RESULTS])?;
    line("bench mmio-store 0");
    guest.run(store(), &[guest.kind.shared(DOORBELL)])?;
    line("bench mmio-kernel 0");
    Ok(())
}
