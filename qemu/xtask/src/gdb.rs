//! `cargo xtask gdb`: a machine that waits for a debugger, and the debugger with the hypervisor's symbols.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::run::{Options, Ready};
use crate::setup::{self, Needs};
use crate::{image, qemu, workspace};

/// Starts QEMU, stopped before its first instruction, and gdb on it.
pub(crate) fn gdb(options: &Options) -> Result<ExitCode> {
    setup::ensure(&Needs { gdb: true, ..Needs::default() })?;
    let ready = Ready::new(options)?;
    let prepared = qemu::prepare(&ready.boot, &ready.scratch)?;
    let console = workspace::output_dir()?.join("gdb-console.log");
    let socket = ready.scratch.path("gdb");
    let mut qemu = prepared.command;
    qemu.args(["-S", "-serial", "stdio", "-gdb", "chardev:gdb", "-chardev"]);
    qemu.arg(format!("socket,path={},server=on,wait=off,id=gdb", socket.display()));
    qemu.stdin(Stdio::null()).stdout(File::create(&console)?);
    // Ctrl-C is for gdb, which stops the machine at it; QEMU would end if it were in the same process group.
    qemu.process_group(0);
    let mut qemu = qemu::Guard(qemu.spawn().context("cannot start qemu-system-aarch64")?);
    while !socket.exists() {
        if let Some(status) = qemu.0.try_wait()? {
            bail!("QEMU ended: {status}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }

    let mut script = String::from("set architecture aarch64\nset confirm off\nset pagination off\n");
    if let Some((image, _)) = &ready.boot.hypervisor {
        let elf = image.elf.display();
        let vectors = image::symbol(&fs::read(&image.elf)?, "vectors")?;
        script += &format!("add-symbol-file {elf} -o {:#x}\n", prepared.load_address);
        // The image goes on from a copy of itself, whose place it chooses at boot; its vectors say where that is.
        script +=
            &format!("define ravelin-symbols\neval \"add-symbol-file {elf} -o %#lx\", $VBAR_EL2 - {vectors:#x}\nend\n");
        script +=
            "document ravelin-symbols\nAdds the symbols of the copy in the carve-out. Use it once that runs.\nend\n";
        script += "echo ravelin-symbols: adds the symbols of the copy in the carve-out once that runs\\n\n";
    }
    script += &format!("target remote {}\n", socket.display());
    println!("The console goes to {}", console.display());
    let commands = ready.scratch.file("gdb-commands", script.as_bytes())?;
    // gdb stops the machine at Ctrl-C, which would end this program, so a shell that bears it takes its place.
    let error = Command::new("sh")
        .args(["-c", "trap : INT; gdb-multiarch -q -x \"$1\"; kill $2; rm -r \"$3\"", "sh"])
        .arg(commands)
        .arg(qemu.0.id().to_string())
        .arg(ready.scratch.path(""))
        .exec();
    Err(error).context("cannot start sh")
}
