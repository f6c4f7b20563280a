//! The map of committed blocks: a fold of the log objects in the order of their numbers.
//!
//! It has three layers, and leaves below them. What is committed goes to the upper layer. A
//! checkpoint takes that one as it is, without a copy, merges it with the lower one while ops go
//! on, and puts the result in the place of both. What leaves take over leaves the lower layer.
//! Leaves are in the store; those that were used lately are also in memory, up to a bound.

mod layer;
mod leaf;
mod merge;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::extents::{Extents, Piece, Span};
use crate::format::{Directory, Entry, FramePlace, LEAF_BLOCKS, LeafRef, Placed, Run};
#[cfg(test)]
use crate::ids::Lba;
use crate::ids::{Place, Seq};
use layer::Layer;
use leaf::Loaded;

pub use leaf::Leaf;
pub use merge::{Merge, MergeLimits, Merged};

/// Where the committed blocks of a volume are.
#[derive(Debug, Default)]
pub struct Map {
    /// What is folded since the last checkpoint began.
    upper: Extents<Place>,
    /// What was folded before, while a checkpoint of it is made.
    frozen: Arc<Extents<Place>>,
    lower: Arc<Layer>,
    /// By number.
    leaves: Arc<BTreeMap<u64, FramePlace>>,
    loaded: Loaded,
}

/// Where blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// They are zeroes.
    Zero,
    /// At this place in an object.
    At(Place),
    /// This leaf knows, which is not in memory.
    In(LeafRef),
}

/// The map as it was when a checkpoint began.
#[derive(Debug)]
pub struct Frozen {
    frozen: Arc<Extents<Place>>,
    lower: Arc<Layer>,
    leaves: Arc<BTreeMap<u64, FramePlace>>,
}

/// What a checkpoint has made of that.
#[derive(Debug)]
pub struct Settled {
    /// What is newer than the leaves.
    pub runs: Vec<Run>,
    /// All leaves, by number.
    pub leaves: BTreeMap<u64, FramePlace>,
    /// Those of them that are new.
    pub changed: Vec<(u64, Arc<Leaf>)>,
}

