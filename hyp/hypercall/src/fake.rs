//! Firmware for tests.

use std::sync::Mutex;

use ravelin_memory::PhysAddr;

use crate::{Entries, Firmware};

/// Firmware that notes each call and answers as told.
pub(crate) struct FakeFirmware<A = fn([u64; 4]) -> [u64; 4]> {
    answer: A,
    calls: Mutex<Vec<[u64; 4]>>,
}

impl<A: Fn([u64; 4]) -> [u64; 4]> FakeFirmware<A> {
    pub(crate) fn new(answer: A) -> Self {
        Self { answer, calls: Mutex::default() }
    }

    /// Returns the calls since the last time.
    pub(crate) fn take(&self) -> Vec<[u64; 4]> {
        core::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl<A: Fn([u64; 4]) -> [u64; 4]> Firmware for &FakeFirmware<A> {
    fn smc(&self, registers: [u64; 4]) -> [u64; 4] {
        self.calls.lock().unwrap().push(registers);
        (self.answer)(registers)
    }
}

/// Answers as firmware with PSCI 1.1 and SMCCC 1.5, to which nothing else is unknown.
pub(crate) fn modern([function, ..]: [u64; 4]) -> [u64; 4] {
    match function {
        0x8400_0000 => [0x1_0001, 0, 0, 0],
        0x8000_0000 => [0x1_0005, 0, 0, 0],
        _ => [0, 0x11, 0x22, 0x33],
    }
}

/// Answers as QEMU's own PSCI: version 1.1, and no SMCCC beyond 1.0.
pub(crate) fn plain([function, argument, ..]: [u64; 4]) -> [u64; 4] {
    match (function, argument) {
        (0x8400_0000, _) => [0x1_0001, 0, 0, 0],
        (0x8400_0001..=0x8400_000a | 0xc400_0001..=0xc400_0004, argument) if argument != 0x8000_0000 => [0; 4],
        _ => [u64::MAX, 0, 0, 0],
    }
}

pub(crate) fn entries() -> Entries {
    let address = |raw| PhysAddr::new(raw).unwrap();
    Entries { start: address(0x1_0000_1000), resume: address(0x1_0000_2000) }
}
