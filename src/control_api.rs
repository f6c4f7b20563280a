//! The control API's server, and its socket.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use rustix::net::SocketType;
use sheave_control::v1::control_server::{Control, ControlServer};
use sheave_control::v1::volumes_server::VolumesServer;
use sheave_control::v1::{
    AttachRequest, AttachResponse, DetachRequest, DetachResponse, Device, Front, GetVersionRequest,
    GetVersionResponse, ListDevicesRequest, ListDevicesResponse, ResizeRequest, ResizeResponse,
    SetLimitsRequest, SetLimitsResponse,
};
use sheave_core::printable;
use sheave_daemon::{
    self as devices, AttachOptions, Attached, Choice, Devices, NewLimits, PoolVolume,
};
use sheave_pools::{Exclusion, Listed, Pools, Record, VolumeId};
use sheave_volumes::VolumeSpec;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Code, Request, Response, Status};

use crate::api_status::status;
use crate::pool_calls::{PoolCalls, check_publication, is_shared};
use crate::telemetry::{RuntimeDir, listen_at};
use crate::volumes_api::{VolumesService, device_of};

/// The socket of this user's daemon.
pub(crate) fn control_socket(dir: &RuntimeDir) -> PathBuf {
    dir.path().join("control.sock")
}

/// The socket for clients.
pub(crate) struct ControlSocket {
    listener: UnixListener,
    name: String,
    file: Option<SocketFile>,
}

/// Removed on drop, so that clients find no daemon.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl ControlSocket {
    /// Listens for this user only, replacing a stale socket, or on the socket that the service
    /// manager has passed and keeps.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub(crate) fn open(dir: &RuntimeDir, passed: Option<StdListener>) -> Result<Self> {
        if let Some(listener) = passed {
            return Self::take_over(dir, listener, true);
        }
        dir.create()?;
        let path = control_socket(dir);
        let listener = listen_at(&path, SocketType::STREAM)
            .with_context(|| format!("control socket {}", printable(&path)))?;
        Self::take_over(dir, listener.into(), false)
    }

    /// Uses a socket that listens already. The service manager keeps one that it `passed`; another
    /// one is removed on drop.
    ///
    /// # Errors
    /// When it cannot be used.
    pub(crate) fn take_over(dir: &RuntimeDir, listener: StdListener, passed: bool) -> Result<Self> {
        listener.set_nonblocking(true).context("control socket")?;
        let listener = UnixListener::from_std(listener).context("control socket")?;
        if !passed {
            let path = control_socket(dir);
            let name = printable(&path).to_string();
            return Ok(Self { name, listener, file: Some(SocketFile(path)) });
        }
        let address = listener.local_addr().context("passed socket")?;
        let path = printable(address.as_pathname().unwrap_or_else(|| Path::new("?")));
        Ok(Self { name: format!("{path}, passed"), listener, file: None })
    }

    /// A duplicate of the socket, for a successor, and whether the service manager keeps it.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn share(&self) -> io::Result<(OwnedFd, bool)> {
        Ok((self.listener.as_fd().try_clone_to_owned()?, self.file.is_none()))
    }

    /// Its name in the log.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Serves the control API until `ended`.
    ///
    /// # Errors
    /// When the connections' server fails.
    pub(crate) async fn serve(
        self,
        devices: Arc<Devices>,
        calls: Arc<PoolCalls>,
        ended: impl Future<Output = ()>,
    ) -> Result<()> {
        let Self { listener, name: _, file: _file } = self;
        let volumes = VolumesService::new(Arc::clone(&calls), Some(Arc::clone(&devices)));
        let served = Server::builder()
            .add_service(ControlServer::with_interceptor(Service { devices, calls }, check_peer))
            .add_service(VolumesServer::with_interceptor(volumes, check_peer))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), ended)
            .await;
        served.context("control API")
    }
}

