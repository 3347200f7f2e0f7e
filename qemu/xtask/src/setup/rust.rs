//! The bare-metal Rust target: rustup's, or one built from Debian's source of the same compiler where rustup's server
//! cannot be reached.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::apt::PrivateApt;
use crate::{process, workspace};

/// The target of the hypervisor and of the EL1 payloads.
pub(crate) const BARE_METAL: &str = "aarch64-unknown-none-softfloat";

/// The target of programs that run on the host: static, so that the initramfs needs no library.
pub(crate) const MUSL: &str = "aarch64-unknown-linux-musl";

/// Suite that has the source of recent compilers.
const SOURCE_SUITE: &str = "trixie-backports";

/// Makes sure that programs of the host can be built.
pub(crate) fn ensure_musl() -> Result<()> {
    if !installed(MUSL)? {
        println!("Adding the Rust target {MUSL}");
        process::run(Command::new("rustup").args(["target", "add", MUSL]))?;
        ensure!(installed(MUSL)?, "rustup added it to another toolchain");
    }
    Ok(())
}

/// Makes sure that code can be built for the target.
pub(crate) fn ensure() -> Result<()> {
    if installed(BARE_METAL)? || source_dir()?.is_dir() {
        return Ok(());
    }
    println!("Adding the Rust target {BARE_METAL}");
    let added = process::run(Command::new("rustup").args(["target", "add", BARE_METAL]));
    if added.is_ok() && installed(BARE_METAL)? {
        return Ok(());
    }
    eprintln!("warning: rustup cannot add it; building it from Debian's source of the compiler instead");
    fetch_source()
}

/// `cargo SUBCOMMAND --target ...` for the target, which also builds `core` when rustup has none.
pub(crate) fn cargo(subcommand: &str) -> Result<Command> {
    let mut command = process::cargo();
    command.arg(subcommand);
    if !installed(BARE_METAL)? {
        // Only nightly compilers have the option officially; the library is that of this very compiler.
        command.env("RUSTC_BOOTSTRAP", "1").env("__CARGO_TESTS_ONLY_SRC_ROOT", source_dir()?);
        command.arg("-Zbuild-std=core,alloc,compiler_builtins");
        // As in rustup's library: our profile would add a panic to each addition of `core`.
        command.args(["--config", "profile.release.package.core.overflow-checks=false"]);
    }
    command.args(["--target", BARE_METAL]);
    Ok(command)
}

/// Makes sure that there is a program that cargo installs, of one version, and returns its path.
pub(crate) fn tool(name: &str, version: &str) -> Result<PathBuf> {
    let root = workspace::cache_dir()?.join(format!("{name}-{version}"));
    let program = root.join("bin").join(name);
    if !program.is_file() {
        println!("Installing {name} {version}");
        let mut install = process::cargo();
        install.args(["install", name, "--locked", "--version", version, "--root"]).arg(&root);
        process::run(&mut install)?;
    }
    Ok(program)
}

/// Makes sure that the toolchain has LLVM's tools, and returns their folder.
pub(crate) fn llvm_tools() -> Result<PathBuf> {
    let libraries = process::output(rustc().args(["--print", "target-libdir"]))?;
    let dir = PathBuf::from(libraries.trim()).parent().context("the compiler's libraries lie nowhere")?.join("bin");
    let installed = || dir.join("llvm-cov").is_file() && dir.join("llvm-profdata").is_file();
    if !installed() {
        println!("Adding the toolchain's component llvm-tools");
        process::run(Command::new("rustup").args(["component", "add", "llvm-tools"]).current_dir(workspace::root()))?;
        ensure!(installed(), "rustup added it to another toolchain");
    }
    Ok(dir)
}

/// The target that is this machine.
pub(crate) fn host() -> Result<String> {
    let text = process::output(rustc().arg("-vV"))?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not say its host")?.to_owned())
}

/// Whether the compiler has a target's `core`.
fn installed(target: &str) -> Result<bool> {
    let dir = process::output(rustc().args(["--print", "target-libdir", "--target", target]))?;
    let Ok(files) = fs::read_dir(dir.trim()) else { return Ok(false) };
    Ok(files.flatten().any(|file| file.file_name().to_string_lossy().starts_with("libcore-")))
}

/// The compiler that cargo uses in this checkout.
pub(crate) fn rustc() -> Command {
    let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    command.current_dir(workspace::root());
    command
}

/// Version of the compiler, such as `1.95.0`.
fn version() -> Result<String> {
    let text = process::output(rustc().arg("-vV"))?;
    let release = text.lines().find_map(|line| line.strip_prefix("release: "));
    Ok(release.context("rustc does not say its release")?.to_owned())
}

/// Where the source of the standard library is unpacked.
fn source_dir() -> Result<PathBuf> {
    let version = version()?;
    Ok(workspace::cache_dir()?.join(format!("rust-src-{version}/usr/src/rustc-{version}/library")))
}

fn fetch_source() -> Result<()> {
    let version = version()?;
    let apt = PrivateApt::new(&[SOURCE_SUITE.into()], "amd64")?;
    let same = |candidate: &super::apt::Candidate| candidate.version.starts_with(&format!("{version}+"));
    let candidate = apt.candidates("rust-src")?.into_iter().find(same);
    let candidate = candidate.with_context(|| format!("{SOURCE_SUITE} has no rust-src {version}"))?;
    let cache = workspace::cache_dir()?;
    let staging = cache.join("staging-rust-src");
    let _ = fs::remove_dir_all(&staging);
    let package = apt.download("rust-src", &candidate, &staging)?;
    let unpacked = staging.join("unpacked");
    process::run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&unpacked))?;
    fs::rename(&unpacked, cache.join(format!("rust-src-{version}")))?;
    fs::remove_dir_all(&staging)?;
    ensure!(source_dir()?.is_dir(), "rust-src {version} lacks the library's source");
    Ok(())
}
