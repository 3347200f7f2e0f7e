//! Random events and accesses of a guest that keeps to the rules, against the reference.

use proptest::prelude::*;

use super::{
    reference::{Reference, Route},
    world::{GICD, ICACTIVER, ICENABLER, ICPENDR, IGROUPR, ISACTIVER, ISENABLER, ISPENDR, World, rd},
};
use crate::{SgiRegister, affinity};

const PRIVATE: [u16; 4] = [0, 9, 27, 30];
const SHARED: [u16; 8] = [32, 33, 40, 41, 63, 64, 65, 95];

#[derive(Clone, Debug)]
enum Op {
    Enable(usize, bool),
    Pend(usize, bool),
    Activate(usize, bool),
    Priority(usize, u8),
    Group(usize, bool),
    Edge(usize, bool),
    Route(usize, Route),
    Raise(usize, bool),
    Message(usize, bool),
    Sgi(usize, Option<usize>, usize),
    Groups(u8),
    Sleep(usize, bool),
    Mask(usize, u8),
    CpuGroups(usize, u8),
    Acknowledge(usize),
    End(usize),
    Deactivate(usize, usize, usize),
    Read(usize, usize),
    Resume(usize),
    Flush,
}

fn route(cpus: usize) -> impl Strategy<Value = Route> {
    prop_oneof![4 => (0..cpus).prop_map(Route::To), 1 => Just(Route::Any), 1 => Just(Route::Nowhere)]
}

fn op(cpus: usize) -> impl Strategy<Value = Op> {
    let index = 0..PRIVATE.len() * cpus + SHARED.len();
    let shared = PRIVATE.len() * cpus..PRIVATE.len() * cpus + SHARED.len();
    let i = || index.clone();
    let cpu = || 0..cpus;
    prop_oneof![
        4 => (i(), prop::bool::weighted(0.8)).prop_map(|(i, on)| Op::Enable(i, on)),
        2 => (i(), any::<bool>()).prop_map(|(i, on)| Op::Pend(i, on)),
        1 => (i(), any::<bool>()).prop_map(|(i, on)| Op::Activate(i, on)),
        3 => (i(), 0_u8..32).prop_map(|(i, level)| Op::Priority(i, level * 8)),
        1 => (i(), any::<bool>()).prop_map(|(i, on)| Op::Group(i, on)),
        1 => (i(), any::<bool>()).prop_map(|(i, on)| Op::Edge(i, on)),
        2 => (shared, route(cpus)).prop_map(|(i, to)| Op::Route(i, to)),
        8 => (i(), prop::bool::weighted(0.7)).prop_map(|(i, on)| Op::Raise(i, on)),
        2 => (i(), prop::bool::weighted(0.7)).prop_map(|(i, on)| Op::Message(i, on)),
        3 => (cpu(), prop::option::of(cpu()), 0..2_usize).prop_map(|(from, to, n)| Op::Sgi(from, to, n)),
        1 => (0_u8..4).prop_map(Op::Groups),
        1 => (cpu(), prop::bool::weighted(0.3)).prop_map(|(cpu, on)| Op::Sleep(cpu, on)),
        1 => (cpu(), prop::sample::select(vec![0xff, 0xf0, 0x80, 0x20, 0])).prop_map(|(cpu, mask)| Op::Mask(cpu, mask)),
        1 => (cpu(), 0_u8..4).prop_map(|(cpu, groups)| Op::CpuGroups(cpu, groups)),
        10 => cpu().prop_map(Op::Acknowledge),
        6 => cpu().prop_map(Op::End),
        4 => (cpu(), cpu(), any::<usize>()).prop_map(|(by, at, n)| Op::Deactivate(by, at, n)),
        4 => (cpu(), i()).prop_map(|(cpu, i)| Op::Read(cpu, i)),
        1 => cpu().prop_map(Op::Resume),
        2 => Just(Op::Flush),
    ]
}

struct Run {
    world: World,
    reference: Reference,
    split: bool,
}

impl Run {
    fn new(cpus: usize, lrs: usize, split: bool) -> Self {
        let mut world = World::new(cpus, lrs);
        for cpu in 0..cpus {
            world.cpu(cpu).set_eoi_mode(split);
            world.resume(cpu);
        }
        Self { world, reference: Reference::new(cpus, &PRIVATE, &SHARED), split }
    }

