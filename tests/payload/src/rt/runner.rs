//! Runs the tests that the command line asks for and prints a line for each.

use crate::{
    rt::{
        call,
        console::{print, println},
        cpu::{self, read_register},
        exit::exit,
        platform::Platform,
        tally,
    },
    table::{TESTS, Test},
    tests::{Failure, has_hypervisor, prepare, restore},
};

/// Runs the tests and ends the machine: status 0 if none failed.
pub(crate) fn run(platform: &'static Platform) -> ! {
    println!(
        "payload: {} CPUs, {} MiB of RAM",
        platform.cpus.len(),
        platform.ram.iter().map(|r| r.size()).sum::<u64>() >> 20
    );
    for cpu in 1..platform.cpus.len() {
        if let Err(status) = cpu::turn_on(cpu) {
            panic!("CPU_ON of CPU {cpu} failed with {status}");
        }
    }
    if has_hypervisor() {
        prepare();
    } else {
        println!("payload: no Ravelin here");
    }
    let wanted = platform.argument("test").unwrap_or("all");
    let first = platform
        .argument("after")
        .map_or(0, |name| TESTS.iter().position(|test| test.name == name).map_or(TESTS.len(), |index| index + 1));
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    let skipped = platform.argument("skip").unwrap_or("");
    for test in TESTS.iter().skip(first).filter(|test| selected(test.name, wanted) && !selected(test.name, skipped)) {
        print!("test {} ... ", test.name);
        if let Some(need) = missing(test, platform) {
            println!("ignored: needs {need}");
            ignored += 1;
            continue;
        }
        match run_one(test) {
            Ok(()) => {
                println!("ok");
                passed += 1;
            }
            Err(failure) => {
                println!("FAILED: {failure}");
                failed += 1;
            }
        }
    }
    println!("payload: {passed} passed; {failed} failed; {ignored} ignored");
    exit(u64::from(failed != 0 || passed + ignored == 0))
}

fn selected(name: &str, wanted: &str) -> bool {
    wanted.split(',').any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => pattern == "all" || pattern == name,
    })
}

fn missing(test: &Test, platform: &Platform) -> Option<&'static str> {
    if platform.cpus.len() < test.cpus {
        return Some(["0 CPUs", "1 CPU", "2 CPUs", "3 CPUs", "4 CPUs"][test.cpus]);
    }
    (platform.free(test.memory, test.memory.max(1)).is_none()).then_some("more RAM")
}

/// Runs one test, and checks what holds for all of them: that it used the calls that it claims to test, that no call changed
/// a register that it must keep, that memory is back in the host's hands, and that no asynchronous error is pending.
fn run_one(test: &Test) -> Result<(), Failure> {
    tally::clear();
    call::take_corruption();
    let result = (test.run)();
    let corrupted = call::take_corruption();
    let unused =
        call::table().enumerate().find(|&(index, call)| test.calls.contains(&call.name) && !tally::has_call(index));
    let restored = if has_hypervisor() { restore() } else { Ok(()) };
    result?;
    if corrupted {
        return Err(Failure::new(format_args!("a call changed one of x4 to x30")));
    }
    if let Some((_, call)) = unused {
        return Err(Failure::new(format_args!("it did not use {}", call.name)));
    }
    if read_register!("isr_el1") & 1 << 8 != 0 {
        return Err(Failure::new(format_args!("an SError is pending")));
    }
    restored
}
