//! Hosts and guests that do what they must not.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ravelin_abi::{Answer, ExitReason, Status, VmKind};
use ravelin_guest::DEVICE;
use spin::Mutex;

use crate::{
    rt::{
        call::{self as registers, Instruction, Registers},
        cpu,
        memory::{self, BLOCK, PAGE},
        platform::platform,
        probe::Access,
        vm::{
            Conversion, DISTRIBUTOR, Guest, IPA_BITS, MEMORY, PROTECTED, Pages, REDISTRIBUTORS, Sizes, Stop, Vm, call,
            code, refused, succeed,
        },
    },
    tests::{
        Failure, NO_PAGE, OWNED, Outcome,
        abort::is_denied,
        check, check_eq, check_state, for_a_while,
        guests::convert::{CLAIMED, host_fills, host_is_denied},
        on_all_cpus, on_each_cpu, page_counts, state,
    },
};

const MIB: u64 = 1 << 20;

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

/// Every access of the host to what it has given to a VM is an abort: memory, private and offered, and what VM, vCPUs and tables
/// are made of.
pub(crate) fn host_touches_what_it_gave() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let sizes = Sizes::of(Vm::attributes(kind, 1))?;
        let vm_pages = pages.take_aligned(0, sizes.align)?;
        let vm = Vm::boot(&pages, kind, 1)?;
        let address = vm.add(MEMORY, 4)?;
        let mut guest = vm.guest(0);
        guest.fill(MEMORY, 4, address, 1)?;
        guest.share(MEMORY + PAGE, 1)?;
        let run_page = vm.run_page(0);
        on_each_cpu(|_| {
            for page in [address, address + PAGE, address + 3 * PAGE] {
                for access in EVERY_ACCESS {
                    is_denied(access, page + 0x7c0)?;
                }
            }
            // From the first page of the VM to the last of its memory all is out of reach, but for the run page.
            for page in (vm_pages..pages.mark()).step_by(PAGE as usize).filter(|&page| page != run_page) {
                is_denied(Access::Read, page)?;
                is_denied(Access::Write(0), page)?;
            }
            Ok(())
        })?;
        guest.compare(MEMORY, 1, address, 1)?;
        guest.compare(vm.shared(MEMORY + PAGE), 1, address + PAGE, 1)?;
        vm.finish()?;
    }
    Ok(())
}

/// The host gives away what is not its own any more: twice, to two VMs, to the hypervisor, as metadata, tables or a run page.
pub(crate) fn host_gives_twice() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(8 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let other = Vm::create(&pages, VmKind::Pkvm, 2)?;
        let ordinary = Vm::create(&pages, VmKind::Ordinary, 1)?;
        let address = vm.add(MEMORY, 8)?;
        let sizes = Sizes::of(Vm::attributes(kind, 1))?;
        let spare = pages.take_aligned(32, 32)?;
        let mut guest = vm.guest(0);
        guest.fill(MEMORY, 8, address, 2)?;
        guest.share(MEMORY + PAGE, 2)?;
        vm.claim(MEMORY + 2 * PAGE, 1)?;
        let attributes = Vm::attributes(kind, 1).bits();
        let before = page_counts()?;
        // Private, offered, claimed.
        for page in [address, address + PAGE, address + 2 * PAGE] {
            for name in ["SHARE", "UNSHARE", "DONATE", "TAKE_BACK", "PIN", "UNPIN"] {
                check_eq!(refused(name, [page, 1, 0], Status::Denied)?, page, "the page that is named");
            }
            for vm in [&vm, &other, &ordinary] {
                refused("VM_MAP", [vm.handle, MEMORY + BLOCK, page, 1], Status::Denied)?;
                refused("VM_DONATE_TABLES", [vm.handle, page, 1], Status::Denied)?;
            }
            refused("VM_MAP", [vm.handle, MEMORY, page, 1], Status::Denied)?;
            refused("VCPU_CREATE", [other.handle, 0, page, sizes.vcpu, spare], Status::Denied)?;
            refused("VCPU_CREATE", [other.handle, 0, spare, sizes.vcpu, page], Status::Denied)?;
            refused("STATISTICS", [page, 0], Status::Denied)?;
        }
        check_eq!(refused("VM_CREATE", [attributes, address, sizes.vm], Status::Denied)?, address, "the page");
        check_eq!(page_counts()?, before, "pages by state");
        guest.compare(MEMORY, 1, address, 2)?;
        vm.release(MEMORY + 2 * PAGE, 1)?;
        drop(other);
        drop(ordinary);
        vm.finish()?;
    }
    Ok(())
}

