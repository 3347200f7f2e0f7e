//! Exits of a guest: what the CPU says of them, what the host is told, and what it may answer.
//!
//! [`Report`] is all that a host ever learns of an exit. What an exit leaves open until the host runs the vCPU again is kept
//! by the hypervisor as [`Pending`], so that the host can answer but neither choose what it answers to nor where it goes.

use ravelin_abi::{Answer, ExitReason, RUN_FLAG_EXECUTE, RUN_FLAG_WRITE, RUN_NO_DEADLINE, RunEntry, RunExit, VmKind};
use ravelin_memory::{Ipa, IpaRange};

use crate::{Context, IdRegisters, MmioAccess, PstateFeatures, SysregAccess, vm::VmEnd};

/// Registers in which the CPU says why it took a synchronous exception from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syndrome {
    /// ESR_EL2.
    pub esr: u64,
    /// FAR_EL2.
    pub far: u64,
    /// HPFAR_EL2.
    pub hpfar: u64,
}

/// Why a guest came to EL2 with a synchronous exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestExit {
    /// WFI. The program counter is at the instruction.
    Wait,
    /// WFE, or a wait that ends at a time, which may end early. The program counter is at the instruction.
    Yield,
    /// HVC with this immediate. The program counter is behind the instruction.
    Hvc(u16),
    /// SMC with this immediate. The program counter is at the instruction.
    Smc(u16),
    /// MSR or MRS. The program counter is at the instruction.
    Sysreg(SysregAccess),
    /// An access that stage 2 did not let through, or that failed behind it.
    Abort(Abort),
    /// FP or SIMD, to be repeated when the state is loaded.
    FloatingPoint,
    /// SVE, to be repeated when the state is loaded.
    Sve,
    /// Anything else: the instruction is [undefined](Context::take_undefined).
    Undefined,
}

/// Fields of ESR_EL2 (Arm ARM DDI 0487, D24.2.40).
mod esr {
    pub(super) const EC_SHIFT: u32 = 26;
    pub(super) const EC: u64 = 0x3f;
    pub(super) const EC_WAIT: u64 = 0x01;
    pub(super) const EC_FLOATING_POINT: u64 = 0x07;
    pub(super) const EC_HVC64: u64 = 0x16;
    pub(super) const EC_SMC64: u64 = 0x17;
    pub(super) const EC_SYSREG: u64 = 0x18;
    pub(super) const EC_SVE: u64 = 0x19;
    pub(super) const EC_INSTRUCTION_ABORT: u64 = 0x20;
    pub(super) const EC_DATA_ABORT: u64 = 0x24;
    /// Of HVC and SMC.
    pub(super) const IMMEDIATE: u64 = 0xffff;
    /// Which instruction waits: 0 for WFI.
    pub(super) const TI: u64 = 0b11;
    pub(super) const FNV: u64 = 1 << 10;
    pub(super) const CM: u64 = 1 << 8;
    pub(super) const S1PTW: u64 = 1 << 7;
    pub(super) const WNR: u64 = 1 << 6;
    pub(super) const FSC: u64 = 0x3f;
}

/// The instruction by which a guest calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Conduit {
    Hvc,
    Smc,
}

impl Conduit {
    /// Returns the one of a call without an immediate, from ESR_EL2.
    #[inline]
    pub(crate) const fn decode(esr: u64) -> Option<Self> {
        match (esr >> esr::EC_SHIFT & esr::EC, esr & esr::IMMEDIATE) {
            (esr::EC_HVC64, 0) => Some(Self::Hvc),
            (esr::EC_SMC64, 0) => Some(Self::Smc),
            _ => None,
        }
    }

    /// Takes the program counter behind the instruction, where it is after HVC, as [`Context::skip_instruction`] does.
    #[inline]
    pub(crate) const fn pass(self, context: &mut Context) {
        context.end_instruction();
        if let Self::Smc = self {
            context.pc = context.pc.wrapping_add(4);
        }
    }

