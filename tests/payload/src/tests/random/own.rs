//! Pages that one CPU alone makes calls about, between those of all CPUs: what each call does is known.

use ravelin_abi::{PageStateCode, Status};
use ravelin_guest::playground::Random;

use crate::{
    rt::{
        memory::{self, PAGE},
        probe,
    },
    tests::{NO_PAGE, OWNED, Op, Outcome, State, check, check_eq, state},
};

/// How many each CPU has.
pub(super) const OWN_PAGES: u64 = 8;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contents {
    Pattern(u64),
    Zeroes,
}

/// The pages, and what they are.
pub(super) struct OwnPages {
    base: u64,
    states: [State; OWN_PAGES as usize],
    contents: [Contents; OWN_PAGES as usize],
}

impl OwnPages {
    /// Pages that are the host's.
    pub(super) fn new(base: u64, random: &mut Random) -> Self {
        let mut pages =
            Self { base, states: [OWNED; OWN_PAGES as usize], contents: [Contents::Zeroes; OWN_PAGES as usize] };
        (0..OWN_PAGES as usize).for_each(|index| pages.fill(index, random));
        pages
    }

    fn address(&self, index: usize) -> u64 {
        self.base + index as u64 * PAGE
    }

    fn fill(&mut self, index: usize, random: &mut Random) {
        let seed = random.below(1 << 16);
        memory::fill(self.address(index), seed);
        self.contents[index] = Contents::Pattern(seed);
    }

    /// Makes a call about some of the pages, or looks at one.
    pub(super) fn step(&mut self, random: &mut Random) -> Outcome {
        let index = random.below(OWN_PAGES) as usize;
        match random.below(8) {
            0 => self.look(index),
            1 if self.states[index].0 != PageStateCode::NoPage => {
                self.fill(index, random);
                Ok(())
            }
            _ => {
                let count = 1 + random.below(3.min(OWN_PAGES - index as u64)) as usize;
                self.call(random.one_of(Op::ALL), index, count)
            }
        }
    }

    fn call(&mut self, op: Op, index: usize, count: usize) -> Outcome {
        let pages = index..index + count;
        let refused = pages.clone().find_map(|page| Some((after(op, self.states[page]).err()?, self.address(page))));
        let (status, page) = refused.unwrap_or((Status::Success, 0));
        op.answers(self.address(index), count as u64, status, page)?;
        if status == Status::Success {
            for page in pages {
                self.states[page] = after(op, self.states[page]).unwrap_or(OWNED);
                if op == Op::TakeBack {
                    self.contents[page] = Contents::Zeroes;
                }
            }
        }
        Ok(())
    }

    /// Checks state and contents of a page.
    fn look(&self, index: usize) -> Outcome {
        let page = self.address(index);
        check_eq!(state(page)?, self.states[index], "state of {page:#x}");
        if self.states[index] == NO_PAGE {
            check!(probe::read(page).is_err(), "{page:#x}, which is donated, can be read");
            return Ok(());
        }
        let difference = match self.contents[index] {
            Contents::Pattern(seed) => memory::find_difference(page, seed),
            Contents::Zeroes => memory::find_nonzero(page),
        };
        check_eq!(difference, None, "{page:#x}, which is {:x?}", self.contents[index]);
        Ok(())
    }

    /// Takes everything back, and looks at it once more.
    pub(super) fn finish(mut self) -> Outcome {
        for index in 0..OWN_PAGES as usize {
            let (code, pins) = self.states[index];
            (0..pins).try_for_each(|_| self.call(Op::Unpin, index, 1))?;
            match code {
                PageStateCode::SharedOwned => self.call(Op::Unshare, index, 1)?,
                PageStateCode::NoPage => self.call(Op::TakeBack, index, 1)?,
                _ => {}
            }
            self.look(index)?;
        }
        Ok(())
    }
}

/// What a page becomes, or why it does not.
fn after(op: Op, (code, pins): State) -> Result<State, Status> {
    match (op, code) {
        (Op::Share, PageStateCode::Owned) => Ok((PageStateCode::SharedOwned, 0)),
        (Op::Unshare, PageStateCode::SharedOwned) if pins == 0 => Ok(OWNED),
        (Op::Unshare, PageStateCode::SharedOwned) => Err(Status::Busy),
        (Op::Donate, PageStateCode::Owned) => Ok(NO_PAGE),
        (Op::TakeBack, PageStateCode::NoPage) => Ok(OWNED),
        (Op::Pin, PageStateCode::SharedOwned) => Ok((code, pins + 1)),
        (Op::Unpin, PageStateCode::SharedOwned) if pins > 0 => Ok((code, pins - 1)),
        _ => Err(Status::Denied),
    }
}
