//! Lines that `cargo xtask test` reads.

use core::fmt::{self, Display, Write};

use crate::sys;

/// Text of bounded length; what does not fit is left out.
#[derive(Clone)]
pub(crate) struct Text<const SIZE: usize> {
    bytes: [u8; SIZE],
    length: usize,
}

/// Why a check failed.
pub(crate) type Message = Text<112>;

impl<const SIZE: usize> Default for Text<SIZE> {
    fn default() -> Self {
        Self { bytes: [0; SIZE], length: 0 }
    }
}

impl<const SIZE: usize> Text<SIZE> {
    /// The text.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl<const SIZE: usize> Write for Text<SIZE> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.len() - self.length;
        let taken = &text.as_bytes()[..text.len().min(room)];
        self.bytes[self.length..][..taken.len()].copy_from_slice(taken);
        self.length += taken.len();
        Ok(())
    }
}

impl<const SIZE: usize> From<fmt::Arguments<'_>> for Text<SIZE> {
    fn from(arguments: fmt::Arguments<'_>) -> Self {
        let mut message = Self::default();
        // Writing never fails; see above.
        let _ = message.write_fmt(arguments);
        message
    }
}

impl From<sys::Errno> for Message {
    fn from(errno: sys::Errno) -> Self {
        format_args!("{errno}").into()
    }
}

/// A check's result: why it failed.
pub(crate) type Result<T = ()> = core::result::Result<T, Message>;

/// Leaves a function with a [`Message`] as its error.
macro_rules! bail {
    ($($argument:tt)*) => { return Err(core::format_args!($($argument)*).into()) };
}
pub(crate) use bail;

/// Reports a check.
pub(crate) fn check(name: impl Display, result: Result) {
    match result {
        Ok(()) => line(format_args!("@ok {name}\n")),
        Err(why) => line(format_args!("@fail {name}: {}\n", core::str::from_utf8(why.as_bytes()).unwrap_or("?"))),
    }
}

/// Reports a check that cannot be made here.
pub(crate) fn skip(name: impl Display, why: &str) {
    line(format_args!("@skip {name}: {why}\n"));
}

/// Reports a value that is to be the same without a hypervisor.
pub(crate) fn value(name: &str, value: fmt::Arguments<'_>) {
    line(format_args!("@value {name} = {value}\n"));
}

/// Reports a value of this run.
pub(crate) fn note(name: &str, value: fmt::Arguments<'_>) {
    line(format_args!("@note {name} = {value}\n"));
}

/// Prints with one system call, so that lines of several processes stay whole.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    sys::print(Text::<256>::from(text).as_bytes());
}
