//! KVM's files, and its ioctls by number.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_CAP_EXIT_HYPERCALL, KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_MEM_GUEST_MEMFD, KVM_REG_ARM_CORE, KVM_REG_ARM64,
    KVM_REG_SIZE_U64, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device,
    kvm_create_guest_memfd, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_enable_cap, kvm_ioeventfd,
    kvm_irq_level, kvm_irqfd, kvm_mp_state, kvm_msi, kvm_one_reg, kvm_pre_fault_memory, kvm_userspace_memory_region,
    kvm_userspace_memory_region2, kvm_vcpu_init,
};
use nix::errno::Errno;
use nix::libc;

use crate::check::{Outcome, works};
use crate::gic;
use crate::memory::Mapping;

/// Number of an ioctl of KVM without an argument, or with a number as one.
const fn io(number: u32) -> u32 {
    0xae << 8 | number
}

/// Number of an ioctl that reads its argument.
const fn iow<T>(number: u32) -> u32 {
    1 << 30 | (size_of::<T>() as u32) << 16 | io(number)
}

/// Number of an ioctl that writes its argument.
const fn ior<T>(number: u32) -> u32 {
    2 << 30 | (size_of::<T>() as u32) << 16 | io(number)
}

/// Number of an ioctl that reads and writes its argument.
const fn iowr<T>(number: u32) -> u32 {
    3 << 30 | (size_of::<T>() as u32) << 16 | io(number)
}

pub(crate) const GET_API_VERSION: u32 = io(0x00);
pub(crate) const CREATE_VM: u32 = io(0x01);
pub(crate) const CHECK_EXTENSION: u32 = io(0x03);
pub(crate) const GET_VCPU_MMAP_SIZE: u32 = io(0x04);
pub(crate) const CREATE_VCPU: u32 = io(0x41);
pub(crate) const SET_USER_MEMORY_REGION: u32 = iow::<kvm_userspace_memory_region>(0x46);
pub(crate) const SET_USER_MEMORY_REGION2: u32 = iow::<kvm_userspace_memory_region2>(0x49);
pub(crate) const IRQ_LINE: u32 = iow::<kvm_irq_level>(0x61);
pub(crate) const SET_GSI_ROUTING: u32 = iow::<u64>(0x6a);
pub(crate) const IRQFD: u32 = iow::<kvm_irqfd>(0x76);
pub(crate) const IOEVENTFD: u32 = iow::<kvm_ioeventfd>(0x79);
pub(crate) const RUN: u32 = io(0x80);
pub(crate) const GET_MP_STATE: u32 = ior::<kvm_mp_state>(0x98);
pub(crate) const SET_MP_STATE: u32 = iow::<kvm_mp_state>(0x99);
pub(crate) const ENABLE_CAP: u32 = iow::<kvm_enable_cap>(0xa3);
pub(crate) const SIGNAL_MSI: u32 = iow::<kvm_msi>(0xa5);
pub(crate) const GET_ONE_REG: u32 = iow::<kvm_one_reg>(0xab);
pub(crate) const SET_ONE_REG: u32 = iow::<kvm_one_reg>(0xac);
pub(crate) const ARM_VCPU_INIT: u32 = iow::<kvm_vcpu_init>(0xae);
pub(crate) const ARM_PREFERRED_TARGET: u32 = ior::<kvm_vcpu_init>(0xaf);
pub(crate) const GET_REG_LIST: u32 = iowr::<u64>(0xb0);
/// Of guest_memfd; from patches that Linux has not merged.
pub(crate) const SET_MEMORY_ATTRIBUTES2: u32 = iowr::<MemoryAttributes>(0xd2);
pub(crate) const CREATE_GUEST_MEMFD: u32 = iowr::<kvm_create_guest_memfd>(0xd4);
pub(crate) const PRE_FAULT_MEMORY: u32 = iowr::<kvm_pre_fault_memory>(0xd5);
pub(crate) const CREATE_DEVICE: u32 = iowr::<kvm_create_device>(0xe0);
pub(crate) const SET_DEVICE_ATTR: u32 = iow::<kvm_device_attr>(0xe1);
pub(crate) const HAS_DEVICE_ATTR: u32 = iow::<kvm_device_attr>(0xe3);

