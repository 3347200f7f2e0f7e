//! VMs and vCPUs: handles, life cycle, registers, and what of an exit the host may see.

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

mod context;
mod exception;
mod exit;
mod id;
mod mmio;
mod psci;
mod sysreg;

pub use context::Context;
pub use exception::{Exception, PstateFeatures, Trapped};
pub use exit::{Abort, Backing, GuestExit, Pending, Report, Syndrome, WrongAnswer};
pub use id::{GuestFeatures, IdRegisters};
pub use mmio::MmioAccess;
pub use psci::{FirmwareCall, Power, Readiness, firmware_call, mpidr};
pub use sysreg::{SysregAccess, SysregAction};
