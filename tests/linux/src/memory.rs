//! Nearly all of RAM in use at once.

use core::sync::atomic::{AtomicUsize, Ordering};

use crate::report::{self, bail, check};
use crate::sys::{self, Child, End, Mapping};
use crate::{cpu, sys::File};

pub(crate) const MIB: usize = 1 << 20;

/// Fills all free memory but `leave` MiB with a pattern, on all CPUs, verifies it, and does so again with its inverse.
pub(crate) fn run(leave: usize) {
    check("nearly all memory holds what is written", fill(leave));
}

fn fill(leave: usize) -> report::Result {
    let (total, available) = (meminfo(b"MemTotal:")?, meminfo(b"MemAvailable:")?);
    let workers = cpu::online()?.min(8);
    let share = available.saturating_sub(leave * MIB) / workers / MIB * MIB;
    report::note("MiB filled, of", format_args!("{} {}", share * workers / MIB, total / MIB));
    // Most of what is not available is the kernel, which has a size of its own.
    if share * workers < total / 10 * 8 - 64 * MIB {
        bail!("only {} MiB of {} are available", available / MIB, total / MIB);
    }
    let zero = File::open(c"/dev/zero", sys::RDWR)?;
    let page = Mapping::shared(&zero, 4096, sys::READ | sys::WRITE, 0)?;
    // SAFETY: The mapping outlives all uses; all processes access the word by atomic operations.
    let arrived = unsafe { AtomicUsize::from_ptr(page.start.cast()) };
    let mut children: [Option<Child>; 8] = [const { None }; 8];
    for (index, child) in children.iter_mut().enumerate().take(workers) {
        *child = Some(Child::spawn(|| match work(index, share, || wait(arrived, workers)) {
            Ok(true) => 0,
            Ok(false) => 1,
            Err(_) => 2,
        })?);
    }
    let mut result = Ok(());
    for child in children.into_iter().flatten() {
        match child.wait()? {
            End::Exited(0) => {}
            End::Exited(1) => result = Err(format_args!("memory has lost what was written").into()),
            end => {
                result = Err(format_args!("a process ended with {end}").into());
                // The others are not to wait for it.
                arrived.fetch_add(workers * 2, Ordering::Relaxed);
            }
        }
    }
    result
}

/// Waits until all processes have filled their part, so that everything is in use at the same time.
fn wait(arrived: &AtomicUsize, workers: usize) {
    arrived.fetch_add(1, Ordering::Relaxed);
    while arrived.load(Ordering::Relaxed) < workers {
        sys::sleep_ms(20);
    }
}

/// One process's part. Whether all words held.
fn work(index: usize, size: usize, filled: impl FnOnce()) -> Result<bool, sys::Errno> {
    let memory = Mapping::anonymous(size, sys::READ | sys::WRITE)?;
    // Every other process has the kernel use large pages, too.
    if index % 2 == 1 {
        memory.advise_huge(true)?;
    }
    let words = size / size_of::<u64>();
    let start: *mut u64 = memory.start.cast();
    let pattern = |word: usize| (word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((index as u64) << 56);
    for word in 0..words {
        // SAFETY: The word is in the mapping, which is aligned to a page.
        let at = unsafe { start.add(word) };
        // SAFETY: As above.
        unsafe { at.write(pattern(word)) };
    }
    filled();
    let mut held = true;
    for word in 0..words {
        // SAFETY: As above.
        let at = unsafe { start.add(word) };
        // SAFETY: As above; written before.
        held &= unsafe { at.read_volatile() } == pattern(word);
        // SAFETY: As above.
        unsafe { at.write_volatile(!pattern(word)) };
    }
    for word in 0..words {
        // SAFETY: As above.
        let at = unsafe { start.add(word) };
        // SAFETY: As above; written before.
        held &= unsafe { at.read_volatile() } == !pattern(word);
    }
    Ok(held)
}

/// A field of /proc/meminfo in bytes.
pub(crate) fn meminfo(name: &[u8]) -> report::Result<usize> {
    let mut buffer = [0; 2048];
    let text = sys::read_file(c"/proc/meminfo", &mut buffer)?;
    let line = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name));
    let digits = line.and_then(|line| line.strip_suffix(b" kB")).map(<[u8]>::trim_ascii);
    match digits.and_then(cpu::parse) {
        Some(kib) => Ok(kib * 1024),
        None => bail!("/proc/meminfo lacks a field"),
    }
}
