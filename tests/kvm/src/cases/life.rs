//! From the start of a VM to its end, however that comes, and what the host does meanwhile.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::{pipe, read, write};

use super::cases;
use super::memfd::punch;
use crate::check::{Outcome, check_eq, fails, skip, works};
use crate::gic;
use crate::guest::{self, Guest};
use crate::host::{self, Child, sleep_ms, wait_until};
use crate::kvm::{self, KINDS, Kind, PROTECTED, Vm};
use crate::machine::{Backing, MEMORY, Machine, Plan};
use crate::memory::{Mapping, PAGE};

cases! {
    file_outlives_its_vm[KINDS];
    file_is_closed_while_the_guest_runs[PROTECTED];
    statistics_come_back[KINDS].seconds(120);
    kill_storm.seconds(300);
    unload;
    cpu_hotplug[KINDS].seconds(120);
    stopped[KINDS];
    stopped_for_a_minute[KINDS].seconds(180).long();
    memory_pressure.seconds(240);
    many_vms.seconds(120);
    two_protected_at_once.seconds(120);
    transparent_huge_pages;
}

const P: u64 = PAGE as u64;

/// What belongs to VMs, by the statistics.
const OF_VMS: [&str; 5] =
    ["vm_pages", "host_lent_pages", "guest_private_pages", "guest_offered_pages", "guest_claimed_pages"];

/// Checks that no VM has anything, and that all of it is the host's; kernel threads may need some time for it.
fn nothing_is_left() -> Outcome {
    if !kvm::is_ravelin() {
        return Ok(());
    }
    wait_until("the end of all VMs", Duration::from_secs(20), || {
        Ok(host::statistics(&OF_VMS)?.iter().all(|count| *count == 0))
    })
    .map_err(|error| anyhow::anyhow!("{error:#}: {OF_VMS:?} are {:?}", host::statistics(&OF_VMS)))
}

fn file_outlives_its_vm(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 8).backing(Backing::Memfd).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 8, 0, 4)?;
    if kind.is_protected() {
        guest.share(MEMORY, 4)?;
    }
    let Machine { vcpus, memory, image, gic, vm } = machine;
    memory.mapping.check_pattern(0, 4, 0, 4)?;
    drop((vcpus, image, gic, vm));
    let file = memory.file()?;
    // What was shared is there, what was private is not.
    memory.mapping.check_pattern(0, 4, 0, 4)?;
    for page in 4..8 {
        if let Ok(word) = memory.mapping.load(page * PAGE + 8) {
            let private = ravelin_guest::pattern(page as u64 * P, 1, 4);
            anyhow::ensure!(!kind.is_protected() || word != private, "private memory is shown");
        }
    }
    let other = Vm::new(kind)?;
    fails("another VM", other.bind(0, MEMORY, 8 * P, file, 0), Errno::EINVAL)?;
    works("PUNCH_HOLE", punch(file, 0, 8 * P))?;
    let keep = nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    works("fallocate", nix::fcntl::fallocate(file, keep, 0, 2 * PAGE as i64))?;
    drop(memory);
    nothing_is_left()
}

/// The guest cannot go on without its memory; nothing is lost of what the host has.
fn file_is_closed_while_the_guest_runs(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 8).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 8, 0, 4)?;
    guest.share(MEMORY, 4)?;
    machine.memory.mapping.check_pattern(0, 4, 0, 4)?;
    drop(guest);
    let Machine { vcpus, memory, image, gic, vm } = machine;
    let (go, told) = works("pipe", pipe())?;
    std::thread::scope(|scope| -> Outcome {
        let vcpu = &vcpus[0];
        let runner = scope.spawn(move || -> Outcome {
            let mut guest = Guest::new(vcpu, kind);
            guest.assume_idle();
            guest.begin_code(guest::spin(), &[])?;
            works("write", write(&told, &[1]))?;
            match guest.exit()? {
                kvm::Exit::Failed(Errno::EIO) | kvm::Exit::MemoryFault { .. } => Ok(()),
                exit => anyhow::bail!("{exit:x?}"),
            }
        });
        works("read", read(&go, &mut [0]))?;
        sleep_ms(50);
        drop(memory);
        runner.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
    })?;
    fails("KVM_RUN", vcpus[0].run_once(), Errno::EIO)?;
    drop((vcpus, image, gic, vm));
    nothing_is_left()
}

