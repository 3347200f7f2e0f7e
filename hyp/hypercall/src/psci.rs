//! Relay of the host's PSCI calls (Arm DEN0022).
//!
//! A CPU that the host turns on or resumes must come to EL2 first. So the firmware is given an entry point of the hypervisor
//! and the host's own is kept in the CPU's slot, from where the CPU takes it ([`Psci::take_start`]) when EL2 is set up.
//!
//! Who may touch the slot is decided by the CPU's state:
//!
//! ```text
//!          claim              publish               take_start
//!   Off ----------> Claimed -----------> Pending ---------------> On ----> Suspended
//!    ^               (slot written)         |     (slot read)     | ^          | take_start, or
//!    +--------------------------------------+---------------------+ +----------+ the call returns
//!                firmware refuses                 CPU_OFF
//! ```
//!
//! The CPU that boots starts out as Pending. The slot of a CPU is written by the one that claimed it, or by the CPU itself
//! before it suspends. It is read by that CPU after its start-up code has turned on MMU and caches, so that release and
//! acquire are all that the slot needs; no cache maintenance.

use arm_psci::{AffinityInfo, EntryPoint, ErrorCode, Function, FunctionId, Mpidr, PsciFeature};
use ravelin_memory::PhysAddr;
use ravelin_sync::{
    atomic::{
        AtomicU8, AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
    spin_loop,
};

use crate::{
    firmware::{Offer, Version},
    registers::low_half,
};

const OFF: u8 = 0;
const CLAIMED: u8 = 1;
const PENDING: u8 = 2;
const ON: u8 = 3;
const SUSPENDED: u8 = 4;

/// A CPU that the host may turn on.
#[derive(Debug)]
pub struct Cpu {
    mpidr: u64,
    argument: u64,
    state: AtomicU8,
    entry: AtomicU64,
    context: AtomicU64,
}

/// Where the host wants a CPU to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Address of the first instruction; owned by or lent to the host when it asked.
    pub entry: u64,
    /// Value of x0.
    pub context: u64,
}

impl Cpu {
    /// Returns a CPU that is off. `mpidr` holds its affinity fields as MPIDR_EL1 does and no other bits, `argument` is what
    /// the entry points of [`Entries`] get in x0 on it.
    #[must_use]
    pub fn off(mpidr: u64, argument: u64) -> Self {
        Self::new(mpidr, argument, OFF, Start { entry: 0, context: 0 })
    }

    /// Returns the CPU that boots: it is about to take `start`. See [`Cpu::off`].
    #[must_use]
    pub fn booting(mpidr: u64, argument: u64, start: Start) -> Self {
        Self::new(mpidr, argument, PENDING, start)
    }

    /// Returns a CPU that is on.
    #[cfg(test)]
    pub(crate) fn on(mpidr: u64, argument: u64) -> Self {
        Self::new(mpidr, argument, ON, Start { entry: 0, context: 0 })
    }

    fn new(mpidr: u64, argument: u64, state: u8, start: Start) -> Self {
        let Start { entry, context } = start;
        Self {
            mpidr,
            argument,
            state: AtomicU8::new(state),
            entry: AtomicU64::new(entry),
            context: AtomicU64::new(context),
        }
    }

    fn change(&self, from: u8, to: u8) -> Result<(), u8> {
        self.state.compare_exchange(from, to, AcqRel, Acquire).map(|_| ())
    }

    /// Takes the right to turn the CPU on. Of several that try, one gets it.
    fn claim(&self) -> Result<(), ErrorCode> {
        self.change(OFF, CLAIMED).map_err(|state| match state {
            CLAIMED | PENDING => ErrorCode::OnPending,
            _ => ErrorCode::AlreadyOn,
        })
    }

    fn keep(&self, start: Start) {
        self.entry.store(start.entry, Relaxed);
        self.context.store(start.context, Relaxed);
    }

    /// Takes what the host wants of the CPU that comes up.
    fn take_start(&self) -> Option<Start> {
        self.change(PENDING, ON).or_else(|_| self.change(SUSPENDED, ON)).ok()?;
        Some(Start { entry: self.entry.load(Relaxed), context: self.context.load(Relaxed) })
    }
}

