//! What can be wrong with a device tree.

use arrayvec::ArrayString;
use dtoolkit::error::FdtParseError;
use ravelin_memory::PhysRange;
use thiserror::Error;

/// The path of a node; a long one is cut off.
pub type NodeName = ArrayString<48>;

/// Something in the device tree that Ravelin cannot work with.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{node}: {fault}")]
pub struct DtbError {
    /// The node to blame.
    pub node: NodeName,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a node.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Fault {
    /// The device tree as a whole cannot be read.
    #[error("cannot be read: {0}")]
    Format(#[from] FdtParseError),
    /// Something that must be there is not.
    #[error("no {0}")]
    Missing(&'static str),
    /// A property has a length or contents that it may not have.
    #[error("malformed property {0}")]
    Malformed(&'static str),
    /// A range of addresses that cannot be one.
    #[error("{size:#x} bytes at {base:#x}: {problem}")]
    Region {
        /// First address.
        base: u64,
        /// Size in bytes.
        size: u64,
        /// Why this is no range.
        problem: &'static str,
    },
    /// A range lies where something else is.
    #[error("{range} overlaps {what} at {other}")]
    Overlap {
        /// The range of this node.
        range: PhysRange,
        /// What it overlaps.
        what: &'static str,
        /// Where that is.
        other: PhysRange,
    },
    /// A range that must be RAM is not, or not all of it.
    #[error("{0} is not in one piece of RAM")]
    NotRam(PhysRange),
    /// There are more of something than Ravelin has room for.
    #[error("more than {limit} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// Two CPUs have the same affinity, or one has an affinity that the architecture does not have.
    #[error("affinity {0:#x} is impossible or another CPU's")]
    Affinity(u64),
    /// The machine has something that Ravelin does not work with.
    #[error("{0}")]
    Unsupported(&'static str),
    /// There is no room in RAM for something of this size, in bytes.
    #[error("no room for {what} of {size:#x} bytes")]
    NoRoom {
        /// For what.
        what: &'static str,
        /// Bytes that it takes.
        size: u64,
    },
}

impl Fault {
    /// Returns the error that blames the node at `path`, given in pieces, for this.
    pub(crate) fn at<'a>(self, path: impl IntoIterator<Item = &'a str>) -> DtbError {
        DtbError { node: node_name(path), fault: self }
    }
}

/// Joins the pieces of a path, as far as they fit.
pub(crate) fn node_name<'a>(path: impl IntoIterator<Item = &'a str>) -> NodeName {
    let mut name = NodeName::new();
    for character in path.into_iter().flat_map(str::chars) {
        if name.try_push(character).is_err() {
            break;
        }
    }
    name
}
