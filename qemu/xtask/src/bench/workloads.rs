//! What the host's own work costs: the same boot and the same work on Linux without a hypervisor, with this one, and with
//! pKVM.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};

use super::event::Event;
use super::linux::{host_entries, mark_program};
use super::report::{Report, digits};
use super::side_by_side::PKVM;
use super::tables::{Ram, Reads, Tables, Usage};
use super::{Bench, USUAL_MEMORY, measurements, memory_backend};
use crate::guests::{self, STOCK};
use crate::initramfs::ExtraFile;
use crate::machine::Machine;
use crate::qemu::{Outcome, Scratch};
use crate::setup::packages::Manifest;
use crate::setup::{self, Needs};
use crate::{programs, run};

/// The most of all instructions that EL2 should execute while a booted host works, in percent.
const SHARE: f64 = 0.1;

/// Sizes of RAM in MiB that the host boots in.
const BOOTS: [u64; 4] = [1024, 4096, 16384, 65536];

/// Size of the disk in bytes: what the workload writes.
const DISK: u64 = 2 << 20;

/// Memory in MiB that is left to the kernel when a process takes the rest.
const LEFT_FREE: u32 = 64;

/// Prints how many MiB the hypervisor has reserved: as the device tree says, or the kernel that has pKVM.
const RESERVED: &str = r#"
for reg in /proc/device-tree/reserved-memory/ravelin@*/reg; do
    [ -e $reg ] && echo "reserved $((0x$(hexdump -v -s 8 -e '8/1 "%02x"' $reg) >> 20))"
done
dmesg | sed -n 's/.*kvm.*: Reserved \([0-9]*\) MiB.*/reserved \1/p'
"#;

/// What Linux runs on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum On {
    Nothing,
    Ravelin,
    Pkvm,
}

/// The kernel, and the files that it gets. It is the stock one for guests: of that there are drivers for a disk.
struct Host {
    kernel: PathBuf,
    files: Vec<ExtraFile>,
}

impl Host {
    fn new() -> Result<Self> {
        setup::ensure(&Needs { qemu: true, bare_metal: true, packages: &STOCK, ..Needs::default() })?;
        let manifest = Manifest::load()?;
        let mut files = vec![
            ExtraFile { path: "bin/mark".into(), contents: mark_program() },
            ExtraFile { path: "bin/probe".into(), contents: fs::read(programs::probe()?)? },
        ];
        let drivers = guests::drivers(&manifest.ensure(STOCK[1])?)?;
        let file = |(name, contents)| ExtraFile { path: format!("lib/drivers/{name}"), contents };
        files.extend(drivers.into_iter().map(file));
        Ok(Self { kernel: manifest.ensure(STOCK[0])?, files })
    }

    /// A machine whose counts repeat: time goes by with instructions, and random seeds are the same each time.
    fn options(&self, on: On, memory: u64, script: &str) -> run::Options {
        let (append, check) = if on == On::Pkvm { (PKVM.append, PKVM.script) } else { ("quiet", "") };
        run::Options {
            cpu: Some("cortex-a72".into()),
            smp: Some(1),
            memory: Some(format!("{memory}M")),
            host_kernel: Some(self.kernel.clone()),
            no_hypervisor: on != On::Ravelin,
            el2: on == On::Pkvm,
            icount: true,
            append: Some(append.into()),
            exec: Some(format!("{check}\n{script}")),
            extra_files: self.files.clone(),
            qemu_arg: ["-seed", "1"].map(str::to_owned).to_vec(),
            ..run::Options::default()
        }
    }
}

/// What a run of the workloads shows.
struct Work {
    /// By name, with the round: `boot`, `pipes.cold`, `pipes.warm`, and the like.
    counts: BTreeMap<String, Event>,
    /// The host's stage 2 once all of RAM has been used, and what it maps.
    stage2: Option<(Tables, Usage)>,
    /// What a CPU with nothing cached reads to translate an address of a process, by the level of its leaf.
    reads: [Reads; 4],
}

impl Bench {
    /// Boots Linux in machines of several sizes.
    pub(super) fn boots(&self, report: &mut Report) -> Result<()> {
        let host = Host::new()?;
        report.section("Linux as the host, 1 CPU: EL2 until user space");
        for memory in BOOTS {
            let boot = |on: &On| {
                let mut options = host.options(*on, memory, &format!("mark\n{RESERVED}"));
                options.qemu_arg.extend(memory_backend(memory));
                let (console, events) = self.run(&options, "", Outcome::Status(0))?;
                let mark = events.iter().find(|event| event.kind == "mark").context("there is no mark")?;
                Ok((mark.clone(), reserved(&console)?))
            };
            let [(ours, reserved), (theirs, their_reserved)] = together(&[On::Ravelin, On::Pkvm], boot)?;
            let instructions = |event: &Event| event.get("el2.instructions") as f64;
            let entries = |event| host_entries(event) as f64;
            let row = format!("boot.{memory}M");
            beside(report, &row, "instructions", instructions(&ours), instructions(&theirs));
            beside(report, &row, "entries", entries(&ours), entries(&theirs));
            beside(report, &row, "reserved-MiB", reserved, their_reserved);
        }
        Ok(())
    }