/// What is no memory cannot be given: devices, holes, what lies behind the end of RAM, by itself and in a range.
pub(crate) fn host_gives_what_is_no_memory() -> Outcome {
    let end = platform().ram.iter().chain(&platform().carve_out).map(|region| region.end).max().unwrap_or(0);
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        vm.donate_tables(4)?;
        let other = Vm::create(&pages, VmKind::Pkvm, 1)?;
        let sizes = Sizes::of(Vm::attributes(VmKind::Pkvm, 1))?;
        let spare = pages.take(sizes.vcpu)?;
        let before = page_counts()?;
        for address in [0x800_0000, 0x80a_0000, 0x900_0000, end, end + BLOCK, 0x80_0000_0000] {
            for named in [
                refused("VM_MAP", [vm.handle, MEMORY, address, 1], Status::NotRam)?,
                refused("VM_MAP", [vm.handle, MEMORY, address, 512], Status::NotRam)?,
                refused("VM_DONATE_TABLES", [vm.handle, address, 1], Status::NotRam)?,
                refused("VCPU_CREATE", [other.handle, 0, spare, sizes.vcpu, address], Status::NotRam)?,
                refused("VCPU_CREATE", [other.handle, 0, address, sizes.vcpu, spare], Status::NotRam)?,
            ] {
                check_eq!(named, address, "the page that is named");
            }
        }
        check_eq!(page_counts()?, before, "pages by state");
        drop(other);
        vm.finish()?;
    }
    Ok(())
}

/// Memory where there is some already, private or shared or poisoned, and where the interrupt controller is.
pub(crate) fn host_maps_over() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(8 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        vm.donate_tables(8)?;
        let address = vm.add(MEMORY, 4)?;
        let spare = pages.take_aligned(512, 512)?;
        let mut guest = vm.guest(0);
        guest.fill(MEMORY, 4, address, 3)?;
        guest.share(MEMORY + PAGE, 2)?;
        vm.claim(MEMORY + 2 * PAGE, 1)?;
        succeed("FORCE_RECLAIM", [address + 3 * PAGE, 1])?;
        for (page, status) in [(0, Status::Exists), (1, Status::Exists), (2, Status::Exists), (3, Status::Poisoned)] {
            refused("VM_MAP", [vm.handle, MEMORY + page * PAGE, spare, 1], status)?;
        }
        // As part of a range, and of a block.
        refused("VM_MAP", [vm.handle, MEMORY - PAGE, spare, 2], Status::Exists)?;
        refused("VM_MAP", [vm.handle, MEMORY, spare, 512], Status::Exists)?;
        refused("VM_MAP", [vm.handle, MEMORY + 3 * PAGE, spare, 2], Status::Poisoned)?;
        for at in [DISTRIBUTOR, DISTRIBUTOR + 0xf000, REDISTRIBUTORS, REDISTRIBUTORS + 0x1_f000] {
            refused("VM_MAP", [vm.handle, at, spare, 1], Status::Exists)?;
        }
        refused("VM_MAP", [vm.handle, DISTRIBUTOR - PAGE, spare, 2], Status::Exists)?;
        if kind == VmKind::Realm {
            // The other half of a realm's addresses has no frames.
            refused("VM_MAP", [vm.handle, vm.shared(MEMORY + BLOCK), spare, 1], Status::Overflow)?;
        }
        check_state(spare, 512, OWNED)?;
        guest.compare(MEMORY, 1, address, 3)?;
        vm.release(MEMORY + 2 * PAGE, 1)?;
        vm.finish()?;
    }
    Ok(())
}

