//! `sheave daemon`: owns the block devices of this node.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use sheave_devices::Devices;
use sheave_shard::{EngineChoice, EngineConfig};
use sheave_telemetry::Registry;

use crate::daemon;
use crate::process::{EndSignals, default_shards, runtime, start_log};
use crate::protect::protect;
use crate::telemetry::{RuntimeDir, StatsSocket};

/// Own the block devices of this node; `attach`, `detach` and `ls` are its clients.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave daemon
  sheave attach disk.img            in another terminal; prints /dev/nbd0

It listens at /run/sheave/control.sock; SHEAVE_RUNTIME_DIR names another directory.")]
pub(crate) struct Args {
    /// Threads that serve devices [default: CPUs, at most 4]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    shards: Option<u8>,
    /// Microseconds that a busy shard looks for work before it sleeps; 0 = never
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    poll_us: u32,
}

pub(crate) fn run(args: Args) -> Result<()> {
    start_log();
    let dir = RuntimeDir::locate();
    // Before there are threads.
    protect();
    runtime().context("daemon")?.block_on(serve(args, &dir)).context("daemon")
}

async fn serve(args: Args, dir: &RuntimeDir) -> Result<()> {
    let mut signals = EndSignals::catch()?;
    let registry = Arc::new(Registry::new());
    let engine = EngineConfig {
        choice: EngineChoice::Auto,
        shards: args.shards.map_or_else(default_shards, usize::from),
        poll_us: args.poll_us,
    };
    let devices = Arc::new(Devices::start(engine, Arc::clone(&registry))?);
    let _stats = StatsSocket::start_in(dir, registry)?;
    let ended = async {
        tracing::info!("ending: {}", signals.next().await);
        let devices = Arc::clone(&devices);
        let left = tokio::task::spawn_blocking(move || devices.detach_all()).await.unwrap_or(0);
        if left > 0 {
            // Whoever uses them would lose what is not written yet.
            tracing::warn!("{left} devices are in use and served on; a second signal ends them");
            signals.next().await;
        }
    };
    daemon::serve(dir, Arc::clone(&devices), ended).await?;
    Ok(())
}
