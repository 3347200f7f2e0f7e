//! A short slice of the random driver. `cargo xtask test --full drivers` runs the long one.

use proptest::{
    collection::vec,
    prelude::proptest,
    test_runner::{Config, TestCaseError},
};
use ravelin_drivers::{draft::draft, random::run_drafts};

proptest! {
    #![proptest_config(Config { cases: 64, failure_persistence: None, ..Config::default() })]

    /// Whatever host and guests do, it is what the model says.
    #[test]
    fn nothing_differs_from_the_model(drafts in vec(draft(), 1..300)) {
        run_drafts(drafts.into_iter()).map_err(|(steps, why)| {
            let lines: String = steps.iter().map(|step| format!("{step}\n")).collect();
            TestCaseError::fail(format!("{why}\nTo replay it:\n{lines}"))
        })?;
    }
}
