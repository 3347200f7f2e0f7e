//! Calls about VMs.

use std::{sync::Barrier, thread};

use proptest::prelude::{any, proptest};
use ravelin_abi::{
    CALLS, ExitReason, Kind, MAX_TAKE_BACK_PAGES, PageStateCode, REGISTER_LAST, RunExit, Statistics, Status,
    VmAttributes, VmKind,
};
use ravelin_memory::PAGE_SIZE;
use ravelin_ownership::{Counts, PageReport};
use ravelin_world::{Action, Door, Outcome, World, call, number};

use crate::{CARVE_OUT, DONATE, PIN, RAM, SHARE, TAKE_BACK, UNPIN, UNSHARE, in_world, state, statistics_of, succeeds};

const METADATA: u64 = RAM.start;
const VCPU: u64 = RAM.start + 0x10_0000;
const RUN_PAGE: u64 = RAM.start + 0x18_0000;
const TABLES: u64 = RAM.start + 0x1c_0000;
pub(crate) const PAYLOAD: u64 = RAM.start + 0x20_0000;
const BLOCK: u64 = 0x20_0000;

pub(crate) const ENTRY: u64 = 0x8000_0000;
const DISTRIBUTOR: u64 = 0x800_0000;
const REDISTRIBUTORS: u64 = 0x80a_0000;

const fn attributes(kind: VmKind) -> u64 {
    VmAttributes { kind, ipa_bits: 40, vcpus: 2 }.bits()
}

pub(crate) const PKVM: u64 = attributes(VmKind::Pkvm);
const ORDINARY: u64 = attributes(VmKind::Ordinary);

/// Returns pKVM's call of a guest.
fn hvc<const N: usize>(registers: [u64; N]) -> Option<Action> {
    Some(Action::call(Door::Hvc, registers))
}

/// Makes a VM with vCPU 0 and pages for tables.
fn create(world: &World<'_>, attributes: u64) -> u64 {
    let (vm, vcpu) = world.sizes(attributes);
    let handle = world.does("VM_CREATE", &[attributes, METADATA, vm]);
    world.does("VM_DONATE_TABLES", &[handle, TABLES, 16]);
    world.does("VCPU_CREATE", &[handle, 0, VCPU, vcpu, RUN_PAGE]);
    handle
}

fn seal(world: &World<'_>, handle: u64) {
    assert_eq!(world.does("VM_SEAL", &[handle, ENTRY, ENTRY + 8, DISTRIBUTOR, REDISTRIBUTORS]), 0);
}

/// Makes a VM that has four pages, and seals it.
pub(crate) fn sealed(world: &World<'_>, attributes: u64) -> u64 {
    let handle = create(world, attributes);
    world.does("VM_MAP", &[handle, ENTRY, PAYLOAD, 4]);
    seal(world, handle);
    handle
}

/// Returns what a call that fails leaves as it was. It may have tried, and then has work of the TLBs to show for it.
fn state_of_memory(world: &World<'_>) -> (Vec<PageReport>, Counts) {
    let (pages, counts) = world.look();
    (pages, Counts { stage2_invalidations: 0, el2_invalidations: 0, host_tables: 0, evictions: 0, ..counts })
}

