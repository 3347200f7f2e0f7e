//! The CPUs that the host may turn on.

use arrayvec::ArrayVec;
use dtoolkit::{
    Node,
    fdt::{Fdt, FdtNode},
};

use crate::{
    DtbError, Fault,
    cells::{CellCounts, string, take, value},
    memory::child,
};

/// CPUs that Ravelin has room for.
pub const MAX_CPUS: usize = 256;

/// The affinity fields of MPIDR_EL1: Aff3 in bits 39 to 32, Aff2 to Aff0 in bits 23 to 0.
const AFFINITY: u64 = 0xff_00ff_ffff;

/// Yields the CPU nodes that count. Linux leaves out those that have failed; a disabled one is only off, and may be
/// turned on (Devicetree Specification 0.4, section 3.8.1).
fn nodes(fdt: Fdt<'_>) -> impl Iterator<Item = FdtNode<'_>> {
    child(fdt.root(), "cpus").into_iter().flat_map(|cpus| cpus.children()).filter(|node| {
        (node.name_without_address() == "cpu" || value(*node, "device_type") == Some(b"cpu\0"))
            && !value(*node, "status").is_some_and(|status| status.starts_with(b"fail"))
    })
}

/// Returns how many cells an affinity has.
fn cells(fdt: Fdt<'_>) -> Result<u32, DtbError> {
    let cpus = child(fdt.root(), "cpus").ok_or_else(|| Fault::Missing("node cpus").at(["/"]))?;
    Ok(CellCounts::of(cpus, CellCounts::DEFAULT).map_err(|fault| fault.at(["/cpus"]))?.address)
}

/// Yields the affinity of each CPU as MPIDR_EL1 has it, in the order of the device tree. It leaves out what [`count`]
/// refuses.
pub(crate) fn affinities(fdt: Fdt<'_>) -> impl Iterator<Item = u64> {
    let cells = cells(fdt).ok();
    nodes(fdt).filter_map(move |node| affinity(node, cells?).ok())
}

fn affinity(node: FdtNode<'_>, cells: u32) -> Result<u64, Fault> {
    let mut reg = value(node, "reg").ok_or(Fault::Missing("property reg"))?;
    let affinity = take(&mut reg, cells).ok_or(Fault::Malformed("reg"))?;
    if affinity & !AFFINITY != 0 {
        return Err(Fault::Affinity(affinity));
    }
    match string(node, "enable-method")? {
        // A single CPU needs no method.
        None | Some("psci") => Ok(affinity),
        Some(_) => Err(Fault::Unsupported("the CPU is enabled by something other than PSCI")),
    }
}

/// Counts the CPUs and makes sure that each can be told from the others.
///
/// Takes 2 KiB of stack, and is kept out of the frames of its callers for that.
#[inline(never)]
pub(crate) fn count(fdt: Fdt<'_>) -> Result<usize, DtbError> {
    let cells = cells(fdt)?;
    let mut seen = ArrayVec::<u64, MAX_CPUS>::new();
    for node in nodes(fdt) {
        let add = |seen: &mut ArrayVec<_, MAX_CPUS>| {
            let affinity = affinity(node, cells)?;
            if seen.contains(&affinity) {
                return Err(Fault::Affinity(affinity));
            }
            seen.try_push(affinity).map_err(|_| Fault::TooMany { what: "CPUs", limit: MAX_CPUS })
        };
        add(&mut seen).map_err(|fault| fault.at(["/cpus/", node.name()]))?;
    }
    if seen.is_empty() {
        return Err(Fault::Missing("CPU").at(["/cpus"]));
    }
    Ok(seen.len())
}
