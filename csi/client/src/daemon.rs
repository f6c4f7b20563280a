//! Calls of the control API that block, with deadlines.

use std::path::Path;
use std::time::Duration;

use sheave_control::v1::{
    AccessMode, CreateVolumeRequest, DeleteVolumeRequest, GetVolumeRequest, ListPoolsRequest,
    ListVolumesRequest, Pool, Publication, PublishVolumeRequest, ResizeVolumeRequest,
    UnpublishVolumeRequest, Uses, Volume, get_volume_request::Key,
};
use sheave_control::{ControlClient, VolumesClient};
use sheave_node::{Error, Kind, Result, make_dir, remove_dir};
use tokio::runtime::Handle;
use tonic::{Code, Response, Status};

/// How long attaching and detaching may take: the kernel and the volume's storage take part.
pub(crate) const DEVICE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long other calls may take.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// The daemon of this node. Calls block, so they must not come from its runtime's threads.
#[derive(Clone)]
pub struct Daemon {
    runtime: Handle,
    volumes: VolumesClient,
    devices: ControlClient,
}

impl Daemon {
    /// A daemon with these clients, which are of this runtime.
    #[must_use]
    pub fn new(runtime: Handle, volumes: VolumesClient, devices: ControlClient) -> Self {
        Self { runtime, volumes, devices }
    }

    /// Its devices.
    pub(crate) fn devices(&self) -> ControlClient {
        self.devices.clone()
    }

    /// Its volumes.
    pub(crate) fn volumes(&self) -> VolumesClient {
        self.volumes.clone()
    }

    /// Waits for an answer at most so long.
    pub(crate) fn wait<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T> {
        let answered = self.runtime.block_on(async { tokio::time::timeout(limit, call).await });
        match answered {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(error(&reached(status))),
            Err(_) => {
                let why = format!("the daemon has not answered within {} s", limit.as_secs());
                Err(Error::new(Kind::TimedOut, why))
            }
        }
    }

    /// The volume with this id.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is none.
    pub fn volume(&self, id: &str) -> Result<Volume> {
        self.get(Key::Id(id.to_owned()))
    }

    /// The volume that is called POOL/NAME or POOL/UUID.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is none.
    pub fn find(&self, name: &str) -> Result<Volume> {
        self.get(Key::Name(name.to_owned()))
    }

    fn get(&self, key: Key) -> Result<Volume> {
        let request = GetVolumeRequest { key: Some(key) };
        let answer = self.wait(CALL_TIMEOUT, self.volumes().get_volume(request))?;
        answer.volume.ok_or_else(no_volume)
    }

    /// Makes a volume; one of this name that is as it is wanted is returned.
    ///
    /// # Errors
    /// [`Kind::Exists`] when it is not as it is wanted, and what the pool says.
    pub fn create(&self, wanted: CreateVolumeRequest) -> Result<Volume> {
        let answer = self.wait(CALL_TIMEOUT, self.volumes().create_volume(wanted))?;
        answer.volume.ok_or_else(no_volume)
    }

    /// Deletes a volume with its data. Done if there is none.
    ///
    /// # Errors
    /// [`Kind::Refused`] while it is in use, and if something has had it since it was `seen`.
    pub fn delete(&self, id: &str, seen: Option<&Volume>) -> Result<()> {
        let uses = seen.map(|seen| Uses { epoch: seen.epoch, users: seen.users.clone() });
        let request = DeleteVolumeRequest { id: id.to_owned(), uses };
        self.wait(CALL_TIMEOUT, self.volumes().delete_volume(request)).map(drop)
    }

    /// Makes a volume at least so long, unless it is already.
    ///
    /// # Errors
    /// What its pool says.
    pub fn grow(&self, id: &str, required_bytes: u64) -> Result<u64> {
        let request = ResizeVolumeRequest { id: id.to_owned(), required_bytes, limit_bytes: 0 };
        let answer = self.wait(CALL_TIMEOUT, self.volumes().resize_volume(request))?;
        answer.volume.map(|volume| volume.size_bytes).ok_or_else(no_volume)
    }

