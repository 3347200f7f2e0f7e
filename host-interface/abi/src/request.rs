//! From registers to typed requests.

use crate::{
    ADDRESS_END, MAX_VCPUS, PAGE_SIZE, Status, VmAttributes, VmCall,
    calls::{Argument, Kind, MAX_ARGUMENTS, Rule},
    vm_calls::VCPU_RUN,
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
    /// Runs a vCPU.
    Run {
        /// Handle of its VM.
        handle: u64,
        /// Its index.
        index: u64,
    },
    /// Does something else with VMs.
    Vm(VmCall),
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
pub(crate) struct Parsed<'a> {
    values: &'a [u64; MAX_ARGUMENTS],
    pages: u64,
}

impl HostCall {
    /// Returns the handle and the index of what a host with guests calls most, VCPU_RUN, as [`HostCall::parse`] does, without the
    /// table. `None` if it is another call, or a wrong one.
    #[inline]
    #[must_use]
    pub fn parse_run(function: u64, arguments: &[u64; MAX_ARGUMENTS]) -> Option<(u64, u64)> {
        match *arguments {
            [handle, index @ 0..MAX_VCPUS, ..] if function == VCPU_RUN.into() => Some((handle, index)),
            _ => None,
        }
    }

    /// Makes the request that the value of x0 and those of x1 to x6 stand for.
    ///
    /// # Errors
    ///
    /// [`Status::NotSupported`] if `function` is no call of the table; any bit that is set beyond the numbers there, such as
    /// reserved ones, the hint in bit 16 and all of the upper half, makes it none. Otherwise what [`Kind`] says for each
    /// argument, in its order.
    pub fn parse(function: u64, arguments: &[u64; MAX_ARGUMENTS]) -> Result<Self, Status> {
        let function = u32::try_from(function).map_err(|_| Status::NotSupported)?;
        let rule = Rule::find(function).ok_or(Status::NotSupported)?;
        Ok((rule.request)(&Parsed::check(rule.arguments, arguments)?))
    }
}

impl<'a> Parsed<'a> {
    /// Checks all arguments in one pass: most calls are right.
    fn check(arguments: &[Argument], values: &'a [u64; MAX_ARGUMENTS]) -> Result<Self, Status> {
        let mut wrong = Wrong::default();
        let (mut highest_page, mut pages, mut most_pages) = (0, 1, 1);
        for (argument, &value) in arguments.iter().zip(values) {
            let mut address = |align: u64| {
                wrong.unaligned |= value & align.wrapping_sub(1) != 0;
                // Aligned to less than a page, it is in one.
                highest_page = value.max(highest_page) & !PAGE_SIZE.wrapping_sub(1);
            };
            match argument.kind {
                Kind::Zero => wrong.reserved |= value != 0,
                Kind::PageAddress => address(PAGE_SIZE),
                Kind::GuestAddress { align } => address(align),
                Kind::PageCount { max } => {
                    (pages, most_pages) = (value, max);
                    wrong.invalid |= value == 0;
                    // Of the addresses up to here; one that follows is that of a page.
                    wrong.overflow |= overflows(highest_page, value);
                }
                Kind::Number { first, last } => wrong.invalid |= !(first..=last).contains(&value),
                Kind::Handle => {}
                Kind::Attributes => {
                    wrong.reserved |= value & !VmAttributes::BITS != 0;
                    wrong.invalid |= VmAttributes::from_bits(value).is_none();
                }
            }
        }
        wrong.overflow |= overflows(highest_page, 1);
        wrong.too_large = pages > most_pages;
        wrong.status().map_or(Ok(Self { values, pages }), Err)
    }

    /// Returns argument `index`.
    pub(crate) fn value(&self, index: usize) -> u64 {
        self.values.get(index).copied().unwrap_or(0)
    }

    /// Returns the range that starts at the address in argument `index`.
    pub(crate) fn range(&self, index: usize) -> Pages {
        Pages { base: self.value(index), pages: self.pages }
    }

    /// Returns the attributes in argument `index`.
    pub(crate) fn attributes(&self, index: usize) -> VmAttributes {
        VmAttributes::from_bits(self.value(index)).unwrap_or(VmAttributes::LEAST)
    }
}

/// Returns whether so many pages from `base` on reach beyond the last address.
fn overflows(base: u64, pages: u64) -> bool {
    let end = pages.checked_mul(PAGE_SIZE).and_then(|size| base.checked_add(size));
    end.is_none_or(|end| end > ADDRESS_END)
}

