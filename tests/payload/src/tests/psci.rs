//! PSCI, as the host uses it (Arm DEN0022).

use core::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use crate::{
    rt::{
        call::{self, Instruction, psci},
        cpu, gic,
        memory::PAGE,
        platform::platform,
        probe::Access,
    },
    tests::{Failure, Op, Outcome, abort::is_denied, arena, check, check_eq, has_hypervisor},
};

fn affinity_info(cpu: usize) -> i64 {
    psci(psci::AFFINITY_INFO, platform().cpus[cpu], 0, 0)
}

fn turn_on(cpu: usize) -> Outcome {
    cpu::turn_on(cpu).map_err(|status| Failure::new(format_args!("CPU_ON of CPU {cpu}: {status}")))
}

pub(crate) fn version() -> Outcome {
    let version = psci(psci::VERSION, 0, 0, 0);
    check!((0x1_0000..0x2_0000).contains(&version), "VERSION is {version:#x}");
    Ok(())
}

pub(crate) fn entry_state() -> Outcome {
    const ENTRY_SCTLR_MUST_BE_CLEAR: u64 = 1 | 1 << 2 | 1 << 12 | 1 << 19 | 1 << 25;
    for cpu in 0..platform().cpus.len() {
        let state = cpu::entry_state(cpu);
        check_eq!(state.current_el >> 2, 1, "exception level of CPU {cpu}");
        check_eq!(state.daif, 0x3c0, "DAIF of CPU {cpu}");
        check_eq!(state.spsel, 1, "SPSel of CPU {cpu}");
        check_eq!(state.sctlr & 1, 0, "MMU of CPU {cpu}");
        if cpu != 0 {
            check_eq!(state.sctlr & ENTRY_SCTLR_MUST_BE_CLEAR, 0, "SCTLR_EL1 of CPU {cpu}");
            check_eq!(state.context, cpu::context(cpu, 0), "context id of CPU {cpu}");
        }
    }
    // x0 is the context id of the call that turned the CPU on, all 64 bits of it.
    for tag in [5, 10] {
        cpu::turn_off(1);
        check_eq!(cpu::psci_on(1, tag), psci::SUCCESS, "CPU_ON");
        while !cpu::is_online(1) {
            cpu::wait();
        }
        check_eq!(cpu::entry_state(1).context, cpu::context(1, tag), "context id");
        check_eq!(cpu::entry_state(1).sctlr & ENTRY_SCTLR_MUST_BE_CLEAR, 0, "SCTLR_EL1 after off and on");
    }
    Ok(())
}

pub(crate) fn affinity() -> Outcome {
    for (cpu, &mpidr) in platform().cpus.iter().enumerate() {
        check_eq!(affinity_info(cpu), psci::AFFINITY_ON, "AFFINITY_INFO of CPU {cpu}");
        check_eq!(psci(psci::AFFINITY_INFO_32, mpidr, 0, 0), psci::AFFINITY_ON, "32-bit AFFINITY_INFO of CPU {cpu}");
    }
    cpu::turn_off(1);
    let mpidr = platform().cpus[1];
    check_eq!(psci(psci::AFFINITY_INFO_32, mpidr, 0, 0), psci::AFFINITY_OFF, "32-bit AFFINITY_INFO");
    turn_on(1)?;
    check_eq!(affinity_info(1), psci::AFFINITY_ON, "AFFINITY_INFO after CPU_ON");
    Ok(())
}

pub(crate) fn already_on() -> Outcome {
    let mpidr = platform().cpus[1];
    let entries = cpu::entries(1);
    for _ in 0..20 {
        for function in [psci::CPU_ON, psci::CPU_ON_32] {
            let status = psci(function, mpidr, cpu::entry_point(), cpu::context(1, 0));
            check_eq!(status, psci::ALREADY_ON, "{function:#x}");
        }
        // A 32-bit call has arguments of 32 bits.
        let status = psci(psci::CPU_ON_32, mpidr | 7 << 32, cpu::entry_point() | 5 << 40, 1 << 63);
        check_eq!(status, psci::ALREADY_ON, "32-bit CPU_ON with dirty upper halves");
        // Also of the calling CPU itself.
        check_eq!(cpu::psci_on(0, 0), psci::ALREADY_ON, "CPU_ON of the boot CPU");
    }
    let served = AtomicU64::new(0);
    cpu::run_on(&[1], &|_| served.store(1, Ordering::Relaxed), || ());
    check_eq!(served.load(Ordering::Relaxed), 1, "CPU 1 serves");
    check_eq!(cpu::entries(1), entries, "entries of CPU 1");
    Ok(())
}

