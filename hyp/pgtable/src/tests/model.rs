//! Random sequences of operations against a model that only knows which operation came last.

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::recording::invalidations;

/// An operation on ranges of pages, in units that a regime gives meaning to.
#[derive(Clone, Debug)]
enum Action {
    Map { range: (u64, u64), shift: u64, other: bool },
    Unmap(Vec<(u64, u64)>),
}

/// Ranges near the borders of blocks of all sizes, short ones and long ones.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let near = prop_oneof![
        Just(0),
        Just(2 * MIB),
        Just(GIB - 2 * MIB),
        Just(GIB),
        Just(GIB + 4 * MIB),
        Just(2 * GIB),
        // Where the second root table begins.
        Just((1 << 39) - GIB),
        Just(1 << 39),
    ];
    let length = prop_oneof![
        4 => 1..6_u64,
        2 => 500..520_u64,
        1 => Just(1024),
        1 => Just(1 << 18),
        1 => (1 << 18) - 3..(1 << 18) + 3_u64,
    ];
    let offset = prop_oneof![2 => Just(0), 1 => 0..4_u64, 1 => 508..516_u64];
    (near, offset, length).prop_map(|(near, offset, length)| (near + offset * PAGE, length))
}

fn action() -> impl Strategy<Value = Action> {
    let shift = prop_oneof![6 => Just(0), 1 => Just(PAGE), 1 => Just(2 * MIB), 1 => Just(GIB)];
    let map = (range(), shift, any::<bool>()).prop_map(|(range, shift, other)| Action::Map { range, shift, other });
    prop_oneof![3 => map, 2 => vec(range(), 1..4).prop_map(Action::Unmap)]
}

type Last<R> = Vec<(u64, u64, Option<(u64, <R as Regime>::Usage)>)>;

fn expected<R: Staged>(last: &Last<R>, addr: u64) -> Option<Translation> {
    let (_, _, mapping) = last.iter().rev().find(|(start, end, _)| (*start..*end).contains(&addr))?;
    mapping.map(|(shift, usage)| translation::<R>(addr + shift, usage))
}

fn run<R: Staged>(geometry: Geometry, actions: Vec<Action>) {
    let mut rig = Rig::<R>::new(geometry, 4096);
    let mut last: Last<R> = Vec::new();
    for action in actions {
        let _ = rig.machine.take_log();
        let before = rig.pool.available();
        match action {
            Action::Map { range: (base, count), shift, other } => {
                // A large range without blocks would only take long.
                let count = if shift.is_multiple_of(GIB) { count } else { count.min(1100) };
                let (range, usage) = (pages(base, count), if other { R::OTHER_USAGE } else { R::USAGE });
                let to = PhysAddr::new(base + shift).unwrap();
                let planned = rig.table.tables_to_map(&rig.machine, range, to, usage);
                assert!(planned <= PageTable::<R>::most_tables(count));
                rig.map(range, base + shift, usage).unwrap();
                assert_eq!(allocations(&rig.machine.take_log()), planned);
                last.push((base, range.end(), Some((shift, usage))));
            }
            Action::Unmap(mut ranges) => {
                ranges.sort_unstable();
                let ranges: Vec<_> = ranges.into_iter().map(|(base, count)| pages(base, count)).collect();
                let mut planned = 0;
                let mut after = None;
                for &range in &ranges {
                    planned += rig.table.tables_to_unmap(&rig.machine, range, after);
                    after = Some(Addr::new(range.end() - 1).unwrap());
                }
                // A page is mapped if and only if the first page behind some border is.
                let was_mapped = ranges.iter().any(|range| {
                    let borders = last.iter().flat_map(|&(start, end, _)| [start, end]);
                    let mut candidates = borders
                        .chain([range.base().raw()])
                        .filter(|&addr| range.base().raw() <= addr && addr < range.end());
                    candidates.any(|addr| expected::<R>(&last, addr).is_some())
                });
                let flushed = rig.unmap(&ranges);
                let log = rig.machine.take_log();
                assert_eq!(flushed, was_mapped);
                assert_eq!(invalidations(&log).len(), usize::from(flushed));
                if ranges.windows(2).all(|pair| pair[0].end() <= pair[1].base().raw()) {
                    assert!(allocations(&log) <= planned, "{} of {planned}", allocations(&log));
                }
                last.extend(ranges.iter().map(|range| (range.base().raw(), range.end(), None)));
            }
        }
        rig.machine.assert_quiescent();
        assert_eq!(rig.pool.available() + rig.pool.in_use(), 4096);
        assert_eq!(rig.pool.in_use(), rig.table.tables(), "{before} were left before");
        for border in last.iter().flat_map(|&(start, end, _)| [start, end]) {
            for border in [border, border & !(2 * MIB - 1), border & !(GIB - 1)] {
                for addr in [border.wrapping_sub(PAGE), border].into_iter().filter(|&addr| addr < geometry.end()) {
                    assert_eq!(rig.answer(addr), expected::<R>(&last, addr), "{addr:#x}");
                }
            }
        }
    }
    rig.unmap(&[pages(0, geometry.end() / PAGE)]);
    assert_eq!(rig.pool.in_use(), 0, "nothing leaks");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 128 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn stage2_follows_the_model(actions in vec(action(), 1..if cfg!(miri) { 3 } else { 14 })) {
        run::<Stage2>(Geometry::stage2(40).unwrap(), actions);
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn el2_follows_the_model(actions in vec(action(), 1..if cfg!(miri) { 3 } else { 14 })) {
        run::<El2>(Geometry::EL2, actions);
    }
}
