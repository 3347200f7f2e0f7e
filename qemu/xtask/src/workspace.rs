//! Where things lie: the checkout, the build directory, and the cache of what was downloaded.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Root of the checkout.
pub(crate) fn root() -> PathBuf {
    // Cargo sets the variable for `cargo run`; the compiled-in value serves a binary that is called by its path.
    let manifest = env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    manifest.ancestors().nth(2).map_or_else(PathBuf::new, Path::to_path_buf)
}

/// Cargo's target directory: this program lies two levels below it, wherever the user has put it.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let own = env::current_exe().context("the path of this program")?;
    // A test binary lies one level deeper, in `deps`.
    let dir = own.ancestors().skip(1).find(|dir| dir.file_name().is_some_and(|name| name != "deps"));
    dir.and_then(Path::parent).map(Path::to_path_buf).context("this program lies outside a target directory")
}

/// Directory for images, logs and other things that this program makes.
pub(crate) fn output_dir() -> Result<PathBuf> {
    let dir = target_dir()?.join("ravelin");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

/// Directory of downloads: `$RAVELIN_CACHE`, else `$XDG_CACHE_HOME/ravelin`, else `~/.cache/ravelin`.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let dir = set("RAVELIN_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("ravelin")))
        .or_else(|| set("HOME").map(|dir| dir.join(".cache/ravelin")))
        .context("none of RAVELIN_CACHE, XDG_CACHE_HOME and HOME is set")?;
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    // apt and QEMU are given this path; a relative one would mean something else there.
    dir.canonicalize().with_context(|| format!("cannot resolve {}", dir.display()))
}

/// All regular files below a directory, sorted. Links are not followed.
pub(crate) fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                dirs.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The first `bytes` bytes of the SHA-256 of some data, in hexadecimal: a name for it.
pub(crate) fn digest(data: impl AsRef<[u8]>, bytes: usize) -> String {
    Sha256::digest(data).iter().take(bytes).map(|byte| format!("{byte:02x}")).collect()
}

/// Path of a program in `$PATH`.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}
