//! Random calls about VMs from all CPUs at once.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ravelin_abi::{Answer, ExitReason, Status, VmKind};
use spin::Mutex;

use crate::{
    rt::{
        cpu::{self, read_register},
        memory::{self, PAGE},
        platform::platform,
        vm::{Conversion, DISTRIBUTOR, Guest, MEMORY, Pages, REDISTRIBUTORS, Sizes, Stop, Vm, block_of, call},
    },
    tests::{Failure, Outcome, check, check_eq, page_counts, stress::Random},
};

const MIB: u64 = 1 << 20;

/// Frames and pages that the calls are about.
const FRAMES: u64 = 24;
const PAGES: u64 = 32;

/// VMs that come and go; one more has a guest that runs.
const VMS: usize = 3;

/// What the CPUs have in common.
struct Playground {
    /// Handles: of the VMs that come and go, and of the one that stays.
    handles: [AtomicU64; VMS + 1],
    /// For each of them pages to be made of, and those of a vCPU with its run page.
    metadata: [u64; VMS],
    /// Pages to be given and taken.
    pages: u64,
    sizes: Sizes,
}

impl Playground {
    /// One call with random arguments, which mostly make sense. Returns its name and status.
    fn play(&self, random: &mut Random) -> (&'static str, Status) {
        let index = random.below(VMS as u64 + 1) as usize;
        let handle = self.handles[index].load(Ordering::Relaxed);
        let frame = random.below(FRAMES);
        let at = MEMORY + frame * PAGE;
        let page = random.below(PAGES);
        let address = self.pages + page * PAGE;
        let most = (FRAMES - frame).min(PAGES - page);
        let longest = if random.below(4) == 0 { 8 } else { 2 };
        let count = 1 + random.below(most.min(longest));
        let named = |name, (status, _)| (name, status);
        match random.below(24) {
            0..6 => named("VM_MAP", call("VM_MAP", [handle, at, address, count])),
            6 => named("VM_UNMAP", call("VM_UNMAP", [handle, at, count])),
            7..10 => named("CLAIM", call("CLAIM", [handle, at, count])),
            10..13 => named("RELEASE", call("RELEASE", [handle, at, count])),
            13 => named("FORCE_RECLAIM", call("FORCE_RECLAIM", [address, count])),
            14 => named("SPI", call("SPI", [handle, 32 + random.below(256), random.below(2)])),
            15 => named("VM_DONATE_TABLES", call("VM_DONATE_TABLES", [handle, address, 1])),
            16 => named("VM_RECLAIM", call("VM_RECLAIM", [handle, MEMORY, FRAMES])),
            17 => named("SHARE", call("SHARE", [address, 1, 0])),
            18 => named("UNSHARE", call("UNSHARE", [address, 1, 0])),
            // The VM that stays is not for the following: it would be BUSY now and then.
            _ if index == VMS => named("CLAIM", call("CLAIM", [handle, at, count])),
            19 | 20 => {
                let attributes = Vm::attributes(VmKind::ALL[random.below(3) as usize], 1);
                let (status, [handle, ..]) =
                    call("VM_CREATE", [attributes.bits(), self.metadata[index], self.sizes.vm]);
                if status == Status::Success {
                    self.handles[index].store(handle, Ordering::Relaxed);
                }
                ("VM_CREATE", status)
            }
            21 => {
                let vcpu = self.metadata[index] + self.sizes.vm * PAGE;
                let run_page = vcpu + self.sizes.vcpu * PAGE;
                let arguments = [handle, 0, vcpu, self.sizes.vcpu, run_page];
                let made = named("VCPU_CREATE", call("VCPU_CREATE", arguments));
                let start = [handle, MEMORY, block_of(0), DISTRIBUTOR, REDISTRIBUTORS];
                call("VM_SEAL", start);
                made
            }
            22 => named("VCPU_RUN", call("VCPU_RUN", [handle, 0])),
            _ => {
                call("VM_TEARDOWN", [handle]);
                call("VM_RECLAIM", [handle, MEMORY, FRAMES]);
                named("VM_DESTROY", call("VM_DESTROY", [handle]))
            }
        }
    }
}

