//! `sheave daemon`: owns the block devices of this node.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use sheave_backends::OpenOptions;
use sheave_devices::{Devices, DevicesConfig};
use sheave_shard::{EngineChoice, EngineConfig};
use sheave_telemetry::Registry;

use crate::daemon;
use crate::process::{EndSignals, default_shards, runtime, start_log};
use crate::state_dir::state_dir;
use crate::telemetry::{RuntimeDir, StatsSocket};
use crate::ublk;

/// How soon a volume that could not be opened is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Own the block devices of this node; `attach`, `detach` and `ls` are its clients.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave daemon
  sheave attach disk.img            in another terminal; prints /dev/ublkb0

It listens at /run/sheave/control.sock; SHEAVE_RUNTIME_DIR names another directory. What it
must know after a crash is in /var/lib/sheave; SHEAVE_STATE_DIR names another.")]
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
    runtime().context("daemon")?.block_on(serve(args)).context("daemon")
}

async fn serve(args: Args) -> Result<()> {
    let mut signals = EndSignals::catch()?;
    let dir = RuntimeDir::locate();
    // Said at once; a daemon that is just dying keeps its records a little longer.
    daemon::check_alone(&dir).await?;
    let registry = Arc::new(Registry::new());
    let engine = EngineConfig {
        choice: EngineChoice::Auto,
        shards: args.shards.map_or_else(default_shards, usize::from),
        poll_us: args.poll_us,
    };
    let config = DevicesConfig {
        engine,
        records: state_dir()?.join("devices"),
        open: Box::new(|volume, read_only| {
            sheave_backends::open(volume, &OpenOptions { read_only })
        }),
        probe_ublk: ublk::probe,
    };
    let devices = Arc::new(Devices::start(config, Arc::clone(&registry))?);
    let _stats = StatsSocket::start(registry)?;
    let recovery = tokio::spawn(recover(Arc::clone(&devices)));
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
    daemon::serve(&dir, Arc::clone(&devices), ended).await?;
    recovery.abort();
    Ok(())
}

/// Serves the devices of a daemon that died, and goes on trying where a volume cannot be had yet.
async fn recover(devices: Arc<Devices>) {
    let mut first = true;
    loop {
        let devices = Arc::clone(&devices);
        let tried = tokio::task::spawn_blocking(move || match first {
            true => devices.recover(),
            false => devices.retry(),
        });
        if matches!(tried.await, Ok(0) | Err(_)) {
            return;
        }
        first = false;
        tokio::time::sleep(RETRY).await;
    }
}
