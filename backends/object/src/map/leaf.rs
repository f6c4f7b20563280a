//! Leaves in memory.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::extents::Span;
use crate::format::{Form, FramePlace, LeafRef, Run};
use crate::ids::{Place, Seq};

/// Bytes that an entry of a tree takes beside its value, about.
const ENTRY_BYTES: usize = 32;
/// Bytes that a leaf takes in a map that only knows where it is.
pub(super) const REF_BYTES: usize = size_of::<FramePlace>() + ENTRY_BYTES;

/// A leaf: where the blocks of a part of the volume are. What it does not have is zeroes.
#[derive(Debug)]
pub struct Leaf {
    start: u64,
    runs: Vec<Packed>,
}

/// A run in little room. A leaf has 4096 blocks, and a run of an object has at most 16384.
#[derive(Clone, Copy, Debug)]
struct Packed {
    seq: u64,
    frame: u32,
    skip: u16,
    run: u16,
    start: u16,
    blocks: u16,
    form: u16,
}

const _: () = assert!(size_of::<Packed>() == 24);

impl Leaf {
    /// Of runs that are in the leaf, in order and without zeroes.
    #[must_use]
    pub fn new(number: u64, runs: &[Run]) -> Self {
        let start = LeafRef::span_of(number).start;
        let pack = |run: &Run| match run.place {
            Place::Zero => None,
            Place::Object { seq, frame, form, skip, run: of } => Some(Packed {
                seq: seq.0,
                frame,
                skip: skip as u16,
                run: of as u16,
                start: (run.span.start - start) as u16,
                blocks: run.span.blocks as u16,
                form: form.number(),
            }),
        };
        Self { start, runs: runs.iter().filter_map(pack).collect() }
    }

    /// The runs that have blocks of `span`, cut to it.
    pub fn within(&self, span: Span) -> impl Iterator<Item = Run> {
        let first = self.runs.partition_point(|run| self.unpack(run).span.end() <= span.start);
        let cut = move |packed: &Packed| {
            let Run { span: of, place } = self.unpack(packed);
            let common = of.common(span);
            let place = || place.advance(common.start - of.start);
            (!common.is_empty()).then(|| Run { span: common, place: place() })
        };
        self.runs[first..].iter().map_while(cut)
    }

    fn unpack(&self, packed: &Packed) -> Run {
        let Packed { seq, frame, skip, run, start, blocks, form } = *packed;
        let form = Form::of(form, u64::from(run)).expect("it was one");
        let [skip, run] = [skip, run].map(u32::from);
        let span = Span { start: self.start + u64::from(start), blocks: u64::from(blocks) };
        Run { span, place: Place::Object { seq: Seq(seq), frame, form, skip, run } }
    }

    /// Bytes that it takes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.runs.capacity() * size_of::<Packed>() + size_of::<Self>() + ENTRY_BYTES
    }
}

/// Leaves that were used lately, by number.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    leaves: BTreeMap<u64, Used>,
    bytes: usize,
    bytes_max: usize,
    /// The number from which on the next one is sought that was not used.
    hand: u64,
}

#[derive(Debug)]
struct Used {
    leaf: Arc<Leaf>,
    was_used: Cell<bool>,
}

impl Loaded {
    /// Sets how many bytes they may take.
    pub(super) fn keep_within(&mut self, bytes_max: usize) {
        self.bytes_max = bytes_max;
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    #[cfg(test)]
    pub(super) fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.leaves.len()
    }

    pub(super) fn get(&self, number: u64) -> Option<&Arc<Leaf>> {
        let used = self.leaves.get(&number)?;
        used.was_used.set(true);
        Some(&used.leaf)
    }

    /// Takes a leaf in. Returns those that it takes the place of.
    pub(super) fn insert(&mut self, number: u64, leaf: Arc<Leaf>) -> Vec<Arc<Leaf>> {
        let mut out: Vec<_> = self.remove(number).into_iter().collect();
        self.bytes += leaf.bytes();
        self.leaves.insert(number, Used { leaf, was_used: Cell::new(true) });
        // Each is passed over once at most, so two rounds are enough.
        while self.bytes > self.bytes_max && self.leaves.len() > 1 {
            let next = self.leaves.range(self.hand..).next().map(|(number, _)| *number);
            self.hand = next.map_or(0, |number| number + 1);
            let Some(next) = next.filter(|next| *next != number) else { continue };
            if !self.leaves[&next].was_used.replace(false) {
                out.extend(self.remove(next));
            }
        }
        out
    }

    /// Takes all out.
    pub(super) fn clear(&mut self) -> Vec<Arc<Leaf>> {
        self.bytes = 0;
        std::mem::take(&mut self.leaves).into_values().map(|used| used.leaf).collect()
    }

    /// Drops what is not in the map any more, or not as it was.
    pub(super) fn retain(&mut self, leaves: &BTreeMap<u64, FramePlace>) -> Vec<Arc<Leaf>> {
        let is_gone = |number: &u64| !leaves.contains_key(number);
        let gone: Vec<_> = self.leaves.keys().copied().filter(is_gone).collect();
        gone.into_iter().filter_map(|number| self.remove(number)).collect()
    }

    fn remove(&mut self, number: u64) -> Option<Arc<Leaf>> {
        let used = self.leaves.remove(&number)?;
        self.bytes -= used.leaf.bytes();
        Some(used.leaf)
    }
}
