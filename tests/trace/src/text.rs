//! Records as text, one a line.

use core::{fmt, str::FromStr};

use crate::{Barrier, Dsb, Hint, MemOrder, Record, Sysreg, TlbiOp};

/// A record with its place in the trace. As text:
///
/// ```
/// use ravelin_trace::{Entry, Record};
///
/// let entry = Entry { id: 5, tid: 0, record: Record::MemInit { address: 0x4023_f000, size: 0x1000 } };
/// assert_eq!(entry.to_string(), "(mem-init (id 5) (tid 0) (address 4023f000) (size 1000))");
/// assert_eq!(entry.to_string().parse(), Ok(entry));
/// ```
///
/// Number and CPU are decimal, all else is hexadecimal without a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The number of the record. Those of a trace rise by one.
    pub id: u64,
    /// The index of the CPU.
    pub tid: u8,
    /// What it did.
    pub record: Record,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, tid, record } = self;
        let name = record.name();
        write!(f, "({name} (id {id}) (tid {tid}) ")?;
        match *record {
            Record::MemInit { address, size } | Record::MemFree { address, size } => {
                write!(f, "(address {address:x}) (size {size:x})")
            }
            Record::Hint { kind, location, value } => {
                write!(f, "(kind {}) (location {location:x}) (value {value:x})", kind.name())
            }
            Record::Lock(address) | Record::Unlock(address) => write!(f, "(address {address:x})"),
            Record::MemWrite { order, address, value } => {
                write!(f, "(mem-order {}) (address {address:x}) (value {value:x})", order.name())
            }
            Record::Barrier(Barrier::Dsb(kind)) => write!(f, "dsb (kind {})", kind.name()),
            Record::Barrier(Barrier::Isb) => f.write_str("isb"),
            Record::Tlbi { op, operand } if op.has_operand() => write!(f, "{} (value {operand:x})", op.name()),
            Record::Tlbi { op, .. } => f.write_str(op.name()),
            Record::SysregWrite { register, value } => {
                write!(f, "(sysreg {}) (value {value:x})", register.name())
            }
        }?;
        f.write_str(")")
    }
}

/// A line that is no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a record of a trace")]
pub struct NotARecord;

impl FromStr for Entry {
    type Err = NotARecord;

    fn from_str(line: &str) -> Result<Self, NotARecord> {
        Line(line.trim()).entry().ok_or(NotARecord)
    }
}

/// What is left of a line.
struct Line<'a>(&'a str);

impl<'a> Line<'a> {
    fn entry(&mut self) -> Option<Entry> {
        self.skip("(")?;
        let name = self.word()?;
        let id = self.number("id", 10)?;
        let tid = self.number("tid", 10)?.try_into().ok()?;
        let record = match name {
            "mem-init" => Record::MemInit { address: self.hex("address")?, size: self.hex("size")? },
            "mem-free" => Record::MemFree { address: self.hex("address")?, size: self.hex("size")? },
            "hint" => Record::Hint {
                kind: Hint::from_name(self.field("kind")?)?,
                location: self.hex("location")?,
                value: self.hex("value")?,
            },
            "lock" => Record::Lock(self.hex("address")?),
            "unlock" => Record::Unlock(self.hex("address")?),
            "mem-write" => Record::MemWrite {
                order: MemOrder::from_name(self.field("mem-order")?)?,
                address: self.hex("address")?,
                value: self.hex("value")?,
            },
            "barrier" => Record::Barrier(match self.word()? {
                "dsb" => Barrier::Dsb(Dsb::from_name(self.field("kind")?)?),
                "isb" => Barrier::Isb,
                _ => return None,
            }),
            "tlbi" => {
                let op = TlbiOp::from_name(self.word()?)?;
                Record::Tlbi { op, operand: if op.has_operand() { self.hex("value")? } else { 0 } }
            }
            "sysreg-write" => {
                Record::SysregWrite { register: Sysreg::from_name(self.field("sysreg")?)?, value: self.hex("value")? }
            }
            _ => return None,
        };
        self.skip(")")?;
        self.0.is_empty().then_some(Entry { id, tid, record })
    }

    fn skip(&mut self, text: &str) -> Option<()> {
        self.0 = self.0.strip_prefix(text)?;
        Some(())
    }

