//! Mapped memory that may vanish, and accesses to it that say so.

use core::arch::asm;
use core::cell::Cell;
use core::ffi::c_void;
use core::num::NonZeroUsize;
use core::ptr::NonNull;
use std::os::fd::AsFd;
use std::sync::Once;

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::check::Outcome;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// A signal that an access has raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Its number.
    pub(crate) signal: i32,
    /// `si_addr`.
    pub(crate) address: usize,
}

impl Fault {
    /// Whether it is the signal for memory that is there and cannot be had, with the right address.
    pub(crate) fn is_bus_error_at(self, address: usize) -> bool {
        self.signal == libc::SIGBUS && self.address / 8 == address / 8
    }
}

thread_local! {
    /// An access is being made that may fault.
    static TRYING: Cell<bool> = const { Cell::new(false) };
    static FAULT: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Skips the instruction of an access, or lets the signal do what it does by default.
extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    if !TRYING.get() {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        if let Ok(signal) = Signal::try_from(signal) {
            // SAFETY: No handler.
            let _ = unsafe { sigaction(signal, &default) };
        }
        return;
    }
    // SAFETY: The kernel hands over a siginfo_t.
    let info = unsafe { *info };
    // SAFETY: It is that of a fault.
    let address = unsafe { info.si_addr() };
    FAULT.set(Some(Fault { signal, address: address.addr() }));
    let context: *mut libc::ucontext_t = context.cast();
    // SAFETY: The kernel hands over a ucontext_t; the interrupted code goes on with the next instruction.
    unsafe { (*context).uc_mcontext.pc += 4 };
}

/// Makes one access that may fault.
fn try_access<T>(access: impl FnOnce() -> T) -> Result<T, Fault> {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        let action = SigAction::new(SigHandler::SigAction(handle), SaFlags::SA_SIGINFO, SigSet::empty());
        for signal in [Signal::SIGBUS, Signal::SIGSEGV] {
            // SAFETY: The handler touches variables of the thread and the interrupted context only.
            let _ = unsafe { sigaction(signal, &action) };
        }
    });
    FAULT.set(None);
    TRYING.set(true);
    let value = access();
    TRYING.set(false);
    FAULT.take().map_or(Ok(value), Err)
}

/// Loads a word, aligned to 8 bytes.
pub(crate) fn load(address: usize) -> Result<u64, Fault> {
    try_access(|| {
        let mut value = 0_u64;
        // SAFETY: No object of Rust's is there; a fault skips the instruction.
        unsafe { asm!("ldr {}, [{}]", inout(reg) value, in(reg) address, options(nostack)) };
        value
    })
}

/// Stores a word, aligned to 8 bytes.
pub(crate) fn store(address: usize, value: u64) -> Result<(), Fault> {
    // SAFETY: As for `load`.
    try_access(|| unsafe { asm!("str {}, [{}]", in(reg) value, in(reg) address, options(nostack)) })
}

/// Memory that this process has mapped; other processes, the kernel and guests may change it at any time.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<c_void>,
    size: usize,
}

