//! The service Volumes of the control API: the volumes of pools.

use std::collections::BTreeMap;
use std::sync::Arc;

use sheave_control::v1 as api;
use sheave_control::v1::volumes_server::Volumes;
use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_daemon::{Attached, Devices, NewLimits};
use sheave_pools::{
    AccessMode, Exclusion, Listed, NewVolume, Pool, PoolInfo, Pools, Publication, Record,
    SizeRange, VolumeId,
};
use tonic::{Code, Request, Response, Status};

use crate::api_status::status;
use crate::pool_calls::PoolCalls;

/// Volumes of one answer of `ListVolumes`.
const PAGE_MAX: usize = 1000;
/// Bytes of a claim: a name of Kubernetes has no more than 253.
const CLAIM_LEN_MAX: usize = 256;

/// Serves Volumes.
pub(crate) struct VolumesService {
    calls: Arc<PoolCalls>,
    /// Of a daemon.
    devices: Option<Arc<Devices>>,
}

impl VolumesService {
    pub(crate) fn new(calls: Arc<PoolCalls>, devices: Option<Arc<Devices>>) -> Self {
        Self { calls, devices }
    }

    fn message(&self, of: &Listed) -> api::Volume {
        message(of, &self.devices())
    }

    /// The devices of this node that are volumes of pools, by their volumes.
    fn devices(&self) -> BTreeMap<VolumeId, Attached> {
        let devices = self.devices.as_ref().map(|devices| devices.list()).unwrap_or_default();
        let with_id = |device: Attached| {
            let id = self.calls.pools.id_of_text(&device.volume)?;
            Some((id, device))
        };
        devices.into_iter().filter_map(with_id).collect()
    }
}

fn message(of: &Listed, devices: &BTreeMap<VolumeId, Attached>) -> api::Volume {
    let (id, info, record) = (of.id(), of.pool.info(), &of.found.record);
    let device = devices.get(&id);
    api::Volume {
        id: id.to_string(),
        name: record.name.clone(),
        pool: info.name.clone(),
        size_bytes: match of.found.size {
            // The pool does not know, or cannot say now.
            0 => device.map_or(0, |device| device.size),
            size => size,
        },
        formatted: record.formatted.clone().unwrap_or_default(),
        formatting: record.formatting,
        never_format: record.never_format,
        epoch: record.epoch,
        publications: record.publications.iter().map(publication).collect(),
        users: record.users.clone(),
        limit_bytes_per_second: record.limit_bps,
        limit_ops_per_second: record.limit_iops,
        parameters: record.parameters.clone().into_iter().collect(),
        device: device.map(|device| printable(&device.path).to_string()).unwrap_or_default(),
        local: info.is_local,
        trouble: of.found.trouble.clone().unwrap_or_default(),
        unrecorded: info.exclusion != Exclusion::Recorded,
    }
}

/// The device that a volume is here.
pub(crate) fn device_of(devices: &Devices, of: &Listed) -> Option<Attached> {
    let uuid = Some(of.found.record.uuid);
    devices.list().into_iter().find(|device| of.pool.uuid_of_text(&device.volume) == uuid)
}

fn publication(has: &Publication) -> api::Publication {
    api::Publication {
        node: has.node.clone(),
        epoch: has.epoch,
        read_only: has.read_only,
        mode: mode_to_api(has.mode).into(),
        block: has.block,
        claim: has.claim.clone(),
    }
}

fn mode_to_api(mode: AccessMode) -> api::AccessMode {
    match mode {
        AccessMode::SingleNodeWriter => api::AccessMode::SingleNodeWriter,
        AccessMode::SingleNodeReaderOnly => api::AccessMode::SingleNodeReaderOnly,
        AccessMode::MultiNodeReaderOnly => api::AccessMode::MultiNodeReaderOnly,
        AccessMode::MultiNodeSingleWriter => api::AccessMode::MultiNodeSingleWriter,
        AccessMode::MultiNodeMultiWriter => api::AccessMode::MultiNodeMultiWriter,
        AccessMode::SingleNodeSingleWriter => api::AccessMode::SingleNodeSingleWriter,
        AccessMode::SingleNodeMultiWriter => api::AccessMode::SingleNodeMultiWriter,
    }
}

