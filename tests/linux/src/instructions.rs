//! Executes what the hwcaps promise, with registers that must survive other processes on the same CPU.

use core::arch::asm;
use core::hint::black_box;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::cpu::{self, Hwcap, Hwcaps, read_register};
use crate::report::{Result, bail, check};
use crate::sys::{self, End, File, Mapping};

/// Processes on each CPU, so that they take turns.
const EACH: usize = 2;

/// Turns of an empty loop, for about three ticks of the scheduler under emulation.
const SPIN: usize = 3_000_000;

/// Runs all checks.
pub(crate) fn run(hwcaps: &Hwcaps) {
    let on_all = |name: &str, needs: Option<Hwcap>, body: fn(usize) -> Result| match needs {
        Some(hwcap) if !hwcaps.has(hwcap) => {}
        _ => check(name, cpu::on_all(EACH, body)),
    };
    on_all("FP registers survive", Some(Hwcap::FP), fp_registers);
    on_all("SVE registers survive", Some(Hwcap::SVE), sve_registers);
    on_all("SME's matrix survives", Some(Hwcap::SME), sme_matrix);
    on_all("pointers are signed and authenticated", Some(Hwcap::PACA), sign);
    on_all("a wrong signature is refused", Some(Hwcap::PACA), |_| forge());
    on_all("generic authentication", Some(Hwcap::PACG), |_| generic());
    on_all("memory tags", Some(Hwcap::MTE), |_| tags());
    on_all("branch targets", Some(Hwcap::BTI), |_| branch_targets());
    on_all("copy and set instructions", Some(Hwcap::MOPS), copy_and_set);
    on_all("CRC32", Some(Hwcap::CRC32), |_| crc());
    on_all("random numbers", Some(Hwcap::RNG), |_| random());
    check("atomic operations between CPUs", atomics(Some(hwcaps.has(Hwcap::ATOMICS))));
    check("exclusive accesses between CPUs", atomics(None));
    check("the counter is one on all CPUs", counter());
}

/// Keeps the CPU for some ticks, with the registers that the caller has set.
macro_rules! spin {
    () => {
        "2: subs {spin}, {spin}, #1\nb.ne 2b"
    };
}

/// What a process has in its registers, by its number.
fn fill(bytes: &mut [u8], process: usize) {
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = ((index * 7 + process * 31) & 0xff) as u8 | 1;
    }
}

fn fp_registers(process: usize) -> Result {
    let mut before = [0_u8; 512];
    let mut after = [0_u8; 512];
    fill(&mut before, process);
    // SAFETY: Loads and stores 32 registers of 16 bytes in the two arrays; this program does not use them otherwise.
    unsafe {
        asm!(
            ".arch_extension fp", ".arch_extension simd",
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "ldr q\\n, [{from}, #(\\n * 16)]",
            ".endr",
            spin!(),
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "str q\\n, [{to}, #(\\n * 16)]",
            ".endr",
            from = in(reg) before.as_ptr(), to = in(reg) after.as_mut_ptr(), spin = inout(reg) SPIN => _,
            options(nostack)
        );
    }
    if before == after { Ok(()) } else { bail!("a register has changed") }
}

fn sve_registers(process: usize) -> Result {
    const LARGEST: usize = 256;
    let length: usize;
    // SAFETY: Reads the length of a vector.
    unsafe { asm!(".arch_extension sve", "rdvl {}, #1", out(reg) length, options(nomem, nostack)) };
    if !length.is_multiple_of(16) || !(16..=LARGEST).contains(&length) {
        bail!("vectors of {length} bytes");
    }
    // 32 vectors and 16 predicates, which have an eighth of the size.
    let mut before = [0_u8; 34 * LARGEST];
    let mut after = [0_u8; 34 * LARGEST];
    fill(&mut before, process);
    let predicates = 32 * length;
    let used = 34 * length;
    // SAFETY: Loads and stores `used` bytes; this program does not use the registers otherwise.
    unsafe {
        asm!(
            ".arch_extension sve",
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "ldr p\\n, [{from_p}, #\\n, mul vl]",
            ".endr",
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "ldr z\\n, [{from}, #\\n, mul vl]",
            ".endr",
            spin!(),
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "str p\\n, [{to_p}, #\\n, mul vl]",
            ".endr",
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "str z\\n, [{to}, #\\n, mul vl]",
            ".endr",
            from = in(reg) before.as_ptr(), to = in(reg) after.as_mut_ptr(),
            from_p = in(reg) before[predicates..].as_ptr(), to_p = in(reg) after[predicates..].as_mut_ptr(),
            spin = inout(reg) SPIN => _,
            options(nostack)
        );
    }
    if before[..used] == after[..used] { Ok(()) } else { bail!("a register has changed") }
}

