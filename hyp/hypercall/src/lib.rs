//! From trapped registers to typed requests and their handlers: host hypercalls, the SMC allow-list, the PSCI relay, and
//! the exceptions that the host takes instead of what it must not do.
//!
//! A caller hands over the registers of the trapping context; results go to x0 to x3, the others are never touched.

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

mod counters;
#[cfg(test)]
mod fake;
mod firmware;
mod host;
mod psci;
mod registers;
mod smc;
mod vms;

pub use firmware::Firmware;
pub use host::{FaultAction, Host, HostedVms};
pub use psci::{Cpu, Entries, Start};
pub use ravelin_vm::{Exception, PstateFeatures, Trapped};
pub use registers::Registers;
