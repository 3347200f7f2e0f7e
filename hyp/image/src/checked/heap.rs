//! Memory for the model: the hypervisor itself allocates nothing.

use core::{
    alloc::{GlobalAlloc, Layout},
    ptr::{self, NonNull},
};

use buddy_system_allocator::Heap;
use ravelin_memory::PAGE_SIZE;
use ravelin_platform::MODEL_MEMORY;
use spin::Mutex;

use crate::pool::Pool;

/// Bytes that are taken from the pool at a time.
const CHUNK: u64 = 1 << 20;

struct ModelHeap(Mutex<Heap<32>>);

#[global_allocator]
static HEAP: ModelHeap = ModelHeap(Mutex::new(Heap::new()));

// SAFETY: The heap hands out what it has been given, aligned as asked, and to one owner at a time; a lock guards it.
unsafe impl GlobalAlloc for ModelHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.lock().alloc(layout).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if let Some(pointer) = NonNull::new(pointer) {
            // SAFETY: The caller has it from `alloc` with this layout.
            unsafe { self.0.lock().dealloc(pointer, layout) };
        }
    }
}

/// Takes what the model may have from the pool, where the layout has put it on top.
pub(super) fn fill(pool: &mut Pool) {
    for _ in 0..MODEL_MEMORY / CHUNK {
        let Some(chunk) = pool.allocate_pages(CHUNK / PAGE_SIZE) else { return };
        let start = chunk.raw() as usize;
        // SAFETY: The pages are mapped, and the pool has given them away for good.
        unsafe { HEAP.0.lock().add_to_heap(start, start + CHUNK as usize) };
    }
}
