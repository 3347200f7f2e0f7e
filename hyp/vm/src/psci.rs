//! PSCI (Arm DEN0022, version 1.1) and discovery by the SMC Calling Convention (Arm DEN0028, version 1.1), as a guest calls
//! them.
//!
//! A vCPU that is turned on is run when the host gets round to it. Until then its first instruction is kept in its
//! [`Power`], and who may touch that is decided by the state:
//!
//! ```text
//!          claim              publish               reset            first run
//!   Off ----------> Claimed -----------> Pending ----------> Ready ------------> On
//!    ^               (written)            (read)                                  |
//!    +----------------------------------------------------------------------------+
//!                                      CPU_OFF
//! ```
//!
//! With the seal, the one that boots is Booting in place of Pending: it keeps what the host has set of its registers. A vCPU of
//! an ordinary VM that its host turns on is Ready at once.

use arm_psci::{
    AffinityInfo, EntryPoint, ErrorCode, Function, FunctionId, MigrateInfoType, Mpidr, PsciFeature, ResetType,
};
use ravelin_sync::atomic::{
    AtomicU8, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use ravelin_vgic::{affinity, vcpu_of_affinity};

use crate::guest::NOT_SUPPORTED;

const OFF: u8 = 0;
const CLAIMED: u8 = 1;
const PENDING: u8 = 2;
const BOOTING: u8 = 3;
const READY: u8 = 4;
const ON: u8 = 5;

/// Whether a vCPU is on, and where it starts. All vCPUs of its VM may use it at the same time.
#[derive(Debug)]
pub struct Power {
    state: AtomicU8,
    pc: AtomicU64,
    x0: AtomicU64,
}

/// What the host finds when it runs a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It is off: it cannot be run.
    Off,
    /// It has been turned on, and its registers are as it starts.
    Starts,
    /// It goes on.
    On,
}

/// How a vCPU starts that has been turned on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstInstruction {
    /// Its guest address.
    pub pc: u64,
    /// Value of x0.
    pub x0: u64,
    /// Whether all else is out of [reset](crate::Context::reset), not as the registers are.
    pub reset: bool,
}

impl Power {
    /// Returns that of a vCPU that is off.
    #[must_use]
    pub fn off() -> Self {
        Self { state: AtomicU8::new(OFF), pc: AtomicU64::new(0), x0: AtomicU64::new(0) }
    }

    /// Turns the vCPU on, as a guest does with CPU_ON. Of several that try, one does.
    ///
    /// # Errors
    ///
    /// `AlreadyOn` or `OnPending`.
    pub fn turn_on(&self, pc: u64, x0: u64) -> Result<(), ErrorCode> {
        self.state.compare_exchange(OFF, CLAIMED, Acquire, Relaxed).map_err(|state| match state {
            ON => ErrorCode::AlreadyOn,
            _ => ErrorCode::OnPending,
        })?;
        self.publish(PENDING, pc, x0);
        Ok(())
    }

    /// Turns the vCPU on with which its VM boots, while nobody else can. Its other registers stay as they are.
    pub(crate) fn boot(&self, pc: u64, x0: u64) {
        self.publish(BOOTING, pc, x0);
    }

    fn publish(&self, state: u8, pc: u64, x0: u64) {
        self.pc.store(pc, Relaxed);
        self.x0.store(x0, Relaxed);
        self.state.store(state, Release);
    }

    /// Returns whether the vCPU goes on, so that neither [`Power::take_start`] nor [`Power::run`] has anything to do. By the one CPU
    /// that is about to run it.
    #[inline]
    pub(crate) fn goes_on(&self) -> bool {
        self.state.load(Acquire) == ON
    }

    /// Returns once how the vCPU starts after it has been turned on. By the one CPU that has it, which sets its registers so.
    pub fn take_start(&self) -> Option<FirstInstruction> {
        let state = self.state.load(Acquire);
        if !matches!(state, PENDING | BOOTING) {
            return None;
        }
        let start = FirstInstruction { pc: self.pc.load(Relaxed), x0: self.x0.load(Relaxed), reset: state == PENDING };
        self.state.store(READY, Relaxed);
        Some(start)
    }

