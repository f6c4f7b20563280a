//! What a checkpoint makes of the layers of a map: some leaves take over what is in their blocks,
//! the rest stays above the leaves.
//!
//! Leaves are chosen where writing them anew costs little beside the data, or where the rest would
//! become too long. So writes need no leaf, whatever order they come in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Frozen, Leaf};
use crate::extents::{Piece, Span};
use crate::format::{COUNTED_BYTES_MAX, FramePlace, LEAF_BLOCKS, LeafRef, Run};
use crate::gc::Counts;
use crate::ids::{BLOCK_BYTES, Place, Seq};

/// When leaves take over what is above them.
#[derive(Clone, Copy, Debug)]
pub struct MergeLimits {
    /// With at most so many runs above them, none is written.
    pub runs_min: usize,
    /// With more, some are written whatever it costs.
    pub runs_max: usize,
    /// Bytes of leaves in a checkpoint.
    pub leaf_bytes_max: u64,
}

impl MergeLimits {
    /// For a map that may take so many bytes in memory: what is above the leaves takes a third of
    /// them while it is merged. A directory of `runs_min` runs is short beside the data of 16
    /// objects.
    #[must_use]
    pub const fn of_bytes(map_bytes: u64) -> Self {
        let runs_max = map_bytes as usize / 256;
        Self { runs_min: runs_max / 32, runs_max, leaf_bytes_max: 16 << 20 }
    }
}

/// A leaf is worth to be written if that costs at most one byte for so many of what is new in it.
const DATA_PER_LEAF_BYTE: u64 = 10;
/// Bytes of an encoded run, about, and at most, where the object's number has 35 bits.
const RUN_BYTES: u64 = 15;
const RUN_BYTES_MAX: u64 = 29;
/// Bytes of a leaf beside its runs: index, frame, and its part of the directory. And the most of
/// that part.
const LEAF_BYTES: u64 = 64;
const REF_BYTES_MAX: u64 = 18;
/// Leaves that a checkpoint writes.
const LEAVES_MAX: usize = 16 << 10;

/// The leaves that are to be written.
#[derive(Debug)]
pub struct Merge {
    /// All that is above the leaves.
    runs: Vec<Run>,
    leaves: BTreeMap<u64, FramePlace>,
    chosen: BTreeSet<u64>,
    /// The most bytes of the chosen ones.
    bytes_max: u64,
    counts: Counts,
}

/// The map of a checkpoint, before its leaves have places.
#[derive(Debug)]
pub struct Merged {
    /// What stays above the leaves.
    pub runs: Vec<Run>,
    /// The leaves that stay as they are.
    pub leaves: BTreeMap<u64, FramePlace>,
    /// The leaves that are to be written.
    pub changed: Vec<(u64, Vec<Run>)>,
    /// How much of each object it refers to.
    pub(crate) counts: Counts,
}

/// What is above a leaf.
#[derive(Default)]
struct Above {
    runs: u64,
    /// Zeroes too: what the leaf has of them is free then.
    blocks: u64,
}

impl Frozen {
    /// Chooses the leaves that are to be written. The counts are those of the last checkpoint, with
    /// the objects behind it.
    #[must_use]
    pub(crate) fn merge(&self, limits: MergeLimits, mut counts: Counts) -> Merge {
        let upper = self.frozen.iter().map(|(span, place)| Run { span, place: *place });
        let whole = Span { start: 0, blocks: u64::MAX };
        let mut leaves = BTreeMap::clone(&self.leaves);
        let mut runs = Vec::with_capacity(self.frozen.len() + self.lower.len());
        overlay(
            whole,
            upper,
            |gap| self.lower.within(gap),
            |run| match run.place {
                Place::Zero => put_zeroes(run.span, &mut leaves, &mut counts, &mut runs),
                Place::Object { .. } => put(run, &mut runs),
            },
        );
        runs.shrink_to_fit();
        let mut merge = Merge { runs, leaves, chosen: BTreeSet::new(), bytes_max: 0, counts };
        if merge.runs.len() > limits.runs_min {
            merge.choose(limits);
        }
        merge
    }
}

impl Merge {
    fn choose(&mut self, limits: MergeLimits) {
        let mut above = BTreeMap::<u64, Above>::new();
        for run in &self.runs {
            for number in numbers(run.span) {
                let of = above.entry(number).or_default();
                of.runs += 1;
                of.blocks += LeafRef::span_of(number).common(run.span).blocks;
            }
        }
        let cost = |(number, above): (u64, Above)| {
            let bytes = self.leaves.get(&number).map_or(0, |leaf| u64::from(leaf.bytes));
            let most = bytes + above.runs * 2 * RUN_BYTES_MAX + LEAF_BYTES;
            let bytes = bytes + above.runs * RUN_BYTES + LEAF_BYTES;
            let is_worth_it = bytes * DATA_PER_LEAF_BYTE <= above.blocks * BLOCK_BYTES;
            (!is_worth_it, bytes / above.runs, number, most, above.runs)
        };
        let mut costs: Vec<_> = above.into_iter().map(cost).collect();
        costs.sort_unstable();
        let (mut left, must_shrink) = (self.runs.len(), self.runs.len() > limits.runs_max);
        for (is_dear, _, number, most, runs) in costs {
            let is_enough = is_dear && !(must_shrink && left > limits.runs_max / 2);
            let is_full = self.bytes_max + most > limits.leaf_bytes_max;
            if is_enough || is_full || self.chosen.len() >= LEAVES_MAX {
                return;
            }
            left = left.saturating_sub(runs as usize);
            self.bytes_max += most;
            self.chosen.insert(number);
        }
    }

