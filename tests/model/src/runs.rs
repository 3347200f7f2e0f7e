//! Maps from page numbers, a run of neighbours at a time.

use alloc::collections::BTreeMap;
use core::ops::Range;

/// What pages are mapped to. The value of a run is that of its first page; those behind follow from it.
pub trait Follow: Copy + Eq {
    /// Returns the value of the page that lies `pages` behind one with this value, in the same run.
    #[must_use]
    fn after(self, _pages: u64) -> Self {
        self
    }
}

impl Follow for () {}

/// A map from page numbers. Neighbours whose values follow from each other are one run, so that equal maps are equal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Runs<T> {
    /// By first page: the page behind the last one, and the value of the first.
    runs: BTreeMap<u64, (u64, T)>,
}

impl<T> Default for Runs<T> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl<T: Follow> Runs<T> {
    /// Returns the value of a page.
    pub fn get(&self, page: u64) -> Option<T> {
        let (&first, &(end, value)) = self.runs.range(..=page).next_back()?;
        (page < end).then(|| value.after(page - first))
    }

    /// Returns how many pages have a value.
    pub fn count(&self) -> u64 {
        self.runs.iter().map(|(first, (end, _))| end - first).sum()
    }

    /// Returns whether no page has a value.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Yields all runs.
    pub fn iter(&self) -> impl Iterator<Item = (Range<u64>, T)> {
        self.runs.iter().map(|(&first, &(end, value))| (first..end, value))
    }

    /// Yields the parts of `pages` that are of one run, or between runs, in ascending order.
    pub fn parts(&self, pages: Range<u64>) -> impl Iterator<Item = (Range<u64>, Option<T>)> {
        let mut at = pages.start;
        core::iter::from_fn(move || {
            if at >= pages.end {
                return None;
            }
            let value = self.get(at);
            let end = match value {
                Some(_) => self.runs.range(..=at).next_back().map_or(pages.end, |(_, &(end, _))| end),
                None => self.runs.range(at..).next().map_or(pages.end, |(&first, _)| first),
            };
            let part = at..end.min(pages.end);
            at = part.end;
            Some((part, value))
        })
    }

    /// Takes the values of `pages` away.
    pub fn clear(&mut self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        self.cut(pages.start);
        self.cut(pages.end);
        while let Some((&first, _)) = self.runs.range(pages.clone()).next() {
            self.runs.remove(&first);
        }
    }

    /// Gives the first of `pages` this value, and the others what follows from it.
    pub fn set(&mut self, pages: Range<u64>, value: T) {
        self.clear(pages.clone());
        if pages.is_empty() {
            return;
        }
        let Range { mut start, mut end } = pages;
        let mut value = value;
        if let Some((&first, &(behind, before))) = self.runs.range(..start).next_back()
            && behind == start
            && before.after(start - first) == value
        {
            (start, value) = (first, before);
        }
        if let Some(&(behind, next)) = self.runs.get(&end)
            && value.after(end - start) == next
        {
            self.runs.remove(&end);
            end = behind;
        }
        self.runs.insert(start, (end, value));
    }

    /// Ends a run in front of a page.
    fn cut(&mut self, page: u64) {
        if let Some((&first, &(end, value))) = self.runs.range(..page).next_back()
            && page < end
        {
            self.runs.insert(first, (page, value));
            self.runs.insert(page, (end, value.after(page - first)));
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Either the same for all, or ascending.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Value {
        Same(u8),
        Ascending(u64),
    }

    impl Follow for Value {
        fn after(self, pages: u64) -> Self {
            match self {
                Self::Same(_) => self,
                Self::Ascending(first) => Self::Ascending(first + pages),
            }
        }
    }

    fn value() -> impl Strategy<Value = Option<Value>> {
        prop_oneof![
            Just(None),
            (0..2_u8).prop_map(|value| Some(Value::Same(value))),
            (0..8_u64).prop_map(|first| Some(Value::Ascending(first))),
        ]
    }

    proptest! {
        #[test]
        fn as_an_array(steps in vec((0..24_u64, 0..9_u64, value()), 1..40)) {
            let (mut runs, mut array) = (Runs::default(), [None; 32]);
            for (start, length, value) in steps {
                let pages = start..start + length;
                for page in pages.clone() {
                    array[page as usize] = value.map(|value| value.after(page - start));
                }
                match value {
                    Some(value) => runs.set(pages, value),
                    None => runs.clear(pages),
                }
                let got: Vec<_> = (0..32).map(|page| runs.get(page)).collect();
                prop_assert_eq!(&got[..], &array[..]);
                prop_assert_eq!(runs.count(), array.iter().flatten().count() as u64);
                // Every page is in one part, and the parts say what they are.
                let mut next = 3;
                for (part, value) in runs.parts(3..30) {
                    prop_assert_eq!(part.start, next);
                    next = part.end;
                    for page in part.clone() {
                        prop_assert_eq!(value.map(|value| value.after(page - part.start)), array[page as usize]);
                    }
                }
                prop_assert_eq!(next, 30);
                // Runs are as long as can be, so that equal maps are equal.
                let mut again = Runs::default();
                for page in (0..32).rev() {
                    if let Some(value) = array[page as usize] {
                        again.set(page..page + 1, value);
                    }
                }
                prop_assert_eq!(&again, &runs);
            }
        }
    }
}
