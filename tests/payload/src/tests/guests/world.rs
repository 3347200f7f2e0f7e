//! The world switch: neither the host nor a guest can tell that others use the same CPU.

use arrayvec::ArrayVec;
use ravelin_abi::{ExitReason, VmKind};
use ravelin_guest::DEVICE;
use spin::Mutex;

use crate::{
    rt::{
        cpu::{self, read_register},
        exchange::{AREA_PAGES, Exchange, Vectors, Who, has_sve},
        gic,
        memory::{self, PAGE},
        platform::platform,
        vm::{Guest, MEMORY, PROTECTED, Pages, Stop, Vm, block_of, code},
    },
    tests::{Failure, Outcome, check, check_eq, guests::interrupts, number},
};

const MIB: u64 = 1 << 20;

/// A device of the test's own.
pub(super) const OTHER_DEVICE: u64 = DEVICE + PAGE;

/// Guest address of an area of the first vCPU; those of the others are behind it.
const AREA: u64 = MEMORY;
/// Guest address where there is memory, once the host has put it there.
const ABSENT: u64 = MEMORY + 0x10_0000;
/// Guest address of private memory.
const PRIVATE: u64 = MEMORY + 0x20_0000;

/// Guest address of the area of a vCPU.
fn area_of(vcpu: u64) -> u64 {
    AREA + vcpu * AREA_PAGES * PAGE
}

/// Instructions that tests put between the filling of registers and the look at them.
mod a64 {
    pub(super) const HVC: u32 = 0xd400_0002;
    pub(super) const SMC: u32 = 0xd400_0003;
    pub(super) const WFI: u32 = 0xd503_207f;
    pub(super) const WFE: u32 = 0xd503_205f;
    pub(super) const NOP: u32 = 0xd503_201f;
    pub(super) const LDR_X5_X6: u32 = 0xf940_00c5;
    pub(super) const STR_X5_X6: u32 = 0xf900_00c5;
    pub(super) const STRB_W5_X6: u32 = 0x3900_00c5;
    pub(super) const LDP_X5_X7_X6: u32 = 0xa940_1cc5;
    pub(super) const MRS_X5_PFR0: u32 = 0xd538_0405;
    pub(super) const MSR_SGI1R_X5: u32 = 0xd518_cba5;
    /// A store, and then `ldr x5, [x30, #FLAG]` and `cbz x5, . - 4`.
    pub(super) const AWAIT_FLAG: [u32; 3] = [STR_X5_X6, 0xf940_43c5, 0xb4ff_ffe5];
}

/// The host, which runs vCPUs with something of its own in every register and looks what becomes of it.
struct Host {
    /// For each CPU.
    exchanges: ArrayVec<Mutex<Exchange>, 4>,
    seed: Mutex<u64>,
}

impl Host {
    fn new(pages: &Pages, vectors: Vectors) -> Result<Self, Failure> {
        let mut exchanges = ArrayVec::new();
        for _ in 0..platform().cpus.len().min(4) {
            let area = pages.take(AREA_PAGES)?;
            exchanges.push(Mutex::new(Exchange::new(area, area, Who::Host, vectors)));
        }
        Ok(Self { exchanges, seed: Mutex::new(0x1000) })
    }

    /// Runs a vCPU; returns x0 to x3.
    fn run(&self, handle: u64, index: u64) -> Result<[u64; 4], Failure> {
        let mut exchange = self.exchanges[cpu::this()].lock();
        let seed = {
            let mut seed = self.seed.lock();
            *seed += 1;
            *seed
        };
        exchange.prepare(seed, &[a64::HVC])?;
        exchange.set_x(0, number("VCPU_RUN"));
        exchange.set_x(1, handle);
        exchange.set_x(2, index);
        exchange.execute();
        exchange.check(&[0, 1, 2, 3])?;
        exchange.check_changed()?;
        Ok([0, 1, 2, 3].map(|number| exchange.x(number)))
    }
}

