//! The world switch: between the host and a guest, and back.
//!
//! Registers that control EL1 from EL2 change once when the host lends its CPU and once when it gets it back; those of the
//! guest at each entry and exit.

mod el1;
pub(crate) mod gic;
mod vectors;
mod world;

use core::{arch::global_asm, ffi::c_void, mem::offset_of, ptr, sync::atomic::Ordering::Relaxed};

use ravelin_abi::Status;
use ravelin_memory::{PhysAddr, PhysRange};
use ravelin_pgtable::PhysicalSize;
use ravelin_vm::{
    Context, EntropySource, Entry, GuestCpu, IdRegisters, Left, PageAccess, PstateFeatures, Syndrome, VectorPlaces,
};

use crate::{
    boot::CpuStart,
    exit::pstate_features,
    features::Features,
    firmware,
    hardware::Hardware,
    host::physical_address_size,
    sysreg::{maintain, read_sysreg, write_lower_sysreg},
};

pub(crate) use world::HostState;

global_asm!(
    include_str!("../../asm/guest.S"),
    x = const offset_of!(Context, x),
    pc = const offset_of!(Context, pc),
);

unsafe extern "C" {
    /// Runs a guest until it comes to EL2 with what `handles` does not handle of its calls, and returns why.
    fn guest_run(context: *mut Context, handles: Handler, its: *mut c_void) -> u64;
}

/// Handles a synchronous exception, with this value of ESR_EL2. Returns whether the guest goes on.
type Handler = unsafe extern "C" fn(its: *mut c_void, context: *mut Context, esr: u64) -> bool;

/// The [`Handler`] that a closure is.
unsafe extern "C" fn handle<H: FnMut(u64, &mut Context) -> bool>(
    its: *mut c_void,
    context: *mut Context,
    esr: u64,
) -> bool {
    // SAFETY: The closure that `enter` has borrowed, which does not use it meanwhile.
    let handles = unsafe { &mut *its.cast::<H>() };
    // SAFETY: As above, of the context.
    handles(esr, unsafe { &mut *context })
}

/// Chooses where exceptions from below go. Those of EL2's own are as fatal with either table, so that it may change when it will
/// until the next return to EL1.
macro_rules! use_vectors {
    ($table:literal) => {
        // SAFETY: Both tables are aligned as one of vectors is, and what is below EL2 does not run before the CPU belongs to it
        // whose table it is.
        unsafe {
            core::arch::asm!(concat!("adrp {0}, ", $table), "msr vbar_el2, {0}", out(reg) _, options(nostack, preserves_flags));
        }
    };
}

/// CNTHP_CTL_EL2.ENABLE.
const TIMER_ENABLE: u64 = 1;

/// A host whose CPU runs a guest. Its registers are kept in the CPU's start-up data.
#[derive(Debug, Default)]
pub struct AbsentHost {
    /// When its virtual timer fires. Its physical one goes on.
    virtual_timer: Option<u64>,
}

impl GuestCpu for Hardware {
    type Host = AbsentHost;

    fn leave_host(&self, host: &mut AbsentHost) -> Result<(), Status> {
        let this = CpuStart::current().ok_or(Status::NotSupported)?;
        // SAFETY: The place is this CPU's alone, which takes no interrupts at EL2. There is no other reference.
        let state = unsafe { &mut *this.host.get() };
        // Before anything that not all CPUs have.
        if !state.is_known() {
            if read_sysreg!("midr_el1") != self.guests.midr {
                return Err(Status::NotSupported);
            }
            state.learn(self.guests.features);
        }
        // SVCR.SM: what SVE instructions would save is not what there is.
        if self.guests.features.sme() && read_sysreg!("s3_3_c4_c2_2") & 1 != 0 {
            return Err(Status::Busy);
        }
        world::leave_host(state, self.guests.features);
        host.virtual_timer = state.virtual_timer();
        Ok(())
    }

    fn return_to_host(&self, _: &AbsentHost) {
        let Some(this) = CpuStart::current() else { return };
        // SAFETY: As above.
        world::return_to_host(unsafe { &*this.host.get() }, self.guests.features);
    }

