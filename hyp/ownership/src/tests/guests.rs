//! Guests: each transition by itself, and what must be refused.

use std::{
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
};

use ravelin_memory::IpaRange;

use super::*;
use crate::{Gift, GuestFailure, GuestKind, GuestMemory, GuestPage, GuestReason, HostFailure, MAX_STEPS, Unshare};

/// Where guests have their first pages.
pub(super) const RAM: u64 = 0x8000_0000;
/// Host pages for what guests are made of; each gets a part of its own.
const METADATA: u64 = GIB + 20 * MIB;
const METADATA_SIZE: u64 = MIB;

impl Rig<'_> {
    /// Makes a guest with `tables` pages for tables.
    pub(super) fn guest(&self, slot: u8, kind: GuestKind, tables: u64) -> GuestMemory {
        let base = METADATA + u64::from(slot) * METADATA_SIZE;
        let geometry = Geometry::stage2(40).unwrap();
        self.memory.keep(&self.machine, range(base, 2)).unwrap();
        let guest = self.memory.new_guest(&self.machine, slot, kind, geometry, addr(base)).unwrap();
        self.machine.add_root(stage(&guest), addr(base), geometry);
        if tables != 0 {
            self.add_tables(&guest, 2, tables);
        }
        guest
    }

    /// Donates tables, `skip` pages behind the start of the guest's metadata.
    pub(super) fn add_tables(&self, guest: &GuestMemory, skip: u64, tables: u64) {
        let base = METADATA + u64::from(guest.slot()) * METADATA_SIZE + skip * PAGE;
        self.memory.add_guest_tables(&self.machine, guest, range(base, tables)).unwrap();
        self.check();
    }

    pub(super) fn give(&self, guest: &GuestMemory, page: u64, pages: u64, at: u64) -> Result<(), HostFailure> {
        let (pages, at) = (range(page, pages), Ipa::new(at).unwrap());
        let result = match guest.kind() {
            GuestKind::Ordinary => self.memory.give(&self.machine, guest, pages, at, Gift::Lent),
            _ => self.memory.give(&self.machine, guest, pages, at, Gift::Donated),
        };
        self.check_guest(guest);
        result
    }

    pub(super) fn change(&self, change: Change, guest: &GuestMemory, at: u64, pages: u64) -> Outcome {
        let (memory, machine, range) = (&self.memory, &self.machine, frames(at, pages));
        let result = match change {
            GuestShare | GuestUnshare if memory.guest_exchange(machine, guest, range, change == GuestShare) => {
                Ok(Some(range.pages()))
            }
            GuestShare => memory.guest_share(machine, guest, range).map(Some),
            GuestUnshare => memory.guest_unshare(machine, guest, range).map(|unshare| match unshare {
                Unshare::Done(pages) => Some(pages),
                Unshare::NeedsRelease(claimed) => {
                    assert_eq!(claimed.base(), range.base());
                    None
                }
            }),
            Relinquish => memory.guest_relinquish(machine, guest, range).map(Some),
            Claim => memory.claim(machine, guest, range).map(|()| Some(pages)),
            Release => memory.release(machine, guest, range).map(|()| Some(pages)),
            Unlend => memory.unlend(machine, guest, range).map(|()| Some(pages)),
            Reclaim => memory.reclaim(machine, guest, range).map(Some),
        };
        self.machine.assert_quiescent();
        match result {
            Ok(Some(pages)) => Ok(pages),
            Ok(None) => Err((None, at)),
            Err(GuestFailure { reason, ipa }) => Err((Some(reason), ipa.raw())),
        }
    }

    pub(super) fn force(&self, guest: &GuestMemory, page: u64, pages: u64) -> Result<(), HostFailure> {
        let result = self.memory.force_reclaim(&self.machine, guest, range(page, pages));
        self.check_guest(guest);
        result
    }

    pub(super) fn at(&self, guest: &GuestMemory, ipa: u64) -> GuestPage {
        let page = self.memory.guest_page(&self.machine, guest, Ipa::new(ipa).unwrap());
        if ipa < guest.end() {
            assert_eq!(self.memory.guest_run(&self.machine, guest, frames(ipa, 1)), (page, 1));
        }
        page
    }

    /// Where the guest's accesses to `ipa` go.
    pub(super) fn guest_reaches(&self, guest: &GuestMemory, ipa: u64) -> Option<u64> {
        let answers = self.machine.translate(stage(guest), ipa);
        assert_eq!(answers.len(), 1, "{answers:?}");
        let answer = answers.into_iter().next().unwrap()?;
        assert_eq!(answer.attributes, Stage2::attributes(Stage2Usage::Memory));
        Some(answer.to.raw())
    }

    pub(super) fn check_guest(&self, guest: &GuestMemory) {
        self.check();
        assert_eq!(self.memory.check_guest(&self.machine, guest), Ok(()));
    }

    /// Ends a guest and returns everything to the host.
    pub(super) fn destroy(&self, guest: GuestMemory, frames: IpaRange) {
        guest.kill();
        let mut left = frames;
        loop {
            let done = self.change(Reclaim, &guest, left.base().raw(), left.pages()).unwrap();
            self.check_guest(&guest);
            match IpaRange::from_bounds(left.base().raw() + done * PAGE, left.end()) {
                Ok(rest) => left = rest,
                Err(_) => break,
            }
        }
        assert!(guest.is_empty());
        while self.memory.release_guest_tables(&self.machine, &guest, MAX_STEPS).unwrap() != 0 {
            self.check_guest(&guest);
        }
        assert_eq!(guest.table_pages(), 0);
        let root = range(METADATA + u64::from(guest.slot()) * METADATA_SIZE, 2);
        self.memory.give_back(&self.machine, root).unwrap();
        self.check();
    }
}

/// What is done to frames; `Err(None)` stands for pages that the host must release.
pub(super) type Outcome = Result<u64, (Option<GuestReason>, u64)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Share,
    Unshare,
    Relinquish,
    Claim,
    Release,
    Unlend,
    Reclaim,
}

use Change::{Claim, Reclaim, Release, Relinquish, Share as GuestShare, Unlend, Unshare as GuestUnshare};

pub(super) const CHANGES: [Change; 7] = [GuestShare, GuestUnshare, Relinquish, Claim, Release, Unlend, Reclaim];

pub(super) fn stage(guest: &GuestMemory) -> Stage {
    Stage::Guest(guest.vttbr().vmid)
}

pub(super) fn frames(at: u64, pages: u64) -> IpaRange {
    IpaRange::new(at, pages).unwrap()
}

fn refused(reason: GuestReason, at: u64) -> Outcome {
    Err((Some(reason), at))
}

fn denied(reason: GuestReason, page: u64) -> Result<(), HostFailure> {
    Err(HostFailure { reason, page: addr(page) })
}

fn writes(log: &[Op]) -> usize {
    log.iter().filter(|op| matches!(op, Op::Write { .. })).count()
}

pub(super) fn with_rig(f: impl FnOnce(&Rig<'_>)) {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    f(&Rig::new(&layout, &mut store));
}

/// Runs `f` with a guest that has the page at `GIB`, and others around it, in frame `RAM`.
fn with_page(kind: GuestKind, f: impl FnOnce(&Rig<'_>, &GuestMemory)) {
    with_rig(|rig| {
        let guest = rig.guest(0, kind, 16);
        rig.touch(GIB);
        for page in 0..4 {
            rig.machine.poke(addr(GIB + page * PAGE), 7 + page);
        }
        rig.give(&guest, GIB, 4, RAM).unwrap();
        let _ = rig.machine.take_log();
        f(rig, &guest);
        rig.check_guest(&guest);
    });
}

#[test]
fn a_page_keeps_its_contents_from_donation_to_release() {
    with_page(GuestKind::Pkvm, |rig, guest| {
        let step = |change, flushed: &[Op]| {
            assert_eq!(rig.change(change, guest, RAM, 1), Ok(1), "{change:?}");
            assert_eq!(invalidations(&rig.machine.take_log()), flushed, "{change:?}");
            assert_eq!(rig.machine.peek(addr(GIB)), 7);
            assert_eq!(rig.guest_reaches(guest, RAM), Some(GIB));
            rig.check_guest(guest);
        };
        assert_eq!((rig.at(guest, RAM), rig.touch(GIB)), (GuestPage::Private, HostFault::Denied));
        step(GuestShare, &[]);
        assert_eq!((rig.at(guest, RAM), rig.touch(GIB)), (GuestPage::Offered, HostFault::Denied));
        assert_eq!(rig.state(GIB), (HostState::NoPage, 0));
        // Nobody has claimed it.
        step(GuestUnshare, &[]);
        step(GuestShare, &[]);
        step(Claim, &[]);
        // Claimed and released without having been touched.
        step(Release, &[]);
        step(Claim, &[]);
        assert_eq!((rig.at(guest, RAM), rig.touch(GIB)), (GuestPage::Claimed, HostFault::Resolved));
        assert_eq!(rig.state(GIB), (HostState::SharedBorrowed, 0));
        let before = rig.everything();
        assert_eq!(rig.change(GuestUnshare, guest, RAM, 1), Err((None, RAM)));
        assert!(rig.everything() == before, "a refused unshare changed something");
        let _ = rig.machine.take_log();
        step(Release, &[Op::InvalidateStage2(Vmid::HOST, frames(GIB, 1), true)]);
        assert_eq!((rig.at(guest, RAM), rig.touch(GIB)), (GuestPage::Offered, HostFault::Denied));
        step(GuestUnshare, &[]);
        assert_eq!((rig.at(guest, RAM), rig.touch(GIB)), (GuestPage::Private, HostFault::Denied));
        assert_eq!(rig.memory.page_owner(addr(GIB + 5)), Some((0, Ipa::new(RAM).unwrap())));
    });
}

#[test]
fn a_donation_costs_one_invalidation_of_stage_2_and_is_clean() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        rig.touch(GIB);
        let before = rig.counts();
        let _ = rig.machine.take_log();
        rig.give(&guest, GIB, 4, RAM).unwrap();
        let log = rig.machine.take_log();
        let pages = range(GIB, 4);
        let expected =
            [Op::InvalidateStage2(Vmid::HOST, pages.identity_ipa(), true), Op::InvalidateEl2(pages.identity_va())];
        assert_eq!(invalidations(&log), expected);
        let place = |wanted: &dyn Fn(&Op) -> bool| log.iter().position(wanted).unwrap();
        let clean = place(&|op| *op == Op::Clean(pages));
        assert!(place(&|op| matches!(op, Op::InvalidateStage2(..))) < clean, "the host can no longer write");
        let counts = rig.counts();
        assert_eq!(counts.stage2_invalidations, before.stage2_invalidations + 1);
        assert_eq!(counts.guest_owned, 4);
        assert!(!rig.el2_reaches(GIB));
    });
}