/// Looks for a guest's secrets, whole or half, in what its host sees: the run page, and the registers of the call.
fn find_secret(run_page: u64, results: [u64; 4], guest: &Exchange, but: &[usize]) -> Outcome {
    const SMALL: u32 = 0xffff;
    let halves = |word: u64| [word as u32, (word >> 32) as u32];
    let mut seen = ArrayVec::<u32, 128>::new();
    let page = (0..PAGE).step_by(8).map(|offset| memory::load(run_page + offset));
    for half in results.into_iter().chain(page).flat_map(halves).filter(|&half| half > SMALL) {
        check!(seen.try_push(half).is_ok(), "the run page is full");
    }
    let mut found = None;
    guest.secrets(but, |secret| {
        if let Some(half) = halves(secret).into_iter().find(|half| seen.contains(half)) {
            found = Some((secret, half));
        }
    });
    match found {
        Some((secret, half)) => Err(Failure::new(format_args!("the host sees {half:#x} of the secret {secret:#x}"))),
        None => Ok(()),
    }
}

/// Something that makes a guest come to EL2.
struct Case {
    name: &'static str,
    instructions: ArrayVec<u32, 3>,
    /// Values of registers.
    x: ArrayVec<(usize, u64), 6>,
    /// Registers that the guest sees change.
    changes: ArrayVec<usize, 20>,
    /// What the host learns of it, if it does.
    exit: Option<ExitReason>,
}

impl Case {
    fn new(name: &'static str, instructions: &[u32], exit: Option<ExitReason>) -> Self {
        let instructions = instructions.iter().copied().collect();
        Self { name, instructions, x: ArrayVec::new(), changes: ArrayVec::new(), exit }
    }

    fn with(mut self, x: &[(usize, u64)]) -> Self {
        self.x.extend(x.iter().copied());
        self
    }

    fn changes(mut self, registers: &[usize]) -> Self {
        self.changes.extend(registers.iter().copied());
        self
    }

    /// Whether the guest goes on when its host says so.
    fn spins(&self) -> bool {
        self.instructions.len() == 3
    }

    /// Whether the host is to see x5.
    fn stores_word(&self) -> bool {
        self.instructions.first() == Some(&a64::STR_X5_X6)
    }

    /// A call with these arguments, by the guest's usual instruction.
    fn call(name: &'static str, kind: VmKind, arguments: &[u64], exit: Option<ExitReason>) -> Self {
        let instruction = if kind == VmKind::Realm { a64::SMC } else { a64::HVC };
        let mut case = Self::new(name, &[instruction], exit);
        case.x.extend(arguments.iter().copied().enumerate());
        case.changes(&[0, 1, 2, 3])
    }
}

const CPU_ON: u64 = 0xc400_0003;
const CPU_OFF: u64 = 0x8400_0002;
const VERSION: u64 = 0x8400_0000;

