//! The cases, in groups.

use crate::runner::Case;

mod attack;
mod attributes;
mod bench;
mod convert;
mod huge;
mod io;
mod ioctls;
mod irq;
mod life;
mod memfd;
mod pins;
mod ring;
mod run;
mod slots;

/// All of them.
pub(crate) const GROUPS: &[(&str, &[Case])] = &[
    ("memfd", memfd::CASES),
    ("slots", slots::CASES),
    ("ioctls", ioctls::CASES),
    ("run", run::CASES),
    ("convert", convert::CASES),
    ("pins", pins::CASES),
    ("ring", ring::CASES),
    ("huge", huge::CASES),
    ("attributes", attributes::CASES),
    ("attack", attack::CASES),
    ("irq", irq::CASES),
    ("life", life::CASES),
    ("io", io::CASES),
    ("bench", bench::CASES),
];

/// A table of cases: functions, the kinds of VMs that they run for, and what else there is to say about them.
macro_rules! cases {
    ($($name:ident $([$kinds:expr])? $(. $method:ident ($($argument:expr)?))*;)+) => {
        pub(super) const CASES: &[$crate::runner::Case] =
            &[$(cases!(@case $name $([$kinds])?)$(.$method($($argument)?))*),+];
    };
    (@case $name:ident) => { $crate::runner::Case::once(stringify!($name), $name) };
    (@case $name:ident [$kinds:expr]) => { $crate::runner::Case::kinds(stringify!($name), $kinds, $name) };
}
use cases;
