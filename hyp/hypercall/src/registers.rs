//! Registers of a call as the SMC Calling Convention sees them.

/// Registers x0 to x17 of whoever made the call, in and out.
pub type Registers = [u64; 18];

/// What bit 30 of a function identifier says.
const CONVENTION_64: u32 = 1 << 30;

/// Returns the W register to this X register.
pub(crate) const fn low_half(x: u64) -> u32 {
    let [a, b, c, d, ..] = x.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Returns x0 to x3 as a call has them: a 32-bit call passes W registers, whatever is in the upper halves. `None` if x0 holds
/// more than a function identifier.
pub(crate) fn call_registers(registers: &Registers) -> Option<[u64; 4]> {
    let &[x0, x1, x2, x3, ..] = registers;
    let function = u32::try_from(x0).ok()?;
    let mask = if function & CONVENTION_64 == 0 { u32::MAX.into() } else { u64::MAX };
    Some([x0, x1 & mask, x2 & mask, x3 & mask])
}

/// Overwrites the first registers with results.
pub(crate) fn set_results<const N: usize>(registers: &mut Registers, results: [u64; N]) {
    if let Some(first) = registers.first_chunk_mut() {
        *first = results;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_32_bit_call_has_w_registers() {
        let mut registers = [u64::MAX; 18];
        registers[0] = 0x8400_0003;
        assert_eq!(call_registers(&registers), Some([0x8400_0003, 0xffff_ffff, 0xffff_ffff, 0xffff_ffff]));
        registers[0] = 0xc400_0003;
        assert_eq!(call_registers(&registers), Some([0xc400_0003, u64::MAX, u64::MAX, u64::MAX]));
        registers[0] = 0x1_8400_0003;
        assert_eq!(call_registers(&registers), None);
    }
}