fn cases(vm: &Vm<'_>) -> ArrayVec<Case, 24> {
    use ExitReason::*;
    let device = (6, vm.shared(OTHER_DEVICE) + 8);
    let kind = vm.kind;
    let share = |share: bool| match kind {
        VmKind::Realm => [0xc400_0197, PRIVATE, PRIVATE + PAGE, u64::from(!share), 0],
        _ => [if share { 0xc600_0003 } else { 0xc600_0004 }, PRIVATE, 1, 0, 0],
    };
    let mut cases = ArrayVec::new();
    cases.extend([
        Case::new("store", &[a64::STR_X5_X6], Some(Mmio)).with(&[device]),
        Case::new("store of a byte", &[a64::STRB_W5_X6], Some(Mmio)).with(&[device]),
        Case::new("load", &[a64::LDR_X5_X6], Some(Mmio)).with(&[device]).changes(&[5]),
        Case::new("load of what is absent", &[a64::LDP_X5_X7_X6], Some(PageFault))
            .with(&[(6, ABSENT)])
            .changes(&[5, 7]),
        Case::new("WFI", &[a64::WFI], Some(Wait)),
        Case::new("WFE", &[a64::WFE], None),
        Case::new("nothing", &[a64::NOP], None),
        Case::new("host's interrupt", &a64::AWAIT_FLAG, Some(Mmio)).with(&[device]).changes(&[5]),
        Case::new("system register", &[a64::MRS_X5_PFR0], None).changes(&[5]),
        Case::new("SGI", &[a64::MSR_SGI1R_X5], Some(Wake)).with(&[(5, 2)]),
        Case::call("share", kind, &share(true), Some(Shared)),
        Case::call("unshare", kind, &share(false), None),
        Case::new("VERSION by HVC", &[a64::HVC], None).with(&[(0, VERSION)]).changes(&[0, 1, 2, 3]),
        Case::new("VERSION by SMC", &[a64::SMC], None).with(&[(0, VERSION)]).changes(&[0, 1, 2, 3]),
        Case::new("HVC 1", &[a64::HVC | 1 << 5], None).changes(&[0, 1, 2, 3]),
        Case::new("SMC ffff", &[a64::SMC | 0xffff << 5], None).changes(&[0, 1, 2, 3]),
        Case::new("unknown call", &[a64::HVC], None).with(&[(0, 0xc600_0fff)]).changes(&[0, 1, 2, 3]),
        Case::new("CPU_ON", &[a64::HVC], Some(CpuOn))
            .with(&[(0, CPU_ON), (1, 2), (2, ravelin_guest::IMAGE), (3, block_of(2))])
            .changes(&[0, 1, 2, 3]),
    ]);
    if kind == VmKind::Realm {
        cases.push(
            Case::new("host call", &[a64::SMC], Some(HostCall)).with(&[(0, 0xc400_0199), (1, PRIVATE)]).changes(&[0]),
        );
    }
    cases.push(Case::new("CPU_OFF", &[a64::HVC], Some(CpuOff)).with(&[(0, CPU_OFF)]));
    cases
}

/// Deals with an exit; returns how the vCPU goes on: to its end, or not at all.
fn serve(
    guest: &Guest<'_>,
    exchange: &Mutex<Exchange>,
    case: &Case,
    stop: &Stop,
    memory: u64,
) -> Result<bool, Failure> {
    use ravelin_abi::Answer::Complete;
    let Stop::Exit(exit) = stop else { return Ok(true) };
    check_eq!(ExitReason::from_code(exit.reason), case.exit, "exit of {}", case.name);
    match case.exit {
        Some(ExitReason::Mmio) => {
            check_eq!(exit.address, guest.vm.shared(OTHER_DEVICE) + 8, "address of {}", case.name);
            guest.answer(Complete, 0x1234_5678_9abc_def0);
            if case.spins() {
                gic::arm_timer(read_register!("cntfrq_el0") / 1000);
                let exit = guest.run_once()?;
                gic::stop_timer();
                check_eq!(exit.reason, ExitReason::Interrupted.code(), "exit of a guest that spins");
                exchange.lock().raise_flag();
            }
        }
        Some(ExitReason::PageFault) => guest.vm.map(ABSENT, memory, 1)?,
        Some(ExitReason::HostCall) => guest.answer(Complete, 0),
        Some(ExitReason::CpuOff) => return Ok(false),
        _ => {}
    }
    Ok(true)
}

/// Each exit with something in every register of the guest and of the host: both keep theirs, and the host sees none of the
/// guest's.
pub(crate) fn registers_are_kept() -> Outcome {
    for vectors in [Vectors::None, Vectors::all()] {
        for kind in PROTECTED {
            let pages = Pages::new(4 * MIB);
            let host = Host::new(&pages, vectors)?;
            let vm = Vm::boot(&pages, kind, 3)?;
            vm.add(PRIVATE, 1)?;
            let absent = pages.take(1)?;
            let mut guest = vm.guest(0);
            // Another one that waits, to be woken by SGIs.
            guest.turn_on(1)?;
            let mut other = vm.guest(1);
            interrupts::prepare(&mut other)?;
            other.begin_code(code::wfi(), &[])?;
            other.exit(ExitReason::Wait)?;
            let exchange = Mutex::new(vm.add_area(&mut guest, AREA, vectors)?);
            let allowed = Mutex::new(ArrayVec::<usize, 8>::new());
            let run_page = vm.run_page(0);
            let via = |handle, index| {
                let results = host.run(handle, index)?;
                find_secret(run_page, results, &exchange.lock(), &allowed.lock())?;
                Ok(results[0])
            };
            guest.via = Some(&via);
            for (seed, case) in (1..).zip(cases(&vm)) {
                one_case(&mut guest, &exchange, &allowed, &case, seed, absent).map_err(|failure| {
                    Failure::new(format_args!("{} {vectors:?} {}: {failure}", kind.name(), case.name))
                })?;
            }
            vm.finish()?;
        }
    }
    Ok(())
}

