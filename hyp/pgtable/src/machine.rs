//! What page tables need from the machine below them.

use ravelin_memory::{HypRange, IpaRange, PhysAddr, PhysRange};

use crate::Vttbr;

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
