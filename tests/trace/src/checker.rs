//! Follows a trace.
//!
//! For each descriptor that was valid and is so no more, or can be reached no more, the checker remembers a *stale* entry
//! until the sequence that the architecture asks for (Arm ARM DDI 0487, D8.17) is complete:
//!
//! ```text
//!            DSB            TLBI by IPA         DSB        TLBI of stage 1       DSB
//!            of the CPU     under the VMID      same CPU   under the VMID        same CPU
//!   Written ---> Published ---> Invalidating ---> Stage2Gone ---> Finishing ---> clean
//!                    |                                               ^
//!                    +-----------------------------------------------+
//!                     TLBI of EL2; TLBI of both stages under the VMID
//! ```
//!
//! A TLBI for any address that a descriptor covers removes all that was cached of it, and one that is not for the last level
//! only the table descriptors on the way, too. What only this CPU does to its own TLB changes nothing here, because all CPUs
//! may have cached what is stale. What CPUs do meanwhile that hold other locks does not count for it either. A tree is followed
//! from the moment when a CPU has its root and its shape in its registers; what was in its tables before that, no walker has
//! seen. VTTBR_EL2 alone, written for TLB maintenance while VTCR_EL2 is another tree's, is no such moment: nothing is translated
//! with it.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec,
    vec::Vec,
};
use core::mem;

use crate::{
    Barrier, Dsb, Entry, Fault, Hint, MemOrder, Record, StaleEntry, Sysreg, TlbiOp, Violation,
    geometry::{self, Geometry, Kind, LAST, PAGE},
};

/// Bits of VTTBR_EL2 and TTBR0_EL2 that are the address of the root.
const ROOT: u64 = (1 << 48) - PAGE;
const SCTLR_M: u64 = 1;

/// What translations are tagged with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Regime {
    El2,
    Stage2(u16),
}

/// Names a stale entry. Entries of one regime and address range lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    regime: Regime,
    start: u64,
    level: u8,
}

/// How far the maintenance for a stale entry is. A number is the CPU whose DSB is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Written(u8),
    Published,
    Invalidating(u8),
    Stage2Gone,
    Finishing(u8),
}

#[derive(Debug)]
struct Stale {
    phase: Phase,
    /// The CPU that has made it stale.
    by: u8,
    root: u64,
    /// The address of the descriptor.
    at: u64,
    descriptor: u64,
    since: u64,
}

/// Where in a tree a table is.
#[derive(Clone, Copy, Debug)]
struct Place {
    regime: Regime,
    root: u64,
    level: u8,
    /// The input address of its first descriptor.
    base: u64,
}

impl Place {
    /// The input address of the descriptor `index`.
    fn start(self, index: u64) -> u64 {
        self.base.wrapping_add(index.wrapping_mul(geometry::size(self.level)))
    }

    /// The place of the table that the descriptor `index` links.
    fn below(self, index: u64) -> Self {
        Self { level: self.level.saturating_add(1), base: self.start(index), ..self }
    }

    fn key(self, index: u64) -> Key {
        Key { regime: self.regime, start: self.start(index), level: self.level }
    }
}

#[derive(Debug)]
struct Table {
    /// All 512.
    entries: Vec<u64>,
    /// The root that a hint has named.
    owner: Option<u64>,
    /// Where walkers find it.
    place: Option<Place>,
    /// How many stale descriptors lead to it.
    cached: usize,
    /// CPUs that have written to it and not made that visible.
    unpublished: BTreeSet<u8>,
}

impl Table {
    fn valid(&self) -> impl Iterator<Item = (u64, u64)> {
        (0..).zip(self.entries.iter().copied()).filter(|(_, descriptor)| descriptor & 1 != 0)
    }
}

#[derive(Debug, Default)]
struct Root {
    lock: Option<u64>,
    tree: Option<(Regime, Geometry)>,
    /// What is stale and was in this tree.
    outstanding: BTreeSet<Key>,
}

/// What has become of a descriptor.
#[derive(Clone, Copy, Debug)]
struct Change {
    regime: Regime,
    root: u64,
    /// The input address.
    start: u64,
    level: u8,
    /// The address of the descriptor.
    at: u64,
}

