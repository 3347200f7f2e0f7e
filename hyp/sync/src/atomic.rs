//! Atomics whose orderings a test can leave out.

pub use loom::sync::atomic::Ordering;
use loom::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use crate::model::left_out;

/// Returns what is left of an ordering.
fn order(wanted: Ordering) -> Ordering {
    match (wanted, left_out()) {
        (wanted, Some(left_out)) if wanted == left_out => Relaxed,
        (AcqRel, Some(Acquire)) => Release,
        (AcqRel, Some(Release)) => Acquire,
        _ => wanted,
    }
}

/// Orders what is before it before what is behind it, as `core`'s does.
pub fn fence(wanted: Ordering) {
    if left_out() != Some(wanted) {
        loom::sync::atomic::fence(wanted);
    }
}

macro_rules! atomic {
    ($name:ident, $value:ty) => {
        /// As `core` has it.
        #[derive(Debug, Default)]
        pub struct $name(loom::sync::atomic::$name);

        impl $name {
            /// Returns one with this value.
            pub fn new(value: $value) -> Self {
                Self(loom::sync::atomic::$name::new(value))
            }

            /// Returns the value.
            pub fn load(&self, wanted: Ordering) -> $value {
                self.0.load(order(wanted))
            }

            /// Changes the value.
            pub fn store(&self, value: $value, wanted: Ordering) {
                self.0.store(value, order(wanted));
            }

            /// Changes the value and returns the old one.
            pub fn swap(&self, value: $value, wanted: Ordering) -> $value {
                self.0.swap(value, order(wanted))
            }

            /// Changes the value from one to another and returns the old one.
            ///
            /// # Errors
            ///
            /// The value, if it is another.
            pub fn compare_exchange(
                &self,
                from: $value,
                to: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.0.compare_exchange(from, to, order(success), order(failure))
            }
        }
    };
}

macro_rules! sums {
    ($($name:ident: $value:ty),*) => {$(
        impl $name {
            /// Adds to the value, and returns what it was.
            pub fn fetch_add(&self, value: $value, wanted: Ordering) -> $value {
                self.0.fetch_add(value, order(wanted))
            }

            /// Subtracts from the value, and returns what it was.
            pub fn fetch_sub(&self, value: $value, wanted: Ordering) -> $value {
                self.0.fetch_sub(value, order(wanted))
            }

            /// Sets bits of the value, and returns what it was.
            pub fn fetch_or(&self, value: $value, wanted: Ordering) -> $value {
                self.0.fetch_or(value, order(wanted))
            }
        }
    )*};
}

atomic!(AtomicBool, bool);
atomic!(AtomicU8, u8);
atomic!(AtomicU64, u64);
sums!(AtomicU8: u8, AtomicU64: u64);
