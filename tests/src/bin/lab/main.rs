//! Runs on real processes in network namespaces (root).

mod crash;
mod live;
mod vms;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use vmcast_tests::{netlab::Lab, smoke};

#[derive(Debug, Parser)]
#[command(about)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// An image to three hosts behind shaped links.
    Smoke,
    /// A bootable disk, imported as a libvirt domain, deployed to three hosts and started.
    Vms(vms::Args),
    /// A running VM that writes all the time, deployed again and again, with its host's agent killed on the way.
    Live(live::Args),
    /// Deployments while programs are killed, links cut and rates changed at random.
    Crash(crash::Args),
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(obstacle) = Lab::obstacle() {
        bail!("{obstacle}");
    }
    match args.command {
        Command::Smoke => println!("smoke: {}", smoke::run()?),
        Command::Vms(args) => println!("vms: {}", vms::run(&args)?),
        Command::Live(args) => println!("live: {}", live::run(&args)?),
        Command::Crash(args) => println!("crash: {}", crash::run(&args)?),
    }
    Ok(())
}
