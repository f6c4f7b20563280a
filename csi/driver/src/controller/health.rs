//! How a volume is, for clients of 1.13 and for older ones.

use sheave_control::v1 as api;
use sheave_csi_proto::v1 as csi;
use sheave_csi_proto::v1::volume_health::VolumeHealthEntry;

use crate::checks;

/// Of 1.13. A volume without entries is well.
pub(super) fn health(of: &api::Volume) -> csi::VolumeHealth {
    let entry = || VolumeHealthEntry {
        status: csi::VolumeHealthErrorType::Inaccessible.into(),
        reason: "StorageUnusable".to_owned(),
        message: checks::message(&of.trouble),
    };
    let health_statuses = (!of.trouble.is_empty()).then(entry).into_iter().collect();
    csi::VolumeHealth { volume_id: of.id.clone(), health_statuses }
}

/// Up to 1.12.
pub(super) fn condition(of: &api::Volume) -> csi::VolumeCondition {
    let abnormal = !of.trouble.is_empty();
    let message = if abnormal { checks::message(&of.trouble) } else { "well".to_owned() };
    csi::VolumeCondition { abnormal, message }
}
