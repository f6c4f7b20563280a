//! Mounts of this process's namespace, as the kernel lists them (proc_pid_mountinfo(5)).

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};
use serde::{Deserialize, Serialize};

use crate::state::StagedDevice;
use crate::{Error, Kind, Result};

/// The namespace may be that of the thread.
const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// A device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Number {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    id: u64,
    parent: u64,
    /// Of the filesystem; an anonymous one for btrfs.
    number: Number,
    /// The directory of the filesystem that is mounted.
    pub(crate) root: OsString,
    pub(crate) target: PathBuf,
    options: OsString,
    pub(crate) fs: OsString,
    source: OsString,
    super_options: OsString,
    /// The peer groups of which it passes mounts on, or from which it receives them.
    groups: Vec<u64>,
}

/// A place for mounts that namespaces share: what is mounted in one of them appears in the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SharedPlace {
    groups: Vec<u64>,
    /// In the filesystem of the mount above it.
    path: PathBuf,
}

/// All mounts, parsed.
#[derive(Clone, Debug)]
pub(crate) struct Mounts(Vec<Mount>);

impl Number {
    pub(crate) fn of(raw: u64) -> Self {
        Self { major: major(raw), minor: minor(raw) }
    }
}

impl Mount {
    /// Whether the filesystem refuses writes.
    pub(crate) fn is_fs_read_only(&self) -> bool {
        has(&self.super_options, "ro")
    }

    /// Whether the mount has an option such as `noexec`.
    pub(crate) fn has_option(&self, option: &str) -> bool {
        has(&self.options, option)
    }

    /// Whether its filesystem is on a device that may be gone by now.
    pub(crate) fn was_of(&self, device: &StagedDevice) -> bool {
        self.is_of(device.number) || self.fs == "btrfs" && self.source == device.path.as_os_str()
    }

    /// Whether it is this one file, such as that of a device: by its filesystem and its name, since
    /// something else may be mounted over it.
    pub(crate) fn is_file(&self, file: &Path) -> bool {
        let Ok(file) = file.canonicalize() else { return false };
        let is_named = Path::new(&self.root).file_name() == file.file_name();
        is_named && fs::metadata(&file).is_ok_and(|file| Number::of(file.dev()) == self.number)
    }

    /// Whether its filesystem is on the device with this number.
    pub(crate) fn is_of(&self, device: Number) -> bool {
        if self.fs != "btrfs" {
            return self.number == device;
        }
        // The number of btrfs is that of a subvolume. Its source is a path of the device.
        let source = fs::metadata(Path::new(&self.source));
        source.is_ok_and(|source| Number::of(source.rdev()) == device)
    }
}

impl SharedPlace {
    /// Whether what is mounted at one of them is mounted at the other by that.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.path == other.path && self.groups.iter().any(|group| other.groups.contains(group))
    }
}

impl Mounts {
    /// Reads them.
    ///
    /// # Errors
    /// When /proc is not there, or says what no kernel says.
    pub(crate) fn read() -> Result<Self> {
        let bytes = fs::read(MOUNTINFO).map_err(|error| Error::of_io(MOUNTINFO, &error))?;
        Self::of_bytes(&bytes)
    }

    /// Those in such a file.
    ///
    /// # Errors
    /// When it says what no kernel says.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse(bytes).ok_or_else(|| {
            Error::new(Kind::Internal, format!("{MOUNTINFO}: a line has an unknown form"))
        })
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        lines.map(parse_line).collect::<Option<_>>().map(Self)
    }

    /// Mounts at this path, the topmost first.
    pub(crate) fn at<'a>(&'a self, target: &Path) -> Vec<&'a Mount> {
        let mut left: Vec<_> = self.0.iter().filter(|mount| mount.target == target).collect();
        let mut stack = Vec::new();
        // The topmost is the one that carries no other at the same path.
        while let Some(top) =
            left.iter().position(|mount| left.iter().all(|other| other.parent != mount.id))
        {
            stack.push(left.remove(top));
        }
        stack
    }

    /// The mount that programs see at this path, if it is a mount point.
    pub(crate) fn top(&self, target: &Path) -> Option<&Mount> {
        self.at(target).first().copied()
    }

    /// Mounts of a single file of this name.
    pub(crate) fn bound_as(&self, name: Option<&OsStr>) -> impl Iterator<Item = &Mount> {
        self.0
            .iter()
            .filter(move |mount| name.is_some() && Path::new(&mount.root).file_name() == name)
    }

    /// Where a filesystem of this type is mounted, if one is.
    pub(crate) fn of_type(&self, fs: &str) -> Option<&Path> {
        self.0.iter().find(|mount| mount.fs == fs).map(|mount| &*mount.target)
    }

    /// All mounts.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Mount> {
        self.0.iter()
    }

    /// Where this mount is, if the mount below it is one that namespaces share.
    pub(crate) fn shared_place(&self, of: &Mount) -> Option<SharedPlace> {
        let below = self.0.iter().find(|mount| mount.id == of.parent && mount.id != of.id)?;
        let path = of.target.strip_prefix(&below.target).ok()?;
        let path = Path::new(&below.root).join(path);
        (!below.groups.is_empty()).then(|| SharedPlace { groups: below.groups.clone(), path })
    }

    /// All mounts of the filesystem on this device.
    pub(crate) fn of(&self, device: Number) -> impl Iterator<Item = &Mount> {
        self.0.iter().filter(move |mount| mount.is_of(device))
    }
}

