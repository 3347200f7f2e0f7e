//! The architecture trace on its way out: records are gathered and written by semihosting, in the order in which they come.
//!
//! The stream is one of [`Packed`] records. The image where the bootloader put it and its copy in the carve-out write one
//! after the other.

#![expect(unsafe_code, reason = "hyp/arch calls in by name")]

use core::sync::atomic::{AtomicBool, Ordering};

use arrayvec::ArrayVec;
use ravelin_arch::Output;
use ravelin_trace::Packed;
use spin::Mutex;

/// Records that are written at once.
const RECORDS: usize = 512;

/// What ends the machine, lest half a trace is taken for a whole one.
const LOST: &str = "the trace cannot be written";

struct Stream {
    output: Option<Output>,
    bytes: ArrayVec<u8, { RECORDS * Packed::SIZE }>,
}

/// Whoever is first has it: on an emulator that shares its processors, the one whose turn it was might not be running.
static STREAM: Mutex<Stream> = Mutex::new(Stream { output: None, bytes: ArrayVec::new_const() });

/// Whether there is a trace: for those that come here all the time.
static ON: AtomicBool = AtomicBool::new(false);

impl Stream {
    /// Writes what has been gathered and returns whether that worked. If not, it is the last time: a trace with a gap is worth
    /// nothing.
    fn flush(&mut self) -> bool {
        let written = self.output.is_none_or(|output| output.write(&self.bytes));
        if !written {
            self.output = None;
            ON.store(false, Ordering::Relaxed);
        }
        self.bytes.clear();
        written
    }
}

/// Begins to write what is recorded.
pub(crate) fn start() {
    let output = Output::of_command_line();
    STREAM.lock().output = output;
    ON.store(output.is_some(), Ordering::Relaxed);
}

/// Called by `ravelin_arch::trace`.
#[unsafe(no_mangle)]
fn trace_record(record: Packed) {
    #[cfg(feature = "checked")]
    crate::checked::follow(record);
    if !ON.load(Ordering::Relaxed) {
        return;
    }
    let mut stream = STREAM.lock();
    // There is room: the last one has seen to it.
    let _ = stream.bytes.try_extend_from_slice(&record.to_bytes());
    if stream.bytes.is_full() {
        assert!(stream.flush(), "{LOST}");
    }
}

/// Writes what has been gathered, before the machine may go off or, called by `ravelin_arch`, this image is left.
#[unsafe(no_mangle)]
pub(crate) fn trace_flush() {
    if ON.load(Ordering::Relaxed) {
        assert!(STREAM.lock().flush(), "{LOST}");
    }
}

/// The same on a CPU that will not go on, and does not wait for another CPU that may have stopped inside.
pub(crate) fn flush_last() {
    const PATIENCE: u32 = 1 << 16;
    if !ON.load(Ordering::Relaxed) {
        return;
    }
    for _ in 0..PATIENCE {
        if let Some(mut stream) = STREAM.try_lock() {
            // The machine is in trouble already.
            let _ = stream.flush();
            return;
        }
        core::hint::spin_loop();
    }
}
