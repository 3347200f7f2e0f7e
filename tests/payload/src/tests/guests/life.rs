//! The life of a VM: its steps in order, out of order, and very often.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use arrayvec::ArrayVec;
use ravelin_abi::{ExitReason, MAX_VCPUS, Status, VmAttributes, VmKind, system_register};
use ravelin_guest::IMAGE;

use crate::{
    rt::{
        cpu, gic,
        memory::{self, BLOCK, PAGE},
        vm::{DISTRIBUTOR, IPA_BITS, MEMORY, Pages, REDISTRIBUTORS, Sizes, Vm, block_of, call, refused, succeed},
    },
    tests::{
        Failure, OWNED, Op, Outcome, SHARED, check, check_eq, check_state, guests::exits::begin_to_spin, page_counts,
        state, statistics,
    },
};

const MIB: u64 = 1 << 20;

/// Made, populated, sealed, run, torn down, reclaimed and destroyed, on any CPU.
pub(crate) fn life_cycle() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let before = page_counts()?;
        let vm = Vm::boot(&pages, kind, 1)?;
        let page = vm.add(MEMORY, 1)?;
        let mut guest = vm.guest(0);
        guest.fill(MEMORY, 1, page, 1)?;
        guest.compare(MEMORY, 1, page, 1)?;
        vm.finish()?;
        check_eq!(page_counts()?, before, "pages by state after the end of the VM");
    }
    Ok(())
}

const SYSTEM_OFF: u64 = 0x8400_0008;
const SYSTEM_RESET: u64 = 0x8400_0009;

/// A guest ends its VM. No vCPU that has ended runs again.
pub(crate) fn runs_to_its_end() -> Outcome {
    for &kind in VmKind::ALL {
        for (function, reason) in [(SYSTEM_OFF, ExitReason::SystemOff), (SYSTEM_RESET, ExitReason::SystemReset)] {
            let pages = Pages::new(4 * MIB);
            let vm = Vm::boot(&pages, kind, 1)?;
            let mut guest = vm.guest(0);
            guest.begin_call(&[function])?;
            guest.exit(reason)?;
            refused("VCPU_RUN", [vm.handle, 0], Status::WrongState)?;
            vm.finish()?;
        }
    }
    Ok(())
}

/// A vCPU ends the VM of another one, which tells its host once.
pub(crate) fn ends_for_all_vcpus() -> Outcome {
    for &kind in VmKind::ALL {
        for (function, reason) in [(SYSTEM_OFF, ExitReason::SystemOff), (SYSTEM_RESET, ExitReason::SystemReset)] {
            let pages = Pages::new(4 * MIB);
            let vm = Vm::boot(&pages, kind, 3)?;
            vm.guest(0).turn_on(1)?;
            let mut guest = vm.guest(1);
            guest.begin_call(&[function])?;
            check_eq!(guest.exit(reason)?.wake_low, 1, "the vCPUs that are to find out");
            for index in [0, 2] {
                let told = vm.guest(index).run_once()?;
                check_eq!((told.reason, told.wake_low), (reason.code(), 0), "what vCPU {index} is told");
            }
            for index in 0..3 {
                refused("VCPU_RUN", [vm.handle, index], Status::WrongState)?;
            }
            vm.finish()?;
        }
    }
    Ok(())
}

/// A vCPU that runs on another CPU does not go on once that is interrupted.
pub(crate) fn ends_for_vcpus_that_run() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 2)?;
    vm.guest(0).turn_on(1)?;
    let mut spins = vm.guest(1);
    begin_to_spin(&mut spins)?;
    let runs = AtomicU64::new(0);
    let last = AtomicU64::new(0);
    let run = |_: usize| {
        runs.fetch_add(1, Relaxed);
        while let Ok(exit) = spins.run_once() {
            last.store(exit.reason, Relaxed);
            if exit.reason != ExitReason::Interrupted.code() {
                break;
            }
            let _ = gic::take();
        }
    };
    let mut guest = vm.guest(0);
    guest.begin_call(&[SYSTEM_OFF])?;
    let outcome = cpu::run_on(&[1], &run, || {
        while runs.load(Relaxed) == 0 {
            cpu::wait();
        }
        cpu::wait();
        let exit = guest.exit(ExitReason::SystemOff);
        gic::send(1);
        exit
    });
    check_eq!(outcome?.wake_low, 2, "the vCPU that is to find out");
    check_eq!(last.load(Relaxed), ExitReason::SystemOff.code(), "what it was told");
    refused("VCPU_RUN", [vm.handle, 1], Status::WrongState)?;
    vm.finish()
}

