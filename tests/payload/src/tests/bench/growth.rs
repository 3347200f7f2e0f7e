//! How costs grow, with the size of a range and with the number of VMs.

use arrayvec::ArrayVec;
use ravelin_abi::{ExitReason, MAX_TAKE_BACK_PAGES, VmKind};
use spin::{Mutex, Once};

use super::{
    guests::{BLOCKS, Report, SINGLE, conversions, exits, touch, with_memory},
    measure_loads, measured,
};
use crate::{
    rt::{
        console::println,
        memory::{BLOCK, PAGE},
        vm::{Guest, MEMORY, PROTECTED, Pages, Stop, Vm, code::snippets, succeed},
    },
    tests::{Failure, Op, Outcome},
};

/// Size of the arena.
const ARENA: u64 = 128 << 20;

/// Numbers of pages that are measured.
const SIZES: [u64; 9] = [1, 4, 16, 64, 256, 512, 1024, 2048, 4096];

/// Numbers of VMs that are measured, to all that there can be.
const VMS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, MAX_VMS];
const MAX_VMS: usize = 255;

/// Guest addresses that are used for the first time.
const UNTOUCHED: u64 = MEMORY + (256 << 20);

snippets! {
    /// Loads two words of each of x1 pages from x0 on between marks; with LDP, which is no access to a device.
    touch_all: "hint #0x40", "4: ldp x2, x3, [x0]", "add x0, x0, #4096", "subs x1, x1, #1", "b.ne 4b", "hint #0x41";
}

/// Measures what takes ranges, of the host and of guests.
pub(crate) fn ranges() -> Outcome {
    println!();
    host_ranges()?;
    for kind in PROTECTED {
        guest_ranges(kind)?;
    }
    Ok(())
}

/// Every size has blocks of its own.
fn host_ranges() -> Outcome {
    let pages = Pages::new(ARENA);
    let mut ranges = ArrayVec::<_, { SIZES.len() }>::new();
    for count in SIZES {
        ranges.push((pages.take_aligned(count.next_multiple_of(512), 512)?, count));
    }
    for round in 0..2 {
        for &(start, count) in &ranges {
            measure_loads(start, count);
            println!("bench touch {count} {round}");
            for op in [Op::Share, Op::Unshare, Op::Donate, Op::TakeBack] {
                let most = if op == Op::TakeBack { MAX_TAKE_BACK_PAGES } else { count };
                measured(|| {
                    (0..count)
                        .step_by(most as usize)
                        .try_for_each(|first| op.succeeds(start + first * PAGE, most.min(count - first)))
                })?;
                println!("bench {} {count} {round}", op.name());
            }
        }
    }
    Ok(())
}

fn guest_ranges(kind: VmKind) -> Outcome {
    let pages = Pages::new(ARENA);
    let (vm, single, blocks) = with_memory(&pages, kind)?;
    let mut guest = vm.guest(0);
    // The first command takes more exits than others.
    guest.load(SINGLE)?;
    for round in 0..2 {
        let report = Report { kind, round, number: None };
        for count in SIZES {
            conversions(&mut guest, report, SINGLE, single, count)?;
            if count >= 512 {
                conversions(&mut guest, report, BLOCKS, blocks, count)?;
            }
        }
    }
    let mut at = UNTOUCHED;
    for count in SIZES {
        for block in [false, true] {
            if block && count < 512 {
                continue;
            }
            let address = pages.take_aligned(count + u64::from(!block), 512)? + if block { 0 } else { PAGE };
            touch_range(&mut guest, at, address, count)?;
            Report { kind, round: 1, number: None }.line("touch", block, count);
            vm.note(at, count);
            at = (at + count * PAGE).next_multiple_of(BLOCK);
        }
    }
    vm.finish()
}

/// First use of pages; the host puts in as many as one call can, at the first of them.
fn touch_range(guest: &mut Guest<'_>, at: u64, address: u64, count: u64) -> Outcome {
    guest.begin_code(touch_all(), &[at, count])?;
    loop {
        match guest.go()? {
            Stop::Done(_) => return Ok(()),
            Stop::Exit(exit) if exit.reason == ExitReason::PageFault.code() => {
                let offset = exit.address - at;
                let pages = (count - offset / PAGE).min(512);
                succeed("VM_MAP", [guest.vm.handle, exit.address, address + offset, pages])?;
            }
            Stop::Exit(exit) => return Err(Failure::new(format_args!("unexpected exit: {exit:x?}"))),
        }
    }
}

/// Measures what happens to a VM and to the host with ever more VMs around.
pub(crate) fn vms() -> Outcome {
    static PAGES: Once<Pages> = Once::new();
    static OTHERS: Mutex<ArrayVec<Vm<'static>, MAX_VMS>> = Mutex::new(ArrayVec::new_const());
    let pages = PAGES.call_once(|| Pages::new(ARENA));
    let mut others = OTHERS.lock();
    // The same each time.
    let own = Pages::beside(pages.mark(), ARENA, 2 * BLOCK)?;
    let mark = own.mark();
    println!();
    for count in VMS {
        while others.len() + 1 < count {
            others.push(Vm::boot(pages, VmKind::Pkvm, 1)?);
        }
        for round in 0..2 {
            with_vms(&own, count as u64, round)?;
            own.reset(mark);
        }
    }
    others.drain(..).try_for_each(|vm| vm.end())?;
    pages.are_owned()
}

/// The life of a VM while `count` VMs exist, with it.
fn with_vms(pages: &Pages, count: u64, round: u64) -> Outcome {
    let line = |name: &str| println!("bench {name} {count} {round}");
    let page = pages.take(1)?;
    measure_loads(page, 1);
    line("touch");
    for op in [Op::Share, Op::Unshare, Op::Donate, Op::TakeBack] {
        measured(|| op.succeeds(page, 1))?;
        line(op.name());
    }
    let report = Report { kind: VmKind::Pkvm, round, number: Some(count) };
    let vm = measured(|| Vm::create(pages, report.kind, 1))?;
    report.line("create", false, 0);
    measured(|| {
        vm.load()?;
        vm.add_vcpu()?;
        vm.seal()
    })?;
    report.line("start", false, 0);
    let address = vm.add(SINGLE, 1)?;
    let spare = pages.take(1)?;
    let mut guest = vm.guest(0);
    guest.load(SINGLE)?;
    exits(&mut guest, report)?;
    touch(&mut guest, report, SINGLE + PAGE, spare)?;
    vm.note(SINGLE + PAGE, 1);
    conversions(&mut guest, report, SINGLE, address, 1)?;
    measured(|| vm.end())?;
    report.line("destroy", false, 0);
    Ok(())
}
