//! What userspace of the host may try to get at a guest's private memory. Nothing gets it, and the kernel lives on.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{getpid, pipe, read, write};

use super::cases;
use crate::check::{Outcome, check_eq, fails, skip, works};
use crate::guest::Guest;
use crate::host::{Child, kernel_log};
use crate::kvm::{Kind, PROTECTED};
use crate::machine::{MEMORY, Machine, Plan};
use crate::memory::{Mapping, PAGE};

cases! {
    proc_self_mem[PROTECTED];
    process_vm[PROTECTED];
    ptrace_peek_and_poke[PROTECTED];
    dev_mem[PROTECTED];
    kcore[PROTECTED];
    io_uring_into_private_memory[PROTECTED];
    io_uring_of_the_file[PROTECTED];
    userfaultfd[PROTECTED];
    futex_and_other_calls[PROTECTED];
    core_dump[PROTECTED];
    hibernation[PROTECTED];
    page_migration[PROTECTED].seconds(120);
}

const P: u64 = PAGE as u64;

/// What the guest keeps to itself.
const SEED: u64 = 0x5ec2;

/// Pages of a guest's memory; the host has seen the first two of them while they were shared.
const PAGES: u64 = 4;

/// A guest whose memory is private, and holds a secret.
fn with_secret(machine: &Machine) -> Outcome<Guest<'_>> {
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, PAGES, 0, 1)?;
    guest.share(MEMORY, 2)?;
    machine.memory.mapping.check_pattern(0, 2, 0, 1)?;
    guest.unshare(MEMORY, 2)?;
    guest.fill(MEMORY, PAGES, 0, SEED)?;
    Ok(guest)
}

/// Runs `attack`, and checks that the guest has lost nothing and the kernel has not complained.
fn survives(machine: &Machine, guest: &mut Guest<'_>, attack: impl FnOnce(&Mapping) -> Outcome) -> Outcome {
    let before = complaints()?;
    let result = attack(&machine.memory.mapping);
    check_eq!(complaints()?, before, "complaints of the kernel");
    result?;
    guest.check(MEMORY, PAGES, 0, SEED)
}

/// How many of its lines are about a kernel in trouble.
fn complaints() -> Outcome<usize> {
    let words = ["Internal error", "Unable to handle", "BUG:", "WARNING:", "Oops", "bad page", "Bad page"];
    Ok(kernel_log()?.lines().filter(|line| words.iter().any(|word| line.contains(word))).count())
}

/// Checks that bytes, which start at the border of a word, do not contain a word of the secret.
fn is_not_secret(what: &str, bytes: &[u8]) -> Outcome {
    let words = (0..PAGES).flat_map(|page| (0..P / 8).map(move |index| ravelin_guest::pattern(page * P, index, SEED)));
    let secret: HashSet<_> = words.collect();
    let shown = bytes.as_chunks::<8>().0.iter().any(|word| secret.contains(&u64::from_le_bytes(*word)));
    anyhow::ensure!(!shown, "{what} shows the secret");
    Ok(())
}

fn proc_self_mem(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mut guest = with_secret(&machine)?;
    survives(&machine, &mut guest, |mapping| {
        let memory = File::options().read(true).write(true).open("/proc/self/mem")?;
        for page in 0..PAGES as usize {
            let at = (mapping.address() + page * PAGE) as u64;
            let mut bytes = [0; 512];
            let got = memory.read_at(&mut bytes, at);
            anyhow::ensure!(got.is_err(), "a read of /proc/self/mem: {got:?}");
            is_not_secret("/proc/self/mem", &bytes)?;
            let put = memory.write_at(&[0xee; 512], at);
            anyhow::ensure!(put.is_err(), "a write to /proc/self/mem: {put:?}");
        }
        Ok(())
    })
}

/// process_vm_readv(2) and process_vm_writev(2) of a process at an address.
fn by_process_vm(process: nix::unistd::Pid, address: usize) -> Outcome {
    let mut bytes = [0; 512];
    let remote = [RemoteIoVec { base: address, len: 512 }];
    let got = process_vm_readv(process, &mut [IoSliceMut::new(&mut bytes)], &remote);
    fails("process_vm_readv", got, Errno::EFAULT)?;
    is_not_secret("process_vm_readv", &bytes)?;
    let put = process_vm_writev(process, &[IoSlice::new(&[0xee; 512])], &remote);
    fails("process_vm_writev", put, Errno::EFAULT)
}