#[test]
fn what_is_donated_to_be_measured_is_cleaned_by_who_measures_it() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Realm, 16);
        rig.touch(GIB);
        let _ = rig.machine.take_log();
        let (pages, at) = (range(GIB, 4), Ipa::new(RAM).unwrap());
        rig.memory.give(&rig.machine, &guest, pages, at, Gift::ToMeasure).unwrap();
        rig.check_guest(&guest);
        let log = rig.machine.take_log();
        assert_eq!(invalidations(&log), [Op::InvalidateStage2(Vmid::HOST, pages.identity_ipa(), true)]);
        assert!(!log.iter().any(|op| matches!(op, Op::Clean(_))));
        assert_eq!((rig.at(&guest, RAM), rig.counts().guest_owned), (GuestPage::Private, 4));
        rig.memory.with_guest_pages(&rig.machine, &guest, frames(RAM, 4), &mut |_| ()).unwrap();
        let log = rig.machine.take_log();
        assert_eq!(invalidations(&log), [Op::InvalidateEl2(pages.identity_va())]);
        assert_eq!(log.iter().filter(|op| **op == Op::Clean(pages)).count(), 2, "before it is read, and after");
        let again = rig.memory.give(&rig.machine, &guest, pages, at, Gift::ToMeasure);
        assert_eq!(again, Err(HostFailure { reason: GuestReason::Denied, page: addr(GIB) }));
        let ordinary = rig.guest(1, GuestKind::Ordinary, 16);
        let lent = rig.memory.give(&rig.machine, &ordinary, range(GIB + MIB, 1), at, Gift::ToMeasure);
        assert_eq!(lent, Err(HostFailure { reason: GuestReason::Denied, page: addr(GIB + MIB) }));
    });
}

#[test]
fn who_changes_no_tables_does_not_wait_for_others_who_do_not() {
    with_page(GuestKind::Pkvm, |rig, guest| {
        let _other = guest.lock_shared();
        let (memory, machine) = (&rig.memory, &rig.machine);
        assert!(memory.guest_exchange(machine, guest, frames(RAM, 1), true));
        memory.claim(machine, guest, frames(RAM, 1)).unwrap();
        assert_eq!(memory.guest_page(machine, guest, Ipa::new(RAM).unwrap()), GuestPage::Claimed);
        memory.release(machine, guest, frames(RAM, 1)).unwrap();
        assert_eq!(memory.guest_share(machine, guest, frames(RAM + PAGE, 2)), Ok(2));
        assert_eq!(memory.guest_unshare(machine, guest, frames(RAM, 3)), Ok(Unshare::Done(3)));
        assert_eq!(memory.guest_run(machine, guest, frames(RAM, 4)), (GuestPage::Private, 4));
        assert_eq!(memory.with_guest_pages(machine, guest, frames(RAM, 4), &mut |_| ()), Ok(4));
        let page = Ipa::new(RAM).unwrap();
        memory.guest_pin(machine, guest, page).unwrap();
        memory.guest_unpin(machine, guest, page).unwrap();
    });
}

#[test]
fn who_moves_pages_in_one_block_does_not_wait_for_others_elsewhere() {
    with_page(GuestKind::Realm, |rig, guest| {
        // This makes the tables, alone.
        assert_eq!(rig.change(GuestShare, guest, RAM, 4), Ok(4));
        let _tables = guest.lock_shared();
        let _others = (1..16).map(|block| guest.lock_block(&rig.machine, Ipa::new(RAM + block * 2 * MIB).unwrap()));
        let _others: Vec<_> = _others.collect();
        let (memory, machine) = (&rig.memory, &rig.machine);
        assert_eq!(memory.guest_unshare(machine, guest, frames(RAM, 1)), Ok(Unshare::Done(1)));
        assert_eq!(memory.guest_unshare(machine, guest, frames(RAM + PAGE, 3)), Ok(Unshare::Done(3)));
        assert_eq!(memory.guest_share(machine, guest, frames(RAM, 1)), Ok(1));
        memory.claim(machine, guest, frames(RAM, 1)).unwrap();
        assert_eq!(memory.guest_page(machine, guest, Ipa::new(RAM).unwrap()), GuestPage::Claimed);
        assert_eq!(memory.guest_unshare(machine, guest, frames(RAM, 1)), Ok(Unshare::NeedsRelease(frames(RAM, 1))));
        memory.release(machine, guest, frames(RAM, 1)).unwrap();
        assert_eq!(memory.guest_run(machine, guest, frames(RAM + PAGE, 3)), (GuestPage::Private, 3));
        assert_eq!(memory.with_guest_pages(machine, guest, frames(RAM + PAGE, 3), &mut |_| ()), Ok(3));
    });
}

#[test]
fn a_realms_page_is_not_claimed_before_it_has_moved() {
    with_page(GuestKind::Realm, |rig, guest| {
        rig.change(GuestShare, guest, RAM, 1).unwrap();
        // As who moves it, and waits for the TLBs.
        let mover = guest.lock_block(&rig.machine, Ipa::new(RAM).unwrap());
        let is_next = AtomicBool::new(false);
        thread::scope(|scope| {
            let claim = scope.spawn(|| {
                is_next.store(true, SeqCst);
                rig.memory.claim(&rig.machine, guest, frames(RAM, 1))
            });
            while !is_next.load(SeqCst) {
                thread::yield_now();
            }
            for _ in 0..1000 {
                thread::yield_now();
                assert_eq!(rig.counts().guest_claimed, 0);
            }
            drop(mover);
            claim.join().unwrap().unwrap();
        });
        assert_eq!(rig.counts().guest_claimed, 1);
        rig.change(Release, guest, RAM, 1).unwrap();
    });
}

#[test]
fn a_realms_page_that_was_converted_is_again_without_tables() {
    with_page(GuestKind::Realm, |rig, guest| {
        rig.change(GuestShare, guest, RAM, 4).unwrap();
        for pages in [1, 4] {
            for change in [GuestUnshare, GuestShare] {
                let before = rig.counts().stage2_invalidations;
                let _ = rig.machine.take_log();
                assert_eq!(rig.change(change, guest, RAM, pages), Ok(pages));
                let log = rig.machine.take_log();
                let from = if change == GuestUnshare { RAM | 1 << 39 } else { RAM };
                let gone = Op::InvalidateStage2(guest.vttbr().vmid, frames(from, pages), true);
                assert_eq!(invalidations(&log), [gone], "{change:?} {pages}");
                assert_eq!(rig.counts().stage2_invalidations, before + 1, "{change:?} {pages}");
                assert_eq!(writes(&log) as u64, 2 * pages + 2, "{change:?} {pages}");
                rig.check_guest(guest);
            }
        }
        assert_eq!(rig.machine.peek(addr(GIB)), 7);
        rig.change(GuestUnshare, guest, RAM, 4).unwrap();
    });
    // All tables come back in the end, those with nothing in them too.
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Realm, 16);
        for block in 0..3 {
            rig.give(&guest, GIB + block * PAGE, 1, RAM + block * 2 * MIB).unwrap();
            rig.change(GuestShare, &guest, RAM + block * 2 * MIB, 1).unwrap();
            rig.change(GuestUnshare, &guest, RAM + block * 2 * MIB, 1).unwrap();
        }
        rig.destroy(guest, frames(RAM, 2048));
    });
}

