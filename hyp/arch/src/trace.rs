//! Records what the CPU does to translation tables and TLBs, for [`ravelin_trace`].
//!
//! Each event is handed to `trace_record`, which the image defines, immediately before it happens; the records of one CPU are
//! in program order. The image gives places in the stream under one lock. That the order of the stream is the order of the
//! events, as far as any event depends on another, is for these reasons:
//!
//! * Table pages and what they hold belong to one lock at a time, that of a region of `Memory`, of a guest, or of a realm's block. A
//!   record *lock* comes after its acquisition, *unlock* before its release, all that is done in between lies between the two, and
//!   what the next holder does lies behind. So the stores to, and the maintenance of, one tree are in the order in which they happen.
//! * A page goes from one tree or region to another through the pool, a list of spare pages, or the host: it is recorded as free before
//!   it gets there.
//! * Registers are a CPU's own, and so are barriers.
//!
//! Records of different CPUs that none of this relates may be in either order, and then so may be the events.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use ravelin_memory::{Level, PAGE_SIZE, PhysAddr};
use ravelin_pgtable::{self as pgtable, Descriptor, Kind, Machine};
use ravelin_trace::{
    Barrier, CPU_START, Dsb, ENTRY, FIRST_TABLES, Hint, MemOrder, Packed, Record, SWITCH, Step, Sysreg, TlbiOp,
};

use crate::{boot::CpuStart, hardware::Hardware, sysreg::read_sysreg};

unsafe extern "Rust" {
    /// Takes the next record, in the order of the trace.
    safe fn trace_record(record: Packed);
    /// Writes out what it has gathered, because its memory is about to be left.
    safe fn trace_flush();
}

/// Index of the CPU that boots, for as long as it has no [`CpuStart`].
static BOOT_CPU: AtomicUsize = AtomicUsize::new(0);

/// Whether the CPU that boots is on its way through `switch_to_carveout`, which has been recorded already.
static SWITCHING: AtomicBool = AtomicBool::new(false);

/// What an instruction is to the trace.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Instruction {
    /// Nothing.
    Other,
    Barrier(Barrier),
    Tlbi(TlbiOp),
    /// The form of the operation for a range.
    RangeTlbi(TlbiOp),
}

impl Instruction {
    /// Returns what an instruction is. Fails to compile for one that is not listed here.
    pub(crate) const fn of(assembly: &str) -> Self {
        match assembly.as_bytes() {
            b"dsb ish" => Self::Barrier(Barrier::Dsb(Dsb::Ish)),
            b"dsb ishst" => Self::Barrier(Barrier::Dsb(Dsb::Ishst)),
            b"dsb nsh" => Self::Barrier(Barrier::Dsb(Dsb::Nsh)),
            b"dsb sy" => Self::Barrier(Barrier::Dsb(Dsb::Sy)),
            b"isb" => Self::Barrier(Barrier::Isb),
            b"tlbi vmalls12e1is" => Self::Tlbi(TlbiOp::Vmalls12e1is),
            b"tlbi vmalls12e1" => Self::Tlbi(TlbiOp::Vmalls12e1),
            b"tlbi vmalle1is" => Self::Tlbi(TlbiOp::Vmalle1is),
            b"tlbi vmalle1" => Self::Tlbi(TlbiOp::Vmalle1),
            b"tlbi alle2is" => Self::Tlbi(TlbiOp::Alle2is),
            b"tlbi alle2" => Self::Tlbi(TlbiOp::Alle2),
            b"tlbi ipas2e1is, {}" => Self::Tlbi(TlbiOp::Ipas2e1is),
            b"tlbi ipas2le1is, {}" => Self::Tlbi(TlbiOp::Ipas2le1is),
            b"tlbi vae2is, {}" => Self::Tlbi(TlbiOp::Vae2is),
            b"sys #4, c8, c0, #2, {}" => Self::RangeTlbi(TlbiOp::Ipas2e1is),
            b"sys #4, c8, c0, #6, {}" => Self::RangeTlbi(TlbiOp::Ipas2le1is),
            b"sys #4, c8, c2, #1, {}" => Self::RangeTlbi(TlbiOp::Vae2is),
            b"hint #17" | b"hint #18" | b"ic ialluis" => Self::Other,
            _ => panic!("an instruction that the trace does not know"),
        }
    }
}

/// Returns the register that the assembler names so, if it is one of the trace.
pub(crate) const fn register(name: &str) -> Option<Sysreg> {
    match name.as_bytes() {
        b"vttbr_el2" => Some(Sysreg::VttbrEl2),
        b"vtcr_el2" => Some(Sysreg::VtcrEl2),
        b"hcr_el2" => Some(Sysreg::HcrEl2),
        _ => None,
    }
}

fn tid() -> u8 {
    let index = CpuStart::current().map_or_else(|| BOOT_CPU.load(Relaxed), CpuStart::index);
    u8::try_from(index).unwrap_or(u8::MAX)
}

fn record(record: Record) {
    trace_record(Packed::of(tid(), record));
}

/// Records an instruction, with its operand or 0.
pub(crate) fn execute(instruction: Instruction, operand: u64) {
    match instruction {
        Instruction::Other => {}
        Instruction::Barrier(barrier) => record(Record::Barrier(barrier)),
        Instruction::Tlbi(op) => record(Record::Tlbi { op, operand }),
        Instruction::RangeTlbi(op) => trace_record(Packed::of_range(tid(), op, operand)),
    }
}

/// Records the write of a system register.
pub(crate) fn write_register(register: Option<Sysreg>, value: u64) {
    if let Some(register) = register {
        record(Record::SysregWrite { register, value });
    }
}

