//! The virtual CPU interface of the GIC, and the interrupt of the virtual timer (Arm IHI 0069, chapter 12).

use core::{ptr, sync::atomic::Ordering::Relaxed};

use ravelin_memory::PhysRange;
use ravelin_vgic::{ListRegisters, ich};

use crate::{
    boot::CpuStart,
    sysreg::{maintain, read_sysreg, write_lower_sysreg},
};

/// GICR_TYPER, in the redistributor's first frame: affinity in bits 63:32, Last, VLPIS.
const GICR_TYPER: u64 = 0x8;
const TYPER_VLPIS: u64 = 1 << 1;
const TYPER_LAST: u64 = 1 << 4;
/// Size of a frame.
const FRAME: u64 = 0x1_0000;
/// GICR_ISACTIVER0 and GICR_ICACTIVER0, in the second frame.
const ISACTIVER0: u64 = FRAME + 0x300;
const ICACTIVER0: u64 = FRAME + 0x380;

/// Bit of the virtual timer's interrupt, 27, there.
const VIRTUAL_TIMER: u32 = 1 << 27;

macro_rules! list_registers {
    ($each:ident, $lrs:expr, $used:expr) => {
        $each!($lrs, $used,
            0: "s3_4_c12_c12_0", 1: "s3_4_c12_c12_1", 2: "s3_4_c12_c12_2", 3: "s3_4_c12_c12_3",
            4: "s3_4_c12_c12_4", 5: "s3_4_c12_c12_5", 6: "s3_4_c12_c12_6", 7: "s3_4_c12_c12_7",
            8: "s3_4_c12_c13_0", 9: "s3_4_c12_c13_1", 10: "s3_4_c12_c13_2", 11: "s3_4_c12_c13_3",
            12: "s3_4_c12_c13_4", 13: "s3_4_c12_c13_5", 14: "s3_4_c12_c13_6", 15: "s3_4_c12_c13_7")
    };
}

/// Stops before the first register that is not in use.
macro_rules! load_used {
    ($lrs:expr, $used:expr, $($index:literal: $name:literal),+) => {
        'used: {
            $(
                if $used <= $index { break 'used; }
                write_lower_sysreg!($name, $lrs[$index]);
            )+
        }
    };
}

macro_rules! save_used {
    ($lrs:expr, $used:expr, $($index:literal: $name:literal),+) => {
        'used: {
            $(
                if $used <= $index { break 'used; }
                $lrs[$index] = read_sysreg!($name);
                // Empty unless in use.
                write_lower_sysreg!($name, 0);
            )+
        }
    };
}

/// Returns ICH_VTR_EL2.
fn vtr() -> u64 {
    read_sysreg!("s3_4_c12_c11_1")
}

/// Returns how many list registers there are.
pub(super) fn list_registers() -> usize {
    (vtr() & 0x1f) as usize + 1
}

/// Returns how many of the registers of active priorities there are for each group: one for 5 bits of preemption, two for
/// 6, four for 7.
pub(super) fn active_priority_registers() -> u64 {
    match vtr() >> 26 & 0b111 {
        0..=4 => 1,
        5 => 2,
        _ => 4,
    }
}

/// Turns the virtual CPU interface off and empties the list registers: out of reset their contents are unknown.
pub(crate) fn reset() {
    write_lower_sysreg!("s3_4_c12_c11_0", 0); // ICH_HCR_EL2
    let mut lrs = [0; ich::MAX_LIST_REGISTERS];
    let used = list_registers();
    list_registers!(save_used, lrs, used);
}

/// Puts a guest's interrupts into a CPU with so many registers of active priorities for each group.
pub(super) fn load(gic: &ListRegisters, active: u64) {
    let used = gic.used;
    list_registers!(load_used, gic.lrs, used);
    write_lower_sysreg!("s3_4_c12_c11_7", gic.vmcr); // ICH_VMCR_EL2
    write_lower_sysreg!("s3_4_c12_c8_0", u64::from(gic.ap0r[0])); // ICH_AP0R0_EL2
    write_lower_sysreg!("s3_4_c12_c9_0", u64::from(gic.ap1r[0])); // ICH_AP1R0_EL2
    if active >= 2 {
        write_lower_sysreg!("s3_4_c12_c8_1", u64::from(gic.ap0r[1]));
        write_lower_sysreg!("s3_4_c12_c9_1", u64::from(gic.ap1r[1]));
    }
    if active >= 4 {
        write_lower_sysreg!("s3_4_c12_c8_2", u64::from(gic.ap0r[2]));
        write_lower_sysreg!("s3_4_c12_c8_3", u64::from(gic.ap0r[3]));
        write_lower_sysreg!("s3_4_c12_c9_2", u64::from(gic.ap1r[2]));
        write_lower_sysreg!("s3_4_c12_c9_3", u64::from(gic.ap1r[3]));
    }
    write_lower_sysreg!("s3_4_c12_c11_0", gic.hcr); // ICH_HCR_EL2
}

