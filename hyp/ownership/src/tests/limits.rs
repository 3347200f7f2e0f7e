//! What happens when something runs out.

use ravelin_pgtable::TablePool;

use super::{
    guests::{Change, RAM, frames, with_rig},
    *,
};
use crate::{GuestFailure, GuestKind, GuestReason, HostFailure, MAX_STEPS};

/// Memory with so few tables that pages in different blocks soon use them up.
fn scarce(tables: usize) -> Layout {
    Layout { tables: u64::try_from(tables).unwrap(), ..large() }
}

fn page_of_block(block: u64) -> u64 {
    GIB + block * 2 * MIB
}

#[test]
fn pins_stop_at_their_limit() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.call(Share, range(GIB, 3)).unwrap();
    let limit = 4095;
    for _ in 0..limit {
        rig.memory.pin(&rig.machine, range(GIB + PAGE, 1)).unwrap();
    }
    assert_eq!(rig.state(GIB + PAGE), (HostState::SharedOwned, limit));
    let before = rig.everything();
    assert_eq!(rig.call(Pin, range(GIB, 3)), fails(Reason::PinLimit, GIB + PAGE));
    assert!(rig.everything() == before);
    for _ in 0..limit {
        rig.memory.unpin(&rig.machine, range(GIB + PAGE, 1)).unwrap();
    }
    rig.call(Unshare, range(GIB, 3)).unwrap();
    rig.check();
}

#[test]
fn the_host_is_left_its_reserve() {
    // Tables of level 1, which is there from the start, and 2, and three of level 3.
    let layout = scarce(HOST_RESERVE + 5);
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    for call in [Donate, Share] {
        for block in 0..3 {
            rig.call(call, range(page_of_block(block), 1)).unwrap();
            if call == Share {
                rig.call(Pin, range(page_of_block(block), 1)).unwrap();
            }
        }
        assert_eq!(rig.counts().el2_tables, 5);
        let last = page_of_block(3);
        if call == Share {
            rig.call(Share, range(last, 1)).unwrap();
        }
        let before = rig.everything();
        let refused = if call == Share { Pin } else { Donate };
        assert_eq!(rig.call(refused, range(last, 1)), fails(Reason::NoMemory, last));
        assert!(rig.everything() == before);
        // The same block as one needs no table, nor does a page next to one that is mapped.
        if call == Donate {
            rig.call(Donate, range(page_of_block(4), 512)).unwrap();
            rig.call(TakeBack, range(page_of_block(4), 512)).unwrap();
            rig.call(Donate, range(page_of_block(2) + PAGE, 1)).unwrap();
            rig.call(TakeBack, range(page_of_block(2) + PAGE, 1)).unwrap();
            (0..3).for_each(|block| rig.call(TakeBack, range(page_of_block(block), 1)).unwrap());
            assert_eq!(rig.counts().el2_tables, 1, "nothing is kept");
        }
    }
    rig.check();
}

#[test]
fn cutting_a_large_mapping_of_el2_may_lack_a_table() {
    let layout = scarce(HOST_RESERVE + 3);
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.call(Donate, range(GIB, 1024)).unwrap();
    assert_eq!(rig.counts().el2_tables, 2);
    rig.call(TakeBack, range(GIB + PAGE, 1)).unwrap();
    let before = rig.everything();
    assert_eq!(rig.call(TakeBack, range(GIB + 2 * MIB, 1)), fails(Reason::NoMemory, GIB + 2 * MIB));
    assert!(rig.everything() == before);
    rig.call(TakeBack, range(GIB + 2 * MIB, 512)).unwrap();
    rig.check();
}

/// RAM with lone pages, one a GiB: the host's stage 2 takes two tables for each.
fn scattered(tables: usize) -> Layout {
    let mut layout = scarce(tables);
    layout.ram.extend((0..30).map(lone_page).map(|page| range(page, 1)));
    layout
}

fn lone_page(index: u64) -> u64 {
    (8 + index) * GIB + MIB
}

#[test]
fn a_block_cut_in_many_places_takes_one_table() {
    let layout = scarce(HOST_RESERVE + 3);
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.call(Share, range(GIB, 512)).unwrap();
    rig.call(Pin, range(GIB, 512)).unwrap();
    (1..200).step_by(3).for_each(|page| rig.call(Pin, range(GIB + page * PAGE, 1)).unwrap());
    assert_eq!(rig.counts().el2_tables, 2);
    rig.call(Unpin, range(GIB, 512)).unwrap();
    assert_eq!(rig.counts().el2_tables, 3);
    assert!(rig.el2_reaches(GIB + PAGE) && !rig.el2_reaches(GIB + 2 * PAGE));
    rig.check();
}

