//! Balloon (section 5.5): the guest gives memory back.
//!
//! A protected guest has to give a page up by MEM_RELINQUISH before it puts it into the balloon; the file's page is only
//! taken away if the host may look into it, which says that this has happened. A driver that does not know of protection
//! does not accept VIRTIO_F_ACCESS_PLATFORM, and the transport turns it away.

use std::io::Read as _;

use anyhow::Result;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::{Description, Device, Progress, QUEUE_SIZE, Rings, intact};
use crate::layout::PAGE;
use crate::memory::Returns;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The guest says so before it uses a page of the balloon again (5.5.3).
const F_MUST_TELL_HOST: u64 = 0;
/// The guest may take pages out of the balloon rather than end processes.
const F_DEFLATE_ON_OOM: u64 = 2;

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    pages: u32,
    memory: Returns,
}

impl Balloon {
    /// A balloon that the guest shall inflate to `size` bytes.
    pub fn new(size: u64, memory: Returns) -> Result<Self> {
        Ok(Self { pages: u32::try_from(size / PAGE)?, memory })
    }
}

impl Device for Balloon {
    fn description(&self) -> Description {
        // How many pages it shall have, and how many it has, which the driver says.
        let config = [self.pages.to_le_bytes(), [0; 4]].concat();
        let features = 1 << F_MUST_TELL_HOST | 1 << F_DEFLATE_ON_OOM;
        Description { id: VIRTIO_ID_BALLOON, features, queues: 2, config }
    }

    fn process(&mut self, rings: &mut Rings<'_>) -> Result<Progress> {
        let mut more = false;
        for queue in [INFLATE, DEFLATE] {
            let mut served = 0;
            while let Some(chain) = rings.next(queue)? {
                let head = chain.head_index();
                let (mut reader, _) = rings.buffers(chain)?;
                // Page numbers of 32 bits; a page that is used again comes by a fault.
                let mut number = [0; 4];
                while queue == INFLATE && reader.read_exact(&mut number).is_ok() {
                    intact()?;
                    self.memory.give_back(u64::from(u32::from_le_bytes(number)) * PAGE);
                }
                rings.done(queue, head, 0)?;
                served += 1;
                if served == QUEUE_SIZE {
                    more = true;
                    break;
                }
            }
        }
        Ok(Progress { more, listen: false })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{memory, request};
    use super::*;
    use crate::layout::RAM;
    use crate::memory::GuestRam;
    use vm_memory::{Bytes as _, GuestAddress};

    #[test]
    fn pages_of_the_balloon_are_zero_again() {
        let ram = GuestRam::map(0x4000, None, 0).unwrap();
        ram.load(&[1; 0x4000], RAM).unwrap();
        let mut balloon = Balloon::new(0x1000, ram.returns().unwrap()).unwrap();
        // The second page, and some that are not RAM.
        let numbers = [(RAM / PAGE) as u32 + 1, 0, u32::MAX, (RAM / PAGE) as u32 + 4].map(u32::to_le_bytes).concat();
        let (result, used) = request(&mut balloon, &memory(), (INFLATE, 2), &[&numbers], &[]);
        assert_eq!((result.unwrap(), used), (Progress::default(), Some(0)));
        let byte = |page: u64| ram.dma().read_obj::<u8>(GuestAddress(RAM + page * PAGE)).unwrap();
        assert_eq!([0, 1, 2, 3].map(byte), [1, 0, 1, 1]);
    }
}