    fn enter<H: FnMut(u64, &mut Context) -> bool>(
        &self,
        host: &AbsentHost,
        guest: &mut Entry<'_>,
        mut handles: H,
    ) -> Left {
        self.guests.put_in(host, guest);
        // SAFETY: The context is the vCPU's alone, and nobody uses the closure meanwhile. All that the guest can do is bounded
        // by the registers of EL2 that have just been set; the assembly keeps what Rust expects to be kept.
        let why = unsafe { guest_run(guest.context, handle::<H>, (&raw mut handles).cast()) };
        let left = match why {
            0 => Left::Synchronous(Syndrome {
                esr: read_sysreg!("esr_el2"),
                far: read_sysreg!("far_el2"),
                hpfar: read_sysreg!("hpfar_el2"),
            }),
            1 | 2 => Left::Interrupt,
            _ => Left::Error,
        };
        self.guests.take_out(guest);
        left
    }

    fn area_pages(&self) -> u64 {
        vectors::area_pages(self.guests.features.sve())
    }

    fn load_vectors(&self, area: PhysRange) {
        vectors::load_guest(area, self.guests.features.sve());
    }

    fn unload_vectors(&self, area: PhysRange) {
        vectors::load_host(area, self.guests.features.sve());
    }

    fn guest_vectors(&self, area: PhysRange) -> VectorPlaces {
        vectors::places(area, self.guests.features.sve())
    }

    fn clear_vectors(&self, area: PhysRange) {
        vectors::clear_guest(area);
    }

    fn counter(&self) -> u64 {
        // Not read ahead of what comes before (Arm ARM DDI 0487, D12.1.2).
        maintain!("isb");
        read_sysreg!("cntpct_el0")
    }

    fn interrupt_pending(&self, host: &AbsentHost) -> bool {
        const IRQ_OR_FIQ: u64 = 0b11 << 6;
        read_sysreg!("isr_el1") & IRQ_OR_FIQ != 0
            || host.virtual_timer.is_some_and(|deadline| deadline <= self.counter())
    }

    fn hold_virtual_timer(&self) -> bool {
        gic::hold_virtual_timer(self.guests.redistributors)
    }

    fn release_virtual_timer(&self) {
        gic::release_virtual_timer(self.guests.redistributors);
    }

    fn list_registers(&self) -> usize {
        self.guests.list_registers
    }

    fn pstate_features(&self) -> PstateFeatures {
        self.guests.pstate
    }

    fn id_registers(&self) -> IdRegisters {
        IdRegisters {
            id_aa64pfr0_el1: read_sysreg!("id_aa64pfr0_el1"),
            id_aa64pfr1_el1: read_sysreg!("id_aa64pfr1_el1"),
            id_aa64zfr0_el1: read_sysreg!("s3_0_c0_c4_4"),
            id_aa64isar0_el1: read_sysreg!("id_aa64isar0_el1"),
            id_aa64isar1_el1: read_sysreg!("id_aa64isar1_el1"),
            id_aa64isar2_el1: read_sysreg!("s3_0_c0_c6_2"),
            id_aa64mmfr0_el1: read_sysreg!("id_aa64mmfr0_el1"),
            id_aa64mmfr1_el1: read_sysreg!("id_aa64mmfr1_el1"),
            id_aa64mmfr2_el1: read_sysreg!("s3_0_c0_c7_2"),
            id_aa64mmfr3_el1: read_sysreg!("s3_0_c0_c7_3"),
        }
    }
}

/// Sets the timer of EL2, whose interrupt the host has enabled, to fire when the physical counter reaches `deadline`.
fn arm(deadline: Option<u64>) {
    match deadline {
        Some(deadline) => {
            write_lower_sysreg!("cnthp_cval_el2", deadline);
            write_lower_sysreg!("cnthp_ctl_el2", TIMER_ENABLE);
        }
        None => write_lower_sysreg!("cnthp_ctl_el2", 0),
    }
}

/// Removes what the TLBs of this CPU hold of the guest, unless the vCPU that ran here last is the same: an address space
/// identifier means what it means to one vCPU (CNP clear), and a VMID is all that tells them apart.
fn forget_other_vcpus(guest: &Entry<'_>) {
    let Some(this) = CpuStart::current() else { return };
    // Tables of another VM at the same place have been invalidated when the VM ended.
    let vcpu = guest.tree.vttbr.bits() | guest.vcpu as u64;
    if this.last_vcpu.load(Relaxed) != vcpu {
        this.last_vcpu.store(vcpu, Relaxed);
        maintain!("tlbi vmalle1", "dsb nsh", "isb");
    }
}

