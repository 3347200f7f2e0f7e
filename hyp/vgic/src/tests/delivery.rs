//! What a guest sees of its interrupts, one situation at a time.

use super::world::{
    GICD, ICACTIVER, ICENABLER, ICPENDR, IGROUPR, ISACTIVER, ISENABLER, ISPENDR, World, prepare, rd, sgi,
};
use crate::{NotAllowed, SgiRegister, VcpuSet, affinity};

#[test]
fn a_level_stays_pending_until_it_is_lowered() {
    let mut world = World::new(1, 4);
    world.enable(0, 40, 0x80);
    world.raise(40, true);
    for _ in 0..3 {
        assert_eq!(world.acknowledge(0), Some(40));
        assert_eq!(world.acknowledge(0), None);
        world.end(0, 40);
    }
    world.raise(40, false);
    assert_eq!(world.acknowledge(0), None);
    world.raise(40, true);
    assert_eq!(world.acknowledge(0), Some(40));
    world.raise(40, false);
    world.end(0, 40);
    assert_eq!(world.acknowledge(0), None);
}

#[test]
fn an_edge_is_taken_once() {
    let mut world = World::new(1, 4);
    world.enable(0, 40, 0x80);
    world.set_edge(0, 40, true);
    world.raise(40, true);
    world.raise(40, true);
    assert_eq!(world.drain(0), [40]);
    world.resume(0);
    assert_eq!(world.drain(0), []);
    world.raise(40, false);
    assert_eq!(world.drain(0), []);
}

