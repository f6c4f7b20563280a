//! What the worker does with the state: batches go to the bucket, blocks come from it.

use std::sync::Arc;
use std::task::Waker;

use sheave_core::{Error, ErrorKind, Result};

use super::parts::By;
use super::{Failure, Fetch, Front, Mail, News, Sync};
use crate::ask::{Ask, Done, SnapshotAsk};
use crate::extents::Span;
use crate::format::record::Entry;
use crate::format::{LeafRef, Placed, Snapshot};
use crate::ids::{Lsn, Place};
use crate::journal::{Reserved, Segment, SegmentFile};
use crate::map::{Found, Frozen, Leaf, Outdated, Settled};
use crate::recent::Batch;

/// Leaves of the map go from memory when nothing was read for so many ticks, which is a minute. An
/// idle volume needs little then.
const UNREAD_TICKS_MAX: u32 = 12;

/// The next batch for the bucket.
pub(crate) enum NextBatch {
    Batch(Arc<Batch>),
    /// None now; the waker will be called.
    Later,
    /// None any more: the volume is closing, and the bucket has everything.
    Drained,
}

impl Front {
    /// The next batch.
    pub(crate) fn next_batch(&mut self, waker: &Waker) -> NextBatch {
        if self.is_closing {
            self.recent.seal();
        }
        match self.recent.take() {
            Some(batch) => NextBatch::Batch(batch),
            None if self.is_drained() => NextBatch::Drained,
            None => {
                self.uploads = Some(waker.clone());
                NextBatch::Later
            }
        }
    }

    /// What ops wait for, or why they fail.
    pub(crate) fn waits_for(&self) -> Option<String> {
        let room = || {
            let of_disk = "the disk of the journal is full, so writes wait for the store";
            let of_journal = "the journal is full, so writes wait for the store";
            self.is_short.then_some(if self.is_disk_full { of_disk } else { of_journal })
        };
        let store = || self.complaint.as_ref().map(|why| format!("the store is away: {why}"));
        match &self.failure {
            Some(Failure { why, .. }) => Some(why.clone()),
            None => match (room(), store()) {
                (Some(room), Some(store)) => Some(format!("{room}; {store}")),
                (Some(room), None) => Some(room.to_owned()),
                (None, store) => store,
            },
        }
    }

    /// Asks for a snapshot of all that is acknowledged.
    ///
    /// # Errors
    /// When the volume has failed, or is being closed.
    pub(crate) fn ask_snapshot(
        &mut self,
        name: String,
        at_ms: u64,
        done: Done<Snapshot>,
    ) -> Result<()> {
        self.check("snapshot")?;
        self.seal();
        let lsn = self.recent.sealed();
        self.ask(Ask::Snapshot(SnapshotAsk { name, lsn, at_ms, done }))
    }

    /// Asks the uploads for something.
    ///
    /// # Errors
    /// When the volume has failed, or is being closed.
    pub(crate) fn ask(&mut self, ask: Ask) -> Result<()> {
        self.check("change")?;
        self.asks.push_back(ask);
        self.effects.wakes.extend(self.uploads.take());
        Ok(())
    }

    /// The next thing that is asked.
    pub(crate) fn next_ask(&mut self, waker: &Waker) -> Option<Ask> {
        self.uploads = Some(waker.clone());
        self.asks.pop_front()
    }

    /// The bucket has everything, and no more will be written. What is in flight may still be
    /// acknowledged, unless the volume has failed.
    fn is_drained(&self) -> bool {
        let is_done = self.failure.is_some() || self.log.unwritten().next().is_none();
        self.is_closing && is_done && self.recent.is_empty()
    }

    /// A batch was sealed.
    pub(super) fn offer_batch(&mut self) {
        self.unsealed_ticks = 0;
        self.effects.wakes.extend(self.uploads.take());
    }

    /// Seals what there is.
    pub(super) fn seal(&mut self) {
        if self.recent.seal() {
            self.offer_batch();
        }
    }

