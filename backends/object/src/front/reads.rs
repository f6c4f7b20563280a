//! What reads want of the bucket, now and soon.

use super::{By, Fetch, Front};
use crate::extents::Span;
use crate::format::LeafRef;
use crate::ids::Place;
use crate::map::Found;

/// Nothing is fetched ahead whose pieces are shorter on average, in blocks.
const PIECE_BLOCKS_MIN: u64 = 8;
/// Nothing more is asked to be fetched ahead while so many pieces wait for the worker.
const AHEAD_MAX: usize = 1024;

impl Front {
    /// A user reads a span. The worker fetches ahead of a stream of such readings.
    pub(crate) fn note_reading(&mut self, span: Span) {
        self.unread_ticks = 0;
        let Some(wanted) = self.streams.read(span) else { return };
        let pieces = self.map.cover(wanted);
        let in_bucket = pieces.into_iter().filter_map(|(span, found)| match found {
            Found::At(place) => Some((span, place)),
            // A leaf that is not in memory comes with the reading itself.
            Found::Zero | Found::In(_) => None,
        });
        let wanted_pieces: Vec<_> = in_bucket.collect();
        let blocks: u64 = wanted_pieces.iter().map(|(span, _)| span.blocks).sum();
        if blocks < wanted_pieces.len() as u64 * PIECE_BLOCKS_MIN {
            return self.streams.is_scattered(wanted);
        }
        if !wanted_pieces.is_empty() && self.ahead.len() < AHEAD_MAX {
            self.ahead.extend(wanted_pieces);
            self.effects.rouse = true;
        }
    }

    /// Has the worker fetch blocks for a job, whose buffer gets them at that offset.
    pub(crate) fn fetch(
        &mut self,
        (user, job): (usize, usize),
        at: usize,
        (span, place): (Span, Place),
    ) {
        let id = self.fetching.insert((user, job, at));
        self.fetches.push(Fetch { id, span, by: By::Place(place) });
        self.effects.rouse = true;
        if self.is_shut {
            self.refuse_fetches();
        }
    }

    /// The same for blocks that a leaf knows, which is fetched first. Without blocks, only the leaf
    /// is.
    pub(crate) fn fetch_by(
        &mut self,
        (user, job): (usize, usize),
        at: usize,
        (span, leaf): (Span, LeafRef),
    ) {
        let id = self.fetching.insert((user, job, at));
        if !self.loads.waiting.contains_key(&leaf) {
            self.loads.new.push(leaf);
        }
        self.loads.waiting.entry(leaf).or_default().push((id, span));
        self.effects.rouse = true;
        if self.is_shut {
            self.refuse_fetches();
        }
    }
}
