//! Runs a program of known length under QEMU and compares every count.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the program is loaded: clear of the DTB, which QEMU puts at the start of RAM.
const ENTRY: u64 = 0x4020_0000;

/// The vectors, as an offset in the program; `PROGRAM` takes their address in its first instruction.
const VECTORS: usize = 0x800;

/// Position-independent A64, entered at EL2. It drops to EL1, calls EL2 twice, turns on a second CPU if there is one and
/// powers off through PSCI, which QEMU plays itself.
const PROGRAM: [u32; 56] = [
    // el2:
    0x1000_4009, // adr x9, <vectors>
    0xd51c_c009, // msr vbar_el2, x9
    0xd503_3fdf, // isb
    0xd503_281f, // hint #0x40
    0x9140_0521, // add x1, x9, #0x1, lsl #12
    0xf900_0029, // str x9, [x1]
    0xf940_0022, // ldr x2, [x1]
    0xa900_0822, // stp x2, x2, [x1]
    0x2940_1023, // ldp w3, w4, [x1]
    0xd503_3a9f, // dsb ishst
    0xd50c_8022, // tlbi ipas2e1is, x2
    0xd503_3b9f, // dsb ish
    0xd508_831f, // tlbi vmalle1is
    0xd503_3b9f, // dsb ish
    0xd503_3fdf, // isb
    0xd503_283f, // hint #0x41
    0xd2b0_0002, // mov x2, #0x80000000
    0xd51c_1102, // msr hcr_el2, x2
    0xd280_78a2, // mov x2, #0x3c5
    0xd51c_4002, // msr spsr_el2, x2
    0x1000_0062, // adr x2, <el1>
    0xd51c_4022, // msr elr_el2, x2
    0xd69f_03e0, // eret
    // el1:
    0xd503_285f, // hint #0x42
    0xd280_0c83, // mov x3, #0x64
    0xf100_0463, // subs x3, x3, #0x1
    0x54ff_ffe1, // b.ne <el1+0x8>
    0xd503_287f, // hint #0x43
    0x5282_0000, // mov w0, #0x1000
    0x72b8_c000, // movk w0, #0xc600, lsl #16
    0xd400_0002, // hvc #0x0
    0xd400_0002, // hvc #0x0
    0xd503_2fff, // hint #0x7f
    0xb900_003f, // str wzr, [x1]
    0x5280_0060, // mov w0, #0x3
    0x72b8_8000, // movk w0, #0xc400, lsl #16
    0xaa01_03e4, // mov x4, x1
    0xd280_0021, // mov x1, #0x1
    0x1000_0142, // adr x2, <second>
    0xaa04_03e3, // mov x3, x4
    0xd400_0003, // smc #0x0
    0x3500_0060, // cbnz w0, <off>
    0xb940_0082, // ldr w2, [x4]
    0x34ff_ffe2, // cbz w2, <el1+0x4c>
    // off:
    0x5280_0100, // mov w0, #0x8
    0x72b0_8000, // movk w0, #0x8400, lsl #16
    0xd400_0003, // smc #0x0
    0x1400_0000, // b <off+0xc>
    // second:
    0xd503_289f, // hint #0x44
    0x5280_0141, // mov w1, #0xa
    0x5100_0421, // sub w1, w1, #0x1
    0x35ff_ffe1, // cbnz w1, <second+0x8>
    0xd503_28bf, // hint #0x45
    0xb900_0000, // str w0, [x0]
    0xd503_207f, // wfi
    0x17ff_ffff, // b <second+0x18>
];

/// EL2's vector for synchronous exceptions from AArch64 below, at 0x400 in the table.
const VECTOR: [u32; 2] = [
    0xf940_0022, // ldr x2, [x1]
    0xd69f_03e0, // eret
];

/// The same at EL2 alone: turns on a second CPU, which loops for ever, and then runs a barrier and a loop of 1000 between marks.
const TURNS_PROGRAM: [u32; 23] = [
    0x5280_0060, // mov w0, #0x3
    0x72b8_8000, // movk w0, #0xc400, lsl #16
    0xd280_0021, // mov x1, #0x1
    0x1000_0202, // adr x2, <second>
    0x1000_0244, // adr x4, <flag>
    0xaa04_03e3, // mov x3, x4
    0xd400_0003, // smc #0x0
    0xb940_0082, // ldr w2, [x4]
    0x34ff_ffe2, // cbz w2, <first+0x1c>
    0xd503_281f, // hint #0x40
    0xd503_3fdf, // isb
    0xd280_7d05, // mov x5, #0x3e8
    0xf100_04a5, // subs x5, x5, #0x1
    0x54ff_ffe1, // b.ne <first+0x30>
    0xd503_283f, // hint #0x41
    0x5280_0100, // mov w0, #0x8
    0x72b0_8000, // movk w0, #0x8400, lsl #16
    0xd400_0003, // smc #0x0
    0x1400_0000, // b <first+0x48>
    // second:
    0x5280_0025, // mov w5, #0x1
    0xb900_0005, // str w5, [x0]
    0x1400_0000, // b <second+0x8>
    // flag:
    0,
];

