//! A guest's calls, by pKVM's door and by the realm's, with a host that maps, claims, releases and takes.

use arbitrary::{Arbitrary, Unstructured};
use ravelin_abi::{ExitReason, PAGE_SIZE, RunEntry, RunExit, Status, VmAttributes, VmKind};
use ravelin_memory::PhysAddr;
use ravelin_ownership::{Counts, HostState, PageReport};
use ravelin_pgtable::recording::Stage;
use ravelin_world::{Action, CALL_REGISTERS, Door, Happened, Layout, Outcome, World, call, in_world, number};

/// Operations that are worth the time of one input.
const LIMIT: usize = 40;

/// Little memory, all of which is looked at again and again.
const LAYOUT: Layout = Layout {
    ram: METADATA..METADATA + 0x40_0000,
    carve_out: CARVE_OUT..CARVE_OUT + 0x20_0000,
    pool_pages: 64,
    cpus: 1,
};

const METADATA: u64 = 0x4000_0000;
const VCPU: u64 = METADATA + 0x10_0000;
const RUN_PAGE: u64 = METADATA + 0x18_0000;
const TABLES: u64 = METADATA + 0x1c_0000;
const PAYLOAD: u64 = METADATA + 0x1e_0000;
const CARVE_OUT: u64 = METADATA + 0x20_0000;

/// Where the guest's memory begins, and how many pages it has at first.
const GUEST: u64 = 0x8000_0000;
const PAGES: u64 = 16;

/// In a realm, the addresses of what is shared.
const SHARED_BIT: u64 = 1 << 39;

#[derive(Arbitrary, Debug)]
struct Input {
    kind: u8,
    /// Pages for tables, which may be too few.
    tables: u8,
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug)]
enum Op {
    Call { smc: bool, function: Function, arguments: [Argument; 3], others: u64, answer: u8 },
    Load { page: u8, shared: bool },
    Store { page: u8, shared: bool, value: u8 },
    Map { page: u8, pages: u8 },
    Claim(u8, u8),
    Release(u8, u8),
    ForceReclaim(u8, u8),
    HostStore(u8, u8),
    Tables(u8),
}

#[derive(Arbitrary, Debug)]
enum Function {
    Known(u8),
    Any(u32),
}

#[derive(Arbitrary, Debug)]
enum Argument {
    Zero,
    Small(u8),
    Page(u8),
    Alias(u8),
    Version,
    Any(u64),
}

const UID: u32 = 0x8600_ff01;
const FEATURES: u32 = 0x8600_0000;
const MEMINFO: u32 = 0xc600_0002;
const SHARE: u32 = 0xc600_0003;
const UNSHARE: u32 = 0xc600_0004;
const GUARD: u32 = 0xc600_0007;
const RELINQUISH: u32 = 0xc600_0009;
const RSI_VERSION: u32 = 0xc400_0190;
const RSI_FEATURES: u32 = 0xc400_0191;
const MEASUREMENT_READ: u32 = 0xc400_0192;
const MEASUREMENT_EXTEND: u32 = 0xc400_0193;
const REALM_CONFIG: u32 = 0xc400_0196;
const STATE_SET: u32 = 0xc400_0197;
const STATE_GET: u32 = 0xc400_0198;
const HOST_CALL: u32 = 0xc400_0199;
const TRNG_RND: u32 = 0xc400_0053;

const FUNCTIONS: [u32; 18] = [
    UID,
    FEATURES,
    MEMINFO,
    SHARE,
    UNSHARE,
    GUARD,
    RELINQUISH,
    RSI_VERSION,
    RSI_FEATURES,
    MEASUREMENT_READ,
    MEASUREMENT_EXTEND,
    REALM_CONFIG,
    STATE_SET,
    STATE_GET,
    HOST_CALL,
    TRNG_RND,
    // PSCI_VERSION, AFFINITY_INFO.
    0x8400_0000,
    0xc400_0004,
];

const NOT_SUPPORTED: u64 = u64::MAX;
const INVALID_PARAMETER: u64 = u64::MAX - 2;

