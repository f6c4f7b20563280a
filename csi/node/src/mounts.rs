//! Mounting, binding, unmounting, and the files and directories that are mount points.
//!
//! Nothing here deletes more than one empty directory or one empty file.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, fstat, openat2, unlinkat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use sheave_core::printable;

use crate::disk::Disk;
use crate::error::refused;
use crate::fs::Fs;
use crate::mountinfo::{Mount, Mounts};
use crate::options::Options;
use crate::{Error, Kind, Result};

/// Mounts at one path that are taken away before it is given up.
const STACK_MAX: usize = 64;

/// Makes a directory, and those above it, which only this process's user may enter.
///
/// # Errors
/// What the file system says.
pub fn make_dir(dir: &Path) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| Error::of_io(format!("make {}", printable(dir)), &error))
}

/// Removes a directory, which must be empty. Done if it is not there.
///
/// # Errors
/// What the file system says.
pub fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::of_io(format!("remove {}", printable(dir)), &error))
        }
        _ => Ok(()),
    }
}

/// A path as the kernel lists it, if its directory exists: without links, but for its last part.
///
/// # Errors
/// When it has no name, or its directory cannot be looked at.
pub(crate) fn resolve(path: &Path) -> Result<Option<PathBuf>> {
    let no_name = || Error::new(Kind::Invalid, format!("{}: it has no name", printable(path)));
    let (dir, name) = (path.parent().ok_or_else(no_name)?, path.file_name().ok_or_else(no_name)?);
    match fs::canonicalize(dir) {
        Ok(dir) => Ok(Some(dir.join(name))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::of_io(printable(path), &error)),
    }
}

/// Mounts a filesystem.
pub(crate) fn mount(disk: &Disk, fs: Fs, options: &Options, target: &Path) -> Result<()> {
    let data = options.data();
    let mounted =
        rustix::mount::mount(&disk.path, target, fs.name(), options.flags(), data.as_c_str());
    let Err(errno) = mounted else { return Ok(()) };
    let what = format!("mount {} at {}", printable(&disk.path), printable(target));
    let error = Error::of_errno(what, errno);
    Err(match errno {
        Errno::INVAL | Errno::UCLEAN | Errno::BADMSG => {
            error.with_kind(Kind::Refused).and(format!(
                "{} or its mount options are wrong; the kernel's log (dmesg) says what",
                fs.name()
            ))
        }
        Errno::NODEV => error
            .with_kind(Kind::Refused)
            .and(format!("this kernel has no {}; load its module", fs.name())),
        Errno::ROFS | Errno::ACCESS => error
            .with_kind(Kind::Refused)
            .and("the device refuses writes, and the filesystem needs them"),
        Errno::PERM => error.with_kind(Kind::Refused).and("mounting needs CAP_SYS_ADMIN"),
        Errno::NOENT | Errno::NOTDIR => error.with_kind(Kind::Refused),
        _ => error,
    })
}

/// Shows a mounted filesystem, or a device, at another place, where it has these flags, too.
pub(crate) fn bind(source: &Path, target: &Path, flags: MountFlags) -> Result<()> {
    let what = || format!("bind {} to {}", printable(source), printable(target));
    mount_bind(source, target).map_err(|errno| Error::of_errno(what(), errno))?;
    // A bind mount takes flags only in a second step.
    add_flags(target, flags).map_err(|error| {
        let left = unmount_all(target).err().map(|error| error.to_string());
        left.into_iter().fold(error, Error::and)
    })
}

/// Adds flags to the mount at a path, unless it has them.
pub(crate) fn add_flags(target: &Path, flags: MountFlags) -> Result<()> {
    let has = flags_at(&Mounts::read()?, target);
    if has.contains(flags) {
        return Ok(());
    }
    let what = || format!("set the flags of the mount {}", printable(target));
    let remounted = mount_remount(target, MountFlags::BIND | has | flags, "");
    remounted.map_err(|errno| Error::of_errno(what(), errno))
}

/// The flags of the topmost mount at a path.
pub(crate) fn flags_at(mounts: &Mounts, path: &Path) -> MountFlags {
    mounts.top(path).map_or(MountFlags::empty(), Options::of_mount)
}

/// Takes away all mounts at a path.
///
/// # Errors
/// [`Kind::Unavailable`] while one is in use.
pub(crate) fn unmount_all(target: &Path) -> Result<()> {
    unmount_while(target, Unmount::Whole, |_| true)
}

/// How a mount is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unmount {
    /// With all that was written, and not while it is in use.
    Whole,
    /// From its place only, for a filesystem whose device is gone.
    Lazily,
}

/// Takes away mounts at a path as long as the topmost one is meant.
///
/// # Errors
/// [`Kind::Unavailable`] while one is in use.
pub(crate) fn unmount_while(
    target: &Path,
    how: Unmount,
    is_meant: impl Fn(&Mount) -> bool,
) -> Result<()> {
    let flags = match how {
        Unmount::Whole => UnmountFlags::NOFOLLOW,
        Unmount::Lazily => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    for _ in 0..STACK_MAX {
        if !Mounts::read()?.top(target).is_some_and(&is_meant) {
            return Ok(());
        }
        match unmount(target, flags) {
            // Another program may have been first.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => {
                let error = Error::of_errno(format!("unmount {}", printable(target)), errno);
                let advice = "end the programs that use it (fuser -vm), then try again";
                return Err(match errno {
                    Errno::BUSY => error.and(advice),
                    _ => error,
                });
            }
        }
    }
    let why = format!("unmount {}: more than {STACK_MAX} mounts", printable(target));
    Err(Error::new(Kind::Unavailable, why))
}

