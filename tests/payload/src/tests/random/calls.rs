//! Calls of the host: well-formed ones that mostly make sense, and malformed ones.

use core::sync::atomic::Ordering::Relaxed;

use ravelin_abi::{
    ADDRESS_END, CALLS, HostCall, Kind, PAGE_SIZE, REGISTER_LAST, REGISTER_PC, Status, VmKind, system_register,
};
use ravelin_guest::playground::{BASE, BLOCK_FRAMES, BLOCKS_BASE, FRAMES, KEPT, Random, SPAN};

use super::playground::{Place, Playground};
use crate::{
    rt::{
        call::{self, Instruction, Registers, psci},
        cpu::{self, read_register},
        gic,
        memory::{BLOCK, PAGE},
        platform::platform,
        vm::{DISTRIBUTOR, REDISTRIBUTORS, Vm, succeed},
    },
    tests::{Failure, Outcome, check, check_eq, number},
};

/// A call by its name, with x1 to x6.
type Request = (&'static str, [u64; 6]);

fn request<const N: usize>(name: &'static str, values: [u64; N]) -> Request {
    let mut arguments = [0; 6];
    arguments[..N].copy_from_slice(&values);
    (name, arguments)
}

/// A range of frames of a guest, the kept ones among them or not.
fn frames(random: &mut Random, first: u64) -> (u64, u64) {
    let longest = random.one_of([1, 1, 1, 2, 8, 40]);
    if random.once_in(6) {
        let any = random.below(BLOCK_FRAMES);
        let frame = random.one_of([0, 512, any]);
        let most = random.one_of([512, BLOCK_FRAMES, longest]);
        return (BLOCKS_BASE + frame * PAGE, most.min(BLOCK_FRAMES - frame));
    }
    let frame = first + random.below(FRAMES - first);
    (BASE + frame * PAGE, 1 + random.below(longest.min(FRAMES - frame)))
}

impl Playground<'_> {
    /// Makes a call.
    pub(super) fn call(&self, random: &mut Random) -> Outcome {
        let request = match random.below(3) {
            0 => self.about_pages(random),
            _ if self.places.is_empty() => self.about_pages(random),
            1 if random.once_in(2) => {
                let place = &self.places[random.below(self.places.len() as u64) as usize];
                if random.once_in(12) {
                    return self.boot(place, random);
                }
                self.about_life(place, random)
            }
            _ => {
                let handle = if random.once_in(3) {
                    self.places[random.below(self.places.len() as u64) as usize].handle.load(Relaxed)
                } else {
                    self.vms[random.below(self.vms.len() as u64) as usize].handle
                };
                self.about_memory(handle, random)
            }
        };
        self.make(request, random).map(drop)
    }

    /// Makes a call, or one that is malformed in its place.
    fn make(&self, (name, arguments): Request, random: &mut Random) -> Result<Status, Failure> {
        let [x1, x2, x3, x4, x5, x6] = arguments;
        let mut registers = Registers::with([number(name), x1, x2, x3, x4, x5, x6]);
        let instruction = if random.once_in(12) { malform(name, &mut registers, random) } else { Instruction::Hvc };
        let runs = name == "VCPU_RUN";
        if runs {
            // What runs is an endless loop, if it is anything.
            gic::arm_timer(read_register!("cntfrq_el0") / 20_000);
        }
        let (status, result) = issue(instruction, &registers)?;
        if runs {
            gic::stop_timer();
        }
        if (name, status) == ("VM_CREATE", Status::Success) {
            match self.places.iter().find(|place| place.metadata == registers.0[2]) {
                Some(place) => place.handle.store(result, Relaxed),
                // In pages of all: it has no place.
                None => {
                    succeed("VM_TEARDOWN", [result])?;
                    check_eq!(succeed("VM_DESTROY", [result])?, 0, "pages left of a VM");
                }
            }
        }
        Ok(status)
    }

    /// A call that has nothing to do with VMs.
    fn about_pages(&self, random: &mut Random) -> Request {
        let (address, count) = if random.once_in(6) { self.guests(random) } else { self.hosts(random) };
        match random.below(32) {
            0..5 => request("SHARE", [address, count]),
            5..10 => request("UNSHARE", [address, count]),
            10..15 => request("DONATE", [address, count]),
            15..20 => request("TAKE_BACK", [address, count]),
            20..24 => request("PIN", [address, count]),
            24..28 => request("UNPIN", [address, count]),
            28 => request("PAGE_STATE", [address]),
            29 => request("STATISTICS", [random.one_of([address, address, platform().statistics])]),
            30 => request(random.one_of(["UID", "REVISION", "FEATURES"]), [0]),
            _ => self.about_nothing(random),
        }
    }

    /// A call about pages that are not of the playground, and that no call does anything with.
    fn about_nothing(&self, random: &mut Random) -> Request {
        let op = random.one_of(["SHARE", "UNSHARE", "DONATE", "TAKE_BACK", "PIN", "UNPIN", "PAGE_STATE", "STATISTICS"]);
        let page = nobodys_page(random);
        request(op, if matches!(op, "PAGE_STATE" | "STATISTICS") { [page, 0] } else { [page, 1] })
    }

    /// A call in the life of a VM that comes and goes.
    fn about_life(&self, place: &Place, random: &mut Random) -> Request {
        let handle = place.handle.load(Relaxed);
        let vcpu = random.one_of([0, 0, 0, 1]);
        let attributes = Vm::attributes(random.one_of([VmKind::Pkvm, VmKind::Realm]), 1).bits();
        match random.below(21) {
            0..4 => self.create(place, random),
            4 => request("VM_SIZES", [attributes]),
            5..7 => self.create_vcpu(place, random),
            7 => seal(handle, random),
            8..12 => request("VCPU_RUN", [handle, vcpu]),
            12 => request("VCPU_GET_REGISTER", [handle, vcpu, register(random)]),
            13 | 14 => request("VCPU_SET_REGISTER", [handle, vcpu, register(random), random.next()]),
            15 | 16 => request("VM_TEARDOWN", [handle]),
            17 => request("VM_RECLAIM", [handle, BASE, FRAMES]),
            18 => request("VM_RECLAIM", [handle, BASE, SPAN]),
            19 => request("REGISTER_RESET_VALUE", [attributes, register(random)]),
            _ => request("VM_DESTROY", [handle]),
        }
    }

    fn create(&self, place: &Place, random: &mut Random) -> Request {
        let kind = random.one_of([VmKind::Ordinary, VmKind::Pkvm, VmKind::Realm]);
        let sizes = self.sizes[kind as usize];
        let pages = self.page(random);
        let metadata = random.one_of([place.metadata, place.metadata, place.metadata, pages, place.metadata + PAGE]);
        request("VM_CREATE", [Vm::attributes(kind, 1).bits(), metadata, sizes.vm])
    }

    fn create_vcpu(&self, place: &Place, random: &mut Random) -> Request {
        let sizes = self.sizes[0];
        let page = self.page(random);
        let index = random.one_of([0, 0, 0, 1]);
        let run_page = random.one_of([place.run_page, place.run_page, place.run_page, page]);
        let pages = random.one_of([sizes.vcpu, sizes.vcpu, sizes.vcpu, 1]);
        request("VCPU_CREATE", [place.handle.load(Relaxed), index, place.vcpu, pages, run_page])
    }

    /// What makes a VM that runs, a call after the other; others may come in between.
    fn boot(&self, place: &Place, random: &mut Random) -> Outcome {
        self.make(self.create(place, random), random)?;
        let handle = place.handle.load(Relaxed);
        let (page, _) = self.guests(random);
        self.make(request("VM_DONATE_TABLES", [handle, page, random.one_of([1, 2, 4])]), random)?;
        for _ in 0..2 {
            self.make(self.map(handle, random), random)?;
        }
        let (first, _) = self.guests(random);
        self.make(request("VM_MAP", [handle, BASE + KEPT * PAGE, first, 1]), random)?;
        self.make(self.create_vcpu(place, random), random)?;
        self.make(request("VCPU_SET_REGISTER", [handle, 0, register(random), random.next()]), random)?;
        self.make(seal(handle, random), random)?;
        for _ in 0..4 {
            self.make(request("VCPU_RUN", [handle, 0]), random)?;
        }
        Ok(())
    }

    fn map(&self, handle: u64, random: &mut Random) -> Request {
        let (mut at, most) = frames(random, 0);
        let (address, count) = if random.once_in(6) { self.hosts(random) } else { self.guests(random) };
        if random.once_in(3) {
            at = BLOCKS_BASE + (address & (BLOCK - 1)); // so that a block stays one
        } else if random.once_in(16) {
            at = random.one_of([DISTRIBUTOR, REDISTRIBUTORS, 1 << 40, 1 << 36]);
        }
        request("VM_MAP", [handle, at, address, random.one_of([count, count.min(most)])])
    }

    /// A call about the memory of a VM, that may be one that stays.
    fn about_memory(&self, handle: u64, random: &mut Random) -> Request {
        let (at, count) = frames(random, 0);
        let (address, pages) = self.guests(random);
        let nobodys = nobodys_page(random);
        match random.below(32) {
            0..9 => self.map(handle, random),
            9..12 => {
                let (at, count) = frames(random, KEPT);
                let ordinary = self.vms.iter().find(|vm| !vm.kind.is_protected()).map_or(handle, |vm| vm.handle);
                request("VM_UNMAP", [random.one_of([ordinary, ordinary, handle]), at, count])
            }
            12..18 => request("CLAIM", [handle, at, count]),
            18..23 => request("RELEASE", [handle, at, count]),
            23..26 => request("FORCE_RECLAIM", [random.one_of([address, address, address, nobodys]), pages]),
            26 => request("SPI", [handle, random.one_of([32, 40, 300, 1019]), random.below(2)]),
            27 | 28 => request("VM_DONATE_TABLES", [handle, address, pages.min(2)]),
            29 => request("VM_RECLAIM", [handle, at, count]),
            30 => request("VCPU_GET_REGISTER", [handle, random.below(2), register(random)]),
            _ => request("CLAIM", [handle, random.one_of([1 << 36, 1 << 35, 1 << 40, DISTRIBUTOR]), count]),
        }
    }
}

