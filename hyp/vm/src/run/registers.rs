//! Registers of the vCPUs of ordinary VMs, which their host may get and set.
//!
//! A guest could set all of them but PSTATE and the virtual counter itself, so that there is no value that must not get into the
//! CPU.

use ravelin_abi::{
    REGISTER_ELR_EL1, REGISTER_FPCR, REGISTER_FPSR, REGISTER_PC, REGISTER_POWER, REGISTER_PSTATE, REGISTER_SP_EL0,
    REGISTER_SP_EL1, REGISTER_SPSR_EL1, REGISTER_V, Status, system_register,
};
use ravelin_memory::PhysAddr;

use super::{VcpuState, id_registers};
use crate::{
    Context, GuestCpu, Handle, IdRegisters, ObjectMemory, Power, Refusal, SysregAccess, SysregAction, Vm, Vms, mpidr,
    sysreg::{timer_control, timer_status},
};

const MPIDR_EL1: u64 = system_register(3, 0, 0, 0, 5);
const CNTV_CTL_EL0: u64 = system_register(3, 3, 14, 3, 1);
const CNTVCT_EL0: u64 = system_register(3, 3, 14, 0, 2);
/// The lowest number of a system register.
const FIRST_SYSTEM: u64 = system_register(2, 0, 0, 0, 0);

/// Fields of PSTATE that a host may set: NZCV, DIT, UAO, PAN, SSBS, BTYPE, DAIF, and the mode.
const PSTATE_FIELDS: u64 = 0xf000_0000 | 1 << 24 | 1 << 23 | 1 << 22 | 1 << 12 | 0b11 << 10 | 0xf << 6 | PSTATE_MODE;
const PSTATE_MODE: u64 = 0x1f;
/// EL0t, EL1t, EL1h.
const MODES: [u64; 3] = [0b0000, 0b0100, 0b0101];

impl<O: ObjectMemory, G: Send + Sync> Vms<O, G, VcpuState> {
    /// Returns a register of a vCPU.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if the VM is not an ordinary one, or dying; ABSENT; BUSY if a CPU has the vCPU; INVALID if there is no such
    /// register.
    pub fn register<C: GuestCpu>(&self, cpu: &C, handle: Handle, index: u64, number: u64) -> Result<u64, Refusal> {
        self.with_registers(cpu, handle, index, |registers| registers.get(number))
    }

    /// Sets a register of a vCPU.
    ///
    /// # Errors
    ///
    /// As [`Vms::register`]; INVALID if the register cannot have this value; BUSY if another vCPU is turning this one on, and it is
    /// to be off.
    pub fn set_register<C: GuestCpu>(
        &self,
        cpu: &C,
        handle: Handle,
        index: u64,
        number: u64,
        value: u64,
    ) -> Result<(), Refusal> {
        self.with_registers(cpu, handle, index, |registers| registers.set(number, value))
    }

    #[inline(never)]
    fn with_registers<C: GuestCpu, R>(
        &self,
        cpu: &C,
        handle: Handle,
        index: u64,
        f: impl FnOnce(&mut Registers<'_, C, O, G>) -> Result<R, Status>,
    ) -> Result<R, Refusal> {
        self.with_vcpu_of_ordinary(handle, index, |vm, vcpu| {
            let power = vm.power(vcpu.index()).ok_or(Status::Absent)?;
            vcpu.state.start(cpu, vcpu.index(), power);
            vcpu.state.context.cntvoff_el2 = vm.counter_offset();
            Ok(f(&mut Registers { cpu, vm, power, state: &mut vcpu.state })?)
        })
    }
}

impl VcpuState {
    /// Returns what a system register holds when vCPU 0 of a VM starts that has guest addresses of so many bits.
    ///
    /// # Errors
    ///
    /// INVALID if there is no such register.
    // Out of line, so that others do not pay for its stack.
    #[inline(never)]
    pub fn reset_value(cpu: &impl GuestCpu, ipa_bits: u64, number: u64) -> Result<u64, Status> {
        if number < FIRST_SYSTEM {
            return Err(Status::Invalid);
        }
        read(cpu, &mut Context::reset(0, 0, mpidr(0)), &id_registers(cpu, ipa_bits), number)
    }
}

/// The registers of a vCPU that does not run.
struct Registers<'a, C, O: ObjectMemory, G: Send + Sync> {
    cpu: &'a C,
    vm: &'a Vm<O, G, VcpuState>,
    power: &'a Power,
    state: &'a mut VcpuState,
}

