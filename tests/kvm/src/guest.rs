//! Telling the vCPU of a guest what to do.
//!
//! The guest loads commands from a device that the case plays, and stores results there: see `tests/guest`. Code for it is
//! called with x0 to x7 and returns them. It may change x8 to x30 but x18, keeps SP, and may take an exception, which ends it.

use anyhow::{bail, ensure};
use nix::errno::Errno;
use ravelin_guest::{
    COMMAND, Command, DEVICE, EXCEPTION, INTERRUPT, MAX_OPERANDS, MAX_RESULTS, OPERANDS, RESULTS, UNEXPECTED,
};

use crate::check::Outcome;
use crate::kvm::{Exit, Kind, Vcpu};
use crate::machine::block_of;
use crate::memory::PAGE;

pub(crate) use ravelin_guest::snippets;

/// The call that makes a page a ring.
const MEM_RING: u64 = 0xc600_0038;

snippets! {
    /// Loads a word: x0 = address. Returns it.
    load: "ldr x0, [x0]";

    /// Stores a word: x0 = address, x1 = value.
    store: "str x1, [x0]";

    /// Calls the hypervisor with x0 to x7 by HVC.
    hvc: "hvc #0";

    /// Calls the hypervisor with x0 to x7 by SMC.
    smc: "smc #0";

    /// Clears the page at x0.
    clear: "mov x1, #4096", "4: stp xzr, xzr, [x0], #16", "subs x1, x1, #16", "b.ne 4b";

    /// Never ends.
    spin: "4: b 4b";

    /// Counts in the word at x0 until the word behind it is not 0. Returns the count.
    count: "mov x2, #0", "4: add x2, x2, #1", "str x2, [x0]", "ldr x1, [x0, #8]", "cbz x1, 4b", "mov x0, x2";

    /// Returns the virtual counter and its frequency.
    counter: "isb", "mrs x0, cntvct_el0", "mrs x1, cntfrq_el0";
}

/// An exception that ended code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Exception {
    /// ESR_EL1.
    pub(crate) esr: u64,
    /// FAR_EL1.
    pub(crate) far: u64,
    /// ELR_EL1, from the code's first instruction on.
    pub(crate) offset: u64,
}

impl Exception {
    /// Whether it is the external abort that says that nothing answers at `address`.
    pub(crate) fn is_abort_at(self, address: u64) -> bool {
        matches!(self.esr >> 26 & 0x3f, 0x20 | 0x21 | 0x24 | 0x25) && self.esr & 0x3f == 0x10 && self.far == address
    }
}

/// What a command has led to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reply {
    /// x0 to x7, or other results.
    pub(crate) x: [u64; MAX_RESULTS],
    /// What ended code before its end.
    pub(crate) exception: Option<Exception>,
}

/// Why a vCPU does not run any more.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stop {
    /// The command has been carried out.
    Done(Reply),
    /// There is something for the case to do.
    Exit(Exit),
}

/// What became of a guest's call that converts memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Conversion {
    /// So many pages are done, the first ones.
    Done(u64),
    /// None is.
    Refused,
}

/// A vCPU that does what it is told.
#[derive(Debug)]
pub(crate) struct Guest<'a> {
    pub(crate) vcpu: &'a Vcpu,
    pub(crate) kind: Kind,
    /// It waits for a command.
    idle: bool,
    /// The command that it has not loaded yet.
    operands: Vec<u64>,
    reply: Reply,
    unexpected: [u64; 4],
    /// SPIs that it has handled.
    pub(crate) spis: Vec<u64>,
}

impl<'a> Guest<'a> {
    pub(crate) fn new(vcpu: &'a Vcpu, kind: Kind) -> Self {
        let (operands, spis) = (Vec::new(), Vec::new());
        Self { vcpu, kind, idle: false, operands, reply: Reply::default(), unexpected: [0; 4], spis }
    }

    /// Runs the vCPU until it waits for a command, or until there is something for the case to do.
    pub(crate) fn go(&mut self) -> Outcome<Stop> {
        loop {
            if let Some(stop) = self.go_interruptible()? {
                return Ok(stop);
            }
        }
    }

    /// The same, or until a signal interrupts it.
    pub(crate) fn go_interruptible(&mut self) -> Outcome<Option<Stop>> {
        loop {
            match self.vcpu.run()? {
                Exit::Mmio { address, size: 8, write, value } if address & !(PAGE as u64 - 1) == DEVICE => {
                    let offset = address - DEVICE;
                    if !write && offset == COMMAND {
                        self.idle = true;
                        return Ok(Some(Stop::Done(self.reply)));
                    }
                    if write {
                        self.stored(offset, value)?;
                    } else {
                        let index = (offset - OPERANDS) as usize / 8;
                        self.vcpu.answer(self.operands.get(index).copied().unwrap_or(0))?;
                    }
                }
                Exit::Failed(Errno::EINTR | Errno::EAGAIN) => return Ok(None),
                exit => return Ok(Some(Stop::Exit(exit))),
            }
        }
    }

