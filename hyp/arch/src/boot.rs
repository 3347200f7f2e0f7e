//! Start-up: the assembly, the image's own layout, its move into the carve-out.

use core::{arch::global_asm, cell::UnsafeCell, ptr, sync::atomic::AtomicU64};

use ravelin_memory::{HypAddr, PAGE_SIZE, PhysAddr, PhysRange};

use crate::{
    guest::HostState,
    hardware::{clean_to_poc, synchronise_instructions},
    sysreg::read_sysreg,
};

global_asm!(include_str!("../asm/boot.S"));
global_asm!(include_str!("../asm/vectors.S"));
global_asm!(include_str!("../asm/memory.S"));

/// SCTLR_EL2 of the running hypervisor: RES1 bits, M, C, SA (stack alignment), I and WXN (nothing writable executes).
const SCTLR_EL2: u64 = 0x30c5_0830 | (1 << 0) | (1 << 2) | (1 << 3) | (1 << 12) | (1 << 19);

mod symbols {
    unsafe extern "C" {
        pub(super) static image_start: u8;
        pub(super) static text_end: u8;
        pub(super) static data_start: u8;
        pub(super) static bss_start: u8;
        pub(super) static image_end: u8;
        pub(super) static boot_end: u8;
        pub(super) static vectors: u8;
        pub(super) static boot_tables: u8;
        pub(super) static boot_tables_next: u64;
        pub(super) static boot_tables_end: u8;
        pub(super) fn relocate(image: u64, delta: u64);
        pub(super) fn switch_to_carveout(start: u64, argument: u64, stack_top: u64) -> !;
        pub(super) fn secondary_entry();
        pub(super) fn enter_host(entry: u64, argument: u64, spsr: u64, stack_top: u64) -> !;
    }
}

/// Where the parts of the running image lie. All but `boot_end` are multiples of the page size.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// The image header, and the start of text.
    pub start: u64,
    /// End of text and start of read-only data.
    pub text_end: u64,
    /// End of read-only data and start of data.
    pub data_start: u64,
    /// End of what lives on in the carve-out.
    pub end: u64,
    /// End of what start-up needs besides.
    pub boot_end: u64,
}

impl Image {
    /// Returns the layout of the running image.
    #[must_use]
    pub fn running() -> Self {
        Self {
            start: address(&raw const symbols::image_start),
            text_end: address(&raw const symbols::text_end),
            data_start: address(&raw const symbols::data_start),
            end: address(&raw const symbols::image_end),
            boot_end: address(&raw const symbols::boot_end),
        }
    }

    /// Returns the size in bytes of what lives on in the carve-out.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.end - self.start
    }

    /// Returns the layout of this image when it lies at `base`.
    #[must_use]
    pub fn moved_to(&self, base: PhysAddr) -> Self {
        let delta = base.raw().wrapping_sub(self.start);
        let moved = |address: u64| address.wrapping_add(delta);
        Self {
            start: base.raw(),
            text_end: moved(self.text_end),
            data_start: moved(self.data_start),
            end: moved(self.end),
            boot_end: moved(self.boot_end),
        }
    }

    /// Writes a copy of the image that runs at `base`, with its `.bss` zeroed, for a CPU whose caches may be off.
    ///
    /// # Safety
    ///
    /// [`Image::size`] bytes from `base` are mapped writable at their physical address, belong to nobody and do not overlap
    /// the image.
    pub unsafe fn copy_to(&self, base: PhysAddr) {
        let file_size = (address(&raw const symbols::bss_start) - self.start) as usize;
        let source = ptr::with_exposed_provenance::<u8>(self.start as usize);
        let target = ptr::with_exposed_provenance_mut::<u8>(base.raw() as usize);
        // SAFETY: The image is readable; the caller vouches for the target.
        unsafe { ptr::copy_nonoverlapping(source, target, file_size) };
        // SAFETY: As above; `.bss` is what remains of the copy.
        unsafe { ptr::write_bytes(target.wrapping_add(file_size), 0, self.size() as usize - file_size) };
        // SAFETY: The relocations are the link editor's and stay within the copy.
        unsafe { symbols::relocate(base.raw(), base.raw().wrapping_sub(self.start)) };
        clean_to_poc(base, self.size());
        synchronise_instructions();
    }
}

