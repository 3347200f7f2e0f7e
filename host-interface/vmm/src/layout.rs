//! Where things are in the guest's address space, and where the payload goes.

use anyhow::{Context, Result, ensure};

/// The distributor of the GICv3, 64 KiB.
pub const GIC_DISTRIBUTOR: u64 = 0x0800_0000;
/// Size of the distributor.
pub const GIC_DISTRIBUTOR_SIZE: u64 = 0x1_0000;
/// The redistributors, one after the other.
pub const GIC_REDISTRIBUTORS: u64 = 0x0810_0000;
/// Size of the redistributor of one vCPU.
pub const GIC_REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
/// The most vCPUs whose redistributors fit below the devices.
pub const MAX_CPUS: u32 = 128;
/// The serial port.
pub const SERIAL: u64 = 0x0A00_0000;
/// The first virtio device; each has a page of its own, which a pKVM guest may name by MMIO_GUARD.
pub const VIRTIO: u64 = 0x0A01_0000;
/// Size of the window of a device.
pub const DEVICE_SIZE: u64 = 0x1000;
/// Number of the serial port's SPI.
pub const SERIAL_SPI: u32 = 0;
/// Number of the first virtio device's SPI.
pub const VIRTIO_SPI: u32 = 1;
/// Interrupts that the GICv3 has: 32 private ones and 64 SPIs.
pub const NR_IRQS: u32 = 96;
/// The most virtio devices for which there is an SPI.
pub const MAX_VIRTIO: usize = 32;
/// Start of RAM.
pub const RAM: u64 = 0x4000_0000;

/// What a kernel may be aligned to, and the most that a device tree may take (Linux, `Documentation/arch/arm64/booting.rst`).
pub const BLOCK: u64 = 0x20_0000;
/// Size of a page.
pub const PAGE: u64 = 0x1000;

/// What the first 64 bytes of an arm64 `Image` say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageHeader {
    /// Where the image wants to be, from a multiple of 2 MiB.
    pub text_offset: u64,
    /// Memory that it takes, what is not in the file included.
    pub size: u64,
}

impl ImageHeader {
    /// Length of the header.
    pub const LENGTH: usize = 64;

    /// Reads the header of an image whose file has `file_size` bytes.
    pub fn parse(header: &[u8; Self::LENGTH], file_size: u64) -> Result<Self> {
        let word = |at: usize| header[at..].first_chunk().map(|bytes| u64::from_le_bytes(*bytes)).unwrap_or_default();
        ensure!(header[56..60] == *b"ARM\x64", "not an uncompressed arm64 Image");
        let (text_offset, size, flags) = (word(8), word(16), word(24));
        ensure!(size != 0, "an Image of before Linux 3.17 has no size");
        ensure!(flags & 1 == 0, "the kernel is big-endian");
        ensure!(text_offset < BLOCK && text_offset.is_multiple_of(PAGE), "the Image has an odd text offset");
        Ok(Self { text_offset, size: size.max(file_size) })
    }
}

/// Where the payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The kernel, where vCPU 0 starts.
    pub kernel: u64,
    /// The device tree.
    pub device_tree: u64,
    /// The initrd's start and length.
    pub initrd: Option<(u64, u64)>,
}

impl Placement {
    /// Finds places in `ram` bytes of RAM: the kernel at its start, then 2 MiB for the device tree, then the initrd.
    pub fn plan(ram: u64, kernel: ImageHeader, initrd: Option<u64>) -> Result<Self> {
        let too_small = "the kernel and the initrd do not fit into the guest's memory";
        let start = RAM + kernel.text_offset;
        let device_tree = start.checked_add(kernel.size).and_then(|end| end.checked_next_multiple_of(BLOCK));
        let device_tree = device_tree.context(too_small)?;
        let after = device_tree.checked_add(BLOCK).context(too_small)?;
        let end = after.checked_add(initrd.unwrap_or(0)).context(too_small)?;
        ensure!(end <= RAM + ram, "{too_small}: they need {} MiB", (end - RAM).div_ceil(1 << 20));
        Ok(Self { kernel: start, device_tree, initrd: initrd.map(|length| (after, length)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(text_offset: u64, size: u64, flags: u64) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[8..16].copy_from_slice(&text_offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&size.to_le_bytes());
        bytes[24..32].copy_from_slice(&flags.to_le_bytes());
        bytes[56..60].copy_from_slice(b"ARM\x64");
        bytes
    }

    #[test]
    fn a_header_is_read() {
        let parsed = ImageHeader::parse(&header(0, 0x200_0000, 0b1010), 0x100_0000).unwrap();
        assert_eq!(parsed, ImageHeader { text_offset: 0, size: 0x200_0000 });
    }

    #[test]
    fn the_file_counts_if_it_is_larger() {
        assert_eq!(ImageHeader::parse(&header(0, 0x1000, 0), 0x5000).unwrap().size, 0x5000);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        assert!(ImageHeader::parse(&[0; 64], 64).is_err());
        assert!(ImageHeader::parse(&header(0, 0, 0), 64).is_err());
        assert!(ImageHeader::parse(&header(0, 64, 1), 64).is_err());
        assert!(ImageHeader::parse(&header(!0xfff, 64, 0), 64).is_err());
    }

    #[test]
    fn the_payload_follows_the_kernel() {
        let kernel = ImageHeader { text_offset: 0x8_0000, size: 0x123_4567 };
        let plan = Placement::plan(64 << 20, kernel, Some(0x1234)).unwrap();
        assert_eq!(plan.kernel, RAM + 0x8_0000);
        assert_eq!(plan.device_tree, RAM + 0x140_0000);
        assert_eq!(plan.initrd, Some((RAM + 0x160_0000, 0x1234)));
    }

    #[test]
    fn too_little_memory_is_an_error() {
        let kernel = ImageHeader { text_offset: 0, size: 62 << 20 };
        assert!(Placement::plan(64 << 20, kernel, None).is_ok());
        assert!(Placement::plan(64 << 20, kernel, Some(1)).is_err());
        assert!(Placement::plan(64 << 20, ImageHeader { text_offset: 0, size: u64::MAX }, None).is_err());
        assert!(Placement::plan(64 << 20, kernel, Some(u64::MAX)).is_err());
    }
}