    /// The vCPU waits for a command already, as another `Guest` has seen.
    pub(crate) fn assume_idle(&mut self) {
        self.idle = true;
    }

    /// Plays the device to which the guest has stored.
    fn stored(&mut self, offset: u64, value: u64) -> Outcome {
        let index = |base: u64| (offset - base) as usize / 8;
        match offset {
            RESULTS..EXCEPTION => self.reply.x[index(RESULTS) % MAX_RESULTS] = value,
            EXCEPTION..UNEXPECTED => {
                let exception = self.reply.exception.get_or_insert_default();
                match index(EXCEPTION) {
                    0 => exception.esr = value,
                    1 => exception.far = value,
                    _ => exception.offset = value,
                }
            }
            UNEXPECTED..INTERRUPT => {
                self.unexpected[index(UNEXPECTED) % 4] = value;
                if index(UNEXPECTED) == 3 {
                    let [vector, esr, far, elr] = self.unexpected;
                    let index = self.vcpu.index;
                    bail!("vCPU {index} took an exception: vector {vector:#x} esr {esr:#x} far {far:#x} elr {elr:#x}");
                }
            }
            _ => self.spis.push(value),
        }
        Ok(())
    }

    /// Runs the vCPU until it waits for its first command.
    pub(crate) fn start(&mut self) -> Outcome {
        match if self.idle { Stop::Done(self.reply) } else { self.go()? } {
            Stop::Done(_) => Ok(()),
            Stop::Exit(exit) => bail!("exit before a command: {exit:x?}"),
        }
    }

    /// Gives the vCPU a command, without running it.
    pub(crate) fn begin(&mut self, command: Command, operands: &[u64]) -> Outcome {
        ensure!(operands.len() <= MAX_OPERANDS, "too many operands");
        self.start()?;
        self.idle = false;
        self.reply = Reply::default();
        self.operands = operands.to_vec();
        self.vcpu.answer(command.code())
    }

    /// Lets the vCPU begin to execute code with the arguments in x0 to x7, without running it.
    pub(crate) fn begin_code(&mut self, code: &[u64], arguments: &[u64]) -> Outcome {
        let mut operands: Vec<_> = arguments.iter().copied().chain(std::iter::repeat(0)).take(MAX_RESULTS).collect();
        operands.push(code.len() as u64);
        operands.extend_from_slice(code);
        self.begin(Command::Run, &operands)
    }

    /// Goes on until the command has been carried out. Nothing must be left for the case to do.
    pub(crate) fn finish(&mut self) -> Outcome<Reply> {
        match self.go()? {
            Stop::Done(reply) => Ok(reply),
            Stop::Exit(exit) => bail!("unexpected exit: {exit:x?}"),
        }
    }

    /// Goes on until there is something for the case to do.
    pub(crate) fn exit(&mut self) -> Outcome<Exit> {
        match self.go()? {
            Stop::Exit(exit) => Ok(exit),
            Stop::Done(reply) => bail!("no exit, but {reply:x?}"),
        }
    }

    /// Carries out a command.
    pub(crate) fn command(&mut self, command: Command, operands: &[u64]) -> Outcome<[u64; MAX_RESULTS]> {
        self.begin(command, operands)?;
        Ok(self.finish()?.x)
    }

    /// Executes code, which may take an exception.
    pub(crate) fn try_run(&mut self, code: &[u64], arguments: &[u64]) -> Outcome<Reply> {
        self.begin_code(code, arguments)?;
        self.finish()
    }

    /// Executes code; returns x0 to x7.
    pub(crate) fn run(&mut self, code: &[u64], arguments: &[u64]) -> Outcome<[u64; MAX_RESULTS]> {
        let reply = self.try_run(code, arguments)?;
        match reply.exception {
            Some(exception) => bail!("the code took an exception: {exception:x?}"),
            None => Ok(reply.x),
        }
    }

    /// Loads a word.
    pub(crate) fn load(&mut self, address: u64) -> Outcome<u64> {
        Ok(self.run(load(), &[address])?[0])
    }

    /// Stores a word.
    pub(crate) fn store(&mut self, address: u64, value: u64) -> Outcome {
        self.run(store(), &[address, value]).map(drop)
    }

