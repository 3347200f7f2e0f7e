//! How a host finds Ravelin and what it offers.

use ravelin_abi::{
    CALLS, Kind, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES, Status, VENDOR_UID, VERSION_MAJOR, VERSION_MINOR, counter_index,
};

use crate::{
    rt::call::{self, Instruction, Registers, call},
    tests::{Outcome, Snapshot, arena, check, check_eq, number, on_each_cpu},
};

pub(crate) fn uid() -> Outcome {
    on_each_cpu(|_| {
        for argument in [0, 1, u64::MAX] {
            let uid = call::hypervisor([number("UID"), argument, argument, argument]);
            check_eq!(uid, VENDOR_UID.map(u64::from), "UID");
        }
        Ok(())
    })
}

pub(crate) fn revision() -> Outcome {
    on_each_cpu(|_| {
        let [major, minor, ..] = call::hypervisor([number("REVISION"), 0, 0, 0]);
        check_eq!([major, minor], [VERSION_MAJOR, VERSION_MINOR].map(u64::from), "REVISION");
        Ok(())
    })
}

pub(crate) fn features() -> Outcome {
    let bitmap = CALLS.iter().filter_map(|call| counter_index(call.number)).fold(0, |bits, index| bits | 1 << index);
    on_each_cpu(|_| {
        let answer = call::hypervisor([number("FEATURES"), 0, 0, 0]);
        check_eq!(answer, [0, bitmap, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES], "FEATURES");
        for index in [1, 2, 63, 1 << 32, u64::MAX] {
            let x0 = call::hypervisor([number("FEATURES"), index, 0, 0])[0];
            check_eq!(x0, Status::Invalid.register(), "FEATURES of index {index:#x}");
        }
        Ok(())
    })
}

/// A call that is refused as unknown changes x0 and nothing else.
fn is_unknown(instruction: Instruction, function: u64) -> Outcome {
    // Arguments that would do something if the number were taken for SHARE or DONATE.
    let before = Registers::with([function, arena(0x1000), 1, 0]);
    let mut expected = before;
    expected.0[0] = Status::NotSupported.register();
    check!(
        call(instruction, before) == expected,
        "{function:#x} by {instruction:?} changed more than x0, or was taken"
    );
    Ok(())
}

pub(crate) fn unknown_numbers() -> Outcome {
    let snapshot = Snapshot::take(arena(0x1000), 1)?;
    on_each_cpu(|_| {
        for call in CALLS {
            let number = u64::from(call.number);
            for other in (0..32).map(|bit| number ^ 1 << bit).chain([number + 0x100, number | 0xFFFF]) {
                if !CALLS.iter().any(|call| u64::from(call.number) == other) {
                    is_unknown(Instruction::Hvc, other)?;
                }
            }
        }
        // PSCI comes over SMC only; the services of KVM and pKVM are not ours.
        for other in [0, 1, 0x8400_0000, 0xC400_0003, 0x8600_0000, 0xC600_0003, 0x8600_FF00, 0x8600_FF02, 0xFFFF_FFFF] {
            is_unknown(Instruction::Hvc, other)?;
        }
        Ok(())
    })?;
    snapshot.compare(format_args!("unknown calls"))
}

pub(crate) fn upper_half() -> Outcome {
    let snapshot = Snapshot::take(arena(0x1000), 1)?;
    for call in CALLS {
        for bit in 32..64 {
            is_unknown(Instruction::Hvc, u64::from(call.number) | 1 << bit)?;
        }
        is_unknown(Instruction::Hvc, u64::from(call.number) | 0xFFFF_FFFF << 32)?;
    }
    snapshot.compare(format_args!("calls with a dirty upper half"))
}

pub(crate) fn immediate() -> Outcome {
    let snapshot = Snapshot::take(arena(0x1000), 1)?;
    for call in CALLS {
        is_unknown(Instruction::Hvc1, call.number.into())?;
        is_unknown(Instruction::HvcFfff, call.number.into())?;
    }
    snapshot.compare(format_args!("calls with an immediate"))
}

pub(crate) fn registers() -> Outcome {
    on_each_cpu(|_| {
        for call_entry in CALLS {
            // Bad arguments, so that nothing happens; results are in x0 to x3 at most.
            let bad = |kind: &Kind| if *kind == Kind::PageAddress { 0x123 } else { u64::MAX };
            let mut arguments = [u64::from(call_entry.number), 7, 8, 9];
            for (register, argument) in arguments[1..].iter_mut().zip(call_entry.arguments) {
                *register = bad(&argument.kind);
            }
            let before = Registers::with(arguments);
            let after = call(Instruction::Hvc, before);
            check!(before.0[4..] == after.0[4..], "{} changed one of x4 to x30", call_entry.name);
            let results = call_entry.results.len();
            check!(before.0[results..] == after.0[results..], "{} changed registers without a result", call_entry.name);
        }
        Ok(())
    })
}

pub(crate) fn vectors() -> Outcome {
    let page = arena(0x1000);
    let mut before = [[0; 2]; 32];
    for (index, vector) in before.iter_mut().enumerate() {
        *vector = [0x0123_4567_89AB_CDEF ^ index as u64, !(index as u64) << 32];
    }
    on_each_cpu(|_| {
        for name in ["UID", "PAGE_STATE", "SHARE", "UNSHARE", "DONATE", "TAKE_BACK"] {
            let (results, after) = call::call_with_vectors(Instruction::Hvc, [number(name), page, 1, 0], before);
            let expected = if name == "UID" { u64::from(VENDOR_UID[0]) } else { 0 };
            // PAGE_STATE wants a zero in x2.
            let expected = if name == "PAGE_STATE" { Status::Reserved.register() } else { expected };
            check_eq!(results[0], expected, "{name}");
            check!(before == after, "{name} changed a SIMD register");
        }
        let (results, after) = call::call_with_vectors(call::firmware_instruction(), [0x8400_0000, 0, 0, 0], before);
        check!(results[0] >= 0x1_0000, "PSCI_VERSION");
        check!(before == after, "PSCI_VERSION changed a SIMD register");
        Ok(())
    })
}
