//! QEMU's monitor: it sees physical memory as no program inside can.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use ravelin_payload::pattern;

const PROMPT: &str = "(qemu) ";
const WORDS: u64 = 4096 / 8;

/// A connection to the monitor.
pub(crate) struct Monitor(UnixStream);

impl Monitor {
    /// Connects to the socket that QEMU has made.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("cannot connect to QEMU's monitor")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut monitor = Self(stream);
        monitor.until_prompt()?;
        Ok(monitor)
    }

    /// Whether the page holds the payload's pattern.
    pub(crate) fn page_has_pattern(&mut self, page: u64, seed: u64) -> Result<bool> {
        writeln!(self.0, "xp /{WORDS}xg {page:#x}")?;
        let words = parse_dump(&self.until_prompt()?);
        ensure!(words.len() as u64 == WORDS, "the monitor shows {} words, not {WORDS}", words.len());
        Ok((0..).zip(words).all(|(index, word)| word == pattern(page, index, seed)))
    }

    /// Starts QEMU's debugging stub on the given socket.
    pub(crate) fn debug(&mut self, socket: &Path) -> Result<()> {
        writeln!(self.0, "gdbserver unix:{},server=on,wait=off", socket.display())?;
        self.until_prompt()?;
        Ok(())
    }

    fn until_prompt(&mut self) -> Result<String> {
        let mut text = Vec::new();
        while !text.ends_with(PROMPT.as_bytes()) {
            let mut byte = [0];
            self.0.read_exact(&mut byte).context("QEMU's monitor is silent")?;
            text.extend(byte);
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// The words of lines such as `0000000040000000: 0x0000000000000001 0x0000000000000002`. The monitor echoes the command,
/// with escape sequences and without a colon.
fn parse_dump(text: &str) -> Vec<u64> {
    let data = text.lines().filter_map(|line| line.split_once(": "));
    let words = data.flat_map(|(_, words)| words.split_whitespace());
    words.filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dumps() {
        let text = "xp /3xg 0x1000\r\n0000000000001000: 0x0000000000000001 0xffffffffffffffff\r\n\
                    0000000000001010: 0x0000000000000010\r\n(qemu) ";
        assert_eq!(parse_dump(text), [1, u64::MAX, 16]);
    }
}
