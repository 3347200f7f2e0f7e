//! Guests that run on any CPU and do things at random, and what their host makes of it.

use arrayvec::ArrayVec;
use ravelin_abi::{Answer, ExitReason, RunExit, Status};
use ravelin_guest::{
    Command,
    playground::{BASE, KEPT, Random, SPAN},
};
use spin::Mutex;

use super::{KINDS, playground::Playground};
use crate::{
    rt::{
        memory::{self, PAGE},
        vm::{Guest, Pages, Stop, Vm, call},
    },
    tests::{Failure, Outcome, check, check_eq},
};

/// vCPUs of each VM.
const VCPUS: u64 = 2;

/// Steps of a guest in one command.
const STEPS: u64 = 24;

/// Makes the VMs, with pages in the kept frames.
pub(super) fn boot(pages: &Pages) -> Result<ArrayVec<Vm<'_>, { KINDS.len() }>, Failure> {
    let mut vms = ArrayVec::new();
    for kind in KINDS {
        let vm = Vm::boot(pages, kind, VCPUS)?;
        // All that the guest may have in the end.
        vm.note(BASE, SPAN);
        vms.push(vm);
    }
    Ok(vms)
}

/// The vCPUs. Who has the lock of one runs it.
pub(super) struct Guests<'a> {
    vcpus: ArrayVec<Mutex<Wild<'a>>, { KINDS.len() * VCPUS as usize }>,
}

/// A vCPU.
struct Wild<'a> {
    guest: Guest<'a>,
    /// Where the pages of the kept frames are.
    kept: u64,
    /// What the host has to answer.
    exit: Option<RunExit>,
}

impl<'a> Guests<'a> {
    /// Turns on all vCPUs of the VMs.
    pub(super) fn new(vms: &'a [Vm<'a>]) -> Result<Self, Failure> {
        let mut vcpus = ArrayVec::new();
        for vm in vms {
            let kept = vm.pages.take(KEPT)?;
            (0..KEPT).for_each(|page| memory::fill(kept + page * PAGE, 0));
            vm.map(BASE, kept, KEPT)?;
            for index in 1..VCPUS {
                vm.guest(0).turn_on(index)?;
            }
            for index in 0..VCPUS {
                let mut guest = vm.guest(index);
                guest.via = Some(&run_when_free);
                vcpus.push(Mutex::new(Wild { guest, kept, exit: None }));
            }
        }
        Ok(Self { vcpus })
    }

    /// Runs one of the vCPUs for some exits, unless another CPU has it.
    pub(super) fn turn(&self, playground: &Playground<'_>, random: &mut Random) -> Outcome {
        let vcpu = &self.vcpus[random.below(self.vcpus.len() as u64) as usize];
        let Some(mut wild) = vcpu.try_lock() else { return Ok(()) };
        for _ in 0..1 + random.below(6) {
            wild.turn(playground, random)?;
        }
        Ok(())
    }

    /// Lets all guests come to the end of what they do. What is in the kept frames is still what was there.
    pub(super) fn finish(&self) -> Outcome {
        for vcpu in &self.vcpus {
            let Wild { guest, .. } = &mut *vcpu.lock();
            loop {
                match guest.go()? {
                    Stop::Done(_) => break,
                    Stop::Exit(exit) => guest.answer(last_answer(&exit), 0),
                }
            }
        }
        for vcpu in &self.vcpus {
            let Wild { guest, kept, .. } = &mut *vcpu.lock();
            for at in (0..KEPT).map(|frame| BASE + frame * PAGE) {
                // Whether there is anything to release or to take back or not.
                let _ = call("RELEASE", [guest.vm.handle, at, 1]);
                if guest.vm.kind.is_protected() {
                    let _ = guest.convert(at, 1, false)?;
                }
            }
            guest.compare(BASE, KEPT, *kept, 0)?;
        }
        Ok(())
    }
}

