//! Growing while it is in use.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use sheave_core::printable;

use crate::disk::Disk;
use crate::fs::Fs;
use crate::mounts::resolve;
use crate::state::Phase;
use crate::{Engine, Error, Kind, Result};

/// How long the kernel may take to show a device's new size.
const SIZE_TIMEOUT: Duration = Duration::from_secs(5);
const SIZE_POLL: Duration = Duration::from_millis(10);

impl Engine {
    pub(crate) fn expand(&self, volume: &str, path: &Path, required: Option<u64>) -> Result<u64> {
        let lock = self.lock(volume)?;
        let not_there = || {
            let why =
                format!("volume {volume} is neither staged nor published at {}", printable(path));
            Error::new(Kind::NotFound, why)
        };
        let path = resolve(path)?.ok_or_else(not_there)?;
        let state = match self.states.load(volume)? {
            None => self.seen_at(volume, &path)?,
            state => state.filter(|state| !state.is_stale() && state.phase == Phase::Staged),
        };
        let state = state.ok_or_else(not_there)?;
        if path != state.staging && state.targets.iter().all(|target| target.path != path) {
            return Err(not_there());
        }
        let device = self.volumes.grow(volume)?;
        let begun = Instant::now();
        let disk = loop {
            match Disk::of(&device) {
                Err(_) if begun.elapsed() < SIZE_TIMEOUT => sleep(SIZE_POLL),
                disk => break disk.map_err(|error| error.of(volume))?,
            }
        };
        if let Some(required) = required.filter(|required| *required > disk.size) {
            let why = format!(
                "volume {volume}: {} bytes, and {required} are wanted; grow the volume first",
                disk.size
            );
            return Err(Error::new(Kind::OutOfRange, why));
        }
        if let Some(name) = state.fs.as_ref().filter(|_| !disk.read_only) {
            let unknown = || Error::new(Kind::Internal, format!("volume {volume}: type {name}"));
            let fs = Fs::of_name(name).ok_or_else(unknown)?;
            self.check_staged(&state, &disk)?;
            fs.grow(&self.tools, &disk.path, &state.staging, &lock)
                .map_err(|error| error.of(volume))?;
        }
        Ok(disk.size)
    }
}
