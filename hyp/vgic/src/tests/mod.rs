//! Tests on the build machine, with a simulated CPU interface.

use proptest::test_runner::Config;

mod chaos;
mod cpu;
mod delivery;
mod random;
mod reference;
mod registers;
mod world;

/// How much randomness. `PROPTEST_CASES` asks for more.
pub(crate) fn config() -> Config {
    let default = Config::default();
    Config { cases: if cfg!(miri) { 2 } else { default.cases.div_ceil(4) }, failure_persistence: None, ..default }
}
