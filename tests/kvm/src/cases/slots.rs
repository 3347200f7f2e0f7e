//! Slots of memory, and how guest_memfd is bound to them.

use std::os::fd::{AsRawFd, OwnedFd};

use kvm_bindings::{
    KVM_CAP_NR_MEMSLOTS, KVM_CAP_USER_MEMORY2, KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::cases;
use crate::check::{Outcome, check_eq, fails, works};
use crate::kvm::{self, KINDS, Kind, PROTECTED, SET_USER_MEMORY_REGION, Vm};
use crate::machine::{Backing, MEMORY, MEMORY_SLOT, Plan};
use crate::memory::{Mapping, PAGE};

cases! {
    capabilities[KINDS];
    anonymous;
    anonymous_is_not_for_protected_vms[PROTECTED];
    first_ioctl_and_guest_memfd;
    unknown_flags[KINDS];
    flags_that_exclude_guest_memfd;
    alignment_and_range[KINDS];
    not_a_guest_memfd[KINDS];
    file_of_another_vm[KINDS];
    offsets[KINDS];
    overlapping_offsets[KINDS];
    overlapping_addresses[KINDS];
    deleted_and_bound_again[KINDS];
    cannot_be_changed[KINDS];
    one_file_in_several_slots[KINDS];
    closed_file[KINDS];
    too_many[KINDS];
    as_many_as_there_may_be;
    live_protected_slots_stay[PROTECTED];
}

const P: u64 = PAGE as u64;

/// Guest address of the slots.
const GPA: u64 = MEMORY;

/// A VM and one of its files, of four pages.
fn vm_and_file(kind: Kind) -> Outcome<(Vm, OwnedFd)> {
    let vm = Vm::new(kind)?;
    let file = vm.shared_memfd(4 * PAGE)?;
    Ok((vm, file))
}

/// The arguments of [`Vm::bind`], to be changed.
fn region(file: &OwnedFd) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: GPA,
        memory_size: 4 * P,
        guest_memfd: file.as_raw_fd().cast_unsigned(),
        ..Default::default()
    }
}

fn capabilities(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    check_eq!(kvm::capability(&vm, KVM_CAP_USER_MEMORY2), Ok(1), "KVM_CAP_USER_MEMORY2");
    let slots = works("KVM_CAP_NR_MEMSLOTS", kvm::capability(&vm, KVM_CAP_NR_MEMSLOTS))?;
    anyhow::ensure!(slots >= 32, "{slots} slots");
    Ok(())
}

fn anonymous() -> Outcome {
    let vm = Vm::new(Kind::Ordinary)?;
    let memory = works("mmap", Mapping::anonymous(4 * PAGE))?;
    works("KVM_SET_USER_MEMORY_REGION2", vm.add_anonymous(0, GPA, &memory))?;
    works("the same again", vm.add_anonymous(0, GPA, &memory))?;
    works("moved", vm.add_anonymous(0, GPA + 0x10_0000, &memory))?;
    works("deleted", vm.delete_slot(0))?;
    let mut region = kvm_userspace_memory_region {
        slot: 1,
        guest_phys_addr: GPA,
        memory_size: 4 * P,
        userspace_addr: memory.address() as u64,
        ..Default::default()
    };
    works("KVM_SET_USER_MEMORY_REGION", kvm::ioctl_with(&vm, SET_USER_MEMORY_REGION, &mut region))?;
    region.memory_size = 2 * P;
    fails("another size", kvm::ioctl_with(&vm, SET_USER_MEMORY_REGION, &mut region), Errno::EINVAL)?;
    region.memory_size = 0;
    works("deleted", kvm::ioctl_with(&vm, SET_USER_MEMORY_REGION, &mut region))?;
    fails("deleted twice", kvm::ioctl_with(&vm, SET_USER_MEMORY_REGION, &mut region), Errno::EINVAL)
}

fn anonymous_is_not_for_protected_vms(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let memory = works("mmap", Mapping::anonymous(4 * PAGE))?;
    fails("KVM_SET_USER_MEMORY_REGION2", vm.add_anonymous(0, GPA, &memory), Errno::EINVAL)
}

fn first_ioctl_and_guest_memfd() -> Outcome {
    let (vm, file) = vm_and_file(Kind::Ordinary)?;
    let mapping = works("mmap", Mapping::shared(&file, 4 * PAGE))?;
    let mut region = kvm_userspace_memory_region {
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: GPA,
        memory_size: 4 * P,
        userspace_addr: mapping.address() as u64,
        ..Default::default()
    };
    fails("with guest_memfd's flag", kvm::ioctl_with(&vm, SET_USER_MEMORY_REGION, &mut region), Errno::EINVAL)
}

fn unknown_flags(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    let known = KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;
    for bit in 0..32 {
        let flag = 1_u32 << bit;
        if flag & known == 0 {
            let flagged = kvm_userspace_memory_region2 { flags: flag | KVM_MEM_GUEST_MEMFD, ..region(&file) };
            fails(format_args!("flag {flag:#x}"), vm.set_region(flagged), Errno::EINVAL)?;
        }
    }
    Ok(())
}

