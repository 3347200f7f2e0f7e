//! `cargo xtask`: sets up what is needed, builds the hypervisor, runs it in QEMU, tests it.

#![forbid(unsafe_code)]

mod arm64_image;
mod bench;
mod console;
mod cpio;
mod demo;
mod gdb;
mod guest_kernel;
mod guests;
mod image;
mod initramfs;
mod machine;
mod module;
mod placement;
mod process;
mod programs;
mod qemu;
mod run;
mod setup;
mod symbols;
mod test;
mod trace;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use image::Variant;

/// Builds, runs and tests the hypervisor.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install and download what the other commands need; they do so by themselves too
    Setup,
    /// Build the hypervisor and its flat binary
    Build {
        /// The build that checks its tables after each hypercall
        #[arg(long)]
        checked: bool,
        /// The build to debug: debug assertions, and less optimised
        #[arg(long)]
        dev: bool,
    },
    /// Boot a host on the hypervisor in QEMU: a Linux with a shell on this terminal, unless told otherwise
    Run(Box<run::Options>),
    /// Boot a host on the hypervisor, let protected guests work on it, and show that it cannot read their memory
    Demo(demo::Options),
    /// Build the guest kernel with the mainline pKVM driver; the result is kept, and `run` and `demo` offer it
    GuestKernel,
    /// Build the kernel module that gives a Linux host its /dev/kvm
    Module(module::Options),
    /// Run the tests
    Test(test::Options),
    /// Record what the checking build does to translation tables and TLBs while the EL1 payload runs, and check it
    Trace(trace::Options),
    /// Boot as `run` does, stopped before the first instruction, under gdb
    Gdb(Box<run::Options>),
    /// What .ci/run runs: all tests, without the whole matrix
    Ci,
    /// Count what the hypervisor costs, beside the targets
    Bench(bench::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Setup => setup::setup().map(|()| ExitCode::SUCCESS),
        Command::Build { checked, dev } => {
            build(Variant { checked, dev, ..Variant::default() }).map(|()| ExitCode::SUCCESS)
        }
        Command::GuestKernel => guest_kernel::ensure().map(|image| {
            println!("{}", image.display());
            ExitCode::SUCCESS
        }),
        Command::Module(options) => module::module(&options),
        Command::Demo(options) => demo::demo(&options),
        Command::Run(options) => run::run(&options),
        Command::Test(options) => test::test(&options),
        Command::Trace(options) => trace::trace(&options),
        Command::Gdb(options) => gdb::gdb(&options),
        Command::Ci => test::test(&test::Options::default()),
        Command::Bench(options) => bench::bench(&options),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn build(variant: Variant) -> anyhow::Result<()> {
    setup::ensure(&setup::Needs { bare_metal: true, ..Default::default() })?;
    let image = image::build(variant)?;
    println!("{}", image.binary.display());
    println!("{}", image.sizes);
    Ok(())
}
