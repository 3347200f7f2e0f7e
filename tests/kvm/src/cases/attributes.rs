//! `KVM_SET_MEMORY_ATTRIBUTES2` on a guest_memfd: who may touch what no guest has, and claims that end early.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::uio::pread;
use nix::unistd::{pipe, read};

use super::cases;
use super::pins::splice_into_pipe;
use crate::check::{Outcome, check_eq, fails, works};
use crate::guest::Guest;
use crate::kvm::{self, Exit, FLAG_MMAP, Kind, MAP_GPA_RANGE, MemoryAttributes, PROTECTED};
use crate::machine::{Backing, MEMORY, Machine, Plan};
use crate::memory::{Mapping, PAGE};

cases! {
    errors[PROTECTED];
    not_for_ordinary_guests;
    private_before_boot[PROTECTED];
    shared_before_boot[PROTECTED];
    pinned_before_boot[PROTECTED];
    pinned_afterwards[PROTECTED];
    claims_end_early[PROTECTED];
    claims_begin_early[PROTECTED];
    what_is_not_offered[PROTECTED];
}

const P: u64 = PAGE as u64;

/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
const PRIVATE: u64 = 1 << 3;

/// What `error_offset` is before the call.
const UNTOUCHED: u64 = 0x7777;

/// Makes the call for a range; returns `error_offset`, too.
fn set(file: impl AsFd, offset: u64, size: u64, attributes: u64) -> (Result<i32, Errno>, u64) {
    let error_offset = UNTOUCHED;
    let mut arguments = MemoryAttributes { offset, size, attributes, error_offset, ..Default::default() };
    let result = kvm::ioctl_with(file, kvm::SET_MEMORY_ATTRIBUTES2, &mut arguments);
    (result, arguments.error_offset)
}

/// Makes a call that succeeds.
fn set_well(file: impl AsFd, offset: u64, size: u64, attributes: u64) -> Outcome {
    let (result, error_offset) = set(file, offset, size, attributes);
    works(format_args!("attributes {attributes} of {size:#x} bytes at {offset:#x}"), result)?;
    check_eq!(error_offset, UNTOUCHED, "error_offset of a call that succeeds");
    Ok(())
}

fn errors(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let file = machine.memory.file()?;
    machine.memory.mapping.fill_pattern(0, 4, 0, 3)?;
    let good = MemoryAttributes { size: 4 * P, attributes: PRIVATE, ..Default::default() };
    let last = |mut arguments: MemoryAttributes| {
        arguments.reserved[10] = 1;
        arguments
    };
    let bad = [
        ("no attribute of KVM", MemoryAttributes { attributes: 1 << 4, ..good }),
        ("READ", MemoryAttributes { attributes: PRIVATE | 1, ..good }),
        ("the highest attribute", MemoryAttributes { attributes: PRIVATE | 1 << 63, ..good }),
        ("a flag", MemoryAttributes { flags: 1, ..good }),
        ("a reserved word", last(good)),
        ("no size", MemoryAttributes { size: 0, ..good }),
        ("half a page", MemoryAttributes { size: P / 2, ..good }),
        ("in a page", MemoryAttributes { offset: 8, size: P, ..good }),
        ("beyond the end", MemoryAttributes { offset: P, ..good }),
        ("behind the end", MemoryAttributes { offset: 4 * P, size: P, ..good }),
        ("a sum of 0", MemoryAttributes { offset: P.wrapping_neg(), size: P, ..good }),
        ("a sum of a page", MemoryAttributes { offset: P.wrapping_neg(), size: 2 * P, ..good }),
        ("the largest size", MemoryAttributes { size: P.wrapping_neg(), ..good }),
    ];
    for (what, mut arguments) in bad {
        fails(what, kvm::ioctl_with(file, kvm::SET_MEMORY_ATTRIBUTES2, &mut arguments), Errno::EINVAL)?;
    }
    fails("address 0", kvm::ioctl(file, kvm::SET_MEMORY_ATTRIBUTES2, 0), Errno::EFAULT)?;
    fails("another ioctl", kvm::ioctl(file, kvm::GET_API_VERSION, 0), Errno::ENOTTY)?;
    let on_vm = kvm::ioctl_with(&machine.vm, kvm::SET_MEMORY_ATTRIBUTES2, &mut good.clone());
    fails("the call on the VM", on_vm, Errno::ENOTTY)?;
    // None has done anything.
    machine.memory.mapping.check_pattern(0, 4, 0, 3)
}

