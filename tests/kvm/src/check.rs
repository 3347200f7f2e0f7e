//! What a case says about what it saw.

use std::fmt::{self, Debug, Display};

use nix::errno::Errno;

/// The result of a case, or of a part of it.
pub(crate) type Outcome<T = ()> = anyhow::Result<T>;

/// Why a case cannot be run here; as an error it makes the case a skipped one.
#[derive(Debug)]
pub(crate) struct Skipped(pub(crate) String);

impl Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skipped {}

/// Ends a case that cannot be run here.
macro_rules! skip {
    ($($argument:tt)*) => { return Err($crate::check::Skipped(format!($($argument)*)).into()) };
}
pub(crate) use skip;

/// Checks that two values are equal.
macro_rules! check_eq {
    ($seen:expr, $expected:expr, $($what:tt)+) => {{
        let (seen, expected) = ($seen, $expected);
        anyhow::ensure!(seen == expected, "{}: {seen:#x?}, expected {expected:#x?}", format_args!($($what)+));
    }};
}
pub(crate) use check_eq;

/// Checks that a system call fails with an error.
pub(crate) fn fails<T: Debug>(what: impl Display, result: Result<T, Errno>, expected: Errno) -> Outcome {
    match result {
        Err(errno) if errno == expected => Ok(()),
        Err(errno) => anyhow::bail!("{what}: {errno:?}, expected {expected:?}"),
        Ok(value) => anyhow::bail!("{what}: {value:?}, expected {expected:?}"),
    }
}

/// Checks that a system call succeeds.
pub(crate) fn works<T>(what: impl Display, result: Result<T, Errno>) -> Outcome<T> {
    result.map_err(|errno| anyhow::anyhow!("{what}: {errno:?}"))
}
