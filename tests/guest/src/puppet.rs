//! The loop that carries out commands, and what exceptions do.

use core::arch::asm;

use ravelin_guest::{
    BLOCK_SIZE, COMMAND, Command, EXCEPTION, INTERRUPT, MAX_OPERANDS, MAX_RESULTS, OPERANDS, RESULTS, UNEXPECTED,
    pattern,
};

use crate::random;

const PAGE: u64 = 4096;

// Offsets in a vCPU's block.
const DEVICE: u64 = 0x00;
const SAVED_SP: u64 = 0x08;
const FAULT: u64 = 0x10;
pub(crate) const REGISTERS: u64 = 0x40;
const INTERRUPTS: u64 = 0x80;
const CODE: u64 = 0x1000;

/// Interrupts that are remembered.
const REMEMBERED: u64 = 7;

#[expect(unsafe_code, reason = "entry, vectors and calls need exact control of registers")]
mod assembly {
    core::arch::global_asm!(
        include_str!("start.S"),
        block_size = const super::BLOCK_SIZE,
        saved_sp = const super::SAVED_SP,
        fault = const super::FAULT,
        registers = const super::REGISTERS,
        main = sym super::main,
        interrupt = sym super::interrupt,
        unexpected = sym super::unexpected,
    );
}

/// Loads a word. That the instruction is this one, whose syndrome describes it, is what makes it a load from a device.
#[expect(unsafe_code, reason = "memory outside Rust's objects")]
pub(crate) fn load(address: u64) -> u64 {
    let value;
    // SAFETY: A device, or memory that Rust does not know of.
    unsafe { asm!("ldr {}, [{}]", out(reg) value, in(reg) address, options(nostack)) }
    value
}

/// Stores a word.
#[expect(unsafe_code, reason = "memory outside Rust's objects")]
pub(crate) fn store(address: u64, value: u64) {
    // SAFETY: As for `load`.
    unsafe { asm!("str {}, [{}]", in(reg) value, in(reg) address, options(nostack)) }
}

macro_rules! instruction {
    ($text:literal) => {{
        #[expect(unsafe_code, reason = "a single instruction")]
        // SAFETY: A hint, a barrier or maintenance, without effect on what Rust knows of.
        unsafe {
            asm!($text, options(nostack));
        }
    }};
}

macro_rules! read_register {
    ($name:literal) => {{
        let value: u64;
        #[expect(unsafe_code, reason = "a system register")]
        // SAFETY: Rust does not know of what reading it changes.
        unsafe {
            asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack));
        }
        value
    }};
}

macro_rules! write_register {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        #[expect(unsafe_code, reason = "a system register")]
        // SAFETY: Rust does not depend on it.
        unsafe {
            asm!(concat!("msr ", $name, ", {}"), "isb", in(reg) value, options(nostack));
        }
    }};
}

/// A vCPU, on the stack in its block, with the MMU on.
extern "C" fn main(block: u64) -> ! {
    let device = load(block + DEVICE);
    let operand = |index: u64| load(device + OPERANDS + 8 * index);
    let result = |index: u64, value| store(device + RESULTS + 8 * index, value);
    loop {
        match Command::from_code(load(device + COMMAND)) {
            Some(Command::Run) => run(block, device),
            Some(Command::Fill) => {
                for (address, value) in words(operand(0), operand(1), operand(2), operand(3)) {
                    store(address, value);
                }
            }
            Some(Command::Compare) => {
                let differs = |&(address, value): &(u64, u64)| load(address) != value;
                let found = words(operand(0), operand(1), operand(2), operand(3)).find(differs);
                let address = found.map_or(0, |(address, _)| address);
                result(0, address);
                result(1, if address == 0 { 0 } else { load(address) });
            }
            Some(Command::FindNonzero) => {
                let found = words(operand(0), operand(1), 0, 0).map(|(address, _)| address).find(|&at| load(at) != 0);
                result(0, found.unwrap_or(0));
                result(1, found.map_or(0, load));
            }
            Some(Command::Interrupts) => {
                for index in 0..=REMEMBERED {
                    result(index, load(block + INTERRUPTS + 8 * index));
                }
            }
            Some(Command::Random) => random::run(block, device),
            None => {}
        }
    }
}

