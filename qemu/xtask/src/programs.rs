//! Programs of the host that are built here.

use std::path::PathBuf;

use anyhow::Result;

use crate::setup::rust;
use crate::{process, workspace};

/// Builds the VMM, a static program.
pub(crate) fn vmm() -> Result<PathBuf> {
    with_library("ravelin-vmm", "ravelin-vmm")
}

/// Builds the program of `tests/kvm`, a static one.
pub(crate) fn kvm_tests() -> Result<PathBuf> {
    with_library("ravelin-kvm-tests", "kvm-tests")
}

/// Builds a static program of the host that uses the standard library.
fn with_library(package: &str, name: &str) -> Result<PathBuf> {
    let mut cargo = process::cargo();
    // The linker of the Rust toolchain needs no C compiler for arm64.
    cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER", "rust-lld");
    cargo.args(["build", "--quiet", "--release", "--package", package, "--target", rust::MUSL]);
    process::run(&mut cargo)?;
    Ok(workspace::target_dir()?.join(rust::MUSL).join("release").join(name))
}

/// Builds the program of `tests/linux`, which needs no library and thus the hypervisor's target only.
pub(crate) fn probe() -> Result<PathBuf> {
    let mut cargo = rust::cargo("build")?;
    process::run(cargo.args(["--release", "--quiet", "--package", "ravelin-linux-probe"]))?;
    Ok(workspace::target_dir()?.join(rust::BARE_METAL).join("release/probe"))
}
