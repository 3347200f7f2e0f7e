//! A guest_memfd that nobody can pin: where the guest shares an aligned 2 MiB, the host maps them at once.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::uio::{RemoteIoVec, pread, process_vm_readv, pwrite};
use nix::unistd::{getpid, pipe, read, write};

use super::cases;
use super::convert::{guest_loses, raw_read, raw_write};
use super::memfd::punch;
use crate::check::{Outcome, check_eq, fails, works};
use crate::guest::Guest;
use crate::host::{self, Child};
use crate::kvm::{Kind, PROTECTED};
use crate::machine::{Backing, MEMORY, Machine, Plan};
use crate::memory::{self, Mapping, PAGE};

cases! {
    mapped_at_once[PROTECTED];
    one_page_of_a_block[PROTECTED];
    not_all_of_a_block[PROTECTED];
    claimed_before[PROTECTED];
    offsets_that_do_not_fit[PROTECTED];
    payload[PROTECTED];
    nobody_pins[PROTECTED];
    system_calls[PROTECTED];
    read_only[PROTECTED];
    several_processes[PROTECTED];
    dont_need[PROTECTED];
    punched[PROTECTED];
    relinquished;
    closed_and_ended[PROTECTED];
    killed[PROTECTED];
    secrets_are_never_seen[PROTECTED].seconds(120);
}

const P: u64 = PAGE as u64;

/// Of a block: pages and bytes.
const PAGES: u64 = 512;
const BLOCK: usize = PAGES as usize * PAGE;

/// A machine whose memory nobody can pin.
fn machine(kind: Kind, blocks: usize) -> Outcome<Machine> {
    Plan::new(kind, blocks * PAGES as usize).backing(Backing::NoPin).build()
}

/// Its guest, with a pattern in so many blocks, which it has shared.
fn shared_blocks(machine: &Machine, blocks: u64) -> Outcome<Guest<'_>> {
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, blocks * PAGES, 0, 7)?;
    for block in 0..blocks {
        guest.share(MEMORY + block * PAGES * P, PAGES)?;
    }
    Ok(guest)
}

/// How many faults of this process `action` takes.
fn faults(action: impl FnOnce() -> Outcome) -> Outcome<i64> {
    let count = || Ok::<_, Errno>(getrusage(UsageWho::RUSAGE_THREAD)?.minor_page_faults());
    let before = works("getrusage", count())?;
    action()?;
    Ok(works("getrusage", count())? - before)
}

/// A word of each page, so that a page that is not mapped takes a fault.
fn touch(mapping: &Mapping, first: usize, pages: usize) -> Outcome {
    (first..first + pages).try_for_each(|page| {
        let expected = ravelin_guest::pattern((page * PAGE) as u64, 0, 7);
        check_eq!(mapping.get(page * PAGE)?, expected, "page {page}");
        Ok(())
    })
}

fn mapped_at_once(kind: Kind) -> Outcome {
    let machine = machine(kind, 2)?;
    let mapping = &machine.memory.mapping;
    check_eq!(mapping.address() % BLOCK, 0, "address of the mapping modulo 2 MiB");
    let mut guest = shared_blocks(&machine, 2)?;
    for round in 0..3 {
        check_eq!(faults(|| touch(mapping, 0, 2 * PAGES as usize))?, 2, "faults of two blocks");
        mapping.check_pattern(0, 2 * PAGES as usize, 0, 7)?;
        let word = BLOCK - 8;
        mapping.set(word, round)?;
        check_eq!(guest.load(kind.shared(MEMORY + word as u64))?, round, "what the host has stored");
        mapping.set(word, ravelin_guest::pattern(word as u64 / P * P, P / 8 - 1, 7))?;
        // One and both of them.
        guest.unshare(MEMORY, PAGES)?;
        mapping.check_bus_error(0)?;
        mapping.check_bus_error(word)?;
        check_eq!(faults(|| touch(mapping, PAGES as usize, PAGES as usize))?, 0, "faults of the other block");
        guest.unshare(MEMORY + BLOCK as u64, PAGES)?;
        mapping.check_bus_error(2 * BLOCK - PAGE)?;
        guest.check(MEMORY, 2 * PAGES, 0, 7)?;
        guest.share(MEMORY, PAGES)?;
        guest.share(MEMORY + BLOCK as u64, PAGES)?;
    }
    // A store is as good as a load.
    check_eq!(faults(|| mapping.set(0, 5).and_then(|()| mapping.set(BLOCK - 8, 6)))?, 1, "faults of stores");
    check_eq!(guest.load(kind.shared(MEMORY))?, 5, "the first word");
    check_eq!(guest.load(kind.shared(MEMORY + BLOCK as u64 - 8))?, 6, "the last word");
    Ok(())
}

