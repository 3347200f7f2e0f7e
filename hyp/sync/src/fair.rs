//! A lock of one, or of many who only look, that nobody waits for in vain.

use core::ops::{Deref, DerefMut};

use crate::{ReadGuard, RwLock, TicketMutex, TicketMutexGuard, WriteGuard};

/// A lock that one holds alone, or many together who only look.
///
/// Who wants it alone waits for the turn, keeps others from coming in, and waits until those who were there before have gone. Who looks
/// comes in at once if nobody wants it alone, and else waits for the turn, too: then nobody can be in the way. So everybody gets the
/// lock in the end, however many come after. Who holds it must not ask for it again, not even to look: another may be waiting in between.
#[derive(Debug)]
pub struct FairRwLock<T> {
    turn: TicketMutex<()>,
    /// Nobody has it alone, or keeps others out, without having the turn.
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
        self.value.try_read().unwrap_or_else(|| self.wait_to_read())
    }

    #[cold]
    #[inline(never)]
    fn wait_to_read(&self) -> ReadGuard<'_, T> {
        let _turn = self.turn.lock();
        self.value.read()
    }

    /// Waits for the lock, to hold it alone.
    #[inline]
    pub fn write(&self) -> Writer<'_, T> {
        let turn = self.turn.lock();
        Writer { value: self.value.upgradeable_read().upgrade(), _turn: turn }
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
            // It has the turn, keeps others out, and waits for the first.
            while lock.value.try_read().is_some() {
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
