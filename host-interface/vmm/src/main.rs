//! `ravelin-vmm`: the library's command line.

use std::process::ExitCode;

use anyhow::Result;
use ravelin_vmm::args::{Config, HELP, Request, parse};
use ravelin_vmm::{STATUS_FAILED, STATUS_USAGE, terminal};

fn main() -> ExitCode {
    let status = match parse(std::env::args_os().skip(1)) {
        Ok(Request::Help) => {
            print!("{HELP}");
            0
        }
        Ok(Request::Run(config)) => {
            let result = run(&config);
            terminal::restore();
            result.unwrap_or_else(|error| {
                eprintln!("ravelin-vmm: {error:#}");
                STATUS_FAILED
            })
        }
        Err(error) => {
            eprintln!("ravelin-vmm: {error:#}; --help lists the options");
            STATUS_USAGE
        }
    };
    ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX))
}

/// Runs guests until the last does not reboot. Returns the exit status.
#[cfg(target_arch = "aarch64")]
fn run(config: &Config) -> Result<i32> {
    use ravelin_vmm::report::Report;
    use ravelin_vmm::vcpu::End;
    use ravelin_vmm::{STATUS_CRASHED, signals, vm};
    use std::sync::Arc;

    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        terminal::restore();
        hook(info);
    }));
    let (sender, ends) = std::sync::mpsc::channel();
    let signalled = sender.clone();
    signals::install(move |signal| drop(signalled.send(End::Signal(signal))))?;
    let report = Arc::new(Report::new(config.json, config.share_trace));
    let outside = vm::Outside::open(config, &report)?;
    let end = loop {
        let end = vm::run(config, &outside, &report, &sender, &ends);
        outside.drain();
        match end.unwrap_or_else(|error| End::Failed(format!("{error:#}"))) {
            End::Reset if !config.no_reboot => report.event("reboot", "", serde_json::Value::Null),
            end => break end,
        }
    };
    let (status, reason) = match end {
        End::Off => (0, "the guest turned itself off".into()),
        End::Reset => (0, "the guest reboots".into()),
        End::Crash => (STATUS_CRASHED, "the guest has crashed".into()),
        End::Failed(reason) => (STATUS_FAILED, reason),
        End::Signal(signal) => (128 + signal, format!("ended by signal {signal}")),
    };
    report.end(&reason, status);
    Ok(status)
}

#[cfg(not(target_arch = "aarch64"))]
fn run(_config: &Config) -> Result<i32> {
    anyhow::bail!("guests run on arm64 alone")
}