#[test]
fn blocks_share_locks_evenly() {
    use crate::guest::{BLOCK_LOCKS, Blocks, block_lock};
    let locks = |blocks: &mut dyn Iterator<Item = u64>| blocks.map(block_lock).collect::<BTreeSet<_>>();
    for first in [0, 5, 500, 511, 512, 0xf_ffff] {
        let next = 512 * (first / 512 + 1);
        let row = &mut (first..first + 2 * BLOCK_LOCKS as u64);
        assert_eq!(locks(row).len(), BLOCK_LOCKS, "{first}");
        assert_eq!(locks(&mut (0..BLOCK_LOCKS as u64).map(|gib| first + gib * 512)).len(), BLOCK_LOCKS, "{first}");
        assert_ne!(block_lock(next), block_lock(next + 1));
    }
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Realm, 0);
        let held_of = |guest: &GuestMemory, at, pages| {
            let mut blocks = Blocks::new_const();
            guest.lock_blocks(&rig.machine, frames(at, pages), &mut blocks);
            blocks.len()
        };
        let held = |at, pages| held_of(&guest, at, pages);
        assert_eq!([held(RAM, 1), held(RAM, 512), held(RAM + PAGE, 512), held(RAM, 16 * 512)], [1, 1, 2, 16]);
        assert_eq!(held(0, 1 << 36), 16);
        // From 7 blocks before the end of a GiB on, it is the 23rd that has the last of the locks.
        assert_eq!([held(505 * 2 * MIB, 22 * 512), held(505 * 2 * MIB, 23 * 512)], [15, 16]);
        let other = rig.guest(1, GuestKind::Pkvm, 0);
        assert_eq!(held_of(&other, 0, 1 << 36), 0);
    });
}

#[test]
fn what_a_guest_gives_up_is_scrubbed_once_it_is_out_of_reach() {
    with_page(GuestKind::Pkvm, |rig, guest| {
        assert_eq!(rig.change(Relinquish, guest, RAM + PAGE, 2), Ok(2));
        let log = rig.machine.take_log();
        let gone = Op::InvalidateStage2(guest.vttbr().vmid, frames(RAM + PAGE, 2), true);
        let scrub = Op::Scrub(range(GIB + PAGE, 2));
        let place = |wanted: Op| log.iter().position(|&op| op == wanted).unwrap();
        assert!(place(gone) < place(scrub));
        assert_eq!(invalidations(&log).len(), 2, "and one of EL2");
        for page in [1, 2] {
            assert_eq!(rig.machine.peek(addr(GIB + page * PAGE)), 0);
            assert_eq!(rig.state(GIB + page * PAGE), (HostState::Owned, 0));
            assert_eq!(rig.touch(GIB + page * PAGE), HostFault::Resolved);
            assert_eq!(rig.at(guest, RAM + page * PAGE), GuestPage::Absent);
        }
        assert_eq!(rig.machine.peek(addr(GIB)), 7);
        // The frame may have another page.
        rig.give(guest, GIB + 9 * PAGE, 1, RAM + PAGE).unwrap();
    });
}

/// Every change from every state of a frame.
#[test]
fn every_change_in_every_state() {
    use GuestReason::{Absent, Denied, NotOffered, Poisoned};
    let prepare: [(&[Change], GuestPage); 4] = [
        (&[], GuestPage::Private),
        (&[GuestShare], GuestPage::Offered),
        (&[GuestShare, Claim], GuestPage::Claimed),
        (&[Relinquish], GuestPage::Absent),
    ];
    for kind in [GuestKind::Pkvm, GuestKind::Realm] {
        for (changes, state) in prepare {
            for change in CHANGES {
                with_page(kind, |rig, guest| {
                    for &change in changes {
                        rig.change(change, guest, RAM, 1).unwrap();
                    }
                    assert_eq!(rig.at(guest, RAM), state);
                    let expected = match (state, change) {
                        (_, Reclaim) => refused(Denied, RAM),
                        (GuestPage::Absent, _) => refused(Absent, RAM),
                        (GuestPage::Private, GuestShare | Relinquish) => Ok(1),
                        (GuestPage::Private, Claim) => refused(NotOffered, RAM),
                        (GuestPage::Offered, GuestUnshare | Claim) => Ok(1),
                        (GuestPage::Claimed, Release) => Ok(1),
                        (GuestPage::Claimed, GuestUnshare) => Err((None, RAM)),
                        _ => refused(Denied, RAM),
                    };
                    let before = rig.everything();
                    assert_eq!(rig.change(change, guest, RAM, 1), expected, "{kind:?} {change:?} {state:?}");
                    assert!(expected.is_ok() || rig.everything() == before, "{kind:?} {change:?} {state:?}");
                    rig.check_guest(guest);
                });
            }
        }
        with_page(kind, |rig, guest| {
            rig.force(guest, GIB, 1).unwrap();
            for change in CHANGES.into_iter().filter(|&change| change != Relinquish) {
                let expected = if change == Reclaim { Denied } else { Poisoned };
                assert_eq!(rig.change(change, guest, RAM, 1), refused(expected, RAM), "{kind:?} {change:?}");
            }
            assert_eq!(rig.change(Relinquish, guest, RAM, 1), Ok(1), "{kind:?}");
            assert_eq!(rig.at(guest, RAM), GuestPage::Absent);
        });
    }
}

#[test]
fn host_calls_on_a_guests_page_are_refused() {
    for changes in [&[][..], &[GuestShare], &[GuestShare, Claim]] {
        with_page(GuestKind::Pkvm, |rig, guest| {
            for &change in changes {
                rig.change(change, guest, RAM, 1).unwrap();
            }
            let other = rig.guest(1, GuestKind::Pkvm, 16);
            let before = rig.everything();
            for call in CALLS {
                assert_eq!(rig.call(call, range(GIB, 1)), fails(Reason::Denied, GIB), "{call:?}");
            }
            // Another frame, the same one, another guest, its tables, a guest that the page is not of.
            assert_eq!(rig.give(guest, GIB, 1, RAM + MIB), denied(GuestReason::Denied, GIB));
            assert_eq!(rig.give(guest, GIB, 1, RAM), denied(GuestReason::Denied, GIB));
            assert_eq!(rig.give(&other, GIB, 1, RAM), denied(GuestReason::Denied, GIB));
            let tables = rig.memory.add_guest_tables(&rig.machine, &other, range(GIB, 1));
            assert_eq!(tables, denied(GuestReason::Denied, GIB));
            assert_eq!(rig.memory.keep(&rig.machine, range(GIB, 1)), fails(Reason::Denied, GIB));
            assert_eq!(rig.memory.give_back(&rig.machine, range(GIB, 1)), fails(Reason::Denied, GIB));
            assert_eq!(rig.force(&other, GIB, 1), denied(GuestReason::Denied, GIB));
            for change in CHANGES {
                let expected = if change == Reclaim { GuestReason::Denied } else { GuestReason::Absent };
                assert_eq!(rig.change(change, &other, RAM, 1), refused(expected, RAM));
            }
            if changes.len() == 2 {
                assert_eq!(rig.force(guest, GIB, 1), denied(GuestReason::Denied, GIB));
            }
            assert!(rig.everything() == before);
        });
    }
}

#[test]
fn a_frame_takes_one_page() {
    with_page(GuestKind::Pkvm, |rig, guest| {
        let free = GIB + 4 * MIB;
        let before = rig.everything();
        assert_eq!(rig.give(guest, free, 3, RAM - 2 * PAGE), denied(GuestReason::Exists, free + 2 * PAGE));
        assert!(rig.everything() == before);
        rig.change(GuestShare, guest, RAM, 1).unwrap();
        assert_eq!(rig.give(guest, free, 1, RAM), denied(GuestReason::Exists, free));
        rig.change(Claim, guest, RAM, 1).unwrap();
        assert_eq!(rig.give(guest, free, 1, RAM), denied(GuestReason::Exists, free));
    });
}

#[test]
fn of_the_frames_of_a_realm_that_are_taken_the_first_is_named() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Realm, 16);
        rig.give(&guest, GIB, 4, RAM).unwrap();
        rig.change(GuestShare, &guest, RAM, 1).unwrap();
        let free = GIB + 4 * MIB;
        assert_eq!(rig.give(&guest, free, 2, RAM), denied(GuestReason::Exists, free));
        assert_eq!(rig.give(&guest, free, 2, RAM - PAGE), denied(GuestReason::Exists, free + PAGE));
    });
}

#[test]
fn a_row_of_blocks_of_a_realm_takes_tables_for_blocks() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Realm, 8);
        let blocks = 8 * 2 * MIB / PAGE;
        rig.give(&guest, GIB, blocks, RAM).unwrap();
        assert_eq!(rig.change(GuestShare, &guest, RAM, blocks), Ok(blocks));
        assert_eq!(rig.change(GuestUnshare, &guest, RAM, blocks), Ok(blocks));
    });
}

