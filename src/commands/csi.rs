//! `sheave csi`: the plugin of the Container Storage Interface.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use sheave_control::v1::volumes_server::VolumesServer;
use sheave_control::{ControlClient, VolumesClient, channel, in_process};
use sheave_core::printable;
use sheave_csi::{NodeService, Plugin, Registration, Serving, check_node_id, registration_socket};
use sheave_pools::{Pools, Site};
use sheave_volumes::state_dir;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::oneshot;
use tonic::transport::Server;

use crate::config::DaemonConfig;
use crate::control_api::control_socket;
use crate::log;
use crate::pool_calls::PoolCalls;
use crate::process::{HangUp, Signals, runtime};
use crate::startup_taint;
use crate::telemetry::{RuntimeDir, listen_alone};
use crate::volumes_api::VolumesService;

/// The driver's name, unless the installation chooses another.
const NAME: &str = "csi.sheave.dev";
/// The scheme of an endpoint.
const UNIX: &str = "unix:";

/// Serve volumes to Kubernetes, by the Container Storage Interface.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sheave csi --mode node --endpoint unix:///run/csi/csi.sock --node-id \"$NODE_NAME\" \\
      --registration-dir /registration \\
      --kubelet-endpoint /var/lib/kubelet/plugins/csi.sheave.dev/csi.sock \\
      --health 127.0.0.1:9808
  sheave csi --mode controller --endpoint unix:///run/csi/csi.sock --config /etc/sheave/daemon.toml

A node's plugin is a client of the daemon of this node (sheave daemon), so it may be restarted at
any time. A controller without a daemon serves the pools of its configuration itself. Where each
node has pools of its own, its plugin is both: --mode all --local.")]
pub(crate) struct Args {
    /// The services that it has beside Identity
    #[arg(long, value_enum)]
    mode: Mode,
    /// Where it listens, such as unix:///run/csi/csi.sock
    #[arg(long, value_parser = parse_endpoint)]
    endpoint: PathBuf,
    /// This node, as the orchestrator calls it
    #[arg(long, value_parser = parse_node_id)]
    node_id: Option<String>,
    /// Configuration file of a controller, with its pools [default: /etc/sheave/daemon.toml]
    #[arg(long, value_name = "F")]
    config: Option<PathBuf>,
    /// The driver's name
    #[arg(long, default_value = NAME)]
    driver_name: String,
    /// Where kubelet looks for plugins, such as /var/lib/kubelet/plugins_registry
    #[arg(long, value_name = "DIR")]
    registration_dir: Option<PathBuf>,
    /// The path of the endpoint, as kubelet finds it [default: that of --endpoint]
    #[arg(long, value_name = "PATH", requires = "registration_dir")]
    kubelet_endpoint: Option<String>,
    /// The pools are of this node: it publishes and grows its volumes without a central controller
    #[arg(long)]
    local: bool,
    /// The taint that keeps pods off this node until the plugin works, such as
    /// csi.sheave.dev/agent-not-ready: it is removed then (in a pod of Kubernetes)
    #[arg(long, value_name = "KEY", requires = "registration_dir", requires = "node_id")]
    startup_taint: Option<String>,
    /// Where /healthz, /readyz and /metrics are answered
    #[arg(long, value_name = "IP:PORT")]
    health: Option<SocketAddr>,
}

/// What a plugin is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    /// Makes and publishes volumes
    Controller,
    /// Mounts them on this node
    Node,
    /// Both
    All,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let node_id = match (args.mode, &args.node_id) {
        (Mode::Controller, id) => id.clone(),
        (_, Some(id)) => Some(id.clone()),
        (_, None) => bail!("csi: --node-id is missing: how does the orchestrator call this node?"),
    };
    if args.local && args.mode != Mode::All {
        bail!("csi: --local is for --mode all: controller and node are one then");
    }
    log::start();
    log::start_writer();
    let runtime = runtime().context("csi")?;
    let outcome = runtime.block_on(serve(&args, node_id)).context("csi");
    // Does not wait: a call may be blocked by a dead disk. What it began goes on or is repeated.
    runtime.shutdown_background();
    outcome
}