    /// Makes a page the ring of the vCPU, in which nothing is posted.
    pub(crate) fn attach_ring(&mut self, at: u64) -> Outcome {
        self.run(clear(), &[at])?;
        let [status, ..] = self.call(&[MEM_RING, at, 1, 0])?;
        ensure!(status == 0, "MEM_RING of {at:#x}: {status:#x}");
        Ok(())
    }

    /// Makes its ring an ordinary page again.
    pub(crate) fn detach_ring(&mut self, at: u64) -> Outcome {
        let [status, ..] = self.call(&[MEM_RING, at, 0, 0])?;
        ensure!(status == 0, "MEM_RING of {at:#x}, no more: {status:#x}");
        Ok(())
    }

    /// Fills pages with the pattern of `key` and `seed`.
    pub(crate) fn fill(&mut self, address: u64, pages: u64, key: u64, seed: u64) -> Outcome {
        self.command(Command::Fill, &[address, pages, key, seed]).map(drop)
    }

    /// Checks that pages hold the pattern.
    pub(crate) fn check(&mut self, address: u64, pages: u64, key: u64, seed: u64) -> Outcome {
        let [at, value, ..] = self.command(Command::Compare, &[address, pages, key, seed])?;
        ensure!(at == 0, "the guest finds {value:#x} at {at:#x}");
        Ok(())
    }

    /// Checks that pages hold nothing but zeros.
    pub(crate) fn check_zero(&mut self, address: u64, pages: u64) -> Outcome {
        let [at, value, ..] = self.command(Command::FindNonzero, &[address, pages])?;
        ensure!(at == 0, "the guest finds {value:#x} at {at:#x}, expected zeros");
        Ok(())
    }

    /// Calls the hypervisor.
    pub(crate) fn call(&mut self, arguments: &[u64]) -> Outcome<[u64; MAX_RESULTS]> {
        self.run(self.conduit(), arguments)
    }

    /// The instruction by which a guest of its kind calls.
    pub(crate) fn conduit(&self) -> &'static [u64] {
        if self.kind == Kind::Realm { smc() } else { hvc() }
    }

    /// Turns on another vCPU, which starts like vCPU 0.
    pub(crate) fn cpu_on(&mut self, vcpu: u64) -> Outcome<u64> {
        const CPU_ON: u64 = 0xc400_0003;
        let affinity = ((vcpu / 16) << 8) | (vcpu % 16);
        Ok(self.call(&[CPU_ON, affinity, ravelin_guest::IMAGE, block_of(vcpu)])?[0])
    }

    /// Begins a call that converts pages: to shared, or to private.
    pub(crate) fn begin_convert(&mut self, at: u64, pages: u64, share: bool) -> Outcome {
        let arguments = match self.kind {
            Kind::Realm => [0xc400_0197, at, at.wrapping_add(pages * PAGE as u64), u64::from(!share), 0],
            _ => [if share { 0xc600_0003 } else { 0xc600_0004 }, at, pages, 0, 0],
        };
        self.begin_code(self.conduit(), &arguments)
    }

    /// What the registers say after it.
    pub(crate) fn converted(&self, at: u64, x: [u64; MAX_RESULTS]) -> Conversion {
        match (self.kind, x) {
            (Kind::Realm, [0, next, 0, ..]) => Conversion::Done(next.wrapping_sub(at) / PAGE as u64),
            (Kind::Realm, _) => Conversion::Refused,
            (_, [0, done, ..]) => Conversion::Done(done),
            _ => Conversion::Refused,
        }
    }

    /// Converts pages in one call.
    pub(crate) fn convert(&mut self, at: u64, pages: u64, share: bool) -> Outcome<Conversion> {
        self.begin_convert(at, pages, share)?;
        let reply = self.finish()?;
        ensure!(reply.exception.is_none(), "the call took an exception: {:x?}", reply.exception);
        Ok(self.converted(at, reply.x))
    }

    /// Converts pages in as many calls as it takes.
    fn convert_all(&mut self, at: u64, pages: u64, share: bool) -> Outcome {
        let mut done = 0;
        while done < pages {
            match self.convert(at + done * PAGE as u64, pages - done, share)? {
                Conversion::Done(some) if some != 0 => done += some,
                other => bail!("conversion of {pages} pages at {at:#x}, share {share}: {other:?} after {done}"),
            }
        }
        Ok(())
    }

    /// Shares pages.
    pub(crate) fn share(&mut self, at: u64, pages: u64) -> Outcome {
        self.convert_all(at, pages, true)
    }

    /// Takes pages back.
    pub(crate) fn unshare(&mut self, at: u64, pages: u64) -> Outcome {
        self.convert_all(at, pages, false)
    }
}
