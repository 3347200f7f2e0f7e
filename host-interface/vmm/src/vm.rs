//! A VM: what is made with KVM, from the configuration to the first instruction.

#![expect(unsafe_code, reason = "a memory slot points into this process; new file descriptors get an owner")]

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::FromRawFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_ARM_VCPU_PTRAUTH_GENERIC,
    KVM_CAP_ARM_PTRAUTH_ADDRESS, KVM_CAP_ARM_PTRAUTH_GENERIC, KVM_CAP_ARM_VM_IPA_SIZE, KVM_CAP_EXIT_HYPERCALL,
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_MEM_GUEST_MEMFD, KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_SIZE_U64, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_create_guest_memfd, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_enable_cap, kvm_regs, kvm_userspace_memory_region,
    kvm_userspace_memory_region2, kvm_vcpu_init, user_pt_regs,
};
use kvm_ioctls::{DeviceFd, IoEventAddress, Kvm, VcpuFd, VmFd};
use serde_json::json;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::args::{Config, Protection};
use crate::bus::Bus;
use crate::console::Console;
use crate::fault;
use crate::fdt::{self, Machine};
use crate::layout::{
    BLOCK, GIC_DISTRIBUTOR, GIC_REDISTRIBUTORS, ImageHeader, MAX_VIRTIO, NR_IRQS, Placement, RAM, SERIAL, SERIAL_SPI,
};
use crate::memory::GuestRam;
use crate::report::Report;
use crate::serial::{SerialInput, SerialPort};
use crate::tap;
use crate::vcpu::{End, HC_MAP_GPA_RANGE, Vcpus};
use crate::virtio::Device;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::console::VirtioConsole;
use crate::virtio::mmio::{NOTIFY, Transport};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;

/// Kinds of VMs, in the type that KVM_CREATE_VM takes besides the bits of an address. Those of Linux's
/// `include/uapi/linux/kvm.h` and of the patches for Arm CCA.
const TYPE_PROTECTED: u64 = 1 << 31;
const TYPE_REALM: u64 = 1 << 8;
/// The file can be mapped, and what it has at first is shared.
const GUEST_MEMFD_FLAGS: u64 = 1 << 0 | 1 << 1;
/// Mappings take no references: nothing here needs any, and the kernel can map 2 MiB at once. Ravelin's own.
const GUEST_MEMFD_NO_PIN: u64 = 1 << 30;
/// Which of these flags there are.
const CAP_GUEST_MEMFD_FLAGS: u64 = 244;
/// Bits of an address that a VM gets if the machine has so many; also those of type 0.
const IPA_BITS: u32 = 40;

/// What outlives a guest that reboots.
#[derive(Debug)]
pub struct Outside {
    console: Console,
    virtio_console: Option<Console>,
    taps: Vec<(File, [u8; 6])>,
}

impl Outside {
    /// Opens consoles and tap interfaces.
    pub fn open(config: &Config, report: &Report) -> Result<Self> {
        let console = Console::open(&config.console, "console", report)?;
        let virtio_console = config.virtio_console.as_ref();
        let virtio_console = virtio_console.map(|kind| Console::open(kind, "virtio-console", report)).transpose()?;
        let taps = config.nets.iter().map(|name| {
            let (file, name) = tap::open(name.as_deref())?;
            let mut mac = [0; 6];
            File::open("/dev/urandom")?.read_exact(&mut mac)?;
            // Locally administered, of one card.
            mac[0] = mac[0] & !3 | 2;
            report.event("tap", &format!("network on {name}"), json!({ "name": name }));
            Ok((file, mac))
        });
        Ok(Self { console, virtio_console, taps: taps.collect::<Result<_>>()? })
    }

    /// Whether nobody waits for the user, because the guest ends.
    fn hurry(&self, hurry: bool) {
        self.consoles().for_each(|console| console.output.hurry(hurry));
    }

    /// Waits until all that guests printed is out.
    pub fn drain(&self) {
        self.consoles().for_each(|console| console.output.drain());
    }

