//! CPUs: stacks, turning them on and off through PSCI, and running closures on them.

use core::{
    arch::asm,
    cell::UnsafeCell,
    mem,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use crate::rt::{call::psci, gic, platform::platform};

/// Most CPUs that tests use.
pub(crate) const MAX_CPUS: usize = 8;

/// Size of the stack of one CPU in bytes.
pub(crate) const STACK_SIZE: usize = 128 << 10;

#[repr(C, align(4096))]
pub(crate) struct Stacks(UnsafeCell<[[u8; STACK_SIZE]; MAX_CPUS]>);

#[expect(unsafe_code, reason = "each CPU has a part of its own")]
// SAFETY: Only the assembly uses the stacks, each CPU its own.
unsafe impl Sync for Stacks {}

/// The stacks; the assembly finds the boot CPU's here.
pub(crate) static STACKS: Stacks = Stacks(UnsafeCell::new([[0; STACK_SIZE]; MAX_CPUS]));

/// What a CPU was entered with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryState {
    /// x0: the context id of CPU_ON. Of the boot CPU, the bits that are set in x1, x2 or x3.
    pub(crate) context: u64,
    pub(crate) sctlr: u64,
    pub(crate) daif: u64,
    pub(crate) current_el: u64,
    pub(crate) spsel: u64,
}

type Job<'a> = &'a (dyn Fn(usize) + Sync);

/// What the other CPUs know of one CPU.
struct Slot {
    online: AtomicBool,
    entries: AtomicU64,
    entry: [AtomicU64; 5],
    has_job: AtomicBool,
    job: UnsafeCell<Option<Job<'static>>>,
}

#[expect(unsafe_code, reason = "the job is handed over through has_job")]
// SAFETY: `job` is written while `has_job` is false and read while it is true.
unsafe impl Sync for Slot {}

static SLOTS: [Slot; MAX_CPUS] = [const {
    Slot {
        online: AtomicBool::new(false),
        entries: AtomicU64::new(0),
        entry: [const { AtomicU64::new(0) }; 5],
        has_job: AtomicBool::new(false),
        job: UnsafeCell::new(None),
    }
}; MAX_CPUS];

/// The affinity fields of this CPU's MPIDR_EL1.
pub(crate) fn mpidr() -> u64 {
    read_register!("mpidr_el1") & 0xFF_00FF_FFFF
}

/// Number of this CPU in the platform's list.
pub(crate) fn this() -> usize {
    let own = mpidr();
    platform().cpus.iter().position(|&cpu| cpu == own).expect("this CPU is in the device tree")
}

/// Prepares the boot CPU and notes how it was entered.
pub(crate) fn init_boot(state: EntryState) {
    gic::prepare(0);
    note_entry(0, state);
}

fn note_entry(cpu: usize, state: EntryState) {
    let slot = &SLOTS[cpu];
    let values = [state.context, state.sctlr, state.daif, state.current_el, state.spsel];
    for (cell, value) in slot.entry.iter().zip(values) {
        cell.store(value, Ordering::Relaxed);
    }
    slot.entries.fetch_add(1, Ordering::Relaxed);
    slot.online.store(true, Ordering::Release);
}

/// How the CPU was last entered.
pub(crate) fn entry_state(cpu: usize) -> EntryState {
    let [context, sctlr, daif, current_el, spsel] =
        [0, 1, 2, 3, 4].map(|i| SLOTS[cpu].entry[i].load(Ordering::Relaxed));
    EntryState { context, sctlr, daif, current_el, spsel }
}

/// How often the CPU has been entered.
pub(crate) fn entries(cpu: usize) -> u64 {
    SLOTS[cpu].entries.load(Ordering::Relaxed)
}

/// Whether the CPU runs and takes jobs.
pub(crate) fn is_online(cpu: usize) -> bool {
    SLOTS[cpu].online.load(Ordering::Acquire)
}

/// Context id for CPU_ON: the top of the CPU's stack with a `tag` of 4 bits.
pub(crate) fn context(cpu: usize, tag: u64) -> u64 {
    (STACKS.0.get().addr() + (cpu + 1) * STACK_SIZE) as u64 | tag & 0xf
}

/// Physical address where CPU_ON lets a CPU start.
#[expect(unsafe_code, reason = "address of an assembly routine")]
pub(crate) fn entry_point() -> u64 {
    unsafe extern "C" {
        fn secondary_entry();
    }
    (secondary_entry as *const ()).expose_provenance() as u64
}

/// A secondary CPU's loop: run what is handed over, for ever.
pub(crate) fn serve(state: EntryState) -> ! {
    let cpu = this();
    gic::prepare(cpu);
    note_entry(cpu, state);
    let slot = &SLOTS[cpu];
    loop {
        if slot.has_job.load(Ordering::Acquire) {
            if let Some(job) = take_job(slot) {
                job(cpu);
            }
            slot.has_job.store(false, Ordering::Release);
        }
        wait();
    }
}

#[expect(unsafe_code, reason = "the job is handed over through has_job")]
fn take_job(slot: &Slot) -> Option<Job<'static>> {
    // SAFETY: `has_job` is true, so that the CPU which handed the job over does not touch the cell.
    unsafe { (*slot.job.get()).take() }
}

