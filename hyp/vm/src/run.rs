//! Running a vCPU: from the host's call to what the host is told.
//!
//! Exits that concern the hypervisor alone are handled here, and the guest goes on, unless an interrupt for the host waits, so that
//! no guest keeps a CPU from its host.

mod registers;

use ravelin_abi::{Answer, RUN_CALL_REGISTERS, RunEntry, RunExit, RunPage, Status};
use ravelin_memory::{PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_vgic::{Access, Frame, Gic, ListRegisters, VcpuSet, Vcpus};

use crate::{
    Abort, Context, Entry, FirmwareCall, FirstInstruction, GuestCpu, GuestExit, GuestFailure, GuestFeatures, Handle,
    IdRegisters, Left, MmioAccess, ObjectMemory, Outcome, PageAccess, Pending, Power, Readiness, Refusal, Report,
    RingCall, SysregAccess, SysregAction, Transitions, Vectors, Vm, Vms, entropy_call,
    exit::{Conduit, shows_id_register},
    firmware_call,
    gic::VcpuGics,
    guest::NOT_SUPPORTED,
    guest_call::{self, Common},
    mpidr,
    ring::{Ring, is_quiet},
    rsi,
    vm::VmEnd,
};

/// INTID of the virtual timer, as Arm's Base System Architecture has it.
const VIRTUAL_TIMER: u32 = 27;
/// INTID of the physical timer.
const PHYSICAL_TIMER: u32 = 30;

/// What a vCPU is while it does not run.
#[derive(Clone, Debug)]
pub struct VcpuState {
    context: Context,
    /// What the guest sees as ID registers.
    ids: IdRegisters,
    open: Open,
    /// What its interrupt controller knows of them, so that it is told of changes only.
    timers: Timers,
    ring: Ring,
    /// What its virtual CPU interface holds from entry to exit.
    interface: ListRegisters,
    /// The [`Vm::gic_changes`] for which it may be entered with that; 0 for none.
    entered_at: u64,
    /// Pages for the vector registers.
    area: PhysRange,
}

/// The levels of the wires of a vCPU's timers: the virtual one and the physical one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Timers([bool; 2]);

impl Timers {
    /// Brings them up to date. Returns whether that has changed them.
    #[inline(always)]
    fn update(&mut self, context: &Context, now: u64) -> bool {
        let levels = [has_passed(context.virtual_timer(), now), has_passed(context.physical_timer(), now)];
        let changed = self.0 != levels;
        self.0 = levels;
        changed
    }

    #[inline(never)]
    fn tell<V: Vcpus>(self, gic: &mut Gic<'_, V>, vcpu: usize) {
        for (intid, level) in [VIRTUAL_TIMER, PHYSICAL_TIMER].into_iter().zip(self.0) {
            // They concern this vCPU alone.
            let _ = gic.set_ppi_level(vcpu, intid, level);
        }
    }
}

/// What the last exit leaves open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Open {
    /// Nothing.
    #[default]
    Nothing,
    /// An access.
    Access(Pending),
    /// A call by this instruction. The program counter is at it.
    Call(Conduit, Missing),
    /// It has ended, and never runs again.
    Ended,
}

/// What a call of the guest waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    /// A page.
    Page,
    /// Pages for tables.
    Tables,
    /// The release of pages that the host has claimed.
    Release,
    /// The host's results.
    Results,
}

/// Returns what a guest with addresses of so many bits sees as ID registers.
fn id_registers(cpu: &impl GuestCpu, ipa_bits: u64) -> IdRegisters {
    cpu.id_registers().for_guest(GuestFeatures { ipa_bits, sve: true, pointer_authentication: true })
}

impl VcpuState {
    /// Returns the state of vCPU number `index` before it has been turned on, for a VM with guest addresses of so many bits. The
    /// vector registers are kept in `area`.
    pub fn new(cpu: &impl GuestCpu, index: usize, ipa_bits: u64, area: PhysRange) -> Self {
        cpu.clear_vectors(area);
        Self {
            context: Context::reset(0, 0, mpidr(index)),
            ids: id_registers(cpu, ipa_bits),
            open: Open::Nothing,
            timers: Timers::default(),
            ring: Ring::default(),
            interface: ListRegisters::default(),
            entered_at: 0,
            area,
        }
    }