fn sme_matrix(process: usize) -> Result {
    const LARGEST: usize = 256;
    let length: usize;
    // SAFETY: Reads the length of a streaming vector.
    unsafe { asm!(".arch_extension sme", "rdsvl {}, #1", out(reg) length, options(nomem, nostack)) };
    if !length.is_power_of_two() || !(16..=LARGEST).contains(&length) {
        bail!("streaming vectors of {length} bytes");
    }
    let before = Mapping::anonymous(LARGEST * LARGEST, sys::READ | sys::WRITE)?;
    let after = Mapping::anonymous(LARGEST * LARGEST, sys::READ | sys::WRITE)?;
    // SAFETY: Nothing else points into the mapping, which starts out as zeroes.
    let contents = unsafe { core::slice::from_raw_parts_mut(before.start, length * length) };
    fill(contents, process);
    // SAFETY: Loads and stores as many rows of as many bytes as a streaming vector has; the program does not use the
    // matrix or vector registers otherwise.
    unsafe {
        asm!(
            ".arch_extension sme",
            "smstart",
            "mov w12, #0", "mov {row}, {from}",
            "3: ldr za[w12, 0], [{row}]", "add {row}, {row}, {length}", "add w12, w12, #1",
            "cmp x12, {length}", "b.ne 3b",
            spin!(),
            "mov w12, #0", "mov {row}, {to}",
            "3: str za[w12, 0], [{row}]", "add {row}, {row}, {length}", "add w12, w12, #1",
            "cmp x12, {length}", "b.ne 3b",
            "smstop",
            from = in(reg) before.start, to = in(reg) after.start, length = in(reg) length, row = out(reg) _,
            spin = inout(reg) SPIN => _, out("x12") _,
            options(nostack)
        );
    }
    // SAFETY: Nothing writes to the mapping any more.
    let result = unsafe { core::slice::from_raw_parts(after.start, length * length) };
    if contents == result { Ok(()) } else { bail!("the matrix has changed") }
}

/// Signs a pointer with key A for a modifier.
fn pacia(pointer: usize, modifier: usize) -> usize {
    let signed;
    // SAFETY: PACIA1716, in its encoding as a hint.
    unsafe { asm!("hint #8", inout("x17") pointer => signed, in("x16") modifier, options(nomem, nostack)) };
    signed
}

/// Checks and strips a signature.
fn autia(pointer: usize, modifier: usize) -> usize {
    let stripped;
    // SAFETY: AUTIA1716, in its encoding as a hint.
    unsafe { asm!("hint #12", inout("x17") pointer => stripped, in("x16") modifier, options(nomem, nostack)) };
    stripped
}

fn sign(process: usize) -> Result {
    let pointer = fill as *const () as usize;
    let mut signatures = 0;
    for modifier in 0..64 {
        let modifier = modifier << 4 | process;
        let signed = pacia(pointer, modifier);
        signatures += usize::from(signed != pointer);
        for spin in 0..SPIN / 256 {
            black_box(spin);
        }
        if autia(signed, modifier) != pointer {
            bail!("{signed:#x} with {modifier:#x} is not {pointer:#x}");
        }
    }
    // A signature may happen to be that of no bits set.
    if signatures < 32 { bail!("pointers stay as they are") } else { Ok(()) }
}

fn forge() -> Result {
    let value = 0_u64;
    let pointer = &raw const value as usize;
    let modifiers = (1..64).find(|modifier| pacia(pointer, *modifier) != pacia(pointer, 0));
    let Some(modifier) = modifiers else { bail!("signatures do not depend on the modifier") };
    let end = sys::in_child(|| {
        let stripped = autia(pacia(pointer, 0), modifier) as *const u64;
        // SAFETY: Not a use of the value: the pointer is bad, unless the CPU has refused it already.
        black_box(unsafe { stripped.read_volatile() });
        0
    })?;
    match end {
        End::Killed(sys::SIGILL | sys::SIGSEGV) => Ok(()),
        end => bail!("{end}"),
    }
}

