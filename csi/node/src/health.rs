//! What is wrong with volumes.

use std::collections::HashMap;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::disk::{Disk, sys_path};
use crate::force::waiting;
use crate::mountinfo::{Mounts, Number};
use crate::state::Phase;
use crate::{Engine, Result};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// It works, with restrictions.
    Degraded,
    /// It cannot be used now.
    Inaccessible,
    /// Data was lost.
    DataLoss,
}

/// Something that is wrong with a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// A word in camel case, for programs.
    pub reason: &'static str,
    /// One line for a person.
    pub message: String,
}

/// Problems that were seen when volumes were to be staged. They are seen again at the next try, so
/// they need not outlive this process.
#[derive(Default)]
pub(crate) struct Problems(Mutex<HashMap<String, Problem>>);

impl Problem {
    pub(crate) fn data_loss(message: &str) -> Self {
        let message = message.to_owned();
        Self { severity: Severity::DataLoss, reason: "FilesystemDamaged", message }
    }

    pub(crate) fn unflushed(message: &str) -> Self {
        let message = message.to_owned();
        Self { severity: Severity::DataLoss, reason: "UnflushedDataLost", message }
    }

    /// Of a volume that could not be staged in time.
    pub(crate) fn hangs(message: &str) -> Self {
        Self::inaccessible("StorageHangs", message)
    }

    fn inaccessible(reason: &'static str, message: impl Into<String>) -> Self {
        Self { severity: Severity::Inaccessible, reason, message: message.into() }
    }

    fn degraded(reason: &'static str, message: impl Into<String>) -> Self {
        Self { severity: Severity::Degraded, reason, message: message.into() }
    }
}

impl Problems {
    pub(crate) fn set(&self, volume: &str, problem: Problem) {
        self.lock().insert(volume.to_owned(), problem);
    }

    pub(crate) fn clear(&self, volume: &str) {
        self.lock().remove(volume);
    }

    fn get(&self, volume: &str) -> Option<Problem> {
        self.lock().get(volume).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Problem>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// All that is wrong with a volume, as far as this node knows.
    pub(crate) fn health(&self, volume: &str) -> Result<Vec<Problem>> {
        let mut problems = Vec::from_iter(self.problems.get(volume));
        let device = self.volumes.device(volume)?;
        if let Some(why) = device.as_ref().and_then(|device| device.waiting.as_ref()) {
            problems.push(Problem::inaccessible("DeviceWaits", format!("its I/O waits: {why}")));
        }
        let Some(state) = self.states.load(volume)? else { return Ok(problems) };
        if state.phase != Phase::Staged || state.is_stale() {
            return Ok(problems);
        }
        let Some(device) = device else {
            let why = "its device was ended while it is staged; delete the pods that use it";
            problems.push(Problem::inaccessible("DeviceGone", why));
            return Ok(problems);
        };
        let disk = Disk::at(&device.path)?;
        if let Some(count) = waiting(disk.number) {
            let why = format!("{count} requests wait, and its storage answers none");
            problems.push(Problem::inaccessible("StorageHangs", why));
        }
        if state.fs.is_some() {
            problems.extend(self.of_filesystem(&state, &disk)?);
        }
        Ok(problems)
    }

    fn of_filesystem(&self, state: &crate::state::State, disk: &Disk) -> Result<Vec<Problem>> {
        let mut problems = Vec::new();
        let mounts = Mounts::read()?;
        match mounts.top(&state.staging).filter(|top| top.is_of(disk.number)) {
            None => problems.push(Problem::inaccessible(
                "NotMounted",
                "its filesystem is not mounted any more; delete the pods that use it",
            )),
            Some(top) if top.is_fs_read_only() && !state.read_only => {
                problems.push(Problem::degraded(
                    "FilesystemReadOnly",
                    "its filesystem refuses writes, after an error (dmesg) or by its options",
                ));
            }
            Some(_) => {}
        }
        if let Some(count) = ext4_errors(disk.number).filter(|count| *count > 0) {
            problems.push(Problem::degraded(
                "FilesystemErrors",
                format!("ext4 has seen {count} errors (dmesg); it is checked when it is staged"),
            ));
        }
        Ok(problems)
    }
}

/// Errors that a mounted ext4 has counted since its last check.
fn ext4_errors(device: Number) -> Option<u64> {
    let name = fs::canonicalize(sys_path(device)).ok()?.file_name()?.to_owned();
    let path = std::path::Path::new("/sys/fs/ext4").join(name).join("errors_count");
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
