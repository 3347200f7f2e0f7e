//! How deep a CPU's stack gets while the host is at EL2, and that of start-up in the carve-out, from the machine code.
//!
//! Frames, calls and jumps to other functions are what the instructions say. A call of a function pointer is taken to reach
//! every closure that a function on the way there, itself included, has made; but not one that is running, because it is
//! borrowed mutably. What the world switch calls is known by name. Functions that end the machine are left out: if the stack is too
//! small for them, the page below it ends the machine as well.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

use anyhow::{Context, Result, bail, ensure};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol};

use super::gates::{Instruction, instructions};

/// Where exits of the host begin in Rust, and the vectors, which make room for the registers before.
const ROOT: &str = "host_exit";
const VECTORS: &str = "vectors";

/// Where start-up goes on in the carve-out, on a stack of its own.
const START: &str = "ravelin::resident::cpu_main";

/// The world switch, and what it alone calls, by a pointer.
const SWITCH: &str = "guest_run";
const HANDLER: &str = "ravelin_arch::guest::handle";

/// Functions that may call themselves: walks of page tables, once for each level.
const WALKS: &str = "ravelin_pgtable::table::";
const LEVELS: u64 = 4;

/// Parts of the names of functions that do not return and end the machine, and of those that write what they say.
const FATAL: [&str; 3] = ["panic", "_fail", "core::fmt::"];

/// Entries of a vtable: drop, size, alignment, and up to three ways to call.
const VTABLE: u64 = 6;

/// What is known of a function.
#[derive(Debug, Default)]
struct Function {
    name: String,
    /// Bytes that it takes itself.
    frame: u64,
    /// What it calls.
    calls: BTreeSet<usize>,
    /// What it goes to without its own frame.
    jumps: BTreeSet<usize>,
    /// Whether it calls function pointers.
    indirect: bool,
    /// Closures that it makes, and functions that it has the address of.
    pointers: BTreeSet<usize>,
}

impl Function {
    fn is_fatal(&self) -> bool {
        FATAL.iter().any(|part| self.name.contains(part))
    }
}

/// The deepest way from a function on.
#[derive(Clone, Debug, Default, PartialEq)]
struct Depth {
    bytes: u64,
    way: Vec<usize>,
}

/// Returns the most bytes that the function `root` takes, and the way there, one function a line.
fn deepest(elf: &[u8], root: &str) -> Result<(u64, String)> {
    let functions = functions(elf)?;
    let root = functions.iter().position(|function| is_named(function, root)).with_context(|| no_function(root))?;
    let mut search = Search { functions: &functions, known: HashMap::new(), running: Vec::new() };
    let deepest = search.depth(root, &BTreeSet::new())?;
    let lines = deepest.way.iter().map(|&at| format!("{:6} {}", functions[at].frame, functions[at].name));
    Ok((deepest.bytes, lines.collect::<Vec<_>>().join("\n")))
}

/// Whether a function has this name, with a hash or without.
fn is_named(function: &Function, name: &str) -> bool {
    function.name.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::h"))
}

fn no_function(name: &str) -> String {
    format!("the image has no function {name}")
}

struct Search<'a> {
    functions: &'a [Function],
    known: HashMap<(usize, BTreeSet<usize>), Depth>,
    running: Vec<usize>,
}

impl Search<'_> {
    /// Returns how deep a function goes when it can be given `pointers`.
    fn depth(&mut self, at: usize, pointers: &BTreeSet<usize>) -> Result<Depth> {
        let key = (at, pointers.clone());
        if let Some(depth) = self.known.get(&key) {
            return Ok(depth.clone());
        }
        let functions = self.functions;
        let function = &functions[at];
        if let Some(first) = self.running.iter().position(|&one| one == at) {
            let way: Vec<_> = self.running[first..].iter().map(|&one| &*functions[one].name).collect();
            bail!("{} can come to call itself: {}", function.name, way.join(" -> "));
        }
        self.running.push(at);

        let pointers: BTreeSet<_> = pointers.union(&function.pointers).copied().collect();
        let recursive = function.calls.contains(&at);
        ensure!(!recursive || function.name.starts_with(WALKS), "{} calls itself", function.name);
        let own = if recursive { LEVELS * function.frame } else { function.frame };

        let mut deepest = Depth { bytes: own, way: Vec::new() };
        let mut calls: Vec<_> = function.calls.iter().map(|&callee| (own, callee)).collect();
        calls.extend(function.jumps.iter().map(|&callee| (0, callee)));
        if function.indirect {
            calls.extend(pointers.iter().map(|&callee| (own, callee)));
        }
        for (frame, callee) in calls {
            if callee == at || functions[callee].is_fatal() {
                continue;
            }
            let mut left = pointers.clone();
            left.remove(&callee);
            let depth = self.depth(callee, &left)?;
            if frame + depth.bytes > deepest.bytes {
                deepest = Depth { bytes: frame + depth.bytes, way: depth.way };
            }
        }
        deepest.way.insert(0, at);
        self.running.pop();
        self.known.insert(key, deepest.clone());
        Ok(deepest)
    }
}