fn mode_of_api(mode: i32) -> Result<AccessMode, Status> {
    Ok(match api::AccessMode::try_from(mode) {
        Ok(api::AccessMode::SingleNodeWriter) => AccessMode::SingleNodeWriter,
        Ok(api::AccessMode::SingleNodeReaderOnly) => AccessMode::SingleNodeReaderOnly,
        Ok(api::AccessMode::MultiNodeReaderOnly) => AccessMode::MultiNodeReaderOnly,
        Ok(api::AccessMode::MultiNodeSingleWriter) => AccessMode::MultiNodeSingleWriter,
        Ok(api::AccessMode::MultiNodeMultiWriter) => AccessMode::MultiNodeMultiWriter,
        Ok(api::AccessMode::SingleNodeSingleWriter) => AccessMode::SingleNodeSingleWriter,
        Ok(api::AccessMode::SingleNodeMultiWriter) => AccessMode::SingleNodeMultiWriter,
        Ok(api::AccessMode::Unspecified) | Err(_) => {
            return Err(Status::invalid_argument("the access mode is missing or not known here"));
        }
    })
}

/// Refuses to go on while the volume is a device here.
fn check_no_device(devices: &Devices, of: &Listed, op: &'static str) -> Result<()> {
    match device_of(devices, of) {
        None => Ok(()),
        Some(device) => {
            let why = format!(
                "{} ({}) is the device {} here; detach it first",
                of.id(),
                of.found.record.name,
                printable(&device.path)
            );
            Err(Error::new(ErrorKind::Busy, op, why))
        }
    }
}

/// Refuses to go on if something has had the volume since its caller has looked at it.
fn check_uses(record: &Record, seen: Option<&api::Uses>) -> Result<()> {
    match seen {
        Some(seen) if (seen.epoch, &seen.users) != (record.epoch, &record.users) => {
            let why = format!("{} was used since it was looked at; look again", record.name);
            Err(Error::new(ErrorKind::Busy, "delete", why))
        }
        _ => Ok(()),
    }
}

/// The volume of an answer about it.
fn listed(pools: &Pools, id: &VolumeId, found: sheave_pools::Found) -> Result<Listed> {
    Ok(Listed { pool: Arc::clone(pools.pool(&id.pool)?), found })
}

/// What is absent has been deleted, and no node has it.
fn absent_is_done(error: Status) -> Result<(), Status> {
    if error.code() == Code::NotFound { Ok(()) } else { Err(error) }
}

/// How a pool's volumes can be used.
fn modes(info: &PoolInfo, block: bool) -> Vec<i32> {
    let can = |mode: &AccessMode| info.check_mode(*mode, block).is_ok();
    AccessMode::ALL.into_iter().filter(can).map(|mode| mode_to_api(mode).into()).collect()
}

fn pool_message(pool: &dyn Pool) -> api::Pool {
    let info = pool.info();
    api::Pool {
        name: info.name.clone(),
        local: info.is_local,
        can_create: info.can_create,
        default_size_bytes: info.default_size,
        mount_modes: modes(info, false),
        block_modes: modes(info, true),
    }
}

#[tonic::async_trait]
impl Volumes for VolumesService {
    async fn list_pools(
        &self,
        _: Request<api::ListPoolsRequest>,
    ) -> Result<Response<api::ListPoolsResponse>, Status> {
        let pools = self.calls.pools.all().map(|pool| pool_message(&**pool)).collect();
        Ok(Response::new(api::ListPoolsResponse { pools }))
    }

    async fn get_capacity(
        &self,
        request: Request<api::GetCapacityRequest>,
    ) -> Result<Response<api::GetCapacityResponse>, Status> {
        let pool = request.into_inner().pool;
        let name = pool.clone();
        let capacity =
            self.calls.call(&pool, None, move |pools| pools.pool(&name)?.capacity()).await?;
        Ok(Response::new(api::GetCapacityResponse {
            available_bytes: capacity.available,
            maximum_volume_bytes: capacity.size_max,
            minimum_volume_bytes: capacity.size_min,
        }))
    }

