//! Programs of the host that are built here.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::initramfs::ExtraFile;
use crate::module::{self, Kernel};
use crate::setup::rust;
use crate::{image, process, workspace};

/// Builds the VMM, a static program.
pub(crate) fn vmm() -> Result<PathBuf> {
    with_library("ravelin-vmm", "ravelin-vmm")
}

/// Builds what a host with that kernel gets for the tests of `tests/kvm`: the kernel module, the program, and its guest.
pub(crate) fn kvm_test_files(kernel: Kernel) -> Result<Vec<ExtraFile>> {
    let files = [
        ("lib/ravelin/ravelin.ko", module::build(kernel)?.module),
        ("bin/kvm-tests", with_library("ravelin-kvm-tests", "kvm-tests")?),
        ("root/guest.bin", image::guest()?),
    ];
    let read = |(to, from): (&str, PathBuf)| {
        let contents = fs::read(&from).with_context(|| from.display().to_string())?;
        Ok(ExtraFile { path: to.into(), contents })
    };
    files.into_iter().map(read).collect()
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
