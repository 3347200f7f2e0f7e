//! ioctls of `/dev/kvm`, VMs and vCPUs: what they offer, and what they refuse.

use std::os::fd::{AsFd, AsRawFd};

use kvm_bindings::{
    KVM_ARM_VCPU_EL1_32BIT, KVM_ARM_VCPU_HAS_EL2, KVM_ARM_VCPU_PMU_V3, KVM_ARM_VCPU_PSCI_0_2, KVM_CAP_ARM_PSCI_0_2,
    KVM_CAP_ARM_VM_IPA_SIZE, KVM_CAP_DEVICE_CTRL, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD, KVM_CAP_IRQFD,
    KVM_CAP_MAX_VCPU_ID, KVM_CAP_MAX_VCPUS, KVM_CAP_MEMORY_FAULT_INFO, KVM_CAP_MP_STATE, KVM_CAP_NR_VCPUS,
    KVM_CAP_ONE_REG, KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_SIGNAL_MSI, KVM_CAP_USER_MEMORY, KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED, kvm_enable_cap, kvm_mp_state, kvm_one_reg, kvm_vcpu_init,
};
use nix::errno::Errno;
use nix::unistd::close;

use super::cases;
use crate::check::{Outcome, check_eq, fails, works};
use crate::host::Child;
use crate::kvm::{
    self, ARM_PREFERRED_TARGET, ARM_VCPU_INIT, CREATE_VCPU, CREATE_VM, GET_API_VERSION, GET_MP_STATE, GET_ONE_REG,
    GET_REG_LIST, GET_VCPU_MMAP_SIZE, IPA_BITS, KINDS, Kind, PROTECTED, RUN, SET_MP_STATE, SET_ONE_REG, Vcpu, Vm, core,
    ioctl, ioctl_with,
};
use crate::machine::{MEMORY, Plan};
use crate::memory::{Mapping, PAGE};

cases! {
    version;
    vm_types;
    capabilities[KINDS];
    what_is_not_offered[KINDS];
    unknown_numbers[KINDS];
    from_another_process[KINDS];
    other_processes_may_close[KINDS];
    vcpu_indices[KINDS];
    vcpus_of_a_live_vm[KINDS];
    mapped_run_structure[KINDS];
    preferred_target[KINDS];
    vcpu_init[KINDS];
    before_vcpu_init[KINDS];
    registers[KINDS];
    register_list[KINDS];
    register_errors[KINDS];
    registers_of_a_live_ordinary_vm;
    registers_of_a_live_protected_vm[PROTECTED];
    mp_state[KINDS];
    enable_cap[KINDS];
    immediate_exit[KINDS];
    run_without_memory[KINDS];
    bad_pointers[KINDS];
    closed_in_any_order[KINDS];
}

fn version() -> Outcome {
    let kvm = kvm::open()?;
    check_eq!(ioctl(&kvm, GET_API_VERSION, 0), Ok(12), "KVM_GET_API_VERSION");
    fails("KVM_GET_API_VERSION of 1", ioctl(&kvm, GET_API_VERSION, 1), Errno::EINVAL)?;
    let size = works("KVM_GET_VCPU_MMAP_SIZE", ioctl(&kvm, GET_VCPU_MMAP_SIZE, 0))?;
    anyhow::ensure!(size >= 4096 && size % 4096 == 0, "KVM_GET_VCPU_MMAP_SIZE: {size}");
    fails("KVM_GET_VCPU_MMAP_SIZE of 1", ioctl(&kvm, GET_VCPU_MMAP_SIZE, 1), Errno::EINVAL)
}

/// Makes a VM of that type and closes it.
fn create(vm_type: u64) -> Result<(), Errno> {
    let kvm = kvm::open().map_err(|_| Errno::ENOENT)?;
    let fd = ioctl(&kvm, CREATE_VM, vm_type)?;
    close(fd)
}

