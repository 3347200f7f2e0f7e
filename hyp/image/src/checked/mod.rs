//! The checking build: the model of `tests/model` judges each hypercall and each stage 2 fault of the host, and each call of a
//! guest; the checker of `tests/trace` follows each change of a translation table. SMCs of the host are nobody's to judge.
//!
//! The model knows one step after the other, so the CPUs take turns at EL2: a CPU has its turn from the moment it comes there
//! until it leaves. What it was about is judged, and compared with the tables, before the next one begins, and all of memory at
//! each 256th and at the end. Guests run meanwhile. What this hides, that is two CPUs at EL2 at the same moment, is tested
//! elsewhere: by loom, by tests with threads, and by the same payloads on the ordinary build.

mod heap;
mod machine;
mod start;
mod tables;

use alloc::{format, string::ToString};
use core::{
    hint,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

use ravelin_abi::VmAttributes;
use ravelin_arch::{Hardware, Objects};
use ravelin_hypercall::{HostedVms, Registers};
use ravelin_memory::{HypRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_model::{Difference, Model, Sizes, Watch};
use ravelin_oracle::Observed;
use ravelin_ownership::{GuestMemory, Inconsistency};
use ravelin_pgtable::{El2, El2Usage, MapError, PageTable, TablePool};
use ravelin_vm::{Guest, GuestCpu, Handle, MachineMemory};
use spin::{Mutex, once::Once};
use start::Start;

pub(crate) use machine::Checked;
pub(crate) use tables::follow;

use crate::{
    pool::Pool,
    resident::{Inheritance, MEMORY, VMS, machine},
};

/// Where EL2 sees all of RAM, to look for what should have been scrubbed: that far behind its physical address, for reading.
const WINDOW: u64 = 3 << 46;

/// Exits between two comparisons of all of memory.
const THOROUGH: u64 = 256;

/// Whether a CPU has its turn. No data depend on a turn: they have locks of their own. Turns come in no order: in QEMU, the
/// thread of the CPU whose turn it would be may wait for a processor.
static TAKEN: AtomicBool = AtomicBool::new(false);

static START: Once<Start> = Once::new();

static WATCH: Mutex<Option<Watch>> = Mutex::new(None);

/// What is real.
type Real<'a> = Observed<'a, 'static, Pool, Checked, Objects>;

/// Maps RAM where [`is_zero`] reads it.
pub(crate) fn map_window<P: TablePool>(
    machine: &Hardware,
    pool: &mut P,
    el2: &mut PageTable<El2>,
    ram: &[PhysRange],
) -> Result<(), MapError> {
    ram.iter().try_for_each(|region| {
        let window = HypRange::new(WINDOW + region.base().raw(), region.pages()).map_err(|_| MapError::OutOfRange)?;
        el2.map(machine, pool, window, region.base(), El2Usage::Rodata)
    })
}

/// Begins to watch, before the host runs; translation tables are followed here unless the trace is written out. The model lives
/// in pages of `pool`.
pub(crate) fn begin(machine: &Hardware, inheritance: &mut Inheritance) {
    let Inheritance { pool, ram, layout, el2, trace, .. } = inheritance;
    heap::fill(pool);
    if !*trace {
        tables::begin(machine, el2.root());
    }
    let (ram, carve_out) = (&*ram, layout.carve_out);
    START.call_once(|| Start::new(machine, ram, carve_out, el2));
    let bytes = |range: PhysRange| -> Range<u64> { range.base().raw()..range.end() };
    let model = Model::new(ram.iter().copied().map(bytes), bytes(carve_out), sizes);
    *WATCH.lock() = Some(Watch::new(model, THOROUGH));
}

/// What VM_SIZES says. The hypervisor is asked, because how large its objects are is up to it.
fn sizes(attributes: VmAttributes) -> Sizes {
    let area = machine().map_or(0, |machine| machine.area_pages());
    let (vm, vcpu, alignment) = HostedVms::<Objects>::sizes::<MachineMemory<'_, '_, Pool, Hardware>>(attributes, area);
    Sizes { vm, vcpu, alignment }
}

/// Waits until no other CPU has its turn, and begins this one's.
pub(crate) fn take_turn() {
    while TAKEN.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
        hint::spin_loop();
    }
}

/// Ends this CPU's turn.
pub(crate) fn pass_turn() {
    TAKEN.store(false, Ordering::Release);
}

/// Judges a call of the host that has been handled in this CPU's turn, which ends.
pub(crate) fn host_call(immediate: u16, before: &Registers, after: &Registers) {
    let before = core::array::from_fn(|index| before[index]);
    let after = core::array::from_fn(|index| after[index]);
    judge(|watch, real| watch.host_call(real, immediate, before, after));
    pass_turn();
}

/// Judges a fault of the host that has been handled in this CPU's turn, which ends.
pub(crate) fn host_fault(address: u64, given: bool) {
    judge(|watch, real| watch.host_fault(real, address, given));
    pass_turn();
}

fn start() -> &'static Start {
    START.get().expect("the host runs")
}