/// guest_memfd can be mapped.
pub(crate) const FLAG_MMAP: u64 = 1 << 0;

/// What is in a guest_memfd is shared when it is made.
pub(crate) const FLAG_INIT_SHARED: u64 = 1 << 1;

/// Nobody can pin what is mapped of a guest_memfd, which may be mapped 2 MiB at once: Ravelin's own.
pub(crate) const FLAG_NO_PIN: u64 = 1 << 30;

/// Its flags that are valid.
pub(crate) const CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// The argument of `KVM_SET_MEMORY_ATTRIBUTES2`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct MemoryAttributes {
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) attributes: u64,
    pub(crate) flags: u64,
    pub(crate) error_offset: u64,
    pub(crate) reserved: [u64; 11],
}

/// Bits of guest addresses in the VMs of the cases. In a realm the last one marks what is shared.
pub(crate) const IPA_BITS: u32 = 36;

/// Number of the hypercall exit for a conversion.
pub(crate) const MAP_GPA_RANGE: u64 = 12;

/// Makes an ioctl with a number as its argument.
pub(crate) fn ioctl(file: impl AsFd, request: u32, argument: u64) -> Result<i32, Errno> {
    let file = file.as_fd().as_raw_fd();
    // SAFETY: Of this program's memory only what `argument` points to is written, if anything.
    Errno::result(unsafe { libc::ioctl(file, request.cast_signed(), argument) })
}

/// Makes an ioctl with the address of a structure as its argument.
pub(crate) fn ioctl_with<T>(file: impl AsFd, request: u32, argument: &mut T) -> Result<i32, Errno> {
    ioctl(file, request, (&raw mut *argument).addr() as u64)
}

/// Makes an ioctl that returns a file.
fn ioctl_for_file(file: impl AsFd, request: u32, argument: u64) -> Result<OwnedFd, Errno> {
    let fd = ioctl(file, request, argument)?;
    // SAFETY: It is new, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kind of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ordinary,
    Pkvm,
    Realm,
}

/// All kinds.
pub(crate) const KINDS: &[Kind] = &[Kind::Ordinary, Kind::Pkvm, Kind::Realm];

/// Both ways to be protected.
pub(crate) const PROTECTED: &[Kind] = &[Kind::Pkvm, Kind::Realm];

impl Kind {
    /// Its name in the names of cases.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ordinary => "ordinary",
            Self::Pkvm => "pkvm",
            Self::Realm => "realm",
        }
    }

    /// Whether the host has no access to the memory.
    pub(crate) fn is_protected(self) -> bool {
        self != Self::Ordinary
    }

    /// The argument of `KVM_CREATE_VM`.
    pub(crate) fn vm_type(self) -> u64 {
        let flag = match self {
            Self::Ordinary => 0,
            Self::Pkvm => 1 << 31,
            Self::Realm => 1 << 8,
        };
        flag | u64::from(IPA_BITS)
    }

    /// The address by which a guest accesses a device, or memory that it shares, that is at `address`.
    pub(crate) fn shared(self, address: u64) -> u64 {
        if self == Self::Realm { address | 1 << (IPA_BITS - 1) } else { address }
    }
}

/// Opens `/dev/kvm`.
pub(crate) fn open() -> Outcome<File> {
    File::options().read(true).write(true).open("/dev/kvm").map_err(|error| anyhow::anyhow!("/dev/kvm: {error}"))
}

/// `KVM_CHECK_EXTENSION` of `/dev/kvm` or a VM.
pub(crate) fn capability(file: impl AsFd, capability: u32) -> Result<i32, Errno> {
    ioctl(file, CHECK_EXTENSION, capability.into())
}