/// Where the firmware starts a CPU for the hypervisor: physical addresses, entered at EL2 with the MMU off and x0 as
/// [`Cpu::off`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entries {
    /// For CPU_ON.
    pub start: PhysAddr,
    /// For a CPU that wakes up after it lost its state.
    pub resume: PhysAddr,
}

/// The relay.
#[derive(Debug)]
pub(crate) struct Psci<'a> {
    cpus: &'a [Cpu],
    entries: Entries,
    offer: Offer,
}

/// Which call of the firmware stands behind one of the host's, or `None` if it is not relayed.
///
/// A call that names an entry point is always made as its 64-bit form, as the hypervisor's entry points may lie above 4 GiB.
/// Not relayed: MEM_PROTECT, whose promise to clear memory is about memory that is no longer all the host's; CPU_FREEZE,
/// which leaves a CPU where EL2 has lost track of it; SYSTEM_OFF2, because a hibernated host could not be resumed.
const fn relayed(function: FunctionId) -> Option<FunctionId> {
    match function {
        FunctionId::CpuOn32 => Some(FunctionId::CpuOn64),
        FunctionId::CpuSuspend32 => Some(FunctionId::CpuSuspend64),
        FunctionId::CpuDefaultSuspend32 => Some(FunctionId::CpuDefaultSuspend64),
        FunctionId::SystemSuspend32 => Some(FunctionId::SystemSuspend64),
        FunctionId::PsciVersion
        | FunctionId::CpuOn64
        | FunctionId::CpuOff
        | FunctionId::CpuSuspend64
        | FunctionId::CpuDefaultSuspend64
        | FunctionId::SystemSuspend64
        | FunctionId::AffinityInfo32
        | FunctionId::AffinityInfo64
        | FunctionId::Migrate32
        | FunctionId::Migrate64
        | FunctionId::MigrateInfoType
        | FunctionId::MigrateInfoUpCpu32
        | FunctionId::MigrateInfoUpCpu64
        | FunctionId::SystemOff
        | FunctionId::SystemReset
        | FunctionId::SystemReset232
        | FunctionId::SystemReset264
        | FunctionId::PsciFeatures
        | FunctionId::NodeHwState32
        | FunctionId::NodeHwState64
        | FunctionId::PsciSetSuspendMode
        | FunctionId::PsciStatResidency32
        | FunctionId::PsciStatResidency64
        | FunctionId::PsciStatCount32
        | FunctionId::PsciStatCount64 => Some(function),
        FunctionId::MemProtect
        | FunctionId::MemProtectCheckRange32
        | FunctionId::MemProtectCheckRange64
        | FunctionId::CpuFreeze
        | FunctionId::SystemOff232
        | FunctionId::SystemOff264 => None,
    }
}

/// Whether a number is one of those that SMCCC reserves for PSCI.
pub(crate) const fn is_psci(function: u32) -> bool {
    function & !0x4000_001f == 0x8400_0000
}

impl<'a> Psci<'a> {
    pub(crate) const fn new(cpus: &'a [Cpu], entries: Entries, offer: Offer) -> Self {
        Self { cpus, entries, offer }
    }

    /// Takes where the host wants `cpu`, which has just come up at one of the [`Entries`], to start. `None` if the host has
    /// not asked for it.
    pub(crate) fn take_start(&self, cpu: usize) -> Option<Start> {
        self.cpus.get(cpu)?.take_start()
    }

