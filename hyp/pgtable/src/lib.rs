//! Stage-2 and EL2 stage-1 page tables with break-before-make and flush tokens.

#![forbid(unsafe_code)]
#![cfg_attr(not(any(test, feature = "recording")), no_std)]

mod machine;

pub use machine::{Machine, TablePool};
