//! The distributor's own registers.

use crate::{
    INTIDS,
    gic::{Gic, Vcpus},
    interrupt::Interrupt,
    mmio::{Access, IIDR, PIDR2},
    vcpu_set::{VcpuSet, vcpu_of_affinity},
};

/// State of the distributor that concerns all interrupts.
///
/// Valid with any contents, but of no use before [`Gic::reset_distributor`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Distributor {
    /// Running vCPUs with list registers that hold what has been disabled meanwhile.
    pub(crate) stale: VcpuSet,
    /// GICD_CTLR.EnableGrp0 and EnableGrp1.
    groups: u8,
    /// The vCPU that 1-of-N interrupts go to, plus one; 0 if there is none.
    elected: u8,
}

impl Distributor {
    pub(crate) const fn has_group(&self, group: u32) -> bool {
        self.groups >> (group & 1) & 1 != 0
    }

    pub(crate) fn elected(&self) -> Option<usize> {
        self.elected.checked_sub(1).map(usize::from)
    }

    pub(crate) fn set_elected(&mut self, vcpu: Option<usize>) {
        self.elected = vcpu.and_then(|vcpu| u8::try_from(vcpu).ok()?.checked_add(1)).unwrap_or(0);
    }
}

/// One shared peripheral interrupt and where it is routed.
///
/// Valid with any contents, but of no use before [`Gic::reset_distributor`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Spi {
    pub(crate) interrupt: Interrupt,
    /// Bits 31:0 of `GICD_IROUTER<n>`.
    route: u32,
}

/// `GICD_IROUTER<n>.Interrupt_Routing_Mode`: any one participating vCPU.
const ROUTE_ANY: u32 = 1 << 31;
/// `GICD_IROUTER<n>`: Aff2, Aff1 and Aff0. There is no Aff3 (GICD_TYPER.A3V = 0).
const ROUTE_AFFINITY: u32 = 0xff_ffff;

impl Spi {
    pub(crate) const fn reset() -> Self {
        Self { interrupt: Interrupt::reset(INTIDS), route: 0 }
    }

    pub(crate) const fn is_any(&self) -> bool {
        self.route & ROUTE_ANY != 0
    }

    /// Returns `None` if any vCPU will do, else the one to which the SPI is routed, if it can exist.
    pub(crate) fn target(&self) -> Option<Option<usize>> {
        (!self.is_any()).then(|| vcpu_of_affinity(self.route & ROUTE_AFFINITY))
    }
}

const CTLR: u64 = 0x0000;
const TYPER: u64 = 0x0004;
const IIDR_OFFSET: u64 = 0x0008;
const SETSPI_NSR: u64 = 0x0040;
const CLRSPI_NSR: u64 = 0x0048;
const IROUTER: u64 = 0x6000;
const PIDR2_OFFSET: u64 = 0xffe8;

/// GICD_CTLR.EnableGrp0 and EnableGrp1.
const CTLR_GROUPS: u64 = 0b11;
/// GICD_CTLR.ARE.
const CTLR_ARE: u64 = 1 << 4;
/// GICD_CTLR.DS.
const CTLR_DS: u64 = 1 << 6;
/// GICD_CTLR.RWP.
const CTLR_RWP: u64 = 1 << 31;

/// GICD_TYPER.MBIS: message-based SPIs.
const TYPER_MBIS: u64 = 1 << 16;
/// GICD_TYPER.IDbits: INTIDs have 10 bits.
const TYPER_ID_BITS: u64 = 9 << 19;

/// INTID in GICD_SETSPI_NSR and GICD_CLRSPI_NSR.
const MESSAGE_INTID: u64 = 0x3ff;

impl<V: Vcpus + ?Sized> Gic<'_, V> {
    /// Performs an access to a register of the distributor that is not part of a bank (12.8, 12.9).
    pub(crate) fn distributor_register(&mut self, offset: u64, access: Access) -> (u64, VcpuSet) {
        let nothing = (0, VcpuSet::EMPTY);
        match (offset, access) {
            (CTLR, Access::Read { size: 4 }) => (self.control(), VcpuSet::EMPTY),
            (CTLR, Access::Write { size: 4, value }) => (0, self.write_control(value)),
            (TYPER, Access::Read { size: 4 }) => (self.distributor_type(), VcpuSet::EMPTY),
            (IIDR_OFFSET, Access::Read { size: 4 }) => (IIDR, VcpuSet::EMPTY),
            (PIDR2_OFFSET, Access::Read { size: 4 }) => (PIDR2, VcpuSet::EMPTY),
            (SETSPI_NSR, Access::Write { size: 2 | 4, value }) => (0, self.message(value, true)),
            (CLRSPI_NSR, Access::Write { size: 2 | 4, value }) => (0, self.message(value, false)),
            _ => match offset.checked_sub(IROUTER) {
                Some(at) if at < u64::from(INTIDS) << 3 => self.route(at, access),
                _ => nothing,
            },
        }
    }

    fn control(&self) -> u64 {
        let pending = if self.distributor.stale.is_empty() { 0 } else { CTLR_RWP };
        u64::from(self.distributor.groups) | CTLR_ARE | CTLR_DS | pending
    }

    fn write_control(&mut self, value: u64) -> VcpuSet {
        let groups = u8::try_from(value & CTLR_GROUPS).unwrap_or(0);
        let before = self.distributor.groups;
        self.distributor.groups = groups;
        let mut kick = VcpuSet::EMPTY;
        if groups == before {
            return kick;
        }
        for vcpu in 0..self.vcpus.count() {
            let Some(gic) = self.vcpus.get(vcpu).filter(|gic| !gic.queue.is_empty()) else { continue };
            kick.insert(vcpu);
            if gic.holds_interrupts() && before & !groups != 0 {
                self.distributor.stale.insert(vcpu);
            }
        }
        kick
    }

    fn distributor_type(&self) -> u64 {
        let lines = u64::try_from(self.spis.len() / 32).unwrap_or(0);
        lines | TYPER_MBIS | TYPER_ID_BITS
    }

    fn message(&mut self, value: u64, level: bool) -> VcpuSet {
        match u16::try_from(value & MESSAGE_INTID) {
            Ok(intid) if self.spi_mut(intid).is_some() => {
                self.update(0, intid, |interrupt| interrupt.set_message(level))
            }
            _ => VcpuSet::EMPTY,
        }
    }

    /// `GICD_IROUTER<n>`, in 64 bits or either half.
    fn route(&mut self, at: u64, access: Access) -> (u64, VcpuSet) {
        let low_half = at & 7 == 0;
        let intid = u16::try_from(at >> 3).unwrap_or(INTIDS);
        let Some(spi) = self.spi_mut(intid) else { return (0, VcpuSet::EMPTY) };
        match access {
            Access::Read { size: 4 | 8 } if low_half => (u64::from(spi.route), VcpuSet::EMPTY),
            Access::Write { size: 4 | 8, value } if low_half => {
                let route = u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0) & (ROUTE_ANY | ROUTE_AFFINITY);
                if spi.route == route {
                    return (0, VcpuSet::EMPTY);
                }
                spi.route = route;
                (0, self.settle(0, intid))
            }
            _ => (0, VcpuSet::EMPTY),
        }
    }
}
