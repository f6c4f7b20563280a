//! Nothing that is needed is deleted: whenever something is, all that the newest root and its
//! snapshots need must be there.

use std::sync::Arc;

use sheave_core::Error;

use super::Nodes;
use crate::ask::{Ask, ChangeAsk, SnapshotAsk};
use crate::check::{Options, check};
use crate::fetch::Fetcher;
use crate::ids::Lsn;
use crate::memory_store::{Still, TurnClock};
use crate::open::{Fold, find, unlock};
use crate::retry::Requests;
use crate::sources::Sources;
use crate::threads::block_on;

/// Snapshots of the volume, of which names are chosen.
const SNAPSHOTS_MAX: u64 = 4;

impl Nodes {
    /// Asks for a snapshot. There may be one of that name.
    pub(super) fn ask_snapshot(&self, lsn: Lsn) -> Ask {
        let name = format!("s{}", self.random.below(SNAPSHOTS_MAX));
        let nodes = self.clone();
        let done = Box::new(move |outcome: sheave_core::Result<_>| {
            nodes.truth().snapshots += usize::from(outcome.is_ok());
        });
        Ask::Snapshot(SnapshotAsk { name, lsn, at_ms: 0, done })
    }

    /// Asks for the deletion of a snapshot. There may be none of that name.
    pub(super) fn ask_deletion(&self) -> Ask {
        let name = format!("s{}", self.random.below(SNAPSHOTS_MAX));
        let change = Arc::new(move |head: &mut crate::Head| {
            let id = head.begin_deletion(&name)?;
            head.end_deletion(id, false);
            Ok(())
        });
        Ask::Change(ChangeAsk { change, done: Box::new(|_| {}) })
    }

    /// Looks for all that is needed, as the store is now.
    pub(in super::super) fn audit(&self) {
        if let Err(why) = self.look_for_all() {
            self.violated(why);
        }
    }

    fn look_for_all(&self) -> Result<(), String> {
        let still = Arc::new(Still(Arc::clone(&self.store)));
        let requests = Requests::new(still, Arc::new(TurnClock), "simulated");
        let (key, progress) = (self.key.clone(), &|_| {});
        let options = Options { reads_data: false, repairs: false, key, progress };
        match block_on(check(&requests, &options)) {
            Ok(report) if report.faults.is_empty() => {}
            other => return Err(format!("the check finds {other:?}")),
        }
        block_on(self.check_snapshots(&requests))
    }

    /// Compares the blocks of all snapshots with the writes that they have.
    async fn check_snapshots(&self, requests: &Requests) -> Result<(), String> {
        let failed = |error: Error| format!("a snapshot: {error}");
        let root = find(requests).await.map_err(failed)?;
        let key = unlock(requests, &root, self.key.as_ref()).map_err(failed)?;
        let fold = Fold::of_checkpoint(requests, &root, key.as_ref()).await.map_err(failed)?;
        for snapshot in fold.snapshots {
            let found = Fold::of_snapshot(requests, &root, &snapshot, key.as_ref()).await;
            let (map, lineage) = found.map_err(failed)?;
            let sources = Sources::new(requests, &root, key.clone()).map_err(failed)?;
            let fetcher = Fetcher::of_command(&sources, lineage);
            let checked = self.check_map(&map, &fetcher, snapshot.committed.lsn).await;
            checked.map_err(|why| format!("snapshot {}: {why}", snapshot.name))?;
        }
        Ok(())
    }
}
