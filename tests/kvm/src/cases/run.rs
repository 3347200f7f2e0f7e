//! Guests that run: exits, signals, time, threads.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_pre_fault_memory};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::{Pid, gettid};

use super::cases;
use crate::check::{Outcome, check_eq, fails, works};
use crate::gic;
use crate::guest::{self, Guest, snippets};
use crate::host::{self, Child, sleep_ms, wait_until};
use crate::kvm::{self, Exit, KINDS, Kind, Vcpu, Vm};
use crate::machine::{Backing, MEMORY, MEMORY_SLOT, Machine, Plan};
use crate::memory::PAGE;

cases! {
    boots[KINDS];
    boots_again_and_again[KINDS];
    memory_is_zero_at_first[KINDS];
    ordinary_guest_in_guest_memfd;
    mmio_loads[KINDS];
    mmio_stores[KINDS];
    mmio_beyond_the_addresses[KINDS];
    system_off[KINDS];
    system_reset[KINDS];
    reset_of_an_ordinary_vm;
    cpu_on_and_off[KINDS];
    cpu_on_of_what_is_not_there[KINDS];
    many_vcpus[KINDS];
    wfi_costs_nothing[KINDS];
    timer[KINDS];
    timer_while_busy[KINDS];
    sgi[KINDS];
    signal[KINDS];
    signal_while_waiting[KINDS];
    two_threads_on_a_vcpu[KINDS];
    migration[KINDS];
    more_vcpus_than_cpus[KINDS];
    killed_while_it_spins[KINDS];
    killed_while_it_waits[KINDS];
    soft_lockup.seconds(90);
    memory_fault[KINDS];
    slot_deleted_under_the_guest;
    pre_fault[KINDS];
    pre_fault_arguments[KINDS];
    pre_fault_and_deletion.seconds(120);
    realm_calls_its_host;
    anonymous_memory_is_changed_under_the_guest;
    floating_point[KINDS];
}

/// Where a device is that has no page in common with the guest's own.
const DEVICE: u64 = 0x0a00_1000;

/// PSCI's functions.
const CPU_OFF: u64 = 0x8400_0002;
const AFFINITY_INFO: u64 = 0xc400_0004;
const SYSTEM_OFF: u64 = 0x8400_0008;
const SYSTEM_RESET: u64 = 0x8400_0009;

snippets! {
    /// Loads of each size: x0 = address. Returns what they load, the second four with signs.
    loads:
        "mov x8, x0", "ldrb w0, [x8]", "ldrh w1, [x8]", "ldr w2, [x8]", "ldr x3, [x8]",
        "ldrsb x4, [x8]", "ldrsh x5, [x8]", "ldrsw x6, [x8]", "ldrsb w7, [x8]";

    /// Stores of each size: x0 = address, x1 = value.
    stores: "strb w1, [x0]", "strh w1, [x0, #2]", "str w1, [x0, #4]", "str x1, [x0, #8]", "str xzr, [x0, #16]";

    /// Puts numbers that come from x0 into all SIMD registers, adds up what is in them x1 times, and returns the sum.
    vectors:
        ".arch_extension fp", ".arch_extension simd",
        "dup v0.2d, x0", "dup v31.2d, x0", "dup v16.2d, x0",
        "4: add v1.2d, v0.2d, v31.2d", "add v1.2d, v1.2d, v16.2d", "sub x1, x1, #1", "cbnz x1, 4b", "umov x0, v1.d[1]";
}

fn boots(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let mut guest = machine.boot()?;
    guest.fill(MEMORY, 4, 0, 1)?;
    guest.check(MEMORY, 4, 0, 1)?;
    check_eq!(guest.run(guest::counter(), &[])?[1] != 0, true, "the counter's frequency");
    Ok(())
}

fn boots_again_and_again(kind: Kind) -> Outcome {
    for _ in 0..20 {
        boots(kind)?;
    }
    Ok(())
}

fn memory_is_zero_at_first(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 64).build()?;
    let mut guest = machine.boot()?;
    guest.check_zero(MEMORY, 64)
}

/// An ordinary VM's pages are lent: both sides use them.
fn ordinary_guest_in_guest_memfd() -> Outcome {
    let machine = Plan::new(Kind::Ordinary, 4).backing(Backing::Memfd).build()?;
    let mapping = &machine.memory.mapping;
    mapping.fill(0xaaaa_aaaa_aaaa_aaaa)?;
    let mut guest = machine.boot()?;
    check_eq!(guest.load(MEMORY + 0x3ff8)?, 0xaaaa_aaaa_aaaa_aaaa, "what the host has put there");
    guest.fill(MEMORY, 4, 0, 5)?;
    mapping.check_pattern(0, 4, 0, 5)?;
    works("PUNCH_HOLE", super::memfd::punch(machine.memory.file()?, PAGE as u64, PAGE as u64))?;
    guest.check_zero(MEMORY + PAGE as u64, 1)?;
    mapping.check_words(PAGE, PAGE, 0)?;
    guest.check(MEMORY + 2 * PAGE as u64, 2, 2 * PAGE as u64, 5)
}

