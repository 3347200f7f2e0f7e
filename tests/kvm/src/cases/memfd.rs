//! guest_memfd as a file: what it is before a guest has any of it.

use std::os::fd::{AsFd, OwnedFd};

use kvm_bindings::KVM_CAP_GUEST_MEMFD;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags};
use nix::sys::stat::fstat;
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{ftruncate, read, write};

use super::cases;
use crate::check::{Outcome, check_eq, fails, works};
use crate::kvm::{self, CREATE_GUEST_MEMFD, FLAG_INIT_SHARED, FLAG_MMAP, FLAG_NO_PIN, KINDS, Kind, Vm};
use crate::memory::{Mapping, PAGE};

cases! {
    capabilities[KINDS];
    flags[KINDS];
    sizes[KINDS];
    reserved;
    arguments_are_copied;
    several[KINDS];
    read_and_write_without_a_position;
    read_and_write_shared[KINDS];
    read_and_write_private[KINDS];
    mapped[KINDS];
    mapping_beyond_the_end[KINDS];
    mapping_private_memory[KINDS];
    mapping_copies;
    mapping_is_not_offered;
    mapping_read_only;
    collapse;
    dont_need;
    size_and_block_size[KINDS];
    truncate;
    allocate[KINDS];
    allocate_arguments;
    punch_unaligned;
    punch_gives_zeros[KINDS];
    splice_shared;
    not_executable;
    closed_vm;
    memory_comes_back.seconds(120);
}

const P: u64 = PAGE as u64;

/// What the usual file has.
const PAGES: usize = 4;

fn vm_and_file(kind: Kind) -> Outcome<(Vm, OwnedFd)> {
    let vm = Vm::new(kind)?;
    let file = vm.shared_memfd(PAGES * PAGE)?;
    Ok((vm, file))
}

/// fallocate(2) with PUNCH_HOLE.
pub(super) fn punch(file: impl AsFd, offset: u64, size: u64) -> Result<(), Errno> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, offset.cast_signed(), size.cast_signed())
}

/// fallocate(2) that allocates.
fn reserve(file: impl AsFd, offset: u64, size: u64) -> Result<(), Errno> {
    fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, offset.cast_signed(), size.cast_signed())
}

fn capabilities(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    check_eq!(kvm::capability(&vm, KVM_CAP_GUEST_MEMFD), Ok(1), "KVM_CAP_GUEST_MEMFD");
    let flags = works("KVM_CAP_GUEST_MEMFD_FLAGS", kvm::capability(&vm, kvm::CAP_GUEST_MEMFD_FLAGS))?;
    let own = if kvm::is_ravelin() { FLAG_NO_PIN } else { 0 };
    check_eq!(flags as u64, FLAG_MMAP | FLAG_INIT_SHARED | own, "KVM_CAP_GUEST_MEMFD_FLAGS");
    Ok(())
}

fn flags(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    for bit in 0..64 {
        let flag = 1 << bit;
        let result = vm.memfd(P, flag);
        match flag {
            FLAG_MMAP | FLAG_INIT_SHARED => works(format_args!("flag {flag:#x}"), result).map(drop)?,
            FLAG_NO_PIN if kvm::is_ravelin() => works(format_args!("flag {flag:#x}"), result).map(drop)?,
            _ => fails(format_args!("flag {flag:#x}"), result, Errno::EINVAL)?,
        }
    }
    works("all flags", vm.memfd(P, FLAG_MMAP | FLAG_INIT_SHARED)).map(drop)?;
    works("no flag", vm.memfd(P, 0)).map(drop)
}

fn sizes(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    for size in (0..P).chain([P + 1, i64::MAX as u64, 1 << 63, (1 << 63) + P, u64::MAX, u64::MAX - P + 1]) {
        fails(format_args!("size {size:#x}"), vm.memfd(size, 0), Errno::EINVAL)?;
    }
    Ok(())
}

fn reserved() -> Outcome {
    let vm = Vm::new(Kind::Ordinary)?;
    // KVM does not look at them. A file with them set must have the size that was asked for all the same.
    let mut arguments = kvm_bindings::kvm_create_guest_memfd { size: P, reserved: [1; 6], ..Default::default() };
    match kvm::ioctl_with(&vm, CREATE_GUEST_MEMFD, &mut arguments) {
        Ok(_) | Err(Errno::EINVAL) => Ok(()),
        Err(errno) => anyhow::bail!("reserved words that are not 0: {errno:?}"),
    }
}

