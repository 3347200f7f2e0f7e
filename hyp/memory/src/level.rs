//! Levels of a translation table walk with the 4 KiB granule.

use crate::PAGE_SHIFT;

/// A level of the walk, numbered as the Arm ARM numbers them: 3 is the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// 512 GiB an entry; tables only.
    L0,
    /// 1 GiB an entry.
    L1,
    /// 2 MiB an entry.
    L2,
    /// 4 KiB an entry; pages only.
    L3,
}

impl Level {
    /// Returns the level's number in the architecture.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::L0 => 0,
            Self::L1 => 1,
            Self::L2 => 2,
            Self::L3 => 3,
        }
    }

    /// Returns the level below, which the tables of this level point to.
    #[must_use]
    pub const fn next(self) -> Option<Self> {
        match self {
            Self::L0 => Some(Self::L1),
            Self::L1 => Some(Self::L2),
            Self::L2 => Some(Self::L3),
            Self::L3 => None,
        }
    }

    /// Returns the binary logarithm of what one entry of this level covers, in bytes.
    #[must_use]
    pub const fn shift(self) -> u32 {
        match self {
            Self::L0 => PAGE_SHIFT + 27,
            Self::L1 => PAGE_SHIFT + 18,
            Self::L2 => PAGE_SHIFT + 9,
            Self::L3 => PAGE_SHIFT,
        }
    }

    /// Returns what one entry of this level covers, in bytes.
    #[must_use]
    pub const fn size(self) -> u64 {
        1 << self.shift()
    }

    /// Returns whether a descriptor of this level can map memory, as a block or a page. At level 0 it cannot
    /// (Arm ARM DDI 0487, D8.3.1, without FEAT_LPA2).
    #[must_use]
    pub const fn can_map(self) -> bool {
        !matches!(self, Self::L0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_architecture() {
        assert_eq!(Level::L3.size(), 4 << 10);
        assert_eq!(Level::L2.size(), 2 << 20);
        assert_eq!(Level::L1.size(), 1 << 30);
        assert_eq!(Level::L0.size(), 512 << 30);
    }

    #[test]
    fn levels_go_down_to_three() {
        let mut level = Level::L0;
        let mut numbers = vec![level.number()];
        while let Some(next) = level.next() {
            level = next;
            numbers.push(level.number());
        }
        assert_eq!(numbers, [0, 1, 2, 3]);
    }
}
