//! Why a host call about a VM fails.

use ravelin_abi::Status;

/// What a host call that failed returns. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Goes to x0.
    pub status: Status,
    /// Goes to x1: the address of the first page that failed, or with [`Status::NeedsTables`] how many pages are missing, or
    /// 0.
    pub detail: u64,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self { status, detail: 0 }
    }
}