fn arguments_are_copied() -> Outcome {
    let vm = Vm::new(Kind::Ordinary)?;
    fails("no arguments", kvm::ioctl(&vm, CREATE_GUEST_MEMFD, 0), Errno::EFAULT)?;
    fails("arguments in the kernel", kvm::ioctl(&vm, CREATE_GUEST_MEMFD, 0xffff_8000_0000_0000), Errno::EFAULT)
}

fn several(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let one = works("the first file", vm.memfd(P, 0))?;
    let other = works("the second file", vm.memfd(2 * P, 0))?;
    let [first, second] = [works("fstat", fstat(&one))?, works("fstat", fstat(&other))?];
    check_eq!([first.st_size, second.st_size], [P as i64, 2 * P as i64], "st_size");
    anyhow::ensure!(first.st_ino != second.st_ino, "both have the inode {}", first.st_ino);
    drop(other);
    check_eq!(works("fstat", fstat(&one))?.st_size, P as i64, "st_size after the end of the other one");
    Ok(())
}

/// They would need the position of a stream, which such a file has not; or they work as on any file.
fn read_and_write_without_a_position() -> Outcome {
    let (_vm, file) = vm_and_file(Kind::Ordinary)?;
    if !kvm::is_ravelin() {
        fails("read", read(&file, &mut [0; 64]), Errno::EINVAL)?;
        return fails("write", write(&file, &[0; 64]), Errno::EINVAL);
    }
    check_eq!(write(&file, &[7; 64]), Ok(64), "write");
    let mut bytes = [1; 64];
    check_eq!(read(&file, &mut bytes), Ok(64), "read");
    check_eq!(bytes, [0; 64], "what is behind what was written");
    Ok(())
}

fn read_and_write_shared(kind: Kind) -> Outcome {
    let (_vm, file) = vm_and_file(kind)?;
    if !kvm::is_ravelin() {
        fails("pread", pread(&file, &mut [0; 64], 0), Errno::ESPIPE)?;
        return fails("pwrite", pwrite(&file, &[0; 64], 0), Errno::ESPIPE);
    }
    let mapping = works("mmap", Mapping::shared(&file, PAGES * PAGE))?;
    // Across the border of a page, and not aligned.
    let bytes: Vec<u8> = (0..=255).collect();
    check_eq!(pwrite(&file, &bytes, PAGE as i64 - 100), Ok(256), "pwrite");
    let mut seen = [0; 256];
    check_eq!(pread(&file, &mut seen, PAGE as i64 - 100), Ok(256), "pread");
    check_eq!(&seen[..], &bytes[..], "what pread reads");
    check_eq!(mapping.get(PAGE)?.to_le_bytes(), [100, 101, 102, 103, 104, 105, 106, 107], "what the mapping shows");
    mapping.set(3 * PAGE, 0x1234)?;
    let mut word = [0; 8];
    check_eq!(pread(&file, &mut word, 3 * PAGE as i64), Ok(8), "pread");
    check_eq!(u64::from_le_bytes(word), 0x1234, "what the mapping has stored");
    // At the end of the file.
    let end = (PAGES * PAGE) as i64;
    check_eq!(pread(&file, &mut seen, end - 16), Ok(16), "pread across the end");
    check_eq!(pread(&file, &mut seen, end), Ok(0), "pread at the end");
    check_eq!(pread(&file, &mut seen, end + 1), Ok(0), "pread beyond the end");
    check_eq!(pwrite(&file, &bytes, end - 16), Ok(16), "pwrite across the end");
    let beyond = pwrite(&file, &bytes, end);
    anyhow::ensure!(beyond.is_err() || beyond == Ok(0), "pwrite at the end: {beyond:?}");
    fails("pread at -1", pread(&file, &mut seen, -1), Errno::EINVAL)
}

fn read_and_write_private(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let file = works("KVM_CREATE_GUEST_MEMFD", vm.memfd(PAGES as u64 * P, FLAG_MMAP))?;
    let expected = if kvm::is_ravelin() { Errno::EFAULT } else { Errno::ESPIPE };
    fails("pread", pread(&file, &mut [0; 64], 0), expected)?;
    fails("pwrite", pwrite(&file, &[0; 64], 0), expected)
}