/// What a map does not need any more. It is dropped without a lock.
pub struct Outdated(#[expect(dead_code, reason = "it is dropped")] (Frozen, Vec<Arc<Leaf>>));

impl Map {
    /// The map that a directory has.
    #[must_use]
    pub fn of_directory(directory: Directory) -> Self {
        let leaves = directory.leaves.iter().map(|leaf| (leaf.number, leaf.place)).collect();
        let lower = Arc::new(Layer::new(directory.runs));
        Self { lower, leaves: Arc::new(leaves), ..Self::default() }
    }

    /// Sets how many bytes the map may take in memory, of which leaves take three eighths.
    pub fn keep_within(&mut self, map_bytes: u64) {
        self.loaded.keep_within((map_bytes / 8 * 3) as usize);
    }

    /// Takes the next blocks of the log.
    pub fn fold(&mut self, placed: &Placed) {
        let Placed { lba, blocks, place, from } = *placed;
        let span = Span { start: lba.0, blocks };
        let Some(from) = from else { return self.upper.insert(span, place) };
        for part in self.still_in(span, from) {
            self.upper.insert(part, place.advance(part.start - span.start));
        }
    }

    /// The parts of a span that an object has, or that only leaves know: what is moved was looked
    /// up in leaves that are the same by now.
    fn still_in(&self, span: Span, object: Seq) -> Vec<Span> {
        let is_it = |place: Place| matches!(place, Place::Object { seq, .. } if seq == object);
        let mut parts = Vec::new();
        let mut take = |part: Span, place: Option<Place>| {
            if !part.is_empty() && place.is_none_or(is_it) {
                parts.push(part);
            }
        };
        for (part, place) in self.upper.cover(span) {
            if place.is_some() {
                take(part, place);
                continue;
            }
            for (part, place) in self.frozen.cover(part) {
                if place.is_some() {
                    take(part, place);
                    continue;
                }
                let mut at = part.start;
                for Run { span, place } in self.lower.within(part) {
                    take(Span { start: at, blocks: span.start - at }, None);
                    take(span, Some(place));
                    at = span.end();
                }
                take(Span { start: at, blocks: part.end() - at }, None);
            }
        }
        parts
    }

    /// Takes the entries of the next object.
    pub fn fold_object(&mut self, seq: Seq, entries: &[Entry]) {
        entries.iter().filter_map(|entry| entry.placed(seq)).for_each(|placed| self.fold(&placed));
    }

    /// The pieces of a range, all of it in order.
    #[must_use]
    pub fn cover(&self, span: Span) -> Vec<(Span, Found)> {
        let mut out = Vec::new();
        for (span, place) in self.upper.cover(span) {
            match place {
                Some(place) => out.push((span, Found::of(place))),
                None => {
                    for (span, place) in self.frozen.cover(span) {
                        match place {
                            Some(place) => out.push((span, Found::of(place))),
                            None => self.cover_lower(span, &mut out),
                        }
                    }
                }
            }
        }
        out
    }

    fn cover_lower(&self, span: Span, out: &mut Vec<(Span, Found)>) {
        let mut at = span.start;
        for Run { span, place } in self.lower.within(span) {
            self.cover_leaves(Span { start: at, blocks: span.start - at }, out);
            at = span.end();
            out.push((span, Found::of(place)));
        }
        self.cover_leaves(Span { start: at, blocks: span.end() - at }, out);
    }

    /// The pieces of a range that no layer has.
    fn cover_leaves(&self, span: Span, out: &mut Vec<(Span, Found)>) {
        let mut at = span.start;
        let mut to = |end: u64, found: Found, out: &mut Vec<(Span, Found)>| {
            if at < end {
                out.push((Span { start: at, blocks: end - at }, found));
                at = end;
            }
        };
        let numbers = span.start / LEAF_BLOCKS..span.end().div_ceil(LEAF_BLOCKS);
        for (&number, &place) in self.leaves.range(numbers) {
            let part = LeafRef::span_of(number).common(span);
            to(part.start, Found::Zero, out);
            match self.loaded.get(number) {
                None => to(part.end(), Found::In(LeafRef { number, place }), out),
                Some(leaf) => {
                    for Run { span, place } in leaf.within(part) {
                        to(span.start, Found::Zero, out);
                        to(span.end(), Found::At(place), out);
                    }
                }
            }
        }
        to(span.end(), Found::Zero, out);
    }

    /// A leaf, if it is in memory.
    #[must_use]
    pub fn leaf(&self, number: u64) -> Option<Arc<Leaf>> {
        self.loaded.get(number).cloned()
    }

    /// Whether it still has a leaf.
    #[must_use]
    pub fn has_leaf(&self, leaf: LeafRef) -> bool {
        self.leaves.get(&leaf.number) == Some(&leaf.place)
    }

    /// Keeps a leaf in memory, if it still is one. Returns what it takes the place of, to be
    /// dropped without a lock.
    pub fn keep(&mut self, of: LeafRef, leaf: &Arc<Leaf>) -> Vec<Arc<Leaf>> {
        match self.has_leaf(of) {
            true => self.loaded.insert(of.number, Arc::clone(leaf)),
            false => Vec::new(),
        }
    }

    /// Whether leaves are in memory.
    #[must_use]
    pub fn has_loaded(&self) -> bool {
        self.loaded.bytes() > 0
    }

    /// Takes the leaves out of memory. They are to be dropped without a lock.
    pub fn unload(&mut self) -> Vec<Arc<Leaf>> {
        self.loaded.clear()
    }

    /// The map as it is now, for a checkpoint, which ends with [`Map::settle`].
    ///
    /// # Panics
    /// When a checkpoint has begun and not ended.
    pub fn freeze(&mut self) -> Frozen {
        assert!(self.frozen.is_empty(), "one checkpoint at a time");
        self.frozen = Arc::new(std::mem::take(&mut self.upper));
        Frozen {
            frozen: Arc::clone(&self.frozen),
            lower: Arc::clone(&self.lower),
            leaves: Arc::clone(&self.leaves),
        }
    }

    /// The checkpoint has made this of what was frozen, and it is committed.
    pub fn settle(&mut self, settled: Settled) -> Outdated {
        let lower = Arc::new(Layer::new(settled.runs));
        let before = Frozen {
            frozen: std::mem::take(&mut self.frozen),
            lower: std::mem::replace(&mut self.lower, lower),
            leaves: std::mem::replace(&mut self.leaves, Arc::new(settled.leaves)),
        };
        let mut leaves = self.loaded.retain(&self.leaves);
        for (number, leaf) in settled.changed {
            leaves.extend(self.loaded.insert(number, leaf));
        }
        Outdated((before, leaves))
    }

    /// Bytes that it takes in memory, about.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let layers = (self.upper.len() + self.frozen.len()) * layer::EXTENT_BYTES;
        let lower = self.lower.bytes() + self.leaves.len() * leaf::REF_BYTES;
        (layers + lower + self.loaded.bytes()) as u64
    }
}

impl Found {
    fn of(place: Place) -> Self {
        match place {
            Place::Zero => Self::Zero,
            Place::Object { .. } => Self::At(place),
        }
    }
}

impl Piece for Place {
    fn after(&self, blocks: u64) -> Self {
        self.advance(blocks)
    }

    fn continues(&self, blocks: u64, next: &Self) -> bool {
        match (*self, *next) {
            (Self::Zero, Self::Zero) => true,
            (
                Self::Object { seq, frame, skip, run, .. },
                Self::Object { seq: of, frame: at, skip: behind, .. },
            ) => {
                let is_same_run = (seq, frame) == (of, at);
                is_same_run && u64::from(skip) + blocks == u64::from(behind) && behind < run
            }
            _ => false,
        }
    }
}

/// The blocks of a span that are committed, for tests.
#[cfg(test)]
pub(crate) async fn read_committed(
    map: &Map,
    fetcher: &crate::fetch::Fetcher,
    span: Span,
) -> sheave_core::Result<Vec<u8>> {
    let mut data = Vec::new();
    for (span, found) in map.cover(span) {
        let some = match found {
            Found::Zero => fetcher.fetch(Lba(span.start), span.blocks, Place::Zero).await?,
            Found::At(place) => fetcher.fetch(Lba(span.start), span.blocks, place).await?,
            Found::In(leaf) => fetcher.fetch_by(fetcher.load(leaf).await?, span).await?,
        };
        data.extend(some);
    }
    Ok(data)
}