fn generic() -> Result {
    let pacga = |value: usize, modifier: usize| -> usize {
        let code;
        // SAFETY: PACGA x0, x1, x2.
        unsafe {
            asm!(".inst 0x9ac23020", out("x0") code, in("x1") value, in("x2") modifier, options(nomem, nostack));
        }
        code
    };
    let code = pacga(1, 2);
    if code == 0 || code == pacga(1, 3) || code != pacga(1, 2) { bail!("{code:#x} is no code") } else { Ok(()) }
}

fn tags() -> Result {
    const SET_TAGGED_ADDR_CTRL: usize = 55;
    const ENABLE_SYNCHRONOUS_ALL_TAGS: usize = 1 | 1 << 1 | 0xfffe << 3;
    // SAFETY: Touches no memory.
    unsafe { sys::call(sys::number::PRCTL, [SET_TAGGED_ADDR_CTRL, ENABLE_SYNCHRONOUS_ALL_TAGS, 0, 0, 0, 0]) }?;
    let memory = Mapping::anonymous(1 << 20, sys::READ | sys::WRITE | sys::MTE)?;
    let tag = |pointer: usize| pointer >> 56 & 0xf;
    for offset in (0..1 << 20).step_by(4096) {
        let plain = memory.address() + offset;
        let (tagged, loaded): (usize, usize);
        // SAFETY: Chooses a tag, gives it to 16 bytes of the mapping and reads it back.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "irg {tagged}, {plain}", "stg {tagged}, [{tagged}]", "mov {loaded}, {plain}", "ldg {loaded}, [{plain}]",
                plain = in(reg) plain, tagged = out(reg) tagged, loaded = out(reg) loaded, options(nostack)
            );
        }
        if tag(tagged) == 0 || tag(loaded) != tag(tagged) {
            bail!("tag {} was stored, {} is there", tag(tagged), tag(loaded));
        }
        let pointer = core::ptr::with_exposed_provenance_mut::<u64>(tagged);
        // SAFETY: Its tag is that of the memory.
        unsafe { pointer.write_volatile(offset as u64) };
        // SAFETY: As above.
        if unsafe { pointer.read_volatile() } != offset as u64 {
            bail!("tagged memory has changed");
        }
    }
    let end = sys::in_child(|| {
        // SAFETY: The memory has a tag, the pointer has none; the process is a throw-away.
        black_box(unsafe { memory.start.read_volatile() });
        0
    })?;
    if end == End::Killed(sys::SIGSEGV) { Ok(()) } else { bail!("an access with the wrong tag: {end}") }
}

fn branch_targets() -> Result {
    const NOP: u32 = 0xd503_201f;
    const BTI_C: u32 = 0xd503_245f;
    const RET: u32 = 0xd65f_03c0;
    let code = Mapping::anonymous(4096, sys::READ | sys::WRITE)?;
    for (index, instruction) in [NOP, RET, BTI_C, RET].into_iter().enumerate() {
        // SAFETY: In the mapping.
        let at = unsafe { code.start.cast::<u32>().add(index) };
        // SAFETY: As above.
        unsafe { at.write_volatile(instruction) };
    }
    // SAFETY: Makes the instructions visible; they lie in one line of any cache.
    unsafe {
        asm!("dc cvau, {at}", "dsb ish", "ic ivau, {at}", "dsb ish", "isb", at = in(reg) code.address(), options(nostack));
    }
    code.protect(sys::READ | sys::EXEC | sys::BTI)?;
    let call = |offset: usize| {
        sys::in_child(|| {
            // SAFETY: The code there returns at once, if it may be called.
            unsafe { asm!("blr {}", in(reg) code.address() + offset, out("x30") _, options(nostack)) };
            0
        })
    };
    let (target, no_target) = (call(8)?, call(0)?);
    if target != End::Exited(0) {
        bail!("a call of a target: {target}");
    }
    if no_target != End::Killed(sys::SIGILL) {
        bail!("a call of what is no target: {no_target}");
    }
    Ok(())
}

