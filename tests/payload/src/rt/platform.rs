//! What the device tree says about the machine.

use core::{ptr, slice, str};

use arrayvec::{ArrayString, ArrayVec};
use dtoolkit::{Node, Property, fdt::Fdt};
use spin::Once;

use crate::rt::{
    call, console,
    cpu::{self, MAX_CPUS},
    exit,
    memory::{BLOCK, PAGE},
};

/// Addresses from `start` up to and without `end`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Region {
    pub(crate) fn size(self) -> u64 {
        self.end - self.start
    }

    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// The machine as the payload sees it.
#[derive(Debug)]
pub(crate) struct Platform {
    /// RAM that belongs to the host.
    pub(crate) ram: ArrayVec<Region, 8>,
    /// Parts of it that are taken: the payload, the device tree, the initrd, reservations.
    pub(crate) taken: ArrayVec<Region, 16>,
    /// What the hypervisor keeps for itself.
    pub(crate) carve_out: Option<Region>,
    /// MPIDR affinity of every CPU, the boot CPU first.
    pub(crate) cpus: ArrayVec<u64, MAX_CPUS>,
    /// GICv3 distributor, and redistributors.
    pub(crate) gic: Option<[Region; 2]>,
    /// NOR flash.
    pub(crate) flash: Option<Region>,
    /// PCI configuration space.
    pub(crate) pci: Option<Region>,
    /// What the loader calls the initial RAM disk: the guest of the tests.
    pub(crate) initrd: Option<Region>,
    /// Where the device tree lies.
    pub(crate) tree: u64,
    /// Whether the carve-out's node in /reserved-memory says no-map.
    pub(crate) carve_out_is_no_map: bool,
    /// A page for statistics, outside what [`Platform::free`] returns.
    pub(crate) statistics: u64,
    /// The words of `/chosen/bootargs`.
    pub(crate) bootargs: ArrayString<1024>,
}

static PLATFORM: Once<Platform> = Once::new();

/// The machine; the boot CPU has read the device tree before anything asks.
pub(crate) fn platform() -> &'static Platform {
    PLATFORM.get().expect("the device tree has been read")
}

/// Reads the device tree at `address`.
pub(crate) fn init(address: usize) -> &'static Platform {
    PLATFORM.call_once(|| parse(address))
}

#[expect(unsafe_code, reason = "the device tree lies where x0 says")]
fn blob(address: usize) -> &'static [u8] {
    let start = ptr::with_exposed_provenance::<u8>(address);
    // SAFETY: The boot protocol promises a device tree here, of which the first 8 bytes are magic and size.
    let header = unsafe { slice::from_raw_parts(start, 8) };
    let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    assert_eq!(word(0), 0xD00D_FEED, "no device tree at {address:#x}");
    // SAFETY: As above; nobody writes to it.
    unsafe { slice::from_raw_parts(start, word(4) as usize) }
}

/// The addresses of the payload's own image.
#[expect(unsafe_code, reason = "symbols of the link script")]
fn own_image() -> Region {
    unsafe extern "C" {
        static __image_start: u8;
        static __image_end: u8;
    }
    Region { start: (&raw const __image_start).addr() as u64, end: (&raw const __image_end).addr() as u64 }
}

fn reg_of<'a>(node: dtoolkit::fdt::FdtNode<'a>) -> impl Iterator<Item = Region> + 'a {
    node.reg().ok().flatten().into_iter().flatten().map(|reg| {
        let start = reg.address::<u64>().expect("an address of 64 bits");
        let size = reg.size::<u64>().expect("a size of 64 bits");
        Region { start, end: start + size }
    })
}

