//! What guests cannot do with what is no memory, and waits.

use ravelin_abi::{Answer, ExitReason, RUN_FLAG_EXECUTE, RUN_FLAG_WRITE, RUN_NO_DEADLINE, RunExit, VmKind};
use ravelin_guest::DEVICE;

use crate::{
    rt::{
        cpu::read_register,
        memory::{self, PAGE},
        vm::{
            MEMORY, Pages, Vm,
            code::{self, snippets},
        },
    },
    tests::{Failure, Outcome, check, check_eq, guests::world::OTHER_DEVICE},
};

const MIB: u64 = 1 << 20;
const RET: u32 = 0xd65f_03c0;

/// Guest address that is Normal memory in the guest's own tables, and where nothing is.
const NOTHING: u64 = MEMORY + 0x40_0000;

snippets! {
    /// Sets the timers and waits: x0 and x1 = control and time of the virtual one, x2 and x3 = those of the physical one.
    wait_for_timers:
        "msr cntv_cval_el0, x1",
        "msr cntv_ctl_el0, x0",
        "msr cntp_cval_el0, x3",
        "msr cntp_ctl_el0, x2",
        "isb",
        "wfi",
        "msr cntv_ctl_el0, xzr",
        "msr cntp_ctl_el0, xzr";
}

/// Code of these instructions.
fn code_of<const N: usize>(instructions: [u32; N]) -> [u64; 4] {
    let mut words = [u64::from(RET) << 32 | u64::from(RET); 4];
    for (index, instruction) in instructions.into_iter().enumerate() {
        let shift = index % 2 * 32;
        words[index / 2] = words[index / 2] & !(0xffff_ffff << shift) | u64::from(instruction) << shift;
    }
    words
}

/// Accesses that the CPU does not describe: x1 = address, x2 and x3 = values.
const UNSUPPORTED: [(u32, &str); 14] = [
    (0xa940_0c22, "LDP"),
    (0xa900_0c22, "STP"),
    (0x6940_0c22, "LDPSW"),
    (0xf840_8422, "LDR, post-indexed"),
    (0xf840_0c22, "LDR, pre-indexed"),
    (0xf800_8422, "STR, post-indexed"),
    (0xf800_0c22, "STR, pre-indexed"),
    (0x3dc0_0020, "LDR Q"),
    (0xfd00_0020, "STR D"),
    (0xc85f_7c22, "LDXR"),
    (0xf823_0022, "LDADD"),
    (0xf823_8022, "SWP"),
    (0xc8a2_7c23, "CAS"),
    (0xd50b_7421, "DC ZVA"),
];

/// Accesses of more than one register, with writeback, exclusive and atomic ones: an abort in the guest, which loses nothing.
pub(crate) fn device_accesses_of_other_kinds() -> Outcome {
    let has_atomics = read_register!("id_aa64isar0_el1") >> 20 & 0xf != 0;
    for kind in [VmKind::Pkvm, VmKind::Realm] {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        let device = vm.shared(OTHER_DEVICE);
        if kind == VmKind::Pkvm {
            const MMIO_GUARD: u64 = 0xc600_0007;
            for page in [DEVICE, OTHER_DEVICE] {
                check_eq!(guest.call(&[MMIO_GUARD, page])?[0], 0, "MMIO_GUARD of {page:#x}");
            }
        }
        for (instruction, name) in UNSUPPORTED {
            if matches!(name, "LDADD" | "SWP" | "CAS") && !has_atomics {
                continue;
            }
            let reply = guest.attempt(&code_of([instruction]), &[1, device, 2, 3])?;
            let Some(exception) = reply.exception else {
                return Err(Failure::new(format_args!("{name} works: {reply:x?}")));
            };
            // From Device memory exclusives, atomics and DC ZVA may fail in stage 1 already.
            let stage1 = exception.class() == 0x25 && matches!(exception.esr & 0x3f, 0x21 | 0x35);
            check!(exception.is_abort_at(device) || stage1, "{name}: {exception:x?}");
        }
        // DC CVAC, DC CIVAC, DC IVAC, PRFM: nothing happens.
        for instruction in [0xd50b_7a21, 0xd50b_7e21, 0xd508_7621, 0xf980_0020] {
            guest.run(&code_of([instruction]), &[1, device])?;
        }
        vm.finish()?;
    }
    Ok(())
}

