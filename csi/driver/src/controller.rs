//! The service Controller: volumes of the cluster.
//!
//! Checks come in one order: what is missing or too long, what the capabilities and parameters
//! allow, then the volume, then its state. None has an effect.

mod convert;
mod health;
mod parameters;

use sheave_control::VolumesClient;
use sheave_control::v1 as api;
use sheave_csi_proto::v1 as csi;
use sheave_csi_proto::v1::controller_server::Controller;
use sheave_csi_proto::v1::controller_service_capability::{Rpc, Type, rpc};
use tonic::{Request, Response, Status};

use crate::SharedPlugin;
use crate::capability::Capability;
use crate::checks::{self, text};
use crate::context::Publication;
use crate::control::call;
use crate::sizes::{SizeRange, signed};
use convert::volume;
use parameters::Parameters;

/// What this controller can do, of every plugin of this version.
const CAPABILITIES: [rpc::Type; 13] = [
    rpc::Type::CreateDeleteVolume,
    rpc::Type::PublishUnpublishVolume,
    rpc::Type::ListVolumes,
    rpc::Type::GetCapacity,
    rpc::Type::PublishReadonly,
    rpc::Type::ExpandVolume,
    rpc::Type::ListVolumesPublishedNodes,
    rpc::Type::GetVolume,
    rpc::Type::SingleNodeMultiWriter,
    rpc::Type::ModifyVolume,
    rpc::Type::VolumeCondition,
    rpc::Type::GetVolumeHealth,
    rpc::Type::ListVolumeHealth,
];
/// Those whose calls come from one place for the whole cluster, where the volumes of a node are not
/// known.
const CENTRAL: [rpc::Type; 5] = [
    rpc::Type::PublishUnpublishVolume,
    rpc::Type::PublishReadonly,
    rpc::Type::ExpandVolume,
    rpc::Type::ListVolumesPublishedNodes,
    rpc::Type::ModifyVolume,
];

/// Serves Controller.
pub(crate) struct ControllerService {
    plugin: SharedPlugin,
}

impl ControllerService {
    /// Of this plugin.
    pub(crate) fn new(plugin: SharedPlugin) -> Self {
        Self { plugin }
    }

    fn volumes(&self) -> VolumesClient {
        self.plugin.volumes.clone()
    }

    async fn pools(&self) -> Result<Vec<api::Pool>, Status> {
        let mut volumes = self.volumes();
        Ok(call(volumes.list_pools(api::ListPoolsRequest {})).await?.pools)
    }

    async fn find(&self, id: &str) -> Result<api::Volume, Status> {
        let key = Some(api::get_volume_request::Key::Id(id.to_owned()));
        let mut volumes = self.volumes();
        let answer = call(volumes.get_volume(api::GetVolumeRequest { key })).await?;
        answer.volume.ok_or_else(|| Status::internal(format!("{id}: an empty answer")))
    }

    fn volume(&self, of: &api::Volume) -> csi::Volume {
        volume(&self.plugin, of)
    }

    /// Checks that a volume of this pool can be used so.
    fn check_all(pool: &api::Pool, capabilities: &[Capability]) -> Result<(), Status> {
        capabilities.iter().try_for_each(|capability| capability.check_pool(pool))
    }

