//! A CPU whose guests do what a script says, and which insists on its order.

use std::{
    cell::{RefCell, RefMut},
    collections::{BTreeMap, VecDeque},
    mem::take,
    ops::RangeInclusive,
};

use ravelin_abi::Status;
use ravelin_memory::{PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_pgtable::Tree;
use ravelin_vgic::{ListRegisters, ich};

use crate::{
    Context, EntropySource, Entry, GuestCpu, IdRegisters, Left, PageAccess, PstateFeatures, VectorPlaces, Vectors,
};

/// Registers that the host has in the CPU, less what a guest runs with. Not to be copied: it is taken out once and put back once.
#[derive(Default)]
pub(super) struct Host(u64);

/// What a guest was entered with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entered {
    pub(super) context: Context,
    pub(super) gic: ListRegisters,
    pub(super) tree: Tree,
    pub(super) vectors: Vectors,
    pub(super) deadline: Option<u64>,
}

/// What a guest does until it comes to EL2.
type Step = Box<dyn FnOnce(&FakeCpu, &mut Entry<'_>) -> Left>;

/// What has been asked of the CPU, besides entering guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    LoadVectors(PhysRange),
    UnloadVectors(PhysRange),
    ClearVectors(PhysRange),
    HoldTimer,
    ReleaseTimer,
}

pub(super) struct State {
    script: VecDeque<Step>,
    pub(super) entered: Vec<Entered>,
    pub(super) calls: Vec<Call>,
    /// Number of the host's registers that are out of the CPU.
    away: Option<u64>,
    times_away: u64,
    /// Where the vector registers of a guest that are in the CPU come from.
    vectors: Option<PhysRange>,
    /// The interrupt of the virtual timer is active.
    pub(super) timer_held: bool,
    /// It is pending.
    pub(super) timer_waits: bool,
    /// Another one is, for the host.
    pub(super) host_waits: bool,
    /// When the host's virtual timer fires.
    pub(super) host_deadline: Option<u64>,
    pub(super) now: u64,
    /// How far the counter goes each time that it is read.
    pub(super) pace: u64,
    pub(super) ids: IdRegisters,
    pub(super) entropy: Option<[u64; 3]>,
    /// What the host is told when it wants a guest to run.
    pub(super) refuses: Option<Status>,
    pages: BTreeMap<u64, Box<[u8; PAGE_SIZE as usize]>>,
    /// Where bytes have been read, and how many.
    pub(super) reads: Vec<(u64, usize)>,
    /// What the host overwrites a page with as soon as anything of it has been read.
    pub(super) overwrite: Option<u8>,
}

pub(super) struct FakeCpu(RefCell<State>);

impl FakeCpu {
    pub(super) fn new() -> Self {
        // FP, AdvSIMD, SVE.
        let ids = IdRegisters { id_aa64pfr0_el1: 1 << 32 | 0x11, ..IdRegisters::default() };
        Self(RefCell::new(State {
            script: VecDeque::new(),
            entered: Vec::new(),
            calls: Vec::new(),
            away: None,
            times_away: 0,
            vectors: None,
            timer_held: false,
            timer_waits: false,
            host_waits: false,
            host_deadline: None,
            now: 1000,
            pace: 0,
            ids,
            entropy: None,
            refuses: None,
            pages: BTreeMap::new(),
            reads: Vec::new(),
            overwrite: None,
        }))
    }