    /// The leaves that are to be uncounted, if their content is to be had.
    pub fn dropped(&self) -> &[LeafRef] {
        self.counts.to_uncount()
    }

    /// The leaves whose content is needed.
    pub fn needed(&self) -> impl Iterator<Item = LeafRef> {
        let place = |number: &u64| self.leaves.get(number).copied().map(|place| (*number, place));
        let needed = self.chosen.iter().filter_map(place);
        needed.map(|(number, place)| LeafRef { number, place })
    }

    /// The most bytes of its parts of a checkpoint.
    #[must_use]
    pub fn bytes_max(&self) -> u64 {
        let [runs, leaves, chosen] =
            [self.runs.len(), self.leaves.len(), self.chosen.len()].map(|count| count as u64);
        let counts = self.counts.bytes_max(COUNTED_BYTES_MAX, REF_BYTES_MAX);
        let refs = (leaves + chosen) * REF_BYTES_MAX;
        (runs + chosen) * RUN_BYTES_MAX + refs + self.bytes_max + counts
    }

    /// The same without a leaf that is to be written.
    #[must_use]
    pub fn without_leaves(self) -> Self {
        Self { chosen: BTreeSet::new(), bytes_max: 0, ..self }
    }

    /// The map up to an object, with the content of the leaves that it needs, and of those that
    /// are to be uncounted.
    ///
    /// # Panics
    /// When one that it needs is missing.
    #[must_use]
    pub fn finish(self, covered: Seq, old: &BTreeMap<LeafRef, Arc<Leaf>>) -> Merged {
        let Self { runs, mut leaves, chosen, mut counts, .. } = self;
        for leaf in counts.to_uncount().to_vec() {
            if let Some(content) = old.get(&leaf) {
                counts.uncount(leaf, content.within(LeafRef::span_of(leaf.number)));
            }
        }
        let above = super::layer::Layer::new(runs);
        let mut changed = Vec::with_capacity(chosen.len());
        for &number in &chosen {
            let part = LeafRef::span_of(number);
            let before = leaves.remove(&number).map(|place| &old[&LeafRef { number, place }]);
            counts.leave(before.into_iter().flat_map(|leaf| leaf.within(part)));
            let below = |gap: Span| before.into_iter().flat_map(move |leaf| leaf.within(gap));
            let mut runs = Vec::new();
            overlay(part, above.within(part), below, |run| {
                if run.place != Place::Zero {
                    put(run, &mut runs);
                }
            });
            counts.take(&runs);
            if !runs.is_empty() {
                changed.push((number, runs));
            }
        }
        let mut rest = Vec::new();
        for run in above.into_runs() {
            for number in numbers(run.span).filter(|number| !chosen.contains(number)) {
                let span = LeafRef::span_of(number).common(run.span);
                let place = run.place.advance(span.start - run.span.start);
                put(Run { span, place }, &mut rest);
            }
        }
        rest.shrink_to_fit();
        counts.settle(covered, &rest, &leaves);
        Merged { runs: rest, leaves, changed, counts }
    }
}

impl Merged {
    /// The same without leaves that are to be written: what they have is above the leaves.
    #[must_use]
    pub fn without_leaves(mut self) -> Self {
        let changed = std::mem::take(&mut self.changed);
        self.runs.extend(changed.into_iter().flat_map(|(_, runs)| runs));
        self.runs.sort_unstable_by_key(|run| run.span.start);
        self
    }
}

/// Calls `take` with the runs of `upper`, and between them with those of `lower`, in order.
fn overlay<L: Iterator<Item = Run>>(
    whole: Span,
    upper: impl Iterator<Item = Run>,
    lower: impl Fn(Span) -> L,
    mut take: impl FnMut(Run),
) {
    let mut at = whole.start;
    for run in upper {
        lower(Span { start: at, blocks: run.span.start - at }).for_each(&mut take);
        at = run.span.end();
        take(run);
    }
    lower(Span { start: at, blocks: whole.end() - at }).for_each(&mut take);
}

/// Appends a run, to the one before it if it goes on there.
fn put(run: Run, out: &mut Vec<Run>) {
    if let Some(last) = out.last_mut()
        && last.span.end() == run.span.start
        && last.place.continues(last.span.blocks, &run.place)
    {
        last.span.blocks += run.span.blocks;
        return;
    }
    out.push(run);
}

/// Zeroes take whole leaves away, which are counted until they are read. They are kept where they
/// cover a part of one.
fn put_zeroes(
    span: Span,
    leaves: &mut BTreeMap<u64, FramePlace>,
    counts: &mut Counts,
    out: &mut Vec<Run>,
) {
    let is_whole = |number: u64| LeafRef::span_of(number).common(span).blocks == LEAF_BLOCKS;
    let within = leaves.range(numbers(span)).map(|(number, _)| *number);
    let (whole, parts): (Vec<_>, Vec<_>) = within.partition(|number| is_whole(*number));
    for number in whole {
        if let Some(place) = leaves.remove(&number) {
            counts.drop_leaf(LeafRef { number, place });
        }
    }
    for number in parts {
        put(Run { span: LeafRef::span_of(number).common(span), place: Place::Zero }, out);
    }
}

/// The leaves of blocks.
fn numbers(span: Span) -> std::ops::Range<u64> {
    span.start / LEAF_BLOCKS..span.end().div_ceil(LEAF_BLOCKS)
}
