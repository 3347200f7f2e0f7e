//! The host's view of the hypervisor's memory: nothing that reaches for it gets it, and nothing breaks.

use core::ffi::CStr;
use core::sync::atomic::Ordering;

use crate::access::{self, Access, Expected};
use crate::cpu::Hwcaps;
use crate::report::{self, Message, bail, check};
use crate::sys::{self, CREAT, DIRECT, End, Errno, File, Mapping, RDONLY, RDWR, SYNC, TRUNC, WRONLY, number};
use crate::{a32, cpu};

const PAGE: usize = 4096;

/// Runs all checks; `node` is the file with the `reg` of the reserved memory.
pub(crate) fn run(node: &CStr, hwcaps: &Hwcaps) {
    let (start, size) = match region(node) {
        Ok(region) => region,
        Err(why) => return check("the carve-out in the device tree", Err(why)),
    };
    report::note("carve-out", format_args!("{start:#x} {size:#x}"));
    let pages = [start, start + size / 2 / PAGE * PAGE, start + size - PAGE];
    let check = |name: &str, result| check(format_args!("carve-out, {name}"), result);
    for access in access::all().iter().filter(|access| access.possible(hwcaps)) {
        check(access.name, pages.iter().try_for_each(|page| touch(*page, access)));
    }
    match a32::load(start) {
        Ok(None) => report::skip("carve-out, 32-bit ldr", "the CPU or the kernel lacks the 32-bit state"),
        Ok(Some(End::Killed(sys::SIGBUS))) => check("32-bit ldr", Ok(())),
        Ok(Some(end)) => check("32-bit ldr", Err(format_args!("{end}").into())),
        Err(why) => check("32-bit ldr", Err(why)),
    }
    check("the signal's handler", handled(start, 20_000));
    check("processes on all CPUs", at_once(&pages));
    for (name, call) in CALLS {
        check(name, refused(start, call));
    }
    for (name, call) in DIRECT_CALLS {
        match File::open(c"/tmp/direct", RDWR | CREAT | DIRECT) {
            Err(Errno::INVAL) => report::skip(name, "the file system has no O_DIRECT"),
            _ => check(name, refused(start, call)),
        }
    }
    check("a signal stack", signal_stack(start));
    check("a robust list", robust_list(start));
    check("read(2) and write(2) of /dev/mem", device(&pages));
}

/// Start and size from a file with a `reg` of two cells each.
fn region(node: &CStr) -> report::Result<(usize, usize)> {
    let mut buffer = [0; 64];
    let bytes = sys::read_file(node, &mut buffer)?;
    let (&[start, size], []) = bytes.as_chunks::<8>() else { bail!("{} bytes", bytes.len()) };
    Ok((usize::from_be_bytes(start), usize::from_be_bytes(size)))
}

/// Maps a page of physical memory. Linux denies execution where there is no RAM of its own.
fn map(address: usize) -> Result<Mapping, Errno> {
    let memory = File::open(c"/dev/mem", RDWR | SYNC)?;
    Mapping::shared(&memory, PAGE, sys::READ | sys::WRITE, address)
}

/// Has a process make one access to a page.
fn touch(address: usize, access: &Access) -> report::Result {
    let page = map(address)?;
    let end = sys::in_child(|| {
        (access.run)(page.address());
        0
    })?;
    let survived = end == End::Exited(0);
    match access.expected {
        Expected::Fault | Expected::FaultOrNot if end == End::Killed(sys::SIGBUS) => Ok(()),
        Expected::FaultOrNot | Expected::Nothing if survived => Ok(()),
        _ => bail!("{end} at {address:#x}"),
    }
}

/// Handles the signal many times over; each names the address.
fn handled(address: usize, count: usize) -> report::Result {
    let page = map(address)?;
    let end = sys::in_child(|| {
        if sys::skip_faults().is_err() {
            return 1;
        }
        for round in 0..count {
            let target = page.address() + round * 8 % PAGE;
            // SAFETY: The address is in a mapping that no reference points into.
            unsafe { core::arch::asm!("ldr {0}, [{0}]", inout(reg) target => _, options(nostack)) };
            if sys::FAULTS.load(Ordering::Relaxed) != round + 1 {
                return 2;
            }
            if sys::FAULT_ADDRESS.load(Ordering::Relaxed) != target {
                return 3;
            }
        }
        0
    })?;
    match end {
        End::Exited(0) => Ok(()),
        End::Exited(2) => bail!("a load that did not fault"),
        End::Exited(3) => bail!("a signal with a wrong address"),
        end => bail!("{end}"),
    }
}

