//! The system calls in use (numbers and constants: Linux, `include/uapi/asm-generic`, `arch/arm64/include/uapi/asm`).

use core::arch::asm;
use core::ffi::CStr;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Numbers of system calls.
pub(crate) mod number {
    pub(crate) const OPENAT: usize = 56;
    pub(crate) const CLOSE: usize = 57;
    pub(crate) const PIPE2: usize = 59;
    pub(crate) const READ: usize = 63;
    pub(crate) const WRITE: usize = 64;
    pub(crate) const PREAD64: usize = 67;
    pub(crate) const PWRITE64: usize = 68;
    pub(crate) const VMSPLICE: usize = 75;
    pub(crate) const FSTAT: usize = 80;
    pub(crate) const EXIT_GROUP: usize = 94;
    pub(crate) const FUTEX: usize = 98;
    pub(crate) const SET_ROBUST_LIST: usize = 99;
    pub(crate) const NANOSLEEP: usize = 101;
    pub(crate) const SETITIMER: usize = 103;
    pub(crate) const KEXEC_LOAD: usize = 104;
    pub(crate) const CLOCK_GETTIME: usize = 113;
    pub(crate) const SCHED_SETAFFINITY: usize = 122;
    pub(crate) const KILL: usize = 129;
    pub(crate) const SIGALTSTACK: usize = 132;
    pub(crate) const RT_SIGACTION: usize = 134;
    pub(crate) const REBOOT: usize = 142;
    pub(crate) const PRCTL: usize = 167;
    pub(crate) const GETPID: usize = 172;
    pub(crate) const SOCKETPAIR: usize = 199;
    pub(crate) const SENDTO: usize = 206;
    pub(crate) const MUNMAP: usize = 215;
    pub(crate) const CLONE: usize = 220;
    pub(crate) const EXECVE: usize = 221;
    pub(crate) const MMAP: usize = 222;
    pub(crate) const MPROTECT: usize = 226;
    pub(crate) const MADVISE: usize = 233;
    pub(crate) const PERF_EVENT_OPEN: usize = 241;
    pub(crate) const WAIT4: usize = 260;
    pub(crate) const PROCESS_VM_READV: usize = 270;
    pub(crate) const PROCESS_VM_WRITEV: usize = 271;
    pub(crate) const GETRANDOM: usize = 278;
    pub(crate) const PIDFD_OPEN: usize = 434;
    pub(crate) const PIDFD_GETFD: usize = 438;
}
use number as nr;

/// Error number of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) usize);

impl Errno {
    pub(crate) const NOENT: Self = Self(2);
    pub(crate) const NOEXEC: Self = Self(8);
    pub(crate) const BADF: Self = Self(9);
    pub(crate) const FAULT: Self = Self(14);
    pub(crate) const INVAL: Self = Self(22);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "errno {}", self.0)
    }
}

/// Makes a system call.
///
/// # Safety
///
/// It must leave alone all memory of this program but what it is handed for the purpose.
pub(crate) unsafe fn call(number: usize, arguments: [usize; 6]) -> Result<usize, Errno> {
    let [x0, x1, x2, x3, x4, x5] = arguments;
    let result: isize;
    // SAFETY: What the call does is up to the caller; the kernel preserves all registers but x0.
    unsafe {
        asm!(
            "svc #0", in("x8") number, inlateout("x0") x0 => result,
            in("x1") x1, in("x2") x2, in("x3") x3, in("x4") x4, in("x5") x5, options(nostack)
        );
    }
    if (-4095..0).contains(&result) { Err(Errno(result.unsigned_abs())) } else { Ok(result.cast_unsigned()) }
}

pub(crate) const RDONLY: usize = 0;
pub(crate) const WRONLY: usize = 1;
pub(crate) const RDWR: usize = 2;
pub(crate) const CREAT: usize = 0o100;
pub(crate) const TRUNC: usize = 0o1000;
pub(crate) const DIRECT: usize = 0o20_0000;
/// O_SYNC, with which `/dev/mem` maps uncached.
pub(crate) const SYNC: usize = 0o401_0000;

const AT_FDCWD: usize = (-100_isize).cast_unsigned();

/// An open file.
pub(crate) struct File(pub(crate) usize);

