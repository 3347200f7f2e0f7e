//! What kind of kernel the host is.

use ravelin_memory::{BLOCK_SIZE, PhysAddr, PhysRange};

use crate::{DtbError, Fault, Platform, chosen::ByteRange};

/// The magic number of an arm64 Image, "ARM\x64", at offset 56.
const MAGIC: [u8; 4] = *b"ARM\x64";

/// Text offset of an Image whose header says nothing about its size.
const OLD_TEXT_OFFSET: u64 = 0x8_0000;

/// The host's kernel, ready to be entered where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostImage {
    /// The address of its first instruction.
    pub entry: PhysAddr,
    /// The RAM that it takes, with what it does not bring but expects to be free.
    pub footprint: PhysRange,
}

impl HostImage {
    /// The bytes of the kernel that [`HostImage::inspect`] looks at.
    pub const HEADER_SIZE: usize = 64;

    /// Looks at the kernel module of `platform`, of which `start` holds the first [`HostImage::HEADER_SIZE`] bytes, or
    /// all if there are fewer. It is either an arm64 Image (Linux, `Documentation/arch/arm64/booting.rst`) or a flat
    /// binary that is entered at its first byte and takes no more than its own size.
    ///
    /// # Errors
    ///
    /// Blames the module's node if the kernel cannot run where it is: a flat binary that is not aligned to
    /// instructions, an Image that is big-endian, not at its text offset modulo 2 MiB, or that reaches out of its region
    /// of RAM or into the ramdisk.
    pub fn inspect(platform: &Platform<'_>, start: &[u8]) -> Result<Self, DtbError> {
        let module = &platform.kernel;
        let blame = |fault| module.blame(fault);
        let field = |offset: usize| start.get(offset..).and_then(<[u8]>::first_chunk).copied().map(u64::from_le_bytes);
        let is_image = start.get(56..).and_then(<[u8]>::first_chunk) == Some(&MAGIC);
        let base = module.bytes.base();
        let bytes = match (field(8), field(16), field(24)) {
            (Some(text_offset), Some(image_size), Some(flags)) if is_image => {
                // The other flags, page size and placement, leave the choice to the one who loads it.
                if flags & 1 != 0 {
                    return Err(blame(Fault::Unsupported("the kernel is a big-endian Image")));
                }
                let text_offset = if image_size == 0 { OLD_TEXT_OFFSET } else { text_offset };
                if base.checked_sub(text_offset).is_none_or(|start| !start.is_multiple_of(BLOCK_SIZE)) {
                    return Err(blame(Fault::Region {
                        base,
                        size: module.bytes.size(),
                        problem: "the Image is not at its text offset from a multiple of 2 MiB",
                    }));
                }
                ByteRange::new(base, image_size.max(module.bytes.size())).map_err(blame)?
            }
            _ if !base.is_multiple_of(4) => {
                let problem = "the flat binary is not aligned to 4 bytes";
                return Err(blame(Fault::Region { base, size: module.bytes.size(), problem }));
            }
            _ => module.bytes,
        };
        let footprint = bytes.pages();
        if !platform.ram.iter().any(|region| region.covers(&footprint)) {
            return Err(blame(Fault::NotRam(footprint)));
        }
        if let Some(ramdisk) = &platform.ramdisk {
            ramdisk.check_apart("the memory that the kernel needs", footprint)?;
        }
        let entry = PhysAddr::new(base).ok_or_else(|| blame(Fault::NotRam(footprint)))?;
        Ok(Self { entry, footprint })
    }
}
