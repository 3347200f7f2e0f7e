//! Locks.

use std::{
    ops::{Deref, DerefMut},
    sync::{RwLockReadGuard, RwLockWriteGuard},
};

use loom::sync::MutexGuard;

use crate::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// A lock that loom sees a deadlock of.
#[derive(Debug)]
pub struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// Returns one that nobody holds.
    pub fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().expect("loom's locks are not poisoned")
    }

    /// Takes the lock if nobody holds it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock().ok()
    }

    /// Returns the value of a lock that nobody can hold.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().expect("loom's locks are not poisoned")
    }
}

/// Set while one holds the lock alone; below it is how many hold it together.
const WRITER: u64 = 1 << 32;
/// Set while one waits until it holds the lock alone.
const UPGRADED: u64 = 1 << 33;

/// A lock of one, or of many who only look. Only one at a time may wait for it.
///
/// It takes the steps of `spin`'s, with their orderings. loom's own orders more than that, and so would hide what is not ordered
/// otherwise.
#[derive(Debug)]
pub struct RwLock<T> {
    holders: AtomicU64,
    /// Finds out if the above is wrong.
    value: std::sync::RwLock<T>,
}

impl<T> RwLock<T> {
    /// Returns one that nobody holds.
    pub fn new(value: T) -> Self {
        Self { holders: AtomicU64::new(0), value: std::sync::RwLock::new(value) }
    }

    /// Takes the lock together with others who only look.
    pub fn try_read(&self) -> Option<Reader<'_, T>> {
        if self.holders.fetch_add(1, Acquire) & (WRITER | UPGRADED) != 0 {
            self.holders.fetch_sub(1, Release);
            return None;
        }
        Some(Reader { lock: self, value: Some(self.value.try_read().expect("one holds the lock alone")) })
    }

    /// Waits for the lock, to take it together with others who only look.
    pub fn read(&self) -> Reader<'_, T> {
        wait_for(|| self.try_read())
    }

    /// Waits for a lock that others who only look may hold, and keeps more of them from coming.
    pub fn upgradeable_read(&self) -> Upgradeable<'_, T> {
        wait_for(|| (self.holders.fetch_or(UPGRADED, Acquire) & (WRITER | UPGRADED) == 0).then_some(()));
        Upgradeable { lock: self }
    }

    /// Takes the lock alone.
    pub fn try_write(&self) -> Option<Writer<'_, T>> {
        self.holders.compare_exchange(0, WRITER, Acquire, Relaxed).ok()?;
        Some(Writer { lock: self, value: Some(self.value.try_write().expect("another holds the lock")) })
    }
}

/// Nobody more comes in.
#[derive(Debug)]
pub struct Upgradeable<'a, T> {
    lock: &'a RwLock<T>,
}

impl<'a, T> Upgradeable<'a, T> {
    /// Waits until the others have gone, to hold the lock alone.
    pub fn upgrade(self) -> Writer<'a, T> {
        let Self { lock } = self;
        wait_for(|| lock.holders.compare_exchange(UPGRADED, WRITER, Acquire, Relaxed).ok());
        Writer { lock, value: Some(lock.value.try_write().expect("another holds the lock")) }
    }
}

/// Tries until it succeeds, and lets other threads go on meanwhile.
fn wait_for<G>(take: impl Fn() -> Option<G>) -> G {
    loop {
        match take() {
            Some(guard) => return guard,
            None => loom::thread::yield_now(),
        }
    }
}

/// The lock is held together with others.
#[derive(Debug)]
pub struct Reader<'a, T> {
    lock: &'a RwLock<T>,
    value: Option<RwLockReadGuard<'a, T>>,
}

impl<T> Deref for Reader<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("it is there until this is dropped")
    }
}

impl<T> Drop for Reader<'_, T> {
    fn drop(&mut self) {
        // First, since another thread may go on with the next line.
        self.value = None;
        self.lock.holders.fetch_sub(1, Release);
    }
}

/// The lock is held alone.
#[derive(Debug)]
pub struct Writer<'a, T> {
    lock: &'a RwLock<T>,
    value: Option<RwLockWriteGuard<'a, T>>,
}

impl<T> Deref for Writer<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("it is there until this is dropped")
    }
}

impl<T> DerefMut for Writer<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("it is there until this is dropped")
    }
}

impl<T> Drop for Writer<'_, T> {
    fn drop(&mut self) {
        self.value = None;
        self.lock.holders.fetch_sub(WRITER, Release);
    }
}
