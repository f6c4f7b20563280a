//! How full volumes are.

use std::path::Path;

use rustix::fs::statvfs;
use sheave_core::printable;

use crate::disk::Disk;
use crate::mountinfo::Mounts;
use crate::mounts::resolve;
use crate::publish::is_device;
use crate::{Engine, Error, Kind, Result};

/// How full a volume is, in bytes and, if it is a filesystem, inodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Bytes in all.
    pub total_bytes: u64,
    /// Of a filesystem only.
    pub filesystem: Option<FilesystemStats>,
}

/// How full a filesystem is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesystemStats {
    /// Bytes that a user without privileges can still write.
    pub available_bytes: u64,
    /// Bytes that are taken.
    pub used_bytes: u64,
    /// Inodes in all; 0 where they are made as needed.
    pub total_inodes: u64,
    /// Free ones.
    pub free_inodes: u64,
}

impl Engine {
    pub(crate) fn stats(&self, volume: &str, path: &Path) -> Result<Stats> {
        let not_there = || {
            let why = format!("volume {volume} is not at {}", printable(path));
            Error::new(Kind::NotFound, why)
        };
        let path = resolve(path)?.ok_or_else(not_there)?;
        let state = match self.states.load(volume)? {
            None => self.seen_at(volume, &path)?,
            state => state.filter(|state| !state.is_stale()),
        };
        let state = state.ok_or_else(not_there)?;
        let device = self.volumes.device(volume)?.ok_or_else(not_there)?;
        let disk = Disk::at(&device.path)?;
        if state.fs.is_none() {
            let is_there = path == state.staging || is_device(&path, disk.number);
            let stats = || Stats { total_bytes: disk.size, filesystem: None };
            return is_there.then(stats).ok_or_else(not_there);
        }
        if !Mounts::read()?.top(&path).is_some_and(|top| top.is_of(disk.number)) {
            return Err(not_there());
        }
        let stat = statvfs(&path).map_err(|errno| Error::of_errno(printable(&path), errno))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        let filesystem = FilesystemStats {
            available_bytes: bytes(stat.f_bavail),
            used_bytes: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
            total_inodes: stat.f_files,
            free_inodes: stat.f_ffree,
        };
        Ok(Stats { total_bytes: bytes(stat.f_blocks), filesystem: Some(filesystem) })
    }
}
