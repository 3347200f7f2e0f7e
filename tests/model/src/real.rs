//! Comparison with what is real: the ownership entries, and every translation table.

use core::ops::Range;

use alloc::{format, string::String, vec::Vec};
use ravelin_abi::VmKind;

use crate::{
    Difference, Model, differs,
    runs::{Follow, Runs},
    state::{Frame, Page, Place, Vm},
};

/// What a translation table has at the first page of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Absent,
    /// Nothing, and nothing can be mapped there.
    Poisoned,
    /// A mapping to this page and those behind it, as memory with the access that its kind of table gives.
    Memory(u64),
    /// The same as a device.
    Device(u64),
    /// Another mapping.
    Other,
}

/// How many pages of RAM are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// The host's alone.
    pub host: u64,
    /// Lent to the hypervisor, run pages included.
    pub shared: u64,
    /// The hypervisor's from the start.
    pub hypervisor: u64,
    /// Donated.
    pub donated: u64,
    /// What VMs are made of.
    pub kept: u64,
    /// Lent to ordinary VMs.
    pub lent: u64,
    /// Guests' alone.
    pub private: u64,
    /// Offered.
    pub offered: u64,
    /// Claimed.
    pub claimed: u64,
}

/// What the hypervisor has made of memory. All numbers are those of pages.
pub trait Real {
    /// Calls `f` with what the ownership entries of those of `pages` that are RAM say, in runs and in ascending order: the state
    /// of the first page, from which those of the others follow. The VM of a [`Place`] is the number of its slot.
    fn pages(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Page));

    /// Calls `f` with what the host's stage 2 has at `pages`, in ascending order.
    fn host(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found));

    /// Calls `f` with what EL2's stage 1 has at the physical addresses of `pages`, in ascending order.
    fn hypervisor(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found));

    /// Calls `f` with what the stage 2 of a VM has at `pages`, in ascending order.
    fn guest(&self, handle: u64, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found));

    /// Returns how many pages are in each state, as the hypervisor counts.
    fn counts(&self) -> Counts;

    /// Returns the slot of a VM, by which ownership entries name it.
    fn slot(&self, handle: u64) -> u64;

    /// Returns whether a page holds nothing but zeroes.
    fn is_zero(&self, page: u64) -> bool;
}

/// Pages that are looked at around each that a call was about: those that lie in the same multiple of this. What lies further off,
/// in the same block of 512 too, is looked at when everything is: with 512 here, a round of random tests takes three times as long.
const AROUND: u64 = 64;

impl Model {
    /// Compares what the last call was about, and what lies around that, with what is real.
    ///
    /// # Errors
    ///
    /// The first difference.
    pub fn compare(&self, real: &dyn Real) -> Result<(), Difference> {
        for pages in surroundings(self.touched.pages.iter().cloned()) {
            self.compare_pages(real, pages)?;
        }
        let mut handles: Vec<_> = self.touched.frames.iter().map(|(handle, _)| *handle).collect();
        handles.sort_unstable();
        handles.dedup();
        for handle in handles {
            let Some(vm) = self.state.vms.get(&handle) else { continue };
            let its = self.touched.frames.iter().filter(|(its, _)| *its == handle).map(|(_, frames)| frames.clone());
            for frames in surroundings(its) {
                self.compare_guest(real, handle, vm, frames.start..frames.end.min(vm.frame_count()))?;
            }
        }
        for page in self.touched.scrubbed.iter().cloned().flatten() {
            if !real.is_zero(page) {
                return differs!("page {page:#x} has come back to the host with something in it");
            }
        }
        Ok(())
    }

    /// Compares all of memory, all VMs, and what the hypervisor counts.
    ///
    /// # Errors
    ///
    /// The first difference.
    pub fn compare_all(&self, real: &dyn Real) -> Result<(), Difference> {
        let ram: Vec<_> = self.state.pages.iter().map(|(run, _)| run).collect();
        for pages in surroundings(ram.into_iter()) {
            self.compare_pages(real, pages)?;
        }
        for (&handle, vm) in &self.state.vms {
            self.compare_guest(real, handle, vm, 0..vm.frame_count())?;
        }
        let (counted, counts) = (real.counts(), self.counts());
        if counted == counts { Ok(()) } else { differs!("the hypervisor counts {counted:?}, and not {counts:?}") }
    }

    /// Returns what model and entries say of the pages that the last call was about, for a message.
    #[must_use]
    pub fn account(&self, real: &dyn Real) -> String {
        let mut text = String::new();
        for pages in surroundings(self.touched.pages.iter().cloned()) {
            for (part, page) in self.state.pages.parts(pages.clone()) {
                text += &format!("model   {part:#x?}: {page:x?}\n");
            }
            real.pages(pages, &mut |part, page| text += &format!("entries {part:#x?}: {page:x?}\n"));
        }
        text
    }

