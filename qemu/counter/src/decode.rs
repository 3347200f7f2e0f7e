//! Recognises the A64 instructions that are counted by kind (Arm ARM DDI 0487, C4.1 and C5).

/// The kinds of [`Operation`] that have a counter, by name. A TLBI is found in [`TLBI`].
pub(crate) const BARRIERS: [&str; 5] = ["dsb", "isb", "dc_zva", "cache", "sysreg"];

/// TLB invalidations by (op1, CRm, op2), sorted, under the architecture's names: all but those of EL3 and Realms, which
/// count as the last, `other`.
pub(crate) const TLBI: [((u32, u32, u32), &str); 64] = [
    ((0, 1, 0), "vmalle1os"),
    ((0, 1, 1), "vae1os"),
    ((0, 1, 2), "aside1os"),
    ((0, 1, 3), "vaae1os"),
    ((0, 1, 5), "vale1os"),
    ((0, 1, 7), "vaale1os"),
    ((0, 2, 1), "rvae1is"),
    ((0, 2, 3), "rvaae1is"),
    ((0, 2, 5), "rvale1is"),
    ((0, 2, 7), "rvaale1is"),
    ((0, 3, 0), "vmalle1is"),
    ((0, 3, 1), "vae1is"),
    ((0, 3, 2), "aside1is"),
    ((0, 3, 3), "vaae1is"),
    ((0, 3, 5), "vale1is"),
    ((0, 3, 7), "vaale1is"),
    ((0, 5, 1), "rvae1os"),
    ((0, 5, 3), "rvaae1os"),
    ((0, 5, 5), "rvale1os"),
    ((0, 5, 7), "rvaale1os"),
    ((0, 6, 1), "rvae1"),
    ((0, 6, 3), "rvaae1"),
    ((0, 6, 5), "rvale1"),
    ((0, 6, 7), "rvaale1"),
    ((0, 7, 0), "vmalle1"),
    ((0, 7, 1), "vae1"),
    ((0, 7, 2), "aside1"),
    ((0, 7, 3), "vaae1"),
    ((0, 7, 5), "vale1"),
    ((0, 7, 7), "vaale1"),
    ((4, 0, 1), "ipas2e1is"),
    ((4, 0, 2), "ripas2e1is"),
    ((4, 0, 5), "ipas2le1is"),
    ((4, 0, 6), "ripas2le1is"),
    ((4, 1, 0), "alle2os"),
    ((4, 1, 1), "vae2os"),
    ((4, 1, 4), "alle1os"),
    ((4, 1, 5), "vale2os"),
    ((4, 1, 6), "vmalls12e1os"),
    ((4, 2, 1), "rvae2is"),
    ((4, 2, 5), "rvale2is"),
    ((4, 3, 0), "alle2is"),
    ((4, 3, 1), "vae2is"),
    ((4, 3, 4), "alle1is"),
    ((4, 3, 5), "vale2is"),
    ((4, 3, 6), "vmalls12e1is"),
    ((4, 4, 0), "ipas2e1os"),
    ((4, 4, 1), "ipas2e1"),
    ((4, 4, 2), "ripas2e1"),
    ((4, 4, 3), "ripas2e1os"),
    ((4, 4, 4), "ipas2le1os"),
    ((4, 4, 5), "ipas2le1"),
    ((4, 4, 6), "ripas2le1"),
    ((4, 4, 7), "ripas2le1os"),
    ((4, 5, 1), "rvae2os"),
    ((4, 5, 5), "rvale2os"),
    ((4, 6, 1), "rvae2"),
    ((4, 6, 5), "rvale2"),
    ((4, 7, 0), "alle2"),
    ((4, 7, 1), "vae2"),
    ((4, 7, 4), "alle1"),
    ((4, 7, 5), "vale2"),
    ((4, 7, 6), "vmalls12e1"),
    ((u32::MAX, 0, 0), "other"),
];

/// What an instruction is, as far as it is counted by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// `HINT #0x40 + n`, n below 64.
    Mark(u32),
    /// A TLB invalidation: index into [`TLBI`].
    Tlbi(usize),
    /// A barrier, a cache operation or an access to a system register: index into [`BARRIERS`].
    Barrier(usize),
}

