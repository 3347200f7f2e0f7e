//! The interrupts that a vCPU has to think of.

use crate::INTIDS;

const WORDS: usize = 16;
const BITS: u16 = 64;

/// Set of INTIDs in which the next one is found without looking at each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub(crate) struct Queue {
    words: [u64; WORDS],
    /// Bit n is set if `words[n]` is not zero.
    summary: u16,
}

impl Queue {
    pub(crate) fn insert(&mut self, intid: u16) {
        if let Some(word) = self.words.get_mut(usize::from(intid / BITS)) {
            *word |= 1 << (intid % BITS);
            self.summary |= 1 << (intid / BITS);
        }
    }

    pub(crate) fn remove(&mut self, intid: u16) {
        if let Some(word) = self.words.get_mut(usize::from(intid / BITS)) {
            *word &= !(1 << (intid % BITS));
            if *word == 0 {
                self.summary &= !(1 << (intid / BITS));
            }
        }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.summary == 0
    }

    /// Returns the lowest INTID in the set that is not below `from`.
    pub(crate) fn next(&self, from: u16) -> Option<u16> {
        if from >= INTIDS {
            return None;
        }
        let here = from / BITS;
        let rest = self.words.get(usize::from(here))? & (u64::MAX << (from % BITS));
        let (index, word) = if rest != 0 {
            (here, rest)
        } else {
            let above = self.summary & u16::MAX.checked_shl(u32::from(here).checked_add(1)?)?;
            if above == 0 {
                return None;
            }
            let index = u16::try_from(above.trailing_zeros()).ok()?;
            (index, *self.words.get(usize::from(index))?)
        };
        index.checked_mul(BITS)?.checked_add(u16::try_from(word.trailing_zeros()).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    use super::*;

    proptest! {
        #![proptest_config(crate::tests::config())]

        #[test]
        #[cfg_attr(miri, ignore = "takes Miri too long")]
        fn behaves_as_a_set(steps in prop::collection::vec((any::<bool>(), 0..INTIDS), 0..300), from in 0_u16..INTIDS) {
            let (mut queue, mut model) = (Queue::default(), BTreeSet::new());
            for (insert, intid) in steps {
                if insert {
                    queue.insert(intid);
                    model.insert(intid);
                } else {
                    queue.remove(intid);
                    model.remove(&intid);
                }
                prop_assert_eq!(queue.is_empty(), model.is_empty());
            }
            prop_assert_eq!(queue.next(from), model.range(from..).next().copied());
            let mut all = Vec::new();
            let mut at = 0;
            while let Some(intid) = queue.next(at) {
                all.push(intid);
                at = intid + 1;
            }
            prop_assert_eq!(all, model.into_iter().collect::<Vec<_>>());
        }
    }
}
