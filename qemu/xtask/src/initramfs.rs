//! The root file system of the default host: busybox, an init script, and what a test adds.

use std::num::NonZero;

use anyhow::{Result, ensure};

use crate::cpio::Archive;

/// What init does once the file systems are mounted.
pub(crate) enum Task<'a> {
    /// A shell on the console; the machine is powered off when it ends.
    Shell,
    /// Runs a command and reports its status on the console behind the marker.
    Command {
        /// Shell command or script.
        script: &'a str,
        /// Text that precedes the status on the console.
        marker: &'a str,
    },
}

/// A file that is added to the root file system.
#[derive(Clone, Debug)]
pub(crate) struct ExtraFile {
    /// Path below the root, without a leading slash.
    pub(crate) path: String,
    /// Contents; the file is executable.
    pub(crate) contents: Vec<u8>,
}

const PRELUDE: &str = "#!/bin/busybox sh
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
hostname ravelin
export HOME=/root PATH=/bin:/sbin:/usr/bin:/usr/sbin
cd /root
[ -e /lib/ravelin/start ] && sh /lib/ravelin/start
";

/// Builds the archive. `terminal` has the rows and columns of the user's terminal, and its type.
pub(crate) fn build(
    busybox: &[u8],
    task: &Task<'_>,
    terminal: Option<&Terminal>,
    extra: &[ExtraFile],
) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for dir in ["bin", "sbin", "usr", "usr/bin", "usr/sbin", "dev", "proc", "sys", "tmp", "root"] {
        archive.directory(dir);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, busybox);
    for file in extra {
        // What is mounted there would hide it.
        let hidden = ["dev/", "proc/", "sys/", "tmp/", "/"].iter().any(|dir| file.path.starts_with(dir));
        ensure!(!hidden, "{}: not a place for a file of the initramfs", file.path);
        archive.file(&file.path, 0o755, &file.contents);
    }
    let mut init = String::from(PRELUDE);
    match task {
        Task::Shell => {
            if let Some(terminal) = terminal {
                let Terminal { rows, columns, kind } = terminal;
                init += &format!("export TERM={kind}\nstty rows {rows} cols {columns} </dev/console\n");
            }
            init += "setsid cttyhack sh -l\n";
        }
        Task::Command { script, marker } => {
            archive.file("exec", 0o755, script.as_bytes());
            // Kernel messages must not fall into the marker. The last stty waits until the line has left the UART,
            // which a power-off would cut.
            init += "sh /exec </dev/null\nstatus=$?\ndmesg -n 1\n";
            init += &format!("echo \"{marker}$status\"\nstty sane </dev/console\n");
        }
    }
    init += "poweroff -f\n";
    archive.file("init", 0o755, init.as_bytes());
    Ok(archive.finish())
}

/// The user's terminal.
pub(crate) struct Terminal {
    /// Height in lines.
    pub(crate) rows: NonZero<u16>,
    /// Width in characters.
    pub(crate) columns: NonZero<u16>,
    /// `$TERM`; letters, digits and dashes only.
    pub(crate) kind: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(archive: &[u8]) -> String {
        String::from_utf8_lossy(archive).into_owned()
    }

    #[test]
    fn a_command_reports_its_status() {
        let task = Task::Command { script: "uname -a", marker: "MARK:" };
        let archive = text(&build(b"busybox", &task, None, &[]).unwrap());
        assert!(archive.contains("uname -a"));
        assert!(archive.contains("echo \"MARK:$status\""));
        assert!(!archive.contains("cttyhack"));
    }

    #[test]
    fn extra_files_stay_visible() {
        let file = |path: &str| ExtraFile { path: path.into(), contents: b"probe".to_vec() };
        for path in ["bin/probe", "lib/a/b", "root/x"] {
            assert!(build(b"", &Task::Shell, None, &[file(path)]).is_ok(), "{path}");
        }
        for path in ["/bin/probe", "tmp/a", "dev/x", "proc/1"] {
            assert!(build(b"", &Task::Shell, None, &[file(path)]).is_err(), "{path}");
        }
    }
}
