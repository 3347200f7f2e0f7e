//! Timers and the interrupt controller of guests.

use crate::{
    rt::vm::{DISTRIBUTOR, Guest, REDISTRIBUTORS, code::snippets},
    tests::Outcome,
};

snippets! {
    /// Stores 4 bytes: x0 = address, x1 = value.
    store32: "str w1, [x0]";

    /// Lets interrupts of group 1 through the CPU interface, of any priority.
    open_interface: "mov x0, #0xff", "msr s3_0_c4_c6_0, x0", "mov x0, #1", "msr s3_0_c12_c12_7, x0", "isb";
}

/// Offset of the second frame of a redistributor.
const PRIVATE_FRAME: u64 = 0x1_0000;

/// Address of a vCPU's redistributor.
fn redistributor(guest: &Guest<'_>) -> u64 {
    guest.vm.shared(REDISTRIBUTORS) + guest.index * 2 * PRIVATE_FRAME
}

/// Enables all SGIs and PPIs of a vCPU, in group 1 with priority 0x80, and the interfaces. The vCPU keeps interrupts masked.
pub(super) fn prepare(guest: &mut Guest<'_>) -> Outcome {
    let distributor = guest.vm.shared(DISTRIBUTOR);
    let redistributor = redistributor(guest);
    let private = redistributor + PRIVATE_FRAME;
    store(guest, distributor, 0x12)?; // GICD_CTLR: group 1, affinity routing
    store(guest, redistributor + 0x14, 0)?; // GICR_WAKER
    store(guest, private + 0x80, 0xffff_ffff)?; // GICR_IGROUPR0
    for offset in (0..32).step_by(4) {
        store(guest, private + 0x400 + offset, 0x8080_8080)?; // GICR_IPRIORITYR
    }
    store(guest, private + 0x100, 0xffff_ffff)?; // GICR_ISENABLER0
    guest.run(open_interface(), &[]).map(drop)
}

/// Stores to a register of the interrupt controller.
fn store(guest: &mut Guest<'_>, address: u64, value: u64) -> Outcome {
    guest.run(store32(), &[address, value]).map(drop)
}
