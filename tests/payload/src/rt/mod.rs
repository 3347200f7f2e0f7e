//! The runtime: entry, console, CPUs, calls, probes, and the description of the machine.

pub(crate) mod call;
pub(crate) mod console;
pub(crate) mod cpu;
mod exception;
pub(crate) mod exchange;
pub(crate) mod exit;
pub(crate) mod gic;
pub(crate) mod memory;
pub(crate) mod platform;
pub(crate) mod probe;
mod runner;
mod start;
pub(crate) mod tally;
pub(crate) mod vm;
