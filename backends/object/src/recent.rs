//! What was written and is not in the bucket yet: batches of writes, each of which becomes an
//! object. The newest one that has a block has its data.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::extents::{Extents, Piece, Span};
use crate::ids::{BLOCK_BYTES, Lsn};
use crate::upload::{BATCH_ENTRIES_MAX, JournalPlace};

/// A batch with more runs is sealed, so that memory and the index of its object stay small.
const RUNS_MAX: usize = 16 << 10;
/// A write adds at most so many: itself, and what it cuts off of another one.
const RUNS_OF_WRITE: usize = 2;

const _: () = assert!(RUNS_MAX <= BATCH_ENTRIES_MAX);

/// Where blocks are that are not in the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fresh {
    /// They are zeroes.
    Zero,
    /// In the journal.
    Journal(JournalPlace),
}

impl Piece for Fresh {
    fn after(&self, blocks: u64) -> Self {
        match *self {
            Self::Zero => Self::Zero,
            Self::Journal(place) => {
                // A record has few blocks, and all are in one segment.
                let page = place.page + u32::try_from(blocks).expect("blocks of a segment");
                Self::Journal(JournalPlace { page, ..place })
            }
        }
    }

    fn continues(&self, _: u64, next: &Self) -> bool {
        matches!((self, next), (Self::Zero, Self::Zero))
    }
}

/// The writes of some LSNs that follow one another; later ones cover earlier ones.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) first: Lsn,
    pub(crate) last: Lsn,
    pub(crate) extents: Extents<Fresh>,
    /// Blocks that are in the journal.
    data_blocks: u64,
    /// When the first write came.
    since: Option<Instant>,
}

impl Batch {
    fn behind(last: Lsn) -> Self {
        Self { first: last.next(), last, extents: Extents::default(), data_blocks: 0, since: None }
    }
}

/// All batches.
#[derive(Debug)]
pub(crate) struct Recent {
    open: Batch,
    sealed: VecDeque<Arc<Batch>>,
    /// How many of the sealed ones are on their way to the bucket.
    taken: usize,
    /// A batch has at most so much data.
    seal_bytes: u64,
}

impl Recent {
    pub(crate) fn new(committed: Lsn, seal_bytes: u64) -> Self {
        Self { open: Batch::behind(committed), sealed: VecDeque::new(), taken: 0, seal_bytes }
    }

    /// Adds the next write. True: a batch was sealed.
    pub(crate) fn add(&mut self, lsn: Lsn, span: Span, fresh: Fresh) -> bool {
        debug_assert_eq!(lsn, self.open.last.next(), "writes are added in their order");
        // What later writes cover counts too, which keeps a batch's part of the journal small.
        let data_blocks = if fresh == Fresh::Zero { 0 } else { span.blocks };
        let bytes = (self.open.data_blocks + data_blocks) * BLOCK_BYTES;
        let is_full = bytes > self.seal_bytes || self.open.extents.len() + RUNS_OF_WRITE > RUNS_MAX;
        let has_sealed = is_full && self.seal();
        self.open.last = lsn;
        self.open.since.get_or_insert_with(Instant::now);
        self.open.extents.insert(span, fresh);
        self.open.data_blocks += data_blocks;
        has_sealed
    }

    /// Seals what there is. True if it is anything.
    pub(crate) fn seal(&mut self) -> bool {
        if self.open.extents.is_empty() {
            return false;
        }
        let next = Batch::behind(self.open.last);
        self.sealed.push_back(Arc::new(std::mem::replace(&mut self.open, next)));
        true
    }

    /// The last write that is sealed.
    pub(crate) fn sealed(&self) -> Lsn {
        Lsn(self.open.first.0 - 1)
    }

    /// The next sealed batch, for the bucket.
    pub(crate) fn take(&mut self) -> Option<Arc<Batch>> {
        let batch = self.sealed.get(self.taken)?;
        self.taken += 1;
        Some(Arc::clone(batch))
    }

    /// Drops the batch that ends there and is the oldest: the map has it.
    pub(crate) fn commit(&mut self, last: Lsn) -> Option<Arc<Batch>> {
        let oldest = self.sealed.pop_front_if(|batch| batch.last == last);
        self.taken -= usize::from(oldest.is_some());
        oldest
    }