#[test]
fn only_pages_that_the_host_owns_alone_go_to_a_guest() {
    with_page(GuestKind::Pkvm, |rig, guest| {
        let page = GIB + 4 * MIB;
        let refused = |page, reason| assert_eq!(rig.give(guest, page, 1, RAM + MIB), denied(reason, page));
        rig.call(Share, range(page, 1)).unwrap();
        refused(page, GuestReason::Denied);
        rig.call(Pin, range(page, 1)).unwrap();
        refused(page, GuestReason::Denied);
        rig.call(Donate, range(page + PAGE, 1)).unwrap();
        refused(page + PAGE, GuestReason::Denied);
        rig.call(Borrow, range(page + 2 * PAGE, 1)).unwrap();
        refused(page + 2 * PAGE, GuestReason::Denied);
        refused(GIB + 30 * MIB, GuestReason::Denied);
        refused(0x900_0000, GuestReason::NotRam);
        refused(METADATA, GuestReason::Denied);
        refused(METADATA + 2 * PAGE, GuestReason::Denied);
        assert_eq!(rig.call(TakeBack, range(METADATA, 1)), fails(Reason::Denied, METADATA));
        assert_eq!(rig.call(TakeBack, range(METADATA + 3 * PAGE, 1)), fails(Reason::Denied, METADATA + 3 * PAGE));
        // Up to the end of RAM, and behind it.
        let end = GIB + 32 * MIB;
        assert_eq!(rig.give(guest, end, 1, RAM + MIB), denied(GuestReason::NotRam, end));
    });
}

#[test]
fn poison_stays_where_a_page_was_taken() {
    with_page(GuestKind::Pkvm, |rig, guest| {
        rig.force(guest, GIB + PAGE, 2).unwrap();
        let log = rig.machine.take_log();
        let gone = Op::InvalidateStage2(guest.vttbr().vmid, frames(RAM + PAGE, 2), true);
        assert_eq!(invalidations(&log), [gone, Op::InvalidateEl2(range(GIB + PAGE, 2).identity_va())]);
        let place = |wanted: Op| log.iter().position(|&op| op == wanted).unwrap();
        assert!(place(gone) < place(Op::Scrub(range(GIB + PAGE, 2))));
        for page in [1, 2] {
            assert_eq!(rig.machine.peek(addr(GIB + page * PAGE)), 0);
            assert_eq!(rig.state(GIB + page * PAGE), (HostState::Owned, 0));
            assert_eq!(rig.at(guest, RAM + page * PAGE), GuestPage::Poisoned);
            assert_eq!(rig.guest_reaches(guest, RAM + page * PAGE), None);
            // The very page, and any other.
            for other in [GIB + page * PAGE, GIB + 9 * PAGE] {
                assert_eq!(rig.give(guest, other, 1, RAM + page * PAGE), denied(GuestReason::Poisoned, other));
            }
        }
        assert_eq!((rig.at(guest, RAM), rig.at(guest, RAM + 3 * PAGE)), (GuestPage::Private, GuestPage::Private));
        assert_eq!(rig.change(GuestShare, guest, RAM, 4), refused(GuestReason::Poisoned, RAM + PAGE));
        // Elsewhere the page is as good as any.
        rig.give(guest, GIB + PAGE, 1, RAM + MIB).unwrap();
        assert_eq!(rig.force(guest, GIB + PAGE, 2), denied(GuestReason::Denied, GIB + 2 * PAGE));
        assert_eq!(rig.force(guest, 0, 1), denied(GuestReason::NotRam, 0));
    });
}

#[test]
fn offered_pages_can_be_taken_but_claimed_ones_cannot() {
    for kind in [GuestKind::Pkvm, GuestKind::Realm] {
        with_page(kind, |rig, guest| {
            rig.change(GuestShare, guest, RAM + PAGE, 3).unwrap();
            rig.change(Claim, guest, RAM + 2 * PAGE, 1).unwrap();
            assert_eq!(rig.touch(GIB + 2 * PAGE), HostFault::Resolved);
            let before = rig.everything();
            assert_eq!(rig.force(guest, GIB, 4), denied(GuestReason::Denied, GIB + 2 * PAGE));
            assert!(rig.everything() == before);
            rig.change(Release, guest, RAM + 2 * PAGE, 1).unwrap();
            let _ = rig.machine.take_log();
            // Private ones and offered ones in one call, and with one invalidation, before they are scrubbed.
            rig.force(guest, GIB, 3).unwrap();
            let log = rig.machine.take_log();
            let place = |wanted: &dyn Fn(&Op) -> bool| log.iter().position(wanted).unwrap();
            // Of a realm they lie far apart.
            let flushes = |op: &Op| matches!(op, Op::InvalidateStage2(vmid, ..) | Op::InvalidateStage2All(vmid) if *vmid == guest.vttbr().vmid);
            assert_eq!(log.iter().filter(|op| flushes(op)).count(), 1);
            assert!(place(&flushes) < place(&|op| matches!(op, Op::Scrub(_))));
            for page in 0..3 {
                assert_eq!(rig.machine.peek(addr(GIB + page * PAGE)), 0, "offered ones, too");
                assert_eq!(rig.state(GIB + page * PAGE), (HostState::Owned, 0));
                assert_eq!(rig.at(guest, RAM + page * PAGE), GuestPage::Poisoned);
                assert_eq!(rig.guest_reaches(guest, RAM + page * PAGE), None);
                let other = GIB + 9 * PAGE;
                assert_eq!(rig.give(guest, other, 1, RAM + page * PAGE), denied(GuestReason::Poisoned, other));
                for change in [GuestShare, GuestUnshare, Claim, Release] {
                    assert_eq!(
                        rig.change(change, guest, RAM + page * PAGE, 1),
                        refused(GuestReason::Poisoned, RAM + page * PAGE)
                    );
                }
            }
            assert_eq!(rig.at(guest, RAM + 3 * PAGE), GuestPage::Offered);
            assert_eq!(rig.change(GuestUnshare, guest, RAM + 3 * PAGE, 1), Ok(1));
            assert_eq!(rig.machine.peek(addr(GIB + 3 * PAGE)), 7 + 3);
            // Of the same page twice, and of one that is somebody else's.
            assert_eq!(rig.force(guest, GIB, 1), denied(GuestReason::Denied, GIB));
        });
    }
}

#[test]
fn a_block_that_is_private_and_offered_by_turns_is_cut_once() {
    for kind in [GuestKind::Pkvm, GuestKind::Realm] {
        with_rig(|rig| {
            let guest = rig.guest(0, kind, 8);
            let block = GIB + 2 * MIB;
            rig.give(&guest, block, 512, RAM).unwrap();
            for page in (0..64).step_by(2) {
                rig.change(GuestShare, &guest, RAM + page * PAGE, 1).unwrap();
            }
            // A part, the rest with what was never shared, and nothing is left for others to find.
            rig.force(&guest, block + 3 * PAGE, 20).unwrap();
            rig.force(&guest, block + 23 * PAGE, 489).unwrap();
            rig.force(&guest, block, 3).unwrap();
            for page in [0, 1, 2, 3, 22, 23, 63, 64, 511] {
                assert_eq!(rig.at(&guest, RAM + page * PAGE), GuestPage::Poisoned, "{page}");
            }
            assert!(guest.is_empty());
            rig.destroy(guest, frames(RAM, 512));
        });
    }
}

#[test]
fn a_guest_that_gives_a_poisoned_frame_up_may_get_another_page() {
    with_page(GuestKind::Pkvm, |rig, guest| {
        rig.force(guest, GIB + PAGE, 2).unwrap();
        let _ = rig.machine.take_log();
        assert_eq!(rig.change(Relinquish, guest, RAM + PAGE, 1), Ok(1));
        let log = rig.machine.take_log();
        assert_eq!(invalidations(&log), [], "it was in no TLB");
        assert!(!log.iter().any(|op| matches!(op, Op::Scrub(_))), "the host has had the page for long");
        assert_eq!(rig.at(guest, RAM + PAGE), GuestPage::Absent);
        rig.give(guest, GIB + 9 * PAGE, 1, RAM + PAGE).unwrap();
        assert_eq!(rig.guest_reaches(guest, RAM + PAGE), Some(GIB + 9 * PAGE));
        // The other one is as it was.
        assert_eq!(rig.at(guest, RAM + 2 * PAGE), GuestPage::Poisoned);
        let other = GIB + 10 * PAGE;
        assert_eq!(rig.give(guest, other, 1, RAM + 2 * PAGE), denied(GuestReason::Poisoned, other));
        // Private and poisoned ones together; nothing if one of them is neither.
        rig.change(GuestShare, guest, RAM + 3 * PAGE, 1).unwrap();
        let before = rig.everything();
        assert_eq!(rig.change(Relinquish, guest, RAM, 4), refused(GuestReason::Denied, RAM + 3 * PAGE));
        assert_eq!(rig.change(Relinquish, guest, RAM + 2 * PAGE, 3), refused(GuestReason::Denied, RAM + 3 * PAGE));
        assert!(rig.everything() == before);
        rig.change(GuestUnshare, guest, RAM + 3 * PAGE, 1).unwrap();
        assert_eq!(rig.change(Relinquish, guest, RAM, 5), refused(GuestReason::Absent, RAM + 4 * PAGE));
        let _ = rig.machine.take_log();
        assert_eq!(rig.change(Relinquish, guest, RAM, 4), Ok(4));
        let flushed = |op: &&Op| matches!(op, Op::InvalidateStage2(vmid, ..) if *vmid == guest.vttbr().vmid);
        assert_eq!(rig.machine.take_log().iter().filter(flushed).count(), 1);
        for page in 0..4 {
            assert_eq!(rig.at(guest, RAM + page * PAGE), GuestPage::Absent);
            assert_eq!(rig.state(GIB + page * PAGE), (HostState::Owned, 0));
            assert_eq!(rig.machine.peek(addr(GIB + page * PAGE)), 0);
        }
        assert!(guest.is_empty());
        assert_eq!(rig.change(Relinquish, guest, RAM + PAGE, 1), refused(GuestReason::Absent, RAM + PAGE));
        rig.give(guest, GIB, 4, RAM).unwrap();
    });
}

