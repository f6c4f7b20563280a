//! What is asked of the uploads of an open volume: snapshots, and changes of its root.

use std::fmt;

use sheave_core::Result;

use crate::format::Snapshot;
use crate::head::Change;
use crate::ids::Lsn;

/// Takes the outcome. It is dropped when the volume is closed or given up before.
pub(crate) type Done<T> = Box<dyn FnOnce(Result<T>) + Send>;

/// Something that is asked.
pub enum Ask {
    /// A snapshot.
    Snapshot(SnapshotAsk),
    /// The next root is changed so.
    Change(ChangeAsk),
}

/// A snapshot that is to be made.
pub struct SnapshotAsk {
    pub(crate) name: String,
    /// It has all writes up to this one, the last one of a batch.
    pub(crate) lsn: Lsn,
    /// The time, in milliseconds since 1970.
    pub(crate) at_ms: u64,
    pub(crate) done: Done<Snapshot>,
}

/// A change of the root.
pub struct ChangeAsk {
    pub(crate) change: Change,
    pub(crate) done: Done<()>,
}

impl fmt::Debug for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot(ask) => write!(f, "snapshot {} of {}", ask.name, ask.lsn),
            Self::Change(_) => f.write_str("change"),
        }
    }
}