fn mmio_loads(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    guest.begin_code(loads(), &[kind.shared(DEVICE)])?;
    for expected in [1, 2, 4, 8, 1, 2, 4, 1] {
        match guest.exit()? {
            Exit::Mmio { address: DEVICE, size, write: false, .. } if size == expected => {}
            exit => anyhow::bail!("{exit:x?} instead of a load of {expected} bytes"),
        }
        guest.vcpu.answer(0x8182_8384_8586_8788)?;
    }
    let x = guest.finish()?.x;
    let expected = [
        0x88,
        0x8788,
        0x8586_8788,
        0x8182_8384_8586_8788,
        0xffff_ffff_ffff_ff88,
        0xffff_ffff_ffff_8788,
        0xffff_ffff_8586_8788,
        0xffff_ff88,
    ];
    check_eq!(x, expected, "what the guest has loaded");
    Ok(())
}

fn mmio_stores(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    guest.begin_code(stores(), &[kind.shared(DEVICE), 0x1122_3344_5566_7788])?;
    let expected = [(0, 1, 0x88), (2, 2, 0x7788), (4, 4, 0x5566_7788), (8, 8, 0x1122_3344_5566_7788), (16, 8, 0)];
    for (offset, size, value) in expected {
        let store = Exit::Mmio { address: DEVICE + offset, size, write: true, value };
        check_eq!(guest.exit()?, store, "store");
    }
    guest.finish()?;
    Ok(())
}

/// An address that no slot can have: the guest gets an exception, or the host an exit; the VM lives on.
fn mmio_beyond_the_addresses(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    guest.begin_code(guest::load(), &[1 << 37])?;
    match guest.go()? {
        guest::Stop::Done(reply) => anyhow::ensure!(reply.exception.is_some(), "{reply:x?}"),
        guest::Stop::Exit(Exit::Mmio { .. }) => guest.finish().map(drop)?,
        stop => anyhow::bail!("{stop:x?}"),
    }
    guest.store(MEMORY, 1)
}

fn ends(kind: Kind, call: u64, event: u32) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    guest.begin_code(guest.conduit(), &[call])?;
    check_eq!(guest.exit()?, Exit::SystemEvent { kind: event }, "exit");
    Ok(())
}

fn system_off(kind: Kind) -> Outcome {
    ends(kind, SYSTEM_OFF, KVM_SYSTEM_EVENT_SHUTDOWN)
}

fn system_reset(kind: Kind) -> Outcome {
    ends(kind, SYSTEM_RESET, KVM_SYSTEM_EVENT_RESET)
}

/// What VMMs do about it: all vCPUs are initialised again, the memory stays, and the guest starts anew.
fn reset_of_an_ordinary_vm() -> Outcome {
    let machine = Plan::new(Kind::Ordinary, 4).vcpus(2).build()?;
    for round in 0..3 {
        let mut guest = machine.boot()?;
        if round > 0 {
            guest.check(MEMORY, 4, 0, round - 1)?;
        }
        guest.fill(MEMORY, 4, 0, round)?;
        guest.begin_code(guest.conduit(), &[SYSTEM_RESET])?;
        check_eq!(guest.exit()?, Exit::SystemEvent { kind: KVM_SYSTEM_EVENT_RESET }, "exit");
        for vcpu in &machine.vcpus {
            machine.vm.init_vcpu(vcpu)?;
        }
        machine.load()?;
    }
    Ok(())
}

/// Runs a vCPU that is off in a thread until it waits for commands; then `body` has it.
fn with_second<T: Send>(
    machine: &Machine,
    first: &mut Guest<'_>,
    body: impl FnOnce(&mut Guest<'_>) -> Outcome<T> + Send,
) -> Outcome<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut second = machine.guest(1);
            second.start()?;
            body(&mut second)
        });
        sleep_ms(20);
        check_eq!(first.cpu_on(1)?, 0, "CPU_ON");
        thread.join().map_err(|_| anyhow::anyhow!("the thread of vCPU 1 panicked"))?
    })
}