impl Argument {
    fn value(&self) -> u64 {
        match *self {
            Self::Zero => 0,
            Self::Small(number) => number.into(),
            Self::Page(page) => frame(page),
            Self::Alias(page) => SHARED_BIT | frame(page),
            Self::Version => 1 << 16,
            Self::Any(value) => value,
        }
    }
}

/// A guest's page, with as many again that have nothing behind them at first.
fn frame(page: u8) -> u64 {
    GUEST + u64::from(page) % (2 * PAGES) * PAGE_SIZE
}

/// The page of RAM that is put behind it.
fn payload(frame: u64) -> u64 {
    PAYLOAD + (frame - GUEST)
}

/// A VM of one vCPU.
struct Vm<'w, 'm> {
    world: &'w World<'m>,
    kind: VmKind,
    handle: u64,
    /// What each page of the payload holds, as whoever wrote last knows; `None` if a guest has given it up, or what was there.
    contents: Vec<Option<u64>>,
    /// Whether the vCPU was left at a call that waits.
    waits: bool,
}

type Look = (Vec<PageReport>, Counts);

/// Has a guest call and a host interfere, and checks after each step that tables agree with the ownership table, that results
/// are about what was asked for, that what fails has changed nothing, and that a guest's private pages keep their contents.
pub fn guest_calls(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    in_world(&LAYOUT, |world| {
        let kind = [VmKind::Pkvm, VmKind::Realm, VmKind::Ordinary][usize::from(input.kind % 3)];
        let mut vm = Vm::new(world, kind, u64::from(input.tables % 16) + 4);
        for op in input.ops.iter().take(LIMIT) {
            vm.perform(op);
            world.is_consistent();
            vm.check_contents();
        }
    });
}

impl<'w, 'm> Vm<'w, 'm> {
    fn new(world: &'w World<'m>, kind: VmKind, tables: u64) -> Self {
        let attributes = VmAttributes { kind, ipa_bits: 40, vcpus: 1 }.bits();
        // Other tests check each of these; here there is time for once.
        let does = |name: &str, arguments: &[u64]| {
            let answer = world.hvc(call(name, arguments));
            assert_eq!(answer[0], Status::Success.register(), "{name}");
            answer
        };
        let [_, pages, vcpu_pages, _] = does("VM_SIZES", &[attributes]);
        let [_, handle, ..] = does("VM_CREATE", &[attributes, METADATA, pages]);
        does("VM_DONATE_TABLES", &[handle, TABLES, tables]);
        does("VCPU_CREATE", &[handle, 0, VCPU, vcpu_pages, RUN_PAGE]);
        let contents = (0..2 * PAGES).map(|page| 0xc0de_0000 + page);
        for (page, contents) in (0..).zip(contents.clone()) {
            assert!(world.store(PAYLOAD + page * PAGE_SIZE, contents));
        }
        does("VM_MAP", &[handle, GUEST, PAYLOAD, PAGES]);
        does("VM_SEAL", &[handle, GUEST, GUEST + 8, 0x800_0000, 0x80a_0000]);
        Self { world, kind, handle, contents: contents.map(Some).collect(), waits: false }
    }

