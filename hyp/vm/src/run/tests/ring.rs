//! Rings: what the guest posts, what the host is told, and what comes of it.

use ravelin_abi::{ConversionRequest, RING_DONE, RING_ENTRIES, RING_POSTED, RING_RESULTS};

use super::*;

const MEM_RING: u64 = 0xc600_0038;
const MEM_RING_SYNC: u64 = 0xc600_0039;

/// Address of the ring for EL2, and for the guest.
const RING: u64 = PAYLOAD;
const RING_PAGE: u64 = GUEST;

const ATTACH: [u64; 4] = [MEM_RING, RING_PAGE, 1, 0];
const DETACH: [u64; 4] = [MEM_RING, RING_PAGE, 0, 0];

fn page(index: u64) -> u64 {
    GUEST + index * PAGE_SIZE
}

fn word(index: u64, pages: u64, unshare: bool) -> u64 {
    ConversionRequest { address: page(index), pages, unshare }.word()
}

fn share(index: u64) -> u64 {
    word(index, 1, false)
}

fn unshare(index: u64) -> u64 {
    word(index, 1, true)
}

impl World {
    /// Returns a world whose vCPU 0 has a ring.
    fn with_ring() -> Self {
        let world = Self::new(VmKind::Pkvm);
        world.then(|guest| call(guest, Conduit::Hvc, ATTACH));
        assert_eq!(world.goes_on().x[..4], [0; 4]);
        world
    }

    fn ring_word(&self, offset: usize, number: u64) -> u64 {
        let at = offset + (number % 64) as usize * 8;
        u64::from_le_bytes(self.cpu.page(RING)[at..][..8].try_into().unwrap())
    }

    fn set_ring_word(&self, offset: usize, number: u64, word: u64) {
        self.cpu.set_page(RING + offset as u64 + number % 64 * 8, &word.to_le_bytes());
    }

    /// Posts behind what has been posted.
    fn post(&self, words: &[u64]) {
        let mut posted = self.ring_word(RING_POSTED, 0);
        for &word in words {
            self.set_ring_word(RING_ENTRIES, posted, word);
            self.set_ring_word(RING_RESULTS, posted, 77);
            posted += 1;
        }
        self.set_ring_word(RING_POSTED, 0, posted);
    }

    /// Runs the guest until it loads from a device, and returns what the host finds in its list.
    fn kick(&self) -> Vec<u64> {
        let told = self.does(|_| load(DEVICE, 5));
        assert_eq!(told.reason, ExitReason::Mmio.code());
        self.listed(told)
    }

    fn listed(&self, told: RunExit) -> Vec<u64> {
        let page = self.cpu.page(run_page(0));
        let word = |index| u64::from_le_bytes(page[RunPage::CONVERSIONS + index * 8..][..8].try_into().unwrap());
        (0..told.conversions as usize).map(word).collect()
    }

    /// Has the guest run on, with the load done, and the host's consent.
    fn consent(&self, released: u64) {
        let entry = RunEntry { answer: Answer::Complete.code(), released, ..RunEntry::default() };
        self.cpu.set_page(run_page(0) + RunPage::ENTRY as u64, &entry.to_bytes());
        self.goes_on();
    }

    fn results(&self, first: u64, count: u64) -> Vec<u64> {
        (first..first + count).map(|number| self.ring_word(RING_RESULTS, number)).collect()
    }

    fn states(&self) -> [GuestPage; 3] {
        [1, 2, 3].map(|index| self.look(page(index)))
    }
}

