//! Small traces: good ones, and bad ones next to them.

use crate::{Barrier, Checker, Dsb, Entry, Fault, Hint, MemOrder, Record, Sysreg, TlbiOp};

const ROOT: u64 = 0x1000;
const L2: u64 = 0x2000;
const L3: u64 = 0x3000;
const SPARE: u64 = 0x4000;
const OTHER_ROOT: u64 = 0x5000;
const LOCK: u64 = 0x100;
const OTHER_LOCK: u64 = 0x200;
/// Of a root that is in regions.
const GROUP: u64 = 0x7000;

/// 39 bits of stage 2: one root of level 1.
const VTCR: u64 = 0x8002_3559;
/// 39 bits of EL2 stage 1.
const TCR: u64 = 0x8082_3519;
const VTTBR: u64 = 1 << 48 | ROOT;
const OTHER_VTTBR: u64 = 2 << 48 | OTHER_ROOT;

const PAGE: u64 = 0x8000_0403;
const BLOCK: u64 = 0x4000_0401;

fn init(address: u64) -> Record {
    Record::MemInit { address, size: 0x1000 }
}

fn free(address: u64) -> Record {
    Record::MemFree { address, size: 0x1000 }
}

fn owner(table: u64, root: u64) -> Record {
    Record::Hint { kind: Hint::SetOwnerRoot, location: table, value: root }
}

fn root_lock(root: u64, lock: u64) -> Record {
    Record::Hint { kind: Hint::SetRootLock, location: root, value: lock }
}

fn release(root: u64) -> Record {
    Record::Hint { kind: Hint::ReleaseTable, location: root, value: 0 }
}

fn write(table: u64, index: u64, value: u64) -> Record {
    Record::MemWrite { order: MemOrder::Plain, address: table + 8 * index, value }
}

fn link(table: u64, index: u64, next: u64) -> Record {
    write(table, index, next | 0b11)
}

fn dsb(kind: Dsb) -> Record {
    Record::Barrier(Barrier::Dsb(kind))
}

fn tlbi(op: TlbiOp, operand: u64) -> Record {
    Record::Tlbi { op, operand }
}

fn set(register: Sysreg, value: u64) -> Record {
    Record::SysregWrite { register, value }
}

const ISB: Record = Record::Barrier(Barrier::Isb);
const DSB: Record = Record::Barrier(Barrier::Dsb(Dsb::Ish));
const PUBLISH: Record = Record::Barrier(Barrier::Dsb(Dsb::Ishst));
const TAKE: Record = Record::Lock(LOCK);
const LEAVE: Record = Record::Unlock(LOCK);
const STAGE1: Record = Record::Tlbi { op: TlbiOp::Vmalle1is, operand: 0 };

/// A stage 2 in use on CPU 0, with pages 0 and 1 and a block at 2 MiB.
fn stage2() -> Vec<Record> {
    vec![
        init(ROOT),
        init(L2),
        init(L3),
        root_lock(ROOT, LOCK),
        owner(ROOT, ROOT),
        owner(L2, ROOT),
        owner(L3, ROOT),
        TAKE,
        link(L2, 0, L3),
        PUBLISH,
        link(ROOT, 0, L2),
        write(L3, 0, PAGE),
        write(L3, 1, PAGE + 0x1000),
        write(L2, 1, BLOCK),
        PUBLISH,
        LEAVE,
        set(Sysreg::VtcrEl2, VTCR),
        set(Sysreg::VttbrEl2, VTTBR),
        ISB,
    ]
}

/// The same for EL2, less the block.
fn el2() -> Vec<Record> {
    let mut records = stage2();
    records.truncate(16);
    records.extend([set(Sysreg::Ttbr0El2, ROOT), set(Sysreg::TcrEl2, TCR), ISB, set(Sysreg::SctlrEl2, 1), ISB]);
    records
}

