//! Block device on a raw file (section 5.2).

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context, Result, ensure};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Reader, Writer};

use super::{Description, Device, Progress, QUEUE_SIZE, Rings, intact};
use crate::args::DiskConfig;

const SECTOR: u64 = 512;
/// What is moved at once. Data pass through a buffer of the VMM, so that what goes to the disk is what was checked.
const CHUNK: usize = 128 << 10;

/// A disk.
#[derive(Debug)]
pub struct Block {
    file: File,
    size: u64,
    read_only: bool,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    buffer: Vec<u8>,
}

impl Block {
    /// Opens the file, which no other VM may write to meanwhile.
    pub fn open(config: &DiskConfig) -> Result<Self> {
        let path = config.path.display();
        let mut file = File::options()
            .read(true)
            .write(!config.read_only)
            .open(&config.path)
            .with_context(|| format!("cannot open {path}"))?;
        let locked = if config.read_only { file.try_lock_shared() } else { file.try_lock() };
        locked.with_context(|| format!("{path} is in use"))?;
        // The size of a block device is not in its metadata.
        let size = file.seek(SeekFrom::End(0))?;
        ensure!(size.is_multiple_of(SECTOR), "the size of {path} is not a multiple of 512 bytes");
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let name = config.path.file_name().unwrap_or_default().as_encoded_bytes();
        id.iter_mut().zip(name).for_each(|(to, from)| *to = *from);
        Ok(Self { file, size, read_only: config.read_only, id, buffer: vec![0; CHUNK] })
    }

    /// Performs a request and returns how many bytes of its buffers were filled.
    fn request(&mut self, mut reader: Reader<'_>, mut writer: Writer<'_>) -> Result<usize> {
        let room = writer.available_bytes();
        ensure!(room > 0, "a request without room for its status");
        let mut status = writer.split_at(room - 1)?;
        let header: [u8; 16] = reader.read_obj().context("a request without a header")?;
        intact()?;
        let kind = header.first_chunk().map_or(u32::MAX, |bytes| u32::from_le_bytes(*bytes));
        let sector = header.last_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let result = match kind {
            VIRTIO_BLK_T_IN => self.read(sector, &mut writer),
            VIRTIO_BLK_T_OUT => self.write(sector, &mut reader),
            VIRTIO_BLK_T_FLUSH => self.file.sync_data().is_ok().into(),
            VIRTIO_BLK_T_GET_ID => writer.write_all(&self.id).is_ok().into(),
            _ => Outcome::Unsupported,
        };
        status.write_all(&[result as u8])?;
        // Also what was done with the buffers before.
        intact()?;
        Ok(writer.bytes_written() + 1)
    }

    /// Where a transfer begins, if all of it is on the disk.
    fn place(&self, sector: u64, length: usize) -> Option<u64> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(length as u64)?;
        (end <= self.size && (length as u64).is_multiple_of(SECTOR)).then_some(start)
    }

    fn read(&mut self, sector: u64, writer: &mut Writer<'_>) -> Outcome {
        let mut left = writer.available_bytes();
        let Some(mut position) = self.place(sector, left) else { return Outcome::Error };
        while left > 0 {
            let chunk = &mut self.buffer[..left.min(CHUNK)];
            if self.file.read_exact_at(chunk, position).is_err() || writer.write_all(chunk).is_err() {
                return Outcome::Error;
            }
            left -= chunk.len();
            position += chunk.len() as u64;
        }
        Outcome::Done
    }

    fn write(&mut self, sector: u64, reader: &mut Reader<'_>) -> Outcome {
        let mut left = reader.available_bytes();
        let Some(mut position) = self.place(sector, left).filter(|_| !self.read_only) else { return Outcome::Error };
        while left > 0 {
            let chunk = &mut self.buffer[..left.min(CHUNK)];
            // Zeros in place of what the guest does not share are not for the disk.
            let read = reader.read_exact(chunk).is_ok() && !crate::fault::pending();
            if !read || self.file.write_all_at(chunk, position).is_err() {
                return Outcome::Error;
            }
            left -= chunk.len();
            position += chunk.len() as u64;
        }
        Outcome::Done
    }
}

/// The status of a request.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Outcome {
    Done = VIRTIO_BLK_S_OK as u8,
    Error = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

impl From<bool> for Outcome {
    fn from(done: bool) -> Self {
        if done { Self::Done } else { Self::Error }
    }
}

impl Device for Block {
    fn description(&self) -> Description {
        let read_only = u64::from(self.read_only) << VIRTIO_BLK_F_RO;
        // Capacity, an unused size_max, and seg_max: what an indirect table that fits the queue has room for.
        let mut config = (self.size / SECTOR).to_le_bytes().to_vec();
        config.extend([0; 4]);
        config.extend((u32::from(QUEUE_SIZE) - 2).to_le_bytes());
        let features = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX | read_only;
        Description { id: VIRTIO_ID_BLOCK, features, queues: 1, config }
    }