/// What a call does at a point of a VM's life where it is not to do anything.
fn refusals(vm: &Vm<'_>, spare: u64, expected: impl Fn(&str) -> Option<Status>, when: &str) -> Outcome {
    let sizes = Sizes::of(Vm::attributes(vm.kind, 2))?;
    let handle = vm.handle;
    let calls: [(&str, ArrayVec<u64, 5>); 14] = [
        ("VM_DONATE_TABLES", ArrayVec::from_iter([handle, spare, 1])),
        ("VCPU_CREATE", ArrayVec::from_iter([handle, 1, spare, sizes.vcpu, spare + sizes.vcpu * PAGE])),
        ("VM_MAP", ArrayVec::from_iter([handle, MEMORY, spare, 1])),
        ("VM_UNMAP", ArrayVec::from_iter([handle, MEMORY, 1])),
        ("VM_SEAL", ArrayVec::from_iter(vm.seal_arguments())),
        ("VCPU_RUN", ArrayVec::from_iter([handle, 0])),
        ("VCPU_GET_REGISTER", ArrayVec::from_iter([handle, 0, 0])),
        ("VCPU_SET_REGISTER", ArrayVec::from_iter([handle, 0, 0, 0])),
        ("VM_TEARDOWN", ArrayVec::from_iter([handle])),
        ("VM_RECLAIM", ArrayVec::from_iter([handle, MEMORY, 1])),
        ("VM_DESTROY", ArrayVec::from_iter([handle])),
        ("CLAIM", ArrayVec::from_iter([handle, MEMORY, 1])),
        ("RELEASE", ArrayVec::from_iter([handle, MEMORY, 1])),
        ("SPI", ArrayVec::from_iter([handle, 32, 0])),
    ];
    let before = page_counts()?;
    for (name, arguments) in calls {
        let Some(expected) = expected(name) else { continue };
        let mut all = [0; 5];
        all[..arguments.len()].copy_from_slice(&arguments);
        let (status, _) = call(name, all);
        check!(status == expected, "{name} of a VM that {when}: {}, not {}", status.name(), expected.name());
    }
    check_eq!(page_counts()?, before, "pages by state after calls to a VM that {when}");
    Ok(())
}

/// Each call at each point of a VM's life where it is out of order.
pub(crate) fn steps_out_of_order() -> Outcome {
    use Status::{Absent, BadHandle, Busy, Exists, WrongState};
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::create(&pages, kind, 2)?;
        let spare = pages.take(16)?;
        let protected = kind.is_protected();
        let of_ordinary = |absent| if protected { WrongState } else { absent };
        refusals(
            &vm,
            spare,
            |name| match name {
                "VM_SEAL" => Some(Absent), // without a vCPU 0
                "VCPU_RUN" | "VM_RECLAIM" | "VM_DESTROY" | "SPI" => Some(WrongState),
                // It has no vCPU yet.
                "VM_UNMAP" | "VCPU_GET_REGISTER" | "VCPU_SET_REGISTER" => Some(of_ordinary(Absent)),
                "CLAIM" | "RELEASE" => Some(Absent),
                _ => None,
            },
            "has been created",
        )?;
        vm.load()?;
        vm.add_vcpu()?;
        vm.seal()?;
        refusals(
            &vm,
            spare,
            |name| match name {
                "VCPU_CREATE" | "VM_SEAL" | "VM_RECLAIM" | "VM_DESTROY" => Some(WrongState),
                "VM_UNMAP" => Some(of_ordinary(Absent)),
                "VCPU_GET_REGISTER" | "VCPU_SET_REGISTER" if protected => Some(WrongState),
                "CLAIM" | "RELEASE" => Some(Absent),
                _ => None,
            },
            "is sealed",
        )?;
        refused("VCPU_RUN", [vm.handle, 1], Absent)?;
        refused("VCPU_RUN", [vm.handle, 127], Absent)?;
        refused("VM_MAP", [vm.handle, IMAGE, spare, 1], Exists)?;
        succeed("VM_TEARDOWN", [vm.handle])?;
        refusals(
            &vm,
            spare,
            |name| match name {
                "VM_DONATE_TABLES" | "VM_RECLAIM" => None,
                "VM_DESTROY" => Some(Busy), // it has memory
                _ => Some(WrongState),
            },
            "is dying",
        )?;
        vm.reclaim()?;
        refusals(
            &vm,
            spare,
            |name| match name {
                "VM_DONATE_TABLES" | "VM_RECLAIM" | "VM_DESTROY" => None,
                _ => Some(WrongState),
            },
            "has lost its memory",
        )?;
        vm.destroy()?;
        refusals(&vm, spare, |_| Some(BadHandle), "is gone")?;
        pages.are_owned()?;
    }
    Ok(())
}

