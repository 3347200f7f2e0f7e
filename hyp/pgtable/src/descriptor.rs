//! Translation table descriptors as values (Arm ARM DDI 0487, D8.3).

use ravelin_memory::{Level, PAGE_SIZE, PhysAddr, TABLE_ENTRIES};

const VALID: u64 = 1 << 0;
/// At level 3 a valid descriptor with this bit is a page, above it a table; without it a block.
const TABLE_OR_PAGE: u64 = 1 << 1;
const ADDRESS: u64 = (1 << 48) - PAGE_SIZE;
/// Bits 11 to 2 of a table descriptor, which walkers ignore: how many entries of that table are in use.
const ENTRIES_SHIFT: u32 = 2;
const ENTRIES: u64 = 0x3ff << ENTRIES_SHIFT;
/// Bit 55 of a table descriptor, which walkers ignore: the table stays when it is empty, and not all of its entries are counted.
const KEPT: u64 = 1 << 55;
/// Set in an invalid descriptor that is neither empty nor pending: nothing may be mapped there any more.
const POISON: u64 = 1 << 2;

/// One 8-byte entry of a translation table.
///
/// A table descriptor carries the number of entries in use of the table that it points to, in bits that the hardware
/// ignores. So an emptied table is found without a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(u64);

/// What a descriptor means at its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing is mapped.
    Invalid,
    /// Memory is mapped, by a block or a page that starts at this address.
    Leaf(PhysAddr),
    /// The next level's table.
    Table(PhysAddr),
    /// A table that takes the place of a block once the block is out of the TLBs. Invalid for the hardware.
    Pending(PhysAddr),
    /// Nothing is mapped, and nothing can be.
    Poisoned,
}

impl Descriptor {
    /// Maps nothing.
    pub const INVALID: Self = Self(0);

    /// Maps nothing, and is not replaced by [`PageTable::map`](crate::PageTable::map). Invalid for the hardware.
    pub const POISONED: Self = Self(POISON);

    /// Returns the descriptor with these bits.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Returns the bits as they are in memory.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns whether the hardware follows it, at any level.
    #[must_use]
    pub const fn is_valid(self) -> bool {
        self.0 & VALID != 0
    }

    /// Returns a descriptor of `level` that maps memory from `to` on. `to` is aligned to the size of the level, and
    /// `attributes` has none but attribute bits.
    #[must_use]
    pub const fn leaf(level: Level, to: PhysAddr, attributes: u64) -> Self {
        let page = if matches!(level, Level::L3) { TABLE_OR_PAGE } else { 0 };
        Self(to.raw() | attributes | page | VALID)
    }

    /// Returns the leaf that maps the memory behind what this leaf of `level` maps.
    #[must_use]
    pub const fn following(self, level: Level) -> Self {
        Self(self.0.wrapping_add(level.size()))
    }

    /// Returns a descriptor of the table `next`, of which `entries`, at most 512, are in use.
    #[must_use]
    pub const fn table(next: PhysAddr, entries: u64) -> Self {
        Self(next.raw() | (entries << ENTRIES_SHIFT) | TABLE_OR_PAGE | VALID)
    }

    /// Returns this table descriptor with another number of entries in use.
    #[must_use]
    pub const fn with_entries(self, entries: u64) -> Self {
        Self((self.0 & !ENTRIES) | (entries << ENTRIES_SHIFT))
    }

    /// Returns this descriptor of a table that is to stay when it is empty.
    #[must_use]
    pub const fn kept(self) -> Self {
        Self(self.0 | KEPT)
    }

    /// Returns whether the table that this descriptor points to stays when it is empty.
    #[must_use]
    pub const fn is_kept(self) -> bool {
        self.0 & KEPT != 0
    }

    /// Returns how many entries of the table that this descriptor points to are in use.
    #[must_use]
    pub const fn entries(self) -> u64 {
        (self.0 & ENTRIES) >> ENTRIES_SHIFT
    }

    /// Returns this table descriptor with the valid bit cleared: [`Kind::Pending`].
    #[must_use]
    pub const fn pending(self) -> Self {
        Self(self.0 & !VALID)
    }

    /// Returns this pending descriptor as a valid one.
    #[must_use]
    pub const fn linked(self) -> Self {
        Self(self.0 | VALID)
    }

