//! Random steps.
//!
//! A draft says what kind of step, with numbers that choose among what is there when it comes to it: pages in a state that the
//! call starts from, frames of a VM, or places where something else is. So most steps lead on, and the others are wrong in all
//! ways that there are. [`resolve`] makes a step of a draft, by the model's state.

use std::ops::Range;

use proptest::{
    prelude::{Strategy, any, prop_oneof},
    strategy::Just,
};
use ravelin_abi::{Answer, CALLS, Call, ExitReason, GIC_FRAME_SIZE, Kind, REGISTER_LAST, VmAttributes, VmKind};
use ravelin_memory::PAGE_SIZE;
use ravelin_model::state::{Frame, Page, Stage, Vm};
use ravelin_world::{Action, Door, Layout, vm_sizes};

use crate::{
    calls::{
        CPU_OFF, CPU_ON, HOST_CALL, IPA_STATE_GET, IPA_STATE_SET, MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE, REALM_CONFIG,
        SYSTEM_OFF,
    },
    op::{Op, REGISTERS, RunAnswer, Value},
    sequence::Sequence,
};

/// Four blocks of 2 MiB for the host and one for the hypervisor.
pub const LAYOUT: Layout =
    Layout { ram: 0x4000_0000..0x40a0_0000, carve_out: 0x4080_0000..0x40a0_0000, pool_pages: 96, cpus: 1 };

const BLOCK: u64 = 0x20_0000;
/// Where VMs are made of the host's pages, vCPUs, their run pages, and tables; all in the first block.
const METADATA: u64 = LAYOUT.ram.start + 0x10_0000;
const VCPUS: u64 = LAYOUT.ram.start + 0x14_0000;
const RUN_PAGES: u64 = LAYOUT.ram.start + 0x16_0000;
const TABLES: u64 = LAYOUT.ram.start + 0x18_0000;
/// Guest address of the memory of guests: four blocks.
const GUEST: u64 = 0x4000_0000;
const GUEST_FRAMES: Range<u64> = GUEST / PAGE_SIZE..(GUEST + 4 * BLOCK) / PAGE_SIZE;
const DISTRIBUTOR: u64 = 0x800_0000;
const REDISTRIBUTORS: u64 = 0x80a_0000;

/// What is to be in a register.
#[derive(Clone, Copy, Debug)]
pub enum Pick {
    /// Something that may be right, chosen by this number.
    Likely(u32),
    /// This.
    Raw(u64),
}

/// What a guest is to do.
#[derive(Clone, Copy, Debug)]
pub enum GuestDraft {
    /// A call: which one, and its arguments.
    Call(u8, [Pick; 3]),
    /// A load, or a store of what the second says.
    Access(Pick, Option<u32>),
}

/// A step that is not made of the state yet.
#[derive(Clone, Copy, Debug)]
pub enum Draft {
    /// A call of the table.
    Call(usize, [Pick; REGISTERS - 1]),
    /// What is hardly a call.
    Other(u16, u64, [Pick; REGISTERS - 1]),
    /// A run: VM, vCPU, answer, and what the guest does.
    Run(u32, u8, Pick, Option<GuestDraft>),
    /// The host's access to a page; whether it stores.
    Access(Pick, bool),
}

fn pick() -> impl Strategy<Value = Pick> + Clone {
    prop_oneof![
        60 => any::<u32>().prop_map(Pick::Likely),
        1 => any::<u64>().prop_map(Pick::Raw),
        1 => (0..64_u32, 0..3_u64).prop_map(|(bit, less)| Pick::Raw((1_u64 << bit).wrapping_sub(less))),
        1 => (0..8_u64).prop_map(Pick::Raw),
    ]
}

/// How much more often than once in a thousand steps a call comes.
fn weight(call: &Call) -> u32 {
    match call.name {
        "UID" | "REVISION" | "FEATURES" | "VM_SIZES" | "REGISTER_RESET_VALUE" | "SPI" => 5,
        "VM_TEARDOWN" => 4,
        "VM_SEAL" | "VCPU_CREATE" => 80,
        "VM_CREATE" | "VM_DESTROY" | "VM_RECLAIM" | "VM_DONATE_TABLES" => 50,
        "VM_MAP" => 120,
        "CLAIM" | "RELEASE" => 60,
        _ => 30,
    }
}

