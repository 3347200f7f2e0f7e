//! What is wrong with the arguments of a call, by the table of calls alone.

use ravelin_abi::{ADDRESS_END, CALLS, Call, Kind, Status, VmAttributes};

use crate::PAGE_SIZE;

/// Bits of a register with attributes that have a meaning: kind, bits of an address, number of vCPUs.
const ATTRIBUTE_BITS: u64 = 0xffff_ffff;

/// Returns the call that `function` is the number of, if it is one.
pub(crate) fn find(function: u64) -> Option<&'static Call> {
    CALLS.iter().find(|call| u64::from(call.number) == function)
}

/// Whether an argument is wrong: its position, its kind and its value.
type IsWrong<'a> = &'a dyn Fn(usize, Kind, u64) -> bool;

/// Returns what is wrong with the arguments in x1 to x6, if anything is: all of them are looked at for one error before any is
/// for the next.
pub(crate) fn check(call: &Call, x: [u64; 6]) -> Result<(), Status> {
    let arguments = || call.arguments.iter().map(|argument| argument.kind).zip(x);
    // How many pages begin at each address: those before a count as many as that says.
    let count_at = arguments().position(|(kind, _)| matches!(kind, Kind::PageCount { .. }));
    let pages = |index: usize| match count_at {
        Some(at) if index < at => x[at],
        _ => 1,
    };
    let checks: [(Status, IsWrong<'_>); 5] = [
        (Status::Reserved, &|_, kind, value| match kind {
            Kind::Zero => value != 0,
            Kind::Attributes => value & !ATTRIBUTE_BITS != 0,
            _ => false,
        }),
        (Status::Unaligned, &|_, kind, value| match kind {
            Kind::PageAddress => value % PAGE_SIZE != 0,
            Kind::GuestAddress { align } => value % align != 0,
            _ => false,
        }),
        (Status::Invalid, &|_, kind, value| match kind {
            Kind::PageCount { .. } => value == 0,
            Kind::Number { first, last } => !(first..=last).contains(&value),
            Kind::Attributes => VmAttributes::from_bits(value).is_none(),
            _ => false,
        }),
        (Status::Overflow, &|index, kind, value| match kind {
            Kind::PageAddress | Kind::GuestAddress { .. } => {
                u128::from(value / PAGE_SIZE) + u128::from(pages(index)) > u128::from(ADDRESS_END / PAGE_SIZE)
            }
            _ => false,
        }),
        (Status::TooLarge, &|_, kind, value| matches!(kind, Kind::PageCount { max } if value > max)),
    ];
    for (status, is_wrong) in checks {
        if (0..).zip(arguments()).any(|(index, (kind, value))| is_wrong(index, kind, value)) {
            return Err(status);
        }
    }
    Ok(())
}
