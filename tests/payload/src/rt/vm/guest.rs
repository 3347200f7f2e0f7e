//! Telling a vCPU what to do.

use arrayvec::ArrayVec;
use ravelin_abi::{Answer, ExitReason, MAX_CONVERSIONS, RUN_FLAG_WRITE, RunExit, RunPage, VmKind};
use ravelin_guest::{
    COMMAND, Command, DEVICE, EXCEPTION, INTERRUPT, MAX_OPERANDS, MAX_RESULTS, OPERANDS, RESULTS, TALLY, UNEXPECTED,
};

use crate::{
    rt::{
        cpu::read_register,
        gic,
        memory::{self, PAGE},
        tally,
        vm::{Vm, call, code},
    },
    tests::{Failure, Outcome, check, check_eq, status},
};

/// Seconds after which a vCPU that gets nowhere fails the test.
const PATIENCE: u64 = 30;

/// An exception that ended code.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct GuestException {
    /// ESR_EL1.
    pub(crate) esr: u64,
    /// FAR_EL1.
    pub(crate) far: u64,
    /// ELR_EL1, from the code's first instruction on.
    pub(crate) offset: u64,
}

impl GuestException {
    /// Exception class.
    pub(crate) fn class(self) -> u64 {
        self.esr >> 26 & 0x3f
    }

    /// Whether it is the external abort that says that nothing answers at `address`.
    pub(crate) fn is_abort_at(self, address: u64) -> bool {
        let fetch = matches!(self.class(), 0x20 | 0x21);
        (fetch || matches!(self.class(), 0x24 | 0x25)) && self.esr & 0x3f == 0x10 && self.far == address
    }

    /// Whether it says that there is no such instruction.
    pub(crate) fn is_undefined(self) -> bool {
        self.class() == 0
    }
}

/// What a command has led to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reply {
    /// x0 to x7, or other results.
    pub(crate) x: [u64; MAX_RESULTS],
    /// What ended code before its end.
    pub(crate) exception: Option<GuestException>,
}

/// Why a vCPU does not run any more.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stop {
    /// The command has been carried out.
    Done(Reply),
    /// There is something for the test to do. [`Guest::answer`] says what the guest is told, if not to try again.
    Exit(RunExit),
}

/// What became of a guest's call that converts memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Conversion {
    /// So many pages are done, the first ones.
    Done(u64),
    /// None is.
    Refused,
}

/// Another way to call VCPU_RUN: takes the handle and the index, and returns x0.
pub(crate) type RunVia<'a> = &'a (dyn Fn(u64, u64) -> Result<u64, Failure> + Sync);

/// A vCPU that does what it is told. There may be only one for each vCPU at a time.
pub(crate) struct Guest<'a> {
    pub(crate) vm: &'a Vm<'a>,
    pub(crate) index: u64,
    run_page: u64,
    /// How it is run, if not as any call is made.
    pub(crate) via: Option<RunVia<'a>>,
    /// It waits for a command.
    idle: bool,
    operands: ArrayVec<u64, MAX_OPERANDS>,
    reply: Reply,
    unexpected: [u64; 4],
    /// Exits that said that a conversion is done, or that others have something to do.
    pub(crate) told: ArrayVec<RunExit, 16>,
    /// SPIs that it has handled.
    pub(crate) spis: ArrayVec<u64, 16>,
    /// Conversions of its ring that the host was told of last.
    pub(crate) conversions: ArrayVec<u64, MAX_CONVERSIONS>,
    /// To which of such the host consents: bit n for the nth one.
    pub(crate) consent: u64,
}

impl<'a> Guest<'a> {
    pub(crate) fn new(vm: &'a Vm<'a>, index: u64) -> Self {
        Self {
            vm,
            index,
            run_page: vm.run_page(index),
            via: None,
            idle: false,
            operands: ArrayVec::new(),
            reply: Reply::default(),
            unexpected: [0; 4],
            told: ArrayVec::new(),
            spis: ArrayVec::new(),
            conversions: ArrayVec::new(),
            consent: 0,
        }
    }

    /// Whether it waits for a command.
    pub(crate) const fn is_idle(&self) -> bool {
        self.idle
    }

