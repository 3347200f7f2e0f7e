//! Code for guests, as the assembler has it.
//!
//! ```ignore
//! snippets! {
//!     /// Loads a word: x0 = address. Returns it.
//!     load: "ldr x0, [x0]";
//! }
//! guest.run(load(), &[MEMORY])?;
//! ```
//!
//! The code is called with x0 to x7 and returns them. It may change x8 to x30 but x18, keeps SP, and may take an exception,
//! which ends it. A `ret` follows of itself. It must not refer to anything outside of itself.

use core::slice;

/// Defines functions that return code, in words of two instructions.
macro_rules! snippets {
    ($($(#[$meta:meta])* $name:ident: $($line:literal),+;)+) => {$(
        $(#[$meta])*
        #[expect(unsafe_code, reason = "code for guests")]
        pub(crate) fn $name() -> &'static [u64] {
            let (start, end): (*const u64, *const u64);
            // SAFETY: The code is jumped over; only its labels are used.
            unsafe {
                core::arch::asm!(
                    "adr {start}, 2f",
                    "adr {end}, 3f",
                    "b 3f",
                    ".balign 8",
                    "2:",
                    $($line,)+
                    "ret",
                    ".balign 8",
                    "3:",
                    start = out(reg) start,
                    end = out(reg) end,
                    options(nomem, nostack, preserves_flags),
                );
            }
            $crate::rt::vm::code::between(start, end)
        }
    )+};
}

pub(crate) use snippets;

/// The words between two addresses of the image.
#[expect(unsafe_code, reason = "what lies between two labels")]
pub(crate) fn between(start: *const u64, end: *const u64) -> &'static [u64] {
    // SAFETY: Both are labels of one piece of code, aligned to 8 bytes, the second one behind the first one.
    unsafe { slice::from_raw_parts(start, (end.addr() - start.addr()) / 8) }
}

snippets! {
    /// Loads a word: x0 = address. Returns it.
    load: "ldr x0, [x0]";

    /// Stores a word: x0 = address, x1 = value.
    store: "str x1, [x0]";

    /// Loads two words with LDP, whose syndrome names no register: x0 = address. Returns them.
    load_pair: "ldp x0, x1, [x0]";

    /// Stores two words with STP, whose syndrome names no register: x0 = address.
    store_pair: "stp x1, x2, [x0]";

    /// Calls an address: x0.
    execute: "stp x29, x30, [sp, #-16]!", "blr x0", "ldp x29, x30, [sp], #16";

    /// Calls the hypervisor with x0 to x7 by HVC.
    hvc: "hvc #0";

    /// Calls the hypervisor with x0 to x7 by SMC.
    smc: "smc #0";

    /// Waits for an interrupt.
    wfi: "wfi";
}
