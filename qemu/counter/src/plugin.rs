//! The plugin: what is instrumented, and what is written when.
#![expect(unsafe_code, reason = "QEMU calls these functions and finds the version by symbols")]

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use crate::counters::{COUNTERS, Counts, LEVELS, class, instructions, loads, operation, stores, vector};
use crate::decode::{Operation, decode};
use crate::ffi::{self, Access, Block, Direction, Info, PluginId, Register, Scoreboard, TimeControl};

/// Tells QEMU the interface this plugin was written for.
#[unsafe(export_name = "qemu_plugin_version")]
pub(crate) static VERSION: c_int = ffi::VERSION;

/// The plugin's state. QEMU's callbacks carry no pointer of ours, hence a static.
static PLUGIN: OnceLock<Plugin> = OnceLock::new();

struct Plugin {
    board: Scoreboard,
    started: Instant,
    registers: OnceLock<Registers>,
    /// CPUs that have been below EL2.
    entered: AtomicUsize,
    report: Mutex<Report>,
    /// How often each address was executed at EL2 since the event before, if that is wanted.
    profile: Option<Mutex<BTreeMap<u64, u64>>>,
    /// Whether marks say where the translation tables are.
    tables: bool,
    /// Whether one thread runs all CPUs, which then take turns.
    turns: Option<Turns>,
}

/// Turns of the CPUs, between a mark 0 and a mark 1.
struct Turns {
    control: TimeControl,
    /// Instructions of a turn.
    length: u64,
    /// How many of them are left; 0 while there are no turns.
    left: AtomicU64,
}

/// What is read in callbacks. ESR_EL2 and VBAR_EL2 are missing where the CPU has no EL2.
struct Registers {
    cpsr: Register,
    x0: Register,
    vbar: Option<Register>,
    esr: Option<Register>,
    /// Those of [`TABLES`] that there are, with their names.
    tables: Vec<(&'static str, Register)>,
}

/// Registers that announce translation tables below EL2, where the CPU has them.
const TABLES: [&str; 5] = ["HCR_EL2", "VTCR_EL2", "VTTBR_EL2", "TCR_EL1", "TTBR0_EL1"];

/// The output and what it needs to know of each CPU.
struct Report {
    output: File,
    cpus: BTreeMap<c_uint, Cpu>,
    all_at_mark: Counts,
}

#[derive(Default)]
struct Cpu {
    calls: BTreeMap<u32, u64>,
    entered: bool,
    at_mark: Counts,
}

impl Plugin {
    /// All that `cpu` has counted so far.
    fn counts(&self, report: &Report, cpu: c_uint) -> Counts {
        Counts {
            counters: (0..COUNTERS).map(|counter| self.board.get(cpu, counter)).collect(),
            calls: report.cpus.get(&cpu).map(|state| state.calls.clone()).unwrap_or_default(),
        }
    }

    fn sum(&self, report: &Report) -> Counts {
        let mut sum = Counts::default();
        for cpu in 0..ffi::cpus() {
            sum.add(&self.counts(report, cpu));
        }
        sum
    }

    /// Whether what is executed now counts.
    fn counts_now(&self) -> bool {
        self.turns.as_ref().is_none_or(|turns| turns.left.load(Ordering::Relaxed) != 0)
    }

    /// Writes the profile and begins a new one.
    fn end_profile(&self, report: &mut Report) {
        let (Some(profile), Some(registers)) = (&self.profile, self.registers.get()) else { return };
        let counts = std::mem::take(&mut *profile.lock().unwrap_or_else(PoisonError::into_inner));
        let vectors = registers.vbar.as_ref().map_or(0, Register::read);
        let counts: String = counts.iter().map(|(address, count)| format!(" {address:#x}={count}")).collect();
        report.line(&format!("profile vectors={vectors}{counts}"));
    }

    /// Writes where the translation tables are, if that is wanted.
    fn tables(&self, report: &mut Report) {
        let (true, Some(registers)) = (self.tables, self.registers.get()) else { return };
        let values =
            registers.tables.iter().map(|(name, register)| format!(" {}={}", name.to_lowercase(), register.read()));
        report.line(&format!("tables{}", values.collect::<String>()));
    }

