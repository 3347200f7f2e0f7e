//! The end of the machine when EL2 is wrong: registers, CPU, backtrace, power off.
//!
//! Nothing that a host or a guest does leads here.

#![expect(unsafe_code, reason = "the vectors call in by name")]

use core::{
    panic::PanicInfo,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};

use ravelin_arch::{
    Backtrace, Conduit, CpuStart, FatalFrame, Image, halt, mpidr, power_off, semihosting_exit, system_registers,
};

use crate::console::write_last;

/// Exit status of an emulator after a panic.
const STATUS: u64 = 101;

static SEMIHOSTING: AtomicBool = AtomicBool::new(false);
static REPORTS: AtomicU32 = AtomicU32::new(0);
/// The CPU that reports: one more than its MPIDR; 0 until one does.
static REPORTER: AtomicU64 = AtomicU64::new(0);

/// Makes a panic end the machine through semihosting, with a status, instead of PSCI.
pub(crate) fn exit_by_semihosting() {
    SEMIHOSTING.store(true, Ordering::Relaxed);
}

/// Ends the machine.
pub(crate) fn exit(conduit: Conduit) -> ! {
    #[cfg(feature = "trace")]
    crate::trace::flush_last();
    if SEMIHOSTING.load(Ordering::Relaxed) {
        semihosting_exit(STATUS);
    }
    power_off(conduit)
}

macro_rules! report {
    ($($argument:tt)*) => { write_last(format_args!("{}\n", format_args!($($argument)*))) };
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    begin();
    report!("\nravelin panic on cpu {}: {}", Cpu, info.message());
    if let Some(location) = info.location() {
        report!("  at {location}");
    }
    registers(system_registers());
    backtrace(0, Backtrace::here());
    exit(Conduit::Smc)
}

/// Called by the vectors on an exception that no exit of the host is.
#[unsafe(no_mangle)]
extern "C" fn fatal_exception(frame: &FatalFrame, slot: u64) -> ! {
    const KINDS: [&str; 4] = ["synchronous exception", "IRQ", "FIQ", "SError"];
    begin();
    let kind = KINDS[(slot & 3) as usize];
    report!("\nravelin panic on cpu {Cpu}: {kind} in vector slot {slot}");
    const NAMES: [&str; 31] = [
        "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16",
        "x17", "x18", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x29", "x30",
    ];
    let general = NAMES.into_iter().zip(frame.registers);
    registers(general.chain([("sp", frame.sp), ("elr", frame.elr), ("spsr", frame.spsr)]));
    registers([("esr", frame.esr), ("far", frame.far)].into_iter().chain(system_registers()));
    let offset = frame.elr.wrapping_sub(Image::running().start);
    report!("  #0 {offset:#x}");
    backtrace(1, Backtrace::from_frame(frame.registers[29]));
    exit(Conduit::Smc)
}

/// Writes registers, four in a row.
fn registers(registers: impl Iterator<Item = (&'static str, u64)>) {
    let mut column = 0;
    for (name, value) in registers {
        column = (column + 1) % 4;
        write_last(format_args!("  {name:<9} {value:#018x}{}", if column == 0 { "\n" } else { "" }));
    }
    if column != 0 {
        write_last(format_args!("\n"));
    }
}

/// Stops all CPUs but the first one, whose report they would garble, and that one if its report fails in turn, after it may have failed
/// once.
fn begin() {
    let this = mpidr().wrapping_add(1);
    let reporter = REPORTER.compare_exchange(0, this, Ordering::Relaxed, Ordering::Relaxed);
    if reporter.is_err_and(|reporter| reporter != this) {
        halt();
    }
    if REPORTS.fetch_add(1, Ordering::Relaxed) > 1 {
        halt();
    }
}

/// Writes the calls as offsets into the image, which say the same wherever it lies.
fn backtrace(first: usize, calls: Backtrace) {
    const DEPTH: usize = 32;
    let start = Image::running().start;
    for (number, address) in calls.take(DEPTH).enumerate() {
        // The call is the instruction before the one to return to.
        report!("  #{} {:#x}", first + number, address.wrapping_sub(start + 4));
    }
}

/// Writes which CPU this is.
struct Cpu;

impl core::fmt::Display for Cpu {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match CpuStart::current() {
            Some(cpu) => write!(f, "{} (mpidr {:#x})", cpu.index(), mpidr()),
            None => write!(f, "mpidr {:#x}", mpidr()),
        }
    }
}
