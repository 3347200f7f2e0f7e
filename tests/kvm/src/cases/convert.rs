//! Conversions in place: a guest shares pages and takes them back, and the host has access in between.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::KVM_CAP_EXIT_HYPERCALL;
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MRemapFlags, MapFlags, MmapAdvise, ProtFlags, mremap};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{pipe, read, write};

use super::cases;
use super::memfd::punch;
use crate::check::{Outcome, check_eq, fails, works};
use crate::guest::{Conversion, Guest, Stop};
use crate::host::{self, Child};
use crate::kvm::{self, Exit, FLAG_MMAP, Kind, MAP_GPA_RANGE, PROTECTED};
use crate::machine::{Backing, MEMORY, Plan};
use crate::memory::{self, Mapping, PAGE};

cases! {
    contents_are_kept[PROTECTED];
    payload_before_boot[PROTECTED];
    private_from_the_start[PROTECTED];
    mapping_stays[PROTECTED];
    files_that_the_host_never_touched[PROTECTED];
    host_access_to_private_pages[PROTECTED];
    host_access_to_shared_pages[PROTECTED];
    before_allocation[PROTECTED];
    offered_and_never_touched[PROTECTED];
    indexing[PROTECTED];
    ranges[PROTECTED];
    bad_ranges[PROTECTED];
    twice[PROTECTED];
    large_ranges[PROTECTED].seconds(120);
    blocks[PROTECTED];
    allocated_in_advance[PROTECTED];
    fork_and_unshare[PROTECTED];
    mremap_and_unshare[PROTECTED];
    other_processes_mapping[PROTECTED];
    dont_need_and_convert[PROTECTED];
    mapped_late_and_populated[PROTECTED];
    punch_private[PROTECTED];
    punch_shared[PROTECTED];
    punch_before_boot[PROTECTED];
    relinquish;
    secrets_are_never_seen[PROTECTED].seconds(120);
    by_two_vcpus[PROTECTED].seconds(120);
    exits_to_userspace[PROTECTED];
    pages_of_ordinary_guests_cannot_be_shared;
}

const P: u64 = PAGE as u64;

fn contents_are_kept(kind: Kind) -> Outcome {
    const PAGES: u64 = 8;
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    let shared = kind.shared(MEMORY);
    for round in 0..4 {
        guest.fill(MEMORY, PAGES, 0, 10 * round)?;
        mapping.check_bus_error(0)?;
        guest.share(MEMORY, PAGES)?;
        mapping.check_pattern(0, PAGES as usize, 0, 10 * round)?;
        guest.check(shared, PAGES, 0, 10 * round)?;
        mapping.fill_pattern(0, PAGES as usize, 0, 10 * round + 1)?;
        guest.check(shared, PAGES, 0, 10 * round + 1)?;
        guest.fill(shared, PAGES, 0, 10 * round + 2)?;
        mapping.check_pattern(0, PAGES as usize, 0, 10 * round + 2)?;
        guest.unshare(MEMORY, PAGES)?;
        guest.check(MEMORY, PAGES, 0, 10 * round + 2)?;
        for page in 0..PAGES as usize {
            mapping.check_bus_error(page * PAGE)?;
        }
    }
    Ok(())
}

fn payload_before_boot(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 8).build()?;
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    // By the mapping and by pwrite, with gaps.
    mapping.fill_pattern(0, 2, 0, 7)?;
    check_eq!(pwrite(file, &[0x5a; 100], 5 * PAGE as i64 + 8), Ok(100), "pwrite");
    let mut guest = machine.boot()?;
    guest.check(MEMORY, 2, 0, 7)?;
    check_eq!(guest.load(MEMORY + 5 * P + 8)?, 0x5a5a_5a5a_5a5a_5a5a, "what pwrite has written");
    guest.check_zero(MEMORY + 2 * P, 3)?;
    guest.check_zero(MEMORY + 6 * P, 2)?;
    for page in 0..8 {
        mapping.check_bus_error(page * PAGE)?;
    }
    Ok(())
}

