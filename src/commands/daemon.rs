//! `sheave daemon`: owns the block devices of this node.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use sheave_devices::Devices;
use sheave_shard::{EngineChoice, EngineConfig};
use sheave_telemetry::Registry;

use crate::config::{DaemonConfig, POLL_US, SHARDS};
use crate::daemon;
use crate::process::{EndSignals, default_shards, runtime, start_log};
use crate::protect::protect;
use crate::telemetry::{RuntimeDir, StatsSocket};

/// Own the block devices of this node; `attach`, `detach` and `ls` are its clients.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave daemon
  sheave daemon --config daemon.toml --shards 2
  sheave attach disk.img            in another terminal; prints /dev/nbd0

It listens at /run/sheave/control.sock; SHEAVE_RUNTIME_DIR names another directory.")]
pub(crate) struct Args {
    /// Configuration file; options given here count more [default: /etc/sheave/daemon.toml]
    #[arg(long, value_name = "F")]
    config: Option<PathBuf>,
    /// Threads that serve devices, 1 to 64 [default: CPUs, at most 4]
    #[arg(long, value_parser = clap::value_parser!(u32).range(SHARDS))]
    shards: Option<u32>,
    /// Microseconds that a busy shard looks for work before it sleeps; 0 = never [default: 50]
    #[arg(long, value_parser = clap::value_parser!(u32).range(POLL_US))]
    poll_us: Option<u32>,
}

/// Unless somebody says how long.
const POLL_US_DEFAULT: u32 = 50;

pub(crate) fn run(args: Args) -> Result<()> {
    let engine = engine_config(&args).context("daemon")?;
    start_log();
    let dir = RuntimeDir::locate();
    // Before there are threads.
    protect();
    runtime().context("daemon")?.block_on(serve(engine, &dir)).context("daemon")
}

/// What the command line says, else the file, else what is best in general.
fn engine_config(args: &Args) -> Result<EngineConfig> {
    let file = DaemonConfig::load(args.config.as_deref())?;
    let shards = args.shards.or(file.shards).and_then(|shards| usize::try_from(shards).ok());
    Ok(EngineConfig {
        choice: EngineChoice::Auto,
        shards: shards.unwrap_or_else(default_shards),
        poll_us: args.poll_us.or(file.poll_us).unwrap_or(POLL_US_DEFAULT),
    })
}

async fn serve(engine: EngineConfig, dir: &RuntimeDir) -> Result<()> {
    let mut signals = EndSignals::catch()?;
    let registry = Arc::new(Registry::new());
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
