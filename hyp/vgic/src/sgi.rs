//! Software-generated interrupts.

use crate::{
    gic::{Gic, Vcpus},
    interrupt::{Flags, Interrupt},
    vcpu_set::{VcpuSet, vcpu_of_affinity},
};

/// Register by which an SGI is generated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SgiRegister {
    /// ICC_SGI0R_EL1: SGIs that are Group 0 at their target.
    Sgi0,
    /// ICC_SGI1R_EL1: SGIs of either group.
    Sgi1,
    /// ICC_ASGI1R_EL1: Group 1 of the other security state, of which here only Group 0 is left.
    AliasSgi1,
}

/// ICC_SGI1R_EL1.IRM: all vCPUs but the sender.
const ALL_BUT_SELF: u64 = 1 << 40;

/// Returns the `width` bits of `value` from `shift` up.
const fn field(value: u64, shift: u32, width: u32) -> u64 {
    value >> shift & !(u64::MAX << width)
}

/// Returns the affinity that bit `n` of the target list stands for (12.2 ICC_SGI1R_EL1), or `None` if it has a level
/// 3, which no vCPU has.
fn target(value: u64, n: u64) -> Option<u32> {
    let (aff1, aff2, aff3) = (field(value, 16, 8), field(value, 32, 8), field(value, 48, 8));
    let range = field(value, 44, 4);
    if aff3 != 0 {
        return None;
    }
    u32::try_from(aff2 << 16 | aff1 << 8 | range << 4 | n).ok()
}

impl<V: Vcpus + ?Sized> Gic<'_, V> {
    /// Generates an SGI for a trapped write of `value` by `vcpu`. Targets that do not exist are ignored.
    ///
    /// Returns the vCPUs that must look, without `vcpu` itself.
    pub fn send_sgi(&mut self, vcpu: usize, register: SgiRegister, value: u64) -> VcpuSet {
        let intid = u16::try_from(field(value, 24, 4)).unwrap_or(0);
        let mut kick = VcpuSet::EMPTY;
        if value & ALL_BUT_SELF != 0 {
            for other in (0..self.vcpus.count()).filter(|&other| other != vcpu) {
                kick.extend(self.send_to(other, intid, register));
            }
        } else {
            for n in (0..16).filter(|n| value >> n & 1 != 0) {
                if let Some(to) = target(value, n).and_then(vcpu_of_affinity) {
                    kick.extend(self.send_to(to, intid, register));
                }
            }
        }
        kick.without(vcpu)
    }

    fn send_to(&mut self, vcpu: usize, intid: u16, register: SgiRegister) -> VcpuSet {
        self.update(vcpu, intid, |interrupt: &mut Interrupt| {
            if register == SgiRegister::Sgi1 || !interrupt.is(Flags::GROUP1) {
                interrupt.set_pending();
            }
        })
    }
}