/// Makes a mount point, if it is not there: true if it was made.
///
/// # Errors
/// When something is there that cannot be one, or its directory is missing.
pub(crate) fn make_target(target: &Path, is_dir: bool) -> Result<bool> {
    let fail = |error| Error::of_io(format!("make {}", printable(target)), &error);
    let made = match is_dir {
        true => fs::DirBuilder::new().mode(0o750).create(target),
        false => {
            let options = OpenOptions::new().write(true).create_new(true).mode(0o660).open(target);
            options.map(drop)
        }
    };
    match made {
        Ok(()) => return Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(fail(error).with_kind(Kind::Refused).and("its directory is missing"));
        }
        Err(error) => return Err(fail(error)),
    }
    let there = fs::symlink_metadata(target).map_err(fail)?;
    let is_right = match is_dir {
        true => there.is_dir() && fs::read_dir(target).map_err(fail)?.next().is_none(),
        false => there.is_file() && there.len() == 0,
    };
    if is_right {
        return Ok(false);
    }
    let what = if is_dir { "an empty directory" } else { "an empty file" };
    let why = format!("{}: it is there and is not {what}; nothing is hidden", printable(target));
    Err(refused(why))
}

/// Refuses a directory that is not empty: a mount would hide what is there.
pub(crate) fn check_empty(dir: &Path) -> Result<()> {
    let fail = |error| Error::of_io(printable(dir), &error);
    if fs::read_dir(dir).map_err(fail)?.next().is_none() {
        return Ok(());
    }
    let why =
        format!("{}: it is not empty, and nothing is hidden; look what is there", printable(dir));
    Err(refused(why))
}

/// Removes a mount point at which nothing is mounted: one empty directory or one empty file. Done
/// if there is none.
///
/// # Errors
/// When something is mounted there, or it is not empty: it is left as it is.
pub(crate) fn remove_target(target: &Path) -> Result<()> {
    let what = || format!("remove {}", printable(target));
    let fail = |errno: Errno| Error::of_errno(what(), errno);
    let (Some(dir), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(Error::new(Kind::Invalid, what()));
    };
    if Mounts::read()?.top(target).is_some() {
        return Err(Error::new(Kind::Unavailable, format!("{}: it is a mount point", what())));
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let dir = match rustix::fs::open(dir, flags | OFlags::DIRECTORY, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        dir => dir.map_err(fail)?,
    };
    // The kernel refuses to cross a mount, should one have come since.
    let opened =
        openat2(&dir, name, flags | OFlags::NOFOLLOW, Mode::empty(), ResolveFlags::NO_XDEV);
    let file = match opened {
        Err(Errno::NOENT) => return Ok(()),
        file => file.map_err(fail)?,
    };
    let stat = fstat(&file).map_err(fail)?;
    let kept = |why| Err(refused(format!("{}: {why}; it is left as it is", what())));
    let flags = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => AtFlags::REMOVEDIR,
        FileType::RegularFile if stat.st_size == 0 => AtFlags::empty(),
        FileType::RegularFile => return kept("it holds data"),
        _ => return kept("it is neither a directory nor a file"),
    };
    match unlinkat(&dir, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => kept("it holds files that are not the volume's"),
        Err(errno) => Err(fail(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_25_only_an_empty_directory_or_file_is_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("full/sub")).expect("made");
        fs::write(path("full/sub/data"), "x").expect("written");
        fs::write(path("data"), "x").expect("written");
        std::os::unix::fs::symlink(path("full"), path("link")).expect("linked");
        for name in ["full", "data", "link"] {
            let error = remove_target(&path(name)).unwrap_err();
            assert_eq!(error.kind(), Kind::Refused, "{error}");
        }
        assert_eq!(fs::read_to_string(path("full/sub/data")).expect("kept"), "x");
        fs::create_dir(path("dir")).expect("made");
        fs::write(path("file"), "").expect("written");
        for name in ["dir", "file", "dir", "file", "no/such"] {
            remove_target(&path(name)).expect("removed, or not there");
        }
        assert!(!path("dir").exists() && !path("file").exists());
    }

    #[test]
    fn rule_25_a_mount_point_is_made_only_where_nothing_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        assert!(make_target(&path("dir"), true).expect("made"));
        assert!(!make_target(&path("dir"), true).expect("there"));
        assert!(make_target(&path("dir/file"), false).expect("made"));
        for (name, is_dir) in [("dir", true), ("dir", false), ("dir/file", true), ("a/b", true)] {
            let error = make_target(&path(name), is_dir).unwrap_err();
            assert_eq!(error.kind(), Kind::Refused, "{error}");
        }
    }
}
