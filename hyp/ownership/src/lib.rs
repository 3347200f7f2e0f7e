//! Who owns each physical page, and the transitions between owners.
//!
//! [`OwnershipTable`] is the one truth about memory. The host's stage 2 is a cache of it, filled by faults, and the EL2
//! stage 1 maps what EL2 was given or has pinned. [`Memory`] holds all three, in regions with a lock each, and keeps them in step: each
//! operation first checks all of its range and makes sure of the translation tables that it needs, and then cannot fail.
//!
//! A guest's part is [`GuestMemory`]: its stage 2, which is no cache, with the pages for its tables. Methods of [`Memory`] that
//! take one move pages between host and guest; see `transfer.rs` for what happens to a page on its way.

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
mod counts;
mod entry;
mod fault;
mod guest;
mod held;
mod inspect;
mod locked;
mod memory;
mod pool;
mod reason;
mod region;
mod step;
mod table;
#[cfg(test)]
mod tests;
mod transfer;
mod transient;

pub use check::Inconsistency;
pub use counts::Counts;
pub use entry::State;
pub use fault::HostFault;
pub use guest::{GuestKind, GuestMemory};
pub use inspect::Entries;
pub use memory::{Failure, HostState, Memory, PageReport, Reason};
pub use reason::{GuestFailure, GuestReason, HostFailure};
pub use table::{OwnershipTable, PAGES_PER_BLOCK, SetupError, Sizes, sizes};
pub use transfer::{Batch, Conversion, Gift, GuestPage, MAX_BATCH, MAX_STEPS, Unshare};

/// Translation tables that EL2's own mappings leave to the host's stage 2, so that it always gets on.
pub const HOST_RESERVE: usize = 32;