fn vm_types() -> Outcome {
    let kvm = kvm::open()?;
    let max = works("KVM_CAP_ARM_VM_IPA_SIZE", kvm::capability(&kvm, KVM_CAP_ARM_VM_IPA_SIZE))?;
    anyhow::ensure!(max >= IPA_BITS.cast_signed() && max <= 52, "KVM_CAP_ARM_VM_IPA_SIZE: {max}");
    let max = u64::from(max.cast_unsigned());
    for bits in [32, 36, max] {
        works(format_args!("{bits} bits"), create(bits))?;
    }
    works("the default", create(0))?;
    for bits in [1, 31, max + 1, 53, 64, 255] {
        fails(format_args!("{bits} bits"), create(bits), Errno::EINVAL)?;
    }
    let unknown = (9..64).filter(|bit| *bit != 31);
    for bit in unknown {
        fails(format_args!("type {:#x}", 1_u64 << bit), create(1 << bit | 36), Errno::EINVAL)?;
    }
    if kvm::is_ravelin() {
        for kind in PROTECTED {
            works(kind.name(), create(kind.vm_type()))?;
            fails("53 bits", create(kind.vm_type() & !0xff | 53), Errno::EINVAL)?;
        }
        fails("both ways to be protected", create(1 << 31 | 1 << 8 | 36), Errno::EINVAL)?;
    }
    Ok(())
}

