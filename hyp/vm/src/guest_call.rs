//! pKVM's hypercalls for its guests: HVC with the numbers and results that Linux and Android know
//! (Linux, Documentation/virt/kvm/arm/hypercalls.rst; Android adds ranges and relinquishing).

use ravelin_abi::{MAX_RANGE_PAGES, VmKind};
use ravelin_memory::{IpaRange, PAGE_SIZE};
use ravelin_ownership::GuestPage;

use crate::{
    Context, RingCall,
    guest::{self, Guest, Outcome},
    transitions::{GuestFailure, Transitions},
};

const UID: u32 = 0x8600_ff01;
const FEATURES: u32 = 0x8600_0000;
const HYP_MEMINFO: u32 = 0xc600_0002;
const MEM_SHARE: u32 = 0xc600_0003;
const MEM_UNSHARE: u32 = 0xc600_0004;
const MMIO_GUARD: u32 = 0xc600_0007;
const MEM_RELINQUISH: u32 = 0xc600_0009;
const MEM_RING: u32 = 0xc600_0038;
const MEM_RING_SYNC: u32 = 0xc600_0039;

/// UUID 28b46fb6-2ec5-11e9-a9ca-4b564d003a74, by which guests know KVM's interface.
const KVM_UID: [u64; 4] = [0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d];

/// Bit n stands for function n: FEATURES alone.
const ORDINARY_FEATURES: u64 = 1;

/// FEATURES, HYP_MEMINFO, MEM_SHARE, MEM_UNSHARE, MMIO_GUARD, MEM_RELINQUISH, MEM_RING, MEM_RING_SYNC.
const PROTECTED_FEATURES: u64 = 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 9 | 1 << 56 | 1 << 57;

/// In x1 after HYP_MEMINFO: the calls take a number of pages in x2, and return in x1 how many are done.
const HAS_RANGE: u64 = 1;

pub(crate) const SUCCESS: u64 = 0;

/// SMCCC_RET_INVALID_PARAMETER, -3.
pub(crate) const INVALID_PARAMETER: u64 = u64::MAX - 2;

/// What most calls of pKVM guests are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Common {
    /// One whose results are always the same. They are in the registers.
    Answered,
    /// One that shares.
    Share,
    /// One that unshares.
    Unshare,
}

/// Returns which of these a call is, if it is one of them.
#[inline]
pub(crate) fn common(kind: VmKind, context: &mut Context) -> Option<Common> {
    if kind != VmKind::Pkvm {
        return None;
    }
    let [_, x1, x2, x3, ..] = context.x;
    let function = guest::function(context);
    // One comparison, which stays the first one. Arrays would be compared byte by byte, which takes longer than the call.
    if u64::from(function ^ HYP_MEMINFO) | x1 | x2 | x3 == 0 {
        context.set_results([PAGE_SIZE, HAS_RANGE, 0, 0]);
        return Some(Common::Answered);
    }
    match function {
        MEM_SHARE => Some(Common::Share),
        MEM_UNSHARE => Some(Common::Unshare),
        _ => None,
    }
}

/// Performs a call to share or to unshare if that is possible with few instructions, as it is for most. Returns the pages; if it has
/// not, [`call`] does.
#[inline(always)]
pub(crate) fn exchange<T: Transitions>(
    transitions: &T,
    guest: &Guest<T::Guest>,
    context: &mut Context,
    share: bool,
) -> Option<IpaRange> {
    let range = pages_of(guest, context)?;
    if !transitions.exchange(&guest.memory, range, share) {
        return None;
    }
    accept_pages(context, range.pages());
    Some(range)
}

