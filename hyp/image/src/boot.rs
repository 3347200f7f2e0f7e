//! Where the bootloader put the image: from the device tree to everything built in the carve-out.
//!
//! This needs a quiet machine: one CPU, caches just turned on, nobody else in memory. What follows in [`crate::resident`]
//! does not.

#![expect(unsafe_code, reason = "reads and writes memory that no Rust object has described yet")]

use core::{fmt, ptr, slice};

use arrayvec::ArrayVec;
use ravelin_arch::{
    BootTables, Conduit, CpuStart, El2Tables, Hardware, Image, Lacking, check_cpu, clean_to_poc, mpidr,
    physical_address_size,
};
use ravelin_hypercall::{Cpu, Start};
use ravelin_memory::{BLOCK_SIZE, HypAddr, HypRange, PAGE_SIZE, PhysAddr, PhysRange, RangeError};
use ravelin_pgtable::{El2, El2Usage, Flush, Geometry, Hint, Machine, MapError, PageTable, TablePool};
use ravelin_platform::{
    CPU_BLOCK_SIZE, Conduit as PsciConduit, Demand, DtbError, HostImage, Layout, LogLevel, MAX_REDISTRIBUTOR_REGIONS,
    Platform, START_STACK_PAGES, dtb_size, find_console,
};

use crate::{
    console, panic,
    pool::Pool,
    resident::{self, Inheritance},
};

/// The hypervisor's own virtual addresses, apart from the identity map, begin here: above them there is no RAM.
const PRIVATE_BASE: u64 = 1 << 47;

/// Virtual distance between the stacks of two CPUs: a guard page, the stack, a page to spare.
const STACK_STRIDE: u64 = (CpuStart::STACK_PAGES + 2) * PAGE_SIZE;

/// Why the hypervisor cannot run here.
enum BootError {
    /// The device tree, or what it describes.
    Dtb(DtbError),
    /// Entered at EL1.
    NotEl2,
    /// The CPU.
    Cpu(Lacking),
    /// PSCI calls would come to the hypervisor itself.
    PsciByHvc,
    /// The CPU that runs this is not in the device tree.
    UnknownCpu(u64),
    /// Memory where addresses of the hypervisor's own begin.
    Private(PhysRange),
    /// Memory that the CPU cannot address.
    Unreachable(PhysRange, u32),
    /// Too little memory for the tables.
    Tables,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dtb(error) => write!(f, "device tree: {error}"),
            Self::NotEl2 => f.write_str("entered at EL1, needs EL2 (QEMU: -machine virt,virtualization=on)"),
            Self::Cpu(lacking) => write!(f, "this CPU cannot run it: {lacking}"),
            Self::PsciByHvc => {
                f.write_str("device tree: /psci: method \"hvc\" would call the hypervisor, needs \"smc\"")
            }
            Self::UnknownCpu(mpidr) => write!(f, "device tree: /cpus: the boot CPU (mpidr {mpidr:#x}) is missing"),
            Self::Private(range) => write!(f, "device tree: /memory: {range} lies above 2^47"),
            Self::Unreachable(range, bits) => {
                write!(f, "device tree: /memory: {range} does not fit the CPU's {bits} address bits")
            }
            Self::Tables => f.write_str("not enough memory for translation tables"),
        }
    }
}

impl From<DtbError> for BootError {
    fn from(error: DtbError) -> Self {
        Self::Dtb(error)
    }
}

impl From<MapError> for BootError {
    fn from(_: MapError) -> Self {
        Self::Tables
    }
}

/// Entry from the assembly: the device tree that the bootloader named, and the exception level.
#[unsafe(no_mangle)]
extern "C" fn boot_main(dtb: u64, _image: u64, level: u64) -> ! {
    let conduit = if level == 2 { Conduit::Smc } else { Conduit::Hvc };
    // SAFETY: The first call, on the boot CPU.
    let Some(first) = (unsafe { BootTables::take() }) else { panic::exit(conduit) };
    // SAFETY: The pages lie in the image's 2 MiB, which the first tables map, and no others are in use.
    let pool = unsafe { Pool::new(first.spare) };
    let tables = PageTable::new(first.root, Geometry::EL2);
    // SAFETY: The MMU is on; the first tables lie in the image's 2 MiB, which they map.
    let machine = unsafe { Hardware::new() };
    let mut memory = BootMemory { machine, tables, pool };

    // Without a device tree there is no console to complain on.
    let Some(dtb) = memory.read_dtb(dtb) else { panic::exit(conduit) };
    if let Some(uart) = find_console(dtb) {
        memory.open_console(uart, LogLevel::Info);
    }
    let error = match start(&mut memory, dtb, level) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    console::write_last(format_args!("ravelin: cannot boot: {error}\n"));
    panic::exit(conduit)
}

