//! The memory of a guest.

use core::{
    array,
    ops::{Deref, DerefMut},
};

use arrayvec::ArrayVec;
use ravelin_memory::{BLOCK_SIZE, Ipa, IpaRange, PAGE_SIZE, PhysAddr, TABLE_ENTRIES};
use ravelin_pgtable::{Geometry, Hint, Machine, PageTable, Stage2, TablePool, Tree, Vmid, Vttbr};
use ravelin_sync::{FairRwLock, TicketMutex, TicketMutexGuard};

use crate::{held::Held, locked::Mask};

/// What kind of guest it is, as far as its memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// The host lends it pages and keeps access.
    Ordinary,
    /// The guest owns its pages. What it offers to the host stays mapped where it is.
    Pkvm,
    /// The guest owns its pages. The upper half of its address space is the alias of the lower one for what it offers to the
    /// host: a page is mapped in one of the two only.
    Realm,
}

/// How many locks the blocks of a realm share.
pub(crate) const BLOCK_LOCKS: usize = 16;

/// The stage 2 of a guest, the pages for its tables, and how much it maps.
///
/// Behind a lock of its own, which comes before those of the regions of [`Memory`](crate::Memory), and may be held longer. Those who
/// make no tables and give none back hold it together; if they move pages of a realm from one half of its addresses to the other, or
/// look at such, they hold the locks of the blocks, too. Nobody else may break the mappings of its tables in the EL2 stage 1: a page
/// that was kept is mapped by itself or in a block of pages that were kept for the same guest at once, and those for tables are only
/// given back under this lock.
pub struct GuestMemory {
    slot: u8,
    kind: GuestKind,
    tree: Tree,
    /// The first address behind those of frames.
    end: u64,
    /// The bit of addresses in [`View::Shared`]; 0 if that is the only view.
    alias: u64,
    inner: FairRwLock<Guest>,
    /// For a realm, what guards the descriptors of the pages in each block of 2 MiB: see [`block_lock`]. Who holds one of these holds
    /// the above, too, together with others.
    blocks: [TicketMutex<()>; BLOCK_LOCKS],
}

/// A block whose lock is held, and others that share it.
pub(crate) type Block<'g, 'm, M> = Held<'m, TicketMutexGuard<'g, ()>, M>;

/// Several of them. It is large, and filled where it is.
pub(crate) type Blocks<'g, 'm, M> = ArrayVec<Block<'g, 'm, M>, BLOCK_LOCKS>;

pub(crate) struct Guest {
    pub(crate) tables: PageTable<Stage2>,
    pub(crate) spare: Spare,
    /// How many pages are mapped.
    pub(crate) pages: u64,
    /// Whether the guest never runs again.
    pub(crate) dying: bool,
}

/// Which half of a realm's address space; other guests have only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    Private,
    Shared,
}

impl GuestMemory {
    /// Returns the guest in `slot`, 0 to 254, with empty root tables at `root`.
    pub(crate) fn new(slot: u8, kind: GuestKind, geometry: Geometry, root: PhysAddr) -> Self {
        // The host has VMID 0.
        let tables = PageTable::of_guest(root, geometry, Vmid::new(slot.wrapping_add(1)));
        let tree = Tree { vttbr: tables.vttbr(), geometry };
        let inner = FairRwLock::new(Guest { tables, spare: Spare::default(), pages: 0, dying: false });
        let (end, alias) = match kind {
            GuestKind::Realm => (geometry.end() >> 1, geometry.end() >> 1),
            GuestKind::Ordinary | GuestKind::Pkvm => (geometry.end(), 0),
        };
        let blocks = array::from_fn(|_| TicketMutex::new(()));
        Self { slot, kind, tree, end, alias, inner, blocks }
    }

    /// Returns the tables as they are at first and in the end.
    pub(crate) const fn empty_tables(&self) -> PageTable<Stage2> {
        PageTable::of_guest(self.tree.vttbr.root, self.tree.geometry, self.tree.vttbr.vmid)
    }

    /// Tells a trace that the root of the guest's stage 2 is about to be given back, and nothing uses it any more.
    pub fn give_up_root<M: Machine>(&self, machine: &M) {
        self.empty_tables().give_up(machine);
    }

    /// Returns the slot, which is what entries of the ownership table name the guest by. The VMID is one more.
    #[must_use]
    pub const fn slot(&self) -> u8 {
        self.slot
    }

