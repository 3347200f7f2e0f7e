//! The redistributors' own registers.

use crate::{
    gic::{Gic, Vcpus},
    mmio::{Access, IIDR, PIDR2},
    vcpu::VcpuGic,
    vcpu_set::{VcpuSet, affinity},
};

const CTLR: u64 = 0x0000;
const IIDR_OFFSET: u64 = 0x0004;
const TYPER: u64 = 0x0008;
const TYPER_HIGH: u64 = 0x000c;
const WAKER: u64 = 0x0014;
const PIDR2_OFFSET: u64 = 0xffe8;

/// GICR_CTLR.RWP.
const CTLR_RWP: u64 = 1 << 3;
/// GICR_TYPER.Last.
const TYPER_LAST: u64 = 1 << 4;
/// GICR_WAKER.ProcessorSleep.
const WAKER_PROCESSOR_SLEEP: u64 = 1 << 1;
/// GICR_WAKER.ChildrenAsleep.
const WAKER_CHILDREN_ASLEEP: u64 = 1 << 2;

impl<V: Vcpus + ?Sized> Gic<'_, V> {
    /// Performs an access to the frame RD_base of the redistributor of `owner` (12.10, 12.11). A vCPU that does not
    /// exist yet already has what identifies it, so that a guest can walk all redistributors up to the last one.
    pub(crate) fn redistributor_register(&mut self, owner: usize, offset: u64, access: Access) -> (u64, VcpuSet) {
        let stale = self.distributor.stale.contains(owner);
        let asleep = self.vcpus.get(owner).is_some_and(VcpuGic::is_asleep);
        let value = match (offset, access) {
            (CTLR, Access::Read { size: 4 }) if stale => CTLR_RWP,
            (IIDR_OFFSET, Access::Read { size: 4 }) => IIDR,
            (TYPER, Access::Read { size: 8 }) => self.redistributor_type(owner),
            (TYPER, Access::Read { size: 4 }) => self.redistributor_type(owner) & u64::from(u32::MAX),
            (TYPER_HIGH, Access::Read { size: 4 }) => self.redistributor_type(owner) >> 32,
            (PIDR2_OFFSET, Access::Read { size: 4 }) => PIDR2,
            (WAKER, Access::Read { size: 4 }) => match (asleep, stale) {
                (false, _) => 0,
                (true, false) => WAKER_PROCESSOR_SLEEP | WAKER_CHILDREN_ASLEEP,
                (true, true) => WAKER_PROCESSOR_SLEEP,
            },
            (WAKER, Access::Write { size: 4, value }) => {
                return (0, self.set_asleep(owner, value & WAKER_PROCESSOR_SLEEP != 0));
            }
            _ => 0,
        };
        (value, VcpuSet::EMPTY)
    }

    fn redistributor_type(&self, owner: usize) -> u64 {
        let last = if owner.checked_add(1) == Some(self.vcpus.count()) { TYPER_LAST } else { 0 };
        let number = u64::try_from(owner).unwrap_or(0);
        u64::from(affinity(owner)) << 32 | number << 8 | last
    }

    fn set_asleep(&mut self, owner: usize, asleep: bool) -> VcpuSet {
        let Some(gic) = self.vcpus.get_mut(owner) else { return VcpuSet::EMPTY };
        if gic.is_asleep() == asleep {
            return VcpuSet::EMPTY;
        }
        gic.asleep = asleep.into();
        let mut kick = VcpuSet::EMPTY;
        if !gic.queue.is_empty() {
            kick.insert(owner);
            if gic.holds_interrupts() && asleep {
                self.distributor.stale.insert(owner);
            }
        }
        kick.extend(self.elect());
        kick
    }
}
