//! The ring of a vCPU: a page in which a pKVM guest posts conversions. They are made in a batch when the vCPU is left for its
//! host, which is told of them with that exit, so that a conversion takes no exit of its own.
//!
//! The page is the guest's, and pinned: the hypervisor reads there and the host does not. What has been read once is kept here,
//! because other vCPUs may change the page at any time.

use core::mem::offset_of;

use ravelin_abi::{
    ConversionRequest, MAX_CONVERSION_PAGES, MAX_CONVERSIONS, RING_DONE, RING_ENTRIES, RING_POSTED, RING_RESULTS,
    RUN_QUIET_SHARES, RunEntry, RunPage,
};
use ravelin_memory::{Ipa, PhysAddr};
use ravelin_ownership::{Batch, Conversion, MAX_BATCH, MAX_STEPS};

use crate::{
    GuestCpu, GuestFailure, PageAccess, Transitions,
    guest::Guest,
    guest_call::{INVALID_PARAMETER, SUCCESS},
};

// A bit of a word for each, and none is done in part.
const _: () = assert!(MAX_CONVERSIONS == MAX_BATCH && MAX_CONVERSIONS == 64 && MAX_CONVERSION_PAGES <= MAX_STEPS);

/// What a guest calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingCall {
    /// This page is to be the ring of the vCPU.
    Attach(Ipa),
    /// This page, its ring, is to be an ordinary one again.
    Detach(Ipa),
    /// What it has posted is to be done now.
    Sync,
}

/// The ring of a vCPU, or none.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    /// Its address for the guest, and where EL2 maps it.
    page: Option<(Ipa, PhysAddr)>,
    /// How many conversions are complete.
    done: u64,
    /// Those behind, as they were posted; so many of them have been looked at.
    words: [u64; MAX_CONVERSIONS],
    seen: usize,
    /// Of these, those that the host has been told of: bit n for the nth one.
    told: u64,
    /// Of these, those that wait for the host's consent.
    waiting: u64,
}

// By hand, because arrays of so many have no default.
impl Default for Ring {
    fn default() -> Self {
        Self { page: None, done: 0, words: [0; MAX_CONVERSIONS], seen: 0, told: 0, waiting: 0 }
    }
}

impl Ring {
    /// Makes a page of the guest its ring.
    pub(crate) fn attach<T: Transitions>(
        &mut self,
        transitions: &T,
        cpu: &impl PageAccess,
        guest: &Guest<T::Guest>,
        page: Ipa,
    ) -> Result<(), GuestFailure> {
        if self.page.is_some() {
            return Err(GuestFailure::Refused);
        }
        let at = transitions.pin_page(&guest.memory, page)?;
        *self = Self { page: Some((page, at)), ..Self::default() };
        write(cpu, at, RING_DONE, 0, 0);
        Ok(())
    }

    /// Makes its page an ordinary one again, if there is one, and it is `page` or that does not matter. Returns which one that is.
    pub(crate) fn detach<T: Transitions>(
        &mut self,
        transitions: &T,
        guest: &Guest<T::Guest>,
        page: Option<Ipa>,
    ) -> Option<Ipa> {
        let (its, _) = self.page.filter(|&(its, _)| page.is_none_or(|page| page == its))?;
        transitions.unpin_page(&guest.memory, its);
        *self = Self::default();
        Some(its)
    }

    /// Makes conversions that have been posted, unless the host has yet to answer to earlier ones. Writes those that the host has
    /// to know of to its run page, and returns how many there are in it.
    #[inline]
    pub(crate) fn apply<T: Transitions, C: GuestCpu>(
        &mut self,
        transitions: &T,
        cpu: &C,
        guest: &Guest<T::Guest>,
        run_page: PhysAddr,
    ) -> u64 {
        // Most vCPUs have none.
        self.page.map_or(0, |(_, page)| self.apply_posted(transitions, cpu, guest, run_page, page))
    }

    #[inline(never)]
    fn apply_posted<T: Transitions, C: GuestCpu>(
        &mut self,
        transitions: &T,
        cpu: &C,
        guest: &Guest<T::Guest>,
        run_page: PhysAddr,
        page: PhysAddr,
    ) -> u64 {
        if self.told != 0 {
            return self.told.count_ones().into();
        }
        // A number that cannot be is the guest's mistake. Nothing happens until it is right.
        let posted = read(cpu, page, RING_POSTED, 0).wrapping_sub(self.done);
        let Some(count) = usize::try_from(posted).ok().filter(|count| (1..=MAX_CONVERSIONS).contains(count)) else {
            return 0;
        };
        let done = self.done;
        let mut words = (0..).zip(&mut self.words).take(count).map(|(index, word)| {
            *word = read(cpu, page, RING_ENTRIES, done.wrapping_add(index));
            conversion(guest, *word, false)
        });
        let batch = transitions.convert(&guest.memory, &mut words);
        self.seen = batch.seen;
        self.waiting = batch.claimed;
        let quiet = is_quiet(cpu, run_page);
        let mut records = 0;
        for (index, bit, &word) in bits(&self.words).take(batch.seen) {
            if batch.claimed & bit == 0 {
                write(cpu, page, RING_RESULTS, done.wrapping_add(index), result(batch.done & bit));
            }
            let share = ConversionRequest::from_word(word).is_some_and(|wanted| !wanted.unshare);
            if batch.claimed & bit != 0 || share && !quiet && batch.done & bit != 0 {
                self.told |= bit;
                write(cpu, run_page, RunPage::CONVERSIONS, records, word);
                records = records.saturating_add(1);
            }
        }
        let all = bits(&self.words).map(|(_, bit, &word)| (bit, conversion(guest, word, false)));
        note(transitions, cpu, guest, all, batch);
        if self.waiting == 0 {
            self.complete(cpu, page);
        }
        records
    }

