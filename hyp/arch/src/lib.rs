//! The only crate with assembly and system registers.
//!
//! It implements what the logic crates ask of the machine ([`ravelin_pgtable::Machine`], [`ravelin_hypercall::Firmware`]) and
//! gives the image the rest: start-up, vectors, the state that EL2 must be in for the host, the console. On the build machine
//! it is empty; the recording machine of `ravelin-pgtable` stands in for it there.

#![no_std]
#![cfg(target_os = "none")]
#![expect(unsafe_code, reason = "instructions, system registers and tables have no safe form")]

mod boot;
mod console;
mod exit;
mod features;
mod firmware;
mod guest;
mod hardware;
mod host;
mod objects;
mod power;
mod report;
#[cfg(feature = "trace")]
mod semihosting;
mod sysreg;
#[cfg(feature = "trace")]
pub mod trace;

pub use boot::{BootTables, CpuEntry, CpuStart, El2Tables, Image, secondary_entry};
pub use console::Console;
pub use exit::{Exit, HostFrame, host_exit, pstate_features, skip_instruction, take_exception, trapped};
pub use firmware::El3;
pub use hardware::{Hardware, clean_to_poc};
pub use host::{Lacking, check_cpu, enable_stage2, physical_address_size, prepare_cpu};
pub use objects::{Objects, Placed};
pub use power::{Conduit, halt, power_off, semihosting_exit};
pub use report::{Backtrace, FatalFrame, mpidr, system_registers};
#[cfg(feature = "trace")]
pub use semihosting::Output;
