//! The view of a VM's interrupt controller, and where each interrupt belongs.

use crate::{
    FIRST_PPI, FIRST_SPI, INTIDS, MAX_SPIS, MAX_VCPUS,
    distributor::{Distributor, Spi},
    ich::VMCR_VPMR_SHIFT,
    interrupt::{Flags, Interrupt},
    vcpu::VcpuGic,
    vcpu_set::VcpuSet,
};

/// Where the vCPUs of a VM keep their [`VcpuGic`].
pub trait Vcpus {
    /// Returns how many vCPUs the VM is configured to have, 1 to [`MAX_VCPUS`]. It never changes.
    fn count(&self) -> usize;

    /// Returns the state of a vCPU, or `None` if there is no such vCPU, also if there is none yet.
    fn get(&self, vcpu: usize) -> Option<&VcpuGic>;

    /// As [`Vcpus::get`].
    fn get_mut(&mut self, vcpu: usize) -> Option<&mut VcpuGic>;
}

impl Vcpus for [VcpuGic] {
    fn count(&self) -> usize {
        self.len()
    }

    fn get(&self, vcpu: usize) -> Option<&VcpuGic> {
        <[VcpuGic]>::get(self, vcpu)
    }

    fn get_mut(&mut self, vcpu: usize) -> Option<&mut VcpuGic> {
        <[VcpuGic]>::get_mut(self, vcpu)
    }
}

/// The interrupt is not one that the caller may raise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotAllowed;

/// The interrupt controller of one VM.
///
/// The index of a vCPU is its position in [`Vcpus`] and its GICR_TYPER.Processor_Number; its affinity is
/// [`affinity`](crate::affinity). An operation on a vCPU that does not exist does nothing.
#[derive(Debug)]
pub struct Gic<'a, V: ?Sized> {
    pub(crate) distributor: &'a mut Distributor,
    pub(crate) spis: &'a mut [Spi],
    pub(crate) vcpus: &'a mut V,
}

impl<'a, V: Vcpus + ?Sized> Gic<'a, V> {
    /// Returns the view of a VM's interrupt controller. `spis` has a multiple of 32 entries, from 32 to [`MAX_SPIS`].
    #[must_use]
    pub fn new(distributor: &'a mut Distributor, spis: &'a mut [Spi], vcpus: &'a mut V) -> Self {
        debug_assert!(!spis.is_empty() && spis.len().is_multiple_of(32) && spis.len() <= MAX_SPIS);
        debug_assert!((1..=MAX_VCPUS).contains(&vcpus.count()));
        Self { distributor, spis, vcpus }
    }

    /// Puts the distributor and all SPIs into their reset state: both groups off, nothing routed anywhere but to
    /// vCPU 0, no SPI the host's. For the start of a VM, before [`Gic::reset_vcpu`].
    pub fn reset_distributor(&mut self) {
        *self.distributor = Distributor::default();
        for spi in self.spis.iter_mut() {
            *spi = Spi::reset();
        }
    }

    /// Puts a vCPU's redistributor and CPU interface into their reset state. For the start of the vCPU.
    ///
    /// SPIs that were in its list registers lose what they say.
    pub fn reset_vcpu(&mut self, vcpu: usize) -> VcpuSet {
        let Some(gic) = self.vcpus.get_mut(vcpu) else { return VcpuSet::EMPTY };
        *gic = VcpuGic::new();
        for spi in self.spis.iter_mut() {
            if spi.interrupt.home() == Some(vcpu) {
                spi.interrupt.forget_home();
            }
        }
        self.distributor.stale.remove(vcpu);
        let mut kick = self.elect();
        kick.extend(self.reroute(|_| true));
        kick
    }

    /// Puts a vCPU's CPU interface into its reset state: groups off, all priorities masked. For a vCPU that does not
    /// run and is turned on again; its redistributor keeps its state.
    pub fn reset_interface(&mut self, vcpu: usize) -> VcpuSet {
        let Some(gic) = self.vcpus.get_mut(vcpu) else { return VcpuSet::EMPTY };
        // It may have been left with nothing to take back. With list registers in use it does run, which is its caller's mistake.
        if gic.used == 0 {
            gic.running = 0;
        }
        gic.vmcr = 0;
        gic.ap0r = [0; 4];
        gic.ap1r = [0; 4];
        self.elect()
    }

