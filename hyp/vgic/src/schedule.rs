//! Between the model and the list registers.
//!
//! Everything that a vCPU has pending or active goes into its list registers at each entry, and comes back at each
//! exit. What does not fit is chosen so that the guest notices nothing but time:
//!
//! * Pending interrupts go first, by priority. Those that are left out are not above those that are in; when all of
//!   these are taken, a maintenance interrupt (NPIE) brings the next.
//! * Active interrupts may be left out, because the active priorities are kept apart from the list registers. The end
//!   of such an interrupt is counted (EOIcount) and asks for maintenance. In EOImode 0 interrupts end in the order of
//!   their priorities, so that it is clear which one it was; in EOImode 1 deactivation traps instead.
//! * Pending interrupts of a group that the guest has disabled stay out, and a maintenance interrupt tells when it
//!   enables the group: otherwise they could keep others out that can be taken.

use crate::{
    gic::{Gic, Vcpus},
    ich::{
        HCR_EN, HCR_EOICOUNT, HCR_EOICOUNT_SHIFT, HCR_LRENPIE, HCR_NPIE, HCR_TDIR, HCR_VGRP0DIE, HCR_VGRP0EIE,
        MAX_LIST_REGISTERS, VMCR_VEOIM,
    },
    interrupt::{Flags, Interrupt},
    vcpu::VcpuGic,
    vcpu_set::VcpuSet,
};

/// What the virtual CPU interface of a running vCPU holds.
///
/// The caller writes it to the CPU at entry and reads it back at exit. Of the list registers only the first `used`
/// count; the others must be zero while the guest runs, and need not be read back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct ListRegisters {
    /// `ICH_LR<n>_EL2`.
    pub lrs: [u64; MAX_LIST_REGISTERS],
    /// How many of `lrs` are in use, at most as many as the CPU has.
    pub used: usize,
    /// ICH_HCR_EL2. At exit only EOIcount matters.
    pub hcr: u64,
    /// ICH_VMCR_EL2.
    pub vmcr: u64,
    /// `ICH_AP0R<n>_EL2`. Those which the CPU does not have are zero and may be left alone.
    pub ap0r: [u32; 4],
    /// `ICH_AP1R<n>_EL2`, likewise.
    pub ap1r: [u32; 4],
}

impl ListRegisters {
    /// Returns whether nothing of this has to be taken back at an exit, after an entry with this value of ICH_VMCR_EL2: no
    /// interrupt, and nothing that decides where interrupts go. Then the vCPU may be left without [`Gic::after_exit`], and be entered
    /// with [`Gic::enter_again`].
    #[must_use]
    #[inline]
    pub const fn may_stay(&self, vmcr: u64) -> bool {
        self.used == 0 && self.vmcr == vmcr && self.hcr >> HCR_EOICOUNT_SHIFT & HCR_EOICOUNT == 0
    }
}

/// The best few of any number of interrupts.
struct Shortlist {
    /// Sorted: 0 before 1 for pending before active, then priority, then INTID.
    keys: [u32; MAX_LIST_REGISTERS],
    len: usize,
    limit: usize,
    /// A pending interrupt did not fit.
    pending_left: bool,
    /// An active interrupt did not fit.
    active_left: bool,
}

const KEY_ACTIVE: u32 = 1 << 24;

impl Shortlist {
    fn new(limit: usize) -> Self {
        let limit = limit.clamp(1, MAX_LIST_REGISTERS);
        Self { keys: [0; MAX_LIST_REGISTERS], len: 0, limit, pending_left: false, active_left: false }
    }

    fn offer(&mut self, active: bool, priority: u8, intid: u16) {
        let key = if active { KEY_ACTIVE } else { 0 } | u32::from(priority) << 16 | u32::from(intid);
        let dropped = if self.len < self.limit {
            self.len = self.len.saturating_add(1);
            None
        } else {
            let worst = self.keys.get(self.len.saturating_sub(1)).copied().unwrap_or(key);
            Some(worst.max(key))
        };
        if dropped != Some(key) {
            let mut carried = key;
            for place in self.keys.iter_mut().take(self.len.saturating_sub(1)) {
                if carried < *place {
                    core::mem::swap(&mut carried, place);
                }
            }
            if let Some(place) = self.keys.get_mut(self.len.saturating_sub(1)) {
                *place = carried;
            }
        }
        match dropped {
            Some(key) if key & KEY_ACTIVE != 0 => self.active_left = true,
            Some(_) => self.pending_left = true,
            None => {}
        }
    }