fn cpu_on_and_off(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 2).vcpus(2).build()?;
    let mut first = machine.boot()?;
    let info = |guest: &mut Guest<'_>| guest.call(&[AFFINITY_INFO, 1, 0]).map(|x| x[0]);
    const OFF: u64 = 1;
    check_eq!(info(&mut first)?, OFF, "AFFINITY_INFO before CPU_ON");
    with_second(&machine, &mut first, |second| {
        second.fill(MEMORY, 2, 0, 4)?;
        second.check(MEMORY, 2, 0, 4)
    })?;
    first.check(MEMORY, 2, 0, 4)?;
    const ALREADY_ON: u64 = -4_i64 as u64;
    check_eq!(info(&mut first)?, 0, "AFFINITY_INFO");
    check_eq!(first.cpu_on(1)?, ALREADY_ON, "CPU_ON of what is on");
    // It turns itself off, and its thread waits; then it is turned on again and starts anew.
    std::thread::scope(|scope| -> Outcome {
        let thread = scope.spawn(|| -> Outcome {
            let mut second = machine.guest(1);
            second.assume_idle();
            second.begin_code(second.conduit(), &[CPU_OFF])?;
            // Its next command is the first one of a new start.
            second.finish().map(drop)
        });
        wait_until("vCPU 1 is off", Duration::from_secs(20), || Ok(info(&mut first)? == OFF))?;
        check_eq!(first.cpu_on(1)?, 0, "CPU_ON again");
        thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
    })
}

fn cpu_on_of_what_is_not_there(kind: Kind) -> Outcome {
    const INVALID_PARAMETERS: u64 = -2_i64 as u64;
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    check_eq!(guest.cpu_on(1)?, INVALID_PARAMETERS, "CPU_ON of vCPU 1");
    check_eq!(guest.cpu_on(100)?, INVALID_PARAMETERS, "CPU_ON of vCPU 100");
    Ok(())
}

/// Eighteen vCPUs: affinity level 1 counts, too.
fn many_vcpus(kind: Kind) -> Outcome {
    const VCPUS: u64 = 18;
    let machine = Plan::new(kind, 1).vcpus(VCPUS).build()?;
    let mut first = machine.boot()?;
    std::thread::scope(|scope| -> Outcome {
        let threads: Vec<_> = (1..machine.vcpus.len())
            .map(|index| {
                let machine = &machine;
                scope.spawn(move || machine.guest(index).start())
            })
            .collect();
        for index in 1..VCPUS {
            check_eq!(first.cpu_on(index)?, 0, "CPU_ON of vCPU {index}");
        }
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

/// Runs `body` with the vCPU in another thread, whose identifiers it gets.
fn beside<T>(thread: impl FnOnce() -> Outcome + Send, body: impl FnOnce(Pid, Pthread) -> Outcome<T>) -> Outcome<T> {
    let tid = AtomicI32::new(0);
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let handle = scope.spawn({
            let tid = &tid;
            move || {
                tid.store(gettid().as_raw(), Ordering::Relaxed);
                // The receiver waits for it.
                let _ = sender.send(SendPthread(pthread_self()));
                thread()
            }
        });
        let id = receiver.recv()?.0;
        let result = body(Pid::from_raw(tid.load(Ordering::Relaxed)), id);
        handle.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        result
    })
}

/// A thread's identifier, to be sent to another thread.
struct SendPthread(Pthread);

// SAFETY: It is used while the thread lives.
unsafe impl Send for SendPthread {}

fn wfi_costs_nothing(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    gic::prepare(&mut guest, false)?;
    guest.begin_code(gic::wait(), &[])?;
    let thread = || -> Outcome {
        check_eq!(guest.finish()?.x[0], 40, "the interrupt");
        Ok(())
    };
    let used = beside(thread, |tid, _| {
        sleep_ms(300);
        let before = host::ticks(tid)?;
        sleep_ms(1500);
        let used = host::ticks(tid)? - before;
        works("KVM_IRQ_LINE", machine.vm.set_spi(40, true))?;
        Ok(used)
    })?;
    // A thread that polls would have used 150.
    anyhow::ensure!(used <= 15, "the waiting vCPU has used {} ms of 1500", used * 10);
    Ok(())
}

/// A tenth of a second, in ticks of the guest's counter.
fn tenth(guest: &mut Guest<'_>) -> Outcome<u64> {
    Ok(guest.run(guest::counter(), &[])?[1] / 10)
}

fn timer(kind: Kind) -> Outcome {
    const VIRTUAL_TIMER: u64 = 27;
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    gic::prepare(&mut guest, false)?;
    let tenth = tenth(&mut guest)?;
    for ticks in [tenth, tenth / 10, 1, 5 * tenth] {
        let [intid, waited, ..] = guest.run(gic::timer(), &[ticks])?;
        check_eq!(intid, VIRTUAL_TIMER, "the interrupt");
        anyhow::ensure!((ticks..ticks + 20 * tenth).contains(&waited), "{waited} ticks instead of {ticks}");
    }
    Ok(())
}

snippets! {
    /// Lets the virtual timer fire in x0 ticks, and polls for its interrupt: returns its number.
    poll_timer:
        "msr cntv_tval_el0, x0", "mov x3, #1", "msr cntv_ctl_el0, x3", "isb",
        "4: mrs x0, s3_0_c12_c12_0", "dsb sy", "cmp x0, #1020", "b.hs 4b",
        "mov x3, #3", "msr cntv_ctl_el0, x3", "isb", "msr s3_0_c12_c12_1, x0", "isb";
}

fn timer_while_busy(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    gic::prepare(&mut guest, false)?;
    let tenth = tenth(&mut guest)?;
    for ticks in [tenth, 1, tenth / 3] {
        check_eq!(guest.run(poll_timer(), &[ticks])?[0], 27, "the interrupt");
    }
    Ok(())
}

fn sgi(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).vcpus(2).build()?;
    let mut first = machine.boot()?;
    gic::prepare(&mut first, false)?;
    with_second(&machine, &mut first, |second| gic::prepare(second, false))?;
    for (round, code) in [gic::wait(), gic::poll()].iter().cycle().take(6).enumerate() {
        let intid = round as u64 % 16;
        let mut second = machine.guest(1);
        second.assume_idle();
        second.begin_code(code, &[])?;
        let thread = || -> Outcome {
            check_eq!(second.finish()?.x[0], intid, "the interrupt");
            Ok(())
        };
        beside(thread, |_, _| {
            sleep_ms(30);
            first.run(gic::send(), &[intid << 24 | 1 << 1]).map(drop)
        })?;
    }
    Ok(())
}

