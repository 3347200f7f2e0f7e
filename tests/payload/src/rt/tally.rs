//! Counts of calls by how they ended.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use ravelin_abi::{CALLS, Status};
use ravelin_guest::playground;

const CALL_ROWS: usize = CALLS.len() + 1;
const GUEST_ROWS: usize = playground::CALLS.len();
const OUTCOMES: usize = playground::OUTCOMES.len();

/// HVCs of the host: a row for each call of the table, and one for all that is no call.
static HOST: [[AtomicU64; Status::ALL.len()]; CALL_ROWS] =
    [const { [const { AtomicU64::new(0) }; Status::ALL.len()] }; CALL_ROWS];

/// What guests that do things at random have done.
static GUEST: [[AtomicU64; OUTCOMES]; GUEST_ROWS] = [const { [const { AtomicU64::new(0) }; OUTCOMES] }; GUEST_ROWS];

/// Counts an HVC of the host; `function` is `None` if its immediate made it none of the table.
pub(crate) fn count(function: Option<u64>, x0: u64) {
    let index = function.and_then(|function| CALLS.iter().position(|call| u64::from(call.number) == function));
    let has_status = index.is_none_or(|index| CALLS[index].results.first() == Some(&"status"));
    let status = if has_status { x0.cast_signed().unsigned_abs() as usize } else { 0 };
    if let Some(count) = HOST[index.unwrap_or(CALLS.len())].get(status) {
        count.fetch_add(1, Relaxed);
    }
}

/// Adds what a guest says in word `index` of its tally.
pub(crate) fn add_of_guest(index: usize, count: u64) {
    if let Some(sum) = GUEST.as_flattened().get(index) {
        sum.fetch_add(count, Relaxed);
    }
}

/// Whether a call has been made, by its place in the table.
pub(crate) fn has_call(index: usize) -> bool {
    HOST[index].iter().any(|count| count.load(Relaxed) != 0)
}

/// How many hypercalls host and guests have made.
pub(crate) fn total() -> u64 {
    let calls_of_guests = &GUEST[..GUEST_ROWS - playground::ACCESSES];
    HOST.as_flattened().iter().chain(calls_of_guests.as_flattened()).map(|count| count.load(Relaxed)).sum()
}

/// Calls `f` with each call and result that there has been, and how often.
pub(crate) fn for_each(mut f: impl FnMut(&str, &str, u64)) {
    let names = CALLS.iter().map(|call| call.name).chain(["UNKNOWN"]);
    let host = names
        .zip(&HOST)
        .flat_map(|(name, row)| Status::ALL.iter().zip(row).map(move |(status, count)| (name, status.name(), count)));
    let guest = playground::CALLS.iter().zip(&GUEST).flat_map(|(&(name, _), row)| {
        playground::OUTCOMES.iter().zip(row).map(move |(&outcome, count)| (name, outcome, count))
    });
    for (call, result, count) in host.chain(guest) {
        let count = count.load(Relaxed);
        if count != 0 {
            f(call, result, count);
        }
    }
}

/// Forgets all of it.
pub(crate) fn clear() {
    HOST.as_flattened().iter().chain(GUEST.as_flattened()).for_each(|count| count.store(0, Relaxed));
}
