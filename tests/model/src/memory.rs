//! What the host does with its own pages, and what every host call has in common.

use core::ops::Range;

use ravelin_abi::{
    ADDRESS_END, CALL_BITMAP, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES, PageStateCode, Statistics, Status, VENDOR_UID,
    VERSION_MAJOR, VERSION_MINOR,
};

use crate::{
    Difference, Model, PAGE_SIZE, Reached, Real, Touched, arguments, differs,
    state::Page,
    verdict::{Refusal, Verdict, demand},
};

/// Name of what is no call.
const NO_CALL: &str = "NO_CALL";

/// State where it came to none.
pub(crate) const NO_STATE: &str = "-";

impl Model {
    /// Judges a call of the host that has just ended: `before` is what was in x0 to x6 at `HVC #immediate`, `after` what is in x0
    /// to x3 now.
    ///
    /// # Errors
    ///
    /// What is wrong. The model is of no use then.
    pub fn host_call(
        &mut self,
        real: &dyn Real,
        immediate: u16,
        before: [u64; 7],
        after: [u64; 4],
    ) -> Result<Reached, Difference> {
        self.touched = Touched::default();
        let [function, x1, x2, x3, x4, x5, x6] = before;
        let Some(call) = arguments::find(function).filter(|_| immediate == 0) else {
            if after != [Status::NotSupported.register(), x1, x2, x3] {
                return differs!("{before:x?} is no call, and left {after:x?}");
            }
            return Ok(Reached { state: NO_STATE, call: NO_CALL, result: Status::NotSupported.name() });
        };
        let x = [x1, x2, x3, x4, x5, x6];
        // Those without arguments have no status.
        let constant = match call.name {
            "UID" => Some(VENDOR_UID.map(u64::from)),
            "REVISION" => Some([VERSION_MAJOR.into(), VERSION_MINOR.into(), x2, x3]),
            _ => None,
        };
        if let Some(constant) = constant {
            if after != constant {
                return differs!("{} left {after:x?}, and not {constant:x?}", call.name);
            }
            return Ok(Reached { state: NO_STATE, call: call.name, result: Status::Success.name() });
        }
        let verdict = match arguments::check(call, x) {
            Ok(()) => self.expect(call.name, x),
            Err(status) => Refusal::new(status, NO_STATE).into(),
        };
        let Some(status) = Status::from_code(after[0].cast_signed()) else {
            return differs!("{} {x:x?} returned {:#x}, which is no status", call.name, after[0]);
        };
        let reached = Reached { state: verdict.state, call: call.name, result: status.name() };
        let [_, results @ ..] = after;
        // Registers that have no result are as they were.
        let used = if status == Status::Success { call.results.len() } else { 2 };
        if (used..4).any(|index| after[index] != before[index]) {
            return differs!("{} {x:x?} left {after:x?}: a register without a result has changed", call.name);
        }
        let is_allowed = verdict.allows(status, self.is_sequential);
        match (verdict.must, status) {
            (Ok(effect), Status::Success) => match effect(self, results, real) {
                Ok(()) => Ok(reached),
                Err(Difference(why)) => differs!("{} {x:x?} left {after:x?}: {why}", call.name),
            },
            (Err(refusal), status) if refusal.status == status && refusal.detail == results[0] => Ok(reached),
            (_, status) if is_allowed => match (status, results[0]) {
                (Status::NeedsTables, 1..) => Ok(reached),
                (other, 0) if other != Status::NeedsTables => Ok(reached),
                _ => differs!("{} {x:x?} returned {} with {:#x} in x1", call.name, status.name(), results[0]),
            },
            (must, _) => {
                let wanted = must.map_or_else(|refusal| refusal, |_| Refusal::new(Status::Success, verdict.state));
                let Refusal { status: must, detail, state } = wanted;
                differs!(
                    "{} {x:x?} returned {} with {:#x} in x1, and not {} with {detail:#x} ({state})",
                    call.name,
                    status.name(),
                    results[0],
                    must.name(),
                )
            }
        }
    }

