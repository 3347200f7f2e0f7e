//! `cargo xtask module`: builds the kernel module of `host-interface/linux` for a host kernel, and checks its source.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::setup::packages::Manifest;
use crate::setup::{self, CHECK_TOOLS, MODULE_TOOLS, Needs, SOURCE};
use crate::{process, workspace};

/// Options of `module`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Host kernel that it is built for
    #[arg(long, value_name = "NAME", default_value = "linux")]
    kernel: Kernel,
    /// Fail on any warning, of the compiler (W=1), of sparse or of checkpatch
    #[arg(long)]
    check: bool,
}

/// Host kernels that the module is built for, by their names in the manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    /// Debian's long-term kernel, the default host.
    #[default]
    Linux,
    /// A recent one.
    LinuxNew,
}

/// How a tool of the kernel's build is started where this machine's C library is older than it needs.
const LIBRARY: &str = "libc";

/// Types of checkpatch that are not ours to mind, and why.
const IGNORED: [(&str, &str); 4] = [
    ("LINUX_VERSION_CODE", "one source for several kernels has to tell them apart"),
    ("CONSTANT_COMPARISON", "that code is taken for a constant, and stands on the left everywhere"),
    ("ALLOC_WITH_SIZEOF", "only late updates of the older kernel have kzalloc_obj"),
    ("CAMELCASE", "the kernel's own functions for flags of pages have such names"),
];

impl Kernel {
    /// All of them.
    pub(crate) const ALL: [Self; 2] = [Self::Linux, Self::LinuxNew];

    /// The name of the kernel in the manifest.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Linux => "linux",
            Self::LinuxNew => "linux-new",
        }
    }

    /// The name of the drivers that the host loads, in the manifest.
    pub(crate) const fn drivers(self) -> &'static str {
        match self {
            Self::Linux => "linux-modules",
            Self::LinuxNew => "linux-new-modules",
        }
    }

    /// What the module is built with, in the manifest. All but the library lie in one tree.
    pub(crate) const fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Linux => &["linux-headers", "linux-headers-common", "linux-kbuild"],
            Self::LinuxNew => &["linux-new-headers", "linux-new-headers-common", "linux-new-kbuild", LIBRARY],
        }
    }

    /// Options of the kernel's configuration that its headers have and that our compiler does not support: the kernel was
    /// built with a newer one. Type information for BPF needs another program, and modules load without it.
    const fn overrides(self) -> &'static [&'static str] {
        match self {
            Self::Linux => &["CONFIG_DEBUG_INFO_BTF_MODULES="],
            Self::LinuxNew => &["CONFIG_DEBUG_INFO_BTF_MODULES=", "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="],
        }
    }

    /// Whether its headers have what `make C=2` needs.
    const fn has_sparse(self) -> bool {
        matches!(self, Self::Linux)
    }
}