/// A VM.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) fd: OwnedFd,
    pub(crate) kind: Kind,
    /// Bytes of the mapped part of a vCPU.
    run_size: usize,
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Vm {
    /// Makes a VM. A case that needs a protected one is skipped by a KVM that has none.
    pub(crate) fn new(kind: Kind) -> Outcome<Self> {
        let kvm = open()?;
        let fd = match ioctl_for_file(&kvm, CREATE_VM, kind.vm_type()) {
            Err(Errno::EINVAL) if kind.is_protected() && !is_ravelin() => {
                crate::check::skip!("this KVM has no {} VMs", kind.name())
            }
            result => works("KVM_CREATE_VM", result)?,
        };
        let run_size = works("KVM_GET_VCPU_MMAP_SIZE", ioctl(&kvm, GET_VCPU_MMAP_SIZE, 0))?;
        Ok(Self { fd, kind, run_size: usize::try_from(run_size)? })
    }

    /// Makes a vCPU, not initialised.
    pub(crate) fn vcpu(&self, index: u64) -> Result<Vcpu, Errno> {
        let fd = ioctl_for_file(self, CREATE_VCPU, index)?;
        let run = Mapping::shared(&fd, self.run_size)?;
        Ok(Vcpu { fd, run, index })
    }

    /// Makes the initialised vCPU of that index; vCPU 0 is on.
    pub(crate) fn add_vcpu(&self, index: u64) -> Outcome<Vcpu> {
        let vcpu = works("KVM_CREATE_VCPU", self.vcpu(index))?;
        self.init_vcpu(&vcpu)?;
        Ok(vcpu)
    }

    /// `KVM_ARM_VCPU_INIT`; vCPU 0 is on.
    pub(crate) fn init_vcpu(&self, vcpu: &Vcpu) -> Outcome {
        let mut target = kvm_vcpu_init::default();
        works("KVM_ARM_PREFERRED_TARGET", ioctl_with(self, ARM_PREFERRED_TARGET, &mut target))?;
        target.features[0] = 1 << KVM_ARM_VCPU_PSCI_0_2;
        if vcpu.index != 0 {
            target.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
        }
        works("KVM_ARM_VCPU_INIT", ioctl_with(&vcpu.fd, ARM_VCPU_INIT, &mut target)).map(drop)
    }

    /// Makes a guest_memfd.
    pub(crate) fn memfd(&self, size: u64, flags: u64) -> Result<OwnedFd, Errno> {
        let mut arguments = kvm_create_guest_memfd { size, flags, ..Default::default() };
        ioctl_for_file(self, CREATE_GUEST_MEMFD, (&raw mut arguments).addr() as u64)
    }

    /// Makes a guest_memfd that the host can map and use until the guest has it. A case that needs one is skipped by a KVM
    /// that has none.
    pub(crate) fn shared_memfd(&self, size: usize) -> Outcome<OwnedFd> {
        let flags = capability(self, CAP_GUEST_MEMFD_FLAGS);
        if !is_ravelin() && flags.unwrap_or(0) & 3 != 3 {
            crate::check::skip!("this KVM has no guest_memfd that can be mapped");
        }
        works("KVM_CREATE_GUEST_MEMFD", self.memfd(size as u64, FLAG_MMAP | FLAG_INIT_SHARED))
    }

    /// `KVM_SET_USER_MEMORY_REGION2`.
    pub(crate) fn set_region(&self, mut region: kvm_userspace_memory_region2) -> Result<i32, Errno> {
        ioctl_with(self, SET_USER_MEMORY_REGION2, &mut region)
    }

    /// Binds part of a guest_memfd as a slot; `mapping` is where this process has mapped that part.
    pub(crate) fn bind(&self, slot: u32, gpa: u64, size: u64, file: impl AsFd, offset: u64) -> Result<i32, Errno> {
        self.bind_mapped(slot, gpa, size, file, offset, None)
    }

    /// The same, with the address at which this process has mapped that part.
    pub(crate) fn bind_mapped(
        &self,
        slot: u32,
        gpa: u64,
        size: u64,
        file: impl AsFd,
        offset: u64,
        mapped: Option<u64>,
    ) -> Result<i32, Errno> {
        self.set_region(kvm_userspace_memory_region2 {
            slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: mapped.unwrap_or(0),
            guest_memfd: file.as_fd().as_raw_fd().cast_unsigned(),
            guest_memfd_offset: offset,
            ..Default::default()
        })
    }

    /// Makes memory of this process a slot.
    pub(crate) fn add_anonymous(&self, slot: u32, gpa: u64, memory: &Mapping) -> Result<i32, Errno> {
        self.set_region(kvm_userspace_memory_region2 {
            slot,
            guest_phys_addr: gpa,
            memory_size: memory.size() as u64,
            userspace_addr: memory.address() as u64,
            ..Default::default()
        })
    }

    /// Deletes a slot.
    pub(crate) fn delete_slot(&self, slot: u32) -> Result<i32, Errno> {
        self.set_region(kvm_userspace_memory_region2 { slot, ..Default::default() })
    }

    /// Makes the interrupt controller; its vCPUs are there.
    pub(crate) fn add_gic(&self) -> Outcome<OwnedFd> {
        let gic = works("KVM_CREATE_DEVICE", self.create_device(kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, 0))?;
        let addresses =
            [(KVM_VGIC_V3_ADDR_TYPE_DIST, gic::DISTRIBUTOR), (KVM_VGIC_V3_ADDR_TYPE_REDIST, gic::REDISTRIBUTORS)];
        for (kind, mut address) in addresses {
            let pointer = (&raw mut address).addr() as u64;
            works("the GIC's address", set_attribute(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, kind.into(), pointer))?;
        }
        let init = set_attribute(&gic, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT.into(), 0);
        works("the GIC's initialisation", init)?;
        Ok(gic)
    }

    /// `KVM_CREATE_DEVICE`.
    pub(crate) fn create_device(&self, kind: u32, flags: u32) -> Result<OwnedFd, Errno> {
        let mut device = kvm_create_device { type_: kind, fd: 0, flags };
        ioctl_with(self, CREATE_DEVICE, &mut device)?;
        // SAFETY: It is new, and nobody else knows of it.
        Ok(unsafe { OwnedFd::from_raw_fd(device.fd.cast_signed()) })
    }

    /// Asks to be told of conversions.
    pub(crate) fn tell_of_conversions(&self) -> Outcome {
        let args = [1 << MAP_GPA_RANGE, 0, 0, 0];
        let mut arguments = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, args, ..Default::default() };
        works("KVM_ENABLE_CAP", ioctl_with(self, ENABLE_CAP, &mut arguments)).map(drop)
    }

    /// `KVM_IRQ_LINE` of an SPI.
    pub(crate) fn set_spi(&self, intid: u32, level: bool) -> Result<i32, Errno> {
        const SPI: u32 = 1 << 24;
        let mut line = kvm_irq_level::default();
        line.__bindgen_anon_1.irq = SPI | intid;
        line.level = level.into();
        ioctl_with(self, IRQ_LINE, &mut line)
    }
}

