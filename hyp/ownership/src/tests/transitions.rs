//! Transitions one by one, and the state machine of a page in full.

use super::*;

/// What both sides see of a page: the host's state and pins, and whether EL2 maps it.
fn assert_page(rig: &Rig<'_>, page: u64, host: HostState, pins: u64, el2: bool) {
    assert_eq!(rig.state(page), (host, pins));
    assert_eq!(rig.el2_reaches(page), el2);
    // The host is let through or not as its state says, whether or not it has touched the page before.
    let expected = if host == HostState::NoPage { HostFault::Denied } else { HostFault::Resolved };
    assert_eq!(rig.touch(page), expected);
    rig.check();
}

/// Tries all calls but those in `allowed`; each is refused and changes nothing.
fn assert_refused(rig: &Rig<'_>, page: u64, refused: &[(Call, Reason)]) {
    for &(call, reason) in refused {
        let before = rig.everything();
        assert_eq!(rig.call(call, range(page, 1)), fails(reason, page), "{call:?}");
        assert!(rig.everything() == before, "{call:?} changed something");
    }
}

/// pKVM's ownership test, its part on host and hypervisor: states 1 to 5 and 13, each with every call.
#[test]
fn every_call_in_every_state() {
    use Reason::{Busy, Denied};
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);

    for page in [GIB + 7 * PAGE, GIB, GIB + 30 * MIB - PAGE, 3 * GIB + 5 * PAGE, 3 * GIB + 1504 * PAGE] {
        let ok = |call| assert_eq!(rig.call(call, range(page, 1)), Ok(()), "{call:?}");

        // 1: the hypervisor owns it.
        ok(Donate);
        assert_page(&rig, page, HostState::NoPage, 0, true);
        assert_refused(
            &rig,
            page,
            &[(Donate, Denied), (Share, Denied), (Unshare, Denied), (Pin, Denied), (Unpin, Denied)],
        );
        // 2: the host owns it.
        ok(TakeBack);
        assert_page(&rig, page, HostState::Owned, 0, false);
        assert_refused(&rig, page, &[(TakeBack, Denied), (Unshare, Denied), (Pin, Denied), (Unpin, Denied)]);
        // 3: shared.
        ok(Share);
        assert_page(&rig, page, HostState::SharedOwned, 0, false);
        assert_refused(&rig, page, &[(Share, Denied), (Donate, Denied), (TakeBack, Denied), (Unpin, Denied)]);
        // 4: pinned, twice and once.
        ok(Pin);
        ok(Pin);
        assert_page(&rig, page, HostState::SharedOwned, 2, true);
        ok(Unpin);
        assert_page(&rig, page, HostState::SharedOwned, 1, true);
        assert_refused(&rig, page, &[(Unshare, Busy), (Share, Denied), (Donate, Denied), (TakeBack, Denied)]);
        // 5: and back.
        ok(Unpin);
        assert_page(&rig, page, HostState::SharedOwned, 0, false);
        ok(Unshare);
        assert_page(&rig, page, HostState::Owned, 0, false);
        assert_refused(&rig, page, &[(TakeBack, Denied), (Unshare, Denied), (Pin, Denied), (Unpin, Denied)]);
        // Borrowed: to the host it looks shared.
        ok(Borrow);
        assert_page(&rig, page, HostState::SharedOwned, 0, true);
        assert_refused(&rig, page, &CALLS.map(|call| (call, Denied)));
        assert_refused(&rig, page, &[(Borrow, Denied)]);
        ok(Return);
        assert_page(&rig, page, HostState::Owned, 0, false);
        assert_refused(&rig, page, &[(Return, Denied)]);
        // 13: the hypervisor's again.
        ok(Donate);
        assert_page(&rig, page, HostState::NoPage, 0, true);
        ok(TakeBack);
    }
}

#[test]
fn the_carve_out_never_changes_hands() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    for call in CALLS {
        assert_refused(&rig, GIB + 30 * MIB, &[(call, Reason::Denied)]);
        assert_eq!(rig.call(call, range(GIB + 30 * MIB, 512)), fails(Reason::Denied, GIB + 30 * MIB));
    }
    assert_page(&rig, GIB + 30 * MIB, HostState::NoPage, 0, false);
}