    fn perform(&mut self, op: &Op) {
        let address = |page: u8, shared: bool| frame(page) | if shared { SHARED_BIT } else { 0 };
        match op {
            Op::Call { smc, function, arguments, others, answer } => {
                let function = match function {
                    Function::Known(index) => FUNCTIONS[usize::from(*index) % FUNCTIONS.len()],
                    Function::Any(function) => *function,
                };
                // Ending and turning off are for other targets: nothing would happen from then on.
                if function >> 16 & 0xbfff == 0x8400 && matches!(function & 0xffff, 1 | 2 | 8 | 9) {
                    return;
                }
                let mut registers: [u64; CALL_REGISTERS] =
                    std::array::from_fn(|n| others.rotate_left(8 * n as u32) ^ n as u64);
                registers[0] = function.into();
                for (register, argument) in registers[1..].iter_mut().zip(arguments) {
                    *register = argument.value();
                }
                self.call(if *smc { Door::Smc } else { Door::Hvc }, registers, (*answer).into());
            }
            Op::Load { page, shared } => self.access(Action::Load(address(*page, *shared))),
            Op::Store { page, shared, value } => {
                self.access(Action::Store(address(*page, *shared), (*value).into()));
            }
            Op::Map { page, pages } => {
                let (at, pages) = (frame(*page), u64::from(pages % 16));
                let _ = self.host("VM_MAP", &[self.handle, at, payload(at), pages]);
            }
            Op::Claim(page, pages) => {
                let _ = self.host("CLAIM", &[self.handle, frame(*page), u64::from(pages % 16)]);
            }
            Op::Release(page, pages) => {
                let _ = self.host("RELEASE", &[self.handle, frame(*page), u64::from(pages % 16)]);
            }
            Op::ForceReclaim(page, pages) => {
                let (page, pages) = (payload(frame(*page)), u64::from(pages % 16));
                if self.host("FORCE_RECLAIM", &[page, pages]) == Status::Success.register() {
                    self.hold(page, pages, Some(0));
                }
            }
            Op::HostStore(page, value) => {
                let page = payload(frame(*page));
                if self.world.store(page, (*value).into()) {
                    self.hold(page, 1, Some((*value).into()));
                }
            }
            Op::Tables(pages) => {
                let used = u64::from(pages % 32);
                let _ = self.host("VM_DONATE_TABLES", &[self.handle, TABLES + 16 * PAGE_SIZE + used * PAGE_SIZE, 1]);
            }
        }
    }

    /// Makes a call of the host, which may fail. Returns its status.
    fn host(&self, name: &str, arguments: &[u64]) -> u64 {
        let [status, ..] = self.world.hvc(call(name, arguments));
        status
    }

    fn index(&self, page: u64) -> Option<usize> {
        Some((page.checked_sub(PAYLOAD)? / PAGE_SIZE) as usize)
    }

    /// Notes what pages hold from now on, those of them that are of the payload.
    fn hold(&mut self, page: u64, pages: u64, contents: Option<u64>) {
        let Some(first) = self.index(page) else { return };
        self.contents.iter_mut().skip(first).take(pages as usize).for_each(|held| *held = contents);
    }

    /// What the guest has at an address.
    fn translate(&self, at: u64) -> Option<u64> {
        let found = self.world.machine.translate(Stage::Guest(World::vmid(self.handle)), at)?;
        Some(found.page().raw())
    }

    /// Runs the vCPU, with an answer to its last exit. Returns what the host is told, if it ran, and what the guest has done.
    fn run(&mut self, actions: impl IntoIterator<Item = Action>, answer: u64) -> (Option<RunExit>, Vec<Happened>) {
        let world = self.world;
        world.machine.set_actions(actions);
        world.answer(RUN_PAGE, &RunEntry { answer, ..RunEntry::default() });
        let [status, ..] = world.hvc([number("VCPU_RUN"), self.handle, 0]);
        let happened = world.machine.take_happened();
        for it in &happened {
            if let (Action::Call(Door::Hvc, [call, base, ..]), Outcome::Handled([0, done, ..])) =
                (it.action, it.outcome)
                && call == RELINQUISH.into()
            {
                self.hold(payload(base), done.max(1), None);
            }
        }
        ((status == Status::Success.register()).then(|| world.exit(RUN_PAGE)), happened)
    }

    /// Has the guest access memory or a device.
    fn access(&mut self, action: Action) {
        let (Action::Load(at) | Action::Store(at, _)) = action else { return };
        if !self.goes_on() {
            return;
        }
        let found = self.translate(at);
        let (exit, happened) = self.run([action], 0);
        for it in happened {
            if it.action != action {
                continue;
            }
            let Outcome::Accessed(held) = it.outcome else { continue };
            let page = found.expect("the guest reaches nothing that is not there");
            if let Some(expected) = self.index(page).and_then(|index| self.contents[index]) {
                assert_eq!(held, expected, "{at:#x}");
            }
            if let Action::Store(_, value) = action {
                self.hold(page, 1, Some(value.into()));
            }
        }
        // What is open now would be tried again at the next run.
        if let Some(exit) = exit.filter(|exit| exit.reason != ExitReason::Interrupted.code()) {
            assert_eq!((found, exit.address & !0xfff), (None, at & !0xfff), "{exit:x?}");
            self.run([], 2);
        }
    }

