//! Debian's package manager, in two roles: it installs programs on this machine, and it downloads packages of other
//! suites and of arm64 through a private configuration that leaves the system alone. It verifies signatures in both.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{process, workspace};

/// Packages that are taken from backports, since the release has them too old.
const FROM_BACKPORTS: &[&str] = &["qemu-system-arm"];

/// Names a Debian mirror for a machine whose apt sources have none.
const MIRROR_VARIABLE: &str = "RAVELIN_DEBIAN_MIRROR";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const BACKPORTS_LIST: &str = "/etc/apt/sources.list.d/ravelin-backports.list";

/// One suite of one archive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    suite: String,
    signed_by: Option<String>,
}

/// Installs packages on this machine, as root or through sudo.
///
/// # Errors
///
/// There is no apt, or no way to become root, or apt fails.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    ensure!(workspace::program("apt-get").is_some(), "install it by hand; there is no apt-get here");
    let root = process::output(Command::new("id").arg("-u"))?.trim() == "0";
    ensure!(root || workspace::program("sudo").is_some(), "installing needs root, or sudo");
    let privileged = |program: &str| {
        if root {
            return Command::new(program);
        }
        let mut command = Command::new("sudo");
        command.arg(program);
        command
    };
    let apt_get = || {
        let mut command = privileged("env");
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]);
        command
    };

    println!("Installing with apt: {}", packages.join(" "));
    let sources = machine_sources()?;
    let release = release()?;
    let backports = format!("{release}-backports");
    // Releases after bookworm have a new enough QEMU themselves.
    let wants_backports = release == "bookworm" && packages.iter().any(|package| FROM_BACKPORTS.contains(package));
    if wants_backports && !sources.iter().any(|source| source.suite == backports) {
        let mirror = mirror(&sources, &release)?;
        let options = mirror.signed_by.as_ref().map_or(String::new(), |key| format!("[signed-by={key}] "));
        let line = format!("deb {options}{} {backports} main\n", mirror.uri);
        println!("Adding to apt's sources, in {BACKPORTS_LIST}: {}", line.trim());
        let staged = workspace::cache_dir()?.join("backports.list");
        fs::write(&staged, line)?;
        process::run(privileged("install").args(["-m", "644"]).arg(&staged).arg(BACKPORTS_LIST))?;
    }
    process::run(apt_get().arg("update"))?;
    let mut install = apt_get();
    install.args(["install", "--yes", "--no-install-recommends"]);
    if wants_backports {
        install.args(["--target-release", &backports]);
    }
    process::run(install.args(packages))
}

/// A private apt: its own lists, cache and sources, for one architecture.
pub(crate) struct PrivateApt {
    dir: PathBuf,
    architecture: String,
}

/// A package as its index describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Version.
    pub(crate) version: String,
    /// SHA-256 of the package file, in hexadecimal.
    pub(crate) sha256: String,
    /// Size of the package file in bytes.
    pub(crate) size: u64,
}