#[test]
fn a_part_of_a_poisoned_block_can_be_given_up() {
    with_rig(|rig| {
        // For the block, for a last-level table, and none to cut that.
        let guest = rig.guest(0, GuestKind::Pkvm, 2);
        rig.give(&guest, GIB, 512, RAM).unwrap();
        rig.give(&guest, GIB + 2 * MIB, 1, RAM + 2 * MIB).unwrap();
        rig.force(&guest, GIB, 512).unwrap();
        let before = rig.everything();
        assert_eq!(
            rig.change(Relinquish, &guest, RAM + 7 * PAGE, 2),
            refused(GuestReason::NeedsTables(1), RAM + 7 * PAGE)
        );
        assert_eq!(
            rig.change(Relinquish, &guest, RAM + 511 * PAGE, 2),
            refused(GuestReason::NeedsTables(1), RAM + 511 * PAGE)
        );
        assert!(rig.everything() == before);
        rig.add_tables(&guest, 4, 1);
        let _ = rig.machine.take_log();
        assert_eq!(rig.change(Relinquish, &guest, RAM + 7 * PAGE, 2), Ok(2));
        assert_eq!(invalidations(&rig.machine.take_log()), []);
        for page in 0..512 {
            let expected = if (7..9).contains(&page) { GuestPage::Absent } else { GuestPage::Poisoned };
            assert_eq!(rig.at(&guest, RAM + page * PAGE), expected, "{page}");
        }
        // Neither beside them, nor over all of it, nor as a block.
        for (page, pages, first) in [(6, 1, 0), (9, 1, 0), (7, 3, 2), (0, 512, 0)] {
            let given = rig.give(&guest, GIB + page * PAGE, pages, RAM + page * PAGE);
            assert_eq!(given, denied(GuestReason::Poisoned, GIB + (page + first) * PAGE));
        }
        rig.give(&guest, GIB + 7 * PAGE, 2, RAM + 7 * PAGE).unwrap();
        assert_eq!(rig.guest_reaches(&guest, RAM + 8 * PAGE), Some(GIB + 8 * PAGE));
        // What is private, what is poisoned, and a page behind the block.
        assert_eq!(rig.change(Relinquish, &guest, RAM, 513), Ok(512), "a step for each page");
        assert_eq!(rig.change(Relinquish, &guest, RAM + 512 * PAGE, 1), Ok(1));
        assert!(guest.is_empty());
        assert_eq!(guest.lock(&rig.machine).spare.in_use, 0);
        rig.give(&guest, GIB, 512, RAM).unwrap();
        rig.destroy(guest, frames(RAM, 513));
    });
}

/// To read a descriptor is less than to return a page, but not nothing.
#[test]
fn eight_frames_without_a_page_are_a_step() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 12);
        for block in 0..9 {
            rig.give(&guest, GIB + block * PAGE, 1, RAM + block * 2 * MIB).unwrap();
        }
        guest.kill();
        // 65 steps for each block.
        assert_eq!(rig.change(Reclaim, &guest, RAM, 9 * 512), Ok(8 * 512));
        rig.check_guest(&guest);
        rig.destroy(guest, frames(RAM + 8 * 2 * MIB, 512));
    });
}

#[test]
fn a_poisoned_block_is_given_up_in_one_step() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 4);
        for block in 0..4 {
            rig.give(&guest, GIB + block * 2 * MIB, 512, RAM + block * 2 * MIB).unwrap();
        }
        for block in 0..3 {
            rig.force(&guest, GIB + block * 2 * MIB, 512).unwrap();
        }
        // The block behind them has more pages than steps are left.
        let _ = rig.machine.take_log();
        assert_eq!(rig.change(Relinquish, &guest, RAM, 4 * 512), Ok(3 * 512));
        assert_eq!(invalidations(&rig.machine.take_log()), []);
        assert_eq!(rig.change(Relinquish, &guest, RAM + 3 * 2 * MIB, 512), Ok(512));
        assert!((0..2048).all(|page| rig.at(&guest, RAM + page * PAGE) == GuestPage::Absent));
        rig.check_guest(&guest);
        assert_eq!(guest.lock(&rig.machine).spare.in_use, 0);
        rig.destroy(guest, frames(RAM, 1));
    });
}

#[test]
fn a_dead_guests_poison_needs_a_table_where_it_is_cut() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 1);
        rig.give(&guest, GIB, 512, RAM).unwrap();
        rig.force(&guest, GIB, 512).unwrap();
        guest.kill();
        assert_eq!(rig.change(Reclaim, &guest, RAM + PAGE, 1), refused(GuestReason::NeedsTables(1), RAM + PAGE));
        rig.add_tables(&guest, 3, 1);
        assert_eq!(rig.change(Reclaim, &guest, RAM + PAGE, 1), Ok(1));
        rig.check_guest(&guest);
        rig.destroy(guest, frames(RAM, 1));
    });
}

#[test]
fn a_block_that_is_cleaned_is_many_steps() {
    let layout = large();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    for (slot, kind) in [(0, GuestKind::Pkvm), (1, GuestKind::Realm), (2, GuestKind::Ordinary)] {
        let guest = rig.guest(slot, kind, 16);
        let (base, at) = (GIB + 64 * MIB, RAM);
        assert_eq!(rig.give(&guest, base, 17 * 512, at), denied(GuestReason::TooLarge, base));
        assert_eq!(rig.give(&guest, base, 16 * 512 + 1, at), denied(GuestReason::TooLarge, base));
        assert_eq!(
            rig.give(&guest, base + 2 * MIB - PAGE, 16 * 512, at + 2 * MIB - PAGE),
            denied(GuestReason::TooLarge, base + 2 * MIB - PAGE)
        );
        let _ = rig.machine.take_log();
        rig.give(&guest, base, 16 * 512, at).unwrap();
        let cleaned = |op: &Op| if let Op::Clean(range) = op { range.pages() } else { 0 };
        assert_eq!(rig.machine.take_log().iter().map(cleaned).sum::<u64>(), 16 * 512);
        // 15 blocks and 32 pages around them.
        let around = base + 64 * MIB - 16 * PAGE;
        rig.give(&guest, around, 15 * 512 + 32, at + 64 * MIB - 16 * PAGE).unwrap();
        rig.destroy(guest, frames(at, 1 << 18));
    }
}

#[test]
fn a_block_is_handled_as_one() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        let block = GIB + 4 * MIB;
        rig.touch(GIB);
        rig.touch(block);
        let entries = rig.everything().pages;
        let step = |change, count, flushed| {
            let _ = rig.machine.take_log();
            assert_eq!(rig.change(change, &guest, RAM, 512), Ok(512), "{change:?}");
            let log = rig.machine.take_log();
            assert_eq!((writes(&log), invalidations(&log).len()), (count, flushed), "{change:?}");
            assert_eq!(rig.everything().pages, entries, "{change:?} touched page entries");
            rig.check_guest(&guest);
        };
        rig.give(&guest, block, 512, RAM).unwrap();
        assert_eq!(rig.everything().pages, entries);
        assert_eq!(rig.counts().guest_owned, 512);
        assert_eq!(rig.guest_reaches(&guest, RAM + 511 * PAGE), Some(block + 511 * PAGE));
        step(GuestShare, 0, 0);
        step(Claim, 0, 0);
        rig.touch(block + 3 * PAGE);
        // The block, and how many entries the table above has in use.
        step(Release, 2, 1);
        step(GuestUnshare, 0, 0);
        // A part of it costs no descriptor either, and comes back.
        let _ = rig.machine.take_log();
        assert_eq!(rig.change(GuestShare, &guest, RAM + 5 * PAGE, 9), Ok(9));
        assert_eq!(rig.change(Claim, &guest, RAM + 5 * PAGE, 9), Ok(9));
        assert_eq!(rig.machine.take_log(), []);
        rig.check_guest(&guest);
        assert_eq!(rig.touch(block + 5 * PAGE), HostFault::Resolved);
        assert_eq!(rig.touch(block + 4 * PAGE), HostFault::Denied);
        assert_eq!(rig.change(GuestUnshare, &guest, RAM + 4 * PAGE, 2), refused(GuestReason::Denied, RAM + 4 * PAGE));
        assert_eq!(rig.change(Release, &guest, RAM + 5 * PAGE, 9), Ok(9));
        assert_eq!(rig.change(GuestUnshare, &guest, RAM + 5 * PAGE, 9), Ok(9));
        // The whole of it is one entry again after the next change, and one poisoned descriptor.
        assert_eq!(rig.change(GuestShare, &guest, RAM, 512), Ok(512));
        assert_eq!(rig.everything().blocks[2] >> 60 & 1, 0, "uniform");
        assert_eq!(rig.change(GuestUnshare, &guest, RAM, 512), Ok(512));
        let _ = rig.machine.take_log();
        rig.force(&guest, block, 512).unwrap();
        let guests = |op: &&Op| matches!(op, Op::Write { table, .. } if table.raw() >= METADATA && table.raw() < POOL);
        assert_eq!(rig.machine.take_log().iter().filter(guests).count(), 1);
        assert_eq!(rig.at(&guest, RAM + 511 * PAGE), GuestPage::Poisoned);
        assert_eq!(rig.state(block + 511 * PAGE), (HostState::Owned, 0));
    });
}

