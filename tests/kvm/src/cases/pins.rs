//! Unshare while the host has references to a page: the guest is told that it cannot have it, and gets it when they are gone.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;
use nix::libc;
use nix::sys::uio::{RemoteIoVec, pread, process_vm_readv};
use nix::unistd::{Pid, getpid, pipe, read};

use super::cases;
use super::convert::guest_loses;
use super::memfd::punch;
use crate::check::{Outcome, check_eq, skip, works};
use crate::guest::{Conversion, Guest};
use crate::host::{sleep_ms, wait_until};
use crate::kvm::{Kind, PROTECTED};
use crate::machine::{MEMORY, Machine, Plan};
use crate::memory::{Mapping, PAGE};

cases! {
    io_uring_buffers[PROTECTED];
    pages_in_a_pipe[PROTECTED];
    direct_reads[PROTECTED];
    one_of_several[PROTECTED];
    pinned_before_boot[PROTECTED];
    pinned_by_another_process[PROTECTED];
    transient_references[PROTECTED].seconds(120);
    punch_while_pinned[PROTECTED];
    closed_while_pinned[PROTECTED];
    killed_while_pinned[PROTECTED];
}

const P: u64 = PAGE as u64;

/// A guest with so many pages that hold a pattern and are shared; the host has used them.
fn shared_pages(machine: &Machine, pages: u64) -> Outcome<Guest<'_>> {
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, pages, 0, 7)?;
    guest.share(MEMORY, pages)?;
    machine.memory.mapping.check_pattern(0, pages as usize, 0, 7)?;
    Ok(guest)
}

/// The guest cannot have the page back, and knows; both sides can use it.
fn refused(machine: &Machine, guest: &mut Guest<'_>) -> Outcome {
    for _ in 0..2 {
        check_eq!(guest.convert(MEMORY, 1, false)?, Conversion::Refused, "unshare of a pinned page");
    }
    guest.check(guest.kind.shared(MEMORY), 1, 0, 7)?;
    machine.memory.mapping.check_pattern(0, 1, 0, 7)?;
    let mut word = [0; 8];
    check_eq!(pread(machine.memory.file()?, &mut word, 8), Ok(8), "pread");
    check_eq!(u64::from_le_bytes(word), ravelin_guest::pattern(0, 1, 7), "what pread reads");
    Ok(())
}

/// The guest gets the page, with what is in it.
fn granted(machine: &Machine, guest: &mut Guest<'_>) -> Outcome {
    guest.unshare(MEMORY, 1)?;
    guest.check(MEMORY, 1, 0, 7)?;
    machine.memory.mapping.check_bus_error(0)
}

/// A ring with memory as its registered buffer, which is pinned as long as it is one.
fn register(mapping: &Mapping, offset: usize, size: usize) -> Outcome<IoUring> {
    let ring = match IoUring::new(4) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => skip!("this kernel has no io_uring"),
        ring => ring?,
    };
    let buffers = [libc::iovec { iov_base: mapping.pointer(offset), iov_len: size }];
    // SAFETY: The memory lives longer than the ring, and no object of Rust's is there.
    unsafe { ring.submitter().register_buffers(&buffers) }?;
    Ok(ring)
}

fn io_uring_buffers(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 2).build()?;
    let mut guest = shared_pages(&machine, 1)?;
    let mut ring = register(&machine.memory.mapping, 0, PAGE)?;
    refused(&machine, &mut guest)?;
    // The buffer works all the time.
    let zero = File::open("/dev/zero")?;
    let target = machine.memory.mapping.pointer(0).cast::<u8>();
    let request = opcode::ReadFixed::new(types::Fd(zero.as_raw_fd()), target, 8, 0).build();
    // SAFETY: The file and the memory live until the request is done.
    unsafe { ring.submission().push(&request) }?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().map(|entry| entry.result());
    check_eq!(result, Some(8), "a read into the registered buffer");
    check_eq!(guest.load(kind.shared(MEMORY))?, 0, "the word that was read");
    machine.memory.mapping.set(0, ravelin_guest::pattern(0, 0, 7))?;
    ring.submitter().unregister_buffers()?;
    granted(&machine, &mut guest)
}

