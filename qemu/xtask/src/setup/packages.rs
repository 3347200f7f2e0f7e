//! What comes out of Debian packages, pinned in `qemu/machines/packages/debian.toml`: single files such as kernels, and trees
//! such as the headers that kernel modules are built with.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::apt::{self, Candidate, PrivateApt};
use crate::{process, workspace};

/// The pinned packages by the names that this program has for them.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Manifest {
    packages: BTreeMap<String, Pin>,
}

/// One version of one package, and what is wanted of it: one file, or a tree.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Pin {
    package: String,
    version: String,
    #[serde(default = "arm64")]
    architecture: String,
    /// SHA-256 of the package file.
    package_sha256: String,
    /// The file in the package.
    member: Option<String>,
    /// SHA-256 of that file.
    sha256: Option<String>,
    /// Directory in the cache that the package is unpacked into. Several packages may share it.
    tree: Option<String>,
    /// What is unpacked there; everything if this is empty. Kernel modules are decompressed.
    #[serde(default)]
    members: Vec<String>,
    /// Suites to look in.
    suites: Vec<String>,
    /// Beginning and end of the names of packages that may stand in when the pinned one has gone.
    successors: [String; 2],
}

fn arm64() -> String {
    "arm64".into()
}

/// What is wanted of a package.
enum Contents<'a> {
    File { member: &'a str, sha256: &'a str },
    Tree { dir: &'a str },
}

impl Manifest {
    /// Reads the manifest.
    pub(crate) fn load() -> Result<Self> {
        let path = workspace::root().join("qemu/machines/packages/debian.toml");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let manifest: Self = toml::from_str(&text).with_context(|| path.display().to_string())?;
        for (name, pin) in &manifest.packages {
            pin.contents().with_context(|| name.clone())?;
        }
        Ok(manifest)
    }

    /// The file or the tree of that name, downloaded if it is not in the cache.
    pub(crate) fn ensure(&self, name: &str) -> Result<PathBuf> {
        let pin = self.packages.get(name).with_context(|| format!("the manifest has no {name}"))?;
        let cache = workspace::cache_dir()?;
        // Two of these programs may run at the same time.
        let lock = File::create(cache.join("lock"))?;
        lock.lock().context("cannot lock the cache")?;
        let path = pin.path(&cache)?;
        let (pinned, substituted) = match pin.contents()? {
            Contents::File { .. } => (path.is_file(), None),
            Contents::Tree { .. } => (pin.stamp(&path, &pin.package, &pin.version).is_file(), Some(path.clone())),
        };
        if pinned {
            return Ok(path);
        }
        if let Ok(substitute) = fs::read_to_string(pin.substitute_note(&cache)) {
            let there = cache.join(&substitute);
            if there.is_file() {
                eprintln!("warning: {name} is {}, not the pinned {}", there.display(), pin.package);
                return Ok(substituted.unwrap_or(there));
            }
        }
        self.fetch(name, pin, &cache)
    }

    /// The pinned version of a package.
    pub(crate) fn version(&self, name: &str) -> Result<&str> {
        Ok(&self.packages.get(name).with_context(|| format!("the manifest has no {name}"))?.version)
    }

