//! The newest root of a volume with all of its snapshots, and the changes of both.

use std::sync::Arc;

use sheave_core::ErrorKind;

use crate::format::{CheckpointPlace, Committed, Reach, Root, Snapshot, is_snapshot_name};
use crate::ids::Lsn;

/// A change of snapshots needs so many bytes of a root at most.
const CHANGE_BYTES_MAX: usize = 256;

/// The newest root of a volume, and all of its snapshots.
#[derive(Clone, Debug)]
pub struct Head {
    /// The root.
    pub root: Root,
    /// What the checkpoint has that it names.
    pub covered: Committed,
    /// The epoch of the object of that checkpoint, if there is one.
    pub reach: Option<Reach>,
    /// The snapshots of that checkpoint and of the root, in the order of their numbers.
    pub snapshots: Vec<Snapshot>,
}

/// Why something is not done.
pub(crate) type Refusal = (ErrorKind, String);

/// A change of a root. It may be tried on several ones, of which the last one counts.
pub(crate) type Change = Arc<dyn Fn(&mut Head) -> Result<(), Refusal> + Send + Sync>;

impl Head {
    /// Whether its root has room for so many changes of snapshots.
    pub(crate) fn has_room(&self, changes: usize) -> bool {
        self.root.fits(changes * CHANGE_BYTES_MAX)
    }

    /// The snapshot of a name.
    pub(crate) fn find(&self, name: &str) -> Result<&Snapshot, Refusal> {
        let found = self.snapshots.iter().find(|snapshot| snapshot.name == name);
        found.ok_or_else(|| {
            let names: Vec<_> = self.snapshots.iter().map(|snapshot| &*snapshot.name).collect();
            let why = match names.len() {
                0 => format!("there is no snapshot {name}; it has none"),
                1..=9 => format!("there is no snapshot {name}; it has {}", names.join(", ")),
                count => format!("there is no snapshot {name}; it has {count} others"),
            };
            (ErrorKind::NotFound, why)
        })
    }

    /// Whether a snapshot of that name can be made.
    pub(crate) fn check_name(&self, name: &str) -> Result<(), Refusal> {
        if !is_snapshot_name(name) {
            let why = "the name of a snapshot has 1 to 128 letters, digits, dots, dashes or \
                       underscores, and does not begin with a dot";
            return Err((ErrorKind::Invalid, why.to_owned()));
        }
        match self.find(name) {
            Ok(_) => Err((ErrorKind::Exists, format!("it has a snapshot {name} already"))),
            Err(_) => Ok(()),
        }
    }

    /// Whether the checkpoint has all that is committed up to this write.
    pub(crate) fn has_all(&self, last: Lsn) -> bool {
        self.covered.lsn == last
    }

    /// Adds a snapshot of what the checkpoint has.
    pub(crate) fn add(&mut self, name: &str, at_ms: u64) -> Result<Snapshot, Refusal> {
        self.check_name(name)?;
        let id = self.root.snapshots.last + 1;
        let committed = self.covered;
        let checkpoint = self.root.directory.zip(self.reach);
        let checkpoint = checkpoint.map(|(directory, reach)| CheckpointPlace { directory, reach });
        let (name, size) = (name.to_owned(), self.root.size);
        let snapshot = Snapshot { id, name, committed, checkpoint, size, at_ms };
        (self.root.snapshots.last, self.root.snapshots.count) = (id, self.root.snapshots.count + 1);
        self.root.snapshots.added.push(snapshot.clone());
        self.snapshots.push(snapshot.clone());
        Ok(snapshot)
    }

    /// Marks a snapshot, of which no clone is made from now on. Returns its number.
    pub(crate) fn begin_deletion(&mut self, name: &str) -> Result<u64, Refusal> {
        let id = self.find(name)?.id;
        if !self.root.snapshots.deleting.contains(&id) {
            self.root.snapshots.deleting.push(id);
        }
        Ok(id)
    }

    /// Ends the deletion of a snapshot, which has clones or is gone by that.
    pub(crate) fn end_deletion(&mut self, id: u64, has_clones: bool) {
        let news = &mut self.root.snapshots;
        news.deleting.retain(|deleting| *deleting != id);
        if has_clones || !self.snapshots.iter().any(|snapshot| snapshot.id == id) {
            return;
        }
        self.snapshots.retain(|snapshot| snapshot.id != id);
        news.count -= 1;
        let added = news.added.len();
        news.added.retain(|snapshot| snapshot.id != id);
        if news.added.len() == added {
            news.removed.push(id);
        }
    }
}
