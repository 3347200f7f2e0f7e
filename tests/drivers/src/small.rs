//! Small worlds: every step in every state that can be reached, breadth first, on the real code.
//!
//! A world has two pages that everybody wants, one or two VMs with one or two vCPUs each, and places of their own for what the VMs
//! are made of. A state is the model's, with slots in place of handles, which are never the same twice, and with the instructions
//! that vCPUs wait at. From each state all steps of the alphabet are taken: those that succeed and those that are refused. Where a
//! step changes the state, a new world takes the steps that lead to the state again.
//!
//! What bounds it beside that: a page is pinned at most twice, guests have the frames that the [`Bounds`] say, a VM gets all its
//! tables when it is made, and no guest ends its VM or turns a vCPU off. Worlds with two VMs of two vCPUs are looked at up to a number
//! of steps.

use std::{
    collections::HashSet,
    fmt::{self, Display, Formatter},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

use ravelin_abi::{Answer, VmAttributes, VmKind};
use ravelin_memory::PAGE_SIZE;
use ravelin_model::state::{Page, Place};
use ravelin_world::{Action, Door, Layout, World, in_world, vm_sizes};

use crate::{
    coverage::Coverage,
    op::{Op, RunAnswer, Value},
    random::message,
    sequence::Sequence,
};

/// 96 pages for the host, and 80 for the hypervisor.
pub const LAYOUT: Layout =
    Layout { ram: 0x4000_0000..0x400b_0000, carve_out: 0x4006_0000..0x400b_0000, pool_pages: 76, cpus: 1 };

/// The two pages.
const PAGES: u64 = LAYOUT.ram.start + 0x1_0000;
/// Guest address of the frames.
const GUEST: u64 = 0x4000_0000;
/// The most pins of a page.
const PINS: u64 = 2;

/// How large the worlds are.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Kinds of the VMs, in their slots.
    pub vms: Vec<VmKind>,
    /// vCPUs of each.
    pub vcpus: u64,
    /// Frames of each guest: 1 or 2.
    pub frames: u64,
    /// Pages: 1 or 2.
    pub pages: u64,
    /// How many steps a state may be away.
    pub depth: usize,
    /// How many threads take steps.
    pub threads: usize,
}

/// For the protocol.
impl Display for Bounds {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { vms, vcpus, frames, pages, depth, .. } = self;
        let kinds: Vec<_> = vms.iter().map(|kind| kind.name()).collect();
        write!(f, "{} with {vcpus} vCPUs, {frames} frames, {pages} pages", kinds.join(" and "))?;
        if *depth == usize::MAX { Ok(()) } else { write!(f, ", {depth} steps") }
    }
}

/// What there is in these worlds.
#[derive(Clone, Debug, Default)]
pub struct Explored {
    /// States.
    pub states: usize,
    /// Steps taken from them.
    pub transitions: usize,
    /// How many steps away the furthest state is.
    pub depth: usize,
    /// Whether these are all states. If not, no steps were taken from the furthest ones.
    pub is_complete: bool,
    /// What was reached.
    pub coverage: Coverage,
}

/// A way to what the model does not allow.
#[derive(Clone, Debug)]
pub struct Failure {
    /// All steps that were taken in that world.
    pub steps: Vec<Op>,
    /// What is wrong.
    pub why: String,
}

/// A step of the alphabet: some are several that are of no interest by themselves.
type Edge = Vec<Op>;

/// A state, as what tells it from others.
type Key = Vec<u64>;

/// Where things of a VM are.
fn place(slot: u8, offset: u64) -> Value {
    Value::Number(LAYOUT.ram.start + 0x2_0000 + u64::from(slot) * 0x2_0000 + offset * PAGE_SIZE)
}

fn attributes(kind: VmKind, vcpus: u64) -> VmAttributes {
    VmAttributes { kind, ipa_bits: 32, vcpus }
}

/// Returns starts and lengths of ranges among `count` pages or frames from `base` on.
fn ranges(base: u64, count: u64) -> Vec<[Value; 2]> {
    let single = (0..count).map(|index| (base + index * PAGE_SIZE, 1));
    let all = (count > 1).then_some((base, count));
    single.chain(all).map(|(base, pages)| [base.into(), pages.into()]).collect()
}

