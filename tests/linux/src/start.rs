//! Entry, arguments and the auxiliary vector.

use core::arch::global_asm;
use core::ffi::{CStr, c_char};
use core::panic::PanicInfo;

use crate::cpu::Hwcaps;
use crate::{carve_out, cpu, hotplug, instructions, kcore, kexec, memory, peek, pmu, report, sys, workloads};

// execve(2) leaves argc, argv, envp and the auxiliary vector on the stack.
global_asm!(".global _start", "_start:", "mov x29, xzr", "mov x30, xzr", "mov x0, sp", "bl {start}", "udf #0", start = sym start);

unsafe extern "C" fn start(stack: *const usize) -> ! {
    // SAFETY: The stack starts with argc.
    let count = unsafe { *stack };
    let argument = |index: usize| -> Option<&'static CStr> {
        if index >= count {
            return None;
        }
        // SAFETY: argv has that many entries.
        let entry = unsafe { stack.add(1 + index) };
        // SAFETY: As above.
        let string = unsafe { *entry } as *const c_char;
        // SAFETY: Entries of argv are zero-terminated strings that live as long as the program.
        Some(unsafe { CStr::from_ptr(string) })
    };
    // SAFETY: argv ends with a null pointer, behind which lies envp.
    let mut at = unsafe { stack.add(count + 2) };
    // SAFETY: envp ends with a null pointer.
    while unsafe { *at } != 0 {
        // SAFETY: As above.
        at = unsafe { at.add(1) };
    }
    let hwcaps = Hwcaps::from_auxv(|index| {
        // SAFETY: The auxiliary vector lies behind envp and ends with an entry of type 0, at which the reader stops.
        let entry = unsafe { at.add(1 + 2 * index) };
        // SAFETY: As above.
        let kind = unsafe { *entry };
        // SAFETY: As above; an entry has two words.
        let value = unsafe { entry.add(1) };
        // SAFETY: As above.
        (kind, unsafe { *value })
    });
    let number = || argument(2)?.to_str().ok()?.parse::<usize>().ok();
    match (argument(1).map(CStr::to_bytes), argument(2), number()) {
        (Some(b"identity"), ..) => cpu::identity(&hwcaps),
        (Some(b"instructions"), ..) => instructions::run(&hwcaps),
        (Some(b"pmu"), ..) => pmu::run(),
        (Some(b"carve-out"), Some(node), _) => carve_out::run(node, &hwcaps),
        (Some(b"unguarded"), Some(node), _) => carve_out::unguarded(node),
        (Some(b"hotplug"), _, Some(rounds)) => hotplug::run(rounds),
        (Some(b"memory"), _, Some(leave)) => memory::run(leave),
        (Some(b"kcore"), _, Some(step)) => kcore::run(step),
        (Some(b"peek"), _, Some(id)) => match argument(3) {
            Some(secret) => peek::process(id, secret),
            None => sys::exit(2),
        },
        (Some(b"peek-kernel"), Some(secret), _) => peek::kernel(secret),
        (Some(b"workloads"), ..) => finish("workloads", workloads::run()),
        (Some(b"linger"), _, Some(leave)) => finish("linger", workloads::linger(leave)),
        (Some(b"nothing"), ..) => {}
        (Some(b"kexec"), ..) => kexec::run(),
        _ => sys::exit(2),
    }
    sys::exit(0)
}

/// Ends with a status that says whether the work was done.
fn finish(name: &str, result: report::Result) -> ! {
    let failed = result.is_err();
    report::check(name, result);
    sys::exit(failed.into())
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    report::line(format_args!("@fail probe: {info}\n"));
    sys::exit(101)
}
