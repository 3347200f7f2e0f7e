//! Single accesses that may abort.

use core::{
    arch::asm,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::rt::cpu::instruction;

/// Offset of the EL0 alias: the same physical addresses again, usable from EL0.
const EL0_ALIAS: u64 = 1 << 47;

/// What the CPU reported when an access was refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Fault {
    /// Syndrome, ESR_EL1.
    pub(crate) esr: u64,
    /// Address, FAR_EL1, without the bit that marks the EL0 alias.
    pub(crate) far: u64,
    /// Where it happened, ELR_EL1, without the bit that marks the EL0 alias.
    pub(crate) elr: u64,
    /// Offset of the vector that was taken.
    pub(crate) vector: u64,
}

impl Fault {
    /// Exception class, ESR_EL1.EC.
    pub(crate) fn class(self) -> u64 {
        self.esr >> 26 & 0x3f
    }

    /// Fault status code, ESR_EL1.ISS bits 5:0.
    pub(crate) fn status(self) -> u64 {
        self.esr & 0x3f
    }
}

/// How a probe touches memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Access {
    /// Loads 8 bytes.
    Read,
    /// Loads 4 bytes, which is what most devices want.
    Read32,
    /// Stores 8 bytes.
    Write(u64),
    /// Loads and stores 8 bytes exclusively.
    Atomic,
    /// Loads 16 bytes with LDP, whose syndrome names no register.
    Pair,
    /// Zeroes a cache line with DC ZVA.
    Zero,
    /// Calls the address.
    Execute,
    /// Loads 8 bytes from EL0.
    El0Read,
    /// Stores 8 bytes from EL0.
    El0Write(u64),
    /// Branches to the address at EL0.
    El0Execute,
}

/// Accesses that only read or write, at both exception levels. None of them changes memory that holds `value`.
pub(crate) fn data_accesses(value: u64) -> [Access; 6] {
    [Access::Read, Access::Write(value), Access::Atomic, Access::Pair, Access::El0Read, Access::El0Write(value)]
}

macro_rules! call {
    ($symbol:ident, $x0:expr, $x1:expr, $x2:expr) => {{
        let (value, esr, far, elr, vector): (u64, u64, u64, u64, u64);
        // SAFETY: The routine follows the procedure call standard; an abort inside it is caught by the vectors. What it
        // accesses is not memory that Rust knows of, or the caller holds it exclusively.
        unsafe {
            asm!(
                concat!("bl ", stringify!($symbol)),
                inlateout("x0") $x0 => value,
                inlateout("x1") $x1 => esr,
                inlateout("x2") $x2 => far,
                lateout("x3") elr,
                lateout("x4") vector,
                clobber_abi("C"),
            );
        }
        (value, esr, far, elr, vector)
    }};
}

/// Touches `address` and reports the value read (0 for other accesses) or the abort.
///
/// `address` must not belong to the payload's own image, unless the access is a read.
#[expect(unsafe_code, reason = "accesses that may abort")]
pub(crate) fn probe(access: Access, address: u64) -> Result<u64, Fault> {
    let (mut value, esr, far, elr, vector) = match access {
        Access::Read => call!(probe_read, address, 0u64, 0u64),
        Access::Read32 => call!(probe_read32, address, 0u64, 0u64),
        Access::Write(value) => call!(probe_write, address, value, 0u64),
        Access::Atomic => call!(probe_atomic, address, 0u64, 0u64),
        Access::Pair => call!(probe_pair, address, 0u64, 0u64),
        Access::Zero => call!(probe_zero, address, 0u64, 0u64),
        Access::Execute => call!(probe_execute, address, 0u64, 0u64),
        Access::El0Read | Access::El0Execute => call!(el0_run, el0_entry(access), address | EL0_ALIAS, 0u64),
        Access::El0Write(value) => call!(el0_run, el0_entry(access), address | EL0_ALIAS, value),
    };
    if matches!(access, Access::Write(_) | Access::Zero | Access::Execute | Access::El0Write(_) | Access::El0Execute) {
        value = 0;
    }
    // EL0 always comes back with an exception: an SVC if the access worked.
    let svc = esr >> 26 == 0x15;
    if esr == 0 || svc { Ok(value) } else { Err(Fault { esr, far: far & !EL0_ALIAS, elr: elr & !EL0_ALIAS, vector }) }
}

/// Reads 8 bytes.
pub(crate) fn read(address: u64) -> Result<u64, Fault> {
    probe(Access::Read, address)
}

#[expect(unsafe_code, reason = "addresses of assembly routines")]
fn el0_entry(access: Access) -> u64 {
    unsafe extern "C" {
        fn el0_read();
        fn el0_write();
        fn el0_execute();
    }
    let routine = match access {
        Access::El0Read => el0_read as *const (),
        Access::El0Write(_) => el0_write as *const (),
        _ => el0_execute as *const (),
    };
    routine.expose_provenance() as u64 | EL0_ALIAS
}

/// Lets a level 1 table of stage 1 lie at `table` and calls `body` with an address that is translated through it.
#[expect(unsafe_code, reason = "changes the translation tables")]
pub(crate) fn with_table<T>(table: u64, body: impl FnOnce(u64) -> T) -> T {
    /// An entry of the level 0 table that nothing else uses.
    const INDEX: usize = 100;
    unsafe extern "C" {
        static stage1_level0: AtomicU64;
    }
    let entries = &raw const stage1_level0;
    let entry = entries.wrapping_add(INDEX);
    // SAFETY: The table has 512 entries. Nobody uses the part of the address space that this one maps.
    let entry = unsafe { &*entry };
    entry.store(table | 3, Ordering::Relaxed);
    instruction!("dsb ish");
    instruction!("isb");
    let result = body((INDEX as u64) << 39 | 0x1234_5000);
    entry.store(0, Ordering::Relaxed);
    instruction!("dsb ishst");
    instruction!("tlbi vmalle1is");
    instruction!("dsb ish");
    instruction!("isb");
    result
}