/// A whole life of a VM.
fn whole_life(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 700).vcpus(2).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 16, 0, 4)?;
    guest.store(MEMORY + 600 * P, 1)?;
    if kind.is_protected() {
        guest.share(MEMORY, 8)?;
        machine.memory.mapping.check_pattern(0, 8, 0, 4)?;
        guest.share(MEMORY + 8 * P, 4)?;
        guest.unshare(MEMORY, 2)?;
        works("PUNCH_HOLE", punch(machine.memory.file()?, 3 * P, P))?;
        works("PUNCH_HOLE", punch(machine.memory.file()?, 14 * P, P))?;
    }
    Ok(())
}

fn statistics_come_back(kind: Kind) -> Outcome {
    nothing_is_left()?;
    whole_life(kind)?;
    nothing_is_left()?;
    let before = host::meminfo("MemFree")?;
    for _ in 0..8 {
        whole_life(kind)?;
    }
    nothing_is_left()?;
    let after = host::meminfo("MemFree")?;
    // A life takes 5 MiB.
    anyhow::ensure!(after + (8 << 10) > before, "MemFree was {before} KiB and is {after} KiB");
    Ok(())
}

/// What a VM does until it is killed.
fn busy_life(kind: Kind, round: u64) -> Outcome {
    let machine = Plan::new(kind, 600).build()?;
    let mut guest = machine.boot()?;
    let mut count = 0;
    loop {
        count += 1;
        let at = MEMORY + count % 5 * 64 * P;
        guest.fill(at, 3, 0, round)?;
        if kind.is_protected() {
            guest.share(at, 64)?;
            machine.memory.mapping.set((at - MEMORY) as usize, count)?;
            guest.unshare(at, 64)?;
        }
    }
}

/// Processes are killed at any point of the lives of their VMs.
fn kill_storm() -> Outcome {
    const ROUNDS: u64 = 50;
    let kinds: Vec<_> = KINDS.iter().copied().filter(|kind| kvm::is_ravelin() || !kind.is_protected()).collect();
    whole_life(kinds[0])?;
    nothing_is_left()?;
    let before = host::meminfo("MemFree")?;
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..ROUNDS {
        let children = kinds
            .iter()
            .take(2)
            .enumerate()
            .map(|(index, _)| {
                let kind = kinds[(round as usize + index) % kinds.len()];
                Child::new(move || busy_life(kind, round))
            })
            .collect::<Outcome<Vec<_>>>()?;
        for child in children {
            // Xorshift: the same delays each time.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // Many of them while the VM is made.
            sleep_ms(random % if round % 2 == 0 { 40 } else { 400 });
            let status = child.end()?;
            anyhow::ensure!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "round {round}: {status:?}");
        }
    }
    nothing_is_left()?;
    let mut after = 0;
    let enough = wait_until("MemFree comes back", Duration::from_secs(20), || {
        after = host::meminfo("MemFree")?;
        Ok(after + (8 << 10) > before)
    });
    enough.map_err(|error| anyhow::anyhow!("{error:#}: was {before} KiB, is {after} KiB"))
}

/// delete_module(2) of the module; does not wait.
fn delete_module() -> Result<i64, Errno> {
    // SAFETY: Reads the name.
    Errno::result(unsafe { libc::syscall(libc::SYS_delete_module, c"ravelin".as_ptr(), libc::O_NONBLOCK) })
}

fn unload() -> Outcome {
    const FILE: &str = "/lib/ravelin/ravelin.ko";
    if !kvm::is_ravelin() || !Path::new(FILE).exists() {
        skip!("there is no {FILE}");
    }
    let insert = || -> Outcome {
        let file = fs::File::open(FILE)?;
        // SAFETY: The parameters are a string.
        let inserted = Errno::result(unsafe {
            libc::syscall(libc::SYS_finit_module, std::os::fd::AsRawFd::as_raw_fd(&file), c"".as_ptr(), 0)
        });
        works("finit_module", inserted).map(drop)
    };
    for kind in KINDS {
        let machine = Plan::new(*kind, 4).backing(Backing::Memfd).build()?;
        let mut guest = machine.boot()?;
        guest.fill(MEMORY, 4, 0, 1)?;
        let Machine { vcpus, memory, image, gic, vm } = machine;
        let busy = |what: &str| {
            let result = delete_module();
            anyhow::ensure!(matches!(result, Err(Errno::EBUSY | Errno::EWOULDBLOCK)), "with {what}: {result:?}");
            Ok(())
        };
        busy("a VM that runs")?;
        drop((vcpus, gic, vm));
        busy("files")?;
        drop((memory, image));
        // The last file may be closed by a kernel thread.
        wait_until("the module can be unloaded", Duration::from_secs(10), || Ok(delete_module().is_ok()))?;
        anyhow::ensure!(!Path::new("/dev/kvm").exists(), "/dev/kvm is still there");
        insert()?;
        wait_until("/dev/kvm comes back", Duration::from_secs(10), || Ok(Path::new("/dev/kvm").exists()))?;
        Plan::new(*kind, 1).build()?.boot()?.store(MEMORY, 1)?;
    }
    Ok(())
}