    /// Returns what there is to be run, after [`Power::take_start`]. By the one CPU that is about to run the vCPU.
    pub fn run(&self) -> Readiness {
        match self.state.load(Relaxed) {
            READY => {
                self.state.store(ON, Relaxed);
                Readiness::Starts
            }
            ON => Readiness::On,
            _ => Readiness::Off,
        }
    }

    /// Returns whether the vCPU is on, or has been turned on.
    pub(crate) fn is_on(&self) -> bool {
        self.state.load(Relaxed) != OFF
    }

    /// Turns the vCPU on or off for its host, whose CPU has it. Returns whether it could: not while a guest is turning it on.
    pub(crate) fn set(&self, on: bool) -> bool {
        let state = self.state.load(Relaxed);
        if on {
            // Who else has turned it on meanwhile has done the same.
            let _ = self.state.compare_exchange(OFF, READY, Acquire, Relaxed);
            return true;
        }
        state == OFF || state != CLAIMED && self.state.compare_exchange(state, OFF, Release, Relaxed).is_ok()
    }

    /// Turns off the vCPU, which made the call itself. From now on others may turn it on.
    fn turn_off(&self) {
        self.state.store(OFF, Release);
    }

    fn affinity_info(&self) -> AffinityInfo {
        match self.state.load(Relaxed) {
            OFF => AffinityInfo::Off,
            ON => AffinityInfo::On,
            _ => AffinityInfo::OnPending,
        }
    }
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirmwareCall {
    /// The guest goes on with this in x0.
    Returns(u64),
    /// The vCPU with this index has been turned on; the host is told, and the guest goes on with 0 in x0.
    TurnedOn(usize),
    /// The vCPU has been turned off; the host is told.
    TurnedOff,
    /// The vCPU waits for an interrupt as with WFI, and goes on with 0 in x0.
    Suspends,
    /// The VM ends.
    SystemOff,
    /// The VM starts anew.
    SystemReset,
}

/// Function identifier of SMCCC_VERSION.
const SMCCC_VERSION: u32 = 0x8000_0000;
/// Function identifier of SMCCC_ARCH_FEATURES.
const SMCCC_ARCH_FEATURES: u32 = 0x8000_0001;
/// Versions 1.1 of both.
const VERSION_1_1: u64 = 0x1_0001;

/// Returns MPIDR_EL1 of a vCPU. Its affinity is the one by which the interrupt controller knows it.
#[must_use]
pub fn mpidr(vcpu: usize) -> u64 {
    const RES1: u64 = 1 << 31;
    RES1 | u64::from(affinity(vcpu))
}

/// Handles a call that a vCPU makes with these values of x0 to x3. `this` is its own power, `vcpus` returns those of its VM by
/// their index, `ipa_bits` is the size of guest addresses. Returns `None` if the number is none of PSCI's or of the discovery,
/// that is, none from 0x84000000 to 0x8400001f or 0xc4000000 to 0xc400001f, and neither SMCCC_VERSION nor SMCCC_ARCH_FEATURES.
pub fn firmware_call<'a>(
    registers: [u64; 4],
    this: &Power,
    vcpus: impl Fn(usize) -> Option<&'a Power>,
    ipa_bits: u64,
) -> Option<FirmwareCall> {
    let [x0, x1, ..] = registers;
    match u32::try_from(x0).ok()? {
        SMCCC_VERSION => Some(FirmwareCall::Returns(VERSION_1_1)),
        // None of the workarounds: the ID registers say what is safe.
        SMCCC_ARCH_FEATURES => Some(FirmwareCall::Returns(match u32::try_from(x1 & 0xffff_ffff) {
            Ok(SMCCC_VERSION | SMCCC_ARCH_FEATURES) => 0,
            _ => NOT_SUPPORTED,
        })),
        function if function & !0x4000_001f == 0x8400_0000 => {
            Some(psci(registers, this, vcpus, ipa_bits).unwrap_or_else(|error| FirmwareCall::Returns(error.into())))
        }
        _ => None,
    }
}

/// Whether a guest is offered a function.
const fn is_offered(function: FunctionId) -> bool {
    matches!(
        function,
        FunctionId::PsciVersion
            | FunctionId::CpuSuspend32
            | FunctionId::CpuSuspend64
            | FunctionId::CpuOff
            | FunctionId::CpuOn32
            | FunctionId::CpuOn64
            | FunctionId::AffinityInfo32
            | FunctionId::AffinityInfo64
            | FunctionId::MigrateInfoType
            | FunctionId::SystemOff
            | FunctionId::SystemReset
            | FunctionId::SystemReset232
            | FunctionId::SystemReset264
            | FunctionId::PsciFeatures
    )
}