fn address<T>(symbol: *const T) -> u64 {
    symbol.expose_provenance() as u64
}

/// What a CPU needs before it can run Rust, and what it keeps for itself. The assembly knows the layout of the former, which
/// does not change once a CPU has started on it; TPIDR_EL2 points to it.
#[repr(C)]
#[derive(Debug)]
pub struct CpuStart {
    ttbr0_el2: u64,
    tcr_el2: u64,
    mair_el2: u64,
    sctlr_el2: u64,
    stack_top: u64,
    entry: u64,
    vectors: u64,
    emergency_stack: u64,
    index: u64,
    /// Where the CPU's redistributor is, once it has been looked for.
    pub(crate) redistributor: AtomicU64,
    /// Names the vCPU that ran last.
    pub(crate) last_vcpu: AtomicU64,
    /// The host's registers while the CPU runs a guest. Of no concern to other CPUs.
    pub(crate) host: UnsafeCell<HostState>,
}

/// Where a CPU starts to run Rust: its start-up data and the argument of [`CpuStart::switch`], or 0 for a CPU that firmware
/// turned on or resumed.
pub type CpuEntry = extern "C" fn(&'static CpuStart, u64) -> !;

/// Registers that are the same on every CPU.
#[derive(Clone, Copy, Debug)]
pub struct El2Tables {
    /// Level 0 table of the EL2 stage 1.
    pub root: PhysAddr,
    /// TCR_EL2.
    pub tcr: u64,
    /// MAIR_EL2.
    pub mair: u64,
}

impl CpuStart {
    /// Pages of a CPU's stack.
    pub const STACK_PAGES: u64 = if cfg!(feature = "deep-stacks") { 15 } else { 2 };

    /// Describes CPU number `index`, which runs `entry` of the image copy at `image`. The emergency stack is for the report
    /// of a fault and grows down from the given address.
    #[must_use]
    pub fn new(
        index: usize,
        tables: El2Tables,
        image: PhysAddr,
        stack_top: HypAddr,
        emergency_stack: HypAddr,
        entry: CpuEntry,
    ) -> Self {
        let delta = image.raw().wrapping_sub(Image::running().start);
        Self {
            ttbr0_el2: tables.root.raw(),
            tcr_el2: tables.tcr,
            mair_el2: tables.mair,
            sctlr_el2: SCTLR_EL2,
            stack_top: stack_top.raw(),
            entry: (entry as usize as u64).wrapping_add(delta),
            vectors: address(&raw const symbols::vectors).wrapping_add(delta),
            emergency_stack: emergency_stack.raw(),
            index: index as u64,
            redistributor: AtomicU64::new(0),
            last_vcpu: AtomicU64::new(0),
            host: UnsafeCell::default(),
        }
    }

    /// Places the description at `page`, where the CPU will find it with its caches off.
    ///
    /// # Safety
    ///
    /// The page is mapped writable at its physical address and belongs to this CPU of the hypervisor for ever.
    pub unsafe fn place(self, page: PhysAddr) {
        let target = ptr::with_exposed_provenance_mut::<Self>(page.raw() as usize);
        // SAFETY: The caller vouches for the page, which is aligned and large enough.
        unsafe { target.write(self) };
        clean_to_poc(page, size_of::<Self>() as u64);
    }

    /// Goes on as the CPU described at `page`, on its tables, image and stack, or on the other stack that ends at `stack_top`.
    ///
    /// # Safety
    ///
    /// [`CpuStart::place`] was called for the page, its tables map what the description names and the other stack, and
    /// nothing of the present stack is needed any more.
    pub unsafe fn switch(page: PhysAddr, argument: u64, stack_top: Option<HypAddr>) -> ! {
        #[cfg(feature = "trace")]
        {
            let start = ptr::with_exposed_provenance::<Self>(page.raw() as usize);
            // SAFETY: The caller has placed the description there.
            crate::trace::switching(unsafe { &*start });
        }
        // SAFETY: The caller vouches for what the assembly loads.
        unsafe { symbols::switch_to_carveout(page.raw(), argument, stack_top.map_or(0, HypAddr::raw)) }
    }

    /// TTBR0_EL2, TCR_EL2, MAIR_EL2 and SCTLR_EL2.
    #[cfg(feature = "trace")]
    pub(crate) const fn registers(&self) -> [u64; 4] {
        [self.ttbr0_el2, self.tcr_el2, self.mair_el2, self.sctlr_el2]
    }

    /// Returns where this description lies.
    #[must_use]
    pub fn page(&'static self) -> PhysAddr {
        PhysAddr::from_bits_truncating(address(ptr::from_ref(self)))
    }

    /// Returns the description of the CPU that this runs on, if it has gone that far.
    #[must_use]
    pub fn current() -> Option<&'static Self> {
        let page = read_sysreg!("tpidr_el2");
        // SAFETY: TPIDR_EL2 is zero until `cpu_start` loads it with the address of a placed description.
        unsafe { ptr::with_exposed_provenance::<Self>(page as usize).as_ref() }
    }

    /// Returns the CPU's number, from 0.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index as usize
    }

    /// Returns whether `address` lies on one of the CPU's stacks.
    #[must_use]
    pub fn on_stack(&self, address: u64) -> bool {
        let within = |top: u64, size: u64| (top - size..top).contains(&address);
        within(self.stack_top, Self::STACK_PAGES * PAGE_SIZE) || within(self.emergency_stack, PAGE_SIZE)
    }

    /// Enters the host at EL1 for the first time on this CPU, with interrupts masked and the MMU off.
    ///
    /// # Safety
    ///
    /// The EL2 registers of this CPU are set for the host, and nothing of the present stack is needed any more.
    pub unsafe fn enter_host(&self, entry: u64, argument: u64) -> ! {
        /// PSTATE at the entry of a kernel: EL1h, DAIF masked.
        const SPSR_HOST: u64 = 0x3c5;
        // SAFETY: The caller vouches for EL2's state; what the host does with its own is its affair.
        unsafe { symbols::enter_host(entry, argument, SPSR_HOST, self.stack_top) }
    }
}

/// Returns where in the image copy at `image` firmware has to enter a CPU that it turns on or resumes.
#[must_use]
pub fn secondary_entry(image: PhysAddr) -> u64 {
    let running = Image::running();
    (symbols::secondary_entry as *const () as usize as u64).wrapping_sub(running.start).wrapping_add(image.raw())
}

/// The first tables, which the assembly built.
#[derive(Clone, Copy, Debug)]
pub struct BootTables {
    /// The level 0 table.
    pub root: PhysAddr,
    /// Pages that are left over for more of them. Nobody else uses them.
    pub spare: PhysRange,
}

impl BootTables {
    /// Finds the first tables, or returns `None` if no pages are left over.
    ///
    /// # Safety
    ///
    /// Called once, on the boot CPU, before [`CpuStart::switch`].
    #[must_use]
    pub unsafe fn take() -> Option<Self> {
        // SAFETY: The assembly has written the word, and nobody else reads or writes it.
        let next = unsafe { (&raw const symbols::boot_tables_next).read() };
        let root = PhysAddr::new(address(&raw const symbols::boot_tables))?;
        let spare = PhysRange::from_bounds(next, address(&raw const symbols::boot_tables_end)).ok()?;
        Some(Self { root, spare })
    }
}