    /// Relays a call that the host made on `cpu` through `smc` and returns x0. `is_hosts` says whether the host has access to
    /// a page of RAM.
    ///
    /// # Errors
    ///
    /// Those of PSCI, where the hypervisor finds the error itself.
    pub(crate) fn call(
        &self,
        cpu: usize,
        registers: [u64; 4],
        smc: impl Fn([u64; 4]) -> [u64; 4],
        is_hosts: impl Fn(PhysAddr) -> bool,
    ) -> Result<u64, ErrorCode> {
        let forward = |registers| {
            let [x0, ..] = smc(registers);
            x0
        };
        let start = |entry: EntryPoint| Start { entry: entry.entry_point_address(), context: entry.context_id() };
        let check = |entry: EntryPoint| {
            let start = start(entry);
            let valid =
                PhysAddr::new(start.entry).is_some_and(|address| address.is_aligned(4) && is_hosts(address.page()));
            if valid { Ok(start) } else { Err(ErrorCode::InvalidAddress) }
        };

        let [function, ..] = registers;
        // Before the arguments are looked at: what is not relayed has none.
        relayed(FunctionId::try_from(low_half(function))?).ok_or(ErrorCode::NotSupported)?;
        match Function::try_from(&registers)? {
            Function::Version => Ok(self.offer.psci.min(Version::V1_1).0.into()),
            Function::Features { psci_func_id: PsciFeature::SmcccVersion } => Ok(0),
            Function::Features { psci_func_id: PsciFeature::PsciFunction(function) } => {
                let function = relayed(function).ok_or(ErrorCode::NotSupported)?;
                Ok(forward([FunctionId::PsciFeatures.id(), function.id(), 0, 0]))
            }
            Function::CpuOn { target_cpu, entry } => {
                let target = self.find(target_cpu)?;
                self.turn_on(target, check(entry)?, forward)
            }
            Function::CpuOff => self.turn_off(cpu, || forward(registers)),
            Function::CpuSuspend { state, entry } => {
                let state = u32::from(state);
                // The firmware ignores the entry point of a state that keeps the CPU's contents, and so do we.
                let start = if state & self.offer.power_down == 0 { start(entry) } else { check(entry)? };
                self.suspend(cpu, start, |entry, argument| {
                    forward([FunctionId::CpuSuspend64.id(), state.into(), entry, argument])
                })
            }
            Function::CpuDefaultSuspend { entry } => self.suspend(cpu, check(entry)?, |entry, argument| {
                forward([FunctionId::CpuDefaultSuspend64.id(), entry, argument, 0])
            }),
            Function::SystemSuspend { entry } => self.suspend(cpu, check(entry)?, |entry, argument| {
                forward([FunctionId::SystemSuspend64.id(), entry, argument, 0])
            }),
            Function::AffinityInfo { mpidr, lowest_affinity_level: 0 } => {
                // The firmware calls a CPU on that has not reached the host yet.
                match self.find(mpidr)?.state.load(Relaxed) {
                    CLAIMED | PENDING => Ok(u32::from(AffinityInfo::OnPending).into()),
                    _ => Ok(forward(registers)),
                }
            }
            Function::AffinityInfo { .. }
            | Function::Migrate { .. }
            | Function::MigrateInfoType
            | Function::MigrateInfoUpCpu { .. }
            | Function::SystemOff
            | Function::SystemReset
            | Function::SystemReset2 { .. }
            | Function::NodeHwState { .. }
            | Function::SetSuspendMode { .. }
            | Function::StatResidency { .. }
            | Function::StatCount { .. } => Ok(forward(registers)),
            Function::MemProtect { .. }
            | Function::MemProtectCheckRange { .. }
            | Function::CpuFreeze
            | Function::SystemOff2 { .. } => Err(ErrorCode::NotSupported),
        }
    }

    fn find(&self, mpidr: Mpidr) -> Result<&Cpu, ErrorCode> {
        let mpidr = u64::from(mpidr);
        self.cpus.iter().find(|cpu| cpu.mpidr == mpidr).ok_or(ErrorCode::InvalidParameters)
    }

    fn turn_on(&self, target: &Cpu, start: Start, forward: impl Fn([u64; 4]) -> u64) -> Result<u64, ErrorCode> {
        target.claim()?;
        target.keep(start);
        target.state.store(PENDING, Release);
        let answer = forward([FunctionId::CpuOn64.id(), target.mpidr, self.entries.start.raw(), target.argument]);
        if low_half(answer) != 0 {
            // Fails if the firmware has started it all the same, and then there is nothing to take back.
            let _ = target.change(PENDING, OFF);
        }
        Ok(answer)
    }

    fn turn_off(&self, cpu: usize, forward: impl Fn() -> u64) -> Result<u64, ErrorCode> {
        let this = self.cpus.get(cpu).ok_or(ErrorCode::InternalFailure)?;
        // Before the firmware acts, because nothing can be done afterwards. Whoever turns the CPU on in between is told by
        // the firmware that it is still on.
        this.state.store(OFF, Release);
        let answer = forward();
        // It returned, so the CPU is still on. Whoever has claimed it is told so by the firmware and lets go. Until then the slot
        // is theirs: they may still write to it what this CPU would take for its own when it suspends.
        while this.change(OFF, ON).is_err() {
            spin_loop();
        }
        Ok(answer)
    }

