//! The EL2 image: initialisation order, exits of the host, console, panic.
//!
//! It runs twice. Where the bootloader put it, [`boot`] reads the device tree, builds everything in the carve-out and leaves
//! for the copy that it made there. The copy, [`resident`], takes over memory, enters the host and serves it from then on.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(feature = "checked")]
extern crate alloc;

#[cfg(target_os = "none")]
mod boot;
#[cfg(all(target_os = "none", feature = "checked"))]
#[expect(unsafe_code, reason = "the heap of the model, the window to RAM, and a lock that is passed on")]
mod checked;
#[cfg(target_os = "none")]
mod console;
#[cfg(target_os = "none")]
mod panic;
#[cfg(target_os = "none")]
mod pool;
#[cfg(target_os = "none")]
mod resident;
#[cfg(all(target_os = "none", feature = "trace"))]
mod trace;

/// Says what this program is not, where it is built like an ordinary one.
#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("The image runs on bare metal only: `cargo xtask build` makes it.");
    std::process::exit(2);
}
