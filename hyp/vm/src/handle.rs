//! Names of VMs.

/// How many VMs there can be at once. A VM's VMID is its slot plus one; the host's is 0, and VMIDs have eight bits. In a model two
/// show as much.
pub const SLOTS: usize = if cfg!(loom) { 2 } else { 255 };

/// Bits of a handle that hold the slot.
const SLOT_BITS: u32 = 8;

/// A number that has named at most one VM since boot.
///
/// Bits 7:0 are the slot, those above count the VMs that have been in it. To the host it is opaque, and not a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle(u64);

impl Handle {
    /// Returns the handle that a host sent, whatever it sent.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// Returns the handle of the VM number `generation` in `slot`. `None` if either is too large; generations are used up
    /// after 2^56 VMs.
    pub(crate) fn new(slot: usize, generation: u64) -> Option<Self> {
        let slot = u64::try_from(slot).ok().filter(|&slot| slot < 1 << SLOT_BITS)?;
        let upper = generation.checked_shl(SLOT_BITS).filter(|upper| upper >> SLOT_BITS == generation)?;
        Some(Self(upper | slot))
    }

    /// Returns the number that the host knows.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Returns where the VM is, if there is one.
    #[must_use]
    pub fn slot(self) -> usize {
        let [slot, ..] = self.0.to_le_bytes();
        slot.into()
    }

    /// Returns how many VMs have been in the slot, this one included.
    pub(crate) const fn generation(self) -> u64 {
        self.0 >> SLOT_BITS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back() {
        for (slot, generation) in [(0, 0), (254, 1), (7, (1 << 56) - 1)] {
            let handle = Handle::new(slot, generation).unwrap();
            assert_eq!((handle.slot(), handle.generation()), (slot, generation));
            assert_eq!(Handle::from_raw(handle.raw()), handle);
        }
        assert_eq!(Handle::new(0, 1 << 56), None);
        assert_eq!(Handle::new(256, 1), None);
    }
}
