//! Random operations of a host and two guests, most of them hostile, against a model of one record per page and per frame.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
};

use proptest::{collection::vec, prelude::*};

use super::{
    guests::{CHANGES, Change, Outcome, RAM, frames},
    *,
};
use crate::{Gift, GuestKind, GuestMemory, GuestPage, GuestReason, HostFailure, MAX_STEPS};

/// Who has a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Host { shared: bool, pins: u64 },
    Hypervisor { donated: bool },
    Guest { guest: usize, frame: u64, state: GuestPage },
}

const FREE: Page = Page::Host { shared: false, pins: 0 };

struct Model {
    kinds: [GuestKind; 2],
    pages: BTreeMap<u64, Page>,
    /// Where frames have their pages.
    frames: BTreeMap<(usize, u64), u64>,
    poison: BTreeSet<(usize, u64)>,
    contents: BTreeMap<u64, u64>,
}

impl Model {
    fn find(&self, guest: usize, frame: u64) -> Option<(u64, GuestPage)> {
        let page = *self.frames.get(&(guest, frame))?;
        match self.pages[&page] {
            Page::Guest { state, .. } => Some((page, state)),
            other => panic!("{other:?} in a frame"),
        }
    }

    fn at(&self, guest: usize, frame: u64) -> GuestPage {
        match self.find(guest, frame) {
            Some((_, state)) => state,
            None if self.poison.contains(&(guest, frame)) => GuestPage::Poisoned,
            None => GuestPage::Absent,
        }
    }

    fn host_may(&self, page: u64) -> bool {
        match self.pages.get(&page) {
            Some(Page::Host { .. }) => true,
            Some(Page::Guest { state, .. }) => matches!(state, GuestPage::Claimed | GuestPage::Lent),
            Some(Page::Hypervisor { .. }) => false,
            // Devices.
            None => true,
        }
    }

    fn host_call(&mut self, call: Call, range: PhysRange) -> Result<(), Failure> {
        use Page::{Host, Hypervisor};
        let mut after = Vec::new();
        for page in range.iter() {
            let fail = |reason| Err(Failure { reason, page });
            let next = match (call, self.pages.get(&page.raw()).copied()) {
                (_, None) => return fail(Reason::NotRam),
                (Share, Some(Host { shared: false, pins })) => Host { shared: true, pins },
                (Unshare, Some(Host { shared: true, pins: 0 })) => FREE,
                (Unshare, Some(Host { shared: true, .. })) => return fail(Reason::Busy),
                (Donate, Some(FREE)) => Hypervisor { donated: true },
                (TakeBack, Some(Hypervisor { donated: true })) => FREE,
                (Pin, Some(Host { shared: true, pins })) => Host { shared: true, pins: pins + 1 },
                (Unpin, Some(Host { shared: true, pins: pins @ 1.. })) => Host { shared: true, pins: pins - 1 },
                _ => return fail(Reason::Denied),
            };
            after.push((page.raw(), next));
        }
        if call == TakeBack {
            self.contents.retain(|&page, _| !range.contains(addr(page)));
        }
        self.pages.extend(after);
        Ok(())
    }

    fn give(&mut self, guest: usize, range: PhysRange, at: u64) -> Result<(), HostFailure> {
        let fail = |reason, page| Err(HostFailure { reason, page });
        for page in range.iter() {
            match self.pages.get(&page.raw()) {
                None => return fail(GuestReason::NotRam, page),
                Some(&FREE) => {}
                Some(_) => return fail(GuestReason::Denied, page),
            }
        }
        let frame = |page: PhysAddr| at + page.raw() - range.base().raw();
        for page in range.iter() {
            match self.at(guest, frame(page)) {
                GuestPage::Absent => {}
                GuestPage::Poisoned => return fail(GuestReason::Poisoned, page),
                _ => return fail(GuestReason::Exists, page),
            }
        }
        self.frames.extend(range.iter().map(|page| ((guest, frame(page)), page.raw())));
        let state = if self.kinds[guest] == GuestKind::Ordinary { GuestPage::Lent } else { GuestPage::Private };
        self.pages.extend(range.iter().map(|page| (page.raw(), Page::Guest { guest, frame: frame(page), state })));
        Ok(())
    }

