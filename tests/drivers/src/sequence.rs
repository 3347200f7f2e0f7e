//! A sequence of steps in one world, each judged by the model.

use std::collections::BTreeMap;

use ravelin_abi::{Answer, ExitReason, RunExit, Status, VmAttributes};
use ravelin_memory::PAGE_SIZE;
use ravelin_model::{
    Difference, Door as ModelDoor, GuestCall, Model, Reached, Sizes,
    state::{Frame, Page, Vm},
};
use ravelin_world::{Action, Door, Happened, Layout, Outcome, World, vm_sizes};

use crate::{
    calls::{CPU_OFF, HOST_CALL, REALM_CONFIG},
    coverage::{ACCESS, Coverage},
    op::{Op, REGISTERS, RunAnswer, Value},
    real::RealWorld,
    returned::{Registers, Returned},
};

/// How often everything is compared, in steps: all of memory, all VMs, all contents. Each step compares what it is about.
const THOROUGH: u64 = 256;

/// Why a vCPU is left at an instruction.
const WAITS: [ExitReason; 5] =
    [ExitReason::Mmio, ExitReason::PageFault, ExitReason::Unshare, ExitReason::NeedsTables, ExitReason::HostCall];

/// What is known of a vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vcpu {
    /// Whether it has been turned on.
    pub is_on: bool,
    /// The instruction that it waits at, and what its host has been told.
    pub waits: Option<(Action, RunExit)>,
    /// Its first registers when its last call had been handled, unless it may go on elsewhere.
    handled: Option<Registers>,
}

/// A world and the model of it.
pub struct Sequence<'w, 'a> {
    world: &'w World<'a>,
    model: Model,
    /// What each page of RAM holds, from the first one on.
    contents: Vec<u64>,
    /// By slot: the handle of the VM that was made last.
    handles: BTreeMap<u8, u64>,
    /// By slot: the handle of the VM that was there before.
    old: BTreeMap<u8, u64>,
    /// By slot and index: the vCPUs that were made last.
    vcpus: BTreeMap<(u8, u64), Vcpu>,
    /// Numbers of the pages that the guest which runs has named for the hypervisor to write to.
    named: Vec<u64>,
    /// Whether each step is compared.
    compares: bool,
    /// A number that no page has held.
    fresh: u64,
    steps: u64,
    coverage: Coverage,
}

/// Returns what VM_SIZES says.
fn sizes(attributes: VmAttributes) -> Sizes {
    let (vm, vcpu, alignment) = vm_sizes(attributes);
    Sizes { vm, vcpu, alignment }
}

/// Returns a model of a world that has just booted.
#[must_use]
pub fn model(layout: &Layout) -> Model {
    let mut model = Model::new([layout.ram.clone()], layout.carve_out.clone(), sizes);
    model.is_sequential = true;
    model
}

macro_rules! differs {
    ($($format:tt)+) => {
        Err(Difference(format!($($format)+)))
    };
}

impl<'w, 'a> Sequence<'w, 'a> {
    /// Begins in a world that has just booted. Each page gets contents of its own.
    #[must_use]
    pub fn new(world: &'w World<'a>) -> Self {
        let pages = (world.layout.ram.end - world.layout.ram.start) / PAGE_SIZE;
        let contents: Vec<_> = (1..=pages).collect();
        let new = Self {
            world,
            model: model(world.layout),
            contents,
            handles: BTreeMap::new(),
            old: BTreeMap::new(),
            vcpus: BTreeMap::new(),
            named: Vec::new(),
            compares: true,
            // Above what a guest can store.
            fresh: 1 << 32,
            steps: 0,
            coverage: Coverage::default(),
        };
        for index in 0..new.contents.len() {
            world.machine.fill(new.address(index), new.contents[index]);
        }
        new
    }

    /// Returns the model.
    #[must_use]
    pub const fn model(&self) -> &Model {
        &self.model
    }

    /// Returns the world.
    #[must_use]
    pub const fn world(&self) -> &'w World<'a> {
        self.world
    }

    /// Returns the handle of the VM that was made last in a slot; 0 if none was.
    #[must_use]
    pub fn handle(&self, slot: u8) -> u64 {
        self.handles.get(&slot).copied().unwrap_or(0)
    }

    /// Returns the VM in a slot, if there is one.
    #[must_use]
    pub fn vm(&self, slot: u8) -> Option<&Vm> {
        self.model.state.vms.get(&self.handle(slot))
    }