/// Recognises `word`, or says `None` for what has no counter of its kind.
pub(crate) fn decode(word: u32) -> Option<Operation> {
    let (op1, crn, crm, op2) = (word >> 16 & 7, word >> 12 & 0xf, word >> 8 & 0xf, word >> 5 & 7);
    match word {
        // HINT #imm7 is CRm:op2; marks are its upper half.
        _ if word & 0xffff_f01f == 0xd503_201f && crm >= 8 => Some(Operation::Mark((crm << 3 | op2) - 0x40)),
        // Barriers: op2 4 is DSB, 6 ISB; 1 is the DSB of FEAT_XS.
        _ if word & 0xffff_f01f == 0xd503_301f => match op2 {
            4 => Some(Operation::Barrier(0)),
            1 if crm & 3 == 2 => Some(Operation::Barrier(0)),
            6 => Some(Operation::Barrier(1)),
            _ => None,
        },
        // SYS: CRn 7 is cache maintenance (but CRm 3 is prediction restriction, 8 and 9 AT), CRn 8 TLBI, CRn 9 that of
        // FEAT_XS.
        _ if word & 0xfff8_0000 == 0xd508_0000 => match (crn, crm) {
            (7, 3 | 8 | 9) => None,
            (7, 4) if op1 == 3 && op2 == 1 => Some(Operation::Barrier(2)),
            (7, _) => Some(Operation::Barrier(3)),
            (8 | 9, _) => {
                let known = TLBI.binary_search_by_key(&(op1, crm, op2), |entry| entry.0);
                Some(Operation::Tlbi(known.unwrap_or(TLBI.len() - 1)))
            }
            _ => None,
        },
        // MRS and MSR: op0 is 2 or 3.
        _ if word & 0xffd0_0000 == 0xd510_0000 => Some(Operation::Barrier(4)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tlbi(word: u32) -> &'static str {
        match decode(word) {
            Some(Operation::Tlbi(index)) => TLBI[index].1,
            other => panic!("{word:#x} is {other:?}"),
        }
    }

    #[test]
    fn table_is_sorted_for_the_search() {
        assert!(TLBI.is_sorted_by(|a, b| a.0 < b.0));
    }

    /// Words as GNU as encodes the instruction named beside them.
    #[test]
    fn invalidations_have_their_names() {
        assert_eq!(tlbi(0xd508_831f), "vmalle1is"); // tlbi vmalle1is
        assert_eq!(tlbi(0xd508_8720), "vae1"); // tlbi vae1, x0
        assert_eq!(tlbi(0xd50c_8020), "ipas2e1is"); // tlbi ipas2e1is, x0
        assert_eq!(tlbi(0xd50c_8040), "ripas2e1is"); // tlbi ripas2e1is, x0
        assert_eq!(tlbi(0xd50c_84e0), "ripas2le1os"); // tlbi ripas2le1os, x0
        assert_eq!(tlbi(0xd50c_8321), "vae2is"); // tlbi vae2is, x1
        assert_eq!(tlbi(0xd50c_83bf), "vale2is"); // tlbi vale2is, xzr
        assert_eq!(tlbi(0xd50c_83df), "vmalls12e1is"); // tlbi vmalls12e1is
        assert_eq!(tlbi(0xd50c_879f), "alle1"); // tlbi alle1
        assert_eq!(tlbi(0xd50c_931f), "alle2is"); // tlbi alle2isnxs
        assert_eq!(tlbi(0xd50e_871f), "other"); // tlbi alle3
    }

    #[test]
    fn marks_are_the_upper_half_of_the_hints() {
        assert_eq!(decode(0xd503_281f), Some(Operation::Mark(0))); // hint #0x40
        assert_eq!(decode(0xd503_2fff), Some(Operation::Mark(63))); // hint #0x7f
        assert_eq!(decode(0xd503_27ff), None); // hint #0x3f
        assert_eq!(decode(0xd503_201f), None); // nop
        assert_eq!(decode(0xd503_207f), None); // wfi
    }

    #[test]
    fn barriers_cache_operations_and_system_registers() {
        let kind = |word| match decode(word) {
            Some(Operation::Barrier(index)) => BARRIERS[index],
            _ => "none",
        };
        assert_eq!(kind(0xd503_3f9f), "dsb"); // dsb sy
        assert_eq!(kind(0xd503_3a9f), "dsb"); // dsb ishst
        assert_eq!(kind(0xd503_3e3f), "dsb"); // dsb synxs
        assert_eq!(kind(0xd503_3fdf), "isb"); // isb
        assert_eq!(kind(0xd503_3bbf), "none"); // dmb ish
        assert_eq!(kind(0xd503_3f5f), "none"); // clrex
        assert_eq!(kind(0xd503_30ff), "none"); // sb
        assert_eq!(kind(0xd50b_7420), "dc_zva"); // dc zva, x0
        assert_eq!(kind(0xd50b_7e20), "cache"); // dc civac, x0
        assert_eq!(kind(0xd508_751f), "cache"); // ic iallu
        assert_eq!(kind(0xd508_7800), "none"); // at s1e1r, x0
        assert_eq!(kind(0xd51c_c001), "sysreg"); // msr vbar_el2, x1
        assert_eq!(kind(0xd53c_5202), "sysreg"); // mrs x2, esr_el2
        assert_eq!(kind(0xd513_4200), "sysreg"); // msr s2_3_c4_c2_0, x0
        assert_eq!(kind(0xd503_42df), "none"); // msr daifset, #2
    }
}
