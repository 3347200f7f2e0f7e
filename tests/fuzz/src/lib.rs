//! Fuzz targets: what they do with the bytes that a fuzzer chooses.
//!
//! Each takes any bytes, makes of them what the code under test takes, and panics if that does what it must not. The
//! programs in `fuzz_targets` hand them to libFuzzer; `tests/corpus.rs` runs them on the committed inputs.

#![forbid(unsafe_code)]

mod dispatcher;
mod dtb;
mod guest_calls;
mod mmio;
mod sequences;
mod vgic;

pub use dispatcher::dispatcher;
pub use dtb::dtb;
pub use guest_calls::guest_calls;
pub use mmio::mmio;
pub use sequences::sequences;
pub use vgic::vgic;