    fn perform(&mut self, op: Op) {
        let reference = &mut self.reference;
        let world = &mut self.world;
        match op {
            Op::Enable(n, on) => {
                let it = &mut reference.interrupts[n];
                it.enabled = on;
                world.write_bit(it.owner.unwrap_or(0), if on { ISENABLER } else { ICENABLER }, it.intid);
            }
            Op::Pend(n, on) => {
                let it = &mut reference.interrupts[n];
                it.latch = on;
                world.write_bit(it.owner.unwrap_or(0), if on { ISPENDR } else { ICPENDR }, it.intid);
            }
            Op::Activate(n, on) => {
                if !reference.is_handled(n) {
                    let it = &mut reference.interrupts[n];
                    it.active = on;
                    world.write_bit(it.owner.unwrap_or(0), if on { ISACTIVER } else { ICACTIVER }, it.intid);
                }
            }
            Op::Priority(n, priority) => {
                if !reference.is_handled(n) {
                    let it = &mut reference.interrupts[n];
                    it.priority = priority;
                    world.set_priority(it.owner.unwrap_or(0), it.intid, priority);
                }
            }
            Op::Group(n, group1) => {
                let it = &mut reference.interrupts[n];
                it.group1 = group1;
                world.set_field(it.owner.unwrap_or(0), IGROUPR, it.intid, 1, group1.into());
            }
            Op::Edge(n, edge) => {
                let it = &mut reference.interrupts[n];
                it.edge = edge || it.intid < 16;
                world.set_edge(it.owner.unwrap_or(0), it.intid, edge);
            }
            Op::Route(n, to) => {
                let it = &mut reference.interrupts[n];
                it.route = to;
                let value = match to {
                    Route::To(cpu) => affinity(cpu).into(),
                    Route::Any => 1 << 31,
                    Route::Nowhere => 0x70f,
                };
                world.route(0, it.intid, value);
            }
            Op::Raise(n, level) => {
                let it = &mut reference.interrupts[n];
                match (it.intid, it.owner) {
                    (16..32, Some(owner)) => world.ppi(owner, it.intid, level),
                    (32.., None) => world.raise(it.intid, level),
                    _ => return,
                }
                if it.moves(level) {
                    it.raise(level);
                }
            }
            Op::Message(n, level) => {
                let it = &mut reference.interrupts[n];
                if it.owner.is_none() {
                    it.message(level);
                    world.write(0, GICD, if level { 0x40 } else { 0x48 }, it.intid.into());
                }
            }
            Op::Sgi(from, to, n) => {
                let intid = PRIVATE[n];
                for cpu in (0..reference.cpus.len()).filter(|&cpu| to.map_or(cpu != from, |to| cpu == to)) {
                    let index = reference.find(cpu, intid);
                    reference.interrupts[index].latch = true;
                }
                let value = to.map_or(1 << 40, |to| 1 << to) | u64::from(intid) << 24;
                world.send_sgi(from, SgiRegister::Sgi1, value);
            }
            Op::Groups(groups) => {
                reference.groups = groups;
                world.write(0, GICD, 0, groups.into());
            }
            Op::Sleep(cpu, asleep) => {
                reference.cpus[cpu].asleep = asleep;
                world.write(cpu, rd(cpu), 0x14, u64::from(asleep) << 1);
            }
            Op::Mask(cpu, mask) => {
                reference.cpus[cpu].mask = mask;
                world.cpu(cpu).set_mask(mask);
            }
            Op::CpuGroups(cpu, groups) => {
                reference.cpus[cpu].groups = groups;
                world.cpu(cpu).set_groups(groups.into());
                world.maintain(cpu);
            }
            Op::Acknowledge(cpu) => {
                self.acknowledge(cpu);
            }
            Op::End(cpu) => {
                if let Some((n, _)) = reference.cpus[cpu].stack.pop() {
                    if self.split {
                        reference.cpus[cpu].dropped.push(n);
                    } else {
                        reference.interrupts[n].active = false;
                    }
                    world.end(cpu, reference.interrupts[n].intid);
                }
            }
            Op::Deactivate(by, at, pick) => {
                let dropped = &mut reference.cpus[at].dropped;
                if dropped.is_empty() {
                    return;
                }
                let n = dropped.swap_remove(pick % dropped.len());
                let it = &mut reference.interrupts[n];
                it.active = false;
                world.deactivate(it.owner.unwrap_or(by), it.intid);
            }
            Op::Read(cpu, n) => {
                let it = &reference.interrupts[n];
                let cpu = it.owner.unwrap_or(cpu);
                if !world.lazy {
                    assert_eq!(world.read_bit(cpu, ISPENDR, it.intid), it.pending(), "pending {it:?}");
                }
                assert_eq!(world.read_bit(cpu, ICACTIVER, it.intid), it.active, "active {it:?}");
                assert_eq!(world.read_bit(cpu, ICENABLER, it.intid), it.enabled);
            }
            Op::Resume(cpu) => world.resume(cpu),
            Op::Flush => world.flush(),
        }
    }

    /// Acknowledges, and checks that it was right.
    fn acknowledge(&mut self, cpu: usize) -> bool {
        let best = self.reference.best(cpu);
        let Some(intid) = self.world.acknowledge(cpu) else {
            assert_eq!(best, None, "nothing is signalled to {cpu}");
            return false;
        };
        let index = self.reference.find(cpu, intid);
        let it = &self.reference.interrupts[index];
        assert!(self.reference.may_take(cpu, index), "{cpu} took {it:?}");
        assert!(best.is_none_or(|best| it.priority <= best), "{cpu} took {it:?}, but there is {best:?}");
        self.reference.acknowledge(cpu, index);
        true
    }