#[test]
fn many_blocks_are_as_many_steps() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        assert!(guest.is_empty());
        rig.give(&guest, GIB, 8 * 512, RAM).unwrap();
        assert!(!guest.is_empty());
        assert_eq!(rig.change(GuestShare, &guest, RAM, 8 * 512), Ok(8 * 512));
        assert_eq!(rig.change(Claim, &guest, RAM, 8 * 512), Ok(8 * 512));
        assert_eq!(rig.change(Release, &guest, RAM, 8 * 512), Ok(8 * 512));
        assert_eq!(rig.change(GuestUnshare, &guest, RAM, 8 * 512), Ok(8 * 512));
        // What is scrubbed counts by the page.
        assert_eq!(rig.change(Relinquish, &guest, RAM, 8 * 512), Ok(512));
        assert_eq!(rig.force(&guest, GIB + 2 * MIB, 513), denied(GuestReason::TooLarge, GIB + 2 * MIB));
    });
}

#[test]
fn the_last_frame_is_one() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        let last = guest.end() - PAGE;
        rig.give(&guest, GIB, 1, last).unwrap();
        assert_eq!(rig.change(GuestShare, &guest, last, 1), Ok(1));
        assert_eq!(rig.change(GuestUnshare, &guest, last, 2), refused(GuestReason::OutOfRange, last));
        assert_eq!(rig.change(GuestUnshare, &guest, last, 1), Ok(1));
    });
}

#[test]
fn a_block_that_is_whole_again_is_mapped_as_one() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        let leaves = || {
            let mut leaves = Vec::new();
            rig.touch(GIB);
            let block = range(GIB, 512).identity_ipa();
            rig.memory.visit_host(&rig.machine, block, &mut |part, _| leaves.push(part.pages()));
            leaves
        };
        rig.give(&guest, GIB + PAGE, 1, RAM).unwrap();
        assert_eq!(leaves(), [1, 1, 510]);
        assert_eq!(rig.change(Relinquish, &guest, RAM, 1), Ok(1));
        assert_eq!(leaves(), [512]);
        rig.check_guest(&guest);
    });
}

#[test]
fn work_is_bounded_where_there_are_no_blocks() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        // The same block, but not where a block could be in the guest.
        assert_eq!(rig.give(&guest, GIB, 513, RAM + PAGE), denied(GuestReason::TooLarge, GIB));
        rig.give(&guest, GIB, 512, RAM + PAGE).unwrap();
        rig.give(&guest, GIB + 2 * MIB, 512, RAM + PAGE + 2 * MIB).unwrap();
        // In the ownership table it is one nevertheless.
        let entries = rig.everything().pages;
        assert_eq!(rig.change(GuestShare, &guest, RAM + PAGE, 1024), Ok(512));
        assert_eq!(rig.change(GuestUnshare, &guest, RAM + PAGE, 1024), Ok(512));
        assert_eq!(rig.everything().pages, entries);
        // The host's calls are all or nothing.
        assert_eq!(rig.change(GuestShare, &guest, RAM + 3 * PAGE, 1000), Ok(512));
        assert_eq!(rig.change(GuestShare, &guest, RAM + 515 * PAGE, 488), Ok(488));
        assert_eq!(rig.change(Claim, &guest, RAM + 3 * PAGE, 1000), refused(GuestReason::TooLarge, RAM + 3 * PAGE));
        assert_eq!(rig.change(Claim, &guest, RAM + 3 * PAGE, 512), Ok(512));
        rig.check_guest(&guest);
    });
}

#[test]
fn frames_end_with_the_address_space() {
    for kind in [GuestKind::Pkvm, GuestKind::Realm, GuestKind::Ordinary] {
        with_page(kind, |rig, guest| {
            let end = if kind == GuestKind::Realm { 1 << 39 } else { 1 << 40 };
            assert_eq!(guest.end(), end);
            assert_eq!(rig.give(guest, GIB + MIB, 2, end - PAGE), denied(GuestReason::OutOfRange, GIB + MIB));
            assert_eq!(rig.give(guest, GIB + MIB, 1, RAM + MIB + 5), denied(GuestReason::OutOfRange, GIB + MIB));
            assert_eq!(rig.give(guest, GIB + MIB, 1, (1 << 48) - PAGE), denied(GuestReason::OutOfRange, GIB + MIB));
            for change in CHANGES {
                for (at, pages) in [(end - PAGE, 2), (end, 1), (0, 1 << 36), ((1 << 48) - PAGE, 1)] {
                    let reason = if change == Reclaim { GuestReason::Denied } else { GuestReason::OutOfRange };
                    assert_eq!(rig.change(change, guest, at, pages), refused(reason, at), "{change:?}");
                }
            }
            rig.give(guest, GIB + MIB, 1, end - PAGE).unwrap();
            assert_eq!(rig.at(guest, (1 << 48) - PAGE), GuestPage::Absent);
        });
    }
}

#[test]
fn missing_tables_are_counted_and_nothing_changes() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 0);
        let before = rig.everything();
        // A last-level table and one above; for two blocks' edges two of the former.
        assert_eq!(rig.give(&guest, GIB, 1, RAM), denied(GuestReason::NeedsTables(2), GIB));
        assert_eq!(rig.give(&guest, GIB, 2, RAM + 2 * MIB - PAGE), denied(GuestReason::NeedsTables(3), GIB));
        assert_eq!(rig.give(&guest, GIB, 512, RAM), denied(GuestReason::NeedsTables(1), GIB));
        assert!(rig.everything() == before);
        rig.add_tables(&guest, 2, 1);
        rig.give(&guest, GIB, 512, RAM).unwrap();
        // To cut the block takes one.
        assert_eq!(rig.change(Relinquish, &guest, RAM + PAGE, 1), refused(GuestReason::NeedsTables(1), RAM + PAGE));
        assert_eq!(rig.force(&guest, GIB + 3 * PAGE, 2), denied(GuestReason::NeedsTables(1), GIB + 3 * PAGE));
        assert_eq!(rig.change(GuestShare, &guest, RAM + PAGE, 1), Ok(1), "takes none");
        assert_eq!(rig.change(GuestUnshare, &guest, RAM + PAGE, 1), Ok(1));
        rig.add_tables(&guest, 3, 1);
        assert_eq!(rig.change(Relinquish, &guest, RAM + PAGE, 1), Ok(1));
        rig.force(&guest, GIB + 3 * PAGE, 2).unwrap();
        assert_eq!(rig.guest_reaches(&guest, RAM + 2 * PAGE), Some(GIB + 2 * PAGE));
        assert_eq!(guest.table_pages(), 2);
    });
}

#[test]
fn a_realms_pages_move_to_the_alias_and_back() {
    with_page(GuestKind::Realm, |rig, guest| {
        let alias = RAM | 1 << 39;
        assert_eq!((rig.guest_reaches(guest, RAM), rig.guest_reaches(guest, alias)), (Some(GIB), None));
        assert_eq!(rig.change(GuestShare, guest, RAM, 2), Ok(2));
        assert_eq!(invalidations(&rig.machine.take_log()).len(), 1);
        assert_eq!((rig.guest_reaches(guest, RAM), rig.guest_reaches(guest, alias)), (None, Some(GIB)));
        assert_eq!((rig.at(guest, RAM), rig.at(guest, alias)), (GuestPage::Offered, GuestPage::Offered));
        assert_eq!(rig.guest_reaches(guest, RAM + 2 * PAGE), Some(GIB + 2 * PAGE));
        rig.check_guest(guest);
        // Frames are named without the alias, and a frame that is shared is not free.
        assert_eq!(rig.give(guest, GIB + MIB, 1, RAM), denied(GuestReason::Exists, GIB + MIB));
        assert_eq!(rig.change(Claim, guest, RAM, 2), Ok(2));
        assert_eq!(invalidations(&rig.machine.take_log()), []);
        assert_eq!(rig.touch(GIB + PAGE), HostFault::Resolved);
        assert_eq!(rig.change(GuestUnshare, guest, RAM, 2), Err((None, RAM)));
        assert_eq!(rig.change(Release, guest, RAM, 2), Ok(2));
        assert_eq!(rig.change(GuestUnshare, guest, RAM, 2), Ok(2));
        assert_eq!((rig.guest_reaches(guest, RAM), rig.guest_reaches(guest, alias)), (Some(GIB), None));
        assert_eq!(rig.machine.peek(addr(GIB)), 7);
        // Poison is in the half where the page was, and shows in both.
        rig.force(guest, GIB, 1).unwrap();
        assert_eq!((rig.at(guest, RAM), rig.at(guest, alias)), (GuestPage::Poisoned, GuestPage::Poisoned));
        rig.change(GuestShare, guest, RAM + PAGE, 1).unwrap();
        rig.force(guest, GIB + PAGE, 1).unwrap();
        assert_eq!(
            (rig.at(guest, RAM + PAGE), rig.at(guest, alias + PAGE)),
            (GuestPage::Poisoned, GuestPage::Poisoned)
        );
        assert_eq!((rig.guest_reaches(guest, RAM + PAGE), rig.guest_reaches(guest, alias + PAGE)), (None, None));
    });
}

