//! Steps of a sequence, and how they are written down so that it can be replayed.

use std::{
    fmt::{self, Display, Formatter},
    str::{FromStr, SplitWhitespace},
};

use anyhow::{Context, Result, bail};
use ravelin_abi::{CALLS, RunEntry};
use ravelin_world::{Action, CALL_REGISTERS, Door};

/// Registers that a host call may take: x0 to x6.
pub const REGISTERS: usize = 7;

/// What is in a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    /// A number.
    Number(u64),
    /// The handle of the VM that was made last in this slot, whether or not it still exists; 0 if none was.
    Vm(u8),
    /// The handle of the VM that was in this slot before that one; 0 if none was.
    Old(u8),
}

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// The host calls by `HVC #immediate`.
    Call {
        /// The immediate.
        immediate: u16,
        /// x0 to x6.
        registers: [Value; REGISTERS],
    },
    /// The host answers the last exit of a vCPU and runs it; the guest does this, if it gets to it.
    Run {
        /// Slot of the VM.
        vm: u8,
        /// The vCPU.
        vcpu: u64,
        /// The answer; zeroes are what a new page says.
        answer: RunAnswer,
        /// What the guest does.
        action: Option<Action>,
    },
    /// The host loads from a page.
    Load(u64),
    /// The host stores a number to a page that no page has held yet.
    Store(u64),
}

/// [`RunEntry`], in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RunAnswer {
    /// The answer.
    pub answer: u64,
    /// The value that is loaded.
    pub value: u64,
}

impl From<RunAnswer> for RunEntry {
    fn from(RunAnswer { answer, value }: RunAnswer) -> Self {
        Self { answer, value, ..Self::default() }
    }
}

impl Op {
    /// Returns the call of this name, with these arguments.
    ///
    /// # Panics
    ///
    /// If there is no such call.
    #[must_use]
    pub fn call(name: &str, arguments: &[Value]) -> Self {
        let mut registers = [Value::Number(0); REGISTERS];
        registers[0] = Value::Number(ravelin_world::number(name));
        registers[1..=arguments.len()].copy_from_slice(arguments);
        Self::Call { immediate: 0, registers }
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number:x}"),
            Self::Vm(slot) => write!(f, "vm{slot}"),
            Self::Old(slot) => write!(f, "old{slot}"),
        }
    }
}

impl FromStr for Value {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(if let Some(slot) = text.strip_prefix("vm") {
            Self::Vm(slot.parse()?)
        } else if let Some(slot) = text.strip_prefix("old") {
            Self::Old(slot.parse()?)
        } else {
            Self::Number(hexadecimal(text)?)
        })
    }
}

fn hexadecimal(text: &str) -> Result<u64> {
    u64::from_str_radix(text, 16).with_context(|| format!("{text} is no hexadecimal number"))
}

/// A line that [`Op::from_str`] reads.
impl Display for Op {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call { immediate, registers } => {
                write!(f, "call {immediate:x}")?;
                registers.iter().try_for_each(|value| write!(f, " {value}"))?;
                let name = CALLS.iter().find(|call| registers[0] == Value::Number(call.number.into()));
                name.map_or(Ok(()), |call| write!(f, " # {}", call.name))
            }
            Self::Run { vm, vcpu, answer: RunAnswer { answer, value }, action } => {
                write!(f, "run {vm} {vcpu:x} {answer:x} {value:x}")?;
                match action {
                    None => Ok(()),
                    Some(Action::Load(at)) => write!(f, " load {at:x}"),
                    Some(Action::Store(at, value)) => write!(f, " store {at:x} {value:x}"),
                    Some(Action::Call(door, registers)) => {
                        f.write_str(if *door == Door::Hvc { " hvc" } else { " smc" })?;
                        registers.iter().try_for_each(|value| write!(f, " {value:x}"))
                    }
                }
            }
            Self::Load(page) => write!(f, "load {page:x}"),
            Self::Store(page) => write!(f, "store {page:x}"),
        }
    }
}

/// Takes the next word.
fn word<'a>(words: &mut SplitWhitespace<'a>) -> Result<&'a str> {
    words.next().context("the line is too short")
}

fn number(words: &mut SplitWhitespace<'_>) -> Result<u64> {
    hexadecimal(word(words)?)
}

fn action(words: &mut SplitWhitespace<'_>) -> Result<Option<Action>> {
    let Some(kind) = words.next() else { return Ok(None) };
    Ok(Some(match kind {
        "load" => Action::Load(number(words)?),
        "store" => Action::Store(number(words)?, u32::try_from(number(words)?)?),
        "hvc" | "smc" => {
            let mut registers = [0; CALL_REGISTERS];
            for register in &mut registers {
                *register = number(words)?;
            }
            Action::Call(if kind == "hvc" { Door::Hvc } else { Door::Smc }, registers)
        }
        _ => bail!("a guest does not {kind}"),
    }))
}

impl FromStr for Op {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let words = &mut words;
        let op = match word(words)? {
            "call" => {
                let immediate = u16::try_from(number(words)?)?;
                let mut registers = [Value::Number(0); REGISTERS];
                for register in &mut registers {
                    *register = word(words)?.parse()?;
                }
                Self::Call { immediate, registers }
            }
            "run" => Self::Run {
                vm: word(words)?.parse()?,
                vcpu: number(words)?,
                answer: RunAnswer { answer: number(words)?, value: number(words)? },
                action: action(words)?,
            },
            "load" => Self::Load(number(words)?),
            "store" => Self::Store(number(words)?),
            other => bail!("{other} is no step"),
        };
        if words.next().is_some() {
            bail!("the line is too long");
        }
        Ok(op)
    }
}

/// Reads a sequence, a step in each line; `#` begins a comment.
///
/// # Errors
///
/// What is wrong, and in which line.
pub fn parse(text: &str) -> Result<Vec<Op>> {
    let lines =
        (1..).zip(text.lines()).filter(|(_, line)| !line.split('#').next().unwrap_or_default().trim().is_empty());
    lines.map(|(number, line)| line.parse().with_context(|| format!("line {number}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let ops = [
            Op::call("VM_MAP", &[Value::Vm(1), Value::Number(0x8000_0000), Value::Number(u64::MAX), 1.into()]),
            Op::call("VM_TEARDOWN", &[Value::Old(3)]),
            Op::Call { immediate: 0xffff, registers: [Value::Number(7); REGISTERS] },
            Op::Run { vm: 200, vcpu: 1, answer: RunAnswer { answer: 3, value: 9 }, action: None },
            Op::Run { vm: 0, vcpu: 0, answer: RunAnswer::default(), action: Some(Action::Store(1 << 40, u32::MAX)) },
            Op::Run { vm: 0, vcpu: 0, answer: RunAnswer::default(), action: Some(Action::Load(4)) },
            Op::Run {
                vm: 0,
                vcpu: 0,
                answer: RunAnswer::default(),
                action: Some(Action::call(Door::Smc, [0xc400_0197, 1, 2])),
            },
            Op::Load(0x4000_0000),
            Op::Store(0),
        ];
        let text: String = ops.iter().map(|op| format!("{op}\n")).collect();
        assert_eq!(parse(&format!("# A comment.\n\n{text}")).unwrap(), ops);
        for wrong in ["jump 4", "load", "load 4 5", "load vm0", "run 0 0 0 0 wait", "call 0 1"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
