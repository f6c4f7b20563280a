//! The plugin's server: its services on its socket, registration with kubelet, probes over HTTP.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sheave_csi_proto::v1::controller_server::ControllerServer;
use sheave_csi_proto::v1::identity_server::IdentityServer;
use sheave_csi_proto::v1::node_server::NodeServer;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;
use tonic::service::Routes;
use tonic::transport::Server;

use crate::authority::incoming;
use crate::calls::Calls;
use crate::controller::ControllerService;
use crate::health::Health;
use crate::identity::IdentityService;
use crate::registration::{Registered, RegistrationService};
use crate::{Metrics, NodeService, SharedPlugin};

/// The most bytes of a request: names, maps and paths have bounds of a few KiB.
const REQUEST_LEN_MAX: usize = 1 << 20;

/// How soon calls that are under way when the plugin ends are answered, as all calls are.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
/// How often it is looked whether the plugin is ready.
const READY_POLL: Duration = Duration::from_millis(500);

/// What a plugin serves, and where.
pub struct Serving {
    /// What its services share.
    pub plugin: SharedPlugin,
    /// The plugin's socket.
    pub listener: UnixListener,
    /// Its path, for the plugin's own probes.
    pub socket: PathBuf,
    /// Whether it serves Controller.
    pub has_controller: bool,
    /// Serves Node if it is there.
    pub node: Option<NodeService>,
    /// Where kubelet registers the plugin, if it is to.
    pub registration: Option<Registration>,
    /// Where probes are answered over HTTP, if they are to be.
    pub health: Option<TcpListener>,
    /// Gets a message once kubelet has registered the plugin and the daemon answers.
    pub ready: Option<oneshot::Sender<()>>,
}

/// Where kubelet registers a plugin.
pub struct Registration {
    /// The socket in kubelet's directory.
    pub listener: UnixListener,
    /// The path of the plugin's socket, as kubelet finds it.
    pub endpoint: String,
}

/// Serves a plugin until `ended`, and then until volumes whose pods are gone have been unstaged,
/// for 25 s at most.
///
/// # Errors
/// When a server fails.
pub async fn serve(serving: Serving, ended: impl Future<Output = ()>) -> io::Result<()> {
    let Serving { plugin, listener, socket, has_controller, node, registration, health, ready } =
        serving;
    let (end, ending) = watch::channel(());
    let registered = registration.is_some().then(Registered::default);
    let metrics = Metrics::default();
    let volumes = plugin.volumes.clone();
    let probes = Health::new(&socket, volumes, metrics.clone(), registered.clone());
    let announcing = announce(ready, probes.clone());
    let probes = async {
        let Some(listener) = health else { return std::future::pending().await };
        axum::serve(listener, probes.router()).await
    };
    let name = plugin.name.clone();
    let registering = async {
        let Some(Registration { listener, endpoint }) = registration else {
            return std::future::pending().await;
        };
        let registered = registered.unwrap_or_default();
        let service = RegistrationService::new(&name, &endpoint, registered);
        let server = Server::builder().add_service(service);
        server.serve_with_incoming(incoming(listener)).await.map_err(io::Error::other)
    };
    let identity = IdentityServer::new(IdentityService::new(Arc::clone(&plugin)));
    let mut services = Routes::new(identity);
    if has_controller {
        let controller = ControllerServer::new(ControllerService::new(plugin));
        services = services.add_service(controller.max_decoding_message_size(REQUEST_LEN_MAX));
    }
    let node = node.map(Arc::new);
    if let Some(node) = &node {
        let node = NodeServer::from_arc(Arc::clone(node));
        services = services.add_service(node.max_decoding_message_size(REQUEST_LEN_MAX));
    }
    let services = Server::builder().add_routes(Calls::new(metrics).around(services));
    let services = async {
        let served = services.serve_with_incoming_shutdown(incoming(listener), until(ending));
        served.await.map_err(io::Error::other)
    };
    let ended = async {
        ended.await;
        if let Some(node) = node {
            node.given_back().await;
        }
        // Calls under way are answered first. A client may keep its connection open.
        drop(end);
        sleep(ANSWERED_WITHIN).await;
        Ok(())
    };
    tokio::select! {
        served = services => served,
        served = registering => served,
        served = probes => served,
        never = announcing => never,
        served = ended => served,
    }
}

/// Sends a message as soon as the plugin is ready, and never ends.
async fn announce<T>(ready: Option<oneshot::Sender<()>>, health: Health) -> T {
    if let Some(ready) = ready {
        while health.ready().await.is_err() {
            sleep(READY_POLL).await;
        }
        // The receiver may have ended already.
        let _ = ready.send(());
    }
    std::future::pending().await
}

/// Until the sender is dropped.
async fn until(mut ending: watch::Receiver<()>) {
    while ending.changed().await.is_ok() {}
}
