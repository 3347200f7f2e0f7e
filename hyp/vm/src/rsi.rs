//! The Realm Services Interface 1.0 (Arm DEN0137), by SMC, on the transitions of protected guests.
//!
//! The top bit of a guest address is set in those of devices and of shared memory. A page has both addresses; which one
//! the guest can use changes with IPA_STATE_SET. Other than in CCA, its contents do not.

use ravelin_abi::VmKind;
use ravelin_memory::{Ipa, IpaRange, PAGE_SHIFT, PAGE_SIZE};
use ravelin_ownership::GuestPage;

use crate::{
    Context,
    guest::{self, Guest, Outcome},
    measurement::Digest,
    transitions::{GuestFailure, Transitions},
};

const ABI_VERSION: u32 = 0xc400_0190;
const FEATURES: u32 = 0xc400_0191;
const MEASUREMENT_READ: u32 = 0xc400_0192;
const MEASUREMENT_EXTEND: u32 = 0xc400_0193;
const REALM_CONFIG: u32 = 0xc400_0196;
const IPA_STATE_SET: u32 = 0xc400_0197;
const IPA_STATE_GET: u32 = 0xc400_0198;
const HOST_CALL: u32 = 0xc400_0199;

/// Version 1.0, the only one.
const VERSION_1_0: u64 = 1 << 16;

const SUCCESS: u64 = 0;
const ERROR_INPUT: u64 = 1;

/// RIPAS: shared with the host, or nothing there.
const EMPTY: u64 = 0;
/// RIPAS: the guest's alone.
const RAM: u64 = 1;
/// RIPAS: taken by force.
const DESTROYED: u64 = 2;

/// What IPA_STATE_SET returns in x2.
const ACCEPT: u64 = 0;
const REJECT: u64 = 1;

/// In the realm's configuration: measurements are SHA-256.
const SHA_256: u8 = 0;

/// Bytes of the registers that hold a measurement.
const MEASUREMENT_SIZE: usize = 64;

/// Size and alignment of what HOST_CALL points to: the immediate in the first 8 bytes, then 31 registers.
const HOST_CALL_SIZE: usize = 256;

/// x0 to x30 of a HOST_CALL, in little-endian order.
pub type HostCallRegisters = [u8; HOST_CALL_SIZE - 8];

/// Performs a call whose results are always the same, if it is one. Returns whether it is.
#[inline]
pub(crate) fn answer(kind: VmKind, context: &mut Context) -> bool {
    let [_, version, ..] = context.x;
    let is_answered = kind == VmKind::Realm && guest::function(context) == ABI_VERSION;
    if is_answered {
        let status = if version == VERSION_1_0 { SUCCESS } else { ERROR_INPUT };
        context.set_results([status, VERSION_1_0, VERSION_1_0]);
    }
    is_answered
}