impl PrivateApt {
    /// Fetches the indexes of Debian suites, once in the life of this program.
    pub(crate) fn new(suites: &[String], architecture: &str) -> Result<Self> {
        static FETCHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
        let missing: Vec<_> = ["apt-get", "apt-cache", "dpkg-deb", "tar"]
            .into_iter()
            .filter(|program| workspace::program(program).is_none())
            .collect();
        ensure!(missing.is_empty(), "downloading needs {}, not found here", missing.join(", "));
        let dir = workspace::cache_dir()?.join("apt").join(format!("{}-{architecture}", suites.join("-")));
        let apt = Self { dir, architecture: architecture.to_owned() };
        let mut fetched = FETCHED.lock().map_err(|_| anyhow!("another thread failed to fetch indexes"))?;
        if fetched.contains(&apt.dir) {
            return Ok(apt);
        }
        for dir in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(apt.dir.join(dir))?;
        }
        fs::write(apt.dir.join("status"), "")?;
        let machine = machine_sources()?;
        let mut list = String::new();
        let mut lacking = None;
        for suite in suites {
            let mirror = match mirror(&machine, suite) {
                Ok(mirror) => mirror,
                Err(error) => {
                    eprintln!("warning: {error:#}");
                    lacking = Some(error);
                    continue;
                }
            };
            let key = mirror.signed_by.or_else(|| Path::new(KEYRING).is_file().then(|| KEYRING.to_owned()));
            let options = key.map_or(String::new(), |key| format!("[signed-by={key}] "));
            list += &format!("deb {options}{} {suite} main\n", mirror.uri);
        }
        // The others may have what is wanted.
        if let (true, Some(error)) = (list.is_empty(), lacking) {
            return Err(error);
        }
        fs::write(apt.dir.join("sources.list"), list)?;
        println!("Fetching package indexes: {}", suites.join(", "));
        process::output(apt.command("apt-get").args(["-q", "update", "--error-on=any"]))?;
        fetched.push(apt.dir.clone());
        Ok(apt)
    }

    /// Names of packages that begin and end so.
    pub(crate) fn names(&self, prefix: &str, suffix: &str) -> Result<Vec<String>> {
        let all = process::output(self.command("apt-cache").arg("pkgnames").arg(prefix))?;
        Ok(all.lines().filter(|name| name.ends_with(suffix)).map(str::to_owned).collect())
    }

    /// Versions of a package, newest first.
    pub(crate) fn candidates(&self, package: &str) -> Result<Vec<Candidate>> {
        // An unknown package is an error for `apt-cache show`; here it means that there is none.
        let shown = self.command("apt-cache").args(["show", package]).stdin(Stdio::null()).output()?;
        Ok(parse_candidates(&String::from_utf8_lossy(&shown.stdout)))
    }

    /// Downloads one version of a package into a directory, with a progress bar.
    pub(crate) fn download(&self, package: &str, candidate: &Candidate, dir: &Path) -> Result<PathBuf> {
        fs::create_dir_all(dir)?;
        let bar = ProgressBar::new(candidate.size);
        let style = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        bar.set_style(ProgressStyle::with_template(style)?.progress_chars("=> "));
        bar.set_message(format!("{package} {}", candidate.version));
        if bar.is_hidden() {
            println!("Downloading {package} {} ({} MiB)", candidate.version, candidate.size >> 20);
        }
        let log = dir.join("apt.log");
        let mut child = self
            .command("apt-get")
            // apt reports its progress in percent on the descriptor with this number.
            .args(["-qq", "-o", "APT::Status-Fd=1", "download"])
            .arg(format!("{package}={}", candidate.version))
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .context("cannot start apt-get")?;
        let progress = BufReader::new(child.stdout.take().context("apt-get has no output")?);
        for line in progress.lines().map_while(Result::ok) {
            if let Some(percent) = parse_progress(&line) {
                bar.set_position((candidate.size as f64 * percent / 100.0) as u64);
            }
        }
        let status = child.wait()?;
        bar.finish_and_clear();
        if !status.success() {
            bail!("download of {package} failed: {status}\n{}", fs::read_to_string(&log)?.trim());
        }
        fs::remove_file(&log)?;
        let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
        fs::read_dir(dir)?
            .flatten()
            .map(|entry| entry.path())
            .find(is_package)
            .with_context(|| format!("apt-get left no package in {}", dir.display()))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let dir = self.dir.display();
        // As options of the command line they win over the machine's configuration, whose proxies and so on stay.
        for option in [
            format!("Dir::State={dir}/state"),
            format!("Dir::State::status={dir}/status"),
            format!("Dir::Cache={dir}/cache"),
            format!("Dir::Etc::sourcelist={dir}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".into(),
            "Dir::Etc::preferences=/dev/null".into(),
            "Dir::Etc::preferencesparts=/dev/null".into(),
            format!("APT::Architecture={}", self.architecture),
            format!("APT::Architectures::={}", self.architecture),
            "APT::Default-Release=".into(),
            "APT::Sandbox::User=".into(),
            "Acquire::Check-Valid-Until=false".into(),
            "Acquire::Languages=none".into(),
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".into(),
            // Hooks of the machine, which a user may not be able to run.
            "APT::Update::Post-Invoke-Success=".into(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }
}

/// Unpacks one file of a package. The name may end in `*`.
pub(crate) fn extract(package: &Path, member: &str, to: &Path) -> Result<()> {
    untar(package, Command::new("tar").args(["--to-stdout", "--wildcards", member]).stdout(File::create(to)?))
}

/// Unpacks the members of a package that match these patterns, all of them if there are none, below a directory.
pub(crate) fn unpack(package: &Path, members: &[String], to: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.arg("--directory").arg(to).args(["--no-same-owner", "--wildcards"]).args(members);
    untar(package, &mut tar)
}

fn untar(package: &Path, tar: &mut Command) -> Result<()> {
    let mut unpack = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let archive = unpack.stdout.take().context("dpkg-deb has no output")?;
    let extracted = process::run(tar.arg("--extract").stdin(archive));
    let unpacked = unpack.wait()?;
    extracted?;
    ensure!(unpacked.success(), "dpkg-deb failed: {unpacked}");
    Ok(())
}

/// Code name of the Debian release of this machine.
fn release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("/etc/os-release names no release")?.trim_matches('"').to_owned())
}

/// The archive of a suite: what the machine's own sources use for that suite, else what they use for Debian itself.
fn mirror(sources: &[Source], suite: &str) -> Result<Source> {
    let named = |uri: String| Source { uri, suite: suite.to_owned(), signed_by: None };
    if let Some(uri) = std::env::var(MIRROR_VARIABLE).ok().filter(|uri| !uri.is_empty()) {
        let uri = uri.trim_end_matches('/');
        return Ok(named(if suite.ends_with("-security") { format!("{uri}-security") } else { uri.to_owned() }));
    }
    if let Some(source) = sources.iter().find(|source| source.suite == suite) {
        return Ok(source.clone());
    }
    let wanted = if suite.ends_with("-security") { "/debian-security" } else { "/debian" };
    let same_kind = |source: &&Source| source.uri.trim_end_matches('/').ends_with(wanted);
    sources
        .iter()
        .find(same_kind)
        .map(|source| Source { suite: suite.to_owned(), ..source.clone() })
        .with_context(|| format!("apt's sources have no Debian mirror for {suite}; set {MIRROR_VARIABLE} to one"))
}

