//! CPUs that work on the same pages at the same time.

use std::thread;

use ravelin_memory::IpaRange;

use super::*;
use crate::{Gift, GuestKind, GuestMemory, GuestPage, Unshare};

/// A pseudo-random sequence (xorshift), the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Miri is here for the threads, and would spend most of its time on this.
fn check(rig: &Rig<'_>) {
    rig.machine.assert_quiescent();
    if !cfg!(miri) {
        rig.check();
    }
}

#[test]
fn four_cpus_hammer_overlapping_ranges() {
    // Miri has the time for little RAM, and none for blocks.
    let layout = Layout { tables: 48, ..if cfg!(miri) { little() } else { small() } };
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let total = rig.counts();
    let rounds = if cfg!(miri) { 4 } else { 200 };
    let succeeded: u64 = thread::scope(|scope| {
        let hammer = |seed: u64| {
            let rig = &rig;
            move || {
                let mut random = Random(seed);
                let mut succeeded = 0;
                for _ in 0..rounds {
                    let base = GIB + random.below(if cfg!(miri) { 6 } else { 1030 }) * PAGE;
                    let pages = [1, 1, 3, if cfg!(miri) { 2 } else { 512 }][usize::try_from(random.below(4)).unwrap()];
                    let call = CALLS[usize::try_from(random.below(6)).unwrap()];
                    let result = call.on(&rig.memory, &rig.machine, range(base, pages));
                    succeeded += u64::from(result.is_ok());
                    let _ = rig.memory.host_fault(&rig.machine, Ipa::new(base).unwrap());
                    let _ = rig.memory.page_state(addr(base));
                }
                succeeded
            }
        };
        let cpus: Vec<_> = (1..5).map(|cpu| scope.spawn(hammer(cpu * 0x0e37_79b9_7f4a_7c15))).collect();
        cpus.into_iter().map(|cpu| cpu.join().unwrap()).sum()
    });
    assert!(succeeded > rounds / 4, "only {succeeded} calls succeeded");
    check(&rig);
    let counts = rig.counts();
    let pages = |counts: &Counts| counts.host_owned + counts.host_shared + counts.hyp_owned + counts.hyp_donated;
    assert_eq!(pages(&counts), pages(&total));
}

/// Little RAM, from `GIB` on.
fn little() -> Layout {
    Layout { ram: vec![range(GIB, 1024)], carve_out: range(GIB + 2 * MIB, 512), ..small() }
}

/// Makes a guest of the first pages of [`little`] RAM, `tables` of them for tables.
fn guest_of(rig: &Rig<'_>, kind: GuestKind, tables: u64) -> GuestMemory {
    let (memory, machine, geometry) = (&rig.memory, &rig.machine, Geometry::stage2(40).unwrap());
    memory.keep(machine, range(GIB, 2)).unwrap();
    let guest = memory.new_guest(machine, 0, kind, geometry, addr(GIB)).unwrap();
    machine.add_root(Stage::Guest(guest.vttbr().vmid), addr(GIB), geometry);
    memory.add_guest_tables(machine, &guest, range(GIB + 2 * PAGE, tables)).unwrap();
    guest
}

#[test]
fn a_guest_and_its_host_convert_the_same_pages() {
    convert_the_same_pages(GuestKind::Pkvm);
}

#[test]
fn a_realm_and_its_host_convert_the_same_pages() {
    convert_the_same_pages(GuestKind::Realm);
}

/// A guest converts its pages and the host claims what it finds offered, both without a plan.
fn convert_the_same_pages(kind: GuestKind) {
    const FRAME: u64 = 0x8000_0000;
    let layout = little();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let guest = guest_of(&rig, kind, 6);
    let (memory, machine) = (&rig.memory, &rig.machine);
    let pages = range(GIB + 8 * PAGE, 4);
    memory.give(machine, &guest, pages, Ipa::new(FRAME).unwrap(), Gift::Donated).unwrap();
    let rounds = if cfg!(miri) { 3 } else { 300 };

    let frame = |random: &mut Random| IpaRange::new(FRAME + random.below(4) * PAGE, 1).unwrap();
    let shared = thread::scope(|scope| {
        let guests = scope.spawn(|| {
            let (mut random, mut shared) = (Random(0x0e37_79b9_7f4a_7c15), 0);
            for _ in 0..rounds {
                let frames = frame(&mut random);
                if memory.guest_share(machine, &guest, frames).is_ok() {
                    shared += 1;
                } else if memory.guest_unshare(machine, &guest, frames) == Ok(Unshare::Done(1)) {
                    // Nobody but the guest can offer it again.
                    let page = addr(pages.base().raw() + frames.base().raw() - FRAME);
                    assert_eq!(memory.page_state(page).state, HostState::NoPage);
                    assert_eq!(memory.host_fault(machine, page.identity_ipa()), HostFault::Denied);
                }
            }
            shared
        });
        scope.spawn(|| {
            let mut random = Random(0x1234_5678_9abc_def1);
            for _ in 0..rounds {
                let frames = frame(&mut random);
                if memory.claim(machine, &guest, frames).is_ok() {
                    // Nobody but the host ends its claim.
                    let page = addr(pages.base().raw() + frames.base().raw() - FRAME);
                    assert_eq!(memory.host_fault(machine, page.identity_ipa()), HostFault::Resolved);
                    assert!(rig.host_reaches(page.raw()));
                    assert_eq!(memory.guest_page(machine, &guest, frames.base()), GuestPage::Claimed);
                    memory.release(machine, &guest, frames).unwrap();
                    assert!(!rig.host_reaches(page.raw()));
                }
            }
        });
        guests.join().unwrap()
    });
    assert!(shared >= 1, "the first share of a frame succeeds");
    check(&rig);
    assert_eq!(memory.check_guest(machine, &guest), Ok(()));
}

