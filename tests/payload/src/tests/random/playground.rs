//! What the CPUs have in common: pages, and VMs that come and go.

use core::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use arrayvec::ArrayVec;
use ravelin_abi::{PageStateCode, Status, VmKind};
use ravelin_guest::playground::{BASE, Random, SPAN};

use super::own::OWN_PAGES;
use crate::{
    rt::{
        cpu::MAX_CPUS,
        memory::{self, PAGE},
        probe::{self, Access, probe},
        vm::{DISTRIBUTOR, Pages, Sizes, Vm, call, refused, succeed},
    },
    tests::{Counts, Failure, Op, Outcome, abort::ALIGNMENT, check, check_eq, page_counts, state},
};

/// Pages of a playground, which begins with two blocks.
pub(super) const SIZE: u64 = 3 * 512;

/// Pages of the blocks.
pub(super) const BLOCK_PAGES: u64 = 1024;

/// Pages behind the blocks of which all CPUs make calls.
const LOOSE_PAGES: u64 = 192;

/// Those that are mostly the host's, and those that are mostly given to VMs.
const HOSTS: Range<u64> = 0..64;
const GUESTS: Range<u64> = 48..LOOSE_PAGES;

/// Where behind the blocks the pages are that each CPU has of its own, in the same block as those of all.
const OWN: u64 = 320;

/// Where behind the blocks the page is that is pinned as often as can be.
const PINNED: u64 = 500;

/// VMs that come and go.
const VMS: usize = 3;

/// The most pins of a page.
const MAX_PINS: u64 = 4095;

/// The most VMs.
const MAX_VMS: usize = 255;

/// What code of guests is made of, in every page: an endless loop. The host's timer ends it.
const LOOP: u64 = 0x1400_0000_1400_0000;

/// A VM that comes and goes.
pub(super) struct Place {
    pub(super) handle: AtomicU64,
    /// What it is made of: pages of the VM, pages of a vCPU, and its run page.
    pub(super) metadata: u64,
    pub(super) vcpu: u64,
    pub(super) run_page: u64,
}

/// Pages and VMs.
pub(super) struct Playground<'a> {
    base: u64,
    pub(super) places: ArrayVec<Place, VMS>,
    /// Of a VM of each kind, by its code.
    pub(super) sizes: ArrayVec<Sizes, 3>,
    /// VMs that stay.
    pub(super) vms: &'a [Vm<'a>],
    /// For as many VMs as there can be, and one more.
    slots: u64,
}

impl<'a> Playground<'a> {
    /// Pages without VMs.
    pub(super) fn of_pages(base: u64) -> Self {
        (0..SIZE).for_each(|index| memory::store(base + index * PAGE, LOOP));
        Self { base, places: ArrayVec::new(), sizes: ArrayVec::new(), vms: &[], slots: 0 }
    }