#[test]
fn what_is_not_ram_has_no_owner() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    for call in CALLS {
        for page in [0, 0x900_0000, GIB - PAGE, GIB + 32 * MIB, 3 * GIB, 3 * GIB + 1505 * PAGE, (1 << 48) - PAGE] {
            assert_refused(&rig, page, &[(call, Reason::NotRam)]);
        }
    }
}

#[test]
fn the_first_page_that_fails_is_named_and_nothing_changes() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.call(Share, range(GIB + 3 * MIB, 5)).unwrap();
    rig.touch(GIB + 3 * MIB);
    let before = rig.everything();
    let bad = GIB + 3 * MIB;
    // Inside one block, across blocks, and up to the page behind.
    for (base, pages, page) in [
        (bad - 3 * PAGE, 10, bad),
        (GIB, 2048, bad),
        (bad + 4 * PAGE, 2, bad + 4 * PAGE),
        (GIB + 28 * MIB, 513, GIB + 30 * MIB),
    ] {
        let page = if base == GIB + 28 * MIB { GIB + 30 * MIB } else { page };
        assert_eq!(rig.call(Donate, range(base, pages)), fails(Reason::Denied, page));
        assert_eq!(rig.call(Share, range(base, pages)), fails(Reason::Denied, page));
        assert!(rig.everything() == before);
    }
    let end = 3 * GIB + 1505 * PAGE;
    assert_eq!(rig.call(Share, range(end - 3 * PAGE, 4)), fails(Reason::NotRam, end));
    assert_eq!(rig.call(Share, range(GIB - 2 * PAGE, 4)), fails(Reason::NotRam, GIB - 2 * PAGE));
    assert_eq!(rig.call(Share, range(0, 1 << 36)), fails(Reason::NotRam, 0), "all of the address space");
    rig.call(Pin, range(bad + PAGE, 1)).unwrap();
    assert_eq!(rig.call(Unshare, range(bad, 5)), fails(Reason::Busy, bad + PAGE));
    assert_eq!(rig.call(Unpin, range(bad, 2)), fails(Reason::Denied, bad));
}

#[test]
fn contents_are_kept_and_scrubbed() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let pages = [GIB + PAGE, GIB + 2 * PAGE, GIB + 3 * PAGE];
    pages.iter().for_each(|&page| rig.machine.poke(addr(page), page));
    let contents = || pages.map(|page| rig.machine.peek(addr(page)));
    for call in [Share, Pin, Unpin, Unshare, Borrow, Return, Donate] {
        rig.call(call, range(GIB + PAGE, 3)).unwrap();
        assert_eq!(contents(), pages, "{call:?}");
    }
    rig.call(TakeBack, range(GIB + 2 * PAGE, 1)).unwrap();
    assert_eq!(contents(), [pages[0], 0, pages[2]]);
}

#[test]
fn sharing_needs_no_tlb_maintenance_and_the_rest_one_each() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.touch(GIB);
    let pages = range(GIB + 2 * MIB - 3 * PAGE, 600);
    let expected: [(Call, Vec<Op>); 6] = [
        (Share, vec![]),
        (Pin, vec![]),
        (Unpin, vec![Op::InvalidateEl2(pages.identity_va())]),
        (Unshare, vec![]),
        (Donate, vec![Op::InvalidateStage2(Vmid::HOST, pages.identity_ipa(), true)]),
        (TakeBack, vec![Op::InvalidateEl2(pages.identity_va())]),
    ];
    rig.touch(GIB + 2 * MIB);
    rig.touch(GIB + 4 * MIB);
    for (call, expected) in expected {
        let _ = rig.machine.take_log();
        rig.call(call, pages).unwrap();
        let done = invalidations(&rig.machine.take_log());
        // Back with the host as a whole, blocks are prepared to be mapped as such.
        assert_eq!(done[..expected.len()], expected, "{call:?}");
        assert_eq!(done.len() - expected.len(), usize::from(call == TakeBack), "{call:?}");
    }
    let counts = rig.counts();
    assert_eq!((counts.stage2_invalidations, counts.el2_invalidations), (2, 2));
}

