//! Block status, which waits for leaves of the map that are not in memory.

use sheave_core::extents::{ExtentList, data, hole};
use sheave_core::{ByteRange, Io, Outcome, Result, Tag};

use super::{Job, ObjectBackend, Work, span_of};
use crate::extents::Span;
use crate::format::LeafRef;
use crate::front::Whereabouts;

/// A block status looks at so many blocks at a time, and at so many runs in all.
const STATUS_BLOCKS: u64 = 64 << 10;
const STATUS_RUNS_MAX: usize = 4096;

impl ObjectBackend {
    /// What a range has. `None`: the job waits for a leaf.
    pub(super) fn block_status(
        &mut self,
        (range, extents_max): (ByteRange, usize),
        tag: Tag,
        io: &mut dyn Io,
    ) -> Option<Outcome> {
        match self.look(range, extents_max) {
            Ok(outcome) => Some(outcome),
            Err(leaf) => {
                let job = self.jobs.insert(Job { tag, work: Work::Status(range, extents_max) });
                self.wait_for(job, leaf, io);
                None
            }
        }
    }

    /// Whether the job is a block status.
    pub(super) fn is_status(&self, job: usize) -> bool {
        matches!(self.jobs.get(job), Some(Job { work: Work::Status(..), .. }))
    }

    /// The leaf that a block status waits for is there, or is not to be had.
    pub(super) fn leaf_arrived(&mut self, key: usize, outcome: Result<Vec<u8>>, io: &mut dyn Io) {
        let Some(Job { work: Work::Status(range, extents_max), .. }) = self.jobs.get(key) else {
            return;
        };
        let outcome = match outcome {
            Ok(_) => self.look(*range, *extents_max),
            Err(error) => Ok(Err(error)),
        };
        match outcome {
            Ok(outcome) => self.complete(key, outcome, io),
            // It has been dropped again, for others.
            Err(leaf) => self.wait_for(key, leaf, io),
        }
    }

    fn wait_for(&mut self, job: usize, leaf: LeafRef, io: &mut dyn Io) {
        let (user, nothing) = (self.user, Span { start: 0, blocks: 0 });
        self.with(io, |front| front.fetch_by((user, job), 0, (nothing, leaf)));
    }

    /// What a range has, up to the first leaf that is not in memory; that leaf, if it is needed for
    /// the first block.
    fn look(&self, range: ByteRange, extents_max: usize) -> std::result::Result<Outcome, LeafRef> {
        let mut list = ExtentList::new(extents_max);
        let mut left = span_of(range);
        let (first, mut runs) = (left.start, 0);
        while !left.is_empty() && runs < STATUS_RUNS_MAX {
            let piece = Span { start: left.start, blocks: left.blocks.min(STATUS_BLOCKS) };
            let resolve = |front: &mut crate::front::Front| {
                front.check_read("block_status").map(|()| front.resolve(piece))
            };
            let parts = match self.opened.engine.with(resolve) {
                Ok(parts) => parts,
                Err(error) => return Ok(Err(error)),
            };
            runs += parts.len();
            for (part, whereabouts) in parts {
                let is_pushed = match whereabouts {
                    Whereabouts::Zero => list.push(hole(part.bytes())),
                    Whereabouts::Leaf(leaf) if part.start == first => return Err(leaf),
                    Whereabouts::Leaf(_) => false,
                    _ => list.push(data(part.bytes())),
                };
                if !is_pushed {
                    return Ok(list.into_reply());
                }
            }
            left = Span { start: piece.end(), blocks: left.blocks - piece.blocks };
        }
        Ok(list.into_reply())
    }
}