/// Takes page 0 of [`stage2`] away.
fn unmap() -> Vec<Record> {
    vec![TAKE, write(L3, 0, 0), PUBLISH, tlbi(TlbiOp::Ipas2e1is, 0), DSB, STAGE1, DSB, LEAVE]
}

/// All faults of a trace of several CPUs.
fn faults_of(records: impl IntoIterator<Item = (u8, Record)>) -> Vec<Fault> {
    let mut checker = Checker::new();
    let entries = (7..).zip(records).map(|(id, (tid, record))| Entry { id, tid, record });
    entries.filter_map(|entry| checker.record(&entry).err()).map(|violation| violation.fault).collect()
}

/// All faults of what CPU 0 does after `before`.
fn faults(before: Vec<Record>, records: impl IntoIterator<Item = Record>) -> Vec<Fault> {
    faults_of(before.into_iter().chain(records).map(|record| (0, record)))
}

fn without(mut records: Vec<Record>, index: usize) -> Vec<Record> {
    records.remove(index);
    records
}

fn with(mut records: Vec<Record>, index: usize, record: Record) -> Vec<Record> {
    records[index] = record;
    records
}

#[test]
fn the_whole_sequence_is_good() {
    assert_eq!(faults(stage2(), unmap()), []);
    let again = [TAKE, write(L3, 0, PAGE), PUBLISH, LEAVE];
    assert_eq!(faults(stage2(), unmap().into_iter().chain(again)), []);
    let all = with(unmap(), 3, tlbi(TlbiOp::Vmalls12e1is, 0));
    assert_eq!(faults(stage2(), without(without(all, 4), 4)), []);
}

#[test]
fn each_step_of_the_sequence_is_missed() {
    let missing = [
        (0, Fault::Unlocked),
        (2, Fault::NotPublished),
        (3, Fault::NotInvalidated),
        (4, Fault::NotFinished),
        (5, Fault::NotInvalidated),
        (6, Fault::NotFinished),
    ];
    for (index, expected) in missing {
        let found = faults(stage2(), without(unmap(), index));
        assert_eq!(found[0], expected, "without step {index}: {found:?}");
    }
}

#[test]
fn barriers_of_another_kind_do_not_do() {
    assert_eq!(faults(stage2(), with(unmap(), 2, dsb(Dsb::Sy))), []);
    assert_eq!(faults(stage2(), with(unmap(), 2, dsb(Dsb::Nsh)))[0], Fault::NotPublished);
    assert_eq!(faults(stage2(), with(unmap(), 4, dsb(Dsb::Ishst)))[0], Fault::NotFinished);
    assert_eq!(faults(stage2(), with(unmap(), 6, dsb(Dsb::Ishst))), [Fault::NotFinished]);
    assert_eq!(faults(stage2(), with(unmap(), 6, dsb(Dsb::Nsh))), [Fault::NotFinished]);
    assert_eq!(faults(stage2(), with(unmap(), 6, ISB)), [Fault::NotFinished]);
}

#[test]
fn the_barrier_of_another_cpu_does_not_do() {
    for (index, fault) in [(2, Fault::NotPublished), (4, Fault::NotFinished), (6, Fault::NotFinished)] {
        let records = stage2().into_iter().chain(unmap()).enumerate();
        let other = stage2().len() + index;
        let found = faults_of(records.map(|(at, record)| (u8::from(at == other), record)));
        assert_eq!(found[0], fault, "step {index}");
    }
}

#[test]
fn invalidations_of_something_else() {
    let other_page = with(unmap(), 3, tlbi(TlbiOp::Ipas2e1is, 1));
    assert_eq!(faults(stage2(), other_page), [Fault::TooNarrow]);
    let only_this_cpu = with(unmap(), 3, tlbi(TlbiOp::Vmalls12e1, 0));
    assert_eq!(faults(stage2(), only_this_cpu), [Fault::NotInvalidated]);
    let el2 = with(unmap(), 3, tlbi(TlbiOp::Vae2is, 0));
    assert_eq!(faults(stage2(), el2), [Fault::NotInvalidated]);
}