fn one_page_of_a_block(kind: Kind) -> Outcome {
    const PAGE_OF_IT: usize = 300;
    let machine = machine(kind, 2)?;
    let mapping = &machine.memory.mapping;
    let mut guest = shared_blocks(&machine, 2)?;
    touch(mapping, 0, 2 * PAGES as usize)?;
    let at = MEMORY + (PAGE_OF_IT * PAGE) as u64;
    guest.unshare(at, 1)?;
    mapping.check_bus_error(PAGE_OF_IT * PAGE)?;
    // What nobody else may see.
    guest.store(at, 5)?;
    touch(mapping, 0, PAGE_OF_IT)?;
    touch(mapping, PAGE_OF_IT + 1, PAGES as usize - PAGE_OF_IT - 1)?;
    mapping.check_bus_error(PAGE_OF_IT * PAGE)?;
    check_eq!(faults(|| touch(mapping, PAGES as usize, PAGES as usize))?, 0, "faults of the other block");
    guest.store(at, ravelin_guest::pattern((PAGE_OF_IT * PAGE) as u64, 0, 7))?;
    // All of it again: the mapping has single pages there, a new one has not.
    guest.share(at, 1)?;
    mapping.check_pattern(0, PAGES as usize, 0, 7)?;
    let new = works("mmap", Mapping::shared(machine.memory.file()?, BLOCK))?;
    check_eq!(faults(|| touch(&new, 0, PAGES as usize))?, 1, "faults of a new mapping");
    guest.unshare(MEMORY, PAGES)?;
    for mapping in [mapping, &new] {
        mapping.check_bus_error(0)?;
        mapping.check_bus_error(BLOCK - PAGE)?;
    }
    guest.unshare(MEMORY + BLOCK as u64, PAGES)?;
    guest.check(MEMORY, 2 * PAGES, 0, 7)
}

fn not_all_of_a_block(kind: Kind) -> Outcome {
    let machine = machine(kind, 1)?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, PAGES, 0, 7)?;
    guest.share(MEMORY, PAGES - 1)?;
    touch(mapping, 0, PAGES as usize - 1)?;
    mapping.check_bus_error(BLOCK - PAGE)?;
    guest.share(MEMORY + BLOCK as u64 - P, 1)?;
    touch(mapping, 0, PAGES as usize)?;
    guest.unshare(MEMORY, PAGES)?;
    guest.check(MEMORY, PAGES, 0, 7)
}

/// Single pages were claimed by pread.
fn claimed_before(kind: Kind) -> Outcome {
    let machine = machine(kind, 1)?;
    let mut guest = shared_blocks(&machine, 1)?;
    for page in [3, 4, 100, 511] {
        check_eq!(pread(machine.memory.file()?, &mut [0; 8], page * PAGE as i64), Ok(8), "pread");
    }
    check_eq!(faults(|| touch(&machine.memory.mapping, 0, PAGES as usize))?, 1, "faults");
    guest.unshare(MEMORY, PAGES)?;
    machine.memory.mapping.check_bus_error(100 * PAGE)?;
    guest.check(MEMORY, PAGES, 0, 7)
}

/// Offset and address, or the ends of the mapping, are such that no block fits.
fn offsets_that_do_not_fit(kind: Kind) -> Outcome {
    let machine = machine(kind, 2)?;
    let mut guest = shared_blocks(&machine, 2)?;
    let file = machine.memory.file()?;
    let place = works("mmap", Mapping::anonymous(4 * BLOCK))?;
    let aligned = place.address().next_multiple_of(BLOCK) - place.address();
    for (from, offset, size) in [(0, PAGE, BLOCK), (PAGE, PAGE, BLOCK), (0, 0, BLOCK - PAGE)] {
        let mapping = works("mmap", place.replace(aligned + from, file, offset, size))?;
        mapping.check_pattern(0, size / PAGE, offset as u64, 7)?;
    }
    guest.unshare(MEMORY, PAGES)?;
    guest.unshare(MEMORY + BLOCK as u64, PAGES)?;
    guest.check(MEMORY, 2 * PAGES, 0, 7)
}