/// Turns CPU 1 of the host off, or on.
fn set_cpu(on: bool) -> Outcome {
    Ok(fs::write("/sys/devices/system/cpu/cpu1/online", if on { "1" } else { "0" })?)
}

fn cpu_hotplug(kind: Kind) -> Outcome {
    if host::cpus() < 2 {
        skip!("one CPU");
    }
    let machine = Plan::new(kind, 2).build()?;
    let mut guest = machine.boot()?;
    gic::prepare(&mut guest, false)?;
    let tenth = guest.run(guest::counter(), &[])?[1] / 10;
    let toggler = Child::new(|| {
        for _ in 0..5 {
            set_cpu(false)?;
            sleep_ms(50);
            set_cpu(true)?;
            sleep_ms(50);
        }
        Ok(())
    })?;
    let deadline = Instant::now() + Duration::from_secs(3);
    let mut result = Ok(());
    let mut round = 0;
    while Instant::now() < deadline && result.is_ok() {
        round += 1;
        result = (|| {
            guest.fill(MEMORY, 2, 0, round)?;
            guest.check(MEMORY, 2, 0, round)?;
            check_eq!(guest.run(gic::timer(), &[tenth / 10])?[0], 27, "the interrupt");
            Ok(())
        })();
    }
    let toggled = toggler.succeed();
    set_cpu(true)?;
    toggled?;
    result
}

/// A VMM is stopped and goes on: the guest's clock has gone on, too, and its timer fires.
fn stopped_for(kind: Kind, time: Duration) -> Outcome {
    drop(Vm::new(kind)?);
    let (ready, told) = works("pipe", pipe())?;
    let (results, sender) = works("pipe", pipe())?;
    let child = Child::new(|| {
        let machine = Plan::new(kind, 2).build()?;
        let mut guest = machine.boot()?;
        gic::prepare(&mut guest, false)?;
        let [start, frequency, ..] = guest.run(guest::counter(), &[])?;
        works("write", write(&told, &[1]))?;
        // It is stopped within this second.
        let [intid, ..] = guest.run(gic::timer(), &[frequency])?;
        check_eq!(intid, 27, "the interrupt");
        let elapsed = (guest.run(guest::counter(), &[])?[0] - start) * 1000 / frequency;
        check_eq!(guest.run(gic::timer(), &[frequency / 10])?[0], 27, "another interrupt");
        works("write", write(&sender, &elapsed.to_le_bytes())).map(drop)
    })?;
    works("read", read(&ready, &mut [0]))?;
    let start = Instant::now();
    sleep_ms(100);
    child.kill(Signal::SIGSTOP)?;
    std::thread::sleep(time);
    child.kill(Signal::SIGCONT)?;
    let mut bytes = [0; 8];
    check_eq!(read(&results, &mut bytes), Ok(8), "what the guest's clock says");
    let (guests, ours) = (u64::from_le_bytes(bytes), u64::try_from(start.elapsed().as_millis())?);
    child.succeed()?;
    let shortest = u64::try_from(time.as_millis())?;
    anyhow::ensure!((shortest..=ours + 1000).contains(&guests), "the guest counts {guests} ms, the host {ours}");
    Ok(())
}

fn stopped(kind: Kind) -> Outcome {
    stopped_for(kind, Duration::from_secs(5))
}

fn stopped_for_a_minute(kind: Kind) -> Outcome {
    stopped_for(kind, Duration::from_secs(60))
}

/// Swap in memory, if the driver for it is there.
fn add_swap() -> Outcome<bool> {
    const DEVICE: &str = "/sys/block/zram0";
    if !Path::new(DEVICE).exists() {
        return Ok(false);
    }
    if fs::read_to_string("/proc/swaps")?.contains("zram0") {
        return Ok(true);
    }
    fs::write(format!("{DEVICE}/disksize"), "400M")?;
    for (program, argument) in [("mkswap", "/dev/zram0"), ("swapon", "/dev/zram0")] {
        let status = Command::new(program).arg(argument).stdout(std::process::Stdio::null()).status()?;
        anyhow::ensure!(status.success(), "{program}: {status}");
    }
    Ok(true)
}

