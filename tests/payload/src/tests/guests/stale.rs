//! Stale translations: after a transition nobody reaches a page through what his CPU remembers. The reader is on another CPU.

use ravelin_abi::{Answer, VmKind};
use spin::Mutex;

use crate::{
    rt::{
        cpu,
        memory::{self, BLOCK, PAGE},
        probe::Access,
        vm::{Guest, MEMORY, PROTECTED, Pages, Stop, Vm, code, succeed},
    },
    tests::{Failure, Outcome, check_eq, stale::lose_under_watch},
};

const MIB: u64 = 1 << 20;

/// Where a guest and the host share a page with flags.
const FLAGS: u64 = MEMORY + 4 * BLOCK;

/// Offsets in that page.
const GONE: u64 = 0;
const COUNT: u64 = 8;

code::snippets! {
    /// Loads from x0 again and again, and counts that at x1 + 8. Returns 1 if a load works that began after the word at x1 was set;
    /// otherwise a load takes an exception.
    read_until_gone:
        "mov x3, xzr",
        "4: ldr x4, [x1]",
        "dmb ish",
        "ldr x5, [x0]",
        "dmb ish",
        "add x3, x3, #1",
        "str x3, [x1, #8]",
        "cbz x4, 4b",
        "mov x0, #1";

    /// The same with stores of x2.
    write_until_gone:
        "mov x3, xzr",
        "4: ldr x4, [x1]",
        "dmb ish",
        "str x2, [x0]",
        "dmb ish",
        "add x3, x3, #1",
        "str x3, [x1, #8]",
        "cbz x4, 4b",
        "mov x0, #1";
}

/// Lets a vCPU on CPU 1 use the page at `at` while `transition` takes it away here. The vCPU is stopped at the latest when the
/// transition has returned: by an abort, or by an exit to the host, which lets the access fail.
fn guest_loses(
    reader: &mut Guest<'_>,
    flags: u64,
    at: u64,
    code: &[u64],
    transition: impl FnOnce() -> Outcome,
) -> Outcome {
    memory::store(flags + GONE, 0);
    memory::store(flags + COUNT, 0);
    let shared = reader.vm.shared(FLAGS);
    reader.begin_code(code, &[at, shared, 0x77])?;
    let use_it = |reader: &mut Guest<'_>| {
        let reply = match reader.go()? {
            Stop::Done(reply) => reply,
            Stop::Exit(exit) => {
                check_eq!(exit.address & !0xfff, at & !0xfff, "address of the exit {exit:x?}");
                reader.answer(Answer::Abort, 0);
                reader.finish()?
            }
        };
        match reply.exception {
            Some(exception) if exception.is_abort_at(at) => Ok(()),
            Some(exception) => Err(Failure::new(format_args!("the guest took {exception:x?}"))),
            None => Err(Failure::new(format_args!("the guest uses {at:#x} when it is gone"))),
        }
    };
    let outcome = Mutex::new(Ok(()));
    let reader = Mutex::new(reader);
    let job = |_: usize| {
        *outcome.lock() = use_it(&mut reader.lock());
        // Nobody has to wait any longer.
        memory::store(flags + COUNT, u64::MAX);
    };
    let done = cpu::run_on(&[1], &job, || {
        while memory::load(flags + COUNT) < 100 {
            cpu::wait();
        }
        let done = transition();
        memory::store(flags + GONE, 1);
        done
    });
    done?;
    outcome.into_inner()
}

/// A VM with two vCPUs that are on, the second one for CPU 1, and a page with flags.
fn boot<'a>(pages: &'a Pages, kind: VmKind) -> Result<(Vm<'a>, u64), Failure> {
    let vm = Vm::boot(pages, kind, 2)?;
    vm.donate_tables(8)?;
    let mut guest = vm.guest(0);
    guest.turn_on(1)?;
    let page = vm.add(FLAGS, 1)?;
    if vm.kind.is_protected() {
        guest.share(FLAGS, 1)?;
        vm.claim(FLAGS, 1)?;
    }
    Ok((vm, page))
}

/// Sizes of what is mapped, and which page of it is taken away: a page, one of a block, all of a block.
const PARTS: [(u64, u64, u64); 4] = [(1, 0, 1), (512, 0, 1), (512, 300, 1), (512, 0, 512)];

