//! Output of a protected guest in five ways: it copies to a buffer that it shares for good, it shares its data where it is and takes
//! it back by calls while the VMM maps it for each transfer or for good, or it posts both in its ring,
//! and the VMM maps or reads it.
//!
//! The guest rings the bell of a device for so many transfers at once, and the VMM copies what they are about to its disk. Between
//! marks that QEMU's counter sees, elsewhere NOPs. A line `bench io.SCHEME.SIZE.TRANSFERS.ALIGNMENT ROUNDS` names each measurement.

use std::os::fd::AsFd;

use nix::sys::mman::MapFlags;
use nix::sys::uio::pread;
use ravelin_abi::{ConversionRequest, MAX_CONVERSION_PAGES, MAX_CONVERSIONS};
use ravelin_guest::{DEVICE, pattern};

use super::cases;
use crate::check::{Outcome, check_eq, works};
use crate::guest::{Guest, Stop, snippets};
use crate::kvm::{Exit, Kind};
use crate::machine::{MEMORY, Machine, Plan};
use crate::memory::{Mapping, PAGE};
use crate::runner::line;

cases! {
    contents[&[Kind::Pkvm]].seconds(120);
    schemes[&[Kind::Pkvm]].seconds(280).long();
}

const P: u64 = PAGE as u64;
const MIB: usize = 1 << 20;

/// Where the guest rings for transfers: it stores the address of their plan.
const BELL: u64 = DEVICE + P;

// Offsets in the guest's memory. What is in one half is converted while what was in the other one comes back.
/// Shared for good: plans, and what is copied.
const PLANS: usize = 0;
const PLAN_SIZE: usize = 64 << 10;
const BOUNCE: usize = 2 * MIB;
const BOUNCE_SIZE: usize = 8 * MIB;
/// Private: the ring and the data.
const RING: usize = MIB;
const DATA: usize = 12 * MIB;
const HALF: usize = 8 * MIB;
const SIZE: usize = DATA + 2 * HALF;

// Offsets in a plan.
const PIECES: usize = 0x1000;
const SEGMENTS: usize = 0x4000;

/// Distance of an unaligned buffer from its page.
const UNALIGNED: usize = 512;

snippets! {
    /// Carries out plans: x0 = address of the first one, x1 = that of the other one, x2 = how often both, x3 = the bell, x4 = the ring
    /// or 0 for calls. A plan has: number of pieces, their address, number of segments, their address, whether they have more pages
    /// than an exit does. A piece: from, to, bytes; a segment: its conversion. Returns the last status that is not 0.
    transfer:
        "mov x20, x0", "eor x21, x0, x1", "mov x22, x2", "lsl x22, x22, #1", "mov x23, x3", "mov x24, x4",
        "mov x28, xzr",
        "hint #0x40",
        "20: ldp x9, x10, [x20]",
        "cbz x9, 23f",
        // Copies.
        "21: ldp x11, x12, [x10], #16", "ldr x13, [x10], #8",
        "22: ldp x14, x15, [x11], #16", "ldp x16, x17, [x11], #16", "ldp x2, x3, [x11], #16", "ldp x4, x5, [x11], #16",
        "stp x14, x15, [x12], #16", "stp x16, x17, [x12], #16", "stp x2, x3, [x12], #16", "stp x4, x5, [x12], #16",
        "subs x13, x13, #64", "b.ne 22b",
        "subs x9, x9, #1", "b.ne 21b",
        "23: mov x25, xzr",
        // Shares, and once more takes back.
        "24: ldp x26, x27, [x20, #16]",
        "cbz x26, 29f",
        "25: ldr x12, [x27], #8", "orr x12, x12, x25, lsl #9",
        "cbnz x24, 27f",
        "and x1, x12, #0xfffffffffffff000", "and x2, x12, #0x1ff", "add x2, x2, #1", "mov x3, xzr",
        "movz x0, #3", "movk x0, #0xc600, lsl #16", "add x0, x0, x25",
        "hvc #0",
        "cbz x0, 28f",
        "mov x28, x0", "b 28f",
        // In the ring, when it has room: else it is done now.
        "26: movz x0, #0x39", "movk x0, #0xc600, lsl #16", "mov x1, xzr", "mov x2, xzr", "mov x3, xzr",
        "hvc #0",
        "27: ldr x9, [x24]", "ldr x10, [x24, #64]", "sub x10, x9, x10", "cmp x10, #64", "b.hs 26b",
        "and x10, x9, #63", "add x11, x24, #1024", "str x12, [x11, x10, lsl #3]", "add x9, x9, #1", "stlr x9, [x24]",
        "28: subs x26, x26, #1", "b.ne 25b",
        "29: cbnz x25, 30f",
        // More pages than an exit does.
        "ldr x9, [x20, #32]", "cbz x9, 33f", "cbz x24, 33f",
        "32: movz x0, #0x39", "movk x0, #0xc600, lsl #16", "mov x1, xzr", "mov x2, xzr", "mov x3, xzr",
        "hvc #0",
        "ldr x9, [x24]", "ldr x10, [x24, #64]", "cmp x9, x10", "b.ne 32b",
        "33: str x20, [x23]",
        "mov x25, #1", "b 24b",
        // The other plan.
        "30: eor x20, x20, x21",
        "subs x22, x22, #1", "b.ne 20b",
        // What is in the ring yet.
        "cbz x24, 31f",
        "movz x0, #0x39", "movk x0, #0xc600, lsl #16", "mov x1, xzr", "mov x2, xzr", "mov x3, xzr",
        "hvc #0",
        "31: hint #0x41",
        "mov x0, x28";

    /// Returns what the ring at x0 says: posted, done, and all results ored.
    ring_state:
        "mov x9, x0", "ldr x0, [x9]", "ldr x1, [x9, #64]", "add x9, x9, #2048", "mov x10, #64", "mov x2, xzr",
        "4: ldr x11, [x9], #8", "orr x2, x2, x11", "subs x10, x10, #1", "b.ne 4b";
}

