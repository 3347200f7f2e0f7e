//! What VMs are made of: the transitions of memory between host, hypervisor and guests.

use ravelin_abi::VmAttributes;
use ravelin_memory::{Ipa, IpaRange, PhysAddr, PhysRange};

use ravelin_ownership::{Batch, Conversion, GuestPage};
use ravelin_pgtable::Tree;

use crate::Refusal;

/// The transitions of memory that VMs take part in, on the CPU that runs.
///
/// Each is all or nothing, and takes the locks that it needs for itself. What takes too long at once is refused, or, where a
/// number of pages is returned, done in part.
pub trait Transitions {
    /// A guest's memory: its stage 2 and the pages for its tables.
    type Guest: Send + Sync;

    /// Makes pages of the host the hypervisor's, mapped writable in its stage 1, until it returns them.
    ///
    /// # Errors
    ///
    /// Those of the host call DONATE.
    fn keep(&self, range: PhysRange) -> Result<(), Refusal>;

    /// Undoes a [`Transitions::keep`] of the same range; nothing is in them any more. The pages are scrubbed.
    fn give_back(&self, range: PhysRange);

    /// Lends a page of the host's to the hypervisor and maps it writable in its stage 1, so that the host can neither end the
    /// loan nor give the page away.
    ///
    /// # Errors
    ///
    /// Those of the host calls SHARE and PIN.
    fn borrow_page(&self, page: PhysAddr) -> Result<(), Refusal>;

    /// Undoes a [`Transitions::borrow_page`].
    fn return_page(&self, page: PhysAddr);

    /// Returns how many pages a guest of these attributes needs for the root of its stage 2: a power of two.
    fn root_pages(attributes: VmAttributes) -> u64;

    /// Returns an empty guest with the VMID `slot + 1`. The root of its stage 2 is in `root`, which the hypervisor owns: as
    /// many pages as [`Transitions::root_pages`] says.
    ///
    /// # Errors
    ///
    /// DENIED unless the root is kept and aligned to its size.
    fn new_guest(&self, slot: usize, attributes: VmAttributes, root: PhysRange) -> Result<Self::Guest, Refusal>;

    /// Is told that nothing uses the root of the guest's stage 2 any more, and that it is about to be given back.
    fn end_of_root(&self, _guest: &Self::Guest) {}