fn seal(handle: u64, random: &mut Random) -> Request {
    let entry = BASE + random.one_of([KEPT, KEPT, KEPT, 0, 1 << 26]) * PAGE;
    let distributor = random.one_of([DISTRIBUTOR, DISTRIBUTOR, DISTRIBUTOR, REDISTRIBUTORS, BASE, 1 << 40]);
    request("VM_SEAL", [handle, entry, BASE, distributor, REDISTRIBUTORS])
}

const MPIDR_EL1: u64 = system_register(3, 0, 0, 0, 5);

fn register(random: &mut Random) -> u64 {
    let any = random.below(REGISTER_LAST + 1);
    random.one_of([0, 30, REGISTER_PC, MPIDR_EL1, any])
}

/// A page that is not the host's: of the hypervisor, of a device, or of nothing.
fn nobodys_page(random: &mut Random) -> u64 {
    let hypervisor = platform().carve_out.map_or(0x900_0000, |region| region.start + random.below(64) * PAGE);
    random.one_of([hypervisor, 0x900_0000, ADDRESS_END - PAGE])
}

/// Makes a call malformed: what it is about is then outside of what there is. Returns the instruction to make it by.
fn malform(name: &str, registers: &mut Registers, random: &mut Random) -> Instruction {
    let Registers([function, arguments @ ..]) = registers;
    let kinds = CALLS.iter().find(|call| call.name == name).map_or(&[][..], |call| call.arguments);
    if kinds.is_empty() || random.once_in(4) {
        let immediate = random.one_of([Instruction::Hvc1, Instruction::HvcFfff]);
        match random.below(3) {
            0 => return immediate,
            1 => *function |= 1 << (32 + random.below(32)),
            _ => *function ^= 1 << random.one_of([8, 10, 16, 20, 24, 31]),
        }
        return Instruction::Hvc;
    }
    let index = random.below(kinds.len() as u64) as usize;
    let value = &mut arguments[index];
    let any = random.next();
    *value = match kinds[index].kind {
        Kind::Zero => random.one_of([1, 1 << 63, any | 1]),
        Kind::PageAddress => {
            let page = nobodys_page(random);
            random.one_of([*value | 8, *value + 1, any | 1, ADDRESS_END, u64::MAX - 0xfff, page])
        }
        Kind::GuestAddress { align } => random.one_of([*value + align / 2, any | 1, ADDRESS_END, !(align - 1)]),
        Kind::PageCount { max } => random.one_of([0, max + 1, 1 << 52, u64::MAX, ADDRESS_END / PAGE_SIZE]),
        Kind::Number { first, last } => random.one_of([first.wrapping_sub(1), last.wrapping_add(1), first, last, any]),
        // Not that of another VM: there have not been so many.
        Kind::Handle => random.one_of([0, *value ^ 1 << (40 + any % 24), u64::MAX, any | 1 << 63]),
        Kind::Attributes => random.one_of([*value | 1 << 40, *value | 0xff, *value | 0xff00, any]),
    };
    Instruction::Hvc
}

