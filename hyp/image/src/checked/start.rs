//! What there was before the host started, and stays as it was.

use alloc::{format, vec::Vec};
use core::ops::ControlFlow;

use arrayvec::ArrayVec;
use ravelin_arch::Hardware;
use ravelin_memory::{HypAddr, HypRange, Level, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_model::Difference;
use ravelin_ownership::Memory;
use ravelin_pgtable::{El2, El2Usage, Found, Geometry, Mapping, PageTable};
use ravelin_platform::MAX_RAM_REGIONS;

use super::Checked;
use crate::pool::Pool;

/// What one descriptor maps: where, how many pages, and to what.
type Leaf = (HypAddr, u64, Option<Mapping<El2Usage>>);

/// RAM, and the mappings of EL2 that no call changes: all but those of RAM outside of the carve-out, which the model knows.
pub(super) struct Start {
    ram: ArrayVec<PhysRange, MAX_RAM_REGIONS>,
    carve_out: PhysRange,
    leaves: Vec<Leaf>,
}

impl Start {
    pub(super) fn new(machine: &Hardware, ram: &[PhysRange], carve_out: PhysRange, el2: &PageTable<El2>) -> Self {
        let mut start = Self { ram: ram.iter().copied().collect(), carve_out, leaves: Vec::new() };
        start.leaves = start.leaves(|f| {
            let _: ControlFlow<()> = el2.visit(machine, everywhere(), &mut |part, found| {
                f(part, found);
                ControlFlow::Continue(())
            });
        });
        let unknown = start.leaves.iter().find(|(.., mapping)| mapping.is_none());
        assert_eq!(unknown, None, "attributes that are none of EL2's");
        start
    }

    /// Returns whether a page is RAM.
    pub(super) fn is_ram(&self, page: PhysAddr) -> bool {
        self.ram.iter().any(|region| region.contains(page))
    }

    /// Compares the mappings with those that there are now.
    pub(super) fn compare(&self, memory: &Memory<'_, Pool>, machine: &Checked) -> Result<(), Difference> {
        let now = self.leaves(|f| memory.visit_el2(machine, everywhere(), f));
        match self.leaves.iter().zip(&now).find(|(before, now)| before != now) {
            Some((before, now)) => Err(Difference(format!("EL2's stage 1 has {now:x?}, and had {before:x?}"))),
            None if self.leaves.len() == now.len() => Ok(()),
            None => Err(Difference("EL2's stage 1 has mappings that it did not have, or lacks some".into())),
        }
    }

    fn leaves(&self, visit: impl FnOnce(&mut dyn FnMut(HypRange, Found<El2Usage>))) -> Vec<Leaf> {
        let mut leaves = Vec::new();
        visit(&mut |part, found| {
            let Found::Leaf { mapping, level } = found else { return };
            // A run of pages may lead out of the carve-out.
            let pages = if level == Level::L3 { 1 } else { part.pages() };
            let piece = |at: HypAddr| {
                let offset = at.raw() - part.base().raw();
                let to = |to: PhysAddr| PhysAddr::from_bits_truncating(to.raw() + offset);
                (at, pages, mapping.map(|its| Mapping { to: to(its.to), ..its }))
            };
            let is_its_own = |at: &HypAddr| {
                let page = PhysAddr::from_bits_truncating(at.raw());
                !self.is_ram(page) || self.carve_out.contains(page)
            };
            let step = usize::try_from(pages).expect("it is in an address space");
            leaves.extend(part.iter().step_by(step).filter(is_its_own).map(piece));
        });
        leaves
    }
}

/// Returns all of EL2's address space.
fn everywhere() -> HypRange {
    HypRange::new(0, Geometry::EL2.end() / PAGE_SIZE).expect("it is an address space")
}