fn process_vm(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mut guest = with_secret(&machine)?;
    survives(&machine, &mut guest, |mapping| {
        let (victim, address) = (getpid(), mapping.address());
        by_process_vm(victim, address)?;
        Child::new(move || (0..PAGES as usize).try_for_each(|page| by_process_vm(victim, address + page * PAGE)))?
            .succeed()
    })
}

fn ptrace_peek_and_poke(kind: Kind) -> Outcome {
    drop(crate::kvm::Vm::new(kind)?);
    let (addresses, sender) = works("pipe", pipe())?;
    let (ready, go) = works("pipe", pipe())?;
    let before = complaints()?;
    let victim = Child::new(|| {
        let machine = Plan::new(kind, PAGES as usize).build()?;
        let mut guest = with_secret(&machine)?;
        works("write", write(&sender, &machine.memory.mapping.address().to_le_bytes()))?;
        works("read", read(&ready, &mut [0]))?;
        guest.check(MEMORY, PAGES, 0, SEED)
    })?;
    let mut bytes = [0; 8];
    check_eq!(read(&addresses, &mut bytes), Ok(8), "the address of the memory");
    let address = usize::from_le_bytes(bytes);
    works("PTRACE_ATTACH", ptrace::attach(victim.0))?;
    works("waitpid", waitpid(victim.0, None))?;
    for page in 0..PAGES as usize {
        let pointer = std::ptr::without_provenance_mut(address + page * PAGE);
        let peeked = ptrace::read(victim.0, pointer);
        anyhow::ensure!(peeked.is_err(), "PTRACE_PEEKDATA: {peeked:x?}");
        let poked = ptrace::write(victim.0, pointer, 0xee);
        anyhow::ensure!(poked.is_err(), "PTRACE_POKEDATA: {poked:?}");
    }
    works("PTRACE_DETACH", ptrace::detach(victim.0, None))?;
    works("write", write(&go, &[1]))?;
    victim.succeed()?;
    check_eq!(complaints()?, before, "complaints of the kernel");
    Ok(())
}

/// Physical address of a mapped page.
fn physical(mapping: &Mapping, offset: usize) -> Outcome<u64> {
    const PRESENT: u64 = 1 << 63;
    let mut entry = [0; 8];
    let at = (mapping.address() + offset) / PAGE * 8;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at as u64)?;
    let entry = u64::from_le_bytes(entry);
    let frame = entry & ((1 << 55) - 1);
    anyhow::ensure!(entry & PRESENT != 0 && frame != 0, "pagemap says {entry:#x}");
    Ok(frame * P)
}

/// A guest with a secret, and the physical address of its first page.
fn with_known_address(machine: &Machine) -> Outcome<(Guest<'_>, u64)> {
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, PAGES, 0, 1)?;
    guest.share(MEMORY, 1)?;
    machine.memory.mapping.check_pattern(0, 1, 0, 1)?;
    let address = physical(&machine.memory.mapping, 0)?;
    guest.unshare(MEMORY, 1)?;
    guest.fill(MEMORY, PAGES, 0, SEED)?;
    Ok((guest, address))
}

fn dev_mem(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let (mut guest, address) = with_known_address(&machine)?;
    survives(&machine, &mut guest, |_| {
        let memory = File::options().read(true).write(true).open("/dev/mem")?;
        let mut bytes = [0; 512];
        if memory.read_at(&mut bytes, address).is_ok() {
            is_not_secret("/dev/mem", &bytes)?;
        }
        // Linux may refuse it before the hypervisor has to.
        let _ = memory.write_at(&[0xee; 512], address);
        let flags = nix::sys::mman::MapFlags::MAP_SHARED;
        if let Ok(mapping) = Mapping::new(&memory, usize::try_from(address)?, PAGE, flags) {
            mapping.check_bus_error(8)?;
        }
        Ok(())
    })
}

