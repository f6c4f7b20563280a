//! How much of each object the map refers to.
//!
//! Each frame counts as often as it is in what a checkpoint has: in its runs, or in one of its
//! leaves. So a count is never too low. It is too high for blocks of a leaf that runs above it
//! hide, until the leaf is written anew.

use std::collections::{BTreeMap, BTreeSet};

use super::Cleaning;
use crate::format::{
    Counted, Directory, ENTRY_BYTES, Form, FramePlace, LeafRef, Run, RunPart, Snapshot,
};
use crate::ids::{Place, Seq};

/// Leaves that the map has dropped are read to be uncounted, so many for a checkpoint, and of so
/// many bytes.
const UNCOUNTED_MAX: usize = 256;
const UNCOUNTED_BYTES_MAX: u64 = 4 << 20;
/// Objects that are cleaned for one with moves, at most.
const VICTIMS_MAX: usize = 64;
/// An object of which more is needed is not cleaned, in percent.
const NEEDED_MAX: u64 = 90;

/// The volume's own objects that are not deleted.
#[derive(Clone, Debug)]
pub(crate) struct Counts {
    /// The checkpoint that they are counted by.
    checkpoint: Option<FramePlace>,
    /// That one has all objects up to this one.
    covered: Seq,
    /// Whether a dropped leaf was uncounted with it.
    has_uncounted: bool,
    /// What is before that is an ancestor's.
    own_from: Seq,
    objects: BTreeMap<Seq, Count>,
    /// Leaves that the map does not need any more, and that still count.
    dropped: Vec<LeafRef>,
    /// A leaf had runs that were not counted.
    is_wrong: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    bytes: u64,
    /// Bytes of frames that runs above the leaves refer to.
    by_runs: u64,
    /// The same of runs in leaves.
    by_leaves: u64,
    /// Bytes of leaves, and of the directory.
    of_map: u64,
    death: Option<Seq>,
}

impl Count {
    fn live(&self) -> u64 {
        self.by_runs + self.by_leaves + self.of_map
    }
}

impl Counts {
    /// Those of a volume without a checkpoint, whose own objects begin there.
    pub(crate) fn new(own_from: Seq) -> Self {
        let (objects, dropped) = Default::default();
        let (checkpoint, covered) = (None, Seq(0));
        let (has_uncounted, is_wrong) = (false, false);
        Self { checkpoint, covered, has_uncounted, own_from, objects, dropped, is_wrong }
    }

    /// Those of a checkpoint, which may be an ancestor's.
    pub(crate) fn of_directory(own_from: Seq, directory: &Directory, place: FramePlace) -> Self {
        let covered = directory.covered.seq;
        let mut counts = Self { checkpoint: Some(place), covered, ..Self::new(own_from) };
        if place.seq < own_from {
            return counts;
        }
        for Counted { seq, bytes, by_leaves, death } in &directory.objects {
            let (bytes, by_leaves) = (u64::from(*bytes), u64::from(*by_leaves));
            let count = Count { bytes, by_leaves, death: *death, ..Count::default() };
            counts.objects.insert(*seq, count);
        }
        counts.dropped.clone_from(&directory.dropped);
        // The directory and the heads behind it are the end of its object.
        counts.add(place.seq, u64::from(place.at) + u64::from(place.bytes));
        counts.count_runs(&directory.runs);
        counts.count_map(directory.leaves.iter().copied());
        counts
    }

    /// The checkpoint that they are counted by.
    pub(crate) fn checkpoint(&self) -> Option<FramePlace> {
        self.checkpoint
    }

    /// An object is committed.
    pub(crate) fn add(&mut self, seq: Seq, bytes: u64) {
        if seq >= self.own_from {
            self.objects.insert(seq, Count { bytes, ..Count::default() });
        }
    }

    /// An object is deleted.
    pub(crate) fn remove(&mut self, seq: Seq) {
        self.objects.remove(&seq);
    }

