//! Entropy device (section 5.4).

use std::fs::File;
use std::io::{Read as _, Write as _};

use anyhow::{Context, Result};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{Description, Device, Progress, QUEUE_SIZE, Rings};

/// What one request gets at most.
const MOST: usize = 4096;

/// A source of entropy, the host's.
#[derive(Debug)]
pub struct Rng(File);

impl Rng {
    /// Opens the source.
    pub fn new() -> Result<Self> {
        Ok(Self(File::open("/dev/urandom").context("no source of entropy")?))
    }
}

impl Device for Rng {
    fn description(&self) -> Description {
        Description { id: VIRTIO_ID_RNG, features: 0, queues: 1, config: Vec::new() }
    }

    fn process(&mut self, rings: &mut Rings<'_>) -> Result<Progress> {
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = rings.next(0)? else { return Ok(Progress::default()) };
            let head = chain.head_index();
            let (_, mut writer) = rings.buffers(chain)?;
            let mut bytes = vec![0; writer.available_bytes().min(MOST)];
            self.0.read_exact(&mut bytes)?;
            writer.write_all(&bytes)?;
            rings.done(0, head, bytes.len())?;
        }
        Ok(Progress { more: true, listen: false })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BUFFERS, memory, request};
    use super::*;
    use vm_memory::{Bytes as _, GuestAddress};

    #[test]
    fn buffers_are_filled() {
        let memory = memory();
        let (result, used) = request(&mut Rng::new().unwrap(), &memory, (0, 1), &[], &[64, 8000]);
        assert_eq!((result.unwrap(), used), (Progress::default(), Some(4096)));
        let bytes: [u8; 32] = memory.read_obj(GuestAddress(BUFFERS)).unwrap();
        assert_ne!(bytes, [0; 32]);
    }
}