/// The kernel's own view of all memory. Finds the segment by the program headers of the ELF file that it pretends to be.
fn kcore(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let (mut guest, address) = with_known_address(&machine)?;
    survives(&machine, &mut guest, |_| {
        let core = File::open("/proc/kcore")?;
        let mut header = [0; 64];
        core.read_exact_at(&mut header, 0)?;
        let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        let count = usize::from(u16::from_le_bytes([header[56], header[57]]));
        let table = word(&header, 32);
        let mut found = false;
        for index in 0..count {
            const LOAD: u32 = 1;
            let mut entry = [0; 56];
            core.read_exact_at(&mut entry, table + index as u64 * 56)?;
            let (offset, start, size) = (word(&entry, 8), word(&entry, 24), word(&entry, 40));
            let kind = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            if kind == LOAD && start != u64::MAX && (start..start.saturating_add(size)).contains(&address) {
                found = true;
                let mut bytes = [0; PAGE];
                if core.read_at(&mut bytes, offset + (address - start)).is_ok() {
                    is_not_secret("/proc/kcore", &bytes)?;
                }
            }
        }
        anyhow::ensure!(found, "/proc/kcore has no segment with {address:#x}");
        Ok(())
    })
}

/// Submits a request and returns its result.
fn perform(ring: &mut IoUring, request: &io_uring::squeue::Entry) -> Outcome<i32> {
    // SAFETY: What the request refers to lives until it is done.
    unsafe { ring.submission().push(request) }?;
    ring.submit_and_wait(1)?;
    ring.completion().next().map(|entry| entry.result()).ok_or_else(|| anyhow::anyhow!("no completion"))
}

fn io_uring_into_private_memory(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mut guest = with_secret(&machine)?;
    survives(&machine, &mut guest, |mapping| {
        let mut ring = IoUring::new(4)?;
        let (zero, null) = (File::open("/dev/zero")?, File::options().write(true).open("/dev/null")?);
        let target = mapping.pointer(0).cast::<u8>();
        let request = opcode::Read::new(types::Fd(zero.as_raw_fd()), target, 64).build();
        check_eq!(perform(&mut ring, &request)?, -libc::EFAULT, "a read into private memory");
        // /dev/null does not look at what it is given; a pipe does.
        let (_output, input) = works("pipe", pipe())?;
        let request = opcode::Write::new(types::Fd(input.as_raw_fd()), target.cast_const(), 64).build();
        check_eq!(perform(&mut ring, &request)?, -libc::EFAULT, "a write from private memory");
        drop(null);
        let buffers = [libc::iovec { iov_base: mapping.pointer(0), iov_len: PAGE }];
        // SAFETY: The memory lives longer than the ring.
        let registered = unsafe { ring.submitter().register_buffers(&buffers) };
        anyhow::ensure!(registered.is_err(), "private memory became a registered buffer");
        Ok(())
    })
}

fn io_uring_of_the_file(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mut guest = with_secret(&machine)?;
    let file = machine.memory.file()?.as_raw_fd();
    survives(&machine, &mut guest, |_| {
        let mut ring = IoUring::new(4)?;
        let mut bytes = [0_u8; 512];
        let request = opcode::Read::new(types::Fd(file), bytes.as_mut_ptr(), 512).offset(0).build();
        check_eq!(perform(&mut ring, &request)?, -libc::EFAULT, "a read of the file");
        is_not_secret("io_uring", &bytes)?;
        let request = opcode::Write::new(types::Fd(file), bytes.as_ptr(), 512).offset(0).build();
        check_eq!(perform(&mut ring, &request)?, -libc::EFAULT, "a write to the file");
        Ok(())
    })
}

/// It cannot be registered, so that no page of another process's choice can be put there.
fn userfaultfd(kind: Kind) -> Outcome {
    const API: u32 = 0xc018_aa3f;
    const REGISTER: u32 = 0xc020_aa00;
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mut guest = with_secret(&machine)?;
    survives(&machine, &mut guest, |mapping| {
        // SAFETY: It has no pointers as arguments.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) });
        let fd = match fd {
            Err(Errno::ENOSYS | Errno::EPERM) => skip!("this kernel has no userfaultfd for this process"),
            fd => i32::try_from(works("userfaultfd", fd)?)?,
        };
        // SAFETY: It is new, and nobody else knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = [0xaa_u64, 0, 0];
        works("UFFDIO_API", crate::kvm::ioctl_with(&fd, API, &mut api))?;
        for mode in [1, 2, 4] {
            let mut range = [mapping.address() as u64, PAGES * P, mode, 0];
            fails(
                format_args!("UFFDIO_REGISTER, mode {mode}"),
                crate::kvm::ioctl_with(&fd, REGISTER, &mut range),
                Errno::EINVAL,
            )?;
        }
        Ok(())
    })
}