/// Two processes on each CPU do so at the same time. They wait for one lock; where fewer real CPUs emulate them, a wait is a
/// time slice long, so the number of faults is one for all.
fn at_once(pages: &[usize; 3]) -> report::Result {
    const FAULTS: usize = 2_000;
    let each = FAULTS / (2 * cpu::online()?);
    cpu::on_all(2, |index| handled(pages[index % pages.len()], each))
}

/// A system call that is handed the page.
type Call = fn(usize) -> Result<usize, Errno>;

const BUFFER: usize = 64;

const CALLS: [(&str, Call); 15] = [
    ("read(2) of a device", |page| raw(number::READ, [File::open(c"/dev/zero", RDONLY)?.0, page, BUFFER])),
    ("read(2) of a file", |page| {
        let file = File::open(c"/proc/self/exe", RDONLY)?;
        raw(number::READ, [file.0, page, BUFFER])
    }),
    ("write(2) to a file", |page| {
        let file = File::open(c"/tmp/written", WRONLY | CREAT | TRUNC)?;
        raw(number::WRITE, [file.0, page, BUFFER])
    }),
    ("read(2) of a pipe", |page| {
        let (output, input) = File::pipe()?;
        input.write(&[0; BUFFER])?;
        raw(number::READ, [output.0, page, BUFFER])
    }),
    ("write(2) to a pipe", |page| {
        let (_output, input) = File::pipe()?;
        raw(number::WRITE, [input.0, page, BUFFER])
    }),
    ("vmsplice(2)", |page| {
        let (_output, input) = File::pipe()?;
        let vector = [page, PAGE];
        raw(number::VMSPLICE, [input.0, vector.as_ptr() as usize, 1])
    }),
    ("process_vm_readv(2) into it", |page| copy_process(number::PROCESS_VM_READV, page, None)),
    ("process_vm_readv(2) from it", |page| copy_process(number::PROCESS_VM_READV, 0, Some(page))),
    ("process_vm_writev(2) from it", |page| copy_process(number::PROCESS_VM_WRITEV, page, None)),
    ("send(2)", |page| {
        let (one, _other) = File::socket_pair()?;
        raw(number::SENDTO, [one.0, page, BUFFER])
    }),
    ("getrandom(2)", |page| raw(number::GETRANDOM, [page, BUFFER, 0])),
    ("clock_gettime(2)", |page| raw(number::CLOCK_GETTIME, [0, page, 0])),
    ("open(2)", |page| raw(number::OPENAT, [0, page, 0])),
    ("execve(2)", |page| raw(number::EXECVE, [c"/init".as_ptr() as usize, page, 0])),
    ("futex(2)", |page| {
        const WAIT_PRIVATE: usize = 128;
        raw(number::FUTEX, [page, WAIT_PRIVATE, 0])
    }),
];

/// As [`CALLS`], for a file system that takes `O_DIRECT`.
const DIRECT_CALLS: [(&str, Call); 2] = [
    ("read(2) with O_DIRECT", |page| {
        let file = File::open(c"/tmp/direct", RDWR | CREAT | TRUNC)?;
        let contents = Mapping::anonymous(PAGE, sys::READ | sys::WRITE)?;
        raw(number::WRITE, [file.0, contents.address(), PAGE])?;
        let file = File::open(c"/tmp/direct", RDWR | DIRECT)?;
        raw(number::READ, [file.0, page, PAGE])
    }),
    ("write(2) with O_DIRECT", |page| {
        let file = File::open(c"/tmp/direct", RDWR | CREAT | TRUNC | DIRECT)?;
        raw(number::WRITE, [file.0, page, PAGE])
    }),
];

/// A call of three arguments, the others 0.
fn raw(number: usize, [x0, x1, x2]: [usize; 3]) -> Result<usize, Errno> {
    // SAFETY: Of this program's memory only the page is written, if at all.
    unsafe { sys::call(number, [x0, x1, x2, 0, 0, 0]) }
}

