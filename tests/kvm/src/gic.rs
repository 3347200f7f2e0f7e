//! The interrupt controller of guests, a GICv3.

use crate::check::Outcome;
use crate::guest::{Guest, snippets};

/// Guest address of the distributor.
pub(crate) const DISTRIBUTOR: u64 = 0x0800_0000;

/// Guest address of the redistributors.
pub(crate) const REDISTRIBUTORS: u64 = 0x080a_0000;

/// Offset of the register that raises a message-based SPI.
pub(crate) const SETSPI: u64 = 0x40;

/// Priority of all interrupts.
const PRIORITY: u64 = 0x80;

/// Offset of the second frame of a redistributor.
const PRIVATE_FRAME: u64 = 0x1_0000;

// Offsets of registers that have bits or bytes for interrupts.
const GROUP: u64 = 0x080;
const SET_ENABLE: u64 = 0x100;
const PRIORITIES: u64 = 0x400;
const CONFIGURATION: u64 = 0xc00;

snippets! {
    /// Stores 4 bytes: x0 = address, x1 = value.
    store32: "str w1, [x0]";

    /// Lets interrupts of group 1 through the CPU interface.
    open_interface:
        "mov x0, #0xff", "msr s3_0_c4_c6_0, x0", "msr s3_0_c12_c12_4, xzr", "mov x0, #1", "msr s3_0_c12_c12_7, x0", "isb";

    /// Takes an interrupt and ends it: returns its number, 1023 if there is none.
    take: "isb", "mrs x0, s3_0_c12_c12_0", "dsb sy", "cmp x0, #1020", "b.hs 4f", "msr s3_0_c12_c12_1, x0", "isb", "4: nop";

    /// Waits for an interrupt, takes it and ends it: returns its number.
    wait:
        "4: wfi", "mrs x0, s3_0_c12_c12_0", "dsb sy", "cmp x0, #1020", "b.hs 4b", "msr s3_0_c12_c12_1, x0", "isb";

    /// The same without WFI.
    poll: "4: mrs x0, s3_0_c12_c12_0", "dsb sy", "cmp x0, #1020", "b.hs 4b", "msr s3_0_c12_c12_1, x0", "isb";

    /// Lets the virtual timer fire in x0 ticks, and waits for it: returns the interrupt, and how many ticks it took.
    timer:
        "isb", "mrs x2, cntvct_el0", "msr cntv_tval_el0, x0", "mov x3, #1", "msr cntv_ctl_el0, x3", "isb",
        "4: wfi", "mrs x0, s3_0_c12_c12_0", "dsb sy", "cmp x0, #1020", "b.hs 4b",
        "mov x3, #3", "msr cntv_ctl_el0, x3", "isb", "msr s3_0_c12_c12_1, x0",
        "mrs x1, cntvct_el0", "sub x1, x1, x2", "isb";

    /// Sends an SGI: x0 = value of ICC_SGI1R_EL1.
    send: "msr s3_0_c12_c11_5, x0", "isb";
}

/// Enables all SGIs and PPIs of a vCPU, and 32 SPIs from 32 on for vCPU 0: edge-triggered, or by level. The vCPU keeps
/// interrupts masked.
pub(crate) fn prepare(guest: &mut Guest<'_>, edge: bool) -> Outcome {
    let kind = guest.kind;
    let distributor = kind.shared(DISTRIBUTOR);
    let redistributor = kind.shared(REDISTRIBUTORS) + guest.vcpu.index * 2 * PRIVATE_FRAME;
    let mut store = |address, value| guest.run(store32(), &[address, value]).map(drop);
    store(redistributor + 0x14, 0)?; // GICR_WAKER
    let private = redistributor + PRIVATE_FRAME;
    store(private + GROUP, 0xffff_ffff)?;
    for offset in (0..32).step_by(4) {
        store(private + PRIORITIES + offset, PRIORITY * 0x0101_0101)?;
    }
    store(private + SET_ENABLE, 0xffff_ffff)?;
    store(distributor, 0x12)?; // GICD_CTLR: group 1, affinity routing
    store(distributor + GROUP + 4, 0xffff_ffff)?;
    for offset in (32..64).step_by(4) {
        store(distributor + PRIORITIES + offset, PRIORITY * 0x0101_0101)?;
    }
    for offset in [8, 12] {
        store(distributor + CONFIGURATION + offset, if edge { 0xaaaa_aaaa } else { 0 })?;
    }
    store(distributor + SET_ENABLE + 4, 0xffff_ffff)?;
    guest.run(open_interface(), &[]).map(drop)
}