fn psci<'a>(
    registers: [u64; 4],
    this: &Power,
    vcpus: impl Fn(usize) -> Option<&'a Power>,
    ipa_bits: u64,
) -> Result<FirmwareCall, ErrorCode> {
    let find = |mpidr: Mpidr| {
        let vcpu = u32::try_from(u64::from(mpidr)).ok().and_then(vcpu_of_affinity);
        vcpu.and_then(|vcpu| Some((vcpu, vcpus(vcpu)?))).ok_or(ErrorCode::InvalidParameters)
    };

    let [x0, ..] = registers;
    let function = FunctionId::try_from(u32::try_from(x0).map_err(|_| ErrorCode::NotSupported)?)?;
    // Before the arguments are looked at: what is not offered has none.
    if !is_offered(function) {
        return Err(ErrorCode::NotSupported);
    }
    match Function::try_from(&registers)? {
        Function::Version => Ok(FirmwareCall::Returns(VERSION_1_1)),
        Function::Features { psci_func_id: PsciFeature::SmcccVersion } => Ok(FirmwareCall::Returns(0)),
        // CPU_SUSPEND: original format of the power state, and the platform coordinates.
        Function::Features { psci_func_id: PsciFeature::PsciFunction(function) } if is_offered(function) => {
            Ok(FirmwareCall::Returns(0))
        }
        Function::CpuOn { target_cpu, entry } => {
            let (vcpu, power) = find(target_cpu)?;
            power.turn_on(checked(entry, ipa_bits)?, entry.context_id())?;
            Ok(FirmwareCall::TurnedOn(vcpu))
        }
        Function::CpuOff => {
            this.turn_off();
            Ok(FirmwareCall::TurnedOff)
        }
        // A power-down state may be treated as a standby state, whose entry point does not matter.
        Function::CpuSuspend { .. } => Ok(FirmwareCall::Suspends),
        // Later versions than 1.0 need not know about levels above that of CPUs.
        Function::AffinityInfo { mpidr, lowest_affinity_level: 0 } => {
            let (_, power) = find(mpidr)?;
            Ok(FirmwareCall::Returns(u32::from(power.affinity_info()).into()))
        }
        Function::AffinityInfo { .. } => Err(ErrorCode::InvalidParameters),
        Function::MigrateInfoType => Ok(FirmwareCall::Returns(u32::from(MigrateInfoType::MigrationNotRequired).into())),
        Function::SystemOff => Ok(FirmwareCall::SystemOff),
        Function::SystemReset | Function::SystemReset2 { reset_type: ResetType::Architectural(_), .. } => {
            Ok(FirmwareCall::SystemReset)
        }
        Function::SystemReset2 { reset_type: ResetType::VendorSpecific(_), .. } => Err(ErrorCode::InvalidParameters),
        _ => Err(ErrorCode::NotSupported),
    }
}

/// Returns the address of the first instruction if there could be one.
fn checked(entry: EntryPoint, ipa_bits: u64) -> Result<u64, ErrorCode> {
    let pc = entry.entry_point_address();
    let end = u32::try_from(ipa_bits).ok().and_then(|bits| 1_u64.checked_shl(bits)).unwrap_or(0);
    if pc.is_multiple_of(4) && pc < end { Ok(pc) } else { Err(ErrorCode::InvalidAddress) }
}

#[cfg(test)]
mod tests {
    #[cfg(loom)]
    mod models;

    use std::sync::Barrier;

    use ravelin_vgic::MAX_VCPUS;

    use super::*;

    const CPU_SUSPEND: u64 = 0xc400_0001;
    const CPU_OFF: u64 = 0x8400_0002;
    const CPU_ON: u64 = 0xc400_0003;
    const AFFINITY_INFO: u64 = 0xc400_0004;
    const FEATURES: u64 = 0x8400_000a;
    const ENTRY: u64 = 0x4008_0000;
    const IPA_BITS: u64 = 40;

