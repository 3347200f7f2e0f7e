//! `/chosen`: Ravelin's command line, and the modules that a bootloader left for it.

use dtoolkit::{
    Node,
    fdt::{Fdt, FdtNode},
};
use ravelin_memory::PhysRange;

use crate::{
    DtbError, Fault, NodeName,
    cells::{CellCounts, is_compatible, lists, pairs, string, take, touched_pages, value},
    error::node_name,
    memory::child,
};

/// How much the log says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// Errors.
    Error,
    /// And warnings.
    Warn,
    /// And what happens at boot.
    Info,
    /// And what a host does wrong.
    Debug,
    /// And every call.
    Trace,
}

/// Ravelin's command line, `bootargs` of `/chosen`: options separated by spaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options<'a> {
    /// `loglevel=`: `off`, `error`, `warn`, `info`, `debug` or `trace`.
    pub log_level: Option<LogLevel>,
    /// `exit=semihosting`: a panic ends the machine by semihosting, with a status, instead of by PSCI.
    pub semihosting_exit: bool,
    /// `trace=semihosting`: the architecture trace is written by semihosting, to the file that its command line names.
    #[cfg(any(test, feature = "trace"))]
    pub trace: bool,
    /// The first option that is none of these. Bootloaders add some of their own, so it is no error.
    pub unknown: Option<&'a str>,
}

impl<'a> Options<'a> {
    fn parse(line: &'a str) -> Result<Self, Fault> {
        let mut options = Self::default();
        for option in line.split_ascii_whitespace() {
            match option.split_once('=') {
                Some(("loglevel", level)) => {
                    options.log_level = Some(match level {
                        "off" => LogLevel::Off,
                        "error" => LogLevel::Error,
                        "warn" => LogLevel::Warn,
                        "info" => LogLevel::Info,
                        "debug" => LogLevel::Debug,
                        "trace" => LogLevel::Trace,
                        _ => return Err(Fault::Malformed("bootargs (option loglevel)")),
                    });
                }
                Some(("exit", "semihosting")) => options.semihosting_exit = true,
                Some(("exit", _)) => return Err(Fault::Malformed("bootargs (option exit)")),
                #[cfg(any(test, feature = "trace"))]
                Some(("trace", "semihosting")) => options.trace = true,
                #[cfg(any(test, feature = "trace"))]
                Some(("trace", _)) => return Err(Fault::Malformed("bootargs (option trace)")),
                _ => options.unknown = options.unknown.or(Some(option)),
            }
        }
        Ok(options)
    }
}

/// Bytes in physical memory, at least one, all of them in addresses below 2^48.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    base: u64,
    size: u64,
    pages: PhysRange,
}

impl ByteRange {
    /// Returns the `size` bytes at `base`, if there are such bytes.
    pub(crate) fn new(base: u64, size: u64) -> Result<Self, Fault> {
        Ok(Self { base, size, pages: touched_pages(base, size)? })
    }

    /// Returns the address of the first byte.
    #[must_use]
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// Returns the number of bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Returns the first address behind the bytes.
    #[must_use]
    pub const fn end(&self) -> u64 {
        // Cannot wrap: checked when the range was made.
        self.base.wrapping_add(self.size)
    }

    /// Returns the pages that the bytes lie in.
    #[must_use]
    pub const fn pages(&self) -> PhysRange {
        self.pages
    }
}

/// Something that the bootloader has put into RAM for the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module<'a> {
    /// The node that describes it, for messages.
    pub node: NodeName,
    /// Where it is.
    pub bytes: ByteRange,
    /// The command line that belongs to it; empty if there is none.
    pub bootargs: &'a str,
}

impl Module<'_> {
    /// Returns the error that blames the module's node.
    pub(crate) fn blame(&self, fault: Fault) -> DtbError {
        fault.at([self.node.as_str()])
    }

    /// Refuses a module that shares pages with something else.
    pub(crate) fn check_apart(&self, what: &'static str, other: PhysRange) -> Result<(), DtbError> {
        if self.bytes.pages().overlaps(&other) {
            return Err(self.blame(Fault::Overlap { range: self.bytes.pages(), what, other }));
        }
        Ok(())
    }
}

/// What `/chosen` says.
pub(crate) struct Chosen<'a> {
    pub(crate) options: Options<'a>,
    pub(crate) kernel: Module<'a>,
    pub(crate) ramdisk: Option<Module<'a>>,
}

