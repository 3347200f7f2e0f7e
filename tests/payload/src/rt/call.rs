//! HVC and SMC with every register in view.

use core::{
    arch::asm,
    sync::atomic::{AtomicBool, Ordering},
};

use ravelin_abi::{CALLS, Call};

use crate::rt::tally;

/// PSCI function numbers, DEN0022.
pub(crate) mod psci {
    pub(crate) const VERSION: u64 = 0x8400_0000;
    pub(crate) const CPU_SUSPEND_32: u64 = 0x8400_0001;
    pub(crate) const CPU_SUSPEND: u64 = 0xC400_0001;
    pub(crate) const CPU_OFF: u64 = 0x8400_0002;
    pub(crate) const CPU_ON_32: u64 = 0x8400_0003;
    pub(crate) const CPU_ON: u64 = 0xC400_0003;
    pub(crate) const AFFINITY_INFO_32: u64 = 0x8400_0004;
    pub(crate) const AFFINITY_INFO: u64 = 0xC400_0004;
    pub(crate) const MIGRATE_INFO_TYPE: u64 = 0x8400_0006;
    pub(crate) const SYSTEM_OFF: u64 = 0x8400_0008;
    pub(crate) const SYSTEM_RESET: u64 = 0x8400_0009;
    pub(crate) const FEATURES: u64 = 0x8400_000A;
    pub(crate) const SYSTEM_SUSPEND_32: u64 = 0x8400_000E;
    pub(crate) const SYSTEM_SUSPEND: u64 = 0xC400_000E;

    pub(crate) const SUCCESS: i64 = 0;
    pub(crate) const NOT_SUPPORTED: i64 = -1;
    pub(crate) const INVALID_PARAMETERS: i64 = -2;
    pub(crate) const ALREADY_ON: i64 = -4;
    pub(crate) const ON_PENDING: i64 = -5;
    pub(crate) const INVALID_ADDRESS: i64 = -9;

    /// Answers of AFFINITY_INFO.
    pub(crate) const AFFINITY_ON: i64 = 0;
    pub(crate) const AFFINITY_OFF: i64 = 1;
}

/// The general-purpose registers x0 to x30.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub(crate) struct Registers(pub(crate) [u64; 31]);

impl Registers {
    /// The arguments in the first registers and a recognisable number in every other one.
    pub(crate) fn with<const N: usize>(arguments: [u64; N]) -> Self {
        let mut registers = [0; 31];
        for (index, register) in registers.iter_mut().enumerate() {
            *register = 0xA5A5_0000_5A5A_0000 | (index as u64) << 32 | index as u64;
        }
        registers[..N].copy_from_slice(&arguments);
        Self(registers)
    }
}

/// The instruction of a call and its immediate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Instruction {
    /// `hvc #0`
    Hvc,
    /// `hvc #1`
    Hvc1,
    /// `hvc #0xffff`
    HvcFfff,
    /// `smc #0`
    Smc,
    /// `smc #1`
    Smc1,
    /// `smc #0xffff`
    SmcFfff,
}

/// Executes the call and returns all registers as they are after it.
#[expect(unsafe_code, reason = "a call changes registers and may change who owns memory")]
pub(crate) fn call(instruction: Instruction, registers: Registers) -> Registers {
    macro_rules! routine {
        ($symbol:ident, $registers:ident) => {
            // SAFETY: The routine follows the procedure call standard. Tests give away only memory of their arena, which
            // they access through probes.
            unsafe { asm!(concat!("bl ", stringify!($symbol)), inlateout("x0") &raw mut $registers => _, clobber_abi("C")) }
        };
    }
    let function = registers.0[0];
    let mut registers = registers;
    match instruction {
        Instruction::Hvc => routine!(call_hvc, registers),
        Instruction::Hvc1 => routine!(call_hvc_1, registers),
        Instruction::HvcFfff => routine!(call_hvc_ffff, registers),
        Instruction::Smc => routine!(call_smc, registers),
        Instruction::Smc1 => routine!(call_smc_1, registers),
        Instruction::SmcFfff => routine!(call_smc_ffff, registers),
    }
    let x0 = registers.0[0];
    match instruction {
        Instruction::Hvc => tally::count(Some(function), x0),
        Instruction::Hvc1 | Instruction::HvcFfff => tally::count(None, x0),
        Instruction::Smc | Instruction::Smc1 | Instruction::SmcFfff => {}
    }
    registers
}

/// The 32 SIMD registers, each as two words.
pub(crate) type Vectors = [[u64; 2]; 32];

/// Executes `hvc #0` or `smc #0` with the arguments in x0 to x3 and the given SIMD registers, and returns both.
#[expect(unsafe_code, reason = "a call changes registers and may change who owns memory")]
pub(crate) fn call_with_vectors(
    instruction: Instruction,
    arguments: [u64; 4],
    vectors: Vectors,
) -> ([u64; 4], Vectors) {
    let mut arguments = arguments;
    let mut vectors = vectors;
    let function = arguments[0];
    let smc = u64::from(instruction == Instruction::Smc);
    // SAFETY: As in `call`; the compiler does not use SIMD registers on this target.
    unsafe {
        asm!(
            "bl call_with_vectors",
            inlateout("x0") &raw mut arguments => _,
            inlateout("x1") &raw mut vectors => _,
            inlateout("x2") smc => _,
            clobber_abi("C"),
        );
    }
    if instruction == Instruction::Hvc {
        tally::count(Some(function), arguments[0]);
    }
    (arguments, vectors)
}

/// All hypercalls.
pub(crate) fn table() -> impl Iterator<Item = &'static Call> {
    CALLS.iter()
}

static FIRMWARE_IS_HVC: AtomicBool = AtomicBool::new(false);
static CORRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes HVC the instruction of [`firmware`], as the device tree says on a machine without EL2.
pub(crate) fn firmware_is_hvc() {
    FIRMWARE_IS_HVC.store(true, Ordering::Relaxed);
}

/// The instruction that PSCI uses.
pub(crate) fn firmware_instruction() -> Instruction {
    if FIRMWARE_IS_HVC.load(Ordering::Relaxed) { Instruction::Hvc } else { Instruction::Smc }
}

/// Calls the firmware; returns x0 to x3. That the other registers survive is checked on every call.
pub(crate) fn firmware(arguments: [u64; 4]) -> [u64; 4] {
    checked(firmware_instruction(), arguments)
}

/// A call to PSCI by its arguments; returns its status. 32-bit functions return 32 bits.
pub(crate) fn psci(function: u64, x1: u64, x2: u64, x3: u64) -> i64 {
    let x0 = firmware([function, x1, x2, x3])[0];
    if function & 1 << 30 == 0 { i64::from(x0 as i32) } else { x0 as i64 }
}

/// Calls the hypervisor; returns x0 to x3. That the other registers survive is checked on every call.
pub(crate) fn hypervisor<const N: usize>(arguments: [u64; N]) -> [u64; 4] {
    checked(Instruction::Hvc, arguments)
}

fn checked<const N: usize>(instruction: Instruction, arguments: [u64; N]) -> [u64; 4] {
    let before = Registers::with(arguments);
    let after = call(instruction, before);
    if before.0[4..] != after.0[4..] {
        CORRUPTED.store(true, Ordering::Relaxed);
    }
    [after.0[0], after.0[1], after.0[2], after.0[3]]
}

/// Returns whether a call has changed a register that it must keep, and forgets it.
pub(crate) fn take_corruption() -> bool {
    CORRUPTED.swap(false, Ordering::Relaxed)
}
