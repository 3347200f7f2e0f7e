//! The same maps built by `aarch64-paging`: the leaves must be the same bit by bit, at the same levels.

use std::ops::ControlFlow;

use aarch64_paging::{
    descriptor::{Descriptor, El23Attributes, PagingAttributes, Stage2Attributes},
    linearmap::LinearMap,
    paging::{self, MemoryRegion, TranslationRegime},
};
use bitflags::Flags as _;
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{Found, Mapping};

/// The regime under its other name, and the attributes that its documentation gives for a usage.
trait Twin: Staged {
    type Other: TranslationRegime<Asid = (), VaRange = ()>;
    const OTHER: Self::Other;

    fn flags(usage: Self::Usage) -> <Self::Other as TranslationRegime>::Attributes;
}

impl Twin for Stage2 {
    type Other = paging::Stage2;
    const OTHER: Self::Other = paging::Stage2;

    fn flags(usage: Stage2Usage) -> Stage2Attributes {
        type A = Stage2Attributes;
        let common = A::VALID | A::ACCESS_FLAG | A::SH_INNER | A::S2AP_ACCESS_RW;
        match usage {
            Stage2Usage::Memory => common | A::MEMATTR_NORMAL_OUTER_WB | A::MEMATTR_NORMAL_INNER_WB,
            Stage2Usage::Device => common | A::MEMATTR_NORMAL_OUTER_NC | A::MEMATTR_NORMAL_INNER_NC | A::XN,
        }
    }
}

impl Twin for El2 {
    type Other = paging::El2;
    const OTHER: Self::Other = paging::El2;

    fn flags(usage: El2Usage) -> El23Attributes {
        type A = El23Attributes;
        let common = A::VALID | A::ACCESSED | A::USER_RES1 | A::INNER_SHAREABLE;
        match usage {
            El2Usage::Text => common | A::ATTRIBUTE_INDEX_1 | A::READ_ONLY,
            El2Usage::Rodata => common | A::ATTRIBUTE_INDEX_1 | A::READ_ONLY | A::XN,
            El2Usage::Data => common | A::ATTRIBUTE_INDEX_1 | A::XN,
            El2Usage::Device => common | A::ATTRIBUTE_INDEX_0 | A::XN,
        }
    }
}

/// Start, end, target and attributes of a leaf.
type Leaf = (u64, u64, u64, u64);

fn ours<R: Staged>(rig: &Rig<R>) -> Vec<Leaf> {
    let mut leaves = Vec::new();
    let all = PageRange::from_bounds(0, rig.table.geometry().end()).unwrap();
    let _: ControlFlow<()> = rig.table.visit(&rig.machine, all, &mut |range, found| {
        if let Found::Leaf { mapping, level } = found {
            let Mapping { to, usage } = mapping.unwrap();
            for behind in (0..range.size()).step_by(level.size() as usize) {
                let at = range.base().raw() + behind;
                leaves.push((at, at + level.size(), to.raw() + behind, R::attributes(usage)));
            }
        }
        ControlFlow::Continue(())
    });
    leaves
}

fn theirs<R: Twin>(map: &LinearMap<R::Other>, end: u64) -> Vec<Leaf> {
    type Flags<R> = <<R as Twin>::Other as TranslationRegime>::Attributes;
    let (valid, page) = (Flags::<R>::VALID.bits(), Flags::<R>::TABLE_OR_PAGE.bits());
    let mut leaves = Vec::new();
    let mut visit = |region: &MemoryRegion, descriptor: &Descriptor<Flags<R>>, level: usize| {
        if descriptor.is_valid() && (level == 3 || !descriptor.is_table_or_page()) {
            let attributes = descriptor.flags().bits() & !(valid | page);
            let to = descriptor.output_address().0;
            leaves.push((region.start().0 as u64, region.end().0 as u64, to as u64, attributes as u64));
        }
        Ok(())
    };
    map.walk_range(&MemoryRegion::new(0, end as usize), &mut visit).unwrap();
    leaves
}

/// Maps with a usage by number, or unmaps.
type Action = (u64, u64, Option<prop::sample::Index>);

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let base = (0..3_u64, 0..3_u64, 0..4_u64).prop_map(|(gib, block, page)| gib * GIB + block * 2 * MIB + page * PAGE);
    let aligned = (0..3_u64).prop_map(|gib| gib * GIB);
    let length = prop_oneof![3 => 1..5_u64, 2 => 510..515_u64, 1 => Just(512), 1 => Just(1 << 18)];
    let usage = prop::option::weighted(0.7, any::<prop::sample::Index>());
    vec((prop_oneof![base, aligned], length, usage), 1..12)
}

fn compare<R: Twin>(geometry: Geometry, shift: u64, actions: Vec<Action>) {
    const END: u64 = 8 * GIB;
    let mut rig = Rig::<R>::new(geometry, 4096);
    let level = geometry.start().number() as usize;
    let mut map = LinearMap::<R::Other>::new(level, shift as isize, R::OTHER);
    for (base, count, usage) in actions {
        // A large range without blocks would only take long.
        let count = if shift.is_multiple_of(GIB) && base.is_multiple_of(2 * MIB) { count } else { count.min(1100) };
        let range = pages(base, count);
        let region = MemoryRegion::new(base as usize, range.end() as usize);
        match usage {
            Some(index) => {
                let usage = *index.get(R::USAGES);
                rig.map(range, base + shift, usage).unwrap();
                rig.machine.assert_quiescent();
                map.map_range(&region, R::flags(usage)).unwrap();
            }
            None => {
                rig.unmap(&[range]);
                map.map_range(&region, <R::Other as TranslationRegime>::Attributes::from_bits_retain(0)).unwrap();
                map.compact_subtables();
            }
        }
        assert_eq!(ours(&rig), theirs::<R>(&map, END));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn stage2_leaves_are_the_same(
        actions in actions(),
        shift in prop::sample::select(&[0, PAGE, 2 * MIB, GIB][..]),
    ) {
        compare::<Stage2>(Geometry::stage2(39).unwrap(), shift, actions);
    }

    #[test]
    fn el2_leaves_are_the_same(actions in actions(), shift in prop::sample::select(&[0, 2 * MIB, GIB][..])) {
        compare::<El2>(Geometry::EL2, shift, actions);
    }
}