/// How data come to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    /// By a copy in what is shared for good.
    Bounce,
    /// In place, by calls; mapped for each transfer.
    Map,
    /// In place, by calls; mapped for good.
    Stand,
    /// In place, by the ring; mapped for good.
    Ring,
    /// In place, by the ring; the VMM maps nothing, and reads from the file.
    Read,
}

const SCHEMES: [Scheme; 5] = [Scheme::Bounce, Scheme::Map, Scheme::Stand, Scheme::Ring, Scheme::Read];

/// Transfers at once.
#[derive(Clone, Copy, Debug)]
struct Load {
    scheme: Scheme,
    /// Bytes of each.
    size: usize,
    transfers: usize,
    aligned: bool,
    /// How often each of two halves.
    rounds: u64,
}

/// Bytes in the guest's memory from an offset on.
#[derive(Clone, Copy, Debug)]
struct Span {
    offset: usize,
    size: usize,
}

/// What a half of a load is made of.
#[derive(Debug, Default)]
struct Half {
    /// What the guest copies: from and to.
    pieces: Vec<(Span, usize)>,
    /// What it converts.
    segments: Vec<Span>,
    /// Where the VMM finds the data, in order.
    data: Vec<Span>,
}

impl Half {
    /// Lets the guest copy what is between two offsets to where the VMM finds it.
    fn copy(&mut self, bounce: &mut usize, from: usize, to: usize) {
        if from < to {
            let size = to - from;
            self.pieces.push((Span { offset: from, size }, *bounce));
            self.data.push(Span { offset: *bounce, size });
            *bounce += size;
        }
    }
}

impl Load {
    /// How far buffers are apart: what is converted has pages of its own.
    fn stride(&self) -> usize {
        self.size.next_multiple_of(PAGE) + if self.aligned { 0 } else { PAGE }
    }