    /// Lets a node mount a volume, at several places, and returns the epoch of the publication.
    /// `claim` is what [`Self::published_as`] finds it by.
    ///
    /// # Errors
    /// [`Kind::Exists`] when the node has it in another way, [`Kind::Refused`] when another node
    /// has it.
    pub fn publish(
        &self,
        volume: &Volume,
        node: &str,
        read_only: bool,
        claim: &str,
    ) -> Result<u64> {
        let mode = match read_only {
            true => self.reading(&volume.pool)?,
            false => AccessMode::SingleNodeMultiWriter,
        };
        let request = PublishVolumeRequest {
            id: volume.id.clone(),
            node: node.to_owned(),
            read_only,
            mode: mode.into(),
            block: false,
            claim: claim.to_owned(),
        };
        Ok(self.wait(CALL_TIMEOUT, self.volumes().publish_volume(request))?.epoch)
    }

    /// The same for this node, without a controller, and makes the directory for the mount. A
    /// publication of this claim that is read-only and should not be, or the other way, is
    /// replaced.
    ///
    /// # Errors
    /// As for [`Self::publish`], while the volume is a device, and errors of the file system.
    pub fn publish_at(
        &self,
        mount_point: &Path,
        volume: &Volume,
        node: &str,
        read_only: bool,
        claim: &str,
    ) -> Result<u64> {
        // Before it is published, so that a caller that is killed leaves a trace.
        make_dir(mount_point)?;
        self.publish_here(volume, node, read_only, claim).inspect_err(|_| {
            // It is empty, unless the volume is mounted there.
            let _ = remove_dir(mount_point);
        })
    }

    fn publish_here(
        &self,
        volume: &Volume,
        node: &str,
        read_only: bool,
        claim: &str,
    ) -> Result<u64> {
        let mut all = volume.publications.iter();
        if all.any(|has| is_of(has, node, claim) && has.read_only != read_only) {
            self.unpublish_as(&volume.id, node, claim)?;
        }
        self.publish(volume, node, read_only, claim)
    }

    /// Undoes [`Self::publish_at`] for a volume that is not mounted any more.
    ///
    /// # Errors
    /// As for [`Self::unpublish_as`], and errors of the file system.
    pub fn unpublish_at(
        &self,
        mount_point: &Path,
        id: &str,
        node: &str,
        claim: &str,
    ) -> Result<()> {
        self.unpublish_as(id, node, claim)?;
        remove_dir(mount_point)
    }

    /// Ends the publication to a node that has this claim. Done if there is none; one of another
    /// claim is left.
    ///
    /// # Errors
    /// [`Kind::Refused`] while the volume is a device of that node.
    pub fn unpublish_as(&self, id: &str, node: &str, claim: &str) -> Result<()> {
        let (id, node, claim) = (id.to_owned(), node.to_owned(), Some(claim.to_owned()));
        let request = UnpublishVolumeRequest { id, node, claim };
        self.wait(CALL_TIMEOUT, self.volumes().unpublish_volume(request)).map(drop)
    }

    /// The name of the only pool.
    ///
    /// # Errors
    /// [`Kind::Invalid`] when there are none or more.
    pub fn only_pool(&self) -> Result<String> {
        match &self.pools()?[..] {
            [only] => Ok(only.name.clone()),
            [] => {
                let why = "the daemon's configuration has no pools; see docs/volumes.md";
                Err(Error::new(Kind::Invalid, why))
            }
            several => {
                let names: Vec<_> = several.iter().map(|pool| &*pool.name).collect();
                let why = format!("name one of the pools: {}", names.join(", "));
                Err(Error::new(Kind::Invalid, why))
            }
        }
    }