fn table_call() -> impl Strategy<Value = usize> {
    let mut indices: Vec<_> =
        CALLS.iter().enumerate().flat_map(|(index, call)| vec![index; weight(call) as usize]).collect();
    indices.sort_unstable();
    proptest::sample::select(indices)
}

fn guest() -> impl Strategy<Value = GuestDraft> {
    prop_oneof![
        3 => (any::<u8>(), [pick(), pick(), pick()]).prop_map(|(call, arguments)| GuestDraft::Call(call, arguments)),
        1 => (pick(), any::<Option<u32>>()).prop_map(|(at, store)| GuestDraft::Access(at, store)),
    ]
}

/// Returns random drafts.
pub fn draft() -> impl Strategy<Value = Draft> {
    let six = || [pick(), pick(), pick(), pick(), pick(), pick()];
    let odd = prop_oneof![
        2 => Just(0),
        1 => any::<u64>(),
        1 => any::<u32>().prop_map(u64::from),
        2 => (table_call(), 0..64_u32).prop_map(|(index, bit)| u64::from(CALLS[index].number) ^ 1 << bit),
    ];
    let immediate = prop_oneof![3 => Just(0), 1 => any::<u16>()];
    prop_oneof![
        600 => (table_call(), six()).prop_map(|(call, picks)| Draft::Call(call, picks)),
        300 => (any::<u32>(), any::<u8>(), pick(), proptest::option::weighted(0.9, guest()))
            .prop_map(|(vm, vcpu, answer, guest)| Draft::Run(vm, vcpu, answer, guest)),
        70 => (pick(), any::<bool>()).prop_map(|(page, store)| Draft::Access(page, store)),
        10 => (immediate, odd, six()).prop_map(|(immediate, function, picks)| Draft::Other(immediate, function, picks)),
    ]
}

/// Makes a step of a draft.
#[must_use]
pub fn resolve(draft: &Draft, sequence: &Sequence<'_, '_>) -> Op {
    match *draft {
        Draft::Call(index, picks) => call(&CALLS[index], picks, sequence),
        Draft::Other(immediate, function, picks) => {
            let mut registers = [Value::Number(function); REGISTERS];
            for (register, pick) in registers[1..].iter_mut().zip(picks) {
                *register = Value::Number(likely_or(pick, |n| page_address(sequence, |_| true, n)));
            }
            Op::Call { immediate, registers }
        }
        Draft::Run(vm, vcpu, answer, guest) => {
            // vCPU 0 more often.
            let (vm, vcpu) = (slot(sequence, "VCPU_RUN", vm), [0, 0, 0, 1, 1, 2][usize::from(vcpu % 6)]);
            let answer = match answer {
                Pick::Likely(n) => RunAnswer { answer: likely_answer(sequence, vm, vcpu, n).code(), value: n.into() },
                Pick::Raw(raw) => RunAnswer { answer: raw, value: raw },
            };
            Op::Run { vm, vcpu, answer, action: guest.map(|guest| action(guest, sequence, vm)) }
        }
        Draft::Access(page, store) => {
            let page = likely_or(page, |n| page_address(sequence, |_| true, n)) & !(PAGE_SIZE - 1);
            if store { Op::Store(page) } else { Op::Load(page) }
        }
    }
}

/// Returns an answer to the last exit of a vCPU.
fn likely_answer(sequence: &Sequence<'_, '_>, vm: u8, vcpu: u64, mut n: u32) -> Answer {
    let reason = sequence.vcpu(vm, vcpu).waits.map_or(0, |(_, exit)| exit.reason);
    let right = match ExitReason::from_code(reason) {
        Some(ExitReason::Mmio) => &[Answer::Complete, Answer::Abort, Answer::Retry][..],
        Some(ExitReason::PageFault) => &[Answer::Abort, Answer::Retry],
        Some(ExitReason::Unshare) => &[Answer::Refuse, Answer::Retry, Answer::Retry],
        Some(ExitReason::HostCall) => &[Answer::Complete],
        _ => &[Answer::Retry],
    };
    if choose(&mut n, &[true, true, true, true, true, true, true, false]) {
        choose(&mut n, right)
    } else {
        choose(&mut n, Answer::ALL)
    }
}

fn likely_or(pick: Pick, likely: impl FnOnce(u32) -> u64) -> u64 {
    match pick {
        Pick::Likely(n) => likely(n),
        Pick::Raw(raw) => raw,
    }
}

