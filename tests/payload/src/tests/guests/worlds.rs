//! Several VMs, vCPUs and CPUs: each world has its own memory, translations and registers.

use ravelin_abi::{Status, VmKind};
use spin::Mutex;

use crate::{
    rt::{
        cpu,
        memory::{self, BLOCK, GIB, PAGE},
        platform::platform,
        vm::{Guest, MEMORY, PROTECTED, Pages, Vm, code, refused, succeed},
    },
    tests::{
        Failure, OWNED, Outcome, arena, check_eq,
        guests::convert::{CLAIMED, host_fills, host_finds},
        on_all_cpus, state, statistics,
    },
};

const MIB: u64 = 1 << 20;

/// Fails with the first failure that the closure has on any of the CPUs, each of which does it with its own number.
fn on_cpus(count: usize, body: impl Fn(usize) -> Outcome + Sync) -> Outcome {
    on_all_cpus(|cpu| if cpu < count { body(cpu) } else { Ok(()) })
}

/// VMs that run in turn on one CPU, and at once on several, with other memory at the same guest address.
pub(crate) fn vms_do_not_see_each_other() -> Outcome {
    let pages = Pages::new(8 * MIB);
    let kinds = VmKind::ALL;
    let make = |index: usize| -> Result<(Vm<'_>, u64), Failure> {
        let vm = Vm::boot(&pages, kinds[index % kinds.len()], 1)?;
        let address = vm.add(MEMORY, 1)?;
        vm.guest(0).fill(MEMORY, 1, address, index as u64)?;
        Ok((vm, address))
    };
    let [a, b, c] = [make(0)?, make(1)?, make(2)?];
    let all = [&a, &b, &c];
    for round in 0..10_u64 {
        for (vm, address) in all {
            // Warm, and then a word that only this VM has.
            let mut guest = vm.guest(0);
            let word = MEMORY + 8 * (round % 8);
            check_eq!(guest.load(word)?, memory::pattern(*address, round % 8, seed_of(vm, all)), "{word:#x}");
        }
    }
    on_cpus(3, |cpu| {
        for _ in 0..10 {
            let (vm, address) = all[cpu];
            vm.guest(0).compare(MEMORY, 1, *address, cpu as u64)?;
        }
        Ok(())
    })?;
    for (vm, _) in all {
        vm.end()?;
    }
    pages.are_owned()
}

fn seed_of(vm: &Vm<'_>, all: [&(Vm<'_>, u64); 3]) -> u64 {
    all.iter().position(|(other, _)| other.handle == vm.handle).map_or(0, |index| index as u64)
}

/// A VM comes in the place of one that is gone, on the CPU that has run that one: nothing is left of its translations.
pub(crate) fn nothing_is_left_in_the_tlb() -> Outcome {
    let cpus = platform().cpus.len();
    let pages = Pages::new(8 * MIB);
    let mark = pages.mark();
    for round in 0..6_u64 {
        pages.reset(mark);
        // Other pages at the same guest address each time.
        pages.take(round * 16)?;
        let vm = Vm::boot(&pages, PROTECTED[round as usize % 2], 1)?;
        let address = pages.take(2)?;
        host_fills(address, 2, round);
        vm.map(MEMORY, address, 2)?;
        let runs_on = |cpu: usize| {
            let outcome = Mutex::new(Ok(()));
            let job = |_: usize| {
                *outcome.lock() = (|| {
                    let mut guest = vm.guest(0);
                    check_eq!(guest.load(MEMORY)?, memory::pattern(address, 0, round), "the first word");
                    guest.compare(MEMORY, 2, address, round)
                })();
            };
            if cpu == cpu::this() {
                job(cpu)
            } else {
                cpu::run_on(&[cpu], &job, || ())
            }
            outcome.into_inner()
        };
        (0..cpus).try_for_each(runs_on)?;
        vm.finish()?;
    }
    Ok(())
}

/// As many vCPUs as CPUs, each on each of them in turn, all at the same time.
pub(crate) fn vcpus_on_all_cpus() -> Outcome {
    let count = platform().cpus.len().min(4);
    for kind in PROTECTED {
        let pages = Pages::new(8 * MIB);
        let vm = Vm::boot(&pages, kind, count as u64)?;
        // Pages of all of them in one block, and one for each in a block of its own.
        let address = vm.add(MEMORY, 2 * count as u64)?;
        let apart = |index: u64| MEMORY + (index + 1) * BLOCK;
        let mut addresses_apart = [0; 4];
        for (index, address) in (0..count as u64).zip(&mut addresses_apart) {
            *address = vm.add(apart(index), 1)?;
        }
        let mut first = vm.guest(0);
        for index in 1..count as u64 {
            first.turn_on(index)?;
        }
        for round in 0..4 * platform().effort() {
            on_cpus(count, |cpu| {
                // It comes to another CPU each time.
                let index = (cpu as u64 + round) % count as u64;
                let mut guest = vm.guest(index);
                let offset = 2 * index * PAGE;
                if round != 0 {
                    guest.compare(MEMORY + offset, 2, address + offset, round - 1)?;
                    let [el0, el1, read_only, ..] = guest.run(read_thread_registers(), &[])?;
                    check_eq!([el0, el1, read_only], [round, index, !round], "its registers");
                }
                guest.run(write_thread_registers(), &[round + 1, index, !(round + 1)])?;
                guest.fill(MEMORY + offset, 2, address + offset, round)?;
                for (at, address) in
                    [(MEMORY + offset, address + offset), (apart(index), addresses_apart[index as usize])]
                {
                    guest.fill(at, 1, address, round)?;
                    guest.share(at, 1)?;
                    vm.claim(at, 1)?;
                    host_finds(address, 1, round)?;
                    vm.release(at, 1)?;
                    guest.unshare(at, 1)?;
                    guest.compare(at, 1, address, round)?;
                }
                Ok(())
            })?;
        }
        vm.finish()?;
    }
    Ok(())
}