#[derive(Debug, Default)]
struct Cpu {
    vttbr: Option<u64>,
    /// Whether an ISB came after VTTBR_EL2.
    synchronised: bool,
    vtcr: u64,
    /// Whether VTCR_EL2 was written after VTTBR_EL2.
    vtcr_is_new: bool,
    ttbr0: u64,
    tcr: u64,
    mmu: bool,
    /// What waits for a DSB of this CPU, by phase. What has gone on by other ways is still in there.
    written: Vec<Key>,
    invalidating: Vec<Key>,
    finishing: Vec<Key>,
    /// Tables with writes that wait for a DSB.
    unpublished: Vec<u64>,
    /// Descriptors that have become valid and wait for a DSB.
    made: Vec<Change>,
    /// Changes of EL2's own translations, past their DSB, that wait for an ISB.
    unsynchronised: Vec<Change>,
    /// What TLB maintenance was for since a lock was taken.
    invalidated: BTreeSet<Regime>,
}

/// Follows a trace from its first record on.
#[derive(Debug, Default)]
pub struct Checker {
    next: Option<u64>,
    id: u64,
    tables: BTreeMap<u64, Table>,
    roots: BTreeMap<u64, Root>,
    /// The root of each regime that is in use.
    live: BTreeMap<Regime, u64>,
    /// Roots by their lock.
    guarded: BTreeMap<u64, BTreeSet<u64>>,
    /// Where another lock than that of the root guards the tables: by that and the first address, the first behind, and the lock.
    regions: BTreeMap<(u64, u64), (u64, u64)>,
    /// The locks of regions. That of their roots is what is left without the number of the region.
    of_regions: BTreeSet<u64>,
    /// Who has which lock.
    held: BTreeMap<u64, u8>,
    stale: BTreeMap<Key, Stale>,
    /// What waits for an invalidation of stage 1, by VMID.
    stage2_gone: BTreeMap<u16, Vec<Key>>,
    cpus: BTreeMap<u8, Cpu>,
}

impl Checker {
    /// Returns a checker that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next record. After a violation it goes on as well as it can.
    ///
    /// # Errors
    ///
    /// The first rule that the record breaks.
    pub fn record(&mut self, entry: &Entry) -> Result<(), Violation> {
        let expected = self.next.replace(entry.id.wrapping_add(1));
        self.id = entry.id;
        if expected.is_some_and(|expected| expected != entry.id) {
            return Err(self.violation(Fault::Order, expected.unwrap_or_default()));
        }
        let tid = entry.tid;
        match entry.record {
            Record::MemInit { address, size } => pages(address, size).try_for_each(|page| self.init(tid, page)),
            Record::MemFree { address, size } => pages(address, size).try_for_each(|page| self.free(page)),
            Record::Hint { kind, location, value } => self.hint(kind, location, value),
            Record::Lock(lock) => self.lock(tid, lock),
            Record::Unlock(lock) => self.unlock(tid, lock),
            Record::MemWrite { order, address, value } => self.write(tid, order, address, value),
            Record::Barrier(Barrier::Isb) => {
                let cpu = self.cpu(tid);
                cpu.synchronised = true;
                cpu.unsynchronised.clear();
                Ok(())
            }
            Record::Barrier(Barrier::Dsb(kind)) => {
                self.dsb(tid, kind);
                Ok(())
            }
            Record::Tlbi { op, operand } => self.tlbi(tid, op, operand),
            Record::SysregWrite { register, value } => self.sysreg(tid, register, value),
        }
    }

    fn cpu(&mut self, tid: u8) -> &mut Cpu {
        self.cpus.entry(tid).or_default()
    }

    fn violation(&self, fault: Fault, address: u64) -> Violation {
        Violation { id: self.id, fault, address, stale: None }
    }

    fn stale_violation(&self, fault: Fault, key: Key) -> Violation {
        let Some(stale) = self.stale.get(&key) else { return self.violation(fault, key.start) };
        let vmid = match key.regime {
            Regime::El2 => None,
            Regime::Stage2(vmid) => Some(vmid),
        };
        let Stale { at, descriptor, since, .. } = *stale;
        let entry = StaleEntry { vmid, start: key.start, level: key.level, descriptor, since };
        Violation { id: self.id, fault, address: at, stale: Some(entry) }
    }

