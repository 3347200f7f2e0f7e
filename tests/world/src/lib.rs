//! A host with its guests, and Ravelin's real handlers on the recording machine: for tests, drivers and fuzz targets on the
//! build machine.
//!
//! [`in_world`] makes a [`World`]. The host makes calls with any registers, and accesses pages through whatever its stage 2
//! could translate; guests do what they are told by [`Action`]s while VCPU_RUN runs them. A page holds a number that stands
//! for its contents, so that a page that is lost, mixed up or not scrubbed shows.

#![forbid(unsafe_code)]

mod guest;
mod machine;
mod vms;
mod world;

pub use guest::{Action, CALL_REGISTERS, Door, Happened, Outcome};
pub use machine::TestMachine;
pub use vms::{call, number};
pub use world::{Agreeable, Heap, Layout, World, in_world, lasting_world, vm_sizes};