/// Arguments that no call takes.
pub(crate) fn bad_arguments() -> Outcome {
    use Status::{Absent, Denied, Exists, Invalid, NotRam, Overflow, Reserved, TooLarge, Unaligned};
    let pages = Pages::new(4 * MIB);
    let good = Vm::attributes(VmKind::Pkvm, 2);
    let sizes = Sizes::of(good)?;
    let spare = pages.take_aligned(64, 64)?;

    for (attributes, status) in [
        (good.bits() | 1 << 32, Reserved),
        (u64::MAX, Reserved),
        (VmAttributes { ipa_bits: 31, ..good }.bits(), Invalid),
        (VmAttributes { ipa_bits: 49, ..good }.bits(), Invalid),
        (VmAttributes { vcpus: 0, ..good }.bits(), Invalid),
        (VmAttributes { vcpus: MAX_VCPUS + 1, ..good }.bits(), Invalid),
        (good.bits() | 3, Invalid),
        (0, Invalid),
    ] {
        refused("VM_SIZES", [attributes], status)?;
        refused("REGISTER_RESET_VALUE", [attributes, system_register(3, 0, 0, 7, 0)], status)?;
        refused("VM_CREATE", [attributes, spare, sizes.vm], status)?;
    }
    let create = |address, count, status| refused("VM_CREATE", [good.bits(), address, count], status);
    create(spare + 8, sizes.vm, Unaligned)?;
    create(spare, 0, Invalid)?;
    create(spare, sizes.vm - 1, Invalid)?;
    create(spare, sizes.vm + 1, Invalid)?;
    create(spare, 513, TooLarge)?;
    create(ravelin_abi::ADDRESS_END - PAGE, sizes.vm, Overflow)?;
    create(0, sizes.vm, NotRam)?;
    if sizes.align > 1 {
        create(spare + PAGE, sizes.vm, Unaligned)?;
    }
    Op::Share.succeeds(spare, 1)?;
    check_eq!(create(spare, sizes.vm, Denied)?, spare, "the page that is named");
    Op::Unshare.succeeds(spare, 1)?;

    let vm = Vm::create(&pages, VmKind::Pkvm, 2)?;
    let vcpu = |index, address, count, run_page, status| {
        refused("VCPU_CREATE", [vm.handle, index, address, count, run_page], status)
    };
    let (metadata, run_page) = (spare, spare + 32 * PAGE);
    vcpu(2, metadata, sizes.vcpu, run_page, Invalid)?;
    vcpu(MAX_VCPUS, metadata, sizes.vcpu, run_page, Invalid)?;
    vcpu(u64::MAX, metadata, sizes.vcpu, run_page, Invalid)?;
    vcpu(0, metadata, sizes.vcpu + 1, run_page, Invalid)?;
    vcpu(0, metadata, 0, run_page, Invalid)?;
    vcpu(0, metadata + 1, sizes.vcpu, run_page, Unaligned)?;
    vcpu(0, metadata, sizes.vcpu, run_page + 8, Unaligned)?;
    vcpu(0, metadata, sizes.vcpu, 0, NotRam)?;
    vcpu(0, 0, sizes.vcpu, run_page, Invalid)?;
    vcpu(0, metadata, sizes.vcpu, metadata, Denied)?;
    vcpu(0, metadata, sizes.vcpu, u64::MAX << 12, Overflow)?;
    succeed("VCPU_CREATE", [vm.handle, 0, metadata, sizes.vcpu, run_page])?;
    vcpu(0, metadata + 16 * PAGE, sizes.vcpu, run_page + PAGE, Exists)?;
    vcpu(1, metadata + 16 * PAGE, sizes.vcpu, run_page, Denied)?;

    let end = 1 << IPA_BITS;
    let page = spare + 40 * PAGE;
    let map = |at, address, count, status| refused("VM_MAP", [vm.handle, at, address, count], status);
    map(MEMORY + 1, page, 1, Unaligned)?;
    map(MEMORY, page + 1, 1, Unaligned)?;
    map(MEMORY, page, 0, Invalid)?;
    map(end, page, 1, Overflow)?;
    map(end - PAGE, page, 2, Overflow)?;
    map(u64::MAX << 12, page, 1, Overflow)?;
    map(MEMORY, 0, 1, NotRam)?;
    map(MEMORY, page, 513, TooLarge)?;
    map(MEMORY, page, 1 << 19, TooLarge)?;
    map(MEMORY, run_page, 1, Denied)?;
    map(MEMORY, metadata, 1, Denied)?;

    let seal = |entry, tree, distributor, redistributors, status| {
        refused("VM_SEAL", [vm.handle, entry, tree, distributor, redistributors], status)
    };
    let tree = block_of(0);
    seal(IMAGE + 2, tree, DISTRIBUTOR, REDISTRIBUTORS, Unaligned)?;
    seal(IMAGE, tree + 4, DISTRIBUTOR, REDISTRIBUTORS, Unaligned)?;
    seal(IMAGE, tree, DISTRIBUTOR + PAGE, REDISTRIBUTORS, Unaligned)?;
    seal(IMAGE, tree, DISTRIBUTOR, REDISTRIBUTORS + PAGE, Unaligned)?;
    seal(end, tree, DISTRIBUTOR, REDISTRIBUTORS, Overflow)?;
    seal(IMAGE, end, DISTRIBUTOR, REDISTRIBUTORS, Overflow)?;
    seal(IMAGE, tree, end, REDISTRIBUTORS, Overflow)?;
    seal(IMAGE, tree, DISTRIBUTOR, end - 0x1_0000, Overflow)?;

    for name in ["CLAIM", "RELEASE", "VM_UNMAP", "VM_RECLAIM"] {
        refused(name, [vm.handle, MEMORY + 8, 1], Unaligned)?;
        refused(name, [vm.handle, MEMORY, 0], Invalid)?;
        refused(name, [vm.handle, MEMORY, (1 << 18) + 1], TooLarge)?;
        refused(name, [vm.handle, u64::MAX << 12, 1], Overflow)?;
    }
    refused("CLAIM", [vm.handle, end, 1], Overflow)?;
    refused("CLAIM", [vm.handle, MEMORY, 1], Absent)?;
    refused("FORCE_RECLAIM", [page + 1, 1], Unaligned)?;
    refused("FORCE_RECLAIM", [page, 0], Invalid)?;
    refused("FORCE_RECLAIM", [page, 513], TooLarge)?;
    refused("FORCE_RECLAIM", [page, 1], Denied)?;
    for intid in [0, 31, 1020, u64::MAX] {
        refused("SPI", [vm.handle, intid, 1], Invalid)?;
    }
    refused("SPI", [vm.handle, 32, 2], Invalid)?;
    vm.finish()
}