    /// Says what the vCPU is told of its last exit.
    pub(crate) fn answer(&self, answer: Answer, value: u64) {
        let entry = self.run_page + RunPage::ENTRY as u64;
        memory::store(entry, answer.code());
        memory::store(entry + 8, value);
        memory::store(entry + 16, self.consent);
    }

    /// Runs the vCPU once; returns what the run page says. The next run tries again, unless an answer says otherwise.
    pub(crate) fn run_once(&self) -> Result<RunExit, Failure> {
        let status = match self.via {
            Some(run) => status(run(self.vm.handle, self.index)?),
            None => call("VCPU_RUN", [self.vm.handle, self.index]).0,
        };
        check_eq!(status, ravelin_abi::Status::Success, "VCPU_RUN of vCPU {}", self.index);
        self.answer(Answer::Retry, 0);
        let words = memory::words::<{ RunExit::SIZE / 8 }>(self.run_page + RunPage::EXIT as u64);
        let mut bytes = [0; RunExit::SIZE];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        Ok(RunExit::from_bytes(&bytes))
    }

    /// Runs the vCPU until it waits for a command, or until there is something for the test to do.
    pub(crate) fn go(&mut self) -> Result<Stop, Failure> {
        let frequency = read_register!("cntfrq_el0");
        let deadline = read_register!("cntvct_el0") + PATIENCE * frequency;
        // An interrupt that ends a run in which the guest does nothing.
        gic::arm_timer(PATIENCE * frequency);
        let mut runs = 0_u64;
        let stop = loop {
            match self.step() {
                Ok(None) if read_register!("cntvct_el0") > deadline => {
                    let (vcpu, done) = (self.index, runs + 1);
                    break Err(Failure::new(format_args!("vCPU {vcpu} gets nowhere: {done} runs in {PATIENCE} s")));
                }
                Ok(None) => runs += 1,
                Ok(Some(stop)) => break Ok(stop),
                Err(failure) => break Err(failure),
            }
        };
        gic::stop_timer();
        stop
    }

    /// Runs the vCPU once. Returns why it does not run any more, if it shall not just be run again.
    pub(crate) fn step(&mut self) -> Result<Option<Stop>, Failure> {
        let exit = self.run_once()?;
        if exit.conversions != 0 {
            let words = memory::words::<MAX_CONVERSIONS>(self.run_page + RunPage::CONVERSIONS as u64);
            check!(exit.conversions <= words.len() as u64, "{} conversions", exit.conversions);
            self.conversions = words.into_iter().take(exit.conversions as usize).collect();
        }
        match ExitReason::from_code(exit.reason) {
            Some(ExitReason::Interrupted) => {
                let _ = gic::take();
            }
            Some(ExitReason::Yield) => {}
            Some(ExitReason::Wake | ExitReason::Shared | ExitReason::Relinquished | ExitReason::Converted) => {
                let _ = self.told.try_push(exit);
            }
            Some(ExitReason::NeedsTables) => {
                check!((1..=512).contains(&exit.pages), "the guest lacks {} pages for tables", exit.pages);
                self.vm.donate_tables(exit.pages)?;
            }
            Some(ExitReason::Mmio) if exit.address & !0xfff == self.vm.shared(DEVICE) && exit.size == 8 => {
                if self.play(&exit)? {
                    self.idle = true;
                    return Ok(Some(Stop::Done(self.reply)));
                }
            }
            Some(_) => return Ok(Some(Stop::Exit(exit))),
            None => return Err(Failure::new(format_args!("an exit without a reason: {exit:x?}"))),
        }
        Ok(None)
    }

