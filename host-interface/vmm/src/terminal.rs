//! The terminal that the VMM runs on.

use std::io::{IsTerminal as _, stdin};
use std::sync::Mutex;

use anyhow::Result;
use nix::sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr};

static ORIGINAL: Mutex<Option<Termios>> = Mutex::new(None);

/// Passes each key on as it is typed, without an echo. Ctrl-C stays a signal, which ends the VMM.
pub fn pass_keys() -> Result<()> {
    if !stdin().is_terminal() {
        return Ok(());
    }
    let mut settings = tcgetattr(stdin())?;
    if let Ok(mut original) = ORIGINAL.lock() {
        original.get_or_insert_with(|| settings.clone());
    }
    settings.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
    settings.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
    settings.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
    tcsetattr(stdin(), SetArg::TCSANOW, &settings)?;
    Ok(())
}

/// Puts the settings back. It waits for nothing, so that a signal handler may call it.
pub fn restore() {
    if let Ok(original) = ORIGINAL.try_lock()
        && let Some(settings) = original.as_ref()
    {
        // Nothing can be done if the terminal is gone.
        let _ = tcsetattr(stdin(), SetArg::TCSANOW, settings);
    }
}