#[test]
fn a_block_goes_by_any_of_its_addresses() {
    let of_block = with(unmap(), 1, write(L2, 1, 0));
    assert_eq!(faults(stage2(), with(of_block.clone(), 3, tlbi(TlbiOp::Ipas2le1is, 0x3ff))), []);
    assert_eq!(faults(stage2(), with(of_block, 3, tlbi(TlbiOp::Ipas2le1is, 0x400))), [Fault::TooNarrow]);
}

#[test]
fn invalidations_of_another_level() {
    let of_level = |level: u64| faults(stage2(), with(unmap(), 3, tlbi(TlbiOp::Ipas2e1is, (0b0100 | level) << 44)));
    assert_eq!(of_level(3), []);
    assert_eq!(of_level(2), [Fault::TooNarrow]);
    assert_eq!(of_level(1), [Fault::TooNarrow]);
}

#[test]
fn invalidations_under_another_vmid() {
    let mut records = unmap();
    records.splice(3..3, [dsb(Dsb::Nsh), set(Sysreg::VttbrEl2, OTHER_VTTBR), ISB]);
    assert_eq!(faults(stage2(), records), [Fault::OtherVmid]);

    // The other stage 2 is where the CPU is, and it changes to this one for the purpose.
    let mut records = unmap();
    records.splice(3..3, [set(Sysreg::VttbrEl2, VTTBR), ISB]);
    records.splice(0..0, [set(Sysreg::VttbrEl2, OTHER_VTTBR), ISB]);
    assert_eq!(faults(stage2(), records.clone()), []);
    assert_eq!(faults(stage2(), without(records, 6))[0], Fault::NotSynchronised);
}

#[test]
fn the_vmid_stays_until_the_invalidation_is_done() {
    let changed = |at| {
        let mut records = unmap();
        records.splice(at..at, [set(Sysreg::VttbrEl2, OTHER_VTTBR), ISB, set(Sysreg::VttbrEl2, VTTBR), ISB]);
        faults(stage2(), records)
    };
    for at in 0..=7 {
        let expected: &[Fault] = if at == 4 || at == 6 { &[Fault::NotFinished; 2] } else { &[] };
        assert_eq!(changed(at), expected, "before step {at}");
    }
}

#[test]
fn break_before_make() {
    let other = PAGE + 0x5000;
    assert_eq!(faults(stage2(), [TAKE, write(L3, 0, other)]), [Fault::NoBreak]);
    assert_eq!(faults(stage2(), [TAKE, write(L2, 1, BLOCK | 0x80)]), [Fault::NoBreak]);
    assert_eq!(faults(stage2(), [TAKE, link(ROOT, 0, SPARE)]), [Fault::NoBreak]);
    // Bits that the hardware ignores.
    assert_eq!(faults(stage2(), [TAKE, write(ROOT, 0, L2 | 0b11 | 5 << 2), write(L3, 0, PAGE | 1 << 56)]), []);

    let too_early = |at| {
        let mut records = unmap();
        records.splice(at..at, [write(L3, 0, other), PUBLISH]);
        faults(stage2(), records)
    };
    for at in 2..=6 {
        assert_eq!(too_early(at)[0], Fault::StillCached, "before step {at}");
    }
    assert_eq!(too_early(7), []);
}

