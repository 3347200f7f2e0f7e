//! The host's side of the hypervisor: what each of its exits does.

use ravelin_abi::{
    CALLS, HostCall, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES, PageStateCode, Pages, Statistics, Status, VENDOR_UID,
    VERSION_MAJOR, VERSION_MINOR, call_bitmap,
};
use ravelin_memory::{Ipa, PhysAddr, PhysRange, RangeError};
use ravelin_ownership::{Failure, HostFault, HostState, Memory, Reason};
use ravelin_pgtable::{Machine, TablePool};
use spin::mutex::TicketMutex;

use crate::{
    counters::Counters,
    firmware::Firmware,
    psci::{Cpu, Entries, Start},
    registers::{Registers, set_results},
    smc::Gate,
};

/// Access to memory that the hypervisor has mapped.
pub trait MappedMemory {
    /// Copies `bytes`, at most a page, to the start of a page that is mapped writable in the EL2 stage 1. Others may access
    /// the page at the same time.
    fn write_page(&self, page: PhysAddr, bytes: &[u8]);
}

/// What to do about a stage 2 fault of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAction {
    /// Let it try again: it has access now.
    Resume,
    /// Let it take [`Trapped::abort`](crate::Trapped::abort).
    Inject,
}

/// Handlers of the host's exits, for all CPUs.
pub struct Host<'a, P, F> {
    memory: &'a Memory<'a, P>,
    gate: Gate<'a, F>,
    counters: Counters,
    /// Taken before the lock of `memory`, by UNPIN and by whoever relies on a pin of the hypervisor's own: pins have no
    /// owner, so that an UNPIN of the host would take back ours.
    unpin: TicketMutex<()>,
}

impl<'a, P: TablePool, F: Firmware> Host<'a, P, F> {
    /// Asks the firmware what it offers, and returns the handlers for a host that may turn on `cpus`.
    pub fn new(memory: &'a Memory<'a, P>, firmware: F, cpus: &'a [Cpu], entries: Entries) -> Self {
        Self {
            memory,
            gate: Gate::new(firmware, cpus, entries),
            counters: Counters::default(),
            unpin: TicketMutex::new(()),
        }
    }

    /// Handles `HVC #immediate` from EL1.
    pub fn hvc<M: Machine + MappedMemory>(&self, machine: &M, immediate: u16, registers: &mut Registers) {
        let [function, x1, x2, x3, x4, x5, x6, ..] = *registers;
        let call = match immediate {
            0 => HostCall::parse(function, [x1, x2, x3, x4, x5, x6]),
            _ => Err(Status::NotSupported),
        };
        if matches!(call, Err(Status::NotSupported)) {
            return set_results(registers, [Status::NotSupported.register()]);
        }
        self.counters.count_call(function);
        let done = call.map_err(Refusal::from).and_then(|call| self.perform(machine, call, registers));
        if let Err(Refusal { status, page }) = done {
            set_results(registers, [status.register(), page]);
        }
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

    fn perform<M: Machine + MappedMemory>(
        &self,
        machine: &M,
        call: HostCall,
        registers: &mut Registers,
    ) -> Result<(), Refusal> {
        let memory = self.memory;
        match call {
            HostCall::Uid => set_results(registers, VENDOR_UID.map(u64::from)),
            HostCall::Revision => set_results(registers, [VERSION_MAJOR, VERSION_MINOR].map(u64::from)),
            HostCall::Features => {
                set_results(registers, [SUCCESS, call_bitmap(CALLS), MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES]);
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
                let report = memory.page_state(range(Pages { base: page, pages: 1 })?.base());
                set_results(registers, [SUCCESS, state_code(report.state).code(), report.pins]);
            }
            HostCall::Statistics { page } => {
                let page = range(Pages { base: page, pages: 1 })?;
                set_results(registers, [SUCCESS, self.write_statistics(machine, page)?]);
            }
            HostCall::Vm(_) => return Err(Status::NotSupported.into()),
        }
        Ok(())
    }

    /// Writes the statistics to a shared page and returns their size.
    fn write_statistics<M: Machine + MappedMemory>(&self, machine: &M, page: PhysRange) -> Result<u64, Refusal> {
        let _ours_stays = self.unpin.lock();
        self.memory.pin(machine, page)?;
        let statistics = self.statistics();
        self.memory.with_stable_map(|| machine.write_page(page.base(), &statistics.to_bytes()));
        self.memory.unpin(machine, page)?;
        Ok(statistics.size)
    }

    fn statistics(&self) -> Statistics {
        let memory = self.memory.counts();
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
        }
    }
}

const SUCCESS: u64 = Status::Success.register();

/// Returns from a transition.
fn finish(registers: &mut Registers, outcome: Result<(), Failure>) -> Result<(), Refusal> {
    outcome?;
    set_results(registers, [SUCCESS, 0]);
    Ok(())
}

/// Why a call fails.
struct Refusal {
    status: Status,
    /// The first page that failed, or 0.
    page: u64,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self { status, page: 0 }
    }
}

impl From<Failure> for Refusal {
    fn from(Failure { reason, page }: Failure) -> Self {
        let page = page.raw();
        match reason {
            Reason::NotRam => Self { status: Status::NotRam, page },
            Reason::Denied => Self { status: Status::Denied, page },
            Reason::Busy => Self { status: Status::Busy, page },
            Reason::PinLimit => Self { status: Status::Limit, page },
            // No page is to blame for that.
            Reason::NoMemory => Status::NoMemory.into(),
        }
    }
}

/// Makes a range of what has passed the checks of the interface, which are stricter.
fn range(pages: Pages) -> Result<PhysRange, Status> {
    PhysRange::new(pages.base, pages.pages).map_err(|error| match error {
        RangeError::Unaligned => Status::Unaligned,
        RangeError::Empty => Status::Invalid,
        RangeError::Overflow => Status::Overflow,
    })
}

const fn state_code(state: HostState) -> PageStateCode {
    match state {
        HostState::NoPage => PageStateCode::NoPage,
        HostState::Owned => PageStateCode::Owned,
        HostState::SharedOwned => PageStateCode::SharedOwned,
        HostState::SharedBorrowed => PageStateCode::SharedBorrowed,
    }
}
