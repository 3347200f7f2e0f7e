//! State of one interrupt, and what its list register says.

use bitflags::bitflags;

use crate::{FIRST_PPI, ich};

bitflags! {
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    #[repr(transparent)]
    pub(crate) struct Flags: u16 {
        const ENABLED = 1 << 0;
        /// Group 1, else Group 0.
        const GROUP1 = 1 << 1;
        /// Edge-triggered, else level-sensitive.
        const EDGE = 1 << 2;
        /// The wire is high. Makes a level-sensitive interrupt pending.
        const LINE = 1 << 3;
        /// As if the wire were high, by GICD_SETSPI_NSR.
        const MESSAGE = 1 << 4;
        /// Pending until it is acknowledged: an edge, an SGI or a write to ISPENDR.
        const LATCH = 1 << 5;
        const ACTIVE = 1 << 6;
        /// The vCPU that is its home has acknowledged it; otherwise it is active by a write to ISACTIVER.
        const TAKEN = 1 << 7;
        /// In a list register of its home, which runs. `LATCH` and `ACTIVE` tell only what came since the entry.
        const LISTED = 1 << 8;
        /// The list register was given the latch at entry.
        const LR_PENDING = 1 << 9;
        /// The list register was active at entry.
        const LR_ACTIVE = 1 << 10;
        /// The pending state found in the list register at exit does not count.
        const DROP_PENDING = 1 << 11;
        /// The active state found in the list register at exit does not count.
        const DROP_ACTIVE = 1 << 12;
        /// A register read waits for what the list register says.
        const ASKED = 1 << 13;
        /// What was asked for is known, as of the last entry.
        const ANSWERED = 1 << 14;
        /// The host may raise it.
        const HOST = 1 << 15;
    }
}

/// What only a listed interrupt has.
const IN_FLIGHT: Flags = Flags::LISTED
    .union(Flags::LR_PENDING)
    .union(Flags::LR_ACTIVE)
    .union(Flags::DROP_PENDING)
    .union(Flags::DROP_ACTIVE)
    .union(Flags::ASKED)
    .union(Flags::ANSWERED);

/// Implemented bits of a priority: 32 levels, which every virtual CPU interface has (Arm IHI 0069, 4.8).
const PRIORITY: u8 = 0xf8;

/// State of an SGI, PPI or SPI.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub(crate) struct Interrupt {
    flags: Flags,
    priority: u8,
    /// Index of the vCPU in whose queue the interrupt is, plus one; 0 if in none.
    home: u8,
}

impl Interrupt {
    /// State after reset of the interrupt `intid`: disabled, Group 1 (as firmware leaves it to its OS), highest
    /// priority, SGIs edge-triggered.
    pub(crate) const fn reset(intid: u16) -> Self {
        let flags = if intid < FIRST_PPI { Flags::GROUP1.union(Flags::EDGE) } else { Flags::GROUP1 };
        Self { flags, priority: 0, home: 0 }
    }

    pub(crate) const fn is(&self, flags: Flags) -> bool {
        self.flags.contains(flags)
    }

    pub(crate) fn set(&mut self, flags: Flags, value: bool) {
        self.flags.set(flags, value);
    }

    pub(crate) const fn priority(&self) -> u8 {
        self.priority
    }

    pub(crate) const fn set_priority(&mut self, priority: u8) {
        self.priority = priority & PRIORITY;
    }

    pub(crate) fn home(&self) -> Option<usize> {
        self.home.checked_sub(1).map(usize::from)
    }

    pub(crate) fn set_home(&mut self, vcpu: Option<usize>) {
        self.home = vcpu.and_then(|vcpu| u8::try_from(vcpu).ok()?.checked_add(1)).unwrap_or(0);
    }

    /// Returns 1 for Group 1, 0 for Group 0.
    pub(crate) const fn group(&self) -> u32 {
        if self.is(Flags::GROUP1) { 1 } else { 0 }
    }

    /// Returns whether the interrupt is pending, leaving aside what a list register holds.
    pub(crate) const fn is_pending(&self) -> bool {
        self.is(Flags::LATCH) || !self.is(Flags::EDGE) && self.flags.intersects(Flags::LINE.union(Flags::MESSAGE))
    }