/// Takes a guest's interrupts out of such a CPU, and turns the virtual CPU interface off.
pub(super) fn save(gic: &mut ListRegisters, active: u64) {
    gic.hcr = read_sysreg!("s3_4_c12_c11_0");
    write_lower_sysreg!("s3_4_c12_c11_0", 0);
    gic.vmcr = read_sysreg!("s3_4_c12_c11_7");
    gic.ap0r[0] = read_sysreg!("s3_4_c12_c8_0") as u32;
    gic.ap1r[0] = read_sysreg!("s3_4_c12_c9_0") as u32;
    if active >= 2 {
        gic.ap0r[1] = read_sysreg!("s3_4_c12_c8_1") as u32;
        gic.ap1r[1] = read_sysreg!("s3_4_c12_c9_1") as u32;
    }
    if active >= 4 {
        gic.ap0r[2] = read_sysreg!("s3_4_c12_c8_2") as u32;
        gic.ap0r[3] = read_sysreg!("s3_4_c12_c8_3") as u32;
        gic.ap1r[2] = read_sysreg!("s3_4_c12_c9_2") as u32;
        gic.ap1r[3] = read_sysreg!("s3_4_c12_c9_3") as u32;
    }
    let used = gic.used;
    list_registers!(save_used, gic.lrs, used);
}

/// Makes the interrupt of the virtual timer active. Returns whether it was not.
///
/// The redistributor is the host's, which may write there at the same time; each bit of these registers is set or cleared by
/// itself.
pub(super) fn hold_virtual_timer(redistributors: &[PhysRange]) -> bool {
    let Some(base) = this_redistributor(redistributors) else { return false };
    if read(base + ISACTIVER0) & VIRTUAL_TIMER != 0 {
        return false;
    }
    write(base + ISACTIVER0, VIRTUAL_TIMER);
    true
}

/// Makes the interrupt of the virtual timer inactive.
pub(super) fn release_virtual_timer(redistributors: &[PhysRange]) {
    if let Some(base) = this_redistributor(redistributors) {
        write(base + ICACTIVER0, VIRTUAL_TIMER);
    }
}

/// Returns where the redistributor of this CPU is.
fn this_redistributor(regions: &[PhysRange]) -> Option<u64> {
    let cached = &CpuStart::current()?.redistributor;
    let mut base = cached.load(Relaxed);
    if base == 0 {
        base = find_redistributor(regions)?;
        cached.store(base, Relaxed);
    }
    Some(base)
}

fn find_redistributor(regions: &[PhysRange]) -> Option<u64> {
    let mpidr = read_sysreg!("mpidr_el1");
    let affinity = mpidr & 0xff_ffff | mpidr >> 8 & 0xff00_0000;
    for region in regions {
        let mut base = region.base().raw();
        while base + 2 * FRAME <= region.end() {
            let typer = u64::from(read(base + GICR_TYPER)) | u64::from(read(base + GICR_TYPER + 4)) << 32;
            if typer >> 32 == affinity {
                return Some(base);
            }
            if typer & TYPER_LAST != 0 {
                break;
            }
            base += if typer & TYPER_VLPIS != 0 { 4 * FRAME } else { 2 * FRAME };
        }
    }
    None
}

fn read(register: u64) -> u32 {
    // SAFETY: Within the redistributors, which the EL2 stage 1 maps as a device. A 32-bit register at an aligned address,
    // without side effects of a read.
    unsafe { ptr::with_exposed_provenance::<u32>(register as usize).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: As in `read`; what is written changes the state of one interrupt.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(register as usize).write_volatile(value) };
    // Before interrupts can be taken again.
    maintain!("dsb sy");
}