fn mapped(kind: Kind) -> Outcome {
    let (_vm, file) = vm_and_file(kind)?;
    let mapping = works("mmap", Mapping::shared(&file, PAGES * PAGE))?;
    mapping.check_words(0, PAGES * PAGE, 0)?;
    mapping.fill(0xaaaa_aaaa_aaaa_aaaa)?;
    mapping.check_words(0, PAGES * PAGE, 0xaaaa_aaaa_aaaa_aaaa)?;
    works("PUNCH_HOLE of the first page", punch(&file, 0, P))?;
    mapping.check_words(0, PAGE, 0)?;
    mapping.check_words(PAGE, (PAGES - 1) * PAGE, 0xaaaa_aaaa_aaaa_aaaa)?;
    mapping.fill(0xbbbb)?;
    mapping.check_words(0, PAGES * PAGE, 0xbbbb)?;
    // Another mapping of a part shows the same memory.
    let other = works("mmap of a part", Mapping::new(&file, PAGE, 2 * PAGE, MapFlags::MAP_SHARED))?;
    other.set(0, 0xcccc)?;
    check_eq!(mapping.get(PAGE)?, 0xcccc, "what the other mapping has stored");
    drop(mapping);
    check_eq!(other.get(0)?, 0xcccc, "what is left when one mapping is gone");
    drop(file);
    check_eq!(other.get(PAGE)?, 0xbbbb, "what is left when the file is closed");
    Ok(())
}

fn mapping_beyond_the_end(kind: Kind) -> Outcome {
    let (_vm, file) = vm_and_file(kind)?;
    let mapping = works("mmap", Mapping::shared(&file, (PAGES + 4) * PAGE))?;
    for page in PAGES..PAGES + 4 {
        mapping.check_bus_error(page * PAGE)?;
    }
    mapping.check_words(0, PAGES * PAGE, 0)
}

fn mapping_private_memory(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let file = works("KVM_CREATE_GUEST_MEMFD", vm.memfd(PAGES as u64 * P, FLAG_MMAP))?;
    let mapping = works("mmap", Mapping::shared(&file, PAGES * PAGE))?;
    for page in 0..PAGES {
        mapping.check_bus_error(page * PAGE)?;
    }
    works("fallocate", reserve(&file, 0, P))?;
    mapping.check_bus_error(0)
}

fn mapping_copies() -> Outcome {
    let (_vm, file) = vm_and_file(Kind::Ordinary)?;
    fails("MAP_PRIVATE", Mapping::new(&file, 0, PAGE, MapFlags::MAP_PRIVATE), Errno::EINVAL)
}

fn mapping_is_not_offered() -> Outcome {
    let vm = Vm::new(Kind::Ordinary)?;
    for flags in [0, FLAG_INIT_SHARED] {
        let file = works("KVM_CREATE_GUEST_MEMFD", vm.memfd(P, flags))?;
        fails("MAP_SHARED without the flag", Mapping::shared(&file, PAGE), Errno::ENODEV)?;
    }
    Ok(())
}

fn mapping_read_only() -> Outcome {
    let (_vm, file) = vm_and_file(Kind::Ordinary)?;
    let writer = works("mmap", Mapping::shared(&file, PAGE))?;
    let reader = works("mmap", Mapping::with(&file, 0, PAGE, ProtFlags::PROT_READ, MapFlags::MAP_SHARED))?;
    check_eq!(reader.get(0)?, 0, "a page that nobody has touched");
    writer.set(0, 5)?;
    check_eq!(reader.get(0)?, 5, "what the writer has stored");
    let stored = reader.store(0, 6);
    anyhow::ensure!(stored.is_err_and(|fault| fault.signal == nix::libc::SIGSEGV), "a store to it: {stored:?}");
    check_eq!(reader.get(0)?, 5, "after the store");
    Ok(())
}