    /// Has Linux do the same work on nothing, on Ravelin and on pKVM.
    pub(super) fn workloads(&self, report: &mut Report) -> Result<()> {
        let host = Host::new()?;
        let [without, ours, theirs] = together(&[On::Nothing, On::Ravelin, On::Pkvm], |on| self.work(&host, *on))?;
        cost(report, &without, &ours, &theirs)?;
        translation(report, &without, &ours, &theirs)
    }

    fn work(&self, host: &Host, on: On) -> Result<Work> {
        let scratch = Scratch::new()?;
        let ram = scratch.path("ram");
        let script = format!(
            "for driver in /lib/drivers/*; do insmod $driver || exit 2; done
            probe workloads && probe linger {LEFT_FREE}"
        );
        let mut options = host.options(on, USUAL_MEMORY, &script);
        let path = ram.display().to_string().replace(',', ",,");
        let backend = format!("memory-backend-file,id=ram,size={USUAL_MEMORY}M,share=on,mem-path={path}");
        let drive = format!("if=none,id=disk,driver=null-co,read-zeroes=on,size={DISK}");
        let device = "virtio-blk-device,drive=disk";
        let arguments = ["-object", &backend, "-machine", "memory-backend=ram", "-drive", &drive, "-device", device];
        options.qemu_arg.extend(arguments.map(str::to_owned));
        let (console, events) = self.run(&options, ",tables=on", Outcome::Status(0))?;

        let mut counts = counts(&measurements(&console, &events)?)?;
        let mark = |number| events.iter().position(|event| event.kind == "mark" && event.get("number") == number);
        let (start, full) = (mark(0).context("there are no marks")?, mark(2).context("the memory was not used")?);
        counts.insert("boot".into(), events[start].clone());
        counts.insert("first-use-of-all-memory".into(), events[full].clone());

        let base = Machine::load("virt")?.ram_base;
        let (ram, registers) = (Ram::open(&ram, base)?, &events[full - 1]);
        let stage2 = Tables::stage2(registers)?;
        let reads = Tables::process(registers)?.reads(&ram, stage2.as_ref())?;
        let stage2 = stage2.map(|tables| Ok::<_, anyhow::Error>((tables, tables.usage(&ram)?))).transpose()?;
        Ok(Work { counts, stage2, reads })
    }
}

/// The first time of each workload, and of the other times the one with the fewest instructions: the kernel does other
/// things meanwhile.
fn counts(measurements: &[(&str, &Event)]) -> Result<BTreeMap<String, Event>> {
    let mut counts = BTreeMap::new();
    for (label, event) in measurements {
        let (name, round) = label.split_once(' ').with_context(|| format!("{label:?} is no measurement"))?;
        let name = format!("{name}.{}", if round == "0" { "cold" } else { "warm" });
        let least = counts.entry(name).or_insert_with(|| (*event).clone());
        if instructions(event) < instructions(least) {
            *least = (*event).clone();
        }
    }
    Ok(counts)
}

/// Instructions of all exception levels.
fn instructions(event: &Event) -> u64 {
    below(event) + event.get("el2.instructions") + event.get("el3.instructions")
}

/// Instructions of the host and its programs.
fn below(event: &Event) -> u64 {
    event.get("el0.instructions") + event.get("el1.instructions")
}

/// EL2's part of all instructions, in percent.
fn share(event: &Event) -> f64 {
    event.get("el2.instructions") as f64 / instructions(event) as f64 * 100.0
}

/// The number of MiB in the line `reserved MIB`.
fn reserved(console: &str) -> Result<f64> {
    let number = console.lines().find_map(|line| line.trim().strip_prefix("reserved "));
    number.context("the host does not say what is reserved")?.parse().context("what is reserved is no number")
}

/// Prints what the work costs.
fn cost(report: &mut Report, without: &Work, ours: &Work, theirs: &Work) -> Result<()> {
    report.end();
    report.line(format_args!(
        "\n{:<32}{:>12}{:>9}{:>9}{:>9}{:>12}{:>9}{:>9}{:>16}{:>16}{:>9}",
        "The host's work, 1 CPU",
        "EL2",
        "entries",
        "share, %",
        "target",
        "pKVM",
        "entries",
        "share, %",
        "EL0+EL1",
        "without",
        "more, %"
    ));
    for (name, event) in &ours.counts {
        let of = |work: &Work| work.counts.get(name).cloned().with_context(|| format!("{name} was measured once"));
        let (without, theirs) = (of(without)?, of(theirs)?);
        let columns = [
            ("el2", event.get("el2.instructions") as f64),
            ("entries", host_entries(event) as f64),
            ("share", share(event)),
            ("pkvm-el2", theirs.get("el2.instructions") as f64),
            ("pkvm-entries", host_entries(&theirs) as f64),
            ("pkvm-share", share(&theirs)),
            ("below", below(event) as f64),
            ("below-without", below(&without) as f64),
            ("below-pkvm", below(&theirs) as f64),
        ];
        let [el2, entries, share, pkvm, pkvm_entries, pkvm_share, below, below_without, _] =
            columns.map(|(_, value)| value);
        // What happens once is shown, but has no target.
        let repeats = name.ends_with(".cold") || name.ends_with(".warm");
        let target = repeats.then_some(SHARE);
        let verdict = if target.is_some_and(|target| share > target) { "  MISSED" } else { "" };
        report.line(format_args!(
            "  {name:<30}{:>12}{:>9}{share:>9.3}{:>9}{:>12}{:>9}{pkvm_share:>9.3}{:>16}{:>16}{:>9.2}{verdict}",
            digits(el2),
            digits(entries),
            target.map_or(String::new(), |target| target.to_string()),
            digits(pkvm),
            digits(pkvm_entries),
            digits(below),
            digits(below_without),
            (below / below_without - 1.0) * 100.0,
        ));
        for (column, value) in columns {
            report.add(format!("work.{name}.{column}"), value);
        }
    }
    report.printed_already();
    Ok(())
}

