//! The registers themselves, by section of Arm IHI 0069.

use super::world::{
    GICD, ICACTIVER, ICENABLER, ICFGR, ICPENDR, IGROUPR, IPRIORITYR, ISACTIVER, ISENABLER, ISPENDR, World, prepare, rd,
    sgi,
};
use crate::{
    Access, Distributor, Frame, Gic, Outcome, SgiRegister, Spi, Unsupported, VcpuGic, VcpuSet, Vcpus, affinity,
    ich::HCR_VGRP0EIE,
};

const CTLR_ARE_DS: u64 = 1 << 4 | 1 << 6;

/// 12.9 GICD_CTLR, 12.9 GICD_TYPER, 12.9 GICD_IIDR, 12.9 GICD_PIDR2.
#[test]
fn the_distributor_says_what_it_is() {
    for spis in [32, 64, 992] {
        let mut world = World::reset(1, spis, 4);
        world.enter(0);
        assert_eq!(world.read(0, GICD, 0), CTLR_ARE_DS);
        world.write(0, GICD, 0, 0xffff_ffff);
        assert_eq!(world.read(0, GICD, 0), CTLR_ARE_DS | 0b11);
        world.write(0, GICD, 0, 0);
        assert_eq!(world.read(0, GICD, 0), CTLR_ARE_DS, "ARE and DS are RAO/WI");
        let typer = world.read(0, GICD, 4);
        assert_eq!(typer & 0x1f, spis as u64 / 32, "ITLinesNumber");
        assert_eq!(typer >> 19 & 0x1f, 9, "IDbits");
        assert_eq!((typer >> 16 & 1, typer >> 17 & 1, typer >> 10 & 1), (1, 0, 0), "MBIS, LPIS, SecurityExtn");
        assert_eq!(typer >> 25 & 1, 0, "1 of N is supported");
        assert_eq!(world.read(0, GICD, 0xffe8) >> 4 & 0xf, 3, "ArchRev");
        assert_eq!(world.read(0, GICD, 8), world.read(0, rd(0), 4));
    }
}

/// 12.11 GICR_TYPER, GICR_PIDR2, GICR_WAKER, GICR_CTLR.
#[test]
fn redistributors_say_whose_they_are() {
    let mut world = World::reset(18, 32, 4);
    world.enter(0);
    for vcpu in 0..18 {
        let typer = world.access(0, rd(vcpu), 8, Access::Read { size: 8 });
        assert_eq!(typer >> 32, u64::from(affinity(vcpu)));
        assert_eq!(typer >> 8 & 0xffff, vcpu as u64);
        assert_eq!(typer >> 4 & 1 != 0, vcpu == 17, "Last");
        assert_eq!(world.read(0, rd(vcpu), 8) | world.read(0, rd(vcpu), 0xc) << 32, typer);
        assert_eq!(world.read(0, rd(vcpu), 0xffe8) >> 4 & 0xf, 3);
        assert_eq!((world.read(0, rd(vcpu), 0), world.read(0, rd(vcpu), 0x14)), (0, 0));
        world.write(0, rd(vcpu), 0, 0xffff_ffff);
        assert_eq!(world.read(0, rd(vcpu), 0), 0, "no LPIs, no DPG");
    }
}

/// 12.9 and 12.11: IGROUPR, ISENABLER, ISPENDR, ISACTIVER and their counterparts.
#[test]
fn banks_of_bits() {
    let mut world = World::reset(2, 64, 4);
    world.enter(0);
    for (frame, offset) in [(sgi(0), 0), (sgi(1), 0), (GICD, 4), (GICD, 8)] {
        assert_eq!(world.read(0, frame, IGROUPR + offset), 0xffff_ffff, "Group 1, as firmware leaves it");
        world.write(0, frame, IGROUPR + offset, 0x1234_5678);
        assert_eq!(world.read(0, frame, IGROUPR + offset), 0x1234_5678);
        for (set, clear) in [(ISENABLER, ICENABLER), (ISPENDR, ICPENDR), (ISACTIVER, ICACTIVER)] {
            assert_eq!(world.read(0, frame, set + offset), 0);
            world.write(0, frame, set + offset, 0xf0f0_1234);
            world.write(0, frame, set + offset, 0x1);
            assert_eq!(world.read(0, frame, set + offset), 0xf0f0_1235);
            assert_eq!(world.read(0, frame, clear + offset), 0xf0f0_1235);
            world.write(0, frame, clear + offset, 0xf000_0005);
            assert_eq!(world.read(0, frame, set + offset), 0x00f0_1230);
            world.write(0, frame, clear + offset, 0xffff_ffff);
            assert_eq!(world.read(0, frame, clear + offset), 0);
        }
        world.check();
    }
    assert_eq!(world.read(0, GICD, IGROUPR + 12), 0, "beyond the last SPI");
    // With affinity routing, the distributor has nothing of SGIs and PPIs, nor legacy registers.
    for offset in [IGROUPR, ISENABLER, ISPENDR, ISACTIVER, IPRIORITYR, ICFGR, ICFGR + 4, 0x800, 0xd04, 0xe08, 0xf00] {
        world.write(0, GICD, offset, 0xffff_ffff);
        assert_eq!(world.read(0, GICD, offset), 0, "{offset:#x}");
    }
    // Nor has a redistributor those of SPIs.
    for offset in [IGROUPR + 4, ISENABLER + 4, IPRIORITYR + 32, ICFGR + 8] {
        world.write(0, sgi(0), offset, 0xffff_ffff);
        assert_eq!(world.read(0, sgi(0), offset), 0, "{offset:#x}");
    }
}