    /// Time has passed: what is not sealed after so many ticks is sealed. Leaves of the map that no
    /// reading has needed for long are returned, to be dropped without the lock.
    pub(crate) fn tick(&mut self, ticks_max: u32) -> Vec<Arc<Leaf>> {
        self.is_disk_full = false;
        self.look_for_room();
        self.unsealed_ticks += u32::from(self.recent.has_unsealed());
        if self.unsealed_ticks >= ticks_max {
            self.seal();
        }
        self.unread_ticks += u32::from(self.map.has_loaded());
        match self.unread_ticks >= UNREAD_TICKS_MAX {
            true => {
                self.unread_ticks = 0;
                self.map.unload()
            }
            false => Vec::new(),
        }
    }

    /// The map takes some runs of an object that is committed.
    pub(crate) fn fold(&mut self, placed: &[Placed]) {
        placed.iter().for_each(|placed| self.map.fold(placed));
    }

    /// The map as it is, for a checkpoint.
    pub(crate) fn freeze(&mut self) -> Frozen {
        self.map.freeze()
    }

    /// This has become of it. Returns what is to be dropped without the lock.
    pub(crate) fn settle(&mut self, settled: Settled) -> Outdated {
        self.map.settle(settled)
    }

    /// A leaf of the map, if it is in memory.
    pub(crate) fn leaf(&self, number: u64) -> Option<Arc<Leaf>> {
        self.map.leaf(number)
    }

    /// Takes the leaves that are to be loaded.
    pub(crate) fn take_loads(&mut self) -> Vec<LeafRef> {
        std::mem::take(&mut self.loads.new)
    }

    /// A leaf is there, for all that wait for it, or it is not to be had. Returns what is to be
    /// dropped without the lock.
    pub(crate) fn loaded(&mut self, of: LeafRef, outcome: Result<Arc<Leaf>>) -> Vec<Arc<Leaf>> {
        let waiting = self.loads.waiting.remove(&of).unwrap_or_default();
        let outdated = outcome.as_ref().map_or(Vec::new(), |leaf| self.map.keep(of, leaf));
        let by = match outcome {
            Ok(leaf) => Ok(By::Leaf(leaf)),
            // It may be deleted: the map does not need it any more.
            Err(_) if !self.map.has_leaf(of) => Ok(By::Map),
            Err(error) => Err(error),
        };
        for (id, span) in waiting {
            match &by {
                Err(error) => self.fetched(id, Err(error.clone())),
                Ok(_) if span.is_empty() => self.fetched(id, Ok(Vec::new())),
                Ok(by) => {
                    self.fetches.push(Fetch { id, span, by: by.clone() });
                    self.effects.rouse = true;
                }
            }
        }
        if self.is_shut {
            self.refuse_fetches();
        }
        outdated
    }

    /// The map has all of the batch that ends there, which is returned, to be dropped without the
    /// lock.
    pub(crate) fn committed(&mut self, last: Lsn) -> Option<Arc<Batch>> {
        let batch = self.recent.commit(last);
        debug_assert!(batch.is_some(), "batches are committed in their order");
        self.log.commit(last);
        self.has_room();
        self.has_committed();
        if self.is_closing {
            self.offer_batch();
        }
        batch
    }

    /// The segment of a batch that is not committed.
    pub(crate) fn segment(&self, number: u64) -> Option<Arc<Segment>> {
        self.log.segment(number).cloned()
    }

    /// Another node has taken the volume over, or the bucket is of no more use.
    pub(crate) fn bucket_failed(&mut self, error: &Error) {
        let kind = if error.kind() == ErrorKind::Fenced { error.kind() } else { ErrorKind::Io };
        self.fail(kind, error.to_string());
    }

    /// Notes the last word of the store, and logs when it changes: `None` if all is well.
    pub(crate) fn store_says(&mut self, complaint: Option<String>) {
        if self.complaint.is_some() != complaint.is_some() {
            match &complaint {
                Some(why) => tracing::warn!(volume = &*self.name, "the store is away: {why}"),
                None => tracing::info!(volume = &*self.name, "the store is back"),
            }
        }
        self.complaint = complaint;
    }

    /// Takes the blocks that are to be fetched.
    pub(crate) fn take_fetches(&mut self) -> Vec<Fetch> {
        std::mem::take(&mut self.fetches)
    }

    /// Where committed blocks are now.
    pub(crate) fn cover(&self, span: Span) -> Vec<(Span, Found)> {
        self.map.cover(span)
    }

    /// Takes what is to be in the cache soon.
    pub(crate) fn take_ahead(&mut self) -> Vec<(Span, Place)> {
        std::mem::take(&mut self.ahead)
    }