// SAFETY: All accesses are single instructions.
unsafe impl Send for Mapping {}
// SAFETY: As above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a file, from an offset on.
    pub(crate) fn new(file: impl AsFd, offset: usize, size: usize, flags: MapFlags) -> Result<Self, Errno> {
        Self::with(file, offset, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)
    }

    /// Maps a file with other permissions.
    pub(crate) fn with(
        file: impl AsFd,
        offset: usize,
        size: usize,
        permissions: ProtFlags,
        flags: MapFlags,
    ) -> Result<Self, Errno> {
        let length = NonZeroUsize::new(size).ok_or(Errno::EINVAL)?;
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        // SAFETY: The kernel chooses a place where nothing is.
        let start = unsafe { mmap(None, length, permissions, flags, file, offset) }?;
        Ok(Self { start, size })
    }

    /// Maps a file, shared.
    pub(crate) fn shared(file: impl AsFd, size: usize) -> Result<Self, Errno> {
        Self::new(file, 0, size, MapFlags::MAP_SHARED)
    }

    /// Maps a file, shared, in the place of a part of this one.
    pub(crate) fn replace(&self, at: usize, file: impl AsFd, offset: usize, size: usize) -> Result<Self, Errno> {
        assert!(at + size <= self.size);
        let length = NonZeroUsize::new(size).ok_or(Errno::EINVAL)?;
        let (place, offset) = (self.start.addr().checked_add(at), i64::try_from(offset).map_err(|_| Errno::EINVAL)?);
        let permissions = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: This mapping is there, and no object of Rust's is in it.
        let start =
            unsafe { mmap(place, length, permissions, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED, file, offset) }?;
        Ok(Self { start, size })
    }

    /// Maps anonymous memory.
    pub(crate) fn anonymous(size: usize) -> Result<Self, Errno> {
        let length = NonZeroUsize::new(size).ok_or(Errno::EINVAL)?;
        let permissions = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: The kernel chooses a place where nothing is.
        let start = unsafe { mmap_anonymous(None, length, permissions, MapFlags::MAP_PRIVATE) }?;
        Ok(Self { start, size })
    }

    /// Where it is.
    pub(crate) fn address(&self) -> usize {
        self.start.addr().get()
    }

    /// Where it is, as a pointer.
    pub(crate) fn start(&self) -> NonNull<c_void> {
        self.start
    }

    /// Bytes.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The address of a byte of it, as a pointer.
    pub(crate) fn pointer(&self, offset: usize) -> *mut c_void {
        self.start.as_ptr().wrapping_byte_add(offset)
    }

    /// Loads a word.
    pub(crate) fn load(&self, offset: usize) -> Result<u64, Fault> {
        load(self.address() + offset)
    }

    /// Stores a word.
    pub(crate) fn store(&self, offset: usize, value: u64) -> Result<(), Fault> {
        store(self.address() + offset, value)
    }

    /// Loads a word that must be there.
    pub(crate) fn get(&self, offset: usize) -> Outcome<u64> {
        self.load(offset).map_err(|fault| anyhow::anyhow!("load at offset {offset:#x}: {fault:x?}"))
    }

    /// Stores a word to memory that must be there.
    pub(crate) fn set(&self, offset: usize, value: u64) -> Outcome {
        self.store(offset, value).map_err(|fault| anyhow::anyhow!("store at offset {offset:#x}: {fault:x?}"))
    }

    /// Copies bytes into memory that must be there; what is missing to whole words becomes 0.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> Outcome {
        for (index, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.set(offset + index * 8, u64::from_le_bytes(word))?;
        }
        Ok(())
    }

    /// Fills all of it with a word.
    pub(crate) fn fill(&self, word: u64) -> Outcome {
        (0..self.size).step_by(8).try_for_each(|offset| self.set(offset, word))
    }

    /// Fills pages with the [pattern](ravelin_guest::pattern); the first page has the number `key`.
    pub(crate) fn fill_pattern(&self, offset: usize, pages: usize, key: u64, seed: u64) -> Outcome {
        words(pages, key, seed).try_for_each(|(at, word)| self.set(offset + at, word))
    }

    /// Checks that pages hold the pattern.
    pub(crate) fn check_pattern(&self, offset: usize, pages: usize, key: u64, seed: u64) -> Outcome {
        for (at, word) in words(pages, key, seed) {
            let seen = self.get(offset + at)?;
            anyhow::ensure!(seen == word, "{seen:#x} at offset {:#x}, expected {word:#x}", offset + at);
        }
        Ok(())
    }

    /// Checks that all words in a range are `word`.
    pub(crate) fn check_words(&self, offset: usize, size: usize, word: u64) -> Outcome {
        for at in (offset..offset + size).step_by(8) {
            let seen = self.get(at)?;
            anyhow::ensure!(seen == word, "{seen:#x} at offset {at:#x}, expected {word:#x}");
        }
        Ok(())
    }

    /// Checks that an access raises SIGBUS, a load as well as a store.
    pub(crate) fn check_bus_error(&self, offset: usize) -> Outcome {
        let address = self.address() + offset;
        for (what, result) in [("load", self.load(offset).map(drop)), ("store", self.store(offset, 1))] {
            let right = result.is_err_and(|fault| fault.is_bus_error_at(address));
            anyhow::ensure!(right, "{what} at offset {offset:#x}: {result:x?} instead of SIGBUS");
        }
        Ok(())
    }

    /// madvise(2) on all of it.
    pub(crate) fn advise(&self, advice: MmapAdvise) -> Result<(), Errno> {
        // SAFETY: No object of Rust's is there.
        unsafe { madvise(self.start, self.size, advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: Nothing refers to it any more. It cannot fail: it is a whole mapping.
        let _ = unsafe { munmap(self.start, self.size) };
    }
}

/// Offsets and values of the words of the pattern.
fn words(pages: usize, key: u64, seed: u64) -> impl Iterator<Item = (usize, u64)> {
    let page = PAGE as u64;
    (0..pages).flat_map(move |number| {
        let name = key.wrapping_add(number as u64 * page);
        (0..page / 8).map(move |index| (number * PAGE + index as usize * 8, ravelin_guest::pattern(name, index, seed)))
    })
}