    /// Pages, room for VMs, and VMs that stay.
    pub(super) fn with_vms(base: u64, pages: &Pages, vms: &'a [Vm<'a>]) -> Result<Self, Failure> {
        let mut playground = Self { vms, ..Self::of_pages(base) };
        for &kind in VmKind::ALL {
            playground.sizes.push(Sizes::of(Vm::attributes(kind, 1))?);
        }
        let most = |f: fn(&Sizes) -> u64| playground.sizes.iter().map(f).max().unwrap_or(0);
        let (vm, vcpu, align) = (most(|sizes| sizes.vm), most(|sizes| sizes.vcpu), most(|sizes| sizes.align));
        for _ in 0..VMS {
            playground.places.push(Place {
                handle: AtomicU64::new(0),
                metadata: pages.take_aligned(vm, align)?,
                vcpu: pages.take(vcpu)?,
                run_page: pages.take(1)?,
            });
        }
        let one = vm.next_multiple_of(align);
        playground.slots = pages.take_aligned(one * (MAX_VMS as u64 + 1), align)?;
        Ok(playground)
    }

    /// The pages that a CPU has of its own.
    pub(super) fn own_pages(&self, cpu: usize) -> u64 {
        const { assert!(OWN + OWN_PAGES * MAX_CPUS as u64 <= PINNED) };
        self.base + (BLOCK_PAGES + OWN + OWN_PAGES * cpu as u64) * PAGE
    }

    /// A range of pages that are mostly the host's, in a block or behind the blocks.
    pub(super) fn hosts(&self, random: &mut Random) -> (u64, u64) {
        self.range(random, HOSTS, 0)
    }

    /// A range of pages that are mostly given to VMs.
    pub(super) fn guests(&self, random: &mut Random) -> (u64, u64) {
        self.range(random, GUESTS, 512)
    }

    fn range(&self, random: &mut Random, loose: Range<u64>, block: u64) -> (u64, u64) {
        let longest = random.one_of([1, 1, 1, 2, 4, 64]);
        if random.once_in(6) {
            let any = random.below(BLOCK_PAGES);
            let page = random.one_of([block, block, block + any / 2, any]);
            let most = random.one_of([512, 512, BLOCK_PAGES, longest, longest]);
            return (self.base + page * PAGE, most.min(BLOCK_PAGES - page));
        }
        let page = loose.start + random.below(loose.end - loose.start);
        (self.base + (BLOCK_PAGES + page) * PAGE, 1 + random.below(longest.min(loose.end - page)))
    }

    /// One page, given to a VM or not.
    pub(super) fn page(&self, random: &mut Random) -> u64 {
        if random.once_in(2) { self.hosts(random).0 } else { self.guests(random).0 }
    }

    /// Touches a page, which works or ends in an abort.
    pub(super) fn access(&self, random: &mut Random) -> Outcome {
        let address = self.page(random);
        let access = random.one_of([
            Access::Read,
            Access::Write(LOOP),
            Access::Write(LOOP),
            Access::Atomic,
            Access::Pair,
            Access::El0Read,
            Access::El0Write(LOOP),
        ]);
        if let Err(fault) = probe(access, address) {
            check_eq!((fault.status(), fault.far), (ALIGNMENT, address), "{access:?} of {address:#x}");
        }
        Ok(())
    }

    /// In some rounds, pins a page as often as can be, and makes as many VMs as there can be.
    pub(super) fn reach_limits(&self, seed: u64) -> Outcome {
        if seed.is_multiple_of(16) {
            let page = self.base + (BLOCK_PAGES + PINNED) * PAGE;
            Op::Share.succeeds(page, 1)?;
            (0..MAX_PINS).try_for_each(|_| Op::Pin.succeeds(page, 1))?;
            Op::Pin.answers(page, 1, Status::Limit, page)?;
            check_eq!(refused("STATISTICS", [page], Status::Limit)?, page, "the page that STATISTICS names");
            (0..MAX_PINS).try_for_each(|_| Op::Unpin.succeeds(page, 1))?;
            Op::Unshare.succeeds(page, 1)?;
        }
        if seed.is_multiple_of(8) && self.slots != 0 {
            let attributes = Vm::attributes(VmKind::Pkvm, 1);
            let sizes = self.sizes[VmKind::Pkvm as usize];
            let mut handles = ArrayVec::<u64, MAX_VMS>::new();
            let mut next = self.slots;
            loop {
                match call("VM_CREATE", [attributes.bits(), next, sizes.vm]) {
                    (Status::Success, [handle, ..]) => handles.push(handle),
                    (Status::Limit, _) => break,
                    // Another CPU uses the last place that is free.
                    (Status::Busy, _) => {}
                    (status, _) => {
                        return Err(Failure::new(format_args!("VM_CREATE of VM {}: {}", handles.len(), status.name())));
                    }
                }
                next = self.slots + handles.len() as u64 * sizes.vm.next_multiple_of(sizes.align) * PAGE;
            }
            for handle in handles {
                succeed("VM_TEARDOWN", [handle])?;
                check_eq!(succeed("VM_DESTROY", [handle])?, 0, "pages left of a VM");
            }
        }
        Ok(())
    }

    fn pages(&self) -> impl Iterator<Item = u64> {
        let base = self.base;
        (0..BLOCK_PAGES + LOOSE_PAGES).map(move |index| base + index * PAGE)
    }

    /// Checks that the states of the pages add up to the counts, and that the host can access those that it should.
    pub(super) fn check_totals(&self, before: Counts) -> Outcome {
        let (mut shared, mut donated) = (0, 0);
        for page in self.pages() {
            let (code, pins) = state(page)?;
            check!(code == PageStateCode::SharedOwned || pins == 0, "{page:#x} is {code:?} with {pins} pins");
            check_eq!(probe::read(page).is_ok(), code != PageStateCode::NoPage, "access to {page:#x}: {code:?}");
            shared += u64::from(code == PageStateCode::SharedOwned);
            donated += u64::from(code == PageStateCode::NoPage);
        }
        let [owned, all_shared, hypervisor, all_donated] = before;
        let expected = [owned - shared - donated, all_shared + shared, hypervisor, all_donated + donated];
        check_eq!(page_counts()?, expected, "pages by state");
        Ok(())
    }

    /// Takes back what is the hypervisor's or lent to it.
    pub(super) fn restore_pages(&self) -> Outcome {
        for page in self.pages() {
            let (code, pins) = state(page)?;
            (0..pins).try_for_each(|_| Op::Unpin.succeeds(page, 1))?;
            match code {
                PageStateCode::SharedOwned if call("UNSHARE", [page, 1, 0]).0 == Status::Success => {}
                PageStateCode::NoPage if call("TAKE_BACK", [page, 1, 0]).0 == Status::Success => {}
                _ => {}
            }
        }
        Ok(())
    }

    /// Ends the VMs that come and go, whatever they have come to.
    pub(super) fn end_vms(&self, pages: &Pages) -> Outcome {
        for place in &self.places {
            let handle = place.handle.load(Relaxed);
            if matches!(call("VM_TEARDOWN", [handle]).0, Status::BadHandle) {
                continue;
            }
            // An unsealed one may have pages where others have their interrupt controller.
            for (base, frames) in [(BASE, SPAN), (DISTRIBUTOR, 512)] {
                let mut done = 0;
                while done < frames {
                    match call("VM_RECLAIM", [handle, base + done * PAGE, frames - done]) {
                        (Status::Success, [some, ..]) => done += some,
                        (Status::NeedsTables, [missing, ..]) => {
                            succeed("VM_DONATE_TABLES", [handle, pages.take(missing)?, missing])?;
                        }
                        (status, _) => return Err(Failure::new(format_args!("VM_RECLAIM: {}", status.name()))),
                    }
                }
            }
            while succeed("VM_DESTROY", [handle])? != 0 {}
        }
        Ok(())
    }
}
