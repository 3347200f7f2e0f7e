//! What a guest was when it started, and what it has added since.
//!
//! The initial measurement is SHA-256 over records. All numbers are 64 bits, little-endian.
//!
//! * For each page, in the order in which the host put them there: the number of its frame, which is its guest address
//!   divided by 4096, and its contents.
//! * Last: all ones, which no frame has as its number; kind, bits of a guest address and number of vCPUs that exist; entry
//!   point; addresses of the device tree, of the interrupt controller's distributor and of its redistributors.

use ravelin_abi::VmAttributes;
use ravelin_memory::{Ipa, PAGE_SIZE};
use sha2::{Digest as _, Sha256};

use crate::Start;

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// The frame number in the last record.
const SEAL: u64 = u64::MAX;

/// An initial measurement under way.
#[derive(Clone, Debug)]
pub(crate) struct Measurement {
    hash: Sha256,
    /// Bytes that the current page has yet to have.
    missing: u64,
}

/// What the last record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seal {
    pub(crate) attributes: VmAttributes,
    /// How many vCPUs exist.
    pub(crate) vcpus: u64,
    pub(crate) start: Start,
}

impl Measurement {
    pub(crate) fn new() -> Self {
        Self { hash: Sha256::new(), missing: 0 }
    }

    /// Adds a piece of a page, which divides it. `at` is asked where the page is when the first piece of it comes.
    pub(crate) fn add(&mut self, at: impl FnOnce() -> Ipa, piece: &[u8]) {
        if self.missing == 0 {
            self.hash.update(at().page_number().to_le_bytes());
            self.missing = PAGE_SIZE;
        }
        self.hash.update(piece);
        self.missing = self.missing.saturating_sub(u64::try_from(piece.len()).unwrap_or(u64::MAX));
    }

    /// Returns the measurement of the pages so far, sealed.
    pub(crate) fn seal(&self, seal: &Seal) -> Digest {
        let &Seal { attributes, vcpus, start } = seal;
        let Start { entry, device_tree, distributor, redistributors } = start;
        let made = [SEAL, attributes.kind.code(), attributes.ipa_bits, vcpus];
        let mut hash = self.hash.clone();
        for number in made.into_iter().chain([entry, device_tree, distributor, redistributors]) {
            hash.update(number.to_le_bytes());
        }
        hash.finalize().into()
    }
}

/// How many measurements a guest may add to.
const EXTENSIBLE: usize = 4;

/// The measurements of a guest as the Realm Services Interface numbers them: 0 is the initial one, 1 to 4 are the guest's to
/// extend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Measurements {
    initial: Digest,
    extensible: [Digest; EXTENSIBLE],
}

impl Measurements {
    /// Returns those of a guest that has not run yet.
    pub(crate) const fn new(initial: Digest) -> Self {
        Self { initial, extensible: [[0; 32]; EXTENSIBLE] }
    }

    /// Returns measurement `index`, if there is one.
    pub(crate) fn get(&self, index: u64) -> Option<Digest> {
        match index.checked_sub(1) {
            None => Some(self.initial),
            Some(index) => self.extensible.get(usize::try_from(index).ok()?).copied(),
        }
    }

    /// Replaces measurement `index` by the digest of itself and `data`. Returns whether it is one of those that can be.
    pub(crate) fn extend(&mut self, index: u64, data: &[u8]) -> bool {
        let index = index.checked_sub(1).and_then(|index| usize::try_from(index).ok());
        let Some(digest) = index.and_then(|index| self.extensible.get_mut(index)) else {
            return false;
        };
        *digest = Sha256::new().chain_update(*digest).chain_update(data).finalize().into();
        true
    }
}

#[cfg(test)]
mod tests {
    use ravelin_abi::VmKind;

    use super::*;

    const SEALED: Seal = Seal {
        attributes: VmAttributes { kind: VmKind::Pkvm, ipa_bits: 40, vcpus: 4 },
        vcpus: 2,
        start: Start {
            entry: 0x8000_0000,
            device_tree: 0x8800_0000,
            distributor: 0x800_0000,
            redistributors: 0x80a_0000,
        },
    };