    /// Returns what kind of guest it is.
    #[must_use]
    pub const fn kind(&self) -> GuestKind {
        self.kind
    }

    /// Returns root and VMID of the guest's stage 2.
    #[must_use]
    pub const fn vttbr(&self) -> Vttbr {
        self.tree.vttbr
    }

    /// Returns the guest's stage 2 as a CPU has to know it.
    #[must_use]
    pub const fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Returns the first guest address behind those of frames: for a realm, where the alias begins.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.end
    }

    /// Says that the guest never runs again. Only now, and from now on, its pages can be reclaimed.
    ///
    /// The caller sees to it that none of its vCPUs is running or will be.
    pub fn kill(&self) {
        self.inner.write().dying = true;
    }

    /// Returns whether the guest has no pages, apart from those for its tables.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.inner.read().pages == 0
    }

    /// Returns how many pages for tables it was given and has not returned.
    #[must_use]
    pub fn table_pages(&self) -> u64 {
        let guest = self.inner.read();
        u64::try_from(guest.spare.available.saturating_add(guest.spare.in_use)).unwrap_or(u64::MAX)
    }

    /// Takes the lock alone, and with it those of all blocks.
    pub(crate) fn lock<M: Machine>(&self, machine: &M) -> impl DerefMut<Target = Guest> {
        let others = if self.kind == GuestKind::Realm { BLOCK_LOCKS } else { 0 };
        Held::new(self.inner.write(), machine, self.tree.vttbr.root, u64::try_from(others).unwrap_or_default())
    }

    /// Takes the lock together with others. No table is made or given back, but a realm's pages may be moved where
    /// [`GuestMemory::lock_blocks`] does not keep others from it. What becomes of pages is up to the locks of regions.
    #[inline]
    pub(crate) fn lock_shared(&self) -> impl Deref<Target = Guest> {
        self.inner.read()
    }

    /// Takes the lock of the block that `frame`, of a realm, lies in. The lock of the guest is held.
    pub(crate) fn lock_block<'m, M: Machine>(&self, machine: &'m M, frame: Ipa) -> Option<Block<'_, 'm, M>> {
        self.take_block_lock(machine, block_lock(block_number(frame.raw())))
    }

    /// Takes the locks of the blocks that a realm's `frames` lie in, into `held`, which is empty; other guests' pages stay where they
    /// are. The lock of the guest is held.
    pub(crate) fn lock_blocks<'g, 'm, M: Machine>(
        &'g self,
        machine: &'m M,
        frames: IpaRange,
        held: &mut Blocks<'g, 'm, M>,
    ) {
        if self.kind != GuestKind::Realm {
            return;
        }
        // Of so many blocks in a row, those on one side of where a GiB ends have all of the locks.
        let blocks = block_number(frames.base().raw())..=block_number(frames.end().wrapping_sub(1));
        let needed = blocks.take(2 * BLOCK_LOCKS).fold(Mask::NONE, |mask, block| mask.with(block_lock(block)));
        // In ascending order, as everybody does.
        for block in needed.indices(BLOCK_LOCKS).filter_map(|index| self.take_block_lock(machine, index)) {
            let pushed = held.try_push(block);
            debug_assert!(pushed.is_ok(), "there is room for all");
        }
    }

    fn take_block_lock<'m, M: Machine>(&self, machine: &'m M, index: usize) -> Option<Block<'_, 'm, M>> {
        Some(Held::new(self.blocks.get(index)?.lock(), machine, self.name_of_block_lock(index), 0))
    }

    /// Tells a trace which lock guards what translates the block that `frames` lie in, in both halves of a realm.
    pub(crate) fn announce_block<M: Machine>(&self, machine: &M, frames: IpaRange) {
        let lock = self.name_of_block_lock(block_lock(block_number(frames.base().raw())));
        for view in [View::Private, View::Shared] {
            let base = self.address_in(view, frames.base().align_down(BLOCK_SIZE));
            let base = PhysAddr::from_bits_truncating(base.raw());
            machine.hint(Hint::RegionLock { lock, base, size: BLOCK_SIZE });
        }
    }

    /// Returns what a trace calls a lock of blocks. That of the guest is called as the root.
    fn name_of_block_lock(&self, index: usize) -> PhysAddr {
        let number = u64::try_from(index).unwrap_or_default();
        PhysAddr::from_bits_truncating(self.tree.vttbr.root.raw().wrapping_add(number).wrapping_add(1))
    }

    /// Returns where `frames` are mapped in `view`.
    pub(crate) fn in_view(&self, view: View, frames: IpaRange) -> IpaRange {
        IpaRange::new(self.address_in(view, frames.base()).raw(), frames.pages()).unwrap_or(frames)
    }

    /// Returns where `frame` is mapped in `view`.
    #[inline]
    pub(crate) fn address_in(&self, view: View, frame: Ipa) -> Ipa {
        let alias = if view == View::Shared { self.alias } else { 0 };
        // Frames lie below the alias.
        Ipa::from_bits_truncating(frame.raw() | alias)
    }

    /// Returns the other view, if there is one.
    pub(crate) const fn other(&self, view: View) -> Option<View> {
        match (self.kind, view) {
            (GuestKind::Realm, View::Private) => Some(View::Shared),
            (GuestKind::Realm, View::Shared) => Some(View::Private),
            _ => None,
        }
    }

    /// Returns the frame that `ipa`, in either view, names.
    pub(crate) fn frame(&self, ipa: Ipa) -> Option<Ipa> {
        let frame = Ipa::from_bits_truncating(ipa.raw() & self.end().wrapping_sub(1));
        (ipa.raw() < self.tree.geometry.end()).then_some(frame.page())
    }
}

