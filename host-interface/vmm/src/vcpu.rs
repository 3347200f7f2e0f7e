//! The threads of the vCPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::errno::Errno;
use vmm_sys_util::signal::Killable as _;

use crate::bus::Bus;
use crate::report::{Report, count};
use crate::signals::kick;

/// The hypercall by which a guest converts pages (Linux, `Documentation/virt/kvm/x86/hypercalls.rst`): address, pages, flags.
pub const HC_MAP_GPA_RANGE: u32 = 12;
/// In its flags: the pages become private.
const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;

/// How a VM ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest turned itself off.
    Off,
    /// The guest reboots.
    Reset,
    /// The guest says that it has crashed.
    Crash,
    /// It cannot run any more.
    Failed(String),
    /// A signal to the VMM.
    Signal(i32),
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    bus: Bus,
    report: Arc<Report>,
    stop: AtomicBool,
    ended: AtomicBool,
    ends: Sender<End>,
}

/// The threads; they end with this value.
#[derive(Debug)]
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts them. The first end that one of them meets is sent to `ends`.
    pub fn start(vcpus: Vec<VcpuFd>, bus: Bus, report: Arc<Report>, ends: Sender<End>) -> Result<Self> {
        let (stop, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let mut this = Self { shared: Arc::new(Shared { bus, report, stop, ended, ends }), threads: Vec::new() };
        for (index, mut vcpu) in vcpus.into_iter().enumerate() {
            let shared = Arc::clone(&this.shared);
            let run = move || {
                let end = shared.run(&mut vcpu, index);
                if let Some(end) = end
                    && !shared.ended.swap(true, SeqCst)
                {
                    // Who would listen has ended.
                    let _ = shared.ends.send(end);
                }
            };
            this.threads.push(thread::Builder::new().name(format!("vcpu{index}")).spawn(run)?);
        }
        Ok(this)
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            // A signal that comes before KVM_RUN is lost, so there may have to be more than one.
            while !thread.is_finished() {
                let _ = thread.kill(kick());
                thread::sleep(Duration::from_millis(1));
            }
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self, vcpu: &mut VcpuFd, index: usize) -> Option<End> {
        let counts = &self.report.counts;
        while !self.stop.load(SeqCst) {
            match vcpu.run() {
                Ok(VcpuExit::MmioRead(address, data)) => {
                    count(&counts.mmio_read, 1);
                    if !self.bus.read(address, data) {
                        count(&counts.mmio_nowhere, 1);
                    }
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    count(&counts.mmio_write, 1);
                    if !self.bus.write(address, data) {
                        count(&counts.mmio_nowhere, 1);
                    }
                }
                Ok(VcpuExit::Hypercall(call)) => {
                    count(&counts.other, 1);
                    *call.ret = u64::MAX;
                    if call.nr == u64::from(HC_MAP_GPA_RANGE) {
                        let [address, pages, flags, ..] = call.args;
                        *call.ret = 0;
                        self.report.conversion(address, pages, flags & MAP_GPA_RANGE_ENCRYPTED != 0);
                    }
                }
                Ok(VcpuExit::SystemEvent(kind, _)) => {
                    count(&counts.other, 1);
                    match kind {
                        KVM_SYSTEM_EVENT_SHUTDOWN => return Some(End::Off),
                        KVM_SYSTEM_EVENT_RESET => return Some(End::Reset),
                        KVM_SYSTEM_EVENT_CRASH => return Some(End::Crash),
                        _ => (),
                    }
                }
                Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                    let text = format!("vCPU {index}: no memory for {gpa:#x}, {size:#x} bytes, flags {flags:#x}");
                    return Some(End::Failed(text));
                }
                Ok(VcpuExit::Intr) => count(&counts.other, 1),
                Ok(exit) => return Some(End::Failed(format!("vCPU {index}: {exit:?}"))),
                Err(error) => match Errno::from_raw(error.errno()) {
                    Errno::EINTR => (),
                    // Somebody holds a page that the guest needs.
                    Errno::EAGAIN => thread::yield_now(),
                    error => return Some(End::Failed(format!("vCPU {index}: KVM_RUN: {error}"))),
                },
            }
        }
        None
    }
}
