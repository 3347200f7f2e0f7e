//! The kernel module from the side of userspace: the program of `tests/kvm` in a stock host on the hypervisor.
//!
//! The host is booted once for some groups of cases, so that what one of them breaks does not hide the others. Each case is
//! counted. With `--full` all of it runs on the other kernel, too, without the cases that take minutes.

use std::fs;
use std::time::Instant;

use anyhow::{Result, ensure};

use super::Report;
use super::linux::transcript::{Check, Transcript};
use super::linux::{self, Config};
use crate::initramfs::{self, ExtraFile, Task};
use crate::module::Kernel;
use crate::qemu::Outcome;
use crate::setup::packages::Manifest;
use crate::setup::{self, BUSYBOX, Needs};
use crate::{guests, programs};

/// Drivers of the manifest that only these tests use; they are the default kernel's.
const DRIVERS: &str = "linux-test-modules";

/// A boot: the machine, the arguments of the program, and how many cases pass at least.
type Row = (Config, &'static str, usize);

/// What the usual machine does, part by part, and what others do.
const ROWS: [Row; 7] = [
    (Config::new("cortex-a76", 2, "1G"), "memfd slots ioctls", 100),
    (Config::new("cortex-a76", 2, "1G"), "run", 60),
    (Config::new("cortex-a76", 2, "1G"), "convert pins ring attributes huge", 104),
    (Config::new("cortex-a76", 2, "1G"), "attack irq io", 22),
    (Config::new("cortex-a76", 2, "512M"), "life", 15),
    (Config::new("max", 4, "1G"), "run.pkvm run.realm convert.realm irq", 70),
    (Config::new("cortex-a53", 1, "512M"), "run.ordinary convert.pkvm", 30),
];

/// What the model watches in each test run. With `--full` it watches all.
const CHECKED: Row = (
    Config::new("cortex-a76", 2, "512M").checked(),
    "convert.pkvm ring io.pkvm.contents io.pkvm.contents_on_two_vcpus",
    25,
);

/// The drivers, the module, and what is looked at before and after the cases.
const BEFORE: &str = "
dmesg -n 1
mount -t debugfs debugfs /sys/kernel/debug
for driver in /lib/tests/*.ko; do
    [ -e $driver ] || continue
    case $driver in
        *null_blk*) insmod $driver nr_devices=1 gb=1 irqmode=2 completion_nsec=2000000000 ;;
        *) insmod $driver ;;
    esac
done
insmod /lib/ravelin/ravelin.ko
dmesg -r | sed 's/^/@dmesg /'
dmesg -c >/dev/null
";
const AFTER: &str = "
dmesg -r | sed 's/^/@later /'
echo \"@note taint afterwards = $(cat /proc/sys/kernel/tainted)\"
echo \"@note cpus afterwards = $(nproc)\"
";

/// Runs the suite.
pub(super) fn run(full: bool, report: &mut Report) -> Result<()> {
    setup::ensure(&Needs {
        qemu: true,
        bare_metal: true,
        musl: true,
        packages: &[Kernel::Linux.name(), BUSYBOX, DRIVERS],
        ..Needs::default()
    })?;
    let drivers = guests::drivers(&Manifest::load()?.ensure(DRIVERS)?)?;
    let mut with_drivers = programs::kvm_test_files(Kernel::Linux)?;
    with_drivers.extend(drivers.into_iter().map(|(name, contents)| file(&format!("lib/tests/{name}"), contents)));
    for (config, arguments, cases) in ROWS {
        row(&config, arguments, cases, full, &with_drivers, report);
    }
    if full {
        for (config, arguments, cases) in ROWS {
            row(&config.checked(), arguments, cases, false, &with_drivers, report);
        }
        // Cases that need the drivers are skipped.
        let files = programs::kvm_test_files(Kernel::LinuxNew)?;
        for (config, arguments, cases) in ROWS {
            row(&config.with_kernel(Kernel::LinuxNew.name()), arguments, cases, false, &files, report);
        }
    }
    let (config, arguments, cases) = CHECKED;
    row(&config, arguments, cases, false, &with_drivers, report);
    report.check("kexec while a protected guest runs", kexec());
    Ok(())
}

fn file(path: &str, contents: Vec<u8>) -> ExtraFile {
    ExtraFile { path: path.into(), contents }
}

/// By kexec another kernel gets the machine while a guest has a part of its memory: it has to get that, too.
fn kexec() -> Result<()> {
    const MARKER: &str = "status after kexec: ";
    const HOST: Config = Config::new("cortex-a76", 2, "1G");
    // The guest fills 100 MiB, and works on.
    const BEFORE: &str = "
ln -s /guest/debian/Image /root/kernel
guest='head -c 100m /dev/zero | tr \\\\0 x >/tmp/full; echo \"guest: is $(wc -c </tmp/full) large;\"; while :; do :; done'
realm-guest --exec \"$guest\" --cpus 2 </dev/null >/tmp/log 2>&1 &
end=$(($(date +%s) + 300))
until grep -q '^guest: is 104857600 large;' /tmp/log || [ $(date +%s) -gt $end ]; do sleep 1; done
mount -t debugfs debugfs /sys/kernel/debug
sed -n 's/^guest_private_pages /@note private pages = /p' /sys/kernel/debug/ravelin/statistics
probe kexec
";
    // A page that is a guest's would be the end of the kernel or of the program.
    const AFTER: &str = "
[ $(nproc) = 2 ] || echo '@fail all CPUs'
dmesg -r | sed 's/^/@dmesg /'
dmesg -c >/dev/null
probe memory 40
dmesg -r | sed 's/^/@later /'
";
    let busybox = fs::read(Manifest::load()?.ensure(BUSYBOX)?)?;
    let probe = file("bin/probe", fs::read(programs::probe()?)?);
    let initrd = initramfs::build(&busybox, &Task::Command { script: AFTER, marker: MARKER }, None, &[probe])?;
    let transcript = linux::boot("kexec with a guest", &HOST, |options| {
        options.guests = true;
        options.exec = Some(BEFORE.into());
        options.extra_files = vec![file("root/initrd", initrd)];
    })?;
    ensure!(transcript.outcome == Outcome::Ended(0), "{:?}; {}", transcript.outcome, transcript.tail());
    let private = transcript.number("private pages")?;
    ensure!(private > 100 << 8, "the guest had {private} pages only");
    ensure!(transcript.console.contains(&format!("{MARKER}0")), "{}", transcript.tail());
    ensure!(!transcript.checks.is_empty(), "no memory was filled; {}", transcript.tail());
    for (name, check) in &transcript.checks {
        ensure!(*check == Check::Passed, "{name}: {check:?}");
    }
    linux::complaint(&transcript)
}

/// Boots a host and runs some cases there.
fn row(config: &Config, arguments: &str, cases: usize, full: bool, files: &[ExtraFile], report: &mut Report) {
    let start = Instant::now();
    let option = if full { "--full" } else { "" };
    let script = format!("{BEFORE}kvm-tests {option} {arguments}\n{AFTER}");
    let booted = linux::boot(&format!("kvm {config} {arguments}"), config, |options| {
        options.exec = Some(script);
        options.extra_files = files.to_vec();
    });
    let name = |what: &str| format!("{config}: {what}");
    let transcript = match booted {
        Ok(transcript) => transcript,
        Err(error) => return report.fail(&name(arguments), &format!("{error:#}")),
    };
    for (case, result) in &transcript.checks {
        match result {
            Check::Passed => report.pass(&name(case)),
            Check::Failed(why) => report.fail(&name(case), why),
            Check::Skipped(why) => report.skip(&name(case), why),
        }
    }
    let passed = transcript.checks.iter().filter(|(_, check)| *check == Check::Passed).count();
    let mut check = |what: &str, result| report.check(&name(&format!("{arguments}: {what}")), result);
    check("runs and powers off", linux::outcome(&transcript));
    check("the cases are run", enough(passed, cases));
    check("no complaint in the kernel's log", linux::complaint(&transcript));
    check("no taint but that of a module from elsewhere", taint(&transcript));
    check("all CPUs", linux::cpus(&transcript, config));
    println!("  {config}: {arguments}: {passed} cases passed, {} s", start.elapsed().as_secs());
}

/// A program that finds none of its cases does not pass.
fn enough(passed: usize, expected: usize) -> Result<()> {
    ensure!(passed >= expected, "{passed} cases passed, expected {expected} at least");
    Ok(())
}

/// A module that is not part of the kernel, and is not signed, taints it; nothing else does.
pub(super) fn taint(transcript: &Transcript) -> Result<()> {
    const OUT_OF_TREE: u64 = 1 << 12;
    const UNSIGNED: u64 = 1 << 13;
    let taint = transcript.number("taint afterwards")?;
    ensure!(taint & !(OUT_OF_TREE | UNSIGNED) == 0, "the kernel is tainted: {taint:#x}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_modules_own_taint_passes() {
        let tainted = |taint: u32| taint_of(&format!("@note taint afterwards = {taint}\n"));
        assert!(tainted(0x3000).is_ok());
        assert!(tainted(0x3080).is_err());
        assert!(taint_of("").is_err());
    }

    fn taint_of(console: &str) -> Result<()> {
        taint(&Transcript::new(Outcome::Status(0), console.into()))
    }

    #[test]
    fn a_program_without_cases_fails() {
        assert!(enough(8, 8).is_ok());
        assert!(enough(7, 8).is_err());
    }
}