/// Without `INIT_SHARED` the host never has what the guest does not share.
fn private_from_the_start(kind: Kind) -> Outcome {
    const OTHER: u64 = 0xa000_0000;
    let machine = Plan::new(kind, 1).build()?;
    let file = works("KVM_CREATE_GUEST_MEMFD", machine.vm.memfd(4 * P, FLAG_MMAP))?;
    works("slot 5", machine.vm.bind(5, OTHER, 4 * P, &file, 0))?;
    let mapping = works("mmap", Mapping::shared(&file, 4 * PAGE))?;
    mapping.check_bus_error(0)?;
    let mut guest = machine.boot()?;
    guest.fill(OTHER, 4, 0, 6)?;
    mapping.check_bus_error(0)?;
    guest.share(OTHER + P, 1)?;
    mapping.check_bus_error(0)?;
    mapping.check_pattern(PAGE, 1, P, 6)?;
    guest.unshare(OTHER + P, 1)?;
    mapping.check_bus_error(PAGE)?;
    guest.check(OTHER, 4, 0, 6)
}

fn mapping_stays(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 2).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 2, 0, 1)?;
    for round in 0..50 {
        guest.share(MEMORY, 1)?;
        check_eq!(mapping.get(8)?, if round == 0 { ravelin_guest::pattern(0, 1, 1) } else { round - 1 }, "the word");
        mapping.set(8, round)?;
        guest.unshare(MEMORY, 1)?;
        check_eq!(guest.load(MEMORY + 8)?, round, "the word in the guest");
        mapping.check_bus_error(8)?;
    }
    Ok(())
}

/// The file is not even mapped, and the guest runs and shares.
fn files_that_the_host_never_touched(kind: Kind) -> Outcome {
    const OTHER: u64 = 0xa000_0000;
    let machine = Plan::new(kind, 1).build()?;
    let file = machine.vm.shared_memfd(4 * PAGE)?;
    works("slot 5", machine.vm.bind(5, OTHER, 4 * P, &file, 0))?;
    let mut guest = machine.boot()?;
    guest.fill(OTHER, 4, 0, 6)?;
    guest.share(OTHER, 4)?;
    guest.unshare(OTHER, 2)?;
    guest.check(OTHER, 2, 0, 6)
}

fn host_access_to_private_pages(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 1)?;
    for page in 0..4 {
        mapping.check_bus_error(page * PAGE)?;
        mapping.check_bus_error(page * PAGE + PAGE - 8)?;
    }
    fails("pread", pread(file, &mut [0; 64], 8), Errno::EFAULT)?;
    fails("pwrite", pwrite(file, &[0; 64], 8), Errno::EFAULT)?;
    let (output, input) = works("pipe", pipe())?;
    let flags = nix::fcntl::SpliceFFlags::empty();
    let mut offset = 0;
    let spliced = nix::fcntl::splice(file, Some(&mut offset), &input, None, PAGE, flags);
    fails("splice from the file", spliced, Errno::EFAULT)?;
    works("write", write(&input, &[1; 64]))?;
    let spliced = nix::fcntl::splice(&output, None, file, Some(&mut offset), 64, flags);
    fails("splice to the file", spliced, Errno::EFAULT)?;
    // The kernel's access on behalf of this process.
    fails("write(2) from the mapping", raw_write(&input, mapping.address(), 64), Errno::EFAULT)?;
    fails("read(2) into the mapping", raw_read(&zero()?, mapping.address(), 64), Errno::EFAULT)?;
    // What was in the page, all the time.
    guest.check(MEMORY, 4, 0, 1)
}

/// `/dev/zero`.
fn zero() -> Outcome<std::fs::File> {
    Ok(std::fs::File::open("/dev/zero")?)
}

/// write(2) from an address.
pub(super) fn raw_write(file: &impl AsRawFd, address: usize, size: usize) -> Result<isize, Errno> {
    let pointer = std::ptr::with_exposed_provenance(address);
    // SAFETY: The kernel reads what is there, if anything.
    Errno::result(unsafe { libc::write(file.as_raw_fd(), pointer, size) })
}

/// read(2) to an address where no object of Rust's is.
pub(super) fn raw_read(file: &impl AsRawFd, address: usize, size: usize) -> Result<isize, Errno> {
    let pointer = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: As above.
    Errno::result(unsafe { libc::read(file.as_raw_fd(), pointer, size) })
}

