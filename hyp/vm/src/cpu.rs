//! What running a vCPU asks of the CPU.

use ravelin_abi::Status;
use ravelin_memory::{Ipa, PhysAddr, PhysRange};
use ravelin_ownership::Conversion;
use ravelin_pgtable::{Tree, Vttbr};
use ravelin_vgic::ListRegisters;

use crate::{Context, EntropySource, IdRegisters, PageAccess, PstateFeatures, Syndrome};

/// A CPU that runs vCPUs.
///
/// From [`GuestCpu::leave_host`] to [`GuestCpu::return_to_host`] the CPU's EL1 is for the guest, and whoever calls does not
/// return to the host.
pub trait GuestCpu: EntropySource + PageAccess {
    /// What is known of the host while its CPU runs a guest.
    type Host: Default;

    /// Takes the host's registers out of the CPU, and says in `host` what of them matters meanwhile.
    ///
    /// # Errors
    ///
    /// BUSY if the host is in a state that cannot be switched (streaming SVE mode); NOT_SUPPORTED if guests cannot run on this
    /// CPU because it is not like the one that the machine has started on. Nothing has changed.
    fn leave_host(&self, host: &mut Self::Host) -> Result<(), Status>;

    /// Puts the host's registers back, all but those that a call returns results in.
    fn return_to_host(&self, host: &Self::Host);

    /// Runs a guest until it comes to EL2 with what `handles` does not handle. What the CPU has cached for other vCPUs of the
    /// same VM is not used.
    ///
    /// `handles` gets the value of ESR_EL2 of calls by HVC and SMC, of accesses to system registers, and maybe of others. While
    /// it runs, all but `x`, `pc` and `pstate` are in the CPU, and not in the context; at a call also x19 to x28.
    /// It returns whether the guest goes on at once.
    fn enter<H: FnMut(u64, &mut Context) -> bool>(&self, host: &Self::Host, guest: &mut Entry<'_>, handles: H) -> Left;

    /// Returns how many pages FP, SIMD and SVE registers of a guest and of the host take.
    fn area_pages(&self) -> u64;

    /// Takes the host's FP, SIMD and SVE registers out of the CPU, and puts a guest's in. `area` has room for both.
    fn load_vectors(&self, area: PhysRange);

    /// Takes a guest's registers out of the CPU, and puts the host's in, which [`GuestCpu::load_vectors`] took.
    fn unload_vectors(&self, area: PhysRange);

    /// Returns where in `area` a guest's registers are while they are not in the CPU.
    fn guest_vectors(&self, area: PhysRange) -> VectorPlaces;

    /// Zeroes what `area` has of a guest.
    fn clear_vectors(&self, area: PhysRange);

    /// Returns the value of the physical counter (CNTPCT_EL0).
    fn counter(&self) -> u64;

    /// Returns whether an interrupt waits for the host. That of its virtual timer, which is not in the CPU while the guest's is,
    /// waits since the timer's deadline.
    fn interrupt_pending(&self, host: &Self::Host) -> bool;

    /// Activates the interrupt of the virtual timer, which is the guest's, and returns whether it was not active. While it is, it
    /// does not come again, though the timer asserts it.
    fn hold_virtual_timer(&self) -> bool;

    /// Deactivates the interrupt that [`GuestCpu::hold_virtual_timer`] activated.
    fn release_virtual_timer(&self);

    /// Returns how many list registers there are, 1 to 16.
    fn list_registers(&self) -> usize;

    /// Is told of conversions that have been made for the guest that has these tables, or have not: its ring's, not its calls'.
    fn note_conversions(&self, _tree: Vttbr, _conversions: impl Iterator<Item = (Conversion, bool)>) {}

    /// Is told that a page has been unpinned without a call of the guest.
    fn note_unpinned(&self, _tree: Vttbr, _page: Ipa) {}

    /// Returns the features that have a part in what PSTATE is after an exception.
    fn pstate_features(&self) -> PstateFeatures;

    /// Returns the ID registers of the CPUs that run guests.
    fn id_registers(&self) -> IdRegisters;
}

/// What a guest is entered with.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Registers.
    pub context: &'a mut Context,
    /// The interrupt controller's CPU interface.
    pub gic: &'a mut ListRegisters,
    /// Stage 2.
    pub tree: &'a Tree,
    /// Which vCPU of the VM it is.
    pub vcpu: usize,
    /// Which vector registers the guest may use; they have been loaded.
    pub vectors: Vectors,
    /// Value of the physical counter at which the guest is to be left at the latest.
    pub deadline: Option<u64>,
}

/// Where vector registers are, in memory of EL2 that [`PageAccess`] gets at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VectorPlaces {
    /// 64 bits with FPSR, and then as many with FPCR.
    pub status: PhysAddr,
    /// The 128 bits of V0.
    pub first: PhysAddr,
    /// How far apart registers are, in bytes.
    pub stride: u64,
}

/// Vector registers that do not trap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// None.
    None,
    /// FP and SIMD.
    Simd,
    /// FP, SIMD and SVE.
    Sve,
}

/// How a guest came to EL2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// By an exception of its own.
    Synchronous(Syndrome),
    /// By a physical interrupt.
    Interrupt,
    /// By an SError.
    Error,
}