impl File {
    /// open(2), with the execute permission for what it creates.
    pub(crate) fn open(path: &CStr, flags: usize) -> Result<Self, Errno> {
        // SAFETY: Reads a zero-terminated string.
        unsafe { call(nr::OPENAT, [AT_FDCWD, path.as_ptr() as usize, flags, 0o755, 0, 0]) }.map(Self)
    }

    /// pipe(2): the end to read from and the end to write to.
    pub(crate) fn pipe() -> Result<(Self, Self), Errno> {
        let mut ends = [0_u32; 2];
        // SAFETY: Writes the two numbers.
        unsafe { call(nr::PIPE2, [ends.as_mut_ptr() as usize, 0, 0, 0, 0, 0]) }?;
        Ok((Self(ends[0] as usize), Self(ends[1] as usize)))
    }

    /// socketpair(2): two ends of a stream.
    pub(crate) fn socket_pair() -> Result<(Self, Self), Errno> {
        const UNIX: usize = 1;
        const STREAM: usize = 1;
        let mut ends = [0_u32; 2];
        // SAFETY: Writes the two numbers.
        unsafe { call(nr::SOCKETPAIR, [UNIX, STREAM, 0, ends.as_mut_ptr() as usize, 0, 0]) }?;
        Ok((Self(ends[0] as usize), Self(ends[1] as usize)))
    }

    /// pidfd_open(2).
    pub(crate) fn of_process(id: usize) -> Result<Self, Errno> {
        // SAFETY: Touches no memory.
        unsafe { call(nr::PIDFD_OPEN, [id, 0, 0, 0, 0, 0]) }.map(Self)
    }

    /// pidfd_getfd(2): what another process has open.
    pub(crate) fn taken(process: &Self, descriptor: usize) -> Result<Self, Errno> {
        // SAFETY: Touches no memory.
        unsafe { call(nr::PIDFD_GETFD, [process.0, descriptor, 0, 0, 0, 0]) }.map(Self)
    }

    /// The size that fstat(2) gives.
    pub(crate) fn size(&self) -> Result<usize, Errno> {
        /// Words of `struct stat`, and that of `st_size`.
        const WORDS: usize = 16;
        const SIZE: usize = 6;
        let mut words = [0_usize; WORDS];
        // SAFETY: Writes to the array, which has the size of the structure.
        unsafe { call(nr::FSTAT, [self.0, words.as_mut_ptr() as usize, 0, 0, 0, 0]) }?;
        Ok(words[SIZE])
    }

    /// read(2).
    pub(crate) fn read<'a>(&self, buffer: &'a mut [u8]) -> Result<&'a [u8], Errno> {
        // SAFETY: Writes to the buffer only.
        let read = unsafe { call(nr::READ, [self.0, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0, 0]) }?;
        Ok(&buffer[..read])
    }

    /// pread(2).
    pub(crate) fn read_at<'a>(&self, buffer: &'a mut [u8], offset: usize) -> Result<&'a [u8], Errno> {
        // SAFETY: Writes to the buffer only.
        let read = unsafe { call(nr::PREAD64, [self.0, buffer.as_mut_ptr() as usize, buffer.len(), offset, 0, 0]) }?;
        Ok(&buffer[..read])
    }

    /// write(2).
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        // SAFETY: Reads the bytes only.
        unsafe { call(nr::WRITE, [self.0, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0]) }
    }

    /// pwrite(2).
    pub(crate) fn write_at(&self, bytes: &[u8], offset: usize) -> Result<usize, Errno> {
        // SAFETY: Reads the bytes only.
        unsafe { call(nr::PWRITE64, [self.0, bytes.as_ptr() as usize, bytes.len(), offset, 0, 0]) }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: Touches no memory. There is nothing to do about an error.
        let _ = unsafe { call(nr::CLOSE, [self.0, 0, 0, 0, 0, 0]) };
    }
}

/// Reads the start of a file.
pub(crate) fn read_file<'a>(path: &CStr, buffer: &'a mut [u8]) -> Result<&'a [u8], Errno> {
    File::open(path, RDONLY)?.read(buffer)
}

/// Prints to standard output.
pub(crate) fn print(bytes: &[u8]) {
    let output = core::mem::ManuallyDrop::new(File(1));
    // There is nowhere to report an error to.
    let _ = output.write(bytes);
}

pub(crate) const READ: usize = 1;
pub(crate) const WRITE: usize = 2;
pub(crate) const EXEC: usize = 4;
/// PROT_BTI.
pub(crate) const BTI: usize = 0x10;
/// PROT_MTE.
pub(crate) const MTE: usize = 0x20;