/// vCPUs that cannot be made leave nothing behind: neither a pin on the run page nor a page of what they were to be made of.
pub(crate) fn vcpus_that_are_not_made() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::create(&pages, kind, 2)?;
        vm.add_vcpu()?;
        let sizes = Sizes::of(Vm::attributes(kind, 2))?;
        let (metadata, run_page) = (pages.take(sizes.vcpu)?, pages.take(1)?);
        let lent = pages.take(1)?;
        Op::Share.succeeds(lent, 1)?;
        let counts = || Ok::<_, Failure>((page_counts()?, statistics()?.vm_pages, statistics()?.free_tables));
        let before = counts()?;
        for _ in 0..100 {
            let make = |index, metadata, run_page, status| {
                refused("VCPU_CREATE", [vm.handle, index, metadata, sizes.vcpu, run_page], status)
            };
            make(0, metadata, run_page, Status::Exists)?;
            make(2, metadata, run_page, Status::Invalid)?;
            make(1, vm.run_page(0), run_page, Status::Denied)?;
            make(1, lent + PAGE - sizes.vcpu * PAGE, run_page, Status::Denied)?;
            make(1, metadata, vm.run_page(0), Status::Denied)?;
            make(1, metadata, lent, Status::Denied)?;
            make(1, metadata, metadata + (sizes.vcpu - 1) * PAGE, Status::Denied)?;
            check_eq!(state(run_page)?, OWNED, "the run page");
            check_state(metadata, sizes.vcpu, OWNED)?;
            check_eq!(state(lent)?, SHARED, "the page that is shared with the hypervisor");
        }
        check_eq!(counts()?, before, "pages by state, pages of VMs, free tables");
        Op::Unshare.succeeds(lent, 1)?;
        // Nothing is in the way.
        succeed("VCPU_CREATE", [vm.handle, 1, metadata, sizes.vcpu, run_page])?;
        vm.finish()?;
    }
    Ok(())
}

