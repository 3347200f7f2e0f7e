//! `cargo xtask bench`: counts what the hypervisor costs and prints it beside the targets. docs/benchmarks.md describes
//! the method.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// One line of the counting plugin's report; `qemu/counter/src/lib.rs` describes them.
#[derive(Clone, Debug, PartialEq)]
struct Event {
    kind: String,
    fields: BTreeMap<String, u64>,
}

impl Event {
    fn parse(line: &str) -> Result<Self> {
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
    fn get(&self, key: &str) -> u64 {
        self.fields.get(key).copied().unwrap_or(0)
    }

    /// The sum of all fields whose key begins so.
    fn sum(&self, prefix: &str) -> u64 {
        self.fields.iter().filter(|(key, _)| key.starts_with(prefix)).map(|(_, value)| value).sum()
    }
}

/// A number of the report.
#[derive(Clone, Debug)]
struct Number {
    name: String,
    value: f64,
    unit: &'static str,
    /// The most it should be.
    target: Option<f64>,
    /// pKVM's number, or the nearest that there is.
    pkvm: Option<f64>,
}

impl Number {
    fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, target: None, pkvm: None }
    }

    fn target(self, target: f64) -> Self {
        Self { target: Some(target), ..self }
    }

    fn pkvm(self, pkvm: f64) -> Self {
        Self { pkvm: Some(pkvm), ..self }
    }

    fn missed(&self) -> bool {
        self.target.is_some_and(|target| self.value > target)
    }
}

/// A part of the report.
#[derive(Clone, Debug)]
struct Section {
    title: String,
    numbers: Vec<Number>,
}