    fn vm(count: usize) -> Vec<Power> {
        let vcpus: Vec<_> = (0..count).map(|_| Power::off()).collect();
        vcpus[0].boot(ENTRY, 0);
        assert_eq!(vcpus[0].take_start(), Some(FirstInstruction { pc: ENTRY, x0: 0, reset: false }));
        assert_eq!(vcpus[0].run(), Readiness::Starts);
        vcpus
    }

    /// Runs a vCPU that has been turned on for the first time since.
    fn starts(power: &Power) -> Option<(u64, u64)> {
        let start = power.take_start()?;
        assert!(start.reset);
        assert_eq!(power.take_start(), None);
        assert_eq!(power.run(), Readiness::Starts);
        Some((start.pc, start.x0))
    }

    fn call_of(vcpus: &[Power], vcpu: usize, registers: [u64; 4]) -> Option<FirmwareCall> {
        firmware_call(registers, &vcpus[vcpu], |index| vcpus.get(index), IPA_BITS)
    }

    fn call(vcpus: &[Power], registers: [u64; 4]) -> FirmwareCall {
        call_of(vcpus, 0, registers).unwrap()
    }

    fn error(code: ErrorCode) -> FirmwareCall {
        FirmwareCall::Returns(code.into())
    }

    #[test]
    fn on_and_off_and_on_again() {
        let vcpus = vm(2);
        assert_eq!(vcpus[1].run(), Readiness::Off);
        for round in 0..3 {
            let (pc, x0) = (ENTRY + 4 * round, round << 40 | 7);
            assert_eq!(call(&vcpus, [AFFINITY_INFO, 1, 0, 0]), FirmwareCall::Returns(1));
            assert_eq!(call(&vcpus, [CPU_ON, 1, pc, x0]), FirmwareCall::TurnedOn(1));
            assert_eq!(call(&vcpus, [AFFINITY_INFO, 1, 0, 0]), FirmwareCall::Returns(2));
            assert_eq!(call(&vcpus, [CPU_ON, 1, ENTRY, 0]), error(ErrorCode::OnPending));
            assert_eq!(starts(&vcpus[1]), Some((pc, x0)));
            assert_eq!(vcpus[1].run(), Readiness::On);
            assert_eq!(call(&vcpus, [AFFINITY_INFO, 1, 0, 0]), FirmwareCall::Returns(0));
            assert_eq!(call(&vcpus, [CPU_ON, 1, ENTRY, 0]), error(ErrorCode::AlreadyOn));
            assert_eq!(call_of(&vcpus, 1, [CPU_OFF, 0, 0, 0]), Some(FirmwareCall::TurnedOff));
            assert_eq!(vcpus[1].run(), Readiness::Off);
        }
        assert_eq!(call(&vcpus, [CPU_ON, 0, ENTRY, 0]), error(ErrorCode::AlreadyOn), "oneself");
    }

    #[test]
    fn a_host_turns_vcpus_on_and_off() {
        let vcpus = vm(2);
        assert!(!vcpus[1].is_on());
        assert!(vcpus[1].set(false) && !vcpus[1].is_on());
        assert!(vcpus[1].set(true) && vcpus[1].set(true) && vcpus[1].is_on());
        assert_eq!(call(&vcpus, [AFFINITY_INFO, 1, 0, 0]), FirmwareCall::Returns(2));
        assert_eq!(call(&vcpus, [CPU_ON, 1, ENTRY, 0]), error(ErrorCode::OnPending));
        // With the registers that it has.
        assert_eq!((vcpus[1].take_start(), vcpus[1].run()), (None, Readiness::Starts));
        assert_eq!(call(&vcpus, [CPU_ON, 1, ENTRY, 0]), error(ErrorCode::AlreadyOn));
        assert!(vcpus[1].set(true));
        assert_eq!(vcpus[1].run(), Readiness::On);
        assert!(vcpus[1].set(false));
        assert_eq!(vcpus[1].run(), Readiness::Off);
        assert_eq!(call(&vcpus, [CPU_ON, 1, ENTRY, 3]), FirmwareCall::TurnedOn(1));
        assert!(vcpus[1].set(true));
        assert_eq!(starts(&vcpus[1]), Some((ENTRY, 3)));
        assert_eq!(call_of(&vcpus, 1, [CPU_OFF, 0, 0, 0]), Some(FirmwareCall::TurnedOff));
        assert_eq!(call(&vcpus, [CPU_ON, 1, ENTRY, 3]), FirmwareCall::TurnedOn(1));
        assert!(vcpus[1].set(false));
        assert_eq!((vcpus[1].take_start(), vcpus[1].run()), (None, Readiness::Off));
    }

