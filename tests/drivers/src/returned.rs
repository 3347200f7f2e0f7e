//! What guests find in their registers behind a call. The model judges what calls have done when they have been handled; here it
//! is about what the guest is told in the end, which may be after its host has answered.

use ravelin_abi::{Answer, ExitReason, VmKind};
use ravelin_model::Difference;
use ravelin_world::{CALL_REGISTERS, Door};

use crate::calls::{HOST_CALL, IPA_STATE_SET, MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE, REALM_CONFIG};

/// The first registers of a guest.
pub(crate) type Registers = [u64; CALL_REGISTERS];

/// The end of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Returned {
    /// Of which kind the guest is.
    pub(crate) kind: VmKind,
    /// The instruction.
    pub(crate) door: Door,
    /// The registers at the call.
    pub(crate) before: Registers,
    /// Those when it had been handled last: as they were if it waited for the host, or if it is another interface's.
    pub(crate) handled: Registers,
    /// Those behind the call.
    pub(crate) after: Registers,
    /// What the host was told that the guest waits for, if it was, and what it has answered.
    pub(crate) answered: Option<(ExitReason, Answer)>,
}

/// INVALID_PARAMETER of SMCCC.
const INVALID: u64 = (-3_i64).cast_unsigned();
/// NOT_SUPPORTED of SMCCC.
const NOT_SUPPORTED: u64 = (-1_i64).cast_unsigned();
/// ERROR_INPUT of RSI.
const ERROR_INPUT: u64 = 1;
/// In x2 of IPA_STATE_SET: the host does not do what it takes.
const REJECT: u64 = 1;

impl Returned {
    /// Judges it.
    ///
    /// # Errors
    ///
    /// What the guest must not be told.
    pub(crate) fn judge(&self) -> Result<(), Difference> {
        let Self { before, handled, after, .. } = *self;
        let is_right = if handled == before { self.is_answer() } else { after == handled };
        if is_right { Ok(()) } else { Err(Difference(format!("a guest is told what is not so: {self:x?}"))) }
    }

    /// Returns whether the registers are what they may be behind a call that has not been handled by itself.
    fn is_answer(&self) -> bool {
        let [function, base, ..] = self.before;
        let refused = matches!(
            self.answered,
            Some((ExitReason::Unshare, Answer::Refuse) | (ExitReason::PageFault, Answer::Abort))
        );
        match (self.kind, self.door, function) {
            (VmKind::Pkvm, Door::Hvc, MEM_SHARE | MEM_UNSHARE | MEM_RELINQUISH) => {
                refused && self.is([INVALID, 0, 0, 0])
            }
            (VmKind::Realm, Door::Smc, IPA_STATE_SET) => refused && self.is([0, base, REJECT]),
            (VmKind::Realm, Door::Smc, REALM_CONFIG) => refused && self.is([ERROR_INPUT]),
            // Where the host's results go may have been taken meanwhile.
            (VmKind::Realm, Door::Smc, HOST_CALL) => match self.answered {
                Some((ExitReason::HostCall, Answer::Complete)) => self.is([0]) || self.is([ERROR_INPUT]),
                _ => refused && self.is([ERROR_INPUT]),
            },
            // PSCI, SMCCC and TRNG.
            _ if matches!(function, 0x8000_0000 | 0x8000_0001) || function & !0x4000_00ff == 0x8400_0000 => {
                let [x0, ..] = self.after;
                self.is([x0])
            }
            _ => self.is([NOT_SUPPORTED]),
        }
    }

    /// Returns whether the registers are these, and the others as they were.
    fn is<const N: usize>(&self, first: [u64; N]) -> bool {
        self.after[..N] == first && self.after[N..] == self.before[N..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unshare(after: [u64; 4], answer: Answer) -> Result<(), Difference> {
        let registers = |first: [u64; 4]| {
            let mut registers = [7; CALL_REGISTERS];
            registers[..4].copy_from_slice(&first);
            registers
        };
        let before = registers([MEM_UNSHARE, 0x4000_0000, 1, 0]);
        let answered = Some((ExitReason::Unshare, answer));
        let (kind, door, after) = (VmKind::Pkvm, Door::Hvc, registers(after));
        Returned { kind, door, before, handled: before, after, answered }.judge()
    }

    #[test]
    fn a_refusal_is_an_error() {
        assert_eq!(unshare([INVALID, 0, 0, 0], Answer::Refuse), Ok(()));
        assert!(unshare([0, 1, 0, 0], Answer::Refuse).is_err());
        assert!(unshare([INVALID, 0, 0, 7], Answer::Refuse).is_err());
        // Its host is to release the page, and the guest calls once more.
        assert!(unshare([INVALID, 0, 0, 0], Answer::Retry).is_err());
    }
}
