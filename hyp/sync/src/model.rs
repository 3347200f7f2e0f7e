//! Tests that explore the orders in which their threads can go: all, or those with few preemptions.

use std::{cell::Cell, sync::Arc};

use loom::thread::{Builder, JoinHandle};

use crate::atomic::Ordering;

thread_local! {
    // All threads of a model are turns of the one that explores it.
    static LEFT_OUT: Cell<Option<Ordering>> = const { Cell::new(None) };
}

/// Returns the ordering that is not there.
pub(crate) fn left_out() -> Option<Ordering> {
    LEFT_OUT.get()
}

/// Stack of a thread, which loom takes as a number of words: enough for calls from registers to tables, as tests make them.
const STACK: usize = 1 << 16;

/// Runs `model` for each order that its threads and its memory can have, or for those with as many preemptions as
/// `LOOM_MAX_PREEMPTIONS` says. It may start three threads.
pub fn explore(model: impl Fn() + Sync + Send + 'static) {
    let model = Arc::new(model);
    // loom's own first thread has little stack.
    loom::model(move || spawn(&model, |model| model()).join().expect("it has panicked"));
}

/// As [`explore`], but on a machine where `ordering` orders nothing: what goes wrong then depends on it.
pub fn explore_without(ordering: Ordering, model: impl Fn() + Sync + Send + 'static) {
    struct Whole;
    impl Drop for Whole {
        fn drop(&mut self) {
            LEFT_OUT.set(None);
        }
    }
    let _whole = Whole;
    LEFT_OUT.set(Some(ordering));
    explore(model);
}

/// Starts a thread of a model, on what all of them share.
pub fn spawn<T: Send + Sync + 'static, R: Send + 'static>(
    shared: &Arc<T>,
    f: impl FnOnce(&T) -> R + Send + 'static,
) -> JoinHandle<R> {
    let shared = Arc::clone(shared);
    start(move || f(&shared))
}

/// As [`spawn`], on what is never given up.
pub fn spawn_on<T: Sync, R: Send + 'static>(
    shared: &'static T,
    f: impl FnOnce(&T) -> R + Send + 'static,
) -> JoinHandle<R> {
    start(move || f(shared))
}

fn start<R: Send + 'static>(f: impl FnOnce() -> R + Send + 'static) -> JoinHandle<R> {
    Builder::new().stack_size(STACK).spawn(f).expect("loom can always start one")
}
