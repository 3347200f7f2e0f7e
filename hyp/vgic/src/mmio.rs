//! The guest's loads and stores, and the banks of registers that all interrupts have.

use crate::{
    FIRST_PPI, FIRST_SPI, FRAME_SIZE,
    gic::{Gic, Vcpus},
    interrupt::{Flags, Interrupt},
    vcpu_set::VcpuSet,
};

/// A page group of registers, 64 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Frame {
    /// The distributor's.
    Distributor,
    /// One of those that each vCPU has.
    Redistributor {
        /// Whose registers they are, not who accesses them.
        vcpu: usize,
        /// Which of the two.
        frame: RedistributorFrame,
    },
}

/// The frames of a redistributor. In the guest's memory the second follows the first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RedistributorFrame {
    /// RD_base: control.
    Control,
    /// SGI_base: SGIs and PPIs.
    Private,
}

/// A load or store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// A load of `size` bytes.
    Read {
        /// 1, 2, 4 or 8.
        size: u8,
    },
    /// A store of the low `size` bytes of `value`.
    Write {
        /// 1, 2, 4 or 8.
        size: u8,
        /// What to store. Higher bytes are ignored.
        value: u64,
    },
}

/// What became of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Outcome {
    /// It is done.
    Done {
        /// What a load returns, zero-extended; 0 for a store.
        value: u64,
        /// vCPUs that must look at their interrupts again. The accessing one is not among them: it will enter.
        kick: VcpuSet,
    },
    /// The state that is asked for is in list registers of running vCPUs. Make them exit, and perform the access
    /// again; returning to the guest at the same instruction will do. Nothing has changed.
    Retry {
        /// The vCPUs to make exit, never empty.
        kick: VcpuSet,
    },
}

/// No such access exists: it does not lie within the frame, is not aligned to its size, or has no valid size; or the VM
/// has no such vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unsupported;

/// GICD_IIDR and GICR_IIDR: product "R", no JEP106 code.
pub(crate) const IIDR: u64 = 0x5200_0000;

/// GICD_PIDR2 and GICR_PIDR2: ArchRev is GICv3.
pub(crate) const PIDR2: u64 = 0x3 << 4;

/// Registers that hold a field of each of several interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Bank {
    Group,
    SetEnable,
    ClearEnable,
    SetPending,
    ClearPending,
    SetActive,
    ClearActive,
    Priority,
    Configuration,
}

/// The fields that one access touches.
#[derive(Clone, Copy)]
struct Fields {
    bank: Bank,
    /// INTID of the lowest field.
    first: u16,
    count: u16,
    /// Bits of each field.
    width: u16,
}

impl Fields {
    /// Returns what an access of `size` bytes at `offset` into GICD or SGI_base touches, if it is to a bank and of a
    /// size allowed there: 32 bits, for priorities also 8 (12.1.3).
    fn decode(offset: u64, size: u8) -> Option<Self> {
        let offset = u16::try_from(offset).ok()?;
        let (bank, base, width) = match offset {
            0x080..0x100 => (Bank::Group, 0x080, 1),
            0x100..0x180 => (Bank::SetEnable, 0x100, 1),
            0x180..0x200 => (Bank::ClearEnable, 0x180, 1),
            0x200..0x280 => (Bank::SetPending, 0x200, 1),
            0x280..0x300 => (Bank::ClearPending, 0x280, 1),
            0x300..0x380 => (Bank::SetActive, 0x300, 1),
            0x380..0x400 => (Bank::ClearActive, 0x380, 1),
            0x400..0x800 => (Bank::Priority, 0x400, 8),
            0xc00..0xd00 => (Bank::Configuration, 0xc00, 2),
            _ => return None,
        };
        if size != 4 && (bank != Bank::Priority || size != 1) {
            return None;
        }
        let per_byte = 8_u16.checked_div(width)?;
        let first = offset.checked_sub(base)?.checked_mul(per_byte)?;
        Some(Self { bank, first, count: u16::from(size).checked_mul(per_byte)?, width })
    }

    /// Yields INTID and position of each field.
    fn iter(self) -> impl Iterator<Item = (u16, u16)> {
        (0..self.count).map(move |index| (self.first.saturating_add(index), index.saturating_mul(self.width)))
    }

    const fn mask(self) -> u64 {
        match self.width {
            1 => 0b1,
            2 => 0b11,
            _ => 0xff,
        }
    }
}

impl Bank {
    fn read(self, interrupt: &Interrupt) -> u64 {
        match self {
            Self::Group => interrupt.is(Flags::GROUP1).into(),
            Self::SetEnable | Self::ClearEnable => interrupt.is(Flags::ENABLED).into(),
            Self::SetPending | Self::ClearPending => interrupt.shows_pending().into(),
            Self::SetActive | Self::ClearActive => interrupt.shows_active().into(),
            Self::Priority => interrupt.priority().into(),
            Self::Configuration => u64::from(interrupt.is(Flags::EDGE)) << 1,
        }
    }

