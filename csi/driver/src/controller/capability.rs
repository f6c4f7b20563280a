//! How a volume is to be used.

use sheave_control::v1 as api;
use sheave_csi_proto::v1 as csi;
use sheave_csi_proto::v1::volume_capability::AccessType;
use tonic::Status;

use crate::checks::NO_MOUNT_GROUP;

/// The file systems that a node can make.
const FILE_SYSTEMS: [&str; 3] = ["ext4", "xfs", "btrfs"];
/// Bytes of all mount flags (the specification, `VolumeCapability.MountVolume`).
const MOUNT_FLAGS_LEN_MAX: usize = 4 << 10;

/// A way to use a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Use {
    pub(crate) mode: api::AccessMode,
    pub(crate) block: bool,
}

impl Use {
    /// # Errors
    /// INVALID_ARGUMENT where something is missing or not known here.
    pub(crate) fn new(capability: Option<&csi::VolumeCapability>) -> Result<Self, Status> {
        let invalid = |why: String| Err(Status::invalid_argument(why));
        let Some(capability) = capability else {
            return invalid("volume_capability is missing".to_owned());
        };
        let block = match &capability.access_type {
            None => return invalid("volume_capability has neither block nor mount".to_owned()),
            Some(AccessType::Block(_)) => true,
            Some(AccessType::Mount(mount)) => {
                let fs_type = mount.fs_type.as_str();
                if !fs_type.is_empty() && !FILE_SYSTEMS.contains(&fs_type) {
                    let known = FILE_SYSTEMS.join(", ");
                    let shown: String = fs_type.chars().take(32).collect();
                    return invalid(format!("no file system {shown:?} is made here; use {known}"));
                }
                if !mount.volume_mount_group.is_empty() {
                    return invalid(format!("volume_capability {NO_MOUNT_GROUP}"));
                }
                let len: usize = mount.mount_flags.iter().map(String::len).sum();
                if len > MOUNT_FLAGS_LEN_MAX {
                    return invalid(format!(
                        "mount_flags have {len} bytes; the most is {MOUNT_FLAGS_LEN_MAX}"
                    ));
                }
                false
            }
        };
        let mode = capability.access_mode.as_ref().map(|mode| mode.mode);
        // The numbers are the same.
        match mode.map(api::AccessMode::try_from) {
            Some(Ok(mode)) if mode != api::AccessMode::Unspecified => Ok(Self { mode, block }),
            _ => invalid("access_mode is missing or not known here".to_owned()),
        }
    }

    /// Whether no node may write.
    pub(crate) fn is_reader_only(self) -> bool {
        use api::AccessMode::{MultiNodeReaderOnly, SingleNodeReaderOnly};
        matches!(self.mode, SingleNodeReaderOnly | MultiNodeReaderOnly)
    }

    /// Checks that volumes of this pool can be used so.
    ///
    /// # Errors
    /// INVALID_ARGUMENT with what can be had instead.
    pub(crate) fn check(self, pool: &api::Pool) -> Result<(), Status> {
        let modes = if self.block { &pool.block_modes } else { &pool.mount_modes };
        if modes.contains(&self.mode.into()) {
            return Ok(());
        }
        let name = |mode: api::AccessMode| {
            mode.as_str_name().trim_start_matches("ACCESS_MODE_").to_owned()
        };
        let known = modes.iter().filter_map(|mode| api::AccessMode::try_from(*mode).ok());
        let known: Vec<_> = known.map(name).collect();
        let what = if self.block { "block devices" } else { "file systems" };
        Err(Status::invalid_argument(format!(
            "pool {}: {} is not possible for {what}; possible: {}",
            pool.name,
            name(self.mode),
            known.join(", ")
        )))
    }
}

/// All ways in which a volume is to be used.
///
/// # Errors
/// INVALID_ARGUMENT where there are none, or something is missing or not known here.
pub(crate) fn uses(capabilities: &[csi::VolumeCapability]) -> Result<Vec<Use>, Status> {
    if capabilities.is_empty() {
        return Err(Status::invalid_argument("volume_capabilities are missing"));
    }
    capabilities.iter().map(|capability| Use::new(Some(capability))).collect()
}
