//! Whether what is derived from the ownership table agrees with it: for tests and checking builds.

use ravelin_memory::{BLOCK_SIZE, IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_pgtable::{El2Usage, Machine, Mapping, Stage2Usage, TablePool};

use crate::{
    counts::RegionCounts,
    entry::{Entry, State},
    guest::{GuestKind, GuestMemory},
    locked::{Locked, Mask},
    memory::Memory,
    region::Region,
    table::OwnershipTable,
};

/// Something that must never be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Inconsistency {
    /// Stage 2 maps a page that the host may not access, or not where or not as it should.
    #[error("host stage 2 maps {0} against its ownership")]
    Stage2(PhysAddr),
    /// EL2 does not map a page that it was given or has pinned.
    #[error("EL2 does not map {0}")]
    El2Lacks(PhysAddr),
    /// EL2 maps a page that it does not own and has not pinned.
    #[error("EL2 maps {0} against its ownership")]
    El2Maps(PhysAddr),
    /// The block entry notes a wrong number of pages.
    #[error("wrong number of pages noted for the block at {0}")]
    Block(PhysAddr),
    /// A guest's stage 2 maps a page that is not the guest's, or not where or not as it should.
    #[error("guest stage 2 maps {0} against its ownership")]
    Guest(PhysAddr),
    /// A guest's stage 2 does not map as many pages as are the guest's, or not as many as are counted.
    #[error("guest stage 2 lacks pages")]
    GuestLacks,
    /// The counts of pages per state are wrong.
    #[error("wrong counts of pages")]
    Counts,
    /// The tables in use are not those of the page tables.
    #[error("wrong number of translation tables")]
    Tables,
}

impl<P: TablePool> Memory<'_, P> {
    /// Checks the host's stage 2, the EL2 stage 1 and the counts against the ownership table. Its time grows with RAM.
    ///
    /// # Errors
    ///
    /// The first inconsistency.
    pub fn check<M: Machine>(&self, machine: &M) -> Result<(), Inconsistency> {
        let locked = self.lock(machine, Mask::ALL);
        locked.check_counts()?;
        locked.check_stage2(machine)?;
        locked.regions().try_for_each(|region| region.check_el2(machine))
    }

    /// Checks the stage 2 of a guest against the ownership table. Its time grows with RAM.
    ///
    /// # Errors
    ///
    /// The first inconsistency.
    pub fn check_guest<M: Machine>(&self, machine: &M, guest: &GuestMemory) -> Result<(), Inconsistency> {
        let tables = guest.lock(machine);
        let locked = self.lock(machine, Mask::ALL);
        if tables.tables.tables() != tables.spare.in_use {
            return Err(Inconsistency::Tables);
        }
        let (mut result, mut mapped) = (Ok(()), 0_u64);
        tables.tables.for_each_leaf(machine, |range, mapping| {
            mapped = mapped.wrapping_add(range.pages());
            result = result.and_then(|()| locked.check_leaf(guest, range, mapping));
        });
        result?;
        if mapped == tables.pages
            && mapped == locked.regions().map(|region| region.table.count_guest(guest.slot())).sum::<u64>()
        {
            Ok(())
        } else {
            Err(Inconsistency::GuestLacks)
        }
    }
}

impl<P: TablePool, M: Machine> Locked<'_, '_, P, M> {
    fn check_counts(&self) -> Result<(), Inconsistency> {
        let mut in_use = 0_usize;
        for Region { table, host, el2, counts, .. } in self.regions() {
            let mut counted = RegionCounts::default();
            table.count_pages(&mut counted);
            if !counted.same_pages(counts) {
                return Err(Inconsistency::Counts);
            }
            for (block, owned) in table.blocks() {
                let count = || block.iter().filter(|&page| table.is_host_owned(page)).count();
                if owned.is_some_and(|owned| u64::try_from(count()) != Ok(owned)) {
                    return Err(Inconsistency::Block(block.base()));
                }
            }
            in_use = in_use.saturating_add(host.tables()).saturating_add(el2.tables());
        }
        if in_use > self.tables.in_use() { Err(Inconsistency::Tables) } else { Ok(()) }
    }