fn host_access_to_shared_pages(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 1)?;
    guest.share(MEMORY + P, 2)?;
    let mut word = [0; 8];
    check_eq!(pread(file, &mut word, PAGE as i64 + 8), Ok(8), "pread");
    check_eq!(u64::from_le_bytes(word), ravelin_guest::pattern(P, 1, 1), "what pread reads");
    check_eq!(pwrite(file, &[0x66; 8], 2 * PAGE as i64), Ok(8), "pwrite");
    check_eq!(guest.load(kind.shared(MEMORY + 2 * P))?, 0x6666_6666_6666_6666, "what pwrite has written");
    // As far as the shared pages go, or not at all.
    let mut bytes = vec![0; 4 * PAGE];
    let across = pread(file, &mut bytes, 2 * PAGE as i64);
    anyhow::ensure!(across == Ok(PAGE) || across == Err(Errno::EFAULT), "pread across the border: {across:?}");
    anyhow::ensure!(bytes[PAGE..].iter().all(|byte| *byte == 0), "pread has written behind the border");
    let (output, input) = works("pipe", pipe())?;
    check_eq!(raw_write(&input, mapping.address() + PAGE, 64), Ok(64), "write(2) from the mapping");
    check_eq!(raw_read(&output, mapping.address() + 2 * PAGE, 64), Ok(64), "read(2) into the mapping");
    let copied = guest.load(kind.shared(MEMORY + 2 * P + 8))?;
    check_eq!(copied, ravelin_guest::pattern(P, 1, 1), "what was copied");
    guest.unshare(MEMORY + P, 2)?;
    fails("pread of what is private again", pread(file, &mut word, PAGE as i64), Errno::EFAULT)?;
    check_eq!(guest.load(MEMORY + 2 * P + 8)?, copied, "what is there afterwards");
    Ok(())
}

/// Pages that nobody has touched are shared, and read as zeros on both sides.
fn before_allocation(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 8).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.share(MEMORY, 4)?;
    mapping.check_words(0, 4 * PAGE, 0)?;
    guest.check_zero(kind.shared(MEMORY), 4)?;
    mapping.fill_pattern(0, 4, 0, 3)?;
    guest.unshare(MEMORY, 4)?;
    guest.check(MEMORY, 4, 0, 3)?;
    guest.check_zero(MEMORY + 4 * P, 4)
}

/// Pages that the host never looks at while they are shared.
fn offered_and_never_touched(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 2)?;
    for _ in 0..20 {
        guest.share(MEMORY, 4)?;
        guest.unshare(MEMORY, 4)?;
    }
    machine.memory.mapping.check_bus_error(0)?;
    guest.check(MEMORY, 4, 0, 2)
}

/// Of many pages one is shared at a time: that one can be accessed, and no other one.
fn indexing(kind: Kind) -> Outcome {
    const PAGES: usize = 12;
    let machine = Plan::new(kind, PAGES).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, PAGES as u64, 0, 1)?;
    for index in 0..PAGES {
        let at = index as u64 * P;
        guest.share(MEMORY + at, 1)?;
        mapping.check_pattern(index * PAGE, 1, at, 1)?;
        for other in (0..PAGES).filter(|other| *other != index) {
            mapping.check_bus_error(other * PAGE + 8 * other)?;
        }
        mapping.fill_pattern(index * PAGE, 1, at, 2)?;
        guest.unshare(MEMORY + at, 1)?;
        guest.check(MEMORY, index as u64 + 1, 0, 2)?;
        guest.check(MEMORY + at + P, (PAGES - index - 1) as u64, at + P, 1)?;
    }
    Ok(())
}

/// Parts of a shared range are taken back, in the middle and at its ends.
fn ranges(kind: Kind) -> Outcome {
    const PAGES: u64 = 16;
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, PAGES, 0, 4)?;
    for (start, count) in [(0, 4), (5, 6), (12, 4), (4, 1), (11, 1)] {
        guest.share(MEMORY, PAGES)?;
        mapping.check_pattern(0, PAGES as usize, 0, 4)?;
        guest.unshare(MEMORY + start * P, count)?;
        for page in 0..PAGES {
            let offset = page as usize * PAGE;
            if (start..start + count).contains(&page) {
                mapping.check_bus_error(offset)?;
            } else {
                mapping.check_pattern(offset, 1, page * P, 4)?;
            }
        }
        guest.check(MEMORY + start * P, count, start * P, 4)?;
        guest.unshare(MEMORY, start)?;
        guest.unshare(MEMORY + (start + count) * P, PAGES - start - count)?;
    }
    Ok(())
}

