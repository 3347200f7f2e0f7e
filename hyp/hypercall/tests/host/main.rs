//! Host calls from registers to registers, on the recording machine.

#[cfg(loom)]
mod models;
mod vms;

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use ravelin_abi::{CALL_COUNTERS, CALLS, MAX_RANGE_PAGES, PageStateCode, Statistics, Status, VENDOR_UID};
use ravelin_hypercall::FaultAction;
use ravelin_memory::{Ipa, PAGE_SIZE};
use ravelin_ownership::HOST_RESERVE;
use ravelin_pgtable::recording::Stage;
use ravelin_world::{Layout, World};

const RAM: Range<u64> = Layout::FOUR_BLOCKS.ram;
const CARVE_OUT: Range<u64> = Layout::FOUR_BLOCKS.carve_out;
const PAGE: u64 = RAM.start;

const FEATURES: u64 = 0xc600_1000;
const SHARE: u64 = 0xc600_1001;
const UNSHARE: u64 = 0xc600_1002;
const DONATE: u64 = 0xc600_1003;
const TAKE_BACK: u64 = 0xc600_1004;
const PIN: u64 = 0xc600_1005;
const UNPIN: u64 = 0xc600_1006;
const PAGE_STATE: u64 = 0xc600_1007;
const STATISTICS: u64 = 0xc600_1008;