/// Performs a realm's call, if it is one of this interface that `answer` does not perform. `None` if not: then it is another
/// interface's, or not supported, as the calls are that ask for an attestation token.
///
/// With [`Outcome::HostCall`], `send` has been given x0 to x30 as the realm wants its host to see them, in little-endian order.
#[inline(never)]
pub fn call<T: Transitions>(
    transitions: &T,
    guest: &Guest<T::Guest>,
    context: &mut Context,
    send: impl FnOnce(&HostCallRegisters),
) -> Option<Outcome> {
    if guest.kind() != VmKind::Realm {
        return None;
    }
    let [_, x1, x2, x3, ..] = context.x;
    match guest::function(context) {
        FEATURES => context.set_results([SUCCESS, 0]),
        MEASUREMENT_READ => match guest.measurements.lock().get(x1) {
            Some(digest) => set_measurement(context, &digest),
            None => fail(context),
        },
        MEASUREMENT_EXTEND => {
            let extended = extend(guest, context);
            context.set_results([if extended { SUCCESS } else { ERROR_INPUT }]);
        }
        REALM_CONFIG => return Some(write_config(transitions, guest, context)),
        IPA_STATE_SET => {
            return Some(match (bounds(guest, x1, x2), x3) {
                (Some(range), EMPTY) => share(transitions, guest, context, range),
                (Some(range), RAM) => {
                    set_state(context, range, transitions.unshare(&guest.memory, range), |memory| {
                        // Without room the realm takes pages that are not there yet for a device's if it asks.
                        guest.named.add(memory);
                        Outcome::Done
                    })
                }
                _ => failed(context),
            });
        }
        IPA_STATE_GET => match bounds(guest, x1, x2) {
            Some(range) => {
                let (frame, frames) = transitions.look(&guest.memory, range);
                let (state, same) = match frame {
                    // Memory if the realm has said so. Linux takes what is not empty for its own, and devices are not.
                    GuestPage::Absent => match guest.named.look(&range) {
                        (true, same) => (RAM, same),
                        (false, same) => (EMPTY, same),
                    },
                    GuestPage::Private | GuestPage::Lent => (RAM, frames),
                    GuestPage::Offered | GuestPage::Claimed => (EMPTY, frames),
                    GuestPage::Poisoned => (DESTROYED, frames),
                };
                context.set_results([SUCCESS, address_after(range, frames.min(same)), state]);
            }
            None => fail(context),
        },
        HOST_CALL => return Some(host_call(transitions, guest, context, send)),
        _ => return None,
    }
    Some(Outcome::Done)
}

/// Tells the realm that the host does not do what its call needs. Nothing has changed. Of IPA_STATE_SET that is a result of
/// its own; the other calls fail.
pub fn refuse(context: &mut Context) {
    let [_, base, ..] = context.x;
    match guest::function(context) {
        IPA_STATE_SET => context.set_results([SUCCESS, base, REJECT]),
        _ => fail(context),
    }
}

/// Ends a HOST_CALL with the registers that the host has sent. The outcome is as that of the call.
pub fn complete_host_call<T: Transitions>(
    transitions: &T,
    guest: &Guest<T::Guest>,
    context: &mut Context,
    registers: &HostCallRegisters,
) -> Outcome {
    let Some(at) = host_call_address(guest, context).and_then(|at| at.checked_add(8)) else {
        return failed(context);
    };
    match transitions.write_guest(&guest.memory, at, registers) {
        Ok(()) => {
            context.set_results([SUCCESS]);
            Outcome::Done
        }
        Err(failure) => not_private(context, failure),
    }
}

fn fail(context: &mut Context) {
    context.set_results([ERROR_INPUT]);
}

fn failed(context: &mut Context) -> Outcome {
    fail(context);
    Outcome::Done
}

/// Ends a call that names a page that is not private.
fn not_private(context: &mut Context, failure: GuestFailure) -> Outcome {
    match failure {
        GuestFailure::Absent(frame) => Outcome::PageFault(frame),
        GuestFailure::Claimed(_) | GuestFailure::NeedsTables(_) | GuestFailure::Refused => failed(context),
    }
}

/// Returns the range of the realm's memory from `base` to `top`.
fn bounds<G>(guest: &Guest<G>, base: u64, top: u64) -> Option<IpaRange> {
    guest.range(base, IpaRange::from_bounds(base, top).ok()?.pages())
}

/// Returns the address of the page behind the first `pages` of a range.
fn address_after(range: IpaRange, pages: u64) -> u64 {
    range.base().raw().saturating_add(pages.min(range.pages()) << PAGE_SHIFT)
}

