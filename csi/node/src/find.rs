//! Which volume is at a path, for callers that keep no ids.

use std::path::{Path, PathBuf};

use sheave_core::printable;

use crate::error::refused;
use crate::mountinfo::Mounts;
use crate::mounts::resolve;
use crate::state::{Phase, State};
use crate::{Node, Result};

/// A volume that has a state on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its id.
    pub volume: String,
    /// Whether it is staged, in the present run of the node.
    pub is_staged: bool,
    /// Where it is staged, or was to be.
    pub staging: PathBuf,
    /// Where it is published.
    pub targets: Vec<PathBuf>,
    /// Of its publication to this node.
    pub epoch: Option<u64>,
    /// Whether its device refuses writes.
    pub read_only: bool,
}

impl From<State> for Known {
    fn from(state: State) -> Self {
        Self {
            is_staged: state.phase == Phase::Staged && !state.is_stale(),
            volume: state.volume,
            staging: state.staging,
            targets: state.targets.into_iter().map(|target| target.path).collect(),
            epoch: state.epoch,
            read_only: state.read_only,
        }
    }
}

impl Node {
    /// What is known of a volume.
    ///
    /// # Errors
    /// When its state cannot be read.
    pub fn known(&self, volume: &str) -> Result<Option<Known>> {
        Ok(self.engine.states.load(volume)?.map(Known::from))
    }

    /// The volume that is staged or published at this path.
    ///
    /// # Errors
    /// [`crate::Kind::Refused`] when something else is mounted there, and when a state cannot be
    /// read, which may be that of the volume.
    pub fn known_at(&self, path: &Path) -> Result<Option<Known>> {
        crate::check_paths(&[path])?;
        let Some(path) = resolve(path)? else { return Ok(None) };
        let (states, unread) = self.engine.states.all()?;
        let mut all = states.into_iter().map(Known::from);
        let is_there = |known: &Known| known.staging == path || known.targets.contains(&path);
        if let Some(known) = all.find(is_there) {
            return Ok(Some(known));
        }
        if let Some(unread) = unread {
            return Err(unread);
        }
        if Mounts::read()?.top(&path).is_some() {
            let why = "what is mounted there is no volume that is known here; it is left as it is";
            return Err(refused(format!("{}: {why}", printable(&path))));
        }
        Ok(None)
    }
}
