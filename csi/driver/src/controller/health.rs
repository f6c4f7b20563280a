//! How a volume is, for clients of 1.13 and for older ones.

use sheave_control::v1 as api;
use sheave_csi_proto::v1 as csi;
use sheave_csi_proto::v1::volume_health::VolumeHealthEntry;
use tonic::{Code, Status};

use crate::checks;

/// Of 1.13. A volume without entries is well.
pub(super) fn health(of: &api::Volume) -> csi::VolumeHealth {
    let entry = || inaccessible("StorageUnusable", &of.trouble);
    let health_statuses = (!of.trouble.is_empty()).then(entry).into_iter().collect();
    csi::VolumeHealth { volume_id: of.id.clone(), health_statuses }
}

/// Of 1.13, of a volume of which nothing is known but that its pool's storage fails or hangs.
///
/// # Errors
/// The same one, where it is about something else.
pub(super) fn of_storage(id: &str, why: Status) -> Result<csi::VolumeHealth, Status> {
    let reason = match why.code() {
        Code::DeadlineExceeded => "StorageHangs",
        Code::Unavailable => "StorageUnusable",
        _ => return Err(why),
    };
    let health_statuses = vec![inaccessible(reason, why.message())];
    Ok(csi::VolumeHealth { volume_id: id.to_owned(), health_statuses })
}

fn inaccessible(reason: &str, message: &str) -> VolumeHealthEntry {
    VolumeHealthEntry {
        status: csi::VolumeHealthErrorType::Inaccessible.into(),
        reason: reason.to_owned(),
        message: checks::message(message),
    }
}

/// Up to 1.12.
pub(super) fn condition(of: &api::Volume) -> csi::VolumeCondition {
    let abnormal = !of.trouble.is_empty();
    let message = if abnormal { checks::message(&of.trouble) } else { "well".to_owned() };
    csi::VolumeCondition { abnormal, message }
}
