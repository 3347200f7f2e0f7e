//! What a host call must answer, and what becomes of the state then.

use alloc::boxed::Box;

use ravelin_abi::Status;

use crate::{Difference, Model, Real, differs};

/// Why a call is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: Status,
    /// What is in x1.
    pub(crate) detail: u64,
    /// State of what stands in the way.
    pub(crate) state: &'static str,
}

impl Refusal {
    /// A refusal that names no address.
    pub(crate) const fn new(status: Status, state: &'static str) -> Self {
        Self { status, detail: 0, state }
    }
}

/// What a successful call does to the state. It is told what is in x1 to x3, and the real tables.
pub(crate) type Effect = Box<dyn FnOnce(&mut Model, [u64; 3], &dyn Real) -> Result<(), Difference>>;

/// What a call may answer.
pub(crate) struct Verdict {
    /// What it answers if nothing of `also` does.
    pub(crate) must: Result<Effect, Refusal>,
    /// What it may answer instead, with 0 in x1, or a number of pages after NEEDS_TABLES.
    pub(crate) also: &'static [Status],
    /// State of what it is about.
    pub(crate) state: &'static str,
}

impl Verdict {
    /// The call succeeds, with 0 in x1, and does this.
    pub(crate) fn does(state: &'static str, effect: impl FnOnce(&mut Model) + 'static) -> Self {
        Self::returns(state, move |model, [x1, ..], _| {
            if x1 != 0 {
                return differs!("x1 is {x1:#x} after success");
            }
            effect(model);
            Ok(())
        })
    }

    /// The call succeeds and does this, which looks at what it returns.
    pub(crate) fn returns(
        state: &'static str,
        effect: impl FnOnce(&mut Model, [u64; 3], &dyn Real) -> Result<(), Difference> + 'static,
    ) -> Self {
        Self { must: Ok(Box::new(effect)), also: &[], state }
    }

    /// The call may also end with one of these, and then has changed nothing.
    pub(crate) fn or(self, also: &'static [Status]) -> Self {
        Self { also, ..self }
    }

    /// Returns whether the call may end with this status instead of what it must do. BUSY is for what goes on at the same time.
    pub(crate) fn allows(&self, status: Status, is_sequential: bool) -> bool {
        self.also.contains(&status) && !(is_sequential && status == Status::Busy)
    }
}

impl From<Refusal> for Verdict {
    fn from(refusal: Refusal) -> Self {
        Self { state: refusal.state, must: Err(refusal), also: &[] }
    }
}

/// Takes what succeeds, or the verdict that a refusal is.
macro_rules! demand {
    ($checked:expr) => {
        match $checked {
            Ok(value) => value,
            Err(refusal) => return $crate::verdict::Verdict::from(refusal),
        }
    };
}
pub(crate) use demand;