fn parse(address: usize) -> Platform {
    let data = blob(address);
    let fdt = Fdt::new(data).expect("a valid device tree");
    let root = fdt.root();
    let mut platform = Platform {
        ram: ArrayVec::new(),
        taken: ArrayVec::new(),
        carve_out: None,
        cpus: ArrayVec::new(),
        gic: None,
        flash: None,
        pci: None,
        initrd: None,
        statistics: 0,
        tree: address as u64,
        carve_out_is_no_map: false,
        bootargs: ArrayString::new(),
    };
    platform.taken.push(own_image());
    platform.taken.push(Region { start: address as u64, end: (address + data.len()) as u64 });
    for reservation in fdt.memory_reservations() {
        platform.taken.push(Region { start: reservation.address(), end: reservation.address() + reservation.size() });
    }
    for node in root.children() {
        match node.name_without_address() {
            "memory" => platform.ram.extend(reg_of(node)),
            "reserved-memory" => {
                for child in node.children() {
                    for region in reg_of(child) {
                        platform.taken.push(region);
                        if child.name_without_address().starts_with("ravelin") {
                            platform.carve_out = Some(region);
                            platform.carve_out_is_no_map = child.property("no-map").is_some();
                        }
                    }
                }
            }
            "cpus" => {
                let boot = cpu::mpidr();
                platform.cpus.push(boot);
                for child in node.children().filter(|child| child.name_without_address() == "cpu") {
                    let affinity = child.property("reg").map(|reg| big_endian(reg.value()));
                    platform.cpus.extend(affinity.filter(|&affinity| affinity != boot));
                }
            }
            "psci" if node.property("method").is_some_and(|method| method.value() == b"hvc\0") => {
                call::firmware_is_hvc()
            }
            "pl011" => {
                if let Some(region) = reg_of(node).next() {
                    console::set_base(region.start);
                }
            }
            "intc" => {
                let mut regions = reg_of(node);
                platform.gic = regions.next().zip(regions.next()).map(|(first, second)| [first, second]);
            }
            "flash" => platform.flash = reg_of(node).next(),
            "pcie" => platform.pci = reg_of(node).next(),
            "chosen" => {
                let number = |name| node.property(name).map(|property| big_endian(property.value()));
                if let Some((start, end)) = number("linux,initrd-start").zip(number("linux,initrd-end")) {
                    platform.taken.push(Region { start, end });
                    platform.initrd = Some(Region { start, end });
                }
                if let Some(bootargs) = node.property("bootargs") {
                    let text = str::from_utf8(bootargs.value()).expect("bootargs are text");
                    platform.bootargs.push_str(text.trim_end_matches('\0'));
                }
            }
            _ => {}
        }
    }
    if platform.argument("exit") == Some("semihosting") {
        exit::use_semihosting();
    }
    if platform.argument("end") == Some("reset") {
        exit::use_reset();
    }
    // Away from the end of RAM, which tests have a special interest in.
    let Region { start, .. } = platform.free(4 * BLOCK, PAGE).expect("free pages");
    platform.taken.push(Region { start, end: start + PAGE });
    platform.statistics = start;
    platform
}

fn big_endian(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

impl Platform {
    /// The value of `NAME=VALUE` on the command line.
    pub(crate) fn argument(&self, name: &str) -> Option<&str> {
        self.bootargs.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    /// How often tests that look for races shall try, in multiples of what they do without `effort=N`.
    pub(crate) fn effort(&self) -> u64 {
        self.argument("effort").and_then(|effort| effort.parse().ok()).unwrap_or(1)
    }

    /// Finds `size` bytes of free RAM that start at a multiple of `align`, the highest there are.
    pub(crate) fn free(&self, size: u64, align: u64) -> Option<Region> {
        self.free_beside(size, align, None)
    }

    /// The same, outside of a region that is taken already.
    pub(crate) fn free_beside(&self, size: u64, align: u64, beside: Option<Region>) -> Option<Region> {
        self.ram.iter().rev().find_map(|ram| {
            let mut start = ram.end.checked_sub(size)? / align * align;
            loop {
                let candidate = Region { start, end: start + size };
                if start < ram.start {
                    return None;
                }
                match self
                    .taken
                    .iter()
                    .chain(&beside)
                    .filter(|taken| taken.overlaps(candidate))
                    .map(|taken| taken.start)
                    .min()
                {
                    None => return Some(candidate),
                    Some(below) => start = below.checked_sub(size)? / align * align,
                }
            }
        })
    }
}