    /// Lets the host raise an SPI from now on.
    ///
    /// # Errors
    ///
    /// `intid` is not that of a configured SPI.
    pub fn give_to_host(&mut self, intid: u32) -> Result<(), NotAllowed> {
        let spi = u16::try_from(intid).ok().and_then(|intid| self.spi_mut(intid)).ok_or(NotAllowed)?;
        spi.interrupt.set(Flags::HOST, true);
        Ok(())
    }

    /// Moves the wire of an SPI for the host. Of an edge-triggered SPI, each `true` is an edge.
    ///
    /// # Errors
    ///
    /// The SPI was not given to the host; also for SGIs, PPIs and what does not exist.
    pub fn raise_spi(&mut self, intid: u32, level: bool) -> Result<VcpuSet, NotAllowed> {
        let intid = u16::try_from(intid).map_err(|_| NotAllowed)?;
        let spi = self.spi_mut(intid).ok_or(NotAllowed)?;
        if !spi.interrupt.is(Flags::HOST) {
            return Err(NotAllowed);
        }
        Ok(self.update(0, intid, |interrupt| interrupt.set_line(level)))
    }

    /// Moves the wire of a PPI for EL2, such as a timer's. If it is there already, nothing happens: of an edge-triggered PPI,
    /// each change to `true` is an edge.
    ///
    /// # Errors
    ///
    /// `intid` is not that of a PPI.
    pub fn set_ppi_level(&mut self, vcpu: usize, intid: u32, level: bool) -> Result<VcpuSet, NotAllowed> {
        match u16::try_from(intid) {
            Ok(intid @ FIRST_PPI..FIRST_SPI) => match self.interrupt(vcpu, intid) {
                Some(interrupt) if interrupt.is(Flags::LINE) != level => {
                    Ok(self.update(vcpu, intid, |interrupt| interrupt.set_line(level)))
                }
                _ => Ok(VcpuSet::EMPTY),
            },
            _ => Err(NotAllowed),
        }
    }

    /// Deactivates an interrupt for a trapped write of `value` to ICC_DIR_EL1 by `vcpu` (12.2 ICC_DIR_EL1).
    ///
    /// An SPI may be active on another vCPU. In EOImode 0 the write has no effect.
    pub fn write_dir(&mut self, vcpu: usize, value: u64) -> VcpuSet {
        let split = self.vcpus.get(vcpu).is_some_and(VcpuGic::separates_deactivation);
        match u16::try_from(value & 0xff_ffff) {
            Ok(intid) if split => self.update(vcpu, intid, Interrupt::deactivate).without(vcpu),
            _ => VcpuSet::EMPTY,
        }
    }

    /// Returns whether a vCPU that waits for an interrupt has one: a pending one that the distributor forwards and
    /// the CPU interface lets through, or, of a sleeping redistributor, that would make it ask for power (GICR_WAKER).
    ///
    /// Active priorities are not looked at, so that a vCPU that waits inside a handler may be woken in vain.
    #[must_use]
    pub fn wakes(&self, vcpu: usize) -> bool {
        let Some(gic) = self.vcpus.get(vcpu) else { return false };
        let mask = gic.vmcr >> VMCR_VPMR_SHIFT;
        let mut from = 0;
        while let Some(intid) = gic.queue.next(from) {
            from = intid.saturating_add(1);
            let Some(interrupt) = self.interrupt(vcpu, intid) else { continue };
            let passes =
                gic.is_asleep() || gic.groups() >> interrupt.group() & 1 != 0 && u32::from(interrupt.priority()) < mask;
            if passes && self.forwards(interrupt) && interrupt.is_pending() && !interrupt.is(Flags::ACTIVE) {
                return true;
            }
        }
        false
    }

    pub(crate) fn interrupt(&self, vcpu: usize, intid: u16) -> Option<&Interrupt> {
        match intid.checked_sub(FIRST_SPI) {
            None => self.vcpus.get(vcpu)?.private.get(usize::from(intid)),
            Some(spi) if intid < INTIDS => Some(&self.spis.get(usize::from(spi))?.interrupt),
            Some(_) => None,
        }
    }

    pub(crate) fn interrupt_mut(&mut self, vcpu: usize, intid: u16) -> Option<&mut Interrupt> {
        if intid < FIRST_SPI {
            self.vcpus.get_mut(vcpu)?.private.get_mut(usize::from(intid))
        } else {
            Some(&mut self.spi_mut(intid)?.interrupt)
        }
    }