async fn serve(args: &Args, node_id: Option<String>) -> Result<()> {
    let mut signals = Signals::catch(HangUp::End)?;
    let socket = control_socket(&RuntimeDir::locate());
    let has_devices = args.mode != Mode::Controller;
    let volumes = match has_devices {
        true => VolumesClient::new(channel(&socket)),
        false => own_volumes(args)?,
    };
    let plugin = Arc::new(Plugin {
        name: args.driver_name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node_id,
        is_local: args.local,
        volumes,
        devices: has_devices.then(|| ControlClient::new(channel(&socket))),
    });
    let node = match has_devices {
        true => Some(NodeService::open(Arc::clone(&plugin), state_dir()?.join("node"))?),
        false => None,
    };
    let health = match args.health {
        Some(address) => {
            let what = || format!("probes at {address}");
            let listener = TcpListener::bind(address).await.with_context(what)?;
            tracing::info!(probes = %listener.local_addr().with_context(what)?, "answering probes");
            Some(listener)
        }
        None => None,
    };
    let ready = args.startup_taint.as_deref().zip(args.node_id.as_deref()).map(|(key, node)| {
        let (ready, is_ready) = oneshot::channel();
        tokio::spawn(startup_taint::remove_when(is_ready, key.to_owned(), node.to_owned()));
        ready
    });
    // Before kubelet is led to this process.
    let listener = listen(&args.endpoint).await?;
    let registration = args.registration_dir.as_ref().map(|dir| registration(args, dir));
    let serving = Serving {
        plugin,
        listener,
        socket: args.endpoint.clone(),
        has_controller: args.mode != Mode::Node,
        node,
        registration: registration.transpose()?,
        health,
        ready,
    };
    tracing::info!(endpoint = %printable(&args.endpoint), mode = ?args.mode, "ready");
    let ended = async {
        tracing::info!("ending: {}", signals.end(|| {}).await);
    };
    Ok(sheave_csi::serve(serving, ended).await?)
}

/// The pools of the configuration, served to this process.
fn own_volumes(args: &Args) -> Result<VolumesClient> {
    let file = DaemonConfig::load(args.config.as_deref())?;
    if file.pools.is_empty() {
        bail!("the configuration has no pools, so there are no volumes; see docs/volumes.md");
    }
    let calls = Arc::new(PoolCalls::new(Pools::new(&file.pools, &Site::default())?));
    let (channel, incoming) = in_process();
    let service = VolumesServer::new(VolumesService::new(calls, None));
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    Ok(VolumesClient::new(channel))
}

fn registration(args: &Args, dir: &Path) -> Result<Registration> {
    let path = registration_socket(dir, &args.driver_name);
    let what = || format!("registration socket {}", printable(&path));
    // In its place at once: kubelet takes any socket in the directory for a plugin's.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).with_context(what),
        _ => {}
    }
    let listener = UnixListener::bind(&path).with_context(what)?;
    let own = || args.endpoint.to_string_lossy().into_owned();
    let endpoint = args.kubelet_endpoint.clone().unwrap_or_else(own);
    Ok(Registration { listener, endpoint })
}

/// Listens in place of a plugin that is gone.
async fn listen(path: &Path) -> Result<UnixListener> {
    let what = || format!("socket {}", printable(path));
    let listener = listen_alone(path).await.with_context(what)?;
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.set_nonblocking(true).with_context(what)?;
    UnixListener::from_std(listener).with_context(what)
}

/// `unix:///run/csi/csi.sock`, `unix:/run/csi/csi.sock` or a path.
fn parse_endpoint(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix(UNIX).unwrap_or(text);
    let path = path.strip_prefix("//").unwrap_or(path);
    match path.starts_with('/') {
        true => Ok(path.into()),
        false => Err("expected an absolute path of a socket, such as unix:///run/csi.sock".into()),
    }
}

fn parse_node_id(text: &str) -> Result<String, String> {
    check_node_id(text).map(str::to_owned).map_err(|status| status.message().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_paths_of_sockets() {
        for text in ["unix:///a/b", "unix:/a/b", "/a/b"] {
            assert_eq!(parse_endpoint(text), Ok("/a/b".into()), "{text}");
        }
        for text in ["", "unix://", "unix://a/b", "tcp://1.2.3.4:5", "a"] {
            assert!(parse_endpoint(text).is_err(), "{text}");
        }
    }
}