    async fn create_volume(
        &self,
        request: Request<api::CreateVolumeRequest>,
    ) -> Result<Response<api::CreateVolumeResponse>, Status> {
        let request = request.into_inner();
        let new = NewVolume {
            name: request.name,
            size: SizeRange { required: request.required_bytes, limit: request.limit_bytes },
            limit_bps: request.limit_bytes_per_second,
            limit_iops: request.limit_ops_per_second,
            parameters: request.parameters.into_iter().collect(),
        };
        new.check().map_err(status)?;
        let key = format!("{}/{}", request.pool, printable(&new.name));
        let name = request.pool.clone();
        let create = move |pools: &Pools| {
            let pool = Arc::clone(pools.pool(&name)?);
            let found = pool.create(&new)?;
            Ok(Listed { pool, found })
        };
        let made = self.calls.call(&request.pool, Some(key), create).await?;
        Ok(Response::new(api::CreateVolumeResponse { volume: Some(self.message(&made)) }))
    }

    async fn delete_volume(
        &self,
        request: Request<api::DeleteVolumeRequest>,
    ) -> Result<Response<api::DeleteVolumeResponse>, Status> {
        let api::DeleteVolumeRequest { id, uses } = request.into_inner();
        let devices = self.devices.clone();
        let delete = move |pools: &Pools, id: VolumeId| {
            match pools.by_id(&id) {
                Ok(found) => {
                    let check = |devices: Arc<Devices>| check_no_device(&devices, &found, "delete");
                    devices.map_or(Ok(()), check)?;
                }
                // What is left of it may still have to be removed.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            pools
                .pool(&id.pool)?
                .delete_if(id.uuid, &|record| check_uses(record, uses.as_ref()))?;
            tracing::info!(%id, "deleted");
            Ok(())
        };
        self.calls.call_about(&id, delete).await.or_else(absent_is_done)?;
        Ok(Response::new(api::DeleteVolumeResponse {}))
    }

    async fn get_volume(
        &self,
        request: Request<api::GetVolumeRequest>,
    ) -> Result<Response<api::GetVolumeResponse>, Status> {
        use api::get_volume_request::Key;
        let found = match request.into_inner().key {
            Some(Key::Id(id)) => {
                let id = self.calls.id(&id)?;
                self.calls.call(&id.pool.clone(), None, move |pools| pools.by_id(&id)).await?
            }
            Some(Key::Name(name)) => self.calls.find(&name).await?,
            None => return Err(Status::invalid_argument("an id or a name is missing")),
        };
        Ok(Response::new(api::GetVolumeResponse { volume: Some(self.message(&found)) }))
    }

    async fn list_volumes(
        &self,
        request: Request<api::ListVolumesRequest>,
    ) -> Result<Response<api::ListVolumesResponse>, Status> {
        let api::ListVolumesRequest { pool, page_token, max_entries } = request.into_inner();
        let behind = match page_token.as_str() {
            "" => None,
            token => Some(token.parse::<VolumeId>().map_err(|_| {
                Status::aborted("the page token is of no earlier answer; begin without one")
            })?),
        };
        let max = usize::try_from(max_entries).ok().filter(|max| (1..=PAGE_MAX).contains(max));
        let max = max.unwrap_or(PAGE_MAX);
        let only = (!pool.is_empty()).then_some(pool);
        if let Some(only) = &only {
            self.calls.pools.pool(only).map_err(status)?;
        }
        // All at once, since each may hang.
        let mut calls = Vec::new();
        for name in self.calls.pools.all().map(|pool| pool.info().name.clone()) {
            if only.as_ref().is_some_and(|only| *only != name) {
                continue;
            }
            let (of, behind, calls_) = (name.clone(), behind.clone(), Arc::clone(&self.calls));
            // One more than is wanted tells whether there are more.
            let list = move |pools: &Pools| pools.list(&of, behind.as_ref(), max + 1);
            let call =
                async move { calls_.call(&name, None, list).await.map_err(|error| (name, error)) };
            calls.push(tokio::spawn(call));
        }
        let (mut found, mut troubles) = (Vec::new(), Vec::new());
        for call in calls {
            match call.await.map_err(|error| Status::internal(error.to_string()))? {
                Ok(more) => found.extend(more),
                Err((_, error)) if only.is_some() => return Err(error),
                Err((pool, error)) => {
                    let message = error.message().to_owned();
                    troubles.push(api::PoolTrouble { pool, message });
                }
            }
        }
        let is_last = found.len() <= max;
        found.truncate(max);
        let last = found.last().map(|last| last.id().to_string());
        let next_page_token = last.filter(|_| !is_last).unwrap_or_default();
        let devices = self.devices();
        let volumes = found.iter().map(|of| message(of, &devices)).collect();
        Ok(Response::new(api::ListVolumesResponse { volumes, next_page_token, troubles }))
    }

    async fn resize_volume(
        &self,
        request: Request<api::ResizeVolumeRequest>,
    ) -> Result<Response<api::ResizeVolumeResponse>, Status> {
        let api::ResizeVolumeRequest { id, required_bytes, limit_bytes } = request.into_inner();
        let devices = self.devices.clone();
        let wanted = SizeRange { required: required_bytes, limit: limit_bytes };
        let resize = move |pools: &Pools, id: VolumeId| {
            let found = pools.pool(&id.pool)?.resize(id.uuid, wanted)?;
            let of = listed(pools, &id, found)?;
            if let Some(devices) = devices
                && let Some(device) = device_of(&devices, &of)
                && device.size < of.found.size
            {
                match devices.resize(&device.volume, None) {
                    Err(error) if error.kind() == ErrorKind::Unsupported => {
                        tracing::warn!(
                            %id,
                            "the volume is longer, and its device is when it is attached again: \
                             {error}"
                        );
                    }
                    resized => drop(resized?),
                }
            }
            Ok(of)
        };
        let resized = self.calls.call_about(&id, resize).await?;
        Ok(Response::new(api::ResizeVolumeResponse { volume: Some(self.message(&resized)) }))
    }

    async fn set_volume(
        &self,
        request: Request<api::SetVolumeRequest>,
    ) -> Result<Response<api::SetVolumeResponse>, Status> {
        let request = request.into_inner();
        let new = NewLimits {
            bytes_per_second: request.limit_bytes_per_second,
            ops_per_second: request.limit_ops_per_second,
        };
        let devices = self.devices.clone();
        let set = move |pools: &Pools, id: VolumeId| {
            let found = pools.pool(&id.pool)?.update(id.uuid, &mut |record| {
                record.limit_bps = new.bytes_per_second.unwrap_or(record.limit_bps);
                record.limit_iops = new.ops_per_second.unwrap_or(record.limit_iops);
                Ok(())
            })?;
            let of = listed(pools, &id, found)?;
            if let Some(devices) = devices
                && let Some(device) = device_of(&devices, &of)
            {
                devices.set_limits(&device.volume, new)?;
            }
            Ok(of)
        };
        let set = self.calls.call_about(&request.id, set).await?;
        Ok(Response::new(api::SetVolumeResponse { volume: Some(self.message(&set)) }))
    }

    async fn publish_volume(
        &self,
        request: Request<api::PublishVolumeRequest>,
    ) -> Result<Response<api::PublishVolumeResponse>, Status> {
        let api::PublishVolumeRequest { id, node, read_only, mode, block, claim } =
            request.into_inner();
        if node.is_empty() {
            return Err(Status::invalid_argument("the node is missing"));
        }
        if claim.len() > CLAIM_LEN_MAX {
            let why = format!("the claim has more than {CLAIM_LEN_MAX} bytes");
            return Err(Status::invalid_argument(why));
        }
        let mode = mode_of_api(mode)?;
        let read_only = read_only || mode.is_reader_only();
        let wanted = Publication { node, epoch: 0, read_only, mode, block, claim };
        let devices = self.devices.clone();
        let publish = move |pools: &Pools, id: VolumeId| {
            let pool = pools.pool(&id.pool)?;
            pool.info().check_mode(mode, block)?;
            if let (Some(devices), Exclusion::Recorded) = (&devices, pool.info().exclusion) {
                let of = pools.by_id(&id)?;
                // What the operator has attached is not a node's.
                if of.found.record.publications.is_empty() {
                    check_no_device(devices, &of, "publish")?;
                }
            }
            let epoch = pool.publish(id.uuid, &wanted, devices.is_none())?;
            let node = printable(&wanted.node);
            tracing::info!(%id, %node, epoch, "published");
            Ok(epoch)
        };
        let epoch = self.calls.call_about(&id, publish).await?;
        Ok(Response::new(api::PublishVolumeResponse { epoch }))
    }

    async fn unpublish_volume(
        &self,
        request: Request<api::UnpublishVolumeRequest>,
    ) -> Result<Response<api::UnpublishVolumeResponse>, Status> {
        let api::UnpublishVolumeRequest { id, node, claim } = request.into_inner();
        let devices = self.devices.clone();
        let unpublish = move |pools: &Pools, id: VolumeId| {
            if pools.pool(&id.pool)?.info().exclusion != Exclusion::Recorded {
                return Ok(());
            }
            let of = pools.by_id(&id)?;
            let publications = &of.found.record.publications;
            let is_of_node = |has: &Publication| node.is_empty() || has.node == node;
            let has_claim =
                |has: &Publication| claim.as_ref().is_none_or(|claim| has.claim == *claim);
            let is_meant = |has: &&Publication| is_of_node(has) && has_claim(has);
            let ends = publications.iter().any(|has| is_meant(&has));
            let is_left = |has: &Publication| !is_meant(&has) && has.read_only;
            // With several readers, the device here may be that of another node's publication.
            let is_own = |device: Attached| device.pool.is_some_and(|pool| pool.node == node);
            if let Some(devices) = &devices
                && ends
                && (!publications.iter().any(is_left)
                    || device_of(devices, &of).is_some_and(is_own))
            {
                check_no_device(devices, &of, "unpublish")?;
            }
            // Also if nothing ends: what a call before has ended may not be on stable storage.
            let nodes = match publications.iter().any(|has| is_of_node(has) && !has_claim(has)) {
                false => vec![(!node.is_empty()).then_some(node.as_str())],
                true => publications.iter().filter(is_meant).map(|has| Some(&*has.node)).collect(),
            };
            for node in nodes {
                of.pool.unpublish(id.uuid, node, devices.is_none())?;
            }
            if ends {
                tracing::info!(%id, node = %printable(&node), "unpublished");
            }
            Ok(())
        };
        self.calls.call_about(&id, unpublish).await.or_else(absent_is_done)?;
        Ok(Response::new(api::UnpublishVolumeResponse {}))
    }

    async fn mark_formatted(
        &self,
        request: Request<api::MarkFormattedRequest>,
    ) -> Result<Response<api::MarkFormattedResponse>, Status> {
        let api::MarkFormattedRequest { id, fs_type, epoch, begun } = request.into_inner();
        if fs_type.is_empty() {
            return Err(Status::invalid_argument("the file system is missing"));
        }
        let mark = move |pools: &Pools, id: VolumeId| {
            let pool = pools.pool(&id.pool)?;
            let mark = &mut |record: &mut Record| {
                let is_first = begun && record.formatted.is_none();
                record.mark_formatted(&fs_type, begun, epoch)?;
                if is_first { pool.check_blank(id.uuid) } else { Ok(()) }
            };
            pool.update(id.uuid, mark).map(drop)
        };
        self.calls.call_about(&id, mark).await?;
        Ok(Response::new(api::MarkFormattedResponse {}))
    }
}