#[test]
fn an_edge_during_its_handler_comes_after_it() {
    for lrs in [1, 4] {
        let mut world = World::new(1, lrs);
        world.enable(0, 40, 0x80);
        world.set_edge(0, 40, true);
        world.raise(40, true);
        assert_eq!(world.acknowledge(0), Some(40));
        world.raise(40, true);
        assert!(world.read_bit(0, ISPENDR, 40) && world.read_bit(0, ISACTIVER, 40));
        assert_eq!(world.acknowledge(0), None);
        world.end(0, 40);
        assert_eq!(world.drain(0), [40]);
        assert!(!world.read_bit(0, ISPENDR, 40) && !world.read_bit(0, ISACTIVER, 40));
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn a_higher_priority_preempts() {
    for lrs in [1, 2, 4] {
        let mut world = World::new(1, lrs);
        for (intid, priority) in [(40, 0xa0), (41, 0x80), (42, 0x80), (43, 0x20)] {
            world.enable(0, intid, priority);
        }
        world.raise(40, true);
        assert_eq!(world.acknowledge(0), Some(40));
        world.raise(41, true);
        assert_eq!(world.acknowledge(0), Some(41));
        world.raise(42, true);
        assert_eq!(world.acknowledge(0), None, "same priority");
        world.raise(43, true);
        assert_eq!(world.acknowledge(0), Some(43));
        for intid in 40..44 {
            world.raise(intid, false);
            assert!(world.read_bit(0, ISACTIVER, intid) == (intid != 42));
        }
        world.raise(42, true);
        world.end(0, 43);
        assert_eq!(world.acknowledge(0), None);
        world.end(0, 41);
        assert_eq!(world.acknowledge(0), Some(42), "with {lrs} list registers");
        world.raise(42, false);
        world.end(0, 42);
        world.end(0, 40);
        assert_eq!(world.drain(0), []);
        assert_eq!(world.read(0, GICD, ISACTIVER + 4), 0);
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn more_than_fit_come_in_order_of_priority() {
    for lrs in [1, 2, 4, 16] {
        for edge in [false, true] {
            let mut world = World::new(1, lrs);
            let intids: Vec<u16> = (32..92).collect();
            for &intid in &intids {
                world.set_edge(0, intid, edge);
                world.enable(0, intid, priority(intid));
            }
            for &intid in &intids {
                world.raise(intid, true);
            }
            let mut taken = Vec::new();
            while let Some(intid) = world.acknowledge(0) {
                world.raise(intid, false);
                world.end(0, intid);
                taken.push(intid);
            }
            assert!(taken.is_sorted_by_key(|&intid| priority(intid)), "{taken:?}");
            taken.sort_unstable();
            assert_eq!(taken, intids);
        }
    }

    fn priority(intid: u16) -> u8 {
        (intid.wrapping_mul(73) as u8) << 3
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn more_active_than_fit_end_in_order() {
    for lrs in [1, 2, 4] {
        let mut world = World::new(1, lrs);
        let intids: Vec<u16> = (40..56).collect();
        for &intid in &intids {
            world.enable(0, intid, 0xf0 - 8 * (intid - 40) as u8);
        }
        for &intid in &intids {
            world.raise(intid, true);
            assert_eq!(world.acknowledge(0), Some(intid));
            world.raise(intid, false);
        }
        assert_eq!(world.read(0, GICD, ISACTIVER + 4), 0xffff << 8);
        for (ended, &intid) in intids.iter().rev().enumerate() {
            world.end(0, intid);
            assert_eq!(world.read(0, GICD, ISACTIVER + 4), 0xffff >> (ended + 1) << 8, "with {lrs} list registers");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn in_eoi_mode_1_deactivation_comes_in_any_order() {
    for lrs in [1, 2, 4] {
        let mut world = World::new(2, lrs);
        for vcpu in 0..2 {
            world.cpu(vcpu).set_eoi_mode(true);
            world.resume(vcpu);
        }
        for intid in 40..46 {
            world.enable(0, intid, 0x80);
            world.raise(intid, true);
        }
        for intid in 40..46 {
            assert_eq!(world.acknowledge(0), Some(intid), "with {lrs} list registers");
            world.end(0, intid);
            assert!(world.read_bit(0, ISACTIVER, intid));
        }
        assert_eq!(world.acknowledge(0), None);
        for intid in [43, 40, 45] {
            world.deactivate(0, intid);
            assert_eq!(world.acknowledge(0), Some(intid), "still high");
            world.raise(intid, false);
            world.end(0, intid);
        }
        // From another vCPU.
        for intid in 40..46 {
            world.raise(intid, false);
            world.deactivate(1, intid);
            assert!(!world.read_bit(1, ISACTIVER, intid));
        }
        assert_eq!(world.drain(0), []);
    }
}

#[test]
fn in_eoi_mode_0_dir_has_no_effect() {
    let mut world = World::new(1, 4);
    world.enable(0, 40, 0x80);
    world.raise(40, true);
    assert_eq!(world.acknowledge(0), Some(40));
    world.exit(0);
    assert_eq!(world.gic().write_dir(0, 40), VcpuSet::EMPTY);
    world.enter(0);
    assert!(world.read_bit(0, ISACTIVER, 40));
}

#[test]
fn priority_mask_holds_back() {
    let mut world = World::new(1, 4);
    world.enable(0, 40, 0x80);
    world.cpu(0).set_mask(0x80);
    world.raise(40, true);
    assert_eq!(world.acknowledge(0), None);
    world.exit(0);
    assert!(!world.gic().wakes(0));
    world.enter(0);
    world.cpu(0).set_mask(0x88);
    world.exit(0);
    assert!(world.gic().wakes(0));
    world.enter(0);
    assert_eq!(world.acknowledge(0), Some(40));
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn sgis_go_from_each_to_each() {
    let vcpus = 20;
    let mut world = World::new(vcpus, 4);
    for vcpu in 0..vcpus {
        world.write(vcpu, sgi(vcpu), ISENABLER, 0xffff);
    }
    for from in 0..vcpus {
        for to in 0..vcpus {
            let intid = ((from + to) % 16) as u16;
            let aff = u64::from(affinity(to));
            let value = u64::from(intid) << 24 | (aff >> 8) << 16 | 1 << (aff & 0xff);
            world.send_sgi(from, SgiRegister::Sgi1, value);
            for vcpu in 0..vcpus {
                assert_eq!(world.drain(vcpu), if vcpu == to { vec![intid] } else { vec![] });
            }
        }
        // To all but itself.
        world.send_sgi(from, SgiRegister::Sgi1, 1 << 40 | 5 << 24 | 0xffff);
        for vcpu in 0..vcpus {
            assert_eq!(world.drain(vcpu), if vcpu == from { vec![] } else { vec![5] });
        }
    }
    // Several of one cluster, and targets that do not exist.
    world.send_sgi(0, SgiRegister::Sgi1, 7 << 24 | 1 << 16 | 0xffff);
    for vcpu in 0..vcpus {
        assert_eq!(world.drain(vcpu), if vcpu >= 16 { vec![7] } else { vec![] });
    }
    for absent in [1 << 48, 1 << 44, 1 << 32, 8 << 16] {
        world.send_sgi(0, SgiRegister::Sgi1, absent | 0xffff);
    }
    for vcpu in 0..vcpus {
        assert_eq!(world.drain(vcpu), []);
    }
}

#[test]
fn group_0_sgis_need_the_right_group() {
    let mut world = World::new(2, 4);
    world.write(1, sgi(1), ISENABLER, 0xffff);
    world.write(1, sgi(1), IGROUPR, 0xffff_fffe);
    for (register, expected) in
        [(SgiRegister::Sgi0, vec![0]), (SgiRegister::AliasSgi1, vec![0]), (SgiRegister::Sgi1, vec![0, 1])]
    {
        world.send_sgi(0, register, 0b10);
        world.send_sgi(0, register, 1 << 24 | 0b10);
        assert_eq!(world.drain(1), expected, "{register:?}");
    }
}

#[test]
fn an_sgi_to_a_busy_vcpu_is_not_lost() {
    let mut world = World::new(2, 1);
    world.write(1, sgi(1), ISENABLER, 0xffff);
    world.send_sgi(0, SgiRegister::Sgi1, 3 << 24 | 0b10);
    assert_eq!(world.acknowledge(1), Some(3));
    world.send_sgi(0, SgiRegister::Sgi1, 3 << 24 | 0b10);
    world.send_sgi(0, SgiRegister::Sgi1, 4 << 24 | 0b10);
    assert_eq!(world.acknowledge(1), None);
    world.end(1, 3);
    assert_eq!(world.drain(1), [3, 4]);
}

#[test]
fn a_timer_is_private() {
    let mut world = World::new(2, 4);
    for vcpu in 0..2 {
        world.enable(vcpu, 27, 0x80);
    }
    world.ppi(1, 27, true);
    assert_eq!(world.acknowledge(0), None);
    assert_eq!(world.acknowledge(1), Some(27));
    world.ppi(1, 27, false);
    world.end(1, 27);
    assert_eq!(world.drain(1), []);
}

/// SPI 40 has been disabled while it is in a list register of vCPU 1, which runs.
fn disabled_in_a_list_register() -> World {
    let mut world = World::new(2, 4);
    world.enable(0, 40, 0x80);
    world.route(0, 40, affinity(1).into());
    world.lazy = true;
    world.raise(40, true);
    world.flush();
    assert_eq!(world.cpu(1).0.used, 1);
    world.write_bit(0, ICENABLER, 40);
    assert_eq!(world.read(0, GICD, 0) >> 31, 1, "RWP until vCPU 1 has exited");
    world
}

#[test]
fn what_is_disabled_leaves_its_list_register() {
    let mut world = disabled_in_a_list_register();
    assert_eq!(world.read(0, rd(1), 0), 1 << 3);
    assert_eq!(world.read(0, rd(0), 0), 0);
    world.flush();
    assert_eq!(world.read(0, GICD, 0) >> 31, 0);
    assert_eq!(world.read(0, rd(1), 0), 0);
    assert_eq!(world.acknowledge(1), None);
    assert!(world.read_bit(0, ISPENDR, 40));
    world.write_bit(0, ISENABLER, 40);
    world.flush();
    assert_eq!(world.acknowledge(1), Some(40));
}

#[test]
fn a_vcpu_that_is_reset_is_not_waited_for() {
    let mut world = disabled_in_a_list_register();
    let _ = world.gic().reset_vcpu(1);
    assert_eq!(world.read(0, GICD, 0) >> 31, 0);
    assert_eq!(world.read(0, rd(1), 0), 0);
}

#[test]
fn pending_interrupts_follow_their_route() {
    let mut world = World::new(3, 4);
    world.enable(0, 40, 0x80);
    world.set_edge(0, 40, true);
    world.raise(40, true);
    world.route(0, 40, affinity(2).into());
    assert_eq!(world.acknowledge(0), None);
    // To nobody, and back.
    world.route(0, 40, 0x700);
    assert_eq!(world.acknowledge(2), None);
    assert!(world.read_bit(0, ISPENDR, 40));
    world.route(0, 40, affinity(2).into());
    assert_eq!(world.acknowledge(2), Some(40));
    // An active one ends where it was taken; the next edge goes the new way.
    world.route(0, 40, affinity(1).into());
    world.raise(40, true);
    assert_eq!(world.acknowledge(1), None);
    world.end(2, 40);
    world.resume(2);
    assert_eq!(world.acknowledge(2), None);
    assert_eq!(world.acknowledge(1), Some(40));
}

#[test]
fn one_of_n_goes_to_the_first_that_is_ready() {
    let mut world = World::new(3, 4);
    world.enable(0, 40, 0x80);
    world.set_edge(0, 40, true);
    world.route(0, 40, 1 << 31);
    world.raise(40, true);
    assert_eq!(world.drain(0), [40]);
    // Its groups are off.
    world.cpu(0).set_groups(0);
    world.resume(0);
    world.raise(40, true);
    assert_eq!((world.drain(0), world.drain(1)), (vec![], vec![40]));
    // Asleep; what is pending moves.
    world.cpu(1).set_mask(0);
    world.raise(40, true);
    world.write(1, rd(1), 0x14, 0b10);
    assert_eq!((world.drain(0), world.drain(1), world.drain(2)), (vec![], vec![], vec![40]));
    world.cpu(0).set_groups(0b10);
    world.resume(0);
    world.raise(40, true);
    assert_eq!(world.drain(0), [40]);
}

#[test]
fn the_distributor_can_be_off() {
    let mut world = World::new(1, 4);
    world.enable(0, 40, 0x80);
    world.enable(0, 41, 0x80);
    world.set_field(0, IGROUPR, 41, 1, 0);
    world.raise(40, true);
    world.raise(41, true);
    for (control, expected) in [(0, None), (0b01, Some(41)), (0b10, Some(40))] {
        world.write(0, GICD, 0, control);
        assert_eq!(world.acknowledge(0), expected);
        if let Some(intid) = expected {
            world.end(0, intid);
        }
    }
    world.write(0, GICD, 0, 0);
    assert_eq!(world.drain(0), []);
    world.exit(0);
    assert!(!world.gic().wakes(0));
}

#[test]
fn turning_the_distributor_off_waits_for_other_vcpus() {
    let mut world = World::new(2, 4);
    world.enable(1, 27, 0x80);
    world.ppi(1, 27, true);
    world.lazy = true;
    world.write(0, GICD, 0, 0);
    assert_eq!(world.read(0, GICD, 0) >> 31, 1);
    world.flush();
    assert_eq!(world.read(0, GICD, 0) >> 31, 0);
    assert_eq!(world.acknowledge(1), None);
}

#[test]
#[cfg_attr(miri, ignore = "takes Miri too long")]
fn a_group_that_the_guest_has_off_does_not_block_the_other() {
    let mut world = World::new(1, 2);
    for intid in 40..44 {
        world.enable(0, intid, 0x20);
        world.set_field(0, IGROUPR, intid, 1, 0);
        world.raise(intid, true);
    }
    world.cpu(0).set_groups(0b10);
    world.maintain(0);
    world.enable(0, 50, 0xa0);
    world.raise(50, true);
    assert_eq!(world.acknowledge(0), Some(50));
    world.raise(50, false);
    world.end(0, 50);
    assert_eq!(world.acknowledge(0), None);
    world.cpu(0).set_groups(0b11);
    world.maintain(0);
    assert_eq!(world.acknowledge(0), Some(40));
    world.end(0, 40);
    // Both are on, Group 0 has all list registers, and goes off.
    world.raise(50, true);
    world.cpu(0).set_groups(0b10);
    world.maintain(0);
    assert_eq!(world.acknowledge(0), Some(50));
}

#[test]
fn a_sleeping_redistributor_delivers_nothing_but_wakes() {
    let mut world = World::new(2, 4);
    world.enable(1, 27, 0x80);
    world.ppi(1, 27, true);
    world.lazy = true;
    world.write(0, rd(1), 0x14, 0b10);
    assert_eq!(world.read(0, rd(1), 0x14), 0b010, "its children are awake until it exits");
    world.flush();
    assert_eq!(world.read(0, rd(1), 0x14), 0b110);
    world.lazy = false;
    assert_eq!(world.acknowledge(1), None);
    world.cpu(1).set_groups(0);
    world.exit(1);
    assert!(world.gic().wakes(1));
    world.enter(1);
    world.cpu(1).set_groups(0b11);
    world.write(1, rd(1), 0x14, 0);
    assert_eq!(world.read(1, rd(1), 0x14), 0);
    assert_eq!(world.acknowledge(1), Some(27));
}

#[test]
fn software_sets_and_clears_pending_and_active() {
    let mut world = World::new(1, 4);
    world.enable(0, 40, 0x80);
    world.write_bit(0, ISPENDR, 40);
    assert_eq!(world.drain(0), [40], "a level, by the latch only once");
    world.write_bit(0, ISPENDR, 40);
    world.write_bit(0, ICPENDR, 40);
    assert_eq!(world.drain(0), []);
    world.raise(40, true);
    world.write_bit(0, ICPENDR, 40);
    assert!(world.read_bit(0, ISPENDR, 40), "the wire is high");
    world.write_bit(0, ISACTIVER, 40);
    assert_eq!(world.drain(0), []);
    world.write_bit(0, ICACTIVER, 40);
    assert_eq!(world.acknowledge(0), Some(40));
}

#[test]
fn activation_by_register_does_not_take_the_end_of_another() {
    let mut world = World::new(1, 1);
    for (intid, priority) in [(40, 0x80), (41, 0x08), (42, 0x10)] {
        world.set_edge(0, intid, true);
        world.enable(0, intid, priority);
    }
    world.raise(40, true);
    assert_eq!(world.acknowledge(0), Some(40));
    // One of them is in the list register, the other is above 40 among those that are not.
    world.write_bit(0, ISACTIVER, 41);
    world.write_bit(0, ISACTIVER, 42);
    world.end(0, 40);
    assert_eq!(world.read(0, GICD, ISACTIVER + 4), 0b110 << 8);
    world.raise(40, true);
    assert_eq!(world.drain(0), [40]);
}

#[test]
fn the_end_of_what_is_not_listed_leaves_what_is() {
    let mut world = World::new(1, 1);
    for (intid, priority) in [(40, 0x80), (41, 0x08)] {
        world.set_edge(0, intid, true);
        world.enable(0, intid, priority);
        world.raise(intid, true);
        assert_eq!(world.acknowledge(0), Some(intid));
    }
    world.resume(0);
    // Not in the order in which they were taken.
    world.end(0, 40);
    assert_eq!(world.read(0, GICD, ISACTIVER + 4), 0b10 << 8);
    world.end(0, 41);
    assert_eq!(world.read(0, GICD, ISACTIVER + 4), 0);
}

#[test]
fn what_another_vcpu_clears_is_not_found_in_the_list_register() {
    let mut world = World::new(2, 4);
    world.set_edge(0, 40, true);
    world.enable(0, 40, 0x80);
    world.route(0, 40, affinity(1).into());
    world.raise(40, true);
    world.write_bit(0, ICPENDR, 40);
    assert_eq!(world.drain(1), []);
    world.raise(40, true);
    assert_eq!(world.acknowledge(1), Some(40));
    world.write_bit(0, ICACTIVER, 40);
    assert!(!world.read_bit(0, ISACTIVER, 40));
    // An edge after the clearing counts.
    world.lazy = true;
    world.cpu(1).end(40);
    world.raise(40, true);
    world.flush();
    world.write_bit(0, ICPENDR, 40);
    world.raise(40, true);
    world.flush();
    assert_eq!(world.drain(1), [40]);
}

#[test]
fn a_read_of_active_state_waits_for_the_vcpu_that_has_it() {
    let mut world = World::new(2, 4);
    world.enable(0, 40, 0x80);
    world.route(0, 40, affinity(1).into());
    world.raise(40, true);
    // Behind the model's back: an acknowledge does not exit.
    assert_eq!(world.cpu(1).acknowledge(), Some(40));
    let exits = world.exits;
    assert!(world.read_bit(0, ISACTIVER, 40));
    assert!(!world.read_bit(0, ISPENDR, 41));
    assert_eq!(world.exits - exits, 4, "of each, for one read each");
    world.cpu(1).end(40);
    world.raise(40, false);
    assert!(!world.read_bit(0, ISACTIVER, 40));
    // Nothing in flight, no waiting.
    let exits = world.exits;
    assert!(!world.read_bit(0, ISACTIVER, 40));
    assert_eq!(world.exits - exits, 1);
}

#[test]
fn messages_raise_and_lower() {
    let mut world = World::new(1, 4);
    world.enable(0, 40, 0x80);
    world.enable(0, 41, 0x80);
    world.set_edge(0, 41, true);
    world.write(0, GICD, 0x40, 40);
    world.write(0, GICD, 0x40, 41);
    assert_eq!(world.acknowledge(0), Some(40));
    world.end(0, 40);
    assert_eq!(world.acknowledge(0), Some(40), "a level until it is cleared");
    world.write(0, GICD, 0x48, 40);
    world.end(0, 40);
    assert_eq!(world.drain(0), [41]);
    world.write(0, GICD, 0x40, 41);
    world.write(0, GICD, 0x48, 41);
    assert_eq!(world.drain(0), [], "an edge that was withdrawn");
    // The wire and the message do not lower each other.
    world.raise(40, true);
    world.write(0, GICD, 0x48, 40);
    assert_eq!(world.acknowledge(0), Some(40));
    // Private ones, and those that do not exist.
    for intid in [0, 27, 31, 96, 1019, 1023] {
        world.write(0, GICD, 0x40, intid);
    }
    world.check();
}

#[test]
fn the_host_raises_its_own_spis_only() {
    let mut world = World::reset(1, 992, 4);
    world.gic().give_to_host(40).unwrap();
    assert!(world.gic().raise_spi(40, true).is_ok());
    for intid in [0, 15, 16, 27, 31, 41, 1019, 1020, 1023, 8192, 0x1_0028, u32::MAX] {
        assert_eq!(world.gic().raise_spi(intid, true), Err(NotAllowed), "{intid}");
    }
    for intid in [0, 27, 31, 1020, 1023, 0x1_0028, u32::MAX] {
        assert_eq!(world.gic().give_to_host(intid), Err(NotAllowed), "{intid}");
    }
    for intid in [0, 15, 32, 0x1_001b, u32::MAX] {
        assert_eq!(world.gic().set_ppi_level(0, intid, true), Err(NotAllowed), "{intid}");
    }
}

#[test]
fn a_vcpu_does_not_run_twice() {
    let mut world = World::new(1, 4);
    assert!(prepare(&mut world.gic(), 0, 4).is_none());
    assert!(prepare(&mut world.gic(), 1, 4).is_none());
    let state = world.cpu(0).0;
    world.exit(0);
    assert_eq!(world.gic().after_exit(0, &state), VcpuSet::EMPTY);
    assert!(prepare(&mut world.gic(), 0, 0).is_some(), "at least one list register");
}

#[test]
fn an_entry_that_did_not_happen_changes_nothing() {
    let mut world = World::new(1, 2);
    for intid in 40..46 {
        world.enable(0, intid, 0x80);
        world.set_edge(0, intid, intid % 2 == 0);
        world.raise(intid, true);
    }
    assert_eq!(world.acknowledge(0), Some(40));
    world.exit(0);
    let before = world.vcpus.clone();
    world.enter(0);
    world.exit(0);
    let mut after = world.vcpus.clone();
    after[0].listed = before[0].listed;
    assert_eq!(before, after);
}

#[test]
fn a_vcpu_that_is_turned_on_again_starts_with_everything_masked() {
    let mut world = World::new(2, 4);
    world.enable(0, 40, 0x80);
    world.route(0, 40, 1 << 31);
    world.raise(40, true);
    world.exit(0);
    let kick = world.gic().reset_interface(0);
    assert_eq!(kick, VcpuSet::of(1));
    world.kick(kick);
    world.enter(0);
    assert_eq!((world.acknowledge(0), world.acknowledge(1)), (None, Some(40)));
}
