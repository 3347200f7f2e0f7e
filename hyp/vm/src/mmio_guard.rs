//! Which guest addresses the guest has said are devices.

use arrayvec::ArrayVec;
use ravelin_memory::{Ipa, IpaRange};

/// How many separate ranges a guest may name.
const RANGES: usize = 32;

/// Ranges that a guest has named by MMIO_GUARD.
///
/// From the first one on, an access elsewhere is never taken for one to a device: what the guest believes to be memory does
/// not show the host what is stored there. Guests map devices page by page in ascending order, so ranges grow.
#[derive(Debug, Default)]
pub(crate) struct MmioGuard {
    ranges: ArrayVec<IpaRange, RANGES>,
}

impl MmioGuard {
    /// Adds a page. Returns whether there was room for it.
    pub(crate) fn add(&mut self, page: Ipa) -> bool {
        let new = IpaRange::single(page);
        if self.contains(page) {
            return true;
        }
        for range in &mut self.ranges {
            let joined = if range.end() == new.base().raw() {
                IpaRange::from_bounds(range.base().raw(), new.end())
            } else if new.end() == range.base().raw() {
                IpaRange::from_bounds(new.base().raw(), range.end())
            } else {
                continue;
            };
            if let Ok(joined) = joined {
                *range = joined;
                return true;
            }
        }
        self.ranges.try_push(new).is_ok()
    }

    /// Returns whether an access to `address` may be one to a device.
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

    #[test]
    fn until_the_first_page_everything_may_be_a_device() {
        let mut guard = MmioGuard::default();
        assert!(guard.allows(ipa(9)) && !guard.contains(ipa(9)));
        assert!(guard.add(ipa(8)));
        assert!(guard.allows(Ipa::new(0x8fff).unwrap()) && !guard.allows(ipa(9)) && !guard.allows(ipa(7)));
    }

    #[test]
    fn neighbours_take_one_entry() {
        let mut guard = MmioGuard::default();
        for frame in (100..1100).chain((0..100).rev()).chain(50..70) {
            assert!(guard.add(ipa(frame)));
        }
        assert_eq!(guard.ranges.len(), 1);
        assert!((0..1100).all(|frame| guard.contains(ipa(frame))) && !guard.contains(ipa(1100)));
        assert!(guard.overlaps(&IpaRange::new(1099 << 12, 2).unwrap()));
        assert!(!guard.overlaps(&IpaRange::new(1100 << 12, 2).unwrap()));
    }

    #[test]
    fn there_is_an_end() {
        let mut guard = MmioGuard::default();
        let separate = |index: usize| ipa(2 * index as u64);
        assert!((0..RANGES).all(|index| guard.add(separate(index))));
        assert!(!guard.add(separate(RANGES)));
        assert!(guard.add(separate(RANGES - 1)) && guard.add(ipa(1)));
        assert!(!guard.contains(separate(RANGES)));
        // The last page of the address space.
        assert!(MmioGuard::default().add(ipa((1 << 36) - 1)));
    }
}