/// The memory of an ordinary guest is swapped out while others need it, and comes back; a protected one's stays.
fn memory_pressure() -> Outcome {
    const GUEST_PAGES: u64 = 4096;
    if !add_swap()? {
        skip!("no swap");
    }
    let ordinary = Plan::new(Kind::Ordinary, GUEST_PAGES as usize).build()?;
    let mut guest = ordinary.boot()?;
    guest.fill(MEMORY, GUEST_PAGES, 0, 3)?;
    let protected = Plan::new(Kind::Pkvm, 64).build()?;
    let mut other = protected.boot()?;
    other.fill(MEMORY, 64, 0, 4)?;
    // Swapping to zram takes memory itself: without a reserve the kernel complains of allocations that fail on the way.
    fs::write("/proc/sys/vm/min_free_kbytes", "24576")?;
    let available = host::meminfo("MemAvailable")? << 10;
    let hog = Child::new(move || {
        // Words that do not compress to nothing, some in each page.
        let memory = works("mmap", Mapping::anonymous(usize::try_from(available)? + (48 << 20)))?;
        for page in (0..memory.size()).step_by(PAGE) {
            for offset in (0..PAGE).step_by(256) {
                memory.set(page + offset, ravelin_guest::pattern(page as u64, offset as u64, 5))?;
            }
        }
        Ok(())
    })?;
    let end = hog.wait()?;
    anyhow::ensure!(matches!(end, WaitStatus::Exited(_, 0)), "the process that takes memory: {end:?}");
    let text = fs::read_to_string("/proc/vmstat")?;
    let swapped =
        text.lines().find_map(|line| line.strip_prefix("pswpout ")).and_then(|count| count.parse::<u64>().ok());
    anyhow::ensure!(swapped.unwrap_or(0) > 1000, "{swapped:?} pages were swapped out");
    guest.check(MEMORY, GUEST_PAGES, 0, 3)?;
    ordinary.memory.mapping.check_pattern(0, 64, 0, 3)?;
    other.check(MEMORY, 64, 0, 4)
}

/// Sixty VMs at the same time, of all kinds.
fn many_vms() -> Outcome {
    let kinds: Vec<_> = KINDS.iter().copied().filter(|kind| kvm::is_ravelin() || !kind.is_protected()).collect();
    let machines =
        (0..60).map(|index| Plan::new(kinds[index % kinds.len()], 2).build()).collect::<Outcome<Vec<_>>>()?;
    let mut guests = machines.iter().map(Machine::boot).collect::<Outcome<Vec<_>>>()?;
    for (seed, guest) in (0..).zip(&mut guests) {
        guest.fill(MEMORY, 2, 0, seed)?;
    }
    for (seed, guest) in (0..).zip(&mut guests) {
        guest.check(MEMORY, 2, 0, seed)?;
    }
    drop(guests);
    drop(machines);
    nothing_is_left()
}

fn two_protected_at_once() -> Outcome {
    drop(Vm::new(Kind::Pkvm)?);
    let children = PROTECTED
        .iter()
        .map(|kind| {
            Child::new(|| {
                let machine = Plan::new(*kind, 64).build()?;
                let mut guest = machine.boot()?;
                for round in 0..30 {
                    guest.fill(MEMORY, 8, 0, round)?;
                    guest.share(MEMORY, 8)?;
                    machine.memory.mapping.check_pattern(0, 8, 0, round)?;
                    guest.unshare(MEMORY, 8)?;
                    guest.check(MEMORY, 8, 0, round)?;
                }
                Ok(())
            })
        })
        .collect::<Outcome<Vec<_>>>()?;
    children.into_iter().try_for_each(Child::succeed)?;
    nothing_is_left()
}

/// An ordinary guest's memory in huge pages, which the host splits while the guest uses them.
fn transparent_huge_pages() -> Outcome {
    const PAGES: usize = 1536;
    let machine = Plan::new(Kind::Ordinary, PAGES).build()?;
    let mapping = &machine.memory.mapping;
    works("MADV_HUGEPAGE", mapping.advise(nix::sys::mman::MmapAdvise::MADV_HUGEPAGE))?;
    mapping.fill_pattern(0, PAGES, 0, 1)?;
    let mut guest = machine.boot()?;
    guest.check(MEMORY, PAGES as u64, 0, 1)?;
    // Part of a huge page is given up, and comes back as zeros.
    let at = 700 * PAGE;
    // SAFETY: No object of Rust's is there.
    let advised = unsafe { libc::madvise(mapping.pointer(at), 8 * PAGE, libc::MADV_DONTNEED) };
    check_eq!(advised, 0, "madvise");
    guest.check(MEMORY, 700, 0, 1)?;
    guest.check_zero(MEMORY + at as u64, 8)?;
    guest.check(MEMORY + 708 * P, PAGES as u64 - 708, 708 * P, 1)?;
    guest.fill(MEMORY + at as u64, 8, 0, 2)?;
    mapping.check_pattern(at, 8, 0, 2)
}
