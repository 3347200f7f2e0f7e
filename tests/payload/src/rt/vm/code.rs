//! Code for guests.

pub(crate) use ravelin_guest::snippets;

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