    /// Makes sure that nothing leads to a table.
    fn unused(&self, page: u64, table: &Table) -> Result<(), Violation> {
        if table.place.is_some() {
            Err(self.violation(Fault::Reachable, page))
        } else if table.cached != 0 {
            Err(self.violation(Fault::TableCached, page))
        } else {
            Ok(())
        }
    }

    fn init(&mut self, tid: u8, page: u64) -> Result<(), Violation> {
        if let Some(table) = self.tables.get(&page) {
            self.unused(page, table)?;
        }
        let entries = vec![0; 512];
        let unpublished = BTreeSet::from([tid]);
        self.tables.insert(page, Table { entries, owner: None, place: None, cached: 0, unpublished });
        self.cpu(tid).unpublished.push(page);
        Ok(())
    }

    fn free(&mut self, page: u64) -> Result<(), Violation> {
        let table = self.tables.get(&page).ok_or_else(|| self.violation(Fault::NoTable, page))?;
        self.unused(page, table)?;
        self.tables.remove(&page);
        Ok(())
    }

    fn hint(&mut self, kind: Hint, location: u64, value: u64) -> Result<(), Violation> {
        match kind {
            Hint::SetRootLock => {
                let before = self.roots.entry(location).or_default().lock.replace(value);
                if let Some(before) = before {
                    self.guarded.entry(before).or_default().remove(&location);
                }
                self.guarded.entry(value).or_default().insert(location);
                Ok(())
            }
            Hint::SetRegionLock => {
                let base = page_of(value);
                let size =
                    u32::try_from(value % PAGE).ok().and_then(|shift| 1_u64.checked_shl(shift)).unwrap_or_default();
                self.of_regions.insert(location);
                self.regions.insert((self.group(location), base), (base.wrapping_add(size), location));
                Ok(())
            }
            Hint::SetOwnerRoot => match self.tables.get_mut(&location) {
                Some(table) => {
                    table.owner = (value != 0).then_some(value);
                    Ok(())
                }
                None => Err(self.violation(Fault::NoTable, location)),
            },
            Hint::ReleaseTable => self.release(location),
        }
    }

    /// A root is given up: it is empty, nothing of it is cached, and no CPU has it.
    fn release(&mut self, location: u64) -> Result<(), Violation> {
        let Some(root) = self.roots.get(&location) else { return Err(self.violation(Fault::NoTable, location)) };
        if let Some(&key) = root.outstanding.first() {
            return Err(self.stale_violation(Fault::NotInvalidated, key));
        }
        if self.cpus.values().any(|cpu| cpu.vttbr.is_some_and(|vttbr| vttbr & ROOT == location)) {
            return Err(self.violation(Fault::Reachable, location));
        }
        let (lock, tree) = (root.lock, root.tree);
        if let Some((regime, geometry)) = tree {
            for page in pages(location, geometry.roots.wrapping_mul(PAGE)) {
                let empty = self.tables.get(&page).is_none_or(|table| table.valid().next().is_none());
                if !empty {
                    return Err(self.violation(Fault::Reachable, page));
                }
                if let Some(table) = self.tables.get_mut(&page) {
                    table.place = None;
                }
            }
            self.live.remove(&regime);
        }
        if let Some(lock) = lock {
            let roots = self.guarded.entry(lock).or_default();
            roots.remove(&location);
            if roots.is_empty() {
                self.regions.retain(|&(group, _), _| group != lock);
                self.of_regions.retain(|of_region| page_of(*of_region) != lock);
            }
        }
        self.roots.remove(&location);
        Ok(())
    }

    fn lock(&mut self, tid: u8, lock: u64) -> Result<(), Violation> {
        self.cpu(tid).invalidated.clear();
        match self.held.insert(lock, tid) {
            None => Ok(()),
            Some(_) => Err(self.violation(Fault::Lock, lock)),
        }
    }