/// Makes sure that no other daemon listens.
///
/// # Errors
/// When one does, or that cannot be determined.
pub(crate) async fn check_alone(dir: &RuntimeDir) -> Result<()> {
    let path = control_socket(dir);
    let what = || format!("control socket {}", printable(&path));
    match UnixStream::connect(&path).await {
        Ok(_) => bail!("{}: another daemon listens there", what()),
        Err(error) if is_no_listener(&error) => Ok(()),
        Err(error) => Err(error).with_context(what),
    }
}

fn is_no_listener(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}

struct Service {
    devices: Arc<Devices>,
    calls: Arc<PoolCalls>,
}

#[tonic::async_trait]
impl Control for Service {
    async fn get_version(
        &self,
        _: Request<GetVersionRequest>,
    ) -> Result<Response<GetVersionResponse>, Status> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(GetVersionResponse { version }))
    }

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<AttachResponse>, Status> {
        let request = request.into_inner();
        let AttachRequest { volume, front, read_only, from_operator, epoch, node, .. } = request;
        let AttachRequest { can_grow, take_over, .. } = request;
        let front = match Front::try_from(front) {
            Ok(Front::Unspecified) if can_grow => Choice::Growing,
            Ok(Front::Unspecified) => Choice::Fastest,
            Ok(Front::Ublk) => Choice::This(devices::Front::Ublk),
            Ok(Front::Nbd) => Choice::This(devices::Front::Nbd),
            Ok(Front::Fake) => Choice::This(devices::Front::Fake),
            Err(_) => return Err(Status::unimplemented("this daemon has no such front")),
        };
        let attached = if self.calls.pools.has_pool_of(&volume) {
            self.attach_of_pool(&volume, front, read_only, epoch, node).await?
        } else if epoch.is_some() {
            self.calls.id(&volume)?;
            let why = format!("{}: it is no volume of a pool", printable(&volume));
            return Err(Status::failed_precondition(why));
        } else {
            check_volume(&volume, from_operator).map_err(status)?;
            let options =
                AttachOptions { read_only, take_over, front, published: false, pool: None };
            self.blocking(move |devices| devices.attach(&volume, options)).await?
        };
        Ok(Response::new(AttachResponse { device: Some(self.message(attached)) }))
    }

    async fn detach(
        &self,
        request: Request<DetachRequest>,
    ) -> Result<Response<DetachResponse>, Status> {
        let DetachRequest { target: volume, force } = request.into_inner();
        let target = self.target(volume.clone()).await?;
        let id = self.calls.pools.id_of_text(&target);
        let is_of_pool = id.is_some();
        let guard = id.filter(|_| !force).map(|id| self.calls.begin_device(&id)).transpose()?;
        let ended = self.blocking(move |devices| {
            let _held = guard;
            devices.detach(&target, force)
        });
        match ended.await {
            // By the name that it was asked for, and not by its image.
            Err(status) if status.code() == Code::NotFound && is_of_pool => {
                let why = format!("{} is no device here; see: sheave ls", printable(&volume));
                Err(Status::not_found(format!("detach: {why}")))
            }
            ended => ended.map(|()| Response::new(DetachResponse {})),
        }
    }

    async fn resize(
        &self,
        request: Request<ResizeRequest>,
    ) -> Result<Response<ResizeResponse>, Status> {
        let ResizeRequest { target, size_bytes } = request.into_inner();
        let target = self.target(target).await?;
        // The pool grows it, too.
        let id = self.id_of_target(&target);
        let guard = id.map(|id| self.calls.begin(&id)).transpose()?;
        let attached = self.blocking(move |devices| {
            let _held = guard;
            devices.resize(&target, size_bytes)
        });
        let attached = attached.await?;
        Ok(Response::new(ResizeResponse { device: Some(self.message(attached)) }))
    }

    async fn set_limits(
        &self,
        request: Request<SetLimitsRequest>,
    ) -> Result<Response<SetLimitsResponse>, Status> {
        let SetLimitsRequest { target, bytes_per_second, ops_per_second } = request.into_inner();
        let target = self.target(target).await?;
        let new = NewLimits { bytes_per_second, ops_per_second };
        let attached = self.blocking(move |devices| devices.set_limits(&target, new)).await?;
        Ok(Response::new(SetLimitsResponse { device: Some(self.message(attached)) }))
    }

    async fn list_devices(
        &self,
        _: Request<ListDevicesRequest>,
    ) -> Result<Response<ListDevicesResponse>, Status> {
        let devices = self.blocking(|devices| Ok(devices.list())).await?;
        let devices = devices.into_iter().map(|device| self.message(device)).collect();
        Ok(Response::new(ListDevicesResponse { devices }))
    }
}

