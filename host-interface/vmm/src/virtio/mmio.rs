//! The MMIO transport, version 2 (section 4.2), as far as the vCPUs see it.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG,
    VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT as _};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker::Worker;
use super::{Description, Device, QUEUE_SIZE};
use crate::bus::MmioDevice;
use crate::memory::DmaMemory;
use crate::report::Report;

/// Offset of the register that a driver notifies a device by; an ioeventfd for each queue catches it.
pub const NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VENDOR: u32 = u32::from_le_bytes(*b"RVLN");

/// What the vCPUs and the device's thread both change.
#[derive(Debug)]
pub(super) struct Shared {
    status: AtomicU32,
    interrupt: AtomicU32,
    irq: EventFd,
}

impl Shared {
    /// Buffers were used.
    pub(super) fn interrupt_for_queue(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The device cannot go on.
    pub(super) fn needs_reset(&self) {
        self.status.fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, why: u32) {
        self.interrupt.fetch_or(why, SeqCst);
        // It is signalled already if this fails.
        let _ = self.irq.write(1);
    }
}

/// A virtio device on the bus.
pub struct Transport {
    description: Description,
    features: u64,
    shared: Arc<Shared>,
    notify: Vec<EventFd>,
    registers: Mutex<Registers>,
    memory: DmaMemory,
    worker: Worker,
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Transport").field("description", &self.description).finish_non_exhaustive()
    }
}

/// What the driver has set, but for the status.
struct Registers {
    device_features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    queue: usize,
    queues: Vec<Queue>,
    config: Vec<u8>,
}

impl Transport {
    /// Puts `device` on the bus, with a thread of its own. With `platform`, drivers have to accept that they share what the
    /// device may access.
    pub fn new(
        device: Box<dyn Device>,
        name: &str,
        platform: bool,
        memory: DmaMemory,
        irq: EventFd,
        report: Arc<Report>,
    ) -> Result<Self> {
        let description = device.description();
        let common = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX];
        let common = common.into_iter().chain(platform.then_some(VIRTIO_F_ACCESS_PLATFORM));
        let features = common.fold(description.features, |features, bit| features | 1 << bit);
        let shared = Arc::new(Shared { status: AtomicU32::new(0), interrupt: AtomicU32::new(0), irq });
        let notify: Vec<EventFd> =
            (0..description.queues).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<_, _>>()?;
        let clones = notify.iter().map(EventFd::try_clone).collect::<Result<_, _>>()?;
        let worker = Worker::start(device, name, Arc::clone(&memory), Arc::clone(&shared), clones, report)?;
        let registers = Registers {
            device_features_page: 0,
            driver_features_page: 0,
            driver_features: 0,
            queue: 0,
            queues: new_queues(description.queues)?,
            config: description.config.clone(),
        };
        Ok(Self { description, features, shared, notify, registers: Mutex::new(registers), memory, worker })
    }

    /// An eventfd for each queue that stands for a notification.
    pub fn notify(&self) -> &[EventFd] {
        &self.notify
    }

    fn load(&self, offset: u32) -> u32 {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = registers.queues.get(registers.queue);
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => 2,
            VIRTIO_MMIO_DEVICE_ID => self.description.id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => page(self.features, registers.device_features_page),
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(Queue::ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.shared.interrupt.load(SeqCst),
            VIRTIO_MMIO_STATUS => self.shared.status.load(SeqCst),
            // There is no shared memory: its length is all ones.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn store(&self, offset: u32, value: u32) {
        let mut guard = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let registers = &mut *guard;
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES => {
                if self.shared.status.load(SeqCst) & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
                    set_page(&mut registers.driver_features, registers.driver_features_page, value);
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => registers.queue = value as usize,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Some(notify) = self.notify.get(value as usize) {
                    // It is signalled already if this fails.
                    let _ = notify.write(1);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => drop(self.shared.interrupt.fetch_and(!value, SeqCst)),
            VIRTIO_MMIO_STATUS => self.set_status(registers, value),
            _ => {
                // Queues in use do not change.
                let in_use = self.shared.status.load(SeqCst) & VIRTIO_CONFIG_S_DRIVER_OK != 0;
                if let Some(queue) = registers.queues.get_mut(registers.queue).filter(|_| !in_use) {
                    set_up(queue, offset, value);
                }
            }
        }
    }

    fn set_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            self.worker.reset();
            registers.driver_features = 0;
            registers.queue = 0;
            registers.queues.iter_mut().for_each(Queue::reset);
            self.shared.interrupt.store(0, SeqCst);
            self.shared.status.store(0, SeqCst);
            return;
        }
        let old = self.shared.status.load(SeqCst);
        let mut new = old | value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if new & !old & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.acceptable(registers.driver_features) {
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if new & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.shared.status.fetch_or(new, SeqCst);
        if new & !old & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.start(registers);
        }
    }

    /// Whether the driver's choice is one: what was offered, and what this device cannot do without.
    fn acceptable(&self, features: u64) -> bool {
        let required = (1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM) & self.features;
        features & !self.features == 0 && features & required == required
    }

    fn start(&self, registers: &mut Registers) {
        let event_idx = registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        registers.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
        if registers.queues.iter().any(|queue| queue.ready() && !queue.is_valid(&*self.memory)) {
            self.shared.needs_reset();
            return;
        }
        let Ok(fresh) = new_queues(registers.queues.len()) else { return };
        self.worker.activate(std::mem::replace(&mut registers.queues, fresh));
    }
}

