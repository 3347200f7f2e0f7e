//! Whether the model sees what is wrong: calls that end otherwise than they have to, and tables that are not as they should be.

use core::{cell::RefCell, ops::Range};

use alloc::{boxed::Box, vec, vec::Vec};
use ravelin_abi::{CALLS, Status, VmAttributes, VmKind};

use crate::{
    Counts, Door, Found, GuestCall, Model, PAGE_SIZE, Real, Sizes,
    state::{Page, Place, State},
};

const RAM: Range<u64> = 0x4000_0000..0x4040_0000;
const CARVE_OUT: Range<u64> = 0x4020_0000..0x4040_0000;
const SIZES: Sizes = Sizes { vm: 4, vcpu: 2, alignment: 2 };

/// Something that a mirror has differently.
type Change<T> = Option<Box<dyn Fn(u64, T) -> T>>;

/// What is wrong, and how a mirror gets so.
type Wrong<'a> = (&'a str, &'a dyn Fn(&mut Mirror));

/// What is real: all that the model says, but for some changes.
#[derive(Default)]
struct Mirror {
    state: RefCell<Option<State>>,
    entry: Change<Page>,
    host: Change<Found>,
    hypervisor: Change<Found>,
    guest: Change<Found>,
    counts: Counts,
    dirty: Vec<u64>,
}

fn change<T>(change: &Change<T>, page: u64, value: T) -> T {
    match change {
        Some(change) => change(page, value),
        None => value,
    }
}

impl Mirror {
    fn page(&self, page: u64) -> Option<Page> {
        self.state.borrow().as_ref().and_then(|state| state.pages.get(page))
    }
}

impl Real for Mirror {
    fn pages(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Page)) {
        for page in pages {
            if let Some(found) = self.page(page) {
                let slot = |Place { vm, frame }| Place { vm: self.slot(vm), frame };
                let named = match found {
                    Page::Lent(place) => Page::Lent(slot(place)),
                    Page::Private(place) => Page::Private(slot(place)),
                    Page::Pinned(place) => Page::Pinned(slot(place)),
                    Page::Offered(place) => Page::Offered(slot(place)),
                    Page::Claimed(place) => Page::Claimed(slot(place)),
                    other => other,
                };
                f(page..page + 1, change(&self.entry, page, named));
            }
        }
    }

    fn host(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found)) {
        for page in pages {
            let found = match self.page(page) {
                Some(page_state) if page_state.host_may() => Found::Memory(page),
                Some(_) => Found::Absent,
                None => Found::Device(page),
            };
            f(page..page + 1, change(&self.host, page, found));
        }
    }

    fn hypervisor(&self, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found)) {
        for page in pages {
            let is_mapped = self.page(page).is_some_and(Page::hypervisor_has);
            let found = if is_mapped { Found::Memory(page) } else { Found::Absent };
            f(page..page + 1, change(&self.hypervisor, page, found));
        }
    }

    fn guest(&self, handle: u64, pages: Range<u64>, f: &mut dyn FnMut(Range<u64>, Found)) {
        let state = self.state.borrow();
        let Some(state) = &*state else { return };
        let vm = &state.vms[&handle];
        // Frames without anything go together, of which there are many.
        for (part, frame) in state.look(vm, pages) {
            for page in part.clone().take(4096) {
                let found = match frame {
                    crate::state::Frame::Absent => Found::Absent,
                    crate::state::Frame::Poisoned => Found::Poisoned,
                    crate::state::Frame::Page(backing, _) => Found::Memory(backing.0 + (page - part.start)),
                };
                f(page..page + 1, change(&self.guest, page, found));
            }
        }
    }

    fn counts(&self) -> Counts {
        self.counts
    }

    fn slot(&self, handle: u64) -> u64 {
        handle & 0xff
    }

    fn is_zero(&self, page: u64) -> bool {
        !self.dirty.contains(&page)
    }
}

fn new() -> Model {
    Model::new([RAM], CARVE_OUT, |_| SIZES)
}

/// Returns the registers of a call.
fn registers(name: &str, arguments: &[u64]) -> [u64; 7] {
    let number = CALLS.iter().find(|call| call.name == name).unwrap().number;
    let mut registers = [0x5a; 7];
    registers[0] = number.into();
    registers[1..=arguments.len()].copy_from_slice(arguments);
    registers
}

