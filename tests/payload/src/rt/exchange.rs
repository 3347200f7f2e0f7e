//! Code that puts something of its own into every register, executes a few instructions, and looks what has become of the
//! registers. It runs at the host and in guests alike, and is assembled when it is needed: which registers there are is the
//! CPU's to say.
//!
//! It lies in an area of memory together with its data, so that whoever has access to the area can prepare it and look at what
//! has come out. A register's value is its previous one, exclusive-ored with something else, so that what must stay stays.

use core::arch::asm;

use arrayvec::ArrayVec;

use crate::{
    rt::{cpu::read_register, memory},
    tests::{Outcome, check, check_eq},
};

/// Pages of an area.
pub(crate) const AREA_PAGES: u64 = 9;

// Offsets in an area. What was there before: x18 to x30, SP.
const SAVED: u64 = 0x000;
/// Vector length in bytes.
const LENGTH: u64 = 0x078;
/// For tests to use.
pub(crate) const FLAG: u64 = 0x080;
// x0 to x30, SP: what to load, and what there is afterwards.
const X_IN: u64 = 0x100;
const X_OUT: u64 = 0x200;
// System registers: before, what to change, what this has led to, and what there is afterwards.
const BEFORE: u64 = 0x300;
const CHANGE: u64 = 0x600;
const SET: u64 = 0x900;
const OUT: u64 = 0xC00;
// Vector registers: Z0 to Z31, P0 to P15, FFR; or Q0 to Q31.
const V_IN: u64 = 0x1000;
const V_OUT: u64 = 0x4000;
const CODE: u64 = 0x7000;

/// Number of the register that holds the address of the area.
const BASE: u32 = 30;
/// Number of SP in the area.
const SP: usize = 31;

/// The most system registers.
const MAX: usize = 96;

/// Who executes the code.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Who {
    Host,
    Guest,
}

/// What of the vector registers the code touches.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Vectors {
    /// Nothing.
    None,
    /// FP and SIMD.
    Simd,
    /// SVE with this ZCR_EL1.
    Sve(u32),
}

impl Vectors {
    /// All that the CPU has.
    pub(crate) fn all() -> Self {
        if has_sve() { Self::Sve(0xf) } else { Self::Simd }
    }
}

/// Whether there is SVE.
pub(crate) fn has_sve() -> bool {
    read_register!("id_aa64pfr0_el1") >> 32 & 0xf != 0
}

/// A system register.
#[derive(Clone, Copy, Debug)]
struct Register {
    name: &'static str,
    /// op0 to op2 where MSR and MRS have them.
    encoding: u32,
    /// Bits that may be changed.
    mask: u64,
}

impl Register {
    /// Bits that do not change by themselves: not the one that says that a timer has fired.
    fn stable(&self) -> u64 {
        if self.is_timer_control() { TIMER } else { ALL }
    }

    fn is_timer_control(&self) -> bool {
        self.name.ends_with("_CTL_EL0")
    }
}

const ALL: u64 = u64::MAX;
const WORD: u64 = 0xffff_ffff;
/// ENABLE and IMASK of a timer's control.
const TIMER: u64 = 0b11;

/// Registers that may be there, and whether they are.
macro_rules! registers {
    ($list:ident: $($present:expr => { $($name:ident($op0:literal $op1:literal $n:literal $m:literal $op2:literal) $mask:expr;)+ })+) => {$(
        if $present {
            $($list.push(Register {
                name: stringify!($name),
                encoding: ($op0 - 2) << 19 | $op1 << 16 | $n << 12 | $m << 8 | $op2 << 5,
                mask: $mask,
            });)+
        }
    )+};
}