fn not_for_ordinary_guests() -> Outcome {
    let machine = Plan::new(Kind::Ordinary, 2).backing(Backing::Memfd).build()?;
    for attributes in [0, PRIVATE] {
        // A KVM that does not have it says ENOTTY.
        let (result, _) = set(machine.memory.file()?, 0, P, attributes);
        let expected = if kvm::is_ravelin() { Errno::EINVAL } else { Errno::ENOTTY };
        fails(format_args!("attributes {attributes}"), result, expected)?;
    }
    machine.memory.mapping.fill_pattern(0, 2, 0, 3)?;
    machine.boot()?.check(MEMORY, 2, 0, 3)
}

/// The host loses what it has prepared; the guest finds it.
fn private_before_boot(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    mapping.fill_pattern(0, 3, 0, 3)?;
    set_well(file, P, 3 * P, PRIVATE)?;
    mapping.check_pattern(0, 1, 0, 3)?;
    for page in 1..4 {
        // The last one is a hole.
        mapping.check_bus_error(page * PAGE)?;
        let offset = i64::try_from(page * PAGE)?;
        fails(format_args!("pread of page {page}"), pread(file, &mut [0; 8], offset), Errno::EFAULT)?;
    }
    // Back and forth, contents stay.
    set_well(file, P, P, 0)?;
    mapping.check_pattern(PAGE, 1, P, 3)?;
    mapping.check_bus_error(2 * PAGE)?;
    set_well(file, P, P, PRIVATE)?;
    mapping.check_bus_error(PAGE)?;

    let mut guest = machine.boot()?;
    guest.check(MEMORY, 3, 0, 3)?;
    guest.check_zero(MEMORY + 3 * P, 1)?;
    // What the guest offers the host may touch: of pages that a guest has, the guest decides.
    guest.share(MEMORY + P, 1)?;
    mapping.check_pattern(PAGE, 1, P, 3)?;
    mapping.check_bus_error(2 * PAGE)
}

/// A file without `INIT_SHARED` is opened to the host, part by part.
fn shared_before_boot(kind: Kind) -> Outcome {
    const OTHER: u64 = 0xa000_0000;
    let machine = Plan::new(kind, 1).build()?;
    let file = works("KVM_CREATE_GUEST_MEMFD", machine.vm.memfd(4 * P, FLAG_MMAP))?;
    works("slot 5", machine.vm.bind(5, OTHER, 4 * P, &file, 0))?;
    let mapping = works("mmap", Mapping::shared(&file, 4 * PAGE))?;
    mapping.check_bus_error(PAGE)?;
    set_well(&file, P, 2 * P, 0)?;
    mapping.check_bus_error(0)?;
    mapping.fill_pattern(PAGE, 2, P, 3)?;
    mapping.check_bus_error(3 * PAGE)?;
    set_well(&file, 0, 4 * P, PRIVATE)?;
    mapping.check_bus_error(PAGE)?;
    let mut guest = machine.boot()?;
    guest.check_zero(OTHER, 1)?;
    guest.check(OTHER + P, 2, P, 3)?;
    guest.check_zero(OTHER + 3 * P, 1)
}

/// Pages 1 and 2 of four in a pipe: nothing changes until both are out of it.
fn pinned(machine: &Machine, key: u64, seed: u64) -> Outcome {
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    let (output, input) = works("pipe", pipe())?;
    for page in [2, 1] {
        splice_into_pipe(mapping, page * PAGE, &input)?;
    }
    let read_page = |output: &OwnedFd| -> Outcome {
        check_eq!(read(output, &mut vec![0; PAGE]), Ok(PAGE), "read from the pipe");
        Ok(())
    };
    for round in 0..3 {
        check_eq!(set(file, 0, 4 * P, PRIVATE), (Err(Errno::EAGAIN), P), "private, round {round}");
        mapping.check_pattern(0, 4, key, seed)?;
    }
    // What is not pinned can change.
    set_well(file, 3 * P, P, PRIVATE)?;
    read_page(&output)?;
    check_eq!(set(file, 0, 4 * P, PRIVATE), (Err(Errno::EAGAIN), P), "private with one page pinned");
    mapping.check_pattern(0, 3, key, seed)?;
    read_page(&output)?;
    set_well(file, 0, 4 * P, PRIVATE)
}

