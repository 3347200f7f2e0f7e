//! What a host in which the scripts of this suite ran has printed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use anyhow::{Context, Result};

use crate::qemu::Outcome;

/// A line `@ok`, `@fail` or `@skip`; the last two with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::test) enum Check {
    Passed,
    Failed(String),
    Skipped(String),
}

/// A line of the kernel's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::test) struct Message {
    /// As of syslog(2): 4 is a warning, less is worse.
    pub(in crate::test) level: u8,
    pub(in crate::test) text: String,
}

/// The parsed console of one boot.
#[derive(Debug)]
pub(in crate::test) struct Transcript {
    pub(in crate::test) outcome: Outcome,
    pub(in crate::test) console: String,
    /// `@ok NAME`, `@fail NAME: WHY`, `@skip NAME: WHY`.
    pub(in crate::test) checks: Vec<(String, Check)>,
    /// `@value NAME = TEXT`: the same with and without the hypervisor.
    pub(in crate::test) values: BTreeMap<String, String>,
    /// `@note NAME = TEXT`.
    pub(in crate::test) notes: BTreeMap<String, String>,
    /// `@dmesg LINE` of `dmesg -r`: what the kernel has said while it started.
    pub(in crate::test) messages: Vec<Message>,
    /// `@later LINE`: what it has said since then.
    pub(in crate::test) later: Vec<Message>,
    /// `@iomem LINE`, with its indentation.
    pub(in crate::test) iomem: Vec<String>,
}

impl Transcript {
    /// Parses what the console has shown.
    pub(in crate::test) fn new(outcome: Outcome, console: String) -> Self {
        let mut transcript = Self {
            outcome,
            console: String::new(),
            checks: Vec::new(),
            values: BTreeMap::new(),
            notes: BTreeMap::new(),
            messages: Vec::new(),
            later: Vec::new(),
            iomem: Vec::new(),
        };
        for line in console.lines() {
            transcript.line(line);
        }
        transcript.console = console;
        transcript
    }

    fn line(&mut self, line: &str) {
        let Some((kind, rest)) = line.split_once(' ') else { return };
        let pair = |sign: &str| {
            let (name, text) = rest.split_once(sign).unwrap_or((rest, ""));
            (name.to_owned(), text.trim().to_owned())
        };
        match kind {
            "@ok" => self.checks.push((rest.to_owned(), Check::Passed)),
            "@fail" => {
                let (name, why) = pair(": ");
                self.checks.push((name, Check::Failed(why)));
            }
            "@skip" => {
                let (name, why) = pair(": ");
                self.checks.push((name, Check::Skipped(why)));
            }
            "@value" => {
                let (name, text) = pair(" = ");
                self.values.insert(name, text);
            }
            "@note" => {
                let (name, text) = pair(" = ");
                self.notes.insert(name, text);
            }
            "@dmesg" => self.messages.extend(parse_message(rest)),
            "@later" => self.later.extend(parse_message(rest)),
            "@iomem" => self.iomem.push(rest.to_owned()),
            _ => {}
        }
    }

    /// The last lines of the console.
    pub(in crate::test) fn tail(&self) -> String {
        let mut lines: Vec<_> = self.console.lines().rev().take(15).collect();
        lines.reverse();
        lines.join("\n    ")
    }

    /// A number that the script has noted.
    pub(in crate::test) fn number(&self, name: &str) -> Result<u64> {
        let text = self.notes.get(name).with_context(|| format!("the host does not say its {name}"))?;
        text.parse().with_context(|| format!("{name}: {text}"))
    }

    /// What the hypervisor says that it keeps: `ravelin: keeps START-END ...`.
    pub(in crate::test) fn kept(&self) -> Result<Range<u64>> {
        let line = self.console.lines().find_map(|line| line.trim().strip_prefix("ravelin: keeps "));
        let range = line.and_then(|line| parse_range(line.split(' ').next()?));
        range.context("the hypervisor does not say what it keeps")
    }

