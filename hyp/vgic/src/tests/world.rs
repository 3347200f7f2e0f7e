//! A VM whose vCPUs all run, each on a CPU of its own.

use super::cpu::Cpu;
use crate::{
    Access, Distributor, Frame, Gic, ListRegisters, Outcome, RedistributorFrame, SgiRegister, Spi, VcpuGic, VcpuSet,
    Vcpus, interrupt::Interrupt,
};

pub(crate) struct World {
    distributor: Distributor,
    spis: Vec<Spi>,
    pub(crate) vcpus: Vec<VcpuGic>,
    pub(crate) cpus: Vec<Option<Cpu>>,
    /// ICH_VMCR_EL2 at the last entry.
    entered: Vec<u64>,
    /// What a vCPU was left with that had nothing to take back.
    left: Vec<Option<ListRegisters>>,
    /// How often something has been done to the controller, apart from entries.
    changes: u64,
    /// That number at the last entry, if it may be repeated until it is another one; otherwise 0.
    repeatable: Vec<u64>,
    lrs: usize,
    /// Kicks wait until [`World::flush`].
    pub(crate) lazy: bool,
    waiting: VcpuSet,
    pub(crate) exits: usize,
}

pub(crate) const GICD: Frame = Frame::Distributor;

pub(crate) const fn rd(vcpu: usize) -> Frame {
    Frame::Redistributor { vcpu, frame: RedistributorFrame::Control }
}

pub(crate) const fn sgi(vcpu: usize) -> Frame {
    Frame::Redistributor { vcpu, frame: RedistributorFrame::Private }
}

/// What a vCPU's CPU interface holds when it enters.
pub(crate) fn prepare<V: Vcpus + ?Sized>(gic: &mut Gic<'_, V>, vcpu: usize, lrs: usize) -> Option<ListRegisters> {
    let mut entry = ListRegisters::default();
    let prepared = gic.prepare_entry(vcpu, lrs, &mut entry);
    assert!(prepared.is_some() || entry == ListRegisters::default());
    prepared.map(|()| entry)
}

pub(crate) const ISENABLER: u64 = 0x100;
pub(crate) const ICENABLER: u64 = 0x180;
pub(crate) const ISPENDR: u64 = 0x200;
pub(crate) const ICPENDR: u64 = 0x280;
pub(crate) const ISACTIVER: u64 = 0x300;
pub(crate) const ICACTIVER: u64 = 0x380;
pub(crate) const IGROUPR: u64 = 0x080;
pub(crate) const IPRIORITYR: u64 = 0x400;
pub(crate) const ICFGR: u64 = 0xc00;

impl World {
    /// Everything as after reset, no vCPU entered.
    pub(crate) fn reset(vcpus: usize, spis: usize, lrs: usize) -> Self {
        let mut world = Self {
            distributor: Distributor::default(),
            spis: vec![Spi::default(); spis],
            vcpus: vec![VcpuGic::default(); vcpus],
            cpus: vec![None; vcpus],
            entered: vec![0; vcpus],
            left: vec![None; vcpus],
            changes: 1,
            repeatable: vec![0; vcpus],
            lrs,
            lazy: false,
            waiting: VcpuSet::EMPTY,
            exits: 0,
        };
        world.gic().reset_distributor();
        for vcpu in 0..vcpus {
            assert_eq!(world.gic().reset_vcpu(vcpu), VcpuSet::EMPTY);
        }
        world
    }

    /// Every SPI the host's, both groups on everywhere, no priority masked, all vCPUs in the guest.
    pub(crate) fn new(vcpus: usize, lrs: usize) -> Self {
        let mut world = Self::reset(vcpus, 64, lrs);
        for intid in 32..96 {
            world.gic().give_to_host(intid).unwrap();
        }
        for vcpu in 0..vcpus {
            world.enter(vcpu);
            world.cpu(vcpu).set_mask(0xff);
            world.cpu(vcpu).set_groups(0b11);
            world.resume(vcpu);
        }
        world.write(0, GICD, 0, 0b11);
        world
    }

