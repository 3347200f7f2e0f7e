//! The architecture trace: what EL2 does to translation tables, TLBs and the registers that name them.
//!
//! A [`Record`] is one event of one CPU. It has two forms: [`Packed`], 16 bytes, in which the hypervisor sends it, and
//! [`Entry`], a line of text with a number and a CPU, that other checkers can read, too. [`Checker`] follows a trace and says
//! where it breaks the rules of the Arm architecture for translation tables; it knows nothing but the trace.

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

#[cfg(feature = "checker")]
extern crate alloc;

#[cfg(feature = "checker")]
mod checker;
#[cfg(feature = "checker")]
mod geometry;
mod packed;
mod record;
mod start;
#[cfg(all(test, feature = "checker"))]
mod tests;
mod text;
#[cfg(feature = "checker")]
mod violation;

#[cfg(feature = "checker")]
pub use checker::Checker;
pub use packed::{Packed, Records, Unknown};
pub use record::{Barrier, Dsb, Hint, MemOrder, Record, Sysreg, TlbiOp};
pub use start::{CPU_START, ENTRY, FIRST_TABLES, SWITCH, Step};
pub use text::{Entry, NotARecord};
#[cfg(feature = "checker")]
pub use violation::{Fault, StaleEntry, Violation};
