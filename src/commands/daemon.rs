//! `sheave daemon`: owns the block devices of this node.

use std::convert::Infallible;
use std::env;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::net::SocketType;
use sheave_core::printable;
use sheave_daemon::{DeadLinks, Devices, DevicesConfig, HandOver, Taken, protect};
use sheave_pools::{Judge, Pools, Site};
use sheave_shard::{Clock, Engine, EngineChoice, EngineConfig};
use sheave_telemetry::Registry;
use sheave_volumes::state_dir;
use tokio::sync::{Notify as Event, oneshot};

use crate::config::{DaemonConfig, POLL_US, POLL_US_DEFAULT, SHARDS};
use crate::control_api::{self, ControlSocket};
use crate::drain::DrainArgs;
use crate::log;
use crate::pool_calls::{PoolCalls, may_write, warn_of_missing_pools};
use crate::process::{HangUp, Insisted, Signals, default_shards, runtime};
use crate::systemd::{Notify, passed_socket};
use crate::telemetry::{MetricsServer, RuntimeDir, StatsSocket, listen_at};

/// How often to retry volumes that could not be opened, and to check for devices that were ended by
/// other means.
const LOOK_PERIOD: Duration = Duration::from_secs(2);
/// How soon to check again after a connection has died.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

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
    /// Serve Prometheus metrics over HTTP at this address
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<String>,
    /// Go on in place of the daemon that runs, which hands over what it has and ends
    #[arg(long)]
    takeover: bool,
    #[command(flatten)]
    pub(crate) drain: DrainArgs,
}

/// How often an ending daemon checks for devices that nothing uses any more.
const WIND_DOWN_PERIOD: Duration = Duration::from_secs(1);
/// Names the directory of a stand-in for a kernel, for tests.
const FAKE_KERNEL: &str = "SHEAVE_FAKE_KERNEL";
/// How long writing the log may prolong the pause of devices in a hand-over.
const LAST_LINES_TIMEOUT: Duration = Duration::from_millis(50);

const NEEDS_PROC: &str = "daemon: it finds itself and the users of its devices by /proc; mount it: \
                          mount -t proc proc /proc";

pub(crate) fn run(args: Args) -> Result<()> {
    let file = DaemonConfig::load(args.config.as_deref()).context("daemon")?;
    let state = state_dir().context("daemon")?;
    let fake = env::var_os(FAKE_KERNEL).map(PathBuf::from);
    // The stand-in for a kernel takes every file system for one that nodes can share.
    let judge: Judge = if fake.is_some() { |_| Ok(()) } else { sheave_pools::judge };
    let site = Site { state: Some(state.clone()), judge };
    let pools = Pools::new(&file.pools, &site).context("daemon")?;
    let engine = engine_config(&args, &file);
    // Resolved now: the file may be another one when a successor is started.
    let program = Program {
        path: env::current_exe().context(NEEDS_PROC)?,
        directory: env::current_dir().unwrap_or_else(|_| "/".into()),
    };
    log::start();
    let dir = RuntimeDir::locate();
    let notify = Notify::from_env();
    // These two must run before there are threads.
    let passed = passed_socket().context("daemon")?;
    protect();
    // Threads may be started from here on; they inherit the protection.
    log::start_writer();
    let runtime = runtime().context("daemon")?;
    let takeover = args.takeover;
    let metrics = args.metrics.or(file.metrics);
    let start =
        Start { engine, pools, dir, state, passed, notify, program, metrics, takeover, fake };
    let outcome = runtime.block_on(serve(start)).context("daemon");
    // Does not wait: a call may be blocked by a dead disk.
    runtime.shutdown_background();
    outcome
}

/// Settings by the command line, else the file, else the defaults.
fn engine_config(args: &Args, file: &DaemonConfig) -> EngineConfig {
    let shards = args.shards.or(file.shards).and_then(|shards| usize::try_from(shards).ok());
    EngineConfig {
        choice: EngineChoice::Auto,
        shards: shards.unwrap_or_else(default_shards),
        poll_us: args.poll_us.or(file.poll_us).unwrap_or(POLL_US_DEFAULT),
    }
}

/// The settings of a daemon.
struct Start {
    engine: EngineConfig,
    pools: Pools,
    dir: RuntimeDir,
    state: PathBuf,
    passed: Option<UnixListener>,
    notify: Notify,
    program: Program,
    metrics: Option<String>,
    takeover: bool,
    fake: Option<PathBuf>,
}

/// The command that starts a successor, and its directory, since its arguments may be relative.
struct Program {
    path: PathBuf,
    directory: PathBuf,
}

