//! The table of calls.

use crate::{
    request::{HostCall, Parsed},
    vm_calls::VM_CALLS,
};

/// A host hypercall.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Function identifier, the value of x0.
    pub number: u32,
    /// Name, in upper case, as the C header has it behind its prefix.
    pub name: &'static str,
    /// What the call does.
    pub doc: &'static str,
    /// Arguments in x1 to x6, in this order.
    pub arguments: &'static [Argument],
    /// What x0, x1, x2 and x3 hold afterwards, in this order. Registers without a result keep their values. After a failure,
    /// x1 is the address of the first page that failed, or 0, and x2 and x3 keep their values; after NEEDS_TABLES, x1 is the
    /// number of pages that are missing.
    pub results: &'static [&'static str],
    /// Makes the request from checked arguments.
    pub(crate) request: fn(&Parsed<'_>) -> HostCall,
}

/// An argument of a call.
#[derive(Debug)]
pub struct Argument {
    /// Name.
    pub name: &'static str,
    /// What values it takes.
    pub kind: Kind,
}

/// What values an argument takes, and so how it is checked.
///
/// All arguments are checked for one error before any is checked for the next one: RESERVED, UNALIGNED, INVALID, OVERFLOW,
/// TOO_LARGE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Zero, kept for later: else RESERVED.
    Zero,
    /// Physical address of a page: else UNALIGNED, or OVERFLOW if it has more than 48 bits.
    PageAddress,
    /// An address that a guest calls physical: UNALIGNED if it is no multiple of `align`, a power of two, OVERFLOW if it has
    /// more than 48 bits.
    GuestAddress {
        /// What it is a multiple of.
        align: u64,
    },
    /// Number of pages of the range that starts at the address before it, or at each of the two before it: INVALID if zero,
    /// OVERFLOW if the range reaches beyond 48 bits, TOO_LARGE if there are more than `max`.
    PageCount {
        /// The largest number.
        max: u64,
    },
    /// A number from `first` to `last`: else INVALID.
    Number {
        /// The lowest value.
        first: u64,
        /// The highest value.
        last: u64,
    },
    /// Handle of a VM: BAD_HANDLE, after all of these checks, if there is none of that handle.
    Handle,
    /// What kind of VM, packed as [`VmAttributes`](crate::VmAttributes) says: RESERVED if a bit without a meaning is set,
    /// INVALID if a field has a value without one.
    Attributes,
}

/// The most arguments that a call has.
pub const MAX_ARGUMENTS: usize = 6;

/// The most pages that a range may have.
pub const MAX_RANGE_PAGES: u64 = 1 << 18;

/// The most pages that a range to take back may have. They are zeroed with interrupts masked, which bounds the number.
pub const MAX_TAKE_BACK_PAGES: u64 = 512;

/// The call of which counter 0 counts the uses; see [`counter_index`].
const FIRST_COUNTED: u32 = 0xc600_1000;

/// How many calls have a counter.
pub const CALL_COUNTERS: usize = 32;

/// Returns which of the [`CALL_COUNTERS`] counters belongs to a call, if one does. It is also the call's bit in the bitmap
/// of FEATURES.
#[must_use]
pub fn counter_index(number: u32) -> Option<usize> {
    let index = usize::try_from(number.checked_sub(FIRST_COUNTED)?).ok()?;
    (index < CALL_COUNTERS).then_some(index)
}

/// The calls that have a counter as the bitmap that FEATURES returns.
pub const CALL_BITMAP: u64 = {
    let (mut bitmap, mut calls) = (0, CALLS);
    while let [call, rest @ ..] = calls {
        if let Some(bit) = call.number.checked_sub(FIRST_COUNTED) {
            bitmap |= 1 << bit;
        }
        calls = rest;
    }
    bitmap
};

const fn range(max: u64) -> [Argument; 3] {
    [
        Argument { name: "address", kind: Kind::PageAddress },
        Argument { name: "pages", kind: Kind::PageCount { max } },
        Argument { name: "flags", kind: Kind::Zero },
    ]
}

const RANGE: &[Argument] = &range(MAX_RANGE_PAGES);
const TAKE_BACK_RANGE: &[Argument] = &range(MAX_TAKE_BACK_PAGES);
const ONE_PAGE: &[Argument] =
    &[Argument { name: "address", kind: Kind::PageAddress }, Argument { name: "reserved", kind: Kind::Zero }];

