//! The check finds what it is there for: each test makes entries, tables or counts contradict each other.

use ravelin_memory::Level;
use ravelin_pgtable::{Found, Mapping};

use super::{
    guests::{Change, RAM, frames, with_rig},
    *,
};
use crate::{
    Gift, GuestKind, GuestMemory, Inconsistency,
    entry::{Block, Entry, State},
    guest::Guest,
    pool::Pool,
};

/// Gives pages another entry in the ownership table and in the counts, and nowhere else.
fn pretend(rig: &Rig<'_>, page: u64, pages: u64, entry: Entry) {
    rig.with_region(page, |region, _| {
        for page in range(page, pages).iter() {
            let old = region.table.entry(page).unwrap();
            region.counts.moved(old.state(), entry.state(), 1);
        }
        region.table.assign(range(page, pages), entry, &mut |_, _| (), &mut |_| ());
    });
}

fn host_maps(rig: &Rig<'_>, from: u64, pages: u64, to: u64, usage: Stage2Usage) {
    rig.with_region(from, |region, tables| {
        region.host.map(&rig.machine, tables, range(from, pages).identity_ipa(), addr(to), usage).unwrap();
    });
}

fn el2_maps(rig: &Rig<'_>, from: u64, pages: u64, to: u64, usage: El2Usage) {
    rig.with_region(from, |region, tables| {
        region.el2.map(&rig.machine, tables, range(from, pages).identity_va(), addr(to), usage).unwrap();
    });
}