    /// What `change` does to one frame: the state after, or `None` for a page that becomes the host's.
    fn next(change: Change, state: GuestPage) -> Result<Option<GuestPage>, GuestReason> {
        use GuestPage::{Absent, Claimed, Lent, Offered, Poisoned, Private};
        match (change, state) {
            (_, Absent) => Err(GuestReason::Absent),
            (Change::Relinquish, Poisoned) => Ok(None),
            (_, Poisoned) => Err(GuestReason::Poisoned),
            (Change::Share, Private) | (Change::Release, Claimed) => Ok(Some(Offered)),
            (Change::Unshare, Offered | Claimed) => Ok(Some(Private)),
            (Change::Claim, Offered) => Ok(Some(Claimed)),
            (Change::Claim, Private) => Err(GuestReason::NotOffered),
            (Change::Relinquish, Private) | (Change::Unlend, Lent) => Ok(None),
            _ => Err(GuestReason::Denied),
        }
    }

    /// Applies `change` to the first frames of a range, as many as the call did.
    fn change(&mut self, change: Change, guest: usize, at: u64, pages: u64) -> Result<(), (Option<GuestReason>, u64)> {
        let mut claimed = false;
        for frame in (0..pages).map(|page| at + page * PAGE) {
            let state = self.at(guest, frame);
            Self::next(change, state).map_err(|reason| (Some(reason), frame))?;
            claimed |= state == GuestPage::Claimed;
        }
        if change == Change::Unshare && claimed {
            return Err((None, at));
        }
        for frame in (0..pages).map(|page| at + page * PAGE) {
            if self.poison.remove(&(guest, frame)) {
                continue;
            }
            let (page, state) = self.find(guest, frame).unwrap();
            let next = Self::next(change, state).unwrap();
            self.pages.insert(page, next.map_or(FREE, |state| Page::Guest { guest, frame, state }));
            if next.is_none() {
                self.frames.remove(&(guest, frame));
            }
            if change == Change::Relinquish {
                self.contents.remove(&page);
            }
        }
        Ok(())
    }

    fn force(&mut self, guest: usize, range: PhysRange) -> Result<(), HostFailure> {
        let mut taken = Vec::new();
        for page in range.iter() {
            match self.pages.get(&page.raw()) {
                None => return Err(HostFailure { reason: GuestReason::NotRam, page }),
                Some(&Page::Guest { guest: its, frame, state: GuestPage::Private | GuestPage::Offered })
                    if its == guest =>
                {
                    taken.push((page.raw(), frame));
                }
                Some(_) => return Err(HostFailure { reason: GuestReason::Denied, page }),
            }
        }
        for (page, frame) in taken {
            self.pages.insert(page, FREE);
            self.frames.remove(&(guest, frame));
            self.contents.remove(&page);
            self.poison.insert((guest, frame));
        }
        Ok(())
    }

    fn die(&mut self, guest: usize) {
        for (page, owner) in &mut self.pages {
            match *owner {
                Page::Guest { guest: its, state, .. } if its == guest => {
                    if state == GuestPage::Private {
                        self.contents.remove(page);
                    }
                    *owner = FREE;
                }
                _ => {}
            }
        }
        self.frames.retain(|&(its, _), _| its != guest);
        self.poison.retain(|&(its, _)| its != guest);
    }
}

#[derive(Clone, Debug)]
enum Action {
    Host(Call, u64, u64),
    Give(usize, u64, u64, u64),
    Change(Change, usize, u64, u64),
    Force(usize, u64, u64),
    Touch(u64),
}

