//! A QEMU TCG plugin that counts what a virtual CPU executes, per exception level and to the instruction.
//!
//! ```text
//! qemu-system-aarch64 ... -plugin file=libravelin_counter.so,out=COUNTS[,profile=on][,tables=on][,turns=N]
//! ```
//!
//! `COUNTS` receives one line of text per event, `EVENT KEY=VALUE..`, counters that are zero left out:
//!
//! * `mark`: a CPU executed `HINT #0x40 + n`, a NOP on every CPU. `number` is n, `level` the exception level it was
//!   executed at, `nanoseconds` the time since QEMU started; the counters are what *this* CPU did since its mark before.
//! * `mark-all`: follows `mark` on a machine of several CPUs: what *all* of them did since the last mark of any. The
//!   share of the others is a snapshot of running CPUs.
//! * `first-el1`: a CPU is about to execute its first instruction below EL2; the counters are all it did until then.
//! * `total`: one line per CPU when QEMU ends.
//! * `profile`, with `profile=on`: precedes `mark` and `first-el1`. For each address at which something was executed at
//!   EL2 since the last of these, on any CPU, how often; `vectors` is VBAR_EL2. This makes QEMU slow.
//! * `tables`, with `tables=on`: precedes `mark`. What the registers of the CPU say about translation tables below EL2:
//!   `hcr_el2`, `vtcr_el2`, `vttbr_el2`, `tcr_el1` and `ttbr0_el1`, in decimal.
//!
//! `elN.instructions`, `elN.loads` and `elN.stores` are what was executed at ELn. An instruction that takes an
//! exception counts where it was tried, and once more when it is tried again; marks themselves count nothing. A load
//! or store is one memory access, so a pair of 64-bit registers is one. `elN.tlbi.*`, `elN.dsb`, `elN.isb`,
//! `elN.dc_zva`, `elN.cache` (other cache maintenance) and `elN.sysreg` (MRS and MSR of a register) come from the opcode.
//! `entry.*` counts entries into EL2 by vector, `class.*` entries from below by ESR_EL2.EC, and `call.*` HVC and SMC by the
//! low half of x0.
//!
//! With several CPUs the plugin needs `-accel tcg,thread=multi`, because where one thread runs all CPUs QEMU 10.0 takes the CPU
//! that translates a block for the one that executes it, and crashes on inline counters.
//!
//! With `turns=N` it needs one thread: `-accel tcg,thread=single`. From a mark 0 to a mark 1 the CPUs take turns of N instructions
//! each, as if all of them were equally fast, and with `-icount` the same run repeats. A turn ends with its block, so with
//! `one-insn-per-tb=on` they are N to the instruction. Only what is executed then counts, and all but loads and stores; `mark-all`,
//! which is there for one CPU too, has all that is to be had.

mod counters;
mod decode;
#[cfg(not(test))]
mod ffi;
#[cfg(not(test))]
mod plugin;
