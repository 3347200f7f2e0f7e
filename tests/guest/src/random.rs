//! Calls and accesses at random.

use ravelin_guest::{
    OPERANDS, RESULTS, TALLY, pattern,
    playground::{
        ACCESSES, BASE, BLOCK_FRAMES, BLOCKS_BASE, CALLS, CALLS_OF_PKVM, CALLS_OF_REALMS, DEVICE_FRAMES, DEVICES,
        FRAMES, KEPT, OUTCOMES, Random,
    },
    snippets,
};

use crate::puppet::{REGISTERS, call, load, store};

const PAGE: u64 = 4096;

// Codes of the kinds of VMs.
const PKVM: u64 = 1;
const REALM: u64 = 2;

// Places in `CALLS`.
const RELINQUISH: usize = 2;
const MMIO_GUARD: usize = 4;
const UID: usize = 6;
const SET_EMPTY: usize = 7;
const SET_RAM: usize = 8;
const STATE_GET: usize = 9;
const HOST_CALL: usize = 10;
const MEASUREMENT_READ: usize = 11;
const MEASUREMENT_EXTEND: usize = 12;
const REALM_CONFIG: usize = 13;
const RSI_VERSION: usize = 14;
const COMMON: usize = CALLS_OF_PKVM + CALLS_OF_REALMS;
const PSCI: usize = COMMON;
const SMCCC: usize = COMMON + 1;
const TRNG: usize = COMMON + 2;
const LOAD: usize = CALLS.len() - ACCESSES;
const STORE: usize = LOAD + 1;

// Places in `OUTCOMES`.
const SUCCESS: usize = 0;
const REFUSED: usize = 1;
const NOT_SUPPORTED: usize = 2;
const ABORTED: usize = 3;

snippets! {
    /// Loads a word: x0 = address. Returns it.
    load_word: "ldr x0, [x0]";

    /// Stores a word: x0 = address, x1 = value.
    store_word: "str x1, [x0]";

    /// Calls the hypervisor by HVC.
    hvc: "hvc #0";

    /// Calls the hypervisor by SMC.
    smc: "smc #0";
}

/// One command.
struct Run {
    block: u64,
    random: Random,
    kind: u64,
    /// The bit that marks shared addresses.
    shared: u64,
    /// The number in the pattern of the first kept frame.
    key: u64,
    tally: [[u64; OUTCOMES.len()]; CALLS.len()],
    /// Where a kept frame is not what it was, and what is there.
    differs: (u64, u64),
}

/// Carries out [`Command::Random`](ravelin_guest::Command::Random).
pub(crate) fn run(block: u64, device: u64) {
    let operand = |index: u64| load(device + OPERANDS + 8 * index);
    let mut run = Run {
        block,
        random: Random::new(operand(0)),
        kind: operand(2),
        shared: operand(3),
        key: operand(4),
        tally: [[0; OUTCOMES.len()]; CALLS.len()],
        differs: (0, 0),
    };
    if run.kind == PKVM {
        // Once anything is said to be a device's, nothing else is.
        let guarded = run.execute(hvc(), [CALLS[MMIO_GUARD].1, device, 0, 0, 0, 0, 0, 0]);
        run.tally[MMIO_GUARD][if guarded.is_some_and(|x| x[0] == 0) { SUCCESS } else { REFUSED }] += 1;
    }
    for _ in 0..operand(1) {
        run.step();
    }
    for (index, &count) in (0..).zip(run.tally.as_flattened()) {
        if count != 0 {
            store(device + TALLY + 8 * index, count);
        }
    }
    store(device + RESULTS, run.differs.0);
    store(device + RESULTS + 8, run.differs.1);
}

impl Run {
    fn step(&mut self) {
        let Self { random, kind, .. } = self;
        match (random.below(16), *kind) {
            (0..3, _) => self.look_at_kept(),
            (3..6, _) => self.access(),
            (6..12, PKVM) => {
                let call = random.one_of([0, 0, 1, 1, 2]);
                self.convert(call);
            }
            (6..12, REALM) => {
                let call = random.one_of([SET_EMPTY, SET_EMPTY, SET_RAM, SET_RAM, STATE_GET]);
                self.convert(call);
            }
            (12..14, PKVM) => {
                let call = random.below(CALLS_OF_PKVM as u64) as usize;
                self.other(call);
            }
            (12..14, REALM) => {
                let call = CALLS_OF_PKVM + random.below(CALLS_OF_REALMS as u64) as usize;
                self.other(call);
            }
            (14, _) => {
                let call = random.below(COMMON as u64) as usize;
                self.other(call);
            }
            _ => {
                let call = COMMON + random.below((LOAD - COMMON) as u64) as usize;
                self.other(call);
            }
        }
    }

    /// Executes one of the snippets with values in x0 to x7. Returns what is in them then, unless it takes an exception.
    fn execute(&self, code: &[u64], arguments: [u64; 8]) -> Option<[u64; 8]> {
        let register = |index: u64| self.block + REGISTERS + 8 * index;
        for (index, value) in (0..).zip(arguments) {
            store(register(index), value);
        }
        let failed = call(self.block, code.as_ptr().addr() as u64);
        (!failed).then(|| core::array::from_fn(|index| load(register(index as u64))))
    }

    fn load(&mut self, address: u64) -> Option<u64> {
        let value = self.execute(load_word(), [address, 0, 0, 0, 0, 0, 0, 0]).map(|x| x[0]);
        self.tally[LOAD][if value.is_some() { SUCCESS } else { ABORTED }] += 1;
        value
    }