    fn unlock(&mut self, tid: u8, lock: u64) -> Result<(), Violation> {
        if self.held.remove(&lock) != Some(tid) {
            return Err(self.violation(Fault::Lock, lock));
        }
        let unseen = self.take_unseen(tid, lock);
        let mut first = None;
        for root in self.guarded.get(&self.group(lock)).cloned().unwrap_or_default() {
            let outstanding = self.roots.get(&root).map(|root| root.outstanding.clone()).unwrap_or_default();
            // Said once, not at each unlock that follows.
            let (ours, others): (BTreeSet<_>, _) =
                outstanding.into_iter().partition(|key| self.lock_of(root, key.start, key.level) == Some(lock));
            first = first.or(ours.first().copied());
            if let Some(root) = self.roots.get_mut(&root) {
                root.outstanding = others;
            }
        }
        let Some(key) = first else { return unseen };
        let invalidated = self.cpus.get(&tid).map(|cpu| &cpu.invalidated);
        let any = |of: &dyn Fn(&Regime) -> bool| invalidated.is_some_and(|all| all.iter().any(of));
        let fault = match self.stale.get(&key).map(|stale| stale.phase) {
            Some(Phase::Invalidating(_) | Phase::Finishing(_)) => Fault::NotFinished,
            Some(Phase::Stage2Gone) => Fault::NotInvalidated,
            _ if any(&|regime| *regime == key.regime) => Fault::TooNarrow,
            _ if key.regime != Regime::El2 && any(&|regime| *regime != Regime::El2) => Fault::OtherVmid,
            _ => Fault::NotInvalidated,
        };
        Err(self.stale_violation(fault, key))
    }

    /// Returns the first change under the lock that a walk of this CPU behind the release may not see: a DSB completes the
    /// change, and for what follows in program order it takes a context synchronisation event, too (Arm ARM DDI 0487, D8.2.6
    /// and D8.17.5). EL1 has one in the ERET that leads to it; EL2 needs an ISB.
    fn take_unseen(&mut self, tid: u8, lock: u64) -> Result<(), Violation> {
        let Some(cpu) = self.cpus.get_mut(&tid) else { return Ok(()) };
        let (made, unsynchronised) = (mem::take(&mut cpu.made), mem::take(&mut cpu.unsynchronised));
        let take = |changes: Vec<Change>| {
            let is_ours = |change: &Change| self.lock_of(change.root, change.start, change.level) == Some(lock);
            let (ours, others): (Vec<_>, _) = changes.into_iter().partition(is_ours);
            (ours.first().map(|change| change.at), others)
        };
        let ((made, others_made), (unsynchronised, others_unsynchronised)) = (take(made), take(unsynchronised));
        let cpu = self.cpu(tid);
        (cpu.made, cpu.unsynchronised) = (others_made, others_unsynchronised);
        match (made, unsynchronised) {
            (Some(at), _) => Err(self.violation(Fault::NotVisible, at)),
            (None, Some(at)) => Err(self.violation(Fault::NoIsb, at)),
            (None, None) => Ok(()),
        }
    }

    fn write(&mut self, tid: u8, order: MemOrder, address: u64, value: u64) -> Result<(), Violation> {
        let (page, index) = (page_of(address), address % PAGE / 8);
        let no_table = self.violation(Fault::NoTable, address);
        let table = self.tables.get_mut(&page).ok_or(no_table)?;
        let slot = usize::try_from(index).ok().and_then(|index| table.entries.get_mut(index)).ok_or(no_table)?;
        let old = mem::replace(slot, value);
        let owner = table.owner;
        let Some(place) = table.place else {
            let cached = table.cached != 0 && value & 1 != 0 && value != old;
            if table.unpublished.insert(tid) {
                self.cpu(tid).unpublished.push(page);
            }
            self.locked_for(tid, owner, address)?;
            // Walkers that have cached the way to the table still get here.
            return if cached { Err(self.violation(Fault::TableCached, address)) } else { Ok(()) };
        };
        let locked = self.locked(tid, self.lock_of(place.root, place.start(index), place.level), address);
        let is_valid = |descriptor| geometry::kind(descriptor, place.level) != Kind::Invalid;
        let done = match (is_valid(old), is_valid(value)) {
            (false, false) => Ok(()),
            (true, true) if geometry::same_for_hardware(old, value, place.level) => Ok(()),
            (true, true) => {
                self.make_stale(tid, place, index, address, old);
                Err(self.violation(Fault::NoBreak, address))
            }
            (true, false) => {
                self.make_stale(tid, place, index, address, old);
                Ok(())
            }
            (false, true) => {
                let start = place.start(index);
                let change = Change { regime: place.regime, root: place.root, start, level: place.level, at: address };
                self.cpu(tid).made.push(change);
                self.make_valid(tid, order, place, index, value)
            }
        };
        locked.and(done)
    }

