//! What happens when a device touches a page that the guest does not share.
//!
//! Such an access is a SIGBUS. Where a ring or a buffer is comes from the guest, which may say anything, and may take a page
//! back at any moment, so it has to be an error of that device and nothing more. The handler puts a page of zeros under the
//! access, so that the code that makes it goes on, and notes that in the thread. Who has used the guest's memory asks for
//! the note by [`take`] before relying on what was read; then the file's pages are mapped again.
//!
//! The alternative, a system call for each access to a ring, would cost every request; this costs those that fail.

#![expect(unsafe_code, reason = "a signal handler, and the mappings that it changes")]

use std::cell::Cell;
use std::os::fd::RawFd;
use std::ptr::with_exposed_provenance_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering::SeqCst};

use anyhow::{Result, ensure};
use libc::{
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, c_int, c_void,
    siginfo_t,
};

use crate::{STATUS_FAILED, terminal};

static START: AtomicUsize = AtomicUsize::new(0);
static LENGTH: AtomicUsize = AtomicUsize::new(0);
static FILE: AtomicI32 = AtomicI32::new(-1);
static PAGE_SIZE: AtomicUsize = AtomicUsize::new(4096);

thread_local! {
    static FAULTED: Cell<bool> = const { Cell::new(false) };
}

/// While it exists, faults in one mapping are survived.
#[derive(Debug)]
pub struct Guard(());

impl Guard {
    /// Guards `length` bytes from `start`, where `file` is mapped from its beginning and stays so as long as the guard.
    pub fn new(start: *mut u8, length: usize, file: RawFd) -> Result<Self> {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(install);
        ensure!(LENGTH.load(SeqCst) == 0, "there is a guarded mapping already");
        START.store(start.expose_provenance(), SeqCst);
        FILE.store(file, SeqCst);
        LENGTH.store(length, SeqCst);
        Ok(Self(()))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        LENGTH.store(0, SeqCst);
    }
}

/// Whether this thread has touched a page that it may not since the last call.
pub fn take() -> bool {
    let faulted = FAULTED.replace(false);
    if faulted {
        restore();
    }
    faulted
}

/// Whether [`take`] would say so. It leaves the note.
pub fn pending() -> bool {
    FAULTED.get()
}

/// Maps the file again where pages of zeros are.
fn restore() {
    let (start, length, file) = (START.load(SeqCst), LENGTH.load(SeqCst), FILE.load(SeqCst));
    let flags = MAP_SHARED | MAP_FIXED | MAP_NORESERVE;
    // SAFETY: it replaces a mapping of the same file and size, which nobody has references into (vm-memory uses pointers
    // alone), and a thread that uses it meanwhile waits for the system call.
    let mapped =
        unsafe { libc::mmap(with_exposed_provenance_mut(start), length, PROT_READ | PROT_WRITE, flags, file, 0) };
    assert!(mapped != MAP_FAILED, "cannot map the guest's memory again");
}

fn install() {
    // SAFETY: no pointer is involved.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    PAGE_SIZE.store(usize::try_from(page).unwrap_or(4096), SeqCst);
    // SAFETY: all zero is a valid value: no flags, no mask, the default action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction = (handle as extern "C" fn(c_int, *const siginfo_t, *const c_void)) as usize;
    // SAFETY: the action is initialised, and the handler does only what a handler may.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    assert!(result == 0, "cannot handle SIGBUS");
}

extern "C" fn handle(_signal: c_int, info: *const siginfo_t, _context: *const c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO.
    let info = unsafe { &*info };
    // SAFETY: the signal is SIGBUS, for which the kernel fills in the address.
    let address = unsafe { info.si_addr() }.addr();
    if address.wrapping_sub(START.load(SeqCst)) < LENGTH.load(SeqCst) && put_zeros(address) {
        FAULTED.set(true);
        return;
    }
    terminal::restore();
    let text = b"ravelin-vmm: bus error\n";
    // SAFETY: the buffer is as long as the call is told.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
    // SAFETY: it ends the process; no pointer is involved.
    unsafe { libc::_exit(STATUS_FAILED) }
}

fn put_zeros(address: usize) -> bool {
    let page_size = PAGE_SIZE.load(SeqCst);
    let page = with_exposed_provenance_mut(address & !(page_size - 1));
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    // SAFETY: the page is inside the guarded mapping, which nobody has references into.
    let mapped = unsafe { libc::mmap(page, page_size, PROT_READ | PROT_WRITE, flags, -1, 0) };
    mapped == page
}

/// Tests with a guard take turns.
#[cfg(test)]
pub(crate) static TESTS: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RAM;
    use crate::memory::GuestRam;
    use std::fs::File;
    use vm_memory::{Bytes as _, GuestAddress};

    // What a file does not have any more is a SIGBUS, too.
    #[test]
    fn an_access_is_survived_and_noted() {
        let _alone = TESTS.lock().unwrap();
        let path = std::env::temp_dir().join(format!("ravelin-vmm-fault-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(0x4000).unwrap();
        let ram = GuestRam::map(0x4000, Some(file.try_clone().unwrap()), 0).unwrap();
        let dma = ram.dma();
        let word = |page: u64| dma.read_obj::<u64>(GuestAddress(RAM + page * 0x1000)).unwrap();
        dma.write_obj(7u64, GuestAddress(RAM + 0x3000)).unwrap();
        assert!(!take());
        file.set_len(0x2000).unwrap();
        assert_eq!(word(3), 0);
        assert!(take());
        assert!(!take(), "noted once");
        file.set_len(0x4000).unwrap();
        dma.write_obj(8u64, GuestAddress(RAM + 0x3000)).unwrap();
        assert!(!take());
        assert_eq!(word(3), 8, "the file is mapped again");
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0x3000).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 8);
    }
}
