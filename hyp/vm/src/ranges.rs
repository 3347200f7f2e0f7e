//! Which of its addresses a guest has said are devices, or memory.

use arrayvec::ArrayVec;
use ravelin_memory::{Ipa, IpaRange};
use ravelin_sync::{
    Mutex,
    atomic::{
        AtomicBool,
        Ordering::{Acquire, Release},
    },
};

/// How many separate ranges a guest may name.
const RANGES: usize = 32;

/// Ranges that a guest has named: by MMIO_GUARD where devices are, or, a realm, by IPA_STATE_SET where memory is.
///
/// Guests name page by page or part by part in ascending order, so ranges grow.
#[derive(Debug, Default)]
struct Ranges {
    ranges: ArrayVec<IpaRange, RANGES>,
}

/// These, for all vCPUs of a guest.
#[derive(Debug)]
pub(crate) struct Named {
    /// Whether there are any. Before, nobody needs the lock.
    any: AtomicBool,
    ranges: Mutex<Ranges>,
}

// By hand, because loom's atomics and locks have no constant value.
impl Default for Named {
    fn default() -> Self {
        Self { any: AtomicBool::new(false), ranges: Mutex::new(Ranges::default()) }
    }
}

impl Named {
    /// Adds a range. Returns whether there was room for it.
    pub(crate) fn add(&self, new: IpaRange) -> bool {
        let mut ranges = self.ranges.lock();
        self.any.store(true, Release);
        ranges.add(new)
    }

    /// Returns whether the guest has named the first page of `range`, and of how many pages from there on the same is true.
    pub(crate) fn look(&self, range: &IpaRange) -> (bool, u64) {
        self.ranges.lock().look(range)
    }

    /// Returns whether the guest has named a page of `range`.
    #[inline]
    pub(crate) fn overlaps(&self, range: &IpaRange) -> bool {
        self.any.load(Acquire) && self.ranges.lock().overlaps(range)
    }

    /// Returns whether an access to `address` is taken for one to a device, of which the CPU describes only some (`described`).
    ///
    /// From the first range on, an access elsewhere never is: what the guest believes to be memory does not show the host what is
    /// stored there.
    #[inline(always)]
    pub(crate) fn is_device(&self, address: Ipa, described: bool) -> bool {
        if self.any.load(Acquire) { self.ranges.lock().contains(address) } else { described }
    }
}

impl Ranges {
    /// Adds a range. Returns whether there was room for it.
    fn add(&mut self, new: IpaRange) -> bool {
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
    fn look(&self, range: &IpaRange) -> (bool, u64) {
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

    /// Returns whether the guest has named the page of `address`.
    fn contains(&self, address: Ipa) -> bool {
        self.ranges.iter().any(|range| range.contains(address))
    }

    /// Returns whether the guest has named a page of `range`.
    fn overlaps(&self, range: &IpaRange) -> bool {
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
        let named = Named::default();
        assert!(named.is_device(ipa(9), true) && !named.is_device(ipa(9), false));
        assert!(!named.overlaps(&page(8)));
        assert!(named.add(page(8)));
        for described in [false, true] {
            assert!(named.is_device(Ipa::new(0x8fff).unwrap(), described));
            assert!(!named.is_device(ipa(9), described) && !named.is_device(ipa(7), described));
        }
        assert!(named.overlaps(&page(8)) && !named.overlaps(&page(9)));
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