/// 12.9 GICD_IPRIORITYR<n>, 12.11 GICR_IPRIORITYR<n>: by byte and by word, unimplemented bits are RAZ/WI (4.8).
#[test]
fn priorities() {
    let mut world = World::reset(1, 32, 4);
    world.enter(0);
    for (frame, offset) in [(sgi(0), IPRIORITYR + 4), (GICD, IPRIORITYR + 0x28)] {
        world.write(0, frame, offset, 0x1234_56ff);
        assert_eq!(world.read(0, frame, offset), 0x1030_50f8);
        world.access(0, frame, offset + 1, Access::Write { size: 1, value: 0xffa8 });
        assert_eq!(world.access(0, frame, offset + 1, Access::Read { size: 1 }), 0xa8);
        assert_eq!(world.read(0, frame, offset), 0x1030_a8f8);
    }
    assert_eq!(world.read(0, GICD, IPRIORITYR + 0x3f8), 0);
}

/// 12.9 GICD_ICFGR<n>, 12.11 GICR_ICFGR0 and GICR_ICFGR1.
#[test]
fn configuration() {
    let mut world = World::reset(1, 32, 4);
    world.enter(0);
    assert_eq!(world.read(0, sgi(0), ICFGR), 0xaaaa_aaaa);
    world.write(0, sgi(0), ICFGR, 0);
    assert_eq!(world.read(0, sgi(0), ICFGR), 0xaaaa_aaaa, "SGIs are edge-triggered");
    for (frame, offset) in [(sgi(0), ICFGR + 4), (GICD, ICFGR + 8), (GICD, ICFGR + 12)] {
        assert_eq!(world.read(0, frame, offset), 0);
        world.write(0, frame, offset, 0xffff_0009);
        assert_eq!(world.read(0, frame, offset), 0xaaaa_0008);
    }
}

/// 12.9 GICD_IROUTER<n>, whole and in halves.
#[test]
fn routes() {
    let mut world = World::reset(1, 992, 4);
    world.enter(0);
    for intid in [32, 100, 1019] {
        let offset = 0x6000 + 8 * intid;
        assert_eq!(world.access(0, GICD, offset, Access::Read { size: 8 }), 0);
        world.access(0, GICD, offset, Access::Write { size: 8, value: u64::MAX });
        assert_eq!(world.access(0, GICD, offset, Access::Read { size: 8 }), 0x80ff_ffff, "no Aff3");
        world.write(0, GICD, offset + 4, 0xff);
        world.write(0, GICD, offset, 0x0102_0304);
        assert_eq!(world.access(0, GICD, offset, Access::Read { size: 8 }), 0x02_0304);
        assert_eq!((world.read(0, GICD, offset), world.read(0, GICD, offset + 4)), (0x02_0304, 0));
    }
    for intid in [0, 31, 1020, 1023] {
        let offset = 0x6000 + 8 * intid;
        world.access(0, GICD, offset, Access::Write { size: 8, value: 1 });
        assert_eq!(world.access(0, GICD, offset, Access::Read { size: 8 }), 0);
    }
    world.check();
}

/// 12.9: the last SPIs that 31 groups of 32 leave room for are reserved.
#[test]
fn reserved_intids_have_no_state() {
    let mut world = World::reset(1, 992, 4);
    world.enter(0);
    for bank in [IGROUPR, ISENABLER, ISPENDR, ISACTIVER] {
        world.write(0, GICD, bank + 4 * 31, 0xffff_ffff);
        assert_eq!(world.read(0, GICD, bank + 4 * 31), 0x0fff_ffff);
    }
    world.check();
}

