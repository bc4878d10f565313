//! `vmcast-agent`.

use std::process::ExitCode;

use vmcast_agent::{app, config::Args};
use vmcast_common::{config, telemetry};

/// Most threads for connections: each is good for about 10 Gbit/s.
const MOST_WORKERS: usize = 8;

/// Threads for connections. Few: a block that goes from one to another leaves its cache, and waking a thread costs as much as
/// copying a block does; with two of them where there are two processors, a transfer takes a quarter more of their time. The
/// others are for the VMs, and for hashing and disks, which have threads of their own.
fn workers() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (cpus / 2).clamp(1, MOST_WORKERS)
}

fn main() -> ExitCode {
    let args: Args = config::parse();
    if let Err(error) = telemetry::init(args.log_format, "info") {
        eprintln!("vmcast-agent: error: {error}");
        return ExitCode::from(2);
    }
    let run = || -> anyhow::Result<()> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(workers()).enable_all().build()?;
        let done = runtime.block_on(app::run(args));
        // What still blocks on a disk or a hypervisor is not waited for: it goes on after the next start.
        runtime.shutdown_background();
        done
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
