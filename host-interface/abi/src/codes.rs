//! Codes that appear in result registers.

/// Defines an enumeration whose values, names and descriptions also go into the C header and the reference.
macro_rules! codes {
    (
        $(#[$meta:meta])*
        $name:ident: $repr:ident {
            $($(#[doc = $doc:literal])+ $variant:ident = $value:literal, $upper:literal;)+
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($repr)]
        pub enum $name {
            $($(#[doc = $doc])+ $variant = $value,)+
        }

        impl $name {
            /// All values, in the order of their definition.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Returns the number that stands for the value in a register.
            #[must_use]
            pub const fn code(self) -> $repr {
                match self {
                    $(Self::$variant => $value,)+
                }
            }

            /// Returns the value that `code` stands for.
            #[must_use]
            pub const fn from_code(code: $repr) -> Option<Self> {
                match code {
                    $($value => Some(Self::$variant),)+
                    _ => None,
                }
            }

            /// Returns the name used in the C header, without its prefix.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $upper,)+
                }
            }

            /// Returns the description.
            #[must_use]
            pub const fn doc(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($($doc),+).trim_ascii_start(),)+
                }
            }
        }
    };
}
pub(crate) use codes;

codes! {
    /// How a call ended; in x0, sign-extended to 64 bits. A call that did not succeed changed nothing.
    Status: i64 {
        /// Done.
        Success = 0, "SUCCESS";
        /// There is no such call.
        NotSupported = -1, "NOT_SUPPORTED";
        /// An argument that must be zero is not.
        Reserved = -2, "RESERVED";
        /// A number of pages is zero or not the one that is needed, or another number has no meaning.
        Invalid = -3, "INVALID";
        /// An address is not a multiple of the page size.
        Unaligned = -4, "UNALIGNED";
        /// A range wraps around or reaches beyond its address space: 48 bits, or those of the VM.
        Overflow = -5, "OVERFLOW";
        /// A range has more pages than the call takes.
        TooLarge = -6, "TOO_LARGE";
        /// A page is not RAM.
        NotRam = -7, "NOT_RAM";
        /// A page has another owner, or is in a state that the call does not start from.
        Denied = -8, "DENIED";
        /// Something is in use: a page is pinned, a vCPU runs, or another CPU is changing the VM. It may work later.
        Busy = -9, "BUSY";
        /// The hypervisor has no page left for a translation table.
        NoMemory = -10, "NO_MEMORY";
        /// A count, such as that of pins, cannot go higher.
        Limit = -11, "LIMIT";
        /// There is no VM of this handle, or no longer.
        BadHandle = -12, "BAD_HANDLE";
        /// The VM is of a kind, or at a point of its life, that the call is not for.
        WrongState = -13, "WRONG_STATE";
        /// What the call would make is there already: a vCPU of this index, or a page at this guest address.
        Exists = -14, "EXISTS";
        /// What the call is about is not there: a vCPU of this index, or a page at this guest address.
        Absent = -15, "ABSENT";
        /// The guest has lost the page at this address by force. It takes no other one there unless it relinquishes the
        /// address.
        Poisoned = -16, "POISONED";
        /// The guest has not offered the page at this address to the host.
        NotOffered = -17, "NOT_OFFERED";
        /// The VM has too few pages for translation tables; x1 says how many more the call may need.
        NeedsTables = -18, "NEEDS_TABLES";
    }
}

impl Status {
    /// Returns the value of x0.
    #[must_use]
    pub const fn register(self) -> u64 {
        self.code().cast_unsigned()
    }
}

codes! {
    /// State of a page as the host sees it.
    PageStateCode: u64 {
        /// The host has no access: the page is not RAM, or belongs to someone else.
        NoPage = 0, "NO_PAGE";
        /// The host owns the page, alone.
        Owned = 1, "OWNED";
        /// The host owns the page and has lent it.
        SharedOwned = 2, "SHARED_OWNED";
        /// Someone else owns the page and has lent it to the host.
        SharedBorrowed = 3, "SHARED_BORROWED";
    }
}

codes! {
    /// What a VM is to its host, and by which interface its guest speaks to the hypervisor.
    VmKind: u64 {
        /// The host lends the memory and keeps access to it.
        Ordinary = 0, "ORDINARY";
        /// Protected. The guest shares memory by pKVM's hypercalls.
        Pkvm = 1, "PKVM";
        /// Protected. The guest shares memory by the Realm Services Interface (Arm DEN0137).
        Realm = 2, "REALM";
    }
}

impl VmKind {
    /// Returns whether the guest's memory is closed to the host unless the guest shares it.
    #[must_use]
    pub const fn is_protected(self) -> bool {
        !matches!(self, Self::Ordinary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_go_both_ways() {
        for &status in Status::ALL {
            assert_eq!(Status::from_code(status.code()), Some(status));
        }
        assert_eq!(Status::from_code(1), None);
        for &state in PageStateCode::ALL {
            assert_eq!(PageStateCode::from_code(state.code()), Some(state));
        }
        assert_eq!(PageStateCode::from_code(4), None);
        for &kind in VmKind::ALL {
            assert_eq!(VmKind::from_code(kind.code()), Some(kind));
        }
        assert_eq!(VmKind::from_code(3), None);
    }

    #[test]
    fn a_status_is_sign_extended() {
        assert_eq!(Status::NotSupported.register(), u64::MAX);
        assert_eq!(Status::Success.register(), 0);
    }
}