#[test]
fn what_was_posted_is_done_when_the_host_is_told() {
    use GuestPage::{Offered, Private};
    let world = World::with_ring();
    world.post(&[share(1), word(2, 2, false)]);
    assert_eq!(world.states(), [Private; 3]);
    assert_eq!(world.kick(), [share(1), word(2, 2, false)]);
    assert_eq!(world.states(), [Offered; 3]);
    assert_eq!((world.ring_word(RING_DONE, 0), world.results(0, 2)), (2, vec![0, 0]));
    world.consent(0);
    // What the host has not claimed is taken back without it.
    world.post(&[unshare(2)]);
    assert_eq!(world.kick(), []);
    assert_eq!(world.states(), [Offered, Private, Offered]);
    assert_eq!((world.ring_word(RING_DONE, 0), world.results(2, 1)), (3, vec![0]));
    world.consent(u64::MAX);
    assert_eq!(world.states(), [Offered, Private, Offered]);
    // Nothing is left to tell.
    assert_eq!(world.kick(), []);
}

#[test]
fn claimed_pages_wait_for_the_host() {
    use GuestPage::{Claimed, Offered, Private};
    let world = World::with_ring();
    (1..4).for_each(|index| world.share(page(index)));
    (1..4).for_each(|index| world.claim(page(index)));
    world.post(&[unshare(1), unshare(2), share(1), unshare(3)]);
    assert_eq!(world.kick(), [unshare(1), unshare(2), unshare(3)]);
    assert_eq!(world.states(), [Claimed; 3]);
    // The first that waits holds up those behind it.
    assert_eq!(world.ring_word(RING_DONE, 0), 0);
    // The host gives up the first, releases the second by itself, and keeps the third.
    world.vms.release(&world.memory, world.handle, single(page(2))).unwrap();
    // Another vCPU meddles.
    world.set_ring_word(RING_ENTRIES, 0, unshare(3));
    world.consent(0b001);
    assert_eq!(world.states(), [Private, Private, Claimed]);
    let results = vec![0, 0, INVALID_PARAMETER, INVALID_PARAMETER];
    assert_eq!((world.ring_word(RING_DONE, 0), world.results(0, 4)), (4, results));
    // Once more.
    world.post(&[unshare(3)]);
    assert_eq!(world.kick(), [unshare(3)]);
    world.consent(0b110);
    assert_eq!(world.states(), [Private, Private, Claimed]);
    world.post(&[unshare(3), share(2)]);
    assert_eq!(world.kick(), [unshare(3), share(2)]);
    assert_eq!(world.states(), [Private, Offered, Claimed]);
    world.consent(1);
    assert_eq!(world.states(), [Private, Offered, Private]);
    assert_eq!(world.ring_word(RING_DONE, 0), 7);
}

#[test]
fn an_answer_that_is_refused_ends_nothing() {
    let world = World::with_ring();
    world.share(page(1));
    world.claim(page(1));
    world.post(&[unshare(1)]);
    assert_eq!(world.kick(), [unshare(1)]);
    world.answer(Answer::Refuse.code(), 0);
    assert_eq!(world.run(0), Err(Status::Invalid));
    assert_eq!((world.look(page(1)), world.ring_word(RING_DONE, 0)), (GuestPage::Claimed, 0));
    world.consent(1);
    assert_eq!((world.look(page(1)), world.ring_word(RING_DONE, 0)), (GuestPage::Private, 1));
}

#[test]
fn what_makes_no_sense_is_refused_one_by_one() {
    let world = World::with_ring();
    let far = ConversionRequest { address: 1 << 40, pages: 1, unshare: false }.word();
    let bad = [
        share(1) | 1 << 10,
        share(1) | 1 << 11,
        far,
        u64::MAX,
        // The ring itself, what is not there, what is not shared.
        share(0),
        word(3, 2, false),
        unshare(1),
    ];
    world.post(&bad);
    assert_eq!(world.kick(), []);
    assert_eq!(world.ring_word(RING_DONE, 0), bad.len() as u64);
    assert_eq!(world.results(0, bad.len() as u64), [INVALID_PARAMETER; 7]);
    assert_eq!(world.states(), [GuestPage::Private; 3]);
}