fn pinned_before_boot(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    machine.memory.mapping.fill_pattern(0, 4, 0, 3)?;
    pinned(&machine, 0, 3)?;
    for page in 0..4 {
        machine.memory.mapping.check_bus_error(page * PAGE)?;
    }
    machine.boot()?.check(MEMORY, 4, 0, 3)
}

fn pinned_afterwards(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 3)?;
    guest.share(MEMORY, 4)?;
    machine.memory.mapping.check_pattern(0, 4, 0, 3)?;
    pinned(&machine, 0, 3)?;
    // It is offered still, so the next touch claims it.
    machine.memory.mapping.check_pattern(0, 4, 0, 3)?;
    guest.unshare(MEMORY, 4)?;
    machine.memory.mapping.check_bus_error(PAGE)?;
    guest.check(MEMORY, 4, 0, 3)
}

/// The guest shares four pages; this program is told of it, as of all conversions that the hypervisor tells the host of.
fn share(machine: &Machine, guest: &mut Guest<'_>) -> Outcome {
    machine.vm.tell_of_conversions()?;
    guest.fill(MEMORY, 4, 0, 3)?;
    guest.begin_convert(MEMORY, 4, true)?;
    told(guest)?;
    guest.finish().map(drop)
}

/// The guest's call ends in an exit that tells of a conversion.
fn told(guest: &mut Guest<'_>) -> Outcome {
    match guest.exit()? {
        Exit::Hypercall { number: MAP_GPA_RANGE, .. } => guest.vcpu.set_return(0),
        exit => anyhow::bail!("{exit:x?}, expected one for a conversion"),
    }
}

/// What the host has let go of the guest takes back without it.
fn claims_end_early(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    let mut guest = machine.boot()?;
    share(&machine, &mut guest)?;
    mapping.check_pattern(0, 4, 0, 3)?;
    set_well(file, 0, 2 * P, PRIVATE)?;
    // No exit, or this fails.
    guest.unshare(MEMORY, 2)?;
    mapping.check_bus_error(0)?;
    mapping.check_pattern(2 * PAGE, 2, 2 * P, 3)?;
    guest.begin_convert(MEMORY + 2 * P, 2, false)?;
    told(&mut guest)?;
    guest.finish()?;
    guest.check(MEMORY, 4, 0, 3)?;
    mapping.check_bus_error(2 * PAGE)
}

/// What is offered is claimed without a touch, so the guest does not take it back without the host.
fn claims_begin_early(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    let mut guest = machine.boot()?;
    share(&machine, &mut guest)?;
    set_well(file, 0, 2 * P, 0)?;
    // Claims that are there already.
    set_well(file, 0, P, 0)?;
    guest.unshare(MEMORY + 2 * P, 2)?;
    guest.begin_convert(MEMORY, 2, false)?;
    told(&mut guest)?;
    guest.finish()?;
    guest.check(MEMORY, 4, 0, 3)?;
    mapping.check_bus_error(0)
}

/// The host does not get what the guest has not offered.
fn what_is_not_offered(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 3)?;
    for page in 0..4 {
        check_eq!(set(file, page * P, P, 0), (Err(Errno::EPERM), page * P), "shared, page {page}");
    }
    guest.share(MEMORY, 2)?;
    check_eq!(set(file, 0, 4 * P, 0), (Err(Errno::EPERM), 2 * P), "shared, all pages");
    mapping.check_pattern(0, 2, 0, 3)?;
    for page in [2, 3] {
        mapping.check_bus_error(page * PAGE)?;
    }
    // To let go of what one does not have is no error.
    set_well(file, 0, 4 * P, PRIVATE)?;
    guest.unshare(MEMORY, 2)?;
    guest.check(MEMORY, 4, 0, 3)
}
