//! Pages that a test gives away.

use spin::Mutex;

use crate::{
    rt::{
        memory::PAGE,
        platform::{Region, platform},
    },
    tests::{Failure, OWNED, Outcome, arena, check_eq, state},
};

/// A test's arena, out of which pages are taken one after the other.
pub(crate) struct Pages {
    start: u64,
    next: Mutex<u64>,
    end: u64,
}

impl Pages {
    /// All of the arena; the table of tests says how much it has.
    pub(crate) fn new(size: u64) -> Self {
        let start = arena(size);
        Self { start, next: Mutex::new(start), end: start + size }
    }

    /// Some memory outside of an arena that the test uses otherwise.
    pub(crate) fn beside(arena: u64, arena_size: u64, size: u64) -> Result<Self, Failure> {
        let arena = Region { start: arena, end: arena + arena_size };
        match platform().free_beside(size, PAGE, Some(arena)) {
            Some(Region { start, end }) => Ok(Self { start, next: Mutex::new(start), end }),
            None => Err(Failure::new(format_args!("there is no more than the arena"))),
        }
    }

    /// Takes contiguous pages that start at a multiple of `align` pages.
    pub(crate) fn take_aligned(&self, pages: u64, align: u64) -> Result<u64, Failure> {
        let mut next = self.next.lock();
        let address = next.next_multiple_of(align * PAGE);
        let end = address + pages * PAGE;
        if end > self.end {
            return Err(Failure::new(format_args!("the arena has no {pages} pages left")));
        }
        *next = end;
        Ok(address)
    }

    /// Takes contiguous pages.
    pub(crate) fn take(&self, pages: u64) -> Result<u64, Failure> {
        self.take_aligned(pages, 1)
    }

    /// Where the next pages are taken from.
    pub(crate) fn mark(&self) -> u64 {
        *self.next.lock()
    }

    /// Makes the pages behind a mark free again.
    pub(crate) fn reset(&self, mark: u64) {
        *self.next.lock() = mark;
    }

    /// Checks that every page that has been taken is the host's alone.
    pub(crate) fn are_owned(&self) -> Outcome {
        let end = self.mark();
        for page in (self.start..end).step_by(PAGE as usize) {
            check_eq!(state(page)?, OWNED, "state of {page:#x} after the end of the VM");
        }
        Ok(())
    }
}
