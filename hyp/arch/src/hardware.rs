//! The CPU as page tables see it: descriptor accesses, barriers, TLB and cache maintenance.

use core::{
    arch::asm,
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};

use ravelin_memory::{HypRange, IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
#[cfg(feature = "trace")]
use ravelin_pgtable::Hint;
use ravelin_pgtable::{Machine, Vttbr};

use crate::{
    guest::Guests,
    sysreg::{id_field, maintain, read_sysreg, traced, write_lower_sysreg},
};

/// From this many pages on, and without FEAT_TLBIRANGE, one invalidation of everything costs less than one for each page.
const PAGES_WORTH_ALL: u64 = 64;

/// Pages that one range operation can name: (31 + 1) * 2^(5 * 3 + 1), Arm ARM DDI 0487, C5.5 "TLBI RIPAS2E1IS".
const RANGE_OPERATION_PAGES: u64 = 1 << 21;

/// The CPU this runs on.
#[derive(Clone, Copy, Debug)]
pub struct Hardware {
    pub(crate) guests: Guests,
}

impl Hardware {
    /// Names the CPU.
    ///
    /// # Safety
    ///
    /// The MMU is on and every table page that will be named to the new value is mapped at its physical address,
    /// cacheable and writable, and used as a table only.
    #[must_use]
    pub unsafe fn new() -> Self {
        Self { guests: Guests::default() }
    }

    /// Returns the same, for running guests on a machine with these redistributors.
    ///
    /// # Safety
    ///
    /// The redistributors are mapped at their physical addresses as devices.
    #[must_use]
    pub unsafe fn with_guests(self, redistributors: &'static [PhysRange]) -> Self {
        Self { guests: Guests::new(redistributors) }
    }

    fn descriptor(table: PhysAddr, index: usize) -> &'static AtomicU64 {
        debug_assert!(index < 512 && table.is_aligned(PAGE_SIZE));
        // In the page, whatever comes: cheaper than to find out, and each walk does it at each level.
        let table = table.align_down(PAGE_SIZE).raw() as usize;
        let pointer = ptr::with_exposed_provenance_mut::<u64>(table).wrapping_add(index % 512);
        // SAFETY: `Hardware::new` promises that table pages are mapped and used as tables only; the index stays in the page.
        // A table page is never given back to Rust as anything but a page to be cleared.
        unsafe { AtomicU64::from_ptr(pointer) }
    }
}

impl Machine for Hardware {
    #[inline]
    fn read(&self, table: PhysAddr, index: usize) -> u64 {
        Self::descriptor(table, index).load(Ordering::Relaxed)
    }

    #[inline]
    fn write(&self, table: PhysAddr, index: usize, value: u64) {
        #[cfg(feature = "trace")]
        crate::trace::write(table, index, value);
        Self::descriptor(table, index).store(value, Ordering::Relaxed);
    }

    fn clear_table(&self, table: PhysAddr) {
        zero(table, PAGE_SIZE);
        #[cfg(feature = "trace")]
        crate::trace::init(table);
    }

    #[inline]
    fn publish(&self) {
        // The walkers of all CPUs observe the descriptor writes (Arm ARM DDI 0487, D8.2.6), and EL2's own accesses behind
        // this, which a new mapping of its own may be for, are walked for anew.
        maintain!("dsb ishst", "isb");
    }

    fn invalidate_stage2(&self, tree: Vttbr, range: IpaRange, leaf_only: bool) {
        let first = range.base().page_number();
        let _current = Current::set(tree);
        if fits_range_operation(range.pages()) {
            let operand = range_operand(first, range.pages());
            if leaf_only {
                maintain!("sys #4, c8, c0, #6, {}", operand = operand); // ripas2le1is
            } else {
                maintain!("sys #4, c8, c0, #2, {}", operand = operand); // ripas2e1is
            }
        } else if range.pages() > PAGES_WORTH_ALL {
            invalidate_vmid();
            return;
        } else {
            for page in first..first + range.pages() {
                if leaf_only {
                    maintain!("tlbi ipas2le1is, {}", operand = page);
                } else {
                    maintain!("tlbi ipas2e1is, {}", operand = page);
                }
            }
        }
        // The first DSB completes the stage-2 invalidation before stage-1 entries, which may hold a copy of its result, go;
        // the second completes that (Arm ARM DDI 0487, D8.17.5 "TLB maintenance instructions").
        maintain!("dsb ish", "tlbi vmalle1is", "dsb ish", "isb");
    }

    fn invalidate_stage2_all(&self, tree: Vttbr) {
        let _current = Current::set(tree);
        invalidate_vmid();
    }

    fn invalidate_el2(&self, range: HypRange) {
        let first = range.base().page_number();
        if fits_range_operation(range.pages()) {
            maintain!("sys #4, c8, c2, #1, {}", operand = range_operand(first, range.pages())); // rvae2is
        } else if range.pages() > PAGES_WORTH_ALL {
            maintain!("tlbi alle2is");
        } else {
            for page in first..first + range.pages() {
                maintain!("tlbi vae2is, {}", operand = page);
            }
        }
        maintain!("dsb ish", "isb");
    }

    fn scrub(&self, range: PhysRange) {
        zero(range.base(), range.size());
        clean_to_poc(range.base(), range.size());
    }

    fn clean(&self, range: PhysRange) {
        clean_to_poc(range.base(), range.size());
        synchronise_instructions();
    }

