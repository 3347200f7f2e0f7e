//! Batches of conversions, and pinned pages of guests.

use ravelin_memory::IpaRange;

use super::{
    guests::{
        Change::{Claim, Reclaim, Release, Relinquish, Share as GuestShare, Unshare as GuestUnshare},
        RAM,
    },
    *,
};
use crate::{Batch, Conversion, GuestFailure, GuestKind, GuestMemory, GuestPage, GuestReason, MAX_BATCH, MAX_STEPS};

/// Where the pages of the guest are.
const PAGES: u64 = GIB + 5 * PAGE;

/// How many it has.
const COUNT: u64 = 1100;

fn with_guest(kind: GuestKind, f: impl FnOnce(&Rig<'_>, GuestMemory)) {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let guest = rig.guest(3, kind, 12);
    for first in (0..COUNT).step_by(500) {
        rig.give(&guest, PAGES + first * PAGE, 500.min(COUNT - first), RAM + first * PAGE).unwrap();
    }
    f(&rig, guest);
}

fn frames(first: u64, pages: u64) -> IpaRange {
    IpaRange::new(RAM + first * PAGE, pages).unwrap()
}

fn ipa(first: u64) -> Ipa {
    Ipa::new(RAM + first * PAGE).unwrap()
}

fn share(first: u64, pages: u64) -> Option<Conversion> {
    Some(Conversion { range: frames(first, pages), share: true, released: false })
}

fn unshare(first: u64, pages: u64, released: bool) -> Option<Conversion> {
    Some(Conversion { range: frames(first, pages), share: false, released })
}

impl Rig<'_> {
    fn convert(&self, guest: &GuestMemory, conversions: &[Option<Conversion>]) -> Batch {
        let batch = self.memory.guest_convert(&self.machine, guest, &mut conversions.iter().copied());
        self.check_guest(guest);
        batch
    }

    fn states(&self, guest: &GuestMemory, first: u64, pages: u64) -> Vec<GuestPage> {
        (first..first + pages).map(|frame| self.at(guest, RAM + frame * PAGE)).collect()
    }
}

#[test]
fn a_batch_is_many_conversions_and_one_invalidation() {
    with_guest(GuestKind::Pkvm, |rig, guest| {
        let shares: Vec<_> = (0..8).map(|index| share(index * 10, 3)).collect();
        let before = rig.counts().stage2_invalidations;
        assert_eq!(rig.convert(&guest, &shares), Batch { seen: 8, done: 0xff, claimed: 0 });
        for index in 0..8 {
            assert_eq!(rig.states(&guest, index * 10, 3), [GuestPage::Offered; 3]);
            assert_eq!(rig.at(&guest, RAM + (index * 10 + 3) * PAGE), GuestPage::Private);
        }
        // The host has all but two of them in its tables.
        for index in 1..7 {
            rig.change(Claim, &guest, RAM + index * 10 * PAGE, 3).unwrap();
            assert_eq!(rig.touch(PAGES + index * 10 * PAGE), HostFault::Resolved);
        }
        let refused: Vec<_> = (0..8).map(|index| unshare(index * 10, 3, false)).collect();
        assert_eq!(rig.convert(&guest, &refused), Batch { seen: 8, done: 0x81, claimed: 0x7e });
        assert_eq!(rig.states(&guest, 10, 3), [GuestPage::Claimed; 3]);
        assert!(rig.host_reaches(PAGES + 10 * PAGE));
        assert_eq!(rig.counts().stage2_invalidations, before);

        let released: Vec<_> = (1..7).map(|index| unshare(index * 10, 3, true)).collect();
        assert_eq!(rig.convert(&guest, &released), Batch { seen: 6, done: 0x3f, claimed: 0 });
        assert_eq!(rig.counts().stage2_invalidations, before + 1);
        for index in 0..8 {
            assert_eq!(rig.states(&guest, index * 10, 3), [GuestPage::Private; 3]);
            assert!(!rig.host_reaches(PAGES + index * 10 * PAGE));
        }
    });
}

