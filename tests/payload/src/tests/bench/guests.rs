//! What guests cost: exits, conversions, pages.

use ravelin_abi::{ExitReason, VmKind};
use ravelin_guest::{DEVICE, OPERANDS};

use super::measured;
use crate::{
    rt::{
        console::println,
        memory::{BLOCK, PAGE},
        vm::{Guest, MEMORY, PROTECTED, Pages, Sizes, Vm, call, code::snippets},
    },
    tests::{Failure, Outcome, check, check_eq, guests::convert::convert_all},
};

const MIB: u64 = 1 << 20;

/// Numbers of pages that are measured.
const SIZES: [u64; 4] = [1, 16, 512, 4096];

/// Guest address of pages that are mapped one by one.
pub(super) const SINGLE: u64 = MEMORY;

/// Guest address of blocks.
pub(super) const BLOCKS: u64 = MEMORY + (64 << 20);

/// Guest address without a page, in a block that has tables.
const ABSENT: u64 = MEMORY + (128 << 20);

snippets! {
    /// Reads an ID register between marks.
    id_register: "hint #0x40", "mrs x0, id_aa64pfr0_el1", "hint #0x41";

    /// Loads a word between marks: x0 = address.
    load: "hint #0x40", "ldr x0, [x0]", "hint #0x41";

    /// Stores a word between marks: x0 = address.
    store: "hint #0x40", "str x1, [x0]", "hint #0x41";

    /// Loads two words between marks, which is no access to a device: x0 = address.
    load_pair: "hint #0x40", "ldp x0, x1, [x0]", "hint #0x41";

    /// Calls with x0 to x7 between marks.
    hvc: "hint #0x40", "hvc #0", "hint #0x41";

    /// Calls with x0 to x7 between marks.
    smc: "hint #0x40", "smc #0", "hint #0x41";

    /// Calls with x0 to x3 between marks until all x2 pages at x1 are done. Returns what the last call does.
    convert_by_hvc:
        "mov x8, x0", "mov x9, x1", "mov x10, x2",
        "hint #0x40",
        "5: mov x0, x8", "mov x1, x9", "mov x2, x10", "mov x3, xzr",
        "hvc #0",
        "cbnz x0, 6f",
        "add x9, x9, x1, lsl #12",
        "subs x10, x10, x1",
        "b.ne 5b",
        "6: hint #0x41";

    /// Calls with x0 to x4 between marks until all is done from x1 to x2. Returns what the last call does.
    convert_by_smc:
        "mov x8, x0", "mov x9, x1", "mov x10, x2", "mov x11, x3",
        "hint #0x40",
        "5: mov x0, x8", "mov x1, x9", "mov x2, x10", "mov x3, x11", "mov x4, xzr",
        "smc #0",
        "cbnz x0, 6f",
        "mov x9, x1",
        "cmp x9, x10",
        "b.ne 5b",
        "6: hint #0x41";
}

/// Measures both kinds of protected guests.
pub(crate) fn guests() -> Outcome {
    println!();
    for vcpus in [1, 8, 128] {
        let sizes = Sizes::of(Vm::attributes(VmKind::Pkvm, vcpus))?;
        println!("bench-vm {vcpus} {} {}", sizes.vm, sizes.vcpu);
    }
    for kind in PROTECTED {
        let pages = Pages::new(64 * MIB);
        let (vm, single, blocks) = with_memory(&pages, kind)?;
        let spare = pages.take(2)?;
        let mut guest = vm.guest(0);
        // The first command takes more exits than others.
        guest.load(SINGLE)?;
        for round in 0..2 {
            let report = Report { kind, round, number: None };
            exits(&mut guest, report)?;
            touch(&mut guest, report, ABSENT + round * PAGE, spare + round * PAGE)?;
            for count in SIZES {
                conversions(&mut guest, report, SINGLE, single, count)?;
                if count >= 512 {
                    conversions(&mut guest, report, BLOCKS, blocks, count)?;
                }
            }
        }
        vm.note(ABSENT, 2);
        vm.finish()?;
    }
    Ok(())
}

/// A VM with 4096 pages that are mapped one by one, and 4096 in blocks; returns where they are.
pub(super) fn with_memory(pages: &Pages, kind: VmKind) -> Result<(Vm<'_>, u64, u64), Failure> {
    let vm = Vm::boot(pages, kind, 1)?;
    vm.donate_tables(64)?;
    let blocks = pages.take_aligned(4096, 512)?;
    // Where no block can be.
    let single = pages.take_aligned(4096 + 1, 512)? + PAGE;
    vm.map(SINGLE, single, 4096)?;
    for block in 0..8 {
        vm.map(BLOCKS + block * BLOCK, blocks + block * BLOCK, 512)?;
    }
    Ok((vm, single, blocks))
}