/// Pages of the host that are worth fighting for: two whole blocks and the end of the RAM that is not metadata.
fn page() -> impl Strategy<Value = u64> {
    let near = prop_oneof![4 => Just(GIB), 3 => Just(GIB + 2 * MIB), 1 => Just(GIB + 32 * MIB - 3 * PAGE)];
    let offset = prop_oneof![4 => Just(0), 3 => 0..8_u64, 1 => 505..515_u64];
    (near, offset).prop_map(|(near, offset)| near + offset * PAGE)
}

fn frame() -> impl Strategy<Value = u64> {
    let near = prop_oneof![4 => Just(RAM), 3 => Just(RAM + 2 * MIB), 1 => Just(RAM + GIB)];
    let offset = prop_oneof![4 => Just(0), 3 => 0..8_u64, 1 => 505..515_u64];
    (near, offset).prop_map(|(near, offset)| near + offset * PAGE)
}

fn action() -> impl Strategy<Value = Action> {
    let length = || prop_oneof![5 => 1..6_u64, 3 => Just(512), 1 => 505..513_u64, 1 => Just(1024)];
    let changes = prop::sample::select(CHANGES[..6].to_vec());
    prop_oneof![
        2 => (prop::sample::select(&CALLS[..]), page(), length()).prop_map(|(call, at, pages)| Action::Host(call, at, pages)),
        3 => (0..2_usize, page(), length(), frame()).prop_map(|(guest, page, pages, at)| Action::Give(guest, page, pages, at)),
        8 => (changes, 0..2_usize, frame(), length()).prop_map(|(change, guest, at, pages)| Action::Change(change, guest, at, pages)),
        2 => (0..2_usize, page(), length()).prop_map(|(guest, page, pages)| Action::Force(guest, page, pages)),
        2 => page().prop_map(Action::Touch),
    ]
}

/// Checks the outcome of a change against the model, and has the model make it.
fn check_change(model: &mut Model, change: Change, guest: usize, at: u64, pages: u64, outcome: Outcome) {
    match outcome {
        Ok(done) => {
            // What is given up counts by the page, and a block that does not fit is left for the next call.
            let least = if change == Change::Relinquish { 1 } else { MAX_STEPS / 8 };
            assert!(done == pages || (least..pages).contains(&done), "{done} of {pages}");
            assert_eq!(model.change(change, guest, at, done), Ok(()), "{change:?} {at:#x} {done}");
        }
        Err((Some(GuestReason::TooLarge), _)) => assert!(pages > MAX_STEPS),
        Err(failure) => {
            // Only what the call has come to can be in the way.
            assert_eq!(model.change(change, guest, at, pages), Err(failure), "{change:?} {at:#x} {pages}");
        }
    }
}