    /// Returns the lock that guards the descriptor of this level for the input address `start` under a root. No region has those that
    /// translate more than lies in it.
    fn lock_of(&self, root: u64, start: u64, level: u8) -> Option<u64> {
        let lock = self.roots.get(&root)?.lock?;
        let region = self.regions.range((lock, 0)..=(lock, start)).next_back().map(|(_, region)| *region);
        match region {
            Some((end, of_region)) if start.saturating_add(geometry::size(level)) <= end => Some(of_region),
            _ => Some(lock),
        }
    }

    /// Returns the lock that guards all of what this one, of a region, guards a part of; other locks are groups of their own.
    fn group(&self, lock: u64) -> u64 {
        if self.of_regions.contains(&lock) { page_of(lock) } else { lock }
    }

    /// Makes sure that the CPU has `lock`, if there is one.
    fn locked(&self, tid: u8, lock: Option<u64>, address: u64) -> Result<(), Violation> {
        match lock {
            Some(lock) if self.held.get(&lock) != Some(&tid) => Err(self.violation(Fault::Unlocked, address)),
            _ => Ok(()),
        }
    }

    /// As [`Checker::locked`] for a table that is not linked yet: one of the locks of its root.
    fn locked_for(&self, tid: u8, root: Option<u64>, address: u64) -> Result<(), Violation> {
        let lock = root.and_then(|root| self.roots.get(&root)?.lock);
        let group = lock.map(|lock| self.group(lock));
        let holds = self.held.iter().any(|(&held, &by)| by == tid && Some(self.group(held)) == group);
        if holds { Ok(()) } else { self.locked(tid, lock, address) }
    }

    /// The descriptor, and all that it leads to, can be reached no more, and may be cached.
    fn make_stale(&mut self, tid: u8, place: Place, index: u64, at: u64, descriptor: u64) {
        let key = place.key(index);
        let stale = Stale { phase: Phase::Written(tid), by: tid, root: place.root, at, descriptor, since: self.id };
        self.stale.insert(key, stale);
        self.cpu(tid).written.push(key);
        self.roots.entry(place.root).or_default().outstanding.insert(key);
        let Kind::Table(next) = geometry::kind(descriptor, place.level) else { return };
        let Some(table) = self.tables.get_mut(&next) else { return };
        table.cached = table.cached.saturating_add(1);
        table.place = None;
        let below = place.below(index);
        let valid: Vec<_> = table.valid().collect();
        for (index, descriptor) in valid {
            self.make_stale(tid, below, index, next.wrapping_add(index.wrapping_mul(8)), descriptor);
        }
    }

    /// A descriptor of a table in use becomes valid.
    fn make_valid(
        &mut self,
        tid: u8,
        order: MemOrder,
        place: Place,
        index: u64,
        descriptor: u64,
    ) -> Result<(), Violation> {
        let key = place.key(index);
        let end = Key { start: key.start.wrapping_add(geometry::size(key.level)), level: 0, ..key };
        let overlapping = (0..key.level)
            .map(|level| Key { start: key.start & !geometry::size(level).wrapping_sub(1), level, ..key })
            .find(|above| self.stale.contains_key(above))
            .or_else(|| self.stale.range(Key { level: 0, ..key }..end).next().map(|(key, _)| *key));
        let linked = match geometry::kind(descriptor, place.level) {
            Kind::Table(next) => self.link(tid, order, next, place.below(index)),
            Kind::Leaf | Kind::Invalid => Ok(()),
        };
        match overlapping {
            Some(stale) => Err(self.stale_violation(Fault::StillCached, stale)),
            None => linked,
        }
    }

