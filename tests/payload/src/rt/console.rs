//! Text in and out over the PL011.

use core::{
    fmt::{self, Write},
    ptr,
    sync::atomic::{AtomicUsize, Ordering},
};

/// Where QEMU's `virt` machine has its UART: for failures before the device tree has been read.
static BASE: AtomicUsize = AtomicUsize::new(0x900_0000);

const DATA: usize = 0x00;
const FLAGS: usize = 0x18;
const FLAG_RX_EMPTY: u32 = 1 << 4;
const FLAG_TX_FULL: u32 = 1 << 5;

/// Uses the PL011 at `base`.
pub(crate) fn set_base(base: u64) {
    BASE.store(base as usize, Ordering::Relaxed);
}

/// Base address of the PL011's registers.
pub(crate) fn base() -> u64 {
    BASE.load(Ordering::Relaxed) as u64
}

#[expect(unsafe_code, reason = "device registers")]
fn read(offset: usize) -> u32 {
    let register = ptr::with_exposed_provenance::<u32>(BASE.load(Ordering::Relaxed) + offset);
    // SAFETY: A register of the PL011, which stage 1 maps as Device.
    unsafe { register.read_volatile() }
}

#[expect(unsafe_code, reason = "device registers")]
fn write(offset: usize, value: u32) {
    let register = ptr::with_exposed_provenance_mut::<u32>(BASE.load(Ordering::Relaxed) + offset);
    // SAFETY: A register of the PL011, which stage 1 maps as Device.
    unsafe { register.write_volatile(value) }
}

/// Waits for a byte.
pub(crate) fn read_byte() -> u8 {
    while read(FLAGS) & FLAG_RX_EMPTY != 0 {
        core::hint::spin_loop();
    }
    read(DATA) as u8
}

/// The console as a formatter.
pub(crate) struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while read(FLAGS) & FLAG_TX_FULL != 0 {
                core::hint::spin_loop();
            }
            write(DATA, byte.into());
        }
        Ok(())
    }
}

/// Prints without a line end. Only the boot CPU prints while tests run.
macro_rules! print {
    ($($argument:tt)*) => {{
        use core::fmt::Write;
        let _ = write!($crate::rt::console::Console, $($argument)*);
    }};
}

/// Prints a line.
macro_rules! println {
    ($($argument:tt)*) => {{
        use core::fmt::Write;
        let _ = writeln!($crate::rt::console::Console, $($argument)*);
    }};
}

pub(crate) use {print, println};