/// The machine's apt sources, in both of their formats.
fn machine_sources() -> Result<Vec<Source>> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(dir) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut parts: Vec<_> = dir.flatten().map(|entry| entry.path()).collect();
        parts.sort();
        paths.extend(parts);
    }
    let mut sources = Vec::new();
    for path in paths {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(parse_one_line(&text)),
            Some("sources") => sources.extend(parse_deb822(&text)),
            _ => {}
        }
    }
    Ok(sources)
}

/// `deb [options] uri suite component...`
fn parse_one_line(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for line in text.lines() {
        let Some(rest) = line.trim().strip_prefix("deb ") else { continue };
        let rest = rest.trim();
        let (options, rest) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((options, rest)) => (options, rest),
            None => ("", rest),
        };
        let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        let mut words = rest.split_whitespace();
        if let (Some(uri), Some(suite)) = (words.next(), words.next())
            && words.any(|component| component == "main")
        {
            let (uri, suite) = (uri.to_owned(), suite.to_owned());
            sources.push(Source { uri, suite, signed_by: signed_by.map(str::to_owned) });
        }
    }
    sources
}

/// Stanzas of `Field: value` lines.
fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let text: String = text.lines().filter(|line| !line.starts_with('#')).flat_map(|line| [line, "\n"]).collect();
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            stanza.lines().find_map(|line| {
                let (field, value) = line.split_once(':')?;
                field.eq_ignore_ascii_case(name).then_some(value.trim())
            })
        };
        let disabled = field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        let has = |name, word| field(name).is_some_and(|value| value.split_whitespace().any(|one| one == word));
        if disabled || !has("Types", "deb") || !has("Components", "main") {
            continue;
        }
        // A key may also stand in the file itself, over several lines; then the archive keyring has to do.
        let signed_by = field("Signed-By").filter(|key| key.starts_with('/')).map(str::to_owned);
        for uri in field("URIs").unwrap_or("").split_whitespace() {
            for suite in field("Suites").unwrap_or("").split_whitespace() {
                sources.push(Source { uri: uri.into(), suite: suite.into(), signed_by: signed_by.clone() });
            }
        }
    }
    sources
}

fn parse_candidates(text: &str) -> Vec<Candidate> {
    let stanza = |stanza: &str| {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        Some(Candidate {
            version: field("Version:")?.to_owned(),
            sha256: field("SHA256:")?.to_owned(),
            size: field("Size:")?.parse().ok()?,
        })
    };
    text.split("\n\n").filter_map(stanza).collect()
}

/// `dlstatus:INDEX:PERCENT:TEXT`
fn parse_progress(line: &str) -> Option<f64> {
    line.strip_prefix("dlstatus:")?.split(':').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: &str = "Types: deb deb-src
# comment: with a colon
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/key.gpg

Types: deb
URIs: http://mirror.example/debian-security/
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://other.example/debian
Suites: sid
Components: main
";

    #[test]
    fn both_formats_of_sources() {
        let sources = parse_deb822(SOURCES);
        assert_eq!(sources.len(), 3);
        assert_eq!(sources[1].suite, "bookworm-updates");
        assert_eq!(sources[0].signed_by.as_deref(), Some("/usr/share/keyrings/key.gpg"));
        let lines = "# deb http://no.example/debian sid main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main
deb-src http://mirror.example/debian bookworm main
deb http://vendor.example/apt stable vendor
deb http://mirror.example/debian bookworm-backports contrib main\n";
        let sources = parse_one_line(lines);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].signed_by.as_deref(), Some("/k.gpg"));
        assert_eq!((sources[1].suite.as_str(), &sources[1].signed_by), ("bookworm-backports", &None));
    }

    #[test]
    fn other_suites_come_from_the_same_mirror() {
        let sources = parse_deb822(SOURCES);
        assert_eq!(mirror(&sources, "trixie-backports").unwrap().uri, "http://mirror.example/debian");
        assert_eq!(mirror(&sources, "trixie-security").unwrap().uri, "http://mirror.example/debian-security/");
        assert!(mirror(&[], "bookworm").unwrap_err().to_string().contains(MIRROR_VARIABLE));
    }

    #[test]
    fn package_indexes() {
        let text = "Package: a\nVersion: 2-1\nSize: 10\nSHA256: ab\n\nPackage: a\nVersion: 1-1\nSize: 9\nSHA256: cd\n";
        let candidates = parse_candidates(text);
        assert_eq!(candidates.len(), 2);
        assert_eq!(candidates[1], Candidate { version: "1-1".into(), sha256: "cd".into(), size: 9 });
        assert!(parse_candidates("").is_empty());
    }

    #[test]
    fn progress_lines() {
        assert_eq!(parse_progress("dlstatus:1:20.5000:Retrieving file 1 of 1"), Some(20.5));
        assert_eq!(parse_progress("pmstatus:x:1:y"), None);
    }
}