    /// Gives the table at `next`, and all that it leads to, its place.
    fn link(&mut self, tid: u8, order: MemOrder, next: u64, place: Place) -> Result<(), Violation> {
        let Some(table) = self.tables.get(&next) else { return Err(self.violation(Fault::NoTable, next)) };
        self.unused(next, table)?;
        if table.owner.is_some_and(|owner| owner != place.root) {
            return Err(self.violation(Fault::ForeignRoot, next));
        }
        // A store-release comes after the CPU's own stores.
        let visible = |cpu: &u8| order == MemOrder::Release && *cpu == tid;
        if !table.unpublished.iter().all(visible) {
            return Err(self.violation(Fault::ContentsNotPublished, next));
        }
        let links: Vec<_> = match place.level {
            LAST => Vec::new(),
            level => table
                .valid()
                .filter_map(|(index, descriptor)| match geometry::kind(descriptor, level) {
                    Kind::Table(next) => Some((index, next)),
                    Kind::Leaf | Kind::Invalid => None,
                })
                .collect(),
        };
        if let Some(table) = self.tables.get_mut(&next) {
            table.place = Some(place);
            table.unpublished.clear();
        }
        links.into_iter().try_for_each(|(index, next)| self.link(tid, order, next, place.below(index)))
    }

    fn dsb(&mut self, tid: u8, kind: Dsb) {
        if kind == Dsb::Nsh {
            return;
        }
        let cpu = self.cpus.entry(tid).or_default();
        let (written, unpublished) = (mem::take(&mut cpu.written), mem::take(&mut cpu.unpublished));
        cpu.unsynchronised.extend(cpu.made.drain(..).filter(|change| change.regime == Regime::El2));
        // A DSB for stores only does not wait for TLB maintenance.
        let (invalidating, finishing) = match kind {
            Dsb::Ishst => (Vec::new(), Vec::new()),
            _ => (mem::take(&mut cpu.invalidating), mem::take(&mut cpu.finishing)),
        };
        for page in unpublished {
            if let Some(table) = self.tables.get_mut(&page) {
                table.unpublished.remove(&tid);
            }
        }
        for key in written {
            self.proceed(key, Phase::Written(tid), Phase::Published);
        }
        for key in invalidating {
            if self.proceed(key, Phase::Invalidating(tid), Phase::Stage2Gone)
                && let Regime::Stage2(vmid) = key.regime
            {
                self.stage2_gone.entry(vmid).or_default().push(key);
            }
        }
        for key in finishing {
            let Some(stale) = self.stale.get(&key).filter(|stale| stale.phase == Phase::Finishing(tid)) else {
                continue;
            };
            if key.regime == Regime::El2 {
                let change =
                    Change { regime: key.regime, root: stale.root, start: key.start, level: key.level, at: stale.at };
                self.cpu(tid).unsynchronised.push(change);
            }
            self.clean(key);
        }
    }

    /// Takes a stale entry from one phase to the next, if it is in that phase.
    fn proceed(&mut self, key: Key, from: Phase, to: Phase) -> bool {
        match self.stale.get_mut(&key) {
            Some(stale) if stale.phase == from => {
                stale.phase = to;
                true
            }
            _ => false,
        }
    }

    fn clean(&mut self, key: Key) {
        let Some(stale) = self.stale.remove(&key) else { return };
        if let Some(root) = self.roots.get_mut(&stale.root) {
            root.outstanding.remove(&key);
        }
        if let Kind::Table(next) = geometry::kind(stale.descriptor, key.level)
            && let Some(table) = self.tables.get_mut(&next)
        {
            table.cached = table.cached.saturating_sub(1);
        }
    }

