//! The guest's RAM: one mapping, seen by the loader and by the devices.

#![expect(unsafe_code, reason = "madvise")]

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::fault::Guard;
use crate::layout::{PAGE, RAM};

/// What devices access the guest's memory through.
pub type DmaMemory = Arc<GuestMemoryMmap>;

/// The guest's RAM.
#[derive(Debug)]
pub struct GuestRam {
    mapping: Arc<MmapRegion>,
    memory: GuestMemoryMmap,
    dma: DmaMemory,
    _guard: Option<Guard>,
}

impl GuestRam {
    /// Maps `size` bytes: of `file`, a guest_memfd, or anonymous ones.
    ///
    /// A realm's devices see it where the guest shares it, at addresses that have `shared_bit` set: nothing else can be
    /// reached by what a ring says.
    pub fn map(size: u64, file: Option<File>, shared_bit: u64) -> Result<Self> {
        let length = usize::try_from(size)?;
        let descriptor = file.as_ref().map(|file| file.as_raw_fd());
        let mapping = match file {
            Some(file) => MmapRegion::from_file(FileOffset::new(file, 0), length),
            None => MmapRegion::new(length),
        };
        let mapping = Arc::new(mapping.context("cannot map the guest's memory")?);
        let at = |address| -> Result<GuestMemoryMmap> {
            let region = GuestRegionMmap::with_arc(Arc::clone(&mapping), GuestAddress(address));
            Ok(GuestMemoryMmap::from_regions(vec![region.context("the guest's memory ends beyond its addresses")?])?)
        };
        let (memory, dma) = (at(RAM)?, Arc::new(at(RAM | shared_bit)?));
        let guard = descriptor.map(|descriptor| Guard::new(mapping.as_ptr(), length, descriptor)).transpose()?;
        Ok(Self { mapping, memory, dma, _guard: guard })
    }

    /// Where it is in this process.
    pub fn address(&self) -> u64 {
        self.mapping.as_ptr().addr() as u64
    }

    /// What devices access it through.
    pub fn dma(&self) -> DmaMemory {
        Arc::clone(&self.dma)
    }

    /// What a balloon gives pages back through.
    pub fn returns(&self) -> Result<Returns> {
        let file = self.mapping.file_offset().map(|offset| offset.file().try_clone()).transpose()?;
        Ok(Returns { mapping: Arc::clone(&self.mapping), file })
    }

    /// Reads a file into it.
    pub fn load_file(&self, file: &mut File, length: u64, address: u64) -> Result<()> {
        self.memory.read_exact_volatile_from(GuestAddress(address), file, usize::try_from(length)?)?;
        Ok(())
    }

    /// Copies bytes into it.
    pub fn load(&self, bytes: &[u8], address: u64) -> Result<()> {
        Ok(self.memory.write_slice(bytes, GuestAddress(address))?)
    }
}

/// Gives pages back to the host.
#[derive(Debug)]
pub struct Returns {
    mapping: Arc<MmapRegion>,
    file: Option<File>,
}

impl Returns {
    /// Gives the page at a guest address back, if there is one and it is not the guest's alone.
    pub fn give_back(&self, address: u64) {
        let offset = address.wrapping_sub(RAM);
        let size = self.mapping.size() as u64;
        if offset >= size || !offset.is_multiple_of(PAGE) {
            return;
        }
        match &self.file {
            Some(file) => {
                if file.read_exact_at(&mut [0], offset).is_ok() {
                    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    // A host that cannot take the page leaves it to the guest.
                    let _ = fallocate(file, mode, offset.cast_signed(), PAGE.cast_signed());
                }
            }
            None => discard(&self.mapping, offset as usize),
        }
    }
}

/// Replaces a page by zeros that take no memory.
fn discard(mapping: &MmapRegion, offset: usize) {
    let page = mapping.as_ptr().wrapping_add(offset);
    // SAFETY: the page is inside the mapping, which nobody has references into: vm-memory uses pointers alone. A host that
    // cannot discard it leaves it to the guest, so the result does not matter.
    unsafe { libc::madvise(page.cast(), PAGE as usize, libc::MADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_see_a_realm_where_it_is_shared() {
        let ram = GuestRam::map(0x4000, None, 1 << 39).unwrap();
        ram.load(b"payload", RAM + 0x1000).unwrap();
        let mut bytes = [0; 7];
        ram.dma().read_slice(&mut bytes, GuestAddress(RAM + 0x1000 + (1 << 39))).unwrap();
        assert_eq!(&bytes, b"payload");
        assert!(ram.dma().read_slice(&mut bytes, GuestAddress(RAM + 0x1000)).is_err());
    }

    #[test]
    fn the_payload_stays_inside() {
        let ram = GuestRam::map(0x4000, None, 0).unwrap();
        assert!(ram.load(&[0; 2], RAM + 0x3fff).is_err());
        assert!(ram.load(&[0; 1], RAM - 1).is_err());
    }
}
