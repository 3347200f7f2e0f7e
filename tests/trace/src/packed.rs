//! Records in 16 bytes each.

use crate::{Barrier, Dsb, Hint, MemOrder, Record, Sysreg, TlbiOp};

const CODE_SHIFT: u32 = 56;
const TID_SHIFT: u32 = 48;
const ADDRESS: u64 = (1 << TID_SHIFT) - 1;

// The first code of each kind; those that follow count through the kind's enumeration.
const MEM_INIT: u8 = 0;
const MEM_FREE: u8 = 1;
const LOCK: u8 = 2;
const UNLOCK: u8 = 3;
const ISB: u8 = 4;
const HINT: u8 = 0x10;
const MEM_WRITE: u8 = 0x20;
const DSB: u8 = 0x30;
const TLBI: u8 = 0x40;
const RANGE_TLBI: u8 = 0x50;
const SYSREG: u8 = 0x60;

/// A record of a CPU, or a TLB operation on a range of pages: kind, CPU and a 48-bit address in the first word, a value in
/// the second. It has no number: the order of the stream is what counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed(pub [u64; 2]);

/// A first word of no known kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a record of unknown kind: {0:#x}")]
pub struct Unknown(u64);

/// Returns the code of the `one` of `all`; there are at most 16.
fn code<T: PartialEq>(first: u8, all: &[T], one: &T) -> u8 {
    let index = all.iter().position(|other| other == one).unwrap_or_default();
    first | u8::try_from(index).unwrap_or_default()
}

/// Returns what [`code`] stands for.
fn one<T: Copy>(all: &[T], code: u8) -> Option<T> {
    all.get(usize::from(code & 0xf)).copied()
}

impl Packed {
    /// Size of a record in bytes.
    pub const SIZE: usize = 16;

    fn new(code: u8, tid: u8, address: u64, value: u64) -> Self {
        Self([u64::from(code) << CODE_SHIFT | u64::from(tid) << TID_SHIFT | address & ADDRESS, value])
    }

    /// Packs what CPU `tid` did. Bits of addresses above the 48th are lost.
    #[must_use]
    pub fn of(tid: u8, record: Record) -> Self {
        let (code, address, value) = match record {
            Record::MemInit { address, size } => (MEM_INIT, address, size),
            Record::MemFree { address, size } => (MEM_FREE, address, size),
            Record::Hint { kind, location, value } => (code(HINT, Hint::ALL, &kind), location, value),
            Record::Lock(address) => (LOCK, address, 0),
            Record::Unlock(address) => (UNLOCK, address, 0),
            Record::MemWrite { order, address, value } => (code(MEM_WRITE, MemOrder::ALL, &order), address, value),
            Record::Barrier(Barrier::Isb) => (ISB, 0, 0),
            Record::Barrier(Barrier::Dsb(kind)) => (code(DSB, Dsb::ALL, &kind), 0, 0),
            Record::Tlbi { op, operand } => (code(TLBI, TlbiOp::ALL, &op), 0, operand),
            Record::SysregWrite { register, value } => (code(SYSREG, Sysreg::ALL, &register), 0, value),
        };
        Self::new(code, tid, address, value)
    }

    /// Packs the range form of `op` with this operand, TG = 4 KiB (FEAT_TLBIRANGE; Arm ARM DDI 0487, C5.5
    /// "TLBI RIPAS2E1IS"): (NUM + 1) * 2^(5 * SCALE + 1) pages from page number BaseADDR on, of the level TTL if that is not 0.
    /// With another TG it is no record.
    #[must_use]
    pub fn of_range(tid: u8, op: TlbiOp, operand: u64) -> Self {
        const TG_4K: u64 = 0b01;
        let field = |shift: u32, bits: u64| (operand >> shift) & bits;
        let (granule, scale, num, ttl) = (field(46, 0b11), field(44, 0b11), field(39, 0x1f), field(37, 0b11));
        let shift = u32::try_from(scale).unwrap_or_default().saturating_mul(5).saturating_add(1);
        let pages = if granule == TG_4K { num.saturating_add(1).wrapping_shl(shift) } else { 0 };
        // As in the operand for one page, where it names the granule, too.
        let ttl = if ttl == 0 { 0 } else { TG_4K << 2 | ttl };
        let first = operand & ((1 << 37) - 1) | ttl << 44;
        Self::new(code(RANGE_TLBI, TlbiOp::ALL, &op), tid, first, pages)
    }