fn collapse() -> Outcome {
    let (_vm, file) = vm_and_file(Kind::Ordinary)?;
    let mapping = works("mmap", Mapping::shared(&file, PAGES * PAGE))?;
    mapping.fill(0xaa)?;
    works("MADV_HUGEPAGE", mapping.advise(MmapAdvise::MADV_HUGEPAGE))?;
    // Not a constant of the crate: MADV_COLLAPSE.
    fails("MADV_COLLAPSE", advise(&mapping, 25), Errno::EINVAL)?;
    mapping.check_words(0, PAGES * PAGE, 0xaa)
}

/// madvise(2) with a number.
fn advise(mapping: &Mapping, advice: i32) -> Result<i32, Errno> {
    // SAFETY: No object of Rust's is there.
    Errno::result(unsafe { nix::libc::madvise(mapping.pointer(0), mapping.size(), advice) })
}

fn dont_need() -> Outcome {
    let (_vm, file) = vm_and_file(Kind::Ordinary)?;
    let mapping = works("mmap", Mapping::shared(&file, PAGES * PAGE))?;
    mapping.fill_pattern(0, PAGES, 0, 1)?;
    works("MADV_DONTNEED", mapping.advise(MmapAdvise::MADV_DONTNEED))?;
    mapping.check_pattern(0, PAGES, 0, 1)
}

fn size_and_block_size(kind: Kind) -> Outcome {
    let (_vm, file) = vm_and_file(kind)?;
    let status = works("fstat", fstat(&file))?;
    check_eq!(status.st_size, (PAGES * PAGE) as i64, "st_size");
    check_eq!(status.st_blksize as usize, PAGE, "st_blksize");
    Ok(())
}

fn truncate() -> Outcome {
    let (_vm, file) = vm_and_file(Kind::Ordinary)?;
    for size in [0, PAGE, 2 * PAGES * PAGE] {
        fails(format_args!("ftruncate to {size}"), ftruncate(&file, size as i64), Errno::EINVAL)?;
    }
    check_eq!(works("fstat", fstat(&file))?.st_size, (PAGES * PAGE) as i64, "st_size");
    Ok(())
}

fn allocate(kind: Kind) -> Outcome {
    let (_vm, file) = vm_and_file(kind)?;
    let all = PAGES as u64 * P;
    works("all of it", reserve(&file, 0, all))?;
    works("all of it again", reserve(&file, 0, all))?;
    works("PUNCH_HOLE in the middle", punch(&file, P, P))?;
    works("PUNCH_HOLE at the end", punch(&file, all, P))?;
    works("PUNCH_HOLE beyond the end", punch(&file, all + P, P))?;
    works("PUNCH_HOLE across the end", punch(&file, all - P, 2 * P))?;
    works("the middle again", reserve(&file, P, P))?;
    let mapping = works("mmap", Mapping::shared(&file, PAGES * PAGE))?;
    mapping.check_words(0, PAGES * PAGE, 0)
}

fn allocate_arguments() -> Outcome {
    let (_vm, file) = vm_and_file(Kind::Ordinary)?;
    let all = PAGES as u64 * P;
    fails("at the end", reserve(&file, all, P), Errno::EINVAL)?;
    fails("beyond the end", reserve(&file, all + P, P), Errno::EINVAL)?;
    for (offset, size) in [(0, P - 1), (1, P), (P - 1, P + 1), (P, 1)] {
        fails(format_args!("{size} bytes at {offset}"), reserve(&file, offset, size), Errno::EINVAL)?;
    }
    fails("no bytes", reserve(&file, 0, 0), Errno::EINVAL)?;
    fails("without KEEP_SIZE", fallocate(&file, FallocateFlags::empty(), 0, PAGE as i64), Errno::EOPNOTSUPP)?;
    for mode in [FallocateFlags::FALLOC_FL_ZERO_RANGE, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE] {
        let result = fallocate(&file, mode, 0, PAGE as i64);
        fails(format_args!("{mode:?}"), result, Errno::EOPNOTSUPP)?;
    }
    Ok(())
}

fn punch_unaligned() -> Outcome {
    let (_vm, file) = vm_and_file(Kind::Ordinary)?;
    let pairs =
        [(0, 1), (0, P - 1), (0, P + 1), (1, 1), (1, P - 1), (1, P), (1, P + 1), (P, 1), (P, P - 1), (P, P + 1)];
    for (offset, size) in pairs {
        fails(format_args!("{size} bytes at {offset}"), punch(&file, offset, size), Errno::EINVAL)?;
    }
    Ok(())
}