/// What the host puts there before boot is page by page, and the guest's then.
fn payload(kind: Kind) -> Outcome {
    let machine = machine(kind, 2)?;
    let mapping = &machine.memory.mapping;
    mapping.fill_pattern(0, PAGES as usize + 3, 0, 7)?;
    let mut guest = machine.boot()?;
    guest.check(MEMORY, PAGES + 3, 0, 7)?;
    guest.check_zero(MEMORY + (PAGES + 3) * P, 5)?;
    mapping.check_bus_error(0)?;
    mapping.check_bus_error(BLOCK + 2 * PAGE)
}

/// What would take a reference fails, and conversions do not.
fn nobody_pins(kind: Kind) -> Outcome {
    let machine = machine(kind, 1)?;
    let mapping = &machine.memory.mapping;
    let mut guest = shared_blocks(&machine, 1)?;
    touch(mapping, 0, PAGES as usize)?;
    let mut bytes = [0; 64];
    let local = &mut [std::io::IoSliceMut::new(&mut bytes)];
    let remote = [RemoteIoVec { base: mapping.address() + PAGE, len: 64 }];
    fails("process_vm_readv", process_vm_readv(getpid(), local, &remote), Errno::EFAULT)?;
    let (_output, input) = works("pipe", pipe())?;
    let vector = [libc::iovec { iov_base: mapping.pointer(PAGE), iov_len: PAGE }];
    // SAFETY: The kernel reads the vector.
    let moved = Errno::result(unsafe { libc::vmsplice(input.as_raw_fd(), vector.as_ptr(), 1, 0) });
    fails("vmsplice", moved, Errno::EFAULT)?;
    if let Ok(ring) = io_uring::IoUring::new(4) {
        // SAFETY: The memory lives longer than the ring, and no object of Rust's is there.
        let registered = unsafe { ring.submitter().register_buffers(&vector) };
        let errno = registered.err().and_then(|error| error.raw_os_error());
        check_eq!(errno, Some(libc::EFAULT), "registering a buffer of io_uring");
    }
    let memory = std::fs::File::open("/proc/self/mem")?;
    fails("/proc/self/mem", pread(&memory, &mut [0; 8], mapping.address() as i64), Errno::EIO)?;
    guest.unshare(MEMORY, PAGES)?;
    guest.check(MEMORY, PAGES, 0, 7)
}

/// System calls that copy work with the mapping, in both directions, and with the file while it is mapped.
fn system_calls(kind: Kind) -> Outcome {
    let machine = machine(kind, 1)?;
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    let mut guest = shared_blocks(&machine, 1)?;
    touch(mapping, 0, 1)?;
    let (output, input) = works("pipe", pipe())?;
    check_eq!(raw_write(&input, mapping.address() + 5 * PAGE, PAGE), Ok(PAGE as isize), "write from the mapping");
    check_eq!(raw_read(&output, mapping.address() + 9 * PAGE, PAGE), Ok(PAGE as isize), "read to the mapping");
    mapping.check_pattern(9 * PAGE, 1, 5 * P, 7)?;
    check_eq!(pwrite(file, &[0x5a; 8], 10 * PAGE as i64), Ok(8), "pwrite");
    check_eq!(mapping.get(10 * PAGE)?, 0x5a5a_5a5a_5a5a_5a5a, "what pwrite has written");
    guest.unshare(MEMORY + 10 * P, 1)?;
    fails("write from a private page", raw_write(&input, mapping.address() + 10 * PAGE, 8), Errno::EFAULT)?;
    fails("pread of a private page", pread(file, &mut [0; 8], 10 * PAGE as i64), Errno::EFAULT)?;
    guest.check(kind.shared(MEMORY + 9 * P), 1, 5 * P, 7)
}

fn read_only(kind: Kind) -> Outcome {
    let machine = machine(kind, 1)?;
    let mut guest = shared_blocks(&machine, 1)?;
    let reader =
        works("mmap", Mapping::with(machine.memory.file()?, 0, BLOCK, ProtFlags::PROT_READ, MapFlags::MAP_SHARED))?;
    check_eq!(faults(|| touch(&reader, 0, PAGES as usize))?, 1, "faults");
    let stored = reader.store(0, 6);
    anyhow::ensure!(stored.is_err_and(|fault| fault.signal == libc::SIGSEGV), "a store to it: {stored:?}");
    // It becomes writable, and a part of it read-only again.
    let protect = |offset: usize, size: usize, permissions: i32| {
        // SAFETY: No object of Rust's is there.
        Errno::result(unsafe { libc::mprotect(reader.pointer(offset), size, permissions) })
    };
    works("mprotect", protect(0, BLOCK, libc::PROT_READ | libc::PROT_WRITE))?;
    reader.set(BLOCK - 8, 6)?;
    works("mprotect of a page", protect(0, PAGE, libc::PROT_READ))?;
    let stored = reader.store(0, 6);
    anyhow::ensure!(stored.is_err_and(|fault| fault.signal == libc::SIGSEGV), "a store to it: {stored:?}");
    reader.set(BLOCK - 8, 7)?;
    check_eq!(guest.load(kind.shared(MEMORY + BLOCK as u64 - 8))?, 7, "the last word");
    guest.unshare(MEMORY, PAGES)?;
    anyhow::ensure!(reader.load(0).is_err() && reader.load(BLOCK - 8).is_err(), "what is private can be read");
    guest.check(MEMORY, 1, 0, 7)
}

