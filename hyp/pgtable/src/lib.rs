//! Stage-2 and EL2 stage-1 page tables with break-before-make and flush tokens.
//!
//! A descriptor in memory is only touched through [`Machine::read`] and [`Machine::write`]. Mapping and unmapping work in
//! two phases: [`PageTable::tables_to_map`] and [`PageTable::tables_to_unmap`] say how many tables an operation will take
//! at most, so that a caller can make sure of them first; the operation itself then cannot fail. What is taken away is
//! noted in a [`Flush`], and one [`PageTable::flush`] settles any number of them with one TLB invalidation.

#![forbid(unsafe_code)]
#![cfg_attr(not(any(test, feature = "recording")), no_std)]
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

mod descriptor;
mod flush;
mod geometry;
mod machine;
#[cfg(any(test, feature = "recording"))]
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used,
        reason = "never part of the hypervisor: it exists to panic in tests"
    )
)]
pub mod recording;
mod regime;
mod table;
#[cfg(test)]
mod tests;

pub use descriptor::{Descriptor, Kind};
pub use flush::Flush;
pub use geometry::{Geometry, PhysicalSize};
pub use machine::{Hint, Machine, TablePool};
pub use regime::{El2, El2Usage, Regime, Stage2, Stage2Usage, Tree, Vmid, Vttbr};
pub use table::{Found, Invalidated, Leaves, MapError, Mapping, PageTable, Walk};
