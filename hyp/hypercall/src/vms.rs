//! Host calls about VMs.

use ravelin_abi::VmCall;
use ravelin_pgtable::{Machine, TablePool};
use ravelin_vm::{GuestCpu, Handle, MachineMemory, ObjectMemory, Refusal, Start, VcpuPages, VcpuState};

use crate::{
    firmware::Firmware,
    host::{Host, HostedVms, SUCCESS, range, single},
    registers::{Registers, set_results},
};

impl<P: TablePool, F: Firmware, O: ObjectMemory> Host<'_, P, F, O> {
    /// Performs a call about VMs. Out of line, so that the other calls do not pay for its stack.
    #[inline(never)]
    pub(crate) fn perform_vm<M: Machine + GuestCpu>(
        &self,
        machine: &M,
        call: &VmCall,
        registers: &mut Registers,
    ) -> Result<(), Refusal> {
        let Self { vms, memory, .. } = self;
        let memory = &MachineMemory::new(memory, machine);
        let vm = Handle::from_raw;
        let nothing = |()| 0;
        let x1 = match *call {
            VmCall::Create { attributes, metadata } => vms.create(memory, attributes, range(metadata)?)?.raw(),
            VmCall::DonateTables { handle, tables } => {
                vms.donate_tables(memory, vm(handle), range(tables)?).map(nothing)?
            }
            VmCall::CreateVcpu { handle, index, metadata, run_page } => {
                let (metadata, run_page) = (range(metadata)?, single(run_page)?.base());
                let pages = VcpuPages { metadata, area: machine.area_pages(), run_page };
                vms.create_vcpu(memory, vm(handle), index, &pages, |attributes, index, area| {
                    VcpuState::new(machine, index, attributes.ipa_bits, area)
                })
                .map(nothing)?
            }
            VmCall::Map { handle, at, range: pages } => vms.map(memory, vm(handle), at, range(pages)?).map(nothing)?,
            VmCall::Unmap { handle, range: pages } => vms.unmap(memory, vm(handle), range(pages)?).map(nothing)?,
            VmCall::Seal { handle, entry, device_tree, distributor, redistributors } => {
                let start = Start { entry, device_tree, distributor, redistributors };
                vms.seal(memory, vm(handle), &start).map(nothing)?
            }
            VmCall::GetRegister { handle, index, register } => vms.register(machine, vm(handle), index, register)?,
            VmCall::SetRegister { handle, index, register, value } => {
                vms.set_register(machine, vm(handle), index, register, value).map(nothing)?
            }
            VmCall::Teardown { handle } => vms.teardown(memory, vm(handle)).map(nothing)?,
            VmCall::Reclaim { handle, range: pages } => vms.reclaim(memory, vm(handle), range(pages)?)?,
            VmCall::Destroy { handle } => vms.destroy(memory, vm(handle))?,
            VmCall::Claim { handle, range: pages } => vms.claim(memory, vm(handle), range(pages)?).map(nothing)?,
            VmCall::Release { handle, range: pages } => vms.release(memory, vm(handle), range(pages)?).map(nothing)?,
            VmCall::ForceReclaim { range: pages } => vms.force_reclaim(memory, range(pages)?).map(nothing)?,
            VmCall::Spi { handle, intid, level } => {
                let [low, high] = vms.raise_spi(vm(handle), intid, level)?.words();
                set_results(registers, [SUCCESS, low, high]);
                return Ok(());
            }
            VmCall::ResetValue { attributes, register } => {
                VcpuState::reset_value(machine, attributes.ipa_bits, register)?
            }
            VmCall::Sizes { attributes } => {
                let (vm, vcpu, alignment) =
                    HostedVms::<O>::sizes::<MachineMemory<'_, '_, P, M>>(attributes, machine.area_pages());
                set_results(registers, [SUCCESS, vm, vcpu, alignment]);
                return Ok(());
            }
        };
        set_results(registers, [SUCCESS, x1]);
        Ok(())
    }
}
