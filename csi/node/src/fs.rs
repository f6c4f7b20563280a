//! The filesystems that the engine makes, checks, mounts and grows, and how.

use std::path::Path;

use sheave_core::printable;

use crate::disk::Disk;
use crate::error::refused;
use crate::lock::VolumeLock;
use crate::tools::{Ended, Tools};
use crate::{Error, Kind, Result};

/// A type of filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fs {
    /// ext4, the default.
    Ext4,
    /// XFS, of 300 MiB or more.
    Xfs,
    /// btrfs, of 114 MiB or more.
    Btrfs,
}

/// mkfs.xfs makes no smaller one (xfsprogs 5.19).
const XFS_SIZE_MIN: u64 = 300 << 20;
/// The least that mkfs.btrfs 6.2 takes.
const BTRFS_SIZE_MIN: u64 = 114 << 20;
/// Features of ext4 that e2fsprogs 1.43 and Linux 4.14 know, so that every node can check and
/// mount it. Newer programs have more by default.
const EXT4_FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,\
                             64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,\
                             extra_isize,metadata_csum";
/// Bytes of a device from which on its log would be longer than 512 MiB. The log is zeroed as a
/// whole, which takes its room in a sparse volume: up to 2 GiB.
const XFS_LOG_CAPPED_FROM: u64 = 1 << 40;
/// What xfsprogs itself keeps for the oldest kernel that is supported, 6.1.
const XFS_OLDEST: &str = "/usr/share/xfsprogs/mkfs/lts_6.1.conf";

impl Fs {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];

    /// Its name, as mount(8) has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// The one with this name.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fs| fs.name() == name)
    }

    /// Options with which nothing is written to a device that refuses writes.
    pub(crate) fn read_only_options(self) -> &'static str {
        match self {
            Self::Ext4 => "noload",
            Self::Xfs => "norecovery",
            Self::Btrfs => "rescue=nologreplay",
        }
    }

    /// The least size in bytes.
    fn size_min(self) -> u64 {
        match self {
            Self::Ext4 => 0,
            Self::Xfs => XFS_SIZE_MIN,
            Self::Btrfs => BTRFS_SIZE_MIN,
        }
    }

    /// Refuses a device on which it cannot be made.
    pub(crate) fn check_size(self, size: u64) -> Result<()> {
        if size >= self.size_min() {
            return Ok(());
        }
        let why = format!(
            "{size} bytes are too few for {}, which takes {} or more; use a larger volume or ext4",
            self.name(),
            self.size_min()
        );
        Err(refused(why))
    }

    /// Refuses when what makes it is not installed.
    pub(crate) fn check_tools(self, tools: &Tools) -> Result<()> {
        tools.find(self.maker()).map(drop)
    }

    fn maker(self) -> &'static str {
        match self {
            Self::Ext4 => "mkfs.ext4",
            Self::Xfs => "mkfs.xfs",
            Self::Btrfs => "mkfs.btrfs",
        }
    }

    /// Makes it, without discarding and without writing what can be written later: the device is
    /// new. May take long, and outlives this process.
    pub(crate) fn make(self, tools: &Tools, disk: &Disk, lock: &VolumeLock) -> Result<()> {
        let device = &disk.path;
        let lazy = "nodiscard,lazy_itable_init=1,lazy_journal_init=1";
        let mut args = match self {
            // Once, so that a device that is in use is refused.
            Self::Ext4 => vec!["-q", "-F", "-m0", "-E", lazy, "-O", EXT4_FEATURES],
            Self::Xfs | Self::Btrfs => vec!["-q", "-f", "-K"],
        };
        if self == Self::Xfs && disk.size > XFS_LOG_CAPPED_FROM {
            args.extend(["-l", "size=512m"]);
        }
        let oldest = format!("options={XFS_OLDEST}");
        if self == Self::Xfs && Path::new(XFS_OLDEST).exists() {
            // Some releases do not take their own file. Then their defaults are as old.
            let with_oldest = ["-N", "-q", "-f", "-c", &oldest];
            if tools.run(self.maker(), &with_oldest, device, lock)?.code == Some(0) {
                args.extend(["-c", &oldest]);
            }
        }
        let ended = tools.run(self.maker(), &args, device, lock)?;
        match ended.code {
            Some(0) => Ok(()),
            // Nothing that was there before is lost, and the next try makes it again.
            _ => Err(Error::new(Kind::Unavailable, ended.to_string())),
        }
    }

    /// Whether a filesystem that was never mounted is whole. Writes nothing.
    pub(crate) fn is_whole(self, tools: &Tools, device: &Path, lock: &VolumeLock) -> Result<bool> {
        let (tool, args): (_, &[&str]) = match self {
            Self::Ext4 => ("e2fsck", &["-f", "-n"]),
            Self::Xfs => ("xfs_repair", &["-n"]),
            Self::Btrfs => ("btrfs", &["check", "--readonly"]),
        };
        let ended = tools.run(tool, args, device, lock)?;
        if ended.output.contains("valuable metadata changes") {
            let why = format!(
                "{}: its first formatting was interrupted, and it was mounted since, not by this \
                 program; check it by hand and mount it once read-write",
                printable(device)
            );
            return Err(refused(why));
        }
        Ok(ended.code == Some(0))
    }

    /// Repairs what can be repaired without a decision. Only ext4 needs it; the others replay their
    /// logs when they are mounted. May take long, and outlives this process.
    ///
    /// # Errors
    /// [`Kind::Refused`] when errors are left, so that it must not be mounted.
    pub(crate) fn check(self, tools: &Tools, device: &Path, lock: &VolumeLock) -> Result<()> {
        if self != Self::Ext4 {
            return Ok(());
        }
        let ended = tools.run("e2fsck", &["-p"], device, lock)?;
        // e2fsck(8): 1 and 2 mean that errors were corrected.
        match ended.code {
            Some(0..=2) => Ok(()),
            Some(code) if code & 4 != 0 => {
                let advice = "it is not mounted; repair it by hand, or restore the volume";
                Err(refused(ended.to_string()).and(advice))
            }
            _ => Err(Error::new(Kind::Unavailable, ended.to_string()).and("it is not mounted")),
        }
    }

    /// Makes it as long as its device, while it is mounted.
    pub(crate) fn grow(
        self,
        tools: &Tools,
        device: &Path,
        mounted: &Path,
        lock: &VolumeLock,
    ) -> Result<()> {
        let ended: Ended = match self {
            Self::Ext4 => tools.run("resize2fs", &[], device, lock)?,
            Self::Xfs => tools.run("xfs_growfs", &["-d"], mounted, lock)?,
            Self::Btrfs => tools.run("btrfs", &["filesystem", "resize", "max"], mounted, lock)?,
        };
        match ended.code {
            Some(0) => Ok(()),
            _ => Err(Error::new(Kind::Unavailable, ended.to_string())),
        }
    }
}