/// vmsplice(2) puts the page itself into the pipe.
pub(super) fn splice_into_pipe(mapping: &Mapping, offset: usize, input: &OwnedFd) -> Outcome {
    let vector = [libc::iovec { iov_base: mapping.pointer(offset), iov_len: PAGE }];
    // SAFETY: The kernel reads the vector, and takes the page.
    let moved = Errno::result(unsafe { libc::vmsplice(input.as_raw_fd(), vector.as_ptr(), 1, 0) });
    check_eq!(moved, Ok(PAGE as isize), "vmsplice");
    Ok(())
}

fn pages_in_a_pipe(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 2).build()?;
    let mut guest = shared_pages(&machine, 1)?;
    let (output, input) = works("pipe", pipe())?;
    splice_into_pipe(&machine.memory.mapping, 0, &input)?;
    refused(&machine, &mut guest)?;
    let mut bytes = vec![0; PAGE];
    check_eq!(read(&output, &mut bytes), Ok(PAGE), "read from the pipe");
    check_eq!(u64::from_le_bytes(bytes[8..16].try_into()?), ravelin_guest::pattern(0, 1, 7), "what came out");
    granted(&machine, &mut guest)
}

/// A disk whose requests take seconds.
const SLOW_DISK: &str = "/dev/nullb0";

fn direct_reads(kind: Kind) -> Outcome {
    use std::os::unix::fs::OpenOptionsExt;
    if !Path::new(SLOW_DISK).exists() {
        skip!("no {SLOW_DISK}");
    }
    let machine = Plan::new(kind, 2).build()?;
    let mut guest = shared_pages(&machine, 1)?;
    let disk = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(SLOW_DISK)?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let writer = scope.spawn(|| {
            let written = super::convert::raw_write(&disk, machine.memory.mapping.address(), PAGE);
            done.store(true, Ordering::SeqCst);
            written
        });
        sleep_ms(200);
        let first = guest.convert(MEMORY, 1, false)?;
        anyhow::ensure!(!done.load(Ordering::SeqCst), "{SLOW_DISK} is not slow");
        check_eq!(first, Conversion::Refused, "unshare during a write with O_DIRECT");
        machine.memory.mapping.check_pattern(0, 1, 0, 7)?;
        let written = writer.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?;
        check_eq!(written, Ok(PAGE as isize), "write(2) with O_DIRECT");
        granted(&machine, &mut guest)
    })
}

/// None of a range is taken from the host if one page of it is pinned.
fn one_of_several(kind: Kind) -> Outcome {
    const PAGES: u64 = 8;
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = shared_pages(&machine, PAGES)?;
    let ring = register(mapping, 5 * PAGE + 100, 50)?;
    check_eq!(guest.convert(MEMORY, PAGES, false)?, Conversion::Refused, "unshare of all");
    mapping.check_pattern(0, PAGES as usize, 0, 7)?;
    guest.check(kind.shared(MEMORY), PAGES, 0, 7)?;
    // The others can go.
    guest.unshare(MEMORY, 5)?;
    guest.unshare(MEMORY + 6 * P, 2)?;
    mapping.check_bus_error(4 * PAGE)?;
    mapping.check_pattern(5 * PAGE, 1, 5 * P, 7)?;
    mapping.check_bus_error(6 * PAGE)?;
    ring.submitter().unregister_buffers()?;
    guest.unshare(MEMORY + 5 * P, 1)?;
    guest.check(MEMORY, PAGES, 0, 7)
}

/// What is pinned is not given to a guest that starts; when the pin is gone it starts.
fn pinned_before_boot(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 2).build()?;
    machine.memory.mapping.fill_pattern(0, 2, 0, 7)?;
    let ring = register(&machine.memory.mapping, 0, PAGE)?;
    let result = machine.vcpus[0].run_once();
    anyhow::ensure!(matches!(result, Err(Errno::EAGAIN | Errno::EBUSY)), "KVM_RUN with pinned payload: {result:?}");
    machine.memory.mapping.check_pattern(0, 2, 0, 7)?;
    ring.submitter().unregister_buffers()?;
    let mut guest = machine.boot()?;
    guest.check(MEMORY, 2, 0, 7)
}

fn pinned_by_another_process(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 2).build()?;
    let mut guest = shared_pages(&machine, 1)?;
    let (go, told) = (works("pipe", pipe())?, works("pipe", pipe())?);
    let child = crate::host::Child::new(|| {
        let _ring = register(&machine.memory.mapping, 0, PAGE)?;
        works("write", nix::unistd::write(&told.1, &[1]))?;
        works("read", read(&go.0, &mut [0])).map(drop)
    })?;
    works("read", read(&told.0, &mut [0]))?;
    refused(&machine, &mut guest)?;
    child.end()?;
    // The ring is taken down after the end of its process.
    wait_until("the page can be had", Duration::from_secs(20), || {
        Ok(guest.convert(MEMORY, 1, false)? == Conversion::Done(1))
    })?;
    guest.check(MEMORY, 1, 0, 7)
}