    /// Ends all that is active by acknowledgement, and lets everything through.
    fn unwind(&mut self) {
        let cpus = self.reference.cpus.len();
        for cpu in 0..cpus {
            while !self.reference.cpus[cpu].stack.is_empty() {
                self.perform(Op::End(cpu));
            }
            while !self.reference.cpus[cpu].dropped.is_empty() {
                self.perform(Op::Deactivate(cpu, cpu, 0));
            }
        }
        self.perform(Op::Groups(0b11));
        for cpu in 0..cpus {
            self.perform(Op::Sleep(cpu, false));
            self.perform(Op::Mask(cpu, 0xff));
            self.perform(Op::CpuGroups(cpu, 0b11));
            self.perform(Op::Resume(cpu));
        }
    }

    /// Lets the guest take all there is.
    fn drain(&mut self) {
        for cpu in 0..self.reference.cpus.len() {
            let mut rounds = 0;
            while self.acknowledge(cpu) {
                self.perform(Op::End(cpu));
                self.perform(Op::Deactivate(cpu, cpu, 0));
                rounds += 1;
                assert!(rounds < 1000);
            }
        }
    }
}

proptest! {
    #![proptest_config(super::config())]

    /// If kicks are instantaneous, list registers cannot be told from the reference.
    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn a_guest_sees_a_gic(
        lrs in prop::sample::select(vec![1_usize, 2, 3, 4, 16]),
        split in any::<bool>(),
        ops in prop::collection::vec(op(3), 1..250),
    ) {
        let mut run = Run::new(3, lrs, split);
        for op in ops {
            run.perform(op);
            run.world.check();
        }
        run.unwind();
        for n in 0..run.reference.interrupts.len() {
            run.perform(Op::Raise(n, false));
            run.perform(Op::Message(n, false));
        }
        run.drain();
        for it in &run.reference.interrupts {
            let deliverable = it.enabled && it.pending() && it.priority < 0xff && !it.active;
            prop_assert!(!deliverable || it.route == Route::Nowhere, "left behind: {it:?}");
        }
    }

    /// If they take their time, an edge may be taken once more than needed, but none is lost.
    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn late_kicks_lose_nothing(
        lrs in prop::sample::select(vec![1_usize, 2, 4]),
        split in any::<bool>(),
        ops in prop::collection::vec(op(3), 1..250),
    ) {
        let mut run = Run::new(3, lrs, split);
        for n in 0..run.reference.interrupts.len() {
            run.perform(Op::Edge(n, true));
            run.perform(Op::Enable(n, true));
        }
        run.world.lazy = true;
        let count = run.reference.interrupts.len();
        let (mut wanted, mut raised, mut taken) = (vec![false; count], vec![0; count], vec![0; count]);
        for op in ops {
            let mut raises = Vec::new();
            match op {
                Op::Raise(n, true) if run.reference.interrupts[n].moves(true) => raises.push(n),
                Op::Sgi(from, to, n) => raises.extend(
                    (0..3).filter(|&cpu| to.map_or(cpu != from, |to| cpu == to)).map(|cpu| run.reference.find(cpu, PRIVATE[n])),
                ),
                Op::Pend(n, true) => raises.push(n),
                Op::Acknowledge(cpu) => {
                    if let Some(intid) = run.world.acknowledge(cpu) {
                        let n = run.reference.find(cpu, intid);
                        wanted[n] = false;
                        taken[n] += 1;
                        run.reference.acknowledge(cpu, n);
                    }
                    continue;
                }
                Op::Pend(..) | Op::Activate(..) | Op::Edge(..) | Op::Message(..) | Op::Priority(..) | Op::Read(..) => {
                    continue;
                }
                _ => {}
            }
            run.perform(op);
            run.world.check();
            for n in raises {
                wanted[n] = true;
                raised[n] += 1;
            }
        }
        run.unwind();
        for n in 0..count {
            run.perform(Op::Enable(n, true));
            if run.reference.interrupts[n].owner.is_none() {
                run.perform(Op::Route(n, Route::To(n % 3)));
            }
        }
        run.world.flush();
        for cpu in 0..3 {
            for intid in run.world.drain(cpu) {
                let n = run.reference.find(cpu, intid);
                wanted[n] = false;
                taken[n] += 1;
                if split {
                    run.world.deactivate(cpu, intid);
                }
            }
        }
        for cpu in 0..3 {
            // What was deactivated last may have been pending again.
            for intid in run.world.drain(cpu) {
                let n = run.reference.find(cpu, intid);
                wanted[n] = false;
                taken[n] += 1;
            }
        }
        prop_assert!(!wanted.contains(&true), "lost: {wanted:?}");
        prop_assert!(taken.iter().zip(&raised).all(|(taken, raised)| taken <= raised), "{taken:?} of {raised:?}");
    }
}