/// Memory under the first tables.
struct BootMemory {
    machine: Hardware,
    tables: PageTable<El2>,
    pool: Pool,
}

impl BootMemory {
    /// Returns the device tree at `address`, if there is one.
    fn read_dtb(&mut self, address: u64) -> Option<&'static [u8]> {
        const START: usize = 8;
        if address == 0 || !address.is_multiple_of(8) {
            return None;
        }
        let start = ptr::with_exposed_provenance::<u8>(address as usize);
        // SAFETY: The assembly mapped 2 MiB from here, and nobody writes to it.
        let size = dtb_size(unsafe { slice::from_raw_parts(start, START) })?;
        // The rest of a larger one than the assembly provides for.
        let mapped = ((address + BLOCK_SIZE - 1) & !(BLOCK_SIZE - 1)) + BLOCK_SIZE;
        let end = (address + size as u64).next_multiple_of(PAGE_SIZE);
        if let (true, Some(base), Ok(rest)) = (mapped < end, PhysAddr::new(mapped), HypRange::from_bounds(mapped, end))
        {
            self.tables.map(&self.machine, &mut self.pool, rest, base, El2Usage::Rodata).ok()?;
        }
        // SAFETY: Mapped, by the assembly or just now, and nobody writes to it.
        Some(unsafe { slice::from_raw_parts(start, size) })
    }

    fn open_console(&mut self, uart: PhysRange, level: LogLevel) {
        let range = uart.identity_va();
        if self.tables.map(&self.machine, &mut self.pool, range, uart.base(), El2Usage::Device).is_ok() {
            // SAFETY: Just mapped.
            unsafe { console::open(uart.base(), level) };
        }
    }

    /// Maps `range` as data, in place of what the assembly may have mapped there.
    fn map_data(&mut self, range: PhysRange) -> Result<(), BootError> {
        let va = range.identity_va();
        let flush = self.tables.unmap(&self.machine, &mut self.pool, va, Flush::new());
        self.tables.flush(&self.machine, &mut self.pool, flush);
        Ok(self.tables.map(&self.machine, &mut self.pool, va, range.base(), El2Usage::Data)?)
    }

    /// Copies what lies at the start of `range`, as many bytes as fit `buffer` and the range.
    fn peek<'b>(
        &mut self,
        range: PhysRange,
        address: u64,
        size: u64,
        buffer: &'b mut [u8],
    ) -> Result<&'b [u8], BootError> {
        for page in range.iter() {
            if self.tables.lookup(&self.machine, page.identity_va()).output().is_none() {
                let va = HypRange::single(page.identity_va());
                self.tables.map(&self.machine, &mut self.pool, va, page, El2Usage::Rodata)?;
            }
        }
        let size = buffer.len().min(size as usize);
        let source = ptr::with_exposed_provenance::<u8>(address as usize);
        // SAFETY: All pages of the range are mapped, and the bytes lie in them. Nobody else runs.
        unsafe { ptr::copy_nonoverlapping(source, buffer.as_mut_ptr(), size) };
        Ok(&buffer[..size])
    }
}

