//! Requests of the Container Storage Interface, as the sidecars and kubelet make them.

use std::collections::HashMap;
use std::path::Path;

use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use sheave_csi_proto::v1::*;

/// A filesystem of this type; the plugin's default for an empty one.
#[must_use]
pub fn filesystem(mode: Mode, fs_type: &str) -> VolumeCapability {
    let mount = MountVolume { fs_type: fs_type.to_owned(), ..MountVolume::default() };
    capability(mode, AccessType::Mount(mount))
}

/// A raw block device.
#[must_use]
pub fn block(mode: Mode) -> VolumeCapability {
    capability(mode, AccessType::Block(BlockVolume {}))
}

fn capability(mode: Mode, access_type: AccessType) -> VolumeCapability {
    let access_mode = Some(AccessMode { mode: mode.into() });
    VolumeCapability { access_mode, access_type: Some(access_type) }
}

/// That many bytes or more.
#[must_use]
pub fn at_least(required_bytes: i64) -> CapacityRange {
    CapacityRange { required_bytes, limit_bytes: 0 }
}

/// CreateVolume.
#[must_use]
pub fn create(
    name: &str,
    range: CapacityRange,
    capability: VolumeCapability,
    parameters: &[(&str, &str)],
) -> CreateVolumeRequest {
    let pairs = parameters.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(range),
        volume_capabilities: vec![capability],
        parameters: pairs.collect(),
        ..CreateVolumeRequest::default()
    }
}

/// Requests about one volume, with what a persistent volume and an attachment keep of it.
#[derive(Clone)]
pub struct VolumeRequests {
    /// Its id.
    pub id: String,
    /// How it is used.
    pub capability: VolumeCapability,
    /// Whether its users may only read.
    pub read_only: bool,
    /// The answer of ControllerPublishVolume.
    pub publish_context: HashMap<String, String>,
    /// From the answer of CreateVolume.
    pub volume_context: HashMap<String, String>,
}

impl VolumeRequests {
    /// A volume that is used for writing, without contexts.
    #[must_use]
    pub fn new(id: &str, capability: &VolumeCapability) -> Self {
        Self {
            id: id.to_owned(),
            capability: capability.clone(),
            read_only: false,
            publish_context: HashMap::new(),
            volume_context: HashMap::new(),
        }
    }

    /// The attacher's.
    #[must_use]
    pub fn controller_publish(&self, node: &str) -> ControllerPublishVolumeRequest {
        ControllerPublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: node.to_owned(),
            volume_capability: Some(self.capability.clone()),
            readonly: self.read_only,
            volume_context: self.volume_context.clone(),
            ..ControllerPublishVolumeRequest::default()
        }
    }

    /// The resizer's.
    #[must_use]
    pub fn controller_expand(&self, range: CapacityRange) -> ControllerExpandVolumeRequest {
        ControllerExpandVolumeRequest {
            volume_id: self.id.clone(),
            capacity_range: Some(range),
            volume_capability: Some(self.capability.clone()),
            ..ControllerExpandVolumeRequest::default()
        }
    }

    /// kubelet's, as the others from here on.
    #[must_use]
    pub fn node_stage(&self, staging: &Path) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: self.id.clone(),
            publish_context: self.publish_context.clone(),
            staging_target_path: text(staging),
            volume_capability: Some(self.capability.clone()),
            volume_context: self.volume_context.clone(),
            ..NodeStageVolumeRequest::default()
        }
    }

    /// Into a pod.
    #[must_use]
    pub fn node_publish(&self, staging: &Path, target: &Path) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            publish_context: self.publish_context.clone(),
            staging_target_path: text(staging),
            target_path: text(target),
            volume_capability: Some(self.capability.clone()),
            readonly: self.read_only,
            volume_context: self.volume_context.clone(),
            ..NodePublishVolumeRequest::default()
        }
    }

    /// Where a pod has it.
    #[must_use]
    pub fn node_expand(
        &self,
        staging: &Path,
        target: &Path,
        range: CapacityRange,
    ) -> NodeExpandVolumeRequest {
        NodeExpandVolumeRequest {
            volume_id: self.id.clone(),
            volume_path: text(target),
            capacity_range: Some(range),
            staging_target_path: text(staging),
            volume_capability: Some(self.capability.clone()),
            ..NodeExpandVolumeRequest::default()
        }
    }
}

/// DeleteVolume.
#[must_use]
pub fn delete(id: &str) -> DeleteVolumeRequest {
    DeleteVolumeRequest { volume_id: id.to_owned(), ..DeleteVolumeRequest::default() }
}

/// ControllerUnpublishVolume; from all nodes for an empty one.
#[must_use]
pub fn controller_unpublish(id: &str, node: &str) -> ControllerUnpublishVolumeRequest {
    ControllerUnpublishVolumeRequest {
        volume_id: id.to_owned(),
        node_id: node.to_owned(),
        ..ControllerUnpublishVolumeRequest::default()
    }
}

/// NodeUnstageVolume.
#[must_use]
pub fn node_unstage(id: &str, staging: &Path) -> NodeUnstageVolumeRequest {
    NodeUnstageVolumeRequest { volume_id: id.to_owned(), staging_target_path: text(staging) }
}

/// NodeUnpublishVolume.
#[must_use]
pub fn node_unpublish(id: &str, target: &Path) -> NodeUnpublishVolumeRequest {
    NodeUnpublishVolumeRequest { volume_id: id.to_owned(), target_path: text(target) }
}

/// NodeGetVolumeStats.
#[must_use]
pub fn node_stats(id: &str, staging: &Path, target: &Path) -> NodeGetVolumeStatsRequest {
    NodeGetVolumeStatsRequest {
        volume_id: id.to_owned(),
        volume_path: text(target),
        staging_target_path: text(staging),
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}