    fn intids(&self) -> impl Iterator<Item = u16> {
        self.keys.iter().take(self.len).map(|&key| u16::try_from(key & 0xffff).unwrap_or(0))
    }
}

impl VcpuGic {
    pub(crate) fn separates_deactivation(&self) -> bool {
        u64::from(self.vmcr) & VMCR_VEOIM != 0
    }
}

impl<V: Vcpus + ?Sized> Gic<'_, V> {
    /// Fills in what a vCPU's virtual CPU interface holds when it enters, on a CPU that has `list_registers` of them
    /// (ICH_VTR_EL2.ListRegs + 1), 1 to 16. From now on the vCPU runs. What `entry` holds does not matter; list registers that
    /// are not in use keep it.
    ///
    /// `None` if there is no such vCPU, or if it runs already; then `entry` turns the interface off.
    pub fn prepare_entry(&mut self, vcpu: usize, list_registers: usize, entry: &mut ListRegisters) -> Option<()> {
        (entry.used, entry.hcr) = (0, 0);
        let gic = self.vcpus.get_mut(vcpu)?;
        if gic.is_running() {
            return None;
        }
        gic.running = 1;
        entry.hcr = HCR_EN;
        entry.vmcr = gic.vmcr.into();
        entry.ap0r = gic.ap0r;
        entry.ap1r = gic.ap1r;
        let (groups, asleep, separate) = (gic.groups(), gic.is_asleep(), gic.separates_deactivation());
        if separate {
            entry.hcr |= HCR_TDIR;
        }
        // Most entries have nothing to list.
        if gic.queue.next(0).is_some() {
            self.list_queued(vcpu, list_registers, groups, asleep, entry);
        }
        Some(())
    }

    /// As [`Gic::prepare_entry`], also for a vCPU that has been left with [`ListRegisters::may_stay`] and so runs still: `entry` is
    /// what it was left with, and most of that stays.
    ///
    /// Returns whether there is nothing to list. If so, and the vCPU is left with [`ListRegisters::may_stay`], it may be entered with
    /// what it was left with and without this, as long as nothing else is done to the interrupt controller.
    #[inline]
    pub fn enter_again(&mut self, vcpu: usize, list_registers: usize, entry: &mut ListRegisters) -> bool {
        if self.has_none_queued(vcpu) && self.vcpus.get(vcpu).is_some_and(VcpuGic::is_running) {
            entry.hcr &= HCR_EN | HCR_TDIR;
            return true;
        }
        // There is nothing that would move to another vCPU.
        let _ = self.after_exit(vcpu, entry);
        self.prepare_entry(vcpu, list_registers, entry).is_some() && self.has_none_queued(vcpu)
    }

    #[inline]
    fn has_none_queued(&self, vcpu: usize) -> bool {
        self.vcpus.get(vcpu).is_some_and(|gic| gic.queue.is_empty())
    }

    /// Fills the list registers of [`Gic::prepare_entry`] with what is queued.
    #[inline(never)]
    fn list_queued(
        &mut self,
        vcpu: usize,
        list_registers: usize,
        groups: u64,
        asleep: bool,
        entry: &mut ListRegisters,
    ) {
        let mut shortlist = Shortlist::new(list_registers);
        let mut from = 0;
        while let Some(intid) = self.vcpus.get(vcpu).and_then(|gic| gic.queue.next(from)) {
            from = intid.saturating_add(1);
            let Some(interrupt) = self.interrupt(vcpu, intid) else { continue };
            if interrupt.is(Flags::ACTIVE) {
                shortlist.offer(true, interrupt.priority(), intid);
            } else if !asleep && interrupt.is_pending() && self.forwards(interrupt) {
                if groups >> interrupt.group() & 1 != 0 {
                    shortlist.offer(false, interrupt.priority(), intid);
                } else {
                    entry.hcr |= HCR_VGRP0EIE << (interrupt.group() << 1);
                }
            }
        }
        for (lr, intid) in entry.lrs.iter_mut().zip(shortlist.intids()) {
            *lr = self.list(vcpu, intid, !asleep);
        }
        if let Some(gic) = self.vcpus.get_mut(vcpu) {
            for (listed, intid) in gic.listed.iter_mut().zip(shortlist.intids()) {
                *listed = intid;
            }
            gic.used = u8::try_from(shortlist.len).unwrap_or(0);
        }
        entry.used = shortlist.len;
        if shortlist.active_left {
            entry.hcr |= HCR_LRENPIE;
        }
        if shortlist.pending_left {
            entry.hcr |= HCR_NPIE;
            for group in (0..2).filter(|group| groups >> group & 1 != 0) {
                entry.hcr |= HCR_VGRP0DIE << (group << 1);
            }
        }
    }

    fn list(&mut self, vcpu: usize, intid: u16, awake: bool) -> u64 {
        let forwarded = awake && self.interrupt(vcpu, intid).is_some_and(|interrupt| self.forwards(interrupt));
        self.interrupt_mut(vcpu, intid).map_or(0, |interrupt| interrupt.list(intid, forwarded))
    }

    /// Takes back what a vCPU's virtual CPU interface holds after it has left the guest; `state` is what
    /// [`Gic::prepare_entry`] filled in, with what the CPU has changed. From now on the vCPU does not run.
    ///
    /// Returns the other vCPUs that must look at their interrupts: those to which interrupts have moved. Does nothing
    /// if the vCPU does not run.
    pub fn after_exit(&mut self, vcpu: usize, state: &ListRegisters) -> VcpuSet {
        let Some(gic) = self.vcpus.get_mut(vcpu).filter(|gic| gic.is_running()) else { return VcpuSet::EMPTY };
        gic.running = 0;
        gic.ap0r = state.ap0r;
        gic.ap1r = state.ap1r;
        let before = gic.groups();
        gic.vmcr = u32::try_from(state.vmcr & u64::from(u32::MAX)).unwrap_or(0);
        let groups_changed = gic.groups() != before;
        let ended = state.hcr >> HCR_EOICOUNT_SHIFT & HCR_EOICOUNT;
        // Most exits have nothing to take back.
        if gic.used == 0 && ended == 0 && !groups_changed && self.distributor.stale.is_empty() {
            return VcpuSet::EMPTY;
        }
        self.take_back(vcpu, state, ended, groups_changed)
    }

    /// Does the rest of [`Gic::after_exit`], after which `ended` interrupts of no list register have been counted as ended.
    #[inline(never)]
    fn take_back(&mut self, vcpu: usize, state: &ListRegisters, ended: u64, groups_changed: bool) -> VcpuSet {
        let mut kick = VcpuSet::EMPTY;
        let Some(gic) = self.vcpus.get_mut(vcpu) else { return kick };
        let (listed, used) = (gic.listed, usize::from(gic.used));
        gic.used = 0;
        // In EOImode 1 the ends that CPUs may count are no deactivations: those trap.
        let ended = if gic.separates_deactivation() { 0 } else { ended };
        self.distributor.stale.remove(vcpu);

        for (&intid, &lr) in listed.iter().zip(&state.lrs).take(used) {
            if let Some(interrupt) = self.interrupt_mut(vcpu, intid) {
                interrupt.unlist(lr);
            }
        }
        // Only when all are back is it clear which active ones had been left out.
        for _ in 0..ended {
            kick.extend(self.end_unlisted(vcpu, listed.get(..used).unwrap_or_default()));
        }
        for &intid in listed.iter().take(used) {
            kick.extend(self.settle(vcpu, intid));
        }
        if groups_changed {
            kick.extend(self.elect());
        }
        kick.without(vcpu)
    }

    /// Deactivates the interrupt of highest priority among those that the guest had taken and that were in no list
    /// register.
    fn end_unlisted(&mut self, vcpu: usize, listed: &[u16]) -> VcpuSet {
        let mut best: Option<(u8, u16)> = None;
        let mut from = 0;
        while let Some(intid) = self.vcpus.get(vcpu).and_then(|gic| gic.queue.next(from)) {
            from = intid.saturating_add(1);
            if let Some(interrupt) = self.interrupt(vcpu, intid)
                && interrupt.is(Flags::ACTIVE | Flags::TAKEN)
                && !listed.contains(&intid)
                && best.is_none_or(|best| (interrupt.priority(), intid) < best)
            {
                best = Some((interrupt.priority(), intid));
            }
        }
        best.map_or(VcpuSet::EMPTY, |(_, intid)| self.update(vcpu, intid, Interrupt::deactivate))
    }
}
