//! Exits from the host: what arrived, and how to answer at EL1.

use aarch64_cpu::registers::{
    ELR_EL1, ELR_EL2, ESR_EL1, ESR_EL2, FAR_EL1, FAR_EL2, HPFAR_EL2, SPSR_EL1, SPSR_EL2, VBAR_EL1,
};
use ravelin_hypercall::{Exception, PstateFeatures, Registers, Trapped};
use ravelin_memory::Ipa;
use tock_registers::interfaces::{Readable, Writeable};

use crate::sysreg::{id_field, read_sysreg};

/// The host's registers that the vector saved. The callee-saved ones, x19 to x28, stay in the CPU.
#[repr(C)]
#[derive(Debug)]
pub struct HostFrame {
    /// x0 to x17: arguments and results of calls.
    pub arguments: Registers,
    x18: u64,
    x29: u64,
    x30: u64,
    padding: u64,
}

/// Why the host came to EL2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// HVC with this immediate. The host continues behind the instruction.
    Hvc(u16),
    /// SMC with this immediate. The host would repeat the instruction; see [`skip_instruction`].
    Smc(u16),
    /// A stage-2 fault at this address.
    Stage2Fault(Ipa),
    /// An abort whose address the CPU does not report, or that is not for stage 2 to mend.
    Abort,
    /// Anything else that was trapped, which is nothing that EL2 asked for.
    Other,
}

/// Reads why the host came to EL2, from the syndrome of the exception being handled.
#[must_use]
pub fn host_exit() -> Exit {
    let iss = ESR_EL2.read(ESR_EL2::ISS);
    match ESR_EL2.read_as_enum(ESR_EL2::EC) {
        Some(ESR_EL2::EC::Value::HVC64) => Exit::Hvc(iss as u16),
        Some(ESR_EL2::EC::Value::SMC64) => Exit::Smc(iss as u16),
        Some(ESR_EL2::EC::Value::DataAbortLowerEL | ESR_EL2::EC::Value::InstrAbortLowerEL) => abort(iss),
        _ => Exit::Other,
    }
}

/// Decodes the ISS of an abort from a lower level (Arm ARM DDI 0487, D24.2.40 ESR_EL2).
fn abort(iss: u64) -> Exit {
    const S1PTW: u64 = 1 << 7;
    // HPFAR_EL2 is valid for stage-2 address size, translation and access flag faults, and for any on a stage-1 walk.
    match iss & 0x3f {
        0b00_0000..=0b00_1011 => stage2_fault(),
        0b00_1100..=0b00_1111 if iss & S1PTW != 0 => stage2_fault(),
        _ => Exit::Abort,
    }
}

/// Reads the page of a stage-2 fault: FIPA, bits 43:4 or, with FEAT_LPA, 47:4, holds IPA\[51:12\].
fn stage2_fault() -> Exit {
    let fipa = (HPFAR_EL2.get() >> 4) & ((1 << 44) - 1);
    // Above 48 bits there is nothing that stage 2 could map.
    Ipa::new(fipa << 12).map_or(Exit::Abort, Exit::Stage2Fault)
}

/// Lets the host continue behind the instruction that trapped, as if it had been executed: what a branch expects of its
/// target (BTYPE) and a pending single step (SS) are done with.
pub fn skip_instruction() {
    const BTYPE: u64 = 0b11 << 10;
    const SS: u64 = 1 << 21;
    ELR_EL2.set(ELR_EL2.get().wrapping_add(4));
    SPSR_EL2.set(SPSR_EL2.get() & !(BTYPE | SS));
}

/// Reads the registers of the exception being handled that decide what the host sees of it.
#[must_use]
pub fn trapped() -> Trapped {
    Trapped { esr: ESR_EL2.get(), far: FAR_EL2.get(), spsr: SPSR_EL2.get(), sctlr_el1: read_sysreg!("sctlr_el1") }
}

/// Returns the features of this CPU that have a part in what PSTATE is after an exception.
#[must_use]
pub fn pstate_features() -> PstateFeatures {
    let pfr1 = read_sysreg!("id_aa64pfr1_el1");
    PstateFeatures {
        pan: id_field(read_sysreg!("id_aa64mmfr1_el1"), 20) != 0,
        dit: id_field(read_sysreg!("id_aa64pfr0_el1"), 48) != 0,
        ssbs: id_field(pfr1, 4) != 0,
        mte: id_field(pfr1, 8) != 0,
        nmi: id_field(pfr1, 36) != 0,
    }
}

/// Makes the host take `exception` at EL1 when it continues.
pub fn take_exception(exception: &Exception) {
    ESR_EL1.set(exception.esr);
    if let Some(far) = exception.far {
        FAR_EL1.set(far);
    }
    ELR_EL1.set(ELR_EL2.get());
    SPSR_EL1.set(SPSR_EL2.get());
    ELR_EL2.set(VBAR_EL1.get().wrapping_add(exception.vector_offset));
    SPSR_EL2.set(exception.pstate);
    // ERET is the context synchronisation event that these writes need.
}
