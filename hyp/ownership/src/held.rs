//! Locks that a trace is told of.

use core::ops::{Deref, DerefMut};

use ravelin_memory::PhysAddr;
use ravelin_pgtable::{Hint, Machine};

/// A lock that is held, and the machine that has been told.
pub(crate) struct Held<'m, G, M: Machine> {
    guard: G,
    machine: &'m M,
    lock: PhysAddr,
    others: u64,
}

impl<'m, G, M: Machine> Held<'m, G, M> {
    /// Tells the machine that who has `guard` holds `lock`, and `others`, which are named by the numbers that follow: nobody else can
    /// hold them, either.
    pub(crate) fn new(guard: G, machine: &'m M, lock: PhysAddr, others: u64) -> Self {
        let held = Self { guard, machine, lock, others };
        held.locks().for_each(|lock| machine.hint(Hint::Lock(lock)));
        held
    }

    fn locks(&self) -> impl Iterator<Item = PhysAddr> + use<G, M> {
        let first = self.lock.raw();
        (0..=self.others).map(move |number| PhysAddr::from_bits_truncating(first.wrapping_add(number)))
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
        self.locks().for_each(|lock| self.machine.hint(Hint::Unlock(lock)));
    }
}