/// `KVM_SET_DEVICE_ATTR`.
pub(crate) fn set_attribute(device: impl AsFd, group: u32, attr: u64, addr: u64) -> Result<i32, Errno> {
    ioctl_with(device, SET_DEVICE_ATTR, &mut kvm_device_attr { flags: 0, group, attr, addr })
}

/// A vCPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) fd: OwnedFd,
    /// The structure `kvm_run`.
    run: Mapping,
    pub(crate) index: u64,
}

/// Number of a core register in `KVM_GET_ONE_REG`: offset of 32-bit words in `struct kvm_regs`.
pub(crate) const fn core(word: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | word
}

/// Number of x0 to x30.
pub(crate) const fn x(number: u64) -> u64 {
    core(number * 2)
}

/// Number of the program counter.
pub(crate) const PC: u64 = core(64);

/// Number of PSTATE.
pub(crate) const PSTATE: u64 = core(66);

/// Why `KVM_RUN` has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Mmio {
        address: u64,
        size: u32,
        write: bool,
        value: u64,
    },
    SystemEvent {
        kind: u32,
    },
    /// With the error of `KVM_RUN`.
    MemoryFault {
        errno: Errno,
        flags: u64,
        address: u64,
        size: u64,
    },
    Hypercall {
        number: u64,
        arguments: [u64; 6],
    },
    /// `KVM_RUN` failed otherwise.
    Failed(Errno),
    Other {
        reason: u32,
    },
}