    fn half(&self, half: usize) -> Half {
        let mut parts = Half::default();
        let mut bounce = BOUNCE + half * BOUNCE_SIZE / 2;
        for transfer in 0..self.transfers {
            let start = DATA + half * HALF + transfer * self.stride() + if self.aligned { 0 } else { UNALIGNED };
            let end = start + self.size;
            // Whole pages; those that hold something else besides are copied. A buffer that is aligned has its last page alone.
            let (mut first, mut last) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
            if self.aligned {
                last = end.next_multiple_of(PAGE);
            }
            if self.scheme == Scheme::Bounce || first >= last {
                (first, last) = (end, end);
            }
            parts.copy(&mut bounce, start, first.min(end));
            for offset in (first..last).step_by(MAX_CONVERSION_PAGES as usize * PAGE) {
                let size = (last - offset).min(MAX_CONVERSION_PAGES as usize * PAGE);
                parts.segments.push(Span { offset, size });
                parts.data.push(Span { offset, size: size.min(end - offset) });
            }
            parts.copy(&mut bounce, last.max(first), end);
        }
        parts
    }

    /// Writes the plan of a half.
    fn write(&self, machine: &Machine, half: usize) -> Outcome<Half> {
        let parts = self.half(half);
        let at = PLANS + half * PLAN_SIZE;
        let mapping = &machine.memory.mapping;
        let gpa = |offset: usize| MEMORY + offset as u64;
        let converted: usize = parts.segments.iter().map(|segment| segment.size).sum();
        // With those that the half before takes back.
        let many = 2 * converted > MAX_CONVERSION_PAGES as usize * PAGE;
        let head =
            [parts.pieces.len() as u64, gpa(at + PIECES), parts.segments.len() as u64, gpa(at + SEGMENTS), many.into()];
        let pieces = parts.pieces.iter().flat_map(|&(from, to)| [gpa(from.offset), gpa(to), from.size as u64]);
        let segments = parts.segments.iter().map(|segment| {
            let pages = (segment.size / PAGE) as u64;
            ConversionRequest { address: gpa(segment.offset), pages, unshare: false }.word()
        });
        for (offset, words) in
            [(0, head.to_vec()), (PIECES, pieces.collect::<Vec<_>>()), (SEGMENTS, segments.collect::<Vec<_>>())]
        {
            for (index, word) in words.into_iter().enumerate() {
                mapping.set(at + offset + index * 8, word)?;
            }
        }
        Ok(parts)
    }

    /// Lets the guest make its transfers, and plays the device.
    fn run(&self, machine: &Machine, guest: &mut Guest<'_>, disk: &mut [u8]) -> Outcome {
        let halves = [self.write(machine, 0)?, self.write(machine, 1)?];
        let plan = MEMORY + PLANS as u64;
        let ring = if matches!(self.scheme, Scheme::Ring | Scheme::Read) { MEMORY + RING as u64 } else { 0 };
        if ring != 0 {
            guest.attach_ring(ring)?;
        }
        guest.begin_code(transfer(), &[plan, plan + PLAN_SIZE as u64, self.rounds, BELL, ring])?;
        let mut rung = 0;
        let reply = loop {
            match guest.go()? {
                Stop::Done(reply) => break reply,
                Stop::Exit(Exit::Mmio { address: BELL, write: true, value, .. }) => {
                    let half = usize::from(value != plan);
                    rung += 1;
                    self.receive(machine, &halves[half], disk)?;
                }
                Stop::Exit(exit) => anyhow::bail!("{self:?}: {exit:x?}"),
            }
        };
        anyhow::ensure!(reply.exception.is_none(), "{self:?}: {reply:x?}");
        check_eq!((reply.x[0], rung), (0, 2 * self.rounds), "{self:?}: status and rings of the bell");
        if ring != 0 {
            let [posted, done, results, ..] = guest.run(ring_state(), &[ring])?;
            let conversions = 4 * self.rounds * halves[0].segments.len() as u64;
            check_eq!([posted, done, results], [conversions, conversions, 0], "{self:?}: the ring");
            guest.detach_ring(ring)?;
        }
        self.check(disk, 1)
    }