/// The model is told of a call that ended with these first results, the others being as they were.
fn call(model: &mut Model, name: &str, arguments: &[u64], results: &[u64]) -> Result<&'static str, crate::Difference> {
    let before = registers(name, arguments);
    let mut after = [before[0], before[1], before[2], before[3]];
    after[..results.len()].copy_from_slice(results);
    model.host_call(&Mirror::default(), 0, before, after).map(|reached| reached.state)
}

fn succeeds(model: &mut Model, name: &str, arguments: &[u64]) {
    call(model, name, arguments, &[0, 0]).unwrap();
}

/// The model accepts this end of a call, and no other of these.
fn ends(model: &mut Model, name: &str, arguments: &[u64], status: Status, x1: u64) {
    for other in [Status::Success, Status::Denied, Status::NotRam, Status::Busy, Status::Limit, Status::Absent] {
        if other != status {
            assert!(call(&mut model.clone(), name, arguments, &[other.register(), x1]).is_err(), "{name}: {other:?}");
        }
    }
    assert!(call(&mut model.clone(), name, arguments, &[status.register(), x1 ^ 0x1000]).is_err(), "{name}");
    let before = model.state.clone();
    call(model, name, arguments, &[status.register(), x1]).unwrap();
    assert_eq!(model.state, before, "{name}");
}

const PAGE: u64 = RAM.start;

#[test]
fn the_hosts_own_pages() {
    let mut model = new();
    let third = PAGE + 2 * PAGE_SIZE;
    succeeds(&mut model, "SHARE", &[third, 1, 0]);
    ends(&mut model, "SHARE", &[PAGE, 4, 0], Status::Denied, third);
    ends(&mut model, "UNPIN", &[third, 1, 0], Status::Denied, third);
    for _ in 0..Page::MOST_PINS {
        succeeds(&mut model, "PIN", &[third, 1, 0]);
    }
    ends(&mut model, "PIN", &[third, 1, 0], Status::Limit, third);
    ends(&mut model, "UNSHARE", &[third, 1, 0], Status::Busy, third);
    ends(&mut model, "DONATE", &[CARVE_OUT.start - PAGE_SIZE, 2, 0], Status::Denied, CARVE_OUT.start);
    ends(&mut model, "DONATE", &[RAM.end, 1, 0], Status::NotRam, RAM.end);
    ends(&mut model, "SHARE", &[PAGE, 0, 0], Status::Invalid, 0);
    // All arguments are looked at for one error before any is for the next.
    ends(&mut model, "SHARE", &[PAGE + 1, 0, 1], Status::Reserved, 0);
    ends(&mut model, "SHARE", &[PAGE + 1, 0, 0], Status::Unaligned, 0);
    ends(&mut model, "SHARE", &[PAGE, u64::MAX, 0], Status::Overflow, 0);
    assert!(call(&mut model, "PAGE_STATE", &[third, 0], &[0, 2, 4094]).is_err());
    assert!(call(&mut model, "PAGE_STATE", &[third, 0], &[0, 2, 4095]).is_ok());
}

#[test]
fn registers_without_a_result_stay() {
    let before = registers("SHARE", &[PAGE, 1, 0]);
    let judge = |after| new().host_call(&Mirror::default(), 0, before, after);
    assert!(judge([0, 0, 1, 0]).is_ok());
    assert!(judge([0, 0, 2, 0]).is_err());
    assert!(judge([1, 0, 1, 0]).is_err(), "no status");
    // What is no call changes x0 alone.
    assert!(new().host_call(&Mirror::default(), 1, before, [u64::MAX, PAGE, 1, 0]).is_ok());
    assert!(new().host_call(&Mirror::default(), 1, before, [0, 0, 1, 0]).is_err());
}

const HANDLE: u64 = 0x107;
const FRAME: u64 = 0x8000_0000;

