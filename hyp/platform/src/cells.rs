//! Properties made of 32-bit big-endian cells.

use dtoolkit::{Node, Property, fdt::FdtNode};
use ravelin_memory::{PAGE_SIZE, PhysRange, RangeError};

use crate::Fault;

/// Returns the value of a property.
pub(crate) fn value<'a>(node: FdtNode<'a>, name: &str) -> Option<&'a [u8]> {
    node.property(name)?.value_as().ok()
}

/// Returns a property that is one cell.
pub(crate) fn cell(node: FdtNode<'_>, name: &'static str) -> Result<Option<u32>, Fault> {
    value(node, name)
        .map(|value| value.try_into().map(u32::from_be_bytes).map_err(|_| Fault::Malformed(name)))
        .transpose()
}

/// Returns the string that a property's value is. What follows a first NUL is not looked at.
pub(crate) fn as_string(value: &[u8]) -> Option<&str> {
    core::ffi::CStr::from_bytes_until_nul(value).ok()?.to_str().ok()
}

/// Returns a property that is one string.
pub(crate) fn string<'a>(node: FdtNode<'a>, name: &'static str) -> Result<Option<&'a str>, Fault> {
    value(node, name).map(|value| as_string(value).ok_or(Fault::Malformed(name))).transpose()
}

/// Returns whether a list of strings has `name` in it.
pub(crate) fn lists(list: &[u8], name: &str) -> bool {
    list.split(|byte| *byte == 0).any(|entry| entry == name.as_bytes())
}

/// Returns whether `compatible` of the node has one of `names`.
pub(crate) fn is_compatible(node: FdtNode<'_>, names: &[&str]) -> bool {
    value(node, "compatible").is_some_and(|list| names.iter().any(|name| lists(list, name)))
}

/// Returns whether `status`, if there is one, says that a node may be used.
pub(crate) fn is_okay(status: Option<&[u8]>) -> bool {
    matches!(status, None | Some(b"okay\0" | b"ok\0"))
}

/// Returns whether a node may be used.
pub(crate) fn is_available(node: FdtNode<'_>) -> bool {
    is_okay(value(node, "status"))
}

/// How many cells an address and a size have in the children of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CellCounts {
    pub(crate) address: u32,
    pub(crate) size: u32,
}

impl CellCounts {
    /// What holds where a node does not say (Devicetree Specification 0.4, section 2.3.5).
    pub(crate) const DEFAULT: Self = Self { address: 2, size: 1 };

    /// Reads the counts that `node` gives for its children, `otherwise` where it says nothing.
    pub(crate) fn of(node: FdtNode<'_>, otherwise: Self) -> Result<Self, Fault> {
        let address = cell(node, "#address-cells")?.unwrap_or(otherwise.address);
        let size = cell(node, "#size-cells")?.unwrap_or(otherwise.size);
        if !(1..=2).contains(&address) {
            return Err(Fault::Malformed("#address-cells"));
        }
        if size > 2 {
            return Err(Fault::Malformed("#size-cells"));
        }
        Ok(Self { address, size })
    }
}

/// Takes a number of `cells` cells, at most two, from the front of `value`.
pub(crate) fn take(value: &mut &[u8], cells: u32) -> Option<u64> {
    let mut number = 0;
    for _ in 0..cells {
        let (cell, rest) = value.split_first_chunk()?;
        number = number << 32 | u64::from(u32::from_be_bytes(*cell));
        *value = rest;
    }
    Some(number)
}

/// Yields the pairs of an address and a size that `value`, a `reg` property, is made of; an error where the last one
/// is not complete.
pub(crate) fn pairs(mut value: &[u8], cells: CellCounts) -> impl Iterator<Item = Result<(u64, u64), Fault>> {
    core::iter::from_fn(move || {
        if value.is_empty() {
            return None;
        }
        let mut pair = || Some((take(&mut value, cells.address)?, take(&mut value, cells.size)?));
        let pair = pair();
        if pair.is_none() {
            value = &[];
        }
        Some(pair.ok_or(Fault::Malformed("reg")))
    })
}

/// Returns the pages of a region that has to be made of whole pages.
pub(crate) fn whole_pages(base: u64, size: u64) -> Result<PhysRange, Fault> {
    let problem = match base.checked_add(size).map(|end| PhysRange::from_bounds(base, end)) {
        Some(Ok(range)) => return Ok(range),
        _ if size == 0 => "empty",
        Some(Err(RangeError::Unaligned)) => "not aligned to 4 KiB pages",
        _ => "beyond 48-bit addresses",
    };
    Err(Fault::Region { base, size, problem })
}

/// Returns the pages that a region lies in, whole or in part.
pub(crate) fn touched_pages(base: u64, size: u64) -> Result<PhysRange, Fault> {
    let first = base & !(PAGE_SIZE.wrapping_sub(1));
    if size == 0 {
        return Err(Fault::Region { base, size, problem: "empty" });
    }
    base.checked_add(size)
        .and_then(|end| end.checked_next_multiple_of(PAGE_SIZE))
        .and_then(|end| PhysRange::from_bounds(first, end).ok())
        .ok_or(Fault::Region { base, size, problem: "beyond 48-bit addresses" })
}