    /// Bytes of a volume of a pool that no size is wanted for; 0 if there is no such pool.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn default_size(&self, pool: &str) -> Result<u64> {
        let mut pools = self.pools()?.into_iter().filter(|of| of.name == pool);
        Ok(pools.next().map_or(0, |of| of.default_size_bytes))
    }

    fn pools(&self) -> Result<Vec<Pool>> {
        Ok(self.wait(CALL_TIMEOUT, self.volumes().list_pools(ListPoolsRequest {}))?.pools)
    }

    /// Readers of several nodes share a volume where its pool can do that.
    fn reading(&self, pool: &str) -> Result<AccessMode> {
        let shared = AccessMode::MultiNodeReaderOnly;
        let mut pools = self.pools()?.into_iter().filter(|of| of.name == pool);
        let can_share = pools.any(|of| of.mount_modes.contains(&shared.into()));
        Ok(if can_share { shared } else { AccessMode::SingleNodeReaderOnly })
    }

    /// The ids of volumes that are published to a node by this claim, and why there may be more, if
    /// a pool cannot be asked.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn published_as(&self, claim: &str, node: &str) -> Result<(Vec<String>, Option<Error>)> {
        let is_it = |volume: &Volume| volume.publications.iter().any(|has| is_of(has, node, claim));
        let (all, unknown) = self.list_known()?;
        Ok((all.into_iter().filter(is_it).map(|volume| volume.id).collect(), unknown))
    }

    /// All volumes of all pools.
    ///
    /// # Errors
    /// When a pool cannot be asked.
    pub fn list(&self) -> Result<Vec<Volume>> {
        match self.list_known()? {
            (all, None) => Ok(all),
            (_, Some(unknown)) => Err(unknown),
        }
    }

    /// All volumes of the pools that answer, and why one does not.
    fn list_known(&self) -> Result<(Vec<Volume>, Option<Error>)> {
        let (mut found, mut unknown, mut page_token) = (Vec::new(), None, String::new());
        loop {
            let request = ListVolumesRequest { page_token, ..ListVolumesRequest::default() };
            let answer = self.wait(CALL_TIMEOUT, self.volumes().list_volumes(request))?;
            if let Some(trouble) = answer.troubles.first() {
                let why = format!("pool {}: {}", trouble.pool, trouble.message);
                unknown = Some(Error::new(Kind::Unavailable, why));
            }
            found.extend(answer.volumes);
            page_token = answer.next_page_token;
            if page_token.is_empty() {
                return Ok((found, unknown));
            }
        }
    }
}

fn is_of(has: &Publication, node: &str, claim: &str) -> bool {
    has.node == node && has.claim == claim
}

fn no_volume() -> Error {
    Error::new(Kind::Internal, "the daemon has named no volume")
}

/// What an answer of the control API means here.
fn error(status: &Status) -> Error {
    let kind = match status.code() {
        Code::InvalidArgument => Kind::Invalid,
        Code::NotFound => Kind::NotFound,
        Code::AlreadyExists => Kind::Exists,
        Code::FailedPrecondition
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented
        | Code::DataLoss => Kind::Refused,
        Code::Aborted => Kind::Pending,
        Code::DeadlineExceeded => Kind::TimedOut,
        Code::ResourceExhausted => Kind::Exhausted,
        Code::OutOfRange => Kind::OutOfRange,
        // Also a daemon that ended in the middle: the outcome is open.
        Code::Ok | Code::Cancelled | Code::Unknown | Code::Internal | Code::Unavailable => {
            Kind::Unavailable
        }
    };
    Error::new(kind, format!("the daemon: {}", status.message()))
}

/// An error of the transport with a text that says what is not there; any other is left as it is.
#[must_use]
pub fn reached(status: Status) -> Status {
    if std::error::Error::source(&status).is_none() {
        return status;
    }
    let why = status.message();
    Status::unavailable(format!("no daemon answers here ({why}); see whether it runs, and its log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_12_an_answer_that_leaves_the_outcome_open_is_not_final() {
        for code in [
            Code::Unavailable,
            Code::Internal,
            Code::Unknown,
            Code::DeadlineExceeded,
            Code::Cancelled,
            Code::Aborted,
            Code::ResourceExhausted,
        ] {
            assert!(!error(&Status::new(code, "x")).kind().is_final(), "{code}");
        }
        for code in [Code::NotFound, Code::FailedPrecondition, Code::InvalidArgument] {
            assert!(error(&Status::new(code, "x")).kind().is_final(), "{code}");
        }
    }
}
