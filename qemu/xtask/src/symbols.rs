//! Names of functions and source lines for addresses in the image.

use std::path::Path;

use addr2line::Loader;
use anyhow::{Result, anyhow};

use crate::workspace;

/// The debug information of one ELF file.
pub(crate) struct Symbols {
    loader: Loader,
    root: String,
}

impl Symbols {
    /// Opens the ELF file that an image was made from.
    pub(crate) fn load(elf: &Path) -> Result<Self> {
        let loader = Loader::new(elf).map_err(|error| anyhow!("{}: no debug information: {error}", elf.display()))?;
        Ok(Self { loader, root: format!("{}/", workspace::root().display()) })
    }

    /// `function at file:line` of an address, followed by the functions that it was inlined into.
    pub(crate) fn describe(&self, address: u64) -> Vec<String> {
        let mut names = Vec::new();
        // The console is not trusted, and the library adds to addresses without a check.
        let address = address.min(1 << 48);
        if let Ok(mut frames) = self.loader.find_frames(address) {
            while let Ok(Some(frame)) = frames.next() {
                let function = frame.function.and_then(|name| Some(name.demangle().ok()?.into_owned()));
                let place = frame.location.and_then(|location| {
                    let file = location.file?;
                    let file = file.strip_prefix(&self.root).unwrap_or(file);
                    Some(format!(" at {file}:{}", location.line.unwrap_or(0)))
                });
                names.push(format!(
                    "{}{}",
                    function.as_deref().unwrap_or("(unknown function)"),
                    place.as_deref().unwrap_or("")
                ));
            }
        }
        if names.is_empty() {
            names.push(self.loader.find_symbol(address).unwrap_or("(unknown)").to_owned());
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use object::ObjectSymbol;

    use super::*;

    #[test]
    fn names_a_function_of_this_program() {
        let path = std::env::current_exe().unwrap();
        let elf = std::fs::read(&path).unwrap();
        let file = object::File::parse(&*elf).unwrap();
        let own = |symbol: &object::Symbol<'_, '_>| symbol.name().unwrap().contains("names_a_function_of_this_program");
        let address = object::Object::symbols(&file).find(own).unwrap().address();
        let names = Symbols::load(&path).unwrap().describe(address);
        assert!(names[0].contains("names_a_function_of_this_program"), "{names:?}");
        assert_eq!(Symbols::load(&path).unwrap().describe(u64::MAX), ["(unknown)"]);
    }
}