impl Service {
    /// Opening volumes and making devices wait for disks and the kernel.
    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Devices) -> sheave_core::Result<T> + Send + 'static,
    ) -> Result<T, Status> {
        let devices = Arc::clone(&self.devices);
        let called = tokio::task::spawn_blocking(move || call(&devices)).await;
        called.map_err(|error| Status::internal(error.to_string()))?.map_err(status)
    }

    /// A target as the devices know it.
    ///
    /// # Errors
    /// NOT_FOUND for an id of a volume that is a device by another id: its pool was renamed, and
    /// what has the other id uses the device.
    async fn target(&self, target: String) -> Result<String, Status> {
        if target.parse::<VolumeId>().is_err() {
            return Ok(self.calls.text_of(&target).await?.unwrap_or(target));
        }
        // Without its pool, which may hang, or be gone from the configuration.
        let devices = self.devices.list();
        if let Some(device) = devices.iter().find(|device| self.volume_id(device) == target) {
            return Ok(device.volume.clone());
        }
        let text = self.calls.text_of(&target).await?.unwrap_or_else(|| target.clone());
        let Some(device) = devices.iter().find(|device| device.volume == text) else {
            return Ok(text);
        };
        let (path, has) = (printable(&device.path), self.volume_id(device));
        Err(Status::not_found(format!("{target} is no device here: {path} is that of {has}")))
    }

    /// Attaches a volume of a pool, with the limits that it has. Its text is the pool's or that of
    /// the configuration, so it starts no program but one that the operator of the node has named.
    async fn attach_of_pool(
        &self,
        volume: &str,
        front: Choice,
        read_only: bool,
        epoch: Option<u64>,
        node: String,
    ) -> Result<Attached, Status> {
        let id = self.calls.find(volume).await?.id();
        let guards = (self.calls.begin(&id)?, self.calls.begin_device(&id)?);
        let pools = Arc::clone(&self.calls.pools);
        self.blocking(move |devices| {
            let _held = guards;
            // Again, since it may have been deleted or published before this call began.
            let found = pools.by_id(&id)?;
            check_publication(&found, &node, epoch, read_only)?;
            let (record, text) = (&found.found.record, found.pool.text(id.uuid));
            let is_device = device_of(devices, &found).is_some();
            match is_device {
                _ if read_only => {}
                // Perhaps from before another node wrote: that must not be forgotten.
                true => found.pool.check_writer(id.uuid)?,
                false => found.pool.begin_writing(id.uuid)?,
            }
            let pool = PoolVolume {
                id: id.to_string(),
                shared: is_shared(&found),
                node: epoch.map(|_| node.clone()).unwrap_or_default(),
            };
            let published = epoch.is_some();
            let pool = Some(pool);
            let options = AttachOptions { read_only, take_over: false, front, published, pool };
            // Not before it is known that it can be a device: a volume is formatted no more then.
            let begin = || if published || read_only { Ok(()) } else { mark_raw(&found) };
            let attached = devices.attach_after(&text, options, &begin)?;
            // Another process or node may have come between; none can while it is open here.
            if let Err(error) = check_again(&pools, &id, &node, epoch, read_only) {
                // Programs may use a device that was there before, and have closed it for now.
                if !is_device {
                    devices.detach(&text, false)?;
                }
                return Err(error);
            }
            let limits = NewLimits {
                bytes_per_second: Some(record.limit_bps),
                ops_per_second: Some(record.limit_iops),
            };
            if (attached.limits.bytes_per_second, attached.limits.ops_per_second)
                == (record.limit_bps, record.limit_iops)
            {
                return Ok(attached);
            }
            devices.set_limits(&text, limits)
        })
        .await
    }

    /// The volume of a pool that a device is, or that has this text.
    fn id_of_target(&self, target: &str) -> Option<VolumeId> {
        let mut devices = self.devices.list().into_iter();
        let device = devices.find(|device| device.path == Path::new(target));
        let text = device.as_ref().map_or(target, |device| device.volume.as_str());
        self.calls.pools.id_of_text(text)
    }

    fn message(&self, attached: Attached) -> Device {
        Device { volume_id: self.volume_id(&attached), ..message(attached) }
    }

    /// POOL/UUID of a device, as it was attached; empty if it is no volume of a pool.
    fn volume_id(&self, attached: &Attached) -> String {
        let now = || self.calls.pools.id_of_text(&attached.volume).map(|id| id.to_string());
        let attached_as = attached.pool.as_ref().map(|pool| pool.id.clone());
        attached_as.or_else(now).unwrap_or_default()
    }
}

