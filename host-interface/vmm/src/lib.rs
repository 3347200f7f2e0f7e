//! A VMM that runs ordinary and protected Linux guests through `/dev/kvm`.
//!
//! Reading order: [`layout`], [`fdt`], [`memory`] and [`fault`]; then [`virtio`]; then `vm` and [`vcpu`].

pub mod args;
pub mod bus;
pub mod console;
pub mod fault;
pub mod fdt;
pub mod layout;
pub mod memory;
pub mod report;
pub mod serial;
pub mod signals;
pub mod tap;
pub mod terminal;
pub mod vcpu;
pub mod virtio;
#[cfg(target_arch = "aarch64")]
pub mod vm;

/// Exit status after a failure.
pub const STATUS_FAILED: i32 = 1;
/// Exit status after a wrong command line.
pub const STATUS_USAGE: i32 = 2;
/// Exit status after the guest has crashed.
pub const STATUS_CRASHED: i32 = 3;
