use proptest::prelude::*;
use ravelin_memory::Ipa;

use super::*;
use crate::{
    fake::{AT_ONCE, Owner},
    guest::tests::{GUEST, PAYLOAD, TestGuest, ipa, registers},
};

const INVALID: u64 = -3_i64 as u64;

fn outcome(test: &TestGuest, first: [u64; 4]) -> (Option<Outcome>, [u64; 4]) {
    let mut context = registers(first);
    let before = context;
    let outcome = match common(test.guest.kind(), &mut context) {
        Some(Common::Answered) => Some(Outcome::Done),
        Some(Common::Share) if exchange(&test.memory, &test.guest, &mut context, true).is_some() => {
            IpaRange::new(first[1], 1).ok().map(Outcome::Shared)
        }
        Some(Common::Unshare) if exchange(&test.memory, &test.guest, &mut context, false).is_some() => {
            Some(Outcome::Done)
        }
        _ => call(&test.memory, &test.guest, &mut context),
    };
    assert_eq!(context.x[4..], before.x[4..]);
    let x = [context.x[0], context.x[1], context.x[2], context.x[3]];
    assert_eq!(Context { x: before.x, ..context }, before);
    if !matches!(outcome, Some(Outcome::Done | Outcome::Shared(_) | Outcome::Relinquished(_))) {
        assert_eq!(x, first, "{outcome:?}");
    }
    (outcome, x)
}

fn single(page: u64) -> IpaRange {
    IpaRange::single(ipa(page))
}

fn pages(base: u64, pages: u64) -> IpaRange {
    IpaRange::new(base, pages).unwrap()
}

#[test]
fn discovery() {
    let test = TestGuest::new(VmKind::Pkvm, 0);
    let answer = |first| {
        let (outcome, results) = outcome(&test, first);
        assert_eq!(outcome, Some(Outcome::Done));
        results
    };
    assert_eq!(answer([0x8600_ff01, 1, 2, 3]), [0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d]);
    // Linux uses bits 2, 3 and 4, and 7 if it is there.
    assert_eq!(answer([0x8600_0000, 1, 2, 3]), [0x29d, 1 << 24 | 1 << 25, 0, 0]);
    assert_eq!(answer([0xc600_0002, 0, 0, 0]), [4096, 1, 0, 0]);
    for arguments in [[0xc600_0002, 1, 0, 0], [0xc600_0002, 0, 1, 0], [0xc600_0002, 0, 0, 1]] {
        assert_eq!(answer(arguments)[0], INVALID);
    }
    // The function identifier is in W0.
    assert_eq!(answer([0xffff_ffff_c600_0002, 0, 0, 0]), [4096, 1, 0, 0]);
}

#[test]
fn the_rest_is_not_supported() {
    let known = [0, 2, 3, 4, 7, 9, 0x38, 0x39];
    let functions = (0..0x80)
        .filter(|function| !known.contains(function))
        .flat_map(|function| [0x8600_0000 | function, 0xc600_0000 | function]);
    for function in functions.chain([0xc600_0000, 0x8600_0002, 0x8600_0003, 0x8600_0007, 0x8600_ff03, 0xc600_1000, 0]) {
        let test = TestGuest::new(VmKind::Pkvm, 1);
        let (outcome, _) = outcome(&test, [function, GUEST, 0, 0]);
        assert_eq!(outcome, None, "{function:#x}");
    }
    let ordinary = TestGuest::new(VmKind::Ordinary, 1);
    assert_eq!(outcome(&ordinary, [0x8600_0000, 0, 0, 0]).1, [1, 0, 0, 0]);
    let realm = TestGuest::new(VmKind::Realm, 1);
    for function in [0x8600_ff01, 0x8600_0000, 0xc600_0002, 0xc600_0003, 0xc600_0004, 0xc600_0007, 0xc600_0009] {
        assert_eq!(outcome(&realm, [function, GUEST, 0, 0]).0, None);
        if function >= 0xc600_0000 {
            assert_eq!(outcome(&ordinary, [function, GUEST, 0, 0]).0, None);
        }
    }
}

#[test]
fn one_page_there_and_back() {
    let test = TestGuest::new(VmKind::Pkvm, 2);
    let share = [0xc600_0003, GUEST, 0, 0];
    let unshare = [0xc600_0004, GUEST, 0, 0];
    let refused = (Some(Outcome::Done), [INVALID, 0, 0, 0]);
    assert_eq!(outcome(&test, unshare), refused);
    assert_eq!(outcome(&test, share), (Some(Outcome::Shared(single(GUEST))), [0; 4]));
    assert_eq!(test.look(GUEST), GuestPage::Offered);
    assert_eq!(outcome(&test, share), refused, "twice");
    assert_eq!(outcome(&test, unshare), (Some(Outcome::Done), [0; 4]));
    assert_eq!(test.look(GUEST), GuestPage::Private);
    assert_eq!(test.memory.content(PAYLOAD), 0xaa, "contents stay");
}

