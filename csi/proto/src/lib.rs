//! The Container Storage Interface: messages, clients and server traits.
//!
//! Messages with secrets and mount flags have no `Debug`, or one that leaves them out, so that they
//! do not get into a log.
#![forbid(unsafe_code)]

use std::fmt;

/// Version 1 of the interface (csi.v1).
#[allow(missing_docs, unused_qualifications, clippy::too_many_lines, clippy::use_self)]
pub mod v1 {
    tonic::include_proto!("csi.v1");
}

/// How a plugin registers with kubelet (pluginregistration, v1).
#[allow(missing_docs, unused_qualifications, clippy::too_many_lines, clippy::use_self)]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}

/// The compiled definition, a `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/csi.bin"));

impl fmt::Debug for v1::volume_capability::MountVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MountVolume").field("fs_type", &self.fs_type).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::v1::volume_capability::MountVolume;

    #[test]
    fn rule_14_mount_flags_are_not_printed() {
        let mount_flags = vec!["password=hunter2".to_owned()];
        let mount = MountVolume { fs_type: "ext4".into(), mount_flags, ..MountVolume::default() };
        let shown = format!("{mount:?}");
        assert!(shown.contains("ext4") && !shown.contains("hunter2"), "{shown}");
    }
}