    /// Sets the registers of a vCPU that has been turned on as PSCI has it, and those of the one that boots as the seal has it.
    /// Returns whether it is reset.
    #[inline]
    fn start(&mut self, cpu: &impl GuestCpu, index: usize, power: &Power) -> bool {
        power.take_start().is_some_and(|first| {
            self.start_at(cpu, index, &first);
            first.reset
        })
    }

    #[inline(never)]
    fn start_at(&mut self, cpu: &impl GuestCpu, index: usize, &FirstInstruction { pc, x0, reset }: &FirstInstruction) {
        if reset {
            self.context = Context::reset(pc, x0, mpidr(index));
            self.open = Open::Nothing;
            cpu.clear_vectors(self.area);
        } else {
            self.context.pc = pc;
            self.context.set_register(0, x0);
        }
    }
}

impl<O: ObjectMemory, G: Send + Sync> Vms<O, G, VcpuState> {
    /// Runs a vCPU of a sealed VM until the host has something to do. What that is is in its run page.
    ///
    /// # Errors
    ///
    /// Those of [`Vms::run`] and [`GuestCpu::leave_host`]; WRONG_STATE if the vCPU is off, or has ended; INVALID if the answer in
    /// the run page does not belong to the last exit. Nothing has changed.
    #[inline(never)]
    pub fn run_vcpu<T: Transitions<Guest = G>, C: GuestCpu>(
        &self,
        transitions: &T,
        cpu: &C,
        handle: Handle,
        index: u64,
    ) -> Result<(), Refusal> {
        self.run(handle, index, |vm, vcpu| {
            let index = vcpu.index();
            let run_page = vcpu.run_page();
            let power = vm.power(index).ok_or(Status::Absent)?;
            let mut host = C::Host::default();
            cpu.leave_host(&mut host)?;
            let wake = VcpuSet::EMPTY;
            let mut run = Run { transitions, cpu, vm, power, host: &host, index, run_page, wake, report: None };
            let refused = run.run(&mut vcpu.state);
            cpu.return_to_host(&host);
            refused?;
            let conversions = vcpu.state.ring.apply(transitions, cpu, vm.guest(), run_page);
            let [wake_low, wake_high] = run.wake.words();
            let always = [wake_low, wake_high, conversions];
            // What guests exit for most.
            if let Some(report @ Report::Mmio { .. }) = run.report {
                tell(cpu, run_page, report, always);
            } else if let Some(report) = run.report {
                tell_other(cpu, run_page, report, always);
            }
            Ok(())
        })
    }
}

/// One run of a vCPU.
struct Run<'a, T: Transitions, C: GuestCpu, O: ObjectMemory>
where
    T::Guest: Send + Sync,
{
    transitions: &'a T,
    cpu: &'a C,
    vm: &'a Vm<O, T::Guest, VcpuState>,
    power: &'a Power,
    host: &'a C::Host,
    index: usize,
    run_page: PhysAddr,
    /// Other vCPUs that have something to do.
    wake: VcpuSet,
    /// What the host is told in the end. Here, because it is large to return.
    report: Option<Report>,
}

/// What the guest has of the CPU beside its registers, until the host gets it back.
struct Loan {
    vectors: Vectors,
    /// Whether the interrupt of the virtual timer is active.
    timer_held: bool,
}

/// Handles exits that concern no other registers than those that [`GuestCpu::enter`] has in the context then, so that the guest
/// goes on at once: calls that are about memory or that always return the same, and loads of ID registers.
struct AtOnce<'a, 'r, T: Transitions, C: GuestCpu, O: ObjectMemory>
where
    T::Guest: Send + Sync,
{
    run: &'a Run<'r, T, C, O>,
    vm: &'a Vm<O, T::Guest, VcpuState>,
    open: &'a mut Open,
    ring: &'a mut Ring,
    ids: &'a IdRegisters,
    timer_held: bool,
    /// What has become of an exit after which the guest does not go on at once: what the host is told, if anything.
    handled: &'a mut Option<Option<Report>>,
}

