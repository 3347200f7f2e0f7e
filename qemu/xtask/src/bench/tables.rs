//! Walks translation tables in the memory of a machine, to see how many descriptors a CPU reads that has nothing cached.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::event::Event;

/// Entries of a table, with the 4 KiB granule.
const ENTRIES: u64 = 512;

/// HCR_EL2.VM: the host's addresses are translated by stage 2.
const STAGE2_IS_ON: u64 = 1;

/// Bits of a descriptor, or of a base register, that are an address.
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// RAM of a machine.
pub(super) struct Ram {
    file: File,
    base: u64,
    size: u64,
}

impl Ram {
    /// RAM that QEMU keeps in a file.
    pub(super) fn open(path: &Path, base: u64) -> Result<Self> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let size = file.metadata()?.len();
        Ok(Self { file, base, size })
    }

    fn word(&self, address: u64) -> Result<u64> {
        let mut word = [0; 8];
        let offset = address.checked_sub(self.base).with_context(|| format!("{address:#x} is not in RAM"))?;
        self.file.read_exact_at(&mut word, offset).with_context(|| format!("{address:#x} is not in RAM"))?;
        Ok(u64::from_le_bytes(word))
    }
}

/// Tables of a stage of translation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tables {
    root: u64,
    /// Level of the root, 0 to 3.
    pub(super) start: u32,
    /// Bits of an input address.
    bits: u32,
}

/// An address range that one descriptor maps.
struct Leaf<'a> {
    level: u32,
    /// The output address.
    address: u64,
    /// The addresses of the tables on the way, the root's first.
    path: &'a [u64],
}

/// Number of descriptors that are read to translate an address, for all that are mapped by leaves of one level.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Reads {
    pub(super) least: u64,
    pub(super) most: u64,
    sum: u64,
    pub(super) leaves: u64,
}

impl Reads {
    pub(super) fn mean(&self) -> f64 {
        self.sum as f64 / self.leaves as f64
    }

    fn add(&mut self, reads: u64) {
        self.least = if self.leaves == 0 { reads } else { self.least.min(reads) };
        self.most = self.most.max(reads);
        self.sum += reads;
        self.leaves += 1;
    }
}

/// What a stage 2 maps of RAM, by level: bytes, and the number of tables, without the root.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Usage {
    pub(super) bytes: [u64; 4],
    pub(super) tables: u64,
}

impl Tables {
    /// The host's stage 2, if it has one, from the counter's event `tables`.
    pub(super) fn stage2(registers: &Event) -> Result<Option<Self>> {
        if registers.get("hcr_el2") & STAGE2_IS_ON == 0 {
            return Ok(None);
        }
        let vtcr = registers.get("vtcr_el2");
        ensure!(vtcr >> 14 & 3 == 0, "VTCR_EL2 {vtcr:#x}: not the 4 KiB granule");
        let start = match vtcr >> 6 & 3 {
            0 => 2,
            1 => 1,
            2 => 0,
            _ => 3,
        };
        Ok(Some(Self { root: registers.get("vttbr_el2") & ADDRESS, start, bits: 64 - (vtcr & 63) as u32 }))
    }

    /// Stage 1 of the process that runs, from the same event.
    pub(super) fn process(registers: &Event) -> Result<Self> {
        let tcr = registers.get("tcr_el1");
        ensure!(tcr >> 14 & 3 == 0, "TCR_EL1 {tcr:#x}: not the 4 KiB granule");
        let bits = 64 - (tcr & 63) as u32;
        ensure!((22..=48).contains(&bits), "TCR_EL1 {tcr:#x}: {bits} bits");
        // Nine bits for each level, above those of the page.
        Ok(Self { root: registers.get("ttbr0_el1") & ADDRESS, start: 4 - (bits - 12).div_ceil(9), bits })
    }

    /// What maps RAM at stage 2.
    pub(super) fn usage(&self, ram: &Ram) -> Result<Usage> {
        let mut usage = Usage::default();
        let mut seen = BTreeSet::<u64>::new();
        self.leaves(ram, &|address| Ok(address), &mut |leaf| {
            if leaf.address >= ram.base && leaf.address < ram.base + ram.size {
                usage.bytes[leaf.level as usize] += size(leaf.level);
            }
            seen.extend(&leaf.path[1..]);
            Ok(())
        })?;
        usage.tables = seen.len() as u64;
        Ok(usage)
    }

