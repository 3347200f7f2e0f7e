//! `cargo xtask gdb`: a machine that waits for a debugger, and the debugger with the hypervisor's symbols.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::run::{Options, Ready};
use crate::setup::{self, Needs};
use crate::{qemu, workspace};

/// Starts QEMU, stopped before its first instruction, and gdb on it.
pub(crate) fn gdb(options: &Options) -> Result<ExitCode> {
    setup::ensure(&Needs { gdb: true, ..Needs::default() })?;
    let ready = Ready::new(options)?;
    let prepared = qemu::prepare(&ready.boot, &ready.scratch)?;
    let console = workspace::output_dir()?.join("gdb-console.log");
    let socket = ready.scratch.path("gdb");
    let mut qemu = prepared.command;
    qemu.arg("-S").args(["-serial", "stdio"]);
    qemu.arg("-chardev").arg(format!("socket,path={},server=on,wait=off,id=gdb", socket.display()));
    qemu.args(["-gdb", "chardev:gdb"]).stdin(Stdio::null()).stdout(File::create(&console)?);
    // gdb takes Ctrl-C as "stop the machine"; QEMU, in the same process group, would end at it.
    qemu.process_group(0);
    let mut child = qemu.spawn().context("cannot start qemu-system-aarch64")?;
    println!("The console goes to {}", console.display());

    let mut gdb = Command::new("gdb-multiarch");
    gdb.args(["-q", "-ex", "set architecture aarch64", "-ex", "set confirm off"]);
    if let Some((image, _)) = &ready.boot.hypervisor {
        for address in [prepared.load_address, ready.boot.machine.carve_out()?] {
            gdb.arg("-ex").arg(format!("add-symbol-file {} -o {address:#x}", image.elf.display()));
        }
    }
    while !socket.exists() {
        if let Some(status) = child.try_wait()? {
            anyhow::bail!("QEMU ended: {status}");
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    gdb.arg("-ex").arg(format!("target remote {}", socket.display()));
    // Ctrl-C is gdb's business alone from here on, so this program must not be there to die of it.
    let status = gdb.status();
    child.kill()?;
    child.wait()?;
    status.context("cannot start gdb-multiarch")?;
    Ok(ExitCode::SUCCESS)
}