    fn process(&mut self, rings: &mut Rings<'_>) -> Result<Progress> {
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = rings.next(0)? else { return Ok(Progress::default()) };
            let head = chain.head_index();
            let (reader, writer) = rings.buffers(chain)?;
            let written = self.request(reader, writer)?;
            rings.done(0, head, written)?;
        }
        Ok(Progress { more: true, listen: false })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BUFFERS, memory, request};
    use super::*;
    use std::path::PathBuf;
    use vm_memory::{Bytes as _, GuestAddress};

    const SECTORS: u64 = 600;

    fn disk(name: &str, read_only: bool) -> (Block, PathBuf) {
        let path = std::env::temp_dir().join(format!("ravelin-vmm-block-{name}-{}", std::process::id()));
        let contents: Vec<u8> = (0..SECTORS).flat_map(|sector| [sector as u8; 512]).collect();
        std::fs::write(&path, contents).unwrap();
        (Block::open(&DiskConfig { path: path.clone(), read_only }).unwrap(), path)
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    #[test]
    fn a_read_in_pieces() {
        let (mut disk, path) = disk("read", false);
        let memory = memory();
        let (result, used) = request(&mut disk, &memory, (0, 1), &[&header(VIRTIO_BLK_T_IN, 3)], &[100, 924, 1]);
        assert_eq!((result.unwrap(), used), (Progress::default(), Some(1025)));
        let mut bytes = [0xff; 1025];
        memory.read_slice(&mut bytes, GuestAddress(BUFFERS + 16)).unwrap();
        assert!(bytes[..512].iter().all(|byte| *byte == 3) && bytes[512..1024].iter().all(|byte| *byte == 4));
        assert_eq!(bytes[1024], 0);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_write_larger_than_the_buffer() {
        let (mut disk, path) = disk("write", false);
        let memory = memory();
        let data = vec![0xa5; CHUNK + 512];
        let (result, used) = request(&mut disk, &memory, (0, 1), &[&header(VIRTIO_BLK_T_OUT, 2), &data], &[1]);
        assert_eq!((result.unwrap(), used), (Progress::default(), Some(1)));
        let contents = std::fs::read(&path).unwrap();
        assert_eq!(&contents[1024..1024 + data.len()], &data);
        assert_eq!((contents[1023], contents[1024 + data.len()]), (1, ((1024 + data.len()) / 512) as u8));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_is_not_on_the_disk_is_an_error() {
        let (mut disk, path) = disk("bounds", false);
        let memory = memory();
        for (kind, sector, length) in [
            (VIRTIO_BLK_T_IN, SECTORS, 512),
            (VIRTIO_BLK_T_IN, SECTORS - 1, 1024),
            (VIRTIO_BLK_T_IN, u64::MAX, 512),
            (VIRTIO_BLK_T_IN, u64::MAX / 512, 512),
            (VIRTIO_BLK_T_IN, 0, 511),
        ] {
            let (result, used) = request(&mut disk, &memory, (0, 1), &[&header(kind, sector)], &[length, 1]);
            assert!(result.is_ok() && used == Some(1), "{sector} {length}");
            let status: u8 = memory.read_obj(GuestAddress(BUFFERS + 16 + u64::from(length))).unwrap();
            assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR, "{sector} {length}");
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_read_only_disk_is_not_written() {
        let (mut disk, path) = disk("ro", true);
        let memory = memory();
        let (result, _) = request(&mut disk, &memory, (0, 1), &[&header(VIRTIO_BLK_T_OUT, 0), &[0xa5; 512]], &[1]);
        assert!(result.is_ok());
        let status: u8 = memory.read_obj(GuestAddress(BUFFERS + 528)).unwrap();
        assert_eq!(u32::from(status), VIRTIO_BLK_S_IOERR);
        assert_eq!(std::fs::read(&path).unwrap()[0], 0);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn malformed_requests_stop_the_device() {
        let (mut disk, path) = disk("malformed", false);
        let memory = memory();
        let short = [0; 15];
        assert!(request(&mut disk, &memory, (0, 1), &[&short], &[1]).0.is_err());
        assert!(request(&mut disk, &memory, (0, 1), &[&header(VIRTIO_BLK_T_FLUSH, 0)], &[]).0.is_err());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_disk_has_one_writer() {
        let (_disk, path) = disk("lock", false);
        assert!(Block::open(&DiskConfig { path: path.clone(), read_only: true }).is_err());
        std::fs::remove_file(path).unwrap();
    }
}