    /// Descriptors that are read for an address of this stage 1 whose tables are found through `stage2`, if there is one:
    /// by the level of the leaf.
    pub(super) fn reads(&self, ram: &Ram, stage2: Option<&Self>) -> Result<[Reads; 4]> {
        let mut reads = [Reads::default(); 4];
        // Where an address of the host is, and what it takes to find out.
        let find = |address| match stage2 {
            Some(stage2) => stage2.translate(ram, address),
            None => Ok((address, 0)),
        };
        self.leaves(ram, &|address| Ok(find(address)?.0), &mut |leaf| {
            let mut sum = find(leaf.address)?.1;
            for table in leaf.path {
                sum += find(*table)?.1 + 1;
            }
            reads[leaf.level as usize].add(sum);
            Ok(())
        })?;
        Ok(reads)
    }

    /// Where an address is, and how many descriptors say so.
    fn translate(&self, ram: &Ram, address: u64) -> Result<(u64, u64)> {
        ensure!(address >> self.bits == 0, "{address:#x} has more than {} bits", self.bits);
        let (mut table, mut entries) = (self.root, self.root_entries());
        for level in self.start..=3 {
            let index = address / size(level) % entries;
            match Descriptor::read(ram, table, index, level)? {
                Descriptor::Table(next) => (table, entries) = (next, ENTRIES),
                Descriptor::Leaf(base) => return Ok((base + address % size(level), u64::from(level - self.start + 1))),
                Descriptor::Invalid => break,
            }
        }
        bail!("{address:#x} is not mapped")
    }