fn registers(who: Who, vectors: Vectors) -> ArrayVec<Register, MAX> {
    let field = |register: u64, shift: u32| register >> shift & 0xf;
    let (pfr0, pfr1) = (read_register!("id_aa64pfr0_el1"), read_register!("id_aa64pfr1_el1"));
    let (isar1, isar2) = (read_register!("id_aa64isar1_el1"), read_register!("s3_0_c0_c6_2"));
    let (mmfr1, mmfr2) = (read_register!("id_aa64mmfr1_el1"), read_register!("s3_0_c0_c7_2"));
    let (mmfr3, dfr0) = (read_register!("s3_0_c0_c7_3"), read_register!("id_aa64dfr0_el1"));
    let keys = field(isar1, 4) | field(isar1, 8) | field(isar2, 12) != 0;
    let host = who == Who::Host;
    // FPEN and ZEN.
    let access = if vectors == Vectors::None { 0b11_0011 << 16 } else { 0 };
    // EnIA, EnIB, EnDA, EnDB; UMA, DZE, UCT, nTWI, nTWE, E0E, UCI.
    let sctlr = if keys { 1 << 31 | 1 << 30 | 1 << 27 | 1 << 13 } else { 0 } | 0x0505_c200;
    let mut list = ArrayVec::<Register, MAX>::new();
    registers! { list:
        true => {
            NZCV(3 3 4 2 0) 0xf000_0000;
            DAIF(3 3 4 2 1) 0;
            SPSel(3 0 4 2 0) 0;
            SP_EL0(3 0 4 1 0) ALL;
            ELR_EL1(3 0 4 0 1) ALL;
            SPSR_EL1(3 0 4 0 0) 0xf000_03c0;
            ESR_EL1(3 0 5 2 0) WORD;
            FAR_EL1(3 0 6 0 0) ALL;
            AFSR0_EL1(3 0 5 1 0) WORD;
            AFSR1_EL1(3 0 5 1 1) WORD;
            VBAR_EL1(3 0 12 0 0) 0xffff_ffff_f800;
            CPACR_EL1(3 0 1 0 2) access;
            SCTLR_EL1(3 0 1 0 0) sctlr;
            TTBR0_EL1(3 0 2 0 0) 0xff << 48;
            TTBR1_EL1(3 0 2 0 1) 0xff_ffff_ffff_f000;
            TCR_EL1(3 0 2 0 2) 1 << 38 | 0x0f3f_0000;
            MAIR_EL1(3 0 10 2 0) 0xffff_ffff_ffff_0000;
            AMAIR_EL1(3 0 10 3 0) ALL;
            CONTEXTIDR_EL1(3 0 13 0 1) WORD;
            PAR_EL1(3 0 7 4 0) 0x000f_ffff_ffff_f001;
            CSSELR_EL1(3 2 0 0 0) 0xf;
            TPIDR_EL0(3 3 13 0 2) ALL;
            TPIDRRO_EL0(3 3 13 0 3) ALL;
            TPIDR_EL1(3 0 13 0 4) ALL;
            CNTKCTL_EL1(3 0 14 1 0) 0x3ff;
            CNTP_CTL_EL0(3 3 14 2 1) TIMER;
            CNTP_CVAL_EL0(3 3 14 2 2) ALL;
            MPIDR_EL1(3 0 0 0 5) 0;
            MIDR_EL1(3 0 0 0 0) 0;
        }
        keys => {
            APIAKeyLo_EL1(3 0 2 1 0) ALL;
            APIAKeyHi_EL1(3 0 2 1 1) ALL;
            APIBKeyLo_EL1(3 0 2 1 2) ALL;
            APIBKeyHi_EL1(3 0 2 1 3) ALL;
            APDAKeyLo_EL1(3 0 2 2 0) ALL;
            APDAKeyHi_EL1(3 0 2 2 1) ALL;
            APDBKeyLo_EL1(3 0 2 2 2) ALL;
            APDBKeyHi_EL1(3 0 2 2 3) ALL;
            APGAKeyLo_EL1(3 0 2 3 0) ALL;
            APGAKeyHi_EL1(3 0 2 3 1) ALL;
        }
        field(pfr0, 28) != 0 => { DISR_EL1(3 0 12 1 1) 0x8100_1fff; }
        field(mmfr1, 20) != 0 => { PAN(3 0 4 2 3) 1 << 22; }
        field(mmfr2, 4) != 0 => { UAO(3 0 4 2 4) 1 << 23; }
        field(pfr0, 48) != 0 => { DIT(3 3 4 2 5) 1 << 24; }
        field(pfr1, 4) >= 2 => { SSBS(3 3 4 2 6) 1 << 12; }
        field(mmfr3, 0) != 0 => { TCR2_EL1(3 0 2 0 3) (field(mmfr3, 16) != 0) as u64 * 0b100; }
        field(mmfr3, 4) != 0 => { SCTLR2_EL1(3 0 1 0 3) 0b11_1000; }
        field(mmfr3, 8) != 0 => {
            PIRE0_EL1(3 0 10 2 2) ALL;
            PIR_EL1(3 0 10 2 3) ALL;
        }
        field(mmfr3, 16) != 0 => {
            POR_EL1(3 0 10 2 4) ALL;
            POR_EL0(3 3 10 2 4) ALL;
        }
        vectors != Vectors::None => {
            FPCR(3 3 4 4 0) 0x07c0_0000;
            FPSR(3 3 4 4 1) 0x0800_009f;
        }
        matches!(vectors, Vectors::Sve(_)) => { ZCR_EL1(3 0 1 2 0) 0; }
        // The test waits for the host's virtual timer.
        true => {
            CNTV_CTL_EL0(3 3 14 3 1) if host { 0 } else { TIMER };
            CNTV_CVAL_EL0(3 3 14 3 2) if host { 0 } else { ALL };
            ICC_PMR_EL1(3 0 4 6 0) if host { 0 } else { 0xf8 };
            ICC_BPR0_EL1(3 0 12 8 3) if host { 0 } else { 7 };
            ICC_BPR1_EL1(3 0 12 12 3) if host { 0 } else { 7 };
            ICC_CTLR_EL1(3 0 12 12 4) if host { 0 } else { 2 };
            ICC_IGRPEN0_EL1(3 0 12 12 6) if host { 0 } else { 1 };
            ICC_IGRPEN1_EL1(3 0 12 12 7) if host { 0 } else { 1 };
            ICC_AP0R0_EL1(3 0 12 8 4) if host { 0 } else { WORD };
            ICC_AP1R0_EL1(3 0 12 9 0) if host { 0 } else { WORD };
            ICC_SRE_EL1(3 0 12 12 5) 0;
        }
        host => {
            MDSCR_EL1(2 0 0 2 2) 1 << 12;
            DBGBVR0_EL1(2 0 0 0 4) 0xffff_ffff_fffc;
            DBGBCR0_EL1(2 0 0 0 5) 0;
            DBGWVR0_EL1(2 0 0 0 6) 0xffff_ffff_fffc;
            OSLSR_EL1(2 0 1 1 4) 0;
            ACTLR_EL1(3 0 1 0 1) 0;
        }
        host && !matches!(field(dfr0, 8), 0 | 0xf) => {
            PMCR_EL0(3 3 9 12 0) 0b110_0001;
            PMCNTENSET_EL0(3 3 9 12 1) 0;
            PMSELR_EL0(3 3 9 12 5) 0x1f;
            PMUSERENR_EL0(3 3 9 14 0) 0xf;
            PMINTENSET_EL1(3 0 9 14 1) 0;
            PMCCFILTR_EL0(3 3 14 15 7) 0xc000_0000;
        }
        host && field(pfr1, 24) != 0 => { TPIDR2_EL0(3 3 13 0 5) ALL; }
        host && field(pfr0, 56) >= 2 => {
            SCXTNUM_EL0(3 3 13 0 7) ALL;
            SCXTNUM_EL1(3 0 13 0 7) ALL;
        }
        host && field(mmfr3, 24) != 0 => {
            MAIR2_EL1(3 0 10 2 1) ALL;
            AMAIR2_EL1(3 0 10 3 1) ALL;
        }
    }
    list
}

