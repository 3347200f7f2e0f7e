//! Layout of the page through which the host runs a vCPU.
//!
//! [`RunExit`] is written by the hypervisor at each exit, and never read. [`RunEntry`] is written by the host, and read once
//! for each entry. What the hypervisor has to remember between the two it keeps to itself.

use core::{
    fmt::{self, Formatter},
    mem::offset_of,
};

use crate::{PAGE_SIZE, codes::codes, conversion::MAX_CONVERSIONS};

codes! {
    /// Why a vCPU left the guest. The fields of [`RunExit`] that a reason does not mention are zero,
    /// but for `wake_low`, `wake_high` and `conversions`, which go with any.
    ExitReason: u64 {
        /// Something for the host, such as a physical interrupt. Nothing happened in the guest.
        Interrupted = 1, "INTERRUPTED";
        /// The guest waits for an interrupt. The vCPU has something to do at `deadline`, or when an interrupt is raised.
        Wait = 2, "WAIT";
        /// The guest waits for another of its vCPUs to make progress.
        Yield = 3, "YIELD";
        /// The guest accesses a device: `size` bytes at `address`. `flags` tells a store, of `value`, from a load. Answers:
        /// COMPLETE, with the value of a load; ABORT; RETRY.
        Mmio = 4, "MMIO";
        /// The guest accesses `address`, where it has no page. `flags` says how, if the VM is an ordinary one. Answers: RETRY;
        /// ABORT.
        PageFault = 5, "PAGE_FAULT";
        /// The guest has turned on another vCPU, the one with index `vcpu`. It can be run now.
        CpuOn = 6, "CPU_ON";
        /// The guest has turned off this vCPU. It cannot be run until the guest turns it on again.
        CpuOff = 7, "CPU_OFF";
        /// The guest wants the VM to end. No vCPU is entered any more; `wake_low` and `wake_high` name the others that are on. The
        /// next run of each other one, even if it is off, gives this same reason, and after that none can be run again.
        SystemOff = 8, "SYSTEM_OFF";
        /// The guest wants the VM to start anew. As SYSTEM_OFF.
        SystemReset = 9, "SYSTEM_RESET";
        /// The guest takes back `pages` pages at `address`, some of which the host has claimed. Answers: RETRY, after the host
        /// has released them; REFUSE.
        Unshare = 10, "UNSHARE";
        /// The guest has offered `pages` pages at `address`.
        Shared = 11, "SHARED";
        /// The guest has given up `pages` pages at `address`, which are the host's again, and lifted poison among them.
        Relinquished = 12, "RELINQUISHED";
        /// The guest's call needs `pages` pages for translation tables. Answer: RETRY, after the host has donated them.
        NeedsTables = 13, "NEEDS_TABLES";
        /// The guest calls its host, with `value` as the immediate and registers in `call`. Answers: COMPLETE, with `results`;
        /// RETRY.
        HostCall = 14, "HOST_CALL";
        /// The vCPU cannot go on, and cannot be run again.
        Failed = 15, "FAILED";
        /// Other vCPUs have something to do, those that `wake_low` and `wake_high` name. Nothing else happened.
        Wake = 16, "WAKE";
        /// The guest has had conversions done: see `conversions`. Nothing else happened.
        Converted = 17, "CONVERTED";
    }
}

codes! {
    /// What the host says to the last exit when it runs the vCPU again.
    Answer: u64 {
        /// Nothing: the guest tries again what made it exit. Always allowed, and what zeroed memory says.
        Retry = 0, "RETRY";
        /// It is done.
        Complete = 1, "COMPLETE";
        /// The guest gets an external abort, or its call fails.
        Abort = 2, "ABORT";
        /// The host keeps the pages that the guest wants back. The guest is told.
        Refuse = 3, "REFUSE";
    }
}

/// In [`RunExit::flags`]: the access is a store.
pub const RUN_FLAG_WRITE: u64 = 1 << 0;

/// In [`RunExit::flags`]: the access is an instruction fetch.
pub const RUN_FLAG_EXECUTE: u64 = 1 << 1;

/// In [`RunEntry::flags`]: shares are not told of.
pub const RUN_QUIET_SHARES: u64 = 1 << 0;