pub(crate) const STATUS: &str = "status";
pub(crate) const FIRST_FAILED: &str = "0, or after a failure the address of the first page that failed";

/// The host hypercalls, by number.
pub const CALLS: &[Call] = &TABLE;

static TABLE: [Call; HOST_CALLS.len() + VM_CALLS.len()] = {
    let [first, ..] = HOST_CALLS else { unreachable!() };
    let mut table = [*first; _];
    let (host, vm) = table.split_at_mut(HOST_CALLS.len());
    host.copy_from_slice(HOST_CALLS);
    vm.copy_from_slice(VM_CALLS);
    table
};

/// Those about the hypervisor itself and the host's own memory.
const HOST_CALLS: &[Call] = &[
    Call {
        number: 0x8600_ff01,
        name: "UID",
        doc: "Identifies the hypervisor. Any other vendor's UID, or NOT_SUPPORTED in w0, says that it is not Ravelin.",
        arguments: &[],
        results: &["UID, bytes 0-3", "UID, bytes 4-7", "UID, bytes 8-11", "UID, bytes 12-15"],
        request: |_| HostCall::Uid,
    },
    Call {
        number: 0x8600_ff03,
        name: "REVISION",
        doc: "Returns the version of this interface.",
        arguments: &[],
        results: &["major version", "minor version"],
        request: |_| HostCall::Revision,
    },
    Call {
        number: 0xc600_1000,
        name: "FEATURES",
        doc: "Says what the hypervisor offers.",
        arguments: &[Argument { name: "index", kind: Kind::Number { first: 0, last: 0 } }],
        results: &[
            STATUS,
            "bitmap of the calls that are offered: bit n for 0xc6001000 + n",
            "the most pages of a range",
            "the most pages of a range to take back",
        ],
        request: |_| HostCall::Features,
    },
    Call {
        number: 0xc600_1001,
        name: "SHARE",
        doc: "Lends pages that the host owns to the hypervisor. Contents are kept.",
        arguments: RANGE,
        results: &[STATUS, FIRST_FAILED],
        request: |parsed| HostCall::Share(parsed.range(0)),
    },
    Call {
        number: 0xc600_1002,
        name: "UNSHARE",
        doc: "Ends the loan of pages, none of which may be pinned. Contents are kept.",
        arguments: RANGE,
        results: &[STATUS, FIRST_FAILED],
        request: |parsed| HostCall::Unshare(parsed.range(0)),
    },
    Call {
        number: 0xc600_1003,
        name: "DONATE",
        doc: "Gives pages that the host owns to the hypervisor. Contents are kept; the host loses access.",
        arguments: RANGE,
        results: &[STATUS, FIRST_FAILED],
        request: |parsed| HostCall::Donate(parsed.range(0)),
    },
    Call {
        number: 0xc600_1004,
        name: "TAKE_BACK",
        doc: "Returns donated pages to the host, zeroed.",
        arguments: TAKE_BACK_RANGE,
        results: &[STATUS, FIRST_FAILED],
        request: |parsed| HostCall::TakeBack(parsed.range(0)),
    },
    Call {
        number: 0xc600_1005,
        name: "PIN",
        doc: "Keeps lent pages from being unshared, and maps them in the hypervisor. Pins of a page add up.",
        arguments: RANGE,
        results: &[STATUS, FIRST_FAILED],
        request: |parsed| HostCall::Pin(parsed.range(0)),
    },
    Call {
        number: 0xc600_1006,
        name: "UNPIN",
        doc: "Takes back one pin of each page.",
        arguments: RANGE,
        results: &[STATUS, FIRST_FAILED],
        request: |parsed| HostCall::Unpin(parsed.range(0)),
    },
    Call {
        number: 0xc600_1007,
        name: "PAGE_STATE",
        doc: "Returns the state of a page as the host sees it. Of a page that is not the host's it tells nothing.",
        arguments: ONE_PAGE,
        results: &[STATUS, "state of the page", "pins of the page"],
        request: |parsed| HostCall::PageState { page: parsed.value(0) },
    },
    Call {
        number: 0xc600_1008,
        name: "STATISTICS",
        doc: "Writes the statistics to the start of a page that the host has lent to the hypervisor. The rest of the page \
              keeps its contents.",
        arguments: ONE_PAGE,
        results: &[STATUS, "bytes written"],
        request: |parsed| HostCall::Statistics { page: parsed.value(0) },
    },
];