/// Ranges that are none, or beyond all memory: the guest's call fails, and nothing else happens.
fn bad_ranges(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 4)?;
    for (at, pages) in
        [(MEMORY + 1, 1), (MEMORY + 8, 2), (1 << 48, 1), (u64::MAX - P + 1, 1), (1 << (kvm::IPA_BITS + 1), 2)]
    {
        for share in [true, false] {
            guest.begin_convert(at, pages.min(1), share)?;
            match guest.go()? {
                Stop::Done(reply) => {
                    let done = guest.converted(at, reply.x);
                    anyhow::ensure!(!matches!(done, Conversion::Done(1..)), "{pages} pages at {at:#x}: {done:?}");
                }
                Stop::Exit(exit) => anyhow::bail!("{pages} pages at {at:#x}: {exit:x?}"),
            }
        }
    }
    guest.check(MEMORY, 4, 0, 4)
}

/// What is shared is shared again, and what is private is made private.
fn twice(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 4)?;
    // A realm may; a pKVM guest is told that it did what it need not do.
    let expected = if kind == Kind::Realm { Conversion::Done(4) } else { Conversion::Refused };
    check_eq!(guest.convert(MEMORY, 4, false)?, expected, "unshare of what is private");
    guest.share(MEMORY, 4)?;
    machine.memory.mapping.check_pattern(0, 4, 0, 4)?;
    check_eq!(guest.convert(MEMORY, 4, true)?, expected, "share of what is shared");
    machine.memory.mapping.check_pattern(0, 4, 0, 4)?;
    guest.unshare(MEMORY, 4)?;
    guest.check(MEMORY, 4, 0, 4)
}

/// Eight MiB: blocks of 2 MiB, and more than a call to the hypervisor does.
fn large_ranges(kind: Kind) -> Outcome {
    const PAGES: u64 = 2048;
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    let touch = |guest: &mut Guest<'_>, base: u64, value: u64| -> Outcome {
        (0..PAGES).step_by(37).try_for_each(|page| guest.store(base + page * P + 16, value + page))
    };
    let look = |value: u64| -> Outcome {
        for page in (0..PAGES).step_by(37) {
            check_eq!(mapping.get(page as usize * PAGE + 16)?, value + page, "page {page}");
        }
        Ok(())
    };
    touch(&mut guest, MEMORY, 1000)?;
    guest.share(MEMORY, PAGES)?;
    look(1000)?;
    // All of it is mapped at once.
    mapping.check_words(24, 8, 0)?;
    (0..PAGES as usize).try_for_each(|page| mapping.get(page * PAGE).map(drop))?;
    touch(&mut guest, kind.shared(MEMORY), 5000)?;
    look(5000)?;
    guest.unshare(MEMORY, PAGES)?;
    (0..PAGES as usize).step_by(61).try_for_each(|page| mapping.check_bus_error(page * PAGE))?;
    touch(&mut guest, MEMORY, 9000)?;
    guest.share(MEMORY + 100 * P, 1000)?;
    check_eq!(mapping.get(111 * PAGE + 16)?, 9111, "page 111");
    mapping.check_bus_error(1110 * PAGE)?;
    guest.unshare(MEMORY + 100 * P, 1000)
}

/// Memory goes to the guest in blocks of 2 MiB: the hypervisor counts calls.
fn blocks(kind: Kind) -> Outcome {
    const PAGES: u64 = 2048;
    // The number of VM_MAP, less 0xc6001000.
    let calls = || Ok::<_, anyhow::Error>(host::statistics(&["calls[0x13]"])?[0]);
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mut guest = machine.boot()?;
    let before = calls()?;
    (0..PAGES).step_by(32).try_for_each(|page| guest.store(MEMORY + page * P, page))?;
    let given = calls()? - before;
    anyhow::ensure!((1..=16).contains(&given), "VM_MAP was called {given} times for 8 MiB");
    Ok(())
}