/// Claims of what is not offered, releases of what is not claimed.
pub(crate) fn host_claims_and_releases_what_it_may_not() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(8 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let other = Vm::create(&pages, kind, 1)?;
        let address = vm.add(MEMORY, 8)?;
        let mut guest = vm.guest(0);
        let claim = |at: u64, count, status| refused("CLAIM", [vm.handle, at, count], status);
        let release = |at: u64, count, status| refused("RELEASE", [vm.handle, at, count], status);
        check_eq!(claim(MEMORY, 1, Status::NotOffered)?, MEMORY, "the frame that is named");
        release(MEMORY, 1, Status::Denied)?;
        claim(MEMORY + BLOCK, 1, Status::Absent)?;
        release(MEMORY + BLOCK, 1, Status::Absent)?;
        guest.share(MEMORY + PAGE, 3)?;
        // Pages 1, 2 and 3 are offered.
        check_eq!(claim(MEMORY, 2, Status::NotOffered)?, MEMORY, "the frame that is named");
        check_eq!(claim(MEMORY + PAGE, 4, Status::NotOffered)?, MEMORY + 4 * PAGE, "the frame that is named");
        check_state(address, 8, NO_PAGE)?;
        release(MEMORY + PAGE, 3, Status::Denied)?;
        vm.claim(MEMORY + 2 * PAGE, 1)?;
        check_eq!(claim(MEMORY + PAGE, 3, Status::Denied)?, MEMORY + 2 * PAGE, "the frame that is named");
        check_eq!(claim(MEMORY + 2 * PAGE, 1, Status::Denied)?, MEMORY + 2 * PAGE, "the frame that is named");
        check_eq!(release(MEMORY + 2 * PAGE, 2, Status::Denied)?, MEMORY + 3 * PAGE, "the frame that is named");
        check_eq!(state(address + 2 * PAGE)?, CLAIMED, "the claimed page");
        check_eq!(state(address + PAGE)?, NO_PAGE, "the page that was not claimed");
        // By another VM.
        refused("CLAIM", [other.handle, MEMORY + PAGE, 1], Status::Absent)?;
        refused("RELEASE", [other.handle, MEMORY + 2 * PAGE, 1], Status::Absent)?;
        if kind == VmKind::Realm {
            // Frames have one number.
            claim(vm.shared(MEMORY + PAGE), 1, Status::Overflow)?;
        }
        claim((1 << IPA_BITS) - PAGE, 2, Status::Overflow)?;
        vm.release(MEMORY + 2 * PAGE, 1)?;
        release(MEMORY + 2 * PAGE, 1, Status::Denied)?;
        drop(other);
        vm.finish()?;
    }
    Ok(())
}

/// The host cannot share or take back on the guest's behalf, nor has it any call of the guest's.
pub(crate) fn host_speaks_for_the_guest() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    vm.add(MEMORY, 1)?;
    for function in [0xc600_0002, 0xc600_0003, 0xc600_0004, 0xc600_0007, 0xc600_0009, 0xc400_0197, 0xc400_0199] {
        for instruction in [Instruction::Hvc, Instruction::Smc] {
            let before = Registers::with([function, MEMORY, 1, 0]);
            let after = registers::call(instruction, before);
            check_eq!(after.0[0], u64::MAX, "{function:#x} by the host");
        }
    }
    refused("CLAIM", [vm.handle, MEMORY, 1], Status::NotOffered)?;
    vm.finish()
}

