//! The PL011 that EL2 shares with the host.

use core::{fmt, ptr::NonNull};

use arm_pl011_uart::{PL011Registers, Uart, UniqueMmioPointer};
use ravelin_memory::PhysAddr;

/// Polls of a full transmit FIFO before a byte is dropped: the host owns the device as well and may have turned it off, which
/// must not hang EL2.
const PATIENCE: u32 = 1 << 20;

/// A console on a PL011.
pub struct Console {
    uart: Uart<'static>,
}

impl Console {
    /// Opens the PL011 at `base`, which firmware or the bootloader has set up.
    ///
    /// # Safety
    ///
    /// The register page at `base` is mapped as Device memory at its physical address, and EL2 opens it only once on each
    /// set of tables.
    #[must_use]
    pub unsafe fn new(base: PhysAddr) -> Option<Self> {
        let registers = NonNull::new(core::ptr::with_exposed_provenance_mut::<PL011Registers>(base.raw() as usize))?;
        // SAFETY: The caller vouches for the mapping. The host may write to the registers too, which can garble the output
        // but nothing else.
        let registers = unsafe { UniqueMmioPointer::new(registers) };
        Some(Self { uart: Uart::new(registers) })
    }

    fn write_byte(&mut self, byte: u8) {
        for _ in 0..PATIENCE {
            if !self.uart.is_tx_fifo_full() {
                self.uart.write_word(byte);
                return;
            }
            core::hint::spin_loop();
        }
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Console")
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.write_byte(b'\r');
            }
            self.write_byte(byte);
        }
        Ok(())
    }
}