    fn suspend(&self, cpu: usize, start: Start, forward: impl Fn(u64, u64) -> u64) -> Result<u64, ErrorCode> {
        let this = self.cpus.get(cpu).ok_or(ErrorCode::InternalFailure)?;
        this.keep(start);
        this.state.store(SUSPENDED, Release);
        // The entry point is ours also for states that should not need it, so that the firmware never has one of the
        // host's, at which it would enter EL2.
        let answer = forward(self.entries.resume.raw(), this.argument);
        // It returned, so nothing was lost.
        this.state.store(ON, Release);
        Ok(answer)
    }
}

/// The number of a function as a register value.
trait Id {
    fn id(self) -> u64;
}

impl Id for FunctionId {
    fn id(self) -> u64 {
        u32::from(self).into()
    }
}

#[cfg(test)]
mod tests {
    #[cfg(loom)]
    mod models;

    use std::sync::{
        Barrier,
        atomic::{AtomicBool, AtomicUsize},
    };

    use super::*;
    use crate::{
        Firmware,
        fake::{FakeFirmware, entries, modern},
    };

    const CPU_ON: u64 = 0xc400_0003;
    const CPU_ON32: u64 = 0x8400_0003;
    const CPU_OFF: u64 = 0x8400_0002;
    const AFFINITY_INFO: u64 = 0xc400_0004;
    const ENTRY: u64 = 0x4008_0000;
    const HOST: core::ops::Range<u64> = 0x4000_0000..0x5000_0000;

    fn code(error: ErrorCode) -> u64 {
        error.into()
    }