    /// Compares a word of a kept frame. In a realm the page may be at either address, and change to the other one meanwhile.
    fn look_at_kept(&mut self) {
        let frame = self.random.below(KEPT);
        let word = self.random.below(PAGE / 8);
        let address = BASE + frame * PAGE + 8 * word;
        for at in [address, address | self.shared] {
            if let Some(value) = self.load(at) {
                if value != pattern(self.key + frame * PAGE, word, 0) {
                    self.differs = (at, value);
                }
                return;
            }
        }
    }

    /// Touches a page that may be there, or a device.
    fn access(&mut self) {
        let random = &mut self.random;
        let page = match random.below(8) {
            0 => DEVICES + random.below(DEVICE_FRAMES) * PAGE,
            1..3 => BLOCKS_BASE + random.below(BLOCK_FRAMES) * PAGE,
            _ => BASE + (KEPT + random.below(FRAMES - KEPT)) * PAGE,
        };
        let address = (page | random.one_of([0, self.shared])) + 8 * random.below(PAGE / 8);
        if random.once_in(2) {
            self.load(address);
        } else {
            let done = self.execute(store_word(), [address, 0, 0, 0, 0, 0, 0, 0]).is_some();
            self.tally[STORE][if done { SUCCESS } else { ABORTED }] += 1;
        }
    }

    /// A range of frames, of which `first` are left out.
    fn range(&mut self, first: u64) -> (u64, u64) {
        let random = &mut self.random;
        let longest = random.one_of([1, 1, 1, 2, 8, 32]);
        if random.once_in(6) {
            let any = random.below(BLOCK_FRAMES);
            let frame = random.one_of([0, 0, 512, any]);
            let most = random.one_of([512, BLOCK_FRAMES, longest]);
            return (BLOCKS_BASE + frame * PAGE, most.min(BLOCK_FRAMES - frame));
        }
        let frame = first + random.below(FRAMES - first);
        (BASE + frame * PAGE, 1 + random.below(longest.min(FRAMES - frame)))
    }

    /// Makes a call that is about a range.
    fn convert(&mut self, index: usize) {
        let (mut at, count) = self.range(if index == RELINQUISH { KEPT } else { 0 });
        if self.random.once_in(40) {
            at = self.random.one_of([at | 8, at | 1 << 40, 1 << 47, u64::MAX << 20, 0x0800_0000]);
        }
        let mut arguments = match index {
            SET_EMPTY | SET_RAM => [0, at, at.wrapping_add(count * PAGE), u64::from(index == SET_RAM), 0, 0, 0, 0],
            STATE_GET => [0, at, at.wrapping_add(count * PAGE), 0, 0, 0, 0, 0],
            _ => [0, at, count, 0, 0, 0, 0, 0],
        };
        let random = &mut self.random;
        if random.once_in(20) {
            match random.below(3) {
                0 => arguments[2] = random.one_of([u64::MAX, 1 << 40, at - PAGE, (1 << 18) + 1]),
                1 => arguments[3] |= random.one_of([2, 1 << 32, u64::MAX]),
                _ => arguments[1..4].fill(random.next()),
            }
        }
        self.call(index, arguments);
    }

    /// Makes a call with arguments that mostly make sense.
    fn other(&mut self, index: usize) {
        let random = &mut self.random;
        let loose = BASE + (KEPT + random.below(FRAMES - KEPT)) * PAGE;
        let device = DEVICES + random.below(DEVICE_FRAMES) * PAGE;
        let wild = random.next();
        let [first, second] = match index {
            0..=RELINQUISH | SET_EMPTY | SET_RAM | STATE_GET => return self.convert(index),
            MMIO_GUARD => [random.one_of([device, device, loose]), 0],
            HOST_CALL => [loose + random.one_of([0, 256, 0xf00, 8]), 0],
            REALM_CONFIG => [random.one_of([loose, loose, loose | 16, 1 << 45]), 0],
            RSI_VERSION => [random.one_of([1 << 16, 1 << 16, 2 << 16]), 0],
            MEASUREMENT_READ => [random.below(7), 0],
            MEASUREMENT_EXTEND => [random.below(7), random.one_of([0, 32, 64, 65])],
            // AFFINITY_INFO, FEATURES of it, CPU_ON of a vCPU that is on, or that does not exist.
            PSCI | SMCCC | TRNG => [random.one_of([0, 1, 9, 0x8400_0000, 0x8000_0000, 64]), 0],
            _ => [random.one_of([0, 0, 0, wild]), 0],
        };
        self.call(index, [0, first, second, 0, 0, 0, 0, 0]);
    }

    fn call(&mut self, index: usize, mut arguments: [u64; 8]) {
        let random = &mut self.random;
        arguments[0] = CALLS[index].1
            + match index {
                // VERSION, AFFINITY_INFO, MIGRATE_INFO_TYPE, FEATURES and CPU_ON, which no vCPU is off for.
                PSCI => random.one_of([0, 4, 6, 10, 3]),
                SMCCC => random.below(2),
                TRNG => random.below(4),
                _ => 0,
            };
        // Each kind has its own instruction, and the other one at times.
        let by_smc = (self.kind == REALM) != random.once_in(32);
        let outcome = match self.execute(if by_smc { smc() } else { hvc() }, arguments) {
            None => ABORTED,
            Some([x0, ..]) if x0 as u32 == u32::MAX => NOT_SUPPORTED,
            Some([x0, _, x2, ..]) => {
                let refused = match index {
                    UID => false,
                    SET_EMPTY | SET_RAM => x0 != 0 || x2 != 0,
                    CALLS_OF_PKVM..COMMON => x0 != 0,
                    _ => (x0 as i32) < 0,
                };
                if refused { REFUSED } else { SUCCESS }
            }
        };
        self.tally[index][outcome] += 1;
    }
}
