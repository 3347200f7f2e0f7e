//! Tests of `/dev/kvm` and guest_memfd from the side of userspace: runs in a Linux host on the hypervisor, or on any KVM.
//!
//! ```text
//! kvm-tests                   runs all cases but those that take minutes
//! kvm-tests --full            runs those, too
//! kvm-tests memfd convert.pkvm.kept    runs groups of cases, or cases
//! kvm-tests --list            names them
//! ```
//!
//! It prints a line for each case, which `cargo xtask test kvm` counts:
//!
//! ```text
//! @ok NAME
//! @fail NAME: WHY
//! @skip NAME: WHY
//! @note NAME = TEXT
//! ```
//!
//! Each case runs in a process of its own, which is killed when its time is up: a case that crashes or hangs does not stop
//! the others. What the guests of the cases execute is the program of `tests/guest`, whose flat binary is the file
//! `/root/guest.bin`.

#![cfg_attr(
    all(target_os = "linux", target_arch = "aarch64"),
    expect(unsafe_code, reason = "system calls, mapped memory, and code for guests")
)]

#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
mod cases;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
mod check;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
mod gic;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
mod guest;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
mod host;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
mod kvm;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
mod machine;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
mod memory;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
mod runner;

#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
fn main() -> std::process::ExitCode {
    runner::main()
}

#[cfg(not(all(target_os = "linux", target_arch = "aarch64")))]
fn main() {
    eprintln!("kvm-tests runs in the host: build it for aarch64-unknown-linux-musl");
    std::process::exit(1);
}