    // Spare pages are no tables, so that this is no store of a descriptor.
    #[cfg(feature = "trace")]
    fn write_link(&self, page: PhysAddr, next: u64) {
        Self::descriptor(page, 0).store(next, Ordering::Relaxed);
    }

    #[cfg(feature = "trace")]
    fn hint(&self, hint: Hint) {
        // In a trace, tables begin as zeroes.
        if let Hint::Overwrite(table) = hint {
            zero(table, PAGE_SIZE);
        }
        crate::trace::hint(hint);
    }
}

/// A stage 2 that is the one of this CPU, whose VMID TLB maintenance is for, until this is dropped.
///
/// EL2 runs with interrupts masked and does not return to EL1 meanwhile, and what EL1 executes is not speculated on from
/// EL2.
struct Current {
    /// VTTBR_EL2 before, if it was another.
    before: Option<u64>,
}

impl Current {
    fn set(tree: Vttbr) -> Self {
        let (before, wanted) = (read_sysreg!("vttbr_el2"), tree.bits());
        if before == wanted {
            return Self { before: None };
        }
        // Walks that began at EL1 may go on until then (Arm ARM DDI 0487, R_LFHQG).
        maintain!("dsb nsh");
        write_lower_sysreg!("vttbr_el2", wanted);
        maintain!("isb");
        Self { before: Some(before) }
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            write_lower_sysreg!("vttbr_el2", before);
            maintain!("isb");
        }
    }
}

/// Removes all of the current VMID from the TLBs.
fn invalidate_vmid() {
    maintain!("tlbi vmalls12e1is", "dsb ish", "isb");
}

/// Returns whether one range operation does for `pages` pages: there is more than one page, and the CPU has FEAT_TLBIRANGE
/// (ID_AA64ISAR0_EL1.TLB = 0b0010).
fn fits_range_operation(pages: u64) -> bool {
    (2..=RANGE_OPERATION_PAGES).contains(&pages) && id_field(read_sysreg!("id_aa64isar0_el1"), 56) >= 2
}

/// Returns the operand of a range operation that covers `pages` pages from page number `first`, or a few more: TG = 4 KiB,
/// SCALE and NUM such that (NUM + 1) * 2^(5 * SCALE + 1) pages are enough, any level.
fn range_operand(first: u64, pages: u64) -> u64 {
    let mut scale = 0;
    while scale < 3 && pages > 32 << (5 * scale + 1) {
        scale += 1;
    }
    let unit = 5 * scale + 1;
    let num = (pages.div_ceil(1 << unit) - 1).min(31);
    (1 << 46) | (scale << 44) | (num << 39) | (first & ((1 << 37) - 1))
}

/// Zeroes `size` bytes, whole pages, from the page-aligned `base`.
fn zero(base: PhysAddr, size: u64) {
    let dczid = read_sysreg!("dczid_el0");
    let (start, end) = (base.raw(), base.raw() + size);
    // Up to 512 bytes a block, four of which fit a page; DZP says that the instruction is not allowed.
    if dczid & 0x1f <= 7 {
        // SAFETY: The caller of `clear_table` or `scrub` names pages that are mapped writable and that no Rust value lives
        // in. The loop stays within them, because four times the block size of DC ZVA divides a page.
        unsafe {
            asm!(
                "2:",
                "dc zva, {at}",
                "add {at}, {at}, {step}",
                "dc zva, {at}",
                "add {at}, {at}, {step}",
                "dc zva, {at}",
                "add {at}, {at}, {step}",
                "dc zva, {at}",
                "add {at}, {at}, {step}",
                "cmp {at}, {end}",
                "b.lo 2b",
                at = inout(reg) start => _, end = in(reg) end, step = in(reg) 4_u64 << (dczid & 0xf),
                options(nostack)
            );
        }
    } else {
        // SAFETY: As above, in steps of 64 bytes.
        unsafe {
            asm!(
                "2:",
                "stp xzr, xzr, [{at}]",
                "stp xzr, xzr, [{at}, #16]",
                "stp xzr, xzr, [{at}, #32]",
                "stp xzr, xzr, [{at}, #48]",
                "add {at}, {at}, #64",
                "cmp {at}, {end}",
                "b.lo 2b",
                at = inout(reg) start => _, end = in(reg) end,
                options(nostack)
            );
        }
    }
}

/// Cleans and invalidates the data cache by virtual address to the point of coherency and waits, so that a reader whose
/// caches are off sees what was written.
pub fn clean_to_poc(base: PhysAddr, size: u64) {
    let line = 4_u64 << ((read_sysreg!("ctr_el0") >> 16) & 0xf);
    traced!("dsb sy");
    // Four lines a turn.
    // SAFETY: Cleaning does not change what memory holds for a coherent reader. Lines before the base and beyond the end lie
    // in the same pages, which four lines divide.
    unsafe {
        asm!(
            "2:",
            "dc civac, {at}",
            "add {at}, {at}, {line}",
            "dc civac, {at}",
            "add {at}, {at}, {line}",
            "dc civac, {at}",
            "add {at}, {at}, {line}",
            "dc civac, {at}",
            "add {at}, {at}, {line}",
            "cmp {at}, {end}",
            "b.lo 2b",
            "dsb sy",
            at = inout(reg) base.raw() & !(4 * line - 1) => _, end = in(reg) base.raw() + size, line = in(reg) line,
            options(nostack)
        );
    }
}

/// Makes instructions that were written as data visible to instruction fetches of all CPUs. The caller has cleaned them.
pub(crate) fn synchronise_instructions() {
    maintain!("ic ialluis", "dsb ish", "isb");
}
