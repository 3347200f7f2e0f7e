//! Entropy for guests: the Arm True Random Number Generator Firmware Interface 1.0 (Arm DEN0098).

use crate::{
    Context,
    guest::{self, NOT_SUPPORTED},
};

/// The most bits that a source gives at once.
pub const MAX_BITS: u64 = 192;

/// A source of true random numbers: that of the firmware, or the CPU's RNDR.
pub trait EntropySource {
    /// Returns [`MAX_BITS`] fresh bits, or `None` if there are none right now or there is no source at all; it does not wait
    /// for them.
    fn bits(&self) -> Option<[u64; 3]>;

    /// Returns whether there is a source.
    fn exists(&self) -> bool;
}

const VERSION: u32 = 0x8400_0050;
const FEATURES: u32 = 0x8400_0051;
const GET_UUID: u32 = 0x8400_0052;
const RND_32: u32 = 0x8400_0053;
const RND_64: u32 = 0xc400_0053;

/// Version 1.0.
const VERSION_1_0: u64 = 1 << 16;

/// Names this implementation: 6f0a3c52-94d1-4e7b-8a26-d15b0c7e94f3, four bytes a register, the first of them lowest.
const UUID: [u64; 4] = [0x523c_0a6f, 0x7b4e_d194, 0x5bd1_268a, 0xf394_7e0c];

const INVALID_PARAMETERS: u64 = u64::MAX - 1;
const NO_ENTROPY: u64 = u64::MAX - 2;

/// Answers a guest's call, if it is one of this interface. The caller goes on behind the instruction.
pub fn call(source: &impl EntropySource, context: &mut Context) -> bool {
    let function = guest::function(context);
    let [_, argument, ..] = context.x;
    if !is_call(function) {
        return false;
    }
    match function {
        _ if !source.exists() => context.set_results([NOT_SUPPORTED]),
        VERSION => context.set_results([VERSION_1_0]),
        FEATURES => {
            let known = u32::try_from(argument & 0xffff_ffff).is_ok_and(is_call);
            context.set_results([if known { 0 } else { NOT_SUPPORTED }]);
        }
        GET_UUID => context.set_results(UUID),
        RND_32 => context.set_results(random(source, argument & 0xffff_ffff, 32)),
        _ => context.set_results(random(source, argument, 64)),
    }
    true
}

const fn is_call(function: u32) -> bool {
    matches!(function, VERSION | FEATURES | GET_UUID | RND_32 | RND_64)
}

/// Returns `bits` random bits in x1 to x3, `width` bits a register: the lowest in x3, and zeroes above.
fn random(source: &impl EntropySource, bits: u64, width: u64) -> [u64; 4] {
    if bits == 0 || bits > width.saturating_mul(3) {
        return [INVALID_PARAMETERS, 0, 0, 0];
    }
    let Some(words) = source.bits() else {
        return [NO_ENTROPY, 0, 0, 0];
    };
    let [low, middle, high] = words;
    let keep = |word: u64, position: u64| {
        let wanted = bits.saturating_sub(width.saturating_mul(position)).min(width);
        let unwanted = u64::from(u64::BITS).saturating_sub(wanted);
        u32::try_from(unwanted).ok().and_then(|unwanted| u64::MAX.checked_shr(unwanted)).map_or(0, |mask| word & mask)
    };
    [0, keep(high, 2), keep(middle, 1), keep(low, 0)]
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Gives words of ones, as often as it says.
    struct Source {
        exists: bool,
        left: Cell<u32>,
    }

    impl Source {
        const fn new(exists: bool, left: u32) -> Self {
            Self { exists, left: Cell::new(left) }
        }
    }

    impl EntropySource for Source {
        fn bits(&self) -> Option<[u64; 3]> {
            self.left.set(self.left.get().checked_sub(1)?);
            Some([u64::MAX; 3])
        }

        fn exists(&self) -> bool {
            self.exists
        }
    }

    fn answer(source: &Source, function: u64, argument: u64) -> Option<[u64; 4]> {
        let mut context = Context { x: [7; 31], ..Context::default() };
        (context.x[0], context.x[1]) = (function, argument);
        let taken = call(source, &mut context);
        assert_eq!(context.x[4..], [7; 27]);
        taken.then_some([context.x[0], context.x[1], context.x[2], context.x[3]])
    }

    #[test]
    fn without_a_source_nothing_is_supported() {
        let source = Source::new(false, 1);
        for function in [0x8400_0050, 0x8400_0051, 0x8400_0052, 0x8400_0053, 0xc400_0053] {
            assert_eq!(answer(&source, function, 0x8400_0053).unwrap()[0], u64::MAX);
        }
    }

    #[test]
    fn other_calls_are_not_touched() {
        let source = Source::new(true, 1);
        for function in [0, 0x8400_004f, 0x8400_0054, 0xc400_0050, 0xc400_0052, u64::MAX] {
            assert_eq!(answer(&source, function, 1), None, "{function:#x}");
        }
    }

    #[test]
    fn discovery() {
        let source = Source::new(true, 0);
        assert_eq!(answer(&source, 0x8400_0050, 0).unwrap()[0], 0x10000);
        for function in [0x8400_0050, 0x8400_0051, 0x8400_0052, 0x8400_0053, 0xc400_0053] {
            assert_eq!(answer(&source, 0x8400_0051, function).unwrap()[0], 0);
        }
        assert_eq!(answer(&source, 0x8400_0051, 0x8400_0054).unwrap()[0], u64::MAX);
        let uuid = answer(&source, 0x8400_0052, 0).unwrap();
        let hex: String = uuid
            .iter()
            .flat_map(|&word| u32::try_from(word).unwrap().to_le_bytes())
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, "6f0a3c52-94d1-4e7b-8a26-d15b0c7e94f3".replace('-', ""));
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn as_many_bits_as_asked_for() {
        let source = Source::new(true, u32::MAX);
        for (function, width) in [(0x8400_0053, 32), (0xc400_0053, 64)] {
            for bits in 1..=3 * width {
                let [status, high, middle, low] = answer(&source, function, bits).unwrap();
                assert_eq!(status, 0);
                let ones = [low, middle, high].map(|word| u64::from(word.count_ones()));
                let expected = [0, 1, 2].map(|position| bits.saturating_sub(position * width).min(width));
                assert_eq!(ones, expected);
                for (word, ones) in [low, middle, high].into_iter().zip(ones) {
                    assert_eq!(u64::from(word.trailing_ones()), ones);
                }
            }
            for bits in [0, 3 * width + 1, u64::MAX] {
                assert_eq!(answer(&source, function, bits).unwrap()[0], u64::MAX - 1);
            }
        }
        // A 32-bit call has 32-bit arguments.
        assert_eq!(answer(&source, 0x8400_0053, 1 << 32 | 1).unwrap(), [0, 0, 0, 1]);
    }

    #[test]
    fn a_dry_source_says_so() {
        let source = Source::new(true, 1);
        assert_eq!(answer(&source, 0xc400_0053, 64).unwrap(), [0, 0, 0, u64::MAX]);
        assert_eq!(answer(&source, 0xc400_0053, 64).unwrap(), [u64::MAX - 2, 0, 0, 0]);
        // Wrong arguments cost no entropy.
        assert_eq!(answer(&source, 0xc400_0053, 0).unwrap()[0], u64::MAX - 1);
    }
}