/// Stops the machine if the model says something else.
fn judge(judge: impl FnOnce(&mut Watch, &Real<'_>) -> Result<(), Difference>) {
    let memory = MEMORY.get().expect("the host runs");
    let real = Observed { memory, machine: machine().expect("the host runs"), vms: &VMS, is_zero: &is_zero };
    let mut watch = WATCH.lock();
    let watch = watch.as_mut().expect("the host runs");
    let judged = judge(watch, &real)
        .and_then(|()| if watch.exits().is_multiple_of(THOROUGH) { consistent(watch.model(), &real) } else { Ok(()) });
    if let Err(difference) = judged {
        panic!("the model differs: {difference}\n{}", watch.model().account(&real));
    }
}

/// Looks at what the hypervisor notes to be quicker, which the model does not know.
fn consistent(model: &Model, real: &Real<'_>) -> Result<(), Difference> {
    let differs = |inconsistency: Inconsistency| Difference(inconsistency.to_string());
    real.memory.check(real.machine).map_err(differs)?;
    model.state.vms.keys().try_for_each(|&handle| {
        let check = |guest: &Guest<GuestMemory>| real.memory.check_guest(real.machine, guest.memory()).map_err(differs);
        let refused = |refusal| Err(Difference(format!("VM {handle:#x} cannot be looked at: {refusal:?}")));
        real.vms.with_guest(Handle::from_raw(handle), check).unwrap_or_else(refused)
    })?;
    start().compare(real.memory, real.machine)
}

/// Looks at everything once more and says what has been seen, before the host turns the machine off by `SMC #immediate`.
pub(crate) fn before_smc(immediate: u16, registers: &Registers) {
    const SYSTEM_OFF: u64 = 0x8400_0008;
    const SYSTEM_RESET: u64 = 0x8400_0009;
    if immediate != 0 || !matches!(registers[0], SYSTEM_OFF | SYSTEM_RESET) {
        return;
    }
    take_turn();
    judge(|watch, real| {
        watch.model().compare_all(real)?;
        consistent(watch.model(), real)?;
        log::info!("model: calls {}", watch.exits());
        for (reached, count) in watch.reached() {
            log::info!("model: reached {reached} {count}");
        }
        Ok(())
    });
    pass_turn();
}

/// Returns whether a page of RAM holds nothing but zeroes.
fn is_zero(page: PhysAddr) -> bool {
    assert!(start().is_ram(page), "{page} is not RAM");
    let start = core::ptr::with_exposed_provenance::<u64>((WINDOW + page.raw()) as usize);
    (0..PAGE_SIZE as usize / size_of::<u64>()).all(|index| {
        // SAFETY: The window maps all of RAM, where the page is, and the index stays in the page. Whoever else has the page may
        // write to it.
        let word = unsafe { start.wrapping_add(index).read_volatile() };
        word == 0
    })
}