#[test]
fn stale_entries_of_other_levels_count() {
    // A block takes the place of a table, of which a page was mapped; then the other way round.
    let unlink = [TAKE, write(L2, 0, 0), PUBLISH];
    let invalidate = |op| [tlbi(op, 0), tlbi(op, 1), DSB, STAGE1, DSB];
    let map = [write(L2, 0, BLOCK), PUBLISH, LEAVE];
    let all = |op| unlink.into_iter().chain(invalidate(op)).chain(map);
    assert_eq!(faults(stage2(), all(TlbiOp::Ipas2e1is)), []);
    assert_eq!(faults(stage2(), all(TlbiOp::Ipas2le1is))[0], Fault::StillCached, "the table descriptor is left");
    assert_eq!(faults(stage2(), without(all(TlbiOp::Ipas2e1is).collect(), 4))[0], Fault::StillCached, "page 1 is left");

    let split = [init(SPARE), owner(SPARE, ROOT), TAKE, write(SPARE, 1, PAGE), write(L2, 1, 0), PUBLISH];
    let one = [tlbi(TlbiOp::Ipas2le1is, 0x200), DSB, STAGE1, DSB];
    let link = [link(L2, 1, SPARE), PUBLISH, LEAVE];
    assert_eq!(faults(stage2(), split.into_iter().chain(one).chain(link)), []);
    assert_eq!(faults(stage2(), split.into_iter().chain(link))[0], Fault::StillCached);
}

#[test]
fn contents_come_before_the_link() {
    let map = |order| {
        let link = Record::MemWrite { order, address: L2 + 16, value: SPARE | 0b11 };
        vec![init(SPARE), owner(SPARE, ROOT), TAKE, write(SPARE, 0, PAGE), PUBLISH, link, PUBLISH, LEAVE]
    };
    assert_eq!(faults(stage2(), map(MemOrder::Plain)), []);
    assert_eq!(faults(stage2(), without(map(MemOrder::Plain), 4)), [Fault::ContentsNotPublished]);
    assert_eq!(faults(stage2(), with(map(MemOrder::Plain), 4, dsb(Dsb::Nsh))), [Fault::ContentsNotPublished]);
    assert_eq!(faults(stage2(), without(map(MemOrder::Release), 4)), []);
}

#[test]
fn new_mappings_are_made_visible() {
    let map = |barrier| [TAKE, write(L3, 2, PAGE + 0x2000), barrier, LEAVE];
    for barrier in [PUBLISH, DSB, dsb(Dsb::Sy)] {
        assert_eq!(faults(stage2(), map(barrier)), []);
        assert_eq!(faults(el2(), map(barrier)), [Fault::NoIsb]);
    }
    for barrier in [dsb(Dsb::Nsh), ISB] {
        assert_eq!(faults(stage2(), map(barrier)), [Fault::NotVisible]);
        assert_eq!(faults(el2(), map(barrier)), [Fault::NotVisible]);
    }
    let whole = vec![TAKE, write(L3, 2, PAGE + 0x2000), PUBLISH, ISB, LEAVE];
    assert_eq!(faults(el2(), whole.clone()), []);
    // An ISB before the DSB synchronises nothing, and neither does one of another CPU.
    let mut early = whole.clone();
    early.swap(2, 3);
    assert_eq!(faults(el2(), early), [Fault::NoIsb]);
    let other = whole.into_iter().enumerate().map(|(at, record)| (u8::from(at == 3), record));
    assert_eq!(faults_of(el2().into_iter().map(|record| (0, record)).chain(other)), [Fault::NoIsb]);
    // What another lock guards is the affair of that.
    let apart = [TAKE, Record::Lock(OTHER_LOCK), write(L3, 2, PAGE), Record::Unlock(OTHER_LOCK), PUBLISH, LEAVE];
    assert_eq!(faults(stage2(), apart), []);
}

#[test]
fn locks() {
    let records =
        |cpu: u8| stage2().into_iter().map(|record| (0, record)).chain([(cpu, TAKE), (0, write(L3, 2, PAGE))]);
    assert_eq!(faults_of(records(0)), []);
    assert_eq!(faults_of(records(1)), [Fault::Unlocked]);
    assert_eq!(faults(stage2(), [Record::Lock(OTHER_LOCK), write(L3, 2, PAGE)]), [Fault::Unlocked]);
    let spare = [init(SPARE), owner(SPARE, ROOT), write(SPARE, 0, PAGE)];
    assert_eq!(faults(stage2(), spare), [Fault::Unlocked], "not linked yet");
    assert_eq!(faults(stage2(), [TAKE, TAKE]), [Fault::Lock]);
    assert_eq!(faults(stage2(), [LEAVE]), [Fault::Lock]);
    assert_eq!(faults_of([(0, TAKE), (1, LEAVE)]), [Fault::Lock]);
}

