//! The host reaches devices, and nothing dies where there are none.

use crate::{
    rt::{
        console, gic,
        memory::PAGE,
        platform::platform,
        probe::{Access, Fault, probe},
    },
    tests::{Failure, Outcome, abort::ALIGNMENT, check, check_eq, on_each_cpu, statistics},
};

fn reachable(what: &str, address: u64) -> Result<u64, Failure> {
    probe(Access::Read32, address).map_err(|fault| Failure::new(format_args!("{what} at {address:#x}: {fault:x?}")))
}

pub(crate) fn known_devices() -> Outcome {
    let platform = platform();
    on_each_cpu(|_| {
        reachable("the UART's flags", console::base() + 0x18)?;
        let id = reachable("the UART's identification", console::base() + 0xFE0)?;
        check_eq!(id & 0xFF, 0x11, "UARTPeriphID0");
        if let Some([distributor, redistributors]) = platform.gic {
            let id = reachable("GICD_PIDR2", distributor.start + 0xFFE8)?;
            check_eq!(id >> 4 & 0xF, 3, "architecture of the GIC");
            for cpu in 0..platform.cpus.len() as u64 {
                let typer = redistributors.start + cpu * 0x2_0000 + 8;
                let affinity = gic::read(typer + 4);
                check!(
                    platform.cpus.contains(&u64::from(affinity)),
                    "GICR_TYPER of frame {cpu}: affinity {affinity:#x}"
                );
            }
        }
        if let Some(flash) = platform.flash {
            reachable("the start of the flash", flash.start)?;
            reachable("the end of the flash", flash.end - 4)?;
        }
        if let Some(pci) = platform.pci {
            let id = reachable("PCI configuration space", pci.start)?;
            check!(id != 0 && id != 0xFFFF_FFFF, "the PCI bridge's identification is {id:#x}");
            reachable("the last PCI function", pci.end - 4)?;
        }
        Ok(())
    })
}

/// Space where no device answers: whatever the bus says, the hypervisor lets it through, time and again.
pub(crate) fn nobody_home() -> Outcome {
    let ram_end = platform().ram.iter().chain(&platform().carve_out).map(|region| region.end).max().unwrap_or(0);
    let holes = [0xB00_0000, 0x2FFF_F000, 0x3EFE_0000, ram_end, ram_end + (1 << 30), 0x81_0000_0000, 0xFF_FFFF_F000];
    on_each_cpu(|_| {
        for address in holes {
            let mut answers = [Ok(0); 3];
            for answer in &mut answers {
                *answer = probe(Access::Read32, address).map_err(Fault::status);
                check!(*answer != Err(ALIGNMENT), "the hole at {address:#x} is denied");
            }
            check_eq!(answers[1], answers[2], "the hole at {address:#x}, read again");
            let _ = probe(Access::Write(0), address);
        }
        Ok(())
    })
}

/// Devices cost no faults once they have been used.
pub(crate) fn warm() -> Outcome {
    reachable("the UART's flags", console::base() + 0x18)?;
    let before = statistics()?.faults_resolved;
    for _ in 0..1000 {
        reachable("the UART's flags", console::base() + 0x18)?;
    }
    check_eq!(statistics()?.faults_resolved, before, "faults resolved");
    Ok(())
}

/// Instructions cannot be fetched from devices.
pub(crate) fn not_executable() -> Outcome {
    let Some(flash) = platform().flash else { return Ok(()) };
    // Stage 1 forbids it, too; whoever says no first, the machine lives on.
    check!(probe(Access::Execute, flash.start + PAGE).is_err(), "code ran from the flash");
    Ok(())
}
