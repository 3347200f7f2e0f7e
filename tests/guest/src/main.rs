//! The guest as a bare-metal program. On other targets there is nothing to run.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod puppet;
#[cfg(target_os = "none")]
mod random;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("ravelin-guest is a bare-metal program: build it for aarch64-unknown-none-softfloat");
    std::process::exit(1);
}
