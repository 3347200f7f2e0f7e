//! What the host and Ravelin agree on: hypercall numbers, typed arguments, status codes and layouts of shared pages.
//!
//! [`CALLS`] is the one table of host hypercalls. The parser of requests ([`HostCall::parse`]), the C header ([`CHeader`]) and
//! the reference ([`Reference`]) are made from it.
//!
//! A host makes a call with `HVC #0` at EL1: x0 holds the function identifier, x1 to x6 the arguments, x0 to x3 the
//! results. All other registers keep their values; after NOT_SUPPORTED, all but x0 do. The numbers lie in the range that
//! the SMC Calling Convention (Arm DEN0028) gives to a hypervisor's own services, and all are fast calls.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), no_std)]
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]

mod calls;
mod codes;
mod conversion;
mod generate;
mod registers;
mod request;
mod run;
mod statistics;
mod vm;
mod vm_calls;

pub use calls::{
    Argument, CALL_BITMAP, CALL_COUNTERS, CALLS, Call, Kind, MAX_ARGUMENTS, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES,
    counter_index,
};
pub use codes::{PageStateCode, Status, VmKind};
pub use conversion::{
    CONVERSION_ADDRESS, CONVERSION_PAGES, CONVERSION_UNSHARE, ConversionRequest, MAX_CONVERSION_PAGES, MAX_CONVERSIONS,
    RING_DONE, RING_ENTRIES, RING_POSTED, RING_RESULTS,
};
pub use generate::{CHeader, Reference};
pub use registers::{
    REGISTER_ELR_EL1, REGISTER_FPCR, REGISTER_FPSR, REGISTER_LAST, REGISTER_PC, REGISTER_POWER, REGISTER_PSTATE,
    REGISTER_SP_EL0, REGISTER_SP_EL1, REGISTER_SPSR_EL1, REGISTER_V, REGISTER_X, system_register,
};
pub use request::{HostCall, Pages};
pub use run::{
    Answer, ExitReason, RUN_CALL_REGISTERS, RUN_FLAG_EXECUTE, RUN_FLAG_WRITE, RUN_NO_DEADLINE, RUN_QUIET_SHARES,
    RunEntry, RunExit, RunPage,
};
pub use statistics::Statistics;
pub use vm::{GIC_FRAME_SIZE, MAX_IPA_BITS, MAX_VCPUS, MIN_IPA_BITS, VmAttributes, VmCall};

/// Vendor identifier 2f1d4c6e-83a7-4b0e-9d52-7c61e8b9a350 as the UID call returns it in w0 to w3: bytes of the UUID in
/// order, four a register, the first of them lowest (SMCCC, "Call UID query").
pub const VENDOR_UID: [u32; 4] = [0x6e4c_1d2f, 0x0e4b_a783, 0x617c_529d, 0x50a3_b9e8];

/// Major part of the interface's version. It changes when a caller of the old interface would be misled.
pub const VERSION_MAJOR: u32 = 1;

/// Minor part of the interface's version. It changes when calls or fields are added.
pub const VERSION_MINOR: u32 = 5;

/// Size of the pages that the calls count, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// The first address behind the address space that the calls know: 48 bits.
pub const ADDRESS_END: u64 = 1 << 48;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vendor_uid_is_the_uuid_in_order_of_bytes() {
        let hex: String =
            VENDOR_UID.iter().flat_map(|word| word.to_le_bytes()).map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "2f1d4c6e-83a7-4b0e-9d52-7c61e8b9a350".replace('-', ""));
    }
}
