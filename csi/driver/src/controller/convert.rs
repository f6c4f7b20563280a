//! Volumes and sizes of the control API as those of CSI.

use sheave_control::v1 as api;
use sheave_csi_proto::v1 as csi;
use tonic::Status;

use crate::Plugin;
use crate::context::{FORCE_UNSTAGE_AFTER, FRONT};

/// A size that is wanted, as required and limit; 0 is no bound.
///
/// # Errors
/// INVALID_ARGUMENT for one below 0, OUT_OF_RANGE where none fits.
pub(crate) fn size(range: Option<&csi::CapacityRange>) -> Result<(u64, u64), Status> {
    let Some(csi::CapacityRange { required_bytes, limit_bytes }) = range else { return Ok((0, 0)) };
    let bytes = |bytes: i64| {
        u64::try_from(bytes).map_err(|_| Status::invalid_argument("capacity_range is below 0"))
    };
    let (required, limit) = (bytes(*required_bytes)?, bytes(*limit_bytes)?);
    if limit != 0 && required > limit {
        let why = format!("capacity_range: {required} bytes required, and {limit} at most");
        return Err(Status::out_of_range(why));
    }
    Ok((required, limit))
}

/// Bytes as CSI has them.
pub(crate) fn bytes(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

pub(crate) fn volume(plugin: &Plugin, of: &api::Volume) -> csi::Volume {
    let keys = [FRONT, FORCE_UNSTAGE_AFTER].into_iter();
    let context = keys.filter_map(|key| Some((key.to_owned(), of.parameters.get(key)?.clone())));
    csi::Volume {
        capacity_bytes: bytes(of.size_bytes),
        volume_id: of.id.clone(),
        volume_context: context.collect(),
        content_source: None,
        accessible_topology: plugin.topology(of.local).into_iter().collect(),
    }
}

/// The nodes that have a volume.
pub(crate) fn nodes(of: &api::Volume) -> Vec<String> {
    of.publications.iter().map(|has| has.node.clone()).collect()
}
