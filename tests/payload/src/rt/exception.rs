//! Exceptions that no probe asked for.

/// Reports an exception that nothing expected and ends the run.
pub(crate) extern "C" fn unexpected_exception(vector: u64, esr: u64, elr: u64, far: u64) -> ! {
    panic!("unexpected exception at vector {vector:#x}: esr {esr:#x} elr {elr:#x} far {far:#x}");
}
