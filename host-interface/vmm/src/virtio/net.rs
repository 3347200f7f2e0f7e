//! Network card on a tap interface (section 5.1), without offloads.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};

use anyhow::Result;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;

use super::{Description, Device, Progress, QUEUE_SIZE, Rings, intact};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Before each frame: no offloads, and one buffer.
const HEADER: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// The largest frame.
const FRAME: usize = 65_550;

/// A network card.
#[derive(Debug)]
pub struct Net {
    tap: File,
    mac: [u8; 6],
    frame: Vec<u8>,
}

impl Net {
    /// A card with this address on `tap`, which does not block.
    pub fn new(tap: File, mac: [u8; 6]) -> Self {
        Self { tap, mac, frame: vec![0; HEADER.len() + FRAME] }
    }

    /// Hands frames of the host on. Returns whether it waits for more of them.
    fn receive(&mut self, rings: &mut Rings<'_>) -> Result<bool> {
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = rings.next(RECEIVE)? else { return Ok(false) };
            let head = chain.head_index();
            let (_, mut writer) = rings.buffers(chain)?;
            self.frame[..HEADER.len()].copy_from_slice(&HEADER);
            let length = match self.tap.read(&mut self.frame[HEADER.len()..]) {
                Ok(length) => HEADER.len() + length,
                Err(error) => {
                    rings.put_back(RECEIVE);
                    // It is down, or has nothing.
                    return Ok(error.kind() == ErrorKind::WouldBlock);
                }
            };
            if length > writer.available_bytes() {
                // As a wire does with a frame that is too long.
                rings.put_back(RECEIVE);
                continue;
            }
            writer.write_all(&self.frame[..length])?;
            rings.done(RECEIVE, head, length)?;
        }
        Ok(true)
    }

    /// Sends the guest's frames. Returns whether there may be more.
    fn transmit(&mut self, rings: &mut Rings<'_>) -> Result<bool> {
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = rings.next(TRANSMIT)? else { return Ok(false) };
            let head = chain.head_index();
            let (mut reader, _) = rings.buffers(chain)?;
            let length = reader.available_bytes();
            if (HEADER.len()..=self.frame.len()).contains(&length) {
                let frame = &mut self.frame[..length];
                reader.read_exact(frame)?;
                intact()?;
                // A frame that the host does not take is lost, as on any network.
                let _ = self.tap.write(&frame[HEADER.len()..]);
            }
            rings.done(TRANSMIT, head, 0)?;
        }
        Ok(true)
    }
}

impl Device for Net {
    fn description(&self) -> Description {
        Description { id: VIRTIO_ID_NET, features: 1 << VIRTIO_NET_F_MAC, queues: 2, config: self.mac.to_vec() }
    }

    fn source(&self) -> Option<RawFd> {
        Some(self.tap.as_raw_fd())
    }

    fn process(&mut self, rings: &mut Rings<'_>) -> Result<Progress> {
        let listen = self.receive(rings)?;
        let more = self.transmit(rings)?;
        Ok(Progress { more, listen })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BUFFERS, memory, request};
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;
    use vm_memory::{Bytes as _, GuestAddress};

    /// A card, and the network it is on.
    fn card() -> (Net, UnixDatagram) {
        let (tap, network) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        network.set_nonblocking(true).unwrap();
        (Net::new(File::from(OwnedFd::from(tap)), [2, 0, 0, 0, 0, 1]), network)
    }

    #[test]
    fn a_frame_from_the_guest() {
        let (mut net, network) = card();
        let (result, used) = request(&mut net, &memory(), (TRANSMIT, 2), &[&[0; 12], b"frame"], &[]);
        assert_eq!((result.unwrap(), used), (Progress::default(), Some(0)));
        let mut bytes = [0; 16];
        let length = network.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"frame");
    }

    #[test]
    fn a_frame_for_the_guest() {
        let (mut net, network) = card();
        network.send(b"a frame that is too long for it").unwrap();
        network.send(b"frame").unwrap();
        let memory = memory();
        let (result, used) = request(&mut net, &memory, (RECEIVE, 2), &[], &[20]);
        assert_eq!((result.unwrap(), used), (Progress::default(), Some(17)));
        let bytes: [u8; 17] = memory.read_obj(GuestAddress(BUFFERS)).unwrap();
        assert_eq!((&bytes[..12], &bytes[12..]), (&HEADER[..], &b"frame"[..]));
    }

    #[test]
    fn it_waits_for_the_network_if_there_is_a_buffer() {
        let (mut net, _network) = card();
        let (result, used) = request(&mut net, &memory(), (RECEIVE, 2), &[], &[20]);
        assert_eq!((result.unwrap(), used), (Progress { more: false, listen: true }, None));
    }

    #[test]
    fn odd_frames_are_dropped() {
        let (mut net, network) = card();
        let long = vec![0; HEADER.len() + FRAME + 1];
        for frame in [&[0; 11][..], &long] {
            let (result, used) = request(&mut net, &memory(), (TRANSMIT, 2), &[frame], &[]);
            assert_eq!((result.unwrap(), used), (Progress::default(), Some(0)));
        }
        assert!(network.recv(&mut [0; 16]).is_err());
    }
}
