//! Counts for the statistics. They order nothing.

use ravelin_abi::{CALL_COUNTERS, counter_index};
use ravelin_sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A count since boot. Wraps around.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What the hypercall layer counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    calls: [Counter; CALL_COUNTERS],
    pub(crate) smcs_forwarded: Counter,
    pub(crate) smcs_refused: Counter,
}

impl Counters {
    /// Counts a use of the call with this number, if it is one that is counted.
    pub(crate) fn count_call(&self, function: u64) {
        let index = u32::try_from(function).ok().and_then(counter_index);
        if let Some(counter) = index.and_then(|index| self.calls.get(index)) {
            counter.add();
        }
    }

    /// Returns the uses of each call.
    pub(crate) fn calls(&self) -> [u64; CALL_COUNTERS] {
        self.calls.each_ref().map(Counter::get)
    }
}
