//! Locks and atomics of the hypervisor.
//!
//! They are `spin`'s and `core`'s. With `--cfg loom` they are loom's, which runs a test once for each order in which its
//! threads can go, and for each value that a load may see by the memory model. Module `model` has what such tests need.

#![forbid(unsafe_code)]
#![cfg_attr(not(any(loom, test)), no_std)]

#[cfg(not(loom))]
pub mod atomic {
    //! Atomics.

    pub use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};
}

#[cfg(not(loom))]
pub use core::hint::spin_loop;
#[cfg(not(loom))]
pub use spin::{
    Mutex, RwLock,
    mutex::{TicketMutex, TicketMutexGuard},
};
#[cfg(not(loom))]
use spin::{RwLockReadGuard as ReadGuard, RwLockWriteGuard as WriteGuard};

#[cfg(loom)]
pub mod atomic;
mod fair;
#[cfg(loom)]
mod lock;
#[cfg(loom)]
pub mod model;

pub use fair::FairRwLock;

#[cfg(loom)]
pub use lock::{Mutex, Mutex as TicketMutex, RwLock};
#[cfg(loom)]
use lock::{Reader as ReadGuard, Writer as WriteGuard};
#[cfg(loom)]
pub use loom::hint::spin_loop;
#[cfg(loom)]
pub use loom::sync::MutexGuard as TicketMutexGuard;
