//! The executable specification of Ravelin's memory: who may touch which page, and what each call does and answers.
//!
//! It is written from the rules (`ARCHITECTURE.md`, "Ownership" and "The life of a page of a guest"; `docs/hypercalls.md`;
//! `docs/guests.md`), not from the hypervisor, and knows neither translation tables nor locks nor blocks: only sets and maps
//! of pages. To read it, begin with [`state`], then [`memory`] for the host's own pages, [`vms`] for the life of VMs, [`guest`]
//! for what guests do.
//!
//! # Use
//!
//! [`Model::host_call`], [`Model::guest_call`], [`Model::ring`] and [`Model::host_fault`] are told of something that has just happened, judge
//! whether it is what had to happen, and go on to the next state. [`Model::compare`] compares that with the real tables.
//! The checking build of the hypervisor and the tests on the build machine do so after each hypercall and each stage 2 fault, for
//! what lies around, and now and then for everything ([`Model::compare_all`]).
//!
//! # What it leaves open
//!
//! Calls happen one after the other. Where the outcome depends on what no map of pages can know, a set of outcomes is
//! allowed, each of which the model follows exactly: that tables are missing (NO_MEMORY, NEEDS_TABLES), that a vCPU runs
//! (BUSY, unless [`Model::is_sequential`]), and how much of a long range one call does. What registers of vCPUs hold, what the
//! host is told in a run page (which range it is asked to release, at which address a guest lacks a page), SMCs, and interrupts
//! are not its subject, nor is EL2's stage 1 where nothing is the host's or a guest's; the checking build sees that it stays there
//! as it was.
//!
//! # What it does not know by itself
//!
//! The hypervisor tells how large its objects are, and its entries tell which pages a VM_DESTROY that has more to do has given back.
//! The table of calls, with the kinds of arguments and the bits of attributes, is that of `ravelin_abi`. In the checking build the
//! tables are read with the hypervisor's own walk; `tests/drivers` has one that knows nothing of it.

#![forbid(unsafe_code)]
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod arguments;
pub mod guest;
pub mod memory;
mod real;
mod ring;
mod runs;
pub mod state;
mod verdict;
pub mod vms;
mod watch;

#[cfg(test)]
mod tests;

use alloc::{string::String, vec::Vec};
use core::{fmt, ops::Range};

use ravelin_abi::VmAttributes;

pub use guest::{Door, GuestCall};
pub use real::{Counts, Found, Real};
pub use ring::RingConversion;
pub use runs::{Follow, Runs};
use state::{Page, State};
pub use watch::Watch;

/// Bytes of a page.
pub(crate) const PAGE_SIZE: u64 = 4096;

/// What one call does of a long range at least, in pages.
pub(crate) const STEPS: u64 = 512;

/// How many pages VMs take, as VM_SIZES has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Pages for VM_CREATE.
    pub vm: u64,
    /// Pages for VCPU_CREATE.
    pub vcpu: u64,
    /// Pages of which the address for VM_CREATE is a multiple.
    pub alignment: u64,
}

/// The specification, at one moment.
#[derive(Clone)]
pub struct Model {
    /// Who has what.
    pub state: State,
    /// Whether nothing else goes on while a call is made: then none is BUSY because of that.
    pub is_sequential: bool,
    sizes: fn(VmAttributes) -> Sizes,
    touched: Touched,
}

/// What the last call was about.
#[derive(Clone, Debug, Default)]
pub(crate) struct Touched {
    /// Numbers of pages.
    pages: Vec<Range<u64>>,
    /// Frames, with their VMs.
    frames: Vec<(u64, Range<u64>)>,
    /// Numbers of pages that are zero now.
    scrubbed: Vec<Range<u64>>,
}

/// What has been seen to happen: in which state, which call, with which result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reached {
    /// Of the page or frame that decided, or else of the VM; `-` if it came to neither.
    pub state: &'static str,
    /// Name of the call.
    pub call: &'static str,
    /// Name of the status, or what became of a guest's call.
    pub result: &'static str,
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.state, self.call, self.result)
    }
}

/// Something that must not have happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference(pub String);

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns a [`Difference`] with a formatted text.
macro_rules! differs {
    ($($format:tt)+) => {
        Err($crate::Difference(alloc::format!($($format)+)))
    };
}
pub(crate) use differs;

impl Model {
    /// Returns the model of a machine with this RAM at the moment when the host starts: all of it is the host's, except for the
    /// hypervisor's `carve_out`. All are addresses of bytes, multiples of the page size. `sizes` is what VM_SIZES says.
    pub fn new(
        ram: impl IntoIterator<Item = Range<u64>>,
        carve_out: Range<u64>,
        sizes: fn(VmAttributes) -> Sizes,
    ) -> Self {
        let numbers = |range: Range<u64>| range.start / PAGE_SIZE..range.end / PAGE_SIZE;
        let mut pages = Runs::default();
        for range in ram {
            pages.set(numbers(range), Page::Host);
        }
        pages.set(numbers(carve_out), Page::Hypervisor);
        let state = State { pages, vms: Default::default(), handles: Default::default() };
        Self { state, is_sequential: false, sizes, touched: Touched::default() }
    }

    /// Yields the numbers of the pages that the last call had to zero.
    pub fn scrubbed(&self) -> impl Iterator<Item = u64> {
        self.touched.scrubbed.iter().cloned().flatten()
    }

    /// Gives pages a new state, and remembers to look at them.
    pub(crate) fn set(&mut self, pages: Range<u64>, page: Page) {
        self.touched.pages.push(pages.clone());
        self.state.pages.set(pages, page);
    }

    /// Gives pages to the host, zeroed.
    pub(crate) fn scrub(&mut self, pages: Range<u64>) {
        self.touched.scrubbed.push(pages.clone());
        self.set(pages, Page::Host);
    }
}