/// Prints what it takes to translate the host's addresses.
fn translation(report: &mut Report, without: &Work, ours: &Work, theirs: &Work) -> Result<()> {
    report.section("Translation of the host's addresses, 2 GiB, all of it used");
    let (Some((tables, usage)), Some((their_tables, their_usage))) = (ours.stage2, theirs.stage2) else {
        bail!("a host without a stage 2");
    };
    beside(report, "stage2", "first-level", tables.start.into(), their_tables.start.into());
    beside(report, "stage2", "tables", usage.tables as f64, their_usage.tables as f64);
    let mib = |bytes: u64| (bytes >> 20) as f64;
    for (level, name) in [(1, "1G-blocks"), (2, "2M-blocks"), (3, "4K-pages")] {
        let name = format!("MiB-in-{name}");
        beside(report, "stage2", &name, mib(usage.bytes[level]), mib(their_usage.bytes[level]));
    }
    for (level, name) in [(3, "4K-page"), (2, "2M-page")] {
        let [none, ours, theirs] = [without, ours, theirs].map(|work| work.reads[level]);
        if [none, ours, theirs].iter().any(|reads| reads.leaves == 0) {
            bail!("no process has a {name}");
        }
        let row = format!("translation.{name}");
        report.add(format!("{row}.without"), none.mean());
        beside(report, &row, "least", ours.least as f64, theirs.least as f64);
        beside(report, &row, "mean", ours.mean(), theirs.mean());
        beside(report, &row, "most", ours.most as f64, theirs.most as f64);
    }
    Ok(())
}

/// Prints a number beside that of pKVM from the same run, which has a name of its own in the JSON.
fn beside(report: &mut Report, row: &str, column: &str, ours: f64, theirs: f64) {
    report.add(format!("{row}.{column}"), ours).pkvm(theirs);
    report.end();
    report.add(format!("{row}.pkvm-{column}"), theirs);
    report.printed_already();
}

/// Does the same with several things at once.
fn together<T: Sync, R: Send, const N: usize>(
    things: &[T; N],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<[R; N]> {
    let done: Result<Vec<R>> = std::thread::scope(|scope| {
        let threads: Vec<_> = things.iter().map(|thing| scope.spawn(|| work(thing))).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?).collect()
    });
    done?.try_into().map_err(|_| anyhow!("as many results as things"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(fields: &str) -> Event {
        Event::parse(&format!("mark {fields}")).unwrap()
    }

    #[test]
    fn the_first_round_is_cold_and_the_best_of_the_others_is_warm() {
        let rounds = ["9", "5", "3", "4"].map(|count| event(&format!("el1.instructions={count}")));
        let labels = ["pipes 0", "pipes 1", "pipes 2", "pipes 3"];
        let measurements: Vec<_> = labels.into_iter().zip(&rounds).collect();
        let counts = counts(&measurements).unwrap();
        assert_eq!(counts.keys().collect::<Vec<_>>(), ["pipes.cold", "pipes.warm"]);
        assert_eq!(counts.values().map(below).collect::<Vec<_>>(), [9, 3]);
        assert!(super::counts(&[("pipes", &rounds[0])]).is_err());
    }

    #[test]
    fn a_share_is_of_all_levels() {
        let event = event("el0.instructions=100 el1.instructions=897 el2.instructions=2 el3.instructions=1");
        assert_eq!((instructions(&event), below(&event)), (1000, 997));
        assert_eq!(share(&event), 0.2);
    }

    #[test]
    fn the_host_says_what_is_reserved() {
        assert_eq!(reserved("hello\r\nreserved 18\r\n").unwrap(), 18.0);
        assert!(reserved("reserved").is_err());
        assert!(reserved("reserved much").is_err());
    }

    #[test]
    fn results_come_in_the_order_of_the_things() {
        let later = |number: &u64| {
            std::thread::sleep(std::time::Duration::from_millis(*number));
            if *number == 3 { bail!("three") } else { Ok(number * 2) }
        };
        assert_eq!(together(&[20, 10, 0], later).unwrap(), [40, 20, 0]);
        assert_eq!(together(&[3, 0], later).unwrap_err().to_string(), "three");
    }
}