/// Chooses by the lower bits of a number and leaves the others.
fn choose<T: Clone>(n: &mut u32, from: &[T]) -> T {
    let count = from.len() as u32;
    let chosen = from[(*n % count) as usize].clone();
    *n /= count;
    chosen
}

/// Chooses a page of a run: the first, the last, or one in between.
fn in_run(n: &mut u32, run: &Range<u64>) -> u64 {
    let length = run.end - run.start;
    run.start + choose(n, &[0, 0, length - 1, length / 2, u64::from(*n) % length])
}

/// Returns an address of a page, in one of the states that are wanted if there is one.
fn page_address(sequence: &Sequence<'_, '_>, wanted: impl Fn(Page) -> bool, mut n: u32) -> u64 {
    let ram = &LAYOUT.ram;
    if choose(&mut n, &[true, true, false]) {
        let runs: Vec<_> =
            sequence.model().state.pages.iter().filter(|&(_, page)| wanted(page)).map(|(run, _)| run).collect();
        if !runs.is_empty() {
            let run = choose(&mut n, &runs);
            return in_run(&mut n, &run) * PAGE_SIZE;
        }
    }
    // A few pages that all calls come to, and where something begins or ends.
    let few = ram.start + u64::from(n % 12) * PAGE_SIZE;
    let block = ram.start + u64::from(n % 4) * BLOCK;
    choose(
        &mut n,
        &[few, few, few, block, block, block + BLOCK - PAGE_SIZE, METADATA, RUN_PAGES, LAYOUT.carve_out.start, ram.end],
    )
}

/// Returns whether a call is for VMs in this stage of their lives.
const fn is_for_stage(call: &str, stage: Stage) -> bool {
    match call.as_bytes() {
        b"VCPU_CREATE" | b"VM_SEAL" => matches!(stage, Stage::Created),
        b"VCPU_RUN" | b"SPI" => matches!(stage, Stage::Sealed),
        b"VM_RECLAIM" | b"VM_DESTROY" => matches!(stage, Stage::Dying),
        b"VM_DONATE_TABLES" => true,
        _ => !matches!(stage, Stage::Dying),
    }
}

/// Returns a slot with a VM that a call is for, if there is any.
fn slot(sequence: &Sequence<'_, '_>, call: &str, mut n: u32) -> u8 {
    let slots = |stage: fn(&str, Stage) -> bool| -> Vec<_> {
        (0..4).filter(|&slot| sequence.vm(slot).is_some_and(|vm| stage(call, vm.stage))).collect()
    };
    let fitting = slots(is_for_stage);
    match choose(&mut n, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 2]) {
        0 if !fitting.is_empty() => choose(&mut n, &fitting),
        0 | 1 if !slots(|_, _| true).is_empty() => choose(&mut n, &slots(|_, _| true)),
        _ => choose(&mut n, &[0, 1, 2, 3, 200]),
    }
}

/// Returns a frame of a VM, in one of the states that are wanted if there is one.
fn frame(sequence: &Sequence<'_, '_>, vm: Option<&Vm>, wanted: impl Fn(Frame) -> bool, mut n: u32) -> u64 {
    if let (Some(vm), true) = (vm, choose(&mut n, &[true, true, true, false])) {
        let parts = sequence.model().state.look(vm, GUEST_FRAMES);
        let parts: Vec<_> = parts.filter(|&(_, frame)| wanted(frame)).map(|(part, _)| part).collect();
        if !parts.is_empty() {
            let part = choose(&mut n, &parts);
            return in_run(&mut n, &part);
        }
    }
    let few = GUEST_FRAMES.start + u64::from(n % 8);
    let block = GUEST_FRAMES.start + u64::from(n % 4) * (BLOCK / PAGE_SIZE);
    choose(&mut n, &[few, few, block, block, DISTRIBUTOR / PAGE_SIZE, GUEST_FRAMES.end - 1])
}

