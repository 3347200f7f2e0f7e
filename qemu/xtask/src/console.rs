//! Filters the console of a machine on its way to the user: names the frames of the hypervisor's backtraces, notices its
//! panics, and takes out the marker behind which init reports the status of a command.
//!
//! Every byte is passed on as soon as it is known not to belong to the marker, so that prompts and echoes appear at once.

/// Names the frame at an offset into the image: lines of text, the innermost function first.
pub(crate) type Symbolize<'a> = dyn Fn(u64) -> Vec<String> + 'a;

/// Console lines that start so are the hypervisor's last words.
const FAILURES: [&[u8]; 2] = [b"ravelin panic", b"ravelin: cannot boot"];

/// Lines are looked at up to this length only.
const LINE_LIMIT: usize = 4096;

/// The filter's state.
pub(crate) struct Filter<'a> {
    symbolize: Option<&'a Symbolize<'a>>,
    marker: Option<Vec<u8>>,
    strip_returns: bool,
    /// The current line as far as it has been passed on.
    line: Vec<u8>,
    /// Bytes not yet passed on, since they may become the marker or a line end.
    held: Vec<u8>,
    /// Digits behind the marker, while they are being read.
    digits: Option<String>,
    status: Option<i32>,
    failed: bool,
}

impl<'a> Filter<'a> {
    /// A filter that looks for `marker` if there is one, and turns CR LF into LF if `strip_returns`.
    pub(crate) fn new(symbolize: Option<&'a Symbolize<'a>>, marker: Option<&str>, strip_returns: bool) -> Self {
        let marker = marker.map(|marker| marker.as_bytes().to_vec());
        let line = Vec::new();
        Self { symbolize, marker, strip_returns, line, held: Vec::new(), digits: None, status: None, failed: false }
    }

    /// Status that was reported behind the marker.
    pub(crate) fn status(&self) -> Option<i32> {
        self.status
    }

    /// Whether the hypervisor has panicked, or said that it cannot run here.
    pub(crate) fn failed(&self) -> bool {
        self.failed
    }

    /// Takes bytes of the console and returns those to show.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut shown = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            self.byte(byte, &mut shown);
        }
        shown
    }

    /// What was held back at the end of the console.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }

    fn byte(&mut self, byte: u8, shown: &mut Vec<u8>) {
        if let Some(digits) = &mut self.digits {
            match byte {
                b'0'..=b'9' => digits.push(char::from(byte)),
                b'\r' => {}
                _ => {
                    self.status = digits.parse().ok();
                    self.digits = None;
                }
            }
            return;
        }
        self.held.push(byte);
        if self.marker.as_ref() == Some(&self.held) {
            self.held.clear();
            self.digits = Some(String::new());
            return;
        }
        while !self.held.is_empty() && !self.may_continue() {
            let first = self.held.remove(0);
            // A carriage return that something else than a line feed follows is passed on; see `may_continue`.
            let dropped = self.strip_returns && first == b'\r' && self.held.first() == Some(&b'\n');
            if !dropped {
                self.show(first, shown);
            }
        }
    }

    /// Whether what is held may yet turn out to be the marker or a line end.
    fn may_continue(&self) -> bool {
        let marker = self.marker.as_ref().is_some_and(|marker| marker.starts_with(&self.held));
        marker || (self.strip_returns && self.held == b"\r")
    }

    fn show(&mut self, byte: u8, shown: &mut Vec<u8>) {
        if byte != b'\n' {
            if self.line.len() < LINE_LIMIT {
                self.line.push(byte);
            }
            self.failed |= FAILURES.contains(&self.line.as_slice());
            shown.push(byte);
            return;
        }
        let line = std::mem::take(&mut self.line);
        let returned = line.last() == Some(&b'\r');
        if let Some(symbolize) = self.symbolize
            && self.failed
            && let Some(offset) = frame_offset(&String::from_utf8_lossy(&line))
        {
            if returned {
                shown.pop();
            }
            for (index, name) in symbolize(offset).into_iter().enumerate() {
                let end = if returned { "\r\n" } else { "\n" };
                let separator = if index == 0 { " ".into() } else { format!("{end}      inlined into ") };
                shown.extend_from_slice(separator.as_bytes());
                shown.extend_from_slice(name.as_bytes());
            }
            if returned {
                shown.push(b'\r');
            }
        }
        shown.push(b'\n');
    }
}

