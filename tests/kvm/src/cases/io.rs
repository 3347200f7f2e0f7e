//! Output of a protected guest in five ways: it copies to a buffer that it shares for good, it shares its data where it is and takes
//! it back by calls while the VMM maps it for each transfer or for good, or it posts both in its ring,
//! and the VMM maps or reads it.
//!
//! The guest rings the bell of a device for so many transfers at once, and the VMM copies what they are about to its disk. Between
//! marks that QEMU's counter sees, elsewhere NOPs. A line `bench io.SCHEME.SIZE.TRANSFERS.ALIGNMENT ROUNDS` names each measurement.
//!
//! Two vCPUs may do so at once, each for itself in a part of the memory and with a thread of the VMM on a CPU of its own. They begin
//! and end together; how many instructions the one that is done first has waited for the other comes behind the rounds:
//! `bench io.SCHEME.SIZE.TRANSFERS.ALIGNMENT.VCPUS ROUNDS WAITED`, where VCPUS is `both`, or the only one that does so, `0` or `1`.

use std::os::fd::AsFd;

use nix::sys::mman::MapFlags;
use nix::sys::uio::pread;
use nix::unistd::Pid;
use ravelin_abi::{ConversionRequest, MAX_CONVERSION_PAGES, MAX_CONVERSIONS};
use ravelin_guest::{DEVICE, pattern};

use super::cases;
use super::run::pin;
use crate::check::{Outcome, check_eq, skip, works};
use crate::guest::{Guest, Stop, clear, snippets};
use crate::host;
use crate::kvm::{Exit, Kind};
use crate::machine::{Backing, MEMORY, Machine, Plan};
use crate::memory::{Mapping, PAGE};
use crate::runner::line;

cases! {
    contents[&[Kind::Pkvm]].seconds(120);
    contents_on_two_vcpus[&[Kind::Pkvm]].seconds(240);
    schemes[&[Kind::Pkvm]].seconds(280).long();
    schemes_on_two_vcpus[&[Kind::Pkvm]].seconds(800).long();
}

const P: u64 = PAGE as u64;
const MIB: usize = 1 << 20;

/// What the host can map at once.
const BLOCK: usize = 2 * MIB;

/// Where the guest rings for transfers: it stores the address of their plan.
const BELL: u64 = DEVICE + P;

// Offsets in the part of the guest's memory that a vCPU has for itself. What is in one half is converted while what was in the other one comes back.
/// Shared for good: plans, and what is copied.
const PLANS: usize = 0;
const PLAN_SIZE: usize = 64 << 10;
const BOUNCE: usize = 2 * MIB;
const BOUNCE_SIZE: usize = 8 * MIB;
/// Private: the ring, words by which vCPUs meet, and the data.
const RING: usize = MIB;
const MEETING: usize = RING + PAGE;
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
    /// than an exit does. A piece: from, to, bytes; a segment: its conversion. x5 and x6 are the words by which this vCPU and another
    /// one meet, in the order of their addresses the first one's own and the other's, or 0. Returns the last status that is not 0, and
    /// how many instructions it has waited at the end.
    transfer:
        "mov x20, x0", "eor x21, x0, x1", "mov x22, x2", "lsl x22, x22, #1", "mov x23, x3", "mov x24, x4",
        "mov x28, xzr", "mov x19, x5", "mov x29, x6",
        // All are here when the first one begins, and the other one follows.
        "cbz x29, 36f",
        "cmp x19, x29", "b.lo 35f",
        "mov x9, #1", "stlr x9, [x19]",
        "34: ldar x9, [x29]", "cbz x9, 34b",
        "b 20f",
        "35: ldar x9, [x29]", "cbz x9, 35b",
        "36: hint #0x40",
        "cbz x29, 20f",
        "mov x9, #1", "stlr x9, [x19]",
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
        "31: mov x1, xzr",
        "cbz x29, 38f",
        "mov x9, #2", "stlr x9, [x19]",
        "37: ldar x9, [x29]", "cmp x9, #2", "b.eq 38f", "add x1, x1, #5", "b 37b",
        "38: cmp x19, x29", "b.hi 39f",
        "hint #0x41",
        "39: mov x0, x28";

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

