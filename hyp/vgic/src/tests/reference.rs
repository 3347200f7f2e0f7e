//! An interrupt controller without list registers: each interrupt has one state, and a CPU takes the best there is.

/// What the GIC knows of one interrupt.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt {
    pub(crate) intid: u16,
    /// Whose it is, if private.
    pub(crate) owner: Option<usize>,
    pub(crate) enabled: bool,
    pub(crate) group1: bool,
    pub(crate) edge: bool,
    pub(crate) line: bool,
    pub(crate) message: bool,
    pub(crate) latch: bool,
    pub(crate) active: bool,
    pub(crate) priority: u8,
    pub(crate) route: Route,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Route {
    To(usize),
    Any,
    Nowhere,
}

#[derive(Clone, Debug)]
pub(crate) struct Cpu {
    pub(crate) mask: u8,
    pub(crate) groups: u8,
    pub(crate) asleep: bool,
    /// Acknowledged, priority not dropped: indices of interrupts and the priorities they had.
    pub(crate) stack: Vec<(usize, u8)>,
    /// Priority dropped, not deactivated.
    pub(crate) dropped: Vec<usize>,
}

pub(crate) struct Reference {
    pub(crate) groups: u8,
    pub(crate) interrupts: Vec<Interrupt>,
    pub(crate) cpus: Vec<Cpu>,
}

impl Interrupt {
    pub(crate) fn pending(&self) -> bool {
        self.latch || !self.edge && (self.line || self.message)
    }

    /// Whether it does anything to move the wire there: SGIs have none, and that of a PPI may be there already.
    pub(crate) fn moves(&self, level: bool) -> bool {
        self.intid >= 32 || self.intid >= 16 && self.line != level
    }

    pub(crate) fn raise(&mut self, level: bool) {
        self.line = level;
        self.latch |= level && self.edge;
    }

    pub(crate) fn message(&mut self, level: bool) {
        self.message = level;
        if self.edge {
            self.latch = level;
        }
    }
}

impl Reference {
    pub(crate) fn new(cpus: usize, private: &[u16], shared: &[u16]) -> Self {
        let interrupt = |intid: u16, owner| Interrupt {
            intid,
            owner,
            enabled: false,
            group1: true,
            edge: intid < 16,
            line: false,
            message: false,
            latch: false,
            active: false,
            priority: 0,
            route: Route::To(0),
        };
        let mut interrupts = Vec::new();
        for cpu in 0..cpus {
            interrupts.extend(private.iter().map(|&intid| interrupt(intid, Some(cpu))));
        }
        interrupts.extend(shared.iter().map(|&intid| interrupt(intid, None)));
        let cpu = Cpu { mask: 0xff, groups: 0b11, asleep: false, stack: Vec::new(), dropped: Vec::new() };
        Self { groups: 0b11, interrupts, cpus: vec![cpu; cpus] }
    }

    pub(crate) fn find(&self, cpu: usize, intid: u16) -> usize {
        let found = |i: &Interrupt| i.intid == intid && i.owner.is_none_or(|owner| owner == cpu);
        self.interrupts.iter().position(found).unwrap()
    }

    /// Whether a guest that keeps to the rules may change the active state or the priority.
    pub(crate) fn is_handled(&self, index: usize) -> bool {
        let has = |cpu: &Cpu| cpu.stack.iter().any(|&(n, _)| n == index) || cpu.dropped.contains(&index);
        self.cpus.iter().any(has)
    }

    /// Whether the interrupt may be signalled to the CPU now.
    pub(crate) fn may_take(&self, cpu: usize, index: usize) -> bool {
        let (it, at) = (&self.interrupts[index], &self.cpus[cpu]);
        let group = u8::from(it.group1);
        let here = match it.owner {
            Some(owner) => owner == cpu,
            None => it.route == Route::To(cpu) || it.route == Route::Any,
        };
        let running = at.stack.iter().map(|&(_, priority)| u16::from(priority)).min().unwrap_or(0x100);
        here && it.enabled
            && it.pending()
            && !it.active
            && self.groups >> group & 1 != 0
            && at.groups >> group & 1 != 0
            && !at.asleep
            && it.priority < at.mask
            && u16::from(it.priority) < running
    }

    /// The highest priority that must be signalled to the CPU, because it can be signalled to no other.
    pub(crate) fn best(&self, cpu: usize) -> Option<u8> {
        (0..self.interrupts.len())
            .filter(|&index| self.interrupts[index].route != Route::Any && self.may_take(cpu, index))
            .map(|index| self.interrupts[index].priority)
            .min()
    }

    pub(crate) fn acknowledge(&mut self, cpu: usize, index: usize) {
        let it = &mut self.interrupts[index];
        it.latch = false;
        it.active = true;
        self.cpus[cpu].stack.push((index, it.priority));
    }
}