#[test]
fn the_hosts_stage_2_is_dropped_when_tables_run_out() {
    let layout = scattered(HOST_RESERVE);
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    for index in 0..30 {
        assert_eq!(rig.touch(lone_page(index)), HostFault::Resolved);
    }
    let counts = rig.counts();
    assert_eq!((counts.evictions, counts.stage2_invalidations), (1, 1));
    assert!(!rig.host_reaches(lone_page(0)) && rig.host_reaches(lone_page(29)));
    rig.check();
}

#[test]
fn a_donation_takes_the_hosts_tables_if_it_must() {
    let layout = scattered(HOST_RESERVE + 4);
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    (0..17).for_each(|index| assert_eq!(rig.touch(lone_page(index)), HostFault::Resolved));
    assert_eq!((rig.counts().free_tables, rig.counts().evictions), (1, 0));
    rig.call(Donate, range(2 * GIB, 1)).unwrap();
    let counts = rig.counts();
    assert_eq!((counts.evictions, counts.el2_tables, counts.host_tables), (1, 3, 0));
    assert_eq!(rig.touch(GIB), HostFault::Resolved);
    rig.check();
}

#[test]
fn a_cut_without_a_table_costs_the_neighbours_a_fault_and_no_more() {
    let layout = scattered(HOST_RESERVE + 4);
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    // EL2 has its tables for the block already, the host maps it as one, and has used up all other tables.
    rig.call(Share, range(GIB + 5 * PAGE, 1)).unwrap();
    rig.call(Pin, range(GIB + 5 * PAGE, 1)).unwrap();
    rig.touch(GIB);
    (0..16).for_each(|index| assert_eq!(rig.touch(lone_page(index)), HostFault::Resolved));
    assert_eq!((rig.counts().free_tables, rig.counts().host_tables), (0, 33));
    rig.call(Donate, range(GIB + 6 * PAGE, 1)).unwrap();
    assert_eq!(rig.counts().evictions, 0);
    assert!(!rig.host_reaches(GIB) && !rig.host_reaches(GIB + 6 * PAGE));
    assert_eq!(rig.touch(GIB), HostFault::Resolved);
    assert_eq!(rig.counts().evictions, 1);
    rig.check();
}

#[test]
fn the_largest_range_takes_steps_by_the_block() {
    let layout = Layout { ram: vec![range(GIB, 1 << 19)], ..large() };
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    // Not aligned, so that both ends are split.
    let largest = range(GIB + 5 * PAGE, 1 << 18);
    for call in [Share, Pin, Unpin, Unshare, Donate, TakeBack] {
        let _ = rig.machine.take_log();
        rig.call(call, largest).unwrap();
        let log = rig.machine.take_log();
        assert!(log.len() < 4000, "{call:?} took {} operations", log.len());
    }
    rig.check();
}

/// Where EL2 maps nothing but what uses up tables: one for each block.
const FAR: u64 = 1 << 39;

/// Has EL2 use up tables until `left` are left.
fn drain(rig: &Rig<'_>, left: usize) {
    rig.with_region(FAR, |region, tables| {
        let mut base = FAR;
        while tables.available() > left {
            let page = range(base, 1);
            region.el2.map(&rig.machine, tables, page.identity_va(), page.base(), El2Usage::Data).unwrap();
            base += 2 * MIB;
        }
        assert_eq!(tables.available(), left);
    });
}

/// Has EL2 do without one of them.
fn give_one_back(rig: &Rig<'_>) {
    rig.with_region(FAR, |region, tables| {
        let before = tables.available();
        region.unmap_el2(&rig.machine, tables, range(FAR, 1));
        let owed = std::mem::take(&mut region.el2_owed);
        assert!(region.el2.flush(&rig.machine, tables, owed));
        assert_eq!(tables.available(), before + 1);
    });
}