/// Marks a volume that the operator of the node attaches and may write anything to.
fn mark_raw(of: &Listed) -> sheave_core::Result<()> {
    if of.pool.info().exclusion != Exclusion::Recorded {
        // Its pool never formats it.
        return Ok(());
    }
    let mark = &mut |record: &mut Record| {
        record.mark_attached();
        Ok(())
    };
    of.pool.update(of.found.record.uuid, mark).map(drop)
}

/// Whether a volume that was opened may still be attached.
fn check_again(
    pools: &Pools,
    id: &VolumeId,
    node: &str,
    epoch: Option<u64>,
    read_only: bool,
) -> sheave_core::Result<()> {
    let found = pools.by_id(id)?;
    check_publication(&found, node, epoch, read_only)?;
    if read_only { Ok(()) } else { found.pool.check_writer(id.uuid) }
}

/// Checks that a request may open a volume. The peer is root or the daemon's user, but it may
/// forward a text of another party, unless it declares that the operator has written it.
fn check_volume(volume: &str, from_operator: bool) -> sheave_core::Result<()> {
    let parsed = match from_operator {
        true => VolumeSpec::of_operator(volume),
        false => volume.parse(),
    };
    parsed.map(drop)
}

/// Only root and the daemon's own user may send requests, whatever the socket's mode.
fn check_peer(request: Request<()>) -> Result<Request<()>, Status> {
    let own = rustix::process::geteuid().as_raw();
    let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    match peer.map(|peer| peer.uid()) {
        Some(uid) if uid == own || uid == 0 => Ok(request),
        _ => Err(Status::permission_denied("only root and the daemon's user may ask this")),
    }
}

fn message(attached: Attached) -> Device {
    Device {
        volume: attached.volume,
        path: printable(&attached.path).to_string(),
        front: match attached.front {
            devices::Front::Ublk => Front::Ublk,
            devices::Front::Nbd => Front::Nbd,
            devices::Front::Fake => Front::Fake,
        }
        .into(),
        read_only: attached.read_only,
        size_bytes: attached.size,
        waiting: attached.waiting.unwrap_or_default(),
        held_bytes: attached.held_bytes,
        limit_bytes_per_second: attached.limits.bytes_per_second,
        limit_ops_per_second: attached.limits.ops_per_second,
        volume_id: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_starts_no_program_unless_the_operator_has_written_it() {
        let program = "nbd+exec:?command=nbdkit%20null%201M";
        let refused = status(check_volume(program, false).unwrap_err());
        assert_eq!(refused.code(), Code::PermissionDenied);
        check_volume(program, true).unwrap();
        check_volume("nbd://server/disk", false).unwrap();
        assert!(!AttachRequest::default().from_operator, "it has to be said");
    }
}