/// Runs vCPU 0 until the host has something to do, after this call of the guest if there is one.
fn run(world: &World<'_>, handle: u64, call: Option<Action>) -> RunExit {
    world.run(handle, RUN_PAGE, call)
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn the_life_of_a_protected_vm() {
    in_world(64, |world| {
        let before = world.look();
        let (vm_pages, vcpu_pages) = world.sizes(PKVM);
        let handle = sealed(world, PKVM);
        let kept = vm_pages + vcpu_pages + 16;
        assert_eq!(state(world, PAYLOAD), (PageStateCode::NoPage, 0));
        assert_eq!(state(world, METADATA), (PageStateCode::NoPage, 0));
        assert_eq!(state(world, RUN_PAGE).0, PageStateCode::SharedOwned);
        assert_eq!(run(world, handle, None).reason, ExitReason::Interrupted.code());

        let share = run(world, handle, hvc([0xc600_0003, ENTRY, 2, 0]));
        assert_eq!((share.reason, share.address, share.pages), (ExitReason::Shared.code(), ENTRY, 2));
        assert_eq!(state(world, PAYLOAD), (PageStateCode::NoPage, 0), "offered is not claimed");
        world.does("CLAIM", &[handle, ENTRY, 1]);
        assert_eq!(state(world, PAYLOAD), (PageStateCode::SharedBorrowed, 0));
        assert_eq!(state(world, PAYLOAD + PAGE_SIZE), (PageStateCode::NoPage, 0));
        let statistics = statistics_of(world, PAYLOAD + BLOCK);
        let expected = Statistics {
            vm_pages: kept,
            host_lent_pages: 0,
            guest_private_pages: 2,
            guest_offered_pages: 1,
            guest_claimed_pages: 1,
            ..statistics
        };
        assert_eq!(statistics, expected);
        let uses = |name: &str| statistics.calls[usize::try_from(number(name) & 0xff).unwrap()];
        assert_eq!([uses("VCPU_RUN"), uses("VM_SEAL"), uses("CLAIM"), uses("RELEASE")], [2, 1, 1, 0]);
        succeeds(world, UNSHARE, PAYLOAD + BLOCK, 1);

        world.does("RELEASE", &[handle, ENTRY, 1]);
        assert_eq!(state(world, PAYLOAD), (PageStateCode::NoPage, 0));
        world.does("CLAIM", &[handle, ENTRY, 2]);
        let unshare = run(world, handle, hvc([0xc600_0004, ENTRY, 2, 0]));
        assert_eq!((unshare.reason, unshare.address, unshare.pages), (ExitReason::Unshare.code(), ENTRY, 2));
        world.does("RELEASE", &[handle, ENTRY, 2]);
        assert_eq!(run(world, handle, None).reason, ExitReason::Interrupted.code());
        let unshared = world.machine.take_happened().pop().unwrap();
        assert_eq!(Some(unshared.action), hvc([0xc600_0004, ENTRY, 2, 0]), "what the guest was at");
        assert!(matches!(unshared.outcome, Outcome::Returned([0, 2, 0, 0, ..])), "{unshared:?}");
        world.refuses("CLAIM", &[handle, ENTRY, 1], Status::NotOffered, ENTRY);

        world.does("FORCE_RECLAIM", &[PAYLOAD + 3 * PAGE_SIZE, 1]);
        assert_eq!(state(world, PAYLOAD + 3 * PAGE_SIZE), (PageStateCode::Owned, 0));
        assert_eq!(world.named("SPI", &[handle, 32, 1])[..3], [0, 0, 0], "the guest has not enabled it");
        world.end(handle);
        let (pages, counts) = world.look();
        assert_eq!(pages, before.0);
        assert_eq!((counts.hyp_kept, counts.host_owned), (0, before.1.host_owned));
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn an_ordinary_vm_borrows_its_memory() {
    in_world(64, |world| {
        let handle = sealed(world, attributes(VmKind::Ordinary));
        assert_eq!(state(world, PAYLOAD), (PageStateCode::SharedOwned, 0));
        assert_eq!(statistics_of(world, PAYLOAD + BLOCK).host_lent_pages, 4);
        for (function, name) in [(SHARE, "share"), (UNSHARE, "unshare"), (DONATE, "donate"), (PIN, "pin")] {
            println!("{name}");
            world.fails([function, PAYLOAD, 1, 0], Status::Denied, PAYLOAD);
        }
        world.does("VM_UNMAP", &[handle, ENTRY + PAGE_SIZE, 2]);
        assert_eq!(state(world, PAYLOAD + PAGE_SIZE), (PageStateCode::Owned, 0));
        world.refuses("VM_UNMAP", &[handle, ENTRY, 2], Status::Absent, ENTRY + PAGE_SIZE);
        world.refuses("VM_UNMAP", &[handle, 1 << 40, 1], Status::Overflow, 0);
        world.refuses("FORCE_RECLAIM", &[PAYLOAD, 1], Status::Denied, PAYLOAD);
        world.end(handle);
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn an_interrupt_wakes_vcpus() {
    in_world(64, |world| {
        let handle = create(world, PKVM);
        let (_, vcpu_pages) = world.sizes(PKVM);
        world.does("VCPU_CREATE", &[handle, 1, VCPU + 0x1_0000, vcpu_pages, RUN_PAGE + PAGE_SIZE]);
        seal(world, handle);
        // Group 1 on; interrupt 32 to vCPU 1, in group 1, enabled.
        let stores = [(0, 2), (0x6100, 1), (0x84, 1), (0x104, 1)];
        let stores = stores.map(|(offset, value)| Action::Store(DISTRIBUTOR + offset, value));
        world.machine.then(stores);
        assert_eq!(run(world, handle, None).reason, ExitReason::Interrupted.code());
        assert_eq!(world.named("SPI", &[handle, 32, 1])[..3], [0, 1 << 1, 0]);
        world.end(handle);
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn every_way_to_fail_to_make_a_vm() {
    in_world(64, |world| {
        let (vm, vcpu) = world.sizes(PKVM);
        world.refuses("VM_SIZES", &[1 << 32], Status::Reserved, 0);
        world.refuses("VM_SIZES", &[PKVM | 3], Status::Invalid, 0);
        let create = |attributes, address, pages, status, x1| {
            world.refuses("VM_CREATE", &[attributes, address, pages], status, x1);
        };
        create(1 << 32, METADATA, vm, Status::Reserved, 0);
        create(PKVM, METADATA + 1, vm, Status::Unaligned, 0);
        create(PKVM, METADATA + PAGE_SIZE, vm, Status::Unaligned, 0);
        create(PKVM, METADATA, 0, Status::Invalid, 0);
        create(PKVM, METADATA, vm - 1, Status::Invalid, 0);
        create(PKVM, METADATA, vm + 1, Status::Invalid, 0);
        create(PKVM | 129 << 16, METADATA, vm, Status::Invalid, 0);
        create(PKVM, (1 << 48) - PAGE_SIZE, vm, Status::Overflow, 0);
        create(PKVM, METADATA, MAX_TAKE_BACK_PAGES + 1, Status::TooLarge, 0);
        create(PKVM, RAM.end, vm, Status::NotRam, RAM.end);
        create(PKVM, CARVE_OUT.start, vm, Status::Denied, CARVE_OUT.start);

        let handle = world.does("VM_CREATE", &[PKVM, METADATA, vm]);
        create(PKVM, METADATA, vm, Status::Denied, METADATA);
        let tables = |address, pages, status, x1| {
            world.refuses("VM_DONATE_TABLES", &[handle, address, pages], status, x1);
        };
        tables(TABLES, 0, Status::Invalid, 0);
        tables(TABLES, 513, Status::TooLarge, 0);
        tables(METADATA, 1, Status::Denied, METADATA);
        tables(RAM.start - PAGE_SIZE, 2, Status::NotRam, RAM.start - PAGE_SIZE);

        let create = |index, address, pages, run_page, status, x1| {
            world.refuses("VCPU_CREATE", &[handle, index, address, pages, run_page], status, x1);
        };
        create(0, VCPU, vcpu, RUN_PAGE + 8, Status::Unaligned, 0);
        create(128, VCPU, vcpu, RUN_PAGE, Status::Invalid, 0);
        create(2, VCPU, vcpu, RUN_PAGE, Status::Invalid, 0);
        create(0, VCPU, vcpu + 1, RUN_PAGE, Status::Invalid, 0);
        create(0, VCPU, vcpu, 1 << 48, Status::Overflow, 0);
        create(0, VCPU, vcpu, METADATA, Status::Denied, METADATA);
        create(0, VCPU, vcpu, RAM.end, Status::NotRam, RAM.end);
        world.does("VCPU_CREATE", &[handle, 0, VCPU, vcpu, RUN_PAGE]);
        create(0, VCPU + BLOCK, vcpu, RUN_PAGE + PAGE_SIZE, Status::Exists, 0);
        create(1, VCPU + BLOCK, vcpu, RUN_PAGE, Status::Denied, RUN_PAGE);

        let map = |at, address, pages, status, x1| world.refuses("VM_MAP", &[handle, at, address, pages], status, x1);
        map(ENTRY, PAYLOAD, 1, Status::NeedsTables, 2);
        world.does("VM_DONATE_TABLES", &[handle, TABLES, 4]);
        map(ENTRY + 1, PAYLOAD, 1, Status::Unaligned, 0);
        map(ENTRY, PAYLOAD, 0, Status::Invalid, 0);
        map(1 << 40, PAYLOAD, 1, Status::Overflow, 0);
        map(ENTRY, PAYLOAD, (1 << 18) + 1, Status::TooLarge, 0);
        map(ENTRY, PAYLOAD, 513, Status::TooLarge, 0);
        map(ENTRY, RAM.start - PAGE_SIZE, 1, Status::NotRam, RAM.start - PAGE_SIZE);
        map(ENTRY, CARVE_OUT.start, 1, Status::Denied, CARVE_OUT.start);
        world.does("VM_MAP", &[handle, ENTRY, PAYLOAD, 2]);
        map(ENTRY + PAGE_SIZE, PAYLOAD + BLOCK, 2, Status::Exists, PAYLOAD + BLOCK);
        map(ENTRY + BLOCK, PAYLOAD, 1, Status::Denied, PAYLOAD);

        let seal_fails = |entry, device_tree, distributor, redistributors, status| {
            let x1 = if status == Status::Exists { ENTRY } else { 0 };
            world.refuses("VM_SEAL", &[handle, entry, device_tree, distributor, redistributors], status, x1);
        };
        seal_fails(ENTRY + 2, ENTRY, DISTRIBUTOR, REDISTRIBUTORS, Status::Unaligned);
        seal_fails(ENTRY, ENTRY + 4, DISTRIBUTOR, REDISTRIBUTORS, Status::Unaligned);
        seal_fails(ENTRY, ENTRY, DISTRIBUTOR + PAGE_SIZE, REDISTRIBUTORS, Status::Unaligned);
        seal_fails(ENTRY, ENTRY, DISTRIBUTOR, DISTRIBUTOR, Status::Invalid);
        seal_fails(ENTRY, ENTRY, DISTRIBUTOR, 1 << 48, Status::Overflow);
        seal_fails(1 << 40, ENTRY, DISTRIBUTOR, REDISTRIBUTORS, Status::Overflow);
        seal_fails(ENTRY, ENTRY, ENTRY, REDISTRIBUTORS, Status::Exists);
        seal(world, handle);
        map(REDISTRIBUTORS, PAYLOAD + BLOCK, 1, Status::Exists, REDISTRIBUTORS);
        world.end(handle);
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn every_way_to_fail_with_a_vm() {
    in_world(64, |world| {
        let handle = sealed(world, PKVM);
        world.refuses("VCPU_RUN", &[handle, 128], Status::Invalid, 0);
        world.refuses("VCPU_RUN", &[handle, 1], Status::Absent, 0);
        world.refuses("SPI", &[handle, 31, 1], Status::Invalid, 0);
        world.refuses("SPI", &[handle, 32, 2], Status::Invalid, 0);
        world.refuses("SPI", &[handle, 1019, 1], Status::Invalid, 0);

        for (name, private) in [("CLAIM", Status::NotOffered), ("RELEASE", Status::Denied)] {
            world.refuses(name, &[handle, ENTRY, 1], private, ENTRY);
            world.refuses(name, &[handle, ENTRY + 4 * PAGE_SIZE, 1], Status::Absent, ENTRY + 4 * PAGE_SIZE);
            world.refuses(name, &[handle, ENTRY + 8, 1], Status::Unaligned, 0);
            world.refuses(name, &[handle, ENTRY, 0], Status::Invalid, 0);
            world.refuses(name, &[handle, 1 << 40, 1], Status::Overflow, 0);
            world.refuses(name, &[handle, 0, (1 << 18) + 1], Status::TooLarge, 0);
        }
        run(world, handle, hvc([0xc600_0003, ENTRY, 1, 0]));
        world.refuses("CLAIM", &[handle, ENTRY, 2], Status::NotOffered, ENTRY + PAGE_SIZE);
        world.does("CLAIM", &[handle, ENTRY, 1]);
        world.refuses("CLAIM", &[handle, ENTRY, 1], Status::Denied, ENTRY);

        world.refuses("FORCE_RECLAIM", &[PAYLOAD, 1], Status::Denied, PAYLOAD);
        world.refuses("FORCE_RECLAIM", &[PAYLOAD + BLOCK, 1], Status::Denied, PAYLOAD + BLOCK);
        world.refuses("FORCE_RECLAIM", &[METADATA, 1], Status::Denied, METADATA);
        world.refuses("FORCE_RECLAIM", &[PAYLOAD + PAGE_SIZE, 513], Status::TooLarge, 0);
        world.does("FORCE_RECLAIM", &[PAYLOAD + PAGE_SIZE, 1]);
        let poisoned = ENTRY + PAGE_SIZE;
        world.refuses("VM_MAP", &[handle, poisoned, PAYLOAD + PAGE_SIZE, 1], Status::Poisoned, PAYLOAD + PAGE_SIZE);
        world.refuses("CLAIM", &[handle, poisoned, 1], Status::Poisoned, poisoned);
        // Until the guest gives the frame up.
        run(world, handle, hvc([0xc600_0009, poisoned, 1, 0]));
        world.does("VM_MAP", &[handle, poisoned, PAYLOAD + PAGE_SIZE, 1]);
        world.does("FORCE_RECLAIM", &[PAYLOAD + PAGE_SIZE, 1]);

        // What is the VM's is not the host's; the run page is, but the hypervisor uses it.
        for page in [METADATA, VCPU, TABLES, PAYLOAD, PAYLOAD + 2 * PAGE_SIZE, RUN_PAGE] {
            for function in [SHARE, DONATE, UNSHARE, TAKE_BACK, PIN, UNPIN] {
                world.fails([function, page, 1, 0], Status::Denied, page);
            }
        }
        world.does("VM_TEARDOWN", &[handle]);
        world.refuses("VM_DESTROY", &[handle], Status::Busy, 0);
        world.refuses("VM_RECLAIM", &[handle, 1 << 40, 1], Status::Overflow, 0);
        world.refuses("VM_RECLAIM", &[handle, 0, (1 << 18) + 1], Status::TooLarge, 0);
        world.reclaim_all(handle, 32);
        world.destroy(handle);
    });
}

/// Calls that name a VM, as they could succeed at some point of the life of one with four pages.
fn calls_about(handle: u64, vcpu_pages: u64) -> [(&'static str, Vec<u64>); 15] {
    [
        ("VM_DONATE_TABLES", vec![handle, TABLES + 0x2_0000, 1]),
        ("VCPU_CREATE", vec![handle, 1, VCPU + 0x1_0000, vcpu_pages, RUN_PAGE + PAGE_SIZE]),
        ("VM_MAP", vec![handle, ENTRY + 4 * PAGE_SIZE, PAYLOAD + BLOCK, 1]),
        ("VM_UNMAP", vec![handle, ENTRY, 1]),
        ("VM_SEAL", vec![handle, ENTRY, ENTRY, DISTRIBUTOR, REDISTRIBUTORS]),
        ("VCPU_RUN", vec![handle, 0]),
        ("VCPU_GET_REGISTER", vec![handle, 0, 0]),
        ("VCPU_SET_REGISTER", vec![handle, 0, 0, 0]),
        ("VM_TEARDOWN", vec![handle]),
        ("VM_RECLAIM", vec![handle, ENTRY, 1]),
        ("VM_DESTROY", vec![handle]),
        ("CLAIM", vec![handle, ENTRY, 1]),
        ("RELEASE", vec![handle, ENTRY, 1]),
        ("SPI", vec![handle, 32, 1]),
        ("FORCE_RECLAIM", vec![PAYLOAD, 1]),
    ]
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn steps_out_of_order() {
    in_world(64, |world| {
        let (_, vcpu_pages) = world.sizes(PKVM);
        let refuses = |handle, names: &[&str], status| {
            for (name, arguments) in calls_about(handle, vcpu_pages) {
                if names.contains(&name) {
                    world.refuses(name, &arguments, status, 0);
                }
            }
        };
        let handle = create(world, PKVM);
        world.does("VM_MAP", &[handle, ENTRY, PAYLOAD, 4]);
        let always = ["VM_UNMAP", "VM_RECLAIM", "VM_DESTROY", "VCPU_GET_REGISTER", "VCPU_SET_REGISTER"];
        refuses(handle, &always, Status::WrongState);
        refuses(handle, &["VCPU_RUN", "SPI"], Status::WrongState);
        seal(world, handle);
        refuses(handle, &always, Status::WrongState);
        refuses(handle, &["VCPU_CREATE", "VM_SEAL"], Status::WrongState);
        world.does("VM_TEARDOWN", &[handle]);
        let dying =
            ["VCPU_CREATE", "VM_MAP", "VM_UNMAP", "VM_SEAL", "VCPU_RUN", "VM_TEARDOWN", "CLAIM", "RELEASE", "SPI"];
        refuses(handle, &dying, Status::WrongState);
        refuses(handle, &["FORCE_RECLAIM"], Status::WrongState);
        refuses(handle, &["VM_DESTROY"], Status::Busy);
        world.does("VM_DONATE_TABLES", &[handle, TABLES + 0x2_0000, 1]);
        world.reclaim_all(handle, 32);
        world.destroy(handle);
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn handles_that_name_nothing() {
    in_world(64, |world| {
        let (_, vcpu_pages) = world.sizes(PKVM);
        let bad = |handles: &[u64]| {
            for &handle in handles {
                for (name, arguments) in calls_about(handle, vcpu_pages) {
                    if name != "FORCE_RECLAIM" {
                        world.refuses(name, &arguments, Status::BadHandle, 0);
                    }
                }
            }
        };
        bad(&[0, 1, 254, 255, 1 << 8, u64::MAX]);
        let first = sealed(world, PKVM);
        bad(&[first + 1, first ^ 1 << 63, first + 256, first - 256, first & 0xff]);
        world.end(first);
        bad(&[first]);
        let second = sealed(world, PKVM);
        assert_ne!(first, second);
        bad(&[first]);
        world.end(second);
        bad(&[first, second]);
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn registers_of_an_ordinary_vms_vcpu() {
    const PC: u64 = 64;
    in_world(64, |world| {
        let handle = create(world, ORDINARY);
        for register in [0, 60, PC, 84, 210, 213, 0xc080] {
            world.does("VCPU_SET_REGISTER", &[handle, 0, register, register << 40 | 5]);
            assert_eq!(world.does("VCPU_GET_REGISTER", &[handle, 0, register]), register << 40 | 5);
        }
        for register in [1, 0xffff, 0x1_0000, 0x1_0000_0000 | PC] {
            world.refuses("VCPU_GET_REGISTER", &[handle, 0, register], Status::Invalid, 0);
            world.refuses("VCPU_SET_REGISTER", &[handle, 0, register, 0], Status::Invalid, 0);
        }
        world.refuses("VCPU_GET_REGISTER", &[handle, 1, PC], Status::Absent, 0);
        world.refuses("VCPU_SET_REGISTER", &[handle, 128, PC, 0], Status::Invalid, 0);
        world.does("VM_MAP", &[handle, ENTRY, PAYLOAD, 4]);
        seal(world, handle);
        assert_eq!(world.does("VCPU_GET_REGISTER", &[handle, 0, PC]), ENTRY);
        assert_eq!(world.does("VCPU_GET_REGISTER", &[handle, 0, 60]), 60 << 40 | 5);
        world.end(handle);
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn registers_are_at_first_what_is_said_without_a_vm() {
    const FIRST_SYSTEM: u64 = 0x8000;
    const CNTVCT_EL0: u64 = 0xdf02;
    in_world(64, |world| {
        let ask = |name, arguments: &[u64]| {
            let [status, value, ..] = world.hvc(call(name, arguments));
            (status, value)
        };
        let reset: Vec<_> =
            (FIRST_SYSTEM..0x1_0000).map(|number| ask("REGISTER_RESET_VALUE", &[ORDINARY, number])).collect();
        let handle = create(world, ORDINARY);
        let known = (FIRST_SYSTEM..).zip(&reset).filter(|&(number, &expected)| {
            let found = ask("VCPU_GET_REGISTER", &[handle, 0, number]);
            // It runs.
            assert!(number == CNTVCT_EL0 || found == expected, "{number:#x}: {found:x?}, expected {expected:x?}");
            expected.0 == 0
        });
        assert!(known.count() > 64);
        world.end(handle);
    });
    in_world(1, |world| {
        for register in [0, 64, 213, FIRST_SYSTEM - 1, 0x1_0000, u64::MAX] {
            world.refuses("REGISTER_RESET_VALUE", &[ORDINARY, register], Status::Invalid, 0);
        }
        world.refuses("REGISTER_RESET_VALUE", &[ORDINARY | 1 << 32, 0xc000], Status::Reserved, 0);
        world.refuses("REGISTER_RESET_VALUE", &[3, 0xc000], Status::Invalid, 0);
        world.does("REGISTER_RESET_VALUE", &[PKVM, 0xc005]);
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn a_running_vcpu_keeps_others_away() {
    static MEETING: Barrier = Barrier::new(2);
    in_world(64, |world| {
        let handle = sealed(world, PKVM);
        world.machine.meet_at(Some(&MEETING));
        thread::scope(|scope| {
            scope.spawn(|| assert_eq!(world.hvc(call("VCPU_RUN", &[handle, 0]))[0], 0));
            MEETING.wait();
            world.refuses("VCPU_RUN", &[handle, 0], Status::Busy, 0);
            world.refuses("VM_TEARDOWN", &[handle], Status::Busy, 0);
            world.refuses("VM_SEAL", &[handle, ENTRY, ENTRY, DISTRIBUTOR, REDISTRIBUTORS], Status::Busy, 0);
            // What does not end the stage goes on.
            world.refuses("VCPU_RUN", &[handle, 1], Status::Absent, 0);
            world.does("VM_MAP", &[handle, ENTRY + 4 * PAGE_SIZE, PAYLOAD + BLOCK, 1]);
            world.does("FORCE_RECLAIM", &[PAYLOAD, 1]);
            assert_eq!(world.named("SPI", &[handle, 40, 1])[0], 0);
            MEETING.wait();
        });
        world.machine.meet_at(None);
        world.end(handle);
    });
}

/// Addresses in guest memory of 33 bits.
const BITS: u64 = 33;

/// Returns a value for an argument that has a chance to be good.
fn argument(kind: Kind, seed: u64, handles: &[u64], sizes: [u64; 2]) -> u64 {
    let [kind_of_choice, low, high, ..] = seed.to_le_bytes();
    if kind_of_choice < 8 {
        return seed.rotate_left(u32::from(low));
    }
    let choose = |from: &[u64]| from[usize::from(low) % from.len()];
    let attributes = |kind| VmAttributes { kind, ipa_bits: BITS, vcpus: 2 }.bits();
    match kind {
        Kind::Zero => 0,
        Kind::PageAddress => METADATA + u64::from(low % 12) * 0x2_0000 + choose(&[0, 0, PAGE_SIZE]),
        Kind::GuestAddress { align: PAGE_SIZE } => ENTRY + u64::from(low % 6) * PAGE_SIZE,
        Kind::GuestAddress { align: 0x1_0000 } => choose(&[DISTRIBUTOR, REDISTRIBUTORS, ENTRY]),
        Kind::GuestAddress { .. } => ENTRY,
        Kind::PageCount { .. } => choose(&[1, 1, 2, 4, sizes[0], sizes[0], sizes[1], 512]),
        Kind::Number { last: REGISTER_LAST, .. } => choose(&[0, 64, 66, 84, 212, 0x4000, 0xc080, 0xdf02]),
        Kind::Number { first, .. } => first + u64::from(high % 2),
        Kind::Handle if handles.is_empty() => seed,
        Kind::Handle => choose(handles),
        Kind::Attributes => attributes(VmKind::ALL[usize::from(low) % VmKind::ALL.len()]),
    }
}

proptest! {
    #![proptest_config(proptest::test_runner::Config {
        cases: 32,
        failure_persistence: None,
        ..Default::default()
    })]

    /// Whatever host and guest do, nothing panics, the tables agree, what fails changes nothing, and the host gets all back.
    #[test]
    #[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
    fn no_life_of_a_vm_does_harm(
        kind in 0..VmKind::ALL.len(),
        is_sealed: bool,
        steps in proptest::collection::vec((0..CALLS.len() + 40, any::<[u64; 5]>(), 0..24_u8), 1..120),
    ) {
        in_world(64, |world| {
            let before = world.look().1;
            let first = VmAttributes { kind: VmKind::ALL[kind], ipa_bits: BITS, vcpus: 2 }.bits();
            let sizes = <[u64; 2]>::from(world.sizes(first));
            let mut handles = vec![if is_sealed { sealed(world, first) } else { create(world, first) }];
            for (index, seeds, action) in steps {
                // Those that lead on more often than the others.
                let vital = [
                    ["VM_CREATE", "VM_DONATE_TABLES", "VCPU_CREATE", "VM_MAP", "VM_SEAL"],
                    ["VCPU_RUN", "VCPU_RUN", "CLAIM", "RELEASE", "FORCE_RECLAIM"],
                ]
                .concat();
                let name = CALLS.get(index).map_or_else(|| vital[index % vital.len()], |call| call.name);
                // Most of them live on.
                let name = if name == "VM_TEARDOWN" && action % 8 != 0 { "VCPU_RUN" } else { name };
                let kinds = CALLS.iter().find(|call| call.name == name).unwrap().arguments.iter().map(|it| it.kind);
                let values = kinds.zip(seeds).map(|(kind, seed)| argument(kind, seed, &handles, sizes));
                let values = call(name, &values.collect::<Vec<_>>());

                // pKVM's share, unshare and relinquish; what the other guests have at these numbers.
                let function = [0xc600_0003, 0xc600_0004, 0xc600_0009, 0xc400_0197][usize::from(action % 4)];
                let at = ENTRY + u64::from(action / 4) * PAGE_SIZE;
                world.machine.set_actions(hvc([function, at, 2, 0]));

                let before = state_of_memory(world);
                let [x0, x1, x2, x3] = world.hvc(&values);
                world.is_consistent();
                if matches!(name, "UID" | "REVISION") {
                    continue;
                }
                match Status::from_code(x0.cast_signed()).expect("a status") {
                    Status::Success if name == "VM_CREATE" => handles.push(x1),
                    Status::Success if name == "VM_DESTROY" && x1 == 0 => handles.retain(|&it| it != values[1]),
                    Status::Success => continue,
                    status => {
                        assert!(state_of_memory(world) == before, "{name} changed something: {status:?}");
                        let kept = |index: usize| values.get(index).copied().unwrap_or(0x1000 + index as u64);
                        assert_eq!([x2, x3], [kept(2), kept(3)]);
                        assert!(status == Status::NeedsTables || x1 % PAGE_SIZE == 0, "{status:?} {x1:#x}");
                    }
                }
            }
            for handle in handles {
                // It may be dying already.
                world.hvc(call("VM_TEARDOWN", &[handle]));
                world.reclaim_all(handle, 32);
                world.destroy(handle);
            }
            let counts = world.look().1;
            let guests = [counts.hyp_kept, counts.host_lent, counts.guest_owned, counts.guest_offered, counts.guest_claimed];
            assert_eq!(guests, [0; 5]);
            let all = |counts: &Counts| counts.host_owned + counts.host_shared + counts.hyp_donated;
            assert_eq!(all(&counts), all(&before));
        });
    }
}
