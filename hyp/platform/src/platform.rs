//! Everything that Ravelin takes from the device tree.

use arrayvec::ArrayVec;
use dtoolkit::fdt::Fdt;
use ravelin_memory::PhysRange;

use crate::{
    Conduit, DtbError, Fault, Gic, MAX_RAM_REGIONS, MAX_RESERVED_REGIONS, Module, Options, chosen::Chosen, cpu, device,
    memory,
};

/// The size of the largest device tree that is read, in bytes. Bootloaders leave room in theirs; the host's, which is written
/// anew, is held to what Linux permits.
pub const MAX_DTB_SIZE: usize = 16 << 20;

/// The size of the header of a device tree, in bytes (Devicetree Specification 0.4, section 5.2).
const HEADER_SIZE: usize = 40;

/// Returns the size of the device tree that begins with `start`, at least its first 8 bytes, or nothing if there is no
/// device tree or if its size is absurd.
#[must_use]
pub fn dtb_size(start: &[u8]) -> Option<usize> {
    let (magic, rest) = start.split_first_chunk()?;
    let size = usize::try_from(u32::from_be_bytes(*rest.first_chunk()?)).ok()?;
    (u32::from_be_bytes(*magic) == 0xd00d_feed && (HEADER_SIZE..=MAX_DTB_SIZE).contains(&size)).then_some(size)
}

/// Returns the structure of a device tree that may be followed by other bytes.
fn open(dtb: &[u8]) -> Result<Fdt<'_>, DtbError> {
    let blame = |fault: Fault| fault.at(["/"]);
    // A wrong magic number is left for the parser to report.
    let size = dtb_size(dtb).unwrap_or(dtb.len());
    Fdt::new(dtb.get(..size).unwrap_or(dtb)).map_err(|error| blame(Fault::Format(error)))
}

/// Returns the registers of the UART that errors in the device tree `dtb` can be reported on: the console of
/// [`Platform`], found without looking at what Ravelin can do without for this.
#[must_use]
pub fn find_console(dtb: &[u8]) -> Option<PhysRange> {
    let fdt = open(dtb).ok()?;
    device::uart(fdt, &memory::ram(fdt).unwrap_or_default()).ok()
}

/// What the device tree says about the machine and about what to run on it.
///
/// It takes 2 KiB, and as much again on the stack to make it.
#[derive(Clone, Debug)]
pub struct Platform<'a> {
    fdt: Fdt<'a>,
    cpu_count: usize,
    /// RAM in order of addresses. Regions neither overlap nor touch.
    pub ram: ArrayVec<PhysRange, MAX_RAM_REGIONS>,
    /// What is reserved already, in no order, widened to whole pages. It need not be RAM and may overlap.
    pub reserved: ArrayVec<PhysRange, MAX_RESERVED_REGIONS>,
    /// The registers of the console, a PL011. Not in RAM.
    pub uart: PhysRange,
    /// The interrupt controller. Not in RAM, and with a redistributor for each CPU.
    pub gic: Gic,
    /// How PSCI, version 0.2 or later, is called.
    pub psci: Conduit,
    /// Ravelin's own command line.
    pub options: Options<'a>,
    /// The host's kernel, in one region of RAM, with the host's command line.
    pub kernel: Module<'a>,
    /// The host's ramdisk, in one region of RAM and apart from the kernel. It is the module if there is one, else
    /// what the properties for Linux say.
    pub ramdisk: Option<Module<'a>>,
}

impl<'a> Platform<'a> {
    /// Reads the device tree `dtb`, which may be followed by other bytes.
    ///
    /// # Errors
    ///
    /// Everything that is missing or that cannot be, with the node to blame; see [`Fault`].
    pub fn parse(dtb: &'a [u8]) -> Result<Self, DtbError> {
        let fdt = open(dtb)?;
        let ram = memory::ram(fdt)?;
        let uart = device::uart(fdt, &ram)?;
        let cpu_count = cpu::count(fdt)?;
        let gic = device::gic(fdt, &ram, cpu_count)?;
        let psci = device::psci(fdt)?;
        let reserved = memory::reserved(fdt)?;
        let Chosen { options, kernel, ramdisk } = Chosen::parse(fdt, &ram)?;
        Ok(Self { fdt, cpu_count, ram, reserved, uart, gic, psci, options, kernel, ramdisk })
    }

    /// Returns the structure of the device tree.
    pub(crate) fn fdt(&self) -> Fdt<'a> {
        self.fdt
    }

    /// Returns how many CPUs there are; from 1 to [`MAX_CPUS`](crate::MAX_CPUS).
    #[must_use]
    pub fn cpu_count(&self) -> usize {
        self.cpu_count
    }

    /// Yields the affinity of each CPU, in the order of the device tree, with the fields where MPIDR_EL1 has them and
    /// all other bits 0. No two are the same.
    pub fn cpus(&self) -> impl Iterator<Item = u64> {
        cpu::affinities(self.fdt)
    }

    /// Returns how much RAM there is, in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram.iter().map(PhysRange::size).fold(0, u64::saturating_add)
    }
}