/// As [`stage2`], in two regions: the first GiB and the second have locks of their own, which are not those of the root.
fn regions() -> Vec<Record> {
    regions_of(30)
}

/// The same with regions of `1 << shift` bytes.
fn regions_of(shift: u64) -> Vec<Record> {
    let region = |number: u64| Record::Hint {
        kind: Hint::SetRegionLock,
        location: GROUP | number,
        value: (number - 1) << shift | shift,
    };
    let mut records = stage2();
    records[3] = root_lock(ROOT, GROUP);
    records[7] = Record::Lock(GROUP);
    records[15] = Record::Unlock(GROUP);
    records.splice(16..16, [region(1), region(2)]);
    records
}

#[test]
fn regions_have_locks() {
    let held = |lock: u64, record: Record| faults(regions(), [Record::Lock(lock), record]);
    for (table, index, lock) in [(L3, 2, GROUP | 1), (ROOT, 0, GROUP | 1), (ROOT, 1, GROUP | 2), (ROOT, 2, GROUP)] {
        for other in [GROUP, GROUP | 1, GROUP | 2, LOCK] {
            let found = held(other, write(table, index, 0));
            let expected = if other == lock { vec![] } else { vec![Fault::Unlocked] };
            assert_eq!(found, expected, "{table:#x} {index} under {other:#x}");
        }
    }
    // A table that is not linked yet: any lock of its root.
    let spare = |lock| {
        let records = [init(SPARE), owner(SPARE, ROOT), Record::Lock(lock), write(SPARE, 0, PAGE)];
        faults(regions(), records)
    };
    assert_eq!([GROUP, GROUP | 1, GROUP | 2].map(spare), [vec![], vec![], vec![]]);
    assert_eq!(spare(LOCK), [Fault::Unlocked]);
}

#[test]
fn a_region_has_what_translates_no_more_than_lies_in_it() {
    // The descriptor of level 1 translates both of these regions and more.
    for (table, index, lock) in [(L3, 2, GROUP | 1), (L2, 1, GROUP | 2), (L2, 2, GROUP), (ROOT, 0, GROUP)] {
        for other in [GROUP, GROUP | 1, GROUP | 2] {
            let found = faults(regions_of(21), [Record::Lock(other), write(table, index, 0)]);
            let expected = if other == lock { vec![] } else { vec![Fault::Unlocked] };
            assert_eq!(found, expected, "{table:#x} {index} under {other:#x}");
        }
    }
}

#[test]
fn regions_are_gone_with_their_root() {
    let drop_root = [Record::Lock(GROUP), write(ROOT, 0, 0), PUBLISH, tlbi(TlbiOp::Vmalls12e1is, 0), DSB];
    let leave =
        [Record::Unlock(GROUP), set(Sysreg::VttbrEl2, OTHER_VTTBR), release(ROOT), free(L3), free(L2), free(ROOT)];
    let before = [&regions_of(21)[..], &drop_root, &leave].concat();
    let again = [&stage2()[..3], &[root_lock(ROOT, GROUP)], &stage2()[4..7], &[Record::Lock(GROUP)], &stage2()[8..15]];
    let in_use = [&stage2()[16..], &[write(L3, 3, PAGE), PUBLISH, Record::Unlock(GROUP)]].concat();
    assert_eq!(faults(before.clone(), [again.concat(), in_use].concat()), []);
    let mut held = before;
    held.push(Record::Lock(GROUP | 1));
    assert_eq!(
        faults(held, [init(SPARE), root_lock(ROOT, GROUP), owner(SPARE, ROOT), write(SPARE, 0, PAGE)]),
        [Fault::Unlocked]
    );
}