    fn consoles(&self) -> impl Iterator<Item = &Console> {
        [&self.console].into_iter().chain(&self.virtio_console)
    }
}

/// Runs a VM from its making until it ends, and takes it apart.
pub fn run(
    config: &Config,
    outside: &Outside,
    report: &Arc<Report>,
    sender: &Sender<End>,
    ends: &Receiver<End>,
) -> Result<End> {
    let vm = Vm::new(config)?;
    let ram = vm.memory(config)?;
    let vcpus = vm.vcpus(config)?;
    let gic = vm.interrupt_controller()?;
    let mut bus = Bus::default();
    let input = vm.serial(&mut bus, &outside.console)?;
    let devices = devices(config, outside, &ram)?;
    let number = devices.len();
    ensure!(number <= MAX_VIRTIO, "more than {MAX_VIRTIO} virtio devices");
    for ((device, name), (address, spi)) in devices.into_iter().zip(fdt::virtio_devices(number)) {
        let transport = vm.virtio(device, &name, &ram, (address, spi), config, report)?;
        bus.insert(address, Arc::new(transport));
    }
    let placement = load(config, &ram, number)?;
    vm.set_up_vcpus(&vcpus, placement)?;
    let kind = config.protection.name();
    let text = String::new();
    report.event(
        "boot",
        &text,
        json!({ "kind": kind, "memory": config.memory, "cpus": config.cpus, "ipa_bits": vm.ipa_bits,
                "kernel": placement.kernel, "device_tree": placement.device_tree }),
    );
    let running = Vcpus::start(vcpus, bus, Arc::clone(report), sender.clone())?;
    let end = ends.recv()?;
    outside.hurry(true);
    // Nobody enters the guest any more, then nobody touches its memory any more.
    drop(running);
    outside.hurry(false);
    drop(input);
    drop(gic);
    drop(ram);
    Ok(end)
}

struct Vm {
    fd: VmFd,
    kvm: Kvm,
    ipa_bits: u32,
    shared_bit: u64,
    protected: bool,
}

