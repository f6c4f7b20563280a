//! When a checkpoint is made, which one the roots name, and what else changes in roots.
//!
//! A checkpoint is a log object with the map of what was committed when it was begun, and the heads
//! of the objects between that and itself. When it is committed itself, a root names it. An opening
//! then reads it, and the objects behind it: at most [`tail_max`] of them and a checkpoint, since
//! no other object is begun that is further away.
//!
//! A snapshot is a checkpoint that a root also gives a name. Only one thing goes on at a time: a
//! checkpoint with the root that names it, or a root for other changes.

mod roots;

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use sheave_core::{Error, ErrorKind, Result};

use crate::ask::{ChangeAsk, SnapshotAsk};
use crate::fetch::Fetcher;
use crate::format::{
    Author, Built, Committed, Directory, ENTRY_BYTES, FramePlace, HEADER_BYTES, LeafRef,
    OBJECT_BYTES_MAX, ObjectBuilder, SNAPSHOT_BYTES_MAX, Snapshot, State, keys,
};
use crate::gc::{Cleaner, Cleaning, Counts, Sweep};
use crate::head::Head;
use crate::ids::{BLOCK_BYTES, Lsn, Place, Seq};
use crate::lineage::Lineage;
use crate::map::{Leaf, Merge, MergeLimits, Merged, Settled};
use crate::retry::{Requests, Settled as Created};
use crate::together::{boxed, each};
use crate::upload::{AHEAD, Feed, OBJECT_ENTRIES_MAX, WINDOW};
use roots::Naming;

/// A checkpoint waits for blocks that are gathered until so many objects more are begun.
const DELAY_MAX: u64 = 4;
/// Leaves that are read at the same time, to be uncounted.
const READS_MAX: usize = 8;

/// A checkpoint is made after so many objects.
pub(crate) const INTERVAL: u64 = 14;
/// What a checkpoint has beside map, epochs and snapshots takes less.
const OTHER_BYTES: u64 = 4096;
const REACH_BYTES: u64 = 16;

/// The most bytes of the head of an object.
const HEAD_BYTES_MAX: u64 = (HEADER_BYTES + OBJECT_ENTRIES_MAX * ENTRY_BYTES) as u64;

/// The most objects behind the newest checkpoint, where one is made after so many. The next one is
/// named when those before it are committed, which takes as long as those behind it are under way;
/// one more may begin while the root is made.
pub(crate) const fn tail_max(interval: u64) -> u64 {
    interval + 1 + (WINDOW + AHEAD) as u64 + 1
}

const _: () = assert!(tail_max(INTERVAL) == 25, "an opening needs 33 requests at most");

/// Roots that are kept beside the claims.
const ROOTS_KEPT: u64 = 64;

/// When checkpoints are made, and what of the map they write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cadence {
    /// After so many objects.
    pub(crate) interval: u64,
    pub(crate) limits: MergeLimits,
    /// Roots that stay beside the claims.
    pub(crate) roots_kept: u64,
    pub(crate) cleaning: Cleaning,
}

impl Cadence {
    /// For a map that may take so many bytes in memory.
    pub(crate) const fn of_bytes(map_bytes: u64) -> Self {
        let limits = MergeLimits::of_bytes(map_bytes);
        let cleaning = Cleaning::DEFAULT;
        Self { interval: INTERVAL, limits, roots_kept: ROOTS_KEPT, cleaning }
    }
}

/// The checkpoints of an opening.
pub(crate) struct Checkpoints {
    requests: Requests,
    /// Gets leaves that are to be merged.
    fetcher: Fetcher,
    feed: Arc<dyn Feed>,
    /// The newest root of the opening, with its checkpoint and all snapshots.
    head: Head,
    /// With the opening itself.
    lineage: Lineage,
    cadence: Cadence,
    /// How much of each object the newest checkpoint that was made or read refers to, with the
    /// objects behind it.
    counts: Counts,
    sweep: Sweep,
    /// Zeroes that were committed since the last checkpoint was begun.
    zeroed_bytes: u64,
    /// Checkpoints that were begun.
    begun: u64,
    /// The heads of the objects that were committed since a checkpoint was begun.
    heads: Vec<Bytes>,
    step: Step,
    /// The snapshots that the checkpoint under way is made for.
    wanted: Vec<SnapshotAsk>,
    /// Changes that wait for the next root.
    changes: VecDeque<ChangeAsk>,
    /// The map is too large for an object, or a part of it is damaged.
    is_impossible: bool,
}

