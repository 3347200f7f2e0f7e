//! What is real, as the model wants to see it: the one place that knows both the hypervisor's types and the model's.

#![forbid(unsafe_code)]
#![no_std]

use core::ops::Range;

use ravelin_hypercall::HostedVms;
use ravelin_memory::{Ipa, PAGE_SHIFT, PAGE_SIZE, PageRange, PhysAddr};
use ravelin_model::{
    Counts, Found, Real,
    state::{Page, Place},
};
use ravelin_ownership::{Entries, Memory, State};
use ravelin_pgtable::{El2Usage, Found as Mapped, Machine, Mapping, Stage2Usage, TablePool};
use ravelin_vm::{Handle, ObjectMemory};

/// The hypervisor's tables, on a machine.
pub struct Observed<'a, 'm, P, M, O: ObjectMemory> {
    /// Who owns what, and what is mapped.
    pub memory: &'a Memory<'m, P>,
    /// What the tables are read with.
    pub machine: &'a M,
    /// All VMs.
    pub vms: &'a HostedVms<O>,
    /// Whether a page holds nothing but zeroes.
    pub is_zero: &'a dyn Fn(PhysAddr) -> bool,
}

impl<P: TablePool, M: Machine, O: ObjectMemory> Real for Observed<'_, '_, P, M, O> {
    fn pages(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Page)) {
        // A visit ends with the first page that is not RAM.
        let mut from = pages.start;
        while from < pages.end {
            let mut next = from + 1;
            if let Some(range) = range(from..pages.end) {
                self.memory.visit_entries(self.machine, range, &mut |run, entries| {
                    let run = numbers(run);
                    next = run.end;
                    f(run, page(entries));
                });
            }
            from = next;
        }
    }

    fn host(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found)) {
        if let Some(range) = range(pages) {
            self.memory.visit_host(self.machine, range, &mut |part, mapped| {
                f(numbers(part), found(mapped, Stage2Usage::Memory, Stage2Usage::Device));
            });
        }
    }

    fn hypervisor(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found)) {
        if let Some(range) = range(pages) {
            self.memory.visit_el2(self.machine, range, &mut |part, mapped| {
                f(numbers(part), found(mapped, El2Usage::Data, El2Usage::Device));
            });
        }
    }

    fn guest(&self, handle: u64, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found)) {
        let Some(range) = range(pages) else { return };
        let visited = self.vms.with_guest(Handle::from_raw(handle), |guest| {
            self.memory.visit_guest(self.machine, guest.memory(), range, &mut |part, mapped| {
                f(numbers(part), found(mapped, Stage2Usage::Memory, Stage2Usage::Device));
            });
        });
        assert!(visited.is_ok(), "VM {handle:#x} cannot be looked at: {visited:?}");
    }

    fn counts(&self) -> Counts {
        let counts = self.memory.counts(self.machine);
        Counts {
            host: counts.host_owned,
            shared: counts.host_shared,
            hypervisor: counts.hyp_owned,
            donated: counts.hyp_donated,
            kept: counts.hyp_kept,
            lent: counts.host_lent,
            private: counts.guest_owned,
            offered: counts.guest_offered,
            claimed: counts.guest_claimed,
        }
    }

    fn slot(&self, handle: u64) -> u64 {
        Handle::from_raw(handle).slot() as u64
    }

    fn is_zero(&self, page: u64) -> bool {
        PhysAddr::new(page << PAGE_SHIFT).is_some_and(self.is_zero)
    }
}

/// Returns the range of these pages.
fn range<S>(pages: Range<u64>) -> Option<PageRange<S>> {
    PageRange::new(pages.start << PAGE_SHIFT, pages.end.checked_sub(pages.start)?).ok()
}

/// Returns the numbers of the pages of a range.
fn numbers<S>(range: PageRange<S>) -> Range<u64> {
    range.base().raw() / PAGE_SIZE..range.end() / PAGE_SIZE
}

/// Returns the state that entries stand for.
fn page(Entries { state, pins, guest }: Entries) -> Page {
    let place = || {
        let (slot, frame) = guest.unwrap_or((u8::MAX, Ipa::from_bits_truncating(0)));
        Place { vm: slot.into(), frame: frame.page_number() }
    };
    match state {
        State::HOST_SHARED => Page::Shared { pins },
        State::HOST_BORROWED => Page::Run,
        State::HOST_LENT => Page::Lent(place()),
        State::HYP_OWNED => Page::Hypervisor,
        State::HYP_DONATED => Page::Donated,
        State::HYP_KEPT => Page::Kept,
        State::GUEST_OWNED => Page::Private(place()),
        State::GUEST_PINNED => Page::Pinned(place()),
        State::GUEST_OFFERED => Page::Offered(place()),
        State::GUEST_CLAIMED => Page::Claimed(place()),
        State::HOST_OWNED if pins == 0 => Page::Host,
        // None that RAM should be in: it differs from whatever is expected.
        _ => Page::Shared { pins: u64::MAX },
    }
}

/// Returns what a table has there, where memory and devices are mapped for these usages.
fn found<U: PartialEq>(mapped: Mapped<U>, memory: U, device: U) -> Found {
    match mapped {
        Mapped::Absent { .. } => Found::Absent,
        Mapped::Poisoned => Found::Poisoned,
        Mapped::Leaf { mapping: Some(Mapping { to, usage }), .. } if usage == memory => Found::Memory(to.page_number()),
        Mapped::Leaf { mapping: Some(Mapping { to, usage }), .. } if usage == device => Found::Device(to.page_number()),
        Mapped::Leaf { .. } => Found::Other,
    }
}
