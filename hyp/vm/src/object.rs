//! Where VMs and vCPUs are kept.

use core::ops::DerefMut;

use ravelin_memory::PhysRange;

/// Makes objects in pages that the host has donated.
///
/// An object is dropped with its box. The pages hold nothing else, are mapped writable in the EL2 stage 1, and stay so until
/// after that.
pub trait ObjectMemory {
    /// An object.
    type Box<T: Send + Sync>: DerefMut<Target = T> + Send + Sync;

    /// Objects of one type, one after the other.
    type Slice<T: Send + Sync>: DerefMut<Target = [T]> + Send + Sync;

    /// Moves `value` to the start of `pages`, which have room for it. Its alignment is at most a page. It passes over the
    /// stack, so it is small.
    fn place<T: Send + Sync>(&self, pages: PhysRange, value: T) -> Self::Box<T>;

    /// Fills the start of `pages`, which have room for them, with `count` values that `make` returns for their indices.
    fn place_slice<T: Send + Sync>(
        &self,
        pages: PhysRange,
        count: usize,
        make: impl FnMut(usize) -> T,
    ) -> Self::Slice<T>;
}