    pub(crate) fn gic(&mut self) -> Gic<'_, [VcpuGic]> {
        self.changes += 1;
        self.view()
    }

    fn view(&mut self) -> Gic<'_, [VcpuGic]> {
        Gic::new(&mut self.distributor, &mut self.spis, &mut self.vcpus[..])
    }

    pub(crate) fn cpu(&mut self, vcpu: usize) -> &mut Cpu {
        self.cpus[vcpu].as_mut().unwrap()
    }

    pub(crate) fn enter(&mut self, vcpu: usize) {
        let lrs = self.lrs;
        let entry = match self.left[vcpu].take() {
            Some(entry) if self.repeatable[vcpu] == self.changes => entry,
            Some(mut entry) => {
                let is_idle = self.view().enter_again(vcpu, lrs, &mut entry);
                self.repeatable[vcpu] = if is_idle { self.changes } else { 0 };
                entry
            }
            None => {
                self.repeatable[vcpu] = 0;
                prepare(&mut self.view(), vcpu, lrs).unwrap()
            }
        };
        assert!(entry.used <= lrs);
        self.entered[vcpu] = entry.vmcr;
        let cpu = Cpu(entry);
        assert!(!cpu.maintenance(), "maintenance at once: {cpu:x?}");
        self.cpus[vcpu] = Some(cpu);
    }

    pub(crate) fn exit(&mut self, vcpu: usize) {
        if let Some(cpu) = self.cpus[vcpu].take() {
            self.exits += 1;
            if cpu.0.may_stay(self.entered[vcpu]) {
                self.left[vcpu] = Some(cpu.0);
                return;
            }
            let kick = self.gic().after_exit(vcpu, &cpu.0);
            assert!(!kick.contains(vcpu));
            self.kick(kick);
        }
    }

    /// Exits and enters.
    pub(crate) fn resume(&mut self, vcpu: usize) {
        self.exit(vcpu);
        self.enter(vcpu);
    }

    pub(crate) fn kick(&mut self, kick: VcpuSet) {
        if self.lazy {
            self.waiting.extend(kick);
        } else {
            for vcpu in kick.iter().filter(|&vcpu| self.cpus[vcpu].is_some()).collect::<Vec<_>>() {
                self.resume(vcpu);
            }
        }
    }

    /// Performs the kicks that wait.
    pub(crate) fn flush(&mut self) {
        while !self.waiting.is_empty() {
            for vcpu in std::mem::take(&mut self.waiting).iter().collect::<Vec<_>>() {
                self.resume(vcpu);
            }
        }
    }

    /// Performs an access by a vCPU that then enters again.
    pub(crate) fn access(&mut self, vcpu: usize, frame: Frame, offset: u64, access: Access) -> u64 {
        self.exit(vcpu);
        let value = loop {
            match self.gic().mmio(vcpu, frame, offset, access).unwrap() {
                Outcome::Done { value, kick } => {
                    assert!(!kick.contains(vcpu));
                    self.kick(kick);
                    break value;
                }
                Outcome::Retry { kick } => {
                    assert!(!kick.is_empty() && !kick.contains(vcpu));
                    for other in kick.iter() {
                        self.resume(other);
                    }
                }
            }
        };
        self.enter(vcpu);
        value
    }

    pub(crate) fn read(&mut self, vcpu: usize, frame: Frame, offset: u64) -> u64 {
        self.access(vcpu, frame, offset, Access::Read { size: 4 })
    }

    pub(crate) fn write(&mut self, vcpu: usize, frame: Frame, offset: u64, value: u64) {
        self.access(vcpu, frame, offset, Access::Write { size: 4, value });
    }

    /// Writes the bit of an interrupt in a bank of registers; for private ones in `vcpu`'s own.
    pub(crate) fn write_bit(&mut self, vcpu: usize, bank: u64, intid: u16) {
        let frame = if intid < 32 { sgi(vcpu) } else { GICD };
        self.write(vcpu, frame, bank + u64::from(intid / 32) * 4, 1 << (intid % 32));
    }

    pub(crate) fn read_bit(&mut self, vcpu: usize, bank: u64, intid: u16) -> bool {
        let frame = if intid < 32 { sgi(vcpu) } else { GICD };
        self.read(vcpu, frame, bank + u64::from(intid / 32) * 4) >> (intid % 32) & 1 != 0
    }

    pub(crate) fn set_priority(&mut self, vcpu: usize, intid: u16, priority: u8) {
        let frame = if intid < 32 { sgi(vcpu) } else { GICD };
        let access = Access::Write { size: 1, value: priority.into() };
        self.access(vcpu, frame, IPRIORITYR + u64::from(intid), access);
    }

    /// Changes the field of one interrupt in a bank that has no set and clear registers.
    pub(crate) fn set_field(&mut self, vcpu: usize, bank: u64, intid: u16, width: u16, field: u64) {
        let frame = if intid < 32 { sgi(vcpu) } else { GICD };
        let per_register = 32 / width;
        let offset = bank + u64::from(intid / per_register) * 4;
        let shift = intid % per_register * width;
        let mask = !(u64::MAX << width);
        let old = self.read(vcpu, frame, offset);
        self.write(vcpu, frame, offset, old & !(mask << shift) | field << shift);
    }

    pub(crate) fn set_edge(&mut self, vcpu: usize, intid: u16, edge: bool) {
        self.set_field(vcpu, ICFGR, intid, 2, if edge { 0b10 } else { 0 });
    }

    pub(crate) fn route(&mut self, vcpu: usize, intid: u16, route: u64) {
        let access = Access::Write { size: 8, value: route };
        self.access(vcpu, GICD, 0x6000 + 8 * u64::from(intid), access);
    }

    /// Enables an interrupt with a priority.
    pub(crate) fn enable(&mut self, vcpu: usize, intid: u16, priority: u8) {
        self.set_priority(vcpu, intid, priority);
        self.write_bit(vcpu, ISENABLER, intid);
    }

    pub(crate) fn raise(&mut self, intid: u16, level: bool) {
        let kick = self.gic().raise_spi(intid.into(), level).unwrap();
        self.kick(kick);
    }

    pub(crate) fn ppi(&mut self, vcpu: usize, intid: u16, level: bool) {
        let kick = self.gic().set_ppi_level(vcpu, intid.into(), level).unwrap();
        self.kick(kick);
    }

    pub(crate) fn send_sgi(&mut self, vcpu: usize, register: SgiRegister, value: u64) {
        self.exit(vcpu);
        let kick = self.gic().send_sgi(vcpu, register, value);
        assert!(!kick.contains(vcpu));
        self.kick(kick);
        self.enter(vcpu);
    }

    /// The guest acknowledges what is signalled to a vCPU.
    pub(crate) fn acknowledge(&mut self, vcpu: usize) -> Option<u16> {
        let intid = self.cpu(vcpu).acknowledge();
        self.maintain(vcpu);
        intid
    }

    /// The guest writes to EOIR.
    pub(crate) fn end(&mut self, vcpu: usize, intid: u16) {
        self.cpu(vcpu).end(intid);
        self.maintain(vcpu);
    }

    /// The guest writes to DIR.
    pub(crate) fn deactivate(&mut self, vcpu: usize, intid: u16) {
        if !self.cpu(vcpu).deactivate(intid) {
            self.exit(vcpu);
            let kick = self.gic().write_dir(vcpu, intid.into());
            self.kick(kick);
            self.enter(vcpu);
        }
        self.maintain(vcpu);
    }

    pub(crate) fn maintain(&mut self, vcpu: usize) {
        if self.cpu(vcpu).maintenance() {
            self.resume(vcpu);
        }
    }

    /// Acknowledges and ends all that is signalled to a vCPU, in order.
    pub(crate) fn drain(&mut self, vcpu: usize) -> Vec<u16> {
        let mut taken = Vec::new();
        while let Some(intid) = self.acknowledge(vcpu) {
            taken.push(intid);
            self.end(vcpu, intid);
            assert!(taken.len() < 5000, "it does not end: {taken:?}");
        }
        taken
    }

    /// Checks what always holds between homes, queues and list registers.
    pub(crate) fn check(&mut self) {
        assert_eq!(self.gic().check(), Ok(()));
    }
}

impl World {
    /// Fills the storage with nonsense.
    pub(crate) fn scramble(&mut self, bytes: &[u8]) {
        let mut bytes = bytes.iter().copied().cycle();
        let mut next = || bytes.next().unwrap();
        let interrupts = self.spis.iter_mut().map(|spi| &mut spi.interrupt);
        for interrupt in interrupts.chain(self.vcpus.iter_mut().flat_map(|vcpu| &mut vcpu.private)) {
            *interrupt = Interrupt::arbitrary(u16::from_le_bytes([next(), next()]), next(), next());
        }
        self.distributor.set_elected(Some(next().into()));
        for vcpu in &mut self.vcpus {
            vcpu.used = next();
            vcpu.running = next() & 1;
            for intid in 0..1024 {
                if next() & 1 != 0 {
                    vcpu.queue.insert(intid);
                }
            }
            for listed in &mut vcpu.listed {
                *listed = u16::from_le_bytes([next(), next()]);
            }
        }
    }
}
