//! Builds the payload.

use std::{
    env, fs,
    ops::Range,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use object::{Object, ObjectSegment, read::elf::ElfFile64};

pub(crate) const TARGET: &str = "aarch64-unknown-none-softfloat";

/// Root of the checkout.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map_or_else(PathBuf::new, Path::to_path_buf)
}

/// `cargo` in the checkout.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Cargo's target directory, wherever the user has put it.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let own = env::current_exe().context("the path of this program")?;
    Ok(own.ancestors().nth(2).context("this program lies outside a target directory")?.to_owned())
}

/// Directory for what this program makes: beside cargo's own.
pub(crate) fn output_dir() -> Result<PathBuf> {
    let dir = target_dir()?.join("conformance");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

/// Builds the payload or the guest, by the name of its package, and returns the path of its flat binary.
pub(crate) fn build(package: &str) -> Result<PathBuf> {
    let dir = output_dir()?;
    let status = cargo()
        .args(["build", "--quiet", "--release", "--package", package, "--target", TARGET, "--target-dir"])
        .arg(&dir)
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "{package} does not build");
    let elf = dir.join(TARGET).join("release").join(package);
    let elf = fs::read(&elf).with_context(|| format!("cannot read {}", elf.display()))?;
    let path = dir.join(package).with_extension("bin");
    fs::write(&path, flatten(&elf)?).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Writes a copy of the flat binary `image` that is no arm64 Image, and so may run at any address, and returns its path.
pub(crate) fn without_header(image: &Path) -> Result<PathBuf> {
    const MAGIC: Range<usize> = 56..60;
    let mut bytes = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    bytes.get_mut(MAGIC).context("the payload is too short")?.fill(0);
    let path = output_dir()?.join("payload-without-header.bin");
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// The loaded bytes of an ELF file.
fn flatten(elf: &[u8]) -> Result<Vec<u8>> {
    let file = ElfFile64::<object::Endianness>::parse(elf).context("not an ELF file")?;
    let base = file.segments().map(|segment| segment.address()).min().context("nothing to load")?;
    let mut flat = Vec::new();
    for segment in file.segments() {
        let data = segment.data()?;
        let start = usize::try_from(segment.address() - base)?;
        flat.resize(flat.len().max(start + data.len()), 0);
        flat[start..start + data.len()].copy_from_slice(data);
    }
    Ok(flat)
}
