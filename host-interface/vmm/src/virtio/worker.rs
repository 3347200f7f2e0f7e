//! The thread of a device.

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::thread::{self, JoinHandle};

use anyhow::{Error, Result};
use serde_json::json;
use virtio_queue::Queue;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::mmio::Shared;
use super::{Device, Progress, Rings};
use crate::memory::DmaMemory;
use crate::report::{Report, count};

/// What the transport tells the thread.
enum Command {
    /// The driver is ready.
    Start(Vec<Queue>),
    /// The driver resets the device; the answer says that nothing of it is in use any more.
    Reset(SyncSender<()>),
    /// The VM ends.
    Stop,
}

/// The thread; it ends with this value.
pub(super) struct Worker {
    commands: Sender<Command>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts it.
    pub(super) fn start(
        device: Box<dyn Device>,
        name: &str,
        memory: DmaMemory,
        shared: Arc<Shared>,
        notify: Vec<EventFd>,
        report: Arc<Report>,
    ) -> Result<Self> {
        let (commands, receiver) = channel();
        let wake = EventFd::new(0)?;
        let epoll = Epoll::new()?;
        for (fd, token) in notify.iter().zip(0..).chain([(&wake, WAKE)]) {
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, token))?;
        }
        let state = State {
            device,
            name: name.to_owned(),
            memory,
            shared,
            notify,
            report,
            wake: wake.try_clone()?,
            epoll,
            listening: false,
            queues: None,
        };
        let thread = thread::Builder::new().name(name.into()).spawn(move || state.run(&receiver))?;
        Ok(Self { commands, wake, thread: Some(thread) })
    }

    /// Hands the queues to the device.
    pub(super) fn activate(&self, queues: Vec<Queue>) {
        self.tell(Command::Start(queues));
    }

    /// Takes them back, and waits until the device is still.
    pub(super) fn reset(&self) {
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        self.tell(Command::Reset(answer));
        // An error says that the thread has ended, and so is as still as it can be.
        let _ = answered.recv();
    }

    fn tell(&self, command: Command) {
        // Neither fails while the thread lives.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tell(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What epoll says of the eventfd that comes with commands, and of the device's source; queues have their numbers.
const WAKE: u64 = u64::MAX;
const SOURCE: u64 = u64::MAX - 1;

struct State {
    device: Box<dyn Device>,
    name: String,
    memory: DmaMemory,
    shared: Arc<Shared>,
    notify: Vec<EventFd>,
    report: Arc<Report>,
    wake: EventFd,
    epoll: Epoll,
    listening: bool,
    queues: Option<Vec<Queue>>,
}

impl State {
    fn run(mut self, commands: &Receiver<Command>) {
        let mut events = vec![EpollEvent::default(); self.notify.len() + 2];
        let mut more = false;
        loop {
            let ready = match self.epoll.wait(if more { 0 } else { -1 }, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return self.fail(&error.into()),
            };
            for event in &events[..ready] {
                let fd = match event.data() {
                    WAKE => Some(&self.wake),
                    token => self.notify.get(usize::try_from(token).unwrap_or(usize::MAX)),
                };
                // What is read is how often it was signalled. The source is the device's.
                let _ = fd.map(EventFd::read);
            }
            for command in commands.try_iter() {
                match command {
                    Command::Start(queues) => self.queues = Some(queues),
                    Command::Reset(answer) => {
                        self.queues = None;
                        // Who asked may be gone.
                        let _ = answer.send(());
                    }
                    Command::Stop => return,
                }
            }
            let progress = self.process().and_then(|progress| self.listen(progress.listen).map(|()| progress));
            match progress {
                Ok(progress) => more = progress.more,
                Err(error) => {
                    more = false;
                    self.fail(&error);
                }
            }
        }
    }

    fn process(&mut self) -> Result<Progress> {
        let Some(queues) = &mut self.queues else { return Ok(Progress::default()) };
        let mut rings = Rings::new(&self.memory, queues);
        let result = self.device.process(&mut rings);
        if rings.interrupt() {
            self.shared.interrupt_for_queue();
        }
        result
    }

    fn listen(&mut self, listen: bool) -> Result<()> {
        if let Some(fd) = self.device.source()
            && listen != self.listening
        {
            let operation = if listen { ControlOperation::Add } else { ControlOperation::Delete };
            self.epoll.ctl(operation, fd, EpollEvent::new(EventSet::IN, SOURCE))?;
            self.listening = listen;
        }
        Ok(())
    }

    fn fail(&mut self, error: &Error) {
        self.queues = None;
        // The source may be what failed.
        let _ = self.listen(false);
        count(&self.report.counts.device_errors, 1);
        let text = format!("{} stops: {error:#}", self.name);
        self.report.event("device_error", &text, json!({ "device": self.name, "error": format!("{error:#}") }));
        self.shared.needs_reset();
    }
}