#[test]
fn a_realm_needs_tables_for_the_alias() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Realm, 2);
        rig.give(&guest, GIB, 512, RAM).unwrap();
        // One table for the alias of a block.
        assert_eq!(rig.change(GuestShare, &guest, RAM, 512), Ok(512));
        assert_eq!(rig.change(GuestUnshare, &guest, RAM, 512), Ok(512));
        let other = rig.guest(1, GuestKind::Realm, 1);
        rig.give(&other, GIB + 8 * MIB, 512, RAM).unwrap();
        assert_eq!(rig.change(GuestShare, &other, RAM, 512), refused(GuestReason::NeedsTables(1), RAM));
        // A page of it: two for the alias, one for the cut.
        let before = rig.everything();
        assert_eq!(rig.change(GuestShare, &guest, RAM + PAGE, 1), refused(GuestReason::NeedsTables(2), RAM + PAGE));
        assert!(rig.everything() == before);
        rig.add_tables(&guest, 4, 2);
        assert_eq!(rig.change(GuestShare, &guest, RAM + PAGE, 1), Ok(1));
        rig.check_guest(&guest);
        // Scattered pages, every other one: no more than their last-level tables.
        for page in (0..8).step_by(2) {
            rig.give(&guest, GIB + 4 * MIB + page * PAGE, 1, RAM + 4 * MIB + (page / 2) * PAGE).unwrap_or_else(
                |failure| {
                    assert_eq!(failure.reason, GuestReason::NeedsTables(1));
                    rig.add_tables(&guest, 6, 2);
                    rig.give(&guest, GIB + 4 * MIB + page * PAGE, 1, RAM + 4 * MIB + (page / 2) * PAGE).unwrap();
                },
            );
        }
        assert_eq!(rig.change(GuestShare, &guest, RAM + 4 * MIB, 4), Ok(4));
        rig.check_guest(&guest);
    });
}

#[test]
fn as_many_pages_as_a_block_has_are_no_block() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Realm, 3);
        rig.give(&guest, GIB + PAGE, 512, RAM).unwrap();
        let before = rig.everything();
        assert_eq!(rig.change(GuestShare, &guest, RAM, 512), refused(GuestReason::NeedsTables(1), RAM));
        assert!(rig.everything() == before);
        rig.add_tables(&guest, 5, 1);
        assert_eq!(rig.change(GuestShare, &guest, RAM, 512), Ok(512));
        assert_eq!(rig.guest_reaches(&guest, (RAM | 1 << 39) + 511 * PAGE), Some(GIB + 512 * PAGE));
        rig.check_guest(&guest);
        assert_eq!(rig.change(GuestUnshare, &guest, RAM, 512), Ok(512));
        rig.check_guest(&guest);
        // One by one, they become one where they go.
        let other = rig.guest(1, GuestKind::Realm, 3);
        for page in 0..512 {
            rig.give(&other, GIB + 8 * MIB + page * PAGE, 1, RAM + page * PAGE).unwrap();
        }
        assert_eq!(rig.change(GuestShare, &other, RAM, 512), Ok(512));
        rig.check_guest(&other);
    });
}

#[test]
fn the_host_keeps_access_to_what_it_lends() {
    with_page(GuestKind::Ordinary, |rig, guest| {
        assert_eq!((rig.at(guest, RAM), rig.state(GIB)), (GuestPage::Lent, (HostState::SharedOwned, 0)));
        assert!(rig.host_reaches(GIB), "not even for a moment");
        assert_eq!(rig.guest_reaches(guest, RAM), Some(GIB));
        let other = rig.guest(1, GuestKind::Ordinary, 4);
        assert_eq!(rig.give(&other, GIB, 1, RAM), denied(GuestReason::Denied, GIB));
        for call in CALLS {
            assert_eq!(rig.call(call, range(GIB, 1)), fails(Reason::Denied, GIB), "{call:?}");
        }
        assert_eq!(rig.force(guest, GIB, 1), denied(GuestReason::Denied, GIB));
        for change in [GuestShare, GuestUnshare, Relinquish, Claim, Release] {
            assert_eq!(rig.change(change, guest, RAM, 1), refused(GuestReason::Denied, RAM));
        }
        let donated =
            rig.memory.give(&rig.machine, guest, range(GIB + MIB, 1), Ipa::new(RAM + MIB).unwrap(), Gift::Donated);
        assert_eq!(donated, denied(GuestReason::Denied, GIB + MIB));
        let _ = rig.machine.take_log();
        assert_eq!(rig.change(Unlend, guest, RAM + PAGE, 2), Ok(2));
        let gone = Op::InvalidateStage2(guest.vttbr().vmid, frames(RAM + PAGE, 2), true);
        assert_eq!(invalidations(&rig.machine.take_log()), [gone]);
        assert_eq!(rig.machine.peek(addr(GIB + PAGE)), 8, "not scrubbed");
        assert_eq!(rig.state(GIB + PAGE), (HostState::Owned, 0));
        assert_eq!(rig.change(Unlend, guest, RAM, 2), refused(GuestReason::Absent, RAM + PAGE));
    });
}

#[test]
fn a_protected_guest_is_not_lent_anything() {
    with_page(GuestKind::Pkvm, |rig, guest| {
        let lent = rig.memory.give(&rig.machine, guest, range(GIB + MIB, 1), Ipa::new(RAM + MIB).unwrap(), Gift::Lent);
        assert_eq!(lent, denied(GuestReason::Denied, GIB + MIB));
    });
}

#[test]
fn a_dead_guest_leaves_nothing_behind() {
    for kind in [GuestKind::Pkvm, GuestKind::Realm, GuestKind::Ordinary] {
        with_rig(|rig| {
            let fresh = (rig.counts().pages(), rig.counts().el2_tables);
            for round in 0..3 {
                let guest = rig.guest(0, kind, 40);
                for page in 0..2048 {
                    rig.machine.poke(addr(GIB + page * PAGE), 100 + page);
                }
                rig.give(&guest, GIB, 1024, RAM).unwrap();
                rig.give(&guest, GIB + 5 * MIB, 100, RAM + 512 * MIB + PAGE).unwrap();
                if kind != GuestKind::Ordinary {
                    assert_eq!(rig.change(GuestShare, &guest, RAM + 8 * PAGE, 16), Ok(16));
                    assert_eq!(rig.change(Claim, &guest, RAM + 10 * PAGE, 4), Ok(4));
                    rig.touch(GIB + 10 * PAGE);
                    rig.force(&guest, GIB + 6 * PAGE, 2).unwrap();
                    rig.force(&guest, GIB + 2 * MIB, 512).unwrap();
                }
                assert_eq!(rig.memory.release_guest_tables(&rig.machine, &guest, 512), Err(GuestReason::Busy));
                assert_eq!(rig.change(Reclaim, &guest, RAM, 512), refused(GuestReason::Denied, RAM));
                guest.kill();
                assert_eq!(rig.memory.release_guest_tables(&rig.machine, &guest, 512), Err(GuestReason::Busy));
                for change in CHANGES.into_iter().filter(|&change| change != Reclaim) {
                    assert_eq!(rig.change(change, &guest, RAM, 1), refused(GuestReason::Denied, RAM), "{change:?}");
                }
                assert_eq!(rig.give(&guest, GIB + 9 * MIB, 1, RAM + GIB), denied(GuestReason::Denied, GIB + 9 * MIB));
                assert_eq!(rig.force(&guest, GIB, 1), denied(GuestReason::Denied, GIB));
                rig.destroy(guest, frames(RAM, 1 << 18));
                assert_eq!((rig.counts().pages(), rig.counts().el2_tables), fresh, "round {round}");
                let kept = |page| kind == GuestKind::Ordinary || (8..24).contains(&page);
                for page in (0..40).chain(1000..1024) {
                    let expected = if kept(page) { 100 + page } else { 0 };
                    assert_eq!(rig.machine.peek(addr(GIB + page * PAGE)), expected, "page {page}");
                    assert_eq!(rig.touch(GIB + page * PAGE), HostFault::Resolved);
                }
            }
        });
    }
}

#[test]
fn what_a_dead_guest_has_shared_is_clean() {
    with_page(GuestKind::Pkvm, |rig, guest| {
        assert_eq!(rig.change(GuestShare, guest, RAM + PAGE, 2), Ok(2));
        guest.kill();
        let _ = rig.machine.take_log();
        assert_eq!(rig.change(Reclaim, guest, RAM, 4), Ok(4));
        let log = rig.machine.take_log();
        let place = |wanted: Op| log.iter().position(|&op| op == wanted).unwrap();
        let gone = place(Op::InvalidateStage2(guest.vttbr().vmid, frames(RAM, 4), false));
        assert!(gone < place(Op::Scrub(range(GIB, 1))));
        assert!(gone < place(Op::Clean(range(GIB + PAGE, 2))));
        assert!(gone < place(Op::Scrub(range(GIB + 3 * PAGE, 1))));
        let of_el2 = log.iter().filter(|op| matches!(op, Op::InvalidateEl2(_)));
        assert_eq!(of_el2.count(), 1, "for all of them together");
        assert_eq!([0, 1, 2, 3].map(|page| rig.machine.peek(addr(GIB + page * PAGE))), [0, 8, 9, 0]);
    });
}

