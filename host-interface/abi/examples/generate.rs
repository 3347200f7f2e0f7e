//! Writes the C header and the reference of the host hypercalls to where they are committed.

use std::{fs, io, path::Path};

use ravelin_abi::{CHeader, Reference};

fn main() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    fs::write(root.join("host-interface/include/ravelin.h"), CHeader.to_string())?;
    fs::write(root.join("docs/hypercalls.md"), Reference.to_string())
}
