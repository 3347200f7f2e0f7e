//! SMC is an allow-list: the rest is refused, with every other register preserved (Arm DEN0028).

use crate::{
    rt::call::{Instruction, Registers, call, psci},
    tests::{Outcome, check, check_eq, on_each_cpu},
};

const NOT_SUPPORTED: u64 = u64::MAX;

/// Checks that a call is answered with NOT_SUPPORTED in x0 and that nothing else changes.
fn is_refused(instruction: Instruction, function: u64) -> Outcome {
    let before = Registers::with([function, 0x4000_0000, 1, 0]);
    let after = call(instruction, before);
    check_eq!(after.0[0], NOT_SUPPORTED, "{function:#x} by {instruction:?}");
    check!(before.0[1..] == after.0[1..], "{function:#x} by {instruction:?} changed one of x1 to x30");
    Ok(())
}

pub(crate) fn unknown_functions() -> Outcome {
    on_each_cpu(|_| {
        for function in [
            0,           // yielding
            1,           // yielding
            0x3200_0000, // yielding, trusted OS
            0x8000_0003, // architecture
            0x8000_1000, // architecture
            0x8100_0000, // CPU service
            0x8200_0000, // SiP
            0xC200_0001, // SiP
            0x8300_0000, // OEM
            0xC300_FF01, // OEM
            0x8400_001F, // PSCI, not given out
            0xC400_0000, // PSCI_VERSION has no 64-bit form
            0x8400_0100, // standard services
            0xC400_0020, // SDEI
            0xC400_0190, // RSI of a Realm
            0xC400_0150, // RMI
            0x8500_0000, // standard hypervisor services
            0xC500_0020, // paravirtualised time
            0x8600_0000, // vendor hypervisor services: over HVC
            0x8600_FF01, // vendor UID: over HVC
            0xC600_1001, // our own calls: over HVC
            0xC600_1003, //
            0xB000_0000, // trusted application
            0xB200_0000, // trusted OS
            0xBF00_FF01, // trusted OS UID
            0xC001_0000, // must-be-zero bits
            0xFFFF_FFFF,
        ] {
            is_refused(Instruction::Smc, function)?;
        }
        Ok(())
    })
}

/// FF-A names memory; without a proxy that checks it, nothing of it passes, whatever the version that is asked for.
pub(crate) fn ffa() -> Outcome {
    for function in (0x8400_0060..0x8400_0090).chain(0xC400_0060..0xC400_0090) {
        is_refused(Instruction::Smc, function)?;
    }
    for version in [0, 0x1_0001, 0x7FFF_FFFF, 0xFFFF_FFFF, u64::MAX] {
        let before = Registers::with([0x8400_0063, version, 0, 0]);
        check_eq!(call(Instruction::Smc, before).0[0], NOT_SUPPORTED, "FFA_VERSION of {version:#x}");
    }
    Ok(())
}

pub(crate) fn immediate() -> Outcome {
    on_each_cpu(|_| {
        for function in [psci::VERSION, psci::CPU_OFF, psci::FEATURES, psci::SYSTEM_OFF, 0x8000_0000, 0xC600_1001] {
            is_refused(Instruction::Smc1, function)?;
            is_refused(Instruction::SmcFfff, function)?;
        }
        Ok(())
    })
}

pub(crate) fn upper_half() -> Outcome {
    for function in [psci::VERSION, psci::CPU_OFF, psci::CPU_ON, psci::SYSTEM_OFF, psci::SYSTEM_RESET, 0x8000_0000] {
        for bit in [32, 33, 47, 63] {
            is_refused(Instruction::Smc, function | 1 << bit)?;
        }
        is_refused(Instruction::Smc, function | 0xFFFF_FFFF << 32)?;
    }
    Ok(())
}

/// What a host asks of the firmware when it starts.
pub(crate) fn discovery() -> Outcome {
    const SMCCC_VERSION: u64 = 0x8000_0000;
    const ARCH_FEATURES: u64 = 0x8000_0001;
    on_each_cpu(|_| {
        check!(psci(psci::FEATURES, SMCCC_VERSION, 0, 0) >= 0, "PSCI_FEATURES denies SMCCC_VERSION");
        let version = psci(SMCCC_VERSION, 0, 0, 0);
        check!((0x1_0001..0x2_0000).contains(&version), "SMCCC_VERSION is {version:#x}");
        check_eq!(psci(ARCH_FEATURES, ARCH_FEATURES, 0, 0), 0, "ARCH_FEATURES of itself");
        check_eq!(psci(ARCH_FEATURES, SMCCC_VERSION, 0, 0), 0, "ARCH_FEATURES of SMCCC_VERSION");
        for function in [0x8000_1234, 0x8400_0060, 0xC600_1001, 0] {
            check_eq!(psci(ARCH_FEATURES, function, 0, 0), psci::NOT_SUPPORTED, "ARCH_FEATURES of {function:#x}");
        }
        Ok(())
    })
}

/// Calls that do pass change no more than x0 to x3.
pub(crate) fn registers() -> Outcome {
    on_each_cpu(|_| {
        for function in [psci::VERSION, psci::FEATURES, psci::AFFINITY_INFO, psci::MIGRATE_INFO_TYPE, 0x8000_0000] {
            let before = Registers::with([function, 0, 0, 0]);
            let after = call(Instruction::Smc, before);
            check!(before.0[4..] == after.0[4..], "{function:#x} changed one of x4 to x30");
        }
        Ok(())
    })
}
