use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::{
    fake::AT_ONCE,
    guest::tests::{GUEST, PAYLOAD, TestGuest, ipa, registers},
    measurement::Measurements,
};

const SET: u64 = 0xc400_0197;
const GET: u64 = 0xc400_0198;
const END: u64 = 1 << 39;

/// Makes a call; returns the outcome and all registers.
fn call_with<const N: usize>(test: &TestGuest, first: [u64; N]) -> (Option<Outcome>, [u64; 31]) {
    let mut context = registers(first);
    let before = context;
    let mut sent = None;
    let outcome = if answer(test.guest.kind(), &mut context) {
        Some(Outcome::Done)
    } else {
        call(&test.memory, &test.guest, &mut context, |registers| sent = Some(*registers))
    };
    assert_eq!(sent.is_some(), matches!(outcome, Some(Outcome::HostCall { .. })));
    let x = context.x;
    assert_eq!(Context { x: before.x, ..context }, before);
    if !matches!(outcome, Some(Outcome::Done | Outcome::Shared(_))) {
        assert_eq!(x, before.x, "{outcome:?}");
    }
    (outcome, x)
}

/// Makes a call that is done; returns x0 to x2.
fn results<const N: usize>(test: &TestGuest, first: [u64; N]) -> [u64; 3] {
    let (outcome, x) = call_with(test, first);
    assert!(matches!(outcome, Some(Outcome::Done | Outcome::Shared(_))), "{outcome:?}");
    [x[0], x[1], x[2]]
}

fn single(page: u64) -> IpaRange {
    IpaRange::single(ipa(page))
}

#[test]
fn version_and_features() {
    let test = TestGuest::new(VmKind::Realm, 0);
    assert_eq!(results(&test, [0xc400_0190, 0x1_0000]), [0, 0x1_0000, 0x1_0000]);
    for version in [0, 0x1_0001, 0x2_0000, u64::MAX] {
        assert_eq!(results(&test, [0xc400_0190, version]), [1, 0x1_0000, 0x1_0000]);
    }
    assert_eq!(results(&test, [0xc400_0191, 0])[..2], [0, 0]);
}

