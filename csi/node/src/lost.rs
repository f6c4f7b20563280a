//! Volumes whose state on disk was lost, such as by a hand that has cleaned up: the kernel and the
//! daemon still know where they are.

use std::path::{Path, PathBuf};

use sheave_core::printable;

use crate::disk::Disk;
use crate::error::refused;
use crate::mountinfo::{Mount, Mounts};
use crate::publish::is_device;
use crate::state::{Phase, StagedDevice, State, Target};
use crate::{Access, Engine, Result, StageRequest};

impl Engine {
    /// Records a volume without a state as staged, if it is: its filesystem is mounted from its
    /// device at the staging path, or it is a raw device that is there already. Nothing is mounted,
    /// checked or formatted. `None` if it is not staged.
    ///
    /// # Errors
    /// When the device is mounted elsewhere only, and what the daemon says, such as of an epoch.
    pub(crate) fn adopt(&self, request: &StageRequest, wanted: &State) -> Result<Option<State>> {
        let volume = &request.volume;
        let Some(device) = self.volumes.device(volume)? else { return Ok(None) };
        let disk = Disk::at(&device.path).map_err(|error| error.of(volume))?;
        let mounts = Mounts::read()?;
        let mut places = places(&mounts, &disk);
        let top = mounts.top(&wanted.staging);
        let is_staged = match &wanted.fs {
            Some(fs) => top.is_some_and(|top| top.is_of(disk.number) && top.fs == fs.as_str()),
            None => top.is_none() && mounts.of(disk.number).next().is_none(),
        };
        if !is_staged {
            let Some(place) = places.first() else { return Ok(None) };
            let (path, place) = (printable(&disk.path), printable(place));
            let why = format!("its device {path} is mounted at {place}, and its state is lost");
            return Err(refused(format!("volume {volume}: {why}; delete the pods that use it")));
        }
        // The daemon compares the publication.
        let device = self.volumes.attach(volume, &request.attach)?;
        let disk = Disk::of(&device).map_err(|error| error.of(volume))?;
        if request.access == Access::Block {
            self.mark_raw(request)?;
        }
        places.retain(|place| *place != wanted.staging);
        tracing::warn!(
            volume = %printable(volume),
            places = places.len(),
            "its state is lost; it is staged all the same, by what the kernel and the daemon know"
        );
        let targets = places.into_iter().map(|path| Target { path, arguments: None });
        let mut state = wanted.clone();
        state.device = Some(StagedDevice { path: disk.path, number: disk.number });
        state.targets = targets.collect();
        state.phase = Phase::Staged;
        self.states.save(&state)?;
        Ok(Some(state))
    }

    /// What the state of a volume would say that is at this path, mounted or as a raw device;
    /// `None` if it is not there.
    pub(crate) fn seen_at(&self, volume: &str, path: &Path) -> Result<Option<State>> {
        let Some(device) = self.volumes.device(volume)? else { return Ok(None) };
        let disk = Disk::at(&device.path).map_err(|error| error.of(volume))?;
        let mut state = State::staging(volume, path.to_owned());
        match Mounts::read()?.top(path) {
            Some(top) if top.is_of(disk.number) => {
                state.fs = Some(top.fs.to_string_lossy().into_owned());
            }
            _ if is_device(path, disk.number) => {}
            _ => return Ok(None),
        }
        Ok(Some(state))
    }
}

/// Where a device is mounted or, as a raw device, bound.
pub(crate) fn places(mounts: &Mounts, disk: &Disk) -> Vec<PathBuf> {
    // By its name first: a look at the file may wait for a dead server.
    let path = disk.path.canonicalize().unwrap_or_else(|_| disk.path.clone());
    let is_raw = |mount: &&Mount| mount.is_file(&path) || is_device(&mount.target, disk.number);
    let raw = mounts.bound_as(path.file_name()).filter(is_raw);
    mounts.of(disk.number).chain(raw).map(|mount| mount.target.clone()).collect()
}
