//! Sequences of steps of a host and its guests, on Ravelin's real code and the recording machine, with the model as judge.
//!
//! * [`draft`]: random steps, well-formed ones and others; [`random`]: long runs of them, which make a failing sequence short.
//! * [`small`]: all steps in all states of worlds with two pages.
//! * [`sequence`]: what is judged at each step. [`op`]: how steps are written down, and read to replay them.

#![forbid(unsafe_code)]

mod calls;
pub mod coverage;
pub mod draft;
pub mod op;
pub mod random;
mod real;
mod returned;
pub mod sequence;
pub mod small;
