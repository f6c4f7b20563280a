//! The plugin's server: its services on its socket, registration with kubelet, probes over HTTP.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use sheave_csi_proto::v1::controller_server::ControllerServer;
use sheave_csi_proto::v1::identity_server::IdentityServer;
use sheave_csi_proto::v1::node_server::NodeServer;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tonic::service::Routes;
use tonic::transport::Server;

use crate::authority::incoming;
use crate::calls::Calls;
use crate::{
    ControllerService, Health, IdentityService, Metrics, NodeService, Registered,
    RegistrationService, SharedPlugin,
};

/// The most bytes of a request: names, maps and paths have bounds of a few KiB.
const REQUEST_LEN_MAX: usize = 1 << 20;

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
}

/// Where kubelet registers a plugin.
pub struct Registration {
    /// The socket in kubelet's directory.
    pub listener: UnixListener,
    /// The path of the plugin's socket, as kubelet finds it.
    pub endpoint: String,
}

/// Serves a plugin until `ended`.
///
/// # Errors
/// When a server fails.
pub async fn serve(serving: Serving, ended: impl Future<Output = ()>) -> io::Result<()> {
    let Serving { plugin, listener, socket, has_controller, node, registration, health } = serving;
    let (end, ending) = watch::channel(());
    let registered = registration.is_some().then(Registered::default);
    let metrics = Metrics::default();
    let volumes = plugin.volumes.clone();
    let probes = Health::new(&socket, volumes, metrics.clone(), registered.clone());
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
    if let Some(node) = node {
        let node = NodeServer::new(node);
        services = services.add_service(node.max_decoding_message_size(REQUEST_LEN_MAX));
    }
    let services = Server::builder().add_routes(Calls::new(metrics).around(services));
    let services = async {
        let served = services.serve_with_incoming_shutdown(incoming(listener), until(ending));
        served.await.map_err(io::Error::other)
    };
    let ended = async {
        ended.await;
        // Calls under way are answered first.
        drop(end);
        std::future::pending().await
    };
    tokio::select! {
        served = services => served,
        served = registering => served,
        served = probes => served,
        never = ended => never,
    }
}

/// Until the sender is dropped.
async fn until(mut ending: watch::Receiver<()>) {
    while ending.changed().await.is_ok() {}
}
