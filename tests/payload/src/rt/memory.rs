//! Plain accesses to the arena, which Rust knows nothing of.

use core::ptr;

use crate::rt::cpu::instruction;

/// Bytes in a page.
pub(crate) const PAGE: u64 = 4096;
/// Bytes in a level 2 block.
pub(crate) const BLOCK: u64 = 2 << 20;
/// Bytes in a level 1 block.
pub(crate) const GIB: u64 = 1 << 30;

pub(crate) use crate::pattern;

/// Fills a page with its pattern. The caller knows that the host may access it.
pub(crate) fn fill(page: u64, seed: u64) {
    for index in 0..PAGE / 8 {
        store(page + index * 8, pattern(page, index, seed));
    }
}

/// Finds the first word of a page that differs from its pattern.
pub(crate) fn find_difference(page: u64, seed: u64) -> Option<(u64, u64)> {
    (0..PAGE / 8).map(|index| (page + index * 8, index)).find_map(|(address, index)| {
        let value = load(address);
        (value != pattern(page, index, seed)).then_some((address, value))
    })
}

/// Finds the first word of a page that is not zero.
pub(crate) fn find_nonzero(page: u64) -> Option<(u64, u64)> {
    (0..PAGE / 8).map(|index| page + index * 8).map(|address| (address, load(address))).find(|&(_, value)| value != 0)
}

/// Reads a word of the arena.
#[expect(unsafe_code, reason = "memory outside Rust's objects")]
pub(crate) fn load(address: u64) -> u64 {
    let word = ptr::with_exposed_provenance::<u64>(address as usize);
    // SAFETY: Aligned, in RAM, and in no object that Rust knows of; a refused access ends in the vectors.
    unsafe { word.read_volatile() }
}

/// Writes a word of the arena.
#[expect(unsafe_code, reason = "memory outside Rust's objects")]
pub(crate) fn store(address: u64, value: u64) {
    let word = ptr::with_exposed_provenance_mut::<u64>(address as usize);
    // SAFETY: As for `load`; tests write to their arena only.
    unsafe { word.write_volatile(value) }
}

/// Writes one instruction and makes it visible to instruction fetches.
pub(crate) fn store_instruction(address: u64, instruction: u32) {
    store(address, instruction.into());
    publish_code();
}

/// Makes instructions that were written visible to fetches.
pub(crate) fn publish_code() {
    instruction!("dsb ish");
    instruction!("ic ialluis");
    instruction!("dsb ish");
    instruction!("isb");
}

/// A page of zeroed or patterned words copied out of memory.
pub(crate) fn words<const N: usize>(address: u64) -> [u64; N] {
    let mut words = [0; N];
    for (index, word) in words.iter_mut().enumerate() {
        *word = load(address + index as u64 * 8);
    }
    words
}