/// Returns a number of pages. VMs and vCPUs with these attributes have sizes.
fn count(call: &str, attributes: Option<VmAttributes>, most: u64, mut n: u32) -> u64 {
    let (vm, vcpu, _) = attributes.map_or((1, 1, 1), vm_sizes);
    let fitting = match call {
        "VM_CREATE" => vm,
        "VCPU_CREATE" => vcpu,
        "VM_RECLAIM" => choose(&mut n, &[1, 2048, 2048, most]),
        "VM_DONATE_TABLES" => choose(&mut n, &[1, 2, 8, 16]),
        _ => choose(&mut n, &[1, 1, 2, 3, 512]),
    };
    if choose(&mut n, &[true, true, true, true, true, true, true, false]) {
        return fitting;
    }
    choose(&mut n, &[1, 2, 4, 511, 513, 1024])
}

/// Returns whether a call that is about pages starts from this state.
fn is_for_page(call: &str, page: Page) -> bool {
    match call {
        "UNSHARE" | "PIN" | "STATISTICS" => matches!(page, Page::Shared { .. }),
        "UNPIN" => matches!(page, Page::Shared { pins: 1.. }),
        "TAKE_BACK" => page == Page::Donated,
        "FORCE_RECLAIM" => matches!(page, Page::Private(_) | Page::Offered(_)),
        "PAGE_STATE" => true,
        _ => page == Page::Host,
    }
}

/// Returns whether a call that is about frames starts from this state.
fn is_for_frame(call: &str, frame: Frame) -> bool {
    match (call, frame) {
        ("VM_MAP", frame) => frame == Frame::Absent,
        ("CLAIM", Frame::Page(_, page)) => matches!(page, Page::Offered(_)),
        ("RELEASE", Frame::Page(_, page)) => matches!(page, Page::Claimed(_)),
        (_, Frame::Page(..)) => true,
        _ => false,
    }
}

/// Makes a call of the table.
fn call(call: &Call, picks: [Pick; REGISTERS - 1], sequence: &Sequence<'_, '_>) -> Op {
    let mut arguments = Vec::new();
    let (mut vm, mut attributes) = (None, None);
    for (argument, pick) in call.arguments.iter().zip(picks) {
        let Pick::Likely(n) = pick else {
            arguments.push(Value::Number(likely_or(pick, u64::from)));
            continue;
        };
        let mut n = n;
        let number = match (argument.kind, call.name, argument.name) {
            (Kind::Zero, ..) => 0,
            (Kind::Handle, ..) => {
                let slot = slot(sequence, call.name, n);
                vm = sequence.vm(slot);
                attributes = vm.map(Vm::decoded);
                arguments.push(if (n >> 24).is_multiple_of(20) { Value::Old(slot) } else { Value::Vm(slot) });
                continue;
            }
            (Kind::Attributes, ..) => {
                let kind = choose(&mut n, VmKind::ALL);
                let ipa_bits = choose(&mut n, &[32, 32, 33, 40]);
                let chosen = VmAttributes { kind, ipa_bits, vcpus: choose(&mut n, &[2, 2, 1, 3]) };
                attributes = Some(chosen);
                chosen.bits()
            }
            (Kind::PageAddress, "VM_CREATE", _) if n % 8 != 0 => METADATA + u64::from(n / 8 % 4) * 0x1_0000,
            (Kind::PageAddress, "VCPU_CREATE", "run_page") if n % 8 != 0 => {
                RUN_PAGES + u64::from(n / 8 % 8) * PAGE_SIZE
            }
            (Kind::PageAddress, "VCPU_CREATE", _) if n % 8 != 0 => VCPUS + u64::from(n / 8 % 8) * 0x4000,
            (Kind::PageAddress, "VM_DONATE_TABLES", _) if n % 8 != 0 => TABLES + u64::from(n / 8 % 64) * PAGE_SIZE,
            (Kind::PageAddress, name, _) => page_address(sequence, |page| is_for_page(name, page), n),
            (Kind::GuestAddress { align: PAGE_SIZE }, name, _) => {
                frame(sequence, vm, |frame| is_for_frame(name, frame), n) * PAGE_SIZE
            }
            (Kind::GuestAddress { align: GIC_FRAME_SIZE }, _, "distributor") => {
                choose(&mut n, &[DISTRIBUTOR, DISTRIBUTOR, DISTRIBUTOR, GUEST, REDISTRIBUTORS])
            }
            (Kind::GuestAddress { align: GIC_FRAME_SIZE }, ..) => {
                choose(&mut n, &[REDISTRIBUTORS, REDISTRIBUTORS, REDISTRIBUTORS, GUEST, DISTRIBUTOR])
            }
            (Kind::GuestAddress { .. }, ..) => GUEST,
            (Kind::PageCount { max }, name, _) => count(name, attributes, max, n),
            (Kind::Number { last: REGISTER_LAST, .. }, ..) => choose(&mut n, &[0, 64, 66, 0x4000, 0xc080]),
            (Kind::Number { first, .. }, ..) => first + choose(&mut n, &[0, 0, 0, 1, 1, 2]),
        };
        arguments.push(Value::Number(number));
    }
    Op::call(call.name, &arguments)
}

