//! Which volume is at a path, for callers that keep no ids, and where a volume is mounted.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use sheave_core::printable;

use crate::error::refused;
use crate::mountinfo::{Mount, Mounts};
use crate::mounts::resolve;
use crate::state::{Phase, State};
use crate::{Error, Node, Result};

/// A volume that has a state on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its id.
    pub volume: String,
    /// What uses it, such as `csi`; empty if that is not known.
    pub user: String,
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
            user: state.user,
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

    /// Volumes that calls of a user were staging or unstaging, and that no pod has. What still goes
    /// on has their locks; what has ended by then, [`Node::unstage_unfinished`] leaves.
    ///
    /// # Errors
    /// When the directory of states cannot be read.
    pub fn unfinished(&self, user: &str) -> Result<Vec<Known>> {
        let unfinished = |state: &State| state.is_unfinished_of(user);
        let states = self.engine.states.all()?.0;
        Ok(states.into_iter().filter(unfinished).map(Known::from).collect())
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

    /// Whether a volume is mounted at another path than where it is staged, in the namespace of any
    /// process of this one's /proc. A container has a namespace of its own. The mount where it is
    /// staged may have another path in another namespace, such as that of Docker's managed plugin
    /// on the machine; that is no other mount.
    ///
    /// # Errors
    /// When /proc or a state cannot be read.
    pub fn is_mounted_elsewhere(&self, volume: &str) -> Result<bool> {
        let state = self.engine.states.load(volume)?;
        let Some((device, staging)) = state.and_then(|of| Some((of.device?, of.staging))) else {
            return Ok(false);
        };
        let mounts = Mounts::read()?;
        let own = mounts.top(&staging).and_then(|mount| mounts.shared_place(mount));
        let fail = |error| Error::of_io("/proc", &error);
        let mut seen = HashSet::new();
        for entry in fs::read_dir("/proc").map_err(fail)? {
            let process = entry.map_err(fail)?.path();
            let link = |name| of_live(fs::read_link(process.join(name)));
            let namespace = match link("ns/mnt") {
                // It may be protected, and is no container.
                Err(_) if process.ends_with("1") => continue,
                namespace => namespace?,
            };
            // A process sees what is mounted below its root.
            let (Some(namespace), Some(root)) = (namespace, link("root")?) else { continue };
            if seen.contains(&(namespace.clone(), root.clone())) {
                continue;
            }
            let Some(mounts) = of_live(fs::read(process.join("mountinfo")))? else { continue };
            seen.insert((namespace, root));
            let mounts = Mounts::of_bytes(&mounts)?;
            let is_own = |mount: &Mount| {
                let place = own.as_ref().and_then(|_| mounts.shared_place(mount));
                mount.target == staging
                    || own.as_ref().zip(place).is_some_and(|(own, place)| place.is(own))
            };
            if mounts.iter().any(|mount| mount.was_of(&device) && !is_own(mount)) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// What was read of a process; `None` if it has ended.
fn of_live<T>(read: io::Result<T>) -> Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error) => match Errno::from_io_error(&error) {
            // The last is that of one without a namespace. What is no process has no such files.
            Some(Errno::NOENT | Errno::SRCH | Errno::INVAL | Errno::NOTDIR) => Ok(None),
            _ => Err(Error::of_io("/proc", &error)),
        },
    }
}
