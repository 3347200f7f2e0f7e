//! FP, SIMD and SVE registers. Nobody at EL2 uses them: they belong to the host or to a guest, and are switched when a guest
//! first touches them.

use core::{arch::global_asm, ptr};

use ravelin_memory::{PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_vm::VectorPlaces;

use crate::sysreg::{maintain, write_lower_sysreg};

global_asm!(include_str!("../../asm/vector_registers.S"));

unsafe extern "C" {
    fn simd_save(area: u64);
    fn simd_load(area: u64);
    fn sve_save(area: u64);
    fn sve_load(area: u64);
    fn sve_length() -> u64;
}

/// CPTR_EL2 that lets EL2 use FP, SIMD and, if there is one, SVE (the RES1 bits, less TZ).
const CPTR_SIMD: u64 = 0x33ff;
const CPTR_SVE: u64 = CPTR_SIMD & !(1 << 8);

/// Bytes in front of the registers.
const HEADER: u64 = 32;

/// Returns how many pages the vector registers of a guest and those of the host take. CPTR_EL2 is that of the host.
pub(super) fn area_pages(sve: bool) -> u64 {
    let length = length(sve);
    // With SVE, predicates of an eighth of that.
    let half = HEADER + 32 * length + if sve { 17 * length / 8 } else { 0 };
    (2 * half.next_multiple_of(16)).div_ceil(PAGE_SIZE)
}

/// Returns the bytes of a vector register.
fn length(sve: bool) -> u64 {
    if !sve {
        return 16;
    }
    // SAFETY: There is SVE, and neither the host nor EL2 is kept from it.
    unsafe { sve_length() }
}

/// Returns where the guest's registers are. CPTR_EL2 is that of the host.
pub(super) fn places(area: PhysRange, sve: bool) -> VectorPlaces {
    let [_, guest] = halves(area);
    let at = PhysAddr::from_bits_truncating;
    VectorPlaces { status: at(guest), first: at(guest + HEADER), stride: length(sve) }
}

/// Returns where the host's and the guest's are.
fn halves(area: PhysRange) -> [u64; 2] {
    [area.base().raw(), area.base().raw() + area.size() / 2]
}

/// Saves the host's registers, and loads the guest's.
pub(super) fn load_guest(area: PhysRange, sve: bool) {
    let [host, guest] = halves(area);
    switch(host, guest, sve);
}

/// Saves the guest's registers, and loads the host's.
pub(super) fn load_host(area: PhysRange, sve: bool) {
    let [host, guest] = halves(area);
    switch(guest, host, sve);
}

fn switch(from: u64, to: u64, sve: bool) {
    write_lower_sysreg!("cptr_el2", if sve { CPTR_SVE } else { CPTR_SIMD });
    maintain!("isb");
    let (save, load): (Transfer, Transfer) = if sve { (sve_save, sve_load) } else { (simd_save, simd_load) };
    // SAFETY: The halves of the area, which is EL2's and has room for both, are mapped at their physical addresses and
    // multiples of 16. No Rust code at EL2 uses these registers.
    unsafe { save(from) };
    // SAFETY: As above.
    unsafe { load(to) };
}

/// Moves all vector registers to or from an area.
type Transfer = unsafe extern "C" fn(u64);

/// Zeroes the guest's half.
pub(super) fn clear_guest(area: PhysRange) {
    let [_, guest] = halves(area);
    let words = ptr::with_exposed_provenance_mut::<u64>(guest as usize);
    // SAFETY: The area is EL2's alone, mapped at its physical address; half a page or more, and a multiple of 16.
    unsafe { ptr::write_bytes(words, 0, (area.size() / 2 / 8) as usize) };
}
