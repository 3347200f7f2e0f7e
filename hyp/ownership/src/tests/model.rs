//! Random operations, most of them hostile, against a model of one record per page.

use proptest::{collection::vec, prelude::*};

use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Host {
        shared: bool,
        pins: u64,
    },
    /// The hypervisor has borrowed it.
    Borrowed,
    CarveOut,
    Donated,
}

/// What the operations mean, page by page.
struct Model {
    /// Pages of RAM, by address.
    pages: std::collections::BTreeMap<u64, Page>,
    reserved: Vec<PhysRange>,
    contents: std::collections::BTreeMap<u64, u64>,
}

impl Model {
    fn new(layout: &Layout) -> Self {
        let ram = layout.ram.iter().flat_map(|range| range.iter());
        let page = |page: PhysAddr| {
            let owner =
                if layout.carve_out.contains(page) { Page::CarveOut } else { Page::Host { shared: false, pins: 0 } };
            (page.raw(), owner)
        };
        Self { pages: ram.map(page).collect(), reserved: layout.reserved.clone(), contents: Default::default() }
    }

    fn next(call: Call, page: Page) -> Result<Page, Reason> {
        use Page::{Borrowed, Donated, Host};
        match (call, page) {
            (Share, Host { shared: false, pins }) => Ok(Host { shared: true, pins }),
            (Unshare, Host { shared: true, pins: 0 }) => Ok(Host { shared: false, pins: 0 }),
            (Unshare, Host { shared: true, .. }) => Err(Reason::Busy),
            (Donate, Host { shared: false, .. }) => Ok(Donated),
            (TakeBack, Donated) => Ok(Host { shared: false, pins: 0 }),
            (Pin, Host { shared: true, pins }) => Ok(Host { shared: true, pins: pins + 1 }),
            (Unpin, Host { shared: true, pins: 1.. }) => {
                let Host { pins, .. } = page else { unreachable!() };
                Ok(Host { shared: true, pins: pins - 1 })
            }
            (Borrow, Host { shared: false, .. }) => Ok(Borrowed),
            (Return, Borrowed) => Ok(Host { shared: false, pins: 0 }),
            _ => Err(Reason::Denied),
        }
    }

    fn call(&mut self, call: Call, range: PhysRange) -> Result<(), Failure> {
        let range = if matches!(call, Borrow | Return) { PhysRange::single(range.base()) } else { range };
        let mut after = Vec::new();
        for page in range.iter() {
            let next = match self.pages.get(&page.raw()) {
                Some(&owner) => Self::next(call, owner),
                None => Err(Reason::NotRam),
            };
            after.push((page.raw(), next.map_err(|reason| Failure { reason, page })?));
        }
        if call == TakeBack {
            self.contents.retain(|&page, _| !range.contains(addr(page)));
        }
        self.pages.extend(after);
        Ok(())
    }

    fn host_may(&self, page: u64) -> bool {
        match self.pages.get(&page) {
            Some(owner) => matches!(owner, Page::Host { .. } | Page::Borrowed),
            None => page < 1 << IPA_BITS && !self.reserved.iter().any(|range| range.contains(addr(page))),
        }
    }

    fn in_el2(&self, page: u64) -> bool {
        matches!(self.pages.get(&page), Some(Page::Donated | Page::Borrowed | Page::Host { pins: 1.., .. }))
    }

    fn state(&self, page: u64) -> (HostState, u64) {
        match self.pages.get(&page) {
            Some(&Page::Host { shared: false, pins }) => (HostState::Owned, pins),
            Some(&Page::Host { shared: true, pins }) => (HostState::SharedOwned, pins),
            Some(Page::Borrowed) => (HostState::SharedOwned, 0),
            _ => (HostState::NoPage, 0),
        }
    }
}

#[derive(Clone, Debug)]
enum Action {
    Call(Call, u64, u64),
    /// The host touches a page and writes to it if it gets through.
    Touch(u64),
}

