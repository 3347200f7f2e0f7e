//! The model that watches the real thing, call by call.

use alloc::collections::BTreeMap;

use crate::{Difference, GuestCall, Model, Reached, Real, RingConversion};

/// A model that is told of each hypercall and each stage 2 fault of the host, and each call of a guest, when that has been
/// handled, and compares.
#[derive(Clone)]
pub struct Watch {
    model: Model,
    /// Exits between two comparisons of everything.
    thorough: u64,
    exits: u64,
    reached: BTreeMap<Reached, u64>,
}

impl Watch {
    /// Watches from the state of `model` on. Each exit is compared where it has to do with memory, each `thorough`th everywhere.
    #[must_use]
    pub const fn new(model: Model, thorough: u64) -> Self {
        Self { model, thorough, exits: 0, reached: BTreeMap::new() }
    }

    /// Judges a call of the host; see [`Model::host_call`].
    ///
    /// # Errors
    ///
    /// The first difference, of the answer or of the tables.
    pub fn host_call(
        &mut self,
        real: &dyn Real,
        immediate: u16,
        before: [u64; 7],
        after: [u64; 4],
    ) -> Result<(), Difference> {
        let reached = self.model.host_call(real, immediate, before, after)?;
        self.compare(real, [reached])
    }

    /// Judges a call of a guest; see [`Model::guest_call`].
    ///
    /// # Errors
    ///
    /// As [`Watch::host_call`].
    pub fn guest_call(&mut self, real: &dyn Real, call: &GuestCall) -> Result<(), Difference> {
        let reached = self.model.guest_call(call)?;
        self.compare(real, [reached])
    }

    /// Judges a fault of the host; see [`Model::host_fault`].
    ///
    /// # Errors
    ///
    /// As [`Watch::host_call`].
    pub fn host_fault(&mut self, real: &dyn Real, address: u64, given: bool) -> Result<(), Difference> {
        let reached = self.model.host_fault(address, given)?;
        self.compare(real, [reached])
    }

    /// Judges a batch of conversions; see [`Model::ring`].
    ///
    /// # Errors
    ///
    /// As [`Watch::host_call`].
    pub fn ring(
        &mut self,
        real: &dyn Real,
        root: u64,
        conversions: impl Iterator<Item = RingConversion>,
    ) -> Result<(), Difference> {
        let reached = self.model.ring(root, conversions)?;
        self.compare(real, reached)
    }

    /// Judges the end of a ring; see [`Model::ring_lost`].
    ///
    /// # Errors
    ///
    /// As [`Watch::host_call`].
    pub fn ring_lost(&mut self, real: &dyn Real, root: u64, frame: u64) -> Result<(), Difference> {
        let reached = self.model.ring_lost(root, frame)?;
        self.compare(real, [reached])
    }

    fn compare(&mut self, real: &dyn Real, reached: impl IntoIterator<Item = Reached>) -> Result<(), Difference> {
        for reached in reached {
            *self.reached.entry(reached).or_default() += 1;
        }
        self.exits += 1;
        if self.exits.is_multiple_of(self.thorough) {
            self.model.compare_all(real)?;
        }
        self.model.compare(real)
    }

    /// Returns the model.
    #[must_use]
    pub const fn model(&self) -> &Model {
        &self.model
    }

    /// Returns how many exits there were.
    #[must_use]
    pub const fn exits(&self) -> u64 {
        self.exits
    }

    /// Yields what has been reached, and how often.
    pub fn reached(&self) -> impl Iterator<Item = (&Reached, u64)> {
        self.reached.iter().map(|(reached, &count)| (reached, count))
    }
}