fn plugin() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.with_file_name("libravelin_counter.so")
}

/// QEMU, if there is one that has version 4 of the plugin interface: the tests are about nothing without it.
fn qemu() -> Option<String> {
    let qemu = std::env::var("RAVELIN_QEMU").unwrap_or_else(|_| "qemu-system-aarch64".into());
    let found = Command::new(&qemu).arg("--version").output().ok().and_then(|output| {
        let text = String::from_utf8(output.stdout).ok()?;
        text.split("version ").nth(1)?.split('.').next()?.parse::<u32>().ok()
    });
    match found {
        Some(10..) => return Some(qemu),
        // Straight to the stream: the harness hides what a passing test prints.
        Some(major) => writeln!(std::io::stderr(), "SKIPPED: needs QEMU 10, {qemu} is {major}"),
        None => writeln!(std::io::stderr(), "SKIPPED: {qemu} does not run; set RAVELIN_QEMU"),
    }
    .expect("stderr is open");
    None
}

/// Runs the program and returns the plugin's report.
fn run(qemu: &str, name: &str, cpu: &str, cpus: u32, option: &str) -> Vec<String> {
    let mut bytes = vec![0; VECTORS + 0x400];
    for (index, word) in PROGRAM.iter().enumerate() {
        bytes[index * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
    bytes.extend(VECTOR.iter().flat_map(|word| word.to_le_bytes()));
    run_image(qemu, name, &bytes, &["-cpu", cpu, "-smp", &cpus.to_string(), "-accel", "tcg,thread=multi"], option)
}

/// Runs an image and returns the plugin's report without the times, which alone may differ between runs.
fn run_image(qemu: &str, name: &str, bytes: &[u8], arguments: &[&str], option: &str) -> Vec<String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (image, report) = (folder.join(format!("{name}.bin")), folder.join(format!("{name}.txt")));
    std::fs::write(&image, bytes).expect("the target folder can be written");

    let output = Command::new(qemu)
        .args(["-machine", "virt,gic-version=3,virtualization=on", "-m", "128M"])
        .args(arguments)
        .args(["-display", "none", "-monitor", "none", "-serial", "none", "-nodefaults", "-no-reboot"])
        .arg("-device")
        .arg(format!("loader,file={},addr={ENTRY:#x},cpu-num=0,force-raw=on", image.display()))
        .arg("-plugin")
        .arg(format!("file={},out={}{option}", plugin().display(), report.display()))
        .output()
        .expect("QEMU has run before");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let report = std::fs::read_to_string(report).expect("the plugin wrote its report");
    let timeless =
        |line: &str| line.split(' ').filter(|word| !word.starts_with("nanoseconds=")).collect::<Vec<_>>().join(" ");
    report.lines().map(timeless).collect()
}

/// What one CPU does, line by line. `PROGRAM` says why: for instance 11 instructions from `hint #0x40` to `hint #0x41`,
/// of which `stp` is one store and `ldp` of two words one load; 201 in a loop of 100.
const EXPECTED: [&str; 6] = [
    "mark number=0 cpu=0 level=2 el2.instructions=3 el2.isb=1 el2.sysreg=1",
    "mark number=1 cpu=0 level=2 el2.instructions=11 el2.loads=2 el2.stores=2 el2.dsb=3 el2.isb=1 \
     el2.tlbi.vmalle1is=1 el2.tlbi.ipas2e1is=1",
    "first-el1 cpu=0 level=1 el2.instructions=21 el2.loads=2 el2.stores=2 el2.dsb=3 el2.isb=2 el2.sysreg=4 \
     el2.tlbi.vmalle1is=1 el2.tlbi.ipas2e1is=1",
    "mark number=2 cpu=0 level=1 el2.instructions=7 el2.sysreg=3",
    "mark number=3 cpu=0 level=1 el1.instructions=201",
    "mark number=63 cpu=0 level=1 el1.instructions=4 el2.instructions=4 el2.loads=2 \
     entry.lower64.sync=2 class.0x16=2 call.0xc6001000=2",
];

#[test]
fn one_cpu_counts_exactly_and_repeats() {
    let Some(qemu) = qemu() else { return };
    for cpu in ["cortex-a53", "cortex-a76", "max"] {
        let first = run(&qemu, cpu, cpu, 1, "");
        assert_eq!(first[..EXPECTED.len()], EXPECTED, "{cpu}");
        assert_eq!(
            first[EXPECTED.len()..],
            ["total cpu=0 el1.instructions=217 el1.stores=1 el2.instructions=25 el2.loads=4 el2.stores=2 el2.dsb=3 \
              el2.isb=2 el2.sysreg=4 el2.tlbi.vmalle1is=1 el2.tlbi.ipas2e1is=1 entry.lower64.sync=2 class.0x16=2 call.0xc6001000=2"],
            "{cpu}"
        );
        assert_eq!(first, run(&qemu, cpu, cpu, 1, ""), "{cpu}");
    }
}

#[test]
fn two_cpus_are_counted_apart() {
    let Some(qemu) = qemu() else { return };
    let report = run(&qemu, "two", "cortex-a72", 2, "");
    let of = |event: &str| report.iter().filter(|line| line.starts_with(event)).cloned().collect::<Vec<_>>();

    // The second CPU counts its own 21 instructions, whatever the first, which waits for it, does meanwhile.
    let marks = of("mark ");
    assert_eq!(marks[..5], [EXPECTED[0], EXPECTED[1], EXPECTED[3], EXPECTED[4], EXPECTED[5]]);
    assert_eq!(marks[5..], ["mark number=4 cpu=1 level=2", "mark number=5 cpu=1 level=2 el2.instructions=21"]);
    assert_eq!(of("first-el1 "), [EXPECTED[2]]);
    let sums = of("mark-all ");
    assert_eq!(sums.len(), marks.len());
    assert!(sums[6].contains("number=5") && sums[6].ends_with("el2.instructions=21"), "{}", sums[6]);
    let totals = of("total ");
    assert_eq!(totals.len(), 2);
    assert!(totals[1].starts_with("total cpu=1 el2.instructions=2"), "{}", totals[1]);
}

#[test]
fn profile_has_every_instruction_at_el2() {
    let Some(qemu) = qemu() else { return };
    let report = run(&qemu, "profile", "cortex-a72", 1, ",profile=on");
    let vectors = ENTRY + VECTORS as u64;
    // Marks have a place in the order of instructions, but are not counted.
    let first = format!("profile vectors={vectors} {:#x}=1 {:#x}=1 {:#x}=1", ENTRY, ENTRY + 4, ENTRY + 8);
    assert_eq!(report[..2], [first, EXPECTED[0].into()]);
    let calls = format!("profile vectors={vectors} {:#x}=2 {:#x}=2", vectors + 0x400, vectors + 0x404);
    let last_mark = report.iter().position(|line| line == EXPECTED[5]).expect("the report has the same events");
    assert_eq!(report[last_mark - 1], calls);
}

#[test]
fn marks_say_where_translation_tables_are() {
    let Some(qemu) = qemu() else { return };
    let report = run(&qemu, "tables", "cortex-a72", 1, ",tables=on");
    // The program sets HCR_EL2.RW behind its second mark, and no other of these registers.
    let tables = |hcr: u64| format!("tables hcr_el2={hcr} vtcr_el2=0 vttbr_el2=0 tcr_el1=0 ttbr0_el1=0");
    assert_eq!(report[..4], [tables(0), EXPECTED[0].into(), tables(0), EXPECTED[1].into()]);
    let mark = report.iter().position(|line| line == EXPECTED[3]).expect("the report has the same events");
    assert_eq!(report[mark - 1], tables(1 << 31));
}

#[test]
fn two_cpus_take_turns() {
    let Some(qemu) = qemu() else { return };
    let program: Vec<_> = TURNS_PROGRAM.iter().flat_map(|word| word.to_le_bytes()).collect();
    for (steps, turns) in [(",one-insn-per-tb=on", &[1, 10, 100][..]), ("", &[10, 100])] {
        let accelerator = format!("tcg,thread=single{steps}");
        let arguments = ["-cpu", "cortex-a72", "-smp", "2", "-accel", &accelerator, "-icount", "shift=4,sleep=off"];
        for turn in turns {
            let run = || run_image(&qemu, &format!("turns-{turn}"), &program, &arguments, &format!(",turns={turn}"));
            let report = run();
            assert_eq!(report, run());
            assert_eq!(report[0], "mark-all number=0");
            // The first CPU executes 2002, and the other one as many, but for what a turn leaves undone.
            let count = report[1].strip_prefix("mark-all number=1 el2.instructions=");
            let count = count.and_then(|rest| rest.strip_suffix(" el2.isb=1")).map(str::parse::<u64>);
            assert!(matches!(count, Some(Ok(count)) if count.abs_diff(4004) <= 2 * turn), "{report:?}");
        }
    }
}

#[test]
fn unknown_arguments_are_refused() {
    let Some(qemu) = qemu() else { return };
    let output = Command::new(qemu)
        .args(["-machine", "virt", "-display", "none", "-plugin"])
        .arg(format!("file={},in=x", plugin().display()))
        .output()
        .expect("QEMU has run before");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("unknown argument in=x"));
}
