//! Why transitions that guests take part in are refused.

use ravelin_memory::{Ipa, PhysAddr};

use crate::memory::{Failure, Reason};

/// Why a transition that a guest takes part in was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestReason {
    /// The page is not RAM.
    #[error("not RAM")]
    NotRam,
    /// The page has another owner or is in another state, or the guest is of another kind or at another point of its life.
    #[error("wrong owner or state")]
    Denied,
    /// The page is pinned, or the guest has pages left.
    #[error("in use")]
    Busy,
    /// The range is not in the guest's address space.
    #[error("outside the guest's address space")]
    OutOfRange,
    /// The range takes more steps than one call does.
    #[error("too many pages for one call")]
    TooLarge,
    /// There is a page in this frame.
    #[error("frame in use")]
    Exists,
    /// There is no page in this frame.
    #[error("no page in this frame")]
    Absent,
    /// The page in this frame was taken by force.
    #[error("frame poisoned")]
    Poisoned,
    /// The guest has not offered the page.
    #[error("not offered")]
    NotOffered,
    /// The guest has too few pages for tables; that many more may be needed.
    #[error("{0} more pages for tables are needed")]
    NeedsTables(usize),
    /// Too few translation tables are left for EL2's own mappings.
    #[error("out of translation tables")]
    NoMemory,
}

/// Why a transition that names pages was refused, and where. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason} at {page}")]
pub struct HostFailure {
    /// Why.
    pub reason: GuestReason,
    /// The first page that stands in the way, or the first of the range.
    pub page: PhysAddr,
}

/// Why a transition that names frames of a guest was refused, and where. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason} at {ipa}")]
pub struct GuestFailure {
    /// Why.
    pub reason: GuestReason,
    /// The first frame that stands in the way, or the first of the range.
    pub ipa: Ipa,
}

impl From<Failure> for HostFailure {
    fn from(failure: Failure) -> Self {
        let reason = match failure.reason {
            Reason::NotRam => GuestReason::NotRam,
            Reason::Denied => GuestReason::Denied,
            Reason::Busy | Reason::PinLimit => GuestReason::Busy,
            Reason::NoMemory => GuestReason::NoMemory,
        };
        Self { reason, page: failure.page }
    }
}