    /// Has the guest call, answers once what the host is asked, and checks what the guest has got.
    fn call(&mut self, door: Door, registers: [u64; CALL_REGISTERS], answer: u64) {
        if !self.goes_on() {
            return;
        }
        let before = self.world.look();
        let action = Action::Call(door, registers);
        let (Some(exit), happened) = self.run([action], 0) else { return };
        self.check_exit(&registers, &exit);
        let mut results = Self::results_of(action, &happened);
        if results.is_none() {
            // Abort, refuse, complete or retry; those that cannot be said there are refused by the hypervisor.
            let (mut exit, mut happened) = self.run([], answer % 4);
            if exit.is_none() {
                (exit, happened) = self.run([], 0);
                assert!(exit.is_some(), "the vCPU goes on if it is only run");
            }
            results = Self::results_of(action, &happened);
        }
        if let Some(results) = results {
            self.check_results(door, &registers, &results, &before);
        } else {
            // It waits for the host still. Let it end.
            self.end_call();
        }
    }

    /// Has a call that waits for the host end: with an abort, refused or complete. If it waits for tables, it still does.
    fn end_call(&mut self) {
        self.waits = [2, 3, 1].into_iter().all(|answer| self.run([], answer).0.is_none());
    }

    /// Has the guest try again the call that it was left at. Returns whether it gets to the next one.
    fn goes_on(&mut self) -> bool {
        if self.waits {
            self.run([], 0);
            self.end_call();
        }
        !self.waits
    }

    /// What the registers are behind a call, if it has ended.
    fn results_of(call: Action, happened: &[Happened]) -> Option<[u64; CALL_REGISTERS]> {
        happened.iter().filter(|it| it.action == call).find_map(|it| match it.outcome {
            Outcome::Returned(results) => Some(results),
            Outcome::Interrupted => panic!("a call sends nobody anywhere: {it:x?}"),
            _ => None,
        })
    }

    /// What the host is told is about the range that the guest named.
    fn check_exit(&self, registers: &[u64; CALL_REGISTERS], exit: &RunExit) {
        let ranges = [ExitReason::Shared, ExitReason::Unshare, ExitReason::Relinquished].map(ExitReason::code);
        let (base, end) = self.asked(registers);
        if ranges.contains(&exit.reason) {
            let end_told = exit.address + exit.pages * PAGE_SIZE;
            assert!(exit.pages > 0 && exit.address >= base && end_told <= end, "{exit:x?} for {registers:x?}");
        }
        if exit.reason == ExitReason::PageFault.code() {
            assert!((base & !0xfff..end).contains(&exit.address), "{exit:x?} for {registers:x?}");
            assert_eq!((exit.flags, exit.value, exit.size), (0, 0, 0), "a call shows nothing else");
        }
    }

    /// The range that a call is about.
    fn asked(&self, registers: &[u64; CALL_REGISTERS]) -> (u64, u64) {
        let [function, base, second, ..] = *registers;
        match function as u32 {
            STATE_SET | STATE_GET => (base, second),
            SHARE | UNSHARE | RELINQUISH => (base, base.saturating_add(second.max(1).saturating_mul(PAGE_SIZE))),
            _ => (base, base.saturating_add(1)),
        }
    }

    /// How many registers, from x0 on, hold results of a call.
    fn results(&self, door: Door, function: u64) -> usize {
        let Ok(function) = u32::try_from(function) else { return 1 };
        match (function, door, self.kind) {
            (UID | FEATURES, Door::Hvc, VmKind::Ordinary | VmKind::Pkvm) => 4,
            (MEMINFO | SHARE | UNSHARE | GUARD | RELINQUISH, Door::Hvc, VmKind::Pkvm) => 4,
            (RSI_VERSION | STATE_SET | STATE_GET, Door::Smc, VmKind::Realm) => 3,
            (RSI_FEATURES, Door::Smc, VmKind::Realm) => 2,
            (MEASUREMENT_READ, Door::Smc, VmKind::Realm) => 9,
            // TRNG: status and up to 192 bits.
            (0x8400_0050..=0x8400_0053 | TRNG_RND, ..) => 4,
            _ => 1,
        }
    }

