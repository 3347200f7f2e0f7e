//! The GICv3 that a guest sees: distributor, redistributors and list-register scheduling.
//!
//! One security state (GICD_CTLR.DS = 1), affinity routing always on, no LPIs. SGIs, PPIs, and 32 to 988 SPIs, also
//! message-based. Group 0 and Group 1, 32 priorities, EOImode 0 and 1. Numbers of sections are those of the GICv3
//! architecture specification, Arm IHI 0069.
//!
//! # Storage
//!
//! Nothing is allocated. A VM brings one [`Distributor`], one [`Spi`] for each configured SPI and one [`VcpuGic`] for
//! each vCPU, all of which are plain numbers, valid with any contents, so they may lie in pages that were donated.
//! [`Gic`] is a view of the three for the time of one operation. Its `&mut` asks for one lock per VM.
//!
//! # Who does what
//!
//! * Entry: [`Gic::prepare_entry`] gives the values for the list registers and their controls. From then on the vCPU
//!   *runs*.
//! * Exit, whatever the reason, also maintenance interrupts: [`Gic::after_exit`] takes them back, before any other
//!   operation on behalf of that vCPU. It then no longer runs. If there is [nothing to take back](ListRegisters::may_stay), the
//!   vCPU may run on instead, for this model, until [`Gic::enter_again`].
//! * Traps of the guest: [`Gic::mmio`], [`Gic::send_sgi`], [`Gic::write_dir`].
//! * Timers and other interrupts private to a vCPU, from EL2 only: [`Gic::set_ppi_level`].
//! * The host: [`Gic::raise_spi`], for SPIs given to it by [`Gic::give_to_host`], and nothing else.
//! * Waiting vCPUs: [`Gic::wakes`].
//!
//! # Other vCPUs
//!
//! Each operation that may concern other vCPUs returns the [`VcpuSet`] of those that must look at their interrupts
//! again: one that runs must be made to exit (and fold, schedule, enter), one that waits must be woken. Until then
//! they work with what their list registers hold; state changed meanwhile is merged when they exit. The set is not
//! for the host's eyes: it tells which interrupts are enabled.
//!
//! Only a read of pending or active state of an interrupt that is in a list register of a running vCPU has to wait for
//! that vCPU; see [`Outcome::Retry`].
//!
//! # Bounds
//!
//! An access to a register takes at most 32 steps; one that changes which groups are on, or whether a redistributor
//! sleeps, takes one per vCPU and per SPI, as does an exit after which the CPU interface has other groups on. Scheduling
//! takes one step per interrupt that is pending or active on the vCPU.

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

mod check;
mod distributor;
mod gic;
pub mod ich;
mod interrupt;
mod mmio;
mod queue;
mod redistributor;
mod schedule;
mod sgi;
mod vcpu;
mod vcpu_set;

#[cfg(test)]
mod tests;

pub use check::Inconsistency;
pub use distributor::{Distributor, Spi};
pub use gic::{Gic, NotAllowed, Vcpus};
pub use mmio::{Access, Frame, Outcome, RedistributorFrame, Unsupported};
pub use schedule::ListRegisters;
pub use sgi::SgiRegister;
pub use vcpu::VcpuGic;
pub use vcpu_set::{VcpuSet, affinity, vcpu_of_affinity};

/// Most vCPUs that one VM can have.
pub const MAX_VCPUS: usize = 128;

/// Most SPIs that can be configured. The last four of them do not exist, because their INTIDs are reserved.
pub const MAX_SPIS: usize = 992;

/// Size in bytes of the distributor's frame, and of either frame of a redistributor.
pub const FRAME_SIZE: u64 = 0x1_0000;

/// The first PPI; what is below are SGIs.
pub const FIRST_PPI: u16 = 16;

/// The first SPI.
pub const FIRST_SPI: u16 = 32;

/// The first of the INTIDs that are reserved for special purposes.
pub const INTIDS: u16 = 1020;