    pub(super) fn state(&self) -> RefMut<'_, State> {
        self.0.borrow_mut()
    }

    /// Has the guest do this next. When there is nothing left to do, an interrupt for the host comes.
    pub(super) fn then(&self, step: impl FnOnce(&Self, &mut Entry<'_>) -> Left + 'static) {
        self.state().script.push_back(Box::new(step));
    }

    pub(super) fn page(&self, page: u64) -> [u8; PAGE_SIZE as usize] {
        *self.state().page(page)
    }

    pub(super) fn set_page(&self, at: u64, bytes: &[u8]) {
        let offset = (at % PAGE_SIZE) as usize;
        self.state().page(at)[offset..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Returns what guests were entered with since it was last asked.
    pub(super) fn entered(&self) -> Vec<Entered> {
        take(&mut self.state().entered)
    }

    /// Returns what has been asked of it since it was last asked.
    pub(super) fn calls(&self) -> Vec<Call> {
        take(&mut self.state().calls)
    }

    pub(super) fn left_to_do(&self) -> usize {
        self.state().script.len()
    }

    /// Demands that the CPU is the host's as it was.
    pub(super) fn assert_is_the_hosts(&self) {
        let state = self.state();
        assert_eq!((state.away, state.vectors, state.timer_held), (None, None, false));
    }
}

impl FakeCpu {
    fn enter_once(&self, &Host(number): &Host, guest: &mut Entry<'_>) -> Left {
        let mut state = self.state();
        assert_eq!(state.away, Some(number));
        assert_eq!(state.vectors.is_some(), guest.vectors != Vectors::None);
        assert_ne!(guest.gic.hcr & ich::HCR_EN, 0, "the interrupt controller does not know that it runs");
        assert!(guest.deadline.is_none_or(|deadline| deadline > state.now));
        state.entered.push(Entered {
            context: *guest.context,
            gic: *guest.gic,
            tree: *guest.tree,
            vectors: guest.vectors,
            deadline: guest.deadline,
        });
        if state.host_waits {
            return Left::Interrupt;
        }
        let step = state.script.pop_front();
        state.host_waits = step.is_none();
        drop(state);
        step.map_or(Left::Interrupt, |step| step(self, guest))
    }
}

/// The general-purpose registers that are in the CPU while a call is handled.
const PRESERVED: RangeInclusive<usize> = 19..=28;

/// What is in a context while its registers are in the CPU.
fn elsewhere(context: &Context, is_call: bool) -> Context {
    let &Context { mut x, pc, pstate, .. } = context;
    if is_call {
        x[PRESERVED].fill(0xbad);
    }
    Context {
        x,
        pc,
        pstate,
        sp_el0: 0xbad,
        sctlr_el1: u64::MAX,
        vbar_el1: 0xbad,
        cntv_ctl_el0: 1,
        cntp_ctl_el0: 1,
        ..Context::default()
    }
}

impl State {
    fn page(&mut self, at: u64) -> &mut [u8; PAGE_SIZE as usize] {
        self.pages.entry(at / PAGE_SIZE).or_insert_with(|| Box::new([0; PAGE_SIZE as usize]))
    }
}

impl GuestCpu for FakeCpu {
    type Host = Host;

    fn leave_host(&self, host: &mut Host) -> Result<(), Status> {
        let mut state = self.state();
        assert_eq!(state.away, None);
        if let Some(status) = state.refuses {
            return Err(status);
        }
        state.times_away += 1;
        state.away = Some(state.times_away);
        *host = Host(state.times_away);
        Ok(())
    }

    fn return_to_host(&self, &Host(number): &Host) {
        let mut state = self.state();
        assert_eq!(state.away, Some(number));
        assert_eq!((state.vectors, state.timer_held), (None, false), "the guest still has them");
        state.away = None;
        state.host_waits = false;
    }

    fn enter<H: FnMut(u64, &mut Context) -> bool>(&self, host: &Host, guest: &mut Entry<'_>, mut handles: H) -> Left {
        loop {
            let left = self.enter_once(host, guest);
            let Left::Synchronous(syndrome) = left else { return left };
            // What is in the CPU is not in the context.
            let before = *guest.context;
            let is_call = matches!(syndrome.esr >> 26 & 0x3f, 0x16 | 0x17);
            *guest.context = elsewhere(&before, is_call);
            let handled = handles(syndrome.esr, guest.context);
            assert_eq!(*guest.context, elsewhere(guest.context, is_call));
            let Context { mut x, pc, pstate, .. } = *guest.context;
            if is_call {
                x[PRESERVED].copy_from_slice(&before.x[PRESERVED]);
            }
            *guest.context = Context { x, pc, pstate, ..before };
            if !handled {
                return left;
            }
        }
    }

    fn area_pages(&self) -> u64 {
        1
    }

    fn load_vectors(&self, area: PhysRange) {
        let mut state = self.state();
        assert!(state.away.is_some());
        assert_eq!(state.vectors.replace(area), None);
        state.calls.push(Call::LoadVectors(area));
    }

    fn unload_vectors(&self, area: PhysRange) {
        let mut state = self.state();
        assert_eq!(state.vectors.take(), Some(area));
        state.calls.push(Call::UnloadVectors(area));
    }

    fn guest_vectors(&self, area: PhysRange) -> VectorPlaces {
        let at = |offset| area.base().checked_add(offset).unwrap();
        VectorPlaces { status: at(0x800), first: at(0x820), stride: 32 }
    }

    fn clear_vectors(&self, area: PhysRange) {
        let mut state = self.state();
        assert_eq!(state.vectors, None, "those in the CPU would come back");
        state.page(area.base().raw()).fill(0);
        state.calls.push(Call::ClearVectors(area));
    }

    fn counter(&self) -> u64 {
        let mut state = self.state();
        state.now += state.pace;
        state.now
    }

    fn interrupt_pending(&self, &Host(number): &Host) -> bool {
        let state = self.state();
        assert_eq!(state.away, Some(number));
        state.host_waits || state.timer_waits || state.host_deadline.is_some_and(|deadline| deadline <= state.now)
    }

    fn hold_virtual_timer(&self) -> bool {
        let mut state = self.state();
        assert!(state.away.is_some() && !state.timer_held);
        // The host's comes first.
        let held = state.timer_waits && !state.host_waits;
        if held {
            state.calls.push(Call::HoldTimer);
            (state.timer_held, state.timer_waits) = (true, false);
        }
        held
    }

    fn release_virtual_timer(&self) {
        let mut state = self.state();
        assert!(state.away.is_some() && take(&mut state.timer_held));
        state.calls.push(Call::ReleaseTimer);
    }

    fn list_registers(&self) -> usize {
        4
    }

    fn pstate_features(&self) -> PstateFeatures {
        PstateFeatures::default()
    }

    fn id_registers(&self) -> IdRegisters {
        self.state().ids
    }
}

impl EntropySource for FakeCpu {
    fn bits(&self) -> Option<[u64; 3]> {
        self.state().entropy
    }

    fn exists(&self) -> bool {
        self.state().entropy.is_some()
    }
}

impl PageAccess for FakeCpu {
    fn read_bytes(&self, at: PhysAddr, bytes: &mut [u8]) {
        let mut state = self.state();
        let offset = (at.raw() % PAGE_SIZE) as usize;
        bytes.copy_from_slice(&state.page(at.raw())[offset..][..bytes.len()]);
        state.reads.push((at.raw(), bytes.len()));
        if let Some(byte) = state.overwrite {
            state.page(at.raw()).fill(byte);
        }
    }

    fn write_bytes(&self, at: PhysAddr, bytes: &[u8]) {
        self.set_page(at.raw(), bytes);
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
