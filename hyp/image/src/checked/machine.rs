//! The CPU, with guests' calls judged on the way.

use ravelin_abi::Status;
use ravelin_arch::Hardware;
use ravelin_memory::{HypRange, Ipa, IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_model::{Door, GuestCall, RingConversion};
use ravelin_ownership::Conversion;
use ravelin_pgtable::{Hint, Machine, Vttbr};
use ravelin_vm::{
    Context, EntropySource, Entry, GuestCpu, IdRegisters, Left, PageAccess, PstateFeatures, VectorPlaces,
};

use super::{judge, pass_turn, take_turn};

/// The CPU. While it runs a guest it is another CPU's turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checked(pub(crate) Hardware);

/// Returns by which door a guest comes with a call, from ESR_EL2: HVC or SMC of AArch64 without an immediate.
fn door(esr: u64) -> Option<Door> {
    match (esr >> 26 & 0x3f, esr & 0xffff) {
        (0x16, 0) => Some(Door::Hvc),
        (0x17, 0) => Some(Door::Smc),
        _ => None,
    }
}

impl GuestCpu for Checked {
    type Host = <Hardware as GuestCpu>::Host;

    fn enter<H: FnMut(u64, &mut Context) -> bool>(
        &self,
        host: &Self::Host,
        guest: &mut Entry<'_>,
        mut handles: H,
    ) -> Left {
        let root = guest.tree.vttbr.root.page_number();
        pass_turn();
        let left = self.0.enter(host, guest, |esr, context| {
            take_turn();
            let registers = |context: &Context| core::array::from_fn(|index| context.x[index]);
            let before = registers(context);
            let goes_on = handles(esr, context);
            if let Some(door) = door(esr) {
                let call = GuestCall { root, door, before, after: registers(context) };
                judge(|watch, real| watch.guest_call(real, &call));
            }
            pass_turn();
            goes_on
        });
        take_turn();
        left
    }

    fn leave_host(&self, host: &mut Self::Host) -> Result<(), Status> {
        self.0.leave_host(host)
    }

    fn return_to_host(&self, host: &Self::Host) {
        self.0.return_to_host(host);
    }

    fn area_pages(&self) -> u64 {
        self.0.area_pages()
    }

    fn load_vectors(&self, area: PhysRange) {
        self.0.load_vectors(area);
    }

    fn unload_vectors(&self, area: PhysRange) {
        self.0.unload_vectors(area);
    }

    fn guest_vectors(&self, area: PhysRange) -> VectorPlaces {
        self.0.guest_vectors(area)
    }

    fn clear_vectors(&self, area: PhysRange) {
        self.0.clear_vectors(area);
    }

    fn counter(&self) -> u64 {
        self.0.counter()
    }

    fn interrupt_pending(&self, host: &Self::Host) -> bool {
        self.0.interrupt_pending(host)
    }

    fn hold_virtual_timer(&self) -> bool {
        self.0.hold_virtual_timer()
    }

    fn release_virtual_timer(&self) {
        self.0.release_virtual_timer();
    }

    fn list_registers(&self) -> usize {
        self.0.list_registers()
    }

    fn note_conversions(&self, tree: Vttbr, conversions: impl Iterator<Item = (Conversion, bool)>) {
        let number = |address| address / PAGE_SIZE;
        let told = conversions.map(|(Conversion { range, share, released }, done)| {
            let frames = number(range.base().raw())..number(range.end());
            RingConversion { frames, share, released, done }
        });
        judge(|watch, real| watch.ring(real, tree.root.page_number(), told));
    }

    fn note_unpinned(&self, tree: Vttbr, page: Ipa) {
        judge(|watch, real| watch.ring_lost(real, tree.root.page_number(), page.page_number()));
    }

    fn pstate_features(&self) -> PstateFeatures {
        self.0.pstate_features()
    }

    fn id_registers(&self) -> IdRegisters {
        self.0.id_registers()
    }
}

impl EntropySource for Checked {
    fn bits(&self) -> Option<[u64; 3]> {
        self.0.bits()
    }

    fn exists(&self) -> bool {
        self.0.exists()
    }
}

impl PageAccess for Checked {
    fn read_bytes(&self, at: PhysAddr, bytes: &mut [u8]) {
        self.0.read_bytes(at, bytes);
    }

    fn write_bytes(&self, at: PhysAddr, bytes: &[u8]) {
        self.0.write_bytes(at, bytes);
    }

    fn read_words<const N: usize>(&self, at: PhysAddr) -> [u64; N] {
        self.0.read_words(at)
    }

    fn write_words<const N: usize>(&self, at: PhysAddr, words: &[u64; N]) {
        self.0.write_words(at, words);
    }
}

impl Machine for Checked {
    fn read(&self, table: PhysAddr, index: usize) -> u64 {
        self.0.read(table, index)
    }

    fn write(&self, table: PhysAddr, index: usize, value: u64) {
        self.0.write(table, index, value);
    }

    fn clear_table(&self, table: PhysAddr) {
        self.0.clear_table(table);
    }

    fn publish(&self) {
        self.0.publish();
    }

    fn invalidate_stage2(&self, tree: Vttbr, range: IpaRange, leaf_only: bool) {
        self.0.invalidate_stage2(tree, range, leaf_only);
    }

    fn invalidate_stage2_all(&self, tree: Vttbr) {
        self.0.invalidate_stage2_all(tree);
    }

    fn invalidate_el2(&self, range: HypRange) {
        self.0.invalidate_el2(range);
    }

    fn scrub(&self, range: PhysRange) {
        self.0.scrub(range);
    }

    fn clean(&self, range: PhysRange) {
        self.0.clean(range);
    }

    fn write_link(&self, page: PhysAddr, next: u64) {
        self.0.write_link(page, next);
    }

    fn hint(&self, hint: Hint) {
        self.0.hint(hint);
    }
}