    /// Returns root, VMID and shape of a guest's stage 2.
    fn tree<'a>(&self, guest: &'a Self::Guest) -> &'a Tree;

    /// Gives a guest pages of the host for its tables.
    ///
    /// # Errors
    ///
    /// Those of the host call VM_DONATE_TABLES.
    fn donate_tables(&self, guest: &Self::Guest, range: PhysRange) -> Result<(), Refusal>;

    /// Puts pages of the host into a guest's memory: a protected one becomes their owner, an ordinary one borrows them.
    ///
    /// # Errors
    ///
    /// Those of the host call VM_MAP.
    fn map(&self, guest: &Self::Guest, range: PhysRange, at: Ipa) -> Result<(), Refusal>;

    /// As [`Transitions::map`], for a protected guest that does not run before all of the pages have been read with
    /// [`Transitions::read_pages`]: only then do they hold for a guest with its caches off what the host has written.
    ///
    /// # Errors
    ///
    /// As [`Transitions::map`].
    fn map_to_measure(&self, guest: &Self::Guest, range: PhysRange, at: Ipa) -> Result<(), Refusal> {
        self.map(guest, range, at)
    }

    /// Takes borrowed pages from an ordinary guest.
    ///
    /// # Errors
    ///
    /// Those of the host call VM_UNMAP.
    fn unmap(&self, guest: &Self::Guest, range: IpaRange) -> Result<(), Refusal>;

    /// Gives the host access to what a guest has offered.
    ///
    /// # Errors
    ///
    /// Those of the host call CLAIM.
    fn claim(&self, guest: &Self::Guest, range: IpaRange) -> Result<(), Refusal>;

    /// Ends the host's access to what it has claimed.
    ///
    /// # Errors
    ///
    /// Those of the host call RELEASE.
    fn release(&self, guest: &Self::Guest, range: IpaRange) -> Result<(), Refusal>;

    /// Returns the slot of the VM that owned a page, or had borrowed it, a moment ago.
    fn owner(&self, page: PhysAddr) -> Option<usize>;

    /// Takes private pages of a guest from it, scrubs them and returns them to the host; their frames are poisoned.
    ///
    /// # Errors
    ///
    /// Those of the host call FORCE_RECLAIM; DENIED also for pages of another guest.
    fn force_reclaim(&self, guest: &Self::Guest, range: PhysRange) -> Result<(), Refusal>;

    /// Says that a guest never runs again.
    fn kill(&self, guest: &Self::Guest);

    /// Returns pages of a guest that never runs again to the host: those in the first frames of `range`. Returns how many
    /// frames that was, with a page or without.
    ///
    /// # Errors
    ///
    /// Those of the host call VM_RECLAIM.
    fn reclaim(&self, guest: &Self::Guest, range: IpaRange) -> Result<u64, Refusal>;

    /// Returns up to `most` pages for tables of a guest that never runs again to the host, scrubbed, and then how many are left.
    /// With the last of them, nothing that hardware has cached of the guest is left either. The root stays.
    ///
    /// # Errors
    ///
    /// BUSY if it has other pages; NO_MEMORY.
    fn return_tables(&self, guest: &Self::Guest, most: u64) -> Result<u64, Refusal>;

    /// Calls `read` with the contents of private pages, the first ones of `range`, in order and in pieces that divide a page.
    /// Returns how many pages; at least one. The guest does not run.
    ///
    /// # Errors
    ///
    /// NO_MEMORY, and what the frames are if they are not private.
    fn read_pages(&self, guest: &Self::Guest, range: IpaRange, read: &mut dyn FnMut(&[u8])) -> Result<u64, Refusal>;

    /// Does with few instructions what most calls of pKVM guests are about: offers a page or a block to the host (`share`), or makes
    /// it the guest's alone again. Returns whether it has. If not, nothing has changed, and [`Transitions::share`] and
    /// [`Transitions::unshare`] do more or say why.
    fn exchange(&self, guest: &Self::Guest, range: IpaRange, share: bool) -> bool;

    /// Offers pages of a guest to the host, the first pages of the range. Returns how many; at least one.
    ///
    /// # Errors
    ///
    /// See [`GuestFailure`]; nothing has changed.
    fn share(&self, guest: &Self::Guest, range: IpaRange) -> Result<u64, GuestFailure>;

    /// Makes offered pages the guest's alone again, the first pages of the range. Returns how many; at least one. Of a realm,
    /// frames that are not offered, also absent ones, are passed over.
    ///
    /// # Errors
    ///
    /// See [`GuestFailure`]; nothing has changed.
    fn unshare(&self, guest: &Self::Guest, range: IpaRange) -> Result<u64, GuestFailure>;

    /// Gives private pages of a guest up, the first pages of the range: they are scrubbed and the host's again. Poisoned frames
    /// lose their poison. Returns how many; at least one.
    ///
    /// # Errors
    ///
    /// See [`GuestFailure`]; nothing has changed.
    fn relinquish(&self, guest: &Self::Guest, range: IpaRange) -> Result<u64, GuestFailure>;

    /// Makes the first of these conversions of a pKVM guest's pages, each as a whole, as far as one call goes: at least one. `None`
    /// stands for one that is refused. `conversions` calls nothing here.
    fn convert(&self, guest: &Self::Guest, conversions: &mut dyn Iterator<Item = Option<Conversion>>) -> Batch;

    /// Gives the hypervisor access to a private page of a guest, which can do nothing else with it meanwhile. Returns where it is
    /// mapped writable in the hypervisor's stage 1.
    ///
    /// # Errors
    ///
    /// See [`GuestFailure`]; nothing has changed.
    fn pin_page(&self, guest: &Self::Guest, page: Ipa) -> Result<PhysAddr, GuestFailure>;

    /// Undoes a [`Transitions::pin_page`] of a guest that is not dying. Of one that is, [`Transitions::reclaim`] does.
    fn unpin_page(&self, guest: &Self::Guest, page: Ipa);

    /// Returns what the first frame of a range is to the guest, and how many frames from there on are known to be the same;
    /// at least one.
    fn look(&self, guest: &Self::Guest, range: IpaRange) -> (GuestPage, u64);

    /// Copies from a private page of the guest. `bytes` does not cross the end of the page. Other vCPUs may write there at the
    /// same time.
    ///
    /// # Errors
    ///
    /// See [`GuestFailure`]: the frame is not private.
    fn read_guest(&self, guest: &Self::Guest, at: Ipa, bytes: &mut [u8]) -> Result<(), GuestFailure>;

    /// Copies to a private page of the guest, as [`Transitions::read_guest`].
    ///
    /// # Errors
    ///
    /// See [`GuestFailure`]: the frame is not private.
    fn write_guest(&self, guest: &Self::Guest, at: Ipa, bytes: &[u8]) -> Result<(), GuestFailure>;
}

/// Why a transition that a guest wants does not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestFailure {
    /// There is no page in this frame. The host may put one there.
    Absent(Ipa),
    /// The host has claimed pages of this range and must release them first.
    Claimed(IpaRange),
    /// This many pages for tables are missing.
    NeedsTables(u64),
    /// A frame is poisoned, or not in the state that the transition starts from.
    Refused,
}