impl Vm {
    fn new(config: &Config) -> Result<Self> {
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let most = u32::try_from(kvm.check_extension_raw(KVM_CAP_ARM_VM_IPA_SIZE.into())).unwrap_or(0);
        let ipa_bits = if most == 0 { IPA_BITS } else { most.min(IPA_BITS) };
        let realm = config.protection == Protection::Realm;
        // A realm shares memory in the upper half of its addresses.
        let shared_bit = if realm { 1 << (ipa_bits - 1) } else { 0 };
        let limit = if realm { shared_bit } else { 1 << ipa_bits };
        ensure!(
            RAM.checked_add(config.memory).is_some_and(|end| end <= limit),
            "--memory: more than the VM has addresses for"
        );
        let kind = match config.protection {
            Protection::None => 0,
            Protection::Pkvm => TYPE_PROTECTED,
            Protection::Realm => TYPE_REALM,
        };
        let size = if most == 0 { 0 } else { ipa_bits };
        let fd = kvm.create_vm_with_type(kind | u64::from(size)).context("cannot create a VM of this kind")?;
        if config.share_trace && config.protection != Protection::None {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, ..Default::default() };
            cap.args[0] = 1 << HC_MAP_GPA_RANGE;
            fd.enable_cap(&cap).context("the host does not tell about conversions")?;
        }
        Ok(Self { fd, kvm, ipa_bits, shared_bit, protected: config.protection != Protection::None })
    }

    fn memory(&self, config: &Config) -> Result<GuestRam> {
        if self.protected {
            let known = u64::try_from(self.fd.check_extension_raw(CAP_GUEST_MEMFD_FLAGS)).unwrap_or(0);
            let flags = GUEST_MEMFD_FLAGS | (known & GUEST_MEMFD_NO_PIN);
            let gmem = kvm_create_guest_memfd { size: config.memory, flags, ..Default::default() };
            let gmem = self.fd.create_guest_memfd(gmem).context("no guest_memfd that can be mapped")?;
            // SAFETY: the descriptor is new, and nobody else has it.
            let file = unsafe { File::from_raw_fd(gmem) };
            let ram = GuestRam::map(config.memory, Some(file), self.shared_bit)?;
            let region = kvm_userspace_memory_region2 {
                flags: KVM_MEM_GUEST_MEMFD,
                guest_phys_addr: RAM,
                memory_size: config.memory,
                userspace_addr: ram.address(),
                guest_memfd: gmem.cast_unsigned(),
                ..Default::default()
            };
            // SAFETY: the mapping has this size, and the VM stops before it ends.
            unsafe { self.fd.set_user_memory_region2(region) }.context("the guest_memfd cannot be used")?;
            Ok(ram)
        } else {
            let ram = GuestRam::map(config.memory, None, 0)?;
            let region = kvm_userspace_memory_region {
                guest_phys_addr: RAM,
                memory_size: config.memory,
                userspace_addr: ram.address(),
                ..Default::default()
            };
            // SAFETY: the mapping has this size, and the VM stops before it ends.
            unsafe { self.fd.set_user_memory_region(region) }.context("the memory cannot be used")?;
            Ok(ram)
        }
    }

    fn vcpus(&self, config: &Config) -> Result<Vec<VcpuFd>> {
        let create =
            |index: u32| self.fd.create_vcpu(index.into()).with_context(|| format!("cannot create vCPU {index}"));
        (0..config.cpus).map(create).collect()
    }

    fn interrupt_controller(&self) -> Result<DeviceFd> {
        let mut device = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, ..Default::default() };
        let gic = self.fd.create_device(&mut device).context("no GICv3")?;
        let set = |group: u32, attr: u32, value: Option<u64>| {
            let addr = value.as_ref().map_or(0, |value| std::ptr::from_ref(value).expose_provenance() as u64);
            let attribute = kvm_device_attr { group, attr: attr.into(), addr, flags: 0 };
            gic.set_device_attr(&attribute).with_context(|| format!("attribute {attr} of group {group} of the GICv3"))
        };
        // Little-endian, so that the one number of 32 bits is found as well.
        set(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, Some(NR_IRQS.into()))?;
        set(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST, Some(GIC_DISTRIBUTOR))?;
        set(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_REDIST, Some(GIC_REDISTRIBUTORS))?;
        set(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, None)?;
        Ok(gic)
    }

    fn irq(&self, spi: u32) -> Result<EventFd> {
        let irq = EventFd::new(EFD_NONBLOCK)?;
        self.fd.register_irqfd(&irq, spi).with_context(|| format!("no irqfd for SPI {spi}"))?;
        Ok(irq)
    }

    fn serial(&self, bus: &mut Bus, console: &Console) -> Result<SerialInput> {
        let (port, input) = SerialPort::new(console, self.irq(SERIAL_SPI)?)?;
        bus.insert(SERIAL, port);
        Ok(input)
    }

    fn virtio(
        &self,
        device: Box<dyn Device>,
        name: &str,
        ram: &GuestRam,
        (address, spi): (u64, u32),
        config: &Config,
        report: &Arc<Report>,
    ) -> Result<Transport> {
        let platform = config.protection != Protection::None;
        let transport = Transport::new(device, name, platform, ram.dma(), self.irq(spi)?, Arc::clone(report))?;
        for (queue, notify) in (0u32..).zip(transport.notify()) {
            let register = IoEventAddress::Mmio(address + NOTIFY);
            self.fd.register_ioevent(notify, &register, queue).context("no ioeventfd")?;
        }
        Ok(transport)
    }

    fn set_up_vcpus(&self, vcpus: &[VcpuFd], placement: Placement) -> Result<()> {
        let mut init = kvm_vcpu_init::default();
        self.fd.get_preferred_target(&mut init)?;
        init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        let has = |cap: u32| self.kvm.check_extension_raw(cap.into()) > 0;
        if has(KVM_CAP_ARM_PTRAUTH_ADDRESS) && has(KVM_CAP_ARM_PTRAUTH_GENERIC) {
            init.features[0] |= 1 << KVM_ARM_VCPU_PTRAUTH_ADDRESS | 1 << KVM_ARM_VCPU_PTRAUTH_GENERIC;
        }
        for (index, vcpu) in vcpus.iter().enumerate() {
            let mut init = init;
            if index > 0 {
                init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
            }
            vcpu.vcpu_init(&init).with_context(|| format!("cannot initialise vCPU {index}"))?;
        }
        let first = vcpus.first().context("no vCPU")?;
        let set = |offset: usize, value: u64| {
            let id = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | u64::from(KVM_REG_ARM_CORE) | (offset as u64 / 4);
            first.set_one_reg(id, &value.to_le_bytes()).context("cannot set a register")
        };
        let registers = std::mem::offset_of!(kvm_regs, regs);
        set(registers + std::mem::offset_of!(user_pt_regs, pc), placement.kernel)?;
        set(registers + std::mem::offset_of!(user_pt_regs, regs), placement.device_tree)?;
        Ok(())
    }
}