fn has(options: &OsStr, option: &str) -> bool {
    options.as_bytes().split(|&byte| byte == b',').any(|one| one == option.as_bytes())
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let number = Number { major: major.parse().ok()?, minor: minor.parse().ok()? };
    let root = unescape(fields.next()?);
    let target = PathBuf::from(unescape(fields.next()?));
    let options = unescape(fields.next()?);
    let groups = groups(&mut fields)?;
    let fs = unescape(fields.next()?);
    let source = unescape(fields.next()?);
    let super_options = unescape(fields.next()?);
    Some(Mount { id, parent, number, root, target, options, fs, source, super_options, groups })
}

/// The fields `shared:1`, `master:1` and others, as many as apply, up to the `-`.
fn groups<'a>(fields: &mut impl Iterator<Item = &'a [u8]>) -> Option<Vec<u64>> {
    let mut groups = Vec::new();
    loop {
        let field = fields.next()?;
        if field == b"-" {
            return Some(groups);
        }
        let group = [&b"shared:"[..], b"master:"].iter().find_map(|kind| field.strip_prefix(*kind));
        groups.extend(group.and_then(number));
    }
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Space, tab, newline and backslash are written as `\` and three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let code = match (first, tail) {
            (b'\\', &[a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Number = Number { major: 259, minor: 1 };

    fn parse(text: &str) -> Mounts {
        Mounts::parse(text.as_bytes()).expect("the form of a kernel")
    }

    #[test]
    fn rule_26_the_topmost_of_stacked_mounts_is_found_in_any_order() {
        let low = "40 30 259:1 / /stage rw,relatime shared:1 master:2 - ext4 /dev/x rw\n";
        let high = "41 40 0:5 /x /stage rw,relatime - tmpfs tmpfs rw\n";
        for text in [format!("{low}{high}"), format!("{high}{low}")] {
            let mounts = parse(&text);
            let stack = mounts.at(Path::new("/stage"));
            assert_eq!(stack.iter().map(|mount| mount.id).collect::<Vec<_>>(), [41, 40]);
            assert!(!mounts.top(Path::new("/stage")).expect("a mount").is_of(DISK));
            assert_eq!(mounts.of(DISK).count(), 1);
        }
        assert!(parse(low).top(Path::new("/")).is_none());
    }

    #[test]
    fn rule_26_names_are_unescaped_and_options_are_whole_words() {
        let mounts = parse("1 0 8:0 /a\\134b /m\\040n ro,noexec - xfs /dev/a\\011b rw,errors=x\n");
        let mount = mounts.top(Path::new("/m n")).expect("a mount");
        assert_eq!(mount.root, "/a\\b");
        assert_eq!(mount.source, "/dev/a\tb");
        assert!(mount.has_option("ro") && !mount.is_fs_read_only());
        assert!(mount.has_option("noexec") && !mount.has_option("exec"));
    }

    #[test]
    fn a_mount_that_appears_in_another_namespace_is_known_by_its_place() {
        let place = |text: &str| {
            let mounts = parse(text);
            let disk = mounts.of(DISK).next().expect("a mount");
            mounts.shared_place(disk)
        };
        let plugin = "50 40 8:1 /propagated /mnt/volumes rw shared:7 - ext4 /dev/a rw\n\
                      51 50 259:1 / /mnt/volumes/db rw shared:8 - ext4 /dev/x rw\n";
        let plugin = place(plugin).expect("a place");
        let of_host = |group: &str, path: &str| {
            format!(
                "20 1 8:1 /propagated /docker/propagated rw {group} - ext4 /dev/a rw\n\
                 21 20 259:1 / /docker/propagated/{path} rw shared:8 - ext4 /dev/x rw\n"
            )
        };
        for (group, path, is_same) in [
            ("shared:7", "db", true),
            ("shared:9 master:7", "db", true),
            ("shared:7", "other", false),
            ("shared:9", "db", false),
            ("propagate_from:7 unbindable", "db", false),
        ] {
            let host = place(&of_host(group, path));
            let found = host.is_some_and(|host| host.is(&plugin));
            assert_eq!(found, is_same, "{group} {path}");
        }
    }

    #[test]
    fn lines_of_another_form_are_no_mounts() {
        for text in ["", "1 0 8:0 / /m rw - ext4 /dev/x rw\n"] {
            assert!(Mounts::parse(text.as_bytes()).is_some(), "{text:?}");
        }
        for text in
            ["x", "1 0 8 / /m rw - e s rw", "1 0 8:0 / /m rw ext4 s rw", "1 0 8:0 / /m rw -"]
        {
            assert!(Mounts::parse(text.as_bytes()).is_none(), "{text:?}");
        }
    }

    #[test]
    fn the_mounts_of_this_process_are_read() {
        let mounts = Mounts::read().expect("the mounts of this process");
        assert!(mounts.top(Path::new("/")).is_some());
    }
}
