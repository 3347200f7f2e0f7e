//! The host's exits: calls with any registers, faults and SMCs, with guests that call, too.

use std::collections::BTreeMap;

use arbitrary::{Arbitrary, Unstructured};
use ravelin_abi::{CALLS, Call, Kind, PAGE_SIZE, RunEntry, Status, VmAttributes, VmKind};
use ravelin_hypercall::Registers;
use ravelin_memory::{Ipa, PhysAddr};
use ravelin_ownership::{Counts, HostState, PageReport};
use ravelin_world::{Action, Door, Layout, World, in_world, number};

/// Operations that are worth the time of one input.
const LIMIT: usize = 40;

const RAM: u64 = Layout::FOUR_BLOCKS.ram.start;
const RAM_PAGES: u64 = (Layout::FOUR_BLOCKS.ram.end - RAM) / PAGE_SIZE;

/// Where guests have their memory.
const GUEST: u64 = 0x8000_0000;

#[derive(Arbitrary, Debug)]
enum Op {
    /// A call of the table.
    Named {
        call: u8,
        arguments: [Argument; 6],
    },
    /// Any other, maybe.
    Any {
        immediate: u16,
        function: u32,
        arguments: [Argument; 6],
    },
    Smc {
        cpu: bool,
        immediate: bool,
        function: Smc,
        arguments: [Argument; 3],
    },
    Fault(Address),
    Load(u16),
    Store(u16, u8),
    /// All calls that make a VM with a vCPU, memory and tables, one after the other, in a block of its own.
    Vm {
        block: u8,
        attributes: u8,
        seal: bool,
    },
    Run {
        vm: u8,
        vcpu: bool,
        answer: u8,
        value: u64,
        actions: Vec<Guest>,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Argument {
    /// Something of the kind that the call wants.
    Fit(u16),
    Zero,
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Smc {
    Psci(u8, bool),
    Architecture(u16),
    Any(u32),
}

#[derive(Arbitrary, Debug)]
enum Address {
    Page(u16),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Guest {
    Share(u8, u8),
    Unshare(u8, u8),
    Relinquish(u8, u8),
    StateSet(u8, u8, bool),
    Load(u8),
    Store(u8, u8),
    Off,
}

const SHARE: u64 = 0xc600_0003;
const UNSHARE: u64 = 0xc600_0004;
const RELINQUISH: u64 = 0xc600_0009;
const STATE_SET: u64 = 0xc400_0197;
const SYSTEM_OFF: u64 = 0x8400_0008;

impl Guest {
    fn action(&self) -> Action {
        let page = |page: u8| GUEST + u64::from(page % 64) * PAGE_SIZE;
        let range = |function, at, pages: u8| Action::call(Door::Hvc, [function, page(at), u64::from(pages % 16)]);
        match *self {
            Self::Share(at, pages) => range(SHARE, at, pages),
            Self::Unshare(at, pages) => range(UNSHARE, at, pages),
            Self::Relinquish(at, pages) => range(RELINQUISH, at, pages),
            Self::StateSet(at, pages, ram) => {
                let top = page(at) + u64::from(pages % 16) * PAGE_SIZE;
                Action::call(Door::Smc, [STATE_SET, page(at), top, ram.into()])
            }
            Self::Load(at) => Action::Load(page(at)),
            Self::Store(at, value) => Action::Store(page(at), value.into()),
            Self::Off => Action::call(Door::Hvc, [SYSTEM_OFF]),
        }
    }
}

/// Calls that change nothing about memory.
const LOOKING: [&str; 7] =
    ["PAGE_STATE", "STATISTICS", "VM_SIZES", "REGISTER_RESET_VALUE", "VCPU_GET_REGISTER", "VCPU_SET_REGISTER", "SPI"];

/// A host, the handles it was given, and the blocks of those that [`Fuzzed::make`] has made.
struct Fuzzed<'w, 'm> {
    world: &'w World<'m>,
    handles: Vec<u64>,
    blocks: BTreeMap<u64, u64>,
}

/// What a call that fails must leave as it was. It may have tried, and then has work of the TLBs to show for it.
fn kept((pages, counts): (Vec<PageReport>, Counts)) -> (Vec<PageReport>, Counts) {
    (pages, Counts { stage2_invalidations: 0, el2_invalidations: 0, host_tables: 0, evictions: 0, ..counts })
}

/// Has a host do what it likes, and checks after each step that tables agree with the ownership table, that what fails has
/// changed nothing, and that no register changes but those that the interface names.
pub fn dispatcher(data: &[u8]) {
    let mut input = Unstructured::new(data);
    in_world(&Layout::FOUR_BLOCKS, |world| {
        let mut fuzzed = Fuzzed { world, handles: Vec::new(), blocks: BTreeMap::new() };
        for _ in 0..LIMIT {
            if input.is_empty() {
                break;
            }
            let Ok(op) = Op::arbitrary(&mut input) else { break };
            fuzzed.perform(&op);
            world.is_consistent();
        }
    });
}

impl Fuzzed<'_, '_> {
    fn perform(&mut self, op: &Op) {
        let world = self.world;
        let page = |page: u16| RAM + u64::from(page) % RAM_PAGES * PAGE_SIZE;
        match op {
            Op::Named { call, arguments } => {
                let call = &CALLS[usize::from(*call) % CALLS.len()];
                let mut registers = [call.number.into(), 0, 0, 0, 0, 0, 0];
                for (n, (register, argument)) in registers[1..].iter_mut().zip(arguments).enumerate() {
                    *register = self.value(*argument, call.arguments.get(n).map(|it| it.kind));
                }
                self.call(0, registers);
            }
            Op::Any { immediate, function, arguments } => {
                let [a, b, c, d, e, f] = arguments.map(|argument| self.value(argument, None));
                self.call(*immediate, [(*function).into(), a, b, c, d, e, f]);
            }
            Op::Smc { cpu, immediate, function, arguments } => self.smc(*cpu, *immediate, function, arguments),
            Op::Fault(address) => {
                let address = match address {
                    Address::Page(at) => page(*at),
                    Address::Any(address) => *address & 0xffff_ffff_ffff,
                };
                let before = world.look().0;
                world.host.fault(world.machine, Ipa::new(address).expect("48 bits"));
                assert_eq!(world.look().0, before, "a fault gives nobody anything");
            }
            Op::Load(at) => assert_eq!(world.load(page(*at)).is_some(), self.has_access(page(*at))),
            Op::Store(at, value) => assert_eq!(world.store(page(*at), (*value).into()), self.has_access(page(*at))),
            Op::Vm { block, attributes, seal } => self.make(u64::from(block % 3), *attributes, *seal),
            Op::Run { vm, vcpu, answer, value, actions } => {
                let Some(&handle) = self.handles.get(usize::from(*vm) % self.handles.len().max(1)) else { return };
                world.machine.set_actions(actions.iter().take(8).map(Guest::action));
                let run_page = run_page(self.blocks.get(&handle).copied().unwrap_or(0));
                if self.has_access(run_page) {
                    world.answer(
                        run_page,
                        &RunEntry { answer: u64::from(answer % 5), value: *value, released: *value, flags: *value },
                    );
                }
                self.call(0, [number("VCPU_RUN"), handle, (*vcpu).into(), 0, 0, 0, 0]);
            }
        }
    }

    fn has_access(&self, page: u64) -> bool {
        self.world.memory.page_state(PhysAddr::new(page).expect("an address of RAM")).state != HostState::NoPage
    }

    /// The value of an argument of this kind.
    fn value(&self, argument: Argument, kind: Option<Kind>) -> u64 {
        let n = match argument {
            Argument::Fit(n) => u64::from(n),
            Argument::Zero => return 0,
            Argument::Any(value) => return value,
        };
        match kind {
            Some(Kind::PageAddress) => RAM + n % RAM_PAGES * PAGE_SIZE,
            Some(Kind::GuestAddress { align }) => GUEST + n * align,
            Some(Kind::PageCount { .. }) => 1 + n % 24,
            Some(Kind::Number { first, last }) => first + n % (last - first).saturating_add(1),
            Some(Kind::Handle) => self.handles.get(n as usize % self.handles.len().max(1)).copied().unwrap_or(n),
            Some(Kind::Attributes) => attributes(n as u8),
            Some(Kind::Zero) => 0,
            None => n,
        }
    }

    /// Makes a call and checks its answer.
    fn call(&mut self, immediate: u16, registers: [u64; 7]) -> [u64; 4] {
        let world = self.world;
        let before = world.look();
        let answer = world.hvc_with(immediate, registers);
        let known = CALLS.iter().find(|call| immediate == 0 && u64::from(call.number) == registers[0]);
        let Some(call) = known else {
            assert_eq!(answer, [Status::NotSupported.register(), registers[1], registers[2], registers[3]]);
            assert_eq!(world.look(), before, "there is no such call");
            return answer;
        };
        let unchanged = answer[call.results.len().max(2)..] == registers[call.results.len().max(2)..4];
        assert!(unchanged, "{}: {answer:x?}", call.name);
        if call.results.first() != Some(&"status") {
            assert_eq!(world.look(), before, "{} only says something", call.name);
            return answer;
        }
        match Status::from_code(answer[0].cast_signed()).expect("a status of the interface") {
            Status::Success => {
                if LOOKING.contains(&call.name) {
                    assert_eq!(kept(world.look()), kept(before), "{} does not concern memory", call.name);
                }
                if call.name == "VM_CREATE" {
                    assert!(!self.handles.contains(&answer[1]), "a handle that was used before");
                    self.handles.push(answer[1]);
                }
            }
            status => {
                assert_eq!(answer[2..], registers[2..4], "{}", call.name);
                assert!(is_in_reach(call, &registers, status, answer[1]), "{}: {answer:x?}", call.name);
                assert_eq!(kept(world.look()), kept(before), "{} has failed with {status:?}", call.name);
            }
        }
        answer
    }

    fn smc(&self, cpu: bool, immediate: bool, function: &Smc, arguments: &[Argument; 3]) {
        let function = match *function {
            Smc::Psci(number, wide) => 0x8400_0000 | u32::from(wide) << 30 | u32::from(number & 0x3f),
            Smc::Architecture(number) => 0x8000_0000 | u32::from(number),
            Smc::Any(function) => function,
        };
        // Turning off, suspending and ending do not return: CPU_SUSPEND, CPU_OFF, SYSTEM_OFF, SYSTEM_RESET, CPU_FREEZE,
        // CPU_DEFAULT_SUSPEND, SYSTEM_SUSPEND, SYSTEM_RESET2.
        if function >> 16 & 0xbfff == 0x8400 && matches!(function & 0x3f, 1 | 2 | 8 | 9 | 0xb | 0xc | 0xe | 0x12) {
            return;
        }
        let mut registers: Registers = std::array::from_fn(|n| 0x1000 + n as u64);
        registers[0] = function.into();
        for (register, argument) in registers[1..].iter_mut().zip(arguments) {
            *register = self.value(*argument, Some(Kind::PageAddress));
        }
        let (before, look) = (registers, self.world.look());
        self.world.host.smc(cpu.into(), immediate.into(), &mut registers);
        assert_eq!(registers[4..], before[4..], "{function:#x}");
        assert_eq!(self.world.look(), look, "firmware has no part in memory");
    }

    /// Makes a VM as a VMM does. Whatever is in the way makes calls fail.
    fn make(&mut self, block: u64, kind: u8, seal: bool) {
        let attributes = attributes(kind);
        let base = RAM + block * 0x20_0000;
        let [_, pages, vcpu_pages, _] = self.call(0, [number("VM_SIZES"), attributes, 0, 0, 0, 0, 0]);
        let [status, handle, ..] = self.call(0, [number("VM_CREATE"), attributes, base, pages, 0, 0, 0]);
        if status != Status::Success.register() {
            return;
        }
        self.blocks.insert(handle, block);
        self.call(0, [number("VM_DONATE_TABLES"), handle, base + 0x1c_0000, 16, 0, 0, 0]);
        let vcpu = base + 0x10_0000;
        self.call(0, [number("VCPU_CREATE"), handle, 0, vcpu, vcpu_pages, run_page(block), 0]);
        self.call(0, [number("VM_MAP"), handle, GUEST, base + 0x1d_0000, 32, 0, 0]);
        if seal {
            self.call(0, [number("VM_SEAL"), handle, GUEST, GUEST + 8, 0x800_0000, 0x80a_0000, 0]);
        }
    }
}

/// A page of the block for VCPU_CREATE.
fn run_page(block: u64) -> u64 {
    RAM + block * 0x20_0000 + 0x18_0000
}

fn attributes(n: u8) -> u64 {
    let kind = [VmKind::Ordinary, VmKind::Pkvm, VmKind::Realm][usize::from(n % 3)];
    VmAttributes { kind, ipa_bits: if n & 0x40 == 0 { 40 } else { 36 }, vcpus: 2 }.bits()
}

/// Whether x1 of a call that has failed is what the interface says: 0, a page of what the call was about, or a number.
fn is_in_reach(call: &Call, registers: &[u64; 7], status: Status, x1: u64) -> bool {
    if x1 == 0 || status == Status::NeedsTables {
        return true;
    }
    let values = registers[1..].iter().zip(call.arguments);
    let pages = values.clone().find(|(_, argument)| matches!(argument.kind, Kind::PageCount { .. }));
    let pages = pages.map_or(1, |(&pages, _)| pages);
    values.filter(|(_, argument)| matches!(argument.kind, Kind::PageAddress | Kind::GuestAddress { .. })).any(
        |(&base, _)| x1.checked_sub(base).is_some_and(|offset| offset % PAGE_SIZE == 0 && offset / PAGE_SIZE < pages),
    )
}