    /// Plays the device, for an exit that is an access to it. Returns whether the guest waits for a command.
    pub(crate) fn play(&mut self, exit: &RunExit) -> Result<bool, Failure> {
        let offset = exit.address & 0xfff;
        let index = |base: u64| (offset - base) as usize / 8;
        if exit.flags & RUN_FLAG_WRITE == 0 {
            if offset == COMMAND {
                return Ok(true);
            }
            self.answer(Answer::Complete, self.operands.get(index(OPERANDS)).copied().unwrap_or(0));
            return Ok(false);
        }
        match offset {
            RESULTS..EXCEPTION => self.reply.x[index(RESULTS)] = exit.value,
            EXCEPTION..UNEXPECTED => {
                let exception = self.reply.exception.get_or_insert_default();
                match index(EXCEPTION) {
                    0 => exception.esr = exit.value,
                    1 => exception.far = exit.value,
                    _ => exception.offset = exit.value,
                }
            }
            UNEXPECTED..INTERRUPT => {
                self.unexpected[index(UNEXPECTED)] = exit.value;
                if index(UNEXPECTED) == 3 {
                    let [vector, esr, far, elr] = self.unexpected;
                    return Err(Failure::new(format_args!(
                        "vCPU {} took an exception: vector {vector:#x} esr {esr:#x} far {far:#x} elr {elr:#x}",
                        self.index
                    )));
                }
            }
            TALLY.. => tally::add_of_guest(index(TALLY), exit.value),
            _ => {
                let _ = self.spis.try_push(exit.value);
                // As the device does whose interrupt is handled.
                call("SPI", [self.vm.handle, exit.value, 0]);
            }
        }
        self.answer(Answer::Complete, 0);
        Ok(false)
    }

    /// Gives the vCPU a command, without running it.
    pub(crate) fn begin(&mut self, command: Command, operands: &[u64]) -> Outcome {
        if !self.idle {
            match self.go()? {
                Stop::Done(_) => {}
                Stop::Exit(exit) => return Err(Failure::new(format_args!("exit before a command: {exit:x?}"))),
            }
        }
        self.idle = false;
        self.reply = Reply::default();
        self.operands.clear();
        check!(self.operands.try_extend_from_slice(operands).is_ok(), "too many operands");
        self.answer(Answer::Complete, command.code());
        Ok(())
    }

    /// Lets the vCPU begin to execute code with the arguments in x0 to x7, without running it.
    pub(crate) fn begin_code(&mut self, code: &[u64], arguments: &[u64]) -> Outcome {
        let mut operands = ArrayVec::<u64, MAX_OPERANDS>::new();
        operands.extend(arguments.iter().copied().chain(core::iter::repeat(0)).take(MAX_RESULTS));
        operands.push(code.len() as u64);
        check!(operands.try_extend_from_slice(code).is_ok(), "too much code");
        self.begin(Command::Run, &operands)
    }

    /// Goes on until the command has been carried out. Nothing must be left for the test to do.
    pub(crate) fn finish(&mut self) -> Result<Reply, Failure> {
        match self.go()? {
            Stop::Done(reply) => Ok(reply),
            Stop::Exit(exit) => Err(Failure::new(format_args!("unexpected exit: {exit:x?}"))),
        }
    }

    /// Goes on until there is something for the test to do, which must be for this reason.
    pub(crate) fn exit(&mut self, reason: ExitReason) -> Result<RunExit, Failure> {
        match self.go()? {
            Stop::Exit(exit) if exit.reason == reason.code() => Ok(exit),
            other => Err(Failure::new(format_args!("not {}, but {other:x?}", reason.name()))),
        }
    }

    /// Executes code with the arguments in x0 to x7; returns what is in them afterwards, or the exception that ended it.
    pub(crate) fn attempt(&mut self, code: &[u64], arguments: &[u64]) -> Result<Reply, Failure> {
        self.begin_code(code, arguments)?;
        self.finish()
    }

    /// Executes code as [`Guest::attempt`] does; it must not take an exception.
    pub(crate) fn run(&mut self, code: &[u64], arguments: &[u64]) -> Result<[u64; MAX_RESULTS], Failure> {
        let reply = self.attempt(code, arguments)?;
        match reply.exception {
            None => Ok(reply.x),
            Some(exception) => Err(Failure::new(format_args!("the guest took an exception: {exception:x?}"))),
        }
    }

    /// Executes code, which must take an exception.
    pub(crate) fn fails(&mut self, code: &[u64], arguments: &[u64]) -> Result<GuestException, Failure> {
        let reply = self.attempt(code, arguments)?;
        match reply.exception {
            Some(exception) => Ok(exception),
            None => Err(Failure::new(format_args!("the guest's code {arguments:x?} worked: {:x?}", reply.x))),
        }
    }

    /// Loads a word.
    pub(crate) fn load(&mut self, address: u64) -> Result<u64, Failure> {
        Ok(self.run(code::load(), &[address])?[0])
    }