/// A guest shares, takes back and gives up what it does not have.
pub(crate) fn guest_converts_what_it_may_not() -> Outcome {
    const RELINQUISH: u64 = 0xc600_0009;
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let address = vm.add(MEMORY, 4)?;
        let mut guest = vm.guest(0);
        guest.fill(MEMORY, 4, address, 5)?;
        let before = page_counts()?;
        let bits = if kind == VmKind::Realm { IPA_BITS - 1 } else { IPA_BITS };
        let end = 1_u64 << bits;
        for share in [true, false] {
            for (at, count) in [(end, 1), (end - PAGE, 2), (u64::MAX << 12, 1), (1 << 52, 1), (MEMORY + 8, 1)] {
                check_eq!(guest.convert(at, count, share)?, Conversion::Refused, "{count} pages at {at:#x}");
            }
        }
        for registers in match kind {
            VmKind::Realm => [
                [0xc400_0197, MEMORY, MEMORY, 0, 0],
                [0xc400_0197, MEMORY + PAGE, MEMORY, 0, 0],
                [0xc400_0197, MEMORY, MEMORY + PAGE, 2, 0],
                [0xc400_0197, MEMORY, MEMORY + 8, 0, 0],
            ],
            _ => [
                [0xc600_0003, MEMORY, u64::MAX, 0, 0],
                [0xc600_0003, MEMORY, (1 << 18) + 1, 0, 0],
                [0xc600_0003, MEMORY, 1, 1, 0],
                [0xc600_0004, MEMORY, 1 << 52, 0, 0],
            ],
        } {
            check!(guest.call(&registers)?[0] != 0, "a call with {registers:x?} succeeds");
        }
        if kind == VmKind::Pkvm {
            // Twice, and what was never shared; a realm's IPA_STATE_SET is about states, not about changes.
            check_eq!(guest.convert(MEMORY, 1, false)?, Conversion::Refused, "unshare of a private page");
            guest.share(MEMORY, 1)?;
            check_eq!(guest.convert(MEMORY, 1, true)?, Conversion::Refused, "share of a shared page");
            check_eq!(guest.convert(MEMORY, 4, true)?, Conversion::Refused, "share of pages of which one is shared");
            check_eq!(guest.call(&[RELINQUISH, MEMORY, 1])?[0], u64::MAX - 2, "MEM_RELINQUISH of a shared page");
            guest.unshare(MEMORY, 1)?;
            check_eq!(guest.convert(MEMORY, 1, false)?, Conversion::Refused, "unshare of a private page");
            check_eq!(guest.call(&[RELINQUISH, MEMORY + BLOCK, 1])?[0], u64::MAX - 2, "MEM_RELINQUISH of nothing");
            for at in [DEVICE, DISTRIBUTOR] {
                // The host may say that there is a page; until it does, nothing happens.
                guest.begin_call(&[0xc600_0003, at, 1, 0])?;
                match guest.go()? {
                    Stop::Exit(exit) => {
                        check_eq!(exit.reason, ExitReason::PageFault.code(), "share of a device");
                        guest.answer(Answer::Abort, 0);
                        check!(guest.finish()?.x[0] != 0, "share of a device succeeds");
                    }
                    Stop::Done(reply) => check!(reply.x[0] != 0, "share of a device succeeds"),
                }
            }
        }
        check_eq!(page_counts()?, before, "pages by state");
        guest.compare(MEMORY, 4, address, 5)?;
        vm.finish()?;
    }
    Ok(())
}

code::snippets! {
    /// Invalidates its own TLB entries, those of all address spaces, and caches.
    maintain_own:
        "tlbi vmalle1is", "tlbi vmalle1", "tlbi aside1is, x0", "tlbi vaae1is, x0", "tlbi vaale1is, x0", "dsb ish",
        "ic iallu", "ic ialluis", "dsb ish", "isb";

    /// By set and way.
    clean_by_set_and_way: "dc csw, x0";
    invalidate_by_set_and_way: "dc isw, x0";
    clean_and_invalidate_by_set_and_way: "dc cisw, x0";

    /// What is for EL2.
    invalidate_all_of_stage_2: "tlbi vmalls12e1is";
    invalidate_all_of_el1: "tlbi alle1is";
    invalidate_by_ipa: "tlbi ipas2e1is, x0";
    invalidate_el2: "tlbi alle2is";
    read_hcr: "mrs x0, hcr_el2";
    read_vttbr: "mrs x0, vttbr_el2";
    write_list_register: "msr s3_4_c12_c12_0, x0";
    read_el2_vectors: "mrs x0, vbar_el2";
}