#[test]
fn a_region_is_clean_when_its_lock_is_released() {
    let (first, second) = (GROUP | 1, GROUP | 2);
    let trace = |records: &[(u8, Record)]| {
        let other = [set(Sysreg::VtcrEl2, VTCR), set(Sysreg::VttbrEl2, VTTBR), ISB].map(|record| (1, record));
        let before = regions().into_iter().map(|record| (0, record)).chain(other);
        faults_of(before.chain(records.iter().copied()))
    };
    let gone = [(0, Record::Lock(first)), (0, write(L3, 0, 0)), (1, Record::Lock(second)), (0, PUBLISH)];
    let flush = unmap()[3..7].iter().map(|&record| (0, record)).collect::<Vec<_>>();
    // The other region owes nothing.
    let apart = [&gone[..], &[(1, Record::Unlock(second))], &flush, &[(0, Record::Unlock(first))]].concat();
    assert_eq!(trace(&apart), []);
    assert_eq!(trace(&[&gone[..], &[(0, Record::Unlock(first))]].concat()), [Fault::NotInvalidated]);
    // Another CPU's maintenance is its own affair, in whatever state this is.
    let all = [(1, tlbi(TlbiOp::Vmalls12e1is, 0)), (1, DSB), (1, Record::Unlock(second))];
    let ours = [&gone[..3], &all, &gone[3..], &flush, &[(0, Record::Unlock(first))]].concat();
    assert_eq!(trace(&ours), []);
    assert_eq!(trace(&[&gone[..], &all, &[(0, Record::Unlock(first))]].concat()), [Fault::NotInvalidated]);
    let stage1 = [(1, STAGE1), (1, DSB), (1, Record::Unlock(second))];
    let late = [&gone[..], &flush[..2], &stage1, &[(0, Record::Unlock(first))]].concat();
    assert_eq!(trace(&late), [Fault::NotInvalidated]);
    // What has been made is not visible yet.
    let made =
        [(0, Record::Lock(first)), (0, write(L3, 2, PAGE)), (1, Record::Lock(second)), (1, Record::Unlock(second))];
    assert_eq!(trace(&[&made[..], &[(0, Record::Unlock(first))]].concat()), [Fault::NotVisible]);
}

#[test]
fn a_root_in_use_has_a_lock() {
    let hint = stage2().iter().position(|record| *record == root_lock(ROOT, LOCK)).unwrap();
    assert_eq!(faults(without(stage2(), hint), []), [Fault::NoLock]);
    assert_eq!(faults(without(el2(), hint), []), [Fault::NoLock]);
}

#[test]
fn tables_are_reused_when_nothing_leads_to_them() {
    // Pages 0 and 1 are in the table.
    let unlink = [TAKE, write(L2, 0, 0), PUBLISH];
    let flush = [tlbi(TlbiOp::Ipas2e1is, 0), tlbi(TlbiOp::Ipas2e1is, 1), DSB, STAGE1, DSB];
    for reuse in [free(L3), init(L3), link(L2, 5, L3)] {
        let found = |records: &[Record]| faults(stage2(), records.iter().copied());
        assert_eq!(found(&[&unlink[..], &flush, &[reuse, PUBLISH, LEAVE]].concat()), [], "{reuse:?}");
        assert_eq!(found(&[&unlink[..1], &[reuse]].concat())[0], Fault::Reachable, "{reuse:?}");
        assert_eq!(found(&[&unlink[..], &[reuse]].concat())[0], Fault::TableCached, "{reuse:?}");
        assert_eq!(found(&[&unlink[..], &flush[..4], &[reuse]].concat())[0], Fault::TableCached, "{reuse:?}");
    }
    let through_the_cache = [TAKE, write(L2, 0, 0), write(L3, 7, PAGE)];
    assert_eq!(faults(stage2(), through_the_cache), [Fault::TableCached]);
    let a_list = [TAKE, write(L2, 0, 0), write(L3, 0, SPARE)];
    assert_eq!(faults(stage2(), a_list), [], "what is invalid may be written");
}