    /// Takes the program counter back to the instruction, as if it had not been executed. Of SMC it is there.
    #[inline]
    pub(crate) const fn rewind(self, context: &mut Context) {
        if let Self::Hvc = self {
            context.pc = context.pc.wrapping_sub(4);
        }
    }
}

/// Performs the load of an ID register, if an exception with this value of ESR_EL2 is that of one. Returns whether it is.
#[inline(never)]
pub(crate) fn shows_id_register(esr: u64, context: &mut Context, ids: &IdRegisters) -> bool {
    if esr >> esr::EC_SHIFT & esr::EC != esr::EC_SYSREG {
        return false;
    }
    let Some((register, value)) = SysregAccess::decode(esr).id_value(ids) else { return false };
    context.set_register(register, value);
    context.skip_instruction();
    true
}

/// Offset into a page.
const PAGE_OFFSET: u64 = 0xfff;

impl GuestExit {
    /// Decodes an exception of a guest with these registers.
    #[must_use]
    #[inline]
    pub fn decode(syndrome: &Syndrome, context: &Context) -> Self {
        let &Syndrome { esr, .. } = syndrome;
        let [low, high, ..] = esr.to_le_bytes();
        let immediate = u16::from_le_bytes([low, high]);
        match esr >> esr::EC_SHIFT & esr::EC {
            esr::EC_DATA_ABORT | esr::EC_INSTRUCTION_ABORT => Self::Abort(Abort::decode(syndrome)),
            esr::EC_FLOATING_POINT => Self::FloatingPoint,
            // What may be conditional or two bytes long. No guest is told that its EL0 has AArch32.
            _ if context.is_aarch32() => Self::Undefined,
            esr::EC_WAIT if esr & esr::TI == 0 => Self::Wait,
            esr::EC_WAIT => Self::Yield,
            esr::EC_HVC64 => Self::Hvc(immediate),
            esr::EC_SMC64 => Self::Smc(immediate),
            esr::EC_SYSREG => Self::Sysreg(SysregAccess::decode(esr)),
            esr::EC_SVE => Self::Sve,
            _ => Self::Undefined,
        }
    }
}

/// A data or instruction abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    esr: u64,
    far: u64,
    page: Option<Ipa>,
}

/// What there is at a guest address for which stage 2 has no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Memory that the host has yet to provide.
    Memory,
    /// A device that the host plays.
    Device,
    /// Nothing, or what the guest must not have any more.
    Nothing,
}

impl Abort {
    fn decode(syndrome: &Syndrome) -> Self {
        let &Syndrome { esr, far, hpfar } = syndrome;
        // HPFAR_EL2 is valid for stage 2 address size, translation and access flag faults, and for any on a stage 1 walk.
        let valid = match esr & esr::FSC {
            0b00_0000..=0b00_1011 => true,
            0b00_1100..=0b00_1111 => esr & esr::S1PTW != 0,
            _ => false,
        };
        // FIPA, bits 43:4 or, with FEAT_LPA, 47:4, holds IPA[51:12]. Above 48 bits stage 2 maps nothing.
        let fipa = hpfar >> 4 & ((1 << 44) - 1);
        Self { esr, far, page: if valid { Ipa::new(fipa << 12) } else { None } }
    }

    /// Returns the guest address of the page that stage 2 refused. `None` if the CPU does not report it, or if it was not
    /// stage 2: then there is nothing but [to let the guest know](Abort::inject).
    #[must_use]
    pub const fn page(&self) -> Option<Ipa> {
        self.page
    }

    /// Returns the guest address that was accessed. `None` if only its page is known, as where a walk of the guest's own
    /// tables failed.
    #[must_use]
    pub fn address(&self) -> Option<Ipa> {
        if self.esr & (esr::S1PTW | esr::FNV) != 0 {
            return None;
        }
        Ipa::new(self.page?.raw() | self.far & PAGE_OFFSET)
    }

    /// Returns the load or store. `None` if the CPU does not describe it, or if it reaches beyond its page.
    #[must_use]
    pub fn access(&self, context: &Context) -> Option<MmioAccess> {
        let offset = self.address()?.raw() & PAGE_OFFSET;
        let access = if self.is_fetch() { None } else { MmioAccess::decode(self.esr, context) }?;
        (offset.saturating_add(access.bytes().into()) <= PAGE_OFFSET.saturating_add(1)).then_some(access)
    }

