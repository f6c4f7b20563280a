//! Requests of the service Node, checked, as the engine takes them.
//!
//! Each is checked as a whole before anything is done, in this order: ids, paths, capability,
//! contexts.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use sheave_csi_proto::v1::volume_capability::AccessType;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::{
    CapacityRange, NodeExpandVolumeRequest, NodePublishVolumeRequest, NodeStageVolumeRequest,
    VolumeCapability,
};
use sheave_node::{Access, Attach, Fs, PublishRequest, StageRequest};
use tonic::Status;

use crate::checks::{self, NO_MOUNT_GROUP};
use crate::context::{FORCE_UNSTAGE_AFTER, FRONT, Publication, parse_force_after};

/// Paths are longer than other texts (the specification, "Size Limits"); PATH_MAX of Linux.
const PATH_LEN_MAX: usize = 4096;
/// Of all mount flags together.
const MOUNT_FLAGS_LEN_MAX: usize = 4 << 10;
/// The type of a filesystem for which a class names none.
const DEFAULT_FS: Fs = Fs::Ext4;

/// What a volume is used for.
struct Capability {
    access: Access,
    mode: Mode,
}

/// What a volume's size is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) required: Option<u64>,
    limit: Option<u64>,
}

/// NodeStageVolume.
pub(super) fn stage(request: NodeStageVolumeRequest) -> Result<StageRequest, Status> {
    checks::text("volume_id", &request.volume_id)?;
    let staging = path("staging_target_path", &request.staging_target_path)?;
    let Capability { access, mode } = capability(request.volume_capability)?;
    checks::map("publish_context", &request.publish_context)?;
    checks::map("volume_context", &request.volume_context)?;
    checks::map("secrets", &request.secrets)?;
    let publication = Publication::of(&request.publish_context)?;
    let read_only = publication.read_only || reads_only(mode);
    let front = request.volume_context.get(FRONT).cloned();
    let attach = Attach { read_only, epoch: publication.epoch, front };
    let force_unstage_after = force_after(&request.volume_context)?;
    Ok(StageRequest { volume: request.volume_id, staging, access, attach, force_unstage_after })
}

/// NodePublishVolume.
pub(super) fn publish(request: NodePublishVolumeRequest) -> Result<PublishRequest, Status> {
    checks::text("volume_id", &request.volume_id)?;
    let target = path("target_path", &request.target_path)?;
    let Capability { access, mode } = capability(request.volume_capability)?;
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
        access,
        read_only: request.readonly || publication.read_only || reads_only(mode),
        is_shared: may_be_at_several_places(mode),
        mode: mode.as_str_name().to_owned(),
        epoch: publication.epoch,
    })
}