#[test]
fn tables_belong_to_one_root() {
    let other = [init(OTHER_ROOT), root_lock(OTHER_ROOT, OTHER_LOCK), owner(OTHER_ROOT, OTHER_ROOT)];
    let enter = [set(Sysreg::VtcrEl2, VTCR), set(Sysreg::VttbrEl2, OTHER_VTTBR), ISB, Record::Lock(OTHER_LOCK)];
    let before = || stage2().into_iter().chain(other).chain([PUBLISH]).chain(enter).collect::<Vec<_>>();
    assert_eq!(faults(before(), [init(SPARE), PUBLISH, link(OTHER_ROOT, 0, SPARE)]), []);
    let foreign = [init(SPARE), owner(SPARE, ROOT), PUBLISH, link(OTHER_ROOT, 0, SPARE)];
    assert_eq!(faults(before(), foreign), [Fault::ForeignRoot]);
    assert_eq!(faults(before(), [link(OTHER_ROOT, 0, L2)]), [Fault::Reachable]);
}

#[test]
fn pages_that_are_no_tables() {
    assert_eq!(faults(stage2(), [TAKE, write(SPARE, 0, PAGE)]), [Fault::NoTable]);
    assert_eq!(faults(stage2(), [TAKE, link(L2, 5, SPARE)]), [Fault::NoTable]);
    assert_eq!(faults(stage2(), [free(SPARE)]), [Fault::NoTable]);
    assert_eq!(faults(stage2(), [owner(SPARE, ROOT)]), [Fault::NoTable]);
}

#[test]
fn roots_are_given_up_when_they_are_empty_and_nobody_has_them() {
    let leave = [set(Sysreg::VttbrEl2, OTHER_VTTBR), ISB];
    let empty = [TAKE, write(ROOT, 0, 0), PUBLISH, tlbi(TlbiOp::Vmalls12e1is, 0), DSB, LEAVE];
    let all = [&empty[..], &leave, &[release(ROOT), free(ROOT), free(L2), free(L3)]].concat();
    assert_eq!(faults(stage2(), all.clone()), []);
    assert_eq!(faults(stage2(), all[..6].iter().copied().chain([release(ROOT)])), [Fault::Reachable], "in VTTBR_EL2");
    assert_eq!(faults(stage2(), leave.into_iter().chain([release(ROOT)])), [Fault::Reachable], "not empty");
    let stale = [TAKE, write(ROOT, 0, 0)].into_iter().chain(leave).chain([release(ROOT)]);
    assert_eq!(faults(stage2(), stale), [Fault::NotInvalidated]);
    // The root is another VM's then.
    let enter = [set(Sysreg::VtcrEl2, VTCR), set(Sysreg::VttbrEl2, 3 << 48 | ROOT), ISB];
    let again = [init(ROOT), root_lock(ROOT, OTHER_LOCK), PUBLISH].into_iter().chain(enter);
    assert_eq!(faults(stage2(), all.into_iter().chain(again)), []);
    assert_eq!(
        faults(stage2(), [set(Sysreg::VtcrEl2, VTCR), set(Sysreg::VttbrEl2, 3 << 48 | ROOT)]),
        [Fault::RootInUse]
    );
}

#[test]
fn the_el2_stage_1_needs_no_second_invalidation() {
    let all = |op, page| [TAKE, write(L3, 0, 0), PUBLISH, tlbi(op, page), DSB, ISB, LEAVE];
    assert_eq!(faults(el2(), all(TlbiOp::Vae2is, 0)), []);
    assert_eq!(faults(el2(), all(TlbiOp::Alle2is, 0)), []);
    assert_eq!(faults(el2(), all(TlbiOp::Vae2is, 1)), [Fault::TooNarrow]);
    assert_eq!(faults(el2(), all(TlbiOp::Alle2, 0)), [Fault::NotInvalidated]);
    assert_eq!(faults(el2(), without(all(TlbiOp::Vae2is, 0).to_vec(), 2))[0], Fault::NotPublished);
    assert_eq!(faults(el2(), without(all(TlbiOp::Vae2is, 0).to_vec(), 4)), [Fault::NotFinished]);
    for op in [TlbiOp::Vae2is, TlbiOp::Alle2is] {
        assert_eq!(faults(el2(), without(all(op, 0).to_vec(), 5)), [Fault::NoIsb]);
    }
}

