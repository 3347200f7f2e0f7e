//! What the kernel says of its CPUs.

use core::arch::asm;
use core::ffi::CStr;

use crate::report::{self, Message};
use crate::sys::{self, Errno};

/// The words of `AT_HWCAP`, `AT_HWCAP2`, `AT_HWCAP3` and `AT_HWCAP4`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hwcaps([usize; 4]);

/// A bit of the hwcaps (Linux, `arch/arm64/include/uapi/asm/hwcap.h`): its word, counted from 0, and its number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hwcap(usize, u32);

impl Hwcap {
    pub(crate) const FP: Self = Self(0, 0);
    pub(crate) const CRC32: Self = Self(0, 7);
    pub(crate) const ATOMICS: Self = Self(0, 8);
    pub(crate) const CPUID: Self = Self(0, 11);
    pub(crate) const SVE: Self = Self(0, 22);
    pub(crate) const PACA: Self = Self(0, 30);
    pub(crate) const PACG: Self = Self(0, 31);
    pub(crate) const RNG: Self = Self(1, 16);
    pub(crate) const BTI: Self = Self(1, 17);
    pub(crate) const MTE: Self = Self(1, 18);
    pub(crate) const SME: Self = Self(1, 23);
    pub(crate) const MOPS: Self = Self(1, 43);
}

impl Hwcaps {
    /// Reads the entries of an auxiliary vector, pairs of type and value, up to that of type 0.
    pub(crate) fn from_auxv(entry: impl Fn(usize) -> (usize, usize)) -> Self {
        let mut hwcaps = Self::default();
        for index in 0.. {
            let (kind, value) = entry(index);
            match kind {
                0 => break,
                16 => hwcaps.0[0] = value,
                26 => hwcaps.0[1] = value,
                29 => hwcaps.0[2] = value,
                30 => hwcaps.0[3] = value,
                _ => {}
            }
        }
        hwcaps
    }

    /// Whether the bit is set.
    pub(crate) fn has(&self, hwcap: Hwcap) -> bool {
        self.0[hwcap.0] >> hwcap.1 & 1 != 0
    }
}

/// Reads a system register.
macro_rules! read_register {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: The kernel lets programs read it, or emulates that.
        unsafe { asm!(concat!("mrs {}, ", $name), out(reg) value, options(nomem, nostack)) };
        value
    }};
}
pub(crate) use read_register;

/// Prints what must be the same without a hypervisor.
pub(crate) fn identity(hwcaps: &Hwcaps) {
    let [first, second, third, fourth] = hwcaps.0;
    report::value("hwcaps", format_args!("{first:#x} {second:#x} {third:#x} {fourth:#x}"));
    report::value("CTR_EL0", format_args!("{:#x}", read_register!("ctr_el0")));
    report::value("DCZID_EL0", format_args!("{:#x}", read_register!("dczid_el0")));
    report::value("CNTFRQ_EL0", format_args!("{}", read_register!("cntfrq_el0")));
    if !hwcaps.has(Hwcap::CPUID) {
        return report::skip("identification registers", "the kernel does not emulate reads");
    }
    let registers = [
        ("MIDR_EL1", read_register!("midr_el1")),
        ("REVIDR_EL1", read_register!("revidr_el1")),
        ("ID_AA64PFR0_EL1", read_register!("id_aa64pfr0_el1")),
        ("ID_AA64PFR1_EL1", read_register!("id_aa64pfr1_el1")),
        ("ID_AA64ZFR0_EL1", read_register!("s3_0_c0_c4_4")),
        ("ID_AA64SMFR0_EL1", read_register!("s3_0_c0_c4_5")),
        ("ID_AA64DFR0_EL1", read_register!("id_aa64dfr0_el1")),
        ("ID_AA64ISAR0_EL1", read_register!("id_aa64isar0_el1")),
        ("ID_AA64ISAR1_EL1", read_register!("id_aa64isar1_el1")),
        ("ID_AA64ISAR2_EL1", read_register!("s3_0_c0_c6_2")),
        ("ID_AA64MMFR0_EL1", read_register!("id_aa64mmfr0_el1")),
        ("ID_AA64MMFR1_EL1", read_register!("id_aa64mmfr1_el1")),
        ("ID_AA64MMFR2_EL1", read_register!("s3_0_c0_c7_2")),
    ];
    for (name, value) in registers {
        report::value(name, format_args!("{value:#x}"));
    }
}

/// How many CPUs are online: the last number of the list, which has no gaps in these tests.
pub(crate) fn online() -> Result<usize, Errno> {
    last(c"/sys/devices/system/cpu/online")
}

/// How many CPUs there are.
pub(crate) fn present() -> Result<usize, Errno> {
    last(c"/sys/devices/system/cpu/present")
}

fn last(path: &CStr) -> Result<usize, Errno> {
    let mut buffer = [0; 64];
    let list = sys::read_file(path, &mut buffer)?;
    let number = list.trim_ascii().rsplit(|byte| !byte.is_ascii_digit()).next();
    Ok(1 + number.and_then(parse).unwrap_or(0))
}

/// A decimal number.
pub(crate) fn parse(digits: &[u8]) -> Option<usize> {
    core::str::from_utf8(digits).ok()?.parse().ok()
}

/// Runs `body` on every CPU at once, in `each` processes a CPU, and has all succeed. `body` is given the process's number.
pub(crate) fn on_all(each: usize, body: impl Fn(usize) -> report::Result) -> report::Result {
    let cpus = online()?;
    let mut children: [Option<sys::Child>; 32] = [const { None }; 32];
    let count = (cpus * each).min(children.len());
    for (index, child) in children.iter_mut().enumerate().take(count) {
        *child = Some(sys::Child::spawn(|| {
            match sys::run_on(index % cpus).map_err(Message::from).and_then(|()| body(index)) {
                Ok(()) => 0,
                Err(why) => {
                    sys::print(why.as_bytes());
                    sys::print(b"\n");
                    1
                }
            }
        })?);
    }
    let mut result = Ok(());
    for (index, child) in children.into_iter().flatten().enumerate() {
        let end = child.wait()?;
        if end != sys::End::Exited(0) {
            result = Err(format_args!("process {index} of {count}: {end}").into());
        }
    }
    result
}