impl<C: GuestCpu, O: ObjectMemory, G: Send + Sync> Registers<'_, C, O, G> {
    fn get(&mut self, number: u64) -> Result<u64, Status> {
        if let Some(at) = self.vector_word(number) {
            let [word] = self.cpu.read_words(at);
            return Ok(word);
        }
        if number == REGISTER_POWER {
            return Ok(self.power.is_on().into());
        }
        let VcpuState { context, ids, .. } = &mut *self.state;
        read(self.cpu, context, ids, number)
    }

    fn set(&mut self, number: u64, value: u64) -> Result<(), Status> {
        if let Some(at) = self.vector_word(number) {
            self.cpu.write_words(at, &[value]);
            return Ok(());
        }
        let Self { cpu, vm, power, .. } = self;
        let VcpuState { context, ids, .. } = &mut *self.state;
        match number {
            REGISTER_POWER if value > 1 => return Err(Status::Invalid),
            REGISTER_POWER => return if power.set(value == 1) { Ok(()) } else { Err(Status::Busy) },
            REGISTER_PSTATE if !MODES.contains(&(value & PSTATE_MODE)) => return Err(Status::Invalid),
            REGISTER_PSTATE => context.pstate = value & PSTATE_FIELDS,
            CNTVCT_EL0 => vm.set_counter_offset(cpu.counter().wrapping_sub(value)),
            CNTV_CTL_EL0 => context.cntv_ctl_el0 = timer_control(value),
            _ => {
                if let Some(place) = place(context, ids, number) {
                    *place = value;
                    return Ok(());
                }
                let written = trapped(number).map(|access| access.write(context, value, cpu.counter()));
                // What cannot be written may be given the value that it has.
                if written != Some(SysregAction::Written) && self.get(number) != Ok(value) {
                    return Err(Status::Invalid);
                }
            }
        }
        Ok(())
    }

    /// Returns where a FP or SIMD register, or half of one, is.
    fn vector_word(&self, number: u64) -> Option<PhysAddr> {
        let registers = self.cpu.guest_vectors(self.state.area);
        match number {
            REGISTER_FPSR => Some(registers.status),
            REGISTER_FPCR => registers.status.checked_add(8),
            REGISTER_V..REGISTER_FPSR if number.is_multiple_of(2) => {
                let half = number.wrapping_sub(REGISTER_V) / 2;
                let upper = if half.is_multiple_of(2) { 0 } else { 8 };
                registers.first.checked_add((half / 2).wrapping_mul(registers.stride).wrapping_add(upper))
            }
            _ => None,
        }
    }
}

/// Returns a register that is kept in `context`, or follows from that and `ids`: neither power nor one of FP and SIMD.
fn read(cpu: &impl GuestCpu, context: &mut Context, ids: &IdRegisters, number: u64) -> Result<u64, Status> {
    Ok(match number {
        CNTVCT_EL0 => cpu.counter().wrapping_sub(context.cntvoff_el2),
        CNTV_CTL_EL0 => {
            let counter = cpu.counter().wrapping_sub(context.cntvoff_el2);
            timer_status(context.cntv_ctl_el0, counter, context.cntv_cval_el0)
        }
        MPIDR_EL1 => context.vmpidr_el2,
        _ => match place(context, ids, number) {
            Some(place) => *place,
            None => trapped(number)
                .and_then(|access| match access.read(context, ids, cpu.counter()) {
                    SysregAction::Read(value) => Some(value),
                    _ => None,
                })
                .ok_or(Status::Invalid)?,
        },
    })
}

/// Returns the access to a system register that traps when the guest does it.
fn trapped(number: u64) -> Option<SysregAccess> {
    (number >= FIRST_SYSTEM).then(|| SysregAccess::of(number))
}

/// Returns where a register is kept that may hold anything, and PSTATE.
fn place<'a>(context: &'a mut Context, ids: &IdRegisters, number: u64) -> Option<&'a mut u64> {
    if number < REGISTER_SP_EL0 && number.is_multiple_of(2) {
        return context.x.get_mut(usize::try_from(number / 2).ok()?);
    }
    let has = |feature: bool, place: &'a mut u64| feature.then_some(place);
    // By the encoding, as `system_register` has it.
    Some(match number {
        REGISTER_SP_EL0 => &mut context.sp_el0,
        REGISTER_PC => &mut context.pc,
        REGISTER_PSTATE => &mut context.pstate,
        REGISTER_SP_EL1 => &mut context.sp_el1,
        REGISTER_ELR_EL1 => &mut context.elr_el1,
        REGISTER_SPSR_EL1 => &mut context.spsr_el1,
        0xc080 => &mut context.sctlr_el1,
        0xc082 => &mut context.cpacr_el1,
        0xc083 => return has(ids.has_sctlr2(), &mut context.sctlr2_el1),
        0xc100 => &mut context.ttbr0_el1,
        0xc101 => &mut context.ttbr1_el1,
        0xc102 => &mut context.tcr_el1,
        0xc103 => return has(ids.has_tcr2(), &mut context.tcr2_el1),
        0xc108..=0xc10b | 0xc110..=0xc113 | 0xc118..=0xc119 if !ids.has_pointer_authentication() => return None,
        0xc108 => &mut context.apiakeylo_el1,
        0xc109 => &mut context.apiakeyhi_el1,
        0xc10a => &mut context.apibkeylo_el1,
        0xc10b => &mut context.apibkeyhi_el1,
        0xc110 => &mut context.apdakeylo_el1,
        0xc111 => &mut context.apdakeyhi_el1,
        0xc112 => &mut context.apdbkeylo_el1,
        0xc113 => &mut context.apdbkeyhi_el1,
        0xc118 => &mut context.apgakeylo_el1,
        0xc119 => &mut context.apgakeyhi_el1,
        0xc288 => &mut context.afsr0_el1,
        0xc289 => &mut context.afsr1_el1,
        0xc290 => &mut context.esr_el1,
        0xc300 => &mut context.far_el1,
        0xc3a0 => &mut context.par_el1,
        0xc510 => &mut context.mair_el1,
        0xc512 => return has(ids.has_s1pie(), &mut context.pire0_el1),
        0xc513 => return has(ids.has_s1pie(), &mut context.pir_el1),
        0xc514 => return has(ids.has_s1poe(), &mut context.por_el1),
        0xc518 => &mut context.amair_el1,
        0xc600 => &mut context.vbar_el1,
        0xc609 => return has(ids.has_ras(), &mut context.vdisr_el2),
        0xc681 => &mut context.contextidr_el1,
        0xc684 => &mut context.tpidr_el1,
        0xc708 => &mut context.cntkctl_el1,
        0xd000 => &mut context.csselr_el1,
        0xdd14 => return has(ids.has_s1poe(), &mut context.por_el0),
        0xde82 => &mut context.tpidr_el0,
        0xde83 => &mut context.tpidrro_el0,
        0xdf1a => &mut context.cntv_cval_el0,
        _ => return None,
    })
}