/// Bytes that the largest frame of a piece of assembly takes.
fn frames(elf: &[u8], name: &str) -> Result<u64> {
    let file = ElfFile64::<object::Endianness>::parse(elf).context("not a 64-bit ELF file")?;
    let start = file.symbol_by_name(name).with_context(|| format!("no symbol {name}"))?.address();
    let of_vectors = |&&(address, _): &&Instruction| (start..start + 0x800).contains(&address);
    let all = instructions(elf)?;
    Ok(all.iter().filter(of_vectors).filter_map(|&(_, word)| frame(word)).max().unwrap_or(0))
}

/// Reads all functions.
fn functions(elf: &[u8]) -> Result<Vec<Function>> {
    let file = ElfFile64::<object::Endianness>::parse(elf).context("not a 64-bit ELF file")?;
    let all = instructions(elf)?;
    let code = all.iter().map(|one| one.0).min().zip(all.iter().map(|one| one.0).max());
    let (first, last) = code.context("no code")?;
    let mut named: Vec<(u64, String)> = file
        .symbols()
        .filter(|symbol| (first..=last).contains(&symbol.address()))
        .filter_map(|symbol| Some((symbol.address(), symbol.name().ok()?)))
        .filter(|(_, name)| !name.is_empty() && !name.starts_with('$'))
        .map(|(address, name)| (address, addr2line::demangle_auto(Cow::from(name), None).into_owned()))
        .collect();
    named.sort();
    named.dedup_by_key(|function| function.0);
    let owner = |address: u64| named.partition_point(|function| function.0 <= address).checked_sub(1);
    let entry = |address: u64| owner(address).filter(|&at| named[at].0 == address);
    let pointers = relocated(&file)?;

    let mut functions: Vec<Function> =
        named.iter().map(|(_, name)| Function { name: name.clone(), ..Function::default() }).collect();
    let mut pages = HashMap::new();
    for &(address, word) in &all {
        let Some(at) = owner(address) else { continue };
        let function = &mut functions[at];
        function.frame += frame(word).unwrap_or(0);
        match flow(address, word) {
            Some(Flow::Call(target)) => function.calls.extend(owner(target)),
            Some(Flow::Jump(target)) => function.jumps.extend(owner(target).filter(|&target| target != at)),
            Some(Flow::Indirect) => function.indirect = true,
            None => {}
        }
        // What lies at an address that the function computes: code, or a vtable.
        if let Some(value) = computed(address, word, at, &mut pages) {
            let of_vtable = (0..VTABLE).filter_map(|index| pointers.get(&(value + 8 * index)).copied());
            let targets = of_vtable.chain([value]).filter_map(entry).filter(|&target| target != at);
            let made = targets.filter(|&target| {
                let (name, direct) = (&named[target].1, named[target].0 == value);
                if is_handler(name) {
                    return false;
                }
                name.contains("{closure") || name.contains("{{closure}}") || direct && name.contains("::")
            });
            function.pointers.extend(made);
        }
    }
    let handlers: Vec<_> = (0..functions.len()).filter(|&at| is_handler(&functions[at].name)).collect();
    let switch = functions.iter_mut().find(|function| function.name == SWITCH);
    let switch = switch.with_context(|| no_function(SWITCH))?;
    ensure!(switch.indirect && !handlers.is_empty(), "{SWITCH} does not call {HANDLER}");
    switch.indirect = false;
    switch.calls.extend(&handlers);
    Ok(functions)
}

/// Whether a function is the handler, with its parameters and hash or without.
fn is_handler(name: &str) -> bool {
    name.strip_prefix(HANDLER).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
}

/// Addresses in the words that are relocated, by where these are (RELR, ELF gABI).
fn relocated(file: &ElfFile64<'_, object::Endianness>) -> Result<HashMap<u64, u64>> {
    let relr = file.section_by_name(".relr.dyn").context("no .relr.dyn")?.data()?;
    let word = |bytes: &[u8]| bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    let read = |address: u64| {
        let section = file.sections().find(|section| {
            section.address() != 0 && (section.address()..section.address() + section.size()).contains(&address)
        })?;
        word(section.data().ok()?.get(usize::try_from(address - section.address()).ok()?..)?)
    };
    let (mut places, mut next) = (Vec::new(), 0);
    for entry in relr.chunks_exact(8).filter_map(word) {
        if entry & 1 == 0 {
            places.push(entry);
            next = entry + 8;
        } else {
            places.extend((0..63).filter(|bit| entry >> (bit + 1) & 1 != 0).map(|bit| next + 8 * bit));
            next += 63 * 8;
        }
    }
    Ok(places.into_iter().filter_map(|place| Some((place, read(place)?))).collect())
}