    #[test]
    fn a_host_waits_for_a_guest_that_turns_a_vcpu_on() {
        let power = Power::off();
        power.state.store(CLAIMED, Relaxed);
        assert!(!power.set(false) && power.set(true));
        assert_eq!((power.take_start(), power.run()), (None, Readiness::Off));
        power.publish(PENDING, ENTRY, 1);
        assert_eq!(starts(&power), Some((ENTRY, 1)));
    }

    #[test]
    fn a_32_bit_call_takes_w_registers() {
        let vcpus = vm(2);
        let high = 0xdead_0000_0000_0000;
        assert_eq!(call(&vcpus, [0x8400_0003, high | 1, high | ENTRY, high | 9]), FirmwareCall::TurnedOn(1));
        assert_eq!(starts(&vcpus[1]), Some((ENTRY, 9)));
        assert_eq!(call(&vcpus, [0x8400_0004, high | 1, high, 0]), FirmwareCall::Returns(0));
    }

    #[test]
    fn targets_are_named_by_their_affinity() {
        let vcpus = vm(MAX_VCPUS);
        for vcpu in 1..MAX_VCPUS {
            let target = mpidr(vcpu) & 0xff_ffff;
            assert_eq!(call(&vcpus, [CPU_ON, target, ENTRY, 0]), FirmwareCall::TurnedOn(vcpu));
        }
        for target in [0x10, 0x110, 0x800, 0x1_0000, 1 << 24, 1 << 31, 1 << 32, 1 << 40, u64::MAX, mpidr(0)] {
            assert_eq!(call(&vcpus, [CPU_ON, target, ENTRY, 0]), error(ErrorCode::InvalidParameters), "{target:#x}");
            assert_eq!(call(&vcpus, [AFFINITY_INFO, target, 0, 0]), error(ErrorCode::InvalidParameters));
        }
        assert_eq!(call(&vm(2), [CPU_ON, 2, ENTRY, 0]), error(ErrorCode::InvalidParameters), "no such vCPU");
        assert_eq!(mpidr(17), 0x8000_0101);
    }

    #[test]
    fn entries_are_addresses_of_instructions() {
        let vcpus = vm(2);
        for entry in [1, 2, ENTRY | 2, 1 << 40, 1 << 63, u64::MAX] {
            assert_eq!(call(&vcpus, [CPU_ON, 1, entry, 0]), error(ErrorCode::InvalidAddress), "{entry:#x}");
        }
        assert_eq!(vcpus[1].run(), Readiness::Off);
        assert_eq!(call(&vcpus, [CPU_ON, 1, (1 << 40) - 4, 0]), FirmwareCall::TurnedOn(1));
    }

    #[test]
    fn levels_above_cpus_are_not_known() {
        for level in [1, 3, 4, u64::MAX] {
            assert_eq!(call(&vm(1), [AFFINITY_INFO, 0, level, 0]), error(ErrorCode::InvalidParameters));
        }
    }

    #[test]
    fn suspending_is_waiting() {
        for state in [0, 0x1_0000, 0x100_0003] {
            assert_eq!(call(&vm(1), [CPU_SUSPEND, state, 1, 0]), FirmwareCall::Suspends);
            assert_eq!(call(&vm(1), [0x8400_0001, state, 1, 0]), FirmwareCall::Suspends);
        }
    }

    #[test]
    fn the_end_of_a_vm() {
        let vcpus = vm(1);
        assert_eq!(call(&vcpus, [0x8400_0008, 0, 0, 0]), FirmwareCall::SystemOff);
        assert_eq!(call(&vcpus, [0x8400_0009, 0, 0, 0]), FirmwareCall::SystemReset);
        for function in [0x8400_0012, 0xc400_0012] {
            assert_eq!(call(&vcpus, [function, 0, 5, 0]), FirmwareCall::SystemReset);
            assert_eq!(call(&vcpus, [function, 1, 5, 0]), error(ErrorCode::InvalidParameters));
            assert_eq!(call(&vcpus, [function, 0x8000_0000, 5, 0]), error(ErrorCode::InvalidParameters));
        }
    }