/// Mapped memory, which is only ever touched through raw pointers.
pub(crate) struct Mapping {
    /// Where it starts.
    pub(crate) start: *mut u8,
    length: usize,
}

impl Mapping {
    /// Fresh memory.
    pub(crate) fn anonymous(length: usize, protection: usize) -> Result<Self, Errno> {
        const PRIVATE_ANONYMOUS: usize = 0x22;
        Self::new(length, protection, PRIVATE_ANONYMOUS, usize::MAX, 0)
    }

    /// A file.
    pub(crate) fn shared(file: &File, length: usize, protection: usize, offset: usize) -> Result<Self, Errno> {
        const SHARED: usize = 1;
        Self::new(length, protection, SHARED, file.0, offset)
    }

    fn new(length: usize, protection: usize, flags: usize, file: usize, offset: usize) -> Result<Self, Errno> {
        // SAFETY: Without MAP_FIXED no existing mapping is touched.
        let start = unsafe { call(nr::MMAP, [0, length, protection, flags, file, offset]) }?;
        Ok(Self { start: core::ptr::with_exposed_provenance_mut(start), length })
    }

    /// Its address.
    pub(crate) fn address(&self) -> usize {
        self.start.expose_provenance()
    }

    /// mprotect(2).
    pub(crate) fn protect(&self, protection: usize) -> Result<(), Errno> {
        // SAFETY: No reference points into a mapping.
        unsafe { call(nr::MPROTECT, [self.address(), self.length, protection, 0, 0, 0]) }.map(drop)
    }

    /// madvise(2) with MADV_HUGEPAGE, or MADV_NOHUGEPAGE.
    pub(crate) fn advise_huge(&self, wanted: bool) -> Result<(), Errno> {
        const HUGEPAGE: usize = 14;
        const NOHUGEPAGE: usize = 15;
        let advice = if wanted { HUGEPAGE } else { NOHUGEPAGE };
        // SAFETY: Does not change the contents.
        unsafe { call(nr::MADVISE, [self.address(), self.length, advice, 0, 0, 0]) }.map(drop)
    }