    /// Returns whether an instruction was to be fetched.
    #[must_use]
    pub const fn is_fetch(&self) -> bool {
        self.esr >> esr::EC_SHIFT & esr::EC == esr::EC_INSTRUCTION_ABORT
    }

    /// Returns whether something was to be written. Cache maintenance, which says so too, does not.
    #[must_use]
    pub const fn is_write(&self) -> bool {
        !self.is_fetch() && self.esr & (esr::WNR | esr::CM) == esr::WNR
    }

    const fn is_cache_maintenance(&self) -> bool {
        !self.is_fetch() && self.esr & esr::CM != 0
    }

    /// Lets the guest take an external abort for it.
    pub const fn inject(&self, context: &mut Context, features: PstateFeatures) {
        context.take(&context.trapped(self.esr, self.far).external_abort(features));
    }

    /// Decides what becomes of it, given what is at the address, and what [`Abort::access`] says of it. `None` if the guest goes
    /// on, with an external abort where nobody can help. Otherwise the host is to do something, and the exit leaves something open.
    #[must_use]
    pub fn handle(
        self,
        context: &mut Context,
        described: Option<MmioAccess>,
        backing: Backing,
        kind: VmKind,
        features: PstateFeatures,
    ) -> Option<(Report, Pending)> {
        match (self.page, backing) {
            (Some(page), Backing::Memory) => {
                let access = (kind == VmKind::Ordinary).then_some((self.is_write(), self.is_fetch()));
                return Some((Report::PageFault { page, access }, Pending::PageFault(self)));
            }
            // Devices have no caches in front of them.
            (Some(_), Backing::Device) if self.is_cache_maintenance() && !context.is_aarch32() => {
                context.skip_instruction();
                return None;
            }
            (Some(_), Backing::Device) => {
                if let (Some(address), Some(access)) = (self.address(), described) {
                    let stored = access.is_write().then(|| access.stored(context));
                    let report = Report::Mmio { address, bytes: access.bytes(), stored };
                    return Some((report, Pending::Mmio(self, access)));
                }
            }
            _ => {}
        }
        self.inject(context, features);
        None
    }
}

/// What the host is told of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
// So that it is moved by whole registers.
#[repr(u64)]
pub enum Report {
    /// There is something for the host to do, such as a physical interrupt.
    Interrupted,
    /// The guest waits for an interrupt.
    Wait {
        /// When the next timer fires: [`Context::next_timer`].
        deadline: Option<u64>,
    },
    /// The guest waits for another vCPU.
    Yield,
    /// Access to a device.
    Mmio {
        /// Guest address.
        address: Ipa,
        /// How many bytes: 1, 2, 4 or 8.
        bytes: u8,
        /// What is stored, if it is a store: [`MmioAccess::stored`].
        stored: Option<u64>,
    },
    /// Access to a page that is not there.
    PageFault {
        /// Its guest address.
        page: Ipa,
        /// Whether it is a store, and whether an instruction fetch. Nobody's business but in ordinary VMs.
        access: Option<(bool, bool)>,
    },
    /// Another vCPU was turned on.
    CpuOn {
        /// Its index.
        vcpu: usize,
    },
    /// The vCPU was turned off.
    CpuOff,
    /// The VM is to end.
    SystemOff,
    /// The VM is to start anew.
    SystemReset,
    /// Pages are to be taken back of which some are claimed.
    Unshare(IpaRange),
    /// Pages were offered.
    Shared(IpaRange),
    /// Pages were given up.
    Relinquished(IpaRange),
    /// A call lacks pages for translation tables.
    NeedsTables {
        /// How many.
        pages: u64,
    },
    /// A call of the guest to its host, whose registers are in the page already.
    HostCall {
        /// The immediate that the guest gave.
        immediate: u16,
    },
    /// The vCPU cannot go on.
    Failed,
    /// Nothing happened but that other vCPUs have something to do.
    Wake,
    /// Nothing happened but conversions.
    Converted,
}

