//! The recording machine, with bytes in its pages, and guests.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Barrier, Mutex, MutexGuard, PoisonError},
};

use ravelin_memory::{HypRange, IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_pgtable::{
    Machine, Vmid, Vttbr,
    recording::{RecordingMachine, Stage, Translation},
};
use ravelin_vm::{EntropySource, PageAccess};

use crate::guest::{Action, Happened, Script};

type Page = [u8; PAGE_SIZE as usize];

/// The recording machine, with bytes in its pages, and guests that do what they are told.
#[derive(Default)]
pub struct TestMachine {
    /// What holds tables, TLBs and contents.
    pub inner: RecordingMachine,
    /// Pages that somebody has written bytes to since their contents were last a number.
    bytes: Mutex<BTreeMap<u64, Box<Page>>>,
    /// Pages that the hypervisor has written bytes to.
    written: Mutex<BTreeSet<u64>>,
    guests: Mutex<Script>,
    meeting: Mutex<Option<&'static Barrier>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the page of contents that a number stands for.
fn page_of(contents: u64) -> Box<Page> {
    let mut page = Box::new([0; PAGE_SIZE as usize]);
    page.as_chunks_mut().0.fill(contents.to_le_bytes());
    page
}

impl TestMachine {
    /// Appends to what the guest that runs next does, one action after the other, before an interrupt for the host comes.
    pub fn then(&self, actions: impl IntoIterator<Item = Action>) {
        lock(&self.guests).actions.extend(actions);
    }

    /// Has the guest that runs next do these actions, and nothing of what it has not come to yet.
    pub fn set_actions(&self, actions: impl IntoIterator<Item = Action>) {
        lock(&self.guests).actions = actions.into_iter().collect();
    }

    /// Returns what guests have done since this was last asked.
    pub fn take_happened(&self) -> Vec<Happened> {
        std::mem::take(&mut lock(&self.guests).happened)
    }

    /// Returns the addresses of pages that the hypervisor has written bytes to since this was last asked.
    pub fn take_written(&self) -> BTreeSet<u64> {
        std::mem::take(&mut lock(&self.written))
    }

    /// Has guests wait at `meeting` twice: when they have been entered, and before they are left.
    pub fn meet_at(&self, meeting: Option<&'static Barrier>) {
        *lock(&self.meeting) = meeting;
    }

    pub(crate) fn meeting(&self) -> Option<&'static Barrier> {
        *lock(&self.meeting)
    }

    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        lock(&self.guests)
    }

    /// Forgets the guest that had a VMID.
    pub(crate) fn forget(&self, vmid: Vmid) {
        lock(&self.guests).in_flight.retain(|&(its, _), _| its != vmid);
    }

    /// Returns bytes of a page, whoever may see them.
    #[must_use]
    pub fn peek<const N: usize>(&self, page: u64, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.copy_out(address(page), offset, &mut bytes);
        bytes
    }

    /// Returns whether a page holds nothing but zeroes.
    #[must_use]
    pub fn is_zero(&self, page: u64) -> bool {
        let bytes = lock(&self.bytes);
        bytes.get(&page).map_or(self.inner.peek(address(page)) == 0, |page| page.iter().all(|&byte| byte == 0))
    }

    /// Changes bytes of a page, whoever may do so. The number that stands for the rest of its contents stays.
    pub fn patch(&self, page: u64, offset: usize, bytes: &[u8]) {
        self.copy_in(address(page), offset, bytes);
    }

    /// Overwrites a page with contents that a number stands for.
    pub fn fill(&self, page: PhysAddr, contents: u64) {
        lock(&self.bytes).remove(&page.raw());
        self.inner.poke(page, contents);
    }

    /// Returns where the only translation of an address leads, or `None` if it is a fault.
    ///
    /// # Panics
    ///
    /// If a TLB could answer otherwise than the tables.
    #[must_use]
    pub fn translate(&self, stage: Stage, address: u64) -> Option<PhysAddr> {
        let answers = self.inner.translate(stage, address);
        assert!(answers.len() < 2, "{address:#x} may lead here or there: {answers:?}");
        answers.first().copied().flatten().map(|found| found.to)
    }

    pub(crate) fn assert_mapped(&self, at: PhysAddr) {
        let page = at.page();
        let answers = self.inner.translate(Stage::El2, page.raw());
        let leads_here = |answer: &Option<Translation>| answer.is_some_and(|it| it.to == page);
        assert!(answers.iter().all(leads_here), "{at} is accessed but not mapped: {answers:?}");
    }

    fn copy_out(&self, page: PhysAddr, offset: usize, bytes: &mut [u8]) {
        if let Some(page) = lock(&self.bytes).get(&page.raw()) {
            bytes.copy_from_slice(&page[offset..][..bytes.len()]);
            return;
        }
        let contents = self.inner.peek(page).to_le_bytes();
        for (offset, byte) in (offset..).zip(bytes) {
            *byte = contents[offset % contents.len()];
        }
    }

    fn copy_in(&self, page: PhysAddr, offset: usize, bytes: &[u8]) {
        let mut pages = lock(&self.bytes);
        let page = pages.entry(page.raw()).or_insert_with(|| page_of(self.inner.peek(page)));
        page[offset..][..bytes.len()].copy_from_slice(bytes);
    }
}

