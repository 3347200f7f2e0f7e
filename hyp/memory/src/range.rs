//! Non-empty runs of whole pages.

use core::fmt;

use crate::{
    ADDRESS_END, PAGE_SHIFT, PAGE_SIZE,
    addr::{Addr, Hyp, Intermediate, Phys, Space},
};

/// At least one whole page of the space `S`; all of it lies below [`ADDRESS_END`].
pub struct PageRange<S> {
    base: Addr<S>,
    pages: u64,
}

/// A range of physical pages.
pub type PhysRange = PageRange<Phys>;

/// A range of intermediate physical pages.
pub type IpaRange = PageRange<Intermediate>;

/// A range of the hypervisor's virtual pages.
pub type HypRange = PageRange<Hyp>;

/// Why numbers do not describe a range of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeError {
    /// The base is not a multiple of the page size.
    Unaligned,
    /// There are no pages in it.
    Empty,
    /// It reaches beyond the last address.
    Overflow,
}

impl<S> PageRange<S> {
    /// Returns the range of `pages` pages that starts at `base`.
    ///
    /// # Errors
    ///
    /// Every combination of numbers that is not a range; see [`RangeError`].
    pub const fn new(base: u64, pages: u64) -> Result<Self, RangeError> {
        let Some(base) = Addr::new(base) else {
            return Err(RangeError::Overflow);
        };
        if !base.is_aligned(PAGE_SIZE) {
            return Err(RangeError::Unaligned);
        }
        if pages == 0 {
            return Err(RangeError::Empty);
        }
        match (ADDRESS_END >> PAGE_SHIFT).checked_sub(base.page_number()) {
            Some(available) if pages <= available => Ok(Self { base, pages }),
            _ => Err(RangeError::Overflow),
        }
    }

    /// Returns the range of the bytes from `base` up to, but not including, `end`.
    ///
    /// # Errors
    ///
    /// As [`PageRange::new`]; an `end` that is not aligned is [`RangeError::Unaligned`], one not above `base` is
    /// [`RangeError::Empty`].
    pub const fn from_bounds(base: u64, end: u64) -> Result<Self, RangeError> {
        if end & (PAGE_SIZE - 1) != 0 {
            return Err(RangeError::Unaligned);
        }
        Self::new(base, end.saturating_sub(base) >> PAGE_SHIFT)
    }

    /// Returns the range that is one page.
    #[must_use]
    pub const fn single(page: Addr<S>) -> Self {
        Self { base: page.page(), pages: 1 }
    }

    /// Returns the address of the first page.
    #[must_use]
    pub const fn base(&self) -> Addr<S> {
        self.base
    }

    /// Returns how many pages there are; at least one.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns the size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.pages << PAGE_SHIFT
    }

    /// Returns the first address behind the range, as a number because it may be [`ADDRESS_END`].
    #[must_use]
    pub const fn end(&self) -> u64 {
        // Cannot wrap: checked when the range was made.
        self.base.raw().wrapping_add(self.size())
    }

    /// Returns whether `addr` lies in the range.
    #[must_use]
    pub const fn contains(&self, addr: Addr<S>) -> bool {
        self.base.raw() <= addr.raw() && addr.raw() < self.end()
    }

    /// Returns whether all of `other` lies in the range.
    #[must_use]
    pub const fn covers(&self, other: &Self) -> bool {
        self.base.raw() <= other.base.raw() && other.end() <= self.end()
    }

    /// Returns what the two ranges have in common.
    #[must_use]
    pub const fn intersection(&self, other: &Self) -> Option<Self> {
        let base = if self.base.raw() > other.base.raw() { self.base } else { other.base };
        let end = if self.end() < other.end() { self.end() } else { other.end() };
        match Self::from_bounds(base.raw(), end) {
            Ok(common) => Some(common),
            Err(_) => None,
        }
    }

    /// Returns whether the two ranges have a page in common.
    #[must_use]
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.intersection(other).is_some()
    }

    /// Cuts the range at multiples of `size`, a power of two of at least a page, and yields the pieces in order.
    pub fn split_at_multiples(self, size: u64) -> impl Iterator<Item = Self> {
        let mut rest = Some(self);
        core::iter::from_fn(move || {
            let current = rest?;
            let cut = match current.base.align_down(size).raw().checked_add(size) {
                Some(cut) if cut < current.end() => cut,
                _ => current.end(),
            };
            rest = Self::from_bounds(cut, current.end()).ok();
            Self::from_bounds(current.base.raw(), cut).ok()
        })
    }

    /// Yields the address of each page in order.
    pub fn iter(self) -> impl Iterator<Item = Addr<S>> {
        (0..self.pages).filter_map(move |index| self.base.checked_add(index << PAGE_SHIFT))
    }
}