#[test]
fn vcpus_of_a_realm_convert_pages_of_the_same_blocks_and_of_others() {
    const FRAME: u64 = 0x8000_0000;
    let layout = little();
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let guest = guest_of(&rig, GuestKind::Realm, 12);
    let (memory, machine) = (&rig.memory, &rig.machine);
    // Two pages in each of three blocks of frames.
    let frame = |number: u64| FRAME + number / 2 * 2 * MIB + number % 2 * PAGE;
    let page = |number: u64| addr(GIB + (16 + number) * PAGE);
    for number in 0..6 {
        machine.poke(page(number), 100 + number);
        let at = Ipa::new(frame(number)).unwrap();
        memory.give(machine, &guest, PhysRange::single(page(number)), at, Gift::Donated).unwrap();
    }
    let rounds = if cfg!(miri) { 3 } else { 300 };
    let converted: u64 = thread::scope(|scope| {
        let vcpus: Vec<_> = (1..4)
            .map(|vcpu| {
                let guest = &guest;
                scope.spawn(move || {
                    let (mut random, mut converted) = (Random(vcpu * 0x0e37_79b9_7f4a_7c15), 0);
                    for _ in 0..rounds {
                        let number = random.below(6);
                        let pages = 1 + random.below(2) * (1 - number % 2);
                        let frames = IpaRange::new(frame(number), pages).unwrap();
                        let unshared = memory.guest_unshare(machine, guest, frames) == Ok(Unshare::Done(pages));
                        let shared = !unshared && memory.guest_share(machine, guest, frames) == Ok(pages);
                        converted += u64::from(unshared || shared);
                        // A page is somewhere at any time.
                        let found = memory.guest_page(machine, guest, frames.base());
                        assert!(matches!(found, GuestPage::Private | GuestPage::Offered), "{found:?}");
                        assert_ne!(memory.guest_run(machine, guest, frames).0, GuestPage::Absent);
                    }
                    converted
                })
            })
            .collect();
        vcpus.into_iter().map(|vcpu| vcpu.join().unwrap()).sum()
    });
    assert!(converted >= rounds, "only {converted} conversions");
    check(&rig);
    assert_eq!(memory.check_guest(machine, &guest), Ok(()));
    for number in 0..6 {
        assert_eq!(machine.peek(page(number)), 100 + number);
    }
}

#[test]
fn cpus_work_in_different_regions_and_across_them() {
    // Three regions. Miri has the time for little of each.
    let end = if cfg!(miri) { 6 * PAGE } else { 4 * MIB };
    let layout = Layout {
        ram: [GIB, 2 * GIB, 3 * GIB].map(|base| range(base + GIB - end, 2 * end / PAGE)).into(),
        carve_out: range(4 * GIB + end - PAGE, 1),
        ..small()
    };
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let total = rig.counts();
    let (cpus, rounds) = if cfg!(miri) { (2, 1) } else { (4, 150) };
    thread::scope(|scope| {
        for cpu in 1..=cpus {
            let rig = &rig;
            scope.spawn(move || {
                let mut random = Random(cpu * 0x0e37_79b9_7f4a_7c15);
                for _ in 0..rounds {
                    // Every other range begins in one region and ends in the next.
                    let border = (2 + random.below(3)) * GIB;
                    let (before, pages) = [(random.below(end / PAGE) + 1, 1), (2, 4)][random.below(2) as usize];
                    let base = border - before * PAGE;
                    let call = CALLS[random.below(6) as usize];
                    let _ = call.on(&rig.memory, &rig.machine, range(base, pages));
                    let _ = rig.memory.host_fault(&rig.machine, Ipa::new(base).unwrap());
                    let _ = rig.counts();
                }
            });
        }
    });
    check(&rig);
    let pages = |counts: &Counts| counts.host_owned + counts.host_shared + counts.hyp_owned + counts.hyp_donated;
    assert_eq!(pages(&rig.counts()), pages(&total));
}
