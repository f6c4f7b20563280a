//! A plugin whose pools are of its node: it has no central controller, and with it neither attacher
//! nor resizer that reach it (docs/decisions/0015).
//!
//! The orchestrator calls neither ControllerPublishVolume nor ControllerExpandVolume then. So the
//! node publishes a volume to itself when it stages it, and ends that when it is unstaged: epochs,
//! and what they protect, are as with an attacher.

use sheave_control::v1 as api;
use tonic::{Code, Status};

use crate::Plugin;
use crate::capability::Capability;
use crate::control::call;
use crate::sizes::SizeRange;

impl Plugin {
    /// Publishes a volume to this node, and returns the epoch of the publication.
    ///
    /// # Errors
    /// What the daemon says; ALREADY_EXISTS when it is in use in another way.
    pub(crate) async fn publish_here(&self, id: &str, wanted: &Capability) -> Result<u64, Status> {
        let publish = || api::PublishVolumeRequest {
            id: id.to_owned(),
            node: self.node_id.clone().unwrap_or_default(),
            read_only: wanted.is_reader_only(),
            mode: wanted.mode.into(),
            block: wanted.is_block(),
            claim: String::new(),
        };
        let mut volumes = self.volumes.clone();
        match call(volumes.publish_volume(publish())).await {
            // Unstaging was never called, such as before the node was set up anew. This fails while
            // the volume is a device.
            Err(status) if status.code() == Code::AlreadyExists => {
                self.unpublish_here(id).await.map_err(|_| status)?;
                Ok(call(volumes.publish_volume(publish())).await?.epoch)
            }
            published => Ok(published?.epoch),
        }
    }

    /// Ends the publication to this node. Done if there is none; that of FlexVolume or Docker is
    /// left.
    ///
    /// # Errors
    /// FAILED_PRECONDITION while the volume is a device of this node.
    pub(crate) async fn unpublish_here(&self, id: &str) -> Result<(), Status> {
        let node = self.node_id.clone().unwrap_or_default();
        let (id, claim) = (id.to_owned(), Some(String::new()));
        let unpublish = api::UnpublishVolumeRequest { id, node, claim };
        call(self.volumes.clone().unpublish_volume(unpublish)).await.map(drop)
    }

    /// Ends the publication of a volume that was unstaged. Where the configuration lacks the pool,
    /// the publication is left: it is in the way of nothing (`publish_here`).
    ///
    /// # Errors
    /// What the daemon says.
    pub(crate) async fn unpublish_unstaged(&self, id: &str) -> Result<(), Status> {
        let ended = self.unpublish_here(id).await;
        let Err(status) = &ended else { return ended };
        let pools = call(self.volumes.clone().list_pools(api::ListPoolsRequest {})).await?.pools;
        if id.split_once('/').is_none_or(|(of, _)| pools.iter().any(|pool| pool.name == of)) {
            return ended;
        }
        tracing::warn!("it is unstaged, and its publication is left: {}", status.message());
        Ok(())
    }

    /// Makes a volume as long as required, unless it is already.
    ///
    /// # Errors
    /// What the daemon says.
    pub(crate) async fn grow_here(&self, id: &str, range: SizeRange) -> Result<(), Status> {
        let SizeRange { required_bytes, limit_bytes } = range;
        let resize = api::ResizeVolumeRequest { id: id.to_owned(), required_bytes, limit_bytes };
        call(self.volumes.clone().resize_volume(resize)).await.map(drop)
    }
}
