//! Nodes together with the way to them, which their addresses and their names in messages depend on.

use arrayvec::ArrayVec;
use dtoolkit::{
    Node,
    fdt::{Fdt, FdtNode},
};
use ravelin_memory::PhysRange;

use crate::{
    DtbError, Fault,
    cells::{CellCounts, is_available, pairs, take, touched_pages, value},
};

/// How deep below the root devices are looked for. The bound keeps the search linear in the size of the device tree
/// and its recursion small.
const MAX_DEPTH: usize = 8;

/// A node and its ancestors, the root first.
pub(crate) struct Path<'a>(ArrayVec<FdtNode<'a>, MAX_DEPTH>);

impl<'a> Path<'a> {
    pub(crate) fn root(fdt: Fdt<'a>) -> Self {
        Self(ArrayVec::from_iter([fdt.root()]))
    }

    /// Follows `path`, which begins with a slash; a component without unit address fits any.
    pub(crate) fn find(fdt: Fdt<'a>, path: &str) -> Option<Self> {
        let mut found = Self::root(fdt);
        for component in path.strip_prefix('/')?.split('/').filter(|component| !component.is_empty()) {
            let child = found.node()?.child(component)?;
            found.0.try_push(child).ok()?;
        }
        Some(found)
    }

    /// Returns the first node below the root, in the order of the device tree, that is available and that `wanted`
    /// accepts.
    pub(crate) fn search(fdt: Fdt<'a>, wanted: &dyn Fn(FdtNode<'a>) -> bool) -> Option<Self> {
        let mut path = Self::root(fdt);
        path.descend(wanted).then_some(path)
    }

    /// Goes to the first node below this one that is wanted and says whether there is any; if not it stays.
    fn descend(&mut self, wanted: &dyn Fn(FdtNode<'a>) -> bool) -> bool {
        let Some(node) = self.node() else { return false };
        for child in node.children().filter(|child| is_available(*child)) {
            if self.0.try_push(child).is_err() {
                return false;
            }
            if wanted(child) || self.descend(wanted) {
                return true;
            }
            self.0.pop();
        }
        false
    }

    pub(crate) fn node(&self) -> Option<FdtNode<'a>> {
        self.0.last().copied()
    }

    /// Returns the error that blames this node.
    pub(crate) fn blame(&self, fault: Fault) -> DtbError {
        match self.0.as_slice() {
            [_root, below @ ..] if !below.is_empty() => fault.at(below.iter().flat_map(|node| ["/", node.name()])),
            _ => fault.at(["/"]),
        }
    }

    /// Yields the pages that the regions of `reg` lie in, as physical addresses. One that lies in RAM is an error: it
    /// would give memory the attributes of a device, or the other way round.
    pub(crate) fn registers(
        &self,
        ram: &[PhysRange],
    ) -> Result<impl Iterator<Item = Result<PhysRange, DtbError>>, DtbError> {
        let entries = || {
            let [.., parent, node] = self.0.as_slice() else { return Err(Fault::Missing("parent")) };
            let value = value(*node, "reg").ok_or(Fault::Missing("property reg"))?;
            Ok(pairs(value, CellCounts::of(*parent, CellCounts::DEFAULT)?))
        };
        let range = |entry: Result<(u64, u64), Fault>| {
            let (base, size) = entry?;
            let range = touched_pages(self.translate(base, size)?, size)?;
            match ram.iter().find(|region| region.overlaps(&range)) {
                Some(region) => Err(Fault::Overlap { range, what: "RAM", other: *region }),
                None => Ok(range),
            }
        };
        Ok(entries()
            .map_err(|fault| self.blame(fault))?
            .map(move |entry| range(entry).map_err(|fault| self.blame(fault))))
    }

    /// Takes an address on the bus that the node sits on through the `ranges` of all buses up to the root.
    fn translate(&self, mut base: u64, size: u64) -> Result<u64, Fault> {
        let beyond = Fault::Region { base, size, problem: "not in the ranges of the bus that the node is on" };
        let buses = self.0.split_last().map_or(&[][..], |(_, ancestors)| ancestors);
        for pair in buses.windows(2).rev() {
            let &[parent, bus] = pair else { break };
            let outer = CellCounts::of(parent, CellCounts::DEFAULT)?;
            let inner = CellCounts::of(bus, CellCounts::DEFAULT)?;
            let mut ranges = value(bus, "ranges").ok_or(beyond.clone())?;
            // An empty property stands for the identity.
            let mut translated = ranges.is_empty().then_some(base);
            while translated.is_none() && !ranges.is_empty() {
                let mut entry = || {
                    let from = take(&mut ranges, inner.address)?;
                    let to = take(&mut ranges, outer.address)?;
                    Some((from, to, take(&mut ranges, inner.size)?))
                };
                let (from, to, length) = entry().ok_or(Fault::Malformed("ranges"))?;
                translated = base
                    .checked_sub(from)
                    .filter(|offset| offset.checked_add(size).is_some_and(|end| end <= length))
                    .and_then(|offset| to.checked_add(offset));
            }
            base = translated.ok_or(beyond.clone())?;
        }
        Ok(base)
    }
}
