//! `cargo xtask demo`: protected guests at work on a Linux host that cannot read their memory, without a hand on the
//! keyboard. The script `qemu/initramfs/demo` does it in the host, and its status is ours.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::module::Kernel;
use crate::{guest_kernel, run};

/// Minutes on a slow machine.
const LIMIT: u64 = 1800;

/// Options of `demo`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Kernel of Debian to boot as the host
    #[arg(long, value_name = "NAME", default_value = "linux")]
    kernel: Kernel,
    /// CPU model, in place of the machine's
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
}

/// `cargo xtask demo`.
pub(crate) fn demo(options: &Options) -> Result<ExitCode> {
    guest_kernel::ensure()?;
    run::run(&run::Options {
        kernel: options.kernel,
        cpu: options.cpu.clone(),
        exec: Some("demo".into()),
        append: Some("quiet".into()),
        timeout: Some(LIMIT),
        ..run::Options::default()
    })
}