/// Returns all steps.
fn alphabet(bounds: &Bounds) -> Vec<Edge> {
    let mut edges = Vec::<Edge>::new();
    let zero = Value::Number(0);
    for [page, pages] in ranges(PAGES, bounds.pages) {
        for call in ["SHARE", "UNSHARE", "DONATE", "TAKE_BACK", "PIN", "UNPIN"] {
            edges.push(vec![Op::call(call, &[page, pages, zero])]);
        }
        edges.push(vec![Op::call("FORCE_RECLAIM", &[page, pages])]);
        edges.push(vec![Op::call("PAGE_STATE", &[page, zero])]);
        edges.push(vec![Op::call("STATISTICS", &[page, zero])]);
    }
    for index in 0..bounds.pages {
        edges.push(vec![Op::Store(PAGES + index * PAGE_SIZE)]);
    }
    for (slot, &kind) in (0..).zip(&bounds.vms) {
        vm_steps(slot, kind, bounds, &mut edges);
    }
    // What is wrong with each argument, and with the call itself.
    let page = Value::Number(PAGES);
    for arguments in [
        [page, 1.into(), 1.into()],
        [Value::Number(PAGES + 1), 1.into(), zero],
        [page, zero, zero],
        [page, Value::Number(1 << 36), zero],
        [page, Value::Number((1 << 18) + 1), zero],
        [Value::Number(LAYOUT.ram.end), 1.into(), zero],
        [Value::Number(LAYOUT.carve_out.start), 1.into(), zero],
    ] {
        edges.push(vec![Op::call("SHARE", &arguments)]);
    }
    edges.push(vec![Op::Call { immediate: 1, registers: [Value::Number(0xc600_1001); _] }]);
    edges.push(vec![Op::Call { immediate: 0, registers: [Value::Number(0x8400_0000); _] }]);
    edges.push(vec![Op::call("VM_TEARDOWN", &[Value::Number(u64::MAX)])]);
    edges
}

/// Adds the steps that are about the VM in a slot.
fn vm_steps(slot: u8, kind: VmKind, bounds: &Bounds, edges: &mut Vec<Edge>) {
    let attributes = attributes(kind, bounds.vcpus);
    let (vm_pages, vcpu_pages, _) = vm_sizes(attributes);
    let vm = Value::Vm(slot);
    let mut call = |name, arguments: &[Value]| edges.push(vec![Op::call(name, arguments)]);
    for vcpu in 0..bounds.vcpus {
        let metadata = place(slot, 0x10 + 4 * vcpu);
        call("VCPU_CREATE", &[vm, vcpu.into(), metadata, vcpu_pages.into(), place(slot, 0x1e + vcpu)]);
    }
    // One of the pages as what a vCPU is run by.
    call("VCPU_CREATE", &[vm, 0.into(), place(slot, 0x10), vcpu_pages.into(), PAGES.into()]);
    call("VM_SEAL", &[vm, GUEST.into(), GUEST.into(), 0x800_0000.into(), 0x80a_0000.into()]);
    call("VM_TEARDOWN", &[vm]);
    call("VM_DESTROY", &[vm]);
    call("SPI", &[vm, 32.into(), 1.into()]);
    call("VCPU_GET_REGISTER", &[vm, 0.into(), 0.into()]);
    for [frame, frames] in ranges(GUEST, bounds.frames) {
        for name in ["CLAIM", "RELEASE", "VM_RECLAIM", "VM_UNMAP"] {
            call(name, &[vm, frame, frames]);
        }
        for [page, pages] in ranges(PAGES, bounds.pages) {
            if pages == frames {
                call("VM_MAP", &[vm, frame, page, pages]);
            }
        }
    }
    call("VM_MAP", &[vm, 0x800_0000.into(), PAGES.into(), 1.into()]);
    let create = Op::call("VM_CREATE", &[attributes.bits().into(), place(slot, 0), vm_pages.into()]);
    edges.push(vec![create, Op::call("VM_DONATE_TABLES", &[vm, place(slot, 0x8), 8.into()])]);
    for vcpu in 0..bounds.vcpus {
        let run = |answer: Answer, action| {
            vec![Op::Run { vm: slot, vcpu, answer: RunAnswer { answer: answer.code(), value: 5 }, action }]
        };
        edges.extend([Answer::Complete, Answer::Abort, Answer::Refuse].map(|answer| run(answer, None)));
        edges.extend(actions(kind, bounds).into_iter().map(|action| run(Answer::Retry, action)));
    }
}

