//! The image in the carve-out: it takes over memory, enters the host and serves it from then on.

#![expect(
    unsafe_code,
    reason = "makes objects of the memory that start-up set apart, and is called from assembly by name"
)]

use core::{ptr, slice};

use arrayvec::ArrayVec;
use ravelin_arch::{
    CpuStart, El3, Exit, Hardware, HostFrame, Objects, enable_stage2, halt, host_exit as read_exit, prepare_cpu,
    pstate_features, secondary_entry, skip_instruction, take_exception, trapped,
};
use ravelin_hypercall::{
    Cpu, Entries, Exception, FaultAction, Firmware, Host, HostedVms, PstateFeatures, Registers, Trapped,
};
use ravelin_memory::{Ipa, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_ownership::{Memory, OwnershipTable, PAGES_PER_BLOCK};
use ravelin_pgtable::{El2, Geometry, Hint, Machine, PageTable, PhysicalSize, Stage2};
use ravelin_platform::{Layout, LogLevel, MAX_RAM_REGIONS, MAX_REDISTRIBUTOR_REGIONS, START_STACK_PAGES};
use spin::once::Once;

#[cfg(feature = "checked")]
use crate::checked;
use crate::{console, panic, pool::Pool};

/// What the host's exits are handled on.
#[cfg(not(feature = "checked"))]
type ThisCpu = Hardware;
#[cfg(feature = "checked")]
type ThisCpu = checked::Checked;

pub(crate) static MEMORY: Once<Memory<'static, Pool>> = Once::new();
static HYPERVISOR: Once<Hypervisor> = Once::new();
static REDISTRIBUTORS: Once<ArrayVec<PhysRange, MAX_REDISTRIBUTOR_REGIONS>> = Once::new();
pub(crate) static VMS: HostedVms<Objects> = {
    // SAFETY: The pages are those that the ownership table says the hypervisor keeps for a VM; EL2 maps them until they go
    // back.
    let objects = unsafe { Objects::new() };
    HostedVms::new(objects)
};

/// What every CPU needs to serve the host.
struct Hypervisor {
    machine: ThisCpu,
    host: Host<'static, Pool, El3, Objects>,
    stage2_root: PhysAddr,
    vtcr_el2: u64,
}

/// What start-up leaves to the image in the carve-out. It holds no pointer into the image.
pub(crate) struct Inheritance {
    /// All CPUs, in the carve-out.
    pub(crate) cpus: &'static [Cpu],
    /// The EL2 stage 1 that is now in use.
    pub(crate) el2: PageTable<El2>,
    /// Who has which memory.
    pub(crate) layout: Layout,
    /// How much to log.
    pub(crate) log_level: LogLevel,
    /// Address size of the CPU.
    pub(crate) physical: PhysicalSize,
    /// Pages for tables, and for this.
    pub(crate) pool: Pool,
    /// What is mapped of the redistributors.
    pub(crate) redistributors: ArrayVec<PhysRange, MAX_REDISTRIBUTOR_REGIONS>,
    /// RAM.
    pub(crate) ram: ArrayVec<PhysRange, MAX_RAM_REGIONS>,
    /// Whether a panic ends the machine through semihosting.
    pub(crate) semihosting_exit: bool,
    /// A stack for taking over, of [`START_STACK_PAGES`]: more than a CPU's own has room for.
    pub(crate) stack: PhysAddr,
    /// Whether there is a trace.
    #[cfg(feature = "trace")]
    pub(crate) trace: bool,
    /// The console.
    pub(crate) uart: PhysRange,
}

impl Inheritance {
    const PAGES: u64 = (size_of::<Self>() as u64).div_ceil(PAGE_SIZE).next_power_of_two();

    /// Moves it to pages of its own pool and returns their address, or `None` if the pool is empty.
    pub(crate) fn place(mut self) -> Option<PhysAddr> {
        let place = self.pool.allocate_pages(Self::PAGES)?;
        // SAFETY: The pages are mapped, large enough, and nobody else's.
        unsafe { ptr::with_exposed_provenance_mut::<Self>(place.raw() as usize).write(self) };
        Some(place)
    }

    /// Takes it from where [`Inheritance::place`] put it, and gives the pages back.
    ///
    /// # Safety
    ///
    /// `place` is what that returned, and this is the only call.
    unsafe fn take(place: u64) -> Self {
        // SAFETY: As the caller says.
        let mut this = unsafe { ptr::with_exposed_provenance::<Self>(place as usize).read() };
        this.pool.free_pages(PhysAddr::from_bits_truncating(place), Self::PAGES);
        this
    }
}

/// Places a list of CPUs in pages of the pool.
pub(crate) fn place_cpus(pool: &mut Pool, count: usize, cpus: impl Iterator<Item = Cpu>) -> Option<&'static [Cpu]> {
    let pages = ((count * size_of::<Cpu>()) as u64).div_ceil(PAGE_SIZE).next_power_of_two();
    let place = ptr::with_exposed_provenance_mut::<Cpu>(pool.allocate_pages(pages)?.raw() as usize);
    let mut placed = 0;
    for cpu in cpus.take(count) {
        // SAFETY: There is room for `count` in the pages, which are nobody else's.
        unsafe { place.wrapping_add(placed).write(cpu) };
        placed += 1;
    }
    // SAFETY: So many have just been written, and the pages are never given back.
    Some(unsafe { slice::from_raw_parts(place, placed) })
}

