//! The bytes of a read that have arrived.

use crate::decoder::ReplyError;
use crate::request::Request;

/// The most gaps within one read at a time.
pub const COVERAGE_GAPS_MAX: usize = 1024;

/// The bytes of a read that have arrived. A server may send them in pieces, in any order, but each
/// one once; a success that leaves some out is a violation. Pieces in order cost no allocation.
#[derive(Clone, Debug)]
pub struct ReadCoverage {
    /// All bytes before this have arrived.
    next: u64,
    end: u64,
    /// Start and end of what arrived beyond a gap, sorted.
    beyond: Vec<(u64, u64)>,
}

impl ReadCoverage {
    /// Nothing has arrived yet.
    #[must_use]
    pub fn new(request: &Request) -> Self {
        let end = request.offset.saturating_add(request.length);
        Self { next: request.offset, end, beyond: Vec::new() }
    }

    /// Notes a data chunk or a hole that [`crate::ReplyDecoder`] accepted.
    ///
    /// # Errors
    /// When a byte has arrived before, or there are too many gaps.
    pub fn add(&mut self, at: u64, len: u32) -> Result<(), ReplyError> {
        const OVERLAP: ReplyError = ReplyError::Violation("a byte of a read arrived twice");
        let stop = at.saturating_add(u64::from(len));
        if at < self.next || stop > self.end {
            return Err(OVERLAP);
        }
        let index = self.beyond.partition_point(|(start, _)| *start < at);
        let is_free = index.checked_sub(1).is_none_or(|before| self.beyond[before].1 <= at)
            && self.beyond.get(index).is_none_or(|(start, _)| stop <= *start);
        if !is_free {
            return Err(OVERLAP);
        }
        if at > self.next {
            if self.beyond.len() == COVERAGE_GAPS_MAX {
                return Err(ReplyError::Violation("a read in too many pieces"));
            }
            self.beyond.insert(index, (at, stop));
            return Ok(());
        }
        self.next = stop;
        let joined = self.beyond.iter().take_while(|(start, end)| {
            let is_next = *start == self.next;
            self.next = if is_next { *end } else { self.next };
            is_next
        });
        let joined = joined.count();
        self.beyond.drain(..joined);
        Ok(())
    }

    /// Whether every byte has arrived.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.next == self.end
    }
}
