//! A static arm64 Linux program without a library, for tests of the host: touches physical memory through `/dev/mem`.
//!
//! `carve_out read|write|pass ADDRESS` maps the page at ADDRESS and loads from it, stores to it, or has the kernel read it
//! as the buffer of a write(2). Ends with status 0 if nothing happened, or with the errno of the system call that failed;
//! the first two are expected to end in a signal. Linux maps such pages without permission to execute.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

const OPENAT: u64 = 56;
const WRITE: u64 = 64;
const EXIT: u64 = 93;
const MMAP: u64 = 222;

const EINVAL: u64 = 22;
const AT_FDCWD: u64 = -100_i64 as u64;
const O_RDWR: u64 = 2;
const PROT_READ_WRITE: u64 = 3;
const MAP_SHARED: u64 = 1;
const PAGE: u64 = 4096;

// The kernel passes argc and the arguments on the stack.
global_asm!(".global _start", "_start:", "mov x0, sp", "bl start", "udf #0");

#[unsafe(no_mangle)]
unsafe extern "C" fn start(stack: *const u64) -> ! {
    // SAFETY: This is the stack as execve(2) leaves it: argc, then as many pointers to zero-terminated strings.
    let argument = |index: usize| unsafe { text(*stack.add(1 + index) as *const u8) };
    // SAFETY: As above.
    if unsafe { *stack } != 3 {
        exit(EINVAL);
    }
    let Some(address) =
        core::str::from_utf8(argument(2)).ok().and_then(|text| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok())
    else {
        exit(EINVAL)
    };
    let memory = succeeds(call(OPENAT, [AT_FDCWD, c"/dev/mem".as_ptr() as u64, O_RDWR, 0, 0, 0]));
    let page = succeeds(call(MMAP, [0, PAGE, PROT_READ_WRITE, MAP_SHARED, memory, address]));
    let pointer = page as *mut u32;
    match argument(1) {
        // SAFETY: The page is mapped; what it holds is up to the test.
        b"read" => _ = unsafe { pointer.read_volatile() },
        // SAFETY: As above.
        b"write" => unsafe { pointer.write_volatile(0) },
        b"pass" => _ = succeeds(call(WRITE, [1, page, PAGE, 0, 0, 0])),
        _ => exit(EINVAL),
    }
    exit(0)
}

/// The string at a pointer, without its zero.
unsafe fn text(start: *const u8) -> &'static [u8] {
    let mut length = 0;
    // SAFETY: The caller promises a zero-terminated string.
    while unsafe { *start.add(length) } != 0 {
        length += 1;
    }
    // SAFETY: Counted above; arguments are never changed.
    unsafe { core::slice::from_raw_parts(start, length) }
}

/// The result of a system call; ends the program with its errno if it failed.
fn succeeds(result: u64) -> u64 {
    let errno = result.wrapping_neg();
    if (1..4096).contains(&errno) { exit(errno) } else { result }
}

fn exit(status: u64) -> ! {
    loop {
        call(EXIT, [status, 0, 0, 0, 0, 0]);
    }
}

fn call(number: u64, arguments: [u64; 6]) -> u64 {
    let [x0, x1, x2, x3, x4, x5] = arguments;
    let result;
    // SAFETY: The calls above touch no memory of this program but the strings that they are given.
    unsafe {
        asm!(
            "svc #0", in("x8") number, inlateout("x0") x0 => result,
            in("x1") x1, in("x2") x2, in("x3") x3, in("x4") x4, in("x5") x5, options(nostack)
        );
    }
    result
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(255)
}