/// Another thread reads the page by process_vm_readv all the time: no unshare fails for good, and what is read is right.
fn transient_references(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 2).build()?;
    let mut guest = shared_pages(&machine, 1)?;
    let address = machine.memory.mapping.address();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let reader = scope.spawn(|| -> Outcome<u64> {
            let me: Pid = getpid();
            let mut good = 0;
            while !stop.load(Ordering::Relaxed) {
                let mut bytes = [0; 64];
                let mut local = [IoSliceMut::new(&mut bytes)];
                match process_vm_readv(me, &mut local, &[RemoteIoVec { base: address, len: 64 }]) {
                    Ok(_) => good += 1,
                    Err(Errno::EFAULT) => {}
                    Err(errno) => anyhow::bail!("process_vm_readv: {errno:?}"),
                }
            }
            Ok(good)
        });
        let mut result = Ok(());
        for _ in 0..100 {
            let mut tries = 0;
            while result.is_ok() && guest.convert(MEMORY, 1, false)? != Conversion::Done(1) {
                tries += 1;
                if tries == 20 {
                    result = Err(anyhow::anyhow!("unshare was refused 20 times"));
                }
            }
            if result.is_err() {
                break;
            }
            guest.share(MEMORY, 1)?;
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        result
    })?;
    granted(&machine, &mut guest)
}

/// The pipe keeps what it has; the guest loses the page.
fn punch_while_pinned(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 2).build()?;
    let mut guest = shared_pages(&machine, 1)?;
    let (output, input) = works("pipe", pipe())?;
    splice_into_pipe(&machine.memory.mapping, 0, &input)?;
    match punch(machine.memory.file()?, 0, P) {
        Ok(()) => guest_loses(&mut guest, kind.shared(MEMORY))?,
        Err(Errno::EBUSY | Errno::EAGAIN) => machine.memory.mapping.check_pattern(0, 1, 0, 7)?,
        Err(errno) => anyhow::bail!("PUNCH_HOLE of a pinned page: {errno:?}"),
    }
    let mut bytes = vec![0; PAGE];
    check_eq!(read(&output, &mut bytes), Ok(PAGE), "read from the pipe");
    check_eq!(u64::from_le_bytes(bytes[8..16].try_into()?), ravelin_guest::pattern(0, 1, 7), "what came out");
    Ok(())
}

/// All files are closed while a pipe holds a page of the guest: the page stays until the pipe is read.
fn closed_while_pinned(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 2).build()?;
    drop(shared_pages(&machine, 1)?);
    let (output, input) = works("pipe", pipe())?;
    splice_into_pipe(&machine.memory.mapping, 0, &input)?;
    drop(machine);
    let mut bytes = vec![0; PAGE];
    check_eq!(read(&output, &mut bytes), Ok(PAGE), "read from the pipe");
    check_eq!(u64::from_le_bytes(bytes[8..16].try_into()?), ravelin_guest::pattern(0, 1, 7), "what came out");
    Ok(())
}

fn killed_while_pinned(kind: Kind) -> Outcome {
    drop(crate::kvm::Vm::new(kind)?);
    let (output, input) = works("pipe", pipe())?;
    let (ready, told) = works("pipe", pipe())?;
    let child = crate::host::Child::new(|| {
        let machine = Plan::new(kind, 2).build()?;
        let mut guest = shared_pages(&machine, 1)?;
        let _ring = register(&machine.memory.mapping, 0, PAGE)?;
        splice_into_pipe(&machine.memory.mapping, 0, &input)?;
        works("write", nix::unistd::write(&told, &[1]))?;
        guest.run(crate::guest::spin(), &[]).map(drop)
    })?;
    works("read", read(&ready, &mut [0]))?;
    child.end()?;
    let mut bytes = vec![0; PAGE];
    check_eq!(read(&output, &mut bytes), Ok(PAGE), "read from the pipe");
    check_eq!(u64::from_le_bytes(bytes[8..16].try_into()?), ravelin_guest::pattern(0, 1, 7), "what came out");
    // The next VM runs.
    Plan::new(kind, 1).build()?.boot()?.store(MEMORY, 1)
}