/// [`RunExit::deadline`] where there is none.
pub const RUN_NO_DEADLINE: u64 = u64::MAX;

/// Registers that a call of the guest to its host carries each way: x0 to x30 as the Realm Services Interface has them.
pub const RUN_CALL_REGISTERS: usize = 31;

/// Defines a structure of 64-bit numbers, with its serialisation and the names for the C header and the reference.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])+ $field:ident,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[repr(C)]
        pub struct $name {
            $($(#[doc = $doc])+ pub $field: u64,)+
        }

        impl $name {
            /// Size in bytes.
            pub const SIZE: usize = size_of::<Self>();

            /// Size in words of 64 bits.
            pub const WORDS: usize = Self::SIZE / 8;

            /// Names and descriptions of the fields.
            const FIELDS: &[(&str, &str)] = &[$((stringify!($field), concat!($($doc),+).trim_ascii_start())),+];

            /// Returns the words that go into the page, in little-endian order.
            #[must_use]
            pub const fn to_words(&self) -> [u64; Self::WORDS] {
                [$(self.$field),+]
            }

            /// Returns what words of the page say.
            #[must_use]
            pub const fn from_words(words: &[u64; Self::WORDS]) -> Self {
                let [$($field),+] = *words;
                Self { $($field),+ }
            }

            /// Returns the bytes that go into the page.
            #[must_use]
            pub fn to_bytes(&self) -> [u8; Self::SIZE] {
                let mut bytes = [0; Self::SIZE];
                for (chunk, word) in bytes.as_chunks_mut().0.iter_mut().zip(self.to_words()) {
                    *chunk = word.to_le_bytes();
                }
                bytes
            }

            /// Returns what bytes of the page say.
            #[must_use]
            pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
                let mut words = [0; Self::WORDS];
                for (word, chunk) in words.iter_mut().zip(bytes.as_chunks().0) {
                    *word = u64::from_le_bytes(*chunk);
                }
                Self::from_words(&words)
            }
        }

        const _: () = assert!($name::SIZE == 8 * $name::FIELDS.len());
    };
}

words! {
    /// What the hypervisor tells the host at an exit.
    RunExit {
        /// Reason, below.
        reason,
        /// How memory is accessed: RUN_FLAG_WRITE, RUN_FLAG_EXECUTE.
        flags,
        /// Guest address; that of a page unless the access is to a device.
        address,
        /// Bytes of an access: 1, 2, 4 or 8.
        size,
        /// Value that is stored, in its low `size` bytes as they are in memory in little-endian order; or the immediate of a call.
        value,
        /// Pages of a range.
        pages,
        /// Index of another vCPU.
        vcpu,
        /// Value of the physical counter at which a timer fires, or RUN_NO_DEADLINE.
        deadline,
        /// With any reason: bit n says that vCPU n, 0 to 63, has something to do. The host runs it if it waits, and interrupts the
        /// CPU that it runs on.
        wake_low,
        /// The same for vCPUs 64 to 127.
        wake_high,
        /// With any reason: how many conversions there are in the list `conversions`, 0 to 64. Of those that share, the host takes
        /// note. Those that unshare have not happened: the host drops its references to the pages, and consents by a bit of
        /// `released` when it runs the vCPU again.
        conversions,
    }
}

words! {
    /// What the host tells the hypervisor when it runs the vCPU.
    RunEntry {
        /// Answer, below, to an exit that has answers; after others it does not matter. VCPU_RUN fails and changes nothing if it is
        /// none of those of the last exit.
        answer,
        /// Value that is loaded, in its low `size` bytes. The others do not matter.
        value,
        /// Bit n: the host gives up the pages of the conversion n in `conversions`, which unshares: they are released and the guest's
        /// alone again. Other conversions that unshare are refused if the host has not released their pages; other bits do not
        /// matter.
        released,
        /// RUN_QUIET_SHARES: the host need not be told of what the guest shares, neither by SHARED nor in `conversions`: it learns of
        /// that when it claims. Read when the guest shares.
        flags,
    }
}