/// A VM with four pages.
fn with_vm(kind: VmKind) -> Model {
    let mut model = new();
    let attributes = VmAttributes { kind, ipa_bits: 40, vcpus: 1 }.bits();
    call(&mut model, "VM_CREATE", &[attributes, PAGE, 4], &[0, HANDLE]).unwrap();
    assert!(call(&mut model.clone(), "VM_CREATE", &[attributes, PAGE + 0x8000, 4], &[0, HANDLE]).is_err(), "used");
    succeeds(&mut model, "VM_MAP", &[HANDLE, FRAME, PAGE + 0x1_0000, 4]);
    model
}

/// What a call may answer in place of its result depends on how far it has come.
#[test]
fn what_is_missing() {
    let mut model = with_vm(VmKind::Pkvm);
    let (free, taken) = (PAGE + 0x2_0000, CARVE_OUT.start);
    let mut may = |name, arguments: &[u64], status: Status, x1| {
        call(&mut model, name, arguments, &[status.register(), x1]).is_ok()
    };
    let map = [HANDLE, 0, free, 1];
    assert!(may("VM_MAP", &map, Status::NeedsTables, 1));
    assert!(!may("VM_MAP", &map, Status::NeedsTables, 0), "none is missing");
    assert!(may("VM_MAP", &map, Status::NoMemory, 0) && !may("VM_MAP", &map, Status::NoMemory, 1));
    let vcpu = |metadata, run_page| [HANDLE, 0, metadata, 2, run_page];
    let lacks = |arguments: [u64; 5]| (arguments, Status::NoMemory, 0);
    for ((arguments, status, x1), is_right) in [
        (lacks(vcpu(free, free + 2 * PAGE_SIZE)), true),
        (lacks(vcpu(taken, free)), true),
        ((vcpu(taken, free), Status::Denied, taken), true),
        (lacks(vcpu(free, taken)), false),
        (lacks([HANDLE, 1, free, 2, free + 2 * PAGE_SIZE]), false),
    ] {
        assert_eq!(may("VCPU_CREATE", &arguments, status, x1), is_right, "{arguments:x?} {status:?}");
    }
}

/// RAM may begin at address 0, where no table can be.
#[test]
fn tables_at_the_first_address() {
    let mut model = Model::new(core::iter::once(0..0x10_0000), 0x8_0000..0x10_0000, |_| SIZES);
    let attributes = VmAttributes { kind: VmKind::Pkvm, ipa_bits: 40, vcpus: 1 }.bits();
    call(&mut model, "VM_CREATE", &[attributes, 0x1_0000, 4], &[0, HANDLE]).unwrap();
    ends(&mut model, "VM_DONATE_TABLES", &[HANDLE, 0x8_0000, 1], Status::Denied, 0x8_0000);
    assert!(call(&mut model.clone(), "VM_DONATE_TABLES", &[HANDLE, 0, 2], &[0, 0]).is_err());
    call(&mut model, "VM_DONATE_TABLES", &[HANDLE, 0, 2], &[Status::Denied.register(), 0]).unwrap();
    succeeds(&mut model, "VM_DONATE_TABLES", &[HANDLE, 0x1000, 2]);
}

fn guest_call(model: &mut Model, door: Door, before: [u64; 4], after: [u64; 4]) -> bool {
    model.guest_call(&GuestCall { root: PAGE / PAGE_SIZE, door, before, after }).is_ok()
}

