//! Builds the EL2 image and makes a flat binary of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SectionFlags, SectionKind, elf};

use crate::arm64_image::Header;
use crate::setup::rust;
use crate::{process, workspace};

/// Bytes of text, rodata and data that the image may have.
pub(crate) const BUDGET: u64 = 252 * 1024;

/// Which image to build.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Variant {
    /// The build that checks its tables after each hypercall.
    pub(crate) checked: bool,
    /// The build that can write a trace. The checking build can, too.
    pub(crate) trace: bool,
    /// The profile `hyp-dev` instead of release.
    pub(crate) dev: bool,
}

/// A built image.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// With symbols and debug information.
    pub(crate) elf: PathBuf,
    /// What is loaded.
    pub(crate) binary: PathBuf,
    /// Sizes of its sections.
    pub(crate) sizes: Sizes,
}

/// Bytes of the image by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Code.
    pub(crate) text: u64,
    /// Constants, relocations, unwind tables.
    pub(crate) rodata: u64,
    /// Initialised variables.
    pub(crate) data: u64,
    /// Variables that start as zero; not in the file.
    pub(crate) bss: u64,
}

impl Sizes {
    /// What counts against [`BUDGET`].
    pub(crate) fn total(self) -> u64 {
        self.text + self.rodata + self.data
    }
}

impl std::fmt::Display for Sizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { text, rodata, data, bss } = self;
        write!(f, "text {text}, rodata {rodata}, data {data}: {} of {BUDGET} bytes", self.total())?;
        write!(f, " ({} %); bss {bss}", self.total() * 100 / BUDGET)
    }
}

/// Builds the image and its flat binary, `target/ravelin/<variant>/ravelin.{elf,bin}`, once in a run of this program.
pub(crate) fn build(variant: Variant) -> Result<Image> {
    static BUILT: Mutex<Vec<(Variant, Image)>> = Mutex::new(Vec::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, image)) = built.iter().find(|(other, _)| *other == variant) {
        return Ok(image.clone());
    }
    let image = build_now(variant)?;
    built.push((variant, image.clone()));
    Ok(image)
}

fn build_now(variant: Variant) -> Result<Image> {
    let mut cargo = rust::cargo("build")?;
    cargo.args(["--package", "ravelin"]);
    let profile = if variant.dev { "hyp-dev" } else { "release" };
    cargo.args(["--profile", profile]);
    let feature = match variant {
        Variant { checked: true, .. } => Some("checked"),
        Variant { trace: true, .. } => Some("trace"),
        _ => None,
    };
    let stacks = variant.dev.then_some("deep-stacks");
    cargo.args([feature, stacks].into_iter().flatten().flat_map(|feature| ["--features", feature]));
    process::run(&mut cargo)?;

    let built = workspace::target_dir()?.join(rust::BARE_METAL).join(profile).join("ravelin");
    // All variants come out of cargo under one name; a copy each keeps the symbols of a running image.
    let name = [Some(profile), feature].into_iter().flatten().collect::<Vec<_>>().join("-");
    let dir = workspace::output_dir()?.join(name);
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let elf = dir.join("ravelin.elf");
    fs::copy(&built, &elf).with_context(|| format!("cannot copy {}", built.display()))?;

    let (binary, sizes) = flatten(&fs::read(&elf)?).with_context(|| elf.display().to_string())?;
    let header = Header::parse(&binary)?.context("the image does not begin with an arm64 Image header")?;
    ensure!(header.image_size >= sizes.bss, "the Image header's size does not count the BSS");
    let path = dir.join("ravelin.bin");
    fs::write(&path, &binary).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Image { elf, binary: path, sizes })
}

/// Builds the EL1 payload of the tests; returns its flat binary.
pub(crate) fn payload() -> Result<PathBuf> {
    flat_binary("ravelin-payload", "payload.bin")
}

/// Builds the guest of the tests; returns its flat binary.
pub(crate) fn guest() -> Result<PathBuf> {
    flat_binary("ravelin-guest", "guest.bin")
}

fn flat_binary(package: &str, name: &str) -> Result<PathBuf> {
    process::run(rust::cargo("build")?.args(["--quiet", "--release", "--package", package]))?;
    let elf = workspace::target_dir()?.join(rust::BARE_METAL).join("release").join(package);
    let (binary, _) = flatten(&fs::read(&elf).with_context(|| elf.display().to_string())?)?;
    let path = workspace::output_dir()?.join(name);
    fs::write(&path, binary).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Makes a flat binary, which begins at the lowest loaded address, of an ELF file. Its BSS is left out.
pub(crate) fn flatten(file: &[u8]) -> Result<(Vec<u8>, Sizes)> {
    let file = ElfFile64::<object::Endianness>::parse(file).context("not a 64-bit ELF file")?;
    let base = file.segments().map(|segment| segment.address()).min().context("nothing to load")?;
    let mut binary = Vec::new();
    for segment in file.segments() {
        let data = segment.data()?;
        let start = usize::try_from(segment.address() - base)?;
        let end = start + data.len();
        ensure!(end <= 64 << 20, "a segment lies {start:#x} bytes behind the first one");
        if binary.len() < end {
            binary.resize(end, 0);
        }
        binary[start..end].copy_from_slice(data);
    }
    ensure!(!binary.is_empty(), "nothing to load");

    let mut sizes = Sizes::default();
    for section in file.sections() {
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else { bail!("a section without ELF flags") };
        let has = |flag: elf::SectionFlags| sh_flags & flag != elf::SectionFlags(0);
        if !has(elf::SHF_ALLOC) {
            continue;
        }
        let size = if section.kind() == SectionKind::UninitializedData {
            &mut sizes.bss
        } else if has(elf::SHF_EXECINSTR) {
            &mut sizes.text
        } else if has(elf::SHF_WRITE) {
            &mut sizes.data
        } else {
            &mut sizes.rodata
        };
        *size += section.size();
    }
    Ok((binary, sizes))
}

/// Link-time address of a symbol, by its exact name.
pub(crate) fn symbol(file: &[u8], name: &str) -> Result<u64> {
    let file = ElfFile64::<object::Endianness>::parse(file).context("not a 64-bit ELF file")?;
    let symbol = file.symbol_by_name(name).with_context(|| format!("the image has no symbol {name}"))?;
    Ok(symbol.address())
}

/// Reads the Image header of a file, if it has one, and the size of its memory.
pub(crate) fn footprint(path: &Path) -> Result<(Option<Header>, u64)> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let header = Header::parse(&bytes).with_context(|| path.display().to_string())?;
    // A flat binary does not say how much BSS and stack it uses behind its end.
    const SLACK: u64 = 2 << 20;
    let size = header.map_or(bytes.len() as u64 + SLACK, |header| header.image_size);
    Ok((header, size))
}
