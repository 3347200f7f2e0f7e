//! The guest's serial port, a 16550A.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::Result;
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::MmioDevice;
use crate::console::{Console, Input, Output};

/// Raises the interrupt.
#[derive(Debug)]
struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Says when the guest has read all.
#[derive(Debug)]
struct Drained(EventFd);

/// The register that enables interrupts, and the bit that enables that of received data.
const IER: u8 = 1;
const IER_RECEIVED: u8 = 1;

impl SerialEvents for Drained {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // It is signalled already if this fails.
        let _ = self.0.write(1);
    }
}

/// The serial port.
#[derive(Debug)]
pub struct SerialPort(Mutex<Serial<Irq, Drained, Output>>);

impl SerialPort {
    /// A serial port that `irq` raises the interrupt of, and the thread that hands the user's input to it.
    pub fn new(console: &Console, irq: EventFd) -> Result<(Arc<Self>, SerialInput)> {
        let drained = EventFd::new(EFD_NONBLOCK)?;
        let port = Serial::with_events(Irq(irq), Drained(drained.try_clone()?), console.output.clone());
        let port = Arc::new(Self(Mutex::new(port)));
        let input = SerialInput::start(Arc::clone(&port), Arc::clone(&console.input), drained)?;
        Ok((port, input))
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Irq, Drained, Output>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MmioDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset @ 0..8), Some(byte)) = (u8::try_from(offset), data.first_mut()) {
            *byte = self.lock().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset @ 0..8), Some(byte)) = (u8::try_from(offset), data.first()) {
            let mut port = self.lock();
            // Neither the interrupt nor the output can fail in a way that the guest should know of.
            let _ = port.write(offset, *byte);
            if offset == IER {
                // The guest may have begun to listen.
                port.events().in_buffer_empty();
            }
        }
    }
}

/// The thread that hands the user's input to the guest; it ends with this value.
#[derive(Debug)]
pub struct SerialInput {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

const STOP: u64 = 0;
const READY: u64 = 1;
const DRAINED: u64 = 2;

impl SerialInput {
    fn start(port: Arc<SerialPort>, input: Arc<Input>, drained: EventFd) -> Result<Self> {
        use std::os::fd::AsRawFd as _;
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        for (fd, token) in [(&stop, STOP), (&input.ready, READY), (&drained, DRAINED)] {
            // Edges, for input that the guest has no space for stays ready.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)?;
        }
        let run = move || {
            let mut events = [EpollEvent::default()];
            loop {
                match epoll.wait(-1, &mut events) {
                    Ok(_) if events[0].data() == STOP => return,
                    Ok(_) if events[0].data() == DRAINED => drop(drained.read()),
                    Ok(_) => (),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => return,
                }
                let mut port = port.lock();
                let space = port.fifo_capacity();
                // A driver empties the FIFO before it listens.
                let listens = port.state().interrupt_enable & IER_RECEIVED != 0;
                if listens && space > 0 {
                    // There is space, and a lost interrupt means that the VM is gone.
                    let _ = port.enqueue_raw_bytes(&input.take(space));
                }
            }
        };
        let thread = thread::Builder::new().name("serial".into()).spawn(run)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for SerialInput {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::ConsoleKind;
    use crate::report::Report;
    use std::time::{Duration, Instant};

    fn port(name: &str) -> (Arc<SerialPort>, SerialInput, Console, EventFd, std::path::PathBuf) {
        let path = std::env::temp_dir().join(format!("ravelin-vmm-{name}-{}", std::process::id()));
        let console = Console::open(&ConsoleKind::Log(path.clone()), "test", &Report::new(false, false)).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let (port, input) = SerialPort::new(&console, irq.try_clone().unwrap()).unwrap();
        (port, input, console, irq, path)
    }

    fn get(port: &SerialPort, offset: u64) -> u8 {
        let mut data = [0];
        port.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn what_the_guest_writes_is_printed() {
        let (port, _input, console, _irq, path) = port("serial-out");
        for byte in b"hello" {
            port.write(0, &[*byte]);
        }
        port.write(8, b"x");
        console.output.drain();
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn all_that_is_typed_arrives_once_the_guest_listens() {
        let (port, _input, console, irq, path) = port("serial-in");
        // More than the FIFO has room for.
        let typed: Vec<u8> = (0..200).collect();
        console.input.push(&typed);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(get(&port, 5) & 1, 0, "no data for who does not listen");
        assert!(irq.read().is_err());
        port.write(u64::from(IER), &[IER_RECEIVED]);
        let start = Instant::now();
        let mut got = Vec::new();
        while got.len() < typed.len() {
            assert!(start.elapsed() < Duration::from_secs(20), "{got:?}");
            if get(&port, 5) & 1 != 0 {
                got.push(get(&port, 0));
            }
        }
        assert_eq!(got, typed);
        assert!(irq.read().is_ok());
        std::fs::remove_file(path).unwrap();
    }
}