fn several_processes(kind: Kind) -> Outcome {
    let machine = machine(kind, 1)?;
    let mapping = &machine.memory.mapping;
    let mut guest = shared_blocks(&machine, 1)?;
    touch(mapping, 0, PAGES as usize)?;
    let other = works("mmap", Mapping::shared(machine.memory.file()?, BLOCK))?;
    touch(&other, 0, PAGES as usize)?;
    let (go, done) = (works("pipe", pipe())?, works("pipe", pipe())?);
    let child = Child::new(|| {
        check_eq!(faults(|| touch(mapping, 0, PAGES as usize))?, 1, "faults after fork, which copies nothing");
        works("write", write(&done.1, &[1]))?;
        works("read", read(&go.0, &mut [0]))?;
        for mapping in [mapping, &other] {
            mapping.check_bus_error(PAGE)?;
            touch(mapping, 0, 1)?;
            touch(mapping, 2, PAGES as usize - 2)?;
        }
        works("write", write(&done.1, &[1]))?;
        works("read", read(&go.0, &mut [0]))?;
        mapping.check_bus_error(0)?;
        other.check_bus_error(BLOCK - PAGE)
    })?;
    works("read", read(&done.0, &mut [0]))?;
    guest.unshare(MEMORY + P, 1)?;
    works("write", write(&go.1, &[1]))?;
    works("read", read(&done.0, &mut [0]))?;
    guest.unshare(MEMORY, 1)?;
    guest.unshare(MEMORY + 2 * P, PAGES - 2)?;
    works("write", write(&go.1, &[1]))?;
    child.succeed()?;
    guest.check(MEMORY, PAGES, 0, 7)
}

/// Memory that is mapped without references is nothing for madvise.
fn dont_need(kind: Kind) -> Outcome {
    let machine = machine(kind, 1)?;
    let mapping = &machine.memory.mapping;
    let mut guest = shared_blocks(&machine, 1)?;
    touch(mapping, 0, PAGES as usize)?;
    fails("MADV_DONTNEED", mapping.advise(MmapAdvise::MADV_DONTNEED), Errno::EINVAL)?;
    works("MADV_HUGEPAGE", mapping.advise(MmapAdvise::MADV_HUGEPAGE))?;
    touch(mapping, 0, PAGES as usize)?;
    guest.unshare(MEMORY, PAGES)
}

/// A page of a block that is mapped, and then what is left of it: nobody sees the memory afterwards.
fn punched(kind: Kind) -> Outcome {
    let machine = machine(kind, 1)?;
    let (mapping, file) = (&machine.memory.mapping, machine.memory.file()?);
    let mut guest = shared_blocks(&machine, 1)?;
    touch(mapping, 0, PAGES as usize)?;
    works("PUNCH_HOLE of a page", punch(file, 7 * P, P))?;
    check_eq!(mapping.load(7 * PAGE + 8).unwrap_or(0), 0, "what is in its place");
    guest_loses(&mut guest, kind.shared(MEMORY + 7 * P))?;
    touch(mapping, 0, 7)?;
    touch(mapping, 8, PAGES as usize - 8)?;
    works("PUNCH_HOLE of all", punch(file, 0, BLOCK as u64))?;
    check_eq!(mapping.load(8).unwrap_or(0), 0, "what is in its place");
    guest_loses(&mut guest, kind.shared(MEMORY))
}

