//! What the counter reports.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use anyhow::{Context, Result};

/// One line of the counter's report; `qemu/counter/src/lib.rs` describes them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Event {
    pub(super) kind: String,
    pub(super) fields: BTreeMap<String, u64>,
}

impl Event {
    pub(super) fn parse(line: &str) -> Result<Self> {
        let mut words = line.split(' ');
        let kind = words.next().unwrap_or_default().to_owned();
        let field = |word: &str| {
            let (key, value) = word.split_once('=')?;
            Some((key.to_owned(), value.parse().ok()?))
        };
        let fields = words.map(|word| field(word).with_context(|| format!("{word:?} in the counts")));
        Ok(Self { kind, fields: fields.collect::<Result<_>>()? })
    }

    /// A field; counters that are zero are left out of the report.
    pub(super) fn get(&self, key: &str) -> u64 {
        self.fields.get(key).copied().unwrap_or(0)
    }

    /// The sum of all fields whose key begins so.
    pub(super) fn sum(&self, prefix: &str) -> u64 {
        self.fields.iter().filter(|(key, _)| key.starts_with(prefix)).map(|(_, value)| value).sum()
    }

    /// What is counted at these exception levels together, and entries into EL2, by the names that the cost model knows.
    pub(super) fn columns(&self, levels: RangeInclusive<u8>) -> BTreeMap<&'static str, f64> {
        let all = |counter: &str| levels.clone().map(|level| self.get(&format!("el{level}.{counter}"))).sum::<u64>();
        let mut columns: BTreeMap<_, _> =
            ["instructions", "dsb", "isb", "dc_zva", "cache", "sysreg"].map(|name| (name, all(name) as f64)).into();
        let tlbi: u64 = levels.map(|level| self.sum(&format!("el{level}.tlbi."))).sum();
        columns.extend([("tlbi", tlbi as f64), ("entries", self.sum("entry.") as f64)]);
        columns
    }

    /// Sequences of TLB invalidations in stage 2: each ends with one that covers stage 1, too.
    pub(super) fn flushes(&self) -> u64 {
        ["vmalle1is", "vmalls12e1is"].map(|kind| self.get(&format!("el2.tlbi.{kind}"))).into_iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events() {
        let line = "mark number=1 cpu=0 level=1 nanoseconds=12 el2.instructions=194 el2.tlbi.vae2is=1 entry.lower64.sync=3 \
                    entry.lower64.irq=1 call.0xc4000001=2";
        let event = Event::parse(line).unwrap();
        assert_eq!(event.kind, "mark");
        assert_eq!(event.get("el2.instructions"), 194);
        assert_eq!(event.get("el2.loads"), 0);
        assert_eq!(event.sum("entry."), 4);
        let columns = event.columns(2..=2);
        assert_eq!(["instructions", "tlbi", "entries", "isb"].map(|name| columns[name]), [194.0, 1.0, 4.0, 0.0]);
        let both =
            Event::parse("mark el0.instructions=1 el1.instructions=20 el1.dsb=3 el2.dsb=4").unwrap().columns(0..=1);
        assert_eq!([both["instructions"], both["dsb"]], [21.0, 3.0]);
        assert!(Event::parse("mark number").is_err());
        assert!(Event::parse("mark number=x").is_err());
    }
}