#[test]
fn a_number_that_cannot_be_does_nothing() {
    let world = World::with_ring();
    world.post(&[share(1)]);
    for posted in [65, u64::MAX, 1 << 63] {
        world.set_ring_word(RING_POSTED, 0, posted);
        assert_eq!(world.kick(), []);
        world.consent(0);
        assert_eq!((world.look(page(1)), world.ring_word(RING_DONE, 0)), (GuestPage::Private, 0));
    }
    world.set_ring_word(RING_POSTED, 0, 1);
    assert_eq!(world.kick(), [share(1)]);
}

#[test]
fn numbers_go_round() {
    let world = World::with_ring();
    let mut done = 0;
    for count in [63, 64, 1, 2, 64, 64, 5] {
        let words: Vec<_> = (0..count).map(|index| if index % 2 == 0 { share(1) } else { unshare(1) }).collect();
        world.post(&words);
        assert_eq!(world.kick(), vec![share(1); words.len().div_ceil(2)]);
        assert_eq!(world.results(done, count), vec![0; words.len()]);
        done += count;
        assert_eq!(world.ring_word(RING_DONE, 0), done);
        world.consent(0);
        if count % 2 != 0 {
            world.post(&[unshare(1)]);
            assert_eq!(world.kick(), []);
            world.consent(0);
            done += 1;
        }
    }
    // What is done cannot be taken back.
    world.set_ring_word(RING_POSTED, 0, done - 1);
    assert_eq!(world.kick(), []);
    assert_eq!(world.ring_word(RING_DONE, 0), done);
}

#[test]
fn a_batch_that_is_too_long_goes_on_at_the_next_exit() {
    let world = World::with_ring();
    // What is not there counts as if it had been looked at.
    world.post(&[word(1, 300, false), word(1, 300, false), share(1)]);
    assert_eq!(world.kick(), []);
    assert_eq!(world.ring_word(RING_DONE, 0), 1);
    world.answer(Answer::Complete.code(), 0);
    assert_eq!(world.run(0), Ok(RunExit { conversions: 1, ..exit(ExitReason::Interrupted) }));
    assert_eq!(world.ring_word(RING_DONE, 0), 3);
    assert_eq!(world.look(page(1)), GuestPage::Offered);
}

#[test]
fn a_guest_need_not_wait_for_an_exit() {
    let world = World::with_ring();
    let sync = |guest: &mut Context| call(guest, Conduit::Hvc, [MEM_RING_SYNC, 0, 0, 0]);
    world.then(sync);
    assert_eq!(world.goes_on().x[..4], [0; 4], "nothing is posted");
    world.post(&[share(1)]);
    let told = world.does(sync);
    assert_eq!(told, RunExit { conversions: 1, ..exit(ExitReason::Converted) });
    assert_eq!(world.listed(told), [share(1)]);
    world.answer(9, 0); // It does not matter.
    let next = world.goes_on();
    assert_eq!((&next.x[..4], next.pc), (&[0; 4][..], GUEST + 12));
    // Nothing that the host has to know.
    world.post(&[unshare(1)]);
    world.then(sync);
    assert_eq!(world.goes_on().x[..4], [0; 4]);
    assert_eq!((world.look(page(1)), world.ring_word(RING_DONE, 0)), (GuestPage::Private, 2));
}

#[test]
fn a_host_need_not_be_told_of_shares() {
    let world = World::with_ring();
    let quiet = |flags| {
        let entry = RunEntry { answer: Answer::Complete.code(), flags, ..RunEntry::default() };
        world.cpu.set_page(run_page(0) + RunPage::ENTRY as u64, &entry.to_bytes());
    };
    quiet(1);
    world.then(|guest| call(guest, Conduit::Hvc, [MEM_SHARE, page(1), 0, 0]));
    assert_eq!(world.goes_on().x[..4], [0; 4]);
    world.post(&[share(2)]);
    assert_eq!(world.kick(), []);
    assert_eq!(world.states(), [GuestPage::Offered, GuestPage::Offered, GuestPage::Private]);
    // What it has claimed it is asked for all the same.
    world.claim(page(2));
    world.post(&[unshare(2)]);
    quiet(1);
    assert_eq!(world.kick(), [unshare(2)]);
    // Other bits do not matter.
    quiet(!1);
    let told = world.does(|guest| call(guest, Conduit::Hvc, [MEM_SHARE, page(3), 0, 0]));
    assert_eq!(told, RunExit { address: page(3), pages: 1, ..exit(ExitReason::Shared) });
}