impl Report {
    /// Returns what the host is told when its guest has ended a VM.
    pub(crate) const fn of_end(end: VmEnd) -> Self {
        match end {
            VmEnd::Off => Self::SystemOff,
            VmEnd::Reset => Self::SystemReset,
        }
    }

    /// Returns what goes into the run page.
    #[must_use]
    #[inline]
    pub fn run_exit(&self) -> RunExit {
        let exit = |reason: ExitReason| RunExit { reason: reason.code(), ..RunExit::default() };
        let range =
            |reason, range: IpaRange| RunExit { address: range.base().raw(), pages: range.pages(), ..exit(reason) };
        match *self {
            Self::Interrupted => exit(ExitReason::Interrupted),
            Self::Wait { deadline } => {
                RunExit { deadline: deadline.unwrap_or(RUN_NO_DEADLINE), ..exit(ExitReason::Wait) }
            }
            Self::Yield => exit(ExitReason::Yield),
            Self::Mmio { address, bytes, stored } => RunExit {
                address: address.raw(),
                size: bytes.into(),
                flags: flag(stored.is_some(), RUN_FLAG_WRITE),
                value: stored.unwrap_or(0),
                ..exit(ExitReason::Mmio)
            },
            Self::PageFault { page, access } => {
                let (write, execute) = access.unwrap_or_default();
                RunExit {
                    address: page.raw(),
                    flags: flag(write, RUN_FLAG_WRITE) | flag(execute, RUN_FLAG_EXECUTE),
                    ..exit(ExitReason::PageFault)
                }
            }
            Self::CpuOn { vcpu } => {
                RunExit { vcpu: u64::try_from(vcpu).unwrap_or(u64::MAX), ..exit(ExitReason::CpuOn) }
            }
            Self::CpuOff => exit(ExitReason::CpuOff),
            Self::SystemOff => exit(ExitReason::SystemOff),
            Self::SystemReset => exit(ExitReason::SystemReset),
            Self::Unshare(pages) => range(ExitReason::Unshare, pages),
            Self::Shared(pages) => range(ExitReason::Shared, pages),
            Self::Relinquished(pages) => range(ExitReason::Relinquished, pages),
            Self::NeedsTables { pages } => RunExit { pages, ..exit(ExitReason::NeedsTables) },
            Self::HostCall { immediate } => RunExit { value: immediate.into(), ..exit(ExitReason::HostCall) },
            Self::Failed => exit(ExitReason::Failed),
            Self::Wake => exit(ExitReason::Wake),
            Self::Converted => exit(ExitReason::Converted),
        }
    }
}

const fn flag(condition: bool, bit: u64) -> u64 {
    if condition { bit } else { 0 }
}

/// What an access leaves open until the host runs the vCPU again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pending {
    /// Nothing.
    #[default]
    Nothing,
    /// A device has to perform this.
    Mmio(Abort, MmioAccess),
    /// There has to be a page.
    PageFault(Abort),
}

/// The host's answer does not belong to the last exit. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongAnswer;

impl Pending {
    /// Acts on the host's answer. Afterwards nothing is pending, and the vCPU can be entered.
    ///
    /// # Errors
    ///
    /// [`WrongAnswer`], if the host says what cannot be said here.
    #[inline]
    pub fn resume(
        &mut self,
        context: &mut Context,
        entry: &RunEntry,
        features: PstateFeatures,
    ) -> Result<(), WrongAnswer> {
        match (&*self, Answer::from_code(entry.answer).ok_or(WrongAnswer)?) {
            (_, Answer::Retry) => {}
            (Self::Mmio(_, access), Answer::Complete) => {
                if !access.is_write() {
                    access.load(context, entry.value);
                }
                context.skip_instruction();
            }
            (Self::Mmio(abort, _) | Self::PageFault(abort), Answer::Abort) => abort.inject(context, features),
            (_, Answer::Complete | Answer::Abort | Answer::Refuse) => return Err(WrongAnswer),
        }
        *self = Self::Nothing;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