/// fallocate(2) before the start gives the guest zeros, and is not payload.
fn allocated_in_advance(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1024).build()?;
    let keep = nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    works("fallocate", nix::fcntl::fallocate(machine.memory.file()?, keep, 0, 1024 * PAGE as i64))?;
    let mut guest = machine.boot()?;
    guest.check_zero(MEMORY, 1024)?;
    machine.memory.mapping.check_bus_error(512 * PAGE)
}

fn fork_and_unshare(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 2).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 2, 0, 4)?;
    guest.share(MEMORY, 2)?;
    mapping.check_pattern(0, 2, 0, 4)?;
    let (go, done) = (works("pipe", pipe())?, works("pipe", pipe())?);
    let child = Child::new(|| {
        mapping.check_pattern(0, 2, 0, 4)?;
        works("write", write(&done.1, &[1]))?;
        works("read", read(&go.0, &mut [0]))?;
        mapping.check_bus_error(0)?;
        mapping.check_pattern(PAGE, 1, P, 4)
    })?;
    works("read", read(&done.0, &mut [0]))?;
    guest.unshare(MEMORY, 1)?;
    works("write", write(&go.1, &[1]))?;
    child.succeed()?;
    guest.check(MEMORY, 1, 0, 4)
}

fn mremap_and_unshare(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let mapping = works("mmap", Mapping::shared(machine.memory.file()?, 4 * PAGE))?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 4)?;
    guest.share(MEMORY, 4)?;
    mapping.check_pattern(0, 4, 0, 4)?;
    let place = works("mmap", Mapping::anonymous(4 * PAGE))?;
    let (old, new) = (mapping.start(), place.start());
    let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
    // SAFETY: Both ranges are this function's; what was at the new place is replaced.
    works("mremap", unsafe { mremap(old, 4 * PAGE, 4 * PAGE, flags, Some(new)) })?;
    place.check_pattern(0, 4, 0, 4)?;
    guest.unshare(MEMORY, 2)?;
    place.check_bus_error(0)?;
    place.check_pattern(2 * PAGE, 2, 2 * P, 4)?;
    guest.unshare(MEMORY + 2 * P, 2)?;
    guest.check(MEMORY, 4, 0, 4)?;
    // Nothing is left where it was.
    std::mem::forget(mapping);
    Ok(())
}

/// A process that gets the file over a socket maps it; unshare takes its mapping, too.
fn other_processes_mapping(kind: Kind) -> Outcome {
    let stream = || works("socketpair", socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty()));
    let (ours, theirs) = stream()?;
    // It is there before the VM is.
    let child = Child::new(|| {
        let file = receive_file(&theirs)?;
        let mapping = works("mmap", Mapping::shared(&file, 2 * PAGE))?;
        mapping.check_pattern(0, 2, 0, 4)?;
        mapping.set(8, 0x8888)?;
        works("write", write(&theirs, &[1]))?;
        works("read", read(&theirs, &mut [0]))?;
        mapping.check_bus_error(0)?;
        mapping.check_pattern(PAGE, 1, P, 4)?;
        // The file outlives its VM.
        works("write", write(&theirs, &[1]))?;
        works("read", read(&theirs, &mut [0]))?;
        drop(mapping);
        works("PUNCH_HOLE", punch(&file, 0, P))
    })?;
    let machine = Plan::new(kind, 2).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 2, 0, 4)?;
    guest.share(MEMORY, 2)?;
    let descriptors = [machine.memory.file()?.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&descriptors)];
    works("sendmsg", sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(&[1])], &message, MsgFlags::empty(), None))?;
    works("read", read(&ours, &mut [0]))?;
    check_eq!(guest.load(kind.shared(MEMORY + 8))?, 0x8888, "what the other process has stored");
    guest.unshare(MEMORY, 1)?;
    works("write", write(&ours, &[1]))?;
    works("read", read(&ours, &mut [0]))?;
    check_eq!(guest.load(MEMORY + 8)?, 0x8888, "what is there afterwards");
    drop(machine);
    works("write", write(&ours, &[1]))?;
    child.succeed()
}

