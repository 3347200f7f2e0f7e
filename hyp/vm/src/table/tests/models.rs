//! What two CPUs do with the same slot.

use std::sync::Arc;

use ravelin_sync::{
    atomic::{AtomicU64, Ordering},
    model::{explore, explore_without, spawn},
};

use super::*;

/// What a VM consists of, in a model: its handle, and what whoever made it has written there.
type Content = (Handle, AtomicU64);

fn make(table: &Table<Content>) -> Result<Handle, Refusal> {
    table.create(|handle| {
        let content = (handle, AtomicU64::new(0));
        content.1.store(handle.raw(), Relaxed);
        Ok(content)
    })
}

/// Ends the VM and demands that it is the right one.
fn end(table: &Table<Content>, handle: Handle) -> Result<(), Refusal> {
    table.alone(handle, |vm| {
        let (its, written) = vm.take().expect("it is there until somebody takes it");
        assert_eq!((its, written.load(Relaxed)), (handle, handle.raw()));
        Ok(())
    })
}

/// One ends a VM and makes another in its place, while others use the first and try to end it, too.
fn a_handle_names_one_vm() {
    let table = Arc::new(Table::new());
    let first = make(&table).unwrap();
    let ends = spawn(&table, move |table| (end(table, first), make(table)));
    let uses = spawn(&table, move |table| {
        let used = table.shared(first, |(its, written)| {
            assert_eq!((*its, written.load(Relaxed)), (first, first.raw()));
            Ok(())
        });
        assert!(matches!(used, Ok(()) | Err(BAD | BUSY)));
        end(table, first)
    });
    let ((ended, next), too) = (ends.join().unwrap(), uses.join().unwrap());
    assert!(ended.is_err() || too.is_err(), "it ended twice");
    assert_ne!(next.unwrap(), first);
    let left = end(&table, first);
    assert_eq!(left.is_ok(), ended.is_err() && too.is_err());
}

/// One makes a VM and names it to another, in no particular order.
fn a_vm_is_whole_when_it_can_be_used() {
    let shared = Arc::new((Table::new(), AtomicU64::new(u64::MAX)));
    let makes = spawn(&shared, |(table, named)| named.store(make(table).unwrap().raw(), Relaxed));
    let uses = spawn(&shared, |(table, named)| {
        let handle = Handle::from_raw(named.load(Relaxed));
        let used = table.shared(handle, |(its, written)| {
            assert_eq!((*its, written.load(Relaxed)), (handle, handle.raw()));
            Ok(())
        });
        assert!(matches!(used, Ok(()) | Err(BAD | BUSY)));
    });
    makes.join().unwrap();
    uses.join().unwrap();
}

#[test]
fn handles() {
    explore(a_handle_names_one_vm);
}

#[test]
fn creation() {
    explore(a_vm_is_whole_when_it_can_be_used);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn creation_needs_release() {
    explore_without(Ordering::Release, a_vm_is_whole_when_it_can_be_used);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn creation_needs_acquire() {
    explore_without(Ordering::Acquire, a_vm_is_whole_when_it_can_be_used);
}