    /// Whether there is nothing that the bucket lacks.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.extents.is_empty() && self.sealed.is_empty()
    }

    /// Whether the bucket lacks a write up to this one. Records that change nothing count only
    /// where they are between others.
    pub(crate) fn lacks(&self, upto: Lsn) -> bool {
        let oldest = self.sealed.front().map_or(&self.open, |batch| batch);
        !oldest.extents.is_empty() && oldest.first <= upto
    }

    /// Whether one of them is in no sealed batch.
    pub(crate) fn has_unsealed_upto(&self, upto: Lsn) -> bool {
        self.has_unsealed() && self.open.first <= upto
    }

    /// The last write of the sealed batches.
    pub(crate) fn sealed_upto(&self) -> Option<Lsn> {
        self.sealed.back().map(|batch| batch.last)
    }

    /// Whether a batch waits for the bucket, or is on its way.
    pub(crate) fn has_sealed(&self) -> bool {
        !self.sealed.is_empty()
    }

    /// Whether there are writes that no batch has sealed.
    pub(crate) fn has_unsealed(&self) -> bool {
        !self.open.extents.is_empty()
    }

    /// Bytes of data that were written and that the bucket lacks. Zeroes have none.
    pub(crate) fn bytes(&self) -> u64 {
        self.batches().map(|batch| batch.data_blocks).sum::<u64>() * BLOCK_BYTES
    }

    /// Since when the oldest write waits that the bucket lacks.
    pub(crate) fn since(&self) -> Option<Instant> {
        let oldest = self.sealed.front().map_or(&self.open, |batch| batch);
        oldest.since.filter(|_| !self.is_empty())
    }

    /// Calls `take` with the parts of `span` in order: where they are, or `None` for those that no
    /// batch has.
    pub(crate) fn cover(&self, span: Span, take: &mut dyn FnMut(Span, Option<Fresh>)) {
        fn descend<'a>(
            mut batches: impl Iterator<Item = &'a Batch> + Clone,
            span: Span,
            take: &mut dyn FnMut(Span, Option<Fresh>),
        ) {
            let Some(batch) = batches.find(|batch| !batch.extents.is_empty()) else {
                return take(span, None);
            };
            let mut at = span.start;
            let below = |from: u64, to: u64, take: &mut dyn FnMut(Span, Option<Fresh>)| {
                if from < to {
                    let gap = Span { start: from, blocks: to - from };
                    descend(batches.clone(), gap, take);
                }
            };
            for (run, fresh) in batch.extents.within(span) {
                below(at, run.start, take);
                take(run, Some(fresh));
                at = run.end();
            }
            below(at, span.end(), take);
        }
        descend(self.batches(), span, take);
    }

    /// The newest first.
    fn batches(&self) -> impl Iterator<Item = &Batch> + Clone {
        std::iter::once(&self.open).chain(self.sealed.iter().rev().map(|batch| &**batch))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u64 = 30;

    #[derive(Clone, Debug)]
    enum Step {
        Add(Span, bool),
        Seal,
        Take,
        Commit,
    }

    fn step() -> impl Strategy<Value = Step> {
        let span = (0..BLOCKS, 0..BLOCKS)
            .prop_map(|(start, blocks)| Span { start, blocks: blocks.min(BLOCKS - start) });
        prop_oneof![
            4 => (span, any::<bool>()).prop_map(|(span, zero)| Step::Add(span, zero)),
            1 => Just(Step::Seal),
            1 => Just(Step::Take),
            1 => Just(Step::Commit),
        ]
    }

    proptest! {
        #[test]
        fn the_newest_batch_with_a_block_has_its_data(
            steps in prop::collection::vec(step(), 1..40),
        ) {
            let mut recent = Recent::new(Lsn(0), 200 * BLOCK_BYTES);
            // By block: the LSN of its last write that is not committed, and where it is.
            let mut model: Vec<Option<(Lsn, Fresh)>> = vec![None; BLOCKS as usize];
            let (mut lsn, mut taken) = (Lsn(0), VecDeque::new());
            for step in steps {
                match step {
                    Step::Add(span, zero) => {
                        lsn = lsn.next();
                        let place = JournalPlace { segment: lsn.0, page: 1 };
                        let fresh = if zero { Fresh::Zero } else { Fresh::Journal(place) };
                        recent.add(lsn, span, fresh);
                        for skip in 0..span.blocks {
                            let at = (span.start + skip) as usize;
                            model[at] = Some((lsn, fresh.after(skip)));
                        }
                    }
                    Step::Seal => drop(recent.seal()),
                    Step::Take => taken.extend(recent.take()),
                    Step::Commit => {
                        let Some(batch) = taken.pop_front() else { continue };
                        prop_assert!(recent.commit(batch.last).is_some());
                        for block in &mut model {
                            *block = block.filter(|(lsn, _)| *lsn > batch.last);
                        }
                    }
                }
                let mut at = 0;
                recent.cover(Span { start: 0, blocks: BLOCKS }, &mut |span, fresh| {
                    assert_eq!(span.start, at);
                    at = span.end();
                    for skip in 0..span.blocks {
                        let want = model[(span.start + skip) as usize].map(|(_, fresh)| fresh);
                        assert_eq!(fresh.map(|fresh| fresh.after(skip)), want);
                    }
                });
                prop_assert_eq!(at, BLOCKS);
            }
        }
    }
}
