//! A guest's interrupt controller, whose guest, host and CPU keep to no rules.

use std::collections::{BTreeMap, BTreeSet};

use arbitrary::{Arbitrary, Unstructured};
use ravelin_vgic::{
    Access, Distributor, FIRST_SPI, FRAME_SIZE, Frame, Gic, ListRegisters, Outcome, RedistributorFrame, SgiRegister,
    Spi, VcpuGic, ich,
};

const VCPUS: usize = 3;
const SPIS: usize = 32;

/// The first INTID behind the last SPI.
const END: u32 = FIRST_SPI as u32 + SPIS as u32;

/// GICD_CTLR.ARE, DS and RWP.
const ARE: u64 = 1 << 4;
const DS: u64 = 1 << 6;
const RWP: u64 = 1 << 31;

/// Operations that are worth the time of one input.
const LIMIT: usize = 200;

#[derive(Arbitrary, Debug)]
enum Op {
    Read {
        vcpu: u8,
        at: At,
        size: Size,
    },
    Write {
        vcpu: u8,
        at: At,
        size: Size,
        value: Value,
    },
    Sgi {
        vcpu: u8,
        register: u8,
        value: u64,
    },
    Deactivate {
        vcpu: u8,
        value: u64,
    },
    GiveToHost(Intid),
    Spi(Intid, bool),
    Ppi(u8, Intid, bool),
    Enter(u8, u8),
    /// The vCPU has acknowledged what a bit is set for, and has ended what a bit is set for.
    Exit {
        vcpu: u8,
        acknowledged: u16,
        ended: u16,
        groups: u8,
        mask: u8,
        split: bool,
        eoi_count: u8,
    },
    ExitWith {
        vcpu: u8,
        lrs: [u64; 3],
        used: u8,
        hcr: u64,
        vmcr: u64,
        priorities: u32,
    },
    ResetVcpu(u8),
    ResetInterface(u8),
}

/// What is written.
#[derive(Arbitrary, Debug)]
enum Value {
    Small(u8),
    Bit(u8),
    Any(u64),
}