/// The offset in a backtrace line, `  #N 0xOFFSET`.
fn frame_offset(line: &str) -> Option<u64> {
    let (number, offset) = line.trim_end().strip_prefix("  #")?.split_once(' ')?;
    number.parse::<u32>().ok()?;
    u64::from_str_radix(offset.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn partial_lines_are_shown_at_once() {
        let mut filter = Filter::new(None, Some("MARK:"), false);
        assert_eq!(text(filter.push(b"~ # ")), "~ # ");
        assert_eq!(text(filter.push(b"l")), "l");
        // Held until it is clear that this is no marker.
        assert_eq!(text(filter.push(b"MAR")), "");
        assert_eq!(text(filter.push(b"S\n")), "MARS\n");
        assert_eq!(text(filter.push(b"MMA")), "M");
        assert_eq!(text(filter.finish()), "MA");
        assert_eq!(filter.status(), None);
    }

    #[test]
    fn the_marker_gives_the_status_and_vanishes() {
        let mut filter = Filter::new(None, Some("MARK:"), true);
        assert_eq!(text(filter.push(b"no newline MARK:1")), "no newline ");
        assert_eq!(text(filter.push(b"7\r\nafter")), "after");
        assert_eq!(filter.status(), Some(17));
        assert!(!filter.failed());
    }

    #[test]
    fn byte_by_byte_is_the_same() {
        let console = b"one\r\ntwo\r\rMMARK:3\r\n\rthree\r\n";
        let mut whole = Filter::new(None, Some("MARK:"), true);
        let mut single = Filter::new(None, Some("MARK:"), true);
        let together = whole.push(console);
        let apart: Vec<u8> = console.iter().flat_map(|&byte| single.push(&[byte])).collect();
        assert_eq!(together, apart);
        assert_eq!(text(together), "one\ntwo\r\rM\rthree\n");
        assert_eq!((whole.status(), single.status()), (Some(3), Some(3)));
    }

    #[test]
    fn frames_of_a_panic_are_named() {
        let names = |offset: u64| vec![format!("f{offset:x} at a.rs:1"), "g at b.rs:2".to_owned()];
        let mut filter = Filter::new(Some(&names), None, true);
        assert_eq!(text(filter.push(b"  #0 0x10\r\n")), "  #0 0x10\n");
        assert!(!filter.failed());
        let out = text(filter.push(b"ravelin panic on CPU 1\r\n  #0 0x1f0\r\n"));
        assert!(filter.failed());
        assert_eq!(out, "ravelin panic on CPU 1\n  #0 0x1f0 f1f0 at a.rs:1\n      inlined into g at b.rs:2\n");
        let mut raw = Filter::new(Some(&names), None, false);
        let out = text(raw.push(b"ravelin panic\r\n  #1 0x4\r\n"));
        assert_eq!(out, "ravelin panic\r\n  #1 0x4 f4 at a.rs:1\r\n      inlined into g at b.rs:2\r\n");
    }

    #[test]
    fn only_whole_frame_lines_count() {
        for line in ["  #x 0x10", "#0 0x10", "  #0 10", "  #0 0xzz", "  #0", "  #0 0x10 again"] {
            assert_eq!(frame_offset(line), None, "{line}");
        }
        assert_eq!(frame_offset("  #12 0xABC"), Some(0xabc));
    }

    #[test]
    fn endless_lines_are_bounded() {
        let mut filter = Filter::new(None, None, false);
        for _ in 0..100 {
            filter.push(&[b'x'; 1000]);
        }
        assert_eq!(filter.line.len(), LINE_LIMIT);
    }
}
