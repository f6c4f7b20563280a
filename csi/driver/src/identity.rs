//! The service Identity: what the plugin is, and whether it works.

use sheave_csi_proto::v1::identity_server::Identity;
use sheave_csi_proto::v1::plugin_capability::service::Type as Service;
use sheave_csi_proto::v1::plugin_capability::volume_expansion::Type as Expansion;
use sheave_csi_proto::v1::plugin_capability::{self, Type};
use sheave_csi_proto::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, PluginCapability, ProbeRequest, ProbeResponse,
};
use tonic::{Request, Response, Status};

use crate::{SharedPlugin, control};

/// Serves Identity.
pub(crate) struct IdentityService {
    plugin: SharedPlugin,
}

impl IdentityService {
    /// Of this plugin.
    pub(crate) fn new(plugin: SharedPlugin) -> Self {
        Self { plugin }
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.plugin.name.clone(),
            vendor_version: self.plugin.version.clone(),
            ..GetPluginInfoResponse::default()
        }))
    }

    /// The same of every plugin of this version, as the specification wants it.
    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let services = [Service::ControllerService, Service::VolumeAccessibilityConstraints];
        let service = |of: Service| plugin_capability::Service { r#type: of.into() };
        let services = services.map(|of| Type::Service(service(of)));
        let expansion = plugin_capability::VolumeExpansion { r#type: Expansion::Online.into() };
        let types = services.into_iter().chain([Type::VolumeExpansion(expansion)]);
        let capabilities = types.map(|of| PluginCapability { r#type: Some(of) }).collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    /// Ready when the server of the volumes answers.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let ready = control::probe(&self.plugin.volumes).await.is_ok();
        Ok(Response::new(ProbeResponse { ready: Some(ready) }))
    }
}
