//! The host's side of the hypervisor: what each of its exits does.

use ravelin_abi::{
    CALL_BITMAP, HostCall, MAX_ARGUMENTS, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES, PageStateCode, Pages, Statistics,
    Status, VENDOR_UID, VERSION_MAJOR, VERSION_MINOR,
};
use ravelin_memory::{Ipa, PageRange, PhysRange, RangeError};
use ravelin_ownership::{Failure, GuestMemory, HostFault, HostState, Memory};
use ravelin_pgtable::{Machine, TablePool};
use ravelin_sync::TicketMutex;
use ravelin_vm::{GuestCpu, Handle, MachineMemory, ObjectMemory, PageAccess, Refusal, VcpuState, Vms};

use crate::{
    counters::Counters,
    firmware::Firmware,
    psci::{Cpu, Entries, Start},
    registers::{Registers, set_results},
    smc::Gate,
};

/// What to do about a stage 2 fault of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAction {
    /// Let it try again: it has access now.
    Resume,
    /// Let it take [`Trapped::abort`](crate::Trapped::abort).
    Inject,
}

/// The VMs that the host makes.
pub type HostedVms<O> = Vms<O, GuestMemory, VcpuState>;

/// Handlers of the host's exits, for all CPUs.
pub struct Host<'a, P, F, O: ObjectMemory> {
    pub(crate) memory: &'a Memory<'a, P>,
    pub(crate) vms: &'a HostedVms<O>,
    gate: Gate<'a, F>,
    counters: Counters,
    /// Taken before the lock of `memory`, by UNPIN and by whoever relies on a pin of the hypervisor's own: pins have no
    /// owner, so that an UNPIN of the host would take back ours.
    unpin: TicketMutex<()>,
}

impl<'a, P: TablePool, F: Firmware, O: ObjectMemory> Host<'a, P, F, O> {
    /// Asks the firmware what it offers, and returns the handlers for a host that may turn on `cpus`.
    pub fn new(
        memory: &'a Memory<'a, P>,
        vms: &'a HostedVms<O>,
        firmware: F,
        cpus: &'a [Cpu],
        entries: Entries,
    ) -> Self {
        Self {
            memory,
            vms,
            gate: Gate::new(firmware, cpus, entries),
            counters: Counters::default(),
            unpin: TicketMutex::new(()),
        }
    }

    /// Handles `HVC #immediate` from EL1. The host may find its CPU to have run a guest meanwhile.
    pub fn hvc<M: Machine + GuestCpu>(&self, machine: &M, immediate: u16, registers: &mut Registers) {
        let [function, arguments @ ..] = registers;
        let function = *function;
        let call = match (immediate, arguments.first_chunk::<MAX_ARGUMENTS>()) {
            (0, Some(arguments)) => {
                if let Some((handle, index)) = HostCall::parse_run(function, arguments) {
                    self.counters.count_call(function);
                    return self.run(machine, handle, index, registers);
                }
                HostCall::parse(function, arguments)
            }
            _ => Err(Status::NotSupported),
        };
        if matches!(call, Err(Status::NotSupported)) {
            return set_results(registers, [Status::NotSupported.register()]);
        }
        self.counters.count_call(function);
        let done = call.map_err(Refusal::from).and_then(|call| self.perform(machine, call, registers));
        if let Err(Refusal { status, detail }) = done {
            set_results(registers, [status.register(), detail]);
        }
    }

    fn run<M: Machine + GuestCpu>(&self, machine: &M, handle: u64, index: u64, registers: &mut Registers) {
        let memory = MachineMemory::new(self.memory, machine);
        let results = match self.vms.run_vcpu(&memory, machine, Handle::from_raw(handle), index) {
            Ok(()) => [SUCCESS, 0],
            Err(Refusal { status, detail }) => [status.register(), detail],
        };
        set_results(registers, results);
    }

    /// Handles `SMC #immediate` from EL1 on `cpu`, the index of the CPU it runs on. The caller has moved the host's program
    /// counter behind the instruction. Does not return if the host turns off or suspends that CPU, or ends the machine.
    #[inline(never)]
    pub fn smc(&self, cpu: usize, immediate: u16, registers: &mut Registers) {
        let is_hosts = |page| self.memory.page_state(page).state != HostState::NoPage;
        self.gate.smc(cpu, immediate, registers, &self.counters, is_hosts);
    }

    /// Returns where the host wants `cpu` to start, which the firmware has started at one of the [`Entries`]; once for each
    /// start. `None` if the host has not asked for it.
    pub fn take_start(&self, cpu: usize) -> Option<Start> {
        self.gate.take_start(cpu)
    }

    /// Handles a stage 2 translation fault at `address`.
    #[inline(never)]
    pub fn fault<M: Machine>(&self, machine: &M, address: Ipa) -> FaultAction {
        match self.memory.host_fault(machine, address) {
            HostFault::Resolved => FaultAction::Resume,
            HostFault::Denied => FaultAction::Inject,
        }
    }