    /// The volumes behind a token.
    async fn page(
        &self,
        max_entries: i32,
        starting_token: String,
    ) -> Result<api::ListVolumesResponse, Status> {
        let max_entries = u32::try_from(max_entries)
            .map_err(|_| Status::invalid_argument("max_entries is below 0"))?;
        let request = api::ListVolumesRequest {
            page_token: starting_token,
            max_entries,
            ..Default::default()
        };
        let page = call(self.volumes().list_volumes(request)).await?;
        match page.troubles.first() {
            None => Ok(page),
            // What is not listed would be taken for deleted, or for published to no node.
            Some(trouble) => {
                let why = format!("pool {} cannot be listed: {}", trouble.pool, trouble.message);
                Err(Status::unavailable(why))
            }
        }
    }
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = text("name", &request.name)?;
        let capabilities = Capability::parse_all(&request.volume_capabilities)?;
        for (what, map) in [
            ("parameters", &request.parameters),
            ("mutable_parameters", &request.mutable_parameters),
            ("secrets", &request.secrets),
        ] {
            checks::map(what, map)?;
        }
        let size = SizeRange::parse(request.capacity_range.as_ref())?;
        let parameters = Parameters::new(&request.parameters, &request.mutable_parameters)?;
        if request.volume_content_source.is_some() {
            let why =
                format!("{name}: pools have neither snapshots nor clones; leave out the source");
            return Err(Status::invalid_argument(why));
        }
        let pools = self.pools().await?;
        let pool = parameters.pool(&pools)?;
        Self::check_all(pool, &capabilities)?;
        self.plugin.check_topology(pool.local, request.accessibility_requirements.as_ref())?;
        let create = api::CreateVolumeRequest {
            pool: pool.name.clone(),
            name: name.to_owned(),
            required_bytes: size.required_bytes,
            limit_bytes: size.limit_bytes,
            limit_bytes_per_second: parameters.limit_bps.unwrap_or_default(),
            limit_ops_per_second: parameters.limit_iops.unwrap_or_default(),
            parameters: parameters.kept(),
        };
        let made = call(self.volumes().create_volume(create)).await?.volume;
        let made = made.ok_or_else(|| Status::internal(format!("{name}: an empty answer")))?;
        Ok(Response::new(csi::CreateVolumeResponse { volume: Some(self.volume(&made)) }))
    }

    async fn delete_volume(
        &self,
        request: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = text("volume_id", &request.volume_id)?.to_owned();
        checks::map("secrets", &request.secrets)?;
        if self.plugin.is_local {
            self.plugin.unpublish_here(&id).await?;
        }
        call(self.volumes().delete_volume(api::DeleteVolumeRequest { id, uses: None })).await?;
        Ok(Response::new(csi::DeleteVolumeResponse {}))
    }

    async fn controller_publish_volume(
        &self,
        request: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = text("volume_id", &request.volume_id)?;
        let node = checks::check_node_id(&request.node_id)?;
        let wanted = Capability::parse(request.volume_capability.as_ref())?;
        checks::map("secrets", &request.secrets)?;
        let found = self.find(id).await?;
        self.plugin.check_node(&found, node)?;
        let publish = api::PublishVolumeRequest {
            id: id.to_owned(),
            node: node.to_owned(),
            read_only: request.readonly,
            mode: wanted.mode.into(),
            block: wanted.is_block(),
            claim: String::new(),
        };
        let epoch = call(self.volumes().publish_volume(publish)).await?.epoch;
        let read_only = request.readonly || wanted.is_reader_only();
        let publish_context = Publication { epoch: Some(epoch), read_only }.to_context();
        Ok(Response::new(csi::ControllerPublishVolumeResponse { publish_context }))
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = text("volume_id", &request.volume_id)?.to_owned();
        let node = match request.node_id.as_str() {
            "" => String::new(),
            node => checks::check_node_id(node)?.to_owned(),
        };
        checks::map("secrets", &request.secrets)?;
        // That of FlexVolume or Docker is theirs to end.
        let claim = Some(String::new());
        let unpublish = api::UnpublishVolumeRequest { id, node, claim };
        call(self.volumes().unpublish_volume(unpublish)).await?;
        Ok(Response::new(csi::ControllerUnpublishVolumeResponse {}))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        let id = text("volume_id", &request.volume_id)?;
        let capabilities = Capability::parse_all(&request.volume_capabilities)?;
        checks::map("parameters", &request.parameters)?;
        let found = self.find(id).await?;
        let pools = self.pools().await?;
        let pool = pools.iter().find(|pool| pool.name == found.pool);
        let checked = Parameters::new(&request.parameters, &request.mutable_parameters)
            .and_then(|_| pool.map_or(Ok(()), |pool| Self::check_all(pool, &capabilities)));
        let response = match checked {
            Ok(()) => csi::ValidateVolumeCapabilitiesResponse {
                confirmed: Some(csi::validate_volume_capabilities_response::Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: request.mutable_parameters,
                }),
                message: String::new(),
            },
            Err(why) => csi::ValidateVolumeCapabilitiesResponse {
                confirmed: None,
                message: why.message().to_owned(),
            },
        };
        Ok(Response::new(response))
    }

    async fn list_volumes(
        &self,
        request: Request<csi::ListVolumesRequest>,
    ) -> Result<Response<csi::ListVolumesResponse>, Status> {
        let csi::ListVolumesRequest { max_entries, starting_token } = request.into_inner();
        let page = self.page(max_entries, starting_token).await?;
        let entry = |of: &api::Volume| csi::list_volumes_response::Entry {
            volume: Some(self.volume(of)),
            status: Some(csi::list_volumes_response::VolumeStatus {
                published_node_ids: convert::nodes(of),
                volume_condition: Some(health::condition(of)),
            }),
        };
        let entries = page.volumes.iter().map(entry).collect();
        let next_token = page.next_page_token;
        Ok(Response::new(csi::ListVolumesResponse { entries, next_token }))
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<csi::ControllerListVolumeHealthRequest>,
    ) -> Result<Response<csi::ControllerListVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        let page = self.page(request.max_entries, request.starting_token).await?;
        let entries = page.volumes.iter().map(health::health).collect();
        let next_token = page.next_page_token;
        Ok(Response::new(csi::ControllerListVolumeHealthResponse { entries, next_token }))
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<csi::ControllerGetVolumeHealthRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        let id = text("volume_id", &request.volume_id)?;
        let volume_health = match self.find(id).await {
            Ok(found) => health::health(&found),
            Err(why) => {
                // What has the pools answers, so it is the pool's storage that does not.
                self.pools().await?;
                health::of_storage(id, why)?
            }
        };
        let volume_health = Some(volume_health);
        Ok(Response::new(csi::ControllerGetVolumeHealthResponse { volume_health }))
    }

    async fn get_capacity(
        &self,
        request: Request<csi::GetCapacityRequest>,
    ) -> Result<Response<csi::GetCapacityResponse>, Status> {
        let request = request.into_inner();
        checks::map("parameters", &request.parameters)?;
        let capabilities = match request.volume_capabilities.as_slice() {
            [] => Vec::new(),
            some => Capability::parse_all(some)?,
        };
        let parameters = Parameters::new(&request.parameters, &Default::default())?;
        let pools = self.pools().await?;
        // Without parameters it is about all pools.
        let meant = match parameters.pool.is_some() {
            true => vec![parameters.pool(&pools)?],
            false => pools.iter().collect(),
        };
        let mut response = csi::GetCapacityResponse::default();
        let (mut count, mut failed) = (0, None);
        for pool in meant {
            let is_here = self.plugin.is_here(pool.local, request.accessible_topology.as_ref());
            if !is_here || !pool.can_create || Self::check_all(pool, &capabilities).is_err() {
                continue;
            }
            let get = api::GetCapacityRequest { pool: pool.name.clone() };
            let found = match call(self.volumes().get_capacity(get)).await {
                Ok(found) => found,
                // It has no room for now, and the others may have.
                Err(error) => {
                    failed = Some(error);
                    continue;
                }
            };
            count += 1;
            let available = signed(found.available_bytes.unwrap_or(found.maximum_volume_bytes));
            response.available_capacity = response.available_capacity.saturating_add(available);
            let (most, least) =
                (signed(found.maximum_volume_bytes), signed(found.minimum_volume_bytes));
            response.maximum_volume_size = response.maximum_volume_size.max(Some(most));
            let known = response.minimum_volume_size.unwrap_or(least);
            response.minimum_volume_size = Some(known.min(least));
        }
        match failed.filter(|_| count == 0) {
            Some(error) => Err(error),
            None => Ok(Response::new(response)),
        }
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        let capabilities = CAPABILITIES.into_iter();
        let capabilities = capabilities.filter(|of| !self.plugin.is_local || !CENTRAL.contains(of));
        let capability = |of: rpc::Type| csi::ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: of.into() })),
        };
        let capabilities = capabilities.map(capability).collect();
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Result<Response<csi::ControllerExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = text("volume_id", &request.volume_id)?;
        let range = request.capacity_range.as_ref();
        let range = range.ok_or_else(|| Status::invalid_argument("capacity_range is missing"))?;
        let SizeRange { required_bytes, limit_bytes } = SizeRange::parse(Some(range))?;
        checks::map("secrets", &request.secrets)?;
        if request.volume_capability.is_some() {
            Capability::parse(request.volume_capability.as_ref())?;
        }
        let resize = api::ResizeVolumeRequest { id: id.to_owned(), required_bytes, limit_bytes };
        let resized = call(self.volumes().resize_volume(resize)).await?.volume;
        let resized = resized.ok_or_else(|| Status::internal(format!("{id}: an empty answer")))?;
        Ok(Response::new(csi::ControllerExpandVolumeResponse {
            capacity_bytes: signed(resized.size_bytes),
            // The node sees to the device and the file system.
            node_expansion_required: true,
        }))
    }

    async fn controller_get_volume(
        &self,
        request: Request<csi::ControllerGetVolumeRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeResponse>, Status> {
        let request = request.into_inner();
        let found = self.find(text("volume_id", &request.volume_id)?).await?;
        Ok(Response::new(csi::ControllerGetVolumeResponse {
            volume: Some(self.volume(&found)),
            status: Some(csi::controller_get_volume_response::VolumeStatus {
                published_node_ids: convert::nodes(&found),
                volume_condition: Some(health::condition(&found)),
            }),
        }))
    }

    async fn controller_modify_volume(
        &self,
        request: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Result<Response<csi::ControllerModifyVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = text("volume_id", &request.volume_id)?;
        checks::map("mutable_parameters", &request.mutable_parameters)?;
        checks::map("secrets", &request.secrets)?;
        let parameters = Parameters::new(&Default::default(), &request.mutable_parameters)?;
        let set = api::SetVolumeRequest {
            id: id.to_owned(),
            limit_bytes_per_second: parameters.limit_bps,
            limit_ops_per_second: parameters.limit_iops,
        };
        call(self.volumes().set_volume(set)).await?;
        Ok(Response::new(csi::ControllerModifyVolumeResponse {}))
    }

    async fn create_snapshot(
        &self,
        _: Request<csi::CreateSnapshotRequest>,
    ) -> Result<Response<csi::CreateSnapshotResponse>, Status> {
        Err(no_snapshots())
    }

    async fn delete_snapshot(
        &self,
        _: Request<csi::DeleteSnapshotRequest>,
    ) -> Result<Response<csi::DeleteSnapshotResponse>, Status> {
        Err(no_snapshots())
    }

    async fn list_snapshots(
        &self,
        _: Request<csi::ListSnapshotsRequest>,
    ) -> Result<Response<csi::ListSnapshotsResponse>, Status> {
        Err(no_snapshots())
    }

    async fn get_snapshot(
        &self,
        _: Request<csi::GetSnapshotRequest>,
    ) -> Result<Response<csi::GetSnapshotResponse>, Status> {
        Err(no_snapshots())
    }
}

fn no_snapshots() -> Status {
    Status::unimplemented("no pool of this version has snapshots")
}