/// Where an instruction leads.
#[derive(Debug, PartialEq)]
enum Flow {
    Call(u64),
    Jump(u64),
    Indirect,
}

/// Decodes a branch (Arm ARM DDI 0487, C4.1.93).
fn flow(address: u64, word: u32) -> Option<Flow> {
    let target = |shift: u32, bits: u32| {
        let offset = i64::from((word << (32 - shift - bits)) as i32 >> (32 - bits)) * 4;
        address.wrapping_add_signed(offset)
    };
    match word {
        _ if word & 0xfc00_0000 == 0x9400_0000 => Some(Flow::Call(target(0, 26))),
        _ if word & 0xfc00_0000 == 0x1400_0000 => Some(Flow::Jump(target(0, 26))),
        _ if word & 0xff00_0000 == 0x5400_0000 => Some(Flow::Jump(target(5, 19))), // B.cond, BC.cond
        _ if word & 0x7e00_0000 == 0x3400_0000 => Some(Flow::Jump(target(5, 19))), // CBZ, CBNZ
        _ if word & 0x7e00_0000 == 0x3600_0000 => Some(Flow::Jump(target(5, 14))), // TBZ, TBNZ
        _ if word & 0xffff_fc1f == 0xd63f_0000 => Some(Flow::Indirect),            // BLR
        // BR: also the tables of a match, for which this is too much.
        _ if word & 0xffff_fc1f == 0xd61f_0000 => Some(Flow::Indirect),
        _ => None,
    }
}

/// Returns by how much an instruction moves the stack pointer down: SUB of an immediate, or a store with pre-index. What large
/// frames begin with, the end of a loop that goes down page by page, counts, too.
fn frame(word: u32) -> Option<u64> {
    const SP: u32 = 31;
    if word & 0xffc0_03e0 == 0xd140_0000 | SP << 5 {
        return Some(u64::from(word >> 10 & 0xfff) << 12);
    }
    if word & 0xff80_03ff == 0xd100_0000 | SP << 5 | SP {
        let immediate = u64::from(word >> 10 & 0xfff);
        return Some(if word >> 22 & 1 != 0 { immediate << 12 } else { immediate });
    }
    let negative = |bits: u32, low: u32, scale: u64| {
        let offset = (word << (32 - low - bits)) as i32 >> (32 - bits);
        (offset < 0).then(|| u64::from(offset.unsigned_abs()) * scale)
    };
    let on_stack = word >> 5 & 0x1f == SP;
    match word {
        _ if on_stack && word & 0xffc0_0000 == 0xa980_0000 => negative(7, 15, 8), // STP
        _ if on_stack && word & 0xffe0_0c00 == 0xf800_0c00 => negative(9, 12, 1), // STR
        _ => None,
    }
}

/// Follows the addresses that a function computes by ADR, or by ADRP and ADD. `pages` has the results of ADRP by function and
/// register.
fn computed(address: u64, word: u32, function: usize, pages: &mut HashMap<(usize, u32), u64>) -> Option<u64> {
    let (to, from) = (word & 0x1f, word >> 5 & 0x1f);
    let immediate = i64::from((word >> 5 << 13) as i32 >> 13 << 2) | i64::from(word >> 29 & 3);
    match word {
        _ if word & 0x9f00_0000 == 0x1000_0000 => Some(address.wrapping_add_signed(immediate)),
        _ if word & 0x9f00_0000 == 0x9000_0000 => {
            pages.insert((function, to), (address & !0xfff).wrapping_add_signed(immediate << 12));
            None
        }
        _ if word & 0xffc0_0000 == 0x9100_0000 => Some(pages.get(&(function, from))? + u64::from(word >> 10 & 0xfff)),
        _ => None,
    }
}

/// Returns how much of its stack a CPU takes. Fails if that is too small, with some room to spare.
pub(super) fn of_cpu(elf: &[u8]) -> Result<u64> {
    // The rest of a block is a page for what else a CPU has.
    let registers = frames(elf, VECTORS)?;
    Ok(registers + fits(elf, ROOT, ravelin_platform::CPU_BLOCK_SIZE - 4096 - registers)?)
}

/// The same of start-up in the carve-out.
pub(super) fn of_start(elf: &[u8]) -> Result<u64> {
    fits(elf, START, ravelin_platform::START_STACK_PAGES * 4096)
}