    fn tlbi(&mut self, tid: u8, op: TlbiOp, operand: u64) -> Result<(), Violation> {
        let regime = match op {
            TlbiOp::Vae2is | TlbiOp::Alle2is | TlbiOp::Alle2 => Regime::El2,
            _ => {
                let not_synchronised = self.violation(Fault::NotSynchronised, 0);
                let cpu = self.cpu(tid);
                let vttbr = cpu.vttbr.filter(|_| cpu.synchronised).ok_or(not_synchronised)?;
                Regime::Stage2(vmid(vttbr))
            }
        };
        match op {
            // All CPUs may have cached what is stale.
            TlbiOp::Alle2 | TlbiOp::Vmalle1 | TlbiOp::Vmalls12e1 => return Ok(()),
            TlbiOp::Vmalle1is => return self.stage1_of(tid, regime),
            _ => {}
        }
        self.cpu(tid).invalidated.insert(regime);
        if matches!(op, TlbiOp::Vmalls12e1is | TlbiOp::Alle2is) {
            let range = Key { regime, start: 0, level: 0 }..=Key { regime, start: u64::MAX, level: u8::MAX };
            let ours = self.stale.range(range).filter(|(_, stale)| stale.by == tid);
            let keys: Vec<_> = ours.map(|(key, _)| *key).collect();
            return keys.into_iter().map(|key| self.finish(tid, key)).fold(Ok(()), Result::and);
        }
        // Bits 63 to 48 are an address space identifier; EL2 has none here.
        let address = (operand & ((1 << 36) - 1)).wrapping_mul(PAGE);
        let mut result = Ok(());
        for level in (0..=LAST).filter(|level| geometry::is_for(operand, *level)) {
            let key = Key { regime, start: address & !geometry::size(level).wrapping_sub(1), level };
            let Some(stale) = self.stale.get_mut(&key).filter(|stale| stale.by == tid) else { continue };
            if op == TlbiOp::Ipas2le1is && matches!(geometry::kind(stale.descriptor, level), Kind::Table(_)) {
                continue;
            }
            let done = match (stale.phase, regime) {
                (Phase::Published, Regime::Stage2(_)) => {
                    stale.phase = Phase::Invalidating(tid);
                    self.cpu(tid).invalidating.push(key);
                    Ok(())
                }
                (Phase::Published | Phase::Written(_), _) => self.finish(tid, key),
                _ => Ok(()),
            };
            result = result.and(done);
        }
        result
    }

    /// The last TLBI for a stale entry.
    fn finish(&mut self, tid: u8, key: Key) -> Result<(), Violation> {
        let Some(stale) = self.stale.get_mut(&key) else { return Ok(()) };
        let published = !matches!(stale.phase, Phase::Written(_));
        if published {
            stale.phase = Phase::Finishing(tid);
            self.cpu(tid).finishing.push(key);
            Ok(())
        } else {
            Err(self.stale_violation(Fault::NotPublished, key))
        }
    }

    /// Combined translations go once those of stage 2 have gone.
    fn stage1_of(&mut self, tid: u8, regime: Regime) -> Result<(), Violation> {
        let Regime::Stage2(vmid) = regime else { return Ok(()) };
        let is_ours = |key: &Key| self.stale.get(key).is_none_or(|stale| stale.by == tid);
        let (ours, others): (Vec<_>, _) =
            self.stage2_gone.remove(&vmid).unwrap_or_default().into_iter().partition(is_ours);
        self.stage2_gone.insert(vmid, others);
        for key in ours {
            if self.proceed(key, Phase::Stage2Gone, Phase::Finishing(tid)) {
                self.cpu(tid).finishing.push(key);
            }
        }
        let waiting = self.cpu(tid).invalidating.iter().find(|key| key.regime == regime).copied();
        match waiting {
            Some(key) => Err(self.stale_violation(Fault::NotFinished, key)),
            None => Ok(()),
        }
    }

    /// A DSB of the CPU has come after what it has done to stage 2 in the TLBs.
    fn finished(&self, tid: u8) -> Result<(), Violation> {
        let Some(cpu) = self.cpus.get(&tid) else { return Ok(()) };
        let waits = |key: &&Key| {
            let phase = self.stale.get(*key).map(|stale| stale.phase);
            key.regime != Regime::El2
                && (phase == Some(Phase::Invalidating(tid)) || phase == Some(Phase::Finishing(tid)))
        };
        match cpu.invalidating.iter().chain(&cpu.finishing).find(waits) {
            Some(&key) => Err(self.stale_violation(Fault::NotFinished, key)),
            None => Ok(()),
        }
    }

