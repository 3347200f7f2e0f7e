//! The pages for tables, which all regions share.

use ravelin_memory::PhysAddr;
use ravelin_pgtable::TablePool;
use ravelin_sync::TicketMutex;

/// A pool with what of it is promised.
pub(crate) struct Pool<P> {
    pages: P,
    /// Pages that somebody relies on, and has not taken yet.
    reserved: usize,
}

impl<P: TablePool> Pool<P> {
    pub(crate) const fn new(pages: P) -> Self {
        Self { pages, reserved: 0 }
    }

    pub(crate) const fn pages_mut(&mut self) -> &mut P {
        &mut self.pages
    }

    fn free(&self) -> usize {
        self.pages.available().saturating_sub(self.reserved)
    }
}

/// The pool as one operation sees it. What it has reserved is there for it until it ends, however often it takes and frees it.
pub(crate) struct Tables<'m, P: TablePool> {
    pool: &'m TicketMutex<Pool<P>>,
    /// Pages that are reserved.
    reserved: usize,
    /// Pages that were, and have been taken.
    taken: usize,
}

impl<'m, P: TablePool> Tables<'m, P> {
    pub(crate) const fn new(pool: &'m TicketMutex<Pool<P>>) -> Self {
        Self { pool, reserved: 0, taken: 0 }
    }

    /// Sees to it that `needed` pages are reserved, if that leaves `left` to others. Returns whether they are.
    pub(crate) fn reserve(&mut self, needed: usize, left: usize) -> bool {
        let missing = needed.saturating_sub(self.reserved);
        if missing == 0 {
            return true;
        }
        let mut pool = self.pool.lock();
        if missing.saturating_add(left) > pool.free() {
            return false;
        }
        pool.reserved = pool.reserved.saturating_add(missing);
        self.reserved = self.reserved.saturating_add(missing);
        true
    }

    /// Gives up what is reserved.
    pub(crate) fn give_up(&mut self) {
        if self.reserved != 0 {
            let mut pool = self.pool.lock();
            pool.reserved = pool.reserved.saturating_sub(self.reserved);
        }
        (self.reserved, self.taken) = (0, 0);
    }
}

impl<P: TablePool> TablePool for Tables<'_, P> {
    fn allocate(&mut self) -> Option<PhysAddr> {
        let mut pool = self.pool.lock();
        if self.reserved != 0 {
            pool.reserved = pool.reserved.saturating_sub(1);
            self.reserved = self.reserved.saturating_sub(1);
            self.taken = self.taken.saturating_add(1);
        } else if pool.free() == 0 {
            return None;
        }
        pool.pages.allocate()
    }

    fn free(&mut self, table: PhysAddr) {
        let mut pool = self.pool.lock();
        pool.pages.free(table);
        if self.taken != 0 {
            pool.reserved = pool.reserved.saturating_add(1);
            self.reserved = self.reserved.saturating_add(1);
            self.taken = self.taken.saturating_sub(1);
        }
    }

    fn available(&self) -> usize {
        self.pool.lock().free().saturating_add(self.reserved)
    }

    fn in_use(&self) -> usize {
        self.pool.lock().pages.in_use()
    }
}

impl<P: TablePool> Drop for Tables<'_, P> {
    fn drop(&mut self) {
        self.give_up();
    }
}
