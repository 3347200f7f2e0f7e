//! Which of its addresses a guest has said are devices, or memory.

use arrayvec::ArrayVec;
use ravelin_memory::{Ipa, IpaRange};

/// How many separate ranges a guest may name.
const RANGES: usize = 32;

/// Ranges that a guest has named: by MMIO_GUARD where devices are, or, a realm, by IPA_STATE_SET where memory is.
///
/// Guests name page by page or part by part in ascending order, so ranges grow.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    ranges: ArrayVec<IpaRange, RANGES>,
}

impl Ranges {
    /// Adds a range. Returns whether there was room for it.
    pub(crate) fn add(&mut self, new: IpaRange) -> bool {
        let (base, end) = (new.base().raw(), new.end());
        for range in &mut self.ranges {
            if range.covers(&new) {
                return true;
            }
            if base <= range.end() && range.base().raw() <= end {
                let joined = IpaRange::from_bounds(base.min(range.base().raw()), end.max(range.end()));
                return joined.map(|joined| *range = joined).is_ok();
            }
        }
        self.ranges.try_push(new).is_ok()
    }

    /// Returns whether the guest has named the first page of `range`, and of how many pages from there on the same is true.
    pub(crate) fn look(&self, range: &IpaRange) -> (bool, u64) {
        let base = range.base();
        let named = self.ranges.iter().find(|named| named.contains(base));
        let end = match named {
            Some(named) => named.end().min(range.end()),
            None => {
                let behind = self.ranges.iter().map(|named| named.base().raw()).filter(|&at| at > base.raw());
                behind.fold(range.end(), u64::min)
            }
        };
        let pages = IpaRange::from_bounds(base.raw(), end).map_or(1, |same| same.pages());
        (named.is_some(), pages)
    }

    /// Returns whether an access to `address` may be one to a device.
    ///
    /// From the first range on, an access elsewhere is never taken for one to a device: what the guest believes to be memory does
    /// not show the host what is stored there.
    pub(crate) fn allows(&self, address: Ipa) -> bool {
        self.ranges.is_empty() || self.contains(address)
    }

    /// Returns whether the guest has named the page of `address`.
    pub(crate) fn contains(&self, address: Ipa) -> bool {
        self.ranges.iter().any(|range| range.contains(address))
    }

    /// Returns whether the guest has named a page of `range`.
    pub(crate) fn overlaps(&self, range: &IpaRange) -> bool {
        self.ranges.iter().any(|named| named.overlaps(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ipa(frame: u64) -> Ipa {
        Ipa::new(frame << 12).unwrap()
    }

    fn page(frame: u64) -> IpaRange {
        IpaRange::single(ipa(frame))
    }

    #[test]
    fn until_the_first_page_everything_may_be_a_device() {
        let mut guard = Ranges::default();
        assert!(guard.allows(ipa(9)) && !guard.contains(ipa(9)));
        assert!(guard.add(page(8)));
        assert!(guard.allows(Ipa::new(0x8fff).unwrap()) && !guard.allows(ipa(9)) && !guard.allows(ipa(7)));
    }

    #[test]
    fn neighbours_take_one_entry() {
        let mut guard = Ranges::default();
        for frame in (100..1100).chain((0..100).rev()).chain(50..70) {
            assert!(guard.add(page(frame)));
        }
        assert_eq!(guard.ranges.len(), 1);
        assert!((0..1100).all(|frame| guard.contains(ipa(frame))) && !guard.contains(ipa(1100)));
        assert!(guard.overlaps(&IpaRange::new(1099 << 12, 2).unwrap()));
        assert!(!guard.overlaps(&IpaRange::new(1100 << 12, 2).unwrap()));
    }

    #[test]
    fn there_is_an_end() {
        let mut guard = Ranges::default();
        let separate = |index: usize| page(2 * index as u64);
        assert!((0..RANGES).all(|index| guard.add(separate(index))));
        assert!(!guard.add(separate(RANGES)));
        assert!(guard.add(separate(RANGES - 1)) && guard.add(page(1)));
        assert!(!guard.contains(separate(RANGES).base()));
        // The last page of the address space.
        assert!(Ranges::default().add(page((1 << 36) - 1)));
    }

    #[test]
    fn a_look_says_how_far_the_same_is_true() {
        let mut ranges = Ranges::default();
        let range = |frame, pages| IpaRange::new(frame << 12, pages).unwrap();
        assert_eq!(ranges.look(&range(0, 100)), (false, 100));
        assert!(ranges.add(range(20, 10)) && ranges.add(range(40, 10)));
        // Overlapping, contained, and joining.
        assert!(ranges.add(range(25, 10)) && ranges.add(range(26, 2)) && ranges.add(range(19, 1)));
        assert_eq!(ranges.ranges.len(), 2);
        for (frame, expected) in
            [(0, (false, 19)), (19, (true, 16)), (34, (true, 1)), (35, (false, 5)), (49, (true, 1)), (50, (false, 50))]
        {
            assert_eq!(ranges.look(&range(frame, 100 - frame)), expected, "{frame}");
        }
        assert_eq!(ranges.look(&range(20, 3)), (true, 3));
    }
}