/// Ends an IPA_STATE_SET for a range, of which `done` pages have changed.
fn set_state(
    context: &mut Context,
    range: IpaRange,
    done: Result<u64, GuestFailure>,
    outcome: impl FnOnce(IpaRange) -> Outcome,
) -> Outcome {
    match done {
        Ok(done) => {
            context.set_results([SUCCESS, address_after(range, done), ACCEPT]);
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

/// Makes a range EMPTY. What is shared already stays so, which the host need not hear of.
fn share<T: Transitions>(transitions: &T, guest: &Guest<T::Guest>, context: &mut Context, range: IpaRange) -> Outcome {
    let mut done = transitions.share(&guest.memory, range);
    if done == Err(GuestFailure::Refused) {
        match transitions.look(&guest.memory, range) {
            (GuestPage::Offered | GuestPage::Claimed, pages) => {
                return set_state(context, range, Ok(pages), |_| Outcome::Done);
            }
            (_, pages) => {
                let first = IpaRange::new(range.base().raw(), pages.min(range.pages())).unwrap_or(range);
                done = transitions.share(&guest.memory, first);
            }
        }
    }
    set_state(context, range, done, Outcome::Shared)
}

/// Returns a measurement in x1 to x8.
#[inline(never)]
fn set_measurement(context: &mut Context, digest: &Digest) {
    let mut results = [0; 1 + MEASUREMENT_SIZE / 8];
    for (result, word) in results.iter_mut().skip(1).zip(digest.as_chunks().0) {
        *result = u64::from_le_bytes(*word);
    }
    context.set_results(results);
}

/// Extends measurement x1 by x2 bytes of x3 to x10. Returns whether it can be.
#[inline(never)]
fn extend<G>(guest: &Guest<G>, context: &Context) -> bool {
    let [_, index, size, values @ ..] = &context.x;
    let mut bytes = [0; MEASUREMENT_SIZE];
    for (chunk, value) in bytes.chunks_exact_mut(8).zip(values) {
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    let data = usize::try_from(*size).ok().and_then(|size| bytes.get(..size));
    data.is_some_and(|data| guest.measurements.lock().extend(*index, data))
}

/// Writes the configuration to the page that x1 points to.
#[inline(never)]
fn write_config<T: Transitions>(transitions: &T, guest: &Guest<T::Guest>, context: &mut Context) -> Outcome {
    let [_, address, ..] = context.x;
    let Some(page) = guest.range(address, 1) else {
        return failed(context);
    };
    let mut config = [0_u8; 9];
    if let Some((bits, hash)) = config.split_at_mut_checked(8) {
        bits.copy_from_slice(&guest.attributes.ipa_bits.to_le_bytes());
        hash.copy_from_slice(&[SHA_256]);
    }
    // The rest of the page is zero, which takes few bytes of stack at a time.
    let zeroes = [0_u8; 256];
    let rest = (0..PAGE_SIZE).step_by(zeroes.len()).filter_map(|offset| page.base().checked_add(offset));
    let mut writes = rest.map(|at| (at, &zeroes[..])).chain([(page.base(), &config[..])]);
    match writes.try_for_each(|(at, bytes)| transitions.write_guest(&guest.memory, at, bytes)) {
        Ok(()) => {
            context.set_results([SUCCESS]);
            Outcome::Done
        }
        Err(failure) => not_private(context, failure),
    }
}

/// Returns what x1 points to.
fn host_call_address<G>(guest: &Guest<G>, context: &Context) -> Option<Ipa> {
    let [_, address, ..] = context.x;
    let at = Ipa::new(address).filter(|at| u64::try_from(HOST_CALL_SIZE).is_ok_and(|size| at.is_aligned(size)))?;
    guest.range(at.page().raw(), 1)?;
    Some(at)
}

#[inline(never)]
fn host_call<T: Transitions>(
    transitions: &T,
    guest: &Guest<T::Guest>,
    context: &mut Context,
    send: impl FnOnce(&HostCallRegisters),
) -> Outcome {
    let Some(at) = host_call_address(guest, context) else {
        return failed(context);
    };
    let mut bytes = [0; HOST_CALL_SIZE];
    if let Err(failure) = transitions.read_guest(&guest.memory, at, &mut bytes) {
        return not_private(context, failure);
    }
    let Some(([low, high, ..], registers)) =
        bytes.split_first_chunk::<8>().and_then(|(immediate, rest)| Some((immediate, rest.first_chunk()?)))
    else {
        return failed(context);
    };
    send(registers);
    Outcome::HostCall { immediate: u16::from_le_bytes([*low, *high]) }
}

#[cfg(test)]
mod tests;
