//! Where a VM keeps its interrupt controller.

use ravelin_memory::IpaRange;
use ravelin_vgic::{Distributor, FIRST_SPI, FRAME_SIZE, Frame, Gic, RedistributorFrame, Spi, VcpuGic, Vcpus};

use crate::object::ObjectMemory;

/// How many SPIs a VM has: INTIDs 32 to 287, as many as the machines have that VMMs imitate.
pub(crate) const SPIS: usize = 256;

/// State of a VM's interrupt controller.
pub(crate) struct VmGic<O: ObjectMemory> {
    distributor: Distributor,
    spis: O::Slice<Spi>,
    vcpus: VcpuGics<O>,
}

/// What each vCPU has, once it exists.
pub struct VcpuGics<O: ObjectMemory>(O::Slice<Option<VcpuGic>>);

impl<O: ObjectMemory> Vcpus for VcpuGics<O> {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn get(&self, vcpu: usize) -> Option<&VcpuGic> {
        self.0.get(vcpu)?.as_ref()
    }

    fn get_mut(&mut self, vcpu: usize) -> Option<&mut VcpuGic> {
        self.0.get_mut(vcpu)?.as_mut()
    }
}

impl<O: ObjectMemory> VmGic<O> {
    pub(crate) fn new(spis: O::Slice<Spi>, vcpus: O::Slice<Option<VcpuGic>>) -> Self {
        Self { distributor: Distributor::default(), spis, vcpus: VcpuGics(vcpus) }
    }

    /// Adds what a new vCPU has.
    pub(crate) fn add(&mut self, vcpu: usize) {
        if let Some(gic) = self.vcpus.0.get_mut(vcpu) {
            *gic = Some(VcpuGic::new());
        }
    }

    /// Prepares for the start of the VM. All SPIs are the host's, which plays all devices.
    pub(crate) fn reset(&mut self) {
        let vcpus = self.vcpus.count();
        let mut gic = self.view();
        gic.reset_distributor();
        for intid in u32::from(FIRST_SPI).. {
            if gic.give_to_host(intid).is_err() {
                break;
            }
        }
        for vcpu in 0..vcpus {
            // None of them runs yet that would have to be told.
            let _ = gic.reset_vcpu(vcpu);
        }
    }

    /// Returns the controller for one operation.
    pub(crate) fn view(&mut self) -> Gic<'_, VcpuGics<O>> {
        Gic::new(&mut self.distributor, &mut self.spis, &mut self.vcpus)
    }
}

/// Where a guest finds its interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GicFrames {
    distributor: IpaRange,
    /// Two frames for each vCPU, [`RedistributorFrame::Control`] first.
    redistributors: IpaRange,
}

impl GicFrames {
    /// Returns the frames at these guest addresses, for a VM of so many vCPUs. `None` if they are no multiples of the size of
    /// a frame, or overlap.
    pub(crate) fn new(distributor: u64, redistributors: u64, vcpus: u64) -> Option<Self> {
        let frames = |base: u64, count: u64| {
            let range = IpaRange::from_bounds(base, base.checked_add(count.checked_mul(FRAME_SIZE)?)?).ok()?;
            base.is_multiple_of(FRAME_SIZE).then_some(range)
        };
        let distributor = frames(distributor, 1)?;
        let redistributors = frames(redistributors, vcpus.checked_mul(2)?)?;
        (!distributor.overlaps(&redistributors)).then_some(Self { distributor, redistributors })
    }

    /// Returns the guest addresses that are taken.
    pub(crate) const fn ranges(&self) -> [IpaRange; 2] {
        [self.distributor, self.redistributors]
    }

    /// Returns the frame that an address lies in, and the offset there.
    pub(crate) fn find(&self, address: u64) -> Option<(Frame, u64)> {
        let offset = address % FRAME_SIZE;
        let within = |range: &IpaRange| (range.base().raw()..range.end()).contains(&address);
        if within(&self.distributor) {
            return Some((Frame::Distributor, offset));
        }
        let number = within(&self.redistributors)
            .then(|| address.saturating_sub(self.redistributors.base().raw()).checked_div(FRAME_SIZE))??;
        let frame = if number % 2 == 0 { RedistributorFrame::Control } else { RedistributorFrame::Private };
        Some((Frame::Redistributor { vcpu: usize::try_from(number / 2).ok()?, frame }, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_has_its_frame() {
        let frames = GicFrames::new(0x800_0000, 0x80a_0000, 2).unwrap();
        let redistributor = |vcpu, frame, offset| Some((Frame::Redistributor { vcpu, frame }, offset));
        assert_eq!(frames.find(0x7ff_fffc), None);
        assert_eq!(frames.find(0x800_0000), Some((Frame::Distributor, 0)));
        assert_eq!(frames.find(0x800_fffc), Some((Frame::Distributor, 0xfffc)));
        assert_eq!(frames.find(0x801_0000), None);
        assert_eq!(frames.find(0x80a_0008), redistributor(0, RedistributorFrame::Control, 8));
        assert_eq!(frames.find(0x80b_0100), redistributor(0, RedistributorFrame::Private, 0x100));
        assert_eq!(frames.find(0x80c_0000), redistributor(1, RedistributorFrame::Control, 0));
        assert_eq!(frames.find(0x80d_ffff), redistributor(1, RedistributorFrame::Private, 0xffff));
        assert_eq!(frames.find(0x80e_0000), None);
    }

    #[test]
    fn frames_are_aligned_and_apart() {
        assert!(GicFrames::new(0x800_0000, 0x801_0000, 128).is_some());
        for (distributor, redistributors) in
            [(0x800_1000, 0x80a_0000), (0x800_0000, 0x80a_8000), (0x803_0000, 0x800_0000), (!0xffff, 0)]
        {
            assert_eq!(GicFrames::new(distributor, redistributors, 2), None, "{distributor:#x} {redistributors:#x}");
        }
    }
}
