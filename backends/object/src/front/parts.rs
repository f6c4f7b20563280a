//! What backends, worker and state tell one another.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::Waker;

use sheave_core::{Error, Result};

use crate::extents::Span;
use crate::format::LeafRef;
use crate::ids::{Lsn, Place};
use crate::journal::{Log, Segment};
use crate::map::{Found, Leaf};
use crate::recent::Fresh;

/// A message to a backend, for one of its jobs.
#[derive(Debug)]
pub(crate) struct Mail {
    pub(crate) job: usize,
    pub(crate) news: News,
}

/// What has become of something that a job waits for.
#[derive(Debug)]
pub(crate) enum News {
    /// A record, and all before it, are written.
    Written,
    /// All that it waits for is on stable storage.
    Synced,
    /// Its record or sync will not be completed.
    Failed(Error),
    /// Bytes of the bucket, for that offset of its buffer.
    Fetched(usize, Result<Vec<u8>>),
}

/// A backend.
#[derive(Default)]
pub(super) struct User {
    pub(super) waker: Option<Waker>,
    pub(super) mail: Vec<Mail>,
    /// Set while there is mail, or room that it waits for.
    pub(super) has_news: Arc<AtomicBool>,
    pub(super) wants_room: bool,
}

/// The journal of a volume.
pub(crate) type Journal = Log<Pending>;

/// What a record changes, and whose it is.
pub(crate) struct Pending {
    /// User and job; the worker's own records have none.
    pub(super) owner: Option<(usize, usize)>,
    pub(super) span: Span,
    pub(super) fresh: Fresh,
}

/// A flush that waits.
pub(super) struct Flush {
    pub(super) user: usize,
    pub(super) job: usize,
    pub(super) needs: Lsn,
}

/// Where blocks are.
#[derive(Clone, Debug)]
pub(crate) enum Whereabouts {
    /// Nowhere: they are zeroes.
    Zero,
    /// In this segment, from this page on.
    Journal(Arc<Segment>, u32),
    /// In the bucket.
    Bucket(Place),
    /// This leaf of the map knows, which is in the bucket.
    Leaf(LeafRef),
}

/// Blocks that a read needs from the bucket.
#[derive(Clone, Debug)]
pub(crate) struct Fetch {
    /// For [`Front::fetched`](super::Front::fetched).
    pub(crate) id: usize,
    pub(crate) span: Span,
    pub(crate) by: By,
}

/// What says where blocks are.
#[derive(Clone, Debug)]
pub(crate) enum By {
    /// The place of the first one.
    Place(Place),
    /// A leaf of the map.
    Leaf(Arc<Leaf>),
    /// The map, which has changed.
    Map,
}

/// Jobs that wait for a leaf.
#[derive(Debug, Default)]
pub(super) struct Loads {
    /// The leaves that are on their way, and what waits for each.
    pub(super) waiting: BTreeMap<LeafRef, Vec<(usize, Span)>>,
    /// Those that the worker has not begun to load.
    pub(super) new: Vec<LeafRef>,
}

/// A sync of the journal.
#[derive(Debug)]
pub(crate) struct Sync {
    /// Becomes durable by it.
    pub(crate) upto: Lsn,
    /// What is left to sync.
    pub(crate) segments: Vec<Arc<Segment>>,
}

/// What is to be done once the lock is released.
#[derive(Default)]
pub(crate) struct Effects {
    pub(crate) wakes: Vec<Waker>,
    /// The worker has something to do.
    pub(crate) rouse: bool,
}

/// Limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// A batch with so much data is sealed, in bytes.
    pub(crate) seal_bytes: u64,
    /// The most segments of the journal.
    pub(crate) segments_max: usize,
    /// The most blocks that are fetched ahead of readings in a row.
    pub(crate) ahead_blocks_max: u64,
}

impl Whereabouts {
    pub(super) fn of(found: Found) -> Self {
        match found {
            Found::Zero => Self::Zero,
            Found::At(place) => Self::Bucket(place),
            Found::In(leaf) => Self::Leaf(leaf),
        }
    }
}
