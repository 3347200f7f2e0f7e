//! The pages that translation tables are made of.

#![expect(unsafe_code, reason = "hands memory to the buddy allocator")]

use core::{alloc::Layout, ptr::NonNull};

use buddy_system_allocator::Heap;
use ravelin_memory::{PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_pgtable::TablePool;

/// Orders of the buddy allocator: blocks of up to 16 MiB, aligned to their size.
const ORDERS: usize = 25;

/// A buddy allocator over part of the carve-out. Its free lists live in the free pages.
pub(crate) struct Pool {
    heap: Heap<ORDERS>,
    pages: usize,
    free: usize,
}

impl Pool {
    /// Takes over `memory`.
    ///
    /// # Safety
    ///
    /// It is mapped at its physical address, writable, belongs to nobody else, and stays so on every set of tables that the
    /// pool is used on.
    pub(crate) unsafe fn new(memory: PhysRange) -> Self {
        let mut heap = Heap::new();
        // SAFETY: The caller vouches for the memory.
        unsafe { heap.add_to_heap(memory.base().raw() as usize, memory.end() as usize) };
        let pages = memory.pages() as usize;
        Self { heap, pages, free: pages }
    }

    /// Hands out contiguous pages, a power of two of them, aligned to their total size.
    pub(crate) fn allocate_pages(&mut self, pages: u64) -> Option<PhysAddr> {
        let memory = self.heap.alloc(layout(pages)?).ok()?;
        self.free -= pages as usize;
        PhysAddr::new(memory.as_ptr().expose_provenance() as u64)
    }

    /// Takes back what [`Pool::allocate_pages`] handed out.
    pub(crate) fn free_pages(&mut self, base: PhysAddr, pages: u64) {
        let memory = core::ptr::with_exposed_provenance_mut(base.raw() as usize);
        if let (Some(memory), Some(layout)) = (NonNull::new(memory), layout(pages)) {
            // SAFETY: It came from this heap with this layout, as the caller says.
            unsafe { self.heap.dealloc(memory, layout) };
            self.free += pages as usize;
        }
    }
}

fn layout(pages: u64) -> Option<Layout> {
    let size = (pages * PAGE_SIZE) as usize;
    Layout::from_size_align(size, size).ok()
}

impl TablePool for Pool {
    fn allocate(&mut self) -> Option<PhysAddr> {
        self.allocate_pages(1)
    }

    fn free(&mut self, table: PhysAddr) {
        self.free_pages(table, 1);
    }

    fn available(&self) -> usize {
        self.free
    }

    fn in_use(&self) -> usize {
        self.pages - self.free
    }
}