pub(crate) fn address(raw: u64) -> PhysAddr {
    PhysAddr::new(raw).expect("a physical address has at most 48 bits")
}

fn offset(at: PhysAddr) -> usize {
    (at.raw() % PAGE_SIZE) as usize
}

impl PageAccess for TestMachine {
    fn read_bytes(&self, at: PhysAddr, bytes: &mut [u8]) {
        self.assert_mapped(at);
        self.copy_out(at.page(), offset(at), bytes);
    }

    fn write_bytes(&self, at: PhysAddr, bytes: &[u8]) {
        self.assert_mapped(at);
        lock(&self.written).insert(at.page().raw());
        self.copy_in(at.page(), offset(at), bytes);
    }

    fn read_words<const N: usize>(&self, at: PhysAddr) -> [u64; N] {
        assert!(at.is_aligned(8));
        let mut bytes = vec![0; 8 * N];
        self.read_bytes(at, &mut bytes);
        core::array::from_fn(|word| u64::from_le_bytes(bytes.as_chunks().0[word]))
    }

    fn write_words<const N: usize>(&self, at: PhysAddr, words: &[u64; N]) {
        assert!(at.is_aligned(8));
        self.write_bytes(at, &words.map(u64::to_le_bytes).concat());
    }
}

impl EntropySource for TestMachine {
    fn bits(&self) -> Option<[u64; 3]> {
        None
    }

    fn exists(&self) -> bool {
        false
    }
}

impl Machine for TestMachine {
    fn read(&self, table: PhysAddr, index: usize) -> u64 {
        self.inner.read(table, index)
    }

    fn write(&self, table: PhysAddr, index: usize, value: u64) {
        self.inner.write(table, index, value);
    }

    fn clear_table(&self, table: PhysAddr) {
        self.inner.clear_table(table);
    }

    fn publish(&self) {
        self.inner.publish();
    }

    fn invalidate_stage2(&self, tree: Vttbr, range: IpaRange, leaf_only: bool) {
        self.inner.invalidate_stage2(tree, range, leaf_only);
    }

    fn invalidate_stage2_all(&self, tree: Vttbr) {
        self.inner.invalidate_stage2_all(tree);
    }

    fn invalidate_el2(&self, range: HypRange) {
        self.inner.invalidate_el2(range);
    }

    fn scrub(&self, range: PhysRange) {
        lock(&self.bytes).retain(|&page, _| !range.contains(address(page)));
        self.inner.scrub(range);
    }

    fn clean(&self, range: PhysRange) {
        self.inner.clean(range);
    }
}