fn flags_that_exclude_guest_memfd() -> Outcome {
    let (vm, file) = vm_and_file(Kind::Ordinary)?;
    for flag in [KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY] {
        let flagged = kvm_userspace_memory_region2 { flags: flag | KVM_MEM_GUEST_MEMFD, ..region(&file) };
        fails(format_args!("flag {flag:#x}"), vm.set_region(flagged), Errno::EINVAL)?;
    }
    Ok(())
}

fn alignment_and_range(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    let good = region(&file);
    let bad = [
        ("gpa + 1", kvm_userspace_memory_region2 { guest_phys_addr: GPA + 1, ..good }),
        ("size + 1", kvm_userspace_memory_region2 { memory_size: 4 * P + 1, ..good }),
        ("size - 1", kvm_userspace_memory_region2 { memory_size: 4 * P - 1, ..good }),
        ("userspace_addr + 1", kvm_userspace_memory_region2 { userspace_addr: 1, ..good }),
        ("userspace_addr of the kernel", kvm_userspace_memory_region2 { userspace_addr: !0xfff, ..good }),
        ("wrapping around", kvm_userspace_memory_region2 { guest_phys_addr: !0xfff, ..good }),
        ("slot 0x7fff0000", kvm_userspace_memory_region2 { slot: 0x7fff_0000, ..good }),
        ("address space 1", kvm_userspace_memory_region2 { slot: 1 << 16, ..good }),
        ("deleted though not there", kvm_userspace_memory_region2 { memory_size: 0, ..good }),
    ];
    for (what, arguments) in bad {
        fails(what, vm.set_region(arguments), Errno::EINVAL)?;
    }
    // What is beyond the guest's addresses.
    let beyond = kvm_userspace_memory_region2 { guest_phys_addr: 1 << kvm::IPA_BITS, ..good };
    fails("beyond the guest's addresses", vm.set_region(beyond), Errno::EFAULT)?;
    fails("no arguments", kvm::ioctl(&vm, kvm::SET_USER_MEMORY_REGION2, 0), Errno::EFAULT)?;
    works("what is right", vm.set_region(good)).map(drop)
}

fn not_a_guest_memfd(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    let good = region(&file);
    let other = works("memfd_create", memfd_create(c"ordinary", MFdFlags::empty()))?;
    works("ftruncate", nix::unistd::ftruncate(&other, 4 * PAGE as i64))?;
    let kvm = kvm::open()?;
    let files = [("/dev/kvm", kvm.as_raw_fd()), ("the VM", vm.fd.as_raw_fd()), ("a memfd", other.as_raw_fd())];
    for (what, fd) in files {
        let arguments = kvm_userspace_memory_region2 { guest_memfd: fd.cast_unsigned(), ..good };
        fails(what, vm.set_region(arguments), Errno::EINVAL)?;
    }
    for fd in [u32::MAX, 1000] {
        let arguments = kvm_userspace_memory_region2 { guest_memfd: fd, ..good };
        fails(format_args!("file {fd}"), vm.set_region(arguments), Errno::EBADF)?;
    }
    Ok(())
}

fn file_of_another_vm(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    let other = Vm::new(kind)?;
    fails("the other VM", other.set_region(region(&file)), Errno::EINVAL)?;
    // Not when the first one has let go of it, and not when it is gone.
    works("the first VM", vm.set_region(region(&file)))?;
    works("deleted there", vm.delete_slot(0))?;
    fails("the other VM, after that", other.set_region(region(&file)), Errno::EINVAL)?;
    drop(vm);
    fails("the other VM, after the first one's end", other.set_region(region(&file)), Errno::EINVAL)?;
    let next = Vm::new(kind)?;
    fails("a VM that is made later", next.set_region(region(&file)), Errno::EINVAL)
}

fn offsets(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    let page = kvm_userspace_memory_region2 { memory_size: P, ..region(&file) };
    for offset in [1, 8, 512, P / 2, P - 1, P + 1, 4 * P, 5 * P, 1 << 40, i64::MAX as u64 & !0xfff, 1 << 63, !0xfff] {
        let arguments = kvm_userspace_memory_region2 { guest_memfd_offset: offset, ..page };
        fails(format_args!("offset {offset:#x}"), vm.set_region(arguments), Errno::EINVAL)?;
    }
    let long = kvm_userspace_memory_region2 { guest_memfd_offset: P, ..region(&file) };
    fails("beyond the end", vm.set_region(long), Errno::EINVAL)?;
    let last = kvm_userspace_memory_region2 { guest_memfd_offset: 3 * P, ..page };
    works("the last page", vm.set_region(last)).map(drop)
}

fn overlapping_offsets(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    works("pages 1 and 2", vm.bind(0, GPA, 2 * P, &file, P))?;
    let elsewhere = GPA + 0x10_0000;
    for (offset, size) in [(0, 2 * P), (0, 4 * P), (P, P), (P, 2 * P), (2 * P, 2 * P)] {
        let what = format!("{size:#x} bytes at {offset:#x}");
        fails(what, vm.bind(1, elsewhere, size, &file, offset), Errno::EEXIST)?;
    }
    works("page 0", vm.bind(1, elsewhere, P, &file, 0))?;
    works("page 3", vm.bind(2, elsewhere + P, P, &file, 3 * P)).map(drop)
}

