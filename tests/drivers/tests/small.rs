//! The smallest of the small worlds. `cargo xtask test --full drivers` explores larger ones.

use ravelin_abi::VmKind;
use ravelin_drivers::small::{Bounds, Explored, explore};

/// Explores a world of one VM with one vCPU, one frame and one page.
fn smallest(kind: VmKind) -> Explored {
    let bounds = Bounds { vms: vec![kind], vcpus: 1, frames: 1, pages: 1, depth: usize::MAX, threads: 2 };
    let explored = explore(&bounds, |_| ()).unwrap_or_else(|failure| panic!("{failure:#?}"));
    assert!(explored.is_complete);
    println!("{bounds}: {} states, {} transitions", explored.states, explored.transitions);
    explored
}

#[test]
fn a_pkvm_guest() {
    let explored = smallest(VmKind::Pkvm);
    assert!(explored.states > 100 && explored.coverage.len() > 120, "{}", explored.coverage);
}

#[test]
fn a_realm() {
    let explored = smallest(VmKind::Realm);
    assert!(explored.states > 100 && explored.coverage.len() > 120, "{}", explored.coverage);
}

#[test]
fn an_ordinary_guest() {
    let explored = smallest(VmKind::Ordinary);
    assert!(explored.states > 50 && explored.coverage.len() > 100, "{}", explored.coverage);
}