    /// Copies the data of a half to the disk.
    fn receive(&self, machine: &Machine, half: &Half, disk: &mut [u8]) -> Outcome {
        let memory = &machine.memory;
        let mut at = 0;
        for span in &half.data {
            let target = &mut disk[at..at + span.size];
            at += span.size;
            if self.scheme == Scheme::Map && span.offset >= DATA {
                let length = span.size.next_multiple_of(PAGE);
                let mapping = Mapping::new(memory.file()?.as_fd(), span.offset, length, MapFlags::MAP_SHARED);
                copy(&works("mmap", mapping)?, 0, target);
            } else if self.scheme == Scheme::Read && span.offset >= DATA {
                let length = target.len();
                check_eq!(pread(memory.file()?, target, i64::try_from(span.offset)?), Ok(length), "pread");
            } else {
                copy(&memory.mapping, span.offset, target);
            }
        }
        Ok(())
    }

    /// Checks that the disk has the data of a half.
    fn check(&self, disk: &[u8], half: usize) -> Outcome {
        for transfer in 0..self.transfers {
            let start = half * HALF + transfer * self.stride() + if self.aligned { 0 } else { UNALIGNED };
            let words = disk[transfer * self.size..][..self.size].as_chunks().0;
            for (index, &word) in words.iter().enumerate() {
                let at = start + index * 8;
                let expected = pattern((at / PAGE * PAGE) as u64, (at % PAGE / 8) as u64, SEED);
                check_eq!(u64::from_le_bytes(word), expected, "{self:?}: transfer {transfer} at {index}");
            }
        }
        Ok(())
    }
}

const SEED: u64 = 3;

/// Copies from memory that the guest may write to at the same time.
fn copy(from: &Mapping, offset: usize, to: &mut [u8]) {
    assert!(offset + to.len() <= from.size());
    // SAFETY: The mapping is there, and no object of Rust's is in it. The guest does not write there before it is told that the
    // transfer is done; if it did, the bytes would be any.
    unsafe { std::ptr::copy_nonoverlapping(from.pointer(offset).cast::<u8>(), to.as_mut_ptr(), to.len()) }
}

/// Makes a guest with its data.
fn with_guest(f: impl FnOnce(&Machine, &mut Guest<'_>, &mut [u8]) -> Outcome) -> Outcome {
    let machine = Plan::new(Kind::Pkvm, SIZE / PAGE).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY + DATA as u64, 2 * HALF as u64 / P, 0, SEED)?;
    for (offset, size) in [(PLANS, 2 * PLAN_SIZE), (BOUNCE, BOUNCE_SIZE)] {
        guest.fill(MEMORY + offset as u64, (size / PAGE) as u64, 0, 0)?;
        guest.share(MEMORY + offset as u64, (size / PAGE) as u64)?;
    }
    f(&machine, &mut guest, &mut vec![0; HALF])
}

/// Each way, with sizes that take every path.
fn contents(_: Kind) -> Outcome {
    with_guest(|machine, guest, disk| {
        for scheme in SCHEMES {
            for (size, transfers) in [(512, 1), (512, 5), (3 * PAGE, 3), (PAGE, MAX_CONVERSIONS), (4 * MIB, 1)] {
                for aligned in [true, false] {
                    disk.fill(0);
                    Load { scheme, size, transfers, aligned, rounds: 2 }.run(machine, guest, disk)?;
                }
            }
        }
        Ok(())
    })
}

/// How often each measurement is made: interrupts of the host come between.
const TRIES: u64 = 2;

fn schemes(_: Kind) -> Outcome {
    const KIB: usize = 1 << 10;
    const SIZES: [usize; 7] = [512, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB];
    const ROUNDS: u64 = 2;
    with_guest(|machine, guest, disk| {
        for scheme in SCHEMES {
            for size in SIZES {
                for (transfers, aligned) in [(1, true), (1, false), (8, true), (64, true)] {
                    if size * transfers > 4 * MIB {
                        continue;
                    }
                    let load = Load { scheme, size, transfers, aligned, rounds: ROUNDS };
                    // What meets pages that nobody has touched yet is none of it.
                    for _ in 0..TRIES {
                        load.run(machine, guest, disk)?;
                        let name = format!("{scheme:?}").to_lowercase();
                        let alignment = if aligned { "aligned" } else { "unaligned" };
                        line(&format!("bench io.{name}.{size}.{transfers}.{alignment} {}", 2 * ROUNDS));
                    }
                }
            }
        }
        Ok(())
    })
}