/// Makes a contradiction and looks at what the check says of it.
fn finds(expected: Inconsistency, contradict: impl FnOnce(&Rig<'_>)) {
    with_rig(|rig| {
        contradict(rig);
        assert_eq!(rig.memory.check(&rig.machine), Err(expected));
    });
}

#[test]
fn a_wrong_count() {
    with_rig(|rig| {
        for &state in &State::ALL[1..] {
            rig.with_region(GIB, |region, _| region.counts.moved(State::NOBODY, state, 1));
            assert_eq!(rig.memory.check(&rig.machine), Err(Inconsistency::Counts), "{state:?}");
            rig.with_region(GIB, |region, _| region.counts.moved(state, State::NOBODY, 1));
            rig.check();
        }
    });
}

#[test]
fn a_wrong_number_of_pages_in_a_block() {
    with_rig(|rig| {
        rig.call(Share, range(GIB, 1)).unwrap();
        for (owned, expected) in
            [(510, Err(Inconsistency::Block(addr(GIB)))), (512, Err(Inconsistency::Block(addr(GIB)))), (511, Ok(()))]
        {
            rig.with_region(GIB, |region, _| region.table.set_block(0, Block::split(owned)));
            assert_eq!(rig.memory.check(&rig.machine), expected, "{owned}");
        }
    });
}

#[test]
fn tables_that_the_pool_does_not_know() {
    finds(Inconsistency::Tables, |rig| {
        rig.touch(GIB);
        *rig.memory.pool().lock() = Pool::new(RecordingMachine::new().pool(range(POOL, 8)));
    });
}

#[test]
fn a_mapping_of_the_host_that_ownership_does_not_allow() {
    use Stage2Usage::{Device, Memory};
    let carve_out = GIB + 30 * MIB;
    for (from, pages, to, usage, bad) in [
        (carve_out, 1, carve_out, Memory, carve_out),
        (carve_out, 512, carve_out, Memory, carve_out),
        (carve_out - 2 * PAGE, 4, carve_out - 2 * PAGE, Memory, carve_out),
        (GIB, 1, GIB + PAGE, Memory, GIB),
        (GIB, 512, GIB + 2 * MIB, Memory, GIB),
        (GIB, 1, GIB, Device, GIB),
        (GIB, 512, GIB, Device, GIB),
        (0x900_0000, 1, 0x900_0000, Device, 0x900_0000),
        (0x900_0000, 512, 0x900_0000, Device, 0x900_0000),
        (16 * MIB, 1, 16 * MIB, Memory, 16 * MIB),
        (3 * GIB + 4 * PAGE, 2, 3 * GIB + 4 * PAGE, Memory, 3 * GIB + 4 * PAGE),
    ] {
        finds(Inconsistency::Stage2(addr(bad)), |rig| host_maps(rig, from, pages, to, usage));
    }
    // One page of a block that the host maps as one.
    finds(Inconsistency::Stage2(addr(GIB + 7 * PAGE)), |rig| {
        rig.touch(GIB);
        pretend(rig, GIB + 7 * PAGE, 1, Entry::new(State::HYP_DONATED, 0));
    });
    with_rig(|rig| {
        host_maps(rig, 16 * MIB, 512, 16 * MIB, Device);
        host_maps(rig, GIB, 600, GIB, Memory);
        rig.check();
    });
}

#[test]
fn a_page_that_el2_should_map() {
    let last = 3 * GIB + 1504 * PAGE;
    let donated = Entry::new(State::HYP_DONATED, 0);
    for (page, pages, entry) in [
        (GIB, 1, donated),
        (GIB + 2 * MIB, 512, donated),
        (GIB + 5 * PAGE, 3, Entry::new(State::HOST_SHARED, 1)),
        (last, 1, Entry::new(State::HOST_BORROWED, 0)),
    ] {
        finds(Inconsistency::El2Lacks(addr(page)), |rig| pretend(rig, page, pages, entry));
    }
    // Behind pages that are mapped.
    finds(Inconsistency::El2Lacks(addr(GIB + 512 * PAGE)), |rig| {
        rig.call(Donate, range(GIB, 512)).unwrap();
        pretend(rig, GIB + 512 * PAGE, 1, donated);
    });
}

#[test]
fn a_page_that_el2_should_not_map() {
    use El2Usage::{Data, Rodata};
    for (page, pages) in [(GIB, 1), (GIB + 3 * PAGE, 2), (GIB + 2 * MIB, 512)] {
        finds(Inconsistency::El2Maps(addr(page)), |rig| el2_maps(rig, page, pages, page, Data));
    }
    for (to, usage) in [(GIB + PAGE, Data), (GIB, Rodata)] {
        finds(Inconsistency::El2Maps(addr(GIB)), |rig| {
            rig.call(Donate, range(GIB, 1)).unwrap();
            el2_maps(rig, GIB, 1, to, usage);
        });
    }
    // What the image is made of.
    with_rig(|rig| {
        el2_maps(rig, GIB + 30 * MIB, 3, GIB + 30 * MIB, Rodata);
        rig.check();
    });
}

/// Makes a contradiction about a guest, which has `pages` pages from `GIB` on at `RAM`.
fn finds_in(kind: GuestKind, pages: u64, expected: Inconsistency, contradict: impl FnOnce(&Rig<'_>, &GuestMemory)) {
    with_rig(|rig| {
        let guest = rig.guest(3, kind, 16);
        rig.give(&guest, GIB, pages, RAM).unwrap();
        contradict(rig, &guest);
        assert_eq!(rig.memory.check_guest(&rig.machine, &guest), Err(expected), "{kind:?}");
    });
}

const KINDS: [GuestKind; 3] = [GuestKind::Ordinary, GuestKind::Pkvm, GuestKind::Realm];

fn at_first(kind: GuestKind) -> State {
    if kind == GuestKind::Ordinary { State::HOST_LENT } else { State::GUEST_OWNED }
}

#[test]
fn a_guest_with_wrong_numbers() {
    for kind in KINDS {
        finds_in(kind, 4, Inconsistency::GuestLacks, |rig, guest| guest.lock(&rig.machine).pages += 1);
        finds_in(kind, 4, Inconsistency::Tables, |rig, guest| guest.lock(&rig.machine).spare.in_use += 1);
        for pages in [4, 512] {
            // By the table, a page or a block more than is mapped.
            let frame = RAM / PAGE + pages;
            finds_in(kind, pages, Inconsistency::GuestLacks, |rig, _| {
                pretend(rig, GIB + 4 * MIB, pages, Entry::of_guest(at_first(kind), 3, frame));
            });
        }
    }
}

#[test]
fn a_mapping_of_a_guest_that_ownership_does_not_allow() {
    let frame = RAM / PAGE + 2;
    let bad = Inconsistency::Guest(addr(GIB + 2 * PAGE));
    for kind in KINDS {
        let state = at_first(kind);
        let other = if kind == GuestKind::Ordinary { State::GUEST_OWNED } else { State::HOST_LENT };
        for entry in [
            Entry::new(State::HOST_OWNED, 0),
            Entry::of_guest(state, 3, frame + 1),
            Entry::of_guest(state, 2, frame),
            Entry::of_guest(other, 3, frame),
        ] {
            for pages in [4, 512] {
                finds_in(kind, pages, bad, |rig, _| pretend(rig, GIB + 2 * PAGE, 1, entry));
            }
        }
        // A second mapping of a page, and one as a device.
        finds_in(kind, 4, Inconsistency::Guest(addr(GIB)), |rig, guest| {
            let Guest { tables, spare, .. } = &mut *guest.lock(&rig.machine);
            let (machine, at) = (&rig.machine, frames(RAM + 9 * PAGE, 1));
            tables.map(machine, &mut spare.pool(machine), at, addr(GIB), Stage2Usage::Memory).unwrap();
        });
        finds_in(kind, 4, Inconsistency::Guest(addr(RAM)), |rig, guest| {
            let Guest { tables, spare, .. } = &mut *guest.lock(&rig.machine);
            let (machine, at) = (&rig.machine, frames(RAM, 1));
            tables.map(machine, &mut spare.pool(machine), at, addr(GIB), Stage2Usage::Device).unwrap();
        });
    }
}

#[test]
fn a_page_in_the_wrong_half_of_a_realm() {
    let bad = Inconsistency::Guest(addr(GIB));
    let entry = |state| Entry::of_guest(state, 3, RAM / PAGE);
    for state in [State::GUEST_OFFERED, State::GUEST_CLAIMED] {
        finds_in(GuestKind::Realm, 4, bad, |rig, _| pretend(rig, GIB, 1, entry(state)));
    }
    finds_in(GuestKind::Realm, 4, bad, |rig, guest| {
        rig.change(Change::Share, guest, RAM, 1).unwrap();
        pretend(rig, GIB, 1, entry(State::GUEST_CLAIMED));
        rig.check_guest(guest);
        pretend(rig, GIB, 1, entry(State::GUEST_OWNED));
    });
}

/// What is visited is what is there, in order, and nothing else.
#[test]
fn visits() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 3);
        let frame = Ipa::new(RAM).unwrap();
        rig.touch(GIB);
        rig.memory.share(&rig.machine, range(GIB + PAGE, 2)).unwrap();
        rig.memory.pin(&rig.machine, range(GIB + 2 * PAGE, 1)).unwrap();
        rig.memory.give(&rig.machine, &guest, range(GIB + 3 * PAGE, 2), frame, Gift::Donated).unwrap();

        let mut entries = Vec::new();
        rig.memory.visit_entries(&rig.machine, range(GIB, 6), &mut |run, its| {
            entries.push((run, its.state, its.pins, its.guest))
        });
        assert_eq!(
            entries,
            [
                (range(GIB, 1), State::HOST_OWNED, 0, None),
                (range(GIB + PAGE, 1), State::HOST_SHARED, 0, None),
                (range(GIB + 2 * PAGE, 1), State::HOST_SHARED, 1, None),
                (range(GIB + 3 * PAGE, 2), State::GUEST_OWNED, 0, Some((0, frame))),
                (range(GIB + 5 * PAGE, 1), State::HOST_OWNED, 0, None),
            ]
        );
        // Up to the first page that is not RAM.
        let (mut pages, behind) = (0, GIB + 32 * MIB);
        rig.memory.visit_entries(&rig.machine, range(behind - PAGE, 3), &mut |run, _| pages += run.pages());
        rig.memory.visit_entries(&rig.machine, range(behind, 3), &mut |run, _| pages += run.pages());
        assert_eq!(pages, 1);

        fn leaf<U>(to: u64, usage: U) -> Found<U> {
            Found::Leaf { mapping: Some(Mapping { to: addr(to), usage }), level: Level::L3 }
        }
        let mut host = Vec::new();
        let looked = range(GIB + 2 * PAGE, 2);
        rig.memory.visit_host(&rig.machine, looked.identity_ipa(), &mut |part, found| host.push((part, found)));
        let [shared, given] = [GIB + 2 * PAGE, GIB + 3 * PAGE].map(|page| range(page, 1));
        let of_host =
            [(shared, leaf(GIB + 2 * PAGE, Stage2Usage::Memory)), (given, Found::Absent { level: Level::L3 })];
        assert_eq!(host, of_host.map(|(page, found)| (page.identity_ipa(), found)));
        let mut el2 = Vec::new();
        rig.memory.visit_el2(&rig.machine, looked.identity_va(), &mut |part, found| el2.push((part, found)));
        let of_el2 = [(shared, leaf(GIB + 2 * PAGE, El2Usage::Data)), (given, Found::Absent { level: Level::L3 })];
        assert_eq!(el2, of_el2.map(|(page, found)| (page.identity_va(), found)));
        let mut its = Vec::new();
        rig.memory.visit_guest(&rig.machine, &guest, frames(RAM + PAGE, 2), &mut |part, found| its.push((part, found)));
        let second = leaf(GIB + 4 * PAGE, Stage2Usage::Memory);
        assert_eq!(
            its,
            [(frames(RAM + PAGE, 1), second), (frames(RAM + 2 * PAGE, 1), Found::Absent { level: Level::L3 })]
        );
    });
}