enum Step {
    Idle,
    /// The map is being merged: it has all up to there.
    Merging(Committed, Pin<Box<dyn Future<Output = Result<Merged, Failed>> + Send>>),
    /// It waits for its place in the log.
    Merged(Committed, Box<Merged>),
    /// Its object is under way.
    Making(Box<Making>),
    /// A root is under way, that names it or has other changes.
    Naming(Box<Naming>),
}

/// A merge of which there is no checkpoint, and why.
type Failed = (Merge, String);

struct Making {
    directory: FramePlace,
    covered: Committed,
    settled: Settled,
    counts: Counts,
}

impl Checkpoints {
    /// For the opening that has made this root.
    pub(crate) fn new(
        (requests, fetcher): (Requests, Fetcher),
        (head, counts): (Head, Counts),
        lineage: Lineage,
        cadence: Cadence,
        feed: Arc<dyn Feed>,
    ) -> Self {
        let sweep = Sweep::new(&requests, &head.root, cadence.roots_kept);
        let mut checkpoints = Self {
            requests,
            fetcher,
            counts,
            sweep,
            zeroed_bytes: 0,
            begun: 0,
            feed,
            head,
            lineage,
            cadence,
            heads: Vec::new(),
            step: Step::Idle,
            wanted: Vec::new(),
            changes: VecDeque::new(),
            is_impossible: false,
        };
        // The opening before may have ended before it had deleted all.
        checkpoints.plan_sweep();
        checkpoints
    }

    /// Plans the deletion of what is dead in the checkpoint that the newest root names. That is
    /// known if the objects are counted by it: an opening may name another one that it has found in
    /// the log, whose leaves it does not know.
    fn plan_sweep(&mut self) {
        #[cfg(test)]
        if !crate::open::rules::get().keeps_snapshots {
            return self.sweep.plan(&self.counts, &[], &self.lineage);
        }
        if self.is_counted() && !self.is_impossible {
            self.sweep.plan(&self.counts, &self.head.snapshots, &self.lineage);
        }
    }

    /// Whether the objects are counted by the checkpoint that the newest root names.
    fn is_counted(&self) -> bool {
        #[cfg(test)]
        if !crate::open::rules::get().counts_named {
            return true;
        }
        self.counts.checkpoint() == self.head.root.directory
    }

    /// An object is committed.
    pub(crate) fn count(&mut self, built: &Built) {
        self.counts.add(built.header.id.seq, u64::from(built.header.bytes));
        let zeroes = built.placed.iter().filter(|placed| placed.place == Place::Zero);
        let zeroed_bytes = zeroes.map(|placed| placed.blocks * BLOCK_BYTES).sum();
        self.zeroed_bytes = self.zeroed_bytes.saturating_add(zeroed_bytes);
    }

    /// Lets the cleaner look for something to clean, if the next checkpoint is not near: that
    /// waits for it.
    pub(crate) fn clean(&self, cleaner: &mut Cleaner, next: Seq) {
        let is_near = next.0 + 2 > self.newest() + self.cadence.interval;
        #[cfg(test)]
        let is_near = is_near && crate::open::rules::get().moves_between;
        if self.is_idle() && self.is_counted() && !self.is_impossible && !is_near {
            let snapshots = self.head.snapshots.iter().map(Snapshot::last_object);
            cleaner.begin(&self.counts, snapshots.max().unwrap_or_default(), self.begun);
        }
    }

    /// How many checkpoints were begun.
    pub(crate) fn begun(&self) -> u64 {
        self.begun
    }

    /// Whether a checkpoint is so much due that it does not wait for blocks that are gathered, or a
    /// change of the root waits.
    pub(crate) fn is_urgent(&self, next: Seq) -> bool {
        next.0 > self.newest() + self.cadence.interval + DELAY_MAX || !self.changes.is_empty()
    }

    /// Begins a checkpoint although nothing is written, since it makes garbage of much.
    pub(crate) fn begin_if_useful(&mut self, committed: Committed, has_moved: bool) {
        let has_zeroed = self.zeroed_bytes >= self.cadence.cleaning.move_bytes;
        if has_moved || has_zeroed || self.counts.uncounts_more() {
            self.begin_last(committed);
        }
    }

    /// The number of the newest checkpoint that a root names.
    fn newest(&self) -> u64 {
        self.head.root.directory.map_or(0, |directory| directory.seq.0)
    }