impl Vcpu {
    // Offsets in `struct kvm_run`; all words of it that a case needs are loaded as 8 bytes.
    const IMMEDIATE_EXIT: usize = 0;
    const REASON: usize = 8;
    const UNION: usize = 32;
    /// Index of `hypercall.ret` among the words of what comes with the reason.
    const RET: usize = 7;

    /// `KVM_RUN`, without a look at what it says.
    pub(crate) fn run_once(&self) -> Result<i32, Errno> {
        ioctl(&self.fd, RUN, 0)
    }

    /// `KVM_RUN`.
    pub(crate) fn run(&self) -> Outcome<Exit> {
        self.exit(self.run_once().err())
    }

    /// What `struct kvm_run` says.
    pub(crate) fn exit(&self, errno: Option<Errno>) -> Outcome<Exit> {
        const MMIO: u32 = 6;
        const HYPERCALL: u32 = 3;
        const SYSTEM_EVENT: u32 = 24;
        const MEMORY_FAULT: u32 = 39;
        let reason = self.reason()?;
        Ok(match (errno, reason) {
            (Some(errno @ (Errno::EFAULT | Errno::EHWPOISON)), MEMORY_FAULT) => {
                Exit::MemoryFault { errno, flags: self.word(0)?, address: self.word(1)?, size: self.word(2)? }
            }
            (Some(errno), _) => Exit::Failed(errno),
            (None, MMIO) => {
                let size_and_write = self.word(2)?;
                let size = size_and_write as u32;
                let bits = size.min(8) * 8;
                let write = size_and_write >> 32 & 0xff != 0;
                let stored = self.word(1)? & u64::MAX.checked_shr(64 - bits).unwrap_or(0);
                Exit::Mmio { address: self.word(0)?, size, write, value: if write { stored } else { 0 } }
            }
            (None, SYSTEM_EVENT) => Exit::SystemEvent { kind: self.word(0)? as u32 },
            (None, HYPERCALL) => {
                let mut arguments = [0; 6];
                for (index, argument) in arguments.iter_mut().enumerate() {
                    *argument = self.word(1 + index)?;
                }
                Exit::Hypercall { number: self.word(0)?, arguments }
            }
            (None, reason) => Exit::Other { reason },
        })
    }

    /// `exit_reason`.
    pub(crate) fn reason(&self) -> Outcome<u32> {
        Ok(self.run.get(Self::REASON)? as u32)
    }

    /// A word of what comes with the reason.
    pub(crate) fn word(&self, index: usize) -> Outcome<u64> {
        self.run.get(Self::UNION + index * 8)
    }

    /// Stores such a word.
    pub(crate) fn set_word(&self, index: usize, value: u64) -> Outcome {
        self.run.set(Self::UNION + index * 8, value)
    }

    /// Sets the value of a load from a device.
    pub(crate) fn answer(&self, value: u64) -> Outcome {
        self.set_word(1, value)
    }

    /// Sets what a hypercall returns.
    pub(crate) fn set_return(&self, value: u64) -> Outcome {
        self.set_word(Self::RET, value)
    }

    /// Sets `immediate_exit`.
    pub(crate) fn set_immediate_exit(&self, on: bool) -> Outcome {
        self.run.set(Self::IMMEDIATE_EXIT, u64::from(on) << 8)
    }

    /// `KVM_GET_ONE_REG` of 64 bits.
    pub(crate) fn register(&self, id: u64) -> Result<u64, Errno> {
        let mut value = 0_u64;
        let addr = (&raw mut value).addr() as u64;
        ioctl_with(&self.fd, GET_ONE_REG, &mut kvm_one_reg { id, addr })?;
        Ok(value)
    }

    /// `KVM_SET_ONE_REG` of 64 bits.
    pub(crate) fn set_register(&self, id: u64, mut value: u64) -> Result<i32, Errno> {
        let addr = (&raw mut value).addr() as u64;
        ioctl_with(&self.fd, SET_ONE_REG, &mut kvm_one_reg { id, addr })
    }
}

/// Whether it is the module's `/dev/kvm`, which has to have everything.
pub(crate) fn is_ravelin() -> bool {
    std::path::Path::new("/sys/module/ravelin").exists()
}