/// Maintenance that a guest may do, and what is not for it. None of it harms others.
pub(crate) fn guest_maintains_caches_and_tlbs() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(8 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let neighbour = Vm::boot(&pages, VmKind::Pkvm, 1)?;
        let address = neighbour.add(MEMORY, 2)?;
        let mut other = neighbour.guest(0);
        other.fill(MEMORY, 2, address, 6)?;
        let host = pages.take(1)?;
        host_fills(host, 1, 6);
        let mut guest = vm.guest(0);
        for operand in [0, 1 << 48, u64::MAX] {
            guest.run(maintain_own(), &[operand])?;
        }
        for code in [
            invalidate_all_of_stage_2(),
            invalidate_all_of_el1(),
            invalidate_by_ipa(),
            invalidate_el2(),
            read_hcr(),
            read_vttbr(),
            write_list_register(),
            read_el2_vectors(),
        ] {
            let exception = guest.fails(code, &[0])?;
            check!(exception.is_undefined(), "what is for EL2: {exception:x?}");
        }
        // Defined or not, they do nothing to others.
        for code in [clean_by_set_and_way(), invalidate_by_set_and_way(), clean_and_invalidate_by_set_and_way()] {
            for operand in [0, 1 << 6, u64::MAX] {
                guest.attempt(code, &[operand])?;
            }
        }
        other.compare(MEMORY, 2, address, 6)?;
        check_eq!(memory::find_difference(host, 6), None, "the host's page");
        neighbour.end()?;
        vm.finish()?;
    }
    Ok(())
}

/// A guest reaches for memory that is not its own: what the host has, what the hypervisor has, what there is not.
pub(crate) fn guest_touches_what_is_not_its_own() -> Outcome {
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let host = pages.take(1)?;
        memory::store(host, 7);
        let mut guest = vm.guest(0);
        let carve_out = platform().carve_out.map_or(host, |region| region.start);
        // Those addresses are guest addresses like any: the host is asked for memory, or plays a device.
        for address in [host, carve_out, vm.pages.mark() - PAGE] {
            guest.begin_code(code::load_pair(), &[address])?;
            let exit = guest.exit(ExitReason::PageFault)?;
            check_eq!(exit.address, address & !0xfff, "the address that is asked for");
            guest.answer(Answer::Abort, 0);
            check!(guest.finish()?.exception.is_some(), "the guest reads {address:#x}");
        }
        // Beyond its addresses there is nothing.
        for address in [1 << IPA_BITS, 1 << 38, (1 << 39) - 8] {
            check!(guest.attempt(code::load_pair(), &[address])?.exception.is_some(), "the guest reads {address:#x}");
        }
        check_eq!(memory::load(host), 7, "the host's page");
        vm.finish()?;
    }
    Ok(())
}

/// Conversions of the guest while the host claims, releases and takes by force on another CPU: whatever succeeds, the two agree at
/// the end.
pub(crate) fn conversions_race() -> Outcome {
    const COUNT: u64 = 4;
    for kind in PROTECTED {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let address = vm.add(MEMORY, COUNT)?;
        let mut guest = vm.guest(0);
        guest.fill(MEMORY, COUNT, address, 8)?;
        let stop = AtomicBool::new(false);
        let failure = Mutex::new(Ok(()));
        let claim = |_: usize| {
            let mut round = 0_u64;
            while !stop.load(Ordering::Acquire) {
                let at = MEMORY + round % COUNT * PAGE;
                round += 1;
                if call("CLAIM", [vm.handle, at, 1]).0 == Status::Success {
                    // While it is claimed it is there.
                    let page = address + (at - MEMORY);
                    let found = memory::load(page);
                    if found != memory::pattern(page, 0, 8) {
                        *failure.lock() = Err(Failure::new(format_args!("{page:#x} holds {found:#x}")));
                    }
                    let (status, _) = call("RELEASE", [vm.handle, at, 1]);
                    if status != Status::Success {
                        *failure.lock() = Err(Failure::new(format_args!("RELEASE: {}", status.name())));
                    }
                }
            }
        };
        let mut rounds = for_a_while(100);
        let outcome = cpu::run_on(&[1], &claim, || {
            let outcome = rounds.try_for_each(|round| race_round(&mut guest, COUNT, round));
            stop.store(true, Ordering::Release);
            outcome
        });
        outcome?;
        failure.into_inner()?;
        guest.compare(MEMORY, COUNT, address, 8)?;
        host_is_denied(address, COUNT)?;
        vm.finish()?;
    }
    Ok(())
}