    /// Whether an object of this number may be begun now: else it would have to be read by an
    /// opening that comes before the next checkpoint. While a checkpoint waits for its place,
    /// nothing is begun before it.
    pub(crate) fn allows(&self, seq: Seq) -> bool {
        let is_near = seq.0 <= self.newest() + tail_max(self.cadence.interval);
        (self.is_impossible || is_near) && !self.is_ready()
    }

    /// Begins a checkpoint of what is committed, if it is time; `next` is the number of the next
    /// object.
    pub(crate) fn begin_if_due(&mut self, committed: Committed, next: Seq) {
        if next.0 > self.newest() + self.cadence.interval {
            self.begin(committed);
        }
    }

    /// Begins one if there is something behind the last one.
    pub(crate) fn begin_last(&mut self, committed: Committed) {
        if committed.seq.0 > self.newest() {
            self.begin(committed);
        }
    }

    fn begin(&mut self, committed: Committed) {
        if !self.is_idle() || self.is_impossible {
            return;
        }
        (self.zeroed_bytes, self.begun) = (0, self.begun + 1);
        let (fetcher, feed) = (self.fetcher.clone(), Arc::clone(&self.feed));
        let (frozen, limits) = (feed.freeze(), self.cadence.limits);
        let epochs = self.lineage.up_to(committed.seq).len() as u64;
        let snapshot_bytes = self.head.snapshots.len() as u64 * SNAPSHOT_BYTES_MAX;
        let heads_bytes = tail_max(self.cadence.interval) * HEAD_BYTES_MAX;
        let other_bytes = epochs * REACH_BYTES + snapshot_bytes + heads_bytes + OTHER_BYTES;
        self.heads.clear();
        let counts = self.counts.up_to(committed.seq);
        let merging = async move {
            let merge = compute(&*feed, move || frozen.merge(limits, counts)).await;
            if merge.bytes_max() + other_bytes > OBJECT_BYTES_MAX {
                return Err((merge, "the map has become too large".to_owned()));
            }
            let old = match load(&merge, &*feed, &fetcher).await {
                Ok(old) => old,
                Err(error) => return Err((merge, error.to_string())),
            };
            let merged = compute(&*feed, move || merge.finish(committed.seq, &old)).await;
            Ok(merged)
        };
        self.step = Step::Merging(committed, Box::pin(merging));
    }

    /// Makes no more checkpoints. The map goes on as it is.
    fn give_up(&mut self, merge: Merge, why: &str) {
        let merged = merge.without_leaves().finish(self.head.covered.seq, &BTreeMap::new());
        self.give_up_merged(merged, why);
    }

    /// The same of a merged map.
    fn give_up_merged(&mut self, merged: Merged, why: &str) {
        let Merged { runs, leaves, .. } = merged.without_leaves();
        self.feed.settle(Settled { runs, leaves, changed: Vec::new() });
        self.stop(why);
    }

    /// Makes no checkpoints and deletes nothing any more.
    pub(crate) fn stop(&mut self, why: &str) {
        self.sweep.stop();
        (self.is_impossible, self.step) = (true, Step::Idle);
        self.refuse_wanted(why);
        let volume = self.requests.name();
        tracing::warn!(volume, "no more checkpoints, so that opening it takes longer: {why}");
    }