pub(crate) fn bad_target() -> Outcome {
    let cpus = &platform().cpus;
    let bad = [0x42, 0xFF, 0xFF00, 0xFF_0000, 0xFF_0000_0000, 1 << 31, 1 << 30, 1 << 24, 1 << 40, 1 << 63, u64::MAX];
    for target in bad.into_iter().chain(bad.map(|bits| bits | cpus[0])).filter(|target| !cpus.contains(target)) {
        let status = psci(psci::CPU_ON, target, cpu::entry_point(), 0);
        check_eq!(status, psci::INVALID_PARAMETERS, "CPU_ON of {target:#x}");
        let status = psci(psci::AFFINITY_INFO, target, 0, 0);
        check_eq!(status, psci::INVALID_PARAMETERS, "AFFINITY_INFO of {target:#x}");
    }
    Ok(())
}

pub(crate) fn bad_entry() -> Outcome {
    let platform = platform();
    let entries = cpu::entries(1);
    cpu::turn_off(1);
    let refused = |entry: u64| {
        let status = psci(psci::CPU_ON, platform.cpus[1], entry, cpu::context(1, 0));
        check!(
            matches!(status, psci::INVALID_ADDRESS | psci::INVALID_PARAMETERS),
            "CPU_ON with entry {entry:#x}: {status}"
        );
        check_eq!(affinity_info(1), psci::AFFINITY_OFF, "AFFINITY_INFO after entry {entry:#x}");
        Ok(())
    };
    for bits in 1..4 {
        refused(cpu::entry_point() | bits)?;
    }
    if let Some(carve_out) = platform.carve_out {
        for entry in [carve_out.start, carve_out.start + carve_out.size() / 2, carve_out.end - 4] {
            refused(entry)?;
        }
    }
    if has_hypervisor() {
        let page = arena(PAGE);
        Op::Donate.succeeds(page, 1)?;
        let outcome = refused(page);
        Op::TakeBack.succeeds(page, 1)?;
        outcome?;
    }
    let end = platform.ram.iter().chain(&platform.carve_out).map(|region| region.end).max().unwrap_or(0);
    for entry in [0, PAGE, platform.ram[0].start - 4, end, 1 << 47, 1 << 48, 1 << 52, !3] {
        refused(entry)?;
    }
    turn_on(1)?;
    check_eq!(cpu::entries(1), entries + 1, "entries of CPU 1");
    Ok(())
}

pub(crate) fn off_and_on() -> Outcome {
    let count = platform().cpus.len();
    for round in 0..50 {
        let cpu = 1 + round % (count - 1);
        let entries = cpu::entries(cpu);
        cpu::turn_off(cpu);
        let function = if round % 3 == 2 { psci::CPU_ON_32 } else { psci::CPU_ON };
        let status = psci(function, platform().cpus[cpu], cpu::entry_point(), cpu::context(cpu, 0));
        check_eq!(status, psci::SUCCESS, "round {round}, {function:#x}");
        while !cpu::is_online(cpu) {
            cpu::wait();
        }
        check_eq!(cpu::entries(cpu), entries + 1, "entries of CPU {cpu}");
    }
    Ok(())
}

pub(crate) fn race() -> Outcome {
    for round in 0..50 * platform().effort() {
        let entries = cpu::entries(2);
        cpu::turn_off(2);
        let ready = AtomicU64::new(0);
        let answers = [const { AtomicI64::new(i64::MIN) }; 2];
        let turn_on = |this: usize| {
            ready.fetch_add(1, Ordering::AcqRel);
            while ready.load(Ordering::Acquire) < 2 {
                core::hint::spin_loop();
            }
            answers[this].store(cpu::psci_on(2, 1 + this as u64), Ordering::Release);
        };
        cpu::run_on(&[1], &turn_on, || turn_on(0));
        let answers = answers.map(|answer| answer.load(Ordering::Acquire));
        let Some(winner) = answers.iter().position(|&answer| answer == psci::SUCCESS) else {
            return Err(Failure::new(format_args!("round {round}: nobody succeeded: {answers:?}")));
        };
        check!(
            matches!(answers[1 - winner], psci::ALREADY_ON | psci::ON_PENDING),
            "round {round}: CPUs 0 and 1 were answered {answers:?}"
        );
        while !cpu::is_online(2) {
            cpu::wait();
        }
        check_eq!(cpu::entry_state(2).context, cpu::context(2, 1 + winner as u64), "context id in round {round}");
        check_eq!(cpu::entries(2), entries + 1, "entries of CPU 2");
    }
    Ok(())
}