/// Functions of guests, of which those that change memory come more often.
const PKVM_CALLS: [u64; 16] = [
    MEM_SHARE,
    MEM_SHARE,
    MEM_SHARE,
    MEM_SHARE,
    MEM_UNSHARE,
    MEM_UNSHARE,
    MEM_UNSHARE,
    MEM_UNSHARE,
    MEM_RELINQUISH,
    MEM_RELINQUISH,
    MEM_RELINQUISH,
    0xc600_0007,
    0xc600_0002,
    CPU_ON,
    CPU_ON,
    0x8600_0000,
];
const REALM_CALLS: [u64; 16] = [
    IPA_STATE_SET,
    IPA_STATE_SET,
    IPA_STATE_SET,
    IPA_STATE_SET,
    IPA_STATE_SET,
    IPA_STATE_SET,
    IPA_STATE_SET,
    IPA_STATE_GET,
    IPA_STATE_GET,
    0xc400_0190,
    0xc400_0192,
    REALM_CONFIG,
    HOST_CALL,
    CPU_ON,
    CPU_ON,
    CPU_ON,
];

/// Makes what a guest does.
fn action(guest: GuestDraft, sequence: &Sequence<'_, '_>, slot: u8) -> Action {
    let vm = sequence.vm(slot);
    let kind = vm.map_or(VmKind::Pkvm, Vm::kind);
    let (which, [base, count, last]) = match guest {
        GuestDraft::Access(at, store) => {
            let at = likely_or(at, |n| {
                let frame = frame(sequence, vm, |frame| matches!(frame, Frame::Page(..)), n / 2);
                let alias =
                    vm.filter(|vm| vm.kind() == VmKind::Realm && n.is_multiple_of(2)).map_or(0, Vm::frame_count);
                (frame + alias) * PAGE_SIZE + u64::from(n % 1024) * 4
            });
            return store.map_or(Action::Load(at), |value| Action::Store(at, value));
        }
        GuestDraft::Call(which, arguments) => (which, arguments),
    };
    let function = match which {
        0 => SYSTEM_OFF,
        1..4 => CPU_OFF,
        _ => (if kind == VmKind::Realm { REALM_CALLS } else { PKVM_CALLS })[usize::from(which % 16)],
    };
    let door = if (kind == VmKind::Realm) != (which / 16 == 1) { Door::Smc } else { Door::Hvc };
    let shares = likely_or(last, |n| u64::from(n % 2)).is_multiple_of(2);
    let starts = |frame| match (function, frame) {
        (MEM_SHARE, Frame::Page(_, page)) => matches!(page, Page::Private(_)),
        (MEM_UNSHARE, Frame::Page(_, page)) => matches!(page, Page::Offered(_) | Page::Claimed(_)),
        (MEM_RELINQUISH, frame) => matches!(frame, Frame::Poisoned | Frame::Page(_, Page::Private(_))),
        (IPA_STATE_SET, Frame::Page(_, page)) => matches!(page, Page::Private(_)) == shares,
        _ => true,
    };
    let base = likely_or(base, |n| frame(sequence, vm, starts, n) * PAGE_SIZE);
    let count = likely_or(count, |mut n| choose(&mut n, &[0, 1, 1, 1, 2, 2, 3, 512, 512, 513, 1024, 1 << 18]));
    let registers = match function {
        CPU_ON => [function, u64::from(which / 16 % 3), base, 7],
        IPA_STATE_SET | IPA_STATE_GET => {
            [function, base, base.wrapping_add(count.wrapping_mul(PAGE_SIZE)), likely_or(last, |n| u64::from(n % 2))]
        }
        MEM_SHARE | MEM_UNSHARE | MEM_RELINQUISH => [function, base, count, likely_or(last, |_| 0)],
        _ => [function, base, 0, 0],
    };
    Action::call(door, registers)
}