/// `cargo xtask module`.
pub(crate) fn module(options: &Options) -> Result<ExitCode> {
    if options.check {
        remove_objects(options.kernel)?;
    }
    let built = build(options.kernel)?;
    println!("{}", built.module.display());
    if options.check {
        let mut warnings = built.warnings;
        if options.kernel.has_sparse() {
            warnings.extend(sparse(options.kernel)?);
        }
        warnings.extend(checkpatch()?);
        ensure!(warnings.is_empty(), "{} warnings:\n{}", warnings.len(), warnings.join("\n"));
    } else {
        built.warnings.iter().for_each(|warning| eprintln!("{warning}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// A module and what the compiler had to say about it.
pub(crate) struct Built {
    /// The `.ko` file.
    pub(crate) module: PathBuf,
    /// Lines with warnings; only of what had to be compiled.
    pub(crate) warnings: Vec<String>,
}

/// Builds the module.
pub(crate) fn build(kernel: Kernel) -> Result<Built> {
    setup::ensure(&Needs { tools: &[MODULE_TOOLS], packages: kernel.packages(), ..Needs::default() })?;
    let copy = copy(kernel)?;
    let warnings = make(kernel, &copy, &["W=1"])?;
    Ok(Built { module: copy.join("ravelin.ko"), warnings })
}

/// Makes the next build start from the beginning, so that every warning appears.
pub(crate) fn remove_objects(kernel: Kernel) -> Result<()> {
    let dir = directory(kernel)?;
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}

/// What sparse says about the source.
pub(crate) fn sparse(kernel: Kernel) -> Result<Vec<String>> {
    setup::ensure(&Needs { tools: &[MODULE_TOOLS, CHECK_TOOLS], packages: kernel.packages(), ..Needs::default() })?;
    make(kernel, &copy(kernel)?, &["W=1", "C=2"])
}

/// What checkpatch says about the source.
pub(crate) fn checkpatch() -> Result<Vec<String>> {
    setup::ensure(&Needs { tools: &[CHECK_TOOLS], packages: &[SOURCE], ..Needs::default() })?;
    let source = sources()?;
    let files = workspace::files_below(&source)?;
    let is_c = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "c" || extension == "h");
    let ignored = IGNORED.map(|(kind, _)| kind).join(",");
    let mut checkpatch = Command::new("perl");
    checkpatch.arg(checkpatch_program()?).args(["--no-tree", "--strict", "--terse", "--no-summary", "--show-types"]);
    checkpatch.args(["--ignore", &ignored, "--file"]).args(files.iter().filter(is_c));
    // It leaves a list of names where it runs, and ends with a status of failure when it has something to say.
    checkpatch.current_dir(workspace::output_dir()?);
    let output = checkpatch.stdin(Stdio::null()).output().context("cannot start perl")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<_> = said.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() || !lines.is_empty(), "checkpatch: {}", errors.trim());
    Ok(lines)
}

/// The module's source.
fn sources() -> Result<PathBuf> {
    let source = workspace::root().join("host-interface/linux");
    ensure!(source.join("Kbuild").is_file(), "{} has no Kbuild", source.display());
    Ok(source)
}

fn directory(kernel: Kernel) -> Result<PathBuf> {
    Ok(workspace::output_dir()?.join("module").join(kernel.name()))
}

/// A copy of the source beside the header that it includes, since Kbuild puts its objects there.
fn copy(kernel: Kernel) -> Result<PathBuf> {
    let dir = directory(kernel)?;
    mirror(&workspace::root().join("host-interface/include"), &dir.join("include"))?;
    mirror(&sources()?, &dir.join("linux"))?;
    Ok(dir.join("linux"))
}

/// Copies what has changed, and removes what the last copy had and the source has no more.
fn mirror(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let files = workspace::files_below(from)?;
    let names: BTreeSet<&Path> = files.iter().filter_map(|file| file.strip_prefix(from).ok()).collect();
    let list = to.join(".copied");
    for old in fs::read_to_string(&list).unwrap_or_default().lines().filter(|old| !names.contains(Path::new(old))) {
        let _ = fs::remove_file(to.join(old));
    }
    for name in &names {
        let (source, copy) = (from.join(name), to.join(name));
        let contents = fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?;
        if fs::read(&copy).is_ok_and(|known| known == contents) {
            continue;
        }
        fs::create_dir_all(copy.parent().unwrap_or(to))?;
        fs::write(&copy, contents)?;
    }
    fs::write(list, names.iter().map(|name| format!("{}\n", name.display())).collect::<String>())?;
    Ok(())
}

/// Runs the kernel's build for the module, and returns the warnings that it prints.
fn make(kernel: Kernel, module: &Path, arguments: &[&str]) -> Result<Vec<String>> {
    let headers = headers(kernel)?;
    let mut make = Command::new("make");
    make.arg("--silent").arg("-C").arg(headers).arg(format!("M={}", module.display()));
    make.args(["ARCH=arm64", "CROSS_COMPILE=aarch64-linux-gnu-", "CC=aarch64-linux-gnu-gcc"]);
    make.args(kernel.overrides()).args(arguments).arg("modules");
    let output = make.stdin(Stdio::null()).output().context("cannot start make")?;
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    ensure!(output.status.success(), "{} failed\n{}", process::line(&make), text.trim());
    Ok(parse_warnings(&text))
}

/// Lines of the compiler, of sparse and of modpost. The build says more, of the compiler's version for instance.
fn parse_warnings(text: &str) -> Vec<String> {
    let is_warning = |line: &&str| line.contains(": warning:") || line.starts_with("WARNING: modpost");
    text.lines().filter(is_warning).map(str::to_owned).collect()
}

/// The directory of headers, made fit for its place: Debian's packages expect to lie in /usr/src.
fn headers(kernel: Kernel) -> Result<PathBuf> {
    let manifest = Manifest::load()?;
    let [headers, ..] = kernel.packages() else { bail!("no headers") };
    let root = manifest.ensure(headers)?;
    let source = root.join("usr/src");
    let ends = |path: &PathBuf| path.to_string_lossy().ends_with("-arm64");
    let dirs = fs::read_dir(&source).with_context(|| format!("cannot list {}", source.display()))?;
    let dir = dirs.flatten().map(|entry| entry.path()).find(ends).context("the tree of headers has none for arm64")?;
    let makefile = dir.join("Makefile");
    replace(&makefile, &relocate(&fs::read_to_string(&makefile)?, &root))?;
    if kernel.packages().contains(&LIBRARY) {
        let library = manifest.ensure(LIBRARY)?.join("usr/lib/x86_64-linux-gnu");
        let modpost = dir.join("scripts/mod/modpost");
        let loader = library.join("ld-linux-x86-64.so.2");
        let script = format!(
            "#!/bin/sh\nexec {} --library-path {} \"$0.real-lsb-64\" \"$@\"\n",
            loader.display(),
            library.display()
        );
        replace(&modpost, &script)?;
    }
    Ok(dir)
}

/// Writes a file of the cache if it has other contents, at once as far as other programs can see.
fn replace(path: &Path, contents: &str) -> Result<()> {
    if fs::read(path).is_ok_and(|known| known == contents.as_bytes()) {
        return Ok(());
    }
    let staged = path.with_added_extension(std::process::id().to_string());
    // A copy has the permissions of what it replaces.
    fs::copy(path, &staged).with_context(|| format!("cannot copy {}", path.display()))?;
    fs::write(&staged, contents)?;
    fs::rename(&staged, path)?;
    Ok(())
}

/// Puts the directory of a tree into the paths of a makefile.
fn relocate(makefile: &str, root: &Path) -> String {
    let line = |line: &str| match line.split_once("/usr/src/") {
        Some((before, after)) => {
            let word = before.split_once('/').map_or(before, |(word, _)| word);
            format!("{word}{}/usr/src/{after}\n", root.display())
        }
        None => format!("{line}\n"),
    };
    makefile.lines().map(line).collect()
}

/// checkpatch and its lists, taken out of the kernel's source once.
fn checkpatch_program() -> Result<PathBuf> {
    const FILES: [&str; 3] = ["scripts/checkpatch.pl", "scripts/spelling.txt", "scripts/const_structs.checkpatch"];
    let manifest = Manifest::load()?;
    let dir = workspace::cache_dir()?.join(format!("checkpatch_{}", manifest.version(SOURCE)?));
    let program = dir.join(FILES[0]);
    if !program.is_file() {
        let staging = dir.with_added_extension(std::process::id().to_string());
        fs::create_dir_all(&staging)?;
        let mut tar = Command::new("tar");
        tar.arg("--directory").arg(&staging).args(["--strip-components=1", "--wildcards", "-xf"]);
        process::run(tar.arg(manifest.ensure(SOURCE)?).args(FILES.map(|file| format!("*/{file}"))))?;
        // Another program may have been faster.
        if fs::rename(&staging, &dir).is_err() {
            fs::remove_dir_all(&staging)?;
        }
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makefiles_move_with_the_cache() {
        let debian = "KBUILD_OUTPUT=/usr/src/linux-headers-7\ninclude /usr/src/linux-headers-7-common/Makefile\n";
        let moved = relocate(debian, Path::new("/a"));
        assert_eq!(
            moved,
            "KBUILD_OUTPUT=/a/usr/src/linux-headers-7\ninclude /a/usr/src/linux-headers-7-common/Makefile\n"
        );
        assert_eq!(relocate(&moved, Path::new("/b/c")), moved.replace("/a/", "/b/c/"));
        assert_eq!(relocate("all:\n", Path::new("/a")), "all:\n");
    }

    #[test]
    fn warnings_of_the_source_count() {
        let text = "warning: the compiler differs from the one used to build the kernel\n\
            /x/main.c:3:5: warning: unused variable\nWARNING: modpost: missing MODULE_LICENSE()\n  CC [M] main.o\n\
            main.c:10:1: warning: context imbalance\n";
        assert_eq!(parse_warnings(text).len(), 3);
    }

    #[test]
    fn a_copy_follows_its_source() {
        let scratch = crate::qemu::Scratch::new().unwrap();
        let (from, to) = (scratch.path("from"), scratch.path("to"));
        fs::create_dir_all(from.join("sub")).unwrap();
        fs::write(from.join("a.c"), "a").unwrap();
        fs::write(from.join("sub/b.c"), "b").unwrap();
        mirror(&from, &to).unwrap();
        fs::write(to.join("a.o"), "object").unwrap();
        fs::remove_file(from.join("sub/b.c")).unwrap();
        fs::write(from.join("a.c"), "new").unwrap();
        mirror(&from, &to).unwrap();
        assert_eq!(fs::read(to.join("a.c")).unwrap(), b"new");
        assert!(to.join("a.o").exists() && !to.join("sub/b.c").exists());
    }
}