/// Names measurements.
#[derive(Clone, Copy)]
pub(super) struct Report {
    pub(super) kind: VmKind,
    pub(super) round: u64,
    /// What is said in the place of the number of pages.
    pub(super) number: Option<u64>,
}

impl Report {
    pub(super) fn line(self, name: &str, blocks: bool, count: u64) {
        let kind = if self.kind == VmKind::Realm { "realm" } else { "pkvm" };
        let blocks = if blocks { "-blocks" } else { "" };
        println!("bench {kind}.{name}{blocks} {} {}", self.number.unwrap_or(count), self.round);
    }
}

/// Exits without pages.
pub(super) fn exits(guest: &mut Guest<'_>, report: Report) -> Outcome {
    guest.run(id_register(), &[])?;
    report.line("sysreg", false, 0);
    let (code, version) = match report.kind {
        VmKind::Realm => (smc(), 0xC400_0190),
        _ => (hvc(), 0xC600_0002),
    };
    // ABI_VERSION 1.0, or HYP_MEMINFO.
    let argument = if report.kind == VmKind::Realm { 1 << 16 } else { 0 };
    let [status, ..] = guest.run(code, &[version, argument])?;
    check!(status as i64 >= 0, "call {version:#x}: {status:#x}");
    report.line("call", false, 0);
    // Both are answered by the host.
    let device = guest.vm.shared(DEVICE) + OPERANDS;
    guest.run(load(), &[device])?;
    report.line("mmio-load", false, 0);
    let results = guest.vm.shared(DEVICE) + ravelin_guest::RESULTS;
    guest.run(store(), &[results])?;
    report.line("mmio-store", false, 0);
    Ok(())
}

/// First use of a page: fault, exit, donation, resumption.
pub(super) fn touch(guest: &mut Guest<'_>, report: Report, at: u64, page: u64) -> Outcome {
    guest.begin_code(load_pair(), &[at])?;
    let exit = guest.exit(ExitReason::PageFault)?;
    check_eq!(exit.address, at, "address of the fault");
    let (status, x) = call("VM_MAP", [guest.vm.handle, at, page, 1]);
    check_eq!(status.register(), 0, "VM_MAP {x:x?}");
    guest.finish()?;
    report.line("touch", false, 1);
    Ok(())
}

/// The way of pages to the host and back.
pub(super) fn conversions(guest: &mut Guest<'_>, report: Report, at: u64, address: u64, count: u64) -> Outcome {
    let blocks = at == BLOCKS;
    convert(guest, at, count, true)?;
    report.line("share", blocks, count);
    convert(guest, at, count, false)?;
    report.line("unshare", blocks, count);

    convert_all(guest, at, count, true)?;
    measured(|| host_calls("CLAIM", guest.vm, at, count, blocks))?;
    report.line("claim", blocks, count);
    // So that the host has it in its tables.
    for page in 0..count {
        let _ = crate::rt::memory::load(address + page * PAGE);
    }
    measured(|| host_calls("RELEASE", guest.vm, at, count, blocks))?;
    report.line("release", blocks, count);
    convert(guest, at, count, false)?;
    report.line("unshare-released", blocks, count);
    Ok(())
}

/// Converts pages between marks in as few calls as it takes.
fn convert(guest: &mut Guest<'_>, at: u64, count: u64, share: bool) -> Outcome {
    let arguments = guest.conversion(at, count, share);
    let code = if guest.vm.kind == VmKind::Realm { convert_by_smc() } else { convert_by_hvc() };
    let [status, ..] = guest.run(code, &arguments)?;
    check_eq!(status, 0, "conversion of {count} pages at {at:#x}");
    Ok(())
}

/// Makes a call of the host for all pages, in as few calls as it takes.
fn host_calls(name: &str, vm: &Vm<'_>, at: u64, count: u64, blocks: bool) -> Outcome {
    let most = if blocks { count } else { 512 };
    for first in (0..count).step_by(most as usize) {
        let some = most.min(count - first);
        let (status, [page, ..]) = call(name, [vm.handle, at + first * PAGE, some]);
        check!(status.register() == 0, "{name} of {some} pages: {} at {page:#x}", status.name());
    }
    Ok::<_, Failure>(())
}