#[test]
fn what_is_wrong_in_a_batch_changes_nothing_and_stops_nothing() {
    with_guest(GuestKind::Pkvm, |rig, guest| {
        rig.change(GuestShare, &guest, RAM + 20 * PAGE, 1).unwrap();
        rig.force(&guest, PAGES + 30 * PAGE, 1).unwrap();
        let batch = [
            None,
            share(0, 1),
            // Some of it is shared already, poisoned, or not there.
            share(19, 2),
            share(29, 2),
            share(COUNT - 1, 2),
            // It is private.
            unshare(5, 1, true),
            share(2, MAX_STEPS + 1),
            Some(Conversion { range: IpaRange::new(guest.end() - PAGE, 1).unwrap(), share: true, released: true }),
            share(1, 1),
        ];
        assert_eq!(rig.convert(&guest, &batch), Batch { seen: 9, done: 0b1_0000_0010, claimed: 0 });
        assert_eq!(rig.states(&guest, 0, 3), [GuestPage::Offered, GuestPage::Offered, GuestPage::Private]);
        assert_eq!(rig.at(&guest, RAM + 19 * PAGE), GuestPage::Private);
        assert_eq!(rig.at(&guest, RAM + (COUNT - 1) * PAGE), GuestPage::Private);
    });
}

#[test]
fn a_batch_has_an_end() {
    with_guest(GuestKind::Pkvm, |rig, guest| {
        // The first always fits; what fails counts as if all of it had been looked at.
        let batch = [share(0, 512), share(512, 1)];
        assert_eq!(rig.convert(&guest, &batch), Batch { seen: 1, done: 1, claimed: 0 });
        let batch = [share(512, 256), unshare(1000, 100, true), share(768, 156), share(924, 1)];
        assert_eq!(rig.convert(&guest, &batch), Batch { seen: 3, done: 0b101, claimed: 0 });
        assert_eq!(rig.at(&guest, RAM + 924 * PAGE), GuestPage::Private);
        let many: Vec<_> = (0..100).map(|frame| unshare(frame, 1, false)).collect();
        assert_eq!(rig.convert(&guest, &many), Batch { seen: MAX_BATCH, done: u64::MAX, claimed: 0 });
        assert_eq!(rig.states(&guest, 63, 2), [GuestPage::Private, GuestPage::Offered]);
        assert_eq!(rig.convert(&guest, &[]), Batch::default());
    });
}

#[test]
fn other_guests_have_no_batches() {
    for kind in [GuestKind::Ordinary, GuestKind::Realm] {
        with_guest(kind, |rig, guest| {
            let state = rig.at(&guest, RAM);
            assert_eq!(rig.convert(&guest, &[share(0, 1)]), Batch::default());
            assert_eq!(rig.at(&guest, RAM), state);
        });
    }
    with_guest(GuestKind::Pkvm, |rig, guest| {
        guest.kill();
        assert_eq!(rig.convert(&guest, &[share(0, 1)]), Batch { seen: 1, done: 0, claimed: 0 });
    });
}