    /// Ends the conversions that the host had to consent to, before the guest goes on. Bit n of what `released` returns says that
    /// it does to the nth one that it was told of.
    #[inline]
    pub(crate) fn resume<T: Transitions, C: GuestCpu>(
        &mut self,
        transitions: &T,
        cpu: &C,
        guest: &Guest<T::Guest>,
        released: impl FnOnce() -> u64,
    ) {
        if self.told != 0 {
            self.resume_told(transitions, cpu, guest, released);
        }
    }

    #[inline(never)]
    fn resume_told<T: Transitions, C: GuestCpu>(
        &mut self,
        transitions: &T,
        cpu: &C,
        guest: &Guest<T::Guest>,
        released: impl FnOnce() -> u64,
    ) {
        let told = core::mem::take(&mut self.told);
        if self.waiting == 0 {
            return;
        }
        let (Some((_, page)), released) = (self.page, released()) else { return };
        // Each turn looks at one at least.
        while self.waiting != 0 {
            let waiting = self.waiting;
            let left = bits(&self.words).filter(|&(_, bit, _)| waiting & bit != 0).map(|(index, bit, &word)| {
                let record = (told & bit.wrapping_sub(1)).count_ones();
                let consents = released.checked_shr(record).is_some_and(|released| released & 1 != 0);
                (index, bit, conversion(guest, word, consents))
            });
            let batch = transitions.convert(&guest.memory, &mut left.clone().map(|(_, _, wanted)| wanted));
            if batch.seen == 0 {
                break;
            }
            for ((_, bit, _), (index, own, _)) in bits(&self.words).zip(left.clone()).take(batch.seen) {
                write(cpu, page, RING_RESULTS, self.done.wrapping_add(index), result(batch.done & bit));
                self.waiting &= !own;
            }
            let all = bits(&self.words).zip(left).map(|((_, bit, _), (.., wanted))| (bit, wanted));
            note(transitions, cpu, guest, all, batch);
        }
        self.waiting = 0;
        self.complete(cpu, page);
    }

    /// Tells the guest that all that have been looked at are complete.
    fn complete(&mut self, cpu: &impl PageAccess, page: PhysAddr) {
        let seen = u64::try_from(core::mem::take(&mut self.seen)).unwrap_or(0);
        self.done = self.done.wrapping_add(seen);
        write(cpu, page, RING_DONE, 0, self.done);
    }
}

/// Returns whether the host has said in its run page that it need not be told of shares.
#[inline]
pub(crate) fn is_quiet(cpu: &impl PageAccess, run_page: PhysAddr) -> bool {
    read(cpu, run_page, RunPage::ENTRY.wrapping_add(offset_of!(RunEntry, flags)), 0) & RUN_QUIET_SHARES != 0
}

/// Tells the CPU what has become of conversions, each of which has the bit of its place in the batch.
fn note<T: Transitions, C: GuestCpu>(
    transitions: &T,
    cpu: &C,
    guest: &Guest<T::Guest>,
    conversions: impl Iterator<Item = (u64, Option<Conversion>)>,
    batch: Batch,
) {
    let tree = transitions.tree(&guest.memory).vttbr;
    let seen = conversions.take(batch.seen);
    cpu.note_conversions(tree, seen.filter_map(|(bit, wanted)| Some((wanted?, batch.done & bit != 0))));
}

/// Returns what a word asks for, if that is the guest's to ask for.
fn conversion<G>(guest: &Guest<G>, word: u64, released: bool) -> Option<Conversion> {
    let ConversionRequest { address, pages, unshare } = ConversionRequest::from_word(word)?;
    let range = guest.range(address, pages).filter(|range| !guest.named.overlaps(range))?;
    Some(Conversion { range, share: !unshare, released })
}

/// Yields index, bit and word of each.
fn bits(words: &[u64; MAX_CONVERSIONS]) -> impl Iterator<Item = (u64, u64, &u64)> + Clone {
    (0..).zip(words).map(|(index, word)| (index, 1_u64.wrapping_shl(u32::try_from(index).unwrap_or(0)), word))
}

/// Returns the result of a conversion.
const fn result(done: u64) -> u64 {
    if done != 0 { SUCCESS } else { INVALID_PARAMETER }
}

/// Returns where word `number`, modulo their number, of a list is.
fn place(page: PhysAddr, offset: usize, number: u64) -> Option<PhysAddr> {
    let last = u64::try_from(MAX_CONVERSIONS).ok()?.wrapping_sub(1);
    page.checked_add(u64::try_from(offset).ok()?.wrapping_add((number & last).wrapping_mul(8)))
}

#[inline]
fn read(cpu: &impl PageAccess, page: PhysAddr, offset: usize, number: u64) -> u64 {
    let [word] = place(page, offset, number).map_or([0], |at| cpu.read_words(at));
    word
}

fn write(cpu: &impl PageAccess, page: PhysAddr, offset: usize, number: u64, word: u64) {
    if let Some(at) = place(page, offset, number) {
        cpu.write_words(at, &[word]);
    }
}