fn capabilities(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let expected = [
        (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
        (KVM_CAP_ONE_REG, "KVM_CAP_ONE_REG"),
        (KVM_CAP_ARM_PSCI_0_2, "KVM_CAP_ARM_PSCI_0_2"),
        (KVM_CAP_IRQFD, "KVM_CAP_IRQFD"),
        (KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD"),
        (KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"),
        (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
        (KVM_CAP_DEVICE_CTRL, "KVM_CAP_DEVICE_CTRL"),
        (KVM_CAP_NR_VCPUS, "KVM_CAP_NR_VCPUS"),
        (KVM_CAP_MAX_VCPUS, "KVM_CAP_MAX_VCPUS"),
        (KVM_CAP_MAX_VCPU_ID, "KVM_CAP_MAX_VCPU_ID"),
    ];
    // Those that other KVMs for arm64 lack, or have only with an ITS.
    let ours = [
        (KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI"),
        (KVM_CAP_MEMORY_FAULT_INFO, "KVM_CAP_MEMORY_FAULT_INFO"),
        (KVM_CAP_PRE_FAULT_MEMORY, "KVM_CAP_PRE_FAULT_MEMORY"),
    ];
    let ours = ours.iter().filter(|_| kvm::is_ravelin());
    for (number, name) in expected.iter().chain(ours) {
        let value = works(name, kvm::capability(&vm, *number))?;
        anyhow::ensure!(value > 0, "{name}: {value}");
    }
    let vcpus = works("KVM_CAP_MAX_VCPUS", kvm::capability(&vm, KVM_CAP_MAX_VCPUS))?;
    anyhow::ensure!(vcpus >= 8, "{vcpus} vCPUs");
    Ok(())
}

fn what_is_not_offered(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let kvm = kvm::open()?;
    for number in [7, 8, 10_000, 0x7fff_ffff, u32::MAX] {
        check_eq!(kvm::capability(&kvm, number), Ok(0), "capability {number} of /dev/kvm");
        check_eq!(kvm::capability(&vm, number), Ok(0), "capability {number} of a VM");
    }
    Ok(())
}

/// Whether an ioctl is refused as one that does not exist.
fn unknown(what: &str, result: Result<i32, Errno>) -> Outcome {
    match result {
        Err(Errno::ENOTTY | Errno::EINVAL) => Ok(()),
        other => anyhow::bail!("{what}: {other:?}, expected ENOTTY or EINVAL"),
    }
}

fn unknown_numbers(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let vcpu = vm.add_vcpu(0)?;
    let kvm = kvm::open()?;
    let file = vm.shared_memfd(PAGE)?;
    let files =
        [("/dev/kvm", kvm.as_fd()), ("the VM", vm.as_fd()), ("the vCPU", vcpu.fd.as_fd()), ("the file", file.as_fd())];
    // Of other devices, unused, and the x86 ones KVM_SET_TSS_ADDR, KVM_CREATE_PIT2, KVM_GET_MSRS.
    let numbers = [0x5401, 0xaeff, 0xae00 | 0x1f, 0xae47, 0x4040_ae77, 0xc008_ae88, u32::MAX];
    for (name, file) in files {
        for number in numbers {
            unknown(&format!("ioctl {number:#x} of {name}"), ioctl(file, number, 0))?;
        }
    }
    // Those of one kind of file on another one.
    unknown("KVM_RUN of the VM", ioctl(&vm, RUN, 0))?;
    unknown("KVM_CREATE_VM of the vCPU", ioctl(&vcpu.fd, CREATE_VM, 0))?;
    unknown("KVM_CREATE_VCPU of the file", ioctl(&file, CREATE_VCPU, 0))?;
    unknown("KVM_CREATE_VCPU of /dev/kvm", ioctl(&kvm, CREATE_VCPU, 0))
}

fn from_another_process(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    let child = Child::new(|| {
        let (vm, vcpu) = (&machine.vm, &machine.vcpus[0]);
        fails("KVM_RUN", vcpu.run_once(), Errno::EIO)?;
        fails("KVM_GET_ONE_REG", vcpu.register(kvm::PC), Errno::EIO)?;
        fails("KVM_CREATE_VCPU", ioctl(vm, CREATE_VCPU, 5), Errno::EIO)?;
        fails("KVM_CHECK_EXTENSION", kvm::capability(vm, 1), Errno::EIO)?;
        fails("KVM_CREATE_GUEST_MEMFD", vm.memfd(PAGE as u64, 0), Errno::EIO)?;
        fails("KVM_SET_USER_MEMORY_REGION2", vm.delete_slot(1), Errno::EIO)?;
        fails("KVM_IRQ_LINE", vm.set_spi(32, true), Errno::EIO)?;
        // Its own VM works.
        create(kind.vm_type()).map_err(|errno| anyhow::anyhow!("KVM_CREATE_VM: {errno:?}"))
    })?;
    child.succeed()?;
    guest.store(MEMORY, 1)
}

fn other_processes_may_close(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    guest.store(MEMORY, 0x55)?;
    // A child that has all files, and ends.
    Child::new(|| Ok(()))?.succeed()?;
    check_eq!(guest.load(MEMORY)?, 0x55, "memory after the end of a child");
    Ok(())
}

fn vcpu_indices(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let limit = works("KVM_CAP_MAX_VCPU_ID", kvm::capability(&vm, KVM_CAP_MAX_VCPU_ID))?;
    let limit = u64::from(limit.cast_unsigned());
    for index in [limit, limit + 1, 1 << 31, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        fails(format_args!("vCPU {index}"), vm.vcpu(index).map(drop), Errno::EINVAL)?;
    }
    let _first = works("vCPU 0", vm.vcpu(0))?;
    fails("vCPU 0 again", vm.vcpu(0).map(drop), Errno::EEXIST)?;
    let _other = works("vCPU 1", vm.vcpu(1))?;
    // The fd is not the vCPU: that stays.
    drop(_first);
    fails("vCPU 0 after its file is closed", vm.vcpu(0).map(drop), Errno::EEXIST)
}

fn vcpus_of_a_live_vm(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let _guest = machine.boot()?;
    fails("KVM_CREATE_VCPU", machine.vm.vcpu(1).map(drop), Errno::EBUSY)
}

fn mapped_run_structure(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let vcpu = vm.add_vcpu(0)?;
    let size = works("KVM_GET_VCPU_MMAP_SIZE", ioctl(kvm::open()?, GET_VCPU_MMAP_SIZE, 0))?;
    let size = usize::try_from(size)?;
    let again = works("mmap again", Mapping::shared(&vcpu.fd, size))?;
    again.set(0, 1 << 8)?;
    fails("KVM_RUN with immediate_exit set through it", vcpu.run_once(), Errno::EINTR)?;
    // What is behind it may be mapped or not, but there is nothing.
    if let Ok(beyond) = Mapping::new(&vcpu.fd, 16 * PAGE, PAGE, nix::sys::mman::MapFlags::MAP_SHARED) {
        let loaded = beyond.load(0);
        anyhow::ensure!(loaded.is_err(), "a load behind the structure: {loaded:x?}");
    }
    drop(vcpu);
    // It outlives the file.
    again.set(0, 0)
}

fn preferred_target(kind: Kind) -> Outcome {
    const GENERIC_V8: u32 = 5;
    let vm = Vm::new(kind)?;
    let mut target = kvm_vcpu_init { target: 99, features: [99; 7] };
    works("KVM_ARM_PREFERRED_TARGET", ioctl_with(&vm, ARM_PREFERRED_TARGET, &mut target))?;
    check_eq!(target.target, GENERIC_V8, "target");
    check_eq!(target.features, [0; 7], "features");
    Ok(())
}

fn vcpu_init(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let vcpu = works("KVM_CREATE_VCPU", vm.vcpu(0))?;
    let mut good = kvm_vcpu_init::default();
    works("KVM_ARM_PREFERRED_TARGET", ioctl_with(&vm, ARM_PREFERRED_TARGET, &mut good))?;
    let mut bad = kvm_vcpu_init { target: 77, ..good };
    fails("an unknown target", ioctl_with(&vcpu.fd, ARM_VCPU_INIT, &mut bad), Errno::EINVAL)?;
    for word in 0..7 {
        let mut bad = good;
        bad.features[word] = 1 << 31;
        let result = ioctl_with(&vcpu.fd, ARM_VCPU_INIT, &mut bad);
        anyhow::ensure!(matches!(result, Err(Errno::ENOENT | Errno::EINVAL)), "bit 31 of word {word}: {result:?}");
    }
    if kvm::is_ravelin() {
        for feature in [KVM_ARM_VCPU_EL1_32BIT, KVM_ARM_VCPU_PMU_V3, KVM_ARM_VCPU_HAS_EL2] {
            let mut bad = good;
            bad.features[0] = 1 << feature;
            let result = ioctl_with(&vcpu.fd, ARM_VCPU_INIT, &mut bad);
            anyhow::ensure!(matches!(result, Err(Errno::ENOENT | Errno::EINVAL)), "feature {feature}: {result:?}");
        }
    }
    good.features[0] = 1 << KVM_ARM_VCPU_PSCI_0_2;
    works("what is right", ioctl_with(&vcpu.fd, ARM_VCPU_INIT, &mut good))?;
    works("the same again", ioctl_with(&vcpu.fd, ARM_VCPU_INIT, &mut good)).map(drop)
}

fn before_vcpu_init(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let vcpu = works("KVM_CREATE_VCPU", vm.vcpu(0))?;
    fails("KVM_RUN", vcpu.run_once(), Errno::ENOEXEC)?;
    fails("KVM_GET_ONE_REG", vcpu.register(kvm::PC), Errno::ENOEXEC)?;
    fails("KVM_SET_ONE_REG", vcpu.set_register(kvm::PC, 0), Errno::ENOEXEC)?;
    fails("KVM_GET_REG_LIST", ioctl_with(&vcpu.fd, GET_REG_LIST, &mut [0_u64; 1]), Errno::ENOEXEC)
}

fn registers(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let vcpu = vm.add_vcpu(0)?;
    const EL1H_MASKED: u64 = 0x3c5;
    check_eq!(vcpu.register(kvm::PSTATE), Ok(EL1H_MASKED), "PSTATE after KVM_ARM_VCPU_INIT");
    for number in [0, 1, 17, 30] {
        check_eq!(vcpu.register(kvm::x(number)), Ok(0), "x{number}");
    }
    // What a VMM sets before the start: x0 and the PC, and of an ordinary VM anything.
    for (id, value) in [(kvm::x(0), 0x1234), (kvm::PC, 0x8000_0000)] {
        works("KVM_SET_ONE_REG", vcpu.set_register(id, value))?;
        check_eq!(vcpu.register(id), Ok(value), "register {id:#x}");
    }
    let (id, value) = (kvm::x(3), 1 << 63);
    if kind == Kind::Ordinary {
        works("KVM_SET_ONE_REG", vcpu.set_register(id, value))?;
        check_eq!(vcpu.register(id), Ok(value), "x3");
    } else {
        // The seal has no place for it, so that it would be lost.
        fails("KVM_SET_ONE_REG of x3", vcpu.set_register(id, value), Errno::EPERM)?;
        works("KVM_SET_ONE_REG of x3 to what it is", vcpu.set_register(id, 0)).map(drop)?;
    }
    Ok(())
}

/// The identifiers in `KVM_GET_REG_LIST`.
fn list(vcpu: &Vcpu) -> Outcome<Vec<u64>> {
    let mut count = [0_u64];
    fails("KVM_GET_REG_LIST without room", ioctl_with(&vcpu.fd, GET_REG_LIST, &mut count), Errno::E2BIG)?;
    let count = usize::try_from(count[0])?;
    anyhow::ensure!((30..4096).contains(&count), "{count} registers");
    let mut list = vec![0_u64; count + 1];
    list[0] = count as u64;
    works("KVM_GET_REG_LIST", ioctl(&vcpu.fd, GET_REG_LIST, list.as_mut_ptr().addr() as u64))?;
    check_eq!(list[0], count as u64, "the number of registers");
    Ok(list.split_off(1))
}

/// All that are listed can be read, and those of a VM that has not run can be set to what they are.
fn register_list(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let vcpu = vm.add_vcpu(0)?;
    let list = list(&vcpu)?;
    for id in &list {
        let (size, mut value) = (1 << (id >> 52 & 15), [0_u8; 256]);
        anyhow::ensure!(size <= value.len(), "register {id:#x} has {size} bytes");
        let mut register = kvm_one_reg { id: *id, addr: value.as_mut_ptr().addr() as u64 };
        works(format_args!("KVM_GET_ONE_REG of {id:#x}"), ioctl_with(&vcpu.fd, GET_ONE_REG, &mut register))?;
        works(format_args!("KVM_SET_ONE_REG of {id:#x}"), ioctl_with(&vcpu.fd, SET_ONE_REG, &mut register))?;
        anyhow::ensure!(value[size..].iter().all(|byte| *byte == 0), "{id:#x} is longer than it says");
    }
    for id in (0..31).map(kvm::x).chain([kvm::PC, kvm::PSTATE]) {
        anyhow::ensure!(list.contains(&id), "{id:#x} is not in the list");
    }
    let mut sorted = list.clone();
    sorted.sort_unstable();
    sorted.dedup();
    check_eq!(sorted.len(), list.len(), "registers that are listed once");
    Ok(())
}

fn register_errors(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let vcpu = vm.add_vcpu(0)?;
    let unknown = [
        core(1000),             // beyond struct kvm_regs
        core(1),                // in the middle of x0
        kvm::PC & !(0xf << 52), // of 8 bits
        kvm::PC ^ (1 << 52),    // of 128 bits
        0x6030_0000_0014_ffff,  // KVM_REG_ARM_FW: no such one
        0x6030_0000_0013_ffff,  // a system register that does not exist
        0x6030_0000_0fff_0000,  // no such group
    ];
    for id in unknown {
        for result in [vcpu.register(id).map(drop), vcpu.set_register(id, 0).map(drop)] {
            anyhow::ensure!(matches!(result, Err(Errno::ENOENT | Errno::EINVAL)), "register {id:#x}: {result:?}");
        }
    }
    for id in [0, u64::MAX, kvm::PC & !(0xff << 56) | 0x20 << 56] {
        for result in [vcpu.register(id).map(drop), vcpu.set_register(id, 0).map(drop)] {
            anyhow::ensure!(matches!(result, Err(Errno::EINVAL | Errno::ENOENT)), "register {id:#x}: {result:?}");
        }
    }
    let nowhere = |request| ioctl_with(&vcpu.fd, request, &mut kvm_one_reg { id: kvm::PC, addr: 0 });
    fails("KVM_GET_ONE_REG to nowhere", nowhere(GET_ONE_REG), Errno::EFAULT)?;
    fails("KVM_SET_ONE_REG from nowhere", nowhere(SET_ONE_REG), Errno::EFAULT)?;
    for mode in [0x3c9, 0x3cd, 0x3de, 0x1d3] {
        // EL2, EL3 and AArch32 are not the guest's.
        let result = vcpu.set_register(kvm::PSTATE, mode);
        fails(format_args!("PSTATE {mode:#x}"), result, Errno::EINVAL)?;
    }
    Ok(())
}

fn registers_of_a_live_ordinary_vm() -> Outcome {
    let machine = Plan::new(Kind::Ordinary, 1).build()?;
    let mut guest = machine.boot()?;
    let vcpu = &machine.vcpus[0];
    let pc = works("KVM_GET_ONE_REG", vcpu.register(kvm::PC))?;
    anyhow::ensure!((0x8000_0000..0x8010_0000).contains(&pc), "the PC is {pc:#x}");
    // The guest is in a load from the device: x18 is nobody's.
    works("KVM_SET_ONE_REG", vcpu.set_register(kvm::x(18), 0x1818))?;
    check_eq!(vcpu.register(kvm::x(18)), Ok(0x1818), "x18");
    const SCTLR_EL1: u64 = 0x6030_0000_0013_c080;
    let sctlr = works("SCTLR_EL1", vcpu.register(SCTLR_EL1))?;
    anyhow::ensure!(sctlr & 1 != 0, "SCTLR_EL1 is {sctlr:#x}, and the guest has its MMU on");
    guest.store(MEMORY, 1)
}

fn registers_of_a_live_protected_vm(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    let vcpu = &machine.vcpus[0];
    for id in [kvm::x(0), kvm::x(29), kvm::PC, kvm::PSTATE] {
        fails(format_args!("KVM_GET_ONE_REG of {id:#x}"), vcpu.register(id), Errno::EPERM)?;
        fails(format_args!("KVM_SET_ONE_REG of {id:#x}"), vcpu.set_register(id, 0), Errno::EPERM)?;
    }
    let mut init = kvm_vcpu_init::default();
    works("KVM_ARM_PREFERRED_TARGET", ioctl_with(&machine.vm, ARM_PREFERRED_TARGET, &mut init))?;
    init.features[0] = 1 << KVM_ARM_VCPU_PSCI_0_2;
    let again = ioctl_with(&vcpu.fd, ARM_VCPU_INIT, &mut init);
    anyhow::ensure!(matches!(again, Err(Errno::EPERM | Errno::EINVAL)), "KVM_ARM_VCPU_INIT: {again:?}");
    guest.store(MEMORY, 1)
}

fn mp_state(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let (first, second) = (vm.add_vcpu(0)?, vm.add_vcpu(1)?);
    let state = |vcpu: &Vcpu| {
        let mut state = kvm_mp_state { mp_state: 99 };
        ioctl_with(&vcpu.fd, GET_MP_STATE, &mut state).map(|_| state.mp_state)
    };
    let set = |vcpu: &Vcpu, mp_state| ioctl_with(&vcpu.fd, SET_MP_STATE, &mut kvm_mp_state { mp_state });
    check_eq!(state(&first), Ok(KVM_MP_STATE_RUNNABLE), "vCPU 0");
    check_eq!(state(&second), Ok(KVM_MP_STATE_STOPPED), "vCPU 1");
    works("vCPU 0 runnable", set(&first, KVM_MP_STATE_RUNNABLE))?;
    fails("halted", set(&first, KVM_MP_STATE_HALTED), Errno::EINVAL)?;
    fails("a state that does not exist", set(&first, 77), Errno::EINVAL)?;
    works("vCPU 1 stopped", set(&second, KVM_MP_STATE_STOPPED)).map(drop)
}

fn enable_cap(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    for cap in [10_000, u32::MAX] {
        let result = ioctl_with(&vm, kvm::ENABLE_CAP, &mut kvm_enable_cap { cap, ..Default::default() });
        fails(format_args!("capability {cap}"), result, Errno::EINVAL)?;
    }
    Ok(())
}

fn immediate_exit(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let vcpu = &machine.vcpus[0];
    vcpu.set_immediate_exit(true)?;
    for _ in 0..3 {
        fails("KVM_RUN", vcpu.run_once(), Errno::EINTR)?;
    }
    vcpu.set_immediate_exit(false)?;
    let mut guest = machine.boot()?;
    // An answer that is still owed is not lost.
    guest.begin_code(crate::guest::store(), &[MEMORY, 0x99])?;
    vcpu.set_immediate_exit(true)?;
    fails("KVM_RUN with an answer", vcpu.run_once(), Errno::EINTR)?;
    vcpu.set_immediate_exit(false)?;
    guest.finish()?;
    check_eq!(guest.load(MEMORY)?, 0x99, "what the guest has stored");
    Ok(())
}

/// A VM without a slot: the guest has nothing to execute. It may take exceptions for ever; it can be killed, and the next VM
/// runs.
fn run_without_memory(kind: Kind) -> Outcome {
    drop(Vm::new(kind)?);
    let child = Child::new(|| {
        let vm = Vm::new(kind)?;
        let vcpu = vm.add_vcpu(0)?;
        let _gic = vm.add_gic()?;
        works("the PC", vcpu.set_register(kvm::PC, 0x8000_0000))?;
        while vcpu.run_once() != Err(Errno::EIO) {}
        Ok(())
    })?;
    crate::host::sleep_ms(300);
    child.end()?;
    let machine = Plan::new(kind, 1).build()?;
    machine.boot()?.store(MEMORY, 1)
}

/// Pointers to nothing, to memory that can only be read, and into the kernel.
fn bad_pointers(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let vcpu = vm.add_vcpu(0)?;
    let reads = [
        (vm.fd.as_raw_fd(), kvm::SET_USER_MEMORY_REGION),
        (vm.fd.as_raw_fd(), kvm::SET_USER_MEMORY_REGION2),
        (vm.fd.as_raw_fd(), kvm::IRQ_LINE),
        (vm.fd.as_raw_fd(), kvm::IRQFD),
        (vm.fd.as_raw_fd(), kvm::IOEVENTFD),
        (vm.fd.as_raw_fd(), kvm::CREATE_DEVICE),
        (vm.fd.as_raw_fd(), kvm::CREATE_GUEST_MEMFD),
        (vm.fd.as_raw_fd(), kvm::SET_GSI_ROUTING),
        (vm.fd.as_raw_fd(), ARM_PREFERRED_TARGET),
        (vcpu.fd.as_raw_fd(), ARM_VCPU_INIT),
        (vcpu.fd.as_raw_fd(), GET_ONE_REG),
        (vcpu.fd.as_raw_fd(), SET_ONE_REG),
        (vcpu.fd.as_raw_fd(), GET_REG_LIST),
        (vcpu.fd.as_raw_fd(), GET_MP_STATE),
        (vcpu.fd.as_raw_fd(), SET_MP_STATE),
    ];
    for (fd, request) in reads {
        // SAFETY: Both files live as long as this function.
        let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        for pointer in [0, 8, 1 << 47, 0xffff_0000_0000_0000, u64::MAX - 7] {
            let result = ioctl(file, request, pointer);
            fails(format_args!("ioctl {request:#x} with {pointer:#x}"), result, Errno::EFAULT)?;
        }
    }
    Ok(())
}

/// VM, vCPU and memory are closed in each order, before and after the guest has run.
fn closed_in_any_order(kind: Kind) -> Outcome {
    for order in 0..6 {
        for boot in [false, true] {
            let machine = Plan::new(kind, 1).build()?;
            if boot {
                machine.boot()?.store(MEMORY, 1)?;
            }
            let crate::machine::Machine { vcpus, memory, image, gic, vm } = machine;
            let mut parts: Vec<Box<dyn std::any::Any>> =
                vec![Box::new(vcpus), Box::new((memory, image)), Box::new((gic, vm))];
            drop(parts.swap_remove(order % 3));
            drop(parts.swap_remove(order % 2));
        }
    }
    Ok(())
}
