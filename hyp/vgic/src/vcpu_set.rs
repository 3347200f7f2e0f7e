//! Sets of vCPUs, and what affinity each vCPU has.

use crate::MAX_VCPUS;

/// vCPUs of one VM, by index.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
#[must_use]
pub struct VcpuSet(u128);

impl VcpuSet {
    /// No vCPU.
    pub const EMPTY: Self = Self(0);

    /// Returns the set of one vCPU; it is empty if no VM can have a vCPU of that index.
    pub fn of(vcpu: usize) -> Self {
        let mut set = Self::EMPTY;
        set.insert(vcpu);
        set
    }

    /// Adds a vCPU. An index from [`MAX_VCPUS`] on changes nothing.
    pub fn insert(&mut self, vcpu: usize) {
        self.0 |= bit(vcpu);
    }

    /// Adds all of `other`.
    pub fn extend(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Takes a vCPU out, if it is in the set.
    pub fn remove(&mut self, vcpu: usize) {
        self.0 &= !bit(vcpu);
    }

    /// Returns the set less one vCPU.
    pub fn without(mut self, vcpu: usize) -> Self {
        self.remove(vcpu);
        self
    }

    /// Returns whether the vCPU is in the set.
    #[must_use]
    pub fn contains(self, vcpu: usize) -> bool {
        self.0 & bit(vcpu) != 0
    }

    /// Returns whether no vCPU is in the set.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Returns the set as two words: bit n of the first is vCPU n, of the second vCPU 64 + n.
    #[must_use]
    pub fn words(self) -> [u64; 2] {
        let word = |shift: u32| u64::try_from(self.0 >> shift & u128::from(u64::MAX)).unwrap_or(0);
        [word(0), word(64)]
    }

    /// Yields the indices in ascending order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..MAX_VCPUS).filter(move |&vcpu| self.contains(vcpu))
    }
}

fn bit(vcpu: usize) -> u128 {
    u32::try_from(vcpu).ok().and_then(|shift| 1_u128.checked_shl(shift)).unwrap_or(0)
}

/// vCPUs that have the same affinity level 1, so that one target list of ICC_SGI1R_EL1 names them all.
const CLUSTER: u32 = 16;

/// Returns the affinity of a vCPU in the layout of MPIDR_EL1 bits 23:0: level 0 counts from 0 to 15, level 1 above it.
#[must_use]
pub fn affinity(vcpu: usize) -> u32 {
    let vcpu = u32::try_from(vcpu % MAX_VCPUS).unwrap_or(0);
    (vcpu / CLUSTER) << 8 | (vcpu % CLUSTER)
}

/// Returns which vCPU has an affinity, in the layout of [`affinity`], if any VM can have such a vCPU.
#[must_use]
pub fn vcpu_of_affinity(raw: u32) -> Option<usize> {
    let vcpu = usize::try_from((raw >> 8).checked_mul(CLUSTER)?.checked_add(raw & 0xff)?).ok()?;
    (vcpu < MAX_VCPUS && affinity(vcpu) == raw).then_some(vcpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinities_lead_back_to_their_vcpus() {
        for vcpu in 0..MAX_VCPUS {
            assert_eq!(vcpu_of_affinity(affinity(vcpu)), Some(vcpu));
        }
        assert_eq!((affinity(15), affinity(16), affinity(127)), (0xf, 0x100, 0x70f));
        for raw in [0x10, 0x800, 0x1_0000, u32::MAX] {
            assert_eq!(vcpu_of_affinity(raw), None, "{raw:#x}");
        }
    }

    #[test]
    fn sets_hold_every_vcpu_and_no_other() {
        let mut set = VcpuSet::of(0);
        set.insert(127);
        set.insert(128);
        set.insert(usize::MAX);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 127]);
        set.remove(0);
        set.extend(VcpuSet::of(3));
        assert_eq!(set.iter().collect::<Vec<_>>(), [3, 127]);
    }
}
