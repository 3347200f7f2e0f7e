//! One address type per address space.

use core::{
    fmt,
    hash::{Hash, Hasher},
    marker::PhantomData,
};

use crate::{ADDRESS_END, PAGE_SHIFT, PAGE_SIZE};

/// An address space: a tag that keeps the addresses of one space from being used in another.
pub trait Space {
    /// Prefix of an address of this space in messages.
    const NAME: &str;
}

/// Physical address space: what leaves stage 2 or the EL2 stage 1.
#[derive(Debug)]
pub enum Phys {}

/// Intermediate physical address space: what a host or guest calls physical.
#[derive(Debug)]
pub enum Intermediate {}

/// Virtual address space of the hypervisor itself.
#[derive(Debug)]
pub enum Hyp {}

impl Space for Phys {
    const NAME: &str = "pa";
}

impl Space for Intermediate {
    const NAME: &str = "ipa";
}

impl Space for Hyp {
    const NAME: &str = "va";
}

/// An address of the space `S`, below [`ADDRESS_END`].
pub struct Addr<S>(u64, PhantomData<S>);

/// A physical address.
pub type PhysAddr = Addr<Phys>;

/// An intermediate physical address.
pub type Ipa = Addr<Intermediate>;

/// A virtual address of the hypervisor.
pub type HypAddr = Addr<Hyp>;

impl<S> Addr<S> {
    /// Returns the address `raw`, or `None` if it needs more than [`ADDRESS_BITS`](crate::ADDRESS_BITS) bits.
    #[must_use]
    pub const fn new(raw: u64) -> Option<Self> {
        if raw < ADDRESS_END { Some(Self(raw, PhantomData)) } else { None }
    }

    /// Returns the address of which `raw` holds the low [`ADDRESS_BITS`](crate::ADDRESS_BITS) bits; the others are
    /// dropped. For fields of registers and descriptors, which have no more bits than that.
    #[must_use]
    pub const fn from_bits_truncating(raw: u64) -> Self {
        Self(raw & (ADDRESS_END - 1), PhantomData)
    }

    /// Returns the address as a number.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Returns whether the address is a multiple of `size`, a power of two.
    #[must_use]
    pub const fn is_aligned(self, size: u64) -> bool {
        self.0 & size.wrapping_sub(1) == 0
    }

    /// Returns the highest multiple of `size`, a power of two, that is not above the address.
    #[must_use]
    pub const fn align_down(self, size: u64) -> Self {
        Self(self.0 & !size.wrapping_sub(1), PhantomData)
    }

    /// Returns the lowest multiple of `size`, a power of two, that is not below the address.
    #[must_use]
    pub const fn align_up(self, size: u64) -> Option<Self> {
        match self.0.checked_add(size.wrapping_sub(1)) {
            Some(raw) => match Self::new(raw) {
                Some(addr) => Some(addr.align_down(size)),
                None => None,
            },
            None => None,
        }
    }

    /// Returns the address `bytes` further up, if there is one.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(raw) => Self::new(raw),
            None => None,
        }
    }

    /// Returns the page that the address lies in.
    #[must_use]
    pub const fn page(self) -> Self {
        self.align_down(PAGE_SIZE)
    }

    /// Returns the number of the page that the address lies in.
    #[must_use]
    pub const fn page_number(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }
}

impl PhysAddr {
    /// Returns the intermediate address that the host's identity map gives to this page.
    #[must_use]
    pub const fn identity_ipa(self) -> Ipa {
        Addr(self.0, PhantomData)
    }

    /// Returns the virtual address at which the hypervisor's identity map has this address.
    #[must_use]
    pub const fn identity_va(self) -> HypAddr {
        Addr(self.0, PhantomData)
    }
}

impl Ipa {
    /// Returns the physical address that the host's identity map gives to this one.
    #[must_use]
    pub const fn identity_pa(self) -> PhysAddr {
        Addr(self.0, PhantomData)
    }
}

// By hand, because derives would ask the same of the tag type.
impl<S> Clone for Addr<S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Addr<S> {}

impl<S> PartialEq for Addr<S> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<S> Eq for Addr<S> {}

impl<S> PartialOrd for Addr<S> {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<S> Ord for Addr<S> {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

impl<S> Hash for Addr<S> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl<S: Space> fmt::Debug for Addr<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x}", S::NAME, self.0)
    }
}

impl<S> fmt::Display for Addr<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_address_has_48_bits() {
        assert_eq!(PhysAddr::new(ADDRESS_END - 1).map(Addr::raw), Some(ADDRESS_END - 1));
        assert_eq!(PhysAddr::new(ADDRESS_END), None);
        assert_eq!(PhysAddr::new(u64::MAX), None);
    }

    #[test]
    fn truncation_keeps_the_low_bits() {
        assert_eq!(Ipa::from_bits_truncating(u64::MAX).raw(), ADDRESS_END - 1);
    }

    #[test]
    fn alignment_goes_both_ways() {
        let addr = Ipa::new(0x1234).unwrap();
        assert!(!addr.is_aligned(PAGE_SIZE));
        assert_eq!(addr.page().raw(), 0x1000);
        assert_eq!(addr.align_up(PAGE_SIZE).unwrap().raw(), 0x2000);
        assert_eq!(addr.page_number(), 1);
        assert_eq!(Ipa::new(ADDRESS_END - 1).unwrap().align_up(PAGE_SIZE), None);
    }

    #[test]
    fn addition_stops_at_the_end() {
        let last = HypAddr::new(ADDRESS_END - 1).unwrap();
        assert_eq!(last.checked_add(0), Some(last));
        assert_eq!(last.checked_add(1), None);
        assert_eq!(last.checked_add(u64::MAX), None);
    }

    #[test]
    fn identity_keeps_the_number() {
        let pa = PhysAddr::new(0x4000_0000).unwrap();
        assert_eq!(pa.identity_ipa().identity_pa(), pa);
        assert_eq!(pa.identity_va().raw(), pa.raw());
        assert_eq!(format!("{pa:?} {pa}"), "pa 0x40000000 0x40000000");
    }
}