/// Runs a vCPU until a signal ends `KVM_RUN`.
fn interrupted(vcpu: &Vcpu) -> Outcome {
    const INTR: u32 = 10;
    fails("KVM_RUN", vcpu.run_once(), Errno::EINTR)?;
    check_eq!(vcpu.reason()?, INTR, "exit reason");
    Ok(())
}

/// A signal ends `KVM_RUN` of a vCPU that does not exit by itself; nothing is lost.
fn signal_during(kind: Kind, code: &[u64], end: impl Fn(&Machine) -> Outcome) -> Outcome {
    host::take_sigusr1()?;
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    gic::prepare(&mut guest, false)?;
    guest.begin_code(code, &[])?;
    // The exits by which it loads the code.
    let loaded = AtomicBool::new(false);
    let thread = || -> Outcome {
        loop {
            match guest.go_interruptible()? {
                Some(guest::Stop::Done(reply)) => {
                    check_eq!(reply.x[0], 41, "the interrupt");
                    return Ok(());
                }
                Some(guest::Stop::Exit(exit)) => anyhow::bail!("{exit:x?}"),
                None => loaded.store(true, Ordering::Relaxed),
            }
        }
    };
    beside(thread, |_, thread| {
        for _ in 0..5 {
            sleep_ms(50);
            loaded.store(false, Ordering::Relaxed);
            works("pthread_kill", pthread_kill(thread, Signal::SIGUSR1))?;
            wait_until("KVM_RUN returns", Duration::from_secs(10), || Ok(loaded.load(Ordering::Relaxed)))?;
        }
        end(&machine)
    })
}

fn signal(kind: Kind) -> Outcome {
    signal_during(kind, gic::poll(), |machine| works("KVM_IRQ_LINE", machine.vm.set_spi(41, true)).map(drop))
}

fn signal_while_waiting(kind: Kind) -> Outcome {
    signal_during(kind, gic::wait(), |machine| works("KVM_IRQ_LINE", machine.vm.set_spi(41, true)).map(drop))?;
    // And a vCPU that is off.
    let machine = Plan::new(kind, 1).vcpus(2).build()?;
    let _first = machine.boot()?;
    let thread = || interrupted(&machine.vcpus[1]);
    beside(thread, |_, thread| {
        sleep_ms(100);
        works("pthread_kill", pthread_kill(thread, Signal::SIGUSR1))
    })
}