impl Value {
    fn number(&self) -> u64 {
        match *self {
            Self::Small(value) => value.into(),
            Self::Bit(bit) => 1 << (bit % 64),
            Self::Any(value) => value,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Intid {
    Near(u8),
    Any(u32),
}

impl Intid {
    fn number(&self) -> u32 {
        match *self {
            Self::Near(intid) => u32::from(intid) % (END + 8),
            Self::Any(intid) => intid,
        }
    }
}

#[derive(Arbitrary, Debug)]
struct At {
    frame: u8,
    place: Place,
}

#[derive(Arbitrary, Debug)]
enum Place {
    /// One of the registers that have a field for each interrupt.
    Bank(u8, u8),
    Route(u8),
    Control(u8),
    Any(u32),
    Far(u64),
}

#[derive(Arbitrary, Debug)]
enum Size {
    Four,
    One,
    Eight,
    Any(u8),
}

impl At {
    fn frame(&self) -> Frame {
        // One vCPU more than there are.
        let vcpu = usize::from(self.frame >> 2 & 3);
        match self.frame & 3 {
            0 => Frame::Redistributor { vcpu, frame: RedistributorFrame::Control },
            1 => Frame::Redistributor { vcpu, frame: RedistributorFrame::Private },
            _ => Frame::Distributor,
        }
    }

    fn offset(&self) -> u64 {
        const BANKS: [u64; 9] = [0x080, 0x100, 0x180, 0x200, 0x280, 0x300, 0x380, 0x400, 0xc00];
        match self.place {
            Place::Bank(bank, byte) => BANKS[usize::from(bank) % BANKS.len()] + u64::from(byte),
            Place::Route(intid) => 0x6000 + 8 * (u64::from(intid) % u64::from(END + 8)),
            Place::Control(register) => 4 * u64::from(register),
            Place::Any(offset) => u64::from(offset) % (2 * FRAME_SIZE),
            Place::Far(offset) => offset,
        }
    }
}

impl Size {
    fn bytes(&self) -> u8 {
        match *self {
            Self::Four => 4,
            Self::One => 1,
            Self::Eight => 8,
            Self::Any(size) => size,
        }
    }
}

/// What is the guest's alone to say of an interrupt, in plain bytes: nothing else may change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Settings {
    enabled: bool,
    group1: bool,
    priority: u8,
    edge: bool,
}

impl Settings {
    fn reset(intid: u32) -> Self {
        Self { enabled: false, group1: true, priority: 0, edge: intid < 16 }
    }
}

/// vCPU, 0 for SPIs, and INTID.
type Key = (usize, u32);

/// The registers as a guest remembers them.
struct Memory {
    groups: u64,
    interrupts: BTreeMap<Key, Settings>,
    routes: [u64; SPIS],
    hosts: BTreeSet<u32>,
    /// Wires that are high.
    high: BTreeSet<Key>,
}

/// The fields that an access of `size` bytes at `offset` has to do with: bank, first INTID, number, bits of each.
fn fields(offset: u64, size: u8) -> Option<(u64, u32, u32, u32)> {
    let (bank, width) = match offset {
        0x400..0x800 => (0x400, 8),
        0xc00..0xd00 => (0xc00, 2),
        0x080..0x400 => (offset & !0x7f, 1),
        _ => return None,
    };
    let allowed = size == 4 || size == 1 && width == 8;
    let first = u32::try_from((offset - bank) * 8).ok()? / width;
    allowed.then_some((bank, first, u32::from(size) * 8 / width, width))
}

impl Memory {
    fn new() -> Self {
        let mut memory = Self {
            groups: 0,
            interrupts: BTreeMap::new(),
            routes: [0; SPIS],
            hosts: BTreeSet::new(),
            high: BTreeSet::new(),
        };
        for vcpu in 0..VCPUS {
            memory.reset_vcpu(vcpu);
        }
        memory.interrupts.extend((32..END).map(|intid| ((0, intid), Settings::reset(intid))));
        memory
    }

    fn reset_vcpu(&mut self, vcpu: usize) {
        self.interrupts.extend((0..32).map(|intid| ((vcpu, intid), Settings::reset(intid))));
        self.high.retain(|&(its, intid)| intid >= 32 || its != vcpu);
    }

    /// Notes that a wire is high or low.
    fn wire(&mut self, key: Key, level: bool) {
        if level {
            self.high.insert(key);
        } else {
            self.high.remove(&key);
        }
    }

    /// Yields the interrupts whose wires are high and that the distributor forwards to this vCPU and no other.
    fn forwarded(&self, vcpu: usize) -> impl Iterator<Item = u32> {
        let its = move |&&(owner, intid): &&Key| match intid {
            32.. => self.routes[intid as usize - 32] == vcpu as u64,
            _ => owner == vcpu,
        };
        let forwards = move |intid: &u32| {
            let Settings { enabled, group1, edge, .. } = self.of(vcpu, *intid);
            enabled && !edge && self.groups >> u8::from(group1) & 1 != 0
        };
        self.high.iter().filter(its).map(|&(_, intid)| intid).filter(forwards)
    }

    fn of(&self, vcpu: usize, intid: u32) -> Settings {
        self.interrupts[&(if intid < 32 { vcpu } else { 0 }, intid)]
    }

    /// Yields what of a register is remembered: the interrupt, and the position of its field.
    fn fields(frame: Frame, offset: u64, size: u8) -> Option<(u64, Vec<(Key, u32)>)> {
        let (bank, first, count, width) = fields(offset, size)?;
        let (vcpu, from, to) = match frame {
            Frame::Distributor => (0, 32, END),
            Frame::Redistributor { vcpu, frame: RedistributorFrame::Private } => (vcpu, 0, 32),
            Frame::Redistributor { .. } => return None,
        };
        let fields = (0..count).map(|n| ((vcpu, first + n), n * width));
        Some((bank, fields.filter(|((_, intid), _)| (from..to).contains(intid)).collect()))
    }

    /// What a read returns, if it is of something that is remembered.
    fn read(&self, frame: Frame, offset: u64, size: u8) -> Option<u64> {
        if frame == Frame::Distributor && (0x6100..0x6000 + 8 * u64::from(END)).contains(&offset) {
            let low = matches!(size, 4 | 8) && offset.is_multiple_of(8);
            return Some(if low { self.routes[(offset as usize - 0x6100) / 8] } else { 0 });
        }
        let (bank, fields) = Self::fields(frame, offset, size)?;
        fields.into_iter().try_fold(0, |value, (interrupt, position)| {
            let settings = self.interrupts.get(&interrupt)?;
            let field = match bank {
                0x080 => settings.group1.into(),
                0x100 | 0x180 => settings.enabled.into(),
                0x400 => settings.priority.into(),
                0xc00 => u64::from(settings.edge) << 1,
                _ => return None,
            };
            Some(value | field << position)
        })
    }

    fn write(&mut self, frame: Frame, offset: u64, size: u8, value: u64) {
        if frame == Frame::Distributor {
            if (offset, size) == (0, 4) {
                self.groups = value & 3;
            }
            if (0x6100..0x6000 + 8 * u64::from(END)).contains(&offset)
                && matches!(size, 4 | 8)
                && offset.is_multiple_of(8)
            {
                self.routes[(offset as usize - 0x6100) / 8] = value & 0x80ff_ffff;
            }
        }
        let Some((bank, fields)) = Self::fields(frame, offset, size) else { return };
        for (interrupt, position) in fields {
            let Some(settings) = self.interrupts.get_mut(&interrupt) else { continue };
            let bit = |n: u32| value >> (position + n) & 1 != 0;
            match bank {
                0x080 => settings.group1 = bit(0),
                0x100 => settings.enabled |= bit(0),
                0x180 => settings.enabled &= !bit(0),
                0x400 => settings.priority = (value >> position) as u8 & 0xf8,
                0xc00 if interrupt.1 >= 16 => settings.edge = bit(1),
                _ => {}
            }
        }
    }
}

/// Performs operations on an interrupt controller and checks that the guest's settings are what the guest has made them, that
/// list registers hold nothing else, and that the state agrees with itself.
pub fn vgic(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let (mut distributor, mut spis) = (Distributor::default(), [Spi::default(); SPIS]);
    let mut vcpus: [VcpuGic; VCPUS] = std::array::from_fn(|_| VcpuGic::new());
    let mut gic = Gic::new(&mut distributor, &mut spis, &mut vcpus[..]);
    gic.reset_distributor();
    let mut memory = Memory::new();
    let mut entered: [Option<ListRegisters>; VCPUS] = [None; VCPUS];
    if input.arbitrary() == Ok(true) {
        open(&mut gic, &mut memory);
    }
    for _ in 0..LIMIT {
        if input.is_empty() {
            break;
        }
        let Ok(op) = Op::arbitrary(&mut input) else { break };
        perform(&mut gic, &mut memory, &mut entered, &op);
        assert_eq!(gic.check(), Ok(()), "{op:x?}");
        for vcpu in 0..=VCPUS {
            let _ = gic.wakes(vcpu);
        }
    }
    check_settings(&mut gic, &memory);
}

/// Opens all ways: the host may raise all SPIs, everything is enabled, some of it with the lowest priority, and no CPU
/// interface masks anything.
fn open(gic: &mut Gic<'_, [VcpuGic]>, memory: &mut Memory) {
    let mut enable = |gic: &mut Gic<'_, [VcpuGic]>, frame, offset, value| {
        let done = gic.mmio(0, frame, offset, Access::Write { size: 4, value });
        assert!(matches!(done, Ok(Outcome::Done { .. })));
        memory.write(frame, offset, 4, value);
    };
    enable(gic, Frame::Distributor, 0, 3);
    for word in 1..=SPIS as u64 / 32 {
        enable(gic, Frame::Distributor, 0x100 + 4 * word, u32::MAX.into());
    }
    for vcpu in 0..VCPUS {
        let private = Frame::Redistributor { vcpu, frame: RedistributorFrame::Private };
        enable(gic, private, 0x100, u32::MAX.into());
        enable(gic, private, 0x400, u32::MAX.into());
        let mut entry = ListRegisters::default();
        gic.prepare_entry(vcpu, 4, &mut entry).expect("it does not run");
        entry.vmcr = 0xff << 24 | 3;
        let _ = gic.after_exit(vcpu, &entry);
    }
    for intid in 32..END {
        gic.give_to_host(intid).expect("an SPI");
        memory.hosts.insert(intid);
    }
}

fn perform(gic: &mut Gic<'_, [VcpuGic]>, memory: &mut Memory, entered: &mut [Option<ListRegisters>; VCPUS], op: &Op) {
    // One more than there are.
    let index = |vcpu: u8| usize::from(vcpu) % (VCPUS + 1);
    let kick = match op {
        Op::Read { vcpu, at, size } => access(gic, memory, index(*vcpu), at, Access::Read { size: size.bytes() }),
        Op::Write { vcpu, at, size, value } => {
            access(gic, memory, index(*vcpu), at, Access::Write { size: size.bytes(), value: value.number() })
        }
        Op::Sgi { vcpu, register, value } => {
            let register = [SgiRegister::Sgi0, SgiRegister::Sgi1, SgiRegister::AliasSgi1][usize::from(register % 3)];
            gic.send_sgi(index(*vcpu), register, *value)
        }
        Op::Deactivate { vcpu, value } => gic.write_dir(index(*vcpu), *value),
        Op::GiveToHost(intid) => {
            let intid = intid.number();
            let exists = (32..END).contains(&intid);
            assert_eq!(gic.give_to_host(intid).is_ok(), exists);
            if exists {
                memory.hosts.insert(intid);
            }
            return;
        }
        Op::Spi(intid, level) => {
            let raised = gic.raise_spi(intid.number(), *level);
            assert_eq!(raised.is_ok(), memory.hosts.contains(&intid.number()), "the host raises what it was given");
            if raised.is_ok() {
                memory.wire((0, intid.number()), *level);
            }
            raised.unwrap_or_default()
        }
        Op::Ppi(vcpu, intid, level) => {
            let moved = gic.set_ppi_level(index(*vcpu), intid.number(), *level);
            assert_eq!(moved.is_ok(), (16..32).contains(&intid.number()));
            if moved.is_ok() && index(*vcpu) < VCPUS {
                memory.wire((index(*vcpu), intid.number()), *level);
            }
            moved.unwrap_or_default()
        }
        Op::Enter(vcpu, list_registers) => {
            enter(gic, memory, entered, index(*vcpu), (*list_registers).into());
            return;
        }
        Op::Exit { vcpu, acknowledged, ended, groups, mask, split, eoi_count } => {
            let Some(Some(mut state)) = entered.get_mut(index(*vcpu)).map(Option::take) else { return };
            for (n, lr) in state.lrs[..state.used].iter_mut().enumerate() {
                if acknowledged >> n & 1 != 0 && *lr & ich::PENDING != 0 {
                    *lr = *lr & !ich::PENDING | ich::ACTIVE;
                }
                if ended >> n & 1 != 0 {
                    *lr &= !ich::ACTIVE;
                }
            }
            state.vmcr = u64::from(groups & 3) | u64::from(*split) << 9 | u64::from(*mask) << 24;
            state.hcr |= u64::from(eoi_count & 0x1f) << ich::HCR_EOICOUNT_SHIFT;
            gic.after_exit(index(*vcpu), &state)
        }
        Op::ExitWith { vcpu, lrs, used, hcr, vmcr, priorities } => {
            if let Some(entered) = entered.get_mut(index(*vcpu)) {
                *entered = None;
            }
            let mut state = ListRegisters { used: (*used).into(), hcr: *hcr, vmcr: *vmcr, ..ListRegisters::default() };
            for (n, lr) in state.lrs.iter_mut().enumerate() {
                *lr = lrs[n % lrs.len()];
            }
            state.ap1r = [*priorities; 4];
            gic.after_exit(index(*vcpu), &state)
        }
        Op::ResetVcpu(vcpu) => {
            let vcpu = index(*vcpu);
            if vcpu < VCPUS {
                memory.reset_vcpu(vcpu);
                entered[vcpu] = None;
            }
            gic.reset_vcpu(vcpu)
        }
        Op::ResetInterface(vcpu) => gic.reset_interface(index(*vcpu)),
    };
    assert!(kick.iter().all(|vcpu| vcpu < VCPUS), "{op:x?}");
}

fn access(
    gic: &mut Gic<'_, [VcpuGic]>,
    memory: &mut Memory,
    vcpu: usize,
    at: &At,
    access: Access,
) -> ravelin_vgic::VcpuSet {
    let (frame, offset) = (at.frame(), at.offset());
    let owner = if let Frame::Redistributor { vcpu, .. } = frame { vcpu } else { 0 };
    let (Access::Read { size } | Access::Write { size, .. }) = access;
    let exists = matches!(size, 1 | 2 | 4 | 8)
        && offset % u64::from(size) == 0
        && offset < FRAME_SIZE
        && vcpu < VCPUS
        && owner < VCPUS;
    match (gic.mmio(vcpu, frame, offset, access), access) {
        (Err(_), _) => {
            assert!(!exists);
            Default::default()
        }
        (Ok(Outcome::Done { value, kick }), Access::Read { .. }) => {
            assert!(exists && kick.is_empty(), "a read concerns nobody");
            assert!(size == 8 || value >> (8 * size) == 0);
            if let Some(expected) = memory.read(frame, offset, size) {
                assert_eq!(value, expected, "{frame:?} {offset:#x}");
            }
            if (frame, offset, size) == (Frame::Distributor, 0, 4) {
                assert_eq!(value & !RWP, memory.groups | ARE | DS);
                assert!(value & RWP == 0 || (0..VCPUS).any(|vcpu| runs(gic, vcpu)), "somebody can be waited for");
            }
            kick
        }
        (Ok(Outcome::Done { value, kick }), Access::Write { value: written, .. }) => {
            assert!(exists && value == 0 && !kick.contains(vcpu));
            memory.write(frame, offset, size, if size == 8 { written } else { written & ((1 << (8 * size)) - 1) });
            kick
        }
        (Ok(Outcome::Retry { kick }), _) => {
            assert!(exists && matches!(access, Access::Read { .. }));
            assert!(matches!(fields(offset, size), Some((0x200..0x400, ..))), "only what may be in flight");
            assert!(!kick.is_empty() && kick.iter().all(|vcpu| runs(gic, vcpu)), "somebody can be waited for");
            kick
        }
    }
}

/// Whether a vCPU runs: then it cannot be entered.
fn runs(gic: &mut Gic<'_, [VcpuGic]>, vcpu: usize) -> bool {
    let mut entry = ListRegisters::default();
    let runs = gic.prepare_entry(vcpu, 4, &mut entry).is_none();
    if !runs {
        let _ = gic.after_exit(vcpu, &entry);
    }
    runs
}

fn enter(
    gic: &mut Gic<'_, [VcpuGic]>,
    memory: &Memory,
    entered: &mut [Option<ListRegisters>; VCPUS],
    vcpu: usize,
    list_registers: usize,
) {
    // What is listed elsewhere stays there until that vCPU exits.
    let alone = entered.iter().all(Option::is_none);
    let is_awake =
        vcpu < VCPUS && read(gic, Frame::Redistributor { vcpu, frame: RedistributorFrame::Control }, 0x14) == Some(0);
    let forwarded: Vec<_> = memory.forwarded(vcpu).filter(|_| is_awake).collect();
    let active = read(gic, Frame::Distributor, 0x304).unwrap_or(u64::MAX);
    let wakes = gic.wakes(vcpu);
    let mut entry = ListRegisters::default();
    if gic.prepare_entry(vcpu, list_registers, &mut entry).is_none() {
        assert_eq!(entry, ListRegisters::default());
        return;
    }
    for intid in forwarded {
        // One that is active may be so elsewhere.
        if intid < 32 || alone && active >> (intid - 32) & 1 == 0 {
            reaches(&entry, list_registers, memory.of(vcpu, intid), intid, wakes);
        }
    }
    assert!(vcpu < VCPUS && entry.used <= list_registers.clamp(1, ich::MAX_LIST_REGISTERS));
    assert!(entry.lrs[entry.used..].iter().all(|&lr| lr == 0), "what is not used must be zero");
    let mut seen = BTreeSet::new();
    for lr in &entry.lrs[..entry.used] {
        let intid = (lr & 0xffff_ffff) as u32;
        assert!(intid < END && seen.insert(intid), "{entry:x?}");
        let settings = memory.of(vcpu, intid);
        assert_eq!(lr >> ich::PRIORITY_SHIFT & 0xff, settings.priority.into());
        assert_eq!(lr & ich::GROUP1 != 0, settings.group1);
        if lr & ich::PENDING != 0 {
            assert!(settings.enabled, "{intid} is disabled");
            assert!(memory.groups >> u8::from(settings.group1) & 1 != 0, "the group of {intid} is off");
            // One that is active stays where it is.
            if intid >= 32 && lr & ich::ACTIVE == 0 {
                is_routed_here(memory.routes[intid as usize - 32], vcpu, intid);
            }
        }
    }
    entered[vcpu] = Some(entry);
}

/// Reads 32 bits of a register, unless somebody who runs has to be waited for.
fn read(gic: &mut Gic<'_, [VcpuGic]>, frame: Frame, offset: u64) -> Option<u64> {
    match gic.mmio(0, frame, offset, Access::Read { size: 4 }) {
        Ok(Outcome::Done { value, .. }) => Some(value),
        _ => None,
    }
}

/// An interrupt that is forwarded to a vCPU comes to it, and wakes it if it is not masked.
fn reaches(entry: &ListRegisters, list_registers: usize, settings: Settings, intid: u32, wakes: bool) {
    let is_on = entry.vmcr >> u8::from(settings.group1) & 1 != 0;
    let Some(lr) = entry.lrs[..entry.used].iter().find(|&&lr| lr & 0xffff_ffff == intid.into()) else {
        // There is a maintenance interrupt when there is room, or when the group is turned on.
        let is_full = entry.used == list_registers.clamp(1, ich::MAX_LIST_REGISTERS);
        let room = ich::HCR_NPIE | ich::HCR_LRENPIE;
        let asked = if is_on { room } else { room | ich::HCR_VGRP0EIE << (2 * u8::from(settings.group1)) };
        assert!((is_full || !is_on) && entry.hcr & asked != 0, "{intid} is not listed: {entry:x?}");
        return;
    };
    let is_masked = u64::from(settings.priority) >= entry.vmcr >> 24;
    let is_active = lr & ich::ACTIVE != 0;
    assert!(is_active || lr & ich::PENDING != 0, "{intid} is not pending: {entry:x?}");
    assert!(!is_on || is_masked || is_active || wakes, "{intid} does not wake the vCPU: {entry:x?}");
}

/// An SPI that is pending on a vCPU is routed to it, or to any.
fn is_routed_here(route: u64, vcpu: usize, intid: u32) {
    assert!(route & 1 << 31 != 0 || route == vcpu as u64, "{intid} is routed to {route:#x}, not to {vcpu}");
}

/// At the end every setting can be read, whoever runs.
fn check_settings(gic: &mut Gic<'_, [VcpuGic]>, memory: &Memory) {
    let redistributors = (0..VCPUS).map(|vcpu| Frame::Redistributor { vcpu, frame: RedistributorFrame::Private });
    for frame in redistributors.chain([Frame::Distributor]) {
        let banks = [0x080_u64, 0x100, 0x180].into_iter().flat_map(|bank| (bank..bank + 16).step_by(4));
        for offset in banks.chain((0x400..0x400 + u64::from(END)).step_by(4)).chain((0xc00..0xc20).step_by(4)) {
            let expected = memory.read(frame, offset, 4).expect("a register with settings");
            let read = gic.mmio(0, frame, offset, Access::Read { size: 4 });
            assert!(matches!(read, Ok(Outcome::Done { value, .. }) if value == expected), "{frame:?} {offset:#x}");
        }
    }
}
