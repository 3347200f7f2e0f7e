//! Virtio devices (OASIS Virtual I/O Device 1.2) on the MMIO transport.
//!
//! A vCPU's thread only touches the transport's registers. The rings and the buffers belong to the device's own thread.

pub mod balloon;
pub mod block;
pub mod console;
pub mod mmio;
pub mod net;
pub mod rng;
mod worker;

use std::os::fd::RawFd;

use anyhow::{Result, bail, ensure};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueT as _, Reader, Writer};
use vm_memory::GuestMemoryMmap;

use crate::fault;

/// Size of a queue.
pub const QUEUE_SIZE: u16 = 256;

/// What a device is.
#[derive(Clone, Debug)]
pub struct Description {
    /// Number of its kind (section 5).
    pub id: u32,
    /// Features of its kind.
    pub features: u64,
    /// Number of queues.
    pub queues: usize,
    /// Configuration space.
    pub config: Vec<u8>,
}

/// What there is to do for a device after it was called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// It has stopped before all was done.
    pub more: bool,
    /// It waits for its source.
    pub listen: bool,
}

/// A device.
pub trait Device: Send {
    /// What it is; the same each time.
    fn description(&self) -> Description;

    /// Something besides the queues that it may wait for.
    fn source(&self) -> Option<RawFd> {
        None
    }

    /// Serves the queues and the source, for a bounded time. An error stops it until the driver resets it.
    fn process(&mut self, rings: &mut Rings<'_>) -> Result<Progress>;
}

/// A request: buffers of the guest.
pub type Chain<'a> = DescriptorChain<&'a GuestMemoryMmap>;

/// The queues of a device that the driver has set up.
#[derive(Debug)]
pub struct Rings<'a> {
    memory: &'a GuestMemoryMmap,
    queues: &'a mut [Queue],
    used: bool,
}

impl<'a> Rings<'a> {
    /// The device's view.
    pub fn new(memory: &'a GuestMemoryMmap, queues: &'a mut [Queue]) -> Self {
        Self { memory, queues, used: false }
    }

    /// The next request of a queue. Without one, the driver will notify the device of the next.
    pub fn next(&mut self, queue: usize) -> Result<Option<Chain<'a>>> {
        let (memory, Some(queue)) = (self.memory, self.queues.get_mut(queue)) else { return Ok(None) };
        if !queue.ready() {
            return Ok(None);
        }
        let mut chain = queue.iter(memory)?.next();
        if chain.is_none() && queue.enable_notification(memory)? {
            chain = queue.iter(memory)?.next();
        }
        intact()?;
        Ok(chain)
    }

    /// Puts the request back that [`Self::next`] gave last.
    pub fn put_back(&mut self, queue: usize) {
        if let Some(queue) = self.queues.get_mut(queue) {
            queue.go_to_previous_position();
        }
    }

    /// Hands a request back, of whose buffers `written` bytes were filled.
    pub fn done(&mut self, queue: usize, head: u16, written: usize) -> Result<()> {
        // What was not read or written was not served.
        intact()?;
        let Some(queue) = self.queues.get_mut(queue) else { bail!("no such queue") };
        queue.add_used(self.memory, head, u32::try_from(written)?)?;
        self.used |= queue.needs_notification(self.memory)?;
        intact()
    }

    /// Whether the driver wants an interrupt for what was handed back.
    pub fn interrupt(&self) -> bool {
        self.used
    }

    /// What the device may read of a request, and what it may write.
    pub fn buffers(&self, chain: Chain<'a>) -> Result<(Reader<'a>, Writer<'a>)> {
        let buffers = (chain.clone().reader(self.memory)?, chain.writer(self.memory)?);
        intact()?;
        Ok(buffers)
    }
}

/// Fails if this thread has touched a page that the guest does not share.
pub fn intact() -> Result<()> {
    ensure!(!fault::take(), "the driver has named memory that the guest does not share");
    Ok(())
}

#[cfg(test)]
pub(crate) mod testing {
    use super::{Device, Progress, QUEUE_SIZE, Rings};
    use anyhow::Result;
    use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueT as _};
    use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

    pub(crate) const BUFFERS: u64 = 0x10_0000;

    /// Guest memory of 4 MiB.
    pub(crate) fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap()
    }

    /// A driver that has put one request into queue `index` of `count`: buffers to read, then buffers to write, one after
    /// the other from [`BUFFERS`]. Returns the result of the device, and what the used ring says was written.
    pub(crate) fn request(
        device: &mut dyn Device,
        memory: &GuestMemoryMmap,
        (index, count): (usize, usize),
        readable: &[&[u8]],
        writable: &[u32],
    ) -> (Result<Progress>, Option<u32>) {
        let mock = MockSplitQueue::new(memory, QUEUE_SIZE);
        let mut address = BUFFERS;
        let mut descriptors = Vec::new();
        let total = readable.len() + writable.len();
        let mut add = |length: u32, flags: u32| {
            let next = if descriptors.len() + 1 < total { VRING_DESC_F_NEXT } else { 0 };
            let position = descriptors.len() as u16 + 1;
            descriptors.push(RawDescriptor::from(Descriptor::new(address, length, (flags | next) as u16, position)));
            address += u64::from(length);
        };
        let mut at = BUFFERS;
        for bytes in readable {
            memory.write_slice(bytes, GuestAddress(at)).unwrap();
            at += bytes.len() as u64;
            add(bytes.len() as u32, 0);
        }
        writable.iter().for_each(|length| add(*length, VRING_DESC_F_WRITE));
        mock.build_desc_chain(&descriptors).unwrap();
        let mut queues: Vec<Queue> = (0..count).map(|_| Queue::new(QUEUE_SIZE).unwrap()).collect();
        queues[index] = mock.create_queue().unwrap();
        let result = device.process(&mut Rings::new(memory, &mut queues));
        let used = mock.used();
        let written = (u16::from_le(used.idx().load()) == 1).then(|| used.ring().ref_at(0).unwrap().load().len());
        (result, written)
    }
}