fn copy_and_set(process: usize) -> Result {
    const SIZE: usize = 10_000;
    let source = Mapping::anonymous(SIZE, sys::READ | sys::WRITE)?;
    let target = Mapping::anonymous(SIZE, sys::READ | sys::WRITE)?;
    // SAFETY: Nothing else points into the mapping, which starts out as zeroes.
    let contents = unsafe { core::slice::from_raw_parts_mut(source.start, SIZE) };
    fill(contents, process);
    // SAFETY: Copies one mapping to the other and sets the last 1000 bytes of it; the pages are untouched as yet, so that
    // the copy is interrupted by faults.
    unsafe {
        asm!(
            ".arch_extension mops",
            "cpyfp [x0]!, [x1]!, x2!", "cpyfm [x0]!, [x1]!, x2!", "cpyfe [x0]!, [x1]!, x2!",
            "sub x0, x0, #1000", "mov x2, #1000",
            "setp [x0]!, x2!, x3", "setm [x0]!, x2!, x3", "sete [x0]!, x2!, x3",
            inout("x0") target.start => _, inout("x1") source.start => _, inout("x2") SIZE => _, in("x3") 0x5a,
            options(nostack)
        );
    }
    // SAFETY: Nothing writes to the mapping any more.
    let copy = unsafe { core::slice::from_raw_parts(target.start, SIZE) };
    let same = copy[..SIZE - 1000] == contents[..SIZE - 1000] && copy[SIZE - 1000..].iter().all(|byte| *byte == 0x5a);
    if same { Ok(()) } else { bail!("the copy differs") }
}

fn crc() -> Result {
    let code: u32;
    // SAFETY: Computes a code.
    unsafe {
        asm!(
            ".arch_extension crc", "crc32x {code:w}, {seed:w}, {value}",
            code = out(reg) code, seed = in(reg) u32::MAX, value = in(reg) 0x3837_3635_3433_3231_u64,
            options(nomem, nostack)
        );
    }
    // Of "12345678".
    if !code == 0x9ae0_daaf { Ok(()) } else { bail!("{:#x}", !code) }
}

fn random() -> Result {
    let (one, other) = (read_register!("s3_3_c2_c4_0"), read_register!("s3_3_c2_c4_0"));
    if one == other { bail!("twice {one:#x}") } else { Ok(()) }
}

/// All CPUs add to one word: by LSE instructions if there are any, or exclusively.
fn atomics(lse: Option<bool>) -> Result {
    const ROUNDS: usize = 20_000;
    let zero = File::open(c"/dev/zero", sys::RDWR)?;
    let page = Mapping::shared(&zero, 4096, sys::READ | sys::WRITE, 0)?;
    if lse == Some(false) {
        return Ok(());
    }
    let word = page.start.cast::<usize>();
    let processes = cpu::online()?.min(8);
    cpu::on_all(1, |_| {
        for _ in 0..ROUNDS {
            if lse.is_some() {
                // SAFETY: An atomic operation on a word that is otherwise left alone.
                unsafe { asm!(".arch_extension lse", "stadd {:x}, [{}]", in(reg) 1, in(reg) word, options(nostack)) };
            } else {
                // SAFETY: As above.
                unsafe {
                    asm!(
                        "2: ldxr {value}, [{word}]", "add {value}, {value}, #1", "stxr {failed:w}, {value}, [{word}]",
                        "cbnz {failed:w}, 2b",
                        value = out(reg) _, failed = out(reg) _, word = in(reg) word, options(nostack)
                    );
                }
            }
        }
        Ok(())
    })?;
    // SAFETY: The mapping outlives the reference; the other processes have ended.
    let sum = unsafe { AtomicUsize::from_ptr(word) }.load(Ordering::Relaxed);
    if sum == processes * ROUNDS { Ok(()) } else { bail!("{sum}, not {processes} times {ROUNDS}") }
}

/// Later is later, whichever CPU one asks.
fn counter() -> Result {
    let cpus = cpu::online()?;
    let mut last = 0;
    for round in 0..200 {
        sys::run_on(round % cpus)?;
        // SAFETY: Keeps the read of the counter behind what came before.
        unsafe { asm!("isb", options(nomem, nostack)) };
        let now = read_register!("cntvct_el0");
        if now <= last {
            bail!("{now} after {last}");
        }
        last = now;
    }
    Ok(())
}