    /// The same for a checkpoint that has all objects up to one.
    pub(crate) fn up_to(&self, covered: Seq) -> Self {
        let objects = self.objects.range(..=covered);
        let objects = objects.map(|(seq, count)| (*seq, *count)).collect();
        Self { objects, dropped: self.dropped.clone(), has_uncounted: false, ..*self }
    }

    /// The most bytes of its parts of a checkpoint.
    pub(crate) fn bytes_max(&self, of_object: u64, of_leaf: u64) -> u64 {
        self.objects.len() as u64 * of_object + self.dropped.len() as u64 * of_leaf
    }

    /// The map needs a leaf no more, whose content is not known here.
    pub(crate) fn drop_leaf(&mut self, leaf: LeafRef) {
        let at = self.dropped.partition_point(|other| *other < leaf);
        self.dropped.insert(at, leaf);
    }

    /// Leaves that are to be uncounted with the next checkpoint: the first ones.
    pub(crate) fn to_uncount(&self) -> &[LeafRef] {
        let mut bytes = 0;
        let is_within = |leaf: &&LeafRef| {
            bytes += u64::from(leaf.place.bytes);
            bytes <= UNCOUNTED_BYTES_MAX
        };
        let count = self.dropped.iter().take(UNCOUNTED_MAX).take_while(is_within).count();
        &self.dropped[..count.max(usize::from(!self.dropped.is_empty()))]
    }

    /// Whether another checkpoint would uncount more leaves.
    pub(crate) fn uncounts_more(&self) -> bool {
        self.has_uncounted && !self.dropped.is_empty()
    }

    /// A dropped leaf has these runs.
    pub(crate) fn uncount(&mut self, leaf: LeafRef, runs: impl IntoIterator<Item = Run>) {
        self.dropped.retain(|other| *other != leaf);
        self.has_uncounted = true;
        self.leave(runs);
    }

    /// No leaf has these runs any more.
    pub(crate) fn leave(&mut self, runs: impl IntoIterator<Item = Run>) {
        each_frame(runs, |seq, bytes| {
            let Some(count) = self.objects.get_mut(&seq) else {
                self.is_wrong |= seq >= self.own_from;
                return;
            };
            let left = count.by_leaves.checked_sub(bytes);
            self.is_wrong |= left.is_none();
            count.by_leaves = left.unwrap_or_default();
        });
    }

    /// Whether they contradict the map: nothing must be deleted by them.
    pub(crate) fn is_wrong(&self) -> bool {
        self.is_wrong
    }

    /// A leaf has these runs.
    pub(crate) fn take(&mut self, runs: &[Run]) {
        each_frame(runs.iter().copied(), |seq, bytes| {
            if let Some(count) = self.objects.get_mut(&seq) {
                count.by_leaves += bytes;
            }
        });
    }