/// Handles that are forged, of the past, or of another VM.
pub(crate) fn handles() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let mark = pages.mark();
    let mut past = ArrayVec::<u64, 8>::new();
    for &kind in VmKind::ALL.iter().cycle().take(8) {
        pages.reset(mark);
        let vm = Vm::create(&pages, kind, 1)?;
        check!(!past.contains(&vm.handle), "the handle {:#x} has been used before", vm.handle);
        let forged = [0, 1, 254, 255, vm.handle ^ 1, vm.handle ^ 1 << 8, vm.handle | 1 << 63, vm.handle << 8, u64::MAX];
        for handle in past.iter().copied().chain(forged) {
            for (name, arguments) in [
                ("VM_DONATE_TABLES", [handle, mark, 1, 0, 0]),
                ("VCPU_CREATE", [handle, 0, mark, 1, mark + PAGE]),
                ("VM_MAP", [handle, MEMORY, mark, 1, 0]),
                ("VM_UNMAP", [handle, MEMORY, 1, 0, 0]),
                ("VM_SEAL", [handle, IMAGE, IMAGE, DISTRIBUTOR, REDISTRIBUTORS]),
                ("VCPU_RUN", [handle, 0, 0, 0, 0]),
                ("VM_TEARDOWN", [handle, 0, 0, 0, 0]),
                ("VM_RECLAIM", [handle, MEMORY, 1, 0, 0]),
                ("VM_DESTROY", [handle, 0, 0, 0, 0]),
                ("CLAIM", [handle, MEMORY, 1, 0, 0]),
                ("RELEASE", [handle, MEMORY, 1, 0, 0]),
                ("SPI", [handle, 32, 1, 0, 0]),
            ] {
                refused(name, arguments, Status::BadHandle)?;
            }
        }
        past.push(vm.handle);
        vm.finish()?;
    }
    Ok(())
}

/// As many VMs as there can be, and not one more.
pub(crate) fn all_slots() -> Outcome {
    const SLOTS: usize = 255;
    let pages = Pages::new(32 * MIB);
    let before = page_counts()?;
    let attributes = Vm::attributes(VmKind::Pkvm, 1);
    let sizes = Sizes::of(attributes)?;
    let mut handles = ArrayVec::<u64, SLOTS>::new();
    for _ in 0..SLOTS {
        let metadata = pages.take_aligned(sizes.vm, sizes.align)?;
        handles.push(succeed("VM_CREATE", [attributes.bits(), metadata, sizes.vm])?);
    }
    let metadata = pages.take_aligned(sizes.vm, sizes.align)?;
    refused("VM_CREATE", [attributes.bits(), metadata, sizes.vm], Status::Limit)?;
    let destroy = |handle| {
        succeed("VM_TEARDOWN", [handle])?;
        check_eq!(succeed("VM_DESTROY", [handle])?, 0, "pages left of a VM");
        Ok(())
    };
    // One goes, one comes.
    destroy(handles.swap_remove(100))?;
    let another = succeed("VM_CREATE", [attributes.bits(), metadata, sizes.vm])?;
    check!(!handles.contains(&another), "the handle {another:#x} is in use");
    handles.push(another);
    handles.into_iter().try_for_each(destroy)?;
    pages.are_owned()?;
    check_eq!(page_counts()?, before, "pages by state");
    Ok(())
}