/// Pages for tables that wait: a list through the first entries of the pages themselves, because the hypervisor has no memory
/// of its own that grows with what a host donates.
#[derive(Debug, Default)]
pub(crate) struct Spare {
    first: Option<PhysAddr>,
    pub(crate) available: usize,
    pub(crate) in_use: usize,
}

impl Spare {
    /// Adds a page that is mapped writable in the EL2 stage 1, other than the one at address 0.
    pub(crate) fn push<M: Machine>(&mut self, machine: &M, page: PhysAddr) {
        // Bit 0 is clear, so for a walker that still gets here this is an invalid descriptor.
        machine.write_link(page, self.first.map_or(0, PhysAddr::raw));
        self.first = Some(page);
        self.available = self.available.saturating_add(1);
    }

    /// Returns the page that [`Spare::pop`] would.
    pub(crate) const fn peek(&self) -> Option<PhysAddr> {
        self.first
    }

    pub(crate) fn pop<M: Machine>(&mut self, machine: &M) -> Option<PhysAddr> {
        let page = self.first?;
        self.first = PhysAddr::new(machine.read(page, 0)).filter(|next| next.raw() != 0);
        self.available = self.available.saturating_sub(1);
        Some(page)
    }

    /// Returns the list as a pool.
    pub(crate) const fn pool<'a, M>(&'a mut self, machine: &'a M) -> SparePool<'a, M> {
        SparePool { spare: self, machine }
    }
}

pub(crate) struct SparePool<'a, M> {
    spare: &'a mut Spare,
    machine: &'a M,
}

impl<M: Machine> TablePool for SparePool<'_, M> {
    fn allocate(&mut self) -> Option<PhysAddr> {
        let table = self.spare.pop(self.machine)?;
        self.spare.in_use = self.spare.in_use.saturating_add(1);
        Some(table)
    }

    fn free(&mut self, table: PhysAddr) {
        self.spare.push(self.machine, table);
        self.spare.in_use = self.spare.in_use.saturating_sub(1);
    }

    fn available(&self) -> usize {
        self.spare.available
    }

    fn in_use(&self) -> usize {
        self.spare.in_use
    }
}

/// Returns which of the locks a block has. Neither neighbours nor blocks at the same place of GiB that are neighbours have the same.
pub(crate) fn block_lock(block: u64) -> usize {
    let gib = block / TABLE_ENTRIES;
    usize::try_from(block.wrapping_add(gib)).unwrap_or_default() % BLOCK_LOCKS
}

/// Returns the first `pages` pages of `range`, if there are so many.
pub(crate) fn first_pages(range: IpaRange, pages: u64) -> Option<IpaRange> {
    IpaRange::new(range.base().raw(), pages).ok().filter(|first| range.covers(first))
}

/// Returns the number of the block at an address.
const fn block_number(addr: u64) -> u64 {
    addr / BLOCK_SIZE
}

/// Returns the number of the frame at `ipa`; that of the next one if `ipa` lies in between.
pub(crate) const fn frame_number(ipa: Ipa) -> u64 {
    ipa.raw() / PAGE_SIZE
}
