//! In which functions the instructions are executed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use object::{Object, ObjectSegment, ObjectSymbol};

use super::event::Event;
use super::report::digits;
use super::{Bench, CALLS, GUESTS, USUAL_MEMORY};
use crate::image;
use crate::qemu::{self, Outcome};
use crate::run::{self, Ready};
use crate::symbols::Symbols;

impl Bench {
    /// Prints where the instructions are executed.
    pub(super) fn profile(&self) -> Result<()> {
        for test in [CALLS, GUESTS] {
            self.profile_test(test)?;
        }
        Ok(())
    }

    fn profile_test(&self, test: &str) -> Result<()> {
        let options = self.payload_options(USUAL_MEMORY, test);
        let functions = Functions::of(&options)?;
        let (console, events) = self.run(&options, ",profile=on", Outcome::Ended(0))?;
        // The first one is the start's. Later the vectors may be those that are in place for guests.
        let vectors =
            events.iter().find(|event| event.kind == "profile").context("there is no profile")?.get("vectors");
        let mut labels = console.lines().filter_map(|line| line.trim().strip_prefix("bench "));
        for pair in events.windows(2).filter(|pair| pair[0].kind == "profile") {
            let title = match pair[1].get("number") {
                _ if pair[1].kind == "first-el1" => "start",
                1 => labels.next().context("more measurements than labels")?,
                _ => continue,
            };
            functions.print(title, &pair[0], vectors);
        }
        Ok(())
    }
}

/// Names the hypervisor's functions by the addresses that they are executed at.
pub(super) struct Functions {
    symbols: Symbols,
    /// The image.
    code: Vec<u8>,
    /// Where QEMU loads the image; later it runs from a copy elsewhere, which has VBAR_EL2.
    load_address: u64,
    /// Offset of the vectors in the image.
    vectors: u64,
    size: u64,
}

/// An instruction of the hypervisor that has been executed.
pub(super) struct Executed {
    /// The instruction itself.
    pub(super) word: u32,
    /// How often.
    pub(super) count: u64,
    /// The function that it is in, followed by those that this was inlined into.
    pub(super) frames: Vec<String>,
}

impl Functions {
    /// Those of the hypervisor that these options boot.
    pub(super) fn of(options: &run::Options) -> Result<Self> {
        let ready = Ready::new(options)?;
        let load_address = qemu::prepare(&ready.boot, &ready.scratch)?.load_address;
        let elf = &ready.boot.hypervisor.as_ref().context("there is no hypervisor")?.0.elf;
        Self::load(elf, load_address)
    }

    fn load(elf: &Path, load_address: u64) -> Result<Self> {
        let bytes = fs::read(elf).with_context(|| elf.display().to_string())?;
        let file = object::File::parse(&*bytes).with_context(|| elf.display().to_string())?;
        let vectors = file.symbol_by_name("vectors").context("the image has no vectors")?.address();
        let size = file.segments().map(|segment| segment.address() + segment.size()).max().unwrap_or(0);
        let (code, _) = image::flatten(&bytes)?;
        Ok(Self { symbols: Symbols::load(elf)?, code, load_address, vectors, size })
    }

    /// The offsets of what has been executed, where it is in the image, and how often.
    fn offsets(&self, profile: &Event, vectors: u64) -> impl Iterator<Item = (Option<u64>, u64)> {
        let copies = [vectors.wrapping_sub(self.vectors), self.load_address];
        profile.fields.iter().filter_map(move |(address, count)| {
            let address = u64::from_str_radix(address.strip_prefix("0x")?, 16).unwrap_or(0);
            let offsets = copies.map(|base| address.wrapping_sub(base));
            Some((offsets.into_iter().find(|offset| *offset < self.size), *count))
        })
    }

    /// The instructions that have been executed, those that are `wanted`.
    pub(super) fn executed(&self, profile: &Event, wanted: impl Fn(u32) -> bool) -> Vec<Executed> {
        let word = |offset: usize| Some(u32::from_le_bytes(*self.code.get(offset..)?.first_chunk()?));
        let executed = self.offsets(profile, profile.get("vectors")).filter_map(|(offset, count)| {
            let offset = offset?;
            let word = word(usize::try_from(offset).ok()?).filter(|word| wanted(*word))?;
            Some(Executed { word, count, frames: self.symbols.describe(offset) })
        });
        executed.collect()
    }

    /// Prints the functions that most instructions were executed in.
    fn print(&self, title: &str, profile: &Event, vectors: u64) {
        let mut functions = BTreeMap::<String, u64>::new();
        for (offset, count) in self.offsets(profile, vectors) {
            let name = offset.map_or_else(|| "outside of the image".into(), |offset| self.name(offset));
            *functions.entry(name).or_default() += count;
        }
        let total: u64 = functions.values().sum();
        println!("{title}: {}", digits(total as f64));
        let mut functions: Vec<_> = functions.into_iter().collect();
        functions.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        for (name, count) in functions.iter().take(12).filter(|(_, count)| count * 50 >= total) {
            println!("  {:>12} {:>3} %  {name}", digits(*count as f64), count * 100 / total);
        }
    }

    /// The function at an offset that is not inlined into another one, or the file of what is assembly.
    fn name(&self, offset: u64) -> String {
        let frame = self.symbols.describe(offset).pop().unwrap_or_default();
        match frame.rsplit_once(" at ") {
            Some(("(unknown function)", place)) => place.split(':').next().unwrap_or(place).to_owned(),
            Some((function, _)) => function.to_owned(),
            None => frame,
        }
    }
}