    /// Returns what a call with these arguments, which have been checked, has to do.
    fn expect(&mut self, call: &'static str, x: [u64; 6]) -> Verdict {
        match call {
            "FEATURES" => Verdict::returns(NO_STATE, |_, results, _| {
                let features = [CALL_BITMAP, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES];
                if results == features { Ok(()) } else { differs!("and not {features:x?}") }
            }),
            "SHARE" => self.share(pages(x[0], x[1])),
            "UNSHARE" => self.unshare(pages(x[0], x[1])),
            "DONATE" => self.donate(pages(x[0], x[1])),
            "TAKE_BACK" => self.take_back(pages(x[0], x[1])),
            "PIN" => self.pin(pages(x[0], x[1])),
            "UNPIN" => self.unpin(pages(x[0], x[1])),
            "PAGE_STATE" => self.page_state(x[0] / PAGE_SIZE),
            "STATISTICS" => self.statistics(x[0] / PAGE_SIZE),
            _ => self.vm_call(call, x),
        }
    }

    /// Judges a fault of the host at stage 2: an access to `address`, which it has been given or refused.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn host_fault(&mut self, address: u64, given: bool) -> Result<Reached, Difference> {
        self.touched = Touched::default();
        let page = address / PAGE_SIZE;
        if address < ADDRESS_END {
            self.touch(page..page + 1);
        }
        // Whether there is a device is not for the model to know.
        let Some(state) = self.state.pages.get(page) else {
            return Ok(Reached { state: "NotRam", call: "FAULT", result: if given { "GIVEN" } else { "REFUSED" } });
        };
        if state.host_may() != given {
            return differs!("an access of the host to {address:#x}, which is {state:?}, was given: {given}");
        }
        Ok(Reached { state: state.name(), call: "FAULT", result: if given { "GIVEN" } else { "REFUSED" } })
    }

    /// Remembers to look at pages, whatever becomes of them.
    pub(crate) fn touch(&mut self, pages: Range<u64>) {
        self.touched.pages.push(pages);
    }

    /// Demands something of each page, in ascending order; returns the state of the first.
    pub(crate) fn demand_each(
        &self,
        pages: Range<u64>,
        demand: impl Fn(Page) -> Result<(), Status>,
    ) -> Result<&'static str, Refusal> {
        let mut first = None;
        for (part, page) in self.state.pages.parts(pages) {
            let refused = |status, state| Refusal { status, detail: part.start * PAGE_SIZE, state };
            let page = page.ok_or(refused(Status::NotRam, "NotRam"))?;
            demand(page).map_err(|status| refused(status, page.name()))?;
            first = first.or(Some(page.name()));
        }
        Ok(first.unwrap_or(NO_STATE))
    }

    /// Demands that all pages are the host's alone.
    pub(crate) fn demand_owned(&self, pages: Range<u64>) -> Result<&'static str, Refusal> {
        self.demand_each(pages, |page| if page == Page::Host { Ok(()) } else { Err(Status::Denied) })
    }

    /// The host lends pages to the hypervisor.
    fn share(&mut self, pages: Range<u64>) -> Verdict {
        self.touch(pages.clone());
        let state = demand!(self.demand_owned(pages.clone()));
        Verdict::does(state, |model| model.set(pages, Page::Shared { pins: 0 }))
    }

    /// It ends the loan of pages that are not pinned.
    fn unshare(&mut self, pages: Range<u64>) -> Verdict {
        self.touch(pages.clone());
        let state = demand!(self.demand_each(pages.clone(), |page| match page {
            Page::Shared { pins: 0 } => Ok(()),
            Page::Shared { .. } => Err(Status::Busy),
            _ => Err(Status::Denied),
        }));
        Verdict::does(state, |model| model.set(pages, Page::Host))
    }

    /// It gives pages to the hypervisor, which maps them.
    fn donate(&mut self, pages: Range<u64>) -> Verdict {
        self.touch(pages.clone());
        let state = demand!(self.demand_owned(pages.clone()));
        Verdict::does(state, |model| model.set(pages, Page::Donated)).or(&[Status::NoMemory])
    }

    /// It takes back what it has donated, zeroed.
    fn take_back(&mut self, pages: Range<u64>) -> Verdict {
        self.touch(pages.clone());
        let donated = |page| if page == Page::Donated { Ok(()) } else { Err(Status::Denied) };
        let state = demand!(self.demand_each(pages.clone(), donated));
        Verdict::does(state, |model| model.scrub(pages)).or(&[Status::NoMemory])
    }

    /// It pins lent pages once more, or for the first time; then the hypervisor maps them.
    fn pin(&mut self, pages: Range<u64>) -> Verdict {
        self.touch(pages.clone());
        let state = demand!(self.demand_each(pages.clone(), |page| match page {
            Page::Shared { pins: Page::MOST_PINS.. } => Err(Status::Limit),
            Page::Shared { .. } => Ok(()),
            _ => Err(Status::Denied),
        }));
        Verdict::does(state, |model| model.count_pins(pages, |pins| pins + 1)).or(&[Status::NoMemory])
    }

    /// It undoes one pin of each page.
    fn unpin(&mut self, pages: Range<u64>) -> Verdict {
        self.touch(pages.clone());
        let state = demand!(self.demand_each(pages.clone(), |page| match page {
            Page::Shared { pins: 1.. } => Ok(()),
            _ => Err(Status::Denied),
        }));
        Verdict::does(state, |model| model.count_pins(pages, |pins| pins - 1)).or(&[Status::NoMemory])
    }

    fn count_pins(&mut self, pages: Range<u64>, count: impl Fn(u64) -> u64) {
        let parts: alloc::vec::Vec<_> = self.state.pages.parts(pages).collect();
        for (part, page) in parts {
            if let Some(Page::Shared { pins }) = page {
                self.set(part, Page::Shared { pins: count(pins) });
            }
        }
    }

    /// The host asks what a page is to it.
    fn page_state(&self, page: u64) -> Verdict {
        let page = self.state.pages.get(page);
        let (code, pins) = match page {
            Some(Page::Host) => (PageStateCode::Owned, 0),
            Some(Page::Shared { pins }) => (PageStateCode::SharedOwned, pins),
            Some(Page::Run | Page::Lent(_)) => (PageStateCode::SharedOwned, 0),
            Some(Page::Claimed(_)) => (PageStateCode::SharedBorrowed, 0),
            _ => (PageStateCode::NoPage, 0),
        };
        Verdict::returns(page.map_or("NotRam", Page::name), move |_, [x1, x2, _], _| {
            if [x1, x2] == [code.code(), pins] { Ok(()) } else { differs!("and not {code:?} with {pins} pins") }
        })
    }

    /// The hypervisor writes numbers to a page that the host has lent, for which it pins it meanwhile.
    fn statistics(&mut self, page: u64) -> Verdict {
        let state = demand!(self.demand_each(page..page + 1, |page| match page {
            Page::Shared { pins: Page::MOST_PINS.. } => Err(Status::Limit),
            Page::Shared { .. } => Ok(()),
            _ => Err(Status::Denied),
        }));
        self.touch(page..page + 1);
        Verdict::returns(state, |_, [x1, ..], _| {
            if x1 == Statistics::SIZE as u64 { Ok(()) } else { differs!("not the size of the statistics") }
        })
        .or(&[Status::NoMemory])
    }
}

/// Returns the numbers of `count` pages from `base` on.
pub(crate) fn pages(base: u64, count: u64) -> Range<u64> {
    let first = base / PAGE_SIZE;
    first..first + count
}
