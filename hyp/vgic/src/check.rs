//! Whether homes, queues and list registers agree: for tests.

use crate::{
    FIRST_SPI, INTIDS,
    gic::{Gic, Vcpus},
    interrupt::Flags,
};

/// What a vCPU has of this interrupt contradicts itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inconsistency {
    /// Index of the vCPU.
    pub vcpu: usize,
    /// The interrupt, which may also be an SPI.
    pub intid: u16,
}

impl<V: Vcpus + ?Sized> Gic<'_, V> {
    /// Checks what always holds between homes, queues and list registers. Its time grows with vCPUs and interrupts.
    ///
    /// # Errors
    ///
    /// The first inconsistency.
    pub fn check(&self) -> Result<(), Inconsistency> {
        let all = (0..self.vcpus.count()).flat_map(|vcpu| (0..INTIDS).map(move |intid| (vcpu, intid)));
        for (vcpu, intid) in all {
            if !self.agrees(vcpu, intid) {
                return Err(Inconsistency { vcpu, intid });
            }
        }
        Ok(())
    }

    fn agrees(&self, vcpu: usize, intid: u16) -> bool {
        let (Some(gic), Some(interrupt)) = (self.vcpus.get(vcpu), self.interrupt(vcpu, intid)) else { return true };
        let at_home = interrupt.home() == Some(vcpu);
        let queued = gic.queue.next(intid) == Some(intid);
        let placed = if interrupt.is(Flags::LISTED) {
            interrupt.home().and_then(|home| self.vcpus.get(home)).is_some_and(|home| {
                home.is_running() && home.listed.iter().take(home.used.into()).any(|&listed| listed == intid)
            })
        } else {
            let waits = intid < FIRST_SPI && interrupt.is(Flags::ENABLED) && interrupt.is_pending();
            at_home || !waits
        };
        queued == at_home && placed
    }
}