fn run(kinds: [GuestKind; 2], actions: Vec<Action>) {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let fresh = rig.counts().pages();
    let pages = layout.ram.iter().flat_map(|range| range.iter()).map(|page| {
        let donated = (GIB + 20 * MIB..GIB + 22 * MIB).contains(&page.raw());
        let kept = donated || layout.carve_out.contains(page);
        (page.raw(), if kept { Page::Hypervisor { donated: false } } else { FREE })
    });
    let mut model = Model {
        kinds,
        pages: pages.collect(),
        frames: BTreeMap::new(),
        poison: BTreeSet::new(),
        contents: BTreeMap::new(),
    };
    let guests: [GuestMemory; 2] = [0, 1].map(|slot| rig.guest(slot, kinds[usize::from(slot)], 40));
    // The rest of what is called metadata there stays out of the game.
    let spare = |slot: u64| range(GIB + 20 * MIB + slot * MIB + 42 * PAGE, 256 - 42);
    [0, 1].into_iter().for_each(|slot| rig.memory.keep(&rig.machine, spare(slot)).unwrap());
    for action in actions {
        let before = rig.everything();
        let _ = rig.machine.take_log();
        let failed = match action {
            Action::Host(call, at, pages) => {
                let result = rig.call(call, range(at, pages));
                assert_eq!(result, model.host_call(call, range(at, pages)));
                result.is_err()
            }
            Action::Give(guest, page, pages, at) => {
                let result = rig.give(&guests[guest], page, pages, at);
                if matches!(result, Err(HostFailure { reason: GuestReason::TooLarge, .. })) {
                    assert!(pages > MAX_STEPS);
                } else {
                    assert_eq!(result, model.give(guest, range(page, pages), at), "{page:#x} {pages} {at:#x}");
                }
                result.is_err()
            }
            Action::Change(change, guest, at, pages) => {
                let outcome = rig.change(change, &guests[guest], at, pages);
                let flushed = invalidations(&rig.machine.take_log());
                let free = match change {
                    Change::Share | Change::Unshare => kinds[guest] != GuestKind::Realm,
                    _ => change == Change::Claim,
                };
                assert!(flushed.is_empty() || !free, "{change:?}: {flushed:?}");
                // At most one of the host's stage 2, of the guest's and of EL2.
                let whose = |op: &Op| match *op {
                    Op::InvalidateStage2(vmid, ..) | Op::InvalidateStage2All(vmid) => Some(vmid),
                    _ => None,
                };
                assert_eq!(flushed.iter().map(whose).collect::<BTreeSet<_>>().len(), flushed.len(), "{flushed:?}");
                check_change(&mut model, change, guest, at, pages, outcome);
                outcome.is_err()
            }
            Action::Force(guest, page, pages) => {
                let result = rig.force(&guests[guest], page, pages);
                if pages <= MAX_STEPS {
                    assert_eq!(result, model.force(guest, range(page, pages)));
                } else {
                    assert_eq!(result.map_err(|failure| failure.reason), Err(GuestReason::TooLarge));
                }
                result.is_err()
            }
            Action::Touch(page) => {
                let may = model.host_may(page);
                assert_eq!(rig.touch(page) == HostFault::Resolved, may, "{page:#x}");
                if may {
                    rig.machine.poke(addr(page), page);
                    model.contents.insert(page, page);
                }
                false
            }
        };
        assert!(!failed || rig.everything() == before, "a refused operation changed something");
        compare(&rig, &model, &guests);
    }
    for (index, guest) in guests.into_iter().enumerate() {
        rig.memory.give_back(&rig.machine, spare(index as u64)).unwrap();
        model.die(index);
        rig.destroy(guest, frames(RAM, 1 << 19));
    }
    let owned = |pages: [u64; 9]| pages.iter().sum::<u64>();
    assert_eq!(owned(rig.counts().pages()), owned(fresh));
    for (&page, &contents) in &model.contents {
        assert_eq!(rig.machine.peek(addr(page)), contents, "{page:#x}");
    }
}