#[test]
fn the_rest_is_not_supported() {
    let known = [0x190, 0x191, 0x192, 0x193, 0x196, 0x197, 0x198, 0x199];
    let test = TestGuest::new(VmKind::Realm, 1);
    for function in (0x100..0x200).filter(|function| !known.contains(function)) {
        assert_eq!(call_with(&test, [0xc400_0000 | function, GUEST]).0, None, "{function:#x}");
    }
    for function in [0x8400_0190, 0x190, 0xc600_0190] {
        assert_eq!(call_with(&test, [function, GUEST]).0, None);
    }
    for kind in [VmKind::Pkvm, VmKind::Ordinary] {
        let test = TestGuest::new(kind, 1);
        for function in known {
            assert_eq!(call_with(&test, [0xc400_0000 | function, GUEST]).0, None);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn the_configuration() {
    let test = TestGuest::new(VmKind::Realm, 2);
    test.memory.lock().written.extend((GUEST..GUEST + 0x2000).map(|address| (address, 0xee)));
    assert_eq!(results(&test, [0xc400_0196, GUEST])[0], 0);
    let page: Vec<_> = (GUEST..GUEST + 0x2000).map(|address| test.memory.lock().written[&address]).collect();
    assert_eq!(page[..9], [40, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert!(page[9..0x1000].iter().all(|&byte| byte == 0) && page[0x1000..].iter().all(|&byte| byte == 0xee));
    for address in [GUEST + 8, END, END | GUEST, u64::MAX, 1 << 48] {
        assert_eq!(results(&test, [0xc400_0196, address])[0], 1, "{address:#x}");
    }
    assert_eq!(call_with(&test, [0xc400_0196, GUEST + 0x2000]).0, Some(Outcome::PageFault(ipa(GUEST + 0x2000))));
    results(&test, [SET, GUEST, GUEST + 0x1000, 0, 0]);
    assert_eq!(results(&test, [0xc400_0196, GUEST])[0], 1, "shared");
}

#[test]
fn states_there_and_back() {
    let test = TestGuest::new(VmKind::Realm, 4);
    let top = GUEST + 0x4000;
    assert_eq!(results(&test, [GET, GUEST, top + 0x1000]), [0, top, 1]);
    let (outcome, x) = call_with(&test, [SET, GUEST + 0x1000, GUEST + 0x3000, 0, 0]);
    assert_eq!(outcome, Some(Outcome::Shared(IpaRange::new(GUEST + 0x1000, 2).unwrap())));
    assert_eq!(x[..3], [0, GUEST + 0x3000, 0]);
    assert_eq!(results(&test, [GET, GUEST, top]), [0, GUEST + 0x1000, 1]);
    assert_eq!(results(&test, [GET, GUEST + 0x1000, top]), [0, GUEST + 0x3000, 0]);
    // What is not there is nothing, until the realm says that it is memory.
    let (said, end) = (top + 0x10_0000, top + 0x20_0000);
    assert_eq!(results(&test, [GET, top, end]), [0, end, 0]);
    // Back, over what was not shared as well, and what is not there.
    assert_eq!(results(&test, [SET, GUEST, said, 1, 0]), [0, said, 0]);
    assert_eq!(results(&test, [GET, top, end]), [0, said, 1]);
    assert_eq!(results(&test, [GET, said, end]), [0, end, 0]);
    assert_eq!(results(&test, [GET, GUEST, top]), [0, top, 1]);
    assert_eq!(test.memory.content(PAYLOAD + 0x1000), 0xaa, "contents stay");
    test.poison(PAYLOAD + 0x3000);
    assert_eq!(results(&test, [GET, GUEST + 0x3000, top])[2], 2);
    for state in [0, 1] {
        assert_eq!(results(&test, [SET, GUEST + 0x3000, top, state, 1]), [0, GUEST + 0x3000, 1]);
    }
}

#[test]
fn what_is_shared_stays_shared() {
    let test = TestGuest::new(VmKind::Realm, 4);
    let [first, second, third, top] = [1, 2, 3, 4].map(|page| GUEST + page * 0x1000);
    results(&test, [SET, first, third, 0, 0]);
    test.claim(second);
    // A private page, up to those that are shared; those, of which the host does not hear; what is behind them.
    let shared = |page| Some(Outcome::Shared(single(page)));
    for (base, outcome, next) in
        [(GUEST, shared(GUEST), first), (first, Some(Outcome::Done), second), (second, Some(Outcome::Done), third)]
    {
        let (is, x) = call_with(&test, [SET, base, top, 0, 0]);
        assert_eq!((is, [x[0], x[1], x[2]]), (outcome, [0, next, ACCEPT]), "{base:#x}");
    }
    assert_eq!(call_with(&test, [SET, third, top, 0, 0]).0, shared(third));
    assert_eq!(test.look(second), GuestPage::Claimed);
    // Behind the first page of a range there may be poison: what is before it is done.
    results(&test, [SET, third, top, 1, 0]);
    test.poison(PAYLOAD + 0x3000);
    assert_eq!(results(&test, [SET, second, top, 0, 0]), [0, third, ACCEPT]);
    assert_eq!(results(&test, [SET, third, top, 0, 0]), [0, third, REJECT]);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn long_ranges_are_done_in_parts() {
    let test = TestGuest::new(VmKind::Realm, 1000);
    let top = GUEST + 1000 * 0x1000;
    let mut base = GUEST;
    let mut calls = 0;
    while base != top {
        let [status, next, response] = results(&test, [SET, base, top, 0, 0]);
        assert_eq!([status, response], [0, 0]);
        assert!(next > base && next <= top && (next - base) / 0x1000 <= AT_ONCE);
        base = next;
        calls += 1;
    }
    assert_eq!(calls, 2);
    // All of its addresses.
    let [status, next, response] = results(&test, [SET, 0, END, 1, 0]);
    assert_eq!([status, response], [0, 0]);
    assert!(next > 0);
}

#[test]
fn what_the_host_has_to_do() {
    let test = TestGuest::new(VmKind::Realm, 2);
    let set = [SET, GUEST, GUEST + 0x2000, 1, 0];
    assert_eq!(call_with(&test, [SET, GUEST, GUEST + 0x3000, 0]).0, Some(Outcome::PageFault(ipa(GUEST + 0x2000))));
    test.memory.lock().tables_needed = 1;
    assert_eq!(call_with(&test, [SET, GUEST, GUEST + 0x2000, 0]).0, Some(Outcome::NeedsTables(1)));
    test.memory.lock().tables_needed = 0;
    results(&test, [SET, GUEST, GUEST + 0x2000, 0, 0]);
    test.claim(GUEST + 0x1000);
    assert_eq!(call_with(&test, set).0, Some(Outcome::Unshare(single(GUEST + 0x1000))));
    let mut context = registers(set);
    refuse(&mut context);
    assert_eq!(context.x[..3], [0, GUEST, 1], "no page, rejected");
    test.memory.release(test.guest.memory(), single(GUEST + 0x1000)).unwrap();
    assert_eq!(results(&test, set), [0, GUEST + 0x2000, 0]);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn wrong_bounds() {
    let test = TestGuest::new(VmKind::Realm, 1);
    for [base, top] in [
        [GUEST, GUEST],
        [GUEST + 0x1000, GUEST],
        [GUEST + 1, GUEST + 0x1000],
        [GUEST, GUEST + 0x1001],
        [GUEST, u64::MAX],
        [GUEST, !0xfff],
        [END - 0x1000, END + 0x1000],
        [END, END + 0x1000],
        [END | GUEST, END | (GUEST + 0x1000)],
        [!0xfff, 0],
    ] {
        for state in [0, 1] {
            assert_eq!(results(&test, [SET, base, top, state, 0])[0], 1, "{base:#x} {top:#x}");
        }
        assert_eq!(results(&test, [GET, base, top])[0], 1);
    }
    for state in [2, 3, u64::MAX] {
        assert_eq!(results(&test, [SET, GUEST, GUEST + 0x1000, state, 0])[0], 1);
    }
    assert_eq!(test.look(GUEST), GuestPage::Private);
}

#[test]
fn measurements() {
    let test = TestGuest::new(VmKind::Realm, 0);
    *test.guest.measurements.lock() = Measurements::new([0x11; 32]);
    let read = |index| {
        let (_, x) = call_with(&test, [0xc400_0192, index]);
        assert_eq!(x[9..], [0x5a5a; 22]);
        let bytes: Vec<u8> = x[1..9].iter().flat_map(|word| word.to_le_bytes()).collect();
        (x[0], bytes)
    };
    let padded = |digest: [u8; 32]| [digest, [0; 32]].concat();
    assert_eq!(read(0), (0, padded([0x11; 32])));
    assert_eq!(read(4), (0, padded([0; 32])));
    assert_eq!([read(5).0, read(u64::MAX).0], [1; 2]);

    let extend = |index, size| {
        let mut first = [0; 11];
        (first[0], first[1], first[2]) = (0xc400_0193, index, size);
        for (value, register) in (0x0807_0605_0403_0201..).zip(&mut first[3..]) {
            *register = value;
        }
        results(&test, first)[0]
    };
    assert_eq!([extend(0, 8), extend(5, 8), extend(1, 65), extend(1, u64::MAX)], [1; 4]);
    assert_eq!(read(1), (0, padded([0; 32])));
    assert_eq!(extend(1, 3), 0);
    assert_eq!(read(1), (0, padded(Sha256::digest([&[0; 32][..], &[1, 2, 3]].concat()).into())));
    assert_eq!([extend(2, 64), extend(3, 0)], [0; 2]);
    let all: Vec<u8> = (0x0807_0605_0403_0201_u64..).take(8).flat_map(u64::to_le_bytes).collect();
    assert_eq!(read(2), (0, padded(Sha256::digest([&[0; 32][..], &all].concat()).into())));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn calls_to_the_host() {
    let test = TestGuest::new(VmKind::Realm, 1);
    let at = GUEST + 0x300;
    let bytes: Vec<_> = (0..256_u64).map(|offset| (at + offset, offset as u8)).collect();
    test.memory.lock().written.extend(bytes.iter().copied());
    let mut context = registers([0xc400_0199, at]);
    let mut sent = [0; 248];
    let outcome = call(&test.memory, &test.guest, &mut context, |registers| sent = *registers);
    assert_eq!(outcome, Some(Outcome::HostCall { immediate: 0x0100 }));
    assert!(sent.into_iter().eq(8..=255));

    let mut context = registers([0xc400_0199, at]);
    let answer = std::array::from_fn(|offset| if offset % 8 == 1 { offset as u8 / 8 } else { 0 });
    assert_eq!(complete_host_call(&test.memory, &test.guest, &mut context, &answer), Outcome::Done);
    assert_eq!(context.x[..2], [0, at]);
    let written = |address| test.memory.lock().written[&address];
    assert_eq!([written(at), written(at + 1), written(at + 8), written(at + 17), written(at + 249)], [0, 1, 0, 1, 30]);
    assert!(!test.memory.lock().written.contains_key(&(at + 256)));

    for address in [at + 8, END | at, u64::MAX, 1 << 48] {
        assert_eq!(results(&test, [0xc400_0199, address])[0], 1);
        let mut context = registers([0xc400_0199, address]);
        assert_eq!(complete_host_call(&test.memory, &test.guest, &mut context, &answer), Outcome::Done);
        assert_eq!(context.x[0], 1);
    }
    assert_eq!(call_with(&test, [0xc400_0199, at + 0x1000]).0, Some(Outcome::PageFault(ipa(GUEST + 0x1000))));
    results(&test, [SET, GUEST, GUEST + 0x1000, 0, 0]);
    assert_eq!(results(&test, [0xc400_0199, at])[0], 1, "shared");
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 512 })
    })]

    /// Whatever a realm sends: nothing panics, states never reach further than the range, and pages are never lost.
    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn any_call(
        calls in prop::collection::vec(
            (
                prop_oneof![8 => 0xc400_0190_u64..0xc400_019a, 1 => any::<u64>()],
                prop_oneof![(0_u64..8).prop_map(|page| GUEST + page * 0x1000), any::<u64>()],
                prop_oneof![(0_u64..8).prop_map(|page| GUEST + page * 0x1000), any::<u64>()],
                prop_oneof![0_u64..3, any::<u64>()],
            ),
            1..20,
        ),
    ) {
        let test = TestGuest::new(VmKind::Realm, 4);
        for (function, x1, x2, x3) in calls {
            let (outcome, x) = call_with(&test, [function, x1, x2, x3]);
            if function == SET && x[0] == 0 && outcome.is_some_and(|outcome| outcome != Outcome::Done) {
                prop_assert!(x1 < x[1] && x[1] <= x2);
            }
            prop_assert_eq!(test.memory.gone(), 6);
        }
    }
}
