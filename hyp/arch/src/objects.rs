//! Objects in donated pages.

use core::{
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
};

use ravelin_memory::PhysRange;
use ravelin_vm::ObjectMemory;

/// Makes objects in pages of EL2.
#[derive(Clone, Copy, Debug)]
pub struct Objects(());

impl Objects {
    /// Vouches for all pages that will be named to the new value.
    ///
    /// # Safety
    ///
    /// They are mapped at their physical addresses, cacheable and writable, and nobody else's until what was made in them
    /// has been dropped.
    #[must_use]
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

/// An object, or a slice of them, in pages of its own. Drops it where it is.
#[derive(Debug)]
pub struct Placed<T: ?Sized>(NonNull<T>);

// SAFETY: It owns what it points to, like a box.
unsafe impl<T: ?Sized + Send> Send for Placed<T> {}
// SAFETY: As above.
unsafe impl<T: ?Sized + Sync> Sync for Placed<T> {}

impl<T: ?Sized> Deref for Placed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: It was made with a value, which lives until this is dropped.
        unsafe { self.0.as_ref() }
    }
}

impl<T: ?Sized> DerefMut for Placed<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: As in `deref`, and borrowed for writing.
        unsafe { self.0.as_mut() }
    }
}

impl<T: ?Sized> Drop for Placed<T> {
    fn drop(&mut self) {
        // SAFETY: As in `deref`; nobody can use it afterwards.
        unsafe { self.0.drop_in_place() };
    }
}

impl ObjectMemory for Objects {
    type Box<T: Send + Sync> = Placed<T>;
    type Slice<T: Send + Sync> = Placed<[T]>;

    fn place<T: Send + Sync>(&self, pages: PhysRange, value: T) -> Placed<T> {
        let place = room::<T>(pages, 1);
        // SAFETY: `Objects::new` promises the pages; there is room, and pages are aligned for anything.
        unsafe { place.write(value) };
        Placed(place)
    }

    fn place_slice<T: Send + Sync>(
        &self,
        pages: PhysRange,
        count: usize,
        mut make: impl FnMut(usize) -> T,
    ) -> Placed<[T]> {
        let place = room::<T>(pages, count);
        for index in 0..count {
            let value = make(index);
            // SAFETY: There is room for `count` values.
            let place = unsafe { place.add(index) };
            // SAFETY: As in `place`.
            unsafe { place.write(value) };
        }
        Placed(NonNull::slice_from_raw_parts(place, count))
    }
}

/// Returns the start of the pages, which have room for `count` values.
fn room<T>(pages: PhysRange, count: usize) -> NonNull<T> {
    const { assert!(align_of::<T>() <= 4096) };
    assert!(size_of::<T>() * count <= pages.size() as usize, "the caller counts pages by the same sizes");
    let Some(place) = NonNull::new(ptr::with_exposed_provenance_mut::<T>(pages.base().raw() as usize)) else {
        panic!("there is no RAM at 0 that the host could donate")
    };
    place
}