    /// Stores a byte to each page.
    pub(crate) fn touch(&self) {
        for offset in (0..self.length).step_by(4096) {
            // SAFETY: The byte is in the mapping.
            let at = unsafe { self.start.add(offset) };
            // SAFETY: As above, and no reference points into a mapping.
            unsafe { at.write_volatile(1) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: No reference points into a mapping. It is there, so there is no error.
        let _ = unsafe { call(nr::MUNMAP, [self.address(), self.length, 0, 0, 0, 0]) };
    }
}

/// process_vm_readv(2): how many bytes it gave.
pub(crate) fn read_process(id: usize, buffer: &mut [u8], address: usize) -> Result<usize, Errno> {
    let (local, remote) = ([buffer.as_mut_ptr() as usize, buffer.len()], [address, buffer.len()]);
    let (local, remote) = (local.as_ptr() as usize, remote.as_ptr() as usize);
    // SAFETY: Writes to the buffer only.
    unsafe { call(nr::PROCESS_VM_READV, [id, local, 1, remote, 1, 0]) }
}

/// getpid(2).
pub(crate) fn process_id() -> Result<usize, Errno> {
    // SAFETY: Touches no memory.
    unsafe { call(nr::GETPID, [0; 6]) }
}

/// Ends this process.
pub(crate) fn exit(status: u8) -> ! {
    loop {
        // SAFETY: Does not return.
        let _ = unsafe { call(nr::EXIT_GROUP, [usize::from(status), 0, 0, 0, 0, 0]) };
    }
}

pub(crate) const SIGILL: u32 = 4;
pub(crate) const SIGBUS: u32 = 7;
pub(crate) const SIGSEGV: u32 = 11;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Exited(u32),
    Killed(u32),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exit status {status}"),
            Self::Killed(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// A process of ours.
pub(crate) struct Child(usize);

impl Child {
    /// Runs `body` in a copy of this process, which ends with the status that it returns.
    pub(crate) fn spawn(body: impl FnOnce() -> u8) -> Result<Self, Errno> {
        const SIGCHLD: usize = 17;
        // SAFETY: Both processes go on with a memory of their own.
        match unsafe { call(nr::CLONE, [SIGCHLD, 0, 0, 0, 0, 0]) }? {
            0 => exit(body()),
            child => Ok(Self(child)),
        }
    }

    /// Waits for its end.
    pub(crate) fn wait(self) -> Result<End, Errno> {
        self.wait_with(0).map(|(_, end)| end)
    }

    /// Its end, if it has come within some seconds.
    pub(crate) fn wait_for(self, seconds: usize) -> Result<Option<End>, Errno> {
        const WNOHANG: usize = 1;
        for _ in 0..seconds * 10 {
            if let (1.., end) = self.wait_with(WNOHANG)? {
                return Ok(Some(end));
            }
            sleep_ms(100);
        }
        Ok(None)
    }

    fn wait_with(&self, options: usize) -> Result<(usize, End), Errno> {
        let mut status = 0_u32;
        // SAFETY: Writes the status.
        let ended = unsafe { call(nr::WAIT4, [self.0, &raw mut status as usize, options, 0, 0, 0]) }?;
        let end = if status & 0x7f == 0 { End::Exited(status >> 8 & 0xff) } else { End::Killed(status & 0x7f) };
        Ok((ended, end))
    }
}

/// Runs `body` in a copy of this process and waits for its end, which SIGALRM brings if nothing else does.
pub(crate) fn in_child(body: impl FnOnce() -> u8) -> Result<End, Errno> {
    const SECONDS: usize = 200;
    let once = [0, 0, SECONDS, 0];
    Child::spawn(|| {
        // SAFETY: Reads the times. The only error would be an address that is none.
        let _ = unsafe { call(nr::SETITIMER, [0, once.as_ptr() as usize, 0, 0, 0, 0]) };
        body()
    })?
    .wait()
}

/// Sleeps; a signal may end it early.
pub(crate) fn sleep_ms(milliseconds: usize) {
    let time = [milliseconds / 1000, milliseconds % 1000 * 1_000_000];
    // SAFETY: Reads the time.
    let _ = unsafe { call(nr::NANOSLEEP, [time.as_ptr() as usize, 0, 0, 0, 0, 0]) };
}

/// Binds this process to a CPU.
pub(crate) fn run_on(cpu: usize) -> Result<(), Errno> {
    let mut mask = [0_u64; 16];
    mask[cpu / 64] = 1 << (cpu % 64);
    // SAFETY: Reads the mask.
    unsafe { call(nr::SCHED_SETAFFINITY, [0, size_of_val(&mask), mask.as_ptr() as usize, 0, 0, 0]) }.map(drop)
}

/// Number of signals that [`skip_faults`] has handled.
pub(crate) static FAULTS: AtomicUsize = AtomicUsize::new(0);

/// The address that the last of them named, `si_addr`.
pub(crate) static FAULT_ADDRESS: AtomicUsize = AtomicUsize::new(0);

/// From now on an instruction that raises SIGBUS is skipped.
pub(crate) fn skip_faults() -> Result<(), Errno> {
    const SIGINFO: usize = 4;
    set_handler(SIGBUS, handle_fault as *const () as usize, SIGINFO)
}

/// sigaction(2).
pub(crate) fn set_handler(signal: u32, handler: usize, flags: usize) -> Result<(), Errno> {
    let action = [handler, flags, 0, 0];
    // SAFETY: The handlers in use touch atomics and the interrupted context only.
    unsafe { call(nr::RT_SIGACTION, [signal as usize, action.as_ptr() as usize, 0, size_of::<u64>(), 0, 0]) }.map(drop)
}

extern "C" fn handle_fault(_signal: u32, info: *const usize, context: *mut usize) {
    /// Words of `siginfo_t` before `si_addr`.
    const SI_ADDR: usize = 2;
    /// Words of `ucontext_t` before `uc_mcontext.pc`: 176 bytes of head, the fault's address, 31 registers and SP.
    const PC: usize = 22 + 1 + 31 + 1;
    // SAFETY: The kernel hands over a siginfo_t.
    let address = unsafe { info.add(SI_ADDR) };
    // SAFETY: As above.
    FAULT_ADDRESS.store(unsafe { *address }, Ordering::Relaxed);
    FAULTS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: The kernel hands over a ucontext_t.
    let pc = unsafe { context.add(PC) };
    // SAFETY: As above; the interrupted code goes on with the next instruction.
    unsafe { *pc += 4 };
}