fn punch_gives_zeros(kind: Kind) -> Outcome {
    let (_vm, file) = vm_and_file(kind)?;
    let mapping = works("mmap", Mapping::shared(&file, PAGES * PAGE))?;
    for round in 0..20 {
        mapping.fill_pattern(0, PAGES, 0, round)?;
        works("PUNCH_HOLE", punch(&file, P, 2 * P))?;
        mapping.check_pattern(0, 1, 0, round)?;
        mapping.check_words(PAGE, 2 * PAGE, 0)?;
        mapping.check_pattern(3 * PAGE, 1, 3 * P, round)?;
    }
    Ok(())
}

fn splice_shared() -> Outcome {
    use nix::fcntl::{SpliceFFlags, splice};
    let (_vm, file) = vm_and_file(Kind::Ordinary)?;
    if !kvm::is_ravelin() {
        crate::check::skip!("guest_memfd of this KVM has neither read nor write");
    }
    let mapping = works("mmap", Mapping::shared(&file, PAGES * PAGE))?;
    mapping.fill_pattern(0, PAGES, 0, 3)?;
    let (output, input) = works("pipe", nix::unistd::pipe())?;
    let mut offset = PAGE as i64;
    let moved = splice(&file, Some(&mut offset), &input, None, PAGE, SpliceFFlags::empty());
    check_eq!(moved, Ok(PAGE), "splice from the file");
    let mut bytes = vec![0; PAGE];
    check_eq!(read(&output, &mut bytes), Ok(PAGE), "read from the pipe");
    check_eq!(u64::from_le_bytes(bytes[8..16].try_into()?), ravelin_guest::pattern(P, 1, 3), "what came out");
    // What is in the pipe is a copy, or memory that the file still knows of: the page can be had back.
    check_eq!(write(&input, &vec![0x5a; PAGE]), Ok(PAGE), "write to the pipe");
    let mut offset = 0;
    let moved = splice(&output, None, &file, Some(&mut offset), PAGE, SpliceFFlags::empty());
    check_eq!(moved, Ok(PAGE), "splice to the file");
    mapping.check_words(0, PAGE, 0x5a5a_5a5a_5a5a_5a5a)?;
    mapping.check_pattern(PAGE, PAGES - 1, P, 3)
}

fn not_executable() -> Outcome {
    let (_vm, file) = vm_and_file(Kind::Ordinary)?;
    // execveat(2) of it must not bring the kernel into trouble.
    let result = nix::unistd::fexecve(&file, &[c"guest_memfd"], &[] as &[&std::ffi::CStr]);
    anyhow::ensure!(result.is_err(), "it was executed");
    Ok(())
}

fn closed_vm() -> Outcome {
    let (vm, file) = vm_and_file(Kind::Ordinary)?;
    let mapping = works("mmap", Mapping::shared(&file, PAGES * PAGE))?;
    mapping.set(0, 0x77)?;
    drop(vm);
    check_eq!(mapping.get(0)?, 0x77, "contents");
    works("fallocate", reserve(&file, 0, 2 * P))?;
    works("PUNCH_HOLE", punch(&file, 0, P))?;
    check_eq!(mapping.get(0)?, 0, "contents after PUNCH_HOLE");
    drop(file);
    mapping.set(PAGE, 1)
}

/// Files that are made, filled and closed leave free memory as it was.
fn memory_comes_back() -> Outcome {
    const SIZE: usize = 16 << 20;
    let round = || -> Outcome {
        let vm = Vm::new(Kind::Ordinary)?;
        let file = vm.shared_memfd(SIZE)?;
        let mapping = works("mmap", Mapping::shared(&file, SIZE))?;
        (0..SIZE).step_by(PAGE).try_for_each(|offset| mapping.set(offset, 1))?;
        works("PUNCH_HOLE", punch(&file, 0, SIZE as u64 / 2))
    };
    round()?;
    let before = crate::host::meminfo("MemFree")?;
    for _ in 0..8 {
        round()?;
    }
    let after = crate::host::meminfo("MemFree")?;
    // Without PUNCH_HOLE's half it would be 64 MiB, with it twice as much.
    anyhow::ensure!(after + (16 << 10) > before, "MemFree was {before} KiB and is {after} KiB");
    Ok(())
}
