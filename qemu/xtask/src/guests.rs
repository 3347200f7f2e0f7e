//! What a host gets that runs guests: the kernel module, drivers, the VMM, and guests with their kernels and initramfs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection};
use sha2::{Digest, Sha256};

use crate::cpio::Archive;
use crate::initramfs::ExtraFile;
use crate::module::{self, Kernel};
use crate::setup::packages::Manifest;
use crate::setup::{self, BUSYBOX, MODULE_TOOLS, Needs};
use crate::{guest_kernel, programs, workspace};

/// The stock guest kernel and its drivers, in the manifest.
pub(crate) const STOCK: [&str; 2] = ["guest", "guest-modules"];

/// Names under which the script that starts guests is called.
const COMMANDS: [&str; 3] = ["realm-guest", "pkvm-guest", "plain-guest"];

/// Installs and downloads what such a host is made of.
pub(crate) fn ensure(kernel: Kernel) -> Result<()> {
    let packages = [&STOCK[..], &[BUSYBOX, kernel.drivers()], kernel.packages()].concat();
    let tools = &[MODULE_TOOLS];
    setup::ensure(&Needs { bare_metal: true, musl: true, tools, packages: &packages, ..Needs::default() })
}

/// The files of such a host.
pub(crate) fn host_files(kernel: Kernel) -> Result<Vec<ExtraFile>> {
    ensure(kernel)?;
    let manifest = Manifest::load()?;
    let file = |path: &str, contents: Vec<u8>| ExtraFile { path: path.into(), contents };

    let mut files = vec![
        file("lib/ravelin/start", script("start")?),
        file("lib/ravelin/ravelin.ko", read(&module::build(kernel)?.module)?),
        file("bin/ravelin-vmm", read(&programs::vmm()?)?),
    ];
    let starter = script("guest")?;
    files.extend(COMMANDS.map(|name| file(&format!("bin/{name}"), starter.clone())));
    files.push(file("bin/demo", script("demo")?));
    files.push(file("bin/probe", read(&programs::probe()?)?));
    files.push(file("lib/ravelin/secrets", secrets().into_bytes()));
    let drivers = drivers(&manifest.ensure(kernel.drivers())?)?;
    files.extend(drivers.into_iter().map(|(name, contents)| file(&format!("lib/drivers/{name}"), contents)));

    let busybox = read(&manifest.ensure(BUSYBOX)?)?;
    files.push(file("guest/debian/Image", read(&manifest.ensure(STOCK[0])?)?));
    files.push(file("guest/debian/initrd", initrd(&busybox, &self::drivers(&manifest.ensure(STOCK[1])?)?)?));
    if let Some(image) = guest_kernel::cached()? {
        files.push(file("guest/mainline/Image", read(&image)?));
        files.push(file("guest/mainline/initrd", initrd(&busybox, &[])?));
    }
    Ok(files)
}

/// How to recognise the secrets of the guests of the demo: a line with the name of each and the complement of the text
/// that it puts into its memory. The text itself is nowhere in the host.
fn secrets() -> String {
    let line = |name: &str| {
        let digest = Sha256::digest(format!("the secret of the {name} guest"));
        let text: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let complement: String = text.bytes().map(|byte| format!("{:02x}", !byte)).collect();
        format!("{name} {complement}\n")
    };
    ["realm", "pkvm", "plain"].map(line).concat()
}

fn script(name: &str) -> Result<Vec<u8>> {
    read(&workspace::root().join("qemu/initramfs").join(name))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The root file system of a guest.
fn initrd(busybox: &[u8], drivers: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for dir in ["bin", "sbin", "usr", "usr/bin", "usr/sbin", "dev", "proc", "sys", "tmp", "root"] {
        archive.directory(dir);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, busybox);
    archive.file("init", 0o755, &script("guest-init")?);
    archive.file("bin/guest-demo", 0o755, &script("guest-demo")?);
    for (name, contents) in drivers {
        archive.file(&format!("lib/drivers/{name}"), 0o644, contents);
    }
    Ok(archive.finish())
}

/// The drivers of a tree, with names that sort in the order in which they must be inserted.
pub(crate) fn drivers(tree: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut modules = BTreeMap::new();
    for path in workspace::files_below(tree)? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".ko")) else { continue };
        let contents = read(&path)?;
        let needs = dependencies(&contents).with_context(|| path.display().to_string())?;
        modules.insert(name.replace('-', "_"), (needs, contents));
    }
    ensure!(!modules.is_empty(), "{} has no drivers", tree.display());
    let mut ordered = Vec::new();
    while !modules.is_empty() {
        let ready = modules.iter().find(|(_, (needs, _))| needs.iter().all(|need| !modules.contains_key(need)));
        let Some(name) = ready.map(|(name, _)| name.clone()) else {
            bail!("drivers of {} need each other", tree.display())
        };
        let number = ordered.len();
        ordered.extend(modules.remove(&name).map(|(_, contents)| (format!("{number:02}-{name}.ko"), contents)));
    }
    Ok(ordered)
}

/// Names of the modules that a module needs, as it says itself.
fn dependencies(module: &[u8]) -> Result<Vec<String>> {
    let file = ElfFile64::<object::Endianness>::parse(module).context("not a 64-bit ELF file")?;
    let information = file.section_by_name(".modinfo").context("not a kernel module")?.data()?;
    let mut fields = information.split(|byte| *byte == 0).filter_map(|field| std::str::from_utf8(field).ok());
    let depends = fields.find_map(|field| field.strip_prefix("depends=")).context("no list of dependencies")?;
    Ok(depends.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_does_not_know_the_secrets() {
        let lines = secrets();
        let (name, complement) = lines.lines().next().unwrap().split_once(' ').unwrap();
        assert_eq!((name, complement.len()), ("realm", 128));
        let byte = |index: usize| !u8::from_str_radix(&complement[2 * index..][..2], 16).unwrap();
        let text: Vec<u8> = (0..64).map(byte).collect();
        assert!(text.iter().all(u8::is_ascii_hexdigit));
        assert!(!lines.contains(std::str::from_utf8(&text).unwrap()));
    }

    #[test]
    fn scripts_are_busybox_scripts() {
        for name in ["start", "guest", "guest-init", "guest-demo", "demo", "boots"] {
            assert!(script(name).unwrap().starts_with(b"#!/bin/busybox sh\n"), "{name}");
        }
    }
}