    /// Returns what is known of the vCPU that was made last with this index in a slot.
    #[must_use]
    pub fn vcpu(&self, slot: u8, index: u64) -> Vcpu {
        self.vcpus.get(&(slot, index)).copied().unwrap_or_default()
    }

    /// Takes steps that have been judged before.
    ///
    /// # Errors
    ///
    /// What the model does not allow of their answers.
    pub fn repeat<'s>(&mut self, steps: impl IntoIterator<Item = &'s Op>) -> Result<(), Difference> {
        self.compares = false;
        let result = steps.into_iter().try_for_each(|step| self.step(step));
        self.compares = true;
        result
    }

    /// Returns what has been reached until now, and forgets it.
    pub fn take_coverage(&mut self) -> Coverage {
        std::mem::take(&mut self.coverage)
    }

    /// Ends the sequence, and returns what it has reached.
    ///
    /// # Errors
    ///
    /// What differs then.
    pub fn finish(self) -> Result<Coverage, Difference> {
        self.compare_all()?;
        Ok(self.coverage)
    }

    /// Takes a step.
    ///
    /// # Errors
    ///
    /// What the model does not allow.
    pub fn step(&mut self, op: &Op) -> Result<(), Difference> {
        match *op {
            Op::Call { immediate, registers } => self.call(immediate, registers)?,
            Op::Run { vm, vcpu, answer, action } => self.run(vm, vcpu, answer, action)?,
            Op::Load(page) => self.access(page, None)?,
            Op::Store(page) => {
                self.fresh += 1;
                self.access(page, Some(self.fresh))?;
            }
        }
        self.steps += 1;
        if self.compares && self.steps.is_multiple_of(THOROUGH) { self.compare_all() } else { Ok(()) }
    }

    /// Makes a call of the host.
    fn call(&mut self, immediate: u16, values: [Value; REGISTERS]) -> Result<(), Difference> {
        let registers = values.map(|value| match value {
            Value::Number(number) => number,
            Value::Vm(slot) => self.handle(slot),
            Value::Old(slot) => self.old.get(&slot).copied().unwrap_or(0),
        });
        self.named.clear();
        let [_, vm, index, ..] = registers;
        if let Some((Action::Call(_, its), _)) = self.vcpu(vm.to_le_bytes()[0], index).waits
            && let Some(vm) = self.model.state.vms.get(&vm)
        {
            self.note_named(vm.metadata.0, &its)?;
        }
        let after = self.world.hvc_with(immediate, registers);
        let happened = self.world.machine.take_happened();
        // The tables are those after the last one.
        let is_call = |happened: &Happened| matches!(happened.outcome, Outcome::Handled(_));
        let last = happened.iter().rposition(is_call);
        for (index, happened) in happened.iter().enumerate() {
            if let Some(reached) = self.happened(happened)? {
                if Some(index) == last { self.conclude(reached)? } else { self.note(reached) }
            }
        }
        let real = RealWorld(self.world);
        let reached = self.model.host_call(&real, immediate, registers, after)?;
        self.judge_written(&reached, registers)?;
        if reached.result == Status::Success.name() {
            let [_, x1, ..] = after;
            let last = happened.last().map(|happened| happened.action);
            self.note_success(reached.call, registers, x1, last);
        }
        self.conclude(reached)
    }

    /// Judges which pages the hypervisor has written to: what the host sees of that is not among the contents.
    fn judge_written(&self, reached: &Reached, [_, x1, x2, ..]: [u64; REGISTERS]) -> Result<(), Difference> {
        let vcpu = self.model.state.vms.get(&x1).and_then(|vm| vm.vcpus.get(&x2));
        let its = |page: u64| match (reached.call, vcpu) {
            _ if reached.result != Status::Success.name() => false,
            ("STATISTICS", _) => page == x1 / PAGE_SIZE,
            ("VCPU_RUN" | "VCPU_GET_REGISTER", Some(vcpu)) => page == vcpu.run_page,
            // Where its vector registers are.
            ("VCPU_SET_REGISTER", Some(vcpu)) => (vcpu.metadata.0..vcpu.metadata.1).contains(&page),
            _ => false,
        };
        let mut written = self.world.machine.take_written().into_iter().map(|page| page / PAGE_SIZE);
        match written.find(|page| !its(*page) && !self.named.contains(page)) {
            Some(page) => differs!("{} has written to page {page:#x}", reached.call),
            None => Ok(()),
        }
    }

    /// Notes what a call that has succeeded says of VMs and vCPUs. The guest did `last` last, if it ran.
    fn note_success(&mut self, call: &str, [_, handle, index, ..]: [u64; REGISTERS], x1: u64, last: Option<Action>) {
        let [slot, ..] = handle.to_le_bytes();
        match call {
            "VM_CREATE" => {
                let [slot, ..] = x1.to_le_bytes();
                self.old.extend(self.handles.insert(slot, x1).map(|old| (slot, old)));
                self.vcpus.retain(|&(its, _), _| its != slot);
            }
            "VCPU_CREATE" => {
                self.vcpus.insert((slot, index), Vcpu { is_on: index == 0, ..Vcpu::default() });
            }
            "VCPU_SET_REGISTER" => self.vcpus.entry((slot, index)).or_default().handled = None,
            "VCPU_RUN" => {
                let Some(vcpu) = self.vm(slot).and_then(|vm| vm.vcpus.get(&index)) else { return };
                let exit = self.world.exit(vcpu.run_page * PAGE_SIZE);
                let reason = ExitReason::from_code(exit.reason);
                let waits = reason.is_some_and(|reason| WAITS.contains(&reason));
                let vcpu = self.vcpus.entry((slot, index)).or_default();
                // Without a turn of its own, it is still where it was.
                let at = last.or(vcpu.waits.map(|(at, _)| at));
                vcpu.waits = at.filter(|_| waits).map(|at| (at, exit));
                if reason == Some(ExitReason::CpuOn) {
                    self.vcpus.entry((slot, exit.vcpu)).or_default().is_on = true;
                }
            }
            _ => {}
        }
    }

    /// Answers the last exit of a vCPU and runs it.
    fn run(&mut self, vm: u8, vcpu: u64, answer: RunAnswer, action: Option<Action>) -> Result<(), Difference> {
        if let Some(run_page) = self.vm(vm).and_then(|vm| vm.vcpus.get(&vcpu)).map(|vcpu| vcpu.run_page) {
            self.access(run_page * PAGE_SIZE, None)?;
            self.world.answer(run_page * PAGE_SIZE, &answer.into());
        }
        self.world.machine.set_actions(action);
        let Op::Call { immediate, registers } = Op::call("VCPU_RUN", &[Value::Vm(vm), vcpu.into()]) else {
            unreachable!("it is a call")
        };
        let ran = self.call(immediate, registers);
        // What it has not come to is not for others.
        self.world.machine.set_actions(None);
        ran
    }

    /// Judges what a guest has done. Returns what has been reached, if it was a call.
    fn happened(&mut self, happened: &Happened) -> Result<Option<Reached>, Difference> {
        let root = happened.tree.root.page_number();
        let (&handle, vm) = self.vm_at(root)?;
        let [slot, ..] = handle.to_le_bytes();
        let (kind, index) = (vm.kind(), happened.vcpu as u64);
        let run_page = vm.vcpus.get(&index).map(|vcpu| vcpu.run_page);
        let vcpu = self.vcpus.entry((slot, index)).or_default();
        match (happened.action, happened.outcome) {
            (Action::Call(door, its), Outcome::Handled(registers)) => {
                let [x0, x1, x2, x3, ..] = its;
                // If it turns itself off, it goes on where another says.
                vcpu.handled = (x0 != CPU_OFF).then_some(registers);
                self.note_named(root, &its)?;
                let [a0, a1, a2, a3, ..] = registers;
                let door = if door == Door::Hvc { ModelDoor::Hvc } else { ModelDoor::Smc };
                let call = GuestCall { root, door, before: [x0, x1, x2, x3], after: [a0, a1, a2, a3] };
                return self.model.guest_call(&call).map(Some);
            }
            (action @ Action::Call(door, before), Outcome::Returned(after)) => {
                if let Some(handled) = vcpu.handled.take() {
                    let answered = vcpu.waits.filter(|&(its, _)| its == action).and_then(|(_, exit)| {
                        let answer = self.world.answered(run_page? * PAGE_SIZE).answer;
                        Some((ExitReason::from_code(exit.reason)?, Answer::from_code(answer)?))
                    });
                    Returned { kind, door, before, handled, after, answered }.judge()?;
                }
            }
            (action @ Action::Load(_), Outcome::Returned([_, _, _, _, _, loaded, ..])) => {
                let exit = vcpu.waits.filter(|&(its, _)| its == action).map(|(_, exit)| exit.reason);
                let entry = run_page.map(|page| self.world.answered(page * PAGE_SIZE)).unwrap_or_default();
                let is_answered = exit == Some(ExitReason::Mmio.code()) && entry.answer == Answer::Complete.code();
                let value = entry.value as u32;
                // What a host sets of registers may make a guest big-endian.
                let swapped = if kind.is_protected() { value } else { value.swap_bytes() };
                if is_answered && ![value, swapped].map(u64::from).contains(&loaded) {
                    return differs!("a guest loads {loaded:#x}, and not {:#x}", entry.value);
                }
            }
            (Action::Call(..), Outcome::Interrupted) if vcpu.handled.is_some() => {
                return differs!("a guest does not come back from its call {:x?}", happened.action);
            }
            (Action::Load(at) | Action::Store(at, _), outcome @ (Outcome::Accessed(_) | Outcome::Faulted)) => {
                let page = self.page_of_guest(root, at)?;
                match (page, outcome) {
                    (None, Outcome::Faulted) => {}
                    (Some(page), Outcome::Accessed(held)) => {
                        let index = self.index(page).ok_or(Difference(format!("{page:#x} is no RAM")))?;
                        if self.contents[index] != held {
                            return differs!(
                                "a guest finds {held:#x} in page {page:#x}, not {:#x}",
                                self.contents[index]
                            );
                        }
                        if let Action::Store(_, value) = happened.action {
                            self.contents[index] = value.into();
                        }
                    }
                    (page, outcome) => {
                        return differs!("a guest's access to {at:#x} is {outcome:x?}; it has {page:x?}");
                    }
                }
                let result = if page.is_some() { "GIVEN" } else { "REFUSED" };
                self.coverage.note(Reached { state: "-", call: ACCESS, result });
            }
            _ => {}
        }
        Ok(None)
    }

    /// Notes which page a guest's call names for results.
    fn note_named(&mut self, root: u64, [function, at, ..]: &Registers) -> Result<(), Difference> {
        if [REALM_CONFIG, HOST_CALL].contains(function) {
            self.named.extend(self.page_of_guest(root, *at)?);
        }
        Ok(())
    }

    /// Returns the VM whose tables begin at this page, and its handle.
    fn vm_at(&self, root: u64) -> Result<(&u64, &Vm), Difference> {
        let vm = self.model.state.vms.iter().find(|(_, vm)| vm.metadata.0 == root);
        vm.ok_or(Difference(format!("a guest runs whose tables are at page {root:#x}")))
    }

    /// Returns the number of the page that a guest may access at an address.
    fn page_of_guest(&self, root: u64, at: u64) -> Result<Option<u64>, Difference> {
        let (_, vm) = self.vm_at(root)?;
        let end = vm.frame_count();
        let is_realm = vm.kind() == ravelin_abi::VmKind::Realm;
        let (frame, shared) = match at / PAGE_SIZE {
            frame if is_realm && (end..2 * end).contains(&frame) => (frame - end, true),
            frame => (frame, false),
        };
        let found = if frame < end { self.model.state.look(vm, frame..frame + 1).next() } else { None };
        Ok(match found {
            Some((_, Frame::Page(page, state))) => {
                let offered = matches!(state, Page::Offered(_) | Page::Claimed(_));
                (!is_realm || offered == shared).then_some(page.0)
            }
            _ => None,
        })
    }

    /// Accesses a page as the host; it holds `store` then, if that is a number.
    fn access(&mut self, page: u64, store: Option<u64>) -> Result<(), Difference> {
        let held = self.world.load(page);
        let reached = self.model.host_fault(page, held.is_some())?;
        if let (Some(held), Some(index)) = (held, self.index(page / PAGE_SIZE)) {
            if self.contents[index] != held {
                return differs!("the host finds {held:#x} in {page:#x}, and not {:#x}", self.contents[index]);
            }
            if let Some(contents) = store {
                self.world.store(page, contents);
                self.contents[index] = contents;
            }
        }
        self.conclude(reached)
    }

    /// Compares what a step was about.
    fn conclude(&mut self, reached: Reached) -> Result<(), Difference> {
        if self.compares {
            self.model.compare(&RealWorld(self.world))?;
        }
        self.note(reached);
        Ok(())
    }

    /// Notes what has been reached, and which pages have been scrubbed.
    fn note(&mut self, reached: Reached) {
        self.coverage.note(reached);
        let scrubbed: Vec<_> = self.model.scrubbed().filter_map(|page| self.index(page)).collect();
        for index in scrubbed {
            self.contents[index] = 0;
        }
    }

    /// Compares everything.
    ///
    /// # Errors
    ///
    /// What differs.
    pub fn compare_all(&self) -> Result<(), Difference> {
        self.model.compare_all(&RealWorld(self.world))?;
        self.world.machine.inner.assert_quiescent();
        if let Err(inconsistency) = self.world.memory.check(self.world.machine) {
            return differs!("{inconsistency}");
        }
        for &handle in self.model.state.vms.keys() {
            if let Err(inconsistency) = self.world.check_guest(handle) {
                return differs!("VM {handle:#x}: {inconsistency}");
            }
        }
        // What it has noted is of no use here, and grows.
        drop(self.world.machine.inner.take_log());
        for (index, &contents) in self.contents.iter().enumerate() {
            let page = self.address(index);
            let held = self.world.machine.inner.peek(page);
            if held != contents {
                return differs!("page {page} holds {held:#x}, and not {contents:#x}");
            }
        }
        Ok(())
    }

    /// Returns where in the list of contents the page of this number is.
    fn index(&self, page: u64) -> Option<usize> {
        let index = usize::try_from(page.checked_sub(self.world.layout.ram.start / PAGE_SIZE)?).ok()?;
        (index < self.contents.len()).then_some(index)
    }

    fn address(&self, index: usize) -> ravelin_memory::PhysAddr {
        let address = self.world.layout.ram.start + index as u64 * PAGE_SIZE;
        ravelin_memory::PhysAddr::new(address).expect("RAM has addresses of 48 bits")
    }
}