/// What the guest does meanwhile. Whether a call succeeds depends on what the host has done; that the guest gets on does not.
fn convert_at_random(guest: &mut Guest<'_>, random: &mut Random) -> Outcome {
    let frame = random.below(FRAMES);
    let count = 1 + random.below((FRAMES - frame).min(4));
    let at = MEMORY + frame * PAGE;
    let arguments = guest.conversion(at, count, random.below(2) == 0);
    guest.begin_call(&arguments)?;
    for _ in 0..1000 {
        match guest.go()? {
            Stop::Done(reply) => {
                if let Conversion::Done(done) = guest.converted(at, reply.x) {
                    check!(done <= count, "{done} of {count} pages are done");
                }
                return Ok(());
            }
            // The host is not to do anything about it.
            Stop::Exit(exit) if exit.reason == ExitReason::PageFault.code() => guest.answer(Answer::Abort, 0),
            Stop::Exit(exit) if exit.reason == ExitReason::Unshare.code() => guest.answer(Answer::Refuse, 0),
            other => return Err(Failure::new(format_args!("{other:?}"))),
        }
    }
    Err(Failure::new(format_args!("a call of the guest does not end")))
}

/// Counts as many rounds as it is worth, but not for longer than some seconds: an emulator with fewer CPUs than it emulates takes
/// long to hand a lock over.
pub(crate) fn for_a_while(rounds: u64) -> impl Iterator<Item = u64> {
    let effort = platform().effort();
    let deadline = read_register!("cntvct_el0") + 5 * effort * read_register!("cntfrq_el0");
    (0..rounds * effort).take_while(move |_| read_register!("cntvct_el0") < deadline)
}

/// Random calls of all CPUs about the same VMs, frames and pages, while a guest converts on one of them. In the end everything comes
/// back.
pub(crate) fn random_calls() -> Outcome {
    for kind in [VmKind::Pkvm, VmKind::Realm, VmKind::Ordinary] {
        let pages = Pages::new(8 * MIB);
        let before = page_counts()?;
        let sizes = Sizes::of(Vm::attributes(kind, 1))?;
        let vm = Vm::boot(&pages, kind, 1)?;
        vm.donate_tables(16)?;
        let mut metadata = [0; VMS];
        for address in &mut metadata {
            *address = pages.take_aligned(sizes.vm + sizes.vcpu + 1, sizes.align)?;
        }
        let playground = Playground {
            handles: core::array::from_fn(|index| AtomicU64::new(if index == VMS { vm.handle } else { 0 })),
            metadata,
            pages: pages.take(PAGES)?,
            sizes,
        };
        // What the guest may be left with in the end.
        vm.note(MEMORY, FRAMES);
        for page in 0..PAGES {
            memory::fill(playground.pages + page * PAGE, 1);
        }
        let stop = AtomicBool::new(false);
        let outcome = Mutex::new(Ok(()));
        let rounds = for_a_while(500);
        let job = |cpu: usize| {
            let mut random = Random(0x1876_5432_10FE_DCB1 * (cpu as u64 + 1));
            while !stop.load(Ordering::Acquire) {
                let (name, status) = playground.play(&mut random);
                if matches!(status, Status::NotSupported | Status::Reserved | Status::Unaligned) {
                    *outcome.lock() = Err(Failure::new(format_args!("{name}: {}", status.name())));
                }
            }
        };
        let others = crate::tests::other_cpus();
        let mut random = Random(0xABCD_EF01_2345_6789);
        let mut guest = vm.guest(0);
        let here = cpu::run_on(&others, &job, || {
            let mut here = Ok(());
            for _ in rounds {
                playground.play(&mut random);
                if kind.is_protected() && here.is_ok() {
                    here = convert_at_random(&mut guest, &mut random);
                }
            }
            stop.store(true, Ordering::Release);
            here
        });
        here?;
        outcome.into_inner()?;

        for (index, handle) in playground.handles.iter().enumerate().take(VMS) {
            let handle = handle.load(Ordering::Relaxed);
            // Whatever it has come to.
            call("VM_TEARDOWN", [handle]);
            call("VM_RECLAIM", [handle, MEMORY, FRAMES]);
            let mut left = call("VM_DESTROY", [handle]);
            while let (Status::Success, [1..=u64::MAX, ..]) = left {
                left = call("VM_DESTROY", [handle]);
            }
            check!(matches!(left.0, Status::Success | Status::BadHandle), "VM {index} stays: {}", left.0.name());
        }
        for page in (0..PAGES).map(|index| playground.pages + index * PAGE) {
            // What was lent to the hypervisor.
            call("UNSHARE", [page, 1, 0]);
        }
        vm.finish()?;
        check_eq!(page_counts()?, before, "pages by state");
    }
    Ok(())
}
