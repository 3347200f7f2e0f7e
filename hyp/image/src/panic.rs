//! The end of the machine when EL2 is wrong: registers, CPU, backtrace, power off.
//!
//! Nothing that a host or a guest does leads here.

#![expect(unsafe_code, reason = "the vectors call in by name")]

use core::{
    panic::PanicInfo,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use ravelin_arch::{Backtrace, Conduit, CpuStart, FatalFrame, Image, halt, mpidr, power_off, semihosting_exit};

use crate::console::write_last;

/// Exit status of an emulator after a panic.
const STATUS: u64 = 101;

static SEMIHOSTING: AtomicBool = AtomicBool::new(false);
static REPORTS: AtomicU32 = AtomicU32::new(0);

/// Makes a panic end the machine through semihosting, with a status, instead of PSCI.
pub(crate) fn exit_by_semihosting() {
    SEMIHOSTING.store(true, Ordering::Relaxed);
}

/// Ends the machine.
pub(crate) fn exit(conduit: Conduit) -> ! {
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
    report!("ravelin panic on cpu {}: {}", Cpu, info.message());
    if let Some(location) = info.location() {
        report!("  at {location}");
    }
    backtrace(0, Backtrace::here());
    exit(Conduit::Smc)
}

/// Called by the vectors on an exception that no exit of the host is.
#[unsafe(no_mangle)]
extern "C" fn fatal_exception(frame: &FatalFrame, slot: u64) -> ! {
    const KINDS: [&str; 4] = ["synchronous exception", "IRQ", "FIQ", "SError"];
    begin();
    let kind = KINDS[(slot & 3) as usize];
    report!("ravelin panic on cpu {Cpu}: {kind} in vector slot {slot}");
    report!("  elr {:#018x} spsr {:#010x} esr {:#010x} far {:#018x}", frame.elr, frame.spsr, frame.esr, frame.far);
    for (row, registers) in frame.registers.chunks(4).enumerate() {
        for (column, register) in registers.iter().enumerate() {
            write_last(format_args!("  x{:<2} {register:#018x}", row * 4 + column));
        }
        write_last(format_args!("\n"));
    }
    report!("  sp  {:#018x}", frame.sp);
    let offset = frame.elr.wrapping_sub(Image::running().start);
    report!("  #0 {offset:#x}");
    backtrace(1, Backtrace::from_frame(frame.registers[29]));
    exit(Conduit::Smc)
}

/// Stops a CPU whose report fails in turn, after it may have failed once.
fn begin() {
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
