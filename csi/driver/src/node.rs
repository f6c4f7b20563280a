//! The service Node: volumes on this node.

mod requests;
mod status;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sheave_client::{Daemon, DaemonVolumes};
use sheave_csi_proto::v1::node_get_storage_health_response::StorageBackendHealth;
use sheave_csi_proto::v1::node_server::Node;
use sheave_csi_proto::v1::node_service_capability::{self, Rpc, rpc};
use sheave_csi_proto::v1::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest,
    NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetStorageHealthRequest, NodeGetStorageHealthResponse, NodeGetVolumeHealthRequest,
    NodeGetVolumeHealthResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability,
    NodeStageVolumeRequest, NodeStageVolumeResponse, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse,
    StorageHealthErrorType, Topology, VolumeHealth,
};
use sheave_node::{Problem, Tools};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tonic::{Request, Response, Status};

use crate::sizes::signed;
use crate::{SharedPlugin, checks, control};
use requests::path;
use status::{condition, health_entry, is_final, status, usage};

/// What uses the volumes that are staged here.
const USER: &str = "csi";
/// How long a plugin that is asked to end stays for volumes whose pods are gone: less than the
/// grace period of its own pod.
const GIVE_BACK_MAX: Duration = Duration::from_secs(25);
const GIVE_BACK_POLL: Duration = Duration::from_millis(200);

/// What this service can do. Health is advertised in the old way, too: Kubernetes up to 1.36 reads
/// no other.
const CAPABILITIES: [rpc::Type; 7] = [
    rpc::Type::StageUnstageVolume,
    rpc::Type::GetVolumeStats,
    rpc::Type::ExpandVolume,
    rpc::Type::VolumeCondition,
    rpc::Type::SingleNodeMultiWriter,
    rpc::Type::GetVolumeHealth,
    rpc::Type::GetStorageHealth,
];

/// Serves Node.
pub struct NodeService {
    plugin: SharedPlugin,
    node_id: String,
    engine: Arc<sheave_node::Node>,
}

impl NodeService {
    /// Of this plugin, with its state in this directory. The runtime is that of the caller.
    ///
    /// # Errors
    /// When the plugin has no node or no devices, or the directory cannot be made.
    pub fn open(plugin: SharedPlugin, state_dir: PathBuf) -> Result<Self, sheave_node::Error> {
        let missing = |what: &str| {
            let why = format!("the service Node needs {what}");
            sheave_node::Error::new(sheave_node::Kind::Invalid, why)
        };
        let node_id = plugin.node_id.clone().ok_or_else(|| missing("a node id"))?;
        let devices = plugin.devices.clone().ok_or_else(|| missing("a daemon"))?;
        let volumes = plugin.volumes.clone();
        let daemon = Daemon::new(Handle::current(), volumes, devices);
        let volumes = DaemonVolumes { daemon, node_id: node_id.clone() };
        let engine = sheave_node::Node::open(state_dir, Arc::new(volumes), Tools::from_env())?;
        Ok(Self { plugin, node_id, engine: Arc::new(engine) })
    }

