//! Encodings of the virtual CPU interface's control registers (Arm IHI 0069, 12.4).

/// `ICH_LR<n>_EL2`: the interrupt is pending. The low 32 bits of the register are the virtual INTID.
pub const PENDING: u64 = 1 << 62;
/// `ICH_LR<n>_EL2`: the interrupt is active, also together with [`PENDING`].
pub const ACTIVE: u64 = 1 << 63;
/// `ICH_LR<n>_EL2`: Group 1, signalled as a virtual IRQ.
pub const GROUP1: u64 = 1 << 60;
/// `ICH_LR<n>_EL2` with HW = 0: deactivation asserts a maintenance interrupt.
pub const EOI: u64 = 1 << 41;
/// `ICH_LR<n>_EL2`: position of the 8-bit priority.
pub const PRIORITY_SHIFT: u32 = 48;

/// ICH_HCR_EL2: the virtual CPU interface works.
pub const HCR_EN: u64 = 1 << 0;
/// ICH_HCR_EL2: maintenance interrupt when EOIcount is not zero.
pub const HCR_LRENPIE: u64 = 1 << 2;
/// ICH_HCR_EL2: maintenance interrupt when no list register is pending.
pub const HCR_NPIE: u64 = 1 << 3;
/// ICH_HCR_EL2: maintenance interrupt while Group 0 is enabled; the bit for Group 1 lies two higher.
pub const HCR_VGRP0EIE: u64 = 1 << 4;
/// ICH_HCR_EL2: maintenance interrupt while Group 0 is disabled; the bit for Group 1 lies two higher.
pub const HCR_VGRP0DIE: u64 = 1 << 5;
/// ICH_HCR_EL2: writes to ICV_DIR_EL1 trap (RES0 without FEAT_GICv3_TDIR).
pub const HCR_TDIR: u64 = 1 << 14;
/// ICH_HCR_EL2: position of EOIcount, 5 bits: ends of interrupts that were in no list register.
pub const HCR_EOICOUNT_SHIFT: u32 = 27;
/// ICH_HCR_EL2: EOIcount, once shifted down.
pub const HCR_EOICOUNT: u64 = 0x1f;

/// ICH_VMCR_EL2: the guest has Group 0 enabled (bit 0), Group 1 enabled (bit 1).
pub const VMCR_VENG: u64 = 0b11;
/// ICH_VMCR_EL2: end of interrupt only drops the priority, ICV_DIR_EL1 deactivates.
pub const VMCR_VEOIM: u64 = 1 << 9;
/// ICH_VMCR_EL2: position of the 8-bit priority mask.
pub const VMCR_VPMR_SHIFT: u32 = 24;

/// Most list registers that a CPU can have.
pub const MAX_LIST_REGISTERS: usize = 16;