/// Performs a guest's call, if it is one of those that its kind of VM has and that [`common()`] does not answer. `None` if not:
/// then it is another interface's, or not supported.
///
/// A call without a number of pages is for one page, and zeroes x1. A range is done in part if it is long: x1 says how many
/// pages, and the guest calls again for the others.
#[inline(always)]
pub(crate) fn call<T: Transitions>(transitions: &T, guest: &Guest<T::Guest>, context: &mut Context) -> Option<Outcome> {
    let features = match guest.kind() {
        VmKind::Ordinary => ORDINARY_FEATURES,
        VmKind::Pkvm => PROTECTED_FEATURES,
        VmKind::Realm => return None,
    };
    let [_, address, second, third, ..] = context.x;
    match guest::function(context) {
        UID => context.set_results(KVM_UID),
        // 32 bits in each register.
        FEATURES => context.set_results([features & u64::from(u32::MAX), features >> 32, 0, 0]),
        _ if features == ORDINARY_FEATURES => return None,
        HYP_MEMINFO => refuse(context),
        MMIO_GUARD => {
            let guarded = second | third == 0 && guard(transitions, guest, address);
            context.set_results([if guarded { SUCCESS } else { INVALID_PARAMETER }, 0, 0, 0]);
        }
        MEM_SHARE => {
            return Some(perform(guest, context, Outcome::Shared, |range| transitions.share(&guest.memory, range)));
        }
        MEM_UNSHARE => {
            let done = |_| Outcome::Done;
            return Some(perform(guest, context, done, |range| transitions.unshare(&guest.memory, range)));
        }
        MEM_RELINQUISH => {
            let relinquish = |range| transitions.relinquish(&guest.memory, range);
            return Some(perform(guest, context, Outcome::Relinquished, relinquish));
        }
        MEM_RING => match (guest.range(address, 1), second, third) {
            (Some(page), 1, 0) => return Some(Outcome::Ring(RingCall::Attach(page.base()))),
            (Some(page), 0, 0) => return Some(Outcome::Ring(RingCall::Detach(page.base()))),
            _ => refuse(context),
        },
        MEM_RING_SYNC if address | second | third == 0 => return Some(Outcome::Ring(RingCall::Sync)),
        MEM_RING_SYNC => refuse(context),
        _ => return None,
    }
    Some(Outcome::Done)
}

/// Tells the guest that the host does not release what it wants back, or that another call of this interface has failed.
pub fn refuse(context: &mut Context) {
    context.set_results([INVALID_PARAMETER, 0, 0, 0]);
}

/// Tells the guest that it is done, if nothing else is to be told.
pub(crate) fn accept(context: &mut Context) {
    context.set_results([SUCCESS, 0, 0, 0]);
}

/// Returns the pages that a call names, if its registers are in order.
#[inline(always)]
fn pages_of<G>(guest: &Guest<G>, context: &Context) -> Option<IpaRange> {
    let [_, base, count, reserved, ..] = context.x;
    let pages = if count == 0 { 1 } else { count };
    if reserved != 0 || pages > MAX_RANGE_PAGES {
        return None;
    }
    let range = guest.range(base, pages)?;
    if guest.named.overlaps(&range) { None } else { Some(range) }
}

/// Tells the guest that so many pages are done.
#[inline(always)]
fn accept_pages(context: &mut Context, done: u64) {
    let [_, _, count, ..] = context.x;
    context.set_results([SUCCESS, if count == 0 { 0 } else { done }, 0, 0]);
}

/// Takes a step that the registers ask for. Out of line, so that the other calls do not pay for its registers.
#[inline(never)]
fn perform<G>(
    guest: &Guest<G>,
    context: &mut Context,
    outcome: impl FnOnce(IpaRange) -> Outcome,
    step: impl FnOnce(IpaRange) -> Result<u64, GuestFailure>,
) -> Outcome {
    let Some(range) = pages_of(guest, context) else {
        refuse(context);
        return Outcome::Done;
    };
    match step(range) {
        Ok(done) => {
            accept_pages(context, done);
            IpaRange::new(range.base().raw(), done).map_or(Outcome::Done, outcome)
        }
        Err(GuestFailure::Absent(frame)) => Outcome::PageFault(frame),
        Err(GuestFailure::Claimed(claimed)) => Outcome::Unshare(claimed),
        Err(GuestFailure::NeedsTables(pages)) => Outcome::NeedsTables(pages),
        Err(GuestFailure::Refused) => {
            refuse(context);
            Outcome::Done
        }
    }
}

/// Notes that a page is a device's. Returns whether it can be one.
fn guard<T: Transitions>(transitions: &T, guest: &Guest<T::Guest>, address: u64) -> bool {
    let Some(page) = guest.range(address, 1) else {
        return false;
    };
    let (GuestPage::Absent, _) = transitions.look(&guest.memory, page) else {
        return false;
    };
    guest.named.add(page)
}

#[cfg(test)]
mod tests;