/// Where every CPU starts to run in the carve-out: the first one with the address of the [`Inheritance`], then again like the
/// others, when firmware has turned them on or resumed them, to enter the host.
pub(crate) extern "C" fn cpu_main(start: &'static CpuStart, inheritance: u64) -> ! {
    if inheritance != 0 {
        // SAFETY: The first CPU comes here once, with what start-up placed.
        take_over(unsafe { Inheritance::take(inheritance) });
        // SAFETY: This CPU's own description, on its own stack; nothing of the present stack is needed again.
        unsafe { CpuStart::switch(start.page(), 0, None) }
    }
    let Some(hypervisor) = HYPERVISOR.get() else { halt() };
    #[cfg(feature = "trace")]
    ravelin_arch::trace::started(start);
    let Some(asked) = hypervisor.host.take_start(start.index()) else { not_asked_for() };
    prepare_cpu();
    enable_stage2(hypervisor.stage2_root, hypervisor.vtcr_el2);
    // SAFETY: EL2 is set up; the frames of this function and its callers are not needed again.
    unsafe { start.enter_host(asked.entry, asked.context) }
}

/// Turns off a CPU that firmware has started though the host did not ask for it.
fn not_asked_for() -> ! {
    const CPU_OFF: u64 = 0x8400_0002;
    // It returns only if firmware refuses.
    let _refused = El3.smc([CPU_OFF, 0, 0, 0]);
    halt()
}

/// Takes over memory and CPUs.
fn take_over(mut inheritance: Inheritance) {
    #[cfg(feature = "trace")]
    if inheritance.trace {
        crate::trace::start();
    }
    // SAFETY: Mapped in the tables that start-up built, and opened for the first time in this copy of the image.
    unsafe { console::open(inheritance.uart.base(), inheritance.log_level) };
    if inheritance.semihosting_exit {
        panic::exit_by_semihosting();
    }
    let redistributors = REDISTRIBUTORS.call_once(|| inheritance.redistributors.clone());
    // SAFETY: The MMU is on; the tables map the pool, which tables come from, and EL2's own lie in it too.
    let machine = unsafe { Hardware::new() };
    // SAFETY: Start-up has mapped them.
    let machine = unsafe { machine.with_guests(redistributors) };
    let layout = inheritance.layout;
    #[cfg(feature = "checked")]
    checked::begin(&machine, &mut inheritance);

    let table = ownership_table(&inheritance.ram, &layout);
    let geometry = Geometry::stage2(inheritance.physical.bits()).expect("a physical address size is one of stage 2");
    let stage2_root =
        inheritance.pool.allocate_pages(geometry.root_pages()).expect("the pool is large enough to start");
    for page in 0..geometry.root_pages() {
        machine.clear_table(PhysAddr::from_bits_truncating(stage2_root.raw() + page * PAGE_SIZE));
    }
    machine.publish();

    #[cfg(feature = "checked")]
    let machine = checked::Checked(machine);
    let host_tables = PageTable::<Stage2>::new(stage2_root, geometry);
    let el2_root = inheritance.el2.root();
    machine.hint(Hint::Lock(el2_root));
    let memory = MEMORY.call_once(|| {
        let mut memory = Memory::new(table, host_tables, inheritance.el2, inheritance.pool);
        memory.divide(&machine).expect("the pool is large enough to start");
        memory
    });
    machine.hint(Hint::Unlock(el2_root));
    // This stack. It stays in use until the next entry, but the pool writes at the other end of it only, and nobody takes pages from
    // the pool from here on before the host runs: it would write where it divides these.
    memory.with_pool(|pool| pool.free_pages(inheritance.stack, START_STACK_PAGES));
    #[cfg(feature = "trace")]
    memory.announce(&machine);
    let entry = PhysAddr::from_bits_truncating(secondary_entry(layout.image.base()));
    let entries = Entries { start: entry, resume: entry };
    HYPERVISOR.call_once(|| Hypervisor {
        machine,
        host: Host::new(memory, &VMS, El3, inheritance.cpus, entries),
        stage2_root,
        vtcr_el2: geometry.vtcr(inheritance.physical),
    });
}