/// What is wrong with the arguments of a call, in the order in which it is told.
#[derive(Default)]
struct Wrong {
    reserved: bool,
    unaligned: bool,
    invalid: bool,
    overflow: bool,
    too_large: bool,
}

impl Wrong {
    fn status(&self) -> Option<Status> {
        Some(match *self {
            Self { reserved: true, .. } => Status::Reserved,
            Self { unaligned: true, .. } => Status::Unaligned,
            Self { invalid: true, .. } => Status::Invalid,
            Self { overflow: true, .. } => Status::Overflow,
            Self { too_large: true, .. } => Status::TooLarge,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CALLS, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES, VmKind};

    /// What is no argument is no zero either.
    fn parse<const N: usize>(function: u64, arguments: [u64; N]) -> Result<HostCall, Status> {
        let mut values = [u64::MAX; MAX_ARGUMENTS];
        values[..N].copy_from_slice(&arguments);
        HostCall::parse(function, &values)
    }

    const SHARE: u64 = 0xc600_1001;
    const TAKE_BACK: u64 = 0xc600_1004;

    #[test]
    fn the_call_without_the_table_is_that_of_the_table() {
        for arguments in [[7, 0, 1, 2, 3, 4], [u64::MAX, MAX_VCPUS - 1, 0, 0, 0, 0], [7, MAX_VCPUS, 0, 0, 0, 0]] {
            let by_table = match HostCall::parse(VCPU_RUN.into(), &arguments) {
                Ok(HostCall::Run { handle, index }) => Some((handle, index)),
                refused => {
                    assert_eq!(refused, Err(Status::Invalid));
                    None
                }
            };
            assert_eq!(HostCall::parse_run(VCPU_RUN.into(), &arguments), by_table);
        }
        for function in [SHARE, u64::from(VCPU_RUN) | 1 << 32] {
            assert_eq!(HostCall::parse_run(function, &[7, 0, 0, 0, 0, 0]), None);
        }
    }

    #[test]
    fn every_call_of_the_table_is_a_different_request() {
        let requests: Vec<_> = CALLS
            .iter()
            .map(|call| {
                let arguments = call.arguments.iter().map(|argument| match argument.kind {
                    Kind::PageAddress => 0x4000_0000,
                    Kind::PageCount { .. } => 1,
                    Kind::GuestAddress { .. } => 0x8000_0000,
                    Kind::Zero | Kind::Handle => 0,
                    Kind::Number { first, .. } => first,
                    Kind::Attributes => VmAttributes::LEAST.bits(),
                });
                let mut values = [u64::MAX; MAX_ARGUMENTS];
                values.iter_mut().zip(arguments).for_each(|(value, argument)| *value = argument);
                HostCall::parse(call.number.into(), &values).unwrap()
            })
            .collect();
        for (index, request) in requests.iter().enumerate() {
            assert!(!requests[..index].contains(request), "{request:?}");
        }
        assert_eq!(requests[3], HostCall::Share(Pages { base: 0x4000_0000, pages: 1 }));
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn only_exact_numbers_are_calls() {
        for call in CALLS {
            let number = u64::from(call.number);
            for bit in 0..64 {
                let other = number ^ (1 << bit);
                if !CALLS.iter().any(|call| u64::from(call.number) == other) {
                    assert_eq!(HostCall::parse(other, &[0; 6]), Err(Status::NotSupported), "{other:#x}");
                }
            }
        }
    }

    #[test]
    fn a_count_is_of_the_addresses_before_it() {
        const VCPU_CREATE: u64 = 0xc600_1012;
        let create = |metadata, pages, run_page| parse(VCPU_CREATE, [0, 0, metadata, pages, run_page]);
        let last = ADDRESS_END - PAGE_SIZE;
        assert!(create(0x4000_0000, 3, last).is_ok());
        assert_eq!(create(last, 3, 0x4000_0000), Err(Status::Overflow));
        assert_eq!(create(0x4000_0000, 3, ADDRESS_END), Err(Status::Overflow));
    }

    #[test]
    fn errors_come_in_their_order() {
        let share = |base, pages, flags| parse(SHARE, [base, pages, flags]);
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
        assert_eq!(parse(TAKE_BACK, [0, MAX_TAKE_BACK_PAGES + 1, 0]), Err(Status::TooLarge));
        assert!(parse(TAKE_BACK, [0, MAX_TAKE_BACK_PAGES, 0]).is_ok());
        assert_eq!(parse(0xc600_1000, [1, 0, 0]), Err(Status::Invalid));
        assert_eq!(parse(0xc600_1007, [0x1000, 1, 0]), Err(Status::Reserved));
        assert_eq!(parse(0xc600_1007, [0x1001, 0, 0]), Err(Status::Unaligned));
        assert_eq!(parse(0xc600_1008, [1 << 48, 0, 0]), Err(Status::Overflow));
    }

    #[test]
    fn registers_that_are_no_arguments_do_not_matter() {
        assert_eq!(parse(0xc600_1007, [0x1000, 0, 77]), Ok(HostCall::PageState { page: 0x1000 }));
        assert_eq!(parse(0x8600_ff01, [1, 2, 3]), Ok(HostCall::Uid));
    }

    fn vm(name: &str) -> u64 {
        CALLS.iter().find(|call| call.name == name).unwrap().number.into()
    }

    #[test]
    fn both_ranges_of_a_call_are_checked() {
        let map = |at, base, pages| parse(vm("VM_MAP"), [7, at, base, pages]);
        let end = ADDRESS_END;
        assert_eq!(map(1, 0, 0), Err(Status::Unaligned));
        assert_eq!(map(0, 1, 0), Err(Status::Unaligned));
        assert_eq!(map(end, end, 0), Err(Status::Invalid));
        assert_eq!(map(end - PAGE_SIZE, 0, 2), Err(Status::Overflow));
        assert_eq!(map(0, end - PAGE_SIZE, 2), Err(Status::Overflow));
        assert_eq!(map(!0xfff, 0, 1), Err(Status::Overflow));
        assert_eq!(map(0, 0, MAX_RANGE_PAGES + 1), Err(Status::TooLarge));
        let call = VmCall::Map { handle: 7, at: end - PAGE_SIZE, range: Pages { base: 0x1000, pages: 1 } };
        assert_eq!(map(end - PAGE_SIZE, 0x1000, 1), Ok(HostCall::Vm(call)));
    }

    #[test]
    fn numbers_have_limits() {
        let create = |index, run_page| parse(vm("VCPU_CREATE"), [7, index, 0x1000, 2, run_page]);
        assert_eq!(create(128, 0), Err(Status::Invalid));
        assert_eq!(create(127, 0x10), Err(Status::Unaligned));
        assert_eq!(create(127, ADDRESS_END), Err(Status::Overflow));
        let metadata = Pages { base: 0x1000, pages: 2 };
        let call = VmCall::CreateVcpu { handle: 7, index: 127, metadata, run_page: 0x5000 };
        assert_eq!(create(127, 0x5000), Ok(HostCall::Vm(call)));

        let spi = |intid, level| parse(vm("SPI"), [7, intid, level]);
        assert_eq!([spi(31, 0), spi(1020, 0), spi(32, 2)], [Err(Status::Invalid); 3]);
        assert_eq!(spi(1019, 1), Ok(HostCall::Vm(VmCall::Spi { handle: 7, intid: 1019, level: true })));
    }

    #[test]
    fn guest_addresses_are_aligned_to_what_they_are_for() {
        let seal = |entry, device_tree| parse(vm("VM_SEAL"), [7, entry, device_tree, 0x800_0000, 0x80b_0000]);
        assert_eq!(seal(0x1002, 0), Err(Status::Unaligned));
        assert_eq!(seal(0x1004, 0x1004), Err(Status::Unaligned));
        assert_eq!(seal(ADDRESS_END, 0), Err(Status::Overflow));
        assert_eq!(seal(u64::MAX - 3, 0), Err(Status::Overflow));
        assert_eq!(
            seal(ADDRESS_END - 4, 8),
            Ok(HostCall::Vm(VmCall::Seal {
                handle: 7,
                entry: ADDRESS_END - 4,
                device_tree: 8,
                distributor: 0x800_0000,
                redistributors: 0x80b_0000,
            }))
        );
    }

    #[test]
    fn attributes_are_checked() {
        let sizes = |bits| parse(vm("VM_SIZES"), [bits]);
        assert_eq!(sizes(1 << 32), Err(Status::Reserved));
        assert_eq!(sizes(3), Err(Status::Invalid));
        let attributes = VmAttributes { kind: VmKind::Realm, ipa_bits: 40, vcpus: 128 };
        assert_eq!(sizes(attributes.bits()), Ok(HostCall::Vm(VmCall::Sizes { attributes })));
    }
}
