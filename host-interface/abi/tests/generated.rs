//! The committed header and reference are what the table says, and a C compiler takes the header.

use std::{fs, io::ErrorKind, path::Path, process::Command};

use ravelin_abi::{CHeader, Reference};

fn assert_committed(path: &str, expected: &str) {
    let committed =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)).unwrap_or_default();
    assert!(committed == expected, "{path} differs from the table: cargo run -p ravelin-abi --example generate");
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn the_header_is_current() {
    assert_committed("host-interface/include/ravelin.h", &CHeader.to_string());
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn the_reference_is_current() {
    assert_committed("docs/hypercalls.md", &Reference.to_string());
}

#[test]
#[cfg_attr(miri, ignore = "starts a process")]
fn the_header_is_c11() {
    let header = concat!(env!("CARGO_MANIFEST_DIR"), "/../include/ravelin.h");
    // Preprocessing is all that an assembler source needs.
    for [language, stage] in [["c", "-fsyntax-only"], ["assembler-with-cpp", "-E"]] {
        let mut compiler = Command::new("cc");
        compiler.args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", stage, "-x", language, header]);
        match compiler.output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
            Err(error) if error.kind() == ErrorKind::NotFound => eprintln!("SKIPPED: there is no C compiler"),
            Err(error) => panic!("{error}"),
        }
    }
}
