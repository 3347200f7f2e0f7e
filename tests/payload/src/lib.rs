//! Programs that run at EL1 in the place of the host and issue real hypercalls.
//!
//! One bare-metal image holds all on-target tests. It reads from `/chosen/bootargs` which of them to run (`test=NAME`,
//! `test=PREFIX*` or `test=all`) and prints one line for each:
//!
//! ```text
//! test share.contents ... ok
//! test psci.cpu_on_race ... ignored: needs 3 CPUs
//! test donate.stale ... FAILED: CPU 1 still reads 0x48000000
//! payload: 41 passed; 1 failed; 3 ignored
//! ```
//!
//! On other targets the crate holds only the table of tests, which the conformance runner checks against the table of
//! hypercalls.

#![cfg_attr(target_os = "none", no_std)]

#[cfg(target_os = "none")]
mod rt;
mod table;
#[cfg(target_os = "none")]
mod tests;

pub use table::{TESTS, Test};