/// Receives a file over a socket.
fn receive_file(socket: &OwnedFd) -> Outcome<OwnedFd> {
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut byte = [0];
    let mut slices = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty());
    let message = works("recvmsg", message)?;
    let found = works("control messages", message.cmsgs())?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(files) => files.first().copied(),
        _ => None,
    });
    let fd = found.ok_or_else(|| anyhow::anyhow!("no file came"))?;
    // SAFETY: It is new, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn dont_need_and_convert(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 4)?;
    works("MADV_DONTNEED of private pages", mapping.advise(MmapAdvise::MADV_DONTNEED))?;
    guest.share(MEMORY, 4)?;
    mapping.check_pattern(0, 4, 0, 4)?;
    works("MADV_DONTNEED of shared pages", mapping.advise(MmapAdvise::MADV_DONTNEED))?;
    mapping.check_pattern(0, 4, 0, 4)?;
    works("MADV_DONTNEED again", mapping.advise(MmapAdvise::MADV_DONTNEED))?;
    guest.unshare(MEMORY, 4)?;
    guest.check(MEMORY, 4, 0, 4)?;
    mapping.check_bus_error(0)
}

/// Mappings that are made while some pages are private, also with `MAP_POPULATE`.
fn mapped_late_and_populated(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let file = machine.memory.file()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 4)?;
    guest.share(MEMORY + 2 * P, 2)?;
    for flags in [MapFlags::MAP_SHARED, MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE] {
        let mapping = works("mmap", Mapping::new(file, 0, 4 * PAGE, flags))?;
        mapping.check_bus_error(0)?;
        mapping.check_pattern(2 * PAGE, 2, 2 * P, 4)?;
        // What is missing is told, or passed over.
        let _ = mapping.advise(MmapAdvise::MADV_WILLNEED);
    }
    let part = Mapping::with(file, 2 * PAGE, 2 * PAGE, ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
    works("mmap", part)?.check_pattern(0, 2, 2 * P, 4)?;
    guest.unshare(MEMORY + 2 * P, 2)?;
    guest.check(MEMORY, 4, 0, 4)
}

/// The guest loads a word where the host has taken the page: it gets an abort.
pub(super) fn guest_loses(guest: &mut Guest<'_>, address: u64) -> Outcome {
    guest.begin_code(crate::guest::load(), &[address])?;
    match guest.go()? {
        Stop::Done(reply) => {
            let aborted = reply.exception.is_some_and(|exception| exception.is_abort_at(address));
            anyhow::ensure!(aborted, "a load at {address:#x}: {reply:x?}");
        }
        Stop::Exit(exit) => anyhow::bail!("a load at {address:#x}: {exit:x?}"),
    }
    Ok(())
}

fn punch_private(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 4)?;
    works("PUNCH_HOLE", punch(machine.memory.file()?, P, P))?;
    guest_loses(&mut guest, MEMORY + P + 8)?;
    guest.check(MEMORY, 1, 0, 4)?;
    guest.check(MEMORY + 2 * P, 2, 2 * P, 4)?;
    // Nothing of what was there is left.
    match mapping.load(PAGE) {
        Ok(_) => mapping.check_words(PAGE, PAGE, 0)?,
        Err(_) => mapping.check_bus_error(PAGE)?,
    }
    guest_loses(&mut guest, MEMORY + P)?;
    if kind == Kind::Pkvm {
        // The guest says that it knows, and gets another page.
        const MEM_RELINQUISH: u64 = 0xc600_0009;
        let [status, done, ..] = guest.call(&[MEM_RELINQUISH, MEMORY + P, 1, 0, 0])?;
        check_eq!([status, done], [0, 1], "MEM_RELINQUISH");
        guest.check_zero(MEMORY + P, 1)?;
        guest.fill(MEMORY + P, 1, P, 9)?;
        guest.check(MEMORY + P, 1, P, 9)?;
    }
    Ok(())
}

fn punch_shared(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 4)?;
    guest.share(MEMORY, 4)?;
    // One that the host has touched, and one that it has not.
    mapping.check_pattern(0, 2, 0, 4)?;
    works("PUNCH_HOLE of what is mapped", punch(machine.memory.file()?, P, P))?;
    works("PUNCH_HOLE of what is not", punch(machine.memory.file()?, 2 * P, P))?;
    mapping.check_pattern(0, 1, 0, 4)?;
    mapping.check_pattern(3 * PAGE, 1, 3 * P, 4)?;
    for page in [1, 2] {
        let old = ravelin_guest::pattern(page * P, 1, 4);
        let seen = mapping.load(page as usize * PAGE + 8);
        anyhow::ensure!(seen.is_err() || seen == Ok(0), "{seen:x?} where {old:#x} was");
        guest_loses(&mut guest, kind.shared(MEMORY + page * P))?;
    }
    guest.unshare(MEMORY, 1)?;
    guest.unshare(MEMORY + 3 * P, 1)?;
    guest.check(MEMORY, 1, 0, 4)?;
    guest.check(MEMORY + 3 * P, 1, 3 * P, 4)
}