/// Runs a test in a world with so many tables.
fn in_world(pool_pages: usize, test: impl FnOnce(&World<'_>)) {
    ravelin_world::in_world(&Layout { pool_pages, ..Layout::FOUR_BLOCKS }, test);
}

fn succeeds(world: &World<'_>, function: u64, address: u64, pages: u64) {
    let answer = world.hvc([function, address, pages, 0]);
    assert_eq!(answer, [0, 0, pages, 0], "{function:#x} of {pages} pages at {address:#x}");
    world.is_consistent();
}

fn state(world: &World<'_>, page: u64) -> (PageStateCode, u64) {
    let [status, state, pins, _] = world.hvc([PAGE_STATE, page, 0, 0]);
    assert_eq!(status, 0);
    (PageStateCode::from_code(state).unwrap(), pins)
}

/// Shares a page and has the statistics written to it, and to nothing else.
fn statistics_of(world: &World<'_>, page: u64) -> Statistics {
    succeeds(world, SHARE, page, 1);
    let before = world.machine.peek::<{ PAGE_SIZE as usize }>(page, 0);
    assert_eq!(world.hvc([STATISTICS, page, 0, 7]), [0, Statistics::SIZE as u64, 0, 7]);
    world.is_consistent();
    let after = world.machine.peek::<{ PAGE_SIZE as usize }>(page, 0);
    let (written, rest) = after.split_first_chunk::<{ Statistics::SIZE }>().unwrap();
    assert_eq!(rest, &before[Statistics::SIZE..]);
    Statistics::from_bytes(written)
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn discovery() {
    in_world(64, |world| {
        assert_eq!(world.hvc([0x8600_ff01, 1, 2, 3]), VENDOR_UID.map(u64::from));
        assert_eq!(world.hvc([0x8600_ff03, 1, 2, 3]), [1, 5, 2, 3]);
        assert_eq!(world.hvc([FEATURES, 0, 2, 3]), [0, 0xffff_c1ff, 1 << 18, 512]);
        world.fails([FEATURES, 1, 2, 3], Status::Invalid, 0);
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn what_is_no_call_changes_x0_alone() {
    in_world(64, |world| {
        let refused = |immediate, function| {
            let before = world.look();
            let answer = world.hvc_with(immediate, [function, PAGE, 1, 0]);
            assert_eq!(answer, [Status::NotSupported.register(), PAGE, 1, 0], "{function:#x}");
            assert_eq!(world.look(), before);
        };
        for call in CALLS {
            let function = u64::from(call.number);
            refused(1, function);
            refused(0xffff, function);
            for bit in (16..24).chain(32..64) {
                refused(0, function | 1 << bit);
            }
        }
        // PSCI and SMCCC discovery have another conduit, KVM's calls another hypervisor.
        for function in [0, 0x8400_0000, 0xc400_0003, 0x8000_0000, 0x8000_0001, 0x8600_0000, 0xc600_0003, 0xc600_1009] {
            refused(0, function);
        }
        let counters = statistics_of(world, PAGE).calls;
        assert_eq!(counters.iter().sum::<u64>(), 2, "SHARE and STATISTICS");
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn the_life_of_a_page() {
    in_world(64, |world| {
        assert_eq!(state(world, PAGE), (PageStateCode::Owned, 0));
        succeeds(world, SHARE, PAGE, 4);
        assert_eq!(state(world, PAGE + 0x3000), (PageStateCode::SharedOwned, 0));
        succeeds(world, PIN, PAGE, 2);
        succeeds(world, PIN, PAGE + 0x1000, 2);
        assert_eq!(state(world, PAGE + 0x1000), (PageStateCode::SharedOwned, 2));
        world.fails([UNSHARE, PAGE, 4, 0], Status::Busy, PAGE);
        world.fails([UNPIN, PAGE, 4, 0], Status::Denied, PAGE + 0x3000);
        succeeds(world, UNPIN, PAGE, 3);
        succeeds(world, UNPIN, PAGE + 0x1000, 1);
        succeeds(world, UNSHARE, PAGE, 4);
        succeeds(world, DONATE, PAGE, 512);
        assert_eq!(state(world, PAGE), (PageStateCode::NoPage, 0));
        world.fails([SHARE, PAGE, 1, 0], Status::Denied, PAGE);
        succeeds(world, TAKE_BACK, PAGE, 512);
        assert_eq!(state(world, PAGE), (PageStateCode::Owned, 0));
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn every_way_to_fail() {
    in_world(64, |world| {
        succeeds(world, SHARE, PAGE + 0x2000, 1);
        for function in [SHARE, DONATE] {
            world.fails([function, PAGE, 4, 0], Status::Denied, PAGE + 0x2000);
            world.fails([function, PAGE, 4, 1], Status::Reserved, 0);
            world.fails([function, PAGE + 1, 4, 0], Status::Unaligned, 0);
            world.fails([function, PAGE, 0, 0], Status::Invalid, 0);
            world.fails([function, PAGE, 1 << 36, 0], Status::Overflow, 0);
            world.fails([function, PAGE, MAX_RANGE_PAGES + 1, 0], Status::TooLarge, 0);
            world.fails([function, RAM.end, 1, 0], Status::NotRam, RAM.end);
            world.fails([function, CARVE_OUT.start, 1, 0], Status::Denied, CARVE_OUT.start);
        }
        world.fails([TAKE_BACK, PAGE, 513, 0], Status::TooLarge, 0);
        world.fails([TAKE_BACK, CARVE_OUT.start, 1, 0], Status::Denied, CARVE_OUT.start);
        world.fails([PIN, PAGE, 1, 0], Status::Denied, PAGE);
        world.fails([PAGE_STATE, PAGE, 1, 0], Status::Reserved, 0);
        world.fails([STATISTICS, PAGE, 0, 0], Status::Denied, PAGE);
        world.fails([STATISTICS, RAM.start - 0x1000, 0, 0], Status::NotRam, RAM.start - 0x1000);
        for _ in 0..4095 {
            assert_eq!(world.hvc([PIN, PAGE + 0x2000, 1, 0])[0], 0);
        }
        world.fails([PIN, PAGE + 0x2000, 1, 0], Status::Limit, PAGE + 0x2000);
        world.fails([STATISTICS, PAGE + 0x2000, 0, 0], Status::Limit, PAGE + 0x2000);
        assert_eq!(state(world, 0xffff_ffff_f000), (PageStateCode::NoPage, 0));
        assert_eq!(state(world, CARVE_OUT.start), (PageStateCode::NoPage, 0));
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn nobody_is_to_blame_for_a_lack_of_tables() {
    in_world(HOST_RESERVE + 2, |world| {
        succeeds(world, SHARE, PAGE, 1);
        // The first mapping in EL2 takes three.
        world.fails([PIN, PAGE, 1, 0], Status::NoMemory, 0);
        world.fails([STATISTICS, PAGE, 0, 0], Status::NoMemory, 0);
        world.fails([DONATE, PAGE + 0x1000, 1, 0], Status::NoMemory, 0);
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn statistics_tell_what_happened() {
    in_world(64, |world| {
        succeeds(world, DONATE, PAGE + 0x20_0000, 600);
        world.fails([DONATE, PAGE + 0x20_0000, 1, 0], Status::Denied, PAGE + 0x20_0000);
        assert_eq!(world.host.fault(world.machine, Ipa::new(PAGE).unwrap()), FaultAction::Resume);
        assert_eq!(world.host.fault(world.machine, Ipa::new(PAGE + 0x20_0000).unwrap()), FaultAction::Inject);
        let mut registers = [0; 18];
        registers[0] = 0x8400_0006;
        world.host.smc(0, 0, &mut registers);
        world.host.smc(0, 1, &mut registers);

        let statistics = statistics_of(world, PAGE);
        assert_eq!(state(world, PAGE), (PageStateCode::SharedOwned, 0), "the hypervisor's pin is gone");
        let mut calls = [0; CALL_COUNTERS];
        (calls[1], calls[3], calls[8]) = (1, 2, 1);
        assert_eq!(
            statistics,
            Statistics {
                version: 2,
                size: Statistics::SIZE as u64,
                host_owned_pages: 3 * 512 - 600 - 1,
                host_shared_pages: 1,
                hypervisor_pages: 512,
                donated_pages: 600,
                faults_resolved: 1,
                faults_denied: 1,
                evictions: 0,
                smcs_forwarded: 1,
                smcs_refused: 1,
                calls,
                ..statistics
            }
        );
        assert_eq!(statistics.host_tables + statistics.el2_tables + statistics.free_tables, 64);
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn the_host_cannot_take_back_a_pin_of_the_hypervisors() {
    const ROUNDS: usize = 300;
    in_world(64, |world| {
        succeeds(world, SHARE, PAGE, 1);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    // Would fall into the time between pin and write; the machine notices.
                    assert_eq!(world.hvc([UNPIN, PAGE, 1, 0])[0], Status::Denied.register());
                }
            });
            for _ in 0..ROUNDS {
                assert_eq!(world.hvc([STATISTICS, PAGE, 0, 0])[0], 0);
            }
            done.store(true, Relaxed);
        });
        assert_eq!(state(world, PAGE), (PageStateCode::SharedOwned, 0));
        world.is_consistent();
    });
}

#[test]
#[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
fn a_cpu_starts_only_in_memory_of_the_host() {
    in_world(64, |world| {
        let start = |entry| {
            let mut registers = [0; 18];
            registers[..4].copy_from_slice(&[0xc400_0003, 1, entry, 5]);
            world.host.smc(0, 0, &mut registers);
            registers[0]
        };
        let invalid_address = -9_i64 as u64;
        succeeds(world, DONATE, PAGE, 1);
        for entry in [PAGE, CARVE_OUT.start, RAM.end, RAM.start - 0x1000, 0, 1 << 48] {
            assert_eq!(start(entry), invalid_address, "{entry:#x}");
        }
        succeeds(world, SHARE, PAGE + 0x1000, 1);
        assert_eq!(start(PAGE + 0x1004), 0);
        assert_eq!(world.host.take_start(1).map(|start| (start.entry, start.context)), Some((PAGE + 0x1004, 5)));
        assert_eq!(world.host.take_start(1), None);
    });
}

fn function() -> impl Strategy<Value = u64> {
    let known = (0..CALLS.len()).prop_map(|index| u64::from(CALLS[index].number));
    prop_oneof![
        20 => known,
        1 => 0xc600_1000_u64..0xc600_1020,
        1 => any::<u32>().prop_map(u64::from),
        1 => any::<u64>(),
    ]
}

fn address() -> impl Strategy<Value = u64> {
    let page = |range: Range<u64>| (range.start >> 12..range.end >> 12).prop_map(|page| page << 12);
    prop_oneof![
        10 => page(RAM.start..RAM.start + 0x8000),
        5 => (0..5_u64).prop_map(|block| RAM.start + block * 0x20_0000),
        1 => page(RAM.start - 0x2000..RAM.start + 0x2000),
        1 => any::<u64>(),
        1 => any::<u64>().prop_map(|address| address & !0xfff),
        1 => Just((1 << 48) - 0x1000),
    ]
}

fn pages() -> impl Strategy<Value = u64> {
    prop_oneof![10 => 1..6_u64, 5 => 510..515_u64, 2 => Just(0), 1 => 0..3000_u64, 1 => any::<u64>()]
}

fn flags() -> impl Strategy<Value = u64> {
    prop_oneof![20 => Just(0), 1 => any::<u64>()]
}

proptest! {
    #![proptest_config(proptest::test_runner::Config {
        cases: 32,
        failure_persistence: None,
        ..Default::default()
    })]

    /// Whatever the host sends, nothing panics, the tables agree, and what fails changes nothing.
    #[test]
    #[cfg_attr(miri, ignore = "walks the tables of all RAM after each call")]
    fn no_registers_do_harm(
        steps in proptest::collection::vec((function(), address(), pages(), flags(), any::<bool>()), 1..40),
        pool in 32..80_usize,
    ) {
        in_world(pool, |world| for (function, address, pages, flags, touch) in steps {
            let before = world.look();
            let [x0, x1, x2, x3] = world.hvc([function, address, pages, flags]);
            if CALLS.iter().any(|call| u64::from(call.number) == function) && function >= FEATURES {
                let status = Status::from_code(x0.cast_signed()).expect("a status");
                if status != Status::Success {
                    assert_eq!(world.look(), before, "{status:?}");
                    assert_eq!([x2, x3], [pages, flags]);
                    let in_range = x1 >= address && x1 - address < pages.saturating_mul(PAGE_SIZE).max(PAGE_SIZE);
                    assert!(x1 == 0 || in_range && x1 % PAGE_SIZE == 0);
                }
            }
            if let (true, Some(ipa)) = (touch, Ipa::new(address)) {
                let action = world.host.fault(world.machine, ipa);
                let mapped = world.machine.inner.translate(Stage::Stage2, address);
                assert_eq!(action == FaultAction::Resume, !mapped.contains(&None));
                assert!(action == FaultAction::Inject || !CARVE_OUT.contains(&address));
            }
            world.is_consistent();
        });
    }
}