    /// Whether nothing of a checkpoint is under way.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.step, Step::Idle)
    }

    /// Whether the map of a checkpoint is ready, which waits for its place in the log.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.step, Step::Merged(..))
    }

    /// An object with this head is committed.
    pub(crate) fn committed(&mut self, head: Bytes) {
        if matches!(self.step, Step::Merging(..) | Step::Merged(..)) {
            self.heads.push(head);
        }
    }

    /// The object of a checkpoint that is ready, if one is. `before` is the last write of the
    /// objects before it, and `under_way` are the heads of those that are not committed.
    pub(crate) fn build(
        &mut self,
        author: &Author,
        seq: Seq,
        before: Lsn,
        under_way: Vec<Bytes>,
    ) -> Option<Built> {
        let (covered, merged) = match std::mem::replace(&mut self.step, Step::Idle) {
            Step::Merged(covered, merged) => (covered, *merged),
            other => {
                self.step = other;
                return None;
            }
        };
        let Merged { runs, mut leaves, changed, counts } = merged;
        let mut builder = ObjectBuilder::new(author, seq, changed.len() + 1, 16 * runs.len());
        let mut new = Vec::with_capacity(changed.len());
        for (number, runs) in changed {
            leaves.insert(number, builder.leaf(number, &runs));
            new.push((number, Arc::new(Leaf::new(number, &runs))));
        }
        let refs = leaves.iter().map(|(number, place)| LeafRef { number: *number, place: *place });
        let epochs = self.lineage.up_to(covered.seq);
        // No root is made from here on before the one that names it: an opening that finds it in
        // the log takes it for what the newest root says.
        let snapshots = self.head.snapshots.clone();
        let (leaf_refs, (objects, dropped)) = (refs.collect(), counts.table());
        let directory =
            Directory { covered, epochs, leaves: leaf_refs, runs, snapshots, objects, dropped };
        self.heads.extend(under_way);
        let place = builder.directory(&directory, &std::mem::take(&mut self.heads));
        let settled = Settled { runs: directory.runs, leaves, changed: new };
        self.step = Step::Making(Box::new(Making { directory: place, covered, settled, counts }));
        Some(builder.finish(before.next(), before))
    }

    /// Whether the object of a checkpoint is under way.
    pub(crate) fn has_object(&self) -> bool {
        matches!(self.step, Step::Making(_))
    }

    /// Whether the object of this number is the checkpoint that is under way.
    pub(crate) fn is_making(&self, seq: Seq) -> bool {
        matches!(&self.step, Step::Making(making) if making.directory.seq == seq)
    }

    /// Goes on with what is under way beside its object.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`] when another opener has the volume, and those of the store.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Result<()> {
        for (seq, bytes) in self.sweep.poll(cx) {
            self.counts.remove(seq);
            self.feed.swept(bytes);
        }
        match &mut self.step {
            Step::Merging(covered, merging) => match merging.as_mut().poll(cx) {
                Poll::Pending => {}
                Poll::Ready(Ok(merged)) if merged.counts.is_wrong() => {
                    self.give_up_merged(merged, "a leaf of the map was not counted");
                }
                Poll::Ready(Ok(merged)) => self.step = Step::Merged(*covered, Box::new(merged)),
                Poll::Ready(Err((merge, why))) => self.give_up(merge, &why),
            },
            Step::Naming(_) => self.poll_naming(cx)?,
            Step::Idle | Step::Merged(..) | Step::Making(_) => {}
        }
        Ok(())
    }

    /// Makes the closed root.
    ///
    /// # Errors
    /// As for [`Self::poll`].
    pub(crate) async fn close(self, committed: Committed) -> Result<()> {
        assert!(self.is_idle(), "nothing is under way");
        let Self { requests, head: Head { mut root, .. }, .. } = self;
        root.number += 1;
        root.state = State::Closed;
        root.committed = committed;
        root.last.is_closed = true;
        let key = keys::root(root.number);
        match requests.create(&key, root.encode().into()).await? {
            Created::Mine => Ok(()),
            Created::Theirs(_) => Err(fenced(&requests, "close", &key)),
        }
    }
}

/// The content of the leaves that a merge needs, and of those that it would uncount.
async fn load(
    merge: &Merge,
    feed: &dyn Feed,
    fetcher: &Fetcher,
) -> Result<BTreeMap<LeafRef, Arc<Leaf>>> {
    let mut old = BTreeMap::<LeafRef, Arc<Leaf>>::new();
    for leaf in merge.needed().collect::<Vec<_>>() {
        let content = match feed.leaf(leaf.number) {
            Some(content) => content,
            None => fetcher.load(leaf).await?,
        };
        old.insert(leaf, content);
    }
    let mut dropped = merge.dropped().iter();
    let next = || {
        let leaf = *dropped.next()?;
        Some(boxed(async move { (leaf, fetcher.load(leaf).await) }))
    };
    // What cannot be read stays counted.
    let take = |(leaf, content): (LeafRef, Result<Arc<Leaf>>)| {
        old.extend(content.ok().map(|content| (leaf, content)));
        Ok(())
    };
    each(READS_MAX, next, take).await?;
    Ok(old)
}

/// Computes something on a thread for which no other volume waits.
pub(crate) async fn compute<T: Send + 'static>(
    feed: &dyn Feed,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let slot = Arc::new(Mutex::new(None));
    let result = Arc::clone(&slot);
    let store = move || *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(work());
    feed.compute(Box::new(store)).await;
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    slot.take().expect("what was computed")
}

/// The error of an opening that is not the last one any more.
pub(crate) fn fenced(requests: &Requests, op: &'static str, key: &str) -> Error {
    let why = "another node has taken over the volume; what this one has not uploaded stays in its \
         journal";
    requests.error(ErrorKind::Fenced, op, key, why)
}
