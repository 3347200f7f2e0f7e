//! A lock of one, or of many who only look, that is taken in the order in which they come.

use core::ops::{Deref, DerefMut};

use crate::{RwLock, TicketMutex, TicketMutexGuard, WriteGuard};

/// A lock that one holds alone, or many together who only look.
///
/// Who holds it alone has the turn until then, and who looks only while it comes in. So nobody comes in before those who have waited
/// longer, and who waits to be alone waits for those only who were there before.
#[derive(Debug)]
pub struct FairRwLock<T> {
    turn: TicketMutex<()>,
    /// That nobody holds alone without having the turn.
    value: RwLock<T>,
}

impl<T> FairRwLock<T> {
    /// Returns one that nobody holds.
    pub fn new(value: T) -> Self {
        Self { turn: TicketMutex::new(()), value: RwLock::new(value) }
    }

    /// Waits for the lock, to hold it together with others who only look.
    #[inline]
    pub fn read(&self) -> impl Deref<Target = T> {
        let _turn = self.turn.lock();
        self.value.read()
    }

    /// Waits for the lock, to hold it alone.
    #[inline]
    pub fn write(&self) -> Writer<'_, T> {
        let turn = self.turn.lock();
        Writer { value: self.value.write(), _turn: turn }
    }
}

/// The lock is held alone.
pub struct Writer<'a, T> {
    // Given back before the turn is: who has the turn need not wait for one who is alone.
    value: WriteGuard<'a, T>,
    _turn: TicketMutexGuard<'a, ()>,
}

impl<T> Deref for Writer<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Writer<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering::SeqCst},
        thread,
    };

    use super::*;

    #[test]
    fn those_who_look_hold_it_together() {
        let lock = FairRwLock::new(5);
        let (first, second) = (lock.read(), lock.read());
        assert_eq!(*first + *second, 10);
        drop((first, second));
        *lock.write() += 1;
        assert_eq!(*lock.read(), 6);
    }

    #[test]
    fn one_who_waits_to_be_alone_comes_before_those_who_look_later() {
        let lock = FairRwLock::new(0);
        let is_next = AtomicBool::new(false);
        let first = lock.read();
        thread::scope(|scope| {
            scope.spawn(|| *lock.write() += 1);
            // It has the turn, and waits for the first.
            while lock.turn.try_lock().is_some() {
                thread::yield_now();
            }
            let later = scope.spawn(|| {
                is_next.store(true, SeqCst);
                *lock.read()
            });
            while !is_next.load(SeqCst) {
                thread::yield_now();
            }
            assert_eq!(*first, 0);
            drop(first);
            assert_eq!(later.join().unwrap(), 1);
        });
    }

    #[test]
    fn nothing_is_lost() {
        let lock = FairRwLock::new((0_u32, 0_u32));
        let rounds = if cfg!(miri) { 10 } else { 200 };
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..rounds {
                        let mut value = lock.write();
                        value.0 += 1;
                        value.1 += 1;
                    }
                });
                scope.spawn(|| {
                    for _ in 0..rounds {
                        let value = lock.read();
                        assert_eq!(value.0, value.1);
                    }
                });
            }
        });
        assert_eq!(*lock.read(), (2 * rounds, 2 * rounds));
    }
}

#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;

    use super::*;
    use crate::model::{explore, spawn};

    #[test]
    fn one_changes_and_two_look() {
        explore(|| {
            let lock = Arc::new(FairRwLock::new((0, 0)));
            let writer = spawn(&lock, |lock| {
                let mut value = lock.write();
                value.0 += 1;
                value.1 += 1;
            });
            let reader = spawn(&lock, |lock| {
                let value = lock.read();
                assert_eq!(value.0, value.1);
            });
            let value = lock.read();
            assert_eq!(value.0, value.1);
            drop(value);
            writer.join().unwrap();
            reader.join().unwrap();
            assert_eq!(*lock.read(), (1, 1));
        });
    }
}