/// The second one waits until the first one's `KVM_RUN` is over, or is told that it is busy; nothing breaks.
fn two_threads_on_a_vcpu(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    guest.begin_code(gic::wait(), &[])?;
    host::take_sigusr1()?;
    let vcpu = &machine.vcpus[0];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let mut threads = Vec::new();
        for _ in 0..2 {
            let (sender, receiver) = std::sync::mpsc::channel();
            let stop = &stop;
            let handle = scope.spawn(move || -> Outcome {
                // The receiver waits for it.
                let _ = sender.send(SendPthread(pthread_self()));
                while !stop.load(Ordering::Relaxed) {
                    if let Err(errno) = vcpu.run_once() {
                        anyhow::ensure!(matches!(errno, Errno::EINTR | Errno::EBUSY), "KVM_RUN: {errno:?}");
                    }
                }
                Ok(())
            });
            threads.push((receiver.recv()?.0, handle));
        }
        sleep_ms(200);
        stop.store(true, Ordering::Relaxed);
        for (id, handle) in threads {
            while !handle.is_finished() {
                works("pthread_kill", pthread_kill(id, Signal::SIGUSR1))?;
                sleep_ms(5);
            }
            handle.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

/// Binds a thread to a CPU.
pub(super) fn pin(thread: Pid, cpu: usize) -> Outcome {
    let mut set = CpuSet::new();
    works("CpuSet", set.set(cpu))?;
    works("sched_setaffinity", sched_setaffinity(thread, &set))
}

fn migration(kind: Kind) -> Outcome {
    if host::cpus() < 2 {
        crate::check::skip!("one CPU");
    }
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = machine.boot()?;
    share_page(&mut guest)?;
    let page = &machine.memory.mapping;
    page.set(0, 0)?;
    page.set(8, 0)?;
    guest.begin_code(guest::count(), &[kind.shared(MEMORY)])?;
    let thread = || guest.finish().map(drop);
    beside(thread, |tid, _| {
        let mut seen = 0;
        for round in 0..100 {
            pin(tid, round % 2)?;
            wait_until("the guest counts", Duration::from_secs(20), || Ok(page.get(0)? > seen))?;
            seen = page.get(0)?;
        }
        page.set(8, 1)
    })
}

/// Shares the first page of the memory, if the guest is protected.
fn share_page(guest: &mut Guest<'_>) -> Outcome {
    if guest.kind.is_protected() {
        guest.store(MEMORY, 0)?;
        guest.share(MEMORY, 1)?;
    }
    Ok(())
}

/// Each of four vCPUs gets its turn while all of them spin.
fn more_vcpus_than_cpus(kind: Kind) -> Outcome {
    const VCPUS: usize = 4;
    let machine = Plan::new(kind, VCPUS).vcpus(VCPUS as u64).build()?;
    let mut first = machine.boot()?;
    if kind.is_protected() {
        first.fill(MEMORY, VCPUS as u64, 0, 0)?;
        first.share(MEMORY, VCPUS as u64)?;
    }
    machine.memory.mapping.fill(0)?;
    let page = |index: usize| index * PAGE;
    std::thread::scope(|scope| -> Outcome {
        let mut threads = Vec::new();
        for index in 1..VCPUS {
            let machine = &machine;
            threads.push(scope.spawn(move || {
                let mut guest = machine.guest(index);
                guest.start()?;
                guest.run(guest::count(), &[kind.shared(MEMORY + page(index) as u64)]).map(drop)
            }));
            check_eq!(first.cpu_on(index as u64)?, 0, "CPU_ON");
        }
        let mapping = &machine.memory.mapping;
        let watcher = scope.spawn(move || -> Outcome {
            for _ in 0..3 {
                for index in 0..VCPUS {
                    let before = mapping.get(page(index))?;
                    wait_until("a vCPU counts", Duration::from_secs(30), || Ok(mapping.get(page(index))? > before))?;
                }
            }
            Ok(())
        });
        let stopper = scope.spawn(move || -> Outcome {
            let result = watcher.join().map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
            (0..VCPUS).try_for_each(|index| mapping.set(page(index) + 8, 1))?;
            result
        });
        first.run(guest::count(), &[kind.shared(MEMORY)])?;
        for thread in threads.into_iter().chain([stopper]) {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

/// A child whose vCPU executes code that does not end is killed, and ends soon.
fn killed(kind: Kind, code: &'static [u64]) -> Outcome {
    drop(Vm::new(kind)?);
    for delay in [0, 20, 100, 300] {
        let child = Child::new(|| {
            let machine = Plan::new(kind, 16).build()?;
            let mut guest = machine.boot()?;
            guest.fill(MEMORY, 16, 0, 1)?;
            guest.run(code, &[]).map(drop)
        })?;
        sleep_ms(100 + delay);
        let start = Instant::now();
        let status = child.end()?;
        anyhow::ensure!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{status:?}");
        let elapsed = start.elapsed();
        anyhow::ensure!(elapsed < Duration::from_secs(5), "it took {elapsed:?} to end");
    }
    Ok(())
}

fn killed_while_it_spins(kind: Kind) -> Outcome {
    killed(kind, guest::spin())
}

fn killed_while_it_waits(kind: Kind) -> Outcome {
    snippets! {
        /// Waits for ever.
        wait_for_ever: "4: wfi", "b 4b";
    }
    killed(kind, wait_for_ever())
}

/// Guests that spin on all CPUs for longer than the watchdog is patient do not disturb the host.
fn soft_lockup() -> Outcome {
    const THRESHOLD: &str = "/proc/sys/kernel/watchdog_thresh";
    let usual = std::fs::read_to_string(THRESHOLD)?;
    // The watchdog barks after twice as many seconds.
    std::fs::write(THRESHOLD, "3")?;
    let mark = format!("kvm-tests: guests spin, process {}", std::process::id());
    // Without the end of a line it would not be shown yet.
    std::fs::write("/dev/kmsg", format!("{mark}\n"))?;
    let mut children = Vec::new();
    for index in 0..host::cpus() {
        children.push(Child::new(move || {
            pin(Pid::from_raw(0), index)?;
            let machine = Plan::new(KINDS[index % 3], 1).build()?;
            let mut guest = machine.boot()?;
            guest.run(guest::spin(), &[]).map(drop)
        })?);
    }
    sleep_ms(11_000);
    let mut result = Ok(());
    for child in children {
        let status = child.end()?;
        let killed = matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _));
        if !killed && kvm::is_ravelin() {
            result = Err(anyhow::anyhow!("a guest that spins: {status:?}"));
        }
    }
    std::fs::write(THRESHOLD, usual.trim())?;
    let log = host::kernel_log()?;
    let (_, since) = log.split_once(&mark).ok_or_else(|| anyhow::anyhow!("the log has no mark"))?;
    for complaint in ["soft lockup", "hard LOCKUP", "rcu: INFO", "blocked for more than"] {
        anyhow::ensure!(!since.contains(complaint), "the kernel says: {since}");
    }
    result
}

/// Memory whose file is closed before the guest has any of it.
fn memory_fault(kind: Kind) -> Outcome {
    const OTHER: u64 = 0xa000_0000;
    let machine = Plan::new(kind, 1).build()?;
    let file = machine.vm.shared_memfd(4 * PAGE)?;
    works("slot 5", machine.vm.bind(5, OTHER, 4 * PAGE as u64, &file, 0))?;
    drop(file);
    let mut guest = machine.boot()?;
    guest.begin_code(guest::load(), &[OTHER + 0x2008])?;
    for _ in 0..2 {
        match guest.exit()? {
            Exit::MemoryFault { errno: Errno::EFAULT, address, size, .. } => {
                check_eq!([address, size], [OTHER + 0x2000, PAGE as u64], "what the exit names");
            }
            exit => anyhow::bail!("{exit:x?}"),
        }
    }
    if kind.is_protected() {
        return Ok(());
    }
    // Memory comes, and the guest goes on.
    works("deleted", machine.vm.delete_slot(5))?;
    let file = machine.vm.shared_memfd(4 * PAGE)?;
    works("slot 5 again", machine.vm.bind(5, OTHER, 4 * PAGE as u64, &file, 0))?;
    guest.finish()?;
    check_eq!(guest.load(OTHER + 8)?, 0, "what the guest loads");
    Ok(())
}

/// What was memory is a device's place then, and memory again.
fn slot_deleted_under_the_guest() -> Outcome {
    let machine = Plan::new(Kind::Ordinary, 4).backing(Backing::Memfd).build()?;
    let mut guest = machine.boot()?;
    for round in 0..10 {
        guest.store(MEMORY + 8, round)?;
        works("deleted", machine.vm.delete_slot(MEMORY_SLOT))?;
        guest.begin_code(guest::load(), &[MEMORY + 8])?;
        check_eq!(guest.exit()?, Exit::Mmio { address: MEMORY + 8, size: 8, write: false, value: 0 }, "exit");
        guest.vcpu.answer(0x77)?;
        check_eq!(guest.finish()?.x[0], 0x77, "what the guest loads from the device");
        let file = machine.memory.file()?;
        works("bound", machine.vm.bind(MEMORY_SLOT, MEMORY, 4 * PAGE as u64, file, 0))?;
        check_eq!(guest.load(MEMORY + 8)?, round, "what it has stored");
    }
    Ok(())
}

/// `KVM_PRE_FAULT_MEMORY`; returns what is left of the range.
fn pre_fault_range(vcpu: &Vcpu, gpa: u64, size: u64, flags: u64) -> (Result<i32, Errno>, u64) {
    let mut range = kvm_pre_fault_memory { gpa, size, flags, padding: [0; 5] };
    let result = kvm::ioctl_with(&vcpu.fd, kvm::PRE_FAULT_MEMORY, &mut range);
    (result, range.size)
}

fn pre_fault(kind: Kind) -> Outcome {
    const PAGES: u64 = 64;
    if !kvm::is_ravelin() {
        crate::check::skip!("this KVM has no KVM_PRE_FAULT_MEMORY");
    }
    let machine = Plan::new(kind, PAGES as usize).build()?;
    machine.memory.mapping.set(0, 0x11)?;
    let mut guest = machine.boot()?;
    let vcpu = &machine.vcpus[0];
    let page = PAGE as u64;
    check_eq!(pre_fault_range(vcpu, MEMORY, page, 0), (Ok(0), 0), "the first page");
    check_eq!(pre_fault_range(vcpu, MEMORY + page, (PAGES - 1) * page, 0), (Ok(0), 0), "the others");
    check_eq!(pre_fault_range(vcpu, MEMORY, PAGES * page, 0), (Ok(0), 0), "all of them again");
    if kind.is_protected() {
        machine.memory.mapping.check_bus_error(5 * PAGE)?;
    }
    check_eq!(guest.load(MEMORY)?, 0x11, "what the host has put there");
    guest.check_zero(MEMORY + page, PAGES - 1)
}

fn pre_fault_arguments(kind: Kind) -> Outcome {
    const PAGES: u64 = 4;
    if !kvm::is_ravelin() {
        crate::check::skip!("this KVM has no KVM_PRE_FAULT_MEMORY");
    }
    let machine = Plan::new(kind, PAGES as usize).build()?;
    let _guest = machine.boot()?;
    let vcpu = &machine.vcpus[0];
    let page = PAGE as u64;
    for (gpa, size, flags) in
        [(MEMORY + 1, page, 0), (MEMORY, page + 1, 0), (MEMORY, 0, 0), (MEMORY, page, 1), (!0xfff, 2 * page, 0)]
    {
        let (result, left) = pre_fault_range(vcpu, gpa, size, flags);
        fails(format_args!("{size:#x} bytes at {gpa:#x}, flags {flags}"), result, Errno::EINVAL)?;
        check_eq!(left, size, "what is left");
    }
    let (result, left) = pre_fault_range(vcpu, 0x7000_0000, page, 0);
    fails("where nothing is", result, Errno::ENOENT)?;
    check_eq!(left, page, "what is left");
    // As far as it goes.
    let (result, left) = pre_fault_range(vcpu, MEMORY + 2 * page, 4 * page, 0);
    anyhow::ensure!(result == Ok(0) || result == Err(Errno::ENOENT), "beyond the end: {result:?}");
    check_eq!(left, 2 * page, "what is left");
    Ok(())
}

/// A slot comes and goes while another thread faults it in.
fn pre_fault_and_deletion() -> Outcome {
    const PAGES: u64 = 64;
    const ROUNDS: u64 = 200;
    if !kvm::is_ravelin() {
        crate::check::skip!("this KVM has no KVM_PRE_FAULT_MEMORY");
    }
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let machine = Plan::new(Kind::Ordinary, PAGES as usize).backing(backing).build()?;
        let mut guest = machine.boot()?;
        let (vcpu, page) = (&machine.vcpus[0], PAGE as u64);
        let stop = AtomicBool::new(false);
        let [good, missing] = std::thread::scope(|scope| -> Outcome<[u64; 2]> {
            let faults = scope.spawn(|| -> Outcome<[u64; 2]> {
                let [mut good, mut missing] = [0; 2];
                while !stop.load(Ordering::Relaxed) {
                    match pre_fault_range(vcpu, MEMORY, PAGES * page, 0) {
                        (Ok(_), 0) => good += 1,
                        // As far as it got.
                        (Ok(_) | Err(Errno::ENOENT), 1..) => missing += 1,
                        other => anyhow::bail!("KVM_PRE_FAULT_MEMORY: {other:?}"),
                    }
                }
                Ok([good, missing])
            });
            let result = (0..ROUNDS).try_for_each(|round| -> Outcome {
                works(format_args!("deletion {round}"), machine.vm.delete_slot(MEMORY_SLOT))?;
                machine.memory.add(&machine.vm, MEMORY_SLOT, MEMORY)
            });
            stop.store(true, Ordering::Relaxed);
            let counts = faults.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?;
            result.and(counts)
        })?;
        machine.memory.mapping.fill_pattern(0, PAGES as usize, 0, 3)?;
        guest.check(MEMORY, PAGES, 0, 3)?;
        anyhow::ensure!(missing > 0, "{backing:?}: no race, {good} times there was all");
        works("deletion", machine.vm.delete_slot(MEMORY_SLOT))?;
        let (result, left) = pre_fault_range(vcpu, MEMORY, PAGES * page, 0);
        fails("where a slot was", result, Errno::ENOENT)?;
        check_eq!(left, PAGES * page, "what is left");
    }
    Ok(())
}

/// A realm's call to its host: an immediate, and x0 to x4 of those that it sends; what comes back is in x0.
fn realm_calls_its_host() -> Outcome {
    const HOST_CALL: u64 = 0xc400_0199;
    /// Index of `flags` among the words of the exit, and the flag for SMC.
    const FLAGS: usize = 8;
    const SMC: u64 = 1;
    let machine = Plan::new(Kind::Realm, 2).build()?;
    let mut guest = machine.boot()?;
    // An upper half that the immediate does not have.
    guest.store(MEMORY + 256, 0xabcd_0000_0000_1234)?;
    for register in 0..31 {
        guest.store(MEMORY + 264 + 8 * register, 0x1000 + register)?;
    }
    for result in [0x5555_6666_7777_8888, 0] {
        let first = guest.load(MEMORY + 264)?;
        guest.begin_code(guest.conduit(), &[HOST_CALL, MEMORY + 256])?;
        let Exit::Hypercall { number, arguments } = guest.exit()? else { anyhow::bail!("no exit for the call") };
        check_eq!(number, HOST_CALL, "the number of the exit");
        check_eq!(arguments, [0x1234, first, 0x1001, 0x1002, 0x1003, 0x1004], "its arguments");
        check_eq!(guest.vcpu.word(FLAGS)?, SMC, "its flags");
        guest.vcpu.set_return(result)?;
        check_eq!(guest.finish()?.x[0], 0, "RSI_HOST_CALL");
        check_eq!(guest.load(MEMORY + 264)?, result, "x0 afterwards");
        for register in 1..31 {
            check_eq!(guest.load(MEMORY + 264 + 8 * register)?, 0x1000 + register, "x{register} afterwards");
        }
    }
    // The host does not hear of a call with an address that is none.
    for bad in [MEMORY + 8, Kind::Realm.shared(MEMORY)] {
        check_eq!(guest.call(&[HOST_CALL, bad])?[0], 1, "RSI_HOST_CALL at {bad:#x}");
    }
    Ok(())
}

/// Anonymous memory is not pinned: it may be unmapped, replaced, and given up.
fn anonymous_memory_is_changed_under_the_guest() -> Outcome {
    let machine = Plan::new(Kind::Ordinary, 16).build()?;
    let mapping = &machine.memory.mapping;
    let mut guest = machine.boot()?;
    for round in 0..5 {
        guest.fill(MEMORY, 16, 0, round)?;
        mapping.check_pattern(0, 16, 0, round)?;
        mapping.fill_pattern(0, 16, 0, round + 100)?;
        guest.check(MEMORY, 16, 0, round + 100)?;
        // A child that copies on write does not see what the guest writes.
        let (go, told) = (nix::unistd::pipe()?, nix::unistd::pipe()?);
        let child = Child::new(|| {
            works("write", nix::unistd::write(&told.1, &[1]))?;
            works("read", nix::unistd::read(&go.0, &mut [0]))?;
            mapping.check_pattern(0, 16, 0, round + 100)
        })?;
        works("read", nix::unistd::read(&told.0, &mut [0]))?;
        guest.fill(MEMORY, 16, 0, round + 200)?;
        mapping.check_pattern(0, 16, 0, round + 200)?;
        works("write", nix::unistd::write(&go.1, &[1]))?;
        child.succeed()?;
        works("MADV_DONTNEED", mapping.advise(nix::sys::mman::MmapAdvise::MADV_DONTNEED))?;
        guest.check_zero(MEMORY, 16)?;
        mapping.check_words(0, 16 * PAGE, 0)?;
    }
    Ok(())
}

/// Vector registers of two guests and of their host do not mix.
fn floating_point(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).vcpus(2).build()?;
    let mut first = machine.boot()?;
    with_second(&machine, &mut first, |_| Ok(()))?;
    std::thread::scope(|scope| -> Outcome {
        let machine = &machine;
        let thread = scope.spawn(move || -> Outcome {
            let mut second = machine.guest(1);
            second.assume_idle();
            for round in 0..20 {
                check_eq!(second.run(vectors(), &[round, 20_000])?[0], 3 * round, "the sum in vCPU 1");
            }
            Ok(())
        });
        for round in 1000..1020 {
            check_eq!(first.run(vectors(), &[round, 20_000])?[0], 3 * round, "the sum in vCPU 0");
            let here: Vec<f64> = (0..64).map(|number| f64::from(number) * 1.5).collect();
            check_eq!(here.iter().sum::<f64>(), 3024.0, "the sum in the host");
        }
        thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
    })
}