    #[test]
    fn versions_and_features() {
        let vcpus = vm(2);
        let returns = |registers| match call(&vcpus, registers) {
            FirmwareCall::Returns(value) => value,
            other => panic!("{other:?}"),
        };
        assert_eq!(returns([0x8400_0000, 0, 0, 0]), 0x1_0001);
        assert_eq!(returns([0x8400_0006, 0, 0, 0]), 2);
        assert_eq!(returns([FEATURES, 0x8000_0000, 0, 0]), 0);
        assert_eq!(returns([0x8000_0000, 0, 0, 0]), 0x1_0001);
        for (feature, expected) in [
            (0x8000_0000, 0),
            (0x8000_0001, 0),
            (0x8000_8000, u64::MAX),
            (0x8000_7fff, u64::MAX),
            (0x8000_0002, u64::MAX),
        ] {
            assert_eq!(returns([0x8000_0001, 0xffff_ffff_0000_0000 | feature, 0, 0]), expected, "{feature:#x}");
        }
        let offered: Vec<_> = (0x8400_0000..=0x8400_001f)
            .chain(0xc400_0000..=0xc400_001f)
            .filter(|&number| {
                let feature = returns([FEATURES, number, 0, 0]);
                // Arguments that suit every call well enough to find out whether it exists.
                let answer = call(&vm(2), [number, 0x8400_0000, 0, 0]);
                assert_eq!(feature == u64::MAX, answer == error(ErrorCode::NotSupported), "{number:#x}");
                feature == 0
            })
            .collect();
        assert_eq!(
            offered,
            [
                0x8400_0000,
                0x8400_0001,
                0x8400_0002,
                0x8400_0003,
                0x8400_0004,
                0x8400_0006,
                0x8400_0008,
                0x8400_0009,
                0x8400_000a,
                0x8400_0012,
                0xc400_0001,
                0xc400_0003,
                0xc400_0004,
                0xc400_0012
            ]
        );
    }

    #[test]
    fn other_numbers_are_for_others() {
        let vcpus = vm(1);
        for number in
            [0, 0x8400_0020, 0xc400_0020, 0x8500_0000, 0x8401_0000, 0x8600_ff01, 0x0400_0000, 0x1_8400_0000, u64::MAX]
        {
            assert_eq!(call_of(&vcpus, 0, [number, 0, 0, 0]), None, "{number:#x}");
        }
        assert_eq!(call(&vcpus, [0x8400_001f, 0, 0, 0]), error(ErrorCode::NotSupported));
    }

    #[test]
    fn of_many_that_turn_a_vcpu_on_one_does() {
        const CALLERS: usize = 4;
        const ROUNDS: u64 = if cfg!(miri) { 10 } else { 2000 };
        let vcpus = vm(CALLERS + 1);
        let target = CALLERS as u64;
        let barrier = Barrier::new(CALLERS + 1);
        std::thread::scope(|scope| {
            let callers: Vec<_> = (0..CALLERS)
                .map(|vcpu| {
                    let (vcpus, barrier) = (&vcpus, &barrier);
                    scope.spawn(move || {
                        let mut successes = Vec::new();
                        for round in 0..ROUNDS {
                            barrier.wait();
                            let x0 = round << 8 | vcpu as u64;
                            match call_of(vcpus, vcpu, [CPU_ON, target, ENTRY + 4 * vcpu as u64, x0]).unwrap() {
                                FirmwareCall::TurnedOn(CALLERS) => successes.push(x0),
                                other => assert!(
                                    other == error(ErrorCode::OnPending) || other == error(ErrorCode::AlreadyOn)
                                ),
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
                let (pc, x0) = loop {
                    if let Some(start) = starts(&vcpus[CALLERS]) {
                        break start;
                    }
                };
                assert_eq!(pc, ENTRY + 4 * (x0 & 0xff));
                started.push(x0);
                barrier.wait();
                assert_eq!(call_of(&vcpus, CALLERS, [CPU_OFF, 0, 0, 0]), Some(FirmwareCall::TurnedOff));
            }
            let mut successes: Vec<_> = callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect();
            successes.sort_unstable();
            assert_eq!(successes, started, "each start is the one caller's that was told of success");
        });
    }
}
