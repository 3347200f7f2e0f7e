//! The machines that the tests run on.

use std::fmt;

#[cfg(test)]
use ravelin_payload::Test;

/// A machine of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    /// QEMU's CPU model.
    pub(crate) cpu: &'static str,
    /// Number of CPUs.
    pub(crate) smp: u32,
    /// RAM in MiB.
    pub(crate) memory: u32,
    /// Where the payload is loaded, as a flat binary, if not where `xtask` puts an arm64 Image.
    pub(crate) address: Option<u64>,
    /// Whether the hypervisor checks its tables after each call.
    pub(crate) checked: bool,
    /// Whether the hypervisor is the build to debug, which has debug assertions.
    pub(crate) dev: bool,
    /// The only tests that run on it, by names and beginnings of names; all of a suite if there are none.
    pub(crate) only: &'static [&'static str],
    /// How many rounds of random tests there are, long ones, if not as many as usual.
    pub(crate) rounds: Option<u32>,
}

/// Tests that tell much in a short time, for builds that are slow.
const QUICK: &[&str] = &[
    "contents.*",
    "pins.overlap",
    "bugs.leak_on_failure",
    "random.*",
    "guests.life_cycle",
    "guests.conversion_in_place",
    "guests.unshare_of_claimed_pages",
    "guests.force_reclaim_poisons",
    "guests.ordinary_vm_borrows",
];

/// Tests that invalidate ranges, where the CPU can do that at once.
const RANGES: &[&str] = &["range.*", "contents.*", "guests.life_cycle", "guests.conversion_in_place"];

/// Numbers of CPUs and rounds of random tests that make more than [`HYPERCALLS`] hypercalls. Where there are fewer CPUs than are
/// emulated, those that wait for a lock keep its holder from running, so there are few rounds with many CPUs.
const RANDOM: [(u32, u32); 3] = [(1, 60), (2, 30), (4, 10)];

/// Hypercalls of random tests on machines that check, with `--full`.
pub(crate) const HYPERCALLS: u64 = 1_000_000;

impl Machine {
    /// The machine for what needs only one.
    pub(crate) const USUAL: Self = Self::new("cortex-a76", 2, 1024);

    const fn new(cpu: &'static str, smp: u32, memory: u32) -> Self {
        Self { cpu, smp, memory, address: None, checked: false, dev: false, only: &[], rounds: None }
    }

    const fn at(self, address: u64) -> Self {
        Self { address: Some(address), ..self }
    }

    const fn checked(self) -> Self {
        Self { checked: true, ..self }
    }

    const fn dev(self) -> Self {
        Self { dev: true, ..self }
    }

    const fn only(self, only: &'static [&'static str]) -> Self {
        Self { only, ..self }
    }

    const fn rounds(self, rounds: u32) -> Self {
        Self { rounds: Some(rounds), ..self }
    }

    /// Whether the test is not left out here. A range must be free at a multiple of its size, so the top of RAM with the
    /// carve-out and the bottom with what is loaded do not count.
    #[cfg(test)]
    pub(crate) fn has_what_it_takes(&self, test: &Test) -> bool {
        self.only.is_empty() && test.cpus <= self.smp as usize && 3 * test.memory <= u64::from(self.memory) << 20
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, smp, memory, .. } = self;
        write!(f, "{cpu} x{smp}, {memory} MiB")?;
        if let Some(address) = self.address {
            write!(f, ", at {address:#x}")?;
        }
        if self.checked {
            f.write_str(", checked")?;
        }
        if self.dev {
            f.write_str(", dev")?;
        }
        match self.rounds {
            Some(rounds) => write!(f, ", {rounds} rounds"),
            None => Ok(()),
        }
    }
}

const CHECKED: Machine = Machine::new("cortex-a76", 2, 512).checked();
const DEV: Machine = Machine::new("cortex-a76", 2, 1024).dev();
const CPUS: [&str; 6] = ["cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1", "max"];
const NUMBERS: [u32; 4] = [1, 2, 4, 8];
const SIZES: [u32; 5] = [512, 1024, 2048, 4096, 8192];

/// The machines: a few that have everything among them, or all combinations of CPU models and numbers of CPUs, with the
/// sizes of RAM in turn.
pub(crate) fn matrix(full: bool) -> Vec<Machine> {
    // 0x40080000 is where old bootloaders put a flat binary; 0x60000000 is far up.
    let mut machines = vec![
        Machine::new("cortex-a53", 1, 512).at(0x4008_0000),
        Machine::new("cortex-a72", 2, 4096),
        Machine::new("max", 4, 2048).at(0x6000_0000),
    ];
    if full {
        let numbers = CPUS.iter().flat_map(|cpu| NUMBERS.map(|smp| (cpu, smp)));
        machines.extend(numbers.zip(SIZES.iter().cycle()).map(|((cpu, smp), &memory)| Machine::new(cpu, smp, memory)));
        machines.extend([CHECKED, DEV, Machine::new("max", 4, 1024).checked().only(RANGES)]);
        let random = |(smp, rounds)| Machine { smp, ..CHECKED }.only(&["random.*"]).rounds(rounds);
        machines.extend(RANDOM.map(random));
    } else {
        machines.extend([CHECKED, DEV].map(|machine| machine.only(QUICK)));
    }
    machines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_matrix_has_everything() {
        let full = matrix(true);
        assert!(CPUS.iter().all(|&cpu| NUMBERS.iter().all(|&smp| full.iter().any(|m| (m.cpu, m.smp) == (cpu, smp)))));
        assert!(SIZES.iter().all(|&memory| full.iter().any(|machine| machine.memory == memory)));
        assert!(matrix(false).iter().all(|machine| full.contains(&machine.only(&[]))));
    }

    #[test]
    fn the_quick_tests_exist() {
        for name in QUICK.iter().chain(RANGES) {
            let exists =
                |test: &Test| name.strip_suffix('*').map_or(test.name == *name, |it| test.name.starts_with(it));
            assert!(ravelin_payload::TESTS.iter().any(exists), "{name}");
        }
    }

    #[test]
    fn names() {
        assert_eq!(Machine::new("max", 4, 2048).to_string(), "max x4, 2048 MiB");
        assert_eq!(Machine::new("max", 1, 512).at(0x1000).checked().to_string(), "max x1, 512 MiB, at 0x1000, checked");
        assert_eq!(Machine::new("max", 1, 512).dev().to_string(), "max x1, 512 MiB, dev");
        assert_eq!(Machine::new("max", 1, 512).checked().rounds(3).to_string(), "max x1, 512 MiB, checked, 3 rounds");
    }
}
