//! The payload as a bare-metal program. Everything is in the library; on other targets there is nothing to run.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
use ravelin_payload as _;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("ravelin-payload is a bare-metal program: build it for aarch64-unknown-none-softfloat");
    std::process::exit(1);
}