#[test]
fn scattered_pages_come_back_in_several_calls() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        for page in 0..100 {
            rig.machine.poke(addr(GIB + 2 * page * PAGE), 1);
            rig.give(&guest, GIB + 2 * page * PAGE, 1, RAM + page * PAGE).unwrap();
        }
        let _ = rig.machine.take_log();
        assert_eq!(rig.change(Relinquish, &guest, RAM, 100), Ok(32));
        let log = rig.machine.take_log();
        assert_eq!(invalidations(&log).len(), 2, "one for the guest, one for EL2");
        rig.check_guest(&guest);
        rig.destroy(guest, frames(RAM, 100));
        assert!((0..200).all(|page| rig.machine.peek(addr(GIB + page * PAGE)) == 0));
    });
}

#[test]
fn emptiness_costs_nothing() {
    with_page(GuestKind::Realm, |rig, guest| {
        let run = |at, pages| rig.memory.guest_run(&rig.machine, guest, frames(at, pages));
        assert_eq!(run(RAM, 100), (GuestPage::Private, 4));
        assert_eq!(run(RAM + 4 * PAGE, 100), (GuestPage::Absent, 100));
        // Gigabytes without tables.
        assert_eq!(run(RAM + GIB, 1 << 26), (GuestPage::Absent, 1 << 26));
        rig.change(GuestShare, guest, RAM + PAGE, 2).unwrap();
        assert_eq!(run(RAM, 100), (GuestPage::Private, 1));
        assert_eq!(run(RAM + PAGE, 100), (GuestPage::Offered, 2));
        rig.change(Claim, guest, RAM + PAGE, 1).unwrap();
        assert_eq!(run(RAM + PAGE, 100), (GuestPage::Claimed, 1));
        // The alias is not a place for frames.
        assert_eq!(run((1 << 39) - PAGE, 1 << 28), (GuestPage::Absent, 1));
        assert_eq!(run(RAM | 1 << 39, 3), (GuestPage::Absent, 3));
    });
}

#[test]
fn el2_maps_guest_pages_only_while_it_reads_them() {
    with_page(GuestKind::Pkvm, |rig, guest| {
        let mut seen = Vec::new();
        let done = rig.memory.with_guest_pages(&rig.machine, guest, frames(RAM + PAGE, 3), &mut |pages| {
            assert!(pages.iter().all(|page| rig.el2_reaches(page.raw())));
            assert_eq!(
                rig.machine.take_log().last(),
                Some(&Op::Clean(pages)),
                "of what the guest wrote beside its caches"
            );
            seen.push(pages);
        });
        assert_eq!(rig.machine.take_log().first(), Some(&Op::Clean(range(GIB + PAGE, 3))));
        assert_eq!((done, seen), (Ok(3), vec![range(GIB + PAGE, 3)]));
        assert!(!rig.el2_reaches(GIB + PAGE));
        rig.change(GuestShare, guest, RAM, 1).unwrap();
        let failure = GuestFailure { reason: GuestReason::Denied, ipa: Ipa::new(RAM).unwrap() };
        let mut never = |_| panic!("called");
        assert_eq!(rig.memory.with_guest_pages(&rig.machine, guest, frames(RAM, 1), &mut never), Err(failure));
    });
}

#[test]
fn a_root_must_be_kept_and_aligned() {
    with_rig(|rig| {
        let geometry = Geometry::stage2(40).unwrap();
        let new =
            |slot, root| rig.memory.new_guest(&rig.machine, slot, GuestKind::Pkvm, geometry, addr(root)).map(|_| ());
        assert_eq!(new(0, GIB), fails(Reason::Denied, GIB), "the host's");
        rig.memory.keep(&rig.machine, range(GIB, 4)).unwrap();
        assert_eq!(new(0, GIB + PAGE), fails(Reason::Denied, GIB + PAGE), "not aligned");
        assert_eq!(new(255, GIB), fails(Reason::Denied, GIB), "no VMID");
        assert_eq!(new(0, GIB + 4 * PAGE), fails(Reason::Denied, GIB + 4 * PAGE));
        let _ = rig.machine.take_log();
        assert_eq!(new(254, GIB + 2 * PAGE), Ok(()));
        assert_eq!(invalidations(&rig.machine.take_log()), [Op::InvalidateStage2All(Vmid::new(255))]);
        rig.memory.give_back(&rig.machine, range(GIB, 4)).unwrap();
        rig.check();
    });
}

#[test]
fn transient_mappings_take_the_hosts_tables_if_they_must() {
    let layout = Layout { tables: u64::try_from(HOST_RESERVE + 4).unwrap(), ..large() };
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let guest = rig.guest(0, GuestKind::Pkvm, 16);
    // Holes in many blocks make the host's tables many.
    for block in 0..200 {
        let page = GIB + 64 * MIB + block * 2 * MIB;
        rig.touch(page);
        let at = Ipa::new(RAM + block * PAGE).unwrap();
        rig.memory.give(&rig.machine, &guest, range(page + PAGE, 1), at, Gift::Donated).unwrap();
        rig.touch(page);
    }
    assert!(rig.counts().evictions > 0);
    assert_eq!(rig.change(Relinquish, &guest, RAM, 200), Ok(32));
    rig.check_guest(&guest);
    rig.destroy(guest, frames(RAM, 512));
}

#[test]
fn the_limit_of_a_call_does_not_cut_blocks() {
    // Tables for a page and a block, and none to cut that.
    let block = RAM + 2 * MIB;
    for dying in [false, true] {
        with_rig(|rig| {
            let guest = rig.guest(0, GuestKind::Pkvm, 2);
            rig.give(&guest, GIB, 1, block - PAGE).unwrap();
            rig.give(&guest, GIB + 2 * MIB, 512, block).unwrap();
            let looked = rig.memory.with_guest_pages(&rig.machine, &guest, frames(block - PAGE, 513), &mut |_| ());
            assert_eq!(looked, Ok(1));
            let change = if dying { Reclaim } else { Relinquish };
            if dying {
                guest.kill();
            }
            assert_eq!(rig.change(change, &guest, block - PAGE, 513), Ok(1));
            assert_eq!(rig.change(change, &guest, block, 512), Ok(512));
            assert!(guest.is_empty());
            rig.destroy(guest, frames(RAM, 1024));
        });
    }
}

#[test]
fn a_reclaim_without_tables_changes_neither_half_of_a_realm() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Realm, 4);
        rig.give(&guest, GIB, 2, RAM - 2 * PAGE).unwrap();
        rig.give(&guest, GIB + 2 * MIB, 512, RAM).unwrap();
        assert_eq!(rig.change(GuestShare, &guest, RAM, 512), Ok(512));
        rig.give(&guest, GIB + 4 * MIB, 512, RAM + 2 * MIB).unwrap();
        assert_eq!(guest.lock(&rig.machine).spare.available, 0);
        guest.kill();
        let before = rig.everything();
        // Of the two pages one, so that their table stays; of the block one.
        let part = (RAM - PAGE, 2);
        assert_eq!(rig.change(Reclaim, &guest, part.0, part.1), refused(GuestReason::NeedsTables(1), part.0));
        assert!(rig.everything() == before, "a refused reclaim changed something");
        rig.add_tables(&guest, 6, 1);
        assert_eq!(rig.change(Reclaim, &guest, part.0, part.1), Ok(2));
        rig.check_guest(&guest);
        rig.destroy(guest, frames(RAM - 2 * PAGE, 2048));
    });
}

#[test]
fn poison_of_many_blocks_is_dropped_in_several_calls() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        rig.memory.add_guest_tables(&rig.machine, &guest, range(GIB + 4 * MIB, 512)).unwrap();
        rig.memory.add_guest_tables(&rig.machine, &guest, range(GIB + 6 * MIB, 100)).unwrap();
        // A page in each, and the last of the address space; and a whole one.
        let blocks = 600;
        let last = (1 << 40) - PAGE;
        for at in (0..blocks).map(|block| RAM + block * 2 * MIB + block % 512 * PAGE).chain([last]) {
            let at = Ipa::new(at).unwrap();
            rig.memory.give(&rig.machine, &guest, range(GIB, 1), at, Gift::Donated).unwrap();
            rig.memory.force_reclaim(&rig.machine, &guest, range(GIB, 1)).unwrap();
        }
        rig.give(&guest, GIB + 2 * MIB, 512, RAM + 4 * GIB).unwrap();
        rig.force(&guest, GIB + 2 * MIB, 512).unwrap();
        guest.kill();
        let release = || rig.memory.release_guest_tables(&rig.machine, &guest, 8);
        let all = guest.table_pages();
        let _ = rig.machine.take_log();
        assert_eq!(release(), Ok(all - 8));
        assert!(invalidations(&rig.machine.take_log()).len() <= 2, "one of the guest's stage 2, one of EL2");
        rig.check_guest(&guest);
        let in_use = guest.lock(&rig.machine).spare.in_use;
        assert!((80..120).contains(&in_use), "{in_use}");
        assert_eq!(release(), Ok(all - 16));
        assert_eq!(guest.lock(&rig.machine).spare.in_use, 0);
        rig.destroy(guest, frames(RAM, 1));
    });
}