    fn check_stage2(&self, machine: &M) -> Result<(), Inconsistency> {
        let mut result = Ok(());
        let Some(whole) = self.whole() else { return result };
        whole.host.for_each_leaf(machine, |range, mapping| {
            let pages = PhysRange::new(range.base().raw(), range.pages());
            let bad = match (pages, mapping) {
                (Ok(pages), Some(mapping)) if mapping.to == pages.base() => {
                    let refused = |page: &PhysAddr| {
                        self.of(*page).and_then(|region| region.table.host_access(*page)) != Some(mapping.usage)
                    };
                    // A block lies in one region.
                    let region = self.of(pages.base()).filter(|_| pages.size() >= BLOCK_SIZE);
                    let whole = region.is_some_and(|region| region.table.is_uniform_for_host(pages, mapping.usage));
                    if whole { None } else { pages.iter().find(refused) }
                }
                _ => Some(range.base().identity_pa()),
            };
            if let (Some(page), Ok(())) = (bad, result) {
                result = Err(Inconsistency::Stage2(page));
            }
        });
        result
    }

    fn check_leaf(
        &self,
        guest: &GuestMemory,
        range: IpaRange,
        mapping: Option<Mapping<Stage2Usage>>,
    ) -> Result<(), Inconsistency> {
        let Some(Mapping { to, usage: Stage2Usage::Memory }) = mapping else {
            return Err(Inconsistency::Guest(range.base().identity_pa()));
        };
        let shared = range.base().raw() >= guest.end();
        let allowed = |state| match guest.kind() {
            GuestKind::Ordinary => state == State::HOST_LENT,
            GuestKind::Pkvm => state != State::HOST_LENT,
            GuestKind::Realm => {
                state == if shared { State::GUEST_OFFERED } else { State::GUEST_OWNED }
                    || shared && state == State::GUEST_CLAIMED
            }
        };
        let frame = range.base().page_number() & (guest.end() / PAGE_SIZE).wrapping_sub(1);
        for (index, page) in (0..).zip(PhysRange::new(to.raw(), range.pages()).into_iter().flat_map(PhysRange::iter)) {
            let owner = self.entry(page).filter(|entry| allowed(entry.state())).and_then(Entry::guest);
            if owner != Some((guest.slot(), frame.wrapping_add(index))) {
                return Err(Inconsistency::Guest(page));
            }
        }
        Ok(())
    }
}

impl Region<'_> {
    fn check_el2<M: Machine>(&self, machine: &M) -> Result<(), Inconsistency> {
        for (block, _) in self.table.blocks() {
            let mut addr = block.base();
            while addr.raw() < block.end() {
                let walk = self.el2.lookup(machine, addr.identity_va());
                let entry = self.table.entry(addr);
                let expected = entry.is_some_and(Entry::in_el2);
                match walk.mapping() {
                    Some(mapping) if expected && mapping == (Mapping { to: addr, usage: El2Usage::Data }) => {}
                    // What the image is made of.
                    Some(_) if entry.is_some_and(|entry| entry.state() == State::HYP_OWNED) => {}
                    Some(_) => return Err(Inconsistency::El2Maps(addr)),
                    None if expected => return Err(Inconsistency::El2Lacks(addr)),
                    None => {}
                }
                // One step for all of a uniform block that is mapped as one or not at all.
                let step = if self.table.uniform_entry(addr).is_some() && walk.level.size() >= BLOCK_SIZE {
                    BLOCK_SIZE
                } else {
                    PAGE_SIZE
                };
                let Some(next) = addr.checked_add(step) else { break };
                addr = next;
            }
        }
        Ok(())
    }
}

impl OwnershipTable<'_> {
    /// Adds up the pages per state. In time that grows with the number of blocks and of pages in split ones.
    pub(crate) fn count_pages(&self, counts: &mut RegionCounts) {
        for (block, split) in self.blocks() {
            match (split, self.entry(block.base())) {
                (None, Some(entry)) => counts.moved(State::NOBODY, entry.state(), block.pages()),
                _ => {
                    for entry in block.iter().filter_map(|page| self.entry(page)) {
                        counts.moved(State::NOBODY, entry.state(), 1);
                    }
                }
            }
        }
    }

    /// Counts the pages that the guest in `slot` should have a mapping of.
    fn count_guest(&self, slot: u8) -> u64 {
        let has = |page| self.entry(page).and_then(Entry::guest).is_some_and(|(owner, _)| owner == slot);
        let pages = self.blocks().map(|(block, split)| match split {
            None if has(block.base()) => block.pages(),
            None => 0,
            Some(_) => block.iter().filter(|&page| has(page)).map(|_| 1).sum(),
        });
        pages.fold(0, u64::wrapping_add)
    }

    fn is_host_owned(&self, page: PhysAddr) -> bool {
        self.entry(page) == Some(Entry::new(State::HOST_OWNED, 0))
    }
}
