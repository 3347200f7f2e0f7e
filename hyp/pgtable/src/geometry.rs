//! Shape of a translation table tree and the register values that announce it to the hardware.

use ravelin_memory::{ADDRESS_BITS, Addr, Level, PhysAddr, TABLE_ENTRIES};

/// Physical address size of a CPU, as ID_AA64MMFR0_EL1.PARange and the PS fields encode it.
///
/// Above 48 bits needs FEAT_LPA or FEAT_LPA2 formats, which Ravelin does not use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum PhysicalSize {
    /// 4 GiB.
    #[default]
    Bits32,
    /// 64 GiB.
    Bits36,
    /// 1 TiB.
    Bits40,
    /// 4 TiB.
    Bits42,
    /// 16 TiB.
    Bits44,
    /// 256 TiB.
    Bits48,
}

impl PhysicalSize {
    /// Returns the size that the PARange field `field` stands for, 48 bits for all larger ones.
    #[must_use]
    pub const fn from_parange(field: u64) -> Self {
        match field & 0xf {
            0 => Self::Bits32,
            1 => Self::Bits36,
            2 => Self::Bits40,
            3 => Self::Bits42,
            4 => Self::Bits44,
            _ => Self::Bits48,
        }
    }

    /// Returns the number of address bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits32 => 32,
            Self::Bits36 => 36,
            Self::Bits40 => 40,
            Self::Bits42 => 42,
            Self::Bits44 => 44,
            Self::Bits48 => 48,
        }
    }

    /// Returns the encoding in a PS field.
    const fn field(self) -> u64 {
        match self {
            Self::Bits32 => 0,
            Self::Bits36 => 1,
            Self::Bits40 => 2,
            Self::Bits42 => 3,
            Self::Bits44 => 4,
            Self::Bits48 => 5,
        }
    }
}

/// Size of the input address and level at which the walk starts, with the 4 KiB granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    bits: u32,
    start: Level,
    /// Binary logarithm of what one root table covers, in bytes: each walk begins with it.
    table_shift: u32,
    /// VTCR_EL2 of a stage 2, with zero for PS: each entry of a guest writes it.
    vtcr: u64,
}

/// Inner and outer write-back, read- and write-allocate, inner shareable table walks; the fields IRGN0, ORGN0 and SH0
/// are at the same place in TCR_EL2 and VTCR_EL2.
const WALK_ATTRIBUTES: u64 = (0b01 << 8) | (0b01 << 10) | (0b11 << 12);
const PS_SHIFT: u32 = 16;

impl Geometry {
    /// The EL2 stage 1: 48 bits, four levels.
    pub const EL2: Self = Self::new(ADDRESS_BITS, Level::L0);

    /// MAIR_EL2 for the indices that EL2 descriptors use: 0 is Device-nGnRE, 1 Normal write-back, 2 Normal non-cacheable.
    pub const MAIR_EL2: u64 = 0x04 | (0xff << 8) | (0x44 << 16);

    /// Returns the geometry of a stage 2 with `bits` of intermediate address, 32 to 48; otherwise `None`.
    ///
    /// Up to 16 tables are concatenated at the start, which saves a level wherever the architecture allows it
    /// (Arm ARM DDI 0487, D8.2.2 "Concatenated translation tables"): 40 bits start with two tables of level 1, 44 bits
    /// with one of level 0.
    #[must_use]
    pub const fn stage2(bits: u32) -> Option<Self> {
        let start = match bits {
            32..=34 => Level::L2,
            35..=43 => Level::L1,
            44..=48 => Level::L0,
            _ => return None,
        };
        Some(Self::new(bits, start))
    }

    const fn new(bits: u32, start: Level) -> Self {
        let sl0 = match start {
            Level::L0 => 0b10,
            Level::L1 => 0b01,
            Level::L2 | Level::L3 => 0b00,
        };
        let table_shift = start.shift().wrapping_add(TABLE_ENTRIES.trailing_zeros());
        Self { bits, start, table_shift, vtcr: t0sz(bits) | (sl0 << 6) | WALK_ATTRIBUTES | (1 << 31) }
    }

    /// Returns the number of bits of an input address.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// Returns the level of the root tables.
    #[must_use]
    pub const fn start(self) -> Level {
        self.start
    }

    /// Returns the first input address that the tables do not cover.
    #[must_use]
    pub const fn end(self) -> u64 {
        // `bits` is at most 48.
        1_u64.wrapping_shl(self.bits)
    }

    /// Returns the number of root tables, 1 to 16. They are contiguous, and the first is aligned to their total size.
    #[must_use]
    pub const fn root_pages(self) -> u64 {
        let pages = self.end() >> self.table_shift();
        if pages == 0 { 1 } else { pages }
    }