/// Code of a guest does not run where its host plays a device.
pub(crate) fn fetches_from_devices() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Realm, 1)?;
    let mut guest = vm.guest(0);
    let device = vm.shared(NOTHING);
    // Its own tables let it fetch there.
    let exception = guest.fails(code::execute(), &[device])?;
    check!(exception.is_abort_at(device), "fetch from a device: {exception:x?}");
    check_eq!(exception.class(), 0x21, "class of the abort");
    vm.finish()
}

/// An access where there is no page: its host is told which page, and nothing else of a protected guest.
pub(crate) fn page_faults() -> Outcome {
    for &kind in VmKind::ALL {
        let pages = Pages::new(4 * MIB);
        let vm = Vm::boot(&pages, kind, 1)?;
        let mut guest = vm.guest(0);
        let ordinary = kind == VmKind::Ordinary;
        // Of accesses that are not described, so that a guest without MMIO_GUARD does not mean a device.
        let accesses =
            [(code::load_pair(), 0), (code::store_pair(), RUN_FLAG_WRITE), (code::execute(), RUN_FLAG_EXECUTE)];
        for (index, (code, flags)) in (0..).zip(accesses) {
            let page = NOTHING + index * PAGE;
            let address = page + 0x128;
            guest.begin_code(code, &[address, 5, 6])?;
            let expected = RunExit {
                reason: ExitReason::PageFault.code(),
                address: page,
                flags: if ordinary { flags } else { 0 },
                ..RunExit::default()
            };
            check_eq!(guest.exit(ExitReason::PageFault)?, expected, "the exit");
            guest.answer(Answer::Abort, 0);
            let exception = guest.finish()?.exception;
            check!(exception.is_some_and(|it| it.is_abort_at(address)), "abort: {exception:x?}");

            guest.begin_code(code, &[address, 5, 6])?;
            guest.exit(ExitReason::PageFault)?;
            check_eq!(guest.exit(ExitReason::PageFault)?, expected, "the exit after a retry without a page");
            let backing = vm.pages.take(1)?;
            (0..PAGE).step_by(8).for_each(|offset| memory::store(backing + offset, 0xd65f_03c0));
            memory::publish_code();
            vm.map(page, backing, 1)?;
            let reply = guest.finish()?;
            check_eq!(reply.exception, None, "exception though there is a page");
        }
        vm.finish()?;
    }
    Ok(())
}

/// WFI exits with the time when the next timer fires that is on and not masked, unless an interrupt is pending.
pub(crate) fn deadlines() -> Outcome {
    let pages = Pages::new(4 * MIB);
    let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
    let mut guest = vm.guest(0);
    let second = read_register!("cntfrq_el0");
    let now = read_register!("cntpct_el0");
    let (soon, late) = (now + 60 * second, now + 90 * second);
    const OFF: u64 = 0;
    const ON: u64 = 1;
    const MASKED: u64 = 3;
    for (arguments, deadline) in [
        ([OFF, soon, OFF, late], RUN_NO_DEADLINE),
        ([MASKED, soon, MASKED, late], RUN_NO_DEADLINE),
        ([ON, soon, OFF, 0], soon),
        ([OFF, 0, ON, soon], soon),
        ([ON, soon, ON, late], soon),
        ([ON, late, ON, soon], soon),
        ([ON, late, MASKED, soon], late),
        ([MASKED, soon, ON, late], late),
    ] {
        guest.begin_code(wait_for_timers(), &arguments)?;
        let expected = RunExit { reason: ExitReason::Wait.code(), deadline, ..RunExit::default() };
        check_eq!(guest.exit(ExitReason::Wait)?, expected, "the exit after {arguments:x?}");
        check_eq!(guest.finish()?.exception, None, "exception");
    }
    vm.finish()
}