fn fits(elf: &[u8], root: &str, size: u64) -> Result<u64> {
    const SPARE: u64 = 1024;
    let limit = size - SPARE;
    let (bytes, way) = deepest(elf, root)?;
    if bytes > limit {
        bail!("it may take {bytes} bytes, and {limit} is the limit:\n{way}");
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_decoded() {
        let frames = [
            (0xd104_43ff, Some(272)),     // sub sp, sp, #272
            (0xd140_07ff, Some(0x1000)),  // sub sp, sp, #1, lsl #12
            (0xd140_43e9, Some(0x10000)), // sub x9, sp, #16, lsl #12
            (0xa9bd_7bfd, Some(48)),      // stp x29, x30, [sp, #-48]!
            (0xf81e_0ffe, Some(32)),      // str x30, [sp, #-32]!
            (0xa903_7bfd, None),          // stp x29, x30, [sp, #48]
            (0x9104_43ff, None),          // add sp, sp, #272
            (0xd104_43e0, None),          // sub x0, sp, #272
            (0xa8c3_7bfd, None),          // ldp x29, x30, [sp], #48
        ];
        for (word, bytes) in frames {
            assert_eq!(frame(word), bytes, "{word:#x}");
        }
    }

    #[test]
    fn branches_are_decoded() {
        let at = 0x1000;
        let branches = [
            (0x9400_0002, Some(Flow::Call(0x1008))), // bl
            (0x97ff_ffff, Some(Flow::Call(0xffc))),
            (0x17ff_fffe, Some(Flow::Jump(0xff8))),  // b
            (0x5400_0041, Some(Flow::Jump(0x1008))), // b.ne
            (0xb4ff_ffe0, Some(Flow::Jump(0xffc))),  // cbz x0
            (0x3707_ffe0, Some(Flow::Jump(0xffc))),  // tbnz w0, #0
            (0xd63f_0100, Some(Flow::Indirect)),     // blr x8
            (0xd61f_0100, Some(Flow::Indirect)),     // br x8
            (0xd65f_03c0, None),                     // ret
        ];
        for (word, expected) in branches {
            assert_eq!(flow(at, word), expected, "{word:#x}");
        }
    }

    #[test]
    fn addresses_are_followed() {
        let mut pages = HashMap::new();
        assert_eq!(computed(0x1004, 0x1000_0041, 0, &mut pages), Some(0x100c)); // adr x1, #8
        assert_eq!(computed(0x1004, 0xb000_0001, 0, &mut pages), None); // adrp x1, #4096
        assert_eq!(computed(0x1008, 0x9100_4022, 0, &mut pages), Some(0x2010)); // add x2, x1, #16
        assert_eq!(computed(0x1008, 0x9100_4022, 1, &mut pages), None);
    }

    fn function(name: &str, frame: u64, calls: &[usize]) -> Function {
        Function { name: name.into(), frame, calls: calls.iter().copied().collect(), ..Function::default() }
    }

    fn depth(functions: &[Function]) -> Result<u64> {
        let mut search = Search { functions, known: HashMap::new(), running: Vec::new() };
        Ok(search.depth(0, &BTreeSet::new())?.bytes)
    }

    #[test]
    fn the_deepest_way_counts() {
        let mut all = vec![
            function("a", 16, &[1, 2]),
            function("b", 32, &[3]),
            function("c", 48, &[]),
            function("d", 64, &[]),
            function("core::panicking::panic", 4096, &[]),
        ];
        all[3].calls.insert(4);
        assert_eq!(depth(&all).unwrap(), 16 + 32 + 64);
        // A jump leaves the frame behind.
        all[1].calls.clear();
        all[1].jumps.insert(3);
        assert_eq!(depth(&all).unwrap(), 16 + 64);
        // Walks go as deep as there are levels.
        let mut walk = function("ravelin_pgtable::table::walk", 100, &[1]);
        walk.calls.insert(3);
        all[1] = walk;
        assert_eq!(depth(&all).unwrap(), 16 + 400 + 64);
        all[1].name = "walk".into();
        assert!(depth(&all).is_err());
        all[1].calls = BTreeSet::from([0]);
        assert!(depth(&all).is_err());
    }

    #[test]
    fn pointers_reach_what_is_on_the_way() {
        let mut all = vec![
            function("maker", 16, &[1, 2]),
            function("caller", 32, &[]),
            function("other", 48, &[]),
            function("maker::{{closure}}", 64, &[4]),
            function("visit", 128, &[]),
        ];
        all[1].indirect = true;
        assert_eq!(depth(&all).unwrap(), 16 + 48);
        all[0].pointers.insert(3);
        assert_eq!(depth(&all).unwrap(), 16 + 32 + 64 + 128);
        // It does not call itself.
        all[4].indirect = true;
        assert_eq!(depth(&all).unwrap(), 16 + 32 + 64 + 128);
    }
}
