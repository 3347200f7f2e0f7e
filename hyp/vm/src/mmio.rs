//! Loads and stores to devices: what the syndrome says of the instruction, and what becomes of its one register.

use crate::Context;

/// A load or store of one general-purpose register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioAccess {
    /// ESR_EL2.
    esr: u64,
    /// Memory is big-endian for it.
    big_endian: bool,
}

/// Fields of the ISS of a data abort (Arm ARM DDI 0487, D24.2.40 "ESR_EL2", ISS encoding for an exception from a Data Abort).
mod iss {
    pub(super) const ISV: u64 = 1 << 24;
    pub(super) const SAS_SHIFT: u32 = 22;
    pub(super) const SAS: u64 = 0b11;
    pub(super) const SSE: u64 = 1 << 21;
    pub(super) const SRT_SHIFT: u32 = 16;
    pub(super) const SRT: u64 = 0x1f;
    pub(super) const SF: u64 = 1 << 15;
    pub(super) const S1PTW: u64 = 1 << 7;
    pub(super) const WNR: u64 = 1 << 6;
}

impl MmioAccess {
    /// Decodes the syndrome of a data abort that `context` has taken. `None` if it does not describe the access: there is
    /// more than one register, or one of another kind, or an address that is written back; or a walk of the guest's own
    /// tables; or the guest is in AArch32 state, which no guest is told to have.
    #[must_use]
    pub fn decode(esr: u64, context: &Context) -> Option<Self> {
        if esr & iss::ISV == 0 || esr & iss::S1PTW != 0 || context.is_aarch32() {
            return None;
        }
        Some(Self { esr, big_endian: context.is_big_endian() })
    }

    /// Returns whether it is a store.
    #[must_use]
    pub const fn is_write(&self) -> bool {
        self.esr & iss::WNR != 0
    }

    /// Returns how many bytes: 1, 2, 4 or 8.
    #[must_use]
    pub const fn bytes(&self) -> u8 {
        1 << (self.esr >> iss::SAS_SHIFT & iss::SAS)
    }

    /// Returns the number of the register; 31 is XZR.
    const fn register(&self) -> u8 {
        let [register, ..] = (self.esr >> iss::SRT_SHIFT & iss::SRT).to_le_bytes();
        register
    }

    /// Returns how many bits of a register are not the access's.
    const fn rest(&self) -> u32 {
        64_u32.wrapping_sub(8 << (self.esr >> iss::SAS_SHIFT & iss::SAS))
    }

    /// Returns what a store puts into memory, as a number whose lowest byte is at the lowest address. Nothing else of the
    /// register is in it.
    #[must_use]
    pub fn stored(&self, context: &Context) -> u64 {
        self.at_the_top(context.register(self.register())).wrapping_shr(self.rest())
    }

    /// Ends a load of `value`, whose lowest byte is at the lowest address and whose bytes beyond the access do not matter.
    #[inline]
    pub fn load(&self, context: &mut Context, value: u64) {
        let value = self.at_the_top(value);
        let value = if self.esr & iss::SSE != 0 {
            value.cast_signed().wrapping_shr(self.rest()).cast_unsigned()
        } else {
            value.wrapping_shr(self.rest())
        };
        // Of an X register, not a W register.
        let value = if self.esr & iss::SF != 0 { value } else { value & 0xffff_ffff };
        context.set_register(self.register(), value);
    }

