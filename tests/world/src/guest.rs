//! Guests, and the CPU that runs them.

use std::collections::{BTreeMap, VecDeque};

use ravelin_abi::Status;
use ravelin_memory::PhysRange;
use ravelin_pgtable::{Vmid, Vttbr, recording::Stage};
use ravelin_vm::{Context, Entry, GuestCpu, IdRegisters, Left, PstateFeatures, Syndrome, VectorPlaces};

use crate::machine::TestMachine;

/// How many registers a guest's call takes and returns, from x0 on.
pub const CALL_REGISTERS: usize = 11;

/// By which instruction a guest calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Door {
    /// `HVC #0`.
    Hvc,
    /// `SMC #0`.
    Smc,
}

/// What a guest does: one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Calls, with x0 to x10.
    Call(Door, [u64; CALL_REGISTERS]),
    /// Loads 32 bits into w5. From memory, it is what the page holds.
    Load(u64),
    /// Stores 32 bits. To memory, they become what the page holds.
    Store(u64, u32),
}

impl Action {
    /// Returns the call with these first registers; the others are zero.
    #[must_use]
    pub fn call<const N: usize>(door: Door, first: [u64; N]) -> Self {
        let mut registers = [0; CALL_REGISTERS];
        registers[..N].copy_from_slice(&first);
        Self::Call(door, registers)
    }
}

/// What became of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The hypervisor has done what the call has to do with memory, and these are the registers now, from x0 on. They are as they
    /// were if the call waits for the host, or is about something else. Comes once more for each time that it is tried again.
    Handled([u64; CALL_REGISTERS]),
    /// Stage 2 has nothing at the address of an access. Comes once more for each time that it is tried again.
    Faulted,
    /// The guest is behind the instruction, which the hypervisor has performed, with these registers from x0 on.
    Returned([u64; CALL_REGISTERS]),
    /// The guest has accessed memory, which held this before.
    Accessed(u64),
    /// The guest has been sent elsewhere, by an exception or because it was turned on anew.
    Interrupted,
}

/// Something that a guest has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Happened {
    /// The guest's stage 2.
    pub tree: Vttbr,
    /// Its vCPU.
    pub vcpu: usize,
    /// What it has done.
    pub action: Action,
    /// What has become of it.
    pub outcome: Outcome,
}

/// What guests are to do, and what they have done.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) actions: VecDeque<Action>,
    pub(crate) happened: Vec<Happened>,
    /// How often instructions have been tried again since the host was left.
    tries: u32,
    /// Whether a guest has had nothing to do since then. So long until an interrupt comes.
    idle: bool,
    /// The instruction that a vCPU was left at, and its address.
    pub(crate) in_flight: BTreeMap<(Vmid, usize), (u64, Action)>,
}

impl Script {
    /// Returns what a vCPU does next: once more the instruction that it is still at, if there is one.
    fn next(&mut self, tree: Vttbr, vcpu: usize, context: &mut Context) -> Option<Action> {
        if let Some((pc, action)) = self.in_flight.remove(&(tree.vmid, vcpu)) {
            // At a vector that is at the instruction itself, it would be at it until an interrupt comes.
            if context.pc == pc && self.tries < MOST_TRIES {
                self.tries += 1;
                return Some(action);
            }
            let outcome = if context.pc == pc.wrapping_add(4) {
                Outcome::Returned(first_registers(context))
            } else {
                // Its handler returns behind the instruction.
                context.pc = pc.wrapping_add(4);
                Outcome::Interrupted
            };
            self.happened.push(Happened { tree, vcpu, action, outcome });
        }
        self.actions.pop_front()
    }
}

/// How often a guest tries instructions again during a run, at most.
const MOST_TRIES: u32 = 8;

fn first_registers(context: &Context) -> [u64; CALL_REGISTERS] {
    *context.x.first_chunk().expect("there are 31 registers")
}

/// Exception class of HVC in AArch64 state.
const HVC: u64 = 0x16 << 26;
/// Exception class of SMC in AArch64 state.
const SMC: u64 = 0x17 << 26;
/// Data abort, in a translation at level 3, by a load of w5.
const LOAD: u64 = 0x24 << 26 | 1 << 25 | 1 << 24 | 2 << 22 | 5 << 16 | 7;
/// The same by a store.
const STORE: u64 = LOAD | 1 << 6;

