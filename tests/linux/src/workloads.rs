//! Fixed amounts of work for the host, between marks that QEMU's counter sees: `HINT #0x40` and `HINT #0x41`. Elsewhere
//! they are NOPs.

use core::arch::asm;
use core::ffi::CStr;

use crate::memory::{MIB, meminfo};
use crate::report::{self, bail};
use crate::sys::{self, CREAT, Child, DIRECT, End, Errno, File, Mapping, RDWR, TRUNC, number};

const PAGE: usize = 4096;

type Work = fn() -> report::Result;

/// The work, in the order in which it is done. A disk answers in a time of its own, which everything after it would show, so
/// all rounds of it come last.
const WORKLOADS: [(&str, Work); 5] = [
    ("pipes", || messages(File::pipe)),
    ("sockets", || messages(File::socket_pair)),
    ("fork-exec", fork_exec),
    ("page-faults", page_faults),
    ("files", files),
];

/// How often each is done: the first time meets a kernel, and a stage 2, that have not seen it before.
const ROUNDS: usize = 4;

/// A mark of this process.
macro_rules! mark {
    ($hint:literal) => {
        // SAFETY: A hint.
        unsafe { asm!(concat!("hint #", $hint), options(nostack, preserves_flags)) }
    };
}

/// Does all of it. A line `bench NAME ROUND` names each measurement, in the order of the marks.
pub(crate) fn run() -> report::Result {
    for round in 0..ROUNDS {
        for (name, work) in WORKLOADS {
            measure(name, round, work)?;
        }
    }
    (0..ROUNDS).try_for_each(|round| measure("disk", round, disk))
}

fn measure(name: &str, round: usize, work: Work) -> report::Result {
    mark!("0x40");
    let done = work();
    mark!("0x41");
    report::line(format_args!("bench {name} {round}\n"));
    done
}

/// Leaves behind a process that has all of the memory that is free but `leave` MiB, some of it in pages, the rest as large
/// as the kernel does it, and that sets a mark when it has.
pub(crate) fn linger(leave: usize) -> report::Result {
    const SINGLE: usize = 64 * MIB;
    let huge = meminfo(b"MemAvailable:")?.saturating_sub(leave * MIB + SINGLE) / MIB * MIB;
    let (output, input) = File::pipe()?;
    Child::spawn(|| {
        let hold = || -> Result<(), Errno> {
            let (huge, single) = (anonymous(huge, true)?, anonymous(SINGLE, false)?);
            huge.touch();
            single.touch();
            mark!("0x42");
            input.write(&[1])?;
            loop {
                sys::sleep_ms(100_000);
            }
        };
        u8::from(hold().is_err())
    })?;
    drop(input);
    match output.read(&mut [0])? {
        [] => bail!("there is less memory than the kernel says"),
        _ => Ok(()),
    }
}

/// Ten processes send to ten others, each a hundred messages of a hundred bytes to each.
fn messages(channel: fn() -> Result<(File, File), Errno>) -> report::Result {
    const PROCESSES: usize = 10;
    const MESSAGES: usize = 100;
    const SIZE: usize = 100;
    let mut channels = [const { None }; PROCESSES];
    for place in &mut channels {
        *place = Some(channel()?);
    }
    let receive = |output: &File| -> Result<(), Errno> {
        let mut left = PROCESSES * MESSAGES * SIZE;
        while left > 0 {
            left = left.saturating_sub(output.read(&mut [0; SIZE])?.len());
        }
        Ok(())
    };
    let send = |_: &File| -> Result<(), Errno> {
        for _ in 0..MESSAGES {
            for (_, input) in channels.iter().flatten() {
                input.write(&[7; SIZE])?;
            }
        }
        Ok(())
    };
    let mut children = [const { None }; 2 * PROCESSES];
    let all = channels.iter().chain(&channels).flatten();
    for (index, (place, (output, _))) in children.iter_mut().zip(all).enumerate() {
        let body = || if index < PROCESSES { receive(output) } else { send(output) };
        *place = Some(Child::spawn(|| u8::from(body().is_err()))?);
    }
    children.into_iter().flatten().try_for_each(succeeds)
}

/// Starts a program that does nothing.
fn fork_exec() -> report::Result {
    const PROGRAMS: usize = 100;
    const SELF: &CStr = c"/proc/self/exe";
    let arguments = [SELF.as_ptr() as usize, c"nothing".as_ptr() as usize, 0];
    for _ in 0..PROGRAMS {
        succeeds(Child::spawn(|| {
            let arguments = [SELF.as_ptr() as usize, arguments.as_ptr() as usize, 0, 0, 0, 0];
            // SAFETY: Replaces this program, or fails.
            u8::from(unsafe { sys::call(number::EXECVE, arguments) }.is_err())
        })?)?;
    }
    Ok(())
}

/// Maps memory, stores to each page, and unmaps it.
fn page_faults() -> report::Result {
    const SIZE: usize = 16 * MIB;
    for _ in 0..2 {
        anonymous(SIZE, false)?.touch();
    }
    Ok(())
}

/// Writes and reads a file of a file system in memory.
fn files() -> report::Result {
    const PATH: &CStr = c"/tmp/workload";
    transfer(&File::open(PATH, RDWR | CREAT | TRUNC)?, 8 * MIB, 4 * PAGE)?;
    File::open(PATH, RDWR | TRUNC)?;
    Ok(())
}

/// Writes and reads a disk, past the page cache: each page is a request to the device, and an interrupt.
fn disk() -> report::Result {
    transfer(&File::open(c"/dev/vda", RDWR | DIRECT)?, 2 * MIB, PAGE)
}

/// Writes so many bytes in pieces, and reads them.
fn transfer(file: &File, length: usize, piece: usize) -> report::Result {
    let memory = anonymous(piece, false)?;
    memory.touch();
    for (call, name) in [(number::PWRITE64, "write"), (number::PREAD64, "read")] {
        for offset in (0..length).step_by(piece) {
            // SAFETY: Reads or writes the mapping, into which no reference points.
            let done = unsafe { sys::call(call, [file.0, memory.address(), piece, offset, 0, 0]) }?;
            if done != piece {
                bail!("{name} of {done} bytes");
            }
        }
    }
    Ok(())
}

/// Memory in large pages, or in pages of 4 KiB only.
fn anonymous(size: usize, huge: bool) -> Result<Mapping, Errno> {
    let memory = Mapping::anonymous(size, sys::READ | sys::WRITE)?;
    memory.advise_huge(huge)?;
    Ok(memory)
}

fn succeeds(child: Child) -> report::Result {
    match child.wait()? {
        End::Exited(0) => Ok(()),
        end => bail!("a process ended with {end}"),
    }
}