/// NodeExpandVolume.
pub(super) fn expand(request: NodeExpandVolumeRequest) -> Result<(String, PathBuf, Range), Status> {
    checks::text("volume_id", &request.volume_id)?;
    let path = volume_path(&request.volume_path)?;
    if request.volume_capability.is_some() {
        capability(request.volume_capability)?;
    }
    checks::map("secrets", &request.secrets)?;
    Ok((request.volume_id, path, Range::of(request.capacity_range)?))
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

fn capability(capability: Option<VolumeCapability>) -> Result<Capability, Status> {
    let invalid = |why: &str| Status::invalid_argument(format!("volume_capability {why}"));
    let capability = capability.ok_or_else(|| invalid("is missing"))?;
    let mode = capability.access_mode.ok_or_else(|| invalid("has no access mode"))?;
    let mode = Mode::try_from(mode.mode).map_err(|_| invalid("has an unknown access mode"))?;
    if mode == Mode::Unknown {
        return Err(invalid("has no access mode"));
    }
    let access = match capability.access_type {
        None => return Err(invalid("has no access type")),
        Some(AccessType::Block(_)) => Access::Block,
        Some(AccessType::Mount(mount)) => {
            // They may be secret, so none is shown.
            let len: usize = mount.mount_flags.iter().map(String::len).sum();
            if len > MOUNT_FLAGS_LEN_MAX {
                return Err(invalid("has mount flags of more than 4 KiB"));
            }
            if !mount.volume_mount_group.is_empty() {
                return Err(invalid(NO_MOUNT_GROUP));
            }
            let fs = match mount.fs_type.as_str() {
                "" => DEFAULT_FS,
                name => Fs::of_name(name).ok_or_else(|| {
                    let known = Fs::ALL.map(Fs::name).join(", ");
                    let shown: String = name.chars().take(32).collect();
                    invalid(&format!("has the type {shown:?}; known are {known}"))
                })?,
            };
            Access::Mount { fs, options: mount.mount_flags }
        }
    };
    if access != Access::Block && mode == Mode::MultiNodeMultiWriter {
        return Err(invalid(
            "is a filesystem on several nodes that write, which would destroy it; use a raw block \
             volume (volumeMode: Block)",
        ));
    }
    Ok(Capability { access, mode })
}

fn force_after(context: &HashMap<String, String>) -> Result<Option<Duration>, Status> {
    let Some(text) = context.get(FORCE_UNSTAGE_AFTER) else { return Ok(None) };
    let seconds = parse_force_after(text).ok_or_else(|| {
        let why = format!("volume_context {FORCE_UNSTAGE_AFTER}: write seconds, from 10 to 86400");
        Status::invalid_argument(why)
    })?;
    Ok(Some(Duration::from_secs(seconds)))
}

/// Modes in which the device itself refuses writes.
fn reads_only(mode: Mode) -> bool {
    matches!(mode, Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly)
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

impl Range {
    fn of(range: Option<CapacityRange>) -> Result<Self, Status> {
        let Some(CapacityRange { required_bytes, limit_bytes }) = range else {
            return Ok(Self { required: None, limit: None });
        };
        let bytes = |what: &str, bytes: i64| match u64::try_from(bytes) {
            Ok(0) => Ok(None),
            Ok(bytes) => Ok(Some(bytes)),
            Err(_) => Err(Status::invalid_argument(format!("{what} is negative"))),
        };
        let required = bytes("required_bytes", required_bytes)?;
        let limit = bytes("limit_bytes", limit_bytes)?;
        match (required, limit) {
            (Some(required), Some(limit)) if required > limit => {
                let why = format!("required_bytes {required} is more than limit_bytes {limit}");
                Err(Status::out_of_range(why))
            }
            _ => Ok(Self { required, limit }),
        }
    }

    /// As the control API has it: required and most, 0 for none.
    pub(super) fn of_volume(self) -> (u64, u64) {
        (self.required.unwrap_or_default(), self.limit.unwrap_or_default())
    }

    /// Refuses a size over the limit.
    pub(super) fn check(self, size: u64) -> Result<(), Status> {
        match self.limit {
            Some(limit) if size > limit => Err(Status::out_of_range(format!(
                "the volume has {size} bytes, and limit_bytes is {limit}; volumes never shrink"
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use sheave_csi_proto::v1::volume_capability::{AccessMode, BlockVolume, MountVolume};
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

    #[test]
    fn rule_14_mount_flags_are_in_no_message() {
        let mount_flags = vec!["password=hunter2".repeat(400)];
        let flags = MountVolume { mount_flags, ..MountVolume::default() };
        let status = publish(request(with(Mode::SingleNodeWriter, AccessType::Mount(flags))));
        let status = status.expect_err("too long");
        assert!(!status.message().contains("hunter2"), "{status}");
    }

    #[test]
    fn rule_04_sizes_are_checked() {
        let range = |required_bytes, limit_bytes| {
            let range = Range::of(Some(CapacityRange { required_bytes, limit_bytes }));
            range.map_err(|status| status.code())
        };
        assert_eq!(range(2, 1).err(), Some(Code::OutOfRange));
        assert_eq!(range(-1, 0).err(), Some(Code::InvalidArgument));
        assert_eq!(range(0, 5).expect("good").check(6).unwrap_err().code(), Code::OutOfRange);
        assert!(range(5, 0).expect("good").check(u64::MAX).is_ok());
    }
}