    /// Removes files of the cache that do not have their pinned checksum.
    pub(crate) fn verify_cache(&self) -> Result<()> {
        let cache = workspace::cache_dir()?;
        for (name, pin) in &self.packages {
            let path = pin.path(&cache)?;
            if let Contents::File { sha256: sum, .. } = pin.contents()?
                && path.is_file()
                && sha256(&path)? != sum
            {
                eprintln!("warning: {name} in the cache is damaged; removing {}", path.display());
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    fn fetch(&self, name: &str, pin: &Pin, cache: &Path) -> Result<PathBuf> {
        let apt = PrivateApt::new(&pin.suites, &pin.architecture)?;
        let pinned = apt.candidates(&pin.package)?.into_iter().find(|candidate| candidate.version == pin.version);
        let (package, candidate) = match pinned {
            Some(candidate) => (pin.package.clone(), candidate),
            None => newest(&apt, pin)?,
        };
        let is_pinned = package == pin.package && candidate.version == pin.version;
        if !is_pinned {
            eprintln!(
                "WARNING: {} {} is not in {} as this machine sees them.",
                pin.package,
                pin.version,
                pin.suites.join(", ")
            );
            eprintln!(
                "WARNING: taking {package} {} for {name}, on the word of apt's signatures alone.",
                candidate.version
            );
        }

        let staging = cache.join("staging");
        let _ = fs::remove_dir_all(&staging);
        let file = apt.download(&package, &candidate, &staging)?;
        let expected = if is_pinned { &pin.package_sha256 } else { &candidate.sha256 };
        let found = sha256(&file)?;
        ensure!(&found == expected, "{package}: SHA-256 is {found}, not {expected}");

        // A package that several names want is downloaded once.
        for (other, wanted) in self.packages.iter().filter(|(other, wanted)| *other == name || wanted.same_package(pin))
        {
            place(wanted, &file, &package, &candidate.version, cache).with_context(|| other.clone())?;
        }
        fs::remove_dir_all(&staging)?;
        println!("{name}: {package} {}", candidate.version);
        match pin.contents()? {
            Contents::File { member, .. } => Ok(cached(cache, &package, &candidate.version, member)),
            Contents::Tree { .. } => pin.path(cache),
        }
    }
}

impl Pin {
    fn contents(&self) -> Result<Contents<'_>> {
        match (&self.member, &self.sha256, &self.tree) {
            (Some(member), Some(sha256), None) if self.members.is_empty() => Ok(Contents::File { member, sha256 }),
            (None, None, Some(dir)) => Ok(Contents::Tree { dir }),
            _ => bail!("a package needs either member and sha256, or tree"),
        }
    }

    /// The file, or the directory of the tree.
    fn path(&self, cache: &Path) -> Result<PathBuf> {
        Ok(match self.contents()? {
            Contents::File { member, .. } => cached(cache, &self.package, &self.version, member),
            Contents::Tree { dir } => cache.join(dir),
        })
    }

    /// File that says that a package is in a tree, with these members.
    fn stamp(&self, tree: &Path, package: &str, version: &str) -> PathBuf {
        let members = workspace::digest(self.members.join(" "), 4);
        tree.join(format!(".{}-{members}", directory(package, version)))
    }

    fn same_package(&self, other: &Self) -> bool {
        let key = |pin: &Self| (pin.package.clone(), pin.version.clone(), pin.architecture.clone());
        key(self) == key(other)
    }

    /// File that says what stands in for this package.
    fn substitute_note(&self, cache: &Path) -> PathBuf {
        cache.join(format!("{}.substitute", directory(&self.package, &self.version)))
    }
}

fn directory(package: &str, version: &str) -> String {
    format!("{package}_{}", version.replace([':', '/'], "-"))
}

fn cached(cache: &Path, package: &str, version: &str, member: &str) -> PathBuf {
    let file = Path::new(member).file_name().unwrap_or_default().to_string_lossy().replace('*', "");
    cache.join(directory(package, version)).join(file)
}

/// Takes what is wanted out of a package file.
fn place(pin: &Pin, file: &Path, package: &str, version: &str, cache: &Path) -> Result<()> {
    let is_pinned = package == pin.package && version == pin.version;
    let evidence = match pin.contents()? {
        Contents::File { member, sha256: sum } => {
            let path = cached(cache, package, version, member);
            let staged = file.with_extension("member");
            apt::extract(file, member, &staged)?;
            if is_pinned {
                let found = sha256(&staged)?;
                ensure!(found == sum, "{member}: SHA-256 is {found}, not {sum}");
            }
            fs::create_dir_all(path.parent().context("the cache has a root")?)?;
            fs::rename(&staged, &path)?;
            path
        }
        Contents::Tree { dir } => {
            let tree = cache.join(dir);
            fs::create_dir_all(&tree)?;
            apt::unpack(file, &pin.members, &tree)?;
            decompress_modules(&tree)?;
            let stamp = pin.stamp(&tree, package, version);
            fs::write(&stamp, "")?;
            stamp
        }
    };
    if !is_pinned {
        fs::write(pin.substitute_note(cache), evidence.strip_prefix(cache)?.display().to_string())?;
    }
    Ok(())
}

/// Busybox cannot load compressed modules.
fn decompress_modules(tree: &Path) -> Result<()> {
    let compressed: Vec<_> =
        workspace::files_below(tree)?.into_iter().filter(|path| path.to_string_lossy().ends_with(".ko.xz")).collect();
    if compressed.is_empty() {
        return Ok(());
    }
    process::run(Command::new("xz").args(["--decompress", "--force"]).args(compressed))
}

/// The newest version of the newest package that may stand in for a pinned one.
fn newest(apt: &PrivateApt, pin: &Pin) -> Result<(String, Candidate)> {
    let [prefix, suffix] = &pin.successors;
    let mut names = apt.names(prefix, suffix)?;
    names.retain(|name| is_version(&name[prefix.len()..name.len() - suffix.len()]));
    names.sort_by(|one, other| compare(one, other));
    let package = names.pop().with_context(|| format!("no {prefix}*{suffix} in {}", pin.suites.join(", ")))?;
    let candidate = apt.candidates(&package)?.into_iter().next();
    Ok((package.clone(), candidate.with_context(|| format!("{package} has no version"))?))
}

/// Whether text has digits, dots and dashes only. Flavours of kernels have letters there.
fn is_version(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_digit() || c == '.' || c == '-')
}

/// Compares names by the numbers in them.
fn compare(one: &str, other: &str) -> Ordering {
    let numbers = |text: &str| -> Vec<u64> {
        text.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
    };
    numbers(one).cmp(&numbers(other))
}

/// SHA-256 of a file, in hexadecimal.
fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&buffer[..read]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_is_complete() {
        let manifest = Manifest::load().unwrap();
        for name in [crate::setup::DEFAULT_KERNEL, crate::setup::BUSYBOX] {
            assert!(manifest.packages.contains_key(name), "{name}");
        }
        for (name, pin) in &manifest.packages {
            for sum in [Some(&pin.package_sha256), pin.sha256.as_ref()].into_iter().flatten() {
                assert!(sum.len() == 64 && sum.chars().all(|c| c.is_ascii_hexdigit()), "{name}: {sum}");
            }
            let [prefix, suffix] = &pin.successors;
            assert!(pin.package.starts_with(prefix.as_str()) && pin.package.ends_with(suffix.as_str()), "{name}");
            assert!(is_version(&pin.package[prefix.len()..pin.package.len() - suffix.len()]), "{name}");
        }
        assert!(manifest.ensure("nonsuch").is_err());
    }

    #[test]
    fn newer_names_win() {
        assert_eq!(compare("linux-image-6.12.9+deb12", "linux-image-6.12.117+deb12"), Ordering::Less);
        assert_eq!(compare("linux-image-6.1.0-56", "linux-image-6.1.0-9"), Ordering::Greater);
        assert!(is_version("6.12.117") && !is_version("6.12.117+deb12-cloud"));
    }

    #[test]
    fn names_in_the_cache() {
        let path = cached(Path::new("/c"), "busybox-static", "1:1.35", "./bin/busybox");
        assert_eq!(path, Path::new("/c/busybox-static_1-1.35/busybox"));
        assert_eq!(cached(Path::new("/c"), "k", "1", "*/vmlinuz*"), Path::new("/c/k_1/vmlinuz"));
    }

    #[test]
    fn checksum_of_a_file() {
        let path = std::env::temp_dir().join(format!("ravelin-sha256-{}", std::process::id()));
        fs::write(&path, b"abc").unwrap();
        let sum = sha256(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(sum, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