    fn check_results(&self, door: Door, asked: &[u64; CALL_REGISTERS], results: &[u64; CALL_REGISTERS], before: &Look) {
        let count = self.results(door, asked[0]);
        assert_eq!(results[count..], asked[count..], "{asked:x?}: only x0 to x{} are results", count - 1);
        let unchanged = || {
            let (pages, counts) = self.world.look();
            assert_eq!(pages, before.0, "{asked:x?}: {results:x?}");
            let of_guests = |counts: &Counts| [counts.guest_owned, counts.guest_offered, counts.guest_claimed];
            assert_eq!(of_guests(&counts), of_guests(&before.1), "{asked:x?}: {results:x?}");
        };
        let [base, second] = [asked[1], asked[2]];
        match (asked[0] as u32, results[0]) {
            (_, NOT_SUPPORTED) => {
                assert_eq!(results[1..], asked[1..]);
                unchanged();
            }
            _ if count == 1 && self.kind != VmKind::Realm => unchanged(),
            (SHARE | UNSHARE | RELINQUISH, 0) if count == 4 => {
                // Without a number of pages, the old form of the call says nothing.
                let said = if second == 0 { 0..=0 } else { 1..=second };
                assert!(said.contains(&results[1]), "{asked:x?}: {results:x?}");
                assert_eq!(results[2..4], [0, 0]);
                let done = results[1].max(1);
                let of_guest = |counts: &Counts| [counts.guest_owned, counts.guest_offered + counts.guest_claimed];
                let ([owned, offered], now) =
                    (of_guest(&before.1), of_guest(&self.world.memory.counts(self.world.machine)));
                match asked[0] as u32 {
                    SHARE => assert_eq!(now, [owned - done, offered + done], "{asked:x?}: {results:x?}"),
                    UNSHARE => assert_eq!(now, [owned + done, offered - done], "{asked:x?}: {results:x?}"),
                    // Where pages have been taken by force there was none.
                    _ => {
                        let frames = (0..done).map(|n| base + n * PAGE_SIZE);
                        assert!(
                            frames.map(|at| self.translate(at)).all(|page| page.is_none()),
                            "{asked:x?}: {results:x?}"
                        );
                        assert!(now[0] <= owned && now[0] + done >= owned && now[1] == offered, "{now:?} {before:?}");
                    }
                }
            }
            (SHARE | UNSHARE | RELINQUISH | GUARD, status) if count == 4 => {
                assert!(status == INVALID_PARAMETER || status == 0 && asked[0] as u32 == GUARD);
                assert_eq!(results[1..4], [0; 3]);
                unchanged();
            }
            (STATE_SET, 0) if count == 3 => {
                assert!((base..=second).contains(&results[1]) && results[1].is_multiple_of(PAGE_SIZE));
                assert!(results[2] <= 1 && (results[2] == 0) == (results[1] > base));
                if results[2] == 1 {
                    unchanged();
                }
            }
            (STATE_GET, 0) if count == 3 => {
                assert!(results[1] > base && results[1] <= second && results[2] <= 2, "{asked:x?}: {results:x?}");
                unchanged();
            }
            (_, status) if self.kind == VmKind::Realm && door == Door::Smc && count != 4 => {
                // Of a failure, but for the version's, nothing but the status.
                if status != 0 && asked[0] as u32 != RSI_VERSION {
                    assert_eq!(results[1..], asked[1..], "{asked:x?}");
                }
                unchanged();
            }
            _ => unchanged(),
        }
    }

    /// What is the guest's alone holds what the guest has left there.
    fn check_contents(&self) {
        for n in 0..2 * PAGES {
            let page = PAYLOAD + n * PAGE_SIZE;
            let address = PhysAddr::new(page).expect("an address of RAM");
            let private = self.world.memory.page_state(address).state == HostState::NoPage
                && self.translate(GUEST + n * PAGE_SIZE) == Some(page);
            match self.contents[n as usize] {
                Some(expected) if private => assert_eq!(self.world.machine.inner.peek(address), expected, "{page:#x}"),
                _ => {}
            }
        }
    }
}