pub(crate) fn suspend() -> Outcome {
    const POWER_DOWN: u64 = 1 << 16;
    for function in [psci::CPU_SUSPEND, psci::CPU_SUSPEND_32] {
        gic::arm_timer(100_000);
        let status = psci(function, 0, cpu::entry_point(), 0);
        let fired = gic::timer_fired();
        gic::stop_timer();
        check_eq!(status, psci::SUCCESS, "{function:#x} to standby");
        check!(fired, "{function:#x} returned before the timer fired");
        let status = psci(function, 0x8000_0000, cpu::entry_point(), 0);
        check!(status < 0, "{function:#x} with reserved bits: {status}");

        // A state that loses the CPU's contents: it comes back, one way or the other, but not at an address that is not the
        // host's.
        if let Some(carve_out) = platform().carve_out {
            for entry in [carve_out.start, carve_out.end - 4, cpu::entry_point() | 1, 0] {
                let status = psci(function, POWER_DOWN, entry, 0);
                check!(
                    matches!(status, psci::INVALID_ADDRESS | psci::INVALID_PARAMETERS),
                    "{function:#x} with entry {entry:#x}: {status}"
                );
            }
            gic::arm_timer(100_000);
            let status = cpu::power_down(function, POWER_DOWN);
            let fired = gic::timer_fired();
            gic::stop_timer();
            check!(matches!(status, None | Some(psci::SUCCESS)), "{function:#x} to power-down: {status:?}");
            check!(fired, "{function:#x} to power-down came back before the timer fired");
        }
    }
    Ok(())
}

/// The boot CPU is like the others: another one can turn it on again.
pub(crate) fn boot_cpu() -> Outcome {
    check!(call::firmware_instruction() == Instruction::Smc, "CPU_OFF of the boot CPU is written for SMC");
    for round in 0..10 {
        let answer = AtomicI64::new(i64::MIN);
        let turn_on = |_: usize| {
            while affinity_info(0) != psci::AFFINITY_OFF {
                cpu::wait();
            }
            let (entry, context) = cpu::resume();
            answer.store(psci(psci::CPU_ON, platform().cpus[0], entry, context), Ordering::Release);
        };
        let status = cpu::run_on(&[1], &turn_on, || cpu::power_down(psci::CPU_OFF, 0));
        check_eq!(status, None, "CPU_OFF in round {round}");
        check_eq!(answer.load(Ordering::Acquire), psci::SUCCESS, "CPU_ON in round {round}");
    }
    if has_hypervisor() {
        let page = arena(PAGE);
        Op::Donate.succeeds(page, 1)?;
        is_denied(Access::Read, page)?;
        Op::TakeBack.succeeds(page, 1)?;
    }
    Ok(())
}

pub(crate) fn features() -> Outcome {
    for function in [psci::VERSION, psci::CPU_OFF, psci::CPU_ON, psci::CPU_ON_32, psci::AFFINITY_INFO] {
        check!(psci(psci::FEATURES, function, 0, 0) >= 0, "FEATURES lacks {function:#x}");
    }
    for function in [psci::AFFINITY_INFO_32, psci::SYSTEM_OFF, psci::SYSTEM_RESET, psci::FEATURES] {
        check!(psci(psci::FEATURES, function, 0, 0) >= 0, "FEATURES lacks {function:#x}");
    }
    for function in [0x8400_001F, 0x8500_0000, 0xC600_1001, 0x8600_FF01, 0, u64::MAX] {
        let status = psci(psci::FEATURES, function, 0, 0);
        check_eq!(status, psci::NOT_SUPPORTED, "FEATURES of {function:#x}");
    }
    for function in [psci::SYSTEM_SUSPEND, psci::SYSTEM_SUSPEND_32] {
        if psci(psci::FEATURES, function, 0, 0) == psci::NOT_SUPPORTED {
            let status = psci(function, cpu::entry_point(), 0, 0);
            check_eq!(status, psci::NOT_SUPPORTED, "{function:#x}, which FEATURES lacks");
        }
    }
    if psci(psci::FEATURES, psci::MIGRATE_INFO_TYPE, 0, 0) >= 0 {
        let status = psci(psci::MIGRATE_INFO_TYPE, 0, 0, 0);
        check!((0..=2).contains(&status) || status == psci::NOT_SUPPORTED, "MIGRATE_INFO_TYPE: {status}");
    }
    Ok(())
}