/// The page. What is not named is neither written nor read, and kept for later.
#[derive(Debug)]
#[repr(C)]
pub struct RunPage {
    /// From the hypervisor.
    pub exit: RunExit,
    reserved_0: [u64; 128 - size_of::<RunExit>() / 8],
    /// From the hypervisor, with HOST_CALL only: what the guest sends.
    pub call: [u64; RUN_CALL_REGISTERS],
    reserved_1: [u64; 64 - RUN_CALL_REGISTERS],
    /// From the hypervisor: words of conversions.
    pub conversions: [u64; MAX_CONVERSIONS],
    /// From the host.
    pub entry: RunEntry,
    reserved_2: [u64; 128 - size_of::<RunEntry>() / 8],
    /// From the host, read if a HOST_CALL is complete only: what the guest receives.
    pub results: [u64; RUN_CALL_REGISTERS],
    reserved_3: [u64; 128 - RUN_CALL_REGISTERS],
}

impl RunPage {
    /// Offset of [`RunPage::exit`].
    pub const EXIT: usize = offset_of!(Self, exit);
    /// Offset of [`RunPage::call`].
    pub const CALL: usize = offset_of!(Self, call);
    /// Offset of [`RunPage::conversions`].
    pub const CONVERSIONS: usize = offset_of!(Self, conversions);
    /// Offset of [`RunPage::entry`].
    pub const ENTRY: usize = offset_of!(Self, entry);
    /// Offset of [`RunPage::results`].
    pub const RESULTS: usize = offset_of!(Self, results);
}

/// Names and descriptions of the parts of the page, and where they are.
const PARTS: [(&str, usize, &str); 5] = [
    ("exit", RunPage::EXIT, "from the hypervisor: why the vCPU has left the guest"),
    ("call", RunPage::CALL, "from the hypervisor with HOST_CALL: registers that the guest sends"),
    (
        "conversions",
        RunPage::CONVERSIONS,
        "from the hypervisor: conversions, 64 bits each: guest address of the first page; bit 9: unshares; bits 8:0: pages less one",
    ),
    ("entry", RunPage::ENTRY, "from the host: the answer to the last exit"),
    ("results", RunPage::RESULTS, "from the host when a HOST_CALL is complete: registers that the guest receives"),
];

#[expect(clippy::as_conversions, reason = "constant: there is no other way to compare the two")]
const _: () = assert!(size_of::<RunPage>() == PAGE_SIZE as usize);

/// Writes the constants of the C header.
pub(crate) fn header_constants(f: &mut Formatter<'_>) -> fmt::Result {
    writeln!(f, "\n/* Why a vCPU left the guest: `reason`. */")?;
    for reason in ExitReason::ALL {
        writeln!(f, "#define RAVELIN_EXIT_{} {} /* {} */", reason.name(), reason.code(), reason.doc())?;
    }
    writeln!(f, "#define RAVELIN_RUN_FLAG_WRITE {RUN_FLAG_WRITE:#x}")?;
    writeln!(f, "#define RAVELIN_RUN_FLAG_EXECUTE {RUN_FLAG_EXECUTE:#x}")?;
    writeln!(f, "#define RAVELIN_RUN_NO_DEADLINE {RUN_NO_DEADLINE:#x}")?;
    writeln!(f, "#define RAVELIN_RUN_QUIET_SHARES {RUN_QUIET_SHARES:#x}")?;
    writeln!(f, "\n/* What the host says to it: `answer`. */")?;
    for answer in Answer::ALL {
        writeln!(f, "#define RAVELIN_ANSWER_{} {} /* {} */", answer.name(), answer.code(), answer.doc())?;
    }
    writeln!(f, "\n/* Offsets in the run page. */")?;
    writeln!(f, "#define RAVELIN_RUN_EXIT {}", RunPage::EXIT)?;
    writeln!(f, "#define RAVELIN_RUN_CALL {}", RunPage::CALL)?;
    writeln!(f, "#define RAVELIN_RUN_CONVERSIONS {}", RunPage::CONVERSIONS)?;
    writeln!(f, "#define RAVELIN_RUN_ENTRY {}", RunPage::ENTRY)?;
    writeln!(f, "#define RAVELIN_RUN_RESULTS {}", RunPage::RESULTS)?;
    writeln!(f, "#define RAVELIN_RUN_CALL_REGISTERS {RUN_CALL_REGISTERS}")
}

