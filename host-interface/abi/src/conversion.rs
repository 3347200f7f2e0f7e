//! Conversions that a guest posts in its ring, and that the host finds in the run page.

use core::fmt::{self, Formatter};

use crate::PAGE_SIZE;

/// The most conversions at once: entries of a ring, and of the list in the run page.
pub const MAX_CONVERSIONS: usize = 64;

/// The most pages of one: 2 MiB.
pub const MAX_CONVERSION_PAGES: u64 = 512;

/// In the word of a conversion: the pages are to be the guest's alone again. If not set, they are to be offered to the host.
pub const CONVERSION_UNSHARE: u64 = 1 << 9;

/// In the word of a conversion: number of pages, less one.
pub const CONVERSION_PAGES: u64 = MAX_CONVERSION_PAGES.wrapping_sub(1);

/// In the word of a conversion: address of the first page.
pub const CONVERSION_ADDRESS: u64 = !PAGE_SIZE.wrapping_sub(1);

/// Offset in a ring: how many conversions the guest has posted since it has attached the ring, modulo 2^64. The guest's.
pub const RING_POSTED: usize = 0;

/// Offset in a ring: how many of them are complete, the first ones. The hypervisor's.
pub const RING_DONE: usize = 64;

/// Offset in a ring: words of conversions, that of the nth one, counted from 0, at 8 x (n mod 64) from here. The guest's.
pub const RING_ENTRIES: usize = 1024;

/// Offset in a ring: their results, in the same order: 0 or -3. The hypervisor's.
pub const RING_RESULTS: usize = 2048;

// The parts of a ring do not touch.
const _: () = {
    const LIST: usize = 8 * MAX_CONVERSIONS;
    assert!(RING_POSTED + 8 <= RING_DONE && RING_DONE + 8 <= RING_ENTRIES);
    assert!(RING_ENTRIES + LIST <= RING_RESULTS && RING_RESULTS + LIST <= 4096);
    assert!(MAX_CONVERSION_PAGES.is_power_of_two());
};

/// What a guest wants of some of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConversionRequest {
    /// Guest address of the first page.
    pub address: u64,
    /// How many pages, 1 to [`MAX_CONVERSION_PAGES`].
    pub pages: u64,
    /// Whether they are to be the guest's alone again, and not offered to the host.
    pub unshare: bool,
}

impl ConversionRequest {
    /// Returns what a word says, or `None` if bits are set that mean nothing.
    #[must_use]
    pub const fn from_word(word: u64) -> Option<Self> {
        if word & !(CONVERSION_ADDRESS | CONVERSION_UNSHARE | CONVERSION_PAGES) != 0 {
            return None;
        }
        Some(Self {
            address: word & CONVERSION_ADDRESS,
            pages: (word & CONVERSION_PAGES).wrapping_add(1),
            unshare: word & CONVERSION_UNSHARE != 0,
        })
    }

    /// Returns the word. Address and number of pages are valid.
    #[must_use]
    pub const fn word(self) -> u64 {
        let unshare = if self.unshare { CONVERSION_UNSHARE } else { 0 };
        self.address | unshare | self.pages.wrapping_sub(1) & CONVERSION_PAGES
    }
}

/// Writes the constants of the C header.
pub(crate) fn header_constants(f: &mut Formatter<'_>) -> fmt::Result {
    writeln!(f, "\n/* Conversions: words in the run page at RAVELIN_RUN_CONVERSIONS. */")?;
    writeln!(f, "#define RAVELIN_MAX_CONVERSIONS {MAX_CONVERSIONS}")?;
    writeln!(f, "#define RAVELIN_CONVERSION_UNSHARE {CONVERSION_UNSHARE:#x}")?;
    writeln!(f, "#define RAVELIN_CONVERSION_PAGES {CONVERSION_PAGES:#x} /* less one */")?;
    writeln!(f, "#define RAVELIN_CONVERSION_ADDRESS {CONVERSION_ADDRESS:#x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_go_both_ways() {
        for (address, pages, unshare, word) in [
            (0, 1, false, 0),
            (0x8000_1000, 512, false, 0x8000_11ff),
            (0x8000_1000, 1, true, 0x8000_1200),
            (CONVERSION_ADDRESS, 3, true, 0xffff_ffff_ffff_f202),
        ] {
            let request = ConversionRequest { address, pages, unshare };
            assert_eq!(request.word(), word);
            assert_eq!(ConversionRequest::from_word(word), Some(request));
        }
        for word in [1 << 10, 1 << 11, 0x8000_1c00] {
            assert_eq!(ConversionRequest::from_word(word), None, "{word:#x}");
        }
    }
}
