//! What page tables need from the machine below them.

use ravelin_memory::{HypRange, IpaRange, PhysAddr, PhysRange};

use crate::Vttbr;

/// What a checker of a trace of the machine cannot tell from tables and instructions. A lock is named by the first root
/// whose tables it guards: an object with a lock may move before it is shared, a root never does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// A lock was taken.
    Lock(PhysAddr),
    /// It is about to be released.
    Unlock(PhysAddr),
    /// This lock guards the tables under this root.
    RootLock {
        /// The root.
        root: PhysAddr,
        /// The lock.
        lock: PhysAddr,
    },
    /// This lock, and not the one that guards the roots which `lock` with its low bits clear is, guards descriptors that translate
    /// nothing but these input addresses.
    RegionLock {
        /// The lock.
        lock: PhysAddr,
        /// The first address, a multiple of the size.
        base: PhysAddr,
        /// The size, a power of two.
        size: u64,
    },
    /// This page is a table under this root.
    Owner {
        /// The table.
        table: PhysAddr,
        /// The root.
        root: PhysAddr,
    },
    /// All entries of this page, whose contents are unknown, are about to be written, and then it is a table.
    Overwrite(PhysAddr),
    /// This page is a table no more.
    Free(PhysAddr),
    /// This root is given up.
    Release(PhysAddr),
}

/// Table memory, barriers and TLB maintenance.
///
/// `ravelin-arch` implements it for the CPU. The recording machine implements it for tests, where it plays a TLB that
/// remembers every translation it could have cached.
///
/// Tables are named by physical address and are only ones that a [`TablePool`] handed out, or pages of the hypervisor's that
/// are mapped writable in the EL2 stage 1 at that address. All operations on the TLB apply to the whole Inner Shareable domain.
pub trait Machine {
    /// Reads descriptor `index`, below 512, of the table page at `table`. Single-copy atomic.
    fn read(&self, table: PhysAddr, index: usize) -> u64;

    /// Writes descriptor `index`, below 512, of the table page at `table`. Single-copy atomic, and never merged with or
    /// dropped for a later write.
    fn write(&self, table: PhysAddr, index: usize, value: u64);

    /// Zeroes a table page that no walker can reach.
    fn clear_table(&self, table: PhysAddr);

    /// Makes the descriptor writes before it visible to all table walkers, and to those of this CPU for the instructions
    /// that follow: `dsb ishst`, `isb`.
    fn publish(&self);

    /// Removes what the TLBs hold of stage 2 for `range` in the VMID of `tree`, including what is combined with stage 1, and
    /// waits: `tlbi ipas2e1is` (or its range form), `dsb ish`, `tlbi vmalle1is`, `dsb ish`, `isb`
    /// (Arm ARM DDI 0487, D8.17 "TLB maintenance"). The caller has called [`Machine::publish`]. `leaf_only` says that no
    /// table descriptor of the range has changed.
    fn invalidate_stage2(&self, tree: Vttbr, range: IpaRange, leaf_only: bool);

    /// Removes all stage 1 and stage 2 translations of the VMID of `tree` and waits: `tlbi vmalls12e1is`, `dsb ish`, `isb`.
    fn invalidate_stage2_all(&self, tree: Vttbr);

    /// Removes what the TLBs hold of the EL2 stage 1 for `range` and waits: `tlbi vae2is` for each page or `tlbi alle2is`,
    /// `dsb ish`, `isb`.
    fn invalidate_el2(&self, range: HypRange);

    /// Zeroes pages that are mapped writable in the EL2 stage 1 and cleans them to the point of coherency, so that a
    /// reader with its caches off sees zeroes as well.
    fn scrub(&self, range: PhysRange);

    /// Cleans and invalidates the data caches to the point of coherency for pages that are mapped in the EL2 stage 1, and
    /// then the instruction caches: a reader with its caches off sees what was written, and no dirty line is left that could
    /// later overwrite what such a writer writes.
    fn clean(&self, range: PhysRange);

    /// Notes in the first entry of a page that waits to become a table which page comes after it, 0 for none. Walkers see an
    /// invalid descriptor.
    #[inline]
    fn write_link(&self, page: PhysAddr, next: u64) {
        self.write(page, 0, next);
    }

    /// Is told what a trace needs besides. Does nothing where there is none.
    #[inline]
    fn hint(&self, _hint: Hint) {}
}

/// Where pages for translation tables come from.
pub trait TablePool {
    /// Hands out a page with unknown contents. `None` if and only if [`TablePool::available`] is zero: callers that ask
    /// first rely on it.
    fn allocate(&mut self) -> Option<PhysAddr>;

    /// Takes back a page that [`TablePool::allocate`] handed out and that no walker can reach or has cached.
    fn free(&mut self, table: PhysAddr);

    /// Returns how many pages are left.
    fn available(&self) -> usize;

    /// Returns how many pages are handed out.
    fn in_use(&self) -> usize;
}
