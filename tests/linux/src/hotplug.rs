//! CPUs go off and come back.

use core::ffi::CStr;

use crate::cpu;
use crate::report::{self, Message, bail, check};
use crate::sys::{self, Errno, File, WRONLY};

/// Takes each secondary CPU off and on again `rounds` times, and the first one some times.
pub(crate) fn run(rounds: usize) {
    let count = match cpu::present() {
        Ok(count) => count,
        Err(errno) => return check("the number of CPUs", Err(errno.into())),
    };
    check("each secondary CPU off and on", secondaries(count, rounds));
    match set(0, true) {
        Err(Errno::NOENT) => report::skip("the boot CPU off and on", "the kernel does not offer it"),
        _ if count == 1 => report::skip("the boot CPU off and on", "there is no other"),
        _ => check("the boot CPU off and on", (0..rounds.min(10)).try_for_each(|_| off_and_on(0, count))),
    }
    check("all CPUs work afterwards", cpu::on_all(1, |_| Ok(())));
}

/// In turns: one at a time, and all of them together.
fn secondaries(count: usize, rounds: usize) -> report::Result {
    for round in 0..rounds {
        if round % 2 == 0 {
            (1..count).try_for_each(|cpu| off_and_on(cpu, count))?;
            continue;
        }
        (1..count).try_for_each(|cpu| switch(cpu, false))?;
        expect_online(1)?;
        (1..count).rev().try_for_each(|cpu| switch(cpu, true))?;
        expect_online(count)?;
    }
    Ok(())
}

fn off_and_on(cpu: usize, count: usize) -> report::Result {
    switch(cpu, false)?;
    switch(cpu, true)?;
    expect_online(count)
}

fn switch(cpu: usize, on: bool) -> report::Result {
    set(cpu, on).map_err(|errno| Message::from(format_args!("CPU {cpu} {}: {errno}", if on { "on" } else { "off" })))
}

fn expect_online(count: usize) -> report::Result {
    let online = cpu::online()?;
    if online == count { Ok(()) } else { bail!("{online} CPUs are online, not {count}") }
}

fn set(cpu: usize, on: bool) -> Result<(), Errno> {
    let path = Message::from(format_args!("/sys/devices/system/cpu/cpu{cpu}/online\0"));
    let path = CStr::from_bytes_until_nul(path.as_bytes()).unwrap_or(c"");
    // It is on already, which is no change.
    let mut state = [0; 2];
    if sys::read_file(path, &mut state)?.first() == Some(&if on { b'1' } else { b'0' }) {
        return Ok(());
    }
    File::open(path, WRONLY)?.write(if on { b"1" } else { b"0" }).map(drop)
}