/// What ends all that a guest may wait for.
fn last_answer(exit: &RunExit) -> Answer {
    match ExitReason::from_code(exit.reason) {
        Some(ExitReason::Unshare) => Answer::Refuse,
        Some(ExitReason::PageFault) => Answer::Abort,
        _ => Answer::Complete,
    }
}

/// VCPU_RUN. Other CPUs ask for registers of the vCPU meanwhile.
fn run_when_free(handle: u64, index: u64) -> Result<u64, Failure> {
    loop {
        let (status, _) = call("VCPU_RUN", [handle, index]);
        if status != Status::Busy {
            return Ok(status.register());
        }
    }
}

impl Wild<'_> {
    /// Runs the vCPU once, and does something about it.
    fn turn(&mut self, playground: &Playground<'_>, random: &mut Random) -> Outcome {
        if let Some(exit) = self.exit.take() {
            self.answer(&exit, playground, random)?;
        }
        let guest = &mut self.guest;
        if guest.is_idle() {
            let kind = guest.vm.kind.code();
            guest.begin(Command::Random, &[random.next(), STEPS, kind, guest.vm.shared_bit(), self.kept])?;
        }
        match guest.step()? {
            Some(Stop::Done(reply)) => {
                let [at, value, ..] = reply.x;
                check!(at == 0, "a guest finds {value:#x} at {at:#x}, which is not what was there");
            }
            Some(Stop::Exit(exit)) => self.exit = Some(exit),
            None => {}
        }
        // The host takes up what is offered, or lets it be.
        for offer in self.guest.told.drain(..) {
            if offer.reason == ExitReason::Shared.code() && random.once_in(2) {
                let _ = call("CLAIM", [self.guest.vm.handle, offer.address, offer.pages]);
            }
        }
        Ok(())
    }

    /// Does what the exit asks for, or something else that the interface has.
    fn answer(&mut self, exit: &RunExit, playground: &Playground<'_>, random: &mut Random) -> Outcome {
        let Self { guest, .. } = self;
        let Vm { handle, .. } = *guest.vm;
        let reason = ExitReason::from_code(exit.reason);
        // Of a realm the page may be at the other address. The host plays no device there.
        let kept = (BASE..BASE + KEPT * PAGE).contains(&(exit.address & !guest.vm.shared_bit()));
        match reason {
            Some(ExitReason::PageFault) => {
                let within = (BASE..BASE + SPAN * PAGE).contains(&exit.address);
                if within && !kept && random.once_in(2) {
                    let (page, _) = playground.guests(random);
                    let _ = call("VM_MAP", [handle, exit.address, page, 1]);
                }
            }
            Some(ExitReason::Unshare) if random.once_in(2) => {
                let _ = call("RELEASE", [handle, exit.address, exit.pages]);
            }
            Some(ExitReason::Mmio | ExitReason::HostCall | ExitReason::Unshare) => {}
            _ => return Err(Failure::new(format_args!("vCPU {} of {:?}: {exit:x?}", guest.index, guest.vm.kind))),
        }
        let answers: &[Answer] = match reason {
            Some(ExitReason::PageFault) => &[Answer::Retry, Answer::Abort],
            Some(ExitReason::Unshare) => &[Answer::Retry, Answer::Refuse],
            Some(ExitReason::HostCall) => &[Answer::Retry, Answer::Complete],
            _ if kept => &[Answer::Retry, Answer::Abort],
            _ => &[Answer::Retry, Answer::Complete, Answer::Abort],
        };
        let answer = random.one_of([Answer::Retry, Answer::Complete, Answer::Abort, Answer::Refuse]);
        if !answers.contains(&answer) && !kept {
            guest.answer(answer, 0);
            let x0 = run_when_free(handle, guest.index)?;
            check_eq!(x0, Status::Invalid.register(), "VCPU_RUN with {answer:?} to {reason:?}");
        }
        guest.answer(answers[random.below(answers.len() as u64) as usize], random.next());
        Ok(())
    }
}
