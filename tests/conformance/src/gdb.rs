//! As much of the GDB remote protocol as it takes to change physical memory.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

/// A connection to QEMU's debugging stub. The machine stands still while it lasts.
pub(crate) struct Gdb(UnixStream);

impl Gdb {
    /// Connects to the socket that the stub has made.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("cannot connect to QEMU's debugging stub")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut gdb = Self(stream);
        ensure!(gdb.request("Qqemu.PhyMemMode:1")? == "OK", "the stub does not know physical memory");
        Ok(gdb)
    }

    /// Reads the 32-bit word at a physical address.
    pub(crate) fn read(&mut self, address: u64) -> Result<u32> {
        let hex = self.request(&format!("m{address:x},4"))?;
        Ok(u32::from_str_radix(&hex, 16).with_context(|| format!("{address:#x}: {hex}"))?.swap_bytes())
    }

    /// Writes the 32-bit word at a physical address.
    pub(crate) fn write(&mut self, address: u64, word: u32) -> Result<()> {
        let answer = self.request(&format!("M{address:x},4:{:08x}", word.swap_bytes()))?;
        ensure!(answer == "OK", "{address:#x}: {answer}");
        Ok(())
    }

    /// Lets the machine go on alone.
    pub(crate) fn detach(mut self) -> Result<()> {
        ensure!(self.request("D")? == "OK", "the stub does not let go");
        Ok(())
    }

    fn request(&mut self, packet: &str) -> Result<String> {
        let sum = packet.bytes().fold(0_u8, u8::wrapping_add);
        write!(self.0, "${packet}#{sum:02x}")?;
        loop {
            let answer = self.packet()?;
            // What happened to the machine before, which nobody asked for.
            if !answer.starts_with('T') {
                return Ok(answer);
            }
        }
    }

    fn packet(&mut self) -> Result<String> {
        while self.byte()? != b'$' {}
        let mut text = Vec::new();
        loop {
            match self.byte()? {
                b'#' => break,
                byte => text.push(byte),
            }
            if text.len() > 4096 {
                bail!("the stub does not stop talking");
            }
        }
        let _sum = [self.byte()?, self.byte()?];
        self.0.write_all(b"+")?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.0.read_exact(&mut byte).context("the debugging stub is silent")?;
        Ok(byte[0])
    }
}