    /// Stores a word.
    pub(crate) fn store(&mut self, address: u64, value: u64) -> Outcome {
        self.run(code::store(), &[address, value]).map(drop)
    }

    /// Checks that a load, a store and a fetch are answered with the abort that says that nothing is there.
    pub(crate) fn has_nothing_at(&mut self, address: u64) -> Outcome {
        for code in [code::load(), code::store(), code::load_pair(), code::execute()] {
            let exception = self.fails(code, &[address])?;
            check!(exception.is_abort_at(address), "access to {address:#x}: {exception:x?}");
        }
        Ok(())
    }

    /// Calls the hypervisor by the instruction that its kind of guest uses.
    pub(crate) fn call(&mut self, arguments: &[u64]) -> Result<[u64; MAX_RESULTS], Failure> {
        self.run(self.conduit(), arguments)
    }

    /// Begins a call, without running the vCPU.
    pub(crate) fn begin_call(&mut self, arguments: &[u64]) -> Outcome {
        self.begin_code(self.conduit(), arguments)
    }

    fn conduit(&self) -> &'static [u64] {
        if self.vm.kind == VmKind::Realm { code::smc() } else { code::hvc() }
    }

    /// Fills pages with the pattern of those that begin at `key`, the physical address where the host looks for it.
    pub(crate) fn fill(&mut self, address: u64, count: u64, key: u64, seed: u64) -> Outcome {
        self.begin(Command::Fill, &[address, count, key, seed])?;
        self.finish().map(drop)
    }

    /// Checks that pages have the pattern.
    pub(crate) fn compare(&mut self, address: u64, count: u64, key: u64, seed: u64) -> Outcome {
        self.begin(Command::Compare, &[address, count, key, seed])?;
        let [at, value, ..] = self.finish()?.x;
        check!(at == 0, "the guest finds {value:#x} at {at:#x}, which is not the pattern");
        Ok(())
    }

    /// Turns on another vCPU, whose block is in place.
    pub(crate) fn turn_on(&mut self, vcpu: u64) -> Outcome {
        const CPU_ON: u64 = 0xC400_0003;
        self.begin_call(&[CPU_ON, vcpu, ravelin_guest::IMAGE, super::block_of(vcpu)])?;
        let exit = self.exit(ExitReason::CpuOn)?;
        check_eq!(exit.vcpu, vcpu, "the vCPU that was turned on");
        let [status, ..] = self.finish()?.x;
        check_eq!(status, 0, "CPU_ON of vCPU {vcpu}");
        Ok(())
    }

    /// The arguments of a call that converts pages, for the guest's kind: to shared, or to private.
    pub(crate) fn conversion(&self, at: u64, count: u64, share: bool) -> [u64; 5] {
        match self.vm.kind {
            VmKind::Realm => [0xC400_0197, at, at.wrapping_add(count.wrapping_mul(PAGE)), u64::from(!share), 0],
            _ => [if share { 0xC600_0003 } else { 0xC600_0004 }, at, count, 0, 0],
        }
    }

    /// What the registers say after it.
    pub(crate) fn converted(&self, at: u64, x: [u64; MAX_RESULTS]) -> Conversion {
        match (self.vm.kind, x) {
            (VmKind::Realm, [0, next, 0, ..]) => Conversion::Done((next - at) / PAGE),
            (VmKind::Realm, _) => Conversion::Refused,
            (_, [0, done, ..]) => Conversion::Done(done),
            _ => Conversion::Refused,
        }
    }

    /// Converts pages in one call.
    pub(crate) fn convert(&mut self, at: u64, count: u64, share: bool) -> Result<Conversion, Failure> {
        let arguments = self.conversion(at, count, share);
        let x = self.call(&arguments)?;
        Ok(self.converted(at, x))
    }

    /// Shares pages in one call, which must do all of them.
    pub(crate) fn share(&mut self, at: u64, count: u64) -> Outcome {
        check_eq!(self.convert(at, count, true)?, Conversion::Done(count), "share of {count} pages at {at:#x}");
        Ok(())
    }

    /// Takes pages back in one call, which must do all of them. The host has claimed none.
    pub(crate) fn unshare(&mut self, at: u64, count: u64) -> Outcome {
        check_eq!(self.convert(at, count, false)?, Conversion::Done(count), "unshare of {count} pages at {at:#x}");
        Ok(())
    }
}
