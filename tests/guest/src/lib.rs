//! What the guest of the on-target tests and the payload that plays its host have agreed on.
//!
//! The guest is a puppet. Each of its vCPUs loads commands from a device that the payload plays, carries them out and stores
//! the results there: loads and stores of 8 bytes to one page that has no memory, each of which exits to the host. A vCPU
//! that waits for a command is one whose last exit is the load of [`COMMAND`].
//!
//! A vCPU starts with the address of its [block](BLOCK_SIZE) in x0, at the first byte of the image.

#![cfg_attr(target_os = "none", no_std)]

pub mod playground;

/// Guest address of the image.
pub const IMAGE: u64 = 0x8000_0000;

/// Guest address of the device, without the bit that marks shared addresses in a realm.
pub const DEVICE: u64 = 0x0a00_0000;

/// Bytes of a vCPU's block, to which it is aligned. The first word is the address of the device as the guest uses it; the
/// others are the guest's, which has its stack at the end.
pub const BLOCK_SIZE: u64 = 0x4000;

/// Offset in the device that is loaded to get the next command, a code of [`Command`].
pub const COMMAND: u64 = 0;

/// Offset in the device of the first operand; [`MAX_OPERANDS`] follow.
pub const OPERANDS: u64 = 0x8;

/// The most operands of a command.
pub const MAX_OPERANDS: usize = 200;

/// Offset in the device where results are stored: x0 to x7 after [`Command::Run`].
pub const RESULTS: u64 = 0x800;

/// How many results there may be.
pub const MAX_RESULTS: usize = 8;

/// Offset in the device where an exception that ended [`Command::Run`] is stored: ESR_EL1, FAR_EL1, and the distance of
/// ELR_EL1 from the code's first instruction.
pub const EXCEPTION: u64 = 0xa00;

/// Offset in the device where an exception that nobody asked for is stored: the offset of the vector, ESR_EL1, FAR_EL1 and
/// ELR_EL1. The vCPU does nothing more.
pub const UNEXPECTED: u64 = 0xb00;

/// Offset in the device where the number of an SPI is stored while the guest handles it, before it ends the interrupt.
pub const INTERRUPT: u64 = 0xc00;

/// Offset in the device where the counts of [`Command::Random`] are stored, [`OUTCOMES`](playground::OUTCOMES) of them for each of
/// [`CALLS`](playground::CALLS). Counts of zero are not.
pub const TALLY: u64 = 0xd00;

/// What a vCPU is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Command {
    /// Execute code: operands are the values of x0 to x7, the number of words that follow, and two instructions a word. The
    /// code is called; it keeps SP and returns, or takes an exception that ends it.
    Run = 1,
    /// Fill pages with their [pattern]: address, number of pages, the page's number in the pattern (an address, which goes up
    /// with that of the page), seed.
    Fill = 2,
    /// Look for a word that differs from the pattern: operands as [`Command::Fill`]. Results: its address or 0, its value.
    Compare = 3,
    /// Look for a word that is not zero: address, number of pages. Results as [`Command::Compare`].
    FindNonzero = 4,
    /// Results: how many interrupts the vCPU has handled, and the numbers of the last seven, the last one first.
    Interrupts = 5,
    /// Make calls and touch memory at random: seed, number of steps, code of the kind of VM, the bit that marks shared addresses,
    /// the page's number in the pattern of the first of the [kept](playground::KEPT) frames. Results: the address in a kept frame
    /// where the pattern is not, or 0, and what is there.
    Random = 6,
}

impl Command {
    /// Returns the code of the command.
    #[must_use]
    pub const fn code(self) -> u64 {
        self as u64
    }

    /// Returns the command that has the code.
    #[must_use]
    pub fn from_code(code: u64) -> Option<Self> {
        static ALL: [Command; 6] =
            [Command::Run, Command::Fill, Command::Compare, Command::FindNonzero, Command::Interrupts, Command::Random];
        ALL.iter().copied().find(|command| command.code() == code)
    }
}

/// Word `index` of the pattern that tests put into a page, as 64 bits; `seed` tells patterns apart.
#[must_use]
pub const fn pattern(page: u64, index: u64, seed: u64) -> u64 {
    (page ^ index << 3 ^ seed << 48).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
}

/// Defines functions that return code for [`Command::Run`], as the assembler has it, in words of two instructions.
///
/// ```text
/// snippets! {
///     /// Loads a word: x0 = address. Returns it.
///     load: "ldr x0, [x0]";
/// }
/// guest.run(load(), &[MEMORY])?;
/// ```
///
/// The code is called with x0 to x7 and returns them. It may change x8 to x30 but x18, keeps SP, and may take an exception,
/// which ends it. A `ret` follows of itself. It must not refer to anything outside of itself.
#[macro_export]
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
            // SAFETY: Both are labels of one piece of code, aligned to 8 bytes, the second one behind the first one.
            unsafe { core::slice::from_raw_parts(start, (end.addr() - start.addr()) / 8) }
        }
    )+};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_go_both_ways() {
        for code in 1..=6 {
            assert_eq!(Command::from_code(code).map(Command::code), Some(code));
        }
        assert_eq!([0, 7].map(Command::from_code), [None; 2]);
    }

    #[test]
    fn the_device_fits_its_page() {
        assert!(OPERANDS + 8 * MAX_OPERANDS as u64 <= RESULTS);
        assert!(RESULTS + 8 * MAX_RESULTS as u64 <= EXCEPTION);
        assert!(TALLY + 8 * (playground::CALLS.len() * playground::OUTCOMES.len()) as u64 <= 0x1000);
    }
}
