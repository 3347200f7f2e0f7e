//! Steps of a host and its guests, judged by the model.

use arbitrary::{Arbitrary, Result, Unstructured};
use ravelin_abi::CALLS;
use ravelin_drivers::{
    draft::{Draft, GuestDraft, Pick},
    random::run_drafts,
};

/// Steps that are worth the time of one input.
const LIMIT: usize = 60;

/// Runs the steps that the bytes stand for, and demands that each answer, and what it leaves behind in all tables, is what the
/// model says.
pub fn sequences(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let drafts = std::iter::from_fn(|| if input.is_empty() { None } else { draft(&mut input).ok() });
    if let Err((steps, difference)) = run_drafts(drafts.take(LIMIT)) {
        let steps: Vec<_> = steps.iter().map(ToString::to_string).collect();
        panic!("{difference}, after\n{}", steps.join("\n"));
    }
}

fn draft(input: &mut Unstructured<'_>) -> Result<Draft> {
    Ok(match u8::arbitrary(input)? % 16 {
        0..=8 => Draft::Call(usize::from(u8::arbitrary(input)?) % CALLS.len(), picks(input)?),
        9 => Draft::Other(u16::arbitrary(input)? & 1, u32::arbitrary(input)?.into(), picks(input)?),
        10..=13 => {
            let [vm, vcpu] = <[u8; 2]>::arbitrary(input)?;
            Draft::Run(vm.into(), vcpu % 3, pick(input)?, guest(input)?)
        }
        _ => Draft::Access(pick(input)?, bool::arbitrary(input)?),
    })
}

fn guest(input: &mut Unstructured<'_>) -> Result<Option<GuestDraft>> {
    Ok(match u8::arbitrary(input)? % 8 {
        0 => None,
        1..=5 => Some(GuestDraft::Call(u8::arbitrary(input)?, picks(input)?)),
        _ => Some(GuestDraft::Access(pick(input)?, Option::arbitrary(input)?)),
    })
}

fn picks<const N: usize>(input: &mut Unstructured<'_>) -> Result<[Pick; N]> {
    let mut picks = [Pick::Likely(0); N];
    for place in &mut picks {
        *place = pick(input)?;
    }
    Ok(picks)
}

/// In most cases of one byte, which is enough to choose among few things.
fn pick(input: &mut Unstructured<'_>) -> Result<Pick> {
    Ok(match u8::arbitrary(input)? {
        255 => Pick::Raw(u64::arbitrary(input)?),
        254 => Pick::Likely(u32::arbitrary(input)?),
        likely => Pick::Likely(likely.into()),
    })
}