/// A number that is unlike any other, in both of its halves (the finaliser of SplitMix64).
fn unlike(place: u64, seed: u64) -> u64 {
    let mut value = (seed << 32 | place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// Instructions.
mod a64 {
    pub(super) const ISB: u32 = 0xd503_3fdf;
    pub(super) const RET: u32 = 0xd65f_03c0;

    pub(super) const fn ldr(register: u32, base: u32, offset: u64) -> u32 {
        0xf940_0000 | (offset as u32 / 8) << 10 | base << 5 | register
    }
    pub(super) const fn str(register: u32, base: u32, offset: u64) -> u32 {
        0xf900_0000 | (offset as u32 / 8) << 10 | base << 5 | register
    }
    pub(super) const fn mrs(register: u32, encoding: u32) -> u32 {
        0xd530_0000 | encoding | register
    }
    pub(super) const fn msr(encoding: u32, register: u32) -> u32 {
        0xd510_0000 | encoding | register
    }
    pub(super) const fn mov(to: u32, from: u32) -> u32 {
        0xaa00_03e0 | from << 16 | to
    }
    pub(super) const fn movz(to: u32, value: u32, shift: u32) -> u32 {
        0xd280_0000 | (shift / 16) << 21 | value << 5 | to
    }
    pub(super) const fn eor(to: u32, a: u32, b: u32) -> u32 {
        0xca00_0000 | b << 16 | a << 5 | to
    }
    pub(super) const fn orr(to: u32, a: u32, b: u32) -> u32 {
        0xaa00_0000 | b << 16 | a << 5 | to
    }
    /// ADD (immediate) of a number of pages; also what MOV from and to SP is.
    pub(super) const fn add_pages(to: u32, from: u32, offset: u64) -> u32 {
        0x9140_0000 | (offset as u32 >> 12) << 10 | from << 5 | to
    }
    pub(super) const fn addvl(register: u32, count: u32) -> u32 {
        0x0420_5000 | register << 16 | count << 5 | register
    }
    pub(super) const fn rdvl(register: u32) -> u32 {
        0x04bf_5020 | register
    }
    pub(super) const fn ptrue(predicate: u32, pattern: u32) -> u32 {
        0x2518_e000 | pattern << 5 | predicate
    }
    pub(super) const fn wrffr(predicate: u32) -> u32 {
        0x2528_9000 | predicate << 5
    }
    pub(super) const fn rdffr(predicate: u32) -> u32 {
        0x2519_f000 | predicate
    }
    const fn scalable(opcode: u32, register: u32, base: u32, index: u32) -> u32 {
        opcode | (index >> 3) << 16 | (index & 7) << 10 | base << 5 | register
    }
    pub(super) const fn ldr_z(register: u32, base: u32, index: u32) -> u32 {
        scalable(0x8580_4000, register, base, index)
    }
    pub(super) const fn str_z(register: u32, base: u32, index: u32) -> u32 {
        scalable(0xe580_4000, register, base, index)
    }
    pub(super) const fn ldr_p(register: u32, base: u32, index: u32) -> u32 {
        scalable(0x8580_0000, register, base, index)
    }
    pub(super) const fn str_p(register: u32, base: u32, index: u32) -> u32 {
        scalable(0xe580_0000, register, base, index)
    }
    pub(super) const fn ldr_q(register: u32, base: u32) -> u32 {
        0x3dc0_0000 | register << 10 | base << 5 | register
    }
    pub(super) const fn str_q(register: u32, base: u32) -> u32 {
        0x3d80_0000 | register << 10 | base << 5 | register
    }
}

/// An area with code for somebody.
pub(crate) struct Exchange {
    /// Where the host finds it.
    area: u64,
    /// Where the one who executes the code finds it.
    seen: u64,
    who: Who,
    vectors: Vectors,
    registers: ArrayVec<Register, MAX>,
    seed: u64,
}

impl Exchange {
    /// Uses `AREA_PAGES` pages at `area`, where the one who executes the code finds them at `seen`.
    pub(crate) fn new(area: u64, seen: u64, who: Who, vectors: Vectors) -> Self {
        Self { area, seen, who, vectors, registers: registers(who, vectors), seed: 0 }
    }

    /// Prepares the code: other values of all registers than with any other `seed`, and these instructions in the middle. They
    /// keep x30, which is the address of the area.
    pub(crate) fn prepare(&mut self, seed: u64, instructions: &[u32]) -> Outcome {
        self.seed = seed;
        for index in 0..32 {
            self.set_x(index as usize, unlike(X_IN + 8 * index, seed));
        }
        for (index, register) in self.registers.iter().enumerate() {
            let value = unlike(CHANGE + 8 * index as u64, seed);
            // A timer that is on and not masked would fire.
            let value = if register.is_timer_control() { value | 2 } else { value };
            memory::store(self.area + CHANGE + 8 * index as u64, value & register.mask);
        }
        for offset in (0..0x2300).step_by(8) {
            memory::store(self.area + V_IN + offset, unlike(V_IN + offset, seed));
        }
        memory::store(self.area + FLAG, 0);
        self.assemble(instructions, true)
    }

    /// Prepares code that looks at the vector registers, and changes nothing.
    pub(crate) fn prepare_to_look(&self, instructions: &[u32]) -> Outcome {
        for offset in (X_IN..X_OUT).chain(CHANGE..SET).step_by(8) {
            memory::store(self.area + offset, 0);
        }
        memory::store(self.area + FLAG, 0);
        self.assemble(instructions, false)
    }

    fn assemble(&self, instructions: &[u32], load_vectors: bool) -> Outcome {
        let mut code = ArrayVec::<u32, 2048>::new();
        let mut emit = |words: &[u32]| code.try_extend_from_slice(words);
        let (t, u) = (9, 10);
        let each = |table: u64| (0..).map(move |index: u64| table + 8 * index).zip(&self.registers);
        let assembled = (|| {
            for x in 18..=30 {
                emit(&[a64::str(x, 1, SAVED + 8 * u64::from(x - 18))])?;
            }
            emit(&[a64::mov(BASE, 1), 0x9100_03e0 | t, a64::str(t, BASE, SAVED + 8 * 13)])?; // mov x9, sp
            if let Vectors::Sve(zcr) = self.vectors {
                const CPACR: u32 = 1 << 19 | 1 << 12 | 2 << 5;
                const ZCR: u32 = 1 << 19 | 1 << 12 | 2 << 8;
                emit(&[a64::mrs(t, CPACR), a64::movz(u, 3, 16), a64::orr(t, t, u), a64::msr(CPACR, t), a64::ISB])?;
                emit(&[a64::movz(t, zcr, 0), a64::msr(ZCR, t), a64::ISB])?;
                emit(&[a64::rdvl(t), a64::str(t, BASE, LENGTH)])?;
            }
            for (offset, register) in each(0) {
                emit(&[a64::mrs(t, register.encoding), a64::str(t, BASE, BEFORE + offset)])?;
                if load_vectors && register.mask != 0 {
                    emit(&[a64::ldr(u, BASE, CHANGE + offset), a64::eor(t, t, u), a64::msr(register.encoding, t)])?;
                }
            }
            emit(&[a64::ISB])?;
            for (offset, register) in each(SET) {
                emit(&[a64::mrs(t, register.encoding), a64::str(t, BASE, offset)])?;
            }
            if load_vectors && self.vectors != Vectors::None {
                emit(&[a64::add_pages(t, BASE, V_IN)])?;
                for v in 0..32 {
                    emit(&[if self.has_sve() { a64::ldr_z(v, t, v) } else { a64::ldr_q(v, t) }])?;
                }
                if self.has_sve() {
                    emit(&[a64::ptrue(0, self.ffr()), a64::wrffr(0), a64::addvl(t, 16), a64::addvl(t, 16)])?;
                    for p in 0..16 {
                        emit(&[a64::ldr_p(p, t, p)])?;
                    }
                }
            }
            emit(&[a64::ldr(t, BASE, X_IN + 8 * SP as u64), 0x9100_001f | t << 5])?; // mov sp, x9
            for x in 0..30 {
                emit(&[a64::ldr(x, BASE, X_IN + 8 * u64::from(x))])?;
            }
            emit(instructions)?;
            for x in 0..30 {
                emit(&[a64::str(x, BASE, X_OUT + 8 * u64::from(x))])?;
            }
            emit(&[0x9100_03e0 | t, a64::str(t, BASE, X_OUT + 8 * SP as u64)])?;
            if self.vectors != Vectors::None {
                emit(&[a64::add_pages(t, BASE, V_OUT)])?;
                for v in 0..32 {
                    emit(&[if self.has_sve() { a64::str_z(v, t, v) } else { a64::str_q(v, t) }])?;
                }
                if self.has_sve() {
                    emit(&[a64::addvl(t, 16), a64::addvl(t, 16)])?;
                    for p in 0..16 {
                        emit(&[a64::str_p(p, t, p)])?;
                    }
                    emit(&[a64::rdffr(0), a64::str_p(0, t, 16), a64::ldr_p(0, t, 0)])?;
                }
            }
            for (offset, register) in each(OUT) {
                emit(&[a64::mrs(t, register.encoding), a64::str(t, BASE, offset)])?;
            }
            for (offset, register) in each(BEFORE).filter(|(_, register)| register.mask != 0) {
                emit(&[a64::ldr(t, BASE, offset), a64::msr(register.encoding, t)])?;
            }
            emit(&[a64::ISB, a64::ldr(t, BASE, SAVED + 8 * 13), 0x9100_001f | t << 5])?;
            for x in 0..18 {
                emit(&[a64::movz(x, 0, 0)])?;
            }
            for x in 18..=30 {
                emit(&[a64::ldr(x, BASE, SAVED + 8 * u64::from(x - 18))])?;
            }
            emit(&[a64::RET])
        })();
        check!(assembled.is_ok(), "the code does not fit");
        if !code.len().is_multiple_of(2) {
            code.push(a64::RET);
        }
        for (index, pair) in code.as_chunks::<2>().0.iter().enumerate() {
            memory::store(self.area + CODE + 8 * index as u64, u64::from(pair[1]) << 32 | u64::from(pair[0]));
        }
        memory::publish_code();
        Ok(())
    }

    fn has_sve(&self) -> bool {
        matches!(self.vectors, Vectors::Sve(_))
    }

    /// Elements in FFR, and what PTRUE calls that pattern. FFR is ones and then zeros.
    fn ffr(&self) -> u32 {
        (self.seed % 8) as u32 + 1
    }

    /// The same area, for code that touches other vector registers.
    pub(crate) fn with_vectors(&self, vectors: Vectors) -> Self {
        Self::new(self.area, self.seen, self.who, vectors)
    }

    /// Sets what x0 to x29, or SP as number 31, are to be.
    pub(crate) fn set_x(&self, number: usize, value: u64) {
        memory::store(self.area + X_IN + 8 * number as u64, value);
    }

    /// What x0 to x29, or SP as number 31, have become.
    pub(crate) fn x(&self, number: usize) -> u64 {
        memory::load(self.area + X_OUT + 8 * number as u64)
    }

    /// Address of the code, and its argument in x1, for the one who executes it.
    pub(crate) fn call(&self) -> [u64; 2] {
        [self.seen + CODE, self.seen]
    }

    /// Lets the flag that code may wait for be set.
    pub(crate) fn raise_flag(&self) {
        memory::store(self.area + FLAG, 1);
    }

    /// Executes the code here.
    #[expect(unsafe_code, reason = "code that was assembled")]
    pub(crate) fn execute(&self) {
        let [code, area] = self.call();
        // SAFETY: The code follows the procedure call standard: it restores what it has changed. The area is the test's.
        unsafe {
            asm!("blr x9", inlateout("x0") code => _, inlateout("x1") area => _, inlateout("x9") code => _, clobber_abi("C"));
        }
    }

    /// Checks that the instructions in the middle have left all registers alone but those of x0 to x29 that are named.
    pub(crate) fn check(&self, but: &[usize]) -> Outcome {
        let who = self.who;
        for number in (0..32).filter(|number| *number != BASE as usize && !but.contains(number)) {
            let expected = memory::load(self.area + X_IN + 8 * number as u64);
            check_eq!(self.x(number), expected, "x{number} of the {who:?}");
        }
        for (index, register) in self.registers.iter().enumerate() {
            let [set, out] = [SET, OUT].map(|table| memory::load(self.area + table + 8 * index as u64));
            check_eq!(out & register.stable(), set & register.stable(), "{} of the {who:?}", register.name);
        }
        self.check_vectors()
    }

    /// Checks that as many system registers have been changed as there are at least.
    pub(crate) fn check_changed(&self) -> Outcome {
        for (index, register) in self.registers.iter().enumerate() {
            let [before, change, set] =
                [BEFORE, CHANGE, SET].map(|table| memory::load(self.area + table + 8 * index as u64));
            // Those that hold what they are given on every CPU.
            let holds = register.mask == ALL && !register.name.starts_with("AMAIR");
            check!(!holds || set == before ^ change, "{} is {set:#x}, not {:#x}", register.name, before ^ change);
        }
        Ok(())
    }

    /// Checks that the vector registers are what they have been prepared to be.
    pub(crate) fn check_vectors(&self) -> Outcome {
        let words = self.vector_words();
        let (length, who) = (self.length(), self.who);
        for offset in (0..words).map(|index| 8 * index) {
            let [set, out] = [V_IN, V_OUT].map(|table| memory::load(self.area + table + offset));
            check_eq!(
                out,
                set,
                "word {offset:#x} of the vector registers of the {who:?}, which have {length:#x} bytes"
            );
        }
        if self.has_sve() {
            check_eq!(self.ffr_out(), (1 << self.ffr()) - 1, "FFR of the {who:?}");
        }
        Ok(())
    }

    /// The first 16 bits of FFR.
    fn ffr_out(&self) -> u64 {
        let at = V_OUT + 32 * self.length() + 16 * self.length() / 8;
        memory::load(self.area + at) & 0xffff
    }

    /// Vector length in bytes.
    pub(crate) fn length(&self) -> u64 {
        if self.has_sve() { memory::load(self.area + LENGTH) } else { 16 }
    }

    /// Words of Z and P, or of Q.
    fn vector_words(&self) -> u64 {
        match self.vectors {
            Vectors::None => 0,
            Vectors::Simd => 64,
            Vectors::Sve(_) => (32 * self.length() + 16 * self.length() / 8) / 8,
        }
    }

    /// Checks that the vector registers, as the code found them, are zero.
    pub(crate) fn check_zero(&self) -> Outcome {
        for offset in (0..self.vector_words()).map(|index| 8 * index) {
            let out = memory::load(self.area + V_OUT + offset);
            check_eq!(out, 0, "word {offset:#x} of the vector registers of the {:?}", self.who);
        }
        check!(!self.has_sve() || self.ffr_out() == 0, "FFR of the {:?} is not zero", self.who);
        for (index, register) in self.registers.iter().enumerate().filter(|(_, it)| it.name.starts_with("FP")) {
            let value = memory::load(self.area + OUT + 8 * index as u64);
            check_eq!(value, 0, "{} of the {:?}", register.name, self.who);
        }
        Ok(())
    }

    /// Calls `each` with the values that the registers have while the instructions are executed, but for x30 and what nobody
    /// would call a secret: `but` of x0 to x29, and registers of few bits.
    pub(crate) fn secrets(&self, but: &[usize], mut each: impl FnMut(u64)) {
        for number in (0..32).filter(|number| *number != BASE as usize && !but.contains(number)) {
            each(memory::load(self.area + X_IN + 8 * number as u64));
        }
        for (index, register) in self.registers.iter().enumerate() {
            if register.mask.count_ones() >= 32 {
                each(memory::load(self.area + SET + 8 * index as u64));
            }
        }
        for offset in (0..self.vector_words()).map(|index| 8 * index) {
            each(memory::load(self.area + V_IN + offset));
        }
    }
}