/// Writes the structures of the C header.
pub(crate) fn header_structures(f: &mut Formatter<'_>) -> fmt::Result {
    for (name, doc, fields) in [
        ("exit", "What the hypervisor writes at RAVELIN_RUN_EXIT.", RunExit::FIELDS),
        ("entry", "What the host writes at RAVELIN_RUN_ENTRY.", RunEntry::FIELDS),
    ] {
        writeln!(f, "\n/* {doc} */\nstruct ravelin_run_{name} {{")?;
        for (name, doc) in fields {
            writeln!(f, "\tuint64_t {name}; /* {doc} */")?;
        }
        writeln!(f, "}};")?;
    }
    Ok(())
}

/// Writes the section of the reference.
pub(crate) fn reference(f: &mut Formatter<'_>) -> fmt::Result {
    writeln!(
        f,
        "\n## Run page\n\n\
         Through it the host learns why a vCPU has left the guest, and answers. 64-bit little-endian numbers; fields are only \
         ever added.\nThe hypervisor never reads what it writes there, and reads what the host writes once for each entry.\n\n\
         | offset | part | |\n|---|---|---|"
    )?;
    for (name, offset, doc) in PARTS {
        writeln!(f, "| {offset} | `{name}` | {doc} |")?;
    }
    for (name, base, fields) in [("exit", RunPage::EXIT, RunExit::FIELDS), ("entry", RunPage::ENTRY, RunEntry::FIELDS)]
    {
        writeln!(f, "\n| offset | field of `{name}` | meaning |\n|---|---|---|")?;
        for (offset, (name, doc)) in (base..).step_by(8).zip(fields) {
            writeln!(f, "| {offset} | `{name}` | {doc} |")?;
        }
    }
    writeln!(
        f,
        "\n| code | reason | meaning; fields that it does not mention are zero, but for `wake_low`, `wake_high` and `conversions` |\n|---|---|---|"
    )?;
    for reason in ExitReason::ALL {
        writeln!(f, "| {} | `{}` | {} |", reason.code(), reason.name(), reason.doc())?;
    }
    writeln!(f, "\n| code | answer | meaning |\n|---|---|---|")?;
    for answer in Answer::ALL {
        writeln!(f, "| {} | `{}` | {} |", answer.code(), answer.name(), answer.doc())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_follow_the_layout() {
        let exit = RunExit { reason: 4, flags: 0x0102, deadline: u64::MAX, ..RunExit::default() };
        let bytes = exit.to_bytes();
        assert_eq!(bytes[..16], [4, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[offset_of!(RunExit, deadline)..offset_of!(RunExit, wake_low)], [0xff; 8]);
        assert_eq!(RunExit::from_bytes(&bytes), exit);

        let entry = RunEntry { answer: 1, value: 0x8877_6655_4433_2211, ..RunEntry::default() };
        assert_eq!(entry.to_bytes()[..16], [1, 0, 0, 0, 0, 0, 0, 0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]);
        assert_eq!(RunEntry::from_bytes(&entry.to_bytes()), entry);
    }

    #[test]
    fn the_layout_is_part_of_the_interface() {
        let offsets = [RunPage::EXIT, RunPage::CALL, RunPage::CONVERSIONS, RunPage::ENTRY, RunPage::RESULTS];
        assert_eq!(offsets, [0, 1024, 1536, 2048, 3072]);
        assert_eq!([RunExit::SIZE, RunEntry::SIZE], [88, 32]);
    }

    #[test]
    fn codes_go_both_ways() {
        for &reason in ExitReason::ALL {
            assert_eq!(ExitReason::from_code(reason.code()), Some(reason));
        }
        for &answer in Answer::ALL {
            assert_eq!(Answer::from_code(answer.code()), Some(answer));
        }
        // What a page holds that nobody has written yet.
        assert_eq!(ExitReason::from_code(0), None);
        assert_eq!(Answer::from_code(0), Some(Answer::Retry));
        assert_eq!(Answer::from_code(4), None);
    }
}