#[test]
fn conversion_in_place() {
    let mut model = with_vm(VmKind::Pkvm);
    let (share, unshare) = (0xc600_0003, 0xc600_0004);
    let guest = |model: &mut Model, call, after| guest_call(model, Door::Hvc, [call, FRAME, 2, 0], after);
    let failed = (-3_i64).cast_unsigned();
    ends(&mut model, "CLAIM", &[HANDLE, FRAME, 2], Status::NotOffered, FRAME);
    assert!(!guest(&mut model, unshare, [0, 2, 0, 0]), "it is private");
    assert!(!guest(&mut model, share, [0, 1, 0, 0]), "a short range is done as a whole");
    assert!(!guest(&mut model, share, [share, FRAME, 2, 0]), "nothing is missing");
    assert!(guest(&mut model, share, [0, 2, 0, 0]));
    assert!(guest(&mut model, share, [failed, 0, 0, 0]), "it is shared already");
    succeeds(&mut model, "CLAIM", &[HANDLE, FRAME + PAGE_SIZE, 1]);
    assert!(!guest(&mut model, unshare, [0, 2, 0, 0]), "the host has access");
    assert!(guest(&mut model, unshare, [unshare, FRAME, 2, 0]), "and is asked to end it");
    let mut refused = model.clone();
    assert!(call(&mut refused, "VM_RECLAIM", &[HANDLE, FRAME, 4], &[0, 4]).is_err(), "it lives");
    succeeds(&mut model, "RELEASE", &[HANDLE, FRAME + PAGE_SIZE, 1]);
    assert!(guest(&mut model, unshare, [0, 2, 0, 0]));
    succeeds(&mut model, "FORCE_RECLAIM", &[PAGE + 0x1_0000, 1]);
    ends(&mut model, "VM_MAP", &[HANDLE, FRAME, PAGE + 0x2_0000, 1], Status::Poisoned, PAGE + 0x2_0000);
    succeeds(&mut model, "VM_TEARDOWN", &[HANDLE]);
    call(&mut model, "VM_RECLAIM", &[HANDLE, FRAME, 4], &[0, 4]).unwrap();
    assert_eq!(model.state.pages.get((PAGE + 0x1_3000) / PAGE_SIZE), Some(Page::Host));
    // The tables say whether it is back.
    let before = registers("VM_DESTROY", &[HANDLE]);
    let back = model.clone();
    model.host_call(&Mirror::default(), 0, before, [0, 0, before[2], before[3]]).unwrap();
    assert_eq!(model.counts().host, 512);
    let mut model = back;
    assert!(model.host_call(&Mirror::default(), 0, before, [0, 1, before[2], before[3]]).is_err());
}

#[test]
fn a_realm_does_part_by_part() {
    let mut model = with_vm(VmKind::Realm);
    let set = |model: &mut Model, pages: u64, state, after: [u64; 2]| {
        let before = [0xc400_0197, FRAME, FRAME + pages * PAGE_SIZE, state];
        guest_call(model, Door::Smc, before, [0, after[0], after[1], state])
    };
    let next = |pages: u64| FRAME + pages * PAGE_SIZE;
    assert!(set(&mut model, 2, 0, [next(2), 0]));
    assert!(!set(&mut model, 4, 0, [next(3), 0]), "what is shared already is passed over by itself");
    assert!(set(&mut model, 4, 0, [next(2), 0]));
    assert!(!set(&mut model, 2, 0, [next(3), 0]), "more than there is");
    assert!(set(&mut model, 1, 1, [next(1), 0]));
    let get = |model: &mut Model, top, state| {
        guest_call(model, Door::Smc, [0xc400_0198, FRAME, next(2), 7], [0, top, state, 7])
    };
    assert!(get(&mut model, next(1), 1));
    assert!(!get(&mut model, next(2), 1), "the second is shared");
    assert!(!get(&mut model, next(1), 0));
}

