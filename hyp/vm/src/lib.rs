//! VMs and vCPUs: handles, life cycle, registers, and what of an exit the host may see.

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

mod context;
mod cpu;
mod entropy;
mod exception;
mod exit;
#[cfg(test)]
mod fake;
mod gic;
mod guest;
pub mod guest_call;
mod handle;
mod id;
mod machine_memory;
mod measurement;
mod mmio;
mod object;
mod psci;
mod ranges;
mod refusal;
mod ring;
pub mod rsi;
mod run;
mod sysreg;
mod table;
mod transitions;
mod vm;

pub use context::Context;
pub use cpu::{Entry, GuestCpu, Left, VectorPlaces, Vectors};
pub use entropy::{EntropySource, MAX_BITS, call as entropy_call};
pub use exception::{Exception, PstateFeatures, Trapped};
pub use exit::{Abort, Backing, GuestExit, Pending, Report, Syndrome, WrongAnswer};
pub use gic::VcpuGics;
pub use guest::{Guest, Outcome};
pub use handle::{Handle, SLOTS};
pub use id::{GuestFeatures, IdRegisters};
pub use machine_memory::{MachineMemory, PageAccess};
pub use measurement::Digest;
pub use mmio::MmioAccess;
pub use object::ObjectMemory;
pub use psci::{FirmwareCall, FirstInstruction, Power, Readiness, firmware_call, mpidr};
pub use refusal::Refusal;
pub use ring::RingCall;
pub use run::VcpuState;
pub use sysreg::{SysregAccess, SysregAction};
pub use transitions::{GuestFailure, Transitions};
pub use vm::{Start, Vcpu, VcpuPages, Vm, Vms};
