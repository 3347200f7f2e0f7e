//! The console and the log on it.

#![expect(unsafe_code, reason = "opening a device at an address")]

use core::fmt::{self, Write};

use log::{LevelFilter, Log, Metadata, Record};
use ravelin_arch::Console;
use ravelin_memory::PhysAddr;
use ravelin_platform::LogLevel;
use spin::{mutex::TicketMutex, once::Once};

static CONSOLE: TicketMutex<Option<Console>> = TicketMutex::new(None);
static BASE: Once<PhysAddr> = Once::new();
static LOGGER: Logger = Logger;

/// Opens the console on the PL011 at `base` and starts the log.
///
/// # Safety
///
/// As [`Console::new`].
pub(crate) unsafe fn open(base: PhysAddr, level: LogLevel) {
    BASE.call_once(|| base);
    // SAFETY: The caller vouches for it.
    *CONSOLE.lock() = unsafe { Console::new(base) };
    // Fails only when called again, and then the logger is in place.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(match level {
        LogLevel::Off => LevelFilter::Off,
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warn => LevelFilter::Warn,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Debug => LevelFilter::Debug,
        LogLevel::Trace => LevelFilter::Trace,
    });
}

/// Writes to the console from a CPU that will not go on: does not wait for another CPU that may have stopped inside.
pub(crate) fn write_last(message: fmt::Arguments<'_>) {
    const PATIENCE: u32 = 1 << 16;
    for _ in 0..PATIENCE {
        if let Some(mut console) = CONSOLE.try_lock() {
            if let Some(console) = console.as_mut() {
                let _ = console.write_fmt(message);
            }
            return;
        }
        core::hint::spin_loop();
    }
    // SAFETY: The registers are mapped since `open`. Two writers at once garble the output, no more.
    if let Some(mut console) = BASE.get().and_then(|&base| unsafe { Console::new(base) }) {
        let _ = console.write_fmt(message);
    }
}

/// The log: a line for each record.
struct Logger;

impl Log for Logger {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if let Some(console) = CONSOLE.lock().as_mut() {
            // The console takes everything.
            let _ = match record.level() {
                log::Level::Info => writeln!(console, "ravelin: {}", record.args()),
                level => writeln!(console, "ravelin: {level}: {}", record.args()),
            };
        }
    }

    fn flush(&self) {}
}