    /// Takes what comes before the next space or parenthesis, and spaces around it.
    fn word(&mut self) -> Option<&'a str> {
        self.0 = self.0.trim_start();
        let end = self.0.find([' ', '(', ')'])?;
        let (word, rest) = self.0.split_at_checked(end)?;
        self.0 = rest.trim_start();
        (!word.is_empty()).then_some(word)
    }

    /// Takes `(name text)` and returns the text.
    fn field(&mut self, name: &str) -> Option<&'a str> {
        self.0 = self.0.trim_start();
        self.skip("(")?;
        if self.word()? != name {
            return None;
        }
        let text = self.word()?;
        self.skip(")")?;
        Some(text)
    }

    fn hex(&mut self, name: &str) -> Option<u64> {
        self.number(name, 16)
    }

    fn number(&mut self, name: &str, radix: u32) -> Option<u64> {
        // What has a sign is a number to the library, too.
        let digits = self.field(name).filter(|text| text.chars().all(|digit| digit.is_digit(radix)))?;
        u64::from_str_radix(digits, radix).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(record: Record) -> String {
        let entry = Entry { id: 7, tid: 3, record };
        assert_eq!(entry.to_string().parse(), Ok(entry));
        entry.to_string()
    }

    #[test]
    fn the_text_is_as_other_checkers_want_it() {
        let page = Record::MemInit { address: 0x4023_f000, size: 0x1000 };
        assert_eq!(text(page), "(mem-init (id 7) (tid 3) (address 4023f000) (size 1000))");
        let page = Record::MemFree { address: 0x4023_f000, size: 0x1000 };
        assert_eq!(text(page), "(mem-free (id 7) (tid 3) (address 4023f000) (size 1000))");
        let hint = Record::Hint { kind: Hint::SetRootLock, location: 0x1000, value: 0xab };
        assert_eq!(text(hint), "(hint (id 7) (tid 3) (kind set_root_lock) (location 1000) (value ab))");
        assert_eq!(text(Record::Lock(0xab)), "(lock (id 7) (tid 3) (address ab))");
        assert_eq!(text(Record::Unlock(0xab)), "(unlock (id 7) (tid 3) (address ab))");
        let write = Record::MemWrite { order: MemOrder::Plain, address: 0x1008, value: 0x2003 };
        assert_eq!(text(write), "(mem-write (id 7) (tid 3) (mem-order plain) (address 1008) (value 2003))");
        let dsb = Record::Barrier(Barrier::Dsb(Dsb::Ishst));
        assert_eq!(text(dsb), "(barrier (id 7) (tid 3) dsb (kind ishst))");
        assert_eq!(text(Record::Barrier(Barrier::Isb)), "(barrier (id 7) (tid 3) isb)");
        let tlbi = Record::Tlbi { op: TlbiOp::Ipas2e1is, operand: 0x40 };
        assert_eq!(text(tlbi), "(tlbi (id 7) (tid 3) ipas2e1is (value 40))");
        let tlbi = Record::Tlbi { op: TlbiOp::Vmalle1is, operand: 0 };
        assert_eq!(text(tlbi), "(tlbi (id 7) (tid 3) vmalle1is)");
        let sysreg = Record::SysregWrite { register: Sysreg::VttbrEl2, value: 0x1_0000_4000_0000 };
        assert_eq!(text(sysreg), "(sysreg-write (id 7) (tid 3) (sysreg vttbr_el2) (value 1000040000000))");
    }

    #[test]
    fn other_lines_are_no_records() {
        for line in [
            "",
            "(",
            "(lock)",
            "(lock (id 1) (tid 0) (address ab)",
            "(lock (id 1) (tid 0) (address ab)) ",
            "(lock (id 1) (tid 0) (address xyz))",
            "(lock (id a) (tid 0) (address ab))",
            "(lock (id +1) (tid 0) (address ab))",
            "(lock (id 1) (tid +0) (address ab))",
            "(lock (id 1) (tid 256) (address ab))",
            "(lock (id 1) (tid 0) (address +ab))",
            "(lock (tid 0) (id 1) (address ab))",
            "(lock (id 1) (tid 0) (address ab))x",
            "(tlbi (id 1) (tid 0) vae2is)",
            "(tlbi (id 1) (tid 0) vmalle1is (value 0))",
            "(barrier (id 1) (tid 0) dmb (kind ish))",
        ] {
            // Space around the line does not matter.
            assert_eq!(line.parse::<Entry>().is_ok(), line.ends_with(' '), "{line}");
        }
    }

    fn any_entry() -> impl Strategy<Value = Entry> {
        let packed = (0_u64..0x70, any::<u64>(), any::<u64>());
        let record = packed.prop_filter_map("a kind of record", |(code, first, second)| {
            crate::Packed([code << 56 | first >> 8, second]).records().ok()?.next()
        });
        (any::<u64>(), any::<u8>(), record).prop_map(|(id, tid, record)| Entry { id, tid, record })
    }

    /// What may differ between two lines that say the same.
    fn without_spaces_and_zeroes(line: &str) -> String {
        line.chars().filter(|character| !matches!(character, ' ' | '0')).collect()
    }

    proptest! {
        #[test]
        fn a_line_with_an_error_is_refused_or_read_as_what_it_says(
            entry in any_entry(),
            at in any::<prop::sample::Index>(),
            deleted in 0..2_usize,
            inserted in "[()a-z0-9 _+-]{0,1}",
        ) {
            let mut line = entry.to_string();
            prop_assert_eq!(line.parse::<Entry>().map(|entry| entry.to_string()), Ok(line.clone()));
            let at = at.index(line.len());
            line.replace_range(at..at + deleted, &inserted);
            if let Ok(entry) = line.parse::<Entry>() {
                prop_assert_eq!(without_spaces_and_zeroes(&entry.to_string()), without_spaces_and_zeroes(&line));
            }
        }
    }
}