    /// Visits everything that is mapped. `place` says where in RAM a table is.
    fn leaves(
        &self,
        ram: &Ram,
        place: &dyn Fn(u64) -> Result<u64>,
        visit: &mut dyn FnMut(&Leaf<'_>) -> Result<()>,
    ) -> Result<()> {
        self.below(ram, place, visit, &mut vec![self.root], self.start, self.root_entries())
    }

    fn below(
        &self,
        ram: &Ram,
        place: &dyn Fn(u64) -> Result<u64>,
        visit: &mut dyn FnMut(&Leaf<'_>) -> Result<()>,
        path: &mut Vec<u64>,
        level: u32,
        entries: u64,
    ) -> Result<()> {
        let table = path[path.len() - 1];
        for index in 0..entries {
            // Concatenated tables follow each other in the host's addresses, and in RAM only as far as a page.
            let (page, index) = (place(table + index / ENTRIES * 4096)?, index % ENTRIES);
            match Descriptor::read(ram, page, index, level)? {
                Descriptor::Invalid => {}
                Descriptor::Leaf(address) => visit(&Leaf { level, address, path })?,
                Descriptor::Table(next) => {
                    path.push(next);
                    self.below(ram, place, visit, path, level + 1, ENTRIES)?;
                    path.pop();
                }
            }
        }
        Ok(())
    }

    /// Entries of the root, which has up to 16 tables.
    fn root_entries(&self) -> u64 {
        (1 << self.bits).max(size(self.start)) / size(self.start)
    }
}

/// Bytes that an entry of a table of that level stands for.
fn size(level: u32) -> u64 {
    4096 << ((3 - level) * 9)
}

enum Descriptor {
    Invalid,
    Table(u64),
    Leaf(u64),
}

impl Descriptor {
    fn read(ram: &Ram, table: u64, index: u64, level: u32) -> Result<Self> {
        let word = ram.word(table + index * 8)?;
        let address = word & ADDRESS;
        Ok(match (word & 3, level) {
            (3, 0..=2) => Self::Table(address),
            (1, 1 | 2) | (3, 3) => Self::Leaf(address / size(level) * size(level)),
            _ => Self::Invalid,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::Scratch;

    const BASE: u64 = 0x4000_0000;
    const TABLE: u64 = 3;
    const PAGE: u64 = 3;
    const BLOCK: u64 = 1;

    /// RAM of 2 MiB in which tables have these entries: address of the table, index, descriptor.
    fn ram(scratch: &Scratch, entries: &[(u64, usize, u64)]) -> Ram {
        let mut bytes = vec![0; 2 << 20];
        for (table, index, descriptor) in entries {
            let at = (table - BASE) as usize + index * 8;
            bytes[at..at + 8].copy_from_slice(&descriptor.to_le_bytes());
        }
        Ram::open(&scratch.file("ram", &bytes).unwrap(), BASE).unwrap()
    }

    /// Stage 1 of four levels, from page 8 of RAM on, with a page and a block of 2 MiB.
    const PROCESS: [(u64, usize, u64); 5] = [
        (BASE + 0x8000, 5, (BASE + 0x9000) | TABLE),
        (BASE + 0x9000, 6, (BASE + 0xa000) | TABLE),
        (BASE + 0xa000, 7, (BASE + 0xb000) | TABLE),
        (BASE + 0xa000, 8, BASE | BLOCK | 1 << 54),
        (BASE + 0xb000, 511, (BASE + 0xc000) | PAGE | 1 << 54),
    ];

    fn process() -> Tables {
        Tables { root: BASE + 0x8000, start: 0, bits: 48 }
    }

    /// Two tables of level 1, the second of which is never used.
    fn stage2() -> Tables {
        Tables { root: BASE, start: 1, bits: 40 }
    }

    /// Least, mean, and most reads of the block and of the page.
    fn reads(ram: &Ram, stage2: Option<&Tables>) -> [(u64, f64, u64); 2] {
        let reads = process().reads(ram, stage2).unwrap();
        assert_eq!(reads.map(|reads| reads.leaves), [0, 0, 1, 1]);
        [reads[2], reads[3]].map(|reads| (reads.least, reads.mean(), reads.most))
    }

    #[test]
    fn each_level_of_stage_1_takes_a_walk_of_stage_2() {
        let scratch = Scratch::new().unwrap();
        let of = |entries: &[(u64, usize, u64)]| ram(&scratch, &[&PROCESS, entries].concat());
        // 4 levels and 3 levels.
        assert_eq!(reads(&of(&[]), None), [(3, 3.0, 3), (4, 4.0, 4)]);
        // A walk of stage 2 more than levels of stage 1, each of which reads 1, 2 or 3 descriptors.
        let block = of(&[(BASE, 1, BASE | BLOCK)]);
        assert_eq!(reads(&block, Some(&stage2())), [(7, 7.0, 7), (9, 9.0, 9)]);
        assert_eq!(stage2().usage(&block).unwrap().tables, 0);
        let table = (BASE, 1, (BASE + 0x2000) | TABLE);
        let blocks = of(&[table, (BASE + 0x2000, 0, BASE | BLOCK)]);
        assert_eq!(reads(&blocks, Some(&stage2())), [(11, 11.0, 11), (14, 14.0, 14)]);
        let pages = (0..16).map(|page| (BASE + 0x3000, page, (BASE + page as u64 * 4096) | PAGE));
        let pages: Vec<_> = [table, (BASE + 0x2000, 0, (BASE + 0x3000) | TABLE)].into_iter().chain(pages).collect();
        let pages = of(&pages);
        assert_eq!(reads(&pages, Some(&stage2())), [(15, 15.0, 15), (19, 19.0, 19)]);
        let usage = stage2().usage(&pages).unwrap();
        assert_eq!(usage, Usage { bytes: [0, 0, 0, 16 * 4096], tables: 2 });
        // The tables of the process are in RAM that stage 2 does not map.
        assert!(process().reads(&of(&[]), Some(&stage2())).is_err());
    }

    #[test]
    fn only_ram_counts() {
        let scratch = Scratch::new().unwrap();
        let device = 0x0900_0000;
        let ram = ram(
            &scratch,
            &[(BASE, 0, (BASE + 0x2000) | TABLE), (BASE + 0x2000, 72, device | BLOCK), (BASE, 1, BASE | BLOCK)],
        );
        let usage = stage2().usage(&ram).unwrap();
        assert_eq!(usage, Usage { bytes: [0, 1 << 30, 0, 0], tables: 1 });
        assert_eq!(stage2().translate(&ram, device + 0x1234).unwrap(), (device + 0x1234, 2));
        assert!(stage2().translate(&ram, 1 << 40).is_err());
    }

    #[test]
    fn registers_say_where_tables_are() {
        let event = |fields: &str| Event::parse(&format!("tables {fields}")).unwrap();
        let stage2 = |fields: &str| Tables::stage2(&event(fields));
        let (vttbr, vtcr) = (0x7_bf82_3000_u64 | 1 << 48, 0x8002_3558_u64);
        let registers = format!("hcr_el2=2147483649 vtcr_el2={vtcr} vttbr_el2={vttbr}");
        assert_eq!(stage2(&registers).unwrap(), Some(Tables { root: 0x7_bf82_3000, start: 1, bits: 40 }));
        assert_eq!(stage2("hcr_el2=2147483648").unwrap(), None);
        assert_eq!(stage2("tcr_el1=16").unwrap(), None);
        assert!(stage2(&format!("hcr_el2=1 vtcr_el2={}", 1 << 14)).is_err());

        let process =
            |tcr: u64| Tables::process(&event(&format!("tcr_el1={tcr} ttbr0_el1={}", 0x44_4000_u64 | 7 << 48)));
        assert_eq!(process(16).unwrap(), Tables { root: 0x44_4000, start: 0, bits: 48 });
        assert_eq!(process(25).unwrap(), Tables { root: 0x44_4000, start: 1, bits: 39 });
        for bad in [12, 60, 16 | 1 << 14] {
            assert!(process(bad).is_err(), "{bad}");
        }
    }
}