fn new_queues(number: usize) -> Result<Vec<Queue>, virtio_queue::Error> {
    (0..number).map(|_| Queue::new(QUEUE_SIZE)).collect()
}

fn set_up(queue: &mut Queue, offset: u32, value: u32) {
    let value_only = Some(value);
    match offset {
        VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
        VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
        VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(value_only, None),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, value_only),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(value_only, None),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, value_only),
        VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(value_only, None),
        VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, value_only),
        _ => (),
    }
}

/// 32 of the 64 feature bits.
fn page(features: u64, page: u32) -> u32 {
    match page {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_page(features: &mut u64, page: u32, value: u32) {
    match page {
        0 => *features = *features & !u64::from(u32::MAX) | u64::from(value),
        1 => *features = *features & u64::from(u32::MAX) | u64::from(value) << 32,
        _ => (),
    }
}

impl MmioDevice for Transport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = u32::try_from(offset) else { return };
        if let Some(start) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
            for (byte, value) in data.iter_mut().zip(registers.config.iter().skip(start as usize)) {
                *byte = *value;
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.load(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u32::try_from(offset) else { return };
        if let Some(start) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
            for (value, byte) in registers.config.iter_mut().skip(start as usize).zip(data) {
                *value = *byte;
            }
        } else if let (Ok(bytes), true) = (data.try_into(), offset.is_multiple_of(4)) {
            self.store(offset, u32::from_le_bytes(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault;
    use crate::layout::RAM;
    use crate::memory::GuestRam;
    use crate::virtio::rng::Rng;
    use std::fs::File;
    use std::time::{Duration, Instant};
    use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER};
    use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
    use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes as _, GuestAddress};

    const SIZE: u64 = 0x10_0000;
    const BUFFER: u64 = RAM + 0x8_0000;

    struct Driver {
        device: Transport,
        irq: EventFd,
        memory: DmaMemory,
    }

    impl Driver {
        fn new(ram: &GuestRam) -> Self {
            let irq = EventFd::new(EFD_NONBLOCK).unwrap();
            let report = Arc::new(Report::new(false, false));
            let rng = Box::new(Rng::new().unwrap());
            let device = Transport::new(rng, "rng", true, ram.dma(), irq.try_clone().unwrap(), report).unwrap();
            Self { device, irq, memory: ram.dma() }
        }

        fn get(&self, register: u32) -> u32 {
            let mut bytes = [0; 4];
            self.device.read(register.into(), &mut bytes);
            u32::from_le_bytes(bytes)
        }

        fn set(&self, register: u32, value: u32) {
            self.device.write(register.into(), &value.to_le_bytes());
        }

        /// Accepts features and returns whether the device agrees.
        fn negotiate(&self, features: u64) -> bool {
            self.set(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
            for page in 0..2 {
                self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, page);
                self.set(VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * page)) as u32);
            }
            let status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
            self.set(VIRTIO_MMIO_STATUS, status);
            self.get(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK != 0
        }

        /// Sets the queue up at the start of RAM and says that the driver is ready.
        fn start(&self) {
            assert!(self.negotiate(1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM));
            let rings = MockSplitQueue::create(&*self.memory, GuestAddress(RAM), 16);
            self.set(VIRTIO_MMIO_QUEUE_SEL, 0);
            self.set(VIRTIO_MMIO_QUEUE_NUM, 16);
            self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, rings.desc_table_addr().0 as u32);
            self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, rings.avail_addr().0 as u32);
            self.set(VIRTIO_MMIO_QUEUE_USED_LOW, rings.used_addr().0 as u32);
            self.set(VIRTIO_MMIO_QUEUE_READY, 1);
            self.set(VIRTIO_MMIO_STATUS, self.get(VIRTIO_MMIO_STATUS) | VIRTIO_CONFIG_S_DRIVER_OK);
        }

        /// Asks for 32 bytes and returns the reason for the interrupt that follows.
        fn ask(&self, address: u64) -> u32 {
            let rings = MockSplitQueue::create(&*self.memory, GuestAddress(RAM), 16);
            let descriptor = Descriptor::new(address, 32, VRING_DESC_F_WRITE as u16, 0);
            rings.build_desc_chain(&[RawDescriptor::from(descriptor)]).unwrap();
            self.device.notify()[0].write(1).unwrap();
            let start = Instant::now();
            while self.irq.read().is_err() {
                assert!(start.elapsed() < Duration::from_secs(20), "no interrupt");
                std::thread::sleep(Duration::from_millis(1));
            }
            let reason = self.get(VIRTIO_MMIO_INTERRUPT_STATUS);
            self.set(VIRTIO_MMIO_INTERRUPT_ACK, reason);
            assert_eq!(self.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
            reason
        }

        fn status(&self) -> u32 {
            self.get(VIRTIO_MMIO_STATUS)
        }
    }

    #[test]
    fn it_says_what_it_is() {
        let driver = Driver::new(&GuestRam::map(SIZE, None, 0).unwrap());
        assert_eq!(driver.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(driver.get(VIRTIO_MMIO_VERSION), 2);
        assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_ID), VIRTIO_ID_RNG);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(QUEUE_SIZE));
        driver.set(VIRTIO_MMIO_QUEUE_SEL, 1);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "there is no such queue");
        driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        assert_eq!(
            driver.get(VIRTIO_MMIO_DEVICE_FEATURES),
            1 << (VIRTIO_F_VERSION_1 - 32) | 1 << (VIRTIO_F_ACCESS_PLATFORM - 32)
        );
    }

    #[test]
    fn a_driver_that_does_not_know_of_protection_is_turned_away() {
        let driver = Driver::new(&GuestRam::map(SIZE, None, 0).unwrap());
        let (version, platform) = (1 << VIRTIO_F_VERSION_1, 1 << VIRTIO_F_ACCESS_PLATFORM);
        for features in [0, version, platform, version | platform | 1] {
            assert!(!driver.negotiate(features), "{features:#x}");
            driver.set(VIRTIO_MMIO_STATUS, driver.status() | VIRTIO_CONFIG_S_DRIVER_OK);
            assert_eq!(driver.status() & VIRTIO_CONFIG_S_DRIVER_OK, 0);
            driver.set(VIRTIO_MMIO_STATUS, 0);
        }
        assert!(driver.negotiate(version | platform));
    }

    #[test]
    fn a_request_is_served_by_the_thread_of_the_device() {
        let driver = Driver::new(&GuestRam::map(SIZE, None, 0).unwrap());
        driver.start();
        assert_eq!(driver.ask(BUFFER), VIRTIO_MMIO_INT_VRING);
        let bytes: [u8; 32] = driver.memory.read_obj(GuestAddress(BUFFER)).unwrap();
        assert_ne!(bytes, [0; 32]);
    }

    #[test]
    fn a_device_with_wild_addresses_needs_a_reset() {
        let driver = Driver::new(&GuestRam::map(SIZE, None, 0).unwrap());
        for address in [0, RAM + SIZE - 31, u64::MAX - 3] {
            driver.start();
            assert_eq!(driver.ask(address), VIRTIO_MMIO_INT_CONFIG, "{address:#x}");
            assert_ne!(driver.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
            driver.set(VIRTIO_MMIO_STATUS, 0);
            assert_eq!(driver.status(), 0);
        }
        driver.start();
        assert_eq!(driver.ask(BUFFER), VIRTIO_MMIO_INT_VRING, "and works after it");
    }

    // A file that has become shorter stands for a page that the guest has taken back: both are a SIGBUS.
    #[test]
    fn memory_that_the_guest_does_not_share_costs_the_device_alone() {
        let _alone = fault::TESTS.lock().unwrap();
        let path = std::env::temp_dir().join(format!("ravelin-vmm-mmio-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(SIZE).unwrap();
        let ram = GuestRam::map(SIZE, Some(file.try_clone().unwrap()), 0).unwrap();
        let driver = Driver::new(&ram);
        driver.start();
        file.set_len(BUFFER - RAM).unwrap();
        assert_eq!(driver.ask(BUFFER), VIRTIO_MMIO_INT_CONFIG);
        assert_ne!(driver.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
        file.set_len(SIZE).unwrap();
        driver.set(VIRTIO_MMIO_STATUS, 0);
        driver.start();
        assert_eq!(driver.ask(BUFFER), VIRTIO_MMIO_INT_VRING);
        let bytes: [u8; 32] = driver.memory.read_obj(GuestAddress(BUFFER)).unwrap();
        assert_ne!(bytes, [0; 32]);
    }
}