fn punch_before_boot(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    machine.memory.mapping.fill_pattern(0, 4, 0, 4)?;
    works("PUNCH_HOLE", punch(machine.memory.file()?, P, 2 * P))?;
    let mut guest = machine.boot()?;
    guest.check(MEMORY, 1, 0, 4)?;
    guest.check_zero(MEMORY + P, 2)?;
    guest.check(MEMORY + 3 * P, 1, 3 * P, 4)
}

/// Pages that the guest gives up are the host's, without contents; the guest gets zeros when it comes back.
fn relinquish() -> Outcome {
    const MEM_RELINQUISH: u64 = 0xc600_0009;
    let machine = Plan::new(Kind::Pkvm, 8).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    for round in 0..5 {
        guest.fill(MEMORY, 8, 0, round)?;
        let [status, done, ..] = guest.call(&[MEM_RELINQUISH, MEMORY + 2 * P, 4, 0, 0])?;
        check_eq!([status, done], [0, 4], "MEM_RELINQUISH");
        mapping.check_bus_error(PAGE)?;
        mapping.check_words(2 * PAGE, 4 * PAGE, 0)?;
        mapping.check_bus_error(6 * PAGE)?;
        guest.check(MEMORY, 2, 0, round)?;
        guest.check_zero(MEMORY + 2 * P, 4)?;
        mapping.check_bus_error(3 * PAGE)?;
        guest.check(MEMORY + 6 * P, 2, 6 * P, round)?;
    }
    Ok(())
}

/// While a guest converts a page that holds a secret whenever it is private, threads of the host try all the time.
fn secrets_are_never_seen(kind: Kind) -> Outcome {
    const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec2;
    const ROUNDS: u64 = 150;
    let machine = Plan::new(kind, 2).build()?;
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    let mut guest = machine.boot()?;
    guest.store(MEMORY, 1)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let by_mapping = scope.spawn(|| -> Outcome<u64> {
            let mut seen = 0;
            while !stop.load(Ordering::Relaxed) {
                match memory::load(mapping.address()) {
                    Ok(SECRET) => anyhow::bail!("a load has seen the secret"),
                    Ok(_) => seen += 1,
                    Err(fault) => anyhow::ensure!(fault.signal == libc::SIGBUS, "{fault:x?}"),
                }
            }
            Ok(seen)
        });
        let by_pread = scope.spawn(|| -> Outcome<u64> {
            let mut seen = 0;
            while !stop.load(Ordering::Relaxed) {
                let mut word = [0; 8];
                match pread(file, &mut word, 0) {
                    Ok(8) => {
                        anyhow::ensure!(u64::from_le_bytes(word) != SECRET, "pread has seen the secret");
                        seen += 1;
                    }
                    Err(Errno::EFAULT) => {}
                    other => anyhow::bail!("pread: {other:?}"),
                }
                std::thread::yield_now();
            }
            Ok(seen)
        });
        let result = (0..ROUNDS).try_for_each(|round| -> Outcome {
            guest.store(MEMORY, SECRET)?;
            guest.store(MEMORY, round)?;
            guest.share(MEMORY, 1)?;
            // A reference that comes and goes may be in the way.
            for _ in 0..50 {
                if guest.convert(MEMORY, 1, false)? == Conversion::Done(1) {
                    return Ok(());
                }
            }
            anyhow::bail!("unshare was refused 50 times")
        });
        stop.store(true, Ordering::Relaxed);
        for thread in [by_mapping, by_pread] {
            let seen = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
            anyhow::ensure!(seen > 0 || ROUNDS < 50, "a thread has never seen the page shared");
        }
        result
    })
}

