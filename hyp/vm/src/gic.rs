//! Where a VM keeps its interrupt controller.

use ravelin_vgic::{Distributor, FIRST_SPI, Gic, Spi, VcpuGic, Vcpus};

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
        let Some(mut gic) = self.view() else { return };
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
    pub(crate) fn view(&mut self) -> Option<Gic<'_, VcpuGics<O>>> {
        Gic::new(&mut self.distributor, &mut self.spis, &mut self.vcpus)
    }
}