    /// Runs `action` on the report; a CPU that panicked in one leaves the others to go on.
    fn with_report(&self, action: impl FnOnce(&mut Report)) {
        action(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Report {
    /// Writes at once: QEMU may be killed, and readers wait for marks.
    fn line(&mut self, line: &str) {
        if let Err(error) = self.output.write_all(format!("{line}\n").as_bytes()) {
            eprintln!("ravelin-counter: {error}");
        }
    }
}

/// Called by QEMU when it loads the plugin. Arguments: `out=FILE`, and `profile=on`, `tables=on` and `turns=N` if those are wanted.
///
/// # Safety
///
/// `info` and `arguments` must be as QEMU's plugin interface says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn qemu_plugin_install(
    id: PluginId,
    info: *const Info,
    count: c_int,
    arguments: *const *const c_char,
) -> c_int {
    // SAFETY: QEMU keeps to its interface.
    let (target, arguments) = unsafe { ffi::installation(info, count, arguments) };
    let installed = install(&target, &arguments)
        .and_then(|plugin| PLUGIN.set(plugin).map_err(|_| "can be loaded only once".to_owned()));
    if let Err(message) = installed {
        eprintln!("ravelin-counter: {message}");
        return 1;
    }
    ffi::register(id, on_init, on_translation, on_exit);
    0
}

fn install(target: &str, arguments: &[String]) -> Result<Plugin, String> {
    if target != "aarch64" {
        return Err(format!("counts aarch64 only, not {target}"));
    }
    let (mut path, mut profile, mut tables, mut turns) = (None, None, false, None);
    for argument in arguments {
        match argument.split_once('=') {
            Some(("out", value)) => path = Some(value),
            // QEMU makes `profile=on` of a mere `profile`.
            Some(("profile", "on")) => profile = Some(Mutex::default()),
            Some(("tables", "on")) => tables = true,
            Some(("turns", value)) => {
                let length =
                    value.parse().ok().filter(|length| *length != 0).ok_or("turns must be a number above 0")?;
                let control = TimeControl::request().ok_or("time is controlled already")?;
                turns = Some(Turns { control, length, left: AtomicU64::new(0) });
            }
            _ => return Err(format!("unknown argument {argument}")),
        }
    }
    let path = path.ok_or("needs the argument out=FILE")?;
    let output = File::create(path).map_err(|error| format!("{path}: {error}"))?;
    Ok(Plugin {
        board: Scoreboard::new(COUNTERS),
        started: Instant::now(),
        registers: OnceLock::new(),
        entered: AtomicUsize::new(0),
        report: Mutex::new(Report { output, cpus: BTreeMap::new(), all_at_mark: Counts::default() }),
        profile,
        tables,
        turns,
    })
}

extern "C" fn on_init(_: PluginId, _: c_uint) {
    let Some(plugin) = PLUGIN.get() else { return };
    plugin.registers.get_or_init(|| Registers {
        cpsr: Register::find("cpsr").expect("every A64 CPU has it"),
        x0: Register::find("x0").expect("every A64 CPU has it"),
        vbar: Register::find("VBAR_EL2"),
        esr: Register::find("ESR_EL2"),
        tables: TABLES.iter().filter_map(|name| Some((*name, Register::find(name)?))).collect(),
    });
}

/// Instruments a block. It never spans exception levels, and QEMU keeps blocks of different levels apart, so the level
/// is known here, once.
extern "C" fn on_translation(_: PluginId, block: *mut c_void) {
    // SAFETY: QEMU passes the block that it translates.
    let block = unsafe { Block::new(block) };
    let Some(plugin) = PLUGIN.get() else { return };
    let Some(registers) = plugin.registers.get() else { return };
    let pstate = registers.cpsr.read();
    // PSTATE.nRW: AArch32, whose mode field tells only user mode (EL0) from the rest (EL1 here).
    let a64 = pstate & 0x10 == 0;
    let level = if a64 { (pstate >> 2 & 3) as usize } else { usize::from(pstate & 0xf != 0) };

    if level < 2 && plugin.turns.is_none() && plugin.entered.load(Ordering::Relaxed) < ffi::cpus() as usize {
        block.call(on_lower_level, Access::Read, level);
    }
    if let (2, Some(vbar)) = (level, &registers.vbar) {
        // Code at the start of a vector is only reached by taking that exception.
        let offset = block.address().wrapping_sub(vbar.read());
        if offset < 0x800 && offset % 0x80 == 0 {
            block.call(on_vector, Access::Read, (offset / 0x80) as usize);
        }
    }
    for (instruction, address) in block.instructions().zip((block.address()..).step_by(4)) {
        let kind = if a64 { instruction.word().and_then(decode) } else { None };
        if let Some(Operation::Mark(number)) = kind {
            instruction.call(on_mark, Access::Read, number as usize * 4 + level);
            continue;
        }
        let counter = kind.and_then(|kind| operation(level, kind));
        if plugin.turns.is_some() {
            // No operation has the first counter.
            instruction.call(on_turn, Access::None, counter.unwrap_or(0) * LEVELS + level);
        } else {
            instruction.count(plugin.board, instructions(level));
            instruction.count_accesses(Direction::Load, plugin.board, loads(level));
            instruction.count_accesses(Direction::Store, plugin.board, stores(level));
            if let Some(counter) = counter {
                instruction.count(plugin.board, counter);
            }
        }
        if level == 2 && plugin.profile.is_some() {
            instruction.call(on_profiled, Access::None, address as usize);
        }
    }
}

/// A CPU enters EL2 through the vector whose slot number `data` is.
extern "C" fn on_vector(cpu: c_uint, data: *mut c_void) {
    let Some(plugin) = PLUGIN.get() else { return };
    let Some(registers) = plugin.registers.get() else { return };
    let slot = data.addr();
    plugin.board.increment(cpu, vector(slot));
    // Synchronous exceptions from below have a class; SMC and HVC, 32-bit ones included, a function identifier.
    if let (8 | 12, Some(esr)) = (slot, &registers.esr) {
        let exception = (esr.read() >> 26 & 0x3f) as usize;
        plugin.board.increment(cpu, class(exception));
        if matches!(exception, 0x12 | 0x13 | 0x16 | 0x17) {
            let call = registers.x0.read() as u32;
            plugin.with_report(|report| *report.cpus.entry(cpu).or_default().calls.entry(call).or_default() += 1);
        }
    }
}

/// A CPU is about to execute at EL1 or EL0, perhaps for the first time.
extern "C" fn on_lower_level(cpu: c_uint, level: *mut c_void) {
    let Some(plugin) = PLUGIN.get() else { return };
    plugin.with_report(|report| {
        let state = report.cpus.entry(cpu).or_default();
        if !std::mem::replace(&mut state.entered, true) {
            plugin.entered.fetch_add(1, Ordering::Relaxed);
            let counts = plugin.counts(report, cpu).report();
            plugin.end_profile(report);
            report.line(&format!("first-el1 cpu={cpu} level={}{counts}", level.addr()));
        }
    });
}

/// A CPU executes an instruction of its turn; `data` is the counter of its kind and its exception level. `cpu` may be another one,
/// which matters to nobody: all that is reported are sums.
extern "C" fn on_turn(cpu: c_uint, data: *mut c_void) {
    let Some(plugin) = PLUGIN.get().filter(|plugin| plugin.counts_now()) else { return };
    let Some(turns) = &plugin.turns else { return };
    let (counter, level) = (data.addr() / LEVELS, data.addr() % LEVELS);
    plugin.board.increment(cpu, instructions(level));
    if counter != 0 {
        plugin.board.increment(cpu, counter);
    }
    // No other thread changes it.
    let left = turns.left.load(Ordering::Relaxed) - 1;
    turns.left.store(if left == 0 { turns.length } else { left }, Ordering::Relaxed);
    if left == 0 {
        turns.control.end_turn();
    }
}

/// A CPU executes the instruction at the address `data` at EL2.
extern "C" fn on_profiled(_: c_uint, data: *mut c_void) {
    let plugin = PLUGIN.get().filter(|plugin| plugin.counts_now());
    if let Some(profile) = plugin.and_then(|plugin| plugin.profile.as_ref()) {
        *profile.lock().unwrap_or_else(PoisonError::into_inner).entry(data.addr() as u64).or_default() += 1;
    }
}

/// A CPU executes a mark; `data` is its number and exception level.
extern "C" fn on_mark(cpu: c_uint, data: *mut c_void) {
    let Some(plugin) = PLUGIN.get() else { return };
    let (number, level) = (data.addr() / 4, data.addr() % 4);
    let time = plugin.started.elapsed().as_nanos();
    plugin.with_report(|report| {
        plugin.end_profile(report);
        plugin.tables(report);
        if plugin.turns.is_none() {
            let now = plugin.counts(report, cpu);
            let before = std::mem::replace(&mut report.cpus.entry(cpu).or_default().at_mark, now.clone());
            let counts = now.since(&before).report();
            report.line(&format!("mark number={number} cpu={cpu} level={level} nanoseconds={time}{counts}"));
        }
        if plugin.turns.is_some() || ffi::cpus() > 1 {
            let now = plugin.sum(report);
            let before = std::mem::replace(&mut report.all_at_mark, now.clone());
            let counts = now.since(&before).report();
            report.line(&format!("mark-all number={number} nanoseconds={time}{counts}"));
        }
    });
    if let Some(turns) = &plugin.turns {
        turns.left.store(if number == 0 { turns.length } else { 0 }, Ordering::Relaxed);
    }
}

extern "C" fn on_exit(_: PluginId, _: *mut c_void) {
    let Some(plugin) = PLUGIN.get() else { return };
    plugin.with_report(|report| {
        for cpu in 0..ffi::cpus() {
            let counts = plugin.counts(report, cpu).report();
            report.line(&format!("total cpu={cpu}{counts}"));
        }
    });
}