/// Waits a little, for other CPUs to do something.
pub(crate) fn wait() {
    gic::nap();
}

/// Hands `job` to a CPU that is online and idle, without waiting.
#[expect(unsafe_code, reason = "the lifetime of the job is kept by hand")]
fn start<'a>(cpu: usize, job: Job<'a>) {
    let slot = &SLOTS[cpu];
    assert!(is_online(cpu), "CPU {cpu} is off");
    assert!(!slot.has_job.load(Ordering::Acquire), "CPU {cpu} is busy");
    // SAFETY: Only the lifetime changes. `run_on` returns when the other CPU has finished with the job.
    let job = unsafe { mem::transmute::<Job<'a>, Job<'static>>(job) };
    let cell = slot.job.get();
    // SAFETY: `has_job` is false, so that the other CPU does not touch the cell.
    unsafe { *cell = Some(job) };
    slot.has_job.store(true, Ordering::Release);
}

/// Runs `job` on the given CPUs (not this one), and `meanwhile` here; returns when all are done.
pub(crate) fn run_on<T>(cpus: &[usize], job: Job<'_>, meanwhile: impl FnOnce() -> T) -> T {
    for &cpu in cpus {
        start(cpu, job);
    }
    let result = meanwhile();
    for &cpu in cpus {
        while SLOTS[cpu].has_job.load(Ordering::Acquire) {
            wait();
        }
    }
    result
}

/// Runs `job` on every CPU, this one included.
pub(crate) fn run_on_all(job: Job<'_>) {
    let mut others = [0; MAX_CPUS];
    let count = platform().cpus.len();
    let own = this();
    let mut used = 0;
    for cpu in (0..count).filter(|&cpu| cpu != own) {
        others[used] = cpu;
        used += 1;
    }
    run_on(&others[..used], job, || job(own));
}

/// Turns a CPU on and waits until it serves.
pub(crate) fn turn_on(cpu: usize) -> Result<(), i64> {
    let status = psci_on(cpu, 0);
    if status != psci::SUCCESS {
        return Err(status);
    }
    while !is_online(cpu) {
        wait();
    }
    Ok(())
}

/// Calls `function` (CPU_OFF or CPU_SUSPEND), after which this CPU may have to come back through its entry point. Returns the
/// status, or `None` if it did.
#[expect(unsafe_code, reason = "saves and restores what a CPU loses")]
pub(crate) fn power_down(function: u64, power_state: u64) -> Option<i64> {
    let status: i64;
    // SAFETY: The routine follows the procedure call standard, also if the CPU loses its state in between.
    unsafe {
        asm!("bl call_and_resume", inlateout("x0") function => status, inlateout("x1") power_state => _, clobber_abi("C"));
    }
    if status != 1 {
        return Some(status);
    }
    gic::prepare(this());
    None
}

/// Entry point and context id with which a CPU comes back from [`power_down`].
#[expect(unsafe_code, reason = "symbols of the assembly")]
pub(crate) fn resume() -> (u64, u64) {
    unsafe extern "C" {
        fn resume_entry();
        static resume_context: AtomicU64;
    }
    let entry = (resume_entry as *const ()).expose_provenance() as u64;
    // SAFETY: The assembly defines it, and every access is atomic.
    let context = unsafe { &resume_context };
    (entry, context.load(Ordering::Acquire))
}

/// CPU_ON as it should be called.
pub(crate) fn psci_on(cpu: usize, tag: u64) -> i64 {
    psci(psci::CPU_ON, platform().cpus[cpu], entry_point(), context(cpu, tag))
}

/// Lets a CPU turn itself off and waits until PSCI reports it so.
pub(crate) fn turn_off(cpu: usize) {
    let slot = &SLOTS[cpu];
    slot.online.store(true, Ordering::Relaxed);
    start(cpu, &|cpu| {
        SLOTS[cpu].online.store(false, Ordering::Relaxed);
        SLOTS[cpu].has_job.store(false, Ordering::Release);
        let status = psci(psci::CPU_OFF, 0, 0, 0);
        panic!("CPU_OFF of CPU {cpu} returned {status}");
    });
    while psci(psci::AFFINITY_INFO, platform().cpus[cpu], 0, 0) != psci::AFFINITY_OFF {
        wait();
    }
}

/// Reads a system register by its name.
macro_rules! read_register {
    ($name:literal) => {{
        let value: u64;
        #[expect(unsafe_code, reason = "a system register")]
        // SAFETY: Reading these registers has no side effects.
        unsafe {
            core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack, nomem));
        }
        value
    }};
}

/// Writes a system register by its name.
macro_rules! write_register {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        #[expect(unsafe_code, reason = "a system register")]
        // SAFETY: The runtime does not depend on the registers that are written this way.
        unsafe {
            core::arch::asm!(concat!("msr ", $name, ", {}"), "isb", in(reg) value, options(nostack));
        }
    }};
}

/// Executes an instruction without operands.
macro_rules! instruction {
    ($text:literal) => {{
        #[expect(unsafe_code, reason = "a single instruction")]
        // SAFETY: A hint, a barrier or maintenance, without effect on what Rust knows of.
        unsafe {
            core::arch::asm!($text, options(nostack));
        }
    }};
}

pub(crate) use {instruction, read_register, write_register};