impl<T: Transitions, C: GuestCpu, O: ObjectMemory> AtOnce<'_, '_, T, C, O>
where
    T::Guest: Send + Sync,
{
    /// Returns whether the guest goes on.
    #[inline(always)]
    fn handles(&mut self, esr: u64, context: &mut Context) -> bool {
        let Some(conduit) = Conduit::decode(esr) else {
            return self.may_go_on() && shows_id_register(esr, context, self.ids);
        };
        let kind = self.vm.guest().kind();
        // What is answered needs no stack, of which the others take much.
        let is_answered = match conduit {
            Conduit::Hvc => match guest_call::common(kind, context) {
                Some(Common::Share) => return self.converts(true, context),
                Some(Common::Unshare) => return self.converts(false, context),
                Some(Common::Answered) => true,
                None => false,
            },
            Conduit::Smc => rsi::answer(kind, context),
        };
        if !is_answered {
            return self.performs(conduit, context);
        }
        conduit.pass(context);
        self.goes_on(None)
    }

    /// Performs a call to share or unshare.
    #[inline(never)]
    fn converts(&mut self, share: bool, context: &mut Context) -> bool {
        let Run { transitions, cpu, run_page, .. } = *self.run;
        let Some(range) = guest_call::exchange(transitions, self.vm.guest(), context, share) else {
            return self.performs(Conduit::Hvc, context);
        };
        Conduit::Hvc.pass(context);
        let is_told = share && !is_quiet(cpu, run_page);
        self.goes_on(is_told.then_some(Report::Shared(range)))
    }

    /// Performs a call that is about memory.
    #[inline(never)]
    fn performs(&mut self, conduit: Conduit, context: &mut Context) -> bool {
        let Run { transitions, cpu, run_page, .. } = *self.run;
        let outcome = match conduit {
            Conduit::Hvc => guest_call::call(transitions, self.vm.guest(), context),
            Conduit::Smc => {
                let send = |registers: &rsi::HostCallRegisters| {
                    if let Some(at) = part(run_page, RunPage::CALL) {
                        cpu.write_bytes(at, registers);
                    }
                };
                rsi::call(transitions, self.vm.guest(), context, send)
            }
        };
        let outcome = match outcome {
            None => return false,
            Some(Outcome::Done) => {
                conduit.pass(context);
                return self.goes_on(None);
            }
            Some(Outcome::Ring(call)) => self.run.ring_call(self.ring, context, call),
            Some(outcome) => outcome,
        };
        conduit.rewind(context);
        let report = self.run.conclude(self.open, context, conduit, outcome);
        self.goes_on(report)
    }

    #[inline(always)]
    fn goes_on(&mut self, report: Option<Report>) -> bool {
        let goes_on = report.is_none() && self.may_go_on();
        if !goes_on {
            *self.handled = Some(report);
        }
        goes_on
    }

    /// Returns whether there is nothing to look after first: a timer's interrupt that is held, or the end of the VM.
    #[inline(always)]
    fn may_go_on(&self) -> bool {
        !self.timer_held && self.vm.end().is_none()
    }
}

