//! CPUs that work on the same pages at the same time.

use std::thread;

use super::*;

/// A pseudo-random sequence (xorshift), the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn four_cpus_hammer_overlapping_ranges() {
    let layout = Layout { tables: 48, ..small() };
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let total = rig.memory.counts();
    let rounds = if cfg!(miri) { 8 } else { 200 };
    let succeeded: u64 = thread::scope(|scope| {
        let hammer = |seed: u64| {
            let rig = &rig;
            move || {
                let mut random = Random(seed);
                let mut succeeded = 0;
                for _ in 0..rounds {
                    let base = GIB + random.below(1030) * PAGE;
                    let pages = [1, 1, 3, 512][usize::try_from(random.below(4)).unwrap()];
                    let call = CALLS[usize::try_from(random.below(6)).unwrap()];
                    let result = call.on(&rig.memory, &rig.machine, range(base, pages));
                    succeeded += u64::from(result.is_ok());
                    let _ = rig.memory.host_fault(&rig.machine, Ipa::new(base).unwrap());
                    let _ = rig.memory.page_state(addr(base));
                }
                succeeded
            }
        };
        let cpus: Vec<_> = (1..5).map(|cpu| scope.spawn(hammer(cpu * 0x0e37_79b9_7f4a_7c15))).collect();
        cpus.into_iter().map(|cpu| cpu.join().unwrap()).sum()
    });
    assert!(succeeded > rounds / 4, "only {succeeded} calls succeeded");
    rig.check();
    let counts = rig.memory.counts();
    let pages = |counts: &crate::Counts| counts.host_owned + counts.host_shared + counts.hyp_owned + counts.hyp_donated;
    assert_eq!(pages(&counts), pages(&total));
}