    fn add(measurement: &mut Measurement, at: u64, contents: &[u8; 4096], piece: usize) {
        contents.chunks(piece).for_each(|piece| measurement.add(|| Ipa::new(at).unwrap(), piece));
    }

    fn pages(pages: &[(u64, u8)]) -> Measurement {
        let mut measurement = Measurement::new();
        for &(at, byte) in pages {
            add(&mut measurement, at, &[byte; 4096], 4096);
        }
        measurement
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn a_verifier_can_compute_it() {
        let mut bytes = Vec::new();
        for (frame, byte) in [(0x8_0000_u64, 7), (0x8_0001, 9)] {
            bytes.extend(frame.to_le_bytes());
            bytes.extend([byte; 4096]);
        }
        for number in [u64::MAX, 1, 40, 2, 0x8000_0000, 0x8800_0000, 0x800_0000, 0x80a_0000] {
            bytes.extend(number.to_le_bytes());
        }
        let expected: Digest = Sha256::digest(&bytes).into();
        assert_eq!(pages(&[(0x8000_0000, 7), (0x8000_1000, 9)]).seal(&SEALED), expected);
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn pieces_do_not_matter() {
        let contents = std::array::from_fn(|index| (index % 251) as u8);
        let measured = |piece| {
            let mut measurement = Measurement::new();
            add(&mut measurement, 0x1000, &contents, piece);
            add(&mut measurement, 0x2000, &contents, piece);
            measurement.seal(&SEALED)
        };
        assert_eq!([256, 1024, 1].map(measured), [measured(4096); 3]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn everything_matters() {
        let original = pages(&[(0x1000, 1), (0x2000, 2)]).seal(&SEALED);
        let mut one_bit = Measurement::new();
        let mut contents = [1; 4096];
        contents[4095] ^= 0x80;
        add(&mut one_bit, 0x1000, &contents, 4096);
        add(&mut one_bit, 0x2000, &[2; 4096], 4096);
        assert_ne!(one_bit.seal(&SEALED), original, "contents");
        for other in [&[(0x1000, 1)][..], &[(0x2000, 2), (0x1000, 1)], &[(0x1000, 1), (0x3000, 2)], &[]] {
            assert_ne!(pages(other).seal(&SEALED), original, "{other:?}");
        }
        let VmAttributes { kind, ipa_bits, vcpus } = SEALED.attributes;
        for other in [
            Seal { start: Start { entry: SEALED.start.entry + 4, ..SEALED.start }, ..SEALED },
            Seal { start: Start { device_tree: 0, ..SEALED.start }, ..SEALED },
            Seal { start: Start { distributor: 0, ..SEALED.start }, ..SEALED },
            Seal { start: Start { redistributors: 0, ..SEALED.start }, ..SEALED },
            Seal { vcpus: 1, ..SEALED },
            Seal { attributes: VmAttributes { kind: VmKind::Realm, ipa_bits, vcpus }, ..SEALED },
            Seal { attributes: VmAttributes { kind, ipa_bits: 39, vcpus }, ..SEALED },
        ] {
            assert_ne!(pages(&[(0x1000, 1), (0x2000, 2)]).seal(&other), original, "{other:?}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn the_guest_extends_its_own() {
        let mut measurements = Measurements::new([7; 32]);
        assert_eq!(measurements.get(0), Some([7; 32]));
        for index in 1..=4 {
            assert_eq!(measurements.get(index), Some([0; 32]));
        }
        for index in [0, 5, u64::MAX] {
            assert!(!measurements.extend(index, b"data"));
        }
        assert_eq!([measurements.get(5), measurements.get(u64::MAX)], [None; 2]);
        assert_eq!(measurements, Measurements::new([7; 32]));

        assert!(measurements.extend(2, b"first"));
        assert!(measurements.extend(2, b"second"));
        let first: Digest = Sha256::digest([&[0; 32][..], b"first"].concat()).into();
        let second: Digest = Sha256::digest([&first[..], b"second"].concat()).into();
        assert_eq!(measurements.get(2), Some(second));
        assert_eq!([1, 3, 4].map(|index| measurements.get(index)), [Some([0; 32]); 3]);
    }
}
