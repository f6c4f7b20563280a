//! One lock a volume, which also a program has that works on the volume and outlives this process.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sheave_core::printable;

use crate::{Error, Kind, Result};

/// Held until it is dropped, and until all programs have ended that share it.
#[derive(Debug)]
pub(crate) struct VolumeLock {
    file: File,
    path: PathBuf,
}

impl VolumeLock {
    /// Takes the lock whose file is at `path`.
    ///
    /// # Errors
    /// [`Kind::Pending`] at once, when another process has it.
    pub(crate) fn take(path: PathBuf, volume: &str) -> Result<Self> {
        let fail = |error| Error::of_io(format!("lock {}", printable(&path)), &error);
        loop {
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
            let file = file.map_err(fail)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::INTR) => continue,
                Err(Errno::WOULDBLOCK) => {
                    let why = format!(
                        "volume {volume}: another process works on it, such as a mkfs or fsck \
                         that was started before; try again when it has ended"
                    );
                    return Err(Error::new(Kind::Pending, why));
                }
                Err(errno) => return Err(fail(errno.into())),
            }
            // Its last holder may have removed it in between.
            if is_same(&file, &path) {
                return Ok(Self { file, path });
            }
        }
    }

    /// The lock once more, for a program.
    pub(crate) fn share(&self) -> Result<OwnedFd> {
        let file = self.file.try_clone();
        Ok(file.map_err(|error| Error::of_io("share a lock", &error))?.into())
    }
}

impl Drop for VolumeLock {
    fn drop(&mut self) {
        // While it is held, so that another process that has opened it sees that it is gone.
        let _ = fs::remove_file(&self.path);
    }
}

fn is_same(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(opened), Ok(named)) => (opened.dev(), opened.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_11_a_locked_volume_is_pending_at_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let take = || VolumeLock::take(path.clone(), "fast/1").map_err(|error| error.kind());
        let lock = take().expect("a free lock");
        assert_eq!(take().err(), Some(Kind::Pending));
        drop(lock);
        take().expect("a free lock");
    }

    #[test]
    fn a_lock_leaves_no_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        drop(VolumeLock::take(path.clone(), "fast/1").expect("a free lock"));
        assert!(!path.exists());
        drop(VolumeLock::take(path, "fast/1").expect("a free lock"));
    }
}