    fn psci(cpus: &[Cpu]) -> Psci<'_> {
        Psci::new(cpus, entries(), Offer::probe(&&FakeFirmware::new(modern)))
    }

    /// Calls as CPU 0 and returns x0.
    fn call(psci: &Psci<'_>, firmware: &FakeFirmware<impl Fn([u64; 4]) -> [u64; 4]>, values: [u64; 4]) -> u64 {
        call_on(psci, 0, firmware, values)
    }

    fn call_on(
        psci: &Psci<'_>,
        cpu: usize,
        firmware: &FakeFirmware<impl Fn([u64; 4]) -> [u64; 4]>,
        values: [u64; 4],
    ) -> u64 {
        psci.call(cpu, values, |values| firmware.smc(values), |page| HOST.contains(&page.raw())).unwrap_or_else(code)
    }

    fn cpus() -> [Cpu; 3] {
        [Cpu::on(0, 0xa0), Cpu::off(0x1_0000_0001, 0xa1), Cpu::off(2, 0xa2)]
    }

    #[test]
    fn a_cpu_comes_to_us_first() {
        let cpus = cpus();
        let psci = psci(&cpus);
        let firmware = FakeFirmware::new(modern);
        assert_eq!(call(&psci, &firmware, [CPU_ON, 0x1_0000_0001, ENTRY, 77]), 0);
        assert_eq!(firmware.take(), [[CPU_ON, 0x1_0000_0001, 0x1_0000_1000, 0xa1]]);

        // Until it has come, it is on its way, whatever the firmware says.
        assert_eq!(call(&psci, &firmware, [AFFINITY_INFO, 0x1_0000_0001, 0, 0]), 2);
        assert_eq!(call(&psci, &firmware, [CPU_ON, 0x1_0000_0001, ENTRY, 78]), code(ErrorCode::OnPending));
        assert_eq!(firmware.take(), [[0; 4]; 0]);

        assert_eq!(psci.take_start(2), None);
        assert_eq!(psci.take_start(3), None);
        assert_eq!(psci.take_start(1), Some(Start { entry: ENTRY, context: 77 }));
        assert_eq!(psci.take_start(1), None);
        assert_eq!(call(&psci, &firmware, [CPU_ON, 0x1_0000_0001, ENTRY, 79]), code(ErrorCode::AlreadyOn));
        assert_eq!(firmware.take(), [[0; 4]; 0]);
        assert_eq!(call(&psci, &firmware, [AFFINITY_INFO, 0x1_0000_0001, 0, 0]), 0);
        assert_eq!(firmware.take(), [[AFFINITY_INFO, 0x1_0000_0001, 0, 0]]);
    }

    #[test]
    fn a_32_bit_call_is_made_with_64_bits() {
        let cpus = cpus();
        let psci = psci(&cpus);
        let firmware = FakeFirmware::new(modern);
        assert_eq!(call(&psci, &firmware, [CPU_ON32, 2, ENTRY, 5]), 0);
        assert_eq!(firmware.take(), [[CPU_ON, 2, 0x1_0000_1000, 0xa2]]);
        assert_eq!(psci.take_start(2), Some(Start { entry: ENTRY, context: 5 }));
        for [from, to] in [[0x8400_000c, 0xc400_000c], [0x8400_000e, 0xc400_000e]] {
            assert_eq!(call(&psci, &firmware, [from, ENTRY, 5, 0]), 0);
            assert_eq!(firmware.take(), [[to, 0x1_0000_2000, 0xa0, 0]]);
        }
        assert_eq!(call(&psci, &firmware, [0x8400_0001, 0x1_0003, ENTRY, 5]), 0);
        assert_eq!(firmware.take(), [[0xc400_0001, 0x1_0003, 0x1_0000_2000, 0xa0]]);
    }

    #[test]
    fn bad_targets_and_entries() {
        let cpus = cpus();
        let psci = psci(&cpus);
        let firmware = FakeFirmware::new(modern);
        for target in [1, 3, 2 | 1 << 24, 2 | 1 << 31, 2 | 1 << 40, u64::MAX] {
            assert_eq!(
                call(&psci, &firmware, [CPU_ON, target, ENTRY, 0]),
                code(ErrorCode::InvalidParameters),
                "{target:#x}"
            );
        }
        for entry in [0, ENTRY + 2, 0x5000_0000, 1 << 48, !3] {
            let invalid = code(ErrorCode::InvalidAddress);
            assert_eq!(call(&psci, &firmware, [CPU_ON, 2, entry, 0]), invalid, "{entry:#x}");
            assert_eq!(call(&psci, &firmware, [0xc400_0001, 0x1_0000, entry, 0]), invalid, "{entry:#x}");
            assert_eq!(call(&psci, &firmware, [0xc400_000c, entry, 0, 0]), invalid, "{entry:#x}");
            assert_eq!(call(&psci, &firmware, [0xc400_000e, entry, 0, 0]), invalid, "{entry:#x}");
        }
        assert_eq!(call(&psci, &firmware, [AFFINITY_INFO, 3, 0, 0]), code(ErrorCode::InvalidParameters));
        assert_eq!(call(&psci, &firmware, [AFFINITY_INFO, 2, 4, 0]), code(ErrorCode::InvalidParameters));
        assert_eq!(firmware.take(), [[0; 4]; 0]);
        assert_eq!([0, 1, 2].map(|cpu| psci.take_start(cpu)), [None; 3]);
        assert_eq!(call(&psci, &firmware, [CPU_ON, 2, ENTRY, 0]), 0, "nothing was left behind");
    }

    #[test]
    fn a_failed_start_can_be_tried_again() {
        let cpus = cpus();
        let psci = psci(&cpus);
        let failure = code(ErrorCode::InternalFailure);
        let firmware = FakeFirmware::new(|_| [failure, 0, 0, 0]);
        assert_eq!(call(&psci, &firmware, [CPU_ON, 2, ENTRY, 1]), failure);
        assert_eq!(psci.take_start(2), None);
        let firmware = FakeFirmware::new(modern);
        assert_eq!(call(&psci, &firmware, [CPU_ON, 2, ENTRY, 2]), 0);
        assert_eq!(psci.take_start(2), Some(Start { entry: ENTRY, context: 2 }));
    }

    #[test]
    fn off_and_on_again() {
        let cpus = cpus();
        let psci = psci(&cpus);
        let firmware = FakeFirmware::new(modern);
        for round in 0..100 {
            assert_eq!(call(&psci, &firmware, [CPU_ON, 2, ENTRY, round]), 0);
            assert_eq!(psci.take_start(2), Some(Start { entry: ENTRY, context: round }));
            // The firmware does not return: look at what is the case meanwhile.
            let off = FakeFirmware::new(|values| {
                assert_eq!(values, [CPU_OFF, 0, 0, 0]);
                assert_eq!(cpus[2].state.load(Relaxed), OFF);
                cpus[2].claim().unwrap();
                assert_eq!(cpus[2].change(CLAIMED, OFF), Ok(()));
                [0; 4]
            });
            call_on(&psci, 2, &off, [CPU_OFF, 0, 0, 0]);
            cpus[2].state.store(OFF, Relaxed);
        }
    }

    #[test]
    fn a_cpu_that_may_not_go_off_stays_on() {
        let cpus = cpus();
        let psci = psci(&cpus);
        let denied = code(ErrorCode::Denied);
        let firmware = FakeFirmware::new(|_| [denied, 0, 0, 0]);
        assert_eq!(call(&psci, &firmware, [CPU_OFF, 0, 0, 0]), denied);
        assert_eq!(call(&psci, &firmware, [CPU_ON, 0, ENTRY, 0]), code(ErrorCode::AlreadyOn));
        assert_eq!(firmware.take(), [[CPU_OFF, 0, 0, 0]]);
    }

    #[test]
    fn a_start_during_a_denied_off_finds_the_cpu_on() {
        let cpus = cpus();
        let psci = psci(&cpus);
        let already_on = code(ErrorCode::AlreadyOn);
        let denied = code(ErrorCode::Denied);
        let inner = FakeFirmware::new(|_| [already_on, 0, 0, 0]);
        let firmware = FakeFirmware::new(|_| {
            assert_eq!(call_on(&psci, 1, &inner, [CPU_ON, 0, ENTRY, 9]), already_on);
            [denied, 0, 0, 0]
        });
        assert_eq!(call(&psci, &firmware, [CPU_OFF, 0, 0, 0]), denied);
        assert_eq!(cpus[0].state.load(Relaxed), ON);
    }

    #[test]
    fn a_suspended_cpu_resumes_where_the_host_wants() {
        let cpus = cpus();
        let psci = psci(&cpus);
        let resumed = FakeFirmware::new(|_| {
            assert_eq!(
                call_on(&psci, 1, &FakeFirmware::new(modern), [CPU_ON, 0, ENTRY, 0]),
                code(ErrorCode::AlreadyOn)
            );
            assert_eq!(psci.take_start(0), Some(Start { entry: ENTRY, context: 6 }));
            assert_eq!(psci.take_start(0), None);
            [0; 4]
        });
        assert_eq!(call(&psci, &resumed, [0xc400_0001, 0x1_0000, ENTRY, 6]), 0);
        assert_eq!(resumed.take(), [[0xc400_0001, 0x1_0000, 0x1_0000_2000, 0xa0]]);
        assert_eq!(psci.take_start(0), None);
    }

    #[test]
    fn standby_does_not_need_an_entry() {
        let cpus = cpus();
        let firmware = FakeFirmware::new(modern);
        assert_eq!(call(&psci(&cpus), &firmware, [0xc400_0001, 0x3, 0xdead, 6]), 0);
        assert_eq!(firmware.take(), [[0xc400_0001, 3, 0x1_0000_2000, 0xa0]]);
        assert_eq!(psci(&cpus).take_start(0), None);

        // In the extended format it is another bit that tells.
        let extended =
            |values: [u64; 4]| if let [0x8400_000a, 0xc400_0001, ..] = values { [2, 0, 0, 0] } else { modern(values) };
        let psci = Psci::new(&cpus, entries(), Offer::probe(&&FakeFirmware::new(extended)));
        assert_eq!(call(&psci, &firmware, [0xc400_0001, 1 << 16, 0xdead, 6]), 0);
        assert_eq!(call(&psci, &firmware, [0xc400_0001, 1 << 30, 0xdead, 6]), code(ErrorCode::InvalidAddress));
        assert_eq!(call(&psci, &firmware, [0xc400_0001, 1 << 31, ENTRY, 6]), code(ErrorCode::InvalidParameters));
    }

    #[test]
    fn features_are_those_that_are_relayed() {
        let cpus = cpus();
        let psci = psci(&cpus);
        let supported = code(ErrorCode::NotSupported);
        for number in (0x8400_0000..=0x8400_001f).chain(0xc400_0000..=0xc400_001f) {
            let firmware = FakeFirmware::new(modern);
            let feature = call(&psci, &firmware, [0x8400_000a, number, 0, 0]);
            assert_eq!(firmware.take().len(), usize::from(feature == 0));
            // Arguments that suit every call well enough to find out whether it exists.
            let answer = call(&psci, &firmware, [number, 0x8400_0000, 0, 0]);
            assert_eq!(feature == supported, answer == supported, "{number:#x}");
        }
        let firmware = FakeFirmware::new(|_| [supported, 0, 0, 0]);
        assert_eq!(call(&psci, &firmware, [0x8400_000a, 0x8400_0003, 0, 0]), supported);
        assert_eq!(firmware.take(), [[0x8400_000a, 0xc400_0003, 0, 0]]);
        assert_eq!(call(&psci, &firmware, [0x8400_000a, 0x8000_0000, 0, 0]), 0);
    }

    #[test]
    fn the_version_is_at_most_what_is_known() {
        let cpus = cpus();
        for [theirs, ours] in [[0x2, 0x2], [0x1_0000, 0x1_0000], [0x1_0001, 0x1_0001], [0x1_0003, 0x1_0001]] {
            let firmware = FakeFirmware::new(|_| [theirs, 0, 0, 0]);
            let psci = Psci::new(&cpus, entries(), Offer::probe(&&firmware));
            // PSCI_FEATURES, which also says whether there is more to ask for, came with 1.0.
            assert_eq!(firmware.take().iter().any(|call| call[0] == 0x8400_000a), theirs >= 0x1_0000);
            assert_eq!(call(&psci, &firmware, [0x8400_0000, 0, 0, 0]), ours);
        }
    }

    #[test]
    fn psci_has_64_numbers() {
        for first in [0x8400_0000, 0xc400_0000] {
            let expected = [false, true, true, false];
            assert_eq!([first - 1, first, first + 0x1f, first + 0x20].map(is_psci), expected);
        }
        assert!(![0x0400_0000, 0x8000_0000, 0x8500_0000, 0x8600_0000].into_iter().any(is_psci));
    }

    #[test]
    fn of_many_that_turn_a_cpu_on_one_does() {
        const CALLERS: usize = 4;
        const ROUNDS: u64 = if cfg!(miri) { 20 } else { 2000 };
        let cpus = [Cpu::on(0, 0), Cpu::on(1, 0), Cpu::on(2, 0), Cpu::on(3, 0), Cpu::off(4, 0)];
        let psci = psci(&cpus);
        let powered = AtomicBool::new(false);
        let starts = AtomicUsize::new(0);
        let firmware = FakeFirmware::new(|_| match powered.swap(true, AcqRel) {
            false => {
                starts.fetch_add(1, Relaxed);
                [0; 4]
            }
            true => [code(ErrorCode::AlreadyOn), 0, 0, 0],
        });
        let barrier = Barrier::new(CALLERS + 1);
        std::thread::scope(|scope| {
            let callers: Vec<_> = (0..CALLERS)
                .map(|cpu| {
                    let (psci, firmware, barrier) = (&psci, &firmware, &barrier);
                    scope.spawn(move || {
                        let mut successes = Vec::new();
                        for round in 0..ROUNDS {
                            barrier.wait();
                            let context = round << 8 | cpu as u64;
                            match call_on(psci, cpu, firmware, [CPU_ON, 4, ENTRY + 4 * cpu as u64, context]) {
                                0 => successes.push(context),
                                error => {
                                    assert!(error == code(ErrorCode::OnPending) || error == code(ErrorCode::AlreadyOn))
                                }
                            }
                            barrier.wait();
                        }
                        successes
                    })
                })
                .collect();
            let mut started = Vec::new();
            for _ in 0..ROUNDS {
                barrier.wait();
                let start = loop {
                    if powered.load(Acquire) {
                        break psci.take_start(4).expect("the slot is there when the CPU comes");
                    }
                };
                assert_eq!(start.entry, ENTRY + 4 * (start.context & 0xff));
                started.push(start.context);
                barrier.wait();
                // Off again.
                call_on(&psci, 4, &FakeFirmware::new(|_| [0; 4]), [CPU_OFF, 0, 0, 0]);
                cpus[4].state.store(OFF, Release);
                powered.store(false, Release);
            }
            let mut successes: Vec<_> = callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect();
            successes.sort_unstable();
            assert_eq!(successes, started, "each start is the one caller's that was told of success");
        });
        assert_eq!(starts.into_inner() as u64, ROUNDS);
    }
}