fn address() -> impl Strategy<Value = u64> {
    let near = prop_oneof![
        6 => Just(GIB),
        4 => Just(GIB + 2 * MIB),
        2 => Just(GIB + 28 * MIB),
        1 => Just(GIB + 30 * MIB),
        1 => Just(GIB + 32 * MIB),
        3 => Just(3 * GIB),
        2 => Just(3 * GIB + 4 * MIB),
        1 => Just(3 * GIB + 1504 * PAGE),
        1 => Just(0x900_0000),
        1 => Just((1 << 40) - 16 * PAGE),
    ];
    let offset = prop_oneof![3 => Just(0), 3 => 0..8_u64, 1 => 500..520_u64];
    (near, offset).prop_map(|(near, offset)| near + offset * PAGE)
}

fn action() -> impl Strategy<Value = Action> {
    let length = prop_oneof![4 => 1..6_u64, 2 => Just(512), 1 => 505..530_u64, 1 => Just(1024), 1 => 1400..2000_u64];
    let call = prop_oneof![6 => prop::sample::select(&CALLS[..]), 2 => Just(Borrow), 1 => Just(Return)];
    prop_oneof![
        4 => (call, address(), length).prop_map(|(call, base, pages)| Action::Call(call, base, pages)),
        1 => address().prop_map(Action::Touch),
    ]
}

fn run(tables: u64, actions: Vec<Action>) {
    let layout = Layout { tables, ..small() };
    let mut store = Store::for_ram(&layout.ram);
    let rig = Rig::new(&layout, &mut store);
    let mut model = Model::new(&layout);
    for action in actions {
        match action {
            Action::Call(call, base, pages) => {
                let before = rig.everything();
                let _ = rig.machine.take_log();
                let result = rig.call(call, range(base, pages));
                let log = rig.machine.take_log();
                if result == fails(Reason::NoMemory, base) {
                    assert!(tables < 64, "there was enough memory");
                } else {
                    assert_eq!(result, model.call(call, range(base, pages)), "{call:?} {base:#x}, {pages} pages");
                }
                if result.is_err() {
                    assert!(rig.everything() == before, "{call:?} failed and changed something");
                    assert_eq!(log, []);
                }
                let of = |op: fn(&Op) -> bool| log.iter().filter(|&logged| op(logged)).count();
                assert!(of(|op| matches!(op, Op::InvalidateEl2(_))) <= 1);
                let evicted = of(|op| matches!(op, Op::InvalidateStage2All(_)));
                assert!(of(|op| matches!(op, Op::InvalidateStage2(..))) + evicted <= 1 + evicted.min(1));
            }
            Action::Touch(page) => {
                let may = model.host_may(page);
                assert_eq!(rig.touch(page) == HostFault::Resolved, may, "{page:#x}");
                if may {
                    rig.machine.poke(addr(page), page);
                    model.contents.insert(page, page);
                }
            }
        }
        rig.check();
        // All pages near borders of blocks, and some between.
        let sampled = |page: u64| matches!(page / PAGE % 512, 0..24 | 496..) || (page / PAGE).is_multiple_of(61);
        for &page in model.pages.keys().filter(|&&page| sampled(page)) {
            assert_eq!(rig.state(page), model.state(page), "{page:#x}");
            assert_eq!(rig.el2_reaches(page), model.in_el2(page), "{page:#x}");
            assert!(!rig.host_reaches(page) || model.host_may(page), "{page:#x}");
            assert_eq!(rig.machine.peek(addr(page)), model.contents.get(&page).copied().unwrap_or(0), "{page:#x}");
        }
    }
    let counts = rig.counts();
    let count =
        |state: fn(Page) -> bool| u64::try_from(model.pages.values().filter(|&&page| state(page)).count()).unwrap();
    assert_eq!(counts.host_owned, count(|page: Page| matches!(page, Page::Host { shared: false, .. })));
    assert_eq!(
        counts.host_shared,
        count(|page: Page| matches!(page, Page::Host { shared: true, .. } | Page::Borrowed))
    );
    assert_eq!(counts.hyp_owned, count(|page: Page| page == Page::CarveOut));
    assert_eq!(counts.hyp_donated, count(|page: Page| page == Page::Donated));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn memory_follows_the_model(actions in vec(action(), 1..40)) {
        run(256, actions);
    }

    #[test]
    fn memory_follows_the_model_when_tables_are_scarce(
        actions in vec(action(), 1..40),
        tables in 33..40_u64,
    ) {
        run(tables, actions);
    }
}