    /// Returns VTCR_EL2 for a stage 2: 8-bit VMIDs, neither access flag nor dirty state managed by hardware.
    #[inline]
    #[must_use]
    pub const fn vtcr(self, physical: PhysicalSize) -> u64 {
        self.vtcr | (physical.field() << PS_SHIFT)
    }

    /// Returns TCR_EL2, in its layout for HCR_EL2.E2H = 0, for the EL2 stage 1: no tagged addresses, neither access
    /// flag nor dirty state managed by hardware.
    #[must_use]
    pub fn tcr_el2(physical: PhysicalSize) -> u64 {
        t0sz(ADDRESS_BITS) | WALK_ATTRIBUTES | (physical.field() << PS_SHIFT) | (1 << 23) | (1 << 31)
    }

    /// Returns the root table that translates `addr`, with `root` the first one.
    pub(crate) const fn root_table(self, root: PhysAddr, addr: u64) -> PhysAddr {
        let page = addr >> self.table_shift();
        Addr::from_bits_truncating(root.raw().wrapping_add(page << ravelin_memory::PAGE_SHIFT))
    }

    /// Returns the binary logarithm of what one root table covers, in bytes.
    pub(crate) const fn table_shift(self) -> u32 {
        self.table_shift
    }
}

/// Returns the field T0SZ for so many bits of input address, 32 to 48.
#[expect(clippy::as_conversions, reason = "no other way in a constant function")]
const fn t0sz(bits: u32) -> u64 {
    64_u32.wrapping_sub(bits) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(bits: u32) -> (u32, u64) {
        let geometry = Geometry::stage2(bits).unwrap();
        assert_eq!((geometry.bits(), geometry.end()), (bits, 1 << bits));
        (geometry.start().number(), geometry.root_pages())
    }

    #[test]
    fn concatenation_saves_a_level_where_it_can() {
        assert_eq!(shape(32), (2, 4));
        assert_eq!(shape(34), (2, 16));
        assert_eq!(shape(35), (1, 1));
        assert_eq!(shape(39), (1, 1));
        assert_eq!(shape(40), (1, 2));
        assert_eq!(shape(42), (1, 8));
        assert_eq!(shape(43), (1, 16));
        assert_eq!(shape(44), (0, 1));
        assert_eq!(shape(48), (0, 1));
        assert_eq!(Geometry::stage2(31), None);
        assert_eq!(Geometry::stage2(49), None);
    }

    #[test]
    fn register_values() {
        // Fields by hand: RES1, PS, SH0, ORGN0, IRGN0, SL0, T0SZ.
        let vtcr = |ps: u64, sl0: u64, t0sz: u64| (1 << 31) | (ps << 16) | 0x3500 | (sl0 << 6) | t0sz;
        assert_eq!(Geometry::stage2(40).unwrap().vtcr(PhysicalSize::Bits40), vtcr(2, 1, 24));
        assert_eq!(Geometry::stage2(36).unwrap().vtcr(PhysicalSize::Bits36), vtcr(1, 1, 28));
        assert_eq!(Geometry::stage2(42).unwrap().vtcr(PhysicalSize::Bits42), vtcr(3, 1, 22));
        assert_eq!(Geometry::stage2(44).unwrap().vtcr(PhysicalSize::Bits44), vtcr(4, 2, 20));
        assert_eq!(Geometry::stage2(48).unwrap().vtcr(PhysicalSize::Bits48), vtcr(5, 2, 16));
        assert_eq!(Geometry::stage2(32).unwrap().vtcr(PhysicalSize::Bits32), vtcr(0, 0, 32));
        assert_eq!(Geometry::tcr_el2(PhysicalSize::Bits40), 0x8082_3510);
        assert_eq!(Geometry::MAIR_EL2, 0x44_ff04);
    }

    #[test]
    fn the_boot_code_has_the_same_size_of_addresses() {
        let boot = include_str!("../../arch/asm/boot.S");
        let value = boot.lines().find_map(|line| line.strip_prefix(".set BOOT_TCR_EL2,")).unwrap();
        let value = value.split_whitespace().next().unwrap().trim_start_matches("0x");
        // It adds the CPU's physical size, which is 0 here.
        assert_eq!(u64::from_str_radix(value, 16), Ok(Geometry::tcr_el2(PhysicalSize::Bits32)));
    }

    #[test]
    fn physical_sizes_stop_at_48_bits() {
        for (field, bits) in [(0, 32), (1, 36), (2, 40), (3, 42), (4, 44), (5, 48), (6, 48), (7, 48)] {
            assert_eq!(PhysicalSize::from_parange(field).bits(), bits);
        }
    }

    #[test]
    fn root_tables_follow_each_other() {
        let root = PhysAddr::new(0x4000_0000).unwrap();
        let geometry = Geometry::stage2(40).unwrap();
        assert_eq!(geometry.root_table(root, 0x7f_ffff_ffff), root);
        assert_eq!(geometry.root_table(root, 0x80_0000_0000).raw(), root.raw() + 0x1000);
    }
}