/// Records the store of a descriptor.
pub(crate) fn write(table: PhysAddr, index: usize, value: u64) {
    let address = table.raw() + 8 * index as u64;
    record(Record::MemWrite { order: MemOrder::Plain, address, value });
}

/// Records that a table was zeroed.
pub(crate) fn init(table: PhysAddr) {
    record(Record::MemInit { address: table.raw(), size: PAGE_SIZE });
}

/// Records a hint of the page tables'.
pub(crate) fn hint(hint: pgtable::Hint) {
    use pgtable::Hint::{Free, Lock, Owner, RegionLock, Release, RootLock, Unlock};
    let about = |kind, location: PhysAddr, value| Record::Hint { kind, location: location.raw(), value };
    record(match hint {
        Lock(lock) => Record::Lock(lock.raw()),
        Unlock(lock) => Record::Unlock(lock.raw()),
        RootLock { root, lock } => about(Hint::SetRootLock, root, lock.raw()),
        // The size is a power of two, so its logarithm fits below the address.
        RegionLock { lock, base, size } => {
            about(Hint::SetRegionLock, lock, base.raw() | u64::from(size.trailing_zeros()))
        }
        Owner { table, root } => about(Hint::SetOwnerRoot, table, root.raw()),
        pgtable::Hint::Overwrite(table) => Record::MemInit { address: table.raw(), size: PAGE_SIZE },
        Free(table) => Record::MemFree { address: table.raw(), size: PAGE_SIZE },
        Release(root) => about(Hint::ReleaseTable, root, 0),
    });
}

/// Begins a trace on CPU `cpu`, the only one that runs: records the first tables, at `root`, which the assembly has built, and
/// what it did with them. They have a lock of their own, which is free.
pub fn begin(machine: &Hardware, root: PhysAddr, cpu: usize) {
    BOOT_CPU.store(cpu, Relaxed);
    steps(ENTRY, mmu_off);
    hint(pgtable::Hint::RootLock { root, lock: root });
    hint(pgtable::Hint::Lock(root));
    first_table(machine, root, root, Level::L0);
    steps(FIRST_TABLES, |register| match register {
        Sysreg::MairEl2 => read_sysreg!("mair_el2"),
        Sysreg::TcrEl2 => read_sysreg!("tcr_el2"),
        Sysreg::Ttbr0El2 => read_sysreg!("ttbr0_el2"),
        _ => read_sysreg!("sctlr_el2"),
    });
    record(Record::Barrier(Barrier::Isb));
    hint(pgtable::Hint::Unlock(root));
}

/// Records steps of the assembly, with the value that each register was given.
fn steps(steps: &[Step], value: impl Fn(Sysreg) -> u64) {
    for step in steps {
        match *step {
            Step::Write(register) => write_register(Some(register), value(register)),
            Step::Barrier(barrier) => record(Record::Barrier(barrier)),
            Step::Tlbi(op) => record(Record::Tlbi { op, operand: 0 }),
        }
    }
}

/// The values of HCR_EL2 and SCTLR_EL2 with the MMU off, as far as they count.
fn mmu_off(register: Sysreg) -> u64 {
    const SCTLR_M: u64 = 1;
    match register {
        Sysreg::HcrEl2 => read_sysreg!("hcr_el2"),
        _ => read_sysreg!("sctlr_el2") & !SCTLR_M,
    }
}

/// Records a table that is in use already, and those below it.
fn first_table(machine: &Hardware, root: PhysAddr, table: PhysAddr, level: Level) {
    init(table);
    hint(pgtable::Hint::Owner { table, root });
    for (next, below) in linked(machine, table, level) {
        first_table(machine, root, next, below);
    }
    for index in 0..512 {
        let descriptor = machine.read(table, index);
        if descriptor != 0 {
            write(table, index, descriptor);
        }
    }
}

/// Records that a table, and those below it, are tables no more.
fn last_table(machine: &Hardware, table: PhysAddr, level: Level) {
    for (next, below) in linked(machine, table, level) {
        last_table(machine, next, below);
    }
    hint(pgtable::Hint::Free(table));
}

/// Returns the tables that `table` links, and their level.
fn linked(machine: &Hardware, table: PhysAddr, level: Level) -> impl Iterator<Item = (PhysAddr, Level)> {
    (0..512).filter_map(move |index| match Descriptor::from_bits(machine.read(table, index)).kind(level) {
        Kind::Table(next) => Some((next, level.next()?)),
        _ => None,
    })
}

/// Records what [`CpuStart::switch`] is about to do with the tables that `start` names. Others that are in use are given up:
/// those of start-up lie in memory that will be the host's.
pub(crate) fn switching(start: &CpuStart) {
    steps(SWITCH, mmu_off);
    start_up(start);
    let ([next, ..], root) = (start.registers(), read_sysreg!("ttbr0_el2"));
    if root != next {
        // SAFETY: The MMU is on, and the tables in use are mapped in themselves; they are read only.
        let machine = unsafe { Hardware::new() };
        let root = PhysAddr::from_bits_truncating(root);
        hint(pgtable::Hint::Release(root));
        last_table(&machine, root, Level::L0);
    }
    SWITCHING.store(true, Relaxed);
    trace_flush();
}

/// Records how this CPU has come from firmware to its tables, unless it has come by [`CpuStart::switch`].
pub fn started(start: &CpuStart) {
    if !SWITCHING.swap(false, Relaxed) {
        steps(ENTRY, mmu_off);
        start_up(start);
    }
}

fn start_up(start: &CpuStart) {
    let [ttbr0, tcr, mair, sctlr] = start.registers();
    steps(CPU_START, |register| match register {
        Sysreg::Ttbr0El2 => ttbr0,
        Sysreg::TcrEl2 => tcr,
        Sysreg::MairEl2 => mair,
        _ => sctlr,
    });
}