fn one_case(
    guest: &mut Guest<'_>,
    exchange: &Mutex<Exchange>,
    allowed: &Mutex<ArrayVec<usize, 8>>,
    case: &Case,
    seed: u64,
    absent: u64,
) -> Outcome {
    let [entry, argument] = {
        let mut exchange = exchange.lock();
        exchange.prepare(seed, &case.instructions)?;
        case.x.iter().for_each(|&(number, value)| exchange.set_x(number, value));
        exchange.call()
    };
    // What the instruction is about.
    let mut named = allowed.lock();
    named.clear();
    named.extend(case.x.iter().map(|&(number, _)| number));
    if case.stores_word() {
        named.push(5);
    }
    drop(named);
    guest.told.clear();
    guest.begin_code(code::execute(), &[entry, argument])?;
    let mut stop = guest.go()?;
    if let Stop::Exit(_) = stop {
        if !serve(guest, exchange, case, &stop, absent)? {
            return Ok(());
        }
        stop = guest.go()?;
    } else if let Some(reason) = case.exit {
        let seen = guest.told.iter().any(|exit| exit.reason == reason.code());
        check!(seen, "no exit says {}", reason.name());
    }
    let Stop::Done(reply) = stop else { return Err(Failure::new(format_args!("another exit: {stop:x?}"))) };
    check_eq!(reply.exception, None, "exception");
    let exchange = exchange.lock();
    exchange.check(&case.changes)?;
    exchange.check_changed()
}

/// Runs something on a CPU.
pub(super) fn on_cpu<T: Send>(cpu: usize, body: impl FnOnce() -> Result<T, Failure> + Send) -> Result<T, Failure> {
    if cpu == cpu::this() {
        return body();
    }
    let body = Mutex::new(Some(body));
    let result = Mutex::new(None);
    let job = |_| {
        let body = body.lock().take();
        *result.lock() = body.map(|body| body());
    };
    cpu::run_on(&[cpu], &job, || ());
    result.into_inner().expect("the job has been done")
}

/// A vCPU with an area.
struct Tenant<'a> {
    guest: Guest<'a>,
    exchange: Exchange,
}

impl Tenant<'_> {
    /// Begins to execute what has been prepared.
    fn begin(&mut self) -> Outcome {
        self.guest.begin_code(code::execute(), &self.exchange.call())
    }

    /// Looks at the vector registers.
    fn look(&mut self) -> Outcome {
        self.exchange.prepare_to_look(&[a64::NOP])?;
        self.begin()?;
        self.guest.finish().map(drop)
    }

    /// Goes on until the next store, which is done.
    fn next(&mut self) -> Outcome {
        let exit = self.guest.exit(ExitReason::Mmio)?;
        check_eq!(exit.address, self.guest.vm.shared(OTHER_DEVICE), "address of the store");
        self.guest.answer(ravelin_abi::Answer::Complete, 0);
        Ok(())
    }
}

