//! What the hypervisor has made of memory: the ownership table, and translation tables as the walkers of the recording machine
//! see them, which know nothing of the code that is tested.

use std::ops::Range;

use ravelin_memory::{PAGE_SIZE, PhysAddr};
use ravelin_model::{Counts, Found, Real, state::Page};
use ravelin_oracle::Observed;
use ravelin_pgtable::{
    El2, El2Usage, Regime, Stage2, Stage2Usage,
    recording::{RecordingPool, Seen, Stage},
};
use ravelin_world::{Heap, TestMachine, World};

/// What stage 2 is used for: memory and devices.
const STAGE2: [Stage2Usage; 2] = [Stage2Usage::Memory, Stage2Usage::Device];

/// The tables of a world.
pub(crate) struct RealWorld<'w, 'a>(pub(crate) &'w World<'a>);

impl RealWorld<'_, '_> {
    /// Calls `f` with what the tables of a stage have, in which these attributes are those of memory and of devices.
    fn runs(&self, stage: Stage, [memory, device]: [u64; 2], pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found)) {
        let bytes = pages.start * PAGE_SIZE..pages.end * PAGE_SIZE;
        self.0.machine.inner.for_each_run(stage, bytes, &mut |run, seen| {
            let found = match seen {
                Seen::Nothing => Found::Absent,
                Seen::Poisoned => Found::Poisoned,
                Seen::Leaf(leaf) if leaf.attributes == memory => Found::Memory(leaf.to.page_number()),
                Seen::Leaf(leaf) if leaf.attributes == device => Found::Device(leaf.to.page_number()),
                Seen::Leaf(_) => Found::Other,
            };
            f(run.start / PAGE_SIZE..run.end / PAGE_SIZE, found);
        });
    }

    /// Runs `f` on what the hypervisor says itself.
    fn observed<R>(&self, f: impl FnOnce(&Observed<'_, '_, RecordingPool, TestMachine, Heap>) -> R) -> R {
        let World { memory, machine, vms, .. } = *self.0;
        f(&Observed { memory, machine, vms, is_zero: &|page: PhysAddr| machine.is_zero(page.raw()) })
    }
}

impl Real for RealWorld<'_, '_> {
    fn pages(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Page)) {
        self.observed(|observed| observed.pages(pages, f));
    }

    fn host(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found)) {
        self.runs(Stage::Stage2, STAGE2.map(Stage2::attributes), pages, f);
    }

    fn hypervisor(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found)) {
        self.runs(Stage::El2, [El2Usage::Data, El2Usage::Device].map(El2::attributes), pages, f);
    }

    fn guest(&self, handle: u64, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found)) {
        let stage = Stage::Guest(World::vmid(handle));
        self.runs(stage, STAGE2.map(Stage2::attributes), pages, f);
    }

    fn counts(&self) -> Counts {
        self.observed(|observed| observed.counts())
    }

    fn slot(&self, handle: u64) -> u64 {
        self.observed(|observed| observed.slot(handle))
    }

    fn is_zero(&self, page: u64) -> bool {
        self.observed(|observed| observed.is_zero(page))
    }
}