/// 12.1.3: other sizes than a register allows read as zero and are ignored.
#[test]
fn sizes() {
    let mut world = World::reset(1, 32, 4);
    world.enter(0);
    for (frame, offset, allowed) in [
        (GICD, 0, &[4][..]),
        (GICD, 4, &[4]),
        (GICD, ISENABLER + 4, &[4]),
        (GICD, IPRIORITYR + 32, &[1, 4]),
        (GICD, 0x6000 + 8 * 32, &[4, 8]),
        (sgi(0), ISENABLER, &[4]),
        (rd(0), 8, &[4, 8]),
    ] {
        world.access(0, GICD, 0x6000 + 8 * 32, Access::Write { size: 8, value: 1 });
        world.write(0, GICD, IPRIORITYR + 32, 0xf8f8_f8f8);
        world.write(0, GICD, ISENABLER + 4, 0xffff_ffff);
        world.write(0, sgi(0), ISENABLER, 0xffff_ffff);
        for size in [1, 2, 4, 8].into_iter().filter(|size| offset % u64::from(*size) == 0) {
            let full = world.access(0, frame, offset, Access::Read { size });
            assert_eq!(full != 0, allowed.contains(&size), "{offset:#x} in {size}");
            if !allowed.contains(&size) {
                world.access(0, frame, offset, Access::Write { size, value: 0 });
            }
        }
        assert_eq!(world.read(0, GICD, IPRIORITYR + 32), 0xf8f8_f8f8);
        assert_eq!(world.read(0, GICD, 0x6000 + 8 * 32), 1);
    }
    // A message has 16 bits at least.
    world.access(0, GICD, 0x40, Access::Write { size: 1, value: 40 });
    assert!(!world.read_bit(0, ISPENDR, 40));
    world.access(0, GICD, 0x40, Access::Write { size: 2, value: 40 });
    assert!(world.read_bit(0, ISPENDR, 40));
}

#[test]
fn accesses_that_do_not_exist() {
    let mut world = World::reset(2, 32, 4);
    let mut refused = |vcpu, frame, offset, size| {
        let mut gic = world.gic();
        assert_eq!(gic.mmio(vcpu, frame, offset, Access::Read { size }), Err(Unsupported));
        assert_eq!(gic.mmio(vcpu, frame, offset, Access::Write { size, value: u64::MAX }), Err(Unsupported));
    };
    for frame in [GICD, rd(0), sgi(1)] {
        for size in [0, 3, 5, 16, 255] {
            refused(0, frame, 0, size);
        }
        for offset in [0x1_0000, 0x2_0000, u64::MAX - 7, 1 << 63] {
            refused(0, frame, offset, 4);
        }
        for (offset, size) in [(1, 4), (2, 4), (1, 2), (4, 8), (u64::MAX, 1)] {
            refused(0, frame, offset, size);
        }
        refused(2, frame, 0, 4);
        refused(usize::MAX, frame, 0, 4);
    }
    for vcpu in [2, 128, usize::MAX] {
        refused(0, rd(vcpu), 0, 4);
        refused(0, sgi(vcpu), 0x100, 4);
    }
}

#[test]
fn sizes_of_storage() {
    assert_eq!((size_of::<Distributor>(), size_of::<Spi>(), size_of::<VcpuGic>()), (32, 8, 336));
    let _: Frame = GICD;
}

/// A vCPU that is configured but not made yet.
#[test]
fn redistributors_can_be_walked_before_all_vcpus_exist() {
    struct Sparse(VcpuGic);
    impl Vcpus for Sparse {
        fn count(&self) -> usize {
            2
        }
        fn get(&self, vcpu: usize) -> Option<&VcpuGic> {
            (vcpu == 1).then_some(&self.0)
        }
        fn get_mut(&mut self, vcpu: usize) -> Option<&mut VcpuGic> {
            (vcpu == 1).then_some(&mut self.0)
        }
    }
    let (mut distributor, mut spis, mut vcpus) = (Distributor::default(), [Spi::default(); 32], Sparse(VcpuGic::new()));
    let mut gic = Gic::new(&mut distributor, &mut spis, &mut vcpus);
    gic.reset_distributor();
    let mut read = |frame, offset| gic.mmio(1, frame, offset, Access::Read { size: 4 });
    let done = |value| Ok(Outcome::Done { value, kick: VcpuSet::EMPTY });
    assert_eq!((read(rd(0), 8), read(rd(1), 8)), (done(0), done(1 << 8 | 1 << 4)));
    assert_eq!(read(rd(0), 0xffe8), done(0x30));
    assert_eq!(read(sgi(0), ICFGR), done(0));
    assert_eq!(read(rd(2), 8), Err(Unsupported));
    // Nothing is delivered to it, nor lost.
    assert_eq!(gic.send_sgi(1, SgiRegister::Sgi1, 1 << 40), VcpuSet::EMPTY);
    let _ = gic.mmio(1, GICD, ISENABLER + 4, Access::Write { size: 4, value: 1 }).unwrap();
    let _ = gic.mmio(1, GICD, 0, Access::Write { size: 4, value: 3 }).unwrap();
    gic.give_to_host(32).unwrap();
    assert_eq!(gic.raise_spi(32, true), Ok(VcpuSet::EMPTY));
    let route = Access::Write { size: 8, value: 1 };
    assert_eq!(gic.mmio(0, GICD, 0x6000 + 8 * 32, route), Err(Unsupported));
    let _ = gic.mmio(1, GICD, 0x6000 + 8 * 32, route).unwrap();
    assert_eq!(prepare(&mut gic, 1, 4).unwrap().hcr & HCR_VGRP0EIE << 2, HCR_VGRP0EIE << 2);
}