    pub(crate) fn spi_mut(&mut self, intid: u16) -> Option<&mut Spi> {
        let spi = intid.checked_sub(FIRST_SPI).filter(|_| intid < INTIDS)?;
        self.spis.get_mut(usize::from(spi))
    }

    /// Returns whether the distributor forwards the interrupt when it is pending.
    pub(crate) fn forwards(&self, interrupt: &Interrupt) -> bool {
        interrupt.is(Flags::ENABLED) && self.distributor.has_group(interrupt.group())
    }

    /// Changes an interrupt and puts it where it then belongs. Returns who must look at it.
    pub(crate) fn update(&mut self, vcpu: usize, intid: u16, change: impl FnOnce(&mut Interrupt)) -> VcpuSet {
        let Some(interrupt) = self.interrupt_mut(vcpu, intid) else { return VcpuSet::EMPTY };
        let before = *interrupt;
        change(interrupt);
        if *interrupt == before { VcpuSet::EMPTY } else { self.settle(vcpu, intid) }
    }

    /// Puts an interrupt where it belongs by its state. Returns who must look at it.
    pub(crate) fn settle(&mut self, vcpu: usize, intid: u16) -> VcpuSet {
        let Some(&interrupt) = self.interrupt(vcpu, intid) else { return VcpuSet::EMPTY };
        let home = interrupt.home();
        if let (true, Some(home)) = (interrupt.is(Flags::LISTED), home) {
            if !interrupt.is(Flags::ENABLED) {
                self.distributor.stale.insert(home);
            }
            return VcpuSet::of(home);
        }
        let wanted = if interrupt.is(Flags::ACTIVE) {
            home.or_else(|| self.target(vcpu, intid))
        } else if interrupt.is(Flags::ENABLED) && interrupt.is_pending() {
            self.target(vcpu, intid)
        } else {
            None
        };
        if wanted != home {
            if let Some(gic) = home.and_then(|home| self.vcpus.get_mut(home)) {
                gic.queue.remove(intid);
            }
            if let Some(gic) = wanted.and_then(|wanted| self.vcpus.get_mut(wanted)) {
                gic.queue.insert(intid);
            }
            if let Some(interrupt) = self.interrupt_mut(vcpu, intid) {
                interrupt.set_home(wanted);
            }
        }
        match wanted {
            Some(wanted) if self.forwards(&interrupt) && !interrupt.is(Flags::ACTIVE) => VcpuSet::of(wanted),
            _ => VcpuSet::EMPTY,
        }
    }

    /// Returns the vCPU that a pending interrupt goes to; `vcpu` is whose private interrupts are meant.
    fn target(&self, vcpu: usize, intid: u16) -> Option<usize> {
        let target = match intid.checked_sub(FIRST_SPI) {
            None => vcpu,
            Some(spi) => match self.spis.get(usize::from(spi))?.target() {
                Some(vcpu) => vcpu?,
                None => self.distributor.elected()?,
            },
        };
        self.vcpus.get(target).map(|_| target)
    }

    /// Chooses the vCPU that interrupts routed to any vCPU go to: the first one whose redistributor is awake and
    /// whose CPU interface has a group enabled; failing that, the first one that is awake. Returns who must look.
    pub(crate) fn elect(&mut self) -> VcpuSet {
        let awake = || (0..self.vcpus.count()).filter(|&vcpu| self.vcpus.get(vcpu).is_some_and(|gic| !gic.is_asleep()));
        let ready = awake().find(|&vcpu| self.vcpus.get(vcpu).is_some_and(|gic| gic.groups() != 0));
        let elected = ready.or_else(|| awake().next());
        if elected == self.distributor.elected() {
            return VcpuSet::EMPTY;
        }
        self.distributor.set_elected(elected);
        self.reroute(Spi::is_any)
    }

    /// Puts those SPIs which `affected` selects where they now belong.
    pub(crate) fn reroute(&mut self, affected: impl Fn(&Spi) -> bool) -> VcpuSet {
        let mut kick = VcpuSet::EMPTY;
        for intid in FIRST_SPI..INTIDS {
            let Some(spi) = self.spi_mut(intid) else { break };
            if affected(spi) && !spi.interrupt.is(Flags::LISTED) {
                kick.extend(self.settle(0, intid));
            }
        }
        kick
    }
}