/// Makes the ownership table: the carve-out is the hypervisor's, all other RAM the host's.
fn ownership_table(ram: &[PhysRange], layout: &Layout) -> OwnershipTable<'static> {
    let blocks = ptr::with_exposed_provenance_mut::<u64>(layout.block_entries.base().raw() as usize);
    let block_count = (layout.block_entries.size() / 8) as usize;
    // SAFETY: The layout gives the entries their own part of the carve-out, mapped as data. Any contents are valid.
    let blocks = unsafe { slice::from_raw_parts_mut(blocks, block_count) };
    let pages = ptr::with_exposed_provenance_mut::<[u64; PAGES_PER_BLOCK]>(layout.page_entries.base().raw() as usize);
    let page_count = layout.page_entries.size() as usize / size_of::<[u64; PAGES_PER_BLOCK]>();
    // SAFETY: As above.
    let pages = unsafe { slice::from_raw_parts_mut(pages, page_count) };
    match OwnershipTable::new(ram, layout.carve_out, &[], blocks, pages) {
        Ok(table) => table,
        Err(error) => panic!("the layout is made for this table: {error}"),
    }
}

/// Called by the vectors when the host comes to EL2.
#[unsafe(no_mangle)]
extern "C" fn host_exit(frame: &mut HostFrame) {
    let (Some(hypervisor), Some(cpu)) = (HYPERVISOR.get(), CpuStart::current()) else { halt() };
    let registers = &mut frame.arguments;
    match read_exit() {
        Exit::Hvc(immediate) => hvc(hypervisor, immediate, registers),
        Exit::Smc(immediate) => {
            skip_instruction();
            #[cfg(feature = "checked")]
            checked::before_smc(immediate, registers);
            // It may turn the machine off.
            #[cfg(feature = "trace")]
            crate::trace::trace_flush();
            hypervisor.host.smc(cpu.index(), immediate, registers);
        }
        Exit::Stage2Fault(address) => {
            if fault(hypervisor, address) == FaultAction::Inject {
                inject(Trapped::abort);
            }
        }
        Exit::Abort => inject(Trapped::abort),
        Exit::Other => inject(Trapped::undefined),
    }
}

#[cfg(not(feature = "checked"))]
#[inline]
fn hvc(hypervisor: &Hypervisor, immediate: u16, registers: &mut Registers) {
    hypervisor.host.hvc(&hypervisor.machine, immediate, registers);
}

#[cfg(not(feature = "checked"))]
#[inline]
fn fault(hypervisor: &Hypervisor, address: Ipa) -> FaultAction {
    hypervisor.host.fault(&hypervisor.machine, address)
}

#[cfg(feature = "checked")]
fn hvc(hypervisor: &Hypervisor, immediate: u16, registers: &mut Registers) {
    let before = *registers;
    checked::take_turn();
    hypervisor.host.hvc(&hypervisor.machine, immediate, registers);
    checked::host_call(immediate, &before, registers);
}

#[cfg(feature = "checked")]
fn fault(hypervisor: &Hypervisor, address: Ipa) -> FaultAction {
    checked::take_turn();
    let action = hypervisor.host.fault(&hypervisor.machine, address);
    checked::host_fault(address.raw(), action == FaultAction::Resume);
    action
}

/// Returns the machine, since the host runs.
#[cfg(feature = "checked")]
pub(crate) fn machine() -> Option<&'static checked::Checked> {
    HYPERVISOR.get().map(|hypervisor| &hypervisor.machine)
}

/// Makes the host take an exception in place of what it did. Out of line, to keep it out of the way of calls.
#[inline(never)]
fn inject(exception: fn(&Trapped, PstateFeatures) -> Exception) {
    take_exception(&exception(&trapped(), pstate_features()));
}
