//! How RAM is described.

use super::*;
use crate::{SetupError, Sizes};

fn blocks(ram: &[PhysRange]) -> usize {
    sizes(ram).unwrap().block_entries
}

#[test]
fn a_gibibyte_costs_two_mebibytes_and_a_page() {
    assert_eq!(sizes(&[range(GIB, GIB / PAGE)]), Ok(Sizes { block_entries: 512, page_entries: 512 * 512 }));
}

#[test]
fn blocks_at_the_edges_count() {
    assert_eq!(blocks(&[range(GIB + PAGE, 512)]), 2);
    assert_eq!(blocks(&[range(GIB - PAGE, 1)]), 1);
    assert_eq!(blocks(&[range(GIB + PAGE, 3), range(GIB + MIB, 3)]), 1, "two regions in one block");
    assert_eq!(blocks(&[range(2 * GIB, 1), range(GIB, 1)]), 2, "in any order");
}

#[test]
fn contradictions_are_refused() {
    let overlap = [range(GIB, 3), range(GIB + 2 * PAGE, 3)];
    assert_eq!(sizes(&overlap), Err(SetupError::Overlap(addr(GIB + 2 * PAGE))));
    let many: Vec<_> = (0..33).map(|index| range(index * GIB, 1)).collect();
    assert_eq!(sizes(&many), Err(SetupError::TooMany));
    assert!(sizes(&many[..32]).is_ok());

    let ram = [range(GIB, 1024)];
    let mut store = Store::for_ram(&ram);
    let mut new = |carve_out: PhysRange, reserved: &[PhysRange], blocks: usize| {
        OwnershipTable::new(&ram, carve_out, reserved, &mut store.blocks[..blocks], &mut store.pages).err()
    };
    assert_eq!(new(range(GIB + 4 * MIB - PAGE, 2), &[], 2), Some(SetupError::CarveOut(range(GIB + 4 * MIB - PAGE, 2))));
    assert_eq!(new(range(GIB, 1), &[range(0, 1); 9], 2), Some(SetupError::TooMany));
    assert_eq!(new(range(GIB, 1), &[], 1), Some(SetupError::TooSmall));
    assert_eq!(new(range(GIB, 1), &[], 2), None);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn the_host_has_all_but_the_carve_out() {
    let layout = small();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let counts = rig.counts();
    assert_eq!(counts.host_owned, 32 * MIB / PAGE - 512 + 1500);
    assert_eq!((counts.hyp_owned, counts.hyp_donated, counts.host_shared), (512, 0, 0));
    rig.check();

    for (page, state) in [
        (GIB, HostState::Owned),
        (GIB + 30 * MIB - PAGE, HostState::Owned),
        (GIB + 30 * MIB, HostState::NoPage),
        (GIB + 32 * MIB, HostState::NoPage),
        (3 * GIB + 4 * PAGE, HostState::NoPage),
        (3 * GIB + 5 * PAGE, HostState::Owned),
        (3 * GIB + 1504 * PAGE, HostState::Owned),
        (3 * GIB + 1505 * PAGE, HostState::NoPage),
        (0, HostState::NoPage),
        ((1 << 48) - PAGE, HostState::NoPage),
    ] {
        assert_eq!(rig.state(page), (state, 0), "{page:#x}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn regions_that_share_a_block_keep_apart() {
    let layout = Layout {
        ram: vec![range(GIB, 100), range(GIB + 200 * PAGE, 512), range(GIB + 712 * PAGE, 100)],
        carve_out: range(GIB + 90 * PAGE, 5),
        reserved: vec![],
        tables: 64,
    };
    let mut store = Store::for_ram(&layout.ram);
    assert_eq!(store.blocks.len(), 2);
    let rig = Rig::new(&layout, &mut store);
    rig.check();
    let counts = rig.counts();
    assert_eq!((counts.host_owned, counts.hyp_owned), (100 + 512 + 100 - 5, 5));
    assert_eq!(rig.call(Share, range(GIB + 99 * PAGE, 2)), fails(Reason::NotRam, GIB + 100 * PAGE));
    assert_eq!(rig.call(Share, range(GIB + 199 * PAGE, 2)), fails(Reason::NotRam, GIB + 199 * PAGE));
    // Two regions that touch are one.
    assert_eq!(rig.call(Share, range(GIB + 200 * PAGE, 612)), Ok(()));
    rig.check();
}
