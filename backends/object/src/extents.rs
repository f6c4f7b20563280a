//! Which blocks are where: disjoint runs of blocks, each with a value.
//!
//! The journal's batches and the map of the bucket are such lists. A later run covers earlier ones
//! and cuts them.

use std::collections::BTreeMap;

use crate::ids::BLOCK_BYTES;

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    /// The first block.
    pub start: u64,
    /// How many.
    pub blocks: u64,
}

impl Span {
    /// One past the last block.
    #[must_use]
    pub fn end(self) -> u64 {
        self.start + self.blocks
    }

    /// Whether it has no block.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.blocks == 0
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.blocks * BLOCK_BYTES
    }

    /// The blocks that both have; empty if there are none.
    #[must_use]
    pub fn common(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self { start, blocks: self.end().min(other.end()).saturating_sub(start) }
    }
}

/// The value of a run of blocks, such as the place of its bytes.
pub trait Piece: Clone {
    /// The value of what is left without the first `blocks` blocks.
    #[must_use]
    fn after(&self, blocks: u64) -> Self;

    /// Whether a run of `blocks` blocks with this value and the run behind it with the value `next`
    /// are one run with this value.
    fn continues(&self, blocks: u64, next: &Self) -> bool {
        let _ = (blocks, next);
        false
    }
}

/// Disjoint runs in the order of their blocks.
#[derive(Clone, Debug)]
pub struct Extents<V> {
    /// By first block: the number of blocks, which is never 0, and the value.
    runs: BTreeMap<u64, (u64, V)>,
}

impl<V> Default for Extents<V> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl<V: Piece> Extents<V> {
    /// The number of runs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether there is no run.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// All runs.
    pub fn iter(&self) -> impl Iterator<Item = (Span, &V)> {
        self.runs.iter().map(|(&start, (blocks, value))| (Span { start, blocks: *blocks }, value))
    }

    /// Gives a run of blocks a value, whatever they had before.
    pub fn insert(&mut self, span: Span, value: V) {
        if span.is_empty() {
            return;
        }
        self.remove(span);
        let Span { mut start, mut blocks } = span;
        let mut value = value;
        if let Some((&before, (count, had))) = self.runs.range_mut(..start).next_back()
            && before + *count == start
            && had.continues(*count, &value)
        {
            *count += blocks;
            (start, blocks, value) = (before, *count, had.clone());
        }
        if let Some((_, (_, next))) = self.runs.get_key_value(&(start + blocks))
            && value.continues(blocks, next)
            && let Some((count, _)) = self.runs.remove(&(start + blocks))
        {
            blocks += count;
        }
        self.runs.insert(start, (blocks, value));
    }

    /// Takes a run of blocks out.
    pub fn remove(&mut self, span: Span) {
        if span.is_empty() {
            return;
        }
        if let Some((&start, (blocks, value))) = self.runs.range_mut(..span.start).next_back() {
            let end = start + *blocks;
            if end > span.start {
                *blocks = span.start - start;
                if end > span.end() {
                    let rest = value.after(span.end() - start);
                    self.runs.insert(span.end(), (end - span.end(), rest));
                    return;
                }
            }
        }
        while let Some((&start, _)) = self.runs.range(span.start..span.end()).next()
            && let Some((blocks, value)) = self.runs.remove(&start)
        {
            let end = start + blocks;
            if end > span.end() {
                let rest = value.after(span.end() - start);
                self.runs.insert(span.end(), (end - span.end(), rest));
            }
        }
    }

    /// The runs that have blocks of `span`, cut to it.
    pub fn within(&self, span: Span) -> impl Iterator<Item = (Span, V)> {
        let before = self.runs.range(..span.start).next_back();
        let from = before.filter(|(start, (blocks, _))| *start + blocks > span.start);
        let first = from.map_or(span.start, |(start, _)| *start);
        // An empty span has no runs, whatever it lies in.
        let end = if span.is_empty() { first } else { span.end() };
        self.runs.range(first..end).map(move |(&start, (blocks, value))| {
            let common = Span { start, blocks: *blocks }.common(span);
            let skipped = common.start - start;
            let value = if skipped > 0 { value.after(skipped) } else { value.clone() };
            (common, value)
        })
    }

    /// All of `span` in order: runs that have a value, and the gaps between them.
    pub fn cover(&self, span: Span) -> Vec<(Span, Option<V>)> {
        let mut out = Vec::new();
        let mut at = span.start;
        for (run, value) in self.within(span) {
            if run.start > at {
                out.push((Span { start: at, blocks: run.start - at }, None));
            }
            at = run.end();
            out.push((run, Some(value)));
        }
        if at < span.end() {
            out.push((Span { start: at, blocks: span.end() - at }, None));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u64 = 40;

    /// A place in a numbered write, so that cuts show.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct At {
        write: usize,
        block: u64,
        merges: bool,
    }

    impl Piece for At {
        fn after(&self, blocks: u64) -> Self {
            Self { block: self.block + blocks, ..*self }
        }

        fn continues(&self, blocks: u64, next: &Self) -> bool {
            self.merges && next.merges && self.after(blocks).block == next.block
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Span, bool),
        Remove(Span),
    }

    fn span() -> impl Strategy<Value = Span> {
        (0..BLOCKS, 0..BLOCKS / 2)
            .prop_map(|(start, blocks)| Span { start, blocks: blocks.min(BLOCKS - start) })
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (span(), any::<bool>()).prop_map(|(span, merges)| Step::Insert(span, merges)),
            span().prop_map(Step::Remove),
        ]
    }

    /// What a block has, apart from the write that merged runs lose.
    fn essence(at: At) -> (u64, bool, Option<usize>) {
        (at.block, at.merges, (!at.merges).then_some(at.write))
    }

    proptest! {
        #[test]
        fn a_list_answers_like_an_array(
            steps in prop::collection::vec(step(), 1..40),
            asked in span(),
        ) {
            let mut extents = Extents::default();
            let mut model: Vec<Option<At>> = vec![None; BLOCKS as usize];
            for (write, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Insert(span, merges) => {
                        // Values that merge continue over the whole volume.
                        let block = if merges { span.start } else { 0 };
                        let value = At { write, block, merges };
                        extents.insert(span, value);
                        for skip in 0..span.blocks {
                            model[(span.start + skip) as usize] = Some(value.after(skip));
                        }
                    }
                    Step::Remove(span) => {
                        extents.remove(span);
                        model[span.start as usize..span.end() as usize].fill(None);
                    }
                }
                let count = model.iter().filter(|at| at.is_some()).count() as u64;
                prop_assert_eq!(extents.iter().map(|(span, _)| span.blocks).sum::<u64>(), count);
                let runs: Vec<_> = extents.iter().collect();
                for pair in runs.windows(2) {
                    prop_assert!(pair[0].0.end() <= pair[1].0.start, "disjoint and in order");
                    let touch = pair[0].0.end() == pair[1].0.start;
                    prop_assert!(!touch || !pair[0].1.continues(pair[0].0.blocks, pair[1].1));
                }
            }
            let mut at = asked.start;
            for (span, value) in extents.cover(asked) {
                prop_assert_eq!(span.start, at);
                prop_assert!(!span.is_empty());
                at = span.end();
                for skip in 0..span.blocks {
                    let want = model[(span.start + skip) as usize].map(essence);
                    prop_assert_eq!(value.map(|value| essence(value.after(skip))), want);
                }
            }
            prop_assert_eq!(at, asked.end());
        }
    }
}
