//! How a volume is to be used: `VolumeCapability` of the specification.

use sheave_control::v1 as api;
use sheave_csi_proto::v1::volume_capability::AccessType;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::{VolumeCapability, volume_capability::MountVolume};
use sheave_node::{Access, Fs};
use tonic::Status;

/// Bytes of all mount flags (the specification, `VolumeCapability.MountVolume`).
const MOUNT_FLAGS_LEN_MAX: usize = 4 << 10;
/// Characters of an unknown type that an error shows.
const SHOWN_LEN: usize = 32;
/// The type of a filesystem for which a class names none.
const DEFAULT_FS: Fs = Fs::Ext4;

/// A checked capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Capability {
    pub(crate) access: Access,
    /// Never `Unknown`.
    pub(crate) mode: Mode,
}

impl Capability {
    /// Checks a capability that must be there.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where a part is missing or unknown.
    pub(crate) fn parse(capability: Option<&VolumeCapability>) -> Result<Self, Status> {
        let capability = capability.ok_or_else(|| invalid("is missing"))?;
        let mode = capability.access_mode.ok_or_else(|| invalid("has no access mode"))?.mode;
        let mode = Mode::try_from(mode).ok().filter(|mode| *mode != Mode::Unknown);
        let mode = mode.ok_or_else(|| invalid("has an unknown access mode"))?;
        let access = match &capability.access_type {
            None => return Err(invalid("has neither block nor mount")),
            Some(AccessType::Block(_)) => Access::Block,
            Some(AccessType::Mount(mount)) => parse_mount(mount)?,
        };
        Ok(Self { access, mode })
    }

    /// Checks a list that must not be empty.
    ///
    /// # Errors
    /// INVALID_ARGUMENT as well for an empty list.
    pub(crate) fn parse_all(capabilities: &[VolumeCapability]) -> Result<Vec<Self>, Status> {
        if capabilities.is_empty() {
            return Err(Status::invalid_argument("volume_capabilities are missing"));
        }
        capabilities.iter().map(|capability| Self::parse(Some(capability))).collect()
    }

    /// Whether it is a raw block device.
    pub(crate) fn is_block(&self) -> bool {
        self.access == Access::Block
    }

    /// Whether no node may write.
    pub(crate) fn is_reader_only(&self) -> bool {
        matches!(self.mode, Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly)
    }

    /// Checks that volumes of this pool can be used so.
    ///
    /// # Errors
    /// INVALID_ARGUMENT with what can be had instead.
    pub(crate) fn check_pool(&self, pool: &api::Pool) -> Result<(), Status> {
        // The control API numbers the modes as CSI does.
        let (modes, what) = match self.is_block() {
            true => (&pool.block_modes, "block devices"),
            false => (&pool.mount_modes, "filesystems"),
        };
        if modes.contains(&self.mode.into()) {
            return Ok(());
        }
        let known = modes.iter().filter_map(|mode| Mode::try_from(*mode).ok());
        let known: Vec<_> = known.map(|mode| mode.as_str_name()).collect();
        Err(Status::invalid_argument(format!(
            "pool {}: {} is not possible for {what}; possible: {}",
            pool.name,
            self.mode.as_str_name(),
            known.join(", ")
        )))
    }
}

fn parse_mount(mount: &MountVolume) -> Result<Access, Status> {
    // Drivers of filesystems whose files have no owners of their own announce mount groups. Here
    // the orchestrator sets the group (`fsGroupPolicy: File`).
    if !mount.volume_mount_group.is_empty() {
        let why = "has a volume_mount_group; the orchestrator sets the group of files (fsGroup)";
        return Err(invalid(why));
    }
    // Flags may be secret, so none is shown.
    let len: usize = mount.mount_flags.iter().map(String::len).sum();
    if len > MOUNT_FLAGS_LEN_MAX {
        let why = format!("has mount_flags of {len} bytes; the most is {MOUNT_FLAGS_LEN_MAX}");
        return Err(invalid(&why));
    }
    let fs = match mount.fs_type.as_str() {
        "" => DEFAULT_FS,
        name => Fs::of_name(name).ok_or_else(|| {
            let shown: String = name.chars().take(SHOWN_LEN).collect();
            let known = Fs::ALL.map(Fs::name).join(", ");
            let why = format!("no file system {shown:?} is made here; use {known}");
            Status::invalid_argument(why)
        })?,
    };
    Ok(Access::Mount { fs, options: mount.mount_flags.clone() })
}

fn invalid(why: &str) -> Status {
    Status::invalid_argument(format!("volume_capability {why}"))
}

#[cfg(test)]
mod tests {
    use sheave_csi_proto::v1::volume_capability::AccessMode;

    use super::*;

    fn capability(mode: Mode, mount: MountVolume) -> VolumeCapability {
        let access_mode = Some(AccessMode { mode: mode.into() });
        VolumeCapability { access_type: Some(AccessType::Mount(mount)), access_mode }
    }

    #[test]
    fn rule_10_a_capability_lacks_nothing_and_has_nothing_unknown() {
        let good = capability(Mode::SingleNodeWriter, MountVolume::default());
        let parsed = Capability::parse(Some(&good)).expect("good");
        assert_eq!(parsed.access, Access::Mount { fs: DEFAULT_FS, options: Vec::new() });
        let fs_type = "ntfs".repeat(100);
        let bad = [
            (VolumeCapability { access_mode: None, ..good.clone() }, "access mode"),
            (capability(Mode::Unknown, MountVolume::default()), "access mode"),
            (VolumeCapability { access_type: None, ..good.clone() }, "neither"),
            (
                capability(Mode::SingleNodeWriter, MountVolume { fs_type, ..Default::default() }),
                "use ext4, xfs, btrfs",
            ),
        ];
        for (bad, why) in bad {
            let status = Capability::parse(Some(&bad)).expect_err(why);
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().contains(why) && status.message().len() < 200, "{status}");
        }
        assert!(Capability::parse(None).is_err() && Capability::parse_all(&[]).is_err());
        assert_eq!(Capability::parse_all(&[good]).expect("good"), [parsed]);
    }

    #[test]
    fn rule_14_mount_flags_are_in_no_message() {
        let mount_flags = vec!["password=hunter2".repeat(400)];
        let flags = MountVolume { mount_flags, ..MountVolume::default() };
        let long = capability(Mode::SingleNodeWriter, flags);
        let status = Capability::parse(Some(&long)).expect_err("too long");
        assert!(status.message().contains("6400 bytes"), "{status}");
        assert!(!status.message().contains("hunter2"), "{status}");
    }
}