/// As many vCPUs as a VM can have, of which the last one runs.
pub(crate) fn all_vcpus() -> Outcome {
    let pages = Pages::new(8 * MIB);
    let attributes = Vm::attributes(VmKind::Pkvm, MAX_VCPUS);
    let sizes = Sizes::of(attributes)?;
    let vm = Vm::with(&pages, attributes)?;
    for index in 0..MAX_VCPUS {
        let metadata = pages.take(sizes.vcpu)?;
        let run_page = pages.take(1)?;
        succeed("VCPU_CREATE", [vm.handle, index, metadata, sizes.vcpu, run_page])?;
    }
    succeed("VM_SEAL", vm.seal_arguments())?;
    for index in 1..MAX_VCPUS {
        refused("VCPU_RUN", [vm.handle, index], Status::WrongState)?; // off
    }
    refused("VCPU_RUN", [vm.handle, MAX_VCPUS], Status::Invalid)?;
    vm.finish()
}

/// Ten thousand VMs: nothing is lost.
pub(crate) fn ten_thousand_lives() -> Outcome {
    const LIVES: u64 = 10_000;
    let pages = Pages::new(4 * MIB);
    let before = page_counts()?;
    let tables = statistics()?.free_tables;
    let mark = pages.mark();
    for life in 0..LIVES {
        pages.reset(mark);
        let kind = VmKind::ALL[life as usize % VmKind::ALL.len()];
        let attributes = Vm::attributes(kind, 1);
        let vm = Vm::with(&pages, attributes)?;
        let sizes = Sizes::of(attributes)?;
        let metadata = pages.take(sizes.vcpu)?;
        let run_page = pages.take(1)?;
        succeed("VCPU_CREATE", [vm.handle, 0, metadata, sizes.vcpu, run_page])?;
        if life % 16 == 0 {
            memory::store(run_page, life);
            vm.add(MEMORY, 2)?;
            succeed("VM_SEAL", vm.seal_arguments())?;
        }
        vm.end()?;
        if life % 1000 == 0 {
            pages.are_owned()?;
        }
    }
    pages.are_owned()?;
    check_eq!(page_counts()?, before, "pages by state");
    check!(statistics()?.free_tables + 8 >= tables, "pages for tables have been lost");
    Ok(())
}

const MEASUREMENT_READ: u64 = 0xc400_0192;

/// What a realm reads as its initial measurement, built with these pages: guest address and first word of each. They are put there
/// one by one, or in one call.
fn measure(contents: &[(u64, u64)], in_one_call: bool) -> Result<[u64; 8], Failure> {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::create(&pages, VmKind::Realm, 1)?;
    vm.load()?;
    vm.add_vcpu()?;
    let first = pages.take(contents.len() as u64)?;
    for (&(at, word), page) in contents.iter().zip((first..).step_by(PAGE as usize)) {
        (0..PAGE).step_by(8).for_each(|offset| memory::store(page + offset, 0));
        memory::store(page, word);
        if !in_one_call {
            vm.map(at, page, 1)?;
        }
    }
    if in_one_call {
        vm.map(contents[0].0, first, contents.len() as u64)?;
    }
    vm.seal()?;
    let mut guest = vm.guest(0);
    let [status, measurement @ ..] = guest.call(&[MEASUREMENT_READ, 0])?;
    check_eq!(status, 0, "MEASUREMENT_READ");
    let mut result = [0; 8];
    result[..7].copy_from_slice(&measurement);
    vm.finish()?;
    Ok(result)
}

/// The measurement depends on contents, frames and their order, and on nothing else.
pub(crate) fn measurement() -> Outcome {
    let base = [(MEMORY, 1), (MEMORY + PAGE, 2)];
    let first = measure(&base, false)?;
    check!(first[..4].iter().any(|&word| word != 0), "the measurement is zero");
    check!(first[4..].iter().all(|&word| word == 0), "more than 32 bytes of SHA-256");
    check_eq!(measure(&base, false)?, first, "measurement of the same VM");
    check_eq!(measure(&base, true)?, first, "measurement of the same VM, made in one call");
    for other in [
        &[(MEMORY, 1), (MEMORY + PAGE, 3)][..],
        &[(MEMORY, 1), (MEMORY + 2 * PAGE, 2)],
        &[(MEMORY + PAGE, 2), (MEMORY, 1)],
        &[(MEMORY, 1)],
        &[(MEMORY, 1), (MEMORY + PAGE, 2), (MEMORY + BLOCK, 0)],
    ] {
        check!(measure(other, false)? != first, "the measurement of {other:x?} is the same");
    }
    Ok(())
}
