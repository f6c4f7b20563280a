//! Snapshots that are open: they are only read, by any number of nodes, and have no journal.

use std::path::Path;
use std::sync::Arc;

use sheave_core::{ErrorKind, Result, VolumeInfo};

use super::{Engine, ObjectVolume, Opened, Parts, Tuning, info, make_journals};
use crate::cache::Cache;
use crate::cipher::WrappingKey;
use crate::fetch::Fetcher;
use crate::format::{Durability, Root, Snapshot};
use crate::head::Head;
use crate::ids::{BLOCK_BYTES, Opening, VolumeId};
use crate::journal::Recovered;
use crate::open::{Fold, find, unlock};
use crate::retry::Requests;
use crate::sources::Sources;
use crate::worker;

/// How often the newest root is looked for while the volume is in use elsewhere.
const TRIES_MAX: usize = 8;

impl ObjectVolume {
    /// Opens the snapshot of a name of a volume, which may be open anywhere.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Corrupt`] when its objects are
    /// damaged, and those of the store.
    pub fn open_snapshot(
        name: &str,
        (requests, key): (&Requests, Option<&WrappingKey>),
        snapshot: &str,
        journals: &Path,
        tuning: Tuning,
    ) -> Result<Self> {
        let (root, found) = crate::threads::block_on(find_snapshot((requests, key), snapshot))?;
        let key = unlock(requests, &root, key)?;
        let read = Fold::of_snapshot(requests, &root, &found, key.as_ref());
        let (mut map, lineage) = crate::threads::block_on(read)?;
        let sources = Sources::new(requests, &root, key.clone())?;
        let mut fetcher = Fetcher::new(&sources, lineage);
        map.keep_within(tuning.map_bytes);
        // The objects of a snapshot do not change, but the store may be a copy of another one.
        let mut salts = worker::salts()?;
        let opening = Opening { incarnation: crate::Incarnation(salts()), ..root.last.opening };
        make_journals(journals)?;
        if let Some(cache) = Cache::in_dir(journals, tuning.cache_bytes) {
            let history = cache.history(VolumeId(salts()), opening, opening);
            fetcher = fetcher.with_cache(cache, history);
        }
        let identity = identity(root.volume, &found);
        let info = VolumeInfo { read_only: true, identity: Some(identity), ..info(root.volume) };
        let next = found.committed.lsn.next();
        let recovered =
            Recovered { held: vec![], free: vec![], records: vec![], next, number_next: 1 };
        let engine = Engine::new(
            name,
            (root.volume, opening),
            (info, found.size * BLOCK_BYTES),
            Parts {
                journal: None,
                recovered,
                map,
                committed: found.committed.lsn,
                traffic: Arc::clone(requests.traffic()),
                cached: fetcher.cached(),
                key,
                tuning,
                durability: Durability::default(),
            },
        )?;
        worker::start_reading(&engine, fetcher)?;
        Ok(Self { opened: Arc::new(Opened { engine }), requests: requests.clone() })
    }
}

/// What tells a snapshot from all other volumes.
pub(crate) fn identity(volume: VolumeId, snapshot: &Snapshot) -> String {
    format!("{volume}@{}", snapshot.id)
}

/// The snapshot of a name, with the newest root.
///
/// # Errors
/// [`ErrorKind::NotFound`] when there is none, and those of the store.
pub(crate) async fn find_snapshot(
    (requests, key): (&Requests, Option<&WrappingKey>),
    name: &str,
) -> Result<(Root, Snapshot)> {
    let root = find(requests).await?;
    if let Some(found) = root.snapshots.added.iter().find(|found| found.name == name) {
        let found = found.clone();
        return Ok((root, found));
    }
    let (head, _) = head_of((requests, key), root).await?;
    let found = head.find(name).cloned();
    let found = found.map_err(|(kind, why)| requests.error(kind, "open", "", &why))?;
    Ok((head.root, found))
}

/// What the checkpoint of a volume has beside its map.
pub(crate) struct Census {
    pub(crate) snapshots: Vec<Snapshot>,
    /// Bytes of objects that the volume itself needs, without snapshots.
    pub(crate) live_bytes: u64,
}

/// All snapshots of a volume and what it needs, with its newest root; `None` if it is encrypted,
/// and there is no key.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when its checkpoint is damaged, and those of the store.
pub(crate) async fn census(
    requests: &Requests,
    key: Option<&WrappingKey>,
) -> Result<(Root, Option<Census>)> {
    let root = find(requests).await?;
    if root.wrapped_key.is_some() && key.is_none() {
        return Ok((root, None));
    }
    let (Head { root, snapshots, .. }, live_bytes) = head_of((requests, key), root).await?;
    Ok((root, Some(Census { snapshots, live_bytes })))
}

/// The newest root, or one that is newer by now, with what its checkpoint has, and the bytes of
/// objects that this needs.
async fn head_of(
    (requests, wrapping): (&Requests, Option<&WrappingKey>),
    mut root: Root,
) -> Result<(Head, u64)> {
    for _ in 0..TRIES_MAX {
        let key = unlock(requests, &root, wrapping)?;
        let error = match Fold::of_checkpoint(requests, &root, key.as_ref()).await {
            Ok(fold) => {
                let live_bytes = fold.counts.live_bytes();
                return Ok((fold.head(root), live_bytes));
            }
            Err(error) => error,
        };
        // The opening that has the volume may have made another checkpoint, and deleted that one.
        let newest = find(requests).await?;
        if error.kind() != ErrorKind::Corrupt || newest.number == root.number {
            return Err(error);
        }
        root = newest;
    }
    let why = "it changes too fast; try again";
    Err(requests.error(ErrorKind::Busy, "open", "", why))
}