#[test]
fn claimed_pages_are_asked_for() {
    let test = TestGuest::new(VmKind::Pkvm, 4);
    let unshare = [0xc600_0004, GUEST, 4, 0];
    assert_eq!(outcome(&test, [0xc600_0003, GUEST, 4, 0]), (Some(Outcome::Shared(pages(GUEST, 4))), [0, 4, 0, 0]));
    test.claim(GUEST + 0x2000);
    assert_eq!(outcome(&test, unshare).0, Some(Outcome::Unshare(single(GUEST + 0x2000))));
    assert_eq!([test.look(GUEST), test.look(GUEST + 0x3000)], [GuestPage::Offered; 2], "nothing has changed");
    // The host refuses.
    let mut context = registers(unshare);
    refuse(&mut context);
    assert_eq!(context.x[..4], [INVALID, 0, 0, 0]);
    // The host releases, and the guest tries again.
    test.memory.release(test.guest.memory(), single(GUEST + 0x2000)).unwrap();
    assert_eq!(outcome(&test, unshare), (Some(Outcome::Done), [0, 4, 0, 0]));
}

#[test]
fn absent_pages_and_tables_are_waited_for() {
    let test = TestGuest::new(VmKind::Pkvm, 1);
    assert_eq!(outcome(&test, [0xc600_0003, GUEST, 2, 0]).0, Some(Outcome::PageFault(ipa(GUEST + 0x1000))));
    assert_eq!(test.look(GUEST), GuestPage::Private);
    assert_eq!(outcome(&test, [0xc600_0004, GUEST + 0x1000, 0, 0]).1[0], INVALID);
    assert_eq!(outcome(&test, [0xc600_0009, GUEST + 0x1000, 0, 0]).1[0], INVALID);
    test.memory.lock().tables_needed = 2;
    assert_eq!(outcome(&test, [0xc600_0003, GUEST, 0, 0]).0, Some(Outcome::NeedsTables(2)));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn long_ranges_are_done_in_parts() {
    let test = TestGuest::new(VmKind::Pkvm, 1000);
    let shared = outcome(&test, [0xc600_0003, GUEST, 1000, 0]);
    assert_eq!(shared, (Some(Outcome::Shared(pages(GUEST, AT_ONCE))), [0, AT_ONCE, 0, 0]));
    let rest = [0xc600_0003, GUEST + AT_ONCE * 0x1000, 1000 - AT_ONCE, 0];
    assert_eq!(outcome(&test, rest).1, [0, 1000 - AT_ONCE, 0, 0]);
    assert_eq!(outcome(&test, [0xc600_0004, GUEST, 1 << 18, 0]).1, [0, AT_ONCE, 0, 0]);
    assert_eq!(outcome(&test, [0xc600_0004, GUEST, (1 << 18) + 1, 0]).1, [INVALID, 0, 0, 0]);
}

#[test]
fn wrong_arguments() {
    let test = TestGuest::new(VmKind::Pkvm, 1);
    for function in [0xc600_0003, 0xc600_0004, 0xc600_0009] {
        for [address, count, reserved] in [
            [GUEST + 1, 0, 0],
            [GUEST + 0x800, 1, 0],
            [GUEST, 0, 1],
            [GUEST, u64::MAX, 0],
            [GUEST, 1 << 52, 0],
            [1 << 40, 0, 0],
            [(1 << 40) - 0x1000, 2, 0],
            [u64::MAX, 0, 0],
            [!0xfff, 1, 0],
            [1 << 48 | GUEST, 0, 0],
        ] {
            let call = [function, address, count, reserved];
            assert_eq!(outcome(&test, call), (Some(Outcome::Done), [INVALID, 0, 0, 0]), "{call:x?}");
        }
    }
    assert_eq!(test.look(GUEST), GuestPage::Private);
}

#[test]
fn poison_stays_until_the_guest_gives_the_frame_up() {
    let test = TestGuest::new(VmKind::Pkvm, 3);
    test.poison(PAYLOAD);
    test.poison(PAYLOAD + 0x1000);
    for function in [0xc600_0003, 0xc600_0004, 0xc600_0007] {
        assert_eq!(outcome(&test, [function, GUEST, 0, 0]).1[0], INVALID);
        assert_eq!(test.look(GUEST), GuestPage::Poisoned);
    }
    // With pages and without.
    let given = outcome(&test, [0xc600_0009, GUEST + 0x1000, 2, 0]);
    assert_eq!(given, (Some(Outcome::Relinquished(pages(GUEST + 0x1000, 2))), [0, 2, 0, 0]));
    assert_eq!(
        [0, 1, 2].map(|page| test.look(GUEST + page * 0x1000)),
        [GuestPage::Poisoned, GuestPage::Absent, GuestPage::Absent]
    );
    assert_eq!(outcome(&test, [0xc600_0009, GUEST, 0, 0]).1[0], 0);
    assert_eq!(test.look(GUEST), GuestPage::Absent);
}

#[test]
fn giving_pages_up() {
    let test = TestGuest::new(VmKind::Pkvm, 3);
    let given = outcome(&test, [0xc600_0009, GUEST, 2, 0]);
    assert_eq!(given, (Some(Outcome::Relinquished(pages(GUEST, 2))), [0, 2, 0, 0]));
    assert_eq!((test.look(GUEST), test.memory.owner_of(PAYLOAD)), (GuestPage::Absent, Owner::Host));
    assert_eq!([test.memory.content(PAYLOAD), test.memory.content(PAYLOAD + 0x2000)], [0, 0xaa]);
    outcome(&test, [0xc600_0003, GUEST + 0x2000, 0, 0]);
    assert_eq!(outcome(&test, [0xc600_0009, GUEST + 0x2000, 0, 0]).1[0], INVALID, "shared");
}

#[test]
fn devices() {
    let test = TestGuest::new(VmKind::Pkvm, 1);
    let guard = |address, second, third| outcome(&test, [0xc600_0007, address, second, third]).1[0];
    assert_eq!(guard(GUEST, 0, 0), INVALID, "memory");
    assert_eq!([guard(0x900_0001, 0, 0), guard(1 << 40, 0, 0)], [INVALID; 2]);
    assert_eq!([guard(0x900_0000, 1, 0), guard(0x900_0000, 0, 1)], [INVALID; 2]);
    assert_eq!([guard(0x900_0000, 0, 0), guard(0x900_0000, 0, 0)], [0; 2]);
    // A device cannot be shared, nor what contains one.
    assert_eq!(outcome(&test, [0xc600_0003, 0x900_0000, 0, 0]).1[0], INVALID);
    assert_eq!(outcome(&test, [0xc600_0003, 0x8ff_f000, 2, 0]).1[0], INVALID);
    assert_eq!(outcome(&test, [0xc600_0003, 0x8ff_f000, 0, 0]).0, Some(Outcome::PageFault(ipa(0x8ff_f000))));
    for page in 0..31 {
        assert_eq!(guard(0xa00_0000 + page * 0x2000, 0, 0), 0);
    }
    assert_eq!(guard(0xb00_0000, 0, 0), INVALID, "no room");
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 512 })
    })]

    /// Whatever a guest sends: results have a known form, and pages are never lost.
    #[test]
    fn any_call(
        calls in prop::collection::vec(
            (
                prop_oneof![
                    Just(0xc600_0003), Just(0xc600_0004), Just(0xc600_0007), Just(0xc600_0009),
                    any::<u64>(), 0xc600_0000_u64..0xc600_0010,
                ],
                prop_oneof![(0_u64..8).prop_map(|page| GUEST + page * 0x1000), any::<u64>()],
                prop_oneof![0_u64..5, any::<u64>()],
                prop_oneof![9 => Just(0), 1 => any::<u64>()],
            ),
            1..20,
        ),
        claimed in prop::collection::vec(0_u64..4, 0..3),
    ) {
        let test = TestGuest::new(VmKind::Pkvm, 4);
        let mut given = 0;
        for (number, (function, address, count, reserved)) in calls.into_iter().enumerate() {
            let (outcome, [status, done, ..]) = outcome(&test, [function, address, count, reserved]);
            match outcome {
                Some(Outcome::Shared(range)) => {
                    prop_assert_eq!(status, 0);
                    prop_assert!(done == range.pages() || count == 0 && done == 0);
                    for frame in range.iter() {
                        prop_assert_eq!(test.look(frame.raw()), GuestPage::Offered);
                    }
                }
                Some(Outcome::Relinquished(range)) => given += range.pages(),
                Some(Outcome::Done) => {}
                Some(Outcome::PageFault(frame)) => prop_assert_eq!(test.look(frame.raw()), GuestPage::Absent),
                Some(Outcome::Unshare(range)) => {
                    prop_assert!(range.iter().any(|frame: Ipa| test.look(frame.raw()) == GuestPage::Claimed));
                }
                Some(Outcome::NeedsTables(_) | Outcome::HostCall { .. } | Outcome::Converted | Outcome::Ring(_)) => {
                    prop_assert!(false);
                }
                None => {}
            }
            if let Some(&page) = claimed.get(number) {
                let _ = test.memory.claim(test.guest.memory(), single(GUEST + page * 0x1000));
            }
            // The root of its stage 2, and what it has not given up.
            prop_assert_eq!(test.memory.gone() as u64, 2 + 4 - given);
        }
    }
}
