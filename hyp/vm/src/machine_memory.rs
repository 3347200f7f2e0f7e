//! The transitions of memory on a machine with translation tables.

use ravelin_abi::{Status, VmAttributes, VmKind};
use ravelin_memory::{Ipa, IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_ownership::{
    Batch, Conversion, Failure, Gift, GuestFailure as MemoryFailure, GuestKind, GuestMemory, GuestPage, GuestReason,
    HostFailure, Memory, Reason, Unshare,
};
use ravelin_pgtable::{Geometry, Machine, TablePool, Tree};

use crate::{GuestFailure, Refusal, Transitions};

/// Access to bytes of pages that are mapped in the EL2 stage 1 at their physical addresses, while a guest or the host may
/// access them, too.
pub trait PageAccess {
    /// Copies from `at`. `bytes` does not cross the end of the page.
    fn read_bytes(&self, at: PhysAddr, bytes: &mut [u8]);

    /// Copies to `at`. `bytes` does not cross the end of the page.
    fn write_bytes(&self, at: PhysAddr, bytes: &[u8]);

    /// Reads words in little-endian order from `at` on, which is a multiple of 8, as [`PageAccess::read_bytes`] does.
    fn read_words<const N: usize>(&self, at: PhysAddr) -> [u64; N];

    /// Writes words in little-endian order from `at` on, which is a multiple of 8, as [`PageAccess::write_bytes`] does.
    fn write_words<const N: usize>(&self, at: PhysAddr, words: &[u64; N]);
}

/// Pages that are measured under one hold of the lock of memory. Hashing takes long.
const MEASURED_AT_ONCE: u64 = 8;

/// Bytes that are read at a time; they pass over the stack.
const PIECE: usize = 256;

/// All of memory, as the machine that this CPU is sees it.
pub struct MachineMemory<'a, 'm, P, M> {
    memory: &'a Memory<'m, P>,
    machine: &'a M,
}

impl<'a, 'm, P, M> MachineMemory<'a, 'm, P, M> {
    /// Joins the two.
    pub const fn new(memory: &'a Memory<'m, P>, machine: &'a M) -> Self {
        Self { memory, machine }
    }
}

impl<P: TablePool, M: Machine + PageAccess> Transitions for MachineMemory<'_, '_, P, M> {
    type Guest = GuestMemory;

    fn keep(&self, range: PhysRange) -> Result<(), Refusal> {
        Ok(self.memory.keep(self.machine, range)?)
    }

    fn give_back(&self, range: PhysRange) {
        let given = self.memory.give_back(self.machine, range);
        debug_assert_eq!(given, Ok(()), "kept by one call");
    }

    fn borrow_page(&self, page: PhysAddr) -> Result<(), Refusal> {
        Ok(self.memory.borrow_from_host(self.machine, page)?)
    }

    fn return_page(&self, page: PhysAddr) {
        let returned = self.memory.return_to_host(self.machine, page);
        debug_assert_eq!(returned, Ok(()), "borrowed, and only this returns it");
    }

    fn root_pages(attributes: VmAttributes) -> u64 {
        geometry(attributes).root_pages()
    }

    fn new_guest(&self, slot: usize, attributes: VmAttributes, root: PhysRange) -> Result<GuestMemory, Refusal> {
        let kind = match attributes.kind {
            VmKind::Ordinary => GuestKind::Ordinary,
            VmKind::Pkvm => GuestKind::Pkvm,
            VmKind::Realm => GuestKind::Realm,
        };
        let slot = u8::try_from(slot).map_err(|_| Status::Limit)?;
        Ok(self.memory.new_guest(self.machine, slot, kind, geometry(attributes), root.base())?)
    }

    fn end_of_root(&self, guest: &GuestMemory) {
        guest.give_up_root(self.machine);
    }

    fn tree<'g>(&self, guest: &'g GuestMemory) -> &'g Tree {
        guest.tree()
    }

    fn donate_tables(&self, guest: &GuestMemory, range: PhysRange) -> Result<(), Refusal> {
        Ok(self.memory.add_guest_tables(self.machine, guest, range)?)
    }

    fn map(&self, guest: &GuestMemory, range: PhysRange, at: Ipa) -> Result<(), Refusal> {
        let gift = if guest.kind() == GuestKind::Ordinary { Gift::Lent } else { Gift::Donated };
        Ok(self.memory.give(self.machine, guest, range, at, gift)?)
    }

    fn map_to_measure(&self, guest: &GuestMemory, range: PhysRange, at: Ipa) -> Result<(), Refusal> {
        Ok(self.memory.give(self.machine, guest, range, at, Gift::ToMeasure)?)
    }

    fn unmap(&self, guest: &GuestMemory, range: IpaRange) -> Result<(), Refusal> {
        Ok(self.memory.unlend(self.machine, guest, range)?)
    }

    fn claim(&self, guest: &GuestMemory, range: IpaRange) -> Result<(), Refusal> {
        Ok(self.memory.claim(self.machine, guest, range)?)
    }

    fn release(&self, guest: &GuestMemory, range: IpaRange) -> Result<(), Refusal> {
        Ok(self.memory.release(self.machine, guest, range)?)
    }

    fn owner(&self, page: PhysAddr) -> Option<usize> {
        self.memory.page_owner(page).map(|(slot, _)| slot.into())
    }

    fn force_reclaim(&self, guest: &GuestMemory, range: PhysRange) -> Result<(), Refusal> {
        Ok(self.memory.force_reclaim(self.machine, guest, range)?)
    }

    fn kill(&self, guest: &GuestMemory) {
        guest.kill();
    }

    fn reclaim(&self, guest: &GuestMemory, range: IpaRange) -> Result<u64, Refusal> {
        Ok(self.memory.reclaim(self.machine, guest, range)?)
    }

    fn return_tables(&self, guest: &GuestMemory, most: u64) -> Result<u64, Refusal> {
        self.memory.release_guest_tables(self.machine, guest, most).map_err(|reason| refusal(reason, 0))
    }

    fn read_pages(&self, guest: &GuestMemory, range: IpaRange, read: &mut dyn FnMut(&[u8])) -> Result<u64, Refusal> {
        let few = IpaRange::new(range.base().raw(), range.pages().min(MEASURED_AT_ONCE)).unwrap_or(range);
        Ok(self.memory.with_guest_pages(self.machine, guest, few, &mut |run| {
            let mut piece = [0; PIECE];
            for offset in (0..run.size()).step_by(PIECE) {
                if let Some(at) = run.base().checked_add(offset) {
                    self.machine.read_bytes(at, &mut piece);
                    read(&piece);
                }
            }
        })?)
    }

    fn exchange(&self, guest: &GuestMemory, range: IpaRange, share: bool) -> bool {
        self.memory.guest_exchange(self.machine, guest, range, share)
    }

    fn share(&self, guest: &GuestMemory, range: IpaRange) -> Result<u64, GuestFailure> {
        Ok(self.memory.guest_share(self.machine, guest, range)?)
    }

    fn unshare(&self, guest: &GuestMemory, range: IpaRange) -> Result<u64, GuestFailure> {
        let range = match guest.kind() {
            GuestKind::Realm => match self.look(guest, range) {
                (GuestPage::Offered | GuestPage::Claimed, pages) => {
                    IpaRange::new(range.base().raw(), pages.min(range.pages())).unwrap_or(range)
                }
                (GuestPage::Poisoned, _) => return Err(GuestFailure::Refused),
                (GuestPage::Absent | GuestPage::Private | GuestPage::Lent, pages) => {
                    return Ok(pages.min(range.pages()));
                }
            },
            GuestKind::Ordinary | GuestKind::Pkvm => range,
        };
        match self.memory.guest_unshare(self.machine, guest, range)? {
            Unshare::Done(pages) => Ok(pages),
            Unshare::NeedsRelease(claimed) => Err(GuestFailure::Claimed(claimed)),
        }
    }

    fn relinquish(&self, guest: &GuestMemory, range: IpaRange) -> Result<u64, GuestFailure> {
        self.memory.guest_relinquish(self.machine, guest, range).map_err(|failure| match failure.reason {
            // There is nothing to give up.
            GuestReason::Absent => GuestFailure::Refused,
            _ => failure.into(),
        })
    }

    fn convert(&self, guest: &GuestMemory, conversions: &mut dyn Iterator<Item = Option<Conversion>>) -> Batch {
        self.memory.guest_convert(self.machine, guest, conversions)
    }

    fn pin_page(&self, guest: &GuestMemory, page: Ipa) -> Result<PhysAddr, GuestFailure> {
        Ok(self.memory.guest_pin(self.machine, guest, page)?)
    }

    fn unpin_page(&self, guest: &GuestMemory, page: Ipa) {
        let unpinned = self.memory.guest_unpin(self.machine, guest, page);
        debug_assert_eq!(unpinned, Ok(()), "pinned, and only this unpins it");
    }

    #[inline(always)]
    fn look(&self, guest: &GuestMemory, range: IpaRange) -> (GuestPage, u64) {
        // One walk, as for each access to a device.
        if range.pages() == 1 {
            return (self.memory.guest_page(self.machine, guest, range.base()), 1);
        }
        self.memory.guest_run(self.machine, guest, range)
    }

    fn read_guest(&self, guest: &GuestMemory, at: Ipa, bytes: &mut [u8]) -> Result<(), GuestFailure> {
        self.on_page(guest, at, &mut |at| self.machine.read_bytes(at, bytes))
    }

    fn write_guest(&self, guest: &GuestMemory, at: Ipa, bytes: &[u8]) -> Result<(), GuestFailure> {
        self.on_page(guest, at, &mut |at| self.machine.write_bytes(at, bytes))
    }
}