fn for_each_part(
    kinds: &[VmKind],
    test: impl Fn(&Vm<'_>, &mut Guest<'_>, u64, [u64; 4], &[u64]) -> Outcome,
) -> Outcome {
    for &kind in kinds {
        for (count, first, some) in PARTS {
            for code in [read_until_gone(), write_until_gone()] {
                let pages = Pages::new(16 * MIB);
                let (vm, flags) = boot(&pages, kind)?;
                let address = vm.add(MEMORY, count)?;
                let offset = first * PAGE;
                let mut reader = vm.guest(1);
                test(&vm, &mut reader, flags, [MEMORY + offset, address + offset, some, count], code)?;
                if kind.is_protected() {
                    vm.release(FLAGS, 1)?;
                }
                vm.finish()?;
            }
        }
    }
    Ok(())
}

/// Force reclaim: the page is zero when the host gets it, and stays so.
pub(crate) fn stale_after_force_reclaim() -> Outcome {
    for_each_part(&PROTECTED, |_, reader, flags, [at, address, some, _], code| {
        guest_loses(reader, flags, at, code, || {
            succeed("FORCE_RECLAIM", [address, some])?;
            check_eq!(memory::find_nonzero(address), None, "the page");
            Ok(())
        })?;
        check_eq!(memory::find_nonzero(address), None, "the page, later");
        Ok(())
    })
}

/// A vCPU gives up what another one uses.
pub(crate) fn stale_after_relinquish() -> Outcome {
    const MEM_RELINQUISH: u64 = 0xc600_0009;
    for_each_part(&[VmKind::Pkvm], |vm, reader, flags, [at, address, some, _], code| {
        guest_loses(reader, flags, at, code, || {
            let [status, done, ..] = vm.guest(0).call(&[MEM_RELINQUISH, at, some])?;
            check_eq!((status, done), (0, some), "MEM_RELINQUISH");
            check_eq!(memory::find_nonzero(address), None, "the page");
            Ok(())
        })?;
        check_eq!(memory::find_nonzero(address), None, "the page, later");
        Ok(())
    })
}

/// The host takes back what it has lent.
pub(crate) fn stale_after_unmap() -> Outcome {
    for_each_part(&[VmKind::Ordinary], |vm, reader, flags, [at, address, some, _], code| {
        guest_loses(reader, flags, at, code, || {
            succeed("VM_UNMAP", [vm.handle, at, some])?;
            memory::store(address, 0x55);
            Ok(())
        })?;
        check_eq!(memory::load(address), 0x55, "the page, later");
        Ok(())
    })
}

/// A realm's page leaves the address of what is private when it is shared, and comes back.
pub(crate) fn stale_after_a_realm_converts() -> Outcome {
    for_each_part(&[VmKind::Realm], |vm, reader, flags, [at, _, some, _], code| {
        guest_loses(reader, flags, at, code, || vm.guest(0).share(at, some))?;
        guest_loses(reader, flags, vm.shared(at), code, || vm.guest(0).unshare(at, some))
    })
}

/// The host gives a page to a VM, and releases one, while another CPU of the host uses it.
pub(crate) fn stale_after_the_host_gives_and_releases() -> Outcome {
    for kind in PROTECTED {
        for (count, first, some) in PARTS {
            for access in [Access::Read, Access::Write(7), Access::El0Read] {
                let pages = Pages::new(16 * MIB);
                let vm = Vm::boot(&pages, kind, 1)?;
                vm.donate_tables(8)?;
                let address = pages.take_aligned(count, count)?;
                let (at, page) = (MEMORY + first * PAGE, address + first * PAGE);
                lose_under_watch(access, page, || succeed("VM_MAP", [vm.handle, MEMORY, address, count]).map(drop))?;
                vm.note(MEMORY, count);
                let mut guest = vm.guest(0);
                guest.share(MEMORY, count)?;
                vm.claim(MEMORY, count)?;
                lose_under_watch(access, page, || vm.release(at, some))?;
                if count != some {
                    vm.claim(at, some)?;
                    vm.release(MEMORY, count)?;
                }
                vm.finish()?;
            }
        }
    }
    Ok(())
}