impl EntropySource for Hardware {
    fn bits(&self) -> Option<[u64; 3]> {
        if self.guests.features.rndr() {
            return Some([random()?, random()?, random()?]);
        }
        firmware::entropy()
    }

    fn exists(&self) -> bool {
        self.guests.features.rndr() || self.guests.firmware_entropy
    }
}

/// Reads RNDR. `None` if it has none in reasonable time, which it says by the Z flag.
fn random() -> Option<u64> {
    let (value, found): (u64, u64);
    // SAFETY: Changes nothing but the flags.
    unsafe {
        core::arch::asm!("mrs {}, s3_3_c2_c4_0", "cset {}, ne", out(reg) value, out(reg) found, options(nomem, nostack));
    }
    (found != 0).then_some(value)
}

impl PageAccess for Hardware {
    fn read_bytes(&self, at: PhysAddr, bytes: &mut [u8]) {
        let source = ptr::with_exposed_provenance::<u8>(at.raw() as usize);
        for (offset, byte) in bytes.iter_mut().enumerate() {
            // Volatile, because others may write there at the same time; no Rust object lives there.
            // SAFETY: The caller has the page mapped, and the offset stays within it.
            *byte = unsafe { source.wrapping_add(offset).read_volatile() };
        }
    }

    fn write_bytes(&self, at: PhysAddr, bytes: &[u8]) {
        let target = ptr::with_exposed_provenance_mut::<u8>(at.raw() as usize);
        for (offset, &byte) in bytes.iter().enumerate() {
            // SAFETY: As in `read_bytes`; the page is mapped writable.
            unsafe { target.wrapping_add(offset).write_volatile(byte) };
        }
    }

    fn read_words<const N: usize>(&self, at: PhysAddr) -> [u64; N] {
        assert!(at.is_aligned(8));
        // SAFETY: As in `read_bytes`, and aligned.
        unsafe { ptr::with_exposed_provenance::<[u64; N]>(at.raw() as usize).read_volatile() }
    }

    #[inline]
    fn write_words<const N: usize>(&self, at: PhysAddr, words: &[u64; N]) {
        assert!(at.is_aligned(8));
        let target = ptr::with_exposed_provenance_mut::<u64>(at.raw() as usize);
        // No loop, which code that is built for size would keep: words may come from registers.
        macro_rules! write {
            ($($index:literal)+) => {
                const { assert!(N <= [$($index),+].len()) };
                $(if let Some(&word) = words.get($index) {
                    // SAFETY: As in `read_words`; the page is mapped writable.
                    unsafe { target.wrapping_add($index).write_volatile(word) };
                })+
            };
        }
        write!(0 1 2 3 4 5 6 7 8 9 10);
    }
}

/// What running guests needs to know of the machine, read once. By default there are none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Guests {
    features: Features,
    physical: PhysicalSize,
    pstate: PstateFeatures,
    list_registers: usize,
    /// Registers of active priorities for each group.
    active_priorities: u64,
    /// Whether firmware has true random numbers.
    firmware_entropy: bool,
    /// What the CPU is; guests do not run on others.
    midr: u64,
    /// What is mapped of the redistributors.
    redistributors: &'static [PhysRange],
}

impl Guests {
    pub(crate) fn new(redistributors: &'static [PhysRange]) -> Self {
        let midr = read_sysreg!("midr_el1");
        Self {
            features: Features::read(),
            physical: physical_address_size(),
            pstate: pstate_features(),
            list_registers: gic::list_registers(),
            active_priorities: gic::active_priority_registers(),
            firmware_entropy: firmware::has_entropy(),
            midr,
            redistributors,
        }
    }

    /// Puts a guest into the CPU, all but what `guest_run` does. Where EL2 is built for speed, unlike what is generic.
    #[inline(never)]
    fn put_in(&self, host: &AbsentHost, guest: &Entry<'_>) {
        use_vectors!("guest_vectors");
        world::enter_guest(guest, self.physical, self.features);
        forget_other_vcpus(guest);
        arm(host.virtual_timer.into_iter().chain(guest.deadline).min());
        gic::load(guest.gic, self.active_priorities);
        el1::load(guest.context, self.features);
    }

    /// Takes it out again.
    #[inline(never)]
    fn take_out(&self, guest: &mut Entry<'_>) {
        use_vectors!("vectors");
        el1::save(guest.context, self.features);
        gic::save(guest.gic, self.active_priorities);
        arm(None);
    }
}
