//! Looks at the hypervisor from inside its Linux host: runs from the initramfs of `cargo xtask test linux`.
//!
//! ```text
//! probe identity              what the host shows of its CPUs: hwcaps, identification registers
//! probe instructions          executes what the hwcaps promise, on all CPUs at once
//! probe pmu                   counts cycles and instructions
//! probe carve-out REG         touches the hypervisor's memory in every way; REG is the file of its node's `reg`
//! probe unguarded REG         has the kernel touch it where nothing handles the fault
//! probe hotplug ROUNDS        takes CPUs off and on again
//! probe memory LEAVE          fills and verifies all free memory but LEAVE MiB
//! probe kcore STEP            reads a page of RAM in every STEP KiB through /proc/kcore
//! probe peek PID SECRET       looks for a guest's secret, of which it gets the complement, in the memory of a VMM
//! probe peek-kernel SECRET    looks for it in all of RAM
//! probe workloads             does work of fixed amounts between marks; lines `bench NAME ROUND` name them
//! probe linger LEAVE          leaves behind a process that has all free memory but LEAVE MiB, and sets a mark
//! probe nothing               does nothing
//! probe kexec                 starts /root/kernel with /root/initrd
//! ```
//!
//! It prints a line for each check, and for each value that is compared with that of a host without a hypervisor:
//!
//! ```text
//! @ok NAME
//! @fail NAME: WHY
//! @skip NAME: WHY
//! @value NAME = TEXT
//! @note NAME = TEXT       a value that is not compared
//! ```
//!
//! The program uses no library, so the compiler's target for the hypervisor builds it too. On other targets there is
//! nothing to run.

#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(target_os = "none", expect(unsafe_code, reason = "system calls, signals and single instructions"))]

#[cfg(target_os = "none")]
mod a32;
#[cfg(target_os = "none")]
mod access;
#[cfg(target_os = "none")]
mod carve_out;
#[cfg(target_os = "none")]
mod cpu;
#[cfg(target_os = "none")]
mod hotplug;
#[cfg(target_os = "none")]
mod instructions;
#[cfg(target_os = "none")]
mod kcore;
#[cfg(target_os = "none")]
mod kexec;
#[cfg(target_os = "none")]
mod memory;
#[cfg(target_os = "none")]
mod peek;
#[cfg(target_os = "none")]
mod pmu;
#[cfg(target_os = "none")]
mod report;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
mod sys;
#[cfg(target_os = "none")]
mod workloads;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("probe runs in the host: build it for aarch64-unknown-none-softfloat");
    std::process::exit(1);
}