    /// Returns what this descriptor means at `level`.
    #[must_use]
    pub const fn kind(self, level: Level) -> Kind {
        let address = self.address();
        match (self.0 & VALID != 0, self.0 & TABLE_OR_PAGE != 0, level) {
            (true, true, Level::L3) | (true, false, Level::L1 | Level::L2) => Kind::Leaf(address),
            (true, true, _) => Kind::Table(address),
            (false, true, Level::L0 | Level::L1 | Level::L2) => Kind::Pending(address),
            (false, false, _) if self.0 == POISON => Kind::Poisoned,
            _ => Kind::Invalid,
        }
    }

    /// Returns the table that this descriptor of a level above the last one points to, if it is valid.
    #[inline]
    #[must_use]
    pub const fn next_table(self) -> Option<PhysAddr> {
        if self.0 & (VALID | TABLE_OR_PAGE) == VALID | TABLE_OR_PAGE { Some(self.address()) } else { None }
    }

    /// Returns the start of the memory that this descriptor maps at `level`, if it is a leaf.
    #[inline]
    #[must_use]
    pub const fn output(self, level: Level) -> Option<PhysAddr> {
        let page = if matches!(level, Level::L3) { TABLE_OR_PAGE } else { 0 };
        let is_leaf = level.can_map() && self.0 & (VALID | TABLE_OR_PAGE) == VALID | page;
        if is_leaf { Some(self.address()) } else { None }
    }

    const fn address(self) -> PhysAddr {
        PhysAddr::from_bits_truncating(self.0 & ADDRESS)
    }

    /// Returns the attribute bits of a leaf.
    #[must_use]
    pub const fn attributes(self) -> u64 {
        self.0 & !(ADDRESS | VALID | TABLE_OR_PAGE)
    }

    /// Returns whether the hardware sees the same in both, whatever the number of entries that they note.
    #[must_use]
    pub const fn same_for_hardware(self, other: Self, level: Level) -> bool {
        let ignored = if matches!(self.kind(level), Kind::Table(_)) { ENTRIES | KEPT } else { 0 };
        self.0 & !ignored == other.0 & !ignored
    }
}

const _: () = assert!(TABLE_ENTRIES <= ENTRIES >> ENTRIES_SHIFT);

#[cfg(test)]
mod tests {
    use super::*;

    const ADDR: PhysAddr = PhysAddr::from_bits_truncating(0x8000_4000_0000);

    #[test]
    fn the_type_depends_on_the_level() {
        let table = Descriptor::table(ADDR, 512);
        assert_eq!(table.kind(Level::L0), Kind::Table(ADDR));
        assert_eq!(table.kind(Level::L2), Kind::Table(ADDR));
        assert_eq!(Descriptor::from_bits(ADDR.raw() | 3).kind(Level::L3), Kind::Leaf(ADDR));
        let block = Descriptor::leaf(Level::L1, ADDR, 0);
        assert_eq!(block.kind(Level::L1), Kind::Leaf(ADDR));
        assert_eq!(block.kind(Level::L0), Kind::Invalid, "reserved at level 0");
        assert_eq!(block.kind(Level::L3), Kind::Invalid, "reserved at level 3");
        assert_eq!(Descriptor::INVALID.kind(Level::L2), Kind::Invalid);
    }

    #[test]
    fn the_count_does_not_reach_into_other_fields() {
        let table = Descriptor::table(ADDR, 0).with_entries(512);
        assert_eq!(table.entries(), 512);
        assert_eq!(table.kind(Level::L1), Kind::Table(ADDR));
        assert!(table.same_for_hardware(table.with_entries(3), Level::L1));
        assert_eq!(table.with_entries(3).entries(), 3);
    }

    #[test]
    fn a_pending_table_is_invalid_for_the_hardware() {
        let pending = Descriptor::table(ADDR, 511).pending();
        assert_eq!(pending.bits() & 1, 0);
        assert_eq!(pending.kind(Level::L2), Kind::Pending(ADDR));
        assert_eq!(pending.linked(), Descriptor::table(ADDR, 511));
    }

    #[test]
    fn poison_is_invalid_for_the_hardware_at_all_levels() {
        assert_eq!(Descriptor::POISONED.bits() & 1, 0);
        for level in [Level::L0, Level::L1, Level::L2, Level::L3] {
            assert_eq!(Descriptor::POISONED.kind(level), Kind::Poisoned);
        }
    }

    #[test]
    fn attributes_exclude_address_and_type() {
        let attributes = (1 << 54) | (0xf << 2) | (1 << 10);
        let page = Descriptor::leaf(Level::L3, ADDR, attributes);
        assert_eq!(page.attributes(), attributes);
        assert_eq!(page.kind(Level::L3), Kind::Leaf(ADDR));
    }
}