    /// Returns the bytes, little-endian.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let [first, second] = self.0;
        (u128::from(second) << 64 | u128::from(first)).to_le_bytes()
    }

    /// Returns the record of these bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        let both = u128::from_le_bytes(bytes);
        let word = |bits: u128| u64::try_from(bits & u128::from(u64::MAX)).unwrap_or_default();
        Self([word(both), word(both >> 64)])
    }

    /// Returns the CPU.
    #[must_use]
    pub fn tid(self) -> u8 {
        u8::try_from((self.0[0] >> TID_SHIFT) & 0xff).unwrap_or_default()
    }

    /// Returns the record, or one for each page if it is about a range.
    ///
    /// # Errors
    ///
    /// [`Unknown`] if no record is packed like that.
    pub fn records(self) -> Result<Records, Unknown> {
        let [first, value] = self.0;
        let (byte, address) = (u8::try_from(first >> CODE_SHIFT).unwrap_or_default(), first & ADDRESS);
        let record = match (byte & 0xf0, byte) {
            (_, MEM_INIT) => Some(Record::MemInit { address, size: value }),
            (_, MEM_FREE) => Some(Record::MemFree { address, size: value }),
            (_, LOCK) => Some(Record::Lock(address)),
            (_, UNLOCK) => Some(Record::Unlock(address)),
            (_, ISB) => Some(Record::Barrier(Barrier::Isb)),
            (HINT, _) => one(Hint::ALL, byte).map(|kind| Record::Hint { kind, location: address, value }),
            (MEM_WRITE, _) => one(MemOrder::ALL, byte).map(|order| Record::MemWrite { order, address, value }),
            (DSB, _) => one(Dsb::ALL, byte).map(|kind| Record::Barrier(Barrier::Dsb(kind))),
            (TLBI, _) => one(TlbiOp::ALL, byte).map(|op| Record::Tlbi { op, operand: value }),
            (RANGE_TLBI, _) => one(TlbiOp::ALL, byte).map(|op| Record::Tlbi { op, operand: address }),
            (SYSREG, _) => one(Sysreg::ALL, byte).map(|register| Record::SysregWrite { register, value }),
            _ => None,
        };
        let left = if byte & 0xf0 == RANGE_TLBI { value } else { 1 };
        record.filter(|_| left != 0).map(|next| Records { next, left }).ok_or(Unknown(first))
    }
}

/// The records that one [`Packed`] stands for.
#[derive(Clone, Debug)]
pub struct Records {
    next: Record,
    left: u64,
}

impl Iterator for Records {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        self.left = self.left.checked_sub(1)?;
        let record = self.next;
        if let Record::Tlbi { operand, .. } = &mut self.next {
            *operand = operand.wrapping_add(1);
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Record> {
        let (address, value) = (0x8000_4023_f000, 0xfedc_ba98_7654_3210);
        let mut all = vec![
            Record::MemInit { address, size: 0x1000 },
            Record::MemFree { address, size: 0x2000 },
            Record::Lock(address),
            Record::Unlock(address),
            Record::Barrier(Barrier::Isb),
        ];
        all.extend(Hint::ALL.iter().map(|&kind| Record::Hint { kind, location: address, value }));
        all.extend(MemOrder::ALL.iter().map(|&order| Record::MemWrite { order, address, value }));
        all.extend(Dsb::ALL.iter().map(|&kind| Record::Barrier(Barrier::Dsb(kind))));
        all.extend(TlbiOp::ALL.iter().map(|&op| Record::Tlbi { op, operand: value }));
        all.extend(Sysreg::ALL.iter().map(|&register| Record::SysregWrite { register, value }));
        all
    }

    #[test]
    fn records_come_out_as_they_went_in() {
        for record in all() {
            let packed = Packed::from_bytes(Packed::of(200, record).to_bytes());
            assert_eq!(packed.tid(), 200);
            assert_eq!(packed.records().unwrap().collect::<Vec<_>>(), [record]);
        }
    }

    #[test]
    fn ranges_are_written_out_as_pages() {
        // SCALE = 1, NUM = 2: 3 * 2^6 pages.
        let packed = Packed::of_range(1, TlbiOp::Ipas2le1is, 1 << 46 | 1 << 44 | 2 << 39 | 0x4_0000);
        let pages: Vec<_> = packed.records().unwrap().collect();
        assert_eq!(pages.len(), 192);
        assert_eq!(pages[0], Record::Tlbi { op: TlbiOp::Ipas2le1is, operand: 0x4_0000 });
        assert_eq!(pages[191], Record::Tlbi { op: TlbiOp::Ipas2le1is, operand: 0x4_00bf });
    }

    #[test]
    fn ranges_of_one_level() {
        let packed = |operand| Packed::of_range(1, TlbiOp::Vae2is, operand);
        let pages: Vec<_> = packed(1 << 46 | 0b10 << 37 | 0x1f_ffff_ffff).records().unwrap().collect();
        assert_eq!(pages[0], Record::Tlbi { op: TlbiOp::Vae2is, operand: 0b0110 << 44 | 0x1f_ffff_ffff });
        for other_granule in [0, 0b10, 0b11] {
            assert!(packed(other_granule << 46 | 0x4_0000).records().is_err());
        }
    }

    #[test]
    fn unknown_kinds_are_refused() {
        for code in [0x05_u64, 0x14, 0x22, 0x34, 0x49, 0x59, 0x67, 0x70, 0xff] {
            assert!(Packed([code << 56, 0]).records().is_err(), "{code:#x}");
        }
    }
}
