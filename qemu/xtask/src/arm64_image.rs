//! The header of an arm64 kernel Image (Linux, `Documentation/arch/arm64/booting.rst`).

use anyhow::{Result, bail};

const MAGIC: &[u8] = b"ARM\x64";
const MAGIC_OFFSET: usize = 56;
const TEXT_OFFSET: usize = 8;
const IMAGE_SIZE: usize = 16;

/// Size of the header in bytes.
pub(crate) const HEADER_SIZE: usize = 64;

/// What a loader needs to know of an Image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Distance of the load address from a 2 MiB boundary, in bytes.
    pub(crate) text_offset: u64,
    /// Bytes of memory that the image takes from its load address on, BSS included.
    pub(crate) image_size: u64,
}

impl Header {
    /// Reads the header; `None` for a flat binary without one.
    ///
    /// # Errors
    ///
    /// Compressed kernels, which neither QEMU nor the hypervisor unpacks.
    pub(crate) fn parse(image: &[u8]) -> Result<Option<Self>> {
        if image.starts_with(&[0x1f, 0x8b]) {
            bail!("this is a gzip file: unpack it first, an uncompressed Image is needed");
        }
        if image.get(4..8) == Some(b"zimg") {
            bail!("this is a compressed EFI kernel (zboot): an uncompressed Image is needed");
        }
        if image.get(MAGIC_OFFSET..MAGIC_OFFSET + MAGIC.len()) != Some(MAGIC) || image.len() < HEADER_SIZE {
            return Ok(None);
        }
        let text_offset = read_u64(image, TEXT_OFFSET);
        let image_size = read_u64(image, IMAGE_SIZE);
        // A zero size marks headers from before Linux 3.17, which lack the field: the offset is not to be trusted then.
        if image_size == 0 {
            return Ok(Some(Self { text_offset: 0x8_0000, image_size: image.len() as u64 }));
        }
        Ok(Some(Self { text_offset, image_size: image_size.max(image.len() as u64) }))
    }
}

/// Asks the loader for another distance from the start of RAM (QEMU's `-kernel` takes it as that).
pub(crate) fn set_text_offset(image: &mut [u8], offset: u64) {
    image[TEXT_OFFSET..TEXT_OFFSET + 8].copy_from_slice(&offset.to_le_bytes());
}

/// An Image of a few instructions that jumps to `target` and keeps the registers of its entry but x16, so that QEMU's
/// `-kernel`, which prepares the device tree and x0, can start code that lies anywhere.
pub(crate) fn trampoline(target: u64, text_offset: u64) -> Vec<u8> {
    const BRANCH_OVER_HEADER: u32 = 0x1400_0010; // b . + 64
    const LOAD_LITERAL: u32 = 0x5800_0050; // ldr x16, . + 8
    const BRANCH_X16: u32 = 0xd61f_0200; // br x16
    let mut image = vec![0; HEADER_SIZE];
    image[..4].copy_from_slice(&BRANCH_OVER_HEADER.to_le_bytes());
    image[MAGIC_OFFSET..MAGIC_OFFSET + MAGIC.len()].copy_from_slice(MAGIC);
    set_text_offset(&mut image, text_offset);
    image.extend(LOAD_LITERAL.to_le_bytes());
    image.extend(BRANCH_X16.to_le_bytes());
    image.extend(target.to_le_bytes());
    let size = image.len() as u64;
    image[IMAGE_SIZE..IMAGE_SIZE + 8].copy_from_slice(&size.to_le_bytes());
    image
}

fn read_u64(bytes: &[u8], offset: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_binaries_have_no_header() {
        assert_eq!(Header::parse(&[]).unwrap(), None);
        assert_eq!(Header::parse(&[0; 4096]).unwrap(), None);
        let mut cut = vec![0; 60];
        cut[56..].copy_from_slice(MAGIC);
        assert_eq!(Header::parse(&cut).unwrap(), None);
    }

    #[test]
    fn compressed_kernels_are_refused() {
        assert!(Header::parse(&[0x1f, 0x8b, 8, 0]).is_err());
        assert!(Header::parse(b"MZ\0\0zimg").is_err());
    }

    #[test]
    fn size_counts_what_the_file_lacks() {
        let mut image = trampoline(0x4800_0000, 0x20_0000);
        assert_eq!(
            Header::parse(&image).unwrap(),
            Some(Header { text_offset: 0x20_0000, image_size: image.len() as u64 })
        );
        image[16..24].copy_from_slice(&0x300_0000_u64.to_le_bytes());
        assert_eq!(Header::parse(&image).unwrap().unwrap().image_size, 0x300_0000);
        set_text_offset(&mut image, 0x60_0000);
        assert_eq!(Header::parse(&image).unwrap().unwrap().text_offset, 0x60_0000);
    }

    #[test]
    fn old_headers_without_a_size() {
        let mut image = trampoline(0, 0);
        image[16..24].fill(0);
        assert_eq!(
            Header::parse(&image).unwrap(),
            Some(Header { text_offset: 0x8_0000, image_size: image.len() as u64 })
        );
    }
}
