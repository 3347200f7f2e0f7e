//! What has been reached: in which state, which call, with which result.

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Formatter},
};

use ravelin_model::Reached;

/// Name of an access of a guest to memory.
pub(crate) const ACCESS: &str = "GUEST_ACCESS";

/// Name of an access of the host.
const FAULT: &str = "FAULT";

/// How often each has been reached. As text, a line for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage(BTreeMap<Reached, u64>);

impl Coverage {
    /// Counts one.
    pub fn note(&mut self, reached: Reached) {
        *self.0.entry(reached).or_default() += 1;
    }

    /// Adds what somebody else has counted.
    pub fn add(&mut self, other: Self) {
        for (reached, count) in other.0 {
            *self.0.entry(reached).or_default() += count;
        }
    }

    /// Returns how many calls of hosts and guests have been counted; accesses do not count.
    #[must_use]
    pub fn calls(&self) -> u64 {
        let is_call = |reached: &Reached| !matches!(reached.call, ACCESS | FAULT);
        self.0.iter().filter(|(reached, _)| is_call(reached)).map(|(_, count)| count).sum()
    }

    /// Returns how many different ones there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether nothing has been reached.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Yields what `other` has reached and this has not.
    pub fn lacks<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a Reached> {
        other.0.keys().filter(|reached| !self.0.contains_key(reached))
    }
}

impl Display for Coverage {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(reached, count)| writeln!(f, "reached {reached} {count}"))
    }
}
