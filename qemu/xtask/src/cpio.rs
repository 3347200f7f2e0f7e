//! Writes cpio archives in the "newc" format, which the kernel unpacks as its initramfs
//! (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// An archive under construction. Paths are relative, without a leading slash.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// Adds a directory, and those that it lies in.
    pub(crate) fn directory(&mut self, path: &str) {
        if !self.directories.insert(path.to_owned()) {
            return;
        }
        self.parents(path);
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// The kernel makes no directories by itself.
    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    /// Adds a file with its permission bits.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) {
        self.parents(path);
        self.entry(path, REGULAR | permissions, (0, 0), contents);
    }

    /// Adds a character device that only root may open.
    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER | 0o600, (major, minor), &[]);
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        let size = u32::try_from(contents.len()).expect("a file of an initramfs is below 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("a path is short");
        self.entries += 1;
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device of the file (2), device it stands for (2), name size, check
        for field in [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_of_one_file() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000081ed");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[94..102], b"00000005");
        assert_eq!(&bytes[110..115], b"init\0");
        // Header and name end at 115, contents start at the next multiple of four.
        assert_eq!(&bytes[116..121], b"hello");
        assert_eq!(&bytes[124..130], b"070701");
        assert!(bytes.len().is_multiple_of(4));
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }

    #[test]
    fn directories_come_once_and_before_what_is_in_them() {
        let mut archive = Archive::default();
        archive.file("a/b/c", 0o644, b"");
        archive.directory("a/b");
        archive.file("a/b/d", 0o644, b"");
        let bytes = archive.finish();
        let names: Vec<_> = bytes.split(|&byte| byte == 0).filter(|part| part.starts_with(b"070701")).collect();
        let names: Vec<_> = names.iter().map(|entry| String::from_utf8_lossy(&entry[110..])).collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/b/d", "TRAILER!!!"]);
    }

    #[test]
    fn devices_carry_their_numbers() {
        let mut archive = Archive::default();
        archive.character_device("dev/console", 5, 1);
        let bytes = archive.finish();
        assert_eq!(&bytes[14..22], b"00002180");
        assert_eq!(&bytes[78..94], b"0000000500000001");
    }
}