/// Shares and takes back, waiting for the host to release what it has claimed.
fn race_round(guest: &mut Guest<'_>, count: u64, round: u64) -> Outcome {
    let (mut done, mut asked) = (0, 0);
    guest.share(MEMORY, count)?;
    while done < count {
        let at = MEMORY + done * PAGE;
        let arguments = guest.conversion(at, count - done, false);
        guest.begin_call(&arguments)?;
        let reply = loop {
            match guest.go()? {
                Stop::Done(reply) => break reply,
                Stop::Exit(exit) if exit.reason == ExitReason::Unshare.code() && asked < 10_000 => {
                    asked += 1;
                }
                other => return Err(Failure::new(format_args!("round {round}: {other:?}"))),
            }
        };
        match guest.converted(at, reply.x) {
            Conversion::Done(some) if some != 0 => done += some,
            other => return Err(Failure::new(format_args!("round {round}: {other:?}"))),
        }
    }
    Ok(())
}

/// A VM's end, wanted by all CPUs at once while others use it and its guest runs and shares: one of them gets it, the others learn
/// why not.
pub(crate) fn lives_race() -> Outcome {
    for round in for_a_while(20) {
        let pages = Pages::new(4 * MIB);
        let kind = VmKind::ALL[round as usize % VmKind::ALL.len()];
        let vm = Vm::boot(&pages, kind, 1)?;
        vm.add(MEMORY, 1)?;
        let mut guest = vm.guest(0);
        let arguments = guest.conversion(MEMORY, 1, true);
        guest.begin_call(&arguments)?;
        let spare = pages.take(2)?;
        let won = AtomicU64::new(0);
        on_all_cpus(|cpu| {
            for turn in cpu as u64..50 {
                let (name, (status, _)) = match turn % 7 {
                    0 => ("VM_MAP", call("VM_MAP", [vm.handle, MEMORY + PAGE, spare, 1])),
                    1 => ("SPI", call("SPI", [vm.handle, 40, turn & 1])),
                    2 => ("CLAIM", call("CLAIM", [vm.handle, MEMORY, 1])),
                    3 => ("RELEASE", call("RELEASE", [vm.handle, MEMORY, 1])),
                    4 => ("VCPU_RUN", call("VCPU_RUN", [vm.handle, 0])),
                    5 => ("VM_DONATE_TABLES", call("VM_DONATE_TABLES", [vm.handle, spare + PAGE, 1])),
                    _ if turn > 25 => ("VM_TEARDOWN", call("VM_TEARDOWN", [vm.handle])),
                    _ => ("VM_DESTROY", call("VM_DESTROY", [vm.handle])),
                };
                let expected = match (name, status) {
                    ("VM_TEARDOWN", Status::Success) => won.fetch_add(1, Ordering::Relaxed) == 0,
                    ("VM_DESTROY", Status::Success) => false, // it has memory
                    (_, Status::Success | Status::Busy | Status::WrongState) => true,
                    ("VM_MAP", Status::Denied | Status::Exists)
                    | ("VM_DONATE_TABLES", Status::Denied)
                    | ("CLAIM", Status::NotOffered | Status::Denied)
                    | ("RELEASE", Status::Denied) => true,
                    // What the guest waits for is not answered.
                    ("VCPU_RUN", Status::Invalid) => true,
                    _ => false,
                };
                check!(expected, "{name}: {}", status.name());
            }
            Ok(())
        })?;
        // If nobody did.
        let (status, _) = call("VM_TEARDOWN", [vm.handle]);
        check!(matches!(status, Status::Success | Status::WrongState), "VM_TEARDOWN: {}", status.name());
        vm.note(MEMORY, 2);
        vm.reclaim()?;
        vm.destroy()?;
        pages.are_owned()?;
    }
    Ok(())
}

/// SPIs that the host raises without end harm nobody, and those that it does not have are refused.
pub(crate) fn flood_of_spis() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let address = vm.add(MEMORY, 1)?;
    let mut guest = vm.guest(0);
    guest.fill(MEMORY, 1, address, 9)?;
    for round in 0..5000 {
        let intid = 32 + round % 256;
        succeed("SPI", [vm.handle, intid, round & 1])?;
    }
    for intid in [288, 1019] {
        refused("SPI", [vm.handle, intid, 1], Status::Invalid)?;
    }
    for intid in [0, 15, 16, 27, 30, 31, 1020, 1023, 8192] {
        refused("SPI", [vm.handle, intid, 1], Status::Invalid)?;
    }
    guest.compare(MEMORY, 1, address, 9)?;
    vm.finish()
}
