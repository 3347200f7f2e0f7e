//! The tests, and what they share.

use core::fmt::{self, Display, Write};

use arrayvec::{ArrayString, ArrayVec};
use ravelin_abi::{MAX_TAKE_BACK_PAGES, PageStateCode, Statistics, Status, VENDOR_UID};
use spin::Mutex;

use crate::rt::{
    call,
    cpu::{self, read_register},
    memory::{self, PAGE},
    platform::{self, platform},
};

pub(crate) mod abort;
pub(crate) mod arguments;
pub(crate) mod bench;
pub(crate) mod boot;
pub(crate) mod bugs;
pub(crate) mod contents;
pub(crate) mod device;
pub(crate) mod discovery;
pub(crate) mod features;
pub(crate) mod guests;
pub(crate) mod ownership;
pub(crate) mod pins;
pub(crate) mod psci;
pub(crate) mod random;
pub(crate) mod range;
pub(crate) mod smc;
pub(crate) mod stale;
pub(crate) mod statistics;
pub(crate) mod stress;

/// Why a test failed.
#[derive(Clone)]
pub(crate) struct Failure(ArrayString<120>);

impl Failure {
    pub(crate) fn new(reason: fmt::Arguments<'_>) -> Self {
        let mut failure = Self(ArrayString::new());
        let _ = failure.write_fmt(reason); // does not fail
        failure
    }
}

impl Write for Failure {
    /// Cuts off what does not fit.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let _ = text.chars().try_for_each(|character| self.0.try_push(character));
        Ok(())
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The result of a test.
pub(crate) type Outcome = Result<(), Failure>;

/// Fails the test unless the condition holds.
macro_rules! check {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err($crate::tests::Failure::new(format_args!($($reason)+)));
        }
    };
}

/// Fails the test unless both are equal.
macro_rules! check_eq {
    ($left:expr, $right:expr, $($what:tt)+) => {
        match ($left, $right) {
            (left, right) => {
                $crate::tests::check!(left == right, "{}: {:x?}, not {:x?}", format_args!($($what)+), left, right)
            }
        }
    };
}

pub(crate) use {check, check_eq};

/// A hypercall that takes a range and changes its state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Op {
    Share,
    Unshare,
    Donate,
    TakeBack,
    Pin,
    Unpin,
}

impl Op {
    pub(crate) const ALL: [Self; 6] =
        [Self::Share, Self::Unshare, Self::Donate, Self::TakeBack, Self::Pin, Self::Unpin];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Share => "SHARE",
            Self::Unshare => "UNSHARE",
            Self::Donate => "DONATE",
            Self::TakeBack => "TAKE_BACK",
            Self::Pin => "PIN",
            Self::Unpin => "UNPIN",
        }
    }

    pub(crate) fn number(self) -> u64 {
        number(self.name())
    }

    /// Makes the call; returns the status and the page that x1 names.
    pub(crate) fn call(self, address: u64, pages: u64) -> (Status, u64) {
        let [x0, x1, ..] = call::hypervisor([self.number(), address, pages, 0]);
        (status(x0), x1)
    }

    /// Makes the call, which must succeed.
    pub(crate) fn succeeds(self, address: u64, pages: u64) -> Outcome {
        self.answers(address, pages, Status::Success, 0)
    }

    /// Makes the call, which must end with `status` and name `page`.
    pub(crate) fn answers(self, address: u64, pages: u64, status: Status, page: u64) -> Outcome {
        check_eq!(self.call(address, pages), (status, page), "{} of {pages} pages at {address:#x}", self.name());
        Ok(())
    }
}

/// The function identifier of a call.
pub(crate) fn number(name: &str) -> u64 {
    call::table().find(|call| call.name == name).expect("a call of the table").number.into()
}

pub(crate) fn status(x0: u64) -> Status {
    Status::from_code(x0.cast_signed()).unwrap_or_else(|| panic!("{x0:#x} is no status"))
}

