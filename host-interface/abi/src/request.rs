//! From registers to typed requests.

use crate::{
    ADDRESS_END, PAGE_SIZE, Status,
    calls::{Argument, Call, Kind},
};

/// A host hypercall with checked arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostCall {
    /// Who is there?
    Uid,
    /// Which version of the interface?
    Revision,
    /// What is offered?
    Features,
    /// Lends pages to the hypervisor.
    Share(Pages),
    /// Ends a loan.
    Unshare(Pages),
    /// Gives pages to the hypervisor.
    Donate(Pages),
    /// Returns donated pages to the host.
    TakeBack(Pages),
    /// Keeps lent pages from being unshared.
    Pin(Pages),
    /// Takes back a pin of each page.
    Unpin(Pages),
    /// Asks for the state of a page.
    PageState {
        /// Its address: aligned, at most 48 bits.
        page: u64,
    },
    /// Asks for the statistics.
    Statistics {
        /// Address of the page to write: aligned, at most 48 bits.
        page: u64,
    },
}

/// At least one page; the base is aligned, the end not above [`ADDRESS_END`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// Address of the first page.
    pub base: u64,
    /// How many there are.
    pub pages: u64,
}

/// Arguments of a call that passed the checks of their kinds.
pub(crate) struct Parsed {
    pub(crate) range: Pages,
}

impl HostCall {
    /// Makes the request that the value of x0 and those of x1 to x3 stand for.
    ///
    /// # Errors
    ///
    /// [`Status::NotSupported`] if `function` is no call of the table; any bit that is set beyond the numbers there, such as
    /// reserved ones, the hint in bit 16 and all of the upper half, makes it none. Otherwise what [`Kind`] says for each
    /// argument, in its order.
    pub fn parse(function: u64, arguments: [u64; 3]) -> Result<Self, Status> {
        let call = u32::try_from(function).ok().and_then(Call::find).ok_or(Status::NotSupported)?;
        Ok((call.request)(Parsed::check(call.arguments, arguments)?))
    }
}

impl Parsed {
    fn check(arguments: &[Argument], values: [u64; 3]) -> Result<Self, Status> {
        let values = || arguments.iter().map(|argument| argument.kind).zip(values);

        if values().any(|(kind, value)| kind == Kind::Zero && value != 0) {
            return Err(Status::Reserved);
        }
        let base = values().find_map(|(kind, value)| (kind == Kind::PageAddress).then_some(value)).unwrap_or(0);
        if !base.is_multiple_of(PAGE_SIZE) {
            return Err(Status::Unaligned);
        }
        let (pages, max) = values()
            .find_map(|(kind, value)| match kind {
                Kind::PageCount { max } => Some((value, max)),
                _ => None,
            })
            .unwrap_or((1, 1));
        let beyond = |(kind, value)| matches!(kind, Kind::Index { count } if value >= count);
        if pages == 0 || values().any(beyond) {
            return Err(Status::Invalid);
        }
        let end = pages.checked_mul(PAGE_SIZE).and_then(|size| base.checked_add(size)).ok_or(Status::Overflow)?;
        if end > ADDRESS_END {
            return Err(Status::Overflow);
        }
        if pages > max {
            return Err(Status::TooLarge);
        }
        Ok(Self { range: Pages { base, pages } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CALLS, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES};

    const SHARE: u64 = 0xc600_1001;
    const TAKE_BACK: u64 = 0xc600_1004;

    #[test]
    fn every_call_of_the_table_is_a_different_request() {
        let requests: Vec<_> = CALLS
            .iter()
            .map(|call| {
                let arguments = call.arguments.iter().map(|argument| match argument.kind {
                    Kind::PageAddress => 0x4000_0000,
                    Kind::PageCount { .. } => 1,
                    Kind::Zero | Kind::Index { .. } => 0,
                });
                let mut values = [u64::MAX; 3];
                values.iter_mut().zip(arguments).for_each(|(value, argument)| *value = argument);
                HostCall::parse(call.number.into(), values).unwrap()
            })
            .collect();
        for (index, request) in requests.iter().enumerate() {
            assert!(!requests[..index].contains(request), "{request:?}");
        }
        assert_eq!(requests[3], HostCall::Share(Pages { base: 0x4000_0000, pages: 1 }));
    }

    #[test]
    fn only_exact_numbers_are_calls() {
        for call in CALLS {
            let number = u64::from(call.number);
            for bit in 0..64 {
                let other = number ^ (1 << bit);
                if !CALLS.iter().any(|call| u64::from(call.number) == other) {
                    assert_eq!(HostCall::parse(other, [0; 3]), Err(Status::NotSupported), "{other:#x}");
                }
            }
        }
    }

    #[test]
    fn errors_come_in_their_order() {
        let share = |base, pages, flags| HostCall::parse(SHARE, [base, pages, flags]);
        assert_eq!(share(1, 0, 1), Err(Status::Reserved));
        assert_eq!(share(1, 0, 0), Err(Status::Unaligned));
        assert_eq!(share(1 << 48, 0, 0), Err(Status::Invalid));
        assert_eq!(share(1 << 48, 1, 0), Err(Status::Overflow));
        assert_eq!(share(0, u64::MAX, 0), Err(Status::Overflow));
        assert_eq!(share(0, 1 << 52, 0), Err(Status::Overflow));
        assert_eq!(share(!0xfff, 1, 0), Err(Status::Overflow));
        assert_eq!(share(0x1000, 1 << 36, 0), Err(Status::Overflow));
        assert_eq!(share(0, 1 << 36, 0), Err(Status::TooLarge));
        assert_eq!(share(0, MAX_RANGE_PAGES + 1, 0), Err(Status::TooLarge));
        assert_eq!(share(0, MAX_RANGE_PAGES, 0), Ok(HostCall::Share(Pages { base: 0, pages: MAX_RANGE_PAGES })));
        assert!(share((1 << 48) - 0x1000, 1, 0).is_ok());
    }

    #[test]
    fn limits_of_the_other_calls() {
        assert_eq!(HostCall::parse(TAKE_BACK, [0, MAX_TAKE_BACK_PAGES + 1, 0]), Err(Status::TooLarge));
        assert!(HostCall::parse(TAKE_BACK, [0, MAX_TAKE_BACK_PAGES, 0]).is_ok());
        assert_eq!(HostCall::parse(0xc600_1000, [1, 0, 0]), Err(Status::Invalid));
        assert_eq!(HostCall::parse(0xc600_1007, [0x1000, 1, 0]), Err(Status::Reserved));
        assert_eq!(HostCall::parse(0xc600_1007, [0x1001, 0, 0]), Err(Status::Unaligned));
        assert_eq!(HostCall::parse(0xc600_1008, [1 << 48, 0, 0]), Err(Status::Overflow));
    }

    #[test]
    fn registers_that_are_no_arguments_do_not_matter() {
        assert_eq!(HostCall::parse(0xc600_1007, [0x1000, 0, 77]), Ok(HostCall::PageState { page: 0x1000 }));
        assert_eq!(HostCall::parse(0x8600_ff01, [1, 2, 3]), Ok(HostCall::Uid));
    }
}