/// System calls that reach for user memory in other ways than read(2) does.
fn futex_and_other_calls(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mut guest = with_secret(&machine)?;
    survives(&machine, &mut guest, |mapping| {
        let address = mapping.address();
        let file = File::open("/proc/self/exe")?;
        let calls: [(&str, i64, [usize; 6]); 7] = [
            ("futex", libc::SYS_futex, [address, 0, 0, 0, 0, 0]),
            ("private futex", libc::SYS_futex, [address, 128, 0, 0, 0, 0]),
            ("pread of a file", libc::SYS_pread64, [file.as_raw_fd() as usize, address, 64, 0, 0, 0]),
            ("openat", libc::SYS_openat, [0, address, 0, 0, 0, 0]),
            ("getrandom", libc::SYS_getrandom, [address, 64, 0, 0, 0, 0]),
            ("clock_gettime", libc::SYS_clock_gettime, [0, address, 0, 0, 0, 0]),
            ("execve", libc::SYS_execve, [address, 0, 0, 0, 0, 0]),
        ];
        for (what, number, [x0, x1, x2, x3, x4, x5]) in calls {
            // SAFETY: Of this program's memory only what is mapped there may be written.
            let result = Errno::result(unsafe { libc::syscall(number, x0, x1, x2, x3, x4, x5) });
            fails(what, result, Errno::EFAULT)?;
        }
        Ok(())
    })
}

/// A VMM that crashes leaves a core file without what is private.
fn core_dump(kind: Kind) -> Outcome {
    const PATTERN: &str = "/proc/sys/kernel/core_pattern";
    drop(crate::kvm::Vm::new(kind)?);
    let directory = Path::new("/tmp/core");
    let _ = fs::remove_dir_all(directory);
    fs::create_dir_all(directory)?;
    let usual = fs::read_to_string(PATTERN)?;
    fs::write(PATTERN, "/tmp/core/core")?;
    let before = complaints()?;
    let child = Child::new(|| {
        let unlimited = libc::RLIM_INFINITY;
        works(
            "setrlimit",
            nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, unlimited, unlimited),
        )?;
        // Shared mappings of files, too.
        fs::write("/proc/self/coredump_filter", "0x7f")?;
        let machine = Plan::new(kind, PAGES as usize).build()?;
        let _guest = with_secret(&machine)?;
        std::process::abort()
    })?;
    let status = child.wait()?;
    fs::write(PATTERN, usual.trim())?;
    anyhow::ensure!(matches!(status, WaitStatus::Signaled(_, Signal::SIGABRT, true)), "{status:?}");
    check_eq!(complaints()?, before, "complaints of the kernel");
    let name = fs::read_dir(directory)?.next().ok_or_else(|| anyhow::anyhow!("no core file"))??;
    let core = fs::read(name.path())?;
    anyhow::ensure!(core.starts_with(b"\x7fELF") && core.len() > 4 * PAGE, "{} bytes of core", core.len());
    is_not_secret("the core file", &core)?;
    fs::remove_dir_all(directory)?;
    Ok(())
}

/// An image of all memory is not made: the state that the hypervisor keeps would be lost.
fn hibernation(kind: Kind) -> Outcome {
    const STATE: &str = "/sys/power/state";
    if !fs::read_to_string(STATE)?.contains("disk") {
        skip!("this kernel has no hibernation");
    }
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mut guest = with_secret(&machine)?;
    survives(&machine, &mut guest, |_| {
        let result = fs::write(STATE, "disk");
        anyhow::ensure!(result.is_err(), "{STATE} took it");
        Ok(())
    })
}

/// Compaction moves what can be moved, and a guest's memory cannot.
fn page_migration(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let mut guest = with_secret(&machine)?;
    survives(&machine, &mut guest, |_| {
        for _ in 0..3 {
            fs::write("/proc/sys/vm/compact_memory", "1")?;
            fs::write("/proc/sys/vm/drop_caches", "3")?;
        }
        Ok(())
    })?;
    guest.share(MEMORY, PAGES)?;
    machine.memory.mapping.check_pattern(0, PAGES as usize, 0, SEED)?;
    fs::write("/proc/sys/vm/compact_memory", "1")?;
    guest.unshare(MEMORY, PAGES)?;
    guest.check(MEMORY, PAGES, 0, SEED)
}