fn compare(rig: &Rig<'_>, model: &Model, guests: &[GuestMemory; 2]) {
    guests.iter().for_each(|guest| rig.check_guest(guest));
    let near = |page: &u64| matches!(page / PAGE % 512, 0..16 | 500..) || (page / PAGE).is_multiple_of(61);
    for page in (0..1040).map(|page| GIB + page * PAGE).filter(near) {
        let expected = match model.pages[&page] {
            Page::Guest { guest, frame, .. } => Some((guests[guest].slot(), Ipa::new(frame).unwrap())),
            _ => None,
        };
        assert_eq!(rig.memory.page_owner(addr(page)), expected, "{page:#x}");
        assert!(!rig.host_reaches(page) || model.host_may(page), "{page:#x}");
        assert_eq!(rig.machine.peek(addr(page)), model.contents.get(&page).copied().unwrap_or(0), "{page:#x}");
    }
    let frame = |(_, owner): (&u64, &Page)| match *owner {
        Page::Guest { guest, frame, .. } => Some((guest, frame)),
        _ => None,
    };
    let known = model.pages.iter().filter_map(frame).chain(model.poison.iter().copied());
    let absent = (0..8).flat_map(|page| [(0, RAM + page * PAGE), (1, RAM + page * PAGE)]);
    for (index, frame) in known.filter(|(_, frame)| near(frame)).chain(absent) {
        let (guest, state) = (&guests[index], model.at(index, frame));
        assert_eq!(rig.at(guest, frame), state, "{frame:#x}");
        let page = model.find(index, frame).map(|(page, _)| page);
        let shared = matches!(state, GuestPage::Offered | GuestPage::Claimed);
        let moved = guest.kind() == GuestKind::Realm && shared;
        assert_eq!(rig.guest_reaches(guest, frame), page.filter(|_| !moved), "{frame:#x}");
        if guest.kind() == GuestKind::Realm {
            assert_eq!(rig.guest_reaches(guest, frame | 1 << 39), page.filter(|_| moved), "{frame:#x}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 24 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn guests_follow_the_model(
        actions in vec(action(), 1..if cfg!(miri) { 4 } else { 50 }),
        kinds in prop::sample::select(vec![
            [GuestKind::Pkvm, GuestKind::Pkvm],
            [GuestKind::Pkvm, GuestKind::Realm],
            [GuestKind::Realm, GuestKind::Ordinary],
        ]),
    ) {
        run(kinds, actions);
    }
}

/// A pseudo-random sequence (xorshift), the same in each run.
fn below(state: &mut u64, bound: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % bound
}

#[test]
fn cpus_work_on_two_guests_at_the_same_time() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let guests = [rig.guest(0, GuestKind::Pkvm, 40), rig.guest(1, GuestKind::Realm, 40)];
    let rounds = if cfg!(miri) { 6 } else { 300 };
    let succeeded: u64 = thread::scope(|scope| {
        let hammer = |seed: u64| {
            let (rig, guests) = (&rig, &guests);
            move || {
                let (memory, machine, mut random, mut succeeded) = (&rig.memory, &rig.machine, seed, 0);
                for _ in 0..rounds {
                    let guest = &guests[usize::try_from(below(&mut random, 2)).unwrap()];
                    let page = GIB + below(&mut random, 520) * PAGE;
                    let pages = [1, 1, 4, 512][usize::try_from(below(&mut random, 4)).unwrap()];
                    let at = RAM + below(&mut random, 8) * PAGE;
                    let range = range(page, pages);
                    let done = match below(&mut random, 10) {
                        0..=2 => memory.give(machine, guest, range, Ipa::new(at).unwrap(), Gift::Donated).is_ok(),
                        3 => memory.guest_share(machine, guest, frames(at, pages)).is_ok(),
                        4 => memory.claim(machine, guest, frames(at, pages)).is_ok(),
                        5 => memory.release(machine, guest, frames(at, pages)).is_ok(),
                        6 => memory.guest_unshare(machine, guest, frames(at, pages)).is_ok(),
                        7 => memory.guest_relinquish(machine, guest, frames(at, pages)).is_ok(),
                        8 if below(&mut random, 8) == 0 => memory.force_reclaim(machine, guest, range).is_ok(),
                        _ => memory.host_fault(machine, Ipa::new(page).unwrap()) == HostFault::Resolved,
                    };
                    succeeded += u64::from(done);
                }
                succeeded
            }
        };
        let cpus: Vec<_> = (1..5).map(|cpu| scope.spawn(hammer(cpu * 0x0e37_79b9_7f4a_7c15))).collect();
        cpus.into_iter().map(|cpu| cpu.join().unwrap()).sum()
    });
    assert!(succeeded > rounds / 4, "only {succeeded} operations succeeded");
    for guest in guests {
        rig.check_guest(&guest);
        rig.destroy(guest, frames(RAM, 1 << 19));
    }
    assert_eq!(rig.counts().guest_owned + rig.counts().hyp_kept, 0);
}
