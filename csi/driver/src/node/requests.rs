//! Requests of the service Node, checked, as the engine takes them.
//!
//! Each is checked as a whole before anything is done, in this order: ids, paths, capability,
//! contexts.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::{
    NodeExpandVolumeRequest, NodePublishVolumeRequest, NodeStageVolumeRequest, VolumeCapability,
};
use sheave_node::{Attach, Front, PublishRequest, StageRequest, parse_force_unstage_after};
use tonic::Status;

use super::USER;
use crate::capability::Capability;
use crate::checks;
use crate::context::{FORCE_UNSTAGE_AFTER, FRONT, Publication};
use crate::sizes::SizeRange;

/// Paths are longer than other texts (the specification, "Size Limits"); PATH_MAX of Linux.
const PATH_LEN_MAX: usize = 4096;

/// NodeStageVolume.
pub(super) fn stage(request: NodeStageVolumeRequest) -> Result<(StageRequest, Capability), Status> {
    checks::text("volume_id", &request.volume_id)?;
    let staging = path("staging_target_path", &request.staging_target_path)?;
    let capability = capability(request.volume_capability.as_ref())?;
    checks::map("publish_context", &request.publish_context)?;
    checks::map("volume_context", &request.volume_context)?;
    checks::map("secrets", &request.secrets)?;
    let publication = Publication::of(&request.publish_context)?;
    let read_only = publication.read_only || capability.is_reader_only();
    let front = front(&request.volume_context)?;
    let attach = Attach { read_only, epoch: publication.epoch, front };
    let force_unstage_after = force_after(&request.volume_context)?;
    let request = StageRequest {
        volume: request.volume_id,
        staging,
        access: capability.access.clone(),
        may_format: true,
        attach,
        force_unstage_after,
        user: USER,
    };
    Ok((request, capability))
}

/// NodePublishVolume.
pub(super) fn publish(request: NodePublishVolumeRequest) -> Result<PublishRequest, Status> {
    checks::text("volume_id", &request.volume_id)?;
    let target = path("target_path", &request.target_path)?;
    let capability = capability(request.volume_capability.as_ref())?;
    checks::map("publish_context", &request.publish_context)?;
    checks::map("volume_context", &request.volume_context)?;
    checks::map("secrets", &request.secrets)?;
    let publication = Publication::of(&request.publish_context)?;
    if request.staging_target_path.is_empty() {
        let why = "staging_target_path is missing: volumes are staged before they are published";
        return Err(Status::failed_precondition(why));
    }
    let staging = path("staging_target_path", &request.staging_target_path)?;
    Ok(PublishRequest {
        volume: request.volume_id,
        staging,
        target,
        read_only: request.readonly || publication.read_only || capability.is_reader_only(),
        is_shared: may_be_at_several_places(capability.mode),
        mode: capability.mode.as_str_name().to_owned(),
        access: capability.access,
        epoch: publication.epoch,
        force_unstage_after: force_after(&request.volume_context)?,
    })
}

/// NodeExpandVolume.
pub(super) fn expand(
    request: NodeExpandVolumeRequest,
) -> Result<(String, PathBuf, SizeRange), Status> {
    checks::text("volume_id", &request.volume_id)?;
    let path = volume_path(&request.volume_path)?;
    if request.volume_capability.is_some() {
        capability(request.volume_capability.as_ref())?;
    }
    checks::map("secrets", &request.secrets)?;
    let range = SizeRange::parse(request.capacity_range.as_ref())?;
    Ok((request.volume_id, path, range))
}

/// A path that must be there.
pub(super) fn path(what: &str, path: &str) -> Result<PathBuf, Status> {
    if path.is_empty() {
        return Err(Status::invalid_argument(format!("{what} is missing")));
    }
    if path.len() > PATH_LEN_MAX || path.contains('\0') {
        let why = format!("{what} is no path of at most {PATH_LEN_MAX} bytes");
        return Err(Status::invalid_argument(why));
    }
    Ok(path.into())
}

/// The path of a volume that is there. On a path that is not absolute there is none.
pub(super) fn volume_path(text: &str) -> Result<PathBuf, Status> {
    let path = path("volume_path", text)?;
    match path.is_absolute() {
        true => Ok(path),
        false => Err(Status::not_found(format!("no volume is at {text:?}: it is not absolute"))),
    }
}

/// Checks what the node adds to a capability: the controller's pool has not judged the mode of a
/// volume that was provisioned by hand.
fn capability(capability: Option<&VolumeCapability>) -> Result<Capability, Status> {
    let capability = Capability::parse(capability)?;
    if !capability.is_block() && capability.mode == Mode::MultiNodeMultiWriter {
        return Err(Status::invalid_argument(
            "volume_capability is a filesystem on several nodes that write, which would destroy \
             it; use a raw block volume (volumeMode: Block)",
        ));
    }
    Ok(capability)
}