#[test]
fn one_ring_for_each_vcpu() {
    let refused = [INVALID_PARAMETER, 0, 0, 0];
    let world = World::with_ring();
    let pinned = Owner::Guest { slot: 0, frame: GUEST >> 12, state: GuestState::Pinned };
    let result = |registers: [u64; 4]| {
        world.then(move |guest| call(guest, Conduit::Hvc, registers));
        world.goes_on().x[..4].to_vec()
    };
    assert_eq!(world.memory.owner_of(RING), pinned);
    for registers in [
        ATTACH,
        [MEM_RING, page(1), 1, 0],
        [MEM_RING, page(1), 0, 0],
        [MEM_RING, RING_PAGE, 2, 0],
        [MEM_RING, RING_PAGE, 0, 1],
        [MEM_RING, RING_PAGE + 1, 0, 0],
        [MEM_RING, u64::MAX, 0, 0],
        [MEM_RING_SYNC, 1, 0, 0],
        [MEM_RING_SYNC, 0, 1, 0],
        [MEM_RING_SYNC, 0, 0, 1],
    ] {
        assert_eq!(result(registers), refused, "{registers:#x?}");
        assert_eq!(world.memory.owner_of(RING), pinned);
    }
    assert_eq!(result(DETACH), [0; 4]);
    assert_eq!(world.look(RING_PAGE), GuestPage::Private);
    assert_eq!(result(DETACH), refused);
    // Nothing happens without a ring.
    world.post(&[share(1)]);
    assert_eq!(result([MEM_RING_SYNC, 0, 0, 0]), [0; 4]);
    assert_eq!(world.look(page(1)), GuestPage::Private);
    world.share(page(1));
    assert_eq!(result([MEM_RING, page(1), 1, 0]), refused);
    // Where no page is yet, the host may put one.
    let told = world.does(|guest| call(guest, Conduit::Hvc, [MEM_RING, ABSENT, 1, 0]));
    assert_eq!(told, RunExit { address: ABSENT, ..exit(ExitReason::PageFault) });
    world.provide();
    world.then(|guest| call(guest, Conduit::Hvc, [MEM_RING, ABSENT, 1, 0]));
    assert_eq!(world.goes_on().x[..4], [0; 4]);
}

#[test]
fn a_vcpu_that_starts_anew_has_no_ring() {
    let world = World::with_ring();
    world.share(page(1));
    world.claim(page(1));
    world.post(&[unshare(1)]);
    let told = world.does(|guest| call(guest, Conduit::Hvc, [CPU_OFF, 0, 0, 0]));
    assert_eq!(told, RunExit { conversions: 1, ..exit(ExitReason::CpuOff) });
    // It is turned on by another one, which was on before.
    let power = |world: &World| world.vms.run(world.handle, 1, |vm, _| Ok(vm.power(0).unwrap().is_on())).unwrap();
    assert!(!power(&world));
    world.vms.run(world.handle, 1, |vm, _| Ok(vm.power(0).unwrap().turn_on(GUEST, 5))).unwrap().unwrap();
    world.goes_on();
    assert_eq!(world.look(RING_PAGE), GuestPage::Private);
    assert_eq!(world.memory.owner_of(RING), Owner::Guest { slot: 0, frame: GUEST >> 12, state: GuestState::Private });
    assert_eq!(world.look(page(1)), GuestPage::Claimed);
    world.cpu.calls();
}