    /// The engine's calls block.
    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&sheave_node::Node) -> Result<T, sheave_node::Error> + Send + 'static,
    ) -> Result<T, Status> {
        let engine = Arc::clone(&self.engine);
        let called = spawn_blocking(move || call(&engine)).await;
        called.map_err(|error| Status::internal(error.to_string()))?.map_err(status)
    }

    /// Waits until no volume is staged that no pod uses, for a limited time. A node that shuts down
    /// ends its pods first, and this plugin, which unstages their volumes, right behind them.
    pub(crate) async fn given_back(&self) {
        let given_back = async {
            // Without an answer there is nothing to wait for.
            while self.blocking(|engine| engine.is_giving_back(USER)).await.unwrap_or_default() {
                sleep(GIVE_BACK_POLL).await;
            }
        };
        if timeout(GIVE_BACK_MAX, given_back).await.is_err() {
            let limit_s = GIVE_BACK_MAX.as_secs();
            tracing::warn!(limit_s, "ending, though volumes are staged that no pod uses");
        }
    }

    async fn problems(&self, volume: String) -> Result<Vec<Problem>, Status> {
        self.blocking(move |engine| engine.health(&volume)).await
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let (mut request, capability) = requests::stage(request.into_inner())?;
        if self.plugin.is_local {
            let epoch = self.plugin.publish_here(&request.volume, &capability).await?;
            request.attach.epoch = Some(epoch);
        }
        let volume = request.volume.clone();
        let staged = self.blocking(move |engine| engine.stage(request)).await;
        if let Err(status) = &staged
            && self.plugin.is_local
            && is_final(status.code())
        {
            // No unstaging follows. This fails while the volume is a device, which another
            // staging uses.
            let _ = self.plugin.unpublish_here(&volume).await;
        }
        staged.map(|()| Response::new(NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let NodeUnstageVolumeRequest { volume_id, staging_target_path } = request.into_inner();
        checks::text("volume_id", &volume_id)?;
        let staging = path("staging_target_path", &staging_target_path)?;
        let id = volume_id.clone();
        self.blocking(move |engine| engine.unstage(&id, &staging)).await?;
        if self.plugin.is_local {
            self.plugin.unpublish_unstaged(&volume_id).await?;
        }
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = requests::publish(request.into_inner())?;
        self.blocking(move |engine| engine.publish(request)).await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let NodeUnpublishVolumeRequest { volume_id, target_path } = request.into_inner();
        checks::text("volume_id", &volume_id)?;
        let target = path("target_path", &target_path)?;
        self.blocking(move |engine| engine.unpublish(&volume_id, &target)).await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let volume = checks::text("volume_id", &request.volume_id)?.to_owned();
        let path = requests::volume_path(&request.volume_path)?;
        let id = volume.clone();
        let stats = self.blocking(move |engine| engine.stats(&id, &path));
        // Each may wait for the storage.
        let (stats, problems) = tokio::join!(stats, self.problems(volume));
        let stats = stats?;
        let volume_condition = problems.ok().map(|problems| condition(&problems));
        Ok(Response::new(NodeGetVolumeStatsResponse { usage: usage(&stats), volume_condition }))
    }

    async fn node_get_volume_health(
        &self,
        request: Request<NodeGetVolumeHealthRequest>,
    ) -> Result<Response<NodeGetVolumeHealthResponse>, Status> {
        let NodeGetVolumeHealthRequest { volume_id, .. } = request.into_inner();
        checks::text("volume_id", &volume_id)?;
        let problems = self.problems(volume_id.clone()).await?;
        let health_statuses = problems.into_iter().map(health_entry).collect();
        let volume_health = Some(VolumeHealth { volume_id, health_statuses });
        Ok(Response::new(NodeGetVolumeHealthResponse { volume_health }))
    }

    /// Whether the daemon answers. What the storage of pools does is the health of volumes.
    async fn node_get_storage_health(
        &self,
        _: Request<NodeGetStorageHealthRequest>,
    ) -> Result<Response<NodeGetStorageHealthResponse>, Status> {
        let unreachable = |why: String| StorageBackendHealth {
            status: StorageHealthErrorType::StorageUnreachable.into(),
            reason: "DaemonUnreachable".to_owned(),
            message: checks::message(&format!("the daemon of this node: {why}; look at its log")),
            volume_capability: None,
        };
        let probed = control::probe(&self.plugin.volumes).await;
        let backend_health = probed.err().map(unreachable).into_iter().collect();
        Ok(Response::new(NodeGetStorageHealthResponse { backend_health }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let (volume, path, range) = requests::expand(request.into_inner())?;
        if self.plugin.is_local {
            // Nothing grows that is not here.
            let (id, at) = (volume.clone(), path.clone());
            self.blocking(move |engine| engine.stats(&id, &at).map(drop)).await?;
            self.plugin.grow_here(&volume, range).await?;
        }
        let required = Some(range.required_bytes).filter(|bytes| *bytes != 0);
        let size = self.blocking(move |engine| engine.expand(&volume, &path, required)).await?;
        range.check_limit(size)?;
        Ok(Response::new(NodeExpandVolumeResponse { capacity_bytes: signed(size) }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability = |of: rpc::Type| NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(Rpc { r#type: of.into() })),
        };
        let capabilities = CAPABILITIES.into_iter().map(capability).collect();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        let segments = [(self.plugin.topology_key(), self.node_id.clone())].into();
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.node_id.clone(),
            // No limit that is known.
            max_volumes_per_node: 0,
            accessible_topology: Some(Topology { segments }),
        }))
    }
}