    fn sysreg(&mut self, tid: u8, register: Sysreg, value: u64) -> Result<(), Violation> {
        let in_use = self.violation(Fault::RootInUse, value & ROOT);
        let cpu = self.cpu(tid);
        match register {
            Sysreg::VtcrEl2 => (cpu.vtcr, cpu.vtcr_is_new) = (value, true),
            Sysreg::VttbrEl2 => {
                (cpu.vttbr, cpu.synchronised) = (Some(value), false);
                let geometry = mem::take(&mut cpu.vtcr_is_new).then_some(Geometry::of_vtcr(cpu.vtcr));
                let finished = self.finished(tid);
                let active = match geometry {
                    Some(geometry) => self.activate(tid, Regime::Stage2(vmid(value)), value & ROOT, geometry),
                    None => Ok(()),
                };
                return finished.and(active);
            }
            Sysreg::Ttbr0El2 if cpu.mmu && cpu.ttbr0 != value => return Err(in_use),
            Sysreg::Ttbr0El2 => cpu.ttbr0 = value,
            Sysreg::TcrEl2 => cpu.tcr = value,
            Sysreg::SctlrEl2 => {
                cpu.mmu = value & SCTLR_M != 0;
                if cpu.mmu {
                    let (root, geometry) = (cpu.ttbr0 & ROOT, Geometry::of_tcr(cpu.tcr));
                    self.leave_el2(root)?;
                    return self.activate(tid, Regime::El2, root, geometry);
                }
            }
            Sysreg::MairEl2 | Sysreg::HcrEl2 => {}
        }
        Ok(())
    }

    /// Another root than `next` is EL2's no more, which no CPU uses.
    fn leave_el2(&mut self, next: u64) -> Result<(), Violation> {
        let Some(&root) = self.live.get(&Regime::El2) else { return Ok(()) };
        if root == next {
            return Ok(());
        }
        if self.cpus.values().any(|cpu| cpu.mmu && cpu.ttbr0 & ROOT == root) {
            return Err(self.violation(Fault::RootInUse, root));
        }
        self.live.remove(&Regime::El2);
        // The TLB was emptied while the MMU was off.
        if let Some(root) = self.roots.get_mut(&root) {
            root.tree = None;
            root.outstanding.clear();
        }
        self.stale.retain(|key, _| key.regime != Regime::El2);
        self.displace(root);
        Ok(())
    }

    /// Takes its place from a table and from all below it.
    fn displace(&mut self, page: u64) {
        let Some(table) = self.tables.get_mut(&page) else { return };
        table.cached = 0;
        let Some(place) = table.place.take() else { return };
        let valid: Vec<_> = table.valid().collect();
        for (_, descriptor) in valid {
            if let Kind::Table(next) = geometry::kind(descriptor, place.level) {
                self.displace(next);
            }
        }
    }

    /// A CPU has a root and its shape in its registers.
    fn activate(&mut self, tid: u8, regime: Regime, root: u64, geometry: Option<Geometry>) -> Result<(), Violation> {
        let geometry = geometry.ok_or_else(|| self.violation(Fault::Unsupported, root))?;
        let entry = self.roots.entry(root).or_default();
        if entry.tree == Some((regime, geometry)) {
            return Ok(());
        }
        if entry.tree.is_some() || self.live.contains_key(&regime) {
            return Err(self.violation(Fault::RootInUse, root));
        }
        // Writes without a lock are not seen, nor is what it owes when it is released.
        let guarded = entry.lock.is_some();
        entry.tree = Some((regime, geometry));
        self.live.insert(regime, root);
        let covered = geometry::size(geometry.start).wrapping_mul(512);
        (0_u64..geometry.roots).try_for_each(|number| {
            let base = number.wrapping_mul(covered);
            let place = Place { regime, root, level: geometry.start, base };
            self.link(tid, MemOrder::Plain, root.wrapping_add(number.wrapping_mul(PAGE)), place)
        })?;
        if guarded { Ok(()) } else { Err(self.violation(Fault::NoLock, root)) }
    }
}

/// The page that an address lies in; of the lock of a region, that of its root.
const fn page_of(address: u64) -> u64 {
    address & !PAGE.wrapping_sub(1)
}

/// The pages of a range.
fn pages(address: u64, size: u64) -> impl Iterator<Item = u64> {
    let first = page_of(address);
    (0..size.div_ceil(PAGE)).map(move |number| first.wrapping_add(number.wrapping_mul(PAGE)))
}

fn vmid(vttbr: u64) -> u16 {
    u16::try_from(vttbr >> 48).unwrap_or_default()
}