/// Whether Ravelin is there.
pub(crate) fn has_hypervisor() -> bool {
    call::hypervisor([number("UID"), 0, 0, 0]) == VENDOR_UID.map(u64::from)
}

/// What PAGE_STATE says of a page: its state and its pins.
pub(crate) type State = (PageStateCode, u64);

pub(crate) const OWNED: State = (PageStateCode::Owned, 0);
pub(crate) const SHARED: State = (PageStateCode::SharedOwned, 0);
pub(crate) const NO_PAGE: State = (PageStateCode::NoPage, 0);

/// Asks for the state of a page.
pub(crate) fn state(page: u64) -> Result<State, Failure> {
    let [x0, x1, x2, _] = call::hypervisor([number("PAGE_STATE"), page, 0, 0]);
    check_eq!(status(x0), Status::Success, "PAGE_STATE of {page:#x}");
    match PageStateCode::from_code(x1) {
        Some(code) => Ok((code, x2)),
        None => Err(Failure::new(format_args!("PAGE_STATE of {page:#x}: no state {x1:#x}"))),
    }
}

/// Checks the state of every page of a range.
pub(crate) fn check_state(address: u64, pages: u64, expected: State) -> Outcome {
    for page in (0..pages).map(|index| address + index * PAGE) {
        check_eq!(state(page)?, expected, "state of {page:#x}");
    }
    Ok(())
}

/// Lends the page for statistics to the hypervisor. It stays so.
pub(crate) fn prepare() {
    let (status, page) = Op::Share.call(platform().statistics, 1);
    assert_eq!(status, Status::Success, "SHARE of the page for statistics at {page:#x}");
}

/// Asks for the statistics.
pub(crate) fn statistics() -> Result<Statistics, Failure> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let page = platform().statistics;
    let [x0, x1, ..] = call::hypervisor([number("STATISTICS"), page, 0, 0]);
    check_eq!((status(x0), x1), (Status::Success, Statistics::SIZE as u64), "STATISTICS");
    let words = memory::words::<{ Statistics::SIZE / 8 }>(page);
    Ok(Statistics::from_bytes(words.map(u64::to_le_bytes).as_flattened()))
}

/// Pages by owner and state: host alone, lent, hypervisor, donated.
pub(crate) type Counts = [u64; 4];

/// Asks how many pages there are of each kind.
pub(crate) fn page_counts() -> Result<Counts, Failure> {
    let it = statistics()?;
    Ok([it.host_owned_pages, it.host_shared_pages, it.hypervisor_pages, it.donated_pages])
}

/// States and counts at one time, to see whether a refused call changed any.
pub(crate) struct Snapshot {
    states: ArrayVec<(u64, State), 40>,
    counts: Counts,
    invalidations: u64,
}

impl Snapshot {
    /// Looks at the ends of a range, at pages inside, and at those around it. Pages that no call can name are left out.
    pub(crate) fn take(address: u64, pages: u64) -> Result<Self, Failure> {
        let first = address / PAGE * PAGE;
        let last = first.saturating_add(pages.clamp(1, 1 << 18) * PAGE);
        let mut states = ArrayVec::new();
        for offset in 0..6 {
            for page in [
                first.saturating_add(offset * PAGE),
                first.saturating_sub(offset * PAGE),
                last.saturating_add(offset * PAGE),
                last.saturating_sub(offset * PAGE),
                first + (last - first) / 8 * offset / PAGE * PAGE,
            ] {
                if page < ravelin_abi::ADDRESS_END {
                    states.push((page, state(page)?));
                }
            }
        }
        Ok(Self { states, counts: page_counts()?, invalidations: statistics()?.stage2_invalidations })
    }

    /// Checks that nothing has changed.
    pub(crate) fn compare(&self, after: fmt::Arguments<'_>) -> Outcome {
        for &(page, before) in &self.states {
            check_eq!(state(page)?, before, "state of {page:#x} after {after}");
        }
        check_eq!(page_counts()?, self.counts, "pages by state after {after}");
        check_eq!(statistics()?.stage2_invalidations, self.invalidations, "stage 2 invalidations after {after}");
        Ok(())
    }
}

