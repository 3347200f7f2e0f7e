//! What a Linux costs that runs as the host.

use anyhow::{Context, Result, bail};

use super::event::Event;
use super::report::Report;
use super::{Bench, USUAL_MEMORY};
use crate::initramfs::ExtraFile;
use crate::qemu::Outcome;
use crate::run;

/// Seconds that the host is watched.
const WINDOW: u32 = 5;

/// The host's command: warms the memory up by using nearly all of it once, then marks the beginning and the end of an idle
/// and of a busy time.
const HOST_SCRIPT: &str = r#"
mount -o remount,size=100% /tmp
count=$(awk '/^MemFree/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
mark
dd if=/dev/zero of=/tmp/fill bs=1M count=$count 2>/dev/null
rm /tmp/fill
sleep 1
mark
sleep WINDOW
mark
for cpu in $(seq $(nproc)); do
    while :; do :; done &
    loops="$loops $!"
done
sleep 1
mark
sleep WINDOW
mark
kill $loops
"#;

impl Bench {
    /// Watches Linux.
    pub(super) fn host(&self, report: &mut Report) -> Result<()> {
        let options = run::Options {
            smp: Some(2),
            memory: Some(format!("{USUAL_MEMORY}M")),
            exec: Some(HOST_SCRIPT.replace("WINDOW", &WINDOW.to_string())),
            extra_files: vec![ExtraFile { path: "bin/mark".into(), contents: mark_program() }],
            ..run::Options::default()
        };
        let (_, events) = self.run(&options, "", Outcome::Status(0))?;
        let second = events.iter().find(|event| event.kind == "first-el1" && event.get("cpu") == 1);
        let second = second.context("the second CPU has not started")?.get("el2.instructions");
        report.add("host.start-of-second-cpu.instructions", second as f64);
        let marks: Vec<_> = events.iter().filter(|event| event.kind == "mark-all").collect();
        let [boot, warm, idle, busy_start, busy] = marks[..] else { bail!("{} marks, not 5", marks.len()) };

        report.add("host.boot.entries", host_entries(boot) as f64);
        report.add("host.warm-up.entries", host_entries(warm) as f64);
        for (name, before, window) in [("idle", warm, idle), ("busy", busy_start, busy)] {
            let seconds = (window.get("nanoseconds") - before.get("nanoseconds")) as f64 / 1e9;
            report.add(format!("host.{name}.entries-per-second"), host_entries(window) as f64 / seconds).target(0.0);
            let idle_calls = PSCI_CPU_SUSPEND.iter().map(|call| window.get(call)).sum::<u64>();
            report.add(format!("host.{name}.psci-idle-calls-per-second"), idle_calls as f64 / seconds);
        }
        for (name, window) in [("boot", boot), ("warm-up", warm), ("idle", idle), ("busy", busy)] {
            for (key, count) in window.fields.iter().filter(|(key, _)| key.starts_with("class.")) {
                report.add(format!("host.{name}.{key}"), *count as f64);
            }
        }
        Ok(())
    }
}

/// The counter's names of CPU_SUSPEND, 32-bit and 64-bit.
const PSCI_CPU_SUSPEND: [&str; 2] = ["call.0x84000001", "call.0xc4000001"];

/// Entries into EL2 that are not the host's way to say that it has nothing to do.
pub(super) fn host_entries(counts: &Event) -> u64 {
    counts.sum("entry.") - PSCI_CPU_SUSPEND.iter().map(|call| counts.get(call)).sum::<u64>()
}

/// A static Linux program for arm64 that executes mark 0 and ends with status 0.
pub(super) fn mark_program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const CODE: [u32; 4] = [
        0xd503_281f, // hint #0x40
        0xd280_0000, // mov x0, #0
        0xd280_0ba8, // mov x8, #93, exit
        0xd400_0001, // svc #0
    ];
    let (header, program_header) = (64u64, 56u64);
    let size = header + program_header + CODE.len() as u64 * 4;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"); // 64 bits, little endian, version 1
    elf.extend([2u16, 183].into_iter().flat_map(u16::to_le_bytes)); // ET_EXEC, EM_AARCH64
    elf.extend(1u32.to_le_bytes());
    elf.extend([BASE + header + program_header, header, 0].into_iter().flat_map(u64::to_le_bytes)); // entry, headers
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 1, 64, 0, 0].into_iter().flat_map(u16::to_le_bytes)); // sizes and counts of headers
    elf.extend([1u32, 5].into_iter().flat_map(u32::to_le_bytes)); // PT_LOAD, readable and executable
    elf.extend([0, BASE, BASE, size, size, 0x1_0000].into_iter().flat_map(u64::to_le_bytes));
    elf.extend(CODE.into_iter().flat_map(u32::to_le_bytes));
    elf
}

#[cfg(test)]
mod tests {
    use object::{Object, ObjectSegment};

    use super::*;

    #[test]
    fn idle_calls_are_no_entries() {
        let line = "mark-all entry.lower64.sync=3 entry.lower64.irq=1 call.0xc4000001=2";
        assert_eq!(host_entries(&Event::parse(line).unwrap()), 2);
    }

    #[test]
    fn the_mark_program_is_an_executable() {
        let program = mark_program();
        let elf = object::read::elf::ElfFile64::<object::LittleEndian>::parse(&program[..]).unwrap();
        let segment = elf.segments().next().unwrap();
        assert_eq!(segment.size(), program.len() as u64);
        let code = (elf.entry() - segment.address()) as usize;
        assert_eq!(program[code..][..4], 0xd503_281f_u32.to_le_bytes());
    }
}