#[test]
fn the_root_of_el2_changes_with_the_mmu_off() {
    let other = [init(OTHER_ROOT), root_lock(OTHER_ROOT, LOCK), PUBLISH];
    let change = [set(Sysreg::Ttbr0El2, OTHER_ROOT), ISB, tlbi(TlbiOp::Alle2, 0), dsb(Dsb::Nsh), ISB];
    let (off, on) = ([set(Sysreg::SctlrEl2, 0), ISB], [set(Sysreg::SctlrEl2, 1), ISB]);
    let good = other.into_iter().chain(off).chain(change).chain(on);
    let given_up = [release(ROOT), free(L2), free(L3), free(ROOT)];
    assert_eq!(faults(el2(), good.clone().chain(given_up)), []);
    assert_eq!(faults(el2(), given_up), [Fault::Reachable; 4]);
    assert_eq!(faults(el2(), other.into_iter().chain(change).chain(on)), [Fault::RootInUse]);
    // Another CPU still has the first one.
    let second = [set(Sysreg::Ttbr0El2, ROOT), set(Sysreg::TcrEl2, TCR), set(Sysreg::SctlrEl2, 1)];
    let first = el2().into_iter().map(|record| (0, record));
    let records = first.chain(second.map(|record| (1, record))).chain(good.map(|record| (0, record)));
    assert_eq!(faults_of(records), [Fault::RootInUse]);
}

#[test]
fn concatenated_roots_cover_one_after_the_other() {
    // 40 bits: two root tables of level 1, the second for what lies above 512 GiB.
    let before = [init(0x8000), init(0x9000), root_lock(0x8000, LOCK), PUBLISH];
    let enter = [set(Sysreg::VtcrEl2, 0x8002_3558), set(Sysreg::VttbrEl2, 1 << 48 | 0x8000), ISB];
    let unmap = |page| {
        let map = [TAKE, write(0x9000, 0, 0x40_0000_0401), PUBLISH, write(0x9000, 0, 0), PUBLISH];
        map.into_iter().chain([tlbi(TlbiOp::Ipas2le1is, page), DSB, STAGE1, DSB, LEAVE])
    };
    let before = before.into_iter().chain(enter).collect::<Vec<_>>();
    assert_eq!(faults(before.clone(), unmap((1 << 39) >> 12)), []);
    assert_eq!(faults(before, unmap(0)), [Fault::TooNarrow]);
}

#[test]
fn numbers_rise_by_one() {
    let numbered = |ids: [u64; 3]| {
        let mut checker = Checker::new();
        ids.map(|id| checker.record(&Entry { id, tid: 0, record: ISB }).err().map(|violation| violation.fault))
    };
    assert_eq!(numbered([5, 6, 7]), [None; 3]);
    assert_eq!(numbered([5, 7, 8]), [None, Some(Fault::Order), None]);
    assert_eq!(numbered([5, 5, 6]), [None, Some(Fault::Order), None]);
}

#[test]
fn a_violation_says_where_and_what() {
    let mut checker = Checker::new();
    let records = stage2().into_iter().chain(without(unmap(), 6));
    let found: Vec<_> = (0..)
        .zip(records)
        .filter_map(|(id, record)| checker.record(&Entry { id, tid: 0, record }).err())
        .map(|violation| violation.to_string())
        .collect();
    let expected = "record 25: missing DSB after an invalidation: 0x3000 \
        (stale: stage 2 of VMID 1 at 0x0, level 3, 0x80000403 until record 20)";
    assert_eq!(found, [expected]);
}