    /// Hands a job what was fetched for it.
    pub(crate) fn fetched(&mut self, id: usize, outcome: Result<Vec<u8>>) {
        let (user, job, at) = self.fetching.remove(id);
        self.post(user, Mail { job, news: News::Fetched(at, outcome) });
    }

    /// Whether one more segment is to be made.
    pub(super) fn needs_segment(&self) -> bool {
        let is_wanted = !self.log.has_spare() && self.log.segments() < self.limits.segments_max;
        is_wanted && !self.is_making && !self.is_disk_full && !self.is_shut
    }

    /// Whether the worker is to make one more segment now, which it then reports to
    /// [`Self::made_segment`].
    pub(crate) fn begin_segment(&mut self) -> bool {
        let is_needed = self.needs_segment();
        self.is_making |= is_needed;
        is_needed
    }

    /// One more segment is there; `None` if there is no room for it.
    pub(crate) fn made_segment(&mut self, file: Option<SegmentFile>) {
        self.is_making = false;
        match file {
            // It would be of no use, and keep its lock.
            Some(_) if self.is_shut => {}
            Some(file) => {
                self.log.add(file);
                self.has_room();
            }
            None => self.is_disk_full = true,
        }
    }

    /// Whether the worker has to look again without being roused: something is not durable, not
    /// stated to be so, or not sealed, the store is asked for something, or leaves are in memory.
    /// If not, it is roused by the next write or fetch.
    pub(crate) fn is_restless(&mut self) -> bool {
        let has_unstated = self.log.has_unstated() && self.log.segments() > 1;
        let is_dirty = self.log.durable() < self.log.written() || has_unstated;
        let is_waiting = self.recent.has_unsealed() || self.is_short;
        let is_waiting = is_waiting || self.has_asked_store() || self.map.has_loaded();
        let is_restless = self.failure.is_none() && (is_dirty || is_waiting);
        self.is_quiet = !is_restless;
        is_restless
    }

    /// What the worker is to sync, if anything is not durable.
    pub(crate) fn unsynced(&self) -> Option<Sync> {
        let is_dirty = self.failure.is_none() && self.log.durable() < self.log.written();
        is_dirty.then(|| Sync { upto: self.log.written(), segments: self.log.unsynced() })
    }

    /// The worker's sync is done, or has failed.
    pub(crate) fn worker_synced(&mut self, upto: Lsn, outcome: Result<(), &str>) {
        self.end_sync(upto, outcome);
    }

    /// A place for a record that states what is durable, if no record does yet, and the record.
    pub(crate) fn begin_statement(&mut self) -> Option<(Reserved, Entry)> {
        // In the only segment it would keep that from being written anew.
        let is_alone = self.log.segments() < 2;
        if self.failure.is_some() || is_alone || !self.log.has_unstated() {
            return None;
        }
        let entry = Entry::Zero { span: Span { start: 0, blocks: 0 } };
        let reserved = self.reserve(None, &entry)?;
        Some((reserved, entry))
    }

    /// The volume is closing: everything goes to the bucket.
    pub(crate) fn close(&mut self) {
        self.is_closing = true;
        // Those that wait for room are refused.
        self.has_room();
        self.offer_batch();
        self.effects.rouse = true;
    }

    /// Whether it is closing.
    pub(crate) fn is_closing(&self) -> bool {
        self.is_closing
    }

    /// The worker fetches nothing any more.
    pub(super) fn refuse_fetches(&mut self) {
        let waiting = std::mem::take(&mut self.loads).waiting;
        let waiting = waiting.into_values().flatten().map(|(id, _)| id);
        let fetches = self.take_fetches().into_iter().map(|fetch| fetch.id);
        for id in waiting.chain(fetches) {
            self.fetched(id, Err(self.closed("read")));
        }
    }

    /// Gives the files of the journal up.
    pub(crate) fn shut(&mut self) {
        self.is_shut = true;
        self.log.shut();
        self.refuse_fetches();
    }

    /// All up to this one is written to the journal.
    #[cfg(test)]
    pub(crate) fn written(&self) -> Lsn {
        self.log.written()
    }

    /// Bytes of data that the bucket lacks.
    pub(crate) fn lag_bytes(&self) -> u64 {
        self.recent.bytes()
    }
}
