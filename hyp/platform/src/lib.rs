//! What the device tree says about the machine, where the carve-out goes, and the device tree that the host gets.
//!
//! The device tree comes from outside and is treated as hostile: every number in it is checked, every search in it is
//! bounded by its size, and what is wrong with it ends in a [`DtbError`] that names the node.
//!
//! [`Platform::parse`] reads it, [`HostImage::inspect`] looks at the host's kernel, [`Layout::plan`] chooses where
//! everything goes, and [`Platform::write_host_dtb`] writes the host's device tree.

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

mod cells;
mod chosen;
mod cpu;
mod device;
mod error;
mod host_dtb;
mod host_image;
mod layout;
mod memory;
mod path;
mod platform;

pub use chosen::{ByteRange, LogLevel, Module, Options};
pub use cpu::MAX_CPUS;
pub use device::{Conduit, Gic, MAX_REDISTRIBUTOR_REGIONS};
pub use error::{DtbError, Fault, NodeName};
pub use host_dtb::{MAX_HOST_DTB_SIZE, SLACK};
pub use host_image::HostImage;
pub use layout::{CPU_BLOCK_SIZE, Demand, ENTRY_SIZE, Layout, MODEL_MEMORY, START_STACK_PAGES};
pub use memory::{MAX_RAM_REGIONS, MAX_RESERVED_REGIONS};
pub use platform::{MAX_DTB_SIZE, Platform, dtb_size, find_console};
