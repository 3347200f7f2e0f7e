//! The CPU's event counters through perf_event_open(2).

use crate::report;
use crate::sys::{self, Errno, File, number};

/// What has the hardware count (Linux, `include/uapi/linux/perf_event.h`).
const EVENTS: [(&str, u64); 3] = [("cycles", 0), ("instructions", 1), ("branches", 4)];

/// Prints which events are counted.
pub(crate) fn run() {
    for (name, event) in EVENTS {
        match count(event) {
            Ok(0) => report::value(name, format_args!("supported, but not counted")),
            Ok(_) => report::value(name, format_args!("counted")),
            Err(errno) => report::value(name, format_args!("{errno}")),
        }
    }
}

/// Counts an event in this process while it works.
fn count(event: u64) -> Result<u64, Errno> {
    const TYPE_HARDWARE_SIZE_64: u64 = 64 << 32;
    let attributes = [TYPE_HARDWARE_SIZE_64, event, 0, 0, 0, 0, 0, 0];
    let this_process_any_cpu_no_group = [0, usize::MAX, usize::MAX];
    let [pid, cpu, group] = this_process_any_cpu_no_group;
    // SAFETY: Reads the attributes.
    let file = unsafe { sys::call(number::PERF_EVENT_OPEN, [attributes.as_ptr() as usize, pid, cpu, group, 0, 0]) }?;
    let file = File(file);
    for round in 0..100_000_u32 {
        core::hint::black_box(round);
    }
    let mut value = [0; 8];
    file.read(&mut value)?;
    Ok(u64::from_le_bytes(value))
}