/// Free RAM for a test, aligned to its size. All of it is the host's when a test starts.
pub(crate) fn arena(size: u64) -> u64 {
    platform().free(size, size).expect("the table of tests says how much it needs").start
}

/// The part of RAM that the hypervisor keeps.
pub(crate) fn carve_out() -> Result<platform::Region, Failure> {
    platform().carve_out.ok_or_else(|| Failure::new(format_args!("the device tree reserves no memory for Ravelin")))
}

/// Takes a range back in as many calls as it takes.
pub(crate) fn take_back(address: u64, pages: u64) -> Outcome {
    let mut done = 0;
    while done < pages {
        let count = (pages - done).min(MAX_TAKE_BACK_PAGES);
        Op::TakeBack.succeeds(address + done * PAGE, count)?;
        done += count;
    }
    Ok(())
}

/// CPUs besides the boot CPU, which runs the tests: no more than it takes for CPUs to get in each other's way.
pub(crate) fn other_cpus() -> ArrayVec<usize, 3> {
    (1..platform().cpus.len()).take(3).collect()
}

/// Runs the closure on each CPU in turn.
pub(crate) fn on_each_cpu(body: impl Fn(usize) -> Outcome + Sync) -> Outcome {
    let this = cpu::this();
    for cpu in 0..platform().cpus.len() {
        let outcome = Mutex::new(Ok(()));
        let job = |cpu| *outcome.lock() = body(cpu);
        if cpu == this {
            job(cpu);
        } else {
            cpu::run_on(&[cpu], &job, || ());
        }
        let outcome = outcome.lock().clone();
        outcome.map_err(|failure| Failure::new(format_args!("on CPU {cpu}: {failure}")))?;
    }
    Ok(())
}

/// Runs the closure on all CPUs at the same time; returns the first failure.
pub(crate) fn on_all_cpus(body: impl Fn(usize) -> Outcome + Sync) -> Outcome {
    let outcome = Mutex::new(Ok(()));
    cpu::run_on_all(&|cpu| {
        if let Err(failure) = body(cpu) {
            let mut outcome = outcome.lock();
            if outcome.is_ok() {
                *outcome = Err(Failure::new(format_args!("on CPU {cpu}: {failure}")));
            }
        }
    });
    outcome.into_inner()
}

/// Counts as many rounds as it is worth, but not for longer than some seconds: an emulator with fewer CPUs than it emulates takes
/// long to hand a lock over.
pub(crate) fn for_a_while(rounds: u64) -> impl Iterator<Item = u64> {
    let effort = platform().effort();
    let deadline = read_register!("cntvct_el0") + 5 * effort * read_register!("cntfrq_el0");
    (0..rounds * effort).take_while(move |_| read_register!("cntvct_el0") < deadline)
}

/// Checks that all memory is the host's again but for the page with statistics, and makes it so if not, for the sake of the
/// next test.
pub(crate) fn restore() -> Outcome {
    let [_, shared, _, donated] = page_counts()?;
    let it = statistics()?;
    let of_vms =
        it.vm_pages + it.host_lent_pages + it.guest_private_pages + it.guest_offered_pages + it.guest_claimed_pages;
    check_eq!(of_vms, 0, "pages left with VMs");
    if (shared, donated) == (1, 0) {
        return Ok(());
    }
    for ram in &platform().ram {
        for page in (ram.start..ram.end).step_by(PAGE as usize).filter(|&page| page != platform().statistics) {
            let (code, pins) = state(page)?;
            match code {
                PageStateCode::NoPage => Op::TakeBack.succeeds(page, 1)?,
                PageStateCode::SharedOwned => {
                    for _ in 0..pins {
                        Op::Unpin.succeeds(page, 1)?;
                    }
                    Op::Unshare.succeeds(page, 1)?;
                }
                PageStateCode::Owned | PageStateCode::SharedBorrowed => {}
            }
        }
    }
    Err(Failure::new(format_args!("{} pages left shared, {donated} donated", shared - 1)))
}
