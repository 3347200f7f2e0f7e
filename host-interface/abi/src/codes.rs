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

codes! {
    /// How a call ended; in x0, sign-extended to 64 bits. A call that did not succeed changed nothing.
    Status: i64 {
        /// Done.
        Success = 0, "SUCCESS";
        /// There is no such call.
        NotSupported = -1, "NOT_SUPPORTED";
        /// An argument that must be zero is not.
        Reserved = -2, "RESERVED";
        /// A number of pages is zero, or an index has no meaning.
        Invalid = -3, "INVALID";
        /// An address is not a multiple of the page size.
        Unaligned = -4, "UNALIGNED";
        /// A range wraps around or reaches beyond 48 bits.
        Overflow = -5, "OVERFLOW";
        /// A range has more pages than the call takes.
        TooLarge = -6, "TOO_LARGE";
        /// A page is not RAM.
        NotRam = -7, "NOT_RAM";
        /// A page has another owner, or is in a state that the call does not start from.
        Denied = -8, "DENIED";
        /// A page is pinned or otherwise in use.
        Busy = -9, "BUSY";
        /// The hypervisor has no page left for a translation table.
        NoMemory = -10, "NO_MEMORY";
        /// A count, such as that of pins, cannot go higher.
        Limit = -11, "LIMIT";
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
    }

    #[test]
    fn a_status_is_sign_extended() {
        assert_eq!(Status::NotSupported.register(), u64::MAX);
        assert_eq!(Status::Success.register(), 0);
    }
}