/// Returns whether a child of `/chosen` is a module of a bootloader
/// (Multiboot for Arm, as Xen's `docs/misc/arm/device-tree/booting.txt` has it).
pub(crate) fn is_module(compatible: &[u8]) -> bool {
    lists(compatible, "multiboot,module")
}

impl<'a> Chosen<'a> {
    pub(crate) fn parse(fdt: Fdt<'a>, ram: &[PhysRange]) -> Result<Self, DtbError> {
        let blame = |fault: Fault| fault.at(["/chosen"]);
        let root = fdt.root();
        let chosen = child(root, "chosen").ok_or_else(|| Fault::Missing("node chosen").at(["/"]))?;
        let line = string(chosen, "bootargs").map_err(blame)?.unwrap_or("");
        let options = Options::parse(line).map_err(blame)?;

        // QEMU gives no cell counts here and means those of the root.
        let cells = CellCounts::of(root, CellCounts::DEFAULT).map_err(|fault| fault.at(["/"]))?;
        let cells = CellCounts::of(chosen, cells).map_err(blame)?;
        let (mut kernel, mut ramdisk) = (None, None);
        for node in chosen.children().filter(|node| value(*node, "compatible").is_some_and(is_module)) {
            let blame = |fault: Fault| fault.at(["/chosen/", node.name()]);
            let module = module(node, cells).map_err(blame)?;
            let place = if is_compatible(node, &["multiboot,kernel"]) {
                &mut kernel
            } else if is_compatible(node, &["multiboot,ramdisk"]) {
                &mut ramdisk
            } else {
                return Err(blame(Fault::Unsupported("the module is neither multiboot,kernel nor multiboot,ramdisk")));
            };
            if place.replace(module).is_some() {
                return Err(blame(Fault::Unsupported("there is a module of this kind already")));
            }
        }
        let kernel = kernel.ok_or_else(|| blame(Fault::Missing("module compatible with multiboot,kernel")))?;
        if ramdisk.is_none() {
            ramdisk = linux_initrd(chosen).map_err(blame)?;
        }
        for module in core::iter::once(&kernel).chain(&ramdisk) {
            let pages = module.bytes.pages();
            if !ram.iter().any(|region| region.covers(&pages)) {
                return Err(module.blame(Fault::NotRam(pages)));
            }
        }
        if let Some(ramdisk) = &ramdisk {
            ramdisk.check_apart("the kernel", kernel.bytes.pages())?;
        }
        Ok(Self { options, kernel, ramdisk })
    }
}

fn module(node: FdtNode<'_>, cells: CellCounts) -> Result<Module<'_>, Fault> {
    let reg = value(node, "reg").ok_or(Fault::Missing("property reg"))?;
    let mut entries = pairs(reg, cells);
    let (base, size) = entries.next().unwrap_or(Err(Fault::Malformed("reg")))?;
    if entries.next().is_some() {
        return Err(Fault::Malformed("reg"));
    }
    Ok(Module {
        node: node_name(["/chosen/", node.name()]),
        bytes: ByteRange::new(base, size)?,
        bootargs: string(node, "bootargs")?.unwrap_or(""),
    })
}

/// Returns the ramdisk that the properties for Linux describe; one or two cells each.
fn linux_initrd(chosen: FdtNode<'_>) -> Result<Option<Module<'_>>, Fault> {
    let address = |name| {
        value(chosen, name)
            .map(|mut value| match value.len() {
                4 => take(&mut value, 1).ok_or(Fault::Malformed(name)),
                8 => take(&mut value, 2).ok_or(Fault::Malformed(name)),
                _ => Err(Fault::Malformed(name)),
            })
            .transpose()
    };
    match (address("linux,initrd-start")?, address("linux,initrd-end")?) {
        (None, None) => Ok(None),
        (Some(start), Some(end)) => {
            let size = end.checked_sub(start).ok_or(Fault::Malformed("linux,initrd-end (before the start)"))?;
            Ok(Some(Module { node: node_name(["/chosen"]), bytes: ByteRange::new(start, size)?, bootargs: "" }))
        }
        (None, Some(_)) => Err(Fault::Missing("property linux,initrd-start")),
        (Some(_), None) => Err(Fault::Missing("property linux,initrd-end")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_trace() {
        assert!(Options::parse("loglevel=info trace=semihosting").is_ok_and(|options| options.trace));
        assert!(Options::parse("exit=semihosting").is_ok_and(|options| !options.trace));
        assert!(Options::parse("trace=file").is_err());
    }
}