#[test]
fn a_pinned_page_is_the_guests_and_the_hypervisors() {
    with_guest(GuestKind::Pkvm, |rig, guest| {
        let page = PAGES + 7 * PAGE;
        let tables = rig.counts().el2_tables;
        assert_eq!(rig.memory.guest_pin(&rig.machine, &guest, ipa(7)), Ok(addr(page)));
        rig.check_guest(&guest);
        assert!(rig.el2_reaches(page) && !rig.el2_reaches(page + PAGE) && !rig.host_reaches(page));
        assert_eq!(rig.guest_reaches(&guest, RAM + 7 * PAGE), Some(page));
        assert_eq!(rig.at(&guest, RAM + 7 * PAGE), GuestPage::Private);
        // Neither the guest nor the host gets at it otherwise.
        let before = rig.everything();
        let denied = GuestFailure { reason: GuestReason::Denied, ipa: ipa(7) };
        assert_eq!(rig.memory.guest_pin(&rig.machine, &guest, ipa(7)), Err(denied));
        for change in [GuestShare, GuestUnshare, Relinquish, Claim, Release] {
            let refused = rig.change(change, &guest, RAM + 7 * PAGE, 1);
            assert_eq!(refused, Err((Some(GuestReason::Denied), RAM + 7 * PAGE)), "{change:?}");
        }
        assert_eq!(rig.convert(&guest, &[share(6, 2)]).done, 0);
        rig.force(&guest, page, 1).unwrap_err();
        let mut read = 0;
        let looked = rig.memory.with_guest_pages(&rig.machine, &guest, frames(7, 1), &mut |run| read += run.pages());
        assert_eq!((looked, read), (Err(denied), 0));
        assert_eq!(rig.everything(), before);

        assert_eq!(rig.memory.guest_unpin(&rig.machine, &guest, ipa(7)), Ok(()));
        rig.check_guest(&guest);
        assert!(!rig.el2_reaches(page));
        assert_eq!(rig.counts().el2_tables, tables);
        assert_eq!(rig.memory.guest_unpin(&rig.machine, &guest, ipa(7)), Err(denied));
        rig.change(GuestShare, &guest, RAM + 7 * PAGE, 1).unwrap();
        assert_eq!(rig.memory.guest_pin(&rig.machine, &guest, ipa(7)), Err(denied));
        let absent = GuestFailure { reason: GuestReason::Absent, ipa: ipa(COUNT) };
        assert_eq!(rig.memory.guest_pin(&rig.machine, &guest, ipa(COUNT)), Err(absent));
    });
}

#[test]
fn pinned_pages_come_back_scrubbed_with_the_others() {
    with_guest(GuestKind::Pkvm, |rig, guest| {
        for frame in [0, 3, 4, 600] {
            rig.memory.guest_pin(&rig.machine, &guest, ipa(frame)).unwrap();
            rig.check_guest(&guest);
        }
        guest.kill();
        let unpin = rig.memory.guest_unpin(&rig.machine, &guest, ipa(3));
        assert_eq!(unpin, Err(GuestFailure { reason: GuestReason::Denied, ipa: ipa(3) }));
        let _ = rig.machine.take_log();
        let done = rig.change(Reclaim, &guest, RAM, MAX_STEPS).unwrap();
        rig.check_guest(&guest);
        assert!(done > 4);
        let scrubbed = rig.machine.take_log().into_iter().filter_map(|op| match op {
            Op::Scrub(range) => Some(range),
            _ => None,
        });
        let scrubbed: u64 = scrubbed.map(|range| range.pages()).sum();
        assert_eq!(scrubbed, done);
        assert!((0..done).all(|frame| !rig.el2_reaches(PAGES + frame * PAGE)));
        rig.destroy(guest, frames(0, COUNT));
    });
}

#[test]
fn a_pin_leaves_the_tables_that_the_host_needs() {
    // The pins take tables of their own, in two regions.
    let pinned = [3, 4, 6].map(|spare| {
        let layout = Layout { tables: 2 * HOST_RESERVE as u64 + spare, ..small() };
        let mut store = Store::for_ram(&layout.ram);
        let rig = Rig::new(&layout, &mut store);
        let guest = rig.guest(3, GuestKind::Pkvm, 12);
        rig.give(&guest, PAGES, 1, RAM).unwrap();
        rig.give(&guest, 3 * GIB + 8 * PAGE, 1, RAM + PAGE).unwrap();
        (0..2)
            .filter(|&frame| {
                let before = rig.everything();
                let pinned = rig.memory.guest_pin(&rig.machine, &guest, ipa(frame));
                if let Err(failure) = pinned {
                    assert_eq!(failure, GuestFailure { reason: GuestReason::NoMemory, ipa: ipa(frame) });
                    assert_eq!(rig.everything(), before);
                }
                rig.check_guest(&guest);
                assert!(rig.counts().free_tables + rig.counts().host_tables >= 2 * HOST_RESERVE);
                pinned.is_ok()
            })
            .count()
    });
    assert_eq!(pinned, [0, 1, 2]);
}
