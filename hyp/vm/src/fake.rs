//! Memory without tables: who has which page, for tests.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use ravelin_abi::{Status, VmAttributes, VmKind};
use ravelin_memory::{Ipa, IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_ownership::{Batch, Conversion, GuestPage};
use ravelin_pgtable::{Geometry, Tree, Vmid, Vttbr};

use crate::{GuestFailure, ObjectMemory, Refusal, Transitions};

/// The heap.
pub(crate) struct Heap;

impl ObjectMemory for Heap {
    type Box<T: Send + Sync> = Box<T>;
    type Slice<T: Send + Sync> = Box<[T]>;

    fn place<T: Send + Sync>(&self, pages: PhysRange, value: T) -> Box<T> {
        assert!(size_of::<T>() as u64 <= pages.size() && align_of::<T>() <= 4096);
        Box::new(value)
    }

    fn place_slice<T: Send + Sync>(&self, pages: PhysRange, count: usize, make: impl FnMut(usize) -> T) -> Box<[T]> {
        assert!((count * size_of::<T>()) as u64 <= pages.size() && align_of::<T>() <= 4096);
        (0..count).map(make).collect()
    }
}

/// Who has a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Host,
    /// The host's, borrowed so often by the hypervisor.
    Borrowed(u32),
    Hypervisor,
    Tables(usize),
    Guest {
        slot: usize,
        frame: u64,
        state: GuestState,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuestState {
    Private,
    Pinned,
    Offered,
    Claimed,
    Lent,
}

/// The first and the last address of RAM.
const RAM: std::ops::Range<u64> = 0x4000_0000..0x8000_0000;

/// Pages that one call of a guest is for at most.
pub(crate) const AT_ONCE: u64 = 512;

#[derive(Default)]
pub(crate) struct World {
    /// What is not here is the host's.
    pages: BTreeMap<u64, Owner>,
    /// Where the pages of guests are.
    frames: BTreeMap<(usize, u64), u64>,
    /// The byte that a page is full of; 0xaa if it is not here.
    contents: BTreeMap<u64, u8>,
    /// Bytes written by [`Transitions::write_guest`], by guest address.
    pub(crate) written: BTreeMap<u64, u8>,
    poisoned: Vec<(usize, u64)>,
    /// What the next map or share asks for.
    pub(crate) tables_needed: u64,
    /// Whether the next page cannot be read.
    pub(crate) read_fails: bool,
}

pub(crate) struct FakeGuest {
    slot: usize,
    attributes: VmAttributes,
    tree: Tree,
    dying: AtomicBool,
}

#[derive(Default)]
pub(crate) struct Fake(Mutex<World>);

impl Fake {
    pub(crate) fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    pub(crate) fn owner_of(&self, page: u64) -> Owner {
        self.lock().owner(page >> 12)
    }

    pub(crate) fn content(&self, page: u64) -> u8 {
        self.lock().contents.get(&(page >> 12)).copied().unwrap_or(0xaa)
    }

    pub(crate) fn fill(&self, page: u64, byte: u8) {
        self.lock().contents.insert(page >> 12, byte);
    }

    /// Returns how many pages are not the host's.
    pub(crate) fn gone(&self) -> usize {
        self.lock().pages.len()
    }
}

fn pages(range: PhysRange) -> impl Iterator<Item = u64> {
    range.iter().map(PhysAddr::page_number)
}

fn refusal(status: Status, page: u64) -> Refusal {
    Refusal { status, detail: page << 12 }
}

impl World {
    fn owner(&self, page: u64) -> Owner {
        self.pages.get(&page).copied().unwrap_or(Owner::Host)
    }

    fn set(&mut self, page: u64, owner: Owner) {
        if let Owner::Guest { slot, frame, .. } = self.owner(page) {
            self.frames.remove(&(slot, frame));
        }
        if let Owner::Guest { slot, frame, .. } = owner {
            self.frames.insert((slot, frame), page);
        }
        match owner {
            Owner::Host => self.pages.remove(&page),
            _ => self.pages.insert(page, owner),
        };
    }

    /// Takes pages from the host.
    fn take(&mut self, range: PhysRange, to: impl Fn(u64) -> Owner) -> Result<(), Refusal> {
        for page in pages(range) {
            if !RAM.contains(&(page << 12)) {
                return Err(refusal(Status::NotRam, page));
            }
            if self.owner(page) != Owner::Host {
                return Err(refusal(Status::Denied, page));
            }
        }
        pages(range).for_each(|page| self.set(page, to(page)));
        Ok(())
    }

    fn scrub(&mut self, page: u64) {
        self.contents.insert(page, 0);
        self.set(page, Owner::Host);
    }

    /// Returns the page of a guest's frame.
    fn frame(&self, slot: usize, frame: u64) -> Option<(u64, GuestState)> {
        let page = *self.frames.get(&(slot, frame))?;
        match self.owner(page) {
            Owner::Guest { state, .. } => Some((page, state)),
            other => panic!("{other:?}"),
        }
    }

    fn look(&self, slot: usize, frame: u64) -> GuestPage {
        match self.frame(slot, frame) {
            _ if self.poisoned.contains(&(slot, frame)) => GuestPage::Poisoned,
            None => GuestPage::Absent,
            Some((_, GuestState::Private | GuestState::Pinned)) => GuestPage::Private,
            Some((_, GuestState::Lent)) => GuestPage::Lent,
            Some((_, GuestState::Offered)) => GuestPage::Offered,
            Some((_, GuestState::Claimed)) => GuestPage::Claimed,
        }
    }

    /// Changes the state of frames, all or none.
    fn change(
        &mut self,
        slot: usize,
        range: IpaRange,
        from: GuestState,
        to: Option<GuestState>,
        error: Status,
    ) -> Result<(), Refusal> {
        for frame in range.iter().map(Ipa::page_number) {
            if self.frame(slot, frame).is_none_or(|(_, state)| state != from) {
                return Err(refusal(error, frame));
            }
        }
        for frame in range.iter().map(Ipa::page_number) {
            let (page, _) = self.frame(slot, frame).unwrap();
            self.set(page, to.map_or(Owner::Host, |state| Owner::Guest { slot, frame, state }));
        }
        Ok(())
    }
}

impl Transitions for Fake {
    type Guest = FakeGuest;

    fn keep(&self, range: PhysRange) -> Result<(), Refusal> {
        self.lock().take(range, |_| Owner::Hypervisor)
    }

    fn give_back(&self, range: PhysRange) {
        let mut world = self.lock();
        assert!(range.pages() < 512);
        for page in pages(range) {
            assert_eq!(world.owner(page), Owner::Hypervisor);
            world.scrub(page);
        }
    }

    fn borrow_page(&self, page: PhysAddr) -> Result<(), Refusal> {
        let mut world = self.lock();
        let page = page.page_number();
        match world.owner(page) {
            Owner::Host if RAM.contains(&(page << 12)) => world.set(page, Owner::Borrowed(1)),
            Owner::Borrowed(times) => world.set(page, Owner::Borrowed(times + 1)),
            Owner::Host => return Err(refusal(Status::NotRam, page)),
            _ => return Err(refusal(Status::Denied, page)),
        }
        Ok(())
    }

    fn return_page(&self, page: PhysAddr) {
        let mut world = self.lock();
        let page = page.page_number();
        let Owner::Borrowed(times) = world.owner(page) else { panic!("not borrowed") };
        world.set(page, if times == 1 { Owner::Host } else { Owner::Borrowed(times - 1) });
    }

    fn root_pages(attributes: VmAttributes) -> u64 {
        if attributes.ipa_bits == 40 { 2 } else { 1 }
    }

    fn new_guest(&self, slot: usize, attributes: VmAttributes, root: PhysRange) -> Result<FakeGuest, Refusal> {
        assert_eq!(root.pages(), Self::root_pages(attributes));
        assert!(root.base().is_aligned(root.size()));
        let mut world = self.lock();
        pages(root).for_each(|page| assert_eq!(world.owner(page), Owner::Hypervisor));
        world.poisoned.retain(|&(its, _)| its != slot);
        let vttbr = Vttbr { root: root.base(), vmid: Vmid::new(u8::try_from(slot).unwrap() + 1) };
        let geometry = Geometry::stage2(u32::try_from(attributes.ipa_bits).unwrap().max(32)).unwrap();
        Ok(FakeGuest { slot, attributes, tree: Tree { vttbr, geometry }, dying: AtomicBool::new(false) })
    }

    fn tree<'a>(&self, guest: &'a FakeGuest) -> &'a Tree {
        &guest.tree
    }

    fn donate_tables(&self, guest: &FakeGuest, range: PhysRange) -> Result<(), Refusal> {
        let mut world = self.lock();
        world.take(range, |_| Owner::Tables(guest.slot))?;
        world.tables_needed = world.tables_needed.saturating_sub(range.pages());
        Ok(())
    }

    fn map(&self, guest: &FakeGuest, range: PhysRange, at: Ipa) -> Result<(), Refusal> {
        let mut world = self.lock();
        let slot = guest.slot;
        if world.tables_needed != 0 {
            return Err(Refusal { status: Status::NeedsTables, detail: world.tables_needed });
        }
        let first = at.page_number();
        for (frame, page) in (first..).zip(pages(range)) {
            match world.look(slot, frame) {
                GuestPage::Absent => {}
                GuestPage::Poisoned => return Err(refusal(Status::Poisoned, page)),
                _ => return Err(refusal(Status::Exists, page)),
            }
        }
        let state = if guest.attributes.kind == VmKind::Ordinary { GuestState::Lent } else { GuestState::Private };
        let base = range.base().page_number();
        world.take(range, |page| Owner::Guest { slot, frame: first + page - base, state })
    }

    fn unmap(&self, guest: &FakeGuest, range: IpaRange) -> Result<(), Refusal> {
        self.lock().change(guest.slot, range, GuestState::Lent, None, Status::Absent)
    }

    fn claim(&self, guest: &FakeGuest, range: IpaRange) -> Result<(), Refusal> {
        let (from, to) = (GuestState::Offered, Some(GuestState::Claimed));
        self.lock().change(guest.slot, range, from, to, Status::NotOffered)
    }

    fn release(&self, guest: &FakeGuest, range: IpaRange) -> Result<(), Refusal> {
        let (from, to) = (GuestState::Claimed, Some(GuestState::Offered));
        self.lock().change(guest.slot, range, from, to, Status::Denied)
    }

    fn owner(&self, page: PhysAddr) -> Option<usize> {
        match self.lock().owner(page.page_number()) {
            Owner::Guest { slot, .. } => Some(slot),
            _ => None,
        }
    }

    fn force_reclaim(&self, guest: &FakeGuest, range: PhysRange) -> Result<(), Refusal> {
        let mut world = self.lock();
        let takes = |owner| match owner {
            Owner::Guest { slot, frame, state: GuestState::Private | GuestState::Offered } if slot == guest.slot => {
                Some(frame)
            }
            _ => None,
        };
        if let Some(page) = pages(range).find(|&page| takes(world.owner(page)).is_none()) {
            return Err(refusal(Status::Denied, page));
        }
        for page in pages(range) {
            let frame = takes(world.owner(page)).unwrap();
            world.poisoned.push((guest.slot, frame));
            world.scrub(page);
        }
        Ok(())
    }

    fn kill(&self, guest: &FakeGuest) {
        assert!(!guest.dying.swap(true, SeqCst));
    }

    fn reclaim(&self, guest: &FakeGuest, range: IpaRange) -> Result<u64, Refusal> {
        assert!(guest.dying.load(SeqCst));
        let range = first(range);
        let mut world = self.lock();
        for frame in range.iter().map(Ipa::page_number) {
            match world.frame(guest.slot, frame) {
                Some((page, GuestState::Private | GuestState::Pinned)) => world.scrub(page),
                Some((page, _)) => world.set(page, Owner::Host),
                None => {}
            }
        }
        Ok(range.pages())
    }

    fn return_tables(&self, guest: &FakeGuest, most: u64) -> Result<u64, Refusal> {
        let mut world = self.lock();
        let its = |owner: &Owner| matches!(owner, Owner::Guest { slot, .. } if *slot == guest.slot);
        if world.pages.values().any(its) {
            return Err(Status::Busy.into());
        }
        let tables: Vec<_> = world
            .pages
            .iter()
            .filter_map(|(&page, &owner)| (owner == Owner::Tables(guest.slot)).then_some(page))
            .collect();
        let (now, later) = tables.split_at(tables.len().min(most as usize));
        now.iter().for_each(|&page| world.scrub(page));
        Ok(later.len() as u64)
    }

    fn read_pages(&self, guest: &FakeGuest, range: IpaRange, read: &mut dyn FnMut(&[u8])) -> Result<u64, Refusal> {
        let range = IpaRange::new(range.base().raw(), range.pages().min(3)).unwrap();
        for frame in range.iter() {
            if std::mem::take(&mut self.lock().read_fails) {
                return Err(Status::NoMemory.into());
            }
            let Some((page, GuestState::Private)) = self.lock().frame(guest.slot, frame.page_number()) else {
                panic!("{frame} is not private");
            };
            (0..4).for_each(|_| read(&[self.content(page << 12); 1024]));
        }
        Ok(range.pages())
    }

    fn exchange(&self, guest: &FakeGuest, range: IpaRange, share: bool) -> bool {
        let done = || if share { self.share(guest, range) } else { self.unshare(guest, range) };
        guest.attributes.kind == VmKind::Pkvm && range.pages() == 1 && done().is_ok()
    }

    fn share(&self, guest: &FakeGuest, range: IpaRange) -> Result<u64, GuestFailure> {
        let range = first(range);
        let mut world = self.lock();
        if world.tables_needed != 0 {
            return Err(GuestFailure::NeedsTables(world.tables_needed));
        }
        for frame in range.iter() {
            match world.look(guest.slot, frame.page_number()) {
                GuestPage::Absent => return Err(GuestFailure::Absent(frame)),
                GuestPage::Private => {}
                _ => return Err(GuestFailure::Refused),
            }
        }
        let (from, to) = (GuestState::Private, Some(GuestState::Offered));
        world.change(guest.slot, range, from, to, Status::Denied).unwrap();
        Ok(range.pages())
    }

    fn unshare(&self, guest: &FakeGuest, range: IpaRange) -> Result<u64, GuestFailure> {
        let range = first(range);
        let mut world = self.lock();
        let realm = guest.attributes.kind == VmKind::Realm;
        let mut offered = Vec::new();
        for frame in range.iter() {
            match world.frame(guest.slot, frame.page_number()) {
                Some((_, GuestState::Offered)) => offered.push(frame),
                Some((_, GuestState::Claimed)) => return Err(GuestFailure::Claimed(IpaRange::single(frame))),
                _ if world.look(guest.slot, frame.page_number()) == GuestPage::Poisoned => {
                    return Err(GuestFailure::Refused);
                }
                _ if realm => {}
                _ => return Err(GuestFailure::Refused),
            }
        }
        let (from, to) = (GuestState::Offered, Some(GuestState::Private));
        for frame in offered {
            world.change(guest.slot, IpaRange::single(frame), from, to, Status::Denied).unwrap();
        }
        Ok(range.pages())
    }

    fn relinquish(&self, guest: &FakeGuest, range: IpaRange) -> Result<u64, GuestFailure> {
        let range = first(range);
        let mut world = self.lock();
        let given_up = |frame: &Ipa| {
            matches!(world.look(guest.slot, frame.page_number()), GuestPage::Private | GuestPage::Poisoned)
        };
        if !range.iter().all(|frame| given_up(&frame)) {
            return Err(GuestFailure::Refused);
        }
        for frame in range.iter().map(Ipa::page_number) {
            match world.frame(guest.slot, frame) {
                Some((page, _)) => world.scrub(page),
                None => world.poisoned.retain(|&its| its != (guest.slot, frame)),
            }
        }
        Ok(range.pages())
    }

    fn convert(&self, guest: &FakeGuest, conversions: &mut dyn Iterator<Item = Option<Conversion>>) -> Batch {
        let mut batch = Batch::default();
        let mut left = AT_ONCE;
        for (index, conversion) in conversions.enumerate() {
            if let Some(Conversion { range, share, released }) = conversion {
                if range.pages() > left && index != 0 {
                    break;
                }
                left -= range.pages();
                let mut world = self.lock();
                let (from, to) = if share {
                    (GuestState::Private, GuestState::Offered)
                } else {
                    (GuestState::Offered, GuestState::Private)
                };
                let claimed = range.iter().any(|frame| {
                    matches!(world.frame(guest.slot, frame.page_number()), Some((_, GuestState::Claimed)))
                });
                if !share && claimed && !released {
                    batch.claimed |= 1 << index;
                } else {
                    let from = if claimed && !share { GuestState::Claimed } else { from };
                    let done = world.change(guest.slot, range, from, Some(to), Status::Denied);
                    batch.done |= u64::from(done.is_ok()) << index;
                }
            }
            batch.seen += 1;
        }
        batch
    }

    fn pin_page(&self, guest: &FakeGuest, page: Ipa) -> Result<PhysAddr, GuestFailure> {
        let mut world = self.lock();
        let Some((number, _)) = world.frame(guest.slot, page.page_number()) else {
            return Err(GuestFailure::Absent(page));
        };
        let (from, to) = (GuestState::Private, Some(GuestState::Pinned));
        let pinned = world.change(guest.slot, IpaRange::single(page), from, to, Status::Denied);
        pinned.map_err(|_| GuestFailure::Refused)?;
        Ok(PhysAddr::new(number << 12).unwrap())
    }

    fn unpin_page(&self, guest: &FakeGuest, page: Ipa) {
        let (from, to) = (GuestState::Pinned, Some(GuestState::Private));
        self.lock().change(guest.slot, IpaRange::single(page), from, to, Status::Denied).unwrap();
    }

    fn look(&self, guest: &FakeGuest, range: IpaRange) -> (GuestPage, u64) {
        let world = self.lock();
        let what = |frame: Ipa| world.look(guest.slot, frame.page_number());
        let same = range.iter().take_while(|&frame| what(frame) == what(range.base())).count();
        (what(range.base()), same as u64)
    }

    fn read_guest(&self, guest: &FakeGuest, at: Ipa, bytes: &mut [u8]) -> Result<(), GuestFailure> {
        let world = self.lock();
        assert!(at.raw() % PAGE_SIZE + bytes.len() as u64 <= PAGE_SIZE);
        match world.look(guest.slot, at.page_number()) {
            GuestPage::Private => {}
            GuestPage::Absent => return Err(GuestFailure::Absent(at.page())),
            _ => return Err(GuestFailure::Refused),
        }
        for (address, byte) in (at.raw()..).zip(bytes) {
            *byte = world.written.get(&address).copied().unwrap_or(0xcc);
        }
        Ok(())
    }

    fn write_guest(&self, guest: &FakeGuest, at: Ipa, bytes: &[u8]) -> Result<(), GuestFailure> {
        let mut world = self.lock();
        assert!(at.raw() % PAGE_SIZE + bytes.len() as u64 <= PAGE_SIZE);
        match world.look(guest.slot, at.page_number()) {
            GuestPage::Private => {}
            GuestPage::Absent => return Err(GuestFailure::Absent(at.page())),
            _ => return Err(GuestFailure::Refused),
        }
        world.written.extend((at.raw()..).zip(bytes.iter().copied()));
        Ok(())
    }
}

/// Returns what of a range one call is for.
fn first(range: IpaRange) -> IpaRange {
    IpaRange::new(range.base().raw(), range.pages().min(AT_ONCE)).unwrap()
}