fn front(context: &HashMap<String, String>) -> Result<Front, Status> {
    let Some(name) = context.get(FRONT) else { return Ok(Front::default()) };
    Front::of_name(name).ok_or_else(|| {
        let form = Front::FORM;
        Status::invalid_argument(format!("volume_context {FRONT}: write {form}"))
    })
}

fn force_after(context: &HashMap<String, String>) -> Result<Option<Duration>, Status> {
    let Some(text) = context.get(FORCE_UNSTAGE_AFTER) else { return Ok(None) };
    let parsed = parse_force_unstage_after(text).ok_or_else(|| {
        let form = sheave_node::FORCE_UNSTAGE_AFTER_FORM;
        Status::invalid_argument(format!("volume_context {FORCE_UNSTAGE_AFTER}: write {form}"))
    })?;
    Ok(Some(parsed))
}

/// Modes in which a volume may be published at a second place (the specification,
/// "NodePublishVolume", table of second calls).
fn may_be_at_several_places(mode: Mode) -> bool {
    matches!(
        mode,
        Mode::MultiNodeReaderOnly
            | Mode::MultiNodeSingleWriter
            | Mode::MultiNodeMultiWriter
            | Mode::SingleNodeMultiWriter
    )
}

#[cfg(test)]
mod tests {
    use sheave_csi_proto::v1::volume_capability::{
        AccessMode, AccessType, BlockVolume, MountVolume,
    };
    use tonic::Code;

    use super::*;

    fn mount(mode: Mode, fs_type: &str) -> Option<VolumeCapability> {
        let mount = MountVolume { fs_type: fs_type.to_owned(), ..MountVolume::default() };
        with(mode, AccessType::Mount(mount))
    }

    fn with(mode: Mode, access_type: AccessType) -> Option<VolumeCapability> {
        let access_mode = Some(AccessMode { mode: mode.into() });
        Some(VolumeCapability { access_type: Some(access_type), access_mode })
    }

    fn request(volume_capability: Option<VolumeCapability>) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: "fast/1".to_owned(),
            staging_target_path: "/stage".to_owned(),
            target_path: "/pod".to_owned(),
            volume_capability,
            ..NodePublishVolumeRequest::default()
        }
    }

    #[track_caller]
    fn check(request: NodePublishVolumeRequest, code: Code, why: &str) {
        let status = publish(request).expect_err("refused");
        assert_eq!((status.code(), status.message().contains(why)), (code, true), "{status}");
    }

    #[test]
    fn rule_10_missing_fields_are_found_in_a_fixed_order() {
        let good = || request(mount(Mode::SingleNodeWriter, ""));
        publish(good()).expect("good");
        let mut bad = NodePublishVolumeRequest::default();
        check(bad.clone(), Code::InvalidArgument, "volume_id");
        bad.volume_id = "fast/1".to_owned();
        check(bad.clone(), Code::InvalidArgument, "target_path");
        bad.target_path = "/pod".to_owned();
        check(bad.clone(), Code::InvalidArgument, "volume_capability");
        bad.volume_capability = mount(Mode::SingleNodeWriter, "");
        check(bad, Code::FailedPrecondition, "staging_target_path");
        check(request(mount(Mode::Unknown, "")), Code::InvalidArgument, "access mode");
        check(request(mount(Mode::SingleNodeWriter, "ntfs")), Code::InvalidArgument, "ext4, xfs");
        let mut long = good();
        long.volume_id = "v".repeat(129);
        check(long, Code::InvalidArgument, "129");
    }

    #[test]
    fn rule_09_modes_say_where_and_how_a_volume_may_be() {
        use Mode::*;
        let table = [
            (SingleNodeWriter, false, false),
            (SingleNodeReaderOnly, false, true),
            (MultiNodeReaderOnly, true, true),
            (MultiNodeSingleWriter, true, false),
            (SingleNodeSingleWriter, false, false),
            (SingleNodeMultiWriter, true, false),
        ];
        for (mode, is_shared, read_only) in table {
            let published = publish(request(mount(mode, "xfs"))).expect("good");
            assert_eq!((published.is_shared, published.read_only), (is_shared, read_only));
        }
        let block = || AccessType::Block(BlockVolume {});
        assert!(publish(request(with(MultiNodeMultiWriter, block()))).expect("good").is_shared);
        let shared = request(mount(MultiNodeMultiWriter, "ext4"));
        check(shared, Code::InvalidArgument, "raw block");
    }
}