#[test]
fn a_look_at_guests_pages_needs_tables() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 16);
        rig.give(&guest, GIB, 4, RAM).unwrap();
        drain(rig, 5);
        let before = rig.everything();
        let refused = Err((Some(GuestReason::NoMemory), RAM));
        let denied = |page| Err(HostFailure { reason: GuestReason::NoMemory, page: addr(page) });
        assert_eq!(rig.give(&guest, GIB + 9 * PAGE, 1, RAM + 9 * PAGE), denied(GIB + 9 * PAGE));
        assert_eq!(
            rig.memory.with_guest_pages(&rig.machine, &guest, frames(RAM, 1), &mut |_| panic!("not mapped")),
            Err(GuestFailure { reason: GuestReason::NoMemory, ipa: Ipa::new(RAM).unwrap() })
        );
        assert_eq!(rig.change(Change::Relinquish, &guest, RAM, 1), refused);
        assert_eq!(rig.force(&guest, GIB, 1), denied(GIB));
        guest.kill();
        assert_eq!(rig.change(Change::Reclaim, &guest, RAM, 4), refused);
        assert!(rig.everything() == before);

        // One more is enough, and the host keeps its tables.
        let evictions = rig.counts().evictions;
        give_one_back(rig);
        assert_eq!(rig.change(Change::Reclaim, &guest, RAM, 4), Ok(4));
        assert_eq!(rig.counts().evictions, evictions);
        rig.check_guest(&guest);
    });
}

#[test]
fn a_dead_guests_tables_come_back_as_soon_as_a_block_of_el2_can_be_cut() {
    for host_has_them in [false, true] {
        let layout = scattered(2 * HOST_RESERVE);
        let mut store = Store::for_ram(&layout.ram);
        let rig = Rig::new(&layout, &mut store);
        rig.memory.keep(&rig.machine, range(GIB, 2)).unwrap();
        let geometry = Geometry::stage2(IPA_BITS).unwrap();
        let guest = rig.memory.new_guest(&rig.machine, 0, GuestKind::Pkvm, geometry, addr(GIB)).unwrap();
        rig.memory.add_guest_tables(&rig.machine, &guest, range(GIB + 2 * MIB, MAX_STEPS)).unwrap();
        guest.kill();
        let release = || rig.memory.release_guest_tables(&rig.machine, &guest, MAX_STEPS);
        if host_has_them {
            (0..16).for_each(|index| assert_eq!(rig.touch(lone_page(index)), HostFault::Resolved));
            assert_eq!(rig.counts().host_tables, HOST_RESERVE);
        }
        drain(&rig, if host_has_them { 0 } else { HOST_RESERVE });
        assert_eq!(release(), Err(GuestReason::NoMemory));
        assert_eq!((guest.table_pages(), rig.counts().evictions), (MAX_STEPS, 0));
        give_one_back(&rig);
        if host_has_them {
            assert_eq!(rig.touch(GIB + 64 * MIB), HostFault::Resolved);
            assert_eq!((rig.counts().host_tables, rig.counts().free_tables), (HOST_RESERVE + 1, 0));
        }
        assert_eq!(release(), Ok(0));
        assert_eq!(rig.counts().evictions, u64::from(host_has_them));
        rig.check();
    }
}

#[test]
fn a_guest_gets_a_call_of_tables_at_most_and_never_page_0() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 0);
        let add = |base, pages| rig.memory.add_guest_tables(&rig.machine, &guest, range(base, pages));
        let denied = |reason, page| Err(HostFailure { reason, page: addr(page) });
        assert_eq!(add(GIB, MAX_STEPS + 1), denied(GuestReason::TooLarge, GIB));
        assert_eq!(add(0, 1), denied(GuestReason::NotRam, 0));
        assert_eq!(guest.table_pages(), 0);
        assert_eq!(add(GIB, MAX_STEPS), Ok(()));
        assert_eq!(guest.table_pages(), MAX_STEPS);
        rig.check_guest(&guest);
    });
    // Where there is RAM at 0, too.
    let layout = Layout { ram: vec![range(0, 512), range(GIB, 8192)], ..small() };
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let guest = rig.guest(0, GuestKind::Pkvm, 0);
    let refused = rig.memory.add_guest_tables(&rig.machine, &guest, range(0, 1));
    assert_eq!(refused, Err(HostFailure { reason: GuestReason::Denied, page: addr(0) }));
    assert_eq!(rig.state(0), (HostState::Owned, 0));
}