/// Addresses and values of the words of the pattern.
fn words(address: u64, pages: u64, key: u64, seed: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..pages).flat_map(move |page| {
        (0..PAGE / 8)
            .map(move |index| (address + page * PAGE + index * 8, pattern(key.wrapping_add(page * PAGE), index, seed)))
    })
}

/// Copies code to its place and calls it.
fn run(block: u64, device: u64) {
    let operand = |index: u64| load(device + OPERANDS + 8 * index);
    let registers = MAX_RESULTS as u64;
    for index in 0..registers {
        store(block + REGISTERS + 8 * index, operand(index));
    }
    let count = operand(registers).min(MAX_OPERANDS as u64);
    for index in 0..count {
        store(block + CODE + 8 * index, operand(registers + 1 + index));
    }
    instruction!("dsb ish");
    instruction!("ic iallu");
    instruction!("dsb ish");
    instruction!("isb");
    if call(block, block + CODE) {
        let [esr, far, elr] = [0, 8, 16].map(|offset| load(block + FAULT + offset));
        for (index, value) in (0..).zip([esr, far, elr.wrapping_sub(block + CODE)]) {
            store(device + EXCEPTION + 8 * index, value);
        }
    }
    for index in 0..registers {
        store(device + RESULTS + 8 * index, load(block + REGISTERS + 8 * index));
    }
}

/// Calls code with the registers of the block. Returns whether an exception ended it.
#[expect(unsafe_code, reason = "an assembly routine")]
pub(crate) fn call(block: u64, code: u64) -> bool {
    let failed: u64;
    // SAFETY: The routine keeps what the procedure call standard says whatever the code does; the host sees to it that the
    // code leaves Rust's memory alone.
    unsafe {
        asm!("bl run_code", inlateout("x0") block => failed, inlateout("x1") code => _, clobber_abi("C"));
    }
    failed != 0
}

/// An interrupt. Timers are masked; SPIs are the host's to lower.
extern "C" fn interrupt(block: u64) {
    let intid = read_register!("s3_0_c12_c12_0"); // ICC_IAR1_EL1
    match intid {
        27 => write_register!("cntv_ctl_el0", 3),
        30 => write_register!("cntp_ctl_el0", 3),
        32..1020 => store(load(block + DEVICE) + INTERRUPT, intid),
        _ => {}
    }
    for index in (1..REMEMBERED).rev() {
        store(block + INTERRUPTS + 8 * (index + 1), load(block + INTERRUPTS + 8 * index));
    }
    store(block + INTERRUPTS + 8, intid);
    store(block + INTERRUPTS, load(block + INTERRUPTS) + 1);
    if intid < 1020 {
        write_register!("s3_0_c12_c12_1", intid); // ICC_EOIR1_EL1
        if read_register!("s3_0_c12_c12_4") & 2 != 0 {
            write_register!("s3_0_c12_c11_1", intid); // EOImode is 1: ICC_DIR_EL1
        }
    }
}

/// Reports an exception that nobody asked for. The host does not let the vCPU go on behind the last store.
extern "C" fn unexpected(vector: u64, block: u64) -> ! {
    let device = load(block + DEVICE) + UNEXPECTED;
    store(device, vector);
    store(device + 8, read_register!("esr_el1"));
    store(device + 16, read_register!("far_el1"));
    store(device + 24, read_register!("elr_el1"));
    loop {
        instruction!("wfi");
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // What is told of an exception does for a panic, too.
    instruction!("brk #1");
    loop {
        instruction!("wfi");
    }
}