/// Makes a call, and checks what holds of any: the arguments that it refuses, and which registers it changes. Returns the
/// status and what is in x1; of calls without a status SUCCESS.
pub(super) fn issue(instruction: Instruction, before: &Registers) -> Result<(Status, u64), Failure> {
    let after = call::call(instruction, *before);
    let [function, x1, x2, x3, x4, x5, x6, ..] = before.0;
    let [x0, result, ..] = after.0;
    let parsed = match instruction {
        Instruction::Hvc => HostCall::parse(function, &[x1, x2, x3, x4, x5, x6]),
        _ => Err(Status::NotSupported),
    };
    let what = format_args!("{instruction:?} {function:#x} {x1:#x} {x2:#x} {x3:#x} {x4:#x}: {x0:#x}");
    let call = CALLS.iter().find(|call| u64::from(call.number) == function);
    let (status, results) = match (parsed, call) {
        (Err(status), _) => {
            check!(x0 == status.register(), "{what}, not {}", status.name());
            check!(status == Status::NotSupported || result == 0, "{what}, {result:#x}");
            (status, if status == Status::NotSupported { 1 } else { 2 })
        }
        (Ok(_), Some(call)) if call.results.first() == Some(&"status") => match Status::from_code(x0.cast_signed()) {
            Some(Status::Success) => (Status::Success, call.results.len()),
            Some(status) if !matches!(status, Status::NotSupported | Status::Reserved) => (status, 2),
            _ => return Err(Failure::new(what)),
        },
        (Ok(_), call) => (Status::Success, call.map_or(0, |call| call.results.len())),
    };
    let changed = (results..31).find(|&index| before.0[index] != after.0[index]);
    check_eq!(changed, None, "{what}: a register that it changes");
    Ok((status, result))
}