    /// Returns the pending state that a register shows.
    pub(crate) const fn shows_pending(&self) -> bool {
        self.is_pending() || self.is(Flags::LR_PENDING) && !self.is(Flags::DROP_PENDING)
    }

    /// Returns the active state that a register shows.
    pub(crate) const fn shows_active(&self) -> bool {
        self.is(Flags::ACTIVE) || self.is(Flags::LR_ACTIVE) && !self.is(Flags::DROP_ACTIVE)
    }

    /// Moves the wire. Each call with `true` is an edge, as it is for KVM's irqfd.
    pub(crate) fn set_line(&mut self, level: bool) {
        self.set_source(Flags::LINE, level);
    }

    /// Acts as a message-based SPI does.
    pub(crate) fn set_message(&mut self, level: bool) {
        self.set_source(Flags::MESSAGE, level);
        if !level && self.is(Flags::EDGE) {
            self.clear_pending();
        }
    }

    fn set_source(&mut self, source: Flags, level: bool) {
        self.set(source, level);
        if level && self.is(Flags::EDGE) {
            self.set(Flags::LATCH, true);
        }
    }

    pub(crate) fn set_pending(&mut self) {
        self.set(Flags::LATCH, true);
    }

    pub(crate) fn clear_pending(&mut self) {
        self.set(Flags::LATCH, false);
        if self.is(Flags::LISTED) {
            self.set(Flags::DROP_PENDING, true);
        }
    }

    pub(crate) fn set_active(&mut self) {
        if !self.shows_active() {
            self.set(Flags::ACTIVE, true);
        }
    }

    pub(crate) fn deactivate(&mut self) {
        self.set(Flags::ACTIVE | Flags::TAKEN, false);
        if self.is(Flags::LISTED) {
            self.set(Flags::DROP_ACTIVE, true);
        }
    }

    /// Moves the state into a list register, whose value is returned. `forwarded` is false if the interrupt may not
    /// be signalled now.
    ///
    /// A level-sensitive interrupt is never pending and active at once there: its end asks for maintenance, and its
    /// wire is looked at again. So does the end of one that was made active by a register, because what is
    /// acknowledged after that would pass for the same activation.
    pub(crate) fn list(&mut self, intid: u16, forwarded: bool) -> u64 {
        let active = self.is(Flags::ACTIVE);
        let maintained = !self.is(Flags::EDGE) || active && !self.is(Flags::TAKEN);
        let pending = forwarded && self.is_pending() && !(active && maintained);
        self.set(Flags::LISTED, true);
        self.set(Flags::LR_ACTIVE, active);
        self.set(Flags::ACTIVE, false);
        if pending && self.is(Flags::LATCH) {
            self.set(Flags::LR_PENDING, true);
            self.set(Flags::LATCH, false);
        }
        let mut value = u64::from(intid) | u64::from(self.priority) << ich::PRIORITY_SHIFT;
        for (set, bit) in [
            (pending, ich::PENDING),
            (active, ich::ACTIVE),
            (maintained, ich::EOI),
            (self.is(Flags::GROUP1), ich::GROUP1),
        ] {
            if set {
                value |= bit;
            }
        }
        value
    }

    /// Takes the state back from the list register, which now holds `value`.
    pub(crate) fn unlist(&mut self, value: u64) {
        if value & ich::PENDING != 0 && self.is(Flags::LR_PENDING) && !self.is(Flags::DROP_PENDING) {
            self.set(Flags::LATCH, true);
        }
        let active = value & ich::ACTIVE != 0 && !self.is(Flags::DROP_ACTIVE);
        if active {
            self.set(Flags::ACTIVE, true);
        }
        let taken = active && (self.is(Flags::TAKEN) || !self.is(Flags::LR_ACTIVE));
        self.set(Flags::TAKEN, taken);
        let asked = self.is(Flags::ASKED);
        self.set(IN_FLIGHT, false);
        self.set(Flags::ANSWERED, asked);
    }

    /// Forgets the list register and the home.
    pub(crate) fn forget_home(&mut self) {
        self.set(IN_FLIGHT, false);
        self.home = 0;
    }

    /// A state that need not make sense.
    #[cfg(test)]
    pub(crate) const fn arbitrary(flags: u16, priority: u8, home: u8) -> Self {
        Self { flags: Flags::from_bits_retain(flags), priority, home }
    }
}