/// A vCPU with its part of the memory, and the disk that its transfers go to.
#[derive(Debug)]
struct Lane<'a> {
    guest: Guest<'a>,
    /// Offset of the part in the guest's memory.
    base: usize,
    disk: Vec<u8>,
}

impl Lane<'_> {
    /// The guest's address of what is at an offset in the part.
    fn address(&self, offset: usize) -> u64 {
        MEMORY + (self.base + offset) as u64
    }

    /// What tells its data from those of another one.
    fn seed(&self) -> u64 {
        3 + (self.base / SIZE) as u64
    }
}

/// Bytes in the part from an offset on.
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
    fn write(&self, machine: &Machine, lane: &Lane<'_>, half: usize) -> Outcome<Half> {
        let parts = self.half(half);
        let at = PLANS + half * PLAN_SIZE;
        let mapping = &machine.memory.mapping;
        let gpa = |offset| lane.address(offset);
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
                mapping.set(lane.base + at + offset + index * 8, word)?;
            }
        }
        Ok(parts)
    }

    /// Lets a guest make its transfers, and plays the device.
    fn run(&self, machine: &Machine, lane: &mut Lane<'_>) -> Outcome {
        self.run_and_meet(machine, lane, [0, 0]).map(drop)
    }

    /// Lets each guest make its transfers, at the same time and on a CPU of its own. Returns how many instructions they have waited
    /// for each other.
    fn run_together(&self, machine: &Machine, lanes: &mut [Lane<'_>]) -> Outcome<u64> {
        let [one, other] = [0, 64].map(|offset| lanes[0].address(MEETING + offset));
        lanes[0].guest.run(clear(), &[lanes[0].address(MEETING)])?;
        let meetings = match lanes.len() {
            1 => [[0, 0]; 2],
            _ => [[one, other], [other, one]],
        };
        std::thread::scope(|scope| {
            let spawn = |(cpu, (lane, meeting)): (usize, (_, _))| {
                scope.spawn(move || -> Outcome<u64> {
                    pin(Pid::from_raw(0), cpu)?;
                    // The other one waits until the time of the case is up.
                    self.run_and_meet(machine, lane, meeting)
                        .inspect_err(|error| line(&format!("vCPU {cpu}: {error:#}")))
                })
            };
            let threads: Vec<_> = lanes.iter_mut().zip(meetings).enumerate().map(spawn).collect();
            let waited = threads.into_iter().map(|it| it.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?);
            waited.sum()
        })
    }

    /// Lets a guest make its transfers when another one does, if there is one. Returns how many instructions it has waited.
    fn run_and_meet(&self, machine: &Machine, lane: &mut Lane<'_>, meeting: [u64; 2]) -> Outcome<u64> {
        let halves = [self.write(machine, lane, 0)?, self.write(machine, lane, 1)?];
        let plan = lane.address(PLANS);
        let ring = if matches!(self.scheme, Scheme::Ring | Scheme::Read) { lane.address(RING) } else { 0 };
        if ring != 0 {
            lane.guest.attach_ring(ring)?;
        }
        let [own, other] = meeting;
        let arguments = [plan, plan + PLAN_SIZE as u64, self.rounds, BELL, ring, own, other];
        lane.guest.begin_code(transfer(), &arguments)?;
        // Where single pages were mapped, the one that stands has no blocks any more.
        let anew = self.size >= BLOCK && matches!(self.scheme, Scheme::Stand | Scheme::Ring);
        let all = lane.base + SIZE;
        let anew = if anew { Some(works("mmap", Mapping::shared(machine.memory.file()?, all))?) } else { None };
        let standing = anew.as_ref().unwrap_or(&machine.memory.mapping);
        let mut rung = 0;
        let reply = loop {
            match lane.guest.go()? {
                Stop::Done(reply) => break reply,
                Stop::Exit(Exit::Mmio { address: BELL, write: true, value, .. }) => {
                    let half = usize::from(value != plan);
                    rung += 1;
                    self.receive(machine, standing, &halves[half], lane)?;
                }
                Stop::Exit(exit) => anyhow::bail!("{self:?}: {exit:x?}"),
            }
        };
        anyhow::ensure!(reply.exception.is_none(), "{self:?}: {reply:x?}");
        check_eq!((reply.x[0], rung), (0, 2 * self.rounds), "{self:?}: status and rings of the bell");
        if ring != 0 {
            let [posted, done, results, ..] = lane.guest.run(ring_state(), &[ring])?;
            let conversions = 4 * self.rounds * halves[0].segments.len() as u64;
            check_eq!([posted, done, results], [conversions, conversions, 0], "{self:?}: the ring");
            lane.guest.detach_ring(ring)?;
        }
        self.check(lane, 1)?;
        Ok(reply.x[1])
    }

    /// Copies the data of a half to the disk.
    fn receive(&self, machine: &Machine, standing: &Mapping, half: &Half, lane: &mut Lane<'_>) -> Outcome {
        let memory = &machine.memory;
        let mut at = 0;
        for span in &half.data {
            let target = &mut lane.disk[at..at + span.size];
            at += span.size;
            let offset = lane.base + span.offset;
            if self.scheme == Scheme::Map && span.offset >= DATA {
                let length = span.size.next_multiple_of(PAGE);
                let mapping = Mapping::new(memory.file()?.as_fd(), offset, length, MapFlags::MAP_SHARED);
                copy(&works("mmap", mapping)?, 0, target);
            } else if self.scheme == Scheme::Read && span.offset >= DATA {
                let length = target.len();
                check_eq!(pread(memory.file()?, target, i64::try_from(offset)?), Ok(length), "pread");
            } else {
                copy(standing, offset, target);
            }
        }
        Ok(())
    }

    /// Checks that the disk has the data of a half.
    fn check(&self, lane: &Lane<'_>, half: usize) -> Outcome {
        for transfer in 0..self.transfers {
            let start = half * HALF + transfer * self.stride() + if self.aligned { 0 } else { UNALIGNED };
            let words = lane.disk[transfer * self.size..][..self.size].as_chunks().0;
            for (index, &word) in words.iter().enumerate() {
                let at = start + index * 8;
                let expected = pattern((at / PAGE * PAGE) as u64, (at % PAGE / 8) as u64, lane.seed());
                check_eq!(u64::from_le_bytes(word), expected, "{self:?}: transfer {transfer} at {index}");
            }
        }
        Ok(())
    }
}

