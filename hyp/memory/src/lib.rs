//! Addresses, page ranges and translation levels as distinct, checked types.
//!
//! A number that a host or a guest sends becomes one of these types or an error; nothing further down has to ask again
//! whether it is aligned, in range or free of overflow.

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

mod addr;
mod level;
mod range;

pub use addr::{Addr, Hyp, HypAddr, Intermediate, Ipa, Phys, PhysAddr, Space};
pub use level::Level;
pub use range::{HypRange, IpaRange, PageRange, PhysRange, RangeError};

/// Size of a page, the translation granule, in bytes. Ravelin uses the 4 KiB granule only.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Binary logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// Descriptors in one translation table, and pages in the block that one last-level table covers.
pub const TABLE_ENTRIES: u64 = 512;

/// Size of the block that a level 2 descriptor maps, in bytes.
pub const BLOCK_SIZE: u64 = PAGE_SIZE << 9;

/// Bits of an address in every space. Without FEAT_LPA2 descriptors the architecture stops at 48 bits
/// (Arm ARM DDI 0487, D8.1.6 "Implemented physical address size").
pub const ADDRESS_BITS: u32 = 48;

/// The first address that no space has.
pub const ADDRESS_END: u64 = 1 << ADDRESS_BITS;
