//! Output by semihosting (Arm semihosting specification), which an emulator or debugger provides.

use core::arch::asm;

const SYS_OPEN: u64 = 0x01;
const SYS_WRITE: u64 = 0x05;
const SYS_GET_CMDLINE: u64 = 0x15;

/// An open file.
#[derive(Clone, Copy, Debug)]
pub struct Output(u64);

impl Output {
    /// Longest name of a file in bytes.
    const NAME: usize = 256;

    /// Opens the file whose name is the command line that the emulator has for semihosting, or returns `None` if it cannot.
    #[must_use]
    pub fn of_command_line() -> Option<Self> {
        const WRITE_BINARY: u64 = 5;
        let mut name = [0_u8; Self::NAME];
        let mut line = [name.as_mut_ptr().expose_provenance() as u64, name.len() as u64, 0];
        if call(SYS_GET_CMDLINE, &mut line) != 0 {
            return None;
        }
        let [name, length, _] = line;
        let handle = call(SYS_OPEN, &mut [name, WRITE_BINARY, length]);
        (handle != u64::MAX).then_some(Self(handle))
    }

    /// Writes bytes and returns whether all of them were taken.
    #[must_use]
    pub fn write(self, bytes: &[u8]) -> bool {
        call(SYS_WRITE, &mut [self.0, bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64]) == 0
    }
}

fn call(operation: u64, block: &mut [u64; 3]) -> u64 {
    let result;
    // SAFETY: The operations above access the block and the memory that it names, no further than it says. Both outlive the
    // call.
    unsafe {
        asm!("hlt #0xf000", inout("x0") operation => result, in("x1") block.as_mut_ptr(), options(nostack));
    }
    result
}
