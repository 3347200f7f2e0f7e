//! Console device with one port (section 5.3).

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};

use anyhow::Result;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::{Description, Device, Progress, QUEUE_SIZE, Rings, intact};
use crate::console::Console;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// What is moved at once.
const CHUNK: usize = 4096;

/// A console.
#[derive(Debug)]
pub struct VirtioConsole(pub Console);

impl VirtioConsole {
    /// Hands on what the user has typed. Returns whether it waits for more of it.
    fn receive(&self, rings: &mut Rings<'_>) -> Result<bool> {
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = rings.next(RECEIVE)? else { return Ok(false) };
            let head = chain.head_index();
            let (_, mut writer) = rings.buffers(chain)?;
            let bytes = self.0.input.take(writer.available_bytes().min(CHUNK));
            if bytes.is_empty() {
                rings.put_back(RECEIVE);
                return Ok(true);
            }
            writer.write_all(&bytes)?;
            rings.done(RECEIVE, head, bytes.len())?;
        }
        Ok(true)
    }

    /// Prints what the guest says. Returns whether there may be more.
    fn transmit(&mut self, rings: &mut Rings<'_>) -> Result<bool> {
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = rings.next(TRANSMIT)? else { return Ok(false) };
            let head = chain.head_index();
            let (mut reader, _) = rings.buffers(chain)?;
            let mut bytes = [0; CHUNK];
            loop {
                let length = reader.read(&mut bytes)?;
                intact()?;
                if length == 0 {
                    break;
                }
                self.0.output.write_all(&bytes[..length])?;
            }
            rings.done(TRANSMIT, head, 0)?;
        }
        Ok(true)
    }
}

impl Device for VirtioConsole {
    fn description(&self) -> Description {
        Description { id: VIRTIO_ID_CONSOLE, features: 0, queues: 2, config: Vec::new() }
    }

    fn source(&self) -> Option<RawFd> {
        Some(self.0.input.ready.as_raw_fd())
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
    use crate::args::ConsoleKind;
    use crate::report::Report;
    use vm_memory::{Bytes as _, GuestAddress};

    #[test]
    fn both_directions() {
        let path = std::env::temp_dir().join(format!("ravelin-vmm-console-{}", std::process::id()));
        let console = Console::open(&ConsoleKind::Log(path.clone()), "test", &Report::new(false, false)).unwrap();
        let (input, output) = (console.input.clone(), console.output.clone());
        let mut device = VirtioConsole(console);
        let memory = memory();

        let (result, used) = request(&mut device, &memory, (TRANSMIT, 2), &[b"hello ", b"world"], &[]);
        assert_eq!((result.unwrap(), used), (Progress { more: false, listen: false }, Some(0)));
        output.drain();
        assert_eq!(std::fs::read(&path).unwrap(), b"hello world");
        std::fs::remove_file(path).unwrap();

        let (result, used) = request(&mut device, &memory, (RECEIVE, 2), &[], &[8]);
        assert_eq!((result.unwrap(), used), (Progress { more: false, listen: true }, None));
        input.push(b"typed");
        let (result, used) = request(&mut device, &memory, (RECEIVE, 2), &[], &[8]);
        assert_eq!((result.unwrap(), used), (Progress { more: false, listen: false }, Some(5)));
        let bytes: [u8; 5] = memory.read_obj(GuestAddress(BUFFERS)).unwrap();
        assert_eq!(&bytes, b"typed");
    }
}
