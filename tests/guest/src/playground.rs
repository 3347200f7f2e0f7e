//! What random tests are about: the guest addresses, the calls, and the generator that chooses among them.

/// Guest address of the first frame.
pub const BASE: u64 = 0x9000_0000;

/// The first frames. Their pages stay what they are when the guest and its host do things at random: both convert them, and
/// neither gives them up, so that their contents are those of the start.
pub const KEPT: u64 = 8;

/// All frames that are about single pages. Behind the kept ones anything may happen.
pub const FRAMES: u64 = 40;

/// Guest address of the first of the frames that are about blocks of 2 MiB.
pub const BLOCKS_BASE: u64 = BASE + (2 << 20);

/// Frames there: two blocks.
pub const BLOCK_FRAMES: u64 = 1024;

/// Guest address of pages that the guest says are devices'.
pub const DEVICES: u64 = BASE + (64 << 20);

/// How many there are.
pub const DEVICE_FRAMES: u64 = 16;

/// Frames from the first one on, in which all of these are.
pub const SPAN: u64 = 1 << 15;

/// How a call may end: done; an error; NOT_SUPPORTED; an exception.
pub const OUTCOMES: [&str; 4] = ["SUCCESS", "REFUSED", "NOT_SUPPORTED", "ABORTED"];

/// What a guest does, and the function identifiers of what is a call. The first [`CALLS_OF_PKVM`] are those of pKVM's guests,
/// the next [`CALLS_OF_REALMS`] are those of realms, then come those of all guests, and two that are no calls.
pub const CALLS: [(&str, u64); 22] = [
    ("GUEST_MEM_SHARE", 0xc600_0003),
    ("GUEST_MEM_UNSHARE", 0xc600_0004),
    ("GUEST_MEM_RELINQUISH", 0xc600_0009),
    ("GUEST_HYP_MEMINFO", 0xc600_0002),
    ("GUEST_MMIO_GUARD", 0xc600_0007),
    ("GUEST_FEATURES", 0x8600_0000),
    ("GUEST_UID", 0x8600_ff01),
    ("RSI_IPA_STATE_SET_EMPTY", 0xc400_0197),
    ("RSI_IPA_STATE_SET_RAM", 0xc400_0197),
    ("RSI_IPA_STATE_GET", 0xc400_0198),
    ("RSI_HOST_CALL", 0xc400_0199),
    ("RSI_MEASUREMENT_READ", 0xc400_0192),
    ("RSI_MEASUREMENT_EXTEND", 0xc400_0193),
    ("RSI_REALM_CONFIG", 0xc400_0196),
    ("RSI_ABI_VERSION", 0xc400_0190),
    ("RSI_FEATURES", 0xc400_0191),
    ("GUEST_PSCI", 0x8400_0000),
    ("GUEST_SMCCC", 0x8000_0000),
    ("GUEST_TRNG", 0x8400_0050),
    ("GUEST_UNKNOWN", 0xc600_0100),
    ("GUEST_LOAD", 0),
    ("GUEST_STORE", 0),
];

/// How many of [`CALLS`] are pKVM's.
pub const CALLS_OF_PKVM: usize = 7;

/// How many of [`CALLS`] are those of the Realm Services Interface.
pub const CALLS_OF_REALMS: usize = 9;

/// How many of [`CALLS`] are no calls, the last ones.
pub const ACCESSES: usize = 2;

/// A generator of test values (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The generator that a seed begins; any number does.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        // Neighbours have nothing in common, and it is not 0.
        Self((seed ^ seed >> 31).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Returns the next value.
    pub const fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Returns a value below `end`, which is not 0.
    pub const fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    /// Returns whether something that happens once in `times` does.
    pub const fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// Returns one of the values.
    pub const fn one_of<T: Copy, const N: usize>(&mut self, values: [T; N]) -> T {
        values[self.below(N as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_its_neighbour_differs() {
        let values = |seed| {
            let mut random = Random::new(seed);
            [(); 8].map(|()| random.next())
        };
        assert_eq!(values(7), values(7));
        for seed in [0, 1, u64::MAX - 1] {
            assert_ne!(values(seed), values(seed.wrapping_add(1)));
        }
    }

    #[test]
    fn everything_is_chosen() {
        let mut random = Random::new(0);
        let mut seen = [false; 10];
        for _ in 0..200 {
            seen[random.below(10) as usize] = true;
        }
        assert_eq!(seen, [true; 10]);
    }
}