/// Builds everything and leaves for the carve-out.
fn start(memory: &mut BootMemory, dtb: &'static [u8], level: u64) -> Result<core::convert::Infallible, BootError> {
    if level != 2 {
        return Err(BootError::NotEl2);
    }
    check_cpu().map_err(BootError::Cpu)?;
    let platform = Platform::parse(dtb)?;
    if platform.options.semihosting_exit {
        panic::exit_by_semihosting();
    }
    let log_level = platform.options.log_level.unwrap_or(LogLevel::Info);
    memory.open_console(platform.uart, log_level);
    log::info!("version {}", env!("CARGO_PKG_VERSION"));
    if let Some(option) = platform.options.unknown {
        log::warn!("unknown option {option}");
    }
    let boot_cpu = check_platform(&platform)?;
    #[cfg(feature = "trace")]
    if platform.options.trace {
        crate::trace::start();
        ravelin_arch::trace::begin(&memory.machine, memory.tables.root(), boot_cpu);
    }
    memory.machine.hint(Hint::Lock(memory.tables.root()));

    let host = inspect_host(memory, &platform)?;
    let image = Image::running();
    let pages = |base: u64, end: u64| -> Result<PhysRange, RangeError> {
        PhysRange::from_bounds(base & !(PAGE_SIZE - 1), end.next_multiple_of(PAGE_SIZE))
    };
    let dtb_address = dtb.as_ptr().addr() as u64;
    let demand = Demand {
        image_size: image.size(),
        running: pages(image.start, image.boot_end).map_err(|_| BootError::Tables)?,
        dtb: pages(dtb_address, dtb_address + dtb.len() as u64).map_err(|_| BootError::Tables)?,
    };
    let layout = Layout::plan(&platform, &host, &demand)?;
    log::info!("keeps {} ({} KiB)", layout.carve_out, layout.carve_out.size() >> 10);

    memory.map_data(layout.carve_out)?;
    memory.map_data(layout.host_dtb)?;
    let host_dtb = layout.host_dtb.base();
    let target = ptr::with_exposed_provenance_mut::<u8>(host_dtb.raw() as usize);
    // SAFETY: Just mapped; the plan keeps it apart from everything else.
    let target = unsafe { slice::from_raw_parts_mut(target, layout.host_dtb.size() as usize) };
    let size = platform.write_host_dtb(layout.carve_out, target)?;
    // The host reads it with its caches off.
    clean_to_poc(host_dtb, size as u64);

    // SAFETY: The layout gives the image its own place in the carve-out, which is mapped.
    unsafe { image.copy_to(layout.image.base()) };
    // SAFETY: As above, and for the tables to come `El2Map` maps the pool too.
    let mut pool = unsafe { Pool::new(layout.pool) };
    let physical = physical_address_size();
    let el2 = map_el2(memory.machine, &mut pool, &platform, &layout)?;
    let registers = El2Tables { root: el2.root(), tcr: Geometry::tcr_el2(physical), mair: Geometry::MAIR_EL2 };
    for index in 0..platform.cpu_count() {
        place_cpu(&layout, registers, index);
    }
    let start = Start { entry: host.entry.raw(), context: host_dtb.raw() };
    let cpus = platform.cpus().enumerate().map(|(index, mpidr)| {
        let argument = cpu_page(&layout, index).raw();
        if index == boot_cpu { Cpu::booting(mpidr, argument, start) } else { Cpu::off(mpidr, argument) }
    });
    let cpus = resident::place_cpus(&mut pool, platform.cpu_count(), cpus).ok_or(BootError::Tables)?;
    let boot_page = cpu_page(&layout, boot_cpu);
    let inheritance = Inheritance {
        cpus,
        el2,
        layout,
        log_level,
        physical,
        ram: platform.ram.clone(),
        semihosting_exit: platform.options.semihosting_exit,
        stack: pool.allocate_pages(START_STACK_PAGES).ok_or(BootError::Tables)?,
        #[cfg(feature = "trace")]
        trace: platform.options.trace,
        uart: platform.uart,
        pool,
        redistributors: redistributors(&platform),
    };
    let stack_top = HypAddr::new(inheritance.stack.raw() + START_STACK_PAGES * PAGE_SIZE);
    let place = inheritance.place().ok_or(BootError::Tables)?;
    log::info!("runs the host at {} on cpu {boot_cpu}, with its device tree at {host_dtb}", host.entry);
    memory.machine.hint(Hint::Unlock(memory.tables.root()));
    // SAFETY: Placed above; the new tables map the image, the pool with the stack and the inheritance, and nothing here is
    // needed again.
    unsafe { CpuStart::switch(boot_page, place.raw(), stack_top) }
}

/// Checks what only this CPU can tell of the platform, and returns its number.
fn check_platform(platform: &Platform<'_>) -> Result<usize, BootError> {
    if platform.psci == PsciConduit::Hvc {
        return Err(BootError::PsciByHvc);
    }
    let bits = physical_address_size().bits();
    for &region in &platform.ram {
        if region.end() > PRIVATE_BASE {
            return Err(BootError::Private(region));
        }
        if region.end() > 1 << bits {
            return Err(BootError::Unreachable(region, bits));
        }
    }
    let this = mpidr();
    platform.cpus().position(|cpu| cpu == this).ok_or(BootError::UnknownCpu(this))
}

fn inspect_host(memory: &mut BootMemory, platform: &Platform<'_>) -> Result<HostImage, BootError> {
    let kernel = platform.kernel.bytes;
    let mut buffer = [0; HostImage::HEADER_SIZE];
    let size = kernel.size().min(buffer.len() as u64);
    let start = kernel.base();
    let touched = PhysRange::from_bounds(start & !(PAGE_SIZE - 1), (start + size).next_multiple_of(PAGE_SIZE));
    let header = memory.peek(touched.map_err(|_| BootError::Tables)?, start, size, &mut buffer)?;
    Ok(HostImage::inspect(platform, header)?)
}