/// Calls the firmware, about nothing that is not so already.
pub(super) fn firmware(random: &mut Random) -> Outcome {
    let this = cpu::mpidr();
    match random.below(8) {
        0 => check_eq!(psci(psci::CPU_ON, this, cpu::entry_point(), 0), psci::ALREADY_ON, "CPU_ON of this CPU"),
        1 => check_eq!(psci(psci::AFFINITY_INFO, this, 0, 0), psci::AFFINITY_ON, "AFFINITY_INFO of this CPU"),
        2 => {
            let target = random.next() | 1 << 40;
            check_eq!(psci(psci::CPU_ON, target, 0, 0), psci::INVALID_PARAMETERS, "CPU_ON of no CPU");
        }
        3 => check!(psci(psci::VERSION, 0, 0, 0) >= 0x1_0000, "PSCI_VERSION"),
        4 => check_eq!(psci(psci::FEATURES, psci::CPU_ON, 0, 0), psci::SUCCESS, "PSCI_FEATURES of CPU_ON"),
        5 => check_eq!(call::firmware([0x8000_0000, 0, 0, 0])[0] >> 16, 1, "SMCCC_VERSION"),
        6 => {
            let unknown = random.one_of([0x8400_0060, 0xc600_1001, 0x8400_00e0, 0xc200_0000, 1 << 40]);
            check_eq!(call::firmware([unknown, 1, 2, 3]), [u64::MAX, 1, 2, 3], "SMC {unknown:#x}");
        }
        _ => {
            let mut before = Registers::with([psci::VERSION]);
            let after = call::call(Instruction::Smc1, before);
            before.0[0] = u64::MAX;
            check!(before == after, "SMC with an immediate: {:#x}", after.0[0]);
        }
    }
    Ok(())
}
