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
mod id;
mod mmio;
mod sysreg;

pub use context::Context;
pub use exception::{Exception, PstateFeatures, Trapped};
pub use id::{GuestFeatures, IdRegisters};
pub use mmio::MmioAccess;
pub use sysreg::{CpuInterfaceWrite, SysregAccess, SysregAction};