    fn perform<M: Machine + GuestCpu>(
        &self,
        machine: &M,
        call: HostCall,
        registers: &mut Registers,
    ) -> Result<(), Refusal> {
        let memory = self.memory;
        match call {
            HostCall::Uid => set_results(registers, VENDOR_UID.map(u64::from)),
            HostCall::Revision => set_results(registers, [VERSION_MAJOR.into(), VERSION_MINOR.into()]),
            HostCall::Features => {
                set_results(registers, [SUCCESS, CALL_BITMAP, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES]);
            }
            HostCall::Share(pages) => finish(registers, memory.share(machine, range(pages)?))?,
            HostCall::Unshare(pages) => finish(registers, memory.unshare(machine, range(pages)?))?,
            HostCall::Donate(pages) => finish(registers, memory.donate(machine, range(pages)?))?,
            HostCall::TakeBack(pages) => finish(registers, memory.take_back(machine, range(pages)?))?,
            HostCall::Pin(pages) => finish(registers, memory.pin(machine, range(pages)?))?,
            HostCall::Unpin(pages) => {
                let _ours_stay = self.unpin.lock();
                finish(registers, memory.unpin(machine, range(pages)?))?;
            }
            HostCall::PageState { page } => {
                let report = memory.page_state(single(page)?.base());
                set_results(registers, [SUCCESS, state_code(report.state).code(), report.pins]);
            }
            HostCall::Statistics { page } => {
                set_results(registers, [SUCCESS, self.write_statistics(machine, single(page)?)?]);
            }
            HostCall::Run { handle, index } => self.run(machine, handle, index, registers),
            HostCall::Vm(call) => self.perform_vm(machine, &call, registers)?,
        }
        Ok(())
    }

    /// Writes the statistics to a shared page and returns their size. Out of line, so that the other calls do not pay for its
    /// stack.
    #[inline(never)]
    fn write_statistics<M: Machine + PageAccess>(&self, machine: &M, page: PhysRange) -> Result<u64, Refusal> {
        let _ours_stays = self.unpin.lock();
        self.memory.pin(machine, page)?;
        let statistics = self.statistics(machine);
        self.memory.with_stable_map(page.base(), || machine.write_bytes(page.base(), &statistics.to_bytes()));
        self.memory.unpin(machine, page)?;
        Ok(statistics.size)
    }

    fn statistics<M: Machine>(&self, machine: &M) -> Statistics {
        let memory = self.memory.counts(machine);
        let pages = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        Statistics {
            version: Statistics::VERSION,
            size: pages(Statistics::SIZE),
            host_owned_pages: memory.host_owned,
            host_shared_pages: memory.host_shared,
            hypervisor_pages: memory.hyp_owned,
            donated_pages: memory.hyp_donated,
            host_tables: pages(memory.host_tables),
            el2_tables: pages(memory.el2_tables),
            free_tables: pages(memory.free_tables),
            stage2_invalidations: memory.stage2_invalidations,
            el2_invalidations: memory.el2_invalidations,
            faults_resolved: memory.faults_resolved,
            faults_denied: memory.faults_denied,
            evictions: memory.evictions,
            smcs_forwarded: self.counters.smcs_forwarded.get(),
            smcs_refused: self.counters.smcs_refused.get(),
            calls: self.counters.calls(),
            vm_pages: memory.hyp_kept,
            host_lent_pages: memory.host_lent,
            guest_private_pages: memory.guest_owned,
            guest_offered_pages: memory.guest_offered,
            guest_claimed_pages: memory.guest_claimed,
        }
    }
}

pub(crate) const SUCCESS: u64 = Status::Success.register();

/// Returns from a transition.
fn finish(registers: &mut Registers, outcome: Result<(), Failure>) -> Result<(), Refusal> {
    outcome?;
    set_results(registers, [SUCCESS, 0]);
    Ok(())
}

/// Makes a range of what has passed the checks of the interface, which are stricter.
pub(crate) fn range<S>(pages: Pages) -> Result<PageRange<S>, Status> {
    PageRange::new(pages.base, pages.pages).map_err(|error| match error {
        RangeError::Unaligned => Status::Unaligned,
        RangeError::Empty => Status::Invalid,
        RangeError::Overflow => Status::Overflow,
    })
}

/// Makes a range of one page.
pub(crate) fn single(page: u64) -> Result<PhysRange, Status> {
    range(Pages { base: page, pages: 1 })
}

const fn state_code(state: HostState) -> PageStateCode {
    match state {
        HostState::NoPage => PageStateCode::NoPage,
        HostState::Owned => PageStateCode::Owned,
        HostState::SharedOwned => PageStateCode::SharedOwned,
        HostState::SharedBorrowed => PageStateCode::SharedBorrowed,
    }
}