/// Returns what a guest may do.
fn actions(kind: VmKind, bounds: &Bounds) -> Vec<Option<Action>> {
    let mut actions = vec![None];
    let door = if kind == VmKind::Realm { Door::Smc } else { Door::Hvc };
    let mut call = |registers: [u64; 4]| actions.push(Some(Action::call(door, registers)));
    if bounds.vcpus > 1 {
        call([0xc400_0003, 1, GUEST, 0]);
    }
    for [frame, frames] in ranges(GUEST, bounds.frames) {
        let (Value::Number(base), Value::Number(pages)) = (frame, frames) else { continue };
        let top = base + pages * PAGE_SIZE;
        match kind {
            VmKind::Realm => {
                call([0xc400_0197, base, top, 0]);
                call([0xc400_0197, base, top, 1]);
                call([0xc400_0198, base, top, 0]);
            }
            VmKind::Pkvm => {
                for function in [0xc600_0003, 0xc600_0004, 0xc600_0009] {
                    call([function, base, pages, 0]);
                }
            }
            VmKind::Ordinary => call([0xc600_0003, base, pages, 0]),
        }
    }
    if kind == VmKind::Pkvm {
        call([0xc600_0007, GUEST, 0, 0]);
    }
    actions.extend([Some(Action::Store(GUEST, 9)), Some(Action::Load(GUEST))]);
    if kind == VmKind::Realm {
        actions.push(Some(Action::Load(GUEST | 1 << 31)));
    }
    actions
}

/// Returns what tells the state from others.
fn key(sequence: &Sequence<'_, '_>, bounds: &Bounds) -> Key {
    let mut key = Key::new();
    let slot_of = |vm: u64| vm & 0xff;
    let mut page = |page: Page| {
        let (kind, detail) = match page {
            Page::Host => (0, 0),
            Page::Shared { pins } => (1, pins),
            Page::Run => (2, 0),
            Page::Hypervisor => (3, 0),
            Page::Donated => (4, 0),
            Page::Kept => (5, 0),
            Page::Lent(Place { vm, frame }) => (6, slot_of(vm) << 32 | frame),
            Page::Private(Place { vm, frame }) => (7, slot_of(vm) << 32 | frame),
            Page::Offered(Place { vm, frame }) => (8, slot_of(vm) << 32 | frame),
            Page::Claimed(Place { vm, frame }) => (9, slot_of(vm) << 32 | frame),
            Page::Pinned(Place { vm, frame }) => (10, slot_of(vm) << 32 | frame),
        };
        key.extend([kind, detail]);
    };
    let state = &sequence.model().state;
    (0..2).for_each(|index| page(state.pages.get(PAGES / PAGE_SIZE + index).expect("it is RAM")));
    for slot in 0..bounds.vms.len() {
        let slot = u8::try_from(slot).expect("there are few");
        let Some(vm) = sequence.vm(slot) else {
            key.push(0);
            continue;
        };
        let frames = |has: &dyn Fn(u64) -> bool| (0..2).map(|bit| u64::from(has(GUEST / PAGE_SIZE + bit)) << bit).sum();
        key.extend([
            1 + vm.stage as u64,
            frames(&|frame| vm.poisoned.get(frame).is_some()),
            frames(&|frame| vm.devices.get(frame).is_some()),
            vm.tables.count(),
        ]);
        for vcpu in 0..bounds.vcpus {
            let Some(its) = vm.vcpus.get(&vcpu) else {
                key.push(0);
                continue;
            };
            let known = sequence.vcpu(slot, vcpu);
            key.extend([1, its.run_page, known.is_on.into()]);
            if let Some((action, exit)) = known.waits {
                key.extend([exit.reason, exit.address, exit.pages, exit.flags]);
                match action {
                    Action::Call(_, [x0, x1, x2, x3, ..]) => key.extend([0, x0, x1, x2, x3]),
                    Action::Load(at) => key.extend([1, at]),
                    Action::Store(at, _) => key.extend([2, at]),
                }
            }
        }
    }
    key
}

/// The states that are known, and the ways to them.
struct Graph {
    edges: Vec<Edge>,
    /// For each state, the one before it and the step from there; none for the first.
    ways: Vec<Option<(usize, usize)>>,
}

impl Graph {
    /// Returns the steps that lead to a state.
    fn path(&self, mut state: usize) -> Vec<Op> {
        let mut edges = Vec::new();
        while let Some((before, edge)) = self.ways[state] {
            edges.push(edge);
            state = before;
        }
        edges.iter().rev().flat_map(|&edge| &self.edges[edge]).copied().collect()
    }
}

/// What was found from one state.
struct Found {
    /// States, and the steps that lead there.
    states: Vec<(usize, Key)>,
    transitions: usize,
    coverage: Coverage,
}