impl<P: TablePool, M: Machine> MachineMemory<'_, '_, P, M> {
    /// Calls `f` with where the private page of a guest is that has `at`, while it is mapped.
    fn on_page(&self, guest: &GuestMemory, at: Ipa, f: &mut dyn FnMut(PhysAddr)) -> Result<(), GuestFailure> {
        let offset = at.raw() & PAGE_SIZE.wrapping_sub(1);
        self.memory.with_guest_pages(self.machine, guest, IpaRange::single(at), &mut |run| {
            if let Some(at) = run.base().checked_add(offset) {
                f(at);
            }
        })?;
        Ok(())
    }
}

/// Returns the shape of the stage 2 of a guest; `attributes` have been checked.
fn geometry(attributes: VmAttributes) -> Geometry {
    u32::try_from(attributes.ipa_bits).ok().and_then(Geometry::stage2).unwrap_or(Geometry::EL2)
}

fn refusal(reason: GuestReason, address: u64) -> Refusal {
    let at = |status| Refusal { status, detail: address };
    match reason {
        GuestReason::NotRam => at(Status::NotRam),
        GuestReason::Denied => at(Status::Denied),
        GuestReason::Busy => at(Status::Busy),
        GuestReason::OutOfRange => Status::Overflow.into(),
        GuestReason::TooLarge => Status::TooLarge.into(),
        GuestReason::Exists => at(Status::Exists),
        GuestReason::Absent => at(Status::Absent),
        GuestReason::Poisoned => at(Status::Poisoned),
        GuestReason::NotOffered => at(Status::NotOffered),
        GuestReason::NeedsTables(pages) => {
            Refusal { status: Status::NeedsTables, detail: u64::try_from(pages).unwrap_or(u64::MAX) }
        }
        GuestReason::NoMemory => Status::NoMemory.into(),
    }
}

impl From<Failure> for Refusal {
    fn from(Failure { reason, page }: Failure) -> Self {
        match reason {
            Reason::PinLimit => Self { status: Status::Limit, detail: page.raw() },
            _ => HostFailure::from(Failure { reason, page }).into(),
        }
    }
}

impl From<HostFailure> for Refusal {
    fn from(HostFailure { reason, page }: HostFailure) -> Self {
        refusal(reason, page.raw())
    }
}

impl From<MemoryFailure> for Refusal {
    fn from(MemoryFailure { reason, ipa }: MemoryFailure) -> Self {
        refusal(reason, ipa.raw())
    }
}

impl From<MemoryFailure> for GuestFailure {
    fn from(MemoryFailure { reason, ipa }: MemoryFailure) -> Self {
        match reason {
            GuestReason::Absent => Self::Absent(ipa.page()),
            GuestReason::NeedsTables(pages) => Self::NeedsTables(u64::try_from(pages).unwrap_or(u64::MAX)),
            _ => Self::Refused,
        }
    }
}

// Miri would take long over the tables.
#[cfg(all(test, not(miri)))]
mod tests;
