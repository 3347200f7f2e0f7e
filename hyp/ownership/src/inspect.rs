//! What is, for those who compare it with what should be: tests and checking builds.

use core::ops::ControlFlow;

use ravelin_memory::{HypRange, Ipa, IpaRange, PhysRange};
use ravelin_pgtable::{El2Usage, Found, Machine, Stage2Usage, TablePool};

use crate::{entry::State, guest::GuestMemory, locked::Mask, memory::Memory, transfer::address};

/// What the entries of a run of pages say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entries {
    /// The state of all of them.
    pub state: State,
    /// How often each is pinned.
    pub pins: u64,
    /// Slot and frame of the guest that has the first page mapped; the frames of the others follow.
    pub guest: Option<(u8, Ipa)>,
}

impl<P: TablePool> Memory<'_, P> {
    /// Calls `f` in ascending order with runs of pages of `range` and what their entries say, from the first page to the first that is
    /// not RAM. `f` must not call methods of this.
    pub fn visit_entries<M: Machine>(&self, machine: &M, range: PhysRange, f: &mut dyn FnMut(PhysRange, Entries)) {
        let locked = self.lock(machine, self.mask(range));
        let _: ControlFlow<()> = locked.visit(range, &mut |run, entry, _| {
            if let Some(entry) = entry {
                let guest = entry.guest().and_then(|(slot, frame)| Some((slot, address(frame)?)));
                f(run, Entries { state: entry.state(), pins: entry.pins(), guest });
            }
            ControlFlow::Continue(())
        });
    }

    /// Calls `f` in ascending order with parts of `range` and what the host's stage 2 has there. `f` must not call methods of
    /// this.
    pub fn visit_host<M: Machine>(
        &self,
        machine: &M,
        range: IpaRange,
        f: &mut dyn FnMut(IpaRange, Found<Stage2Usage>),
    ) {
        let locked = self.lock(machine, Mask::ALL);
        let _ = locked.whole().map(|whole| {
            whole.host.visit(machine, range, &mut |part, found| {
                f(part, found);
                ControlFlow::<()>::Continue(())
            })
        });
    }

    /// Calls `f` in ascending order with parts of `range` and what the EL2 stage 1 has there. `f` must not call methods of
    /// this.
    pub fn visit_el2<M: Machine>(&self, machine: &M, range: HypRange, f: &mut dyn FnMut(HypRange, Found<El2Usage>)) {
        let locked = self.lock(machine, Mask::ALL);
        let _ = locked.whole().map(|whole| {
            whole.el2.visit(machine, range, &mut |part, found| {
                f(part, found);
                ControlFlow::<()>::Continue(())
            })
        });
    }

    /// Calls `f` in ascending order with parts of `range` and what a guest's stage 2 has there. `f` must not call methods of
    /// this.
    pub fn visit_guest<M: Machine>(
        &self,
        machine: &M,
        guest: &GuestMemory,
        range: IpaRange,
        f: &mut dyn FnMut(IpaRange, Found<Stage2Usage>),
    ) {
        let _: ControlFlow<()> = guest.lock(machine).tables.visit(machine, range, &mut |part, found| {
            f(part, found);
            ControlFlow::Continue(())
        });
    }
}