code::snippets! {
    /// Reads the registers that are the thread's.
    read_thread_registers: "mrs x0, tpidr_el0", "mrs x1, tpidr_el1", "mrs x2, tpidrro_el0";

    /// Writes them.
    write_thread_registers: "msr tpidr_el0, x0", "msr tpidr_el1, x1", "msr tpidrro_el0, x2";

    /// Reads TTBR0_EL1.
    read_tables: "mrs x0, ttbr0_el1";

    /// Uses the tables at x0, without removing what the TLB has of others.
    use_tables: "dsb ish", "msr ttbr0_el1, x0", "isb";
}

/// Two vCPUs of a VM with other tables under the same ASID, in turn on one CPU: each has its own translations.
pub(crate) fn vcpus_have_their_own_translations() -> Outcome {
    const HERE: u64 = 2 << 39;
    const BLOCK_DESCRIPTOR: u64 = 0x0040_0000_0000_0701;
    let pages = Pages::new(8 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 2)?;
    vm.donate_tables(8)?;
    // The same virtual address leads to two pages, a gigabyte apart.
    let places = [MEMORY, MEMORY + GIB];
    for place in places {
        vm.add(place, 1)?;
    }
    vm.add(MEMORY + BLOCK, 4)?;
    vm.guest(0).turn_on(1)?;
    for (index, place) in places.into_iter().enumerate() {
        let mut guest = vm.guest(index as u64);
        let [top, next] = [0, 1].map(|page| MEMORY + BLOCK + (2 * index as u64 + page) * PAGE);
        let old = guest.run(read_tables(), &[])?[0];
        for entry in 0..2 {
            let value = guest.load(old + 8 * entry)?;
            guest.store(top + 8 * entry, value)?;
        }
        guest.store(top + 16, next | 3)?;
        guest.store(next, (place / GIB * GIB) | BLOCK_DESCRIPTOR)?;
        guest.store(place, 0x100 + index as u64)?;
        guest.run(use_tables(), &[top])?;
    }
    for round in 0..10 {
        for index in 0..2 {
            let found = vm.guest(index).load(HERE | (MEMORY % GIB))?;
            check_eq!(found, 0x100 + index, "what vCPU {index} finds in round {round}");
        }
    }
    vm.finish()
}

/// A gigabyte of blocks in one call each.
pub(crate) fn gigabyte() -> Outcome {
    const AT: u64 = 4 * GIB;
    const COUNT: u64 = GIB / PAGE;
    for kind in PROTECTED {
        let big = arena(GIB);
        let pages = Pages::beside(big, GIB, 4 * MIB)?;
        let vm = Vm::boot(&pages, kind, 1)?;
        vm.donate_tables(8)?;
        let ends = [0, COUNT / 2, COUNT - 1];
        ends.into_iter().for_each(|index| host_fills(big + index * PAGE, 1, 3));
        // What is cleaned is less in one call.
        refused("VM_MAP", [vm.handle, AT, big, COUNT], Status::TooLarge)?;
        refused("VM_MAP", [vm.handle, AT, big, 17 * 512], Status::TooLarge)?;
        for offset in (0..GIB).step_by(16 * BLOCK as usize) {
            succeed("VM_MAP", [vm.handle, AT + offset, big + offset, 16 * 512])?;
        }
        vm.note(AT, COUNT);
        let mut guest = vm.guest(0);
        let everywhere = |guest: &mut Guest<'_>, base: u64| {
            ends.into_iter().try_for_each(|index| guest.compare(base + index * PAGE, 1, big + index * PAGE, 3))
        };
        everywhere(&mut guest, AT)?;
        let before = statistics()?.stage2_invalidations;
        guest.share(AT, COUNT)?;
        let moves = u64::from(kind == VmKind::Realm);
        check_eq!(statistics()?.stage2_invalidations - before, moves, "invalidations of a share");
        vm.claim(AT, COUNT)?;
        check_eq!(statistics()?.stage2_invalidations - before, moves, "invalidations of a share and a claim");
        for index in ends {
            check_eq!(state(big + index * PAGE)?, CLAIMED, "page {index}");
            host_finds(big + index * PAGE, 1, 3)?;
        }
        vm.release(AT, COUNT)?;
        guest.unshare(AT, COUNT)?;
        everywhere(&mut guest, AT)?;
        vm.finish()?;
        for index in ends {
            check_eq!(state(big + index * PAGE)?, OWNED, "page {index}");
            check_eq!(memory::find_nonzero(big + index * PAGE), None, "page {index}");
        }
    }
    Ok(())
}
