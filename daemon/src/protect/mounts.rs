//! A mount namespace of our own. A process that ends as the last one in a shared namespace unmounts
//! everything in it, and would wait for the devices that it no longer serves.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{major, minor};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::thread::UnshareFlags;
use sheave_core::printable;

const MOUNT_INFO: &str = "/proc/self/mountinfo";
/// Unmounting may uncover another mount. There are never this many of ours.
const UNMOUNTS_MAX: usize = 10_000;
/// The most devices on devices, such as a volume group on an encrypted disk.
const STACKED_MAX: usize = 16;
/// A partition's directory lies in its disk's.
const DISK_OR_PARTITION: usize = 2;

/// Leaves the mount namespace for one that follows it, in which no device of ours is mounted.
///
/// # Errors
/// When mounts here would not propagate (they are private), and errors of the kernel.
pub(super) fn separate() -> Result<()> {
    let mounts = mounts()?;
    // Later mounts would not appear here, and other processes could not unmount the present ones.
    let root = mounts.iter().rev().find(|mount| mount.point == Path::new("/"));
    ensure!(
        root.is_some_and(|root| root.propagates),
        "mounts are private here, so this process stays among them; try: mount --make-rshared /"
    );
    #[expect(deprecated, reason = "dangerous with descriptors, which this call does not touch")]
    rustix::thread::unshare(UnshareFlags::NEWNS)
        .context("a mount namespace wants CAP_SYS_ADMIN")?;
    let follow = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", follow).context("cannot make mounts follow those of others")?;
    leave_devices()
}

/// Unmounts our devices in this namespace only.
fn leave_devices() -> Result<()> {
    let mut kept: Vec<PathBuf> = Vec::new();
    for _ in 0..UNMOUNTS_MAX {
        let mounts = mounts()?;
        let mut ours = mounts.iter().rev().filter(|mount| mount.is_ours());
        let Some(mount) = ours.find(|mount| !kept.contains(&mount.point)) else { break };
        let (point, source) = (printable(&mount.point), &mount.source);
        if mount.point == Path::new("/") {
            tracing::warn!("/ is on {source}, which this process can therefore not survive");
            kept.push(mount.point.clone());
        } else if let Err(error) = unmount(&mount.point, UnmountFlags::DETACH) {
            tracing::warn!("may wait for its own {source} at the end, mounted at {point}: {error}");
            kept.push(mount.point.clone());
        } else {
            tracing::debug!("left {point}, where {source} is mounted, to others");
        }
    }
    Ok(())
}

/// A line of proc_pid_mountinfo(5).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    point: PathBuf,
    /// Whether mounts and unmounts below it propagate.
    propagates: bool,
    source: String,
}

fn mounts() -> Result<Vec<Mount>> {
    let bytes = fs::read(MOUNT_INFO).context(MOUNT_INFO)?;
    Ok(bytes.split(|&byte| byte == b'\n').filter_map(Mount::parse).collect())
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|&byte| byte == b' ');
        let point = unescape(fields.nth(4)?);
        let options = fields.by_ref().skip(1).take_while(|&field| field != b"-");
        let peers = |field: &&[u8]| field.starts_with(b"shared:") || field.starts_with(b"master:");
        // Optional fields, of unknown number.
        let propagates = options.filter(peers).count() > 0;
        let source = String::from_utf8_lossy(&unescape(fields.nth(1)?)).into_owned();
        Some(Self { point: OsString::from_vec(point).into(), propagates, source })
    }

    /// Whether it is on a device that a daemon serves, be it through a partition, LVM or LUKS.
    fn is_ours(&self) -> bool {
        // By source, since btrfs gives its mounts numbers that no device has.
        self.source.starts_with("/dev/")
            && fs::metadata(&self.source).is_ok_and(|node| is_ours(node.rdev()))
    }
}

fn is_ours(device: u64) -> bool {
    let mut below = vec![format!("/sys/dev/block/{}:{}", major(device), minor(device)).into()];
    for _ in 0..STACKED_MAX {
        // A link, such as to /sys/devices/virtual/block/nbd0/nbd0p1.
        let paths: Vec<_> = below.iter().filter_map(|path| fs::canonicalize(path).ok()).collect();
        if paths.iter().any(|path| is_served(path)) {
            return true;
        }
        let disks = paths.iter().flat_map(|path| path.ancestors().take(DISK_OR_PARTITION));
        let lists = disks.filter_map(|disk| fs::read_dir(disk.join("slaves")).ok());
        below = lists.flatten().flatten().map(|entry| entry.path()).collect();
    }
    false
}

/// Whether a device's directory, or that of its whole disk, belongs to ublk, or to an nbd device
/// with an identifier, as ours have.
fn is_served(path: &Path) -> bool {
    path.ancestors().take(DISK_OR_PARTITION).any(|disk| {
        let name = disk.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("ublkb") || name.starts_with("nbd") && disk.join("backend").exists()
    })
}

/// Decodes escapes such as `\040`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let code = tail.get(..3).filter(|_| *first == b'\\');
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Mount {
        Mount::parse(line.as_bytes()).unwrap()
    }

    #[test]
    fn lines_of_mountinfo_are_read() {
        let shared = parse(
            "36 35 98:0 /mnt1 /a\\040b\\134c rw,noatime shared:7 master:1 - ext4 /dev/nbd0 rw",
        );
        assert_eq!(shared.point, Path::new("/a b\\c"));
        assert_eq!((shared.propagates, shared.source.as_str()), (true, "/dev/nbd0"));
        let slave = parse("1 0 0:1 / / rw master:1 propagate_from:2 - tmpfs tmpfs rw");
        assert_eq!((slave.propagates, slave.source.as_str()), (true, "tmpfs"));
        let private = parse("1 0 0:1 / / rw - overlay none rw,lowerdir=/shared:1");
        assert_eq!((private.propagates, private.source.as_str()), (false, "none"));
        for short in ["", "1 0 0:1 /", "1 0 0:1 / / rw", "1 0 0:1 / / rw - ext4"] {
            assert_eq!(Mount::parse(short.as_bytes()), None, "{short:?}");
        }
    }

    #[test]
    fn what_is_no_escape_stays() {
        for (field, want) in [("\\", "\\"), ("\\04", "\\04"), ("\\999x", "\\999x"), ("é", "é")] {
            assert_eq!(unescape(field.as_bytes()), want.as_bytes());
        }
    }

    #[test]
    fn mounts_of_this_machine_are_read_and_none_is_a_device_of_ours() {
        let mounts = mounts().unwrap();
        assert!(mounts.iter().any(|mount| mount.point == Path::new("/")), "{mounts:?}");
        let elsewhere = |mount: &&Mount| !mount.source.contains("nbd");
        assert!(!mounts.iter().filter(elsewhere).any(Mount::is_ours), "{mounts:?}");
    }
}
