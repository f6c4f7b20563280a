//! `sheave daemon`: owns the block devices of this node.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use sheave_backends::OpenOptions;
use sheave_devices::{Devices, DevicesConfig};
use sheave_shard::{EngineChoice, EngineConfig};
use sheave_telemetry::Registry;

use crate::config::{DaemonConfig, POLL_US, SHARDS};
use crate::daemon::ControlSocket;
use crate::process::{EndSignals, default_shards, runtime, start_log};
use crate::protect::protect;
use crate::state_dir::state_dir;
use crate::systemd::{Notify, passed_socket};
use crate::telemetry::{RuntimeDir, StatsSocket};
use crate::ublk;

/// How soon a volume that could not be opened is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Own the block devices of this node; `attach`, `detach` and `ls` are its clients.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave daemon
  sheave daemon --config daemon.toml --shards 2
  sheave attach disk.img            in another terminal; prints /dev/ublkb0

It listens at /run/sheave/control.sock; SHEAVE_RUNTIME_DIR names another directory. What it
must know after a crash is in /var/lib/sheave; SHEAVE_STATE_DIR names another.")]
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

/// How soon a device is ended when nothing uses it any more, once the daemon is to end.
const WIND_DOWN_PERIOD: Duration = Duration::from_secs(1);
/// Unless somebody says how long.
const POLL_US_DEFAULT: u32 = 50;

pub(crate) fn run(args: Args) -> Result<()> {
    let engine = engine_config(&args).context("daemon")?;
    start_log();
    let (dir, notify) = (RuntimeDir::locate(), Notify::from_env());
    // These two want to be alone, before there are threads.
    let passed = passed_socket().context("daemon")?;
    protect();
    let runtime = runtime().context("daemon")?;
    let outcome = runtime.block_on(serve(engine, &dir, passed, &notify)).context("daemon");
    // Not waited for: a call may be waiting for a dead disk.
    runtime.shutdown_background();
    outcome
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

async fn serve(
    engine: EngineConfig,
    dir: &RuntimeDir,
    passed: Option<UnixListener>,
    notify: &Notify,
) -> Result<()> {
    let mut signals = EndSignals::catch()?;
    // First, since it tells whether another daemon runs.
    let socket = ControlSocket::open(dir, passed).await?;
    let registry = Arc::new(Registry::new());
    let config = DevicesConfig {
        engine,
        records: state_dir()?.join("devices"),
        open: Box::new(|volume, read_only| {
            sheave_backends::open(volume, &OpenOptions { read_only })
        }),
        probe_ublk: ublk::probe,
    };
    let devices = Arc::new(Devices::start(config, Arc::clone(&registry))?);
    let _stats = StatsSocket::start_in(dir, registry)?;
    tracing::info!(socket = socket.name(), "ready");
    notify.ready();
    let recovery = tokio::spawn(recover(Arc::clone(&devices)));
    let mut outcome = Ok(());
    let ended = async {
        tracing::info!("ending: {}", signals.next().await);
        notify.stopping("ending devices");
        outcome = wind_down(&devices, &mut signals, notify).await;
    };
    let watched = Arc::clone(&devices);
    tokio::select! {
        served = socket.serve(Arc::clone(&devices), ended) => served?,
        never = notify.keep_alive(move |within| watched.check(within)) => match never {},
    }
    recovery.abort();
    outcome
}

/// Ends what nothing uses, until nothing is left or a second signal comes: whoever uses a device
/// would lose what is not written yet.
///
/// # Errors
/// When such a signal has come.
async fn wind_down(
    devices: &Arc<Devices>,
    signals: &mut EndSignals,
    notify: &Notify,
) -> Result<()> {
    let mut told = 0;
    loop {
        let ending = Arc::clone(devices);
        let left = tokio::task::spawn_blocking(move || ending.wind_down()).await?;
        let count = left.len();
        if count == 0 {
            return Ok(());
        }
        if told != count {
            told = count;
            notify.stopping(&format!("serving {count} devices that are in use"));
            for error in &left {
                tracing::warn!("served on, until it is not used or a second signal comes: {error}");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(WIND_DOWN_PERIOD) => {}
            signal = signals.next() => {
                bail!("a second signal, {signal}, ended it with {count} devices in use")
            }
        }
    }
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
