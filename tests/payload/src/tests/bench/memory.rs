//! How many translation tables conversions take.
//!
//! A line `bench-tables NAME PAGES HOST VM` names each step, how many pages it is about, by how many tables the host's stage 2
//! has grown, and by how many the VM's. The VM has pages for tables that it does not use yet; they are used up before and after
//! each step, so that what is counted is what the step used.

use ravelin_abi::{Status, VmKind};

use crate::{
    rt::{
        console::println,
        memory::{self, BLOCK, PAGE},
        vm::{Guest, MEMORY, PROTECTED, Pages, Vm, call},
    },
    tests::{Failure, Outcome, check, guests::convert::convert_all, statistics},
};

const MIB: u64 = 1 << 20;

/// Number of blocks that are measured together.
const BLOCKS: u64 = 8;

/// Guest address of the blocks of which one page is converted.
const ONE_PAGE: u64 = MEMORY;

/// Guest address of the blocks that are converted whole.
const WHOLE: u64 = ONE_PAGE + BLOCKS * BLOCK;

/// Guest address of pages that are mapped one by one.
const SINGLE: u64 = MEMORY + (64 << 20);

/// Guest addresses where a page takes one table, and how many: in the same GiB.
const SPARE: u64 = MEMORY + (128 << 20);
const SPARES: u64 = 256;

/// Measures both kinds of protected guests.
pub(crate) fn memory() -> Outcome {
    println!();
    for kind in PROTECTED {
        let pages = Pages::new(64 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        vm.note(SPARE, SPARES * 512);
        let mut steps = Steps { vm: &vm, pages: &pages, spares: 0 };
        let mut guest = vm.guest(0);
        let blocks = pages.take_aligned(2 * BLOCKS * 512, 512)?;
        let whole = blocks + BLOCKS * BLOCK;
        // Where no block can be.
        let single = pages.take_aligned(BLOCKS * 512 + 1, 512)? + PAGE;
        steps.step("map-blocks", 2 * BLOCKS * 512, || vm.map(ONE_PAGE, blocks, 2 * BLOCKS * 512))?;
        steps.step("map-pages", BLOCKS * 512, || vm.map(SINGLE, single, BLOCKS * 512))?;
        steps.step("convert-one-page-of-each-block", BLOCKS, || {
            let mut offsets = (0..BLOCKS).map(|block| block * BLOCK);
            offsets.try_for_each(|offset| convert(&mut guest, ONE_PAGE + offset, blocks + offset, 1))
        })?;
        steps.step("convert-blocks", BLOCKS * 512, || convert(&mut guest, WHOLE, whole, BLOCKS * 512))?;
        steps.step("convert-pages", BLOCKS * 512, || convert(&mut guest, SINGLE, single, BLOCKS * 512))?;
        vm.finish()?;
    }
    Ok(())
}

/// What measures steps.
struct Steps<'a> {
    vm: &'a Vm<'a>,
    pages: &'a Pages,
    /// Pages that have been mapped to use up tables.
    spares: u64,
}

impl Steps<'_> {
    /// Does one step and says what it took.
    fn step(&mut self, name: &str, pages: u64, work: impl FnOnce() -> Outcome) -> Outcome {
        self.use_up()?;
        let before = statistics()?;
        work()?;
        let after = statistics()?;
        let given = after.vm_pages - before.vm_pages;
        let [host, vm] = [after.host_tables as i64 - before.host_tables as i64, given as i64 - self.use_up()? as i64];
        let kind = if self.vm.kind == VmKind::Realm { "realm" } else { "pkvm" };
        println!("bench-tables {kind}.{name} {pages} {host} {vm}");
        Ok(())
    }

    /// Maps pages, each of which takes a table, until there are too few left for one more. Returns how many there were.
    fn use_up(&mut self) -> Result<u64, Failure> {
        let first = self.spares;
        loop {
            check!(self.spares < SPARES, "there are tables left after {SPARES} pages");
            let mark = self.pages.mark();
            let page = self.pages.take(1)?;
            match call("VM_MAP", [self.vm.handle, SPARE + self.spares * BLOCK, page, 1]).0 {
                Status::Success => self.spares += 1,
                Status::NeedsTables => {
                    self.pages.reset(mark);
                    return Ok(self.spares - first);
                }
                status => return Err(Failure::new(format_args!("VM_MAP of a page: {}", status.name()))),
            }
        }
    }
}

/// Has the guest share pages, and the host claim and touch them.
fn convert(guest: &mut Guest<'_>, at: u64, address: u64, count: u64) -> Outcome {
    convert_all(guest, at, count, true)?;
    for offset in (0..count).step_by(512) {
        guest.vm.claim(at + offset * PAGE, (count - offset).min(512))?;
    }
    for page in 0..count {
        let _ = memory::load(address + page * PAGE);
    }
    Ok(())
}