    fn write(self, interrupt: &mut Interrupt, intid: u16, field: u64) {
        let bit = field & 1 != 0;
        match self {
            Self::Group => interrupt.set(Flags::GROUP1, bit),
            Self::Priority => interrupt.set_priority(u8::try_from(field).unwrap_or(0)),
            // SGIs are always edge-triggered (12.11 GICR_ICFGR0).
            Self::Configuration if intid < FIRST_PPI => {}
            Self::Configuration => interrupt.set(Flags::EDGE, field & 0b10 != 0),
            _ if !bit => {}
            Self::SetEnable => interrupt.set(Flags::ENABLED, true),
            Self::ClearEnable => interrupt.set(Flags::ENABLED, false),
            Self::SetPending => interrupt.set_pending(),
            Self::ClearPending => interrupt.clear_pending(),
            Self::SetActive => interrupt.set_active(),
            Self::ClearActive => interrupt.deactivate(),
        }
    }

    /// Returns whether what is read may be in a list register.
    const fn is_in_flight(self) -> bool {
        matches!(self, Self::SetPending | Self::ClearPending | Self::SetActive | Self::ClearActive)
    }
}

impl<V: Vcpus + ?Sized> Gic<'_, V> {
    /// Performs an access by `vcpu` at `offset` bytes into a frame.
    ///
    /// What the architecture does not define reads as zero and ignores writes, also accesses of a size that the
    /// register does not allow. `vcpu` must not run (see [`Gic::after_exit`]).
    ///
    /// # Errors
    ///
    /// See [`Unsupported`]. Nothing has changed.
    pub fn mmio(&mut self, vcpu: usize, frame: Frame, offset: u64, access: Access) -> Result<Outcome, Unsupported> {
        let (size, access) = match access {
            Access::Read { size } => (size, access),
            Access::Write { size, value } => {
                let bits = u32::from(size).saturating_mul(8);
                let mask = 1_u64.checked_shl(bits).map_or(u64::MAX, |end| end.wrapping_sub(1));
                (size, Access::Write { size, value: value & mask })
            }
        };
        let aligned = matches!(size, 1 | 2 | 4 | 8) && offset & u64::from(size).wrapping_sub(1) == 0;
        if !aligned || offset >= FRAME_SIZE || self.vcpus.get(vcpu).is_none() {
            return Err(Unsupported);
        }
        let fields = Fields::decode(offset, size);
        let (value, kick) = match frame {
            Frame::Distributor => match fields {
                Some(fields) if fields.first >= FIRST_SPI => return Ok(self.bank(vcpu, vcpu, fields, access)),
                Some(_) => (0, VcpuSet::EMPTY),
                None => self.distributor_register(offset, access),
            },
            Frame::Redistributor { vcpu: owner, frame } => {
                if owner >= self.vcpus.count() {
                    return Err(Unsupported);
                }
                match (frame, fields) {
                    (RedistributorFrame::Control, _) => self.redistributor_register(owner, offset, access),
                    (RedistributorFrame::Private, Some(fields)) if fields.first < FIRST_SPI => {
                        return Ok(self.bank(vcpu, owner, fields, access));
                    }
                    (RedistributorFrame::Private, _) => (0, VcpuSet::EMPTY),
                }
            }
        };
        Ok(Outcome::Done { value, kick: kick.without(vcpu) })
    }

    fn bank(&mut self, vcpu: usize, owner: usize, fields: Fields, access: Access) -> Outcome {
        match access {
            Access::Read { .. } if fields.bank.is_in_flight() => self.read_in_flight(owner, fields),
            Access::Read { .. } => Outcome::Done { value: self.read_bank(owner, fields), kick: VcpuSet::EMPTY },
            Access::Write { value, .. } => {
                let mut kick = VcpuSet::EMPTY;
                for (intid, position) in fields.iter() {
                    let field = value >> position & fields.mask();
                    kick.extend(self.update(owner, intid, |interrupt| fields.bank.write(interrupt, intid, field)));
                }
                Outcome::Done { value: 0, kick: kick.without(vcpu) }
            }
        }
    }

    fn read_bank(&self, owner: usize, fields: Fields) -> u64 {
        fields.iter().fold(0, |value, (intid, position)| {
            value | self.interrupt(owner, intid).map_or(0, |interrupt| fields.bank.read(interrupt)) << position
        })
    }

    /// Reads pending or active state, once it is known as of a time after the read was first tried.
    fn read_in_flight(&mut self, owner: usize, fields: Fields) -> Outcome {
        let mut kick = VcpuSet::EMPTY;
        for (intid, _) in fields.iter() {
            if let Some(interrupt) = self.interrupt_mut(owner, intid)
                && interrupt.is(Flags::LISTED)
                && !interrupt.is(Flags::ANSWERED)
                && let Some(home) = interrupt.home()
            {
                interrupt.set(Flags::ASKED, true);
                kick.insert(home);
            }
        }
        if !kick.is_empty() {
            return Outcome::Retry { kick };
        }
        let value = self.read_bank(owner, fields);
        for (intid, _) in fields.iter() {
            if let Some(interrupt) = self.interrupt_mut(owner, intid) {
                interrupt.set(Flags::ANSWERED, false);
            }
        }
        Outcome::Done { value, kick: VcpuSet::EMPTY }
    }
}