/// What it takes to make a request of a call. What documents the calls is not needed for it, and so not in the hypervisor.
#[derive(Clone, Copy)]
pub(crate) struct Rule {
    number: u32,
    pub(crate) arguments: &'static [Argument],
    pub(crate) request: fn(&Parsed<'_>) -> HostCall,
}

/// How many places [`RULES`] has.
const PLACES: usize = 64;

/// The rules, each in the place of its number.
static RULES: [Option<Rule>; PLACES] = {
    let mut rules = [None; PLACES];
    let (mut empty, mut place): (&mut [_], u8) = (&mut rules, 0);
    while let [rule, others @ ..] = empty {
        let mut calls = CALLS;
        while let [call, more @ ..] = calls {
            if Rule::place(call.number) == place {
                *rule = Some(Rule::of(call));
            }
            calls = more;
        }
        (empty, place) = (others, place.wrapping_add(1));
    }
    rules
};

impl Rule {
    const fn of(call: &Call) -> Self {
        Self { number: call.number, arguments: call.arguments, request: call.request }
    }

    /// Returns in which place the rule of a number would be: no two calls of 32 or of 64 bits have the same five lowest bits.
    const fn place(number: u32) -> u8 {
        let [low, .., high] = number.to_le_bytes();
        low & 0x1f | (high & 0x40) >> 1
    }

    /// Returns the rule of the call that has this number, if there is one.
    pub(crate) fn find(number: u32) -> Option<&'static Self> {
        let rule = RULES.get(usize::from(Self::place(number)))?.as_ref()?;
        (rule.number == number).then_some(rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;

    #[test]
    fn numbers_ascend_and_are_fast_calls_of_the_vendor_hypervisor() {
        assert!(CALLS.iter().is_sorted_by(|a, b| a.number < b.number));
        for call in CALLS {
            assert_eq!(call.number & 0xbf00_0000, 0x8600_0000, "{}", call.name);
            assert_eq!(call.number & 0x00ff_0000, 0, "{}: must-be-zero bits and hint", call.name);
        }
    }

    #[test]
    fn what_returns_or_takes_64_bits_is_a_64_bit_call() {
        for call in CALLS.iter().filter(|call| !call.arguments.is_empty()) {
            assert_eq!(call.number >> 30, 3, "{}", call.name);
        }
    }

    #[test]
    fn a_page_count_follows_its_addresses() {
        let page = |kind| matches!(kind, Kind::PageAddress | Kind::GuestAddress { align: PAGE_SIZE });
        for call in CALLS {
            assert!(call.arguments.len() <= MAX_ARGUMENTS && call.results.len() <= 4, "{}", call.name);
            let counts = call.arguments.iter().filter(|argument| matches!(argument.kind, Kind::PageCount { .. }));
            assert!(counts.count() <= 1, "{}", call.name);
            for (index, argument) in call.arguments.iter().enumerate() {
                if matches!(argument.kind, Kind::PageCount { .. }) {
                    assert!(page(call.arguments[index - 1].kind), "{}", call.name);
                }
            }
        }
    }

    #[test]
    fn numbers_lead_to_their_calls() {
        for call in CALLS {
            let rule = Rule::find(call.number).unwrap();
            assert_eq!((rule.number, rule.arguments.len()), (call.number, call.arguments.len()), "{}", call.name);
            assert!(std::ptr::fn_addr_eq(rule.request, call.request), "{}", call.name);
        }
    }

    #[test]
    fn every_64_bit_call_has_its_own_counter() {
        let counters: Vec<_> = CALLS.iter().filter_map(|call| counter_index(call.number)).collect();
        assert_eq!(counters.len(), CALLS.len() - 2);
        assert!(counters.is_sorted_by(|a, b| a < b));
        assert_eq!(CALL_BITMAP, counters.iter().fold(0, |bitmap, counter| bitmap | 1 << counter));
        assert_eq!(CALL_BITMAP, 0xffff_c1ff);
        assert_eq!(counter_index(0xc600_0fff), None);
        assert_eq!(counter_index(0xc600_1020), None);
    }
}
