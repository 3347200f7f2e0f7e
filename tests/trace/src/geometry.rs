//! Translation tables as the hardware reads them: shapes of trees, and descriptors (Arm ARM DDI 0487, D8.2 and D8.3).

/// Size of a page, and of a table.
pub(crate) const PAGE: u64 = 4096;

/// The last level.
pub(crate) const LAST: u8 = 3;

/// Shape of a tree with 4 KiB tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Level of the root tables.
    pub(crate) start: u8,
    /// Number of root tables, which are contiguous.
    pub(crate) roots: u64,
}

impl Geometry {
    /// Returns the shape that TCR_EL2 asks for, if it is one for 4 KiB tables.
    pub(crate) fn of_tcr(tcr: u64) -> Option<Self> {
        let bits = 64_u64.checked_sub(tcr & 0x3f)?;
        let start = match bits {
            40..=48 => 0,
            31..=39 => 1,
            _ => return None,
        };
        (tcr >> 14 & 0b11 == 0).then_some(Self { start, roots: 1 })
    }

    /// Returns the shape that VTCR_EL2 asks for, if it is one for 4 KiB tables: up to 16 root tables.
    pub(crate) fn of_vtcr(vtcr: u64) -> Option<Self> {
        let bits = 64_u64.checked_sub(vtcr & 0x3f)?;
        let start = 2_u8.checked_sub(u8::try_from(vtcr >> 6 & 0b11).ok()?)?;
        let covered = shift(start).saturating_add(9);
        let roots = 1_u64.checked_shl(u32::try_from(bits).ok()?.saturating_sub(covered))?;
        (vtcr >> 14 & 0b11 == 0 && roots <= 16).then_some(Self { start, roots })
    }
}

/// Returns the binary logarithm of what a descriptor of `level` covers, in bytes.
fn shift(level: u8) -> u32 {
    39_u32.saturating_sub(u32::from(level).saturating_mul(9))
}

/// Returns what a descriptor of `level` covers, in bytes.
pub(crate) fn size(level: u8) -> u64 {
    1_u64.wrapping_shl(shift(level))
}

/// Returns whether TLB maintenance with this operand is for descriptors of `level`: bits 47 to 44, TTL, may name the granule
/// and one level (Arm ARM DDI 0487, C5.5 "TLBI IPAS2E1IS"). That 0b0100 is level 0 only with FEAT_LPA2 makes no difference
/// to what can be relied on.
pub(crate) fn is_for(operand: u64, level: u8) -> bool {
    let ttl = operand >> 44 & 0xf;
    ttl >> 2 == 0 || ttl == 0b0100 | u64::from(level)
}

/// What the hardware finds in a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing.
    Invalid,
    /// A block or page.
    Leaf,
    /// The table at this address.
    Table(u64),
}

/// Returns what the hardware finds in `descriptor` at `level`.
pub(crate) fn kind(descriptor: u64, level: u8) -> Kind {
    match (descriptor & 1 != 0, descriptor & 0b10 != 0, level) {
        (true, true, LAST) | (true, false, 1 | 2) => Kind::Leaf,
        (true, true, _) => Kind::Table(descriptor & ((1 << 48) - PAGE)),
        _ => Kind::Invalid,
    }
}

/// Returns whether the hardware sees the same in both descriptors, which are valid. In a table descriptor it ignores bits 58
/// to 51 and 11 to 2, in a leaf bits 58 to 55.
pub(crate) fn same_for_hardware(one: u64, other: u64, level: u8) -> bool {
    let ignored = match kind(one, level) {
        Kind::Table(_) => 0xff << 51 | 0x3ff << 2,
        Kind::Leaf | Kind::Invalid => 0xf << 55,
    };
    (one ^ other) & !ignored == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_of_registers() {
        // T0SZ and SL0 as for 48, 40 and 32 bits of stage 2.
        assert_eq!(Geometry::of_vtcr(0x8005_3590), Some(Geometry { start: 0, roots: 1 }));
        assert_eq!(Geometry::of_vtcr(0x8002_3558), Some(Geometry { start: 1, roots: 2 }));
        assert_eq!(Geometry::of_vtcr(0x8000_3520), Some(Geometry { start: 2, roots: 4 }));
        assert_eq!(Geometry::of_vtcr(0x8000_35d0), None, "SL0 is reserved");
        assert_eq!(Geometry::of_vtcr(0x8000_7558), None, "64 KiB tables");
        assert_eq!(Geometry::of_tcr(0x8082_3510), Some(Geometry { start: 0, roots: 1 }));
        assert_eq!(Geometry::of_tcr(0x8082_3519), Some(Geometry { start: 1, roots: 1 }));
        assert_eq!(Geometry::of_tcr(0x8082_7510), None);
    }

    #[test]
    fn levels_that_maintenance_is_for() {
        let levels = |ttl: u64| (0..=LAST).filter(|level| is_for(ttl << 44 | 7, *level)).collect::<Vec<_>>();
        assert_eq!(levels(0b0000), [0, 1, 2, 3]);
        assert_eq!(levels(0b0011), [0, 1, 2, 3], "no granule");
        assert_eq!(levels(0b0110), [2]);
        assert_eq!(levels(0b0111), [3]);
        assert_eq!(levels(0b1011), [], "16 KiB");
        assert_eq!(levels(0b1111), [], "64 KiB");
    }

    #[test]
    fn descriptors() {
        assert_eq!(kind(0x8000_4000_0003, 2), Kind::Table(0x8000_4000_0000));
        assert_eq!(kind(0x4000_0003, 3), Kind::Leaf);
        assert_eq!(kind(0x4000_0001, 2), Kind::Leaf);
        assert_eq!(kind(0x4000_0001, 3), Kind::Invalid);
        assert_eq!(kind(0x4000_0002, 2), Kind::Invalid);
        assert!(same_for_hardware(0x4000_0003, 0x4000_0ffb | 1, 2), "the number of entries");
        assert!(!same_for_hardware(0x4000_0001, 0x4000_0081, 2), "permissions");
        assert!(same_for_hardware(0x4000_0001, 0x4000_0001 | 1 << 55, 2));
        assert_eq!([0, 1, 2, 3].map(size), [1 << 39, 1 << 30, 1 << 21, 1 << 12]);
    }
}
