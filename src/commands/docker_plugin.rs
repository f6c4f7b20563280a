//! `sheave docker-plugin`: the volume plugin of Docker.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use axum::serve::Listener as _;
use sheave_client::Daemon;
use sheave_control::{ControlClient, VolumesClient, channel};
use sheave_core::printable;
use sheave_docker::{Plugin, Scope, Settings, TlsAcceptor, TlsListener};
use sheave_tls::{TlsFiles, server_tls};
use sheave_volumes::state_dir;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

use super::node_name;
use crate::control_api::control_socket;
use crate::log;
use crate::process::{HangUp, Signals, runtime};
use crate::systemd::passed_socket;
use crate::telemetry::{RuntimeDir, listen_alone};

/// Where Docker looks for plugins.
const SOCKET: &str = "/run/docker/plugins/sheave.sock";
/// How often it looks for volumes that are staged and have no container.
const TIDY_INTERVAL: Duration = Duration::from_secs(30);

/// Serve volumes of pools to Docker.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave docker-plugin
  docker volume create -d sheave -o pool=fast -o size=10G db
  docker run -v db:/var/lib/db …

It is a client of the daemon of this node (sheave daemon), and may be restarted at any time. A
socket that the service manager passes is used in place of --socket; see docs/docker.md.")]
pub(crate) struct Args {
    /// Where it listens
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// Listen on TCP with TLS in place of the socket, for clients with a certificate
    #[arg(long, value_name = "IP:PORT", requires_all = ["tls_cert", "tls_key", "tls_client_ca"])]
    listen: Option<SocketAddr>,
    /// The server's certificate chain, PEM or DER
    #[arg(long, value_name = "F", requires = "listen")]
    tls_cert: Option<PathBuf>,
    /// Its private key
    #[arg(long, value_name = "F", requires = "listen")]
    tls_key: Option<PathBuf>,
    /// Authorities of the clients: one of theirs may do all that the plugin can
    #[arg(long, value_name = "F", requires = "listen")]
    tls_client_ca: Option<PathBuf>,
    /// This node, as volumes are published to it [default: the host's name]
    #[arg(long, value_name = "NAME")]
    node_id: Option<String>,
    /// Where volumes are mounted [default: docker/mounts in the directory of state]
    #[arg(long, value_name = "DIR")]
    mounts: Option<PathBuf>,
    /// Whether a volume of one name is the same on all nodes (Swarm)
    #[arg(long, value_enum, default_value = "local")]
    scope: ScopeArg,
}

/// See [`Scope`].
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ScopeArg {
    /// Each node has its own
    Local,
    /// It is the same on all nodes; for pools that nodes share
    Global,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let passed = passed_socket()?;
    log::start();
    log::start_writer();
    let runtime = runtime().context("docker-plugin")?;
    let outcome = runtime.block_on(serve(args, passed)).context("docker-plugin");
    // Does not wait: a call may be blocked by a dead disk. What it began goes on or is repeated.
    runtime.shutdown_background();
    outcome
}

async fn serve(args: Args, passed: Option<std::os::unix::net::UnixListener>) -> Result<()> {
    let mut signals = Signals::catch(HangUp::End)?;
    let socket = control_socket(&RuntimeDir::locate());
    let (volumes, devices) = (channel(&socket), channel(&socket));
    let (volumes, devices) = (VolumesClient::new(volumes), ControlClient::new(devices));
    let state_dir = state_dir()?;
    let own_dir = state_dir.join("docker");
    let settings = Settings {
        node_id: args.node_id.clone().map_or_else(node_name, Ok)?,
        state_dir: state_dir.join("node"),
        records_dir: own_dir.join("volumes"),
        mounts_dir: args.mounts.clone().unwrap_or_else(|| own_dir.join("mounts")),
        scope: match args.scope {
            ScopeArg::Local => Scope::Local,
            ScopeArg::Global => Scope::Global,
        },
    };
    let daemon = Daemon::new(Handle::current(), volumes, devices);
    // It may wait for another plugin to end.
    let opening = spawn_blocking(move || Plugin::open(daemon, settings));
    let plugin = tokio::select! {
        opened = opening => Arc::new(opened??),
        _ = signals.end(|| {}) => return Ok(()),
    };
    tokio::spawn(tidy(Arc::clone(&plugin)));
    if let Some(address) = args.listen {
        let listener = listen_with_tls(&args, address).await?;
        tracing::info!(address = %listener.local_addr()?, "ready");
        return Ok(sheave_docker::serve(plugin, listener, ended(signals)).await?);
    }
    let what = || format!("socket {}", printable(&args.socket));
    let listener = match passed {
        Some(listener) => listener,
        None => listen_alone(&args.socket).await.with_context(what)?.into(),
    };
    listener.set_nonblocking(true).with_context(what)?;
    let listener = UnixListener::from_std(listener).with_context(what)?;
    tracing::info!(socket = %printable(&args.socket), "ready");
    Ok(sheave_docker::serve(plugin, listener, ended(signals)).await?)
}

async fn ended(mut signals: Signals) {
    tracing::info!("ending: {}", signals.end(|| {}).await);
}

async fn listen_with_tls(args: &Args, address: SocketAddr) -> Result<TlsListener> {
    let missing = || anyhow!("--listen needs --tls-cert, --tls-key and --tls-client-ca");
    let files = TlsFiles {
        cert: args.tls_cert.clone().with_context(missing)?,
        key: args.tls_key.clone().with_context(missing)?,
        client_ca: Some(args.tls_client_ca.clone().with_context(missing)?),
        client_crl: None,
    };
    let acceptor = TlsAcceptor::from(server_tls(&files)?);
    let listener = TcpListener::bind(address).await.with_context(|| address.to_string())?;
    Ok(TlsListener::new(listener, acceptor))
}

async fn tidy(plugin: Arc<Plugin>) {
    let mut interval = tokio::time::interval(TIDY_INTERVAL);
    loop {
        interval.tick().await;
        let plugin = Arc::clone(&plugin);
        // A panic is in the log.
        let _ = spawn_blocking(move || plugin.tidy()).await;
    }
}