/// A mirror of a model with something wrong is seen.
#[test]
fn tables_that_are_wrong() {
    let mut model = with_vm(VmKind::Pkvm);
    let mirror = |model: &Model| Mirror {
        state: RefCell::new(Some(model.state.clone())),
        counts: model.counts(),
        ..Mirror::default()
    };
    assert_eq!(model.compare_all(&mirror(&model)), Ok(()));
    let number = (PAGE + 0x1_0000) / PAGE_SIZE;
    let is = move |page: u64| page == number + 2;
    let wrong: [Wrong<'_>; 9] = [
        ("an entry in another state", &|mirror| {
            mirror.entry = Some(Box::new(move |page, found| if is(page) { Page::Host } else { found }));
        }),
        ("an entry with another frame", &|mirror| {
            let other = Page::Private(Place { vm: 7, frame: 1 });
            mirror.entry = Some(Box::new(move |page, found| if is(page) { other } else { found }));
        }),
        ("a page that the host has mapped", &|mirror| {
            mirror.host = Some(Box::new(move |page, found| if is(page) { Found::Memory(page) } else { found }));
        }),
        ("a page that the host has mapped elsewhere", &|mirror| {
            mirror.host = Some(Box::new(move |page, found| if page == number + 9 { Found::Memory(1) } else { found }));
        }),
        ("a page that the host has mapped as a device", &|mirror| {
            mirror.host =
                Some(Box::new(move |page, found| if page == number + 9 { Found::Device(page) } else { found }));
        }),
        ("a page that EL2 has mapped", &|mirror| {
            mirror.hypervisor = Some(Box::new(move |page, found| if is(page) { Found::Memory(page) } else { found }));
        }),
        ("a page that EL2 lacks", &|mirror| {
            let first = PAGE / PAGE_SIZE;
            mirror.hypervisor = Some(Box::new(move |page, found| if page == first { Found::Absent } else { found }));
        }),
        ("a page that the guest lacks", &|mirror| {
            let frame = FRAME / PAGE_SIZE + 2;
            mirror.guest = Some(Box::new(move |page, found| if page == frame { Found::Absent } else { found }));
        }),
        ("a page that the guest has in another frame", &|mirror| {
            let frame = FRAME / PAGE_SIZE + 4;
            mirror.guest = Some(Box::new(move |page, found| if page == frame { Found::Memory(number) } else { found }));
        }),
    ];
    for (what, wrong) in wrong {
        let mut mirror = mirror(&model);
        wrong(&mut mirror);
        assert!(model.compare_all(&mirror).is_err(), "{what}");
        // The last call was about these frames and pages.
        assert!(model.compare(&mirror).is_err(), "{what}");
    }
    // Devices are where they are to the hypervisor.
    model.host_fault(RAM.end, true).unwrap();
    assert_eq!(model.compare(&mirror(&model)), Ok(()));
    let elsewhere = |page, found| if page == RAM.end / PAGE_SIZE { Found::Device(page + 1) } else { found };
    assert!(model.compare(&Mirror { host: Some(Box::new(elsewhere)), ..mirror(&model) }).is_err(), "a device");
    let counts = Counts { private: 3, ..model.counts() };
    assert!(model.compare_all(&Mirror { counts, ..mirror(&model) }).is_err(), "counts");
    // What was scrubbed and is not.
    succeeds(&mut model, "FORCE_RECLAIM", &[PAGE + 0x1_0000, 2]);
    assert_eq!(model.compare(&mirror(&model)), Ok(()));
    assert!(model.compare(&Mirror { dirty: vec![number + 1], ..mirror(&model) }).is_err(), "contents");
}

/// Poison that is lost is seen, and so is what both views of a realm have.
#[test]
fn poison_that_is_wrong() {
    for kind in [VmKind::Pkvm, VmKind::Realm] {
        let mut model = with_vm(kind);
        succeeds(&mut model, "FORCE_RECLAIM", &[PAGE + 0x1_0000, 2]);
        let mirror = |guest: Change<Found>| Mirror {
            state: RefCell::new(Some(model.state.clone())),
            guest,
            counts: model.counts(),
            ..Mirror::default()
        };
        assert_eq!(model.compare(&mirror(None)), Ok(()));
        let frame = FRAME / PAGE_SIZE + 1;
        let alias = model.state.vms[&HANDLE].frame_count() + frame;
        let lost = move |page: u64, found| if page == frame { Found::Absent } else { found };
        assert!(model.compare(&mirror(Some(Box::new(lost)))).is_err(), "{kind:?}: lost");
        if kind == VmKind::Realm {
            let twice = move |page: u64, found| if page == alias { Found::Poisoned } else { found };
            assert!(model.compare(&mirror(Some(Box::new(twice)))).is_err(), "twice");
            let in_alias = move |page: u64, found| lost(page, twice(page, found));
            assert_eq!(model.compare(&mirror(Some(Box::new(in_alias)))), Ok(()));
        }
    }
}

#[test]
fn accesses_of_the_host() {
    let mut model = new();
    assert!(model.host_fault(PAGE + 5, true).is_ok());
    assert!(model.host_fault(PAGE, false).is_err());
    succeeds(&mut model, "DONATE", &[PAGE, 1, 0]);
    assert!(model.host_fault(PAGE, true).is_err());
    assert!(model.host_fault(PAGE, false).is_ok());
    // No table has anything there.
    assert!(model.host_fault(u64::MAX, false).is_ok() && model.touched.pages.is_empty());
}