#[test]
fn a_borrowed_page_comes_back_when_tables_are_out() {
    // EL2's own tables for it, and what is the host's.
    let layout = Layout { tables: u64::try_from(HOST_RESERVE + 3).unwrap(), ..large() };
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.touch(GIB);
    let _ = rig.machine.take_log();
    rig.call(Borrow, range(GIB + PAGE, 1)).unwrap();
    assert_eq!(invalidations(&rig.machine.take_log()), [], "the host keeps its block");
    assert!(rig.host_reaches(GIB + PAGE));
    assert_eq!(rig.counts().host_shared, 1);
    assert_eq!(rig.call(Borrow, range(2 * GIB, 1)), fails(Reason::NoMemory, 2 * GIB));
    // The neighbours are not part of it.
    rig.call(Donate, range(GIB + 2 * PAGE, 1)).unwrap();
    let page = range(GIB + PAGE, 1);
    let _ = rig.machine.take_log();
    rig.call(Return, page).unwrap();
    assert_eq!(invalidations(&rig.machine.take_log()), [Op::InvalidateEl2(page.identity_va())]);
    assert_eq!(rig.counts().host_shared, 0);
    rig.check();
}

#[test]
fn a_page_given_away_leaves_its_neighbours_mapped() {
    let layout = large();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    rig.touch(GIB);
    assert_eq!(rig.counts().host_tables, 0, "one block of 1 GiB in the root");
    let page = GIB + 77 * MIB;
    rig.call(Donate, range(page, 1)).unwrap();
    assert_eq!(rig.counts().host_tables, 2);
    assert!(!rig.host_reaches(page));
    for near in [GIB, page - PAGE, page + PAGE, page + 4 * MIB, 2 * GIB - PAGE] {
        assert!(rig.host_reaches(near), "{near:#x}");
    }
    rig.check();
}

#[test]
fn a_block_comes_back_as_a_block() {
    let layout = large();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let fresh = rig.everything();
    rig.touch(GIB);
    let pages = [range(GIB, 2), range(GIB + MIB, 7), range(GIB + 2 * MIB - PAGE, 1)];
    for pages in pages {
        rig.call(Donate, pages).unwrap();
    }
    rig.call(Share, range(GIB + 100 * PAGE, 1)).unwrap();
    for pages in pages {
        rig.call(TakeBack, pages).unwrap();
        assert_ne!(rig.counts().host_tables, 1, "not as long as a page is shared");
    }
    rig.call(Unshare, range(GIB + 100 * PAGE, 1)).unwrap();
    // The table of level 3 is gone; a fault brings the block.
    assert_eq!(rig.counts().host_tables, 1);
    assert!(!rig.host_reaches(GIB));
    rig.touch(GIB);
    assert!(rig.host_reaches(GIB + 2 * MIB - PAGE));
    assert_eq!(rig.counts().host_tables, 1);
    rig.check();
    let entry = |everything: &Everything| everything.blocks[0] & 0xffff_ffff;
    assert_eq!(entry(&rig.everything()), entry(&fresh), "uniform again");
}

#[test]
fn whole_blocks_stay_uniform() {
    let layout = large();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let all = range(GIB, GIB / PAGE);
    rig.touch(GIB);
    for call in [Share, Pin, Unpin, Unshare, Donate, TakeBack] {
        let _ = rig.machine.take_log();
        rig.call(call, all).unwrap();
        let log = rig.machine.take_log();
        assert!(log.len() < 32, "{call:?} took {} operations", log.len());
        rig.check();
    }
    assert!(rig.everything().pages.iter().all(|pages| pages[0] == 0xa5a5_a5a5_a5a5_a5a5), "no block was split");
}

#[test]
fn a_block_that_was_uniform_in_another_state_is_split_right() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let block = range(GIB + 2 * MIB, 512);
    // Split, collapsed and thus primed, then uniform in another state: the page entries are out of date.
    rig.call(Share, range(GIB + 2 * MIB, 1)).unwrap();
    rig.call(Unshare, range(GIB + 2 * MIB, 1)).unwrap();
    rig.call(Share, block).unwrap();
    rig.call(Pin, block).unwrap();
    rig.call(Unpin, range(GIB + 3 * MIB, 1)).unwrap();
    assert_eq!(rig.state(GIB + 3 * MIB), (HostState::SharedOwned, 0));
    assert_eq!(rig.state(GIB + 3 * MIB + PAGE), (HostState::SharedOwned, 1));
    rig.check();
}