impl<T: Transitions, C: GuestCpu, O: ObjectMemory> Run<'_, T, C, O>
where
    T::Guest: Send + Sync,
{
    /// Runs the vCPU until there is something to tell the host.
    fn run(&mut self, state: &mut VcpuState) -> Result<(), Refusal> {
        if matches!(state.open, Open::Ended) {
            return Err(Status::WrongState.into());
        }
        if let Some(end) = self.vm.end_before_entry() {
            state.open = Open::Ended;
            self.report = Some(Report::of_end(end));
            return Ok(());
        }
        if !self.power.goes_on() {
            self.start(state)?;
        }
        state.context.cntvoff_el2 = self.vm.counter_offset();
        self.answer(state)?;
        state.ring.resume(self.transitions, self.cpu, self.vm.guest(), || self.host_entry().released);
        let mut loan = Loan { vectors: Vectors::None, timer_held: false };
        while self.report.is_none() {
            if let Some(end) = self.vm.end() {
                state.open = Open::Ended;
                self.report = Some(Report::of_end(end));
            } else if !self.wake.is_empty() {
                self.report = Some(Report::Wake);
            } else {
                self.enter(state, &mut loan);
            }
        }
        if loan.vectors != Vectors::None {
            self.cpu.unload_vectors(state.area);
        }
        if loan.timer_held {
            self.cpu.release_virtual_timer();
        }
        Ok(())
    }

    /// Readies a vCPU that has been turned on.
    #[inline(never)]
    fn start(&mut self, state: &mut VcpuState) -> Result<(), Refusal> {
        if state.start(self.cpu, self.index, self.power) {
            self.reset_ring(&mut state.ring);
        }
        if self.power.run() != Readiness::Starts {
            return Err(Status::WrongState.into());
        }
        let index = self.index;
        self.gic(|gic| gic.reset_interface(index));
        Ok(())
    }

    /// Acts on the host's answer to the last exit. There is a report if the guest cannot be entered even so.
    fn answer(&mut self, state: &mut VcpuState) -> Result<(), Refusal> {
        if matches!(state.open, Open::Nothing) {
            // Whatever the host says.
            return Ok(());
        }
        let entry = self.host_entry();
        match &mut state.open {
            Open::Access(pending) => {
                let features = self.cpu.pstate_features();
                pending.resume(&mut state.context, &entry, features).map_err(|_| Status::Invalid)?;
            }
            &mut Open::Call(conduit, missing) => match (Answer::from_code(entry.answer), missing) {
                (Some(Answer::Retry), _) => {}
                (Some(Answer::Refuse), Missing::Release) | (Some(Answer::Abort), Missing::Page) => {
                    match conduit {
                        Conduit::Hvc => guest_call::refuse(&mut state.context),
                        Conduit::Smc => rsi::refuse(&mut state.context),
                    }
                    state.context.skip_instruction();
                }
                (Some(Answer::Complete), Missing::Results) => {
                    state.open = Open::Nothing;
                    let outcome = self.complete_host_call(state);
                    self.report = self.conclude(&mut state.open, &mut state.context, conduit, outcome);
                    return Ok(());
                }
                _ => return Err(Status::Invalid.into()),
            },
            Open::Nothing | Open::Ended => {}
        }
        state.open = Open::Nothing;
        Ok(())
    }

    /// Reads what the host says.
    #[inline(always)]
    fn host_entry(&self) -> RunEntry {
        let words = part(self.run_page, RunPage::ENTRY).map(|at| self.cpu.read_words(at));
        RunEntry::from_words(&words.unwrap_or_default())
    }

    /// Takes the ring from a vCPU that is turned on anew.
    fn reset_ring(&self, ring: &mut Ring) {
        let guest = self.vm.guest();
        if let Some(page) = ring.detach(self.transitions, guest, None) {
            self.cpu.note_unpinned(self.transitions.tree(guest.memory()).vttbr, page);
        }
    }

    /// Performs a call that is about the ring. Returns what becomes of it; its results are in the registers if it is done.
    #[inline(never)]
    fn ring_call(&self, ring: &mut Ring, context: &mut Context, call: RingCall) -> Outcome {
        let (transitions, guest) = (self.transitions, self.vm.guest());
        let done = match call {
            RingCall::Attach(page) => match ring.attach(transitions, self.cpu, guest, page) {
                Err(GuestFailure::Absent(page)) => return Outcome::PageFault(page),
                attached => attached.is_ok(),
            },
            RingCall::Detach(page) => ring.detach(transitions, guest, Some(page)).is_some(),
            RingCall::Sync => {
                guest_call::accept(context);
                let told = ring.apply(transitions, self.cpu, guest, self.run_page);
                return if told == 0 { Outcome::Done } else { Outcome::Converted };
            }
        };
        if done {
            guest_call::accept(context)
        } else {
            guest_call::refuse(context)
        }
        Outcome::Done
    }

    #[inline(never)]
    fn complete_host_call(&self, state: &mut VcpuState) -> Outcome {
        let mut registers = [0; 8 * RUN_CALL_REGISTERS];
        if let Some(at) = part(self.run_page, RunPage::RESULTS) {
            self.cpu.read_bytes(at, &mut registers);
        }
        rsi::complete_host_call(self.transitions, self.vm.guest(), &mut state.context, &registers)
    }

    /// Enters the guest, with its interrupts, and handles its exit. The guest goes on unless there is a report.
    #[inline(never)]
    fn enter(&mut self, state: &mut VcpuState, loan: &mut Loan) {
        let (index, list_registers) = (self.index, self.cpu.list_registers());
        // Read once: a timer that has not fired for the interrupt controller yet has a deadline.
        let now = self.cpu.counter();
        if loan.timer_held && !has_passed(state.context.virtual_timer(), now) {
            self.cpu.release_virtual_timer();
            loan.timer_held = false;
        }
        let timers_changed = state.timers.update(&state.context, now);
        // Most entries are like the one before.
        if timers_changed || state.entered_at != self.vm.gic_changes() {
            state.entered_at = self.vm.enter_gic(|gic| {
                if timers_changed {
                    state.timers.tell(gic, index);
                }
                gic.enter_again(index, list_registers, &mut state.interface)
            });
        }
        let vmcr = state.interface.vmcr;
        let tree = self.transitions.tree(self.vm.guest().memory());
        let deadline = state.context.physical_timer().filter(|&deadline| deadline > now);
        let mut entry = Entry {
            context: &mut state.context,
            gic: &mut state.interface,
            tree,
            vcpu: index,
            vectors: loan.vectors,
            deadline,
        };
        let mut handled = None;
        let mut at_once = AtOnce {
            run: self,
            vm: self.vm,
            open: &mut state.open,
            ring: &mut state.ring,
            ids: &state.ids,
            timer_held: loan.timer_held,
            handled: &mut handled,
        };
        let left = self.cpu.enter(self.host, &mut entry, |esr, context| at_once.handles(esr, context));
        // Most exits leave nothing for others to know of. After one that does, it is not entered as before.
        if !state.interface.may_stay(vmcr) {
            self.gic(|gic| gic.after_exit(index, &state.interface));
        }
        match handled {
            Some(report) => self.report = report,
            None => self.handle(state, left, loan),
        }
        if self.report.is_none() {
            // The guest's next instruction may trap again before an interrupt is taken.
            self.report = self.interrupted(&state.context, loan);
        }
    }

    /// Runs `f` on the interrupt controller. What it returns is to be woken; this vCPU is awake.
    fn gic(&mut self, f: impl FnOnce(&mut Gic<'_, VcpuGics<O>>) -> VcpuSet) {
        let wake = self.vm.with_gic(f);
        if !wake.is_empty() {
            self.wake.extend(wake.without(self.index));
        }
    }

    /// Handles an exit. The guest goes on unless there is a report.
    fn handle(&mut self, state: &mut VcpuState, left: Left, loan: &mut Loan) {
        let syndrome = match left {
            Left::Interrupt => return,
            Left::Error => {
                state.open = Open::Ended;
                self.report = Some(Report::Failed);
                return;
            }
            Left::Synchronous(syndrome) => syndrome,
        };
        self.report = match GuestExit::decode(&syndrome, &state.context) {
            GuestExit::Wait => {
                state.context.skip_instruction();
                self.wait(&state.context, &mut state.timers)
            }
            GuestExit::Yield => {
                state.context.skip_instruction();
                Some(Report::Yield)
            }
            GuestExit::Hvc(immediate) => {
                Conduit::Hvc.rewind(&mut state.context);
                self.call(state, immediate)
            }
            GuestExit::Smc(immediate) => self.call(state, immediate),
            GuestExit::Sysreg(access) => {
                self.sysreg(state, access);
                None
            }
            GuestExit::Abort(abort) => return self.abort(state, abort),
            GuestExit::FloatingPoint | GuestExit::Sve if loan.vectors == Vectors::None => {
                self.cpu.load_vectors(state.area);
                loan.vectors = if state.ids.has_sve() { Vectors::Sve } else { Vectors::Simd };
                None
            }
            // SVE that the guest does not have.
            GuestExit::FloatingPoint | GuestExit::Sve | GuestExit::Undefined => {
                state.context.take_undefined(self.cpu.pstate_features());
                None
            }
        };
    }

    /// Sorts out a physical interrupt: a timer of the guest, or the host's business.
    fn interrupted(&self, context: &Context, loan: &mut Loan) -> Option<Report> {
        if !loan.timer_held && has_passed(context.virtual_timer(), self.cpu.counter()) {
            loan.timer_held = self.cpu.hold_virtual_timer();
        }
        self.cpu.interrupt_pending(self.host).then_some(Report::Interrupted)
    }

    /// Waits for an interrupt, unless there is one.
    fn wait(&self, context: &Context, timers: &mut Timers) -> Option<Report> {
        let (index, now) = (self.index, self.cpu.counter());
        let timers_changed = timers.update(context, now);
        let awake = self.vm.with_gic(|gic| {
            if timers_changed {
                timers.tell(gic, index);
            }
            gic.wakes(index)
        });
        // A timer that has fired and does not wake the guest is masked.
        (!awake).then(|| Report::Wait { deadline: context.next_timer(now) })
    }

    /// Performs a call that is not about memory. The program counter is at the instruction.
    fn call(&mut self, state: &mut VcpuState, immediate: u16) -> Option<Report> {
        let report = if immediate == 0 {
            self.standard_call(state)
        } else {
            state.context.set_results([NOT_SUPPORTED]);
            None
        };
        state.context.skip_instruction();
        report
    }

    /// Performs a call of firmware's, whichever way it comes.
    fn standard_call(&mut self, state: &mut VcpuState) -> Option<Report> {
        let VcpuState { context, timers, open, .. } = state;
        if entropy_call(self.cpu, context) {
            return None;
        }
        let [x0, x1, x2, x3, ..] = context.x;
        let vcpus = |vcpu| self.vm.power(vcpu);
        let Some(call) = firmware_call([x0, x1, x2, x3], self.power, vcpus, self.vm.guest().memory_bits()) else {
            context.set_results([NOT_SUPPORTED]);
            return None;
        };
        match call {
            FirmwareCall::Returns(value) => {
                context.set_results([value]);
                None
            }
            FirmwareCall::TurnedOn(vcpu) => {
                context.set_results([0]);
                Some(Report::CpuOn { vcpu })
            }
            FirmwareCall::TurnedOff => Some(Report::CpuOff),
            FirmwareCall::Suspends => {
                context.set_results([0]);
                self.wait(context, timers)
            }
            FirmwareCall::SystemOff => Some(self.end_as(VmEnd::Off, open)),
            FirmwareCall::SystemReset => Some(self.end_as(VmEnd::Reset, open)),
        }
    }

    /// Ends the VM, and with it this vCPU. The others are to find out.
    fn end_as(&mut self, end: VmEnd, open: &mut Open) -> Report {
        *open = Open::Ended;
        let end = self.vm.end_as(end);
        self.wake.extend(self.vm.on().without(self.index));
        Report::of_end(end)
    }

    /// Ends a call, or leaves it open.
    fn conclude(&self, open: &mut Open, context: &mut Context, conduit: Conduit, outcome: Outcome) -> Option<Report> {
        let mut open = |missing| *open = Open::Call(conduit, missing);
        let done = match outcome {
            Outcome::Done | Outcome::Ring(_) => None,
            Outcome::Shared(_) if is_quiet(self.cpu, self.run_page) => None,
            Outcome::Shared(range) => Some(Report::Shared(range)),
            Outcome::Relinquished(range) => Some(Report::Relinquished(range)),
            Outcome::Converted => Some(Report::Converted),
            Outcome::Unshare(range) => {
                open(Missing::Release);
                return Some(Report::Unshare(range));
            }
            Outcome::PageFault(page) => {
                open(Missing::Page);
                return Some(Report::PageFault { page, access: None });
            }
            Outcome::NeedsTables(pages) => {
                open(Missing::Tables);
                return Some(Report::NeedsTables { pages });
            }
            Outcome::HostCall { immediate } => {
                open(Missing::Results);
                return Some(Report::HostCall { immediate });
            }
        };
        context.skip_instruction();
        done
    }

    #[inline(never)]
    fn sysreg(&mut self, state: &mut VcpuState, access: SysregAccess) {
        let index = self.index;
        match access.emulate(&mut state.context, &state.ids, self.cpu.counter()) {
            SysregAction::Read(_) | SysregAction::Written => {}
            SysregAction::Sgi(register, value) => self.gic(|gic| gic.send_sgi(index, register, value)),
            SysregAction::Deactivate(value) => self.gic(|gic| gic.write_dir(index, value)),
            SysregAction::Undefined => return state.context.take_undefined(self.cpu.pstate_features()),
        }
        state.context.skip_instruction();
    }

    fn abort(&mut self, state: &mut VcpuState, abort: Abort) {
        let features = self.cpu.pstate_features();
        let context = &mut state.context;
        let guest = self.vm.guest();
        let Some(page) = abort.page() else {
            return abort.inject(context, features);
        };
        let shared_bit = guest.shared_bit().unwrap_or(0);
        let described = abort.access(context);
        if self.vm.gic_frame(page.raw() & !shared_bit).is_some() {
            let access = described.zip(abort.address());
            let access = access.and_then(|(access, at)| Some((access, self.vm.gic_frame(at.raw() & !shared_bit)?)));
            let done = access.is_some_and(|(access, (frame, offset))| self.gic_access(context, access, frame, offset));
            if !done {
                abort.inject(context, features);
            }
            return;
        }
        let Some(backing) = guest.backing(self.transitions, page, described.is_some()) else { return };
        if let Some((report, pending)) = abort.handle(context, described, backing, guest.kind(), features) {
            state.open = Open::Access(pending);
            self.report = Some(report);
        }
    }

    /// Accesses the interrupt controller. Returns whether there is such a register.
    #[inline(never)]
    fn gic_access(&mut self, context: &mut Context, access: MmioAccess, frame: Frame, offset: u64) -> bool {
        let size = access.bytes();
        let wanted = if access.is_write() {
            Access::Write { size, value: access.stored(context) }
        } else {
            Access::Read { size }
        };
        let index = self.index;
        match self.vm.with_gic(|gic| gic.mmio(index, frame, offset, wanted)) {
            Ok(ravelin_vgic::Outcome::Done { value, kick }) => {
                self.wake.extend(kick.without(index));
                if !access.is_write() {
                    access.load(context, value);
                }
                context.skip_instruction();
                true
            }
            // The guest tries again.
            Ok(ravelin_vgic::Outcome::Retry { kick }) => {
                self.wake.extend(kick.without(index));
                true
            }
            Err(ravelin_vgic::Unsupported) => false,
        }
    }
}

/// Writes what the host is told to its run page: the report, and what there is with any.
#[inline(always)]
fn tell(cpu: &impl PageAccess, run_page: PhysAddr, report: Report, always: [u64; 3]) {
    if let Some(at) = part(run_page, RunPage::EXIT) {
        let [wake_low, wake_high, conversions] = always;
        cpu.write_words(at, &RunExit { wake_low, wake_high, conversions, ..report.run_exit() }.to_words());
    }
}

#[inline(never)]
fn tell_other(cpu: &impl PageAccess, run_page: PhysAddr, report: Report, always: [u64; 3]) {
    tell(cpu, run_page, report, always);
}

/// Returns whether a timer has fired.
fn has_passed(deadline: Option<u64>, now: u64) -> bool {
    deadline.is_some_and(|deadline| deadline <= now)
}

/// Offset of a part of the run page from its start.
fn part(page: PhysAddr, offset: usize) -> Option<PhysAddr> {
    page.checked_add(u64::try_from(offset).ok().filter(|&offset| offset < PAGE_SIZE)?)
}

// Miri would take long over so many VMs.
#[cfg(all(test, not(miri)))]
mod fake_cpu;
#[cfg(all(test, not(miri)))]
mod tests;