#[test]
fn a_dying_guest_has_no_frames_behind_its_end() {
    with_rig(|rig| {
        for (slot, kind) in (0..).zip([GuestKind::Ordinary, GuestKind::Pkvm, GuestKind::Realm]) {
            let guest = rig.guest(slot, kind, 4);
            guest.kill();
            let last = guest.end() - PAGE;
            assert_eq!(rig.change(Change::Reclaim, &guest, last, 2), Err((Some(GuestReason::OutOfRange), last)));
            assert_eq!(rig.change(Change::Reclaim, &guest, last, 1), Ok(1));
        }
    });
}

#[test]
fn tables_of_a_guest_are_counted_as_they_come_and_go() {
    with_rig(|rig| {
        let guest = rig.guest(0, GuestKind::Pkvm, 3);
        let numbers = || {
            let mut guest = guest.lock(&rig.machine);
            let pool = guest.spare.pool(&rig.machine);
            (pool.available(), pool.in_use())
        };
        assert_eq!(numbers(), (3, 0));
        rig.give(&guest, GIB, 1, RAM).unwrap();
        assert_eq!((numbers(), guest.table_pages()), ((1, 2), 3));
        assert_eq!(rig.change(Change::Relinquish, &guest, RAM, 1), Ok(1));
        assert_eq!((numbers(), guest.table_pages()), ((3, 0), 3));
    });
}

/// What could be returned has been, so the call has not failed; the next one does.
#[test]
fn some_tables_come_back_before_a_block_cannot_be_cut() {
    let layout = scattered(2 * HOST_RESERVE);
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.memory.keep(&rig.machine, range(GIB, 2)).unwrap();
    let geometry = Geometry::stage2(IPA_BITS).unwrap();
    let guest = rig.memory.new_guest(&rig.machine, 0, GuestKind::Pkvm, geometry, addr(GIB)).unwrap();
    rig.memory.add_guest_tables(&rig.machine, &guest, range(GIB + 2 * MIB, MAX_STEPS)).unwrap();
    // Beside the root, so that nothing has to be cut, and no table of EL2's becomes free.
    rig.memory.add_guest_tables(&rig.machine, &guest, range(GIB + 8 * PAGE, 1)).unwrap();
    guest.kill();
    drain(&rig, HOST_RESERVE);
    let release = || rig.memory.release_guest_tables(&rig.machine, &guest, MAX_STEPS);
    assert_eq!(release(), Ok(MAX_STEPS));
    assert_eq!(rig.state(GIB + 8 * PAGE), (HostState::Owned, 0));
    assert_eq!(release(), Err(GuestReason::NoMemory));
    assert_eq!(guest.table_pages(), MAX_STEPS);
    rig.check();
}

#[test]
fn a_block_that_is_pinned_twice_stays_mapped() {
    let layout = scarce(HOST_RESERVE + 3);
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.call(Share, range(GIB, 512)).unwrap();
    (0..2).for_each(|_| rig.call(Pin, range(GIB, 512)).unwrap());
    rig.call(Unpin, range(GIB, 512)).unwrap();
    rig.check();
    rig.call(Unpin, range(GIB, 512)).unwrap();
    rig.check();
    assert_eq!(rig.counts().el2_tables, 1);
}

#[test]
fn pages_of_more_blocks_than_there_are_tables_for_are_scrubbed() {
    let layout = scarce(HOST_RESERVE + 8);
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let guest = rig.guest(0, GuestKind::Pkvm, 16);
    for index in 0..32 {
        let page = page_of_block(20 + index);
        rig.give(&guest, page, 1, RAM + index * PAGE).unwrap();
        // The host's tables leave few to EL2, but enough for the first pages, so that they need not go.
        if index < 24 {
            rig.touch(page + PAGE);
        }
    }
    assert_eq!(rig.change(Change::Relinquish, &guest, RAM, 32), Ok(32));
    rig.check_guest(&guest);
}

#[test]
fn what_ends_behind_ram_is_not_given() {
    let layout = scattered(HOST_RESERVE + 8);
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let guest = rig.guest(0, GuestKind::Pkvm, 16);
    let refused = Err(HostFailure { reason: GuestReason::NotRam, page: addr(lone_page(0) + PAGE) });
    assert_eq!(rig.give(&guest, lone_page(0), 2, RAM), refused);
    rig.give(&guest, lone_page(0), 1, RAM).unwrap();
    assert_eq!(rig.force(&guest, lone_page(0), 2), refused);
    rig.force(&guest, lone_page(0), 1).unwrap();
}
