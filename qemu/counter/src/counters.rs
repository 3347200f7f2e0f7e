//! Where each counter lies in a CPU's scoreboard, and what it is called in the report.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::decode::{BARRIERS, Operation, TLBI};

/// Exception levels.
pub(crate) const LEVELS: usize = 4;
/// Counters of one exception level: instructions, loads, stores, then what [`Operation`] distinguishes.
const PER_LEVEL: usize = 3 + BARRIERS.len() + TLBI.len();
/// Counters of entries into EL2 by vector.
const VECTORS: usize = LEVELS * PER_LEVEL;
/// Counters of entries into EL2 from below by exception class.
const CLASSES: usize = VECTORS + 16;
/// Counters of one CPU.
pub(crate) const COUNTERS: usize = CLASSES + 64;

/// Counts instructions executed at exception level `level`, at most 3.
pub(crate) fn instructions(level: usize) -> usize {
    level * PER_LEVEL
}

/// Counts loads at `level`.
pub(crate) fn loads(level: usize) -> usize {
    instructions(level) + 1
}

/// Counts stores at `level`.
pub(crate) fn stores(level: usize) -> usize {
    instructions(level) + 2
}

/// Counts instructions of this kind at `level`; marks are not counted.
pub(crate) fn operation(level: usize, operation: Operation) -> Option<usize> {
    match operation {
        Operation::Mark(_) => None,
        Operation::Barrier(index) => Some(instructions(level) + 3 + index),
        Operation::Tlbi(index) => Some(instructions(level) + 3 + BARRIERS.len() + index),
    }
}

/// Counts entries into EL2 through vector `slot`, at most 15.
pub(crate) fn vector(slot: usize) -> usize {
    VECTORS + slot
}

/// Counts entries into EL2 from below with this exception class, at most 63.
pub(crate) fn class(class: usize) -> usize {
    CLASSES + class
}

/// All counters of one CPU, or of all of them, at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// By counter; missing ones are zero.
    pub(crate) counters: Vec<u64>,
    /// HVC and SMC calls taken to EL2, by the low half of x0.
    pub(crate) calls: BTreeMap<u32, u64>,
}

impl Counts {
    /// Adds `other`, counter by counter.
    pub(crate) fn add(&mut self, other: &Self) {
        self.counters.resize(COUNTERS, 0);
        for (sum, value) in self.counters.iter_mut().zip(&other.counters) {
            *sum += value;
        }
        for (call, value) in &other.calls {
            *self.calls.entry(*call).or_default() += value;
        }
    }

    /// What was counted between `earlier` and `self`.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let before = earlier.counters.iter().chain(std::iter::repeat(&0));
        Self {
            counters: self.counters.iter().zip(before).map(|(now, before)| now - before).collect(),
            calls: self.calls.iter().map(|(call, now)| (*call, now - earlier.calls.get(call).unwrap_or(&0))).collect(),
        }
    }

    /// The counters that are not zero, each as ` KEY=VALUE`.
    pub(crate) fn report(&self) -> String {
        let mut line = String::new();
        for (index, value) in self.counters.iter().enumerate().filter(|(_, value)| **value != 0) {
            let _ = write!(line, " {}={value}", name(index));
        }
        for (call, value) in self.calls.iter().filter(|(_, value)| **value != 0) {
            let _ = write!(line, " call.{call:#010x}={value}");
        }
        line
    }
}

/// The key of counter `index` in the report.
fn name(index: usize) -> String {
    const ORIGINS: [&str; 4] = ["el2_sp0", "el2", "lower64", "lower32"];
    const KINDS: [&str; 4] = ["sync", "irq", "fiq", "serror"];
    if index < VECTORS {
        let level = index / PER_LEVEL;
        match index % PER_LEVEL {
            0 => format!("el{level}.instructions"),
            1 => format!("el{level}.loads"),
            2 => format!("el{level}.stores"),
            kind if kind < 3 + BARRIERS.len() => format!("el{level}.{}", BARRIERS[kind - 3]),
            kind => format!("el{level}.tlbi.{}", TLBI[kind - 3 - BARRIERS.len()].1),
        }
    } else if index < CLASSES {
        let slot = index - VECTORS;
        format!("entry.{}.{}", ORIGINS[slot / 4], KINDS[slot % 4])
    } else {
        format!("class.{:#04x}", index - CLASSES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_counter_has_a_name_of_its_own() {
        let names: BTreeSet<_> = (0..COUNTERS).map(name).collect();
        assert_eq!(names.len(), COUNTERS);
        assert_eq!(name(instructions(2)), "el2.instructions");
        assert_eq!(name(loads(1)), "el1.loads");
        assert_eq!(name(stores(0)), "el0.stores");
        assert_eq!(name(operation(2, Operation::Barrier(1)).unwrap()), "el2.isb");
        assert_eq!(name(operation(3, Operation::Tlbi(TLBI.len() - 1)).unwrap()), "el3.tlbi.other");
        assert_eq!(name(vector(8)), "entry.lower64.sync");
        assert_eq!(name(vector(15)), "entry.lower32.serror");
        assert_eq!(name(class(0x16)), "class.0x16");
    }

    #[test]
    fn difference_and_sum_are_inverse_and_zeroes_are_left_out() {
        let mut earlier = Counts { counters: vec![0; COUNTERS], calls: BTreeMap::from([(1, 2)]) };
        earlier.counters[instructions(2)] = 5;
        let mut later = earlier.clone();
        later.counters[instructions(2)] = 9;
        later.counters[loads(2)] = 1;
        later.calls.insert(0xc600_1000, 3);
        let between = later.since(&earlier);
        assert_eq!(between.report(), " el2.instructions=4 el2.loads=1 call.0xc6001000=3");
        earlier.add(&between);
        assert_eq!(earlier, later);
        assert_eq!(later.since(&Counts::default()), later);
    }
}