/// Builds the EL2 stage 1: nothing but the hypervisor's own, nothing writable and executable, a guard page on either side of
/// each stack.
fn map_el2(
    machine: Hardware,
    pool: &mut Pool,
    platform: &Platform<'_>,
    layout: &Layout,
) -> Result<PageTable<El2>, BootError> {
    let root = pool.allocate().ok_or(BootError::Tables)?;
    machine.clear_table(root);
    // Until `Memory` has them.
    machine.hint(Hint::RootLock { root, lock: root });
    machine.hint(Hint::Owner { table: root, root });
    machine.hint(Hint::Lock(root));
    let mut el2 = PageTable::new(root, Geometry::EL2);
    let mut map = |range: PhysRange, usage| el2.map(&machine, pool, range.identity_va(), range.base(), usage);

    let image = Image::running().moved_to(layout.image.base());
    for (base, end, usage) in [
        (image.start, image.text_end, El2Usage::Text),
        (image.text_end, image.data_start, El2Usage::Rodata),
        (image.data_start, image.end, El2Usage::Data),
    ] {
        map(PhysRange::from_bounds(base, end).map_err(|_| BootError::Tables)?, usage)?;
    }
    map(layout.page_entries, El2Usage::Data)?;
    map(layout.block_entries, El2Usage::Data)?;
    map(layout.pool, El2Usage::Data)?;
    map(platform.uart, El2Usage::Device)?;
    for region in redistributors(platform) {
        map(region, El2Usage::Device)?;
    }
    for index in 0..platform.cpu_count() {
        map(PhysRange::single(cpu_page(layout, index)), El2Usage::Data)?;
    }
    for index in 0..platform.cpu_count() {
        let stack = HypRange::new(stack_top(index) - CpuStart::STACK_PAGES * PAGE_SIZE, CpuStart::STACK_PAGES);
        let physical = PhysAddr::from_bits_truncating(cpu_block(layout, index));
        el2.map(&machine, pool, stack.map_err(|_| BootError::Tables)?, physical, El2Usage::Data)?;
    }
    #[cfg(feature = "checked")]
    crate::checked::map_window(&machine, pool, &mut el2, &platform.ram)?;
    machine.hint(Hint::Unlock(root));
    Ok(el2)
}

fn place_cpu(layout: &Layout, tables: El2Tables, index: usize) {
    let page = cpu_page(layout, index);
    let emergency_stack = page.raw() + PAGE_SIZE;
    let start = CpuStart::new(
        index,
        tables,
        layout.image.base(),
        HypAddr::from_bits_truncating(stack_top(index)),
        HypAddr::from_bits_truncating(emergency_stack),
        resident::cpu_main,
    );
    // SAFETY: The page lies in the carve-out, which is mapped, and is this CPU's.
    unsafe { start.place(page) };
}

/// Returns as much of the redistributors as the CPUs can have, two frames of 64 KiB each or, with a GICv4, four. A device tree
/// may leave room for many more. None where addresses of the hypervisor's own begin: without them, guests' timers are late.
fn redistributors(platform: &Platform<'_>) -> ArrayVec<PhysRange, MAX_REDISTRIBUTOR_REGIONS> {
    const PAGES: u64 = (4 << 16) / PAGE_SIZE;
    let most = platform.cpu_count() as u64 * PAGES;
    let cut = |region: &PhysRange| PhysRange::new(region.base().raw(), region.pages().min(most)).unwrap_or(*region);
    platform.gic.redistributors.iter().map(cut).filter(|region| region.end() <= PRIVATE_BASE).collect()
}

/// Returns where the CPU's part of the carve-out begins: its stack, then its page.
fn cpu_block(layout: &Layout, index: usize) -> u64 {
    layout.cpus.base().raw() + index as u64 * CPU_BLOCK_SIZE
}

/// Returns the CPU's page, with its start-up data at the bottom and its emergency stack at the top.
fn cpu_page(layout: &Layout, index: usize) -> PhysAddr {
    const { assert!(CPU_BLOCK_SIZE == (CpuStart::STACK_PAGES + 1) * PAGE_SIZE) };
    PhysAddr::from_bits_truncating(cpu_block(layout, index) + CpuStart::STACK_PAGES * PAGE_SIZE)
}

/// Returns the virtual address of the top of the CPU's stack.
fn stack_top(index: usize) -> u64 {
    PRIVATE_BASE + index as u64 * STACK_STRIDE + PAGE_SIZE + CpuStart::STACK_PAGES * PAGE_SIZE
}
