//! What the VMM tells about its guest, on stderr, for people or as JSON.

use std::io::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::{Value, json};

/// Prints events, and counts.
#[derive(Debug)]
pub struct Report {
    json: bool,
    share_trace: bool,
    /// Counts over the VM's life.
    pub counts: Counts,
}

/// Counts of what happened.
#[derive(Debug, Default)]
pub struct Counts {
    /// Loads from devices that the VMM played.
    pub mmio_read: AtomicU64,
    /// Stores to them.
    pub mmio_write: AtomicU64,
    /// Accesses to addresses where no device is.
    pub mmio_nowhere: AtomicU64,
    /// Other exits.
    pub other: AtomicU64,
    /// Pages that the guest shared.
    pub shared: AtomicU64,
    /// Pages that the guest took back.
    pub unshared: AtomicU64,
    /// Devices that stopped because of what the driver did.
    pub device_errors: AtomicU64,
}

/// Adds to a count.
pub fn count(counter: &AtomicU64, number: u64) {
    counter.fetch_add(number, Relaxed);
}

impl Report {
    /// A report, as JSON or not, with a line for each conversion or not.
    pub fn new(json: bool, share_trace: bool) -> Self {
        Self { json, share_trace, counts: Counts::default() }
    }

    /// Whether conversions are wanted.
    pub fn share_trace(&self) -> bool {
        self.share_trace
    }

    /// Prints an event: `text` for people, or the fields of `details`. An empty `text` is for programs alone.
    pub fn event(&self, name: &str, text: &str, details: Value) {
        let line = if self.json {
            let mut event = json!({ "event": name });
            if let (Some(event), Value::Object(details)) = (event.as_object_mut(), details) {
                event.extend(details);
            }
            event.to_string()
        } else if text.is_empty() {
            return;
        } else {
            format!("ravelin-vmm: {text}")
        };
        // There is nobody to tell that stderr is gone.
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    }

    /// Takes note of a conversion.
    pub fn conversion(&self, address: u64, pages: u64, private: bool) {
        let (name, counter) = if private { ("unshare", &self.counts.unshared) } else { ("share", &self.counts.shared) };
        count(counter, pages);
        if self.share_trace {
            let text = format!("{name} {address:#x} pages {pages}");
            self.event(name, &text, json!({ "address": address, "pages": pages }));
        }
    }

    /// Prints how it ended, with the counts.
    pub fn end(&self, reason: &str, status: i32) {
        let counts = &self.counts;
        let details = json!({
            "reason": reason,
            "status": status,
            "exits": {
                "mmio_read": counts.mmio_read.load(Relaxed),
                "mmio_write": counts.mmio_write.load(Relaxed),
                "mmio_nowhere": counts.mmio_nowhere.load(Relaxed),
                "other": counts.other.load(Relaxed),
            },
            "shared_pages": counts.shared.load(Relaxed),
            "unshared_pages": counts.unshared.load(Relaxed),
            "device_errors": counts.device_errors.load(Relaxed),
        });
        let text = if status == 0 && !self.share_trace {
            String::new()
        } else if self.share_trace {
            let (shared, unshared) = (counts.shared.load(Relaxed), counts.unshared.load(Relaxed));
            format!("{reason}; {shared} pages shared, {unshared} taken back")
        } else {
            reason.into()
        };
        self.event("end", &text, details);
    }
}