    /// Returns how many pages are in each state.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for (run, page) in self.state.pages.iter() {
            let count = match page {
                Page::Host => &mut counts.host,
                Page::Shared { .. } | Page::Run => &mut counts.shared,
                Page::Lent(_) => &mut counts.lent,
                Page::Hypervisor => &mut counts.hypervisor,
                Page::Donated => &mut counts.donated,
                Page::Kept => &mut counts.kept,
                Page::Private(_) | Page::Pinned(_) => &mut counts.private,
                Page::Offered(_) => &mut counts.offered,
                Page::Claimed(_) => &mut counts.claimed,
            };
            *count += run.end - run.start;
        }
        counts
    }

    /// Compares the ownership entries, the host's stage 2 and EL2's stage 1.
    fn compare_pages(&self, real: &dyn Real, pages: Range<u64>) -> Result<(), Difference> {
        let mut first = Ok(());
        let mut note = |found: Result<(), Difference>| {
            if first.is_ok() {
                first = found;
            }
        };
        let mut entries = 0;
        real.pages(pages.clone(), &mut |run, found| {
            entries += run.end - run.start;
            note(self.in_parts(run.clone(), |part, page| {
                let expected = page.map(|page| as_real(real, page));
                let found = found.after(part.start - run.start);
                if expected == Some(found) {
                    return Ok(());
                }
                differs!("the entries of pages {part:#x?} say {found:?}, and not {expected:?}")
            }));
        });
        let ram: u64 = self
            .state
            .pages
            .parts(pages.clone())
            .filter(|(_, page)| page.is_some())
            .map(|(part, _)| part.end - part.start)
            .sum();
        if entries != ram {
            note(differs!("{entries} of pages {pages:#x?} have an entry, and not {ram}"));
        }
        real.host(pages.clone(), &mut |run, found| {
            if found == Found::Absent {
                return;
            }
            note(self.in_parts(run.clone(), |part, page| match page {
                Some(page) if page.host_may() && found == Found::Memory(run.start) => Ok(()),
                // What is not RAM is the host's, as a device.
                None if found == Found::Device(run.start) => Ok(()),
                page => {
                    differs!("the host's stage 2 has {found:?} at pages {run:#x?}, of which {part:#x?} is {page:?}")
                }
            }));
        });
        real.hypervisor(pages, &mut |run, found| {
            note(self.in_parts(run.clone(), |part, page| match page {
                // What the image is made of.
                Some(Page::Hypervisor) | None => Ok(()),
                Some(page) => {
                    let expected = if page.hypervisor_has() { Found::Memory(run.start) } else { Found::Absent };
                    if found == expected {
                        return Ok(());
                    }
                    differs!("EL2's stage 1 has {found:?} at pages {run:#x?}, of which {part:#x?} is {page:?}")
                }
            }));
        });
        first
    }

    /// Compares the stage 2 of a guest at `frames`, and in a realm at their aliases.
    fn compare_guest(&self, real: &dyn Real, handle: u64, vm: &Vm, frames: Range<u64>) -> Result<(), Difference> {
        let views: &[bool] = if vm.kind() == VmKind::Realm { &[false, true] } else { &[false] };
        let (mut first, mut poison) = (Ok(()), Runs::<()>::default());
        for &shared in views {
            let alias = if shared { vm.frame_count() } else { 0 };
            real.guest(handle, frames.start + alias..frames.end + alias, &mut |run, found| {
                let frames = run.start - alias..run.end - alias;
                for (part, frame) in self.state.look(vm, frames.clone()) {
                    let found = match found {
                        Found::Memory(page) => Found::Memory(page + (part.start - frames.start)),
                        other => other,
                    };
                    let is_right = match frame {
                        // While it goes back to the host, poison does not matter any more.
                        Frame::Absent => found == Found::Absent || found == Found::Poisoned && !vm.is_alive(),
                        // One of the views has it.
                        Frame::Poisoned => match found {
                            Found::Poisoned => {
                                let is_first = poison.parts(part.clone()).all(|(_, before)| before.is_none());
                                poison.set(part.clone(), ());
                                is_first
                            }
                            found => found == Found::Absent,
                        },
                        Frame::Page(backing, page) => {
                            let here = match page {
                                Page::Offered(_) | Page::Claimed(_) if views.len() > 1 => shared,
                                _ => !shared,
                            };
                            found == if here { Found::Memory(backing.0) } else { Found::Absent }
                        }
                    };
                    if !is_right && first.is_ok() {
                        first = differs!(
                            "the stage 2 of VM {handle:#x} has {found:?} at frames {part:#x?} ({}), which are {frame:?}",
                            if shared { "shared" } else { "private" },
                        );
                    }
                }
            });
        }
        first?;
        let poisoned = self.state.look(vm, frames).filter(|(_, frame)| vm.is_alive() && *frame == Frame::Poisoned);
        for (part, frame) in poisoned {
            if let Some((lacking, _)) = poison.parts(part).find(|(_, poison)| poison.is_none()) {
                return differs!("VM {handle:#x} has nothing at frames {lacking:#x?}, which are {frame:?}");
            }
        }
        Ok(())
    }

    /// Calls `f` with the parts of `pages` that are in one state, up to the first failure.
    fn in_parts(
        &self,
        pages: Range<u64>,
        f: impl Fn(Range<u64>, Option<Page>) -> Result<(), Difference>,
    ) -> Result<(), Difference> {
        self.state.pages.parts(pages).try_for_each(|(part, page)| f(part, page))
    }
}

/// Returns how the ownership table has a page in this state.
fn as_real(real: &dyn Real, page: Page) -> Page {
    let named = |Place { vm, frame }| Place { vm: real.slot(vm), frame };
    match page {
        Page::Lent(place) => Page::Lent(named(place)),
        Page::Private(place) => Page::Private(named(place)),
        Page::Pinned(place) => Page::Pinned(named(place)),
        Page::Offered(place) => Page::Offered(named(place)),
        Page::Claimed(place) => Page::Claimed(named(place)),
        other => other,
    }
}

/// Returns `ranges` with what lies around them, each page once, in ascending order.
fn surroundings(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let around = |range: Range<u64>| range.start / AROUND * AROUND..range.end.next_multiple_of(AROUND);
    let mut around: Vec<_> = ranges.map(around).collect();
    around.sort_unstable_by_key(|range| range.start);
    let mut joined = Vec::<Range<u64>>::new();
    for range in around {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}
