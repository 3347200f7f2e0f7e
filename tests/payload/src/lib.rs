//! Programs that run at EL1 in the place of the host and issue real hypercalls.
//!
//! One bare-metal image holds all on-target tests. It reads from `/chosen/bootargs` which of them to run (`test=NAME`,
//! `test=PREFIX*` or `test=all`; `skip=` names others in the same way; with `after=NAME` only those behind that one; `effort=N` makes the search for races N times
//! as long; `seed=N`, `rounds=N` and `steps=N` are for random tests) and prints one line for each:
//!
//! ```text
//! test contents.kept_when_shared ... ok
//! test psci.race ... ignored: needs 3 CPUs
//! test stale.other_cpu ... FAILED: CPU 1: Read of 0x48000000 works after the donation
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

pub use ravelin_guest::pattern;
pub use table::{TESTS, Test};