/// The virtio devices, each with a name for messages.
fn devices(config: &Config, outside: &Outside, ram: &GuestRam) -> Result<Vec<(Box<dyn Device>, String)>> {
    let mut devices: Vec<(Box<dyn Device>, String)> = vec![(Box::new(Rng::new()?), "rng".into())];
    for (index, disk) in config.disks.iter().enumerate() {
        devices.push((Box::new(Block::open(disk)?), format!("disk{index}")));
    }
    for (index, (tap, mac)) in outside.taps.iter().enumerate() {
        devices.push((Box::new(Net::new(tap.try_clone()?, *mac)), format!("net{index}")));
    }
    if let Some(console) = &outside.virtio_console {
        devices.push((Box::new(VirtioConsole(console.clone())), "console".into()));
    }
    if let Some(size) = config.balloon {
        devices.push((Box::new(Balloon::new(size, ram.returns()?)?), "balloon".into()));
    }
    Ok(devices)
}

/// Puts kernel, initrd and device tree into the guest's memory.
fn load(config: &Config, ram: &GuestRam, virtio: usize) -> Result<Placement> {
    let (mut kernel, length) = open(&config.kernel)?;
    let mut header = [0; ImageHeader::LENGTH];
    let name = config.kernel.display();
    kernel.read_exact(&mut header).with_context(|| format!("cannot read {name}"))?;
    kernel.rewind()?;
    let header = ImageHeader::parse(&header, length).with_context(|| name.to_string())?;
    let mut initrd = config.initrd.as_deref().map(open).transpose()?;
    let placement = Placement::plan(config.memory, header, initrd.as_ref().map(|(_, length)| *length))?;
    ram.load_file(&mut kernel, length, placement.kernel)?;
    if let (Some((file, length)), Some((start, _))) = (&mut initrd, placement.initrd) {
        ram.load_file(file, *length, start)?;
    }
    let seed = (config.protection == Protection::None).then(seed).transpose()?;
    let cpus: Vec<u64> = (0..config.cpus).map(fdt::mpidr).collect();
    let device_tree = fdt::build(&Machine {
        ram: config.memory,
        cpus: &cpus,
        smc: config.protection == Protection::Realm,
        virtio,
        bootargs: &config.command_line(),
        initrd: placement.initrd,
        seed,
    })?;
    ensure!(device_tree.len() as u64 <= BLOCK, "the device tree is too large");
    ram.load(&device_tree, placement.device_tree)?;
    ensure!(!fault::take(), "the guest's memory cannot be written before it runs");
    Ok(placement)
}

fn open(path: &Path) -> Result<(File, u64)> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

/// Entropy for an ordinary guest. A protected one would not trust it, and is to be measured the same each time.
fn seed() -> Result<[u8; 64]> {
    let mut seed = [0; 64];
    File::open("/dev/urandom")?.read_exact(&mut seed)?;
    Ok(seed)
}
