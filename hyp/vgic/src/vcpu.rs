//! What each vCPU has for itself.

use crate::{
    FIRST_SPI,
    ich::{MAX_LIST_REGISTERS, VMCR_VENG},
    interrupt::Interrupt,
    queue::Queue,
};

/// SGIs, PPIs, and CPU interface of a vCPU.
///
/// Valid with any contents, but of no use before [`Gic::reset_vcpu`](crate::Gic::reset_vcpu).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct VcpuGic {
    pub(crate) private: [Interrupt; 32],
    /// Interrupts whose home this vCPU is.
    pub(crate) queue: Queue,
    /// INTIDs in the list registers while the vCPU runs, the first `used` of them.
    pub(crate) listed: [u16; MAX_LIST_REGISTERS],
    pub(crate) used: u8,
    /// Not zero from entry to exit, and after an exit with nothing to take back until the next entry or reset.
    pub(crate) running: u8,
    /// GICR_WAKER.ProcessorSleep.
    pub(crate) asleep: u8,
    /// ICH_VMCR_EL2 as of the last exit.
    pub(crate) vmcr: u32,
    /// `ICH_AP0R<n>_EL2` as of the last exit with something to take back.
    pub(crate) ap0r: [u32; 4],
    /// `ICH_AP1R<n>_EL2`, likewise.
    pub(crate) ap1r: [u32; 4],
}

impl VcpuGic {
    /// State after reset. The redistributor is awake, as firmware leaves it to its OS.
    #[must_use]
    pub fn new() -> Self {
        let mut private = [Interrupt::default(); 32];
        for (intid, interrupt) in (0..FIRST_SPI).zip(&mut private) {
            *interrupt = Interrupt::reset(intid);
        }
        Self { private, ..Self::default() }
    }

    pub(crate) const fn is_running(&self) -> bool {
        self.running != 0
    }

    /// Returns whether the CPU that runs it holds interrupts in list registers.
    pub(crate) const fn holds_interrupts(&self) -> bool {
        self.is_running() && self.used != 0
    }

    pub(crate) const fn is_asleep(&self) -> bool {
        self.asleep != 0
    }

    /// Returns the group enables of the CPU interface.
    pub(crate) fn groups(&self) -> u64 {
        u64::from(self.vmcr) & VMCR_VENG
    }
}
