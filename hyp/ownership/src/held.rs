//! Locks that a trace is told of.

use core::ops::{Deref, DerefMut};

use ravelin_memory::PhysAddr;
use ravelin_pgtable::{Hint, Machine};

/// A lock that is held, and the machine that has been told.
pub(crate) struct Held<'m, G, M: Machine> {
    guard: G,
    machine: &'m M,
    lock: PhysAddr,
}

impl<'m, G, M: Machine> Held<'m, G, M> {
    /// Tells the machine that `guard` holds `lock`.
    pub(crate) fn new(guard: G, machine: &'m M, lock: PhysAddr) -> Self {
        machine.hint(Hint::Lock(lock));
        Self { guard, machine, lock }
    }
}

impl<G: Deref, M: Machine> Deref for Held<'_, G, M> {
    type Target = G::Target;

    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut, M: Machine> DerefMut for Held<'_, G, M> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

impl<G, M: Machine> Drop for Held<'_, G, M> {
    fn drop(&mut self) {
        // The guard, a field, is dropped after this.
        self.machine.hint(Hint::Unlock(self.lock));
    }
}