    /// Moves what is the access's of a value to the highest bits, and reverses its bytes if memory has them the other way round.
    const fn at_the_top(&self, value: u64) -> u64 {
        if self.big_endian { value.swap_bytes() } else { value.wrapping_shl(self.rest()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DATA_ABORT: u64 = 0x24 << 26 | 1 << 25;
    const EE: u64 = 1 << 25;

    fn syndrome(log2_bytes: u64, register: u64, write: bool, sign_extend: bool, wide: bool) -> u64 {
        DATA_ABORT
            | 1 << 24
            | log2_bytes << 22
            | u64::from(sign_extend) << 21
            | register << 16
            | u64::from(wide) << 15
            | u64::from(write) << 6
            | 0x07
    }

    fn at_el1(big_endian: bool) -> Context {
        let mut context = Context { pstate: 0x3c5, sctlr_el1: if big_endian { EE } else { 0 }, ..Context::default() };
        for (number, register) in (0_u64..).zip(&mut context.x) {
            *register = 0x8182_8384_8586_8788 ^ number << 56 ^ number;
        }
        context
    }

    #[test]
    fn what_the_syndrome_does_not_describe() {
        let esr = syndrome(2, 3, false, false, false);
        assert!(MmioAccess::decode(esr, &at_el1(false)).is_some());
        assert_eq!(MmioAccess::decode(esr & !(1 << 24), &at_el1(false)), None);
        assert_eq!(MmioAccess::decode(esr | 1 << 7, &at_el1(false)), None);
        assert_eq!(MmioAccess::decode(esr, &Context { pstate: 0x10, ..at_el1(false) }), None);
    }

    #[test]
    fn stores_of_every_width_register_and_byte_order() {
        for big_endian in [false, true] {
            let context = at_el1(big_endian);
            for log2_bytes in 0..4 {
                for number in 0..32 {
                    let access =
                        MmioAccess::decode(syndrome(log2_bytes, number, true, false, log2_bytes == 3), &context);
                    let access = access.unwrap();
                    let bytes = 1 << log2_bytes;
                    assert!(access.is_write() && usize::from(access.bytes()) == bytes);
                    // What the CPU would put into memory.
                    let register = context.x.get(number as usize).copied().unwrap_or(0);
                    let mut memory = register.to_le_bytes()[..bytes].to_vec();
                    if big_endian {
                        memory.reverse();
                    }
                    memory.resize(8, 0);
                    assert_eq!(access.stored(&context).to_le_bytes(), memory[..]);
                }
            }
        }
    }

    #[test]
    fn loads_known_by_heart() {
        let load = |log2_bytes, sign_extend, wide, value| {
            let mut context = at_el1(false);
            let access = MmioAccess::decode(syndrome(log2_bytes, 5, false, sign_extend, wide), &context).unwrap();
            assert!(!access.is_write());
            access.load(&mut context, value);
            context.x[5]
        };
        let value = 0xf1f2_f3f4_f5f6_f7f8;
        assert_eq!(load(0, false, false, value), 0xf8); // LDRB
        assert_eq!(load(0, true, false, value), 0xffff_fff8); // LDRSB Wt
        assert_eq!(load(0, true, true, value), 0xffff_ffff_ffff_fff8); // LDRSB Xt
        assert_eq!(load(0, true, true, 0x7f), 0x7f);
        assert_eq!(load(1, false, false, value), 0xf7f8); // LDRH
        assert_eq!(load(1, true, false, value), 0xffff_f7f8); // LDRSH Wt
        assert_eq!(load(1, true, true, value), 0xffff_ffff_ffff_f7f8); // LDRSH Xt
        assert_eq!(load(1, true, true, 0x17fff), 0x7fff);
        assert_eq!(load(2, false, false, value), 0xf5f6_f7f8); // LDR Wt
        assert_eq!(load(2, true, true, value), 0xffff_ffff_f5f6_f7f8); // LDRSW
        assert_eq!(load(2, true, true, 0x7fff_ffff), 0x7fff_ffff);
        assert_eq!(load(3, false, true, value), value); // LDR Xt
        assert_eq!(load(3, true, true, value), value);
    }

    #[test]
    fn the_byte_order_is_that_of_the_level() {
        let esr = syndrome(1, 0, true, false, false);
        let stored = |pstate, sctlr_el1| {
            let context = Context { pstate, sctlr_el1, x: [0x1234; 31], ..Context::default() };
            MmioAccess::decode(esr, &context).unwrap().stored(&context)
        };
        let e0e = 1 << 24;
        assert_eq!([stored(0, e0e), stored(5, e0e), stored(0, EE), stored(5, EE)], [0x3412, 0x1234, 0x1234, 0x3412]);
    }

    proptest! {
        /// A load leaves in the register what the same load from a memory that holds the value would, and nothing else
        /// changes.
        #[test]
        fn loads_change_their_register_only(
            log2_bytes in 0_u64..4,
            number in 0_u64..32,
            (sign_extend, wide, big_endian) in any::<(bool, bool, bool)>(),
            value: u64,
        ) {
            let before = at_el1(big_endian);
            let mut after = before;
            let access = MmioAccess::decode(syndrome(log2_bytes, number, false, sign_extend, wide), &before).unwrap();
            access.load(&mut after, value);

            let mut memory = value.to_le_bytes()[..1 << log2_bytes].to_vec();
            if !big_endian {
                memory.reverse();
            }
            // Most significant byte first.
            let fill = if sign_extend && memory[0] & 0x80 != 0 { 0xff } else { 0 };
            let mut expected = vec![fill; 8 - memory.len()];
            expected.extend(memory);
            if !wide {
                expected[..4].fill(0);
            }
            let mut model = before;
            if let Some(register) = model.x.get_mut(number as usize) {
                *register = u64::from_be_bytes(expected.try_into().unwrap());
            }
            prop_assert_eq!(after, model);
        }

        /// What another bit of a register than those stored is does not show.
        #[test]
        fn stores_show_the_width_of_the_access_only(
            log2_bytes in 0_u64..3,
            number in 0_u64..31,
            big_endian: bool,
            others: u64,
        ) {
            let context = at_el1(big_endian);
            let access = MmioAccess::decode(syndrome(log2_bytes, number, true, false, false), &context).unwrap();
            let kept = (1_u64 << (8 << log2_bytes)) - 1;
            let mut other = context;
            for (index, register) in other.x.iter_mut().enumerate() {
                *register = if index == number as usize { *register & kept | others & !kept } else { others };
            }
            prop_assert_eq!(access.stored(&context), access.stored(&other));
            prop_assert_eq!(access.stored(&context) & !kept, 0);
        }
    }
}