    /// The checkpoint has all objects up to one, these runs, and these leaves of before. What it
    /// does not refer to is dead from there on.
    pub(crate) fn settle<'a>(
        &mut self,
        covered: Seq,
        runs: &[Run],
        leaves: impl IntoIterator<Item = (&'a u64, &'a FramePlace)>,
    ) {
        self.count_runs(runs);
        (self.checkpoint, self.covered) = (None, covered);
        self.count_map(leaves.into_iter().map(|(&number, &place)| LeafRef { number, place }));
        for count in self.objects.values_mut().filter(|count| count.live() == 0) {
            count.death.get_or_insert(covered);
        }
    }

    /// The counts of a checkpoint that has all objects up to one, and the map of a snapshot.
    ///
    /// # Errors
    /// An object that the snapshot needs and that is deleted.
    pub(crate) fn restored(&self, covered: Seq, of_snapshot: &Directory) -> Result<Self, Seq> {
        let mut counts = self.up_to(covered);
        counts.objects.values_mut().for_each(|count| count.by_leaves = 0);
        for Counted { seq, by_leaves, death, .. } in &of_snapshot.objects {
            match counts.objects.get_mut(seq) {
                Some(count) => count.by_leaves = u64::from(*by_leaves),
                // It may be an ancestor's, in whose checkpoint the snapshot is.
                None if *seq < self.own_from || death.is_some() => {}
                None => return Err(*seq),
            }
        }
        let is_own = |leaf: &&LeafRef| leaf.place.seq >= self.own_from;
        counts.dropped = of_snapshot.dropped.iter().filter(is_own).copied().collect();
        let leaves = of_snapshot.leaves.iter().map(|leaf| (&leaf.number, &leaf.place));
        counts.settle(covered, &of_snapshot.runs, leaves);
        counts.objects.values_mut().filter(|count| count.live() > 0).for_each(|count| {
            count.death = None;
        });
        Ok(counts)
    }

    /// The objects, as a checkpoint has them.
    pub(crate) fn table(&self) -> (Vec<Counted>, Vec<LeafRef>) {
        let counted = |(seq, count): (&Seq, &Count)| Counted {
            seq: *seq,
            bytes: count.bytes as u32,
            by_leaves: count.by_leaves as u32,
            death: count.death,
        };
        (self.objects.iter().map(counted).collect(), self.dropped.clone())
    }

    /// A checkpoint is committed, whose counts these are. Objects that were deleted since it was
    /// begun stay out.
    pub(crate) fn adopt<'a>(
        &mut self,
        counted: Self,
        place: FramePlace,
        leaves: impl IntoIterator<Item = (&'a u64, &'a FramePlace)>,
    ) {
        for (seq, count) in counted.objects {
            if let Some(object) = self.objects.get_mut(&seq) {
                *object = count;
            }
        }
        (self.checkpoint, self.covered) = (Some(place), counted.covered);
        (self.dropped, self.has_uncounted) = (counted.dropped, counted.has_uncounted);
        self.count_map(leaves.into_iter().map(|(&number, &place)| LeafRef { number, place }));
    }

    fn count_runs(&mut self, runs: &[Run]) {
        self.objects.values_mut().for_each(|count| count.by_runs = 0);
        each_frame(runs.iter().copied(), |seq, bytes| {
            if let Some(count) = self.objects.get_mut(&seq) {
                count.by_runs += bytes;
            }
        });
    }

    fn count_map(&mut self, leaves: impl Iterator<Item = LeafRef>) {
        self.objects.values_mut().for_each(|count| count.of_map = 0);
        let places = leaves.chain(self.dropped.iter().copied()).map(|leaf| leaf.place);
        for place in places.chain(self.checkpoint) {
            if let Some(count) = self.objects.get_mut(&place.seq) {
                count.of_map += u64::from(place.bytes);
            }
        }
    }

    /// Dead objects that none of these snapshots needs, and their bytes.
    pub(crate) fn garbage(&self, snapshots: &[Snapshot]) -> Vec<(Seq, u64)> {
        let kept = Kept::by(snapshots);
        let is_garbage = |seq: Seq, count: &Count| {
            count.live() == 0 && count.death.is_some_and(|death| !kept.has(seq, death))
        };
        let garbage = self.objects.iter().filter(|(seq, count)| is_garbage(**seq, count));
        garbage.map(|(seq, count)| (*seq, count.bytes)).collect()
    }

    /// Objects that are to be cleaned, of those behind one: none while little enough is stored.
    /// Those that were cleaned do not count. With their lengths.
    pub(crate) fn victims(
        &self,
        behind: Seq,
        cleaned: &BTreeSet<Seq>,
        Cleaning { space_percent, move_bytes }: Cleaning,
    ) -> Vec<(Seq, u64)> {
        let has_blocks = |count: &Count| count.by_runs + count.by_leaves > 0;
        let counted =
            self.objects.range(behind.next()..).take_while(|(seq, _)| **seq <= self.covered);
        let objects: Vec<_> =
            counted.filter(|(seq, count)| has_blocks(count) && !cleaned.contains(seq)).collect();
        let stored: u64 = objects.iter().map(|(_, count)| count.bytes).sum();
        let live: u64 = objects.iter().map(|(_, count)| count.live()).sum();
        let is_small = stored.saturating_sub(live) < move_bytes;
        if is_small || stored * 100 <= live * space_percent {
            return Vec::new();
        }
        // What is freed for what is read and written, and the older the better: the rest of an old
        // object stays as it is for longer.
        let score = |(seq, count): &(&Seq, &Count)| {
            let needed = count.live() as f64 / count.bytes as f64;
            let age = (self.covered.0 - seq.0 + 1) as f64;
            (1.0 - needed) * age / (1.0 + needed)
        };
        let is_worth_it =
            |(_, count): &&(&Seq, &Count)| count.live() * 100 <= count.bytes * NEEDED_MAX;
        let mut worth: Vec<_> =
            objects.iter().filter(is_worth_it).map(|object| (score(object), object)).collect();
        worth.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        let mut gathered = 0;
        let is_wanted = |(_, (_, count)): &(f64, &(&Seq, &Count))| {
            let is_wanted = gathered < move_bytes;
            gathered += count.live();
            is_wanted
        };
        let wanted = worth.into_iter().take(VICTIMS_MAX).take_while(is_wanted);
        wanted.map(|(_, (seq, count))| (**seq, count.bytes)).collect()
    }

    /// Bytes that the checkpoint refers to.
    pub(crate) fn live_bytes(&self) -> u64 {
        self.objects.values().map(Count::live).sum()
    }
}