/// A guest gives back what it had shared and the host has mapped: the host finds new pages.
fn relinquished() -> Outcome {
    const MEM_RELINQUISH: u64 = 0xc600_0009;
    let machine = machine(Kind::Pkvm, 1)?;
    let mapping = &machine.memory.mapping;
    let mut guest = shared_blocks(&machine, 1)?;
    touch(mapping, 0, PAGES as usize)?;
    guest.unshare(MEMORY + 4 * P, 4)?;
    let [status, done, ..] = guest.call(&[MEM_RELINQUISH, MEMORY + 4 * P, 4, 0, 0])?;
    check_eq!([status, done], [0, 4], "MEM_RELINQUISH");
    mapping.check_words(4 * PAGE, 4 * PAGE, 0)?;
    touch(mapping, 0, 4)?;
    touch(mapping, 8, PAGES as usize - 8)?;
    guest.check_zero(MEMORY + 4 * P, 4)?;
    mapping.check_bus_error(4 * PAGE)?;
    // Without taking it back first.
    let [status, ..] = guest.call(&[MEM_RELINQUISH, MEMORY + 100 * P, 1, 0, 0])?;
    let seen = mapping.load(100 * PAGE + 8);
    let kept = ravelin_guest::pattern(100 * P, 1, 7);
    anyhow::ensure!(seen == Ok(if status == 0 { 0 } else { kept }), "status {status:#x}, then {seen:x?}");
    Ok(())
}

/// The mapping outlives the file's descriptor and the VM.
fn closed_and_ended(kind: Kind) -> Outcome {
    let machine = machine(kind, 1)?;
    let mut guest = shared_blocks(&machine, 1)?;
    let mapping = works("mmap", Mapping::shared(machine.memory.file()?, BLOCK))?;
    touch(&mapping, 0, PAGES as usize)?;
    guest.unshare(MEMORY + P, 1)?;
    touch(&mapping, 2, 1)?;
    drop(machine);
    touch(&mapping, 0, 1)?;
    mapping.check_bus_error(PAGE)?;
    mapping.check_pattern(2 * PAGE, PAGES as usize - 2, 2 * P, 7)
}

/// A process is killed while it has blocks mapped and its guest runs: nothing is lost.
fn killed(kind: Kind) -> Outcome {
    let round = || -> Outcome {
        let (ready, told) = works("pipe", pipe())?;
        let child = Child::new(|| {
            let machine = machine(kind, 16)?;
            let mut guest = shared_blocks(&machine, 16)?;
            touch(&machine.memory.mapping, 0, 16 * PAGES as usize)?;
            works("write", write(&told, &[1]))?;
            guest.run(crate::guest::spin(), &[]).map(drop)
        })?;
        works("read", read(&ready, &mut [0]))?;
        child.end().map(drop)
    };
    round()?;
    let before = host::meminfo("MemFree")?;
    for _ in 0..3 {
        round()?;
    }
    host::wait_until("memory comes back", std::time::Duration::from_secs(20), || {
        Ok(host::meminfo("MemFree")? + (24 << 10) > before)
    })
}

/// The same as for single pages, by a block that is mapped as one.
fn secrets_are_never_seen(kind: Kind) -> Outcome {
    const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec2;
    let machine = machine(kind, 1)?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, PAGES, 0, 7)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let file = machine.memory.file()?;
        let reader = scope.spawn(|| -> Outcome<u64> {
            let mut seen = 0;
            while !stop.load(Ordering::Relaxed) {
                // Maps the block as one, if it can.
                let new = works("mmap", Mapping::shared(file.as_fd(), BLOCK))?;
                for page in [0, 9, 511] {
                    match memory::load(new.address() + page * PAGE) {
                        Ok(SECRET) => anyhow::bail!("a load has seen the secret"),
                        Ok(_) => seen += 1,
                        Err(fault) => anyhow::ensure!(fault.signal == libc::SIGBUS, "{fault:x?}"),
                    }
                }
            }
            Ok(seen)
        });
        let secret = |guest: &mut Guest<'_>, page: u64| -> Outcome {
            let at = MEMORY + page * P;
            guest.store(at, SECRET)?;
            host::sleep_ms(1);
            guest.store(at, ravelin_guest::pattern(page * P, 0, 7))
        };
        let result = (0..40).try_for_each(|_| -> Outcome {
            guest.share(MEMORY, PAGES)?;
            host::sleep_ms(1);
            // Nobody can have a reference that is in the way.
            guest.unshare(MEMORY + 9 * P, 1)?;
            secret(&mut guest, 9)?;
            guest.share(MEMORY + 9 * P, 1)?;
            guest.unshare(MEMORY, PAGES)?;
            [0, 511].iter().try_for_each(|&page| secret(&mut guest, page))
        });
        stop.store(true, Ordering::Relaxed);
        let seen = reader.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        anyhow::ensure!(seen > 0, "the thread has never seen a page shared");
        result
    })?;
    mapping.check_bus_error(0)?;
    guest.check(MEMORY, PAGES, 0, 7)
}
