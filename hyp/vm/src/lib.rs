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

mod exception;

pub use exception::{Exception, PstateFeatures, Trapped};
