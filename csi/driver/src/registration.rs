//! Registration with kubelet: it looks into a directory for sockets, and asks each which plugin it
//! is (pluginregistration.v1).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use sheave_csi_proto::registration::registration_server::{Registration, RegistrationServer};
use sheave_csi_proto::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use tonic::{Request, Response, Status};

/// What kubelet calls plugins of this kind.
const TYPE: &str = "CSIPlugin";
/// Of the interface; kubelet wants a version that begins with 1.
const VERSION: &str = "1.0.0";

/// The socket of a driver in kubelet's directory.
#[must_use]
pub fn registration_socket(dir: &Path, driver: &str) -> PathBuf {
    dir.join(format!("{driver}-reg.sock"))
}

/// Whether kubelet has registered the plugin.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registered(Arc<AtomicBool>);

/// Answers kubelet.
pub(crate) struct RegistrationService {
    name: String,
    endpoint: String,
    registered: Registered,
}

impl Registered {
    /// Whether it has.
    pub(crate) fn get(&self) -> bool {
        self.0.load(Relaxed)
    }
}

impl RegistrationService {
    /// Of the driver of this name, whose socket kubelet finds at this path.
    pub(crate) fn new(
        name: &str,
        endpoint: &str,
        registered: Registered,
    ) -> RegistrationServer<Self> {
        let (name, endpoint) = (name.to_owned(), endpoint.to_owned());
        RegistrationServer::new(Self { name, endpoint, registered })
    }
}

#[tonic::async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: TYPE.to_owned(),
            name: self.name.clone(),
            endpoint: self.endpoint.clone(),
            supported_versions: vec![VERSION.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        self.registered.0.store(plugin_registered, Relaxed);
        if plugin_registered {
            tracing::info!(name = self.name, "registered with kubelet");
        } else {
            tracing::error!(name = self.name, error, "kubelet has not registered the plugin");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