fn overlapping_addresses(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    let other = vm.shared_memfd(4 * PAGE)?;
    works("the first", vm.bind(0, GPA, 2 * P, &file, 0))?;
    for gpa in [GPA - P, GPA, GPA + P] {
        fails(format_args!("at {gpa:#x}"), vm.bind(1, gpa, 2 * P, &other, 0), Errno::EEXIST)?;
    }
    // What failed has left nothing behind.
    works("before it", vm.bind(1, GPA - 2 * P, 2 * P, &other, 0))?;
    works("behind it", vm.bind(2, GPA + 2 * P, 2 * P, &other, 2 * P)).map(drop)
}

fn deleted_and_bound_again(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    let mapping = works("mmap", Mapping::shared(&file, 4 * PAGE))?;
    mapping.fill_pattern(0, 4, 0, 9)?;
    for _ in 0..100 {
        works("bound", vm.bind(0, GPA, 4 * P, &file, 0))?;
        works("deleted", vm.delete_slot(0))?;
    }
    works("bound elsewhere", vm.bind(3, GPA + 0x10_0000, 2 * P, &file, 2 * P))?;
    mapping.check_pattern(0, 4, 0, 9)
}

fn cannot_be_changed(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    works("bound", vm.bind(0, GPA, 2 * P, &file, 0))?;
    fails("moved", vm.bind(0, GPA + 0x10_0000, 2 * P, &file, 0), Errno::EINVAL)?;
    fails("another size", vm.bind(0, GPA, P, &file, 0), Errno::EINVAL)?;
    fails("another offset", vm.bind(0, GPA, 2 * P, &file, P), Errno::EINVAL)?;
    let memory = works("mmap", Mapping::anonymous(2 * PAGE))?;
    fails("without guest_memfd", vm.add_anonymous(0, GPA, &memory), Errno::EINVAL)?;
    works("deleted", vm.delete_slot(0)).map(drop)
}

fn one_file_in_several_slots(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    for page in 0..4 {
        let slot = u32::try_from(page)?;
        works(format_args!("page {page}"), vm.bind(slot, GPA + page * 0x10_0000, P, &file, (3 - page) * P))?;
    }
    works("deleted", vm.delete_slot(2))?;
    works("bound again", vm.bind(7, GPA + 0x80_0000, P, &file, P)).map(drop)
}

fn closed_file(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    works("bound", vm.bind(0, GPA, 4 * P, &file, 0))?;
    drop(file);
    works("deleted", vm.delete_slot(0))?;
    let next = vm.shared_memfd(4 * PAGE)?;
    works("another file", vm.bind(0, GPA, 4 * P, &next, 0))?;
    drop(next);
    drop(vm);
    Ok(())
}

fn too_many(kind: Kind) -> Outcome {
    let (vm, file) = vm_and_file(kind)?;
    let slots = works("KVM_CAP_NR_MEMSLOTS", kvm::capability(&vm, KVM_CAP_NR_MEMSLOTS))?;
    let slots = u32::try_from(slots)?;
    fails("the slot behind the last one", vm.bind(slots, GPA, P, &file, 0), Errno::EINVAL)?;
    works("the last one", vm.bind(slots - 1, GPA, P, &file, 0)).map(drop)
}

fn as_many_as_there_may_be() -> Outcome {
    let vm = Vm::new(Kind::Ordinary)?;
    let slots = works("KVM_CAP_NR_MEMSLOTS", kvm::capability(&vm, KVM_CAP_NR_MEMSLOTS))?;
    let slots = u32::try_from(slots)?.min(2000);
    let file = vm.shared_memfd(usize::try_from(slots)? * PAGE)?;
    for slot in 0..slots {
        let page = u64::from(slot);
        works(format_args!("slot {slot}"), vm.bind(slot, GPA + page * 2 * P, P, &file, page * P))?;
    }
    fails("one that overlaps", vm.bind(0, GPA + 2 * P, P, &file, 0), Errno::EINVAL)?;
    for slot in (0..slots).step_by(2) {
        works(format_args!("delete slot {slot}"), vm.delete_slot(slot))?;
    }
    works("one of them again", vm.bind(0, GPA, P, &file, 0)).map(drop)
}

fn live_protected_slots_stay(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).backing(Backing::Memfd).build()?;
    let mut guest = machine.boot()?;
    fails("deleted", machine.vm.delete_slot(MEMORY_SLOT), Errno::EPERM)?;
    let file = machine.memory.file()?;
    let moved = machine.vm.bind(MEMORY_SLOT, GPA + 0x10_0000, 4 * P, file, 0);
    anyhow::ensure!(matches!(moved, Err(Errno::EPERM | Errno::EINVAL)), "moved: {moved:?}");
    guest.fill(MEMORY, 4, 0, 1)?;
    guest.check(MEMORY, 4, 0, 1)
}