impl PhysRange {
    /// Returns the intermediate addresses that the host's identity map gives to these pages.
    #[must_use]
    pub const fn identity_ipa(&self) -> IpaRange {
        IpaRange { base: self.base.identity_ipa(), pages: self.pages }
    }

    /// Returns the virtual addresses at which the hypervisor's identity map has these pages.
    #[must_use]
    pub const fn identity_va(&self) -> HypRange {
        HypRange { base: self.base.identity_va(), pages: self.pages }
    }
}

impl<S> Clone for PageRange<S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for PageRange<S> {}

impl<S> PartialEq for PageRange<S> {
    fn eq(&self, other: &Self) -> bool {
        self.base == other.base && self.pages == other.pages
    }
}

impl<S> Eq for PageRange<S> {}

impl<S: Space> fmt::Debug for PageRange<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {self}", S::NAME)
    }
}

impl<S> fmt::Display for PageRange<S> {
    /// Writes the first and the last address of the range, as Linux does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.base.raw(), self.end().wrapping_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(base: u64, pages: u64) -> PhysRange {
        PhysRange::new(base, pages).unwrap()
    }

    #[test]
    fn numbers_that_are_no_range_are_refused() {
        assert_eq!(PhysRange::new(0x1001, 1), Err(RangeError::Unaligned));
        assert_eq!(PhysRange::new(0x1000, 0), Err(RangeError::Empty));
        assert_eq!(PhysRange::new(ADDRESS_END, 1), Err(RangeError::Overflow));
        assert_eq!(PhysRange::new(u64::MAX - 0xfff, 1), Err(RangeError::Overflow));
        assert_eq!(PhysRange::new(0x1000, u64::MAX), Err(RangeError::Overflow));
        assert_eq!(PhysRange::new(0x1000, 1 << 52), Err(RangeError::Overflow));
        assert_eq!(PhysRange::new(ADDRESS_END - 0x1000, 2), Err(RangeError::Overflow));
        assert_eq!(PhysRange::from_bounds(0x2000, 0x1000), Err(RangeError::Empty));
        assert_eq!(PhysRange::from_bounds(0x2000, 0x3001), Err(RangeError::Unaligned));
    }

    #[test]
    fn the_whole_space_is_a_range() {
        let all = range(0, ADDRESS_END >> PAGE_SHIFT);
        assert_eq!(all.end(), ADDRESS_END);
        assert!(all.covers(&range(ADDRESS_END - 0x1000, 1)));
    }

    #[test]
    fn intersections() {
        let a = range(0x1000, 4);
        assert_eq!(a.intersection(&range(0x3000, 4)), Some(range(0x3000, 2)));
        assert_eq!(a.intersection(&range(0x5000, 1)), None);
        assert!(!a.overlaps(&range(0, 1)));
        assert!(a.contains(PhysAddr::new(0x4fff).unwrap()));
        assert!(!a.contains(PhysAddr::new(0x5000).unwrap()));
    }

    #[test]
    fn pieces_add_up() {
        let cut: Vec<_> = range(0x1f_f000, 514).split_at_multiples(crate::BLOCK_SIZE).collect();
        assert_eq!(cut, [range(0x1f_f000, 1), range(0x20_0000, 512), range(0x40_0000, 1)]);
        let last: Vec<_> = range(ADDRESS_END - 0x1000, 1).split_at_multiples(crate::BLOCK_SIZE).collect();
        assert_eq!(last.len(), 1);
    }

    #[test]
    fn pages_in_order() {
        let pages: Vec<_> = range(0x1000, 3).iter().map(Addr::raw).collect();
        assert_eq!(pages, [0x1000, 0x2000, 0x3000]);
        assert_eq!(format!("{}", range(0x1000, 3)), "0x1000-0x3fff");
    }

    use crate::PhysAddr;
}