/// Copies within this process: between `local` and `remote`, or between `local` and ordinary memory if there is no
/// `remote`, or between ordinary memory and `remote` if `local` is 0.
fn copy_process(number: usize, local: usize, remote: Option<usize>) -> Result<usize, Errno> {
    let ordinary = [0_u8; BUFFER];
    let ordinary = ordinary.as_ptr() as usize;
    let local = [if local == 0 { ordinary } else { local }, BUFFER];
    let remote = [remote.unwrap_or(ordinary), BUFFER];
    // SAFETY: Touches no memory.
    let this = unsafe { sys::call(number::GETPID, [0; 6]) }?;
    // SAFETY: Copies between the page and a buffer that nothing else uses.
    unsafe { sys::call(number, [this, local.as_ptr() as usize, 1, remote.as_ptr() as usize, 1, 0]) }
}

/// The kernel's access to the page fails with EFAULT for the call.
fn refused(address: usize, call: Call) -> report::Result {
    let page = map(address)?;
    match call(page.address()) {
        Err(Errno::FAULT) => Ok(()),
        Err(errno) => bail!("{errno}"),
        Ok(result) => bail!("returned {result:#x}"),
    }
}

/// The kernel cannot deliver a signal onto the page, and ends the process.
fn signal_stack(address: usize) -> report::Result {
    const ONSTACK: usize = 0x0800_0000;
    const SIGUSR1: u32 = 10;
    let memory = File::open(c"/dev/mem", RDWR | SYNC)?;
    let stack = Mapping::shared(&memory, 16 * PAGE, sys::READ | sys::WRITE, address)?;
    let end = sys::in_child(|| {
        let description = [stack.address(), 0, 16 * PAGE];
        let result = raw(number::SIGALTSTACK, [description.as_ptr() as usize, 0, 0])
            .and_then(|_| sys::set_handler(SIGUSR1, on_stack as *const () as usize, ONSTACK))
            .and_then(|()| raw(number::GETPID, [0; 3]))
            .and_then(|this| raw(number::KILL, [this, SIGUSR1 as usize, 0]));
        if result.is_ok() { 0 } else { 1 }
    })?;
    if end == End::Killed(sys::SIGSEGV) { Ok(()) } else { bail!("{end}") }
}

extern "C" fn on_stack(_signal: u32) {
    sys::exit(3)
}

/// The kernel looks for a robust list there when the process ends.
fn robust_list(address: usize) -> report::Result {
    let page = map(address)?;
    let end = sys::in_child(|| {
        const HEAD_SIZE: usize = 24;
        u8::from(raw(number::SET_ROBUST_LIST, [page.address(), HEAD_SIZE, 0]).is_err())
    })?;
    if end == End::Exited(0) { Ok(()) } else { bail!("{end}") }
}

/// The device refuses what is no RAM of the host's.
fn device(pages: &[usize]) -> report::Result {
    let memory = File::open(c"/dev/mem", RDWR)?;
    let mut buffer = [0; 8];
    for &page in pages {
        if let Ok(read) = memory.read_at(&mut buffer, page) {
            bail!("read {} bytes at {page:#x}", read.len());
        }
        if let Ok(written) = memory.write_at(&[0; 8], page) {
            bail!("wrote {written} bytes at {page:#x}");
        }
    }
    Ok(())
}

/// Has the kernel access the page where it expects no fault: by the `/proc/PID/mem` of a process that has it mapped. At
/// worst that is the end of the process that asks.
pub(crate) fn unguarded(node: &CStr) {
    const SECONDS: usize = 10;
    let result = (|| {
        let (start, _) = region(node)?;
        let page = map(start)?;
        let child = sys::Child::spawn(|| {
            let read = || File::open(c"/proc/self/mem", RDONLY)?.read_at(&mut [0; 8], page.address()).map(<[u8]>::len);
            match read() {
                Ok(_) => 1,
                Err(_) => 0,
            }
        })?;
        match child.wait_for(SECONDS)? {
            Some(End::Exited(1)) => Err(Message::from(format_args!("the read succeeded"))),
            Some(_) | None => Ok(()),
        }
    })();
    check("an access of the kernel that nothing guards", result);
}