async fn serve(start: Start) -> Result<()> {
    let Start { engine, pools, dir, state, passed, notify, program, metrics, takeover, fake } =
        start;
    let mut signals = Signals::catch(HangUp::Reload)?;
    let hung_up = Event::new();
    let engine = Engine::start(engine, Clock::start())?;
    // From here on the devices of a predecessor wait, so everything else is done before.
    let taken = if takeover { Taken::ask(&handover_socket(&dir))? } else { None };
    let mut taken = taken.unwrap_or_default();
    let control = taken.control.take();
    if control.is_none() && passed.is_none() {
        // Reported at once; a dying daemon keeps its records a little longer.
        control_api::check_alone(&dir).await?;
    }
    let registry = Arc::new(Registry::new());
    let calls = Arc::new(PoolCalls::new(pools));
    let pools = Arc::clone(&calls.pools);
    let config = DevicesConfig {
        engine,
        records: state.join("devices"),
        left: std::mem::take(&mut taken.connections),
        fake,
        may_write: Box::new(move |text, was| may_write(&pools, text, was)),
    };
    let devices = Arc::new(Devices::start(config, Arc::clone(&registry))?);
    warn_of_missing_pools(&calls.pools, &devices.list());
    let looked_after = Arc::clone(&devices);
    let thread = std::thread::Builder::new().name("look-after".to_owned());
    thread.spawn(move || look_after(&looked_after))?;
    taken.count_on(&registry);
    let _stats = StatsSocket::start_in(&dir, Arc::clone(&registry))?;
    if let Some(address) = metrics {
        tokio::spawn(serve_metrics(address, Arc::clone(&registry)));
    }
    // Of daemons that are started together, only the one with the records gets here.
    let socket = match control {
        Some((listener, passed)) => ControlSocket::take_over(&dir, listener.into(), passed)?,
        None => ControlSocket::open(&dir, passed)?,
    };
    let (control, passed) = socket.share()?;
    let (notify, given) = (Arc::new(notify), Arc::clone(&devices));
    let told = Arc::clone(&notify);
    let hand_over = HandOver {
        devices: given,
        registry,
        control,
        passed,
        is_service: notify.is_service(),
        succeeded_by: Box::new(move |pid| told.succeeded_by(pid)),
        end: Box::new(end_at_once),
    };
    let path = handover_socket(&dir);
    let listener = listen_at(&path, SocketType::SEQPACKET);
    hand_over.start(listener.with_context(|| printable(&path).to_string())?)?;
    tracing::info!(socket = socket.name(), "ready");
    notify.ready();
    let (insist, insisted) = oneshot::channel();
    let ended = async {
        tracing::info!("ending: {}", signals.end(|| hung_up.notify_one()).await);
        notify.stopping("ending devices");
        if let Err(error) = wind_down(&devices, &mut signals, &hung_up, &notify).await {
            let _ = insist.send(error);
            std::future::pending().await
        }
    };
    let watched = Arc::clone(&devices);
    tokio::select! {
        served = socket.serve(Arc::clone(&devices), calls, ended) => served,
        // At once, even if a client still waits for an answer.
        Ok(error) = insisted => Err(error),
        never = notify.keep_alive(move |within| watched.check(within)) => match never {},
        never = succeed(&program, &hung_up, &notify) => match never {},
    }
}

/// Serves metrics as long as this process lives. A predecessor may have the address until it has
/// ended, and a disk does not fail for want of metrics.
async fn serve_metrics(address: String, registry: Arc<Registry>) -> Infallible {
    let mut was_busy = false;
    let _server = loop {
        match MetricsServer::start(&address, Arc::clone(&registry)) {
            Ok(server) => break server,
            Err(error) if !was_busy => tracing::warn!("it is tried again: {error:#}"),
            Err(_) => {}
        }
        was_busy = true;
        tokio::time::sleep(LOOK_PERIOD).await;
    };
    std::future::pending().await
}

/// Ends unused devices, until none are in use or a second signal comes: programs that use a device
/// would lose dirty pages. Those of publications are left to the next daemon.
///
/// # Errors
/// When a second signal has come.
async fn wind_down(
    devices: &Arc<Devices>,
    signals: &mut Signals,
    hung_up: &Event,
    notify: &Notify,
) -> Result<()> {
    let mut told = 0;
    loop {
        let ending = Arc::clone(devices);
        let winding_down = tokio::task::spawn_blocking(move || ending.wind_down());
        let left = tokio::select! {
            left = winding_down => left?,
            signal = signals.insisted(|| hung_up.notify_one()) => {
                let why = format!("a second signal, {signal}, ended it while it ended devices");
                return Err(Insisted(why).into());
            }
        };
        let count = left.len();
        if count == 0 {
            let published = devices.list().len();
            if published > 0 {
                tracing::info!(published, "unused devices of pods are left to the next daemon");
            }
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
            signal = signals.insisted(|| hung_up.notify_one()) => {
                return Err(Insisted(format!(
                    "a second signal, {signal}, ended it with {count} devices in use; \
                     the next daemon serves them on"
                ))
                .into());
            }
        }
    }
}

/// Starts a successor at each SIGHUP. If that succeeds, this process ends.
async fn succeed(program: &Program, hung_up: &Event, notify: &Notify) -> Infallible {
    loop {
        hung_up.notified().await;
        tracing::info!(program = %printable(&program.path), "asked for a successor");
        notify.reloading("giving way");
        let arguments = env::args_os().skip(1).filter(|argument| argument != "--takeover");
        let spawned = tokio::process::Command::new(&program.path)
            .current_dir(&program.directory)
            .args(arguments)
            .arg("--takeover")
            // The variable is only for the process that the service manager started.
            .env_remove("WATCHDOG_PID")
            .spawn();
        let ended = match spawned {
            Ok(mut child) => child.wait().await.map(|status| format!("it ended with {status}")),
            Err(error) => Err(error),
        };
        let why = ended.unwrap_or_else(|error| error.to_string());
        tracing::error!(why, "no successor: serving on");
        notify.ready();
    }
}

/// The hand-over socket of this user's daemon.
fn handover_socket(dir: &RuntimeDir) -> PathBuf {
    dir.path().join("handover.sock")
}

/// Ends the process when a successor has taken over everything.
fn end_at_once() -> Infallible {
    // Short: the successor waits for the end of this process.
    log::finish_within(LAST_LINES_TIMEOUT);
    std::process::exit(0)
}

/// Serves the devices of a daemon that died or handed over, retries volumes that cannot be opened
/// yet, and replaces connections that die.
fn look_after(devices: &Arc<Devices>) -> ! {
    let (mut dead_links, mut period) = (DeadLinks::default(), LOOK_PERIOD);
    loop {
        devices.look_after();
        // The kernel may notice before the shard does.
        period = if dead_links.wait(period) { LOOK_AGAIN } else { LOOK_PERIOD };
    }
}
