//! The virtual CPU interface as hardware does it (Arm IHI 0069, 6.1 and 12.4), with 5 bits of preemption priority.

use crate::{
    ListRegisters,
    ich::{
        ACTIVE, EOI, GROUP1, HCR_EOICOUNT, HCR_EOICOUNT_SHIFT, HCR_LRENPIE, HCR_NPIE, HCR_TDIR, HCR_VGRP0DIE,
        HCR_VGRP0EIE, PENDING, PRIORITY_SHIFT, VMCR_VEOIM, VMCR_VPMR_SHIFT,
    },
};

#[derive(Clone, Debug)]
pub(crate) struct Cpu(pub(crate) ListRegisters);

/// ICH_LR<n>_EL2.vINTID.
const VINTID: u64 = 0xffff_ffff;

fn priority(lr: u64) -> u64 {
    lr >> PRIORITY_SHIFT & 0xff
}

fn group(lr: u64) -> usize {
    usize::from(lr & GROUP1 != 0)
}

impl Cpu {
    fn used(&mut self) -> &mut [u64] {
        let used = self.0.used;
        &mut self.0.lrs[..used]
    }

    fn is_active_at(&self, level: u32) -> bool {
        (self.0.ap0r[0] | self.0.ap1r[0]) >> level & 1 != 0
    }

    /// ICV_RPR_EL1, 0x100 when idle.
    pub(crate) fn running_priority(&self) -> u64 {
        (0..32).find(|&level| self.is_active_at(level)).map_or(0x100, |level| u64::from(level) * 8)
    }

    fn group_enabled(&self, group: usize) -> bool {
        self.0.vmcr >> group & 1 != 0
    }

    /// ICV_IARn_EL1 of the group that is signalled; `None` for the spurious INTID.
    pub(crate) fn acknowledge(&mut self) -> Option<u16> {
        let mask = self.0.vmcr >> VMCR_VPMR_SHIFT & 0xff;
        let limit = self.running_priority().min(mask);
        let best = (0..self.0.used)
            .filter(|&n| self.0.lrs[n] & (PENDING | ACTIVE) == PENDING && self.group_enabled(group(self.0.lrs[n])))
            .min_by_key(|&n| priority(self.0.lrs[n]))
            .filter(|&n| priority(self.0.lrs[n]) < limit)?;
        let lr = &mut self.0.lrs[best];
        *lr = *lr & !PENDING | ACTIVE;
        let level = u32::try_from(priority(*lr) / 8).unwrap();
        let bits = if group(*lr) == 0 { &mut self.0.ap0r[0] } else { &mut self.0.ap1r[0] };
        assert_eq!(*bits >> level & 1, 0);
        *bits |= 1 << level;
        Some(u16::try_from(*lr & VINTID).unwrap())
    }

    /// ICV_EOIRn_EL1.
    pub(crate) fn end(&mut self, intid: u16) {
        if let Some(level) = (0..32).find(|&level| self.is_active_at(level)) {
            self.0.ap0r[0] &= !(1 << level);
            self.0.ap1r[0] &= !(1 << level);
        }
        if self.0.vmcr & VMCR_VEOIM == 0 {
            self.clear_active(intid);
        } else if !self.used().iter().any(|lr| lr & VINTID == u64::from(intid) && lr & ACTIVE != 0) {
            // That it is no deactivation does not keep CPUs from counting it.
            self.count();
        }
    }

    /// ICV_DIR_EL1; false if it traps.
    pub(crate) fn deactivate(&mut self, intid: u16) -> bool {
        if self.0.hcr & HCR_TDIR != 0 {
            return false;
        }
        if self.0.vmcr & VMCR_VEOIM != 0 {
            self.clear_active(intid);
        }
        true
    }

    fn clear_active(&mut self, intid: u16) {
        let found = self.used().iter_mut().find(|lr| **lr & VINTID == u64::from(intid) && **lr & ACTIVE != 0);
        match found {
            Some(lr) => *lr &= !ACTIVE,
            None => self.count(),
        }
    }

    fn count(&mut self) {
        let count = self.0.hcr >> HCR_EOICOUNT_SHIFT & HCR_EOICOUNT;
        self.0.hcr &= !(HCR_EOICOUNT << HCR_EOICOUNT_SHIFT);
        self.0.hcr |= (count + 1).min(HCR_EOICOUNT) << HCR_EOICOUNT_SHIFT;
    }

    /// Whether ICH_MISR_EL2 would not be zero.
    pub(crate) fn maintenance(&self) -> bool {
        let (lrs, hcr) = (&self.0.lrs[..self.0.used], self.0.hcr);
        let ended = lrs.iter().any(|lr| lr & (PENDING | ACTIVE) == 0 && lr & EOI != 0);
        let counted = hcr & HCR_LRENPIE != 0 && hcr >> HCR_EOICOUNT_SHIFT & HCR_EOICOUNT != 0;
        let none_pending = hcr & HCR_NPIE != 0 && !lrs.iter().any(|lr| lr & (PENDING | ACTIVE) == PENDING);
        let groups = (0..2).any(|group| {
            let enable = if self.group_enabled(group) { HCR_VGRP0EIE } else { HCR_VGRP0DIE };
            hcr & enable << (2 * group) != 0
        });
        ended || counted || none_pending || groups
    }

    pub(crate) fn set_mask(&mut self, mask: u8) {
        self.0.vmcr = self.0.vmcr & !(0xff << VMCR_VPMR_SHIFT) | u64::from(mask) << VMCR_VPMR_SHIFT;
    }

    pub(crate) fn set_groups(&mut self, groups: u64) {
        self.0.vmcr = self.0.vmcr & !0b11 | groups & 0b11;
    }

    pub(crate) fn set_eoi_mode(&mut self, split: bool) {
        self.0.vmcr = if split { self.0.vmcr | VMCR_VEOIM } else { self.0.vmcr & !VMCR_VEOIM };
    }
}