/// What snapshots keep: an object that was born up to the one with the directory of a snapshot, and
/// died behind what the snapshot has.
struct Kept {
    /// By the object with its directory: the first object behind which the snapshot, or one of
    /// those with later directories, does not look.
    from: Vec<(Seq, Seq)>,
}

impl Kept {
    fn by(snapshots: &[Snapshot]) -> Self {
        let of = |snapshot: &Snapshot| (snapshot.last_object(), snapshot.committed.seq);
        let mut from: Vec<_> = snapshots.iter().map(of).collect();
        from.sort_unstable();
        let mut least = Seq(u64::MAX);
        for (_, committed) in from.iter_mut().rev() {
            least = least.min(*committed);
            *committed = least;
        }
        Self { from }
    }

    fn has(&self, birth: Seq, death: Seq) -> bool {
        let first = self.from.partition_point(|(directory, _)| *directory < birth);
        self.from.get(first).is_some_and(|(_, committed)| *committed < death)
    }
}

/// Calls `take` with the object of each frame that runs refer to, and with its bytes. Runs are in
/// the order of their addresses.
pub(crate) fn each_frame(runs: impl IntoIterator<Item = Run>, mut take: impl FnMut(Seq, u64)) {
    // Blocks in the middle of a frame of several ones may be in other places by now. The end of
    // its addresses tells when no more of it can come.
    let mut open = Vec::<(u64, Seq, u32)>::new();
    for Run { span, place } in runs {
        let Place::Object { seq, frame, form, skip, run } = place else { continue };
        // Each has an entry of the index of its own, which is much beside a short frame. If it did
        // not count, objects of nothing but needed frames would seem to be worth cleaning.
        let mut entry_bytes = 0;
        if let Form::Packed(_) = form {
            open.retain(|(end, ..)| *end > span.start);
            if open.iter().any(|(_, of, at)| (*of, *at) == (seq, frame)) {
                continue;
            }
            open.push((span.start + u64::from(run - skip), seq, frame));
            entry_bytes = ENTRY_BYTES as u64;
        }
        let bytes = RunPart { frame, form, run, skip, blocks: span.blocks as u32 }.bytes();
        take(seq, bytes.end - bytes.start + entry_bytes);
    }
}