/// Two vCPUs of one VM and one of another take turns on all CPUs with a host that uses the same registers: each starts with
/// zeros and keeps what is its own.
pub(crate) fn vectors_stay_apart() -> Outcome {
    const TURNS: usize = 3;
    let pages = Pages::new(8 * MIB);
    let vectors = Vectors::all();
    let host = Host::new(&pages, vectors)?;
    let via = |handle, index| Ok(host.run(handle, index)?[0]);
    let (one, two) = (Vm::boot(&pages, VmKind::Pkvm, 2)?, Vm::boot(&pages, VmKind::Realm, 1)?);
    one.guest(0).turn_on(1)?;
    let mut tenants = ArrayVec::<Mutex<Tenant<'_>>, 3>::new();
    for (vm, vcpu) in [(&one, 0), (&one, 1), (&two, 0)] {
        let mut guest = vm.guest(vcpu);
        guest.via = Some(&via);
        let exchange = vm.add_area(&mut guest, area_of(vcpu), vectors)?;
        tenants.push(Mutex::new(Tenant { guest, exchange }));
    }
    let cpus = host.exchanges.len();
    // Each time on the next CPU.
    let each = |turn: usize, body: &(dyn Fn(&mut Tenant<'_>, u64) -> Outcome + Sync)| {
        tenants.iter().enumerate().try_for_each(|(index, tenant)| {
            on_cpu((turn + index) % cpus, || body(&mut tenant.lock(), index as u64 + 1))
                .map_err(|failure| Failure::new(format_args!("vCPU {index} in turn {turn}: {failure}")))
        })
    };
    each(0, &|tenant, _| {
        tenant.look()?;
        tenant.exchange.check_zero()
    })?;
    each(1, &|tenant, seed| {
        tenant.exchange.prepare(seed, &[a64::STR_X5_X6; TURNS])?;
        tenant.exchange.set_x(6, tenant.guest.vm.shared(OTHER_DEVICE));
        tenant.begin()
    })?;
    for turn in 0..TURNS {
        each(turn, &|tenant, _| tenant.next())?;
    }
    each(3, &|tenant, _| {
        tenant.guest.finish()?;
        tenant.exchange.check(&[])
    })?;
    each(5, &|tenant, _| {
        tenant.look()?;
        tenant.exchange.check_vectors()
    })?;
    // Turned off and on again, a vCPU has zeros.
    {
        let mut second = tenants[1].lock();
        second.guest.begin_code(code::hvc(), &[CPU_OFF])?;
        second.guest.exit(ExitReason::CpuOff)?;
        tenants[0].lock().guest.turn_on(1)?;
        let mut guest = one.guest(1);
        guest.via = Some(&via);
        second.guest = guest;
        second.look()?;
        second.exchange.check_zero()?;
    }
    one.end()?;
    two.end()?;
    pages.are_owned()
}

/// Guests and hosts with vectors of all lengths.
pub(crate) fn vector_lengths() -> Outcome {
    if !has_sve() {
        return Ok(());
    }
    let pages = Pages::new(8 * MIB);
    for of_host in [0xf, 0, 1] {
        let mark = pages.mark();
        let host = Host::new(&pages, Vectors::Sve(of_host))?;
        let via = |handle, index| Ok(host.run(handle, index)?[0]);
        let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
        let mut guest = vm.guest(0);
        guest.via = Some(&via);
        let exchange = vm.add_area(&mut guest, AREA, Vectors::None)?;
        let mut tenant = Tenant { guest, exchange };
        let mut longest = 0;
        for length in 0..16 {
            tenant.exchange = tenant.exchange.with_vectors(Vectors::Sve(length));
            tenant.exchange.prepare(length.into(), &[a64::STR_X5_X6])?;
            tenant.exchange.set_x(6, OTHER_DEVICE);
            tenant.begin()?;
            tenant.next()?;
            tenant.guest.finish()?;
            tenant.exchange.check(&[])?;
            longest = tenant.exchange.length();
        }
        // As long as they are at the host.
        let mut at_host = host.exchanges[0].lock().with_vectors(Vectors::Sve(0xf));
        at_host.prepare(1, &[a64::NOP])?;
        at_host.execute();
        check_eq!(longest, at_host.length(), "longest vector of the guest");
        vm.finish()?;
        pages.reset(mark);
    }
    Ok(())
}
