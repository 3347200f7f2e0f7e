//! The QEMU machines of `qemu/machines/*.toml`.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::workspace;

/// A machine as data; options of the command line replace its CPU, number of CPUs and memory.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Machine {
    /// QEMU's `-machine`, without `virtualization`.
    pub(crate) machine: String,
    /// QEMU's `-cpu`.
    pub(crate) cpu: String,
    /// Number of CPUs.
    pub(crate) smp: u32,
    /// Size of RAM as QEMU's `-m` takes it.
    pub(crate) memory: String,
    /// Address of the start of RAM.
    pub(crate) ram_base: u64,
    /// The host's console device, for `console=`.
    pub(crate) console: String,
    /// Further QEMU arguments.
    #[serde(default)]
    pub(crate) args: Vec<String>,
}

impl Machine {
    /// Reads the machine of that name.
    pub(crate) fn load(name: &str) -> Result<Self> {
        ensure!(!name.contains(['/', '\\']), "{name}: a machine's name is that of a file in qemu/machines");
        let dir = workspace::root().join("qemu/machines");
        let path = dir.join(name).with_added_extension("toml");
        let Ok(text) = fs::read_to_string(&path) else {
            let mut known: Vec<_> = fs::read_dir(&dir)
                .with_context(|| format!("cannot list {}", dir.display()))?
                .flatten()
                .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".toml")?.to_owned()))
                .collect();
            known.sort();
            bail!("no machine {name} in qemu/machines; there are: {}", known.join(", "));
        };
        toml::from_str(&text).with_context(|| format!("{}", path.display()))
    }

    /// Size of RAM in bytes.
    pub(crate) fn memory_bytes(&self) -> Result<u64> {
        parse_size(&self.memory)
    }
}

/// Parses a size as QEMU's `-m` takes it: a number with `M` or `G`, without a suffix in MiB.
pub(crate) fn parse_size(text: &str) -> Result<u64> {
    let (digits, shift) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 30),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 20),
    };
    let number: u64 = digits.parse().with_context(|| format!("{text}: not a size such as 512M or 2G"))?;
    ensure!((1..1 << 20).contains(&number), "{text}: not a sensible size of RAM");
    Ok(number << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512M").unwrap(), 512 << 20);
        assert_eq!(parse_size("8G").unwrap(), 8 << 30);
        assert_eq!(parse_size("64").unwrap(), 64 << 20);
        for bad in ["", "G", "1.5G", "-1M", "0G", "2T", "99999999999999999999G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_machine_of_the_repository_loads() {
        let mut count = 0;
        for entry in fs::read_dir(workspace::root().join("qemu/machines")).unwrap().flatten() {
            if let Some(name) = entry.file_name().to_str().unwrap().strip_suffix(".toml") {
                let machine = Machine::load(name).unwrap();
                assert!(machine.memory_bytes().unwrap() >= 512 << 20);
                count += 1;
            }
        }
        assert!(count > 0);
        assert!(Machine::load("nonsuch").unwrap_err().to_string().contains("virt"));
        assert!(Machine::load("../virt").is_err());
    }
}