/// Explores a world.
///
/// # Errors
///
/// A step that the model does not allow, in the nearest state where there is one.
pub fn explore(bounds: &Bounds, progress: impl Fn(&Explored) + Sync) -> Result<Explored, Box<Failure>> {
    let mut graph = Graph { edges: alphabet(bounds), ways: vec![None] };
    let first = in_world(&LAYOUT, |world| key(&Sequence::new(world), bounds));
    let mut known = HashSet::from([first]);
    let mut explored = Explored { states: 1, ..Explored::default() };
    let mut frontier = 0..1;
    while !frontier.is_empty() && explored.depth < bounds.depth {
        let (next, found) = (AtomicUsize::new(frontier.start), Mutex::new(Vec::new()));
        let worker = || {
            loop {
                let state = next.fetch_add(1, Relaxed);
                if state >= frontier.end {
                    break;
                }
                let result = from_state(&graph, state, bounds);
                found.lock().unwrap_or_else(PoisonError::into_inner).push((state, result));
            }
        };
        thread::scope(|scope| (0..bounds.threads).for_each(|_| drop(scope.spawn(worker))));
        let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        // So that the same is found whoever was first.
        found.sort_unstable_by_key(|&(state, _)| state);
        for (state, result) in found {
            let Found { states, transitions, coverage } = result?;
            explored.transitions += transitions;
            explored.coverage.add(coverage);
            for (edge, key) in states {
                if known.insert(key) {
                    graph.ways.push(Some((state, edge)));
                }
            }
        }
        frontier = frontier.end..graph.ways.len();
        explored.states = graph.ways.len();
        explored.is_complete = frontier.is_empty();
        explored.depth += usize::from(!frontier.is_empty());
        progress(&explored);
    }
    Ok(explored)
}

/// Takes all steps from a state.
fn from_state(graph: &Graph, state: usize, bounds: &Bounds) -> Result<Found, Box<Failure>> {
    let path = graph.path(state);
    let mut found = Found { states: Vec::new(), transitions: 0, coverage: Coverage::default() };
    let mut edge = 0;
    while edge < graph.edges.len() {
        // Known even after a panic.
        let mut steps = path.clone();
        let run = || in_world(&LAYOUT, |world| from_here(graph, edge, world, bounds, &mut steps, &mut found));
        let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(message(&*panic)));
        edge = result.map_err(|why| Box::new(Failure { steps, why }))?;
    }
    Ok(found)
}

/// Takes the `steps` that lead to a state, and then those of the graph from number `first` on until the state has changed.
/// Returns the number of the one to go on with in a new world. All that has been taken is in `steps`.
fn from_here(
    graph: &Graph,
    first: usize,
    world: &World<'_>,
    bounds: &Bounds,
    steps: &mut Vec<Op>,
    found: &mut Found,
) -> Result<usize, String> {
    let mut sequence = Sequence::new(world);
    sequence.repeat(&*steps).map_err(|difference| difference.0)?;
    let mut take = |sequence: &mut Sequence<'_, '_>, step: Op| {
        steps.push(step);
        sequence.step(&step).map_err(|difference| difference.0)
    };
    // The host has mapped what it may access.
    (0..2).try_for_each(|index| take(&mut sequence, Op::Load(PAGES + index * PAGE_SIZE)))?;
    sequence.take_coverage();
    let here = key(&sequence, bounds);
    let mut next = first;
    for (edge, its) in graph.edges.iter().enumerate().skip(first) {
        next = edge + 1;
        if !is_within_bounds(its, &sequence) {
            continue;
        }
        its.iter().try_for_each(|&step| take(&mut sequence, step))?;
        found.transitions += 1;
        found.coverage.add(sequence.take_coverage());
        let there = key(&sequence, bounds);
        if there != here {
            found.states.push((edge, there));
            break;
        }
    }
    sequence.compare_all().map_err(|difference| difference.0)?;
    Ok(next)
}

/// Returns whether a step stays within what is looked at: pins are not counted beyond a few.
fn is_within_bounds(steps: &[Op], sequence: &Sequence<'_, '_>) -> bool {
    let pin = Value::Number(ravelin_world::number("PIN"));
    let most = Page::Shared { pins: PINS };
    steps.iter().all(|step| match *step {
        Op::Call { registers: [function, Value::Number(base), Value::Number(count), ..], .. } if function == pin => {
            let first = base / PAGE_SIZE;
            (first..first + count).all(|page| sequence.model().state.pages.get(page) != Some(most))
        }
        _ => true,
    })
}

/// Returns the worlds that are explored at length.
#[must_use]
pub fn worlds(threads: usize) -> Vec<Bounds> {
    let world = |vms: &[VmKind], vcpus, frames, pages, depth| Bounds {
        vms: vms.to_vec(),
        vcpus,
        frames,
        pages,
        depth,
        threads,
    };
    let single = VmKind::ALL.iter().map(|&kind| world(&[kind], 1, 2, 2, usize::MAX));
    let pairs = [[VmKind::Pkvm, VmKind::Realm], [VmKind::Pkvm, VmKind::Pkvm], [VmKind::Realm, VmKind::Ordinary]];
    let with_one = world(&pairs[0], 1, 1, 2, usize::MAX);
    let with_two = pairs.iter().map(|pair| world(pair, 2, 1, 2, 10));
    single.chain([with_one]).chain(with_two).collect()
}
