//! `cargo xtask guest-kernel`: the guest kernel with the mainline pKVM driver, from Debian's source of Linux and the
//! configuration in `qemu/machines/guest-kernel.config`. It is built once and kept in the cache.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::setup::packages::Manifest;
use crate::setup::{self, KERNEL_TOOLS, Needs, SOURCE};
use crate::{process, workspace};

/// Ten minutes on a machine that has two CPUs for it.
const LIMIT: Duration = Duration::from_secs(3 * 3600);

const CONFIG: &str = "qemu/machines/guest-kernel.config";

/// The kernel, if it has been built.
pub(crate) fn cached() -> Result<Option<PathBuf>> {
    let image = dir()?.join("Image");
    Ok(image.is_file().then_some(image))
}

/// Builds the kernel unless the cache has it.
pub(crate) fn ensure() -> Result<PathBuf> {
    if let Some(image) = cached()? {
        return Ok(image);
    }
    setup::ensure(&Needs { tools: &[KERNEL_TOOLS], packages: &[SOURCE], ..Needs::default() })?;
    println!("Building the guest kernel, which takes some ten minutes once");
    let work = workspace::output_dir()?.join("guest-kernel");
    let lock = File::create(work.with_extension("lock"))?;
    lock.lock().context("cannot wait for another build of the guest kernel")?;
    if let Some(image) = cached()? {
        return Ok(image);
    }
    // What an interrupted build has left, of two gigabytes at most.
    let _ = fs::remove_dir_all(&work);
    let built = build(&Manifest::load()?.ensure(SOURCE)?, &work);
    fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    built
}

/// Directory of the kernel in the cache: another source or configuration is another kernel.
fn dir() -> Result<PathBuf> {
    let config = config()?;
    let manifest = Manifest::load()?;
    let version = manifest.version(SOURCE)?;
    let sum = workspace::digest(config, 6);
    Ok(workspace::cache_dir()?.join(format!("guest-kernel_{version}_{sum}")))
}

fn config() -> Result<String> {
    let path = workspace::root().join(CONFIG);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn build(source: &Path, work: &Path) -> Result<PathBuf> {
    let (tree, out) = (work.join("source"), work.join("out"));
    fs::create_dir_all(&tree)?;
    fs::create_dir_all(&out)?;
    process::run(Command::new("tar").arg("--directory").arg(&tree).args(["--strip-components=1", "-xf"]).arg(source))?;

    let make = |target: &str| {
        let mut make = Command::new("make");
        make.arg("--silent").arg("-C").arg(&tree).arg(format!("O={}", out.display()));
        make.args(["ARCH=arm64", "CROSS_COMPILE=aarch64-linux-gnu-", target]);
        // Nothing of this machine goes into the image.
        make.env("KBUILD_BUILD_TIMESTAMP", "2026-01-01").env("KBUILD_BUILD_USER", "ravelin");
        make.env("KBUILD_BUILD_HOST", "ravelin");
        make
    };
    let fragment = config()?;
    process::run(&mut make("tinyconfig"))?;
    let configuration = out.join(".config");
    let tiny = fs::read_to_string(&configuration)?;
    // Of two lines for one option the later counts.
    fs::write(&configuration, tiny + &fragment)?;
    process::output(&mut make("olddefconfig"))?;
    let lacking = lacking(&fragment, &fs::read_to_string(&configuration)?);
    ensure!(lacking.is_empty(), "{CONFIG}: not in the kernel's configuration: {}", lacking.join(", "));

    process::run_for(make("Image").arg(format!("-j{}", process::cpus())), LIMIT)?;
    let dir = dir()?;
    fs::create_dir_all(&dir)?;
    // On the cache's file system first, so that no other program sees a half of it.
    let staged = dir.join(format!("Image-{}", std::process::id()));
    fs::copy(out.join("arch/arm64/boot/Image"), &staged)?;
    fs::copy(&configuration, dir.join("config"))?;
    let image = dir.join("Image");
    fs::rename(&staged, &image)?;
    Ok(image)
}

/// Lines that the configuration lacks. The option `CONFIG_X is not set` also holds where there is no such option.
fn lacking<'a>(fragment: &'a str, configuration: &str) -> Vec<&'a str> {
    let has = |line: &str| configuration.lines().any(|other| other == line);
    let is_off = |line: &str| {
        let name = line.strip_prefix("# ").and_then(|line| line.strip_suffix(" is not set"));
        name.is_some_and(|name| !configuration.lines().any(|other| other.starts_with(&format!("{name}="))))
    };
    let options = fragment.lines().filter(|line| line.starts_with("CONFIG_") || line.ends_with(" is not set"));
    options.filter(|line| !has(line) && !is_off(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_the_kernel_drops_are_seen() {
        let configuration = "# comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=y\n";
        assert!(
            lacking("# A note\nCONFIG_A=y\n\n# CONFIG_B is not set\n# CONFIG_C is not set\n", configuration).is_empty()
        );
        let bad = "CONFIG_A=m\n# CONFIG_D is not set\nCONFIG_E=y\n";
        assert_eq!(lacking(bad, configuration), ["CONFIG_A=m", "# CONFIG_D is not set", "CONFIG_E=y"]);
    }

    #[test]
    fn the_cache_knows_the_configuration() {
        let name = dir().unwrap().file_name().unwrap().to_string_lossy().into_owned();
        assert!(name.starts_with("guest-kernel_") && name.len() > "guest-kernel__123456789012".len(), "{name}");
    }
}