#[cfg(test)]
mod tests {
    use ravelin_memory::{PhysAddr, PhysRange};
    use ravelin_vm::PageAccess;
    use ravelin_world::in_world;

    use super::*;

    const PAGE: u64 = Layout::FOUR_BLOCKS.ram.start;

    /// Says what a step finds after something was done that no call has asked for.
    fn after(tamper: impl FnOnce(&World<'_>), step: &str) -> String {
        in_world(&Layout::FOUR_BLOCKS, |world| {
            let mut sequence = Sequence::new(world);
            sequence.step(&Op::Load(PAGE)).unwrap();
            tamper(world);
            sequence.step(&step.parse().unwrap()).unwrap_err().0
        })
    }

    #[test]
    fn what_no_call_has_done_is_seen() {
        let share =
            |world: &World<'_>| world.memory.share(world.machine, PhysRange::new(PAGE + 0x1000, 1).unwrap()).unwrap();
        assert!(after(share, "load 40000000").contains("entries of pages"));
        assert!(after(share, "call 0 c6001001 40001000 1 0 0 0 0").contains("returned DENIED"));
        let donate = |world: &World<'_>| world.memory.donate(world.machine, PhysRange::new(PAGE, 1).unwrap()).unwrap();
        assert!(after(donate, "load 40000000").contains("an access of the host"));
    }

    #[test]
    fn what_the_hypervisor_writes_is_seen() {
        in_world(&Layout::FOUR_BLOCKS, |world| {
            let mut sequence = Sequence::new(world);
            sequence.step(&Op::call("DONATE", &[PAGE.into(), 1.into()])).unwrap();
            sequence.step(&Op::call("FEATURES", &[])).unwrap();
            world.machine.write_bytes(PhysAddr::new(PAGE).unwrap(), &[1]);
            assert!(sequence.step(&Op::call("FEATURES", &[])).unwrap_err().0.contains("has written to page 0x40000"));
        });
    }

    #[test]
    fn a_vector_register_is_written_in_pages_of_its_vcpu() {
        in_world(&Layout::FOUR_BLOCKS, |world| {
            let mut sequence = Sequence::new(world);
            let steps = [
                "call 0 c6001010 22000 40100000 8 0 0 0",
                "call 0 c6001012 vm0 1 4014c000 3 40165000 0",
                "call 0 c600100f vm0 1 7e 0 0 0",
            ];
            steps.iter().for_each(|step| sequence.step(&step.parse().unwrap()).unwrap());
            assert!(sequence.take_coverage().to_string().contains("reached Created VCPU_SET_REGISTER SUCCESS 1\n"));
        });
    }

    #[test]
    fn contents_that_no_store_has_changed_are_seen() {
        let fill = |world: &World<'_>| world.machine.fill(PhysAddr::new(PAGE).unwrap(), 7);
        assert!(after(fill, "load 40000000").contains("the host finds 0x7"));
        in_world(&Layout::FOUR_BLOCKS, |world| {
            let sequence = Sequence::new(world);
            fill(world);
            assert!(sequence.finish().unwrap_err().0.contains("holds 0x7"));
        });
    }
}