impl TestMachine {
    fn enter_once(&self, guest: &mut Entry<'_>) -> Left {
        if let Some(meeting) = self.meeting() {
            meeting.wait();
            meeting.wait();
        }
        let (tree, vcpu) = (guest.tree.vttbr, guest.vcpu);
        let mut script = self.script();
        while let Some(action) = script.next(tree, vcpu, guest.context) {
            let context = &mut *guest.context;
            let pc = context.pc;
            let syndrome = match action {
                Action::Call(door, registers) => {
                    context.x[..CALL_REGISTERS].copy_from_slice(&registers);
                    let esr = match door {
                        Door::Hvc => {
                            context.pc = pc.wrapping_add(4);
                            HVC
                        }
                        Door::Smc => SMC,
                    };
                    Syndrome { esr, far: 0, hpfar: 0 }
                }
                Action::Load(at) | Action::Store(at, _) => match self.access(tree.vmid, action, at) {
                    Some(held) => {
                        context.pc = pc.wrapping_add(4);
                        script.happened.push(Happened { tree, vcpu, action, outcome: Outcome::Accessed(held) });
                        continue;
                    }
                    None => {
                        script.happened.push(Happened { tree, vcpu, action, outcome: Outcome::Faulted });
                        let esr = if let Action::Store(_, value) = action {
                            context.x[5] = value.into();
                            STORE
                        } else {
                            LOAD
                        };
                        Syndrome { esr, far: at, hpfar: at >> 12 << 4 }
                    }
                },
            };
            script.in_flight.insert((tree.vmid, vcpu), (pc, action));
            return Left::Synchronous(syndrome);
        }
        script.idle = true;
        Left::Interrupt
    }

    /// Notes what has become of the call that a guest is at, if it is at one.
    fn note_call(&self, guest: &Entry<'_>) {
        let mut script = self.script();
        let (tree, vcpu) = (guest.tree.vttbr, guest.vcpu);
        if let Some(&(_, action @ Action::Call(..))) = script.in_flight.get(&(tree.vmid, vcpu)) {
            let outcome = Outcome::Handled(first_registers(guest.context));
            script.happened.push(Happened { tree, vcpu, action, outcome });
        }
    }

    /// Accesses memory as a guest and returns what was there, or `None` if stage 2 has nothing there.
    fn access(&self, vmid: Vmid, action: Action, at: u64) -> Option<u64> {
        let page = self.translate(Stage::Guest(vmid), at)?.page();
        let held = self.inner.peek(page);
        if let Action::Store(_, value) = action {
            self.fill(page, value.into());
        }
        Some(held)
    }
}

impl GuestCpu for TestMachine {
    type Host = ();

    fn leave_host(&self, (): &mut ()) -> Result<(), Status> {
        Ok(())
    }

    fn return_to_host(&self, (): &()) {
        let mut script = self.script();
        (script.tries, script.idle) = (0, false);
    }

    fn enter<H: FnMut(u64, &mut Context) -> bool>(&self, (): &(), guest: &mut Entry<'_>, mut handles: H) -> Left {
        loop {
            let left = self.enter_once(guest);
            let Left::Synchronous(syndrome) = left else { return left };
            let handled = handles(syndrome.esr, guest.context);
            self.note_call(guest);
            if !handled {
                return left;
            }
        }
    }

    fn area_pages(&self) -> u64 {
        2
    }

    fn load_vectors(&self, _: PhysRange) {}

    fn unload_vectors(&self, _: PhysRange) {}

    fn guest_vectors(&self, area: PhysRange) -> VectorPlaces {
        let at = |offset| area.base().checked_add(offset).expect("the area is in memory");
        VectorPlaces { status: at(0), first: at(32), stride: 16 }
    }

    fn clear_vectors(&self, area: PhysRange) {
        area.iter().for_each(|page| self.assert_mapped(page));
    }

    fn counter(&self) -> u64 {
        1
    }

    fn interrupt_pending(&self, (): &()) -> bool {
        self.script().idle
    }

    fn hold_virtual_timer(&self) -> bool {
        false
    }

    fn release_virtual_timer(&self) {}

    fn list_registers(&self) -> usize {
        4
    }

    fn pstate_features(&self) -> PstateFeatures {
        PstateFeatures::default()
    }

    fn id_registers(&self) -> IdRegisters {
        IdRegisters::default()
    }
}