/// Copies from memory that the guest may write to at the same time.
fn copy(from: &Mapping, offset: usize, to: &mut [u8]) {
    assert!(offset + to.len() <= from.size());
    // SAFETY: The mapping is there, and no object of Rust's is in it. The guest does not write there before it is told that the
    // transfer is done; if it did, the bytes would be any.
    unsafe { std::ptr::copy_nonoverlapping(from.pointer(offset).cast::<u8>(), to.as_mut_ptr(), to.len()) }
}

/// Makes a guest of so many vCPUs with their data, each of which has a CPU for itself.
fn with_guest(vcpus: usize, backing: Backing, f: impl FnOnce(&Machine, &mut [Lane<'_>]) -> Outcome) -> Outcome {
    if host::cpus() < vcpus {
        skip!("fewer CPUs than vCPUs");
    }
    let machine = Plan::new(Kind::Pkvm, vcpus * SIZE / PAGE).backing(backing).vcpus(vcpus as u64).build()?;
    let mut guests = vec![machine.boot()?];
    for index in 1..vcpus {
        check_eq!(guests[0].cpu_on(index as u64)?, 0, "CPU_ON of vCPU {index}");
        guests.push(machine.guest(index));
    }
    let lane = |(index, guest)| Lane { guest, base: index * SIZE, disk: vec![0; HALF] };
    let mut lanes: Vec<_> = guests.into_iter().enumerate().map(lane).collect();
    for lane in &mut lanes {
        let (data, seed) = (lane.address(DATA), lane.seed());
        lane.guest.fill(data, 2 * HALF as u64 / P, 0, seed)?;
        for (offset, size) in [(PLANS, 2 * PLAN_SIZE), (BOUNCE, BOUNCE_SIZE)] {
            let (at, pages) = (lane.address(offset), (size / PAGE) as u64);
            lane.guest.fill(at, pages, 0, 0)?;
            lane.guest.share(at, pages)?;
        }
    }
    f(&machine, &mut lanes)
}

/// Each way, with sizes that take every path.
fn contents(_: Kind) -> Outcome {
    for backing in [Backing::Memfd, Backing::NoPin] {
        with_guest(1, backing, |machine, lanes| {
            for scheme in SCHEMES {
                for (size, transfers) in [(512, 1), (512, 5), (3 * PAGE, 3), (PAGE, MAX_CONVERSIONS), (4 * MIB, 1)] {
                    for aligned in [true, false] {
                        lanes[0].disk.fill(0);
                        Load { scheme, size, transfers, aligned, rounds: 2 }.run(machine, &mut lanes[0])?;
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Each way, by two vCPUs at once.
fn contents_on_two_vcpus(_: Kind) -> Outcome {
    const LOADS: [(usize, usize, bool); 4] =
        [(PAGE, MAX_CONVERSIONS, true), (3 * PAGE, 3, false), (MIB, 1, true), (BLOCK, 1, true)];
    for backing in [Backing::Memfd, Backing::NoPin] {
        with_guest(2, backing, |machine, lanes| {
            for scheme in SCHEMES {
                for (size, transfers, aligned) in LOADS {
                    lanes.iter_mut().for_each(|lane| lane.disk.fill(0));
                    Load { scheme, size, transfers, aligned, rounds: 4 }.run_together(machine, lanes)?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// How often each measurement is made: interrupts of the host come between.
const TRIES: u64 = 2;

const KIB: usize = 1 << 10;

impl Load {
    /// Names it and how often it has been measured.
    fn label(&self) -> String {
        let Self { scheme, size, transfers, aligned, .. } = self;
        let name = format!("{scheme:?}").to_lowercase();
        format!("bench io.{name}.{size}.{transfers}.{}", if *aligned { "aligned" } else { "unaligned" })
    }
}

fn schemes(_: Kind) -> Outcome {
    const SIZES: [usize; 8] = [512, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 2 * MIB, 4 * MIB];
    const ROUNDS: u64 = 2;
    with_guest(1, Backing::NoPin, |machine, lanes| {
        for scheme in SCHEMES {
            for size in SIZES {
                for (transfers, aligned) in [1, 8, 64].into_iter().flat_map(|it| [(it, true), (it, false)]) {
                    if size * transfers > 4 * MIB {
                        continue;
                    }
                    let load = Load { scheme, size, transfers, aligned, rounds: ROUNDS };
                    // What meets pages that nobody has touched yet is none of it.
                    for _ in 0..TRIES {
                        load.run(machine, &mut lanes[0])?;
                        line(&format!("{} {}", load.label(), 2 * ROUNDS));
                    }
                }
            }
        }
        Ok(())
    })
}

/// Each of two vCPUs alone, as their memories differ, and then both at once.
fn schemes_on_two_vcpus(_: Kind) -> Outcome {
    // Bytes, transfers at once, whether they are aligned, rounds.
    const LOADS: [(usize, usize, bool, u64); 8] = [
        (4 * KIB, 1, true, 8),
        (64 * KIB, 1, true, 8),
        (64 * KIB, 1, false, 8),
        (MIB, 1, true, 2),
        (4 * MIB, 1, true, 1),
        (4 * KIB, 8, true, 4),
        (64 * KIB, 8, true, 4),
        (4 * KIB, 64, true, 1),
    ];
    with_guest(2, Backing::NoPin, |machine, lanes| {
        for scheme in SCHEMES {
            for (size, transfers, aligned, rounds) in LOADS {
                let load = Load { scheme, size, transfers, aligned, rounds };
                for (name, vcpus) in [("0", 0..1), ("1", 1..2), ("both", 0..2)] {
                    for _ in 0..TRIES {
                        let waited = load.run_together(machine, &mut lanes[vcpus.clone()])?;
                        line(&format!("{}.{name} {} {waited}", load.label(), 2 * rounds));
                    }
                }
            }
        }
        Ok(())
    })
}
