//! RAM, and the parts of it that someone has reserved.

use arrayvec::ArrayVec;
use dtoolkit::{
    Node,
    fdt::{Fdt, FdtNode},
};
use ravelin_memory::PhysRange;

use crate::{
    DtbError, Fault,
    cells::{CellCounts, is_available, is_okay, pairs, touched_pages, value, whole_pages},
};

/// Regions of RAM that Ravelin has room for, adjacent ones counted once.
pub const MAX_RAM_REGIONS: usize = 32;

/// Reserved regions that Ravelin has room for.
pub const MAX_RESERVED_REGIONS: usize = 64;

/// Returns the child of `parent` with exactly this name.
pub(crate) fn child<'a>(parent: FdtNode<'a>, name: &str) -> Option<FdtNode<'a>> {
    parent.children().find(|child| child.name() == name)
}

/// Returns whether a child of the root with these properties describes RAM that the host may use. It is the type that
/// counts, as in Linux, not the name; memory of the secure world is marked by its status.
pub(crate) fn is_memory(device_type: Option<&[u8]>, status: Option<&[u8]>) -> bool {
    device_type == Some(b"memory\0") && is_okay(status)
}

/// Returns the regions of RAM in order, adjacent ones merged.
pub(crate) fn ram(fdt: Fdt<'_>) -> Result<ArrayVec<PhysRange, MAX_RAM_REGIONS>, DtbError> {
    let root = fdt.root();
    let cells = CellCounts::of(root, CellCounts::DEFAULT).map_err(|fault| fault.at(["/"]))?;
    let mut regions = ArrayVec::new();
    for node in root.children() {
        if !is_memory(value(node, "device_type"), value(node, "status")) {
            continue;
        }
        let add = |regions: &mut ArrayVec<PhysRange, MAX_RAM_REGIONS>| {
            // The host's device tree has other edits there, which would leave the carve-out in it.
            if matches!(node.name(), "chosen" | "reserved-memory") {
                return Err(Fault::Malformed("device_type"));
            }
            let reg = value(node, "reg").filter(|reg| !reg.is_empty()).ok_or(Fault::Missing("property reg"))?;
            for entry in pairs(reg, cells) {
                let (base, size) = entry?;
                insert(regions, whole_pages(base, size)?)?;
            }
            Ok(())
        };
        add(&mut regions).map_err(|fault: Fault| fault.at(["/", node.name()]))?;
    }
    if regions.is_empty() {
        return Err(Fault::Missing("node of device_type memory").at(["/"]));
    }
    Ok(regions)
}

/// Puts a region where it belongs, merged with neighbours that it touches.
fn insert(regions: &mut ArrayVec<PhysRange, MAX_RAM_REGIONS>, new: PhysRange) -> Result<(), Fault> {
    if let Some(other) = regions.iter().find(|other| other.overlaps(&new)) {
        return Err(Fault::Overlap { range: new, what: "other RAM", other: *other });
    }
    let mut new = new;
    regions.retain(|other| {
        let adjacent = other.end() == new.base().raw() || new.end() == other.base().raw();
        let (first, last) = if other.base() < new.base() { (*other, new) } else { (new, *other) };
        match PhysRange::from_bounds(first.base().raw(), last.end()) {
            Ok(merged) if adjacent => {
                new = merged;
                false
            }
            _ => true,
        }
    });
    let index = regions.partition_point(|other| other.base() < new.base());
    regions.try_insert(index, new).map_err(|_| Fault::TooMany { what: "regions of RAM", limit: MAX_RAM_REGIONS })
}

/// Returns the regions that the reservation block and `/reserved-memory` keep from general use, widened to whole pages,
/// in no order; they may overlap each other and need not be RAM.
pub(crate) fn reserved(fdt: Fdt<'_>) -> Result<ArrayVec<PhysRange, MAX_RESERVED_REGIONS>, DtbError> {
    let mut regions = ArrayVec::new();
    let add = |regions: &mut ArrayVec<PhysRange, MAX_RESERVED_REGIONS>, base, size| {
        regions
            .try_push(touched_pages(base, size)?)
            .map_err(|_| Fault::TooMany { what: "reserved regions", limit: MAX_RESERVED_REGIONS })
    };
    for entry in fdt.memory_reservations() {
        add(&mut regions, entry.address(), entry.size()).map_err(|fault| fault.at(["/memreserve/"]))?;
    }
    let root = fdt.root();
    let Some(parent) = child(root, "reserved-memory") else { return Ok(regions) };
    let counts = |node| CellCounts::of(node, CellCounts::DEFAULT).map_err(|fault| fault.at(["/reserved-memory"]));
    let cells = counts(parent)?;
    if counts(root)? != cells {
        // Linux would ignore all of it, ours included.
        return Err(
            Fault::Malformed("#address-cells or #size-cells (they differ from the root's)").at(["/reserved-memory"])
        );
    }
    for node in parent.children().filter(|child| is_available(*child)) {
        let add_all = |regions: &mut _| {
            // A region without an address is placed by the host.
            for entry in value(node, "reg").into_iter().flat_map(|reg| pairs(reg, cells)) {
                let (base, size) = entry?;
                add(regions, base, size)?;
            }
            Ok(())
        };
        add_all(&mut regions).map_err(|fault: Fault| fault.at(["/reserved-memory/", node.name()]))?;
    }
    Ok(regions)
}
