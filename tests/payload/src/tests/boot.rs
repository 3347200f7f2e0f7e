//! How the host is entered and what its device tree says.

use crate::{
    rt::{cpu, memory::BLOCK, platform::platform},
    tests::{Outcome, carve_out, check, check_eq},
};

/// As Linux asks in Documentation/arch/arm64/booting.rst.
pub(crate) fn entry_state() -> Outcome {
    let state = cpu::entry_state(0);
    check_eq!(state.current_el >> 2, 1, "exception level");
    check_eq!(state.daif, 0x3c0, "DAIF");
    check_eq!(state.spsel, 1, "SPSel");
    check_eq!(state.sctlr & 1, 0, "MMU");
    check_eq!(state.context, 0, "bits of x1, x2 and x3");
    check_eq!(platform().tree % 8, 0, "address of the device tree, modulo 8");
    Ok(())
}

/// Firmware looks for its device tree at the start of RAM; nothing of ours is in its way there.
pub(crate) fn device_tree_at_start_of_ram() -> Outcome {
    check_eq!(platform().tree, platform().ram[0].start, "address of the device tree");
    Ok(())
}

/// The carve-out is one range at the top of RAM, missing from /memory, listed in /reserved-memory, and not too large.
pub(crate) fn carve_out_is_announced() -> Outcome {
    let region = carve_out()?;
    check!(platform().carve_out_is_no_map, "the carve-out is not no-map");
    check_eq!((region.start % BLOCK, region.end % BLOCK), (0, 0), "ends of the carve-out, modulo 2 MiB");
    for ram in &platform().ram {
        check!(!ram.overlaps(region), "/memory has {ram:x?}, the carve-out is {region:x?}");
        check!(ram.end <= region.start, "there is RAM above the carve-out: {ram:x?}");
    }
    let ram: u64 = platform().ram.iter().map(|ram| ram.size()).sum::<u64>() + region.size();
    // 2.25 MiB per GiB, and 2 MiB; the checking build has its model there, too.
    let model = if platform().argument("checked").is_some() { 34 << 20 } else { 0 };
    let limit = (ram / 4096 * 9 + BLOCK).next_multiple_of(BLOCK) + model;
    check!(region.size() <= limit, "the carve-out takes {:#x} bytes of {ram:#x}, more than {limit:#x}", region.size());
    Ok(())
}
