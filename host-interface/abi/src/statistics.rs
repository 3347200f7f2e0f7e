//! Layout of the page that the STATISTICS call writes.

use crate::calls::CALL_COUNTERS;

/// Defines the fields once for the structure, its serialisation, the C header and the reference.
macro_rules! statistics {
    (
        $($(#[doc = $doc:literal])+ $field:ident,)+
        calls,
        $($(#[doc = $later_doc:literal])+ $later:ident,)+
    ) => {
        /// What the STATISTICS call writes: 64-bit numbers, little-endian.
        ///
        /// Fields are only ever added at the end; `size` says how many bytes there are. Counts since boot wrap around.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[repr(C)]
        pub struct Statistics {
            $($(#[doc = $doc])+ pub $field: u64,)+
            /// Uses of each call, whether it succeeded or not: entry n counts 0xc6001000 + n.
            pub calls: [u64; CALL_COUNTERS],
            $($(#[doc = $later_doc])+ pub $later: u64,)+
        }

        /// Names and descriptions of the fields before `calls`.
        pub(crate) const FIELDS: &[(&str, &str)] =
            &[$((stringify!($field), concat!($($doc),+).trim_ascii_start())),+];

        /// Names and descriptions of the fields behind `calls`.
        pub(crate) const LATER_FIELDS: &[(&str, &str)] =
            &[$((stringify!($later), concat!($($later_doc),+).trim_ascii_start())),+];

        impl Statistics {
            fn words(&self) -> impl Iterator<Item = u64> {
                [$(self.$field),+].into_iter().chain(self.calls).chain([$(self.$later),+])
            }

            fn words_mut(&mut self) -> impl Iterator<Item = &mut u64> {
                [$(&mut self.$field),+].into_iter().chain(&mut self.calls).chain([$(&mut self.$later),+])
            }
        }
    };
}

statistics! {
    /// Version of this layout: 2.
    version,
    /// Bytes written, this field included.
    size,
    /// Pages that the host owns alone.
    host_owned_pages,
    /// Pages that the host owns and has lent to the hypervisor.
    host_shared_pages,
    /// Pages that the hypervisor has kept since boot.
    hypervisor_pages,
    /// Pages that the host has donated to the hypervisor.
    donated_pages,
    /// Translation tables in use for the host's stage 2, less its root.
    host_tables,
    /// Translation tables in use for the hypervisor's own mappings, less those set up at boot.
    el2_tables,
    /// Pages left for translation tables.
    free_tables,
    /// Invalidations of stage 2 translations, by range or of all.
    stage2_invalidations,
    /// Invalidations of the hypervisor's own translations.
    el2_invalidations,
    /// Stage 2 faults of the host after which it had access.
    faults_resolved,
    /// Stage 2 faults of the host that were answered with an abort.
    faults_denied,
    /// How often the host's stage 2 was dropped to regain table pages.
    evictions,
    /// SMCs of the host that were relayed to the firmware.
    smcs_forwarded,
    /// SMCs of the host that were answered with NOT_SUPPORTED.
    smcs_refused,

    calls,

    /// Pages that the host has donated for VMs, their vCPUs and their tables.
    vm_pages,
    /// Pages that the host owns and has lent to ordinary VMs.
    host_lent_pages,
    /// Pages that guests own alone.
    guest_private_pages,
    /// Pages that guests have offered and the host has not claimed.
    guest_offered_pages,
    /// Pages of guests that the host has claimed.
    guest_claimed_pages,
}

impl Statistics {
    /// Size in bytes; at most a page.
    pub const SIZE: usize = size_of::<Self>();

    /// Version of the layout.
    pub const VERSION: u64 = 2;

    /// Returns the bytes that go into the page.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.words()) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Returns what `bytes`, the start of the page, say. Fields that they are too short for are zero.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        for (word, chunk) in statistics.words_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*chunk);
        }
        statistics
    }
}

const _: () = assert!(Statistics::SIZE == 8 * (FIELDS.len() + CALL_COUNTERS + LATER_FIELDS.len()));
const _: () = assert!(Statistics::SIZE <= 4096);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_follow_the_layout() {
        let mut statistics =
            Statistics { version: 1, size: 2, smcs_refused: 0x0102, guest_claimed_pages: 9, ..Statistics::default() };
        statistics.calls[CALL_COUNTERS - 1] = 7;
        let bytes = statistics.to_bytes();
        assert_eq!(bytes[..16], [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let offset = core::mem::offset_of!(Statistics, smcs_refused);
        assert_eq!(bytes[offset..offset + 2], [2, 1]);
        assert_eq!(bytes[384 - 8], 7);
        assert_eq!(bytes[Statistics::SIZE - 8], 9);
        assert_eq!(Statistics::from_bytes(&bytes), statistics);
    }

    #[test]
    fn the_size_is_part_of_the_interface() {
        assert_eq!(core::mem::offset_of!(Statistics, vm_pages), 384, "version 1 ended here");
        assert_eq!(Statistics::SIZE, 424);
    }

    #[test]
    fn short_input_leaves_zeroes() {
        let statistics = Statistics::from_bytes(&[9, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(statistics, Statistics { version: 9, ..Statistics::default() });
    }
}