/// Two vCPUs convert pages of their own at the same time; the host uses those of both.
fn by_two_vcpus(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 16).vcpus(2).build()?;
    let mut first = machine.boot()?;
    let work = |guest: &mut Guest<'_>, start: u64, seed: u64| -> Outcome {
        let (at, offset) = (MEMORY + start * P, start as usize * PAGE);
        for round in 0..25 {
            guest.fill(at, 4, start * P, seed + round)?;
            guest.share(at, 4)?;
            machine.memory.mapping.check_pattern(offset, 4, start * P, seed + round)?;
            machine.memory.mapping.fill_pattern(offset, 4, start * P, seed + round + 500)?;
            guest.unshare(at, 4)?;
            guest.check(at, 4, start * P, seed + round + 500)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| -> Outcome {
        let machine = &machine;
        let thread = scope.spawn(move || {
            let mut second = machine.guest(1);
            second.start()?;
            work(&mut second, 4, 1000)
        });
        check_eq!(first.cpu_on(1)?, 0, "CPU_ON");
        let result = work(&mut first, 0, 100);
        thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        result
    })
}

/// The exit for a conversion of the first two pages of the memory.
fn conversion_exit(guest: &mut Guest<'_>, share: bool) -> Outcome {
    const ENCRYPTED: u64 = 1 << 4;
    guest.begin_convert(MEMORY, 2, share)?;
    let Exit::Hypercall { number, arguments } = guest.exit()? else { anyhow::bail!("no exit, share {share}") };
    let flags = if share { 0 } else { ENCRYPTED };
    check_eq!((number, arguments), (MAP_GPA_RANGE, [MEMORY, 2, flags, 0, 0, 0]), "the exit, share {share}");
    Ok(())
}

/// Userspace may ask to be told, and may refuse that the guest takes pages back.
fn exits_to_userspace(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let offered = works("KVM_CAP_EXIT_HYPERCALL", kvm::capability(&machine.vm, KVM_CAP_EXIT_HYPERCALL))?;
    check_eq!(u64::from(offered.cast_unsigned()) >> MAP_GPA_RANGE & 1, 1, "KVM_CAP_EXIT_HYPERCALL");
    machine.vm.tell_of_conversions()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 4)?;
    conversion_exit(&mut guest, true)?;
    guest.vcpu.set_return(0)?;
    guest.finish()?;
    mapping.check_pattern(0, 2, 0, 4)?;

    // Refused, whatever the error is: the guest is told, and all can go on with the pages.
    for (seed, error) in [(5, Errno::EAGAIN as u64), (6, 1), (7, u64::MAX)] {
        conversion_exit(&mut guest, false)?;
        guest.vcpu.set_return(error)?;
        let x = guest.finish()?.x;
        match kind {
            // SUCCESS, as far as it went, REJECT.
            Kind::Realm => check_eq!([x[0], x[1], x[2]], [0, MEMORY, 1], "IPA_STATE_SET after {error:#x}"),
            _ => check_eq!(x[0].cast_signed(), -3, "MEM_UNSHARE after {error:#x}"),
        }
        mapping.check_pattern(0, 2, 0, seed - 1)?;
        mapping.fill_pattern(0, 2, 0, seed)?;
        guest.check(kind.shared(MEMORY), 2, 0, seed)?;
    }

    conversion_exit(&mut guest, false)?;
    guest.vcpu.set_return(0)?;
    let reply = guest.finish()?;
    check_eq!(guest.converted(MEMORY, reply.x), Conversion::Done(2), "unshare that is not refused");
    mapping.check_bus_error(0)?;
    guest.check(MEMORY, 2, 0, 7)?;
    guest.check(MEMORY + 2 * P, 2, 2 * P, 4)
}

/// The calls are not for them.
fn pages_of_ordinary_guests_cannot_be_shared() -> Outcome {
    let machine = Plan::new(Kind::Ordinary, 2).backing(Backing::Memfd).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 2, 0, 4)?;
    for call in [0xc600_0003_u64, 0xc600_0004, 0xc600_0009, 0xc400_0197] {
        let [status, ..] = guest.call(&[call, MEMORY, 1, 0, 0])?;
        anyhow::ensure!(status != 0, "call {call:#x} succeeded");
    }
    machine.memory.mapping.check_pattern(0, 2, 0, 4)
}
