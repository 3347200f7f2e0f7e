//! Installs and downloads what a command needs, and nothing twice.

pub(crate) mod apt;
pub(crate) mod packages;
pub(crate) mod rust;

use std::process::Command;

use anyhow::{Result, bail};

use crate::module::Kernel;
use crate::{guests, workspace};
use packages::Manifest;

/// QEMU from this major version on has what the machines and the tests use.
const QEMU_MAJOR: u32 = 8;

/// A program of this machine, the Debian package that has it, and what it is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    program: &'static str,
    package: &'static str,
    purpose: &'static str,
}

const fn tool(program: &'static str, package: &'static str, purpose: &'static str) -> Tool {
    Tool { program, package, purpose }
}

const XZ: Tool = tool("xz", "xz-utils", "unpacks modules and sources of kernels");
const MAKE: Tool = tool("make", "make", "builds kernel code");
const CROSS_GCC: Tool = tool("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu", "compiles kernel code for arm64");

/// What a kernel module is built with.
pub(crate) const MODULE_TOOLS: &[Tool] = &[XZ, MAKE, CROSS_GCC];

/// What looks at a kernel module's source.
pub(crate) const CHECK_TOOLS: &[Tool] = &[
    XZ,
    tool("sparse", "sparse", "checks address spaces and locks in kernel code"),
    tool("perl", "perl", "runs the kernel's checkpatch"),
];

/// What a kernel is built with.
pub(crate) const KERNEL_TOOLS: &[Tool] = &[
    XZ,
    MAKE,
    CROSS_GCC,
    tool("gcc", "gcc", "compiles the programs that the build of a kernel uses"),
    tool("flex", "flex", "generates a part of the kernel's configuration program"),
    tool("bison", "bison", "generates a part of the kernel's configuration program"),
    tool("bc", "bc", "computes constants of the kernel's clock"),
];

/// What a command is going to use.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Needs<'a> {
    /// qemu-system-aarch64.
    pub(crate) qemu: bool,
    /// gdb-multiarch.
    pub(crate) gdb: bool,
    /// The bare-metal Rust target.
    pub(crate) bare_metal: bool,
    /// The Rust target for static programs of the host.
    pub(crate) musl: bool,
    /// Other programs of this machine.
    pub(crate) tools: &'a [&'a [Tool]],
    /// Packages of the manifest, by name.
    pub(crate) packages: &'a [&'a str],
}

/// The name of the default host kernel in the manifest.
pub(crate) const DEFAULT_KERNEL: &str = "linux";

/// The name of the kernel's source in the manifest.
pub(crate) const SOURCE: &str = "linux-source";

/// The name of busybox in the manifest.
pub(crate) const BUSYBOX: &str = "busybox";

/// Makes sure that everything in `needs` is there.
///
/// # Errors
///
/// What cannot be installed or downloaded, all of it at once.
pub(crate) fn ensure(needs: &Needs<'_>) -> Result<()> {
    let mut missing = Vec::new();
    let mut install = Vec::new();
    let mut programs = Vec::new();
    if needs.qemu && !has_qemu() {
        install.push("qemu-system-arm");
        programs.push(format!("qemu-system-aarch64, version {QEMU_MAJOR} or newer"));
    }
    if needs.gdb && workspace::program("gdb-multiarch").is_none() {
        install.push("gdb-multiarch");
        programs.push("gdb-multiarch".into());
    }
    for tool in needs.tools.iter().flat_map(|tools| tools.iter()) {
        let Tool { program, package, purpose } = tool;
        if workspace::program(program).is_none() && !install.contains(package) {
            println!("{program} is missing, which {purpose}");
            install.push(package);
            programs.push((*program).into());
        }
    }
    if !install.is_empty() {
        if let Err(error) = apt::install(&install) {
            missing.extend(programs.iter().map(|program| format!("{program}: {error:#}")));
        } else if needs.qemu && !has_qemu() {
            missing.push(format!("{}: apt has an older one only", programs[0]));
        }
    }
    if needs.bare_metal
        && let Err(error) = rust::ensure()
    {
        missing.push(format!("Rust target {}: {error:#}", rust::BARE_METAL));
    }
    if needs.musl
        && let Err(error) = rust::ensure_musl()
    {
        missing.push(format!("Rust target {}: {error:#}", rust::MUSL));
    }
    let manifest = Manifest::load()?;
    for name in needs.packages {
        if let Err(error) = manifest.ensure(name) {
            let instead = match *name {
                BUSYBOX => " (or give --host-initrd to run)",
                DEFAULT_KERNEL => " (or give --host-kernel to run)",
                _ => "",
            };
            missing.push(format!("{name} for arm64{instead}: {error:#}"));
        }
    }
    if !missing.is_empty() {
        bail!("missing, and not to be had here:\n  {}", missing.join("\n  "));
    }
    Ok(())
}

/// `cargo xtask setup`: everything that the commands use, with the checksums of what is in the cache checked again.
pub(crate) fn setup() -> Result<()> {
    Manifest::load()?.verify_cache()?;
    let packages = &[DEFAULT_KERNEL, BUSYBOX];
    ensure(&Needs { qemu: true, gdb: true, bare_metal: true, packages, ..Needs::default() })?;
    guests::ensure(Kernel::default())?;
    if let Some((major, minor)) = qemu_version() {
        println!("QEMU {major}.{minor}, gdb, the Rust targets, the compiler for the kernel module,");
        println!("the kernels of host and guest, headers, drivers and busybox are there.");
    }
    println!("Downloads are in {}", workspace::cache_dir()?.display());
    Ok(())
}

fn has_qemu() -> bool {
    qemu_version().is_some_and(|(major, _)| major >= QEMU_MAJOR)
}

/// Major and minor version of qemu-system-aarch64, if there is one.
pub(crate) fn qemu_version() -> Option<(u32, u32)> {
    let output = Command::new("qemu-system-aarch64").arg("--version").output().ok()?;
    parse_qemu_version(&String::from_utf8_lossy(&output.stdout))
}

fn parse_qemu_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix("QEMU emulator version ")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_qemu() {
        assert_eq!(parse_qemu_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), Some((10, 0)));
        assert_eq!(parse_qemu_version("QEMU emulator version 7.2.17"), Some((7, 2)));
        assert_eq!(parse_qemu_version("something else"), None);
    }
}
