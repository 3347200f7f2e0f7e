//! In which functions the instructions are executed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use object::{Object, ObjectSegment, ObjectSymbol};

use super::event::Event;
use super::report::digits;
use super::{Bench, CALLS, GUESTS, USUAL_MEMORY};
use crate::qemu::{self, Outcome};
use crate::run::Ready;
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
        let ready = Ready::new(&options)?;
        let load_address = qemu::prepare(&ready.boot, &ready.scratch)?.load_address;
        let elf = &ready.boot.hypervisor.as_ref().context("there is no hypervisor")?.0.elf;
        let functions = Functions::load(elf, load_address)?;

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
struct Functions {
    symbols: Symbols,
    /// Where QEMU loads the image; later it runs from a copy elsewhere, which has VBAR_EL2.
    load_address: u64,
    /// Offset of the vectors in the image.
    vectors: u64,
    size: u64,
}

impl Functions {
    fn load(elf: &Path, load_address: u64) -> Result<Self> {
        let bytes = fs::read(elf).with_context(|| elf.display().to_string())?;
        let file = object::File::parse(&*bytes).with_context(|| elf.display().to_string())?;
        let vectors = file.symbol_by_name("vectors").context("the image has no vectors")?.address();
        let size = file.segments().map(|segment| segment.address() + segment.size()).max().unwrap_or(0);
        Ok(Self { symbols: Symbols::load(elf)?, load_address, vectors, size })
    }

    /// Prints the functions that most instructions were executed in.
    fn print(&self, title: &str, profile: &Event, vectors: u64) {
        let copy = vectors.wrapping_sub(self.vectors);
        let mut functions = BTreeMap::<String, u64>::new();
        for (address, count) in &profile.fields {
            let Some(digits) = address.strip_prefix("0x") else { continue };
            let address = u64::from_str_radix(digits, 16).unwrap_or(0);
            let offset = [copy, self.load_address]
                .map(|base| address.wrapping_sub(base))
                .into_iter()
                .find(|offset| *offset < self.size);
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