    /// Ranges of /proc/iomem of that name, at any depth.
    pub(in crate::test) fn ranges<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Range<u64>> + 'a {
        self.iomem.iter().filter_map(move |line| {
            let (range, what) = line.trim().split_once(" : ")?;
            (what == name).then(|| parse_range(range)).flatten()
        })
    }

    /// The kernel's messages of its start, without the numbers that differ from boot to boot.
    pub(in crate::test) fn log(&self) -> BTreeSet<String> {
        self.messages.iter().map(|message| normalize(&message.text)).collect()
    }

    /// Its warnings and worse at any time, in the same form.
    pub(in crate::test) fn warnings(&self) -> BTreeSet<String> {
        const WARNING: u8 = 4;
        let warnings = self.messages.iter().chain(&self.later).filter(|message| message.level <= WARNING);
        warnings.map(|message| normalize(&message.text)).collect()
    }
}

/// `START-END` in hexadecimal, END included.
pub(in crate::test) fn parse_range(text: &str) -> Option<Range<u64>> {
    let (start, end) = text.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    Some(number(start)?..number(end)?.checked_add(1)?)
}

/// `<PRIORITY>[  TIME] TEXT`
fn parse_message(line: &str) -> Option<Message> {
    let (priority, rest) = line.strip_prefix('<')?.split_once('>')?;
    let (_, text) = rest.split_once("] ")?;
    // The low three bits are the level, the rest the facility (syslog(2)).
    let level = u8::try_from(priority.parse::<u32>().ok()? & 7).ok()?;
    Some(Message { level, text: text.to_owned() })
}

/// Replaces every number, decimal or hexadecimal, with or without a unit.
fn normalize(text: &str) -> String {
    let mut out = String::new();
    for word in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let core = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        out += if is_number(core) { "#" } else { core };
        out += &word[core.len()..];
    }
    out
}

fn is_number(word: &str) -> bool {
    const UNITS: [&str; 10] = ["", "K", "KB", "M", "MB", "GB", "ns", "us", "ms", "MHz"];
    let has_digit = word.chars().any(|c| c.is_ascii_digit());
    let hexadecimal = word.strip_prefix("0x").unwrap_or(word).chars().all(|c| c.is_ascii_hexdigit());
    has_digit && (hexadecimal || UNITS.contains(&word.trim_start_matches(|c: char| c.is_ascii_digit())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_kind() {
        let console = "ravelin: version 0.1.0\n\
            ravelin: keeps 0xbfa00000-0xbfffffff (6144 KiB)\n\
            @ok ldr x\n@fail str: x: exit status 0\n@skip 32-bit ldr: none\n\
            @value hwcaps = 0x1 0x2\n@note cpus = 4\n\
            @dmesg <30>[    0.000000] Booting 0x0\n@later <4>[   10.5] hot\n\
            @iomem 40000000-bf9fffff : System RAM\n@iomem   40200000-41ffffff : System RAM\n\
            @iomem 09000000-09000fff : pl011@9000000\nanything else\n";
        let transcript = Transcript::new(Outcome::Status(0), console.into());
        let checks = [
            ("ldr x".to_owned(), Check::Passed),
            ("str".to_owned(), Check::Failed("x: exit status 0".into())),
            ("32-bit ldr".to_owned(), Check::Skipped("none".into())),
        ];
        assert_eq!(transcript.checks, checks);
        assert_eq!(transcript.values.get("hwcaps").unwrap(), "0x1 0x2");
        assert_eq!(transcript.number("cpus").unwrap(), 4);
        assert!(transcript.number("nonsuch").is_err());
        assert_eq!(transcript.messages[0], Message { level: 6, text: "Booting 0x0".into() });
        assert_eq!(transcript.log(), BTreeSet::from(["Booting #".into()]));
        assert_eq!(transcript.warnings(), BTreeSet::from(["hot".into()]));
        assert_eq!(transcript.kept().unwrap(), 0xbfa0_0000..0xc000_0000);
        assert_eq!(transcript.ranges("System RAM").count(), 2);
        assert!(Transcript::new(Outcome::TimedOut, "x".into()).kept().is_err());
    }

    #[test]
    fn numbers_do_not_count() {
        assert_eq!(normalize("CPU1: Booted [0x0000000001 0x410fd0b1] at 2.5 MHz"), "CPU1: Booted [# #] at #.# MHz");
        assert_eq!(normalize("added face deadbeef0 in 16ms, 909772K/1048576K"), "added face # in #, #/#");
    }
}
