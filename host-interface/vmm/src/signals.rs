//! Signals that end the VMM, and the one that interrupts a vCPU.

use std::thread;

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// Number of the signal that interrupts KVM_RUN.
pub fn kick() -> i32 {
    SIGRTMIN()
}

extern "C" fn nothing(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {}

/// Has `end` called with the number of the first of SIGINT, SIGTERM and SIGHUP that comes. To be called before other
/// threads are started, for they inherit that these signals are not theirs.
pub fn install(end: impl FnOnce(i32) + Send + 'static) -> Result<()> {
    let endings = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    endings.thread_block()?;
    register_signal_handler(kick(), nothing)?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        if let Ok(signal) = endings.wait() {
            end(signal as i32);
        }
    })?;
    Ok(())
}
